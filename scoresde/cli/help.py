"""The text of `scoresde --help` and `scoresde VERB --help`."""

import string
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from scoresde.cli.common import config_directory
from scoresde.cli.completion import own_groups
from scoresde.cli.config_comments import annotated, settings_comments
from scoresde.cli.overrides import configurations

WIDTH = 100
USAGE = """\
usage: scoresde VERB [key=value ...] [options]

{verbs}

examples:
  scoresde train experiment=digits
  scoresde sample run=runs/digits sampler=unipc3 sampler.steps=10
  scoresde bpd run=runs/digits

`train` writes a run, a directory that other verbs take as run=DIRECTORY. `scoresde VERB --help` has
examples of a verb, everything that can be set, and the options.

exit codes: 0 success; 1 a bug in scoresde, with its traceback; 2 wrong input or a failed job, with
one line on stderr; 130 interrupted; 141 the reader of the output is gone (| head)"""


def usage(verbs: Mapping[str, object]) -> str:
    """Return the text of `scoresde --help`, with a line for each verb."""
    summaries = {name: (verb.__doc__ or "").splitlines()[0] for name, verb in verbs.items()}
    return USAGE.format(verbs="\n".join(fold(f"  {name:<12}{text}", 14) for name, text in summaries.items()))


def verb_help(verb: str, overrides: Sequence[str], config_dir: str | None) -> str:
    """Return the help of a verb: description, options of the groups, configuration with overrides and comments."""
    with configurations(verb, config_dir) as (compose, options):
        config = compose(*overrides)
        choices = config.hydra.runtime.choices
        groups = sorted(group for group in choices if "/" not in group)
        listed = "".join(f"{group}: {', '.join(options(group))}\n" for group in groups)
    settings = OmegaConf.to_yaml(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))
    folders = [*([] if config_dir is None else [Path(config_dir)]), config_directory()]
    described = settings_comments([*folders, *own_groups(config_directory(), verb)], verb, choices)
    settings = annotated(settings, described, WIDTH)
    text = string.Template(config.hydra.help.template).substitute(APP_CONFIG_GROUPS=listed, CONFIG=settings)
    return "\n".join(map(fold, text.splitlines()))


def fold(line: str, indent: int | None = None) -> str:
    """Break a line at 100 characters; indent later lines by `indent`, by default 4 more than the first line."""
    further = " " * (len(line) - len(line.lstrip()) + 4 if indent is None else indent)
    return textwrap.fill(line, WIDTH, subsequent_indent=further, break_long_words=False, break_on_hyphens=False)
