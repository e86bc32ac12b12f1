"""`python -m scoresde`, and the console script."""

import sys

from scoresde.cli import main

if __name__ == "__main__":
    sys.exit(main())
