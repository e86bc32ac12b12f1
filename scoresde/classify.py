r"""Classification with a conditional model: p(y | x) by Bayes' rule, from the likelihoods of the classes.

    log p(y_k | x) = log p(x | y_k) + log pi_k - log sum_j p(x | y_j) pi_j            pi: the prior of the classes

Two estimates of log p(x | y_k):

| method  | estimate of log p(x | y_k)                                   | source                                |
| ------- | ------------------------------------------------------------ | ------------------------------------- |
| "flow"  | log-density of the probability flow given y_k (`likelihood`) | 2011.13456, section 4.3               |
| "bound" | minus the evidence bound of the reverse SDE (`bounds`)       | Diffusion Classifier, 2303.16203      |

Common random numbers. All classes have the same dequantisations and probes ("flow"), or the same times and noise
("bound"), so that most of the noise of log p(x | y_k) cancels in the differences between classes. Because the draws are
shared, they also give an estimate of the covariance C of the errors of the K log-likelihoods. The variance of
log p(y_k | x) then follows by linearisation (the delta method), with p the vector of the K posterior probabilities:

    C_kk - 2 (C p)_k + p^T C p.

"bound" makes its draws in rounds, and after each round drops the classes that are significantly worse than the best one
(`bounds.paired`).
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scoresde.bounds.paired import Evidence, paired_nats, round_sizes
from scoresde.dequantization import DataMap, Dequantization, levels_map
from scoresde.divergence import ExactTrace, Hutchinson, Trace
from scoresde.likelihood import log_prob, trace_for
from scoresde.losses import TimeDensity
from scoresde.probability_flow import DEFAULT_SOLVER
from scoresde.progress import progress_bar
from scoresde.protocols import Model, Transform
from scoresde.random_stream import RandomStream
from scoresde.result_table import Result, cost, counted, mean_of, typical_error
from scoresde.score import BaseModel, device_of
from scoresde.solvers import Solver
from scoresde.tensors import check_integer, check_number, check_real, dimensions, double, float64, listed, send
from scoresde.wrappers import for_inference, with_density

METHODS = ("flow", "bound")
EXACT_DIMENSIONS = 32  # largest number for which the default trace is exact
PROBES = 4  # of the default trace for more dimensions


@dataclass(repr=False)
class Classification(Result):
    """log p(y | x) of B samples and K classes.

    log_posterior: log p(y_k | x), nats (B, K), float64; NaN for a sample whose solver failed.
    stderr: standard errors of log_posterior (B, K), linearised in the errors of log p(x | y_k). For "flow" with
    `samples=1`, they are None with a single probe and zero with an exact trace.
    log_likelihood, log_likelihood_stderr: the estimates of log p(x | y_k), nats (B, K), and their standard errors.
    covariance: the covariance C of the errors of log_likelihood, nats^2 (B, K, K); None if it is unknown.
    prior: the prior probabilities pi, (K,).
    draws: for each class, the number of dequantisations ("flow") or of values of t drawn ("bound"), int64 (B, K).
    nfe, backward: the numbers of network evaluations and of products with Jacobians of the network, summed over the
    classes, int64 (B,).
    conventions: the choices that affect the values.
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

    def heading(self) -> str:
        samples, classes = self.log_posterior.shape
        return f"Classification of {counted(samples, 'sample')} into {counted(classes, 'class', 'classes')}"

    def rows(self) -> dict[str, str]:
        is_known = ~self.log_posterior.isnan().any(dim=1)
        found = self.label[is_known].bincount(minlength=self.log_posterior.shape[1]).tolist()
        return {
            "most probable": ", ".join(f"{count:,} of class {i}" for i, count in enumerate(found) if count) or "none",
            "probability": f"{mean_of(self.log_posterior.max(dim=1).values.exp(), '').rstrip()} of the most probable",
            "error": typical_error(self.stderr, "nats a class", "probes and draws"),
            "failed": f"{int((~is_known).sum()):,}",
            "evaluations": cost(self.nfe, self.backward),
            **self.conventions,
        }

    @property
    def label(self) -> Tensor:
        """The index of the most probable class, int64 (B,)."""
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
    """Return log p(y_k | x) for K classes, by Bayes' rule from the likelihoods log p(x | y_k) of the model.

        log p(y_k | x) = log p(x | y_k) + log prior_k - log sum_j p(x | y_j) prior_j

    Args:
        model: the conditional model, in eval mode.
        x: states (B, *) in model space; with a transform, data in data units.
        conds: K conditions of `model.given`, one for each class: numbers, tensors or dicts; or a tensor of K labels.
        method: "flow" or "bound".
        prior: the prior probabilities of the classes, (K,), normalised here; default: equal.
        transform: map from grey levels to model space; or a `DataMap`, with or without a dequantisation.
        dequantization: default `Uniform()` where `transform` is not a DataMap.
        samples: for "flow", the number S of dequantisations; p(x | y_k) is averaged over them (1509.00519). With S > 1
            the standard errors are those of this average. With S = 1 they contain the error of the trace alone, and not
            that of the random dequantisation.
        trace: for "flow", the trace estimator. Its probes are kept along the path and are the same for all classes.
            Default: `ExactTrace()` up to 32 dimensions, and `Hutchinson(probes=4)` above. With S = 1, a single probe
            gives no standard error.
        solver: for "flow", see `log_prob`.
        draws: for "bound", how many values of t to draw for each class that is not dropped, a multiple of 2^rounds.
            Each draw costs one network evaluation. The decoder (`bounds.continuous_nats`) costs about draws/8 further
            evaluations, and at least two in each round.
        rounds: for "bound", the number of rounds; with one round no class is dropped.
        confidence: for "bound", the significance at which a class is dropped because it is worse than the best one, in
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
            are not a multiple of 2^rounds, samples > 1 without a dequantisation or with "bound", a dequantisation
            without a transform, or a number of seeds other than B; see also `log_prob` and `bounds.continuous_nats`.
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
    data_map = _data_map(transform, dequantization)
    if samples > 1 and (data_map is None or data_map.dequantization is None or method == "bound"):
        raise ValueError(
            f"samples must be 1 for method='bound' and for data without a dequantisation; got {samples}: pass samples=1"
        )
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
            parts.append(paired_nats(chosen, batch, log_prior, sizes, confidence, seeds[part], times, data_map))
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
    """Return the default trace estimator for states with `size` dimensions, see `classify`."""
    return ExactTrace() if size <= EXACT_DIMENSIONS else Hutchinson(PROBES, resample=False)


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


def _data_map(transform: Transform | DataMap | None, dequantization: Dequantization | None) -> DataMap | None:
    if transform is None:
        if dequantization is not None:
            raise ValueError(
                f"transform must be given with dequantization={dequantization}; got None: pass the map from grey "
                "levels to model space"
            )
        return None
    is_continuous = isinstance(transform, DataMap) and transform.dequantization is None and dequantization is None
    return transform if isinstance(transform, DataMap) and is_continuous else levels_map(transform, dequantization)


# --- the likelihoods of the classes


def _flow(
    models: Sequence[BaseModel],
    x: Tensor,
    data_map: DataMap | None,
    samples: int,
    trace: Trace,
    solver: Solver,
    seeds: Sequence[int],
) -> Evidence:
    """Return log p(x | y_k) by the probability flow, with the same dequantisations and probes for all classes k."""
    stream, sde, columns = RandomStream(seeds=seeds), models[0].sde, []
    start, nfe, backward = None, torch.zeros(len(x), dtype=torch.int64), torch.zeros(len(x), dtype=torch.int64)
    for _ in range(samples):
        state, nats = x, torch.zeros(len(x), dtype=torch.float64)
        if data_map is not None:
            (state, nats), start = data_map.draw(x.to(double(x)), stream, sde), data_map.start(sde)
        probes = stream.seeds(len(x))
        results = [log_prob(model, state, None, trace, solver, probes, start) for model in models]
        columns.append(torch.stack([nats[:, None].cpu() + result.per_probe.cpu() for result in results], dim=2))
        nfe += sum(result.nfe.cpu() for result in results)
        backward += sum(result.backward.cpu() for result in results)
    per_probe = torch.stack(columns)  # (S, B, m, K)
    values, probes_count = per_probe.mean(dim=2), per_probe.shape[2]
    value = values.logsumexp(dim=0) - math.log(samples)
    covariance: Tensor | None = None
    if samples > 1:  # d log mean_s p_s = mean_s of p_s / mean - 1
        shares = ((values - value).exp() - 1) / math.sqrt(samples * (samples - 1))
        covariance = torch.einsum("sbk,sbj->bkj", shares, shares)
    elif probes_count > 1:
        centred = (per_probe[0] - values[0][:, None]) / math.sqrt(probes_count * (probes_count - 1))
        covariance = torch.einsum("bmk,bmj->bkj", centred, centred)
    elif results[0].stderr is not None:  # exact
        covariance = torch.zeros(*value.shape, len(models), dtype=value.dtype)
    return Evidence(value, covariance, torch.full(value.shape, samples), nfe, backward)


# --- Bayes' rule


def _classification(
    parts: Sequence[Evidence], log_prior: Tensor, conventions: dict[str, str], has_samples: bool
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
        log_joint: (log p(y_k, x) + c) / temperature, (B, K), where the constant c may differ between samples.
        covariance: the covariance C of the errors of the log-likelihoods, (B, K, K), at temperature 1.
        temperature: T of `Classification.calibrated`.
    """
    log_posterior = log_joint.log_softmax(dim=1)
    if covariance is None:
        return log_posterior, None
    p = log_posterior.exp()[:, :, None]
    mixed = covariance @ p
    variance = covariance.diagonal(dim1=1, dim2=2) - 2 * mixed.squeeze(2) + (p.mT @ mixed).squeeze(2)
    return log_posterior, variance.clamp(min=0).sqrt() / temperature
