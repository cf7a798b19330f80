"""`python -m suasion` is `suasion`."""

import sys

from suasion.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
