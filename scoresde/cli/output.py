"""What a job tells: aligned tables for a reader, or with `--json` a record for a program.

A verb prints its tables by `say`, `print_table` and `gap`, and returns its record, once: a dictionary of unrounded
numbers, with the lines it added to `metrics.jsonl` as `rows` and the files it wrote as `paths`. Which of the two is
shown is decided here and in `cli.jobs`, not by the verbs. A record is one line of JSON, in which NaN and the infinities
are null, and stdout has nothing but these lines: whatever else is printed goes to stderr.
"""

import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch import Tensor

from scoresde.evaluation.records import append_metrics, provenance
from scoresde.training import distributed

Record = dict[str, Any]


@dataclass(frozen=True)
class Output:
    """How a job talks: with tables on stdout or without, with progress bars on stderr or without."""

    tables: bool = True
    bars: bool = True


_current: ContextVar[Output] = ContextVar("output", default=Output())  # noqa: B039, it is frozen


@contextmanager
def talking(output: Output) -> Iterator[None]:
    """Within the block jobs talk in that way."""
    token = _current.set(output)
    try:
        with nullcontext() if output.tables else redirect_stdout(sys.stderr):
            yield
    finally:
        _current.reset(token)


# --- for a reader


def say(rows: Mapping[str, Any]) -> None:
    """A small aligned table."""
    width = max((len(key) for key in rows), default=0)
    _print(f"{key:<{width}}  {value}" for key, value in rows.items())


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Lines of cells, aligned: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        _print(["  ".join(cells)])


def gap() -> None:
    """An empty line between tables."""
    _print([""])


def _print(lines: Sequence[str] | Iterator[str]) -> None:
    for line in lines if _current.get().tables else ():
        print(line, flush=True)


def shows_progress() -> bool:
    """Whether progress bars are wanted: by the first process, at a terminal where somebody may look."""
    wanted = _current.get().bars and distributed.rank() == 0 and not os.environ.get("CI")
    return wanted and sys.stderr.isatty()


# --- for a program


def keep(run: Path, row: Record, device: Any) -> Record:
    """Add a row to the run's `metrics.jsonl`; the row as it is there, with its command and its provenance."""
    hydra = HydraConfig.get()
    command = shlex.join(["scoresde", str(hydra.job.config_name), *config_dir(), *hydra.overrides.task])
    row = {**row, "command": command, "provenance": provenance(run, device)}
    append_metrics(run, row, device)
    return row


def config_dir() -> list[str]:
    """The words `--config-dir DIR`, if the command has them."""
    sources = [source for source in HydraConfig.get().runtime.config_sources if source.provider == "command-line"]
    paths = [Path(source.path) for source in sources]
    here = Path.cwd()
    return [x for p in paths for x in ("--config-dir", str(p.relative_to(here) if p.is_relative_to(here) else p))]


def line(record: Record) -> str:
    """A record as one line of JSON."""
    return json.dumps(plain(record), allow_nan=False, ensure_ascii=False)


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers unrounded, those that are not finite null; whatever it does not know, as text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if OmegaConf.is_config(value):
        return plain(OmegaConf.to_container(value, resolve=True))
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return plain(value.tolist())
    return str(value)


class Arriving:
    """A line on its way from another process, printed where it arrives.

    Hydra drops what the jobs of a sweep return; on its way to being dropped it is unpickled, in the command's process.
    """

    def __init__(self, line: str):
        self.line = line

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.line,)


def _arrived(line: str) -> None:
    print(line, flush=True)
