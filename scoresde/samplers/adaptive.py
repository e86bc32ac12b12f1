r"""Error control for each sample: the reverse SDE in steps that fit each of its paths.

`ErrorControlled` compares a step of Euler-Maruyama with one of the stochastic improved Euler method, whose drift uses
both ends. It continues from the second, and sets the step size by their difference (2105.14080, algorithm 1). The paper
applies the two to x and t; here they are applied to the same SDE in variables in which it is one SDE for all Gaussian
paths, and not stiff. With A = cos phi and S = sin phi, phi = atan(sigma/alpha), and the state in units of its own size,

    w = x / (alpha^2 + sigma^2)^(1/2),        V = A E[eps | x] - S E[x_0 | x],

the reverse family of `ReverseSDE` is a stationary Ornstein-Uhlenbeck process in the clock c = l^2 log A, driven by V:

    dw = (1 + l^2) V dphi - w dc + 2^(1/2) dB_c.

For data from N(0, I), V is zero, and the process is its own noise Z, without any error at any step. In general V is
bounded by the data at one end and by the noise at the other, also where alpha(t_max) = 0. From t to s, everything but V
is integrated exactly; V is constant in the first proposal, and linear in the variable of the steps, nu, in the second,

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

SHRINK, GROW = 0.2, 5.0  # bounds of the change of a step size
TABLE = 256  # number of intervals in which the inverse of a path is interpolated
FIRST = 4  # the first step is the largest allowed step divided by this
NODES, WEIGHTS = (torch.from_numpy(0.5 * v) for v in np.polynomial.legendre.leggauss(16))  # on [-1/2, 1/2]


class Bridges:
    """Stationary Ornstein-Uhlenbeck processes, one for each sample: unit variance, correlation e^-|c - c'| of clocks.

    Each process is known at the clocks at which it was drawn. Between two of them it is drawn from its bridge, with
    a = e^-(c - c_left) and b = e^-(c_right - c),

        mean (a (1 - b^2) Z_left + b (1 - a^2) Z_right) / (1 - a^2 b^2),
        variance (1 - a^2) (1 - b^2) / (1 - a^2 b^2),

    and beyond the last of them with b = 0. Its law therefore does not depend on the clocks or on their order.

    Args:
        clock: the starts of the processes, with the value 0, (n,), float64; -inf is allowed.
        like: a state (n, *), for shape, dtype and device.
    """

    def __init__(self, clock: Tensor, like: Tensor):
        self.clocks = clock[:, None]  # (n, p), inf in empty columns
        self.values = torch.zeros_like(like)[:, None]  # (n, p, *)

    def draw(self, which: Tensor, clock: Tensor, z: Tensor) -> Tensor:
        """Values (m, *) at clocks (m,) of the processes with indices (m,), from normal draws z (m, *)."""
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
        """Write each value into an empty column of its process; add a column if a process has none."""
        if bool((self.clocks[which] < math.inf).all(dim=1).any()):
            self.clocks = torch.cat([self.clocks, torch.full_like(self.clocks[:, :1], math.inf)], dim=1)
            self.values = torch.cat([self.values, torch.zeros_like(self.values[:, :1])], dim=1)
        column = (self.clocks[which] == math.inf).to(torch.int8).argmax(dim=1)
        self.clocks[which, column] = clock
        self.values[which.to(value.device), column.to(value.device)] = value

    def forget(self, clock: Tensor) -> None:
        """Drop the values before the clocks (n,)."""
        self.clocks = self.clocks.masked_fill(self.clocks < clock[:, None], math.inf)

    def keep(self, selection: Tensor) -> None:
        """Keep the processes of a mask (n,) on the CPU."""
        self.clocks, self.values = self.clocks[selection], self.values[selection.to(self.values.device)]


class AngularPath:
    """A transition of a path in the variable nu of the module, from `start` to `end`; float64, on the CPU.

    The inverse is interpolated: a requested nu gives the time of a nearby nu, and everything is then computed at that
    nearby nu. So no path is inverted in the loop, and no digit is lost.
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
        """nu at t."""
        return torch.asinh(COARSE * self.sde.alpha(t) / self.sde.sigma(t))

    def time(self, nu: Tensor) -> Tensor:
        """A time near that of nu, decreasing in nu, and exact at both ends."""
        place = TABLE * ((nu - self.start) / (self.end - self.start)).clamp(0, 1)
        i = place.long().clamp(max=TABLE - 1)
        return torch.lerp(self._times[i], self._times[i + 1], place - i)

    @staticmethod
    def log_signal(nu: Tensor) -> Tensor:
        """log A at nu; to full relative precision where A is nearly 1, and -inf at 0."""
        return -0.5 * torch.log1p((COARSE / torch.sinh(nu)).square())

    def clock(self, nu: Tensor, l: float) -> Tensor:  # noqa: E741 - the letter of the formula
        """c at nu; 0 for the ODE."""
        return l**2 * self.log_signal(nu) if l else torch.zeros_like(nu)

    def weights(self, nu: Tensor, after: Tensor, l: float) -> tuple[Tensor, Tensor, Tensor]:  # noqa: E741
        """(e^-(c_s - c_t), p, q) of steps from nu to `after`, (n,) each, at noise level l."""
        part = NODES + 0.5
        inner = nu[:, None] + (after - nu)[:, None] * part
        pace = -COARSE * torch.cosh(inner) / (torch.sinh(inner).square() + COARSE**2)  # dphi/dnu
        decay = torch.exp(self.log_signal(inner) - self.log_signal(after)[:, None]) ** (l * l)
        slope = (1 + l * l) * WEIGHTS * decay * pace * (after - nu)[:, None]
        total = torch.exp(self.log_signal(nu) - self.log_signal(after)) ** (l * l)  # 0^0 = 1: the ODE, from alpha = 0
        return total, slope.sum(dim=1), (slope * part).sum(dim=1)


class Place(NamedTuple):
    """Where n samples are.

    requested: the nu that `AngularPath` was called with. t, nu: the time that it gave and the nu there. clock: the
    clock of the noise. gain: q of the step to this place. All float64 (n,), on the CPU. w, z: the state and the noise,
    (n, *).
    """

    requested: Tensor
    t: Tensor
    nu: Tensor
    clock: Tensor
    gain: Tensor
    w: Tensor
    z: Tensor

    def rows(self, selection: Tensor) -> "Place":
        """The place of some of the samples, a mask or indices on the CPU."""
        return Place(*(value[selection.to(value.device)] for value in self))

    def put(self, which: Tensor, other: "Place") -> "Place":
        """This place with the samples of the indices (m,) at another place, of m samples."""
        parts = zip(self, other, strict=True)
        return Place(*(old.index_copy(0, which.to(old.device), new.to(old.dtype)) for old, new in parts))


@dataclass
class _Runs:
    """The n samples that have not arrived, and the step that each of them tries.

    rows: their indices in the batch. step: its size in nu. landing: whether the next evaluation is at the end of the
    step; all (n,), on the CPU. here, there: the place at its start and, with the proposal w', at its end. velocity:
    V_t. previous: w' of the last accepted step, (n, *). noise: Z.
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
        """Keep the samples of a mask (n,) on the CPU."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[selection.to(value.device)])
        self.here, self.there = self.here.rows(selection), self.there.rows(selection)
        self.noise.keep(selection)


@checked
class ErrorControlled(Sampler):
    """The reverse SDE with error control: Euler-Maruyama within the stochastic improved Euler method; see the module.

    A step is accepted if E, the root mean square over the dimensions of a sample of

        (w' - w'') / max(atol, rtol |w'|, rtol |w'_previous|),

    is at most 1, where w'_previous is the proposal of the last accepted step. The state is then w'' (extrapolation),
    and the next step is safety E^-exponent times the last, at least a fifth of it and at most five times. The
    tolerances are in units of w, whose size is about 1 at any time; the default atol is a grey level of 8 bits in
    [-1, 1].

    Every sample has its own time, step size and noise, and does not depend on its batch; only samples that have not
    arrived are evaluated. A step costs two evaluations, and one more for each rejection. `nfe` is the number of
    evaluations of the sample that needed most of them (with one segment).

    Whether a step is rejected depends on its noise. Drawing anew would replace just those increments that make the
    error large: their law changes, and the more so the smaller the tolerance, since more steps are rejected. Scaling
    the old increment down with the step would make the noise too smooth. Here a rejected step leaves a point of the
    noise, and shorter steps are drawn from the bridge to it (`Bridges`): the law of the noise does not depend on the
    steps.

    Args:
        rtol, atol: relative and absolute tolerance.
        l: noise level; 1 is the reverse SDE, 0 the probability flow.
        safety, exponent: of the next step size; 0.9 and 0.9 in 2105.14080.
        max_step: as a fraction of the transition.
        max_evaluations: of a sample.
        segments: number of transitions, uniform in log-SNR; more than one is useful with a constraint, a trajectory or
            a callback. The step size starts anew in each.
        denoise_final: replace the last state by E[x_0 | x], one more evaluation.

    Raises:
        ValueError: tolerances, an exponent or a budget that are not positive, a safety factor outside of (0, 1), a
            largest step outside of (0, 1], a negative noise level, fewer than one segment; in a call, sigma = 0 at
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
                "rtol, atol and exponent must be positive, safety in (0, 1) and max_step in (0, 1]; "
                f"got {rtol=}, {atol=}, {exponent=}, {safety=}, {max_step=}"
            )
        if max_evaluations < 2 or segments < 1:
            raise ValueError(f"max_evaluations must be >= 2 and segments >= 1; got {max_evaluations=}, {segments=}")
        self.rtol, self.atol, self.l = rtol, atol, check_level(l)
        self.safety, self.exponent, self.max_step = safety, exponent, max_step
        self.max_evaluations, self.segments = max_evaluations, segments

    def transitions(self, sde: SDE) -> list[Transition]:
        """One from t_max to t_min, or the consecutive pairs of the segments."""
        return segments(sde, self.segments)

    def step(self, model: BaseModel, x: Tensor, t_from: Tensor, t_to: Tensor, stream: RandomStream) -> Tensor:
        """The state at t_to, from x (B, *) at t_from > t_to; computed in float64 on devices that have it.

        Raises:
            RuntimeError: samples that did not arrive, with their number, indices and times and the reason.
        """
        path = AngularPath(model.sde, t_from, t_to)
        largest = self.max_step * (path.end - path.start)
        runs = self._start(path, x, largest / FIRST)
        arrived = torch.empty_like(runs.here.w)
        for _ in range(self.max_evaluations):
            velocity, t = self._evaluate(model, runs, len(x))
            good = self._judge(runs, velocity, largest)
            if bad := (~finite(velocity)).nonzero().flatten().tolist():
                hint = "does the network give finite values there?"
                raise _failure("turned NaN or infinite", runs.rows[bad], t[bad], len(x), hint)
            if bool((over := good & (runs.here.requested >= path.end)).any()):
                arrived[runs.rows[over].to(x.device)] = runs.here.w[over.to(x.device)]
                runs.keep(~over)
            if not len(runs.rows):
                return (broadcast(path.sde.size(t_to), arrived) * arrived).to(x.dtype)
            self._propose(path, runs, stream)
        hint = f"allow more than {self.max_evaluations} evaluations, or a larger error"
        raise _failure("did not arrive", runs.rows, runs.here.t, len(x), hint)

    def _start(self, path: AngularPath, x: Tensor, step: float) -> _Runs:
        """All samples at the start of the transition. The noise is 0 there: only its changes matter."""
        n, t = len(x), path.ends[0].expand(len(x))
        w = x.to(double(x)) / float(path.sde.size(path.ends[0]))
        nu, zero = torch.full_like(t, path.start), torch.zeros_like(t)
        place = Place(nu, t, nu, path.clock(nu, self.l), zero, w, torch.zeros_like(w))
        landing = torch.zeros(n, dtype=torch.bool)
        noise = Bridges(place.clock, w)
        return _Runs(torch.arange(n), zero + step, landing, place, place, torch.zeros_like(w), w, noise)

    @staticmethod
    def _evaluate(model: BaseModel, runs: _Runs, count: int) -> tuple[Tensor, Tensor]:
        """V of each sample, at the start or at the end of its step, and the time (n,)."""
        t = torch.where(runs.landing, runs.there.t, runs.here.t)
        state = choose(runs.landing, runs.there.w, runs.here.w)
        views = model.rows(runs.rows, count).predict(broadcast(model.sde.size(t), state) * state, t)
        return views.v, t

    def _judge(self, runs: _Runs, velocity: Tensor, largest: float) -> Tensor:
        """Accept or reject the steps whose end was evaluated, and choose the next step; (n,), True for accepted."""
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
        """Propose the end of a step, with w' there, for the samples that were evaluated at its start."""
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
    """The error for samples (n,) of a batch of `count` that ended at times t (n,)."""
    where = ", ".join(f"{int(i)} at t={float(at):.3g}" for i, at in zip(rows[:8], t[:8], strict=True))
    return RuntimeError(f"{len(rows)} of {count} samples {reason} (first {where}): {hint}")
