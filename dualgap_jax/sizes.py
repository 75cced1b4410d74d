"""Sizes and counts: whole numbers of any kind, Python's or NumPy's, and what is said where something else is given."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from dualgap_jax.config import ConfigError, require


def positive(value: object, name: str) -> int:
    """The value as an int, if it is a positive integer of any kind (`int`, `np.int64`, ...) and no truth value.

    Raises:
      ConfigError: for anything else.
    """
    return _whole(value, 1, f"{name} must be a positive integer, got {value!r}.")


def count(value: object, name: str) -> int:
    """The value as an int, if it is a whole number of any kind, at least 0.

    Raises:
      ConfigError: for anything else.
    """
    return _whole(value, 0, f"{name} must be a whole number of at least 0, got {value!r}.")


def positives(values: object, name: str) -> tuple[int, ...]:
    """The values as a tuple of ints, if each is a positive integer.

    Raises:
      ConfigError: for anything else.
    """
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise ConfigError(f"{name}={values!r} must be a tuple of positive integers, such as (8,).")
    return tuple(positive(value, f"every entry of {name}={values!r}") for value in values)


def _whole(value: object, least: int, said: str) -> int:
    try:
        whole = least - 1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        whole = least - 1
    require(whole >= least, said)
    return whole
