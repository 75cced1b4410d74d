"""`dualgap plot` from a clone: python scripts/plot.py WORKDIR [WORKDIR ...]"""

import sys

from dualgap_jax.commands.plot import main

if __name__ == "__main__":
    sys.exit(main())
