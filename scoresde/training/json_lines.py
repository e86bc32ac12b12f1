"""Files of JSON lines: append a line, read all lines, remove the lines of later steps."""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from scoresde.atomic_files import append, held, replace_atomically


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append `row` as one line of JSON, a whole line or none, see `atomic_files.append`."""
    append(path, json.dumps(dict(row)))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, without a last line that was not written to its end; [] if there is no file.

    Raises:
        ValueError: a line is not a JSON object, and is not a truncated last line.
    """
    rows: list[dict[str, Any]] = []
    *lines, last = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    for number, line in enumerate([*lines, last], start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number > len(lines):  # without a line break
                break
            raise ValueError(f"line {number} of {path} is not JSON ({error}): remove that line") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {path} is not a JSON object; got {line[:40].decode()!r}: remove it")
        rows.append(row)
    return rows


def remove_lines_after(path: Path, step: int) -> None:
    """Remove an unfinished last line, and the lines of steps after `step`: these steps will be repeated.

    Raises:
        ValueError: a line is not a JSON object with a step.
    """
    if not path.exists():
        return
    with held(path, partial(os.open, path, os.O_RDWR)):
        rows = read_lines(path)
        if bare := [row for row in rows if not isinstance(row.get("step"), int)]:
            raise ValueError(f"every line of {path} must have a step; got {json.dumps(bare[0])[:80]}")
        content = "".join(f"{json.dumps(row)}\n" for row in rows if row["step"] <= step).encode()
        if content != path.read_bytes():
            replace_atomically(path, lambda file: file.write_bytes(content), size=len(content))
