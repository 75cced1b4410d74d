"""Small questions about trees of arrays."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualgap_jax.types import PyTree


def is_float(leaf: Any) -> bool:
    """Whether a leaf holds real or complex numbers."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def num_bytes(tree: PyTree) -> int:
    """The bytes of all leaves, which may be `jax.ShapeDtypeStruct` too."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def rows(tree: PyTree, first: int, count: int) -> PyTree:
    """Rows `first .. first + count - 1` of every leaf: views of NumPy arrays, copies of JAX arrays."""
    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree)):
        return jax.tree.map(lambda leaf: leaf[first : first + count], tree)
    return _rows_on_device(tree, jnp.asarray(first), count)


@functools.partial(jax.jit, static_argnums=2)
def _rows_on_device(tree: PyTree, first: Array, count: int) -> PyTree:
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, count, 0), tree)
