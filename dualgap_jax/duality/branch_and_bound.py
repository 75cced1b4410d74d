"""Certified value functions of branches with few parameters (p up to 4 or so), any activation, by branch and bound.

All budgets are treated in one tree of boxes.  For a box B of parameters let `h_lo, h_hi` be the range of `||w||^2` on it.
Its part of the problem with `||w||^2 <= s` is bounded from below by interval arithmetic on the branch's jaxpr, in two
ways: the range of g on B; and, for a multiplier lam >= 0 of its own, by

    g(w) >= g(w) + lam (||w||^2 - min(s, h_hi)) >= g(m) + min over B of { d.(w - m) + lam ||w||^2 } - lam min(s, h_hi)

with m the middle of B and d in the interval of gradients over B (mean value form; the minimum separates by coordinates).
At a constrained minimum the gradient of g + lam ||w||^2 vanishes, so the second bound is off by the square of the box's
size only, although the sphere cuts the box.  A box is closed when, at every budget that it reaches, its bound is within
the tolerance of the best value known there; the others are halved.  What is proven at a budget is the least bound of the
closed boxes, and of those still open when the effort is spent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64

from dualgap_jax.config import require
from dualgap_jax.duality.gap import ValueFunction
from dualgap_jax.duality.intervals import extension
from dualgap_jax.duality.problem import Problem
from dualgap_jax.duality.search import monotone
from dualgap_jax.records import Progress

MAX_PARAMETERS = 6
_BATCH = 1024


class BoundSpec(NamedTuple):
    """How far to go.

    Attributes:
      tolerance: distance of the two bounds at which a box is closed, in units of the loss.
      max_boxes: boxes in all; the bounds reached by then are returned.
    """

    tolerance: float = 1e-4
    max_boxes: int = 1_000_000


def check(spec: BoundSpec) -> None:
    """Raises ConfigError for a tolerance that is not positive, or no boxes."""
    require(spec.tolerance > 0, f"tolerance={spec.tolerance} must be positive.")
    require(spec.max_boxes >= 1, f"max_boxes={spec.max_boxes} must be at least 1.")


class _Bounds(NamedTuple):
    """For each box: the range of `||w||^2`, and lower bounds `plain` and `base - lam * min(s, h_hi)` on g + lam0 ||w||^2."""

    h_lo: np.ndarray
    h_hi: np.ndarray
    plain: np.ndarray
    base: np.ndarray
    lam: np.ndarray
    value: np.ndarray  # upper bound on the objective at the middle
    split: np.ndarray  # the coordinate to halve


def _quadratic(slope: Array, m: Array, r: Array, lam: Array) -> Array:
    """A lower bound on `min over t in [0, r] of slope t + lam ((m + t)^2 - m^2)`."""
    a = slope + 2 * lam * m
    t = jnp.clip(jnp.where(lam > 0, -a / jnp.maximum(2 * lam, 1e-300), jnp.where(a < 0, r, 0.0)), 0.0, r)
    error = 32 * float(jnp.finfo(r.dtype).eps) * (jnp.abs(slope) * r + lam * (2 * jnp.abs(m) * r + r * r))
    return jnp.minimum(a * t + lam * t * t, 0.0) - error


def _bounds(problem: Problem, lam0: Array) -> Callable[[Array, Array], Any]:
    """`(lo [p], hi [p]) -> _Bounds` of one box, for the objective `g + lam0 ||w||^2`."""
    example = jnp.zeros(problem.size, jnp.float64)
    point = extension(problem.g, example)
    full = extension(jax.value_and_grad(problem.g), example)
    eps = float(jnp.finfo(jnp.float64).eps)

    def one(lo: Array, hi: Array) -> _Bounds:
        m = 0.5 * (lo + hi)
        r = jnp.maximum(hi - m, m - lo) * (1 + 4 * eps)
        (plain, d_lo), (_, d_hi) = full(lo, hi)
        at, at_hi = point(m, m)
        sides = jnp.maximum(jnp.abs(lo), jnp.abs(hi))
        near = jnp.where((lo <= 0) & (hi >= 0), 0.0, jnp.minimum(jnp.abs(lo), jnp.abs(hi)))
        h_lo, h_hi = jnp.sum(near**2) * (1 - 16 * eps), jnp.sum(sides**2) * (1 + 16 * eps)
        size = jnp.sum(m * m)

        def base(lam: Array) -> Array:
            up = _quadratic(d_lo, m, r, lam)
            down = _quadratic(-d_hi, -m, r, lam)
            return at + lam * size * (1 - 16 * eps) + jnp.sum(jnp.minimum(up, down)) * (1 + 16 * eps)

        # The multiplier that makes the gradient of g + lam ||w||^2 at the middle orthogonal to m.
        fitted = -jnp.sum(m * 0.5 * (d_lo + d_hi)) / jnp.maximum(2 * size, 1e-300)
        lam = jnp.where(jnp.isfinite(fitted), jnp.clip(fitted, lam0, 1e6), lam0)
        # Both multipliers are valid; at lam0 the bound does not depend on s.
        plain = jnp.maximum(plain + lam0 * h_lo, base(lam0))
        value = at_hi + lam0 * size * (1 + 16 * eps)
        spread = r * (d_hi - d_lo) + 1e-12 * r
        return _Bounds(h_lo, h_hi, plain, base(lam), lam, value, jnp.argmax(jnp.nan_to_num(spread, nan=jnp.inf)))

    return one


@functools.lru_cache(maxsize=16)
def _kernel(key: _Key) -> Any:
    return jax.jit(lambda lo, hi, lam0: jax.vmap(_bounds(key.problem, lam0))(lo, hi))


class _Key:
    """A problem as a cache key, by identity."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __hash__(self) -> int:
        return id(self.problem)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.problem is self.problem


class _Tree(NamedTuple):
    """What a run proved at each budget, the best values, their points, boxes seen, and how many were left open."""

    lower: np.ndarray
    upper: np.ndarray
    points: np.ndarray
    boxes: int
    left_open: int


def _grow(
    problem: Problem,
    squares: np.ndarray,
    upper: np.ndarray,
    points: np.ndarray,
    spec: BoundSpec,
    lam0: float,
    label: str | None,
) -> _Tree:
    """Branch and bound at the squared radii `squares [m]`, increasing."""
    p = problem.size
    top = squares[-1]
    edge = np.sqrt(top) * (1 + 1e-15)
    corner = np.array(np.meshgrid(*[[0, 1]] * p, indexing="ij")).reshape(p, -1).T
    lo, hi = np.where(corner == 0, -edge, 0.0), np.where(corner == 0, 0.0, edge)
    proven = np.full(len(squares), np.inf)
    upper, points = upper.copy(), points.copy()
    kernel = _kernel(_Key(problem))
    boxes = 0
    open_bound = np.full(len(squares), np.inf)
    with Progress(spec.max_boxes, label or "boxes") as line, jax.enable_x64(True):
        while len(lo):
            if boxes + len(lo) > spec.max_boxes and boxes:
                break
            open_bound = np.full(len(squares), np.inf)
            keep_lo, keep_hi = [], []
            for first in range(0, len(lo), _BATCH):
                part_lo, part_hi = lo[first : first + _BATCH], hi[first : first + _BATCH]
                n = len(part_lo)
                pad = ((0, _BATCH - n), (0, 0))
                out = _Bounds(
                    *(a[:n] for a in jax.device_get(kernel(np.pad(part_lo, pad), np.pad(part_hi, pad), lam0)))
                )
                middle = 0.5 * (part_lo + part_hi)
                where = np.searchsorted(squares, np.sum(middle**2, axis=1) * (1 + 1e-14))
                for k in np.flatnonzero((where < len(squares)) & np.isfinite(out.value)):
                    if out.value[k] < upper[where[k]]:
                        upper[where[k]], points[where[k]] = out.value[k], middle[k]
                upper, points = monotone(upper, points)
                reach = np.minimum(squares[None], out.h_hi[:, None])
                bound = np.maximum(
                    np.nan_to_num(out.plain, nan=-np.inf)[:, None],
                    np.nan_to_num(out.base[:, None] - (out.lam[:, None] - lam0) * reach, nan=-np.inf),
                )
                # The difference of products above is good to a few ulps of its largest term.
                bound -= 1e-15 * (np.abs(bound) + (np.abs(out.lam) * top)[:, None])
                bound = np.where(squares[None] >= out.h_lo[:, None], bound, np.inf)
                closed = (bound >= upper[None] - spec.tolerance).all(axis=1)
                proven = np.minimum(proven, bound[closed].min(axis=0, initial=np.inf))
                if not closed.all():
                    open_bound = np.minimum(open_bound, bound[~closed].min(axis=0))
                    rest = np.flatnonzero(~closed)
                    low, high, cut = part_lo[rest], part_hi[rest], out.split[rest].astype(int)
                    rows = np.arange(len(rest))
                    left_hi, right_lo = high.copy(), low.copy()
                    left_hi[rows, cut] = right_lo[rows, cut] = middle[rest, cut]
                    keep_lo += [low, right_lo]
                    keep_hi += [left_hi, high]
            boxes += len(lo)
            if label is not None:
                line.update(min(boxes, spec.max_boxes), f"{sum(map(len, keep_lo)):,} open")
            lo = np.concatenate(keep_lo) if keep_lo else np.zeros((0, p))
            hi = np.concatenate(keep_hi) if keep_hi else np.zeros((0, p))
    lower = np.minimum(proven, open_bound) if len(lo) else proven
    # v does not rise, so a bound at a larger budget holds at a smaller one.
    lower = np.maximum.accumulate(np.minimum(lower, upper)[::-1])[::-1]
    return _Tree(lower, upper, points, boxes, len(lo))


def certify(
    problem: Problem,
    found: ValueFunction,
    spec: BoundSpec = BoundSpec(),  # noqa: B008  (a NamedTuple of numbers)
    *,
    dual: BoundSpec | None = None,
    label: str | None = None,
) -> ValueFunction:
    """Proves lower bounds for a value function found by search.

    Args:
      problem: its branch has at most `MAX_PARAMETERS` parameters.
      found: from `search`, with minimisers; the closer to the truth, the fewer boxes.
      spec: for the value function.
      dual: for `Q(lam)` in `ValueFunction.lagrangian`, which decides how sharp sup(D) is; None: `spec`.  For powers of
        the norm other than 2 there is no `lagrangian`.
      label: shows progress under this name; None is silent.

    Returns:
      The same grid with proven lower bounds (status 'certified'); `tolerance` is what was reached.

    Raises:
      ValueError: for too many parameters, or a value function without minimisers.
      UnsupportedPrimitiveError: if the branch uses an operation without an interval rule.
    """
    check(spec)
    if problem.size > MAX_PARAMETERS:
        raise ValueError(
            f"branch and bound takes up to {MAX_PARAMETERS} parameters, this branch has {problem.size}; use the search."
        )
    if found.minimisers is None:
        raise ValueError("certify needs the minimisers of the search.")
    squares = found.budgets ** (2 / problem.power) * (1 + 1e-13)
    tree = _grow(problem, squares, found.upper, found.minimisers, spec, 0.0, label)
    points = tree.points
    radii = problem.radii(found.budgets)
    norms = np.maximum(np.linalg.norm(points, axis=1), 1e-300)
    points = points * np.minimum(1.0, radii / norms)[:, None]
    state = "closed" if not tree.left_open else f"{tree.left_open:,} left open"
    known: dict[float, float] = {}

    def lagrangian(lam: float) -> float:
        if lam not in known:
            costs = tree.upper + lam * found.budgets
            best = int(np.argmin(costs))
            known[lam] = float(
                _grow(
                    problem,
                    squares[-1:],
                    costs[best : best + 1],
                    points[best : best + 1],
                    dual or spec,
                    lam,
                    None if label is None else f"{label}, dual",
                ).lower[0]
            )
        return known[lam]

    return ValueFunction(
        found.budgets,
        tree.lower,
        tree.upper,
        "certified",
        f"branch and bound, {tree.boxes:,} boxes, {state}",
        points,
        lagrangian if problem.power == 2 else None,
    )


def proven_minimum(problem: Problem, found: float, point: Float64[np.ndarray, " p"], spec: BoundSpec) -> float:
    """A lower bound on `min g` over W, from a value that is attained at a point."""
    squares = np.array([problem.radius**2 * (1 + 1e-13)])
    return float(_grow(problem, squares, np.array([found]), point[None], spec, 0.0, None).lower[0])
