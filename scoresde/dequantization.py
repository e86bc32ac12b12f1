r"""Dequantisation: from grey levels to a density, so that discrete data has bits.

Level k is the interval [k, k + 1). A density p over the continuous values bounds the probability of the levels x by
(Theis et al., 1511.01844, section 3.1; Ho et al., 1902.00275, section 3.1)

    log P(x) >= E_{u ~ q(u|x)} [log p(x + u) - log q(u|x)],        u in [0, 1)^d,

with equality where q is p itself, restricted to the cell of x:

| class             | q(u|x)                                                      | trained on      | the point is |
| ----------------- | ----------------------------------------------------------- | --------------- | ------------ |
| `Uniform`         | 1                                                           | x + u           | x(t_min)     |
| `TruncatedNormal` | the diffusion's own noise around the centre, up to the edge | centres x + 1/2 | x(t), t > 0  |
| `Variational`     | a normalising flow, learned for a trained model             | x + u           | x(t_min)     |

A network is measured where it was trained: `training_values` is what it sees, `start` the time it is measured from.

A `DataMap` is a dequantisation and a transform T in one: from data to states of a model, what that costs, and back.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.networks.layers import convolution, linear
from scoresde.protocols import Transform
from scoresde.random_stream import RandomStream
from scoresde.sdes import SDE
from scoresde.tensors import dimensions, double, float64, sum_dims


class Dequantization(Protocol):
    """What training and likelihood ask of a dequantisation; `str` of it is printed among the conventions."""

    def sample(self, images: Tensor, stream: RandomStream) -> tuple[Tensor, Tensor]:
        """(values x + u (B, *) in [x, x + 1), log q(u | x) in nats (B,)) of levels x (B, *): in the dtype of
        floating-point levels, or in float64."""
        ...

    def training_values(self, images: Tensor, stream: RandomStream) -> Tensor:
        """The values (B, *) that a network to be measured this way is trained on."""
        ...

    def start(self, sde: SDE, transform: Transform) -> float | None:
        """The time t at which alpha(t) T(values) is a state of the diffusion; None takes T(values) as x(t_min)."""
        ...


class DataMap:
    """From data to states of a model and back, and what that costs in nats.

    A state is y = T(values), the values being the data itself, or levels that are dequantised; alpha(t) y where the
    dequantisation says that it is a state at a time t > 0. In expectation over draws, with the nats that `draw` gives,

        log p(data)  >=  log p(state) + nats,        nats = log|det dT| - log q(u | data) + d log alpha(t),

    with equality for continuous data. A state may have another shape than its data.

    Args:
        transform: T.
        dequantization: of integer levels; None for continuous data.
    """

    def __init__(self, transform: Transform, dequantization: Dequantization | None = None):
        self.transform, self.dequantization = transform, dequantization

    def start(self, sde: SDE) -> float | None:
        """The time at which `draw` gives states; None takes them as x(t_min)."""
        return None if self.dequantization is None else self.dequantization.start(sde, self.transform)

    def draw(self, data: Tensor, stream: RandomStream, sde: SDE) -> tuple[Tensor, Tensor]:
        """A state (B, *) of the data (B, *), and its nats (B,), float64."""
        if self.dequantization is None:
            values, nats = data, self.transform.log_det(data)
        else:
            values, log_q = self.dequantization.sample(data, stream)
            nats = self.transform.log_det(values) - log_q
        state = self.transform(values)
        if (start := self.start(sde)) is not None:
            alpha = sde.alpha(float64(start)).detach()
            state, nats = float(alpha) * state, nats + dimensions(state) * float(alpha.log())
        return state, float64(nats)

    def training_states(self, data: Tensor, stream: RandomStream) -> Tensor:
        """The clean states (B, *) that a network is trained on, of floating-point data (B, *) and in its dtype."""
        if self.dequantization is not None:
            data = self.dequantization.training_values(data, stream)
        return self.transform(data)

    def inverse(self, state: Tensor) -> Tensor:
        """The values (B, *) of a state (B, *), not rounded to levels."""
        return self.transform.inverse(state)

    def __str__(self) -> str:
        return str(self.transform)


def levels_map(transform: Transform | DataMap, dequantization: Dequantization | None) -> DataMap:
    """The data map of integer levels: uniform dequantisation unless another one is given.

    Raises:
        ValueError: a `DataMap` with a dequantisation beside it, or without one in it.
    """
    if not isinstance(transform, DataMap):
        return DataMap(transform, dequantization or Uniform())
    if dequantization is not None or transform.dequantization is None:
        raise ValueError(
            "a DataMap with a dequantisation, and no other beside it, expected for bits; got "
            f"DataMap(dequantization={transform.dequantization}) and dequantization={dequantization}"
        )
    return transform


class Uniform:
    """u uniform on [0, 1)^d, log q = 0."""

    def sample(self, images: Tensor, stream: RandomStream) -> tuple[Tensor, Tensor]:
        """(images + u (B, *), log q(u | images) in nats (B,)); noise draws u."""
        levels = _floating(images)
        return levels + stream.uniform(levels), levels.new_zeros(len(levels))

    def training_values(self, images: Tensor, stream: RandomStream) -> Tensor:
        """images + u, (B, *)."""
        return self.sample(images, stream)[0]

    def start(self, sde: SDE, transform: Transform) -> None:
        """None: the point is taken as x(t_min), the convention of 2011.13456's code."""

    def __str__(self) -> str:
        return "uniform"


class TruncatedNormal:
    r"""u = 1/2 + z / (2 tau), z normal restricted to [-tau, tau): the noise of the diffusion itself, inside the level.

    A network trained on the centres of the levels knows x(t) = alpha T(x + 1/2) + sigma eps. At the time where
    sigma/alpha is s = 1/(2 tau) of a level's width, x(t) = alpha T(x + u) with u ~ N(1/2, s^2) is inside the level but
    for a probability of erfc(tau / 2^(1/2)) per dimension; the rest, restricted to it, is q, with the density

        log q(u|x) = -|z|^2 / 2 - d log[(2 pi)^(1/2) s erf(tau / 2^(1/2))].

    So training and evaluation see the same states, and nothing of the diffusion below t has to be learned (Zheng et
    al., 2305.03935, where tau = alpha / (256 sigma) at the end of the schedule is about 3 for 8 bits on [-1, 1]).
    Even for a perfect model the bound is off by -log erf(tau / 2^(1/2)) nats per dimension: 0.0027 at tau = 3.

    Args:
        tau: half the width of a level in standard deviations of the noise; larger is an earlier time.

    Raises:
        ValueError: tau that is not a positive number.
    """

    def __init__(self, tau: float = 3.0):
        if not 0 < tau < math.inf:
            raise ValueError(f"a positive, finite tau expected; got tau={tau}")
        self.tau = float(tau)

    def sample(self, images: Tensor, stream: RandomStream) -> tuple[Tensor, Tensor]:
        """(images + u (B, *), log q(u | images) in nats (B,)); noise draws u, by the inverse cdf."""
        levels = _floating(images)
        tail = 0.5 * math.erfc(self.tau / math.sqrt(2))
        z = torch.special.ndtri(tail + (1 - 2 * tail) * stream.uniform(levels)).clamp(-self.tau, self.tau)
        log_scale = 0.5 * math.log(2 * math.pi) - math.log(2 * self.tau) + math.log(math.erf(self.tau / math.sqrt(2)))
        return _within(levels, 0.5 + z / (2 * self.tau)), sum_dims(-0.5 * z.square() - log_scale).to(z)

    def training_values(self, images: Tensor, stream: RandomStream) -> Tensor:
        """images + 1/2, (B, *), the centres of the levels; nothing is drawn."""
        return _floating(images) + 0.5

    def start(self, sde: SDE, transform: Transform) -> float:
        """The time at which sigma/alpha is 1/(2 tau) of a level's width in model space.

        Raises:
            ValueError: a transform that is not affine (levels of different widths), or an SDE whose noise at t_min is
                above that, or at t_max below.
        """
        width = _level_width(transform)
        ratio = width / (2 * self.tau)
        clean, noisy = torch.exp(-0.5 * sde.log_snr(float64([sde.t_min, sde.t_max]))).tolist()
        if not clean * (1 - 1e-9) <= ratio <= noisy:
            if ratio < clean:  # in three digits a hundredth is more than the rounding
                fix = f"lower its t_min or the noise there, or take tau <= {0.99 * width / (2 * clean):.3g}"
            else:
                fix = f"raise its t_max, or take tau >= {1.01 * width / (2 * noisy):.3g}"
            raise ValueError(
                f"an SDE that reaches sigma/alpha = {ratio:.4g}, 1/(2 tau) of a level's width {width:.4g} at "
                f"tau={self.tau:g}, expected; {type(sde).__name__} goes from {clean:.4g} at t_min={sde.t_min:g} to "
                f"{noisy:.4g} at t_max={sde.t_max:g}: {fix}"
            )
        return float(sde.time(float64(-2 * math.log(ratio))))

    def __str__(self) -> str:
        return f"truncated normal, tau={self.tau:g}"


class Variational(nn.Module):
    r"""q(u|x) by a conditional normalising flow, to be learned for a trained model (1902.00275, section 3.1).

    u = sigmoid(f(e; x)) with logistic e and affine coupling layers f, so that with Lambda(e) = sigmoid'(e)

        log q(u|x) = sum log Lambda(e) - log|det df/de| - sum log Lambda(f(e)).

    The layers start as the identity: q is the uniform density until it is trained, by `scoresde dequantize`
    (`training.learned_dequantization`; for score models 2101.09258, section 5).

    Args:
        shape: of one state: (D,), (C, L), (C, H, W), ...
        levels: their number, which scales what the layers read.
        layers: coupling layers; each half of the state is moved by every other one.
        width: hidden features of their networks.

    Raises:
        ValueError: a shape that is none, fewer than two levels, or no layer or feature.
    """

    def __init__(self, shape: int | Sequence[int], levels: int, layers: int = 4, width: int = 32):
        super().__init__()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if not 1 <= len(shape) <= 4 or min(shape) < 1:
            raise ValueError(f"the shape of one state, (D,), (C, L), (C, H, W) or (C, D, H, W), expected; got {shape}")
        if levels < 2 or layers < 1 or width < 1:
            raise ValueError(f"levels >= 2, layers >= 1 and width >= 1 expected; got {levels}, {layers}, {width}")
        self.shape, self.levels = shape, levels
        self.arguments = {"shape": list(shape), "levels": levels, "layers": layers, "width": width}
        self.couplings = nn.ModuleDict({f"coupling{i}": Coupling(shape, width, parity=i % 2) for i in range(layers)})

    def sample(self, images: Tensor, stream: RandomStream) -> tuple[Tensor, Tensor]:
        """(images + u (B, *), log q(u | images) in nats (B,)); noise draws e.

        Both have gradients in the parameters where those require them.

        Raises:
            ValueError: levels of another shape.
        """
        if images.shape[1:] != self.shape:
            raise ValueError(f"levels (B, {', '.join(map(str, self.shape))}) expected; got {tuple(images.shape)}")
        levels = _floating(images)
        context = 2 * (levels + 0.5) / self.levels - 1
        base = state = torch.logit(stream.uniform(levels), eps=torch.finfo(levels.dtype).tiny)
        log_det = torch.zeros_like(state)
        for coupling in self.couplings.values():
            state, log_scale = coupling(state, context)
            log_det = log_det + log_scale
        log_q = sum_dims(_log_logistic(base) - log_det - _log_logistic(state))
        return _within(levels, torch.sigmoid(state)), log_q.to(state)

    def training_values(self, images: Tensor, stream: RandomStream) -> Tensor:
        """images + u, (B, *), without gradient."""
        with torch.no_grad():
            return self.sample(images, stream)[0]

    def start(self, sde: SDE, transform: Transform) -> None:
        """None: the point is taken as x(t_min)."""

    def __str__(self) -> str:
        return f"variational, {len(self.couplings)} coupling layers"


class Coupling(nn.Module):
    """y = m e + (1 - m)(e exp(a) + b), with (a, b) a network of the levels and of m e (1605.08803, section 3.4).

    The mask m passes every other element, those whose indices have an even sum (or, at the next layer, an odd one): a
    checkerboard in space, and shifted by one from channel to channel. The scale is bounded, |a| <= 2, for stability.

    Args:
        shape: of one state. A vector's network is a perceptron, that of (C, *space) convolves.
        width: its hidden features.
        parity: 0 to pass elements of even sum, 1 of odd.
    """

    bound = 2.0
    mask: Tensor

    def __init__(self, shape: Sequence[int], width: int, parity: int):
        super().__init__()
        indices = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
        mask = (torch.stack(indices).sum(dim=0) + parity + 1) % 2
        self.register_buffer("mask", mask.float(), persistent=False)
        channels, dims = shape[0], len(shape) - 1
        layer: Any = partial(convolution, dims) if dims else linear
        self.network = nn.Sequential(
            layer(2 * channels, width), nn.SiLU(), layer(width, width), nn.SiLU(), layer(width, 2 * channels, scale=0.0)
        )

    def forward(self, state: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """(y, a on what moves and 0 elsewhere), each (B, *), of e (B, *) and the levels scaled to [-1, 1]."""
        mask = self.mask.to(state)
        seen = torch.cat([context, mask * torch.tanh(state / 2)], dim=1)
        output = self.network(seen.to(next(self.network.parameters()).dtype)).to(state)
        raw, shift = output.chunk(2, dim=1)
        log_scale = (1 - mask) * self.bound * torch.tanh(raw / self.bound)
        return state * log_scale.exp() + (1 - mask) * shift, log_scale


def _log_logistic(e: Tensor) -> Tensor:
    """log of the logistic density, log sigmoid'(e)."""
    return F.logsigmoid(e) + F.logsigmoid(-e)


def _floating(images: Tensor) -> Tensor:
    """Levels as floating-point numbers."""
    return images if images.is_floating_point() else images.to(double(images))


def _within(levels: Tensor, u: Tensor) -> Tensor:
    """levels + u, kept below levels + 1 after rounding: a value on the edge would be of the next level."""
    return torch.minimum(levels + u, torch.nextafter(levels + 1, levels))


def _level_width(transform: Transform) -> float:
    """The width in model space of a level, the same for all of them.

    Raises:
        ValueError: a transform whose slope varies.
    """
    probes = torch.tensor([[0.25], [0.5], [1.0], [1.75]], dtype=torch.float64)
    slopes = transform.log_det(probes)
    if not torch.allclose(slopes, slopes[:1].expand_as(slopes), rtol=1e-12, atol=1e-12):
        raise ValueError(
            f"an affine transform (Levels, Affine) expected with TruncatedNormal, all levels of one width; {transform} "
            f"has log-slopes from {float(slopes.min()):.4g} to {float(slopes.max()):.4g}: use Uniform or Variational"
        )
    return math.exp(float(slopes[0]))
