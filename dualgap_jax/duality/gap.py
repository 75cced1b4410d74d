"""Theorem 1 from value functions: inf(P), sup(D), an optimal allocation of the budget, and the verdict on the bound
2/I.

Under Assumption 1 problem (2) separates into one-branch problems.  With `v_i(b) = inf {g_i(w) : w in W_i, h_i(w) <= b}`

    inf(P) = (1/I) min { sum_i v_i(b_i) : sum_i b_i <= I K }      sup(D) = max_{lam >= 0}  Q(lam) - lam K
    Q(lam) = (1/I) sum_i min_b { v_i(b) + lam b }

so numbers v on a grid of budgets decide everything here; no network is evaluated.  Budgets are counted in units of the
grid's spacing, and what follows is exact in whole numbers.

**Exact on the grid, for any I.**  `allocate` writes sum b_i <= I K with the dual optimum at hand: each branch sits at a
vertex of its lower convex hull that is optimal for lam, except for the branches of one class, which share the hull edge
[p, q] of D = q - p units.  Relative to the line of slope -lam every other choice j has a reduced cost r_j >= 0, and an
unused unit costs lam.  Whatever is chosen besides p and q must use a number of units that is right modulo D; the
cheapest such choice is a shortest path over the D residues (Gomory's group relaxation of this knapsack), with at most
D - 1 exceptional branches, since among D of them some have shifts that add up to a multiple of D and can be replaced by
copies of p and q at no cost.  This is the Shapley-Folkman structure with its one-dimensional integrality made exact.
The path's cost is a lower bound on inf(P) for every I; where the counts of p and q that it leaves are not negative,
which holds for all large I, it is inf(P).  Otherwise (small I) a (min,+) dynamic program decides, or, where its table
does not fit, the result is a two-sided bound.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float64, Int

Values = Float64[np.ndarray, " m"]
Status = Literal["certified", "estimated"]

# Largest number of additions for which the dynamic program is run, and entries of the largest table.
DP_OPERATIONS = 500_000_000
DP_ENTRIES = 20_000_000
# Rounding: a float64 sum here has few terms of size max |v|, each good to an ulp; proven bounds are moved outward.
_ROUNDING = 64 * float(np.finfo(np.float64).eps)


class ValueFunction(NamedTuple):
    """Two-sided values of a branch's v on a uniform grid of budgets.

    Attributes:
      budgets: `[m]`, uniform and increasing; the first is the least h over W, the last the largest, so that v is
        infinite below and constant above.
      lower: `[m]`, `lower[j] <= v(budgets[j])`; proven when the status is 'certified', else equal to `upper`.
      upper: `[m]`, `upper[j] >= v(budgets[j])`, non-increasing: values at feasible points, whatever the status.
      status: whether `lower` is proven.
      method: how it was found.
      minimisers: `[m, p]`, row j feasible for `budgets[j]` with value at most `upper[j]`; None where none are kept.
      lagrangian: `lam -> ` a lower bound on `min_w g(w) + lam h(w)`, proven when the status is 'certified'; or None.
        Without it the bound follows from `lower`, with a loss of one grid step (see `step_below`).
      slope: `g(0) - g(w) <= slope ||w||` on W, proven like `lower`; or None.  Bounds v near the budget 0, between the
        grid points.
      concave: whether v is known to be concave, which makes a lower bound on inf(P) sharp.
    """

    budgets: Values
    lower: Values
    upper: Values
    status: Status
    method: str
    minimisers: Float64[np.ndarray, "m p"] | None = None
    lagrangian: Callable[[float], float] | None = None
    slope: float | None = None
    concave: bool = False

    @property
    def tolerance(self) -> float:
        """The largest distance of the two bounds."""
        return float(np.max(self.upper - self.lower))

    def step_below(self) -> Values:
        """`[m]` numbers u with `v(b) >= u[j]` for every b above `budgets[j]` up to `budgets[j + 1]`, by monotony."""
        return np.append(self.lower[1:], self.lower[-1])


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


class Allocation(NamedTuple):
    """How many branches of each class get which budget.

    Attributes:
      value: `(1/I) sum_i v_i(b_i)`, attained by this allocation: an upper bound on inf(P).
      lower: a lower bound on inf(P) of the problem on the grid; equal to `value` when `exact`.
      exact: whether `value` is the optimum over all allocations on the grid.
      method: 'group', 'dynamic program', 'squaring' or 'vertices'.
      counts: one dict a class: index into the class's grid -> number of branches.
    """

    value: float
    lower: float
    exact: bool
    method: str
    counts: tuple[dict[int, int], ...]


class Dual(NamedTuple):
    """`sup(D)` of value functions given on a grid, and a multiplier that attains it."""

    value: float
    multiplier: float


class Gap(NamedTuple):
    """`primal = inf(P)`, `dual = sup(D)`, `gap` their difference, the multiplier, and a feasible optimal allocation."""

    primal: float
    dual: float
    gap: float
    multiplier: float
    allocation: Allocation


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
      status: 'certified' if every bound is proven, 'estimated' if one rests on a search.
      verified: whether `gap_upper <= (2 / I) delta_lower`: with status 'certified' a proof for this instance.
      refuted: whether `gap_lower > (2 / I) delta_upper`, which for proven bounds would contradict the theorem.
      exact_on_grid: whether the allocation is optimal on the grid.
      multiplier: the dual one.
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
    status: Status
    verified: bool
    refuted: bool
    exact_on_grid: bool
    multiplier: float


# --- the convex envelope and the dual ---------------------------------------------------------------------------------


def hull(values: Values) -> Int[np.ndarray, " k"]:
    """Indices of the vertices of the lower convex hull of the points `(j, values[j])`, by a monotone chain.

    Points on an edge are left out.  O(m).
    """
    chain: list[int] = []
    z = values.tolist()
    for c in range(len(z)):
        while len(chain) >= 2:
            a, b = chain[-2], chain[-1]
            if (b - a) * (z[c] - z[a]) > (c - a) * (z[b] - z[a]):
                break
            chain.pop()
        chain.append(c)
    return np.array(chain, dtype=np.int64)


def envelope(values: Values) -> Values:
    """The lower convex envelope `v**` of the points `(j, values[j])`, at every j."""
    vertices = hull(values)
    return np.minimum(np.interp(np.arange(len(values)), vertices, values[vertices]), values)


class _Problem(NamedTuple):
    """Several classes of branches in whole units: values and counts by class, the units there are, the grid."""

    values: tuple[np.ndarray, ...]
    counts: tuple[int, ...]
    units: int
    spacing: float
    origins: tuple[float, ...]  # first budget of each class

    @property
    def num_branches(self) -> int:
        return sum(self.counts)


def _uniform(budgets: np.ndarray, name: str) -> float:
    """The spacing of a grid.  Raises ValueError unless it is uniform and increasing."""
    steps = np.diff(budgets)
    if budgets.ndim != 1 or len(budgets) < 2 or not np.isfinite(budgets).all() or not (steps > 0).all():
        raise ValueError(
            f"{name}: budgets must be a finite increasing grid [m] with m >= 2, got shape {budgets.shape}."
        )
    step = float(budgets[-1] - budgets[0]) / (len(budgets) - 1)
    if np.abs(steps - step).max() > 1e-9 * float(np.abs(budgets).max()):
        raise ValueError(f"{name}: budgets must be uniform; steps run from {steps.min():.6g} to {steps.max():.6g}.")
    return step


def _problem(
    budgets: Sequence[np.ndarray], values: Sequence[np.ndarray], budget: int | float, counts: Sequence[int]
) -> _Problem:
    """Checks the input, and writes it in units of the spacing."""
    if not len(budgets) == len(values) == len(counts) or not counts:
        raise ValueError(f"need as many grids, value arrays and counts: {len(budgets)}, {len(values)}, {len(counts)}.")
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1:
            raise ValueError(f"num_branches={count!r} must be a positive integer.")
    spacings = [_uniform(b, f"class {k}") for k, b in enumerate(budgets)]
    if max(spacings) - min(spacings) > 1e-9 * max(spacings):
        raise ValueError(f"all classes must share one spacing of budgets, got {spacings}; resample them.")
    for k, (b, v) in enumerate(zip(budgets, values, strict=True)):
        if v.shape != b.shape or not np.isfinite(v).all():
            raise ValueError(f"class {k}: values must be finite, one a budget; got {v.shape} for {b.shape}.")
        if (np.diff(v) > 0).any():
            where = int(np.argmax(np.diff(v)))
            raise ValueError(
                f"class {k}: values rise from budget {b[where]:.6g} to {b[where + 1]:.6g}; a value function does not:"
                " give np.minimum.accumulate(values)."
            )
    if not math.isfinite(budget) and budget != math.inf:
        raise ValueError(f"budget K={budget!r} must be a number, or inf for no constraint.")
    total = sum(counts)
    floor = sum(count * float(b[0]) for count, b in zip(counts, budgets, strict=True)) / total
    most = sum(count * (len(b) - 1) for count, b in zip(counts, budgets, strict=True))
    # The budget K is understood up to one part in 10^12, so that I K can be a whole number of units; from there on
    # units are exact.
    share = Fraction(min((budget - floor) / spacings[0], most / total))
    nearest = round(share * total)
    near = abs(share * total - nearest) <= Fraction(1, 10**12) * max(1, abs(nearest))
    units = nearest if near else math.floor(share * total)
    if units < 0:
        raise ValueError(f"budget K={budget:.6g} is below the least h of the branches, {floor:.6g}: no feasible point.")
    return _Problem(
        tuple(np.asarray(v, np.float64) for v in values),
        tuple(int(c) for c in counts),
        units,
        spacings[0],
        tuple(float(b[0]) for b in budgets),
    )


class _Edge(NamedTuple):
    """An edge of the hull of a class, from index p to q; slope per unit, negative."""

    slope: float
    which: int
    p: int
    q: int


def _edges(problem: _Problem) -> list[_Edge]:
    """The falling hull edges of all classes, steepest first."""
    edges = []
    for k, v in enumerate(problem.values):
        slope = -math.inf
        for p, q in itertools.pairwise(hull(v).tolist()):
            # Slopes of nearly straight hulls may fall by rounding; the edges of a class must stay in their order.
            slope = max(slope, float(v[q] - v[p]) / (q - p))
            if v[q] < v[p]:
                edges.append(_Edge(slope, k, p, q))
    return sorted(edges)


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
    problem = _problem(budgets, values, budget, counts)
    total = problem.num_branches
    floor = sum(c * o for c, o in zip(problem.counts, problem.origins, strict=True)) / total
    left = (budget - floor) / problem.spacing
    value = sum(c * float(v[0]) for c, v in zip(problem.counts, problem.values, strict=True)) / total
    for edge in _edges(problem):
        width = (edge.q - edge.p) * problem.counts[edge.which] / total
        if left <= width:
            return Dual(float(value + edge.slope * left), -edge.slope / problem.spacing)
        value, left = value + edge.slope * width, left - width
    return Dual(float(value), 0.0)


def _multipliers(problem: _Problem, budget: float) -> list[float]:
    """Multipliers at which `Q(lam) - lam K` is largest on the grid; where K is a vertex, both ends and the middle.

    The values between the grid points, which `ValueFunction.lagrangian` sees too, make a difference among them.
    """
    total = problem.num_branches
    floor = sum(c * o for c, o in zip(problem.counts, problem.origins, strict=True)) / total
    left, before = (budget - floor) / problem.spacing, math.inf
    for edge in _edges(problem):
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


def dual_by_maximisation(
    budgets: Sequence[np.ndarray], values: Sequence[np.ndarray], budget: int | float, counts: Sequence[int]
) -> Dual:
    """sup(D) by maximising the concave piecewise linear `Q(lam) - lam K`, without the envelope.

    Kelley's cutting planes in one variable: the next multiplier is where the two lines at hand cross; each is a line of
    Q, so the method ends after finitely many steps at the maximum.

    Raises:
      ValueError: as `dual_by_envelope`.
    """
    _problem(budgets, values, budget, counts)
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


# --- the primal -------------------------------------------------------------------------------------------------------


def _objective(problem: _Problem, counts: Sequence[dict[int, int]]) -> float:
    parts = [n * float(v[j]) for v, c in zip(problem.values, counts, strict=True) for j, n in c.items()]
    return math.fsum(parts) / problem.num_branches


def _used(counts: Sequence[dict[int, int]]) -> int:
    return sum(n * j for c in counts for j, n in c.items())


class _Start(NamedTuple):
    """The dual optimum in units: the vertex of each class, the shared edge or None, units left, copies of q."""

    base: tuple[int, ...]
    edge: _Edge | None
    left: int


def _start(problem: _Problem) -> _Start:
    base, left = [0] * len(problem.values), problem.units
    for edge in _edges(problem):
        whole = (edge.q - edge.p) * problem.counts[edge.which]
        if left < whole:
            return _Start(tuple(base), edge, left)
        base[edge.which], left = edge.q, left - whole
    return _Start(tuple(base), None, left)


class _Path(NamedTuple):
    """Shortest paths from residue 0: their costs `[D]`, and the last arc into each residue."""

    cost: np.ndarray
    arc: np.ndarray  # residue of the arc, -1 at the origin
    arc_cost: np.ndarray  # of the cheapest arc of each residue
    which: np.ndarray  # class of that arc, -1 for an unused unit
    choice: np.ndarray  # and the index that it takes in the class's grid


def _shortest_paths(values: Sequence[np.ndarray], base: Sequence[int], edge: _Edge) -> _Path:
    """Dijkstra on the circulant graph of the residues modulo D; arcs are exceptional branches and an unused unit."""
    size = edge.q - edge.p
    cheapest = np.full(size, np.inf)
    which = np.full(size, -2)
    choice = np.full(size, -1)
    cheapest[1 % size], which[1 % size] = -edge.slope, -1
    for k, (v, p) in enumerate(zip(values, base, strict=True)):
        shift = np.arange(len(v)) - p
        reduced = np.maximum(v - v[p] - edge.slope * shift, 0.0)
        order = np.lexsort((np.abs(shift), reduced))[::-1]  # the cheapest is written last; of equals the nearest
        order = order[reduced[order] < cheapest[shift[order] % size]]
        residue = shift[order] % size
        cheapest[residue], which[residue], choice[residue] = reduced[order], k, order
    twice = np.concatenate([cheapest, cheapest])
    cost, arc = np.full(size, np.inf), np.full(size, -1)
    open_cost = np.full(size, np.inf)
    cost[0] = open_cost[0] = 0.0
    for _ in range(size):
        node = int(np.argmin(open_cost))
        if not np.isfinite(open_cost[node]):
            break
        open_cost[node] = np.inf
        through = cost[node] + twice[size - node : 2 * size - node]
        better = through < cost
        cost[better], open_cost[better] = through[better], through[better]
        arc[better] = (np.flatnonzero(better) - node) % size
    return _Path(cost, arc, cheapest, which, choice)


def _by_group(problem: _Problem, start: _Start, edge: _Edge, path: _Path) -> tuple[float, list[Counter[int]] | None]:
    """The group relaxation's bound, and its allocation if the counts are feasible."""
    size, v = edge.q - edge.p, problem.values
    base = math.fsum(n * float(v[k][p]) for k, (n, p) in enumerate(zip(problem.counts, start.base, strict=True)))
    bound = base + edge.slope * start.left + float(path.cost[start.left % size])
    exceptions: list[Counter[int]] = [Counter() for _ in v]
    node, shift = start.left % size, 0
    while node:
        arc = int(path.arc[node])
        which = int(path.which[arc])
        if which < 0:
            shift += 1
        else:
            j = int(path.choice[arc])
            exceptions[which][j] += 1
            shift += j - start.base[which]
        node = (node - arc) % size
    full = (start.left - shift) // size
    counts = []
    for k, (n, p) in enumerate(zip(problem.counts, start.base, strict=True)):
        chosen = Counter(exceptions[k])
        if k == edge.which:
            chosen[edge.q] += full
        rest = n - sum(chosen.values())
        if full < 0 or rest < 0:
            return bound / problem.num_branches, None
        chosen[p] += rest
        counts.append(+chosen)
    return bound / problem.num_branches, counts


def _by_vertices(problem: _Problem, start: _Start, edge: _Edge) -> list[Counter[int]]:
    """Feasible points near the dual optimum, the best of two families; the other classes stay at their vertices.

    All branches of the shared class at p or q but for one, whose budget is chosen from the whole grid; or some at p and
    the others with equal shares of the rest, up to one unit.
    """
    size, n, p, q = edge.q - edge.p, problem.counts[edge.which], edge.p, edge.q
    v = problem.values[edge.which]
    j = np.arange(len(v))
    full = np.clip((start.left - (j - p)) // size, -1, n - 1)
    cost = np.where(full >= 0, v[j] + full * v[q] + (n - 1 - full) * v[p], np.inf)
    best = int(np.argmin(cost))
    chosen = Counter({p: n - 1 - int(full[best])}) + Counter({q: int(full[best])}) + Counter({best: 1})
    others = np.arange(1, n + 1)
    share, more = np.divmod(start.left + others * p, others)
    share, more = np.where(share >= len(v) - 1, len(v) - 1, share), np.where(share >= len(v) - 1, 0, more)
    spread = (n - others) * v[p] + (others - more) * v[share] + more * v[np.minimum(share + 1, len(v) - 1)]
    k = int(np.argmin(spread))
    if spread[k] < cost[best]:
        number, low, high = int(others[k]), int(share[k]), int(more[k])
        chosen = Counter({p: n - number}) + Counter({low: number - high}) + Counter({low + 1: high})
    counts = [Counter({b: m}) for b, m in zip(start.base, problem.counts, strict=True)]
    counts[edge.which] = chosen
    return counts


def min_plus(a: np.ndarray, b: np.ndarray, size: int | None = None) -> np.ndarray:
    """`c[t] = min_s a[s] + b[t - s]`, the (min,+) convolution of two arrays, cut after `size` entries.

    `len(a) * len(b)` additions, done in rows of the longer array.
    """
    if len(a) < len(b):
        a, b = b, a
    length = len(a) + len(b) - 1 if size is None else min(size, len(a) + len(b) - 1)
    result = np.full(length, np.inf)
    buffer = np.empty(len(a))
    for s, value in enumerate(b.tolist()[:length]):
        n = min(len(a), length - s)
        np.add(a[:n], value, out=buffer[:n])
        np.minimum(result[s : s + n], buffer[:n], out=result[s : s + n])
    return result


def _halves(count: int) -> tuple[int, int]:
    """How a table for `count` branches is made of two."""
    return (count // 2, count // 2) if count % 2 == 0 else (count - 1, 1)


def _table_cost(length: int, count: int, limit: int) -> int:
    """Additions that the tables for `count` branches of `length` entries need, each cut after `limit` entries."""
    if count == 1:
        return 0
    a, b = _halves(count)
    sizes = [min(part * (length - 1) + 1, limit) for part in (a, b)]
    return sizes[0] * sizes[1] + _table_cost(length, a, limit)


class _Tables:
    """The dynamic program's tables of one class: entry t for n branches is their best value with t units."""

    def __init__(self, values: np.ndarray, limit: int) -> None:
        self._limit = limit
        self._tables = {1: values[:limit]}

    def table(self, count: int) -> np.ndarray:
        if count not in self._tables:
            a, b = _halves(count)
            self._tables[count] = min_plus(self.table(a), self.table(b), self._limit)
        return self._tables[count]

    def allocation(self, count: int, units: int) -> Counter[int]:
        """The budgets behind entry `units` of the table for `count` branches."""
        todo: dict[int, Counter[int]] = {count: Counter({units: 1})}
        while max(todo) > 1:
            n = max(todo)
            a, b = _halves(n)
            for t, times in todo.pop(n).items():
                s = _split(self.table(a), self.table(b), t)
                todo.setdefault(a, Counter())[s] += times
                todo.setdefault(b, Counter())[t - s] += times
        return todo[1]


def _split(a: np.ndarray, b: np.ndarray, t: int) -> int:
    """The s with the least `a[s] + b[t - s]`."""
    first = max(0, t - len(b) + 1)
    last = min(t, len(a) - 1)
    return first + int(np.argmin(a[first : last + 1] + b[t - last : t - first + 1][::-1]))


def _dp_fits(problem: _Problem) -> bool:
    limit = problem.units + 1
    operations, length = 0, 1
    for v, n in zip(problem.values, problem.counts, strict=True):
        own = min(n * (len(v) - 1) + 1, limit)
        operations += _table_cost(len(v), n, limit) + length * own
        length = min(length + own - 1, limit)
    return operations <= DP_OPERATIONS and length <= DP_ENTRIES


def _by_dynamic_program(problem: _Problem) -> list[Counter[int]]:
    limit = problem.units + 1
    tables = [_Tables(v, limit) for v in problem.values]
    merged = [tables[0].table(problem.counts[0])]
    for one, n in zip(tables[1:], problem.counts[1:], strict=True):
        merged.append(min_plus(merged[-1], one.table(n), limit))
    left, counts = min(problem.units, len(merged[-1]) - 1), []
    for k in range(len(tables) - 1, 0, -1):
        s = _split(merged[k - 1], tables[k].table(problem.counts[k]), left)
        counts.append(tables[k].allocation(problem.counts[k], left - s))
        left = s
    counts.append(tables[0].allocation(problem.counts[0], left))
    return counts[::-1]


class _Coarse:
    """Upper bounds on the best value of `count` branches at budgets of 0, mesh, 2 mesh, ... units."""

    def __init__(self, count: int, mesh: int, table: np.ndarray, parents: tuple[_Coarse, _Coarse] | None) -> None:
        self.count, self.mesh, self.table, self.parents = count, mesh, table, parents


def _coarser(table: np.ndarray, factor: int) -> np.ndarray:
    """Every `factor`-th entry; the budget in between is left unused, so the entries stay attainable.

    The last entry stands for all larger budgets.
    """
    kept = table[::factor]
    return kept if (len(table) - 1) % factor == 0 else np.append(kept, table[-1])


def _joined(a: _Coarse, b: _Coarse, size: int, units: int) -> _Coarse:
    mesh = max(a.mesh, b.mesh)
    one, two = (_coarser(x.table, mesh // x.mesh) for x in (a, b))
    table = min_plus(one, two, units // mesh + 1)
    factor = 1
    while (len(table) - 1) / factor > size:
        factor *= 2
    return _Coarse(a.count + b.count, mesh * factor, _coarser(table, factor), (a, b))


def _by_squaring(problem: _Problem, size: int) -> list[Counter[int]]:
    """Repeated squaring with tables of at most `size + 1` entries; budgets are rounded to the safe side."""
    total: _Coarse | None = None
    leaves: dict[int, int] = {}
    for k, (v, n) in enumerate(zip(problem.values, problem.counts, strict=True)):
        power = _Coarse(1, 1, v[: problem.units + 1], None)
        leaves[id(power)] = k
        while n:
            if n & 1:
                total = power if total is None else _joined(total, power, size, problem.units)
            n >>= 1
            if n:
                power = _joined(power, power, size, problem.units)
    assert total is not None  # counts are positive
    counts: list[Counter[int]] = [Counter() for _ in problem.values]
    # The graph of tables is shared, so the demands on each are gathered before it is opened: largest count first.
    demands: dict[int, tuple[_Coarse, Counter[int]]] = {
        id(total): (total, Counter({min(problem.units // total.mesh, len(total.table) - 1): 1}))
    }
    while demands:
        key = max(demands, key=lambda k: demands[k][0].count)
        node, wanted = demands.pop(key)
        if node.parents is None:
            counts[leaves[key]] += wanted
            continue
        a, b = node.parents
        mesh = max(a.mesh, b.mesh)
        tables = [_coarser(x.table, mesh // x.mesh) for x in (a, b)]
        for t, times in wanted.items():
            # In the joined table before it was made coarser.
            fine = min(t * (node.mesh // mesh), len(tables[0]) + len(tables[1]) - 2, problem.units // mesh)
            s = _split(tables[0], tables[1], fine)
            for x, position in ((a, s), (b, fine - s)):
                own = min(position * (mesh // x.mesh), len(x.table) - 1)
                demands.setdefault(id(x), (x, Counter()))[1][own] += times
    return counts


def _solve(problem: _Problem, method: str, paths: dict[Any, _Path] | None = None, size: int = 4096) -> Allocation:
    start = _start(problem)
    if start.edge is None:  # every branch can have its least value
        counts = [Counter({p: n}) for p, n in zip(start.base, problem.counts, strict=True)]
        value = _objective(problem, counts)
        return Allocation(value, value, True, "vertices", tuple(dict(c) for c in counts))
    edge, found, lower = start.edge, None, -math.inf
    if method in ("auto", "group"):
        key = (start.base, edge)
        path = paths.get(key) if paths is not None else None
        if path is None:
            path = _shortest_paths(problem.values, start.base, edge)
            if paths is not None:
                paths[key] = path
        lower, found = _by_group(problem, start, edge, path)
    if found is not None:
        name, exact = "group", True
    elif method == "dynamic program" or (method == "auto" and _dp_fits(problem)):
        found, name, exact = _by_dynamic_program(problem), "dynamic program", True
    elif method == "squaring":
        found, name, exact = _by_squaring(problem, size), "squaring", False
    else:
        found, name, exact = _by_vertices(problem, start, edge), "vertices", False
        if method == "auto":
            other = _by_squaring(problem, size)
            if _objective(problem, other) < _objective(problem, found):
                found, name = other, "squaring"
    value = _objective(problem, found)
    if exact:
        lower = value
    elif lower == -math.inf:  # the relaxation without integrality
        base = math.fsum(n * float(v[p]) for v, n, p in zip(problem.values, problem.counts, start.base, strict=True))
        lower = (base + edge.slope * start.left) / problem.num_branches
    return Allocation(value, min(lower, value), exact, name, tuple({j: n for j, n in c.items() if n} for c in found))


METHODS = ("auto", "group", "dynamic program", "squaring", "vertices")


def allocate(
    budgets: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    budget: int | float,
    counts: Sequence[int],
    *,
    method: str = "auto",
    size: int = 4096,
) -> Allocation:
    """inf(P) over allocations of the budget on the grid, and an allocation that attains the value returned.

    Args:
      budgets: one uniform grid `[m]` a class of branches, all of one spacing.
      values: v on it, non-increasing.
      budget: K; the total is at most I K; inf drops the constraint (Remark 3).
      counts: branches in each class; they add up to I.
      method: 'auto': 'group', and where its counts are not feasible 'dynamic program' if its tables fit, else the
        better of the last two.  'group' alone falls back to 'vertices'; 'dynamic program' is exact at any cost;
        'squaring' is the dynamic program with tables of at most `size` steps, budgets rounded to the safe side;
        'vertices' puts all branches but one at vertices of the hull, or some at one vertex and shares the rest equally.
      size: for 'squaring'.

    Raises:
      ValueError: for grids or values that are malformed, K below the least h, or an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown. Allowed: {', '.join(METHODS)}.")
    return _solve(_problem(budgets, values, budget, counts), method, None, size)


def _classes(budgets: Any, values: Any, num_branches: Any) -> tuple[list[np.ndarray], list[np.ndarray], list[int]]:
    if isinstance(num_branches, Sequence):
        b = [np.asarray(x, np.float64) for x in budgets]
        v = [np.asarray(x, np.float64) for x in values]
        return b, v, list(num_branches)
    return [np.asarray(budgets, np.float64)], [np.asarray(values, np.float64)], [num_branches]


def gap_from_value_function(
    budgets: Any, values: Any, budget: int | float, num_branches: int | Sequence[int], *, method: str = "auto"
) -> Gap:
    """The duality gap of Theorem 1 from a value function on a grid, for any number of branches.

    The branch's budget is restricted to the grid, on which the problem is solved exactly (`allocation.exact` says so).

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
    b, v, counts = _classes(budgets, values, num_branches)
    allocation = allocate(b, v, budget, counts, method=method)
    dual = dual_by_envelope(b, v, budget, counts)
    return Gap(allocation.value, dual.value, allocation.value - dual.value, dual.multiplier, allocation)


def _outward(value: float, scale: float, sign: int) -> float:
    return value + sign * _ROUNDING * max(1.0, scale)


def dual_lower(functions: Sequence[ValueFunction], budget: int | float, counts: Sequence[int], lam: float) -> float:
    """A lower bound on sup(D): `Q(lam) - lam K` from proven lower bounds of the one-branch problems.

    Holds for every `lam >= 0` by weak duality; the bound is best at the maximiser.  A branch's `lagrangian` is used
    where there is one, else its values one grid step below.
    """
    total, scale, parts = sum(counts), 0.0, []
    for f, n in zip(functions, counts, strict=True):
        below = float(np.min(f.step_below() + lam * f.budgets))
        if f.status == "estimated":
            below = float(np.min(f.lower + lam * f.budgets))
        best = max(below, f.lagrangian(lam)) if f.lagrangian is not None else below
        scale = max(scale, float(np.abs(f.lower).max()) + lam * float(np.abs(f.budgets).max()))
        parts.append(n * best)
    free = lam * budget * (1 + 4e-12) if lam > 0 else 0.0  # K is understood up to 1e-12, and may be inf
    return _outward(math.fsum(parts) / total - free, scale + free, -1)


def verdicts(
    functions: Sequence[ValueFunction],
    budget: int | float,
    counts: Sequence[Sequence[int]],
    *,
    delta_lower: float,
    delta_upper: float = math.inf,
    delta_status: Status = "certified",
    method: str = "auto",
) -> list[Verdict]:
    """Theorem 1 for each number of branches: one row of bounds an entry of `counts`.

    Args:
      functions: the value functions of the classes; for identical branches one.
      budget: K; inf drops the constraint.
      counts: for each row the branches of each class.
      delta_lower, delta_upper: bounds on Delta_worst (`deltas` has some); `delta_status` says whether they are proven.
      method: see `allocate`.

    Raises:
      ValueError: as `allocate`, or a `delta_lower` that is negative or above `delta_upper`.
    """
    if not 0 <= delta_lower <= delta_upper:
        raise ValueError(f"need 0 <= delta_lower <= delta_upper, got {delta_lower} and {delta_upper}.")
    grids = [f.budgets for f in functions]
    uppers = [f.upper for f in functions]
    belows = [f.step_below() if f.status == "certified" else f.lower for f in functions]
    belows = [np.minimum.accumulate(b) for b in belows]
    certified = delta_status == "certified" and all(f.status == "certified" for f in functions)
    scale = max(float(np.abs(f.upper).max()) for f in functions)
    paths: tuple[dict[Any, _Path], dict[Any, _Path]] = {}, {}
    rows = []
    for row in counts:
        total = sum(row)
        upper = _solve(_problem(grids, uppers, budget, row), method, paths[0])
        lower = _solve(_problem(grids, belows, budget, row), method, paths[1])
        dual = dual_by_envelope(grids, uppers, budget, row)
        candidates = {dual.multiplier, *_multipliers(_problem(grids, uppers, budget, row), budget)}
        if any(f.lagrangian is None for f in functions):
            candidates.add(dual_by_envelope(grids, belows, budget, row).multiplier)
        proven = max(dual_lower(functions, budget, row, lam) for lam in candidates)
        primal_upper = _outward(upper.value, scale, 1)
        dual_upper = _outward(dual.value, scale, 1)
        if len(functions) == 1 and functions[0].concave:
            exact = _concave_lower(functions[0], budget, total)
            lower = lower._replace(lower=max(lower.lower, exact))
        # Weak duality: a lower bound on sup(D) is one on inf(P), an upper bound on inf(P) one on sup(D).
        primal_lower = max(_outward(lower.lower, scale, -1), proven)
        dual_upper = min(dual_upper, primal_upper)
        gap_upper, gap_lower = primal_upper - proven, max(0.0, primal_lower - dual_upper)
        bound = 2.0 / total
        rows.append(
            Verdict(
                num_branches=total,
                budget=float(budget),
                primal_lower=float(primal_lower),
                primal_upper=float(primal_upper),
                dual_lower=float(proven),
                dual_upper=float(dual_upper),
                gap_lower=float(gap_lower),
                gap_upper=float(gap_upper),
                delta_lower=float(delta_lower),
                delta_upper=float(delta_upper),
                normalized_gap=float(gap_upper / delta_lower) if delta_lower > 0 else None,
                bound=bound,
                status="certified" if certified else "estimated",
                verified=bool(gap_upper <= bound * delta_lower),
                refuted=bool(gap_lower > bound * delta_upper),
                exact_on_grid=upper.exact,
                multiplier=dual.multiplier,
            )
        )
    return rows


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
