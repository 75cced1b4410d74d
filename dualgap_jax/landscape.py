"""Loss surfaces over a plane in parameter space (Section 5.1, Figures 1 and 4).

A plane is `w(a, b) = origin + a u + b v`.  The first linear map of a network is linear in its parameters, so its
pre-activations are affine in (a, b): three matrix products serve the whole grid, and each further point costs only the
small layers above.  That is the 'stem' route; networks that name no stem take the 'plain' route, which evaluates every
point in full.  Both stream over samples and points (and, on the stem route, branches) in bounded memory.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from dualgap_jax.data import Dataset, standardise
from dualgap_jax.losses import Loss
from dualgap_jax.multibranch import sum_rest
from dualgap_jax.records import Progress, load_npz, save_npz
from dualgap_jax.registry import UnknownNameError, unknown
from dualgap_jax.types import Branch, KeyArray, Params, PyTree, Stacked, State, Stem

AXES = ("authors", "orthonormal")
ROUTES = ("auto", "stem", "plain")


class DegeneratePlaneError(ValueError):
    """Solutions that span no plane."""


class Plane(NamedTuple):
    """A two-dimensional affine plane in parameter space.

    Attributes:
      origin, u, v: pytrees of one structure; the point (a, b) is `origin + a u + b v`.
      states: the network state (batch statistics, ...) at the origin and its changes along u and v; integer leaves are
        constant.  Empty for networks without state.
      anchors: `[k, 2]`: plane coordinates of the points that span it (k = 3 solutions, or k = 1 for a random plane).
      axes: 'authors', 'orthonormal' or 'random'.
    """

    origin: Params
    u: Params
    v: Params
    states: tuple[State, State, State]
    anchors: Float[np.ndarray, "k 2"]
    axes: str


class Surface(NamedTuple):
    """Mean loss over a grid of a plane.

    Attributes:
      xs: `[nx]` coordinates along u;  ys: `[ny]` along v.
      loss: `[ny, nx]` mean loss over the data set; non-finite values are kept.
    """

    xs: Float[np.ndarray, " nx"]
    ys: Float[np.ndarray, " ny"]
    loss: Float[np.ndarray, "ny nx"]


def _dot(a: PyTree, b: PyTree) -> float:
    products = jax.tree.map(lambda x, y: jnp.vdot(x, y, precision="highest").real, a, b)
    return math.fsum(float(p) for p in jax.tree.leaves(products))


def _is_float(leaf: Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


@jax.jit
def _combine(coefficients: Array, trees: Sequence[PyTree]) -> PyTree:
    """`sum_k coefficients[k] * trees[k]`; leaves that are not floating keep the value of the first tree."""

    def leaf(first: Array, *others: Array) -> Array:
        if not _is_float(first):
            return first
        total = coefficients[0].astype(first.dtype) * first
        for c, other in zip(coefficients[1:], others, strict=True):
            total = total + c.astype(first.dtype) * other
        return total

    return jax.tree.map(leaf, *trees)


def at(a: Array, b: Array, origin: PyTree, u: PyTree, v: PyTree) -> PyTree:
    """`origin + a u + b v`, leaf by leaf; leaves that are not floating keep their value at the origin."""

    def leaf(o: Array, du: Array, dv: Array) -> Array:
        return o + a.astype(o.dtype) * du + b.astype(o.dtype) * dv if _is_float(o) else o

    return jax.tree.map(leaf, origin, u, v)


def plane_through(
    solutions: Sequence[Params], axes: str = "authors", *, states: Sequence[State] | None = None
) -> Plane:
    """The plane through three solutions w0, w1, w2, with the origin at their mean.

    Args:
      solutions: three parameter pytrees of one structure.
      axes: 'authors': `u = (w0 - w1) |w2| / |w0 - w1|` and `v = (w0 - w2) |w2| / |w0 - w2|`, not orthogonalised, as in
        the authors' code; 'orthonormal': Gram-Schmidt of `w1 - w0` and `w2 - w0`, so that plane coordinates are true
        distances.
      states: the three network states; they are interpolated as the parameters are.

    Raises:
      DegeneratePlaneError: if the solutions lie on a line (identical solutions included) or are not finite.
      ValueError: if there are not three solutions, or their structures differ.
      UnknownNameError: for unknown axes.
    """
    if axes not in AXES:
        raise UnknownNameError(unknown("axes", axes, AXES))
    if len(solutions) != 3:
        raise ValueError(f"a plane needs three solutions, got {len(solutions)}.")
    shapes = [jax.tree.map(jnp.shape, s) for s in solutions]
    if shapes[1] != shapes[0] or shapes[2] != shapes[0]:
        raise ValueError("the three solutions differ in structure or shapes; take them from one network.")
    w0, w1, w2 = solutions
    d1, d2 = (_combine(jnp.asarray([1.0, -1.0]), (w0, w)) for w in (w1, w2))
    n1, n2, inner = math.sqrt(_dot(d1, d1)), math.sqrt(_dot(d2, d2)), _dot(d1, d2)
    if not all(map(math.isfinite, (n1, n2, inner))):
        raise DegeneratePlaneError("a solution holds numbers that are not finite (a diverged run?); it spans no plane.")
    norms = [math.sqrt(_dot(w, w)) for w in solutions]
    smallest = 1e-6 * max(*norms, 1e-30)
    overlap = inner / n1**2 if n1 > smallest else 0.0
    # From the vector itself: a difference of squares would lose half the digits, and miss a line in float32.
    height_vector = _combine(jnp.asarray([1.0, -overlap]), (d2, d1))
    height = math.sqrt(_dot(height_vector, height_vector))
    if min(n1, n2, height) <= smallest:
        raise DegeneratePlaneError(
            "the three solutions are identical or lie on a line, so they span no plane"
            f" (|w0 - w1| = {n1:.3g}, |w0 - w2| = {n2:.3g}); train them from different seeds, or longer."
        )
    # In the basis (d1, d2) = (w0 - w1, w0 - w2), relative to the mean: w_k = (1/3 - [k = 1]) d1 + (1/3 - [k = 2]) d2.
    third = 1.0 / 3.0
    oblique = np.array([[third, third], [third - 1, third], [third, third - 1]])
    if axes == "authors":
        if norms[2] <= 0:
            raise DegeneratePlaneError(
                "the third solution is zero, so the authors' axes have no length; use axes='orthonormal'."
            )
        basis = np.diag([norms[2] / n1, norms[2] / n2])  # columns: u, v in terms of d1, d2
    else:
        # e1 = -d1 / n1, e2 = -(d2 - overlap d1) / height
        basis = np.array([[-1.0 / n1, overlap / height], [0.0, -1.0 / height]])
    anchors = np.linalg.solve(basis, oblique.T).T

    def span(trees: Sequence[PyTree]) -> tuple[PyTree, PyTree, PyTree]:
        mean = _combine(jnp.full(3, third), trees)
        # A direction c1 d1 + c2 d2 is (c1 + c2) w0 - c1 w1 - c2 w2.
        u, v = (_combine(jnp.asarray([c[0] + c[1], -c[0], -c[1]]), trees) for c in basis.T)
        return mean, u, v

    origin, u, v = span(solutions)
    return Plane(origin, u, v, span(states) if states is not None else ((), (), ()), anchors, axes)


def random_plane(
    key: KeyArray, params: Params, *, state: State = (), filter_axis: int = 0, branch_axes: int = 1
) -> Plane:
    """A plane through `params` along two filter-normalised random directions (Li et al., NeurIPS 2018).

    Each filter of a Gaussian direction is scaled to the norm of the same filter of `params`; biases and other vectors
    do not move.

    Args:
      key: of the two directions.
      params: the point in the middle.
      state: its network state, constant over the plane.
      filter_axis: axis of a kernel that counts its filters, after the branch axes: 0 for `branches.mlp` (`[out, in]`),
        -1 for Linen and NNX kernels (`[..., in, out]`).
      branch_axes: number of leading branch axes: 1 for a `multi_branch`, 0 for a single branch.
    """

    def direction(key: KeyArray) -> Params:
        leaves, treedef = jax.tree.flatten(params)
        moved = []
        for index, leaf in enumerate(leaves):
            if leaf.ndim - branch_axes < 2 or not _is_float(leaf):
                moved.append(jnp.zeros_like(leaf))
                continue
            kept = filter_axis + (branch_axes if filter_axis >= 0 else leaf.ndim)
            over = tuple(i for i in range(branch_axes, leaf.ndim) if i != kept)
            noise = jax.random.normal(jax.random.fold_in(key, index), leaf.shape, leaf.dtype)
            length = jnp.sqrt(jnp.sum(leaf**2, axis=over, keepdims=True) / jnp.sum(noise**2, axis=over, keepdims=True))
            moved.append(noise * length)
        return jax.tree.unflatten(treedef, moved)

    still = jax.tree.map(jnp.zeros_like, state)
    u, v = (direction(jax.random.fold_in(key, i)) for i in range(2))
    return Plane(params, u, v, (state, still, still), np.zeros((1, 2)), "random")


def _sample_losses(loss: Loss, outputs: Array, y: Array) -> Array:
    return jnp.sum(loss.per_example(outputs, y))


@functools.lru_cache(maxsize=8)
def _plain_kernel(net: Branch, loss: Loss) -> Callable[..., Array]:
    """`(plane arrays, x, y, points [P, 2]) -> summed loss [P]`, every point in full."""

    @jax.jit
    def kernel(plane: tuple[PyTree, ...], x: Array, y: Array, points: Array) -> Array:
        params, states = plane

        def one(point: Array) -> Array:
            w, s = at(*point, *params), at(*point, *states)
            return _sample_losses(loss, net.apply(w, s, x)[0], y)

        return lax.map(one, points)

    return kernel


@functools.lru_cache(maxsize=8)
def _stem_kernels(
    stem: Stem, stacked: Stacked | None, loss: Loss, branch_chunk: int, together: int
) -> tuple[Callable[..., Any], ...]:
    """The pre-activations at origin, u and v, and the small layers above for a block of points."""

    @jax.jit
    def first_layer(params: tuple[PyTree, ...], x: Array) -> tuple[PyTree, ...]:
        return tuple(stem.preactivation(p, x) for p in params)

    def whole(plane: PyTree, z: PyTree, point: Array) -> Array:
        params, states = plane
        return stem.rest(at(*point, *params), at(*point, *states), at(*point, *z))[0]

    def streamed(stacked: Stacked, plane: PyTree, z: PyTree, points: Array) -> Array:
        """Outputs `[K, batch, out]` at K points, a few branches at a time so that they stay in cache."""
        branch, count, scale = stacked

        def part(first: Array | int, size: int) -> Array:
            # Slices of leaves that are not used (the first layer) are not computed.
            take = functools.partial(jax.tree.map, lambda a: lax.dynamic_slice_in_dim(a, first, size, 0))
            params, states, zs = take(plane[0]), take(plane[1]), take(z)

            def one(point: Array) -> Array:
                return sum_rest(branch, at(*point, *params), at(*point, *states), at(*point, *zs))[0]

            return jax.vmap(one)(points)

        size = min(branch_chunk, count)
        start = part(0, size)
        total = lax.fori_loop(1, count // size, lambda i, acc: acc + part(i * size, size), start)
        if count % size:
            total = total + part(count - count % size, count % size)
        return scale * total

    @jax.jit
    def kernel(plane: PyTree, z: PyTree, y: Array, points: Array) -> Array:
        def block(points: Array) -> Array:
            if stacked is None:
                outputs = jax.vmap(lambda point: whole(plane, z, point))(points)
            else:
                outputs = streamed(stacked, plane, z, points)
            return jax.vmap(lambda o: _sample_losses(loss, o, y))(outputs)

        return lax.map(block, points.reshape(-1, together, 2)).reshape(-1)

    return first_layer, kernel


def _workers() -> int:
    """Blocks of points in flight: one a core on CPU, where the small kernels use one core each; two on accelerators."""
    return (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 2


@contextlib.contextmanager
def _on_exception(action: Callable[[], None]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        action()
        raise


class _Partial(NamedTuple):
    """Sums over the samples seen so far, point by point; `seen` says how many samples each point has had."""

    sums: np.ndarray
    seen: np.ndarray


def evaluate_points(
    net: Branch,
    plane: Plane,
    dataset: Dataset,
    loss: Loss,
    points: Float[np.ndarray, "points 2"],
    *,
    route: str = "auto",
    sample_chunk: int = 256,
    branch_chunk: int = 32,
    point_chunk: int = 8,
    partial: Path | None = None,
    save_seconds: float = 30.0,
    label: str = "landscape",
) -> Float[np.ndarray, " points"]:
    """Mean loss over the whole data set at points of a plane, in evaluation mode.

    Results depend on the chunk sizes only through rounding.

    Args:
      net, loss, dataset: what is evaluated; the losses of batches are added up in float64.
      plane: where.
      points: `[P, 2]` plane coordinates (a, b).
      route: 'stem' (first-layer reuse), 'plain' (every point in full), or 'auto' (stem where the network has one).
      sample_chunk: samples at a time; memory for pre-activations is 3 x that of one forward pass over so many.
      branch_chunk: branches at a time in the layers above the stem.
      point_chunk: points at a time in the layers above the stem.
      partial: file that keeps unfinished work; a second call with the same arguments goes on from it.  It is removed at
        the end.
      save_seconds: least time between two writes of it.
      label: name on the progress line.

    Raises:
      UnknownNameError: for an unknown route.
      ValueError: for route='stem' on a network without one, a chunk size below 1, or points not `[P, 2]`.
    """
    if route not in ROUTES:
        raise UnknownNameError(unknown("route", route, ROUTES))
    if route == "stem" and net.stem is None:
        raise ValueError("route='stem' needs a network with a stem; this one names none. Use 'auto' or 'plain'.")
    if min(sample_chunk, branch_chunk, point_chunk) < 1:
        raise ValueError("sample_chunk, branch_chunk and point_chunk must be at least 1.")
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points must have shape [P, 2], got {points.shape}.")
    stem = net.stem if route != "plain" else None
    num_samples, num_points = len(dataset.y), len(points)
    workers = _workers()
    # Blocks small enough that all workers get some and an interruption loses little; of one size, so that one program
    # serves every call.
    multiple = point_chunk if stem is not None else 1
    block = max(1, min(64, num_points) // multiple) * multiple
    identity = {}
    if partial is not None:
        identity = {
            "points": points,
            "samples": np.asarray([num_samples, sample_chunk]),
            "anchors": plane.anchors,
            "lengths": np.asarray([_dot(a, b) for a, b in itertools.combinations_with_replacement(plane[:3], 2)]),
        }
    work = _resume(partial, identity) or _Partial(np.zeros(num_points), np.zeros(num_points, np.int64))

    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    x64 = dtype == np.float64  # jax.enable_x64 holds in one thread only; the workers need it said again
    arrays = ((plane.origin, plane.u, plane.v), plane.states)
    if stem is not None:
        first_layer, above = _stem_kernels(stem, net.stacked, loss, branch_chunk, point_chunk)
    else:
        plain = _plain_kernel(net, loss)
    saved_at = time.monotonic()
    steps = math.ceil(num_samples / sample_chunk) * num_points

    def save() -> None:
        if partial is not None:
            save_npz(partial, **identity, **work._asdict())

    with (
        _on_exception(save),
        jax.default_matmul_precision("highest"),
        ThreadPoolExecutor(workers) as pool,
        Progress(steps, label, done=int(np.ceil(work.seen / sample_chunk).sum())) as progress,
    ):
        for start in range(0, num_samples, sample_chunk):
            todo = np.flatnonzero(work.seen <= start)
            if not len(todo):
                continue
            x = standardise(dataset.x[start : start + sample_chunk], dataset.mean, dataset.std)
            y = jnp.asarray(dataset.y[start : start + sample_chunk])
            if stem is not None:
                run = functools.partial(above, arrays, first_layer(arrays[0], x), y)
            else:
                run = functools.partial(plain, arrays, x, y)

            def sums(which: np.ndarray, run: Callable[[Array], Array] = run) -> tuple[np.ndarray, np.ndarray]:
                padded = np.resize(points[which], (block, 2))  # the last block repeats points: one compiled shape
                with jax.enable_x64(x64), jax.default_matmul_precision("highest"):
                    values = run(jnp.asarray(padded, dtype))
                return which, np.asarray(values, np.float64)[: len(which)]

            for which, values in pool.map(sums, [todo[i : i + block] for i in range(0, len(todo), block)]):
                # One assignment: an interrupt (SIGTERM) between two would save sums that `seen` does not count.
                work = _added(work, which, values, min(start + sample_chunk, num_samples))
                progress.update(int(np.ceil(work.seen / sample_chunk).sum()))
                if time.monotonic() - saved_at > save_seconds:
                    save()
                    saved_at = time.monotonic()
    if partial is not None:
        partial.unlink(missing_ok=True)
    return work.sums / num_samples


def _added(work: _Partial, which: np.ndarray, values: np.ndarray, seen: int) -> _Partial:
    new = _Partial(work.sums.copy(), work.seen.copy())
    new.sums[which] += values
    new.seen[which] = seen
    return new


def _resume(partial: Path | None, identity: dict[str, np.ndarray]) -> _Partial | None:
    """The unfinished work in a file, if it is readable and belongs to the same call."""
    if partial is None or not partial.exists():
        return None
    try:
        stored = load_npz(partial)
    except ValueError:
        return None
    if any(name not in stored or not np.array_equal(stored[name], value) for name, value in identity.items()):
        return None
    return _Partial(stored["sums"], stored["seen"])


def evaluate(
    net: Branch,
    plane: Plane,
    dataset: Dataset,
    loss: Loss,
    xs: Float[np.ndarray, " nx"],
    ys: Float[np.ndarray, " ny"],
    **options: Any,
) -> Surface:
    """The loss surface over the grid `xs x ys` of a plane; options as in `evaluate_points`.

    Returns:
      A `Surface` whose `loss[j, i]` is the mean loss over the data set at `origin + xs[i] u + ys[j] v`.

    Raises:
      ValueError: if xs or ys is not a non-empty vector, and as `evaluate_points` does.
    """
    xs, ys = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
    if xs.ndim != 1 or ys.ndim != 1 or not xs.size or not ys.size:
        raise ValueError(f"xs and ys must be non-empty vectors, got shapes {xs.shape} and {ys.shape}.")
    grid = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
    values = evaluate_points(net, plane, dataset, loss, grid, **options).reshape(len(ys), len(xs))
    return Surface(xs, ys, values)


def edges(
    net: Branch, plane: Plane, dataset: Dataset, loss: Loss, *, num_points: int = 25, **options: Any
) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, "3 t"]]:
    """Loss along the straight edges between solutions 0-1, 1-2 and 2-0.

    Returns:
      `t [num_points]` in [0, 1] and the losses `[3, num_points]`.

    Raises:
      ValueError: for a plane that is not through three solutions, and as `evaluate_points` does.
    """
    if len(plane.anchors) != 3:
        raise ValueError(f"edges need a plane through three solutions; this one has {len(plane.anchors)} anchor(s).")
    t = np.linspace(0.0, 1.0, num_points)
    ends = [(plane.anchors[k], plane.anchors[(k + 1) % 3]) for k in range(3)]
    points = np.concatenate([(1 - t)[:, None] * p + t[:, None] * q for p, q in ends])
    return t, evaluate_points(net, plane, dataset, loss, points, **options).reshape(3, num_points)
