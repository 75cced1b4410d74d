"""Certified value functions of branches with few parameters (p up to 4 or so), any activation, by branch and bound.

All budgets are treated in one tree of boxes.  For a box B of parameters let `h_lo, h_hi` be the range of `||w||^2` on
it. Its part of the problem with `||w||^2 <= s` is bounded from below by interval arithmetic on the branch's jaxpr, in
two ways: the range of g on B; and, for a multiplier lam >= 0 of its own, by

    g(w) >= g(w) + lam (||w||^2 - min(s, h_hi)) >= g(m) + min over B of { d.(w - m) + lam ||w||^2 } - lam min(s, h_hi)

with m the middle of B and d in the interval of gradients over B (mean value form; the minimum separates by
coordinates). At a constrained minimum the gradient of g + lam ||w||^2 vanishes, so the second bound is off by the
square of the box's size only, although the sphere cuts the box.  A box is closed when, at every budget that it reaches,
its bound is within the tolerance of the best value known there; the others are halved.  What is proven at a budget is
the least bound of the closed boxes, and of those still open when the effort is spent.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64

from dualgap_jax.config import require
from dualgap_jax.duality.intervals import extension, is_smooth
from dualgap_jax.duality.margins import margin_bound
from dualgap_jax.duality.problem import ByIdentity, Problem, subject_of, values_at
from dualgap_jax.duality.search import monotone
from dualgap_jax.duality.values import ValueFunction, proven
from dualgap_jax.metrics import Progress

MAX_PARAMETERS = 6
_BATCH = 1024
_STEPS = 16  # blocks of budgets in which a box's bound is looked at
_SHARP_BELOW = 0.3  # side of a box, in units of the radius, below which derivatives are worth their price
_EPS = float(np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True)
class BoundSpec:
    """How far to go.

    Attributes:
      tolerance: distance of the two bounds at which a box is closed, in units of the loss.
      max_boxes: boxes in all; the bounds reached by then are returned.
    """

    tolerance: float = 1e-4
    max_boxes: int = 1_000_000

    def __post_init__(self) -> None:
        require(self.tolerance > 0, f"tolerance={self.tolerance} must be positive.")
        require(self.max_boxes >= 1, f"max_boxes={self.max_boxes} must be at least 1.")


class _Bounds(NamedTuple):
    """For each box the range of `||w||^2`, and two lower bounds on the objective `g + lam0 ||w||^2`.

    They are `plain` and, for squared radii up to s, `base - (lam - lam0) min(s, h_hi)`.
    """

    h_lo: Any
    h_hi: Any
    plain: Any
    base: Any
    lam: Any
    value: Any  # upper bound on the objective at the middle
    split: Any  # the coordinate to halve


def _toward(slope: Array, m: Array, r: Array, lam: Array) -> Array:
    """A lower bound on `min over t in [0, r] of slope t + lam ((m + t)^2 - m^2)`, by coordinate."""
    a = slope + 2 * lam * m
    t = jnp.clip(jnp.where(lam > 0, -a / jnp.maximum(2 * lam, 1e-300), jnp.where(a < 0, r, 0.0)), 0.0, r)
    error = 32 * _EPS * (jnp.abs(slope) * r + lam * (2 * jnp.abs(m) * r + r * r))
    return jnp.minimum(a * t + lam * t * t, 0.0) - error


def _first_order(d_lo: Array, d_hi: Array, m: Array, r: Array, lam: Array) -> Array:
    """`min of d.t + lam (||m + t||^2 - ||m||^2)` over |t| <= r and d in the interval of gradients over the box."""
    return jnp.sum(jnp.minimum(_toward(d_lo, m, r, lam), _toward(-d_hi, -m, r, lam)))


def _second_order(d_lo: Array, d_hi: Array, h_lo: Array, h_hi: Array, m: Array, r: Array, lam: Array) -> Array:
    """The same from the gradient at m and the interval of Hessians over the box (Taylor).

    `2 |t_k t_l| <= (r_l / r_k) t_k^2 + (r_k / r_l) t_l^2` (Gershgorin's circles, scaled) leaves one parabola a
    coordinate."""
    off = jnp.maximum(jnp.abs(h_lo), jnp.abs(h_hi)) * (1 - jnp.eye(len(m)))
    curvature = jnp.diag(h_lo) + 2 * lam - jnp.sum(off * r[None, :] / r[:, None], axis=1) * (1 + 16 * _EPS)
    curvature = curvature - 16 * _EPS * (jnp.abs(jnp.diag(h_lo)) + 2 * lam)
    middle, half = 0.5 * (d_lo + d_hi), 0.5 * (d_hi - d_lo)
    slope = (
        jnp.abs(middle + 2 * lam * m) + half * (1 + 16 * _EPS) + 16 * _EPS * (jnp.abs(middle) + 2 * lam * jnp.abs(m))
    )
    inside = (curvature > 0) & (slope < curvature * r)
    least = jnp.where(
        inside, -0.5 * slope * slope / jnp.where(inside, curvature, 1.0), 0.5 * curvature * r * r - slope * r
    )
    return jnp.sum(least - 32 * _EPS * (slope * r + jnp.abs(curvature) * r * r))


def _range(lo: Array, hi: Array) -> tuple[Array, Array]:
    """Bounds on `||w||^2` over a box."""
    near = jnp.where((lo <= 0) & (hi >= 0), 0.0, jnp.minimum(jnp.abs(lo), jnp.abs(hi)))
    far = jnp.maximum(jnp.abs(lo), jnp.abs(hi))
    return jnp.sum(near**2) * (1 - 16 * _EPS), jnp.sum(far**2) * (1 + 16 * _EPS)


def _crude(problem: Problem, lam0: Array) -> Callable[[Array, Array], _Bounds]:
    """`_bounds` from the range of g alone: for large boxes, on which derivatives say nothing."""
    over = extension(problem.g, jnp.zeros(problem.size, jnp.float64))

    def one(lo: Array, hi: Array) -> _Bounds:
        m = 0.5 * (lo + hi)
        h_lo, h_hi = _range(lo, hi)
        plain, (_, value) = over(lo, hi)[0] + lam0 * h_lo, over(m, m)
        value = value + lam0 * jnp.sum(m * m) * (1 + 16 * _EPS)
        return _Bounds(h_lo, h_hi, plain, plain, lam0, value, jnp.argmax(hi - lo))

    return one


def _sharp(problem: Problem, lam0: Array) -> Callable[[Array, Array], _Bounds]:
    """`(lo [p], hi [p]) -> _Bounds` of one box, for the objective `g + lam0 ||w||^2`, with derivatives."""
    example = jnp.zeros(problem.size, jnp.float64)
    slopes = extension(jax.value_and_grad(problem.g), example)
    smooth = is_smooth(problem.g, example)
    # Where g has second derivatives they are much sharper: the sum over examples cancels in the gradient at a point.
    over = extension(problem.g, example), extension(jax.hessian(problem.g), example) if smooth else slopes

    def one(lo: Array, hi: Array) -> _Bounds:
        m = 0.5 * (lo + hi)
        r = jnp.maximum(hi - m, m - lo) * (1 + 4 * _EPS)
        (at, at_lo), (at_hi, at_up) = slopes(m, m)
        if smooth:
            plain, _ = over[0](lo, hi)
            curved = over[1](lo, hi)
            spread = r * jnp.sum(jnp.maximum(jnp.abs(curved[0]), jnp.abs(curved[1])) * r[None, :], axis=1)
        else:
            (plain, d_lo), (_, d_hi) = over[1](lo, hi)
            spread = r * (d_hi - d_lo)
        h_lo, h_hi = _range(lo, hi)
        size = jnp.sum(m * m)

        def base(lam: Array) -> Array:
            if smooth:
                change = _second_order(at_lo, at_up, curved[0], curved[1], m, r, lam)
            else:
                change = _first_order(d_lo, d_hi, m, r, lam)
            return at + lam * size * (1 - 16 * _EPS) + change - 16 * _EPS * jnp.abs(change)

        # The multiplier that makes the gradient of g + lam ||w||^2 at the middle orthogonal to m.
        fitted = -jnp.sum(m * 0.5 * (at_lo + at_up)) / jnp.maximum(2 * size, 1e-300)
        lam = jnp.where(jnp.isfinite(fitted), jnp.clip(fitted, lam0, 1e6), lam0)
        # Both multipliers are valid; at lam0 the bound does not depend on s.
        plain = jnp.maximum(plain + lam0 * h_lo, base(lam0))
        value = at_hi + lam0 * size * (1 + 16 * _EPS)
        split = jnp.argmax(jnp.nan_to_num(spread + 1e-12 * r, nan=jnp.inf))
        return _Bounds(h_lo, h_hi, plain, base(lam), lam, value, split)

    return one


@functools.lru_cache(maxsize=16)
def _kernel(key: ByIdentity, make: Callable[..., Any]) -> Any:
    return jax.jit(lambda lo, hi, lam0: jax.vmap(make(key.problem, lam0))(lo, hi))


class _Part(NamedTuple):
    """Lower bounds of boxes `[n]` as step functions of the budget's index: `value[:, k]` from index `start[:, k]` on.

    A box says nothing about budgets before `start[:, 0]`, which it does not reach.  Values fall along k.
    """

    start: np.ndarray  # [n, _STEPS + 1]
    value: np.ndarray  # [n, _STEPS + 1]

    def closed(self, target: np.ndarray) -> np.ndarray:
        """`[n]`: whether the bound is at least the non-increasing `target [m]` at every budget."""
        wanted = np.append(target, -np.inf)[np.minimum(self.start, len(target))]
        return (self.value >= wanted).all(axis=1)


def _at_budgets(out: _Bounds, squares: np.ndarray, lam0: float) -> _Part:
    """The bounds of the boxes as functions of the budget, from its first to its last index in equal blocks."""
    plain = np.nan_to_num(out.plain, nan=-np.inf)[:, None]
    slope = (out.lam - lam0)[:, None]
    first, last = np.searchsorted(squares, out.h_lo), np.searchsorted(squares, out.h_hi)
    start = first[:, None] + (last - first)[:, None] * np.arange(_STEPS + 1) // _STEPS
    # In a block the bound is that at its last budget; from `last` on it is that at h_hi.
    end = np.concatenate([np.maximum(start[:, 1:] - 1, start[:, :-1]), start[:, -1:]], axis=1)
    reach = np.minimum(np.append(squares, np.inf)[np.minimum(end, len(squares))], out.h_hi[:, None])
    fitted = np.nan_to_num(out.base[:, None] - slope * reach, nan=-np.inf)
    # The difference is good to a few ulps of its largest term.
    error = 1e-15 * (np.abs(plain) + np.abs(out.base[:, None]) + np.abs(slope) * out.h_hi[:, None])
    return _Part(start, np.maximum(plain, fitted) - error)


class _Proof:
    """The least bound at each budget over a set of boxes."""

    def __init__(self, squares: np.ndarray) -> None:
        self._from = np.full(len(squares) + 1, np.inf)

    def add(self, part: _Part, which: np.ndarray) -> None:
        index = np.minimum(part.start[which], len(self._from) - 1)
        np.minimum.at(self._from, index, np.minimum.accumulate(part.value[which], axis=1))

    def proven(self) -> np.ndarray:
        return np.minimum.accumulate(self._from)[:-1]


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
    upper, points = upper.copy(), points.copy()
    crude, sharp = _kernel(ByIdentity(problem), _crude), _kernel(ByIdentity(problem), _sharp)
    closed_bound, open_bound = _Proof(squares), _Proof(squares)
    boxes = 0
    with Progress(spec.max_boxes, label or "boxes") as line, jax.enable_x64(True):
        while len(lo):
            if boxes + len(lo) > spec.max_boxes and boxes:
                break
            open_bound = _Proof(squares)
            keep_lo, keep_hi = [], []
            for first in range(0, len(lo), _BATCH):
                part_lo, part_hi = lo[first : first + _BATCH], hi[first : first + _BATCH]
                n = len(part_lo)
                pad = ((0, _BATCH - n), (0, 0))
                kernel = crude if (part_hi - part_lo).max() > _SHARP_BELOW * edge else sharp
                out = kernel(np.pad(part_lo, pad), np.pad(part_hi, pad), lam0)
                out = _Bounds(*(a[:n] for a in jax.device_get(out)))
                middle = 0.5 * (part_lo + part_hi)
                where = np.searchsorted(squares, np.sum(middle**2, axis=1) * (1 + 1e-14))
                better = np.flatnonzero((where < len(squares)) & np.isfinite(out.value))
                better = better[out.value[better] < upper[where[better]]]
                for k in better:
                    if out.value[k] < upper[where[k]]:
                        upper[where[k]], points[where[k]] = out.value[k], middle[k]
                if len(better):
                    upper, points = monotone(upper, points)
                part = _at_budgets(out, squares, lam0)
                closed = part.closed(upper - spec.tolerance)
                closed_bound.add(part, closed)
                if not closed.all():
                    open_bound.add(part, ~closed)
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
    lower = closed_bound.proven()
    if len(lo):
        lower = np.minimum(lower, open_bound.proven())
    # v does not rise, so a bound at a larger budget holds at a smaller one.
    lower = np.maximum.accumulate(np.minimum(lower, upper)[::-1])[::-1]
    return _Tree(lower, upper, points, boxes, len(lo))


def certify(
    problem: Problem,
    found: ValueFunction,
    spec: BoundSpec = BoundSpec(),
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
    if problem.size > MAX_PARAMETERS:
        raise ValueError(
            f"branch and bound takes up to {MAX_PARAMETERS} parameters, this branch has {problem.size}; use the search."
        )
    if found.minimisers is None:
        raise ValueError("certify needs the minimisers of the search.")
    problem.check_budgets(found.budgets)
    margin = margin_bound(problem)
    squares = found.budgets ** (2 / problem.power) * (1 + 1e-13)
    radii = problem.radii(found.budgets)

    def inside(w: np.ndarray) -> np.ndarray:
        return w * np.minimum(1.0, radii / np.maximum(np.linalg.norm(w, axis=1), 1e-300))[:, None]

    start, points = monotone(upper_values(problem, inside(found.minimisers)), inside(found.minimisers))
    tree = _grow(problem, squares, start, points, spec, 0.0, label)
    points = inside(tree.points)
    slope = _largest_slope(problem)
    # Points moved to the safe side of their sphere by a rounding lose at most this.
    tree = tree._replace(upper=tree.upper + 1e-13 * slope * problem.radius)
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

    made = ValueFunction(
        found.budgets,
        tree.lower,
        tree.upper,
        f"branch and bound, {tree.boxes:,} boxes, {state}",
        points,
        lagrangian if problem.power == 2 else None,
        slope,
        margin=None if margin is None else margin / problem.tau * (1 + 4 * _EPS),
    )
    return proven(made, subject_of(problem))


@functools.lru_cache(maxsize=32)
def _points_kernel(key: ByIdentity) -> Any:
    point = extension(key.problem.g, jnp.zeros(key.problem.size, jnp.float64))
    return jax.jit(jax.vmap(lambda w: point(w, w)[1]))


def point_values(problem: Problem, w: Float64[np.ndarray, "k p"]) -> Float64[np.ndarray, " k"]:
    """Proven upper bounds on g at the rows of w, by interval arithmetic."""
    with jax.enable_x64(True):
        return np.asarray(_points_kernel(ByIdentity(problem))(jnp.asarray(w, jnp.float64)))


def upper_values(problem: Problem, w: Float64[np.ndarray, "k p"]) -> Float64[np.ndarray, " k"]:
    """Proven upper bounds on g at the rows of w: by interval arithmetic for up to `MAX_PARAMETERS` parameters.

    With more, float64 values and a margin of `8 (n + p) eps` times their size, which is not a proof.
    """
    if problem.size <= MAX_PARAMETERS:
        return point_values(problem, w)
    values = values_at(problem, w)
    return values + 8 * (len(problem.c) + problem.size) * _EPS * (1 + np.abs(values))


def _largest_slope(problem: Problem) -> float:
    """A bound on the norm of the gradient of g over W, from the box around it."""
    with jax.enable_x64(True):
        example = jnp.full(problem.size, problem.radius, jnp.float64)
        lo, hi = jax.jit(extension(jax.grad(problem.g), example))(-example, example)
        return float(np.linalg.norm(np.maximum(np.abs(lo), np.abs(hi))) * (1 + 64 * _EPS))
