"""Lower bounds of a one-branch problem on one box of parameters, from proven ranges of g and its derivatives.

For a box B let `h_lo, h_hi` be the range of `||w||^2` on it.  Its part of the problem with `||w||^2 <= s` is bounded
from below in two ways: by the range of g on B; and, for a multiplier lam >= 0 of its own, by

    g(w) >= g(w) + lam (||w||^2 - min(s, h_hi)) >= g(m) + min over B of { d.(w - m) + lam ||w||^2 } - lam min(s, h_hi)

with m the middle of B and d in the range of slopes over B (mean value form; the minimum separates by coordinates), or
with a second-order Taylor form where g has second derivatives.  At a constrained minimum the gradient of
`g + lam ||w||^2` vanishes, so the second bound is off by the square of the box's size only, although the sphere cuts
the box.

Where g is continuously differentiable a minimiser over a ball satisfies `0 = grad g(w) + 2 mu w` for a multiplier
mu >= 0 (only the ball that is the point 0 is an exception).  Where no mu serves all coordinates on a box that does not
contain 0, no minimiser at any budget lies in it, and the box is `excluded`.  With kinks that would not be sound: on the
face between two boxes the gradients of both sides count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dualgap_jax.duality.bounding.ranges import extension, is_smooth
from dualgap_jax.duality.problem import ByProgram, Problem

_EPS = float(np.finfo(np.float64).eps)
_TINY = 1e-300  # more than any underflow of a float64 operation


class Bounds(NamedTuple):
    """For each box the range of `||w||^2`, and two lower bounds on the objective `g + lam0 ||w||^2`.

    They are `plain` and, for squared radii up to s, `base - (lam - lam0) min(s, h_hi)`, with `lam >= lam0`.
    """

    h_lo: Any
    h_hi: Any
    plain: Any
    base: Any
    lam: Any
    value: Any  # upper bound on the objective at the middle
    split: Any  # the coordinate to halve
    excluded: Any  # no minimiser lies in the box


def objective(problem: Problem) -> Callable[[Array], Array]:
    """`g(w)` in the order of operations in which its ranges are taken; tau and n are divided by as they are."""

    def g(w: Float[Array, " p"]) -> Float[Array, ""]:
        weighted = jnp.sum(jnp.asarray(problem.c, w.dtype) * problem.outputs(w))
        return problem.offset - (weighted / len(problem.c)) / problem.tau

    return g


def toward(slope: Array, m: Array, r: Array, lam: Array) -> Array:
    """A lower bound on `min over t in [0, r] of slope t + lam ((m + t)^2 - m^2)`, by coordinate, for lam >= 0."""
    a = slope + 2 * lam * m
    t = jnp.clip(jnp.where(lam > 0, -a / jnp.maximum(2 * lam, _TINY), jnp.where(a < 0, r, 0.0)), 0.0, r)
    error = 32 * _EPS * (jnp.abs(slope) * r + lam * (2 * jnp.abs(m) * r + r * r)) + _TINY * (1 + r) ** 2
    return jnp.minimum(a * t + lam * t * t, 0.0) - error


def first_order(d_lo: Array, d_hi: Array, m: Array, r: Array, lam: Array) -> Array:
    """`min of d.t + lam (||m + t||^2 - ||m||^2)` over |t| <= r and d in the range of slopes over the box."""
    return jnp.sum(jnp.minimum(toward(d_lo, m, r, lam), toward(-d_hi, -m, r, lam)))


def second_order(d_lo: Array, d_hi: Array, h_lo: Array, h_hi: Array, m: Array, r: Array, lam: Array) -> Array:
    """The same from the gradient at m and the range of Hessians over the box (Taylor).

    `2 |t_k t_l| <= (r_l / r_k) t_k^2 + (r_k / r_l) t_l^2` (Gershgorin's circles, scaled) leaves one parabola a
    coordinate.
    """
    off = jnp.maximum(jnp.abs(h_lo), jnp.abs(h_hi)) * (1 - jnp.eye(len(m)))
    off = jnp.where(jnp.isnan(off), 0.0, off)  # an infinite entry of the diagonal
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
    return jnp.sum(least - 32 * _EPS * (slope * r + jnp.abs(curvature) * r * r) - _TINY * (1 + r) ** 2)


def below(*terms: Array) -> Array:
    """A lower bound on a sum; -inf where it is not known."""
    found = sum(terms) - 8 * _EPS * sum(jnp.abs(t) for t in terms)
    return jnp.where(jnp.isnan(found), -jnp.inf, found)


def above(*terms: Array) -> Array:
    """An upper bound on a sum; inf where it is not known."""
    return -below(*(-t for t in terms))


def squared_norm(lo: Array, hi: Array) -> tuple[Array, Array]:
    """Bounds on `||w||^2` over a box."""
    near = jnp.where((lo <= 0) & (hi >= 0), 0.0, jnp.minimum(jnp.abs(lo), jnp.abs(hi)))
    far = jnp.maximum(jnp.abs(lo), jnp.abs(hi))
    return jnp.sum(near**2) * (1 - 16 * _EPS) - _TINY, jnp.sum(far**2) * (1 + 16 * _EPS) + _TINY


def multipliers(d_lo: Array, d_hi: Array, lo: Array, hi: Array, lam0: Array) -> tuple[Array, Array]:
    """The range of `mu >= lam0` for which `0 in d + 2 mu w` in every coordinate; empty when it ends below its start."""
    left, right = -d_lo / (2 * lo), -d_hi / (2 * hi)  # where the two ends of d + 2 mu w cross 0

    def outer(value: Array, where: Array, sign: int) -> Array:
        wide = jnp.clip(value, -1e307, 1e307)
        wide = wide + sign * (16 * _EPS * jnp.abs(wide) + _TINY)
        return jnp.where(where & ~jnp.isnan(value), wide, sign * jnp.inf)

    start = jnp.maximum(jnp.max(outer(left, lo < 0, -1)), jnp.max(outer(right, hi > 0, -1)))
    end = jnp.minimum(jnp.min(outer(left, lo > 0, 1)), jnp.min(outer(right, hi < 0, 1)))
    never = jnp.any(((lo == 0) & (d_lo > 0)) | ((hi == 0) & (d_hi < 0)))
    return jnp.maximum(start, lam0), jnp.where(never, -jnp.inf, end)


def coordinate_to_halve(spread: Array, r: Array) -> Array:
    """The widest coordinate among those with at least a quarter of the largest spread."""
    known = jnp.where(jnp.isnan(spread), jnp.inf, spread)
    return jnp.argmax(jnp.where(known >= 0.25 * jnp.max(known), r, -1.0))


def _crude(problem: Problem) -> Callable[[Array, Array, Array], Bounds]:
    """Bounds from the range of g alone: for large boxes, on which derivatives say nothing."""
    over = extension(objective(problem), jnp.zeros(problem.size, jnp.float64))

    def one(lo: Array, hi: Array, lam0: Array) -> Bounds:
        m = 0.5 * (lo + hi)
        h_lo, h_hi = squared_norm(lo, hi)
        plain = below(over(lo, hi).lower, lam0 * h_lo)
        value = above(over(m, m).upper, lam0 * jnp.sum(m * m) * (1 + 16 * _EPS))
        return Bounds(h_lo, h_hi, plain, plain, lam0, value, jnp.argmax(hi - lo), jnp.zeros((), bool))

    return one


def _sharp(problem: Problem) -> Callable[[Array, Array, Array], Bounds]:
    """`(lo [p], hi [p], lam0) -> Bounds` of one box, with derivatives."""
    example = jnp.zeros(problem.size, jnp.float64)
    g = objective(problem)
    # Where g has second derivatives they are much sharper: the sum over examples cancels in the gradient at a point.
    smooth = is_smooth(g, example)
    at_point, over_box = extension(g, example, order=1), extension(g, example, order=2 if smooth else 1)

    def one(lo: Array, hi: Array, lam0: Array) -> Bounds:
        m = 0.5 * (lo + hi)
        r = jnp.maximum(hi - m, m - lo) * (1 + 4 * _EPS)
        at, over = at_point(m, m), over_box(lo, hi)
        (at_lo, at_hi), (d_lo, d_hi) = at.first, over.first
        h_lo, h_hi = squared_norm(lo, hi)
        size = jnp.sum(m * m)

        def base(lam: Array) -> Array:
            change = first_order(d_lo, d_hi, m, r, lam)
            change = jnp.where(jnp.isnan(change), -jnp.inf, change)
            if smooth:
                other = second_order(at_lo, at_hi, over.second[0], over.second[1], m, r, lam)
                change = jnp.maximum(change, jnp.where(jnp.isnan(other), -jnp.inf, other))
            return below(at.lower, lam * size * (1 - 16 * _EPS), change)

        if smooth:
            curved = jnp.maximum(jnp.abs(over.second[0]), jnp.abs(over.second[1]))
            spread = r * jnp.sum(curved * r[None, :], axis=1)
        else:
            spread = r * (d_hi - d_lo)
        start, end = multipliers(d_lo, d_hi, lo, hi, lam0)
        excluded = (start > end) & ~jnp.all((lo <= 0) & (hi >= 0)) & smooth
        # The multiplier that makes the gradient of g + lam ||w||^2 at the middle orthogonal to m.
        fitted = -jnp.sum(m * 0.5 * (at_lo + at_hi)) / jnp.maximum(2 * size, _TINY)
        lam = jnp.clip(fitted, start, jnp.maximum(start, end))
        lam = jnp.where(jnp.isfinite(lam), jnp.maximum(lam, lam0), lam0)
        # Both multipliers are valid; at lam0 the bound does not depend on s.
        plain = jnp.maximum(below(over.lower, lam0 * h_lo), base(lam0))
        value = above(at.upper, lam0 * size * (1 + 16 * _EPS))
        return Bounds(h_lo, h_hi, plain, base(lam), lam, value, coordinate_to_halve(spread, r), excluded)

    return one


@functools.lru_cache(maxsize=16)
def kernels(key: ByProgram) -> tuple[Any, Any]:
    """The jitted `(lo [n, p], hi [n, p], lam0) -> Bounds` for large boxes and for small ones."""
    with jax.enable_x64(True):
        crude, sharp = (jax.jit(jax.vmap(make(key.problem), in_axes=(0, 0, None))) for make in (_crude, _sharp))
    return crude, sharp


@functools.lru_cache(maxsize=32)
def _point_kernel(key: ByProgram) -> Any:
    over = extension(objective(key.problem), jnp.zeros(key.problem.size, jnp.float64))
    return jax.jit(lambda w: jax.lax.map(lambda one: over(one, one).upper, w, batch_size=64))


def point_values(problem: Problem, w: Float[np.ndarray, "k p"]) -> Float[np.ndarray, " k"]:
    """Proven upper bounds on g at the rows of w; infinite where g may not be defined."""
    with jax.enable_x64(True):
        return np.asarray(_point_kernel(ByProgram(problem))(jnp.asarray(w, jnp.float64)))


@functools.lru_cache(maxsize=32)
def _slope_kernel(key: ByProgram) -> Any:
    over = extension(objective(key.problem), jnp.zeros(key.problem.size, jnp.float64), order=1)
    return jax.jit(lambda lo, hi: over(lo, hi).first)


def largest_slope(problem: Problem) -> float | None:
    """A proven bound on the norm of the slope of g over W, from the box around it; None where there is none."""
    with jax.enable_x64(True):
        corner = jnp.full(problem.size, problem.radius, jnp.float64)
        lo, hi = _slope_kernel(ByProgram(problem))(-corner, corner)
        # With room for those who prove it again with other roundings.
        bound = float(np.linalg.norm(np.maximum(np.abs(lo), np.abs(hi))) * (1 + 2.0**-40))
        return bound if np.isfinite(bound) else None
