r"""Quality of probabilistic classifications: accuracy, proper scores, calibration, and a temperature that improves it.

For log-posteriors log p(k | x_i) (N, K) and labels y_i (N,), with p_i the vector p(. | x_i), the decision
k_i = argmax p_i and the confidence c_i = max p_i:

    accuracy        mean of 1[k_i = y_i]
    log score       mean of -log p(y_i | x_i), nats; lower is better                              (Good 1952)
    Brier score     mean of sum_k (p_ik - 1[k = y_i])^2, from 0 to 2; lower is better             (Brier 1950)
    ECE             sum over bins b of |sum over i in b of (1[k_i = y_i] - c_i)| / N              (1706.04599, eq. 5)

Log score and Brier score are proper: their expectation is least for the true probabilities. The expected calibration
error (ECE) has bins of equal width in the confidence. Because N is finite, the ECE is positive even if p_i are the true
probabilities. `calibration` estimates its mean in this case, the noise floor.
"""

import math
from dataclasses import dataclass

import scipy  # its subpackages are imported where they are first used
import torch
from torch import Tensor

from scoresde.metrics.intervals import Interval, bootstrap, wilson
from scoresde.tensors import check_integer, check_real, float64, mean_and_error

TEMPERATURES = (1e-3, 1e5)  # the range of `fit_temperature`
SIMULATED = 200  # draws of labels for the noise floor
FEWEST = 8  # samples for an interval of the ECE


@dataclass(frozen=True)
class Bin:
    """A bin of the reliability table: low < confidence <= high, for `count` samples.

    confidence: the mean confidence. accuracy: the fraction of correct decisions, with Wilson's interval.
    """

    low: float
    high: float
    count: int
    confidence: float
    accuracy: Interval


@dataclass(frozen=True)
class Calibration:
    """The reliability table (bins without samples are left out) and the expected calibration error.

    ece: the ECE. interval: a confidence interval for its expectation (`metrics.bootstrap`); None for fewer than 8
    samples, or if correctness (1 or 0) minus confidence is the same for all samples. floor, floor_high: the mean and
    the `level` quantile of the ECE for labels drawn from the predicted probabilities; an ECE above floor_high is
    significant.
    """

    bins: list[Bin]
    ece: float
    interval: Interval | None
    floor: float
    floor_high: float
    level: float


def accuracy(log_posterior: Tensor, labels: Tensor, z: float = 1.96) -> Interval:
    """Return the fraction of samples whose most probable class is the label, with Wilson's interval.

    Args:
        log_posterior: log p(k | x), nats (N, K).
        labels: integers (N,) from 0 to K - 1.
        z: see `metrics.wilson`; 1.96 for 95%.
    """
    log_posterior, labels = _checked(log_posterior, labels)
    return wilson(int((log_posterior.argmax(dim=1) == labels).sum()), len(labels), z)


def log_score(log_posterior: Tensor, labels: Tensor) -> tuple[float, float | None]:
    """Return the mean of -log p(y | x) in nats and its standard error (None for one sample).

    The arguments are those of `accuracy`.
    """
    log_posterior, labels = _checked(log_posterior, labels)
    return mean_and_error(-log_posterior.gather(1, labels[:, None]).squeeze(1))


def brier_score(log_posterior: Tensor, labels: Tensor) -> tuple[float, float | None]:
    """Return the mean of sum_k (p_k - 1[k = y])^2 and its standard error (None for one sample).

    The arguments are those of `accuracy`.
    """
    log_posterior, labels = _checked(log_posterior, labels)
    truth = torch.nn.functional.one_hot(labels, log_posterior.shape[1])
    return mean_and_error((log_posterior.exp() - truth).square().sum(dim=1))


def confusion(log_posterior: Tensor, labels: Tensor) -> Tensor:
    """Return the number of samples for each label (row) and most probable class (column), int64 (K, K).

    The arguments are those of `accuracy`.
    """
    log_posterior, labels = _checked(log_posterior, labels)
    classes = log_posterior.shape[1]
    pairs = labels * classes + log_posterior.argmax(dim=1)
    return torch.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def calibration(
    log_posterior: Tensor, labels: Tensor, bins: int = 10, level: float = 0.95, z: float = 1.96, seed: int = 0
) -> Calibration:
    """Return the reliability table and the expected calibration error, with an interval and its noise floor.

    Args:
        log_posterior, labels: see `accuracy`.
        bins: number of bins of equal width in the confidence.
        level: confidence level of the interval of the ECE, and level of the quantile `floor_high`.
        z: for the intervals of the accuracy in each bin, see `metrics.wilson`; 1.96 for 95%.
        seed: seed of the random halves for the interval of the ECE (`metrics.bootstrap`), and of the labels drawn for
            the noise floor.
    """
    log_posterior, labels = _checked(log_posterior, labels)
    check_integer("bins", bins, 1)
    best = log_posterior.max(dim=1)
    confidence, correct = best.values.exp(), (best.indices == labels).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    generator = torch.Generator().manual_seed(seed)

    def ece(rows: Tensor) -> Tensor:
        return _ece(confidence[rows], correct[rows], index[rows], bins)

    table = []
    for b in index.unique().tolist():
        is_in = index == b
        count, right = int(is_in.sum()), int(correct[is_in].sum())
        table.append(Bin(b / bins, (b + 1) / bins, count, float(confidence[is_in].mean()), wilson(right, count, z)))
    gaps = correct - confidence
    varies = float(gaps.max() - gaps.min()) > 1e-9
    interval = None
    if len(labels) >= FEWEST and varies:
        drawn = bootstrap(ece, torch.arange(len(labels)), level=level, generator=generator)
        interval = Interval(drawn.value, max(drawn.low, 0.0), drawn.high)
    uniform = torch.rand(SIMULATED, len(labels), generator=generator, dtype=torch.float64)
    simulated = torch.stack([_ece(confidence, (row < confidence).double(), index, bins) for row in uniform])
    value = float(_ece(confidence, correct, index, bins))
    return Calibration(table, value, interval, float(simulated.mean()), float(simulated.quantile(level)), level)


def _ece(confidence: Tensor, correct: Tensor, index: Tensor, bins: int) -> Tensor:
    """Return the ECE, a scalar, of N samples; `index` (N,) is the bin of each sample."""
    gaps = torch.zeros(bins, dtype=torch.float64).index_add(0, index, correct - confidence)
    return gaps.abs().sum() / len(index)


def fit_temperature(log_posterior: Tensor, labels: Tensor) -> float:
    """Return the temperature T > 0 for which softmax(log p / T) has the least log score (1706.04599, section 4.2).

    The log score is convex in 1/T. T = 1 leaves the probabilities as they are; T > 1 makes them less certain. If every
    decision is correct the log score falls without end as T falls, and the result is small. Fit T on samples that are
    neither in the training data nor among those that the calibrated classification is reported for.

    Args:
        log_posterior, labels: see `accuracy`; log-posteriors must be finite.
    """
    log_posterior, labels = _checked(log_posterior, labels)
    if not bool(log_posterior.isfinite().all()):
        raise ValueError("log_posterior must be finite to fit a temperature; got infinity: leave out these samples")

    def loss(log_temperature: float) -> float:
        return log_score((log_posterior / math.exp(log_temperature)).log_softmax(dim=1), labels)[0]

    low, high = (math.log(end) for end in TEMPERATURES)
    grid = torch.linspace(low, high, 61, dtype=torch.float64).tolist()  # the least may lie on a long plateau
    best = min(range(len(grid)), key=lambda i: loss(grid[i]))
    ends = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = scipy.optimize.minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-6})
    return math.exp(min((float(found.x), grid[best]), key=loss))


def _checked(log_posterior: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-posteriors in float64 and labels in int64, on the CPU; refuse a wrong shape, value or dtype."""
    check_real("log_posterior", log_posterior)
    check_real("labels", labels)
    log_posterior = float64(log_posterior).detach().cpu()
    is_table = log_posterior.ndim == 2 and log_posterior.shape[1] >= 2
    if not is_table or labels.shape != log_posterior.shape[:1] or not len(labels):
        raise ValueError(
            "log_posterior must be (N, K), with K >= 2 classes, and labels (N,), N >= 1; got "
            f"{tuple(log_posterior.shape)} and {tuple(labels.shape)}"
        )
    if bool(log_posterior.isnan().any()):
        missing = int(log_posterior.isnan().any(dim=1).sum())
        raise ValueError(f"log_posterior must not be NaN; got {missing} of {len(labels)} such samples: leave them out")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers; got {labels.dtype}")
    labels = labels.long().cpu()
    if not bool(((labels >= 0) & (labels < log_posterior.shape[1])).all()):
        raise ValueError(
            f"labels must lie in 0 .. {log_posterior.shape[1] - 1}; got {int(labels.min())} to {int(labels.max())}"
        )
    return log_posterior, labels
