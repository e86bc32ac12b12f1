"""Skip and log the training steps with a non-finite loss or gradient.

A skipped step changes neither the weights nor the optimiser's moments; the averages count the unchanged weights once
more. A few skipped steps in a row are normal while the loss scale of float16 adapts, or after a bad sample. If more
steps in a row are skipped, the run has diverged: it stops, and the last checkpoint is still good.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scoresde.score import ScoreModel
from scoresde.training.json_lines import append_line

SKIPPED = "skipped.jsonl"


class NonFiniteLoss(RuntimeError):
    """The loss, its gradient or a weight is NaN or infinite; the message has the step and the noise levels."""


@dataclass
class Guard:
    """Counter of skipped steps.

    Args:
        limit: number of steps in a row that may be skipped.
        path: file to which each skipped step adds a line; None for no file.
        checkpoint: path of the run's checkpoint; messages say whether it exists.
        in_a_row: number of steps skipped since the last good step.
        total: number of steps skipped in all.
    """

    limit: int
    path: Path | None
    checkpoint: Path
    in_a_row: int = 0
    total: int = 0

    @property
    def last_checkpoint(self) -> str:
        """A sentence for messages: whether there is a checkpoint to continue from."""
        return "The last checkpoint is good" if self.checkpoint.exists() else "There is no checkpoint yet"

    def skip(self, step: int, reason: str) -> None:
        """Count a skipped step, log it and warn.

        Raises:
            NonFiniteLoss: more than `limit` steps in a row were skipped.
        """
        self.in_a_row, self.total = self.in_a_row + 1, self.total + 1
        if self.path is not None:
            append_line(self.path, {"step": step, "in_a_row": self.in_a_row, "reason": reason})
        if self.in_a_row > self.limit:
            count = f" This is skipped step {self.in_a_row} in a row." if self.limit else ""
            raise NonFiniteLoss(f"{reason}.{count} {self.last_checkpoint}; lower the learning rate or use float32")
        warnings.warn(f"skipped a step: {reason}", UserWarning, stacklevel=3)


def diagnosis(model: ScoreModel, values: Tensor, times: Tensor, step: int) -> str:
    """Return a message on a non-finite loss or gradient, from the losses (n,) of the step's samples at times (n,)."""
    is_bad = ~torch.isfinite(values.detach().cpu())
    if not is_bad.any():
        return f"the gradient is not finite at step {step}, although the loss is finite"
    if (sde := getattr(model, "sde", None)) is None:
        return f"the loss is not finite at step {step}, for {int(is_bad.sum())} of {len(values)} samples"
    bad_times = times.detach().cpu()[is_bad]
    levels = ", ".join(f"t={float(t):.4g} (sigma={float(sde.sigma(t).detach()):.4g})" for t in bad_times[:4])
    more = ", ..." if len(bad_times) > 4 else ""
    return f"the loss is not finite at step {step}, for {len(bad_times)} of {len(values)} samples: {levels}{more}"


@contextmanager
def not_fatal(name: str, step: int) -> Iterator[None]:
    """Turn an error in the block into a warning: a failed preview or evaluation must not end a training run.

    Warns:
        UserWarning: the block raised an error, which the message describes.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(f"the {name} after step {step} failed, and the training goes on: {reason}", stacklevel=2)
