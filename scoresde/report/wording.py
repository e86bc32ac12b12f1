"""Numbers and nouns as the page writes them."""

import math
from typing import Any

from scoresde.report.run_files import RunFiles
from scoresde.result_table import plus_minus

MINUS, TIMES, DASH, SPACE = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{EN DASH}", "\N{NO-BREAK SPACE}"
UNITS = {"bits/dim": "bits per dimension", "nats/dim": "nats per dimension"}
NOUNS = {"images": ("image", "images"), "plane": ("point", "points"), "series": ("series", "series")}


def class_name(node: Any) -> str:
    """Return the class that a node of the configuration names, without its modules."""
    return str((node or {}).get("_target_", "unknown")).rsplit(".", 1)[-1]


def setting(value: Any) -> str:
    """Return a setting as text: CLASS(ARGUMENT=VALUE, ...) for a node of the configuration; without nulls."""
    if not isinstance(value, dict):
        return str(value)
    parts = ", ".join(f"{key}={setting(part)}" for key, part in value.items() if key[:1] != "_" and part is not None)
    return f"{class_name(value)}({parts})" if "_target_" in value else parts


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with `digits` significant digits; whole numbers have separators between thousands instead."""
    if value is None or not math.isfinite(value):
        return DASH
    is_whole = float(value).is_integer() and abs(value) < 1e15
    text = f"{round(value):,}" if is_whole or abs(value) >= 10**digits else f"{value:.{digits}g}"
    return text.replace("-", MINUS)


def with_error(value: float, error: float | None = None, signed: bool = False) -> str:
    """Return value ± error, to two digits of the error; if `signed`, with a plus before positive values."""
    text = plus_minus(value, error).replace("+-", "±").replace("-", MINUS)
    return f"+{text}" if signed and value >= 0 else text


def sentence(text: object) -> str:
    """Return a text with a capital letter at its beginning."""
    return f"{str(text)[:1].upper()}{str(text)[1:]}"


def duration(seconds: float | None) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds is None:
        return DASH
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def nouns(files: RunFiles) -> tuple[str, str]:
    """Return the singular and plural noun for a sample of the data, such as "image" and "images"."""
    return NOUNS.get(files.kind, ("sample", "samples"))


def states(files: RunFiles) -> str:
    """Return a description of the data, such as "grey images of 8 x 8 pixels with 17 levels"."""
    shape, by = files.shape, f"{SPACE}{TIMES}{SPACE}"
    if files.kind == "images":
        levels = f" with {files.levels} levels" if files.levels else ""
        return f"{'grey' if shape[0] == 1 else 'colour'} images of {shape[1]}{by}{shape[2]}{SPACE}pixels{levels}"
    if files.kind == "plane":
        return "points in the plane"
    if files.kind == "series":
        return f"series of {shape[1]} values in {shape[0]} channel{'s' if shape[0] > 1 else ''}"
    return f"vectors of {shape[0]} numbers" if len(shape) == 1 else f"arrays of {by.join(map(str, shape))} numbers"
