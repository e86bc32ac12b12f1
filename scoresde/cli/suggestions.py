"""Errors as one line, with a suggestion: the valid name that is nearest to an unknown name."""

import re
from collections.abc import Sequence
from difflib import get_close_matches

from hydra.errors import HydraException

NEAR = 0.6  # least similarity of a suggestion, as the ratio of difflib.SequenceMatcher


def did_you_mean(name: str, known: Sequence[str], lists_all: bool = False, texts: Sequence[str] | None = None) -> str:
    """Return the end of a message on an unknown name: the nearest known name; with `lists_all`, all known names too.

    Args:
        name: the unknown name.
        known: the valid names.
        lists_all: if True, also list all known names.
        texts: the text to print for each known name; by default the name.
    """
    texts, near = texts or known, get_close_matches(name, known, n=1, cutoff=NEAR)
    suggestion = f"; did you mean {texts[known.index(near[0])]}?" if near else ""
    listed = f"{' Available' if near else '; available'}: {', '.join(texts)}"
    return suggestion + (listed if lists_all and known else "")


def with_suggestion(message: str) -> str:
    """Add the nearest name to a message that lists names, such as "must be one of a, b; got 'x'"."""
    unknown = re.search(r"got '([^']+)'", message)
    if not unknown or "did you mean" in message:
        return message
    parts = [part.split() for part in re.split(r", | or ", message.replace(unknown[0], ""))]
    listed = [part[-1] for part in parts[:-1] if part] + [part[0] for part in parts[1:] if part]
    return message + did_you_mean(unknown[1], [name.strip("'\";:.") for name in listed])


def one_line(error: BaseException) -> str:
    """Return the message of an exception on one line, with the cause of a HydraException and a suggestion."""
    causes = [error.__cause__] if isinstance(error, HydraException) and error.__cause__ else []
    text = " ".join(" ".join(map(str, [error, *causes])).split())
    if missing := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{missing[1]} has no default: set {missing[1]}=..."
    if absent := re.search(r"Key '\S+' is not in struct full_key: (\S+)", text):
        return f"the configuration has no {absent[1]}: add it, or remove the override ~... that deletes it"
    return with_suggestion(text) or type(error).__name__
