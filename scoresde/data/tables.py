"""Tables of numbers in text files: comma, semicolon, tab or bar separated values, one sample per row."""

import csv
import math
import re
from collections.abc import Sequence
from operator import length_hint
from pathlib import Path

import numpy as np
import torch

from scoresde.data.items import Items, read_bytes, reading, split_indices

DELIMITERS = (",", ";", "\t", "|")
MISSING = ("", "na", "n/a", "nan", "null", "none", "?", "-")
LARGEST = float(np.finfo(np.float32).max)


class Table(Items):
    """The rows of a table as float32 vectors (D,), in the table's own units.

    The first row is a header if one of its cells is neither a number nor missing. Every cell of the chosen columns must
    be a number: a density model needs complete samples, and how to fill gaps is your choice. The other columns may hold
    anything. A cell in double quotes may hold the delimiter, but not the end of a line.

    Args:
        path: path of the file, in UTF-8, plain or compressed by gzip.
        split: "train", "validation", "test" or "all", see `split_indices`.
        columns: names in the header or numbers from 0, in the order of the vector; default: all but the labels.
        labels: column of a class, an integer: items are then (state, label), the label an int64 tensor ().
        delimiter: one character; default: the most frequent of comma, semicolon, tab and bar in the first line.
        header: whether the first row is a header; None decides by its cells.
        shape: expected shape (D,); None accepts any.
        validation, test: shares of the rows.
        seed: seed of the permutation; None keeps the order of the file, with the test rows at its end.

    Raises:
        ValueError: a cell that is not a finite number or a row of another length (the message has the line and the
            column), an unknown column, another shape, no rows, or an empty split.
        FileNotFoundError: there is no such file.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "all",
        columns: Sequence[str | int] | None = None,
        labels: str | int | None = None,
        delimiter: str | None = None,
        header: bool | None = None,
        shape: Sequence[int] | None = None,
        validation: float = 0.05,
        test: float = 0.05,
        seed: int | None = 0,
    ):
        with reading(path, "a table as text in UTF-8", "save it as CSV again"):
            lines = re.split("\r\n|\r|\n", read_bytes(Path(path)).decode("utf-8-sig"))
        first = next((line for line in lines if line.strip()), None)
        if first is None:
            raise ValueError(f"the table {path} is empty")
        delimiter = delimiter or max(DELIMITERS, key=first.count)
        cells = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter))]
        if header is None:
            header = any(math.isnan(_number(cell)) and cell.lower() not in MISSING for cell in cells)
        names = cells if header else [str(i) for i in range(len(cells))]
        label_column = [] if labels is None else [_position(labels, names, header, path)]
        if columns is None:
            columns = [i for i in range(len(names)) if i not in label_column]
        chosen = [_position(column, names, header, path) for column in columns]
        self.names = tuple(names[i] for i in chosen)
        if not chosen or (shape is not None and tuple(shape) != (len(chosen),)):
            raise ValueError(
                f"expected rows of shape {'(D,)' if shape is None else list(shape)}, but {path} gives {len(chosen)} "
                f"columns ({', '.join(self.names)}): set shape=[{len(chosen)}], or choose columns=[...]"
            )
        values = _parse(lines, delimiter, header, names, [*chosen, *label_column], path)
        if labels is not None and (fractions := values[values[:, -1] % 1 != 0, -1]).size:
            raise ValueError(f"labels={labels!r} of {path} must be integers from 0; got {fractions[0]}")
        values = values[split_indices(len(values), split, validation, test, seed, path)]
        states = torch.from_numpy(values[:, : len(chosen)].astype(np.float32))
        super().__init__(states, None if labels is None else torch.from_numpy(values[:, -1].astype(np.int64)))


def _number(cell: str) -> float:
    """Return the number in a cell, or NaN."""
    try:
        return float(cell) if cell.isascii() and "_" not in cell else math.nan  # as NumPy reads numbers
    except ValueError:
        return math.nan


def _position(column: str | int, names: list[str], header: bool, path: str | Path) -> int:
    """Return the number of a column, given by its number or its name."""
    if isinstance(column, int) and 0 <= column < len(names):
        return column
    if isinstance(column, int) or not header or names.count(column) != 1:
        known = ", ".join(names) if header else f"0 to {len(names) - 1}, since there is no header"
        raise ValueError(f"{column!r} does not name one column of {path}; its columns are {known}")
    return names.index(column)


def _parse(
    lines: list[str], delimiter: str, header: bool, names: list[str], columns: list[int], path: str | Path
) -> np.ndarray:
    """Return the numbers in the chosen columns, (N, D) float64; an error names the line and the column."""
    numbers = [n for n, line in enumerate(lines) if line.strip(f"{delimiter} \t")][header:]
    if not numbers:
        raise ValueError(f"{path} has a header, but no rows of numbers")
    remaining = iter([lines[n] for n in numbers])
    dtype = [(str(i), "f8" if i in columns else "U1") for i in range(len(names))]
    try:
        rows = np.loadtxt(remaining, dtype, comments=None, delimiter=delimiter, quotechar='"', ndmin=1)
    except ValueError:
        row = len(numbers) - length_hint(remaining) - 1  # the last line that was read
    else:
        if len(rows) != len(numbers):
            raise ValueError(f"{path} has a cell in double quotes that spans lines: check its quotes")
        values = np.stack([rows[str(i)] for i in columns], axis=1)
        bad = np.argwhere(~(np.abs(values) <= LARGEST))
        if not len(bad):
            return values
        row = bad[0][0]
    line, cells = f"line {numbers[row] + 1}", next(csv.reader([lines[numbers[row]]], delimiter=delimiter))
    advice = "remove the row, fill the cell, or choose other columns with columns=[...]"
    for i in columns if len(cells) == len(names) else []:
        if not abs(_number(cells[i])) <= LARGEST:
            raise ValueError(f"{line}, column {names[i]!r} of {path} is {cells[i]!r}, not a finite number: {advice}")
    advice = "check its end, its quotes and the delimiter"
    raise ValueError(f"{line} of {path} has {len(cells)} cells, expected {len(names)}: {advice}")
