r"""What samples of states are compared with, and the figures of such a comparison.

A reference is a set of states in model space, and beside it what a perfect sampler would have: draws from the same
truth, whose figures are the noise floor (a distance between samples is not zero where the distributions are one).

the oracle     draws of the marginal of a mixture of Gaussians at t_min, whose moments are exact.
a run          a split of its data as the network was trained on it (dequantised, transformed), beside training data.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import default_collate

from scoresde.analytic import GaussianMixture
from scoresde.build import CONFIG, Run, instantiate
from scoresde.dequantization import DataMap
from scoresde.metrics.intervals import Interval, Statistic, bootstrap
from scoresde.metrics.kernels import Discrepancy, gaussian, median_bandwidths
from scoresde.metrics.moments import PrincipalComponents, covariance_error, frechet_distance, mean_error, moments
from scoresde.metrics.samples import flatten
from scoresde.metrics.transport import SlicedWasserstein, directions
from scoresde.random_stream import RandomStream
from scoresde.sdes import SDE
from scoresde.tensors import float64
from scoresde.training.batches import split_condition, step_seed

PROJECTIONS, COMPONENTS = 128, 32
MOST = 5000  # of a run's data that samples are compared with
FEWEST = 4
TRUTHS = ("exact draws", "training data")  # what the other draws of a reference are called

Prepared = tuple[Statistic, tuple[Tensor, Tensor | None]]  # and the x and y to give to it


@dataclass
class Reference:
    """What samples are compared with.

    Args:
        states: (M, *), draws from the truth.
        truth: others (n, *), independent of those: what a perfect sampler would draw.
        name: of the reference. floor: of the other draws, among `TRUTHS`.
        exact: mean (D,) and covariance (D, D) where they are known.
        features: of the Frechet distance; the states themselves if not given.
        metrics: measured where no others are asked for, the first one drawn.
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
        generator = torch.Generator().manual_seed(step_seed(0, 0, "directions"))
        self.directions = directions(self.states[0].numel(), PROJECTIONS, generator)
        self.bandwidths = median_bandwidths(self.states)

    @classmethod
    def of_mixture(cls, mixture: GaussianMixture, sde: SDE, n: int, seed: int = 0) -> "Reference":
        """Two times n draws from the marginal of a mixture at t_min, and the exact moments of that."""
        t = float64(sde.t_min)
        seeds = (step_seed(seed, i, "reference") for i in (0, 1))
        states, truth = (mixture.sample(n, sde, t, torch.Generator().manual_seed(one)) for one in seeds)
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        covariance = alpha**2 * mixture.covariance()
        covariance = covariance + sigma**2 * torch.eye(len(covariance), dtype=covariance.dtype)
        exact = alpha * mixture.mean().flatten(), covariance
        return cls(states, truth, f"{n} exact draws at t_min={sde.t_min:g}", exact=exact)

    @classmethod
    def of_run(cls, run: Run, n: int, split: str = "test", seed: int = 0, trust: Sequence[str] = ()) -> "Reference":
        """A split of a run's data, at most 5,000 of it, beside n of its training data, as its network saw them.

        Images have a Frechet distance, on the first 32 principal components of the training data ("pca-32").

        Raises:
            ValueError: no such split, or one of fewer than four samples.
        """
        states = data_states(run, split, MOST, seed, trust)
        truth = data_states(run, "train", max(n, MOST), seed + len(states), trust)
        features, metrics = None, cls.metrics
        if states.ndim == 4:
            features = PrincipalComponents.of(truth, min(COMPONENTS, truth[0].numel()))
            metrics = ("frechet_distance", "sliced_wasserstein", "mmd")
        kept = truth[spaced(len(truth), n)]
        return cls(states, kept, f"{len(states)} of {split} data", TRUTHS[1], None, features, metrics)


def data_states(run: Run, split: str, most: int, seed: int = 0, trust: Sequence[str] = ()) -> Tensor:
    """A split of a run's data in model space, (N, *): evenly spaced in it, with the dequantisation of the training.

    Raises:
        ValueError: no such split, or fewer than four samples in it.
    """
    x = data_items(run, split, most, trust)
    training = instantiate(run.config.data.get("training"), trust)
    data_map = DataMap(**training) if training else run.data_map
    return float64(data_map.training_states(x.double(), RandomStream(seeds=range(seed, seed + len(x)))))


def data_items(run: Run, split: str, most: int | None = None, trust: Sequence[str] = ()) -> Tensor:
    """A split of a run's data in data units, (N, *): all of it, or so many evenly spaced in it.

    Raises:
        ValueError: no such split, or fewer than four samples in it.
    """
    if (node := run.config.data.get(split)) is None:
        raise ValueError(f"{run.path} names no {split} data: set data.{split} in its {CONFIG}")
    dataset = instantiate(node, trust)
    if len(dataset) < FEWEST:
        raise ValueError(f"{FEWEST} samples or more of {split} data expected; {run.path} has {len(dataset)}")
    rows = spaced(len(dataset), len(dataset) if most is None else most).tolist()
    return split_condition(default_collate([dataset[i] for i in rows]), "cpu")[0]


def spaced(count: int, most: int) -> Tensor:
    """Indices of at most so many, evenly spaced, for datasets come sorted."""
    return torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).round().long()


def mixture_of_three() -> GaussianMixture:
    """The built-in oracle: three Gaussians in space of standard deviations 0.6, 0.25, 0.1, each turned another way."""
    means = torch.tensor([[1.2, 0.0, 0.3], [-0.8, 0.9, -0.4], [-0.3, -1.1, 0.5]], dtype=torch.float64)
    stds = torch.tensor([0.6, 0.25, 0.1], dtype=torch.float64).expand(3, 3)
    axes = torch.tensor([[0.5, 1.0, 0.2], [-0.7, 0.4, 1.1], [1.3, -0.6, 0.8]], dtype=torch.float64)
    turns = torch.linalg.matrix_exp(torch.linalg.cross(axes[:, None], torch.eye(3, dtype=torch.float64)[None]))
    return GaussianMixture(means, stds, torch.tensor([0.5, 0.3, 0.2]), turns)


def describe(mixture: GaussianMixture) -> str:
    """A mixture of Gaussians in words."""
    count, shape = len(mixture.means), tuple(mixture.event_shape)
    weights = ", ".join(f"{w:g}" for w in mixture.log_weights.exp().tolist())
    low, high = float(mixture.stds.min()), float(mixture.stds.max())
    turned = "" if mixture.rotation is None else "rotated "
    return f"{count} {turned}Gaussians over {shape}, weights {weights}, standard deviations {low:g} to {high:g}"


# --- what is measured


def _sliced(x: Tensor, reference: Reference) -> Prepared:
    statistic = SlicedWasserstein(x, reference.states, reference.directions)
    return statistic, statistic.all


def _mmd(x: Tensor, reference: Reference) -> Prepared:
    statistic = Discrepancy(x, reference.states, gaussian(reference.bandwidths))
    return statistic, statistic.all


def _energy(x: Tensor, reference: Reference) -> Prepared:
    statistic = Discrepancy(x, reference.states, torch.neg)
    return statistic, statistic.all


def _mean(x: Tensor, reference: Reference) -> Prepared:
    if (exact := reference.exact) is not None:
        return lambda some: mean_error(some, *exact), (x, None)
    return lambda some, others: mean_error(some, *moments(others)), (x, reference.states)


def _covariance(x: Tensor, reference: Reference) -> Prepared:
    if (exact := reference.exact) is not None:
        return lambda some: covariance_error(some, exact[1]), (x, None)
    return lambda some, others: covariance_error(some, moments(others)[1]), (x, reference.states)


def _frechet(x: Tensor, reference: Reference) -> Prepared:
    features = reference.features or flatten
    return (
        lambda some, others: frechet_distance(*moments(some), *moments(others)),
        (features(x), features(reference.states)),
    )


METRICS: dict[str, Callable[[Tensor, Reference], Prepared]] = {
    "sliced_wasserstein": _sliced,
    "mmd": _mmd,
    "energy_distance": _energy,
    "mean_error": _mean,
    "covariance_error": _covariance,
    "frechet_distance": _frechet,
}


def check_metrics(names: Sequence[str] | None, reference: Reference) -> tuple[str, ...]:
    """The metrics asked for, those of the reference if none are.

    Raises:
        ValueError: an unknown one.
    """
    chosen = tuple(names or reference.metrics)
    if unknown := [name for name in chosen if name not in METRICS]:
        raise ValueError(f"metrics among {', '.join(METRICS)} expected; got {unknown[0]!r}")
    return chosen


def figures(
    x: Tensor,
    reference: Reference,
    metrics: Sequence[str],
    resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> Iterator[tuple[str, str, Interval]]:
    """Each metric of samples x (n, *) in model space: its name, what it is measured on, the figure with its interval.

    Args:
        x: samples.
        reference: what they are compared with.
        metrics: names among `METRICS`.
        resamples, level: of the intervals, see `metrics.bootstrap`.
        seed: of the halves that the intervals are made of.
    """
    for index, metric in enumerate(metrics):
        statistic, samples = METRICS[metric](x, reference)
        halves = torch.Generator().manual_seed(step_seed(seed, index, "halves"))
        found = bootstrap(statistic, *samples, resamples, level, halves)
        features = reference.features if metric == "frechet_distance" else None
        yield metric, str(features or "state"), found
