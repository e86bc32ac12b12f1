"""The files of a run: configuration, log, metrics, samples.

    config.yaml            a mapping
    checkpoint.safetensors weights, and the training step that they are from
    log.jsonl              lines of the training log: some with a loss, some with metrics of held-out data
    skipped.jsonl          training steps that were skipped
    metrics.jsonl          results of `sample`, `bpd`, `evaluate`, `restore`, `classify`, ...; `kind` says which
    comparison*.csv        comparisons of samplers
    per_sample/FILE        the likelihood of each sample of a split
    samples/FILE           samples in data units
    figures/stepN.png      samples drawn during training

Each file but the configuration may be missing, and files of older versions have fewer fields. A line of metrics.jsonl
that names another checkpoint than the present one is about earlier weights: it is used only if no line of the same kind
is about the present checkpoint, and the page marks it.
"""

import csv
import json
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from scoresde.evaluation.records import METRICS, digest, load_per_sample
from scoresde.evaluation.sampler_comparison import ComparisonRow
from scoresde.training.guard import SKIPPED
from scoresde.training.json_lines import read_lines
from scoresde.training.trainer import CHECKPOINT, LOG

COMPARISON = "comparison.csv"
SPLITS = ("test", "validation", "train")  # the headline shows the first split that was measured
TEXTS = ("sampler", "metric", "space", "reference")  # columns of a comparison that are not numbers
Line = dict[str, Any]
DEFAULTS: dict[str, Line] = {  # fields that lines of older versions, or of other programs, may lack
    "likelihood": dict.fromkeys(
        ["stderr", "population", "monte_carlo", "discretisation", "bound", "label", "nfe", "seconds"]
    )
    | {"split": "test", "unit": "", "weights": "ema", "conventions": {}, "bound_conventions": {}},
    "samples": dict.fromkeys(["n", "nfe", "seconds", "seed", "threshold", "guidance", "cond"]),
}


class RunFiles:
    """The contents of a run's directory.

    Attributes:
        shape, kind: shape of a sample in data units, and how the page draws it: "images", "plane", "series" or
            "vectors".
        levels: number of grey levels of quantised data; None for continuous data.
        bounds: the data values that are drawn black and white.
        training, held_out: lines of the log with a training loss, and lines with metrics of held-out data.
        skipped, metrics, comparison: lines of skipped.jsonl and metrics.jsonl, rows of the last comparison.
        checkpoint: SHA-256 of the checkpoint, None if there is none.
        step, parameters: training steps and number of weights; None if unknown.
        date: date of the last result, otherwise of the checkpoint, in ISO 8601.
        commit: commit of the program that computed the last result.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]):
        """Read the files of a run.

        Args:
            path: the run's directory.
            config: the run's configuration, a plain mapping.

        Raises:
            ValueError: a file is damaged or has another format.
        """
        self.path, self.config = path, config
        self.data: Mapping[str, Any] = config.get("data") or {}
        transform = self.data.get("transform") or {}
        shape = transform.get("data_shape") or self.data.get("shape") or ()  # latents have another shape than the data
        self.shape = tuple(int(size) for size in shape)
        self.kind = kind_of(self.shape)
        low, high = self.data.get("range") or (0.0, 1.0)
        is_quantised = self.data.get("dequantization") is not None and self.data.get("range") is not None
        self.levels = round(high - low) if is_quantised else None
        self.bounds = float(low), float(high - 1 if is_quantised else high)
        log = read_lines(path / LOG)
        self.training = [line for line in log if line.get("loss") is not None]
        self.held_out = [line for line in log if "loss" not in line]
        self.skipped, self.metrics = read_lines(path / SKIPPED), read_lines(path / METRICS)
        compared = [line for line in self.metrics if line.get("kind") == "comparison"]
        self.comparison = read_comparison(path / file_of(compared[-1] if compared else {}, COMPARISON))
        self.checkpoint = digest(path / CHECKPOINT)
        step, self.parameters = read_checkpoint(path / CHECKPOINT)
        self.step = step or (int(self.training[-1]["step"]) if self.training else None)
        origins = [line["provenance"] for line in self.metrics if (line.get("provenance") or {}).get("date")]
        last: Line = origins[-1] if origins else {}
        modified = (path / CHECKPOINT).stat().st_mtime if self.checkpoint else None
        self.date = last.get("date") or ("" if modified is None else datetime.fromtimestamp(modified, UTC).isoformat())
        self.commit = last.get("commit")

    def is_current(self, line: Line) -> bool:
        """Return whether a line is about the present checkpoint; a line that names no checkpoint counts as current."""
        checkpoint = (line.get("provenance") or {}).get("checkpoint")
        return checkpoint is None or self.checkpoint is None or checkpoint == self.checkpoint

    def lines(self, kind: str) -> list[Line]:
        """Return the lines of metrics.jsonl of a kind: those about the present checkpoint, or all if none is.

        The latest is last.

        Raises:
            ValueError: a likelihood has no mean.
        """
        lines = [{**DEFAULTS.get(kind, {}), **line} for line in self.metrics if line.get("kind") == kind]
        if kind == "likelihood" and (bare := [line for line in lines if not {"mean", "n"} <= set(line)]):
            raise ValueError(f"every likelihood in {self.path / METRICS} must have mean and n; got {bare[0]}")
        return [line for line in lines if self.is_current(line)] or lines

    def is_stale(self, kind: str) -> bool:
        """Return whether all lines of metrics.jsonl of a kind are about an earlier checkpoint."""
        return any(not self.is_current(line) for line in self.lines(kind))

    def likelihood(self) -> Line | None:
        """Return the line of the likelihood for the page's headline; None if no likelihood was measured.

        It is the latest line of the first split in `SPLITS` that was measured, or else the latest of all.
        """
        lines = self.lines("likelihood")
        by_split = {line["split"]: line for line in lines}
        return next((by_split[split] for split in SPLITS if split in by_split), lines[-1] if lines else None)

    def likelihood_per_sample(self, line: Line) -> np.ndarray | None:
        """Return the stored likelihoods (N,) of a line of metrics.jsonl; None if missing, or if n or mean differ."""
        values = load_per_sample(self.path, file_of(line, f"{line['split']}.npz"))
        if values is None or len(values) != line["n"]:
            return None
        return values if math.isclose(float(values.mean()), line["mean"], rel_tol=1e-9, abs_tol=1e-12) else None

    def samples(self) -> tuple[Line, torch.Tensor] | None:
        """Return the latest stored samples: their line of metrics.jsonl, and the samples (N, *) in data units.

        Raises:
            ValueError: the file is not an array of numbers of the data's shape.
        """
        for line in reversed(self.lines("samples")):
            path = self.path / "samples" / file_of(line, f"{line.get('sampler')}.npy")
            if path.is_file():
                return line, read_samples(path, self.shape)
        return None


def file_of(line: Line, older: str) -> str:
    """Return the file name in a line of metrics.jsonl; if the line has none, as in older versions, return `older`."""
    return Path(str(line.get("file", older))).name


def kind_of(shape: Iterable[int]) -> str:
    """Return how the page draws states of a shape: as "images", "plane", "series", or "vectors"."""
    shape = tuple(shape)
    if len(shape) == 3 and shape[0] in (1, 3):
        return "images"
    return "plane" if shape == (2,) else "series" if len(shape) == 2 else "vectors"


def read_comparison(path: Path) -> list[ComparisonRow]:
    """Read the rows of a comparison of samplers; return no rows if there is no file.

    Raises:
        ValueError: `scoresde compare` did not write the file.
    """

    def value(column: str, text: str) -> Any:
        return text if column in TEXTS else int(text) if text.isdigit() else float(text) if text else None

    if not path.is_file():
        return []
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    try:
        return [ComparisonRow(**{column: value(column, text) for column, text in line.items()}) for line in lines]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a comparison that `scoresde compare` wrote ({error})") from error


def read_checkpoint(path: Path) -> tuple[int | None, int | None]:
    """Return the step of a checkpoint and the number of weights in it; None for a number that is not stored.

    Raises:
        ValueError: the file is not a checkpoint.
    """
    if not path.is_file():
        return None, None
    try:
        with safe_open(path, framework="pt") as file:
            step = json.loads((file.metadata() or {}).get("info", "{}")).get("step")
            names = [name for name in file.keys() if name.startswith("model/")]  # noqa: SIM118 - not a dict
            return step, sum(math.prod(file.get_slice(name).get_shape()) for name in names) or None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a checkpoint of this library ({error})") from error


def read_samples(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """Read samples (N, *shape) of a file in NumPy's format."""
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not an array in NumPy's format ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.shape[1:] != shape:
        expected = ", ".join(map(str, ("N", *shape)))
        shape_found = getattr(array, "shape", "an archive")
        raise ValueError(f"{path} must be an array of numbers of shape ({expected}); got {shape_found}")
    return torch.from_numpy(array).double()
