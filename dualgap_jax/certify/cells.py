"""`rho = max over ||u|| = 1 of ||(1/n) sum_j alpha_j psi(u.x_j)||` in up to three input dimensions, by cells.

The planes `u.x_j = 0` cut the sphere into cells in which the sum is linear in u, `A u` with A `[out, d]`.  With one
output the best direction of a cell is known (`closed_forms.best_relu_unit`); with several `||A u||` is largest at the
top singular vector of A, if that lies in the cell, or on the cell's border, an arc of a circle `u.x_j = 0`, where it is
`m + r cos 2(t - t_0)` in the angle t.  Since only the value of the sum itself counts at a singular vector, it does not
matter whether it lies in its cell.  A leaky unit with slope s for negative arguments is the ReLU over twice the points:
`psi(t) = max(t, 0) - s max(-t, 0)`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from dualgap_jax.duality.closed_forms import Arcs, arc_sums, best_relu_unit, cut_circle

MAX_DIMENSION = 3
MAX_POINTS = {1: 10**7, 2: 200_000, 3: 2000}  # with one output; a tenth of it in three dimensions with several
_EPS = float(np.finfo(np.float64).eps)
_SPARE = (
    2.0**-38
)  # share of the sizes that is left to those who enumerate the cells again, and to nearly parallel points


class Unit(NamedTuple):
    """Bounds on rho, and the unit vectors that attain the lower one: `u [d]` and the direction `a [out]` of the sum."""

    lower: float
    upper: float
    u: np.ndarray
    a: np.ndarray


def applies(n: int, d: int, out: int) -> bool:
    """Whether the cells are few enough to be enumerated."""
    return d <= MAX_DIMENSION and n <= MAX_POINTS[d] // (10 if d == 3 and out > 1 else 1)


def with_leak(x: np.ndarray, alpha: np.ndarray, slope: float) -> tuple[np.ndarray, np.ndarray]:
    """Points and coefficients of the ReLU whose sum is that of the leaky unit."""
    if slope == 0:
        return x, alpha
    return np.concatenate([x, -x]), np.concatenate([alpha, -slope * alpha])


def scaled(array: np.ndarray) -> tuple[np.ndarray, int]:
    """The array times a power of two that brings its largest entry between 1/2 and 1, and the exponent taken out."""
    exponent = math.frexp(float(np.abs(array).max(initial=0.0)))[1]
    return np.ldexp(array, -exponent), exponent


def best_unit(x: np.ndarray, alpha: np.ndarray, *, slope: float = 0.0) -> Unit:
    """rho of `x [n, d]`, `alpha [n, out]`, d at most 3, with bounds that allow for all rounding.

    Args:
      x: inputs.
      alpha: coefficients of the units' outputs.
      slope: of the activation for negative arguments: 0 is the ReLU.
    """
    (points, e1), (weights, e2) = scaled(x), scaled(alpha)
    points, weights = with_leak(points, weights, slope)
    n, size = len(x), float(np.mean(np.linalg.norm(weights, axis=1) * np.linalg.norm(points, axis=1)))
    size *= len(points) / n
    if alpha.shape[1] == 1:
        unit = best_relu_unit(points, weights[:, 0])
        u, a = unit.direction, np.array([unit.sign])
        lower, upper = unit.lower * len(points) / n, unit.upper * len(points) / n
    else:
        top, u = _best_direction(points, weights)
        attained = np.maximum(points @ u, 0.0) @ weights / n
        size_of = float(np.linalg.norm(attained))
        a = attained / size_of if size_of > 0 else np.eye(1, alpha.shape[1])[0]
        margin = 64 * len(points) * _EPS * size
        lower, upper = size_of - margin, max(top / n, size_of) + margin
    spare = _SPARE * size
    try:
        return Unit(max(0.0, math.ldexp(lower, e1 + e2)), math.ldexp(upper + spare, e1 + e2) + 1e-300, u, a)
    except OverflowError:
        return Unit(0.0, math.inf, u, a)


def _on_arcs(maps: np.ndarray, arcs: Arcs) -> tuple[float, float]:
    """The largest `||A u||` on the unit circle, and its angle, for maps `[k, out, 2]`, one an arc."""
    gram = np.einsum("koi,koj->kij", maps, maps)
    mean, half = 0.5 * (gram[:, 0, 0] + gram[:, 1, 1]), 0.5 * (gram[:, 0, 0] - gram[:, 1, 1])
    peak = 0.5 * np.arctan2(gram[:, 0, 1], half)
    angles = [arcs.start, arcs.end]
    for turn in (0.0, np.pi):
        at = arcs.start + np.mod(peak + turn - arcs.start, 2 * np.pi)
        angles.append(np.where(at <= arcs.end, at, arcs.start))
    grid = np.stack(angles)
    values = mean + half * np.cos(2 * grid) + gram[:, 0, 1] * np.sin(2 * grid)
    best = np.unravel_index(int(np.argmax(values)), values.shape)
    # Directly, not by its square, which has lost half the digits of a small value.
    angle = float(grid[best])
    return float(np.linalg.norm(maps[best[1]] @ np.array([np.cos(angle), np.sin(angle)]))), angle


def _best_direction(x: np.ndarray, alpha: np.ndarray) -> tuple[float, np.ndarray]:
    """The largest `||sum_j alpha_j max(0, u.x_j)||` over unit vectors, and a maximiser."""

    def value(u: np.ndarray) -> np.ndarray:
        return np.asarray(np.linalg.norm(np.maximum(u @ x.T, 0.0) @ alpha, axis=1))

    d, out = x.shape[1], alpha.shape[1]
    terms = (alpha[:, :, None] * x[:, None, :]).reshape(len(x), -1)
    if d == 1:
        values = value(np.array([[1.0], [-1.0]]))
        return float(values.max()), np.array([1.0 if values[0] >= values[1] else -1.0])
    if d == 2:
        arcs = cut_circle(x)
        best, angle = _on_arcs(arc_sums(arcs, terms).reshape(-1, out, 2), arcs)
        return best, np.array([np.cos(angle), np.sin(angle)])
    best, winner = -math.inf, np.eye(1, 3)[0]
    for i in range(len(x)):
        size = np.linalg.norm(x[i])
        if size == 0:
            continue
        normal = x[i] / size
        basis = np.linalg.svd(normal[None])[2][1:]
        flat, along = x @ basis.T, x @ normal
        parallel = np.linalg.norm(flat, axis=1) <= 1e-12 * np.abs(along)
        flat[parallel] = 0.0
        arcs = cut_circle(flat)
        maps = arc_sums(arcs, terms).reshape(-1, out, 3)
        found, angle = _on_arcs(maps @ basis.T, arcs)
        if found > best:
            best, winner = found, np.array([np.cos(angle), np.sin(angle)]) @ basis
        for side in (1.0, -1.0):
            there = maps + ((parallel & (side * along > 0)).astype(np.float64) @ terms).reshape(1, out, 3)
            tops = there[np.linalg.norm(there, axis=(1, 2)) > best]  # no top singular value is above that norm
            if len(tops):
                _, sigma, right = np.linalg.svd(tops, full_matrices=False)
                peaks = right[sigma[:, 0] > best][:, 0]
                for part in np.array_split(peaks, len(peaks) // 4096 + 1):
                    both = np.concatenate([part, -part])
                    values = value(both) if len(both) else np.zeros(1)
                    if values.max() > best:
                        best, winner = float(values.max()), both[int(np.argmax(values))]
    if not math.isfinite(best):  # all points are 0
        return 0.0, winner
    return best, winner / np.linalg.norm(winner)
