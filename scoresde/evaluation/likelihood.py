"""The likelihood of a run on a dataset: bits per dimension of quantised data, nats per dimension of continuous data."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from tqdm import tqdm

from scoresde.build import Run
from scoresde.dequantization import Uniform
from scoresde.divergence import Trace
from scoresde.likelihood import bits_per_dim, conventions, log_prob
from scoresde.protocols import Condition
from scoresde.solvers import Solver, Status
from scoresde.tensors import dimensions
from scoresde.training.batches import split_condition

METRICS = "metrics.jsonl"


@dataclass
class Likelihood:
    """A dataset's mean negative log-likelihood per dimension, with its standard error over samples and conventions."""

    unit: str
    mean: float
    stderr: float | None
    per_sample: Tensor
    conventions: dict[str, str]


def evaluate_likelihood(
    run: Run,
    dataset: Dataset,
    dequantization: Uniform | None,
    trace: Trace,
    solver: Solver,
    samples: int = 1,
    batch_size: int = 256,
    progress: bool = True,
) -> Likelihood:
    """The likelihood of a dataset under a run's model; sample i draws from seed i.

    Args:
        run: the model and its transform.
        dataset: items are states in data units, or (state, condition).
        dequantization: of integer levels, giving bits per dimension; None for continuous data, giving nats.
        trace, solver, samples: see `likelihood.bits_per_dim`.
        batch_size: samples at a time.
        progress: show a progress bar.
    """
    device = next((p.device for p in run.model.parameters()), torch.device("cpu"))
    x, cond = split_condition(default_collate([dataset[i] for i in range(len(dataset))]), device)  # type: ignore[arg-type]
    if dequantization is not None:
        bits = bits_per_dim(
            run.model,
            x,
            run.transform,
            cond,
            dequantization,
            samples,
            trace,
            solver,
            None,
            "data",
            batch_size,
            progress,
        )
        return Likelihood("bits/dim", bits.mean, bits.stderr, bits.per_image, bits.conventions)
    return _nats(run, x, cond, trace, solver, batch_size, progress)


def _nats(
    run: Run, x: Tensor, cond: Condition, trace: Trace, solver: Solver, batch_size: int, progress: bool
) -> Likelihood:
    values = []
    for indices in tqdm(torch.arange(len(x)).split(batch_size), desc="nats/dim", disable=not progress):
        part, condition = x[indices], _rows(cond, indices)
        result = log_prob(run.model, run.transform(part), condition, trace, solver, indices.tolist())
        if bool((result.status != Status.OK).any()):
            raise RuntimeError(f"the solver failed for some samples of {indices[0]} .. {indices[-1]}")
        values.append((result.value + run.transform.log_det(part)).cpu())
    per_sample = -torch.cat(values) / dimensions(x)
    declared = {
        "quantity": "negative log-density, nats per dimension",
        **conventions(run.model, run.transform, trace, solver, "data"),
    }
    count = len(per_sample)
    stderr = float(per_sample.std()) / math.sqrt(count) if count > 1 else None
    return Likelihood("nats/dim", float(per_sample.mean()), stderr, per_sample, declared)


def _rows(cond: Condition, indices: Tensor) -> Condition:
    if isinstance(cond, dict):
        return {key: value[indices] for key, value in cond.items()}
    return None if cond is None else cond[indices]


def append_metrics(run: Path, row: dict[str, Any]) -> Path:
    """Add a line to the run's `metrics.jsonl`, in one write: commands at the same time do not lose each other's."""
    line, path = f"{json.dumps(row)}\n".encode(), run / METRICS
    run.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write(line)
    return path
