"""The base class of guided models: a strength, and the interval of noise levels in which it acts."""

from typing import Any, Self

import torch
from torch import Tensor

from scoresde.protocols import Model, select
from scoresde.sdes import checked_times
from scoresde.tensors import float64, floating
from scoresde.views import Views
from scoresde.wrappers import ModelWrapper

Interval = tuple[float, float]


class Guided(ModelWrapper):
    """A model with guidance of a strength `scale` within an interval of noise levels; a subclass defines `guide`.

    Args:
        model: the model to guide.
        scale: the strength of the guidance: a number, or a tensor (B,) with one number per sample.
        interval: the noise levels (low, high) of sigma/alpha with guidance; None for all.

    Raises:
        TypeError: `model` has no `sde` or no `predict`.
        ValueError: the scale is not finite or has another shape; the interval is not 0 <= low < high.
    """

    def __init__(self, model: Model, scale: float | Tensor = 1.0, interval: Interval | None = None):
        super().__init__(model)
        scale = float64(scale)
        if scale.ndim > 1 or not bool(torch.isfinite(scale).all()):
            raise ValueError(f"scale must be a finite number, or one for each sample; got {scale.tolist()}")
        self.scale = scale
        if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1]):
            raise ValueError(f"interval must be (low, high) of sigma/alpha with 0 <= low < high; got {interval}")
        self.interval = None if interval is None else (float(interval[0]), float(interval[1]))

    @property
    def density(self) -> str | None:
        """Name of the guided model with its settings (`BaseModel.density`); None if `model` has no name."""
        inner = self.model.density
        return None if inner is None else f"{type(self).__name__}({inner}, {self._settings()})"

    def _settings(self) -> str:
        scales = sorted({round(float(s), 6) for s in self.scale.flatten()})
        scale = f"{scales[0]:g}" if len(scales) == 1 else f"{scales[0]:g} to {scales[-1]:g}"
        within = "" if self.interval is None else ", sigma/alpha in [{:g}, {:g}]".format(*self.interval)
        return f"scale={scale}{within}"

    def recorded_arguments(self) -> dict[str, Any]:
        """Return the arguments of the constructor by name, with the scales of the samples that the model is for."""
        return {name: self.scale if name == "scale" else value for name, value in super().recorded_arguments().items()}

    def predict(self, x: Tensor, t: Tensor | float) -> Views:
        """Return the views (`scoresde.views`) with guidance at x (B, *) and t () or (B,)."""
        x, t = floating(x), checked_times(self.sde, t)
        scale = self.scale.to(t.device)
        if scale.ndim and len(scale) != len(x):
            raise ValueError(f"scale must have one number for each of the {len(x)} samples; got {len(scale)}")
        if self.interval is not None:
            level, (low, high) = torch.exp(-0.5 * self.sde.log_snr(t)), self.interval
            scale = torch.where((low <= level) & (level <= high), scale, 0.0)
        return self.guide(x, t, scale) if bool((scale != 0).any()) else self.model.predict(x, t)

    def guide(self, x: Tensor, t: Tensor, scale: Tensor) -> Views:
        """Return the views with guidance; `scale`, float64 () or (B,), is 0 for samples without guidance."""
        raise NotImplementedError(f"{type(self).__name__} must define guide(x, t, scale)")

    def rows(self, rows: Tensor | slice, count: int) -> Self:
        """Return the model with only the scales of the samples with indices `rows` of a batch of `count`."""
        guided = super().rows(rows, count)
        if self.scale.ndim:
            guided = guided if guided is not self else self.__copy__()
            guided.scale = select(self.scale, rows, count)  # type: ignore[assignment]
        return guided
