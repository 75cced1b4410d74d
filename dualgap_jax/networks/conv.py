"""Convolutional networks."""

from __future__ import annotations

from jax import Array

from dualgap_jax.networks.flax import from_linen
from dualgap_jax.networks.settings import activation as activation_function
from dualgap_jax.networks.settings import is_count
from dualgap_jax.types import Network


def conv(
    channels: tuple[int, ...] = (4, 8),
    out: int = 10,
    kernel_size: int = 3,
    activation: str = "relu",
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> Network:
    """A convolutional branch: stages of convolution, optional batch norm, activation and 2x2 max pooling; then linear.

    A small relative of the VGG branches in the authors' second program.  Inputs `[batch, height, width, channels]`; a
    stage whose map has a side of 1 does not pool.  Dropout acts on the input of the linear layer.

    Raises:
      ValueError: for no channels, a size that is not a positive integer, or dropout outside [0, 1).
      UnknownNameError: for an unknown activation.
    """
    from flax import linen as nn

    channels = tuple(channels)
    if not channels or not all(map(is_count, (*channels, out, kernel_size))):
        raise ValueError(
            f"conv: channels={channels}, out={out!r}, kernel_size={kernel_size!r}: all must be positive integers,"
            " with at least one in channels."
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"conv: dropout={dropout} must lie in [0, 1).")
    psi = activation_function(activation)

    class Conv(nn.Module):
        @nn.compact
        def __call__(self, x: Array, train: bool = False) -> Array:
            if x.ndim != 4:
                raise ValueError(f"conv branch: inputs must be [batch, height, width, channels], got shape {x.shape}.")
            for features in channels:
                size = (kernel_size, kernel_size)
                x = nn.Conv(features, size, use_bias=not batch_norm, param_dtype=x.dtype)(x)
                if batch_norm:
                    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, param_dtype=x.dtype)(x)
                x = psi(x)
                if min(x.shape[1:3]) >= 2:
                    x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = x.reshape(x.shape[0], -1)
            x = nn.Dropout(dropout, deterministic=not train)(x)
            return nn.Dense(out, param_dtype=x.dtype)(x)

    return from_linen(Conv())
