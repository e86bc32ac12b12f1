r"""Denoising score matching for any SDE and any prediction type.

The objective is an integral over time of the squared error of the predicted noise, per dimension (Vincent 2011;
2011.13456, eq. 7 with score = -eps/sigma),

    L = \int omega(t) E ||eps_hat(x_t, t) - eps||^2 / d  dt,        x_t = alpha x_0 + sigma eps.

A weighting may replace the noise by another view (`Weighting.view`), such as the velocity. The error comes from
`Views.error`, which computes it from the error of the network's target, so no digits are lost at small t.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scoresde.arguments import checked
from scoresde.losses.objective import Drawn, LossTerms, Objective
from scoresde.losses.time_densities import TimeDensity
from scoresde.losses.weightings import Weighting
from scoresde.score import BaseModel
from scoresde.views import Views


@checked
class DenoisingScoreMatching(Objective):
    r"""Denoising score matching, the weighted squared error of the predicted noise, per dimension (Vincent 2011).

        L = \int omega(t) E ||eps_hat(x_t, t) - eps||^2 / d  dt,        x_t = alpha x_0 + sigma eps.

    A weighting chooses omega(t), and may choose another view than the noise, such as the velocity.
    With `times=Nodes()` it is the discrete objective of DDPM or NCSN, see `Nodes`.

    Args:
        weighting: "variance", "likelihood", "karras", "min_snr", "velocity", "v", "data", or a `Weighting`.
        times: density q of the training times; default: that of the weighting.
        stratified: draw the times of a batch as a lattice with a random offset, for less variance.
        reduction: "mean", the mean of the squared error over dimensions; or "half_sum", half its sum over dimensions,
            the scale of NCSN (1907.05600, eq. 5) and of the published VE models (score_sde's reduce_mean=False).
            "half_sum" is d/2 times "mean": it has the same minimiser, but gradient clipping and Adam's epsilon act
            differently.
        uncertainty: if True, train the uncertainty u of the network too: a sample contributes L exp(-u(t)) + u(t), with
            L its weighted error (2312.02696, eq. 21; see `networks.uncertainty`). If False, it contributes L. The
            loss by noise level in the log of a training is L divided by the weight in both cases.

    Raises:
        ValueError: weighting or reduction is unknown; when called with `uncertainty`, the model has none.
    """

    def __init__(
        self,
        weighting: str | Weighting = "variance",
        times: TimeDensity | None = None,
        stratified: bool = True,
        reduction: str = "mean",
        uncertainty: bool = False,
    ):
        super().__init__(weighting, times, stratified)
        if reduction not in ("mean", "half_sum"):
            raise ValueError(f"reduction must be 'mean' or 'half_sum'; got {reduction!r}")
        self.reduction, self.uncertainty = reduction, uncertainty

    def value(self, model: BaseModel, drawn: Drawn, weight: Tensor) -> Tensor:
        views = model.predict(drawn.perturbed(model.sde), drawn.t)
        return self._reduce(views.error(drawn.x0, drawn.noise), weight)

    def terms(self, model: BaseModel, drawn: Drawn) -> LossTerms:
        """Return the loss terms; with `uncertainty`, `value` is L exp(-u) + u, and `error` is L."""
        terms = super().terms(model, drawn)
        if not self.uncertainty:
            return terms
        learned: Any = getattr(model, "uncertainty", None)
        if learned is None:
            name = type(model).__name__
            raise ValueError(
                f"uncertainty=True needs a ScoreModel, whose network has a learned uncertainty; got {name}"
            )
        u = learned(drawn.t)
        return replace(terms, value=terms.value * torch.exp(-u) + u, error=terms.value.detach())

    def _reduce(self, error: Views, weight: Tensor) -> Tensor:
        """Return the squared error of the view `weighting.view`, weighted and reduced, (B,)."""
        squares = getattr(error, self.weighting.view).square().flatten(1)
        reduced = squares.mean(dim=1) if self.reduction == "mean" else 0.5 * squares.sum(dim=1)
        return weight.to(reduced) * reduced
