"""What a run's directory says: its configuration, its log, its metrics, its samples.

    config.yaml            a mapping; handed over as a plain one
    checkpoint.safetensors the step that it is of, and the number of parameters
    log.jsonl              lines of the training: those with a loss, and those of held-out data
    skipped.jsonl          steps that were left out
    metrics.jsonl          lines of `sample`, `bpd`, `evaluate`, `compare`, `dequantize`, by their `kind`
    comparison.csv         the last comparison of samplers
    per_sample/SPLIT.npz   the likelihood of each sample of a split
    samples/SAMPLER.npy    samples in data units
    figures/stepN.png      what the training drew on its way

Any of them may be missing; what was written by an older version has fewer fields. A line of metrics that names another
checkpoint than the one in the directory is about earlier weights: it is shown where there is no other, and marked.
"""

import csv
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from scoresde.evaluation.records import METRICS, digest, load_per_sample
from scoresde.evaluation.sampler_comparison import ComparisonRow
from scoresde.training.guard import SKIPPED
from scoresde.training.trainer import CHECKPOINT, LOG

COMPARISON = "comparison.csv"
SPLITS = ("test", "validation", "train")  # the first that was measured is the headline
Line = dict[str, Any]
ABSENT: dict[str, Line] = {  # what lines of older versions, or of other programs, may not have
    "likelihood": dict.fromkeys(["stderr", "population", "monte_carlo", "discretisation", "bound", "nfe", "seconds"])
    | {"split": "test", "unit": "", "weights": "ema", "conventions": {}, "bound_conventions": {}},
    "samples": dict.fromkeys(["n", "nfe", "seconds", "seed", "threshold"]),
}


def read_lines(path: Path) -> list[Line]:
    """The objects of a file of JSON lines, none where there is no file; without a last line that was cut short.

    Raises:
        ValueError: another line that is no JSON object.
    """
    if not path.is_file():
        return []
    found: list[Line] = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"JSON in each line of {path} expected; line {number} has none ({error})") from error
        if not isinstance(value, dict):
            raise ValueError(f"a JSON object in each line of {path} expected; line {number} is {line[:40]!r}")
        found.append(value)
    return found


def read_comparison(path: Path) -> list[ComparisonRow]:
    """The rows of a comparison's CSV, none where there is no file.

    Raises:
        ValueError: a file that is none of `scoresde compare`.
    """
    if not path.is_file():
        return []
    whole, real = ("budget", "steps", "nfe", "batch", "n"), ("seconds", "value", "low", "high")
    rows = []
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            given: dict[str, Any] = dict(line)
            try:
                given |= {key: int(line[key]) if line[key] else None for key in whole}
                given |= {key: float(line[key]) if line[key] else None for key in real}
                given["backward"] = int(line.get("backward") or 0)
                rows.append(ComparisonRow(**{column.name: given[column.name] for column in fields(ComparisonRow)}))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path} as `scoresde compare` writes it expected; {error!r} in {line}") from error
    return rows


def kind_of(shape: Iterable[int]) -> str:
    """What states of a shape are drawn as: "images", "plane", "series", or "vectors"."""
    shape = tuple(shape)
    if len(shape) == 3 and shape[0] in (1, 3):
        return "images"
    return "plane" if shape == (2,) else "series" if len(shape) == 2 else "vectors"


@dataclass
class Facts:
    """A run's directory and its configuration, a plain mapping."""

    path: Path
    config: dict[str, Any]

    @cached_property
    def log(self) -> list[Line]:
        return read_lines(self.path / LOG)

    @property
    def steps(self) -> list[Line]:
        """Lines of the training."""
        return [line for line in self.log if line.get("loss") is not None]

    @property
    def held_out(self) -> list[Line]:
        """Lines of held-out data."""
        return [line for line in self.log if "loss" not in line]

    @cached_property
    def skipped(self) -> list[Line]:
        return read_lines(self.path / SKIPPED)

    @cached_property
    def metrics(self) -> list[Line]:
        return read_lines(self.path / METRICS)

    @cached_property
    def comparison(self) -> list[ComparisonRow]:
        return read_comparison(self.path / COMPARISON)

    @property
    def data(self) -> dict[str, Any]:
        """The node of the data."""
        return self.config.get("data") or {}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a state."""
        return tuple(int(size) for size in self.data.get("shape") or ())

    @property
    def kind(self) -> str:
        return kind_of(self.shape)

    @property
    def range(self) -> tuple[float, float]:
        """Values drawn black and white."""
        low, high = self.data.get("range") or (0.0, 1.0)
        return float(low), float(high)

    @property
    def levels(self) -> int | None:
        """Of quantised data."""
        if self.data.get("dequantization") is None or self.data.get("range") is None:
            return None
        return round(self.range[1] - self.range[0])

    # --- the checkpoint

    @cached_property
    def checkpoint(self) -> str | None:
        """SHA-256 of it."""
        return digest(self.path / CHECKPOINT)

    @cached_property
    def trained(self) -> tuple[int | None, int | None]:
        """The step of the checkpoint and the number of its weights, None where it does not say."""
        path = self.path / CHECKPOINT
        if not path.is_file():
            return None, None
        try:
            with safe_open(path, framework="pt") as file:
                step = json.loads((file.metadata() or {}).get("info", "{}")).get("step")
                names = [name for name in file.keys() if name.startswith("model/")]  # noqa: SIM118 - no dict
                return step, sum(math.prod(file.get_slice(name).get_shape()) for name in names) or None
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a checkpoint of this library ({error})") from error

    @property
    def step(self) -> int | None:
        """The last one that is known of."""
        return self.trained[0] or (int(self.steps[-1]["step"]) if self.steps else None)

    @property
    def planned(self) -> int | None:
        return (self.config.get("trainer") or {}).get("steps")

    @property
    def date(self) -> datetime | None:
        """Of the checkpoint."""
        path = self.path / CHECKPOINT
        return datetime.fromtimestamp(path.stat().st_mtime, UTC) if path.is_file() else None

    # --- metrics

    def is_current(self, line: Line) -> bool:
        """Whether a line is about the checkpoint of the directory, as far as it says."""
        known = (line.get("provenance") or {}).get("checkpoint")
        return known is None or self.checkpoint is None or known == self.checkpoint

    def of_kind(self, kind: str) -> list[Line]:
        """The lines of a kind, those of the checkpoint if there are any, the latest last; None where a field is absent.

        Raises:
            ValueError: a likelihood without its mean.
        """
        lines = [{**ABSENT.get(kind, {}), **line} for line in self.metrics if line.get("kind") == kind]
        if kind == "likelihood" and (bare := [line for line in lines if not {"mean", "n"} <= set(line)]):
            raise ValueError(f"mean and n in each likelihood of {self.path / METRICS} expected; got {bare[0]}")
        return [line for line in lines if self.is_current(line)] or lines

    def is_stale(self, kind: str) -> bool:
        """Whether there are lines of a kind, and none of them is of the checkpoint."""
        lines = self.of_kind(kind)
        return bool(lines) and not self.is_current(lines[-1])

    @property
    def likelihood(self) -> Line | None:
        """The headline: the last one of the first split that was measured."""
        lines = self.of_kind("likelihood")
        for split in SPLITS:
            if of_split := [line for line in lines if line.get("split") == split]:
                return of_split[-1]
        return lines[-1] if lines else None

    def per_sample(self, line: Line) -> np.ndarray | None:
        """The values (N,) whose mean a line of likelihood has; None where they were not kept, or are others."""
        values = load_per_sample(self.path, str(line.get("split")))
        if values is None or len(values) != line.get("n"):
            return None
        return values if math.isclose(float(values.mean()), line["mean"], rel_tol=1e-9, abs_tol=1e-12) else None

    # --- samples

    @property
    def drawn(self) -> tuple[Line, Path] | None:
        """The last samples that are still there: their line, and the file."""
        for line in reversed(self.of_kind("samples")):
            path = self.path / "samples" / f"{Path(str(line.get('sampler'))).name}.npy"
            if path.is_file():
                return line, path
        return None

    def samples(self, path: Path) -> torch.Tensor:
        """Samples (N, *) of a file.

        Raises:
            ValueError: no array of numbers of the data's shape.
        """
        try:
            array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path} is no array in NumPy's format ({error})") from error
        if not isinstance(array, np.ndarray):
            raise ValueError(f"one array in {path} expected; got an archive")
        if array.dtype.kind not in "fiu" or array.shape[1:] != self.shape:
            raise ValueError(f"{path} as numbers (N, {', '.join(map(str, self.shape))}) expected; got {array.shape}")
        return torch.from_numpy(array).double()

    @property
    def previews(self) -> list[Path]:
        """What the training drew, the last last."""
        return sorted((self.path / "figures").glob("step*.png"))
