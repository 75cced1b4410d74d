"""Data sets: arrays of one's own, the synthetic ReLU data of Section 5.1, and MNIST and CIFAR-10 from TFDS folders.

Images stay uint8, on the host and on the device; `standardise` turns a mini-batch into floats inside the jitted step.
TFDS reads `array_record` files without TensorFlow; only `scripts/prepare_data.py`, which writes them, needs TensorFlow.
The decoded arrays are cached below the user's cache folder, so a second start neither decodes nor imports TFDS.

In order: `dataset` (what a data set is), `from_file` (npz and CSV), `synthetic`, `prepared` (TFDS folders), `cache`,
`images`.
"""

from collections.abc import Callable

from dualgap_jax.data.cache import cache_dir
from dualgap_jax.data.dataset import Dataset, as_dataset, from_arrays, standardise, take, validate
from dualgap_jax.data.from_file import own
from dualgap_jax.data.images import cifar10, mnist
from dualgap_jax.data.prepared import DataNotFoundError, contents_digest, find_prepared, resolve_data_dir
from dualgap_jax.data.synthetic import Teacher, relu_teacher, synthetic_relu, teacher_outputs, teacher_std
from dualgap_jax.registry import Table

DATASETS: Table[Callable[..., Dataset]] = Table(
    "data set", {"synthetic_relu": synthetic_relu, "mnist": mnist, "cifar10": cifar10, "own": own}
)

__all__ = [
    "DATASETS",
    "DataNotFoundError",
    "Dataset",
    "Teacher",
    "as_dataset",
    "cache_dir",
    "cifar10",
    "contents_digest",
    "find_prepared",
    "from_arrays",
    "mnist",
    "own",
    "relu_teacher",
    "resolve_data_dir",
    "standardise",
    "synthetic_relu",
    "take",
    "teacher_outputs",
    "teacher_std",
    "validate",
]
