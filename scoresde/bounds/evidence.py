r"""The continuous-time evidence bound: the reverse SDE from the prior to x(t_min), then a Gaussian decoder.

With q(x_t | x) = N(alpha x, sigma^2 I), x_t = alpha x + sigma eps, d dimensions, the predicted noise eps_hat and the
diffusion coefficient g (2101.09258, theorem 3 and appendix B.2; 2107.00630, eq. 11-15),

    -log p(x) <= KL(q(x_(t_max) | x) || prior)                                                    prior
               + 1/2 \int g^2/sigma^2 E|eps - eps_hat(x_t, t)|^2 dt                               diffusion
               + E[-log N(x; x_hat_0(x_(t_min)), (sigma/alpha)^2 I)]                              reconstruction.

The prior term has a closed form. In the diffusion term, t is drawn by importance sampling: for t uniform in log-SNR the
weight is constant, as g^2/sigma^2 = -(log SNR)'. Where alpha(t_max) = 0, log-SNR ends at -30 (`losses.time_densities`).
The reconstruction is 1/2 E|eps - eps_hat|^2 + d log(sigma/alpha) + d/2 log(2 pi) at t_min, since x - x_hat_0 =
(sigma/alpha)(eps_hat - eps) with x_hat_0 = E[x_0 | x_(t_min)].

Most of the variance of |eps - eps_hat|^2 comes from |eps|^2, where the model cannot separate eps from the data (small
t). So the control variate c (|eps|^2 - d), of mean zero, is subtracted. c is the unexplained share of the noise,
|eps - eps_hat|^2 / |eps|^2, in the draws of the previous stratum (for the first stratum, in those of the decoder; for
the decoder, c = 1). As c does not depend on the draws that it is applied to, the terms stay unbiased and the draws of
different strata uncorrelated. At 64 draws this reduces the variance of a sample's bound by a factor between 2 and 16
(measured with exact scores of 3 to 144 dimensions).

If the score is exact, the Markov property of the path gives, with p_t the density of x_t,

    diffusion = KL(q(x_(t_min) | x) || p_(t_min)) - KL(q(x_(t_max) | x) || p_(t_max)),

so the bound is tight up to the prior's mismatch and the difference between the decoder and p(x | x_(t_min)).

Grey levels of images are dequantised, x = T(levels + u) with the transform T to model space (1511.01844, section 3.1),
which adds the term `change_of_variables` = E[log q(u | levels) - log|det T'|].
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde.bounds.bound import Bound, NatsBound, bits_bound, refuse_odd, uniform
from scoresde.dequantization import DataMap, Dequantization, count_levels, levels_map, warn_if_above_uniform
from scoresde.losses import Nodes, TimeDensity, UniformLogSNR, decoder_log_scale, squared_errors
from scoresde.losses.time_densities import log_snr_slope
from scoresde.protocols import Model, Transform
from scoresde.random_stream import RandomStream
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.tensors import dimensions, double
from scoresde.wrappers import as_model


def continuous_nats(
    model: Model,
    x: Tensor,
    cond: Any = None,
    draws: int = 2,
    times: TimeDensity | None = None,
    seeds: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    data_map: DataMap | None = None,
) -> NatsBound:
    """Return the continuous-time evidence bound of -log p(x), in nats, for states in model space (2101.09258).

    It is an upper bound for the reverse SDE with its decoder, not for the probability flow. It is differentiable in x
    and in the parameters of the model.

    Args:
        model: the model.
        x: data (B, *): in model space, or, if `data_map` is given, in data units.
        cond: short for `model.given(cond)`.
        draws: how many values of t to draw for each sample: an even number, or 1, which gives no standard error. The
            decoder has separate draws, an eighth of this number but at least two (one for draws=1). Each draw is one
            network evaluation.
        times: density of the times; default: `losses.UniformLogSNR()`.
        seeds: one seed per sample: sample i then has the same value in any batch.
        generator: generator of the draws, instead of seeds.
        data_map: map from data to states, for a bound on -log p(data); each draw dequantises the data anew.

    Raises:
        ValueError: draws is odd; seeds and generator are both given, or seeds is not one per sample; the SDE has no
            noise at t_min; the dequantisation gives noisy states, at t > 0.
        TypeError: times is a `losses.Nodes`.
    """
    if draws != 1:
        refuse_odd(draws)
    model, stream = as_model(model, cond), RandomStream(generator, seeds, len(x))
    if data_map is not None:
        return _of_data(model, x, data_map, draws, stream, times or UniformLogSNR())
    point = x.to(double(x)), torch.zeros(len(x), dtype=torch.float64)
    bound = _continuous(model, lambda: point, draws, stream, times or UniformLogSNR())
    del bound.terms["change_of_variables"]
    return bound


def continuous(
    model: Model,
    images: Tensor,
    transform: Transform | DataMap,
    cond: Any = None,
    dequantization: Dequantization | None = None,
    draws: int = 16,
    times: TimeDensity | None = None,
    seeds: Sequence[int] | None = None,
    batch_size: int = 256,
    progress: bool = False,
) -> Bound:
    """Return the continuous-time evidence bound of the bits per dimension of integer images (2101.09258).

    It is an upper bound for the reverse SDE with its decoder, not for the probability flow. The terms are "prior",
    "diffusion", "reconstruction" and "change_of_variables".

    Args:
        model: the model, in eval mode.
        images: integer grey levels (N, *), of any dtype.
        transform: T, from grey levels (and the values between them) to model space, with its log-determinant; or a
            `DataMap`, which includes the dequantisation.
        cond: short for `model.given(cond)`; with leading dimension N, it holds one condition for each image.
        dequantization: default `Uniform()`; it must give clean data. Each draw dequantises the images anew.
        draws: how many values of t to draw for each image, an even number; the decoder has separate draws, an eighth
            of this number but at least two. Each draw is one network evaluation.
        times: density of the times; default: `losses.UniformLogSNR()`.
        seeds: one per image; default 0, 1, 2, ..., so that the result is reproducible.
        batch_size: images at a time.
        progress: show a progress bar.

    Warns:
        AboveUniform: the mean is above log2(levels).

    Raises:
        ValueError: the images are not integers from 0 to `transform.levels` - 1; draws is odd; the model is in
            training mode; the number of seeds is not that of the images; the dequantisation gives noisy states, at
            t > 0; see also `continuous_nats`.
        RuntimeError: the bound is not finite; the message has the images concerned.
    """
    refuse_odd(draws)
    data_map, density = levels_map(transform, dequantization), times or UniformLogSNR()
    _refuse_noisy(data_map, model.sde)

    def nats(model: BaseModel, batch: Tensor, stream: RandomStream) -> NatsBound:
        return _of_data(model, batch, data_map, draws, stream, density)

    conventions = {
        "dequantization": f"{data_map.dequantization}, one for each draw",
        "times": f"{type(density).__name__}, {draws} in {draws // 2} strata per image",
        "decoder": f"density of N(E[x_0 | x_t], (sigma/alpha)^2) at t_min={model.sde.t_min:g}, "
        f"{_decoder_draws(draws)} draws per image",
    }
    bound = bits_bound(model, images, data_map, cond, seeds, batch_size, progress, nats, conventions)
    warn_if_above_uniform(bound.mean, count_levels(images, data_map.levels))
    return bound


def _of_data(
    model: BaseModel, data: Tensor, data_map: DataMap, draws: int, stream: RandomStream, times: TimeDensity
) -> NatsBound:
    """Return the bound of data (B, *), given in data units; every Monte Carlo draw dequantises the data anew."""
    _refuse_noisy(data_map, model.sde)

    def point() -> tuple[Tensor, Tensor]:
        x, log_density = data_map.draw(data.to(double(data)), stream, model.sde)
        return x, -log_density

    return _continuous(model, point, draws, stream, times)


def _refuse_noisy(data_map: DataMap, sde: SDE) -> None:
    """Raise ValueError if the dequantisation gives noisy states, at t > 0, instead of clean data."""
    if (start := data_map.start(sde)) is not None:
        raise ValueError(
            f"{data_map.dequantization} gives states at t={start:g}, not clean data: use another dequantization, or "
            "bounds.discrete, which needs none"
        )


def _continuous(
    model: BaseModel, point: Callable[[], tuple[Tensor, Tensor]], draws: int, stream: RandomStream, times: TimeDensity
) -> NatsBound:
    """Return the bound (module docstring) in nats, including the term "change_of_variables".

    `point` is called for each draw and returns x (B, *) in model space and log q(u | levels) - log|det T'| (B,).
    """
    if isinstance(times, Nodes):
        raise TypeError("times must be a continuous density; got the nodes of a chain: use bounds.discrete")
    sde, repeats = model.sde, min(draws, 2)
    strata = draws // repeats
    t_min, log_scale = torch.tensor(sde.t_min, dtype=torch.float64), decoder_log_scale(sde)

    def errors(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return |eps - eps_hat|^2 and |eps|^2 of one draw of x_t, float64 (B,) each."""
        return squared_errors(model, x, t, stream.normal(x))

    decoder, rows = [], []
    for _ in range(_decoder_draws(draws)):
        x, _ = point()
        decoder.append(errors(x, t_min))
    size = dimensions(x)
    reconstruction = torch.stack([_controlled(*pair, 1.0, size) + size * log_scale for pair in decoder])
    share = _share(decoder)
    for stratum in range(strata):
        pairs = []
        for _ in range(repeats):
            x, change = point()
            t = times.quantile(sde, (stratum + uniform(stream, len(x))) / strata)
            pairs.append(errors(x, t))
            diffusion = _controlled(*pairs[-1], share, size)
            weight = (log_snr_slope(sde, t) / times.density(sde, t)).to(diffusion)
            rows.append(torch.stack([sde.prior_divergence(x), weight * diffusion, change.to(diffusion)]))
        share = _share(pairs)
    drawn = torch.stack(rows)
    prior, diffusion, change = drawn.mean(dim=0)
    terms = {
        "prior": prior,
        "diffusion": diffusion,
        "reconstruction": reconstruction.mean(dim=0),
        "change_of_variables": change,
    }
    return NatsBound(terms, (drawn.sum(dim=1), reconstruction) if draws > 1 else None)


def _controlled(squares: Tensor, norms: Tensor, share: Tensor | float, size: int) -> Tensor:
    """Return [|eps - eps_hat|^2 - c (|eps|^2 - d)] / 2, (B,), with c = share (module docstring)."""
    return 0.5 * (squares - share * (norms - size))


def _share(errors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the factor c of the control variate (module docstring), estimated from these draws.

    It is the unexplained share of the noise: (B,), at most 1, without gradient.
    """
    squares, norms = (torch.stack(column).sum(dim=0) for column in zip(*errors, strict=True))
    return (squares.detach() / norms).clamp(max=1)


def _decoder_draws(draws: int) -> int:
    """Return the number of draws of the decoder: about draws/8, even, or 1 for draws=1.

    The decoder needs fewer draws than the diffusion term, which is weighted by the range of log-SNR and so has an error
    10 to 20 times larger.
    """
    return min(draws, 2 * max(draws // 16, 1))
