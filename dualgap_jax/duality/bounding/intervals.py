"""Interval arithmetic on arrays, rounded outward: the operations from which ranges of branches are built.

**Rounding.**  Results of +, -, *, / and sqrt are moved outward by two ulps, sums and products of n terms by
`(n + 2) eps` times the sum of absolute values, which covers any order of summation and fused multiply-adds; what may
underflow is moved by a little more than the smallest normal number.  Elementary functions (exp, tanh, ...) are charged
16 ulps or what `elementary` says, which a test compares with extended precision; this is the only assumption.

**What is not known** is the whole line: an end that comes out as NaN becomes infinite, so that no NaN can be dropped by
a later maximum.  Only constants can be NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

ULPS = 16.0


class Interval(NamedTuple):
    """Arrays of one shape with `lo <= hi`; `exact` marks values that are known (constants): lo is hi."""

    lo: Any
    hi: Any
    exact: bool = False

    def moved(self, f: Callable[[Any], Any]) -> Interval:
        """Both ends after a function that moves or chooses entries."""
        return Interval(f(self.lo), f(self.hi), self.exact)


def is_float(x: Any) -> bool:
    """Whether an array has a floating dtype."""
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def epsilon(*arrays: Any) -> float:
    """The largest distance from 1 to the next number among the dtypes of the arrays."""
    return max(float(jnp.finfo(a.dtype).eps) for a in arrays)


def tiny(x: Any) -> float:
    """What an underflow is charged: 16 times the smallest normal number of the dtype."""
    return 16.0 * float(jnp.finfo(x.dtype).tiny)


def constant(x: Any) -> Interval:
    """A known array.  Numbers below the normal range, which a device may take for 0, become intervals from 0."""
    host = np.asarray(x)
    if not is_float(host):
        return Interval(jnp.asarray(x), jnp.asarray(x), True)
    wide = host.astype(np.float64)
    small = (wide != 0) & (np.abs(wide) < float(jnp.finfo(host.dtype).tiny))
    if small.any():
        lo = np.where(small, np.minimum(-tiny(host), 0), wide).astype(host.dtype)
        hi = np.where(small, np.maximum(tiny(host), 0), wide).astype(host.dtype)
        return Interval(jnp.asarray(lo), jnp.asarray(hi))
    return Interval(jnp.asarray(x), jnp.asarray(x), True)


def whole(lo: Array, hi: Array, where: Array | None = None) -> Interval:
    """The interval with the whole line in place of ends that are NaN, and in the entries `where`."""
    keep_lo, keep_hi = lo == lo, hi == hi
    if where is not None:
        keep_lo, keep_hi = keep_lo & ~where, keep_hi & ~where
    return Interval(jnp.where(keep_lo, lo, -jnp.inf), jnp.where(keep_hi, hi, jnp.inf))


def outward(lo: Array, hi: Array, ulps: Any = 2.0, extra: Any = 0.0) -> Interval:
    """The interval, wider by `ulps` of each end and by `extra`."""
    eps = ulps * epsilon(lo)
    return whole(lo - (eps * jnp.abs(lo) + (tiny(lo) + extra)), hi + (eps * jnp.abs(hi) + (tiny(hi) + extra)))


def at_least(a: Interval, low: Any, where: Any = True) -> Interval:
    """The part of the interval above `low`, in the entries `where` it is known that there is no other."""
    return Interval(jnp.where(where, jnp.maximum(a.lo, low), a.lo), jnp.where(where, jnp.maximum(a.hi, low), a.hi))


def at_most(a: Interval, high: Any, where: Any = True) -> Interval:
    """The part of the interval below `high`, in the entries `where` it is known that there is no other."""
    return Interval(jnp.where(where, jnp.minimum(a.lo, high), a.lo), jnp.where(where, jnp.minimum(a.hi, high), a.hi))


def neg(a: Interval) -> Interval:
    """`-a`, exact."""
    return Interval(-a.hi, -a.lo, a.exact)


def add(a: Interval, b: Interval) -> Interval:
    """`a + b`; a sum of non-negative numbers stays non-negative."""
    return at_least(outward(a.lo + b.lo, a.hi + b.hi), 0, (a.lo >= 0) & (b.lo >= 0))


def sub(a: Interval, b: Interval) -> Interval:
    """`a - b`."""
    return outward(a.lo - b.hi, a.hi - b.lo)


def hull(*parts: Interval) -> Interval:
    """The least interval that contains all of them."""
    lo, hi = parts[0].lo, parts[0].hi
    for part in parts[1:]:
        lo, hi = jnp.minimum(lo, part.lo), jnp.maximum(hi, part.hi)
    return Interval(lo, hi)


def mul(a: Interval, b: Interval) -> Interval:
    """`a * b`, entry by entry; a product of non-negative numbers stays non-negative."""
    left = [a.lo] if a.exact else [a.lo, a.hi]
    right = [b.lo] if b.exact else [b.lo, b.hi]
    products = [x * y for x in left for y in right]
    lo = hi = products[0]
    unknown = jnp.isnan(lo)
    for value in products[1:]:
        lo, hi, unknown = jnp.minimum(lo, value), jnp.maximum(hi, value), unknown | jnp.isnan(value)
    wide = outward(lo, hi)
    return whole(*at_least(wide, 0, (a.lo >= 0) & (b.lo >= 0))[:2], unknown)


def square(a: Interval) -> Interval:
    """`a * a`."""
    far = jnp.maximum(jnp.abs(a.lo), jnp.abs(a.hi))
    near = jnp.where((a.lo <= 0) & (a.hi >= 0), 0, jnp.minimum(jnp.abs(a.lo), jnp.abs(a.hi)))
    return at_least(outward(near * near, far * far), 0)


def reciprocal(a: Interval) -> Interval:
    """`1 / a`; the whole line where a contains 0."""
    across = (a.lo <= 0) & (a.hi >= 0)
    wide = outward(1 / a.hi, 1 / a.lo)
    wide = at_most(at_least(wide, 0, a.lo > 0), 0, a.hi < 0)
    return whole(wide.lo, wide.hi, across)


def divide(a: Interval, b: Interval) -> Interval:
    """`a / b`; the whole line where b contains 0."""
    if not b.exact:
        return mul(a, reciprocal(b))
    ends = a.lo / b.lo, a.hi / b.lo
    wide = outward(jnp.minimum(*ends), jnp.maximum(*ends))
    wide = at_least(wide, 0, (a.lo >= 0) & (b.lo > 0))
    return whole(wide.lo, wide.hi, (b.lo == 0) | jnp.isnan(ends[0]) | jnp.isnan(ends[1]))


def total(a: Interval, terms: int, add_up: Callable[[Array], Array]) -> Interval:
    """A sum of `terms` entries each, by a linear function of arrays with coefficients 0 and 1."""
    error = (terms + 2) * epsilon(a.lo)
    size = error * add_up(jnp.maximum(jnp.abs(a.lo), jnp.abs(a.hi))) + tiny(a.lo) * (terms + 1)
    sums = whole(add_up(a.lo) - size, add_up(a.hi) + size)
    never_below = add_up(jnp.where(a.lo >= 0, 0, 1).astype(a.lo.dtype)) == 0
    return at_least(sums, 0, never_below)


def bilinear(a: Interval, b: Interval, terms: int, product: Callable[[Array, Array], Array]) -> Interval:
    """A sum of `terms` products each, by a bilinear function of arrays with coefficients 0 and 1.

    Middle and radius: the product of two boxes lies within |m| s + r |n| + r s of the product m n of the middles.
    """
    error = (terms + 6) * epsilon(a.lo, b.lo, jax.eval_shape(product, a.lo, b.lo))
    (m, r), (n, s) = _middle(a), _middle(b)
    middle = product(m, n)
    size = error * product(jnp.abs(m) + r, jnp.abs(n) + s) + tiny(middle) * (terms + 1)
    if not b.exact:
        size = size + product(jnp.abs(m), s) * (1 + error)
    if not a.exact:
        size = size + product(r, jnp.abs(n) + s) * (1 + error)
    return whole(middle - size, middle + size)


def _middle(a: Interval) -> tuple[Array, Array]:
    """A middle, and a radius that covers both ends in spite of rounding."""
    if a.exact:
        return a.lo, jnp.zeros_like(a.lo)
    m = 0.5 * a.lo + 0.5 * a.hi
    r = jnp.maximum(a.hi - m, m - a.lo)
    r = r * (1 + 4 * epsilon(m)) + tiny(m)
    unknown = ~jnp.isfinite(m) | ~jnp.isfinite(r)
    return jnp.where(unknown, 0, m).astype(m.dtype), jnp.where(unknown, jnp.inf, r).astype(m.dtype)


def dot_general(a: Interval, b: Interval, params: dict[str, Any]) -> Interval:
    """`lax.dot_general`; with few terms and both factors unknown the hulls of the single products, which are tight."""
    (contract, _), _ = params["dimension_numbers"]
    terms = int(np.prod([a.lo.shape[axis] for axis in contract]))
    same_type = params.get("preferred_element_type") in (None, jnp.result_type(a.lo, b.lo))
    if terms <= 4 and same_type and not (a.exact or b.exact):
        return _small_dot(a, b, params)
    full = {**params, "precision": lax.Precision.HIGHEST}
    return bilinear(a, b, terms, lambda x, y: lax.dot_general_p.bind(x, y, **full))


def _small_dot(a: Interval, b: Interval, params: dict[str, Any]) -> Interval:
    (ca, cb), (ba, bb) = params["dimension_numbers"]
    free_a = [k for k in range(a.lo.ndim) if k not in (*ca, *ba)]
    free_b = [k for k in range(b.lo.ndim) if k not in (*cb, *bb)]
    shapes = [[x.lo.shape[k] for k in axes] for x, axes in ((a, ba), (a, free_a), (b, free_b), (a, ca))]
    batch, left, right, inner = shapes
    ones_left, ones_right = [1] * len(left), [1] * len(right)

    def arranged(x: Interval, order: list[int], shape: list[int]) -> Interval:
        return x.moved(lambda end: jnp.transpose(end, order).reshape(shape))

    first = arranged(a, [*ba, *free_a, *ca], [*batch, *left, *ones_right, *inner])
    second = arranged(b, [*bb, *free_b, *cb], [*batch, *ones_left, *right, *inner])
    terms = mul(first, second)
    axes = tuple(range(terms.lo.ndim - len(inner), terms.lo.ndim))
    return total(terms, int(np.prod(inner)), lambda x: jnp.sum(x, axes))


def convolution(a: Interval, b: Interval, params: dict[str, Any]) -> Interval:
    """`lax.conv_general_dilated`; every output is a sum over one kernel."""
    out_axis = params["dimension_numbers"].rhs_spec[0]
    terms = int(np.prod(b.lo.shape)) // max(1, b.lo.shape[out_axis])
    full = {**params, "precision": lax.Precision.HIGHEST}
    return bilinear(a, b, terms, lambda x, y: lax.conv_general_dilated_p.bind(x, y, **full))
