"""Proven ranges of a branch's outputs and of their derivatives over boxes of parameters.

`extension(f, example)` opens f once and returns a function of boxes, itself traceable, so that it can be jitted and
vmapped.  Every operation has rules of its own for the value and the derivatives, on what is computed: a derivative that
a program claims for itself (`custom_jvp`, `stop_gradient`) is not used.  What may jump inside the box (`sign`, `floor`,
a comparison, a cast to integers) has the hull of both sides as value and the whole line as derivative.  Where f may be
undefined on the box (the logarithm of a number that may be 0), the result is the whole line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualgap_jax.duality.bounding import intervals, jets
from dualgap_jax.duality.bounding.choices import ARRANGING, CHOICES, arranged
from dualgap_jax.duality.bounding.elementary import FUNCTIONS
from dualgap_jax.duality.bounding.intervals import Interval, constant, is_float
from dualgap_jax.duality.bounding.jets import Jet, Order
from dualgap_jax.duality.bounding.rules import ARITHMETIC, Rule, Run, UnsupportedPrimitiveError
from dualgap_jax.duality.programs import COMPARISONS, Atom, Equation, Known, Program, remedy, trace

_LONGEST_SCAN = 256


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


_RULES: dict[str, Rule] = {**ARITHMETIC, **CHOICES}
_ON_TRUTHS = {*COMPARISONS, "and", "or", "not", "select_n", "convert_element_type", "stop_gradient", "copy"}
_KINKS = {
    "max", "min", "clamp", "sign", "select_n", "reduce_max", "reduce_min", "reduce_window_max", "cummax", "cummin",
    "sort", "gt", "ge", "lt", "le", "eq", "ne", "floor", "ceil", "round", "is_finite", "convert_element_type",
    "reduce_precision", *(name for name, f in FUNCTIONS.items() if not f.smooth),
}  # fmt: skip


def _known(equation: Equation, args: list[Jet]) -> bool:
    """Whether an operation has known operands and gives what is exact: integers, truth values, sorted numbers."""
    floats = [s for s in equation.shapes if not jnp.issubdtype(s.dtype, jnp.integer) and s.dtype != bool]
    return all(x.value.exact for x in args) and (not floats or equation.name == "sort")


def _scan(run: Run, equation: Equation, args: list[Jet]) -> list[Jet]:
    """A loop of known length, one step after another."""
    p = equation.params
    body, length = p["jaxpr"], p["length"]
    if length > _LONGEST_SCAN:
        raise UnsupportedPrimitiveError(
            f"a scan of {length} steps is too long for interval rules; up to {_LONGEST_SCAN}."
        )
    if "num_consts" in p:
        fixed, moving = p["num_consts"], p["num_carry"]
    else:  # JAX 0.12 on: trees of constants, carry and rows
        fixed, moving, _ = map(len, p["ft_in"].unpack())
    consts, carry, rows = args[:fixed], args[fixed : fixed + moving], args[fixed + moving :]
    outputs: list[list[Jet]] = []
    for t in range(length)[:: -1 if p["reverse"] else 1]:
        results = _evaluate(run, body, [*consts, *carry, *(jets.taken(row, t, 0) for row in rows)])
        carry = results[:moving]
        outputs.append(results[moving:])
    if p["reverse"]:
        outputs.reverse()
    return [*carry, *(jets.stacked(run.order, list(column)) for column in zip(*outputs, strict=True))]


def _apply(run: Run, equation: Equation, args: list[Jet]) -> list[Jet]:
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
    exact = name in ARRANGING and all(x.value.exact for x in args)
    if name not in ("select_n", "convert_element_type", "copy", "stop_gradient") and not exact:
        for x in args:  # only a constant can be NaN
            if x.value.exact and is_float(x.value.lo):
                run.undefined(jnp.isnan(x.value.lo))
    if name in ARRANGING:
        return arranged(run, equation, args)
    if name not in _RULES:
        raise UnsupportedPrimitiveError(_sentence({name}))
    if name not in _ON_TRUTHS | {"sort"} and not all(is_float(x.value.lo) for x in args):
        raise UnsupportedPrimitiveError(
            f"{name} of integers or truth values that depend on the weights has no interval rule."
        )
    return [_RULES[name](run, equation, args)]


def _evaluate(run: Run, program: Program, args: list[Jet]) -> list[Jet]:
    known: dict[int, Jet] = dict(zip(program.inputs, args, strict=True))

    def read(atom: Atom) -> Jet:
        return Jet(constant(atom.value)) if isinstance(atom, Known) else known[atom]

    for equation in program.equations:
        results = _apply(run, equation, [read(a) for a in equation.inputs])
        known.update(zip(equation.outputs, results, strict=True))
    return [read(a) for a in program.outputs]


def _sentence(names: set[str]) -> str:
    rules = sorted({*_RULES, *ARRANGING, "scan"})
    return f"no interval rule for {', '.join(sorted(names))}; there are rules for {', '.join(rules)}.{remedy(names)}"


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
    names = program.primitives(dependent=True) - {*_RULES, *ARRANGING, "scan"}
    if names:
        raise UnsupportedPrimitiveError(_sentence(names))
    tree, count = jax.tree.structure(shape), Order(order, example.size)

    def extended(lo: Array, hi: Array) -> Range:
        run = Run(count)
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
