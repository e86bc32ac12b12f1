"""The output of a job: aligned tables for a reader, or with `--json` a record for a program.

A verb (a subcommand of `scoresde`) prints tables by `print_rows` and `print_table`, and returns a record: a dictionary
of unrounded numbers, with the lines added to `metrics.jsonl` as `rows` and the files written as `paths`. `cli.jobs`
decides whether tables or records are shown. A record is one line of JSON, in which NaN and infinities are null. With
`--json` stdout has only these lines; anything else that is printed goes to stderr.
"""

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from scoresde.evaluation.records import append_metrics, provenance
from scoresde.training import distributed

Record = dict[str, Any]


@dataclass(frozen=True)
class Output:
    """Whether a job prints tables on stdout, and whether it shows progress bars on stderr."""

    tables: bool = True
    bars: bool = True


_current: ContextVar[Output] = ContextVar("output", default=Output())  # noqa: B039, it is frozen


@contextmanager
def using(output: Output) -> Iterator[None]:
    """Within the block, print as `output` says; if tables are off, redirect all other text on stdout to stderr."""
    token = _current.set(output)
    try:
        with nullcontext() if output.tables else redirect_stdout(sys.stderr):
            yield
    finally:
        _current.reset(token)


# --- for a reader


def print_rows(rows: Mapping[str, Any], end: str = "") -> None:
    """Print a line for each name and value, with the values aligned; then print `end`."""
    width = max((len(key) for key in rows), default=0)
    _print("".join(f"{key:<{width}}  {value}\n" for key, value in rows.items()) + end)


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Print lines of cells, the first column aligned to the left and the others to the right; then an empty line."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        _print("  ".join(cells) + "\n")
    _print("\n")


def _print(text: str) -> None:
    if _current.get().tables:
        print(text, end="", flush=True)


def shows_progress() -> bool:
    """Return whether to show progress (`scoresde.progress`): in the first process, unless CI is set."""
    return _current.get().bars and distributed.rank() == 0 and not os.environ.get("CI")


# --- for a program


def append_row(run: Path, row: Record, device: Any) -> Record:
    """Append a row, with the command and provenance added, to the run's `metrics.jsonl`; return the row."""
    row = {**row, "command": shlex.join(command()), "provenance": provenance(run, device)}
    append_metrics(run, row, device)
    return row


def command() -> list[str]:
    """Return the words of the running command, with `--config-dir DIR` relative to the working directory."""
    settings = HydraConfig.get()
    sources = settings.runtime.config_sources
    paths = [os.path.relpath(source.path) for source in sources if source.provider == "command-line"]
    options = [argument for path in paths for argument in ("--config-dir", path)]
    return ["scoresde", str(settings.job.config_name), *options, *typed_overrides()]


def typed_overrides() -> list[str]:
    """Return the overrides of the job as the user typed them: without the "+" that is added to `cond.label=3`."""
    overrides = HydraConfig.get().overrides.task
    return [text.removeprefix("+") if text.startswith("+cond.") else text for text in overrides]


def json_line(record: Record) -> str:
    """Return a record as one line of JSON, with unrounded numbers, and null for NaN and infinities."""
    text = json.dumps(record, default=to_json)
    return json.dumps(json.loads(text, parse_constant=lambda _: None), ensure_ascii=False)


def to_json(value: Any) -> Any:
    """Convert a value that JSON lacks: arrays and tensors to lists, configurations to dicts, anything else to text."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    return value.tolist() if hasattr(value, "tolist") else str(value)
