r"""Objectives of models that are given an image derived from the clean state, such as its low resolution.

    L = E_(x_0, z) ell(model.given({"image": image}), target),        (target, image) = derive(x_0, z),

with the objective ell of another class and random numbers z. Its minimiser is the exact score of p(target_t | image).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde.losses.objective import LossTerms, Objective
from scoresde.protocols import Model, by_name
from scoresde.random_stream import RandomStream
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.tensors import at_least_float32


class GivenImage(Objective):
    """Another objective, given an image. A subclass defines `derive` and `image_shape`. Other conditions stay.

    Args:
        loss: the objective of the conditional model.
    """

    def __init__(self, loss: Objective):
        super().__init__(loss.weighting, loss.times, loss.stratified)
        self.loss = loss

    def derive(self, x0: Tensor, stream: RandomStream) -> tuple[Tensor, Tensor]:
        """Return the states to learn (B, *) and the condition images for clean states x0 (B, *)."""
        raise NotImplementedError(f"{type(self).__name__} must define derive(x0, stream)")

    def image_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the condition image of a clean state of a shape `*`."""
        raise NotImplementedError(f"{type(self).__name__} must define image_shape(shape)")

    def conditions(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {**self.loss.conditions(shape), "image": self.image_shape(shape)}

    def draw_times(self, sde: SDE, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.loss.draw_times(sde, n, generator)

    def bind(self, model: Any, cond: Any) -> BaseModel:
        return self.loss.bind(model, cond)

    def forward(
        self,
        model: Model,
        x0: Tensor,
        cond: Any = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        stream: RandomStream | None = None,
    ) -> LossTerms:
        """Derive states and images, and return the loss terms of the conditional model, see `Objective.forward`.

        Raises:
            ValueError: the condition has an image already; see also `Objective.forward`.
        """
        if "image" in by_name(cond):
            raise ValueError(
                "cond must have no image, which the objective derives from the state; got one: leave it out of the data"
            )
        stream = RandomStream(generator) if stream is None else stream
        target, image = self.derive(at_least_float32(x0), stream)
        return self.loss(model, target, {**by_name(cond), "image": image}, t, noise, generator, stream)
