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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Float64

from dualgap_jax import seeds
from dualgap_jax.data import Dataset
from dualgap_jax.losses import AssumptionCheck, Loss, check_assumption_1
from dualgap_jax.types import Network, PyTree


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
    def largest_budget(self) -> float:
        """`max h` over W, from which on the constraint is idle (Remark 3)."""
        return self.radius**self.power

    def grid(self, points: int) -> Float64[np.ndarray, " m"]:
        """A uniform grid of budgets from 0 to `largest_budget`.  Raises ValueError for fewer than 2 points."""
        if points < 2:
            raise ValueError(f"a grid of budgets needs at least 2 points, got {points}.")
        return np.linspace(0.0, self.largest_budget, points)

    def radii(self, budgets: Float64[np.ndarray, " m"]) -> Float64[np.ndarray, " m"]:
        """The radius of `{w: h(w) <= b}`, a rounding below, so that points projected on it are feasible."""
        return np.maximum(budgets, 0.0) ** (1 / self.power) * (1 - 1e-14)


def functional(dataset: Dataset) -> tuple[Float64[np.ndarray, "n out"], float]:
    """The c and the offset of g for a data set's labels.

    Raises:
      ValueError: for a regression task, which has no margins.
    """
    if dataset.task == "binary":
        return np.asarray(dataset.y, np.float64)[:, None], 1.0
    if dataset.task == "multiclass":
        classes = dataset.num_outputs
        return np.eye(classes)[dataset.y] - 1 / classes, (classes - 1) / classes
    raise ValueError(f"Theorem 1 needs class labels; the data set {dataset.name!r} has a {dataset.task} task.")


def branch_problem(
    branch: Network, dataset: Dataset, *, tau: int | float, radius: int | float, power: int | float = 2.0, seed: int = 0
) -> Problem:
    """The one-branch problem of a branch on a data set.

    Args:
      branch: f_i, with as many outputs as the data set asks for.
      dataset: its inputs are standardised; binary or multiclass labels.
      tau: margin scale of eq. (1).
      radius: W is the ball of this radius.
      power: `h(w) = ||w||^power`.
      seed: of the initialisation that fixes the parameters' shapes and the state.

    Raises:
      ValueError: for numbers out of range, a regression task, or outputs of the wrong shape.
    """
    for name, value, least in (("tau", tau, 0.0), ("radius", radius, 0.0)):
        if not least < value < math.inf:
            raise ValueError(f"{name}={value!r} must be positive and finite.")
    if not 1 <= power < math.inf:
        raise ValueError(f"power={power!r} must be at least 1: h(w) = ||w||^power is convex only then.")
    c, offset = functional(dataset)
    x = (np.asarray(dataset.x, np.float64) - dataset.mean) / dataset.std
    template, state = branch.init(seeds.key(seed), jnp.asarray(x[:1], jnp.float32))
    size = sum(leaf.size for leaf in jax.tree.leaves(template))
    problem = Problem(branch, x, c, offset, float(tau), float(radius), float(power), template, state, size)
    shape = jax.eval_shape(problem.outputs, jnp.zeros(size, jnp.float32)).shape
    if shape != c.shape:
        raise ValueError(f"the branch gives outputs of shape {shape} on this data set, need {c.shape}.")
    return problem


class ByIdentity:
    """A problem as a key of a cache of compiled programs: two problems are equal when they are the same object."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __hash__(self) -> int:
        return id(self.problem)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and other.problem is self.problem


def values_at(problem: Problem, w: np.ndarray, *, batch: int = 64) -> Float64[np.ndarray, " k"]:
    """`g` at the rows of `w [k, p]`, in float64."""
    with jax.enable_x64(True):
        rows = jnp.asarray(w, jnp.float64)
        return np.asarray(_values(ByIdentity(problem))(rows, min(batch, len(w))))


@functools.lru_cache(maxsize=32)
def _values(key: ByIdentity) -> Any:
    def values(w: Array, batch: int) -> Array:
        return jax.lax.map(key.problem.g, w, batch_size=batch)

    return jax.jit(values, static_argnums=1)


@functools.lru_cache(maxsize=32)
def _mean_outputs(key: ByIdentity) -> Any:
    """A jitted `(w [k, p], shares [k], x) -> sum_k shares[k] f(w[k]; x)`, one branch after another."""

    def mean(w: Array, shares: Array, x: Array) -> Array:
        def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
            return total + pair[1] * key.problem.outputs(pair[0], x), None

        shape = jax.eval_shape(key.problem.outputs, w[0], x).shape
        return jax.lax.scan(add, jnp.zeros(shape, w.dtype), (w, shares))[0]

    return jax.jit(mean)


def rounding(problem: Problem) -> float:
    """A bound on the error of float64 sums over the data set, for outputs of size 1: `eps sum |c| / tau`."""
    return len(problem.c) * np.finfo(np.float64).eps * float(np.abs(problem.c).sum(axis=1).mean()) / problem.tau


class Risk(NamedTuple):
    """The risk of a primal point on a data set.

    Attributes:
      linear: `E(1 - y f / tau)`, the objective under Assumption 1, f being the mean over branches.
      hinge: `E max(0, 1 - y f / tau)`.
      clipped: `hinge - linear`, what the maximum adds; 0 where Assumption 1 holds.
      half_width: of the normal confidence interval for `linear` on the population, at the level asked for.
      assumption_1: the check on the margins of this point.
    """

    linear: float
    hinge: float
    clipped: float
    half_width: float
    assumption_1: AssumptionCheck


def primal_risk(
    problem: Problem,
    loss: Loss,
    weights: np.ndarray,
    shares: np.ndarray,
    dataset: Dataset,
    *,
    confidence: float = 0.95,
    output_bound: float | None = None,
) -> Risk:
    """Evaluates a primal point, the mean over branches with the given weights, on a data set.

    On the data of the problem `linear` is the primal objective of (2).  On a fresh sample, independent of the weights,
    `linear ± half_width` is a confidence interval for the population risk (Remark 2 read backwards).

    Args:
      problem: fixes branch and tau.
      loss: the hinge loss of eq. (1) for this task, with the problem's tau.
      weights: `[k, p]`, the distinct branches.
      shares: `[k]`, the share of the I branches that has each; they add up to 1.
      dataset: where to evaluate.
      confidence: level of the interval.
      output_bound: a proven bound on the margins over W, for Assumption 1.

    Raises:
      ValueError: if the loss has another tau or does not fit the data.
    """
    if loss.tau != problem.tau or dataset.task not in loss.tasks:
        raise ValueError(f"the loss has tau={loss.tau} for {loss.tasks}; need tau={problem.tau} for {dataset.task}.")
    from scipy.stats import norm

    x = (np.asarray(dataset.x, np.float64) - dataset.mean) / dataset.std
    c, offset = functional(dataset)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a, jnp.float64) for a in (weights, shares, x)]
        outputs = _mean_outputs(ByIdentity(problem))(*arrays)
        labels = jnp.asarray(dataset.y)
        hinge = np.asarray(loss.per_example(outputs, labels), np.float64)
        margins = loss.margin(outputs, labels) if loss.margin is not None else jnp.zeros(1)
        check = check_assumption_1(loss, margins, bound=output_bound)
        terms = offset - np.sum(c * np.asarray(outputs), axis=1) / problem.tau
    half = float(norm.ppf(0.5 + confidence / 2) * terms.std(ddof=1) / math.sqrt(len(terms))) if len(terms) > 1 else 0.0
    linear = float(terms.mean())
    return Risk(linear, float(hinge.mean()), float(hinge.mean() - linear), half, check)
