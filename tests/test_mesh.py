"""Branches over eight devices and over two processes: one device's numbers, and a traffic that does not know I."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from two_processes import free_port, run_two_processes

from dualgap_jax.config import ConfigError
from dualgap_jax.data import from_arrays
from dualgap_jax.files import load_json, load_npz
from dualgap_jax.losses import multi_margin
from dualgap_jax.networks import mlp, multi_branch
from dualgap_jax.sharding import join
from dualgap_jax.training import train

pytestmark = pytest.mark.usefixtures("children_share_programs")
ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = 16 * 3 * 4  # bytes of a batch of 16 examples times 3 outputs in float32


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `mesh_of_eight.py` found."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "mesh_of_eight.py"), str(tmp_path_factory.mktemp("eight"))],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_eight_devices_give_the_losses_of_one(eight: dict[str, Any]) -> None:
    """MLP and convolutional branches, I divisible by the mesh and not; ten steps with momentum."""
    assert len(eight["same"]) == 7
    for name, (losses, weights, spread) in eight["same"].items():
        assert losses < 1e-6, name
        assert weights < 1e-5, name
        assert spread > 1e-2, name  # the losses do change


def test_the_traffic_of_a_step_is_one_sum_of_the_outputs_whatever_the_number_of_branches(
    eight: dict[str, Any],
) -> None:
    found = {name: ops for name, ops in eight["traffic"].items() if "8x1" in name}
    assert len(found) == 6
    for name, operations in found.items():
        assert operations == [["all-reduce", OUTPUTS]], name


def test_along_data_a_step_also_sums_the_gradients(eight: dict[str, Any]) -> None:
    """The price of the second axis: the bytes of the parameters on one device, besides outputs and the loss."""
    one = (72 * 4 + 4 + 4 * 4 + 4 + 4 * 3 + 3) * 4  # bytes of a branch
    for count in (16, 256):
        operations = eight["traffic"][f"I={count} on 4x2, 1000 at a time"]
        assert {kind for kind, _ in operations} == {"all-reduce"}
        assert sum(size for _, size in operations) == OUTPUTS // 2 + 4 + one * count // 4


def test_a_run_goes_on_on_other_meshes(eight: dict[str, Any]) -> None:
    moved = eight["moves"]
    assert moved["steps"] == [15, 15]
    assert moved["weights"] < 1e-5
    assert moved["losses"] < 1e-6


def test_what_is_not_finite_is_found_on_any_device(eight: dict[str, Any]) -> None:
    expected = [True, False, *(lane != 5 for lane in range(8))]
    assert eight["finite"] == {"sharded": expected, "replicated": expected}


# --- processes ------------------------------------------------------------------------------------------------------


def command(workdir: Path, *flags: str) -> list[str]:
    return [
        sys.executable,
        "scripts/run.py",
        "--config=configs/synthetic_relu.py:I=5,smoke",
        "--config.training.streaming=on",
        f"--workdir={workdir}",
        *flags,
    ]


def test_two_processes_are_one(tmp_path: Path) -> None:
    """The command line in two processes on this machine, beside one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    run = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    address = f"--coordinator=127.0.0.1:{free_port()}"
    flags = [address, "--num_processes=2", "--config.mesh.branch=2"]
    two = [
        subprocess.Popen(command(tmp_path / "two", *flags, f"--process_id={i}"), **run)  # type: ignore[call-overload]
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in two]
    finally:
        for process in two:
            process.kill()
    assert [process.returncode for process in two] == [0, 0], "\n".join(said)
    assert "workdir:" in said[0]
    assert "workdir:" not in said[1]

    done = subprocess.run(command(tmp_path / "one"), check=False, timeout=240, **run)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout
    one, other = (load_json(tmp_path / name / "results" / "landscape.json") for name in ("one", "two"))
    for a, b in zip(one["solutions"], other["solutions"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert (b["steps"], b["status"]) == (a["steps"], a["status"])
    surfaces = [load_npz(tmp_path / name / "results" / "landscape.npz")["loss"] for name in ("one", "two")]
    np.testing.assert_allclose(surfaces[1], surfaces[0], rtol=1e-4)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().count("\n") for name in ("one", "two")]
    assert lines[0] == lines[1] > 0


def test_a_killed_process_ends_the_other_with_a_message_and_the_run_goes_on(tmp_path: Path) -> None:
    """Two processes of two devices each: the numbers are in the end those of an uninterrupted run."""
    long = ["--config.training.max_steps=200", "--config.training.tolerance=0.0", "--config.mesh.branch=4"]
    flags = [*long, "--config.training.checkpoint_seconds=1.0", "--cpu_devices=2", "--num_processes=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    pipes: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def started(workdir: Path) -> list[subprocess.Popen[str]]:
        address = f"--coordinator=127.0.0.1:{free_port()}"
        return [
            subprocess.Popen(command(workdir, *flags, address, f"--process_id={i}"), text=True, **pipes)
            for i in range(2)
        ]

    def ended(name: str) -> tuple[Any, np.ndarray]:
        both = started(tmp_path / name)
        said = [process.communicate(timeout=240) for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        results = tmp_path / name / "results"
        return load_json(results / "landscape.json")["solutions"], load_npz(results / "landscape.npz")["loss"]

    solutions, surface = ended("whole")
    both = started(tmp_path / "killed")
    try:
        until = time.monotonic() + 120
        while not list((tmp_path / "killed").glob("checkpoints/solution_0/*/manifest.json")):
            assert time.monotonic() < until, "no checkpoint"
            time.sleep(0.05)
        time.sleep(0.3)
        both[1].kill()
        _, said = both[0].communicate(timeout=240)
    finally:
        for process in both:
            process.kill()
            process.communicate()
    # One that waits at a barrier, not for a sum, hears of it by the missing heartbeats, and then JAX ends it.
    assert both[0].returncode != 0
    if "another task died" not in said:
        assert both[0].returncode == 2, said
        assert "another process of this run has ended" in said
        assert "Traceback" not in said
    found, grid = ended("killed")
    assert found == solutions
    np.testing.assert_array_equal(grid, surface)


TRAINING = """
import logging
import numpy as np
import optax
from dualgap_jax.checkpoints import Pieces, reading
from dualgap_jax.data import from_arrays
from dualgap_jax.identity import IdentityError
from dualgap_jax.losses import multi_margin
from dualgap_jax.networks import mlp, multi_branch
from dualgap_jax.sharding import MeshSpec
from dualgap_jax.training import streamed, train

def data(seed):
    rng = np.random.default_rng(seed)
    return from_arrays(rng.normal(size=(48, 6)).astype(np.float32), rng.integers(0, 3, 48))

def run(name, seed=0, steps=15, mesh=MeshSpec(branch=2)):
    (solution,) = train(
        multi_branch(mlp((4,), 3), 5), multi_margin(), data(seed), optax.sgd(0.5, momentum=0.9), batch_size=16,
        max_steps=steps, check_every=5, num_solutions=1, checkpoints=folder / name, checkpoint_seconds=0, mesh=mesh,
    )
    return solution

stored, step, steps_in = streamed.Streamed.stored, streamed.Streamed.step, reading.steps_in
"""


def test_two_processes_write_their_own_branches_and_go_on_from_one_step(tmp_path: Path) -> None:
    """Uneven branches, momentum; a step that one process does not see is passed over by both."""
    script = """
        held = []
        def spy(self, lanes, lane):
            held.append(stored(self, lanes, lane))
            return held[-1]
        streamed.Streamed.stored = spy
        whole = run("whole")
        for leaf in jax.tree.leaves(held, is_leaf=lambda x: isinstance(x, Pieces)):
            assert (leaf.firsts, [len(a) for a in leaf.arrays], leaf.num_rows) == ([(0,), (3,)][me], [[3], [2]][me], 5)
        held.clear()
        streamed.Streamed.stored = stored

        for steps in (5, 10):
            run("resumed", steps=steps)
        assert steps_in(folder / "resumed" / "solution_0") == [5, 10]
        run("shorter", steps=10)
        calls = []
        if me == 1:  # as where a file system shows the newest step late
            reading.steps_in = lambda path: [s for s in steps_in(path) if s != 10]
        streamed.Streamed.step = lambda self, *args: calls.append(args[-1]) or step(self, *args)
        resumed = run("resumed")
        assert calls[-10:] == list(range(5, 15)), calls  # after the steps that are timed for the estimate
        assert len(calls) == 14
        reading.steps_in = steps_in
        assert (resumed.steps, resumed.status, resumed.batch_loss) == (whole.steps, whole.status, whole.batch_loss)
        for a, b in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(whole.params), strict=True):
            assert np.array_equal(a, b)
        calls.clear()
        assert run("resumed").batch_loss == whole.batch_loss  # which has ended
        assert calls == []

        run("data", mesh=MeshSpec(data=2))  # where the second process has copies only
        try:
            run("other", seed=me)
            raise AssertionError("different data")
        except IdentityError as error:
            assert "process 0 and process 1 were given different runs: the data differs" in str(error), error
    """
    run_two_processes(TRAINING + textwrap.dedent(script), tmp_path)

    rng = np.random.default_rng(0)
    data = from_arrays(rng.normal(size=(48, 6)).astype(np.float32), rng.integers(0, 3, 48))

    def alone(name: str) -> Any:
        settings: dict[str, Any] = {"batch_size": 16, "max_steps": 15, "check_every": 5, "num_solutions": 1}
        net, optimizer = multi_branch(mlp((4,), 3), 5), optax.sgd(0.5, momentum=0.9)
        (solution,) = train(
            net, multi_margin(), data, optimizer, **settings, checkpoints=tmp_path / name, streaming="on"
        )
        return solution

    expected = alone("alone")
    for name in ("whole", "resumed", "shorter", "data"):
        found = alone(name)  # reads what two processes wrote, and goes on where they stopped
        assert found.steps == 15
        for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1", None, None), "give all three"),
        ((None, 2, 0), "give all three"),
        (("127.0.0.1", 2, 0), "HOST:PORT"),
        (("127.0.0.1:1", 0, 0), "num_processes=0"),
        (("127.0.0.1:1", 2, 2), "between 0 and num_processes - 1 = 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_anything_waits(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        join(*arguments)
