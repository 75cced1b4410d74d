"""Numbers of every item of the paper at smoke size, held while the code around them is rebuilt.

The published tables take hours; these are the same programs on less data.  On the kind of processor and the version of
JAX that the numbers were recorded with they must come out bit for bit, elsewhere to rounding: SGD carries a last bit
further with every step, so that closeness is asked for where runs are short.  Numbers of certificates may move within
their bounds, and are compared to five digits everywhere.  Most are those of a config as `test_experiments.py` runs it,
and are compared there.

To record them anew, after a change that is meant to move them: `python tests/test_published.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import tempfile
from pathlib import Path
from typing import Any

import jax
import pytest

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_name("published.json")
_CERTIFIED = 1e-5  # relative; of numbers that stand between two bounds
_ELSEWHERE = 2e-2  # relative; of numbers after a few steps of SGD on another processor

# For each run: the config, overrides, the record, what to take of it ("*" is every entry of a list), and whether its
# numbers are bounds.
RUNS: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...], bool]] = {
    "figure 1": (
        "figure1.py:smoke",
        {},
        "row.json",
        (
            "cells.*.solutions.*.loss",
            "cells.*.scores.envelope_max",
            "cells.*.scores.loss_range",
            "cells.*.scores.barriers.*",
        ),
        False,
    ),
    "figure 1, streamed": (
        "synthetic_relu.py:I=6,smoke",
        {"training.streaming": "on"},
        "landscape.json",
        ("solutions.*.loss", "scores.envelope_max", "scores.envelope_mean", "scores.barriers.*"),
        False,
    ),
    "table 1": ("table1.py:smoke", {}, "hitting_rate.json", ("sensitivity.*.median_final_loss",), False),
    "figure 3": ("figure3.py:smoke", {}, "shapley_folkman.json", ("rows.*.distance", "rows.*.starr_bound"), False),
    "theorem 1": (
        "theorem1.py:smoke",
        {},
        "duality_gap.json",
        ("rows.*.gap_lower", "rows.*.gap_upper", "delta.lower", "delta.upper"),
        True,
    ),
    "theorem 2": ("theorem2.py:smoke", {}, "spectral.json", ("primal", "dual", "sigma_min"), True),
}


def machine() -> str:
    """The processor's instruction set and the version of JAX: what decides how sums are rounded."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        flags = platform.processor()
    digest = hashlib.sha256(flags.encode()).hexdigest()[:16]
    return f"{platform.machine()} {digest}, jax {jax.__version__}, {jax.default_backend()}"


def numbers_of(record: Any, path: str) -> list[float]:
    """The numbers of a record at a path such as `cells.*.scores.envelope_max`."""
    found = [record]
    for part in path.split("."):
        found = [item for value in found for item in (value if part == "*" else [value[part]])]
    return [float(value) for value in found]


def numbers_in(name: str, results: Path) -> dict[str, list[str]]:
    """The numbers of a run, exactly, by their paths, from its folder of results."""
    _, _, record, paths, _ = RUNS[name]
    found = json.loads((results / record).read_text())
    return {path: [value.hex() for value in numbers_of(found, path)] for path in paths}


def computed(name: str) -> dict[str, list[str]]:
    """The numbers of a run, made for them."""
    from dualgap_jax import config as config_lib
    from dualgap_jax import experiments

    file, overrides, *_ = RUNS[name]
    config = config_lib.load(f"{ROOT / 'configs' / file}")
    config = config_lib.override(config, overrides)
    with tempfile.TemporaryDirectory() as folder:
        experiments.run(config, workdir=Path(folder) / "w")
        return numbers_in(name, Path(folder) / "w" / "results")


def of_config(file: str) -> list[str]:
    """The runs that are this config's at smoke size and no other's."""
    return [name for name, (config, overrides, *_) in RUNS.items() if config == f"{file}:smoke" and not overrides]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if name not in of_config(run[0].split(":")[0])])
def test_numbers_are_as_published(name: str) -> None:
    assert_as_published(name, computed(name))


def assert_as_published(name: str, here: dict[str, list[str]]) -> None:
    record = json.loads(RECORD.read_text())
    held = record["numbers"][name]
    certified = RUNS[name][-1]
    assert list(held) == list(here)
    for path, values in held.items():
        assert len(values) == len(here[path]) > 0
        if machine() == record["machine"] and not certified:
            assert here[path] == values, path
        for now, then in zip(map(float.fromhex, here[path]), map(float.fromhex, values), strict=True):
            assert math.isclose(now, then, rel_tol=_CERTIFIED if certified else _ELSEWHERE, abs_tol=1e-6), path


if __name__ == "__main__":
    document = {"machine": machine(), "numbers": {name: computed(name) for name in RUNS}}
    RECORD.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{RECORD}: {sum(len(v) for run in document['numbers'].values() for v in run.values())} numbers")
