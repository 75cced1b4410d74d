"""What every test relies on: shapes checked at each call, no silent rank promotion, seeded random inputs."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator

import jax
import jaxtyping
import numpy as np
import pytest

if "dualgap_jax" in sys.modules:
    raise RuntimeError("dualgap_jax was imported before tests/conftest.py could have its annotations checked.")
jaxtyping.install_import_hook("dualgap_jax", "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs the test with 64-bit JAX types."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator seeded by the test's id: other inputs in every test and parameter set, the same ones in every run."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))
