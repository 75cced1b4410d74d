"""Loss surfaces over a plane in parameter space (Section 5.1, Figures 1 and 4).

A plane is `w(a, b) = origin + a u + b v`.  The first linear map of a network is linear in its parameters, so its
pre-activations are affine in (a, b): three matrix products serve the whole grid, and each further point costs only the
small layers above.  A network that names no stem is evaluated in full at every point.

Branches meet only in the sum of their outputs.  So a network of `multi_branch` is taken block by block: a block of
branches goes through all points, adds to the outputs kept for each point and sample, and is dropped.  The solutions
may therefore lie on disk (`BranchSource`), three networks of any size, and are read once for the whole grid; the
values are those of solutions in memory, bit for bit, because one program does both.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from dualgap_jax.data import Dataset, standardise
from dualgap_jax.files import load_npz, save_npz
from dualgap_jax.losses import Loss, measure, sum_loss
from dualgap_jax.metrics import Progress
from dualgap_jax.networks import sum_branches, sum_rest
from dualgap_jax.registry import UnknownNameError, unknown
from dualgap_jax.training import Evaluation
from dualgap_jax.types import BranchSource, KeyArray, Network, Params, PyTree, State

AXES = ("authors", "orthonormal")
ROUTES = ("auto", "stem", "plain")
ACCUMULATOR_BYTES = 3 * 2**30  # of outputs kept for all points while solutions are streamed
_BLOCK_BYTES = 2**27  # of one network's parameters, or of its pre-activations, in a block of branches
_PRODUCT_BYTES = 2**25  # of one network's parameters that inner products take at a time
_PIECE = 2**16  # numbers of each solution in float64 at a time: they stay in cache


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

    def block(self, first: int, count: int) -> Plane:
        """The plane of branches `first .. first + count - 1` of a stacked network."""
        origin, u, v, states = (_rows(tree, first, count) for tree in self[:4])
        return Plane(origin, u, v, states, self.anchors, self.axes)

    def fingerprint(self) -> np.ndarray:
        """Numbers that tell this plane from others: the inner products of its origin and directions."""
        return np.asarray([_dot(a, b) for a, b in itertools.combinations_with_replacement(self[:3], 2)])


class StreamedPlane(NamedTuple):
    """The plane through three stacked networks that are read a block of branches at a time.

    Attributes:
      sources: the three solutions.
      coefficients: `[3, 3]`: origin, u and v (rows) as combinations of the solutions (columns).
      anchors, axes: as in `Plane`.
      products: inner products that tell this plane from others.
    """

    sources: tuple[BranchSource, BranchSource, BranchSource]
    coefficients: Float[np.ndarray, "3 3"]
    anchors: Float[np.ndarray, "3 2"]
    axes: str
    products: Float[np.ndarray, " p"]

    def block(self, first: int, count: int) -> Plane:
        """The plane of branches `first .. first + count - 1`, bit for bit the slice of that of networks in memory."""
        params, states = zip(*(source.read(first, count) for source in self.sources), strict=True)
        along = _span(self.coefficients, states)
        return Plane(*_span(self.coefficients, params), along, self.anchors, self.axes)

    def fingerprint(self) -> np.ndarray:
        """Numbers that tell this plane from others."""
        return self.products


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


def _is_float(leaf: Any) -> bool:
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


def _span(coefficients: Float[np.ndarray, "3 3"], trees: Sequence[PyTree]) -> tuple[PyTree, PyTree, PyTree]:
    """Origin, u and v as combinations of three trees."""
    origin, u, v = (_combine(jnp.asarray(row), trees) for row in coefficients)
    return origin, u, v


@functools.partial(jax.jit, static_argnums=2)
def _rows_on_device(tree: PyTree, first: Array, count: int) -> PyTree:
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, count, 0), tree)


def _rows(tree: PyTree, first: int, count: int) -> PyTree:
    """Rows `first .. first + count - 1` of every leaf."""
    if all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(tree)):
        return jax.tree.map(lambda leaf: leaf[first : first + count], tree)
    return _rows_on_device(tree, jnp.asarray(first), count)


def _ahead(read: Callable[..., Any], blocks: Sequence[tuple[int, int]]) -> Iterator[Any]:
    """`read(first, count)` of each block in turn, the next one read in a thread while the caller works on this one."""
    if len(blocks) < 2:
        yield from itertools.starmap(read, blocks)
        return
    x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64

    def load(first: int, count: int) -> Any:
        with jax.enable_x64(x64):  # holds in one thread only
            return jax.block_until_ready(read(first, count))

    with ThreadPoolExecutor(1) as reader:
        future = reader.submit(load, *blocks[0])
        for following in [*blocks[1:], None]:
            block = future.result()
            if following is not None:
                future = reader.submit(load, *following)
            yield block


def _cut(total: int, size: int) -> list[tuple[int, int]]:
    """`(first, count)` of consecutive blocks of `size`; the last one may be smaller."""
    return [(first, min(size, total - first)) for first in range(0, total, size)]


def _bytes(tree: PyTree) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


class _Products:
    """Inner products of three solutions and their differences, in float64, added up piece by piece.

    The vectors are w0, w1, w2, d1 = w0 - w1 and e = d2 - c d1 with d2 = w0 - w2.  The overlap c is that of the first
    piece in which d1 is not zero.  Where the solutions lie on a line it is the overlap of all pieces, so that e is
    small and its norm tells how far from a line they are; from |d1|, |d2| and d1 . d2 half the digits would be lost.
    """

    def __init__(self) -> None:
        self._overlap = 0.0
        self._pieces: list[np.ndarray] = []

    def add(self, solutions: Sequence[PyTree]) -> None:
        """Takes in some leaves or rows of the solutions; always in the same portions, for the same bits."""
        for leaves in zip(*map(jax.tree.leaves, solutions), strict=True):
            if not _is_float(leaves[0]):
                continue
            flat = [np.ascontiguousarray(leaf).reshape(-1) for leaf in leaves]
            if np.iscomplexobj(flat[0]):
                flat = [leaf.view(leaf.real.dtype) for leaf in flat]
            for first in range(0, flat[0].size, _PIECE):
                self._add_piece([leaf[first : first + _PIECE] for leaf in flat])

    def _add_piece(self, leaves: Sequence[np.ndarray]) -> None:
        vectors = np.empty((5, leaves[0].size))
        with np.errstate(all="ignore"):  # numbers that are not finite are reported at the end
            for row, leaf in zip(vectors, leaves, strict=False):
                row[:] = leaf
            np.subtract(vectors[0], vectors[1], out=vectors[3])
            np.subtract(vectors[0], vectors[2], out=vectors[4])
            if not self._overlap and vectors[3].any():
                self._overlap = float(vectors[3] @ vectors[4] / (vectors[3] @ vectors[3]))
            vectors[4] -= self._overlap * vectors[3]
            self._pieces.append(vectors @ vectors.T)

    def total(self) -> tuple[np.ndarray, float]:
        """The matrix `[5, 5]` of inner products (NaN where one is not finite), and c."""
        stacked = np.asarray(self._pieces).reshape(-1, 25)
        if not np.isfinite(stacked).all():
            return np.full((5, 5), np.nan), self._overlap
        return np.asarray([math.fsum(column) for column in stacked.T]).reshape(5, 5), self._overlap


def _check_plane(solutions: Sequence[Any], axes: str) -> None:
    if axes not in AXES:
        raise UnknownNameError(unknown("axes", axes, AXES))
    if len(solutions) != 3:
        raise ValueError(f"a plane needs three solutions, got {len(solutions)}.")


def _check_alike(trees: Sequence[PyTree]) -> None:
    shapes = [jax.tree.map(np.shape, tree) for tree in trees]
    if shapes[1] != shapes[0] or shapes[2] != shapes[0]:
        raise ValueError("the three solutions differ in structure or shapes; take them from one network.")


def _inner_products(read: Callable[[int, int], Sequence[PyTree]], rows: int, row_bytes: int) -> _Products:
    """One pass over three networks of so many rows (branches)."""
    blocks = _cut(rows, max(1, _PRODUCT_BYTES // max(row_bytes, 1)))
    products = _Products()
    # A network of one block is done before a line could be read.
    progress = Progress(rows, "plane") if len(blocks) > 1 else None
    try:
        for (first, count), block in zip(blocks, _ahead(read, blocks), strict=True):
            products.add(block)
            if progress is not None:
                progress.update(first + count, "branches")
    finally:
        if progress is not None:
            progress.close()
    return products


def _coordinates(products: _Products, axes: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coefficients `[3, 3]` of origin, u and v; the anchors `[3, 2]`; the inner products `[25]`.

    Raises:
      DegeneratePlaneError: see `plane_through`.
    """
    gram, overlap = products.total()
    if not np.isfinite(gram).all():
        raise DegeneratePlaneError("a solution holds numbers that are not finite (a diverged run?); it spans no plane.")
    norms = np.sqrt(np.diag(gram)[:3])
    square1, cross, square_e = gram[3, 3], gram[3, 4], gram[4, 4]
    n1, n2 = math.sqrt(square1), math.sqrt(max(square_e + 2 * overlap * cross + overlap**2 * square1, 0.0))
    smallest = 1e-6 * max(*norms, 1e-30)
    rest = cross / square1 if n1 > smallest else 0.0  # of the overlap, beyond that of the first piece
    height = math.sqrt(max(square_e - rest * cross, 0.0))
    if min(n1, n2, height) <= smallest:
        raise DegeneratePlaneError(
            "the three solutions are identical or lie on a line, so they span no plane"
            f" (|w0 - w1| = {n1:.3g}, |w0 - w2| = {n2:.3g}); train them from different seeds, or longer."
        )
    overlap += rest
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
    # A direction c1 d1 + c2 d2 is (c1 + c2) w0 - c1 w1 - c2 w2.
    directions = [[c[0] + c[1], -c[0], -c[1]] for c in basis.T]
    return np.asarray([[third] * 3, *directions]), anchors, gram.ravel()


def plane_through(
    solutions: Sequence[Params], axes: str = "authors", *, states: Sequence[State] | None = None
) -> Plane:
    """The plane through three solutions w0, w1, w2, with the origin at their mean.

    Args:
      solutions: three parameter pytrees of one structure.
      axes: 'authors': `u = (w0 - w1) |w2| / |w0 - w1|` and `v = (w0 - w2) |w2| / |w0 - w2|`, not orthogonalised, as in
        the authors' code; 'orthonormal': Gram-Schmidt of `w1 - w0` and `w2 - w0`, so that plane coordinates are true
        distances.  Norms and inner products are summed in float64.
      states: the three network states; they are interpolated as the parameters are.

    Raises:
      DegeneratePlaneError: if the solutions lie on a line (identical solutions included) or are not finite.
      ValueError: if there are not three solutions, or their structures differ.
      UnknownNameError: for unknown axes.
    """
    _check_plane(solutions, axes)
    _check_alike(solutions)
    host = [jax.tree.map(np.asarray, tree) for tree in solutions]
    heads = {leaf.shape[:1] for leaf in jax.tree.leaves(host[0])}
    (rows,) = heads.pop() if len(heads) == 1 and heads != {()} else (1,)

    def read(first: int, count: int) -> list[PyTree]:
        # More than one row: perhaps branches, so the same portions as `plane_through_sources` takes.
        return [_rows(tree, first, count) for tree in host] if rows > 1 else host

    sums = _inner_products(read, rows, _bytes(host[0]) // max(rows, 1))
    coefficients, anchors, _ = _coordinates(sums, axes)
    along = _span(coefficients, states) if states is not None else ((), (), ())
    return Plane(*_span(coefficients, solutions), along, anchors, axes)


def plane_through_sources(sources: Sequence[BranchSource], axes: str = "authors") -> StreamedPlane:
    """The plane through three stacked networks that are read a few branches at a time; states are interpolated too.

    One pass over the sources finds the coordinates, which are those of `plane_through` bit for bit.  It shows its
    progress.

    Args:
      sources: three solutions of one network.
      axes: as for `plane_through`.

    Raises:
      DegeneratePlaneError, ValueError, UnknownNameError: as `plane_through`.
    """
    _check_plane(sources, axes)
    numbers = [source.num_branches for source in sources]
    if len(set(numbers)) > 1:
        raise ValueError(f"the three solutions have {numbers} branches; take them from one network.")
    head = [source.read(0, 1) for source in sources]
    _check_alike([params for params, _ in head])
    _check_alike([state for _, state in head])

    def read(first: int, count: int) -> list[PyTree]:
        return [jax.tree.map(np.asarray, source.read(first, count)[0]) for source in sources]

    sums = _inner_products(read, numbers[0], _bytes(head[0][0]))
    coefficients, anchors, products = _coordinates(sums, axes)
    first, second, third = sources
    return StreamedPlane((first, second, third), coefficients, anchors, axes, products)


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
      filter_axis: axis of a kernel that counts its filters, after the branch axes: 0 for `networks.mlp` (`[out, in]`),
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


class _Kernels(NamedTuple):
    """The compiled parts of an evaluation.  A block is `(params, states)`, each at the origin, along u and along v.

    Attributes:
      below: `(params, x) -> z`: what all points share, the three pre-activations, or x itself.
      add: `(total [P, batch, out], block, z, points [P, 2]) -> total`: adds the block's outputs at each point.
      losses: `(total, y) -> [P]`: the summed loss.
      outputs: `(block, z, points [K, 2]) -> [K, batch, out]`: fixes the shape and type of `total`.
    """

    below: Callable[..., Any]
    add: Callable[..., Any]
    losses: Callable[..., Any]
    outputs: Callable[..., Any]


@functools.lru_cache(maxsize=8)
def _kernels(net: Network, loss: Loss, plain: bool, count: int, branch_chunk: int, together: int) -> _Kernels:
    """The kernels for blocks of `count` branches, `together` points at a time.

    Without a stem, and on the plain route, points go one after another.
    """
    stacked, stem = (None, None) if plain else (net.stacked, net.stem)
    scale = stacked.scale if stacked is not None else None
    first_layer: Callable[..., Any] | None = stem.preactivation if stem is not None else None
    if stacked is not None and stacked.branch.stem is not None and count < stacked.num_branches:
        first_layer = jax.vmap(stacked.branch.stem.preactivation, (0, None))

    @jax.jit
    def below(params: tuple[PyTree, ...], x: Array) -> PyTree:
        return tuple(first_layer(p, x) for p in params) if first_layer is not None else x

    def some(block: PyTree, z: PyTree, points: Array, first: Array | int, size: int) -> Array:
        """Outputs `[K, batch, out]` of the sum of a few branches, so few that they stay in cache."""
        # Slices of leaves that are not used (the first layer) are not computed.
        take = functools.partial(jax.tree.map, lambda leaf: lax.dynamic_slice_in_dim(leaf, first, size, 0))
        params, states = take(block[0]), take(block[1])
        branch = stacked.branch  # type: ignore[union-attr]
        if stem is None:
            return lax.map(lambda point: sum_branches(branch, at(*point, *params), at(*point, *states), z)[0], points)
        zs = take(z)

        def one(point: Array) -> Array:
            return sum_rest(branch, at(*point, *params), at(*point, *states), at(*point, *zs))[0]

        return jax.vmap(one)(points)

    def whole(block: PyTree, z: PyTree, points: Array) -> Array:
        params, states = block

        def one(point: Array) -> Array:
            w, s = at(*point, *params), at(*point, *states)
            return (net.apply(w, s, z) if stem is None else stem.rest(w, s, at(*point, *z)))[0]

        return lax.map(one, points) if stem is None else jax.vmap(one)(points)

    size = min(branch_chunk, count)

    def outputs(block: PyTree, z: PyTree, points: Array) -> Array:
        return whole(block, z, points) if stacked is None else some(block, z, points, 0, size)

    def add_to(total: Array, block: PyTree, z: PyTree, points: Array) -> Array:
        if stacked is None:
            return total + whole(block, z, points)
        total = lax.fori_loop(0, count // size, lambda i, acc: acc + some(block, z, points, i * size, size), total)
        rest = count % size
        return total + some(block, z, points, count - rest, rest) if rest else total

    together = 1 if stem is None else together

    @jax.jit
    def add(total: Array, block: PyTree, z: PyTree, points: Array) -> Array:
        grouped = total.reshape(-1, together, *total.shape[1:]), points.reshape(-1, together, 2)
        return lax.map(lambda group: add_to(group[0], block, z, group[1]), grouped).reshape(total.shape)

    @jax.jit
    def losses(total: Array, y: Array) -> Array:
        return jax.vmap(lambda o: sum_loss(loss, o if scale is None else scale * o, y))(total)

    return _Kernels(below, add, losses, outputs)


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


class _Work(NamedTuple):
    """What is done, replaced as a whole at each step: an interrupt never meets sums that the counts do not know of.

    Attributes:
      sums: `[P]` summed losses over the samples that are through.
      seen: `[P]` how many samples these are.
      parts: for a batch of samples and a block of points under way, how many blocks of branches have been added, and
        the outputs so far, `[block of points, batch, out]`.
    """

    sums: np.ndarray
    seen: np.ndarray
    parts: Mapping[tuple[int, int], tuple[int, Any]]

    def with_losses(self, unit: tuple[int, int], which: slice, losses: np.ndarray, seen: int) -> _Work:
        """The losses of a batch at some points are known."""
        new = _Work(self.sums.copy(), self.seen.copy(), {k: v for k, v in self.parts.items() if k != unit})
        new.sums[which] += losses
        new.seen[which] = seen
        return new

    def with_part(self, unit: tuple[int, int], blocks: int, total: Any) -> _Work:
        """One more block of branches has been added to the outputs."""
        return self._replace(parts={**self.parts, unit: (blocks, total)})


class _Saver:
    """Writes unfinished work, at most a tenth of the time, and finds it again.

    Args:
      path: the file, or None for none.
      identity: arrays that tell this call from others.
      save_seconds: least time between two writes.
    """

    def __init__(self, path: Path | None, identity: Callable[[], dict[str, np.ndarray]], save_seconds: float) -> None:
        self._path, self._least, self._wait = path, save_seconds, save_seconds
        self._identity = identity() if path is not None else {}
        self._saved = time.monotonic()

    def load(self, num_points: int) -> _Work:
        """The unfinished work in the file, if it is readable and belongs to the same call; else none."""
        nothing = _Work(np.zeros(num_points), np.zeros(num_points, np.int64), {})
        if self._path is None or not self._path.exists():
            return nothing
        try:
            stored = load_npz(self._path)
        except ValueError:
            return nothing
        if any(k not in stored or not np.array_equal(stored[k], v) for k, v in self._identity.items()):
            return nothing
        # One after another: all of them twice might not fit.
        parts = {
            (int(batch), int(block)): (int(count), jnp.asarray(stored.pop(f"outputs_{index}")))
            for index, (batch, block, count) in enumerate(stored["parts"])
        }
        return _Work(stored["sums"], stored["seen"], parts)

    def save(self, work: _Work) -> None:
        """Writes the work."""
        if self._path is None:
            return
        began = time.monotonic()
        parts = np.asarray([[*unit, count] for unit, (count, _) in work.parts.items()], np.int64).reshape(-1, 3)
        outputs = {f"outputs_{index}": total for index, (_, total) in enumerate(work.parts.values())}
        save_npz(self._path, **self._identity, sums=work.sums, seen=work.seen, parts=parts, **outputs)
        self._saved = time.monotonic()
        self._wait = max(self._least, 9 * (self._saved - began))

    def save_if_due(self, work: _Work) -> None:
        """Writes the work if the last time is long enough ago."""
        if time.monotonic() - self._saved > self._wait:
            self.save(work)

    def remove(self) -> None:
        """All is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _branch_block(net: Network, one: tuple[Params, State], x: Array | None, branch_chunk: int) -> int:
    """Branches in a block: as many as keep parameters and pre-activations within bounds, whole chunks of them.

    Args:
      net: a network of `multi_branch`.
      one: parameters and state of any number of branches, for their shapes.
      x: the batch whose pre-activations are kept, or None.
      branch_chunk: what the result is a multiple of.
    """
    stem = net.stacked.branch.stem if net.stacked is not None else None
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), one)
    z = jax.eval_shape(jax.vmap(stem.preactivation, (0, None)), one[0], x) if stem and x is not None else ()
    size = _BLOCK_BYTES // max(_bytes(one), _bytes(z), 1)
    return max(1, size // branch_chunk) * branch_chunk


def _advance(
    kernels: _Kernels, block: PyTree, z: PyTree, y: Array | None, size: int, x64: bool, total: Array, points: np.ndarray
) -> Any:
    """Adds a block of branches at some points, at most `size`: the new total, or with labels the losses `[P]`."""
    padded = np.resize(points, (size, 2))  # the last block repeats points: one compiled shape
    with jax.enable_x64(x64), jax.default_matmul_precision("highest"):  # both hold in one thread only
        total = kernels.add(total, block, z, jnp.asarray(padded, jax.dtypes.canonicalize_dtype(np.float64)))
        if y is None:
            return jax.block_until_ready(total)
        return np.asarray(kernels.losses(total, y), np.float64)[: len(points)]


def evaluate_points(
    net: Network,
    plane: Plane | StreamedPlane,
    dataset: Dataset,
    loss: Loss,
    points: Float[np.ndarray, "points 2"],
    *,
    route: str = "auto",
    sample_chunk: int = 256,
    branch_chunk: int = 32,
    point_chunk: int = 8,
    accumulator_bytes: int = ACCUMULATOR_BYTES,
    partial: Path | None = None,
    save_seconds: float = 30.0,
    label: str = "landscape",
) -> Float[np.ndarray, " points"]:
    """Mean loss over the whole data set at points of a plane, in evaluation mode.

    Results depend on the chunk sizes only through rounding.  A `StreamedPlane` gives the values of the `Plane` through
    the same solutions bit for bit.  It is read once for each group of samples whose outputs at all points,
    `4 x points x samples x outputs` bytes, fit `accumulator_bytes`; above these and the compiled programs at most about
    2 GB are needed, however many branches there are.

    Args:
      net, loss, dataset: what is evaluated; the losses of batches are added up in float64.
      plane: where; a `StreamedPlane` needs a network of `multi_branch`.
      points: `[P, 2]` plane coordinates (a, b).
      route: 'stem' (first-layer reuse), 'plain' (every point in full, the whole network at once), or 'auto': stem where
        the network has one, else in full, a few branches at a time where it is a sum of branches.
      sample_chunk: samples at a time; memory for pre-activations is 3 x that of one forward pass over so many, and
        over a block of branches.
      branch_chunk: branches at a time in the layers above the stem.
      point_chunk: points at a time in the layers above the stem.
      accumulator_bytes: for the outputs kept while a `StreamedPlane` is read.
      partial: file that keeps unfinished work; a second call with the same arguments goes on from it.  It is removed at
        the end.
      save_seconds: least time between two writes of it; longer where a write takes long, a tenth of the time at most.
      label: name on the progress line.

    Raises:
      UnknownNameError: for an unknown route.
      ValueError: for route='stem' on a network without one, a chunk size below 1, points not `[P, 2]`, or a
        `StreamedPlane` with route='plain', with a network that is no sum of branches, or of another number of them.
    """
    _check_call(net, plane, route, (sample_chunk, branch_chunk, point_chunk))
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points must have shape [P, 2], got {points.shape}.")
    plain, streamed = route == "plain", isinstance(plane, StreamedPlane)
    num_samples, num_points = len(dataset.y), len(points)
    # Blocks of points small enough that all workers get some and an interruption loses little; of one size, so that
    # one program serves every call.
    multiple = point_chunk if net.stem is not None and not plain else 1
    size = max(1, min(64, num_points) // multiple) * multiple
    point_blocks = [slice(first, first + count) for first, count in _cut(num_points, size)]
    batches = [slice(first, first + count) for first, count in _cut(num_samples, sample_chunk)]

    def batch(which: slice) -> Array:
        return standardise(dataset.x[which], dataset.mean, dataset.std)

    if net.stacked is not None and not plain:
        one = plane.sources[0].read(0, 1) if isinstance(plane, StreamedPlane) else (plane.origin, plane.states[0])
        block_size = _branch_block(net, one, batch(slice(0, sample_chunk)), branch_chunk)
        branch_blocks = _cut(net.stacked.num_branches, block_size)
    else:
        branch_blocks = [(0, 1)]
    last = len(branch_blocks) - 1

    def read(first: int, count: int) -> tuple[PyTree, PyTree]:
        part = plane if isinstance(plane, Plane) and not last else plane.block(first, count)
        return (part.origin, part.u, part.v), part.states

    def identity() -> dict[str, np.ndarray]:
        return {
            "points": points,
            "samples": np.asarray([num_samples, sample_chunk]),
            "portions": np.asarray([size, branch_chunk, *branch_blocks[0], *branch_blocks[-1]]),
            "anchors": plane.anchors,
            "lengths": plane.fingerprint(),
        }

    saver = _Saver(partial, identity, save_seconds)
    work = saver.load(num_points)
    x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    of_batch = num_points * len(branch_blocks)
    done = int(np.ceil(work.seen / sample_chunk).sum()) * len(branch_blocks)
    done += sum(count * len(points[point_blocks[unit[1]]]) for unit, (count, _) in work.parts.items())

    def added(unit: tuple[int, int]) -> int:
        """How many blocks of branches a batch of samples has had at a block of points."""
        if work.seen[point_blocks[unit[1]]].min() > batches[unit[0]].start:
            return last + 1
        return work.parts[unit][0] if unit in work.parts else 0

    with (
        _on_exception(lambda: saver.save(work)),
        jax.default_matmul_precision("highest"),
        ThreadPoolExecutor(_workers()) as pool,
        Progress(len(batches) * of_batch, label, done=done) as progress,
    ):
        group_size = 1
        if streamed:
            of_one = 4 * num_points * dataset.num_outputs * sample_chunk
            group_size = max(1, accumulator_bytes // of_one)
        empty = None
        for start, batches_in_group in _cut(len(batches), group_size):
            group = range(start, start + batches_in_group)
            units = [(b, p) for b in group for p in range(len(point_blocks))]
            begun = min(map(added, units))
            for number, block in enumerate(_ahead(read, branch_blocks[begun:]), begun):
                kernels = _kernels(net, loss, plain, branch_blocks[number][1], branch_chunk, point_chunk)
                for b in group:
                    todo = [p for p in range(len(point_blocks)) if added((b, p)) == number]
                    if not todo:
                        continue
                    x, y = batch(batches[b]), jnp.asarray(dataset.y[batches[b]])
                    z = kernels.below(block[0], x)
                    if empty is None:
                        empty = jax.eval_shape(kernels.outputs, block, z, jnp.zeros((multiple, 2), float))
                    wide = jnp.promote_types(empty.dtype, jnp.float32)  # sums of narrow outputs need more digits
                    nothing = 0, jnp.zeros((size, len(y), *empty.shape[2:]), wide)
                    totals = [work.parts.get((b, p), nothing)[1] for p in todo]
                    chosen = [points[point_blocks[p]] for p in todo]
                    labels = y if number == last else None
                    advance = functools.partial(_advance, kernels, block, z, labels, size, x64)
                    for p, values in zip(todo, pool.map(advance, totals, chosen), strict=True):
                        which = point_blocks[p]
                        if number < last:
                            work = work.with_part((b, p), number + 1, values)
                        else:
                            work = work.with_losses((b, p), which, values, min(batches[b].stop, num_samples))
                        done += len(points[which])
                        progress.update(done)
                        saver.save_if_due(work)
    saver.remove()
    return work.sums / num_samples


def _check_call(net: Network, plane: Plane | StreamedPlane, route: str, chunks: tuple[int, ...]) -> None:
    if route not in ROUTES:
        raise UnknownNameError(unknown("route", route, ROUTES))
    if route == "stem" and net.stem is None:
        raise ValueError("route='stem' needs a network with a stem; this one names none. Use 'auto' or 'plain'.")
    if min(chunks) < 1:
        raise ValueError("sample_chunk, branch_chunk and point_chunk must be at least 1.")
    if isinstance(plane, StreamedPlane):
        if route == "plain":
            raise ValueError("route='plain' takes a whole network at once; a streamed plane needs 'auto' or 'stem'.")
        _check_streams(net, plane.sources[0])


def _check_streams(net: Network, source: BranchSource) -> None:
    if net.stacked is None:
        raise ValueError("only a network made by multi_branch is read block by block; this one is no sum of branches.")
    if net.stacked.num_branches != source.num_branches:
        raise ValueError(
            f"the network has {net.stacked.num_branches} branches, the solutions have {source.num_branches}."
        )


def _grid(xs: Any, ys: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The axes in float64 and the points `[ny nx, 2]` of the grid, row by row."""
    xs, ys = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
    if xs.ndim != 1 or ys.ndim != 1 or not xs.size or not ys.size:
        raise ValueError(f"xs and ys must be non-empty vectors, got shapes {xs.shape} and {ys.shape}.")
    return xs, ys, np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)


def evaluate(
    net: Network,
    plane: Plane | StreamedPlane,
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
    xs, ys, grid = _grid(xs, ys)
    values = evaluate_points(net, plane, dataset, loss, grid, **options).reshape(len(ys), len(xs))
    return Surface(xs, ys, values)


def _along_edges(plane: Plane | StreamedPlane, num_points: int) -> tuple[np.ndarray, np.ndarray]:
    """`t [num_points]`, and the points `[3 num_points, 2]` on the edges 0-1, 1-2 and 2-0."""
    if len(plane.anchors) != 3:
        raise ValueError(f"edges need a plane through three solutions; this one has {len(plane.anchors)} anchor(s).")
    t = np.linspace(0.0, 1.0, num_points)
    ends = [(plane.anchors[k], plane.anchors[(k + 1) % 3]) for k in range(3)]
    return t, np.concatenate([(1 - t)[:, None] * p + t[:, None] * q for p, q in ends])


def edges(
    net: Network,
    plane: Plane | StreamedPlane,
    dataset: Dataset,
    loss: Loss,
    *,
    num_points: int = 25,
    **options: Any,
) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, "3 t"]]:
    """Loss along the straight edges between solutions 0-1, 1-2 and 2-0.

    Returns:
      `t [num_points]` in [0, 1] and the losses `[3, num_points]`.

    Raises:
      ValueError: for a plane that is not through three solutions, and as `evaluate_points` does.
    """
    t, points = _along_edges(plane, num_points)
    return t, evaluate_points(net, plane, dataset, loss, points, **options).reshape(3, num_points)


class Survey(NamedTuple):
    """A surface and what belongs to it, from one evaluation.

    Attributes:
      surface: the loss over the grid.
      edge_t: `[t]` in [0, 1], from one solution to the next.
      edge_loss: `[3, t]` along the edges 0-1, 1-2 and 2-0.  Its first column is the loss at the three solutions.
    """

    surface: Surface
    edge_t: Float[np.ndarray, " t"]
    edge_loss: Float[np.ndarray, "3 t"]


def survey(
    net: Network,
    plane: Plane | StreamedPlane,
    dataset: Dataset,
    loss: Loss,
    xs: Float[np.ndarray, " nx"],
    ys: Float[np.ndarray, " ny"],
    *,
    edge_points: int = 25,
    **options: Any,
) -> Survey:
    """`evaluate` and `edges` at once: one pass over the parameters, and one first layer, serve both.

    Raises:
      ValueError: as `evaluate` and `edges` do.
    """
    xs, ys, grid = _grid(xs, ys)
    t, along = _along_edges(plane, edge_points)
    values = evaluate_points(net, plane, dataset, loss, np.concatenate([along, grid]), **options)
    surface = Surface(xs, ys, values[len(along) :].reshape(len(ys), len(xs)))
    return Survey(surface, t, values[: len(along)].reshape(3, edge_points))


def evaluate_source(
    net: Network,
    loss: Loss,
    dataset: Dataset,
    source: BranchSource,
    *,
    batch_size: int = 1024,
    branch_chunk: int = 128,
    label: str = "evaluation",
) -> Evaluation:
    """Loss, accuracy and margins of a solution that is read a block of branches at a time; see `training.evaluate`.

    One pass over the source; the outputs `[n, out]` of the whole data set are kept.  Shows its progress.

    Args:
      net: a network of `multi_branch`.
      loss, dataset: what is evaluated.
      source: the solution.
      batch_size: samples at a time.
      branch_chunk: branches at a time.
      label: name on the progress line.

    Raises:
      ValueError: for a network that is no sum of branches, or of another number of them, or a size below 1.
    """
    _check_streams(net, source)
    stacked = net.stacked
    if stacked is None or min(batch_size, branch_chunk) < 1:
        raise ValueError("batch_size and branch_chunk must be at least 1.")
    batches = [slice(first, first + count) for first, count in _cut(len(dataset.y), batch_size)]
    blocks = _cut(stacked.num_branches, _branch_block(net, source.read(0, 1), None, branch_chunk))

    @jax.jit
    def add(total: Array, block: tuple[Params, State], x: Array) -> Array:
        count = jax.tree.leaves(block)[0].shape[0]
        size = min(branch_chunk, count)

        def some(first: Array | int, size: int) -> Array:
            take = functools.partial(jax.tree.map, lambda leaf: lax.dynamic_slice_in_dim(leaf, first, size, 0))
            return sum_branches(stacked.branch, take(block[0]), take(block[1]), x)[0]

        total = lax.fori_loop(0, count // size, lambda i, acc: acc + some(i * size, size), total)
        return total + some(count - count % size, count % size) if count % size else total

    @jax.jit
    def measured(total: Array, y: Array) -> tuple[Array, Array, Array]:
        return measure(loss, dataset.task, stacked.scale * total, y)

    totals: dict[int, Array] = {}
    with jax.default_matmul_precision("highest"), Progress(len(blocks) * len(batches), label) as progress:
        done = 0
        for block in _ahead(lambda first, count: jax.device_put(source.read(first, count)), blocks):
            for index, which in enumerate(batches):
                x = standardise(dataset.x[which], dataset.mean, dataset.std)
                if index not in totals:
                    one = jax.tree.map(lambda leaf: leaf[:1], block)
                    shape = jax.eval_shape(lambda p, s, x: sum_branches(stacked.branch, p, s, x)[0], *one, x)
                    totals[index] = jnp.zeros(shape.shape, shape.dtype)
                totals[index] = jax.block_until_ready(add(totals[index], block, x))
                done += 1
                progress.update(done)
        parts = [measured(totals[index], jnp.asarray(dataset.y[which])) for index, which in enumerate(batches)]
    losses, margins, right = (np.concatenate([np.asarray(p[k], np.float64) for p in parts]) for k in range(3))
    accuracy = float("nan") if dataset.task == "regression" else float(right.mean())
    return Evaluation(float(losses.mean()), accuracy, margins if loss.margin is not None else None)
