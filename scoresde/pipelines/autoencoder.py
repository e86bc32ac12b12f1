r"""Autoencoders as latent-variable models: a Gaussian q(z | x), and a density p(x | z) of the decoder's output.

With a prior p(z) of the latents, the log-likelihood of x has the bound (Kingma and Welling, 1312.6114, eq. 3)

    log p(x) >= E_{z ~ q(z | x)} [ log p(x | z) + log p(z) - log q(z | x) ],

with equality if q(z | x) is the posterior p(z | x) of the model. An `Autoencoder` is trained with the prior N(0, I)
(`pipelines.autoencoder_objective`); a diffusion of its latents then takes the place of that prior (`pipelines.latent`).

Densities p(x | z) for values x in the model space of the images, with m and s the mean and scale for each value:

| class         | log p(x | z), summed over the values                                                                 |
| ------------- | ---------------------------------------------------------------------------------------------------- |
| `Normal`      | log N(x; m, s^2)                                                                                     |
| `GreyLevels`  | log [F((b - m)/s) - F((a - m)/s)] - log(b - a), for x in the cell [a, b) of a grey level; F logistic |

`GreyLevels` is the discretised logistic distribution (1701.05517, section 2.1) as a density that is constant on the
cell of each grey level. Dequantised levels thus have the probability of the level itself, and uniform dequantisation
costs nothing. F is 0 below the first cell and 1 above the last.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.arguments import Few, checked
from scoresde.configured import Configured
from scoresde.random_stream import RandomStream
from scoresde.tensors import check_instance, float64, sum_dims


class Density(Protocol):
    """The interface of the density p(x | z) of a decoder, such as `Normal` and `GreyLevels`."""

    def canonical(self, x: Tensor) -> Tensor:
        """Return the value (B, *) that stands for x in the encoder; equal for all x of the same density."""

    def bounded(self, mean: Tensor) -> Tensor:
        """Return the mean of p(x | z), (B, *), for the output of the decoder's network."""

    def log_prob(self, x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        """Return log p(x | z) of each value, (B, *), in the dtype of x."""


class Normal(Configured):
    """The density of a decoder for continuous values: log p(x | z) = sum over the values of log N(x; mean, scale^2).

    Mean and scale of each value come from the decoder.
    """

    def canonical(self, x: Tensor) -> Tensor:
        return x

    def bounded(self, mean: Tensor) -> Tensor:
        return mean

    def log_prob(self, x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        scaled = (x - mean) * torch.exp(-log_scale)
        return -0.5 * scaled.square() - log_scale - 0.5 * math.log(2 * math.pi)

    def __str__(self) -> str:
        return "normal"


@checked
class GreyLevels(Configured):
    """The density of a decoder for grey levels: a discretised logistic distribution (1701.05517, section 2.1).

        log p(x | z) = sum over the values of log [F((b - m)/s) - F((a - m)/s)] - log(b - a),

    for x in the cell [a, b) of its grey level, with mean m and scale s from the decoder, and F the logistic function,
    set to 0 below the first cell and to 1 above the last. The `levels` cells fill [low, high].

    Args:
        levels: number of grey levels.
        low, high: the range of the images in model space.

    Raises:
        ValueError: low < high does not hold.
    """

    def __init__(self, levels: Few = 256, low: float = -1.0, high: float = 1.0):
        if not low < high:
            raise ValueError(f"low must be below high; got {low=}, {high=}")
        self.levels, self.low, self.width = levels, float(low), (float(high) - float(low)) / levels

    def _cell(self, x: Tensor) -> Tensor:
        """Return the index of the grey level of x, as a floating-point number."""
        rounding = 4 * self.levels * torch.finfo(x.dtype).eps  # the value of a level may lie slightly below its cell
        return ((x - self.low) / self.width + rounding).floor().clamp(0, self.levels - 1)

    def canonical(self, x: Tensor) -> Tensor:
        """Return the centres of the cells."""
        return self.low + self.width * (self._cell(x) + 0.5)

    def bounded(self, mean: Tensor) -> Tensor:
        """Bound the mean smoothly to two levels beyond the range, because the outer cells are open."""
        half = 0.5 * self.levels * self.width
        centre = self.low + half
        return centre + (half + 2 * self.width) * torch.tanh((mean - centre) / half)

    def log_prob(self, x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        cell, precision = self._cell(x), torch.exp(-log_scale)
        lower = (self.low + self.width * cell - mean) * precision
        width = self.width * precision
        upper = lower + width
        # F(u) - F(l) = F(u) F(-l) (1 - e^(l - u)), without cancellation
        inside = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-width))
        first, last = cell == 0, cell == self.levels - 1
        ends = torch.where(first, F.logsigmoid(upper), F.logsigmoid(-lower))
        return torch.where(first | last, ends, inside) - math.log(self.width)

    def __str__(self) -> str:
        return f"discretised logistic, {self.levels} levels"


@dataclass(frozen=True)
class Posterior:
    """q(z | x), a normal distribution with independent dimensions: mean and log std, (B, *) each."""

    mean: Tensor
    log_std: Tensor

    def sample(self, stream: RandomStream) -> tuple[Tensor, Tensor]:
        """Draw z (B, *), differentiable in mean and log std; also return log q(z | x) in nats, float64 (B,)."""
        noise = stream.normal(self.mean)
        return self.mean + self.log_std.exp() * noise, self._log_q(noise)

    def _log_q(self, noise: Tensor) -> Tensor:
        terms = -0.5 * float64(noise).square() - float64(self.log_std) - 0.5 * math.log(2 * math.pi)
        return sum_dims(terms)

    def divergence(self) -> Tensor:
        """Return KL(q || N(0, I)) in nats, (B,)."""
        return 0.5 * sum_dims(self.mean.square() + torch.exp(2 * self.log_std) - 1 - 2 * self.log_std)


class Decoded(NamedTuple):
    """log p(x | z) in nats (B,), and the mean of p(x | z), the reconstruction (B, *)."""

    log_prob: Tensor
    mean: Tensor


class Autoencoder(nn.Module):
    """q(z | x) and p(x | z) of a network. The model has no diffusion: `sde` is None.

    Args:
        network: a module with `encode`, `decode`, `shape` and `latent_shape`, such as
            `networks.ConvolutionalAutoencoder`. If its decoder gives no log scale, this class has one for each channel.
        density: the density of the decoder, `Normal()` or `GreyLevels(...)`.
        log_scale: initial log scale for each channel; unused if the decoder gives log scales.

    Raises:
        TypeError: the network has no `encode` or `decode`, or the density no `log_prob`.
    """

    def __init__(self, network: nn.Module, density: Density | None = None, log_scale: float = -2.0):
        super().__init__()
        check_instance("network", network, "encode", "decode")
        self.sde = None
        density = Normal() if density is None else density
        check_instance("density", density, "log_prob", "canonical", "bounded")
        self.network, self.density = network, density
        self.shape, self.latent_shape = tuple(network.shape), tuple(network.latent_shape)  # type: ignore[arg-type]
        is_given = bool(getattr(network, "scales", False))
        self.log_scale = None if is_given else nn.Parameter(torch.full((self.shape[0],), float(log_scale)))

    def encode(self, x: Tensor) -> Posterior:
        """Return q(z | x) for values x (B, *shape) in the model space of the images."""
        return Posterior(*self.network.encode(self._cast(self.density.canonical(x))))  # type: ignore[operator]

    def decode(self, z: Tensor) -> Tensor:
        """Return the mean of p(x | z), (B, *shape)."""
        return self._decoded(z)[0]

    def likelihood(self, x: Tensor, z: Tensor) -> Decoded:
        """Return log p(x | z) and the mean of p(x | z) for values x and latents z; computed in the dtype of x."""
        mean, log_scale = self._decoded(z)
        return Decoded(sum_dims(self.density.log_prob(x, mean.to(x.dtype), log_scale.to(x.dtype))), mean)

    def _decoded(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self.network.decode(self._cast(z))  # type: ignore[operator]
        if self.log_scale is not None:
            log_scale = self.log_scale.reshape(-1, *[1] * (mean.ndim - 2)).expand_as(mean)
        return self.density.bounded(mean), log_scale

    def _cast(self, x: Tensor) -> Tensor:
        parameter = next(self.parameters(), None)
        return x if parameter is None else x.to(parameter.dtype)
