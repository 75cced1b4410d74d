"""Slow and exact ways to what `duality` computes: all allocations, cutting planes, rational numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from dualgap_jax.duality.closed_forms import Kappa
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


def homogeneous_gap(*, degree: int, power: int | float, budget_share: int | float, num_branches: int) -> float:
    """The duality gap over `kappa R^L`, which does not depend on the data: `(r - r^(L/q)) / I`, 0 for L <= q.

    Args:
      degree: L.
      power: q.
      budget_share: `K / R^q`; 1 or more leaves the constraint idle.
      num_branches: I.
    """
    if degree <= power or budget_share >= 1:
        return 0.0
    r = math.fmod(num_branches * budget_share, 1.0)
    return (r - r ** (degree / power)) / num_branches


def homogeneous_delta(kappa: Kappa, *, degree: int, radius: int | float) -> float:
    """A lower bound on Delta: `kappa R^L (a - a^L)` at `a = L^(-1/(L-1))`, from the weights 0 and a minimiser.

    Their combination `a w` has `f^ = v(h(a w)) = offset - kappa (a R)^L` and `f~ <= offset - a kappa R^L`, whatever the
    power in h.  0 for L = 1, where g is linear for a linear branch.
    """
    if degree == 1:
        return 0.0
    a = degree ** (-1 / (degree - 1))
    scale = radius**degree
    return max(
        0.0, kappa.lower * scale * a - kappa.upper * scale * a**degree - 16 * np.finfo(float).eps * kappa.upper * scale
    )
