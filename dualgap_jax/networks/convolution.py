"""Convolutional Linen modules: a small one, and the VGG-9 of the authors' second program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from dualgap_jax.networks.settings import activation as activation_function
from dualgap_jax.sizes import positive, positives, switch

# VGG-9: widths of the convolutions of each stage, in units of its width; max pooling follows each stage.
VGG9_STAGES = ((1, 1), (2, 2), (4, 4, 4))


def _check_images(name: str, x: Array) -> None:
    if x.ndim != 4:
        raise ValueError(f"{name} branch: inputs must be [batch, height, width, channels], got shape {x.shape}.")


def _larger(a: Array, b: Array) -> Array:
    """The larger of two, the first where they are equal, a NaN where one is; so is the gradient."""
    return jnp.where((a < b) | jnp.isnan(b), b, a)


def _pooled(x: Array) -> Array:
    """2x2 max pooling of `[batch, height, width, channels]`; a map with a side of 1 stays as it is.

    Values and gradients are those of `nn.max_pool`, but for NaN, which XLA's windows drop on CPU from eight
    channels on.
    """
    height, width = x.shape[1:3]
    if min(height, width) < 2:
        return x
    x = _larger(x[:, :, 0 : width - 1 : 2], x[:, :, 1:width:2])
    return _larger(x[:, 0 : height - 1 : 2], x[:, 1:height:2])


def _convolved(x: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    """Convolution with a square kernel and the borders filled by zeros, as `nn.Conv` asks for it.

    On CPU it is a product of patches and kernel: XLA's own convolution has gradients that are tens of times slower once
    the kernels of several branches are stacked.
    """

    def by_patches(x: Array, kernel: Array) -> Array:
        side = kernel.shape[0]
        height, width = x.shape[1:3]
        border = ((side - 1) // 2, side // 2)
        padded = jnp.pad(x, ((0, 0), border, border, (0, 0)))
        rows = jnp.concatenate([padded[:, i : i + height] for i in range(side)], axis=-1)
        patches = jnp.concatenate([rows[:, :, j : j + width] for j in range(side)], axis=-1)
        return patches @ kernel.transpose(1, 0, 2, 3).reshape(-1, kernel.shape[-1])

    def by_xla(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, *args, **options)

    return lax.platform_dependent(x, kernel, cpu=by_patches, default=by_xla)


class Conv(nn.Module):
    """Stages of convolution, optional batch norm, activation and 2x2 max pooling; then a linear map.

    `module(x [batch, height, width, channels], train=False) -> [batch, out]`.  A stage whose map has a side of 1 does
    not pool.  Dropout acts on the input of the linear layer.  Parameters and statistics have the dtype of x.

    Attributes:
      channels: number of channels of each stage.
      out: number of outputs.
      kernel_size: side of the square kernels.
      activation: a name in `networks.ACTIVATIONS`, or an elementwise function.
      batch_norm: whether stages normalise, with running averages of momentum 0.9 and without biases before.
      dropout: the share of features dropped in training.

    Raises:
      ValueError: for no channels, a size that is not a positive integer, or dropout outside [0, 1); in a call, for
        inputs of another rank.
      UnknownNameError: for an unknown activation.
    """

    channels: tuple[int, ...] = (4, 8)
    out: int = 10
    kernel_size: int = 3
    activation: str | Callable[[Array], Array] = "relu"
    batch_norm: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not positives(self.channels, "conv: channels"):
            raise ValueError("conv: channels=() must have at least one entry.")
        positive(self.out, "conv: out")
        positive(self.kernel_size, "conv: kernel_size")
        switch(self.batch_norm, "conv: batch_norm")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"conv: dropout={self.dropout} must lie in [0, 1).")
        activation_function(self.activation)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Applies the module."""
        _check_images("conv", x)
        psi = activation_function(self.activation)
        for features in self.channels:
            x = nn.Conv(
                features,
                (self.kernel_size, self.kernel_size),
                use_bias=not self.batch_norm,
                param_dtype=x.dtype,
                conv_general_dilated=_convolved,
            )(x)
            if self.batch_norm:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9, param_dtype=x.dtype)(x)
            x = _pooled(psi(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.out, param_dtype=x.dtype)(x)


class VGG9(nn.Module):
    """The VGG-9 branch of the authors' second program, for images of any size (there: CIFAR-10, 32 x 32 x 3).

    `module(x [batch, height, width, channels], train=False) -> [batch, out]`.  Seven 3x3 convolutions of `width` times
    1, 1, 2, 2, 4, 4 and 4 channels in three stages, 2x2 max pooling after each; a hidden layer of 4 `width` units; a
    linear map.  All but the last are without biases, and followed by batch norm (momentum 0.9, epsilon 1e-5) and ReLU.
    Kernels, and the last bias, are drawn as PyTorch does, uniform on ±1/sqrt(fan_in).  A stage whose map has a side of
    1 does not pool.  Parameters and statistics have the dtype of x.

    Attributes:
      width: number of channels of the first stage; the authors' is 32.
      out: number of outputs.

    Raises:
      ValueError: for a width or `out` that is not a positive integer; in a call, for inputs of another rank.
    """

    width: int = 32
    out: int = 10

    def __post_init__(self) -> None:
        positive(self.width, "vgg9: width")
        positive(self.out, "vgg9: out")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Applies the module."""
        _check_images("vgg9", x)
        kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        options: dict[str, Any] = {"param_dtype": x.dtype, "kernel_init": kernel_init}

        def normalised(x: Array) -> Array:
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, param_dtype=x.dtype)
            return nn.relu(norm(x))

        for stage in VGG9_STAGES:
            for factor in stage:
                x = normalised(
                    nn.Conv(factor * self.width, (3, 3), use_bias=False, conv_general_dilated=_convolved, **options)(x)
                )
            x = _pooled(x)
        x = x.reshape(x.shape[0], -1)
        x = normalised(nn.Dense(4 * self.width, use_bias=False, **options)(x))
        limit = (4 * self.width) ** -0.5

        def bias_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return jax.random.uniform(key, shape, dtype, -limit, limit)

        return nn.Dense(self.out, bias_init=bias_init, **options)(x)
