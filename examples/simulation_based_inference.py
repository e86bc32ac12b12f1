"""Simulation-based inference: the posterior of a simulator's parameters, with its log-density, checked three ways.

A simulator draws x given parameters theta; its likelihood is not needed. A conditional diffusion model q(theta | x),
trained on pairs (theta, x) of prior and simulator, is the posterior for every x at once (neural posterior estimation;
2209.14249). Its probability flow has an exact log-density, so that the inference can be checked:

    KL        E_x KL(p(. | x) || q(. | x)) = E [log p(theta | x) - log q(theta | x)], a mean over test pairs (theta, x)
    coverage  the ranks of the true parameters among draws of q(. | x) are uniform if q = p (simulation-based
              calibration, 1804.06788), and so is that of log q(theta | x), which tests regions of highest density
    C2ST      accuracy of a classifier that tells draws of q(. | x) from draws of p(. | x), 1/2 if q = p (2101.04653)

The simulators are "two moons" (2101.04653), whose posterior is two thin crescents, and an SIR epidemic with ten noisy
counts. Both have two parameters, so that a sum over a fine grid gives the exact posterior.

    python examples/simulation_based_inference.py            # about 3 minutes
    python examples/simulation_based_inference.py --small    # seconds, and no figure
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy import stats
from sklearn.model_selection import cross_val_score
from sklearn.neural_network import MLPClassifier
from tqdm import tqdm

import scoresde as ss

HERE, EXACT = Path(__file__).parent, ss.ExactTrace()
FULL = {"size": 400, "pairs": 100_000, "width": 128, "steps": 2500, "tests": 200, "draws": 19, "cv": 5, "nodes": 80}
SMALL = {"size": 50, "pairs": 2000, "width": 64, "steps": 70, "tests": 16, "draws": 3, "cv": 2, "nodes": 24, "tol": 0.1}


class TwoMoons:
    """theta ~ U[-1, 1]^2; x is a point of a crescent of radius 0.1 and width 0.01, moved by a function of theta."""

    name, labels, example = "two moons", (r"$\theta_1$", r"$\theta_2$"), np.array([[0.3, 0.35]])
    prior, low, high, log_width = stats.uniform(-1, 2), np.array([-1.0, -1.0]), np.array([1.0, 1.0]), -3.0

    def noiseless(self, theta):
        return np.stack([0.25 - np.abs(theta.sum(1)) / np.sqrt(2), (theta[:, 1] - theta[:, 0]) / np.sqrt(2)], axis=1)

    def observe(self, centre, rng):
        angle, radius = rng.uniform(-np.pi / 2, np.pi / 2, len(centre)), rng.normal(0.1, 0.01, len(centre))
        return centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)

    def log_likelihood(self, centre, x):
        """log of N(r; 0.1, 0.01^2) / (pi r) on the half-plane u > 0, the density in polar coordinates."""
        r = np.hypot(*(x - centre).T)
        return np.where(x[0] > centre[:, 0], stats.norm.logpdf(r, 0.1, 0.01) - np.log(np.pi * r), -np.inf)


class Epidemic:
    """theta = (log beta, log gamma) of dS = -beta S I, dI = beta S I - gamma I; x: roots of ten counts of infected."""

    name, labels, example = "SIR epidemic", (r"$\log\,\beta$", r"$\log\,\gamma$"), np.log([[0.5, 0.14]])
    prior, people, log_width = stats.norm(np.log([0.4, 0.125]), [0.5, 0.2]), 100, -2.0
    low, high = prior.mean() - 4 * prior.std(), prior.mean() + 4 * prior.std()

    def noiseless(self, theta):
        """Share of infected on days 8, 16, ..., 80 by Heun's method, four steps a day; 0.1% at first."""
        (beta, gamma), h, shares = np.exp(theta).T, 0.25, []
        s, i = np.full(len(theta), 0.999), np.full(len(theta), 0.001)
        for step in range(1, 321):
            new, gone = h * beta * s * i, h * gamma * i
            later_s, later_i = s - new, i + new - gone
            new, gone = (new + h * beta * later_s * later_i) / 2, (gone + h * gamma * later_i) / 2
            s, i = s - new, i + new - gone
            if step % 32 == 0:
                shares.append(i)
        return np.stack(shares, axis=1)

    def observe(self, shares, rng):
        return np.sqrt(rng.binomial(self.people, shares) / self.people)  # the root of a count has nearly constant noise

    def log_likelihood(self, shares, x):
        """log of the binomial probability, up to a function of x."""
        infected = np.rint(self.people * x**2)
        return infected @ np.log(shares).T + (self.people - infected) @ np.log1p(-shares).T


class Grid:
    """The exact posterior p(theta | x) = joint / evidence, with the evidence as a sum over size^2 cells."""

    def __init__(self, simulator, size):
        self.simulator, self.cell = simulator, (simulator.high - simulator.low) / size
        axes = (simulator.low + (np.arange(size) + 0.5)[:, None] * self.cell).T
        self.theta = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
        self.log_prior, self.noiseless = simulator.prior.logpdf(self.theta).sum(1), simulator.noiseless(self.theta)

    def log_posterior(self, x, theta=None):
        """Return the log-density at theta (n, 2), by default at the cells."""
        joint = self.log_prior + self.simulator.log_likelihood(self.noiseless, x)
        evidence = torch.tensor(joint).logsumexp(0).item() + np.log(self.cell).sum()
        if theta is not None:
            simulator = self.simulator
            joint = simulator.prior.logpdf(theta).sum(1) + simulator.log_likelihood(simulator.noiseless(theta), x)
        return joint - evidence

    def draw(self, x, n, rng):
        cells = rng.choice(len(self.theta), n, p=np.exp(self.log_posterior(x) + np.log(self.cell).sum()))
        return self.theta[cells] + self.cell * rng.uniform(-0.5, 0.5, (n, 2))


def train(simulator, pairs, width, steps, nodes, rng):
    """Return draw(x) -> (theta, log q) and log_prob(theta, x) of a model of the posterior."""
    theta = simulator.prior.rvs((pairs, 2), rng)
    x = simulator.observe(simulator.noiseless(theta), rng)
    mean, std, _ = x.mean(0), x.std(0), torch.manual_seed(0)
    loss = ss.losses.DenoisingScoreMatching("likelihood", ss.losses.LogNormal(simulator.log_width, 1.8))
    network = ss.networks.MLP(shape=2, width=width, depth=3, cond_features=x.shape[1])
    data, solver = (torch.tensor(theta).float(), torch.tensor((x - mean) / std).float()), ss.solvers.Adams(nodes)
    settings = {"warmup": steps // 25, "ema": 1 - 12.5 / steps, "loss": loss}
    run = ss.fit(network, data, steps=steps, batch_size=256, learning_rate=2e-3, **settings)

    def given(x):
        return run.model.given(torch.tensor((x - mean) / std).float())

    def draw(x):  # one draw for each row of x, and its log-density, from one solve of the flow
        z, r = ss.sample_with_log_prob(given(x), (len(x), 2), trace=EXACT, solver=solver, seeds=range(len(x)))
        return run.transform.inverse(z).numpy(), (r.value + run.transform.log_det(z)).numpy()

    def log_prob(theta, x, trace=EXACT):
        theta = torch.tensor(theta)
        r = ss.log_prob(given(x), run.transform(theta), trace=trace, solver=solver, seeds=range(len(x)))
        return (r.value + run.transform.log_det(theta)).numpy(), r.stderr

    return draw, log_prob


def check(simulator, size, pairs, width, steps, tests, draws, cv, nodes, tol=1e-4):
    rng, grid = np.random.default_rng(0), Grid(simulator, size)
    draw, log_prob = train(simulator, pairs, width, steps, nodes, rng)
    x = simulator.observe(simulator.noiseless(theta := simulator.prior.rvs((tests, 2), rng)), rng)
    estimate, _ = log_prob(theta, x)
    exact = np.concatenate([grid.log_posterior(x[i], theta[i : i + 1]) for i in tqdm(range(tests), "exact posteriors")])
    drawn = np.column_stack(draw(np.repeat(x, draws, axis=0)))
    below = drawn.reshape(tests, draws, 3) < np.column_stack([theta, estimate])[:, None]
    ranks = (below.sum(axis=1) + rng.uniform(size=(tests, 3))) / (draws + 1)
    observed = simulator.observe(simulator.noiseless(simulator.example), np.random.default_rng(1))
    both = np.concatenate([grid.draw(observed[0], 20 * draws, rng), draw(np.repeat(observed, 20 * draws, axis=0))[0]])
    both, label = (both - both.mean(0)) / both.std(0), np.repeat([0, 1], 20 * draws)
    classifier = MLPClassifier((64, 64), max_iter=1000, tol=tol, random_state=0)
    probed, stderr = log_prob(theta[:64], x[:64], ss.Hutchinson(probes=8))
    return {
        "KL (nats)": (exact - estimate).mean(),
        "KL, standard error": (exact - estimate).std(ddof=1) / np.sqrt(tests),
        "information over the prior (nats)": (estimate - simulator.prior.logpdf(theta).sum(1)).mean(),
        "coverage, p-value of three tests": min(1, 3 * min(stats.kstest(rank, "uniform").pvalue for rank in ranks.T)),
        "C2ST": cross_val_score(classifier, both, label, cv=cv).mean(),
        "standard error with eight probes (nats)": float(stderr.square().mean().sqrt()),
        "errors with eight probes / standard errors": float(np.std((probed - estimate[:64]) / stderr.numpy())),
    }, (grid, observed, log_prob, exact, estimate, ranks)


def draw_row(axes, simulator, grid, observed, log_prob, exact, estimate, ranks, pixels):
    weight = np.exp(grid.log_posterior(observed[0]))
    inside = grid.theta[weight > 1e-3 * weight.max()]
    low, high = inside.min(0) - 0.1 * np.ptp(inside, axis=0), inside.max(0) + 0.1 * np.ptp(inside, axis=0)
    lines = [np.linspace(a, b, pixels) for a, b in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, 2)
    pictures = grid.log_posterior(observed[0], points), log_prob(points, np.repeat(observed, pixels**2, axis=0))[0]
    for axis, picture, title in zip(axes[:2], pictures, ("exact posterior", "conditional diffusion"), strict=True):
        density = np.exp(picture.clip(max=50)).reshape(pixels, pixels).T
        axis.pcolormesh(*lines, density, vmin=0, vmax=np.exp(pictures[0].max()), cmap="magma_r", rasterized=True)
        axis.plot(*simulator.example[0], "+", color="#009E73", markersize=8)
        axis.set(title=f"{simulator.name}: {title}", xlabel=simulator.labels[0], ylabel=simulator.labels[1])
    ends = exact.min() - 1.5, exact.max() + 0.5
    axes[2].plot(ends, ends, "k-", exact, estimate, "C0.", linewidth=0.7, markersize=3, alpha=0.6)
    axes[2].set(title="log-density at the truth", xlim=ends, ylim=ends)
    axes[2].set(xlabel=r"$\log p(\theta\,|\,x)$, exact (nats)", ylabel=r"$\log q(\theta\,|\,x)$ (nats)")
    levels, n, band = np.linspace(0, 1, 201), len(ranks), stats.kstwo.ppf(0.95, len(ranks))  # Kolmogorov's band
    axes[3].axhspan(-band, band, color="#DDDDDD", linewidth=0)
    for column, label in zip(ranks.T, (*simulator.labels, r"$\log\,q(\theta\,|\,x)$"), strict=True):
        axes[3].plot(levels, np.searchsorted(np.sort(column), levels) / n - levels, label=label)
    axes[3].set(title=f"{n} ranks: share - level", xlabel="level", ylim=(-0.2, 0.2))
    axes[3].legend(ncols=3, loc="upper center", fontsize=6, handlelength=1, columnspacing=1, borderpad=0)


def main(small: bool = False, figure: Path | None = None) -> dict[str, float]:
    with plt.style.context(HERE.parent / "notebooks" / "paper.mplstyle"):
        figures, (drawn, axes) = {}, plt.subplots(2, 4, figsize=(9.6, 4.4))
        for row, simulator in zip(axes, (TwoMoons(), Epidemic()), strict=True):
            result, shown = check(simulator, **(SMALL if small else FULL))
            draw_row(row, simulator, *shown, pixels=10 if small else 100)
            figures |= {f"{simulator.name}: {key}": float(value) for key, value in result.items()}
        if figure or not small:
            drawn.savefig(figure or HERE / "figures" / "simulation_based_inference.png", dpi=100)
    plt.close(drawn)
    print(*(f"{name:<60}{value:9.3f}" for name, value in figures.items()), sep="\n")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a short run, to see that it works")
    main(parser.parse_args().small)
