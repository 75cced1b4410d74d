"""Affine and convolutional first maps, written as the matrix product of problem (4) (remark (a) of Section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from dualgap_jax.spectral.problem import SpectralError, exact_products


@exact_products
def with_bias(x: Float[Any, "d_0 n"]) -> Float[Array, "d_0+1 n"]:
    """Returns the inputs with a row of ones below: the last column of W_1 is then the bias of the first layer.

    The regulariser is that of problem (4) on the augmented data, `||[W_1, b] [X; 1]||_{S_H}^H`.

    Args:
      x: The inputs `[d_0, n]`; float64 stays float64 in every mode of JAX.

    Raises:
      SpectralError: x is no matrix.
    """
    if x.ndim != 2:
        raise SpectralError(f"x of shape {x.shape} must be [d_0, n], one example a column.")
    return jnp.concatenate([x, jnp.ones((1, x.shape[1]), x.dtype)])


@exact_products
def patches(
    images: Float[Any, "n height width channels"],
    window: tuple[int, int],
    *,
    strides: tuple[int, int] = (1, 1),
    padding: Literal["SAME", "VALID"] | Sequence[tuple[int, int]] = "VALID",
) -> Float[Array, "d_0 columns"]:
    """Returns the patches that a convolution sees, one a column, so that `W_1 patches` is the convolution's output.

    With them problem (4) is that of a convolutional first layer followed by layers of 1 x 1 convolutions: the columns
    are the pairs (image, position), in that order, and Y gives a target to each.  A row of W_1 is a kernel; a kernel
    `[height, width, channels, out]` of `lax.conv_general_dilated` is `W_1.T.reshape(height, width, channels, out)`.

    Args:
      images: The images `[n, height, width, channels]`; float64 stays float64 in every mode of JAX.
      window: The height and width of the kernels.
      strides: The strides of the convolution.
      padding: The padding, as `lax.conv_general_dilated` takes it.

    Returns:
      A matrix `[d_0, n * positions]` with `d_0 = height * width * channels` of the window.

    Raises:
      SpectralError: The images are not `[n, height, width, channels]`, or the window fits nowhere.
    """
    if images.ndim != 4:
        raise SpectralError(f"images of shape {images.shape} must be [n, height, width, channels].")
    if len(window) != 2 or min(*window, *strides) < 1:
        raise SpectralError(f"a window of {window} with {strides=} must be two sizes and two steps, each at least 1.")
    found = lax.conv_general_dilated_patches(
        jnp.asarray(images),
        window,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )
    if 0 in found.shape:
        raise SpectralError(f"a window of {window} fits nowhere in images of shape {images.shape} with {padding=}.")
    channels = images.shape[-1]
    # The patches come with the channel as the slowest index.
    columns = found.reshape(-1, channels, window[0] * window[1])
    return jnp.swapaxes(columns, 1, 2).reshape(len(columns), -1).T
