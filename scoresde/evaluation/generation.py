"""Draw any number of samples of a run, in batches that processes share, and resume after an interruption.

Sample i is drawn from seed + i, independent of its batch and process; in rows of `columns` samples, such as one row for
each class, from seed + (i mod columns), so that the samples of a column start from the same noise. Finished batches are
stored in `<run>/drawing/<hash of the settings>/`, under the seeds of the batch and a hash of its conditions. The same
command, or a command for more samples with the same settings, resumes from these files. Processes exchange samples
through them, so all processes must see the directory of the run.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.arguments import check_memory
from scoresde.build import Run
from scoresde.evaluation.resumable import Numbers, describe, directory_for, evaluate, fingerprint
from scoresde.protocols import Condition, Model, by_name, expand, select
from scoresde.samplers import Sampler
from scoresde.training import checkpoint, distributed
from scoresde.training.locks import shared
from scoresde.wrappers import as_model

DRAWING = "drawing"
COPIES = 3  # of all samples in memory: the batches, their concatenation, and data units


@dataclass(frozen=True)
class DrawnSamples:
    """Samples x (n, *) in data units on the CPU, and their cost.

    x has only the first batch if the samples were passed to a function `consume`, see `draw_samples`. nfe, backward:
    network evaluations and backward passes for each sample. seconds: time of all batches.
    """

    x: Tensor
    nfe: int
    seconds: float
    backward: int


def draw_samples(
    run: Run,
    sampler: Sampler,
    n: int,
    batch_size: int = 256,
    seed: int = 0,
    model: Model | None = None,
    progress: bool = False,
    cond: Condition = None,
    columns: int | None = None,
    consume: Callable[[Iterable[Tensor]], Any] | None = None,
) -> DrawnSamples:
    """Draw n samples of a run, sample i from seed + (i mod columns); return all of them in every process.

    Args:
        run: supplies the model, the transform and the shape of the data.
        sampler: must accept `seeds`, so that a sample does not depend on its batch.
        n: number of samples.
        batch_size: samples at a time; it affects samples by rounding only.
        seed: the seed of the first sample.
        model: the model to use instead of the run's, for example a thresholded or guided model.
        progress: show a progress bar.
        cond: the condition: tensors with leading dimension n, or 1 if all samples have the same condition. Each batch
            is drawn from `model.given(rows)` with its rows of the condition.
        columns: number of samples with different seeds; default: n.
        consume: called in the first process with the batches of samples in order, such as a function that writes them
            to a file, so that only one batch is in memory; the result then has the first batch only.

    Raises:
        ValueError: n, batch_size or columns is not a positive integer, `cond` has another leading dimension, or the
            samples need more memory than there is.
        RuntimeError: samples that are not finite, see `samplers.Sampler`.
        Interrupted: Ctrl-C; finished batches stay stored.
    """
    check_count("n", n)
    check_count("batch_size", batch_size)
    shape = list(run.state_shape)
    held = n if consume is None else min(n, batch_size)  # samples in memory
    check_memory(f"n={n} samples of shape {shape}", COPIES * 4 * held * math.prod(shape))
    columns = n if columns is None else columns
    check_count("columns", columns)
    model = as_model(run.model if model is None else model)
    settings = [fingerprint(model, run.transform), describe(sampler), shape, batch_size]
    directory = directory_for(run.path / DRAWING, settings)
    parts, files = {}, []
    for i in range(0, n, batch_size):
        rows = range(i, min(i + batch_size, n))
        seeds = range(seed + i, seed + rows.stop) if columns >= n else [seed + row % columns for row in rows]
        part = _rows_of(cond, rows, n)
        file = directory / f"{_stem(seeds, part)}.safetensors"
        is_single = progress and n <= batch_size  # then the sampler shows the progress bar
        parts[file.stem] = partial(_draw, run, model.given(part), sampler, seeds, file, is_single)
        files.append((file, len(rows)))
    with shared(directory):
        costs = evaluate(parts, directory / "done", "samples", progress and n > batch_size).values()
        if consume is not None and distributed.rank() == 0:
            consume(_load(file, count, run) for file, count in files)
        kept = files if consume is None else files[:1]
        x = torch.cat([_load(file, count, run) for file, count in kept])
        distributed.gather(None)  # every process has read the files before they are removed
    nfe, backward = (max(cost[name] for cost in costs) for name in ("nfe", "backward"))
    return DrawnSamples(x, nfe, sum(cost["seconds"] for cost in costs), backward)


def _load(file: Path, n: int, run: Run) -> Tensor:
    """Load a batch of n samples.

    Raises:
        ValueError: the file does not hold n finite samples of the run's shape.
    """
    samples, shape = checkpoint.load(file, needed=["samples"])[0]["samples"], (n, *run.data_shape)
    if "x" not in samples or samples["x"].shape != shape or not checkpoint.is_finite(samples["x"]):
        raise ValueError(f"{file} must hold finite samples of shape {shape}: delete {file.parent} to draw again")
    return samples["x"]


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise ValueError if the argument `name` is not an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}; got {value!r}")


def _rows_of(cond: Condition, rows: range, n: int) -> Condition:
    """Return the `rows` of a condition; raise ValueError unless its leading dimension is n, or 1 for all n samples."""
    for name, part in by_name(cond).items():
        if not part.ndim or len(part) not in (1, n):
            raise ValueError(f"cond must have one {name} for each of the {n} samples; got shape {tuple(part.shape)}")
    return select(cond, slice(rows.start, rows.stop), n)


def _stem(seeds: Sequence[int], cond: Condition) -> str:
    """Return the name of a batch's file: its range of seeds; with conditions or repeated seeds, also a hash of them."""
    name, parts = f"{seeds[0]}-{seeds[-1] + 1}", by_name(expand(cond, len(seeds)))
    if isinstance(seeds, range) and not parts:
        return name
    hashed = hashlib.blake2b(str(list(seeds)).encode(), digest_size=8)
    for key in sorted(parts):
        hashed.update(f"{key} {parts[key].dtype} {parts[key].tolist()}".encode())
    return f"{name}-{hashed.hexdigest()}"


def _draw(run: Run, model: Model, sampler: Sampler, seeds: Sequence[int], file: Path, progress: bool) -> Numbers:
    """Draw a batch, store it in a file, and return its cost."""
    started = time.perf_counter()
    result = sampler(model, shape=(len(seeds), *run.state_shape), seeds=seeds, progress=progress)
    checkpoint.save(file, {"samples": {"x": run.transform.inverse(result.x.cpu())}}, {})
    return {"nfe": result.nfe, "backward": result.backward, "seconds": time.perf_counter() - started}
