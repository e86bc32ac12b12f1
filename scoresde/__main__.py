"""`python -m scoresde`, and the console script."""

import os
import sys

from scoresde import cli
from scoresde.cli.jobs import UNREAD, is_unread
from scoresde.process_settings import tune_process


def main() -> int:
    """The command line, in a process of its own; without a word where nobody reads on."""
    tune_process()
    try:
        code = cli.main()
        if sys.stdout is not None:  # it may be closed
            sys.stdout.flush()
    except BrokenPipeError:
        if not is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is flushed at exit
        return UNREAD
    return code


if __name__ == "__main__":
    sys.exit(main())
