"""The best branch for a dual vector by a multi-start search: points, and with them numbers that are estimated.

The same monotone projected gradient as in `duality.search`, with the dual vectors and the multiplier as arguments, so
that one compiled program serves all of them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualgap_jax import seeds
from dualgap_jax.certify.problem import RiskProblem


@functools.lru_cache(maxsize=16)
def _programs(problem: RiskProblem, steps: int) -> tuple[Any, Any]:
    """The jitted descent of a batch of points, and phi at the rows of an array."""
    one, power, x = problem.one, problem.power, np.asarray(problem.one.x)

    def phi(w: Array, alpha: Array, lam: Array) -> Array:
        norm = jnp.sqrt(jnp.sum(w * w) + 1e-300)
        return jnp.sum(alpha * one.outputs(w, x)) / len(x) + lam * norm**power

    def project(w: Array, radius: Array) -> Array:
        return w * jnp.minimum(1.0, radius / jnp.maximum(jnp.linalg.norm(w), 1e-300))

    def run(w: Array, alpha: Array, lam: Array, radius: Array) -> tuple[Array, Array]:
        both = jax.value_and_grad(phi)

        def move(_: Any, state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            w, value, slope, step = state
            size = jnp.maximum(jnp.linalg.norm(slope), 1e-300)
            trial = project(w - step * radius * slope / size, radius)
            found, slope_there = both(trial, alpha, lam)
            better = found < value
            return (
                jnp.where(better, trial, w),
                jnp.where(better, found, value),
                jnp.where(better, slope_there, slope),
                jnp.where(better, jnp.minimum(1.6 * step, 1.0), 0.5 * step),
            )

        value, slope = both(w, alpha, lam)
        end = jax.lax.fori_loop(0, steps, move, (w, value, slope, jnp.asarray(0.3, w.dtype)))
        return end[0], end[1]

    def values(w: Array, alpha: Array, lam: Array) -> Array:
        return jax.lax.map(lambda one: phi(one, alpha, lam), w, batch_size=64)

    return jax.jit(jax.vmap(run, in_axes=(0, None, None, None))), jax.jit(values)


class BranchSearch:
    """Minimises `phi(w) = (1/n) sum_j <alpha_j, f(w; x_j)> + lam ||w||^q` over a ball.

    Args:
      problem: the risk.
      starts: random starts of a call.
      steps: gradient steps of each.
      seed: of the starts.
      chunk: points in one call of the compiled program.
    """

    def __init__(
        self, problem: RiskProblem, *, starts: int = 64, steps: int = 100, seed: int = 0, chunk: int = 64
    ) -> None:
        self._problem, self._starts, self._chunk = problem, starts, min(chunk, starts)
        self._generator = seeds.generator(seed)
        self._run, self._phi = _programs(problem, steps)

    def __call__(
        self,
        alpha: np.ndarray,
        lam: float,
        radius: float,
        points: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the starts end, `[k, p]`, and phi there, `[k]`, the least first.

        Args:
          alpha: `[n, out]`.
          lam: the multiplier.
          radius: of the ball that is searched.
          points: `[m, p]`, further starts.
        """
        p = self._problem.one.size
        starts = self._generator.standard_normal((self._starts, p))
        starts *= (
            radius * self._generator.uniform(0.3, 1, (len(starts), 1)) / np.linalg.norm(starts, axis=1, keepdims=True)
        )
        if points is not None and len(points):
            starts = np.concatenate([points, starts])
        ends, values = [], []
        with jax.enable_x64(True):
            rows, multiplier = jnp.asarray(alpha, jnp.float64), jnp.asarray(lam, jnp.float64)
            ball = jnp.asarray(radius, jnp.float64)
            for first in range(0, len(starts), self._chunk):
                part = starts[first : first + self._chunk]
                padded = np.pad(part, ((0, self._chunk - len(part)), (0, 0)))
                end, value = jax.device_get(self._run(padded, rows, multiplier, ball))
                ends.append(end[: len(part)])
                values.append(value[: len(part)])
        end, value = np.concatenate(ends), np.concatenate(values)
        if not np.isfinite(value).all():
            raise ValueError("the branch's outputs are not finite on W, so its least value is not defined.")
        order = np.argsort(value, kind="stable")
        return end[order], value[order]

    def values(self, w: np.ndarray, alpha: np.ndarray, lam: float) -> np.ndarray:
        """phi at the rows of `w [k, p]`, in float64."""
        with jax.enable_x64(True):
            return np.asarray(self._phi(jnp.asarray(w, jnp.float64), jnp.asarray(alpha, jnp.float64), lam))

    def kappa(self, alpha: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Branches `[k, p]` of norm 1, of a homogeneous kind, and `-(1/n) sum <alpha_j, f(w; x_j)>`, largest first.

        Args:
          alpha: `[n, out]`.
          points: `[m, p]`, further starts.
        """
        known, x = self._problem.structure, self._problem.one.x
        assert known is not None
        if known.degree == 2:
            rows = known.inputs(x)
            units = known.layers(points, (rows.shape[1] - known.use_bias, alpha.shape[1]))[0][0].reshape(
                -1, rows.shape[1]
            )
            starts = self._generator.standard_normal((self._starts, rows.shape[1]))
            directions, sums = best_units(rows, -alpha, np.concatenate([units, starts]), known.negative_slope)
            values = np.linalg.norm(sums, axis=1)
            order = np.argsort(-values, kind="stable")[: 2 * self._starts]
            heads = sums / np.maximum(values, 1e-300)[:, None]
            return np.stack([known.unit(directions[k], heads[k]) for k in order]), 0.5 * values[order]
        points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-300)
        ends, values = self(alpha, 0.0, 1.0, points)
        return ends / np.maximum(np.linalg.norm(ends, axis=1, keepdims=True), 1e-300), np.maximum(0.0, -values)


def best_units(
    x: np.ndarray, alpha: np.ndarray, units: np.ndarray, slope: float, steps: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Local maxima of `||(1/n) sum_j alpha_j psi(u.x_j)||` over unit vectors, `[k, d]`, and the sums `[k, out]` there.

    In a cell the sum is `A u`, so each step goes a part of the way to the direction `A^T A u`, or the whole way to
    begin with; a step that does not raise the value is halved.
    """

    def at(u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        t = u @ x.T
        gates = np.where(t > 0, 1.0, slope)
        sums = (gates * t) @ alpha / len(x)
        return sums, np.linalg.norm(sums, axis=1), ((sums @ alpha.T) * gates) @ x

    norms = np.linalg.norm(units, axis=1, keepdims=True)
    u = units[norms[:, 0] > 0] / norms[norms[:, 0] > 0]
    sums, values, ascent = at(u)
    part = np.ones(len(u))
    for _ in range(steps):
        going = part > 1e-9
        if not going.any():
            break
        way = ascent[going] / np.maximum(np.linalg.norm(ascent[going], axis=1, keepdims=True), 1e-300)
        trial = u[going] + part[going, None] * (way - u[going])
        trial /= np.maximum(np.linalg.norm(trial, axis=1, keepdims=True), 1e-300)
        new_sums, new_values, new_ascent = at(trial)
        better = new_values > values[going]
        rows = np.flatnonzero(going)[better]
        u[rows], sums[rows], values[rows], ascent[rows] = (
            trial[better],
            new_sums[better],
            new_values[better],
            new_ascent[better],
        )
        part[going] = np.where(better, np.minimum(1.0, 2 * part[going]), 0.5 * part[going])
    return u, sums
