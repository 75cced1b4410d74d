"""Proves the bounds of a verdict once more, in rational numbers, from numbers that can be kept in a file.

Nothing of the solver is used.  The premises are what a proof about the network has to give, and are taken as they are:
the values of v on the grid (`lower`, `upper`), whether v is concave, the values of g at the points of the combination,
the slope, and for a Q that is better than the grid's own the bound on `Q(multiplier)`.  Everything that is concluded
from them is computed again with `fractions.Fraction`, or with integers that were rounded to the safe side:

* inf(P) from above by the allocation: its cost is added up, and so are its values;
* sup(D) from below by weak duality at the multiplier;
* inf(P) from below by that, by concavity, by the relaxation to residues (a shortest path in integers: with the hull
  edge [p, q], its slope s and `r_j = v_j - v_p - s (j - p) >= 0`, the values of I branches that use `units - t` units
  add up to `I v_p + s (units - I p) - s t + sum r`, and the last two terms are at least the shortest path to the
  residue of `units - I p`), or by dynamic programming in integers;
* sup(D) from above by one chord of the upper values, or by inf(P);
* Delta from below by the combination: where it is, what it costs, what its points are worth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

_SLACK = Fraction(1, 2**48)  # by which the points behind `upper` may be cheaper than their budgets, see `values`
_DP_OPERATIONS = 600_000_000
_BITS = 60


class NotProvenError(ValueError):
    """A bound that does not follow from its certificate; the message names it."""


class Premises(NamedTuple):
    """What is proven about the network, once for all numbers of branches.

    Attributes:
      budgets, lower, upper: `[m]`, the grid and the bounds on v.
      concave: whether v is.
      slope: `g(0) - g(w) <= slope ||w||` over W, or None.
      radius, power: of W and h.
      points: `[k, p]`, `weights [k]`, `values [k]`: the combination, and upper bounds on g at its points.
      floor: a lower bound on h over W, where the first budget is none.
      middle: for W and h that are not those of a norm: the points lie in W, and their combination costs at most the
        budget of this index.
    """

    budgets: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    concave: bool
    slope: float | None
    radius: float
    power: float
    points: np.ndarray
    weights: np.ndarray
    values: np.ndarray
    floor: float | None = None
    middle: int | None = None


class Row(NamedTuple):
    """The certificate of one number of branches: what was printed, and what it follows from.

    Attributes:
      num_branches, budget: I and K.
      counts: index of the grid -> number of branches.
      multiplier, dual_value: lam, and a lower bound on Q(lam).
      bounds: the printed numbers, by their names in `Verdict`.
    """

    num_branches: int
    budget: float
    counts: Mapping[int, int]
    multiplier: float
    dual_value: float
    bounds: Mapping[str, float]


def _sum(terms: Any) -> Fraction:
    return sum(terms, Fraction(0))


class Checker:
    """Checks rows that share their premises.

    Raises:
      NotProvenError: for premises that are no grid with bounds, or a combination that lies outside W.
    """

    def __init__(self, premises: Premises) -> None:
        arrays = [np.asarray(a, np.float64) for a in premises[:3]]
        sound = all(a.ndim == 1 and len(a) == len(arrays[0]) >= 2 for a in arrays)
        if (
            not sound
            or not np.isfinite(np.concatenate([arrays[0], arrays[2]])).all()
            or not (np.diff(arrays[0]) > 0).all()
        ):
            raise NotProvenError("the premises are no increasing grid with finite bounds.")
        if not (arrays[1] <= arrays[2]).all():
            raise NotProvenError("a lower bound on v lies above the upper one, or is not a number.")
        self._of = premises
        self._b = [Fraction(x) for x in arrays[0].tolist()]
        self._upper = [Fraction(x) for x in arrays[2].tolist()]
        self._arrays = arrays
        self._bounded = bool(np.isfinite(arrays[1]).all())
        self._floor = self._b[0] if premises.floor is None else Fraction(premises.floor)
        if self._floor > self._b[0] or (premises.concave and self._floor < self._b[0]):
            raise NotProvenError("the bound on h lies above the first budget, or below it for a v that is concave.")
        self._low = [Fraction(x) for x in arrays[1].tolist()] if self._bounded else []
        # v is at least this above budget j up to the next one, and does not rise.
        below = [*self._low[1:], *self._low[-1:]]
        self._below = list(itertools.accumulate(below, min))
        self._paths: dict[tuple[int, int], tuple[np.ndarray, Fraction]] = {}
        self.delta = self._delta()

    # --- Delta --------------------------------------------------------------------------------------------------------

    def _delta(self) -> Fraction:
        """What the combination proves."""
        points, weights = (np.asarray(a, np.float64).tolist() for a in (self._of.points, self._of.weights))
        shares = [Fraction(a) for a in weights]
        if not self._bounded:
            raise NotProvenError("a lower bound on v is infinite, so that nothing follows about Delta.")
        if min(shares, default=Fraction(-1)) < 0 or _sum(shares) <= 0:
            raise NotProvenError("the combination has negative weights, or none.")
        shares = [a / _sum(shares) for a in shares]
        above = _sum(a * Fraction(v) for a, v in zip(shares, np.asarray(self._of.values).tolist(), strict=True))
        if self._of.middle is not None:
            return max(Fraction(0), self._low[self._of.middle] - above)
        exact = [[Fraction(x) for x in row] for row in points]
        for row in exact:
            if _sum(x * x for x in row) > Fraction(self._of.radius) ** 2:
                raise NotProvenError("a point of the combination lies outside W.")
        middle = _sum(_sum(a * row[k] for a, row in zip(shares, exact, strict=True)) ** 2 for k in range(len(exact[0])))
        index = next((j for j, b in enumerate(self._b) if self._reaches(b, middle)), None)
        if index is None:
            raise NotProvenError("the middle of the combination costs more than the largest budget.")
        found = self._low[index]
        if self._of.slope is not None:
            found = max(found, self._low[0] - Fraction(self._of.slope) * _root_above(middle))
        return max(Fraction(0), found - above)

    def _reaches(self, budget: Fraction, square: Fraction) -> bool:
        """Whether `square^(power / 2) <= budget`, where that can be decided; on the safe side else."""
        power = Fraction(self._of.power)
        if power.denominator <= 8 and power.numerator <= 64:
            return bool(budget >= 0 and square**power.numerator <= budget ** (2 * power.denominator))
        return float(square) ** (float(power) / 2) * (1 + 1e-12) <= float(budget)

    # --- bounds for one number of branches ----------------------------------------------------------------------------

    def _allocated(self, row: Row) -> Fraction:
        """The value of the allocation, which is feasible."""
        counts = {int(j): int(n) for j, n in row.counts.items()}
        inside = all(0 <= j < len(self._b) and n > 0 for j, n in counts.items())
        if not inside or sum(counts.values()) != row.num_branches:
            raise NotProvenError(f"the allocation is none of {row.num_branches:,} branches.")
        cost = _sum(n * self._b[j] for j, n in counts.items())
        slack = _SLACK if self._b[0] >= 0 else Fraction(0)
        if math.isfinite(row.budget) and cost * (1 - slack) > row.num_branches * Fraction(row.budget):
            raise NotProvenError(f"the allocation for I = {row.num_branches:,} costs more than the budget.")
        return _sum(n * self._upper[j] for j, n in counts.items()) / row.num_branches

    def _dual(self, row: Row) -> Fraction:
        """A lower bound on sup(D) by weak duality."""
        lam = Fraction(row.multiplier)
        if lam < 0 or (lam > 0 and not math.isfinite(row.budget)):
            raise NotProvenError(f"the multiplier {row.multiplier} is none.")
        found = [Fraction(row.dual_value)] if math.isfinite(row.dual_value) else []
        if self._bounded:
            least = min(v + lam * b for v, b in zip(self._below, self._b, strict=True))
            found.append(least - lam * (self._b[0] - self._floor))
            if self._of.concave:  # v + lam b is, and least at an end
                found.append(min(self._low[0] + lam * self._b[0], self._low[-1] + lam * self._b[-1]))
        if not found:
            raise NotProvenError("there is no bound on Q.")
        return max(found) - (lam * Fraction(row.budget) if lam > 0 else 0)

    def _units(self, row: Row) -> int:
        """More units of the least spacing than this no allocation can use, on the grid or between its points."""
        if not math.isfinite(row.budget):
            return row.num_branches * (len(self._b) - 1)
        least = min((b - self._b[0]) / j for j, b in enumerate(self._b) if j)
        left = row.num_branches * (Fraction(row.budget) - self._floor)
        return min(row.num_branches * (len(self._b) - 1), math.floor(left / least))

    def _by_concavity(self, row: Row) -> Fraction | None:
        if not self._of.concave or not self._bounded:
            return None
        count, first, last = row.num_branches, self._b[0], self._b[-1]
        budget = min(Fraction(row.budget), last) if math.isfinite(row.budget) else last
        full = math.floor(count * (budget - first) / (last - first))
        if full >= count:
            return self._low[-1]
        rest = first + count * (budget - first) - full * (last - first)
        one = next(v for v, b in zip(self._low, self._b, strict=True) if b >= rest)
        return (full * self._low[-1] + one + (count - full - 1) * self._low[0]) / count

    def _by_residues(self, row: Row) -> Fraction | None:
        if not self._bounded:
            return None
        units, count, v = self._units(row), row.num_branches, self._below
        p, q = _edge_at(v, Fraction(units, count))
        if p == q:
            return v[p]
        if (p, q) not in self._paths:
            self._paths[p, q] = _shortest(v, p, q)
        lengths, unit = self._paths[p, q]
        slope = (v[q] - v[p]) / (q - p)
        rest = units - count * p
        return (count * v[p] + slope * rest + int(lengths[rest % (q - p)]) * unit) / count

    def _by_tables(self, row: Row) -> Fraction | None:
        count, units = row.num_branches, self._units(row)
        if not self._bounded or count * len(self._b) * min(units, count * len(self._b)) > _DP_OPERATIONS:
            return None
        least = min(self._below)
        span = max(max(self._below) - least, Fraction(1, 2**1000))
        unit = span * count / 2**_BITS
        one = np.array([math.floor((x - least) / unit) for x in self._below], np.int64)
        table = one
        for _ in range(count - 1):
            longer = np.full(min(len(table) + len(one) - 1, units + 1), np.iinfo(np.int64).max)
            for j, value in enumerate(one.tolist()[: len(longer)]):
                part = table[: len(longer) - j]
                np.minimum(longer[j : j + len(part)], part + value, out=longer[j : j + len(part)])
            table = longer
        return least + int(table[: units + 1].min()) * unit / count

    def _dual_above(self, row: Row) -> Fraction | None:
        """A chord of the upper values over K."""
        budgets, upper = self._arrays[0], self._arrays[2]
        tilted = upper + row.multiplier * budgets
        left = np.flatnonzero(budgets <= row.budget)
        if not len(left):
            return None
        p = int(left[np.argmin(tilted[left])])
        right = np.flatnonzero(budgets >= row.budget)
        q = int(right[np.argmin(tilted[right])]) if len(right) else p
        if p == q:
            return self._upper[p]
        share = (self._b[q] - Fraction(row.budget)) / (self._b[q] - self._b[p])
        return share * self._upper[p] + (1 - share) * self._upper[q]

    def check(self, row: Row) -> dict[str, str]:
        """Proves every bound of a row.

        Returns:
          For each bound the name of the argument that proves it.

        Raises:
          NotProvenError: for the first one that does not follow.
        """
        said = {name: Fraction(value) for name, value in row.bounds.items() if math.isfinite(value)}
        missing = set(BOUNDS) - set(said)
        if missing:
            raise NotProvenError(f"these bounds are missing or not finite: {', '.join(sorted(missing))}.")
        by: dict[str, str] = {}

        def prove(name: str, holds: bool, argument: str) -> None:
            if not holds:
                raise NotProvenError(f"I = {row.num_branches:,}: {name} = {row.bounds[name]!r} does not follow.")
            by[name] = argument

        prove("primal_upper", said["primal_upper"] >= self._allocated(row), "allocation")
        dual = self._dual(row)
        prove("dual_lower", said["dual_lower"] <= dual, "weak duality")
        ways: dict[str, Callable[[Row], Fraction | None]] = {
            "weak duality": lambda _: dual,
            "concavity": self._by_concavity,
            "residues": self._by_residues,
            "dynamic program": self._by_tables,
        }
        found = ((name, way(row)) for name, way in ways.items())
        first = next((name for name, value in found if value is not None and said["primal_lower"] <= value), "")
        prove("primal_lower", bool(first), first)
        chord = self._dual_above(row)
        by_chord = chord is not None and said["dual_upper"] >= chord
        prove("dual_upper", by_chord or said["dual_upper"] >= said["primal_upper"], "chord" if by_chord else "inf(P)")
        prove("gap_upper", said["gap_upper"] >= said["primal_upper"] - said["dual_lower"], "difference")
        least = max(Fraction(0), said["primal_lower"] - said["dual_upper"])
        prove("gap_lower", said["gap_lower"] <= least, "difference")
        prove("delta_lower", said["delta_lower"] <= self.delta, "combination")
        prove("delta_upper", said["delta_upper"] >= self._upper[0] - self._low[-1], "ends of v")
        return by

    def verified(self, row: Row) -> bool:
        """Whether the row's own numbers prove `gap <= (2 / I) Delta`."""
        self.check(row)
        share = Fraction(2, row.num_branches) * Fraction(row.bounds["delta_lower"])
        return Fraction(row.bounds["gap_upper"]) <= share


def row_of(printed: Mapping[str, Any], counts: Mapping[int, int]) -> Row:
    """The certificate of a row from the fields of a `Verdict` and the branches at each index of the grid."""
    bounds = {name: float(printed[name]) for name in BOUNDS}
    return Row(
        int(printed["num_branches"]), float(printed["budget"]), counts, float(printed["multiplier"]),
        float(printed["dual_value"]), bounds,
    )  # fmt: skip


def check_record(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> int:
    """Proves the certified rows of `results/duality_gap.json` again from `results/duality_gap.npz`.

    Returns:
      How many rows are certified.

    Raises:
      NotProvenError: for the first bound that does not follow, or a row that calls itself verified and is not.
    """
    premises = Premises(
        arrays["budgets"], arrays["lower"], arrays["upper"], record["concave"], record["slope"], record["radius"],
        record["power"], arrays["delta_points"], arrays["delta_weights"], arrays["delta_values"],
    )  # fmt: skip
    certified = [row for row in record["rows"] if row["status"] == "certified"]
    checker = Checker(premises) if certified else None
    for printed in certified:
        counts = {int(np.searchsorted(arrays["budgets"], b)): n for b, n in printed["allocation"]}
        row = row_of(printed, counts)
        assert checker is not None
        if checker.verified(row) < (printed["verdict"] == "verified"):
            raise NotProvenError(f"I = {row.num_branches:,}: the bound of Theorem 1 does not follow.")
    return len(certified)


BOUNDS = (
    "primal_lower", "primal_upper", "dual_lower", "dual_upper", "gap_lower", "gap_upper", "delta_lower", "delta_upper",
)  # fmt: skip


def _root_above(square: Fraction) -> Fraction:
    """A rational number that is at least the square root."""
    near = Fraction(math.sqrt(square)) * (1 + Fraction(1, 2**50)) + Fraction(1, 2**1000)
    if near * near < square:
        raise NotProvenError("the root of a square cannot be bounded.")
    return near


def _edge_at(v: list[Fraction], at: Fraction) -> tuple[int, int]:
    """The edge of the lower hull of the points (j, v_j) over `at`; a point twice where v has its least value."""
    chain: list[int] = []
    for c in range(len(v)):
        while len(chain) > 1:
            a, b = chain[-2], chain[-1]
            if (b - a) * (v[c] - v[a]) > (c - a) * (v[b] - v[a]):
                break
            chain.pop()
        chain.append(c)
    for p, q in itertools.pairwise(chain):
        if v[q] >= v[p]:
            return p, p
        if at <= q:
            return p, q
    return chain[-1], chain[-1]


def _shortest(v: list[Fraction], p: int, q: int) -> tuple[np.ndarray, Fraction]:
    """Shortest paths over the residues modulo q - p, in whole multiples of a unit, each arc rounded down."""
    size, fall = q - p, v[p] - v[q]
    unit = fall / 2**_BITS
    arcs = np.full(size, 2**_BITS, np.int64)  # longer arcs never pay: all units may be left unused for that much
    arcs[1 % size] = 2**_BITS // size
    for j, value in enumerate(v):
        cost = math.floor((value - v[p] + fall * Fraction(j - p, size)) / unit)
        if cost < 0:
            raise NotProvenError("the edge is not one of the lower hull.")
        arcs[(j - p) % size] = min(int(arcs[(j - p) % size]), cost)
    lengths = np.full(size, 2**_BITS, np.int64)
    lengths[0] = 0
    done = np.zeros(size, bool)
    twice = np.concatenate([arcs, arcs])
    for _ in range(size):
        node = int(np.argmin(np.where(done, np.iinfo(np.int64).max, lengths)))
        done[node] = True
        np.minimum(lengths, lengths[node] + twice[size - node : 2 * size - node], out=lengths)
    return lengths, unit
