"""Adams with nodes and quadrature weights that were learned for the likelihood of a model.

`Adams` takes equal steps of its variable u and integrates the divergence with the weights W_i of its corrector. A
learned solver has nodes of any spacing and a factor for each weight: n - 1 nodes and n + 1 factors, an `AdamsTable`;
`scoresde.adams_learning` fits them to a model.

A table belongs to one interval of u, from the data to the noise, and one scale S of the data (`probability_flow`).
"""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from scoresde.arguments import Few, checked
from scoresde.atomic_files import replace_atomically
from scoresde.solvers.adams import Adams, grid_weights, on_grid
from scoresde.solvers.solver import Field, Solution, check_data_scale

FORMAT = "scoresde likelihood solver 1"
ORDER, SMOOTHING = 3, 1  # of the formula for the state
SAME = 1e-9  # largest difference of the ends of equal intervals, relative to their length


@dataclass(frozen=True, eq=False)
class AdamsTable:
    """The nodes and quadrature factors of a learned `Adams` solver for likelihoods. A table equals only itself.

    In the variable u of the probability flow, n steps have nodes u_0 < ... < u_n. The state follows the formula of
    `Adams` on these nodes, and the integral of the divergence g is

        sum_i f_i W_i g_i,        W_i the weights of Adams' corrector, f_i a factor for each evaluation (1 without
            learning).

    `ss.learn_adams` fits a table to a model; `LearnedAdams` is the solver. A table belongs to one interval of u and to
    one scale S of the data.

    Attributes:
        nodes: (u_i - u_0) / (u_n - u_0), from 0 to 1, (n + 1,), float64.
        factors: f_i, (n + 1,), float64.
        interval: u_0 and u_n, (2,), float64.
        data_scale: S.
        notes: how the table was learned, and its errors; plain numbers and texts.

    Raises:
        ValueError: a number is not finite, the shapes do not fit, the nodes do not increase from 0 to 1, or S is not
            positive.
    """

    nodes: Tensor
    factors: Tensor
    interval: Tensor
    data_scale: float
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_data_scale(self.data_scale)
        for name, size in (("nodes", len(self.nodes)), ("factors", len(self.nodes)), ("interval", 2)):
            part: Tensor = getattr(self, name)
            if part.shape != (size,) or part.dtype != torch.float64 or not bool(torch.isfinite(part).all()):
                raise ValueError(f"{name} must be {size} finite float64 numbers; got {part.dtype} {tuple(part.shape)}")
        ends = self.nodes[[0, -1]].tolist() if len(self.nodes) > 1 else None
        if ends != [0.0, 1.0] or not bool((self.nodes.diff() > 0).all()):
            raise ValueError(f"nodes must increase from 0 to 1, with at least one step; got {self.nodes.tolist()}")

    @property
    def steps(self) -> int:
        """The number of steps n."""
        return len(self.nodes) - 1

    @classmethod
    def uniform(cls, steps: int, interval: tuple[float, float], data_scale: float) -> "AdamsTable":
        """Return the table of `Adams`: equal steps, and factors 1."""
        nodes = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        return cls(nodes, torch.ones_like(nodes), torch.tensor(interval, dtype=torch.float64), data_scale)

    def save(self, path: str | Path) -> None:
        """Write the table to a safetensors file, which is replaced atomically."""
        tensors = {name: getattr(self, name).contiguous() for name in ("nodes", "factors", "interval")}
        about = {"format": FORMAT, "data_scale": repr(self.data_scale), "notes": json.dumps(self.notes)}
        replace_atomically(Path(path), lambda file: safetensors.torch.save_file(tensors, file, about))

    @classmethod
    def load(cls, path: str | Path) -> "AdamsTable":
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file does not hold a learned solver.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"no learned solver at {path}: learn it by `scoresde distill run=... method=likelihood_solver`"
            )
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("nodes", "factors", "interval")}
            if about.get("format") != FORMAT:
                raise ValueError(f"its format is {about.get('format')!r}, not {FORMAT!r}")
            return cls(**tensors, data_scale=float(about["data_scale"]), notes=json.loads(about["notes"]))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must hold a solver of a likelihood ({error}): learn it again") from error


@dataclass(frozen=True)
class LearnedAdams:
    """Adams' method with learned nodes and quadrature factors (`AdamsTable`), for likelihoods with few evaluations.

        solver = ss.learn_adams(model, x, steps=12)
        nats = ss.log_prob(model, x_test, solver=solver).value

    A sample that turns NaN or infinite stops at its last finite state. Predictor and corrector may differ by any
    amount: held-out data have shown the errors of the table. The cost is n + 1 evaluations. The number of steps is
    fixed; `StoredAdams` has any number.

    Args:
        table: the nodes and factors.

    Raises:
        ValueError: in a call, the interval is not that of the table.
    """

    table: AdamsTable

    @property
    def data_scale(self) -> float:
        """The scale S of the data, see `Adams`."""
        return self.table.data_scale

    def finer(self) -> Adams:
        """Return `Adams` with four times the steps."""
        return Adams(4 * self.table.steps, ORDER, SMOOTHING, self.data_scale)

    def __str__(self) -> str:
        return f"LearnedAdams(steps={self.table.steps}, data_scale={self.data_scale:g})"

    def __call__(self, field: Field, x: Tensor, start: float, end: float) -> Solution:
        """Integrate from start to end; see `scoresde.solvers.solver`."""
        low, high = self.table.interval.tolist()
        if max(abs(start - low), abs(end - high)) > SAME * abs(high - low):
            raise ValueError(
                f"this solver must go from the data to the noise of the model that it was learned for, u={low:g} to "
                f"{high:g}; got u={start:g} to {end:g}: learn one for this model, or use solvers.Adams()"
            )
        grid = start + (end - start) * self.table.nodes
        predictor, corrector = grid_weights(grid, ORDER, SMOOTHING)
        quadrature = corrector * self.table.factors[window(self.table.steps)]
        return on_grid(field, x, grid, predictor, corrector, quadrature, math.inf)


def window(steps: int) -> Tensor:
    """Return the evaluations (n, p + 1) whose velocities the corrector of each step combines; 0 where there is none."""
    return (torch.arange(steps)[:, None] + 1 - torch.arange(ORDER + SMOOTHING + 1)).clamp(min=0)


@checked
@dataclass(frozen=True)
class StoredAdams:
    """The solvers that `scoresde distill method=likelihood_solver` wrote, as one solver with any number of steps.

    With a number of steps that has a table, it is that `LearnedAdams`, and otherwise `Adams`. The first levels of a
    multilevel estimate can so be learned, while the last ones refine the formula.

    Args:
        directory: the directory, `<run>/likelihood_solvers`.
        steps: the number of steps.

    Raises:
        FileNotFoundError: the directory has no learned solver.
        ValueError: the file does not hold a learned solver.
    """

    directory: str
    steps: Few = 12

    def __post_init__(self) -> None:
        if not any(Path(self.directory).glob("steps*.safetensors")):
            AdamsTable.load(table_file(self.directory, self.steps))

    @property
    def solver(self) -> LearnedAdams | Adams:
        """The solver with this number of steps."""
        path = table_file(self.directory, self.steps)
        return LearnedAdams(AdamsTable.load(path)) if path.is_file() else Adams(self.steps, ORDER, SMOOTHING)

    @property
    def data_scale(self) -> float | None:
        """The scale S of the data; None, to measure it, without a table for this number of steps."""
        return self.solver.data_scale

    def finer(self) -> "StoredAdams":
        """Return this solver with four times the steps."""
        return replace(self, steps=4 * self.steps)

    def __str__(self) -> str:
        return f"StoredAdams({self.solver})"

    def __call__(self, field: Field, x: Tensor, start: float, end: float) -> Solution:
        """Integrate from start to end; see `scoresde.solvers.solver`."""
        return self.solver(field, x, start, end)


def table_file(directory: str | Path, steps: int) -> Path:
    """Return the path of the table with `steps` steps in a directory."""
    return Path(directory) / f"steps{steps}.safetensors"
