"""Networks from the package's own Flax modules, which are imported when one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex

from dualgap_jax.networks.flax import from_linen
from dualgap_jax.sizes import positive, positives
from dualgap_jax.types import Network


def conv(
    channels: Iterable[SupportsIndex] = (4, 8),
    out: SupportsIndex = 10,
    kernel_size: SupportsIndex = 3,
    activation: str | Callable[[Any], Any] = "relu",
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> Network:
    """A convolutional branch: `from_linen` of `linen.Conv`, whose attributes are the arguments.

    Inputs `[batch, height, width, channels]`, outputs `[batch, out]`.  A small relative of `vgg9`.

    Raises:
      ValueError: for no channels, a size that is not a positive integer, or dropout outside [0, 1).
      UnknownNameError: for an unknown activation.
    """
    from dualgap_jax.networks.convolution import Conv

    sizes = (
        positives(channels, "conv: channels"),
        positive(out, "conv: out"),
        positive(kernel_size, "conv: kernel_size"),
    )
    return from_linen(Conv(*sizes, activation, batch_norm, dropout))


def vgg9(width: SupportsIndex = 32, out: SupportsIndex = 10) -> Network:
    """The VGG-9 branch of the authors' second program: `from_linen` of `linen.VGG9`, with its attributes as arguments.

    Inputs `[batch, height, width, channels]`, outputs `[batch, out]`.

    Raises:
      ValueError: for a width or `out` that is not a positive integer.
    """
    from dualgap_jax.networks.convolution import VGG9

    return from_linen(VGG9(positive(width, "vgg9: width"), positive(out, "vgg9: out")))


def gru(features: SupportsIndex = 8, out: SupportsIndex = 10) -> Network:
    """A recurrent branch: `from_linen` of `linen.GRU`, whose attributes are the arguments.

    Inputs `[batch, time, ...]`, outputs `[batch, out]`.

    Raises:
      ValueError: for a size that is not a positive integer.
    """
    from dualgap_jax.networks.recurrent import GRU

    return from_linen(GRU(positive(features, "gru: features"), positive(out, "gru: out")))
