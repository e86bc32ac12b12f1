"""`python -m scoresde`, and the console script."""

import sys

from scoresde import cli
from scoresde.memory import keep_freed_memory


def main() -> int:
    """The command line, in a process of its own."""
    keep_freed_memory()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
