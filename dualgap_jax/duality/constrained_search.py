"""A search for value functions with h and W of one's own: particles pay for what they cost above their budget.

They end on W by themselves, and are drawn towards the cheapest weights until they are proven to be feasible; their
values bound v from above.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64

from dualgap_jax import seeds
from dualgap_jax.duality.constrained import ByOwn, ConstrainedProblem, draw
from dualgap_jax.duality.constrained_bounds import Sizes, limits_of
from dualgap_jax.duality.problem import values_at
from dualgap_jax.duality.search import SearchSpec, descent, monotone
from dualgap_jax.duality.values import ValueFunction

_PENALTIES = (1.0, 10.0, 100.0)  # in units of 1 / the range of h


@functools.lru_cache(maxsize=16)
def _descend(key: ByOwn, steps: int) -> Any:
    one, h = key.problem.one, key.problem.h_at

    def penalised(w: Array, budget: Array, penalty: Array) -> Array:
        return one.g(w) + penalty * jnp.maximum(h(w) - budget, 0.0)

    return jax.jit(jax.vmap(descent(penalised, steps, lambda w, _: key.problem.set.nearest(w)), (0, None, 0, 0)))


def _affordable(problem: ConstrainedProblem, w: np.ndarray, limit: np.ndarray, cheap: np.ndarray) -> np.ndarray:
    """The points `[k, p]` drawn towards the cheapest, as far as it takes to cost at most `limit [k]` for certain."""
    share, good = np.ones(len(w)), np.zeros(len(w), bool)
    step = np.full(len(w), 0.5)
    kept = np.repeat(cheap[None], len(w), axis=0)
    for k in range(26):
        trial = cheap + share[:, None] * (w - cheap)
        fine = problem.costs(trial) <= limit
        better = fine & (share > np.where(good, _share_of(kept, w, cheap), -1.0))
        kept[better], good = trial[better], good | fine
        if k == 0 and fine.all():
            break
        share = np.where(fine, np.minimum(share + step, 1.0), share - step)
        step *= 0.5
    return kept


def _share_of(kept: np.ndarray, w: np.ndarray, cheap: np.ndarray) -> np.ndarray:
    far = np.linalg.norm(w - cheap, axis=1)
    return np.asarray(np.linalg.norm(kept - cheap, axis=1) / np.where(far > 0, far, 1.0))


def search(
    problem: ConstrainedProblem, budgets: Float64[np.ndarray, " m"], found: Sizes, spec: SearchSpec, *, seed: int = 0
) -> ValueFunction:
    """An estimate of the value function with its minimisers, which are feasible for certain.

    Args:
      problem: the one-branch problem.
      budgets: from `grid`.
      found: the range of h.
      spec: how hard to search.
      seed: of the starting points.

    Raises:
      ValueError: for a g that is not a number at a point of W.
    """
    rng, limits = seeds.generator(seed), limits_of(budgets)
    coarse = np.unique(np.linspace(0, len(budgets) - 1, min(len(budgets), max(2, spec.budgets))).astype(int))
    length = float((problem.set.upper - problem.set.lower).max())
    starts = draw(problem, rng, spec.starts)
    steepness = 1.0 / max(float(budgets[-1] - budgets[0]), 1e-300)
    pool, values = found.point[None], values_at(problem.one, found.point[None])
    with jax.enable_x64(True):
        kernel = _descend(ByOwn(problem), spec.steps)
        for sweep in range(1 + spec.sweeps):
            if sweep:
                starts = pool[np.argsort(values)[: spec.survivors]]
            w = np.tile(starts, (len(coarse), 1))
            at = np.repeat(limits[coarse], len(starts))
            penalty = steepness * rng.choice(_PENALTIES, len(w))
            ends, value = (np.asarray(a) for a in kernel(jnp.asarray(w), length, jnp.asarray(at), jnp.asarray(penalty)))
            if np.isnan(value).any():
                raise ValueError("g is not a number at a point of W; the branch's outputs must be finite on W.")
            ends = _affordable(problem, ends, at, found.point)
            pool = np.concatenate([pool, ends])
            values = np.concatenate([values, values_at(problem.one, ends)])
            costs = problem.costs(pool)
            best = [int(np.argmin(np.where(costs <= limits[k], values, np.inf))) for k in coarse]
            keep = np.unique(np.concatenate([best, np.argsort(values)[:256]]))
            pool, values = pool[keep], values[keep]
    costs = problem.costs(pool)
    by = [int(np.argmin(np.where(costs <= limit, values, np.inf))) for limit in limits]
    right = coarse[np.minimum(np.searchsorted(coarse, np.arange(len(budgets))), len(coarse) - 1)]
    outer = _affordable(problem, pool[[by[k] for k in right]], limits, found.point)
    candidates = np.stack([pool[by], outer], axis=1)
    at_all = values_at(problem.one, candidates.reshape(-1, problem.size)).reshape(len(budgets), 2)
    chosen = np.argmin(at_all, axis=1)
    upper, points = monotone(at_all[np.arange(len(budgets)), chosen], candidates[np.arange(len(budgets)), chosen])
    name = f"search, {len(coarse)} x {spec.starts} starts"
    return ValueFunction(budgets, upper, upper, name, points, floor=found.floor, margin=None)
