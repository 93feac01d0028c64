"""``python -m eetrain``: the same as the command ``eetrain``."""

import sys

from eetrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
