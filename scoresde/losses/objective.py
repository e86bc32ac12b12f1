"""The base class of all objectives: draws of times and noise, and weights in time.

x_t = alpha x_0 + sigma eps,        eps ~ N(0, I),        t ~ q,        weight = omega(t) / q(t).

q is the density of the training times (`losses.time_densities`), omega the weighting (`losses.weightings`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.configured import Configured
from scoresde.losses import weightings
from scoresde.losses.time_densities import TimeDensity
from scoresde.losses.weightings import Weighting
from scoresde.protocols import Model
from scoresde.random_stream import RandomStream
from scoresde.score import BaseModel
from scoresde.sdes import SDE, checked_times
from scoresde.tensors import at_least_float32, check_instance, check_shape_of_states
from scoresde.wrappers import as_model


@dataclass
class LossTerms:
    """The loss of each sample of a batch.

    value: the weighted loss (B,), with gradient; `value.mean()` estimates the objective without bias.
    t: the times (B,), float64.
    weight: omega(t) / q(t), (B,), float64.
    error: the weighted error (B,) if `value` is another function of it, as with a learned uncertainty; None if it is
        `value` itself. The log has the mean of `error / weight` by noise level.
    """

    value: Tensor
    t: Tensor
    weight: Tensor
    error: Tensor | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Drawn:
    """Clean states with the times and the noise drawn for them: the input of `Objective.value`.

    x0: clean states (B, *). t: times (B,), float64. noise: eps (B, *). stream: the source of any further draws.
    """

    x0: Tensor
    t: Tensor
    noise: Tensor
    stream: RandomStream

    def perturbed(self, sde: SDE) -> Tensor:
        """Return x_t = alpha x_0 + sigma eps."""
        return sde.perturb(self.x0, self.t, self.noise)


class Objective(Configured, nn.Module):
    """A training objective. A subclass defines `value`, the weighted loss of each state at its time and noise.

    Args:
        weighting: "variance", "likelihood", "karras", "min_snr", "velocity", "v", "data", or a `Weighting`.
        times: density q of the training times; default: `weighting.times`.
        stratified: if True, draw the times of a batch as a regular lattice in probability with one random offset
            (2107.00630, appendix I.1): also unbiased, with less variance. If False, draw them independently.

    Raises:
        TypeError: times is not a density of times.
        ValueError: weighting is unknown.
    """

    def __init__(
        self, weighting: str | Weighting = "variance", times: TimeDensity | None = None, stratified: bool = True
    ):
        super().__init__()
        self.weighting = weightings.resolve(weighting)
        self.times, self.stratified = times or self.weighting.times, stratified
        check_instance("times", self.times, "quantile", "density")

    def conditions(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Return the conditions that this objective itself gives to the network, for states of a shape `*`.

        They are {name: shape of the condition of a sample}; none by default. A network that is trained with them has
        also seen the null condition, except for those in `required`.
        """
        return {}

    @property
    def required(self) -> tuple[str, ...]:
        """Names of those `conditions` that every sample has; the trained model cannot be used without them."""
        return ()

    def bind(self, model: Any, cond: Any) -> BaseModel:
        """Return the model to train, with the condition of the batch."""
        return as_model(model, cond)

    def measured(self, model: Any, data: Tensor, data_map: Any, stream: RandomStream) -> dict[str, Tensor]:
        """Return further numbers for the log of held-out data, (B,) each by name; none by default.

        Args:
            model: the model, in eval mode.
            data: data (B, *).
            data_map: maps data to the states that the model is trained on, with `draw` of a `DataMap`.
            stream: source of draws.
        """
        return {}

    def value(self, model: BaseModel, drawn: Drawn, weight: Tensor) -> Tensor:
        """Return the weighted loss of each drawn state, (B,); `weight` is omega(t) / q(t), float64 (B,)."""
        raise NotImplementedError(f"{type(self).__name__} must define value(model, drawn, weight)")

    def draw_times(self, sde: SDE, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n times from the density: float64 (n,), on the CPU.

        Raises:
            TypeError: the model has no SDE.
        """
        if sde is None:
            raise TypeError(
                "this loss needs a model with an SDE; got one without, such as an autoencoder: choose its own loss "
                "(loss=autoencoder in a configuration, pipelines.AutoencoderObjective() in Python)"
            )
        device = "cpu" if generator is None else generator.device
        u = torch.rand(1 if self.stratified else n, generator=generator, device=device, dtype=torch.float64).cpu()
        if self.stratified:
            u = (u + torch.arange(n, dtype=torch.float64) / n).frac()
        return self.times.quantile(sde, u)

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
        """Return the loss terms of clean states x0 (B, *).

        Args:
            model: the model to train.
            x0: clean data.
            cond: short for `model.given(cond)`.
            t: times () or (B,), treated as draws from `times`; default: drawn from `times`.
            noise: eps (B, *); default: drawn from N(0, I).
            generator: generator of the times and, without `stream`, of all other draws; default: PyTorch's global one.
            stream: source of the noise and any further draws; it may have one seed per state. Default: `generator`.

        Raises:
            ValueError: there are no states, the shape of t or noise does not fit them, or t is outside [t_min, t_max].
        """
        model, x0 = self.bind(model, cond), at_least_float32(x0)
        if not x0.numel():
            raise ValueError(f"x0 must have at least one state; got {tuple(x0.shape)}")
        if t is None:
            t = self.draw_times(model.sde, x0.shape[0], generator)
        elif (t := checked_times(model.sde, t)).shape not in ((), x0.shape[:1]):
            raise ValueError(f"t must have shape () or {tuple(x0.shape[:1])}, one per state; got {tuple(t.shape)}")
        if noise is not None:
            check_shape_of_states("noise", noise, x0)
        stream = RandomStream(generator) if stream is None else stream
        noise = stream.normal(x0) if noise is None else noise
        return self.terms(model, Drawn(x0, t.expand(x0.shape[0]), noise, stream))

    def terms(self, model: BaseModel, drawn: Drawn) -> LossTerms:
        """Compute the weights omega(t) / q(t), and return the `LossTerms` of the drawn states."""
        weight = self.weighting.omega(model.sde, drawn.t) / self.times.density(model.sde, drawn.t)
        return LossTerms(self.value(model, drawn, weight), drawn.t, weight)
