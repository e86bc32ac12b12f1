"""The code that all evidence bounds share: result classes, random draws and standard errors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.dequantization import DataMap, Incomplete, check_levels
from scoresde.progress import progress_bar
from scoresde.protocols import Model, Transform
from scoresde.random_stream import RandomStream
from scoresde.result_table import Result, counted, mean_of, plus_minus, typical_error
from scoresde.score import BaseModel, device_of
from scoresde.tensors import check_integer, dimensions, mean_and_error, send
from scoresde.wrappers import for_inference


@dataclass(repr=False)
class NatsBound(Result):
    """An upper bound on -log p(x) of each state, in nats.

    terms: "prior", "diffusion" and "reconstruction", and with a dequantisation "change_of_variables", each (B,),
    float64, with gradient; their sum is `value`. estimates: tensors of n draws each, (n, B), whose means over n add up
    to `value`; consecutive pairs of draws share a stratum, see `standard_error`. None if the draws are not in pairs, as
    for a single draw. Bounds of several models with the same seeds have the same times and the same noise, so
    `standard_error` of the differences of their `estimates` gives the standard error of the bounds' difference.
    """

    terms: dict[str, Tensor]
    estimates: tuple[Tensor, ...] | None

    @property
    def stderr(self) -> Tensor | None:
        """The Monte-Carlo standard error of `value` (B,), or None without pairs of estimates."""
        return None if self.estimates is None else standard_error(*self.estimates)

    @property
    def value(self) -> Tensor:
        """The bound (B,), the sum of the terms."""
        return torch.stack(list(self.terms.values())).sum(dim=0)

    def heading(self) -> str:
        return f"NatsBound of {counted(len(self.value), 'sample')}"

    def rows(self) -> dict[str, str]:
        terms = {f"  {name}": mean_of(term, "nats") for name, term in self.terms.items()}
        error = typical_error(self.stderr, "nats a sample", "the draws")
        return {"-log p at most": mean_of(self.value, "nats"), **terms, "error": error}


@dataclass(repr=False)
class Bound(Result):
    """An upper bound on the bits per dimension of a set of images, under the reverse SDE or DDPM's chain.

    mean: the mean of per_image over the images. stderr: the standard error of the mean over images, which includes the
    Monte-Carlo noise; None for one image. monte_carlo: the standard error of the mean for these images, from the
    Monte-Carlo noise alone. per_image: the bound of each image (N,), float64. per_image_stderr: its Monte-Carlo
    standard error (N,). monte_carlo and per_image_stderr are None for `discrete` with draws=None, which visits every
    node once. terms: the summands of per_image, each (N,), in bits per dimension. conventions: the choices that affect
    the value, such as the decoder.
    """

    mean: float
    stderr: float | None
    monte_carlo: float | None
    per_image: Tensor
    per_image_stderr: Tensor | None
    terms: dict[str, Tensor]
    conventions: dict[str, str]

    def heading(self) -> str:
        return f"{type(self).__name__} of {counted(len(self.per_image), 'image')}"

    def rows(self) -> dict[str, str]:
        terms = {f"  {name}": mean_of(term, "bits/dim") for name, term in self.terms.items()}
        error = "none: every step was visited" if self.monte_carlo is None else f"+- {self.monte_carlo:.2g} bits/dim"
        rows = {"at most": f"{plus_minus(self.mean, self.stderr)} bits/dim", **terms, "error of the draws": error}
        return rows | self.conventions


def uniform(stream: RandomStream, count: int) -> Tensor:
    """Draw one uniform number on [0, 1) for each sample, float64 (B,), on the CPU."""
    return stream.uniform(torch.empty(count, dtype=torch.float64, device="cpu"))


def standard_error(*estimates: Tensor) -> Tensor:
    """Return the standard error (B,) of the sum of several independent Monte-Carlo means.

    Each argument holds the n draws (n, B) of one mean, two consecutive draws a and b for each stratum. The variance of
    this mean is estimated by the sum over strata of (a - b)^2, divided by n^2.
    """
    variances = [(values[0::2] - values[1::2]).detach().square().sum(dim=0) / len(values) ** 2 for values in estimates]
    return torch.stack(variances).sum(dim=0).sqrt()


def refuse_odd(draws: int) -> None:
    """Raise ValueError unless `draws` is a positive even integer."""
    if not isinstance(draws, int) or draws < 2 or draws % 2:
        raise ValueError(f"draws must be an even integer, at least 2 (two per stratum); got {draws!r}")


def bits_bound(
    model: Model,
    images: Tensor,
    transform: Transform | DataMap,
    cond: Any,
    seeds: Sequence[int] | None,
    batch_size: int,
    progress: bool,
    nats: Callable[[BaseModel, Tensor, RandomStream], NatsBound],
    conventions: dict[str, str],
) -> Bound:
    """Evaluate a bound in nats on batches of images, and return it in bits per dimension.

    Args:
        model, images, transform, cond, seeds, batch_size, progress: see `continuous`.
        nats: a function (model, batch, stream) that returns the bound of a batch of images in nats. The batch is on the
            model's device, the model already has the conditions of these images, and the stream has their seeds.
        conventions: the entries of `Bound.conventions` that are specific to this bound.
    """
    if not len(images):
        raise ValueError("images must hold at least one image; got none")
    check_levels(images, getattr(transform, "levels", None))
    check_integer("batch_size", batch_size, 1)
    model, count = for_inference(model, cond), len(images)
    device = device_of(model) or images.device
    seeds = range(count) if seeds is None else seeds
    if len(seeds) != count:
        raise ValueError(f"seeds must have one entry per image, {count} in total; got {len(seeds)}")
    parts = []
    for first in progress_bar(range(0, count, batch_size), title="bound", unit="batch", shown=progress):
        rows = slice(first, first + batch_size)
        with torch.no_grad():
            parts.append(nats(model.rows(rows, count), send(images[rows], device), RandomStream(seeds=seeds[rows])))
    bits = dimensions(images) * math.log(2)
    terms = {name: torch.cat([part.terms[name] for part in parts]).cpu() / bits for name in parts[0].terms}
    errors = [part.stderr for part in parts if part.stderr is not None]
    stderr = torch.cat(errors).cpu() / bits if errors else None
    per_image = torch.stack(list(terms.values())).sum(dim=0)
    conventions = {
        "quantity": "bits per dimension (upper bound, of the reverse SDE's model, not of the probability flow)",
        "transform": str(transform),
        "prior": f"N(0, {model.sde.prior_std:g}^2) at t_max={model.sde.t_max:g}",
        **conventions,
    }
    monte_carlo = None if stderr is None else float(stderr.norm()) / count
    bound = Bound(*mean_and_error(per_image), monte_carlo, per_image, stderr, terms, conventions)
    if bool((is_bad := ~torch.isfinite(per_image)).any()):
        indices = is_bad.nonzero().flatten().tolist()
        raise Incomplete(
            f"the bound is not finite for {len(indices)} of {count} images, the first with indices {indices[:8]}: the "
            "network's output is not finite, or the decoder gives a grey level of the image the probability 0",
            bound,
        )
    return bound
