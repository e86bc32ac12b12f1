r"""Diffusion policy: actions drawn from p(next actions | observations) keep both ways round an obstacle (2303.04137).

An expert drives round a round obstacle and tosses a coin for the side. Two policies imitate it with the same network:

    Gaussian    the next T_p actions given the observation are N(mean(o), diag(std(o)^2)): behaviour cloning. At the
                coin toss its mean is the average of left and right, which is straight ahead.
    diffusion   the next T_p actions, a state (2, T_p), are a sample of a conditional score model.

Both plan T_p = 8 actions, carry out T_a = 4 of them, and plan again (receding horizon). They observe position, velocity
and the place of the obstacle. The law of the expert is known: both sides have probability 1/2.

    python examples/policy.py              # train, drive, print the table, save examples/figures/policy.png
    python examples/policy.py --small      # seconds, smaller networks and fewer episodes
"""

import argparse
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

import scoresde as ss
from scoresde.metrics import wilson

AHEAD, EXECUTED, UNIT = 8, 4, 0.25  # T_p, T_a, and the unit of the observations that the networks read
BATCH = 128  # of both trainings
LOSS = ss.losses.DenoisingScoreMatching(ss.losses.KarrasWeighting(sigma_data=1.0, mean=0.0, std=1.4))
RADIUS, GOAL, STEP = 0.4, np.array([1.2, 0.0]), 0.1  # of the obstacle; relative to the obstacle; length of a step


class Detour:
    """A point robot, a round obstacle, and a goal behind it, with the methods of `gymnasium.Env`.

    An observation (5,) is position, velocity and y of the obstacle; an action (2,) is a velocity of length 1 at most.
    An episode ends with reward 1 at the goal, and with reward 0 at a collision; it is truncated after 48 steps.
    """

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Place obstacle and robot, and return the first observation and information."""
        rng = np.random.default_rng(seed)
        self.obstacle, self.steps = np.array([0.0, rng.uniform(-0.5, 0.5)]), 0
        self.position, self.velocity = self.obstacle - (1.2, 0.05 * rng.normal()), np.zeros(2)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Move, and return observation, reward, terminated, truncated and information."""
        self.steps += 1
        self.velocity = action / max(1.0, float(np.linalg.norm(action)))
        self.position = self.position + STEP * self.velocity
        reached = np.linalg.norm(self.position - self.obstacle - GOAL) < 0.1
        collided = np.linalg.norm(self.position - self.obstacle) < RADIUS
        return self._observation(), float(reached), bool(reached or collided), self.steps >= 48, {}

    def _observation(self) -> np.ndarray:
        return np.array([*self.position, *self.velocity, self.obstacle[1]], dtype=np.float32)


class Expert:
    """Drive beside the obstacle on a side chosen by a coin, then to the goal, with noise in every action."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng([seed, 1])  # independent of the environment
        self.side = self.rng.choice([-1, 1])

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        """Return the next action."""
        place = observation[:2] - [0.0, observation[4]]
        target = np.array([0.0, 0.65 * self.side]) if place[0] < -0.05 else GOAL
        return 0.9 * (target - place) / np.linalg.norm(target - place) + 0.2 * self.rng.normal(size=2)


def drive(plan, seeds: range, executed: int) -> list[dict]:
    """Drive an episode for each seed; `plan` maps observations (B, 5) and the step to actions (B, 2, >= executed)."""
    robots = [Detour() for _ in seeds]
    episodes = [{"observations": [env.reset(seed=s)[0]], "actions": []} for env, s in zip(robots, seeds, strict=True)]
    active = set(range(len(robots)))
    for step in tqdm(range(0, 48, executed), desc="driving", leave=False):
        actions = plan(np.stack([episode["observations"][-1] for episode in episodes]), step)
        for i in sorted(active):
            for action in actions[i].T[:executed]:
                observation, reward, terminated, truncated, _ = robots[i].step(action)
                episodes[i]["observations"].append(observation)
                episodes[i]["actions"].append(action)
                if terminated or truncated:
                    active.remove(i)
                    break
            episodes[i]["success"] = reward > 0
    for episode in episodes:
        episode["path"] = np.stack([o[:2] - (0, o[4]) for o in episode["observations"]])
        episode["up"] = bool(episode["path"][np.abs(episode["path"][:, 0]).argmin(), 1] > 0)
    return episodes


def by_experts(count: int):
    """Return the plan of `count` experts: one action at a time."""
    experts = [Expert(seed) for seed in range(count)]
    return lambda observations, step: np.stack([e(o)[:, None] for e, o in zip(experts, observations, strict=True)])


def chunks(episodes: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each T_p actions in a row (N, 2, T_p), and the observation before them (N, 5); the last action repeats."""
    rows, observed = [], []
    for episode in episodes:
        actions = np.stack([*episode["actions"], *[episode["actions"][-1]] * AHEAD])
        rows += [actions[k : k + AHEAD].T for k in range(len(episode["actions"]))]
        observed += episode["observations"][:-1]
    return torch.tensor(np.stack(rows), dtype=torch.float32), torch.tensor(np.stack(observed))


def gaussian_policy(network: torch.nn.Module, actions: torch.Tensor, observed: torch.Tensor, steps: int, rate: float):
    """Train N(mean(o), diag(std(o)^2)) by maximum likelihood; return the policies of its mean and of its samples."""
    optimizer, generator = torch.optim.Adam(network.parameters(), rate), torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def moments(o: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = network(torch.zeros(len(o), 2, AHEAD), torch.zeros(len(o)), o / UNIT).chunk(2, dim=1)
        return mean, log_std.clamp(-5, 2).exp()

    for _ in tqdm(range(steps), desc="Gaussian", leave=False):
        rows = torch.randint(len(actions), (BATCH,), generator=generator)
        mean, std = moments(observed[rows])
        optimizer.zero_grad()
        (0.5 * ((actions[rows] - mean) / std).square() + std.log()).mean().backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def draw(observations: np.ndarray, step: int, scale: float = 1.0) -> np.ndarray:
        mean, std = moments(torch.from_numpy(observations))
        return (mean + scale * std * torch.randn(mean.shape, generator=generator)).numpy()

    return {"Gaussian, its mean": partial(draw, scale=0.0), "Gaussian, drawn": draw}


def diffusion_policy(run: ss.Run):
    """Return the policy that samples p(next actions | observation) in 10 evaluations of the network."""
    sampler = ss.samplers.PredictorCorrector(ss.samplers.DPMSolverPP(), steps=10)

    def draw(observations: np.ndarray, step: int) -> np.ndarray:
        cond, seeds = torch.from_numpy(observations / UNIT), [100 * i + step for i in range(len(observations))]
        samples = sampler(run.model, shape=(len(cond), 2, AHEAD), cond=cond, seeds=seeds)
        return run.transform.inverse(samples.x).numpy()

    return draw


def interval(count: int, total: int) -> str:
    """Return a percentage with Wilson's 95% interval: "97% [95, 99]"."""
    share = wilson(count, total, z=1.96)
    return f"{100 * share.value:.0f}% [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def main(small: bool) -> dict[str, float]:
    """Train both policies, drive, print success and sides with 95% intervals, and return the figures by name."""
    shown, steps, rate, tests, width = (100, 200, 6e-3, 100, 96) if small else (400, 3000, 3e-3, 400, 128)
    expert = drive(by_experts(shown), range(shown), executed=1)
    actions, observations = chunks([episode for episode in expert if episode["success"]])
    torch.manual_seed(0)
    settings = {"shape": (2, AHEAD), "width": width, "depth": 3, "cond_features": 5, "time_scale": 10.0}
    training = {"batch_size": BATCH, "learning_rate": rate, "warmup": 30, "ema": 1 - 30 / steps, "loss": LOSS}
    run = ss.fit(ss.networks.MLP(**settings), (actions, observations / UNIT), steps=steps, **training)
    gaussian = gaussian_policy(ss.networks.MLP(**settings, out_channels=4), actions, observations, steps, rate)
    policies = {**gaussian, "diffusion": diffusion_policy(run)}
    unseen, figures = range(10_000, 10_000 + tests), {}
    driven = {"expert": expert, **{name: drive(plan, unseen, EXECUTED) for name, plan in policies.items()}}
    for name, episodes in driven.items():
        good = [episode for episode in episodes if episode["success"]]
        above = sum(episode["up"] for episode in good)
        sides = f", above the obstacle {interval(above, len(good))}" if good else ""
        print(f"{name:18s} success {interval(len(good), len(episodes))}{sides}")
        figures[name], figures[f"{name}, above"] = len(good) / len(episodes), above / max(len(good), 1)
    print(f"{time.process_time():.0f} s of CPU time")
    if not small:
        draw_figure(driven, Path(__file__).parent / "figures" / "policy.png")
    return figures


def draw_figure(driven: dict[str, list[dict]], path: Path) -> None:
    """Draw the first paths, relative to the obstacle; failures are orange, with a cross where they end."""
    plt.style.use(Path(__file__).parents[1] / "notebooks" / "paper.mplstyle")
    fig, axes = plt.subplots(1, len(driven), figsize=(2.1 * len(driven), 1.75), sharex=True, sharey=True)
    for ax, (name, episodes) in zip(axes, driven.items(), strict=True):
        ax.add_patch(plt.Circle((0, 0), RADIUS, color="0.8"))
        for episode in episodes[:60]:
            ax.plot(*episode["path"].T, color="C0" if episode["success"] else "C1", lw=0.5, alpha=0.7)
            ax.plot(*episode["path"][-1], "" if episode["success"] else "x", color="C1", ms=3)
        ax.plot(*GOAL, "*", color="C2", ms=7)
        ax.set_title(f"{name}: {interval(sum(episode['success'] for episode in episodes), len(episodes))}")
        ax.set(xlim=(-1.35, 1.35), ylim=(-0.95, 0.95), xticks=[-1, 0, 1], yticks=[-0.5, 0, 0.5], aspect="equal")
    fig.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="seconds in place of minutes, and no figure")
    main(parser.parse_args().small)
