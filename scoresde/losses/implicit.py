r"""Implicit and sliced score matching: learning the score of p_t from draws of x_t, without the noise in them.

Integration by parts turns the Fisher divergence of a model score s into tr(ds/dx) + |s|^2/2, up to a constant
(Hyvarinen 2005; 1905.07088, eq. 2-4). In terms of the predicted noise eps_hat = -sigma s, per dimension and with the
weights of denoising score matching, it is

    L = \int omega(t) E[ ||eps_hat||^2 - 2 sigma tr(d eps_hat/dx) ] / d  dt
      = \int omega(t) sigma^2 (2/d) E[ tr(ds/dx) + |s|^2/2 ] dt  =  L_denoising - \int omega(t) dt.

The last step uses Stein's identity E[eps . eps_hat] = sigma E tr(d eps_hat/dx). So for every model L and L_denoising
differ by the same constant \int omega(t) dt, which is the mean of `LossTerms.weight`.

Sliced score matching takes random directions v with E[v v^T] = I,

    tr(ds/dx) + |s|^2/2  =  E[ v^T (ds/dx) v ] + |s|^2/2  =  E[ v^T (ds/dx) v + (v^T s)^2/2 ],

either with |s|^2 itself (SSM-VR, 1905.07088, eq. 8) or with its estimate (v^T s)^2, as originally stated (eq. 7).

Implicit and sliced score matching differentiate the network twice: where a denoising objective is possible, it is
cheaper and varies less. For second derivatives, attention runs on unfused kernels. Activation checkpointing does not
use them when it recomputes attention; where PyTorch raises CheckpointError for this reason, turn checkpointing off.

A network that autograd does not differentiate in x would be trained for another objective, so a loss checks the
derivative (`gradient_check`). It does so in its calls 1, 2, 4, 8, ..., because many networks start with a last layer of
zeros, whose derivative is 0.
"""

import torch
from torch import Tensor

from scoresde.arguments import checked
from scoresde.divergence import ExactTrace, Field, Hutchinson, Trace, quadratic_forms
from scoresde.gradient_check import check_gradient
from scoresde.losses.objective import Drawn, Objective
from scoresde.losses.time_densities import TimeDensity
from scoresde.losses.weightings import Weighting
from scoresde.random_stream import RandomStream
from scoresde.score import BaseModel
from scoresde.solvers.solver import rms
from scoresde.tensors import check_instance, dimensions, sum_dims


class ImplicitScoreMatching(Objective):
    r"""Implicit score matching: the score is learned from draws of x_t, without the noise in them (Hyvarinen 2005).

        L = \int omega(t) E[ ||eps_hat||^2 - 2 sigma tr(d eps_hat/dx) ] / d  dt

    In expectation the loss of a sample is that of `DenoisingScoreMatching` minus `LossTerms.weight`, so it is negative
    for a good model.

    Args:
        weighting: "variance", "likelihood", "karras", "min_snr", "velocity", "v", "data", or a `Weighting`.
        times: density q of the training times; default: that of the weighting.
        stratified: draw the times of a batch as a lattice with a random offset, for less variance.
        trace: default `ExactTrace()`, for small states: one vector-Jacobian product per dimension, all of them stored
            for the backward pass. `Hutchinson(probes)` makes it sliced score matching with reduced variance.

    Raises:
        ValueError: weighting is unknown, or weights the error of a view other than the noise; in a call, autograd does
            not differentiate the network in x.
    """

    def __init__(
        self,
        weighting: str | Weighting = "variance",
        times: TimeDensity | None = None,
        trace: Trace | None = None,
        stratified: bool = True,
    ):
        super().__init__(weighting, times, stratified)
        if self.weighting.view != "noise":
            raise ValueError(
                f"weighting must be of the view 'noise'; got one of the view {self.weighting.view!r}: use "
                "DenoisingScoreMatching for other views"
            )
        self.trace, self._calls = trace or ExactTrace(), 0
        check_instance("trace", self.trace, "bind")

    def value(self, model: BaseModel, drawn: Drawn, weight: Tensor) -> Tensor:
        self._check(model, drawn.x0)
        x, t = drawn.perturbed(model.sde), drawn.t
        square, trace = self._estimate(lambda y: model.predict(y, t).noise, x, drawn.stream)
        weight, sigma = weight.to(square), model.sde.sigma(t).to(square)
        return (weight * (square - 2 * sigma * trace) / dimensions(x)).to(x)

    def _check(self, model: BaseModel, x0: Tensor) -> None:
        self._calls += 1
        if self._calls & (self._calls - 1) == 0:
            scale = float(rms(x0).mean()) or 1.0
            check_gradient(model, x0, model.sde.t_min, model.sde.t_max, scale, self.trace)

    def _estimate(self, field: Field, x: Tensor, stream: RandomStream) -> tuple[Tensor, Tensor]:
        """Return ||f||^2 and tr(df/dx) at x for f = `field`, or unbiased estimates of them: float64 (B,) each."""
        value, traces, _ = self.trace.bind(stream, x, differentiable=True)(field, x)
        return sum_dims(value.square()), traces.mean(dim=1)


@checked
class SlicedScoreMatching(ImplicitScoreMatching):
    r"""Sliced score matching (1905.07088, eq. 7 and 8): implicit score matching along random directions v.

        L = \int omega(t) sigma^2 (2/d) E[ v^T (ds/dx) v + |s|^2/2 ] dt,        E[v v^T] = I, s the score of the model

    Args:
        projections: number of random directions per sample; each costs a backward pass.
        distribution: "gaussian" or "rademacher" (smaller variance), both with E[v v^T] = I.
        variance_reduction: if True, use |s|^2 (eq. 8); if False, its estimate (v^T s)^2 (eq. 7).
        weighting: "variance", "likelihood", "karras", "min_snr", "velocity", "v", "data", or a `Weighting`.
        times: density q of the training times; default: that of the weighting.
        stratified: draw the times of a batch as a lattice with a random offset, for less variance.

    Raises:
        ValueError: projections is less than 1, distribution or weighting is unknown, or weighting weights the error of
            a view other than the noise.
    """

    def __init__(
        self,
        projections: int = 1,
        distribution: str = "gaussian",
        variance_reduction: bool = True,
        weighting: str | Weighting = "variance",
        times: TimeDensity | None = None,
        stratified: bool = True,
    ):
        if projections < 1:
            raise ValueError(f"projections must be at least 1; got {projections}")
        directions = Hutchinson(projections, distribution)
        super().__init__(weighting, times, directions, stratified)
        self.directions, self.variance_reduction = directions, variance_reduction

    def _estimate(self, field: Field, x: Tensor, stream: RandomStream) -> tuple[Tensor, Tensor]:
        if self.variance_reduction:
            return super()._estimate(field, x, stream)
        directions = self.directions.draw(stream, x)
        value, traces, _ = quadratic_forms(field, x, directions, differentiable=True)
        projected = torch.stack([sum_dims(value * v) for v in directions], dim=1)
        return projected.square().mean(dim=1), traces.mean(dim=1)
