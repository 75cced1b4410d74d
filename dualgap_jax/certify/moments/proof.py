"""What a certificate of the moment relaxation proves, with every rounding charged to it.

For points `v_j` and signs `e_j = ±1`, with P the rows of positive sign and N the others,

    sum_j e_j (v_j u)_+ = 1/2 sum_j e_j v_j u + 1/2 sum_P |v_i u| - 1/2 sum_N |v_j u|.

On the ball `|u| <= 1`, for any numbers `c_ij`, `delta_i > 0`, `kappa_j` and `0 <= s_j` with
`|kappa_j| + s_j + sum_i |c_ij| <= 1`,

    |v_i u| <= |r_i u| + sum_N |c_ij| |v_j u|,   r_i = v_i - sum_N c_ij v_j,     (subadditivity)
    |r_i u| <= delta_i / 2 + (r_i u)^2 / (2 delta_i),
    |v_j u| >= kappa_j v_j u,  and  |v_j u| >= (v_j u)^2 / |v_j|,

so that the sum is at most `1/4 sum_P delta_i + b u + u^T M u` with

    b = 1/2 sum_P v_i - 1/2 sum_N (1 + kappa_j) v_j,
    M = sum_P r_i r_i^T / (4 delta_i) - sum_N s_j / (2 |v_j|) v_j v_j^T,

and `b u + u^T M u <= beta + mu` as soon as `H = [[beta, -b/2], [-b/2, mu I - M]]` is positive semidefinite (weak
duality of the trust-region problem).  Where a condition fails, the bound is charged for it: `delta_i = 0` stands for
`|r_i u| <= |r_i|`; a load `|kappa_j| + s_j + sum_i |c_ij|` of `1 + e` costs `e |v_j| / 2`; a least eigenvalue of H of
`-e` costs `2 e`.

**Rounding.**  `u = 2^-53`, `g(k) = k u / (1 - k u)`; sums of k products are off by at most `g(k)` times the sum of
their sizes, in any order (Higham, Accuracy and Stability of Numerical Algorithms, (3.5), (3.13)).  The Cholesky
factor L of H is believed in nothing: `lambda_min(H) >= -||H - fl(L L^T)|| - g(k) ||L||_F^2`.  All charges are taken
four times, for the
rounding of the charges themselves.  The form `(r_i u)^2 / (2 delta_i)` is charged for the rounding of `r_i` as well,
which matters where delta_i is far smaller than r_i, so that the claim also follows from the exact r_i.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Bool, Float64

_UNIT = 2.0**-53
_ROOM = 4.0
_LARGEST = 2.0**900  # of an entry of H
_TINY = 1e-290  # more than an entry loses to underflow, where the largest point has an entry of at least 1/2


class Points(NamedTuple):
    """`alpha_j x_j` as points and signs, scaled: `|alpha_j| x_j = 2^exponent v_j`, up to a rounding of each entry.

    Attributes:
      v: `[k, d]`, the points that are not zero; the largest entry of all lies in [1/4, 1].
      positive: `[k]`, where alpha is.
      rows: `[k]`, which of the `total` examples these are.
      total: n.
      exponent: of the scale.
    """

    v: Float64[np.ndarray, "k d"]
    positive: Bool[np.ndarray, " k"]
    rows: np.ndarray
    total: int
    exponent: int


class Multipliers(NamedTuple):
    """The numbers that a bound of one sign follows from; none of them is believed.

    Attributes:
      delta: `[p]`, one for each positive point, at least 0, in the units of the points.
      kappa: `[m]`, one for each negative point.
      curvature: `[m]`, s, at least 0.
      cover: `[p, m]` sparse, the c_ij, or None for none.
      mu: the multiplier of the ball, in the units of the points.
      beta: the corner of H, in the units of the points.
    """

    delta: Float64[np.ndarray, " p"]
    kappa: Float64[np.ndarray, " m"]
    curvature: Float64[np.ndarray, " m"]
    cover: scipy.sparse.csr_array | None
    mu: float
    beta: float


def scaled_points(x: Float64[np.ndarray, "n d"], alpha: Float64[np.ndarray, " n"]) -> Points:
    """The points of finite data and weights; rows are scaled one by one, so that no product over- or underflows."""
    size = np.abs(x).max(axis=1)
    rows = np.flatnonzero((size > 0) & (alpha != 0))
    weights, powers = np.frexp(np.abs(alpha[rows]))
    lengths = np.frexp(size[rows])[1]
    exponents = powers + lengths
    top = int(exponents.max()) if len(rows) else 0
    v = np.ldexp(np.ldexp(x[rows], -lengths[:, None]) * weights[:, None], (exponents - top)[:, None])
    kept = v.any(axis=1)  # what vanishes here is charged by _TINY
    return Points(v[kept], alpha[rows[kept]] > 0, rows[kept], len(x), top)


def norms(v: Float64[np.ndarray, "k d"]) -> Float64[np.ndarray, " k"]:
    """At least the Euclidean norms of the rows, at any scale."""
    size = np.maximum(np.abs(v).max(axis=1, initial=0.0), 5e-324)
    power = np.frexp(size)[1]
    unit = np.ldexp(v, -power[:, None])
    return np.ldexp(np.sqrt(np.sum(unit**2, axis=1)) * (1 + _charge(v.shape[1] + 8)), power) + 5e-324


def prove(points: Points, multipliers: Multipliers) -> float:
    """A proven upper bound of `max over |u| <= 1 of sum_j e_j (v_j u)_+`, in the units of the points, at least 0.

    Raises:
      ValueError: The multipliers are malformed: of a wrong shape, not finite, or of a negative delta or curvature.
    """
    v, positive = points.v, points.positive
    check(points, multipliers)
    delta, kappa, curvature, cover, mu, beta = multipliers
    vp, vn = v[positive], v[~positive]
    p, m, (k, d) = len(vp), len(vn), v.shape
    sizes_p, sizes_n = norms(vp), norms(vn)
    residual, load, off = vp, np.abs(kappa) + curvature, 2 * _UNIT * sizes_p  # how far a residual is off
    noise = float(2 * _UNIT * (sizes_p.sum() + sizes_n.sum()))  # of the points themselves
    if cover is not None:
        residual = vp - cover @ vn
        heavy = abs(cover)
        load = load + heavy.sum(axis=0)
        off = _charge(m + 4) * (sizes_p + heavy @ sizes_n)
        noise += float(off.sum())
    excess = np.maximum(load * (1 + _ROOM * _charge(p + 4)) - 1, 0.0)
    lengths = norms(residual)
    used = delta > 0
    with np.errstate(over="ignore"):
        bend = 0.25 / np.where(used, delta, 1.0) * used
    with np.errstate(over="ignore"):
        hollow = curvature / (2 * sizes_n)
    if not (np.isfinite(bend).all() and np.isfinite(hollow).all()):
        raise ValueError("a delta, or a point with curvature, is so small that its inverse overflows; set it to 0.")
    noise += float((bend * off) @ (2 * lengths + off))
    form = (residual * bend[:, None]).T @ residual - (vn * hollow[:, None]).T @ vn
    noise += float(_charge(k + 8) * (((bend * lengths) @ lengths) + (hollow * sizes_n) @ sizes_n))
    slope = 0.5 * vp.sum(axis=0) - (0.5 * (1 + kappa)) @ vn
    noise += float(_charge(k + 4) * (sizes_p.sum() + ((1 + np.abs(kappa)) * sizes_n).sum()))
    h = bordered(slope, form, mu, beta)
    if not np.isfinite(h).all() or np.abs(h).max() > _LARGEST:
        raise ValueError(
            "the multipliers leave the range of float64; give mu, beta and delta in the units of the points."
        )
    error = _below(h)
    terms = [*(0.25 * delta), *(0.5 * lengths * ~used), *(0.5 * excess * sizes_n)]
    whole = [math.fsum(terms) * (1 + _ROOM * _UNIT), beta + error, max(0.0, mu + error), error, _ROOM * noise]
    return max(0.0, math.fsum(whole) * (1 + _ROOM * _UNIT) + (points.total + 1.0) * d * _TINY)


def check(points: Points, multipliers: Multipliers) -> None:
    """Raises ValueError for multipliers of a wrong shape or out of range."""
    p = int(points.positive.sum())
    m = len(points.positive) - p
    for name, array, size in zip(("delta", "kappa", "curvature"), multipliers[:3], (p, m, m), strict=True):
        if array.shape != (size,):
            raise ValueError(f"{name} has shape {array.shape}; these data need ({size},).")
        if not np.isfinite(array).all() or (name != "kappa" and (array < 0).any()):
            raise ValueError(f"{name} must be finite{'' if name == 'kappa' else ' and at least 0'}.")
    cover = multipliers.cover
    if cover is not None and (cover.shape != (p, m) or not np.isfinite(cover.data).all()):
        raise ValueError(f"cover must be finite and of shape ({p}, {m}), got {cover.shape}.")
    if not (math.isfinite(multipliers.mu) and math.isfinite(multipliers.beta)):
        raise ValueError(f"mu={multipliers.mu} and beta={multipliers.beta} must be finite.")


def bordered(slope: np.ndarray, form: np.ndarray, mu: float, beta: float) -> Float64[np.ndarray, "size size"]:
    """H, from b and M."""
    d = len(slope)
    h = np.empty((d + 1, d + 1))
    h[0, 0], h[0, 1:], h[1:, 0] = beta, -0.5 * slope, -0.5 * slope
    h[1:, 1:] = -0.5 * (form + form.T)
    h[np.arange(1, d + 1), np.arange(1, d + 1)] += mu
    return h


def _charge(k: int) -> float:
    """`g(k)`."""
    return k * _UNIT / (1 - k * _UNIT)


def _below(h: np.ndarray) -> float:
    """Some e >= 0, as small as the arithmetic allows, with `H + e I` positive semidefinite.

    The sum of H is symmetric, but for a rounding of its entries that is charged like one of the form.
    """
    p = len(h)
    diagonal = np.arange(p)
    scale = max(float(np.abs(h[diagonal, diagonal]).sum()), float(np.abs(h).max()))
    if scale == 0:
        return 0.0
    rounding = 8 * _UNIT * float(np.sqrt(np.sum((h / scale) ** 2))) * scale
    shift = 0.0
    while True:
        shifted = h.copy()
        shifted[diagonal, diagonal] += shift
        try:
            lower = np.linalg.cholesky(shifted)
        except np.linalg.LinAlgError:
            shift = max(10 * shift, 2 * p * _UNIT * scale)
            continue
        square = float(np.sum((lower / math.sqrt(scale)) ** 2)) * scale
        rest = float(np.sqrt(np.sum(((shifted - lower @ lower.T) / scale) ** 2))) * scale
        return shift + _ROOM * (rest + _charge(p + 4) * square + rounding + 8 * _UNIT * shift)
