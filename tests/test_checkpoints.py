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
import socket
import subprocess
import sys
import textwrap
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dualgap_jax.checkpoints import (
    Checkpointer,
    CheckpointMismatchError,
    DamagedCheckpointError,
    Pieces,
    Stored,
    files,
    leaves,
    like_template,
    load,
    open_branches,
    open_slices,
)

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
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of at most 256 bytes."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 256)
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


def test_names_that_differ_only_in_separators_do_not_mix(tmp_path: Path) -> None:
    state = {"a.b": np.ones(3), "a": {"b": np.full(3, 2.0)}, "": np.full(3, 3.0), "a b/": np.full(3, 4.0)}
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
        from dualgap_jax.checkpoints import Checkpointer, Pieces, files
        files.BLOCK_BYTES = 256
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
            back = checkpointer.restore_latest({{"w": values, "p": pieces}}).state["p"]
            assert isinstance(back, Pieces) and isinstance(back.arrays[1], np.ndarray)
            assert [a.device for a in (back.arrays[0], back.arrays[2])] == [devices[1], devices[2]]
            assert (np.concatenate(back.arrays) == values).all()
            print("same")
    """
    done = run_python(script)
    assert done.stdout == "same\n", done.stderr


def test_two_processes_one_saves_and_both_load(tmp_path: Path) -> None:
    script = f"""
        import sys
        import jax, numpy as np
        jax.distributed.initialize("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=30)
        from jax.experimental import multihost_utils
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from dualgap_jax.checkpoints import Checkpointer, files, load, open_slices
        files.BLOCK_BYTES = 256
        values = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
        keys = jax.random.split(jax.random.key(3), 50)
        if jax.process_index() == 0:
            with Checkpointer({str(tmp_path / "c")!r}) as checkpointer:  # the other process takes no part
                for step in range(4):
                    checkpointer.save(step, {{"w": values + step, "k": keys}})
                checkpointer.save(3, {{"w": values, "k": keys}})
                assert checkpointer.restore_latest({{"w": values, "k": keys}}).step == 3
        else:
            try:
                Checkpointer({str(tmp_path / "c")!r})
            except ValueError as error:
                assert "process 1 makes a Checkpointer" in str(error)
        multihost_utils.sync_global_devices("saved")
        sharding = NamedSharding(Mesh(np.array(jax.devices()), ("branch",)), P("branch"))
        template = {{
            "w": jax.ShapeDtypeStruct((50, 8), np.float32, sharding=sharding),
            "k": jax.ShapeDtypeStruct((50,), keys.dtype, sharding=sharding),
        }}
        got = load({str(tmp_path / "c")!r}, template)
        assert got.step == 3 and got.state["w"].sharding == sharding
        mine = slice(25 * jax.process_index(), 25 * jax.process_index() + 25)
        assert (np.asarray(got.state["w"].addressable_data(0)) == values[mine]).all()
        got_keys = jax.random.key_data(got.state["k"].addressable_data(0))
        assert (got_keys == jax.random.key_data(keys)[mine]).all()
        assert (open_slices({str(tmp_path / "c")!r}).read(24, 3)["w"] == values[24:27]).all()
        multihost_utils.sync_global_devices("loaded")
        print("same")
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", textwrap.dedent(script), port]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, str(i)], env=environment, **pipes) for i in range(2)]
    try:
        ended = [process.communicate(timeout=90) for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    for process, (out, err) in zip(both, ended, strict=True):
        assert process.returncode == 0, err
        assert out.endswith("same\n")


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
        with Checkpointer(folder) as checkpointer:
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


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


# --- Blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_blocks_pieces_and_slices_agree_with_the_whole(tmp_path: Path, tiny_blocks: int, seed: int) -> None:
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
    # Every block is a file of its own, no larger than allowed, that others can read and check.
    record = json.loads((tmp_path / "1" / "state" / "record.json").read_text())
    for name, values in want.items():
        leaf = record["leaves"][name]
        first = 0
        for number, (count, digest) in enumerate(leaf["blocks"]):
            file = tmp_path / "1" / "state" / f"{leaf['file']}-{number:05d}.npy"
            block = np.load(file)
            assert block.nbytes <= max(tiny_blocks, values[:1].nbytes)
            assert block.tobytes() == values[first : first + count].tobytes()
            assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
            first += count
        assert first == rows
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


@pytest.mark.usefixtures("tiny_blocks")
def test_a_restored_leaf_of_many_blocks_can_be_donated(tmp_path: Path) -> None:
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


@pytest.mark.usefixtures("tiny_blocks", "x64")
def test_rows_of_an_accelerator_are_fetched_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.usefixtures("tiny_blocks")
def test_blocks_do_not_straddle_pieces_and_a_row_may_be_larger_than_a_block(tmp_path: Path) -> None:
    values = np.arange(7 * 100, dtype=np.float32).reshape(7, 100)
    narrow = np.arange(100, dtype=np.float32)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"wide": values, "p": Pieces([narrow[:70], narrow[70:70], narrow[70:]])})
    record = json.loads((tmp_path / "1" / "state" / "record.json").read_text())["leaves"]
    assert [count for count, _ in record["wide"]["blocks"]] == [1] * 7
    assert [count for count, _ in record["p"]["blocks"]] == [64, 6, 30]
    assert record["p"]["shape"] == [100]
    assert raw(load(tmp_path).state["wide"]) == raw(values)


@pytest.mark.usefixtures("tiny_blocks")
def test_only_the_blocks_asked_for_are_read_and_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"a": np.arange(640, dtype=np.float32).reshape(160, 4), "b": np.arange(160, dtype=np.float32)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, values)
    opened: list[str] = []
    load_block = Stored._load

    def counted(self: Stored, block: Any, out: np.ndarray | None = None) -> np.ndarray:
        opened.append(block.path.name)
        return load_block(self, block, out)

    monkeypatch.setattr(Stored, "_load", counted)
    slices = open_slices(tmp_path)
    assert opened == []
    slices.read(33, 10)  # blocks of 16 and 64 rows
    assert sorted(opened) == ["0000-00002.npy", "0001-00000.npy"]
    opened.clear()
    slices = open_slices(tmp_path)
    for first in range(0, 160, 11):
        got = slices.read(first, min(11, 160 - first))
        np.testing.assert_array_equal(got["a"], values["a"][first : first + 11])
        np.testing.assert_array_equal(got["b"], values["b"][first : first + 11])
    assert sorted(opened) == [f"0000-{k:05d}.npy" for k in range(10)] + [f"0001-{k:05d}.npy" for k in range(3)]


@pytest.mark.usefixtures("tiny_blocks")
def test_a_damaged_block_shows_where_it_is_read_and_nowhere_else(tmp_path: Path) -> None:
    values = [np.arange(160, dtype=np.float32) + k for k in range(3)]
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        for step, w in enumerate(values):
            checkpointer.save(step, {"w": w})
        for step in (1, 2):
            flip_byte(tmp_path / str(step) / "state" / "0000-00001.npy")
        slices = open_slices(tmp_path)
        assert slices.step == 2
        np.testing.assert_array_equal(slices.read(0, 64)["w"], values[2][:64])
        np.testing.assert_array_equal(slices.read(128, 32)["w"], values[2][128:])
        for first, count in ((63, 2), (64, 64), (0, 160), (127, 1)):
            with pytest.raises(DamagedCheckpointError, match=r"'w': 0000-00001\.npy does not agree with its digest"):
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
        (tmp_path / "0" / "state" / "0000-00002.npy").unlink()
        with pytest.raises(FileNotFoundError, match="no sound checkpoint"):
            open_slices(tmp_path)


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize("leaf", [Struct((160,), np.float32), np.zeros(160, np.float32)])
def test_what_was_read_of_a_damaged_step_is_let_go(tmp_path: Path, leaf: Any) -> None:
    values = np.arange(160, dtype=np.float32)
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"a": values, "b": values})
    flip_byte(tmp_path / "2" / "state" / "0001-00001.npy")
    seen: list[weakref.ref[Stored]] = []

    def place(leaf: Any, stored: Stored) -> Any:
        if stored.name == "a":  # the first of a step; who holds the leaf under way in the step before holds this too
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


@pytest.mark.usefixtures("tiny_blocks")
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


def test_another_format_is_refused_and_nothing_moved(tmp_path: Path) -> None:
    save_all(tmp_path, 1, 2)
    path = tmp_path / "2" / "state" / "record.json"
    record = json.loads(path.read_text())

    def signed(document: dict[str, Any]) -> str:
        text = json.dumps(document, sort_keys=True).encode()
        return json.dumps(document | {"digest": hashlib.blake2b(text, digest_size=16).hexdigest()})

    def refused(number: int) -> None:
        for read in (lambda: load(tmp_path), lambda: load(tmp_path, small(0)), lambda: open_slices(tmp_path)):
            with pytest.raises(CheckpointMismatchError, match=f"format {number}, and this version reads format 2"):
                read()
        with Checkpointer(tmp_path) as checkpointer:
            with pytest.raises(CheckpointMismatchError, match=f"format {number}"):
                checkpointer.restore_latest(small(0))
            assert checkpointer.steps() == [1, 2]

    path.write_text(signed({"format": 3, "meta": record["meta"], "leaves": {"other": "things"}}))
    refused(3)
    # Format 1 kept its record in another place, and the values where this one does not look.
    path.unlink()
    (tmp_path / "2" / "meta").mkdir()
    (tmp_path / "2" / "meta" / "metadata").write_text(signed({"meta": record["meta"], "leaves": {"w": {}}}))
    refused(1)
    flip_byte(tmp_path / "2" / "meta" / "metadata")
    assert load(tmp_path).step == 1


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


def test_values_changed_behind_sound_containers_are_noticed(tmp_path: Path) -> None:
    """Step 2 gets the blocks of another checkpoint, with the same shapes: as files they are sound."""
    save_all(tmp_path / "c", 1, 2)
    save_all(tmp_path / "other", 77)
    for block in (tmp_path / "other" / "77" / "state").glob("*.npy"):
        block.replace(tmp_path / "c" / "2" / "state" / block.name)
    assert load(tmp_path / "c").step == 1


@pytest.mark.parametrize("change", [('"step": 2', '"step": 3'), ('"shape": [1000]', '"shape": [100]'), ("{", "")])
def test_changed_meta_is_noticed(tmp_path: Path, change: tuple[str, str]) -> None:
    save_all(tmp_path, 1, 2)
    file = tmp_path / "2" / "state" / "record.json"
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


@pytest.mark.parametrize("part", ["state", "state/record.json", "state/0000-00000.npy", "_CHECKPOINT_METADATA"])
def test_a_missing_part_never_gives_wrong_values(tmp_path: Path, part: str) -> None:
    save_all(tmp_path, 1, 2)
    (tmp_path / "2" / part).rename(tmp_path / "elsewhere")
    restored = load(tmp_path, small(0))
    assert_same(restored.state, small(restored.step))
    if part != "_CHECKPOINT_METADATA":
        assert restored.step == 1


def test_when_all_are_damaged_there_is_nothing_to_restore(tmp_path: Path) -> None:
    save_all(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / str(step) / "state" / "record.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no sound checkpoint .*step 2: .*; step 1: "):
        load(tmp_path)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore_latest(small(0)) is None
        assert checkpointer.steps() == []


def test_sigkill_in_mid_save_leaves_the_step_before(tmp_path: Path) -> None:
    script = f"""
        import os, pathlib, signal, threading
        import numpy as np
        from dualgap_jax.checkpoints import Checkpointer
        checkpointer = Checkpointer({str(tmp_path)!r})
        checkpointer.save(1, {{"w": np.full(10, 1.0)}})
        def kill():
            while not list(pathlib.Path({str(tmp_path)!r}).glob("2*tmp*/**/*-00001.npy")):
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        threading.Thread(target=kill).start()
        checkpointer.save(2, {{"w": np.ones(12_000_000)}})
    """
    done = run_python(script)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list(tmp_path.glob("2*tmp")), "the save was over before the kill: make the array bigger"
    assert load(tmp_path).step == 1
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore_latest({"w": np.zeros(10)})
        assert restored is not None
        assert restored.step == 1
        np.testing.assert_array_equal(restored.state["w"], np.full(10, 1.0))
        checkpointer.save(3, {"w": np.full(10, 3.0)})
    # What the killed save left is gone, and nothing was taken for damaged.
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["1", "3"]
    np.testing.assert_array_equal(load(tmp_path).state["w"], np.full(10, 3.0))


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


def test_saving_a_step_again_replaces_it_or_changes_nothing(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small(1), {"a": 1})
        written = (tmp_path / "1" / "state" / "record.json").stat().st_mtime_ns
        checkpointer.save(1, small(1), {"a": 1})
        assert (tmp_path / "1" / "state" / "record.json").stat().st_mtime_ns == written
        for state, meta in ((small(2), {"a": 1}), (small(2), {"a": 2})):
            checkpointer.save(1, state, meta)
            restored = checkpointer.restore_latest(small(0))
            assert restored is not None
            assert (restored.step, restored.meta) == (1, meta)
            assert_same(restored.state, state)
        for part in ("record.json", "0000-00000.npy"):  # the same values again mend a damaged step
            flip_byte(tmp_path / "1" / "state" / part)
            checkpointer.save(1, small(2), {"a": 2})
            assert checkpointer.restore_latest(small(0)) is not None
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
        ({"a": {"b": 1}, "a/b": 2}, {}, ValueError, "two leaves .* 'a/b'"),
        ({"w": 1}, {"x": [{1, 2}]}, TypeError, "meta holds a set"),
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
