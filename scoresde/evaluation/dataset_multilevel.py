"""The multilevel estimate of a dataset's likelihood, in stored batches that processes share.

The numbers of draws depend on earlier values. These are the same in every process and after an interruption, so the
requests of the estimator are too: each is a set of parts (`evaluation.resumable`) with the number of the request in
their names.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.divergence import Trace
from scoresde.evaluation.batch_likelihood import BatchLikelihood
from scoresde.evaluation.resumable import evaluate
from scoresde.multilevel_bits import Draws, MultilevelLikelihood, multilevel_likelihood
from scoresde.solvers import Solver


def evaluate_multilevel(
    evaluation: BatchLikelihood,
    tolerance: float,
    levels: Sequence[int] | None,
    trace: Trace | None,
    batch_size: int,
    directory: Path,
    unit: str,
    progress: bool,
    surrogate: BatchLikelihood | None = None,
) -> tuple[MultilevelLikelihood, dict[str, str], int]:
    """Return the estimate, its conventions, and the number of grey levels, 0 for continuous data.

    Args:
        evaluation: evaluates batches; its solver is that of the levels, with other numbers of steps.
        tolerance, levels, trace: see `multilevel_bits.multilevel_likelihood`.
        batch_size, directory, unit, progress: size, place, title and progress bar of the batches.
        surrogate: evaluates batches under a cheaper model for level 0, whose attribute `solver` is its solver.
    """
    requests = count()
    conventions: dict[str, str] = {}
    grey_levels: list[int] = []

    def draw_from(source: BatchLikelihood, solver: Solver, trace: Trace, items: Tensor, repeats: Tensor) -> Draws:
        part = replace(source, solver=solver, trace=trace)
        batches = zip(items.split(batch_size), repeats.split(batch_size), strict=True)
        name = f"multilevel-{next(requests):06d}"
        parts = {f"{name}-{i:06d}": partial(part.values, *batch) for i, batch in enumerate(batches)}
        results = list(evaluate(parts, directory, unit, progress).values())
        if source is evaluation:
            conventions.update(conventions or results[0]["conventions"])
        grey_levels.extend(result["levels"] for result in results if result["levels"] is not None)
        errors = [result["error"] for result in results]
        stated = None if None in errors else _joined(errors)
        value, nfe, backward = (_joined([result[key] for result in results]) for key in ("value", "nfe", "backward"))
        return Draws(value, stated, nfe, backward)

    size = len(evaluation.dataset)  # type: ignore[arg-type]
    cheap: Any = None
    named: dict[str, str] = {}
    if surrogate is not None:
        cheap = partial(draw_from, surrogate), surrogate.run.model.solver
        named = {"surrogate": f"{surrogate.run.path}, at level 0"}
    found = multilevel_likelihood(
        partial(draw_from, evaluation), size, tolerance, evaluation.solver, levels, trace, evaluation.seed, cheap
    )
    return found, conventions | found.conventions() | named, max(grey_levels, default=0)


def _joined(columns: Sequence[Sequence[float | None]]) -> Tensor:
    """Return the entries of all columns, float64."""
    return torch.tensor([math.nan if x is None else x for column in columns for x in column], dtype=torch.float64)
