r"""A denoiser for quantised data: the network outputs logits over grey levels instead of a regression.

Uniformly dequantised data with K levels on [low, high] is uniform within the box of a level, of width
w = (high - low) / K. Given a noisy value y = x_t / alpha at noise s = sigma / alpha, level k with prior probability
pi_k has, exactly,

    posterior  p_k   \propto  pi_k L_k,    L_k = Phi((b_k - y) / s) - Phi((a_k - y) / s),    box k = [a_k, b_k],
    mean       m_k   =  y + s [phi((a_k - y) / s) - phi((b_k - y) / s)] / L_k,
    E[x_0 | y]       =  sum_k p_k m_k,

where Phi and phi are the distribution function and the density of the standard normal distribution. For data that are
the centres c_k of the boxes (models for `dequantization.TruncatedNormal` train on them), points replace the boxes:

    p_k   \propto  pi_k exp(-(y - c_k)^2 / (2 s^2)),        m_k  =  c_k.

The network only has to predict log pi_k from the other dimensions; the edges of the boxes, where the score of quantised
data varies fastest, enter in closed form at every noise level. The probability-weighted mean is the score interpolation
of categorical diffusion (2211.15089, section 3.1), with boxes or points in place of embeddings; logits for the
distribution of x_0 are the parameterisation of D3PM (2107.03006, section 3.3).
"""

import math

import torch
from torch import Tensor, nn

from scoresde.arguments import Levels, Positive, checked
from scoresde.configured import Configured
from scoresde.protocols import Condition, call_network
from scoresde.tensors import broadcast, double


@checked
class LevelHead(nn.Module, Configured):
    """Return E[x_0 | x_t] of quantised data, from a network that outputs logits over grey levels.

    Use it with the prediction type `predictions.Denoiser()`, which passes y = x/alpha and s = sigma/alpha unscaled.
    The inner network receives what EDM's networks do (2206.00364, table 1): y / (s^2 + sigma_data^2)^(1/2) as its input
    and log(s)/4 as its noise label.

    Args:
        network: the inner network; maps (B, C, *space) to logits (B, C K, *space), where channel c K + k holds grey
            level k of channel c.
        levels: number of grey levels K.
        low, high: range of the data in model space, see `data.Levels`.
        sigma_data: root mean square of the data, positive; scales the input of the inner network.
        data: the values that the network is trained on: "boxes", uniform within the interval of each grey level, or
            "points", the centres of the intervals.

    Raises:
        ValueError: an argument is out of its range; in a call, the logits have another shape.
    """

    casts_inputs = True  # the inner network may run in half precision, the closed form may not

    def __init__(
        self,
        network: nn.Module,
        levels: Levels,
        low: float = -1.0,
        high: float = 1.0,
        sigma_data: Positive = 0.5,
        data: str = "boxes",
    ):
        super().__init__()
        if data not in ("boxes", "points"):
            raise ValueError(f"data must be 'boxes' or 'points'; got {data!r}")
        if levels < 2 or not low < high or not sigma_data > 0:
            raise ValueError(
                f"levels >= 2, low < high and sigma_data > 0 are required; got levels={levels}, low={low}, "
                f"high={high}, sigma_data={sigma_data}"
            )
        self.conditions, self.shape = getattr(network, "conditions", []), getattr(network, "shape", None)
        self.network, self.levels, self.low, self.high, self.sigma_data = network, levels, low, high, float(sigma_data)
        self.data, self.likelihood = data, _boxes if data == "boxes" else _points

    def forward(self, y: Tensor, s: Tensor, cond: Condition = None) -> Tensor:
        """Return E[x_0 | y] (B, C, *space) at y = x_t / alpha (B, C, *space) and noise s = sigma / alpha (B,)."""
        dtype = y.dtype
        y, s = y.to(double(y)), s.to(double(y))
        scaled = y / broadcast(torch.hypot(s, torch.full_like(s, self.sigma_data)), y)
        logits = call_network(self.network, scaled.to(dtype), s.log() / 4, cond)
        expected = (y.shape[0], y.shape[1] * self.levels, *y.shape[2:])
        if logits.shape != expected:
            raise ValueError(
                f"logits must have shape {expected}, {self.levels} grey levels for each channel of the data; got "
                f"{tuple(logits.shape)}: give the inner network {expected[1]} output channels (out_channels)"
            )
        return self._denoise(y, s, logits.unflatten(1, (y.shape[1], self.levels)).movedim(2, -1)).to(dtype)

    def _denoise(self, y: Tensor, s: Tensor, logits: Tensor) -> Tensor:
        """Return sum_k p_k m_k of the module docstring.

        The sum is computed in float64 if the device has it: for large s, L_k is a small difference.
        """
        edges = torch.linspace(self.low, self.high, self.levels + 1, dtype=y.dtype, device=y.device)
        log_likelihood, means = self.likelihood(y[..., None], s.reshape(-1, *(1,) * y.ndim), edges)
        posterior = torch.softmax(logits.to(y.dtype) + log_likelihood, dim=-1)
        return (posterior * means).sum(dim=-1)


def _boxes(y: Tensor, s: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Return log L_k and m_k of the module docstring, each (B, C, *space, K), for y (B, C, *space, 1).

    `edges` (K + 1,) are the edges of the boxes.
    """
    z = (edges - y) / s
    log_box, log_density = _log_interval(z[..., :-1], z[..., 1:]), -0.5 * (z.square() + math.log(2 * math.pi))
    offset = torch.exp(log_density[..., :-1] - log_box) - torch.exp(log_density[..., 1:] - log_box)
    # The mean m_k lies in box k; far out in a tail the computed offset is only rounding error.
    return log_box, torch.clamp(y + s * offset, min=edges[:-1], max=edges[1:])


def _points(y: Tensor, s: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Return log N(y; c_k, s^2) up to a constant, (B, C, *space, K), and the centres c_k of the boxes, (K,).

    `edges` (K + 1,) are the edges of the boxes.
    """
    centres = (edges[:-1] + edges[1:]) / 2
    return -0.5 * ((y - centres) / s).square(), centres


def _log_interval(low: Tensor, high: Tensor) -> Tensor:
    """Return log(Phi(high) - Phi(low)) for low < high, without underflow in either tail."""
    upper_tail = low + high > 0
    near = torch.special.log_ndtr(torch.where(upper_tail, -low, high))
    far = torch.special.log_ndtr(torch.where(upper_tail, -high, low))
    return near + torch.log(-torch.expm1(far - near))
