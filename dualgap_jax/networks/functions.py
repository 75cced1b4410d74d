"""Networks from bare functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dualgap_jax.networks.settings import one_array
from dualgap_jax.types import KeyArray, Network, Params, State, Stem


def from_functions(
    init: Callable[[KeyArray, Array], Params], apply: Callable[[Params, Array], Array], *, stem: Stem | None = None
) -> Network:
    """A branch without state from `init(key, x) -> params` and `apply(params, x) -> y [batch, out]`.

    Raises:
      TypeError: for what is no function of two arguments; from `init`, for a parameter that is no number or array.
    """
    for name, function, of in (("init", init, "(key, x)"), ("apply", apply, "(params, x)")):
        _check_function(function, f"from_functions: {name}", of)

    def init_fn(key: KeyArray, x: Array, /) -> tuple[Params, State]:
        return jax.tree_util.tree_map_with_path(_parameter, init(key, x)), ()

    def apply_fn(
        params: Params, state: State, x: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        del key, train
        return one_array(apply(params, x), "from_functions: apply"), state

    return Network(init_fn, apply_fn, stem)


def _check_function(function: Any, name: str, of: str) -> None:
    """Refuses what cannot be called with two arguments."""
    if not callable(function):
        raise TypeError(f"{name} must be a function of {of}, got {function!r} of type {type(function).__name__}.")
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise TypeError(f"{name} must be a function of {of}: {error}.") from error
    except ValueError:  # a function of C that tells no signature
        pass


def _parameter(path: Any, leaf: Any) -> Array:
    """A parameter as an array: Python's numbers and NumPy's are some too."""
    try:
        return jnp.asarray(leaf)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"from_functions: init gave {leaf!r} of type {type(leaf).__name__} at params{jax.tree_util.keystr(path)}:"
            " parameters are arrays, in dicts, tuples and the like; keep all else as a constant of the functions."
        ) from error
