"""Copy the files of a trained run that the notebooks need to load, sample and evaluate it.

    python notebooks/cache.py [RUN]

RUN defaults to runs/digits, the run of `make demo`. The script writes to notebooks/runs/<name of RUN>:

    config.yaml               unchanged
    log.jsonl                 unchanged
    metrics.jsonl             the lines measured with these weights; their provenance names the checkpoint written here
                              and, as `of`, the original checkpoint
    per_sample/               the per-sample likelihoods of the splits in metrics.jsonl
    checkpoint.safetensors    the averaged weights only, in the group "model"

The optimiser's moments and the weights of the last step are left out: `ss.load(...)` returns the averaged weights for
weights="ema" and weights="raw" alike, and training cannot be resumed. Each file is replaced atomically.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch

import scoresde as ss
from scoresde.atomic_files import replace_atomically
from scoresde.evaluation.records import METRICS, PER_SAMPLE, digest
from scoresde.run_config import CONFIG
from scoresde.training import checkpoint
from scoresde.training.log import LOG
from scoresde.training.trainer import CHECKPOINT

RUNS = Path(__file__).parent / "runs"


def cache(run: Path, runs: Path = RUNS) -> Path:
    """Write the cached copy of `run` to a folder in `runs` and return its path.

    Raises:
        FileNotFoundError: `run` is not a run directory or has no checkpoint.
        ValueError: the checkpoint does not fit its configuration.
        RuntimeError: the weights of the copy differ from those of the run.
    """
    model, cached = ss.load(run).model, runs / run.resolve().name
    _, info = checkpoint.load(run / CHECKPOINT, set())
    description = {"step": info.get("step"), "weights": "ema", "of": digest(run / CHECKPOINT)}
    checkpoint.save(cached / CHECKPOINT, {"model": model.state_dict()}, description)
    lines = select_metrics(run, digest(cached / CHECKPOINT))
    likelihoods = [row for row in map(json.loads, lines) if row["kind"] == "likelihood"]
    contents = {name: (run / name).read_bytes() for name in (CONFIG, LOG)} | {METRICS: "".join(lines).encode()}
    for name in sorted({f"{PER_SAMPLE}/{row.get('file', row['split'] + '.npz')}" for row in likelihoods}):
        contents[name] = (run / name).read_bytes()
    for name, content in contents.items():
        replace_atomically(cached / name, partial(Path.write_bytes, data=content))
    copied = ss.load(cached).model.state_dict()
    if not all(torch.equal(copied[name], tensor) for name, tensor in model.state_dict().items()):
        raise RuntimeError(f"the weights in {cached} differ from the averaged weights in {run}")
    return cached


def select_metrics(run: Path, cached: str | None) -> list[str]:
    """Return the lines of metrics.jsonl measured with the run's checkpoint, referring to the cached one."""
    if not (run / METRICS).is_file():
        return []
    weights, rows = digest(run / CHECKPOINT), map(json.loads, (run / METRICS).read_text().splitlines())
    selected = [row for row in rows if row.get("provenance", {}).get("checkpoint") == weights]
    return [
        f"{json.dumps({**row, 'provenance': {**row['provenance'], 'checkpoint': cached, 'of': weights}})}\n"
        for row in selected
    ]


if __name__ == "__main__":
    folder = cache(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits"))
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{file.stat().st_size:>9,} bytes  {file}")
