"""Lets `python -m fastebm` do what the command `fastebm` does."""

import sys

from fastebm.cli import main

if __name__ == "__main__":
    sys.exit(main())
