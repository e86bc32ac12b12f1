"""`python -m scoresde`, and the console script."""

import os
import sys

from scoresde import cli, process
from scoresde.cli.jobs import UNREAD


def main() -> int:
    """The command line, in a process of its own; without a word where nobody reads on."""
    process.prepare()
    try:
        code = cli.main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at exit
        return UNREAD
    return code


if __name__ == "__main__":
    sys.exit(main())
