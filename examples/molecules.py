r"""Molecules as grids of atoms by element, absent atoms at a null position (UniMat, 2311.09235).

A molecule is one state x (4, L) with a slot for each atom that it may have: 8 of H, 4 of C, 2 of N, 2 of O, 3 of F. A
present atom is (position in Å, 1). An absent atom is at the null position (0, 0, 0, -1): the fourth coordinate sets it
apart without a direction in space. A model of p(x) chooses the atoms and their positions together. Its network is
equivariant, so its density does not depend on rotations, reflections and the order of equal atoms.

Data: 68 molecules of `ase.collections.g2`; 15 more are held out. Gaussian noise of 0.05 Å in each coordinate, about the
thermal motion, gives them a density. A molecule is valid if no two atoms are closer than 0.7 times the sum of their
covalent radii; the bonds, pairs closer than 1.3 times this sum, connect all atoms; and no atom has more bonds than H 1,
C 4, N 3, O 2, F 1. Beside the model: a Gaussian, and independent slots, each present with its frequency in a Gaussian
position (their samples have the atoms of a molecule of the data, each at a place that this element has in another one).

    python examples/molecules.py             # train, draw, print the table, save examples/figures/molecules.png
    python examples/molecules.py --small     # ten seconds: a short training, few samples
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.collections import g2
from ase.data import atomic_numbers, covalent_radii
from ase.data.colors import jmol_colors
from matplotlib import pyplot as plt
from scipy.stats import multivariate_normal, norm, sem

import scoresde as ss
from scoresde.metrics import bootstrap, wilson

SLOTS, VALENCE = {"H": 8, "C": 4, "N": 2, "O": 2, "F": 3}, np.array([1, 4, 3, 2, 1])
KIND = np.repeat(np.arange(len(SLOTS)), list(SLOTS.values()))  # number of the element of each slot
NUMBER = np.array([atomic_numbers[symbol] for symbol in SLOTS])[KIND]
CONTACT = covalent_radii[NUMBER][:, None] + covalent_radii[NUMBER]  # sums of covalent radii, in Å
JITTER, SIGMA_DATA, HELD_OUT = 0.05, 0.65, 15  # in Å; r.m.s. of the states; molecules
BINS, PAIRS = np.arange(0.4, 5.0, 0.05), [("C", "H"), ("C", "C"), ("H", "H")]  # of distances, in Å


def molecules() -> dict[str, np.ndarray]:
    """Return the grids (4, L) of the molecules of two atoms or more that have a slot for each atom, centred."""
    grids = {}
    for name in g2.names:
        symbols, p = np.array(g2[name].get_chemical_symbols()), g2[name].positions
        if len(p) > 1 and all((symbols == s).sum() <= SLOTS.get(s, 0) for s in symbols):
            grids[name] = np.tile([[0.0], [0.0], [0.0], [-1.0]], len(KIND))
            for k, symbol in enumerate(SLOTS):
                of = np.flatnonzero(symbols == symbol)
                grids[name][:, np.flatnonzero(k == KIND)[: len(of)]] = [*(p[of] - p.mean(0)).T, np.ones(len(of))]
    return grids


def noisy(grids: list[np.ndarray], copies: int, rng: np.random.Generator) -> np.ndarray:
    """Return copies (N, 4, L) of grids, turned at random, the atoms of an element in random order, with noise."""
    x = np.repeat(grids, copies, axis=0)
    x = np.take_along_axis(x, np.argsort(KIND + rng.random((len(x), len(KIND))))[:, None], axis=2)
    x[:, :3] = np.linalg.qr(rng.normal(size=(len(x), 3, 3)))[0] * rng.choice([-1, 1], (len(x), 1, 3)) @ x[:, :3]
    return (x + JITTER * rng.normal(size=x.shape)).astype(np.float32)


def distances(x: np.ndarray) -> np.ndarray:
    """Return the distances (N, L, L) between present atoms; infinite for an absent atom, and for one with itself."""
    here, d = x[:, 3] > 0, np.linalg.norm(x[:, :3, :, None] - x[:, :3, None], axis=1)
    return np.where(here[:, None] & here[:, :, None] & ~np.eye(len(KIND), dtype=bool), d, np.inf)


def valid(x: np.ndarray) -> np.ndarray:
    """Return (N,): whether molecules (N, 4, L) are valid, see the module docstring."""
    ratio, here = distances(x) / CONTACT, x[:, 3] > 0
    reached = np.linalg.matrix_power((ratio < 1.3) + np.eye(len(KIND)), len(KIND)) > 0
    connected = (reached[np.arange(len(x)), here.argmax(1)] == here).all(1) & (here.sum(1) > 1)
    return connected & (ratio > 0.7).all((1, 2)) & ((ratio < 1.3).sum(2) <= VALENCE[KIND]).all(1)


def graphs(x: np.ndarray) -> list[tuple]:
    """Return each molecule's formula, and the spectrum of its graph of bonds, which is the same for the same graph."""
    here, bond = x[:, 3] > 0, distances(x) < 1.3 * CONTACT
    matrix = bond * np.sqrt(np.outer(NUMBER, NUMBER)) + here[:, None] * np.diag(NUMBER**1.3)
    formulas = [Atoms(NUMBER[row]).get_chemical_formula() for row in here]
    return [(f, *row) for f, row in zip(formulas, np.linalg.eigvalsh(matrix).round(3) + 0.0, strict=True)]


def pair_counts(x: np.ndarray, a: str, b: str) -> torch.Tensor:
    """Return how many distances between elements a and b are in each bin, for each molecule, (N, bins)."""
    row, i, j = np.nonzero((atomic_numbers[a] == NUMBER)[:, None] & (atomic_numbers[b] == NUMBER) & (distances(x) < 9))
    return torch.from_numpy(np.histogram2d(row, distances(x)[row, i, j], [np.arange(len(x) + 1), BINS])[0])


def transport(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the Wasserstein distance between two laws of distances, in Å, from counts (N, bins) and (M, bins)."""
    x, y = (counts.sum(0).cumsum(0) / counts.sum() for counts in (x, y))
    return (BINS[1] - BINS[0]) * (x - y).abs().sum()


def independent_log_prob(x: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Return log p (N,), in nats, of independent slots: present with its frequency, Gaussian positions."""
    here = train[:, 3] > 0
    share, spread = here.mean(0), np.sqrt((train[:, :3] ** 2).mean(1).sum(0, where=here) / here.sum(0))
    present = np.log(share) + norm.logpdf(x[:, 3], 1, JITTER) + norm.logpdf(x[:, :3], 0, spread).sum(1)
    absent = np.log1p(-share) + norm.logpdf(x[:, 3], -1, JITTER) + norm.logpdf(x[:, :3], 0, JITTER).sum(1)
    return np.logaddexp(present, absent).sum(1)


def fit(x: np.ndarray, steps: int, width: int, depth: int, batch: int) -> ss.Run:
    """Train a model of grids (N, 4, L)."""
    torch.manual_seed(0)
    network = ss.networks.EquivariantNetwork(KIND.tolist(), scalars=1, width=width, depth=depth)
    model = ss.ScoreModel(network, ss.VP(), ss.predictions.KarrasPreconditioning(SIGMA_DATA))
    loss = ss.losses.DenoisingScoreMatching(ss.losses.KarrasWeighting(SIGMA_DATA, mean=-1.0, std=1.4))
    settings = {"batch_size": batch, "learning_rate": 3e-3, "warmup": 30, "ema": 0.99, "transform": ss.data.Affine()}
    return ss.fit(model, x, steps=steps, loss=loss, **settings)


def main(small: bool) -> dict[str, float]:
    """Train, draw molecules, print the table, and return the figures by name."""
    steps, width, depth, batch = (80, 48, 1, 32) if small else (1500, 96, 4, 64)
    count, probes, nodes = (48, 1, 16) if small else (400, 8, 80)
    order = (rng := np.random.default_rng(0)).permutation(sorted(grids := molecules()))
    parts = {"data": [grids[n] for n in order[HELD_OUT:]], "held out": [grids[n] for n in order[:HELD_OUT]]}
    train, test = noisy(parts["data"], 180, rng), noisy(parts["held out"], 1, rng)
    run, figures = fit(train, steps, width, depth, batch), {}
    sampler = ss.samplers.PredictorCorrector(ss.samplers.DPMSolverPP(), steps=40, denoise_final=True)
    drawn = sampler(run.model, shape=(count, *train.shape[1:]), seeds=range(count), progress=True)
    samples = {"data": train[:: len(train) // count][:count], "model": drawn.x.double().numpy()}
    samples["independent"] = moved = samples["data"].copy()
    for slot, rows in enumerate(map(np.flatnonzero, moved[:, 3].T > 0)):
        moved[rows, :3, slot] = moved[rng.permutation(rows), :3, slot]
    known = {part: {*graphs(np.stack(x))} for part, x in parts.items()}
    for name, x in samples.items():
        good = wilson(int(valid(x).sum()), len(x), z=1.96)
        seen = [next((part for part in known if key in known[part]), "new") for key in graphs(x[valid(x)])]
        counts = ", ".join(f"{seen.count(part)} {part}" for part in (*known, "new"))
        print(f"{name}: valid {good.value:.1%} [{good.low:.1%}, {good.high:.1%}], graphs: {counts}; distances", end="")
        figures |= {f"{name}: valid": good.value, f"{name}: new": seen.count("new")}
        for a, b in PAIRS:
            off = bootstrap(partial(transport, y=pair_counts(train[1::18], a, b)), pair_counts(x, a, b))
            print(f", {a}-{b} {off.value:.3f} [{off.low:.3f}, {off.high:.3f}]", end="")
            figures[f"{name}: {a}-{b}"] = off.value
        print(" Å off")
    flat, states = train.reshape(len(train), -1), torch.from_numpy(test)
    options = {"trace": ss.Hutchinson(probes), "solver": ss.solvers.Adams(nodes)}
    nats = {
        "model": ss.log_prob(run.model, states, seeds=range(HELD_OUT), **options).value.numpy(),
        "independent": independent_log_prob(test, train),
        "Gaussian": multivariate_normal(flat.mean(0), np.cov(flat.T)).logpdf(test.reshape(HELD_OUT, -1)),
    }
    for name, value in nats.items():
        less = f"{(nats['model'] - value).mean():.1f} +- {sem(nats['model'] - value):.1f} less than the model"
        print(f"{name}: log p of held-out molecules {value.mean():.1f} +- {sem(value):.1f} nats, {less}")
        figures[f"{name}: log p"] = value.mean()
    print(f"{time.process_time():.0f} s of CPU time")
    if not small:
        draw_figure(samples, parts, known, nats, Path(__file__).parent / "figures" / "molecules.png")
    return figures


def draw_molecule(ax: plt.Axes, x: np.ndarray, title: str) -> None:
    """Draw the atoms and bonds of a molecule (4, L), seen along its thinnest direction."""
    here = x[3] > 0
    p = (centred := x[:3, here].T - x[:3, here].mean(axis=1)) @ np.linalg.svd(centred)[2].T
    for i, j in np.argwhere(np.triu((distances(x[None])[0] < 1.3 * CONTACT)[np.ix_(here, here)])):
        ax.plot(*p[[i, j], :2].T, color="0.5", lw=2, zorder=p[[i, j], 2].mean() - 10)
    for (a, b, c), number in zip(p, NUMBER[here], strict=True):
        ax.plot(a, b, "o", ms=19 * covalent_radii[number], mfc=jmol_colors[number], mec="0.2", mew=0.5, zorder=c)
    ax.set(xlim=(-3, 3), ylim=(-1.8, 1.8), xticks=[], yticks=[], aspect="equal", frame_on=False, title=title)


def draw_figure(samples: dict, parts: dict, known: dict, nats: dict, path: Path) -> None:
    """Draw valid samples above the nearest molecules of the data, the laws of distances, and log-densities."""
    plt.style.use(Path(__file__).parents[1] / "notebooks" / "paper.mplstyle")
    fig, axes = plt.subplot_mosaic("abcdefgh;ijklmnop;qqrrsstt", figsize=(8.6, 4.6), height_ratios=(1, 1, 1.7))
    axes, data = [*axes.values()], np.stack(parts["data"])
    x, shown = samples["model"][valid(samples["model"])], {"held out": {}, "new": {}}
    for key, row in zip(graphs(x), x, strict=True):
        shown.get(next((part for part in known if key in known[part]), "new"), {}).setdefault(key, row)
    rows = [(kind, *item) for kind, found in shown.items() for item in list(found.items())[:4]]
    for (kind, key, row), above, below in zip(rows, axes, axes[8:], strict=False):
        draw_molecule(above, row, f"{key[0]}, {kind}")
        sizes = [np.sort(np.nan_to_num(distances(g), posinf=0).reshape(len(g), -1)) for g in (data, row[None])]
        nearest = data[np.abs(sizes[0] - sizes[1]).sum(1).argmin()]
        draw_molecule(below, nearest, f"nearest: {graphs(nearest[None])[0][0]}")
    for ax, (a, b) in zip(axes[17:], PAIRS, strict=True):
        for color, (name, x) in zip(("0.8", "C0", "C1"), samples.items(), strict=True):
            ax.stairs(pair_counts(x, a, b).mean(0), BINS, fill=color == "0.8", color=color, label=name)
        ax.set(title=f"distances {a}-{b} (Å)", xlim=(0.5, 5), yticks=[])
    axes[17].legend()
    for name, value in nats.items():
        axes[16].plot(np.sort(value), ".-", label=name)
    axes[16].set(title="log p of held-out molecules (nats)", xlabel="molecules in order of log p")
    axes[16].legend()
    fig.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="ten seconds in place of minutes, and no figure")
    main(parser.parse_args().small)
