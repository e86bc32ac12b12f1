"""What every objective has in common: draws of times and noise, and weights in time.

x_t = alpha x_0 + sigma eps,        eps ~ N(0, I),        t ~ q,        weight = omega(t) / q(t).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde.losses import weightings
from scoresde.losses.times import TimeDensity
from scoresde.losses.weightings import Weighting
from scoresde.protocols import Condition
from scoresde.score import ScoreModel
from scoresde.sdes import SDE
from scoresde.tensors import Noise, float64


@dataclass
class LossTerms:
    """Per-sample terms: `value` (B,), weighted, with gradient; `t` and `weight` (B,), float64.

    `value.mean()` estimates the objective without bias.
    """

    value: Tensor
    t: Tensor
    weight: Tensor


class Objective(nn.Module):
    """A training objective. A subclass defines `value`, the weighted terms of states whose times and noise are drawn.

    Args:
        weighting: "variance", "likelihood", "karras", "min_snr", or a `Weighting`.
        times: density that times are drawn from; the weighting's own if not given.
        stratified: draw the batch's times at one random offset of a regular lattice in probability (2107.00630,
            appendix I.1) instead of independently: unbiased as well, with less variance.

    Raises:
        ValueError: an unknown weighting.
    """

    def __init__(
        self, weighting: str | Weighting = "variance", times: TimeDensity | None = None, stratified: bool = True
    ):
        super().__init__()
        self.weighting = weightings.resolve(weighting)
        self.times, self.stratified = times or self.weighting.times, stratified

    def value(
        self,
        model: ScoreModel,
        x0: Tensor,
        t: Tensor,
        noise: Tensor,
        weight: Tensor,
        cond: Condition = None,
        stream: Noise | None = None,
    ) -> Tensor:
        """The weighted terms (B,) of x0 and noise (B, *) at t (B,), whose weights are float64 (B,); further draws are
        from the stream."""
        raise NotImplementedError(f"{type(self).__name__} must define value(model, x0, t, noise, weight, ...)")

    def draw_times(self, sde: SDE, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n times from the density, (n,), float64, on the CPU."""
        device = "cpu" if generator is None else generator.device
        u = torch.rand(1 if self.stratified else n, generator=generator, device=device, dtype=torch.float64).cpu()
        if self.stratified:
            u = (u + torch.arange(n, dtype=torch.float64) / n).frac()
        return self.times.quantile(sde, u)

    def forward(
        self,
        model: ScoreModel,
        x0: Tensor,
        cond: Condition = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        stream: Noise | None = None,
    ) -> LossTerms:
        """Loss terms of clean states x0 (B, *).

        Args:
            model: the score model to train.
            x0: clean data.
            cond: the network's condition.
            t: times (B,), taken as drawn from `times`; drawn here if not given.
            noise: (B, *); drawn here if not given.
            generator: for the draws.
            stream: for all draws but the times, instead of the generator: of states like x0, which may have a stream of
                their own each.

        Raises:
            ValueError: times or noise of a shape that does not fit the states.
        """
        sde = model.sde
        if t is None:
            t = self.draw_times(sde, x0.shape[0], generator)
        elif (t := float64(t)).shape not in ((), x0.shape[:1]):
            raise ValueError(f"times () or {tuple(x0.shape[:1])}, one per state, expected; got {tuple(t.shape)}")
        t = t.expand(x0.shape[0])
        if noise is not None and noise.shape != x0.shape:
            raise ValueError(f"noise of the shape of the states, {tuple(x0.shape)}, expected; got {tuple(noise.shape)}")
        if stream is None:
            stream = Noise(x0.shape, generator, device=x0.device, dtype=x0.dtype)
        if noise is None:
            noise = stream.normal()
        return self.terms(model, x0, t, noise, cond, stream)

    def terms(
        self,
        model: ScoreModel,
        x0: Tensor,
        t: Tensor,
        noise: Tensor,
        cond: Condition = None,
        stream: Noise | None = None,
    ) -> LossTerms:
        """Loss terms of x0 and noise (B, *) at t (B,)."""
        weight = self.weighting.omega(model.sde, t) / self.times.density(model.sde, t)
        return LossTerms(self.value(model, x0, t, noise, weight, cond, stream), t, weight)
