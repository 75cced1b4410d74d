"""The one-branch problem of Theorem 1: `g(w)` and `h(w)` over `W`, for any branch on any data set.

`g(w) = E(1 - y f(w; x) / tau)` is linear in the branch's outputs.  For classes the ten-class hinge without its maximum
plays the same part: `(1/C) sum_{j != y} (1 - (s_y - s_j) / tau)`.  In general `g(w) = offset - E<c, f(w; x)> / tau`
with a fixed functional c of the outputs for each example, which is what Section 2 needs of vector outputs.

The regulariser is `h(w) = ||w||^power`, convex for power >= 1 (2: weight decay), and W the ball `||w|| <= radius`, so
every set `{w in W: h(w) <= b}` is a ball too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Float64

from dualgap_jax import seeds
from dualgap_jax.data import Dataset, as_dataset, validate
from dualgap_jax.duality.bounding.rules import UnsupportedPrimitiveError
from dualgap_jax.duality.programs import remedy, trace
from dualgap_jax.duality.values import number
from dualgap_jax.files import text_digest
from dualgap_jax.identity import function_digest
from dualgap_jax.networks import as_network
from dualgap_jax.types import Network, PyTree

_EPS = float(np.finfo(np.float64).eps)
NEAR = 1e-9  # a point of W is moved inside when it is outside by this share, and refused beyond


class Problem(NamedTuple):
    """A one-branch problem; parameters are flat vectors `w [p]`.

    Attributes:
      branch: f_i.
      x: `[n, ...]` standardised inputs, float64 on the host.
      c: `[n, out]`, the functional of the outputs.
      offset: of g.
      tau: margin scale.
      radius: of W.
      power: of the norm in h.
      template: a parameter tree, which fixes shapes; `state` goes with it.
      state: the branch's state, held fixed.
      size: p.
    """

    branch: Network
    x: np.ndarray
    c: Float64[np.ndarray, "n out"]
    offset: float
    tau: float
    radius: float
    power: float
    template: PyTree
    state: PyTree
    size: int

    def outputs(self, w: Float[Array, " p"], x: Any = None) -> Float[Array, "n out"]:
        """f(w; x) on the problem's inputs, or on others, in the precision of w."""
        x = jnp.asarray(self.x if x is None else x, w.dtype)
        _, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, w.dtype), self.template))
        return self.branch.apply(unravel(w), self.state, x)[0]

    def g(self, w: Float[Array, " p"]) -> Float[Array, ""]:
        """`offset - E<c, f(w; x)> / tau`."""
        scaled = jnp.asarray(self.c / (len(self.c) * self.tau), w.dtype)
        return self.offset - jnp.sum(scaled * self.outputs(w))

    def h(self, w: Float[np.ndarray, "... p"]) -> Float64[np.ndarray, "..."]:
        """`||w||^power`, on the host."""
        return np.asarray(np.linalg.norm(np.asarray(w, np.float64), axis=-1) ** self.power)

    @property
    def constraint(self) -> str:
        """W and h, for a digest."""
        return f"{float(self.radius)!r} {float(self.power)!r}"

    @property
    def largest_budget(self) -> float:
        """`max h` over W, from which on the constraint is idle (Remark 3)."""
        return self.radius**self.power

    def check_budgets(self, budgets: Float64[np.ndarray, " m"]) -> None:
        """Raises ValueError unless budgets run from 0 to `largest_budget`, the range of h over W.

        Beyond it there are no points of W, and before its end the constraint is not idle: bounds for all budgets do
        not follow from such a grid.
        """
        least, most = float(budgets[0]), float(budgets[-1])
        if least != 0 or not abs(most - self.largest_budget) <= 4 * _EPS * self.largest_budget:
            raise ValueError(
                f"budgets run from {least:.6g} to {most:.6g}, but h runs from 0 to {self.largest_budget:.6g} over W;"
                " give problem.grid(points)."
            )

    def grid(self, points: int) -> Float64[np.ndarray, " m"]:
        """A uniform grid of budgets from 0 to `largest_budget`.  Raises ValueError for fewer than 2 points."""
        if points < 2:
            raise ValueError(f"a grid of budgets needs at least 2 points, got {points}.")
        return np.linspace(0.0, self.largest_budget, points)

    @property
    def one(self) -> Problem:
        """What belongs to the branch alone: the problem itself; who takes it does not ask for W and h."""
        return self

    def inside(self, points: Float64[np.ndarray, "k p"]) -> Float64[np.ndarray, "k p"]:
        """The points, those outside W by no more than a rounding or so moved into it.  Raises ValueError beyond."""
        norms = np.linalg.norm(points, axis=1)
        longest = float(norms.max())
        if longest > self.radius * (1 + NEAR):
            raise ValueError(f"a point has norm {longest:.6g}, outside W, the ball of radius {self.radius:.6g}.")
        limit = Fraction(self.radius) ** 2
        moved = points.copy()
        for k in np.flatnonzero(norms > self.radius * (1 - 1e-12)):
            while sum((Fraction(x) ** 2 for x in moved[k].tolist()), Fraction(0)) > limit:
                moved[k] *= min(1.0, self.radius / float(np.linalg.norm(moved[k]))) * (1 - 4 * _EPS)
        return moved

    def cost_above(self, point: Sequence[Fraction]) -> tuple[float, float]:
        """A little more than h at a point of W, given in rational numbers, and than its norm."""
        # Powers and roots of floats are good to a few ulps.
        square = above(sum((x * x for x in point), Fraction(0)))
        norm = math.sqrt(square) * (1 + 1e-12) + 1e-14 * min(1.0, self.radius)
        return norm**self.power * (1 + 16 * _EPS), norm

    def radii(self, budgets: Float64[np.ndarray, " m"]) -> Float64[np.ndarray, " m"]:
        """The radius of `{w: h(w) <= b}`, a rounding below, so that points projected on it are feasible."""
        return np.maximum(budgets, 0.0) ** (1 / self.power) * (1 - 1e-14 - 4e-16 * abs(math.log(self.radius)))


def above(value: Fraction) -> float:
    """A float that is not below a rational number."""
    near = float(value)
    return near if Fraction(near) >= value else math.nextafter(near, math.inf)


def functional(dataset: Dataset) -> tuple[Float64[np.ndarray, "n out"], float]:
    """The c and the offset of g for a data set's labels.

    Raises:
      ValueError: for a regression task, which has no margins, or what `data.validate` refuses: labels that are none,
        numbers that are not finite, a data set without examples.
    """
    if dataset.task in ("binary", "multiclass"):
        validate(dataset)
    if dataset.task == "binary":
        return np.asarray(dataset.y, np.float64)[:, None], 1.0
    if dataset.task == "multiclass":
        classes = dataset.num_outputs
        return np.eye(classes)[dataset.y] - 1 / classes, (classes - 1) / classes
    raise ValueError(f"Theorem 1 needs class labels; the data set {dataset.name!r} has a {dataset.task} task.")


def branch_problem(branch: Any, dataset: Any, *, tau: Any, radius: Any, power: Any = 2.0, seed: int = 0) -> Problem:
    """The one-branch problem of a branch on a data set.

    Args:
      branch: f_i, with as many outputs as the data set asks for: a network, or a Linen module or a constructor of NNX
        modules, which stands for `from_linen` or `from_nnx` of it.
      dataset: a `Dataset`, or a pair of arrays; its inputs are standardised; binary or multiclass labels.
      tau: margin scale of eq. (1).
      radius: W is the ball of this radius.
      power: `h(w) = ||w||^power`.
      seed: of the initialisation that fixes the parameters' shapes and the state.

    Raises:
      TypeError: for a branch that is no network.
      ValueError: for numbers out of range, a regression task, or outputs of the wrong shape.
      UnsupportedPrimitiveError: for a branch that JAX cannot differentiate, as the searches do.
    """
    branch, dataset = as_network(branch, "duality.branch_problem").computed(), as_dataset(dataset)
    tau, radius, power = (number(k, v, infinite=True) for k, v in (("tau", tau), ("radius", radius), ("power", power)))
    for name, value in (("tau", tau), ("radius", radius)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} must be positive and finite.")
    if not 1 <= power < math.inf:
        raise ValueError(f"power={power!r} must be at least 1: h(w) = ||w||^power is convex only then.")
    if not -250 < power * math.log10(radius) < 250:
        raise ValueError(
            f"h runs to radius^power = {radius:.6g}^{power:.6g}, which a float cannot hold with room to spare."
        )
    c, offset = functional(dataset)
    if tau < 1e-250 or float(np.abs(c).max()) / tau > 1e250:
        raise ValueError(f"tau={tau:.6g} is so small that y f / tau is no number of float64; give a larger tau.")
    x = (np.asarray(dataset.x, np.float64) - dataset.mean) / dataset.std
    if not np.abs(x).max() < float(np.finfo(np.float32).max):
        raise ValueError(f"data set {dataset.name!r}: an input is not finite in float32 once it is standardised.")
    template, state = branch.init(seeds.key(seed), jnp.asarray(x[:1], jnp.float32))
    size = sum(leaf.size for leaf in jax.tree.leaves(template))
    problem = Problem(branch, x, c, offset, tau, radius, power, template, state, size)
    shape = jax.eval_shape(problem.outputs, jnp.zeros(size, jnp.float32)).shape
    if shape != c.shape:
        raise ValueError(f"the branch gives outputs of shape {shape} on this data set, need {c.shape}.")
    check_gradient(problem)
    return problem


def check_gradient(problem: Problem) -> None:
    """Raises UnsupportedPrimitiveError for a branch without a gradient in many weights at once, which searches take."""
    rows = jax.ShapeDtypeStruct((2, problem.size), jnp.float32)
    try:
        jax.eval_shape(jax.vmap(jax.grad(problem.g)), rows)
    except (ValueError, TypeError, NotImplementedError) as error:
        used = trace(problem.outputs, jnp.zeros(problem.size, jnp.float32))[0].primitives(dependent=True)
        said = remedy(used & {"while"}) or f"  JAX says: {str(error).splitlines()[0]}"
        raise UnsupportedPrimitiveError(f"the branch has no gradient in its weights.{said}") from error


class ByProgram:
    """A problem as a key of a cache of what does not ask for W and h: its branch, data and tau.

    Two are equal where all but the radius and the power are the same objects.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __hash__(self) -> int:
        return hash((id(self.problem.branch), id(self.problem.x), id(self.problem.c)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ByProgram):
            return NotImplemented
        one, two = self.problem, other.problem
        parts = ("branch", "x", "c", "template", "state", "offset", "tau")
        return all(getattr(one, part) is getattr(two, part) for part in parts)


class ByIdentity:
    """A problem as a key of a cache: two problems are equal when they are the same object."""

    def __init__(self, problem: Any) -> None:
        self.problem = problem

    def __hash__(self) -> int:
        return id(self.problem)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and other.problem is self.problem


def program_of(problem: Problem) -> str:
    """A digest of `w -> E<c, f(w; x)> / tau`: of its program and all the numbers in it."""
    with jax.enable_x64(True):
        plain = problem._replace(offset=0.0)
        return function_digest(plain.g, jax.ShapeDtypeStruct((problem.size,), jnp.float64))


def subject_from(program: str, offset: Any, radius: Any, power: Any) -> str:
    """A digest of a one-branch problem from that of its program."""
    return text_digest(f"{program} {float(offset)!r} {float(radius)!r} {float(power)!r}")


def subject_of(problem: Any) -> str:
    """A digest of the one-branch problem: branch, data, tau, W and h, but not how it was made."""
    return _subject(ByIdentity(problem))


@functools.lru_cache(maxsize=32)
def _subject(key: ByIdentity) -> str:
    one = key.problem.one
    return text_digest(f"{program_of(one)} {float(one.offset)!r} {key.problem.constraint}")


def values_at(problem: Problem, w: np.ndarray, *, batch: int = 64) -> Float64[np.ndarray, " k"]:
    """`g` at the rows of `w [k, p]`, in float64."""
    with jax.enable_x64(True):
        rows = jnp.asarray(w, jnp.float64)
        return np.asarray(_values(ByProgram(problem))(rows, min(batch, len(w))))


@functools.lru_cache(maxsize=32)
def _values(key: ByProgram) -> Any:
    def values(w: Array, batch: int) -> Array:
        return jax.lax.map(key.problem.g, w, batch_size=batch)

    return jax.jit(values, static_argnums=1)


def rounding(problem: Problem) -> float:
    """A bound on the error of float64 sums over the data set, for outputs of size 1: `eps sum |c| / tau`."""
    return len(problem.c) * np.finfo(np.float64).eps * float(np.abs(problem.c).sum(axis=1).mean()) / problem.tau
