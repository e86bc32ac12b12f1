r"""Sampling of the reverse SDE with error control and a step size for each sample.

`ErrorControlled` compares a step of Euler-Maruyama with one of the stochastic improved Euler method, which uses the
drift at both ends of the step. It continues from the result of the second, and sets the step size by the difference of
the two (2105.14080, algorithm 1). The paper applies both methods to x and t. This module applies them in other
variables, in which the SDE is not stiff and is the same for all Gaussian paths: with A = cos phi, S = sin phi,
phi = atan(sigma/alpha), and the rescaled state

    w = x / (alpha^2 + sigma^2)^(1/2),        V = A E[eps | x] - S E[x_0 | x],

the reverse SDE of noise level l (`ReverseSDE`) is a stationary Ornstein-Uhlenbeck process in the clock c = l^2 log A
with an additional drift in V; B is a Brownian motion:

    dw = (1 + l^2) V dphi - w dc + 2^(1/2) dB_c.

For data from N(0, I), V is zero, and w is the stationary process Z driven by B alone, without error at any step size.
In general V is bounded by the data at one end and by the noise at the other, also where alpha(t_max) = 0. From t to s,
everything but V is integrated exactly. The first proposal w' takes V as constant. The second, w'', takes it as linear
in the step variable nu:

    w'  = e^-(c_s - c_t) w + p V_t + Z_s - e^-(c_s - c_t) Z_t,        p = (1 + l^2) \int e^-(c_s - c) dphi,
    w'' = w' + q (V_s - V_t),                                         q = (1 + l^2) \int e^-(c_s - c) i dphi,

where i goes from 0 to 1 linearly in nu, and V_s is evaluated at w'. The step variable nu = asinh(R alpha/sigma), with
R = 30, grows like log(alpha/sigma) where sigma < R alpha, and is 0 where alpha = 0.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresde.arguments import checked
from scoresde.probability_flow import COARSE
from scoresde.random_stream import RandomStream
from scoresde.samplers.grids import Transition, segments
from scoresde.samplers.sampler import Sampler
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.sdes.sde import check_level
from scoresde.solvers.solver import choose, finite, rms
from scoresde.tensors import broadcast, double

SHRINK, GROW = 0.2, 5.0  # smallest and largest ratio of a step size to the previous one
TABLE = 256  # number of intervals in which the time of a given nu is interpolated
FIRST = 4  # the first step is the largest allowed step divided by this
NODES, WEIGHTS = (torch.from_numpy(0.5 * v) for v in np.polynomial.legendre.leggauss(16))  # on [-1/2, 1/2]


class Bridges:
    """Ornstein-Uhlenbeck processes Z(c), one per sample, with dZ = -Z dc + 2^(1/2) dB_c.

    Letters are as in the module docstring. Drawn values are kept until `forget` drops them. A new value at c, between
    those at c_left and c_right, is drawn from the Gaussian law given these two (the bridge). With a = e^-(c - c_left)
    and b = e^-(c_right - c) it has

        mean (a (1 - b^2) Z_left + b (1 - a^2) Z_right) / (1 - a^2 b^2),
        variance (1 - a^2) (1 - b^2) / (1 - a^2 b^2).

    After the last value there is no c_right, and b = 0. The law of a process therefore does not depend on the places c
    at which it is drawn, or on their order.

    Args:
        clock: the c at which each process starts with the value 0, (n,), float64; -inf is allowed.
        like: a state (n, *), for shape, dtype and device.
    """

    def __init__(self, clock: Tensor, like: Tensor):
        self.clocks = clock[:, None]  # (n, p), inf in empty columns
        self.values = torch.zeros_like(like)[:, None]  # (n, p, *)

    def draw(self, which: Tensor, clock: Tensor, z: Tensor) -> Tensor:
        """Return new values (m, *) of the processes with indices `which` (m,) at c = `clock` (m,), from z ~ N(0, I)."""
        known = self.clocks[which]
        before = known <= clock[:, None]
        left, i = known.masked_fill(~before, -math.inf).max(dim=1)
        right, j = known.masked_fill(before, math.inf).min(dim=1)
        since, until = clock - left, right - clock
        past, future, both = (-torch.expm1(-2 * span) for span in (since, until, since + until))
        a, b, std = torch.exp(-since) * future / both, torch.exp(-until) * past / both, (past * future / both).sqrt()
        at, i, j = (index.to(z.device) for index in (which, i, j))
        value = broadcast(a, z) * self.values[at, i] + broadcast(b, z) * self.values[at, j] + broadcast(std, z) * z
        self._store(which, clock, value)
        return value

    def _store(self, which: Tensor, clock: Tensor, value: Tensor) -> None:
        """Store a new value of each process `which` at c = `clock`; add a column if a process has no empty one."""
        if bool((self.clocks[which] < math.inf).all(dim=1).any()):
            self.clocks = torch.cat([self.clocks, torch.full_like(self.clocks[:, :1], math.inf)], dim=1)
            self.values = torch.cat([self.values, torch.zeros_like(self.values[:, :1])], dim=1)
        column = (self.clocks[which] == math.inf).to(torch.int8).argmax(dim=1)
        self.clocks[which, column] = clock
        self.values[which.to(value.device), column.to(value.device)] = value

    def forget(self, clock: Tensor) -> None:
        """Drop all values of each process at c lower than its entry of `clock` (n,)."""
        self.clocks = self.clocks.masked_fill(self.clocks < clock[:, None], math.inf)

    def keep(self, selection: Tensor) -> None:
        """Keep the processes where the mask (n,), on the CPU, is True."""
        self.clocks, self.values = self.clocks[selection], self.values[selection.to(self.values.device)]


class AngularPath:
    """A transition from nu = `start` to nu = `end`, with nu as in the module docstring; float64, on the CPU.

    For a requested nu, `time` interpolates a time t in a table, and `nu` computes the exact nu of this t. The step is
    made to the exact nu, so the interpolation causes no error, and no equation has to be solved for t in the loop.
    """

    def __init__(self, sde: SDE, t_from: Tensor, t_to: Tensor):
        self.sde, self.ends = sde, (t_from, t_to)
        self.start, self.end = (float(self.nu(t)) for t in self.ends)
        if not math.isfinite(self.end):
            raise ValueError(
                f"error control needs sigma > 0, but sigma({float(t_to):g}) = 0 for {type(sde).__name__}: raise t_min"
            )
        nodes = torch.linspace(self.start, self.end, TABLE + 1, dtype=torch.float64)
        inner = sde.time(2 * (torch.sinh(nodes[1:-1]) / COARSE).log())
        self._times = torch.cat([t_from[None], inner, t_to[None]])

    def nu(self, t: Tensor) -> Tensor:
        """Return nu, as in the module docstring, at time t."""
        return torch.asinh(COARSE * self.sde.alpha(t) / self.sde.sigma(t))

    def time(self, nu: Tensor) -> Tensor:
        """Return the approximate time of a given nu, interpolated in a table; decreasing in nu, exact at both ends."""
        place = TABLE * ((nu - self.start) / (self.end - self.start)).clamp(0, 1)
        i = place.long().clamp(max=TABLE - 1)
        return torch.lerp(self._times[i], self._times[i + 1], place - i)

    @staticmethod
    def log_signal(nu: Tensor) -> Tensor:
        """Return log A (A as in the module docstring) at nu, precise also where A is nearly 1; -inf at nu = 0."""
        return -0.5 * torch.log1p((COARSE / torch.sinh(nu)).square())

    def clock(self, nu: Tensor, l: float) -> Tensor:  # noqa: E741 - the letter of the formula
        """Return the clock c of the module docstring at nu; 0 for the ODE (l = 0)."""
        return l**2 * self.log_signal(nu) if l else torch.zeros_like(nu)

    def weights(self, nu: Tensor, after: Tensor, l: float) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
        """Return (e^-(c_s - c_t), p, q) of the module docstring for steps from nu to `after`, (n,) each."""
        part = NODES + 0.5
        inner = nu[:, None] + (after - nu)[:, None] * part
        pace = -COARSE * torch.cosh(inner) / (torch.sinh(inner).square() + COARSE**2)  # dphi/dnu
        decay = torch.exp(self.log_signal(inner) - self.log_signal(after)[:, None]) ** (l * l)
        slope = (1 + l * l) * WEIGHTS * decay * pace * (after - nu)[:, None]
        total = torch.exp(self.log_signal(nu) - self.log_signal(after)) ** (l * l)  # l = 0 from alpha = 0: 0^0 = 1
        return total, slope.sum(dim=1), (slope * part).sum(dim=1)


class Place(NamedTuple):
    """Times and states of n samples; letters as in the module docstring.

    requested: the nu for which a time was requested from `AngularPath`. t, nu, clock: this time, and the exact nu and c
    at it. gain: the coefficient q of the step that ended here. All of these are float64 (n,), on the CPU. w, z: the
    state w and the noise Z, (n, *).
    """

    requested: Tensor
    t: Tensor
    nu: Tensor
    clock: Tensor
    gain: Tensor
    w: Tensor
    z: Tensor

    def rows(self, selection: Tensor) -> "Place":
        """Return the `Place` of some of the samples; `selection` is a mask or indices, on the CPU."""
        return Place(*(value[selection.to(value.device)] for value in self))

    def put(self, which: Tensor, other: "Place") -> "Place":
        """Return a copy in which the samples with indices `which` (m,) are replaced by the m samples of `other`."""
        parts = zip(self, other, strict=True)
        return Place(*(old.index_copy(0, which.to(old.device), new.to(old.dtype)) for old, new in parts))


@dataclass
class _Runs:
    """The n samples that have not reached the end, and the step that each of them tries.

    Letters are as in the module docstring. rows: the indices of the samples in the batch. step: the size of the step in
    nu. landing: True if V is evaluated next at the end of the step, False if at its start. These are (n,), on the CPU.
    here: the start of the step. there: its end, with the proposal w' as the state. velocity: V_t, at the start.
    previous: w' of the last accepted step, (n, *). noise: the processes Z.
    """

    rows: Tensor
    step: Tensor
    landing: Tensor
    here: Place
    there: Place
    velocity: Tensor
    previous: Tensor
    noise: Bridges

    def keep(self, selection: Tensor) -> None:
        """Keep the samples where the mask (n,), on the CPU, is True."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[selection.to(value.device)])
        self.here, self.there = self.here.rows(selection), self.there.rows(selection)
        self.noise.keep(selection)


@checked
class ErrorControlled(Sampler):
    """The reverse SDE with a step size for each sample, by a stochastic improved Euler method (2105.14080).

    It works on w = x / (alpha^2 + sigma^2)^(1/2) in the angle phi = atan(sigma/alpha), with V = E[v | x],

        dw = (1 + l^2) V dphi - w dc + 2^(1/2) dB_c,        c = l^2 log cos phi, B a Brownian motion,

    and integrates everything but V exactly. A step has two proposals: w' takes V as constant, w'' as linear between its
    values at the start and, evaluated at w', at the end (algorithm 1 of the paper). Its error E is the root mean
    square, over the dimensions of a sample, of

        (w' - w'') / max(atol, rtol |w'|, rtol |w'_previous|),        w'_previous: the w' of the last accepted step.

    If E <= 1, the step is accepted, and the new state is w'' (extrapolation). Accepted or not, the step size is then
    multiplied by safety E^-exponent, limited to [1/5, 5]. The tolerances are in units of w, whose size is about 1 at
    any time; the default atol is the spacing of 8-bit grey levels in [-1, 1].

    Every sample has its own time, step size and noise, and does not depend on the others in its batch; only samples
    that have not arrived at the end are evaluated. A step costs two evaluations, and one more for each rejection. With
    one segment, `Samples.nfe` is the number of evaluations of the sample that needed most of them.

    Whether a step is rejected depends on its noise. Drawing new noise after a rejection would change the law of the
    increments, and scaling the old increment down with the step would make the noise too smooth. Here the noise at the
    end of a rejected step is kept, and shorter steps draw theirs from the bridge to it: the law of the noise does not
    depend on the steps.

    Args:
        rtol, atol: relative and absolute tolerance.
        l: noise level; 1 is the reverse SDE, 0 the probability flow.
        safety, exponent: parameters of the next step size, see above; both 0.9 in 2105.14080.
        max_step: largest step, as a fraction of the length of a transition in nu = asinh(30 alpha/sigma).
        max_evaluations: largest number of evaluations of a sample in a transition.
        segments: number of transitions, uniform in log-SNR; more than one is useful with a constraint, a trajectory or
            a callback. The step size starts anew in each.
        denoise_final: if True, replace the last state by E[x_0 | x], which costs one more evaluation.

    Raises:
        ValueError: rtol, atol or exponent is not positive, safety is not in (0, 1), max_step is not in (0, 1], l is
            negative, max_evaluations < 2, or segments < 1; in a call, sigma = 0 at t_min.
        RuntimeError: in a call, samples turn NaN or infinite, or use up max_evaluations.
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
                "rtol, atol and exponent must be positive, safety in (0, 1) and max_step in (0, 1]; "
                f"got {rtol=}, {atol=}, {exponent=}, {safety=}, {max_step=}"
            )
        if max_evaluations < 2 or segments < 1:
            raise ValueError(f"max_evaluations must be >= 2 and segments >= 1; got {max_evaluations=}, {segments=}")
        self.rtol, self.atol, self.l = rtol, atol, check_level(l)
        self.safety, self.exponent, self.max_step = safety, exponent, max_step
        self.max_evaluations, self.segments = max_evaluations, segments

    def transitions(self, sde: SDE) -> list[Transition]:
        """Return the pairs (t_from, t_to) of the segments."""
        return segments(sde, self.segments)

    def step(self, model: BaseModel, x: Tensor, t_from: Tensor, t_to: Tensor, stream: RandomStream) -> Tensor:
        """Return the state at t_to, from x (B, *) at t_from > t_to; computed in float64 on devices that have it.

        Raises:
            RuntimeError: samples did not arrive; the message gives their number, first indices and times, and the
                reason.
        """
        path = AngularPath(model.sde, t_from, t_to)
        largest = self.max_step * (path.end - path.start)
        runs = self._start(path, x, largest / FIRST)
        arrived = torch.empty_like(runs.here.w)
        for _ in range(self.max_evaluations):
            velocity, t = self._evaluate(model, runs, len(x))
            good = self._judge(runs, velocity, largest)
            if bad := (~finite(velocity)).nonzero().flatten().tolist():
                hint = "check that the network gives finite values at these times"
                raise _failure("turned NaN or infinite", runs.rows[bad], t[bad], len(x), hint)
            if bool((over := good & (runs.here.requested >= path.end)).any()):
                arrived[runs.rows[over].to(x.device)] = runs.here.w[over.to(x.device)]
                runs.keep(~over)
            if not len(runs.rows):
                return (broadcast(path.sde.size(t_to), arrived) * arrived).to(x.dtype)
            self._propose(path, runs, stream)
        hint = f"allow more than {self.max_evaluations} evaluations (max_evaluations), or raise rtol and atol"
        raise _failure(f"did not arrive at t={float(t_to):.3g}", runs.rows, runs.here.t, len(x), hint)

    def _start(self, path: AngularPath, x: Tensor, step: float) -> _Runs:
        """Return all samples at the start of the transition, with the noise Z = 0.

        Any other Z would do: with letters as in the module docstring, steps use only Z_s - e^-(c_s - c_t) Z_t, whose
        law does not depend on the Z at the start.
        """
        n, t = len(x), path.ends[0].expand(len(x))
        w = x.to(double(x)) / float(path.sde.size(path.ends[0]))
        nu, zero = torch.full_like(t, path.start), torch.zeros_like(t)
        place = Place(nu, t, nu, path.clock(nu, self.l), zero, w, torch.zeros_like(w))
        landing = torch.zeros(n, dtype=torch.bool)
        noise = Bridges(place.clock, w)
        return _Runs(torch.arange(n), zero + step, landing, place, place, torch.zeros_like(w), w, noise)

    @staticmethod
    def _evaluate(model: BaseModel, runs: _Runs, count: int) -> tuple[Tensor, Tensor]:
        """Return V of the module docstring for each sample, and the time (n,) at which it was evaluated.

        The time is the end of the sample's step where `_Runs.landing` is True, and the start of the step elsewhere.
        """
        t = torch.where(runs.landing, runs.there.t, runs.here.t)
        state = choose(runs.landing, runs.there.w, runs.here.w)
        views = model.rows(runs.rows, count).predict(broadcast(model.sde.size(t), state) * state, t)
        return views.v, t

    def _judge(self, runs: _Runs, velocity: Tensor, largest: float) -> Tensor:
        """Accept or reject the steps whose end was evaluated; set the next step sizes; return which were accepted."""
        low = runs.there.w
        high = low + broadcast(runs.there.gain, velocity) * (velocity - runs.velocity)
        size = torch.maximum(low.abs(), runs.previous.abs())
        error = rms((high - low) / (self.rtol * size).clamp(min=self.atol)).cpu().double()
        good = runs.landing & (error <= 1)
        step = (runs.there.requested - runs.here.requested) * (self.safety * error**-self.exponent).clamp(SHRINK, GROW)
        runs.step = torch.where(runs.landing, step.clamp(max=largest), runs.step)
        runs.velocity = choose(runs.landing, runs.velocity, velocity)
        accepted = good.nonzero().flatten()
        runs.here = runs.here.put(accepted, runs.there._replace(w=high).rows(accepted))
        runs.previous = choose(good, low, runs.previous)
        runs.landing = ~good
        return good

    def _propose(self, path: AngularPath, runs: _Runs, stream: RandomStream) -> None:
        """Compute the proposal w' at the end of the step, for all samples whose V at the start is known."""
        which = runs.landing.nonzero().flatten()
        if not len(which):
            return
        here, velocity = runs.here.rows(which), runs.velocity[which.to(runs.velocity.device)]
        requested = (here.requested + runs.step[which]).clamp(max=path.end)
        t = path.time(requested)
        nu = path.nu(t)
        clock, z = torch.maximum(path.clock(nu, self.l), here.clock), here.z
        decay, p, q = path.weights(here.nu, nu, self.l)
        w = broadcast(decay, z) * here.w + broadcast(p, z) * velocity
        if self.l:
            runs.noise.forget(runs.here.clock)
            z = runs.noise.draw(which, clock, stream.normal(w, runs.rows[which]))
            w = w + z - broadcast(decay, z) * here.z
        runs.there = runs.there.put(which, Place(requested, t, nu, clock, q, w, z))


def _failure(reason: str, rows: Tensor, t: Tensor, count: int, hint: str) -> RuntimeError:
    """Return the exception that reports the n failed samples: indices `rows` in a batch of `count`, times t (n,)."""
    where = ", ".join(f"sample {int(i)} at t={float(at):.3g}" for i, at in zip(rows[:8], t[:8], strict=True))
    return RuntimeError(f"{len(rows)} of {count} samples {reason} (first: {where}): {hint}")
