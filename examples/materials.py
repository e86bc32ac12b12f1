r"""Molecules and crystals as one grid of atoms by element (UniMat, 2311.09235).

A material is a state (3, E + 1, S): the Cartesian positions of up to S atoms of each of E elements, in angstrom. A slot
without an atom has the null position (-10, -10, -10), so that one diffusion of positions also draws which atoms there
are, and how many. The last row holds the three vectors of a crystal's cell; a molecule has null vectors there. An atom
is present if the mean of its three coordinates is above -5.

The data are those of `ase`: 148 molecules of two or more atoms (the G2 set) and the crystals of 71 elements (the
Delta test). A molecule lies along its principal axes; the set has all its mirror images, and orders the atoms of an
element along the axes. A crystal is seen from 12 random origins. One network learns both, given the kind. A quarter of
the molecules are held out.

A drawn molecule is valid if no two atoms are closer than 0.75 times the sum of their covalent radii, and if the bonds,
pairs closer than 1.25 times that sum, connect all its atoms. The law of its distances is compared with the data by the
1-Wasserstein distance of all pairs within 4 angstrom. Each element has one crystal, so the model of crystals can only
store it; the question is whether it returns the distance of nearest neighbours for the element that it has drawn.

    python examples/materials.py            # about 4 minutes; needs pip install 'scoresde[examples]'
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
    from ase.collections import dcdft, g2
    from ase.data import atomic_numbers, covalent_radii
except ImportError as error:
    raise ImportError("this example needs ase: pip install 'scoresde[examples]'") from error

HERE = Path(__file__).parent
NULL, SLOTS, MOLECULE, CRYSTAL = -10.0, 12, 0, 1
ELEMENTS = sorted({symbol for name in dcdft.names for symbol in dcdft[name].symbols}, key=atomic_numbers.get)
TRANSFORM = ss.data.Affine(scale=0.25, shift=2.5)  # the null position becomes 0; a model unit is 4 angstrom


def to_grid(atoms):
    """Return the state (3, E + 1, S) of a molecule or a crystal, with its atoms in their order."""
    grid = np.full((len(ELEMENTS) + 1, SLOTS, 3), NULL)
    for row, element in enumerate(ELEMENTS):
        positions = atoms.positions[[symbol == element for symbol in atoms.symbols]]
        grid[row, : len(positions)] = positions
    if atoms.pbc.any():
        grid[-1, :3] = atoms.cell
    return torch.from_numpy(grid).float().permute(2, 0, 1)


def from_grid(state, kind):
    """Return the atoms of a state that the model has drawn."""
    grid = state.permute(1, 2, 0).double().numpy()
    rows, slots = np.nonzero(grid[:-1].mean(axis=2) > NULL / 2)
    cell = {"cell": grid[-1, :3], "pbc": True} if kind == CRYSTAL else {}
    return Atoms([ELEMENTS[row] for row in rows], grid[rows, slots], **cell)


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


def crystal_states(names, images, rng):
    """Return the states of crystals, each with random origins."""
    states = []
    for name, _ in product(names, range(images)):
        atoms = dcdft[name]
        atoms.positions += rng.uniform(-0.2, 0.2, 3) @ atoms.cell.array - atoms.positions.mean(axis=0)
        states.append(to_grid(atoms))
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


def nearest(atoms):
    """Return the mean distance of an atom of a crystal from its nearest neighbour."""
    shifts = np.array(list(product(range(-2, 3), repeat=3))) @ atoms.cell.array
    d = np.linalg.norm(atoms.positions[:, None, None] - atoms.positions[None, :, None] - shifts, axis=3)
    return np.where(d < 1e-9, np.inf, d).min(axis=(1, 2)).mean()


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


def draw(model, kind, n, steps):
    """Draw materials of a kind from the model."""
    shape = (n, 3, len(ELEMENTS) + 1, SLOTS)
    x = ss.samplers.DDIM()(model.given(kind), shape=shape, seeds=range(n), steps=steps, progress=True).x
    return [from_grid(state, kind) for state in TRANSFORM.inverse(x)]


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


def figure_of(molecules, truth, crystals):
    """Draw molecules, the law of their distances, and the nearest neighbours of the crystals' elements."""
    figure = plt.figure(figsize=(8.6, 4.6))
    top, bottom = figure.subfigures(2, 1, height_ratios=[0.75, 1])
    axes = top.subplots(2, 7).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, atoms in zip(axes, [m for m in molecules if is_valid(m) and len(m) > 3], strict=False):
        show(axis, atoms)
    left, right = bottom.subplots(1, 2, width_ratios=[1, 1.3])
    bins = np.linspace(0.6, 4.0, 69)
    left.hist(pairs(truth), bins, density=True, color="0.75", label="data")
    left.hist(pairs(molecules), bins, density=True, histtype="step", color="C1", label="drawn")
    left.set(xlabel="distance of two atoms (Å)", ylabel="density (1/Å)", title="molecules: the law of distances")
    left.legend()
    numbers = [atomic_numbers[name] for name in ELEMENTS]
    right.plot(numbers, [nearest(dcdft[name]) for name in ELEMENTS], "o-", color="0.6", markersize=3, label="data")
    drawn = [(atoms.numbers[0], nearest(atoms)) for atoms in crystals if len(atoms) and len(set(atoms.symbols)) == 1]
    right.plot(*np.array(drawn).reshape(-1, 2).T, ".", color="C1", markersize=4, label="drawn")
    right.set(xlabel="atomic number", ylabel="nearest neighbour (Å)", title="crystals of one element", ylim=(0, 6.5))
    right.legend()
    return figure


def main(small: bool = False) -> dict[str, float]:
    steps, n, sampler_steps, width, images = (30, 16, 10, 64, 2) if small else (1500, 300, 60, 256, 12)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    names = rng.permutation([name for name in g2.names if len(g2[name]) > 1])
    train, held_out = names[:111], names[111:]
    molecules, crystals = molecule_states(train), crystal_states(ELEMENTS, images, rng)
    kinds = torch.tensor([MOLECULE, CRYSTAL]).repeat_interleave(torch.tensor([len(molecules), len(crystals)]))
    torch.manual_seed(0)
    network = ss.networks.MLP((3, len(ELEMENTS) + 1, SLOTS), width=width, depth=3, classes=2)
    data = torch.cat([molecules, crystals]), kinds
    model = ss.ScoreModel(network, ss.VP(), ss.predictions.KarrasPreconditioning(sigma_data=0.5))
    model = ss.fit(model, data, transform=TRANSFORM, steps=steps, batch_size=64, ema=0.995).model
    known = [g2[name] for name in train]
    drawn = {
        "data, held out": [g2[name] for name in held_out],
        "data, training": known,
        "model": draw(model, MOLECULE, n, sampler_steps),
        "Gaussian": [from_grid(state, MOLECULE) for state in gaussian(molecules, n, generator)],
    }
    formulas, figures = {atoms.get_chemical_formula() for atoms in known}, {}
    for name, found in drawn.items():
        figures[f"{name}: valid"], figures[f"{name}: valid, error"] = share([is_valid(atoms) for atoms in found])
        figures[f"{name}: distances to training (A)"] = wasserstein_distance(pairs(found), pairs(known))
    valid = [atoms for atoms in drawn["model"] if is_valid(atoms)]
    new = [atoms.get_chemical_formula() not in formulas for atoms in valid]
    figures["model: new formula among valid"] = float(np.mean(new)) if new else 0.0
    lattices = draw(model, CRYSTAL, n, sampler_steps)
    pure = [atoms for atoms in lattices if len(set(atoms.symbols)) == 1]
    errors = np.array([nearest(atoms) / nearest(dcdft[atoms.symbols[0]]) - 1 for atoms in pure])
    within = [len(set(atoms.symbols)) == 1 for atoms in lattices]
    figures["crystals: one element"], figures["crystals: one element, error"] = share(within)
    figures["crystals: median error of nearest neighbours"] = float(np.median(np.abs(errors))) if pure else np.nan
    figures["crystals: elements drawn"] = float(len({atoms.symbols[0] for atoms in pure}))
    print(*(f"{name:<50}{value:10.4f}" for name, value in figures.items()), sep="\n")
    with plt.style.context(HERE.parent / "notebooks" / "paper.mplstyle"):
        figure = figure_of(drawn["model"], known, lattices)
        if not small:
            figure.savefig(HERE / "figures" / "materials.png", dpi=120)
        plt.close(figure)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a short run, to see that it works")
    main(parser.parse_args().small)
