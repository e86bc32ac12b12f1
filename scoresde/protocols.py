"""What the layers ask of each other, as structural types.

A network is any callable of this signature; a score model is anything that gives the views of a diffusion model at
(x, t); samplers, losses and likelihoods accept whatever fits, without asking for its class.
"""

from typing import Any, Protocol

from torch import Tensor

Condition = Tensor | dict[str, Tensor] | None
"""The condition of a network: None (the null condition), a tensor, or a dict of tensors, each with leading B."""


class Network(Protocol):
    """A function of the scaled state (B, *), the noise label (B,) and the condition, of the shape of the state."""

    def __call__(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor: ...


class Views(Protocol):
    """Every view of one network evaluation at (x, t), each (B, *)."""

    @property
    def score(self) -> Tensor: ...
    @property
    def noise(self) -> Tensor: ...
    @property
    def denoised(self) -> Tensor: ...
    @property
    def velocity(self) -> Tensor: ...
    @property
    def variance(self) -> Tensor | None: ...
    def combine(self, denoised: Tensor, noise: Tensor) -> Tensor: ...


class ScoreModel(Protocol):
    """A diffusion model: an SDE, and the views of its score at any state and time."""

    @property
    def sde(self) -> Any: ...
    def predict(self, x: Tensor, t: Tensor, cond: Condition = None) -> Views: ...
