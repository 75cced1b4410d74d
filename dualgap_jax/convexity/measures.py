"""Measures of non-convexity besides the envelope: midpoints, curvature, barriers.  `scores.DEFINITIONS` says each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from dualgap_jax.convexity.grids import UNIFORM, checked, errors, power_of_two, real, step, times_power

_EXACT_PAIRS = 1_000_000  # a grid with more pairs is sampled, by as many draws
_STEPS = 50  # of second differences over the window


class Midpoints(NamedTuple):
    """How many pairs of points violate midpoint convexity.

    Attributes:
      rate: the share of pairs that violate it; NaN where there is no pair.
      pairs: how many pairs were looked at.
      error: the standard error of the rate; 0 where every pair was looked at.
    """

    rate: float
    pairs: int
    error: float


class Curvature(NamedTuple):
    """Curvature of a surface at its inner grid points; NaN where a point of the 3x3 stencil is not finite.

    Attributes:
      lambda_min, lambda_max: eigenvalues of the finite-difference Hessian, in coordinates that make the window the unit
        square, so in units of loss.
      negative: 1 where lambda_min is below zero beyond the allowed errors, else 0.
      ratio: |lambda_min| / max(|lambda_min|, |lambda_max|) where `negative`, else 0; in [0, 1].
    """

    lambda_min: Float64[np.ndarray, "my mx"]
    lambda_max: Float64[np.ndarray, "my mx"]
    negative: Float64[np.ndarray, "my mx"]
    ratio: Float64[np.ndarray, "my mx"]


def midpoint_violations(values: np.ndarray, error: np.ndarray) -> Midpoints:
    """The rate of violations of midpoint convexity over pairs of points of a uniform grid.

    Meant are all unordered pairs of distinct grid points whose midpoint is a grid point, but those with a loss that is
    not finite at an end or at the midpoint.  On grids with up to a million such pairs (845,000 on a 51 x 51 grid) each
    is looked at; on larger ones a million pairs drawn uniformly, from one seed, always the same.

    Args:
      values: losses `[ny, nx]` on a grid with uniform axes.
      error: the absolute error allowed in each loss, `[ny, nx]`.

    Raises:
      ValueError: when the two shapes differ, numbers are complex, or an error is NaN or below 0.
    """
    values = real(values)
    if values.ndim != 2:
        raise ValueError(f"values must be a grid [ny, nx]; got {values.shape}.")
    error = errors(error, values)
    finite = np.isfinite(values)
    # Not finite becomes NaN, and comparisons with NaN are false; by a power of two, so that no sum overflows.
    size = power_of_two(values)
    values, error = (times_power(np.where(finite, grid, np.nan), -size) for grid in (values, error))
    low, high = values - error, values + error
    halves = [((side + 1) // 2, side // 2) for side in values.shape]  # even and odd indices
    of_class = [math.comb(rows * columns, 2) for rows, columns in itertools.product(*halves)]
    if sum(of_class) > _EXACT_PAIRS:
        ends = _drawn_pairs(values.shape, of_class)
        violations, pairs = _count(low, high, finite, *ends)
        rate = violations / pairs if pairs else math.nan
        return Midpoints(rate, pairs, math.sqrt(rate * (1 - rate) / pairs) if pairs else math.nan)
    ny, nx = values.shape
    violations = pairs = 0
    for dy in range((ny - 1) // 2 + 1):
        for dx in range(1 if dy == 0 else -((nx - 1) // 2), (nx - 1) // 2 + 1):
            # Ends are midpoint -/+ (dy, dx); one of the two signs per unordered pair.
            middle_y, middle_x = slice(dy, ny - dy), slice(abs(dx), nx - abs(dx))
            a = slice(0, ny - 2 * dy), slice(abs(dx) - dx, nx - abs(dx) - dx)
            b = slice(2 * dy, ny), slice(abs(dx) + dx, nx - abs(dx) + dx)
            found = _count(low, high, finite, a, b, (middle_y, middle_x))
            violations, pairs = violations + found[0], pairs + found[1]
    return Midpoints(violations / pairs if pairs else math.nan, pairs, 0.0 if pairs else math.nan)


def _count(low: np.ndarray, high: np.ndarray, finite: np.ndarray, a: Any, b: Any, middle: Any) -> tuple[int, int]:
    """Violating pairs and pairs, of the ends `a`, `b` and midpoints that three indices of the grid pick."""
    mean = 0.5 * high[a] + 0.5 * high[b]
    return int(np.count_nonzero(low[middle] > mean)), int(np.count_nonzero(finite[a] & finite[b] & finite[middle]))


def _drawn_pairs(shape: tuple[int, ...], of_class: Sequence[int]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Ends and midpoints `(rows, columns)` of pairs drawn uniformly, with replacement, among all that have a midpoint.

    The two ends agree in the parity of their row and of their column: four classes, `of_class` pairs in each.
    """
    rng = np.random.default_rng(0)
    share = np.asarray(of_class, np.float64) / sum(of_class)
    rows, columns = [], []
    for index, count in enumerate(rng.multinomial(_EXACT_PAIRS, share)):
        parity = index // 2, index % 2
        height, width = (-(-(side - p) // 2) for side, p in zip(shape, parity, strict=True))
        one = rng.integers(0, height * width, count)
        other = rng.integers(0, max(height * width - 1, 1), count)
        other += other >= one  # distinct
        rows.append([2 * (end // width) + parity[0] for end in (one, other)])
        columns.append([2 * (end % width) + parity[1] for end in (one, other)])
    (y1, y2), (x1, x2) = (np.concatenate(parts, axis=1) for parts in (rows, columns))
    return (y1, x1), (y2, x2), ((y1 + y2) // 2, (x1 + x2) // 2)


def curvature(xs: np.ndarray, ys: np.ndarray, loss: np.ndarray, error: np.ndarray) -> Curvature:
    """Eigenvalues of the Hessian by central differences (3x3 stencil with the mixed derivative) at inner points.

    The Hessian is taken in coordinates that make the window of the grid the unit square, at points a fiftieth of the
    window apart (the nearest whole number of grid steps, of two the lower, at least one) and by differences between
    these points.  So nothing depends on the units of the axes, a common factor of losses and errors changes neither
    sign nor ratio, and a finer grid sees the same curvature against the same errors.

    Args:
      xs, ys: uniform coordinates `[nx]`, `[ny]`, at least 3 each.
      loss: `[ny, nx]`.
      error: the absolute error allowed in each loss, `[ny, nx]`; lambda_min counts as negative when it is below
        `-(4 / min(sx, sy)**2 + 1 / (sx sy))` times the largest error in the stencil, which bounds the effect of such
        errors; sx and sy are the steps of the differences, as shares of the window.

    Returns:
      Maps `[my, mx]`, entry [i, j] belonging to grid point [(i + 1) ky, (j + 1) kx], where kx and ky are the steps in
      points of the grid: 1 on grids with up to 76 points a side, 8 on one with 401.  Where a side is no multiple of its
      step (99 of 2) the points are spread evenly instead, to the nearest of the grid: the differences at the first and
      the last reach the two ends of the window all the same.

    Raises:
      ValueError: for bad axes or shapes, fewer than 3 points on an axis, axes that are not uniform, or an error that is
        NaN or below 0.
    """
    xs, ys, loss = checked(xs, ys, loss)
    error = errors(error, loss)
    step("xs", xs), step("ys", ys)  # uniform
    kx, ky = (max(1, math.ceil((points - 1) / _STEPS - 0.5)) for points in (xs.size, ys.size))
    sx, sy = kx / (xs.size - 1), ky / (ys.size - 1)
    # By a power of two, so that sums of losses do not overflow; an infinite loss becomes NaN, and so the whole stencil.
    size = power_of_two(loss)
    f, error = (times_power(grid, -size) for grid in (np.where(np.isfinite(loss), loss, np.nan), error))
    rows, columns = _middles(ys.size, ky), _middles(xs.size, kx)

    def at(grid: np.ndarray, dy: int, dx: int) -> np.ndarray:
        return grid[np.ix_(rows + dy * ky, columns + dx * kx)]

    fxx = (at(f, 0, 1) - 2 * at(f, 0, 0) + at(f, 0, -1)) / sx**2
    fyy = (at(f, 1, 0) - 2 * at(f, 0, 0) + at(f, -1, 0)) / sy**2
    fxy = (at(f, 1, 1) - at(f, 1, -1) - at(f, -1, 1) + at(f, -1, -1)) / (4 * sx * sy)
    whole = np.isfinite(sum(at(f, dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)))
    mean, spread = (fxx + fyy) / 2, np.hypot((fxx - fyy) / 2, fxy)
    lambda_min = np.where(whole, mean - spread, np.nan)
    lambda_max = np.where(whole, mean + spread, np.nan)

    stencil_error = np.max([at(error, dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)], axis=0)
    negative = lambda_min < -stencil_error * (4 / min(sx, sy) ** 2 + 1 / (sx * sy))
    largest = np.maximum(np.abs(lambda_min), np.abs(lambda_max))
    ratio = np.divide(-lambda_min, largest, out=np.zeros_like(largest), where=negative)
    lowest, highest = times_power(lambda_min, size), times_power(lambda_max, size)
    return Curvature(lowest, highest, np.where(whole, negative, np.nan), np.where(whole, ratio, np.nan))


def _middles(points: int, step: int) -> np.ndarray:
    """The points of a line at which differences by `step` are taken, from end to end, alike from both of them."""
    count = (points - 1) // step - 1
    even = np.rint(np.linspace(step, points - 1 - step, count)).astype(np.int64)
    return np.where(np.arange(count) < count // 2, even, points - 1 - even[::-1])


def barrier(t: np.ndarray, losses: np.ndarray) -> float:
    """The loss barrier along a path: max over t of loss(t) - linear interpolation between the end losses; at least 0.

    Args:
      t: positions `[m]`, strictly increasing from 0 to 1.
      losses: `[m]`, the loss at each position.

    Returns:
      The barrier in units of loss; infinite for an infinite loss between finite ends; NaN when an end is not finite or
      any loss is NaN.

    Raises:
      ValueError: for shapes that differ, fewer than 2 points, or t that does not run strictly upwards from 0 to 1.
    """
    t, losses = real(t), real(losses)
    if t.ndim != 1 or t.size < 2 or losses.shape != t.shape:
        raise ValueError(f"t and losses must be vectors of one length m >= 2; got shapes {t.shape} and {losses.shape}.")
    if not ((np.diff(t) > 0).all() and abs(t[0]) <= UNIFORM and abs(t[-1] - 1) <= UNIFORM):
        raise ValueError(
            f"t must increase strictly from 0 to 1; got t from {t[0]} to {t[-1]}: sort it, include both ends."
        )
    if np.isnan(losses).any() or not np.isfinite(losses[[0, -1]]).all():
        return math.nan
    return float(max(0.0, np.max(losses - ((1 - t) * losses[0] + t * losses[-1]))))
