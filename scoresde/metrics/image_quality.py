r"""Quality metrics of samples, computed on features of images: (N, D) for the samples x, (M, D) for the data y.

    Frechet distance   |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), "FID" on Inception features (1706.08500);
                       biased upwards by O(1/N + 1/M): compare it at equal N and M, and with the noise floor, the
                       distance between two sets of real data.
    kernel distance    MMD^2 with the kernel (f g / D + 1)^3 of features f, g, "KID" (1801.01401); unbiased, so it can
                       be negative.
    Inception score    exp(mean KL(p(c|x), p(c))) of the probabilities of a classifier (1606.03498); uses x only.
    precision, recall  the fraction of samples inside the manifold of the data, and vice versa (1904.06991). The
                       manifold is the union of balls around the features; the radius of each is the distance to its
                       third nearest neighbour.
    class accuracy     the fraction of samples that a classifier puts into the class they were drawn with (the
                       classification accuracy of conditional models, 1905.10887); uses x only.

Every metric value comes with an error and the kind of this error:

    Frechet distance   the standard error, from influence functions (see `metrics.frechet`); none for equal moments,
                       where the influence functions are zero;
    KID                the standard deviation over subsets, as published: the error of one subset, not of the mean;
    Inception score    the standard deviation over splits, as published: the error of one split, not of the mean;
    precision, recall, class accuracy
                       the distance to the farther end of Wilson's 68% interval of a fraction, for a fixed manifold or
                       classifier: about the standard error, and not zero where none or all samples lie inside.

NaN or infinite features raise ValueError. An estimated error that is zero, or within the rounding of the metric's
value, is replaced by None: constant features or logits say nothing about the error.

KID is computed by torchmetrics from given features. The Frechet distance and the Inception score equal those of
torchmetrics, except in two cases: for singular covariances (fewer samples than features), where torchmetrics is
inaccurate because it takes roots of the eigenvalues of a non-symmetric matrix; and for a class whose probabilities in a
split round to 0, where the score of torchmetrics is NaN.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.features import Features, FeatureSpace, Span, extract
from scoresde.metrics.frechet import frechet_distance, frechet_influence, frechet_stderr
from scoresde.metrics.intervals import wilson
from scoresde.metrics.moments import moments
from scoresde.metrics.samples import flatten_pair, refuse_nonfinite
from scoresde.tensors import float64

NEIGHBOURS = 3
SUBSETS, LARGEST_SUBSET, SPLITS = 100, 1000, 10
ROUNDING = 8 * torch.finfo(torch.float64).eps  # relative rounding error of the metrics
METRICS = ("frechet_distance", "kid", "inception_score", "precision", "recall")
CLASS_ACCURACY = "class_accuracy"  # of samples that were drawn with labels
LARGE_FEATURE = 100.0  # largest accepted root mean square of features for KID; the kernel grows like its sixth power
LOCAL = {"sync_on_compute": False}  # every process has all features; torchmetrics would concatenate them again


@dataclass(frozen=True)
class MetricValue:
    """The value of a metric, its error, and the kind of this error.

    error: None if there is none; an error that does not exceed the rounding of the value, such as 0, becomes None.
    """

    metric: str
    value: float
    error: float | None
    kind: str

    def __post_init__(self):
        if self.error is not None and not self.error > ROUNDING * abs(self.value):
            object.__setattr__(self, "error", None)


def frechet(x: Tensor, y: Tensor | FeatureStatistics) -> MetricValue:
    """Return the Frechet distance of features (N, D) from features (M, D), or from statistics taken as exact.

    Raises:
        ValueError: the numbers of features differ, there are fewer than 2 samples, or a feature is not finite.
    """
    if isinstance(y, FeatureStatistics):
        exact = y.mean.to(x.device), y.covariance.to(x.device)
        value = float(frechet_distance(*moments(x), *exact))
        error, kind = (frechet_influence(x, *exact).var() / len(x)).sqrt(), "standard error, for fixed statistics"
    else:
        value = float(frechet_distance(*moments(flatten_pair(x, y)[0]), *moments(y)))
        error, kind = frechet_stderr(x, y), "standard error"
    return MetricValue("frechet_distance", value, float(error) if value else None, kind)


def kernel_distance(
    x: Tensor, y: Tensor, subsets: int = SUBSETS, subset_size: int | None = None, seed: int = 0
) -> MetricValue:
    """Return KID: the mean over random subsets of the unbiased MMD^2 of the kernel (f g / D + 1)^3, by torchmetrics.

    Args:
        x, y: features (N, D) and (M, D).
        subsets: number of subsets.
        subset_size: number of samples in a subset; default: 1,000, as published, or half of the smaller set if that is
            less.
        seed: seed of the subsets.

    Raises:
        ValueError: the numbers of features differ, a set has fewer than 4 samples or a feature that is not finite,
            `subset_size` exceeds the number of samples, the features of both sets have a root mean square above 100, or
            they differ so little that the kernel rounds the difference away.
    """
    x, y = flatten_pair(x, y)
    fewest = min(len(x), len(y))
    if subset_size is None and fewest < 4:
        raise ValueError(
            f"x and y must have at least 4 samples each, as KID compares halves of them; got {len(x)} and {len(y)}: "
            "add samples, or choose other metrics"
        )
    size = min(LARGEST_SUBSET, fewest // 2) if subset_size is None else subset_size
    if not 2 <= size <= fewest or subsets < 1:
        raise ValueError(
            f"expected at least 1 subset of 2 to {fewest} samples for KID; got {subsets} subsets of {size} samples"
        )
    scale = min(float(part.square().mean().sqrt()) for part in (x, y))
    if scale > LARGE_FEATURE:
        raise ValueError(
            "the features for KID must be of about unit scale, as its kernel (f g / D + 1)^3 is of the order of their "
            f"sixth power; got a root mean square of {scale:.3g}: subtract an offset, divide them, or choose other "
            "metrics"
        )
    from torchmetrics.image.kid import KernelInceptionDistance  # imported here: it takes as long as importing torch

    with _torchmetrics(seed):
        metric = KernelInceptionDistance(nn.Identity(), subsets, size, **LOCAL)
        metric.update(x, real=False)
        metric.update(y, real=True)
        value, spread = map(float, metric.compute())
    rounding = ROUNDING * (max(float(part.square().mean(dim=1).max()) for part in (x, y)) + 1) ** 3
    if max(abs(value), spread) <= rounding and not all(bool((part == x[0]).all()) for part in (x, y)):
        raise ValueError(
            f"KID must be larger than its rounding error, {rounding:.1g}; got {value:.1g} +- {spread:.1g}: the kernel "
            "cannot tell the features apart; scale them to about unit size, or choose other metrics"
        )
    varies = subsets > 1 and size < max(len(x), len(y)) and spread > rounding
    return MetricValue("kid", value, spread if varies else None, f"standard deviation over {subsets} subsets of {size}")


def inception_score(logits: Tensor, splits: int = SPLITS, seed: int = 0) -> MetricValue:
    """Return exp(mean KL(p(c|x), p(c))) = exp(H(p(c)) - mean H(p(c|x))), with entropies H, averaged over splits.

    Args:
        logits: unnormalised log-probabilities of classes, (N, K).
        splits: number of splits, each with its own p(c) and score; their sizes differ by at most one.
        seed: seed of the order in which the samples are split.

    Raises:
        ValueError: logits are not a matrix or not finite, or there are fewer than 2 samples per split.
    """
    if logits.ndim != 2 or splits < 1 or len(logits) < 2 * splits:
        raise ValueError(f"expected logits (N, K) with N >= 2 for each of {splits} splits; got {tuple(logits.shape)}")
    refuse_nonfinite(logits, "logits")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    parts = float64(logits)[order.to(logits.device)].softmax(dim=1).tensor_split(splits)
    scores = torch.stack([(_entropy(p.mean(dim=0)) - _entropy(p).mean()).exp() for p in parts])
    error = float(scores.std()) if splits > 1 else None
    return MetricValue("inception_score", float(scores.mean()), error, f"standard deviation over {splits} splits")


def _entropy(p: Tensor) -> Tensor:
    """Return the entropies (...) of probabilities (..., K) in nats, with 0 log 0 = 0."""
    return torch.special.entr(p).sum(dim=-1)


@contextmanager
def _torchmetrics(seed: int) -> Iterator[None]:
    """Seed torch's global generator, which torchmetrics uses, during the block; then restore its state."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer.*")
        torch.manual_seed(seed)
        yield


def precision_recall(
    x: Tensor, y: Tensor, neighbours: int = NEIGHBOURS, chunk: int = 1024
) -> tuple[MetricValue, MetricValue]:
    """Return improved precision and recall (1904.06991, eq. 1 and 2).

    Precision is the fraction of x inside the manifold of y, recall the fraction of y inside the manifold of x. The
    manifold of a set is the union of closed balls around its features, with the distance to the k-th nearest other
    feature as radius. A point on the boundary, up to the rounding of its squared distance, is inside.

    Args:
        x, y: features (N, D) of samples and (M, D) of data.
        neighbours: k.
        chunk: number of rows of the distance matrix that are computed at once; they take 16 chunk max(N, M) bytes.

    Raises:
        ValueError: the numbers of features differ, or a set has at most k samples or a feature that is not finite.
    """
    x, y = flatten_pair(x, y)
    if not 1 <= neighbours < min(len(x), len(y)):
        raise ValueError(
            f"expected 1 <= neighbours < number of samples; got {neighbours=} for {len(x)} and {len(y)} samples"
        )
    precision = _fraction("precision", _count_within(x, y, neighbours, chunk), len(x))
    return precision, _fraction("recall", _count_within(y, x, neighbours, chunk), len(y))


def class_accuracy(logits: Tensor, labels: Tensor) -> MetricValue:
    """Return the fraction of samples for which the class of the largest logit is the label.

    Samples with the null class -1 are left out.

    Args:
        logits: unnormalised log-probabilities of classes, (N, K).
        labels: the classes that the samples were drawn with, integers (N,).

    Raises:
        ValueError: shapes that do not fit, labels outside of -1 .. K - 1, no sample has a class, or logits that are not
            finite.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"expected logits (N, K) and N integer labels; got {tuple(logits.shape)} and {tuple(labels.shape)} of "
            f"{labels.dtype}"
        )
    if not len(labels) or int(labels.max()) >= logits.shape[1] or int(labels.min()) < -1 or int(labels.max()) < 0:
        raise ValueError(
            f"labels must lie in 0 .. {logits.shape[1] - 1}, or be -1 (no class) for some samples, but not all; got "
            f"{labels.unique().tolist()}"
        )
    refuse_nonfinite(logits, "logits")
    labels = labels.to(logits.device)
    has_class = labels >= 0
    correct = logits.argmax(dim=1)[has_class] == labels[has_class]
    return _fraction(CLASS_ACCURACY, int(correct.sum()), int(has_class.sum()))


def _fraction(metric: str, count: int, total: int) -> MetricValue:
    share = wilson(count, total)
    error = max(share.high - share.value, share.value - share.low)
    return MetricValue(metric, share.value, error, "distance to the farther end of Wilson's 68% interval")


def _count_within(points: Tensor, manifold: Tensor, neighbours: int, chunk: int) -> int:
    """Return the number of points inside the manifold: in at least one of its balls, see `precision_recall`."""
    radii = []
    for i, (squares, _) in enumerate(_squares(manifold, manifold, chunk)):
        rows = torch.arange(len(squares), device=squares.device)
        squares[rows, rows + i * chunk] = math.inf  # a point is not its own neighbour
        radii.append(squares.kthvalue(neighbours, dim=1).values)
    radius = torch.cat(radii)
    inside = [(squares <= radius + rounding).any(dim=1) for squares, rounding in _squares(points, manifold, chunk)]
    return int(torch.cat(inside).sum())


def _squares(x: Tensor, y: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield squared distances (chunk, M) from rows of x to all rows of y, and bounds (chunk, M) of their rounding.

    They are computed as |x|^2 + |y|^2 - 2 x y, for `chunk` rows of x at a time.
    """
    lengths, relative = y.square().sum(dim=1), y.shape[1] * torch.finfo(y.dtype).eps
    for part in x.split(chunk):
        total = part.square().sum(dim=1, keepdim=True) + lengths
        yield (total - 2 * part @ y.mT).clamp(min=0), relative * total


# --- all metrics


def check_names(kind: str, names: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """Return the names as a tuple, after checking that they are known.

    Raises:
        ValueError: a name is not among `known`.
    """
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{kind} must be one of {', '.join(known)}; got {unknown[0]!r}")
    return tuple(names)


def missing(x: Features, y: Features | FeatureStatistics) -> dict[str, str]:
    """Return the metrics that cannot be computed from these features, each with the reason."""
    reasons: dict[str, str] = {}
    if isinstance(y, FeatureStatistics) and y.features is None:
        reasons |= dict.fromkeys(("kid", "precision", "recall"), "the reference has moments only, no features")
    if x.logits is None:
        reasons["inception_score"] = "the feature space has no classes"
    return reasons


def measure(
    x: Features,
    y: Features | FeatureStatistics,
    metrics: Sequence[str] = METRICS,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, MetricValue]:
    """Compute the metrics of samples against data, except those that the function `missing` returns.

    Args:
        x, y: features of samples and of data; y may be statistics of data, whose features are used if they are stored.
        metrics: names among `METRICS`.
        seed: seed of subsets and splits.
        device: device to compute on.

    Raises:
        ValueError: a metric is unknown, the numbers of features differ, there are too few samples, or a feature is NaN
            or infinite.
    """
    names = set(check_names("metric", metrics, METRICS))
    device = "cpu" if torch.device(device).type == "mps" else device  # MPS has no float64
    data = y.features or y if isinstance(y, FeatureStatistics) else y
    for name, part in (("the samples", x), ("the data", data)):
        if isinstance(part, Features):
            part.refuse_nonfinite(name)
    x, data = x.to(device), data.to(device) if isinstance(data, Features) else data
    values: list[MetricValue] = []
    if "frechet_distance" in names:
        values.append(frechet(x.values, data.values if isinstance(data, Features) else data))
    if "kid" in names and isinstance(data, Features):
        values.append(kernel_distance(x.values, data.values, seed=seed))
    if "inception_score" in names and x.logits is not None:
        values.append(inception_score(x.logits, max(1, min(SPLITS, len(x) // 2)), seed))
    if names & {"precision", "recall"} and isinstance(data, Features):
        values += precision_recall(x.values, data.values)
    return {value.metric: value for value in values if value.metric in names}


def measure_images(
    x: Tensor,
    y: Tensor,
    space: FeatureSpace,
    span: Span,
    metrics: Sequence[str] = METRICS,
    batch_size: int = 256,
    seed: int = 0,
) -> dict[str, MetricValue]:
    """Compute the metrics of images (N, C, H, W) against images (M, C, H, W) in a feature space.

    Args:
        x, y: images of samples and of data.
        space: the feature space.
        span: the values of black and white in x and y.
        metrics: names among `METRICS`.
        batch_size: batch size of the feature extraction.
        seed: seed of subsets and splits.

    Warns, raises: see `features.check_images` and `measure`.
    """
    samples, data = (extract(space, images, span, batch_size) for images in (x, y))
    return measure(samples, data, metrics, seed)
