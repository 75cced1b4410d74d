"""Ranges of numbers as pairs of NumPy arrays, rounded outward, for the checkers: arithmetic and functions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import special

_EPS = float(np.finfo(np.float64).eps)
_LEAST = 1e-300
_LEAST_STEP = 5e-324  # between neighbours next to 0
Pair = tuple[np.ndarray, np.ndarray]


class Unsupported(NotImplementedError):
    """A branch with operations that the checker does not know."""


def out(lo: np.ndarray, hi: np.ndarray, ulps: int = 1) -> Pair:
    """The pair moved outward by some units in the last place; the whole line in place of NaN."""
    if ulps > 1:
        lo, hi = lo - ulps * _EPS * np.abs(lo) - _LEAST, hi + ulps * _EPS * np.abs(hi) + _LEAST
    # |x| eps is at least one unit in the last place, and at most two; `fmax` and `fmin` pass over NaN.
    return np.fmax(lo - (np.abs(lo) * _EPS + _LEAST_STEP), -np.inf), np.fmin(
        hi + (np.abs(hi) * _EPS + _LEAST_STEP), np.inf
    )


def add(a: Pair, b: Pair) -> Pair:
    """`a + b`."""
    return out(a[0] + b[0], a[1] + b[1])


def neg(a: Pair) -> Pair:
    """`-a`."""
    return -a[1], -a[0]


def mul(a: Pair, b: Pair) -> Pair:
    """`a b`; the whole line where a product is NaN, which minima and maxima keep."""
    one, four = a[0] * b[0], a[1] * b[1]
    lo, hi = np.minimum(one, four), np.maximum(one, four)
    if not any(4 * e[0].size <= one.size and np.array_equal(*e) for e in (a, b)):  # the ends of known numbers are one
        two, three = a[0] * b[1], a[1] * b[0]
        lo, hi = np.minimum(lo, np.minimum(two, three)), np.maximum(hi, np.maximum(two, three))
    return out(lo, hi)


def square(a: Pair) -> Pair:
    """`a^2`."""
    lo, hi = mul(a, a)
    return np.where((a[0] > 0) | (a[1] < 0), np.maximum(lo, 0), 0.0), hi


def summed(a: Pair, axes: tuple[int, ...]) -> Pair:
    """A sum over some axes."""
    terms = int(np.prod([a[0].shape[k] for k in axes]))
    size = (terms + 1) * _EPS * np.maximum(np.abs(a[0]), np.abs(a[1])).sum(axes) + _LEAST
    return out(a[0].sum(axes) - size, a[1].sum(axes) + size)


def plus(a: Pair | None, b: Pair | None) -> Pair | None:
    """A sum in which None is 0."""
    return a if b is None else b if a is None else add(a, b)


def hull(a: Pair, b: Pair) -> Pair:
    """What contains both."""
    return np.minimum(a[0], b[0]), np.maximum(a[1], b[1])


def _polynomial(t: Pair, f: Callable[[np.ndarray], np.ndarray], turns: tuple[float, ...]) -> Pair:
    """The range of a polynomial of small numbers t, which turns at some places."""
    ends = [f(t[0]), f(t[1])]
    lo, hi = np.minimum(*ends), np.maximum(*ends)
    for turn in turns:
        near = (t[0] <= turn + 1e-12) & (t[1] >= turn - 1e-12)
        value = f(np.asarray(turn))
        lo, hi = np.where(near, np.minimum(lo, value), lo), np.where(near, np.maximum(hi, value), hi)
    return lo - 64 * _EPS, hi + 64 * _EPS


def _rising(f: Callable[[np.ndarray], np.ndarray]) -> Callable[[Pair], Pair]:
    return lambda a: out(f(a[0]), f(a[1]), 8)


_EXP, _ERF = _rising(np.exp), _rising(special.erf)
_THIRD = 3**-0.5


def _bound_to(a: Pair, low: int | float, high: int | float) -> Pair:
    return np.clip(a[0], low, high), np.clip(a[1], low, high)


def _tanh(a: Pair) -> tuple[Pair, Pair, Pair]:
    t = _bound_to(_rising(np.tanh)(a), -1, 1)
    return (
        t,
        _polynomial(t, lambda s: 1 - s * s, (0.0,)),
        _polynomial(t, lambda s: 2 * s * (s * s - 1), (-_THIRD, _THIRD)),
    )


def _logistic(a: Pair) -> tuple[Pair, Pair, Pair]:
    s = _bound_to(_rising(special.expit)(a), 0, 1)
    turns = ((3 - 3**0.5) / 6, (3 + 3**0.5) / 6)
    return (
        s,
        _polynomial(s, lambda t: t * (1 - t), (0.5,)),
        _polynomial(s, lambda t: t * (1 - t) * (1 - 2 * t), turns),
    )


def _bell(a: Pair) -> tuple[Pair, Pair]:
    """`2 / sqrt(pi) exp(-a^2)` and its derivative."""
    constant = (np.asarray(2 / np.pi**0.5 * (1 - 4 * _EPS)), np.asarray(2 / np.pi**0.5 * (1 + 4 * _EPS)))
    slope = mul(constant, _EXP(neg(square(a))))
    return slope, mul(mul((np.asarray(-2.0), np.asarray(-2.0)), a), slope)


def _erf(a: Pair) -> tuple[Pair, Pair, Pair]:
    return _bound_to(_ERF(a), -1, 1), *_bell(a)


def _erfc(a: Pair) -> tuple[Pair, Pair, Pair]:
    # Half an ulp of the rounded x^2 in exp(-x^2) is x^2 / 2 of the value, down to where that is nothing.
    lo, hi = (
        value * (1 + sign * 2 * _EPS * np.minimum(end * end, 800.0))
        for end, value, sign in ((a[1], special.erfc(a[1]), -1), (a[0], special.erfc(a[0]), 1))
    )
    value = _bound_to(out(lo, hi, 16), 0, 2)
    slope, curvature = _bell(a)
    return value, neg(slope), neg(curvature)


def _exp(a: Pair) -> tuple[Pair, Pair, Pair]:
    return _EXP(a), _EXP(a), _EXP(a)


def _monotone(f: Callable[[np.ndarray], np.ndarray], sign: int, ulps: int = 8) -> Callable[[Pair], Pair]:
    """The range of a function that rises (1) or falls (-1)."""
    return lambda a: out(f(a[0]), f(a[1]), ulps) if sign > 0 else out(f(a[1]), f(a[0]), ulps)


def _log(a: Pair) -> tuple[Pair, Pair, Pair]:
    a = np.where(a[0] > 0, a[0], np.nan), a[1]
    return _monotone(np.log, 1)(a), _monotone(lambda x: 1 / x, -1)(a), _monotone(lambda x: -1 / (x * x), 1)(a)


def _log1p(a: Pair) -> tuple[Pair, Pair, Pair]:
    a = np.where(a[0] > -1, a[0], np.nan), a[1]
    up = add((np.asarray(1.0), np.asarray(1.0)), a)
    up = np.where(up[0] > 0, up[0], np.nan), up[1]
    return _monotone(np.log1p, 1)(a), _monotone(lambda x: 1 / x, -1)(up), _monotone(lambda x: -1 / (x * x), 1)(up)


def raised(a: Pair, y: float) -> tuple[Pair, Pair, Pair]:
    """`x^y` for x >= 0, or x > 0 where y < 0; the whole line elsewhere."""
    low = np.where(a[0] >= 0, a[0], np.nan)

    def one(factor: float, exponent: float) -> Pair:
        if factor == 0:
            return np.zeros_like(low), np.zeros_like(low)
        rises = (factor > 0) == (exponent > 0)
        found = _monotone(lambda x: factor * np.power(x, exponent), 1 if rises else -1, 16)((low, a[1]))
        if exponent == 0:
            found = out(np.where(np.isnan(low), np.nan, factor), np.where(np.isnan(low), np.nan, factor), 4)
        return found

    return one(1.0, y), one(y, y - 1), one(y * (y - 1), y - 2)


def reciprocal(a: Pair) -> tuple[Pair, Pair, Pair]:
    """`1 / x`; the whole line where x may be 0."""
    across = (a[0] <= 0) & (a[1] >= 0)
    a = np.where(across, np.nan, a[0]), np.where(across, np.nan, a[1])
    one = _monotone(lambda x: 1 / x, -1)(a)
    return one, neg(square(one)), mul((np.asarray(2.0), np.asarray(2.0)), mul(one, square(one)))


def _wave(shift: float) -> Callable[[Pair], Pair]:
    """The range of `cos(x - shift)`; all of [-1, 1] for arguments beyond a million."""

    def rule(a: Pair) -> Pair:
        lo, hi = out(np.minimum(*(np.cos(e - shift) for e in a)), np.maximum(*(np.cos(e - shift) for e in a)))
        far = ~(np.maximum(np.abs(a[0]), np.abs(a[1])) < 1e6)
        error = 4 * _EPS * (4 + np.maximum(np.abs(a[0]), np.abs(a[1])))  # of the shift, and of cos

        def meets(phase: float) -> np.ndarray:
            return np.asarray(
                np.floor((a[1] - phase) / (2 * np.pi) + 1e-9) >= np.ceil((a[0] - phase) / (2 * np.pi) - 1e-9)
            )

        high = np.where(far | meets(shift), 1.0, np.minimum(hi + error, 1.0))
        return np.where(far | meets(shift + np.pi), -1.0, np.maximum(lo - error, -1.0)), high

    return rule


_ONE, _TWO = (np.asarray(1.0),) * 2, (np.asarray(2.0),) * 2


def _larger_by_square(a: Pair) -> Pair:
    """`1 + x^2`."""
    return add(_ONE, square(a))


def _atan(a: Pair) -> tuple[Pair, Pair, Pair]:
    slope = reciprocal(_larger_by_square(a))[0]
    slope = np.maximum(slope[0], 0.0), np.minimum(slope[1], 1.0)
    return _rising(np.arctan)(a), slope, neg(mul(mul(_TWO, a), square(slope)))


def _even(f: Callable[[np.ndarray], np.ndarray], least: float) -> Callable[[Pair], Pair]:
    """The range of a function that falls up to 0, where it has its least value, and rises from there."""

    def rule(a: Pair) -> Pair:
        lo, hi = out(np.minimum(f(a[0]), f(a[1])), np.maximum(f(a[0]), f(a[1])), 8)
        return np.maximum(np.where((a[0] <= 0) & (a[1] >= 0), least, lo), least), hi

    return rule


_SINH, _COSH = _rising(np.sinh), _even(np.cosh, 1.0)


def _asinh(a: Pair) -> tuple[Pair, Pair, Pair]:
    slope = raised(_larger_by_square(a), -0.5)[0]
    return _rising(np.arcsinh)(a), slope, neg(mul(a, mul(slope, square(slope))))


def _exp2(a: Pair) -> tuple[Pair, Pair, Pair]:
    log2 = (np.asarray(np.log(2.0) * (1 - _EPS)), np.asarray(np.log(2.0) * (1 + _EPS)))
    value = _rising(np.exp2)(a)
    return value, mul(log2, value), mul(log2, mul(log2, value))


def _cbrt(a: Pair) -> tuple[Pair, Pair, Pair]:
    value = _rising(np.cbrt)(a)
    slope = reciprocal(mul((np.asarray(3.0),) * 2, square(value)))[0]
    return value, slope, neg(mul(mul(_TWO, square(slope)), reciprocal(value)[0]))


def _square(a: Pair) -> tuple[Pair, Pair, Pair]:
    full = np.full_like(a[0], 2.0)
    return square(a), mul(_TWO, a), (full, full)


def _less_square(a: Pair) -> tuple[Pair, Pair, Pair]:
    value, slope, curvature = _square(a)
    return add(_ONE, neg(value)), neg(slope), neg(curvature)


_COS, _SIN = _wave(0.0), _wave(np.pi / 2)

OUTSIDE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "log": lambda lo: lo <= 0, "log1p": lambda lo: lo <= -1, "sqrt": lambda lo: lo < 0, "rsqrt": lambda lo: lo <= 0,
}  # fmt: skip
SMOOTH: dict[str, Callable[[Pair], tuple[Pair, Pair, Pair]]] = {
    "tanh": _tanh, "logistic": _logistic, "erf": _erf, "erfc": _erfc, "exp": _exp,
    "expm1": lambda a: (_rising(np.expm1)(a), _EXP(a), _EXP(a)),
    "exp2": _exp2, "atan": _atan, "asinh": _asinh, "cbrt": _cbrt, "one_minus_square": _less_square,
    "sinh": lambda a: (_SINH(a), _COSH(a), _SINH(a)),
    "cosh": lambda a: (_COSH(a), _SINH(a), _COSH(a)),
    "log": _log,
    "log1p": _log1p,
    "sqrt": lambda a: raised(a, 0.5),
    "rsqrt": lambda a: raised(a, -0.5),
    "sin": lambda a: (_SIN(a), _COS(a), neg(_SIN(a))),
    "cos": lambda a: (_COS(a), neg(_SIN(a)), neg(_COS(a))),
}  # fmt: skip
