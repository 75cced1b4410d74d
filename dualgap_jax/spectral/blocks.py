"""Blocks of columns, and sums over them: on one device or on several, one block in memory at a time."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from dualgap_jax.spectral.checks import check_data
from dualgap_jax.spectral.problem import SpectralError
from dualgap_jax.spectral.scaling import Powers, depth_multiple, row_powers

Block = tuple[Any, Any]

_SLICE = 512  # examples at a time in float64 passes: a slice of 3,072 features stays in cache
_PANELS = 4  # the Gram matrix is symmetric: of 4 x 4 panels, 10 are computed
_PLAIN = 32  # powers of two that any sum of squares in float32 has room for


@dataclasses.dataclass(frozen=True)
class Columns:
    """Blocks of columns of X and Y, in the same order each time they are iterated over.

    Attributes:
      blocks: gives a fresh iterator of pairs `x [d_0, b]`, `y [d_H, b]`; NumPy or JAX arrays.
    """

    blocks: Callable[[], Iterable[Block]]

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks())


def in_blocks(x: Float[Any, "d_0 n"], y: Float[Any, "d_H n"], size: int | None = None) -> Columns:
    """Two matrices as blocks of `size` columns (None: one block).

    Raises:
      SpectralError: for data that are not two matrices with as many columns, or a size below 1.
    """
    check_data(x, y, values=False)
    n = x.shape[1]
    step = n if size is None else size
    if step < 1:
        raise SpectralError(f"size={size} must be at least 1.")
    return Columns(lambda: ((x[:, i : i + step], y[:, i : i + step]) for i in range(0, n, step)))


class Rows(NamedTuple):
    """A block on the device, one example a row, zero rows added to fill the devices: they change none of the sums."""

    x: Array
    y: Array


# --- kernels: sums over the examples, with one all-reduce when the rows lie on several devices ------------------------


def _slices(rows: Rows) -> tuple[Rows, Rows]:
    """The rows as `[k, _SLICE, ...]`, and what is left over."""
    whole = len(rows.x) // _SLICE * _SLICE
    return (
        Rows(*(a[:whole].reshape(-1, _SLICE, a.shape[1]) for a in rows)),
        Rows(*(a[whole:] for a in rows)),
    )


def _sum_over(function: Callable[[Rows], Any], rows: Rows) -> Any:
    """The sum of `function` over slices of the rows."""
    slices, rest = _slices(rows)
    total = function(rest)
    add = functools.partial(jax.tree.map, jnp.add)
    return lax.scan(lambda done, part: (add(done, function(part)), None), total, slices)[0]


def _gram(rows: Rows) -> tuple[Array, Array]:
    """`X X^T` and `Y X^T`."""
    x, y = rows
    d = x.shape[1]
    edges = [d * k // _PANELS for k in range(_PANELS + 1)]
    gram = jnp.zeros((d, d), x.dtype)
    for low, high in itertools.pairwise(edges):
        if high > low:
            gram = gram.at[low:high, low:].set(x[:, low:high].T @ x[:, low:])
    upper = jnp.triu(gram)
    return upper + jnp.triu(gram, 1).T, y.T @ x


def _normal(rows: Rows, maps: Array) -> Array:
    """`[maps X; Y] X^T` in the precision of `maps`."""

    def one(part: Rows) -> Array:
        x, y = part.x.astype(maps.dtype), part.y.astype(maps.dtype)
        return jnp.concatenate([maps @ x.T, y.T]) @ x

    return _sum_over(one, rows)


def _sums(rows: Rows, maps: Array, fit: Array) -> tuple[Array, Array, Array]:
    """With `Z = [maps X; Y]`: `Z Z^T`, `(Y - fit X) X^T` and `||X||_F^2`."""

    def one(part: Rows) -> tuple[Array, Array, Array]:
        x, y = part.x.astype(maps.dtype), part.y.astype(maps.dtype)
        z = jnp.concatenate([maps @ x.T, y.T])
        return z @ z.T, (y.T - fit @ x.T) @ x, jnp.sum(x**2)

    return _sum_over(one, rows)


def _triangle(rows: Array) -> Array:
    """The triangular factor of the matrix, square also where there are fewer rows than columns."""
    missing = rows.shape[1] - rows.shape[0]
    rows = jnp.pad(rows, ((0, max(missing, 0)), (0, 0)))
    return jnp.linalg.qr(rows, mode="r")


def _scaled(values: np.ndarray, power: Any) -> np.ndarray:
    """`values * 2^power` in two exact products, each within range."""
    half = power // 2
    return values * np.ldexp(values.dtype.type(1), half) * np.ldexp(values.dtype.type(1), power - half)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels compiled for one device or, under `shard_map`, for the devices of a mesh."""

    mesh: Mesh | None

    def place(self, block: Block, powers: Powers, dtype: Any) -> Rows:
        """A block of columns as rows on the device or devices, in the problem's own unit."""
        x, y = (a.T if isinstance(a, jax.Array) else np.asarray(a).T for a in block)
        if powers.rows.any():
            x = _scaled(np.asarray(x, dtype), -powers.rows)
        if powers.targets:
            y = _scaled(np.asarray(y, dtype), -powers.targets)
        if self.mesh is None:
            return Rows(jnp.asarray(x, dtype), jnp.asarray(y, dtype))
        missing = -len(x) % self.mesh.size
        sharding = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        return Rows(*(jax.device_put(np.pad(np.asarray(a, dtype), ((0, missing), (0, 0))), sharding) for a in (x, y)))

    def _compile(self, function: Callable[..., Any], finish: Callable[[Any], Any] | None = None) -> Callable[..., Any]:
        """`function(rows, *rest)`, a sum over rows; `finish` puts the devices' parts together in another way."""

        def precise(*args: Any) -> Any:
            with jax.default_matmul_precision("highest"):
                return function(*args)

        if self.mesh is None:
            return jax.jit(precise)
        names = self.mesh.axis_names
        split, same = PartitionSpec(names), PartitionSpec()

        def shared(rows: Any, *rest: Any) -> Any:
            part = precise(rows, *rest)
            return lax.psum(part, names) if finish is None else finish(part)

        def call(rows: Any, *rest: Any) -> Any:
            specs = (split, *(same for _ in rest))
            mapped = jax.shard_map(shared, mesh=self.mesh, in_specs=specs, out_specs=same, check_vma=False)
            return mapped(rows, *rest)

        return jax.jit(call)

    @functools.cached_property
    def gram(self) -> Callable[[Rows], tuple[Array, Array]]:
        return self._compile(_gram)

    @functools.cached_property
    def normal(self) -> Callable[[Rows, Array], Array]:
        return self._compile(_normal)

    @functools.cached_property
    def sums(self) -> Callable[[Rows, Array, Array], tuple[Array, Array, Array]]:
        return self._compile(_sums)

    def _factor(self, dtype: Any) -> Callable[[Rows], Array]:
        """The triangular factor of `[X^T, Y^T]`: of each device's rows, then of the factors on top of one another."""

        def merge(part: Array) -> Array:
            names = self.mesh.axis_names if self.mesh is not None else ()
            return _triangle(lax.all_gather(part, names).reshape(-1, part.shape[1]))

        return self._compile(lambda rows: _triangle(jnp.concatenate(rows, axis=1, dtype=dtype)), merge)

    @functools.cached_property
    def triangle(self) -> Callable[[Rows], Array]:
        return self._factor(None)

    @functools.cached_property
    def fine_triangle(self) -> Callable[[Rows], Array]:
        return self._factor(jnp.float64)


@functools.cache
def kernels_for(mesh: Mesh | None) -> Kernels:
    """One set of compiled kernels for each mesh, whatever the number of solves."""
    return Kernels(mesh)


@jax.jit
def merge_triangles(first: Array, second: Array) -> Array:
    return jnp.linalg.qr(jnp.concatenate([first, second]), mode="r")


class Data:
    """The blocks with their kernels, their unit, and a count of the passes made."""

    def __init__(
        self, columns: Iterable[Block], mesh: Mesh | None, depth: int, report: Callable[[str], None] | None
    ) -> None:
        self._columns, self.kernels, self._report = columns, kernels_for(mesh), report
        self.passes = 0
        self.n = 0
        self.shape = (0, 0)
        self.dtype: Any = None
        self.powers, self.nonzero = self._measure(depth)

    @property
    def blocks(self) -> Iterator[Float[np.ndarray, "d_0 _"]]:
        """X block by block, in the problem's own unit, float64."""
        for x, _ in self._columns:
            yield _scaled(np.asarray(x, np.float64).T, -self.powers.rows).T

    def _measure(self, depth: int) -> tuple[Powers, np.ndarray]:
        """The unit, and which rows of X are not zero.

        A power that all rows have in common, and one of Y, are left alone as long as every sum has room for them.
        """
        self.passes += 1
        sizes: list[np.ndarray] = []
        for index, block in enumerate(self._columns):
            self._check(block, index)
            self.n += block[0].shape[1]
            x, y = (np.asarray(a) for a in block)
            sizes.append(np.append(_norms(x, index, "x"), _norms(y, index, "y").max(initial=-np.inf)))
            self._tell("size of the data", self.n)
        if not sizes:
            raise SpectralError("the columns gave no block; give an iterable that starts afresh each time, a Columns.")
        # log2 of norms: that of all blocks from those of each
        logs = np.stack(sizes)
        top = np.where(np.isfinite(logs.max(axis=0)), logs.max(axis=0), 0)
        norms = top + 0.5 * np.log2(np.maximum(np.sum(4.0 ** (logs - top), axis=0), np.finfo(float).tiny))
        nonzero = np.isfinite(logs.max(axis=0))
        powers = np.where(nonzero, np.floor(norms).astype(int) + 1, 0).astype(np.int32)
        rows, targets = powers[:-1], powers[-1]
        common = rows[nonzero[:-1]].max(initial=-(2**15))
        rows = np.where(nonzero[:-1], rows - (common if abs(common) <= _PLAIN else 0), 0).astype(np.int32)
        targets = depth_multiple(targets, depth) if abs(targets) > _PLAIN else np.int32(0)
        return Powers(rows, targets), nonzero[:-1]

    def total(self, function: Callable[[Rows], Any], what: str, combine: Callable[[Any, Any], Any] = jnp.add) -> Any:
        """The sum (or other combination) of `function` over the blocks: one pass."""
        self.passes += 1
        done: Any = None
        n = 0
        for index, block in enumerate(self._columns):
            self._check(block, index)
            n += block[0].shape[1]
            # One block is computed on while the next is read; without this JAX would queue more of them.
            jax.block_until_ready(done)
            part = function(self.kernels.place(block, self.powers, self.dtype))
            done = part if done is None else jax.tree.map(combine, done, part)
            if self._report is not None:
                jax.block_until_ready(done)
            self._tell(what, n)
        if done is None:
            raise SpectralError(
                f"the columns gave no block in pass {self.passes}; give an iterable that starts afresh each time, a"
                " Columns."
            )
        if n != self.n:
            raise SpectralError(
                f"the columns gave {n} examples in pass {self.passes} and {self.n} before; they must be the same each"
                " time: give a Columns, not an iterator that is used up."
            )
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(done)):
            raise SpectralError(
                f"the columns gave values in pass {self.passes} that are not finite, or far larger than before; they"
                " must be the same each time."
            )
        return done

    def _tell(self, what: str, n: int) -> None:
        if self._report is not None:
            self._report(f"{what}, pass {self.passes}: {n:,} examples")

    def _check(self, block: Block, index: int) -> None:
        if not isinstance(block, (tuple, list)) or len(block) != 2:
            raise SpectralError(f"block {index} is a {type(block).__name__}; give pairs x [d_0, b], y [d_H, b].")
        check_data(*block, values=False)
        shape, dtype = (block[0].shape[0], block[1].shape[0]), np.result_type(*(a.dtype for a in block))
        if self.dtype is None:
            self.shape, self.dtype = shape, dtype
        if shape != self.shape or dtype != self.dtype:
            raise SpectralError(
                f"block {index} has (d_0, d_H)={shape} of {dtype}, the blocks before {self.shape} of {self.dtype};"
                " all must agree."
            )


def _norms(values: np.ndarray, index: int, name: str) -> np.ndarray:
    """log2 of the norms of the rows, -inf for rows of zeros, whatever the size of the numbers."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        squares = np.einsum("ij,ij->i", values, values).astype(np.float64)
        room = np.finfo(values.dtype).max ** 0.25
        if ((squares > 1 / room) & (squares < room)).all():
            return 0.5 * np.log2(squares)
        if not np.isfinite(values).all():
            raise SpectralError(f"block {index}: {name} holds values that are not finite; remove those examples first.")
        wide = values.astype(np.float64)
        powers = row_powers(wide)
        scaled = _scaled(wide.T, -powers)
        return powers + 0.5 * np.log2(np.sum(scaled**2, axis=0))
