"""Networks of I branches, for comparison with F*: the regularised risk of their mean, by L-BFGS from several starts.

A budget is met by scaling all weights, a ball by scaling those outside; a hinge is smoothed while weights move, and the
risk of the end is that of the loss itself.  What is found are upper bounds on inf(P_I), nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualgap_jax import seeds
from dualgap_jax.certify.certificate import Certificate
from dualgap_jax.certify.descent import lbfgs
from dualgap_jax.certify.primal import risk
from dualgap_jax.certify.problem import RiskProblem
from dualgap_jax.certify.sliding import smoothed

_ALIKE = 0.9999  # cosine from which two branches count as copies
_EPS = (1e-2, 1e-3, 1e-4)  # the last two of them only for hinges


def rounded(problem: RiskProblem, found: Certificate, count: int) -> np.ndarray:
    """The weights `[count, p]` of a network of `count` branches near a measure.

    Where scales are free a branch takes a share by its size, so that as many branches as the measure has are as good;
    near copies are put together first.  Otherwise branches are repeated as often as is nearest to their shares.
    """
    if problem.scale_free:
        rows: list[np.ndarray] = []
        for k in np.argsort(-found.shares, kind="stable"):
            # f and h of a share are those of the branch times its root of the degree.
            w = found.weights[k] * (found.shares[k] * count) ** (1 / problem.power)
            norms = [np.linalg.norm(w) * np.linalg.norm(other) for other in rows]
            near = [i for i, other in enumerate(rows) if w @ other >= _ALIKE * norms[i]]
            if near:
                size = np.linalg.norm(rows[near[0]]) ** problem.power + np.linalg.norm(w) ** problem.power
                joined = rows[near[0]] + w
                rows[near[0]] = joined / np.linalg.norm(joined) * size ** (1 / problem.power)
            elif np.any(w):
                rows.append(w)
        rows.sort(key=lambda w: -float(np.linalg.norm(w)))
        kept = np.zeros((count, problem.one.size))
        kept[: len(rows)] = rows[:count]
        return kept
    wanted = found.shares / found.shares.sum() * count
    number = np.floor(wanted + 1e-9).astype(int)
    rest = np.argsort(-(wanted - number), kind="stable")[: count - int(number.sum())]
    number[rest] += 1
    return np.repeat(found.weights, number, axis=0)


class Network:
    """The risk of a mean of `count` branches, as a function that L-BFGS can lower.

    Args:
      problem: the risk, of means.
      count: I.
    """

    def __init__(self, problem: RiskProblem, count: int) -> None:
        self._problem, self._count = problem, count
        one, power, x = problem.one, problem.power, np.asarray(problem.one.x)
        loss = smoothed(problem)

        def objective(w: Array, eps: Array) -> Array:
            w = self._inside(w)
            cost = jnp.mean((jnp.sum(w * w, axis=1) + 1e-300) ** (power / 2))
            outputs = jnp.mean(jax.vmap(lambda v: one.outputs(v, x))(w), axis=0)
            return loss(outputs, eps) + (problem.penalty or 0.0) * cost

        def stepped(w: Array, key: Array, rate: Array, steps: int, batch: int) -> Array:
            """Projected SGD on the loss itself; a branch's gradient counts I times, as in the mean-field scaling."""

            def move(w: Array, key: Array) -> tuple[Array, None]:
                picked = jax.random.choice(key, len(x), (batch,), replace=False)

                def part(w: Array) -> Array:
                    outputs = jnp.mean(jax.vmap(lambda v: one.outputs(v, jnp.asarray(x)[picked]))(w), axis=0)
                    cost = jnp.mean((jnp.sum(w * w, axis=1) + 1e-300) ** (power / 2))
                    losses = problem.loss.per_example(outputs, jnp.asarray(problem.y)[picked])
                    return jnp.mean(losses) + (problem.penalty or 0.0) * cost

                return self._inside(w - rate * count * jax.grad(part)(w)), None

            return jax.lax.scan(move, self._inside(w), jax.random.split(key, steps))[0]

        with jax.enable_x64(True):
            self._both = jax.jit(jax.value_and_grad(objective))
            self._stepped = jax.jit(stepped, static_argnums=(3, 4))

    def _inside(self, w: Array) -> Array:
        """The weights, scaled into the ball and to the budget."""
        if math.isfinite(self._problem.radius):
            norms = jnp.sqrt(jnp.sum(w * w, axis=1) + 1e-300)
            w = w * jnp.minimum(1.0, self._problem.radius * (1 - 1e-13) / norms)[:, None]
        if self._problem.budget is None:
            return w
        cost = jnp.mean((jnp.sum(w * w, axis=1) + 1e-300) ** (self._problem.power / 2))
        return w * jnp.minimum(1.0, (self._problem.budget / cost) ** (1 / self._problem.power) * (1 - 1e-13))

    def lowered(self, weights: np.ndarray, steps: int) -> tuple[np.ndarray, float]:
        """Weights `[I, p]` from those given, and an upper bound on their risk."""
        shape, w = weights.shape, weights
        smooth = self._problem.conjugate.kind in ("squared", "logistic")
        for eps in _EPS[:1] if smooth else _EPS:

            def both(v: np.ndarray, eps: float = eps) -> tuple[float, np.ndarray]:
                with jax.enable_x64(True):
                    value, slope = jax.device_get(self._both(jnp.asarray(v.reshape(shape)), eps))
                return float(value), slope.reshape(-1)

            w = lbfgs(both, w.reshape(-1), maxiter=steps, maxcor=20, ftol=1e-15, gtol=1e-10).reshape(shape)
        with jax.enable_x64(True):
            w = np.asarray(self._inside(jnp.asarray(w)))
        return w, risk(self._problem, w, np.full(len(w), 1 / len(w))).upper

    def path(
        self, weights: np.ndarray, looks: Sequence[int], *, rate: float, batch: int, seed: int = 0
    ) -> Iterator[tuple[int, np.ndarray]]:
        """SGD from these weights `[I, p]`: the step and the weights at each of `looks`, increasing numbers of steps."""
        done, key = 0, seeds.key(seed)
        with jax.enable_x64(True):
            w = jnp.asarray(weights, jnp.float64)
        for look in looks:
            with jax.enable_x64(True):
                if look > done:
                    w = self._stepped(w, jax.random.fold_in(key, look), rate, look - done, batch)
                done = look
                now = np.asarray(self._inside(w))
            yield look, now

    def from_random(self, generator: np.random.Generator, steps: int) -> tuple[np.ndarray, float]:
        """The same from random weights."""
        p = self._problem.one.size
        size = min(self._problem.radius, 3.0) * generator.uniform(0.3, 1.0, (self._count, 1))
        weights = generator.standard_normal((self._count, p))
        return self.lowered(weights / np.linalg.norm(weights, axis=1, keepdims=True) * size, steps)
