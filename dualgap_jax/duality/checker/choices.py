"""Choices in the checkers: what comparisons, truth values, selections and orders of known numbers make of ranges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dualgap_jax.duality.checker.jets import Calculus, Jet, Truth, linear
from dualgap_jax.duality.checker.pairs import Pair, Unsupported
from dualgap_jax.duality.programs import remedy

Value = Jet | Truth | np.ndarray


def constant(value: Any) -> Value:
    """A known array: a jet of floats, or the integers or truth values as they are."""
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.floating):
        return array
    array = array.astype(np.float64)[None, None]
    return Jet((array, array))


def spread(x: Jet, shape: tuple[int, ...]) -> Jet:
    """Operands as they are where they have all axes, some perhaps of length 1; a single number gets the axes."""
    if x.value[0].ndim - 2 == len(shape):
        return x

    def axes(a: Pair) -> Pair:
        lo, hi = (e.reshape(*e.shape[:2], *[1] * len(shape)) for e in a)
        return lo, hi

    return linear(axes, x)


def is_nan(x: Jet) -> bool:
    """Whether a constant has entries that are not numbers; nothing else can."""
    return x.first is None and bool(np.isnan(x.value[0]).any())


def is_known(x: Jet) -> bool:
    return x.first is None and bool((x.value[0] == x.value[1]).all())


def truth(value: Value, ndim: int) -> Truth:
    if isinstance(value, Jet):
        raise Unsupported("a choice by a number is not known to the checker.")
    if isinstance(value, np.ndarray):
        value = Truth(value.astype(bool)[None, None], value.astype(bool)[None, None])
    if value.lo.ndim - 2 == ndim:
        return value
    lo, hi = (e.reshape(*e.shape[:2], *[1] * ndim) for e in value)
    return Truth(lo, hi)


def chosen(calculus: Calculus, which: Value, cases: list[Value], shape: tuple[int, ...]) -> Value:
    """One of several arrays, entry by entry, or as one number says."""
    known = [case for case in cases if isinstance(case, np.ndarray)]
    if len(known) == len(cases) and all(np.array_equal(case, known[0]) for case in known):
        return known[0]  # integers that do not depend on the choice
    jets = [spread(case, shape) for case in cases if isinstance(case, Jet)]
    if len(jets) != len(cases):
        raise Unsupported("a choice of other than numbers is not known to the checker.")
    if isinstance(which, np.ndarray) and which.dtype != bool:
        found = jets[0]
        for k, case in enumerate(jets):
            at = truth(which == k, len(shape))
            _unless_nan(calculus, case, at.hi)
            found = calculus.chosen(at, found, case) if k else found
        return found
    if len(jets) != 2:
        raise Unsupported("a choice of several by a number that depends on the weights is not known to the checker.")
    at = truth(which, len(shape))
    _unless_nan(calculus, jets[0], ~at.lo)
    _unless_nan(calculus, jets[1], at.hi)
    return calculus.chosen(at, *jets)


def _unless_nan(calculus: Calculus, case: Jet, where: np.ndarray) -> None:
    if is_nan(case):
        calculus.undefined(np.isnan(case.value[0]) & where)


def sorted_known(equation: Any, args: list[Value]) -> list[Value]:
    """Known arrays in the order of the first of them."""
    known = []
    for a in args:
        if not isinstance(a, np.ndarray) and not (isinstance(a, Jet) and is_known(a)):
            raise Unsupported(f"sort by keys that are not known exactly is not known to the checker.{remedy({'sort'})}")
        known.append(a.value[0][0, 0] if isinstance(a, Jet) else a)
    with jax.enable_x64(True):
        return [constant(f) for f in equation.primitive.bind(*known, **equation.params)]


def logic(name: str, truths: list[Truth]) -> Truth:
    if name == "not":
        return Truth(~truths[0].hi, ~truths[0].lo)
    f = np.logical_and if name == "and" else np.logical_or
    return Truth(f(truths[0].lo, truths[1].lo), f(truths[0].hi, truths[1].hi))


COMPARED: dict[str, Callable[..., Truth]] = {
    "gt": lambda a, b, c, d: Truth(a > d, b > c),
    "ge": lambda a, b, c, d: Truth(a >= d, b >= c),
    "lt": lambda a, b, c, d: Truth(b < c, a < d),
    "le": lambda a, b, c, d: Truth(b <= c, a <= d),
    "eq": lambda a, b, c, d: Truth((a == d) & (b == c), (a <= d) & (b >= c)),
    "ne": lambda a, b, c, d: Truth((b < c) | (a > d), ~((a == d) & (b == c))),
}
