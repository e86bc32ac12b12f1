"""Tables of numbers in text files: comma, semicolon or tab separated values, a sample in each row."""

import csv
import gzip
import io
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoresde.data.items import Items, split_indices

DELIMITERS = (",", ";", "\t", "|")
MISSING = ("", "na", "n/a", "nan", "null", "none", "?", "-")
LARGEST = float(np.finfo(np.float32).max)


class Table(Items):
    """The rows of a table as float32 vectors (D,), in the table's own units.

    The first row is a header if one of its cells is neither a number nor missing. Every chosen cell has to be a number:
    a model of the density needs whole samples, and how gaps are filled is a choice of yours.

    Args:
        path: of the file, in UTF-8; one that ends in .gz is decompressed.
        split: "train", "validation", "test" or "all", see `split_indices`.
        columns: names in the header or numbers from 0, in the order of the vector; all but the labels by default.
        labels: the column of a class, a whole number: items are then (state, label), the label an int64 tensor ().
        delimiter: one character; by default, that of comma, semicolon, tab and bar that the first line has most of.
        header: whether there is a header; found out by default.
        shape: (D,), to be sure of it; None takes what there is.
        validation, test: shares of the rows.
        seed: of the permutation; None keeps the order of the file, with the test rows at its end.

    Raises:
        ValueError: a cell that is not a finite number, rows of different lengths, a column there is not, another shape,
            no row, no row of the split. The message has the line and the column.
        FileNotFoundError: no such file.
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
        path = Path(path)
        text = _text(path)
        delimiter = delimiter or _delimiter(text)
        lines = _lines(text, delimiter, path)
        first = next(lines, None)
        if first is None:
            raise ValueError(f"a table of numbers expected in {path}; got an empty file")
        cells = first[1]
        header = any(_number(cell) is None and not _is_missing(cell) for cell in cells) if header is None else header
        names = [cell.strip() for cell in cells] if header else [str(i) for i in range(len(cells))]
        taken = [] if labels is None else [_position(labels, names, header, path)]
        given = [i for i in range(len(names)) if i not in taken] if columns is None else columns
        chosen = [_position(column, names, header, path) for column in given]
        if not chosen or (shape is not None and tuple(shape) != (len(chosen),)):
            raise ValueError(
                f"rows of shape {'[D]' if shape is None else list(shape)} expected; got {len(chosen)} columns in "
                f"{path} ({', '.join(names[i] for i in chosen)}): say shape=[{len(chosen)}], or choose columns=[...]"
            )
        values = _values(([] if header else [first]), lines, names, [*chosen, *taken], path)
        indices = split_indices(len(values), split, validation, test, seed, path)
        self.names, self.labels = tuple(names[i] for i in chosen), labels is not None
        self.rows = torch.from_numpy(values[indices][:, : len(chosen)].astype(np.float32))
        if self.labels:
            classes = values[:, -1]
            if not np.array_equal(classes, np.trunc(classes)):
                raise ValueError(
                    f"whole numbers, the classes, expected in column {names[taken[0]]!r} of {path}; "
                    f"got {classes[classes != np.trunc(classes)][0]}: number the classes from 0"
                )
            self.classes = torch.from_numpy(classes[indices].astype(np.int64))

    def count(self) -> int:
        """The rows of the split."""
        return len(self.rows)

    def state(self, item: int) -> Tensor:
        """One row."""
        return self.rows[item]

    def label(self, item: int) -> Tensor:
        """Its class."""
        return self.classes[item]


def _text(path: Path) -> str:
    """The content of a file."""
    if not path.is_file():
        raise FileNotFoundError(f"a table expected at {path}; there is none")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
        return content.decode("utf-8-sig")
    except (OSError, EOFError, ValueError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(
            f"a table as text in UTF-8 expected in {path}; got {type(error).__name__}: {error}: save it as CSV again"
        ) from error


def _delimiter(text: str) -> str:
    """The delimiter that the first line has most of; a comma if it has none."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return max(DELIMITERS, key=line.count)


def _lines(text: str, delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number of a line, from 1, and its cells; blank lines are left out."""
    line = 0
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
            line = reader.line_num
    except (csv.Error, TypeError) as error:
        raise ValueError(
            f"a table separated by {delimiter!r} expected in {path}; got {error} at line {line + 1}"
        ) from error


def _position(column: str | int, names: Sequence[str], header: bool, path: Path) -> int:
    """The number of a column."""
    if isinstance(column, int) and 0 <= column < len(names):
        return column
    if isinstance(column, int) or not header or names.count(column) != 1:
        known = ", ".join(names) if header else f"0 to {len(names) - 1}, for it has no header"
        raise ValueError(f"one column of {path}, among {known}, expected; got {column!r}")
    return names.index(column)


def _values(
    first: list[tuple[int, list[str]]],
    lines: Iterator[tuple[int, list[str]]],
    names: Sequence[str],
    chosen: Sequence[int],
    path: Path,
) -> np.ndarray:
    """The chosen cells of all rows, (N, D) float64."""
    flat = array("d")
    for row in (rows for part in (first, lines) for rows in part):
        line, cells = row
        if len(cells) != len(names):
            raise ValueError(
                f"{len(names)} cells expected in line {line} of {path}; got {len(cells)}: see that it "
                "is whole, and that the delimiter is right"
            )
        for i in chosen:
            value = _number(cells[i])
            if value is None or not -LARGEST <= value <= LARGEST:
                found = f"a missing value ({cells[i]!r})" if _is_missing(cells[i]) else repr(cells[i])
                raise ValueError(
                    f"a finite number expected in line {line}, column {names[i]!r} of {path}; got {found}: remove the "
                    "row, fill the cell, or choose other columns with columns=[...]"
                )
            flat.append(value)
    if not flat:
        raise ValueError(f"one row of numbers or more expected in {path}; got a header alone")
    return np.frombuffer(flat, np.float64).reshape(-1, len(chosen))


def _number(cell: str) -> float | None:
    """The number in a cell, if there is one; NaN is None."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return None if value != value or "_" in cell else value


def _is_missing(cell: str) -> bool:
    return cell.strip().lower() in MISSING
