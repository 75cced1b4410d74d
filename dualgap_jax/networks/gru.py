"""Recurrent networks."""

from __future__ import annotations

from typing import Any

from jax import Array

from dualgap_jax.networks.flax import from_linen
from dualgap_jax.networks.settings import is_count
from dualgap_jax.types import Network


def gru(features: int = 8, out: int = 10) -> Network:
    """A recurrent branch: a GRU reads the input row by row; its last state is mapped linearly to the outputs.

    Inputs `[batch, time, ...]` are flattened to `[batch, time, features_in]`; `[batch, d]` is read as a sequence of d
    numbers.

    Raises:
      ValueError: for a size that is not a positive integer.
    """
    from flax import linen as nn

    if not (is_count(features) and is_count(out)):
        raise ValueError(f"gru: features={features!r} and out={out!r} must be positive integers.")

    class Gru(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            x = x.reshape(x.shape[0], x.shape[1], -1)
            cell = nn.GRUCell(features, dtype=x.dtype, param_dtype=x.dtype)
            states: Any = nn.RNN(cell)(x)
            return nn.Dense(out, param_dtype=x.dtype)(states[:, -1])

    return from_linen(Gru())
