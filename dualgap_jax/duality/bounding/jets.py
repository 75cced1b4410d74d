"""Values with their first and second derivatives by the parameters, as ranges over a box: forward mode on intervals.

Slopes are meant as the mean value theorem needs them: `f(w) - f(m)` is in `first . (w - m)` for all points of the box.
For a choice that is not decided on the box (a ReLU's side) that is the hull of both sides' slopes, which contains
Clarke's generalised gradient; for what may jump inside the box it is the whole line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualgap_jax.duality.bounding import intervals
from dualgap_jax.duality.bounding.elementary import FUNCTIONS, Elementary, logaddexp, logaddexp_slope
from dualgap_jax.duality.bounding.intervals import Interval, add, is_float, mul, whole


class Jet(NamedTuple):
    """A value and its derivatives over a box of p parameters.

    Attributes:
      value: its range.
      first: `[p, ...]`, of its slopes; None where it does not depend on the parameters (or none are wanted).
      second: `[p (p + 1) / 2, ...]`, of its second derivatives by the pairs of `Order.pairs`; None where they are 0.
    """

    value: Interval
    first: Interval | None = None
    second: Interval | None = None


class Order(NamedTuple):
    """Which derivatives are carried (0, 1 or 2), by how many parameters."""

    order: int
    size: int

    @property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows and columns of the upper triangle of a matrix `[p, p]`."""
        return np.triu_indices(self.size)


def same(a: Interval, count: int) -> Interval:
    """The interval with a first axis of `count` equal entries."""
    return a.moved(lambda end: jnp.broadcast_to(end, (count, *end.shape)))


def zeros(shape: tuple[int, ...], like: Array) -> Interval:
    """A known array of zeros."""
    zero = jnp.zeros(shape, like.dtype)
    return Interval(zero, zero, True)


def mapped(rule: Callable[..., Interval], *parts: Interval, axes: tuple[int | None, ...]) -> Interval:
    """The rule along the first axis of the parts whose entry in `axes` is 0."""
    exact = [False]

    def inside(*ends: tuple[Array, Array]) -> tuple[Array, Array]:
        result = rule(*(Interval(lo, hi, part.exact) for (lo, hi), part in zip(ends, parts, strict=True)))
        exact[0] = result.exact
        return result.lo, result.hi

    ends = [(part.lo, part.hi) for part in parts]
    lo, hi = jax.vmap(inside, in_axes=tuple(None if a is None else (a, a) for a in axes))(*ends)
    return Interval(lo, hi, exact[0])


def plus(a: Interval | None, b: Interval | None) -> Interval | None:
    """A sum in which None is 0."""
    if a is None or b is None:
        return a if b is None else b
    return add(a, b)


def linear(rule: Callable[[Interval], Interval], x: Jet) -> Jet:
    """A linear operation of one array."""
    first, second = (None if d is None else mapped(rule, d, axes=(0,)) for d in (x.first, x.second))
    return Jet(rule(x.value), first, second)


def picked(a: Interval, rows: np.ndarray) -> Interval:
    """The rows of an interval along its first axis."""
    return a.moved(lambda end: end[rows])


def linear_in_first(rule: Callable[[Interval, Interval], Interval], x: Jet, by: Interval) -> Jet:
    """An operation of two arrays that is linear in the first, the second being independent of the parameters."""
    first, second = (None if d is None else mapped(rule, d, by, axes=(0, None)) for d in (x.first, x.second))
    return Jet(rule(x.value, by), first, second)


def bilinear(order: Order, rule: Callable[[Interval, Interval], Interval], a: Jet, b: Jet) -> Jet:
    """A product of two arrays."""
    first, second = None, None
    if a.first is not None:
        first = mapped(rule, a.first, b.value, axes=(0, None))
    if b.first is not None:
        first = plus(first, mapped(rule, a.value, b.first, axes=(None, 0)))
    if order.order == 2:
        if a.second is not None:
            second = mapped(rule, a.second, b.value, axes=(0, None))
        if b.second is not None:
            second = plus(second, mapped(rule, a.value, b.second, axes=(None, 0)))
        if a.first is not None and b.first is not None:
            i, j = order.pairs
            for rows, columns in ((i, j), (j, i)):
                second = plus(second, mapped(rule, picked(a.first, rows), picked(b.first, columns), axes=(0, 0)))
    return Jet(rule(a.value, b.value), first, second)


def composed(order: Order, f: Elementary, x: Jet, bad: Array | None = None) -> Jet:
    """An elementary function of a jet; `bad` marks the entries at which it may be undefined."""

    def safe(part: Interval) -> Interval:
        return part if bad is None else whole(part.lo, part.hi, bad)

    value = safe(f.value(x.value))
    if x.first is None:
        return Jet(value)
    slope = safe(f.slope(x.value))
    first = mul(same(slope, order.size), x.first)
    if order.order < 2:
        return Jet(value, first)
    curvature = safe(f.curvature(x.value))
    i, j = order.pairs
    outer = mul(picked(x.first, i), picked(x.first, j))
    diagonal = (i == j).reshape(-1, *[1] * value.lo.ndim)
    outer = Interval(jnp.where(diagonal, jnp.maximum(outer.lo, 0), outer.lo), outer.hi)
    second = mul(same(curvature, len(i)), outer)
    if x.second is not None:
        second = add(second, mul(same(slope, len(i)), x.second))
    return Jet(value, first, second)


def stepped(order: Order, value: Interval) -> Jet:
    """A value that is constant between jumps: its slope is 0 where it is decided, and else the whole line."""
    if value.exact or not is_float(value.lo) or order.order == 0:
        return Jet(value)
    jumps = ~(value.lo == value.hi)
    zero = jnp.zeros_like(value.lo)
    flat = whole(zero, zero, jumps)
    second = same(flat, len(order.pairs[0])) if order.order == 2 else None
    return Jet(value, same(flat, order.size), second)


def derivative(jet: Jet, which: str, count: int) -> Interval:
    """The first or the second derivatives, also where they are 0."""
    found: Interval | None = getattr(jet, which)
    return zeros((count, *jet.value.lo.shape), jet.value.lo) if found is None else found


def chosen(order: Order, value: Interval, cases: list[Jet], possible: list[Array], continuous: Any) -> Jet:
    """One of several cases, entry by entry.

    Args:
      order: of the derivatives.
      value: the range of the result.
      cases: what may be chosen, of one shape.
      possible: for each the entries in which it may be chosen somewhere on the box.
      continuous: whether the result is continuous where the choice changes.
    """
    if order.order == 0 or (all(case.first is None for case in cases) and value.exact):
        return Jet(value)
    number = sum(p.astype(jnp.int32) for p in possible)
    undecided = number != 1
    parts = []
    for which, count in (("first", order.size), ("second", len(order.pairs[0])))[: order.order]:
        lo = jnp.full((count, *value.lo.shape), jnp.inf, value.lo.dtype)
        hi = -lo
        for case, may in zip(cases, possible, strict=True):
            d = derivative(case, which, count)
            lo, hi = jnp.where(may[None], jnp.minimum(lo, d.lo), lo), jnp.where(may[None], jnp.maximum(hi, d.hi), hi)
        jumps = undecided if which == "second" else undecided & ~jnp.asarray(continuous)
        parts.append(whole(lo, hi, jnp.broadcast_to(jumps, value.lo.shape)[None]))
    return Jet(value, *parts)


def larger(order: Order, a: Jet, b: Jet) -> Jet:
    """The maximum of two arrays."""
    value = Interval(
        jnp.maximum(a.value.lo, b.value.lo), jnp.maximum(a.value.hi, b.value.hi), a.value.exact and b.value.exact
    )
    if a.first is None and b.first is None:
        return Jet(value)
    possible = [~(a.value.hi <= b.value.lo), ~(b.value.hi <= a.value.lo)]
    # On equal points either will do.
    possible[0] = possible[0] | ~possible[1]
    return chosen(order, value, [a, b], possible, True)


def negative(x: Jet) -> Jet:
    """`-x`."""
    return Jet(*(None if part is None else intervals.neg(part) for part in x))  # type: ignore[arg-type]


def largest(order: Order, x: Jet, axis: int) -> Jet:
    """The maximum along an axis."""
    v = x.value
    value = Interval(v.lo.max(axis), v.hi.max(axis), v.exact)
    if x.first is None:
        return Jet(value)
    cases = [taken(x, k, axis) for k in range(v.lo.shape[axis])]
    return chosen(order, value, cases, [case.value.hi >= value.lo for case in cases], True)


def taken(x: Jet, k: int, axis: int) -> Jet:
    """Entry k along an axis."""

    def take(part: Interval | None, shift: int) -> Interval | None:
        if part is None:
            return None
        return part.moved(lambda end: jax.lax.index_in_dim(end, k, axis + shift, keepdims=False))

    value = take(x.value, 0)
    assert value is not None
    return Jet(value, take(x.first, 1), take(x.second, 1))


def stacked(order: Order, jets: list[Jet]) -> Jet:
    """Jets of one shape along a new first axis."""

    def together(parts: list[Interval], axis: int) -> Interval:
        lo, hi = (jnp.stack([part[end] for part in parts], axis) for end in (0, 1))
        return Interval(lo, hi, all(part.exact for part in parts))

    parts: list[Interval | None] = []
    for which, count in (("first", order.size), ("second", len(order.pairs[0]))):
        known = all(getattr(j, which) is None for j in jets)
        parts.append(None if known else together([derivative(j, which, count) for j in jets], 1))
    return Jet(together([j.value for j in jets], 0), *parts)


def summed(a: Jet, b: Jet, sign: int = 1) -> Jet:
    """`a + b` or `a - b`."""
    if sign < 0:
        b = negative(b)
    return Jet(add(a.value, b.value), plus(a.first, b.first), plus(a.second, b.second))


def log_of_sum(order: Order, a: Jet, b: Jet) -> Jet:
    """`log(e^a + e^b)`: weights s and 1 - s, and `s (1 - s) (a' - b')^2 + s a'' + (1 - s) b''`."""
    value = logaddexp(a.value, b.value)
    if a.first is None and b.first is None:
        return Jet(value)
    s, t = logaddexp_slope(a.value, b.value), logaddexp_slope(b.value, a.value)

    def weighted(which: str, count: int) -> Interval | None:
        left, right = getattr(a, which), getattr(b, which)
        return plus(
            None if left is None else mul(same(s, count), left), None if right is None else mul(same(t, count), right)
        )

    first = weighted("first", order.size)
    if order.order < 2:
        return Jet(value, first)
    curved = Elementary(
        FUNCTIONS["logistic"].value, FUNCTIONS["logistic"].value, FUNCTIONS["logistic"].slope
    )  # of softplus: only its curvature is used
    difference = summed(Jet(a.value, a.first), Jet(b.value, b.first), -1)
    bent = composed(order, curved, difference).second
    return Jet(value, first, plus(bent, weighted("second", len(order.pairs[0]))))
