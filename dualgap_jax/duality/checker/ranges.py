"""Ranges of a branch's objective and its derivatives in NumPy, for `verify`: a second implementation, on purpose.

Arrays of ranges have two leading axes, `[boxes, derivatives, ...]`, 1 long where nothing depends on them.  Every
operation is rounded outward by one or two units in the last place; sums of k terms by `(k + 1) eps` times the sum of
sizes; exponentials and the like by 8 units in the last place, which holds for the C library and for NumPy's own loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dualgap_jax.duality.checker.choices import Value, chosen, constant
from dualgap_jax.duality.checker.jets import Calculus, Jet, Truth, linear
from dualgap_jax.duality.checker.pairs import Pair, Unsupported, add, mul, neg, out, summed
from dualgap_jax.duality.checker.rules import applied, entry, stacked
from dualgap_jax.duality.problem import Problem
from dualgap_jax.duality.programs import INNER

_LONGEST_SCAN = 256
_NUMBERS = 2**16


class Ranges(NamedTuple):
    """Of boxes `[n]`: bounds on g, its slopes `[n, p]` and second derivatives `[n, p, p]`; whether g has no kinks."""

    lower: np.ndarray
    upper: np.ndarray
    first: Pair
    second: Pair
    smooth: bool


def batch(problem: Problem) -> int:
    """How many boxes at a time are quickest: arrays of second derivatives then stay in the cache."""
    pairs = problem.size * (problem.size + 1) // 2
    return min(max(_NUMBERS // (problem.c.size * pairs), 4), 256)


class Walker:
    """`(lo [n, p], hi [n, p]) -> Ranges` of a problem's objective, by walking through the branch's jaxpr.

    With a `function` of flat weights it is that one, in place of g.  It is quickest for `batch` boxes at a time.
    """

    def __init__(self, problem: Problem, function: Callable[[jax.Array], jax.Array] | None = None) -> None:
        with jax.enable_x64(True):
            self._closed = jax.make_jaxpr(function or problem.outputs)(jnp.zeros(problem.size, jnp.float64))
        self._problem, self.size, self._direct = problem, problem.size, function is not None
        self._calculus = Calculus(problem.size)
        self.batch = batch(problem)

    def __call__(self, lo: np.ndarray, hi: np.ndarray, curved: bool = True) -> Ranges:
        """The ranges over boxes, or at points; unless `curved` those of second derivatives are the whole line."""
        n, p = lo.shape
        unit = np.eye(p)[None]
        calculus = self._calculus = Calculus(p, None if curved else np.zeros((2, 0), int))
        with np.errstate(all="ignore"):
            jet = self._objective(Jet((lo[:, None], hi[:, None]), (unit, unit)))
            lower, upper = (np.broadcast_to(e[:, 0], n) for e in jet.value)
            first, flat = self._full(jet.first, p, n), self._full(jet.second, len(calculus.i), n)
        if not curved:
            whole = np.full((n, p, p), np.inf)
            return Ranges(lower, upper, first, (-whole, whole), calculus.smooth)
        where = np.zeros((p, p), int)
        where[calculus.i, calculus.j] = where[calculus.j, calculus.i] = np.arange(len(calculus.i))
        return Ranges(lower, upper, first, (flat[0][:, where], flat[1][:, where]), calculus.smooth)

    @np.errstate(all="ignore")
    def upper(self, w: np.ndarray) -> np.ndarray:
        """Upper bounds on g at points `[n, p]`."""
        return np.broadcast_to(self._objective(Jet((w[:, None], w[:, None]))).value[1][:, 0], len(w))

    @np.errstate(all="ignore")
    def outputs(self, lo: np.ndarray, hi: np.ndarray | None = None) -> Pair:
        """The ranges `[n, ...]` of what the branch, or the function, gives on boxes, or at points `[n, p]`."""
        hi = lo if hi is None else hi
        low, high = self._results(Jet((lo[:, None], hi[:, None]))).value
        return low[:, 0], high[:, 0]

    def _results(self, w: Jet) -> Jet:
        """What the program gives; on boxes where it may be undefined that is anything."""
        self._calculus.begin(len(w.value[0]))
        (f,) = self._walk(self._closed, [w])
        if not isinstance(f, Jet):
            raise Unsupported("a result that is no number is not known to the checker.")
        if not self._calculus.bad.any():
            return f
        bad = self._calculus.bad.reshape(-1, *[1] * (f.value[0].ndim - 1))
        self._calculus.smooth = False

        def unknown(a: Pair) -> Pair:
            return np.where(bad, -np.inf, a[0]), np.where(bad, np.inf, a[1])

        zero = np.zeros((1, 1, *f.value[0].shape[2:]))
        counts = (self.size, len(self._calculus.i))
        parts = [d or (zero.repeat(k, 1), zero.repeat(k, 1)) for d, k in zip(f[1:], counts, strict=True)]
        return Jet(unknown(f.value), *(unknown(d) for d in parts))

    def _objective(self, w: Jet) -> Jet:
        f = self._results(w)
        if self._direct:
            return f
        c = self._problem.c[None, None]
        offset, scale = np.asarray(self._problem.offset), np.float64(len(c[0, 0])) * self._problem.tau
        jet = linear(lambda a: summed(mul(a, (c, c)), (2, 3)), f)
        jet = linear(lambda a: neg(out(a[0] / scale, a[1] / scale, 4)), jet)
        return jet._replace(value=add((offset, offset), jet.value))

    @staticmethod
    def _full(part: Pair | None, count: int, n: int) -> Pair:
        lo, hi = part or (np.zeros(1), np.zeros(1))
        return np.broadcast_to(lo, (n, count)), np.broadcast_to(hi, (n, count))

    def _walk(self, closed: Any, args: list[Value]) -> list[Value]:
        known: dict[Any, Value] = dict(zip(closed.jaxpr.invars, args, strict=True))
        known.update(zip(closed.jaxpr.constvars, map(constant, closed.consts), strict=True))

        def read(atom: Any) -> Value:
            return constant(atom.val) if hasattr(atom, "val") else known[atom]

        for equation in closed.jaxpr.eqns:
            inputs = [read(a) for a in equation.invars]
            name = equation.primitive.name
            keys = ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in INNER else ()  # others do not just run it
            inner = [equation.params[k] for k in keys if k in equation.params]
            if name == "scan":
                results = self._scan(equation.params, inputs)
            elif name == "cond":
                results = self._cond(equation, inputs)
            elif inner:
                body = inner[0] if hasattr(inner[0], "consts") else jax.extend.core.ClosedJaxpr(inner[0], ())
                results = self._walk(body, inputs)
            else:
                results = applied(self._calculus, equation, inputs)
            known.update(zip(equation.outvars, results, strict=True))
        return [read(a) for a in closed.jaxpr.outvars]

    def _cond(self, equation: Any, args: list[Value]) -> list[Value]:
        """One of several branches: what is undefined in one counts on the boxes that may take it."""
        which, *operands = args
        branches = equation.params["branches"]
        if isinstance(which, np.ndarray):
            return self._walk(branches[min(max(int(which), 0), len(branches) - 1)], operands)
        if not isinstance(which, Truth) or len(branches) != 2:
            raise Unsupported("a cond by a number that depends on the weights is not known to the checker.")
        bad, results = self._calculus.bad, []
        for branch, may in zip(branches, (~which.lo, which.hi), strict=True):
            self._calculus.bad = np.zeros_like(bad)
            results.append(self._walk(branch, operands))
            bad = bad | self._calculus.bad & may.any(axis=tuple(range(1, may.ndim)))
        self._calculus.bad = bad
        shapes = [v.aval.shape for v in equation.outvars]
        return [chosen(self._calculus, which, [*r], s) for *r, s in zip(*results, shapes, strict=True)]

    def _scan(self, p: Any, args: list[Value]) -> list[Value]:
        """A loop of known length, one step after another."""
        consts, carry = args[: p["num_consts"]], args[p["num_consts"] :][: p["num_carry"]]
        rows, columns = args[p["num_consts"] + p["num_carry"] :], []
        if p["length"] > _LONGEST_SCAN:
            raise Unsupported(f"a scan of {p['length']} steps is too long for the checker.")
        for t in range(p["length"])[:: -1 if p["reverse"] else 1]:
            found = self._walk(p["jaxpr"], [*consts, *carry, *(entry(row, t) for row in rows)])
            carry = found[: p["num_carry"]]
            columns.append(found[p["num_carry"] :])
        if p["reverse"]:
            columns.reverse()
        return [*carry, *(stacked(self._calculus, list(column)) for column in zip(*columns, strict=True))]
