"""Values with first and second derivatives as ranges in NumPy, for the checkers: forward mode on pairs of arrays.

Arrays of ranges have two leading axes, `[boxes, derivatives, ...]`, 1 long where nothing depends on them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dualgap_jax.duality.checker.pairs import Pair, hull, mul, plus, square


class Jet(NamedTuple):
    """A value, its slopes, and its second derivatives by pairs of parameters; None where they are 0."""

    value: Pair  # [n or 1, 1, ...]
    first: Pair | None = None  # [n or 1, p, ...]
    second: Pair | None = None  # [n or 1, pairs, ...]


class Truth(NamedTuple):
    """Truth values: `lo` where it is certain, `hi` where it is possible; `[n or 1, 1, ...]`."""

    lo: np.ndarray
    hi: np.ndarray


def linear(f: Callable[[Pair], Pair], x: Jet) -> Jet:
    """A linear operation of one array."""
    return Jet(f(x.value), None if x.first is None else f(x.first), None if x.second is None else f(x.second))


class Calculus:
    """Rules of differentiation for p parameters; `smooth` turns False where a kink or a jump may have been met.

    `bad [n]` are the boxes on which something may be undefined.  Second derivatives are by all pairs of parameters, or
    by the `pairs [2, k]` given.
    """

    def __init__(self, size: int, pairs: np.ndarray | None = None) -> None:
        self.size, self.smooth = size, True
        self.bad = np.zeros(1, bool)
        self.i, self.j = np.asarray(np.triu_indices(size) if pairs is None else pairs)

    def begin(self, boxes: int) -> None:
        """Begins with so many boxes, on which nothing is undefined so far."""
        self.smooth, self.bad = True, np.zeros(boxes, bool)

    def undefined(self, where: np.ndarray) -> None:
        """Notes the boxes on which an operation may not be defined; `[n or 1, 1, ...]`."""
        self.bad = self.bad | where.any(axis=tuple(range(1, where.ndim)))

    def product(self, f: Callable[[Pair, Pair], Pair], a: Jet, b: Jet) -> Jet:
        """A bilinear operation."""
        first = plus(None if a.first is None else f(a.first, b.value), None if b.first is None else f(a.value, b.first))
        second = plus(
            None if a.second is None else f(a.second, b.value), None if b.second is None else f(a.value, b.second)
        )
        if a.first is not None and b.first is not None:
            for i, j in ((self.i, self.j), (self.j, self.i)):
                left, right = ((e[0][:, k], e[1][:, k]) for e, k in ((a.first, i), (b.first, j)))
                second = plus(second, f(left, right))
        return Jet(f(a.value, b.value), first, second)

    def through(self, value: Pair, slope: Pair, curvature: Pair, x: Jet) -> Jet:
        """A function of one number, from the ranges of its value, slope and curvature."""
        if x.first is None:
            return Jet(value)
        lo, hi = x.first
        i, j = self.i, self.j
        outer = mul((lo[:, i], hi[:, i]), (lo[:, j], hi[:, j]))
        own = np.reshape(i == j, (1, -1, *[1] * (lo.ndim - 2)))
        squares = square((lo[:, i], hi[:, i]))
        outer = np.where(own, squares[0], outer[0]), np.where(own, squares[1], outer[1])
        second = plus(mul(curvature, outer), None if x.second is None else mul(slope, x.second))
        return Jet(value, mul(slope, x.first), second)

    def larger(self, a: Jet, b: Jet) -> Jet:
        """The maximum of two arrays."""
        value = np.maximum(a.value[0], b.value[0]), np.maximum(a.value[1], b.value[1])
        if a.first is None and b.first is None:
            return Jet(value)
        self.smooth = False
        only_a, only_b = a.value[0] >= b.value[1], b.value[0] >= a.value[1]

        def merged(x: Pair | None, y: Pair | None, count: int, kink: bool) -> Pair:
            zero = np.zeros((1, count, *[1] * (value[0].ndim - 2)))
            x, y = x or (zero, zero), y or (zero, zero)
            both = hull(x, y) if not kink else (np.asarray(-np.inf), np.asarray(np.inf))
            lo, hi = (np.where(only_a, x[e], np.where(only_b, y[e], both[e])) for e in (0, 1))
            return lo, hi

        return Jet(value, merged(a.first, b.first, self.size, False), merged(a.second, b.second, len(self.i), True))

    def power(self, x: Jet, y: int) -> Jet:
        """`x^y` for a whole number y >= 1."""
        one = np.ones((1, 1, *[1] * (x.value[0].ndim - 2)))
        powers = [(one, one)]
        for k in range(1, y + 1):
            half = powers[k // 2]
            powers.append(square(half) if k % 2 == 0 else mul(powers[k - 1], x.value))
        slope = mul((float(y) * one, float(y) * one), powers[y - 1])
        bend = float(y * (y - 1)) * one
        return self.through(powers[y], slope, mul((bend, bend), powers[max(y - 2, 0)]), x)

    def joined(self, args: list[Jet], axis: int) -> Jet:
        """Arrays one after the other along an axis, the two leading ones counted."""

        def together(parts: list[Pair | None], count: int) -> Pair | None:
            if all(part is None for part in parts):
                return None
            zeros = [np.zeros((1, count, *x.value[0].shape[2:])) for x in args]
            full = [part or (zero, zero) for part, zero in zip(parts, zeros, strict=True)]
            n = max(lo.shape[0] for lo, _ in full)
            lo, hi = (np.concatenate([np.broadcast_to(f[e], (n, *f[e].shape[1:])) for f in full], axis) for e in (0, 1))
            return lo, hi

        value = together([x.value for x in args], 1)
        assert value is not None
        seconds = together([x.second for x in args], len(self.i))
        return Jet(value, together([x.first for x in args], self.size), seconds)

    def chosen(self, which: Truth, if_not: Jet, if_so: Jet) -> Jet:
        """One of two arrays; where it is not decided the hull of both, and any slope."""
        self.smooth &= bool((which.lo == which.hi).all())
        only_so, only_not = which.lo, ~which.hi

        def merged(x: Pair, y: Pair, both: Pair) -> Pair:
            lo, hi = (np.where(only_so, y[e], np.where(only_not, x[e], both[e])) for e in (0, 1))
            return lo, hi

        value = merged(if_not.value, if_so.value, hull(if_not.value, if_so.value))
        decided = bool((only_so | only_not).all())
        if decided and if_not.first is None and if_so.first is None:
            return Jet(value)
        anything = np.asarray(-np.inf), np.asarray(np.inf)
        parts = []
        for x, y, count in ((if_not.first, if_so.first, self.size), (if_not.second, if_so.second, len(self.i))):
            zero = np.zeros((1, count, *[1] * (value[0].ndim - 2)))
            parts.append(merged(x or (zero, zero), y or (zero, zero), anything))
        return Jet(value, *parts)

    def ordered(self, x: Jet, axis: int) -> Jet:
        """The entries along an axis from the least to the largest.

        The k-th of them never falls when an entry rises, and changes as one of those does that can be it.
        """
        lo, hi = np.sort(x.value[0], axis), np.sort(x.value[1], axis)
        if x.first is None:
            return Jet((lo, hi))
        self.smooth = False
        last = [np.moveaxis(e, axis, -1) for e in (*x.value, lo, hi)]
        may = (last[0][..., None, :] <= last[3][..., None]) & (last[1][..., None, :] >= last[2][..., None])
        alone = may.sum(-1) == 1
        parts = []
        for d, count, kinks in ((x.first, self.size, False), (x.second, len(self.i), True)):
            a, b = (np.moveaxis(e, axis, -1) for e in d or (np.zeros((1, count, *x.value[0].shape[2:])),) * 2)
            low = np.where(may, a[..., None, :], np.inf).min(-1)
            high = np.where(may, b[..., None, :], -np.inf).max(-1)
            if kinks:
                low, high = np.where(alone, low, -np.inf), np.where(alone, high, np.inf)
            parts.append((np.moveaxis(low, -1, axis), np.moveaxis(high, -1, axis)))
        return Jet((lo, hi), *parts)

    def stepped(self, f: Callable[[np.ndarray], np.ndarray], x: Jet) -> Jet:
        """A non-decreasing function that is constant between jumps."""
        lo, hi = f(x.value[0]), f(x.value[1])
        if x.first is None:
            return Jet((lo, hi))
        self.smooth &= bool((lo == hi).all())
        flat = np.where(lo == hi, 0.0, -np.inf), np.where(lo == hi, 0.0, np.inf)
        first, second = (
            (np.repeat(flat[0], count, 1), np.repeat(flat[1], count, 1)) for count in (self.size, len(self.i))
        )
        return Jet((lo, hi), first, second)
