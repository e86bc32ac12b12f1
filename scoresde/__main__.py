"""`python -m scoresde`, and the console script."""

import sys

from scoresde import cli, process


def main() -> int:
    """The command line, in a process of its own."""
    process.prepare()
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
