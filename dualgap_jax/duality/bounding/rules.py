"""Rules of arithmetic: what sums, products, powers, maxima, windows and the elementary functions make of ranges.

A rule takes ranges of an operation's operands, with those of their derivatives, to ranges of its result.  Every range
holds all values that the operation takes, rounding included; where it may have no value, the run is told so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualgap_jax.duality.bounding import intervals, jets
from dualgap_jax.duality.bounding.elementary import FUNCTIONS, Elementary, raised
from dualgap_jax.duality.bounding.intervals import Interval, is_float
from dualgap_jax.duality.bounding.jets import Jet, Order
from dualgap_jax.duality.programs import Equation, Known, remedy


class UnsupportedPrimitiveError(NotImplementedError):
    """A function with operations that have no interval rule."""


class Run:
    """One evaluation: the order, and where something may have been undefined."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.bad: Any = jnp.zeros((), bool)

    def undefined(self, where: Array) -> None:
        self.bad = self.bad | jnp.any(where)

    def elementary(self, f: Elementary, x: Jet) -> Jet:
        bad = None if f.outside is None else f.outside(x.value)
        if bad is not None:
            self.undefined(bad)
        return jets.composed(self.order, f, x, bad)


Rule = Callable[[Run, Equation, list[Jet]], Jet]


def spread(x: Jet, shape: tuple[int, ...]) -> Jet:
    """A scalar as an array of equal entries."""
    if x.value.lo.shape == shape:
        return x
    return jets.linear(lambda a: a.moved(lambda end: jnp.broadcast_to(end, shape)), x)


def binary(rule: Callable[[Run, Jet, Jet], Jet]) -> Rule:
    def of_one_shape(run: Run, equation: Equation, args: list[Jet]) -> Jet:
        a, b = (spread(x, equation.shapes[0].shape) for x in args)
        return rule(run, a, b)

    return of_one_shape


def _mul(run: Run, equation: Equation, args: list[Jet]) -> Jet:
    if isinstance(equation.inputs[0], int) and equation.inputs[0] == equation.inputs[1]:
        return run.elementary(FUNCTIONS["square"], args[0])
    a, b = (spread(x, equation.shapes[0].shape) for x in args)
    return jets.bilinear(run.order, intervals.mul, a, b)


def _div(run: Run, a: Jet, b: Jet) -> Jet:
    run.undefined((b.value.lo <= 0) & (b.value.hi >= 0))
    if b.first is None:
        return jets.linear_in_first(intervals.divide, a, b.value)
    return jets.bilinear(run.order, intervals.mul, a, run.elementary(raised(-1), b))


def _pow(run: Run, equation: Equation, args: list[Jet]) -> Jet:
    exponent = equation.inputs[1]
    if isinstance(exponent, Known) and np.ndim(exponent.value) == 0:
        return run.elementary(raised(float(exponent.value)), args[0])
    a, b = (spread(x, equation.shapes[0].shape) for x in args)
    if not is_float(b.value.lo):
        raise UnsupportedPrimitiveError("pow with an exponent that is an array of integers has no interval rule.")
    return run.elementary(
        FUNCTIONS["exp"], jets.bilinear(run.order, intervals.mul, b, run.elementary(FUNCTIONS["log"], a))
    )


def _polynomial(run: Run, equation: Equation, args: list[Jet]) -> Jet:
    x, *coefficients = (spread(a, equation.shapes[0].shape) for a in args)
    result = coefficients[-1]
    for c in coefficients[-2::-1]:
        result = jets.summed(jets.bilinear(run.order, intervals.mul, result, x), c)
    return result


def _clamp(run: Run, equation: Equation, args: list[Jet]) -> Jet:
    low, x, high = (spread(a, equation.shapes[0].shape) for a in args)
    return _smaller(run, jets.larger(run.order, low, x), high)


def _smaller(run: Run, a: Jet, b: Jet) -> Jet:
    return jets.negative(jets.larger(run.order, jets.negative(a), jets.negative(b)))


def _reduce_sum(run: Run, equation: Equation, args: list[Jet]) -> Jet:
    shape = args[0].value.lo.shape
    terms = int(np.prod([shape[axis] for axis in equation.params["axes"]]))
    return jets.linear(
        lambda a: intervals.total(a, terms, lambda x: equation.primitive.bind(x, **equation.params)), args[0]
    )


def _cumsum(run: Run, equation: Equation, args: list[Jet]) -> Jet:
    terms = args[0].value.lo.shape[equation.params["axis"]]
    return jets.linear(
        lambda a: intervals.total(a, terms, lambda x: equation.primitive.bind(x, **equation.params)), args[0]
    )


def _windows(equation: Equation, x: Jet, padding: float) -> list[Jet]:
    """The entries of all windows at each position inside the window, padded."""
    p = equation.params
    sizes, strides = p["window_dimensions"], p["window_strides"]
    base, dilation = p["base_dilation"], p["window_dilation"]
    edges = [(low, high, b - 1) for (low, high), b in zip(p["padding"], base, strict=True)]

    def padded(a: Interval, value: float) -> Interval:
        return a.moved(lambda end: lax.pad(end, jnp.asarray(value, end.dtype), edges))

    out = equation.shapes[0].shape
    firsts = [None if d is None else jets.mapped(lambda a: padded(a, 0.0), d, axes=(0,)) for d in x[1:]]
    whole = Jet(padded(x.value, padding), *firsts)

    def cut(start: tuple[int, ...]) -> Jet:
        limits = [s + (n - 1) * k + 1 for s, n, k in zip(start, out, strides, strict=True)]
        return jets.linear(lambda a: a.moved(lambda end: lax.slice(end, start, limits, strides)), whole)

    offsets = itertools.product(*(range(0, n * d, d) for n, d in zip(sizes, dilation, strict=True)))
    return [cut(tuple(start)) for start in offsets]


def _window_max(run: Run, equation: Equation, args: list[Jet]) -> Jet:
    return jets.largest(run.order, jets.stacked(run.order, _windows(equation, args[0], -np.inf)), 0)


def _window_sum(run: Run, equation: Equation, args: list[Jet]) -> Jet:
    parts = jets.stacked(run.order, _windows(equation, args[0], 0.0))
    terms = parts.value.lo.shape[0]
    return jets.linear(lambda a: intervals.total(a, terms, lambda x: jnp.sum(x, 0)), parts)


def _extreme(sign: int) -> Rule:
    """The maximum (1) or minimum (-1) over some axes."""

    def rule(run: Run, equation: Equation, args: list[Jet]) -> Jet:
        x = args[0] if sign > 0 else jets.negative(args[0])
        for axis in sorted(equation.params["axes"], reverse=True):
            x = jets.largest(run.order, x, axis)
        return x if sign > 0 else jets.negative(x)

    return rule


def _filled(equation: Equation, count: int) -> int:
    if count == 0:
        raise UnsupportedPrimitiveError(f"{equation.name} of an empty array has no interval rule.")
    return count


def _sort(run: Run, equation: Equation, args: list[Jet]) -> Jet:
    """One array in order: its k-th entry rises with every entry, and is one of those that its range meets."""
    if len(args) != 1 or not is_float(args[0].value.lo):
        raise UnsupportedPrimitiveError(f"sort by keys that the weights decide has no interval rule.{remedy({'sort'})}")
    (x,), axis = args, equation.params["dimension"]
    value = x.value.moved(lambda end: jnp.sort(end, axis))
    if x.first is None:
        return Jet(value)
    count = _filled(equation, value.lo.shape[axis])
    entries = [jets.taken(x, k, axis) for k in range(count)]
    places = [jets.taken(Jet(value), k, axis).value for k in range(count)]
    found = [
        jets.chosen(run.order, at, entries, [(e.value.lo <= at.hi) & (e.value.hi >= at.lo) for e in entries], True)
        for at in places
    ]
    last = jets.stacked(run.order, found)
    return jets.linear(lambda a: a.moved(lambda end: jnp.moveaxis(end, 0, axis)), last)


def _folded(rule: Callable[[Run, Jet, Jet], Jet]) -> Rule:
    """An associative operation of all entries along an axis, after each of them."""

    def running(run: Run, equation: Equation, args: list[Jet]) -> Jet:
        (x,), axis = args, equation.params["axis"]
        count = _filled(equation, x.value.lo.shape[axis])
        order = range(count)[:: -1 if equation.params["reverse"] else 1]
        found = [jets.taken(x, order[0], axis)]
        for k in order[1:]:
            found.append(rule(run, found[-1], jets.taken(x, k, axis)))
        whole = jets.stacked(run.order, found[:: -1 if equation.params["reverse"] else 1])
        return jets.linear(lambda a: a.moved(lambda end: jnp.moveaxis(end, 0, axis)), whole)

    return running


def _times(run: Run, a: Jet, b: Jet) -> Jet:
    return jets.bilinear(run.order, intervals.mul, a, b)


def _product(run: Run, equation: Equation, args: list[Jet]) -> Jet:
    x = args[0]
    for axis in sorted(equation.params["axes"], reverse=True):
        parts = [jets.taken(x, k, axis) for k in range(_filled(equation, x.value.lo.shape[axis]))]
        while len(parts) > 1:
            pairs = [_times(run, a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
            parts = pairs + parts[len(pairs) * 2 :]
        x = parts[0]
    return x


def _dot(run: Run, equation: Equation, args: list[Jet]) -> Jet:
    return jets.bilinear(run.order, lambda a, b: intervals.dot_general(a, b, equation.params), *args)


def _conv(run: Run, equation: Equation, args: list[Jet]) -> Jet:
    return jets.bilinear(run.order, lambda a, b: intervals.convolution(a, b, equation.params), *args)


ARITHMETIC: dict[str, Rule] = {
    "add": binary(lambda run, a, b: jets.summed(a, b)),
    "add_any": binary(lambda run, a, b: jets.summed(a, b)),
    "sub": binary(lambda run, a, b: jets.summed(a, b, -1)),
    "mul": _mul,
    "div": binary(_div),
    "neg": lambda run, equation, args: jets.negative(args[0]),
    "pow": _pow,
    "integer_pow": lambda run, equation, args: run.elementary(raised(equation.params["y"]), args[0]),
    "polynomial": _polynomial,
    "logaddexp": binary(lambda run, a, b: jets.log_of_sum(run.order, a, b)),
    "max": binary(lambda run, a, b: jets.larger(run.order, a, b)),
    "min": binary(_smaller),
    "clamp": _clamp,
    "reduce_sum": _reduce_sum,
    "cumsum": _cumsum,
    "cumprod": _folded(_times),
    "cummax": _folded(lambda run, a, b: jets.larger(run.order, a, b)),
    "cummin": _folded(_smaller),
    "reduce_prod": _product,
    "sort": _sort,
    "reduce_max": _extreme(1),
    "reduce_min": _extreme(-1),
    "reduce_window_max": _window_max,
    "reduce_window_sum": _window_sum,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    **{name: (lambda run, equation, args: run.elementary(FUNCTIONS[equation.name], args[0])) for name in FUNCTIONS},
}
