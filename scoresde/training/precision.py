"""Mixed precision: the arithmetic of the network's forward pass, and the scale that keeps float16 gradients nonzero.

Weights, averages and the optimiser stay in float32. Under "bf16" and "fp16" matrix products and convolutions run in
16 bits (`torch.autocast`). The range of float16 is too narrow for gradients: the loss is multiplied by a scale, which
is halved when a gradient overflows (the step is then skipped) and doubled after many steps without an overflow.
"""

import contextlib

import torch

DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The arithmetic of a training step; `scaler` is a `torch.amp.GradScaler`, enabled for "fp16" only.

    Args:
        name: "float32", "bf16" or "fp16".
        device: the network's device.

    Raises:
        ValueError: the name is unknown.
    """

    def __init__(self, name: str, device: torch.device):
        if name not in DTYPES:
            raise ValueError(f"precision must be one of {', '.join(DTYPES)}; got {name!r}")
        self.device, self.dtype = device, DTYPES[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return a context in which the network runs in 16 bits under "bf16" and "fp16"."""
        return contextlib.nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype)
