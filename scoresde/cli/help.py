"""What `scoresde` and `scoresde VERB --help` print."""

import importlib.metadata
import io
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from hydra.core.hydra_config import HydraConfig

WIDTH = 100

USAGE = """\
usage: scoresde VERB [key=value ...] [options]

{verbs}

examples:
  scoresde train experiment=digits
  scoresde sample run=runs/digits sampler=unipc3 sampler.steps=10
  scoresde bpd run=runs/digits

`scoresde VERB --help` has examples of a verb and all that can be set. `train` leaves a run, a
directory that other verbs take as run=DIRECTORY. README.md has the rest.

options, after the verb:
  --json            results as JSON on stdout, a line for each job
  --multirun        sweep over values separated by commas: seed=0,1,2
  --version         of scoresde

exit codes:
  0    done
  1    an error of this program, shown with its traceback
  2    wrong input, or a job that failed: one line on stderr
  130  interrupted
  141  nobody reads on, as before | head
"""

COMPLETION = "Make a shell complete all these names: bash, zsh or fish."


def usage(verbs: Mapping[str, Callable[..., Any]]) -> str:
    """The verbs, a line each, and how to go on."""
    helps = {name: (verb.__doc__ or "").splitlines()[0] for name, verb in verbs.items()} | {"completion": COMPLETION}
    width = max(map(len, helps))
    lines = [fold(f"  {name:<{width}}  {text}", width + 4) for name, text in helps.items()]
    return USAGE.format(verbs="\n".join(lines)).rstrip()


def version() -> str:
    """The name and the version of the package."""
    return f"scoresde {importlib.metadata.version('scoresde')}"


@contextmanager
def fitted(wanted: bool) -> Iterator[None]:
    """What Hydra prints of a verb in the block: its own groups alone, lists in lines that a terminal does not wrap."""
    if not wanted:
        yield
        return
    with redirect_stdout(io.StringIO()) as text:
        try:
            yield
        finally:
            lines = text.getvalue().rstrip().splitlines()
    print("\n".join(fold(line) for line in with_groups(lines, HydraConfig.get().runtime.choices)))


def with_groups(lines: Sequence[str], groups: Collection[str]) -> Iterator[str]:
    """The lines, of those on groups the ones on these: Hydra lists what all verbs have."""
    part = ""
    for line in lines:
        part = line if line.startswith("== ") else part
        if not part.startswith("== Groups") or line == part or not line or line.partition(":")[0] in groups:
            yield line


def fold(line: str, indent: int | None = None) -> str:
    """A line, in several if it is long: those after the first as far in as `indent` says, or a little further."""
    if len(line) <= WIDTH:
        return line
    further = " " * (len(line) - len(line.lstrip()) + 4 if indent is None else indent)
    return textwrap.fill(line, WIDTH, subsequent_indent=further, break_long_words=False, break_on_hyphens=False)
