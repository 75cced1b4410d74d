"""Checkpoints: what is saved comes back bit by bit, and nothing else ever does."""

from __future__ import annotations

import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dualgap_jax.checkpoints import Checkpointer, CheckpointMismatchError, load

ROOT = Path(__file__).resolve().parents[1]


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


def small(value: float) -> dict[str, jax.Array]:
    return {"w": jnp.full(1000, float(value)), "n": jnp.asarray(int(value))}


def save_all(path: Path, *steps: int, keep: int = 5) -> None:
    with Checkpointer(path, keep=keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, small(step), {"step": step})


def flip_byte(folder: Path) -> None:
    """Flips one bit in the middle of the largest file below `folder`."""
    file = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
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


def test_buffers_may_be_changed_and_donated_while_the_save_is_under_way(tmp_path: Path) -> None:
    host = np.arange(2_000_000, dtype=np.float32)
    state = {"host": host, "device": jnp.asarray(host) + 1}
    want = {name: np.array(value) for name, value in state.items()}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        host[:] = -1
        jax.jit(lambda x: x * 0, donate_argnums=0)(state["device"]).block_until_ready()
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


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


# --- Damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_noticed_and_the_step_before_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Noise: a data file that does not compress, so that a flipped byte changes a value and not the container.
    noise = [np.random.default_rng(i).normal(size=50_000).astype(np.float32) for i in range(3)]
    with Checkpointer(tmp_path, keep=5) as checkpointer:
        for step, values in enumerate(noise):
            checkpointer.save(step, {"w": values})
        WAIT
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
    """Step 2 gets the data files of another checkpoint: Orbax reads them without complaint, the digests do not."""
    save_all(tmp_path / "c", 1, 2)
    with Checkpointer(tmp_path / "other") as other:
        other.save(2, small(77.0))
    (tmp_path / "c" / "2" / "state").rename(tmp_path / "unused")
    (tmp_path / "other" / "2" / "state").rename(tmp_path / "c" / "2" / "state")
    assert load(tmp_path / "c").step == 1


@pytest.mark.parametrize("change", [('"step": 2', '"step": 3'), ('"shape": [1000]', '"shape": [100]'), ("{", "")])
def test_changed_meta_is_noticed(tmp_path: Path, change: tuple[str, str]) -> None:
    save_all(tmp_path, 1, 2)
    file = tmp_path / "2" / "meta" / "metadata"
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
        WAIT
        assert checkpointer.steps() == [2, 3]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "old").is_dir()


@pytest.mark.parametrize("part", ["state", "meta", "_CHECKPOINT_METADATA"])
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
        (tmp_path / str(step) / "meta" / "metadata").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no sound checkpoint .*step 2: .*; step 1: "):
        load(tmp_path)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore_latest(small(0)) is None
        assert checkpointer.steps() == []


def test_sigkill_in_mid_save_leaves_the_step_before(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        import numpy as np
        from dualgap_jax.checkpoints import Checkpointer
        checkpointer = Checkpointer({str(tmp_path)!r})
        checkpointer.save(1, {{"w": np.full(10, 1.0)}})
        WAIT
        big = np.random.default_rng(0).normal(size=12_000_000)
        checkpointer.save(2, {{"w": big}})
        os.kill(os.getpid(), signal.SIGKILL)
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


def test_a_write_error_in_the_background_surfaces_at_wait(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, small(1))
    WAIT
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # files of at most 1 MiB
        checkpointer.save(2, {"w": np.random.default_rng(0).normal(size=1_000_000)})
        with pytest.raises(Exception, match=r"(?i)too large"):
            WAIT
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpointer.close()
    restored = load(tmp_path, small(0))
    assert restored.step == 1
    assert_same(restored.state, small(1))


# --- Other templates --------------------------------------------------------------------------------------------------

Struct = jax.ShapeDtypeStruct
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
        WAIT
        assert checkpointer.steps() == [20, 100]
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(101, small(101))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["101"]


def test_saving_a_step_again_replaces_it_or_changes_nothing(tmp_path: Path) -> None:
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small(1), {"a": 1})
        WAIT
        written = (tmp_path / "1" / "meta" / "metadata").stat().st_mtime_ns
        checkpointer.save(1, small(1), {"a": 1})
        WAIT
        assert (tmp_path / "1" / "meta" / "metadata").stat().st_mtime_ns == written
        for state, meta in ((small(2), {"a": 1}), (small(2), {"a": 2})):
            checkpointer.save(1, state, meta)
            restored = checkpointer.restore_latest(small(0))
            assert restored is not None
            assert (restored.step, restored.meta) == (1, meta)
            assert_same(restored.state, state)
        WAIT
        for part in ("meta", "state"):  # the same values again mend a damaged step
            flip_byte(tmp_path / "1" / part)
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
        WAIT
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
        WAIT
        assert checkpointer.steps() == [7]
    for keep in (0, -1):
        with pytest.raises(ValueError, match="keep is"):
            Checkpointer(tmp_path, keep=keep)
