"""The setting `cond` of `scoresde sample`: classes by number or name, captions, vectors, and rows of samples.

    cond.label=3  cond=3          a class by its number, or by its name if all names of its label are numbers
    cond.group=flags              a class by its name; several conditions together: cond.tone=2 cond.group=flags
    cond.label=all                a row of samples for each class, with the same seeds in every row
    cond.text="cook dark skin tone"     a caption; a list of captions, or @FILE with one caption a line, gives a row of
                                  samples for each, with the same seeds in every row
    cond.vector=[0.1,2]           a vector
    cond.context=[[0.1,2],[1,0]]  context vectors (`networks.condition_embeddings`)
    cond.image=image.npy          an image, or another condition of numbers, from a NumPy file
    cond=data                     those of the training data: classes with their frequencies (`scoresde sample`)

The conditions of N samples are stored beside the samples, `<name>.npy`, in `<name>.cond.npz`: for each name of a
condition, an array with leading dimension N.
"""

import itertools
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.atomic_files import replace_atomically
from scoresde.cli.common import load_array
from scoresde.cli.suggestions import did_you_mean
from scoresde.data.items import LABEL, reading
from scoresde.protocols import NULL, CaptionEncoder, Condition, as_condition, by_name, expand

ALL = "all"
DATA = "data"
ROW = 8  # samples of each class by default
SUFFIX = ".cond.npz"


@dataclass(frozen=True)
class Drawing:
    """The samples to draw: `n` in total, in rows of `columns` samples with one name for each row.

    cond: the condition, with leading dimension n, or None. names: empty if there is one row.
    """

    n: int
    columns: int
    cond: Condition = None
    names: tuple[str, ...] = ()


def drawing(
    cond: Any,
    n: int | None,
    default: int,
    classes: Mapping[str, Sequence[str]],
    others: Sequence[str] | None,
    text: CaptionEncoder | None = None,
) -> Drawing:
    """Return the samples that the settings `cond` and `n` ask for.

    Args:
        cond: a plain value, or one for each name of a condition.
        n: number of samples; if a label is "all", the number for each class (or combination of classes), and if there
            are several captions, the number for each caption. None means `default`; in these cases, 8 for each.
        default: number of samples if `n` is None and there is one row.
        classes: the names of the classes of each label.
        others: the names of further conditions; None if unknown, then any name is accepted.
        text: the encoder of captions; None if the run has none.

    Warns:
        UserWarning: a caption has words that the training captions lack.

    Raises:
        ValueError: an unknown condition or class, with the nearest one, or a value of the wrong kind.
    """
    parts = _named_parts(cond)
    captions = _captions(parts.pop("text"), text) if parts.get("text") is not None else []
    for name in parts:
        if name not in classes and others is not None and name not in others:
            known = [*classes, *others]
            listed = did_you_mean(name, known, lists_all=True) if known else ", which takes none"
            raise ValueError(f"no condition {name!r} of this model{listed}")
    fixed = {name: _fixed(name, value, classes) for name, value in parts.items() if value != ALL}
    given = {name: part[None] for name, part in fixed.items() if part is not None}
    varied = {name: torch.arange(len(classes.get(name, ()))) for name, value in parts.items() if value == ALL}
    for name, numbers in varied.items():
        if not len(numbers):
            raise ValueError(
                f"cond.{name}=all needs the classes of {name}, which this run does not record: set a value instead"
            )
    axes = [(list(classes[name]), {name: numbers}) for name, numbers in varied.items()]
    if captions and text is not None:
        encoded = text(captions)
        if both := sorted(encoded.keys() & parts.keys()):
            raise ValueError(
                f"cond.text makes the condition {both[0]!r}; got cond.{both[0]} too: leave one of them out"
            )
        if len(captions) > 1:
            axes.append((captions, encoded))
        else:
            given |= encoded
    if not axes:
        n = default if n is None else n
        return Drawing(n, n, expand(given, n) if given else None)
    n = ROW if n is None else n
    rows = list(itertools.product(*(range(len(names)) for names, _ in axes)))
    cond = dict(by_name(expand(given, len(rows) * n)))
    for axis, (_, values) in enumerate(axes):
        numbers = torch.tensor([row[axis] for row in rows]).repeat_interleave(n)
        cond |= {name: part[numbers] for name, part in values.items()}
    names = [", ".join(axes[i][0][number] for i, number in enumerate(row)) for row in rows]
    return Drawing(len(rows) * n, n, cond, tuple(names))


def _captions(value: Any, text: CaptionEncoder | None) -> list[str]:
    """Return the captions that `cond.text` sets: one, a list, or the lines of a file.

    Raises:
        ValueError: the run has no captions, `value` is something else, or a caption has no known word.
        FileNotFoundError: there is no such file.
    """
    if text is None:
        raise ValueError("cond.text needs a run that was trained with captions (text=tokens); this run has none")
    captions = value if isinstance(value, list) else [value]
    if isinstance(value, str) and value.startswith("@"):
        with reading(value[1:], "a text file with one caption a line", "write one"):
            captions = [
                line.strip() for line in Path(value[1:]).read_text(encoding="utf-8").splitlines() if line.strip()
            ]
    if not captions or not all(isinstance(caption, (str, int, float)) for caption in captions):
        raise ValueError(f"cond.text must be a caption, a list of captions or @FILE; got {value!r}")
    captions = [str(caption) for caption in captions]
    text.check(captions)
    return captions


def _named_parts(cond: Any) -> dict[str, Any]:
    """Return {condition: setting}; an unnamed value is the condition "label" if integer or text, otherwise "vector"."""
    if cond is None or isinstance(cond, dict):
        return dict(cond or {})
    return {LABEL if isinstance(cond, (int, str)) else "vector": cond}


def _fixed(name: str, value: Any, classes: Mapping[str, Sequence[str]]) -> Tensor | None:
    """Return the setting of one condition as a tensor for one sample; None if the setting is null."""
    if value is None:
        return None
    if name in classes:
        return torch.tensor(class_number(name, value, classes[name]))
    if isinstance(value, str) and name != LABEL and value.endswith(".npy"):
        return load_array(Path(value))
    if isinstance(value, str):
        kind = (
            "the number of a class, as the classes have no names in this run"
            if name == LABEL
            else "numbers or FILE.npy"
        )
        raise ValueError(f"cond.{name} must be {kind}; got {value!r}")
    if name == LABEL and isinstance(value, int):
        return torch.tensor(value)
    part = by_name(as_condition({name: value}))[name]
    return part.float()


def class_number(name: str, value: Any, names: Sequence[str]) -> int:
    """Return the number of a class of the label `name`, which is given by number or name.

    If all names are whole numbers, such as the years 1990 and 2000, a number is read as a name.

    Raises:
        ValueError: no class has this number or name.
    """
    numbered = all(text.lstrip("-").isdecimal() for text in names)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"cond.{name} must be the number or the name of a class, or all; got {value!r}")
    if value == NULL and NULL not in map(_whole, names):
        return NULL
    if str(value) in names and (numbered or isinstance(value, str)):
        return list(names).index(str(value))
    if isinstance(value, int) and not numbered and 0 <= value < len(names):
        return value
    if isinstance(value, int) and not numbered:
        raise ValueError(f"cond.{name} must be a class 0 .. {len(names) - 1}, or -1 for none; got {value}")
    raise ValueError(
        f"no class {str(value)!r} of cond.{name}{did_you_mean(str(value), names, lists_all=len(names) <= 20)}"
    )


def _whole(text: str) -> int | None:
    return int(text) if text.lstrip("-").isdecimal() else None


def described(cond: Any, classes: Mapping[str, Sequence[str]]) -> str:
    """Return a condition of the settings as text for a table, such as "label=3 (cat)"."""
    words = ["of the training data"] if cond == DATA else []
    for name, value in [] if words else _named_parts(cond).items():
        is_number = isinstance(value, int) and not isinstance(value, bool) and name in classes
        text = classes[name][class_number(name, value, classes[name])] if is_number and value != NULL else str(value)
        words.append(f"{name}={value}" + (f" ({text})" if text != str(value) else ""))
    return ", ".join(words)


# --- files


def save_conditions(array: Path, cond: Condition) -> Path | None:
    """Store the conditions (N, ...) of samples beside their array; return the path, None without conditions."""
    parts = {name: part.numpy() for name, part in by_name(cond).items()}
    path = array.with_name(array.name.removesuffix(".npy") + SUFFIX)
    if not parts:
        return None

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, **parts)  # type: ignore[arg-type]

    replace_atomically(path, write)
    return path


def load_conditions(array: Path, n: int) -> Condition:
    """Load the conditions of n samples that `save_conditions` stored beside their array; None if there are none.

    Raises:
        ValueError: the file does not hold n conditions.
    """
    path = array.with_name(array.name.removesuffix(".npy") + SUFFIX)
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            parts = {name: torch.from_numpy(archive[name]) for name in archive.files}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} does not hold conditions ({error}): delete it, or draw the samples again") from error
    for name, part in parts.items():
        if not part.ndim or len(part) != n:
            raise ValueError(
                f"{path} must have {n} values of {name}, one for each sample of {array.name}; got shape "
                f"{tuple(part.shape)}: draw the samples again"
            )
    return parts or None
