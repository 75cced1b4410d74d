"""Planes against the formulas in NumPy; surfaces against a loop over points that evaluates each one in full."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualgap_jax import landscape
from dualgap_jax.data import Dataset
from dualgap_jax.files import load_npz, save_npz
from dualgap_jax.landscape import DegeneratePlaneError, Plane, edges, evaluate, evaluate_points, plane_through
from dualgap_jax.losses import Loss, binary_hinge, crammer_singer, logistic, multi_margin, squared
from dualgap_jax.networks import conv, from_functions, mixture, mlp, multi_branch
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


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.usefixtures("x64")
def test_authors_axes_are_those_of_their_code(scale: float, rng: np.random.Generator) -> None:
    for _ in range(3):
        solutions = [random_tree(rng, scale) for _ in range(3)]
        plane = plane_through(solutions, "authors")
        w0, w1, w2 = map(flat, solutions)
        length = np.linalg.norm(w2)
        np.testing.assert_allclose(flat(plane.origin), (w0 + w1 + w2) / 3, rtol=1e-12, atol=1e-14 * length)
        for axis, other in ((plane.u, w1), (plane.v, w2)):
            expected = (w0 - other) * length / np.linalg.norm(w0 - other)
            np.testing.assert_allclose(flat(axis), expected, rtol=1e-11, atol=1e-13 * length)
            assert jax.tree.structure(axis) == jax.tree.structure(solutions[0])
        check_anchors(plane, solutions, 1e-12)
        assert plane.axes == "authors"
        assert plane.states == ((), (), ())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.usefixtures("x64")
def test_orthonormal_axes_give_true_distances(scale: float, rng: np.random.Generator) -> None:
    for _ in range(3):
        solutions = [random_tree(rng, scale) for _ in range(3)]
        plane = plane_through(solutions, axes="orthonormal")
        u, v, w = flat(plane.u), flat(plane.v), [flat(s) for s in solutions]
        np.testing.assert_allclose([u @ u, v @ v, u @ v], [1, 1, 0], atol=1e-12)
        np.testing.assert_allclose(flat(plane.origin), sum(w) / 3, rtol=1e-12, atol=1e-14 * scale)
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
    for (a, b), w in zip(plane.anchors, weights, strict=True):
        there = flat(plane.origin) + a * flat(plane.u) + b * flat(plane.v)
        np.testing.assert_allclose(there, w, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("axes", ["authors", "orthonormal"])
def test_planes_in_float32(axes: str, rng: np.random.Generator) -> None:
    solutions = [random_tree(rng, dtype=np.float32) for _ in range(3)]
    plane = plane_through(solutions, axes)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(plane[:3])} == {"float32"}
    assert plane.anchors.dtype == np.float64
    check_anchors(plane, solutions, 1e-5)


@pytest.mark.parametrize("axes", ["authors", "orthonormal"])
@pytest.mark.usefixtures("x64")
def test_states_are_interpolated_and_whole_numbers_stay(axes: str, rng: np.random.Generator) -> None:
    solutions = [random_tree(rng) for _ in range(3)]
    states = [{"mean": jnp.asarray(rng.normal(size=(2, 3))), "count": jnp.asarray(5 + k)} for k in range(3)]
    plane = plane_through(solutions, axes, states=states)
    for (a, b), state in zip(plane.anchors, states, strict=True):
        there = landscape.at(jnp.asarray(a), jnp.asarray(b), *plane.states)
        np.testing.assert_allclose(there["mean"], state["mean"], rtol=1e-10, atol=1e-12)
        assert there["count"] == 5
    mean = sum(np.asarray(s["mean"]) for s in states) / 3
    np.testing.assert_allclose(plane.states[0]["mean"], mean, rtol=1e-12)


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
            plane_through(solutions, axes)


@AXES
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_solutions_on_a_line_span_no_plane(axes: str, dtype: Any, rng: np.random.Generator) -> None:
    with jax.enable_x64(dtype is np.float64):
        for place in (0.3, -1.0, 2.5):
            first, second = random_tree(rng, dtype=dtype), random_tree(rng, dtype=dtype)
            third = jax.tree.map(lambda a, b, t=place: (1 - t) * a + t * b, first, second)
            with pytest.raises(DegeneratePlaneError, match="line"):
                plane_through([first, second, third], axes)


@AXES
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_solutions_that_are_not_finite_span_no_plane(axes: str, bad: float, rng: np.random.Generator) -> None:
    for k in range(3):
        solutions = [random_tree(rng, dtype=np.float32) for _ in range(3)]
        solutions[k][1][0] = solutions[k][1][0].at[3].set(bad)
        with pytest.raises(DegeneratePlaneError, match="not finite"):
            plane_through(solutions, axes)


@pytest.mark.usefixtures("x64")
def test_a_third_solution_of_zero_has_no_authors_axes(rng: np.random.Generator) -> None:
    solutions = [random_tree(rng), random_tree(rng), jax.tree.map(jnp.zeros_like, random_tree(rng))]
    with pytest.raises(DegeneratePlaneError, match="use axes='orthonormal'"):
        plane_through(solutions, "authors")
    check_anchors(plane_through(solutions, "orthonormal"), solutions, 1e-11)


def test_other_misuse_of_plane_through_is_named(rng: np.random.Generator) -> None:
    solutions = [random_tree(rng, dtype=np.float32) for _ in range(3)]
    with pytest.raises(UnknownNameError, match=r"unknown axes 'orthonormale'. Did you mean 'orthonormal'\?.*authors"):
        plane_through(solutions, "orthonormale")
    with pytest.raises(ValueError, match="three solutions, got 2"):
        plane_through(solutions[:2])
    with pytest.raises(ValueError, match="differ in structure or shapes"):
        plane_through([*solutions[:2], jax.tree.map(lambda a: a[..., None], solutions[2])])
    with pytest.raises(ValueError, match="differ in structure or shapes"):
        plane_through([*solutions[:2], list(solutions[2])])


@pytest.mark.parametrize("seed", range(3))
def test_random_planes_match_the_norm_of_each_filter(seed: int, rng: np.random.Generator) -> None:
    x = jnp.zeros((1, 5))
    params, _ = multi_branch(mlp((4, 3), 2), 3).init(jax.random.key(seed), x)
    plane = landscape.random_plane(jax.random.key(seed), params)
    assert plane.origin is params
    np.testing.assert_array_equal(plane.anchors, np.zeros((1, 2)))
    assert plane.axes == "random"
    for axis in (plane.u, plane.v):
        for layer, moved in zip(params, axis, strict=True):
            kernel, step = (np.asarray(t["kernel"], np.float64) for t in (layer, moved))
            for i in range(3):
                for o in range(kernel.shape[1]):
                    assert np.linalg.norm(step[i, o]) == pytest.approx(np.linalg.norm(kernel[i, o]), rel=1e-5)
            assert not np.asarray(moved["bias"]).any()
            assert np.abs(step - kernel).max() > 1e-2
    assert np.abs(flat(plane.u) - flat(plane.v)).max() > 1e-2
    other = landscape.random_plane(jax.random.key(seed + 1), params)
    assert np.abs(flat(plane.u) - flat(other.u)).max() > 1e-2


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
    plane = landscape.random_plane(jax.random.key(0), params, state=state, filter_axis=-1, branch_axes=branch_axes)
    for axis in (plane.u, plane.v):
        for name in ("Conv", "Dense"):
            kernel, step = (np.asarray(t[name]["kernel"], np.float64) for t in (params, axis))
            inside = tuple(range(branch_axes, kernel.ndim - 1))
            for array in (kernel, step):
                assert np.ptp(np.linalg.norm(array.reshape(-1, kernel.shape[-1]), axis=0)) > 0.1
            np.testing.assert_allclose((step**2).sum(inside), (kernel**2).sum(inside), rtol=1e-5)
            assert not np.asarray(axis[name]["bias"]).any()
        assert not np.asarray(axis["Norm"]["scale"]).any()
    there = landscape.at(jnp.asarray(0.7), jnp.asarray(-2.0), *plane.states)
    np.testing.assert_array_equal(there["mean"], state["mean"])
    assert there["count"] == 3


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
        """The surface, `[ny, nx]`."""
        return evaluate(self.net, self.plane, self.data, self.loss, np.asarray(xs), np.asarray(ys), **options).loss

    def by_hand(self, xs: Any, ys: Any) -> np.ndarray:
        """The same by a loop over points: all parameters, all the data, the mean in NumPy."""
        x = (self.data.x.astype(np.float64) - self.data.mean) / self.data.std
        dtype = jax.tree.leaves(self.plane.origin)[0].dtype
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
                outputs, _ = apply(point(self.plane[:3], a, b), point(self.plane.states, a, b), jnp.asarray(x, dtype))
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
    return Case(net, plane_through(params, axes, states=batch_stats), data, loss, numpy_loss)


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


@pytest.mark.usefixtures("x64")
def test_grids_of_any_shape_are_laid_out_ys_by_xs(rng: np.random.Generator) -> None:
    case = make("mean", rng)
    for xs, ys in (([0.3], [-0.2]), ([0.1, 0.2, 0.3, 0.4, 0.5], [1.0]), ([2.0], [0.0, -1.0, 3.0])):
        surface = evaluate(case.net, case.plane, case.data, case.loss, np.asarray(xs), np.asarray(ys))
        np.testing.assert_array_equal(surface.xs, xs)
        np.testing.assert_array_equal(surface.ys, ys)
        np.testing.assert_allclose(surface.loss, case.by_hand(xs, ys), rtol=1e-12)
    one = evaluate_points(case.net, case.plane, case.data, case.loss, np.array([[0.3, -0.2], [0.3, -0.2]]))
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
        plane = plane_through(solutions, axes)
        np.testing.assert_allclose(evaluate_points(net, plane, data, loss, plane.anchors), expected, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_edges_run_along_the_straight_lines(rng: np.random.Generator) -> None:
    case = make("mean", rng)
    t, losses = edges(case.net, case.plane, case.data, case.loss, num_points=6, sample_chunk=4)
    np.testing.assert_allclose(t, [0, 0.2, 0.4, 0.6, 0.8, 1], atol=1e-15)
    assert losses.shape == (3, 6)
    for k, (i, j) in enumerate(((0, 1), (1, 2), (2, 0))):
        points = [(1 - s) * case.plane.anchors[i] + s * case.plane.anchors[j] for s in t]
        along = evaluate_points(case.net, case.plane, case.data, case.loss, np.array(points))
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
    plane = Plane(one, one, still, ((), (), ()), np.zeros((1, 2)), "random")
    points = np.stack([rng.uniform(-3, 1, 70), np.zeros(70)], axis=1)
    for chunk in (1, 5000) if width == 1 else (256,):
        some = data if chunk > 1 else data._replace(x=data.x[:3], y=data.y[:3])
        values = evaluate_points(net, plane, some, loss, points, sample_chunk=chunk)
        np.testing.assert_array_equal(np.isnan(values), points[:, 0] < -1)
    poisoned = data._replace(x=np.where(np.arange(5000)[:, None] == 4321, np.nan, data.x))
    assert np.isnan(evaluate_points(net, plane, poisoned, loss, points[:2], sample_chunk=5000)).all()


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

    net = case.net._replace(stem=case.net.stem._replace(preactivation=preactivation), apply=apply)
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
    monkeypatch.setattr(landscape, "_workers", lambda: 2)
    case, partial = make("sum", rng, np.float32), tmp_path / "new" / "partial.npz"
    xs, ys = np.linspace(-1, 1, 9), np.linspace(-0.7, 0.7, 8)
    options = {"route": route, "point_chunk": 4, "sample_chunk": 4, "partial": partial}
    updates = 0

    class Watched(landscape.Progress):
        stop_at = math.inf

        def update(self, done: int, note: str = "") -> None:
            nonlocal updates
            updates += 1
            if updates == self.stop_at:
                raise Stopped

    monkeypatch.setattr(landscape, "Progress", Watched)
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
    monkeypatch.setattr(landscape, "_workers", lambda: 1)
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
        patched.setattr(landscape.Progress, "update", stop)
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


def test_unfinished_work_on_another_random_plane_is_not_used(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, partial = make("mean", rng, np.float32), tmp_path / "partial.npz"
    planes = [landscape.random_plane(jax.random.key(k), case.plane.origin) for k in range(2)]

    def stop(self: Any, done: int, note: str = "") -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(landscape.Progress, "update", stop)
        with pytest.raises(Stopped):
            case._replace(plane=planes[0])(XS, YS, partial=partial)
    other = case._replace(plane=planes[1])
    np.testing.assert_allclose(other(XS, YS, partial=partial), other.by_hand(XS, YS), rtol=1e-5)


def spoilt(folder: Path, case: Case, what: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A partial file, made by an interrupted call, that must not be used: all its sums are 1e6."""
    partial = folder / "partial.npz"

    def stop(self: Any, done: int, note: str = "") -> None:
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(landscape.Progress, "update", stop)
        with pytest.raises(Stopped):
            case(XS, YS, sample_chunk=4, partial=partial)
    fields = load_npz(partial)
    fields |= {"sums": np.full(12, 1e6), "seen": np.full(12, 4)}
    if what == "other grid":
        fields["points"] = fields["points"] + 0.1
    elif what == "other size":
        fields |= {name: fields[name][:6] for name in ("points", "sums", "seen")}
    elif what == "other batches":
        fields["samples"] = np.array([11, 8])
    elif what == "other solutions":
        fields["anchors"] = fields["anchors"] + 1e-9
    elif what == "field missing":
        del fields["samples"]
    save_npz(partial, **fields)
    if what == "torn":
        partial.write_bytes(partial.read_bytes()[:-40])
    elif what == "empty":
        partial.write_bytes(b"")
    elif what == "text":
        partial.write_text("not an archive")
    return partial


@pytest.mark.parametrize(
    "what",
    ["other grid", "other size", "other batches", "other solutions", "field missing", "torn", "empty", "text"],
)
def test_partial_files_of_other_work_or_damaged_ones_are_not_used(
    what: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make("mean", rng, np.float32)
    options = {"sample_chunk": 4, "partial": spoilt(tmp_path, case, what, monkeypatch)}
    np.testing.assert_allclose(case(XS, YS, **options), case.by_hand(XS, YS), rtol=1e-5)
    assert not options["partial"].exists()


def test_the_same_partial_file_is_used_when_nothing_is_wrong_with_it(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make("mean", rng, np.float32)
    partial = spoilt(tmp_path, case, "nothing", monkeypatch)
    assert (case(XS, YS, sample_chunk=4, partial=partial) > 1e4).all()


# --- what is refused --------------------------------------------------------------------------------------------------


def test_misuse_of_evaluate_is_named(rng: np.random.Generator) -> None:
    case = make("mean", rng, np.float32)
    with pytest.raises(
        UnknownNameError, match=r"unknown route 'stm'. Did you mean 'stem'\? Allowed: auto, plain, stem"
    ):
        case(XS, YS, route="stm")
    with pytest.raises(ValueError, match="network with a stem; this one names none"):
        make("functions", rng, np.float32)(XS, YS, route="stem")
    for name in ("sample_chunk", "branch_chunk", "point_chunk"):
        with pytest.raises(ValueError, match="must be at least 1"):
            case(XS, YS, **{name: 0})
    for xs, ys in (([], YS), (XS, []), (np.zeros((2, 2)), YS), (XS, 0.5)):
        with pytest.raises(ValueError, match="non-empty vectors"):
            landscape.evaluate.__wrapped__(case.net, case.plane, case.data, case.loss, xs, ys)
    call = functools.partial(evaluate_points.__wrapped__, case.net, case.plane, case.data, case.loss)
    for points in (np.zeros(4), np.zeros((2, 3))):
        with pytest.raises(ValueError, match=r"points must have shape \[P, 2\]"):
            call(points)


def test_a_random_plane_has_no_edges(rng: np.random.Generator) -> None:
    net = multi_branch(mlp((2,), 1), 2)
    params, _ = net.init(jax.random.key(0), jnp.ones((1, 3)))
    plane = landscape.random_plane(jax.random.key(1), params)
    x = rng.standard_normal((4, 3)).astype(np.float32)
    data = Dataset("d", x, np.ones(4, np.float32), np.zeros(3, np.float32), np.ones(3, np.float32), 1, "binary", {})
    with pytest.raises(ValueError, match="three solutions"):
        edges(net, plane, data, binary_hinge())
