"""Entry point of `python -m scoresde` and of the console script."""

import os
import sys

from scoresde import cli
from scoresde.cli.jobs import UNREAD, is_unread
from scoresde.process_settings import tune_process


def main() -> int:
    """Run the command line; return 141, without a message, if the reader of stdout is gone, as after `| head`.

    This changes settings of the whole process, see `process_settings`.
    """
    tune_process()
    try:
        code = cli.main()
        if sys.stdout is not None:  # None if it was closed
            sys.stdout.flush()
    except BrokenPipeError:
        if not is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python's flush of stdout at exit would fail again
        return UNREAD
    return code


if __name__ == "__main__":
    sys.exit(main())
