"""Rules of choices: what comparisons, selections, steps, casts and the moving of entries make of ranges.

A truth value that the box does not decide is the range (False, True).  What may jump inside the box has the hull of
both sides as value and the whole line as derivative.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from dualgap_jax.duality.bounding import intervals, jets
from dualgap_jax.duality.bounding.intervals import Interval, is_float
from dualgap_jax.duality.bounding.jets import Jet
from dualgap_jax.duality.bounding.rules import Rule, Run, UnsupportedPrimitiveError, binary, spread
from dualgap_jax.duality.programs import JUMPS, Equation


def _compared(
    certain: Callable[[Interval, Interval], Array], never: Callable[[Interval, Interval], Array]
) -> Callable[[Run, Jet, Jet], Jet]:
    """A comparison as an interval of truth values: (False, True) where the boxes do not decide it."""

    def rule(run: Run, a: Jet, b: Jet) -> Jet:
        return Jet(Interval(certain(a.value, b.value), ~never(a.value, b.value), a.value.exact and b.value.exact))

    return rule


def _truths(f: Callable[[Array, Array], Array]) -> Rule:
    def rule(run: Run, equation: Equation, args: list[Jet]) -> Jet:
        a, b = (spread(x, equation.shapes[0].shape).value for x in args)
        if equation.shapes[0].dtype != bool:
            raise UnsupportedPrimitiveError(
                f"{equation.name} of integers that depend on the weights has no interval rule."
            )
        return Jet(Interval(f(a.lo, b.lo), f(a.hi, b.hi)))

    return rule


def _not(run: Run, equation: Equation, args: list[Jet]) -> Jet:
    if equation.shapes[0].dtype != bool:
        raise UnsupportedPrimitiveError("not of integers that depend on the weights has no interval rule.")
    return Jet(Interval(~args[0].value.hi, ~args[0].value.lo))


def _select(run: Run, equation: Equation, args: list[Jet]) -> Jet:
    which, *cases = args
    shape = equation.shapes[0].shape
    cases = [spread(case, shape) for case in cases]
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

    def rule(run: Run, equation: Equation, args: list[Jet]) -> Jet:
        value = args[0].value
        return jets.stepped(run.order, Interval(f(value.lo, equation), f(value.hi, equation), value.exact))

    return rule


def _is_finite(run: Run, equation: Equation, args: list[Jet]) -> Jet:
    value = args[0].value
    return Jet(Interval(jnp.isfinite(value.lo) & jnp.isfinite(value.hi), jnp.ones_like(value.lo, bool)))


def _convert(run: Run, equation: Equation, args: list[Jet]) -> Jet:
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


def _rounded(run: Run, value: Interval, depends: bool) -> Jet:
    """A value in a narrower format: a constant is what it is; else it may be either neighbour, and it jumps."""
    if not depends:
        return Jet(value)
    wide = intervals.outward(value.lo, value.hi)
    return jets.stepped(run.order, wide)


def _reduced(run: Run, equation: Equation, args: list[Jet]) -> Jet:
    value = args[0].value
    return jets.stepped(run.order, value.moved(lambda end: equation.primitive.bind(end, **equation.params)))


def arranged(run: Run, equation: Equation, args: list[Jet]) -> list[Jet]:
    """Operations that move or choose entries of arrays, at known places."""
    numbers = [k for k, x in enumerate(args) if is_float(x.value.lo)]
    for k, x in enumerate(args):
        if k not in numbers and not x.value.exact and len(args) > 1:
            raise UnsupportedPrimitiveError(
                f"{equation.name} at places that depend on the weights has no interval rule."
            )

    def bound(parts: dict[int, Array], missing: dict[str, Any] | None = None) -> list[Array]:
        params = equation.params | (missing or {})
        out = equation.primitive.bind(*(parts.get(k, x.value.lo) for k, x in enumerate(args)), **params)
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
        flat = {"fill_value": 0} if "fill_value" in equation.params else {}  # what stands for missing entries is known
        ends = [jax.vmap(functools.partial(bound, missing=flat))({k: end(d) for k, d in ds.items()}) for end in both]
        known = all(d.exact for d in ds.values()) and not fills
        found = [Interval(lo, hi, known) for lo, hi in zip(*ends, strict=True)]
        parts.append([d if known else intervals.whole(d.lo, d.hi) for d in found])
    return [Jet(value, *ds) for value, *ds in zip(values, *parts, strict=True)]


CHOICES: dict[str, Rule] = {
    "gt": binary(_compared(lambda a, b: a.lo > b.hi, lambda a, b: a.hi <= b.lo)),
    "ge": binary(_compared(lambda a, b: a.lo >= b.hi, lambda a, b: a.hi < b.lo)),
    "lt": binary(_compared(lambda a, b: a.hi < b.lo, lambda a, b: a.lo >= b.hi)),
    "le": binary(_compared(lambda a, b: a.hi <= b.lo, lambda a, b: a.lo > b.hi)),
    "eq": binary(_compared(lambda a, b: (a.lo == b.hi) & (a.hi == b.lo), lambda a, b: (a.hi < b.lo) | (a.lo > b.hi))),
    "ne": binary(_compared(lambda a, b: (a.hi < b.lo) | (a.lo > b.hi), lambda a, b: (a.lo == b.hi) & (a.hi == b.lo))),
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
}
ARRANGING = {
    "broadcast_in_dim", "concatenate", "dynamic_slice", "dynamic_update_slice", "expand_dims", "gather",
    "optimization_barrier", "pad", "reshape", "rev", "slice", "split", "squeeze", "stack", "tile", "transpose",
}  # fmt: skip
