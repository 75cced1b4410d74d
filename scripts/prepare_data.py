"""`dualgap prepare-data` from a clone: python scripts/prepare_data.py mnist --data_dir=DIR"""

import sys

from dualgap_jax.commands.prepare import main

if __name__ == "__main__":
    sys.exit(main())
