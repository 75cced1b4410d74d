"""Value functions with h and W of one's own: branch and bound proves what `constrained_search` found.

A box is bounded from below by the range of g on it, and for a multiplier lam >= lam0 of its own, on `h(w) <= b`, by

    g + lam0 h  >=  g(w) + lam h(w) - (lam - lam0) b  >=  min over the box of { g + lam h } - (lam - lam0) min(b, h_hi)

with the minimum from the mean value form or the second-order Taylor form of `g + lam h`; boxes that are proven to lie
apart from W say nothing.  The least h over W is bounded likewise.  Budgets begin a little above it, and what a branch
may cost less is kept in `ValueFunction.floor`; the last bound holds on all of W, whatever h is there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64

from dualgap_jax import seeds
from dualgap_jax.duality.bounding.ranges import extension
from dualgap_jax.duality.boxes import (
    Bounds,
    above,
    below,
    coordinate_to_halve,
    first_order,
    objective,
    point_values,
    second_order,
)
from dualgap_jax.duality.branch_and_bound import MAX_PARAMETERS, SPARE, BoundSpec, Grown, Start, grow
from dualgap_jax.duality.constrained import ByOwn, ConstrainedProblem, draw
from dualgap_jax.duality.margins import label_scale
from dualgap_jax.duality.problem import subject_of
from dualgap_jax.duality.search import descent, monotone
from dualgap_jax.duality.values import BUDGET_SLACK, ValueFunction, proven

_EPS = float(np.finfo(np.float64).eps)
_SHARP_BELOW = 0.15  # side of a box, in units of the longest side of W's, below which derivatives are worth their price
_FLOOR_BOXES = 20_000
_MARGIN_BOXES = 4096
_BATCH = 256
_MANY, _TIMES = 4096, 4  # budgets that a grid may have, and in multiples of what was asked for, so that K is one


class ConstrainedProof(NamedTuple):
    """What the bounds were proven with; trees of halves begin with the box around W, see `branch_and_bound.Tree`.

    Attributes:
      primal: behind the lower bounds on v.
      dual: for each multiplier that `lagrangian` was asked for, the tree and the bound.
      floor: behind the lower bound on h.
    """

    primal: tuple[np.ndarray, ...]
    dual: dict[float, tuple[tuple[np.ndarray, ...], float]]
    floor: tuple[np.ndarray, ...]


# --- boxes ------------------------------------------------------------------------------------------------------------


def _kernels(problem: ConstrainedProblem, g: Callable[[Array], Array], h: Callable[[Array], Array]) -> tuple[Any, Any]:
    """The jitted `(lo [n, p], hi [n, p], lam0) -> Bounds` of `g + lam0 h`, for large boxes and for small ones."""
    example = jnp.zeros(problem.size, jnp.float64)

    def both(w: Array) -> tuple[Array, Array]:
        return g(w), h(w)

    values, slopes, bends = (extension(both, example, order=k) for k in range(3))

    def times(lam: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        """`lam` times a range, with nothing where lam is 0, also of what is infinite."""
        wide = [jnp.where(lam > 0, lam * e, 0.0) for e in ends]
        return wide[0] - 4 * _EPS * jnp.abs(wide[0]), wide[1] + 4 * _EPS * jnp.abs(wide[1])

    def tilted(of_g: Any, of_h: Any, lam: Array) -> tuple[Array, Array]:
        more = times(lam, of_h)
        lo, hi = of_g[0] + more[0], of_g[1] + more[1]
        lo, hi = lo - 4 * _EPS * (jnp.abs(lo) + jnp.abs(more[0])), hi + 4 * _EPS * (jnp.abs(hi) + jnp.abs(more[1]))
        return jnp.where(jnp.isnan(lo), -jnp.inf, lo), jnp.where(jnp.isnan(hi), jnp.inf, hi)

    def crude(lo: Array, hi: Array, lam0: Array) -> Bounds:
        m = 0.5 * (lo + hi)
        box, at = values(lo, hi), values(m, m)
        plain = below(box.lower[0], times(lam0, (box.lower[1], box.upper[1]))[0])
        value = above(at.upper[0], times(lam0, (at.lower[1], at.upper[1]))[1])
        apart = problem.set.apart(lo, hi)
        return Bounds(box.lower[1], box.upper[1], plain, plain, lam0, value, jnp.argmax(hi - lo), apart)

    def sharp(lo: Array, hi: Array, lam0: Array) -> Bounds:
        m = 0.5 * (lo + hi)
        r = jnp.maximum(hi - m, m - lo) * (1 + 4 * _EPS)
        at, box = slopes(m, m), bends(lo, hi)
        zero = jnp.zeros(())

        def base(lam: Array) -> tuple[Array, Array]:
            d_at, d = (tilted((x.first[0][0], x.first[1][0]), (x.first[0][1], x.first[1][1]), lam) for x in (at, box))
            bend = tilted((box.second[0][0], box.second[1][0]), (box.second[0][1], box.second[1][1]), lam)
            forms = first_order(*d, m, r, zero), second_order(*d_at, *bend, m, r, zero)
            change = functools.reduce(jnp.maximum, (jnp.where(jnp.isnan(f), -jnp.inf, f) for f in forms))
            return below(at.lower[0], times(lam, (at.lower[1], at.upper[1]))[0], change), d[1] - d[0]

        middle = [0.5 * (at.first[0][k] + at.first[1][k]) for k in (0, 1)]
        fitted = -jnp.sum(middle[0] * middle[1]) / jnp.maximum(jnp.sum(middle[1] ** 2), 1e-300)
        lam = jnp.where(jnp.isfinite(fitted), jnp.maximum(fitted, lam0), lam0)
        found, spread = base(lam)
        apart = problem.set.apart(lo, hi)
        plain = below(box.lower[0], times(lam0, (box.lower[1], box.upper[1]))[0])
        plain = jnp.maximum(plain, base(lam0)[0])
        value = above(at.upper[0], times(lam0, (at.lower[1], at.upper[1]))[1])
        split = coordinate_to_halve(spread * r, r)
        return Bounds(box.lower[1], box.upper[1], plain, found, lam, value, split, apart)

    return jax.jit(jax.vmap(crude, in_axes=(0, 0, None))), jax.jit(jax.vmap(sharp, in_axes=(0, 0, None)))


@functools.lru_cache(maxsize=16)
def _tilted_kernels(key: ByOwn) -> tuple[Any, Any]:
    with jax.enable_x64(True):
        return _kernels(key.problem, objective(key.problem.one), key.problem.h_at)


@functools.lru_cache(maxsize=16)
def _floor_kernels(key: ByOwn) -> tuple[Any, Any]:
    with jax.enable_x64(True):
        return _kernels(key.problem, key.problem.h_at, lambda w: jnp.zeros((), w.dtype))


def _start(problem: ConstrainedProblem, kernels: tuple[Any, Any], budgets: np.ndarray) -> Start:
    lo, hi = problem.set.lower, problem.set.upper
    sizes = np.append(budgets[:-1], np.inf)  # the last bound is one over all of W
    return Start(lo, hi, kernels, sizes, limits_of(budgets), problem.costs, _SHARP_BELOW * float((hi - lo).max()))


def _alone(start: Start) -> Start:
    """The same over all of W, where every point of it counts."""
    return start._replace(sizes=np.array([np.inf]), limits=np.array([np.finfo(np.float64).max]))


def limits_of(budgets: np.ndarray) -> np.ndarray:
    """What points may cost that stand for these budgets, with room for those who prove it again."""
    return budgets - 2 * BUDGET_SLACK * np.abs(budgets) - SPARE * np.abs(budgets[-1] - budgets[0]) / 4


# --- the least h, and the grid ----------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """The range of h over W.

    Attributes:
      floor: a proven lower bound; `tree`: what proves it.
      least: a little more than h at `point`, which lies in W.
      most: h at the dearest point found; nothing rests on it.
    """

    floor: float
    tree: tuple[np.ndarray, ...]
    least: float
    point: np.ndarray
    most: float


def sizes(problem: ConstrainedProblem, *, seed: int = 0) -> Sizes:
    """The range of h over W.  Raises ValueError where h is not proven to be finite."""
    rng = seeds.generator(seed)
    points = np.concatenate([draw(problem, rng, 512), draw(problem, rng, 1) * 0 + _middle(problem)])
    corners = problem.set.lower + (problem.set.upper - problem.set.lower) * rng.integers(0, 2, (512, problem.size))
    with jax.enable_x64(True):
        corners = np.asarray(jax.vmap(problem.set.nearest)(jnp.asarray(corners)))
        fall = jax.jit(jax.vmap(descent(problem.h_at, 300, lambda w, _: problem.set.nearest(w)), in_axes=(0, None)))
        order = np.argsort(problem.h(points))[:16]
        ends = np.asarray(fall(jnp.asarray(points[order]), float(np.max(problem.set.upper - problem.set.lower)))[0])
    most = float(max(problem.h(points).max(), problem.h(corners).max()))
    points = problem.set.inside(np.concatenate([points[order], ends]) * (1 - 2e-12) + 2e-12 * _middle(problem))
    costs = problem.costs(points)
    best = int(np.argmin(costs))
    if not np.isfinite(costs[best]):
        raise ValueError("size has no proven finite value at any point of W that was tried.")
    scale = max(abs(most), abs(float(costs[best])), most - float(costs[best]))
    start = _alone(_start(problem, _floor_kernels(ByOwn(problem)), np.zeros(1)))
    spec = BoundSpec(1e-12 * scale if scale > 0 else 1e-12, _FLOOR_BOXES)
    grown = grow(start, costs[best : best + 1], points[best : best + 1], spec, 0.0, None)
    floor, point = float(grown.lower[0]), grown.points[0]
    cost = float(problem.costs(point[None])[0])
    if not math.isfinite(floor):
        raise ValueError("size has no proven lower bound on W; it may be infinite or undefined somewhere.")
    least = cost + 4 * BUDGET_SLACK * abs(cost) + SPARE * scale
    if not most > least + 1e-9 * scale:
        raise ValueError(f"size is {least:.6g} all over W, so that it constrains nothing.")
    return Sizes(floor, grown.splits, least, point, most)


def _middle(problem: ConstrainedProblem) -> np.ndarray:
    """The middle of the box around W, which lies in W."""
    return np.asarray(0.5 * problem.set.lower + 0.5 * problem.set.upper)


def grid(found: Sizes, budget: float, points: int) -> Float64[np.ndarray, " m"]:
    """A uniform grid of some `points` budgets from the least h to the largest or a little beyond.

    K is one of them where that takes no more than `_MANY` budgets, or a few times as many as were asked for.  So near
    the least h it lies between the first two of `points` budgets, and its bounds are those of its neighbours.

    Raises:
      ValueError: for K not above the least h as far as that is known, or fewer than 3 points.
    """
    if points < 3:
        raise ValueError(f"a grid of budgets needs at least 3 points here, got {points}.")
    if budget < found.floor:
        raise ValueError(
            f"budget K={budget:.6g} is not above the least h over W, proven to be at least {found.floor:.6g}: no"
            " feasible point."
        )
    if not budget > found.least:
        raise ValueError(
            f"budget K={budget:.15g} is not above the least h over W by more than roundings: that lies between"
            f" {found.floor:.15g} and {found.least:.15g}, where nothing can be certified; give a budget above"
            f" {found.least:.15g}."
        )
    width = found.most - found.least
    steps = max(1, round((min(budget, found.most) - found.least) / width * (points - 1)))
    step = (budget - found.least) / steps
    if budget >= found.most or width > step * max(_MANY, _TIMES * points):
        return np.linspace(found.least, found.most, points)
    count = max(steps + 1, math.ceil(width / step))
    budgets = found.least + step * np.arange(count + 1)
    budgets[steps] = budget
    return budgets


# --- branch and bound -------------------------------------------------------------------------------------------------


def certify(
    problem: ConstrainedProblem,
    found: ValueFunction,
    range_of: Sizes,
    spec: BoundSpec,
    *,
    dual: BoundSpec | None = None,
    label: str | None = None,
) -> ValueFunction:
    """Proves lower bounds for a value function found by `search`, as `branch_and_bound.certify` does for balls.

    The status 'certified' is the solver's own word, which `theorem1` has the checker confirm.

    Raises:
      ValueError: for more than `MAX_PARAMETERS` parameters, or a branch that is not proven to be finite on all of W.
      UnsupportedPrimitiveError: if the branch uses an operation without an interval rule.
    """
    if problem.size > MAX_PARAMETERS:
        raise ValueError(
            f"branch and bound takes up to {MAX_PARAMETERS} parameters, this branch has {problem.size}; use the search."
        )
    budgets, limits = found.budgets, limits_of(found.budgets)

    def proven_at(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = point_values(problem.one, points)
        values = np.where(problem.costs(points) <= limits, values + SPARE * (1 + np.abs(values)), np.inf)
        return monotone(values, points)

    start = _start(problem, _tilted_kernels(ByOwn(problem)), budgets)
    grown: Grown = grow(start, *proven_at(np.array(found.minimisers)), spec, 0.0, label)
    upper, points = proven_at(grown.points)
    if not (np.isfinite(grown.lower).all() and np.isfinite(upper).all()):
        raise ValueError(
            f"with {grown.boxes:,} boxes no finite bound was proven: the branch may be undefined or infinite somewhere"
            " on W; give a branch that is defined on all of W, or allow more boxes."
        )
    proof = ConstrainedProof(grown.splits, {}, range_of.tree)

    def lagrangian(lam: float) -> float:
        if not 0 <= lam < np.inf:
            raise ValueError(f"the multiplier lam={lam!r} must be a finite number, at least 0.")
        if lam not in proof.dual:
            costs = upper + lam * budgets
            best = slice(int(np.argmin(costs)), int(np.argmin(costs)) + 1)
            one = grow(
                _alone(start), costs[best], points[best], dual or spec, lam, None if label is None else f"{label}, dual"
            )
            proof.dual[lam] = one.splits, float(one.lower[0])
        return proof.dual[lam][1]

    state = "closed" if not grown.left_open else f"{grown.left_open:,} left open"
    made = ValueFunction(
        budgets,
        np.minimum(grown.lower, upper),
        upper,
        f"branch and bound, {grown.boxes:,} boxes, {state}",
        points,
        lagrangian,
        margin=_margin(problem),
        proof=proof,
        floor=range_of.floor,
    )
    return proven(made, subject_of(problem))


def _margin(problem: ConstrainedProblem) -> float | None:
    """A proven bound on the margins over W, in units of tau, from ranges of the outputs; None where none was found."""
    one = problem.one
    if label_scale(one.c) != 1.0 or one.c.shape[1] != 1:
        return None
    labels = one.c[:, 0]
    with jax.enable_x64(True):
        over = extension(one.outputs, jnp.zeros(one.size, jnp.float64))
        kernel = jax.jit(jax.vmap(lambda lo, hi: over(lo, hi)[:2]))
        lo, hi = problem.set.lower[None], problem.set.upper[None]
        proven_below = -math.inf
        for _ in range(64):
            high = []
            for first in range(0, len(lo), _BATCH):
                rows = slice(first, first + _BATCH)
                n = len(lo[rows])
                pad = ((0, _BATCH - n), (0, 0))
                ends = kernel(np.pad(lo[rows], pad, "edge"), np.pad(hi[rows], pad, "edge"))
                low, up = (np.asarray(e)[:n, :, 0] for e in ends)
                high.append(np.where(labels > 0, up, -low).max(axis=1))
            most = np.concatenate(high)
            most = np.where(problem.set.apart(lo, hi, np), -np.inf, most)
            wide = ~(most <= 0.99 * one.tau)
            proven_below = max(proven_below, float(most[~wide].max(initial=-math.inf)))
            if not wide.any():
                return max(0.0, proven_below) / one.tau * (1 + 2.0**-40) + 1e-300
            if 2 * int(wide.sum()) > _MARGIN_BOXES:
                return None
            lo, hi = lo[wide], hi[wide]
            axis, rows_ = np.argmax(hi - lo, axis=1), np.arange(len(lo))
            middle = 0.5 * (lo + hi)[rows_, axis]
            left, right = hi.copy(), lo.copy()
            left[rows_, axis] = right[rows_, axis] = middle
            lo, hi = np.concatenate([lo, right]), np.concatenate([left, hi])
    return None
