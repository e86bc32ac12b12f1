r"""Cross entropy of a noise-conditional classifier: -E log p(y | x_t), with x_t = alpha x_0 + sigma eps at all times.

The minimiser is the exact posterior of the label given the noisy state, whose gradient guides samples (2011.13456,
appendix I; 2105.05233, section 4). The label is the condition of the sample.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.arguments import checked
from scoresde.losses.objective import Drawn, LossTerms, Objective
from scoresde.losses.time_densities import TimeDensity, UniformTime
from scoresde.protocols import Condition, as_condition, by_name, expand


class LabelledClassifier(nn.Module):
    """A noise-conditional classifier with the labels (B,) of a batch."""

    def __init__(self, classifier: Any, label: Tensor):
        super().__init__()
        self.classifier, self.sde, self.label = classifier, classifier.sde, label


@checked
class CrossEntropy(Objective):
    """The cross entropy -log p(y | x_t) in nats, at times from a density, all with weight 1.

    Args:
        times: density of the training times; default: `UniformTime()`.
        stratified: draw the times of a batch as a lattice with a random offset, for less variance.
        condition: name of the condition that is the label.

    Raises:
        TypeError: in a call, the model is not a classifier: it has no `sde`, or cannot be called.
        ValueError: in a call, the labels are missing, not integers, or negative (-1 is the null label).
    """

    def __init__(self, times: TimeDensity | None = None, stratified: bool = True, condition: str = "label"):
        super().__init__("variance", times or UniformTime(), stratified)
        self.condition = condition

    def bind(self, model: Any, cond: Any) -> Any:
        """Return the classifier with the labels of the batch."""
        if not hasattr(model, "sde") or hasattr(model, "predict"):
            raise TypeError(
                f"cross entropy trains a noise-conditional classifier, such as NoisyClassifier; got "
                f"{type(model).__name__}: set classifier=true in the configuration, or choose another loss"
            )
        label = by_name(as_condition(cond)).get(self.condition)
        if label is None or label.is_floating_point() or bool((label < 0).any()):
            raise ValueError(
                f"a classifier needs the condition {self.condition!r} for every sample, integers from 0; got "
                f"{'none' if label is None else 'floating-point or negative values'}: set data.labels, and "
                "condition.dropout=0"
            )
        return LabelledClassifier(model, label)

    def terms(self, model: Any, drawn: Drawn) -> LossTerms:
        one = torch.ones_like(drawn.t)
        return LossTerms(self.value(model, drawn, one), drawn.t, one)

    def value(self, model: Any, drawn: Drawn, weight: Tensor) -> Tensor:
        logits = model.classifier(drawn.perturbed(model.sde), drawn.t)
        label: Condition = expand(model.label.to(logits.device), len(logits))
        return weight.to(logits) * F.cross_entropy(logits, label, reduction="none")  # type: ignore[arg-type]
