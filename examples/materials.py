r"""Molecules as a grid of atoms by element (the representation of UniMat, 2311.09235).

A molecule is a state (3, E, S): the Cartesian positions of up to S atoms of each of E elements, in angstrom. A slot
without an atom has the null position (-5, -5, -5), so that one diffusion of positions also draws which atoms there are,
and how many. An atom is present if the mean of its three coordinates is above -2.5.

The data are the 148 molecules of two or more atoms in `ase`'s G2 set; a quarter of them are held out. A molecule lies
along its principal axes; the data have all its mirror images, and order the atoms of an element along the axes.

A drawn molecule is valid if it has at least two atoms, if no two of them are closer than 0.75 times the sum of their
covalent radii, and if bonds, pairs closer than 1.25 times that sum, connect all atoms. The law of distances is that of
all pairs of atoms within 4 angstrom; it is compared with the training data by the 1-Wasserstein distance, for the
model, for the held-out molecules, and for a Gaussian with the mean and covariance of the training states.

    python examples/materials.py            # needs pip install 'scoresde[examples]'
    python examples/materials.py --small    # ten seconds
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from scipy.sparse.csgraph import connected_components
from scipy.stats import wasserstein_distance

import scoresde as ss

try:
    from ase import Atoms
    from ase.collections import g2
    from ase.data import atomic_numbers, covalent_radii
except ImportError as error:
    raise ImportError("this example needs ase: pip install 'scoresde[examples]'") from error

HERE = Path(__file__).parent
NULL, SLOTS = -5.0, 10
ELEMENTS = sorted({symbol for name in g2.names for symbol in g2[name].symbols}, key=atomic_numbers.get)
TRANSFORM = ss.data.Affine(scale=0.5, shift=2.5)  # the null position becomes 0; a model unit is 2 angstrom


def to_grid(atoms):
    """Return the state (3, E, S) of a molecule, with the atoms of an element in their order."""
    grid = np.full((len(ELEMENTS), SLOTS, 3), NULL)
    for row, element in enumerate(ELEMENTS):
        positions = atoms.positions[[symbol == element for symbol in atoms.symbols]]
        grid[row, : len(positions)] = positions
    return torch.from_numpy(grid).float().permute(2, 0, 1)


def from_grid(state):
    """Return the atoms that are present in a state."""
    grid = state.permute(1, 2, 0).double().numpy()
    rows, slots = np.nonzero(grid.mean(axis=2) > NULL / 2)
    return Atoms([ELEMENTS[row] for row in rows], grid[rows, slots])


def molecule_states(names):
    """Return the states of molecules along their principal axes, each with its eight mirror images."""
    states = []
    for name in names:
        atoms = g2[name]
        x = atoms.positions - atoms.positions.mean(axis=0)
        x = x @ np.linalg.svd(x, full_matrices=True)[2].T
        for signs in product((-1, 1), repeat=3):
            image = x * signs
            order = np.lexsort(np.round(image, 2).T[::-1])
            states.append(to_grid(Atoms(np.array(atoms.symbols)[order], image[order])))
    return torch.stack(states)


def distances_of(atoms):
    """Return the distance of each pair of a molecule's atoms, and the sum of their covalent radii."""
    i, j = np.triu_indices(len(atoms), 1)
    radii = covalent_radii[atoms.numbers]
    return np.linalg.norm(atoms.positions[i] - atoms.positions[j], axis=1), radii[i] + radii[j]


def is_valid(atoms):
    """Return whether a molecule has at least two atoms, no clash, and bonds that connect all its atoms."""
    if len(atoms) < 2:
        return False
    distance, contact = distances_of(atoms)
    bonds = np.zeros((len(atoms), len(atoms)))
    bonds[np.triu_indices(len(atoms), 1)] = distance < 1.25 * contact
    return bool((distance > 0.75 * contact).all()) and connected_components(bonds, directed=False)[0] == 1


def pairs(molecules):
    """Return all distances below 4 angstrom of pairs of atoms in molecules."""
    d = np.concatenate([distances_of(atoms)[0] for atoms in molecules if len(atoms) > 1])
    return d[d < 4.0]


def gaussian(states, n, generator):
    """Draw from the Gaussian with mean and covariance of the states."""
    x = states.flatten(1).double()
    weights = torch.randn(n, len(x), generator=generator, dtype=x.dtype) / len(x) ** 0.5
    return (x.mean(0) + weights @ (x - x.mean(0))).float().reshape(n, *states.shape[1:])


def share(flags):
    """Return the share of true values and its standard error, smoothed by one value of each kind."""
    n, p = len(flags) + 2, (sum(flags) + 1) / (len(flags) + 2)
    return float(np.mean(flags)), (p * (1 - p) / n) ** 0.5


def show(axis, atoms):
    """Draw a molecule in the plane of its first two axes, with its bonds."""
    distance, contact = distances_of(atoms)
    for i, j, d, c in zip(*np.triu_indices(len(atoms), 1), distance, contact, strict=True):
        if d < 1.25 * c:
            axis.plot(*atoms.positions[[i, j], :2].T, color="0.6", linewidth=1.5, zorder=1)
    colours = {"H": "#DDDDDD", "C": "#444444", "N": "#0072B2", "O": "#D55E00", "F": "#009E73", "Cl": "#009E73"}
    for position, symbol in zip(atoms.positions, atoms.symbols, strict=True):
        size, colour = 130 * covalent_radii[atomic_numbers[symbol]] ** 1.5, colours.get(symbol, "#E69F00")
        axis.scatter(*position[:2], s=size, color=colour, edgecolor="black", linewidth=0.4, zorder=2)
    axis.set(title=atoms.get_chemical_formula(), aspect="equal", xlim=(-2.9, 2.9), ylim=(-2.2, 2.2))
    axis.axis("off")


def figure_of(drawn):
    """Draw molecules of the model, and the law of distances of the data, the model and the Gaussian."""
    figure = plt.figure(figsize=(8.6, 3.0))
    left, right = figure.subfigures(1, 2, width_ratios=[1.5, 1])
    axes = left.subplots(3, 5).ravel()
    shown = [atoms for atoms in drawn["model"] if is_valid(atoms) and len(atoms) > 3]
    for axis in axes:
        axis.axis("off")
    for axis, atoms in zip(axes, shown, strict=False):
        show(axis, atoms)
    axis, bins = right.subplots(), np.linspace(0.3, 4.0, 60)
    axis.hist(pairs(drawn["data, training"]), bins, density=True, color="0.75", label="training data")
    for name, colour in (("model", "C1"), ("Gaussian", "C0")):
        axis.hist(pairs(drawn[name]), bins, density=True, histtype="step", color=colour, label=name)
    axis.set(xlabel="distance of two atoms (Å)", ylabel="density (1/Å)")
    axis.legend()
    return figure


def main(small: bool = False) -> dict[str, float]:
    steps, n, sampler_steps, width = (30, 30, 10, 64) if small else (4500, 500, 100, 256)
    names = np.random.default_rng(0).permutation([name for name in g2.names if len(g2[name]) > 1])
    train, held_out = ([g2[name] for name in part] for part in (names[:111], names[111:]))
    states = molecule_states(names[:111])
    torch.manual_seed(0)
    network = ss.networks.MLP(tuple(states.shape[1:]), width=width, depth=3)
    model = ss.ScoreModel(network, ss.VP(), ss.predictions.KarrasPreconditioning(sigma_data=0.5))
    model = ss.fit(model, states, transform=TRANSFORM, steps=steps, ema=0.99, learning_rate=2e-3).model
    x = ss.samplers.DDIM()(model, shape=(n, *states.shape[1:]), seeds=range(n), steps=sampler_steps, progress=True).x
    drawn = {
        "data, training": train,
        "data, held out": held_out,
        "model": [from_grid(state) for state in TRANSFORM.inverse(x)],
        "Gaussian": [from_grid(state) for state in gaussian(states, n, torch.Generator().manual_seed(0))],
    }
    figures = {}
    for name, molecules in drawn.items():
        figures[f"{name}: valid"], figures[f"{name}: valid, error"] = share([is_valid(atoms) for atoms in molecules])
        figures[f"{name}: distances to training (A)"] = wasserstein_distance(pairs(molecules), pairs(train))
    known = {atoms.get_chemical_formula() for atoms in train}
    others = {atoms.get_chemical_formula() for atoms in held_out} - known
    formulas = [atoms.get_chemical_formula() for atoms in drawn["model"] if is_valid(atoms)]
    figures["model: share of new formulas among valid"] = float(
        np.mean([name not in known for name in formulas] or [0])
    )
    figures["model: different formulas among valid"] = float(len(set(formulas)))
    figures["model: held-out formulas found"] = float(len(set(formulas) & others))
    figures["held-out formulas"] = float(len(others))
    print(*(f"{name:<45}{value:10.4f}" for name, value in figures.items()), sep="\n")
    with plt.style.context(HERE.parent / "notebooks" / "paper.mplstyle"):
        figure = figure_of(drawn)
        if not small:
            figure.savefig(HERE / "figures" / "materials.png", dpi=120)
        plt.close(figure)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a short run, to see that it works")
    main(parser.parse_args().small)
