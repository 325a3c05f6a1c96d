"""`python -m normpass`: the same as the command `normpass`."""

import sys

from normpass.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
