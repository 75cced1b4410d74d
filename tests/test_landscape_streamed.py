"""Solutions read from disk a block of branches at a time, against the same solutions in memory, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualgap_jax import evaluation, landscape, networks
from dualgap_jax.config import ConfigError
from dualgap_jax.data import Dataset
from dualgap_jax.files import load_npz, save_npz
from dualgap_jax.identity import IdentityError
from dualgap_jax.landscape import (
    DegeneratePlaneError,
    Plane,
    edges,
    evaluate,
    evaluate_points,
    kernels,
    partial,
    plane_through,
    points,
    products,
    survey,
)
from dualgap_jax.losses import Loss, binary_hinge, logistic, multi_margin, squared
from dualgap_jax.networks import conv, mixture, mlp, multi_branch
from dualgap_jax.networks.sources import InMemory
from dualgap_jax.registry import UnknownNameError
from dualgap_jax.types import BranchSource, Network


class OnDisk:
    """A solution in one memory-mapped file a leaf; keeps a list of what was read."""

    def __init__(self, folder: Path, params: Any, state: Any) -> None:
        leaves, self._treedef = jax.tree.flatten((params, state))
        self._files = []
        for index, leaf in enumerate(leaves):
            path = folder / f"{index}.npy"
            folder.mkdir(parents=True, exist_ok=True)
            np.save(path, np.asarray(leaf))
            self._files.append(np.load(path, mmap_mode="r"))
        self.reads: list[tuple[int, int]] = []

    @property
    def num_branches(self) -> int:
        return len(self._files[0])

    def read(self, first: int, count: int) -> tuple[Any, Any]:
        assert 0 <= first < first + count <= self.num_branches
        self.reads.append((first, count))
        return jax.tree.unflatten(self._treedef, [np.asarray(f[first : first + count]) for f in self._files])


class Case(NamedTuple):
    net: Network
    plane: Plane
    streamed: Plane
    solutions: list[tuple[Any, Any]]
    sources: list[OnDisk]
    data: Dataset
    loss: Loss


# 13 branches: with chunks of 2 and blocks of 4 or 6, neither the chunks nor the blocks come out even.
NUM_BRANCHES = 13
NETWORKS: dict[str, tuple[Callable[[], Network], Callable[[], Loss]]] = {
    "deep": (lambda: multi_branch(mlp((4, 3), 3), NUM_BRANCHES), multi_margin),
    "sum": (lambda: multi_branch(mlp((4,), 3, use_bias=False), NUM_BRANCHES, reduce="sum"), logistic),
    "nested": (lambda: multi_branch(multi_branch(mlp((3,), 3), 2), NUM_BRANCHES), logistic),
    "batch norm": (lambda: multi_branch(conv((2,), 3, batch_norm=True), NUM_BRANCHES), logistic),
}


def make(name: str, folder: Path, rng: np.random.Generator, dtype: Any = np.float32, axes: str = "authors") -> Case:
    build, loss = NETWORKS[name]
    net = build()
    n, shape = 11, (4, 4, 1)
    x, y = rng.integers(0, 256, (n, *shape), dtype=np.uint8), rng.integers(0, 3, n).astype(np.int32)
    mean, std = rng.uniform(100, 150, shape).astype(dtype), rng.uniform(50, 90, shape).astype(dtype)
    data = Dataset("images", x, y, mean, std, 3, "multiclass", {})
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *shape), dtype))
    solutions = [
        (
            jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), dtype), shapes[0]),
            jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.9, 1.2, s.shape), dtype), shapes[1]),
        )
        for _ in range(3)
    ]
    sources = [OnDisk(folder / str(k), *solution) for k, solution in enumerate(solutions)]
    plane = plane_through([InMemory(*solution) for solution in solutions], axes)
    return Case(net, plane, plane_through(sources, axes), solutions, sources, data, loss())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many bytes a block that 13 small branches make several blocks, of inner products too."""
    monkeypatch.setattr(networks.sources, "BLOCK_BYTES", 2000)
    monkeypatch.setattr(products, "_PRODUCT_BYTES", 1000)
    monkeypatch.setattr(products, "_PIECE", 50)


XS, YS = np.asarray([-0.9, -0.1, 0.4, 1.1]), np.asarray([-0.5, 0.0, 0.8])
CHUNKS: dict[str, Any] = {"sample_chunk": 4, "branch_chunk": 2, "point_chunk": 5}


# --- planes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", landscape.AXES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.usefixtures("small_blocks")
def test_a_streamed_plane_is_the_one_in_memory(dtype: Any, axes: str, tmp_path: Path, rng: np.random.Generator) -> None:
    with jax.enable_x64(dtype is np.float64):
        case = make("batch norm", tmp_path, rng, dtype, axes)
        assert isinstance(case.sources[0], BranchSource)
        np.testing.assert_array_equal(case.streamed.anchors, case.plane.anchors)
        assert case.streamed.digest == case.plane.digest
        assert (case.streamed.in_memory, case.plane.in_memory) == (False, True)
        for first, count in ((0, 13), (0, 1), (3, 5), (12, 1)):
            block, sliced = case.streamed.block(first, count), case.plane.block(first, count)
            expected = jax.tree.map(lambda leaf: leaf[first : first + count], case.plane.whole())  # noqa: B023
            for got in (block, sliced):
                assert jax.tree.structure(got) == jax.tree.structure(expected)
                for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
                    assert a.dtype == dtype
                    np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("small_blocks")
def test_the_coordinates_take_one_pass(tmp_path: Path, rng: np.random.Generator) -> None:
    case = make("deep", tmp_path, rng)
    for source in case.sources:
        shapes, *blocks = source.reads
        assert shapes == (0, 1)
        assert len(blocks) > 2
        assert [first for first, _ in blocks] == [0, *itertools.accumulate(count for _, count in blocks)][:-1]
        assert sum(count for _, count in blocks) == NUM_BRANCHES


@pytest.mark.parametrize("axes", landscape.AXES)
@pytest.mark.parametrize("what", ["same", "line", "nan", "zero"])
@pytest.mark.usefixtures("small_blocks")
def test_degenerate_sources_are_refused(what: str, axes: str, tmp_path: Path, rng: np.random.Generator) -> None:
    first, second, third = (rng.normal(size=(9, 5, 7)).astype(np.float32) for _ in range(3))
    if what == "same":
        third = first
    elif what == "line":
        third = (-0.7 * first + 1.7 * second).astype(np.float32)
    elif what == "nan":
        third[8, 4, 6] = np.nan
    else:
        third[:] = 0
    sources = [OnDisk(tmp_path / str(k), {"w": w}, ()) for k, w in enumerate((first, second, third))]
    words = {"same": "span no plane", "line": "line", "nan": "not finite", "zero": "use axes='orthonormal'"}[what]
    if what == "zero" and axes == "orthonormal":
        assert plane_through(sources, axes).axes == axes
        return
    with pytest.raises(DegeneratePlaneError, match=words):
        plane_through(sources, axes)


@pytest.mark.optimized
@pytest.mark.parametrize("distance", [1e-4, 1e-2, 1.0])
@pytest.mark.usefixtures("x64", "small_blocks")
def test_heights_keep_their_digits_near_a_line(distance: float, rng: np.random.Generator) -> None:
    """The squared height is lost in a difference of the squares of the sides: 16 digits leave 8 at 1e-4."""
    start, along, across = (rng.normal(size=(9, 35)) for _ in range(3))
    across -= np.vdot(across, along) / np.vdot(along, along) * along
    solutions = [start, start + along, start - 2.5 * along + distance * across]
    plane = plane_through([InMemory({"w": jnp.asarray(w)}) for w in solutions], "orthonormal")
    height = distance * np.linalg.norm(across)
    assert plane.anchors[2, 1] - plane.anchors[0, 1] == pytest.approx(height, rel=1e-13 / distance)
    np.testing.assert_allclose(plane.whole().params[2]["w"], across / np.linalg.norm(across), atol=1e-13 / distance)


def test_other_misuse_of_sources_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = [rng.normal(size=(count, 3)).astype(np.float32) for count in (4, 4, 5)]
    sources = [OnDisk(tmp_path / str(k), {"w": w}, ()) for k, w in enumerate(arrays)]
    with pytest.raises(ValueError, match=r"\[4, 4, 5\] branches"):
        plane_through(sources)
    with pytest.raises(ValueError, match="three solutions, got 2"):
        plane_through(sources[:2])
    with pytest.raises(UnknownNameError, match="unknown axes 'x'"):
        plane_through(sources, "x")
    for other in (
        OnDisk(tmp_path / "a", {"w": arrays[0][:, :2]}, ()),
        OnDisk(tmp_path / "b", {"w": arrays[0]}, {"s": arrays[1]}),
    ):
        with pytest.raises(ValueError, match="differ in structure or shapes"):
            plane_through([*sources[:2], other])


# --- surfaces ---------------------------------------------------------------------------------------------------------


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "state", "dtype"),
    [
        *((name, "estimate", np.float32) for name in NETWORKS),
        *(("batch norm", "interpolate", dtype) for dtype in (np.float32, np.float64)),
        ("deep", "estimate", np.float64),
    ],
)
@pytest.mark.usefixtures("small_blocks")
def test_streamed_values_are_those_in_memory_bit_for_bit(
    name: str, state: str, dtype: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    with jax.enable_x64(dtype is np.float64):
        case = make(name, tmp_path, rng, dtype)
        for source in case.sources:
            source.reads.clear()
        options = CHUNKS | {"state": state, "state_samples": 6}
        in_memory, streamed = (
            evaluate(case.net, case.loss, case.data, plane, XS, YS, **options).loss
            for plane in (case.plane, case.streamed)
        )
        np.testing.assert_array_equal(streamed, in_memory)
        options |= {"route": "plain"}
        plain = evaluate(case.net, case.loss, case.data, case.plane, XS, YS, **options).loss
        assert np.ptp(plain) > 1e-3
        np.testing.assert_allclose(streamed, plain, rtol=1e-12 if dtype is np.float64 else 1e-5)
        for source in case.sources:
            blocks = [read for read in source.reads if read != (0, 1)]
            assert len(blocks) > 1, "one block only: the test shows nothing"
            assert sum(count for _, count in blocks) == NUM_BRANCHES, "read more than once"
            assert len({count for _, count in blocks}) == 2


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.usefixtures("small_blocks")
def test_on_gpus_a_block_is_one_piece(
    name: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(name, tmp_path, rng)
    plain = evaluate(case.net, case.loss, case.data, case.plane, XS, YS, route="plain").loss
    monkeypatch.setattr(kernels, "on_gpu", lambda: True)
    asked: list[tuple[int, int]] = []
    original = kernels.kernels

    def made(*args: Any, count: int, branch_chunk: int, **settings: Any) -> Any:
        asked.append((count, branch_chunk))
        return original(*args, count=count, branch_chunk=branch_chunk, **settings)

    monkeypatch.setattr(kernels, "kernels", made)
    for plane in (case.plane, case.streamed):
        asked.clear()
        got = evaluate(case.net, case.loss, case.data, plane, XS, YS, sample_chunk=4).loss
        np.testing.assert_allclose(got, plain, rtol=1e-5)
        if case.net.stem is not None:
            assert max(count for count, _ in asked) == asked[0][1] < NUM_BRANCHES, "one block: the test shows nothing"


def test_even_blocks(rng: np.random.Generator) -> None:
    for _ in range(2000):
        total, size = (int(n) for n in rng.integers(1, 4000, 2))
        found = networks.sources.even_size(total, size)
        assert 1 <= found <= min(total, size)
        if total <= size:
            assert found == total
        elif size >= 16:
            assert found % 8 == 0
            assert found >= size / 2 - 8
            divisors = [d for d in range(size // 2 + 1, size + 1) if total % d == 0 and d % 8 == 0]
            assert not divisors or found == divisors[-1]
    assert networks.sources.even_size(50_000, 1351) == 1000


@pytest.mark.usefixtures("small_blocks")
def test_a_block_in_memory_serves_all_batches_that_fit(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make("deep", tmp_path, rng)
    whole = evaluate(case.net, case.loss, case.data, case.plane, XS, YS, **CHUNKS).loss
    of_batch = 4 * 12 * 4 * 3  # bytes x points x samples x outputs
    made: list[tuple[int, int]] = []
    original = Plane.block

    def counted(self: Plane, first: int, count: int) -> Any:
        made.append((first, count))
        return original(self, first, count)

    monkeypatch.setattr(Plane, "block", counted)
    for passes, size in ((1, 3 * of_batch), (2, 2 * of_batch), (3, of_batch)):
        made.clear()
        options = CHUNKS | {"accumulator_bytes": size * points._SHARE_IN_MEMORY}
        got = evaluate(case.net, case.loss, case.data, case.plane, XS, YS, **options).loss
        np.testing.assert_array_equal(got, whole)
        assert sum(count for first, count in made if (first, count) != (0, 1)) == passes * NUM_BRANCHES


@pytest.mark.usefixtures("small_blocks")
def test_groups_of_samples_that_fit_the_memory(tmp_path: Path, rng: np.random.Generator) -> None:
    case = make("deep", tmp_path, rng)
    whole = evaluate(case.net, case.loss, case.data, case.streamed, XS, YS, **CHUNKS).loss
    of_batch = 4 * 12 * 4 * 3  # bytes x points x samples x outputs
    for passes, size in ((1, 3 * of_batch), (2, 2 * of_batch), (3, of_batch), (3, 1)):
        case.sources[0].reads.clear()
        loss = evaluate(case.net, case.loss, case.data, case.streamed, XS, YS, accumulator_bytes=size, **CHUNKS).loss
        np.testing.assert_array_equal(loss, whole)
        assert sum(count for _, count in case.sources[0].reads[1:]) == passes * NUM_BRANCHES


def test_one_block_and_many_agree(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("deep", tmp_path, rng)
    one = evaluate(case.net, case.loss, case.data, case.streamed, XS, YS, **CHUNKS).loss
    monkeypatch.setattr(networks.sources, "BLOCK_BYTES", 1)
    np.testing.assert_allclose(
        evaluate(case.net, case.loss, case.data, case.streamed, XS, YS, **CHUNKS).loss, one, rtol=1e-6
    )


@pytest.mark.usefixtures("x64", "small_blocks")
def test_a_survey_is_grid_and_edges_and_solutions(tmp_path: Path, rng: np.random.Generator) -> None:
    case = make("deep", tmp_path, rng, np.float64)
    call = (case.net, case.loss, case.data, case.streamed)
    case.sources[0].reads.clear()
    found = survey(*call, XS, YS, edge_points=4, **CHUNKS)
    assert sum(count for _, count in case.sources[0].reads[1:]) == NUM_BRANCHES
    t, along = edges(*call, num_points=4, **CHUNKS)
    np.testing.assert_array_equal(found.edge_t, t)
    np.testing.assert_allclose(found.edge_loss, along, rtol=1e-12)
    np.testing.assert_array_equal(found.surface.xs, XS)
    np.testing.assert_allclose(found.surface.loss, evaluate(*call, XS, YS, **CHUNKS).loss, rtol=1e-12)
    own = [evaluation.evaluate(case.net, case.loss, case.data, InMemory(*s)).loss for s in case.solutions]
    np.testing.assert_allclose(found.edge_loss[:, 0], own, rtol=1e-10)


@pytest.mark.usefixtures("small_blocks")
def test_the_next_block_is_read_while_one_is_computed(tmp_path: Path, rng: np.random.Generator) -> None:
    case = make("deep", tmp_path, rng)
    threads = []
    source = case.sources[0]

    class Watched:
        num_branches = source.num_branches

        def read(self, first: int, count: int) -> Any:
            threads.append(threading.current_thread())
            if first > 6:
                raise OSError("disk gone")
            return source.read(first, count)

    plane = dataclasses.replace(case.streamed, sources=(Watched(), *case.sources[1:]))
    with pytest.raises(OSError, match="disk gone"):
        evaluate(case.net, case.loss, case.data, plane, XS, YS, **CHUNKS)
    assert len(set(threads)) == 2  # shapes here, blocks there
    assert all(not thread.is_alive() for thread in threads[1:])


# --- interruption -----------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("share", [0.0, 0.2, 0.45, 0.8, 1.0])
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.usefixtures("small_blocks")
def test_interrupted_work_goes_on_at_its_block(
    streamed: bool, share: float, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "workers", lambda: 2)
    case, partial = make("deep", tmp_path, rng), tmp_path / "partial.npz"
    plane = case.streamed if streamed else case.plane
    xs, ys = np.linspace(-1, 1, 11), np.linspace(-0.7, 0.7, 7)
    options = CHUNKS | {"partial": partial, "accumulator_bytes": 2 * 4 * 77 * 4 * 3}
    updates = 0

    class Watched(points.Progress):
        stop_at = math.inf

        def update(self, done: int, note: str = "") -> None:
            nonlocal updates
            updates += 1
            assert done > last_done[-1]
            last_done.append(done)
            if updates == self.stop_at:
                raise Stopped

    last_done = [0]
    monkeypatch.setattr(points, "Progress", Watched)

    def call() -> np.ndarray:
        return evaluate(case.net, case.loss, case.data, plane, xs, ys, **options).loss

    expected = call()
    assert not partial.exists()
    whole, updates, total = updates, 0, last_done[-1]
    last_done[:] = [0]
    stopped = Watched.stop_at = max(1, round(share * (whole - 1)))
    with pytest.raises(Stopped):
        call()
    stored = load_npz(partial)
    if share in (0.2, 0.45, 0.8):
        assert len(stored["parts"])
        assert stored["parts"][:, 2].min() >= 1
    before, updates, Watched.stop_at = last_done[-1], 0, math.inf
    for source in case.sources:
        source.reads.clear()
    np.testing.assert_array_equal(call(), expected)
    assert last_done[-1] == total
    assert before < total
    assert updates == whole - stopped
    assert not partial.exists()
    if streamed and share == 0.2:  # blocks that all points have had are not read again
        assert sum(count for _, count in case.sources[0].reads[1:]) == 2 * NUM_BRANCHES - case.sources[0].reads[1][1]


@pytest.mark.usefixtures("small_blocks")
def test_work_on_other_sources_is_refused(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, other = make("deep", tmp_path / "a", rng), make("deep", tmp_path / "b", rng)
    options = CHUNKS | {"partial": tmp_path / "partial.npz"}

    def stop(self: Any, done: int, note: str = "") -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(points.Progress, "update", stop)
        with pytest.raises(Stopped):
            evaluate(case.net, case.loss, case.data, case.streamed, XS, YS, **options)
    plane = dataclasses.replace(other.streamed, anchors=case.streamed.anchors, coefficients=case.streamed.coefficients)
    with pytest.raises(IdentityError, match="the plane differs"):
        evaluate(case.net, case.loss, case.data, plane, XS, YS, **options)
    # From disk and from memory are one evaluation.
    got = evaluate(case.net, case.loss, case.data, case.plane, XS, YS, **options).loss
    np.testing.assert_array_equal(got, evaluate(case.net, case.loss, case.data, case.plane, XS, YS, **CHUNKS).loss)


def test_writes_take_a_tenth_of_the_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, writes = [0.0], []

    def slow(path: Path, **arrays: Any) -> None:
        writes.append(clock[0])
        clock[0] += 7.0
        save_npz(path, **arrays)

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(partial, "save_npz", slow)
    saver = partial.Saver(tmp_path / "partial.npz", dict, 10.0)
    work = saver.load(3)
    while clock[0] < 1000:
        saver.save_if_due(work)
        clock[0] += 1.0
    assert writes[0] == pytest.approx(11.0)
    assert len(writes) == pytest.approx(1000 / 70, abs=2)
    assert 7.0 * len(writes) <= 0.11 * clock[0]


# --- one solution -----------------------------------------------------------------------------------------------------


@pytest.mark.optimized
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.usefixtures("x64", "small_blocks")
def test_evaluation_of_a_source_is_that_in_memory(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    case = make(name, tmp_path, rng, np.float64)
    for source, (params, state) in zip(case.sources, case.solutions, strict=True):
        source.reads.clear()
        sizes = {"batch_size": 4, "branch_chunk": 3}
        got = evaluation.evaluate(case.net, case.loss, case.data, source, **sizes)
        held = evaluation.evaluate(case.net, case.loss, case.data, InMemory(params, state), **sizes)
        for a, b in zip(got, held, strict=True):
            np.testing.assert_array_equal(a, b)
        whole = case.net._replace(stacked=None)  # evaluated by its own apply
        expected = evaluation.evaluate(whole, case.loss, case.data, InMemory(params, state))
        assert got.loss == pytest.approx(expected.loss, rel=1e-12)
        assert got.accuracy == expected.accuracy
        assert (got.margins is None) == (expected.margins is None)
        if got.margins is not None:
            np.testing.assert_allclose(got.margins, expected.margins, rtol=1e-10)
        assert len(source.reads) > 3
        assert sum(count for _, count in source.reads[1:]) == NUM_BRANCHES


@pytest.mark.parametrize(("task", "loss"), [("regression", squared()), ("binary", binary_hinge())])
def test_evaluation_of_other_tasks(task: str, loss: Loss, tmp_path: Path, rng: np.random.Generator) -> None:
    net = multi_branch(mlp((3,), 1), 5)
    y = rng.choice([-1.0, 1.0], 9).astype(np.float32)
    x = rng.normal(size=(9, 4)).astype(np.float32)
    data = Dataset("d", x, y, np.zeros(4, np.float32), np.ones(4, np.float32), 1, task, {})
    params, state = jax.jit(net.init)(jax.random.key(0), jnp.asarray(x))
    got = evaluation.evaluate(net, loss, data, OnDisk(tmp_path, params, state))
    outputs = np.asarray(net.apply(params, state, jnp.asarray(x))[0][:, 0], np.float64)
    each = 0.5 * (outputs - y) ** 2 if task == "regression" else np.maximum(0, 1 - y * outputs)
    assert got.loss == pytest.approx(each.mean(), rel=1e-6)
    np.testing.assert_equal(got.accuracy, math.nan if task == "regression" else (outputs * y > 0).mean())
    assert (got.margins is None) == (task == "regression")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_networks_and_routes_that_cannot_be_streamed(tmp_path: Path, rng: np.random.Generator) -> None:
    case = make("deep", tmp_path, rng)
    where = np.zeros((1, 2))
    with pytest.raises(ValueError, match="networks on disk need 'auto' or 'stem'"):
        evaluate_points(case.net, case.loss, case.data, case.streamed, where, route="plain")
    unstacked = (mixture([case.net]), mlp((4, 3), 3))
    for net in unstacked:
        with pytest.raises(ValueError, match="this one is no sum of branches"):
            evaluate_points(net, case.loss, case.data, case.streamed, where)
        with pytest.raises(ValueError, match="this one is no sum of branches"):
            evaluation.evaluate(net, case.loss, case.data, case.sources[0])
    other = multi_branch(mlp((4, 3), 3), 5)
    with pytest.raises(ValueError, match="the network has 5 branches, the solutions have 13"):
        evaluate_points(other, case.loss, case.data, case.streamed, where)
    for name in ("batch_size", "branch_chunk"):
        with pytest.raises(ConfigError, match=f"{name} must be a positive integer, got 0"):
            evaluation.evaluate(case.net, case.loss, case.data, case.sources[0], **{name: 0})
    with pytest.raises(TypeError, match="got tuple: write"):
        evaluation.evaluate.__wrapped__(case.net, case.loss, case.data, case.solutions[0])
    with pytest.raises(TypeError, match="arguments come in the order net, loss, dataset, plane"):
        evaluate_points.__wrapped__(case.net, case.loss, case.data, case.solutions, where)


# --- memory -----------------------------------------------------------------------------------------------------------

MEMORY = """
import jax, numpy as np
from dualgap_jax import evaluation, landscape
from dualgap_jax.networks import mlp, sources
from dualgap_jax.data import Dataset
from dualgap_jax.losses import multi_margin
from dualgap_jax.networks import multi_branch
from dualgap_jax.machine import peak_memory

sources.BLOCK_BYTES = landscape.products._PRODUCT_BYTES = 2**22
d, hidden = 1024, 8

class Drawn:
    def __init__(self, seed, num_branches):
        self.seed, self.num_branches, self.bytes = seed, num_branches, 0

    def read(self, first, count):
        rng = np.random.default_rng([self.seed, first])
        draw = lambda *shape: rng.standard_normal((count, *shape), np.float32)
        tree = tuple({"kernel": draw(o, i), "bias": draw(o)} for o, i in ((hidden, d), (4, hidden)))
        self.bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        return tree, ()

def work(num_branches):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((16, d), np.float32), rng.integers(0, 4, 16).astype(np.int32)
    data = Dataset("d", x, y, np.zeros(d, np.float32), np.ones(d, np.float32), 4, "multiclass", {})
    net = multi_branch(mlp((hidden,), 4), num_branches)
    drawn = [Drawn(seed, num_branches) for seed in range(3)]
    plane = landscape.plane_through(drawn)
    ticks = np.linspace(-1, 1, 3)
    loss = landscape.survey(net, multi_margin(), data, plane, ticks, ticks, edge_points=3).surface.loss
    evaluation.evaluate(net, multi_margin(), data, drawn[0])
    assert np.isfinite(loss).all()
    return sum(source.bytes for source in drawn)

work(2000)  # some blocks: the programs are there, and the heap has the size that blocks under way need
before = peak_memory()
read = work(7000)
print(read, peak_memory() - before)
"""


@pytest.mark.optimized
def test_the_solutions_are_never_in_memory() -> None:
    """Three networks of 230 MB each, made as they are read; the process grows by a small part of one."""
    command = [sys.executable, "-c", MEMORY]
    one_heap = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # glibc's heaps, one a thread, would keep up to 100 MB more
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=one_heap)
    assert done.returncode == 0, done.stderr
    read, growth = map(int, done.stdout.split())
    one = 7000 * 4 * (8 * 1025 + 4 * 9)
    assert read > 6 * one
    assert growth < one / 4
