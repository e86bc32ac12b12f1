"""What the bounds share: their results, their draws, and the standard errors of those."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.dequantization import DataMap
from scoresde.progress import progress_bar
from scoresde.protocols import Model, Transform
from scoresde.random_stream import RandomStream
from scoresde.score import BaseModel, device_of, refuse_dropout
from scoresde.tensors import dimensions, mean_and_error, send
from scoresde.wrappers import as_model


@dataclass
class NatsBound:
    """An upper bound on -log p(x) of each state, in nats.

    terms: "prior", "diffusion" and "reconstruction", each (B,), float64, with gradient; their sum is `value`.
    stderr: the Monte-Carlo standard error of `value` (B,), or None where one draw gives none.
    """

    terms: dict[str, Tensor]
    stderr: Tensor | None

    @property
    def value(self) -> Tensor:
        """The bound (B,)."""
        return torch.stack(list(self.terms.values())).sum(dim=0)


@dataclass
class Bound:
    """An upper bound on the bits per dimension of a set of images, under the reverse SDE's model.

    mean: over images. stderr: of that mean, over images; their Monte-Carlo noise is in it (None for one image).
    monte_carlo: the Monte-Carlo noise alone, what stderr would be for these very images.
    per_image: (N,), float64. per_image_stderr: their Monte-Carlo standard errors (N,), each from the draws of its
    image. Both this and monte_carlo are None where every node of a chain was visited once.
    terms: the parts that per_image is the sum of, each (N,), in bits per dimension.
    conventions: everything that moves the number.
    """

    mean: float
    stderr: float | None
    monte_carlo: float | None
    per_image: Tensor
    per_image_stderr: Tensor | None
    terms: dict[str, Tensor]
    conventions: dict[str, str]


# --- draws and their errors


def uniform(stream: RandomStream, count: int) -> Tensor:
    """One number of [0, 1) from the stream of each sample, float64 (B,), on the CPU."""
    return stream.uniform(torch.empty(count, dtype=torch.float64, device="cpu"))


def standard_error(*estimates: Tensor) -> Tensor:
    """Of the sum of the means of independent estimates (n, B), whose consecutive pairs share a stratum: (B,).

    The mean over n/2 strata of a pair's mean (a + b)/2 has the variance sum (a - b)^2/4 / (n/2)^2.
    """
    variances = [(values[0::2] - values[1::2]).detach().square().sum(dim=0) / len(values) ** 2 for values in estimates]
    return torch.stack(variances).sum(dim=0).sqrt()


def refuse_odd(draws: int) -> None:
    """Raises ValueError for a number of draws that does not make pairs."""
    if draws < 2 or draws % 2:
        raise ValueError(f"an even number of draws, 2 or more, expected (two per stratum); got draws={draws}")


# --- what both bounds share


def batches(
    model: Model,
    images: Tensor,
    cond: Any,
    seeds: Sequence[int] | None,
    batch_size: int,
    progress: bool,
) -> Iterator[tuple[BaseModel, Tensor, RandomStream]]:
    """Batches of images on the model's device, each with its conditional model and its stream of draws; refuses what
    `continuous` says."""
    if not bool((images == images.round()).all()):
        raise ValueError("integer grey levels expected; continuous data has no bits per dimension: use continuous_nats")
    model, count = as_model(model, cond), len(images)
    refuse_dropout(model)
    device = device_of(model) or images.device
    seeds = range(count) if seeds is None else seeds
    if len(seeds) != count:
        raise ValueError(f"one seed per image expected, {count} of them; got {len(seeds)}")
    for first in progress_bar(range(0, count, batch_size), title="bound", unit="batch", shown=progress):
        part = slice(first, first + batch_size)
        yield model.rows(part, count), send(images[part], device), RandomStream(seeds=seeds[part])


def summary(
    model: Model, transform: Transform | DataMap, images: Tensor, parts: Sequence[NatsBound], declared: dict[str, str]
) -> dict[str, Any]:
    """The fields of a `Bound`, of the bounds of its batches."""
    bits = dimensions(images) * math.log(2)
    terms = {name: torch.cat([part.terms[name] for part in parts]).cpu() / bits for name in parts[0].terms}
    errors = [part.stderr for part in parts if part.stderr is not None]
    stderr = torch.cat(errors).cpu() / bits if errors else None
    per_image = torch.stack(list(terms.values())).sum(dim=0)
    count, (mean, error) = len(per_image), mean_and_error(per_image)
    if bool((failed := ~torch.isfinite(per_image)).any()):
        indices = failed.nonzero().flatten().tolist()
        raise RuntimeError(
            f"the bound is not finite for {len(indices)} of {count} images, {indices[:8]} first: the network's output "
            "is not finite there, or the decoder gives a level no probability"
        )
    conventions = {
        "quantity": "bits per dimension (upper bound, of the reverse SDE's model, not of the probability flow)",
        "transform": str(transform),
        "prior": f"N(0, {model.sde.prior_std:g}^2) at t_max={model.sde.t_max:g}",
        **declared,
    }
    return {
        "mean": mean,
        "stderr": error,
        "monte_carlo": None if stderr is None else float(stderr.norm()) / count,
        "per_image": per_image,
        "per_image_stderr": stderr,
        "terms": terms,
        "conventions": conventions,
    }
