"""Quality of a run's samples: metrics against a split of the run's data, next to those of real data (noise floors).

Images are rounded to grey levels and compared in a feature space. Other states are compared in model space, by the
metrics of sampler comparisons (`evaluation.references`). A noise floor is the value of the same metric for real data:

    train     the training data against the split: as many training samples as generated samples, for images without
              those that also occur in the split;
    halves    one half of the split against the other half. Each half has half of the samples, so a bias of order 1/N is
              about twice that of the whole split.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from scoresde.build import Run
from scoresde.evaluation.conditions import no_accuracy
from scoresde.evaluation.image_data import data_statistics, shared_extract, span_of, to_levels
from scoresde.evaluation.references import Reference, metric_values
from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.features import Features, FeatureSpace, warn_if_narrow
from scoresde.metrics.image_quality import (
    CLASS_ACCURACY,
    METRICS,
    MetricValue,
    check_names,
    class_accuracy,
    measure,
    missing,
)
from scoresde.metrics.samples import refuse_nonfinite
from scoresde.result_table import plus_minus
from scoresde.training.batches import step_seed

FLOORS = ("train", "halves")
FEWEST = 8  # a smaller split is not divided into halves

Rows = TypeVar("Rows", Tensor, Features)


@dataclass(frozen=True)
class Column:
    """One column of a table of metrics: a set of samples compared with a reference.

    what, n: description and number of the samples. reference, reference_n: description of the reference, and the number
    of its samples, None if unknown. values: the metric values by name.
    """

    what: str
    n: int
    reference: str
    reference_n: int | None
    values: dict[str, MetricValue]


@dataclass
class Quality:
    """A table of metrics, with a column for the generated samples and one for each noise floor.

    columns: the generated samples come first. space, digest, description: name, SHA-256 and description of the feature
    space. left_out: metrics without a value, and why.
    """

    columns: list[Column]
    space: str
    digest: str | None = None
    description: str = ""
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class QualitySettings:
    """The metrics of samples, and the real data that samples are compared with.

    Args:
        split: the split of the run's data to compare with.
        metrics: names of metrics; by default all for images, and those of `references.Reference` for other states.
        floors: noise floors, among "train" and "halves", see the module docstring.
        seed: the seed of all random draws.
        trust: see `build.instantiate`.

    Raises:
        ValueError: a noise floor is unknown.
    """

    split: str = "test"
    metrics: Sequence[str] | None = None
    floors: Sequence[str] = FLOORS
    seed: int = 0
    trust: tuple[str, ...] = ()

    def __post_init__(self):
        check_names("noise floor", self.floors, FLOORS)

    @property
    def has_training_floor(self) -> bool:
        """Whether to measure the noise floor "train": `floors` has it, and `split` is not the training data."""
        return "train" in self.floors and self.split != "train"


def quality_of_images(
    run: Run,
    samples: Tensor,
    space: FeatureSpace,
    settings: QualitySettings,
    reference: FeatureStatistics | None = None,
    directory: Path | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: bool = False,
    labels: Tensor | None = None,
) -> Quality:
    """Measure images in a feature space; processes share the extraction of features.

    Args:
        run: supplies the data and the range of its grey levels.
        samples: images (N, C, H, W) in data units.
        space: the feature space.
        settings: split, metrics and noise floors.
        reference: feature statistics to compare with instead of the split.
        directory: cache of data statistics, see `image_data.data_statistics`.
        batch_size, device: for the feature extraction.
        progress: show progress bars.
        labels: the classes (N,) that the samples were drawn with, for `class_accuracy`; None if they have none.

    Raises:
        ValueError: the shape of the samples is not that of the data, the reference is of another feature space, a
            metric is unknown, or samples, data or features are NaN or infinite.

    Warns:
        UserWarning: the samples fill less than 10% of the range of the data.
    """
    _check_samples(run, samples)
    names = settings.metrics or (METRICS if labels is None else (*METRICS, CLASS_ACCURACY))
    names = check_names("metric", names, (*METRICS, CLASS_ACCURACY))
    metrics = tuple(metric for metric in names if metric != CLASS_ACCURACY)

    def statistics(split: str, most: int | None = None, without: str | None = None) -> FeatureStatistics:
        extraction = (batch_size, device, progress)
        return data_statistics(run, split, space, directory, most, without, settings.trust, *extraction)

    name = f"{settings.split} data" if reference is None else "given statistics"
    reference = statistics(settings.split) if reference is None else reference
    if reference.space not in ("", space.name):
        raise ValueError(f"the reference must be of the feature space {space.name}; got one of {reference.space}")
    warn_if_narrow(samples, span_of(run))
    levels = to_levels(run, samples)
    features = shared_extract(space, levels, span_of(run), batch_size, device, progress, "the samples")
    if (size := features.values.shape[1]) != len(reference.mean):
        raise ValueError(f"the reference must have the {size} features of {space.name}; got {len(reference.mean)}")
    training = None
    if settings.has_training_floor and run.config.data.get("train") is not None:
        training = statistics("train", len(samples), settings.split).features
    measured = partial(measure, metrics=metrics, seed=settings.seed, device=device)
    columns = _columns(settings, name, measured, features, training, reference.features or reference)
    left_out = {metric: reason for metric, reason in missing(features, reference).items() if metric in metrics}
    if CLASS_ACCURACY in names:
        if labels is None:
            left_out[CLASS_ACCURACY] = "the samples were drawn without labels"
        elif reason := no_accuracy(run, space, features):
            left_out[CLASS_ACCURACY] = reason
        else:
            columns[0].values[CLASS_ACCURACY] = class_accuracy(features.logits, labels)  # type: ignore[arg-type]
    if reference.features is None and "halves" in settings.floors:
        left_out["halves"] = "the reference has moments only, no features"
    return Quality(columns, space.name, space.digest, space.description, left_out)


def quality_of_states(
    run: Run, samples: Tensor, settings: QualitySettings, resamples: int = 200, level: float = 0.95
) -> Quality:
    """Measure states of any shape in model space; the error of a metric is half the width of its confidence interval.

    Args:
        run: supplies the data and its transform.
        samples: states (N, *) in data units.
        settings: split, metrics and noise floors.
        resamples, level: number of half-samples and level of the intervals, see `metrics.bootstrap`.

    Raises:
        ValueError: the shape of the samples is not that of the data, a metric is unknown, or there are fewer than 4
            samples.
    """
    _check_samples(run, samples)
    reference = Reference.of_run(run, len(samples), settings.split, settings.seed, settings.trust)
    kind = f"half the width of the {100 * level:g}% interval"

    def measured(x: Tensor, states: Tensor) -> dict[str, MetricValue]:
        to = replace(reference, states=states)
        rows = metric_values(x, to, settings.metrics, resamples, level, settings.seed)
        return {name: MetricValue(name, row.value, 0.5 * (row.high - row.low), kind) for name, _, row in rows}

    states, training = run.transform(samples.double()), reference.truth if settings.has_training_floor else None
    columns = _columns(settings, f"{settings.split} data", measured, states, training, reference.states)
    return Quality(columns, "model space")


def _check_samples(run: Run, samples: Tensor) -> None:
    shape = run.data_shape
    if tuple(samples.shape[1:]) != shape or len(samples) < 4:
        raise ValueError(
            f"samples must have shape (N, {', '.join(map(str, shape))}) with N >= 4; got {tuple(samples.shape)}"
        )
    refuse_nonfinite(samples, "the samples")


def _columns(
    settings: QualitySettings,
    name: str,
    measured: Callable[[Any, Any], dict[str, MetricValue]],
    samples: Rows,
    training: Rows | None,
    data: Rows | FeatureStatistics,
) -> list[Column]:
    """Return the columns: the samples compared with the data, then the noise floors.

    The noise floors are the training data compared with the data, and one half of the data with the other half.
    """

    def column(what: str, x: Rows, reference: str, y: Rows | FeatureStatistics) -> Column:
        count = y.count if isinstance(y, FeatureStatistics) else len(y)
        return Column(what, len(x), reference, count, measured(x, y))

    columns = [column("samples", samples, name, data)]
    if training is not None:
        columns.append(column("training data", training, name, data))
    if "halves" in settings.floors and not isinstance(data, FeatureStatistics) and len(data) >= FEWEST:
        generator = torch.Generator().manual_seed(step_seed(settings.seed, 0, "halves of data"))
        first, second = torch.randperm(len(data), generator=generator).tensor_split([len(data) // 2])
        columns.append(column(f"half of {name}", data[first], f"the other half of {name}", data[second]))
    return columns


def table(quality: Quality) -> list[list[str]]:
    """Return the cells of a table: column titles, numbers of samples, then for each metric the values +- errors."""
    lines = [["", *(column.what for column in quality.columns)]]
    lines.append(["numbers", *(f"{column.n} : {column.reference_n or '?'}" for column in quality.columns)])
    for metric in quality.columns[0].values:
        cells = [column.values.get(metric) for column in quality.columns]
        lines.append([metric, *("-" if cell is None else plus_minus(cell.value, cell.error) for cell in cells)])
    return lines


def errors(quality: Quality) -> dict[str, str]:
    """Return {metric: the kind of its error}, for example "standard error"."""
    return {metric: value.kind for metric, value in quality.columns[0].values.items()}
