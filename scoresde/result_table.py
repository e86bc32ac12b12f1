"""Results that print as a short table: means with errors, units, statuses and costs instead of tensors.

    LogProb of 16 samples
    mean         -3.21 +- 0.12 nats
    range        -4.46 .. -2.51 nats
    error        +- 0.013 nats a sample, from the trace
    status       16 OK
    evaluations  87 a sample, and 83 backward passes

A notebook shows the same rows as an HTML table. An error of a mean is its standard error over the samples. `to_csv`
writes the values of the samples to a file.
"""

import csv
import html
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from scoresde.atomic_files import replace_atomically
from scoresde.tensors import float64, mean_and_error

TABLES = (".csv", ".parquet")
SMALL, LARGE = 1e-4, 1e7  # numbers between these are printed without an exponent


class Result:
    """A result that prints as a table. A subclass defines `heading` and `rows`."""

    def heading(self) -> str:
        """Return what the result is, such as "LogProb of 16 samples"."""
        raise NotImplementedError(f"{type(self).__name__} must define heading()")

    def rows(self) -> Mapping[str, str]:
        """Return the rows of the table: names and texts."""
        raise NotImplementedError(f"{type(self).__name__} must define rows()")

    def columns(self) -> Mapping[str, Sequence[Any]]:
        """Return the values of the samples by name, with the unit in the name; {} if there are none."""
        return {}

    def to_csv(self, path: str | Path, ids: Sequence[Any] | None = None) -> Path:
        """Write the values of the samples to a CSV file, or to a Parquet file if `path` ends in .parquet.

        Args:
            path: the file to write.
            ids: names of the samples, the column `id`; default 0, 1, 2, ...

        Raises:
            ValueError: the result has no values of samples, `ids` has another length, or `path` another ending.
        """
        columns = self.columns()
        if not columns:
            name = type(self).__name__
            raise ValueError(f"{name} has no values of single samples: write a result that has them, such as LogProb")
        count = len(next(iter(columns.values())))
        return write_columns(Path(path), {"id": range(count) if ids is None else ids, **columns})

    def __repr__(self) -> str:
        rows = self.rows()
        width = max(map(len, rows), default=0)
        return "\n".join([self.heading(), *(f"{name:<{width}}  {text}" for name, text in rows.items())])

    def _repr_html_(self) -> str:
        cells = (
            f'<tr><th style="text-align:left">{html.escape(name)}</th><td style="text-align:left">{html.escape(text)}'
            "</td></tr>"
            for name, text in self.rows().items()
        )
        return f"<table><caption>{html.escape(self.heading())}</caption>{''.join(cells)}</table>"


def check_table_path(path: Path) -> None:
    """Raise ValueError if a path does not end in .csv or .parquet."""
    if path.suffix.lower() not in TABLES:
        raise ValueError(f"a table must be written to a file that ends in {' or '.join(TABLES)}; got {path}")


def write_columns(path: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    """Write columns below their names as CSV, or as Parquet if the path ends in .parquet; return the path.

    None is an empty cell, and numbers have all their digits.

    Raises:
        ValueError: the columns differ in length, or the path has another ending.
    """
    check_table_path(path)
    if len({len(column) for column in columns.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(column)}" for name, column in columns.items())
        raise ValueError(f"the columns of a table must have one length; {lengths}")
    if path.suffix.lower() == ".csv":
        text = io.StringIO(newline="")
        csv.writer(text).writerows([[*columns], *zip(*columns.values(), strict=True)])
        replace_atomically(path, lambda file: file.write_text(text.getvalue(), encoding="utf-8", newline=""))
        return path
    import pyarrow.parquet  # imported late: it takes longer to import than scoresde

    table = pyarrow.table({name: list(column) for name, column in columns.items()})
    replace_atomically(path, partial(pyarrow.parquet.write_table, table))
    return path


def sample_columns(
    quantity: str, unit: str, value: Tensor, stderr: Tensor | None, status: Tensor, kind: type[IntEnum]
) -> dict[str, list[Any]]:
    """Return values, standard errors and statuses (n,) as columns of a table; None for numbers that are not finite.

    Without standard errors, that column is left out.
    """
    columns: dict[str, list[Any]] = {f"{quantity}{unit}": _finite_or_none(value)}
    if stderr is not None:
        columns[f"standard_error{unit or '_' + quantity}"] = _finite_or_none(stderr)
    return {**columns, "status": [kind(int(number)).name for number in status.flatten()]}


def plus_minus(value: float, error: float | None) -> str:
    """Return "value +- error" with two digits of the error, or the value with four decimals if there is no error.

    An error of 0 is not shown, as no estimate of a sampling error is known to be zero. Very large and very small
    numbers have exponents.
    """
    if error is None or not 0 < error < math.inf or not math.isfinite(value):
        return f"{value:.4f}" if value == 0 or SMALL <= abs(value) < LARGE else f"{value:.4g}"
    place, size = math.floor(math.log10(error)), max(abs(value), error)
    if not SMALL <= size < LARGE:
        digits = max(math.floor(math.log10(size)) - place, 0) + 1
        return f"{value:.{digits}e} +- {error:.1e}"
    digits = min(max(1 - place, 0), 6)
    return f"{value:.{digits}f} +- " + (f"{error:.{digits}f}" if place >= -6 else f"{error:.1e}")


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun in the singular or plural."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def mean_of(values: Tensor, unit: str) -> str:
    """Return the mean of the finite values with its standard error, as text."""
    values = _finite(values)
    return f"{plus_minus(*mean_and_error(values))} {unit}" if len(values) else "none"


def range_of(values: Tensor, unit: str = "") -> str:
    """Return the smallest and the largest finite value, as text."""
    values = _finite(values)
    text = f"{float(values.min()):.4g} .. {float(values.max()):.4g}" if len(values) else "none"
    return f"{text} {unit}".rstrip()


def typical_error(errors: Tensor | None, unit: str, source: str) -> str:
    """Return the root mean square of errors (n,) as text; `source` says what they come from."""
    if errors is None:
        return f"unknown, from {source}"
    errors = _finite(errors)
    size = math.sqrt(float(errors.square().mean())) if len(errors) else math.nan
    if math.isnan(size):
        return f"unknown, from {source}"
    return f"+- {size:.2g} {unit}, from {source}" if size else f"none from {source}"


def statuses(status: Tensor, kind: type[IntEnum]) -> str:
    """Return the number of samples with each status, such as "14 OK, 2 BUDGET"."""
    counts = Counter(status.flatten().tolist())
    return ", ".join(f"{count:,} {kind(value).name}" for value, count in sorted(counts.items())) or "no samples"


def cost(nfe: Any, backward: Any, each: str = "a sample") -> str:
    """Return the mean numbers of evaluations of the network and of backward passes, as text."""
    forward, products = (float(float64(number).mean()) for number in (nfe, backward))
    return f"{forward:.4g} {each}".rstrip() + (f", and {products:.4g} backward passes" if products else "")


def states(x: Tensor) -> str:
    """Return the number, shape and dtype of states (B, *), as text."""
    return f"{tuple(x.shape[1:])}, {str(x.dtype).removeprefix('torch.')}"


def _finite_or_none(values: Tensor) -> list[float | None]:
    return [number if math.isfinite(number) else None for number in float64(values.detach()).flatten().tolist()]


def _finite(values: Tensor) -> Tensor:
    values = float64(values.detach()).flatten()
    return values[values.isfinite()]
