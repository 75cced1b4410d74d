"""The dual vector and the moment relaxation optimised together: a proven lower bound for two-layer ReLU networks.

For `(1/n) sum_j l(z_j) + lam int (a^2 + |u|^2) dmu` over all measures of units `a (u x)_+` weak duality gives

    F* >= -(1/n) sum_j l*(alpha_j)   for every alpha with  max over |u| <= 1 of |(1/n) sum_j alpha_j (u x_j)_+| <= 2
    lam,

and with the bound `rho(alpha)` of `moments.proof`, which is convex and of degree one, every direction alpha gives
`max over theta <= 2 lam / rho(alpha) of -(1/n) sum_j l*(theta alpha_j)`.  That is raised by L-BFGS over the sizes of
alpha (their signs stay) and the multipliers of both signs at once, smoothed as in `moments.covering`.  What it finds is
rounded into the domain of l*, scaled until its bound is proven to be at most 2 lam, and only then called a lower bound.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Float64

from dualgap_jax import losses
from dualgap_jax.certify.descent import lbfgs
from dualgap_jax.certify.moments import ascent, covering
from dualgap_jax.certify.moments.balls import BallBound, Side, checked, checked_effort, combined, side_of
from dualgap_jax.certify.moments.covering import Effort, Shares, Value, evaluate
from dualgap_jax.certify.moments.proof import scaled_points
from dualgap_jax.certify.moments.start import FORMS, Form, first_alpha
from dualgap_jax.registry import unknown

_LEAST = 1e-4  # of the largest |alpha|: smaller ones start there
_PACE = 0.3  # of log |alpha| beside the logits of a cover
_NORM = 64  # of the larger of both bounds, as the search sees it
_ROUGH = 60  # steps of a first search whose moment only says which points are alike
_BRIEF = 8  # steps ahead in a second search of few examples: many may fit a cover to the dual vectors of the start
_TRIES = 8  # scalings of alpha until its bound is proven
_LOSSES = {"squared": losses.squared, "logistic": losses.logistic, "hinge": losses.binary_hinge}


class Relaxation(NamedTuple):
    """A proven lower bound, and what it follows from.

    Attributes:
      lower: `-(1/n) sum_j l*(alpha_j)`, rounded down: at most F* and the risk of any number of units.
      alpha: `[n]`, in the domain of l*.
      bound: The proof that alpha is feasible: `bound.upper <= 2 penalty`.
    """

    lower: float
    alpha: Float64[np.ndarray, " n"]
    bound: BallBound


def relaxation(
    x: Any,
    y: Any,
    loss: str,
    *,
    penalty: float,
    alpha: Any = None,
    effort: Effort | None = None,
) -> Relaxation:
    """Proves a lower bound on `(1/n) sum_j l(sum_i a_i (u_i x_j)_+, y_j) + penalty sum_i (a_i^2 + |u_i|^2)`, any units.

    Args:
      x: `[n, d]`, float32 or float64.
      y: `[n]`, of the same types: targets for 'squared', labels -1 and +1 for 'logistic' and 'hinge' (tau = 1).
      loss: 'squared' (half the square), 'logistic' or 'hinge'.
      penalty: Positive.
      alpha: `[n]`, a dual vector to start from, such as the slopes of the loss at the outputs of a trained network; by
        default that of the relaxation without a cover.
      effort: What the search may cost, by default by the number of examples; `first_steps` are those of the start,
        `steps` those of the descent.

    Raises:
      ValueError: An argument is out of its range, or the bound leaves the range of float64.
    """
    x, y = checked(x, y)
    if y.ndim != 1:
        raise ValueError(f"y must be of shape [n], got {list(y.shape)}.")
    if loss not in FORMS:
        raise ValueError(unknown("loss", loss, FORMS))
    if loss != "squared" and not np.isin(y, (-1.0, 1.0)).all():
        raise ValueError(f"the {loss} loss needs labels -1 and +1.")
    if isinstance(penalty, bool) or not isinstance(penalty, int | float) or not 0 < penalty < math.inf:
        raise ValueError(f"penalty={penalty!r} must be positive and finite.")
    efforts = [checked_effort(effort, len(x))]
    if effort is None and len(x) <= covering.FEW:
        efforts.append(efforts[0]._replace(ahead=_BRIEF))
    form, ceiling = FORMS[loss], 2.0 * penalty
    live = np.any(x != 0, axis=1)
    idle = form.slope(np.zeros(len(y)), y)  # what is best for examples that are zero
    if alpha is not None:
        alpha = checked(x, alpha)[1]
        if alpha.shape != y.shape:
            raise ValueError(f"alpha must be of shape {list(y.shape)}, got {list(alpha.shape)}.")
    tries: list[_Found | None] = []
    if live.any():
        power = int(np.frexp(np.abs(x[live]).max())[1])
        data, targets = np.ldexp(x[live], -power), y[live]
        price = math.ldexp(ceiling, -power)
        if alpha is None:
            first = first_alpha(data, targets, form, price, rank=efforts[0].rank, steps=efforts[0].first_steps)
        else:
            first = alpha[live]
        for each in efforts:
            found = _Descent(data, targets, form, price * len(x), first, each).run(each.steps)
            tries.append(found._replace(delta=np.ldexp(found.delta, power)))
    proven = [_proven(x, y, loss, ceiling, idle, live, found) for found in tries or [None]]
    return max(proven, key=lambda made: made.lower)


class _Found(NamedTuple):
    """A dual vector and multipliers, over examples that are not zero.

    A positive example of one sign is a negative one of the other, so that an array has room for both signs.

    Attributes:
      alpha: `[k]`.
      delta: `[k]`, relative to `|alpha|`.
      kappa: `[k]`.
      curvature: `[k]`.
      covers: Of each sign, `[k, k]`.
    """

    alpha: np.ndarray
    delta: np.ndarray
    kappa: np.ndarray
    curvature: np.ndarray
    covers: tuple[scipy.sparse.csr_array, scipy.sparse.csr_array]


class _Descent:
    """The joint problem on data `[k, d]`, no row zero; `limit` bounds the sum over examples, `2 n penalty`."""

    def __init__(
        self, x: np.ndarray, y: np.ndarray, form: Form, limit: float, first: np.ndarray, effort: Effort
    ) -> None:
        self.y, self.form = y, form
        top = float(np.abs(first).max()) or 1.0
        slope = form.slope(np.zeros(len(y)), y)
        signs = np.where(first != 0, np.sign(first), np.sign(slope))
        self.signs = np.where(signs != 0, signs, 1.0)
        sizes = np.maximum(np.abs(first), _LEAST * top)
        basis = ascent.in_basis(x)
        axes = covering.principal(sizes[:, None] * basis, max(effort.width, effort.last_width))
        weighted = sizes[:, None] * (basis @ axes[:, : effort.width])
        self.masks = [self.signs > 0, self.signs < 0]
        starts = []
        for positive in self.masks:
            reduced = ascent.reduce(weighted, positive)
            moment = ascent.ascend(reduced, effort.rank, min(effort.first_steps, _ROUGH))
            plain = ascent.read_off(reduced, moment)
            starts.append((moment, plain.delta, ascent.worth(plain)))
        size = max(worth for _, _, worth in starts)
        self.size = size
        self.whole = covering.searchable((basis @ axes) / size)
        self.widths = effort.width, effort.last_width
        self.basis = self.whole[:, : effort.width]
        self.limit = limit / size
        self.logs = np.log(sizes) / _PACE
        self.pairs, self.shares = [], []
        for positive, (moment, delta, _) in zip(self.masks, starts, strict=True):
            seen = weighted @ moment
            pairs = covering.candidates(seen[positive], seen[~positive], effort.partners)
            self.pairs.append(pairs)
            shares = covering.first_shares(pairs, np.maximum(delta / size, 1e-12))
            v = sizes.astype(self.basis.dtype)[:, None] * self.basis
            levels = covering.LEVELS[:-1]
            with np.errstate(all="ignore"):
                shares, _ = covering.descend(
                    v[positive], v[~positive], pairs, shares, size=1.0, steps=effort.ahead, levels=levels
                )
            self.shares.append(shares)
        self.layout = np.cumsum([len(y), *(len(part) for shares in self.shares for part in shares)])[:-1]
        self.unit = float(np.mean(np.abs(form.gain(slope, y)[0]))) or 1.0
        self.mu = [1.0, 1.0]

    def sides(self, flat: np.ndarray, eps: float) -> tuple[np.ndarray, list[Value]]:
        """The sizes of alpha, and the smoothed bounds of both signs."""
        logs, *parts = np.split(flat, self.layout)
        sizes = np.exp(_PACE * logs)
        v = sizes.astype(self.basis.dtype)[:, None] * self.basis
        values = []
        for which, positive in enumerate(self.masks):
            shares = Shares(*parts[4 * which : 4 * which + 4])
            value = evaluate(v[positive], v[~positive], self.pairs[which], shares, eps, self.mu[which])
            self.mu[which] = value.mu
            values.append(value)
        return sizes, values

    def objective(self, flat: np.ndarray, eps: float) -> tuple[float, np.ndarray]:
        try:
            sizes, values = self.sides(flat, eps)
        except np.linalg.LinAlgError:
            return covering.UNUSABLE, np.zeros_like(flat)
        bounds = np.array([max(value.value, 1e-12) for value in values])
        top = float(bounds.max())
        powers = (bounds / top) ** _NORM
        bound = top * float(powers.sum()) ** (1 / _NORM)
        most = self.limit / bound
        theta = _best(self.signs * sizes, self.y, self.form, most)
        alpha = theta * self.signs * sizes
        gain, slope = self.form.gain(alpha, self.y)
        n = len(self.y)
        on_bound = float(slope @ alpha) / (n * bound) if theta == most else 0.0
        on_sizes = -theta * self.signs * slope / n
        parts = []
        for value, positive, part in zip(values, self.masks, powers / powers.sum() * (bound / bounds), strict=True):
            factor = on_bound * float(part)
            parts += [factor * g for g in value.gradient]
            for rows, pull in zip((positive, ~positive), value.in_points(), strict=True):
                on_sizes[rows] += factor * np.sum(pull * self.basis[rows], axis=1, dtype=np.float64)
        return -float(gain.mean()) / self.unit, np.concatenate([_PACE * on_sizes * sizes, *parts]) / self.unit

    def run(self, steps: int) -> _Found:
        """What L-BFGS finds."""
        flat = np.concatenate([self.logs, *(part for shares in self.shares for part in shares)])
        with np.errstate(all="ignore"):
            for share, width, most in zip(covering.LEVELS[1:], self.widths, (steps, -(-steps // 3)), strict=True):
                self.basis = self.whole[:, :width]
                eps = share / self.basis.shape[1]
                flat = lbfgs(self.objective, flat, eps, **covering.options(max(most, 1)))
            sizes, values = self.sides(flat, eps)
        theta = _best(
            self.signs * sizes, self.y, self.form, self.limit / max(1e-12, *(value.value for value in values))
        )
        delta, kappa, curvature = (np.zeros(len(sizes)) for _ in range(3))
        covers = []
        for value, positive in zip(values, self.masks, strict=True):
            cover, wide = covering.kept(value)
            delta[positive] = wide / sizes[positive] * self.size
            kappa[~positive], curvature[~positive] = value.kappa, value.curvature
            entries = cover.tocoo()
            place = np.flatnonzero(positive)[entries.row], np.flatnonzero(~positive)[entries.col]
            covers.append(scipy.sparse.csr_array((entries.data, place), shape=(len(sizes), len(sizes))))
        return _Found(theta * self.signs * sizes, delta, kappa, curvature, (covers[0], covers[1]))


def _best(direction: np.ndarray, y: np.ndarray, form: Form, most: float) -> float:
    """The best theta in `[0, most]` for the mean of `-l*(theta direction)`, which is concave."""

    def rise(theta: float) -> float:
        return float(direction @ form.gain(theta * direction, y)[1])

    if rise(most) >= 0:
        return most
    low, high = 0.0, most
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if rise(middle) > 0 else (low, middle)
    return low


def _proven(
    x: np.ndarray, y: np.ndarray, loss: str, ceiling: float, idle: np.ndarray, live: np.ndarray, found: _Found | None
) -> Relaxation:
    """The lower bound that what was found proves; `idle` is alpha of the examples that are zero."""
    conjugate, form = _LOSSES[loss]().conjugate, FORMS[loss]
    assert conjugate is not None
    alpha = idle.copy()
    if found is not None:
        alpha[live] = found.alpha
    for _ in range(_TRIES):
        alpha = conjugate.nearest(alpha[:, None], y)[:, 0]
        pair = _side(x, alpha, 1, live, found), _side(x, alpha, -1, live, found)
        bound = BallBound(combined((pair,)), (pair,))
        if bound.upper <= ceiling:
            lower = -conjugate.upper_mean(alpha[:, None], y)
            if not math.isfinite(lower):
                raise ValueError("the lower bound leaves the range of float64; divide y by a power of two.")
            return Relaxation(lower, alpha, bound)
        theta = _best(alpha[live], y[live], form, ceiling / bound.upper * (1 - 1e-12))
        alpha[live] *= theta
    raise ValueError(f"no multiple of alpha was proven to be feasible for a penalty of {ceiling / 2:.6g}; raise it.")


def _side(x: np.ndarray, alpha: np.ndarray, sign: int, live: np.ndarray, found: _Found | None) -> Side:
    """The certificate of one sign for an alpha of the signs of what was found."""
    points = scaled_points(x, sign * alpha)
    v, positive = ascent.in_basis(points.v), points.positive
    if found is None or not v.size:
        return side_of(points, covering.plain(points, Effort()).multipliers, sign)
    rows = np.searchsorted(np.flatnonzero(live), points.rows)
    plus, minus = rows[positive], rows[~positive]
    cover = scipy.sparse.csr_array(found.covers[0 if sign == 1 else 1][plus][:, minus])
    weights, powers = np.frexp(np.abs(alpha[points.rows[positive]]))
    delta = np.ldexp(found.delta[plus] * weights, powers - points.exponent)
    # What was rounded into the domain moves the residuals, which may be far larger than delta then.
    ratios = np.abs(found.alpha[rows]) / np.abs(alpha[points.rows])
    moved = v * (1 - ratios / np.median(ratios))[:, None]
    delta = delta + np.linalg.norm(moved[positive] - cover @ moved[~positive], axis=1)
    reduced = ascent.reduce(v, positive, cover)
    settled = ascent.settle(reduced, delta, found.kappa[minus], found.curvature[minus], cover)
    return side_of(points, settled, sign)
