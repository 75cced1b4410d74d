"""Two factorisations of data in blocks that give `A = Y X^+` and the singular values of `Yt = A X`.

- `'gram'` (fast): `X X^T` by matrix products, its Cholesky factor L, then conjugate gradients on the normal equations
  with L as preconditioner and with products of the data themselves.  The Gram matrix squares the condition number of X;
  the iteration puts the lost digits back as long as L is close enough to X.
- `'qr'` (accurate): the triangular factor of `[X^T, Y^T]` by Householder reflections, block after block (TSQR).  No
  orthogonal factor is formed: `A = (R_11^{-1} R_12)^T`, and the singular values of Yt are those of R_12.  When X is
  numerically rank deficient, R_11 is cut by its singular value decomposition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualgap_jax.spectral.blocks import Data
from dualgap_jax.spectral.certificate import SAFETY
from dualgap_jax.spectral.dependence import NONE, Dependencies, find_dependencies
from dualgap_jax.spectral.kernels import Rows, merge_triangles
from dualgap_jax.spectral.solution import default_rtol

_MAX_ITERATIONS = 40


class Fit(NamedTuple):
    """`A = Y X^+`, the singular value decomposition of `Yt = A X`, and what the bound on the error of A needs.

    Attributes:
      fit: A, `[d_H, d_0]`, float64.
      left: of Yt, `[d_H, q]`.
      sigma: the singular values, `[q]`, in falling order.
      right: `V^T X^+`, `[q, d_0]`.
      precision: of the factorisation.
      whiten: `G -> G R^{-1}` with `R^T R` close to `X X^T`, so that `||whiten(G)||_F^2` is `tr(G (X X^T)^+ G^T)`.
      unresolved: number of directions that X may have below the rounding of the factor.
      dependencies: what was proven to be no direction at all.
    """

    fit: Array
    left: Array
    sigma: Array
    right: Array
    precision: str
    whiten: Callable[[Array], Array]
    unresolved: int = 0
    dependencies: Dependencies = NONE


class Breakdown(Exception):
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
        shifted = gram + shift * jnp.eye(len(gram), dtype=gram.dtype) if shift else gram
        lower = lax.linalg.cholesky(shifted, symmetrize_input=False)  # it is symmetric to the last bit
        if bool(jnp.isfinite(jnp.diagonal(lower)).all()):
            return lower, shift
    raise Breakdown("the Gram matrix has no Cholesky factor, even shifted: X is numerically rank deficient")


def _applied(kernel: Callable[..., Any], *rest: Array) -> Callable[[Rows], Any]:
    """A kernel with everything but the rows given."""
    return lambda rows: kernel(rows, *rest)


def _by_gram(data: Data, tolerance: float, rtol: float) -> Fit:
    """Cholesky of the Gram matrix, then preconditioned conjugate gradients, `fit X X^T = Y X^T`, row by row."""
    gram, cross = data.total(data.kernels.gram, "Gram matrix")
    lower, shift = _cholesky(gram)
    values, vectors = _smallest_ritz(lower, min(4, len(lower)))
    low = lower.dtype
    if not float(jnp.sqrt(jnp.maximum(values[0], 0))) > rtol * float(jnp.linalg.norm(lower)):
        raise Breakdown(f"X has singular values at or below rtol={rtol:.3g}, which a Gram matrix cannot cut")

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
    if not worst < SAFETY:
        raise Breakdown(
            f"the factor overstates the smallest eigenvalue of X X^T {worst:.3g} times (shift {shift:.3g}): X is too"
            f" ill-conditioned for a Gram matrix in {low}"
        )
    target = image[len(block) :]
    residual = target - image[: len(fit)]
    solved = precondition(residual)
    direction, error = solved, jnp.sum(residual * solved, axis=1)
    for _ in range(_MAX_ITERATIONS):
        # The squared error of `fit X` against its squared norm: both bounds lose at most this share.
        if SAFETY * float(jnp.sum(error)) <= 1e-3 * tolerance * float(jnp.sum(fit * (target - residual))):
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
        raise Breakdown(f"conjugate gradients did not converge in {_MAX_ITERATIONS} iterations")
    squares, left = jnp.linalg.eigh(fit @ (target - residual).T)
    squares, left = squares[::-1], left[:, ::-1]
    q = min(len(squares), len(lower), data.n)
    sigma = jnp.sqrt(jnp.maximum(squares[:q], 0))
    # eigenvalues are exact to rounding of the largest: what lies below is no singular value
    visible = squares[:q] > len(squares) * jnp.finfo(jnp.float64).eps * squares[0]
    sigma = jnp.where(visible, sigma, 0)
    right = jnp.where(visible, 1 / jnp.where(visible, sigma, 1), 0)[:, None] * (left[:, :q].T @ fit)
    return Fit(fit, left[:, :q], sigma, right, str(low), whiten)


def _has_full_rank(triangle: Array, data: Data, rtol: float) -> bool:
    """Whether the singular values of the part of the triangle that belongs to X all stand clear of a cut."""
    d_0 = data.shape[0]
    lower = triangle[:d_0, :d_0].T.astype(jnp.float64)
    if not bool(jnp.all(jnp.diagonal(lower) != 0)):
        return False
    smallest = float(jnp.sqrt(jnp.maximum(_smallest_ritz(lower, min(4, d_0))[0][0], 0)))
    return smallest > max(rtol, default_rtol(d_0, data.n, triangle.dtype)) * float(jnp.linalg.norm(lower))


def _by_qr(data: Data, tolerance: float, rtol: float) -> Fit:
    """The triangular factor of `[X^T, Y^T]`, block after block.

    Where X looks rank deficient in float32 the factor is made again in float64; where it is so there, or is to be cut,
    the factor is decomposed.  A leaves out what float64 cannot tell from rounding; the solution what `rtol` cuts.
    """
    del tolerance
    triangle = data.total(data.kernels.triangle, "QR factorisation", merge_triangles)
    full = _has_full_rank(triangle, data, rtol)
    if not full and triangle.dtype != jnp.float64:
        triangle = data.total(data.kernels.fine_triangle, "QR factorisation in float64", merge_triangles)
        full = _has_full_rank(triangle, data, rtol)
    d_0 = data.shape[0]
    corner, targets = triangle[:d_0, :d_0], triangle[:d_0, d_0:].astype(jnp.float64)
    if full:
        return _from_triangle(corner, targets, data, str(triangle.dtype))
    return _from_decomposition(corner, targets, data, rtol)


def _from_triangle(corner: Array, targets: Array, data: Data, precision: str) -> Fit:
    """X of full rank: `A = (R_11^{-1} R_12)^T`."""
    lower = corner.T.astype(jnp.float64)
    left, sigma, right = jnp.linalg.svd(targets.T, full_matrices=False)
    q = min(len(sigma), data.n)
    right = _solve(lower, right[:q], True)
    fit = _solve(lower, targets.T, True)
    return Fit(fit, left[:, :q], sigma[:q], right, precision, lambda g: _solve(lower, g, False))


def _from_decomposition(corner: Array, targets: Array, data: Data, rtol: float) -> Fit:
    """X of deficient rank, or to be cut."""
    turn, stretch, back = jnp.linalg.svd(corner)
    rounding = default_rtol(*data.shape[:1], data.n)
    visible = stretch > rounding * stretch[0]
    keep = visible & (stretch > rtol * stretch[0])
    inverse = jnp.where(visible, 1 / jnp.where(visible, stretch, 1), 0)
    turned = turn.T @ targets
    left, sigma, right = jnp.linalg.svd((keep[:, None] * turned).T, full_matrices=False)
    q = min(len(sigma), data.n)
    right = (right[:q] * jnp.where(keep, inverse, 0)[None, :]) @ back
    dependencies = NONE
    hidden = min(int(data.nonzero.sum()), data.n) - int(visible.sum())
    if hidden > 0:
        directions = np.where(data.nonzero, np.asarray(back)[~np.asarray(visible)], 0.0)
        dependencies = find_dependencies(data.blocks, directions)
        dependencies = dependencies._replace(powers=dependencies.powers + data.powers.rows[dependencies.rows])
        hidden = max(min(int(data.nonzero.sum()) - dependencies.number, data.n) - int(visible.sum()), 0)
    return Fit(
        (turned.T * inverse[None, :]) @ back,
        left[:, :q],
        sigma[:q],
        right,
        "float64",
        lambda g: (g @ back.T) * inverse[None, :],
        max(hidden, 0),
        dependencies,
    )


FACTORIZATIONS: dict[str, Callable[[Data, float, float], Fit]] = {"gram": _by_gram, "qr": _by_qr}
