"""The (min,+) dynamic program over allocations of the budget: exact, or with tables that are kept small by rounding."""

from __future__ import annotations

from collections import Counter

import numpy as np

from dualgap_jax.duality.units import Units

# Largest number of additions for which the dynamic program is run, and entries of the largest table.
DP_OPERATIONS = 500_000_000
DP_ENTRIES = 20_000_000


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


def table_fits(problem: Units) -> bool:
    """Whether the dynamic program is small enough to be run without being asked for."""
    limit = problem.units + 1
    operations, length = 0, 1
    for v, n in zip(problem.values, problem.counts, strict=True):
        own = min(n * (len(v) - 1) + 1, limit)
        operations += _table_cost(len(v), n, limit) + length * own
        length = min(length + own - 1, limit)
    return operations <= DP_OPERATIONS and length <= DP_ENTRIES


def by_dynamic_program(problem: Units) -> list[Counter[int]]:
    """An optimal allocation: of each class how many branches get which index of its grid."""
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


def by_squaring(problem: Units, size: int) -> list[Counter[int]]:
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
