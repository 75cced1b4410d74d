"""Checkpoints: what is saved comes back bit by bit, and nothing else ever does."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from two_processes import run_two_processes

from dualgap_jax import experiments
from dualgap_jax.checkpoints import (
    Checkpointer,
    CheckpointMismatchError,
    DamagedCheckpointError,
    Pieces,
    Stored,
    leaves,
    like_template,
    load,
    open_branches,
    open_slices,
    rows,
)
from dualgap_jax.config import Component, experiment_config
from dualgap_jax.data import synthetic_relu
from dualgap_jax.experiments import linear_dual
from dualgap_jax.files import load_json, save_json
from dualgap_jax.losses import binary_hinge
from dualgap_jax.networks import mlp, multi_branch
from dualgap_jax.training import train

ROOT = Path(__file__).resolve().parents[1]
Struct = jax.ShapeDtypeStruct


class Carry(NamedTuple):
    params: dict[str, Any]
    optimizer: Any
    key: jax.Array
    cursor: int
    rate: float
    done: bool
    history: np.ndarray


def make_state(seed: int) -> Carry:
    """A training state with every kind of leaf; all values depend on the seed."""
    rng = np.random.default_rng(seed)
    params = {
        "hidden": {"kernel": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
        "none": jnp.zeros((0, 4)),
        "layers": [jnp.asarray(rng.integers(-9, 9, 4), jnp.int8), (jnp.asarray(seed % 2 == 0),)],
    }
    optimizer: Any = optax.chain(optax.clip(1.0), optax.sgd(0.1, momentum=0.9)).init({"w": jnp.ones((5, 3))})
    optimizer = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(), x.dtype), optimizer)
    history = rng.normal(size=6)
    history[:3] = np.nan, np.inf, -0.0
    keys = jax.random.split(jax.random.key(seed), 3)
    return Carry(params, optimizer, keys, int(rng.integers(1 << 40)), float(rng.normal()), bool(seed % 2), history)


def raw(leaf: Any) -> tuple[str, tuple[int, ...], bytes]:
    """dtype, shape and bytes: the same only for leaves that agree bit by bit."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return (str(leaf.dtype), leaf.shape, np.asarray(jax.random.key_data(leaf)).tobytes())
    array = np.asarray(leaf)
    return (str(array.dtype), array.shape, array.tobytes())


def assert_same(got: Any, want: Any) -> None:
    assert str(jax.tree.structure(got)) == str(jax.tree.structure(want))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
        if not isinstance(b, jax.Array):
            assert type(a) is type(b)
        assert raw(a) == raw(b)


def blank(state: Any) -> Any:
    """A template with the same structure and none of the values."""

    def empty(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        return np.zeros_like(leaf) if isinstance(leaf, np.ndarray) else type(leaf)()

    return jax.tree.map(empty, state)


def donated_in_place(array: jax.Array) -> bool:
    """Donates the array; whether the result took over its memory."""
    before = array.unsafe_buffer_pointer()
    return bool(jax.jit(lambda x: x * 2, donate_argnums=0)(array).unsafe_buffer_pointer() == before)


@pytest.fixture
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of at most 256 bytes."""
    monkeypatch.setattr(rows, "CHUNK_BYTES", 256)
    return 256


def small(value: float) -> dict[str, jax.Array]:
    return {"w": jnp.full(1000, float(value)), "n": jnp.asarray(int(value))}


def save_all(path: Path, *steps: int, keep: int = 5) -> None:
    with Checkpointer(path, keep=keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, small(step), {"step": step})


def flip_byte(folder: Path) -> None:
    """Flips one bit in the middle of the largest file below `folder`, or of that file."""
    files = [folder] if folder.is_file() else [p for p in folder.rglob("*") if p.is_file()]
    file = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


# --- Round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_kind_of_leaf_comes_back_bit_by_bit(tmp_path: Path, seed: int) -> None:
    state = make_state(seed)
    meta = {"epoch": seed, "best": math.inf, "rate": np.float32(0.1), "names": ("a", "b"), "nested": {"x": None}}
    with Checkpointer(tmp_path / "c") as checkpointer:
        checkpointer.save(seed, state, meta)
        for template in (blank(state), make_state(seed + 7)):
            restored = checkpointer.restore_latest(template)
            assert restored is not None
            assert restored.step == seed
            assert_same(restored.state, state)
            assert restored.meta == {
                "epoch": seed,
                "best": math.inf,
                "rate": float(np.float32(0.1)),
                "names": ["a", "b"],
                "nested": {"x": None},
            }
            # The next draws are the same too: the keys are keys.
            draws = [jax.random.normal(each.key[1], (4,)) for each in (restored.state, state)]
            np.testing.assert_array_equal(draws[0], draws[1])


def test_keys_keep_their_implementation(tmp_path: Path) -> None:
    state = {"a": jax.random.key(3), "b": jax.random.key(3, impl="rbg")}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state)
        restored = checkpointer.restore_latest(jax.eval_shape(lambda: state))
        assert restored is not None
        assert_same(restored.state, state)
        with pytest.raises(CheckpointMismatchError, match="b: key<rbg>"):
            checkpointer.restore_latest({"a": jax.random.key(0), "b": jax.random.key(0)})


def test_load_without_a_template_gives_nested_dicts(tmp_path: Path) -> None:
    state = make_state(4)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(12, state, {"x": 1})
    restored = load(tmp_path)
    assert (restored.step, restored.meta) == (12, {"x": 1})
    tree = restored.state
    assert set(tree) == {"params", "optimizer", "key", "cursor", "rate", "done", "history"}
    assert raw(tree["params"]["hidden"]["kernel"]) == raw(state.params["hidden"]["kernel"])
    assert raw(tree["params"]["half"]) == raw(state.params["half"])
    assert raw(tree["params"]["layers"]["1"]["0"]) == raw(state.params["layers"][1][0])
    assert tree["params"]["none"].shape == (0, 4)
    assert raw(tree["key"]) == raw(jax.random.key_data(state.key))
    assert tree["cursor"] == state.cursor
    assert_same(load(tmp_path, blank(state)).state, state)


def test_a_state_without_any_stored_array(tmp_path: Path) -> None:
    state = {"empty": jnp.zeros((3, 0)), "optimizer": optax.EmptyState()}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        restored = checkpointer.restore_latest(state)
    assert restored is not None
    assert_same(restored.state, state)


@pytest.mark.parametrize(
    "keys",
    [("a.b", ("a", "b")), ("", "w"), ("/tmp/w",), ("../w",), ("a//b",), (".",), ("a/../../b",), ("w\0",), ("w/",)],
)
def test_names_that_would_mix_or_leave_the_folder_are_refused(tmp_path: Path, keys: tuple[Any, ...]) -> None:
    state: dict[str, Any] = {}
    for key in keys:
        if isinstance(key, tuple):
            state[key[0]] = {key[1]: np.ones(3)}
        else:
            state[key] = np.ones(3)
    with Checkpointer(tmp_path / "c") as checkpointer:
        with pytest.raises(ValueError, match=r"two leaves .* stored as 'a\.b'|no name of a file; rename"):
            checkpointer.save(1, state)
        assert checkpointer.steps() == []
    assert not list(tmp_path.rglob("zarr.json"))


def test_names_with_separators_and_other_characters_do_not_mix(tmp_path: Path) -> None:
    names = ["a.b", "a b", "a/~/linear_0", "a/~/linear_1", "ä", "A", "a", "%41", "c.0", "w\n", "..w", ".w"]
    state = {name: np.full(3, float(k)) for k, name in enumerate(names)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        restored = checkpointer.restore_latest(state)
    assert restored is not None
    assert_same(restored.state, state)


def test_buffers_may_be_changed_and_donated_after_a_save(tmp_path: Path) -> None:
    host = np.arange(2_000_000, dtype=np.float32)
    state = {"host": host, "device": jnp.asarray(host) + 1}
    want = {name: np.array(value) for name, value in state.items()}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        host[:] = -1
        assert donated_in_place(state["device"])
        restored = checkpointer.restore_latest(want)
    assert restored is not None
    assert_same(restored.state, want)


def test_an_interrupted_optimisation_goes_on_exactly(tmp_path: Path) -> None:
    chain = optax.adam(optax.cosine_decay_schedule(0.1, 20))
    target = jnp.asarray(np.random.default_rng(5).normal(size=6), jnp.float32)

    @jax.jit
    def advance(state: tuple[jax.Array, Any, jax.Array]) -> tuple[jax.Array, Any, jax.Array]:
        w, optimizer, key = state
        key, sub = jax.random.split(key)
        gradient = jax.grad(lambda w: ((w - target) ** 2).sum())(w) + jax.random.normal(sub, w.shape)
        update, optimizer = chain.update(gradient, optimizer, w)
        return optax.apply_updates(w, update), optimizer, key

    start = (jnp.zeros(6), chain.init(jnp.zeros(6)), jax.random.key(8))
    straight = start
    for _ in range(10):
        straight = advance(straight)
    first = start
    for _ in range(4):
        first = advance(first)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, first)
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore_latest(start)
    assert restored is not None
    second = restored.state
    for _ in range(restored.step, 10):
        second = advance(second)
    assert_same(second, straight)


# --- Placement --------------------------------------------------------------------------------------------------------


def test_a_template_with_shardings_places_the_leaves(tmp_path: Path) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]), ("branch",))
    sharding = NamedSharding(mesh, PartitionSpec("branch"))
    state = {"w": jnp.arange(8.0).reshape(4, 2), "k": jax.random.split(jax.random.key(0), 4), "n": jnp.asarray(3)}
    template = {
        "w": jax.ShapeDtypeStruct((4, 2), jnp.float32, sharding=sharding),
        "k": jax.ShapeDtypeStruct((4,), state["k"].dtype, sharding=sharding),
        "n": state["n"],
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        restored = checkpointer.restore_latest(template)
    assert restored is not None
    assert restored.state["w"].sharding == sharding
    assert restored.state["k"].sharding == sharding
    assert not restored.state["n"].committed  # free to follow the sharded leaves, as the fresh one was
    assert_same(restored.state, state)


def test_four_devices_to_two_and_back(tmp_path: Path) -> None:
    script = f"""
        import warnings
        warnings.simplefilter("error")
        import jax, numpy as np
        jax.config.update("jax_num_cpu_devices", 4)
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from dualgap_jax.checkpoints import Checkpointer
        def placed(count):
            return NamedSharding(Mesh(np.array(jax.devices()[:count]), ("branch",)), P("branch"))
        values = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
        keys = jax.random.split(jax.random.key(1), 8)
        state = {{"w": jax.device_put(values, placed(4)), "k": jax.device_put(keys, placed(4)), "n": 5}}
        assert not state["w"].is_fully_replicated
        with Checkpointer({str(tmp_path)!r}) as checkpointer:
            checkpointer.save(1, state)
            for count in (2, 4):
                template = {{
                    "w": jax.ShapeDtypeStruct((8, 3), np.float32, sharding=placed(count)),
                    "k": jax.ShapeDtypeStruct((8,), keys.dtype, sharding=placed(count)),
                    "n": 0,
                }}
                got = checkpointer.restore_latest(template).state
                assert got["w"].sharding == placed(count) and got["k"].sharding == placed(count)
                assert (np.asarray(got["w"]) == values).all() and got["n"] == 5
                assert (jax.random.key_data(got["k"]) == jax.random.key_data(keys)).all()
            print("same")
    """
    done = run_python(script)
    assert done.stdout == "same\n", done.stderr


def test_shards_are_stored_one_by_one_and_placed_anew(tmp_path: Path) -> None:
    """Rows, columns and copies over devices; blocks of 256 bytes; the buffers stay donatable after save and restore."""
    script = f"""
        import warnings
        warnings.simplefilter("error")
        import jax, numpy as np
        jax.config.update("jax_num_cpu_devices", 4)
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding
        from dualgap_jax.checkpoints import Checkpointer, Pieces, rows
        rows.CHUNK_BYTES = 256
        devices = np.array(jax.devices())
        def placed(shape, *spec):
            return NamedSharding(Mesh(devices[: np.prod(shape)].reshape(shape), ("a", "b")), P(*spec))
        def pointers(array):
            return [array.addressable_data(k).unsafe_buffer_pointer() for k in range(len(array.devices()))]
        double = jax.jit(lambda x: x * 2, donate_argnums=0)
        def donated_in_place(array):
            before = pointers(array)
            doubled = double(array)
            return pointers(doubled) == before and (np.asarray(doubled) == values * 2).all()
        rng = np.random.default_rng(0)
        values = rng.normal(size=(48, 8)).astype(np.float32)
        places = [placed((4, 1), "a"), placed((2, 2), "a", "b"), placed((2, 2), "a"), placed((1, 4), None, "b"),
                  placed((2, 2)), placed((2, 1), ("a", "b")), SingleDeviceSharding(devices[3])]
        with Checkpointer({str(tmp_path)!r}) as checkpointer:
            for step, place in enumerate(places):
                array = jax.jit(lambda x: x + 0, out_shardings=place)(values)
                pieces = Pieces([jax.device_put(values[:20], devices[1]), values[20:21],
                                 jax.device_put(values[21:], devices[2])])
                checkpointer.save(step, {{"w": array, "p": pieces}})
                assert donated_in_place(array), place
                for other in places[step % 2 :: 2]:
                    template = {{
                        "w": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=other),
                        "p": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=other),
                    }}
                    got = checkpointer.restore_latest(template)
                    assert got.step == step
                    assert all(leaf.sharding == other for leaf in got.state.values())
                    assert (np.asarray(got.state["p"]) == values).all()
                    assert donated_in_place(got.state["w"]), other
            assert (checkpointer.restore_latest({{"w": values, "p": values}}).state["p"] == values).all()
            print("same")
    """
    done = run_python(script)
    assert done.stdout == "same\n", done.stderr


TWO_PROCESSES = """
    import logging
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    from dualgap_jax.checkpoints import Checkpointer, Pieces, like_template, load, open_slices, rows
    rows.CHUNK_BYTES = 256
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("branch",)), P("branch"))
    values = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    odd = np.random.default_rng(1).normal(size=(51, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), 50)
    def spread(array):
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    def state(step):
        part = [odd[:26], odd[26:]][me] + step  # a chunk of 21 rows ends in the other's
        return {
            "w": spread(values + step),
            "k": spread(keys),
            "odd": Pieces([part], firsts=[26 * me], num_rows=51),
            "host": odd + step,
            "same": jax.device_put(odd + step, NamedSharding(sharding.mesh, P())),
            "local": jax.numpy.float32(step),
        }
    template = {
        "w": jax.ShapeDtypeStruct((50, 8), np.float32, sharding=sharding),
        "k": jax.ShapeDtypeStruct((50,), keys.dtype, sharding=sharding),
        "odd": odd, "host": odd, "same": odd, "local": np.float32(0),
    }
    def check(got, step):
        assert got.step == step, (got.step, step)
        mine = slice(25 * me, 25 * me + 25)
        assert (np.asarray(got.state["w"].addressable_data(0)) == values[mine] + np.float32(step)).all()
        assert (jax.random.key_data(got.state["k"].addressable_data(0)) == jax.random.key_data(keys)[mine]).all()
        for name in ("odd", "host", "same"):
            assert (got.state[name] == odd + step).all(), name
        assert got.state["local"] == step
"""


def test_two_processes_write_and_read_their_own_parts(tmp_path: Path) -> None:
    script = """
        wrote = set()
        with Checkpointer(folder, together=True) as checkpointer:
            for step in (0, 1, 2, 3, 3):
                checkpointer.save(step, state(step))
                wrote |= {path for path in checkpointer._leaves.digests if "/w/" in path}
            assert checkpointer.steps() == [2, 3]
            check(checkpointer.restore_latest(template), 3)
        assert len(wrote) == 3, wrote  # of seven chunks, of which one has rows of both
        check(load(folder, template), 3)
        assert (open_slices(folder, {"w": template["w"]}).read(24, 3)["w"] == values[24:27] + np.float32(3)).all()
    """
    run_two_processes(textwrap.dedent(TWO_PROCESSES) + textwrap.dedent(script), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    alone = load(tmp_path)  # in one process
    assert alone.step == 3
    assert alone.state["odd"].shape == (51, 3)


def test_the_first_process_may_save_alone(tmp_path: Path) -> None:
    script = """
        if me == 0:
            with Checkpointer(folder) as checkpointer:  # the other process takes no part
                for step in (0, 1, 2, 2):
                    checkpointer.save(step, {"host": odd + step})
                assert checkpointer.restore_latest({"host": odd}).step == 2
        else:
            try:
                Checkpointer(folder)
            except ValueError as error:
                assert "process 1 makes a Checkpointer alone" in str(error)
        multihost_utils.sync_global_devices("saved")
        assert (load(folder).state["host"] == odd + 2).all()
    """
    run_two_processes(textwrap.dedent(TWO_PROCESSES) + textwrap.dedent(script), tmp_path)


def test_damage_that_one_process_sees_turns_both_to_the_step_before(tmp_path: Path) -> None:
    script = """
        logging.basicConfig(level="WARNING")
        with Checkpointer(folder, together=True) as checkpointer:
            checkpointer.save(1, state(1))
            checkpointer.save(2, state(2))
            if me == 0:
                path = folder / "2" / "state" / "w" / "c.6.0"  # rows of the other process
                content = bytearray(path.read_bytes())
                content[9] ^= 1
                path.write_bytes(content)
            check(checkpointer.restore_latest(template), 1)
            assert checkpointer.steps() == [1]
            checkpointer.save(2, state(2))
            check(checkpointer.restore_latest(template), 2)
    """
    run_two_processes(textwrap.dedent(TWO_PROCESSES) + textwrap.dedent(script), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "damaged-2"]


# --- Orbax alone ------------------------------------------------------------------------------------------------------


def restored_by_orbax_alone(folder: Path) -> dict[str, Any]:
    """path -> dtype, shape and bytes, from a process that imports nothing of this package."""
    script = """
        import json, pathlib, sys
        import jax
        import orbax.checkpoint as ocp
        with ocp.CheckpointManager(pathlib.Path(sys.argv[1])) as manager:
            step = manager.latest_step()
            items = manager.restore(step)
        again = ocp.StandardCheckpointer().restore(pathlib.Path(sys.argv[1]) / str(step) / "state")
        assert jax.tree.structure(again) == jax.tree.structure(items["state"])
        leaves, _ = jax.tree_util.tree_flatten_with_path(items["state"])
        named = {
            jax.tree_util.keystr(path, simple=True, separator="/"): [str(a.dtype), a.shape, a.tobytes().hex()]
            for path, a in leaves
        }
        assert not [name for name in sys.modules if name.startswith("dualgap_jax")]
        print(json.dumps([step, items["meta"], named]))
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", textwrap.dedent(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    step, meta, named = json.loads(done.stdout)
    ours = load(folder)
    assert (step, meta) == (ours.step, ours.meta)
    return {name: (dtype, tuple(shape), bytes.fromhex(content)) for name, (dtype, shape, content) in named.items()}


def named_raw(tree: Any) -> dict[str, Any]:
    leaves_of, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): raw(leaf) for path, leaf in leaves_of}


def test_orbax_alone_restores_every_kind_of_leaf(tmp_path: Path) -> None:
    state = make_state(5)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state, {"a": [1, None]})
    assert restored_by_orbax_alone(tmp_path) == named_raw(state._replace(key=jax.random.key_data(state.key)))


@pytest.mark.parametrize("streaming", ["off", "on"])
def test_orbax_alone_restores_a_trained_network(tmp_path: Path, streaming: str) -> None:
    net = multi_branch(mlp((4,), 1), 6)
    (solution,) = train(
        net,
        binary_hinge(),
        synthetic_relu(n=64, seed=1),
        optax.sgd(0.6, momentum=0.9),
        batch_size=16,
        max_steps=10,
        check_every=5,
        streaming=streaming,
        num_solutions=1,
        checkpoints=tmp_path,
    )
    params = solution.params
    found = restored_by_orbax_alone(tmp_path / "solution_0")
    assert {n: v for n, v in found.items() if n.startswith("carry/params/")} == {
        f"carry/params/{name}": value for name, value in named_raw(params).items()
    }
    assert any(name.startswith("carry/opt_state/") for name in found)


def test_orbax_alone_restores_a_solution_of_theorem_2(tmp_path: Path) -> None:
    spec = linear_dual.LinearDualSpec(
        data=Component("random", {"d_0": 6, "d_H": 4, "n": 40, "condition": 2.0}),
        width=3,
        gamma=0.1,
        sgd=linear_dual.DescentSpec(depths=()),
    )
    _, workdir, _ = experiments.run(experiment_config("linear_dual", spec), workdir=tmp_path / "w")
    solution = linear_dual.load_solution(workdir.path)
    found = restored_by_orbax_alone(workdir.checkpoints / "solution")
    assert found == named_raw(solution._asdict())
    assert [found[f"weights/{k}"][1] for k in range(3)] == [(3, 6), (3, 3), (4, 3)]


# --- Memory -----------------------------------------------------------------------------------------------------------


def test_a_large_state_is_not_held_twice(tmp_path: Path) -> None:
    """Peak of the resident memory above what was there before, in MiB, for a state of 297 MiB."""
    script = f"""
        import json, pathlib
        import jax, jax.numpy as jnp, numpy as np
        from dualgap_jax.checkpoints import Checkpointer, load, open_slices
        folder, status = {str(tmp_path)!r}, pathlib.Path("/proc/self/status")
        def resident(field):
            return int(status.read_text().split(field + ":")[1].split()[0]) / 1024
        def grown(work):
            before = resident("VmRSS")
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
            kept = work()
            return resident("VmHWM") - before, kept
        make = jax.jit(lambda: {{"w": jnp.ones((3000, 8, 3072)), "b": jnp.ones((30_000, 140))}})
        blank = jax.eval_shape(make)
        with Checkpointer(folder, together=True) as checkpointer:
            checkpointer.save(0, {{"w": jnp.ones(3)}})
            state = jax.block_until_ready(make())
            saved, _ = grown(lambda: checkpointer.save(1, state))
        del state
        slices = open_slices(folder, {{"w": blank["w"]}})
        sliced, _ = grown(lambda: [slices.read(i, 500).clear() for i in range(0, 3000, 500)])
        restored, got = grown(lambda: jax.block_until_ready(load(folder, blank).state))
        del got
        numpy, got = grown(lambda: load(folder).state)
        print(json.dumps([saved, sliced, restored, numpy]))
    """
    done = run_python(script)
    assert done.returncode == 0, done.stderr
    saved, sliced, restored, host = json.loads(done.stdout)
    state = (3000 * 8 * 3072 + 30_000 * 140) * 4 / 2**20
    # Beside the state: compiled programs and a few blocks of 16 MiB, whatever its size.  Held twice would be 297 more.
    assert saved < 100
    assert sliced < 0.16 * state + 100  # the slice, and what is read ahead
    assert 0.5 * state < restored < state + 200
    assert host < state + 200


def tensorstore_of(folder: Path) -> Any:
    return ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}).result()


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


# --- Chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_chunks_pieces_and_slices_agree_with_the_whole(tmp_path: Path, tiny_chunks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(20, 90))
    dtypes = [np.float32, jnp.bfloat16, np.int8, np.bool_]
    want: dict[str, np.ndarray] = {}
    state: dict[str, Any] = {}
    for k in range(6):
        shape = (rows, *(int(n) for n in rng.integers(1, 9, rng.integers(0, 3))))
        want[f"w{k}"] = rng.integers(-9, 9, shape).astype(dtypes[k % 4])
        cuts = [0, *sorted(int(c) for c in rng.integers(0, rows + 1, 3)), rows]
        pieces = [want[f"w{k}"][a:b] for a, b in itertools.pairwise(cuts)]
        pieces = [jnp.asarray(p) if rng.random() < 0.5 else p for p in pieces]
        state[f"w{k}"] = [want[f"w{k}"], jnp.asarray(want[f"w{k}"]), Pieces(pieces)][int(rng.integers(3))]
    state["strided"] = np.asfortranarray(rng.normal(size=(rows, 40)))[:, ::2]
    want["strided"] = state["strided"]
    keys = jax.random.split(jax.random.key(seed), rows)
    state["keys"] = Pieces([keys[:7], keys[7:]])
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    loaded = load(tmp_path).state
    for name, values in want.items():
        assert raw(loaded[name]) == raw(values)
    template = {name: Struct(values.shape, values.dtype) for name, values in want.items() if name != "strided"}
    template["keys"] = Struct(keys.shape, keys.dtype)
    restored = load(tmp_path, template | {"strided": want["strided"]}).state
    for name in want:
        assert raw(restored[name]) == raw(want[name])
    assert raw(restored["keys"]) == raw(keys)
    # Every chunk is a file of its own of whole rows, that TensorStore reads and sha256sum checks.
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    for name, values in want.items():
        leaf = manifest["leaves"][name]
        store = tensorstore_of(tmp_path / "1" / "state" / name)
        assert raw(store.read().result()) == raw(values)
        assert store.chunk_layout.read_chunk.shape[1:] == values.shape[1:]
        assert store.chunk_layout.read_chunk.shape[0] * values[:1].nbytes <= max(tiny_chunks, values[:1].nbytes)
        assert len(leaf["chunks"]) == -(-rows // store.chunk_layout.read_chunk.shape[0])
        for path in leaf["chunks"]:
            content = (tmp_path / "1" / path).read_bytes()
            assert manifest["files"][path] == [len(content), hashlib.sha256(content).hexdigest()]
    # Slices, in any order, of a part of the tree.
    part = {name: template[name] for name in ("w0", "w3", "keys")}
    slices = open_slices(tmp_path, part)
    assert (slices.step, slices.meta, slices.num_rows) == (1, {}, rows)
    for _ in range(20):
        first = int(rng.integers(0, rows + 1))
        count = int(rng.integers(0, rows - first + 1))
        got = slices.read(first, count)
        for name in ("w0", "w3"):
            assert raw(got[name]) == raw(want[name][first : first + count])
        assert raw(got["keys"]) == raw(keys[first : first + count])
    everything = open_slices(tmp_path).read(3, 5)
    assert raw(everything["strided"]) == raw(want["strided"][3:8])
    for first, count in ((0, rows + 1), (-1, 2), (rows, 1), (0, -1)):
        with pytest.raises(ValueError, match=f"has {rows} rows"):
            slices.read(first, count)


@pytest.mark.usefixtures("tiny_chunks")
def test_a_restored_leaf_of_many_chunks_can_be_donated(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(100, 30)).astype(np.float32)
    state = {"many": jnp.asarray(values) + 0, "one": jnp.asarray(values[:2]) + 0}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    assert_same(load(tmp_path, state).state, state)  # which leaves views of NumPy's in the arrays
    for _ in range(10):  # whatever the alignment of the memory that NumPy happens to read into
        restored = load(tmp_path, jax.eval_shape(lambda: state)).state
        for name in state:
            assert not restored[name].committed
            assert donated_in_place(restored[name])


@pytest.mark.usefixtures("tiny_chunks", "x64")
def test_rows_of_an_accelerator_are_fetched_chunk_by_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaves, "_IN_HOST_MEMORY", set())  # as if NumPy could not view what is on this device
    fetched: list[int] = []
    take = leaves._take_rows

    def counted(array: jax.Array, first: int, count: int) -> jax.Array:
        fetched.append(count)
        return take(array, first, count)

    monkeypatch.setattr(leaves, "_take_rows", counted)
    values = np.random.default_rng(0).normal(size=(50, 4))
    state = {"w": jnp.asarray(values), "k": jax.random.key(0), "n": jnp.asarray(2.5)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    assert_same(load(tmp_path, blank(state)).state, state)
    assert sorted(fetched) == [2, 2] + [8] * 6  # the last two rows, the key's data, and blocks of 8 rows


@pytest.mark.usefixtures("tiny_chunks")
def test_pieces_may_end_within_a_chunk_and_a_row_may_be_larger_than_a_chunk(tmp_path: Path) -> None:
    values = np.arange(7 * 100, dtype=np.float32).reshape(7, 100)
    narrow = np.arange(100, dtype=np.float32)
    state = {
        "wide": values,
        "p": Pieces([narrow[:70], narrow[70:70], narrow[70:]]),
        "turned": Pieces([narrow[70:], narrow[:70]], firsts=[70, 0], num_rows=100),
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    leaves = json.loads((tmp_path / "1" / "manifest.json").read_text())["leaves"]
    assert [leaves[name]["rows_in_chunk"] for name in ("wide", "p")] == [1, 50]
    assert [len(leaves[name]["chunks"]) for name in ("wide", "p")] == [7, 2]
    assert leaves["p"]["shape"] == [100]
    loaded = load(tmp_path).state
    assert raw(loaded["wide"]) == raw(values)
    assert raw(loaded["p"]) == raw(narrow) == raw(loaded["turned"])


@pytest.mark.usefixtures("tiny_chunks")
def test_only_the_chunks_asked_for_are_read_and_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"a": np.arange(640, dtype=np.float32).reshape(160, 4), "b": np.arange(160, dtype=np.float32)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, values)
    opened: list[str] = []
    load_chunk = Stored._load

    def counted(self: Stored, chunk: int, out: np.ndarray) -> np.ndarray:
        opened.append(f"{self.name}{chunk}")
        return load_chunk(self, chunk, out)

    monkeypatch.setattr(Stored, "_load", counted)
    slices = open_slices(tmp_path)
    assert opened == []
    slices.read(33, 10)  # chunks of 16 and 54 rows
    assert sorted(opened) == ["a2", "b0"]
    opened.clear()
    slices = open_slices(tmp_path)
    for first in range(0, 160, 11):
        got = slices.read(first, min(11, 160 - first))
        np.testing.assert_array_equal(got["a"], values["a"][first : first + 11])
        np.testing.assert_array_equal(got["b"], values["b"][first : first + 11])
    assert sorted(opened) == [f"a{k}" for k in range(10)] + [f"b{k}" for k in range(3)]


@pytest.mark.usefixtures("tiny_chunks")
def test_a_damaged_chunk_shows_where_it_is_read_and_nowhere_else(tmp_path: Path) -> None:
    values = [np.arange(160, dtype=np.float32) + k for k in range(3)]
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        for step, w in enumerate(values):
            checkpointer.save(step, {"w": w})
        for step in (1, 2):
            flip_byte(tmp_path / str(step) / "state" / "w" / "c.1")
        slices = open_slices(tmp_path)
        assert slices.step == 2
        np.testing.assert_array_equal(slices.read(0, 54)["w"], values[2][:54])
        np.testing.assert_array_equal(slices.read(108, 52)["w"], values[2][108:])
        for first, count in ((53, 2), (54, 54), (0, 160), (107, 1)):
            with pytest.raises(DamagedCheckpointError, match=r"'w': c\.1 does not agree with its digest"):
                slices.read(first, count)

        def place(leaf: Any, stored: Stored) -> Any:
            parts = [stored.read(first, 40) for first in range(0, stored.shape[0], 40)]
            assert (stored.name, stored.shape, stored.dtype) == ("w", (160,), np.float32)
            return leaf, parts

        restored = checkpointer.restore_latest({"w": values[0]}, place)
        assert restored is not None
        assert restored.step == 0
        leaf, parts = restored.state["w"]
        assert leaf is values[0]
        np.testing.assert_array_equal(np.concatenate(parts), values[0])
        assert checkpointer.steps() == [0]
        assert [p.name for p in sorted(tmp_path.glob("damaged*"))] == ["damaged-1", "damaged-2"]
        (tmp_path / "0" / "state" / "w" / "c.2").unlink()
        with pytest.raises(FileNotFoundError, match="no sound checkpoint"):
            open_slices(tmp_path)


@pytest.mark.usefixtures("tiny_chunks")
@pytest.mark.parametrize("leaf", [Struct((160,), np.float32), np.zeros(160, np.float32)])
def test_what_was_read_of_a_damaged_step_is_let_go(tmp_path: Path, leaf: Any) -> None:
    values = np.arange(160, dtype=np.float32)
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"a": values, "b": values})
    flip_byte(tmp_path / "2" / "state" / "b" / "c.1")
    seen: list[weakref.ref[Stored]] = []

    def place(leaf: Any, stored: Stored) -> Any:
        if stored.name == "a":  # the first of a step; who holds the leaf under way in the step before holds this too
            until = time.monotonic() + 10  # a thread that reads ahead may be at its last lines
            while any(before() is not None for before in seen) and time.monotonic() < until:
                time.sleep(0.01)
            assert all(before() is None for before in seen)
        seen.append(weakref.ref(stored))
        return like_template(leaf, stored)

    gc.disable()  # only the last reference frees
    try:
        assert load(tmp_path, {"a": leaf, "b": leaf}, place).step == 1
    finally:
        gc.enable()
    assert len(seen) == 4


def test_place_may_leave_leaves_to_the_default(tmp_path: Path) -> None:
    state = make_state(3)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    seen: list[str] = []

    def place(leaf: Any, stored: Stored) -> Any:
        seen.append(stored.name)
        return like_template(leaf, stored)

    assert_same(load(tmp_path, blank(state), place).state, state)
    assert "params/hidden/kernel" in seen


def test_slices_need_one_leading_axis_and_the_same_leaves(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"a": np.ones((4, 2)), "b": np.ones((3, 2)), "n": 1})
    for template in (None, {"a": np.ones((4, 2)), "b": np.ones((3, 2))}, {"n": 1}, {}):
        with pytest.raises(ValueError, match="lead with the same axis"):
            open_slices(tmp_path, template)
    with pytest.raises(CheckpointMismatchError, match=r"a: float64\[4, 2\] saved, float64\[5, 2\]"):
        open_slices(tmp_path, {"a": np.ones((5, 2))})
    with pytest.raises(CheckpointMismatchError, match="c: in the template only"):
        open_slices(tmp_path, {"c": np.ones((4, 2))})
    with pytest.raises(FileNotFoundError, match="not a folder"):
        open_slices(tmp_path / "missing")


@pytest.mark.usefixtures("tiny_chunks")
def test_the_branches_of_a_training_checkpoint(tmp_path: Path) -> None:
    class Training(NamedTuple):
        params: Any
        state: Any
        opt_state: Any

    rng = np.random.default_rng(0)
    params = {"layers": [jnp.asarray(rng.normal(size=(90, 3, 5)), jnp.float32), optax.EmptyState()]}
    state = {"mean": jnp.asarray(rng.normal(size=(90, 2)), jnp.float32)}
    carry = Training(params, state, (jax.tree.map(jnp.zeros_like, params), jnp.int32(4)))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, {"carry": carry, "keys": jax.random.key(0)}, {"status": "running"})
    branches = open_branches(tmp_path, jax.eval_shape(lambda: (params, state)))
    assert (branches.num_branches, branches.step, branches.meta) == (90, 5, {"status": "running"})

    def read_all(step: int) -> None:
        for first in range(0, 90, step):
            got = branches.read(first, min(step, 90 - first))
            want = jax.tree.map(lambda leaf, first=first: np.asarray(leaf)[first : first + step], (params, state))
            assert_same(got, want)

    with ThreadPoolExecutor(2) as pool:  # a reader beside the main thread
        for future in [pool.submit(read_all, step) for step in (7, 40)]:
            future.result()


@pytest.mark.parametrize("number", [1, 2, 4])
def test_another_format_is_refused_and_nothing_moved(tmp_path: Path, number: int) -> None:
    save_all(tmp_path, 1, 2)
    manifest = tmp_path / "2" / "manifest.json"
    if number == 4:
        save_json(manifest, load_json(manifest) | {"format": 4})
    else:  # they kept a signed record elsewhere, and no manifest
        manifest.unlink()
        record = tmp_path / "2" / ("meta/metadata" if number == 1 else "state/record.json")
        record.write_text(json.dumps({"meta": {}, "leaves": {"w": {}}, "digest": "0123"}))
    for read in (lambda: load(tmp_path), lambda: load(tmp_path, small(0)), lambda: open_slices(tmp_path)):
        with pytest.raises(CheckpointMismatchError, match=f"format {number}, and this version reads format 3; read"):
            read()
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointMismatchError, match=f"format {number}"):
        checkpointer.restore_latest(small(0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


# --- Damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_noticed_and_the_step_before_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Noise: a data file that does not compress, so that a flipped byte changes a value and not the container.
    noise = [np.random.default_rng(i).normal(size=50_000).astype(np.float32) for i in range(3)]
    with Checkpointer(tmp_path, keep=5) as checkpointer:
        for step, values in enumerate(noise):
            checkpointer.save(step, {"w": values})
        flip_byte(tmp_path / "2" / "state")
        with caplog.at_level(logging.WARNING, logger="dualgap_jax.checkpoints"):
            restored = checkpointer.restore_latest({"w": noise[0]})
        assert restored is not None
        assert restored.step == 1
        np.testing.assert_array_equal(restored.state["w"], noise[1])
        (record,) = [r for r in caplog.records if r.name == "dualgap_jax.checkpoints"]
        assert str(tmp_path / "2") in record.getMessage()
        # The damaged step is kept aside, does not count as a step, and step 2 can be saved anew.
        assert (tmp_path / "damaged-2").is_dir()
        assert checkpointer.steps() == [0, 1]
        checkpointer.save(2, {"w": noise[2]})
        again = checkpointer.restore_latest({"w": noise[0]})
    assert again is not None
    assert again.step == 2
    np.testing.assert_array_equal(again.state["w"], noise[2])


def test_chunks_of_another_step_are_noticed(tmp_path: Path) -> None:
    """Each is sound as a file, and TensorStore reads it without a word."""
    save_all(tmp_path / "c", 1, 2)
    save_all(tmp_path / "other", 77)
    (tmp_path / "other" / "77" / "state" / "w" / "c.0").replace(tmp_path / "c" / "2" / "state" / "w" / "c.0")
    assert tensorstore_of(tmp_path / "c" / "2" / "state" / "w").read().result()[0] == 77
    assert load(tmp_path / "c").step == 1


def test_a_step_under_another_number_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_all(tmp_path, 1, 2)
    (tmp_path / "1").rename(tmp_path / "3")
    assert load(tmp_path).step == 2
    assert "its files are those of step 1" in caplog.text


STEP = [
    "manifest.json",
    "_CHECKPOINT_METADATA",
    "meta/metadata",
    "state/_METADATA",
    "state/w/zarr.json",
    "state/w/c.0",
    "state/n/zarr.json",
    "state/n/c",
]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


DAMAGE: dict[str, Any] = {
    "flipped": flip_byte,
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "missing": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "unreadable": lambda path: (path.unlink(), path.symlink_to(path)),
    "of the step before": lambda path: shutil.copy(str(path).replace("/2/", "/1/"), path),
    "beside a copy": lambda path: shutil.copy(path, f"{path}.1"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("part", STEP)
def test_no_damage_to_any_file_gives_wrong_values(
    tmp_path: Path, part: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_all(tmp_path, 1, 2)
    assert set(STEP) <= {p.relative_to(tmp_path / "2").as_posix() for p in (tmp_path / "2").rglob("*")}
    before = (tmp_path / "2" / part).read_bytes()
    DAMAGE[kind](tmp_path / "2" / part)
    if kind == "of the step before" and (tmp_path / "2" / part).read_bytes() == before:
        assert load(tmp_path, small(0)).step == 2
        return
    restored = load(tmp_path, small(0))
    assert (restored.step, restored.meta) == (1, {"step": 1})
    assert_same(restored.state, small(1))
    assert f"{tmp_path / '2'} is damaged and not used: " in caplog.text
    with Checkpointer(tmp_path) as checkpointer:
        again = checkpointer.restore_latest(small(0))
        assert again is not None
        assert_same(again.state, small(1))
        assert checkpointer.steps() == [1]
    assert (tmp_path / "damaged-2").is_dir()


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_is_noticed_or_harmless(tmp_path: Path, seed: int) -> None:
    """Any byte of any file of the newest step."""
    state = make_state(seed)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
    rng = np.random.default_rng(seed)
    files = sorted(p for p in (tmp_path / "1").rglob("*") if p.is_file() and p.stat().st_size)
    for _ in range(40):
        path = files[rng.integers(len(files))]
        before = path.read_bytes()
        content = bytearray(before)
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        with pytest.raises(FileNotFoundError, match="no sound checkpoint"):
            load(tmp_path, blank(state))
        path.write_bytes(before)
    assert_same(load(tmp_path, blank(state)).state, state)


@pytest.mark.parametrize(
    "change", [('"step": 2', '"step": 3'), ('"rows_in_chunk": 1000', '"rows_in_chunk": 100'), ("{", "")]
)
def test_a_changed_manifest_is_noticed(tmp_path: Path, change: tuple[str, str]) -> None:
    save_all(tmp_path, 1, 2)
    file = tmp_path / "2" / "manifest.json"
    text = file.read_text()
    assert change[0] in text
    file.write_text(text.replace(*change, 1))
    restored = load(tmp_path, small(0))
    assert (restored.step, restored.meta) == (1, {"step": 1})


def test_an_empty_step_folder_and_foreign_files_are_passed_over(tmp_path: Path) -> None:
    save_all(tmp_path, 1, 2)
    (tmp_path / "9").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "old").mkdir()
    assert load(tmp_path).step == 2
    assert (tmp_path / "9").is_dir()  # load changes nothing
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        restored = checkpointer.restore_latest(small(0))
        assert restored is not None
        assert restored.step == 2
        # The steps after it push out the oldest sound one, not the newest.
        checkpointer.save(3, small(3))
        assert checkpointer.steps() == [2, 3]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "old").is_dir()


def test_when_all_are_damaged_there_is_nothing_to_restore(tmp_path: Path) -> None:
    save_all(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / str(step) / "manifest.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no sound checkpoint .*step 2: .*; step 1: "):
        load(tmp_path)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore_latest(small(0)) is None
        assert checkpointer.steps() == []


@pytest.mark.parametrize("moment", ["2.*tmp/**/c.1", "no manifest", "2/manifest.json"])
def test_sigkill_in_mid_save_leaves_the_step_before(tmp_path: Path, moment: str) -> None:
    """Killed when a file is there within Orbax's save, between its end and the manifest, and after that."""
    script = f"""
        import os, pathlib, signal, threading
        import numpy as np
        from dualgap_jax.checkpoints import Checkpointer, manifest
        checkpointer = Checkpointer({str(tmp_path)!r}, keep=1)
        checkpointer.save(1, {{"w": np.full(4_000_000, 1.0)}})
        if {moment!r} == "no manifest":
            manifest.save_json = lambda path, obj: os.kill(os.getpid(), signal.SIGKILL)
        def kill():
            while not list(pathlib.Path({str(tmp_path)!r}).glob({moment!r})):
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=kill).start()
        checkpointer.save(2, {{"w": np.full(4_000_000, 2.0)}})
        threading.Event().wait()
    """
    done = run_python(script)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (found := load(tmp_path)).step == (2 if moment == "2/manifest.json" else 1)
    assert (found.state["w"] == found.step).all()
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore_latest({"w": np.zeros(4_000_000)})
        assert restored is not None
        assert restored.step == found.step
        assert (restored.state["w"] == found.step).all()
        checkpointer.save(3, {"w": np.full(10, 3.0)})
    # What the killed save left is gone, or set aside if only the manifest was to come.
    aside = ["damaged-2"] if moment == "no manifest" else []
    assert sorted(p.name for p in tmp_path.iterdir()) == [str(found.step), "3", *aside]
    np.testing.assert_array_equal(load(tmp_path).state["w"], np.full(10, 3.0))


@pytest.mark.parametrize("seed", range(3))
def test_sigkill_at_a_random_moment_leaves_the_newest_complete_step(tmp_path: Path, seed: int) -> None:
    script = f"""
        import numpy as np
        from dualgap_jax.checkpoints import Checkpointer
        with Checkpointer({str(tmp_path)!r}) as checkpointer:
            for step in range(1, 10_000):
                checkpointer.save(step, {{"w": np.full(400_000, float(step)), "n": step}}, {{"step": step}})
                print(step, flush=True)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        time.sleep(float(np.random.default_rng(seed).uniform(0, 0.3)))
        process.kill()
        said = [1, *(int(line) for line in process.stdout if line.endswith("\n"))]
    for restored in (load(tmp_path), load(tmp_path, {"w": np.zeros(400_000), "n": 0})):
        assert restored.step in (said[-1], said[-1] + 1)
        assert restored.meta == {"step": restored.step}
        assert restored.state["n"] == restored.step
        assert (restored.state["w"] == restored.step).all()


def test_a_write_error_is_raised_and_the_step_can_be_saved_again(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, small(1))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # files of at most 1 MiB
        with pytest.raises(OSError, match=r"(?i)too large"):
            checkpointer.save(2, {"w": np.ones(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    restored = load(tmp_path, small(0))
    assert restored.step == 1
    assert_same(restored.state, small(1))
    checkpointer.save(2, small(2))
    checkpointer.close()
    assert_same(load(tmp_path, small(0)).state, small(2))


# --- Other templates --------------------------------------------------------------------------------------------------

COUNT = Struct((), np.int32)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"w": Struct((1000,), jnp.bfloat16), "n": COUNT}, r"w: float32\[1000\] saved, bfloat16\[1000\]"),
        ({"w": np.zeros(1000), "n": COUNT}, r"w: float32\[1000\] saved, float64\[1000\]"),
        ({"w": Struct((1000, 1), np.float32), "n": COUNT}, r"float32\[1000, 1\] in the template"),
        ({"w": Struct((1000,), np.float32)}, "n: in the checkpoint only"),
        ({"w": Struct((1000,), np.float32), "n": COUNT, "m": 0}, "m: in the template only"),
        ({"w": {"w": Struct((1000,), np.float32)}, "n": COUNT}, "w/w: in the template only"),
        ({"w": Struct((1000,), np.float32), "n": 0}, r"n: int32\[\] saved, int64\[\]"),
    ],
)
def test_another_template_is_refused_and_nothing_moved(tmp_path: Path, template: Any, message: str) -> None:
    save_all(tmp_path, 1, 2)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointMismatchError, match=message):
            checkpointer.restore_latest(template)
        assert checkpointer.steps() == [1, 2]
    with pytest.raises(CheckpointMismatchError, match=message):
        load(tmp_path, template)


def test_double_precision_is_not_halved_silently(tmp_path: Path) -> None:
    template = {"w": jax.ShapeDtypeStruct((4,), np.float64)}
    values = np.random.default_rng(0).normal(size=4)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": values})
        with pytest.raises(CheckpointMismatchError, match="JAX_ENABLE_X64"):
            checkpointer.restore_latest(template)
        with jax.enable_x64(True):
            restored = checkpointer.restore_latest(template)
    assert restored is not None
    assert raw(restored.state["w"]) == raw(values)


# --- Steps ------------------------------------------------------------------------------------------------------------


def test_only_the_newest_steps_are_kept(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (1, 5, 20, 100):
            checkpointer.save(step, small(step))
        assert checkpointer.steps() == [20, 100]
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(101, small(101))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["101"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small(1), {"a": 1})
        for state, meta in ((small(2), {"a": 1}), (small(2), {"a": 2}), ({"other": np.ones((3, 2))}, {})):
            checkpointer.save(1, state, meta)
            restored = checkpointer.restore_latest(blank(state))
            assert restored is not None
            assert (restored.step, restored.meta) == (1, meta)
            assert_same(restored.state, state)
        for part in ("manifest.json", "state/other/c.0.0"):  # which mends a damaged step
            flip_byte(tmp_path / "1" / part)
            checkpointer.save(1, state, {"a": 2})
            assert checkpointer.restore_latest(blank(state)) is not None
            assert checkpointer.steps() == [1]


def test_an_empty_folder_has_nothing(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "deep" / "new") as checkpointer:
        assert checkpointer.steps() == []
        assert checkpointer.restore_latest(small(0)) is None
    with pytest.raises(FileNotFoundError, match="no step was saved"):
        load(tmp_path / "deep" / "new")
    with pytest.raises(FileNotFoundError, match="not a folder"):
        load(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_a_step_deleted_by_hand_is_no_step(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, small(step))
        shutil.rmtree(tmp_path / "2")
        restored = checkpointer.restore_latest(small(0))
        assert restored is not None
        assert restored.step == 1
        assert checkpointer.steps() == [1]


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_all(Path("here"), 3)
    assert load("here").step == 3
    assert (tmp_path / "here" / "3").is_dir()


@pytest.mark.parametrize(
    ("state", "meta", "error", "message"),
    [
        ({"w": "text"}, {}, TypeError, "leaf 'w' is a str"),
        ({"w": np.array([object()])}, {}, TypeError, "leaf 'w' is a ndarray"),
        ({"w": 1 << 70}, {}, TypeError, "leaf 'w' is a int"),
        (jnp.zeros(3), {}, ValueError, "single leaf"),
        ({"w": None}, {}, ValueError, "no leaves"),
        ({"a": {"b": 1}, "a/b": 2}, {}, ValueError, "two leaves .* 'a/b'"),
        ({"w": 1}, {"x": [{1, 2}]}, TypeError, r"meta\.x\[0\] is a set"),
        ({"w": Pieces([np.ones((2, 3)), np.ones((2, 4))])}, {}, ValueError, "'w': pieces .* do not fit together"),
        ({"w": Pieces([np.ones(2), np.ones(2, np.int8)])}, {}, ValueError, "'w': pieces .* do not fit together"),
        ({"w": Pieces([])}, {}, ValueError, "'w': pieces .* do not fit together"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path: Path, state: Any, meta: Any, error: type, message: str) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(error, match=message):
            checkpointer.save(1, state, meta)
        assert checkpointer.steps() == []


def test_bad_steps_and_keeps_are_refused(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="step is -1"):
            checkpointer.save(-1, small(0))
        with pytest.raises(TypeError):
            checkpointer.save(1.5, small(0))  # type: ignore[arg-type]
        checkpointer.save(np.int32(7), small(0))
        assert checkpointer.steps() == [7]
    for keep in (0, -1):
        with pytest.raises(ValueError, match="keep is"):
            Checkpointer(tmp_path, keep=keep)


# --- The benchmark ----------------------------------------------------------------------------------------------------


def test_the_benchmark_runs_at_a_tiny_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("benchmark_checkpoints", ROOT / "benchmarks" / "checkpoints.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "files").mkdir()
    module.main(["--smoke", "--json", str(tmp_path / "results.json"), "--folder", str(tmp_path / "files")])
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["bytes"] == 4 * 20 * (3072 * 8 + 8 + 2 * (8 * 8 + 8) + 8 * 10 + 10)
    for name in ("save_mb_s", "write_mb_s", "restore_mb_s", "slices_mb_s", "digest_mb_s", "of_write"):
        assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
    assert "I=20" in capsys.readouterr().out
    assert list((tmp_path / "files").iterdir()) == []
