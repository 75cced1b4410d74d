"""The problem of Theorem 1 on a grid of budgets, in whole units of the grid's spacing; its input, checked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from dualgap_jax.convexity import lower_hull
from dualgap_jax.duality.values import falling, number, uniform
from dualgap_jax.sizes import is_whole


class Units(NamedTuple):
    """Several classes of branches in whole units.

    Attributes:
      values: one array `[m]` a class.
      counts: branches in each class.
      units: how many units there are for all branches together.
      spacing: one unit, as a budget.
      origins: the first budget of each class.
    """

    values: tuple[np.ndarray, ...]
    counts: tuple[int, ...]
    units: int
    spacing: float
    origins: tuple[float, ...]

    @property
    def num_branches(self) -> int:
        """I."""
        return sum(self.counts)

    @property
    def floor(self) -> float:
        """The least mean budget."""
        return sum(c * o for c, o in zip(self.counts, self.origins, strict=True)) / self.num_branches


class Edge(NamedTuple):
    """An edge of the lower hull of class `which`, from index p to q; `slope` per unit, negative."""

    slope: float
    which: int
    p: int
    q: int


def edges(problem: Units) -> list[Edge]:
    """The falling hull edges of all classes, steepest first."""
    found = []
    for k, v in enumerate(problem.values):
        slope = -math.inf
        for p, q in itertools.pairwise(lower_hull(np.arange(len(v)), v).tolist()):
            # Slopes of nearly straight hulls may fall by rounding; the edges of a class must stay in their order.
            slope = max(slope, float(v[q] - v[p]) / (q - p))
            if v[q] < v[p]:
                found.append(Edge(slope, k, p, q))
    return sorted(found)


def as_counts(num_branches: Any) -> list[int]:
    """Branches in each class from one number or a sequence of them.

    Raises:
      ValueError: for anything but positive integers.
    """
    given = num_branches.tolist() if isinstance(num_branches, np.ndarray | np.generic) else num_branches
    counts = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for count in counts:
        if not is_whole(count) or count < 1:
            raise ValueError(f"num_branches={count!r} must be a positive integer.")
    if not counts:
        raise ValueError("num_branches is empty; give one positive integer a class of branches.")
    return [int(count) for count in counts]


def as_classes(budgets: Any, values: Any, num_branches: Any) -> tuple[list[np.ndarray], list[np.ndarray], list[int]]:
    """Grids, values and counts by class, from those of one class or from sequences of them.  Raises ValueError."""
    counts = as_counts(num_branches)
    one = len(counts) == 1 and (np.ndim(num_branches) == 0 or np.ndim(budgets) == 1)
    try:
        b, v = ([np.asarray(x, np.float64) for x in ([a] if one else a)] for a in (budgets, values))
    except (TypeError, ValueError):
        raise ValueError(
            "budgets and values must be arrays of numbers [m], or with one count a class a sequence of such arrays."
        ) from None
    return b, v, counts


def in_units(budgets: Sequence[np.ndarray], values: Sequence[np.ndarray], budget: Any, counts: Sequence[int]) -> Units:
    """Checks the input, and writes it in units of the spacing.

    The budget K is understood up to one part in 10^12, so that I K can be a whole number of units; from there on units
    are exact.  `verdicts`, which proves something, does not rest on this.

    Raises:
      ValueError: for grids or values that are malformed, K below the least h, or counts that are no positive integers.
    """
    if not len(budgets) == len(values) == len(counts) or not counts:
        raise ValueError(f"need as many grids, value arrays and counts: {len(budgets)}, {len(values)}, {len(counts)}.")
    as_counts(counts)
    spacings = [uniform(b, f"class {k}") for k, b in enumerate(budgets)]
    if max(spacings) - min(spacings) > 1e-9 * max(spacings):
        raise ValueError(f"all classes must share one spacing of budgets, got {spacings}; resample them.")
    for k, (b, v) in enumerate(zip(budgets, values, strict=True)):
        if v.shape != b.shape or not np.isfinite(v).all():
            raise ValueError(f"class {k}: values must be finite, one a budget; got {v.shape} for {b.shape}.")
        falling(v, b, f"class {k}")
    budget = number("budget K", budget, infinite=True)
    total = sum(counts)
    floor = sum(count * float(b[0]) for count, b in zip(counts, budgets, strict=True)) / total
    most = sum(count * (len(b) - 1) for count, b in zip(counts, budgets, strict=True))
    share = Fraction(min((budget - floor) / spacings[0], most / total))
    nearest = round(share * total)
    near = abs(share * total - nearest) <= Fraction(1, 10**12) * max(1, abs(nearest))
    units = nearest if near else math.floor(share * total)
    if units < 0:
        raise ValueError(f"budget K={budget:.6g} is below the least h of the branches, {floor:.6g}: no feasible point.")
    return Units(
        tuple(np.asarray(v, np.float64) for v in values),
        tuple(int(c) for c in counts),
        units,
        spacings[0],
        tuple(float(b[0]) for b in budgets),
    )


class Spread(NamedTuple):
    """How far grids of floats are from uniform: `origins`, and the ends of `(b_j - b_0) / j` over all points."""

    origins: tuple[Fraction, ...]
    least: Fraction
    largest: Fraction
    most: tuple[int, ...]  # the last index of each grid


def spread_of(budgets: Sequence[np.ndarray]) -> Spread:
    """The spread of some grids `[m]`, one a class."""
    exact = [[Fraction(x) for x in b.tolist()] for b in budgets]
    ratios = [(b[j] - b[0]) / j for b in exact for j in range(1, len(b))]
    return Spread(tuple(b[0] for b in exact), min(ratios), max(ratios), tuple(len(b) - 1 for b in exact))


def whole_units(spread: Spread, budget: float, counts: Sequence[int], slack: float) -> tuple[int, int]:
    """How many units can be given away for sure, and how many at most, on the grids as they are, in exact arithmetic.

    With s and S the ends of the spread, any allocation of at most `(I K - sum b_0) / S` units is feasible, and a
    feasible one uses at most `(I K - sum b_0) / s` of them.

    Args:
      spread: of the grids.
      budget: K; inf drops the constraint.
      counts: branches in each class.
      slack: the share by which the points behind a budget cost less than it, which makes room on the safe side.

    Raises:
      ValueError: for K below the least h of the branches.
    """
    most = sum(count * m for count, m in zip(counts, spread.most, strict=True))
    if budget == math.inf:
        return most, most
    start = sum((count * b for count, b in zip(counts, spread.origins, strict=True)), Fraction(0))
    whole = sum(counts) * Fraction(budget)
    # Where all budgets are >= 0, a share less of each is a share less of their sum.
    room = whole / (1 - Fraction(slack)) if min(spread.origins) >= 0 else whole
    sure, limit = math.floor((room - start) / spread.largest), math.floor((whole - start) / spread.least)
    if sure < 0 or limit < 0:
        floor = float(start / sum(counts))
        raise ValueError(f"budget K={budget:.6g} is below the least h of the branches, {floor:.6g}: no feasible point.")
    return min(most, sure), min(most, limit)
