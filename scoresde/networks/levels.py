r"""A denoiser that knows its data is quantised: logits over grey levels instead of a regression.

Uniformly dequantised data with K levels on [low, high] has the density of a level's box, of width w = (high - low) / K,
times the probability of the level. Given a noisy value y = x_t / alpha at noise s = sigma / alpha, level k with prior
probability pi_k has, exactly,

    posterior  p_k   \propto  pi_k L_k,    L_k = Phi((b_k - y) / s) - Phi((a_k - y) / s),    box k = [a_k, b_k],
    mean       m_k   =  y + s [phi((a_k - y) / s) - phi((b_k - y) / s)] / L_k,
    E[x_0 | y]       =  sum_k p_k m_k.

Data on the centres c_k of the boxes, which `dequantization.TruncatedNormal` measures, has points in the place of boxes,

    p_k   \propto  pi_k exp(-(y - c_k)^2 / (2 s^2)),        m_k  =  c_k.

So the network has to say only what the other dimensions tell about this one, log pi_k; the edges of the boxes, where
the score of quantised data varies fastest, are in closed form at every noise level. The probability-weighted mean is
the score interpolation of categorical diffusion (2211.15089, section 3.1), with boxes or points for its embeddings;
predicting the distribution of x_0 by logits is the parameterisation of D3PM (2107.03006, section 3.3).
"""

import math

import torch
from torch import Tensor, nn

from scoresde.protocols import Condition
from scoresde.tensors import broadcast, double


class LevelHead(nn.Module):
    """E[x_0 | x_t] of quantised data, from a network that outputs logits over levels.

    The prediction type of the model around it is `predictions.Denoiser()`, which passes y and s themselves. The network
    inside reads them as a network of EDM does (2206.00364, table 1): y / (s^2 + sigma_data^2)^(1/2), and log(s)/4 for
    its noise label.

    Args:
        network: from (B, C, *space) to logits (B, C K, *space), channel c K + k holding level k of channel c.
        levels: number of levels K.
        low, high: the range of the data in model space (`data.Levels`).
        sigma_data: scale of the data (root mean square), positive, for the inner network's input.
        data: "boxes", each level spread over its interval, or "points", at its centre: what the network is trained on.

    Raises:
        ValueError: an argument out of its range; in a call, logits of another shape.
    """

    def __init__(
        self,
        network: nn.Module,
        levels: int,
        low: float = -1.0,
        high: float = 1.0,
        sigma_data: float = 0.5,
        data: str = "boxes",
    ):
        super().__init__()
        if data not in ("boxes", "points"):
            raise ValueError(f"data of 'boxes' or 'points' expected; got {data!r}")
        if levels < 2 or not low < high or not sigma_data > 0:
            raise ValueError(
                f"levels >= 2, low < high and sigma_data > 0 expected; got {levels}, [{low}, {high}], {sigma_data}"
            )
        self.network, self.levels, self.low, self.high, self.sigma_data = network, levels, low, high, float(sigma_data)
        self.data = data

    def forward(self, y: Tensor, s: Tensor, cond: Condition = None) -> Tensor:
        """E[x_0 | y] (B, C, *space) at y = x_t / alpha (B, C, *space) and noise s = sigma / alpha (B,)."""
        dtype = y.dtype
        y, s = y.to(double(y)), s.to(double(y))
        scaled = y / broadcast(torch.hypot(s, torch.full_like(s, self.sigma_data)), y)
        logits = self.network(scaled.to(dtype), (s.log() / 4).to(dtype), cond)
        expected = (y.shape[0], y.shape[1] * self.levels, *y.shape[2:])
        if logits.shape != expected:
            raise ValueError(f"logits {expected} over {self.levels} levels expected; got {tuple(logits.shape)}")
        return self._denoise(y, s, logits.unflatten(1, (y.shape[1], self.levels)).movedim(2, -1)).to(dtype)

    def _denoise(self, y: Tensor, s: Tensor, logits: Tensor) -> Tensor:
        """sum_k p_k m_k, in float64 where there is one: L_k is a small difference wherever s is large."""
        edges = torch.linspace(self.low, self.high, self.levels + 1, dtype=y.dtype, device=y.device)
        likelihood = _boxes if self.data == "boxes" else _points
        log_likelihood, means = likelihood(y[..., None], s.reshape(-1, *(1,) * y.ndim), edges)
        posterior = torch.softmax(logits.to(y.dtype) + log_likelihood, dim=-1)
        return (posterior * means).sum(dim=-1)


def _boxes(y: Tensor, s: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """(log L_k, m_k), each (B, C, *space, K), of the boxes between the edges (K + 1,) at y (B, C, *space, 1)."""
    z = (edges - y) / s
    log_box, log_density = _log_interval(z[..., :-1], z[..., 1:]), -0.5 * (z.square() + math.log(2 * math.pi))
    offset = torch.exp(log_density[..., :-1] - log_box) - torch.exp(log_density[..., 1:] - log_box)
    # A mean lies in its box; far out in a tail the difference that gives it is all rounding.
    return log_box, torch.clamp(y + s * offset, min=edges[:-1], max=edges[1:])


def _points(y: Tensor, s: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """(log N(y; c_k, s^2) up to a constant (B, C, *space, K), c_k (K,)), c_k midway between the edges (K + 1,)."""
    centres = (edges[:-1] + edges[1:]) / 2
    return -0.5 * ((y - centres) / s).square(), centres


def _log_interval(low: Tensor, high: Tensor) -> Tensor:
    """log(Phi(high) - Phi(low)) for low < high, without underflow in either tail."""
    upper_tail = low + high > 0
    near = torch.special.log_ndtr(torch.where(upper_tail, -low, high))
    far = torch.special.log_ndtr(torch.where(upper_tail, -high, low))
    return near + torch.log(-torch.expm1(far - near))
