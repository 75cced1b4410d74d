"""Convex hulls, circles, distances and branch and bound in the plane."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import scipy
from jaxtyping import Bool, Float, Float64

from dualgap_jax.shapley_folkman.measured import Measured, checked_points

_CELLS = 20_000  # branch and bound gives up its tolerance, and says so, rather than split more cells than this
SQRT2 = math.sqrt(2.0)


def normalised(
    points: Float[np.ndarray, "k 2"], reach: float = 0.0
) -> tuple[Float64[np.ndarray, "k 2"], Float64[np.ndarray, " 2"], float]:
    """Points about 0 and of size 1, whose products neither overflow nor vanish: `origin + unit * local`.

    Args:
      points: any.
      reach: a radius around each of them.

    Returns:
      The local points, the middle of the box around the given ones, and the unit, a power of two.
    """
    origin = points.min(axis=0) / 2 + points.max(axis=0) / 2
    size = max(float(np.abs(points - origin).max()), reach)
    unit = math.ldexp(1.0, math.frexp(size)[1] - 1) if size > 0 else 1.0
    return (points - origin) / unit, origin, unit


def convex_hull(points: Float[np.ndarray, "k 2"]) -> Float64[np.ndarray, "corners 2"]:
    """Corners of the convex hull, counter-clockwise (Andrew's monotone chain); one or two when it has no interior."""
    points = np.unique(checked_points(points, "points"), axis=0)
    if len(points) <= 2:
        return points
    # Of the points with one x only the lowest and the highest can be corners.
    first = np.flatnonzero(np.diff(points[:, 0], prepend=-np.inf))
    ends = np.unique(np.concatenate([first, np.append(first[1:] - 1, len(points) - 1)]))
    unit = normalised(points)[2]
    rows = (points[ends] / unit).tolist()

    def chain(rows: list[list[float]]) -> list[list[float]]:
        kept: list[list[float]] = []
        for x, y in rows:
            while len(kept) > 1:
                (ax, ay), (bx, by) = kept[-2], kept[-1]
                if (bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0:
                    break
                kept.pop()
            kept.append([x, y])
        return kept[:-1]

    return np.asarray(chain(rows) + chain(rows[::-1])) * unit


def smallest_circle(points: Float[np.ndarray, "k 2"]) -> tuple[Float64[np.ndarray, " 2"], float]:
    """Centre and radius of the smallest circle around the points (Welzl's algorithm, in random order).

    The radius is the largest distance from the centre, so that rounding cannot leave a point outside.
    """
    given = checked_points(points, "points")
    points, origin, unit = normalised(given)
    points = points[np.random.default_rng(0).permutation(len(points))]
    center, radius = points[0], 0.0

    def outside(start: int, stop: int) -> int:
        """The first of the points from `start` to `stop` that is not in the circle, or `stop`."""
        away = np.linalg.norm(points[start:stop] - center, axis=1) > radius * (1 + 1e-12)
        return start + int(np.argmax(away)) if away.any() else stop

    i = 0
    while (i := outside(i + 1, len(points))) < len(points):
        center, radius, j = points[i], 0.0, -1
        while (j := outside(j + 1, i)) < i:
            center, radius, k = (points[i] + points[j]) / 2, float(np.linalg.norm(points[i] - points[j])) / 2, -1
            while (k := outside(k + 1, j)) < j:
                center = _circumcenter(points[i], points[j], points[k])
                radius = float(np.linalg.norm(center - points[i]))
    center = center * unit + origin
    return center, float(np.linalg.norm((given - center) / unit, axis=1).max()) * unit


def _circumcenter(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> Float64[np.ndarray, " 2"]:
    """Of a triangle; of three points on a line, the middle of the two farthest apart."""
    u, v = b - a, c - a
    cross = 2 * (u[0] * v[1] - u[1] * v[0])
    if cross == 0:
        ends = max(((a, b), (b, c), (c, a)), key=lambda pair: float(np.linalg.norm(pair[0] - pair[1])))
        return (ends[0] + ends[1]) / 2
    return a + np.asarray([v[1] * (u @ u) - u[1] * (v @ v), u[0] * (v @ v) - v[0] * (u @ u)]) / cross


def inner_radius(points: Float[np.ndarray, "k 2"], members: Bool[np.ndarray, "k pieces"] | None = None) -> float:
    """The inner radius of a finite set: the largest of the circles around the triangles of its Delaunay triangulation.

    It is exact.  The triangles show that it is not larger.  Nor is it smaller: the largest such circle belongs to a
    triangle with its circumcentre c inside, or to an edge of the hull with midpoint c (else the triangle across the
    longest side would have a larger one).  No point is nearer to c than that radius (on the hull's edge: no point of
    the edge), so any subset with c in its hull needs a circle as large.

    Args:
      points: the set.
      members: `[k, pieces]`, which point lies in which convex piece; then the result bounds the inner radius of the
        union of the pieces from above: triangles inside one piece count 0.
    """
    points, _, unit = normalised(checked_points(points, "points"))
    try:
        corners = scipy.spatial.Delaunay(points).simplices
        flat = bool((corners == len(points)).any())  # Qhull has brought in a point at infinity
    except (scipy.spatial.QhullError, ValueError):
        flat = True
    if flat:  # all on one line but for rounding, or fewer than three
        spread = points - points.mean(axis=0)
        direction = np.linalg.svd(spread, full_matrices=False)[2][0]
        order = np.argsort(spread @ direction)
        corners = np.stack([order[:-1], order[1:]], axis=1)
    if len(corners) == 0:
        return 0.0
    if members is not None:
        corners = corners[~members[corners].all(axis=1).any(axis=1)]
        if len(corners) == 0:
            return 0.0
    around = points[corners]
    sides = np.sort(np.linalg.norm(around - np.roll(around, -1, axis=1), axis=-1), axis=1)
    longest = sides[:, -1] / 2
    if corners.shape[1] == 2:
        return float(longest.max()) * unit
    a, b = around[:, 1] - around[:, 0], around[:, 2] - around[:, 0]
    area = np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]) / 2
    acute = (sides[:, 2] ** 2 < sides[:, 0] ** 2 + sides[:, 1] ** 2) & (area > 0)
    circumradius = sides.prod(axis=1) / np.where(acute, 4 * area, 1.0)
    return float(np.where(acute, circumradius, longest).max()) * unit


def distance_to_segments(
    x: Float[np.ndarray, "k 2"], a: Float[np.ndarray, "*edges 2"], b: Float[np.ndarray, "*edges 2"]
) -> Float64[np.ndarray, "k *edges"]:
    """Distances of points from segments."""
    along = b - a
    length = np.sum(along * along, axis=-1)
    x = x.reshape(len(x), *(1,) * (a.ndim - 1), 2)
    offset = x - a
    t = np.clip(np.sum(offset * along, axis=-1) / np.where(length > 0, length, 1.0), 0, 1)
    return np.linalg.norm(offset - t[..., None] * along, axis=-1)


def signed_distance(
    x: Float[np.ndarray, "k 2"],
    corners: Float[np.ndarray, "polygons v 2"],
    edges: Float[np.ndarray, "polygons v 2"] | None = None,
) -> Float64[np.ndarray, "k polygons"]:
    """Distances of points from convex polygons (counter-clockwise, corners may repeat); negative inside.

    Args:
      x: the points.
      corners: of the polygons.
      edges: from each corner to the next, where they are known better than as the difference of two rounded corners,
        which gives a tiny edge any direction, so that no point lies inside.
    """
    ends = np.roll(corners, -1, axis=1)
    away = distance_to_segments(x, corners, ends).min(axis=-1)
    if corners.shape[1] < 3:
        return away
    edge, offset = ends - corners if edges is None else edges, x[:, None, None] - corners
    cross = edge[..., 0] * offset[..., 1] - edge[..., 1] * offset[..., 0]
    inside = np.all((cross > 0) | (edge == 0).all(axis=-1), axis=-1) & (edge != 0).any(axis=(1, 2))
    return np.where(inside, -away, away)


def projected(x: Float[np.ndarray, "k 2"], hull: Float64[np.ndarray, "v 2"]) -> Float64[np.ndarray, "k 2"]:
    """The nearest points of a convex polygon."""
    a, along = hull, np.roll(hull, -1, axis=0) - hull
    length = np.sum(along * along, axis=-1)
    offset = x[:, None] - a
    t = np.clip(np.sum(offset * along, axis=-1) / np.where(length > 0, length, 1.0), 0, 1)
    feet = a + t[..., None] * along
    nearest = np.argmin(np.sum((x[:, None] - feet) ** 2, axis=-1), axis=1)
    foot = feet[np.arange(len(x)), nearest]
    if len(hull) < 3:
        return foot
    inside = (along[:, 0] * offset[..., 1] - along[:, 1] * offset[..., 0] >= 0).all(axis=1)
    return np.where(inside[:, None], x, foot)


def largest(
    distance: Callable[[Float[np.ndarray, "k 2"]], Float64[np.ndarray, " k"]],
    hull: Float64[np.ndarray, "v 2"],
    tolerance: float,
) -> Measured:
    """The largest value, at least 0, of a 1-Lipschitz function on a convex polygon, by branch and bound over squares.

    Projection on the hull does not lengthen distances, so a square with centre c and half diagonal q holds no value
    above `distance(projection of c) + q` on the hull.  Squares that cannot exceed the best value by `tolerance` are
    dropped.
    """
    low, high = hull.min(axis=0), hull.max(axis=0)
    half = max(float((high - low).max()) / 2, 1e-300) * (1 + 1e-9)
    centers = ((low + high) / 2)[None]
    lower = upper = -math.inf
    corners = np.asarray([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])
    while True:
        reach = half * SQRT2
        onto = projected(centers, hull)
        near = np.linalg.norm(centers - onto, axis=1) <= reach * (1 + 1e-9)
        centers, onto = centers[near], onto[near]
        values = distance(onto)
        lower = max(lower, float(values.max(initial=-math.inf)), 0.0)
        keep = values + reach > lower + tolerance
        upper = max(lower + tolerance, float((values[keep] + reach).max(initial=-math.inf)))
        centers = centers[keep]
        if len(centers) == 0 or 4 * len(centers) > _CELLS:
            return Measured.between(lower, upper)
        half /= 2
        centers = (centers[:, None] + half * corners).reshape(-1, 2)
