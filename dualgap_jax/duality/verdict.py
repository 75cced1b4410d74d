"""The verdict on Theorem 1: bounds on inf(P), sup(D) and the gap for each number of branches, against `(2 / I) Delta`.

A row is 'certified' when every number in it is proven: by the word of what made the value functions and combinations,
until `theorem1` or `proofs.prove` has the independent checkers go through it.  It speaks of problem (2) with the
tau-hinge where a proven bound on the margins over W lies below tau (Assumption 1); otherwise the numbers are those of
the hinge without its maximum, `E(1 - y f / tau)`, of which the theorem's inequality says nothing about the hinge
itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np

from dualgap_jax.duality.allocation import METHODS, Allocation, Path, solve
from dualgap_jax.duality.deltas import Combination, belongs
from dualgap_jax.duality.envelope import dual_on_edges, multipliers
from dualgap_jax.duality.problem import above
from dualgap_jax.duality.units import Spread, as_counts, in_units, spread_of, whole_units
from dualgap_jax.duality.values import BUDGET_SLACK, Status, ValueFunction, number
from dualgap_jax.registry import unknown

Outcome = Literal["verified", "refuted", "undecided"]
Objective = Literal["hinge", "unclipped hinge"]

_EPS = float(np.finfo(np.float64).eps)
# A float64 sum here has few terms of size max |v|, each good to an ulp; proven bounds are moved outward.
_ROUNDING = 64 * _EPS
# And a shortest path has at most one term a unit of its edge.
_ROUNDING_OF_PATHS = 16 * _EPS


class Verdict(NamedTuple):
    """Theorem 1 on one instance.

    Attributes:
      num_branches: I.
      budget: K.
      primal_lower, primal_upper: bounds on inf(P); the upper one is the value of a feasible point.
      dual_lower, dual_upper: bounds on sup(D).
      gap_lower, gap_upper: bounds on inf(P) - sup(D).
      delta_lower, delta_upper: bounds on the worst Delta_i.
      normalized_gap: `gap_upper / delta_lower`; None where delta_lower is 0.
      bound: 2 / I.
      objective: 'hinge' where a bound on the margins lies below tau (Assumption 1; proven if the status is), so that
        the numbers are those of problem (2) with the tau-hinge; else 'unclipped hinge', `E(1 - y f / tau)`, which may
        be negative where a hinge is not.
      status: 'certified' if every bound is proven, for the objective named, by the solvers' own word in the rows of
        `verdicts` and by the checkers' in those of `theorem1`; 'estimated' if one rests on a search or on a number that
        was given.
      verdict: 'verified' if the bounds are certified for the hinge and `gap_upper <= (2 / I) delta_lower`, a proof for
        this instance; 'refuted' if they are and `gap_lower > (2 / I) delta_upper`, which would contradict the theorem;
        else 'undecided'.
      exact_on_grid: whether the allocation is optimal on the grid.
      multiplier: the one whose `Q(lam) - lam K` is `dual_lower`.
      dual_value: the lower bound on `Q(multiplier)` behind it.
    """

    num_branches: int
    budget: float
    primal_lower: float
    primal_upper: float
    dual_lower: float
    dual_upper: float
    gap_lower: float
    gap_upper: float
    delta_lower: float
    delta_upper: float
    normalized_gap: float | None
    bound: float
    objective: Objective
    status: Status
    verdict: Outcome
    exact_on_grid: bool
    multiplier: float
    dual_value: float

    @property
    def holds(self) -> bool:
        """Whether `gap_upper <= (2 / I) delta_lower`, proven or not."""
        return self.gap_upper <= self.bound * self.delta_lower


class _DualBound(NamedTuple):
    """A lower bound on sup(D), the multiplier, and the lower bound on Q there."""

    value: float
    multiplier: float
    q: float


def dual_lower(functions: Sequence[ValueFunction], budget: float, counts: Sequence[int], lam: float) -> _DualBound:
    """A lower bound on sup(D): `Q(lam) - lam K` from lower bounds of the one-branch problems.

    Holds for every `lam >= 0` by weak duality; the bound is best at the maximiser.  A branch's `lagrangian` is used
    where there is one, else its values one grid step below.
    """
    total, scale, parts = sum(counts), 0.0, []
    for f, n in zip(functions, counts, strict=True):
        lower = f.step_below() if f.status == "certified" else f.lower
        best = float(np.min(lower + lam * f.budgets))
        best -= lam * f.below * (1 + 4 * _EPS) if lam > 0 else 0.0
        other = f.lagrangian(lam) if f.lagrangian is not None else -math.inf
        best = other if other > best else best
        size = np.where(np.isfinite(f.lower), np.abs(f.lower), np.abs(f.upper)).max()
        scale = max(scale, float(size) + lam * float(np.abs(f.budgets).max()))
        parts.append(n * best)
    # A little more than K is charged, which covers the roundings of the products.
    free = lam * (budget + 4e-12 * abs(budget)) if lam > 0 else 0.0
    value = math.fsum(parts) / total if all(map(math.isfinite, parts)) else -math.inf
    bound, q = value - free - _ROUNDING * max(1.0, scale + abs(free)), value - _ROUNDING * max(1.0, scale)
    if lam > 0 and math.isfinite(bound) and any(f.lagrangian is not None and not f.concave for f in functions):
        # The proof is from q, and what is charged in excess of lam K may be less than a rounding where K is small.
        bound = min(bound, -above(Fraction(lam) * Fraction(budget) - Fraction(q)))
    return _DualBound(bound, lam, q)


def _concave_lower(function: ValueFunction, budget: float, count: int) -> float:
    """A lower bound on inf(P) for branches of one kind with concave v, over all budgets, on the grid or off it.

    A concave function of the allocation is least at a vertex of `{sum b_i <= I K}` in the box of budgets: all branches
    but one have the least or the largest budget.
    """
    b, low = function.budgets, function.lower
    share = min(max((budget - float(b[0])) / float(b[-1] - b[0]), 0.0), 1.0) * (1 + 4e-12)
    full = min(math.floor(count * share), count)
    if full == count:
        return float(low[-1])
    rest = float(b[0]) + (count * share - full) * float(b[-1] - b[0])
    one = float(low[min(int(np.searchsorted(b, rest)), len(b) - 1)])
    return (full * float(low[-1]) + one + (count - full - 1) * float(low[0])) / count


class Instance:
    """Value functions and a budget, from which the bounds for every number of branches follow.

    Args:
      functions: the value functions of the classes; for identical branches one.
      budget: K; inf drops the constraint.
      method: see `allocate`.

    Raises:
      ValueError: for value functions on grids of unlike spacing, or K that is no number or below the least h.
    """

    def __init__(self, functions: Sequence[ValueFunction], budget: Any, method: str = "auto") -> None:
        if isinstance(functions, ValueFunction):
            functions = [functions]
        if not functions or not all(isinstance(f, ValueFunction) for f in functions):
            raise ValueError("give the value functions of the classes of branches, one `ValueFunction` each.")
        if method not in METHODS:
            raise ValueError(unknown("method", method, METHODS))
        self.functions, self.budget, self.method = list(functions), number("budget K", budget, infinite=True), method
        self.grids = [f.budgets for f in functions]
        self.uppers = [f.upper for f in functions]
        belows = [f.step_below() if f.status == "certified" else f.lower for f in functions]
        self.belows = [np.minimum.accumulate(b) for b in belows]
        self.certified = all(f.status == "certified" for f in functions)
        self.scale = max(float(np.abs(f.upper).max()) for f in functions)
        self.spread: Spread = spread_of(self.grids)
        self.paths: tuple[dict[Any, Path], dict[Any, Path]] = ({}, {})

    def allocation(self, counts: Sequence[int]) -> Allocation:
        """The best feasible allocation found: its value bounds inf(P) from above, for the grids as they are."""
        sure, _ = whole_units(self.spread, self.budget, counts, BUDGET_SLACK)
        problem = in_units(self.grids, self.uppers, self.budget, counts)._replace(units=sure)
        return solve(problem, self.method, self.paths[0])

    def primal_lower(self, counts: Sequence[int]) -> float:
        """A lower bound on inf(P) over all budgets, on the grid and between its points."""
        best = -math.inf
        if all(np.isfinite(b).all() for b in self.belows):
            below = max(f.below for f in self.functions)
            more = math.nextafter(self.budget + below, math.inf) if below > 0 else self.budget
            _, limit = whole_units(self.spread, more, counts, 0.0)
            problem = in_units(self.grids, self.belows, self.budget, counts)._replace(units=limit)
            best = solve(problem, self.method, self.paths[1]).lower
        if len(self.functions) == 1 and self.functions[0].concave:
            best = max(best, _concave_lower(self.functions[0], self.budget, sum(counts)))
        longest = max(map(len, self.grids)) / sum(counts)
        return best - (_ROUNDING + _ROUNDING_OF_PATHS * longest) * max(1.0, self.scale)

    def dual_upper(self, counts: Sequence[int]) -> float:
        """An upper bound on sup(D): the convex envelope of the upper values at K."""
        problem = in_units(self.grids, self.uppers, self.budget, counts)
        value = dual_on_edges(problem, self.budget, float(self.spread.largest)).value
        return value + _ROUNDING * max(1.0, self.scale)

    def dual_lower(self, counts: Sequence[int]) -> _DualBound:
        """The best lower bound on sup(D) over the multipliers that are optimal on the grid."""
        problem = in_units(self.grids, self.uppers, self.budget, counts)
        candidates = {dual_on_edges(problem, self.budget, problem.spacing).multiplier}
        candidates |= set(multipliers(problem, self.budget))
        if any(f.lagrangian is None for f in self.functions) and all(np.isfinite(b).all() for b in self.belows):
            below = in_units(self.grids, self.belows, self.budget, counts)
            candidates.add(dual_on_edges(below, self.budget, below.spacing).multiplier)
        usable = sorted(lam for lam in candidates if math.isfinite(lam)) or [0.0]
        return max((dual_lower(self.functions, self.budget, counts, lam) for lam in usable), key=lambda d: d.value)


def _delta(functions: Sequence[ValueFunction], given: Any) -> tuple[float, float, bool]:
    """Lower and upper bound on the worst Delta, and whether both are proven.

    Raises:
      ValueError: for a number that no Delta reaches, or that is none.
    """
    most = max(f.largest_delta() for f in functions)
    if isinstance(given, Combination):
        given = [given]
    if isinstance(given, Sequence) and given and all(isinstance(c, Combination) for c in given):
        best = max(given, key=lambda c: c.delta)
        ours = best.status == "certified" and any(belongs(best, f) for f in functions)
        return best.delta, max(most, best.delta), ours
    lower = number("delta_lower", given)
    if not 0 <= lower <= most * (1 + 1e-9):
        raise ValueError(
            f"delta_lower={lower:.6g} is no lower bound on Delta: it must lie between 0 and"
            f" v(least budget) - v(largest budget) = {most:.6g}; `deltas.best_lower_bound` finds one."
        )
    return lower, max(most, lower), False


def verdicts(
    functions: Sequence[ValueFunction] | ValueFunction,
    budget: Any,
    counts: Any,
    *,
    delta_lower: Any,
    method: str = "auto",
) -> list[Verdict]:
    """Theorem 1 for each number of branches: one row of bounds an entry of `counts`.

    Args:
      functions: the value functions of the classes; for identical branches one.
      budget: K; inf drops the constraint.
      counts: for each row the number of branches, or with several classes the number of each.
      delta_lower: what bounds Delta_worst from below: a `deltas.Combination` of one of the functions, or several.  A
        number is taken too, and makes the rows estimated.
      method: see `allocate`.

    Returns:
      The rows; `Delta_worst` is bounded from above by `v(least budget) - v(largest budget)`.

    Raises:
      ValueError: as `allocate`, or for a `delta_lower` that is negative, not a number, or larger than Delta can be.
    """
    instance = Instance(functions if not isinstance(functions, ValueFunction) else [functions], budget, method)
    low, high, proven_delta = _delta(instance.functions, delta_lower)
    certified = instance.certified and proven_delta
    margins = [f.margin for f in instance.functions]
    hinge = all(margin is not None and margin < 1 for margin in margins)
    rows = []
    for row in [counts] if isinstance(counts, int | np.integer) else counts:
        branches = as_counts(row)
        if len(branches) != len(instance.functions):
            raise ValueError(
                f"counts {branches} for {len(instance.functions)} classes of branches; give each class its number."
            )
        total = sum(branches)
        upper = instance.allocation(branches)
        dual = instance.dual_lower(branches)
        primal_upper = upper.value + _ROUNDING * max(1.0, instance.scale)
        # Weak duality: a lower bound on sup(D) is one on inf(P), an upper bound on inf(P) one on sup(D).
        primal_lower = max(instance.primal_lower(branches), dual.value)
        dual_upper = min(instance.dual_upper(branches), primal_upper)
        gap_upper = math.nextafter(primal_upper - dual.value, math.inf)
        gap_lower = max(0.0, math.nextafter(primal_lower - dual_upper, -math.inf))
        bound = 2.0 / total
        outcome: Outcome = "undecided"
        if certified and hinge:
            # One rounding of 2 / I and one of the product.
            share = bound * low * (1 - 4 * _EPS), bound * high * (1 + 4 * _EPS)
            outcome = "verified" if gap_upper <= share[0] else "refuted" if gap_lower > share[1] else "undecided"
        rows.append(
            Verdict(
                num_branches=total,
                budget=instance.budget,
                primal_lower=float(primal_lower),
                primal_upper=float(primal_upper),
                dual_lower=float(dual.value),
                dual_upper=float(dual_upper),
                gap_lower=float(gap_lower),
                gap_upper=float(gap_upper),
                delta_lower=float(low),
                delta_upper=float(high),
                normalized_gap=float(gap_upper / low) if low > 0 else None,
                bound=bound,
                objective="hinge" if hinge else "unclipped hinge",
                status="certified" if certified else "estimated",
                verdict=outcome,
                exact_on_grid=upper.exact,
                multiplier=dual.multiplier,
                dual_value=float(dual.q),
            )
        )
    return rows
