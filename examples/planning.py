r"""Plans as samples: a diffusion model of trajectories finds ways through a maze (Diffuser, 2205.09991).

A trajectory is one state x (2, L): L points at equal distances along a route. The model learns p(x) from wanderings in
a maze that is drawn from a seed. They are not short: each goes from A to B by way of a third place. The model learns
neither what a start or a goal is, nor which routes are short. Planning is sampling from

    p(x) N(y; A x, s^2) exp(-w J(x))

    A x     the first and the last point; y is the start and the goal (`ss.inverse.MMPS`; the paper: `Replacement`)
    J(x)    the length of the route, the negative value of a plan (`ss.guidance.Loss`)

and the scores of the three factors add up (`ss.guidance.Composition`). No wandering leads from the square of a test's
start to that of its goal. A plan succeeds if it joins start and goal and stays in the corridors.

    python examples/planning.py              # train, plan, print the table, save examples/figures/planning.png
    python examples/planning.py --small      # seconds: a small maze, a short training, few plans
"""

import argparse
import time
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from scipy.sparse.csgraph import shortest_path

import scoresde as ss
from scoresde.metrics import wilson

POINTS, PATCH = 24, 4  # of a trajectory, and of one token of the network
WAVES = 3  # frequencies of the network's inputs
LOSS = ss.losses.DenoisingScoreMatching(ss.losses.KarrasWeighting(sigma_data=1.0, mean=-0.3, std=1.4))
WEIGHT = 1.0  # w, for lengths in squares


class Maze:
    """Corridors between n x n rooms: a random spanning tree, and some more doors, so that there are loops.

    A square (i, j) of the plane is [i, i + 1] x [j, j + 1]; `free` says which squares are not wall.
    """

    def __init__(self, rooms: int = 3, opened: int = 2, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.free = np.zeros((2 * rooms + 1, 2 * rooms + 1), dtype=bool)
        self.free[1::2, 1::2] = True
        joined = {(i, j): {(i, j)} for i in range(rooms) for j in range(rooms)}
        doors = [
            (i, j, di) for i in range(rooms) for j in range(rooms) for di in (0, 1) if (i + di, j + 1 - di) in joined
        ]
        for i, j, di in rng.permutation(doors):
            a, b = joined[i, j], joined[i + di, j + 1 - di]
            if a is not b or opened > 0:
                opened -= a is b
                self.free[2 * i + 1 + di, 2 * j + 2 - di] = True
                a |= b
                joined.update(dict.fromkeys(a, a))
        self.squares = np.argwhere(self.free)
        apart = np.abs(self.squares[:, None] - self.squares).sum(2)
        self.distance, self.before = shortest_path(apart == 1, unweighted=True, return_predecessors=True)

    def way(self, a: int, b: int) -> list[int]:
        """Return the squares on a shortest way from a to b, both included."""
        return [b] if a == b else [*self.way(a, self.before[a, b]), b]

    def route(self, squares: list[int], ends: np.ndarray) -> np.ndarray:
        """Return L points (2, L) at equal distances along the smoothed line through the squares, with ends (2, 2)."""
        line = self.squares[squares] + 0.5
        line[[0, -1]] = ends
        dense = np.stack(
            [np.interp(np.linspace(0, len(line) - 1, 20 * len(line)), np.arange(len(line)), p) for p in line.T]
        )
        dense = gaussian_filter1d(dense, 6.0, axis=1, mode="nearest")
        dense[:, [0, -1]] = np.transpose(ends)
        along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(dense), axis=0))])
        return np.stack([np.interp(np.linspace(0, along[-1], POINTS), along, p) for p in dense])

    def succeeds(self, plans: torch.Tensor, routes: torch.Tensor) -> torch.Tensor:
        """Return (B,): whether polylines (B, 2, L) stay in the corridors and join the ends of routes (B, 2, L)."""
        fine = torch.nn.functional.interpolate(plans, size=20 * POINTS, mode="linear", align_corners=True)
        i, j = fine.floor().long().clamp(0, len(self.free) - 1).unbind(1)
        joins = ((plans - routes)[:, :, [0, -1]].norm(dim=1) < 0.2).all(dim=1)
        return torch.from_numpy(self.free)[i, j].all(dim=1) & joins


def wanderings(maze: Maze, n: int, rng: np.random.Generator, held_out: np.ndarray) -> torch.Tensor:
    """Return n wanderings (n, 2, L) by way of a third square, none between a pair of squares that is held out."""
    routes = []
    while len(routes) < n:
        a, via, b = rng.integers(len(maze.squares), size=3)
        if a != b and not held_out[a, b]:
            ends = maze.squares[[a, b]] + rng.uniform(0.2, 0.8, (2, 2))
            routes.append(maze.route([*maze.way(a, via), *maze.way(via, b)[1:]], ends))
    return torch.from_numpy(np.stack(routes)).float()


def length(x: torch.Tensor) -> torch.Tensor:
    """Return the lengths (B,) of the polylines through the points (B, 2, L)."""
    return x.diff(dim=2).norm(dim=1).sum(dim=1)


class Waves(torch.nn.Module):
    """A transformer that also reads sin(2k x) and cos(2k x), which resolve the walls (Fourier features, 2006.10739)."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        settings = {"channels": 2 + 4 * WAVES, "out_channels": 2, "patch": PATCH, "time_scale": 10.0}
        self.network = ss.networks.DiT(image_size=(POINTS,), width=width, depth=depth, heads=4, **settings)

    def forward(self, x: torch.Tensor, c_noise: torch.Tensor, cond=None) -> torch.Tensor:
        """Return F(x, c_noise), (B, 2, L)."""
        phases = torch.cat([2 * (k + 1) * x for k in range(WAVES)], dim=1)
        return self.network(torch.cat([x, phases.sin(), phases.cos()], dim=1), c_noise, cond)


def plans(run: ss.Run, ends: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    """Draw plans (B, 2, L) for starts and goals (B, 2, 2), whose last dimension is start and goal, in three ways."""
    mask = torch.zeros(POINTS, dtype=torch.bool)
    mask[[0, -1]] = True
    place, y, model = ss.inverse.Inpainting(mask, noise_std=0.01), run.transform(ends), run.model
    joining = ss.inverse.MMPS(model, place, y)
    short = ss.guidance.Loss(model, lambda x: length(run.transform.inverse(x)), WEIGHT)
    sampler = ss.samplers.PredictorCorrector(ss.samplers.Ancestral(), steps=steps, denoise_final=True)
    draw = partial(sampler, shape=(len(ends), 2, POINTS), seeds=range(len(ends)), progress=True)
    samples = {
        "replacement": draw(model, constraint=ss.inverse.Replacement(place, y)),
        "plans": draw(joining),
        "plans, guided": draw(ss.guidance.Composition([joining, short], [1.0, 1.0], base=model)),
    }
    return {name: run.transform.inverse(result.x).float() for name, result in samples.items()}


def interval(count: int, total: int) -> str:
    """Return a percentage with Wilson's 95% interval: "97% [95, 99]"."""
    share = wilson(count, total, z=1.96)
    return f"{100 * share.value:.0f}% [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def main(small: bool) -> dict[str, float]:
    """Train, plan, print successes with 95% intervals and lengths, and return the figures by name."""
    rooms, routes, steps, batch, depth, tests = (2, 1200, 250, 64, 1, 30) if small else (3, 6300, 1000, 128, 3, 300)
    maze, rng = Maze(rooms), np.random.default_rng(0)
    held_out = rng.random(maze.distance.shape) < 0.2
    x = wanderings(maze, routes, rng, held_out)
    pairs = rng.permutation(np.argwhere(held_out & (maze.distance >= rooms)))
    pairs = pairs[np.arange(tests) % len(pairs)]
    ends = maze.squares[pairs] + rng.uniform(0.2, 0.8, (tests, 2, 2))
    shortest = np.stack([maze.route(maze.way(a, b), e) for (a, b), e in zip(pairs, ends, strict=True)])
    ends = torch.from_numpy(ends).mT.float()
    torch.manual_seed(0)
    training = {"batch_size": batch, "learning_rate": 4e-3, "warmup": 30, "ema": 1 - 10 / steps, "loss": LOSS}
    run = ss.fit(Waves(64, depth), x, steps=steps, **training)
    routes = {
        "straight line": torch.lerp(ends[:, :, :1], ends[:, :, 1:], torch.linspace(0, 1, POINTS)),
        **plans(run, ends, 24 if small else 40),
        "shortest route": torch.from_numpy(shortest).float(),
    }
    figures = {}
    for name, plan in routes.items():
        good, ratio = maze.succeeds(plan, routes["shortest route"]), length(plan) / length(routes["shortest route"])
        middle = f", length / shortest {ratio[good].median():.2f}" if good.any() else ""
        print(f"{name:14s} success {interval(int(good.sum()), tests)}{middle}")
        figures |= {name: float(good.double().mean()), f"{name}, length": float(ratio[good].median())}
        figures[f"{name}, length of all"] = float(ratio.median())
    print(f"{time.process_time():.0f} s of CPU time")
    if not small:
        draw_figure(maze, x, routes, Path(__file__).parent / "figures" / "planning.png")
    return figures


def draw_figure(maze: Maze, x: torch.Tensor, routes: dict[str, torch.Tensor], path: Path) -> None:
    """Draw wanderings, the plans for the first tests (dotted through walls), and the lengths of all plans."""
    plt.style.use(Path(__file__).parents[1] / "notebooks" / "paper.mplstyle")
    fig, axes = plt.subplots(1, 4, figsize=(8.4, 2.2))
    drawn = {"training: wanderings": x, **{name: routes[name] for name in ("plans", "plans, guided")}}
    for ax, (name, plans) in zip(axes, drawn.items(), strict=False):
        ax.imshow(~maze.free.T, cmap="Greys", vmax=2.5, origin="lower", extent=(0, len(maze.free)) * 2)
        for k, (plan, good) in enumerate(zip(plans[:5], maze.succeeds(plans[:5], plans[:5]), strict=True)):
            ax.plot(*plan, "-" if good else ":", color=f"C{k}", marker=".", ms=2, lw=0.9)
            ax.plot(*plan[:, 0], "o", color=f"C{k}")
            ax.plot(*plan[:, -1], "*", color=f"C{k}", ms=7)
        ax.set(title=name, xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for name in ("plans", "plans, guided"):
        good, pair = maze.succeeds(routes[name], routes["shortest route"]), (routes["shortest route"], routes[name])
        axes[3].plot(*(length(route)[good] for route in pair), ".", ms=3, alpha=0.7, label=name)
    axes[3].axline((0, 0), slope=1, color="0.6", lw=0.7)
    axes[3].set(title="length of successful plans", xlabel="shortest route (squares)", ylabel="plan (squares)")
    axes[3].set(xlim=0, ylim=0)
    axes[3].legend()
    fig.savefig(path, dpi=150)
    plt.close(fig)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="seconds in place of minutes, and no figure")
    main(parser.parse_args().small)
