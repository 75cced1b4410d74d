"""What the operations of a program make of ranges, for the checkers: a second set of rules, on purpose.

A value is a `Jet`, a `Truth`, or an array of integers or truth values that do not depend on the weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dualgap_jax.duality.checker.choices import (
    COMPARED,
    Value,
    chosen,
    constant,
    is_known,
    is_nan,
    logic,
    sorted_known,
    spread,
    truth,
)
from dualgap_jax.duality.checker.jets import Calculus, Jet, Truth, linear
from dualgap_jax.duality.checker.moves import MOVES, around, convolved, dot, windows
from dualgap_jax.duality.checker.pairs import (
    OUTSIDE,
    SMOOTH,
    Pair,
    Unsupported,
    add,
    mul,
    neg,
    out,
    plus,
    raised,
    reciprocal,
    summed,
)
from dualgap_jax.duality.programs import remedy

_EPS = float(np.finfo(np.float64).eps)
_STEPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"sign": np.sign, "floor": np.floor, "ceil": np.ceil}
_INDEXED = ("gather", "dynamic_slice")
_PASSIVE = ("convert_element_type", "copy", "stop_gradient", "concatenate", "split")
_EXACT = {  # in every format
    *MOVES, *_PASSIVE, *_INDEXED, "select_n", "pad", "stack", "neg", "abs", "max", "min", "clamp", "sort", "reduce_max",
    "reduce_min", "dynamic_update_slice", "optimization_barrier",
}  # fmt: skip


def entry(x: Value, k: int) -> Value:
    """Entry k along the first axis."""
    if isinstance(x, np.ndarray):
        return np.asarray(x[k])
    if isinstance(x, Truth):
        return Truth(x.lo[:, :, k], x.hi[:, :, k])
    return linear(lambda a: (a[0][:, :, k], a[1][:, :, k]), x)


def stacked(calculus: Calculus, parts: list[Value]) -> Value:
    """Values along a new first axis."""
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.stack(parts)  # type: ignore[arg-type]
    jets = [part for part in parts if isinstance(part, Jet)]
    if len(jets) != len(parts):
        raise Unsupported("truth values that depend on the weights, kept by a scan, are not known to the checker.")
    return calculus.joined([linear(lambda a: (a[0][:, :, None], a[1][:, :, None]), jet) for jet in jets], 2)


def applied(calculus: Calculus, equation: Any, args: list[Value]) -> list[Value]:
    """The results of an operation.  Raises `Unsupported`, which names it, where there is no rule."""
    found = _found(calculus, equation, args)
    return [_filled(x, v.aval.shape) for x, v in zip(found, equation.outvars, strict=True)]


def _filled(x: Value, shape: tuple[int, ...]) -> Value:
    """All entries of a result: of `a - b` with b of length 1 along an axis, the derivatives are b's alone."""

    def full(a: Pair) -> Pair:
        if a[0].shape[2:] == shape == a[1].shape[2:]:
            return a
        lo, hi = (np.broadcast_to(e, (*e.shape[:2], *shape)) for e in a)
        return lo, hi

    return linear(full, x) if isinstance(x, Jet) else x


def _found(calculus: Calculus, equation: Any, args: list[Value]) -> list[Value]:
    name, p, shapes = equation.primitive.name, equation.params, [v.aval for v in equation.outvars]
    known = [a for a in args if isinstance(a, np.ndarray)]
    if len(known) == len(args) and (args or name in ("iota", "platform_index")):
        with jax.enable_x64(True):
            found = equation.primitive.bind(*known, **p)
        return [constant(f) for f in (found if equation.primitive.multiple_results else [found])]
    if name in ("eq", "ne") and equation.invars[0] is equation.invars[1]:  # the test for NaN, of which there are none
        return [np.full(shapes[0].shape, name == "eq")]
    if name == "select_n":
        return [chosen(calculus, args[0], args[1:], shapes[0].shape)]
    if name in ("and", "or", "not"):
        if shapes[0].dtype != bool:
            raise Unsupported(f"{name} of integers that depend on the weights is not known to the checker.")
        truths = [truth(a, len(shapes[0].shape)) for a in args]
        return [logic(name, truths)]
    if name == "convert_element_type" and isinstance(args[0], Truth) and np.issubdtype(shapes[0].dtype, np.floating):
        zero, one = (Jet((np.full_like(args[0].lo, v, float),) * 2) for v in (0.0, 1.0))
        return [calculus.chosen(args[0], zero, one)]
    if name == "convert_element_type" and isinstance(args[0], Truth) and np.issubdtype(shapes[0].dtype, np.integer):
        return [args[0]]  # as 0 and 1
    if name in ("reduce_or", "reduce_and") and isinstance(args[0], Truth):
        f, axes = np.any if name == "reduce_or" else np.all, tuple(k + 2 for k in p["axes"])
        return [Truth(f(args[0].lo, axes), f(args[0].hi, axes))]
    if name == "sort" and len(args) > 1:
        return sorted_known(equation, args)
    if name in _INDEXED and isinstance(args[0], Jet) and len(known) == len(args) - 1:
        return [_picked(equation, args[0], known)]
    if name == "dynamic_update_slice" and len(known) == len(args) - 2:
        whole, part = args[:2]
        if isinstance(whole, Jet) and isinstance(part, Jet):
            return [_updated(calculus, whole, part, [int(k) for k in known])]
    if not all(isinstance(a, Jet) for a in args):
        raise Unsupported(f"the operation {name} of truth values or integers is not known to the checker.")
    jets = [a for a in args if isinstance(a, Jet)]
    narrow = [s.dtype.name for s in shapes if np.issubdtype(s.dtype, np.floating) and s.dtype != np.float64]
    if narrow and name not in _EXACT:
        raise Unsupported(f"the rounding of {name} in {narrow[0]} is not known to the checker; reckon in float64.")
    if name not in {*MOVES, *_PASSIVE} and any(is_nan(jet) for jet in jets):
        raise Unsupported(f"{name} of a constant that is not a number is not known to the checker.")
    if name == "split":
        return [*_parts(p, jets[0])]
    return [_one(calculus, equation, name, p, jets, shapes[0])]


def _picked(equation: Any, x: Jet, places: list[np.ndarray]) -> Jet:
    """Entries at known places."""

    def move(e: np.ndarray, **other: Any) -> np.ndarray:
        params = equation.params | other
        with jax.enable_x64(True):
            one = jax.vmap(jax.vmap(lambda a: equation.primitive.bind(a, *places, **params)))(e)
        found = np.asarray(one)
        if np.isnan(found).any():
            raise Unsupported(f"{equation.primitive.name} beyond the ends of an array is not known to the checker.")
        return found

    flat = {"fill_value": 0} if "fill_value" in equation.params else {}  # what stands for missing entries is known
    moved = linear(lambda a: (move(a[0], **flat), move(a[1], **flat)), x)
    return moved._replace(value=(move(x.value[0]), move(x.value[1])))


def _updated(calculus: Calculus, whole: Jet, part: Jet, start: list[int]) -> Jet:
    """An array with a part of it, which begins at a known place inside, replaced."""
    shape, size = whole.value[0].shape[2:], part.value[0].shape[2:]
    start = [min(max(k, 0), n - m) for k, n, m in zip(start, shape, size, strict=True)]
    edges = [(k, n - m - k) for k, n, m in zip(start, shape, size, strict=True)]
    inside = around(np.ones((1, 1, *size)), edges, 0.0) > 0
    wide = linear(lambda a: (around(a[0], edges, 0.0), around(a[1], edges, 0.0)), part)
    return calculus.chosen(Truth(inside, inside), whole, wide)


def _one(calculus: Calculus, equation: Any, name: str, p: Any, args: list[Jet], aval: Any) -> Value:
    shape = aval.shape
    if name in _BINARY:
        a, b = (spread(x, shape) for x in args)
        same = equation.invars[0] is equation.invars[1]
        return _BINARY[name](calculus, a, b, same)
    if name in COMPARED:
        (a_lo, a_hi), (b_lo, b_hi) = (spread(x, shape).value for x in args)
        return COMPARED[name](a_lo, a_hi, b_lo, b_hi)
    if name in SMOOTH:
        if name in OUTSIDE:
            calculus.undefined(OUTSIDE[name](args[0].value[0]))
        return calculus.through(*SMOOTH[name](args[0].value), args[0])
    if name in _STEPS or (name == "round" and p["rounding_method"] == jax.lax.RoundingMethod.TO_NEAREST_EVEN):
        return calculus.stepped(_STEPS.get(name, np.rint), args[0])
    if name in _UNARY:
        return _UNARY[name](calculus, p, args[0])
    if name == "is_finite":
        lo, hi = args[0].value
        return Truth(np.isfinite(lo) & np.isfinite(hi), np.ones_like(lo, bool))
    if name == "convert_element_type" and aval.dtype == np.float64:
        return args[0]
    if name == "pow" and args[1].value[0].size == 1 and is_known(args[1]):
        return _to_the(calculus, args[0], float(args[1].value[0].reshape(-1)[0]))
    if name == "pow":
        a, b = (spread(x, shape) for x in args)
        calculus.undefined(a.value[0] <= 0)
        power = calculus.product(mul, b, calculus.through(*SMOOTH["log"](a.value), a))
        return calculus.through(*SMOOTH["exp"](power.value), power)
    if name == "integer_pow":
        return _to_the(calculus, args[0], p["y"])
    if name == "clamp":
        low, x, high = (spread(a, shape) for a in args)
        return _smaller(calculus, calculus.larger(low, x), high)
    if name == "dot_general":
        return calculus.product(lambda a, b: dot(a, b, p["dimension_numbers"]), *args)
    if name == "conv_general_dilated":
        return calculus.product(lambda a, b: convolved(a, b, p), *args)
    if name == "concatenate":
        return calculus.joined(args, p["dimension"] + 2)
    if name == "stack":
        axis = p.get("axis", 0) + 2
        apart = [linear(lambda a: (np.expand_dims(a[0], axis), np.expand_dims(a[1], axis)), x) for x in args]
        return calculus.joined(apart, axis)
    if name == "pad":
        return _padded(p, *args)
    if name == "polynomial":
        x, *coefficients = (spread(a, shape) for a in args)
        found = coefficients.pop()
        while coefficients:
            found = _plus(calculus, calculus.product(mul, found, x), coefficients.pop(), False)
        return found
    move = MOVES.get(name)
    if move is None or len(args) != 1:
        raise Unsupported(f"the operation {name} is not known to the checker.{remedy({name})}")
    return linear(lambda a: (move(a[0], p, shape), move(a[1], p, shape)), args[0])


def _smaller(calculus: Calculus, a: Jet, b: Jet) -> Jet:
    return linear(neg, calculus.larger(linear(neg, a), linear(neg, b)))


def _plus(calculus: Calculus, a: Jet, b: Jet, same: bool) -> Jet:
    return Jet(add(a.value, b.value), plus(a.first, b.first), plus(a.second, b.second))


def _over(calculus: Calculus, a: Jet, b: Jet, same: bool) -> Jet:
    return calculus.product(mul, a, _inverse(calculus, b))


def _inverse(calculus: Calculus, x: Jet) -> Jet:
    calculus.undefined((x.value[0] <= 0) & (x.value[1] >= 0))
    return calculus.through(*reciprocal(x.value), x)


_BINARY: dict[str, Callable[[Calculus, Jet, Jet, bool], Jet]] = {
    "add": _plus,
    "add_any": _plus,
    "sub": lambda calculus, a, b, same: _plus(calculus, a, linear(neg, b), same),
    "mul": lambda calculus, a, b, same: calculus.power(a, 2) if same else calculus.product(mul, a, b),
    "div": _over,
    "max": lambda calculus, a, b, same: calculus.larger(a, b),
    "min": lambda calculus, a, b, same: _smaller(calculus, a, b),
}


def _absolute(calculus: Calculus, p: Any, x: Jet) -> Jet:
    found = calculus.larger(x, linear(neg, x))
    return found._replace(value=(np.maximum(found.value[0], 0.0), found.value[1]))


def _to_the(calculus: Calculus, x: Jet, y: int | float) -> Jet:
    if float(y).is_integer() and 1 <= y <= 64:
        return calculus.power(x, int(y))
    if float(y).is_integer() and -64 <= y < 0:
        return _to_the(calculus, _inverse(calculus, x), -y)
    calculus.undefined(x.value[0] <= 0 if y < 0 else x.value[0] < 0)
    return calculus.through(*raised(x.value, y), x)


def _extreme(sign: int) -> Callable[[Calculus, Any, Jet], Jet]:
    def rule(calculus: Calculus, p: Any, x: Jet) -> Jet:
        x = x if sign > 0 else linear(neg, x)
        for axis in sorted(p["axes"], reverse=True):
            x = _largest(calculus, x, axis)
        return x if sign > 0 else linear(neg, x)

    return rule


def _largest(calculus: Calculus, x: Jet, axis: int) -> Jet:
    """The maximum along an axis of the program."""
    count = x.value[0].shape[axis + 2]
    parts = [linear(lambda a, k=k: (np.take(a[0], k, axis + 2), np.take(a[1], k, axis + 2)), x) for k in range(count)]  # type: ignore[misc]
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        parts = [calculus.larger(a, b) for a, b in pairs] + ([parts[-1]] if len(parts) % 2 else [])
    return parts[0]


def _cumulative(calculus: Calculus, p: Any, x: Jet) -> Jet:
    axis = p["axis"] + 2

    def one(a: Pair) -> Pair:
        flip = (lambda e: np.flip(e, axis)) if p["reverse"] else (lambda e: e)
        lo, hi, size = (flip(np.cumsum(flip(e), axis)) for e in (*a, np.maximum(np.abs(a[0]), np.abs(a[1]))))
        size = (a[0].shape[axis] + 1) * _EPS * size + 1e-300
        return out(lo - size, hi + size)

    return linear(one, x)


def _at(x: Jet, k: int, axis: int) -> Jet:
    """Entry k along an axis of the program, which stays with length 1."""
    cut = (slice(None),) * (axis + 2) + (slice(k, k + 1),)
    return linear(lambda a: (a[0][cut], a[1][cut]), x)


def _running(f: Callable[[Calculus, Jet, Jet], Jet]) -> Callable[[Calculus, Any, Jet], Jet]:
    """Results of an associative operation after each entry of an axis."""

    def rule(calculus: Calculus, p: Any, x: Jet) -> Jet:
        axis, found = p["axis"], list[Jet]()
        length = x.value[0].shape[axis + 2]
        for k in range(length):
            now = _at(x, length - 1 - k if p["reverse"] else k, axis)
            found.append(f(calculus, found[-1], now) if found else now)
        if not found:
            raise Unsupported("running results of an empty array are not known to the checker.")
        return calculus.joined(found[:: -1 if p["reverse"] else 1], axis + 2)

    return rule


def _times(calculus: Calculus, a: Jet, b: Jet) -> Jet:
    return calculus.product(mul, a, b)


def _product(calculus: Calculus, p: Any, x: Jet) -> Jet:
    for axis in p["axes"]:
        factors = [_at(x, k, axis) for k in range(x.value[0].shape[axis + 2])]
        if not factors:
            raise Unsupported("the product of an empty array is not known to the checker.")
        x = functools.reduce(lambda a, b: _times(calculus, a, b), factors)
    gone = tuple(k + 2 for k in p["axes"])
    return linear(lambda a: (np.squeeze(a[0], gone), np.squeeze(a[1], gone)), x)


def _window_max(calculus: Calculus, p: Any, x: Jet) -> Jet:
    value = windows(x.value, p, -np.inf)
    first, second = (None if d is None else windows(d, p, 0.0) for d in (x.first, x.second))
    return _largest(calculus, Jet(value, first, second), value[0].ndim - 3)


def _window_sum(calculus: Calculus, p: Any, x: Jet) -> Jet:
    return linear(lambda a: summed(windows(a, p, 0.0), (a[0].ndim,)), x)


_UNARY: dict[str, Callable[[Calculus, Any, Jet], Jet]] = {
    "neg": lambda calculus, p, x: linear(neg, x),
    "abs": _absolute,
    "square": lambda calculus, p, x: calculus.power(x, 2),
    "stop_gradient": lambda calculus, p, x: x,
    "copy": lambda calculus, p, x: x,
    "optimization_barrier": lambda calculus, p, x: x,
    "reduce_sum": lambda calculus, p, x: linear(lambda a: summed(a, tuple(k + 2 for k in p["axes"])), x),
    "reduce_max": _extreme(1),
    "reduce_min": _extreme(-1),
    "reduce_window_max": _window_max,
    "reduce_window_sum": _window_sum,
    "cumsum": _cumulative,
    "cumprod": _running(_times),
    "cummax": _running(lambda calculus, a, b: calculus.larger(a, b)),
    "cummin": _running(lambda calculus, a, b: _smaller(calculus, a, b)),
    "reduce_prod": _product,
    "sort": lambda calculus, p, x: calculus.ordered(x, p["dimension"] + 2),
}


def _padded(p: Any, x: Jet, value: Jet) -> Jet:
    if value.first is not None or value.value[0].size != 1:
        raise Unsupported("padding with a number that depends on the weights is not known to the checker.")
    edges, steps = [c[:2] for c in p["padding_config"]], [c[2] + 1 for c in p["padding_config"]]

    def wider(a: Pair, by: Pair) -> Pair:
        lo, hi = (around(e, edges, float(v.reshape(-1)[0]), steps) for e, v in zip(a, by, strict=True))
        return lo, hi

    zero = np.zeros(1), np.zeros(1)
    first, second = (None if d is None else wider(d, zero) for d in (x.first, x.second))
    return Jet(wider(x.value, value.value), first, second)


def _parts(p: Any, x: Jet) -> list[Jet]:
    axis, stops = p["axis"] + 2, np.cumsum(p["sizes"])

    def cut(e: np.ndarray, stop: int, size: int) -> np.ndarray:
        return e[(*[slice(None)] * axis, slice(stop - size, stop))]

    return [
        linear(lambda a, t=stop, s=size: (cut(a[0], t, s), cut(a[1], t, s)), x)  # type: ignore[misc]
        for stop, size in zip(stops.tolist(), p["sizes"], strict=True)
    ]
