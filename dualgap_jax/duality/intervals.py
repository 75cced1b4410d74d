"""Interval arithmetic on a function's jaxpr: proven ranges of outputs and derivatives over boxes of inputs.

`extension(f, example)` traces f once and returns a function of boxes, itself traceable, so that it can be jitted and
vmapped.  Since the gradient of f is a jaxpr too, `extension(jax.value_and_grad(f), ...)` gives the range of all partial
derivatives; a choice that is not decided on the box (a ReLU's side) is replaced by the hull of both, which contains
Clarke's generalised gradient.

**Rounding.**  Results of +, -, *, / and sqrt are moved outward by two ulps, sums and products of n terms by
`(n + 2) eps` times the sum of absolute values, which covers any order of summation and fused multiply-adds.  Elementary
functions (exp, tanh, ...) are taken to be good to 16 ulps on the device (log1p: 1,024), which a test compares with
extended precision; this is the only assumption.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import ClosedJaxpr

_ULPS = 16.0
_TINY = 1e-300


class Interval(NamedTuple):
    """Arrays of one shape with `lo <= hi`; `exact` marks values that are known (constants): lo is hi."""

    lo: Any
    hi: Any
    exact: bool = False


class UnsupportedPrimitiveError(NotImplementedError):
    """A jaxpr with operations that have no interval rule."""


def _point(x: Any) -> Interval:
    return Interval(x, x, True)


def _wider(lo: Array, hi: Array, ulps: float = 2.0) -> Interval:
    if not jnp.issubdtype(jnp.result_type(lo), jnp.floating):
        return Interval(lo, hi)
    eps = ulps * float(jnp.finfo(jnp.result_type(lo)).eps)
    return Interval(lo - (eps * jnp.abs(lo) + _TINY), hi + (eps * jnp.abs(hi) + _TINY))


def _add(a: Interval, b: Interval) -> Interval:
    return _wider(a.lo + b.lo, a.hi + b.hi)


def _sub(a: Interval, b: Interval) -> Interval:
    return _wider(a.lo - b.hi, a.hi - b.lo)


def _products(a: Interval, b: Interval) -> list[Array]:
    if a.exact and b.exact:
        return [a.lo * b.lo]
    if b.exact:
        return [a.lo * b.lo, a.hi * b.lo]
    if a.exact:
        return [a.lo * b.lo, a.lo * b.hi]
    return [a.lo * b.lo, a.lo * b.hi, a.hi * b.lo, a.hi * b.hi]


def _hull(values: list[Array]) -> tuple[Array, Array]:
    lo = hi = values[0]
    for v in values[1:]:
        lo, hi = jnp.minimum(lo, v), jnp.maximum(hi, v)
    return lo, hi


def _mul(a: Interval, b: Interval) -> Interval:
    return _wider(*_hull(_products(a, b)))


def _div(a: Interval, b: Interval) -> Interval:
    inverse = _wider(1 / b.hi, 1 / b.lo)
    across = (b.lo <= 0) & (b.hi >= 0)
    inverse = Interval(jnp.where(across, -jnp.inf, inverse.lo), jnp.where(across, jnp.inf, inverse.hi))
    result = _mul(a, inverse)
    return Interval(
        jnp.where(jnp.isnan(result.lo), -jnp.inf, result.lo), jnp.where(jnp.isnan(result.hi), jnp.inf, result.hi)
    )


def _rising(f: Callable[..., Array], ulps: float = _ULPS) -> Callable[..., Interval]:
    """The rule of an increasing function; its ends are rounded outward by `ulps`."""
    return lambda a, **params: _wider(f(a.lo, **params), f(a.hi, **params), ulps)


def _clipped(f: Callable[..., Array], low: float, high: float) -> Callable[..., Interval]:
    """An increasing function with range [low, high]."""

    def rule(a: Interval, **params: Any) -> Interval:
        wide = _wider(f(a.lo, **params), f(a.hi, **params), _ULPS)
        return Interval(jnp.clip(wide.lo, low, high), jnp.clip(wide.hi, low, high))

    return rule


def _abs(a: Interval, **params: Any) -> Interval:
    size = jnp.maximum(jnp.abs(a.lo), jnp.abs(a.hi))
    least = jnp.where((a.lo <= 0) & (a.hi >= 0), 0, jnp.minimum(jnp.abs(a.lo), jnp.abs(a.hi)))
    return Interval(least.astype(size.dtype), size)


def _integer_pow(a: Interval, *, y: int) -> Interval:
    if y < 0:
        return _div(_point(jnp.ones_like(a.lo)), _integer_pow(a, y=-y))
    wide = float(2 * max(y, 1))
    if y % 2:
        return _wider(lax.integer_pow(a.lo, y), lax.integer_pow(a.hi, y), wide)
    size = _abs(a)
    return _clip_below(_wider(lax.integer_pow(size.lo, y), lax.integer_pow(size.hi, y), wide), 0.0)


def _clip_below(a: Interval, low: float) -> Interval:
    return Interval(jnp.maximum(a.lo, low), a.hi)


def _square(a: Interval, **params: Any) -> Interval:
    return _integer_pow(a, y=2)


def _reduce_sum(a: Interval, **params: Any) -> Interval:
    if not jnp.issubdtype(jnp.result_type(a.lo), jnp.floating):
        return Interval(lax.reduce_sum_p.bind(a.lo, **params), lax.reduce_sum_p.bind(a.hi, **params), a.exact)
    n = int(np.prod([a.lo.shape[axis] for axis in params["axes"]]))
    error = (n + 2) * float(jnp.finfo(a.lo.dtype).eps)
    size = error * lax.reduce_sum_p.bind(jnp.maximum(jnp.abs(a.lo), jnp.abs(a.hi)), **params) + _TINY
    return Interval(lax.reduce_sum_p.bind(a.lo, **params) - size, lax.reduce_sum_p.bind(a.hi, **params) + size)


def _dot_general(a: Interval, b: Interval, **params: Any) -> Interval:
    (contract, _), _ = params["dimension_numbers"]
    n = int(np.prod([a.lo.shape[axis] for axis in contract]))
    error = (n + 4) * float(jnp.finfo(jnp.result_type(a.lo, b.lo)).eps)

    def dot(x: Array, y: Array) -> Array:
        return lax.dot_general_p.bind(x, y, **params)

    if a.exact and b.exact:
        middle, size = dot(a.lo, b.lo), error * dot(jnp.abs(a.lo), jnp.abs(b.lo))
        return Interval(middle - size - _TINY, middle + size + _TINY)
    if a.exact or b.exact or n > 4:
        # Middle and radius: the product of two boxes lies within |m| s + r |n| + r s of the product of the middles.
        (m, r), (p, s) = _middle(a), _middle(b)
        middle = dot(m, p)
        spread = dot(jnp.abs(m), s) if not b.exact else 0.0
        spread = spread + (dot(r, jnp.abs(p) + s) if not a.exact else 0.0)
        size = spread * (1 + error) + error * dot(jnp.abs(m) + r, jnp.abs(p) + s) + _TINY
        return Interval(middle - size, middle + size)
    return _small_dot(a, b, params)


def _middle(a: Interval) -> tuple[Array, Array]:
    """A middle, and a radius that covers both ends in spite of rounding."""
    if a.exact:
        return a.lo, jnp.zeros_like(a.lo)
    m = 0.5 * (a.lo + a.hi)
    r = jnp.maximum(a.hi - m, m - a.lo)
    return m, r * (1 + 4 * float(jnp.finfo(m.dtype).eps)) + _TINY


def _small_dot(a: Interval, b: Interval, params: Any) -> Interval:
    """Few terms: exact hulls of the single products, added up."""
    (ca, cb), (ba, bb) = params["dimension_numbers"]
    free_a = [k for k in range(a.lo.ndim) if k not in (*ca, *ba)]
    free_b = [k for k in range(b.lo.ndim) if k not in (*cb, *bb)]
    shapes = [[x.lo.shape[k] for k in axes] for x, axes in ((a, ba), (a, free_a), (b, free_b), (a, ca))]
    batch, left, right, inner = shapes

    def arranged(x: Array, order: list[int], shape: list[int]) -> Array:
        return jnp.transpose(x, order).reshape(shape)

    ones_left, ones_right = [1] * len(left), [1] * len(right)
    shape_a, shape_b = [*batch, *left, *ones_right, *inner], [*batch, *ones_left, *right, *inner]
    first = [arranged(x, [*ba, *free_a, *ca], shape_a) for x in (a.lo, a.hi)]
    second = [arranged(x, [*bb, *free_b, *cb], shape_b) for x in (b.lo, b.hi)]
    full = [*batch, *left, *right, *inner]
    pair = [[jnp.broadcast_to(x, full) for x in ends] for ends in (first, second)]
    terms = _mul(Interval(pair[0][0], pair[0][1]), Interval(pair[1][0], pair[1][1]))
    axes = tuple(range(len(full) - len(inner), len(full)))
    error = (int(np.prod(inner)) + 2) * float(jnp.finfo(terms.lo.dtype).eps)
    size = error * jnp.sum(jnp.maximum(jnp.abs(terms.lo), jnp.abs(terms.hi)), axes) + _TINY
    return Interval(jnp.sum(terms.lo, axes) - size, jnp.sum(terms.hi, axes) + size)


def _compare(certain: Callable[[Interval, Interval], Array], never: Callable[[Interval, Interval], Array]) -> Any:
    """A comparison as an interval of truth values: (False, True) where the boxes do not decide it."""

    def rule(a: Interval, b: Interval, **params: Any) -> Interval:
        return Interval(certain(a, b), ~never(a, b), a.exact and b.exact)

    return rule


def _select(which: Interval, *cases: Interval, **params: Any) -> Interval:
    if len(cases) != 2:
        raise UnsupportedPrimitiveError(f"select among {len(cases)} cases has no interval rule; two are allowed.")
    off, on = cases
    lo = jnp.where(which.lo.astype(bool), on.lo, jnp.where(which.hi.astype(bool), jnp.minimum(on.lo, off.lo), off.lo))
    hi = jnp.where(which.lo.astype(bool), on.hi, jnp.where(which.hi.astype(bool), jnp.maximum(on.hi, off.hi), off.hi))
    return Interval(lo, hi, which.exact and off.exact and on.exact)


def _not(a: Interval, **params: Any) -> Interval:
    return Interval(~a.hi, ~a.lo, a.exact)


def _both(f: Callable[[Array, Array], Array]) -> Callable[..., Interval]:
    return lambda a, b, **params: Interval(f(a.lo, b.lo), f(a.hi, b.hi), a.exact and b.exact)


def _sign(a: Interval, **params: Any) -> Interval:
    return Interval(jnp.sign(a.lo), jnp.sign(a.hi), a.exact)


def _neg(a: Interval, **params: Any) -> Interval:
    return Interval(-a.hi, -a.lo, a.exact)


def _arranged(primitive: Any, inputs: list[Interval], params: Any) -> list[Interval]:
    """Operations that move or choose entries: applied to both ends."""
    exact = all(x.exact for x in inputs)
    ends = [primitive.bind(*arrays, **params) for arrays in ([x.lo for x in inputs], [x.hi for x in inputs])]
    if not primitive.multiple_results:
        ends = [[end] for end in ends]
    return [Interval(lo, lo if exact else hi, exact) for lo, hi in zip(*ends, strict=True)]


_RULES: dict[str, Callable[..., Any]] = {
    "add": lambda a, b, **_: _add(a, b),
    "add_any": lambda a, b, **_: _add(a, b),
    "sub": lambda a, b, **_: _sub(a, b),
    "mul": lambda a, b, **_: _mul(a, b),
    "div": lambda a, b, **_: _div(a, b),
    "neg": _neg,
    "abs": _abs,
    "sign": _sign,
    "max": _both(jnp.maximum),
    "min": _both(jnp.minimum),
    "exp": _rising(lambda x, **_: jnp.exp(x)),
    "log": _rising(lambda x, **_: jnp.log(x)),
    "log1p": _rising(lambda x, **_: jnp.log1p(x), 1024.0),
    "expm1": _rising(lambda x, **_: jnp.expm1(x)),
    "sqrt": _rising(lambda x, **_: jnp.sqrt(x)),
    "tanh": _clipped(lambda x, **_: jnp.tanh(x), -1.0, 1.0),
    "logistic": _clipped(lambda x, **_: jax.nn.sigmoid(x), 0.0, 1.0),
    "erf": _clipped(lambda x, **_: lax.erf(x), -1.0, 1.0),
    "atan": _rising(lambda x, **_: jnp.arctan(x)),
    "integer_pow": lambda a, *, y, **_: _integer_pow(a, y=y),
    "square": _square,
    "reduce_sum": _reduce_sum,
    "dot_general": _dot_general,
    "gt": _compare(lambda a, b: a.lo > b.hi, lambda a, b: a.hi <= b.lo),
    "ge": _compare(lambda a, b: a.lo >= b.hi, lambda a, b: a.hi < b.lo),
    "lt": _compare(lambda a, b: a.hi < b.lo, lambda a, b: a.lo >= b.hi),
    "le": _compare(lambda a, b: a.hi <= b.lo, lambda a, b: a.lo > b.hi),
    "eq": _compare(
        lambda a, b: (a.lo == b.hi) & (a.hi == b.lo), lambda a, b: (a.hi < b.lo) | (a.lo > b.hi)
    ),
    "ne": _compare(
        lambda a, b: (a.hi < b.lo) | (a.lo > b.hi), lambda a, b: (a.lo == b.hi) & (a.hi == b.lo)
    ),
    "and": _both(jnp.logical_and),
    "or": _both(jnp.logical_or),
    "not": _not,
    "select_n": _select,
    "stop_gradient": lambda a, **_: a,
}  # fmt: skip
_ARRANGING = {
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "expand_dims", "iota", "optimization_barrier",
    "pad", "reduce_max", "reduce_min", "reshape", "rev", "slice", "split", "squeeze", "stack", "tile", "transpose",
}  # fmt: skip
_INNER = (
    "pjit",
    "jit",
    "closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "remat",
    "checkpoint",
)


def _inner(equation: Any) -> Any:
    """The jaxpr inside a call, closed."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in equation.params:
            inner = equation.params[name]
            return inner if hasattr(inner, "consts") else ClosedJaxpr(inner, ())
    raise UnsupportedPrimitiveError(f"no jaxpr inside {equation.primitive.name}.")


def _missing(jaxpr: Any) -> set[str]:
    names = set()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in _INNER:
            names |= _missing(_inner(equation).jaxpr)
        elif name not in _RULES and name not in _ARRANGING:
            names.add(name)
    return names


def _evaluate(jaxpr: Any, consts: Any, args: list[Interval]) -> list[Interval]:
    known: dict[Any, Interval] = {}

    def read(atom: Any) -> Interval:
        return _point(jnp.asarray(atom.val)) if hasattr(atom, "val") else known[atom]

    known.update(zip(jaxpr.constvars, (_point(jnp.asarray(c)) for c in consts), strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))
    for equation in jaxpr.eqns:
        inputs = [read(a) for a in equation.invars]
        name, params = equation.primitive.name, equation.params
        if name in _INNER:
            inner = _inner(equation)
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs)
        elif name in ("eq", "ne") and equation.invars[0] is equation.invars[1]:  # the test for NaN
            outputs = [_point(jnp.full(inputs[0].lo.shape, name == "eq"))]
        elif name in _ARRANGING:
            outputs = _arranged(equation.primitive, inputs, params)
        else:
            outputs = [_RULES[name](*inputs, **params)]
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(a) for a in jaxpr.outvars]


_KINKS = {
    "max",
    "min",
    "abs",
    "sign",
    "select_n",
    "reduce_max",
    "reduce_min",
    "gt",
    "ge",
    "lt",
    "le",
    "eq",
    "ne",
    "sqrt",
}


def _names(jaxpr: Any) -> set[str]:
    inside = [_names(_inner(e).jaxpr) if e.primitive.name in _INNER else {e.primitive.name} for e in jaxpr.eqns]
    return set().union(*inside)


def is_smooth(f: Callable[[Array], Any], example: Array) -> bool:
    """Whether f is made of primitives with continuous second derivatives only; a ReLU is not."""
    return not _names(jax.make_jaxpr(f)(example).jaxpr) & _KINKS


def extension(f: Callable[[Array], Any], example: Array) -> Callable[[Array, Array], Any]:
    """The interval extension of a function of one array.

    Args:
      f: `x -> ` a tree of arrays, made of the primitives that MLPs with any monotone elementwise activation use, and
        their derivatives.
      example: an array of the shape and dtype of x.

    Returns:
      `(lo, hi) -> (lower, upper)`, two trees like f's result: for every x with lo <= x <= hi, lower <= f(x) <= upper.

    Raises:
      UnsupportedPrimitiveError: for a primitive without a rule; the message lists them, and those that have one.
    """
    closed, shape = jax.make_jaxpr(f, return_shape=True)(example)
    missing = _missing(closed.jaxpr)
    if missing:
        raise UnsupportedPrimitiveError(
            f"no interval rule for {', '.join(sorted(missing))};"
            f" there are rules for {', '.join(sorted({*_RULES, *_ARRANGING}))}."
        )
    tree = jax.tree.structure(shape)

    def extended(lo: Array, hi: Array) -> Any:
        outputs = _evaluate(closed.jaxpr, closed.consts, [Interval(lo, hi)])
        return tuple(jax.tree.unflatten(tree, ends) for ends in ([o.lo for o in outputs], [o.hi for o in outputs]))

    return extended
