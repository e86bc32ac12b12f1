"""`scoresde data`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import Dataset

from scoresde import build, plots
from scoresde.cli.common import SPLITS, choice
from scoresde.cli.output import Record, gap, print_table, say, shows_progress
from scoresde.data.summary import DatasetSummary, describe, state_of
from scoresde.training.checkpoint import replace_atomically

FIGURES = Path("datasets") / "figures"
IMAGES, POINTS = 64, 2000  # samples in a picture
WIDE = 6  # dimensions up to which vectors are drawn in pairs
PANELS = 16  # histograms or channels in a picture
LINES = 12  # series in a panel


def data(config: DictConfig) -> Record:
    """What a dataset holds: its statistics, and a picture of its samples."""
    if config.get("data") is None:
        raise ValueError("a dataset, data=... or experiment=..., expected; got none")
    if OmegaConf.is_missing(config.data, "shape"):
        config.data.shape = None  # to be told, not to be asked for
    nodes = {split: config.data[split] for split in SPLITS if config.data.get(split) is not None}
    drawn = choice("split", config.split, nodes)
    datasets = {split: build.instantiate(node, config.trust) for split, node in nodes.items()}
    found: dict[str, DatasetSummary] = {}
    for split, dataset in datasets.items():
        found[split] = describe(dataset, config.limit, found, progress=shows_progress())
    print_table(table(found))
    gap()
    if names := getattr(datasets[drawn], "names", None):
        moments = zip(found[drawn].mean, found[drawn].std, strict=True)
        rows = [[name, *(f"{value:.6g}" for value in pair)] for name, pair in zip(names, moments, strict=True)]
        print_table([[drawn, "mean", "standard deviation"], *rows])
        gap()
    samples = some(datasets[drawn], config.n or (POINTS if len(found[drawn].shape) == 1 else IMAGES))
    path = Path(config.out) if config.out is not None else FIGURES / f"{name_of(config)}.png"
    shape, states = list(found[drawn].shape), in_model_space(config, datasets)
    picture = save(samples, path, config.data.get("range"), names)
    said: Record = {"shape": shape}
    if states is not None:
        spread = "mean {mean:.4g}, standard deviation {std:.4g} (prediction.sigma_data)"
        said["model space"] = spread.format(**states)
    say({**said, "picture": picture})
    statistics = {split: record_of(one) for split, one in found.items()}
    known = {"shape": shape, "names": names, "model_space": states, "statistics": statistics}
    return {"data": name_of(config), **known, "paths": {"picture": picture}}


def record_of(statistics: DatasetSummary) -> Record:
    """The statistics as numbers."""
    return {key: value for key, value in vars(statistics).items() if key != "fingerprints"}


def name_of(config: DictConfig) -> str:
    """The name of the experiment, or the option of the group data."""
    return str(config.get("name") or HydraConfig.get().runtime.choices["data"])


def some(dataset: Dataset, n: int) -> Tensor:
    """At most n states of a dataset, always the same ones."""
    if n < 1:
        raise ValueError(f"n of 1 or more expected; got {n}")
    total = len(dataset)  # type: ignore[arg-type]
    # In order, for what is read in blocks. Evenly spaced ones of 2n would be n and their mirror images.
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:n].sort().values
    return torch.stack([state_of(dataset[i]) for i in chosen.tolist()])


def in_model_space(config: DictConfig, datasets: dict[str, Dataset]) -> dict[str, float] | None:
    """Mean and standard deviation of the training data as a network sees them, from a sample of them."""
    node = config.data.get("training") or config.data
    transform = build.instantiate(node.get("transform"), config.trust)
    if transform is None or "train" not in datasets:
        return None
    if hasattr(transform, "fit") and not transform.fitted:
        transform = type(transform)(**transform.fit(datasets["train"]))
    values = some(datasets["train"], POINTS).double()
    centred = values + 0.5 if node.get("dequantization") is not None else values  # the mean of x + u
    states = transform(centred)
    return {"mean": float(states.mean()), "std": float(states.std())}


def table(found: dict[str, DatasetSummary]) -> list[list[str]]:
    """The statistics as lines of cells, a column for each split; lines that say nothing are left out."""
    rows: dict[str, Callable[[DatasetSummary], str]] = {
        "items": lambda s: f"{s.count:,}",
        "examined": lambda s: f"{s.examined:,}" if s.examined < s.count else "",
        "state": lambda s: f"{' x '.join(map(str, s.shape)) or '()'} {s.dtype}",
        "min": lambda s: f"{s.min:.6g}",
        "max": lambda s: f"{s.max:.6g}",
        "mean": lambda s: cells(s.mean),
        "standard deviation": lambda s: cells(s.std),
        "whole numbers": lambda s: (f"{s.levels} levels" if s.levels else "many levels") if s.integers else "no",
        "labels": lambda s: labels(s.classes),
        "not finite": lambda s: f"{s.not_finite:,}" if s.not_finite else "",
        "duplicates": lambda s: f"{s.duplicates:,}",
    }
    for name in list(found)[:-1]:
        rows[f"also in {name}"] = lambda s, name=name: f"{s.shared[name]:,}" if name in s.shared else ""  # type: ignore
    lines = [[label, *map(cell, found.values())] for label, cell in rows.items()]
    return [["", *found], *(line for line in lines if any(line[1:]))]


def cells(numbers: Sequence[float]) -> str:
    """A few numbers, or the least and the largest of many."""
    if len(numbers) <= 3:
        return ", ".join(f"{number:.4g}" for number in numbers)
    return f"{min(numbers):.4g} .. {max(numbers):.4g}"


def labels(classes: dict[int, int]) -> str:
    """How many classes, and how many items the smallest and the largest have."""
    if not classes:
        return ""
    return f"{len(classes)} classes of {min(classes.values()):,} .. {max(classes.values()):,}"


def save(
    samples: Tensor, path: Path, limits: Sequence[float] | None = None, names: Sequence[str] | None = None
) -> Path:
    """The picture of samples (N, *): images in a grid, vectors as scatter plots and histograms, series as lines.

    Args:
        samples: in data units.
        path: of the PNG to write.
        limits: values shown black and white; the least and the largest of the samples by default.
        names: of the dimensions of a vector.
    """
    if samples.ndim == 2:
        figure = vectors(samples.numpy(), names or [f"$x_{{{i + 1}}}$" for i in range(samples.shape[1])])
    elif samples.ndim == 3:
        figure = series(samples.numpy())
    else:
        low, high = limits or (float(samples.min()), float(samples.max()))
        return plots.save_samples(samples, path, low, high if high > low else low + 1)
    replace_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


def vectors(points: np.ndarray, names: Sequence[str]) -> Figure:
    """Vectors (N, D): of each pair of a few dimensions a scatter plot, of each dimension a histogram."""
    dimensions = points.shape[1]
    if dimensions > WIDE:
        return histograms(points, names)
    figure = Figure(figsize=(max(4, 2 * dimensions), max(4, 2 * dimensions)), dpi=120, layout="constrained")
    panels: Any = figure.subplots(dimensions, dimensions, squeeze=False)
    for row, column in np.ndindex(dimensions, dimensions):
        axes = panels[row, column]
        if column > row:
            axes.set_axis_off()
        elif column == row:
            axes.hist(points[:, row], bins=40, color=plots.COLOURS[0])
            axes.set_yticks([])
        else:
            axes.scatter(points[:, column], points[:, row], s=3, alpha=0.4, linewidths=0, color=plots.COLOURS[0])
            if column == 0:
                axes.set_ylabel(names[row])
        if row == dimensions - 1:
            axes.set_xlabel(names[column])
    figure.suptitle(f"{len(points)} samples", fontsize=9)
    return figure


def histograms(points: np.ndarray, names: Sequence[str]) -> Figure:
    """Vectors (N, D): a histogram of each of the first dimensions."""
    shown = min(PANELS, points.shape[1])
    columns = int(np.ceil(np.sqrt(shown)))
    rows = -(-shown // columns)
    figure = Figure(figsize=(2.2 * columns, 1.7 * rows), dpi=120, layout="constrained")
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if i >= shown:
            axes.set_axis_off()
            continue
        axes.hist(points[:, i], bins=40, color=plots.COLOURS[0])
        axes.set_yticks([])
        axes.set_xlabel(names[i], fontsize=8)
        axes.tick_params(labelsize=7)
    figure.suptitle(f"{shown} of {points.shape[1]} dimensions, {len(points)} samples", fontsize=9)
    return figure


def series(lines: np.ndarray) -> Figure:
    """Series (N, C, L): a panel for each of the first channels, and a few samples as lines in it."""
    channels = min(PANELS, lines.shape[1])
    figure = Figure(figsize=(8, 0.6 + 1.5 * channels), dpi=120, layout="constrained")
    panels = figure.subplots(channels, 1, squeeze=False, sharex=True)[:, 0]
    for channel, axes in enumerate(panels):
        for i, line in enumerate(lines[:: -(-len(lines) // LINES)]):
            axes.plot(line[channel], linewidth=0.8, alpha=0.8, color=plots.COLOURS[i % len(plots.COLOURS)])
        axes.set_ylabel(f"channel {channel}", fontsize=8)
    panels[-1].set_xlabel("position")
    shown = len(lines[:: -(-len(lines) // LINES)])
    figure.suptitle(f"{shown} samples, {channels} of {lines.shape[1]} channels", fontsize=9)
    return figure
