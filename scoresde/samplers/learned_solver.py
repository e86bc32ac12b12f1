"""Solvers whose coefficients were learned for a model: a table of numbers, and the sampler that uses it.

`SolverTable` has the formula. A row combines every view so far, so each deterministic method with one evaluation a step
is such a table, of any order and with or without a corrector: `SolverTable.of`. The last state y_n is the state of the
probability flow at t_min, or E[x_0 | x] there; the denoising is then the last row. `samplers.learning` fits the table
to a model.

A table belongs to the path that it was learned for: its times and coefficients mean nothing on another one. It records
alpha and sigma, and a sampler refuses a model with another path or another range of times.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scoresde.arguments import Few, checked
from scoresde.atomic_files import replace_atomically
from scoresde.random_stream import RandomStream
from scoresde.samplers.grids import Transition
from scoresde.samplers.linear import Linear, Memory, Row, Stage
from scoresde.samplers.sampler import Sampler
from scoresde.score import BaseModel
from scoresde.sdes import SDE
from scoresde.sdes.transitions import points

VIEWS = ("denoised", "noise", "v")
NODES = 17  # times at which two paths are compared
SAME = 1e-6  # largest relative difference of alpha and sigma on the same path
FORMAT = "scoresde solver 1"


def path_of(sde: SDE) -> Tensor:
    """Return a record of a path: times from t_min to t_max, alpha and sigma there, float64 (3, NODES)."""
    t = torch.linspace(sde.t_min, sde.t_max, NODES, dtype=torch.float64)
    return torch.stack([t, sde.alpha(t), sde.sigma(t)]).detach()


@dataclass(frozen=True)
class SolverTable:
    """The coefficients of a learned solver with n evaluations.

    With V one view of the model, x(t_max) = y_0 and V_k = V(y_k, t_k), row k of the table makes the next state

        y_(k+1) = a_k y_k + sum_(j <= k) b_kj V_(k-j),        k = 0, ..., n - 1,

    and y_n is the sample. Every deterministic method with one evaluation a step is such a table (`SolverTable.of`);
    `samplers.learn` fits one to a model, and `LearnedSolver` samples with it. A table belongs to the path that it was
    learned for.

    Attributes:
        t: the times t_k of the evaluations, (n,), float64; the first is t_max.
        a: the factors a_k of the state, (n,), float64.
        b: the factors of the views, (n, n), float64; b[k, j] multiplies the view j evaluations before the newest one.
        view: the view V: "denoised", E[x_0 | x]; "noise", E[eps | x]; or "v", E[v | x].
        path: times, alpha and sigma of the path that the table was learned for, float64 (3, 17), see `path_of`.
        notes: how the table was learned, and how far its samples are from the flow's; plain numbers and texts.

    Raises:
        ValueError: a number is not finite, the shapes do not fit, the view is unknown, or the times do not fall from
            t_max to a time of at least t_min.
    """

    t: Tensor
    a: Tensor
    b: Tensor
    view: str
    path: Tensor
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.t)
        shapes = {"t": (n,), "a": (n,), "b": (n, n), "path": (3, NODES)}
        for name, shape in shapes.items():
            part: Tensor = getattr(self, name)
            if n < 1 or part.shape != shape or part.dtype != torch.float64 or not bool(torch.isfinite(part).all()):
                raise ValueError(
                    f"{name} of a table must be finite float64 numbers of shape {shape}, with at least one evaluation; "
                    f"got {part.dtype} {tuple(part.shape)}"
                )
        if self.view not in VIEWS:
            raise ValueError(f"view must be one of {', '.join(VIEWS)}; got {self.view!r}")
        low, high = self.path[0, 0], self.path[0, -1]
        if self.t[0] != high or self.t[-1] < low or not bool((self.t.diff() < 0).all()):
            raise ValueError(f"the times must fall from {high:g} to at least {low:g}; got {self.t.tolist()}")

    @property
    def nfe(self) -> int:
        """The number of evaluations n."""
        return len(self.t)

    @classmethod
    def of(cls, method: Linear, sde: SDE, times: Tensor, denoise_final: bool = False) -> "SolverTable":
        """Return the table of a method on a grid of times, from t_max to t_min, float64.

        The change that a corrector makes to a state is part of b in the next row.

        Args:
            method: deterministic, with one evaluation a step.
            sde: the path.
            times: the grid; its last time is an evaluation only with `denoise_final`.
            denoise_final: if True, a last row is E[x_0 | x] at t_min.

        Raises:
            ValueError: the method draws noise, or has several evaluations a step.
        """
        rows = method.plan(sde, list(pairwise(times))) if len(times) > 1 else []
        if method.stochastic or any(len(row.stages) != 1 or row.kick or row.stages[0].c for row in rows):
            raise ValueError(
                f"a learned solver must start from a deterministic method with one evaluation a step; got "
                f"{type(method).__name__}: take DPMSolverPP(2), AngularAdams() or DDIM()"
            )
        n = len(rows) + denoise_final
        t, a, b = times[:n].clone(), torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
        before: tuple[float, ...] = ()  # b of the previous row
        for k, row in enumerate(rows):
            stage = row.stages[0]
            a[k] = stage.a
            for j, weight in enumerate(stage.b):
                b[k, j] = weight
            for j, weight in enumerate(_differences(row.correct, before)):
                b[k, j] += stage.a * weight
            before = stage.b
        if denoise_final:
            a[-1], b[-1, 0] = _denoising(sde, times[-1], method.view)
        return cls(t, a, b, method.view, path_of(sde))

    def rows(self) -> list[Row]:
        """Return the plan of `samplers.linear.Linear` with these coefficients."""
        parts = zip(self.t, self.a.tolist(), self.b.tolist(), strict=True)
        return [Row((Stage(t, a, tuple(b[: k + 1])),)) for k, (t, a, b) in enumerate(parts)]

    def check_path(self, sde: SDE) -> None:
        """Raise ValueError unless `sde` is the path that the table was learned for."""
        low, high = self.path[0, 0].item(), self.path[0, -1].item()
        if (sde.t_min, sde.t_max) != (low, high):
            raise ValueError(
                f"this solver must have the times of the model, from {sde.t_min:g} to {sde.t_max:g}; got one learned "
                f"for {low:g} to {high:g}: learn one for this model (samplers.learn, scoresde distill)"
            )
        if not torch.allclose(path_of(sde), self.path, rtol=SAME, atol=0):
            raise ValueError(
                f"this solver must be learned for the path of the model, {type(sde).__name__}; got one for another "
                "alpha or sigma: learn one for this model (samplers.learn, scoresde distill)"
            )

    def save(self, path: str | Path) -> None:
        """Write the table to a safetensors file, which is replaced atomically."""
        tensors = {name: getattr(self, name).contiguous() for name in ("t", "a", "b", "path")}
        about = {"format": FORMAT, "view": self.view, "notes": json.dumps(self.notes)}
        replace_atomically(Path(path), lambda file: safetensors.torch.save_file(tensors, file, about))

    @classmethod
    def load(cls, path: str | Path) -> "SolverTable":
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file does not hold a learned solver.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no learned solver at {path}: learn it by `scoresde distill run=... method=solver nfe=[...]`"
            )
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("t", "a", "b", "path")}
            if about.get("format") != FORMAT:
                raise ValueError(f"its format is {about.get('format')!r}, not {FORMAT!r}")
            return cls(**tensors, view=about["view"], notes=json.loads(about["notes"]))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must hold a learned solver ({error}): learn it again") from error


class LearnedSolver(Sampler):
    """A deterministic sampler with the coefficients of a `SolverTable`: n evaluations, no settings.

        y_(k+1) = a_k y_k + sum_(j <= k) b_kj V_(k-j),        V_k = V(y_k, t_k) a view of the model, y_0 = x(t_max)

    `samplers.learn(model, nfe)` returns one; `StoredSolver` reads one that `scoresde distill` learned.

        sampler = ss.samplers.learn(model, nfe=5)
        samples = sampler(model, shape=(16, 1, 8, 8), seeds=range(16)).x

    Args:
        table: the coefficients.

    Raises:
        ValueError: in a call, the model has another path than the one that the table was learned for.
    """

    def __init__(self, table: SolverTable):
        super().__init__()
        self.table = table

    @property
    def nfe(self) -> int:
        """The number of evaluations for each sample."""
        return self.table.nfe

    def transitions(self, sde: SDE) -> list[Transition]:
        """Return the pairs of the times of consecutive evaluations; the last pair ends at t_min."""
        self.table.check_path(sde)
        t = self.table.t
        return list(zip(t, [*t[1:], t.new_tensor(sde.t_min)], strict=True))

    def plan(self, sde: SDE, transitions: Sequence[Transition]) -> list[Row]:
        """Return the rows of the table."""
        return self.table.rows()

    def advance(
        self, model: BaseModel, x: Tensor, entry: Row, stream: RandomStream, memory: Memory | None
    ) -> tuple[Tensor, Memory]:
        """Return the next state, and the memory with all views so far."""
        method = Linear()
        method.view, method.past = self.table.view, self.nfe
        return method.advance(model, x, entry, stream, memory)


@checked
class StoredSolver(LearnedSolver):
    """The learned solver for a number of evaluations, from a directory that `scoresde distill` wrote.

    Args:
        directory: the directory, `<run>/solvers`.
        nfe: the number of evaluations.

    Raises:
        FileNotFoundError: no solver was learned for this number of evaluations.
        ValueError: the file does not hold a learned solver.
    """

    def __init__(self, directory: str, nfe: Few):
        self.directory = directory
        super().__init__(SolverTable.load(solver_file(directory, nfe)))


def solver_file(directory: str | Path, nfe: int) -> Path:
    """Return the path of the learned solver with `nfe` evaluations in a directory."""
    return Path(directory) / f"nfe{nfe}.safetensors"


def _differences(correct: Sequence[float], before: Sequence[float]) -> list[float]:
    """Return what the corrector adds to the coefficients of the views, the newest first; [] without a corrector."""
    if not correct:
        return []
    old = (0.0, *before)
    padded = [(*weights, *[0.0] * (max(len(old), len(correct)) - len(weights))) for weights in (correct, old)]
    return [new - known for new, known in zip(*padded, strict=True)]


def _denoising(sde: SDE, t: Tensor, view: str) -> tuple[float, float]:
    """Return (a, b) with E[x_0 | x] = a x + b V at time t, for a view V."""
    (here,) = points(sde, [t])
    if view == "denoised":
        return 0.0, 1.0
    if view == "noise":
        return 1 / here.alpha, -here.sigma / here.alpha
    square = math.hypot(here.alpha, here.sigma) ** 2
    return here.alpha / square, -here.sigma / math.sqrt(square)
