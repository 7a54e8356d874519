"""`python -m fastebm.cli` is `fastebm`."""

import sys

from fastebm.cli import main

if __name__ == "__main__":
    sys.exit(main())
