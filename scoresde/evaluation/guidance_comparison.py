r"""Comparison of guidance scales: quality and diversity of samples against the scale, at one sampler and one budget.

Guidance moves samples towards their condition. A larger scale s makes samples more typical of their class (precision
and class accuracy rise) and less varied (recall falls), and the Frechet distance has a minimum in between (2207.12598,
figure 1). All scales draw the same number of samples, from the same seeds, with the same conditions and steps, so that
the differences between scales are those of guidance. The conditions are those of the reference split
(`evaluation.conditions`).

The number of steps is the largest that fits into the budget of network evaluations (NFE) at the dearest scale; a
scale of 0 costs less, and the NFE of each row is counted. Samples are compared with all of the split: images in a
feature space (`metrics.features`), other states in model space. Errors are those of `metrics.image_quality`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from scoresde.build import Run
from scoresde.evaluation.conditions import main_label, no_accuracy
from scoresde.evaluation.generation import DrawnSamples, check_count, draw_samples
from scoresde.evaluation.image_data import data_statistics, is_of_images, shared_extract, span_of, to_levels
from scoresde.evaluation.labels import classes_of
from scoresde.evaluation.references import MOST, data_states
from scoresde.evaluation.sampler_comparison import Build, plans
from scoresde.metrics.features import Features, FeatureSpace
from scoresde.metrics.image_quality import CLASS_ACCURACY, class_accuracy, measure
from scoresde.metrics.intervals import FEWEST
from scoresde.metrics.samples import flatten
from scoresde.progress import progress_bar
from scoresde.protocols import Condition, Model, select
from scoresde.result_table import plus_minus
from scoresde.wrappers import as_model

METRICS = ("precision", "recall", "frechet_distance", CLASS_ACCURACY)


@dataclass(frozen=True)
class GuidanceRow:
    """One metric of the samples at one guidance scale.

    Attributes:
        scale: the guidance scale.
        sampler, budget, steps, nfe, backward: name of the sampler, evaluations allowed, steps made, evaluations and
            backward passes counted, for each sample.
        metric, space: name of the metric, and of the feature space.
        value, error, error_kind: see `metrics.image_quality.MetricValue`.
        n, reference, reference_n: number of samples, name of the reference and number of its samples.
    """

    scale: float
    sampler: str
    budget: int
    steps: int
    nfe: int
    backward: int
    metric: str
    space: str
    value: float
    error: float | None
    error_kind: str
    n: int
    reference: str
    reference_n: int | None


@dataclass(frozen=True)
class GuidanceSettings:
    """The samples that are drawn at each scale, and the data that they are compared with.

    Args:
        sampler: name of the sampler.
        budget: network evaluations per sample.
        n, batch_size, seed: see `evaluation.draw_samples`.
        split: the split of the run's data.
        trust: see `build.instantiate`.
        device: for the extraction of features.
        progress: show progress bars.
    """

    sampler: str
    budget: int
    n: int
    batch_size: int = 256
    seed: int = 0
    split: str = "test"
    trust: tuple[str, ...] = ()
    device: str = "cpu"
    progress: bool = False


def compare_scales(
    run: Run,
    models: Mapping[float, Model],
    build: Build,
    cond: Condition,
    space: FeatureSpace | None,
    settings: GuidanceSettings,
) -> tuple[list[GuidanceRow], dict[str, str]]:
    """Return the metrics of the samples at every scale, and a reason for each metric that has no value.

    Args:
        run: supplies the data.
        models: the guided models by scale.
        build: a function from a number of steps to the sampler.
        cond: the conditions of the n samples, with leading dimension n; None without.
        space: the feature space of images; None for other states.
        settings: number of samples, budget and split.

    Raises:
        ValueError: no scales, fewer than 4 samples, or a budget below the cost of one step; see also
            `evaluation.draw_samples` and `metrics.image_quality.measure`.
    """
    if not models:
        raise ValueError("guidance.scale must have at least one scale; got none")
    check_count("n", settings.n, FEWEST)
    if is_of_images(run) and space is None:
        raise ValueError(
            "images need a feature space; got None: pass `space`, or set features=digits on the command line"
        )
    extract, reference, name = _features_of(run, space, settings)
    steps = _steps(run, models, build, cond, settings)
    labels, rows = main_label(cond, list(classes_of(run))), []
    left_out: dict[str, str] = {}
    for scale, model in progress_bar(list(models.items()), title="scales", unit="scale", shown=settings.progress):
        drawn = draw_samples(
            run, build(steps), settings.n, settings.batch_size, settings.seed, model, cond=cond, progress=False
        )
        features = extract(drawn)
        values = measure(features, reference, METRICS[:3], settings.seed, settings.device)
        reason = "the samples have no labels" if labels is None else _why_not(run, space, features)
        if reason is not None:
            left_out[CLASS_ACCURACY] = reason
        else:
            values[CLASS_ACCURACY] = class_accuracy(features.logits, labels)  # type: ignore[arg-type]
        cost = (settings.sampler, settings.budget, steps, drawn.nfe, drawn.backward)
        against = (settings.n, f"{settings.split} data", len(reference))
        for metric in (values[metric] for metric in METRICS if metric in values):
            measured = (metric.metric, name, metric.value, metric.error, metric.kind)
            rows.append(GuidanceRow(scale, *cost, *measured, *against))
    return rows, left_out


def _why_not(run: Run, space: FeatureSpace | None, features: Features) -> str | None:
    return "the states are not images" if space is None else no_accuracy(run, space, features)


def _steps(run: Run, models: Mapping[float, Model], build: Build, cond: Condition, settings: GuidanceSettings) -> int:
    """Return the number of steps that fits into the budget at every scale."""
    first, shape = select(cond, slice(0, 1), settings.n), (1, *run.state_shape)
    return min(
        steps
        for model in models.values()
        for _, steps in plans(as_model(model, first), shape, settings.seed, settings.sampler, build, [settings.budget])
    )


def _features_of(
    run: Run, space: FeatureSpace | None, settings: GuidanceSettings
) -> tuple[Callable[[DrawnSamples], Features], Features, str]:
    """Return the function from samples to features, the features of the data, and the name of the space."""
    if space is None:
        states = data_states(run, settings.split, MOST, settings.seed, settings.trust)
        return (
            lambda drawn: Features(flatten(run.transform(drawn.x.double()))),
            Features(flatten(states)),
            "model space",
        )
    extraction = (settings.batch_size, settings.device, settings.progress)
    statistics = data_statistics(run, settings.split, space, None, None, None, settings.trust, *extraction)
    if statistics.features is None:
        raise ValueError(f"the statistics of the {settings.split} data must hold features; got moments only")

    def extract(drawn: DrawnSamples) -> Features:
        levels = to_levels(run, drawn.x)
        return shared_extract(space, levels, span_of(run), *extraction[:2], False, "the samples")

    return extract, statistics.features, space.name


# --- output


def table(rows: Sequence[GuidanceRow]) -> list[list[str]]:
    """Return the cells of a table: a title line, then a line for each scale with its cost and metrics +- errors."""
    metrics = list(dict.fromkeys(row.metric for row in rows))
    lines = [["scale", "NFE", *metrics]]
    for scale in dict.fromkeys(row.scale for row in rows):
        cells = {row.metric: row for row in rows if row.scale == scale}
        first = next(iter(cells.values()))
        evaluations = f"{first.nfe} + {first.backward} backward" if first.backward else str(first.nfe)
        values = [plus_minus(cells[metric].value, cells[metric].error) for metric in metrics]
        lines.append([f"{scale:g}", evaluations, *values])
    return lines
