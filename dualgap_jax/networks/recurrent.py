"""A recurrent Linen module."""

from __future__ import annotations

from typing import Any

from flax import linen as nn
from jax import Array

from dualgap_jax.sizes import positive


class GRU(nn.Module):
    """A gated recurrent unit reads the input row by row; its last state is mapped linearly to the outputs.

    `module(x [batch, time, ...]) -> [batch, out]`.  Inputs are flattened to `[batch, time, features_in]`; `[batch, d]`
    is read as a sequence of d numbers.  Parameters have the dtype of x.

    Attributes:
      features: size of the state.
      out: number of outputs.

    Raises:
      ValueError: for a size that is not a positive integer.
    """

    features: int = 8
    out: int = 10

    def __post_init__(self) -> None:
        positive(self.features, "gru: features")
        positive(self.out, "gru: out")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the module."""
        x = x.reshape(x.shape[0], x.shape[1], -1)
        cell = nn.GRUCell(self.features, dtype=x.dtype, param_dtype=x.dtype)
        states: Any = nn.RNN(cell)(x)
        return nn.Dense(self.out, param_dtype=x.dtype)(states[:, -1])
