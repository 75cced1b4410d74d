"""What every test relies on: shapes checked at each call, no silent rank promotion, seeded random inputs."""

from __future__ import annotations

import os

# Before NumPy is loaded, here and in children: the idle threads of its BLAS, and of SciPy's, wait busily, and two
# workers on two cores take them from one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import numpy as np
import programs
import pytest

if "dualgap_jax" in sys.modules:
    raise RuntimeError("dualgap_jax was imported before tests/conftest.py could have its annotations checked.")
jaxtyping.install_import_hook("dualgap_jax", "beartype.beartype")

jax.config.update("jax_numpy_rank_promotion", "raise")
# A program is compiled in one piece instead of one for each core, here and in children: the same code, a tenth sooner.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_parallel_codegen_split_count=1".strip()
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "compile without optimisation, a quarter of the work; for tests that are not marked optimized"
    parser.addoption("--quick", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("quick"):
        os.environ["XLA_FLAGS"] += f" {QUICK}"


@pytest.fixture(scope="session")
def programs_of_earlier_runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pytest's own cache, one for each kind of processor; an empty one where pytest keeps no cache."""
    cache = getattr(request.config, "cache", None)  # none with -p no:cacheprovider
    return (cache.mkdir("programs") if cache else tmp_path_factory.mktemp("programs")) / programs.machine()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, programs_of_earlier_runs: Path
) -> Iterator[None]:
    """Each process compiles what its tests build anew once, and not at all what an earlier run compiled.

    `--cache-clear` forgets earlier runs.
    """
    own = tmp_path_factory.mktemp("compiled")
    taken = programs.take(programs_of_earlier_runs, own)
    jax.config.update("jax_compilation_cache_dir", str(own))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # they put the folder into the key
    yield
    if request.session.exitstatus != pytest.ExitCode.INTERRUPTED:  # which may have left half a program
        programs.give(own, programs_of_earlier_runs, taken)


@pytest.fixture(scope="module")
def children_share_programs(tmp_path_factory: pytest.TempPathFactory, programs_of_earlier_runs: Path) -> Iterator[None]:
    """Processes that a module's tests start share what they compile, apart from this one: a killed one leaves half.

    They read what earlier runs left, and leave nothing.  Not where memory is measured: a program that is read takes
    less than one that is compiled.
    """
    with pytest.MonkeyPatch.context() as patched:
        folder = tmp_path_factory.mktemp("compiled_by_children")
        programs.take(programs_of_earlier_runs, folder)
        patched.setenv("JAX_COMPILATION_CACHE_DIR", str(folder))
        patched.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        patched.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        patched.setenv("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")
        yield


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs the test with 64-bit JAX types."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator seeded by the test's id: other inputs in every test and parameter set, the same ones in every run."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Keeps the figures, drawn, instead of writing them; by their stem."""
    from dualgap_jax.figures import (
        around,
        averages,
        barriers,
        certificates,
        duality,
        hitting,
        scores,
        search,
        spectra,
        surfaces,
    )

    kept: dict[str, Any] = {}

    def keep(figure: Any, workdir: Path, stem: str) -> list[Path]:
        kept[stem] = figure
        figure.canvas.draw()
        return []

    for module in (around, averages, barriers, certificates, duality, hitting, scores, search, spectra, surfaces):
        monkeypatch.setattr(module, "save", keep)
    return kept
