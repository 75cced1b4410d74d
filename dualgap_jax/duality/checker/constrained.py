"""Value functions with h and W of one's own proven again, with arithmetic of its own (see `verify`).

Checked are: the bound on h from below, the lower values, the bounds on `min g + lam h` and the bound on the margins,
each from ranges over the boxes of its tree (or, for margins, over halves of the box around W); that the minimisers and
the points of a combination lie in W, cost what they may and have the values claimed; and what the middle of the
combination costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from dualgap_jax.duality.checker.pairs import Unsupported
from dualgap_jax.duality.checker.ranges import Walker, batch
from dualgap_jax.duality.checker.value_functions import Verified, children, down, halves, parabola, sum_of, up, widest
from dualgap_jax.duality.constrained import ConstrainedProblem, box_around
from dualgap_jax.duality.constrained_bounds import ConstrainedProof
from dualgap_jax.duality.sets import Blocks
from dualgap_jax.duality.values import BUDGET_SLACK, ValueFunction

_BATCH = 256
_MARGIN_BOXES = 20_000


class _Box(NamedTuple):
    """Of boxes `[n]`: the range of h, bounds on `g + lam h` at lam0 and at a multiplier of each, and the spread."""

    h_lo: np.ndarray
    h_hi: np.ndarray
    plain: np.ndarray
    base: np.ndarray
    lam: np.ndarray
    spread: np.ndarray


Pair = tuple[np.ndarray, np.ndarray]


def _tilted(g: Pair, h: Pair, lam: np.ndarray) -> Pair:
    """The range of `g + lam h` for lam >= 0, by rows."""
    lam = lam.reshape(-1, *[1] * (g[0].ndim - 1))
    with np.errstate(all="ignore"):
        more = [np.where(lam > 0, lam * e, 0.0) for e in h]
        lo, hi = down(g[0] + down(more[0])), up(g[1] + up(more[1]))
    return np.where(np.isnan(lo), -np.inf, lo), np.where(np.isnan(hi), np.inf, hi)


def _least(at: tuple[Pair, Pair], box: tuple[Pair, Pair], start: np.ndarray, r: np.ndarray) -> np.ndarray:
    """A lower bound over boxes from values `start` and slopes at their middles, and slopes and bends over them."""
    (d_lo, d_hi), (b_lo, b_hi) = box
    with np.errstate(all="ignore"):
        steep = np.maximum(np.abs(d_lo), np.abs(d_hi))
        flat = -up(sum_of(up(steep * r), True))
        first = np.maximum(np.abs(at[0][0]), np.abs(at[0][1]))
        off = np.maximum(np.abs(b_lo), np.abs(b_hi)) * (1 - np.eye(r.shape[1]))
        off = np.where(np.isnan(off), np.where(np.eye(r.shape[1]), 0.0, np.inf), off)
        scaled = up(off * up(r[:, None, :] / r[:, :, None])).sum(2) * (1 + 1e-14)
        bend = down(np.einsum("nkk->nk", b_lo) - scaled)
        curved = sum_of(parabola(first, bend, r), False)
        found = down(
            start + np.maximum(np.where(np.isnan(flat), -np.inf, flat), np.where(np.isnan(curved), -np.inf, curved))
        )
    return np.where(np.isnan(found), -np.inf, found)


def _bound(g: Walker, h: Walker, lo: np.ndarray, hi: np.ndarray, lam0: float) -> _Box:
    m = 0.5 * (lo + hi)
    r = up(np.maximum(up(hi - m), up(m - lo)))
    at, box = (g(m, m, curved=False), h(m, m, curved=False)), (g(lo, hi), h(lo, hi))
    with np.errstate(all="ignore"):
        middle = [0.5 * (x.first[0] + x.first[1]) for x in at]
        fitted = -(middle[0] * middle[1]).sum(1) / np.maximum((middle[1] ** 2).sum(1), 1e-280)
    lam = np.where(np.isfinite(fitted), np.maximum(fitted, lam0), lam0)
    still = np.full(len(lo), lam0)

    def base(by: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slopes = [_tilted(x[0].first, x[1].first, by) for x in (at, box)]
        bends = _tilted(box[0].second, box[1].second, by)
        start = _tilted((at[0].lower, at[0].upper), (at[1].lower, at[1].upper), by)[0]
        return _least((slopes[0], slopes[0]), (slopes[1], bends), start, r), (slopes[1][1] - slopes[1][0]) * r

    found, spread = base(lam)
    plain = _tilted((box[0].lower, box[0].upper), (box[1].lower, box[1].upper), still)[0]
    plain = np.maximum(plain, base(still)[0])
    return _Box(box[1].lower, box[1].upper, plain, found, lam, np.nan_to_num(spread, nan=np.inf))


def _apart(domain: Blocks, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """Whether the point of a box that is nearest to 0 in each coordinate lies outside a ball, so that none is in W."""
    found = np.zeros(len(lo), bool)
    for b in domain.blocks:
        if b.radius < np.inf and b.order < np.inf:
            near = np.maximum(np.maximum(lo[:, b.start : b.stop], -hi[:, b.start : b.stop]), 0.0)
            largest = near.max(axis=1, keepdims=True)
            unit = near / np.maximum(largest, 1e-300)
            norm = largest[:, 0] * (unit**b.order).sum(axis=1) ** (1 / b.order)
            found |= norm * (1 - 1e-13 * (1 + unit.shape[1])) > b.radius
    return found


def _through(
    problem: ConstrainedProblem, splits: Sequence[np.ndarray], effort: int,
    fails: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
) -> tuple[str, int]:  # fmt: skip
    """Whether `fails(lo, hi)` holds for no box of a tree, nor for their halves where it does; and boxes looked at."""
    waiting = halves(splits, problem.set.lower, problem.set.upper)
    if isinstance(waiting, str):
        return waiting, 0
    most, seen, size = effort * max(1000, sum(len(lo) for lo, _ in waiting)), 0, batch(problem.one)
    while waiting:
        lo, hi = waiting.pop()
        for first in range(0, len(lo), size):
            rows = slice(first, first + size)
            bad, spread = fails(lo[rows], hi[rows])
            seen += len(bad)
            bad &= ~_apart(problem.set, lo[rows], hi[rows])
            if bad.any():
                one, two = lo[rows][bad], hi[rows][bad]
                waiting.append(children(one, two, widest(spread[bad], one, two)))
        if seen > most:
            return f"a bound was not reached again with {seen} boxes", seen
    return "", seen


def verify_constrained(
    problem: ConstrainedProblem,
    function: ValueFunction,
    *,
    multipliers: Sequence[float] = (),
    points: np.ndarray | None = None,
    values: np.ndarray | None = None,
    effort: int = 4,
) -> Verified:
    """Proves all that verdicts take from a value function with h and W of one's own again; see `verify_function`."""
    proof = function.proof
    if not isinstance(proof, ConstrainedProof):
        return Verified(False, "the value function carries no proof by boxes", 0)
    if function.floor is None or function.concave or function.slope is not None or not _falls(function.lower):
        return Verified(False, "the value function claims what boxes do not prove", 0)
    duals = {lam: function.lagrangian(lam) for lam in multipliers} if function.lagrangian is not None else {}
    try:
        g, h = Walker(problem.one), Walker(problem.one, problem.h_at)
        reason, boxes = _points(problem, g, h, function, points, values), 0
        zero = Walker(problem.one, lambda w: 0.0 * w[0])
        sizes = np.append(function.budgets[:-1], np.inf)
        claims = [
            (proof.floor, (h, zero), np.array([function.floor]), 0.0),
            (proof.primal, (g, h), function.lower, 0.0),
        ]
        claims += [(tree, (g, h), np.array([value]), lam) for lam, (tree, value) in proof.dual.items()]
        for tree, walkers, claim, lam in claims:
            if reason:
                break
            reason, seen = _through(problem, tree, effort, _failing(walkers, claim, sizes[-len(claim) :], lam))
            boxes += seen
        if not reason and function.margin is not None:
            reason, seen = _margins(problem, g, function.margin)
            boxes += seen
        if not reason and not set(duals) <= set(proof.dual):
            reason = "a multiplier has no proof"
        return Verified(not reason, reason, boxes, {} if reason else duals)
    except Unsupported as error:
        return Verified(False, str(error), 0)


def _failing(
    walkers: tuple[Walker, Walker], claims: np.ndarray, sizes: np.ndarray, lam0: float
) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Whether `g + lam0 h >= claims [m]`, where `h <= sizes [m]`, does not follow on boxes; and their spread."""

    def fails(lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        out = _bound(*walkers, lo, hi, lam0)
        with np.errstate(all="ignore"):
            cost = up(up(out.lam - lam0)[:, None] * np.minimum(sizes, out.h_hi[:, None]))
            fitted = down(out.base[:, None] - np.where((out.lam > lam0)[:, None], cost, 0.0))
        best = np.maximum(out.plain[:, None], np.where(np.isnan(fitted), -np.inf, fitted))
        return ~((best >= claims) | (sizes < out.h_lo[:, None])).all(axis=1), out.spread

    return fails


def _falls(values: np.ndarray) -> bool:
    return bool((np.diff(values) <= 0).all())


def _points(
    problem: ConstrainedProblem, g: Walker, h: Walker, function: ValueFunction,
    points: np.ndarray | None, values: np.ndarray | None,
) -> str:  # fmt: skip
    """Whether the upper values are those of feasible points, and the points of a combination have the values given."""
    own = function.minimisers
    if own is None or len(own) != len(function.budgets):
        return "there is no point for each budget"
    if not all(problem.set.contains(w) for w in np.unique(own, axis=0)):
        return "a minimiser does not lie in W"
    costs = np.concatenate([h.upper(own[k : k + _BATCH]) for k in range(0, len(own), _BATCH)])
    dear = np.flatnonzero(~(costs <= function.budgets - BUDGET_SLACK * np.abs(function.budgets)))
    if len(dear):
        return f"the point of budget {function.budgets[dear[0]]:.6g} costs more"
    worth = np.concatenate([g.upper(own[k : k + _BATCH]) for k in range(0, len(own), _BATCH)])
    worse = np.flatnonzero(~(worth <= function.upper))
    if len(worse):
        return f"the point of budget {function.budgets[worse[0]]:.6g} has a larger value than claimed"
    if points is not None:
        if not all(problem.set.contains(w) for w in points):
            return "a point of the combination does not lie in W"
        if not (g.upper(np.asarray(points)) <= np.asarray(values)).all():
            return "a point of the combination has a larger value than claimed"
    return ""


def reached(problem: ConstrainedProblem, function: ValueFunction, points: np.ndarray, weights: np.ndarray) -> int:
    """The index of the first budget that the middle of a combination is proven to cost at most, or of the last.

    The points lie in W, and so does their middle.  The last lower value holds whatever the middle costs.
    """
    shares = [Fraction(a) for a in weights.tolist()]
    columns = [[Fraction(x) for x in column] for column in points.T.tolist()]
    middle = [sum((a * x for a, x in zip(shares, c, strict=True)), Fraction(0)) / sum(shares) for c in columns]
    lo, hi = box_around(middle)
    cost = float(Walker(problem.one, problem.h_at).outputs(lo[None], hi[None])[1].reshape(-1)[0])
    return min(int(np.searchsorted(function.budgets, cost)), len(function.budgets) - 1)


def _margins(problem: ConstrainedProblem, walker: Walker, margin: float) -> tuple[str, int]:
    """Whether no margin exceeds `margin * tau` over W, by ranges of the outputs over halves of the box around it."""
    c, limit = problem.one.c, float(np.nextafter(margin * problem.one.tau, -np.inf))
    if c.shape[1] != 1 or not (np.abs(c) == 1).all():
        return "margins are proven again for labels -1 and +1 alone", 0
    waiting, seen, size = [(problem.set.lower[None], problem.set.upper[None])], 0, batch(problem.one)
    while waiting:
        lo, hi = waiting.pop()
        for first in range(0, len(lo), size):
            rows = slice(first, first + size)
            low, high = (end[:, :, 0] for end in walker.outputs(lo[rows], hi[rows]))
            bad = ~(np.where(c[:, 0] > 0, high, -low).max(axis=1) <= limit)
            bad &= ~_apart(problem.set, lo[rows], hi[rows])
            seen += len(bad)
            if bad.any():
                one, two = lo[rows][bad], hi[rows][bad]
                waiting.append(children(one, two, np.argmax(two - one, axis=1)))
        if seen > _MARGIN_BOXES:
            return f"the bound {margin:.6g} tau on the margins was not reached again", seen
    return "", seen
