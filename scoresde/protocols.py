"""What the layers ask of each other, as structural types.

A network is any callable of this signature; a score model is anything that gives the views of a diffusion model at
(x, t); samplers, losses and likelihoods accept whatever fits, without asking for its class.
"""

from typing import Any, Protocol

from torch import Tensor

Condition = Tensor | dict[str, Tensor] | None
"""The condition of a network: None (the null condition), a tensor, or a dict of tensors, each with leading B."""


def select(cond: Condition, rows: Tensor | slice | None) -> Condition:
    """The condition of some of the samples."""
    if cond is None or rows is None:
        return cond
    if isinstance(cond, Tensor):
        return cond[rows]
    return {key: value[rows] for key, value in cond.items()}


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
    def v(self) -> Tensor: ...
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


class Transform(Protocol):
    """An invertible map from data space to model space that knows its log-determinant, (B,) in nats."""

    def __call__(self, x: Tensor) -> Tensor: ...
    def inverse(self, y: Tensor) -> Tensor: ...
    def log_det(self, x: Tensor) -> Tensor: ...
