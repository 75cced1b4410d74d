"""All branches of a measure moved at once: L-BFGS over their weights and shares together.

A hinge is smoothed for it (a maximum becomes `eps` times the log of a sum of exponentials); what is found are places
to put branches, from which the convex problem over shares starts.  Without a ball and for a branch that is homogeneous
of the degree of h, shares are part of the weights, and a budget is met by scaling all; otherwise shares are squares
over their sum, weights outside the ball are drawn onto it, and a budget is met by giving a share to the branch 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualgap_jax.certify.descent import lbfgs
from dualgap_jax.certify.primal import inside
from dualgap_jax.certify.problem import RiskProblem


def smoothed(problem: RiskProblem) -> Callable[[Array, Array], Array]:
    """`(outputs [n, out], eps) -> mean loss`, smooth for eps > 0; smooth losses stay as they are."""
    y, kind, tau = jnp.asarray(problem.y), problem.conjugate.kind, problem.loss.tau or 1.0
    if kind in ("squared", "logistic"):
        return lambda outputs, eps: jnp.mean(problem.loss.per_example(outputs, y))
    if kind == "hinge":
        return lambda outputs, eps: jnp.mean(eps * jax.nn.softplus((1 - y * outputs[:, 0] / tau) / eps))

    def several(outputs: Array, eps: Array) -> Array:
        own = jnp.arange(outputs.shape[1])[None, :] == y[:, None]
        scores = jnp.sum(jnp.where(own, outputs, 0.0), axis=1, keepdims=True)
        terms = 1 - (scores - outputs) / tau
        if kind == "multi-margin":
            return jnp.mean(jnp.sum(jnp.where(own, 0.0, eps * jax.nn.softplus(terms / eps)), 1)) / outputs.shape[1]
        rest = jnp.where(own, 0.0, terms)  # the own class stands for the 0 of the maximum
        return jnp.mean(eps * jax.nn.logsumexp(rest / eps, axis=1))

    return several


class Slide:
    """Moves up to `units` branches together.

    Args:
      problem: the risk.
      units: how many; fewer are filled up with branches without share.
    """

    def __init__(self, problem: RiskProblem, units: int) -> None:
        self._problem, self._units = problem, units
        one, power, free, x = problem.one, problem.power, problem.scale_free, np.asarray(problem.one.x)
        loss, out = smoothed(problem), jax.vmap(lambda w: one.outputs(w, x))
        known = problem.structure
        kernels = np.ones((1, one.size))
        if free and known is not None:
            kernels = known.kernels_only((int(np.prod(x.shape[1:])), problem.shape[1]))[None]

        def objective(w: Array, t: Array, eps: Array) -> Array:
            squares = jnp.sum(w * w * kernels, axis=1)
            bias = jnp.sum(jnp.sum(w * (1 - kernels), axis=0) ** 2)  # one output bias, the sum of all
            shares, zero = jnp.ones(len(w)), jnp.zeros(problem.shape)
            if not free:
                shares = t * t / jnp.sum(t * t)
                if math.isfinite(problem.radius):
                    w = w * jnp.minimum(1.0, problem.radius / jnp.sqrt(squares + 1e-300))[:, None]
                squares, zero = jnp.sum(w * w, axis=1), one.outputs(jnp.zeros(one.size), x)
            cost = jnp.sum(shares * (squares + 1e-300) ** (power / 2)) + bias
            outputs = jnp.tensordot(shares, out(w), 1)
            if problem.budget is not None:
                part = jnp.minimum(1.0, problem.budget / jnp.maximum(cost, 1e-300))
                return loss(part * outputs + (1 - part) * zero, eps)
            return loss(outputs, eps) + (problem.penalty or 0.0) * cost

        with jax.enable_x64(True):
            self._both = jax.jit(jax.value_and_grad(objective, (0, 1)))

    def __call__(
        self, weights: np.ndarray, shares: np.ndarray, bias: np.ndarray, *, eps: float, steps: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights `[units, p]`, shares and output bias after L-BFGS from those given, of which the largest are kept."""
        free, p, power = self._problem.scale_free, self._problem.one.size, self._problem.power
        kept = np.argsort(-shares, kind="stable")[: self._units]
        w, t = np.zeros((self._units, p)), np.full(self._units, 1e-4)
        w[: len(kept)], t[: len(kept)] = weights[kept], np.sqrt(np.maximum(shares[kept], 1e-8))
        if free:
            w[: len(kept)] *= (np.maximum(shares[kept], 1e-12) ** (1 / power))[:, None]
            assert self._problem.structure is not None
            w[:1] = self._problem.structure.with_bias(w[:1], bias)

        def both(v: np.ndarray) -> tuple[float, np.ndarray]:
            with jax.enable_x64(True):
                value, (dw, dt) = jax.device_get(self._both(v[: w.size].reshape(w.shape), v[w.size :], eps))
            return float(value), np.concatenate([dw.reshape(-1), dt])

        start = np.concatenate([w.reshape(-1), t])
        end = lbfgs(both, start, maxiter=steps, maxcor=20, ftol=1e-15, gtol=1e-11)
        w, t = end[: w.size].reshape(w.shape), end[w.size :]
        if free:
            assert self._problem.structure is not None
            w, biases = self._problem.structure.apart(w, len(bias))
            return w, np.ones(self._units), biases.sum(axis=0)
        return inside(self._problem, w, 1e-12), t * t / np.sum(t * t), bias
