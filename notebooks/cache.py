"""The cached run of the notebooks: of a trained run, what it takes to load, to sample and to measure it.

    python notebooks/cache.py [RUN]

RUN is runs/digits unless given, what `make demo` leaves; notebooks/runs/<name of RUN> then holds

    config.yaml               as it is
    log.jsonl                 as it is
    metrics.jsonl             the lines that were measured on these weights: their provenance names this checkpoint,
                              and as `of` the one that it is of
    per_sample/               the likelihood of each sample of the splits that such a line is about
    checkpoint.safetensors    the averaged weights alone, in the group "model"

and neither the optimiser's moments nor the weights of the last step: `ss.load(...)` gives the averaged weights for
weights="ema" and for weights="raw", since there are no others, and training cannot go on from it. Each file is replaced
atomically.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch

import scoresde as ss
from scoresde.build import CONFIG
from scoresde.evaluation.records import METRICS, PER_SAMPLE, digest
from scoresde.training import checkpoint
from scoresde.training.log import LOG
from scoresde.training.trainer import CHECKPOINT

RUNS = Path(__file__).parent / "runs"


def cache(run: Path, runs: Path = RUNS) -> Path:
    """Write the cached run of a run below the folder `runs`; its directory.

    Raises:
        FileNotFoundError: no run there, or none with a checkpoint.
        ValueError: a checkpoint that does not fit its configuration.
    """
    model, cached = ss.load(run).model, runs / run.resolve().name
    _, info = checkpoint.load(run / CHECKPOINT, set())
    described = {"step": info.get("step"), "weights": "ema", "of": digest(run / CHECKPOINT)}
    checkpoint.save(cached / CHECKPOINT, {"model": model.state_dict()}, described)
    lines = measured(run, digest(cached / CHECKPOINT))
    splits = {row["split"] for row in map(json.loads, lines) if row["kind"] == "likelihood"}
    contents = {name: (run / name).read_bytes() for name in (CONFIG, LOG)} | {METRICS: "".join(lines).encode()}
    for name in (f"{PER_SAMPLE}/{split}.npz" for split in sorted(splits)):
        contents[name] = (run / name).read_bytes()
    for name, content in contents.items():
        checkpoint.replace_atomically(cached / name, partial(Path.write_bytes, data=content))
    kept = ss.load(cached).model.state_dict()
    if not all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items()):
        raise RuntimeError(f"{cached} does not load as {run} does")
    return cached


def measured(run: Path, cached: str | None) -> list[str]:
    """The lines of a run's metrics.jsonl that are about its checkpoint, as lines about the cached one."""
    if not (run / METRICS).is_file():
        return []
    weights, rows = digest(run / CHECKPOINT), map(json.loads, (run / METRICS).read_text().splitlines())
    about = [row for row in rows if row.get("provenance", {}).get("checkpoint") == weights]
    return [
        f"{json.dumps({**row, 'provenance': {**row['provenance'], 'checkpoint': cached, 'of': weights}})}\n"
        for row in about
    ]


if __name__ == "__main__":
    made = cache(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits"))
    for file in sorted(path for path in made.rglob("*") if path.is_file()):
        print(f"{file.stat().st_size:>9,} bytes  {file}")
