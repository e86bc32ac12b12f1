"""Files of JSON lines: append a line, read all lines, remove the lines of later steps."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scoresde.training.checkpoint import replace_atomically


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append `row` as one line of JSON, in a single write: lines of concurrent processes do not mix."""
    line = f"{json.dumps(dict(row))}\n".encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write(line)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file, without a truncated last line; [] if there is no file.

    Raises:
        ValueError: a line is not a JSON object, and is not a truncated last line.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_text().splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"line {number} of {path} is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {path} is not a JSON object: {line[:40]!r}")
        rows.append(row)
    return rows


def remove_lines_after(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, which a resumed run writes again, and a truncated last line."""
    if path.exists():
        lines = [f"{json.dumps(row)}\n" for row in read_lines(path) if row["step"] <= step]
        replace_atomically(path, lambda file: file.write_text("".join(lines)))
