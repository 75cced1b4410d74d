"""Theorem 2 for many examples: X comes in blocks of columns, is never held whole, and may lie on several devices.

With r = min(d_0, ..., d_H, n), everything the solution needs of the data is `A = Y X^+`, a `d_H x d_0` matrix, and the
singular values of `Yt = A X`.  Two factorisations give A:

- `'gram'` (fast): `X X^T` by matrix products, its Cholesky factor L, then conjugate gradients on the normal equations
  with L as preconditioner and with products of the data themselves.  The Gram matrix squares the condition number of X;
  the iteration puts the lost digits back as long as L is close enough to X.
- `'qr'` (accurate): the triangular factor of `[X^T, Y^T]` by Householder reflections, block after block (TSQR).  No
  orthogonal factor is formed: `A = (R_11^{-1} R_12)^T`, and the singular values of Yt are those of R_12.  When X is
  numerically rank deficient, R_11 is cut by its singular value decomposition.

One more pass over the data, in float64, evaluates problem (4) at the weights and the dual (5) at Lambda.  With
`'auto'` the fast result is kept when this certificate holds, and the accurate factorisation follows otherwise.

The certificate does not trust A.  Let E = Y - A X, G = E X^T, and Q the projector onto the row space of X; then
Yt = A X + E Q, and with Lambda = M X and Z = (A - M) X

    (Yt - Lambda)(Yt - Lambda)^T = Z Z^T + (A - M) G^T + G (A - M)^T + E Q E^T.

The pass gives all but the last matrix, so `||Yt - Lambda||_r^2` is at most the sum of the r largest eigenvalues of
those, plus `||E Q||_F^2 = tr(G (X X^T)^+ G^T)`.  There `(X X^T)^+` is applied through the factor, times `_SAFETY` to
allow for the factor's own error.  For `'gram'` that allowance is tested against the data where it is most in doubt, on
the smallest Ritz vectors of L; beyond that it is an estimate.  So is the rounding of the float64 sums, which grows
with `||A|| ||X||`, that is with the condition number of X: it is taken off the dual value.

The data are taken at their word: float32 data that look rank deficient in float32 are factorised again in float64, and
only what is rank deficient there is cut.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from dualgap_jax.registry import unknown
from dualgap_jax.spectral.problem import (
    SpectralError,
    SpectralSolution,
    assemble,
    check_data,
    check_gamma,
    check_widths,
    default_rtol,
    finish,
    narrowest,
)

Factorization = Literal["auto", "gram", "qr"]
Block = tuple[Any, Any]

_SAFETY = 4.0  # (X X^T)^+ <= _SAFETY (R^T R)^+ is what the bound on ||E Q|| rests on
_SLICE = 512  # examples at a time in float64 passes: a slice of 3,072 features stays in cache
_PANELS = 4  # the Gram matrix is symmetric: of 4 x 4 panels, 10 are computed


class Attempt(NamedTuple):
    """One factorisation that was tried.

    Attributes:
      factorization: 'gram' or 'qr'.
      accepted: whether its result was kept.
      relative_gap: of its certificate; None where it broke down before there was one.
      passes: over the data, factorisation and certificate included.
      reason: in words.
    """

    factorization: str
    accepted: bool
    relative_gap: float | None
    passes: int
    reason: str


class ColumnsSolution(NamedTuple):
    """A solution and how it was found.

    Attributes:
      solution: weights in the precision of the data; its certificate was evaluated in float64.
      factorization: the one that gave it.
      precision: of the factorisation: that of the data, or float64 where float32 data look rank deficient.
      projection_error: the bound on `||Yt - A X||_F` that the dual value allows for.
      attempts: everything that was tried, in order.
    """

    solution: SpectralSolution
    factorization: str
    precision: str
    projection_error: float
    attempts: tuple[Attempt, ...]


class CertificateError(RuntimeError):
    """No factorisation reached the tolerance asked for."""


# --- blocks of columns ----------------------------------------------------------------------------------------------


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


class _Rows(NamedTuple):
    """A block on the device, one example a row, zero rows added to fill the devices: they change none of the sums."""

    x: Array
    y: Array


# --- kernels: sums over the examples, with one all-reduce when the rows lie on several devices ------------------------


def _slices(rows: _Rows) -> tuple[_Rows, _Rows]:
    """The rows as `[k, _SLICE, ...]`, and what is left over."""
    whole = len(rows.x) // _SLICE * _SLICE
    return (
        _Rows(*(a[:whole].reshape(-1, _SLICE, a.shape[1]) for a in rows)),
        _Rows(*(a[whole:] for a in rows)),
    )


def _sum_over(function: Callable[[_Rows], Any], rows: _Rows) -> Any:
    """The sum of `function` over slices of the rows."""
    slices, rest = _slices(rows)
    total = function(rest)
    add = functools.partial(jax.tree.map, jnp.add)
    return lax.scan(lambda done, part: (add(done, function(part)), None), total, slices)[0]


def _gram(rows: _Rows) -> tuple[Array, Array]:
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


def _normal(rows: _Rows, maps: Array) -> Array:
    """`[maps X; Y] X^T` in the precision of `maps`."""

    def one(part: _Rows) -> Array:
        x, y = part.x.astype(maps.dtype), part.y.astype(maps.dtype)
        return jnp.concatenate([maps @ x.T, y.T]) @ x

    return _sum_over(one, rows)


def _sums(rows: _Rows, maps: Array, fit: Array) -> tuple[Array, Array, Array, Array]:
    """With `Z = [maps X; Y]`: `Z Z^T`, `(Y - fit X) X^T`, `||X||_F^2` and the number of values that are not finite."""

    def one(part: _Rows) -> tuple[Array, Array, Array, Array]:
        x, y = part.x.astype(maps.dtype), part.y.astype(maps.dtype)
        z = jnp.concatenate([maps @ x.T, y.T])
        broken = jnp.sum(~jnp.isfinite(part.x)) + jnp.sum(~jnp.isfinite(part.y))
        return z @ z.T, (y.T - fit @ x.T) @ x, jnp.sum(x**2), broken

    return _sum_over(one, rows)


def _triangle(rows: Array) -> Array:
    """The triangular factor of the matrix, square also where there are fewer rows than columns."""
    missing = rows.shape[1] - rows.shape[0]
    rows = jnp.pad(rows, ((0, max(missing, 0)), (0, 0)))
    return jnp.linalg.qr(rows, mode="r")


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """The kernels compiled for one device or, under `shard_map`, for the devices of a mesh."""

    mesh: Mesh | None

    def place(self, block: Block, dtype: Any) -> _Rows:
        """A block of columns as rows on the device or devices."""
        x, y = (np.asarray(a).T if not isinstance(a, jax.Array) else a.T for a in block)
        if self.mesh is None:
            return _Rows(jnp.asarray(x, dtype), jnp.asarray(y, dtype))
        missing = -len(x) % self.mesh.size
        sharding = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
        return _Rows(*(jax.device_put(np.pad(np.asarray(a, dtype), ((0, missing), (0, 0))), sharding) for a in (x, y)))

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
    def gram(self) -> Callable[[_Rows], tuple[Array, Array]]:
        return self._compile(_gram)

    @functools.cached_property
    def normal(self) -> Callable[[_Rows, Array], Array]:
        return self._compile(_normal)

    @functools.cached_property
    def sums(self) -> Callable[[_Rows, Array, Array], tuple[Array, Array, Array]]:
        return self._compile(_sums)

    def _factor(self, dtype: Any) -> Callable[[_Rows], Array]:
        """The triangular factor of `[X^T, Y^T]`: of each device's rows, then of the factors on top of one another."""

        def merge(part: Array) -> Array:
            names = self.mesh.axis_names if self.mesh is not None else ()
            return _triangle(lax.all_gather(part, names).reshape(-1, part.shape[1]))

        return self._compile(lambda rows: _triangle(jnp.concatenate(rows, axis=1, dtype=dtype)), merge)

    @functools.cached_property
    def triangle(self) -> Callable[[_Rows], Array]:
        return self._factor(None)

    @functools.cached_property
    def fine_triangle(self) -> Callable[[_Rows], Array]:
        return self._factor(jnp.float64)


@functools.cache
def _kernels(mesh: Mesh | None) -> _Kernels:
    """One set of compiled kernels for each mesh, whatever the number of solves."""
    return _Kernels(mesh)


@jax.jit
def _merge_triangles(first: Array, second: Array) -> Array:
    return jnp.linalg.qr(jnp.concatenate([first, second]), mode="r")


class _Data:
    """The blocks with their kernels, and a count of the passes made."""

    def __init__(self, columns: Iterable[Block], mesh: Mesh | None, report: Callable[[str], None] | None) -> None:
        self._columns, self.kernels, self._report = columns, _kernels(mesh), report
        self.passes = 0
        self.n = 0
        self.shape: tuple[int, int] | None = None
        self.dtype: Any = None

    @property
    def rows(self) -> tuple[int, int]:
        """`d_0, d_H`."""
        if self.shape is None:
            raise SpectralError("no block has been read yet.")
        return self.shape

    def total(self, function: Callable[[_Rows], Any], what: str, combine: Callable[[Any, Any], Any] = jnp.add) -> Any:
        """The sum (or other combination) of `function` over the blocks: one pass."""
        self.passes += 1
        done: Any = None
        n = 0
        for index, block in enumerate(self._columns):
            self._check(block, index)
            n += block[0].shape[1]
            if self.passes == 1:
                self._check_values(block, index)
            # One block is computed on while the next is read; without this JAX would queue more of them.
            jax.block_until_ready(done)
            part = function(self.kernels.place(block, self.dtype))
            done = part if done is None else jax.tree.map(combine, done, part)
            if self._report is not None:
                jax.block_until_ready(done)
                self._report(f"{what}, pass {self.passes}: {n:,} examples")
        if done is None:
            raise SpectralError(
                f"the columns gave no block in pass {self.passes}; give an iterable that starts afresh each time, a"
                " Columns."
            )
        if self.n and n != self.n:
            raise SpectralError(
                f"the columns gave {n} examples in pass {self.passes} and {self.n} before; they must be the same each"
                " time: give a Columns, not an iterator that is used up."
            )
        self.n = n
        return done

    def _check(self, block: Block, index: int) -> None:
        if not isinstance(block, (tuple, list)) or len(block) != 2:
            raise SpectralError(f"block {index} is a {type(block).__name__}; give pairs x [d_0, b], y [d_H, b].")
        check_data(*block, values=False)
        shape, dtype = (block[0].shape[0], block[1].shape[0]), np.result_type(*(a.dtype for a in block))
        if self.shape is None:
            self.shape, self.dtype = shape, dtype
        if shape != self.shape or dtype != self.dtype:
            raise SpectralError(
                f"block {index} has (d_0, d_H)={shape} of {dtype}, the blocks before {self.shape} of {self.dtype};"
                " all must agree."
            )

    @staticmethod
    def _check_values(block: Block, index: int) -> None:
        for name, values in zip("xy", block, strict=True):
            if not np.isfinite(np.sum(values, dtype=np.float64)):
                raise SpectralError(
                    f"block {index}: {name} holds values that are not finite; remove those examples first."
                )


# --- factorisations -------------------------------------------------------------------------------------------------


class _Fit(NamedTuple):
    """`A = Y X^+`, the singular value decomposition of `Yt = A X`, and what the bound on the error of A needs.

    Attributes:
      fit: A, `[d_H, d_0]`, float64.
      left: of Yt, `[d_H, q]`.
      sigma: the singular values, `[q]`, in falling order.
      right: `V^T X^+`, `[q, d_0]`.
      precision: of the factorisation.
      whiten: `G -> G R^{-1}` with `R^T R` close to `X X^T`, so that `||whiten(G)||_F^2` is `tr(G (X X^T)^+ G^T)`.
    """

    fit: Array
    left: Array
    sigma: Array
    right: Array
    precision: str
    whiten: Callable[[Array], Array]


class _Breakdown(Exception):
    """A factorisation that cannot be relied on, and why."""


@functools.partial(jax.jit, static_argnames="transpose")
def _solve(lower: Array, values: Array, transpose: bool) -> Array:
    """`values L^{-T}` or, transposed, `values L^{-1}`."""
    return lax.linalg.triangular_solve(lower, values, left_side=False, lower=True, transpose_a=not transpose)


@functools.partial(jax.jit, static_argnames=("number", "rounds"))
def _smallest_ritz(lower: Array, number: int, rounds: int = 8) -> tuple[Array, Array]:
    """The smallest Ritz values of `L L^T` and their vectors `[number, d]`, by inverse subspace iteration."""
    start = jax.random.normal(jax.random.key(0), (number, len(lower)), lower.dtype)

    def one(vectors: Array, _: None) -> tuple[Array, None]:
        solved = _solve(lower, _solve(lower, vectors, False), True)
        return jnp.linalg.qr(solved.T)[0].T, None

    vectors, _ = lax.scan(one, jnp.linalg.qr(start.T)[0].T, length=rounds)
    image = vectors @ lower
    values, rotation = jnp.linalg.eigh(image @ image.T)
    return values, rotation.T @ vectors


def _cholesky(gram: Array) -> tuple[Array, float]:
    """The lower Cholesky factor of the Gram matrix, with the least of some shifts that lets it exist."""
    unit = float(jnp.finfo(gram.dtype).eps * jnp.max(jnp.diagonal(gram)))
    for shift in (0.0, *(unit * 10.0**k for k in range(4))):
        lower = jnp.linalg.cholesky(gram + shift * jnp.eye(len(gram), dtype=gram.dtype))
        if bool(jnp.isfinite(lower).all()):
            return lower, shift
    raise _Breakdown("the Gram matrix has no Cholesky factor, even shifted: X is numerically rank deficient")


def _applied(kernel: Callable[..., Any], *rest: Array) -> Callable[[_Rows], Any]:
    """A kernel with everything but the rows given."""
    return lambda rows: kernel(rows, *rest)


def _by_gram(data: _Data, tolerance: float) -> _Fit:
    """Cholesky of the Gram matrix, then preconditioned conjugate gradients, `fit X X^T = Y X^T`, row by row."""
    gram, cross = data.total(data.kernels.gram, "Gram matrix")
    lower, shift = _cholesky(gram)
    values, vectors = _smallest_ritz(lower, min(4, len(lower)))
    low = lower.dtype

    def whiten(g: Array) -> Array:
        return _solve(lower, g.astype(low), False).astype(jnp.float64)

    def precondition(g: Array) -> Array:
        return _solve(lower, whiten(g).astype(low), True).astype(jnp.float64)

    fit = precondition(cross)
    # The smallest Ritz vectors ride along in the first pass: what the factor says of them against what X says.
    block = jnp.concatenate([fit, vectors.astype(jnp.float64)])
    image = data.total(_applied(data.kernels.normal, block), "conjugate gradients")
    true = jnp.sum(image[len(fit) : len(block)] * vectors, axis=1)
    worst = float(jnp.max(values.astype(jnp.float64) / jnp.maximum(true, 1e-300)))
    if not worst < _SAFETY:
        raise _Breakdown(
            f"the factor overstates the smallest eigenvalue of X X^T {worst:.3g} times (shift {shift:.3g}): X is too"
            f" ill-conditioned for a Gram matrix in {low}"
        )
    target = image[len(block) :]
    residual = target - image[: len(fit)]
    solved = precondition(residual)
    direction, error = solved, jnp.sum(residual * solved, axis=1)
    for _ in range(_MAX_ITERATIONS):
        # The squared error of `fit X` against its squared norm: both bounds lose at most this share.
        if _SAFETY * float(jnp.sum(error)) <= 1e-3 * tolerance * float(jnp.sum(fit * (target - residual))):
            break
        image = data.total(_applied(data.kernels.normal, direction), "conjugate gradients")[: len(fit)]
        curvature = jnp.sum(direction * image, axis=1)
        step = (error / jnp.where(curvature > 0, curvature, 1))[:, None]
        fit, residual = fit + step * direction, residual - step * image
        solved = precondition(residual)
        after = jnp.sum(residual * solved, axis=1)
        direction = solved + (after / jnp.where(error > 0, error, 1))[:, None] * direction
        error = after
    else:
        raise _Breakdown(f"conjugate gradients did not converge in {_MAX_ITERATIONS} iterations")
    squares, left = jnp.linalg.eigh(fit @ (target - residual).T)
    squares, left = squares[::-1], left[:, ::-1]
    q = min(len(squares), len(lower), data.n)
    sigma = jnp.sqrt(jnp.maximum(squares[:q], 0))
    # eigenvalues are exact to rounding of the largest: what lies below is no singular value
    visible = squares[:q] > len(squares) * jnp.finfo(jnp.float64).eps * squares[0]
    sigma = jnp.where(visible, sigma, 0)
    right = jnp.where(visible, 1 / jnp.where(visible, sigma, 1), 0)[:, None] * (left[:, :q].T @ fit)
    return _Fit(fit, left[:, :q], sigma, right, str(low), whiten)


def _has_full_rank(triangle: Array, data: _Data) -> bool:
    """Whether the singular values of the part of the triangle that belongs to X all stand clear of rounding."""
    d_0 = data.rows[0]
    lower = triangle[:d_0, :d_0].T.astype(jnp.float64)
    if not bool(jnp.all(jnp.diagonal(lower) != 0)):
        return False
    smallest = float(jnp.sqrt(jnp.maximum(_smallest_ritz(lower, min(4, d_0))[0][0], 0)))
    return smallest > default_rtol(d_0, data.n, triangle.dtype) * float(jnp.linalg.norm(lower))


def _by_qr(data: _Data, tolerance: float) -> _Fit:
    """The triangular factor of `[X^T, Y^T]`, block after block.

    Where X looks rank deficient in float32 the factor is made again in float64; where it is so there, the factor is
    cut by its singular values.
    """
    del tolerance
    triangle = data.total(data.kernels.triangle, "QR factorisation", _merge_triangles)
    full = _has_full_rank(triangle, data)
    if not full and triangle.dtype != jnp.float64:
        triangle = data.total(data.kernels.fine_triangle, "QR factorisation in float64", _merge_triangles)
        full = _has_full_rank(triangle, data)
    d_0 = data.rows[0]
    corner, targets = triangle[:d_0, :d_0], triangle[:d_0, d_0:].astype(jnp.float64)
    lower = corner.T.astype(jnp.float64)
    if full:
        inverse = None

        def whiten(g: Array) -> Array:
            return _solve(lower, g, False)

    else:
        turn, stretch, back = jnp.linalg.svd(corner)
        rtol = default_rtol(d_0, data.n, corner.dtype)
        keep = stretch > rtol * stretch[0]
        inverse = jnp.where(keep, 1 / jnp.where(keep, stretch, 1), 0).astype(jnp.float64)
        turn, back = turn.astype(jnp.float64), back.astype(jnp.float64)
        targets = (turn * keep[None, :]).T @ targets

        def whiten(g: Array) -> Array:
            return (g @ back.T) * inverse[None, :]

    def unwhiten(z: Array) -> Array:
        """`z R^{-T}`: rows in coordinates of the row space of X to maps that act on X."""
        return _solve(lower, z, True) if inverse is None else (z * inverse[None, :]) @ back

    left, sigma, right = jnp.linalg.svd(targets.T, full_matrices=False)
    q = min(len(sigma), data.n)
    right = unwhiten(right[:q])
    return _Fit(unwhiten(targets.T), left[:, :q], sigma[:q], right, str(triangle.dtype), whiten)


_FACTORIZATIONS: dict[str, Callable[[_Data, float], _Fit]] = {"gram": _by_gram, "qr": _by_qr}
_MAX_ITERATIONS = 40


# --- the certificate ------------------------------------------------------------------------------------------------


def _certify(data: _Data, fit: _Fit, gamma: float, widths: tuple[int, ...]) -> tuple[SpectralSolution, float]:
    """Weights in the data's precision, and problems (4) and (5) at them in float64; with the bound on `||E Q||_F`."""
    (d_0, d_H), n = data.rows, data.n
    r, depth = narrowest(widths, d_0, d_H, n), len(widths) + 1
    kept = jnp.maximum(fit.sigma[:r] - gamma, 0)
    weights = assemble(kept, fit.left[:, :r], fit.right[:r], widths)
    weights = tuple(w.astype(data.dtype) for w in weights)
    exact = [w.astype(jnp.float64) for w in weights]
    whole = functools.reduce(lambda done, layer: layer @ done, exact)
    maps = jnp.concatenate([whole, exact[0][:r], fit.fit])
    products, gradient, x_squared, broken = data.total(
        lambda rows: data.kernels.sums(rows, maps, fit.fit), "certificate"
    )
    if int(broken):
        raise SpectralError(f"x or y holds {int(broken)} values that are not finite; remove those examples first.")
    at = np.cumsum([0, d_H, r, d_H, d_H]).tolist()
    spans = [slice(low, high) for low, high in itertools.pairwise(at)]
    part = [[products[rows, cols] for cols in spans] for rows in spans]
    half_norm = 0.5 * jnp.trace(part[3][3])
    misfit = half_norm - jnp.trace(part[0][3]) + 0.5 * jnp.trace(part[0][0])
    first = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(part[1][1]), 0))
    powers = [first, *(jnp.linalg.svd(w, compute_uv=False) for w in exact[1:])]
    primal = misfit + gamma / depth * sum(jnp.sum(p**depth) for p in powers)
    # Lambda clips the singular values of A X as float64 has them: to clip those of the factor would miss the ceiling by
    # the factor's rounding, and that costs the dual value as much.
    squares, basis = jnp.linalg.eigh(part[2][2])
    norms = jnp.sqrt(jnp.maximum(squares, 0))
    clip = (basis * jnp.where(norms > gamma, gamma / jnp.where(norms > 0, norms, 1), 1)[None, :]) @ basis.T
    # (Yt - Lambda)(Yt - Lambda)^T but for the square of E Q, whose trace `error` bounds.
    left_over = jnp.eye(d_H) - clip
    cross = left_over @ fit.fit @ gradient.T
    gap = left_over @ part[2][2] @ left_over.T + cross + cross.T
    error = _SAFETY * jnp.sum(fit.whiten(gradient) ** 2)
    rounding = jnp.finfo(jnp.float64).eps * jnp.linalg.norm(fit.fit) * jnp.sqrt(2 * half_norm * x_squared)
    top = jnp.sum(jnp.maximum(jnp.linalg.eigvalsh(gap)[::-1][:r], 0))
    solution = finish(
        weights,
        clip @ fit.fit,
        fit.sigma,
        jnp.sum(kept > default_rtol(d_0, n, data.dtype) * jnp.sqrt(2 * half_norm)),
        jnp.asarray(gamma, jnp.float64),
        primal,
        half_norm - 0.5 * (top + error) - rounding,
        half_norm,
        (d_0, d_H, n),
        default_rtol(d_H, n, data.dtype),
    )
    return jax.tree.map(np.asarray, solution), float(jnp.sqrt(error))


# --- the front door -------------------------------------------------------------------------------------------------


def solve_columns(
    columns: Iterable[Block],
    *,
    gamma: float,
    widths: Sequence[int],
    factorization: Factorization = "auto",
    tolerance: float = 1e-6,
    mesh: Mesh | None = None,
    report: Callable[[str], None] | None = None,
) -> ColumnsSolution:
    """Solves problem (4) for data that come in blocks of columns, in bounded memory, and certifies the result.

    Not for use inside `jit`: it looks at the certificate to decide what to do.  In memory at a time: one block, a few
    `d_0 x d_0` matrices, and for 'qr' a copy of the block.

    Args:
      columns: a `Columns` (see `in_blocks`), or a list of pairs `x [d_0, b]`, `y [d_H, b]`; passed over several times.
        float32 or float64; the factorisation is made in that precision, the certificate in float64.
      gamma: regularisation, at least 0.
      widths: the hidden widths `(d_1, ..., d_{H-1})`.
      factorization: 'gram' (fast), 'qr' (accurate), or 'auto': fast, and accurate only if that certificate fails.
      tolerance: the relative gap up to which a certificate holds.
      mesh: devices over which the columns of each block are spread; None is one device.
      report: called with a line of progress after each block.

    Returns:
      The solution, with NumPy arrays, and how it was found.  Lambda is float64, the weights are as the data.

    Raises:
      SpectralError: for data, widths, gamma or settings that are not allowed, or blocks that do not agree.
      CertificateError: if no factorisation reaches the tolerance.
    """
    check_gamma(gamma)
    widths = check_widths(widths)
    if factorization not in get_args(Factorization):
        raise SpectralError(unknown("factorization", factorization, get_args(Factorization)))
    if not isinstance(columns, Iterable):
        raise SpectralError(
            f"columns is a {type(columns).__name__}; give a Columns (see in_blocks) or a list of pairs."
        )
    if not 0 < tolerance < 1:
        raise SpectralError(f"tolerance={tolerance} must lie between 0 and 1; it is a relative gap.")
    names = ("gram", "qr") if factorization == "auto" else (factorization,)
    data = _Data(columns, mesh, report)
    with jax.enable_x64(True):  # float32 data stay float32; the certificate is float64
        return _first_that_holds(data, float(gamma), widths, names, tolerance)


def _first_that_holds(
    data: _Data, gamma: float, widths: tuple[int, ...], names: Sequence[str], tolerance: float
) -> ColumnsSolution:
    """Tries the factorisations in order."""
    attempts: list[Attempt] = []
    for name in names:
        before = data.passes
        try:
            found = _FACTORIZATIONS[name](data, tolerance)
        except _Breakdown as broken:
            attempts.append(Attempt(name, False, None, data.passes - before, str(broken)))
            continue
        solution, error = _certify(data, found, gamma, widths)
        gap = float(solution.relative_gap)
        holds = abs(gap) <= tolerance
        reason = f"relative gap {gap:.3g} {'within' if holds else 'not within'} the tolerance {tolerance:g}"
        if found.precision != str(data.dtype):
            reason += f", after a factorisation in {found.precision}: X is all but rank deficient in {data.dtype}"
        attempts.append(Attempt(name, holds, gap, data.passes - before, reason))
        if holds:
            return ColumnsSolution(solution, name, found.precision, error, tuple(attempts))
    told = "; ".join(f"{a.factorization}: {a.reason}" for a in attempts)
    raise CertificateError(
        f"no certificate within {tolerance:g} ({told}).  Give float64 data, a larger tolerance, or"
        " factorization='qr' or 'auto'."
    )
