"""Sums over the examples of a block, compiled for one device or, with one all-reduce, for several."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dualgap_jax.spectral.scaling import Powers

Block = tuple[Any, Any]

_SLICE = 512  # examples at a time in float64 passes: a slice of 3,072 features stays in cache
_PANELS = 4  # the Gram matrix is symmetric: of 4 x 4 panels, 10 are computed


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


def _gram_on_host(rows: Rows) -> tuple[Array, Array]:
    """The same by NumPy, which knows that the product is symmetric: two thirds of the panels' time on CPU."""
    x, y = (np.asarray(a) for a in rows)
    return jnp.asarray(x.T @ x), jnp.asarray(y.T @ x)


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


def scaled(values: np.ndarray, power: Any) -> np.ndarray:
    """`values * 2^power`, exact within range: in two products where the factor itself is out of range."""
    one = values.dtype.type(1)
    if np.max(np.abs(power), initial=0) < np.finfo(values.dtype).maxexp - 1:
        return np.multiply(values, np.ldexp(one, power), out=_unwritten(values.shape, values.dtype))
    half = power // 2
    return values * np.ldexp(one, half) * np.ldexp(one, power - half)


def _unwritten(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array at a multiple of 64 bytes, which JAX takes over on CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    first = -memory.ctypes.data % 64
    return memory[first : first + size].view(dtype).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The kernels compiled for one device or, under `shard_map`, for the devices of a mesh."""

    mesh: Mesh | None

    def place(self, block: Block, powers: Powers, dtype: Any) -> Rows:
        """A block of columns as rows on the device or devices, in the problem's own unit."""
        x, y = (a.T if isinstance(a, jax.Array) else np.asarray(a).T for a in block)
        if powers.rows.any():
            x = scaled(np.asarray(x, dtype), -powers.rows)
        if powers.targets:
            y = scaled(np.asarray(y, dtype), -powers.targets)
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
        if self.mesh is None and jax.default_backend() == "cpu":
            return _gram_on_host
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
