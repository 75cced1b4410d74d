"""The best branch for a dual vector by a multi-start search: points, and with them numbers that are estimated.

The same monotone projected gradient as in `duality.search`, with the dual vectors and the multiplier as arguments, so
that one compiled program serves all of them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualgap_jax import seeds
from dualgap_jax.certify.cells import scaled
from dualgap_jax.certify.closed import best
from dualgap_jax.certify.problem import RiskProblem
from dualgap_jax.sizes import positive

_TOGETHER = 32  # units that are raised together
_MEMORY = 10  # steps that L-BFGS remembers
_CORNERS = (1e-1, 1e-2, 1e-3, 1e-4)  # of the size of the inputs
_LARGE = 2**17  # numbers of the inputs above which units are raised in float32
_TINY = 1e-30
_NUMBERS = 2**20  # of the inputs that a first search looks at


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
        starts, steps = positive(starts, "starts"), positive(steps, "steps")
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

    @property
    def in_parts(self) -> bool:
        """Whether there are so many examples that `kappa` looks at a part of them first."""
        return self._every() > 1

    def _every(self) -> int:
        known = self._problem.structure
        if known is None or not known.bent:
            return 1
        return -(-known.inputs(self._problem.one.x).size // _NUMBERS)

    def kappa(
        self, alpha: np.ndarray, points: np.ndarray, *, coarse: bool = False, alone: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Branches `[k, p]` of norm 1, of a homogeneous kind, and `-(1/n) sum <alpha_j, f(w; x_j)>`, largest first.

        Args:
          alpha: `[n, out]`.
          points: `[m, p]`, further starts.
          coarse: of many examples, units are raised over a part only; the values are over all, but not the largest.
          alone: units of many examples start from these points alone.
        """
        known, x = self._problem.structure, self._problem.one.x
        assert known is not None
        rows = known.inputs(x)
        (small, e1), (weights, e2) = scaled(rows), scaled(alpha)
        if (found := best(known, small, weights)) is not None:
            return found.points, np.ldexp(found.values * known.share, known.order * e1 + e2)
        if known.bent:
            units = known.layers(points, (rows.shape[1] - known.use_bias, alpha.shape[1]))[0][0].reshape(
                -1, rows.shape[1]
            )
            every, slope, steps = self._every(), known.negative_slope, 60
            part, starts = (rows[::every], -alpha[::every]), units
            if not alone or every == 1:
                starts = self._generator.standard_normal((self._starts, rows.shape[1]))
                starts = np.concatenate([_largest(*part, units, slope, self._starts), starts])
            if every > 1:  # the best of what a part of the examples says, and of the points, raised over all of them
                raised = units[:0] if alone else best_units(*part, starts, slope)[0]
                starts = _largest(rows, -alpha, np.concatenate([units, raised]), slope, 4)
                steps = 0 if coarse else 20
            directions, sums = best_units(rows, -alpha, starts, slope, steps)
            values = np.linalg.norm(sums, axis=1)
            order = np.argsort(-values, kind="stable")[: 2 * self._starts]
            heads = sums / np.maximum(values, 1e-300)[:, None]
            return np.stack([known.unit(directions[k], heads[k]) for k in order]), 0.5 * values[order]
        points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-300)
        ends, values = self(alpha, 0.0, 1.0, points)
        return ends / np.maximum(np.linalg.norm(ends, axis=1, keepdims=True), 1e-300), np.maximum(0.0, -values)


def _largest(x: np.ndarray, alpha: np.ndarray, units: np.ndarray, slope: float, count: int) -> np.ndarray:
    """The `count` of these units `[k, d]` whose sums are largest for their length."""
    if len(units) <= count:
        return units
    values = np.zeros(len(units))
    for first in range(0, len(units), 64):
        part = units[first : first + 64]
        t = part @ x.T
        sums = np.linalg.norm(np.where(t > 0, t, slope * t) @ alpha, axis=1)
        values[first : first + 64] = sums / np.maximum(np.linalg.norm(part, axis=1), 1e-300)
    return units[np.argsort(-values, kind="stable")[:count]]


def best_units(
    x: np.ndarray, alpha: np.ndarray, units: np.ndarray, slope: float, steps: int = 60
) -> tuple[np.ndarray, np.ndarray]:
    """Local maxima of `||(1/n) sum_j alpha_j psi(u.x_j)||` over unit vectors, `[k, d]`, and the sums `[k, out]` there.

    Examples with a negative coefficient make ridges, and the maxima lie where ridges meet, so that steps along a
    gradient stop short of them.  Corners are rounded with four widths, each a tenth of the one before, and units are
    raised by L-BFGS, each with its own steps, many at once; of many examples in float32 but for the last width.  A unit
    that ends lower than it began stays where it was.
    """
    if len(x) < x.shape[1]:  # a part of a unit outside the span of the examples does nothing
        basis = np.linalg.qr(x.T)[0]
        found, sums = best_units(x @ basis, alpha, units @ basis, slope, steps)
        return found @ basis.T, sums
    norms = np.linalg.norm(units, axis=1, keepdims=True)
    found = units[norms[:, 0] > 0] / norms[norms[:, 0] > 0]
    points, weights = x / (np.abs(x).max(initial=0.0) or 1.0), alpha / (np.abs(alpha).max(initial=0.0) or 1.0)
    width = math.sqrt(float(np.mean(points**2))) or 1.0
    rough = np.float32 if points.size > _LARGE else np.float64
    data = {kind: (points.astype(kind), weights.astype(kind)) for kind in (rough, np.float64)}

    def at(u: np.ndarray, corner: float) -> tuple[np.ndarray, np.ndarray]:
        """The rounded sizes, in units of what they may be, and minus their slopes along the sphere."""
        points, weights = data[u.dtype.type]
        t = u @ points.T
        rounded = np.sqrt(t * t + corner * corner)
        sums = (0.5 * (1 + slope) * t + 0.5 * (1 - slope) * rounded) @ weights / (len(x) * width)
        values = np.linalg.norm(sums, axis=1)
        gates = 0.5 * (1 + slope) + 0.5 * (1 - slope) * t / rounded
        pull = ((sums / np.maximum(values, _TINY)[:, None]) @ weights.T * gates) @ points / (len(x) * width)
        return values, u * (pull * u).sum(axis=1, keepdims=True) - pull

    def sums_at(u: np.ndarray) -> np.ndarray:
        t = u @ x.T
        return np.where(t > 0, t, slope * t) @ alpha / len(x)

    sums = np.zeros((len(found), alpha.shape[1]))
    for first in range(0, len(found), _TOGETHER):
        rows = slice(first, first + _TOGETHER)
        before, u = sums_at(found[rows]), found[rows]
        for share in _CORNERS:
            u = u.astype(np.float64 if share == _CORNERS[-1] else rough)
            u = _ascended(functools.partial(at, corner=share * width), _unit(u), steps)
        after = sums_at(u)
        better = np.linalg.norm(after, axis=1, keepdims=True) > np.linalg.norm(before, axis=1, keepdims=True)
        found[rows], sums[rows] = np.where(better, u, found[rows]), np.where(better, after, before)
    return found, sums


def _unit(u: np.ndarray) -> np.ndarray:
    return u / np.maximum(np.linalg.norm(u, axis=1, keepdims=True), _TINY)


def _ascended(at: Any, u: np.ndarray, steps: int) -> np.ndarray:
    """Unit vectors `[k, d]` raised by L-BFGS, each for itself; `at(u)` gives values and minus their slopes.

    A step that does not raise a value is halved; the two-loop recursion is that of Nocedal and Wright, section 7.2.
    """
    value, slope = at(u)
    moves: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # steps, changes of the slope, 1 over their products
    length = 0.1 / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), _TINY)
    part, way = np.ones((len(u), 1), u.dtype), -slope * length
    for _ in range(steps):
        trial = _unit(u + part * way)
        found, there = at(trial)
        better = (found > value)[:, None]
        if not better.any() and part.max() < 1e-6:
            break
        step, change = np.where(better, trial - u, 0.0), np.where(better, there - slope, 0.0)
        product = (step * change).sum(axis=1, keepdims=True)
        square = (change * change).sum(axis=1, keepdims=True)
        curved = product > 1e-12 * np.sqrt(square * (step * step).sum(axis=1, keepdims=True))
        moves = [*moves[1 - _MEMORY :], (step, change, np.where(curved, 1 / np.where(curved, product, 1.0), 0.0))]
        length = np.where(curved, product / np.where(curved, square, 1.0), length)
        u, slope = np.where(better, trial, u), np.where(better, there, slope)
        value, part = np.where(better[:, 0], found, value), np.where(better, 1.0, 0.5 * part)
        q, used = slope, []
        for s, y, rho in reversed(moves):
            used.append(rho * (s * q).sum(axis=1, keepdims=True))
            q = q - used[-1] * y
        q = q * length
        for (s, y, rho), a in zip(moves, reversed(used), strict=True):
            q = q + (a - rho * (y * q).sum(axis=1, keepdims=True)) * s
        down = (q * slope).sum(axis=1, keepdims=True) > 0
        way = np.where(down, -q, -slope * length)
    return u
