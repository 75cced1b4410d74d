"""What the constructors of networks take: activations by name, and what a network returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dualgap_jax.registry import UnknownNameError, unknown

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "gelu": jax.nn.gelu,
    "identity": lambda a: a,
    "square": jnp.square,
}


def activation(name: str | Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The elementwise function of that name; a function is returned as it is.

    Raises:
      UnknownNameError: for a name that is not in `ACTIVATIONS`.
    """
    if callable(name):
        return name
    if name not in ACTIVATIONS:
        raise UnknownNameError(unknown("activation", name, ACTIVATIONS))
    return ACTIVATIONS[name]


def one_array(y: Any, name: str) -> Array:
    """The output of a network as it is.

    Raises:
      TypeError: unless it is one array with an axis of examples.
    """
    if not isinstance(y, jax.Array) or y.ndim == 0:
        what = f"an array of shape {y.shape}" if isinstance(y, jax.Array) else f"a {type(y).__name__}"
        raise TypeError(f"{name} returned {what}: a network returns one array, [batch, ...], whose sum branches have.")
    return y
