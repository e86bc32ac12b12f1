r"""Figures of the quality of samples, on features of images: (N, D) of the samples x, (M, D) of the data y.

    Frechet distance   |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), "FID" on features of Inception (1706.08500);
                       biased upwards by the order of 1/N + 1/M: compare at equal numbers, beside the noise floor.
    kernel distance    MMD^2 with the kernel (f g / D + 1)^3, "KID" (1801.01401): without bias, negative at times.
    Inception score    exp(mean KL(p(c|x), p(c))) of a classifier's probabilities (1606.03498): of the samples alone.
    precision, recall  the share of the samples inside the manifold of the data, and the reverse (1904.06991): the union
                       of balls around features, each as large as the distance to its third nearest neighbour.

Each comes with an error, and what kind of error it is:

    Frechet distance   its standard error, from influence functions (see `metrics.moments`);
    KID                the standard deviation over subsets, as it is published: that of one subset, not of the mean;
    Inception score    the standard deviation over splits, as it is published: of one split, likewise;
    precision, recall  the standard error of a share, with the manifold as it is.

KID and Inception score are torchmetrics', on features given. The Frechet distance is that of `metrics.moments`: the
same number, and right where a covariance is singular (fewer samples than features), of which torchmetrics takes roots
of eigenvalues of a matrix that is not symmetric.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.features import Features, FeatureSpace, Span, extract
from scoresde.metrics.moments import frechet_distance, frechet_influence, frechet_stderr, moments
from scoresde.metrics.samples import both

NEIGHBOURS = 3
SUBSETS, LARGEST_SUBSET, SPLITS = 100, 1000, 10
ALONE = {"sync_on_compute": False}  # every process has all features: torchmetrics would put those of all together


@dataclass(frozen=True)
class Figure:
    """A figure of samples: its name, its value, its error (None where there is none), and what that error is."""

    metric: str
    value: float
    error: float | None
    kind: str


def frechet(x: Tensor, y: Tensor | FeatureStatistics) -> Figure:
    """The Frechet distance between features (N, D) and (M, D), or statistics, which then count as exact.

    Raises:
        ValueError: features of shapes that do not fit, or fewer than two.
    """
    if isinstance(y, FeatureStatistics):
        given = y.mean.to(x.device), y.covariance.to(x.device)
        value = frechet_distance(*moments(x), *given)
        error = (frechet_influence(x, *given).var() / len(x)).sqrt()
        return Figure("frechet_distance", float(value), float(error), "standard error, the statistics as they are")
    value = frechet_distance(*moments(both(x, y)[0]), *moments(y))
    return Figure("frechet_distance", float(value), float(frechet_stderr(x, y)), "standard error")


def kernel_distance(
    x: Tensor, y: Tensor, subsets: int = SUBSETS, subset_size: int | None = None, seed: int = 0
) -> Figure:
    """KID: the mean over random subsets of the unbiased MMD^2 of the kernel (f g / D + 1)^3, by torchmetrics.

    Args:
        x, y: features (N, D) and (M, D).
        subsets: their number.
        subset_size: of each; 1,000, as published, or half of the features where these are fewer than 2,000.
        seed: of the subsets.

    Raises:
        ValueError: features of shapes that do not fit, fewer than four, or subsets larger than they are.
    """
    x, y = both(x, y)
    fewest = min(len(x), len(y))
    size = min(LARGEST_SUBSET, fewest // 2) if subset_size is None else subset_size
    if not 2 <= size <= fewest or subsets < 1:
        raise ValueError(
            f"one subset or more, of 2 to {fewest} features, expected; got {subsets} of {size} ({len(x)} and {len(y)} "
            "features, four or more needed)"
        )
    from torchmetrics.image.kid import KernelInceptionDistance  # here, for its import takes as long as torch's

    with _torchmetrics(seed):
        metric = KernelInceptionDistance(nn.Identity(), subsets, size, **ALONE)
        metric.update(x, real=False)
        metric.update(y, real=True)
        value, spread = map(float, metric.compute())
    return Figure("kid", value, spread, f"standard deviation over {subsets} subsets of {size}")


def inception_score(logits: Tensor, splits: int = SPLITS, seed: int = 0) -> Figure:
    """exp of the mean divergence of p(c|x) from its mean, a mean over splits of the samples, by torchmetrics.

    Args:
        logits: log-probabilities of classes, up to a constant, (N, K).
        splits: number of parts, each with a score of its own.
        seed: of the order in which the samples are split.

    Raises:
        ValueError: no matrix, or fewer samples than two for each split.
    """
    if logits.ndim != 2 or splits < 1 or len(logits) < 2 * splits:
        raise ValueError(
            f"logits (N, K) of two samples or more for each of {splits} splits expected; got {tuple(logits.shape)}"
        )
    from torchmetrics.image.inception import InceptionScore  # see kernel_distance

    with _torchmetrics(seed):
        metric = InceptionScore(nn.Identity(), splits=splits, **ALONE)
        metric.update(logits.double())
        value, spread = map(float, metric.compute())
    error = None if math.isnan(spread) else spread
    return Figure("inception_score", value, error, f"standard deviation over {splits} splits")


def precision_recall(x: Tensor, y: Tensor, neighbours: int = NEIGHBOURS, chunk: int = 1024) -> tuple[Figure, Figure]:
    """Improved precision and recall (1904.06991, eq. 1 and 2): which features lie in the other set's manifold.

    The manifold of a set is the union of balls around its features, whose radius is the distance to the k-th nearest
    other one of the set, the rim included. Distances are exact for whole numbers, and in float64 otherwise.

    Args:
        x, y: features (N, D) of samples and (M, D) of data.
        neighbours: k.
        chunk: rows of distances at a time: 8 chunk max(N, M) bytes.

    Raises:
        ValueError: features of shapes that do not fit, or not more than k of them.
    """
    x, y = both(x, y)
    if not 1 <= neighbours < min(len(x), len(y)):
        raise ValueError(
            f"1 neighbour or more, and more features than that, expected; got k={neighbours} of {len(x)} and {len(y)}"
        )
    kind = "standard error of a share"
    shares = [_share_within(a, b, neighbours, chunk) for a, b in ((x, y), (y, x))]
    names = ("precision", "recall")
    precision, recall = (
        Figure(name, p, math.sqrt(p * (1 - p) / len(part)), kind)
        for name, p, part in zip(names, shares, (x, y), strict=True)
    )
    return precision, recall


def _share_within(points: Tensor, manifold: Tensor, neighbours: int, chunk: int) -> float:
    """The share of points that lie in a ball of the manifold."""
    radii = torch.cat([part.kthvalue(neighbours, dim=1).values for part in _to_others(manifold, chunk)])
    inside = [(part <= radii).any(dim=1) for part in _squares(points, manifold, chunk)]
    return float(torch.cat(inside).double().mean())


def _squares(x: Tensor, y: Tensor, chunk: int) -> Iterator[Tensor]:
    """Squared distances of some rows of x from all of y, (chunk, M): by products, exact for whole numbers."""
    lengths = y.square().sum(dim=1)
    for part in x.split(chunk):
        yield (part.square().sum(dim=1, keepdim=True) + lengths - 2 * part @ y.mT).clamp(min=0)


def _to_others(x: Tensor, chunk: int) -> Iterator[Tensor]:
    """The same within a set, infinite from each row to itself."""
    for i, part in enumerate(_squares(x, x, chunk)):
        rows = torch.arange(len(part), device=x.device)
        part[rows, rows + i * chunk] = math.inf
        yield part


@contextmanager
def _torchmetrics(seed: int) -> Iterator[None]:
    """Within the block torch's global generator, which torchmetrics draws from, starts from a seed; then as it was."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer.*")
        warnings.filterwarnings("ignore", message=".*degrees of freedom is <= 0.*")  # of one split
        torch.manual_seed(seed)
        yield


# --- all of them

METRICS = ("frechet_distance", "kid", "inception_score", "precision", "recall")


def missing(x: Features, y: Features | FeatureStatistics) -> dict[str, str]:
    """The metrics that these features cannot give, and why."""
    found: dict[str, str] = {}
    if isinstance(y, FeatureStatistics) and y.features is None:
        found |= dict.fromkeys(("kid", "precision", "recall"), "the reference has moments alone, no features")
    if x.logits is None:
        found["inception_score"] = "this feature space knows no classes"
    return found


def measure(
    x: Features,
    y: Features | FeatureStatistics,
    metrics: Sequence[str] = METRICS,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Figure]:
    """The figures of the features of samples against those of data, or against statistics: those that there are.

    Args:
        x, y: features of samples and of data; of statistics with their features, the features are taken.
        metrics: names among `METRICS`.
        seed: of subsets and splits.
        device: to compute on.

    Raises:
        ValueError: an unknown metric, features of shapes that do not fit, or too few of them.
    """
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"metrics among {', '.join(METRICS)} expected; got {unknown[0]!r}")
    data = y.features or y if isinstance(y, FeatureStatistics) else y
    device = "cpu" if torch.device(device).type == "mps" else device  # which has no float64
    x, data = x.to(device), data.to(device) if isinstance(data, Features) else data
    wanted = set(metrics)
    found: list[Figure] = []
    if "frechet_distance" in wanted:
        found.append(frechet(x.values, data.values if isinstance(data, Features) else data))
    if isinstance(data, Features) and "kid" in wanted:
        found.append(kernel_distance(x.values, data.values, seed=seed))
    if x.logits is not None and "inception_score" in wanted:
        found.append(inception_score(x.logits, max(1, min(SPLITS, len(x) // 2)), seed))
    if isinstance(data, Features) and wanted & {"precision", "recall"}:
        found += precision_recall(x.values, data.values)
    return {figure.metric: figure for figure in found if figure.metric in wanted}


def measure_images(
    x: Tensor,
    y: Tensor,
    space: FeatureSpace,
    span: Span,
    metrics: Sequence[str] = METRICS,
    batch_size: int = 256,
    seed: int = 0,
) -> dict[str, Figure]:
    """The figures of images (N, C, H, W) against images (M, C, H, W), in a feature space.

    Args:
        x, y: images, and the span of their values; see `metrics.features`.
        space: what they are compared in.
        metrics: names among `METRICS`.
        batch_size: of the extraction.
        seed: of subsets and splits.
    """
    samples, data = (extract(space, images, span, batch_size) for images in (x, y))
    return measure(samples, data, metrics, seed)
