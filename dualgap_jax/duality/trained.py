"""Projected SGD on problem (2) with its constraint: what networks reach, beside inf(P)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float64

from dualgap_jax import seeds
from dualgap_jax.config import require
from dualgap_jax.data import Dataset
from dualgap_jax.duality.problem import Problem, values_at
from dualgap_jax.losses import Loss
from dualgap_jax.networks import multi_branch


@dataclasses.dataclass(frozen=True)
class TrainedSpec:
    """SGD on problem (2) with its constraint.

    Attributes:
      num_branches: the numbers of branches that are trained; () trains none.
      seeds: independent runs each, in one program.
      steps: SGD steps.
      batch_size: examples a step.
      learning_rate: times I tau; it falls to 0 along a half cosine.
    """

    num_branches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    seeds: int = 8
    steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 0.5

    def __post_init__(self) -> None:
        require(
            all(n >= 1 for n in self.num_branches),
            f"trained.num_branches={self.num_branches} must be positive integers.",
        )
        for name in ("seeds", "steps", "batch_size"):
            require(getattr(self, name) >= 1, f"trained.{name}={getattr(self, name)} must be at least 1.")
        require(
            0 < self.learning_rate < math.inf,
            f"trained.learning_rate={self.learning_rate} must be positive and finite.",
        )


class Trained(NamedTuple):
    """Where SGD ended.

    Attributes:
      losses: `[seeds]`, the objective of problem (2) at the end; NaN where the run diverged.
      used: `[seeds]`, the mean h of the branches.
    """

    losses: Float64[np.ndarray, " seeds"]
    used: Float64[np.ndarray, " seeds"]

    @property
    def diverged(self) -> int:
        """How many runs ended in weights or losses that are not finite."""
        return int((~np.isfinite(self.losses)).sum())

    def ranked(self) -> Float64[np.ndarray, " seeds"]:
        """The losses with those that diverged above every number."""
        return np.where(np.isfinite(self.losses), self.losses, np.inf)


def project(w: Array, budget: float, radius: float, power: float) -> Array:
    """Maps the weights `w [I, p]` into the feasible set of (2): `||w_i|| <= radius`, `mean ||w_i||^power <= budget`.

    For power 2 this is the projection: `w_i / (1 + mu)`, cut to the ball, with the least mu >= 0 that meets the budget
    (found by bisection).  For other powers all weights are multiplied by one factor.
    """
    norms = jnp.maximum(jnp.linalg.norm(w, axis=1), 1e-30)
    low, high = jnp.zeros(()), jnp.asarray(1.0)

    def size(scale: Array) -> Array:
        return jnp.mean(jnp.minimum(norms * scale, radius) ** power)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = 0.5 * (ends[0] + ends[1])
        fits = size(middle) <= budget
        return jnp.where(fits, middle, ends[0]), jnp.where(fits, ends[1], middle)

    # The scale 1 / (1 + mu) lies in (0, 1]; the lower end always fits.
    low, _ = jax.lax.fori_loop(0, 40, halve, (low, high))
    scale = jnp.where(size(high) <= budget, 1.0, low)
    factor = scale if power == 2 else scale * jnp.ones(())
    return w * jnp.minimum(factor, radius / norms)[:, None]


def train_constrained(
    problem: Problem, loss: Loss, dataset: Dataset, spec: TrainedSpec, *, budget: float, num_branches: int, seed: int
) -> Trained:
    """Projected SGD on problem (2) from several seeds.

    Args:
      problem: the one-branch problem, which fixes the branch and W.
      loss: the hinge of eq. (1) for the data, with the problem's tau.
      dataset: the data set of the problem.
      spec: how to train.
      budget: K, for the mean h of the branches.
      num_branches: I.
      seed: of all runs.

    Returns:
      The objective at the end of each run, in float64.
    """
    net = multi_branch(problem.branch, num_branches)
    x, y = jnp.asarray(problem.x, jnp.float32), jnp.asarray(dataset.y)
    rate = spec.learning_rate * num_branches * problem.tau
    rate = rate if rate < float(np.finfo(np.float32).max) else math.inf
    batch = min(spec.batch_size, len(y))
    inner, radius = budget * (1 - 1e-6), problem.radius * (1 - 1e-6)

    def flat(params: Any) -> Array:
        return jnp.concatenate([leaf.reshape(num_branches, -1) for leaf in jax.tree.leaves(params)], axis=1)

    def unflat(w: Array, params: Any) -> Any:
        leaves, tree = jax.tree.flatten(params)
        sizes = np.cumsum([leaf.size // num_branches for leaf in leaves])[:-1]
        parts = jnp.split(w, sizes.tolist(), axis=1)
        return jax.tree.unflatten(tree, [p.reshape(leaf.shape) for p, leaf in zip(parts, leaves, strict=True)])

    def run(key: Array) -> Array:
        params, state = net.init(key, x[:1])

        def objective(params: Any, rows: Array) -> Array:
            return jnp.mean(loss.per_example(net.apply(params, state, x[rows])[0], y[rows]))

        def step(t: Array, params: Any) -> Any:
            rows = jax.random.randint(jax.random.fold_in(key, t), (batch,), 0, len(y))
            gradient = jax.grad(objective)(params, rows)
            now = rate * 0.5 * (1 + jnp.cos(jnp.pi * t / spec.steps))
            moved = flat(params) - now * flat(gradient)
            return unflat(project(moved, inner, radius, problem.power), params)

        start = unflat(project(flat(params), inner, radius, problem.power), params)
        return flat(jax.lax.fori_loop(0, spec.steps, step, start))

    keys = jax.random.split(seeds.key(seed), spec.seeds)
    weights = np.asarray(jax.jit(jax.vmap(run))(keys), np.float64)
    values = values_at(problem, weights.reshape(-1, problem.size), batch=256).reshape(spec.seeds, num_branches)
    finite = np.isfinite(weights).all(axis=(1, 2))
    losses = np.where(finite, values.mean(axis=1), np.nan)
    return Trained(losses, np.where(finite, problem.h(weights).mean(axis=1), np.nan))
