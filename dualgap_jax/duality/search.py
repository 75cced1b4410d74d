"""The value function of any branch by a multi-start search: many particles in one program, every budget at once.

A particle is a parameter vector in the ball of its budget.  It moves along its normalised negative gradient, is
projected back, and stays where it is when the value did not fall; its step grows after a success and shrinks after a
failure, so its value never rises.  After the first phase the winners of neighbouring budgets start at each budget too
(warm starts), and the whole is repeated.  What comes out is non-increasing in b by construction: a budget takes over
the minimiser of a smaller one where that is better.

All values are those of concrete feasible points, evaluated in float64 at the end: they bound v from above.  That
nothing better exists is not proven: the status is 'estimated'.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64

from dualgap_jax import seeds, sizes
from dualgap_jax.duality.closed_forms import Kappa
from dualgap_jax.duality.margins import margin_bound
from dualgap_jax.duality.problem import ByProgram, Problem, rounding, values_at
from dualgap_jax.duality.values import ValueFunction, frozen
from dualgap_jax.terminal import COMPILING, Progress


@dataclasses.dataclass(frozen=True)
class SearchSpec:
    """How hard to search.

    Attributes:
      budgets: budgets at which particles are started, spread evenly in the radius.
      starts: particles a budget.
      steps: gradient steps of each phase.
      sweeps: warm-start phases after the first.
      survivors: particles a budget that take part in the sweeps, besides the neighbours' winners.
      chunk: particles in one call.
    """

    budgets: int = 32
    starts: int = 64
    steps: int = 200
    sweeps: int = 3
    survivors: int = 8
    chunk: int = 2048

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            (sizes.count if field.name == "sweeps" else sizes.positive)(
                getattr(self, field.name), f"search.{field.name}"
            )


class _Particle(NamedTuple):
    w: Array
    value: Array
    gradient: Array
    step: Array
    broken: Array  # whether g was not a number where it looked


def _project(w: Array, radius: Array) -> Array:
    norm = jnp.linalg.norm(w)
    return w * jnp.minimum(1.0, radius / jnp.maximum(norm, jnp.finfo(w.dtype).tiny))


def descend(problem: Problem, steps: int) -> Any:
    """A jitted `(w [k, p], radius [k]) -> (w, value [k])`: `steps` of monotone projected gradient for each particle.

    The value is NaN if g was not a number anywhere on the particle's way.
    """
    return _descend(ByProgram(problem), steps)


@functools.lru_cache(maxsize=32)
def _descend(key: ByProgram, steps: int) -> Any:
    return jax.jit(jax.vmap(descent(key.problem.g, steps)))


def descent(
    objective: Callable[..., Array], steps: int, project: Callable[[Array, Array], Array] = _project
) -> Callable[..., tuple[Array, Array]]:
    """`(w [p], radius, *arguments) -> (w, value)`: monotone projected gradient on `objective(w, *arguments)`.

    The value is NaN if the objective was not a number anywhere on the way.  `project(w, radius)` leads into the set.
    """
    value_and_grad = jax.value_and_grad(objective)

    def one(w: Array, radius: Array, *arguments: Array) -> tuple[Array, Array]:
        w = project(w, radius)
        value, gradient = value_and_grad(w, *arguments)

        def move(_: Array, particle: _Particle) -> _Particle:
            norm = jnp.maximum(jnp.linalg.norm(particle.gradient), jnp.finfo(w.dtype).tiny)
            trial = project(particle.w - particle.step * radius * particle.gradient / norm, radius)
            value, gradient = value_and_grad(trial, *arguments)
            better = value < particle.value
            broken = particle.broken | jnp.isnan(value)
            chosen = _Particle(trial, value, gradient, jnp.minimum(1.5 * particle.step, 1.0), broken)
            kept = particle._replace(step=0.5 * particle.step, broken=broken)
            return jax.tree.map(lambda a, b: jnp.where(better, a, b), chosen, kept)

        start = _Particle(w, value, gradient, jnp.asarray(0.5, w.dtype), jnp.isnan(value))
        end = jax.lax.fori_loop(0, steps, move, start)
        return end.w, jnp.where(end.broken, jnp.nan, end.value)

    return one


def _run(kernel: Any, w: np.ndarray, radii: np.ndarray, chunk: int, progress: Any) -> tuple[np.ndarray, np.ndarray]:
    """The kernel on `w [m, s, p]`, `radii [m]`, at most `chunk` particles at a time; the last call is padded."""
    m, s, p = w.shape
    flat, r = w.reshape(m * s, p), np.repeat(radii, s).astype(w.dtype)
    size = min(chunk, m * s)
    ends, values = [], []
    for first in range(0, m * s, size):
        part, radius = flat[first : first + size], r[first : first + size]
        pad = size - len(part)
        out = kernel(np.pad(part, ((0, pad), (0, 0))), np.pad(radius, (0, pad), constant_values=1.0))
        end, value = jax.device_get(out)
        ends.append(end[: len(part)])
        values.append(value[: len(part)])
        progress(len(part))
    value = np.concatenate(values)
    _refuse_nan(value, "on the way of a particle")
    return np.concatenate(ends).reshape(m, s, p), value.reshape(m, s)


class NotANumberError(ValueError):
    """g is not a number where a search looked: at a point of W, or where it leaves the range of the search's floats."""


def _refuse_nan(values: np.ndarray, where: str) -> None:
    """Raises NotANumberError if g is not a number at a point of W: it has no least value then."""
    if np.isnan(values).any():
        wider = "" if values.dtype == np.float64 else ", or dtype=np.float64 if they overflow in float32"
        raise NotANumberError(
            f"g is not a number {where} ({int(np.isnan(values).sum()):,} of {values.size:,}); the branch's outputs must"
            f" be finite on W: give a smaller radius{wider}."
        )


def _fine(problem: Problem, budgets: np.ndarray, coarse: np.ndarray, minimisers: np.ndarray) -> np.ndarray:
    """`[m, 3, p]`: for each budget of the fine grid the neighbouring coarse minimisers, scaled or kept."""
    radii = problem.radii(budgets)
    right = np.clip(np.searchsorted(coarse, budgets), 1, len(coarse) - 1)
    candidates = []
    for index in (right - 1, right):
        w = minimisers[index]
        norm = np.linalg.norm(w, axis=1, keepdims=True)
        norm = np.where(norm > 0, norm, 1.0)  # weights 0 stay 0
        candidates.append(w * (radii[:, None] / norm))
        if index is not right:
            candidates.append(w * np.minimum(1.0, radii[:, None] / norm))
    return np.stack(candidates, axis=1)


def search(
    problem: Problem,
    budgets: Float64[np.ndarray, " m"],
    spec: SearchSpec = SearchSpec(),
    *,
    seed: int = 0,
    dtype: Any = np.float32,
    label: str | None = None,
) -> ValueFunction:
    """An estimate of the value function, with its minimisers.

    Args:
      problem: the one-branch problem.
      budgets: the uniform grid of the result, from 0 to the largest h over W (`problem.grid`).  Particles move at
        `spec.budgets` of its radii; in between, their minimisers are scaled to each budget and evaluated.
      spec: how hard to search.
      seed: of the starting points: uniform directions, uniform radii.
      dtype: of the particles; np.float64 for more digits, at about twice the time.
      label: shows progress under this name; None is silent.

    Returns:
      `upper`: values of feasible points, float64, with a rounding margin; `lower` equal to it: estimated.

    Raises:
      ValueError: for budgets that are not the range of h over W, or a g that is not a number at a point of W.
    """
    budgets = frozen("budgets", budgets)
    problem.check_budgets(budgets)
    rng = seeds.generator(seed)
    top = problem.radii(budgets[-1:])[0]
    count = max(2, spec.budgets)
    coarse = (np.arange(1, count + 1) / count) ** problem.power * budgets[-1]
    radii = problem.radii(coarse)
    directions = rng.standard_normal((count, spec.starts, problem.size))
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    starts = directions * radii[:, None, None] * rng.uniform(0.2, 1, (count, spec.starts, 1)) ** (1 / 3)
    total = count * (spec.starts + spec.sweeps * (spec.survivors + 3))
    done = 0
    with jax.enable_x64(dtype == np.float64):
        kernel = descend(problem, spec.steps)
        with Progress(total, label or "search", first=COMPILING) as line:

            def progress(n: int) -> None:
                nonlocal done
                done += n
                if label is not None:
                    line.update(done)

            w, value = _run(kernel, starts.astype(dtype), radii, spec.chunk, progress)
            for _ in range(spec.sweeps):
                order = np.argsort(value, axis=1)[:, : spec.survivors]
                own = np.take_along_axis(w, order[:, :, None], axis=1)
                own = np.concatenate([own, np.repeat(own[:, :1], spec.survivors - own.shape[1], axis=1)], axis=1)
                best = own[:, 0]
                norm = np.maximum(np.linalg.norm(best, axis=1, keepdims=True), 1e-30)
                below, above = np.roll(best, 1, axis=0), np.roll(best, -1, axis=0)
                below[0], above[-1] = best[0], best[-1]
                outward = below * (radii[:, None] / np.roll(norm, 1, axis=0)).astype(dtype)
                merged = np.concatenate([own, below[:, None], outward[:, None], above[:, None]], axis=1)
                w, value = _run(kernel, merged.astype(dtype), radii, spec.chunk, progress)
    best = np.take_along_axis(w, np.argmin(value, axis=1)[:, None, None], axis=1)[:, 0].astype(np.float64)
    coarse_all, minimisers = np.append(0.0, coarse), np.concatenate([np.zeros((1, problem.size)), best])
    fine = _fine(problem, budgets, coarse_all, minimisers)
    m = len(budgets)
    values = values_at(problem, fine.reshape(-1, problem.size), batch=min(64, spec.chunk)).reshape(m, -1)
    _refuse_nan(values, "at a point of W")
    chosen = np.argmin(values, axis=1)
    upper, points = values[np.arange(m), chosen], fine[np.arange(m), chosen]
    upper, points = monotone(upper, points)
    upper = upper + rounding(problem) * float(top + 1) * (1 + float(np.abs(upper).max()))
    margin = margin_bound(problem)
    share = None if margin is None else margin / problem.tau
    return ValueFunction(budgets, upper, upper, f"search, {count} x {spec.starts} starts", points, margin=share)


def local_minima(
    problem: Problem,
    spec: SearchSpec = SearchSpec(),
    *,
    seed: int = 0,
    dtype: Any = np.float32,
) -> Float64[np.ndarray, "k p"]:
    """Where `starts` particles over all of W end, best first: among them the symmetric copies of a minimiser."""
    rng = seeds.generator(seed)
    starts = rng.standard_normal((1, spec.starts, problem.size))
    starts *= problem.radius / np.linalg.norm(starts, axis=2, keepdims=True)
    top = problem.radii(np.array([problem.largest_budget]))
    with jax.enable_x64(dtype == np.float64):
        w, value = _run(descend(problem, spec.steps), starts.astype(dtype), top, spec.chunk, lambda n: None)
    ends = w[0][np.argsort(value[0])].astype(np.float64)
    return ends * np.minimum(1.0, top[0] / np.maximum(np.linalg.norm(ends, axis=1, keepdims=True), 1e-300))


def monotone(values: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a smaller budget's value is less, its value and point are taken over."""
    least = np.minimum.accumulate(values)
    source = np.maximum.accumulate(np.where(values <= least, np.arange(len(values)), 0))
    return values[source], points[source]


def kappa_by_search(
    problem: Problem,
    spec: SearchSpec = SearchSpec(),
    *,
    seed: int = 0,
    dtype: Any = np.float32,
    degree: int | None = None,
) -> Kappa:
    """kappa of a positively homogeneous branch from the best of `budgets * starts` particles on the unit ball.

    The lower bound is the value of a point; that it is the largest is not proven: the status is 'estimated'.  `degree`
    is L, where it is known.
    """
    rng = seeds.generator(seed)
    starts = rng.standard_normal((1, spec.budgets * spec.starts, problem.size))
    starts /= np.linalg.norm(starts, axis=2, keepdims=True)
    with jax.enable_x64(dtype == np.float64):
        kernel = descend(problem, spec.steps * (1 + spec.sweeps))
        w, value = _run(kernel, starts.astype(dtype), np.ones(1), spec.chunk, lambda n: None)
    best = w[0, int(np.argmin(value[0]))].astype(np.float64)
    norm = float(np.linalg.norm(best))
    best = best / norm if norm > 0 else np.eye(1, problem.size)[0]
    margin = rounding(problem) * (1 + abs(problem.offset))
    kappa = max(0.0, problem.offset - float(values_at(problem, best[None])[0]) - margin)
    if not math.isfinite(kappa):
        raise ValueError("the branch's outputs are not finite on the unit ball; its value function is undefined.")
    largest = margin_bound(problem._replace(radius=1.0))
    share = None if largest is None else largest / problem.tau
    return Kappa(kappa, kappa, best, f"search, {spec.budgets * spec.starts} starts", degree, share)
