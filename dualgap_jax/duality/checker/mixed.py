"""Proves the bounds of a verdict on branches of several kinds once more, in rational numbers.

As `checker.gap`, whose premises and conclusions about one kind are used for each of them.  inf(P) is bounded from below
by weak duality, or by dynamic programming in integers where its tables are small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from dualgap_jax.duality.checker.gap import BOUNDS, Checker, NotProvenError, Premises

_SLACK = Fraction(1, 2**48)
_DP_OPERATIONS = 100_000_000
_BITS = 60


class Kind(Checker):
    """The proven numbers of one kind of branch."""

    def __init__(self, premises: Premises) -> None:
        super().__init__(premises)
        self.budgets, self.upper, self.below = self._b, self._upper, self._below
        self.ends = self._upper[0], self._low[-1]


def check_mixed(
    kinds: Sequence[Kind],
    counts: Sequence[Mapping[int, int]],
    budget: float,
    multiplier: float,
    duals: Sequence[float],
    bounds: Mapping[str, Any],
) -> dict[str, str]:
    """Proves every bound of a row on branches of several kinds.

    Args:
      kinds: their premises.
      counts: for each kind index of the grid -> number of branches.
      budget: K.
      multiplier: lam.
      duals: for each kind a proven bound on `min g + lam h`; minus infinity where there is none but the grid's.
      bounds: the printed numbers, by their names in `Verdict`.

    Returns:
      For each bound the name of the argument that proves it.

    Raises:
      NotProvenError: for the first one that does not follow; its message begins with the bound's name.
    """
    said = {name: Fraction(bounds[name]) for name in BOUNDS if math.isfinite(bounds[name])}
    missing = set(BOUNDS) - set(said)
    if missing:
        raise NotProvenError(f"{min(missing)} is not finite.")
    numbers = [sum(c.values()) for c in counts]
    total, lam = sum(numbers), Fraction(multiplier)
    if not math.isfinite(budget) or lam < 0 or any(n < 1 for c in counts for n in c.values()):
        raise NotProvenError("the row has an infinite budget, a negative multiplier, or no branches of a kind.")
    limit = total * Fraction(budget)
    spent = sum((n * k.budgets[j] for k, c in zip(kinds, counts, strict=True) for j, n in c.items()), Fraction(0))
    if spent * (1 - _SLACK) > limit:
        raise NotProvenError("primal_upper: the allocation costs more than the budget.")
    by: dict[str, str] = {}

    def prove(name: str, holds: bool, argument: str) -> None:
        if not holds:
            raise NotProvenError(f"{name} = {bounds[name]!r} does not follow for I = {total:,}.")
        by[name] = argument

    value = sum((n * k.upper[j] for k, c in zip(kinds, counts, strict=True) for j, n in c.items()), Fraction(0))
    prove("primal_upper", said["primal_upper"] >= value / total, "allocation")
    least = []
    for kind, given in zip(kinds, duals, strict=True):
        grid = min(v + lam * b for v, b in zip(kind.below, kind.budgets, strict=True))
        least.append(max(grid, Fraction(given)) if math.isfinite(given) else grid)
    dual = sum((n * q for n, q in zip(numbers, least, strict=True)), Fraction(0)) / total - lam * Fraction(budget)
    prove("dual_lower", said["dual_lower"] <= dual, "weak duality")
    if said["primal_lower"] <= dual:
        prove("primal_lower", True, "weak duality")
    else:
        table = _by_tables(kinds, numbers, limit)
        prove("primal_lower", table is not None and said["primal_lower"] <= table, "dynamic program")
    chord = _chord(kinds, numbers, limit)
    by_chord = chord is not None and said["dual_upper"] >= chord
    prove("dual_upper", by_chord or said["dual_upper"] >= said["primal_upper"], "chord" if by_chord else "inf(P)")
    prove("gap_upper", said["gap_upper"] >= said["primal_upper"] - said["dual_lower"], "difference")
    gap = max(Fraction(0), said["primal_lower"] - said["dual_upper"])
    prove("gap_lower", said["gap_lower"] <= gap, "difference")
    prove("delta_lower", said["delta_lower"] <= max(kind.delta for kind in kinds), "combination")
    prove("delta_upper", said["delta_upper"] >= max(kind.ends[0] - kind.ends[1] for kind in kinds), "ends of v")
    return by


def _chord(kinds: Sequence[Kind], numbers: Sequence[int], limit: Fraction) -> Fraction | None:
    """The value of a mixture that meets the budget, which sup(D) does not exceed; None if all cost more.

    Of the mixtures of two choices, one for each of two multipliers that close in on the best one.
    """
    arrays = [(np.array([float(b) for b in k.budgets]), np.array([float(u) for u in k.upper])) for k in kinds]

    def chosen(lam: float) -> tuple[Fraction, Fraction]:
        """The cost and the value, summed over branches, where `u + lam b` is least."""
        index = [int(np.argmin(u + lam * b)) for b, u in arrays]
        cost = sum((n * k.budgets[j] for n, k, j in zip(numbers, kinds, index, strict=True)), Fraction(0))
        return cost, sum((n * k.upper[j] for n, k, j in zip(numbers, kinds, index, strict=True)), Fraction(0))

    low, high = 0.0, 2 * max(float(np.max((u[0] - u[1:]) / (b[1:] - b[0]))) for b, u in arrays)
    dear, cheap = chosen(low), chosen(high)
    if cheap[0] > limit:
        return None
    for _ in range(200):
        if dear[0] <= limit:
            return dear[1] / sum(numbers)
        middle = 0.5 * (low + high)
        now = chosen(middle)
        low, dear, high, cheap = (middle, now, high, cheap) if now[0] > limit else (low, dear, middle, now)
    share = (limit - cheap[0]) / (dear[0] - cheap[0])
    return ((1 - share) * cheap[1] + share * dear[1]) / sum(numbers)


def _by_tables(kinds: Sequence[Kind], numbers: Sequence[int], limit: Fraction) -> Fraction | None:
    """A lower bound on inf(P) by dynamic programming over units of the least spacing, in integers rounded down."""
    spacing = min((b - k.budgets[0]) / j for k in kinds for j, b in enumerate(k.budgets) if j)
    start = sum((n * k.budgets[0] for k, n in zip(kinds, numbers, strict=True)), Fraction(0))
    most = sum(n * (len(k.budgets) - 1) for k, n in zip(kinds, numbers, strict=True))
    units, total = min(most, math.floor((limit - start) / spacing)), sum(numbers)
    if units < 0 or total * max(len(k.budgets) for k in kinds) * (units + 1) > _DP_OPERATIONS:
        return None
    floor = min(min(k.below) for k in kinds)
    span = max(max(k.below) for k in kinds) - floor
    unit = max(span, Fraction(1, 2**1000)) * total / 2**_BITS
    table = np.zeros(1, np.int64)
    for kind in itertools.chain.from_iterable([k] * n for k, n in zip(kinds, numbers, strict=True)):
        one = [math.floor((v - floor) / unit) for v in kind.below]
        longer = np.full(min(len(table) + len(one) - 1, units + 1), np.iinfo(np.int64).max)
        for j, value in enumerate(one[: len(longer)]):
            part = table[: len(longer) - j]
            np.minimum(longer[j : j + len(part)], part + value, out=longer[j : j + len(part)])
        table = longer
    return floor + int(table.min()) * unit / total
