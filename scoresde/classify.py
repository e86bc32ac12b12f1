r"""Classification with a conditional model: p(y | x) by Bayes' rule, from the likelihoods of the classes.

    log p(y_k | x) = log p(x | y_k) + log pi_k - log sum_j p(x | y_j) pi_j            pi: the prior of the classes

Two estimates of log p(x | y_k):

| method  | log p(x | y_k)                                             | source                                  |
| ------- | ---------------------------------------------------------- | --------------------------------------- |
| "flow"  | of the probability flow of each class, `likelihood`        | 2011.13456, section 4.3                 |
| "bound" | minus the evidence bound of the reverse SDE, `bounds`      | Diffusion Classifier, 2303.16203        |

Common random numbers. All classes have the same dequantisations and probes ("flow"), or the same times and noise
("bound"), so that most of the noise of log p(x | y_k) cancels in the differences between classes. The covariance C of
the K log-likelihoods is measured from quantities that are paired in this way. With posterior p, the variance of
log p(y_k | x) is that of its linearisation (delta method),

    C_kk - 2 (C p)_k + p^T C p.

Early elimination ("bound"). The draws are made in rounds, each as large as all before it. After a round, a class is
dropped if it lies below the best class by more than c standard errors of their paired difference: c is the quantile of
Student's t that has the tail probability of `confidence` standard deviations of a normal variable. The degrees of
freedom are those of the standard error, about (sum of v)^2 / (sum of v^2) for the measured variances v of the strata
(Satterthwaite 1946). The estimate of a dropped class is log p(x | y_best) of all rounds plus the difference of the two
in their common rounds. A sample is finished when one class is left.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from scoresde import bounds
from scoresde.counting import counting
from scoresde.dequantization import DataMap, Dequantization, levels_map
from scoresde.divergence import ExactTrace, Hutchinson, Trace
from scoresde.likelihood import log_prob, trace_for
from scoresde.losses import TimeDensity
from scoresde.probability_flow import DEFAULT_SOLVER
from scoresde.progress import progress_bar
from scoresde.protocols import Model, Transform
from scoresde.random_stream import RandomStream
from scoresde.score import BaseModel, device_of
from scoresde.solvers import Solver
from scoresde.tensors import check_integer, check_number, check_real, dimensions, float64, listed, send
from scoresde.wrappers import for_inference, with_density

METHODS = ("flow", "bound")
EXACT_DIMENSIONS = 32  # up to which the default trace is exact
PROBES = 4  # of the default trace above


@dataclass
class Classification:
    """log p(y | x) of B samples and K classes.

    log_posterior: log p(y_k | x), nats (B, K), float64; NaN for a sample whose solver failed. stderr: its standard
    errors (B, K), see the module docstring; zero for an exact trace, None for one probe. log_likelihood: log p(x | y_k)
    in nats, or minus its evidence bound, (B, K), with log_likelihood_stderr. covariance: that of the errors of
    log_likelihood, nats^2 (B, K, K), or None. prior: pi, (K,). draws: for "flow" dequantisations, for "bound" draws of
    a time that each class got, int64 (B, K). nfe, backward: network evaluations, and products with Jacobians of the
    network, of all classes together, int64 (B,). conventions: the choices that affect the values.
    """

    log_posterior: Tensor
    stderr: Tensor | None
    log_likelihood: Tensor
    log_likelihood_stderr: Tensor | None
    covariance: Tensor | None
    prior: Tensor
    draws: Tensor
    nfe: Tensor
    backward: Tensor
    conventions: dict[str, str]

    @property
    def label(self) -> Tensor:
        """The number of the most probable class, int64 (B,)."""
        return self.log_posterior.argmax(dim=1)

    def calibrated(self, temperature: float) -> "Classification":
        """Return this classification with p(y | x)^(1/T), normalised, in place of p(y | x) (1706.04599, section 4.2).

        `metrics.fit_temperature` fits T on held-out samples with labels.

        Raises:
            ValueError: the temperature is not positive and finite.
        """
        temperature = check_number("temperature", temperature, low=0.0)
        log_posterior, stderr = _posterior(self.log_posterior / temperature, self.covariance, temperature)
        conventions = {**self.conventions, "temperature": f"{temperature:.6g}"}
        return replace(self, log_posterior=log_posterior, stderr=stderr, conventions=conventions)


@dataclass
class _Evidence:
    """log p(x | y_k) of some samples: value (B, K), covariance (B, K, K) or None, draws (B, K), nfe, backward (B,)."""

    value: Tensor
    covariance: Tensor | None
    draws: Tensor
    nfe: Tensor
    backward: Tensor


def classify(
    model: Model,
    x: Tensor,
    conds: Any,
    method: str = "flow",
    prior: Tensor | Sequence[float] | None = None,
    transform: Transform | DataMap | None = None,
    dequantization: Dequantization | None = None,
    samples: int = 1,
    trace: Trace | None = None,
    solver: Solver | None = None,
    draws: int = 128,
    rounds: int = 4,
    confidence: float = 4.0,
    times: TimeDensity | None = None,
    seeds: Sequence[int] | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> Classification:
    """Return log p(y_k | x) for K classes (module docstring).

    Args:
        model: the conditional model, in eval mode.
        x: states (B, *) in model space; with a transform, data in data units.
        conds: K conditions of `model.given`, one for each class: numbers, tensors or dicts; or a tensor of K labels.
        method: "flow" or "bound".
        prior: the prior probabilities of the classes, (K,), normalised here; default: equal.
        transform: map from grey levels to model space; or a `DataMap`, with or without a dequantisation.
        dequantization: default `Uniform()` where `transform` is not a DataMap.
        samples: for "flow", the number S of dequantisations, averaged in probability (1509.00519). With S > 1 the
            standard errors are those of this average; with S = 1, those of the trace, for the values drawn.
        trace: for "flow"; its probes are kept along the path and are the same for all classes. Default:
            `ExactTrace()` up to 32 dimensions, and `Hutchinson(probes=4)` above. A single probe has no standard error.
        solver: for "flow", see `log_prob`.
        draws: for "bound", times drawn for each class that is not dropped, a multiple of 2^rounds. As many network
            evaluations, and at least an eighth of them for the decoder (`bounds.continuous_nats`).
        rounds: for "bound", the number of rounds; 1 drops no class.
        confidence: for "bound", the significance of a difference from the best class at which a class is dropped, in
            standard deviations of a normal variable.
        times: for "bound", the density of times, see `bounds.continuous_nats`.
        seeds: one per sample, shared by its classes; default 0, 1, 2, ... Sample i has the same value in any batch.
        batch_size: number of samples at a time.
        progress: show a progress bar.

    Warns:
        UserWarning: the likelihood is the same for all classes.
        PriorMismatch: see `log_prob`.

    Raises:
        ValueError: fewer than two conditions, an unknown method, a prior that is not K positive numbers, draws that
            cannot be divided into rounds, samples > 1 without a dequantisation, a number of seeds other than B; and
            see `log_prob` and `bounds.continuous_nats`.
        TypeError: conds is not a sequence, or the model takes no condition.
    """
    check_real("x", x)
    if method not in METHODS:
        raise ValueError(f"method must be 'flow' or 'bound'; got {method!r}")
    check_integer("batch_size", batch_size, 1)
    check_integer("samples", samples, 1)
    of_class = with_density if method == "flow" else for_inference
    models = [of_class(model, cond) for cond in _conditions(conds)]
    log_prior, count = _log_prior(prior, len(models)), len(x)
    data_map = transform if _is_continuous(transform) else levels_map(transform, dequantization) if transform else None
    if samples > 1 and (data_map is None or data_map.dequantization is None or method == "bound"):
        raise ValueError(f"samples > 1 needs method='flow' and data that are dequantised; got samples={samples}")
    seeds = range(count) if seeds is None else seeds
    if len(seeds) != count:
        raise ValueError(f"expected one seed per sample, {count} in all; got {len(seeds)}")
    sizes, confidence = round_sizes(draws, rounds), check_number("confidence", confidence, low=0.0)
    trace, solver = trace_for(solver, trace or default_trace(dimensions(x))).kept(), solver or DEFAULT_SOLVER
    device, parts = device_of(model) or x.device, []
    for first in progress_bar(range(0, max(count, 1), batch_size), title=method, unit="batch", shown=progress):
        part = slice(first, first + batch_size)
        batch, chosen = send(x[part], device), [model.rows(part, count) for model in models]
        if method == "flow":
            parts.append(_flow(chosen, batch, data_map, samples, trace, solver, seeds[part]))
        else:
            parts.append(_bound(chosen, batch, data_map, log_prior, sizes, confidence, times, seeds[part]))
    declared = {"quantity": "log p(y | x), nats, by Bayes' rule", "prior": listed(log_prior.exp()), "method": method}
    if method == "flow":
        declared |= {"density": f"probability flow of {models[0].density} given each class", "trace": str(trace)}
        declared["solver"] = str(solver)
    else:
        declared |= {
            "density": "evidence bound of the reverse SDE given each class, in place of log p(x | y)",
            "draws": f"{draws} times a class in rounds of {listed(sizes)}; dropped at a significance of {confidence:g}",
        }
    if data_map is not None:
        often = "one for each draw" if method == "bound" else f"{samples} per sample"
        declared["transform"] = str(data_map)
        if data_map.dequantization is not None:
            declared["dequantization"] = f"{data_map.dequantization}, {often}, the same for all classes"
    return _classification(parts, log_prior, declared, count > 0)


# --- the arguments


def default_trace(size: int) -> Trace:
    """Return the default trace for states of `size` dimensions."""
    return ExactTrace() if size <= EXACT_DIMENSIONS else Hutchinson(PROBES, resample=False)


def round_sizes(draws: int, rounds: int) -> list[int]:
    """Return the draws of each round, n, n, 2 n, 4 n, ..., which add up to `draws`.

    Raises:
        ValueError: draws is not a multiple of 2^rounds: the draws of a round come in pairs.
    """
    check_integer("draws", draws, 2)
    check_integer("rounds", rounds, 1)
    if draws % 2**rounds:
        raise ValueError(f"draws must be a multiple of 2^rounds = {2**rounds}, for rounds of even size; got {draws}")
    totals = [0, *(draws >> (rounds - 1 - i) for i in range(rounds))]
    return [last - first for first, last in pairwise(totals)]


def _conditions(conds: Any) -> list[Any]:
    if isinstance(conds, (dict, str)) or not hasattr(conds, "__len__") or getattr(conds, "ndim", 1) == 0:
        raise TypeError(
            f"conds must be a sequence of conditions, one for each class; got {type(conds).__name__}: for the labels 0 "
            "to 9 of ten classes, pass range(10)"
        )
    if len(conds) < 2:
        raise ValueError(f"conds must hold the conditions of at least two classes; got {len(conds)}")
    return list(conds)


def _log_prior(prior: Tensor | Sequence[float] | None, count: int) -> Tensor:
    """Return the logarithms of the normalised prior, float64 (K,), on the CPU."""
    prior = float64(torch.ones(count) if prior is None else prior).cpu()
    if prior.shape != (count,) or not bool(((prior > 0) & prior.isfinite()).all()):
        raise ValueError(f"prior must be {count} positive numbers, one for each class; got {listed(prior.flatten())}")
    return prior.log().log_softmax(0)


def _is_continuous(transform: Any) -> bool:
    return isinstance(transform, DataMap) and transform.dequantization is None


# --- the likelihoods of the classes


def _flow(
    models: Sequence[BaseModel],
    x: Tensor,
    data_map: DataMap | None,
    samples: int,
    trace: Trace,
    solver: Solver,
    seeds: Sequence[int],
) -> _Evidence:
    """Return log p(x | y_k) of the probability flows of the classes, with the same draws for all of them."""
    stream, sde, columns = RandomStream(seeds=seeds), models[0].sde, []
    start, nfe, backward = None, torch.zeros(len(x), dtype=torch.int64), torch.zeros(len(x), dtype=torch.int64)
    for _ in range(samples):
        state, nats = x, torch.zeros(len(x), dtype=torch.float64)
        if data_map is not None:
            (state, nats), start = data_map.draw(x, stream, sde), data_map.start(sde)
        probes = stream.seeds(len(x))
        results = [log_prob(model, state, None, trace, solver, probes, start) for model in models]
        columns.append(torch.stack([nats[:, None].cpu() + result.per_probe.cpu() for result in results], dim=2))
        nfe += sum(result.nfe.cpu() for result in results)
        backward += sum(result.backward.cpu() for result in results)
    per_probe = torch.stack(columns)  # (S, B, m, K)
    values, probes_count = per_probe.mean(dim=2), per_probe.shape[2]
    value = values.logsumexp(dim=0) - math.log(samples)
    if samples > 1:  # d log mean_s p_s = mean_s of p_s / mean - 1
        shares = ((values - value).exp() - 1) / math.sqrt(samples * (samples - 1))
        covariance = torch.einsum("sbk,sbj->bkj", shares, shares)
    elif probes_count > 1:
        centred = (per_probe[0] - values[0][:, None]) / math.sqrt(probes_count * (probes_count - 1))
        covariance = torch.einsum("bmk,bmj->bkj", centred, centred)
    else:
        covariance = None if results[0].stderr is None else torch.zeros(*value.shape, len(models), dtype=value.dtype)
    return _Evidence(value, covariance, torch.full(value.shape, samples), nfe, backward)


def _bound(
    models: Sequence[BaseModel],
    x: Tensor,
    data_map: DataMap | None,
    log_prior: Tensor,
    sizes: Sequence[int],
    confidence: float,
    times: TimeDensity | None,
    seeds: Sequence[int],
) -> _Evidence:
    """Return minus the evidence bounds of the classes, in rounds with early elimination."""
    count, stream = len(x), RandomStream(seeds=seeds)
    alive = torch.ones(count, len(models), dtype=torch.bool)
    last, cost, terms = torch.full(alive.shape, -1), torch.zeros(2, count, dtype=torch.int64), []
    for number, size in enumerate(sizes):
        keys = stream.seeds(count)
        last[alive] = number
        columns: list[Tensor | None] = [None] * len(models)
        for k in alive.any(dim=0).nonzero().flatten().tolist():
            rows = alive[:, k].nonzero().flatten()
            part, own = models[k].rows(rows, count), [keys[i] for i in rows.tolist()]
            with torch.no_grad(), counting() as evaluations:
                estimates = bounds.continuous_nats(
                    part, x[rows.to(x.device)], draws=size, times=times, seeds=own, data_map=data_map
                ).estimates
            drawn = -torch.cat([float64(values).cpu() / len(values) for values in estimates or ()])
            columns[k] = torch.zeros(len(drawn), count, dtype=torch.float64).index_copy(1, rows, drawn)
            cost[:, rows] += torch.tensor([[evaluations.forward], [evaluations.backward]])
        blank = next(torch.zeros_like(column) for column in columns if column is not None)
        terms.append(torch.stack([blank if column is None else column for column in columns], dim=2))
        estimate = _Paired(terms, sizes, last, log_prior)
        alive &= ~estimate.is_below(confidence)
        alive &= (alive.sum(dim=1) > 1)[:, None]
        if not bool(alive.any()):
            break
    totals = torch.tensor(sizes).cumsum(0)
    return _Evidence(estimate.linear.sum(dim=0), estimate.covariance(), totals[last], *cost)


class _Paired:
    """The estimates of the classes after some rounds, as sums of independent terms.

    linear: terms (n, B, K) whose sum is the estimate. Consecutive pairs share a stratum, so that the covariance of sums
    of terms is the sum over pairs of products of their differences. best: the number of the best class, (B,).

    Args:
        terms: of each round, the terms (n, B, K) whose sum is its estimate; zero for classes that have none.
        sizes: the draws of each round, the weights of the rounds.
        last: the last round of each class, (B, K).
        log_prior: added to the estimates to find the best class.
    """

    def __init__(self, terms: Sequence[Tensor], sizes: Sequence[int], last: Tensor, log_prior: Tensor):
        self.log_prior, totals = log_prior, torch.tensor(sizes).cumsum(0)
        shares = [torch.where(last >= r, sizes[r] / totals[last].double(), 0.0) for r in range(len(terms))]
        value = torch.stack([share * part.sum(dim=0) for share, part in zip(shares, terms, strict=True)]).sum(dim=0)
        is_full = last == last.max(dim=1, keepdim=True).values
        self.best = torch.where(is_full, value + log_prior, -math.inf).argmax(dim=1)
        self.linear = torch.cat(
            [
                share * part + (self._of_best(share) - share) * self._of_best(part)
                for share, part in zip(shares, terms, strict=True)
            ]
        )

    def _of_best(self, values: Tensor) -> Tensor:
        """Select the best class of values (..., B, K), as (..., B, 1)."""
        index = self.best[:, None].expand(*values.shape[:-1], 1)
        return values.gather(-1, index)

    def is_below(self, confidence: float) -> Tensor:
        """Return which classes (B, K) lie significantly below the best one, see the module docstring."""
        value = self.linear.sum(dim=0) + self.log_prior
        terms = self._of_best(self.linear) - self.linear
        variances = (terms[0::2] - terms[1::2]).square()
        total = variances.sum(dim=0)
        # A squared normal variable has the fourth moment 3, so that n equal pairs have n degrees of freedom.
        freedom = 3 * total.square() / variances.square().sum(dim=0).clamp(min=torch.finfo(total.dtype).tiny) - 2
        multiple = torch.from_numpy(stats.t.isf(stats.norm.sf(confidence), freedom.clamp(min=1).numpy()))
        return self._of_best(value) - value > multiple * total.sqrt()

    def covariance(self) -> Tensor:
        """Return the covariance of the errors of the estimates, (B, K, K)."""
        pairs = self.linear[0::2] - self.linear[1::2]
        return torch.einsum("pbk,pbj->bkj", pairs, pairs)


# --- Bayes' rule


def _classification(
    parts: Sequence[_Evidence], log_prior: Tensor, conventions: dict[str, str], has_samples: bool
) -> Classification:
    """Join the batches and apply Bayes' rule."""
    value = torch.cat([part.value for part in parts])
    blocks = [part.covariance for part in parts if part.covariance is not None]
    covariance = torch.cat(blocks) if blocks else None
    draws, nfe, backward = (torch.cat([getattr(p, name) for p in parts]) for name in ("draws", "nfe", "backward"))
    if has_samples and bool((value == value[:, :1]).all()):
        warnings.warn(
            "the likelihood is the same for all classes: the network does not use the condition, or is not trained",
            stacklevel=3,
        )
    log_posterior, stderr = _posterior(value + log_prior, covariance)
    spread = None if covariance is None else covariance.diagonal(dim1=1, dim2=2).sqrt()
    prior = log_prior.exp()
    return Classification(log_posterior, stderr, value, spread, covariance, prior, draws, nfe, backward, conventions)


def _posterior(log_joint: Tensor, covariance: Tensor | None, temperature: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Return log p(y | x) and its standard errors, (B, K), see the module docstring.

    Args:
        log_joint: log p(y, x) up to a constant for each sample, divided by the temperature, (B, K).
        covariance: the covariance of the log-likelihoods, (B, K, K), not divided by anything.
        temperature: T of `Classification.calibrated`.
    """
    log_posterior = log_joint.log_softmax(dim=1)
    if covariance is None:
        return log_posterior, None
    p = log_posterior.exp()[:, :, None]
    mixed = covariance @ p
    variance = covariance.diagonal(dim1=1, dim2=2) - 2 * mixed.squeeze(2) + (p.mT @ mixed).squeeze(2)
    return log_posterior, variance.clamp(min=0).sqrt() / temperature
