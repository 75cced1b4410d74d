"""Multipliers for the bound of `moments.proof`, from its convex primal in the first two moments of the units.

The least bound over `delta`, `kappa`, `s`, `mu`, `beta` is, by duality, the largest value over a mean `m` and a second
moment `U >= m m^T` with `tr U <= 1` of

    1/2 g m + 1/2 sum_P |r_i|_U - 1/2 sum_N w_j max(|v_j m|, v_j^T U v_j / |v_j|),    |r|_U = (r^T U r)^(1/2),

g being the sum of the signed points, `r_i` the residuals of the positive points and `w_j = 1 - sum_i |c_ij|` what
the cover leaves of the negative ones.  With `U = Z Z^T / |Z|^2` of low rank and the mean the first column of `Z /
|Z|` it is maximised by L-BFGS, corners smoothed less and less, and the multipliers are read off its gradient.
Nothing here is
trusted.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Bool, Float64

from dualgap_jax.certify.descent import lbfgs
from dualgap_jax.certify.moments.proof import Multipliers, norms

_LARGE = 2**17  # numbers in the points above which the search begins in float32
_FLAT = 1e-280  # points shorter than this get no quadratic: its coefficient would overflow
_ROUND = 2.0**-48
_MARGIN = 2.0**-46  # of mu and beta, relative to the trace


class Reduced(NamedTuple):
    """The problem above in an orthonormal basis of its points.

    Attributes:
      residual: `[p, r]`.
      negative: `[m, r]`.
      weight: `[m]`, w.
      slope: `[r]`, g / 2.
      lengths: `[m]`, of the negative points.
    """

    residual: Float64[np.ndarray, "p r"]
    negative: Float64[np.ndarray, "m r"]
    weight: Float64[np.ndarray, " m"]
    slope: Float64[np.ndarray, " r"]
    lengths: Float64[np.ndarray, " m"]


def in_basis(v: Float64[np.ndarray, "k d"]) -> Float64[np.ndarray, "k r"]:
    """The points in an orthonormal basis of what they span, where that is smaller than the space."""
    v = v[:, v.any(axis=0)]
    if not v.size or len(v) >= v.shape[1]:
        return v
    left, sizes, _ = np.linalg.svd(v, full_matrices=False)
    return left * sizes


def reduce(v: Float64[np.ndarray, "k r"], positive: Bool[np.ndarray, " k"], cover: Any = None) -> Reduced:
    """The problem that a cover leaves."""
    vp, vn = v[positive], v[~positive]
    slope = 0.5 * (vp.sum(axis=0) - vn.sum(axis=0))
    if cover is None:
        return Reduced(vp, vn, np.ones(len(vn)), slope, norms(vn))
    weight = np.maximum(0.0, 1 - abs(cover).sum(axis=0))
    return Reduced(vp - cover @ vn, vn, weight, slope, norms(vn))


def _smoothed(reduced: Reduced, moment: np.ndarray, width: float) -> tuple[float, np.ndarray, tuple[np.ndarray, ...]]:
    """The value at `moment [r, k]` scaled to norm 1, its gradient and `(delta, kappa, s)`; `width` rounds corners."""
    residual, negative, weight, slope, lengths = reduced
    size = float(np.linalg.norm(moment))
    yp, yn = residual @ moment, negative @ moment
    first = yn[:, 0]
    width = width * size
    delta = np.sqrt(np.sum(yp**2, axis=1) + width**2)
    square = np.sum(yn**2, axis=1) / (lengths * size)
    line = np.sqrt(first**2 + width**2)
    gap = line - square
    corner = np.sqrt(gap**2 + width**2)
    curved = 0.5 * (1 - gap / corner)
    kappa = (1 - curved) * first / line
    floor = 0.5 * (line + square + corner)
    value = slope @ moment[:, 0] + 0.5 * delta.sum() - 0.5 * weight @ floor
    bent = weight * curved
    pull = -(bent / (lengths * size))[:, None] * yn
    pull[:, 0] -= 0.5 * weight * kappa
    gradient = residual.T @ (0.5 * yp / delta[:, None]) + negative.T @ pull
    gradient[:, 0] += slope
    gradient += 0.5 * (bent @ square) * moment / size**2
    gradient = gradient / size - value * moment / size**3
    return value / size, gradient, (delta / size, kappa, curved)


def ascend(reduced: Reduced, rank: int, steps: int) -> Float64[np.ndarray, "r k"]:
    """A moment `Z`, of norm 1 and that rank, near the largest value, by three rounds of at most so many steps."""
    r = len(reduced.slope)
    scale = float(np.mean(np.concatenate([norms(reduced.residual), reduced.lengths])))
    moment = np.random.default_rng(0).standard_normal((r, rank))
    large = reduced.residual.size + reduced.negative.size > _LARGE
    rough = np.float32 if large and np.min(reduced.lengths, initial=math.inf) > 1e-6 * scale else np.float64

    def objective(flat: np.ndarray, width: float, seen: Reduced) -> tuple[float, np.ndarray]:
        value, gradient, _ = _smoothed(seen, flat.reshape(r, rank).astype(seen.slope.dtype), width)
        return -float(value) / scale, -gradient.ravel().astype(np.float64) / scale

    for width, kind in ((1e-1, rough), (1e-2, rough), (1e-3, np.float64)):
        flat = (moment / np.linalg.norm(moment)).ravel()
        seen = Reduced(*(part.astype(kind) for part in reduced))
        flat = lbfgs(objective, flat, width * scale, seen, maxiter=steps, maxcor=20, ftol=1e-10, gtol=1e-12)
        moment = flat.reshape(r, rank)
    return moment / np.linalg.norm(moment)


def read_off(reduced: Reduced, moment: np.ndarray) -> Multipliers:
    """The multipliers that belong to a moment."""
    scale = float(np.mean(np.concatenate([norms(reduced.residual), reduced.lengths])))
    delta, kappa, curved = _smoothed(reduced, moment, 1e-3 * scale)[2]
    weight = reduced.weight
    return settle(reduced, delta, weight * kappa, weight * curved, None)


def settle(
    reduced: Reduced,
    delta: Float64[np.ndarray, " p"],
    kappa: Float64[np.ndarray, " m"],
    curvature: Float64[np.ndarray, " m"],
    cover: scipy.sparse.csr_array | None,
) -> Multipliers:
    """These multipliers with a little room in their conditions, and the best mu and beta for them."""
    residual, negative, weight, slope, lengths_n = reduced
    lengths_p = norms(residual)
    whole = lengths_p if cover is None else lengths_p + abs(cover) @ lengths_n
    delta = np.where(lengths_p > _FLAT, np.maximum(delta, _ROUND * whole), 0.0)  # as small as r_i is known
    room = np.maximum(0.0, weight - 1e-11)
    kappa = np.clip(kappa, -room, room)
    curvature = np.clip(curvature, 0.0, np.maximum(0.0, room - np.abs(kappa))) * (lengths_n > _FLAT)
    bend = 0.25 / np.where(delta > 0, delta, np.inf)
    hollow = curvature / (2 * np.where(lengths_n > _FLAT, lengths_n, 1.0))
    form = (residual * bend[:, None]).T @ residual - (negative * hollow[:, None]).T @ negative
    trace = float(bend @ lengths_p**2 + hollow @ lengths_n**2)
    mu, beta = trust_region(slope - 0.5 * kappa @ negative, form)
    room_ = _MARGIN * (trace + mu + beta)
    return Multipliers(delta, kappa, curvature, cover, mu + room_, beta + room_)


def trust_region(slope: Float64[np.ndarray, " r"], form: Float64[np.ndarray, "r r"]) -> tuple[float, float]:
    """`(mu, beta)` of nearly the least sum for which `[[beta, -b/2], [-b/2, mu I - M]]` is positive semidefinite."""
    values, vectors = np.linalg.eigh(0.5 * (form + form.T))
    square = (slope @ vectors) ** 2 / 4
    top, size = max(float(values[-1]), 0.0), float(np.sqrt(square.sum()))
    if size == 0:
        return top, 0.0

    def excess(mu: float) -> float:
        return 1 - float(np.sum(square / (mu - values) ** 2))

    low, high = top + 1e-9 * (top + size), top + 2 * size
    if excess(low) >= 0:
        mu = low
    else:
        mu = float(scipy.optimize.brentq(excess, low, max(high, low), xtol=1e-12 * (top + size)))
    return mu, float(np.sum(square / (mu - values)))


def worth(found: Multipliers) -> float:
    """The bound that multipliers give, but for rounding."""
    return 0.25 * float(found.delta.sum()) + found.beta + max(0.0, found.mu)
