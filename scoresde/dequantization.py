r"""Dequantisation: a density over continuous values gives integer grey levels a probability, and thus bits.

Level k is the interval [k, k + 1). A density p over continuous values bounds the probability of the levels x by
(Theis et al., 1511.01844, section 3.1; Ho et al., 1902.00275, section 3.1)

    log P(x) >= E_{u ~ q(u|x)} [log p(x + u) - log q(u|x)],        u in [0, 1)^d,

with equality if q(u|x) is p restricted to the cell of x:

| class             | q(u|x)                                                | trained on      | x + u is     |
| ----------------- | ----------------------------------------------------- | --------------- | ------------ |
| `Uniform`         | 1                                                     | x + u           | x(t_min)     |
| `TruncatedNormal` | the diffusion's noise around the centre of the level  | centres x + 1/2 | x(t), t > 0  |
| `Variational`     | a normalising flow, learned for a trained model       | x + u           | x(t_min)     |

A network must be evaluated with the dequantisation that it was trained with: `training_values` gives the values for
training, `start` the time at which the likelihood starts.

A `DataMap` combines a dequantisation and a transform T: it maps data to states of a model and back, and gives the
change of log-density.
"""

import math
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.configured import Configured
from scoresde.data.transforms import CHANGE, draw, encode
from scoresde.networks.layers import convolution, linear
from scoresde.protocols import Transform
from scoresde.random_stream import RandomStream
from scoresde.sdes import SDE
from scoresde.tensors import at_least_float32, check_instance, dimensions, double, float64, floating, sum_dims


class Dequantization(Protocol):
    """The interface of a dequantisation; likelihoods report its `str` in their `conventions`."""

    @abstractmethod
    def sample(self, images: Tensor, stream: RandomStream) -> tuple[Tensor, Tensor]:
        """Draw values x + u (B, *) in [x, x + 1) for levels x (B, *); also return log q(u | x) in nats (B,).

        Values and log q are float64 for levels of an integer dtype. For floating-point levels they have the dtype of
        the levels, or float32 if that is wider. u is drawn from `stream`.
        """

    def training_values(self, images: Tensor, stream: RandomStream) -> Tensor:
        """Return the values (B, *) to train a network on, without gradient; by default those of `sample`."""
        with torch.no_grad():
            return self.sample(images, stream)[0]

    def start(self, sde: SDE, transform: Transform) -> float | None:
        """Return the time t at which alpha(t) T(values) is a state of the diffusion.

        The default, None, takes T(values) as x(t_min), the convention of the code of 2011.13456.
        """
        return None


class DataMap(Configured):
    """Maps data to states of a model and back, and gives the change of log-density in nats.

    The state is T(values), and the values are the data or dequantised levels; if the dequantisation starts at a time
    t > 0, the state is alpha(t) T(values). In expectation over the draws, with the nats returned by `draw`,

        log p(data)  >=  log p(state) + nats,        nats = log|det dT| - log q(u | data) + d log alpha(t),

    with equality for continuous data and an invertible T. For a transform whose cost is a bound (`data.transforms`),
    log|det dT| is the sum of its terms. A state may have another shape than its data.

    Args:
        transform: T.
        dequantization: dequantisation of integer levels; None for continuous data.
    """

    def __init__(self, transform: Transform, dequantization: Dequantization | None = None):
        self.transform, self.dequantization = transform, dequantization

    @property
    def levels(self) -> int | None:
        """Number of grey levels of the data, as the transform declares it; None if it does not."""
        return getattr(self.transform, "levels", None)

    @property
    def bounds(self) -> str:
        """Why the log-density of `draw` is a bound: "by dequantisation", and the attribute `bound` of T, if any."""
        causes = ["dequantisation"] if self.dequantization is not None else []
        return "by " + " and ".join([*causes, *([bound] if (bound := getattr(self.transform, "bound", "")) else [])])

    def start(self, sde: SDE) -> float | None:
        """Return the time of the states of `draw`; None stands for t_min."""
        return None if self.dequantization is None else self.dequantization.start(sde, self.transform)

    def draw(self, data: Tensor, stream: RandomStream, sde: SDE) -> tuple[Tensor, Tensor]:
        """Return a state (B, *) for the data (B, *), and its nats (B,), float64.

        Raises:
            ValueError: the data are to be dequantised, but are not grey levels, see `check_levels`.
        """
        state, terms = self.draw_terms(data, stream, sde)
        return state, torch.stack(list(terms.values())).sum(dim=0)

    def draw_terms(self, data: Tensor, stream: RandomStream, sde: SDE) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a state (B, *) for the data (B, *), and its nats as terms by name, float64 (B,) each.

        The terms are those of the transform (see `data.transforms.draw`), where "change_of_variables" includes
        -log q(u | data) + d log alpha(t).

        Raises:
            ValueError: see `draw`.
        """
        values, log_q, start = data, torch.zeros(len(data), device=data.device), self.start(sde)
        if self.dequantization is not None:
            check_levels(data, self.levels)
            values, log_q = self.dequantization.sample(data, stream)
        state, drawn = draw(self.transform, values, stream)
        terms = {name: float64(nats) for name, nats in drawn.items()}
        change = terms.get(CHANGE, torch.zeros_like(float64(log_q))) - float64(log_q)
        if start is not None:
            alpha = sde.alpha(float64(start)).detach()
            state, change = float(alpha) * state, change + dimensions(state) * float(alpha.log())
        return state, terms | {CHANGE: change}

    def training_states(self, data: Tensor, stream: RandomStream) -> Tensor:
        """Return the clean states (B, *) to train a network on, float64 or float32, for data (B, *) of any dtype.

        They are float64 for float64 data and, without dequantisation, for integers of more than 16 bits. Pass the data
        in their own dtype, because the transform may subtract large numbers; cast the states instead.

        Raises:
            ValueError: the data are to be dequantised, but are not grey levels, see `check_levels`.
        """
        if self.dequantization is None:
            data = floating(data)
            return encode(self.transform, data.to(torch.promote_types(data.dtype, torch.float32)), stream)
        check_levels(data.nan_to_num(0.0, 0.0, 0.0), self.levels)  # a step of non-finite data is skipped and logged
        data = data if data.dtype == torch.float64 else data.float()  # float32 holds all levels
        return encode(self.transform, self.dequantization.training_values(data, stream), stream)

    def inverse(self, state: Tensor) -> Tensor:
        """Return the values (B, *) for a state (B, *), not rounded to levels."""
        return self.transform.inverse(state)

    def __str__(self) -> str:
        return str(self.transform)


def levels_map(transform: Transform | DataMap, dequantization: Dequantization | None) -> DataMap:
    """Return the data map of integer levels, with uniform dequantisation by default.

    Raises:
        ValueError: `transform` is a `DataMap`, and either has no dequantisation or comes with a `dequantization`.
    """
    if not isinstance(transform, DataMap):
        check_instance("transform", transform, "__call__", "inverse", "log_det")
        if dequantization is not None:
            check_instance("dequantization", dequantization, "start")
        return DataMap(transform, dequantization or Uniform())
    if dequantization is not None or transform.dequantization is None:
        raise ValueError(
            "bits need exactly one dequantisation, in the DataMap; got DataMap(dequantization="
            f"{transform.dequantization}) and dequantization={dequantization}: set it in the DataMap only"
        )
    return transform


def check_levels(images: Tensor, levels: int | None) -> None:
    """Raise ValueError unless all values are integers, from 0 to levels - 1 if the number of levels is known."""
    images = floating(images)
    is_wrong = images != images.round()
    if levels is not None:
        is_wrong |= ~((images >= 0) & (images < levels))
    if bool(is_wrong.any()):
        expected = "integers" if levels is None else f"integers from 0 to {levels - 1}"
        raise ValueError(
            f"images must be {expected}; got {images.min():g} to {images.max():g}, where {int(is_wrong.sum())} of "
            f"{images.numel()} values are not: pass the stored grey levels, without scaling or noise; for continuous "
            "data, which has no bits, leave out the dequantisation and use log_prob or bounds.continuous_nats (nats)"
        )


class Incomplete(RuntimeError):
    """Some samples have no likelihood: in `result`, their values and the mean are not finite."""

    def __init__(self, message: str, result: Any):
        super().__init__(message)
        self.result = result


class AboveUniform(UserWarning):
    """Bits per dimension are above log2(levels), the value of the uniform distribution over all grey levels."""


def count_levels(images: Tensor, levels: int | None) -> int:
    """Return `levels`; if None, count the integers from min(0, least value) to the largest value, at least 2."""
    return max(int(images.max()) - min(int(images.min()), 0) + 1, 2) if levels is None else levels


def warn_if_above_uniform(bits: float, levels: int) -> None:
    """Warn with `AboveUniform` if a mean of bits per dimension is above log2(levels), see `count_levels`."""
    if bits > math.log2(levels):
        warnings.warn(
            f"{bits:.4g} bits/dim are more than log2({levels}) = {math.log2(levels):.4g}, the value of the uniform "
            "distribution: check that the model was trained with this data, transform and dequantisation",
            AboveUniform,
            stacklevel=3,
        )


class Uniform(Configured, Dequantization):
    """Uniform dequantisation (1511.01844): a level x becomes x + u, u uniform on [0, 1)^d, with log q(u | x) = 0.

    It has no arguments. The log-density of x + u is in expectation a lower bound on the log-probability of x, and
    `bits_per_dim` averages it over `samples` draws.
    """

    def sample(self, images: Tensor, stream: RandomStream) -> tuple[Tensor, Tensor]:
        """Draw images + u (B, *); also return log q(u | images), which is zero (B,)."""
        levels = _floating(images)
        return levels + stream.uniform(levels), levels.new_zeros(len(levels))

    def __str__(self) -> str:
        return "uniform"


class TruncatedNormal(Configured, Dequantization):
    r"""u = 1/2 + z / (2 tau), z normal restricted to [-tau, tau): the noise of the diffusion, within the grey level.

    A network trained on the centres of the levels has seen x(t) = alpha T(x + 1/2) + sigma eps. Let t be the time at
    which sigma/alpha is s = 1/(2 tau) times the width of a level in model space. Then x(t) = alpha T(x + u) with
    u ~ N(1/2, s^2), and u is within the level except with probability erfc(tau / 2^(1/2)) per dimension. q is this
    normal distribution restricted to the level, with

        log q(u|x) = -|z|^2 / 2 - d log[(2 pi)^(1/2) s erf(tau / 2^(1/2))].

    Training and evaluation thus use the same states, and the diffusion below t need not be learned (Zheng et al.,
    2305.03935, where tau = alpha / (256 sigma) at the least time of the schedule is about 3 for 8 bits on [-1, 1]).
    The bound of a perfect model is loose by at most -log erf(tau / 2^(1/2)) nats per dimension: 0.0027 at tau = 3.

    Args:
        tau: half the width of a level in standard deviations of the noise; a larger tau gives an earlier time.

    Raises:
        ValueError: tau is not positive and finite.
    """

    def __init__(self, tau: float = 3.0):
        if not 0 < tau < math.inf:
            raise ValueError(f"tau must be positive and finite; got tau={tau}")
        self.tau = float(tau)

    def sample(self, images: Tensor, stream: RandomStream) -> tuple[Tensor, Tensor]:
        """Draw images + u (B, *) by the inverse cdf; also return log q(u | images) in nats (B,)."""
        levels = _floating(images)
        tail = 0.5 * math.erfc(self.tau / math.sqrt(2))
        z = torch.special.ndtri(tail + (1 - 2 * tail) * stream.uniform(levels)).clamp(-self.tau, self.tau)
        log_scale = 0.5 * math.log(2 * math.pi) - math.log(2 * self.tau) + math.log(math.erf(self.tau / math.sqrt(2)))
        return _within(levels, 0.5 + z / (2 * self.tau)), sum_dims(-0.5 * z.square() - log_scale).to(z)

    def training_values(self, images: Tensor, stream: RandomStream) -> Tensor:
        """Return the centres of the levels, images + 1/2 (B, *); draws nothing."""
        return _floating(images) + 0.5

    def start(self, sde: SDE, transform: Transform) -> float:
        """Return the time at which sigma/alpha = w / (2 tau), with w the width of a grey level in model space.

        Raises:
            ValueError: the transform is not affine (levels of different widths), or the SDE does not reach that value
                of sigma/alpha between t_min and t_max.
        """
        width = _level_width(transform)
        ratio = width / (2 * self.tau)
        clean, noisy = torch.exp(-0.5 * sde.log_snr(float64([sde.t_min, sde.t_max]))).tolist()
        if not clean * (1 - 1e-9) <= ratio <= noisy:
            # The suggested tau is printed with three digits; a margin of 1% is more than the rounding.
            if ratio < clean:
                fix = f"lower t_min or the noise at t_min, or take tau <= {0.99 * width / (2 * clean):.3g}"
            else:
                fix = f"raise t_max, or take tau >= {1.01 * width / (2 * noisy):.3g}"
            raise ValueError(
                f"the SDE must reach sigma/alpha = {ratio:.4g}, the width {width:.4g} of a grey level divided by 2 tau "
                f"(tau={self.tau:g}); {type(sde).__name__} goes from {clean:.4g} at t_min={sde.t_min:g} to "
                f"{noisy:.4g} at t_max={sde.t_max:g}: {fix}"
            )
        return float(sde.time(float64(-2 * math.log(ratio))))

    def __str__(self) -> str:
        return f"truncated normal, tau={self.tau:g}"


class Variational(Configured, nn.Module, Dequantization):
    r"""q(u|x) by a conditional normalising flow, learned for a trained model (1902.00275, section 3.1).

    u = sigmoid(f(e; x)) with logistic e and affine coupling layers f, so that with Lambda(e) = sigmoid'(e)

        log q(u|x) = sum log Lambda(e) - log|det df/de| - sum log Lambda(f(e)).

    The layers start as the identity, so q is uniform until it is trained by `scoresde dequantize`
    (`training.learned_dequantization`; for score models 2101.09258, section 5).

    Args:
        shape: shape of one state: (D,), (C, L), (C, H, W), ...
        levels: number of grey levels, which scales the input of the layers.
        layers: number of coupling layers; they change the two halves of the state in turn.
        width: number of hidden features of the networks in the layers.

    Raises:
        ValueError: the shape is not that of a state, levels < 2, layers < 1 or width < 1.
    """

    def __init__(self, shape: int | Sequence[int], levels: int, layers: int = 4, width: int = 32):
        super().__init__()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if not 1 <= len(shape) <= 4 or min(shape) < 1:
            raise ValueError(f"shape must be that of one state: (D,), (C, L), (C, H, W) or (C, D, H, W); got {shape}")
        if levels < 2 or layers < 1 or width < 1:
            raise ValueError(f"expected levels >= 2, layers >= 1 and width >= 1; got {levels=}, {layers=}, {width=}")
        self.shape, self.levels = shape, levels
        self.arguments = {"shape": list(shape), "levels": levels, "layers": layers, "width": width}
        self.couplings = nn.ModuleDict({f"coupling{i}": Coupling(shape, width, parity=i % 2) for i in range(layers)})

    def sample(self, images: Tensor, stream: RandomStream) -> tuple[Tensor, Tensor]:
        """Draw images + u (B, *); also return log q(u | images) in nats (B,).

        Both are differentiable in the parameters. e of the class docstring is drawn from `stream`.

        Raises:
            ValueError: the levels have another shape.
        """
        if images.shape[1:] != self.shape:
            expected = ", ".join(map(str, self.shape))
            raise ValueError(f"expected grey levels of shape (B, {expected}); got {tuple(images.shape)}")
        levels = _floating(images)
        context = 2 * (levels + 0.5) / self.levels - 1
        base = state = torch.logit(stream.uniform(levels), eps=torch.finfo(levels.dtype).tiny)
        log_det = torch.zeros_like(state)
        for coupling in self.couplings.values():
            state, log_scale = coupling(state, context)
            log_det = log_det + log_scale
        log_q = sum_dims(_log_logistic(base) - log_det - _log_logistic(state))
        return _within(levels, torch.sigmoid(state)), log_q.to(state)

    def __str__(self) -> str:
        return f"variational, {len(self.couplings)} coupling layers"


class Coupling(nn.Module):
    """y = m e + (1 - m)(e exp(a) + b), with (a, b) computed by a network from the levels and m e (1605.08803, 3.4).

    The mask m keeps every other element, those whose indices have an even sum (in the next layer, an odd sum): a
    checkerboard in space, shifted by one from channel to channel. The scale is bounded, |a| <= 2, for stability.

    Args:
        shape: shape of one state. The network is a perceptron for a vector and convolutional for (C, *space).
        width: number of hidden features of the network.
        parity: 0 to keep the elements whose indices have an even sum, 1 to keep the others.
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
        """Return y and the log-scales (1 - m) a, each (B, *); letters as in the class docstring.

        Args:
            state: e, (B, *).
            context: the grey levels, scaled to [-1, 1], (B, *).
        """
        mask = self.mask.to(state)
        features = torch.cat([context, mask * torch.tanh(state / 2)], dim=1)
        output = self.network(features.to(next(self.network.parameters()).dtype)).to(state)
        raw, shift = output.chunk(2, dim=1)
        log_scale = (1 - mask) * self.bound * torch.tanh(raw / self.bound)
        return state * log_scale.exp() + (1 - mask) * shift, log_scale


def _log_logistic(e: Tensor) -> Tensor:
    """Return the logarithm of the logistic density, log sigmoid'(e)."""
    return F.logsigmoid(e) + F.logsigmoid(-e)


def _floating(images: Tensor) -> Tensor:
    """Convert levels to floating-point numbers in at least float32."""
    return at_least_float32(images) if images.is_floating_point() else images.to(double(images))


def _within(levels: Tensor, u: Tensor) -> Tensor:
    """Return levels + u, kept below levels + 1 after rounding: levels + 1 belongs to the next level."""
    return torch.minimum(levels + u, torch.nextafter(levels + 1, levels))


def _level_width(transform: Transform) -> float:
    """Return the width of a level in model space, the same for all levels.

    Raises:
        ValueError: the transform is not affine.
    """
    probes = torch.tensor([[0.125], [0.25], [0.5], [0.75]], dtype=torch.float64)
    slopes = transform.log_det(probes)
    if not torch.allclose(slopes, slopes[:1].expand_as(slopes), rtol=1e-12, atol=1e-12):
        raise ValueError(
            f"TruncatedNormal needs levels of one width, from an affine transform (Levels, Affine); {transform} has "
            f"log-slopes from {float(slopes.min()):.4g} to {float(slopes.max()):.4g}: use Uniform or Variational"
        )
    return math.exp(float(slopes[0]))
