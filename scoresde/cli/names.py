"""Names that are not known, and what was probably meant: the nearest known one, if one is near.

Every error of a command becomes one line here, and a line that lists names gets the nearest one. Wrong overrides are
found in `cli.overrides`.
"""

import re
import shlex
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.errors import HydraException

from scoresde.build import CONFIG, no_run
from scoresde.cli.completion import named, runs

NEAR = 0.6  # difflib's ratio of common characters
MANY = 12  # runs that one line lists


def meant(name: str, known: Collection[str]) -> str:
    """What to add to a message on an unknown name: the nearest known one, or nothing."""
    near = get_close_matches(name, known, n=1, cutoff=NEAR)
    return f"; did you mean {near[0]}?" if near else ""


def of(name: str, known: Collection[str]) -> str:
    """What to add to a message on an unknown name: the nearest known one, and all of them."""
    near = meant(name, known)
    return f"{near} There are: {', '.join(known)}" if near else f"; there are: {', '.join(known)}"


def with_suggestion(message: str) -> str:
    """A message "... among a, b, c expected; got 'x'", with the nearest of these names; any other as it is."""
    found = re.search(r"([^;:]*?) expected; got '([^']+)'", message)
    if not found or "did you mean" in message:
        return message
    listed = re.split(r", | or ", found[1].partition("among ")[2] or found[1])
    return message + meant(found[2], [words.split()[-1].strip("'") for words in listed if words.strip()])


def one_line(error: BaseException) -> str:
    """An exception's message on one line; with its cause, where Hydra leaves the reason to that."""
    told = [error, *([error.__cause__] if isinstance(error, HydraException) and error.__cause__ else [])]
    text = " ".join(line.strip() for part in told for line in str(part).splitlines() if line.strip())
    if missing := re.search(r"Missing mandatory value: (\S+)", text):
        return f"a value of {missing[1]}, which has no default, expected: {missing[1]}=..."
    if absent := re.search(r"Key '\S+' is not in struct full_key: (\S+)", text):
        return f"a configuration with {absent[1]} expected; it has none (does an override, ~..., leave it out?)"
    return with_suggestion(text) or type(error).__name__


def run_path(value: Any) -> Path:
    """The path that `run` names, whether or not there is a run.

    Raises:
        ValueError: it names none.
    """
    if not isinstance(value, (str, Path)) or not str(value):
        quoted = f"; a name like that in quotes: 'run=\"{value}\"'" if isinstance(value, (int, float)) else ""
        raise ValueError(f"a directory expected, run=DIRECTORY; got run={'null' if value is None else value}{quoted}")
    return Path(value)


def check_run(path: Any) -> Path:
    """The directory of a run.

    Raises:
        ValueError: no path.
        FileNotFoundError: there is none; what there is instead.
    """
    path = run_path(path)
    if (path / CONFIG).is_file():
        return path
    known = {str(run): run.name for run in runs(path.parent)}
    near = get_close_matches(path.name, set(known.values()), n=1, cutoff=NEAR)
    listed = ", ".join([*list(known)[:MANY], *(["..."] if len(known) > MANY else [])])
    there = f"; there are: {listed}" if listed else ""
    if run := next((run for run, name in known.items() if name in near), None):
        there = f"; did you mean {shlex.quote(named(run))}? There are: {listed}"
    raise no_run(path, there)
