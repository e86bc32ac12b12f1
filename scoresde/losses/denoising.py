r"""Denoising score matching for any SDE and any prediction type.

The objective is an integral over time of the squared error of the predicted noise, per dimension (Vincent 2011;
2011.13456, eq. 7 with score = -eps/sigma),

    L = \int omega(t) E ||eps_hat(x_t, t) - eps||^2 / d  dt,        x_t = alpha x_0 + sigma eps.

The error is computed from the network's own target F = p x_0 + q eps, as eps_hat - eps = (alpha / D) (F_hat - F), which
loses no digits at small t.
"""

from torch import Tensor

from scoresde.losses.objective import Objective
from scoresde.losses.times import TimeDensity
from scoresde.losses.weightings import Weighting
from scoresde.protocols import Condition
from scoresde.score import ScoreModel, Views
from scoresde.tensors import Noise, broadcast


class DenoisingScoreMatching(Objective):
    """The denoising score-matching loss of the module's first formula.

    With `times=Nodes()` it is the discrete objective of DDPM or NCSN, see `Nodes`.

    Args:
        weighting, times, stratified: see `Objective`.
        reduction: "mean", the squared error per dimension; or "half_sum", half its sum over dimensions, the scale of
            NCSN (1907.05600, eq. 5) and of the published VE trainings (score_sde's reduce_mean=False): d/2 times the
            first. The minimiser is the same, the reach of gradient clipping and of Adam's epsilon is not.

    Raises:
        ValueError: an unknown weighting or reduction.
    """

    def __init__(
        self,
        weighting: str | Weighting = "variance",
        times: TimeDensity | None = None,
        stratified: bool = True,
        reduction: str = "mean",
    ):
        super().__init__(weighting, times, stratified)
        if reduction not in ("mean", "half_sum"):
            raise ValueError(f"reduction 'mean' or 'half_sum' expected; got {reduction!r}")
        self.reduction = reduction

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
        _, error = self._predict(model, x0, t, noise, cond)
        return self._reduce(model, error, t, weight)

    @staticmethod
    def _predict(model: ScoreModel, x0: Tensor, t: Tensor, noise: Tensor, cond: Condition) -> tuple[Views, Tensor]:
        """The model's views of x_t, and the error F_hat - F (B, *) of its network."""
        p, q = model.prediction.target(model.sde, t)
        target = broadcast(p, x0) * x0 + broadcast(q, x0) * noise
        views = model.predict(model.sde.perturb(x0, t, noise), t, cond)
        return views, views.output - target

    def _reduce(self, model: ScoreModel, error: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        """The weighted squared error of the noise (B,), from that of the network."""
        to_noise = model.sde.alpha(t) / model.prediction.determinant(model.sde, t)
        squares = error.square().flatten(1)
        reduced = squares.mean(dim=1) if self.reduction == "mean" else 0.5 * squares.sum(dim=1)
        return (weight * to_noise.square()).to(reduced) * reduced
