"""The data of a run: on the device as they are stored, in an order that a key fixes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualgap_jax.config import require
from dualgap_jax.data import Dataset, standardise
from dualgap_jax.types import KeyArray, Network


class Batch(NamedTuple):
    """A data set on the device: features as stored (images stay uint8), labels, and the standardisation."""

    x: Array
    y: Array
    mean: Array
    std: Array


def on_device(dataset: Dataset) -> Batch:
    """Moves a data set to the device as it is stored."""
    return Batch(*(jnp.asarray(a) for a in (dataset.x, dataset.y, dataset.mean, dataset.std)))


def example_input(data: Batch | Dataset) -> Array:
    """The standardised first example, `[1, ...]`: what `init` needs to know of the data."""
    return standardise(jnp.asarray(data.x[:1]), jnp.asarray(data.mean), jnp.asarray(data.std))


def batch_shape(dataset: Dataset, batch_size: int) -> jax.ShapeDtypeStruct:
    """Shape and type of a standardised batch; a size of 0 is the full data set."""
    example = jax.eval_shape(lambda: example_input(dataset))
    return jax.ShapeDtypeStruct((batch_size or len(dataset.y), *example.shape[1:]), example.dtype)


def output_shape(net: Network, dataset: Dataset) -> jax.ShapeDtypeStruct:
    """Shape and type of what a network gives of one example, `[1, ...]`."""

    def outputs(key: KeyArray) -> Array:
        x = example_input(dataset)
        return net.apply(*net.init(key, x), x, key=key, train=True)[0]

    return jax.eval_shape(outputs, jax.random.key(0))


class BatchOrder:
    """The order in which one solution visits the data: a fresh permutation each epoch.

    What a step sees is a function of the key and the step only.  The rest of an epoch that fills no batch is left out.

    Args:
      key: of the permutations.
      num_examples: size of the data set.
      batch_size: examples a step, at most `num_examples`.

    Raises:
      ConfigError: for a batch size outside [1, num_examples].
    """

    def __init__(self, key: KeyArray, num_examples: int, batch_size: int) -> None:
        require(1 <= batch_size <= num_examples, f"batch_size={batch_size} must lie between 1 and {num_examples}.")
        self._key, self._n, self._batch = key, num_examples, batch_size
        self._per_epoch = num_examples // batch_size
        self._epoch: tuple[int, np.ndarray] | None = None

    def indices(self, first: int, length: int) -> np.ndarray:
        """Indices `[length, batch]` of the examples at steps `first, first + 1, ...`."""
        rows = []
        for now in range(first, first + length):
            epoch, position = divmod(now, self._per_epoch)
            if self._epoch is None or self._epoch[0] != epoch:
                order = jax.random.permutation(jax.random.fold_in(self._key, epoch), self._n)
                self._epoch = (epoch, np.asarray(order, np.int32))
            rows.append(self._epoch[1][position * self._batch : (position + 1) * self._batch])
        return np.stack(rows)
