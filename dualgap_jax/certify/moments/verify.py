"""Bounds of the moment relaxation proven again from data and multipliers, by other arithmetic.

The inequalities are those that `moments.proof` lists.  Small problems are gone through in rational numbers, where the
claim itself is decided and nothing is rounded.  Larger ones are gone through in float64: the matrix H is summed in
blocks, and a Cholesky factorisation that runs to its end proves `lambda_min(H) >= -g(p + 1) / (1 - g(p + 1)) tr H`
(Rump, Verification of positive definiteness, BIT 46, 2006).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import scipy

from dualgap_jax.certify.moments.balls import BallBound, Side, checked, combined
from dualgap_jax.certify.moments.joint import Relaxation
from dualgap_jax.spectral.evidence import VerificationError

_UNIT = 2.0**-53
_LOG_ERROR = Fraction(1, 1 << 50)  # of q ln q + (1 - q) ln(1 - q), logarithms being off by a last place
_BLOCK = 1024
_EXACT = 1000  # products in H up to which rational numbers are used


def verify_ball_bound(x: Any, alpha: Any, bound: BallBound) -> float:
    """Proves a claimed bound again from its multipliers.

    Args:
      x: `[n, d]`, as `ball_bound` takes it.
      alpha: `[n]` or `[n, C]`.
      bound: The claim.

    Returns:
      A proven bound of the same quantity, at most `bound.upper`.

    Raises:
      VerificationError: The multipliers are malformed, or do not prove what is claimed.
      ValueError: The data are not what `ball_bound` takes.
    """
    x, alpha = checked(x, alpha)
    columns = alpha.reshape(len(alpha), -1).T
    if len(bound.sides) != len(columns):
        raise VerificationError(f"{len(bound.sides)} outputs are certified, alpha has {len(columns)}.")
    proven = []
    for column, pair in zip(columns, bound.sides, strict=True):
        if [side.sign for side in pair] != [1, -1]:
            raise VerificationError("a certificate must have both signs, first 1 and then -1.")
        plus, minus = (side._replace(upper=verify_side(x, column, side)) for side in pair)
        proven.append((plus, minus))
    whole = combined(tuple(proven))
    if not whole <= bound.upper:
        raise VerificationError(f"the sides prove {whole:.17g}, not the {bound.upper:.17g} that is claimed.")
    return whole


def verify_relaxation(x: Any, y: Any, loss: str, penalty: float, found: Relaxation) -> float:
    """Proves the lower bound of `relaxation` again: that alpha is feasible, and what it is worth.

    Args:
      x, y, loss, penalty: As `relaxation` takes them.
      found: The claim.

    Returns:
      A proven lower bound, at least `found.lower`.

    Raises:
      VerificationError: The certificate does not prove what is claimed.
      ValueError: The data are not what `relaxation` takes.
    """
    x, y = checked(x, y)
    if found.alpha.shape != y.shape or not np.isfinite(found.alpha).all():
        raise VerificationError(f"alpha must be finite, of shape {list(y.shape)}.")
    rho = verify_ball_bound(x, found.alpha, found.bound)
    if not rho <= 2 * Fraction(penalty):
        raise VerificationError(f"alpha is only proven to have {rho:.17g}, more than 2 penalty.")
    total = Fraction(0)
    for a, target in zip(map(Fraction, found.alpha.tolist()), map(Fraction, y.tolist()), strict=True):
        q = -a * target
        if loss != "squared" and not (abs(target) == 1 and 0 <= q <= 1):
            raise VerificationError(f"-alpha y = {float(q):.17g} lies outside [0, 1], where l* is infinite.")
        if loss == "squared":
            total += a * a / 2 - q
        elif loss == "hinge":
            total -= q
        elif loss == "logistic":
            total += sum(p * Fraction(math.log(p)) for p in (q, 1 - q) if p) + _LOG_ERROR
        else:
            raise ValueError(f"loss={loss!r} must be 'squared', 'logistic' or 'hinge'.")
    lower = math.nextafter(float(-total / len(y)), -math.inf)
    if not lower >= found.lower:
        raise VerificationError(f"alpha proves {lower:.17g}, not the {found.lower:.17g} that is claimed.")
    return lower


def verify_side(x: np.ndarray, alpha: np.ndarray, side: Side) -> float:
    """Proves the bound of one sign again; the same errors as `verify_ball_bound`."""
    n, d = x.shape
    _check(side, n)
    if not (math.isfinite(side.upper) and side.upper >= 0):
        raise VerificationError(f"a bound of {side.upper} is none: it must be finite and at least 0.")
    weights = side.sign * alpha
    if n * (d + 1) ** 2 <= _EXACT:
        if not _exactly(x, weights, side):
            raise VerificationError(f"the multipliers of sign {side.sign} do not prove {side.upper:.17g}.")
        return side.upper
    proven = _in_floats(x, weights, side)
    try:
        value = math.nextafter(math.ldexp(math.nextafter(proven / n, math.inf), side.exponent), math.inf)
    except OverflowError:
        value = math.inf
    if not value <= side.upper:
        raise VerificationError(
            f"the multipliers of sign {side.sign} prove {value:.17g}, not the {side.upper:.17g} that is claimed."
        )
    return value


def _check(side: Side, n: int) -> None:
    for name in ("delta", "kappa", "curvature"):
        array = getattr(side, name)
        if not isinstance(array, np.ndarray) or array.dtype != np.float64 or array.shape != (n,):
            raise VerificationError(f"{name} must be float64 of shape [{n}].")
        if not np.isfinite(array).all() or (name != "kappa" and np.any(array < 0)):
            raise VerificationError(f"{name} must be finite{'' if name == 'kappa' else ' and at least 0'}.")
    if side.cover is not None and (side.cover.shape != (n, n) or not np.isfinite(side.cover.data).all()):
        raise VerificationError(f"the cover must be finite, of shape [{n}, {n}].")
    if not isinstance(side.exponent, int) or abs(side.exponent) > 1 << 13:
        raise VerificationError(f"exponent={side.exponent!r} must be an integer between -8192 and 8192.")
    if not (math.isfinite(side.mu) and math.isfinite(side.beta)):
        raise VerificationError("mu and beta must be finite.")


# --- in rational numbers ----------------------------------------------------------------------------------------------


def _exactly(x: np.ndarray, weights: np.ndarray, side: Side) -> bool:
    """Whether the multipliers prove `side.upper`."""
    n, d = x.shape
    unit = Fraction(2) ** side.exponent
    v = [
        [abs(Fraction(w)) * Fraction(e) / unit for e in row]
        for w, row in zip(weights.tolist(), x.tolist(), strict=True)
    ]
    plus, minus = np.flatnonzero(weights > 0).tolist(), np.flatnonzero(weights < 0).tolist()
    cover: dict[int, dict[int, Fraction]] = {i: {} for i in plus}
    if side.cover is not None:
        entries = side.cover.tocoo()
        for i, j, c in zip(entries.row.tolist(), entries.col.tolist(), entries.data.tolist(), strict=True):
            if i in cover and weights[j] < 0:
                cover[i][j] = cover[i].get(j, Fraction(0)) + Fraction(c)
    total, slope = Fraction(0), [Fraction(0)] * d
    form = [[Fraction(0)] * d for _ in range(d)]

    def add(row: list[Fraction], factor: Fraction) -> None:
        for a in range(d):
            for b in range(d):
                form[a][b] += factor * row[a] * row[b]

    for i in plus:
        residual = [v[i][a] - sum(c * v[j][a] for j, c in cover[i].items()) for a in range(d)]
        slope = [s + e / 2 for s, e in zip(slope, v[i], strict=True)]
        delta = Fraction(float(side.delta[i]))
        if delta > 0:
            total += delta / 4
            add(residual, 1 / (4 * delta))
        else:
            total += _root_above(sum(e * e for e in residual)) / 2
    for j in minus:
        length = _root_above(sum(e * e for e in v[j]))
        kappa, curvature = Fraction(float(side.kappa[j])), Fraction(float(side.curvature[j]))
        load = abs(kappa) + curvature + sum(abs(row.get(j, Fraction(0))) for row in cover.values())
        total += max(Fraction(0), load - 1) * length / 2
        slope = [s - (1 + kappa) * e / 2 for s, e in zip(slope, v[j], strict=True)]
        if length > 0:
            add(v[j], -curvature / (2 * length))
    mu, beta = Fraction(side.mu), Fraction(side.beta)
    claimed = Fraction(side.upper) * n / unit
    # The least e with total + beta + e + max(0, mu + e) = claimed.
    spare = claimed - total - beta
    error = min(spare, (spare - mu) / 2)
    if error < 0:
        return False
    h = [[beta + error, *(-s / 2 for s in slope)]]
    for a in range(d):
        h.append([-slope[a] / 2, *((mu + error) * (a == b) - form[a][b] for b in range(d))])
    return _is_semidefinite(h)


def _root_above(square: Fraction | int) -> Fraction:
    """A rational number of at least the root, above it by at most one part in 2^60."""
    if square == 0:
        return Fraction(0)
    square = Fraction(square)
    bits = 2 * max(0, 64 - (square.numerator.bit_length() - square.denominator.bit_length()) // 2)
    return Fraction(math.isqrt(square.numerator * (1 << bits) // square.denominator) + 1, 1 << (bits // 2))


def _is_semidefinite(h: list[list[Fraction]]) -> bool:
    """By elimination; a pivot of 0 needs a row of zeros."""
    h = [list(row) for row in h]
    for k in range(len(h)):
        pivot = h[k][k]
        if pivot < 0 or (pivot == 0 and any(h[k][k:])):
            return False
        for i in range(k + 1, len(h)):
            if h[i][k]:
                factor = h[i][k] / pivot
                for j in range(k, len(h)):
                    h[i][j] -= factor * h[k][j]
    return True


# --- in floats --------------------------------------------------------------------------------------------------------


def _in_floats(x: np.ndarray, weights: np.ndarray, side: Side) -> float:
    """An upper bound of the sum, in the units of the side."""
    n, d = x.shape
    mantissa, power = np.frexp(x)
    fraction, shift = np.frexp(np.abs(weights))
    with np.errstate(over="ignore", invalid="ignore"):
        v = np.ldexp(mantissa * fraction[:, None], power + (shift[:, None] - side.exponent))
    if not float(np.abs(v).max()) <= 2.0**20:
        raise VerificationError(f"the exponent {side.exponent} of the certificate does not fit the data.")
    plus, minus = weights > 0, weights < 0
    vn = v[minus]
    sizes = _sizes(v)
    load = np.abs(side.kappa[minus]) + side.curvature[minus]
    residual, reach = v[plus], sizes[plus]
    error = 2 * _UNIT * float(sizes.sum())
    if side.cover is not None:
        cover = side.cover[plus][:, minus]
        residual = residual - np.asarray(cover @ vn)
        reach = reach + abs(cover) @ sizes[minus]
        load = load + np.asarray(abs(cover).sum(axis=0)).ravel()
        error += _g(n + 2) * float(reach.sum())
    delta, lengths = side.delta[plus], _sizes(residual)
    bent = delta > 0
    with np.errstate(over="ignore", divide="ignore"):
        factors = np.concatenate([1 / (4 * delta[bent]), -side.curvature[minus] / (2 * sizes[minus])])
    factors = np.where(np.concatenate([lengths[bent], side.curvature[minus]]) > 0, factors, 0.0)
    if not np.isfinite(factors).all():
        raise VerificationError("an inverse of delta or of the length of a point overflows.")
    linear = np.where(plus, 0.5, -0.5 * (1 + side.kappa)) * (plus | minus)
    rows = np.concatenate([residual[bent], vn])
    h = np.zeros((d + 1, d + 1))
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        h[1:, 1:] -= block.T @ (factors[start : start + _BLOCK, None] * block)
    spans = np.concatenate([lengths[bent], sizes[minus]])
    spread = float((np.abs(factors) * spans) @ spans)
    error += _g(n + 8) * (spread + 2 * float(np.abs(linear) @ sizes) + abs(side.mu))
    h[1:, 1:] = np.tril(h[1:, 1:]) + np.tril(h[1:, 1:], -1).T
    h[0, 1:] = h[1:, 0] = -0.5 * (linear @ v)
    h[np.arange(1, d + 1), np.arange(1, d + 1)] += side.mu
    h[0, 0] = side.beta
    least = _shift(h)
    parts = [*(delta / 4), *(lengths[~bent] / 2), *(np.maximum(0.0, load * (1 + _g(n + 8)) - 1) * sizes[minus] / 2)]
    parts += [side.beta, least, max(0.0, side.mu + least), least, 2 * error, (n + 1.0) * d * 1e-300]
    return max(0.0, math.fsum(parts) * (1 + 4 * _UNIT) + 4 * _UNIT * (abs(side.beta) + abs(side.mu)))


def _g(k: int) -> float:
    return 1.01 * k * _UNIT


def _sizes(v: np.ndarray) -> np.ndarray:
    """At least the norms of the rows."""
    top = np.abs(v).max(axis=1, initial=0.0)
    safe = np.where(top > 0, top, 1.0)
    return top * np.sqrt(np.einsum("ij,ij->i", v / safe[:, None], v / safe[:, None])) * (1 + _g(2 * v.shape[1] + 16))


def _shift(h: np.ndarray) -> float:
    """Some e with `H + e I` positive semidefinite."""
    p = len(h)
    if not np.isfinite(h).all() or np.abs(h).max() > 1e270:
        raise VerificationError("the multipliers leave the range of float64.")
    size = float(np.abs(np.diagonal(h)).sum())
    least = 0.0
    for _ in range(400):
        try:
            scipy.linalg.cholesky(h + least * np.eye(p), lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            least = max(4 * least, _g(p + 8) * size, 1e-300)
        else:
            return least + 2 * _g(p + 8) * (size + p * least)
    raise VerificationError("H has no Cholesky factor at any shift.")
