"""`python -m dualgap_jax`: the command `dualgap`."""

import sys

from dualgap_jax.commands import main

if __name__ == "__main__":
    sys.exit(main())
