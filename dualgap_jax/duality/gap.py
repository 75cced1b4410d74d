"""The duality gap of Theorem 1 from value functions: inf(P), sup(D) and their difference, for any number of branches.

Under Assumption 1 problem (2) separates into one-branch problems.  With `v_i(b) = inf {g_i(w) : w in W_i, h_i(w) <= b}`

    inf(P) = (1/I) min { sum_i v_i(b_i) : sum_i b_i <= I K }      sup(D) = max_{lam >= 0}  Q(lam) - lam K
    Q(lam) = (1/I) sum_i min_b { v_i(b) + lam b }

so numbers v on a grid of budgets decide everything here; no network is evaluated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from dualgap_jax.duality.allocation import Allocation, allocate
from dualgap_jax.duality.envelope import dual_by_envelope, dual_on_edges
from dualgap_jax.duality.units import as_classes, in_units
from dualgap_jax.duality.values import ValueFunction, number


class Gap(NamedTuple):
    """A duality gap on a grid of budgets, and bounds on that of the value function between its points.

    Attributes:
      primal: inf(P) over allocations on the grid.
      dual: sup(D) of the values on the grid, `v**(K)` for one class.
      gap: their difference.
      multiplier: of the dual.
      allocation: a feasible allocation that attains `primal`.
      on_grid: whether I K is a whole number of units above the least budget, up to one part in 10^12.  Where it is not,
        the grid leaves a part of the budget unused, and `gap` can be far above that of the function itself.
      gap_lower, gap_upper: bounds on the gap of every non-increasing function with these values on the grid.
    """

    primal: float
    dual: float
    gap: float
    multiplier: float
    allocation: Allocation
    on_grid: bool
    gap_lower: float
    gap_upper: float


def gap_from_value_function(budgets: Any, values: Any, budget: Any, num_branches: Any, *, method: str = "auto") -> Gap:
    """The duality gap of Theorem 1 from a value function on a grid, for any number of branches.

    The branch's budget is restricted to the grid, on which the problem is solved exactly (`allocation.exact` says so);
    `gap_lower` and `gap_upper` say what that is worth for the function between the grid's points.

    Args:
      budgets: `[m]`, uniform and increasing.  For unequal branches a sequence of grids of one spacing, one a class.
      values: `[m]`, the value function on it, non-increasing; or one such array a class.
      budget: K >= the least budget; inf drops the constraint (Remark 3).
      num_branches: I; or one count a class.
      method: see `allocate`.

    Returns:
      inf(P), sup(D) and their difference in units of the loss, the optimal multiplier, and a feasible allocation.

    Raises:
      ValueError: for grids or values that are malformed, or K below the least h.

    >>> result = gap_from_value_function([0.0, 0.5, 1.0], [1.0, 0.9, 0.0], budget=0.5, num_branches=3)
    >>> round(result.primal, 6), round(result.dual, 6), round(result.gap, 6)
    (0.633333, 0.5, 0.133333)
    """
    b, v, counts = as_classes(budgets, values, num_branches)
    limit = number("budget K", budget, infinite=True)
    allocation = allocate(b, v, limit, counts, method=method)
    dual = dual_by_envelope(b, v, limit, counts)
    problem = in_units(b, v, limit, counts)
    # Between the points of the grid v is at least its value at the next one.
    below = [np.append(x[1:], x[-1]) for x in v]
    least = allocate(b, below, limit, counts, method=method).lower
    lowest = dual_on_edges(in_units(b, below, limit, counts), limit, problem.spacing).value
    margin = 1e-13 * max(float(np.abs(x).max()) for x in v)
    spent = (limit - problem.floor) / problem.spacing * sum(counts)
    on_grid = bool(limit >= max(float(x[-1]) for x in b) or abs(spent - problem.units) <= 1e-12 * max(1, problem.units))
    gap = allocation.value - dual.value
    return Gap(
        allocation.value,
        dual.value,
        gap,
        dual.multiplier,
        allocation,
        on_grid,
        max(0.0, least - dual.value - margin),
        allocation.value - lowest + margin,
    )


def branch_weights(function: ValueFunction, counts: dict[int, int]) -> Float64[np.ndarray, "I p"]:
    """The weights of a feasible primal point: one row a branch, those with the least budget first.

    Args:
      function: a value function that keeps its minimisers.
      counts: one class of an `Allocation`.

    Raises:
      ValueError: if the minimisers were not kept.
    """
    if function.minimisers is None:
        raise ValueError(f"the value function ({function.method}) keeps no minimisers, so there are no weights.")
    order = sorted(counts)
    return np.repeat(function.minimisers[order], [counts[j] for j in order], axis=0)
