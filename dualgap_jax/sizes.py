"""Sizes, counts and switches: whole numbers and truth values, Python's or NumPy's, and what else given is told."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import numpy as np

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


def is_whole(value: object) -> bool:
    """Whether the value is a whole number, Python's or NumPy's, and no truth value."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def switch(value: object, name: str) -> bool:
    """The value as a bool, if it is True or False, of Python or NumPy; nothing else is taken for its truth value.

    Raises:
      ConfigError: for anything else.
    """
    require(isinstance(value, bool | np.bool_), f"{name} must be True or False, got {value!r:.60}.")
    return bool(value)


def _whole(value: object, least: int, said: str) -> int:
    try:
        whole = least - 1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        whole = least - 1
    require(whole >= least, said)
    return whole
