"""The moment relaxation: a proven bound on the one-branch problem of two-layer ReLU networks, in any dimension.

    rho = max over |u| <= 1 and both signs of  ± (1/n) sum_j alpha_j (u x_j)_+

is what weak duality needs of such a branch: with `f = a (u x)_+`, `h = a^2 + |u|^2` and the penalty `lam h`, the least
of `(1/n) sum_j alpha_j f(x_j) + lam h` is 0 if `rho <= 2 lam`.  Finding it is NP-hard; the bound here is the value of a
semidefinite relaxation, proven with all rounding (`moments.proof`) from multipliers that a search finds
(`moments.ascent`, `moments.covering`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Float64

from dualgap_jax.certify.moments.covering import Effort, covered, effort_for, plain
from dualgap_jax.certify.moments.proof import Multipliers, Points, prove, scaled_points
from dualgap_jax.sizes import is_whole


class Side(NamedTuple):
    """The certificate of a bound of one sign; delta, mu and beta are in units of `2^exponent`.

    Attributes:
      upper: The proven bound of `max over |u| <= 1 of ± (1/n) sum_j alpha_j (u x_j)_+`, at least 0.
      sign: 1 or -1.
      delta: `[n]`, of the rows with `sign * alpha > 0`, where `|r_j u| <= delta_j / 2 + (r_j u)^2 / (2 delta_j)`; 0
        elsewhere.
      kappa: `[n]`, of the rows with `sign * alpha < 0`, where `|v_j u| >= kappa_j v_j u`, that is
        `(t)_+ >= q t` with `q = (1 + kappa) / 2`; 0 elsewhere.
      curvature: `[n]`, s, of the same rows, where `|v_j u| >= (v_j u)^2 / |v_j|`; 0 elsewhere.
      cover: `[n, n]` sparse, the c_ij by which positive rows are written as sums of negative ones and a residual r,
        or None.
      mu: The multiplier of the ball.
      beta: The bound of what is linear.
      exponent: Of the units: `v_j = |alpha_j| x_j / 2^exponent`.
    """

    upper: float
    sign: int
    delta: Float64[np.ndarray, " n"]
    kappa: Float64[np.ndarray, " n"]
    curvature: Float64[np.ndarray, " n"]
    cover: scipy.sparse.csr_array | None
    mu: float
    beta: float
    exponent: int


class BallBound(NamedTuple):
    """A proven bound of the largest size of `(1/n) sum_j alpha_j (u x_j)_+` over the ball.

    Attributes:
      upper: The bound: the larger of both signs; with several outputs the root of the sum of the squares of these.
      sides: For each output the certificates of both signs.
    """

    upper: float
    sides: tuple[tuple[Side, Side], ...]


def ball_bound(x: Any, alpha: Any, *, effort: Effort | None = None) -> BallBound:
    """Proves an upper bound of `max over |u| <= 1 of |(1/n) sum_j alpha_j (u x_j)_+|`.

    The bound holds for these float64 numbers as they are: every rounding between them and it is charged to it, and the
    search that finds the multipliers is not trusted (`moments.verify` proves it again from the multipliers).

    Args:
      x: `[n, d]`, float32 or float64, with at least one row and one column.
      alpha: `[n]`, or `[n, C]` for C outputs, where the Euclidean norm of the C sums is bounded.
      effort: What the search for multipliers may cost; by default by the number of examples (`covering.effort_for`).
        A sign whose bound does not count is searched for less.

    Raises:
      ValueError: The arrays are not finite, not of these types or shapes, or the bound leaves the range of float64.
    """
    x, alpha = checked(x, alpha)
    effort = checked_effort(effort, len(x))
    columns = alpha.reshape(len(alpha), -1).T
    sides = tuple(_both(x, a, effort) for a in columns)
    return BallBound(combined(sides), sides)


def checked(x: Any, alpha: Any) -> tuple[np.ndarray, np.ndarray]:
    """Data and weights as float64 arrays.  Raises ValueError as `ball_bound` says."""
    arrays = []
    for name, given in (("x", x), ("alpha", alpha)):
        array = np.asarray(given)
        if array.dtype not in (np.float32, np.float64):
            raise ValueError(f"{name} has dtype {array.dtype}; give float32 or float64, whose values are kept exactly.")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has entries that are not finite; a bound needs finite numbers.")
        arrays.append(np.asarray(array, np.float64))
    x, alpha = arrays
    if x.ndim != 2 or alpha.ndim not in (1, 2) or len(alpha) != len(x) or 0 in (*x.shape, *alpha.shape):
        raise ValueError(
            f"need x [n, d] and alpha [n] or [n, C], all of at least 1; got {list(x.shape)} and {list(alpha.shape)}."
        )
    return x, alpha


def combined(sides: tuple[tuple[Side, Side], ...]) -> float:
    """The bound of all outputs together, rounded up.  Raises ValueError where it is not finite."""
    each = [max(side.upper for side in pair) for pair in sides]
    if len(each) == 1:
        return each[0]
    top = max(each)
    if top == 0:
        return 0.0
    power = math.frexp(top)[1]
    root = math.sqrt(math.fsum(math.ldexp(value, -power) ** 2 for value in each)) * (1 + 2.0**-50)
    return in_range(root, power)


def in_range(value: float, exponent: int) -> float:
    """`value * 2^exponent`, rounded up.  Raises ValueError where that is beyond the largest float64."""
    try:
        scaled = math.nextafter(math.ldexp(value, exponent), math.inf) if value else 0.0
    except OverflowError:
        scaled = math.inf
    if scaled == math.inf:
        raise ValueError("the bound leaves the range of float64; divide x or alpha by a power of two.")
    return scaled


def checked_effort(effort: Effort | None, count: int) -> Effort:
    """The effort, or that for so many examples.  Raises ValueError unless all are integers in range."""
    if effort is None:
        return effort_for(count)
    least = Effort(2, 1, 0, 1, 1, 1, 1)
    for name, value, low in zip(Effort._fields, effort, least, strict=True):
        if not is_whole(value) or value < low:
            raise ValueError(f"effort.{name}={value!r} must be an integer of at least {low}.")
    return effort


def _both(x: np.ndarray, alpha: np.ndarray, effort: Effort) -> tuple[Side, Side]:
    """Both signs.  The larger bound counts: that one gets a cover first, and the other if it is the larger one then."""
    points = {sign: scaled_points(x, sign * alpha) for sign in (1, -1)}
    first = {sign: plain(points[sign], effort) for sign in (1, -1)}
    sides = {sign: side_of(points[sign], first[sign].multipliers, sign) for sign in (1, -1)}
    large = 1 if sides[1].upper >= sides[-1].upper else -1
    for sign in (large, -large):
        if sides[sign].upper >= sides[-sign].upper:
            sides[sign] = side_of(points[sign], covered(points[sign], first[sign], effort), sign)
    return sides[1], sides[-1]


def side_of(points: Points, found: Multipliers, sign: int) -> Side:
    """The certificate of some multipliers, with the bound that they prove."""
    proven = prove(points, found)
    upper = in_range(math.nextafter(proven / points.total, math.inf), points.exponent) if proven else 0.0
    arrays = [np.zeros(points.total) for _ in range(3)]
    kinds = (points.positive, ~points.positive, ~points.positive)
    for array, values, kind in zip(arrays, found[:3], kinds, strict=True):
        array[points.rows[kind]] = values
    cover = None
    if found.cover is not None:
        entries = found.cover.tocoo()
        place = points.rows[points.positive][entries.row], points.rows[~points.positive][entries.col]
        cover = scipy.sparse.csr_array((entries.data, place), shape=(points.total, points.total))
    delta, kappa, curvature = arrays
    return Side(upper, sign, delta, kappa, curvature, cover, found.mu, found.beta, points.exponent)
