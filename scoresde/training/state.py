"""The state of a training run and its checkpoint: everything that a new process needs to continue bit for bit.

The training state is the weights, their averages, the optimiser's moments, the loss scale of mixed precision, the
number of skipped steps, and the sums of the log's unfinished line. The samples and random draws of a step are not part
of it: they are functions of (seed, step).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from scoresde.score import ScoreModel
from scoresde.training import checkpoint, distributed
from scoresde.training.checkpoint import check_like, is_finite
from scoresde.training.ema import EMA
from scoresde.training.guard import Guard, NonFiniteLoss
from scoresde.training.posthoc_ema import PowerAverages
from scoresde.training.precision import Precision

CHECKPOINT = "checkpoint.safetensors"
FORMAT = 2  # of the information; checkpoints of older versions lack it, and some of the other keys
KEYS = ("step", "config", "optimizer", "log", "scale", "skipped")
Sums = dict[str, list[float]]  # see `Log.total`


@dataclass
class State:
    """A model in training, with everything that changes during training.

    Args:
        model, optimizer, ema, precision, guard: see their classes.
        loss: the objective, whose parameters, if it has any, are trained too.
        power: power-function averages, whose width is chosen after training; or None.
        path: the checkpoint's path.
        config: the configuration of the run, stored in the checkpoint.
        step: number of completed steps.
        is_due: whether the next step that is not skipped must write the checkpoint.
    """

    model: ScoreModel
    loss: nn.Module
    optimizer: Optimizer
    ema: EMA
    power: PowerAverages | None
    precision: Precision
    guard: Guard
    path: Path
    config: Mapping[str, Any]
    step: int = 0
    is_due: bool = False
    masks: set[str] = field(init=False)  # buffers that are infinite by design

    def __post_init__(self) -> None:
        self.masks = {f"model/{name}" for name, x in self.model.named_buffers() if not is_finite(x)}

    def save(self, sums: Sums) -> None:
        """Write the checkpoint; every process must call this method, and the first one writes.

        Raises:
            NonFiniteLoss: a weight, buffer or moment is not finite; the previous checkpoint stays.
        """
        moments, settings = checkpoint.pack_optimizer(self.optimizer)
        groups = {"model": self.model.state_dict(), "ema": self.ema.shadow, "optimizer": moments}
        if parts := self.loss.state_dict():
            groups["loss"] = parts
        if self.power is not None:
            groups |= self.power.groups()
        groups = {name: distributed.collect(group) for name, group in groups.items()}
        names = (f"{group}/{name}" for group, part in groups.items() for name, x in part.items() if not is_finite(x))
        broken = next((name for name in names if name not in self.masks), None)
        if distributed.anyone(broken is not None):
            where = f" ({broken})" if broken else ""
            raise NonFiniteLoss(
                f"the weights are not finite after step {self.step}{where}. {self.guard.last_checkpoint}"
            )
        info = {
            "format": FORMAT,
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
            FileNotFoundError: other processes see the checkpoint, this one does not.
            ValueError: the checkpoint is damaged, or belongs to another model or optimiser.
        """
        exists = self.path.exists()
        if distributed.anyone(exists) and not exists:
            raise FileNotFoundError(f"only other processes see {self.path}; use a directory that all of them share")
        if not exists:
            return {}
        groups, info = checkpoint.load(self.path, needed=("model", "ema"), keys=("step", "optimizer"))
        if "format" in info and (missing := [key for key in KEYS if key not in info]):
            raise ValueError(f"{self.path} has no {missing[0]!r}: it is incomplete")
        if wrong := [key for key in ("config", "optimizer", "log", "scale") if not isinstance(info.get(key, {}), dict)]:
            raise ValueError(f"{wrong[0]!r} in {self.path} must be a mapping; got {info[wrong[0]]!r}")
        step, skipped, scale = info["step"], info.get("skipped", [0, 0]), info.get("scale")
        check_like(f"the skipped steps in {self.path}", skipped, [0, 0])
        checkpoint.restore(self.model.state_dict(), groups["model"])
        checkpoint.restore(self.loss.state_dict(), groups.get("loss", {}))
        self.ema.load(groups["ema"])
        if self.power is not None:
            self.power.load(groups)
        moments, made = groups.get("optimizer", {}), step - skipped[1]
        checkpoint.unpack_optimizer(self.optimizer, moments, info["optimizer"], made)
        if scale and self.precision.scaler.is_enabled():
            check_like(f"the loss scale in {self.path}", scale, self.precision.scaler.state_dict())
            self.precision.scaler.load_state_dict(scale)
        self.guard.in_a_row, self.guard.total = skipped
        self.step = step
        return info.get("log", {})
