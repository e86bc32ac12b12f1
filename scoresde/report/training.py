"""The section on the training: what `log.jsonl` says, in charts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from scoresde.report.axes import is_wide
from scoresde.report.charts import Chart
from scoresde.report.facts import Facts
from scoresde.report.facts import Line as LogLine
from scoresde.report.layers import Layer, Line
from scoresde.report.words import number, pm
from scoresde.training.log import LEVELS

MOST_POINTS = 400  # of a curve; of more lines, means of neighbours are drawn
BOUNDS = ("validation_bits_per_dim_bound", "validation_nats_per_dim_bound")


@dataclass
class Training:
    """What the template shows."""

    charts: list[Chart] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)
    skipped: list[LogLine] = field(default_factory=list)
    has_held_out: bool = False
    has_levels: bool = False
    is_short: bool = False


def training(facts: Facts) -> Training:
    """The charts of a training, as far as it was logged."""
    lines, held_out = facts.steps, facts.held_out
    found = Training(skipped=facts.skipped, is_short=len(lines) == 1)
    if len(lines) > 1:
        found.charts += [loss_chart(lines), norm_chart(lines)]
        found.said = pace(lines)
    found.has_held_out = any(line.get("validation_loss") is not None for line in held_out)
    if measured := finite(held_out, "validation_loss"):
        found.charts.append(held_out_chart(measured, "validation_loss", "Loss on held-out data", "loss"))
    for name in BOUNDS:
        if bounded := finite(held_out, name):
            unit = "bits/dim" if "bits" in name else "nats/dim"
            found.charts.append(held_out_chart(bounded, name, "Evidence bound on held-out data", unit))
    if (chart := levels_chart(lines)) is not None:
        found.has_levels = True
        found.charts.append(chart)
    return found


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most `MOST_POINTS` points: the last x and the mean y of equally many neighbours."""
    size = max(1, math.ceil(len(x) / MOST_POINTS))
    parts = [slice(i, i + size) for i in range(0, len(x), size)]
    return [x[part][-1] for part in parts], [sum(y[part]) / len(y[part]) for part in parts]


def moving_mean(y: Sequence[float], window: int) -> list[float]:
    """At each place the mean of so many values up to there, of fewer at the beginning."""
    return [sum(y[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(y))]


def curve(lines: Sequence[LogLine], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of what was logged under a name."""
    kept = finite(lines, name)
    return [float(line["step"]) for line in kept], [float(line[name]) for line in kept]


def finite(lines: Sequence[LogLine], name: str) -> list[LogLine]:
    """The lines that have a finite number under a name."""
    return [line for line in lines if line.get(name) is not None and math.isfinite(line[name])]


def with_mean(title: str, what: str, lines: Sequence[LogLine], name: str, y_label: str) -> Chart:
    """A curve, faint, and its moving mean."""
    x, y = curve(lines, name)
    window = max(3, round(len(y) / 12))
    mean = moving_mean(y, window)
    log = is_wide(mean)
    layers: list[Layer] = [
        Line("each line of the log", *thinned(x, y), weight="faint"),
        Line(f"mean of {window} lines", *thinned(x, mean), weight="strong"),
    ]
    seen = (
        f"{what} against steps of training. Its mean over {window} lines of the log goes from {number(mean[0])} at "
        f"step {number(int(x[0]))} to {number(mean[-1])} at step {number(int(x[-1]))}; the lowest is "
        f"{number(min(mean))}."
        if y
        else f"{what} was never finite."
    )
    return Chart(title if y else f"{title} (never finite)", seen, layers, x="step", y=y_label, y_log=log)


def loss_chart(lines: Sequence[LogLine]) -> Chart:
    return with_mean("Training loss", "The training loss", lines, "loss", "loss")


def norm_chart(lines: Sequence[LogLine]) -> Chart:
    return with_mean(
        "Norm of the gradient", "The norm of the gradient", lines, "gradient_norm", "norm, before clipping"
    )


def held_out_chart(lines: Sequence[LogLine], name: str, title: str, y_label: str) -> Chart:
    """A number of held-out data, finite in each of these lines, with its standard errors."""
    x, y = curve(lines, name)
    errors = [float(line.get(f"{name}_stderr") or 0.0) for line in lines]
    low, high = ([v + sign * e for v, e in zip(y, errors, strict=True)] for sign in (-1, 1))
    layer = Line("", x, y, low, high, colour=2, style="both")
    seen = (
        f"{title} at {len(x)} steps, with standard errors: {pm(y[0], errors[0])} at step {number(int(x[0]))}, "
        f"{pm(y[-1], errors[-1])} at step {number(int(x[-1]))}."
    )
    return Chart(title, seen, [layer], x="step", y=y_label, y_log=is_wide(y))


def levels_chart(lines: Sequence[LogLine]) -> Chart | None:
    """The loss at each noise level, at the beginning, in the middle and at the end; None where it was not logged."""
    kept = [line["loss_by_log_snr"] for line in lines if line.get("loss_by_log_snr")]
    if len(kept) < 3:
        return None
    edges = LEVELS.tolist()
    step = edges[1] - edges[0]
    centres = [edges[0] - step / 2, *((a + b) / 2 for a, b in pairwise(edges)), edges[-1] + step / 2]
    share = max(1, len(kept) // 10)
    middle = (len(kept) - share) // 2
    parts = {"first": kept[:share], "middle": kept[middle : middle + share], "last": kept[-share:]}
    layers: list[Layer] = []
    told = []
    for i, (name, part) in enumerate(parts.items()):
        means = [_mean([line[k] for line in part if k < len(line)]) for k in range(len(centres))]
        points = [(c, m) for c, m in zip(centres, means, strict=True) if m is not None]
        if not points:
            continue
        x, y = ([point[k] for point in points] for k in (0, 1))
        weight = "strong" if name == "last" else "normal"
        layers.append(Line(f"{name} tenth of the training", x, y, colour=(6, 4, 0)[i], style="both", weight=weight))
        told.append(
            f"in the {name} tenth, from {number(y[0], 3)} at log-SNR {number(x[0])} to {number(y[-1], 3)} at "
            f"{number(x[-1])}"
        )
    if not layers:
        return None
    seen = f"The loss before weights by noise level, logarithmic: {'; '.join(told)}."
    wide = is_wide([v for layer in layers for v in layer.extent()[1]])
    return Chart(
        "Loss by noise level", seen, layers, x="log-SNR (noise left, data right)", y="loss, unweighted", y_log=wide
    )


def _mean(values: Sequence[float | None]) -> float | None:
    kept = [v for v in values if v is not None and math.isfinite(v)]
    return sum(kept) / len(kept) if kept else None


def pace(lines: Sequence[LogLine]) -> dict[str, str]:
    """How fast it went, and what it took."""
    found = {}
    rates = sorted(line["images_per_second"] for line in lines if line.get("images_per_second"))
    if rates:
        found["pace"] = f"{number(rates[len(rates) // 2], 3)} samples a second (median)"
    memory = [line["memory_gb"] for line in lines if line.get("memory_gb")]
    if memory:
        found["memory"] = f"{max(memory):.2f} GB at most"
    return found
