r"""Crystals of held-out elements, from an element's place in the periodic table (UniMat, 2311.09235).

UniMat writes a crystal as the periodic table with the positions of atoms at the place of their element, and a null
position for an absent atom. A crystal of one element has one such place, which is here the condition: period and group.
The state x (10,) has the second atom of the primitive cell, the first one being at the origin, and the lattice:

    x[0]   = 1 if there is a second atom, else -1      x[1:4]  = its fractional coordinates, else the null (0, 0, 0)
    x[4:]  = the 6 numbers of log(A A' / (2 r)^2) / 2, with the rows of A the lattice, r the element's covalent radius

The lattice does not depend on rotations, and any 6 numbers are one. Noise of 0.015, a strain of 1.5%, gives a density.
Data: the elements of `ase.collections.dcdft` with at most two atoms in the primitive cell (not O, of molecules), and
Li, Na, C, Ac of `ase.build`. Each of five models is trained without a fifth of them. A sample has a known structure if
its 20 smallest distances are, up to scale and 10%, those of a prototype with as many atoms; it is valid if its nearest
neighbours are also within 15% of the distance in the element's crystal. Beside the model: independent columns (each
number from another crystal of the training, with noise); the crystal of the nearest element, by group, then period;
and for log p a Gaussian, its mean linear in the network's features.

    python examples/crystals.py    # train, draw, print the table, save the figure; --small: ten seconds, few samples
"""

import argparse
import itertools
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from ase.build import bulk
from ase.collections import dcdft
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from matplotlib import pyplot as plt
from scipy.linalg import logm
from scipy.stats import multivariate_normal, sem, wasserstein_distance

import scoresde as ss
from scoresde.metrics import bootstrap, wilson

NOISE, BLUR, SIGMA_DATA, FOLDS = 0.015, 0.4, 0.5, 5  # BLUR: noise of period and group in the training
PROTOTYPES = {"fcc": "Cu", "bcc": "Fe", "sc": "Po", "hcp": "Mg", "diamond": "Si", "arsenic": "Sb"}
NEAR, CELLS = (np.array([*itertools.product(range(-n, n + 1), repeat=3)]) for n in (1, 2))
TRIPLES = np.array([*itertools.permutations(range(18), 3)])


def place(number: int) -> tuple[float, float]:
    """Return the period and the group, 1 to 18, of an element; lanthanides and actinides share group 3."""
    ends = np.array([0, 2, 10, 18, 36, 54, 86, 118])
    period = int((ends < number).sum())
    nth, length = number - ends[period - 1], ends[period] - ends[period - 1]
    return period, float(nth if nth <= 2 < length else max(3, 18 - length + nth))


def features(places: np.ndarray) -> np.ndarray:
    """Return soft one-hot vectors (N, 25), float32, of periods and groups (N, 2)."""
    bumps = np.exp(-0.5 * (places[:, :, None] - np.arange(1, 19)) ** 2)
    return np.concatenate([bumps[:, 0, :7], bumps[:, 1]], axis=1).astype(np.float32)


@cache
def state(name: str) -> np.ndarray:
    """Return x (10,) of an element's crystal, see above; NaN if its primitive cell has more than two atoms."""
    atoms = bulk(name) if name in ("Li", "Na", "C", "Ac") else dcdft[name]
    f = (f := atoms.get_scaled_positions()) - f[0]
    same = (np.abs((d := f[:, None, None] + f[:, None] - f) - d.round()).max(-1) < 1e-3).any(-1).all(0)
    if len(f) > 2 * same.sum():
        return np.full(10, np.nan)
    moves = (f[same][:, None] + NEAR).reshape(-1, 3)  # translations that move the crystal onto itself
    bases = moves[np.argsort(np.linalg.norm(moves @ atoms.cell.array, axis=1))][1:19][TRIPLES]
    bases = bases[np.abs(np.abs(np.linalg.det(bases)) * same.sum() - 1) < 1e-3]
    cells = bases @ atoms.cell.array
    small = (sizes := (cells**2).sum((1, 2))) < sizes.min() * (1 + 1e-5)
    grams, second = cells[small] @ cells[small].transpose(0, 2, 1), f[(~same).argmax()] @ np.linalg.inv(bases[small])
    shape = grams[:, [0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]] * [1, 1, 1, -1, -1, -1] / sizes.min()
    order = np.lexsort(np.c_[shape, (second + 1e-6) % 1].round(4).T[::-1])  # of equal cells, and equal positions
    log = logm(grams[order[0]] / (2 * covalent_radii[atoms.numbers[0]]) ** 2).real / 2
    return np.array([1 - 2 * same.all(), *((second[order[0]] + 1e-6) % 1).round(4), *log[np.triu_indices(3)]])


def distances(x: np.ndarray) -> np.ndarray:
    """Return the 20 smallest distances (N, 20) from an atom, divided by 2 r; they are the same for both atoms."""
    values, vectors = np.linalg.eigh(np.clip(x[:, [4, 5, 6, 5, 7, 8, 6, 8, 9]], -4, 4).reshape(-1, 3, 3))
    cells = vectors * np.exp(values)[:, None] @ vectors.transpose(0, 2, 1)
    second = np.linalg.norm((CELLS + x[:, None, 1:4]) @ cells, axis=2)
    return np.sort(np.c_[np.linalg.norm(CELLS @ cells, axis=2), np.where(x[:, :1] > 0, second, np.inf)])[:, 1:21]


def structures(x: np.ndarray) -> np.ndarray:
    """Return the number of each crystal's prototype (N,), or -1 for none."""
    known = np.stack([*map(state, PROTOTYPES.values())])
    logs, shapes = (np.log(distances(y)) for y in (x, known))
    apart = (logs - logs.mean(1, keepdims=True))[:, None] - (shapes - shapes.mean(1, keepdims=True))
    off = np.where((x[:, None, 0] > 0) == (known[:, 0] > 0), np.abs(apart).max(2), np.inf)
    return np.where(off.min(1) < 0.1, off.argmin(1), -1)


def volumes(x: np.ndarray) -> np.ndarray:
    """Return the volumes per atom of crystals (*, 10), divided by (2 r)^3."""
    return np.exp(x[..., [4, 7, 9]].sum(-1)) / (1 + (x[..., 0] > 0))


def linear_gaussian(x: np.ndarray, cond: np.ndarray, at: np.ndarray) -> list:
    """Return the laws of crystals with features `at`: ridge regression, with the covariance of leave-one-out errors."""
    inverse, mean = np.linalg.inv(cond.T @ cond + np.eye(cond.shape[1])) @ cond.T, x.mean(0)
    errors = (x - mean - cond @ inverse @ (x - mean)) / (1 - np.diag(cond @ inverse))[:, None]
    covariance = errors.T @ errors / len(x) + NOISE**2 * np.eye(x.shape[1])
    return [multivariate_normal(m, covariance) for m in mean + at @ inverse @ (x - mean)]


def fit(x: np.ndarray, places: np.ndarray, steps: int, width: int, rng: np.random.Generator) -> ss.Run:
    """Train a model of crystals given the features of their places, with noise in both."""
    torch.manual_seed(0)
    x, places = (rng.normal(np.repeat(y, 400, axis=0), std) for y, std in ((x, NOISE), (places, BLUR)))
    network = ss.networks.MLP(10, width, cond_features=25, time_scale=10.0)
    model = ss.ScoreModel(network, ss.VP(), ss.predictions.KarrasPreconditioning(SIGMA_DATA))
    loss = ss.losses.DenoisingScoreMatching(ss.losses.KarrasWeighting(SIGMA_DATA, mean=-1.0, std=1.5))
    settings = {"batch_size": 256, "learning_rate": 2e-3, "warmup": 50, "ema": 0.99, "transform": ss.data.Affine()}
    return ss.fit(model, (x.astype(np.float32), features(places)), steps=steps, loss=loss, **settings)


def summary(name: str, drawn: np.ndarray, x: np.ndarray) -> dict[str, float]:
    """Print a row on samples (N, draws, 10) of elements with crystals x (N, 10), and return its figures."""
    (n, draws, _), flat, kind = drawn.shape, drawn.reshape(-1, drawn.shape[2]), structures(x)
    near, found = distances(flat)[:, 0].reshape(n, draws), structures(flat).reshape(n, draws)
    pairs = torch.from_numpy(np.c_[near, true := np.repeat(distances(x)[:, :1], draws, axis=1)])
    off = bootstrap(lambda pairs: torch.tensor(wasserstein_distance(*pairs.T.reshape(2, -1))), pairs)
    hits = wilson(int(([np.bincount(row + 1).argmax() - 1 for row in found] == kind).sum()), n, z=1.96)
    valid = (found >= 0) & (np.abs(np.log(near / true)) < np.log(1.15))
    shares = {"known": found >= 0, "valid": valid, "right": found == kind[:, None]}
    values = {key: share.mean(1) for key, share in shares.items()}
    values["volume"] = np.abs(np.log(np.median(volumes(drawn), axis=1) / volumes(x)))
    print(f"{name}:", *(f"{key} {v.mean():.1%} +- {1.96 * sem(v):.1%}," for key, v in values.items()), end=" ")
    print(f"most frequent structure right {hits.value:.0%} [{hits.low:.0%}, {hits.high:.0%}],", end=" ")
    print(f"neighbours {off.value:.3f} [{off.low:.3f}, {off.high:.3f}] off")
    return {f"{name}: {key}": v.mean() for key, v in values.items()} | {f"{name}: distance": off.value}


def main(small: bool) -> dict[str, float]:
    """Train, draw crystals of held-out elements, print the table, and return the figures by name."""
    steps, width, draws, folds = (160, 64, 4, 1) if small else (2000, 96, 16, FOLDS)
    names = [n for n in chemical_symbols if n in {*dcdft.names, "Ac"} - {"O"} and np.isfinite(state(n)[0])]
    x, places = np.stack([*map(state, names)]), np.array([place(atomic_numbers[name]) for name in names])
    given, parts, rng = torch.from_numpy(cond := features(places)), [], np.random.default_rng(0)
    sampler = ss.samplers.PredictorCorrector(ss.samplers.DPMSolverPP(), steps=40, denoise_final=True)
    for test in np.array_split(rng.permutation(len(x)), FOLDS)[:folds]:
        train = np.setdiff1d(np.arange(len(x)), test)
        run, which = fit(x[train], places[train], steps, width, rng), np.repeat(np.r_[test, train], draws)
        drawn = sampler(run.model, shape=(len(which), 10), cond=given[which], seeds=range(len(which)), progress=True)
        drawn = drawn.x.double().numpy().reshape(-1, draws, 10)
        columns = np.stack([rng.choice(column, (len(test), draws)) for column in x[train].T], axis=-1)
        nearest = (np.abs(places[test][:, None] - places[train]) @ [1, 100]).argmin(1)
        held = torch.from_numpy(rng.normal(x[test], NOISE))
        laws = zip(linear_gaussian(x[train], cond[train], cond[test]), held, strict=True)
        nats = ss.log_prob(run.model.given(given[test]), held.float(), trace=ss.ExactTrace()).value.numpy()
        part = {"model": (test, drawn[: len(test)]), "elements of the training": (train, drawn[len(test) :])}
        part["independent columns"] = test, rng.normal(columns, NOISE)
        part["nearest element"] = test, np.repeat(x[train][nearest][:, None], draws, axis=1)
        parts.append(part | {"log p": (nats, nats - [law.logpdf(row) for law, row in laws])})
    rows = {name: [np.concatenate(both) for both in zip(*(p[name] for p in parts), strict=True)] for name in parts[0]}
    nats, more = rows.pop("log p")
    figures = {"model: log p": nats.mean(), "Gaussian: log p": (nats - more).mean()}
    for name, (which, drawn) in rows.items():
        figures |= summary(name, drawn, x[which])
    print(f"log p of held-out crystals {nats.mean():.1f} +- {sem(nats):.1f} nats, more than the Gaussian by", end=" ")
    print(f"{more.mean():.1f} +- {sem(more):.1f}, in {(more > 0).mean():.0%}; {time.process_time():.0f} s of CPU time")
    if not small:
        draw_figure(names, places, x, rows, Path(__file__).parent / "figures" / "crystals.png")
    return figures


def draw_figure(names: list, places: np.ndarray, x: np.ndarray, rows: dict, path: Path) -> None:
    """Draw the table of structures, the volumes, and the law of nearest neighbours."""
    plt.style.use(Path(__file__).parents[1] / "notebooks" / "paper.mplstyle")
    top, left, right = plt.subplot_mosaic("aa;bc", figsize=(8.2, 5.8), height_ratios=(1.4, 1))[1].values()
    kinds, colors = structures(x), np.array([*(f"C{k}" for k in range(6)), "0.8"])
    for i, y in zip(*rows["model"], strict=True):
        (period, group), true, ends = places[i], colors[kinds[i]], np.linspace(-0.45, 0.45, len(y) + 1)
        top.barh(period + 0.1, 0.9 / len(y), 0.6, group + ends[:-1], color=colors[np.sort(structures(y) % 7)])
        top.barh(period - 0.33, 0.9, 0.16, group - 0.45, color=true)
        top.text(group, period + 0.1, names[i], ha="center", va="center")
        unit = (2 * covalent_radii[atomic_numbers[names[i]]]) ** 3
        volume = np.quantile(unit * volumes(y), [0.1, 0.5, 0.9])
        left.plot([volumes(x[i]) * unit] * 3, volume, "-o", markevery=[1], color=true, ms=3, lw=0.7)
    handles, labels = [plt.Rectangle((0, 0), 1, 1, color=c) for c in colors], [*PROTOTYPES, "not known"]
    top.legend(handles, labels, ncols=4, loc="upper center")
    top.set(ylim=(7.6, 0.4), xlim=(0.4, 18.6), xticks=range(1, 19), xlabel="group", ylabel="period")
    top.set_title("structures: of the crystal (strip), of the samples of models without this element (box)")
    left.loglog([5, 130], [5, 130], color="0.7", lw=0.7, zorder=0)
    left.set(title="volume per atom (Å$^3$)", xlabel="crystal", ylabel="samples: median, 80%")
    right.hist(distances(x)[:, 0], bins := np.arange(0.4, 3.2, 0.05), density=True, color="0.8", label="crystals")
    for name in ("model", "independent columns"):
        right.hist(distances(rows[name][1].reshape(-1, 10))[:, 0], bins, density=True, histtype="step", label=name)
    right.set(title="distance of nearest neighbours / covalent diameter", yticks=[])
    right.legend()
    plt.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="ten seconds in place of minutes, and no figure")
    main(parser.parse_args().small)
