"""A second opinion on what is claimed of a branch: the proof gone through again with arithmetic of its own.

`verify_function` takes a certified value function by whatever route, and the combination behind Delta.  For branch and
bound (`verify_boxes`) nothing is shared with the solver but the problem's data and the branch's jaxpr.  Ranges are
NumPy arrays rounded outward after each operation; derivatives are carried forward to second order; a box
whose bound does not reach the claim here is halved until it does.  Operations other than those in `checker.ranges` are
refused, and the proof then counts as not verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from dualgap_jax.duality.branch_and_bound import Proof, Tree
from dualgap_jax.duality.checker.closed_forms import verify_closed_form, verify_margin
from dualgap_jax.duality.checker.pairs import Unsupported
from dualgap_jax.duality.checker.ranges import Walker
from dualgap_jax.duality.problem import Problem
from dualgap_jax.duality.values import BUDGET_SLACK, ValueFunction

_NUMBERS = 2**23  # in one array of values at points


class Verified(NamedTuple):
    """The outcome of going through a proof again.

    Attributes:
      holds: whether every claim was proven again.
      reason: the first claim that was not, or "" if all were.
      boxes: how many boxes, or cones of directions, were looked at.
      duals: multiplier -> the bound on `min g + lam h` that was proven again.
    """

    holds: bool
    reason: str
    boxes: int
    duals: Mapping[float, float] = MappingProxyType({})


def down(a: np.ndarray) -> np.ndarray:
    """The next number below."""
    return np.nextafter(a, -np.inf)


def up(a: np.ndarray) -> np.ndarray:
    """The next number above."""
    return np.nextafter(a, np.inf)


def sum_of(terms: np.ndarray, upward: bool) -> np.ndarray:
    """A sum over the last axis, rounded outward at each step."""
    total = terms[..., 0]
    for k in range(1, terms.shape[-1]):
        total = np.nextafter(total + terms[..., k], np.inf if upward else -np.inf)
    return total


def _norms(lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds on `||w||^2` over boxes `[n, p]`."""
    far = np.maximum(np.abs(lo), np.abs(hi))
    near = np.where((lo <= 0) & (hi >= 0), 0.0, np.minimum(np.abs(lo), np.abs(hi)))
    return np.maximum(sum_of(down(near * near), False), 0.0), sum_of(up(far * far), True)


class _Bound(NamedTuple):
    """Of boxes `[n]`: ranges of `||w||^2`, lower bounds `plain` and `base - (lam - lam0) min(s, h_hi)`, and slopes."""

    h_lo: np.ndarray
    h_hi: np.ndarray
    plain: np.ndarray
    base: np.ndarray
    extra: np.ndarray  # lam - lam0, rounded up
    nowhere: np.ndarray  # no minimiser is in the box
    slope: np.ndarray  # of g, a bound on its norm
    spread: np.ndarray  # [n, p], what a coordinate adds to the width


def parabola(slope: np.ndarray, bend: np.ndarray, r: np.ndarray) -> np.ndarray:
    """A lower bound on `min over |t| <= r of slope t + bend t^2 / 2` for the worst slope of the size given."""
    with np.errstate(all="ignore"):
        ends = down(down(0.5 * bend * r * r * (1 - np.copysign(4e-15, bend))) - up(slope * r * (1 + 4e-15)))
        inner = -up(up(slope * slope) / down(2 * bend)) * (1 + 4e-15)
        least = np.where((bend > 0) & (down(bend * r) >= up(slope)), np.minimum(inner, 0.0), ends)
    return np.where(np.isnan(least), -np.inf, least)


def _bound(walker: Walker, lo: np.ndarray, hi: np.ndarray, lam0: float) -> _Bound:
    m = 0.5 * (lo + hi)
    r = up(np.maximum(up(hi - m), up(m - lo)))
    at, box = walker(m, m, curved=False), walker(lo, hi)
    h_lo, h_hi = _norms(lo, hi)
    size_lo = _norms(m, m)[0]
    d_lo, d_hi = box.first
    # Multipliers mu >= lam0 with 0 in d + 2 mu w, by coordinate; the quotients are good to a few ulps.
    with np.errstate(all="ignore"):
        one, two = -d_lo / (2 * lo), -d_hi / (2 * hi)
        low = np.maximum(np.where(lo < 0, one, -np.inf), np.where(hi > 0, two, -np.inf)).max(1)
        top = np.minimum(np.where(lo > 0, one, np.inf), np.where(hi < 0, two, np.inf)).min(1)
        known = np.isfinite(d_lo).all(1) & np.isfinite(d_hi).all(1) & np.isfinite(h_hi)
        low = np.maximum(low - 1e-13 * np.abs(low), lam0)
        top = top + 1e-13 * np.abs(top)
        never = (((lo >= 0) & (d_lo > 0) & (lo == 0)) | ((hi == 0) & (d_hi < 0))).any(1)
        nowhere = known & ((low > top) | never) & ~((lo <= 0) & (hi >= 0)).all(1) & box.smooth
        fitted = -(m * 0.5 * (at.first[0] + at.first[1])).sum(1) / np.maximum(2 * size_lo, 1e-280)
        lam = np.clip(fitted, low, np.maximum(low, top))
        lam = np.where(np.isfinite(lam), np.maximum(lam, lam0), lam0)

    def base(lam: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            twice = 2 * lam[:, None]
            first = np.maximum(np.abs(down(at.first[0] + down(twice * m))), np.abs(up(at.first[1] + up(twice * m))))
            bend = down(np.einsum("nkk->nk", box.second[0]) + twice)
            off = np.maximum(np.abs(box.second[0]), np.abs(box.second[1])) * (1 - np.eye(m.shape[1]))
            off = np.where(np.isnan(off), np.inf, off)
            bend = down(bend - (up(off * r[:, None, :] / r[:, :, None]).sum(2) * (1 + 1e-14)))
            curved = sum_of(parabola(up(first), bend, r), False)
            flat = np.minimum(_ray(d_lo, m, r, lam), _ray(-d_hi, -m, r, lam))
            change = np.maximum(curved, sum_of(flat, False))
            found = down(down(at.lower + down(lam * size_lo)) + change)
        return np.where(np.isnan(found), -np.inf, found)

    with np.errstate(all="ignore"):
        still = np.full(len(lo), lam0)
        plain = np.maximum(np.where(np.isnan(box.lower), -np.inf, down(box.lower + down(lam0 * h_lo))), base(still))
        slope = np.sqrt((np.maximum(np.abs(d_lo), np.abs(d_hi)) ** 2).sum(1)) * (1 + 1e-14)
        curved = np.maximum(np.abs(box.second[0]), np.abs(box.second[1]))
        spread = (
            np.where(
                np.isfinite(curved.sum(axis=(1, 2), keepdims=True)[:, 0]), (curved * r[:, None]).sum(2), d_hi - d_lo
            )
            * r
        )
    return _Bound(h_lo, h_hi, plain, base(lam), up(lam - lam0), nowhere, slope, np.nan_to_num(spread, nan=np.inf))


def _ray(d: np.ndarray, m: np.ndarray, r: np.ndarray, lam: np.ndarray) -> np.ndarray:
    """A lower bound on `min over t in [0, r] of d t + lam ((m + t)^2 - m^2)`."""
    lam = lam[:, None]
    a = down(d + down(2 * lam * m))
    whole = down(down(a * r) + down(lam * r * r * (1 - 4e-16)))
    inner = -up(up(a * a) / np.maximum(4 * lam, 1e-290)) * (1 + 4e-15)
    least = np.where((lam > 0) & (down(-a) < up(2 * lam * r)), np.maximum(inner, down(a * r)), whole)
    return np.where(a >= 0, 0.0, np.where(np.isnan(least), -np.inf, least))


def _through(
    walker: Walker, tree: Tree, squares: np.ndarray, claims: np.ndarray, lam0: float, effort: int
) -> tuple[str, int, float]:
    """Whether the boxes of a tree prove `claims` at the squared radii: a reason against, boxes, and the largest slope.

    A claim is that `g + lam0 ||w||^2 >= claims[j]` wherever `||w||^2 <= squares[j]`, for the minimisers of g.
    """
    p, steepest, seen = walker.size, 0.0, 0
    if not tree.edge**2 * (1 - 1e-15) >= squares[-1]:
        return f"the cube of half side {tree.edge} does not contain W", 0, np.inf
    corner = np.full(p, tree.edge)
    waiting = halves(tree.splits, -corner, corner)
    if isinstance(waiting, str):
        return waiting, 0, np.inf
    while waiting:
        lo, hi = waiting.pop()
        again: list[tuple[np.ndarray, np.ndarray]] = []
        for first in range(0, len(lo), walker.batch):
            rows = slice(first, first + walker.batch)
            out = _bound(walker, lo[rows], hi[rows], lam0)
            seen += len(out.plain)
            reach = np.minimum(squares, out.h_hi[:, None])
            with np.errstate(all="ignore"):
                fitted = down(out.base[:, None] - up(out.extra[:, None] * reach))
            best = np.maximum(out.plain[:, None], np.where(np.isnan(fitted), -np.inf, fitted))
            fine = np.asarray(((best >= claims) | (squares < out.h_lo[:, None])).all(1) | out.nowhere)
            steepest = max(steepest, float(out.slope.max()))
            if not fine.all():
                again.append(children(lo[rows][~fine], hi[rows][~fine], widest(out.spread, lo[rows], hi[rows])[~fine]))
        waiting += again
        if seen > effort:
            return f"a bound was not reached again with {seen} boxes", seen, steepest
    return "", seen, steepest


def halves(splits: Sequence[np.ndarray], lo: np.ndarray, hi: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]] | str:
    """The boxes that a tree of halves of the box `lo, hi [p]` ends in, by levels; or what is wrong with the tree."""
    lo, hi = lo[None], hi[None]
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for split in splits:
        if split.shape != (len(lo),) or split.max(initial=-1) >= lo.shape[1]:
            return "the tree's splits do not fit its boxes"
        leaf = split < 0
        found.append((lo[leaf], hi[leaf]))
        lo, hi = children(lo[~leaf], hi[~leaf], split[~leaf])
    return f"the tree leaves {len(lo)} boxes without a bound" if len(lo) else found


def widest(spread: np.ndarray, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
    """The coordinate to halve: the widest of those with at least a quarter of the largest spread."""
    counts = spread >= 0.25 * spread.max(1, keepdims=True)
    return np.argmax(np.where(counts, hi - lo, -1.0), axis=1)


def children(lo: np.ndarray, hi: np.ndarray, split: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two halves of each box, cut in the middle of the coordinate `split [n]`: all lower ones, then all upper."""
    rows, upper, lower = np.arange(len(lo)), hi.copy(), lo.copy()
    upper[rows, split] = lower[rows, split] = (0.5 * (lo + hi))[rows, split]
    return np.concatenate([lo, lower]), np.concatenate([upper, hi])


def _values(walker: Walker, problem: Problem, points: np.ndarray) -> np.ndarray:
    """Upper bounds on g at points `[k, p]`."""
    size = max(1, _NUMBERS // (problem.x.size * max(problem.size // problem.x[0].size, 1)))
    return np.concatenate([walker.upper(points[k : k + size]) for k in range(0, len(points), size)])


def _points(walker: Walker, function: ValueFunction, problem: Problem) -> str:
    """Whether the upper bounds are those of feasible points, for budgets that are smaller by `BUDGET_SLACK` too."""
    points, budgets = function.minimisers, function.budgets
    if points is None or len(points) != len(budgets):
        return "there is no point for each budget"
    norms = _norms(points, points)[1]
    # Exponent, power and product are good to a few ulps, times the logarithm of the budget.
    sizes = np.abs(np.log(np.maximum(budgets, 1e-300)))
    allowed = (budgets * (1 - BUDGET_SLACK)) ** (2 / problem.power) * (1 - 1e-15 - 4e-16 * sizes / problem.power)
    outside = np.flatnonzero(~((norms <= allowed) | (points == 0).all(1)))
    if len(outside):
        return f"the point of budget {budgets[outside[0]]:.6g} is outside its ball"
    above = np.flatnonzero(~(_values(walker, problem, points) <= function.upper))
    return f"the point of budget {budgets[above[0]]:.6g} has a larger value than claimed" if len(above) else ""


def verify_function(
    problem: Problem,
    function: ValueFunction,
    *,
    multipliers: Sequence[float] = (),
    points: np.ndarray | None = None,
    values: np.ndarray | None = None,
    effort: int = 4,
) -> Verified:
    """Proves all that verdicts take from a value function again: by boxes, or for homogeneous branches by cones.

    Checked are its upper values at feasible points, its lower values, slope, concavity and margin, the bounds on
    `min g + lam h` that its `lagrangian` gives, and the values at the points of a combination.

    Args:
      problem: the one-branch problem.
      function: its value function.
      multipliers: what its `lagrangian` is asked for.
      points: `[k, p]`, those of a `Combination`, and `values [k]`, the upper bounds on g there.
      effort: see `verify_boxes`.

    Returns:
      `Verified`, with the bounds at the multipliers.
    """
    given = function.lagrangian
    duals = {lam: given(lam) for lam in multipliers} if given is not None else {}
    boxed = isinstance(function.proof, Proof)
    try:
        walker = Walker(problem)
        reason = ""
        if points is not None and not (_values(walker, problem, np.asarray(points)) <= np.asarray(values)).all():
            reason = "a point of the combination has a larger value than claimed"
        if not reason and function.margin is not None and not verify_margin(problem, function.margin):
            reason = f"the bound {function.margin:.6g} tau on the margins does not follow"
        if boxed and not reason:
            if function.concave:
                return Verified(False, "v is called concave, which boxes do not prove", 0)
            found = verify_boxes(problem, function, effort=effort)
            return found._replace(duals=duals if found.holds else {})
        reason, seen = reason or _points(walker, function, problem), 0
        if not reason:
            reason, seen = verify_closed_form(problem, function, duals)
        return Verified(not reason, reason, seen, {} if reason else duals)
    except Unsupported as error:
        return Verified(False, str(error), 0)


def verify_boxes(problem: Problem, function: ValueFunction, *, effort: int = 4) -> Verified:
    """Proves the bounds of `branch_and_bound.certify` again.

    Checked are: that the upper bounds are values of feasible points; that the boxes of the proof cover W; that the
    lower bounds, the bound on the slope, and the bounds on `min g + lam h` for the multipliers asked for so far follow
    from ranges over these boxes.

    Args:
      problem: the one-branch problem.
      function: its value function, with its `Proof`.
      effort: how many boxes may be looked at, in multiples of those in the proof (and at least 1,000).

    Returns:
      `Verified`; a branch with operations that are not known here does not hold, and the reason names them.
    """
    proof = function.proof
    if not isinstance(proof, Proof):
        return Verified(False, "the value function carries no proof by boxes", 0)
    if function.lower.shape != function.budgets.shape or not (np.diff(function.lower) <= 0).all():
        return Verified(False, "the lower bounds are not non-increasing, one a budget", 0)
    try:
        walker = Walker(problem)
        reason = _points(walker, function, problem)
        sizes = np.abs(np.log(np.maximum(function.budgets, 1e-300)))
        squares = np.maximum(function.budgets, 0.0) ** (2 / problem.power) * (1 + 1e-14 + 1e-15 * sizes)
        claims = [(proof.primal, squares, function.lower, 0.0)]
        claims += [(tree, squares[-1:], np.array([value]), lam) for lam, (tree, value) in proof.dual.items()]
        boxes = 0
        for tree, radii, values, lam in claims:
            most = effort * max(1000, sum(int((s < 0).sum()) for s in tree.splits))
            if reason:
                break
            reason, seen, slope = _through(walker, tree, radii, values, lam, most)
            boxes += seen
            if not reason and lam == 0 and function.slope is not None and not slope <= function.slope:
                reason = f"the slope reaches {slope:.6g}, claimed were {function.slope:.6g}"
        return Verified(not reason, reason, boxes)
    except Unsupported as error:
        return Verified(False, str(error), 0)


def verify_minimum(problem: Problem, lam: float, tree: Tree, claim: float, *, effort: int = 4) -> Verified:
    """Proves `g + lam ||w||^2 >= claim` on W again, from the tree of boxes of `penalised_minimum`."""
    squares = up(np.array([problem.radius**2]))
    most = effort * max(1000, sum(int((s < 0).sum()) for s in tree.splits))
    try:
        reason, boxes, _ = _through(Walker(problem), tree, squares, np.array([claim]), lam, most)
    except Unsupported as error:
        return Verified(False, str(error), 0)
    return Verified(not reason, reason, boxes)
