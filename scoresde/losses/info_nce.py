r"""InfoNCE: the symmetric contrastive loss of CLIP (1807.03748, eq. 4; 2103.00020, figure 3), at all noise levels.

For a batch of pairs (x_i, c_i) with similarities s_ij = s(x_i, c_j), the loss of pair i is

    -1/2 log exp(s_ii) / sum_j exp(s_ij)  -  1/2 log exp(s_ii) / sum_j exp(s_ji).

The first term alone has the minimisers log p(c | x)/p(c) + a(x), the second log p(x | c)/p(x) + b(c), for any a and b
and every number of pairs of at least 2. The two logarithms are the same pointwise mutual information, so the sum has
the minimiser

    s(x, c) = log p(x, c) / (p(x) p(c)) + constant.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.arguments import checked
from scoresde.losses.objective import Drawn, LossTerms, Objective
from scoresde.losses.time_densities import TimeDensity, UniformTime
from scoresde.protocols import Condition, as_condition, by_name, expand


class Pairs(nn.Module):
    """A contrastive model with the conditions of a batch of states."""

    def __init__(self, model: Any, cond: Condition):
        super().__init__()
        self.model, self.sde, self.cond = model, model.sde, cond


@checked
class InfoNCE(Objective):
    """The symmetric contrastive loss in nats, at times from a density, all with weight 1.

    The other pairs of the batch are the negatives. With trainer.accumulate=n or n processes, only pairs of the same
    part of the batch are: the loss is then that of batches of 1/n of the size.

    Args:
        times: density of the training times; default: `UniformTime()`.
        stratified: draw the times of a batch as a lattice with a random offset, for less variance.

    Raises:
        TypeError: in a call, the model is not a contrastive model.
        ValueError: in a call, there is no condition, or fewer than 2 pairs.
    """

    def __init__(self, times: TimeDensity | None = None, stratified: bool = True):
        super().__init__("variance", times or UniformTime(), stratified)

    def bind(self, model: Any, cond: Any) -> Any:
        """Return the model with the conditions of the batch."""
        if not hasattr(model, "embed_condition") or not hasattr(model, "sde"):
            raise TypeError(
                f"InfoNCE trains a ContrastiveModel; got {type(model).__name__}: set contrastive=true in the "
                "configuration, or choose another loss"
            )
        if not by_name(cond := as_condition(cond)):
            raise ValueError("a contrastive model needs conditions; got none: set data.labels")
        return Pairs(model, cond)

    def terms(self, model: Any, drawn: Drawn) -> LossTerms:
        one = torch.ones_like(drawn.t)
        return LossTerms(self.value(model, drawn, one), drawn.t, one)

    def value(self, model: Any, drawn: Drawn, weight: Tensor) -> Tensor:
        count = len(drawn.x0)
        if count < 2:
            raise ValueError(f"InfoNCE needs at least 2 pairs; got {count}: choose a larger trainer.batch_size")
        logits = model.model(drawn.perturbed(model.sde), drawn.t, expand(model.cond, count))
        own = torch.arange(count, device=logits.device)
        losses = [F.cross_entropy(part, own, reduction="none") for part in (logits, logits.T)]
        return weight.to(logits) * (losses[0] + losses[1]) / 2
