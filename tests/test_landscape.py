"""Planes against the formulas in NumPy; surfaces against a loop over points that evaluates each one in full."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax

from dualgap_jax import evaluation, landscape
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
    plane_through,
    points,
)
from dualgap_jax.landscape.statistics import momenta
from dualgap_jax.losses import Loss, binary_hinge, crammer_singer, logistic, multi_margin, squared
from dualgap_jax.networks import conv, from_functions, from_linen, from_nnx, mixture, mlp, multi_branch
from dualgap_jax.networks.sources import InMemory
from dualgap_jax.registry import UnknownNameError
from dualgap_jax.types import Network

# --- planes -----------------------------------------------------------------------------------------------------------


def random_tree(rng: np.random.Generator, scale: float = 1.0, dtype: Any = np.float64) -> Any:
    return (
        {
            "kernel": jnp.asarray(scale * rng.normal(size=(3, 4, 2)), dtype),
            "bias": jnp.asarray(rng.normal(size=3), dtype),
        },
        [jnp.asarray(scale * rng.normal(size=7), dtype), jnp.asarray(rng.normal(), dtype)],
    )


def through(solutions: Any, axes: str = "authors", states: Any = None) -> Plane:
    return plane_through([InMemory(w, () if states is None else states[k]) for k, w in enumerate(solutions)], axes)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.usefixtures("x64")
def test_authors_axes_are_those_of_their_code(scale: float, rng: np.random.Generator) -> None:
    for _ in range(3):
        solutions = [random_tree(rng, scale) for _ in range(3)]
        plane = through(solutions, "authors")
        w0, w1, w2 = map(flat, solutions)
        length = np.linalg.norm(w2)
        origin, u, v = plane.whole().params
        np.testing.assert_allclose(flat(origin), (w0 + w1 + w2) / 3, rtol=1e-12, atol=1e-14 * length)
        for axis, other in ((u, w1), (v, w2)):
            expected = (w0 - other) * length / np.linalg.norm(w0 - other)
            np.testing.assert_allclose(flat(axis), expected, rtol=1e-11, atol=1e-13 * length)
            assert jax.tree.structure(axis) == jax.tree.structure(solutions[0])
        check_anchors(plane, solutions, 1e-12)
        assert plane.axes == "authors"
        assert plane.whole().states == ((), (), ())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.usefixtures("x64")
def test_orthonormal_axes_give_true_distances(scale: float, rng: np.random.Generator) -> None:
    for _ in range(3):
        solutions = [random_tree(rng, scale) for _ in range(3)]
        plane = through(solutions, axes="orthonormal")
        origin, u, v = map(flat, plane.whole().params)
        w = [flat(s) for s in solutions]
        np.testing.assert_allclose([u @ u, v @ v, u @ v], [1, 1, 0], atol=1e-12)
        np.testing.assert_allclose(origin, sum(w) / 3, rtol=1e-12, atol=1e-14 * scale)
        check_anchors(plane, solutions, 1e-12)
        for i, j in ((0, 1), (1, 2), (0, 2)):
            apart = np.linalg.norm(plane.anchors[i] - plane.anchors[j])
            assert apart == pytest.approx(np.linalg.norm(w[i] - w[j]), rel=1e-11)
        np.testing.assert_allclose(u, (w[1] - w[0]) / np.linalg.norm(w[1] - w[0]), rtol=1e-9, atol=1e-11)
        assert v @ (w[2] - w[0]) > 0


def check_anchors(plane: Plane, solutions: list[Any], tolerance: float) -> None:
    assert plane.anchors.shape == (3, 2)
    weights = [flat(s) for s in solutions]
    largest = max(np.linalg.norm(w) for w in weights)
    origin, u, v = map(flat, plane.whole().params)
    for (a, b), w in zip(plane.anchors, weights, strict=True):
        there = origin + a * u + b * v
        np.testing.assert_allclose(there, w, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("axes", ["authors", "orthonormal"])
def test_planes_in_float32(axes: str, rng: np.random.Generator) -> None:
    solutions = [random_tree(rng, dtype=np.float32) for _ in range(3)]
    plane = through(solutions, axes)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(plane.whole().params)} == {"float32"}
    assert plane.anchors.dtype == np.float64
    check_anchors(plane, solutions, 1e-5)


@pytest.mark.parametrize("axes", ["authors", "orthonormal"])
@pytest.mark.usefixtures("x64")
def test_states_are_interpolated_and_whole_numbers_stay(axes: str, rng: np.random.Generator) -> None:
    solutions = [random_tree(rng) for _ in range(3)]
    states = [{"mean": jnp.asarray(rng.normal(size=(2, 3))), "count": jnp.asarray(5 + k)} for k in range(3)]
    plane = through(solutions, axes, states)
    block = plane.whole()
    for (a, b), state in zip(plane.anchors, states, strict=True):
        there = landscape.at(jnp.asarray(a), jnp.asarray(b), *block.states)
        np.testing.assert_allclose(there["mean"], state["mean"], rtol=1e-10, atol=1e-12)
        assert there["count"] == 5
    mean = sum(np.asarray(s["mean"]) for s in states) / 3
    np.testing.assert_allclose(block.states[0]["mean"], mean, rtol=1e-12)
    positive = np.all([np.asarray(s["mean"]) >= 0 for s in states], axis=0)
    least = np.min([s["mean"] for s in states], axis=0)
    np.testing.assert_array_equal(block.floor["mean"], np.where(positive, least, -np.inf))


AXES = pytest.mark.parametrize("axes", ["authors", "orthonormal"])


@AXES
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("i", "j"), [(0, 1), (0, 2), (1, 2)])
def test_two_solutions_that_are_the_same_span_no_plane(
    axes: str, dtype: Any, i: int, j: int, rng: np.random.Generator
) -> None:
    with jax.enable_x64(dtype is np.float64):
        solutions = [random_tree(rng, dtype=dtype) for _ in range(3)]
        solutions[j] = solutions[i]
        with pytest.raises(DegeneratePlaneError, match="span no plane"):
            through(solutions, axes)


@AXES
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_solutions_on_a_line_span_no_plane(axes: str, dtype: Any, rng: np.random.Generator) -> None:
    with jax.enable_x64(dtype is np.float64):
        for place in (0.3, -1.0, 2.5):
            first, second = random_tree(rng, dtype=dtype), random_tree(rng, dtype=dtype)
            third = jax.tree.map(lambda a, b, t=place: (1 - t) * a + t * b, first, second)
            with pytest.raises(DegeneratePlaneError, match="line"):
                through([first, second, third], axes)


@AXES
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_solutions_that_are_not_finite_span_no_plane(axes: str, bad: float, rng: np.random.Generator) -> None:
    for k in range(3):
        solutions = [random_tree(rng, dtype=np.float32) for _ in range(3)]
        solutions[k][1][0] = solutions[k][1][0].at[3].set(bad)
        with pytest.raises(DegeneratePlaneError, match="not finite"):
            through(solutions, axes)


@pytest.mark.usefixtures("x64")
def test_a_third_solution_of_zero_has_no_authors_axes(rng: np.random.Generator) -> None:
    solutions = [random_tree(rng), random_tree(rng), jax.tree.map(jnp.zeros_like, random_tree(rng))]
    with pytest.raises(DegeneratePlaneError, match="use axes='orthonormal'"):
        through(solutions, "authors")
    check_anchors(through(solutions, "orthonormal"), solutions, 1e-11)


def test_other_misuse_of_plane_through_is_named(rng: np.random.Generator) -> None:
    solutions = [random_tree(rng, dtype=np.float32) for _ in range(3)]
    with pytest.raises(UnknownNameError, match=r"unknown axes 'orthonormale'. Did you mean 'orthonormal'\?.*authors"):
        through(solutions, "orthonormale")
    with pytest.raises(TypeError, match=r"got dict: write networks.InMemory\(params, state\)"):
        plane_through.__wrapped__([{"w": jnp.ones(3)}] * 3)
    with pytest.raises(ValueError, match="three solutions, got 2"):
        through(solutions[:2])
    with pytest.raises(ValueError, match="differ in structure or shapes"):
        through([*solutions[:2], jax.tree.map(lambda a: a[..., None], solutions[2])])
    with pytest.raises(ValueError, match="differ in structure or shapes"):
        through([*solutions[:2], list(solutions[2])])


@pytest.mark.parametrize("seed", range(3))
def test_random_planes_match_the_norm_of_each_filter(seed: int, rng: np.random.Generator) -> None:
    x = jnp.zeros((1, 5))
    params, _ = multi_branch(mlp((4, 3), 2), 3).init(jax.random.key(seed), x)
    plane = landscape.random_plane(jax.random.key(seed), InMemory(params))
    origin, u, v = plane.whole().params
    jax.tree.map(np.testing.assert_array_equal, origin, params)
    np.testing.assert_array_equal(plane.anchors, np.zeros((1, 2)))
    assert plane.axes == "random"
    for axis in (u, v):
        for layer, moved in zip(params, axis, strict=True):
            kernel, step = (np.asarray(t["kernel"], np.float64) for t in (layer, moved))
            for i in range(3):
                for o in range(kernel.shape[1]):
                    assert np.linalg.norm(step[i, o]) == pytest.approx(np.linalg.norm(kernel[i, o]), rel=1e-5)
            assert not np.asarray(moved["bias"]).any()
            assert np.abs(step - kernel).max() > 1e-2
    assert np.abs(flat(u) - flat(v)).max() > 1e-2
    other = landscape.random_plane(jax.random.key(seed + 1), InMemory(params))
    assert np.abs(flat(u) - flat(other.whole().params[1])).max() > 1e-2
    assert plane.digest != other.digest


@pytest.mark.parametrize("branch_axes", [0, 1])
def test_random_planes_in_the_linen_layout(branch_axes: int, rng: np.random.Generator) -> None:
    lead = (2,) * branch_axes
    params = {
        "Conv": {
            "kernel": jnp.asarray(rng.normal(size=(*lead, 3, 3, 2, 5)), jnp.float32),
            "bias": jnp.ones((*lead, 5)),
        },
        "Dense": {"kernel": jnp.asarray(rng.normal(size=(*lead, 7, 4)), jnp.float32), "bias": jnp.ones((*lead, 4))},
        "Norm": {"scale": jnp.ones((*lead, 5))},
    }
    state = {"mean": jnp.ones((*lead, 5)), "count": jnp.asarray(3)}
    network = InMemory(params, state)
    plane = landscape.random_plane(jax.random.key(0), network, filter_axis=-1, branch_axes=branch_axes)
    block = plane.whole()
    for axis in block.params[1:]:
        for name in ("Conv", "Dense"):
            kernel, step = (np.asarray(t[name]["kernel"], np.float64) for t in (params, axis))
            inside = tuple(range(branch_axes, kernel.ndim - 1))
            for array in (kernel, step):
                assert np.ptp(np.linalg.norm(array.reshape(-1, kernel.shape[-1]), axis=0)) > 0.1
            np.testing.assert_allclose((step**2).sum(inside), (kernel**2).sum(inside), rtol=1e-5)
            assert not np.asarray(axis[name]["bias"]).any()
        assert not np.asarray(axis["Norm"]["scale"]).any()
    there = landscape.at(jnp.asarray(0.7), jnp.asarray(-2.0), *block.states)
    np.testing.assert_array_equal(there["mean"], state["mean"])
    assert there["count"] == 3


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_random_planes_of_filters_whose_squares_leave_the_range(size: float, rng: np.random.Generator) -> None:
    params = [{"kernel": jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32), "bias": jnp.zeros((2, 4))}]
    scaled = jax.tree.map(lambda a: a * np.float32(size), params)
    plain, other = (landscape.random_plane(jax.random.key(0), InMemory(tree)) for tree in (params, scaled))
    np.testing.assert_allclose(flat(other.whole().params[1]) / size, flat(plain.whole().params[1]), rtol=1e-5)


def test_random_planes_without_a_direction_or_an_axis_of_filters_are_refused() -> None:
    params = [{"kernel": jnp.ones((2, 4, 3)), "bias": jnp.zeros((2, 4))}]
    for axis in (2, -3):
        with pytest.raises(ValueError, match=rf"filter_axis={axis} is no axis of 0.kernel, \(4, 3\)"):
            landscape.random_plane(jax.random.key(0), InMemory(params), filter_axis=axis)
    for factor in (0.0, np.nan):
        network = InMemory([{"kernel": factor * jnp.ones((2, 4, 3))}])
        with pytest.raises(landscape.DegeneratePlaneError, match="0 or not finite"):
            landscape.random_plane(jax.random.key(0), network)
    with pytest.raises(landscape.DegeneratePlaneError, match="no leaf has 2 branch axes"):
        landscape.random_plane(jax.random.key(0), InMemory(params), branch_axes=2)


# --- surfaces ---------------------------------------------------------------------------------------------------------


def numpy_hinge(s: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(0, 1 - y * s[:, 0])


def numpy_logistic(s: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.log(np.exp(s - s.max(1, keepdims=True)).sum(1)) + s.max(1) - s[np.arange(len(y)), y]


def numpy_multi_margin(s: np.ndarray, y: np.ndarray) -> np.ndarray:
    own = s[np.arange(len(y)), y][:, None]
    return (np.maximum(0, 1 - own + s).sum(1) - 1) / s.shape[1]


def numpy_crammer_singer(s: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([max(0, 1 - (row[k] - np.delete(row, k).max())) for row, k in zip(s, y, strict=True)])


def numpy_squared(s: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 0.5 * (s[:, 0] - y) ** 2


class Case(NamedTuple):
    net: Network
    plane: Plane
    data: Dataset
    loss: Loss
    numpy_loss: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def __call__(self, xs: Any, ys: Any, **options: Any) -> np.ndarray:
        """The surface, `[ny, nx]`, with states interpolated."""
        options = {"state": "interpolate"} | options
        return evaluate(self.net, self.loss, self.data, self.plane, np.asarray(xs), np.asarray(ys), **options).loss

    def by_hand(self, xs: Any, ys: Any) -> np.ndarray:
        """The same by a loop over points: all parameters, all the data, the mean in NumPy."""
        x = (self.data.x.astype(np.float64) - self.data.mean) / self.data.std
        block = self.plane.whole()
        dtype = jax.tree.leaves(block.params)[0].dtype
        apply = jax.jit(self.net.apply)

        def point(tree: tuple[Any, Any, Any], a: float, b: float) -> Any:
            return jax.tree.map(
                lambda o, u, v: jnp.asarray(
                    np.asarray(o, np.float64) + a * np.asarray(u, np.float64) + b * np.asarray(v, np.float64), o.dtype
                ),
                *tree,
            )

        surface = np.zeros((len(ys), len(xs)))
        for j, b in enumerate(ys):
            for i, a in enumerate(xs):
                state = jax.tree.map(jnp.maximum, point(block.states, a, b), block.floor)
                outputs, _ = apply(point(block.params, a, b), state, jnp.asarray(x, dtype))
                y = self.data.y if self.data.task == "multiclass" else self.data.y.astype(np.float64)
                surface[j, i] = self.numpy_loss(np.asarray(outputs, np.float64), y).mean()
        return surface


def tanh_net(key: Any, x: Any) -> Any:
    return {"a": jnp.zeros((x.shape[1], 3)), "b": jnp.zeros((3, 1))}


def vectors(rng: np.random.Generator, n: int, task: str) -> Dataset:
    y, outputs = {
        "binary": (rng.choice([-1.0, 1.0], n).astype(np.float32), 1),
        "multiclass": (rng.integers(0, 3, n).astype(np.int32), 3),
        "regression": (rng.normal(size=n).astype(np.float32), 1),
    }[task]
    x, mean, std = rng.normal(size=(n, 5)), rng.normal(size=5), rng.uniform(0.5, 2, 5)
    return Dataset("drawn", x, y, mean, std, outputs, task, {})


def images(rng: np.random.Generator, n: int) -> Dataset:
    x = rng.integers(0, 256, (n, 4, 4, 1), dtype=np.uint8)
    mean, std = rng.uniform(100, 150, (4, 4, 1)), rng.uniform(50, 90, (4, 4, 1))
    return Dataset("images", x, rng.integers(0, 3, n).astype(np.int32), mean, std, 3, "multiclass", {})


def unlike() -> Network:
    halves = [multi_branch(mlp((3,), 3), 3, reduce="sum"), multi_branch(mlp((2, 2), 3, "tanh"), 2, reduce="sum")]
    return mixture(halves, weights=[0.2, 0.3])


NETWORKS: dict[str, tuple[Callable[[], Network], str, tuple[Loss, Callable[..., np.ndarray]]]] = {
    "mean": (lambda: multi_branch(mlp((4,), 1), 5), "binary", (binary_hinge(), numpy_hinge)),
    "sum": (lambda: multi_branch(mlp((4, 3), 3), 5, reduce="sum"), "multiclass", (multi_margin(), numpy_multi_margin)),
    "regression": (lambda: multi_branch(mlp((4,), 1), 5), "regression", (squared(), numpy_squared)),
    "affine": (lambda: multi_branch(mlp((), 3), 4), "multiclass", (logistic(), numpy_logistic)),
    "single": (lambda: mlp((4, 3), 3, "tanh"), "multiclass", (crammer_singer(), numpy_crammer_singer)),
    "no bias": (lambda: multi_branch(mlp((4,), 1, use_bias=False), 3), "binary", (binary_hinge(), numpy_hinge)),
    "nested": (lambda: multi_branch(multi_branch(mlp((3,), 3), 2), 3), "images", (multi_margin(), numpy_multi_margin)),
    "mixture": (unlike, "multiclass", (logistic(), numpy_logistic)),
    "functions": (
        lambda: from_functions(tanh_net, lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]),
        "regression",
        (squared(), numpy_squared),
    ),
    "batch norm": (
        lambda: multi_branch(conv((2,), 3, batch_norm=True), 2),
        "images",
        (logistic(), numpy_logistic),
    ),
}
WITHOUT_STEM = ("functions", "batch norm")


def make(name: str, rng: np.random.Generator, dtype: Any = np.float64, n: int = 11, axes: str = "authors") -> Case:
    """A network of the table, data with statistics that are not 0 and 1, and the plane through three random points."""
    build, task, (loss, numpy_loss) = NETWORKS[name]
    net = build()
    data = images(rng, n) if task == "images" else vectors(rng, n, task)
    if data.x.dtype != np.uint8:
        data = data._replace(x=data.x.astype(dtype))
    data = data._replace(mean=data.mean.astype(dtype), std=data.std.astype(dtype))
    shapes, states = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *data.x.shape[1:]), dtype))
    params = [jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), dtype), shapes) for _ in range(3)]
    batch_stats = [jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.5, 2, s.shape), dtype), states) for _ in range(3)]
    return Case(net, through(params, axes, batch_stats), data, loss, numpy_loss)


XS, YS = (-0.9, -0.1, 0.4, 1.1), (-0.5, 0.0, 0.8)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.usefixtures("x64")
def test_both_routes_equal_a_loop_over_points_in_float64(name: str, rng: np.random.Generator) -> None:
    case = make(name, rng, axes="orthonormal" if name == "sum" else "authors")
    expected = case.by_hand(XS, YS)
    assert np.ptp(expected) > 1e-3
    assert (case.net.stem is None) == (name in WITHOUT_STEM)
    chunks = {"sample_chunk": 4, "branch_chunk": 2, "point_chunk": 5}  # 11 samples, 5 branches, 12 points
    plain = case(XS, YS, route="plain", **chunks)
    assert plain.shape == (3, 4)
    assert plain.dtype == np.float64
    np.testing.assert_allclose(plain, expected, rtol=1e-12)
    other = case(XS, YS, route="auto" if name in WITHOUT_STEM else "stem", **chunks)
    np.testing.assert_allclose(other, plain, rtol=1e-12)


@pytest.mark.parametrize("name", ["sum", "regression", "nested", "mixture"])
def test_routes_agree_in_float32(name: str, rng: np.random.Generator) -> None:
    case = make(name, rng, np.float32, n=300)
    plain, stem = (case(XS, YS, route=route, sample_chunk=128) for route in ("plain", "stem"))
    np.testing.assert_allclose(stem, plain, rtol=1e-5)
    np.testing.assert_allclose(plain, case.by_hand(XS, YS), rtol=1e-5)


@pytest.mark.parametrize(
    "chunks",
    [
        {"sample_chunk": 11, "route": "stem"},
        {"sample_chunk": 1000, "route": "plain"},
        {"branch_chunk": 1},
        {"branch_chunk": 3},
        {"branch_chunk": 99},
        {"point_chunk": 1},
        {"point_chunk": 4},
        {"point_chunk": 99},
        {"point_chunk": 7, "route": "plain", "sample_chunk": 1},
        {"sample_chunk": 1, "branch_chunk": 2, "point_chunk": 5},
    ],
)
@pytest.mark.usefixtures("x64")
def test_surfaces_do_not_depend_on_the_chunks(chunks: dict[str, Any]) -> None:
    case = make("mean", np.random.default_rng(0))
    np.testing.assert_allclose(case(XS, YS, **chunks), case.by_hand(XS, YS), rtol=1e-12)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that GPUs get, compiled for this machine."""
    monkeypatch.setattr(kernels, "on_gpu", lambda: True)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "chunks", [{}, {"branch_chunk": 2, "point_chunk": 5, "sample_chunk": 4}, {"branch_chunk": 3, "point_chunk": 1}]
)
@pytest.mark.usefixtures("x64", "as_on_a_gpu")
def test_the_kernels_of_a_gpu_give_the_same(name: str, chunks: dict[str, int], rng: np.random.Generator) -> None:
    case = make(name, rng)
    expected = case.by_hand(XS, YS)
    for route in ("auto", "plain"):
        np.testing.assert_allclose(case(XS, YS, route=route, **chunks), expected, rtol=1e-12)


def test_the_kernels_of_a_gpu_slice_no_branches_inside_their_loop(rng: np.random.Generator) -> None:
    case = make("mean", rng, np.float32)
    made = kernels.kernels(case.net, case.loss, False, 5, 2, 3, gpu=True)
    block = case.plane.whole()
    x = jnp.asarray(case.data.x, jnp.float32)
    z = made.below(block.params, x)
    total = jnp.zeros((6, len(x), case.data.num_outputs))
    jaxpr = jax.make_jaxpr(made.add)(total, block, (), z, jnp.zeros((6, 2)))
    inside = slices_in_loops(jaxpr.jaxpr, False)
    assert inside == []
    outside = slices_in_loops(jaxpr.jaxpr, True)
    assert outside, "nothing is sliced anywhere: the test shows nothing"


def slices_in_loops(jaxpr: Any, inside: bool) -> list[str]:
    """Names of the dynamic slices in a program: of all of it, or (`inside` False at the top) of the bodies of loops."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dynamic_slice" and inside:
            found.append(str(eqn))
        loop = inside or eqn.primitive.name in ("scan", "while")
        for parameter in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                found += slices_in_loops(inner, loop)
    return found


@pytest.mark.usefixtures("x64")
def test_grids_of_any_shape_are_laid_out_ys_by_xs(rng: np.random.Generator) -> None:
    case = make("mean", rng)
    for xs, ys in (([0.3], [-0.2]), ([0.1, 0.2, 0.3, 0.4, 0.5], [1.0]), ([2.0], [0.0, -1.0, 3.0])):
        surface = evaluate(case.net, case.loss, case.data, case.plane, np.asarray(xs), np.asarray(ys))
        np.testing.assert_array_equal(surface.xs, xs)
        np.testing.assert_array_equal(surface.ys, ys)
        np.testing.assert_allclose(surface.loss, case.by_hand(xs, ys), rtol=1e-12)
    one = evaluate_points(case.net, case.loss, case.data, case.plane, np.array([[0.3, -0.2], [0.3, -0.2]]))
    np.testing.assert_allclose(one, case.by_hand([0.3], [-0.2])[0, 0], rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_surface_at_the_anchors_is_the_loss_of_the_solutions(rng: np.random.Generator) -> None:
    build, _, (loss, _) = NETWORKS["mean"]
    net, data = build(), vectors(rng, 13, "binary")
    shapes, _ = jax.eval_shape(net.init, jax.random.key(0), jnp.asarray(data.x[:1]))
    solutions = [jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes) for _ in range(3)]
    x, y = jnp.asarray((data.x - data.mean) / data.std), data.y.astype(np.float64)
    expected = [numpy_hinge(np.asarray(net.apply(w, (), x)[0]), y).mean() for w in solutions]
    for axes in landscape.AXES:
        plane = through(solutions, axes)
        np.testing.assert_allclose(evaluate_points(net, loss, data, plane, plane.anchors), expected, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_edges_run_along_the_straight_lines(rng: np.random.Generator) -> None:
    case = make("mean", rng)
    t, losses = edges(case.net, case.loss, case.data, case.plane, num_points=6, sample_chunk=4)
    np.testing.assert_allclose(t, [0, 0.2, 0.4, 0.6, 0.8, 1], atol=1e-15)
    assert losses.shape == (3, 6)
    for k, (i, j) in enumerate(((0, 1), (1, 2), (2, 0))):
        points = [(1 - s) * case.plane.anchors[i] + s * case.plane.anchors[j] for s in t]
        along = evaluate_points(case.net, case.loss, case.data, case.plane, np.array(points))
        np.testing.assert_allclose(losses[k], along, rtol=1e-12)
        np.testing.assert_allclose(losses[k], [case.by_hand([a], [b])[0, 0] for a, b in points], rtol=1e-11)
    assert len({round(v, 9) for v in losses.ravel().tolist()}) == 15  # three ends are met twice


@pytest.mark.parametrize("route", ["stem", "plain"])
def test_points_that_overflow_stay_visible_and_harm_no_other(route: str, rng: np.random.Generator) -> None:
    case = make("mean", rng, np.float32)
    xs = [-0.5, 0.5, 3e38, 1.0, math.nan]
    surface = case(xs, YS, route=route, point_chunk=4, sample_chunk=4)
    assert not np.isfinite(surface[:, [2, 4]]).any()
    np.testing.assert_allclose(surface[:, [0, 1, 3]], case.by_hand([-0.5, 0.5, 1.0], YS), rtol=1e-5)


OWN_HINGE = Loss(lambda o, y: jnp.maximum(0, 1 - y * o[:, 0]), None, None, ("binary",))


def root_net(width: int) -> Network:
    """`sqrt(a) x`: not a number wherever a < 0."""
    return from_functions(
        lambda key, x: {"a": jnp.ones(1)},
        lambda p, x: jnp.sqrt(p["a"])[None, :] * jnp.tile(x[:, :1], (1, width)),
    )


@pytest.mark.optimized
@pytest.mark.parametrize(
    "loss",
    [binary_hinge(0.5), multi_margin(), crammer_singer(), logistic(), squared(), OWN_HINGE],
    ids=["hinge", "multi-margin", "crammer-singer", "logistic", "squared", "own"],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_outputs_that_are_not_numbers_reach_the_surface_in_batches_of_every_size(
    loss: Loss, stacked: bool, rng: np.random.Generator
) -> None:
    width = 1 if "binary" in loss.tasks else 10
    net = multi_branch(root_net(width), 3) if stacked else root_net(width)
    data = vectors(rng, 5000, "binary" if width == 1 else "multiclass")._replace(num_outputs=width)
    one = {"a": jnp.ones((3, 1) if stacked else (1,))}
    still = jax.tree.map(jnp.zeros_like, one)
    members = InMemory(one), InMemory(one), InMemory(still)
    plane = Plane(members, np.eye(3), np.zeros((1, 2)), "random", "")
    points = np.stack([rng.uniform(-3, 1, 70), np.zeros(70)], axis=1)
    for chunk in (1, 5000) if width == 1 else (256,):
        some = data if chunk > 1 else data._replace(x=data.x[:3], y=data.y[:3])
        values = evaluate_points(net, loss, some, plane, points, sample_chunk=chunk)
        np.testing.assert_array_equal(np.isnan(values), points[:, 0] < -1)
    poisoned = data._replace(x=np.where(np.arange(5000)[:, None] == 4321, np.nan, data.x))
    assert np.isnan(evaluate_points(net, loss, poisoned, plane, points[:2], sample_chunk=5000)).all()


def test_examples_that_are_not_finite_are_not_blamed_on_the_network(rng: np.random.Generator) -> None:
    case = make("batch norm", rng, np.float32)
    x = np.asarray(case.data.x, np.float32)
    x[3, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="estimated anew hold numbers that are not finite"):
        evaluate_points(case.net, logistic(), case.data._replace(x=x), case.plane, np.zeros((1, 2)))


@pytest.mark.parametrize("name", ["mean", "single", "nested", "mixture"])
def test_the_first_layer_is_computed_three_times_a_batch_however_many_points(
    name: str, rng: np.random.Generator
) -> None:
    case = make(name, rng, np.float32)
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    def preactivation(params: Any, x: Any) -> Any:
        jax.debug.callback(count)
        return case.net.stem.preactivation(params, x)

    def apply(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("evaluated in full")

    stacked, mixed = (s if s is None else s._replace(apply=apply) for s in (case.net.stacked, case.net.mixed))
    stem = case.net.stem._replace(preactivation=preactivation, apply=apply)
    net = case.net._replace(apply=apply, stem=stem, stacked=stacked, mixed=mixed)
    for xs, ys in ((XS[:1], YS[:1]), (XS, YS)):
        calls = 0
        surface = case._replace(net=net)(xs, ys, sample_chunk=4)
        jax.effects_barrier()
        assert calls == 3 * 3  # origin, u and v; batches of 4, 4 and 3
        np.testing.assert_allclose(surface, case(xs, ys, route="plain"), rtol=1e-5)
    with pytest.raises(RuntimeError, match="evaluated in full"):
        case._replace(net=net)(XS, YS, route="plain")


# --- interruption -----------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("route", ["stem", "plain"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_an_interrupted_grid_goes_on_where_it_was(
    route: str, share: float, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "workers", lambda: 2)
    case, partial = make("sum", rng, np.float32), tmp_path / "new" / "partial.npz"
    xs, ys = np.linspace(-1, 1, 9), np.linspace(-0.7, 0.7, 8)
    options = {"route": route, "point_chunk": 4, "sample_chunk": 4, "partial": partial}
    updates = 0

    class Watched(points.Progress):
        stop_at = math.inf

        def update(self, done: int, note: str = "") -> None:
            nonlocal updates
            updates += 1
            if updates == self.stop_at:
                raise Stopped

    monkeypatch.setattr(points, "Progress", Watched)
    expected = case(xs, ys, **options)
    assert not partial.exists()
    whole, updates = updates, 0
    assert whole >= 6  # two blocks of points, three of samples
    blocks = Watched.stop_at = max(1, round(share * (whole - 1)))
    with pytest.raises(Stopped):
        case(xs, ys, **options)
    stored = load_npz(partial)
    seen = stored["seen"]
    assert seen.shape == stored["sums"].shape == (72,)
    assert 0 < seen.sum() < 72 * 11
    assert set(seen.tolist()) <= {0, 4, 8, 11}
    assert not stored["sums"][seen == 0].any()
    updates, Watched.stop_at = 0, math.inf
    np.testing.assert_array_equal(case(xs, ys, **options), expected)
    assert updates == whole - blocks
    assert not partial.exists()


def test_work_that_was_done_is_not_done_again(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "workers", lambda: 1)
    case, partial = make("functions", rng, np.float32), tmp_path / "partial.npz"
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    def apply(*args: Any, **kwargs: Any) -> Any:
        jax.debug.callback(count)
        return case.net.apply(*args, **kwargs)

    counted = case._replace(net=case.net._replace(apply=apply))
    xs, ys = np.linspace(-1, 1, 8), np.linspace(-1, 1, 16)

    def stop(self: Any, done: int, note: str = "") -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(points.Progress, "update", stop)
        with pytest.raises(Stopped):
            counted(xs, ys, sample_chunk=11, partial=partial)
    jax.effects_barrier()
    done = int((load_npz(partial)["seen"] == 11).sum())
    assert 0 < done < 128
    calls = 0
    surface = counted(xs, ys, sample_chunk=11, partial=partial)
    jax.effects_barrier()
    assert 128 - done <= calls < 128
    np.testing.assert_allclose(surface, case.by_hand(xs, ys), rtol=1e-5)


def interrupted(case: Case, partial: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Leaves a partial file."""

    def stop(self: Any, done: int, note: str = "") -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(points.Progress, "update", stop)
        with pytest.raises(Stopped):
            case(XS, YS, **{"sample_chunk": 4, "partial": partial, **options})


def with_sums(partial: Path, value: float) -> None:
    """Marks what a partial file holds, to see whether it is used."""
    fields = load_npz(partial)
    save_npz(partial, **fields | {"sums": np.full(12, value), "seen": np.full(12, 4)})


def others(case: Case, rng: np.random.Generator) -> dict[str, tuple[Case, dict[str, Any], str]]:
    """Evaluations that differ in one thing, and the word for it."""
    data, net = case.data, case.net
    negative = [InMemory(jax.tree.map(jnp.negative, s.params)) for s in case.plane.sources]  # of equal inner products
    swapped = [case.plane.sources[i] for i in (1, 0, 2)]
    whole = InMemory(case.plane.whole().params[0])
    return {
        "loss": (case._replace(loss=binary_hinge(0.5)), {}, "the loss differs"),
        "own loss": (case._replace(loss=OWN_HINGE), {}, "the loss differs"),
        "labels": (case._replace(data=data._replace(y=-data.y)), {}, "the data differs"),
        "pixels": (case._replace(data=data._replace(x=data.x + 1e-3 * (data.x > 2))), {}, "the data differs"),
        "statistics": (case._replace(data=data._replace(std=2 * data.std)), {}, "the data differs"),
        "fewer": (case._replace(data=data._replace(x=data.x[:9], y=data.y[:9])), {}, "the data differs"),
        "network": (case._replace(net=multi_branch(mlp((4,), 1, "tanh"), 5)), {}, "the network differs"),
        "sum": (case._replace(net=multi_branch(mlp((4,), 1), 5, reduce="sum")), {}, "the network differs"),
        "negative": (case._replace(plane=plane_through(negative)), {}, "the plane differs"),
        "swapped": (case._replace(plane=plane_through(swapped)), {}, "the plane differs"),
        "axes": (case._replace(plane=plane_through(case.plane.sources, "orthonormal")), {}, "the plane differs"),
        "random": (case._replace(plane=landscape.random_plane(jax.random.key(0), whole)), {}, "the plane differs"),
        "route": (case._replace(net=net), {"route": "plain"}, "the route is"),
        "batches": (case, {"sample_chunk": 8}, "the size of the parts is"),
        "chunks": (case, {"branch_chunk": 2}, "the size of the parts is"),
    }


def test_unfinished_work_of_another_evaluation_is_refused_by_the_name_of_the_difference(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, partial = make("mean", rng, np.float32), tmp_path / "partial.npz"
    interrupted(case, partial, monkeypatch)
    before = partial.read_bytes()
    for name, (other, options, words) in others(case, rng).items():
        with pytest.raises(IdentityError, match=f"partial.npz holds another run: {words}"):
            other(XS, YS, **{"sample_chunk": 4, "partial": partial, **options})
        assert partial.read_bytes() == before, name
    with_sums(partial, 1e6)
    assert (case(XS, YS, sample_chunk=4, partial=partial) > 1e4).all()  # the same evaluation goes on from it


def test_another_grid_and_another_state_are_refused(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, partial = make("batch norm", rng, np.float32), tmp_path / "partial.npz"
    interrupted(case, partial, monkeypatch)
    for xs in (np.asarray(XS) + 0.1, np.asarray(XS)[::-1]):
        with pytest.raises(IdentityError, match="the points differs"):
            case(xs, YS, sample_chunk=4, partial=partial)
    for options in ({"state": "estimate"}, {"state_samples": 5}):
        with pytest.raises(IdentityError, match=r"the state is \[\"interpolate\", 256\] and not"):
            case(XS, YS, sample_chunk=4, partial=partial, **options)


def test_a_partial_file_that_does_not_say_what_it_is_of_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    case, partial = make("mean", rng, np.float32), tmp_path / "partial.npz"
    save_npz(partial, sums=np.zeros(12), seen=np.zeros(12, int), parts=np.zeros((0, 3), int))
    with pytest.raises(IdentityError, match="does not say which run it is of"):
        case(XS, YS, partial=partial)


@pytest.mark.parametrize("what", ["torn", "empty", "text", "one bit"])
def test_a_damaged_partial_file_is_said_and_computed_again(
    what: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, partial = make("mean", rng, np.float32), tmp_path / "partial.npz"
    interrupted(case, partial, monkeypatch)
    with_sums(partial, 1e6)
    whole = partial.read_bytes()
    at = whole.index(np.full(12, 1e6).tobytes())
    flipped = whole[: at + 6] + bytes([whole[at + 6] ^ 1]) + whole[at + 7 :]
    partial.write_bytes({"torn": whole[:-40], "empty": b"", "text": b"not an archive", "one bit": flipped}[what])
    with pytest.warns(UserWarning, match=r"computed again, its file is damaged: .*partial\.npz"):
        surface = case(XS, YS, sample_chunk=4, partial=partial)
    np.testing.assert_allclose(surface, case.by_hand(XS, YS), rtol=1e-5)
    assert not partial.exists()


# --- running statistics -----------------------------------------------------------------------------------------------


def numpy_batch_norm_outputs(params: Any, x: np.ndarray) -> np.ndarray:
    """Outputs of one branch `dense(tanh(batch_norm(dense(x))))` on a batch, normalised by the batch."""
    z = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"]
    z = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)
    z = z * params["BatchNorm_0"]["scale"] + params["BatchNorm_0"]["bias"]
    return np.tanh(z) @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"]


class Normalised(nn.Module):
    momentum: float = 0.9
    rate: float = 0.0

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.Dense(4, param_dtype=x.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum, param_dtype=x.dtype)(x)
        x = nn.Dropout(self.rate, deterministic=not train)(jnp.tanh(x))
        return nn.Dense(1, param_dtype=x.dtype)(x)


def normalised_case(net: Network, rng: np.random.Generator, n: int = 40) -> Case:
    data = vectors(rng, n, "binary")
    init = jax.jit(net.init)
    pairs = [init(jax.random.key(k), jnp.asarray(data.x[:1])) for k in range(3)]
    params = [jax.tree.map(lambda w: w + 0.3 * jnp.asarray(rng.normal(size=w.shape)), p) for p, _ in pairs]
    return Case(net, through(params, states=[s for _, s in pairs]), data, binary_hinge(), numpy_hinge)


@pytest.mark.parametrize(("stacked", "momentum"), [(True, 0.99), (False, 0.0)])
@pytest.mark.usefixtures("x64")
def test_batch_statistics_are_estimated_anew_at_every_point(
    stacked: bool, momentum: float, rng: np.random.Generator
) -> None:
    """Where the batch is the whole data set, the networks are normalised by the data set."""
    branch = from_linen(Normalised(momentum))
    case = normalised_case(multi_branch(branch, 5) if stacked else branch, rng)
    x = (case.data.x - case.data.mean) / case.data.std
    origin, u, v = (jax.tree.map(np.asarray, tree) for tree in case.plane.whole().params)
    expected = np.zeros((3, 4))
    for (j, b), (i, a) in itertools.product(enumerate(YS), enumerate(XS)):
        w = jax.tree.map(lambda o, du, dv, a=a, b=b: o + a * du + b * dv, origin, u, v)
        branches = [jax.tree.map(lambda leaf, k=k: leaf[k], w) for k in range(5)] if stacked else [w]
        outputs = np.mean([numpy_batch_norm_outputs(one, x) for one in branches], axis=0)
        expected[j, i] = numpy_hinge(outputs, case.data.y.astype(np.float64)).mean()
    for options in (
        {},
        {"route": "plain", "sample_chunk": 7},
        {"branch_chunk": 2, "point_chunk": 3, "sample_chunk": 9},
    ):
        surface = case(XS, YS, **{"state": "estimate", **options})
        np.testing.assert_allclose(surface, expected, rtol=1e-10)
    assert np.abs(case(XS, YS) - expected).max() > 1e-3  # interpolated statistics are others


class NnxNormalised(nnx.Module):
    """`Normalised` as NNX modules, whose running averages lie behind a stopped gradient."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(5, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(jnp.tanh(self.norm(self.first(x))))


@pytest.mark.parametrize("stacked", [True, False])
def test_batch_statistics_of_nnx_modules_are_those_of_their_linen_twins(
    stacked: bool, rng: np.random.Generator
) -> None:
    linen_branch, nnx_branch = from_linen(Normalised(0.9)), from_nnx(NnxNormalised)
    nets = [multi_branch(branch, 3) if stacked else branch for branch in (linen_branch, nnx_branch)]
    case = normalised_case(nets[0], rng)
    sources = []
    for key, source in enumerate(case.plane.sources):
        given = source.params
        twin = {"first": given["Dense_0"], "norm": given["BatchNorm_0"], "last": given["Dense_1"]}
        params, state = nets[1].init(jax.random.key(key), jnp.asarray(case.data.x[:1]))
        leaves, form = jax.tree.flatten(params)
        moved = jax.tree.leaves({name: twin[name] for name in sorted(twin)})
        assert [leaf.shape for leaf in leaves] == [leaf.shape for leaf in moved]
        sources.append(InMemory(form.unflatten(moved), state))
    twins = case._replace(net=nets[1], plane=plane_through(sources))
    for state in landscape.STATES:
        surface = twins(XS, YS, state=state)
        assert np.ptp(surface) > 0.01
        np.testing.assert_allclose(surface, case(XS, YS, state=state), rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_momenta_are_exact_behind_a_stopped_gradient(momentum: float, scale: float, rng: np.random.Generator) -> None:
    def apply(params: Any, state: Any, x: Any, *, key: Any = None, train: bool = False) -> Any:
        mean, var = momentum * state[0] + (1 - momentum) * x.mean(0), momentum * state[1] + (1 - momentum) * x.var(0)
        return x @ params, lax.stop_gradient((mean, var, state[2])) if train else state

    x = jnp.asarray(scale * rng.standard_normal((20, 3)), jnp.float32)
    net = Network(lambda key, x: (jnp.ones((3, 1)), (jnp.zeros(3), jnp.ones(3), jnp.zeros(()))), apply)
    keep = momenta(net, *net.init(jax.random.key(0), x), x)
    for found in keep[:2]:
        np.testing.assert_allclose(1 - np.asarray(found, np.float64), 1 - momentum, rtol=1e-4)
    assert keep[2] == 1  # untouched by training


@pytest.mark.usefixtures("x64")
def test_statistics_of_a_part_of_the_data_are_those_of_the_stated_examples(rng: np.random.Generator) -> None:
    case = normalised_case(from_linen(Normalised()), rng)
    part = case.data._replace(x=case.data.x[[0, 10, 20, 29, 39]], y=case.data.y[[0, 10, 20, 29, 39]])
    x = jnp.asarray((part.x - part.mean) / part.std)
    origin, u, v = case.plane.whole().params
    w = jax.tree.map(lambda o, du, dv: o + 0.3 * du - 0.2 * dv, origin, u, v)
    state: Any = {"batch_stats": {"BatchNorm_0": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}}
    update = jax.jit(lambda state: case.net.apply(w, state, x, train=True)[1])
    for _ in range(400):  # what running averages converge to
        state = update(state)
    whole = jnp.asarray((case.data.x - case.data.mean) / case.data.std)
    expected = numpy_hinge(np.asarray(case.net.apply(w, state, whole)[0]), case.data.y.astype(np.float64)).mean()
    got = evaluate_points(
        case.net, case.loss, case.data, case.plane, np.asarray([[0.3, -0.2]]), state_samples=5, sample_chunk=16
    )
    assert got[0] == pytest.approx(expected, rel=1e-10)


def test_a_barrier_with_and_without_statistics_of_its_own(rng: np.random.Generator) -> None:
    """Half-way between networks that have nothing in common the variances are far below their means."""
    branch = from_linen(Normalised())
    data = vectors(rng, 200, "binary")
    x = jnp.asarray((data.x - data.mean) / data.std, jnp.float32)
    data = data._replace(x=np.asarray(x), mean=np.zeros(5, np.float32), std=np.ones(5, np.float32))
    solutions = []
    update = jax.jit(lambda params, state: branch.apply(params, state, x, train=True)[1])
    for key in range(3):
        params, state = jax.jit(branch.init)(jax.random.key(key), x[:1])
        for _ in range(200):
            state = update(params, state)
        solutions.append(InMemory(params, state))
    plane = plane_through(solutions)
    found = {
        how: edges(branch, binary_hinge(), data, plane, num_points=9, state=how, state_samples=200)[1]
        for how in landscape.STATES
    }
    ends = [0, -1]
    np.testing.assert_allclose(found["estimate"][:, ends], found["interpolate"][:, ends], rtol=1e-3)
    assert np.abs(found["estimate"] - found["interpolate"])[:, 1:-1].max() > 0.01


@pytest.mark.usefixtures("x64")
def test_interpolated_variances_stay_positive(rng: np.random.Generator) -> None:
    case = normalised_case(multi_branch(from_linen(Normalised()), 3), rng)
    sources = [
        InMemory(s.params, jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.1, 3, leaf.shape)), s.state))
        for s in case.plane.sources
    ]
    case = case._replace(plane=plane_through(sources))
    far = case((-40.0, 0.1, 40.0), (-40.0, 0.2, 40.0))
    assert np.isfinite(far).all()
    np.testing.assert_allclose(far, case.by_hand((-40.0, 0.1, 40.0), (-40.0, 0.2, 40.0)), rtol=1e-10)


def test_dropout_does_not_keep_statistics_from_being_estimated(rng: np.random.Generator) -> None:
    case = normalised_case(multi_branch(from_linen(Normalised(rate=0.5)), 3), rng)
    surface = case(XS, YS, state="estimate")
    np.testing.assert_array_equal(surface, case(XS, YS, state="estimate"))
    assert np.isfinite(surface).all()


def test_a_state_that_is_no_running_average_is_refused(rng: np.random.Generator) -> None:
    def init(key: Any, x: Any) -> Any:
        return {"w": jax.random.normal(key, (x.shape[1], 1))}, {"largest": jnp.zeros(())}

    def apply(params: Any, state: Any, x: Any, *, key: Any = None, train: bool = False) -> Any:
        largest = jnp.maximum(state["largest"], jnp.max(jnp.abs(x))) if train else state["largest"]
        return x @ params["w"], {"largest": largest}

    def reads(params: Any, state: Any, x: Any, *, key: Any = None, train: bool = False) -> Any:
        y = x @ params["w"] + lax.stop_gradient(state["largest"])  # which a running average of training does not enter
        return y, {"largest": 0.9 * state["largest"] + 0.1 * jnp.mean(x)} if train else state

    with pytest.raises(ValueError, match="no running average, so it cannot be estimated anew; pass state="):
        normalised_case(Network(init, reads), rng)(XS, YS, state="estimate")
    case = normalised_case(Network(init, apply), rng)
    with pytest.raises(ValueError, match="no running average, so it cannot be estimated anew; pass state="):
        case(XS, YS, state="estimate")
    assert np.isfinite(case(XS, YS)).all()
    with pytest.raises(UnknownNameError, match=r"unknown state 'estimated'\. Did you mean 'estimate'"):
        case(XS, YS, state="estimated")


def test_counters_in_the_state_are_left_alone(rng: np.random.Generator) -> None:
    def init(key: Any, x: Any) -> Any:
        return {"w": jax.random.normal(key, (x.shape[1], 1))}, {"count": jnp.asarray(3)}

    def apply(params: Any, state: Any, x: Any, *, key: Any = None, train: bool = False) -> Any:
        return x @ params["w"] * state["count"], {"count": state["count"] + train}

    case = normalised_case(Network(init, apply), rng)
    np.testing.assert_array_equal(case(XS, YS, state="estimate"), case(XS, YS))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_networks_of_flax_modules_are_given_by_their_parameters_alone(rng: np.random.Generator) -> None:
    net = multi_branch(from_linen(nn.Dense(3)), 4)
    data = (rng.standard_normal((6, 4)).astype(np.float32), np.arange(6) % 3)
    drawn = [net.init(jax.random.key(seed), jnp.asarray(data[0])) for seed in range(3)]
    spots = rng.uniform(-1, 1, (3, 2))
    bare = evaluate_points(net, multi_margin(), data, plane_through([InMemory(p) for p, _ in drawn]), spots)
    with_state = evaluate_points(net, multi_margin(), data, plane_through([InMemory(*d) for d in drawn]), spots)
    np.testing.assert_array_equal(bare, with_state)


def test_misuse_of_evaluate_is_named(rng: np.random.Generator) -> None:
    case = make("mean", rng, np.float32)
    with pytest.raises(
        UnknownNameError, match=r"unknown route 'stm'. Did you mean 'stem'\? Allowed: auto, plain, stem"
    ):
        case(XS, YS, route="stm")
    with pytest.raises(ValueError, match="network with a stem; this one names none"):
        make("functions", rng, np.float32)(XS, YS, route="stem")
    for name in ("sample_chunk", "branch_chunk", "point_chunk"):
        with pytest.raises(ValueError, match="must be a positive integer, got 0"):
            case(XS, YS, **{name: 0})
    for xs, ys in (([], YS), (XS, []), (np.zeros((2, 2)), YS), (XS, 0.5)):
        with pytest.raises(ValueError, match="non-empty vectors"):
            landscape.evaluate.__wrapped__(case.net, case.loss, case.data, case.plane, xs, ys)
    for bad in (np.nan, np.inf, np.ma.masked):
        ticks = np.ma.masked_array(np.linspace(-1, 1, 4))
        ticks[rng.integers(4)] = bad
        found = landscape.evaluate.__wrapped__(case.net, case.loss, case.data, case.plane, ticks, YS).loss
        held = np.isfinite(np.ma.filled(ticks, np.nan))
        assert np.isfinite(found[:, held]).all()
        assert not np.isfinite(found[:, ~held]).any()  # visible, and no loss of another point
    for number in (0, -3, 2.5, "3", None, True):
        with pytest.raises(ValueError, match="number of points along an edge must be a positive integer, got"):
            landscape.edges.__wrapped__(case.net, case.loss, case.data, case.plane, num_points=number)
        with pytest.raises(ValueError, match="number of points along an edge must be a positive integer, got"):
            landscape.survey.__wrapped__(case.net, case.loss, case.data, case.plane, XS, YS, edge_points=number)
    with pytest.raises(ValueError, match="two ends"):
        landscape.edges.__wrapped__(case.net, case.loss, case.data, case.plane, num_points=1)
    call = functools.partial(evaluate_points.__wrapped__, case.net, case.loss, case.data, case.plane)
    for wrong in (np.zeros(4), np.zeros((2, 3)), np.zeros((0, 2))):
        with pytest.raises(ValueError, match=r"points must have shape \[P, 2\]"):
            call(wrong)


@pytest.mark.parametrize("width", [2, 4])
def test_data_of_another_width_are_refused_by_shape(width: int, rng: np.random.Generator) -> None:
    net, loss = multi_branch(mlp((2,), 1), 2), binary_hinge()
    x = rng.standard_normal((6, 3)).astype(np.float32)
    networks = [InMemory(*jax.jit(net.init)(jax.random.key(k), jnp.asarray(x))) for k in range(3)]
    other = rng.standard_normal((6, width)).astype(np.float32), np.sign(x[:, 0])
    for call in (
        lambda: evaluation.evaluate(net, loss, other, networks[0]),
        lambda: landscape.hessian(net, loss, other, networks[0]),
        lambda: evaluate_points(net, loss, other, plane_through(networks), np.zeros((1, 2))),
    ):
        with pytest.raises(ConfigError, match=rf"does not take examples of shape \({width},\), as those of data set"):
            call()


@pytest.mark.parametrize(
    "given",
    [{"filter_axis": 0.5}, {"filter_axis": "0"}, {"filter_axis": True}, {"branch_axes": -1}, {"branch_axes": 0.5}],
)
def test_random_planes_with_axes_that_are_none_are_refused(given: Any, rng: np.random.Generator) -> None:
    net = multi_branch(mlp((2,), 1), 2)
    network = InMemory(*net.init(jax.random.key(0), jnp.zeros((1, 3))))
    with pytest.raises(ValueError, match="must be a whole number"):
        inspect.unwrap(landscape.random_plane)(jax.random.key(0), network, **given)
    for key in (0, None, "key", np.ones(3)):
        with pytest.raises(TypeError, match=r"must be a key of JAX, such as jax.random.key\(0\)"):
            inspect.unwrap(landscape.random_plane)(key, network)


def test_a_random_plane_has_no_edges(rng: np.random.Generator) -> None:
    net = multi_branch(mlp((2,), 1), 2)
    params, _ = net.init(jax.random.key(0), jnp.ones((1, 3)))
    plane = landscape.random_plane(jax.random.key(1), InMemory(params))
    x = rng.standard_normal((4, 3)).astype(np.float32)
    data = Dataset("d", x, np.ones(4, np.float32), np.zeros(3, np.float32), np.ones(3, np.float32), 1, "binary", {})
    with pytest.raises(ValueError, match="three solutions"):
        edges(net, binary_hinge(), data, plane)
