"""The cells of a table in a text file as text, and their conversion to numbers and classes.

pyarrow splits the text into cells. What this module adds are the choices that must not be guessed wrongly: whether the
first row is a header, whether 1.000 is one or a thousand, and which cells are missing.
"""

import csv
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from scoresde.data.items import numbered, read_bytes, reading

DELIMITERS = ("\t", ";", "|", ",", " ")  # in the order in which they are tried
SAMPLE = 100  # lines that the delimiter is derived from
MISSING = (  # in lower case: those of pandas and of Excel, and ?, - and the point of SAS and Stata
    *("", "na", "n/a", "nan", "-nan", "null", "none", "<na>", "#na", "#n/a", "#n/a n/a", "?", "-", "."),
    *("1.#ind", "-1.#ind", "1.#qnan", "-1.#qnan"),
)
LARGEST_CLASS = 2**53  # float64 holds all integers up to this one
LARGEST = float(np.finfo(np.float32).max)  # the largest value of a network's input
BLOCK = 2**26  # number of bytes that are parsed at once (at least one row)


def _grammar(decimal: str, group: str) -> str:
    """Return the regular expression of a number; `decimal` and `group` match the decimal and thousands separators."""
    plain = rf"(\d+{decimal}?\d*|{decimal}\d+)([eE][+-]?\d+)?"
    return rf"^[+-]?({plain}|[1-9]\d{{0,2}}({group}\d{{3}})+({decimal}\d*)?)$"


INTEGER = r"^\d+$"
NUMBERS = {".": _grammar(r"\.", ","), ",": _grammar(",", r"\.")}  # by the decimal sign; the other sign groups thousands


class Cells:
    """The cells of a table as text: `names` of the columns, and `columns`, string arrays without the header.

    `rows` are the numbers of the rows in the file, from 0 for the first row after the header.
    """

    def __init__(self, path: str | Path, delimiter: str | None, header: bool | None):
        self.path = path
        with reading(path, "a table as text in UTF-8", "save it as CSV again"):
            lines = re.split("\r\n|\r|\n", read_bytes(Path(path)).decode("utf-8-sig"))
        if (first := next((n for n, line in enumerate(lines) if line.strip()), None)) is None:
            raise ValueError(f"the table {path} is empty")
        lines[first] = lines[first].removeprefix("#")  # numpy.savetxt begins a header with #
        self.delimiter = delimiter or _delimiter(lines)
        self.lines = np.array([n for n, line in enumerate(lines, start=1) if line.strip(f"{self.delimiter} \t")])
        columns = self._read([lines[n - 1] for n in self.lines])
        if header is None:
            header = self._has_header(columns)
        self.has_header, first_row = header, int(header)
        self.names = [column[0].as_py() if header else str(i) for i, column in enumerate(columns)]
        self.columns, self.lines = [column[first_row:] for column in columns], self.lines[first_row:]
        self.rows = np.arange(len(self.lines))
        if not len(self.lines):
            raise ValueError(f"{path} has a header, but no rows of numbers: add rows, or set header=False")

    def _read(self, lines: list[str]) -> list[Any]:
        """Split lines that are not blank into columns, which are string arrays without spaces around the cells."""
        import pyarrow.csv  # imported late: it takes longer to import than scoresde
        from pyarrow import compute

        delimiter, text = self.delimiter, "\n".join([*lines, ""])
        if delimiter == " ":
            delimiter, text = "\t", re.sub(r"[ \t]+", "\t", re.sub(r"(?m)^[ \t]+|[ \t]+$", "", text))
        if ' "' in text:  # a quote has to begin its cell: remove spaces before it, but not within quotes
            text = re.sub(rf'("(?:[^"]|"")*")|(^|{re.escape(delimiter)}) +(?=")', r"\1\2", text, flags=re.M)
        count = len(next(csv.reader([text.split("\n", 1)[0]], delimiter=delimiter)))
        wrong: list[Any] = []

        def keep(row: Any) -> str:
            wrong.append(row)
            return "skip"

        table = pyarrow.csv.read_csv(
            pyarrow.BufferReader(text.encode()),
            pyarrow.csv.ReadOptions(autogenerate_column_names=True, use_threads=False, block_size=BLOCK),
            pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=keep),
            pyarrow.csv.ConvertOptions(column_types={f"f{i}": pyarrow.string() for i in range(count)}),
        )
        if wrong:
            row, advice = wrong[0], "check the end of the line, its quotes and the delimiter"
            if row.expected_columns == 1 and delimiter == ",":
                advice += "; if the table has one column, with decimal commas, set delimiter=';' and decimal=','"
            raise ValueError(
                f"line {self.lines[row.number - 1]} of {self.path} must have {row.expected_columns} cells; got "
                f"{row.actual_columns}: {advice}"
            )
        if table.num_rows != len(lines):
            raise ValueError(f"{self.path} has a cell in double quotes that spans lines: check the quotes")
        return [compute.utf8_trim_whitespace(column).combine_chunks() for column in table.columns]

    def _has_header(self, columns: list[Any]) -> bool:
        """Return whether the first row is a header, as `Table` decides for header=None; raise ValueError if unclear."""
        from pyarrow import compute

        is_open = has_decimals = False
        names = []
        for column in columns:
            first, others = column[0].as_py(), column[1:].filter(compute.invert(_is_missing(column[1:])))
            if first.lower() in MISSING:
                continue
            names.append(first)
            if _is_number(first):
                is_decimal = len(others) > 0 and not compute.any(_matches(others, INTEGER)).as_py()
                has_decimals |= is_decimal and _is_number(others[0].as_py())
            elif not len(others) or _is_number(others[0].as_py()):
                return True
            else:
                is_open |= not compute.any(compute.equal(others, first)).as_py()
        are_integers = all(re.match(INTEGER, name, re.ASCII) for name in names) and len(set(names)) == len(names)
        if is_open or (has_decimals and are_integers):
            row = "text above text only" if is_open else f"integers above decimals only ({', '.join(names[:3])})"
            raise ValueError(f"header must be set for {self.path}: its first row has {row}; set header=true or false")
        return False

    def position(self, column: str | int) -> int:
        """Return the number of a column, given by its number or its name."""
        names = self.names
        if isinstance(column, int) and 0 <= column < len(names):
            return column
        if isinstance(column, int) or not self.has_header or names.count(column) != 1:
            known = ", ".join(names) if self.has_header else f"0 to {len(names) - 1}, since there is no header"
            raise ValueError(f"{column!r} does not name one column of {self.path}: the columns are {known}")
        return names.index(column)

    def drop_missing(self, used: Sequence[int]) -> None:
        """Leave out the rows with a missing cell in one of the columns."""
        complete = ~np.any([np.asarray(_is_missing(self.columns[i])) for i in used], axis=0)
        if not complete.any():
            for i in used:
                self._refuse_empty(i)
            raise ValueError(f"every row of {self.path} has a missing cell: choose other columns with columns=[...]")
        self.columns = [column.filter(complete) for column in self.columns]
        self.lines, self.rows = self.lines[complete], self.rows[complete]

    def _refuse_empty(self, i: int) -> None:
        """Raise ValueError if all cells of a column are missing."""
        if np.asarray(_is_missing(self.columns[i])).all():
            raise ValueError(
                f"column {i} ({self.names[i]!r}) of {self.path} has no values: choose other columns with columns=[...]"
            )

    def decimal(self, used: Sequence[int]) -> str:
        """Return the decimal sign of the columns; raise ValueError if the cells leave it open.

        All these columns have the same decimal sign, so one cell such as 1,5 or 1.000.000 decides for all of them. A
        cell such as 1,500 (1.5 or 1500) leaves it open. A cell such as 1.500 leaves it open only if semicolons separate
        the cells, because commas may then be the decimal sign; otherwise its point is the decimal sign.
        """
        is_open = None
        only = dict.fromkeys(NUMBERS, False)
        for column in (self.columns[i] for i in used):
            fits = {sign: np.asarray(_matches(column, pattern)) for sign, pattern in NUMBERS.items()}
            only["."] |= bool((fits["."] & ~fits[","]).any())
            only[","] |= bool((fits[","] & ~fits["."]).any())
            signs = "[.,]" if self.delimiter == ";" else ","
            both = fits["."] & fits[","] & np.asarray(_matches(column, signs))
            if is_open is None and both.any():
                is_open = self.lines[both.argmax()], column[int(both.argmax())].as_py()
        if is_open and not any(only.values()):
            line, cell = is_open
            raise ValueError(
                f"decimal must be set for {self.path}: {cell!r} in line {line} may be "
                f"{float(cell.replace(',', '.')):g} or {re.sub('[.,]', '', cell)}; set decimal='.' or decimal=','"
            )
        return "," if only[","] and not only["."] else "."

    def values(self, i: int, decimal: str) -> np.ndarray:
        """Return the numbers of a column, float64; raise ValueError for a cell that is not a finite number."""
        column = self.columns[i]
        is_number = np.asarray(_matches(column, NUMBERS[decimal]))
        values = _floats(column, is_number, decimal)
        if not (bad := ~(np.abs(values) <= LARGEST)).any():
            return values
        self._refuse_empty(i)
        row, name = int(bad.argmax()), self.names[i]
        cell, advice = column[row].as_py(), "remove the row, fill the cell, or choose other columns with columns=[...]"
        if cell.lower() in MISSING:
            advice = f"leave such rows out with missing='drop', or {advice}"
        elif not is_number[row] and _is_number(cell):
            advice = f"the decimal sign is {decimal!r}: set decimal, or write all numbers with the same sign"
        elif not is_number.any():
            advice = (
                f"the column holds text: leave it out with columns=[...], or take it as classes with labels={name!r}"
            )
        raise ValueError(
            f"line {self.lines[row]}, column {name!r} of {self.path} is {cell!r}, not a finite number: {advice}"
        )

    def labels(self, i: int, decimal: str) -> tuple[np.ndarray, list[str] | None]:
        """Return the classes of a column, int64, and their texts; None instead of texts if the labels are integers."""
        column, what = self.columns[i], f"labels={self.names[i]!r} of {self.path} must be"
        is_number = np.asarray(_matches(column, NUMBERS[decimal]))
        if (missing := np.asarray(_is_missing(column))).any():
            line = self.lines[missing.argmax()]
            raise ValueError(
                f"{what} complete; line {line} has no label: add it, or leave such rows out with missing='drop'"
            )
        if not is_number.all():
            return numbered(column.to_numpy(zero_copy_only=False))
        values = _floats(column, is_number, decimal)
        if (bad := (values % 1 != 0) | (values < 0) | (values > LARGEST_CLASS)).any():
            raise ValueError(
                f"{what} integers from 0, or text; got {values[bad.argmax()]:g}: number the classes from 0"
            )
        texts, spelling = column.unique(), dict[float, str]()
        for number, text in zip(_floats(texts, np.ones(len(texts), bool), decimal), texts.to_pylist(), strict=True):
            if spelling.setdefault(number, text) != text:
                raise ValueError(
                    f"{what} written in one way for each class; got {spelling[number]!r} and {text!r}, both "
                    f"{number:g}: change one of them, or make all of them text, such as 'c01'"
                )
        return values.astype(np.int64), None


def _delimiter(lines: Sequence[str]) -> str:
    """Return the delimiter that splits each of the first lines into the same number of cells.

    If several do, return the one with the most characters in cells that are numbers: the line 1,5;2,5 has the cells 1,5
    and 2,5, not 1, 5;2 and 5. If none does, return the one that is most frequent in the first line.
    """
    sample = [re.sub('"[^"]*"', "text", line) for line in islice(filter(str.strip, lines), SAMPLE)]
    rows = {sign: [_split(line, sign) for line in sample if line.strip(f"{sign} \t")] for sign in DELIMITERS}
    even = [sign for sign, parts in rows.items() if len({len(row) for row in parts}) == 1 and len(parts[0]) > 1]

    def numeric(sign: str) -> int:
        return sum(len(cell) for row in rows[sign] for cell in row if cell[-1:].isdigit() and _is_number(cell))

    return max(even, key=numeric) if even else max((",", ";", "\t", "|"), key=sample[0].count)


def _split(line: str, delimiter: str) -> list[str]:
    """Split a line that has no quotes into its cells."""
    return line.split() if delimiter == " " else [cell.strip() for cell in line.split(delimiter)]


def _is_number(cell: str) -> bool:
    """Return whether a cell is a number with either decimal sign."""
    return any(re.match(pattern, cell, re.ASCII) for pattern in NUMBERS.values())


def _is_missing(column: Any) -> Any:
    """Return which cells are missing, a boolean array."""
    import pyarrow
    from pyarrow import compute

    return compute.is_in(compute.utf8_lower(column), value_set=pyarrow.array(MISSING))


def _matches(column: Any, pattern: str) -> Any:
    """Return which cells match a regular expression, a boolean array."""
    from pyarrow import compute

    return compute.match_substring_regex(column, pattern)


def _floats(column: Any, is_number: np.ndarray, decimal: str) -> np.ndarray:
    """Return the numbers in cells, float64; NaN for cells that are not numbers."""
    from pyarrow import compute

    text = compute.replace_substring(column, "," if decimal == "." else ".", "")
    text = compute.replace_substring(compute.if_else(is_number, text, "nan"), ",", ".")
    return compute.cast(text, "float64").to_numpy(zero_copy_only=False)
