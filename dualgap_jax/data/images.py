"""MNIST and CIFAR-10 from prepared TFDS folders, with the statistics of their training split."""

from __future__ import annotations

import math

import numpy as np

from dualgap_jax import registry
from dualgap_jax.data.cache import load
from dualgap_jax.data.dataset import Dataset, take, validate
from dualgap_jax.data.prepared import SPLITS, Decoded, find_prepared

STANDARDISE = ("pixel", "channel", "global", "none")
LABELS = ("class", "parity")
_NUM_CLASSES = 10


def mnist(
    *,
    data_dir: str = "",
    split: str = "train",
    standardise: str = "pixel",
    num_examples: int = 0,
    labels: str = "class",
) -> Dataset:
    """MNIST, 60,000 training and 10,000 test digits of 28 x 28 x 1, no augmentation (Section 5.1).

    Args:
      data_dir: the TFDS data folder; see `resolve_data_dir`.
      split: 'train' or 'test'.
      standardise: over which axes mean and standard deviation of the **training** split are taken.  'pixel': each
        pixel position and channel by its own over the examples, the paper's text (a pixel that never changes is divided
        by 1); 'channel': each colour channel over examples and positions; 'global': one pair over everything; 'none':
        mean 0 and divisor 255.
      num_examples: the first so many examples, 0 for all; TFDS stores them shuffled.
      labels: 'class', or 'parity' for 1 where the class is even and -1 where it is odd.

    Raises:
      DataNotFoundError: when the data set is not prepared; the message names the command that prepares it.
      ValueError: for an argument out of range, or damaged data.
    """
    return _images("mnist", data_dir, split, standardise, num_examples, labels)


def cifar10(
    *,
    data_dir: str = "",
    split: str = "train",
    standardise: str = "pixel",
    num_examples: int = 0,
    labels: str = "class",
) -> Dataset:
    """CIFAR-10, 50,000 training and 10,000 test colour images of 32 x 32 x 3, no augmentation (Section 5.1).

    Arguments and errors as for `mnist`.  `info['image_format']` is PNG for the lossless data that TFDS prepares; JPEG
    marks a recompressed copy, which figures made from it should mention.
    """
    return _images("cifar10", data_dir, split, standardise, num_examples, labels)


def _images(name: str, data_dir: str, split: str, axis: str, num_examples: int, labels: str) -> Dataset:
    if split not in SPLITS:
        raise ValueError(registry.unknown("split", split, SPLITS))
    if axis not in STANDARDISE:
        raise ValueError(registry.unknown("standardise", axis, STANDARDISE))
    if labels not in LABELS:
        raise ValueError(registry.unknown("labels", labels, LABELS))
    prepared = find_prepared(name, data_dir)
    arrays = load(prepared, split)
    train = arrays if split == "train" else load(prepared, "train")
    mean, std = statistics(train, axis)
    info = {
        "source": "tfds",
        "version": prepared.folder.name,
        "folder": str(prepared.folder),
        "checksum": prepared.checksum,
        "image_format": arrays.image_format,
        "split": split,
        "num_examples": len(arrays.x),
        "standardise": axis,
        "statistics": f"train split, {len(train.x)} examples" if axis != "none" else "none, x / 255",
    }
    dataset = Dataset(name, arrays.x, arrays.y, mean, std, _NUM_CLASSES, "multiclass", info)
    if labels == "parity":
        signs = np.where(arrays.y % 2 == 0, 1.0, -1.0).astype(np.float32)
        dataset = dataset._replace(y=signs, num_outputs=1, task="binary", info={**info, "labels": "even against odd"})
    return take(validate(dataset), num_examples)


def statistics(train: Decoded, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation of the training split, from exact integer sums; 1 replaces a std of 0."""
    shape = train.x.shape[1:]
    if axis == "none":
        ones = np.ones((1,) * len(shape), np.float32)
        return 0 * ones, 255 * ones
    over = {"pixel": (), "channel": tuple(range(len(shape) - 1)), "global": tuple(range(len(shape)))}[axis]
    total = train.total.sum(axis=over, keepdims=True).astype(object)  # Python integers: no overflow, no cancellation
    squares = train.total_of_squares.sum(axis=over, keepdims=True).astype(object)
    count = len(train.x) * math.prod(shape[i] for i in over)
    mean = (total / count).astype(np.float64)
    std = np.sqrt(((count * squares - total**2) / count**2).astype(np.float64))
    return mean.astype(np.float32), np.where(std > 0, std, 1.0).astype(np.float32)
