"""Runs and solutions shared out over eight (virtual) devices: the numbers of one device, no collective operation."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dualgap_jax import sharding
from dualgap_jax.config import ConfigError
from dualgap_jax.experiments import TABLES
from dualgap_jax.experiments.base import identity
from dualgap_jax.experiments.hitting_rate import HITTING_RATE, HittingRateSpec
from dualgap_jax.hitting import SgdSpec

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(HERE / "eight_devices.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_runs_do_not_depend_on_the_number_of_devices(found: dict[str, Any]) -> None:
    """Bit for bit; 51 runs fill neither 3 x 16 nor 8 x 16 lanes evenly."""
    study = found["study"]
    assert study["equal"] == [True, True]
    assert study["rates on 8"] == [16] * 8
    assert study["rates on 3"] == [16] * 3
    assert len(study["statuses"]) > 1
    assert study["different losses"] > 20


def test_devices_do_not_speak_to_each_other(found: dict[str, Any]) -> None:
    """The compiled segment has no collective operation; left to XLA's partitioner the same program has some."""
    assert found["study"]["collectives"] == {"1": {}, "3": {}, "8": {}}
    assert sum(found["study"]["automatic"].values()) > 0


def test_solutions_of_a_small_network_on_several_devices(found: dict[str, Any]) -> None:
    """Up to rounding: a program for one lane may round otherwise than one for three."""
    solutions = found["solutions"]
    assert solutions["on 3"] == [{}, 3, 3]
    assert solutions["on 2"] == [{}, 2, 4]
    assert solutions["worst on 2"] < 1e-5
    assert solutions["worst on 3"] < 1e-5
    assert solutions["fall"] > 0.1


def test_devices_are_counted(found: dict[str, Any]) -> None:
    refusals = found["refusals"]
    assert "devices=9" in refusals["9"]
    assert "give 1 to 8" in refusals["9"]
    assert "devices=-1" in refusals["-1"]
    assert refusals["all"] == list(range(8))
    assert refusals["first"] == [0, 1, 2]


def test_one_device_changes_nothing() -> None:
    def function(a: Any) -> Any:
        return a

    (device,) = sharding.local_devices(1)
    assert sharding.over_devices(function, [device], (0,), 0) is function
    assert not sharding.share_out({"a": np.ones(3)}, [device], 0)["a"].committed
    np.testing.assert_array_equal(sharding.filled(3, [device]), [0, 1, 2])


@pytest.mark.parametrize(
    ("lanes", "count", "expected"), [(5, 4, [0, 1, 2, 3, 4, 0, 1, 2]), (1, 3, [0, 0, 0]), (4, 2, [0, 1, 2, 3])]
)
def test_lanes_are_filled_up(lanes: int, count: int, expected: list[int]) -> None:
    np.testing.assert_array_equal(sharding.filled(lanes, jax.local_devices()[:1] * count), expected)


def test_a_study_that_wants_more_devices_is_refused_before_it_starts() -> None:
    spec = HittingRateSpec(sgd=SgdSpec(devices=len(jax.local_devices()) + 1))
    with pytest.raises(ConfigError, match="devices="):
        spec.validate(TABLES)
    with pytest.raises(ConfigError, match=r"sgd\.devices=-2"):
        SgdSpec(devices=-2)
    # A workdir may be gone on with on another machine.
    assert identity(HITTING_RATE, spec) == identity(HITTING_RATE, dataclasses.replace(spec, sgd=SgdSpec(devices=0)))
