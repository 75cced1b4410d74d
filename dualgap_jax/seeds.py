"""Seeds: the whole numbers from which all randomness comes, every one of them another run.

JAX takes 32 bits of a seed and drops the rest, so that 0 and 2^32 would be the same run; here such a seed is refused.
"""

from __future__ import annotations

import numbers
from typing import Any

import jax
import numpy as np

from dualgap_jax.config import ConfigError
from dualgap_jax.types import KeyArray

LIMIT = 2**32


def check(seed: Any, name: str = "seed") -> int:
    """The seed as an int.

    Raises:
      ConfigError: unless it is a whole number from 0 to 2**32 - 1, of Python or NumPy.
    """
    whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    if not whole or not 0 <= seed < LIMIT:
        raise ConfigError(f"{name}={seed!r} must be a whole number from 0 to 2**32 - 1 = {LIMIT - 1}.")
    return int(seed)


def key(seed: Any, name: str = "seed") -> KeyArray:
    """The root key of a seed.  Raises as `check` does."""
    return jax.random.key(check(seed, name))


def generator(seed: Any, *streams: int, name: str = "seed") -> np.random.Generator:
    """NumPy's generator of a seed, or of an independent stream of it.  Raises as `check` does."""
    first = check(seed, name)
    return np.random.default_rng([first, *streams] if streams else first)
