"""The state of a training run and its checkpoint: everything that a new process needs to continue bit for bit.

The training state is the weights, their averages, the optimiser's moments, the loss scale of mixed precision, the
number of skipped steps, and the sums of the log's unfinished line. The samples and random draws of a step are not part
of it: they are functions of (seed, step).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from scoresde.score import ScoreModel
from scoresde.training import checkpoint, distributed
from scoresde.training.ema import EMA
from scoresde.training.guard import Guard, NonFiniteLoss
from scoresde.training.posthoc_ema import PowerAverages
from scoresde.training.precision import Precision

CHECKPOINT = "checkpoint.safetensors"
Sums = dict[str, list[float]]  # see `Log.total`


@dataclass
class State:
    """A model in training, with everything that changes during training.

    Args:
        model, optimizer, ema, precision, guard: see their classes.
        power: power-function averages, whose width is chosen after training; or None.
        path: the checkpoint's path.
        config: the configuration of the run, stored in the checkpoint.
        step: number of completed steps.
        is_due: whether the next step that is not skipped must write the checkpoint.
    """

    model: ScoreModel
    optimizer: Optimizer
    ema: EMA
    power: PowerAverages | None
    precision: Precision
    guard: Guard
    path: Path
    config: Mapping[str, Any]
    step: int = 0
    is_due: bool = False

    def save(self, sums: Sums) -> None:
        """Write the checkpoint; every process must call this method, and the first one writes.

        Raises:
            NonFiniteLoss: a weight is not finite; the previous checkpoint stays.
        """
        moments, settings = checkpoint.pack_optimizer(self.optimizer)
        groups = {"model": self.model.state_dict(), "ema": self.ema.shadow, "optimizer": moments}
        if self.power is not None:
            groups |= self.power.groups()
        groups = {name: distributed.collect(group) for name, group in groups.items()}
        if distributed.anyone(not all(bool(torch.isfinite(x).all()) for x in groups["ema"].values())):
            raise NonFiniteLoss(f"the weights are not finite after step {self.step}. {self.guard.last_checkpoint}")
        info = {
            "step": self.step,
            "config": dict(self.config),
            "optimizer": settings,
            "log": sums,
            "scale": self.precision.scaler.state_dict(),
            "skipped": [self.guard.in_a_row, self.guard.total],
        }
        if distributed.rank() == 0:
            checkpoint.save(self.path, groups, info)
        distributed.gather(None)  # no process continues, or ends, before the file is written

    def resume(self) -> Sums:
        """Load the checkpoint if there is one; return the sums of the log's unfinished line.

        Raises:
            FileNotFoundError: other processes see the checkpoint, but this one does not.
            ValueError: the checkpoint belongs to another model or optimiser.
        """
        exists = self.path.exists()
        if distributed.anyone(exists) and not exists:
            raise FileNotFoundError(f"only other processes see {self.path}; use a directory that all of them share")
        if not exists:
            return {}
        groups, info = checkpoint.load(self.path)
        checkpoint.restore(self.model.state_dict(), groups.get("model", {}))
        self.ema.load(groups.get("ema", {}))
        if self.power is not None:
            self.power.load(groups)
        checkpoint.unpack_optimizer(self.optimizer, groups.get("optimizer", {}), info["optimizer"])
        if info.get("scale") and self.precision.scaler.is_enabled():
            self.precision.scaler.load_state_dict(info["scale"])
        self.guard.in_a_row, self.guard.total = info.get("skipped", (0, 0))
        self.step = int(info["step"])
        return info.get("log", {})
