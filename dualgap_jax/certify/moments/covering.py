"""The bound of `moments.proof` made tight: covers of positive points by negative ones, found by descent on the dual.

The bound is convex in the cover and in all other multipliers.  It is smoothed by a barrier: with `A = mu I - M`,

    F = 1/4 sum_i delta_i + min over mu of  mu + 1/4 b^T A^-1 b - eps log det A,

whose gradients with respect to b and M are `u = A^-1 b / 2` and `U = u u^T + eps A^-1`.  What a negative point has to
give away, `sum_i |c_ij| + |kappa_j| + s_j <= 1`, is shared by a softmax; only pairs of points that are alike take
part.  L-BFGS lowers F while eps falls.  Nothing here is trusted.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Float, Float64

from dualgap_jax.certify.descent import lbfgs
from dualgap_jax.certify.moments import ascent
from dualgap_jax.certify.moments.proof import Multipliers, Points

LEVELS = (1.0, 0.1, 0.02)  # of eps times the dimension, relative to the bound
UNUSABLE = 1e30  # the value of a trial that leaves the range of floats
_TINY = 1e-30  # lengths and deltas below this are taken for it, so that float32 holds what they divide
_SMALL = 1e-4  # entries of a cover below this are left out
_DENSE = 1 << 17  # pairs up to which all are candidates
_MANY = 1 << 16  # numbers in the points above which the search sees them in float32
FEW = 256  # examples up to which a search costs little
_GATHER = 1 << 12  # pairs whose products are formed at once


class Pairs(NamedTuple):
    """Candidates of a cover, sorted by negative point: positive and negative point of each, where each column
    starts."""

    rows: np.ndarray
    cols: np.ndarray
    starts: np.ndarray
    shape: tuple[int, int]


def candidates(yp: Float64[np.ndarray, "p k"], yn: Float64[np.ndarray, "m k"], most: int) -> Pairs:
    """The pairs of points that are most alike, seen through a second moment: `most` of each point.

    Args:
      yp: `Z^T v_i` of the positive points.
      yn: The same of the negative ones.
      most: How many partners each point has at least.
    """
    p, m = len(yp), len(yn)
    if not p * m:
        none = np.zeros(0, np.int64)
        return Pairs(none, none, np.zeros(m, np.int64), (p, m))
    if p * m <= _DENSE or most >= min(p, m):
        cols, rows = np.divmod(np.arange(p * m), p)
        return Pairs(rows, cols, np.arange(m) * p, (p, m))
    yp = yp / np.maximum(np.linalg.norm(yp, axis=1, keepdims=True), 1e-300)
    yn = yn / np.maximum(np.linalg.norm(yn, axis=1, keepdims=True), 1e-300)
    keys = []
    for a, b, swapped in ((yp, yn, False), (yn, yp, True)):
        for start in range(0, len(a), 1024):
            likeness = np.abs(a[start : start + 1024] @ b.T)
            partner = np.argpartition(-likeness, most, axis=1)[:, :most]
            own = np.broadcast_to(start + np.arange(len(partner))[:, None], partner.shape)
            rows, cols = (partner, own) if swapped else (own, partner)
            keys.append((cols.astype(np.int64) * p + rows).ravel())
    cols, rows = np.divmod(np.unique(np.concatenate(keys)), p)
    return Pairs(rows, cols, np.searchsorted(cols, np.arange(m)), (p, m))


class Shares(NamedTuple):
    """Variables of the descent, or gradients in them: logits of the pairs, of kappa and of s, and log delta."""

    pairs: np.ndarray
    kappa: np.ndarray
    curvature: np.ndarray
    delta: np.ndarray


class Value(NamedTuple):
    """F, its gradient in the shares, and the multipliers there; with what the gradient in the points is made of."""

    value: float
    gradient: Shares
    cover: scipy.sparse.csc_array
    kappa: np.ndarray
    curvature: np.ndarray
    delta: np.ndarray
    mu: float
    mean: np.ndarray
    force: np.ndarray
    drag: np.ndarray
    vn: np.ndarray

    def in_points(self) -> tuple[Float[np.ndarray, "p r"], Float[np.ndarray, "m r"]]:
        """The gradient in the positive points, and in the negative ones."""
        vn, lengths = self.vn, _lengths(self.vn)
        share = self.curvature / lengths
        bend = 0.5 * share * np.sum(self.drag * vn, axis=1, dtype=np.float64) / lengths**2
        negative = bend.astype(vn.dtype)[:, None] * vn - share.astype(vn.dtype)[:, None] * self.drag
        negative -= self.cover.T @ self.force + np.outer(0.5 * (1 + self.kappa), self.mean).astype(vn.dtype)
        return self.force + 0.5 * self.mean.astype(vn.dtype), negative


def first_shares(pairs: Pairs, delta: Float64[np.ndarray, " p"]) -> Shares:
    """Where a descent starts: hardly any cover, and these deltas."""
    draw = np.random.default_rng(0).standard_normal
    m = pairs.shape[1]
    return Shares(0.01 * draw(len(pairs.rows)), 0.01 * draw(m), np.zeros(m), np.log(delta))


def evaluate(
    vp: Float[np.ndarray, "p r"],
    vn: Float[np.ndarray, "m r"],
    pairs: Pairs,
    shares: Shares,
    eps: float,
    mu: float,
) -> Value:
    """F at some shares; `mu` is where the search for its minimiser starts.

    Sums over points are formed in the precision of the points.
    """
    kind, lengths = vp.dtype, _lengths(vn)
    weights, signs, kappa_sign = _softmax(pairs, shares)
    w_pair, w_kappa, w_curve = weights
    cover = scipy.sparse.csc_array(
        ((w_pair * signs).astype(kind), pairs.rows, np.append(pairs.starts, len(pairs.rows))), shape=pairs.shape
    )
    kappa, delta = w_kappa * kappa_sign, np.maximum(np.exp(shares.delta), _TINY)
    residual = vp - cover @ vn
    slope = 0.5 * vp.sum(axis=0, dtype=np.float64) - 0.5 * (1 + kappa) @ vn
    form = (residual * (0.25 / delta).astype(kind)[:, None]).T @ residual
    form -= (vn * (0.5 * w_curve / lengths).astype(kind)[:, None]).T @ vn
    barrier = _barrier(slope, form.astype(np.float64), eps, mu)
    moment = (eps * barrier.inverse + np.outer(barrier.mean, barrier.mean)).astype(kind)
    pull, drag = residual @ moment, vn @ moment
    square = np.sum(drag * vn, axis=1, dtype=np.float64)
    force = (0.5 / delta).astype(kind)[:, None] * pull
    g_delta = 0.25 * delta - 0.25 * np.sum(pull * residual, axis=1, dtype=np.float64) / delta
    g_pair = -_products(force, vn, pairs)
    g_kappa, g_curve = -0.5 * (vn @ barrier.mean), -0.5 * square / lengths
    toward = (g_pair * signs, g_kappa * kappa_sign, g_curve)
    average = _by_column(np.add, w_pair * toward[0], pairs) + w_kappa * toward[1] + w_curve * toward[2]
    gradient = Shares(
        w_pair * ((toward[0] - average[pairs.cols]) * signs + g_pair * (1 - signs**2)),
        w_kappa * ((toward[1] - average) * kappa_sign + g_kappa * (1 - kappa_sign**2)),
        w_curve * (toward[2] - average),
        g_delta,
    )
    value = 0.25 * float(delta.sum()) + barrier.value
    return Value(value, gradient, cover, kappa, w_curve, delta, barrier.mu, barrier.mean, force, drag, vn)


def _lengths(v: Float[np.ndarray, "k r"]) -> Float64[np.ndarray, " k"]:
    return np.maximum(np.sqrt(np.sum(v**2, axis=1, dtype=np.float64)), _TINY)


def _softmax(pairs: Pairs, shares: Shares) -> tuple[tuple[np.ndarray, ...], np.ndarray, np.ndarray]:
    """The shares of pairs, kappa and s of each negative point, and the signs of the first two, softened."""
    size, kappa = np.abs(shares.pairs), np.abs(shares.kappa)
    top = np.maximum(_by_column(np.maximum, size, pairs), np.maximum(kappa, shares.curvature))
    pair = np.exp(size - top[pairs.cols]) * (1 + np.exp(-2 * size))
    line, curve = np.exp(kappa - top) * (1 + np.exp(-2 * kappa)), np.exp(shares.curvature - top)
    total = _by_column(np.add, pair, pairs) + line + curve
    return (pair / total[pairs.cols], line / total, curve / total), np.tanh(shares.pairs), np.tanh(shares.kappa)


def _by_column(combine: np.ufunc, values: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Sums or maxima over the pairs of each negative point; 0 where there are no pairs at all."""
    return combine.reduceat(values, pairs.starts) if len(values) else np.zeros(pairs.shape[1])


def _products(a: np.ndarray, b: np.ndarray, pairs: Pairs) -> np.ndarray:
    """`a_i b_j` of each pair."""
    if 16 * len(pairs.rows) > len(a) * len(b):
        return (b @ a.T)[pairs.cols, pairs.rows]
    out = np.empty(len(pairs.rows), a.dtype)
    for start in range(0, len(out), _GATHER):
        part = slice(start, start + _GATHER)
        out[part] = np.einsum("er,er->e", a[pairs.rows[part]], b[pairs.cols[part]])
    return out


class _Barrier(NamedTuple):
    value: float
    mean: np.ndarray
    inverse: np.ndarray
    mu: float


def _barrier(slope: np.ndarray, form: np.ndarray, eps: float, mu: float) -> _Barrier:
    """`min over mu of mu + 1/4 b^T A^-1 b - eps log det A`, by Newton steps."""
    size = len(slope)
    form, diagonal = 0.5 * (form + form.T), np.diag_indices(size)
    low, high = -math.inf, math.inf
    most = float(np.linalg.norm(form) + np.linalg.norm(slope)) + 2 * eps * size  # no minimiser is larger
    mu = min(max(mu, float(np.diagonal(form).max()) + eps), most)
    for _ in range(100):
        factor, failed = scipy.linalg.lapack.dpotrf(mu * np.eye(size) - form, lower=1)
        if failed:
            low, guess = mu, mu + max(0.3 * abs(mu), eps)
        else:
            inverse = scipy.linalg.lapack.dpotri(factor, lower=1)[0]
            inverse = inverse + inverse.T
            inverse[diagonal] *= 0.5
            mean = 0.5 * (inverse @ slope)
            load = float(mean @ mean + eps * np.trace(inverse))
            if abs(load - 1) < 1e-5 or mu in (low, high):
                break
            low, high = (mu, high) if load > 1 else (low, mu)
            bend = float(2 * mean @ (inverse @ mean) + eps * np.sum(inverse**2))
            if not 0 < bend < math.inf:
                raise np.linalg.LinAlgError("the barrier leaves the range of floats")
            guess = mu + 2 * (load**1.5 - load) / bend
        mu = guess if low < guess < high else 0.5 * (low + high) if high < math.inf else 2 * abs(mu) + eps
    else:
        raise np.linalg.LinAlgError("no minimiser of the barrier was found")
    log_det = 2 * float(np.sum(np.log(np.diagonal(factor))))
    return _Barrier(mu + 0.5 * float(mean @ slope) - eps * log_det, mean, inverse, mu)


def descend(
    vp: Float[np.ndarray, "p r"],
    vn: Float[np.ndarray, "m r"],
    pairs: Pairs,
    shares: Shares,
    *,
    size: float,
    steps: int,
    levels: tuple[float, ...],
) -> tuple[Shares, Value]:
    """Shares near the least bound for fixed points, and its value; `size` is about what the bound is.

    `levels` are of eps times the dimension, relative to `size`.
    """
    layout = np.cumsum([len(part) for part in shares])[:-1]
    mu = [size]

    def objective(flat: np.ndarray, eps: float) -> tuple[float, np.ndarray]:
        try:
            found = evaluate(vp, vn, pairs, Shares(*np.split(flat, layout)), eps, mu[0])
        except np.linalg.LinAlgError:
            return UNUSABLE, np.zeros_like(flat)
        mu[0] = found.mu
        return found.value / size, np.concatenate(found.gradient) / size

    flat = np.concatenate(shares)
    for share in levels:
        eps = share * size / vp.shape[1]
        flat = lbfgs(objective, flat, eps, **options(steps))
    shares = Shares(*np.split(flat, layout))
    return shares, evaluate(vp, vn, pairs, shares, eps, mu[0])


def searchable(points: np.ndarray) -> np.ndarray:
    """Points as a search sees them: many in float32, which takes half the time; few may cancel to any digit."""
    return points.astype(np.float32 if points.size > _MANY else np.float64)


def options(steps: int) -> dict[str, Any]:
    """Of L-BFGS."""
    return {"maxiter": steps, "maxfun": 2 * steps, "maxcor": 10, "ftol": 1e-9, "gtol": 1e-12}


def principal(v: Float64[np.ndarray, "k r"], width: int) -> Float64[np.ndarray, "r w"]:
    """The first principal directions of some points."""
    return np.linalg.eigh(v.T @ v)[1][:, ::-1][:, :width]


def kept(found: Value) -> tuple[scipy.sparse.csr_array, Float64[np.ndarray, " p"]]:
    """The cover in float64 without the entries that hardly matter, and deltas that make up for these.

    Where a cover is nearly perfect, what is left out is far larger than the residual and its delta.
    """
    cover = scipy.sparse.csr_array(found.cover, dtype=np.float64)
    dropped = cover.copy()
    dropped.data[np.abs(dropped.data) >= _SMALL] = 0.0
    cover.data[np.abs(cover.data) < _SMALL] = 0.0
    cover.eliminate_zeros()
    return cover, found.delta + np.linalg.norm(dropped @ found.vn.astype(np.float64), axis=1)


class Effort(NamedTuple):
    """What a search may cost.

    Attributes:
      rank: Of the second moment in the first search, at least 2; 8 to 12 are enough on images.
      first_steps: The most steps of L-BFGS there, with each of three degrees of smoothing.
      steps: The same with a cover, of which the last round takes a third; 0 for no cover.
      width: How many principal directions of the points the search for a cover looks at.
      last_width: How many its last round looks at; the proof takes all.
      partners: How many points of the other sign each point can be covered by, at least.
      ahead: The most steps in the cover alone, with each of two degrees of smoothing, before dual vectors are raised
        with it.
    """

    rank: int = 10
    first_steps: int = 100
    steps: int = 150
    width: int = 150
    last_width: int = 300
    partners: int = 30
    ahead: int = 150


def effort_for(count: int) -> Effort:
    """What pays: of few examples more steps; of many fewer, with fewer directions and partners."""
    if count <= FEW:
        return Effort(steps=400, ahead=400)
    return Effort() if count <= 2048 else Effort(steps=100, width=80, last_width=200, partners=16, ahead=100)


class Plain(NamedTuple):
    """What is found without a cover.

    Attributes:
      multipliers: The best.
      moment: `[r, rank]`, which says what points are alike; None where there are none.
      v: `[k, r]`, the points in a basis of what they span.
    """

    multipliers: Multipliers
    moment: np.ndarray | None
    v: np.ndarray


def plain(points: Points, effort: Effort) -> Plain:
    """Multipliers of a bound near the best without a cover."""
    v = ascent.in_basis(points.v)
    if not v.size:
        return Plain(Multipliers(np.zeros(0), np.zeros(0), np.zeros(0), None, 0.0, 0.0), None, v)
    reduced = ascent.reduce(v, points.positive)
    moment = ascent.ascend(reduced, effort.rank, effort.first_steps)
    return Plain(ascent.read_off(reduced, moment), moment, v)


def covered(points: Points, first: Plain, effort: Effort) -> Multipliers:
    """Multipliers with a cover, or the first ones where these are not worse."""
    positive, (given, moment, v) = points.positive, first
    size = ascent.worth(given)
    if moment is None or not effort.steps or not positive.any() or positive.all() or not size > 0:
        return given
    axes = principal(v, max(effort.width, effort.last_width))
    vp, vn = v[positive], v[~positive]
    with np.errstate(all="ignore"):
        pairs = candidates(vp @ moment, vn @ moment, effort.partners)
        shares = first_shares(pairs, np.maximum(given.delta, 1e-12 * size))
        try:
            for levels, width, steps in (
                (LEVELS[:-1], effort.width, effort.steps),
                (LEVELS[-1:], effort.last_width, -(-effort.steps // 3)),
            ):
                plus, minus = (searchable(part @ axes[:, :width]) for part in (vp, vn))
                shares, found = descend(plus, minus, pairs, shares, size=size, steps=steps, levels=levels)
        except np.linalg.LinAlgError:
            return given
        if not all(np.isfinite(part).all() for part in (found.cover.data, found.kappa, found.curvature, found.delta)):
            return given
        cover, delta = kept(found)
        left = ascent.reduce(v, positive, cover)
        better = ascent.settle(left, delta, found.kappa, found.curvature, cover)
    return better if ascent.worth(better) < size else given
