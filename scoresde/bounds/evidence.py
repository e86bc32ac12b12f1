r"""The continuous-time evidence bound: the reverse SDE from the prior to x(t_min), then a Gaussian decoder.

With q(x_t | x) = N(alpha x, sigma^2 I) and x_t = alpha x + sigma eps (2101.09258, theorem 3 and appendix B.2;
2107.00630, eq. 11-15),

    -log p(x) <= KL(q(x_(t_max) | x) || prior)                                                    prior
               + 1/2 \int g^2/sigma^2 E|eps - eps_hat(x_t, t)|^2 dt                               diffusion
               + E[-log N(x; x_hat_0(x_(t_min)), (sigma/alpha)^2 I)]                              reconstruction.

The prior's term is closed. In the diffusion's, t is drawn by importance: uniformly in log-SNR, the weight is one
constant, as g^2/sigma^2 = -(log SNR)'. The reconstruction is 1/2 E|eps - eps_hat|^2 + d log(sigma/alpha) +
d/2 log(2 pi) at t_min, since x - x_hat_0 = (sigma/alpha)(eps_hat - eps).

Most of the noise of |eps - eps_hat|^2 is that of |eps|^2, where the model cannot tell eps from the data (small t). So
c (|eps|^2 - d), of mean zero, is taken away from it, c being the share of the noise unexplained: |eps - eps_hat|^2 /
|eps|^2 of the stratum before (the decoder's, for the first; 1 for the decoder). As c does not see the draws that it
serves, the terms stay unbiased and the draws of different strata uncorrelated. At 64 draws the variance of a sample's
bound falls to between a half and a sixteenth (measured with exact scores of 3 to 144 dimensions).

With the exact score of the data the Markov property of the path leaves

    diffusion = KL(q(x_(t_min) | x) || p_(t_min)) - KL(q(x_(t_max) | x) || p_(t_max)),

so the bound is tight, but for the prior's mismatch and for what the decoder does not know of p(x | x_(t_min)).

Levels of images are dequantised, x = T(levels + u) with the transform T to model space (1511.01844, section 3.1), which
adds `change_of_variables` = E[log q(u | levels) - log|det T'|].
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde.bounds.bound import (
    Bound,
    NatsBound,
    batches,
    refuse_odd,
    standard_error,
    summary,
    uniform,
)
from scoresde.dequantization import DataMap, Dequantization, levels_map
from scoresde.losses import Nodes, TimeDensity, UniformLogSNR, decoder_log_scale, squared_errors
from scoresde.losses.times import log_snr_slope
from scoresde.protocols import Model, Transform
from scoresde.random_stream import RandomStream
from scoresde.score import BaseModel
from scoresde.tensors import dimensions, double
from scoresde.wrappers import as_model


def continuous_nats(
    model: Model,
    x: Tensor,
    cond: Any = None,
    draws: int = 2,
    stream: RandomStream | None = None,
    times: TimeDensity | None = None,
    seeds: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> NatsBound:
    """The continuous-time bound on -log p(x) of states in model space, in nats: the module's formula.

    An upper bound, of the reverse SDE with its decoder: not of the probability flow. Differentiable in x and in the
    parameters of the model.

    Args:
        model: the model.
        x: data (B, *) in model space.
        cond: short for `model.given(cond)`.
        draws: times of each sample, even; or 1, without standard error. The decoder has an eighth of them, at least
            two (at least one), of its own. Each draw is one evaluation of the network.
        stream: the stream of draws; from `seeds` or `generator` if not given.
        times: density of the times, `losses.UniformLogSNR()` if not given.
        seeds: one per sample: sample i then has the same value in any batch.
        generator: for the draws, instead of seeds.

    Raises:
        ValueError: an odd number of draws, stream together with seeds or a generator, an SDE without noise at t_min or
            with an infinite log-SNR at t_max where times are drawn by log-SNR.
        TypeError: the nodes of a chain as times.
    """
    if draws != 1:
        refuse_odd(draws)
    if stream is None:
        stream = RandomStream(generator, seeds, len(x))
    elif seeds is not None or generator is not None:
        raise ValueError("randomness comes from `stream`, or from `seeds` or `generator`; both were given, drop one")
    states = x.to(double(x))
    unchanged = torch.zeros(len(x), dtype=torch.float64)
    bound = _continuous(as_model(model, cond), lambda: (states, unchanged), draws, stream, times or UniformLogSNR())
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
    """The continuous-time bound on the bits per dimension of images of integer levels: the module's formula.

    An upper bound, of the reverse SDE with its decoder: not of the probability flow. The terms are "prior",
    "diffusion", "reconstruction" and "change_of_variables".

    Args:
        model: the model, in eval mode.
        images: integer levels (N, *), of any dtype.
        transform: from levels (and the values between them) to model space, with its log-determinant; or a `DataMap`,
            which includes the dequantisation.
        cond: short for `model.given(cond)`, leading N.
        dequantization: `Uniform()` by default, or one whose points are clean data; every draw has its own.
        draws: times of each image, even; the decoder has an eighth of them, at least two, of its own. Each draw is one
            evaluation of the network.
        times: density of the times, `losses.UniformLogSNR()` by default.
        seeds: one per image; default 0, 1, 2, ..., so that the figure is reproducible.
        batch_size: images at a time.
        progress: show a progress bar.

    Raises:
        ValueError: values that are not integers, an odd number of draws, a model with active dropout, seeds of another
            number than images, a dequantisation whose points are states at t > 0, and what `continuous_nats` refuses.
        RuntimeError: a bound that is not finite, with the images concerned.
    """
    refuse_odd(draws)
    data_map, times = levels_map(transform, dequantization), times or UniformLogSNR()
    if (start := data_map.start(model.sde)) is not None:
        raise ValueError(
            "a dequantisation whose points are clean data expected (Uniform, Variational); "
            f"{data_map.dequantization} draws states at t={start:g}, of networks trained on the levels' centres: bound "
            "those with bounds.discrete"
        )
    parts = []
    for conditional, batch, stream in batches(model, images, cond, seeds, batch_size, progress):

        def point(batch: Tensor = batch, stream: RandomStream = stream) -> tuple[Tensor, Tensor]:
            x, nats = data_map.draw(batch.to(double(batch)), stream, model.sde)
            return x, -nats

        with torch.no_grad():
            parts.append(_continuous(conditional, point, draws, stream, times))
    declared = {
        "dequantization": f"{data_map.dequantization}, one for each draw",
        "times": f"{type(times).__name__}, {draws} in {draws // 2} strata per image",
        "decoder": f"density of N(E[x_0 | x_t], (sigma/alpha)^2) at t_min={model.sde.t_min:g}, "
        f"{_decoder_draws(draws)} draws per image",
    }
    return Bound(**summary(model, data_map, images, parts, declared))


def _continuous(
    model: BaseModel,
    point: Callable[[], tuple[Tensor, Tensor]],
    draws: int,
    stream: RandomStream,
    times: TimeDensity,
) -> NatsBound:
    """The terms of the points (x (B, *), log q - log|det T'| (B,)) that `point` draws."""
    if isinstance(times, Nodes):
        raise TypeError("a density over a continuum of times expected; got the nodes of a chain: use bounds.discrete")
    sde, repeats = model.sde, min(draws, 2)
    strata = draws // repeats
    t_min, log_scale = torch.tensor(sde.t_min, dtype=torch.float64), decoder_log_scale(sde)
    decoder = [_errors(model, point()[0], t_min, stream) for _ in range(_decoder_draws(draws))]
    reconstruction = torch.stack([error.controlled(1.0) + error.size * log_scale for error in decoder])
    share, rows = _share(decoder), []
    for stratum in range(strata):
        errors = []
        for _ in range(repeats):
            x, change = point()
            t = times.quantile(sde, (stratum + uniform(stream, len(x))) / strata)
            error = _errors(model, x, t, stream)
            weight = (log_snr_slope(sde, t) / times.density(sde, t)).to(error.squares)
            errors.append(error)
            rows.append(
                torch.stack([sde.prior_divergence(x), weight * error.controlled(share), change.to(error.squares)])
            )
        share = _share(errors)
    drawn = torch.stack(rows)
    prior, diffusion, change = drawn.mean(dim=0)
    terms = {
        "prior": prior,
        "diffusion": diffusion,
        "reconstruction": reconstruction.mean(dim=0),
        "change_of_variables": change,
    }
    return NatsBound(terms, standard_error(drawn.sum(dim=1), reconstruction) if draws > 1 else None)


class _Errors(NamedTuple):
    """|eps - eps_hat|^2 and |eps|^2 of one draw, float64 (B,), and the dimensions d."""

    squares: Tensor
    norms: Tensor
    size: int

    def controlled(self, share: Tensor | float) -> Tensor:
        """[|eps - eps_hat|^2 - share (|eps|^2 - d)] / 2, (B,)."""
        return 0.5 * (self.squares - share * (self.norms - self.size))


def _errors(model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> _Errors:
    """Of one draw of x_t."""
    return _Errors(*squared_errors(model, x, t, stream.normal(x)), dimensions(x))


def _share(errors: Sequence[_Errors]) -> Tensor:
    """The share of the noise that these draws leave unexplained, (B,), at most 1; a constant to gradients."""
    unexplained = torch.stack([error.squares for error in errors]).detach().sum(dim=0)
    return (unexplained / torch.stack([error.norms for error in errors]).sum(dim=0)).clamp(max=1)


def _decoder_draws(draws: int) -> int:
    """An eighth of the draws: the diffusion's term has about the same error times the range of log-SNR, 10 to 20."""
    return min(draws, 2 * max(draws // 16, 1))
