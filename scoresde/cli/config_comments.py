"""The comments of the configuration files, which `scoresde VERB --help` shows beside the settings.

A comment at the end of a line describes the key of that line, and so do comment lines that continue it in the same
column. Other comment lines describe the next key. The comment at the top of a file describes the file, and thus the
config group whose option it is.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

KEY = re.compile(r"""^(?P<indent> *)['"]?(?P<key>[\w./-]+)['"]?:(?=\s|$)(?P<rest>.*)$""")
COMMENT = re.compile(r"""^(?:[^'"#]|'[^']*'|"[^"]*")*?(?:^|\s)#\s?(?P<comment>.*)$""")
PACKAGE = "# @package"
COLUMN = 32  # of comments at the end of lines, where the line leaves room


def key_lines(text: str) -> Iterator[tuple[str, str | None]]:
    """Yield each line of a YAML text with the dotted path of the key that begins on it; None if no key does."""
    parents: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = KEY.match(line)
        if match is None:
            yield line, None
            continue
        indent = len(match["indent"])
        parents = [*((column, key) for column, key in parents if column < indent), (indent, match["key"])]
        yield line, ".".join(key for _, key in parents)


def comments(text: str) -> dict[str, str]:
    """Return the comment of each key of a configuration file that has one, by dotted path; "" is the file itself."""
    described: dict[str, str] = {}
    waiting: list[str] = []  # comment lines above the next key
    last, column, at_top = "", -1, True
    for line, path in key_lines(text):
        match = COMMENT.match(line)
        start = match.start("comment") if match else -1
        if path is not None:
            if waiting:
                described["" if at_top else path] = " ".join(waiting)
            if match:
                described[path] = " ".join(filter(None, (None if at_top else described.get(path), match["comment"])))
            waiting, at_top, last, column = [], False, path, start
        elif match and line.lstrip().startswith("#") and not line.startswith(PACKAGE):
            if start == column and last in described:
                described[last] += f" {match['comment']}"
            else:
                waiting.append(match["comment"])
    return described


def settings_comments(folders: Sequence[Path], verb: str, choices: Mapping[str, str | None]) -> dict[str, str]:
    """Return the comment of each setting of a verb, by dotted path.

    Args:
        folders: the directories of configurations, the first in which a file exists is read.
        verb: the name of the verb.
        choices: the option of each config group; comments of an `experiment` replace those of the other options.
    """
    described = {**_comments_of(folders, "base"), **_comments_of(folders, verb)}
    for group, option in sorted(choices.items(), key=lambda choice: choice[0] == "experiment"):
        prefix = "" if group == "experiment" else group.replace("/", ".")
        for path, comment in _comments_of(folders, f"{group}/{option}").items():
            if path or prefix:
                described[".".join(filter(None, (prefix, path)))] = comment
    return {path: comment for path, comment in described.items() if path}


def _comments_of(folders: Sequence[Path], name: str) -> dict[str, str]:
    files = [folder / f"{name}.yaml" for folder in folders]
    return next((comments(path.read_text()) for path in files if path.is_file()), {})


def annotated(settings: str, described: Mapping[str, str], width: int) -> str:
    """Return settings in YAML with the comment of each key: at the end of its line, or above it if it is long."""
    lines = []
    for line, path in key_lines(settings):
        comment = described.get(path or "")
        if comment is None:
            lines.append(line)
        elif len(beside := f"{line.ljust(COLUMN - 2)}  # {comment}") <= width:
            lines.append(beside)
        else:
            above = " " * (len(line) - len(line.lstrip())) + "# "
            lines += [*textwrap.wrap(comment, width, initial_indent=above, subsequent_indent=above), line]
    return "\n".join(lines) + "\n"
