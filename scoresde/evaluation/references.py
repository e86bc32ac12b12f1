r"""Reference sets that generated samples are compared with, and the metrics of the comparison.

A reference is a set of states in model space, together with the noise floor: further draws from the same distribution,
whose metrics are those of a perfect sampler (a distance between finite samples is not zero for equal distributions).

oracle     the reference and the noise floor are draws from the marginal of a Gaussian mixture at t_min, whose moments
           are known exactly.
run        the reference is a split of the run's data as the network saw data in training (dequantised, transformed);
           the noise floor is training data.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import default_collate

from scoresde.analytic import GaussianMixture
from scoresde.build import Run
from scoresde.dequantization import DataMap
from scoresde.instantiation import instantiate
from scoresde.metrics.frechet import frechet_distance
from scoresde.metrics.image_quality import check_names
from scoresde.metrics.intervals import FEWEST, Interval, Statistic, bootstrap
from scoresde.metrics.kernels import Discrepancy, gaussian, median_bandwidths
from scoresde.metrics.moments import PrincipalComponents, covariance_error, mean_error, moments
from scoresde.metrics.samples import flatten, refuse_nonfinite
from scoresde.metrics.transport import SlicedWasserstein, directions
from scoresde.random_stream import RandomStream
from scoresde.run_config import CONFIG
from scoresde.sdes import SDE
from scoresde.tensors import float64
from scoresde.training.batches import split_condition, step_seed

PROJECTIONS, COMPONENTS = 128, 32
MOST = 5000  # samples of a split that are used as a reference
TRUTHS = ("exact draws", "training data")  # names of noise floors

Prepared = tuple[Statistic, tuple[Tensor, Tensor | None]]  # a statistic, and its arguments x and y


@dataclass
class Reference:
    """States that samples are compared with.

    Args:
        states: draws (M, *) from the true distribution.
        truth: independent further draws (n, *), whose metrics are the noise floor.
        name: description of the reference.
        floor: name of the noise floor, among `TRUTHS`.
        exact: exact mean (D,) and covariance (D, D) of the true distribution, if known.
        features: map to the features that the Frechet distance compares; the states themselves by default.
        metrics: names of the metrics that are measured by default; plots show the first.
    """

    states: Tensor
    truth: Tensor
    name: str
    floor: str = TRUTHS[0]
    exact: tuple[Tensor, Tensor] | None = None
    features: PrincipalComponents | None = None
    metrics: tuple[str, ...] = ("sliced_wasserstein", "mean_error", "covariance_error")
    directions: Tensor = field(init=False)
    bandwidths: list[float] = field(init=False)

    def __post_init__(self):
        refuse_nonfinite(self.states, "the states of the reference")
        refuse_nonfinite(self.truth, f"the noise floor ({self.floor})")
        generator = torch.Generator().manual_seed(step_seed(0, 0, "directions"))
        self.directions = directions(self.states[0].numel(), PROJECTIONS, generator)
        self.bandwidths = median_bandwidths(self.states)

    @classmethod
    def of_mixture(cls, mixture: GaussianMixture, sde: SDE, n: int, seed: int = 0) -> "Reference":
        """Draw n states and n more for the noise floor from the marginal of a mixture at t_min; add exact moments."""
        t = float64(sde.t_min)
        seeds = (step_seed(seed, i, "reference") for i in (0, 1))
        states, truth = (mixture.sample(n, sde, t, torch.Generator().manual_seed(s)) for s in seeds)
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        covariance = alpha**2 * mixture.covariance()
        covariance = covariance + sigma**2 * torch.eye(len(covariance), dtype=covariance.dtype)
        exact = alpha * mixture.mean().flatten(), covariance
        return cls(states, truth, f"{n} exact draws at t_min={sde.t_min:g}", exact=exact)

    @classmethod
    def of_run(cls, run: Run, n: int, split: str = "test", seed: int = 0, trust: Sequence[str] = ()) -> "Reference":
        """Take at most 5,000 samples of a split of a run, and n training samples, all as the network saw them.

        The Frechet distance of images uses the first 32 principal components of the training data ("pca-32").

        Raises:
            ValueError: the run has no such split, or the split has fewer than 4 samples.
        """
        states = data_states(run, split, MOST, seed, trust)
        training = data_states(run, "train", max(n, MOST), seed + len(states), trust)
        features, metrics = None, cls.metrics
        if states.ndim == 4:
            features = PrincipalComponents.of(training, min(COMPONENTS, training[0].numel()))
            metrics = ("frechet_distance", "sliced_wasserstein", "mmd")
        truth = training[evenly_spaced(len(training), n)]
        return cls(states, truth, f"{len(states)} of {split} data", TRUTHS[1], None, features, metrics)


def data_states(run: Run, split: str, most: int, seed: int = 0, trust: Sequence[str] = ()) -> Tensor:
    """Return evenly spaced samples of a split in model space, (N, *), dequantised as in training.

    Raises:
        ValueError: the run has no such split, or the split has fewer than 4 samples.
    """
    x = data_items(run, split, most, trust)
    training = instantiate(run.config.data.get("training"), trust)
    data_map = DataMap(**training) if training else run.data_map
    return float64(data_map.training_states(x.double(), RandomStream(seeds=range(seed, seed + len(x)))))


def data_items(run: Run, split: str, most: int | None = None, trust: Sequence[str] = ()) -> Tensor:
    """Return a split in data units, (N, *): all samples, or at most `most` evenly spaced ones.

    Raises:
        ValueError: the run has no such split, or the split has fewer than 4 samples or samples that are not finite.
    """
    if (node := run.config.data.get(split)) is None:
        raise ValueError(f"{run.path} has no {split} data: set data.{split} in its {CONFIG}")
    dataset = instantiate(node, trust)
    if len(dataset) < FEWEST:
        raise ValueError(f"the {split} data of {run.path} must have at least {FEWEST} samples; got {len(dataset)}")
    rows = evenly_spaced(len(dataset), len(dataset) if most is None else most).tolist()
    x = split_condition(default_collate([dataset[i] for i in rows]), "cpu")[0]
    refuse_nonfinite(x, f"the {split} data of {run.path}")
    return x


def evenly_spaced(count: int, most: int) -> Tensor:
    """Return at most `most` indices, evenly spaced in 0 .. count - 1, because datasets are often sorted."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def mixture_of_three() -> GaussianMixture:
    """Return the built-in oracle: three rotated Gaussians in 3 dimensions, of standard deviations 0.6, 0.25 and 0.1."""
    means = torch.tensor([[1.2, 0.0, 0.3], [-0.8, 0.9, -0.4], [-0.3, -1.1, 0.5]], dtype=torch.float64)
    stds = torch.tensor([0.6, 0.25, 0.1], dtype=torch.float64).expand(3, 3)
    axes = torch.tensor([[0.5, 1.0, 0.2], [-0.7, 0.4, 1.1], [1.3, -0.6, 0.8]], dtype=torch.float64)
    rotations = torch.linalg.matrix_exp(torch.linalg.cross(axes[:, None], torch.eye(3, dtype=torch.float64)[None]))
    return GaussianMixture(means, stds, torch.tensor([0.5, 0.3, 0.2]), rotations)


def describe(mixture: GaussianMixture) -> str:
    """Describe a mixture of Gaussians in one line."""
    count, shape = len(mixture.means), tuple(mixture.event_shape)
    weights = ", ".join(f"{w:g}" for w in mixture.log_weights.exp().tolist())
    low, high = float(mixture.stds.min()), float(mixture.stds.max())
    rotated = "" if mixture.rotation is None else "rotated "
    return f"{count} {rotated}Gaussians over {shape}, weights {weights}, standard deviations {low:g} to {high:g}"


# --- metrics


def _indexed(statistic: SlicedWasserstein | Discrepancy) -> Prepared:
    return statistic, statistic.all


def _moment_error(error: Callable[..., Tensor], x: Tensor, reference: Reference) -> Prepared:
    """Return a statistic that compares the moments of samples x with the reference's, and the statistic's arguments.

    The moments of the reference are exact if they are known, and otherwise computed from its states.
    """
    if (exact := reference.exact) is not None:
        return lambda x: error(x, *exact), (x, None)
    return lambda x, states: error(x, *moments(states)), (x, reference.states)


def _frechet(x: Tensor, reference: Reference) -> Prepared:
    features = reference.features or flatten
    return lambda x, y: frechet_distance(*moments(x), *moments(y)), (features(x), features(reference.states))


METRICS: dict[str, Callable[[Tensor, Reference], Prepared]] = {
    "sliced_wasserstein": lambda x, to: _indexed(SlicedWasserstein(x, to.states, to.directions)),
    "mmd": lambda x, to: _indexed(Discrepancy(x, to.states, gaussian(to.bandwidths))),
    "energy_distance": lambda x, to: _indexed(Discrepancy(x, to.states, torch.neg)),
    "mean_error": lambda x, to: _moment_error(mean_error, x, to),
    "covariance_error": lambda x, to: _moment_error(lambda x, _, covariance: covariance_error(x, covariance), x, to),
    "frechet_distance": _frechet,
}


def metric_values(
    x: Tensor,
    reference: Reference,
    metrics: Sequence[str] | None = None,
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Iterator[tuple[str, str, Interval]]:
    """Yield (metric, space, value with its interval) for samples x (n, *) in model space.

    The space is "state", or the name of the features that the metric is computed on.

    Args:
        x: the samples.
        reference: the states that samples are compared with.
        metrics: names among `METRICS`; by default those of the reference.
        resamples, level: number of half-samples and level of the intervals, see `metrics.bootstrap`.
        seed: the seed of the half-samples.

    Raises:
        ValueError: a metric is unknown.
    """
    for index, metric in enumerate(check_names("metric", metrics or reference.metrics, METRICS)):
        statistic, samples = METRICS[metric](x, reference)
        generator = torch.Generator().manual_seed(step_seed(seed, index, "halves"))
        interval = bootstrap(statistic, *samples, resamples, level, generator)
        features = reference.features if metric == "frechet_distance" else None
        yield metric, str(features or "state"), interval
