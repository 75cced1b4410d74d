"""An independent proof of a claim about problem (4), in NumPy alone.

Given are data, weights and a dual variable from anywhere.  Proven are a lower and an upper bound of the optimum, with
an allowance for every rounding written out; nothing is shared with the solvers, and nothing about how weights and dual
variable were found is believed.

**Rounding.**  `u = 2^-53`, `g(k) = k u / (1 - k u)`.  In whatever order a product is summed,
`|fl(A B) - A B| <= g(k) |A| |B|` entry by entry, k being the length of the sums (Higham, Accuracy and Stability of
Numerical Algorithms, (3.13)).  Eigenvalues and singular values of small matrices are taken to be off by at most
`16 p u` of the norm (backward stability of LAPACK).  The bounds are themselves computed in float64; all are enlarged by
`_ROOM` for that.  The problem is first scaled by powers of two, which is exact, so that underflow is far below every
bound.

**Upper bound.**  Problem (4) at the weights, plus the allowances.

**Lower bound.**  Let `Lambda = M X` be shrunk until `||Lambda|| <= gamma` is proven, F = Y - Lambda, and
r = min(d_0, ..., d_H, n).  For all weights, problem (4) is at least `1/2 ||Y||_F^2 - 1/2 ||F Q||_r^2` with Q the
projector onto the row space of X (weak duality).  Let Z = B X have rows that are proven to be independent,
`Z Z^T >= c I`, let k be at most by how much the rank of X exceeds theirs, and let T be any matrix, h = T Z, E = F - h.
Then

    ||F Q||_r^2 <= top_r(h h^T + h E^T + E h^T) + ||E Z^T||_F^2 / c + top_min(k, r)(E E^T),

top_j being the sum of the j largest eigenvalues: `F Q_Z = h + E Q_Z`, `F (Q - Q_Z) = E (Q - Q_Z)` of rank at most k,
and Ky Fan's inequality.  A good T makes E almost orthogonal to Z; a bad one only widens the bound.  The rank of X is at
most n, and at most the number of its rows that are not zero less that of the dependencies among rows that are given,
which are checked in integers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dualgap_jax.spectral.evidence import Evidence, VerificationError

_UNIT = 2.0**-53
_ROOM = 1 + 1e-9  # for the rounding of the bounds themselves
_TINY = 1e-280  # more than all underflow together, in the scaled problem


class Verification(NamedTuple):
    """What was proven: `lower <= optimum of (4) <= upper`.

    Attributes:
      lower: the lower bound, from the dual variable.
      upper: the upper bound, from the weights.
      relative_gap: `(upper - lower) / (1/2 ||Y||_F^2)`.
      unresolved: k, directions that X may have and that the lower bound is charged for.
      basis: 'rows' where the rows of X were proven to be independent as they are, 'qr' where a basis was needed.
    """

    lower: float
    upper: float
    relative_gap: float
    unresolved: int
    basis: str


def verify(
    blocks: Iterable[tuple[Any, Any]],
    *,
    gamma: float,
    widths: Sequence[int],
    weights: Sequence[Any],
    coefficients: Float[Any, "d_H d_0"],
    dependencies: tuple[Any, Any, Any] | None = None,
) -> Verification:
    """Proves a lower and an upper bound of the optimum of problem (4), in float64 with all rounding allowed for.

    Makes two passes over the data, four where X is ill-conditioned; needs a few `d_0 x d_0` matrices.

    Args:
      blocks: Pairs `x [d_0, b]`, `y [d_H, b]`, float32 or float64, that can be iterated over several times.
      gamma: The regularisation, at least 0.
      widths: The hidden widths `(d_1, ..., d_{H-1})`.
      weights: The layers `W_1, ..., W_H`, `W_i` of shape `[d_i, d_{i-1}]`.
      coefficients: M of the dual variable `Lambda = M X`.
      dependencies: Combinations of rows of X that are zero: the rows `[q]`, integers `[k, q]`, and the powers of two
        `[q]` that the rows are divided by, as `solve_columns` returns them.

    Raises:
      VerificationError: The claim cannot be checked, or the bounds leave the range of the numbers.
    """
    with np.errstate(all="ignore"):  # what overflows bounds nothing, and is an error at the end
        return _verified(Evidence(blocks, len(weights)), gamma, widths, weights, coefficients, dependencies)


def _verified(
    data: Evidence,
    gamma: float,
    widths: Sequence[int],
    weights: Sequence[Any],
    coefficients: Float[Any, "d_H d_0"],
    dependencies: tuple[Any, Any, Any] | None,
) -> Verification:
    """See `verify`."""
    layers, dual, ceiling = data.scaled(weights, coefficients, gamma, widths)
    first = _first_pass(data, layers, dual)
    upper = _upper(first, layers, ceiling, data.terms)
    norm = math.sqrt(_largest(first.dual_square, data.terms, first.dual_size)) + first.dual_error
    dual = dual * (min(1.0, ceiling / (norm * _ROOM)) if norm > 0 else 1.0) * (1 - 4 * _UNIT)
    basis = _rows_as_basis(first, data, dual) or _basis_by_qr(data, dual)
    rank = min(int(data.present.sum()) - data.proven(dependencies), data.n)
    hidden = max(rank - len(basis.rows_error), 0)
    r = min(*(int(w) for w in widths), *data.shape, data.n)
    lower = _lower(data, dual, basis, hidden, r)
    half = 0.5 * first.y_square
    values = [math.ldexp(v, 2 * data.power) if abs(v) < 2.0**1000 else math.inf for v in (lower, upper, half)]
    if not all(math.isfinite(v) for v in values) or (half > 0 and values[2] < np.finfo(float).tiny):
        raise VerificationError("the bounds leave the range of float64; multiply y and gamma by one number.")
    low, high = math.nextafter(values[0], -math.inf), math.nextafter(values[1], math.inf)
    return Verification(low, high, (upper - lower) / half if half else 0.0, hidden, basis.name)


def _grow(k: int) -> float:
    """`g(k)`, enlarged."""
    return k * _UNIT / (1 - k * _UNIT) * _ROOM


# --- both bounds need -------------------------------------------------------------------------------------------------


class _First(NamedTuple):
    """Sums of the first pass; `error` is a bound of the Frobenius norm of the rounding of what the name says."""

    gram: np.ndarray
    cross: np.ndarray
    y_square: float
    dual_square: np.ndarray
    dual_size: float
    dual_error: float
    first_square: np.ndarray
    first_size: float
    first_error: float
    residual: float
    residual_error: float


def _first_pass(data: Evidence, layers: list[np.ndarray], dual: np.ndarray) -> _First:
    (d_0, d_H), hidden = data.shape, len(layers[0])
    gram, cross = np.zeros((d_0, d_0)), np.zeros((d_H, d_0))
    dual_square, first_square = np.zeros((d_H, d_H)), np.zeros((hidden, hidden))
    y_square = dual_abs = first_abs = residual = through_abs = 0.0
    for x, y in data:
        gram += x @ x.T
        cross += y @ x.T
        size = np.abs(x)
        image, first = dual @ x, layers[0] @ x
        dual_square += image @ image.T
        first_square += first @ first.T
        dual_abs += float(np.sum((np.abs(dual) @ size) ** 2))
        through = np.abs(layers[0]) @ size
        first_abs += float(np.sum(through**2))
        output = first
        for layer in layers[1:]:
            output, through = layer @ output, np.abs(layer) @ through
        residual += float(np.sum((y - output) ** 2))
        through_abs += float(np.sum((through + np.abs(y)) ** 2))
        y_square += float(np.sum(y**2))
    wide = 1 + _grow(data.terms + d_0)
    lengths = d_0 + sum(len(w) for w in layers)
    return _First(
        gram,
        cross,
        y_square,
        dual_square,
        float(np.trace(dual_square)) * wide,
        _grow(d_0) * math.sqrt(dual_abs * wide) + _TINY,
        first_square,
        float(np.trace(first_square)) * wide,
        _grow(d_0) * math.sqrt(first_abs * wide) + _TINY,
        residual * wide,
        _grow(lengths + 1) * math.sqrt(through_abs * wide) + _TINY,
    )


def _largest(square: np.ndarray, terms: int, size: float) -> float:
    """At least the largest eigenvalue of `A A^T`, computed as a sum of `terms` terms, with `||A||_F^2 <= size`."""
    top = float(np.linalg.eigvalsh(square)[-1])
    return max(top, 0.0) * _ROOM + (_grow(terms) + 16 * len(square) * _UNIT) * size * _ROOM + _TINY


def _upper(first: _First, layers: list[np.ndarray], ceiling: float, terms: int) -> float:
    """Problem (4) at the weights, at most."""
    depth = len(layers)
    misfit = 0.5 * (math.sqrt(first.residual) * _ROOM_EPS + first.residual_error) ** 2
    size = math.sqrt(first.first_size)
    error = (_grow(terms) + 16 * len(first.first_square) * _UNIT) * first.first_size
    error += first.first_error * (2 * size + first.first_error) + _TINY
    if depth == 2:
        penalty = first.first_size + first.first_error * (2 * size + first.first_error)
    else:
        penalty = float(np.sum((np.maximum(np.linalg.eigvalsh(first.first_square), 0) + error) ** (depth / 2)))
    for layer in layers[1:]:
        sigma = np.linalg.svd(layer, compute_uv=False)
        penalty += float(np.sum((sigma + 16 * max(layer.shape) * _UNIT * sigma[0]) ** depth))
    powers = 1 + _grow(8 * depth + sum(len(w) for w in layers) + 16)
    return (misfit + ceiling / depth * penalty) * powers


_ROOM_EPS = 1 + 8 * _UNIT

# --- the lower bound --------------------------------------------------------------------------------------------------


class _Basis(NamedTuple):
    """Z = B X, and T.

    Attributes:
      name: see `Verification`.
      map: B, None for the identity.
      rows_error: bounds of the rounding of each row of Z, in norm, `[p]`.
      least: c.
      size: at least `||Z||_F`.
      fit: T.
    """

    name: str
    map: np.ndarray | None
    rows_error: np.ndarray
    least: float
    size: float
    fit: np.ndarray


def _rows_as_basis(first: _First, data: Evidence, dual: np.ndarray) -> _Basis | None:
    """Z = X, its rows divided by their norms, if a shifted Cholesky factorisation proves them to be independent.

    If the factorisation of `N - s I` succeeds in floating point, the least eigenvalue of N is at least s less
    `g(p + 2)` of the trace (Rump 2006).
    """
    if not data.present.all():
        return None
    p = len(first.gram)
    scale = 1 / np.sqrt(np.diagonal(first.gram))
    gram = scale[:, None] * first.gram * scale[None, :]
    noise = (_grow(data.terms) + _grow(p + 6)) * 2 * p
    for shift in (1e-2, 1e-4, 1e-6, 1e-8):
        if shift < 4 * noise:
            return None
        try:
            np.linalg.cholesky(gram - shift * np.eye(p))
        except np.linalg.LinAlgError:
            continue
        target = (first.cross - dual @ first.gram) * scale[None, :]
        fit = np.linalg.solve(gram, target.T).T
        fit += np.linalg.solve(gram, (target - fit @ gram).T).T
        # the scaled rows are rounded once, entry by entry
        return _Basis("rows", np.diag(scale), np.full(p, 4 * _UNIT), shift - noise, math.sqrt(p) * _ROOM, fit)
    return None


def _basis_by_qr(data: Evidence, dual: np.ndarray) -> _Basis:
    """A basis of the directions of X that rounding leaves no doubt about."""
    d_0, _ = data.shape
    triangle = np.zeros((0, d_0))
    norms = np.zeros(d_0)
    for x, _ in data:
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, x.T]), mode="r"))
        norms += np.sum(x**2, axis=1)
    norms = np.sqrt(norms) * (1 + _grow(data.terms))
    _, sigma, right = np.linalg.svd(triangle, full_matrices=False)
    seen = sigma > 4 * _UNIT * sigma.max(initial=0.0)
    turn = right[seen] / sigma[seen][:, None]
    error = _grow(d_0) * (np.abs(turn) @ norms)
    for most in (1e-2, 1e-4):
        basis = _independent(data, dual, turn[np.sqrt(np.cumsum(error**2)) < most], error)
        if basis is not None:
            return basis
    return _Basis("qr", turn[:0], error[:0], 1.0, 0.0, np.zeros((len(dual), 0)))  # all of X is charged


def _independent(data: Evidence, dual: np.ndarray, turn: np.ndarray, error: np.ndarray) -> _Basis | None:
    """Z = turn X, if its rows are proven to be independent, and the rounding of each."""
    p = len(turn)
    error = error[:p]
    gram, cross, size = np.zeros((p, p)), np.zeros((len(dual), p)), 0.0
    for x, y in data:
        z = turn @ x
        gram += z @ z.T
        cross += (y - dual @ x) @ z.T
        size += float(np.sum(z**2))
    size = math.sqrt(size) * _ROOM
    noise = 2 * float(np.linalg.norm(error)) * (math.sqrt(2) + 1) + _grow(data.terms) * size**2
    least = 1 - float(np.linalg.norm(gram - np.eye(p))) * _ROOM - noise if p else 1.0
    if least < 0.1:
        return None
    fit = np.linalg.solve(gram, cross.T).T if p else cross
    return _Basis("qr", turn, error, least, size + float(np.linalg.norm(error)), fit)


def _lower(data: Evidence, dual: np.ndarray, basis: _Basis, hidden: int, r: int) -> float:
    """Problem (5) at `Lambda = dual @ X`, at least."""
    d_0, d_H = data.shape
    p = len(basis.rows_error)
    resolved, misfit = np.zeros((d_H, d_H)), np.zeros((d_H, d_H))
    image = np.zeros((d_H, p))
    y_square = h_square = dual_abs = fit_abs = 0.0
    diagonal = np.diagonal(basis.map) if basis.name == "rows" and basis.map is not None else None
    for x, y in data:
        z = x * diagonal[:, None] if diagonal is not None else basis.map @ x
        f = y - dual @ x
        h = basis.fit @ z
        e = f - h
        crossed = h @ e.T
        resolved += h @ h.T + crossed + crossed.T
        misfit += e @ e.T
        image += e @ z.T
        y_square += float(np.sum(y**2))
        h_square += float(np.sum(h**2))
        dual_abs += float(np.sum((np.abs(dual) @ np.abs(x) + np.abs(y)) ** 2))
        fit_abs += float(np.sum((np.abs(basis.fit) @ np.abs(z)) ** 2))
    terms = data.terms
    wide = 1 + _grow(terms + d_0)
    h_size, e_size = math.sqrt(h_square * wide), math.sqrt(float(np.trace(misfit)) * wide)
    if diagonal is not None:
        spread = 4 * _UNIT * math.sqrt(fit_abs * wide)
        rows_error = 4 * _UNIT * basis.size
    else:
        spread = float(np.linalg.norm(np.abs(basis.fit) @ basis.rows_error))
        rows_error = float(np.linalg.norm(basis.rows_error))
    h_error = (_grow(p) * math.sqrt(fit_abs * wide) + spread) * _ROOM + _TINY
    e_error = h_error + _grow(d_0 + 2) * math.sqrt(dual_abs * wide) + 2 * _UNIT * (e_size + h_size) + _TINY
    sums = _grow(terms + 4)
    loss = h_error * (2 * h_size + h_error) + 2 * (h_error * (e_size + e_error) + h_size * e_error)
    loss += sums * (h_size**2 + 2 * h_size * e_size)
    values = np.linalg.eigvalsh(resolved)[::-1][:r]
    top = float(np.sum(np.maximum(values, 0))) * (1 + _grow(r))
    top += math.sqrt(r) * loss + r * 16 * d_H * _UNIT * float(np.linalg.norm(resolved))
    turned = float(np.linalg.norm(image)) + sums * e_size * basis.size + e_size * rows_error
    projection = (turned / math.sqrt(basis.least) + e_error) ** 2
    free = np.linalg.eigvalsh(misfit)[::-1][: min(hidden, r)]
    charge = float(np.sum(np.maximum(free, 0))) * (1 + _grow(r))
    if len(free):
        charge += len(free) * (e_error * (2 * e_size + e_error) + (sums + 16 * d_H * _UNIT) * e_size**2)
    return (0.5 * y_square * (1 - 2 * _grow(terms + d_0))) - 0.5 * (top + projection + charge) * _ROOM_EPS
