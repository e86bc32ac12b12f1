r"""Error control for each sample: the reverse SDE in steps that fit each of its paths.

`ErrorControlled` compares a step of Euler-Maruyama with one of the stochastic improved Euler method, whose drift takes
both ends, goes on from the second, and sets the step size by their difference (2105.14080, algorithm 1). There the two
are applied to x and t; here to the same SDE in variables that make it one SDE for all Gaussian paths, and not stiff.
With A = cos phi and S = sin phi, phi = atan(sigma/alpha), and the state in units of its own size,

    w = x / (alpha^2 + sigma^2)^(1/2),        V = A E[eps | x] - S E[x_0 | x],

the reverse family of `ReverseSDE` is a stationary Ornstein-Uhlenbeck process in the clock c = l^2 log A, driven by V:

    dw = (1 + l^2) V dphi - w dc + 2^(1/2) dB_c.

If the data were N(0, I), V would be zero, and the process its own noise Z, without any error at any step; V is bounded
by the data at one end and by the noise at the other, also where alpha(t_max) = 0. From t to s, with everything but V
integrated exactly, V constant in the first proposal and linear in the variable of the steps, nu, in the second,

    w'  = e^-(c_s - c_t) w + p V_t + Z_s - e^-(c_s - c_t) Z_t,        p = (1 + l^2) \int e^-(c_s - c) dphi,
    w'' = w' + q (V_s - V_t),                                         q = (1 + l^2) \int e^-(c_s - c) i dphi,

where i goes from 0 to 1 with nu, and V_s is that of w'. nu = asinh(R alpha/sigma), R = 30, is a logarithm where the
noise is less than R times the signal, and 0 where there is no signal.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresde.flow import COARSE
from scoresde.random_stream import RandomStream
from scoresde.samplers.grids import Transition, transitions, uniform_log_snr
from scoresde.samplers.predictors import check_level
from scoresde.samplers.sampler import Sampler
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.solvers.solver import finite, rms
from scoresde.tensors import broadcast, double

SHRINK, GROW = 0.2, 5.0  # bounds of the change of a step size
TABLE = 256  # intervals of it in which the inverse of a path is interpolated
FIRST = 4  # how many times smaller than the largest the first step is
NODES, WEIGHTS = (torch.from_numpy(0.5 * v) for v in np.polynomial.legendre.leggauss(16))  # on [-1/2, 1/2]


def _choose(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """By a mask (n,) on the CPU, of two tensors (n, *)."""
    return torch.where(mask.to(new.device).reshape(-1, *(1,) * (new.ndim - 1)), new, old)


class Bridges:
    """Stationary Ornstein-Uhlenbeck processes, one for each sample: unit variance, correlation e^-|c - c'| of clocks.

    Each is known at the clocks where it has been asked for. Between two of them it is drawn from its bridge, with
    a = e^-(c - c_left) and b = e^-(c_right - c),

        mean (a (1 - b^2) Z_left + b (1 - a^2) Z_right) / (1 - a^2 b^2),
        variance (1 - a^2) (1 - b^2) / (1 - a^2 b^2),

    and beyond the last of them with b = 0. So its law does not depend on where, and in which order, it is asked.

    Args:
        clock: where the processes start, with the value 0, (n,), float64; -inf is a start.
        like: a state (n, *), for shape, dtype and device.
    """

    def __init__(self, clock: Tensor, like: Tensor):
        self.clocks = clock[:, None]  # (n, p), inf where there is nothing
        self.values = torch.zeros_like(like)[:, None]  # (n, p, *)

    def draw(self, which: Tensor, clock: Tensor, z: Tensor) -> Tensor:
        """Values (m, *) at clocks (m,) of the processes of these indices (m,), from normal draws z (m, *)."""
        known = self.clocks[which]
        before = known <= clock[:, None]
        left, i = known.masked_fill(~before, -math.inf).max(dim=1)
        right, j = known.masked_fill(before, math.inf).min(dim=1)
        since, until = clock - left, right - clock
        past, future, both = (-torch.expm1(-2 * span) for span in (since, until, since + until))
        a, b, std = torch.exp(-since) * future / both, torch.exp(-until) * past / both, (past * future / both).sqrt()
        at, i, j = (index.to(z.device) for index in (which, i, j))
        value = broadcast(a, z) * self.values[at, i] + broadcast(b, z) * self.values[at, j] + broadcast(std, z) * z
        self._keep(which, clock, value)
        return value

    def _keep(self, which: Tensor, clock: Tensor, value: Tensor) -> None:
        """Put a value into a free column of each; where one has none, into a new column."""
        if bool((self.clocks[which] < math.inf).all(dim=1).any()):
            self.clocks = torch.cat([self.clocks, torch.full_like(self.clocks[:, :1], math.inf)], dim=1)
            self.values = torch.cat([self.values, torch.zeros_like(self.values[:, :1])], dim=1)
        column = (self.clocks[which] == math.inf).to(torch.int8).argmax(dim=1)
        self.clocks[which, column] = clock
        self.values[which.to(value.device), column.to(value.device)] = value

    def forget(self, clock: Tensor) -> None:
        """What lies before the clocks (n,)."""
        self.clocks = self.clocks.masked_fill(self.clocks < clock[:, None], math.inf)

    def keep(self, kept: Tensor) -> None:
        """The processes of some of the samples alone, a mask (n,) on the CPU."""
        self.clocks, self.values = self.clocks[kept], self.values[kept.to(self.values.device)]


class AngularPath:
    """A transition of a path in the variable nu of the module, from `start` to `end`; float64, on the CPU.

    The inverse is interpolated: the time for a nu that is asked for is that of a nu nearby, and what is computed is
    computed for the latter. So no path is inverted in the loop, and no digit is lost.
    """

    def __init__(self, sde: SDE, t_from: Tensor, t_to: Tensor):
        self.sde, self.ends = sde, (t_from, t_to)
        self.start, self.end = (float(self.of_time(t)) for t in self.ends)
        if not math.isfinite(self.end):
            raise ValueError(f"sigma > 0 expected at t={float(t_to):g} of {type(sde).__name__}; raise t_min")
        nodes = torch.linspace(self.start, self.end, TABLE + 1, dtype=torch.float64)
        inner = sde.time(2 * (torch.sinh(nodes[1:-1]) / COARSE).log())
        self._times = torch.cat([t_from[None], inner, t_to[None]])

    def of_time(self, t: Tensor) -> Tensor:
        """nu at t."""
        return torch.asinh(COARSE * self.sde.alpha(t) / self.sde.sigma(t))

    def time(self, nu: Tensor) -> Tensor:
        """A time near that of nu, decreasing in nu, and exactly the ends at both ends."""
        place = TABLE * ((nu - self.start) / (self.end - self.start)).clamp(0, 1)
        i = place.long().clamp(max=TABLE - 1)
        return torch.lerp(self._times[i], self._times[i + 1], place - i)

    @staticmethod
    def log_signal(nu: Tensor) -> Tensor:
        """log A at nu; to full relative precision where A is nearly 1, and -inf at 0."""
        return -0.5 * torch.log1p((COARSE / torch.sinh(nu)).square())

    def weights(self, nu: Tensor, after: Tensor, l: float) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
        """(e^-(c_s - c_t), p, q) of steps from nu to `after`, (n,) each; of the member l of the family."""
        part = NODES + 0.5
        inner = nu[:, None] + (after - nu)[:, None] * part
        pace = -COARSE * torch.cosh(inner) / (torch.sinh(inner).square() + COARSE**2)  # dphi/dnu
        decay = torch.exp(self.log_signal(inner) - self.log_signal(after)[:, None]) ** (l * l)
        slope = (1 + l * l) * WEIGHTS * decay * pace * (after - nu)[:, None]
        kept = torch.exp(self.log_signal(nu) - self.log_signal(after)) ** (l * l)  # 0^0 = 1: the ODE, from alpha = 0
        return kept, slope.sum(dim=1), (slope * part).sum(dim=1)


class Place(NamedTuple):
    """Where n samples are: what `AngularPath` was asked for, the time t, its nu and the clock of the noise, (n,) on the
    CPU; the state w and the noise z there, (n, *)."""

    asked: Tensor
    t: Tensor
    nu: Tensor
    clock: Tensor
    w: Tensor
    z: Tensor

    def rows(self, kept: Tensor) -> "Place":
        """Of some of the samples, a mask or indices on the CPU."""
        return Place(*(value[kept.to(value.device)] for value in self))

    def where(self, mask: Tensor, other: "Place") -> "Place":
        """The other place of the samples of a mask (n,)."""
        return Place(*(_choose(mask, new, old) for new, old in zip(other, self, strict=True)))

    def put(self, which: Tensor, other: "Place") -> "Place":
        """The other place (m) of the samples of these indices (m,)."""
        parts = zip(self, other, strict=True)
        return Place(*(old.index_copy(0, which.to(old.device), new.to(old.dtype)) for old, new in parts))


@dataclass
class _Runs:
    """The n samples that are on the way, and the step that each of them tries.

    rows: of the batch. here, there: the place at the start of the step and, with the proposal w', at its end. step: its
    size in nu. gain: its q. landing: whether the evaluation to come is the one at its end; all (n,), on the CPU.
    velocity: V_t. previous: w' of the last accepted step, (n, *). paths: the noise.
    """

    rows: Tensor
    step: Tensor
    gain: Tensor
    landing: Tensor
    here: Place
    there: Place
    velocity: Tensor
    previous: Tensor
    paths: Bridges

    @classmethod
    def begin(cls, place: Place, step: float) -> "_Runs":
        """All samples at a place, with a first step of that size."""
        n, zero = len(place.w), torch.zeros_like(place.nu)
        control = (torch.arange(n), zero + step, zero, torch.zeros(n, dtype=torch.bool))
        return cls(*control, place, place, torch.zeros_like(place.w), place.w, Bridges(place.clock, place.w))

    def keep(self, kept: Tensor) -> None:
        """Some of the samples alone, a mask (n,) on the CPU."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[kept.to(value.device)])
        self.here, self.there = self.here.rows(kept), self.there.rows(kept)
        self.paths.keep(kept)


class ErrorControlled(Sampler):
    """The reverse SDE with error control: Euler-Maruyama within the stochastic improved Euler method; see the module.

    A step is accepted where E, the root mean square over the dimensions of a sample of

        (w' - w'') / max(atol, rtol |w'|, rtol |w'_previous|),

    is at most 1, w'_previous being the proposal of the last accepted step. The state is then w'' (extrapolation), and
    the next step is safety E^-exponent times the last, at least a fifth of it and at most five times. The tolerances
    are in units of w, whose size is about 1 at any time; the default atol is a grey level of 8 bits in [-1, 1].

    Every sample has its own time, step size and noise, and does not depend on its batch; only samples on the way are
    evaluated. A step costs two evaluations, and one more for each time that it is rejected. `nfe` is what the sample
    with the most of them took (with one segment).

    Whether a step is rejected depends on its noise. To draw anew would replace just those increments that make the
    error large: their law changes, and the more so the smaller the tolerance, since more steps are rejected. To scale
    the old increment down with the step would make the noise too smooth. Here a rejected step leaves a point of the
    noise, and shorter steps are drawn from the bridge to it (`Bridges`): the noise has its law whatever the steps.

    Args:
        rtol, atol: relative and absolute tolerance.
        l: noise level; 1 is the reverse SDE, 0 the probability flow.
        safety, exponent: of the next step size; 0.9 and 0.9 in 2105.14080.
        max_step: as a fraction of the way.
        max_evaluations: of a sample.
        segments: number of transitions, uniform in log-SNR; more than one makes sense with a constraint, a trajectory
            or a callback. The step size starts anew in each.
        denoise_final: replace the last state by E[x_0 | x], one more evaluation.

    Raises:
        ValueError: tolerances, an exponent or a budget that are not positive, a safety factor that is not in (0, 1), a
            largest step that is not in (0, 1], a negative noise level, fewer than one segment; in a call, sigma = 0 at
            t_min.
        RuntimeError: in a call, samples that turn NaN or use up their evaluations.
    """

    def __init__(
        self,
        rtol: float = 0.05,
        atol: float = 1 / 128,
        l: float = 1.0,  # noqa: E741 - the letter of the formula
        safety: float = 0.9,
        exponent: float = 0.9,
        max_step: float = 1 / 8,
        max_evaluations: int = 10_000,
        segments: int = 1,
        denoise_final: bool = False,
    ):
        super().__init__(denoise_final)
        if not (min(rtol, atol, exponent) > 0 and 0 < safety < 1 and 0 < max_step <= 1):
            raise ValueError(
                "positive rtol, atol and exponent, safety in (0, 1) and max_step in (0, 1] expected; "
                f"got {rtol}, {atol}, {exponent}, {safety} and {max_step}"
            )
        if max_evaluations < 2 or segments < 1:
            raise ValueError(
                f"max_evaluations >= 2 and one segment or more expected; got {max_evaluations} and {segments}"
            )
        self.rtol, self.atol, self.l = rtol, atol, check_level(l)
        self.safety, self.exponent, self.max_step = safety, exponent, max_step
        self.max_evaluations, self.segments = max_evaluations, segments

    def transitions(self, sde: SDE) -> list[Transition]:
        """One from t_max to t_min, or the consecutive pairs of the segments."""
        if self.segments == 1:
            return transitions(torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64), sde)
        return transitions(uniform_log_snr(sde, self.segments), sde)

    def step(self, model: BaseModel, x: Tensor, t_from: Tensor, t_to: Tensor, stream: RandomStream) -> Tensor:
        """The state at t_to, from x (B, *) at t_from > t_to; in float64 on the way, where there is one.

        Raises:
            RuntimeError: samples that did not arrive: how many, which, where and why.
        """
        angle = AngularPath(model.sde, t_from, t_to)
        largest = self.max_step * (angle.end - angle.start)
        runs = _Runs.begin(self._start(angle, x), largest / FIRST)
        arrived = torch.empty_like(runs.here.w)
        for _ in range(self.max_evaluations):
            velocity, t = self._evaluate(model, runs, len(x))
            good = self._judge(runs, velocity, largest)
            if bad := (~finite(velocity)).nonzero().flatten().tolist():
                raise _failure("turned NaN or infinite", runs.rows[bad], t[bad], len(x), "is the network sound there?")
            if bool((over := good & (runs.here.asked >= angle.end)).any()):
                arrived[runs.rows[over].to(x.device)] = runs.here.w[over.to(x.device)]
                runs.keep(~over)
            if not len(runs.rows):
                return (broadcast(angle.sde.size(t_to), arrived) * arrived).to(x.dtype)
            self._propose(angle, runs, stream)
        hint = f"allow more than {self.max_evaluations} evaluations, or a larger error"
        raise _failure("did not arrive", runs.rows, runs.here.t, len(x), hint)

    def _clock(self, angle: AngularPath, nu: Tensor) -> Tensor:
        """c at nu; 0 for the ODE."""
        return self.l**2 * angle.log_signal(nu) if self.l else torch.zeros_like(nu)

    def _start(self, angle: AngularPath, x: Tensor) -> Place:
        """The place at the start of the transition, with the noise 0 there: only its changes matter."""
        t = angle.ends[0].expand(len(x))
        w = x.to(double(x)) / float(angle.sde.size(angle.ends[0]))
        nu = torch.full_like(t, angle.start)
        return Place(nu, t, nu, self._clock(angle, nu), w, torch.zeros_like(w))

    @staticmethod
    def _evaluate(model: BaseModel, runs: _Runs, count: int) -> tuple[Tensor, Tensor]:
        """V of each sample, at the start or at the end of its step, and the time (n,)."""
        t = torch.where(runs.landing, runs.there.t, runs.here.t)
        state = _choose(runs.landing, runs.there.w, runs.here.w)
        views = model.rows(runs.rows, count).predict(broadcast(model.sde.size(t), state) * state, t)
        return views.v, t

    def _judge(self, runs: _Runs, velocity: Tensor, largest: float) -> Tensor:
        """Accept or reject the steps whose end was evaluated, and choose the next step; the accepted ones (n,)."""
        low = runs.there.w
        high = low + broadcast(runs.gain, velocity) * (velocity - runs.velocity)
        size = torch.maximum(low.abs(), runs.previous.abs())
        error = rms((high - low) / (self.rtol * size).clamp(min=self.atol)).cpu().double()
        good = runs.landing & (error <= 1)
        step = (runs.there.asked - runs.here.asked) * (self.safety * error**-self.exponent).clamp(SHRINK, GROW)
        runs.step = torch.where(runs.landing, step.clamp(max=largest), runs.step)
        runs.velocity = _choose(runs.landing, runs.velocity, velocity)
        runs.here = runs.here.where(good, runs.there._replace(w=high))
        runs.previous = _choose(good, low, runs.previous)
        runs.landing = ~good
        return good

    def _propose(self, angle: AngularPath, runs: _Runs, stream: RandomStream) -> None:
        """The end of a step, and w' there, for the samples that have been evaluated where they are."""
        which = runs.landing.nonzero().flatten()
        if not len(which):
            return
        here, velocity = runs.here.rows(which), runs.velocity[which.to(runs.velocity.device)]
        asked = (here.asked + runs.step[which]).clamp(max=angle.end)
        t = angle.time(asked)
        nu = angle.of_time(t)
        clock, z = torch.maximum(self._clock(angle, nu), here.clock), here.z
        kept, p, runs.gain[which] = angle.weights(here.nu, nu, self.l)
        w = broadcast(kept, z) * here.w + broadcast(p, z) * velocity
        if self.l:
            runs.paths.forget(runs.here.clock)
            z = runs.paths.draw(which, clock, stream.normal(w, runs.rows[which]))
            w = w + z - broadcast(kept, z) * here.z
        runs.there = runs.there.put(which, Place(asked, t, nu, clock, w, z))


def _failure(what: str, rows: Tensor, t: Tensor, count: int, hint: str) -> RuntimeError:
    """The error of samples (n,) of a batch that ended at times t (n,)."""
    where = ", ".join(f"{int(i)} at t={float(at):.3g}" for i, at in zip(rows[:8], t[:8], strict=True))
    return RuntimeError(f"{len(rows)} of {count} samples {what} ({where} first): {hint}")
