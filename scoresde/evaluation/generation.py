"""Samples of a run in any number: in batches, kept until all are there, shared among processes.

Sample i is drawn from seed + i, whatever its batch and its process. A batch that is finished waits in
`<run>/drawing/<what is drawn>/`, an array in NumPy's format; an interrupted command goes on from there, as does one
that asks for more samples of the same kind. Processes exchange samples through these files, so that all of them have to
see the run's directory.
"""

import json
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from scoresde.build import Run
from scoresde.evaluation.resumable import Numbers, digest, evaluate, path_of, store
from scoresde.protocols import Model
from scoresde.samplers import Sampler
from scoresde.training import distributed
from scoresde.training.checkpoint import replace_atomically

DRAWING = "drawing"


@dataclass(frozen=True)
class DrawnSamples:
    """Samples (n, *) in data units, on the CPU; evaluations of each; seconds of all batches together; backward
    passes of each."""

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
    described: str = "",
    progress: bool = False,
) -> DrawnSamples:
    """n samples of a run, from seeds seed, ..., seed + n - 1, in each process.

    Args:
        run: its model, its transform, the shape of its data.
        sampler: of any kind; the same for any batch if it takes seeds as it should.
        n: number of samples.
        batch_size: samples at a time; another one gives the same samples, up to rounding.
        seed: of the first sample.
        model: another one than the run's, thresholded or guided.
        described: what tells this sampler and this model from others, for the batches that are kept: a
            configuration. Its attributes unless given.
        progress: show a progress bar.

    Raises:
        ValueError: no sample, or no batch.
        RuntimeError: samples that are not finite, see `samplers.Sampler`.
        Interrupted: Ctrl-C; what is finished is kept.
    """
    for name, value in (("n", n), ("batch_size", batch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} as a whole number of 1 or more expected; got {value!r}")
    model = run.model if model is None else model
    what = [_digest(run, model), described or describe(sampler), list(run.config.data.shape), batch_size]
    directory = store(run.path / DRAWING, what)
    ranges = [range(seed + i, min(seed + i + batch_size, seed + n)) for i in range(0, n, batch_size)]
    batches = {f"{part.start}-{part.stop}": part for part in ranges}
    files = {name: directory / f"{name}.npy" for name in batches}
    alone = progress and len(batches) == 1
    pieces = {name: partial(_draw, run, model, sampler, part, files[name], alone) for name, part in batches.items()}
    found = evaluate(pieces, directory / "done", "samples", progress and not alone)
    x = torch.cat([torch.from_numpy(np.load(file, allow_pickle=False)) for file in files.values()])
    distributed.gather(None)  # all have read what is now taken away
    if distributed.rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
    nfe, backward = (max(one[name] for one in found.values()) for name in ("nfe", "backward"))
    return DrawnSamples(x, nfe, sum(one["seconds"] for one in found.values()), backward)


def _draw(run: Run, model: Model, sampler: Sampler, seeds: range, file: Path, progress: bool) -> Numbers:
    """Draw a batch, leave it in a file, and return what it cost."""
    started = time.perf_counter()
    result = sampler(model, shape=(len(seeds), *run.config.data.shape), seeds=seeds, progress=progress)
    samples = run.transform.inverse(result.x.cpu()).numpy()

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as opened:
            np.save(opened, samples)

    replace_atomically(file, write)
    return {"nfe": result.nfe, "backward": result.backward, "seconds": time.perf_counter() - started}


def describe(part: object) -> str:
    """An object by its class and its public attributes, those of its parts included: JSON.

    Of a module, what its weights do not say; a function is its name.
    """
    return json.dumps(_tree(part), sort_keys=True)


def _tree(part: object) -> object:
    if part is None or isinstance(part, (bool, int, float, str)):
        return part
    if isinstance(part, Tensor):
        return part.tolist()
    if isinstance(part, (list, tuple)):
        return [_tree(one) for one in part]
    if isinstance(part, dict):
        return {str(key): _tree(value) for key, value in part.items()}
    attributes = {key: _tree(value) for key, value in getattr(part, "__dict__", {}).items() if key[0] != "_"}
    children = {key: _tree(child) for key, child in part.named_children()} if isinstance(part, nn.Module) else {}
    name = getattr(part, "__qualname__", type(part).__qualname__)
    return {"_type": f"{getattr(part, '__module__', '')}.{name}", **attributes, **children}


def _digest(run: Run, model: Model) -> str:
    """What stands for a model: its weights, its path, its transform."""
    states = model.state_dict().values() if isinstance(model, nn.Module) else ()
    return digest((*states, *path_of(run.model.sde)), f"{describe(model)} {run.transform}")
