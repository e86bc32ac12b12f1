r"""The fit of a solver's table to a model: the loss and the optimiser of `samplers.learning`.

With Phi the solver with parameters theta (a, b and t of `samplers.learned_solver`), Psi an accurate solve of the
probability flow, d the dimensions, and q the squared distance |Phi(x_T) - Psi(x_T)|^2 / d, the parameters minimise

    E[ c (c^2 + q)^(1/2) - c^2 ],        c = `robust` times the root mean square of q^(1/2) at the first table.

This is about q/2 for small q and c q^(1/2) for large q: a few starts between two modes of the data are drawn to the
wrong one by any solver, and their squared distance alone would decide the gradient. These starts matter most and are
rare, so half of the starts of a step are drawn with probabilities proportional to the q^(1/2) that they had when they
were last drawn, and half uniformly; weights make the gradient unbiased. The gradient goes through the network at every
evaluation. With `radius` > 0 the starts may move, each within a ball around x_T, towards states from
which the solver does reach Psi(x_T) (the relaxed objective of LD3, 2405.15506, section 3.3).

theta has very unequal sensitivities. Adam therefore works on phi in theta = theta_0 + L phi, with L L^T the inverse of
the Gauss-Newton matrix E[J^T J] at the first table, J = d Phi / d theta. It is averaged over products with random signs
z, as E[J^T z z^T J] = J^T J (Hutchinson). Then a step of phi changes all samples about equally, and hundreds of steps
do what needs thousands on theta itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scoresde.arguments import CountOrZero, Few, Infinite, NonNegative, Positive, checked
from scoresde.probability_flow import frozen
from scoresde.progress import progress_bar
from scoresde.protocols import Condition, select
from scoresde.samplers.grids import Angle
from scoresde.samplers.learned_solver import SolverTable
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.tensors import broadcast, double

CHECKS = 8  # tables that are compared on held-out starts
WARMUP = 20  # steps in which the learning rate grows
PROBES, WHITENED = 2, 256  # probes z for each start, and starts, for the Gauss-Newton matrix
NODES = 4096  # of the table that maps the coordinate of a grid to times


@checked
@dataclass(frozen=True)
class Learning:
    """Settings of `samplers.learn`: how the table of a solver is fitted to a model.

    With q the squared distance per dimension of a sample from that of the accurate flow, the fit minimises E[c (c^2 +
    q)^(1/2) - c^2] by Adam. Adam works on phi in theta = theta_0 + L phi, where theta are the coefficients and times,
    theta_0 those of the initial formula, and L L^T the inverse of the Gauss-Newton matrix there.

    Args:
        steps: steps of Adam; 0 keeps the formula.
        batch_size: starts of a step.
        pool: starts to learn from.
        held_out: starts that choose the best iterate.
        target_steps: steps of the accurate solver (Adams); its error should be far below that of the learned solver.
        rate: the first learning rate of phi, times the number of evaluations, in units of the root mean square distance
            of the formula; it falls to 0 along a cosine.
        robust: c, as a multiple of that distance; infinity for the squared distance.
        ridge: added to the Gauss-Newton matrix, as a fraction of its diagonal.
        radius: how far starts may move, as a fraction of their norm (2405.15506, section 3.3); 0 keeps them.
        denoise_final: if True, the samples are E[x_0 | x] at t_min, and the evaluation there is the last of the n.
        checkpointing: recompute the network in the backward pass, which then needs the memory of one evaluation.

    Raises:
        ValueError: a setting is out of its range.
    """

    steps: CountOrZero = 300
    batch_size: Few = 64
    pool: Few = 2048
    held_out: Few = 256
    target_steps: Few = 40
    rate: Positive = 0.03
    robust: Annotated[float, Infinite(0)] = 1.0
    ridge: Positive = 0.01
    radius: NonNegative = 0.0
    denoise_final: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.robust == 0:
            raise ValueError("robust must be positive; got 0: choose 1, or inf for the squared distance")


@dataclass(frozen=True)
class Starts:
    """Starts x (n, *) at t_max, the samples `target` (n, *) of the accurate flow from them, and their conditions."""

    x: Tensor
    target: Tensor
    cond: Condition = None

    def given(self, model: BaseModel, rows: Tensor | slice) -> BaseModel:
        """Return the model with the conditions of these rows."""
        return model.given(select(self.cond, rows, len(self.x)))

    def first(self, count: int) -> "Starts":
        """Return the first `count` starts."""
        rows = slice(count)
        return Starts(self.x[rows], self.target[rows], select(self.cond, rows, len(self.x)))

    def batches(self, size: int, count: int | None = None) -> Iterator[slice]:
        """Yield the slices of consecutive batches of the first `count` starts, by default all."""
        end = len(self.x) if count is None else min(count, len(self.x))
        return (slice(i, min(i + size, end)) for i in range(0, end, size))


class Parameters:
    """theta (P,): changes of a, of b where j <= k, and of the times after the first, from a first table.

    Times change in the coordinate u of `grids.Angle(15, scale=3)`, which is nearly log(sigma/alpha) and bounded at both
    ends of every path; u is 0 at t_max and 1 at t_min. A time at t_min, the denoising, stays there.
    """

    def __init__(self, first: SolverTable, sde: SDE):
        n = first.nfe
        self.first, self.sde = first, sde
        self.rows, self.columns = torch.tril_indices(n, n)
        self.movable = torch.arange(n)[(first.t < sde.t_max) & (first.t > sde.t_min)]
        self.count = n + len(self.rows) + len(self.movable)
        self.times = Angle(15.0, scale=3.0)(sde, NODES - 1)
        rising = self.times.flip(0)
        above = torch.searchsorted(rising, first.t).clamp(1, NODES - 1)
        share = (first.t - rising[above - 1]) / (rising[above] - rising[above - 1])
        self.u = 1 - (above - 1 + share) / (NODES - 1)

    def coefficients(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a (n,), b (n, n) and t (n,) for theta (P,); each with a leading B for (B, P)."""
        n, first, lead = self.first.nfe, self.first, theta.shape[:-1]
        a, b, t = theta.split([n, len(self.rows), len(self.movable)], dim=-1)
        whole = torch.zeros(*lead, n, n, dtype=torch.float64).index_put(
            (*(torch.arange(size).reshape(-1, 1) for size in lead), self.rows, self.columns), b
        )
        u = self.u[self.movable] + t
        moved = first.t.expand(*lead, n).index_copy(-1, self.movable, self._time(u))
        return first.a + a, first.b + whole, moved

    def _time(self, u: Tensor) -> Tensor:
        """Return the times at u, linear between the nodes; clamped to the range of the path."""
        place = u.clamp(0, 1) * (NODES - 1)
        before = place.detach().floor().clamp(max=NODES - 2).long()
        low, high = self.times[before], self.times[before + 1]
        return (low + (high - low) * (place - before)).clamp(self.sde.t_min, self.sde.t_max)

    def table(self, theta: Tensor) -> SolverTable | None:
        """Return the table at theta; None if its times do not fall."""
        a, b, t = self.coefficients(theta)
        if not bool((t.diff() < 0).all()):
            return None
        return replace(self.first, a=a, b=b, t=t)


def iterates(
    model: BaseModel, table: SolverTable, starts: Starts, settings: Learning, rms: float, seed: int, progress: bool
) -> Iterator[SolverTable]:
    """Yield about `CHECKS` tables while they are fitted, from `table` on.

    Args:
        model: as `wrappers.for_inference` returns it.
        table: the first table.
        starts: the starts to learn from.
        settings: see `Learning`.
        rms: the root mean square distance of the first table, positive.
        seed: the seed of the random draws.
        progress: show a progress bar.

    Raises:
        RuntimeError: the loss, or a sample of the first table, is not finite.
    """
    fit = _Fit(model, starts, settings, Parameters(table, model.sde), settings.robust * rms)
    generator = torch.Generator().manual_seed(seed)
    with frozen(model):
        yield from fit.run(rms, generator, progress)


@dataclass(frozen=True)
class _Fit:
    """The parts of a fit; scale is c of the module docstring."""

    model: BaseModel
    starts: Starts
    settings: Learning
    parameters: Parameters
    scale: float

    @torch.enable_grad()
    def run(self, rms: float, generator: torch.Generator, progress: bool) -> Iterator[SolverTable]:
        """Yield tables while theta is learned; arguments as in `iterates`."""
        s, starts, evaluations = self.settings, self.starts, self.parameters.first.nfe
        moved = torch.zeros_like(starts.x) if s.radius else None
        whitening, lengths = self.whitening(generator), self.lengths()
        phi = torch.zeros(self.parameters.count, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([phi], betas=(0.9, 0.99))
        for i in progress_bar(range(s.steps), title=f"{evaluations} evaluations", unit="step", shown=progress):
            warm = min(1.0, (i + 1) / min(WARMUP, s.steps))
            decay = 0.5 * (1 + math.cos(math.pi * i / s.steps))
            optimizer.param_groups[0]["lr"] = s.rate / evaluations * rms * warm * decay
            shares = 0.5 / len(starts.x) + 0.5 * lengths / lengths.sum()
            rows = torch.multinomial(shares, s.batch_size, replacement=True, generator=generator)
            x = starts.x[rows] if moved is None else (starts.x[rows] + moved[rows]).requires_grad_()
            y = self.solve(whitening @ phi, x, rows)
            q = squares(y, starts.target[rows])
            loss = (robust(q, self.scale) / (len(starts.x) * shares[rows]).to(q.device)).mean()
            if not bool(torch.isfinite(loss)):
                raise RuntimeError(f"the loss is {float(loss)} in step {i}: lower rate, or check the model")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            lengths[rows] = q.detach().sqrt().cpu()
            if moved is not None and x.grad is not None:
                moved[rows] = displaced(moved[rows], x.grad, starts.x[rows], s.radius)
            if (i + 1) % max(s.steps // CHECKS, 1) == 0 or i + 1 == s.steps:
                candidate = self.parameters.table(whitening @ phi.detach())
                if candidate is not None:
                    yield candidate

    def solve(self, theta: Tensor, x: Tensor, rows: Tensor | slice) -> Tensor:
        """Return the samples y_n (B, *) from the starts x, differentiable in theta (P,) or (B, P) and in x."""
        a, b, t = self.parameters.coefficients(theta)
        model, view, y = self.starts.given(self.model, rows), self.parameters.first.view, x
        views: list[Tensor] = []

        def evaluate(y: Tensor, t: Tensor) -> Tensor:
            return getattr(model.predict(y, t), view)

        for k in range(a.shape[-1]):
            keeps = self.settings.checkpointing
            value = checkpoint(evaluate, y, t[..., k], use_reentrant=False) if keeps else evaluate(y, t[..., k])
            views = [value, *views]
            y = broadcast(a[..., k], y) * y
            for j, v in enumerate(views):
                y = y + broadcast(b[..., k, j], v) * v
        return y

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """Return the distance of each sample to the flow's at theta = 0, (N,), float64 on the CPU.

        Raises:
            RuntimeError: a sample is not finite.
        """
        theta = torch.zeros(self.parameters.count, dtype=torch.float64)
        parts = [
            squares(self.solve(theta, self.starts.x[rows], rows).detach(), self.starts.target[rows])
            for rows in self.starts.batches(4 * self.settings.batch_size)
        ]
        lengths = torch.cat(parts).sqrt().cpu()
        if not bool(torch.isfinite(lengths).all()):
            count = int((~torch.isfinite(lengths)).sum())
            raise RuntimeError(
                f"{count} of {len(lengths)} samples of the formula are not finite: give another start formula"
            )
        return lengths

    def whitening(self, generator: torch.Generator) -> Tensor:
        """Return L of the module docstring, (P, P), at theta = 0; starts count less where the loss is flatter."""
        count, total = self.parameters.count, 0.0
        size, used = self.settings.batch_size, min(WHITENED, len(self.starts.x))
        gram = torch.zeros(count, count, dtype=torch.float64)
        for rows in self.starts.batches(size, used):
            x, target = self.starts.x[rows], self.starts.target[rows]
            theta = torch.zeros(len(x), count, dtype=torch.float64, requires_grad=True)
            y = self.solve(theta, x, rows)
            weights = (1 + squares(y.detach(), target) / self.scale**2).pow(-0.25).cpu()
            for _ in range(PROBES):
                z = torch.randint(2, y.shape, generator=generator).to(y) * 2 - 1
                (product,) = torch.autograd.grad((z * y).sum(), theta, retain_graph=True)
                product = weights[:, None] * product
                gram += product.mT @ product
            total += len(x) * PROBES * y[0].numel()
        gram /= total
        diagonal = gram.diagonal().clamp_min(1e-9 * float(gram.diagonal().mean()) + 1e-300)
        values, vectors = torch.linalg.eigh(gram + self.settings.ridge * torch.diag(diagonal))
        return vectors * values.rsqrt()


def squares(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared difference of each sample over the dimensions, (B,), float64."""
    return (x - y).to(double(x)).flatten(1).square().mean(dim=1)


def robust(q: Tensor, scale: float) -> Tensor:
    """Return the loss of the module docstring, of squared distances q (B,); q/2 for an infinite scale."""
    return q / 2 if math.isinf(scale) else scale * (scale**2 + q).sqrt() - scale**2


def displaced(moved: Tensor, gradient: Tensor, x: Tensor, radius: float) -> Tensor:
    """Return displacements (B, *) after a step against the gradient, kept within the ball of `radius` |x|."""
    norm = x.flatten(1).norm(dim=1)
    unit = broadcast(1 / gradient.flatten(1).norm(dim=1).clamp_min(1e-30), x) * gradient
    moved = moved - broadcast(0.2 * radius * norm, x) * unit
    excess = (radius * norm / moved.flatten(1).norm(dim=1).clamp_min(1e-30)).clamp(max=1)
    return broadcast(excess, x) * moved
