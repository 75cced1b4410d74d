"""What the constructors of networks take: activations by name, and counts."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
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


def positive(value: object, name: str) -> int:
    """The value as an int, if it is a positive integer of any kind (`int`, `np.int64`, ...) and no truth value.

    Raises:
      ValueError: for anything else.
    """
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = 0
    if count < 1 or isinstance(value, bool):
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    return count


def positives(values: object, name: str) -> tuple[int, ...]:
    """The values as a tuple of ints, if each is a positive integer.

    Raises:
      ValueError: for anything else.
    """
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ValueError(f"{name}={values!r} must be a tuple of positive integers, such as (8,).")
    return tuple(positive(value, f"every entry of {name}={values!r}") for value in values)
