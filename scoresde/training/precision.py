"""Mixed precision: which arithmetic a network's forward pass uses, and what keeps its gradients representable.

Weights, their averages and the optimiser stay in float32. Under "bf16" and "fp16" matrix products and convolutions run
in 16 bits (`torch.autocast`). float16 has too few exponents for gradients: the loss is multiplied by a scale, which is
halved when a gradient overflows and grows again when none does; the step that overflowed is left out.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The arithmetic of a training step.

    Args:
        name: "float32", "bf16" or "fp16".
        device: where the network is.

    Raises:
        ValueError: another name.
    """

    def __init__(self, name: str, device: torch.device):
        if name not in DTYPES:
            raise ValueError(f"precision among {', '.join(DTYPES)} expected; got {name!r}")
        self.name, self.device, self.dtype = name, device, DTYPES[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager:
        """Within the block the network runs in 16 bits, if it is to."""
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def backward(self, objective: Tensor) -> None:
        """Gradients of the objective, times the scale."""
        self.scaler.scale(objective).backward()

    def unscale(self, optimizer: Optimizer) -> None:
        """The gradients themselves."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer, finite: bool) -> None:
        """The optimiser's step, if the gradients are finite; and the scale of the next one."""
        if finite:
            self.scaler.step(optimizer)
        self.scaler.update()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self.scaler.state_dict()

    def load(self, state: dict[str, Any]) -> None:
        """Take it up again."""
        if self.scaler.is_enabled() and state:
            self.scaler.load_state_dict(state)
