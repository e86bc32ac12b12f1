"""The quality of samples of a run: their figures against a split of its data, beside those of real data itself.

Images are compared as the levels that they would be stored as, in a feature space; other states in model space, by the
figures that samplers are compared by (`evaluation.references`). Beside the samples stand the noise floors, which are
what real data has in their place:

    training data   as many of it as there are samples, without those that are in the split too;
    halves          of the split, one against the other, at half the numbers: what is biased by the order of 1/N is
                    about twice as large there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from scoresde.build import Run
from scoresde.evaluation.image_data import data_statistics, span_of, to_levels
from scoresde.evaluation.references import Reference, check_metrics, figures
from scoresde.evaluation.sampler_comparison import plus_minus
from scoresde.evaluation.trained_classifier import shared_extract
from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.features import Features, FeatureSpace
from scoresde.metrics.image_quality import METRICS, Figure, measure, missing
from scoresde.training.batches import step_seed

FLOORS = ("train", "halves")
FEWEST = 8  # of a split, whose halves are measured


@dataclass(frozen=True)
class Column:
    """The figures of one set of samples: what they are, their number, what they are compared with, and its number."""

    what: str
    n: int
    reference: str
    reference_n: int | None
    figures: dict[str, Figure]


@dataclass
class Quality:
    """The columns, the samples first; the space they were measured in; the metrics left out, and why."""

    columns: list[Column]
    space: str
    digest: str | None = None
    description: str = ""
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class QualitySettings:
    """What samples are compared with, and how.

    Args:
        split: of the run's data.
        metrics: names; all that there are, or those of `references.Reference` for other states than images, if None.
        floors: among "train" and "halves".
        seed: of everything random.
        trust: see `build.instantiate`.

    Raises:
        ValueError: an unknown floor.
    """

    split: str = "test"
    metrics: Sequence[str] | None = None
    floors: Sequence[str] = FLOORS
    seed: int = 0
    trust: tuple[str, ...] = ()

    def __post_init__(self):
        if unknown := [name for name in self.floors if name not in FLOORS]:
            raise ValueError(f"floors among {', '.join(FLOORS)} expected; got {unknown[0]!r}")

    @property
    def has_training_floor(self) -> bool:
        """Whether training data, other than what samples are compared with, is measured too."""
        return "train" in self.floors and self.split != "train"


def quality_of_images(
    run: Run,
    samples: Tensor,
    space: FeatureSpace,
    comparison: QualitySettings,
    reference: FeatureStatistics | None = None,
    directory: Path | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Quality:
    """The figures of images in a feature space; processes share the extraction of features.

    Args:
        run: its data, and the levels of it.
        samples: in data units (N, C, H, W).
        space: what they are compared in.
        comparison: with what, and by which metrics.
        reference: statistics to compare with instead of a split's.
        directory: where statistics of data are kept, see `images.data_statistics`.
        batch_size, device: of the extraction.
        progress: show progress bars.

    Raises:
        ValueError: samples of another shape than the data's, statistics of another feature space, an unknown metric.
    """
    _check_shape(run, samples)
    metrics = tuple(comparison.metrics or METRICS)
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"metrics among {', '.join(METRICS)} expected; got {unknown[0]!r}")
    settings = {"trust": comparison.trust, "batch_size": batch_size, "device": device, "progress": progress}
    name, given = f"{comparison.split} data", reference
    if reference is None:
        reference = data_statistics(run, comparison.split, space, directory, **settings)  # type: ignore[arg-type]
    else:
        name = "given statistics"
        _check_space(reference, space)
    found = shared_extract(space, to_levels(run, samples), span_of(run), batch_size, device, progress)
    if found.values.shape[1] != len(reference.mean):
        raise ValueError(
            f"statistics of {found.values.shape[1]} features ({space.name}) expected; got {len(reference.mean)}"
        )
    columns = [_column("samples", found, name, reference, metrics, comparison.seed, device)]
    if comparison.has_training_floor and run.config.data.get("train") is not None:
        real = data_statistics(run, "train", space, directory, len(samples), comparison.split, **settings)  # type: ignore[arg-type]
        if real.features is not None:
            columns.append(_column("training data", real.features, name, reference, metrics, comparison.seed, device))
    if "halves" in comparison.floors and reference.features is not None and len(reference.features) >= FEWEST:
        first, second = (reference.features[rows] for rows in _halves(len(reference.features), comparison.seed))
        half = f"half of {name}"
        columns.append(
            _column(
                half, first, f"the other half of {name}", FeatureStatistics.of(second), metrics, comparison.seed, device
            )
        )
    left_out = {metric: why for metric, why in missing(found, reference).items() if metric in metrics}
    if given is not None and given.features is None and "halves" in comparison.floors:
        left_out["halves"] = "the reference has moments alone, no features"
    return Quality(columns, space.name, space.digest, space.description, left_out)


def _column(
    what: str,
    x: Features,
    reference: str,
    y: FeatureStatistics,
    metrics: Sequence[str],
    seed: int,
    device: torch.device | str,
) -> Column:
    return Column(what, len(x), reference, y.count, measure(x, y, metrics, seed, device))


def quality_of_states(
    run: Run, samples: Tensor, comparison: QualitySettings, resamples: int = 200, level: float = 0.95
) -> Quality:
    """The figures of states of any shape in model space, with half the width of an interval as their error.

    Args:
        run: its data and its transform.
        samples: in data units (N, *).
        comparison: with what, and by which metrics.
        resamples, level: of the intervals, see `metrics.bootstrap`.

    Raises:
        ValueError: samples of another shape than the data's, an unknown metric, or fewer than four samples.
    """
    _check_shape(run, samples)
    n, seed = len(samples), comparison.seed
    reference = Reference.of_run(run, n, comparison.split, seed, comparison.trust)
    metrics = check_metrics(comparison.metrics, reference)
    name = f"{comparison.split} data"

    def column(what: str, x: Tensor, against: str, y: Reference) -> Column:
        kind = f"half the width of the {100 * level:g}% interval"
        found = {
            metric: Figure(metric, one.value, 0.5 * (one.high - one.low), kind)
            for metric, _, one in figures(x, y, metrics, resamples, level, seed)
        }
        return Column(what, len(x), against, len(y.states), found)

    columns = [column("samples", run.transform(samples.double()), name, reference)]
    if comparison.has_training_floor:
        columns.append(column("training data", reference.truth, name, reference))
    if "halves" in comparison.floors and len(reference.states) >= FEWEST:
        first, second = (reference.states[rows] for rows in _halves(len(reference.states), seed))
        columns.append(column(f"half of {name}", first, f"the other half of {name}", replace(reference, states=second)))
    return Quality(columns, "model space")


def _check_shape(run: Run, samples: Tensor) -> None:
    shape = tuple(run.config.data.shape)
    if tuple(samples.shape[1:]) != shape or len(samples) < 4:
        raise ValueError(
            f"four samples or more of the data's shape, (N, {', '.join(map(str, shape))}), expected; got "
            f"{tuple(samples.shape)}"
        )
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("finite samples expected; got NaN or infinite ones")


def _check_space(reference: FeatureStatistics, space: FeatureSpace) -> None:
    if reference.space and reference.space != space.name:
        raise ValueError(f"statistics of the feature space {space.name} expected; these are of {reference.space}")


def _halves(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The indices of two halves of so many samples, drawn."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(step_seed(seed, 0, "halves of data")))
    return order[: count // 2], order[count // 2 :]


def table(quality: Quality) -> list[list[str]]:
    """A line for each metric under a line of titles: value +- error of each column."""
    lines = [["", *(column.what for column in quality.columns)]]
    lines.append(["numbers", *(f"{column.n} : {column.reference_n or '?'}" for column in quality.columns)])
    for metric in quality.columns[0].figures:
        cells = [column.figures.get(metric) for column in quality.columns]
        lines.append([metric, *("-" if cell is None else plus_minus(cell.value, cell.error) for cell in cells)])
    return lines


def errors(quality: Quality) -> dict[str, str]:
    """What the +- of each metric is."""
    return {metric: figure.kind for metric, figure in quality.columns[0].figures.items()}
