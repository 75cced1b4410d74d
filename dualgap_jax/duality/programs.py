"""A function as a flat list of primitive operations, all calls opened: what is bounded is what is computed.

`custom_jvp`, `custom_vjp`, `jit` and `checkpoint` are replaced by the operations inside them, so the derivative that a
program claims for itself plays no part.  `cond` and `switch` become a choice among the results of all their branches.
The bodies of `scan` stay apart, as programs of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.extend.core import ClosedJaxpr

INNER = (
    "pjit",
    "jit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "remat",
    "remat2",
    "checkpoint",
)
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "gt": lambda a, b: bool(a > b),
    "ge": lambda a, b: bool(a >= b),
    "lt": lambda a, b: bool(a < b),
    "le": lambda a, b: bool(a <= b),
    "eq": lambda a, b: bool(a == b),
    "ne": lambda a, b: bool(a != b),
}


KNOWN, MEETS, JUMPS = range(3)

REMEDIES = {
    "while": "give the loop a known number of rounds: lax.fori_loop with bounds that are Python integers, or lax.scan",
    "sort": "sort one array of floats alone, by jnp.sort; an order by other keys that the weights decide has no rule",
    "top_k": "write jnp.sort(x)[..., -k:]",
    "argmax": "write a maximum or a softmax: a place that the weights decide has no slope",
    "argmin": "write a minimum or a softmax: a place that the weights decide has no slope",
    "atan2": "write jnp.arctan(y / x) where x is not 0 on W",
    "tan": "write jnp.sin(x) / jnp.cos(x)",
    "atanh": "write 0.5 * (jnp.log1p(x) - jnp.log1p(-x))",
    "asin": "write jnp.arctan(x / jnp.sqrt(1 - x * x))",
    "acos": "write jnp.pi / 2 - jnp.arctan(x / jnp.sqrt(1 - x * x))",
    "acosh": "write jnp.log(x + jnp.sqrt(x * x - 1))",
    "erf_inv": "write the branch in terms of erf or of its inverse's argument",
    "rem": "write x - d * jnp.floor(x / d)",
    "scatter": "write jnp.concatenate, or jnp.where with a constant mask",
    "scatter-add": "write a product with a constant matrix of zeros and ones",
}


def remedy(names: set[str]) -> str:
    """What to write instead of operations without a rule, as sentences; nothing where there is no advice."""
    return "".join(f"  In place of {name}: {REMEDIES[name]}." for name in sorted(names) if name in REMEDIES)


class Known(NamedTuple):
    """A literal or a constant array of a program."""

    value: Any


Atom = int | Known


class Equation(NamedTuple):
    """One operation: numbers stand for the values of a program, in the order in which they are computed.

    Attributes:
      primitive: the JAX primitive.
      name: its name; 'logaddexp' for the operations of `jnp.logaddexp`, taken together.
      inputs, outputs: what it reads and writes.
      params: of the primitive; for 'scan' its `jaxpr` is a `Program`.
      shapes: shape and dtype of the outputs.
      depends: whether one of the inputs depends on the program's own inputs.
      choice: of a `select_n`: KNOWN if the weights do not decide it, MEETS if both cases are proven to agree where it
        changes, and else JUMPS.
    """

    primitive: Any
    name: str
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    params: dict[str, Any]
    shapes: tuple[Any, ...]
    depends: bool
    choice: int


class Program(NamedTuple):
    """Operations in order; `inputs` and `outputs` are values or constants."""

    equations: tuple[Equation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[Atom, ...]

    def primitives(self, *, dependent: bool = False) -> set[str]:
        """The names of the operations, also in the bodies of scans; if asked, of those alone that the inputs decide."""
        names = set()
        for equation in self.equations:
            if dependent and not (equation.depends and (equation.name != "select_n" or equation.choice != KNOWN)):
                continue
            names.add(equation.name)
            if equation.name == "scan":
                names |= equation.params["jaxpr"].primitives(dependent=dependent)
        return names


class _Builder:
    """Opens a jaxpr into equations over numbered values."""

    def __init__(self) -> None:
        self.equations: list[Equation] = []
        self.makers: dict[int, Equation] = {}
        self.dependent: set[int] = set()
        self.count = 0

    def new(self, dependent: bool) -> int:
        self.count += 1
        if dependent:
            self.dependent.add(self.count)
        return self.count

    def open(self, jaxpr: Any, consts: Any, args: list[Atom]) -> list[Atom]:
        known: dict[Any, Atom] = dict(zip(jaxpr.constvars, map(Known, consts), strict=True))
        known.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Atom:
            return Known(atom.val) if hasattr(atom, "val") else known[atom]

        for equation in jaxpr.eqns:
            name, inputs = equation.primitive.name, [read(a) for a in equation.invars]
            if name in INNER and not _is_logaddexp(equation):
                inner = _inner(equation)
                results = self.open(inner.jaxpr, inner.consts, inputs)
                known.update(zip(equation.outvars, results, strict=True))
                continue
            if name == "cond":
                known.update(zip(equation.outvars, self._branches(equation, inputs), strict=True))
                continue
            params = dict(equation.params)
            if name == "scan":
                params["jaxpr"] = _body(params["jaxpr"])
            elif name in INNER:
                name, params = "logaddexp", {}
            shapes = tuple(v.aval for v in equation.outvars)
            outputs = self._append(equation.primitive, name, inputs, params, shapes)
            known.update(zip(equation.outvars, outputs, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def _append(
        self, primitive: Any, name: str, inputs: list[Atom], params: dict[str, Any], shapes: tuple[Any, ...]
    ) -> tuple[int, ...]:
        """The numbers of an operation's results."""
        depends = any(a in self.dependent for a in inputs if isinstance(a, int))
        outputs = tuple(self.new(depends) for _ in shapes)
        choice = self._choice(inputs) if name == "select_n" else KNOWN
        made = Equation(primitive, name, tuple(inputs), outputs, params, shapes, depends, choice)
        self.equations.append(made)
        self.makers.update((number, made) for number in outputs)
        return outputs

    def _branches(self, equation: Any, inputs: list[Atom]) -> list[Atom]:
        """The results of a `cond`: of the branch that is known, or a choice among those of all branches."""
        which, *operands = inputs
        branches = equation.params["branches"]
        if isinstance(which, Known):
            taken = branches[min(max(int(np.asarray(which.value)), 0), len(branches) - 1)]
            return self.open(taken.jaxpr, taken.consts, list(operands))
        made = self.makers.get(which)
        if made is not None and made.name == "convert_element_type" and len(branches) == 2:
            source = made.inputs[0]
            if isinstance(source, int) and source in self.makers and self.makers[source].shapes[0].dtype == bool:
                which = source  # the comparison itself, which may tell that the branches meet
        results = [self.open(branch.jaxpr, branch.consts, list(operands)) for branch in branches]
        return [
            self._append(jax.lax.select_n_p, "select_n", [which, *cases], {}, (v.aval,))[0]
            for v, *cases in zip(equation.outvars, *results, strict=True)
        ]

    def _choice(self, inputs: list[Atom]) -> int:
        if isinstance(inputs[0], Known) or inputs[0] not in self.dependent:
            return KNOWN
        return MEETS if self._agrees(inputs) else JUMPS

    def _agrees(self, inputs: list[Atom]) -> bool:
        """Whether the cases of a choice by a comparison `a < number` have one exact value where a is that number.

        On a path through the inputs the choice then changes only where both cases meet.
        """
        which = self.makers.get(inputs[0]) if isinstance(inputs[0], int) else None
        if which is None or which.name not in COMPARISONS or len(inputs) != 3:
            return False
        left, right = (_number(a) for a in which.inputs)
        if (left is None) == (right is None):
            return False
        variable = which.inputs[0] if left is None else which.inputs[1]
        at = right if left is None else left
        if not isinstance(variable, int) or at is None:
            return False
        cases = [_Exact(self.makers, variable, at)(case) for case in inputs[1:]]
        return cases[0] is not None and cases[0] == cases[1]


def _inner(equation: Any) -> Any:
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in equation.params:
            inner = equation.params[name]
            return inner if hasattr(inner, "consts") else ClosedJaxpr(inner, ())
    raise ValueError(f"no operations inside {equation.primitive.name}.")


def _is_logaddexp(equation: Any) -> bool:
    """Whether the operations inside a call are those of `jnp.logaddexp`, whatever the call is named."""
    if equation.primitive.name != "custom_jvp_call" or len(equation.invars) != 2:
        return False
    inner = _inner(equation)
    if len(inner.eqns) > 16 or inner.consts:
        return False
    example = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type) for v in equation.invars]
    try:
        reference = jax.make_jaxpr(jax.numpy.logaddexp)(*example)
    except (TypeError, ValueError):
        return False
    calls = [e for e in reference.eqns if e.primitive.name == "custom_jvp_call"]
    return len(calls) == 1 and str(_inner(calls[0])) == str(inner)


def _body(closed: Any) -> Program:
    builder = _Builder()
    inputs = [builder.new(True) for _ in closed.jaxpr.invars]
    outputs = builder.open(closed.jaxpr, closed.consts, list(inputs))
    return Program(tuple(builder.equations), tuple(inputs), tuple(outputs))


def _number(atom: Atom) -> Fraction | None:
    """A scalar literal as an exact number."""
    if isinstance(atom, Known) and np.ndim(atom.value) == 0 and np.isfinite(value := np.asarray(atom.value)).all():
        return Fraction(float(value)) if np.issubdtype(value.dtype, np.floating) else Fraction(int(value))
    return None


_AT_ZERO: dict[str, int | Fraction] = {
    "exp": 1, "expm1": 0, "tanh": 0, "log1p": 0, "erf": 0, "sin": 0, "cos": 1, "atan": 0, "sinh": 0, "cosh": 1,
    "logistic": Fraction(1, 2), "erfc": 1,
}  # fmt: skip


class _Exact:
    """Exact values of entries of a program where one variable has a given value in that same entry, or None."""

    def __init__(self, makers: dict[int, Equation], variable: int, at: Fraction) -> None:
        self._makers, self._known = makers, {variable: at}
        self._depth = 0

    def __call__(self, atom: Atom) -> Any:
        if isinstance(atom, Known):
            return _number(atom)
        if atom not in self._known:
            self._depth += 1
            made = self._makers.get(atom)
            value = None if made is None or self._depth > 64 else self._made(made)
            self._known[atom] = value  # type: ignore[assignment]
        return self._known[atom]

    def _made(self, made: Equation) -> Any:
        name, shape = made.name, made.shapes[0].shape
        if name in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims"):
            # An entry of the result is not the same entry of the operand, unless the operand is one number.
            one = made.inputs[0]
            alone = isinstance(one, Known) or (one in self._makers and self._makers[one].shapes[0].shape == ())
            return self(one) if alone or shape == () else None
        args = [self(a) for a in made.inputs]
        if any(a is None for a in args):
            return None
        if name == "convert_element_type":
            wide = np.issubdtype(made.shapes[0].dtype, np.floating) and Fraction(float(args[0])) == args[0]
            return args[0] if wide else None
        if name in COMPARISONS:
            return COMPARISONS[name](*args)
        if name == "select_n" and isinstance(args[0], bool) and len(args) == 3:
            return args[2] if args[0] else args[1]
        if name == "integer_pow" and made.params["y"] >= 0:
            return args[0] ** made.params["y"]
        if name in _AT_ZERO and args[0] == 0:
            return Fraction(_AT_ZERO[name])
        simple: dict[str, Callable[..., Any]] = {
            "add": lambda a, b: a + b,
            "sub": lambda a, b: a - b,
            "mul": lambda a, b: a * b,
            "div": lambda a, b: a / b if b else None,
            "neg": lambda a: -a,
            "abs": abs,
            "max": max,
            "min": min,
            "square": lambda a: a * a,
            "copy": lambda a: a,
            "stop_gradient": lambda a: a,
        }
        return simple[name](*args) if name in simple else None


def trace(f: Callable[..., Any], *examples: Array) -> tuple[Program, Any]:
    """The program of a function of arrays, and the structure of its result."""
    closed, shape = jax.make_jaxpr(f, return_shape=True)(*examples)
    builder = _Builder()
    inputs = [builder.new(True) for _ in closed.jaxpr.invars]
    outputs = builder.open(closed.jaxpr, closed.consts, list(inputs))
    return Program(tuple(builder.equations), tuple(inputs), tuple(outputs)), shape
