"""What is not finite is not learned from: a step whose gradient is NaN or infinite is left out, and said.

Neither the weights nor the optimiser's moments see it; the averages take in the weights as they stayed. A few in a row
may be a scale of float16 that is found, or a bad sample; more of them are a run that has diverged, which stops. The
last checkpoint is then good.
"""

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from scoresde.score import ScoreModel

SKIPPED = "skipped.jsonl"


class NonFiniteLoss(RuntimeError):
    """The loss, its gradient or a weight is NaN or infinite; the message has the step and the noise levels."""


class Guard:
    """Counts steps that were left out.

    Args:
        limit: how many in a row are let pass.
        path: of the file that gets a line for each, None for none.
    """

    def __init__(self, limit: int, path: Path | None):
        self.limit, self.path, self.in_a_row, self.total = limit, path, 0, 0

    def passed(self) -> None:
        """A step was taken."""
        self.in_a_row = 0

    def skipped(self, step: int, reason: str) -> None:
        """A step was not.

        Raises:
            NonFiniteLoss: it was one too many.
        """
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, "in_a_row": self.in_a_row, "reason": reason}) + "\n")
        if self.in_a_row > self.limit:
            before = f", number {self.in_a_row} in a row" if self.limit else ""
            raise NonFiniteLoss(
                f"{reason}{before}. The last checkpoint is intact; lower the learning rate or the clip, or take a "
                "wider precision"
            )
        warnings.warn(f"left out: {reason}", UserWarning, stacklevel=3)


def diagnosis(model: ScoreModel, values: Tensor, times: Tensor, step: int) -> str:
    """What is known about a step whose gradient is not finite, from the losses (n,) of its samples at those times."""
    bad = ~torch.isfinite(values.detach().cpu())
    if not bad.any():
        return f"the gradient is not finite at step {step}, though the loss is"
    found = times.detach().cpu()[bad]
    levels = ", ".join(f"t={float(t):.4g} (sigma={float(model.sde.sigma(t).detach()):.4g})" for t in found[:4])
    more = ", ..." if len(found) > 4 else ""
    return f"the loss is not finite at step {step}, for {int(bad.sum())} of {len(bad)} samples: {levels}{more}"
