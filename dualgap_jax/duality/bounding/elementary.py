"""Ranges of elementary functions over intervals, with their first and second derivatives.

Each function is monotone between a few points at which it takes a known extreme value, so the values at the two ends
and those at the points inside give the range.  Derivatives come from the formulas here, and never from a program's own
account of them (`custom_jvp`, `stop_gradient`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dualgap_jax.duality.bounding import intervals
from dualgap_jax.duality.bounding.intervals import ULPS, Interval, at_least, divide, hull, mul, outward, square, whole

Range = Callable[[Interval], Interval]
_HUGE = float("inf")


class Elementary(NamedTuple):
    """A function of one real number.

    Attributes:
      value: its range over an interval.
      slope: a range that contains its first derivative, and at kinks all slopes between the two sides.
      curvature: that of the second; the whole line where there is none.
      outside: where an interval holds numbers at which the function is not defined; None if there are none.
      smooth: whether the function is continuously differentiable wherever `slope` is finite; |x| is not.
    """

    value: Range
    slope: Range
    curvature: Range
    outside: Callable[[Interval], Array] | None = None
    smooth: bool = True


def between(
    f: Callable[[Array], Array],
    extremes: tuple[tuple[float, float], ...] = (),
    *,
    ulps: float = ULPS,
    grows: Callable[[Array], Array] | None = None,
    extra: float = 0.0,
    low: float = -_HUGE,
    high: float = _HUGE,
) -> Range:
    """The range of a function that is monotone between its extremes.

    Args:
      f: the function, evaluated at the ends; good to `ulps` of its value and `extra` units of rounding.
      extremes: `(point, value)` pairs.  A pair counts where the point may lie inside, up to rounding.
      ulps, extra: what the ends are moved outward by.
      grows: further ulps at a point: that of an exponential is as wrong as its rounded argument.
      low, high: bounds on the function.
    """

    def rule(a: Interval) -> Interval:
        ends = f(a.lo), f(a.hi)
        lo, hi = jnp.minimum(*ends), jnp.maximum(*ends)
        slack = 4 * intervals.epsilon(a.lo)
        for point, value in extremes:
            inside = (a.lo <= point + slack * abs(point)) & (a.hi >= point - slack * abs(point))
            lo, hi = jnp.where(inside, jnp.minimum(lo, value), lo), jnp.where(inside, jnp.maximum(hi, value), hi)
        charge: Any = ulps if grows is None else ulps + jnp.maximum(grows(a.lo), grows(a.hi))
        wide = outward(lo.astype(a.lo.dtype), hi.astype(a.lo.dtype), charge, extra * intervals.epsilon(a.lo))
        wide = whole(wide.lo, wide.hi, jnp.isnan(ends[0]) | jnp.isnan(ends[1]))
        return Interval(jnp.clip(wide.lo, low, high), jnp.clip(wide.hi, low, high))

    return rule


def _known(a: Interval, value: int | float) -> Interval:
    full = jnp.full_like(a.lo, value)
    return Interval(full, full, True)


def times(factor: int | float, rule: Range) -> Range:
    """The range of a function times a number."""
    return lambda a: mul(rule(a), _known(a, factor))


def level(value: int | float) -> Range:
    """The range of a constant function."""
    return lambda a: _known(a, value)


def unknown(a: Interval) -> Interval:
    """The whole line."""
    return Interval(jnp.full_like(a.lo, -jnp.inf), jnp.full_like(a.lo, jnp.inf))


def power(exponent: int | float, *, ulps: float = 64.0) -> Range:
    """The range of `x^exponent` over the positive numbers (monotone); for whole numbers see `whole_power`."""
    return between(lambda x: jnp.power(jnp.maximum(x, 0), exponent), ulps=ulps, low=0.0)


def whole_power(exponent: int) -> Range:
    """The range of `x^exponent`; the whole line where a negative power meets 0."""
    if exponent == 0:
        return level(1.0)
    if exponent < 0:
        positive = whole_power(-exponent)
        return lambda a: _reciprocal_power(a, positive, even=exponent % 2 == 0)
    if exponent == 1:
        return lambda a: a
    if exponent == 2:
        return square
    even = exponent % 2 == 0
    return between(
        lambda x: lax.integer_pow(x, exponent),
        ((0.0, 0.0),) if even else (),
        ulps=2.0 * exponent,
        low=0.0 if even else -_HUGE,
    )


def _reciprocal_power(a: Interval, positive: Range, even: bool) -> Interval:
    raised = positive(a)
    result = intervals.reciprocal(raised)
    across = (a.lo <= 0) & (a.hi >= 0)
    result = whole(result.lo, result.hi, across)
    return at_least(result, 0) if even else result


def _wave(shift: float, sign: float = 1.0) -> Range:
    """The range of `sign cos(x - shift)`; the whole of [-1, 1] for arguments beyond a million."""

    def rule(a: Interval) -> Interval:
        turn = 2 * math.pi

        def reaches(phase: float) -> Array:
            """Whether `x - phase` may be a multiple of 2 pi somewhere on the interval."""
            near = 1e-9 if a.lo.dtype == jnp.float64 else 1e-3
            return jnp.floor((a.hi - phase) / turn + near) >= jnp.ceil((a.lo - phase) / turn - near)

        far = ~(jnp.maximum(jnp.abs(a.lo), jnp.abs(a.hi)) < (1e6 if a.lo.dtype == jnp.float64 else 1e3))
        f = jnp.cos if shift == 0 else jnp.sin
        ends = f(a.lo), f(a.hi)
        wide = outward(jnp.minimum(*ends), jnp.maximum(*ends), ULPS, 32 * intervals.epsilon(a.lo))
        lo = jnp.where(reaches(shift + math.pi) | far, -1.0, jnp.maximum(wide.lo, -1.0))
        hi = jnp.where(reaches(shift) | far, 1.0, jnp.minimum(wide.hi, 1.0))
        found = Interval(lo.astype(a.lo.dtype), hi.astype(a.lo.dtype))
        return found if sign > 0 else intervals.neg(found)

    return rule


def _below(least: float, strictly: bool) -> Callable[[Interval], Array]:
    return lambda a: (a.lo <= least) if strictly else (a.lo < least)


def _across_zero(a: Interval) -> Array:
    return (a.lo <= 0) & (a.hi >= 0)


_SECH2 = between(lambda x: 1 - jnp.tanh(x) ** 2, ((0.0, 1.0),), ulps=0.0, extra=32.0, low=0.0, high=1.0)
_TANH2 = between(
    lambda x: -2 * jnp.tanh(x) * (1 - jnp.tanh(x) ** 2),
    ((-math.atanh(3**-0.5), 4 * 3**-1.5), (math.atanh(3**-0.5), -4 * 3**-1.5)),
    ulps=0.0,
    extra=64.0,
    low=-0.77,
    high=0.77,
)
_LOGISTIC1 = between(
    lambda x: jax.nn.sigmoid(x) * jax.nn.sigmoid(-x), ((0.0, 0.25),), ulps=2 * ULPS + 4, low=0.0, high=0.25
)
_LOGISTIC2 = between(
    lambda x: jax.nn.sigmoid(x) * jax.nn.sigmoid(-x) * (1 - 2 * jax.nn.sigmoid(x)),
    ((-math.log(2 + 3**0.5), 3**-0.5 / 6), (math.log(2 + 3**0.5), -(3**-0.5) / 6)),
    extra=32.0,
    low=-0.097,
    high=0.097,
)
_BELL = 2 / math.pi**0.5
_BELL1 = between(lambda x: _BELL * jnp.exp(-x * x), ((0.0, _BELL),), ulps=64.0, extra=8.0, low=0.0, high=1.1284)
_STEEPEST = 2 * _BELL * 0.5**0.5 * math.exp(-0.5)
_BELL2 = between(
    lambda x: -2 * _BELL * x * jnp.exp(-x * x),
    ((-(0.5**0.5), _STEEPEST), (0.5**0.5, -_STEEPEST)),
    ulps=64.0,
    extra=8.0,
    low=-0.97,
    high=0.97,
)
_ATAN1 = between(lambda x: 1 / (1 + x * x), ((0.0, 1.0),), low=0.0, high=1.0)
_ATAN2 = between(
    lambda x: -2 * x / ((1 + x * x) * (1 + x * x)), ((-(3**-0.5), 3**1.5 / 8), (3**-0.5, -(3**1.5) / 8)), extra=8.0
)
_ASINH2 = between(
    lambda x: -x / ((1 + x * x) * jnp.sqrt(1 + x * x)),
    ((-(0.5**0.5), 2 * 3**-1.5), (0.5**0.5, -2 * 3**-1.5)),
    extra=8.0,
)
_EXP = between(jnp.exp, low=0.0)
_EXP2 = between(jnp.exp2, ulps=1024.0, low=0.0)  # exp(x ln 2) on some devices
_LN2 = math.log(2)
# XLA's are exponentials of x + log(1/2), which is rounded; half an ulp of it is |x| / 2 of theirs.
_SINH = between(jnp.sinh, ulps=64.0, grows=lambda x: jnp.minimum(2 * jnp.abs(x), 2048.0))
_COSH = between(jnp.cosh, ((0.0, 1.0),), ulps=64.0, grows=lambda x: jnp.minimum(2 * jnp.abs(x), 2048.0), low=1.0)


def _abs(a: Interval) -> Interval:
    far = jnp.maximum(jnp.abs(a.lo), jnp.abs(a.hi))
    near = jnp.where(_across_zero(a), 0, jnp.minimum(jnp.abs(a.lo), jnp.abs(a.hi)))
    return Interval(near.astype(far.dtype), far, a.exact)


def _sides(a: Interval) -> Interval:
    """The slope of |x|: -1, 1, or all between."""
    return Interval(
        jnp.where(a.lo >= 0, 1.0, -1.0).astype(a.lo.dtype), jnp.where(a.hi <= 0, -1.0, 1.0).astype(a.lo.dtype)
    )


def _no_kink_inside(a: Interval) -> Interval:
    inside = (a.lo < 0) & (a.hi > 0)
    zero = jnp.zeros_like(a.lo)
    return whole(zero, zero, inside)


def _cbrt_slope(a: Interval) -> Interval:
    return divide(level(1.0)(a), mul(level(3.0)(a), square(between(jnp.cbrt)(a))))


FUNCTIONS: dict[str, Elementary] = {
    "abs": Elementary(_abs, _sides, _no_kink_inside, smooth=False),
    "square": Elementary(square, times(2.0, lambda a: a), level(2.0)),
    "one_minus_square": Elementary(
        lambda a: intervals.sub(level(1.0)(a), square(a)), times(-2.0, lambda a: a), level(-2.0)
    ),
    "exp": Elementary(_EXP, _EXP, _EXP),
    "exp2": Elementary(_EXP2, times(_LN2, _EXP2), times(_LN2 * _LN2, _EXP2)),
    "expm1": Elementary(between(jnp.expm1, low=-1.0), _EXP, _EXP),
    "log": Elementary(
        between(jnp.log, extra=4.0), intervals.reciprocal, times(-1.0, whole_power(-2)), _below(0.0, True)
    ),
    "log1p": Elementary(
        between(jnp.log1p, ulps=1024.0),
        lambda a: intervals.reciprocal(intervals.add(level(1.0)(a), a)),
        lambda a: intervals.neg(whole_power(-2)(intervals.add(level(1.0)(a), a))),
        _below(-1.0, True),
    ),
    "sqrt": Elementary(
        between(jnp.sqrt, low=0.0),
        between(lambda x: 0.5 / jnp.sqrt(x), low=0.0),
        between(lambda x: -0.25 / (x * jnp.sqrt(x)), high=0.0),
        _below(0.0, False),
    ),
    "rsqrt": Elementary(
        between(lambda x: 1 / jnp.sqrt(x), low=0.0),
        between(lambda x: -0.5 / (x * jnp.sqrt(x)), high=0.0),
        between(lambda x: 0.75 / (x * x * jnp.sqrt(x)), low=0.0),
        _below(0.0, True),
    ),
    "cbrt": Elementary(between(jnp.cbrt), _cbrt_slope, unknown),
    "tanh": Elementary(between(jnp.tanh, low=-1.0, high=1.0), _SECH2, _TANH2),
    "logistic": Elementary(between(jax.nn.sigmoid, low=0.0, high=1.0), _LOGISTIC1, _LOGISTIC2),
    "erf": Elementary(between(lax.erf, low=-1.0, high=1.0), _BELL1, _BELL2),
    "erfc": Elementary(
        # Of exp(-x^2), whose argument is rounded, until it is below the numbers that are charged to underflow.
        between(lax.erfc, ulps=256.0, grows=lambda x: jnp.minimum(2 * x * x, 2048.0), low=0.0, high=2.0),
        lambda a: intervals.neg(_BELL1(a)),
        lambda a: intervals.neg(_BELL2(a)),
    ),
    "atan": Elementary(between(jnp.arctan, low=-1.571, high=1.571), _ATAN1, _ATAN2),
    "sinh": Elementary(_SINH, _COSH, _SINH),
    "cosh": Elementary(_COSH, _SINH, _COSH),
    "asinh": Elementary(
        between(jnp.arcsinh, ulps=64.0),
        between(lambda x: 1 / jnp.hypot(1, x), ((0.0, 1.0),), low=0.0, high=1.0),  # x * x may overflow
        _ASINH2,
    ),
    "sin": Elementary(_wave(math.pi / 2), _wave(0.0), _wave(math.pi / 2, -1.0)),
    "cos": Elementary(_wave(0.0), _wave(math.pi / 2, -1.0), _wave(0.0, -1.0)),
}  # fmt: skip


def raised(exponent: int | float) -> Elementary:
    """`x^exponent` for a known exponent: any x for a whole number, else x >= 0 (x > 0 for a negative exponent)."""
    if float(exponent).is_integer() and abs(exponent) <= 64:
        n = int(exponent)
        return Elementary(
            whole_power(n),
            times(float(n), whole_power(n - 1)) if n else level(0.0),
            times(float(n * (n - 1)), whole_power(n - 2)) if n not in (0, 1) else level(0.0),
            _across_zero if n < 0 else None,
        )
    return Elementary(
        power(exponent),
        times(exponent, power(exponent - 1)),
        times(exponent * (exponent - 1), power(exponent - 2)),
        _below(0.0, exponent < 0),
    )


def logaddexp_slope(a: Interval, b: Interval) -> Interval:
    """The derivative of `log(e^a + e^b)` by a: the logistic function of `a - b`."""
    return FUNCTIONS["logistic"].value(intervals.sub(a, b))


def logaddexp(a: Interval, b: Interval) -> Interval:
    """`log(e^a + e^b)`, which rises in both."""
    lo, hi = jnp.logaddexp(a.lo, b.lo), jnp.logaddexp(a.hi, b.hi)
    wide = outward(lo, hi, 1024.0, 4 * intervals.epsilon(a.lo))
    return hull(Interval(jnp.maximum(wide.lo, jnp.maximum(a.lo, b.lo)), wide.hi))
