"""Downloads MNIST or CIFAR-10 through TFDS and prepares it for dualgap_jax.

    dualgap prepare-data mnist --data_dir=DIR

Preparing encodes the images anew, which needs TensorFlow (the extra `dualgap_jax[prepare]`); reading them does not.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from dualgap_jax import data


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepares one data set.  Returns 0 when it is ready to be read, else 1, with the reason on stderr."""
    parser = argparse.ArgumentParser(
        "dualgap prepare-data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=["mnist", "cifar10"], help="the data set")
    parser.add_argument(
        "--data_dir",
        default="",
        help="the TFDS data folder (default: the environment's TFDS_DATA_DIR, else TFDS's own, ~/tensorflow_datasets)",
    )
    options = parser.parse_args(arguments)
    root = data.resolve_data_dir(options.data_dir)
    try:
        print(f"{options.name} is already prepared: {data.find_prepared(options.name, options.data_dir).folder}")
        return 0
    except data.DataNotFoundError as error:
        present = sorted(root.glob(f"{options.name}/*/dataset_info.json"))
        if present:  # TFDS keeps a version folder that it finds, whatever its state
            reason = str(error).partition("\n")[0]
            return _fail(f"{reason}\nRemove {present[-1].parent} and run this again, or give another --data_dir.")
    if importlib.util.find_spec("tensorflow") is None:
        return _fail("preparing data needs TensorFlow: pip install 'dualgap_jax[prepare]', from a clone: '.[prepare]'")

    import tensorflow_datasets as tfds

    print(
        f"downloading {options.name} into {root}; without a network TFDS gives up only after some minutes", flush=True
    )
    try:
        tfds.builder(options.name, data_dir=str(root), file_format="array_record").download_and_prepare()
    except Exception as error:  # TFDS, the network and the file system each raise their own kinds
        return _fail(f"{options.name} could not be prepared in {root}: {type(error).__name__}: {error}")
    prepared = data.find_prepared(options.name, options.data_dir)
    print(f"prepared {prepared.folder}: {prepared.num_examples}")
    return 0


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1
