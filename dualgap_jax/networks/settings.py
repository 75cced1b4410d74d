"""What the constructors of networks take: activations by name, and counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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


def is_count(value: object) -> bool:
    """Whether the value is a positive integer, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
