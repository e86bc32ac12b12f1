"""What a training knows at a step, and its checkpoint: all that another process needs to go on bit for bit.

The weights, their averages, the optimiser's moments, the scale of mixed precision, the steps left out, and the sums of
the log's next line. Which samples come and what is drawn is not among them: both follow from (seed, step).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from scoresde.score import ScoreModel
from scoresde.training import checkpoint, distributed
from scoresde.training.distributed import collected, placed
from scoresde.training.ema import EMA
from scoresde.training.guard import Guard, NonFiniteLoss
from scoresde.training.posthoc import PowerAverages
from scoresde.training.precision import Precision

CHECKPOINT = "checkpoint.safetensors"
Pending = dict[str, list[float]]  # sums that the next line of the log is made of


class State:
    """A model in training, and all that belongs to it.

    Args:
        model, optimizer, ema, precision, guard: see there.
        power: averages for a profile that is chosen afterwards, or None.
        path: of the checkpoint.
    """

    def __init__(
        self,
        model: ScoreModel,
        optimizer: Optimizer,
        ema: EMA,
        power: PowerAverages | None,
        precision: Precision,
        guard: Guard,
        path: Path,
    ):
        self.model, self.optimizer, self.ema, self.power = model, optimizer, ema, power
        self.precision, self.guard, self.path = precision, guard, path
        self.step = 0
        self.is_due = False  # whether the checkpoint is to be written, as soon as a step is finite
        self.pending: Pending = {}

    def save(self, pending: Pending) -> None:
        """Write the checkpoint, once for all processes, which all have to call.

        Raises:
            NonFiniteLoss: weights are not finite; the checkpoint before stays.
        """
        moments, settings = checkpoint.pack_optimizer(self.optimizer)
        groups = {"model": self.model.state_dict(), "ema": self.ema.shadow, "optimizer": moments}
        if self.power is not None:
            groups |= self.power.groups()
        groups = {name: collected(group) for name, group in groups.items()}
        if distributed.anyone(not all(bool(torch.isfinite(x).all()) for x in groups["ema"].values())):
            raise NonFiniteLoss(f"the weights are not finite after step {self.step}. The last checkpoint is intact")
        info = {
            "step": self.step,
            "optimizer": settings,
            "log": pending,
            "scale": self.precision.state(),
            "skipped": [self.guard.in_a_row, self.guard.total],
        }
        if distributed.rank() == 0:
            checkpoint.save(self.path, groups, info)
        distributed.gather(None)  # nobody goes on, or ends, before it is there

    def resume(self) -> None:
        """Take up the checkpoint, if there is one.

        Raises:
            FileNotFoundError: only other processes see it.
            ValueError: it is that of another model or optimiser.
        """
        exists = self.path.exists()
        if distributed.anyone(exists) and not exists:
            raise FileNotFoundError(f"{self.path} is not there for every process: a directory that all see expected")
        if not exists:
            return
        groups, info = checkpoint.load(self.path)
        restore(self.model.state_dict(), groups.get("model", {}))
        restore(self.ema.shadow, groups.get("ema", {}))
        if self.power is not None:
            for name, group in self.power.groups().items():
                if name not in groups:
                    raise ValueError(f"{self.path} keeps no {name}: go on with the averages that the run began with")
                restore(group, groups[name])
        self._resume_optimizer(groups.get("optimizer", {}), info["optimizer"])
        self.precision.load(info.get("scale", {}))
        self.guard.in_a_row, self.guard.total = info.get("skipped", (0, 0))
        self.step, self.pending = int(info["step"]), info.get("log", {})

    def _resume_optimizer(self, moments: dict[str, Tensor], settings: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        found = {}
        for key, value in moments.items():
            if int(key.partition("/")[0]) >= len(parameters):
                raise ValueError(f"moments of {len(parameters)} parameters expected in {self.path}; it has more")
            like = parameters[int(key.partition("/")[0])]
            found[key] = placed(value, like) if value.shape == like.shape else value
        checkpoint.unpack_optimizer(self.optimizer, found, settings)


@torch.no_grad()
def restore(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Give the tensors, in place, the values of the same names.

    Raises:
        ValueError: other names or shapes; nothing is changed then.
    """
    shapes, found = ({name: tuple(x.shape) for name, x in group.items()} for group in (tensors, values))
    for name in [*shapes, *found]:
        if shapes.get(name) != found.get(name):
            raise ValueError(
                f"the checkpoint is that of another model: {name} {shapes.get(name, 'nothing')} expected, got "
                f"{found.get(name, 'nothing')}; take another directory for this one"
            )
    for name, tensor in tensors.items():
        tensor.copy_(placed(values[name], tensor))
