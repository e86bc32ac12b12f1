"""Forecasts of a time series with calibrated intervals, and anomalies by likelihood: three centuries of sunspots.

A conditional diffusion model p(future | past) is trained on windows of the series (2107.03502): the next 12 quarters
given the last 44, which are one solar cycle. The quantiles of its samples are forecasts with intervals. Its log-density
(nats, by the probability flow) scores what happened:

    CRPS       E|X - y| - E|X - X'|/2 for samples X and the observation y, in units of the series
    log score  -log p(future | past) / 12, nats a quarter
    coverage   the share of observations inside the central intervals of 50%, 80% and 95%
    anomaly    -log p(future | past): is it higher after a spike was added to the future, or where the future is
               exchanged for that of another time? The area under the ROC curve (AUC) says how often.

Beside it, a linear Gaussian forecast: a ridge regression of future on past, with the covariance of its residuals. Each
residual is that of a regression on other years, because those of the fitted years are too small. The diffusion models
the same residuals in units of their covariance, given the past; a network with output 0 is the linear forecast. The
series is monthly (data/sunspots.csv, public domain); the models see square roots of quarterly means. They are trained
on 1749-1929 and tested on 1930-2008; the number of steps was chosen on years before 1930. Errors are standard errors
over seven blocks of 11 years, since neighbouring windows overlap.

    python examples/time_series.py            # 15 seconds of one core
    python examples/time_series.py --small    # seconds, and no figure
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy import stats
from tqdm import tqdm

import scoresde as ss

HERE, PAST, FUTURE, FIRST = Path(__file__).parent, 44, 12, 1930


def windows():
    """Return first years of the futures (N,), pasts (N, 44) and futures (N, 12), as roots of quarterly means."""
    table = np.loadtxt(HERE / "data" / "sunspots.csv", delimiter=",")
    series = np.sqrt(table[:, 1:].reshape(-1, 3).mean(axis=1))
    view = np.lib.stride_tricks.sliding_window_view(series, PAST + FUTURE).astype(np.float32)
    return table[0, 0] + (np.arange(len(view)) + PAST) / 4, view[:, :PAST], view[:, PAST:]


def regression(past, future, ridge=100.0):
    """Return the ridge regression of future on past, past -> (1, past) W."""
    x = np.insert(past, 0, 1, axis=1)
    weights = np.linalg.solve(x.T @ x + ridge * np.eye(x.shape[1]), x.T @ future)
    return lambda past: np.insert(past, 0, 1, axis=1) @ weights


class Linear:
    """future ~ N(mean(past), C), with C the covariance of `residuals`, 11 years at a time from the other years."""

    def __init__(self, years, past, future):
        self.mean, self.residuals = regression(past, future), np.empty(future.shape)
        for block in np.unique(years // 11):
            rows = years // 11 == block
            others = np.abs(years - years[rows].mean()) >= np.ptp(years[rows]) / 2 + FUTURE / 4  # no common quarter
            self.residuals[rows] = future[rows] - regression(past[others], future[others])(past[rows])
        self.covariance = np.cov(self.residuals.T)

    def log_prob(self, future, past):
        return stats.multivariate_normal(cov=self.covariance).logpdf(future - self.mean(past))

    def sample(self, past, n):
        noise = np.random.default_rng(0).multivariate_normal(np.zeros(FUTURE), self.covariance, (len(past), n))
        return self.mean(past)[:, None] + noise


class Diffusion:
    """p(L^-1 (future - linear forecast) | past), trained by `ss.fit`, with L the Cholesky factor of C."""

    def __init__(self, linear, past, steps):
        torch.manual_seed(0)
        network = ss.networks.MLP(shape=FUTURE, width=96, depth=2, dropout=0.2, cond_features=PAST)
        self.linear, self.mean, self.std = linear, past.mean(), past.std()
        self.factor, unit = np.linalg.cholesky(linear.covariance), ss.data.Standardize(mean=0.0, std=1.0)
        data = torch.tensor(self.whitened(linear.residuals)).float(), self.standardised(past)
        self.model = ss.fit(network, data, transform=unit, steps=steps, batch_size=128, ema=0.99).model

    def whitened(self, residuals):
        return np.linalg.solve(self.factor, residuals.T).T

    def standardised(self, past):
        return torch.tensor((past - self.mean) / self.std)

    def log_prob(self, future, past):
        z, model = self.whitened(future - self.linear.mean(past)), self.model.given(self.standardised(past))
        log_p = ss.log_prob(model, torch.tensor(z).float(), trace=ss.ExactTrace()).value.numpy()
        return log_p - np.log(np.diag(self.factor)).sum()

    def sample(self, past, n):
        model = self.model.given(self.standardised(past).repeat_interleave(n, dim=0))
        drawn = ss.samplers.DPMSolverPP()(model, (n * len(past), FUTURE), steps=20, seeds=range(n * len(past)))
        residuals = drawn.x.numpy().reshape(len(past), n, FUTURE) @ self.factor.T
        return self.linear.mean(past)[:, None] + residuals


def crps(samples, y):
    """Return the continuous ranked probability score, in sunspots, for samples (N, n, H) and observations (N, H)."""
    samples, y, n = np.sort(samples.clip(0) ** 2, axis=1), y**2, samples.shape[1]
    spread = ((2 * np.arange(n) - n + 1)[:, None] * samples).sum(axis=1) / (n * (n - 1))
    return np.abs(samples - y[:, None]).mean(axis=1) - spread


def by_blocks(values, years):
    """Return the mean, and its standard error from the means over blocks of 11 years."""
    block = ((years - FIRST) // 11).astype(int)
    means = np.array([values[block == b].mean() for b in np.unique(block)])
    return float(values.mean()), float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")


def auc(anomalous, normal):
    """Return how often an anomalous window has a lower log-density than a normal one."""
    return float(stats.mannwhitneyu(normal, anomalous).statistic / (len(normal) * len(anomalous)))


def anomalies(future, rng):
    """Return futures with a spike of 3 (in the root of the number) at a random quarter, and those of another time."""
    spiked = future.copy()
    spiked[np.arange(len(future)), rng.integers(FUTURE, size=len(future))] += 3
    return {"spike": spiked, "other time": future[rng.permutation(len(future))]}


def score(model, past, future, years, n):
    """Return the figures of a forecaster on the test windows, and its samples."""
    samples, log_p = model.sample(past, n), model.log_prob(future, past)
    figures = {
        "CRPS": by_blocks(crps(samples, future).mean(axis=1), years),
        "log score": by_blocks(-log_p / FUTURE, years),
    }
    for level in (0.5, 0.8, 0.95):
        low, high = np.quantile(samples, [0.5 - level / 2, 0.5 + level / 2], axis=1)
        figures[f"coverage {level:.0%}"] = by_blocks(((future >= low) & (future <= high)).mean(axis=1), years)
    for name, changed in anomalies(future, np.random.default_rng(0)).items():
        figures[f"AUC, {name}"] = auc(model.log_prob(changed, past), log_p), float("nan")
    return figures, samples, log_p


def draw(years, future, shown, forecasters):
    """Forecasts from a few origins, coverage, CRPS by lead, and the surprise of each window."""
    figure, axes = plt.subplot_mosaic("000;123", figsize=(8.6, 5.0), height_ratios=(1.2, 1))
    top, *rest = axes.values()
    top.plot(years, future[:, 0] ** 2, "k", linewidth=0.8)
    samples = forecasters["diffusion"][1]
    for i in shown:
        axis = years[i] + np.arange(FUTURE) / 4
        low, first, middle, third, high = np.quantile(samples[i].clip(0) ** 2, [0.025, 0.25, 0.5, 0.75, 0.975], axis=0)
        top.fill_between(axis, low, high, color="#0072B2", alpha=0.2, linewidth=0)
        top.fill_between(axis, first, third, color="#0072B2", alpha=0.35, linewidth=0)
        top.plot(axis, middle, color="#0072B2")
    top.set(title="sunspot number (black), and forecasts of three years: median, 50% and 95%", xlim=(FIRST, 2009))
    levels = np.linspace(0.02, 0.98, 49)
    for name, (_, samples, log_p) in forecasters.items():
        rank = (samples < future[:, None]).mean(axis=1)
        rest[0].plot(levels, [(np.abs(rank - 0.5) <= level / 2).mean() for level in levels], label=name)
        rest[1].plot(np.arange(1, FUTURE + 1), crps(samples, future).mean(axis=0), "o-", label=name)
        rest[2].plot(years, -log_p / FUTURE, label=name, linewidth=0.9)
    rest[0].plot([0, 1], [0, 1], color="grey", linewidth=0.7)
    rest[0].set(title="coverage of central intervals", xlabel="nominal", ylabel="observed")
    rest[1].set(title="CRPS (sunspots)", xlabel="quarters ahead", ylim=(0, None), xticks=(1, 4, 8, 12))
    rest[2].set(title="surprise, -log p (nats a quarter)", xlabel="first year of the window")
    rest[0].legend()
    return figure


def main(small: bool = False, figure: Path | None = None) -> dict[str, float]:
    """Train both forecasters, score them on the test years, print and return the figures by name."""
    steps, n, every = (100, 20, 12) if small else (300, 100, 2)
    years, past, future = windows()
    train = years + FUTURE / 4 <= FIRST
    test = np.flatnonzero(years >= FIRST)[::every]
    linear = Linear(years[train], past[train], future[train])
    models = {"diffusion": Diffusion(linear, past[train], steps), "linear": linear}
    years, past, future = years[test], past[test], future[test]
    forecasters, figures = {}, {}
    for name, model in tqdm(models.items(), "forecasts"):
        forecasters[name] = score(model, past, future, years, n)
        figures |= {f"{name}: {key}": value for key, (value, _) in forecasters[name][0].items()}
    for key in forecasters["linear"][0]:
        cells = ((name, *f[0][key]) for name, f in forecasters.items())
        print(
            f"{key:<16}", *(f"{name} {value:8.3f}" + f" +- {error:.3f}" * (error > 0) for name, value, error in cells)
        )
    with plt.style.context(HERE.parent / "notebooks" / "paper.mplstyle"):
        drawn = draw(years, future, range(0, len(years), 2 if small else 13), forecasters)
    if figure or not small:
        drawn.savefig(figure or HERE / "figures" / "time_series.png", dpi=100)
    plt.close(drawn)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a short run, to see that it works")
    main(parser.parse_args().small)
