"""The regularised risk of multi-branch networks, and its least value over all measures of branches.

`P_I`: min over w_1 .. w_I of `(1/n) sum_j l(y_j, (1/I) sum_i f(w_i; x_j)) + penalty (1/I) sum_i h(w_i)`, or without the
penalty subject to `(1/I) sum_i h(w_i) <= budget`, `h(w) = ||w||^power`, each w_i in the ball W of the radius.  `F*` is
the same over probability measures of branches, so `F* <= inf(P_I)` for every I.  Nothing needs to be convex but l in
the outputs.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualgap_jax import seeds
from dualgap_jax.certify.structure import Structure, structure_of
from dualgap_jax.conjugates import Conjugate
from dualgap_jax.data import as_dataset, validate
from dualgap_jax.duality.problem import Problem, check_gradient
from dualgap_jax.duality.values import number
from dualgap_jax.losses import Loss, as_loss
from dualgap_jax.networks import as_network
from dualgap_jax.registry import unknown

REDUCTIONS = ("mean", "sum")


@dataclasses.dataclass(frozen=True, eq=False)
class RiskProblem:
    """A regularised risk over measures of branches; parameters of a branch are flat vectors `w [p]`.

    Attributes:
      loss: with a conjugate.
      y: `[n]` labels, as the loss takes them.
      penalty: the multiplier of the mean h, or None where `budget` bounds it.
      budget: the bound on the mean h, or None.
      reduce: 'mean' or 'sum' over branches, of outputs and of h alike.
      one: the one-branch problem with its inputs x `[n, ...]` in float64, radius (infinite for no ball) and power; its
        functional c is 0.
      structure: what the branch is, where that is known.
    """

    loss: Loss
    y: np.ndarray
    penalty: float | None
    budget: float | None
    reduce: str
    one: Problem
    structure: Structure | None

    @property
    def shape(self) -> tuple[int, int]:
        """`(n, out)`, the shape of alpha."""
        return self.one.c.shape[0], self.one.c.shape[1]

    @property
    def conjugate(self) -> Conjugate:
        """That of the loss."""
        assert self.loss.conjugate is not None  # `risk_problem` has seen to it
        return self.loss.conjugate

    @property
    def power(self) -> float:
        """q of `h(w) = ||w||^q`."""
        return self.one.power

    @property
    def radius(self) -> float:
        """Of W; infinite where there is no ball."""
        return self.one.radius

    @property
    def scale_free(self) -> bool:
        """Whether f is, but for an output bias, homogeneous of degree `power` and W all of R^p: shares are idle."""
        known = self.structure
        return known is not None and known.degree == self.power and math.isinf(self.radius)

    def slope(self, outputs: np.ndarray) -> np.ndarray:
        """`alpha [n, out]`, a subgradient of the losses at outputs, exactly in the domain of the conjugate."""
        assert self.loss.slope is not None
        return self.conjugate.nearest(self.loss.slope(np.asarray(outputs, np.float64), self.y), self.y)

    def losses(self, outputs: np.ndarray) -> np.ndarray:
        """`[n]`, the losses at outputs, in float64."""
        with jax.enable_x64(True):
            return np.asarray(self.loss.per_example(jnp.asarray(outputs, jnp.float64), jnp.asarray(self.y)))

    def branch_problem(self, alpha: np.ndarray) -> Problem:
        """The one-branch problem whose g is `(1/n) sum_j <alpha_j, f(w; x_j)>`."""
        return self.one._replace(c=-np.asarray(alpha, np.float64))

    def checked(self, alpha: Any) -> np.ndarray:
        """`alpha` as float64 rows that are in the domain of the conjugate exactly.

        Raises:
          ValueError: for another shape, for what are no real numbers, or a row that lies outside the domain.
        """
        rows = real_numbers("alpha", alpha)
        rows = rows[:, None] if rows.ndim == 1 and self.shape[1] == 1 else rows
        if rows.shape != self.shape:
            raise ValueError(f"alpha must have the shape (examples, outputs) = {self.shape}, got {rows.shape}.")
        outside = np.flatnonzero(self.conjugate.outside(rows, self.y))
        if len(outside):
            j = int(outside[0])
            raise ValueError(
                f"alpha is outside the domain of the loss's conjugate in {len(outside)} of {len(rows)} rows, first in"
                f" row {j}: {rows[j].tolist()} with label {self.y[j]}, where it must be {self.conjugate.domain}."
            )
        return self.conjugate.nearest(rows, self.y)


def given(problem: Any, where: str) -> RiskProblem:
    """The problem as it is.  Raises TypeError for what is none."""
    if not isinstance(problem, RiskProblem):
        raise TypeError(f"{where} takes a problem that risk_problem made, first of all, got {type(problem).__name__}.")
    return problem


def real_numbers(name: str, given: Any) -> np.ndarray:
    """An array as float64.  Raises ValueError for what are no real numbers, and for complex or masked entries."""
    try:
        if not np.iscomplexobj(given) and not np.ma.is_masked(given):
            return np.asarray(given, np.float64)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name} must be an array of real numbers without masked entries, got {given!r:.60}.")


def risk_problem(
    branch: Any,
    dataset: Any,
    loss: Any,
    *,
    penalty: Any = None,
    budget: Any = None,
    radius: Any = None,
    power: Any = 2.0,
    reduce: str = "mean",
    seed: int = 0,
) -> RiskProblem:
    """The regularised risk of networks whose branches are all of one kind.

    Args:
      branch: f, without state: a network, or a Linen module or a constructor of NNX modules.
      dataset: a `Dataset`, or a pair of arrays; its inputs are standardised.
      loss: one that has a conjugate and fits the labels.
      penalty: multiplies the mean of h over branches; positive.  Exactly one of `penalty` and `budget` is given.
      budget: bounds the mean of h over branches.
      radius: W is the ball of this radius; None for all of R^p, for a branch that is homogeneous of the degree `power`.
      power: `h(w) = ||w||^power`, at least 1; 2 is weight decay on all parameters, biases too.
      reduce: 'mean' over branches, of outputs and h; 'sum' over any number of branches, which is the same problem for
        a branch that is homogeneous of the degree `power` without a radius, and refused for others.
      seed: of the initialisation that fixes the parameters' shapes.

    Raises:
      TypeError: for a branch that is no network.
      ValueError: for numbers out of range, both or neither of penalty and budget, a loss without conjugate or for other
        labels, a branch with state (batch norm), a missing radius, or a sum that depends on the number of branches.
      UnsupportedPrimitiveError: for a branch that JAX cannot differentiate.
    """
    branch = as_network(branch, "certify.risk_problem").computed()
    loss, data = as_loss(loss), validate(as_dataset(dataset))
    if loss.conjugate is None or loss.slope is None:
        raise ValueError(
            "the loss has no conjugate, so nothing bounds it from below: use binary_hinge, squared, logistic,"
            " multi_margin or crammer_singer, or give losses.Loss its conjugate and slope."
        )
    if data.task not in loss.tasks:
        raise ValueError(f"the loss fits {' and '.join(loss.tasks)} labels, but the data have {data.task} labels.")
    if reduce not in REDUCTIONS:
        raise ValueError(unknown("reduce", reduce, REDUCTIONS))
    if (penalty is None) == (budget is None):
        what = "neither" if penalty is None else "both"
        raise ValueError(f"give exactly one of penalty and budget, got {what}.")
    power = number("power", power)
    if not 1 <= power <= 64:
        raise ValueError(f"power={power!r} must be from 1 to 64, h(w) = ||w||^power.")
    penalty = None if penalty is None else number("penalty", penalty)
    budget = None if budget is None else number("budget", budget)
    if penalty is not None and not 1e-150 < penalty < 1e150:
        raise ValueError(f"penalty={penalty!r} must be positive, between 1e-150 and 1e150.")
    if budget is not None and not 0 <= budget < 1e150:
        raise ValueError(f"budget={budget!r} is below 0, the least h of a branch, or above 1e150; give a larger one.")
    ball = math.inf if radius is None else number("radius", radius)
    if not (ball > 0 and (radius is None or 1e-100 < ball < 1e100)):
        raise ValueError(f"radius={radius!r} must be positive, between 1e-100 and 1e100.")
    x = (np.asarray(data.x, np.float64) - data.mean) / data.std
    template, state = branch.init(seeds.key(seed), jnp.asarray(x[:1], jnp.float32))
    if jax.tree.leaves(state):
        raise ValueError(
            "the branch has a state, such as the running averages of batch norm, which makes its outputs depend on the"
            " batch; certificates take branches without state."
        )
    size = sum(leaf.size for leaf in jax.tree.leaves(template))
    if size == 0:
        raise ValueError("the branch has no parameters, so there is nothing to certify.")
    one = Problem(branch, x, np.zeros((len(x), data.num_outputs)), 0.0, 1.0, ball, power, template, state, size)
    shape = jax.eval_shape(one.outputs, jnp.zeros(size, jnp.float32)).shape
    if shape != one.c.shape:
        raise ValueError(f"the branch gives outputs of shape {shape} on this data set, need {one.c.shape}.")
    check_gradient(one)
    known = structure_of(one)
    if known is not None and known.use_bias and power != 2:
        known = None  # h does not come apart into that of kernels and that of biases
    made = RiskProblem(loss, np.asarray(data.y), penalty, budget, reduce, one, known)
    if math.isinf(ball) and (known is None or known.degree > power):
        why = "is not known to be homogeneous" if known is None else f"has degree {known.degree} > power={power:g}"
        raise ValueError(f"give a radius: the branch {why}, so without a ball W its risk may have no least value.")
    if reduce == "sum" and (not made.scale_free or (known is not None and known.use_bias)):
        raise ValueError(
            "reduce='sum' needs a bias-free branch that is homogeneous of the degree power, and no radius; otherwise"
            " the least risk depends on the number of branches: use reduce='mean'."
        )
    return made
