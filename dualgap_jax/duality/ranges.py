"""Proven ranges of a branch's outputs and of their derivatives over boxes of parameters.

`extension(f, example)` opens f once and returns a function of boxes, itself traceable, so that it can be jitted and
vmapped.  Every operation has rules of its own for the value and the derivatives, on what is computed: a derivative that
a program claims for itself (`custom_jvp`, `stop_gradient`) is not used.  What may jump inside the box (`sign`, `floor`,
a comparison, a cast to integers) has the hull of both sides as value and the whole line as derivative.  Where f may be
undefined on the box (the logarithm of a number that may be 0), the result is the whole line.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualgap_jax.duality import intervals, jets
from dualgap_jax.duality.elementary import FUNCTIONS, Elementary, raised
from dualgap_jax.duality.intervals import Interval, constant, is_float
from dualgap_jax.duality.jets import Jet, Order
from dualgap_jax.duality.programs import COMPARISONS, JUMPS, Atom, Equation, Known, Program, trace

_LONGEST_SCAN = 256


class UnsupportedPrimitiveError(NotImplementedError):
    """A function with operations that have no interval rule."""


class Range(NamedTuple):
    """Ranges over a box, by entry of a function's results.

    Attributes:
      lower, upper: trees like the function's result: `lower <= f(w) <= upper` for all w in the box.
      first: `(lower, upper)` of the slopes, trees with a leading axis `[p]`; None below order 1.
      second: `(lower, upper)` of the second derivatives, trees with leading axes `[p, p]`; None below order 2.
      defined: whether f is proven to be defined on the whole box; if not, all ranges are the whole line.
    """

    lower: Any
    upper: Any
    first: Any
    second: Any
    defined: Any


class _Run:
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


Rule = Callable[[_Run, Equation, list[Jet]], Jet]


def _spread(x: Jet, shape: tuple[int, ...]) -> Jet:
    """A scalar as an array of equal entries."""
    if x.value.lo.shape == shape:
        return x
    return jets.linear(lambda a: a.moved(lambda end: jnp.broadcast_to(end, shape)), x)


def _binary(rule: Callable[[_Run, Jet, Jet], Jet]) -> Rule:
    def spread(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
        a, b = (_spread(x, equation.shapes[0].shape) for x in args)
        return rule(run, a, b)

    return spread


def _mul(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
    if isinstance(equation.inputs[0], int) and equation.inputs[0] == equation.inputs[1]:
        return run.elementary(FUNCTIONS["square"], args[0])
    a, b = (_spread(x, equation.shapes[0].shape) for x in args)
    return jets.bilinear(run.order, intervals.mul, a, b)


def _div(run: _Run, a: Jet, b: Jet) -> Jet:
    run.undefined((b.value.lo <= 0) & (b.value.hi >= 0))
    if b.first is None:
        return jets.linear_in_first(intervals.divide, a, b.value)
    return jets.bilinear(run.order, intervals.mul, a, run.elementary(raised(-1), b))


def _pow(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
    exponent = equation.inputs[1]
    if isinstance(exponent, Known) and np.ndim(exponent.value) == 0:
        return run.elementary(raised(float(exponent.value)), args[0])
    a, b = (_spread(x, equation.shapes[0].shape) for x in args)
    if not is_float(b.value.lo):
        raise UnsupportedPrimitiveError("pow with an exponent that is an array of integers has no interval rule.")
    return run.elementary(
        FUNCTIONS["exp"], jets.bilinear(run.order, intervals.mul, b, run.elementary(FUNCTIONS["log"], a))
    )


def _polynomial(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
    x, *coefficients = (_spread(a, equation.shapes[0].shape) for a in args)
    result = coefficients[-1]
    for c in coefficients[-2::-1]:
        result = jets.summed(jets.bilinear(run.order, intervals.mul, result, x), c)
    return result


def _clamp(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
    low, x, high = (_spread(a, equation.shapes[0].shape) for a in args)
    return _smaller(run, jets.larger(run.order, low, x), high)


def _smaller(run: _Run, a: Jet, b: Jet) -> Jet:
    return jets.negative(jets.larger(run.order, jets.negative(a), jets.negative(b)))


def _reduce_sum(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
    shape = args[0].value.lo.shape
    terms = int(np.prod([shape[axis] for axis in equation.params["axes"]]))
    return jets.linear(
        lambda a: intervals.total(a, terms, lambda x: equation.primitive.bind(x, **equation.params)), args[0]
    )


def _cumsum(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
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


def _window_max(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
    return jets.largest(run.order, jets.stacked(run.order, _windows(equation, args[0], -np.inf)), 0)


def _window_sum(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
    parts = jets.stacked(run.order, _windows(equation, args[0], 0.0))
    terms = parts.value.lo.shape[0]
    return jets.linear(lambda a: intervals.total(a, terms, lambda x: jnp.sum(x, 0)), parts)


def _extreme(sign: int) -> Rule:
    """The maximum (1) or minimum (-1) over some axes."""

    def rule(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
        x = args[0] if sign > 0 else jets.negative(args[0])
        for axis in sorted(equation.params["axes"], reverse=True):
            x = jets.largest(run.order, x, axis)
        return x if sign > 0 else jets.negative(x)

    return rule


def _dot(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
    return jets.bilinear(run.order, lambda a, b: intervals.dot_general(a, b, equation.params), *args)


def _conv(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
    return jets.bilinear(run.order, lambda a, b: intervals.convolution(a, b, equation.params), *args)


def _compared(
    certain: Callable[[Interval, Interval], Array], never: Callable[[Interval, Interval], Array]
) -> Callable[[_Run, Jet, Jet], Jet]:
    """A comparison as an interval of truth values: (False, True) where the boxes do not decide it."""

    def rule(run: _Run, a: Jet, b: Jet) -> Jet:
        return Jet(Interval(certain(a.value, b.value), ~never(a.value, b.value), a.value.exact and b.value.exact))

    return rule


def _truths(f: Callable[[Array, Array], Array]) -> Rule:
    def rule(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
        a, b = (_spread(x, equation.shapes[0].shape).value for x in args)
        if equation.shapes[0].dtype != bool:
            raise UnsupportedPrimitiveError(
                f"{equation.name} of integers that depend on the weights has no interval rule."
            )
        return Jet(Interval(f(a.lo, b.lo), f(a.hi, b.hi)))

    return rule


def _not(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
    if equation.shapes[0].dtype != bool:
        raise UnsupportedPrimitiveError("not of integers that depend on the weights has no interval rule.")
    return Jet(Interval(~args[0].value.hi, ~args[0].value.lo))


def _select(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
    which, *cases = args
    shape = equation.shapes[0].shape
    cases = [_spread(case, shape) for case in cases]
    lo, hi = (jnp.broadcast_to(end, shape).astype(jnp.int32) for end in which.value[:2])
    possible = [(lo <= k) & (k <= hi) for k in range(len(cases))]
    for case, may in zip(cases, possible, strict=True):
        if case.value.exact and is_float(case.value.lo):
            run.undefined(jnp.isnan(case.value.lo) & may)
    exact = which.value.exact and all(case.value.exact for case in cases)
    low, high = cases[0].value.lo, cases[0].value.hi
    for k, case in enumerate(cases):
        first = ~jnp.any(jnp.stack(possible[:k]), 0) if k else jnp.ones(shape, bool)
        low = jnp.where(possible[k], jnp.where(first, case.value.lo, jnp.minimum(low, case.value.lo)), low)
        high = jnp.where(possible[k], jnp.where(first, case.value.hi, jnp.maximum(high, case.value.hi)), high)
    value = Interval(low, low if exact else high, exact)
    if not is_float(low):
        return Jet(value)
    if all(case.first is None for case in cases) and not equation.depends:
        return Jet(value)
    return jets.chosen(run.order, value, cases, possible, equation.choice != JUMPS)


def _steps(f: Callable[..., Array]) -> Rule:
    """A non-decreasing function that is constant between jumps."""

    def rule(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
        value = args[0].value
        return jets.stepped(run.order, Interval(f(value.lo, equation), f(value.hi, equation), value.exact))

    return rule


def _is_finite(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
    value = args[0].value
    return Jet(Interval(jnp.isfinite(value.lo) & jnp.isfinite(value.hi), jnp.ones_like(value.lo, bool)))


def _convert(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
    (x,), new = args, equation.shapes[0].dtype
    value, old = x.value, x.value.lo.dtype

    def cast(a: Interval) -> Interval:
        return Interval(a.lo.astype(new), a.hi.astype(new), a.exact)

    if jnp.issubdtype(new, jnp.complexfloating):
        raise UnsupportedPrimitiveError("complex numbers have no interval rule.")
    if jnp.issubdtype(new, jnp.bool_):
        touches = (value.lo <= 0) & (value.hi >= 0)
        return Jet(Interval(~touches, ~((value.lo == 0) & (value.hi == 0)), value.exact))
    if not is_float(value.lo):
        return jets.stepped(run.order, cast(value))
    if not jnp.issubdtype(new, jnp.floating):
        info = jnp.iinfo(new)
        run.undefined(~((value.lo > float(info.min)) & (value.hi < float(info.max))))
        return Jet(cast(value))
    if float(jnp.finfo(new).eps) <= float(jnp.finfo(old).eps) and jnp.finfo(new).maxexp >= jnp.finfo(old).maxexp:
        return jets.linear(cast, x)
    return _rounded(run, cast(value), x.first is not None)


def _rounded(run: _Run, value: Interval, depends: bool) -> Jet:
    """A value in a narrower format: a constant is what it is; else it may be either neighbour, and it jumps."""
    if not depends:
        return Jet(value)
    wide = intervals.outward(value.lo, value.hi)
    return jets.stepped(run.order, wide)


def _reduced(run: _Run, equation: Equation, args: list[Jet]) -> Jet:
    value = args[0].value
    return jets.stepped(run.order, value.moved(lambda end: equation.primitive.bind(end, **equation.params)))


def _arranged(run: _Run, equation: Equation, args: list[Jet]) -> list[Jet]:
    """Operations that move or choose entries of arrays, at known places."""
    numbers = [k for k, x in enumerate(args) if is_float(x.value.lo)]
    for k, x in enumerate(args):
        if k not in numbers and not x.value.exact and len(args) > 1:
            raise UnsupportedPrimitiveError(
                f"{equation.name} at places that depend on the weights has no interval rule."
            )

    def bound(parts: dict[int, Array]) -> list[Array]:
        out = equation.primitive.bind(*(parts.get(k, x.value.lo) for k, x in enumerate(args)), **equation.params)
        return list(out) if equation.primitive.multiple_results else [out]

    exact = all(x.value.exact for x in args)
    moved = numbers or [0]
    both: tuple[Callable[[Interval], Array], ...] = (lambda a: a.lo, lambda a: a.hi)
    ends = [bound({k: end(args[k].value) for k in moved}) for end in both]
    fills = equation.name in ("gather", "dynamic_slice") and is_float(ends[0][0])
    values = [Interval(lo, lo if exact else hi, exact) for lo, hi in zip(*ends, strict=True)]
    if fills:
        for lo, hi in zip(*ends, strict=True):
            run.undefined(jnp.isnan(lo) | jnp.isnan(hi))
        values = [intervals.whole(lo, hi) for lo, hi in zip(*ends, strict=True)]
    parts: list[list[Interval | None]] = []
    for which, count in (("first", run.order.size), ("second", len(run.order.pairs[0]))):
        if all(getattr(args[k], which) is None for k in numbers):
            parts.append([None] * len(values))
            continue
        ds = {k: jets.derivative(args[k], which, count) for k in numbers}
        ends = [jax.vmap(bound)({k: end(d) for k, d in ds.items()}) for end in both]
        known = all(d.exact for d in ds.values()) and not fills
        found = [Interval(lo, hi, known) for lo, hi in zip(*ends, strict=True)]
        parts.append([d if known else intervals.whole(d.lo, d.hi) for d in found])
    return [Jet(value, *ds) for value, *ds in zip(values, *parts, strict=True)]


def _scan(run: _Run, equation: Equation, args: list[Jet]) -> list[Jet]:
    """A loop of known length, one step after another."""
    p = equation.params
    body, length = p["jaxpr"], p["length"]
    if length > _LONGEST_SCAN:
        raise UnsupportedPrimitiveError(
            f"a scan of {length} steps is too long for interval rules; up to {_LONGEST_SCAN}."
        )
    consts, carry = args[: p["num_consts"]], args[p["num_consts"] :][: p["num_carry"]]
    rows = args[p["num_consts"] + p["num_carry"] :]
    outputs: list[list[Jet]] = []
    for t in range(length)[:: -1 if p["reverse"] else 1]:
        results = _evaluate(run, body, [*consts, *carry, *(jets.taken(row, t, 0) for row in rows)])
        carry = results[: p["num_carry"]]
        outputs.append(results[p["num_carry"] :])
    if p["reverse"]:
        outputs.reverse()
    return [*carry, *(jets.stacked(run.order, list(column)) for column in zip(*outputs, strict=True))]


_RULES: dict[str, Rule] = {
    "add": _binary(lambda run, a, b: jets.summed(a, b)),
    "add_any": _binary(lambda run, a, b: jets.summed(a, b)),
    "sub": _binary(lambda run, a, b: jets.summed(a, b, -1)),
    "mul": _mul,
    "div": _binary(_div),
    "neg": lambda run, equation, args: jets.negative(args[0]),
    "pow": _pow,
    "integer_pow": lambda run, equation, args: run.elementary(raised(equation.params["y"]), args[0]),
    "polynomial": _polynomial,
    "logaddexp": _binary(lambda run, a, b: jets.log_of_sum(run.order, a, b)),
    "max": _binary(lambda run, a, b: jets.larger(run.order, a, b)),
    "min": _binary(_smaller),
    "clamp": _clamp,
    "reduce_sum": _reduce_sum,
    "cumsum": _cumsum,
    "reduce_max": _extreme(1),
    "reduce_min": _extreme(-1),
    "reduce_window_max": _window_max,
    "reduce_window_sum": _window_sum,
    "dot_general": _dot,
    "conv_general_dilated": _conv,
    "gt": _binary(_compared(lambda a, b: a.lo > b.hi, lambda a, b: a.hi <= b.lo)),
    "ge": _binary(_compared(lambda a, b: a.lo >= b.hi, lambda a, b: a.hi < b.lo)),
    "lt": _binary(_compared(lambda a, b: a.hi < b.lo, lambda a, b: a.lo >= b.hi)),
    "le": _binary(_compared(lambda a, b: a.hi <= b.lo, lambda a, b: a.lo > b.hi)),
    "eq": _binary(_compared(lambda a, b: (a.lo == b.hi) & (a.hi == b.lo), lambda a, b: (a.hi < b.lo) | (a.lo > b.hi))),
    "ne": _binary(_compared(lambda a, b: (a.hi < b.lo) | (a.lo > b.hi), lambda a, b: (a.lo == b.hi) & (a.hi == b.lo))),
    "and": _truths(jnp.logical_and),
    "or": _truths(jnp.logical_or),
    "not": _not,
    "select_n": _select,
    "sign": _steps(lambda x, _: jnp.sign(x)),
    "floor": _steps(lambda x, _: jnp.floor(x)),
    "ceil": _steps(lambda x, _: jnp.ceil(x)),
    "round": _steps(lambda x, e: lax.round(x, e.params["rounding_method"])),
    "is_finite": _is_finite,
    "convert_element_type": _convert,
    "reduce_precision": _reduced,
    "stop_gradient": lambda run, equation, args: args[0],
    "copy": lambda run, equation, args: args[0],
    **{name: (lambda run, equation, args: run.elementary(FUNCTIONS[equation.name], args[0])) for name in FUNCTIONS},
}
_ARRANGING = {
    "broadcast_in_dim", "concatenate", "dynamic_slice", "dynamic_update_slice", "expand_dims", "gather",
    "optimization_barrier", "pad", "reshape", "rev", "slice", "split", "squeeze", "stack", "tile", "transpose",
}  # fmt: skip
_ON_TRUTHS = {*COMPARISONS, "and", "or", "not", "select_n", "convert_element_type", "stop_gradient", "copy"}
_KINKS = {
    "max", "min", "clamp", "sign", "select_n", "reduce_max", "reduce_min", "reduce_window_max", "gt", "ge", "lt",
    "le", "eq", "ne", "floor", "ceil", "round", "is_finite", "convert_element_type", "reduce_precision",
    *(name for name, f in FUNCTIONS.items() if not f.smooth),
}  # fmt: skip


def _known(equation: Equation, args: list[Jet]) -> bool:
    """Whether an operation has known operands and gives what is exact: integers, truth values, sorted numbers."""
    floats = [s for s in equation.shapes if not jnp.issubdtype(s.dtype, jnp.integer) and s.dtype != bool]
    return all(x.value.exact for x in args) and (not floats or equation.name == "sort")


def _apply(run: _Run, equation: Equation, args: list[Jet]) -> list[Jet]:
    name = equation.name
    if name in ("eq", "ne") and isinstance(equation.inputs[0], int) and equation.inputs[0] == equation.inputs[1]:
        truth = jnp.full(equation.shapes[0].shape, name == "eq")  # the test for NaN
        return [Jet(Interval(truth, truth, True))]
    if name == "scan":
        return _scan(run, equation, args)
    if _known(equation, args) and equation.name != "stop_gradient":
        out = equation.primitive.bind(*(x.value.lo for x in args), **equation.params)
        return [Jet(Interval(o, o, True)) for o in (out if equation.primitive.multiple_results else [out])]
    if name == "iota":
        out = equation.primitive.bind(**equation.params)
        return [Jet(Interval(out, out, True))]
    exact = name in _ARRANGING and all(x.value.exact for x in args)
    if name not in ("select_n", "convert_element_type", "copy", "stop_gradient") and not exact:
        for x in args:  # only a constant can be NaN
            if x.value.exact and is_float(x.value.lo):
                run.undefined(jnp.isnan(x.value.lo))
    if name in _ARRANGING:
        return _arranged(run, equation, args)
    if name not in _RULES:
        raise UnsupportedPrimitiveError(_sentence({name}))
    if name not in _ON_TRUTHS and not all(is_float(x.value.lo) for x in args):
        raise UnsupportedPrimitiveError(
            f"{name} of integers or truth values that depend on the weights has no interval rule."
        )
    return [_RULES[name](run, equation, args)]


def _evaluate(run: _Run, program: Program, args: list[Jet]) -> list[Jet]:
    known: dict[int, Jet] = dict(zip(program.inputs, args, strict=True))

    def read(atom: Atom) -> Jet:
        return Jet(constant(atom.value)) if isinstance(atom, Known) else known[atom]

    for equation in program.equations:
        results = _apply(run, equation, [read(a) for a in equation.inputs])
        known.update(zip(equation.outputs, results, strict=True))
    return [read(a) for a in program.outputs]


def _sentence(names: set[str]) -> str:
    rules = sorted({*_RULES, *_ARRANGING, "scan"})
    return f"no interval rule for {', '.join(sorted(names))}; there are rules for {', '.join(rules)}."


def is_smooth(f: Callable[[Array], Any], example: Array) -> bool:
    """Whether f is made of primitives with continuous second derivatives only; a ReLU is not."""
    return not trace(f, example)[0].primitives(dependent=True) & _KINKS


def extension(f: Callable[[Array], Any], example: Array, *, order: int = 0) -> Callable[[Array, Array], Range]:
    """The interval extension of a function of one vector, with the ranges of its derivatives.

    Args:
      f: `w [p] -> ` a tree of float arrays, made of the operations that have rules.
      example: an array of the shape and dtype of w.
      order: 0 for values alone, 1 with slopes, 2 with second derivatives too.

    Returns:
      `(lo, hi) -> Range`: ranges over all w with lo <= w <= hi.

    Raises:
      UnsupportedPrimitiveError: for an operation without a rule; the message lists them, and those that have one.
    """
    program, shape = trace(f, example)
    names = program.primitives(dependent=True) - {*_RULES, *_ARRANGING, "scan"}
    if names:
        raise UnsupportedPrimitiveError(_sentence(names))
    tree, count = jax.tree.structure(shape), Order(order, example.size)

    def extended(lo: Array, hi: Array) -> Range:
        run = _Run(count)
        seed = jnp.eye(example.size, dtype=example.dtype).reshape(example.size, *example.shape)
        jet = Jet(Interval(lo, hi), Interval(seed, seed, True) if order else None)
        outputs = _evaluate(run, program, [jet])
        for o in outputs:
            run.undefined(jnp.isnan(o.value.lo))

        def ends(parts: list[Interval]) -> list[Any]:
            safe = [intervals.whole(part.lo, part.hi, run.bad) for part in parts]
            return [jax.tree.unflatten(tree, [part[e] for part in safe]) for e in (0, 1)]

        first, second = None, None
        if order:
            first = tuple(ends([jets.derivative(o, "first", count.size) for o in outputs]))
        if order == 2:
            second = tuple(ends([_matrix(count, o) for o in outputs]))
        lower, upper = ends([o.value for o in outputs])
        return Range(lower, upper, first, second, ~run.bad)

    jax.eval_shape(extended, example, example)
    return extended


def _matrix(order: Order, jet: Jet) -> Interval:
    """The second derivatives `[p, p, ...]` from those of the upper triangle."""
    i, j = order.pairs
    found = jets.derivative(jet, "second", len(i))
    where = np.zeros((order.size, order.size), int)
    where[i, j] = where[j, i] = np.arange(len(i))
    return Interval(found.lo[where], found.hi[where])
