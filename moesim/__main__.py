"""`python -m moesim` is `moesim`."""

import sys

from moesim.cli import main

if __name__ == "__main__":
    sys.exit(main())
