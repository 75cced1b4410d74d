"""inf(P) on a grid of budgets, and an allocation that attains it.

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

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dualgap_jax.duality.min_plus import by_dynamic_program, by_squaring, table_fits
from dualgap_jax.duality.units import Edge, Units, edges, in_units


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


def _objective(problem: Units, counts: Sequence[dict[int, int]]) -> float:
    parts = [n * float(v[j]) for v, c in zip(problem.values, counts, strict=True) for j, n in c.items()]
    return math.fsum(parts) / problem.num_branches


class _Start(NamedTuple):
    """The dual optimum in units: the vertex of each class, the shared edge or None, units left, copies of q."""

    base: tuple[int, ...]
    edge: Edge | None
    left: int


def _start(problem: Units) -> _Start:
    base, left = [0] * len(problem.values), problem.units
    for edge in edges(problem):
        whole = (edge.q - edge.p) * problem.counts[edge.which]
        if left < whole:
            return _Start(tuple(base), edge, left)
        base[edge.which], left = edge.q, left - whole
    return _Start(tuple(base), None, left)


class Path(NamedTuple):
    """Shortest paths from residue 0: their costs `[D]`, and the last arc into each residue."""

    cost: np.ndarray
    arc: np.ndarray  # residue of the arc, -1 at the origin
    which: np.ndarray  # by residue of an arc, the class of the cheapest one, -1 for an unused unit
    choice: np.ndarray  # and the index that it takes in the class's grid


def _shortest_paths(values: Sequence[np.ndarray], base: Sequence[int], edge: Edge) -> Path:
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
    return Path(cost, arc, which, choice)


def _by_group(problem: Units, start: _Start, edge: Edge, path: Path) -> tuple[float, list[Counter[int]] | None]:
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


def _by_vertices(problem: Units, start: _Start, edge: Edge) -> list[Counter[int]]:
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


def solve(problem: Units, method: str, paths: dict[Any, Path] | None = None, size: int = 4096) -> Allocation:
    """`allocate` for a problem in units; `paths` keeps shortest paths for other counts of the same values."""
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
    elif method == "dynamic program" or (method == "auto" and table_fits(problem)):
        found, name, exact = by_dynamic_program(problem), "dynamic program", True
    elif method == "squaring":
        found, name, exact = by_squaring(problem, size), "squaring", False
    else:
        found, name, exact = _by_vertices(problem, start, edge), "vertices", False
        if method == "auto":
            other = by_squaring(problem, size)
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
    budget: Any,
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
    return solve(in_units(budgets, values, budget, counts), method, None, size)
