"""Ranges of a branch's objective and its derivatives in NumPy, for `verify`: a second implementation, on purpose.

Arrays of ranges have two leading axes, `[boxes, derivatives, ...]`, 1 long where nothing depends on them.  Every
operation is rounded outward by `nextafter`; sums of k terms by `(k + 1) eps` times the sum of sizes; exponentials and
the like by 8 units in the last place, which holds for the C library and for NumPy's own loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from dualgap_jax.duality.problem import Problem

_EPS = float(np.finfo(np.float64).eps)
_LEAST = 1e-300
Pair = tuple[np.ndarray, np.ndarray]


class Unsupported(NotImplementedError):
    """A branch with operations that are not known here."""


class Ranges(NamedTuple):
    """Of boxes `[n]`: bounds on g, its slopes `[n, p]` and second derivatives `[n, p, p]`; whether g has no kinks."""

    lower: np.ndarray
    upper: np.ndarray
    first: Pair
    second: Pair
    smooth: bool


class _Jet(NamedTuple):
    value: Pair  # [n or 1, 1, ...]
    first: Pair | None = None  # [n or 1, p, ...]
    second: Pair | None = None  # [n or 1, pairs, ...]


def _out(lo: np.ndarray, hi: np.ndarray, ulps: int = 1) -> Pair:
    if ulps > 1:
        lo, hi = lo - ulps * _EPS * np.abs(lo) - _LEAST, hi + ulps * _EPS * np.abs(hi) + _LEAST
    lo, hi = np.nextafter(lo, -np.inf), np.nextafter(hi, np.inf)
    return np.where(np.isnan(lo), -np.inf, lo), np.where(np.isnan(hi), np.inf, hi)


def _add(a: Pair, b: Pair) -> Pair:
    return _out(a[0] + b[0], a[1] + b[1])


def _neg(a: Pair) -> Pair:
    return -a[1], -a[0]


def _mul(a: Pair, b: Pair) -> Pair:
    four = np.stack(np.broadcast_arrays(a[0] * b[0], a[0] * b[1], a[1] * b[0], a[1] * b[1]))
    unknown = np.isnan(four).any(0)
    lo, hi = _out(four.min(0), four.max(0))
    return np.where(unknown, -np.inf, lo), np.where(unknown, np.inf, hi)


def _square(a: Pair) -> Pair:
    lo, hi = _mul(a, a)
    return np.where((a[0] > 0) | (a[1] < 0), np.maximum(lo, 0), 0.0), hi


def _summed(a: Pair, axes: tuple[int, ...]) -> Pair:
    terms = int(np.prod([a[0].shape[k] for k in axes]))
    size = (terms + 1) * _EPS * np.maximum(np.abs(a[0]), np.abs(a[1])).sum(axes) + _LEAST
    return _out(a[0].sum(axes) - size, a[1].sum(axes) + size)


def _plus(a: Pair | None, b: Pair | None) -> Pair | None:
    return a if b is None else b if a is None else _add(a, b)


def _hull(a: Pair, b: Pair) -> Pair:
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
    return lambda a: _out(f(a[0]), f(a[1]), 8)


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
    slope = _mul(constant, _EXP(_neg(_square(a))))
    return slope, _mul(_mul((np.asarray(-2.0), np.asarray(-2.0)), a), slope)


def _erf(a: Pair) -> tuple[Pair, Pair, Pair]:
    return _bound_to(_ERF(a), -1, 1), *_bell(a)


def _erfc(a: Pair) -> tuple[Pair, Pair, Pair]:
    value = _rising(lambda x: -special.erfc(x))(a)
    slope, curvature = _bell(a)
    return _neg(value), _neg(slope), _neg(curvature)


def _exp(a: Pair) -> tuple[Pair, Pair, Pair]:
    return _EXP(a), _EXP(a), _EXP(a)


_SMOOTH: dict[str, Callable[[Pair], tuple[Pair, Pair, Pair]]] = {
    "tanh": _tanh, "logistic": _logistic, "erf": _erf, "erfc": _erfc, "exp": _exp,
}  # fmt: skip


class Walker:
    """`(lo [n, p], hi [n, p]) -> Ranges` of a problem's objective, by walking through the branch's jaxpr."""

    def __init__(self, problem: Problem) -> None:
        with jax.enable_x64(True):
            self._closed = jax.make_jaxpr(problem.outputs)(jnp.zeros(problem.size, jnp.float64))
        self._problem, self.size = problem, problem.size
        self._i, self._j = np.triu_indices(problem.size)
        self._smooth = True

    def __call__(self, lo: np.ndarray, hi: np.ndarray) -> Ranges:
        """The ranges over boxes, or at points."""
        n, p = lo.shape
        self._smooth = True
        unit = np.eye(p)[None]
        with np.errstate(all="ignore"):
            jet = self._objective(_Jet((lo[:, None], hi[:, None]), (unit, unit)))
            lower, upper = (np.broadcast_to(e[:, 0], n) for e in jet.value)
            first, flat = self._full(jet.first, p, n), self._full(jet.second, len(self._i), n)
        where = np.zeros((p, p), int)
        where[self._i, self._j] = where[self._j, self._i] = np.arange(len(self._i))
        return Ranges(lower, upper, first, (flat[0][:, where], flat[1][:, where]), self._smooth)

    @np.errstate(all="ignore")
    def upper(self, w: np.ndarray) -> np.ndarray:
        """Upper bounds on g at points `[n, p]`."""
        return np.broadcast_to(self._objective(_Jet((w[:, None], w[:, None]))).value[1][:, 0], len(w))

    @np.errstate(all="ignore")
    def outputs(self, w: np.ndarray) -> Pair:
        """The ranges `[n, ...]` of the branch's outputs at points `[n, p]`."""
        lo, hi = self._walk(self._closed, [_Jet((w[:, None], w[:, None]))])[0].value
        return lo[:, 0], hi[:, 0]

    def _objective(self, w: _Jet) -> _Jet:
        (f,) = self._walk(self._closed, [w])
        c = self._problem.c[None, None]
        offset, scale = np.asarray(self._problem.offset), np.float64(len(c[0, 0])) * self._problem.tau
        jet = self._linear(lambda a: _summed(_mul(a, (c, c)), (2, 3)), f)
        jet = self._linear(lambda a: _neg(_out(a[0] / scale, a[1] / scale, 4)), jet)
        return jet._replace(value=_add((offset, offset), jet.value))

    @staticmethod
    def _full(part: Pair | None, count: int, n: int) -> Pair:
        lo, hi = part or (np.zeros(1), np.zeros(1))
        return np.broadcast_to(lo, (n, count)), np.broadcast_to(hi, (n, count))

    def _walk(self, closed: Any, args: list[_Jet]) -> list[_Jet]:
        known: dict[Any, _Jet] = dict(zip(closed.jaxpr.invars, args, strict=True))
        known.update(zip(closed.jaxpr.constvars, map(self._constant, closed.consts), strict=True))
        for equation in closed.jaxpr.eqns:
            inputs = [self._constant(a.val) if hasattr(a, "val") else known[a] for a in equation.invars]
            inner = [equation.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in equation.params]
            if inner and equation.primitive.name not in ("scan", "while", "cond"):
                body = inner[0] if hasattr(inner[0], "consts") else jax.extend.core.ClosedJaxpr(inner[0], ())
                results = self._walk(body, inputs)
            elif equation.primitive.name == "split":
                results = self._parts(equation.params, inputs[0])
            else:
                results = [self._step(equation, inputs)]
            known.update(zip(equation.outvars, results, strict=True))
        return [self._constant(a.val) if hasattr(a, "val") else known[a] for a in closed.jaxpr.outvars]

    @staticmethod
    def _constant(value: Any) -> _Jet:
        array = np.asarray(value)
        if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
            raise Unsupported(f"a constant of type {array.dtype}, or not finite, is not known to the checker.")
        array = array.astype(np.float64)[None, None]
        return _Jet((array, array))

    @staticmethod
    def _linear(f: Callable[[Pair], Pair], x: _Jet) -> _Jet:
        return _Jet(f(x.value), None if x.first is None else f(x.first), None if x.second is None else f(x.second))

    def _product(self, f: Callable[[Pair, Pair], Pair], a: _Jet, b: _Jet) -> _Jet:
        first = _plus(
            None if a.first is None else f(a.first, b.value), None if b.first is None else f(a.value, b.first)
        )
        second = _plus(
            None if a.second is None else f(a.second, b.value), None if b.second is None else f(a.value, b.second)
        )
        if a.first is not None and b.first is not None:
            for i, j in ((self._i, self._j), (self._j, self._i)):
                left, right = ((e[0][:, k], e[1][:, k]) for e, k in ((a.first, i), (b.first, j)))
                second = _plus(second, f(left, right))
        return _Jet(f(a.value, b.value), first, second)

    def _through(self, value: Pair, slope: Pair, curvature: Pair, x: _Jet) -> _Jet:
        if x.first is None:
            return _Jet(value)
        lo, hi = x.first
        i, j = self._i, self._j
        outer = _mul((lo[:, i], hi[:, i]), (lo[:, j], hi[:, j]))
        own = np.reshape(i == j, (1, -1, *[1] * (lo.ndim - 2)))
        squares = _square((lo[:, i], hi[:, i]))
        outer = np.where(own, squares[0], outer[0]), np.where(own, squares[1], outer[1])
        second = _plus(_mul(curvature, outer), None if x.second is None else _mul(slope, x.second))
        return _Jet(value, _mul(slope, x.first), second)

    def _larger(self, a: _Jet, b: _Jet) -> _Jet:
        value = np.maximum(a.value[0], b.value[0]), np.maximum(a.value[1], b.value[1])
        if a.first is None and b.first is None:
            return _Jet(value)
        self._smooth = False
        only_a, only_b = a.value[0] >= b.value[1], b.value[0] >= a.value[1]

        def merged(x: Pair | None, y: Pair | None, count: int, kink: bool) -> Pair:
            zero = np.zeros((1, count, *[1] * (value[0].ndim - 2)))
            x, y = x or (zero, zero), y or (zero, zero)
            both = _hull(x, y) if not kink else (np.asarray(-np.inf), np.asarray(np.inf))
            lo, hi = (np.where(only_a, x[e], np.where(only_b, y[e], both[e])) for e in (0, 1))
            return lo, hi

        return _Jet(value, merged(a.first, b.first, self.size, False), merged(a.second, b.second, len(self._i), True))

    def _power(self, x: _Jet, y: int) -> _Jet:
        if y < 1:
            raise Unsupported(f"integer_pow with exponent {y} is not known to the checker.")
        one = np.ones((1, 1, *[1] * (x.value[0].ndim - 2)))
        powers = [(one, one)]
        for k in range(1, y + 1):
            half = powers[k // 2]
            powers.append(_square(half) if k % 2 == 0 else _mul(powers[k - 1], x.value))
        slope = _mul((float(y) * one, float(y) * one), powers[y - 1])
        bend = float(y * (y - 1)) * one
        return self._through(powers[y], slope, _mul((bend, bend), powers[max(y - 2, 0)]), x)

    def _step(self, equation: Any, args: list[_Jet]) -> _Jet:
        name, p = equation.primitive.name, equation.params
        if name in ("add", "sub", "add_any"):
            b = args[1] if name != "sub" else self._linear(_neg, args[1])
            shape = equation.outvars[0].aval.shape
            a, b = self._spread(args[0], shape), self._spread(b, shape)
            return _Jet(_add(a.value, b.value), _plus(a.first, b.first), _plus(a.second, b.second))
        if name in ("mul", "max", "min"):
            a, b = (self._spread(x, equation.outvars[0].aval.shape) for x in args)
            if name == "mul":
                same = equation.invars[0] is equation.invars[1]
                return self._power(a, 2) if same else self._product(_mul, a, b)
            if name == "min":
                a, b = self._linear(_neg, a), self._linear(_neg, b)
                return self._linear(_neg, self._larger(a, b))
            return self._larger(a, b)
        if name == "div" and args[1].first is None and not ((args[1].value[0] <= 0) & (args[1].value[1] >= 0)).any():
            inverse = _out(1 / args[1].value[1], 1 / args[1].value[0])
            by = self._spread(_Jet(inverse), equation.outvars[0].aval.shape)
            return self._product(_mul, self._spread(args[0], equation.outvars[0].aval.shape), by)
        if name == "neg":
            return self._linear(_neg, args[0])
        if name == "abs":
            return self._larger(args[0], self._linear(_neg, args[0]))
        if name in ("integer_pow", "square"):
            return self._power(args[0], p.get("y", 2))
        if name in _SMOOTH:
            return self._through(*_SMOOTH[name](args[0].value), args[0])
        if name in ("stop_gradient", "copy", "optimization_barrier"):
            return args[0]
        if name == "convert_element_type" and equation.outvars[0].aval.dtype == np.float64:
            return args[0]
        if name == "reduce_sum":
            return self._linear(lambda a: _summed(a, tuple(k + 2 for k in p["axes"])), args[0])
        if name == "dot_general":
            return self._product(lambda a, b: _dot(a, b, p["dimension_numbers"]), *args)
        if name == "concatenate":
            return self._joined(args, p["dimension"] + 2)
        move = _MOVES.get(name)
        if move is None or len(args) != 1:
            raise Unsupported(f"the operation {name} is not known to the checker.")
        shape = equation.outvars[0].aval.shape
        return self._linear(lambda a: (move(a[0], p, shape), move(a[1], p, shape)), args[0])

    def _parts(self, p: Any, x: _Jet) -> list[_Jet]:
        axis, stops = p["axis"] + 2, np.cumsum(p["sizes"])

        def cut(e: np.ndarray, stop: int, size: int) -> np.ndarray:
            return e[(*[slice(None)] * axis, slice(stop - size, stop))]

        return [
            self._linear(lambda a, t=stop, s=size: (cut(a[0], t, s), cut(a[1], t, s)), x)  # type: ignore[misc]
            for stop, size in zip(stops.tolist(), p["sizes"], strict=True)
        ]

    def _joined(self, args: list[_Jet], axis: int) -> _Jet:
        def together(parts: list[Pair | None], count: int) -> Pair | None:
            if all(part is None for part in parts):
                return None
            zeros = [np.zeros((1, count, *x.value[0].shape[2:])) for x in args]
            full = [part or (zero, zero) for part, zero in zip(parts, zeros, strict=True)]
            n = max(lo.shape[0] for lo, _ in full)
            lo, hi = (np.concatenate([np.broadcast_to(f[e], (n, *f[e].shape[1:])) for f in full], axis) for e in (0, 1))
            return lo, hi

        value = together([x.value for x in args], 1)
        assert value is not None
        seconds = together([x.second for x in args], len(self._i))
        return _Jet(value, together([x.first for x in args], self.size), seconds)

    def _spread(self, x: _Jet, shape: tuple[int, ...]) -> _Jet:
        """Operands as they are where they have all axes, some perhaps of length 1; a single number gets the axes."""
        if x.value[0].ndim - 2 == len(shape):
            return x
        return self._linear(lambda a: tuple(e.reshape(*e.shape[:2], *[1] * len(shape)) for e in a), x)  # type: ignore[arg-type, return-value]


def _dot(a: Pair, b: Pair, numbers: Any) -> Pair:
    (ca, cb), (ba, bb) = numbers
    free_a = [k for k in range(a[0].ndim - 2) if k not in (*ca, *ba)]
    free_b = [k for k in range(b[0].ndim - 2) if k not in (*cb, *bb)]

    def arranged(e: np.ndarray, batch: Any, free: list[int], inner: Any, before: int, after: int) -> np.ndarray:
        order = [0, 1, *(k + 2 for k in (*batch, *free, *inner))]
        moved = e.transpose(order)
        first, last = moved.shape[: 2 + len(batch)], moved.shape[2 + len(batch) :]
        return moved.reshape(*first, *[1] * before, *last[: len(free)], *[1] * after, *last[len(free) :])

    left = [arranged(e, ba, free_a, ca, 0, len(free_b)) for e in a]
    right = [arranged(e, bb, free_b, cb, len(free_a), 0) for e in b]
    terms = _mul((left[0], left[1]), (right[0], right[1]))
    return _summed(terms, tuple(range(terms[0].ndim - len(ca), terms[0].ndim))) if ca else terms


def _broadcast(e: np.ndarray, p: Any, shape: Any) -> np.ndarray:
    full = [1] * len(shape)
    for axis, place in enumerate(p["broadcast_dimensions"]):
        full[place] = e.shape[2 + axis]
    return np.broadcast_to(e.reshape(*e.shape[:2], *full), (*e.shape[:2], *shape))


def _sliced(e: np.ndarray, p: Any, shape: Any) -> np.ndarray:
    steps = p["strides"] or (1,) * len(shape)
    cuts = [slice(a, b, s) for a, b, s in zip(p["start_indices"], p["limit_indices"], steps, strict=True)]
    return e[(slice(None), slice(None), *cuts)]


def _reshaped(e: np.ndarray, p: Any, shape: Any) -> np.ndarray:
    return e.reshape(*e.shape[:2], *shape)


_MOVES: dict[str, Callable[[np.ndarray, Any, Any], np.ndarray]] = {
    "reshape": _reshaped,
    "squeeze": _reshaped,
    "expand_dims": _reshaped,
    "broadcast_in_dim": _broadcast,
    "slice": _sliced,
    "transpose": lambda e, p, shape: e.transpose(0, 1, *(k + 2 for k in p["permutation"])),
    "rev": lambda e, p, shape: np.flip(e, tuple(k + 2 for k in p["dimensions"])),
}
