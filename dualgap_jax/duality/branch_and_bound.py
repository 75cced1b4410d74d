"""Certified value functions of branches with few parameters (p up to 6), any activation, by branch and bound.

All budgets are treated in one tree of boxes, bounded from below by `boxes`.  A box is closed when, at every budget that
it reaches, its bound is within the tolerance of the best value known there; the others are halved.  What is proven at a
budget is the least bound of the closed boxes, and of those still open when the effort is spent.  The tree itself is
kept as a `Proof`, so that `verify` can go through it with arithmetic of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float64

from dualgap_jax.config import require
from dualgap_jax.duality.boxes import Bounds, kernels, largest_slope, point_values
from dualgap_jax.duality.margins import margin_bound
from dualgap_jax.duality.problem import ByProgram, Problem, subject_of, values_at
from dualgap_jax.duality.search import monotone
from dualgap_jax.duality.values import ValueFunction, proven
from dualgap_jax.sizes import positive
from dualgap_jax.terminal import COMPILING, Progress

MAX_PARAMETERS = 6
_BATCH = 1024
_STEPS = 16  # blocks of budgets in which a box's bound is looked at
SPARE = 2.0**-43  # share of the bounds left to those who prove them again with other roundings
_SHARP_BELOW = 0.3  # side of a box, in units of the radius, below which derivatives are worth their price
_EPS = float(np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True)
class BoundSpec:
    """How far to go.

    Attributes:
      tolerance: distance of the two bounds at which a box is closed, in units of the loss.
      max_boxes: boxes in all; the bounds reached by then are returned.
    """

    tolerance: float = 1e-4
    max_boxes: int = 1_000_000

    def __post_init__(self) -> None:
        require(self.tolerance > 0, f"tolerance={self.tolerance} must be positive.")
        positive(self.max_boxes, "max_boxes")


class _Part(NamedTuple):
    """Lower bounds of boxes `[n]` as step functions of the budget's index: `value[:, k]` from index `start[:, k]` on.

    A box says nothing about budgets before `start[:, 0]`, which it does not reach.  Values fall along k.
    """

    start: np.ndarray  # [n, _STEPS + 1]
    value: np.ndarray  # [n, _STEPS + 1]

    def closed(self, target: np.ndarray) -> np.ndarray:
        """`[n]`: whether the bound is at least the non-increasing `target [m]` at every budget."""
        wanted = np.append(target, -np.inf)[np.minimum(self.start, len(target))]
        return (self.value >= wanted).all(axis=1)


def _at_budgets(out: Bounds, squares: np.ndarray, lam0: float) -> _Part:
    """The bounds of the boxes as functions of the budget, from its first to its last index in equal blocks."""
    plain = np.where(np.isnan(out.plain), -np.inf, out.plain)[:, None]
    slope = (out.lam - lam0)[:, None]
    first, last = np.searchsorted(squares, out.h_lo), np.searchsorted(squares, out.h_hi)
    start = first[:, None] + (last - first)[:, None] * np.arange(_STEPS + 1) // _STEPS
    # In a block the bound is that at its last budget; from `last` on it is that at h_hi.
    end = np.concatenate([np.maximum(start[:, 1:] - 1, start[:, :-1]), start[:, -1:]], axis=1)
    reach = np.minimum(np.append(squares, np.inf)[np.minimum(end, len(squares))], out.h_hi[:, None])
    reach = np.where(slope >= 0, reach, out.h_lo[:, None])
    base = out.base[:, None]
    with np.errstate(invalid="ignore", over="ignore"):
        fitted = base - slope * reach
        fitted = np.where(np.isnan(fitted), -np.inf, fitted)
        value = np.maximum(plain, fitted)
        # The difference is good to a few ulps of its largest term.
        error = 1e-15 * (np.where(fitted > plain, np.abs(base) + np.abs(slope) * out.h_hi[:, None], np.abs(plain)))
        value = np.where(np.isfinite(value), value - error, -np.inf)
    return _Part(start, np.where(out.excluded[:, None], np.inf, value))


class _Least:
    """The least bound at each budget over a set of boxes."""

    def __init__(self, squares: np.ndarray) -> None:
        self._from = np.full(len(squares) + 1, np.inf)

    def add(self, part: _Part, which: np.ndarray) -> None:
        index = np.minimum(part.start[which], len(self._from) - 1)
        np.minimum.at(self._from, index, np.minimum.accumulate(part.value[which], axis=1))

    def proven(self) -> np.ndarray:
        return np.minimum.accumulate(self._from)[:-1]


class Tree(NamedTuple):
    """A tree of boxes, from the cube `[-edge, edge]^p` down: what covers W in the proof of a lower bound.

    Attributes:
      edge: half the side of the cube, which contains W.
      splits: by levels; the coordinate that a box is halved in, or -1 for a box of the proof.  The next level has all
        lower halves, in the order of their parents, and then all upper halves.
    """

    edge: float
    splits: tuple[np.ndarray, ...]


class Proof(NamedTuple):
    """What `certify` proved its bounds with.

    Attributes:
      primal: the tree behind the lower bounds on v.
      dual: for each multiplier that `lagrangian` was asked for, the tree and the bound.
    """

    primal: Tree
    dual: dict[float, tuple[Tree, float]]


class Grown(NamedTuple):
    """What a run proved at each budget, the best values, their points, boxes seen, and how many were left open."""

    lower: np.ndarray
    upper: np.ndarray
    points: np.ndarray
    boxes: int
    left_open: int
    splits: tuple[np.ndarray, ...]  # of `Tree`


class Start(NamedTuple):
    """What a tree grows from: a box `lo, hi [p]` around W, kernels for large boxes and for small ones, and the budgets.

    A lower bound at a budget is one over the points of W whose size (`||w||^2`, or h) is at most `sizes [m]` there; a
    middle of a box counts as a point of a budget where `cost [n]` of it is at most `limits [m]`.  Boxes smaller than
    `sharp_below` are small.
    """

    lo: np.ndarray
    hi: np.ndarray
    kernels: tuple[Any, Any]
    sizes: np.ndarray
    limits: np.ndarray
    cost: Callable[[np.ndarray], np.ndarray]
    sharp_below: float


class _Best:
    """The least values known at each budget, and their points."""

    def __init__(self, limits: np.ndarray, upper: np.ndarray, points: np.ndarray) -> None:
        self._limits, self.upper, self.points = limits, upper.copy(), points.copy()

    def look(self, middle: np.ndarray, cost: np.ndarray, value: np.ndarray) -> None:
        """Takes over values at points `[n, p]`, of these costs, that are better."""
        where = np.searchsorted(self._limits, cost)
        known = np.flatnonzero((where < len(self._limits)) & np.isfinite(value))
        better = known[value[known] < self.upper[where[known]]]
        for k in better:
            if value[k] < self.upper[where[k]]:
                self.upper[where[k]], self.points[where[k]] = value[k], middle[k]
        if len(better):
            self.upper, self.points = monotone(self.upper, self.points)


def _halved(lo: np.ndarray, hi: np.ndarray, split: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower halves of the boxes, and then the upper halves."""
    rows = np.arange(len(lo))
    middle = 0.5 * (lo + hi)[rows, split]
    left_hi, right_lo = hi.copy(), lo.copy()
    left_hi[rows, split] = right_lo[rows, split] = middle
    return np.concatenate([lo, right_lo]), np.concatenate([left_hi, hi])


def grow(start: Start, upper: np.ndarray, points: np.ndarray, spec: BoundSpec, lam0: float, label: str | None) -> Grown:
    """Branch and bound on `g + lam0 h`, from the best values `upper [m]` known and their points `[m, p]`."""
    p, sizes, (crude, sharp) = len(start.lo), start.sizes, start.kernels
    lo, hi = start.lo[None], start.hi[None]
    codes: list[np.ndarray] = []
    for axis in range(p):  # the orthants, on which a bias-free ReLU with one input is linear
        codes.append(np.full(len(lo), axis, np.int8))
        lo, hi = _halved(lo, hi, codes[-1])
    best = _Best(start.limits, upper, points)
    closed_bound, open_bound = _Least(sizes), _Least(sizes)
    boxes = left_open = 0
    with Progress(spec.max_boxes, label or "boxes", at_most=True, first=COMPILING) as line, jax.enable_x64(True):
        while len(lo):
            open_bound, splits = _Least(sizes), np.full(len(lo), -1, np.int8)
            for first in range(0, len(lo), _BATCH):
                rows = slice(first, first + _BATCH)
                kernel = crude if (hi[rows] - lo[rows]).max() > start.sharp_below else sharp
                n = len(lo[rows])
                pad = ((0, _BATCH - n), (0, 0))
                out = Bounds(
                    *(a[:n] for a in jax.device_get(kernel(np.pad(lo[rows], pad), np.pad(hi[rows], pad), lam0)))
                )
                middle = 0.5 * (lo[rows] + hi[rows])
                best.look(middle, start.cost(middle), out.value)
                part = _at_budgets(out, sizes, lam0)
                closed = part.closed(best.upper - spec.tolerance)
                closed_bound.add(part, closed)
                open_bound.add(part, ~closed)
                splits[rows] = np.where(closed, -1, out.split)
            boxes += len(lo)
            rest = np.flatnonzero(splits >= 0)
            if label is not None:
                line.update(min(boxes, spec.max_boxes), f"{len(rest):,} open")
            left_open = 2 * len(rest) if boxes + 2 * len(rest) > spec.max_boxes else 0
            codes.append(splits if not left_open else np.full(len(lo), -1, np.int8))
            if left_open:
                break
            lo, hi = _halved(lo[rest], hi[rest], splits[rest])
    lower = closed_bound.proven()
    if left_open:
        lower = np.minimum(lower, open_bound.proven())
    # v does not rise, so a bound at a larger budget holds at a smaller one.
    lower = np.maximum.accumulate(np.minimum(lower, best.upper)[::-1])[::-1]
    lower = np.where(np.isfinite(lower), lower - SPARE * (1 + np.abs(lower)), -np.inf)
    return Grown(lower, best.upper, best.points, boxes, left_open, tuple(codes))


def _in_ball(problem: Problem, squares: np.ndarray) -> Start:
    """The cube around the ball of a problem, at the squared radii `squares [m]`, increasing."""
    edge = float(np.sqrt(squares[-1]) * (1 + 1e-15))
    corner = np.full(problem.size, edge)

    def cost(points: np.ndarray) -> np.ndarray:
        return np.asarray(np.sum(points**2, axis=1) * (1 + 1e-14))

    return Start(-corner, corner, kernels(ByProgram(problem)), squares, squares, cost, _SHARP_BELOW * edge)


def _checked(problem: Problem, found: ValueFunction) -> np.ndarray:
    """The minimisers.  Raises ValueError for what `certify` does not take."""
    if problem.size > MAX_PARAMETERS:
        raise ValueError(
            f"branch and bound takes up to {MAX_PARAMETERS} parameters, this branch has {problem.size}; use the search."
        )
    if found.minimisers is None:
        raise ValueError("certify needs the minimisers of the search.")
    if found.minimisers.shape != (len(found.budgets), problem.size) or not np.isfinite(found.minimisers).all():
        raise ValueError(f"certify needs finite minimisers [m, {problem.size}], got {found.minimisers.shape}.")
    if not 1e-100 < problem.radius < 1e100:
        raise ValueError(f"branch and bound takes radii from 1e-100 to 1e100, got {problem.radius}; scale the weights.")
    if not (np.isfinite(problem.x).all() and np.isfinite(problem.c).all() and np.isfinite(problem.offset)):
        raise ValueError("the problem's data are not finite, so its value function is not defined.")
    problem.check_budgets(found.budgets)
    return found.minimisers


def certify(
    problem: Problem,
    found: ValueFunction,
    spec: BoundSpec = BoundSpec(),
    *,
    dual: BoundSpec | None = None,
    label: str | None = None,
) -> ValueFunction:
    """Proves lower bounds for a value function found by search.

    Args:
      problem: its branch has at most `MAX_PARAMETERS` parameters.
      found: from `search`, with minimisers; the closer to the truth, the fewer boxes.
      spec: for the value function.
      dual: for `Q(lam)` in `ValueFunction.lagrangian`, which decides how sharp sup(D) is; None: `spec`.  For powers of
        the norm other than 2 there is no `lagrangian`.
      label: shows progress under this name; None is silent.

    Returns:
      The same grid with proven bounds and the `Proof`; `tolerance` is what was reached.  The status 'certified' is the
      solver's own word, which `theorem1` has the checker (`proofs.prove`) confirm.

    Raises:
      ValueError: for too many parameters, a value function without minimisers, budgets that do not run from 0 to the
        largest h over W, data that are not finite, or a branch that is not proven to be finite on all of W.
      UnsupportedPrimitiveError: if the branch uses an operation without an interval rule.
    """
    minimisers = _checked(problem, found)
    margin = margin_bound(problem)
    # A little larger than the budgets, so that points on the sphere are inside in spite of rounding.
    squares = np.maximum(found.budgets, 0.0) ** (2 / problem.power) * (1 + 1e-13)
    radii = problem.radii(found.budgets)

    def proven_at(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Upper bounds at feasible points near w, one a budget, and the points."""
        norms = np.maximum(np.linalg.norm(w, axis=1), np.finfo(np.float64).tiny)
        points = w * (np.minimum(norms, radii) / norms)[:, None]
        values = point_values(problem, points)
        return monotone(values + SPARE * (1 + np.abs(values)), points)

    start = _in_ball(problem, squares)
    grown = grow(start, *proven_at(minimisers), spec, 0.0, label)
    upper, points = proven_at(grown.points)
    if not (np.isfinite(grown.lower).all() and np.isfinite(upper).all()):
        raise ValueError(
            f"with {grown.boxes:,} boxes no finite bound was proven: the branch may be undefined or infinite somewhere"
            " on W; give a branch that is defined on all of W, or allow more boxes."
        )
    proof = Proof(Tree(float(start.hi[0]), grown.splits), {})

    def lagrangian(lam: float) -> float:
        if not 0 <= lam < np.inf:
            raise ValueError(f"the multiplier lam={lam!r} must be a finite number, at least 0.")
        if lam not in proof.dual:
            costs = upper + lam * found.budgets
            best = slice(int(np.argmin(costs)), int(np.argmin(costs)) + 1)
            name = None if label is None else f"{label}, dual"
            alone = start._replace(sizes=squares[-1:], limits=squares[-1:])
            one = grow(alone, costs[best], points[best], dual or spec, lam, name)
            proof.dual[lam] = Tree(proof.primal.edge, one.splits), float(one.lower[0])
        return proof.dual[lam][1]

    state = "closed" if not grown.left_open else f"{grown.left_open:,} left open"
    made = ValueFunction(
        found.budgets,
        np.minimum(grown.lower, upper),
        upper,
        f"branch and bound, {grown.boxes:,} boxes, {state}",
        points,
        lagrangian if problem.power == 2 else None,
        largest_slope(problem),
        margin=None if margin is None else margin / problem.tau * (1 + 4 * _EPS),
        proof=proof,
    )
    return proven(made, subject_of(problem))


class Minimum(NamedTuple):
    """Bounds on `min over W of g + lam h`, the point behind the upper one, the tree behind the lower one, its boxes."""

    lower: float
    upper: float
    point: np.ndarray
    tree: Tree
    boxes: int


def penalised_minimum(
    problem: Problem, lam: float, points: Float64[np.ndarray, "k p"], spec: BoundSpec, *, label: str | None = None
) -> Minimum:
    """A proven lower bound on `min over W of g(w) + lam ||w||^2`, for one multiplier alone.

    Args:
      problem: its branch has at most `MAX_PARAMETERS` parameters, its power is 2.
      lam: the multiplier, at least 0.
      points: points of W, of which the best starts the search for the minimum; the better, the fewer boxes.
      spec: how far to go.
      label: shows progress under this name; None is silent.

    Raises:
      ValueError: for too many parameters, another power, a multiplier that is none, or a branch that is not proven to
        be finite on all of W.
      UnsupportedPrimitiveError: if the branch uses an operation without an interval rule.
    """
    if problem.size > MAX_PARAMETERS or problem.power != 2 or not 1e-100 < problem.radius < 1e100:
        raise ValueError(
            f"branch and bound takes up to {MAX_PARAMETERS} parameters, power 2 and radii from 1e-100 to 1e100; the"
            f" branch has {problem.size}, power {problem.power:g} and radius {problem.radius:g}."
        )
    if not 0 <= lam < np.inf:
        raise ValueError(f"the multiplier lam={lam!r} must be a finite number, at least 0.")
    ball = problem.radius * (1 - 1e-14)
    inside = points * (ball / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), ball))
    costs = point_values(problem, inside) + lam * np.sum(inside**2, axis=1) * (1 + 16 * _EPS)
    best = slice(int(np.argmin(costs)), int(np.argmin(costs)) + 1)
    known = costs[best] + SPARE * (1 + np.abs(costs[best]))
    start = _in_ball(problem, np.array([problem.radius**2 * (1 + 1e-13)]))
    grown = grow(start, known, inside[best], spec, lam, label)
    if not np.isfinite(grown.lower[0]):
        raise ValueError(
            f"with {grown.boxes:,} boxes no finite bound was proven: the branch may be undefined or infinite somewhere"
            " on W; give a branch that is defined on all of W, or allow more boxes."
        )
    return Minimum(
        float(grown.lower[0]),
        float(grown.upper[0]),
        grown.points[0],
        Tree(float(start.hi[0]), grown.splits),
        grown.boxes,
    )


def upper_values(problem: Problem, w: Float64[np.ndarray, "k p"]) -> Float64[np.ndarray, " k"]:
    """Proven upper bounds on g at the rows of w: by interval arithmetic for up to `MAX_PARAMETERS` parameters.

    With more, float64 values and a margin of `8 (n + p) eps` times their size, which is not a proof.
    """
    if problem.size <= MAX_PARAMETERS:
        return point_values(problem, w)
    values = values_at(problem, w)
    return values + 8 * (len(problem.c) + problem.size) * _EPS * (1 + np.abs(values))
