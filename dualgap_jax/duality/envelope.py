"""The convex envelope of a value function, and with it sup(D) on a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dualgap_jax.convexity import lower_hull
from dualgap_jax.duality.units import Units, edges, in_units
from dualgap_jax.duality.values import Values


class Dual(NamedTuple):
    """`sup(D)` of value functions given on a grid, and a multiplier that attains it."""

    value: float
    multiplier: float


def envelope(values: Values) -> Values:
    """The lower convex envelope `v**` of the points `(j, values[j])`, at every j."""
    vertices = lower_hull(np.arange(len(values)), values)
    return np.minimum(np.interp(np.arange(len(values)), vertices, values[vertices]), values)


def dual_by_envelope(
    budgets: Sequence[np.ndarray], values: Sequence[np.ndarray], budget: int | float, counts: Sequence[int]
) -> Dual:
    """sup(D) as the infimal convolution of the convex envelopes at K; one class: `v**(K)`.

    Args:
      budgets: one uniform grid `[m]` a class of branches.
      values: v on it, non-increasing.
      budget: K; inf drops the constraint (Remark 3).
      counts: branches in each class; they add up to I.

    Raises:
      ValueError: for grids or values that are malformed, or K below the least h.
    """
    problem = in_units(budgets, values, budget, counts)
    return dual_on_edges(problem, budget, problem.spacing)


def dual_on_edges(problem: Units, budget: float, unit: float) -> Dual:
    """sup(D) by walking down the hull edges of all classes, steepest first, where a unit costs `unit`."""
    total = problem.num_branches
    left = (budget - problem.floor) / unit
    value = sum(c * float(v[0]) for c, v in zip(problem.counts, problem.values, strict=True)) / total
    for edge in edges(problem):
        width = (edge.q - edge.p) * problem.counts[edge.which] / total
        if left <= width:
            return Dual(float(value + edge.slope * left), -edge.slope / problem.spacing)
        value, left = value + edge.slope * width, left - width
    return Dual(float(value), 0.0)


def multipliers(problem: Units, budget: float) -> list[float]:
    """Multipliers at which `Q(lam) - lam K` is largest on the grid; where K is a vertex, both ends and the middle.

    The values between the grid points, which `ValueFunction.lagrangian` sees too, make a difference among them.
    """
    total = problem.num_branches
    left, before = (budget - problem.floor) / problem.spacing, math.inf
    for edge in edges(problem):
        slope = -edge.slope / problem.spacing
        if left <= 1e-9:
            return [before, slope, 0.5 * (before + slope)] if before < math.inf else [slope]
        width = (edge.q - edge.p) * problem.counts[edge.which] / total
        if left < width - 1e-9:
            return [slope]
        left, before = left - width, slope
    return [0.0, *([before, 0.5 * before] if left <= 1e-9 and before < math.inf else [])]


def lagrangian(
    budgets: Sequence[np.ndarray], values: Sequence[np.ndarray], counts: Sequence[int], lam: float
) -> tuple[float, float]:
    """`Q(lam) = (1/I) sum_i min_b v_i(b) + lam b`, and a budget per branch that attains it (a supergradient)."""
    total, q, used = sum(counts), 0.0, 0.0
    for b, v, count in zip(budgets, values, counts, strict=True):
        costs = v + lam * b
        best = int(np.argmin(costs))
        q, used = q + count * float(costs[best]), used + count * float(b[best])
    return q / total, used / total
