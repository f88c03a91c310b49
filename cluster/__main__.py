"""`python -m isthmus.cluster` and the console script `isthmus`."""

import sys

from .cli.main import run


def main() -> None:
    """Runs the command line and exits with its code."""
    sys.exit(run())


if __name__ == "__main__":
    main()
