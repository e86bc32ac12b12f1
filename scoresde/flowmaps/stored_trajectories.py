r"""Distillation from stored solutions of the teacher's flow.

A solution of `TrajectoryDistillation` costs K + 1 evaluations of the teacher with their derivatives, many times the
training of a flow map on one pair of its times. `stored_solutions` computes a number of them once, and
`StoredTrajectories` trains on them: the pairs of a batch come from as many solutions, and each epoch draws new pairs.
A solution is a tensor (K + 1, 3 + 2 d), d the number of dimensions, with the columns of `Trajectories`: t, y, v, the
divergence and its integral.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from scoresde.atomic_files import replace_atomically
from scoresde.data.items import Items
from scoresde.dequantization import DataMap
from scoresde.flowmaps.trajectory_distillation import Trajectories, TrajectoryDistillation
from scoresde.losses import Drawn, LossTerms
from scoresde.protocols import Model
from scoresde.random_stream import RandomStream
from scoresde.solvers.solver import choose

BATCH = 256  # solutions that are computed at a time


def stored_solutions(
    file: Path,
    objective: TrajectoryDistillation,
    model: Any,
    dataset: Dataset,
    data_map: DataMap,
    count: int,
    seed: int,
) -> Items:
    """Return the dataset of the `solutions` in a file, which is written if it does not exist.

    Raises:
        ValueError: the file has solutions with other settings; see also `solutions`.
    """
    settings = {"count": str(count), "seed": str(seed), "steps": str(objective.steps), "model": repr(model.path)}
    if not file.exists():
        found = {"solutions": solutions(objective, model, dataset, data_map, count, seed)}
        replace_atomically(file, partial(save_file, found, metadata=settings))
    with safe_open(file, "pt") as stored:
        if (other := stored.metadata()) != settings:
            raise ValueError(f"{file} must have solutions with {settings}; got {other}: delete it to solve again")
        return Items(stored.get_tensor("solutions"))


def solutions(
    objective: TrajectoryDistillation, model: Any, dataset: Dataset, data_map: DataMap, count: int, seed: int = 0
) -> Tensor:
    """Return solutions (count, K + 1, 3 + 2 d), float32; solution i is a function of (seed, i) and the dataset.

    About half of them start at states of the dataset, in a random order, and half at the prior. Failed ones are left
    out.

    Args:
        objective: solves the flow of its teacher.
        model: the flow map, for its path and its divergence.
        dataset: items are states `*` in data units.
        data_map: maps data to states.
        count: number of solutions.
        seed: seed of all draws.

    Raises:
        ValueError: the dataset has conditions, which the training may drop after the flow has been solved with them.
    """
    if isinstance(dataset[0], tuple):
        raise ValueError("stored solutions need data without conditions; got a dataset with them: set solutions=0")
    size, rows = len(dataset), []  # type: ignore[arg-type]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    for first in range(0, count, BATCH):
        numbers = range(first, min(first + BATCH, count))
        stream = RandomStream(seeds=[(seed << 40) + i for i in numbers])
        x = torch.stack([dataset[int(order[i % size])] for i in numbers])
        x0 = data_map.training_states(x, stream).float()
        drawn = Drawn(x0, torch.ones(len(x0), dtype=torch.float64), stream.normal(x0), stream)
        solved = objective.solve(model, drawn)
        rows.append(packed(solved)[solved.is_solved])
    return torch.cat(rows)


def packed(solved: Trajectories) -> Tensor:
    """Return solutions as one tensor (B, K + 1, 3 + 2 d), float32."""
    columns = [part.flatten(2) if part.ndim > 2 else part[..., None] for part in solved[:-1]]
    return torch.cat([column.float() for column in columns], dim=2).transpose(0, 1).contiguous()


class StoredTrajectories(TrajectoryDistillation):
    """A `TrajectoryDistillation` that reads its solutions of the teacher's flow from a dataset, computed once.

    A solution costs K + 1 evaluations of the teacher with their derivatives, many times the training of a flow map on
    one pair of its times. `flowmaps.stored_trajectories.stored_solutions` computes a number of solutions, tensors (K +
    1, 3 + 2 d) for d dimensions; the batches of this objective are such solutions in place of data, and each epoch
    draws new pairs of times.

    Args:
        objective: a `TrajectoryDistillation` with the settings; the number of solutions in a batch is the batch size.
        shape: shape `*` of one state.
    """

    def __init__(self, objective: TrajectoryDistillation, shape: Sequence[int]):
        super().__init__(**objective.every_argument())
        self.shape = tuple(shape)

    def forward(
        self,
        model: Model,
        x0: Tensor,
        cond: Any = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        stream: RandomStream | None = None,
    ) -> LossTerms:
        """Return the loss terms of solutions x0 (B, K + 1, 3 + 2 d); no noise is drawn for them."""
        return super().forward(model, x0, cond, t, x0 if noise is None else noise, generator, stream)

    def solve(self, model: Any, drawn: Drawn) -> Trajectories:
        """Return the solutions of a batch (B, K + 1, 3 + 2 d)."""
        stored, d = drawn.x0.transpose(0, 1), torch.Size(self.shape).numel()
        t, y, v, divergence, integral = stored.double().split([1, d, d, 1, 1], dim=2)
        times = t.squeeze(2).clamp(model.sde.t_min, model.sde.t_max).cpu()
        y, v = (part.reshape(*times.shape, *self.shape) for part in (y, v))
        is_solved = torch.ones(times.shape[1], dtype=torch.bool, device=y.device)
        return Trajectories(times, y, v, divergence.squeeze(2), integral.squeeze(2), is_solved)

    def clean(self, model: Any, drawn: Drawn) -> Drawn:
        """Return the draws with the clean ends of the solutions as x0: data, or samples of the teacher."""
        solved, low = self.solve(model, drawn), model.path.ends()[0]
        y = choose(solved.t[0] > solved.t[-1], solved.y[-1], solved.y[0])
        return replace(drawn, x0=model.path.to_state(y, low).float())
