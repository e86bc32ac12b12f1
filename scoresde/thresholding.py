r"""Thresholding: a score model whose prediction of the data is kept in the range of the data.

A network's E[x_0 | x_t] may leave the known range of the data, especially at high noise and under strong guidance.
Thresholding is a map T of that prediction. It is a property of the model rather than of each sampler: with
D = T(E[x_0 | x_t]), the predicted noise becomes (x - alpha D) / sigma, and every other view follows from the two,

    score = -noise / sigma,        velocity = alpha' D + sigma' noise,

so that alpha D + sigma noise = x as before. Every view is d D + n noise with its own coefficients d and n (see
`scoresde.views`). To avoid rounding, it is not computed from D in the dtype of the state, but as the view of the inner
model, shifted by the change D - E[x_0 | x_t] of the prediction,

    d D + n noise  =  (d E[x_0 | x_t] + n E[eps | x_t]) + (d - n alpha/sigma) (D - E[x_0 | x_t]).

Where the prediction is in the range, the view equals that of the inner model to the last digit.

Thresholding is for samplers. The velocity is no longer that of a score: where T holds D at a bound, the flow from data
to noise multiplies the distance to that bound by sigma(t)/sigma(t_min). `log_prob`, `encode` and `decode` therefore
need the inner model (`.model`). The evidence bounds of `scoresde.bounds` hold for any denoiser, and accept a
thresholded model. Apply thresholding outermost: around guidance, not inside it.
"""

import math

import torch
from torch import Tensor

from scoresde.arguments import checked
from scoresde.protocols import Model
from scoresde.views import ShiftedViews, Views
from scoresde.wrappers import ModelWrapper


@checked
class Thresholded(ModelWrapper):
    """A score model with a thresholded prediction of the data. A subclass defines `threshold`.

    Args:
        model: the model, already wrapped in guidance if guidance is used.
        low, high: the range of the data, in the model's space.

    Raises:
        TypeError: `model` has no `sde` or no `predict`.
        ValueError: low or high is not finite, or low >= high.
    """

    def __init__(self, model: Model, low: float = -1.0, high: float = 1.0):
        super().__init__(model)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"low and high must be finite, with low < high; got {low=}, {high=}")
        self.low, self.high = float(low), float(high)

    @property
    def density(self) -> None:
        """None: the flow is not invertible where the prediction is held at a bound."""

    def threshold(self, denoised: Tensor) -> Tensor:
        """Apply the map T of the module docstring to a prediction (B, *), separately for each sample."""
        raise NotImplementedError(f"{type(self).__name__} must define threshold(denoised)")

    def predict(self, x: Tensor, t: Tensor | float) -> Views:
        """Return the views of the thresholded prediction, from one evaluation of the inner model at x (B, *) and t."""
        views = self.model.predict(x, t)
        denoised = views.denoised
        return ShiftedViews(views, denoised, self.threshold(denoised))

    def extra_repr(self) -> str:
        return f"low={self.low:g}, high={self.high:g}"


class Clipped(Thresholded):
    """D = min(max(E[x_0 | x_t], low), high), "static thresholding" (2205.11487, section 2.3).

    Args:
        model: the model, already wrapped in guidance if guidance is used.
        low, high: the range of the data, in the model's space.

    Raises:
        TypeError: `model` has no `sde` or no `predict`.
        ValueError: low or high is not finite, or low >= high.
    """

    def threshold(self, denoised: Tensor) -> Tensor:
        """Clip to [low, high]."""
        return denoised.clamp(self.low, self.high)


@checked
class DynamicThresholding(Thresholded):
    """Clip each sample at a quantile of its values, and scale it back into the range (2205.11487, section 2.3).

    With m the middle and h half the width of the range, and s the larger of h and the quantile of |E[x_0 | x_t] - m|
    over the dimensions of the sample,

        D = m + (h/s) clip(E[x_0 | x_t] - m, -s, s).

    Args:
        model: the model, already wrapped in guidance if guidance is used.
        quantile: probability of the quantile, in (0, 1]; 1 scales without clipping.
        low, high: the range of the data, in the model's space.

    Raises:
        TypeError: `model` has no `sde` or no `predict`.
        ValueError: low or high is not finite, low >= high, or quantile is not in (0, 1].
    """

    def __init__(self, model: Model, quantile: float = 0.995, low: float = -1.0, high: float = 1.0):
        super().__init__(model, low, high)
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile must be in (0, 1]; got {quantile}")
        self.quantile = float(quantile)

    def threshold(self, denoised: Tensor) -> Tensor:
        """Clip each sample to [m - s, m + s], and scale it by h/s about m; letters as in the class docstring."""
        middle, half = 0.5 * (self.low + self.high), 0.5 * (self.high - self.low)
        extent = quantile((denoised - middle).abs().flatten(1), self.quantile).clamp(min=half)
        extent = extent.reshape(-1, *[1] * (denoised.ndim - 1))
        clipped = denoised.clamp(middle - extent, middle + extent)
        scaled = torch.lerp(clipped, clipped.new_full((), middle), 1 - half / extent)  # unchanged where extent = half
        return scaled.clamp(self.low, self.high)

    def extra_repr(self) -> str:
        return f"quantile={self.quantile:g}, {super().extra_repr()}"


def quantile(values: Tensor, q: float) -> Tensor:
    """Return the quantile (B,) of each row of values (B, n), with linear interpolation.

    `torch.quantile` gives the same, but accepts at most 2^24 values and no half precision.
    """
    position = q * (values.shape[1] - 1)
    below = math.floor(position)
    top = values.topk(values.shape[1] - below, dim=1).values  # in descending order, down to the value at that position
    return torch.lerp(top[:, -1], top[:, max(top.shape[1] - 2, 0)], position - below)
