"""What the hidden units of stacked networks say about a batch, layer by layer, so that units can be compared by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualgap_jax.landscape.symmetry import Parts, Symmetry
from dualgap_jax.types import Network, Params, State

_NUMBERS = 4096  # of a unit, at most: of channels, positions of the images are passed over evenly


def activations(net: Network, network: tuple[Params, State], x: Any, known: Symmetry) -> Parts:
    """The inputs of the hidden units over a batch, without their biases, each centred and of length 1.

    Biases and positive factors, those of a normalisation among them, do not change correlations.

    Args:
      net: a network of `multi_branch`.
      network: parameters and state of any number of branches, leaves `[I, ...]`.
      x: a batch.
      known: the units; those of a chain of layers of `mlp` or of a Linen module.

    Returns:
      For each group k an array `[I, size, numbers]` under `(k,)`.

    Raises:
      ValueError: where there are no hidden units, or they cannot be read.
    """
    branch = net.stacked.branch if net.stacked is not None else net
    read = _of_mlp(branch) if isinstance(network[0], tuple | list) else _of_linen(branch)
    layers = jax.jit(jax.vmap(read, (0, 0, None)))(*network, jnp.asarray(x))[: len(known.groups)]
    sizes = [group.size for group in known.groups]
    if not sizes or [layer.shape[-1] for layer in layers] != sizes:
        raise ValueError("by='activations' needs the hidden layers of an mlp or a Linen module; take by='weights'.")
    parts: Parts = {}
    for k, layer in enumerate(layers):
        flat = np.asarray(layer, np.float32).reshape(len(layer), -1, sizes[k])
        flat = flat[:, :: -(-flat.shape[1] // _NUMBERS)].swapaxes(1, 2)
        flat = flat - flat.mean(-1, keepdims=True)
        norms = np.linalg.norm(flat, axis=-1, keepdims=True)
        parts[k,] = flat / np.where(norms > 0, norms, 1)
    return parts


def _of_mlp(branch: Network) -> Callable[[Params, State, Array], list[Array]]:
    """Outputs `[batch, units]` of the first layers, each as the last of a shorter network."""

    def read(params: Params, state: State, x: Array) -> list[Array]:
        if branch.stem is None or len(params) < 2:
            return []
        first = branch.stem.preactivation(params, x).T
        return [first, *(branch.apply(params[: k + 1], state, x)[0] for k in range(1, len(params) - 1))]

    return read


def _of_linen(branch: Network) -> Callable[[Params, State, Array], list[Array]]:
    """Outputs of all convolutions and dense layers, in the order of their names: convolutions first."""
    from flax import linen as nn

    def read(params: Params, state: State, x: Array) -> list[Array]:
        seen: dict[str, list[Array]] = {"Conv": [], "Dense": []}

        def look(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
            y = following(*args, **kwargs)
            kind = type(context.module).__name__
            if context.method_name == "__call__" and kind in seen:
                seen[kind].append(y)
            return y

        with nn.intercept_methods(look):
            branch.apply(params, state, x)
        return [*seen["Conv"], *seen["Dense"]]

    return read
