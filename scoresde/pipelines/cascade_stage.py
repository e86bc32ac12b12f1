"""The stages of a cascade with the checks that they fit each other, and the results of a cascade.

`pipelines.cascade` has the mathematics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from scoresde.bits import BitsPerDim
from scoresde.data.resolutions import Resolutions
from scoresde.dequantization import Dequantization
from scoresde.losses.super_resolution import low_resolution_image
from scoresde.protocols import Condition, Model, Transform, by_name
from scoresde.random_stream import RandomStream
from scoresde.result_table import Result, cost, counted, mean_of, range_of, statuses, typical_error
from scoresde.score import BaseModel
from scoresde.solvers import Status
from scoresde.wrappers import as_model


@dataclass(frozen=True)
class CascadeStage:
    """One stage of a cascade.

    Args:
        model: the model, of images in the first stage, of fine parts given the condition "image"
            (`losses.low_resolution_image`) in later ones.
        transform: the map T_k from data to model space.
        shape: the shape of one image x_k.
        dequantization: the dequantisation of grey levels; None for continuous images.
        resolutions: the split of T_k(x_k); None for the first stage.
        augmentation: the largest level of the noise in the low resolution that the model was trained with.
    """

    model: Model
    transform: Transform
    shape: tuple[int, ...]
    dequantization: Dequantization | None = None
    resolutions: Resolutions | None = None
    augmentation: float = 0.0

    @property
    def state_shape(self) -> tuple[int, ...]:
        """The shape of one state of the model."""
        return tuple(self.shape) if self.resolutions is None else self.resolutions.fine_shape(self.shape)

    def image(self, mean: Tensor, level: float, stream: RandomStream) -> Tensor:
        """Return the condition image of means in model space, see `losses.super_resolution`."""
        if self.resolutions is None:
            raise ValueError("the first stage of a cascade takes no condition image; got a mean: use a later stage")
        return low_resolution_image(self.resolutions, mean, level if self.augmentation else None, stream)

    def given(self, cond: Condition) -> BaseModel:
        """Return the model with those conditions that its network accepts; all of them if that is unknown."""
        known = self.conditions
        parts = {name: part for name, part in by_name(cond).items() if known is None or name in known}
        return as_model(self.model).given(parts or None)

    @property
    def conditions(self) -> list[str] | None:
        """The names of the conditions that the network accepts; None if they are unknown."""
        return getattr(getattr(as_model(self.model), "network", None), "conditions", None)


@dataclass(repr=False)
class CascadeSamples(Result):
    """Samples of a cascade.

    x: images (n, *) of the last stage in data units. stages: the images of every stage. nfe, backward: evaluations of
    networks and backward passes for each sample, summed over the stages.
    """

    x: Tensor
    stages: tuple[Tensor, ...]
    nfe: int
    backward: int

    def heading(self) -> str:
        return f"CascadeSamples: {counted(len(self.x), 'image')}"

    def rows(self) -> dict[str, str]:
        sizes = " -> ".join(str(tuple(stage.shape[1:])) for stage in self.stages)
        return {"stages": sizes, "range": range_of(self.x), "evaluations": cost(self.nfe, self.backward)}


@dataclass(repr=False)
class CascadeLogProb(Result):
    """log p of each image, in nats.

    value: (N,), float64. stderr: standard error of the trace estimates (N,), or None. stages: the terms
    log p_k(x_k | x_(k-1)), (N, K + 1); they add up to `value`. conventions: the choices that change the values. nfe,
    backward, status: see `LogProb`, summed over the stages (the worst status).
    """

    value: Tensor
    stderr: Tensor | None
    stages: Tensor
    conventions: dict[str, str]
    nfe: Tensor
    backward: Tensor
    status: Tensor

    def heading(self) -> str:
        return f"CascadeLogProb of {counted(len(self.value), 'image')}"

    def rows(self) -> dict[str, str]:
        terms = {f"  stage {i}": mean_of(term, "nats") for i, term in enumerate(self.stages.T)}
        return {
            "mean": mean_of(self.value, "nats"),
            **terms,
            "error": typical_error(self.stderr, "nats an image", "the trace"),
            "status": statuses(self.status, Status),
            "evaluations": cost(self.nfe, self.backward, "an image"),
            **self.conventions,
        }


@dataclass(kw_only=True, repr=False)
class CascadeBits(BitsPerDim):
    """Bits per dimension of the images of the last stage.

    stages: the bits of each stage given the one below, divided by the dimensions of the last stage (N, K + 1); they add
    up to `per_image`.
    """

    stages: Tensor


def check_stages(stages: Sequence[Any]) -> None:
    """Check that the stages fit each other; the errors are those of `Cascade`."""
    if not stages:
        raise ValueError("stages must hold at least one stage; got none")
    for i, stage in enumerate(stages):
        if not isinstance(stage, CascadeStage):
            raise TypeError(
                f"stages[{i}] must be a run or a CascadeStage; got {type(stage).__name__}: load a run by ss.load"
            )
        if (stage.resolutions is None) != (i == 0):
            kind = (
                "a model of whole images" if i == 0 else "a super-resolution model, trained with loss=super_resolution"
            )
            raise ValueError(f"stages[{i}] must be {kind}: order the stages from the smallest images to the largest")
    is_levels = stages[-1].dequantization is not None
    for i, (below, stage) in enumerate(pairwise(stages), start=1):
        if tuple(below.shape) != (needed := stage.resolutions.mean_shape(stage.shape)):
            raise ValueError(
                f"stages[{i}] makes images of shape {tuple(stage.shape)} from means of shape {needed}; got images of "
                f"shape {tuple(below.shape)} from the stage below: choose stages whose shapes fit"
            )
        if stage.resolutions.is_exact:
            continue
        if is_levels and below.dequantization is None:
            raise ValueError(f"stages[{i - 1}] must have a dequantisation, as the stages above are for grey levels")
        if any(upper.resolutions.is_exact for upper in stages[i + 1 :]):
            raise ValueError(
                f"stages[{i}] must not be one of {stage.resolutions} below one of Haar, whose means are not grey "
                "levels: use Haar for the lower stages too"
            )


def check_conditions(stages: Sequence[CascadeStage], cond: Condition) -> None:
    """Raise ValueError if no stage takes one of the conditions, or for an image of the stages after the first."""
    known = [stage.conditions for stage in stages]
    if "image" in by_name(cond) and "image" not in (known[0] if known[0] is not None else ["image"]):
        raise ValueError("cond must have no image, which a cascade makes of the stage below; got one: leave it out")
    for name in by_name(cond):
        if not any(names is None or name in names for names in known):
            taken = sorted({other for names in known for other in names or ()} - {"image"})
            raise ValueError(f"no stage takes the condition {name!r}; the stages take {', '.join(taken) or 'none'}")
