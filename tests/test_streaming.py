"""The streamed step and whoever uses it on one device: the numbers of the plain step, in the memory of a chunk."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_by_spec import sgd, train_as

from dualgap_jax.checkpoints import load
from dualgap_jax.config import Component, ConfigError
from dualgap_jax.data import Dataset, validate
from dualgap_jax.losses import binary_hinge, crammer_singer, logistic, multi_margin, squared
from dualgap_jax.networks import conv, from_functions, mixture, mlp, multi_branch
from dualgap_jax.networks.sources import InMemory
from dualgap_jax.optimizers import for_network
from dualgap_jax.sharding import Layout, MeshSpec
from dualgap_jax.training import Solution, TrainingSpec, plan, streamed
from dualgap_jax.training.branch_step import Shard, branch_step, piece_size
from dualgap_jax.training.engine import Carry, all_finite
from dualgap_jax.training.placement import Placement
from dualgap_jax.training.streamed import Streamed
from dualgap_jax.training.together import step

ROOT = Path(__file__).resolve().parents[1]

BRANCHES: dict[str, Callable[[], Any]] = {
    "mlp": lambda: mlp((3, 2), 3),
    "affine": lambda: mlp((), 3),
    "no biases": lambda: mlp((3,), 3, use_bias=False),
    "one leaf": lambda: mlp((), 3, use_bias=False),
    "conv": lambda: conv((2,), 3),
    "batch norm and dropout": lambda: conv((2,), 3, batch_norm=True, dropout=0.3),
}
CHAINS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: optax.sgd(1.0),
    "momentum": lambda: optax.sgd(1.0, 0.9, nesterov=True),
    "adam and decay": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.adam(1.0)),
    "clipped by the norm": lambda: optax.chain(optax.clip_by_global_norm(1e-2), optax.sgd(1.0, 0.5)),
}


def images(rng: np.random.Generator, n: int = 24, side: int = 4) -> Dataset:
    x = rng.integers(0, 256, (n, side, side, 2), dtype=np.uint8)
    std = np.maximum(x.std(axis=0), 1).astype(np.float32)
    y = rng.integers(0, 3, n, dtype=np.int32)
    return validate(Dataset("images", x, y, x.mean(axis=0, dtype=np.float32), std, 3, "multiclass", {}))


def spec_with(**settings: Any) -> TrainingSpec:
    defaults = {"batch_size": 8, "max_steps": 12, "learning_rate": 0.05, "check_every": 5, "lr_scaling": "none"}
    return TrainingSpec(**{**defaults, **settings})


def worst(a: Any, b: Any) -> float:
    """Largest difference of two trees, relative to the largest entry of each leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x) - y)) / (np.max(np.abs(y)) + 1e-30)) for x, y in pairs)


# --- the step -------------------------------------------------------------------------------------------------------


# Every branch with two chains, every chain with three branches: a chain sees leaves, a branch does not see the chain.
PAIRS = [
    (name, list(CHAINS)[(index + shift) % len(CHAINS)], 3) for index, name in enumerate(BRANCHES) for shift in (0, 2)
]
PAIRS += [("mlp", "adam and decay", chunk) for chunk in (1, 7, 100)] + [
    ("conv", "momentum", 1),
    ("conv", "momentum", 7),
    ("mlp", "adam and decay", 70),
    ("mlp", "momentum", 30),
]
COUNTS = {70: 131, 30: 48}  # pieces rounded up, of which the last reaches back; a divisor below the chunk


@pytest.mark.parametrize(("name", "chain", "chunk"), PAIRS)
def test_the_streamed_step_is_the_plain_one(
    name: str, chain: str, chunk: int, x64: None, rng: np.random.Generator
) -> None:
    count = COUNTS.get(chunk, 7)
    net = multi_branch(BRANCHES[name](), count, reduce=str(rng.choice(["mean", "sum"])))
    transformation = for_network(net, CHAINS[chain]())
    x = jnp.asarray(rng.normal(size=(6, 4, 4, 2)))
    y = jnp.asarray(rng.integers(0, 3, 6))
    params, state = jax.jit(net.init)(jax.random.key(int(rng.integers(1 << 30))), x)
    carry = Carry(params, state, transformation.init(params))
    loss, rate, key = multi_margin(), jnp.asarray(0.3), jax.random.key(int(rng.integers(1 << 30)))

    plain = jax.jit(lambda c, k: step(net, loss, transformation, c, x, y, rate, k))
    streamed = jax.jit(
        lambda c, k: branch_step(
            net.stacked, loss, transformation, c, x, y, rate, k, chunk=chunk, shard=Shard(0, count)
        )
    )
    expected, got = carry, carry
    for now in range(3):
        noise = jax.random.fold_in(key, now)
        (expected, value), (got, other) = plain(expected, noise), streamed(got, noise)
        assert float(other) == pytest.approx(float(value), rel=1e-12)
    assert worst(got, expected) < 1e-9  # Adam divides by roots of tiny second moments
    assert worst(got.params, carry.params) > 1e-3


def test_pieces_cover_the_slots_in_sizes_that_compilers_take_well(rng: np.random.Generator) -> None:
    for slots, chunk in [(1, 1), (1024, 5000), (128, 128), *rng.integers(1, 3000, (300, 2))]:
        size = piece_size(int(slots), int(chunk))
        assert 1 <= size <= slots
        pieces = -(-slots // size)
        assert size <= chunk + 16
        assert pieces * size - slots < size
        if chunk >= slots:
            assert size == slots
        elif size >= 64:
            assert size % 128 or size == slots
            assert size == slots or not all(size % small for small in (2, 3, 5))
        near = [d for d in range(chunk // 2 + 1, chunk + 1) if slots % d == 0]
        divisors = [d for d in near if d % 128 and not all(d % small for small in (2, 3, 5))]
        assert chunk >= slots or not divisors or size == divisors[-1]
    assert [piece_size(50_000, chunk) for chunk in (78, 1021, 1024, 1553)] == [50, 1000, 1000, 1250]
    assert piece_size(65_536, 1553) == 1528  # every divisor near it is a multiple of 128


def test_a_chunk_takes_a_share_of_an_accelerator_and_the_cache_of_a_cpu() -> None:
    assert plan.chunk_bytes(None) == 12 * 2**20
    assert plan.chunk_bytes(16 * 2**30) == 2**28
    branch, x = mlp((8, 8, 8), 10), jax.ShapeDtypeStruct((128, 3072), np.float32)
    params, state = jax.eval_shape(branch.init, jax.random.key(0), jnp.zeros((1, 3072)))
    one = Carry(params, state, ())
    sizes = [plan.branch_chunk(branch, one, x, 50_000, memory) for memory in (None, 2**34, 2**36)]
    assert sizes[0] < sizes[1] // 20
    assert sizes[2] // 4 == pytest.approx(sizes[1], abs=1)
    assert plan.branch_chunk(branch, one, x, 5, 2**34) == 5
    adam = Carry(params, state, (params, params))
    with_adam = [plan.branch_chunk(branch, adam, x, 50_000, memory) for memory in (None, 2**34)]
    assert sizes[0] / 3 <= with_adam[0] < sizes[0] / 1.5  # the moments are in the cache, too
    assert with_adam[1] == sizes[1]


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "count", "chunk", "chain"),
    [(n, *size, c) for c in CHAINS for n, size in (("mlp", (390, 30)), ("conv", (401, 37)))]
    + [("mlp", 401, 37, "adam and decay"), ("conv", 390, 30, "clipped by the norm")],
)
def test_the_compiled_step_keeps_pre_activations_no_gradient_and_copies_nothing(
    name: str, count: int, chunk: int, chain: str, rng: np.random.Generator
) -> None:
    """Twice the branches take more memory by the kept pre-activations and nothing else; 37 leaves a rest."""
    assert piece_size(count, chunk) == piece_size(2 * count, chunk) == chunk
    dataset = images(rng, n=64, side=8)
    branch = {"mlp": mlp((4, 5), 3), "conv": conv((4,), 3)}[name]

    def compiled(num_branches: int) -> Streamed:
        net = multi_branch(branch, num_branches)
        return Streamed(net, multi_margin(), for_network(net, CHAINS[chain]()), dataset, 16, chunk=chunk)

    def temporaries(solver: Streamed) -> int:
        return int(solver.compiled.memory_analysis().temp_size_in_bytes)

    small, large = compiled(count), compiled(2 * count)
    x = jax.ShapeDtypeStruct((16, 8, 8, 2), np.float32)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), small.shapes.params)
    kept = jax.eval_shape(branch.stem.preactivation, one, x).size if branch.stem is not None else 0
    grown = temporaries(large) - temporaries(small)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(one))
    # A whole copy of any leaf would show; the XLA of JAX 0.12 copies small ones into the layout of a product, and
    # writes copies of large ones into fusions, which take no memory.
    older = jax.__version_info__ < (0, 12)
    spare = sizes[0] if older else sum(sizes[:-1])
    assert abs(grown - 4 * count * kept) < 4 * count * spare
    copies = [line for line in large.compiled.as_text().splitlines() if " copy(" in line]
    whole = [line for line in copies if re.search(rf"= \w+\[{2 * count}[,\]]", line)]
    assert not (older and whole), whole
    assert copies  # so that the text is read as it is written


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [8, 0])
def test_streamed_training_is_plain_training(batch_size: int, tmp_path: Path, rng: np.random.Generator) -> None:
    net, dataset = multi_branch(mlp((3,), 3), 5), images(rng)
    spec = spec_with(batch_size=batch_size, optimizer=sgd(0.9), schedule=Component("cosine", {}))
    count = 2 if batch_size else 1
    plain = train_as(net, multi_margin(), dataset, spec, num_solutions=count, group_size=1)
    on = dataclasses.replace(spec, streaming="on", branch_chunk=2)
    in_memory = train_as(net, multi_margin(), dataset, on, num_solutions=count)
    on_disk = train_as(net, multi_margin(), dataset, on, num_solutions=count, checkpoints=tmp_path)
    for one, other, stored in zip(plain, in_memory, on_disk, strict=True):
        assert worst((other.params, other.batch_loss), (one.params, one.batch_loss)) < 1e-5
        assert not isinstance(stored.network, InMemory)
        assert stored.network.num_branches == 5
        for a, b in zip(jax.tree.leaves(stored.network.read(1, 3)[0]), jax.tree.leaves(other.params), strict=True):
            np.testing.assert_array_equal(a, b[1:4])
        assert (stored.steps, stored.status, stored.batch_loss) == (other.steps, other.status, other.batch_loss)


@pytest.mark.optimized
def test_steps_that_are_not_waited_for_are_the_same(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    net, dataset = multi_branch(mlp((3,), 3), 5), images(rng)
    spec = spec_with(batch_size=8, streaming="on", branch_chunk=2, optimizer=sgd(0.9), max_steps=13, check_every=7)
    (expected,) = train_as(net, multi_margin(), dataset, spec, num_solutions=1)
    calls: list[int] = []
    original = Streamed.advance

    def counted(self: Any, lanes: Any, steps: Any) -> Any:
        calls.append(steps.length)
        return original(self, lanes, steps)

    monkeypatch.setattr(Streamed, "advance", counted)
    monkeypatch.setattr(streamed, "device_memory", lambda: 2**34)
    (got,) = train_as(net, multi_margin(), dataset, spec, num_solutions=1)
    assert calls == [7, 6]
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)
    assert (got.batch_loss, got.steps) == (expected.batch_loss, expected.steps)


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.mark.optimized
def test_a_kill_in_mid_segment_is_made_good_bit_for_bit(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed time after time, inside segments of five and in the second solution."""
    net, dataset = multi_branch(mlp((3,), 3), 5), images(rng)
    spec = spec_with(streaming="on", chain=("scale_by_adam()",), checkpoint_seconds=0.0, learning_rate=0.01)

    def run(folder: Path) -> list[Solution]:
        return train_as(net, multi_margin(), dataset, spec, num_solutions=2, checkpoints=folder)

    expected = run(tmp_path / "whole")
    original, left, done = Streamed.step, 0, []

    def dying(self: Any, *args: Any) -> Any:
        if len(done) == left:
            raise Killed
        done.append(args[-1])
        return original(self, *args)

    monkeypatch.setattr(Streamed, "step", dying)
    timed = 4  # for the estimate, before each run
    for steps in (3, 5, 4, 15):
        left, done = timed + steps, []
        with pytest.raises(Killed):
            run(tmp_path / "parts")
    first, *rest = done[timed:]
    assert 0 < first < 12, "the first solution went on"
    assert 0 in rest, "the last kill was in the second"
    monkeypatch.setattr(Streamed, "step", original)
    for got, wanted in zip(run(tmp_path / "parts"), expected, strict=True):
        assert not isinstance(got.network, InMemory)
        jax.tree.map(np.testing.assert_array_equal, got.network.read(0, 5), wanted.network.read(0, 5))
        assert (got.steps, got.status, got.batch_loss) == (wanted.steps, wanted.status, wanted.batch_loss)


@pytest.mark.parametrize("damaged", [False, True])
def test_what_is_trained_is_checked_on_disk_and_not_held(
    damaged: bool, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second call has nothing to do, unless the last checkpoint is damaged: then it does the last steps again."""
    net, dataset = multi_branch(mlp((3,), 3), 5), images(rng)
    spec = spec_with(streaming="on", checkpoint_seconds=0.0)

    def run() -> list[Solution]:
        return train_as(net, multi_margin(), dataset, spec, num_solutions=2, checkpoints=tmp_path)

    expected = [s.network.read(0, 5) for s in run()]
    if damaged:
        newest = max((tmp_path / "solution_1").glob("[0-9]*"), key=lambda step: int(step.name))
        chunk = max((newest / "state").rglob("c.*"), key=lambda path: path.stat().st_size)
        chunk.write_bytes(chunk.read_bytes()[:-1] + bytes([chunk.read_bytes()[-1] ^ 1]))
    placed, steps = [], []
    place, step = Placement.read_leaf, Streamed.step
    monkeypatch.setattr(Placement, "read_leaf", lambda self, *args: (placed.append(args), place(self, *args))[1])
    monkeypatch.setattr(Streamed, "step", lambda self, *args: (steps.append(args), step(self, *args))[1])
    found = run()  # says nothing of what training takes either: that would take steps
    assert bool(placed) == bool(steps) == damaged
    for solution, wanted in zip(found, expected, strict=True):
        assert not isinstance(solution.network, InMemory)
        jax.tree.map(np.testing.assert_array_equal, solution.network.read(0, 5), wanted)


def spoilt_steps(loss: Any, outputs: int, batch: int) -> list[Callable[..., Any]]:
    """The plain step, the plain step in three lanes, and the streamed one, as functions of what is added to outputs."""
    branch = from_functions(
        lambda key, x: jax.random.normal(key, (2, outputs)), lambda w, x: x[:, :2] @ w + x[:, 2:] * w[0, 0] ** 0
    )
    net, labels = multi_branch(branch, 5), jnp.arange(batch) % 2
    y = labels if outputs > 1 else jnp.where(labels == 0, -1.0, 1.0)
    x = jnp.ones((batch, 2 + outputs))
    params, state = jax.jit(net.init)(jax.random.key(1), x)
    transformation = for_network(net, optax.sgd(1.0))
    carry, rate, key = Carry(params, state, transformation.init(params)), jnp.asarray(0.1), jax.random.key(0)

    def plain(added: Any) -> Any:
        return step(net, loss, transformation, carry, x.at[:, 2:].set(added), y, rate, key)[1]

    def streamed(added: Any) -> Any:
        spoilt, where = x.at[:, 2:].set(added), Shard(0, 5)
        return branch_step(net.stacked, loss, transformation, carry, spoilt, y, rate, key, chunk=2, shard=where)[1]

    def lanes(added: Any) -> Any:
        return jax.vmap(plain)(jnp.stack([jnp.zeros_like(added), added, jnp.zeros_like(added)]))[1]

    return [jax.jit(f) for f in (plain, lanes, streamed)]


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("loss", "outputs"),
    [(binary_hinge(), 1), (logistic(), 1), (squared(), 1), (multi_margin(), 3), (crammer_singer(), 3), (logistic(), 3)],
)
@pytest.mark.parametrize("batch", [1, 2, 8, 19])
def test_what_is_not_finite_anywhere_in_the_outputs_reaches_the_loss(loss: Any, outputs: int, batch: int) -> None:
    for run in spoilt_steps(loss, outputs, batch):
        clean = jnp.zeros((batch, outputs))
        assert np.isfinite(float(run(clean)))
        for bad in (np.nan, np.inf, -np.inf):
            for at in np.ndindex(batch, outputs):
                assert not np.isfinite(float(run(clean.at[at].set(bad)))), (bad, at)


@pytest.mark.parametrize(("free", "way"), [(10**9, "together"), (10**5, "one by one"), (10**4, "streamed")])
def test_memory_decides_and_the_choice_is_kept(
    free: int, way: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, dataset = multi_branch(mlp((3,), 3), 20), images(rng)  # 111 numbers a branch: 8.9 kB, and four times that
    monkeypatch.setattr(plan, "memory_available", lambda: free)
    said: list[str] = []

    def run(**settings: Any) -> list[Solution]:
        spec = spec_with(max_steps=3, **settings)
        return train_as(net, multi_margin(), dataset, spec, checkpoints=tmp_path, report=said.append)

    found = run()
    begun = load(tmp_path / "solution_0").meta
    expected = {"together": (3, False), "one by one": (1, False), "streamed": (1, True)}[way]
    assert (begun["group_size"], begun["streamed"]) == expected
    assert all((not isinstance(s.network, InMemory)) == (way == "streamed") for s in found)
    if way == "streamed":
        (text,) = said
        assert "20 branches" in text
        assert "memory (estimate)" in text
        assert "s a step" in text
        assert "disk" in text
        assert "WARNING: that is more memory" in text
        monkeypatch.setattr(plan, "memory_available", lambda: 10**9)
        assert all(not isinstance(s.network, InMemory) for s in run())  # goes on as it was begun
    assert bool(said) == (way == "streamed")


@pytest.mark.parametrize("batch_size", [8, 0])
def test_a_large_run_in_memory_says_beforehand_what_it_takes(
    batch_size: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "WORTH_SAYING", 0)
    monkeypatch.setattr(plan, "_PROBE_BYTES", 2000)  # four of the branches
    said: list[str] = []
    spec, dataset = spec_with(max_steps=4, batch_size=batch_size), images(rng)
    branch = mlp((3,), 3)
    for net in (multi_branch(branch, 20), mixture([multi_branch(branch, 3), branch])):
        train_as(net, multi_margin(), dataset, spec, num_solutions=3, group_size=2, report=said.append)
    whole, without_time = said
    # Four copies of the parameters and momentum, 35.5 kB, and what a step computes on 8 or all examples.
    sizes = {8: "48.3 kB a solution = 96.6 kB", 0: "72.6 kB a solution = 145 kB"}[batch_size]
    assert whole.startswith(f"training: 3 solutions, 2 at a time\n  memory (estimate): {sizes}")
    assert re.search(r"time \(estimate\): .* s a step of one solution; at most 4 steps x 3 solutions = \d+ s", whole)
    assert "memory" in without_time
    assert "a step" not in without_time


def test_a_loss_that_is_not_a_number_ends_the_run_at_once(rng: np.random.Generator) -> None:
    spec = spec_with(streaming="on", learning_rate=1e30, check_every=100, max_steps=1000)
    found = train_as(multi_branch(mlp((3,), 3), 2), multi_margin(), images(rng), spec, num_solutions=1)
    assert found[0].status == "diverged"
    assert found[0].steps < 20


def test_what_cannot_be_streamed_is_refused_in_words(rng: np.random.Generator) -> None:
    dataset, stacked = images(rng), multi_branch(mlp((3,), 3), 4)
    on = spec_with(streaming="on")
    mixed = mixture([stacked, multi_branch(mlp((2,), 3), 2)])
    cases: list[tuple[Any, TrainingSpec, MeshSpec, str]] = [
        (mixed, on, MeshSpec(), "made by multi_branch"),
        (mlp((3,), 3), on, MeshSpec(), "made by multi_branch"),
        (stacked, on, MeshSpec(data=3), "cannot be shared evenly"),
        (multi_branch(conv((2,), 3, batch_norm=True), 4), on, MeshSpec(data=2), "batch statistics"),
        (stacked, on, MeshSpec(branch=64), "64 devices, but there are"),
        (stacked, spec_with(streaming="off"), MeshSpec(branch=2), "one device"),
        (stacked._replace(init=mixed.init), on, MeshSpec(), "not use the init given by _replace"),
        (stacked._replace(init=mixed.init, apply=mixed.apply), on, MeshSpec(), "the init and apply given by"),
        (stacked._replace(apply=mixed.apply), spec_with(), MeshSpec(branch=64), "not use the apply given by"),
    ]
    for net, spec, mesh, message in cases:
        with pytest.raises(ConfigError, match=message):
            train_as(net, multi_margin(), dataset, spec, mesh=mesh)
    with pytest.raises(ConfigError, match=r"mesh\.branch=0"):
        MeshSpec(branch=0)
    unknown = object.__new__(TrainingSpec)
    for field in dataclasses.fields(TrainingSpec):
        object.__setattr__(unknown, field.name, "onn" if field.name == "streaming" else field.default)
    with pytest.raises(ConfigError, match="onn"):
        unknown.__post_init__()


def test_networks_that_cannot_be_streamed_are_trained_plainly_whatever_the_memory(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "memory_available", lambda: 1)
    net = mixture([multi_branch(mlp((3,), 3), 2), multi_branch(mlp((2,), 3), 2)])
    assert train_as(net, multi_margin(), images(rng), spec_with(max_steps=2), num_solutions=1)[0].steps == 2


def test_functions_put_in_place_of_the_sums_own_are_used(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step branch by branch would draw and compute with the old ones, so it is not taken, whatever the memory."""
    monkeypatch.setattr(plan, "memory_available", lambda: 1)
    net = multi_branch(mlp((3,), 3), 2)
    calls = []

    def init(key: Any, x: Any, /) -> Any:
        params, state = net.init(key, x)
        return jax.tree.map(lambda w: jnp.full_like(w, 0.25), params), state

    def apply(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return net.apply(*args, **options)

    (drawn,) = train_as(net._replace(init=init), multi_margin(), images(rng), spec_with(max_steps=0), num_solutions=1)
    assert all((np.asarray(leaf) == 0.25).all() for leaf in jax.tree.leaves(drawn.params))
    train_as(net._replace(apply=apply), multi_margin(), images(rng), spec_with(max_steps=1), num_solutions=1)
    assert calls


def test_functions_without_a_stem_are_streamed_too(rng: np.random.Generator) -> None:
    def init(key: jax.Array, x: jax.Array) -> Any:
        return {"w": jax.random.normal(key, (x.reshape(len(x), -1).shape[1], 3))}

    branch = from_functions(init, lambda p, x: jnp.tanh(x.reshape(len(x), -1) @ p["w"]))
    net, dataset = multi_branch(branch, 6), images(rng)
    one, other = (
        train_as(net, multi_margin(), dataset, spec_with(streaming=s, branch_chunk=4), num_solutions=1)[0]
        for s in ("off", "on")
    )
    assert worst(other.params, one.params) < 1e-5


# --- layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_every_branch_lies_on_one_shard(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layout = Layout(int(rng.integers(1, 100)), int(rng.integers(1, 20)))
    held = [layout.first(s) + i for s in range(layout.shards) for i in range(layout.count(s))]
    assert held == list(range(layout.num_branches))
    assert {int(layout.count(s)) for s in range(layout.shards)} <= {layout.slots, layout.slots - 1}
    assert layout.is_even == all(layout.count(s) == layout.slots for s in range(layout.shards))
    for s in range(layout.shards):
        assert int(layout.first(jnp.asarray(s))) == layout.first(s)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_one_number_that_is_not_finite_is_found_anywhere(rng: np.random.Generator, dtype: str, bad: float) -> None:
    largest = jnp.finfo(dtype).max
    signs = rng.integers(-1, 2, (5, 300))
    tree = {"a": jnp.asarray(signs, dtype) * largest, "none": jnp.zeros((0, 3), dtype), "steps": jnp.arange(3)}
    assert all_finite(tree)
    for place in [*rng.integers(0, 1500, 5).tolist(), 0, 1499]:
        assert not all_finite(tree | {"a": tree["a"].ravel().at[place].set(bad)})


@pytest.mark.optimized
@pytest.mark.parametrize("shape", [(4, 5), (1,), ()])
def test_of_several_lanes_the_one_that_is_not_finite_is_found(rng: np.random.Generator, shape: tuple[int, ...]) -> None:
    last = (1, *(size - 1 for size in shape))
    numbers = jnp.asarray(rng.normal(size=(3, *shape))).at[last].set(jnp.inf)
    assert [all_finite({"w": numbers}, lane) for lane in range(3)] == [True, False, True]


_MEMORY = """
    import json
    import jax
    import numpy as np
    from dualgap_jax.data import Dataset, validate
    from dualgap_jax.losses import binary_hinge, crammer_singer, logistic, multi_margin, squared
    from dualgap_jax.networks import mlp, multi_branch
    from dualgap_jax.machine import peak_memory
    from dualgap_jax.training import TrainingSpec, train

    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (256, 32, 32, 3), dtype=np.uint8)
    std = np.maximum(x.std(axis=0), 1).astype(np.float32)
    y = rng.integers(0, 10, 256).astype(np.int32)
    data = validate(Dataset("r", x, y, x.mean(axis=0, dtype=np.float32), std, 10, "multiclass", {}))

    def run(count, folder):
        spec = TrainingSpec(batch_size=32, max_steps=3, streaming="on", branch_chunk=50, checkpoint_seconds=0.0)
        net = multi_branch(mlp((8, 8, 8), 10), count)
        train(net, multi_margin(), data, **spec.arguments(count), num_solutions=2, checkpoints=folder)

    import pathlib, sys
    folder = pathlib.Path(sys.argv[1])
    run(100, folder / "small")
    before = peak_memory()
    run(4000, folder / "large")
    print(json.dumps({"grown": peak_memory() - before, "parameters": 4 * 24818 * 4000}))
"""


@pytest.mark.optimized
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_training_with_checkpoints_needs_little_more_than_the_parameters(tmp_path: Path) -> None:
    """In a fresh process: 397 MB of parameters, two solutions, a checkpoint at every step; programs were warmed up."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_MEMORY), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=ROOT,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.9 * found["parameters"] < found["grown"] < 1.35 * found["parameters"]
