"""Slow and exact ways to what `duality` computes: all allocations, cutting planes, rational numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from dualgap_jax.duality.envelope import Dual, lagrangian


def brute_force(values: list[np.ndarray], counts: list[int], units: int) -> float:
    """The least mean over all allocations of at most `units` units, one by one."""
    branches = [v for v, n in zip(values, counts, strict=True) for _ in range(n)]
    sums = [
        sum(v[j] for v, j in zip(branches, choice, strict=True))
        for choice in itertools.product(*(range(len(v)) for v in branches))
        if sum(choice) <= units
    ]
    return min(sums) / len(branches)


def exact_primal(costs: list[Fraction], values: list[Fraction], count: int, budget: Fraction) -> Fraction:
    """inf(P) for branches that choose among finitely many costs, all allocations one by one, in rational numbers."""
    choices = itertools.combinations_with_replacement(range(len(costs)), count)
    feasible = (c for c in choices if sum((costs[j] for j in c), Fraction(0)) <= count * budget)
    return min(sum((values[j] for j in c), Fraction(0)) for c in feasible) / count


def exact_dual(costs: list[Fraction], values: list[Fraction], budget: Fraction) -> Fraction:
    """sup(D) for the same: the lowest chord or point over the budget, all pairs one by one, in rational numbers."""
    found = [v for b, v in zip(costs, values, strict=True) if b <= budget]
    for (b, v), (c, u) in itertools.permutations(list(zip(costs, values, strict=True)), 2):
        if b <= budget < c:
            found.append(v + (u - v) * (budget - b) / (c - b))
    return min(found)


def dual_by_maximisation(
    budgets: Sequence[np.ndarray], values: Sequence[np.ndarray], budget: int | float, counts: Sequence[int]
) -> Dual:
    """sup(D) by maximising the concave piecewise linear `Q(lam) - lam K`, without the envelope.

    Kelley's cutting planes in one variable: the next multiplier is where the two lines at hand cross; each is a line of
    Q, so the method ends after finitely many steps at the maximum.
    """
    lam, (q, used) = 0.0, lagrangian(budgets, values, counts, 0.0)
    if used <= budget:
        return Dual(q, 0.0)  # also at K = inf
    # To the left of the maximum: lines with used > K.  On the right: lam so large that every branch takes its least h.
    left = (q - lam * used, used)
    steepest = max(float(np.max((v[0] - v[1:]) / (b[1:] - b[0]))) for b, v in zip(budgets, values, strict=True))
    lam = 2 * steepest
    q, used = lagrangian(budgets, values, counts, lam)
    right = (q - lam * used, used)
    if used > budget * (1 - 1e-15) and used >= budget:  # K is the least h itself
        return Dual(q - lam * budget, lam)
    while True:
        lam = (left[0] - right[0]) / (right[1] - left[1])
        q, used = lagrangian(budgets, values, counts, lam)
        model = left[0] + lam * left[1]
        if q >= model - 1e-14 * max(1.0, abs(model)) or used in (left[1], right[1]):
            return Dual(q - lam * budget, lam)
        line = (q - lam * used, used)
        if used > budget:
            left = line
        else:
            right = line
