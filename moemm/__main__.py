"""`python -m moemm`: the same as the command `moemm`."""

import sys

from moemm.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
