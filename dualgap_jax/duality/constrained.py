"""One-branch problems with a size function h and a set W of one's own.

    problem = duality.constrained_problem(
        branch, data, tau=3.0,
        size=lambda params: sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(params)),
        domain=duality.ball(2.0),
    )
    duality.theorem1(problem, budget=0.8, num_branches=[1, 10, 1000])

What the theorem asks of them, and what is made of it here:

* W is convex and compact: it is made by `box`, `ball` and `product`, which give nothing else;
* h is lower semicontinuous: it has to be continuous, so that operations that may jump are refused by name;
* h is convex: a midpoint where it is not is looked for, and refused.  That there is none is not proven; the bounds on
  inf(P), sup(D) and Delta do not rest on it, and without it 'refuted' is not said;
* f and h have proven ranges and slopes over boxes: an operation without a rule is refused by name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.flatten_util import ravel_pytree
from jaxtyping import Float, Float64

from dualgap_jax import seeds
from dualgap_jax.duality.bounding.ranges import extension
from dualgap_jax.duality.problem import Problem, above, branch_problem
from dualgap_jax.duality.programs import JUMPS, Program, trace
from dualgap_jax.duality.sets import Blocks, placed
from dualgap_jax.files import text_digest
from dualgap_jax.identity import function_digest
from dualgap_jax.types import PyTree

_PAIRS = 4096  # of points at whose middle convexity is looked at
_JUMPING = {"sign", "floor", "ceil", "round", "is_finite", "reduce_precision"}


class ConstrainedProblem(NamedTuple):
    """A one-branch problem with h and W of one's own; parameters are flat vectors `w [p]`.

    Attributes:
      one: branch, data and tau; its ball contains W, and its power is not used.
      cost: h, of the branch's parameters.
      set: W.
    """

    one: Problem
    cost: Callable[[PyTree], Array]
    set: Blocks

    @property
    def size(self) -> int:
        """p."""
        return self.one.size

    def h_at(self, w: Float[Array, " p"]) -> Array:
        """h of a flat vector, in its precision."""
        like = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, w.dtype), self.one.template)
        return jnp.asarray(self.cost(ravel_pytree(like)[1](w)))

    def h(self, w: Float64[np.ndarray, "k p"]) -> Float64[np.ndarray, " k"]:
        """h at the rows of w, in float64 and up to rounding."""
        with jax.enable_x64(True):
            return np.asarray(_costs(ByOwn(self))[0](jnp.asarray(w, jnp.float64)))

    def costs(self, w: Float64[np.ndarray, "k p"]) -> Float64[np.ndarray, " k"]:
        """Proven upper bounds on h at the rows of w; infinite at those that may lie outside W."""
        with jax.enable_x64(True):
            found = np.asarray(_costs(ByOwn(self))[1](jnp.asarray(w, jnp.float64), jnp.asarray(w, jnp.float64)))
        inside = np.ones(len(w), bool)
        for b in self.set.blocks:
            part = w[:, b.start : b.stop]
            inside &= ((part >= b.lower) & (part <= b.upper)).all(axis=1)
            if math.isfinite(b.radius):
                inside &= np.linalg.norm(part / b.radius, b.order, axis=1) <= 1 - 1e-12
        return np.where(inside, found, np.inf)

    def inside(self, points: Float64[np.ndarray, "k p"]) -> Float64[np.ndarray, "k p"]:
        """The points, those outside W by no more than a rounding or so moved into it.  Raises ValueError beyond."""
        moved = self.set.inside(points)
        far = np.abs(moved - points).max(axis=1)
        if far.max() > 1e-9 * self.one.radius:
            raise ValueError(f"the point {points[int(np.argmax(far))]} lies outside W.")
        return moved

    def cost_above(self, point: Sequence[Fraction]) -> tuple[float, float]:
        """A little more than h at a point of W, given in rational numbers; and inf, for its norm is of no use here."""
        lo, hi = box_around(point)
        with jax.enable_x64(True):
            found = float(_costs(ByOwn(self))[1](jnp.asarray(lo)[None], jnp.asarray(hi)[None])[0])
        return found + 2.0**-43 * (1 + abs(found)), math.inf

    def check_budgets(self, budgets: Float64[np.ndarray, " m"]) -> None:
        """Every grid will do whose lower bounds are proven: what lies below and beyond it is charged for."""

    @property
    def constraint(self) -> str:
        """A digest of h and W."""
        with jax.enable_x64(True):
            program = function_digest(self.h_at, jax.ShapeDtypeStruct((self.size,), jnp.float64))
        return text_digest(
            f"{program} {[(*b[:2], b.lower.tolist(), b.upper.tolist(), *b[4:]) for b in self.set.blocks]}"
        )


AnyProblem = Problem | ConstrainedProblem


class ByOwn:
    """A constrained problem as a key of a cache: two are equal where their parts are the same objects."""

    def __init__(self, problem: ConstrainedProblem) -> None:
        self.problem = problem

    def __hash__(self) -> int:
        return hash((id(self.problem.one.branch), id(self.problem.cost)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ByOwn):
            return NotImplemented
        one, two = self.problem, other.problem
        return one.one is two.one and one.cost is two.cost and one.set is two.set


@functools.lru_cache(maxsize=32)
def _costs(key: ByOwn) -> tuple[Any, Any]:
    """Jitted: h at rows `[k, p]`, and upper bounds on it over boxes `[k, p]`."""
    over = extension(key.problem.h_at, jnp.zeros(key.problem.size, jnp.float64))
    return jax.jit(jax.vmap(key.problem.h_at)), jax.jit(jax.vmap(lambda lo, hi: over(lo, hi).upper))


def box_around(point: Sequence[Fraction]) -> tuple[np.ndarray, np.ndarray]:
    """The smallest box of floats around a point given in rational numbers."""
    return -np.array([above(-x) for x in point]), np.array([above(x) for x in point])


def constrained_problem(
    branch: Any, dataset: Any, *, tau: Any, size: Any, domain: Any, seed: int = 0
) -> ConstrainedProblem:
    """The one-branch problem of a branch on a data set, with h and W of one's own.

    Args:
      branch, dataset: as of `branch_problem`.
      tau: margin scale of eq. (1).
      size: h, a convex and continuous function of the branch's parameters (a tree as `branch.init` returns it), made of
        the operations that have interval rules.
      domain: W, from `box`, `ball` or `product`.
      seed: of the initialisation that fixes the parameters' shapes and the state.

    Raises:
      ValueError: for what `branch_problem` refuses, a set that does not fit the parameters, or an h that is not one
        finite number, may jump, is not convex, or does not depend on the weights.
      UnsupportedPrimitiveError: if h uses an operation without an interval rule; the message names it.
    """
    one = branch_problem(branch, dataset, tau=tau, radius=1.0, seed=seed)
    if not callable(size):
        raise ValueError(f"size must be a function of the branch's parameters, got {size!r:.60}.")
    where = placed(domain, [leaf.shape for leaf in jax.tree.leaves(one.template)])
    problem = ConstrainedProblem(one._replace(radius=where.radius), size, where)
    with jax.enable_x64(True):
        shape = jax.eval_shape(problem.h_at, jnp.zeros(one.size, jnp.float64))
        if shape.shape != () or not jnp.issubdtype(shape.dtype, jnp.floating):
            raise ValueError(f"size must return one real number, got shape {shape.shape} of {shape.dtype}.")
        program = trace(problem.h_at, jnp.zeros(one.size, jnp.float64))[0]
    jumping = sorted(_jumps(program))
    if jumping:
        raise ValueError(f"size may jump, h has to be continuous: it uses {', '.join(jumping)}.")
    decided = {*program.inputs, *(o for e in program.equations if e.depends for o in e.outputs)}
    if not (isinstance(program.outputs[0], int) and program.outputs[0] in decided):
        raise ValueError("size does not depend on the weights, so that it constrains nothing.")
    _refuse_concave(problem, seed)
    return problem


def _jumps(program: Program) -> set[str]:
    """The operations of a program that are not continuous in what its inputs decide."""
    found = set()
    made = {o: shape for e in program.equations for o, shape in zip(e.outputs, e.shapes, strict=True)}
    for equation in program.equations:
        if not equation.depends:
            continue
        # To whole numbers, or from them and from truth values, which come of a comparison.
        ends = (*equation.shapes, *(made[i] for i in equation.inputs if isinstance(i, int) and i in made))
        converts = equation.name == "convert_element_type"
        if equation.name in _JUMPING or (converts and not all(jnp.issubdtype(a.dtype, jnp.floating) for a in ends)):
            found.add(equation.name)
        if equation.name == "select_n" and equation.choice == JUMPS:
            found.add("a choice whose cases do not meet")
        if equation.name == "scan":
            found |= _jumps(equation.params["jaxpr"])
    return found


def draw(problem: ConstrainedProblem, rng: np.random.Generator, count: int) -> Float64[np.ndarray, "k p"]:
    """Points of W at random, up to rounding: all over the box around it, and on its border too."""
    lower, upper = problem.set.lower, problem.set.upper
    points = lower + (upper - lower) * rng.random((count, problem.size))
    with jax.enable_x64(True):
        return np.asarray(jax.vmap(problem.set.nearest)(jnp.asarray(points)))


def _refuse_concave(problem: ConstrainedProblem, seed: int) -> None:
    """Raises ValueError where h at a midpoint lies above the mean of its ends, or is no number."""
    rng = seeds.generator(seed)
    a, b = draw(problem, rng, _PAIRS), draw(problem, rng, _PAIRS)
    b = a + rng.choice([1.0, 1e-1, 1e-2], (_PAIRS, 1)) * (b - a)
    at_a, at_b, middle = (problem.h(w) for w in (a, b, 0.5 * (a + b)))
    if not (np.isfinite(at_a) & np.isfinite(at_b) & np.isfinite(middle)).all():
        raise ValueError("size is not finite at a point of W.")
    over = middle - 0.5 * (at_a + at_b) - 1e-11 * (np.abs(at_a) + np.abs(at_b) + 1e-300)
    if (over > 0).any():
        k = int(np.argmax(over))
        raise ValueError(
            f"size is not convex: between the weights {a[k]} and {b[k]} it is {middle[k]:.6g} in the middle, but"
            f" {0.5 * (at_a[k] + at_b[k]):.6g} on average; the theorem asks for a convex h."
        )
