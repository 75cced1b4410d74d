"""How convex a two-dimensional loss surface is, in numbers (Figures 1 and 4, where the paper judges by eye).

A surface is a grid of losses `loss [ny, nx]` over the plane's coordinates `xs [nx]`, `ys [ny]`.  There are four
families of scores: (a) the distance to the lower convex envelope, the two-dimensional analogue of the duality gap of
Theorem 1; (b) the rate of midpoint-convexity violations; (c) the sign and size of the negative curvature, after the
maps of |lambda_min / lambda_max| in Li et al., "Visualizing the Loss Landscape of Neural Nets" (NeurIPS 2018), here for
the Hessian of the surface in the plane; (d) the loss barriers along the edges between solutions.  `DEFINITIONS` states
each of them.

Host code: NumPy and SciPy in float64.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from scipy.spatial import ConvexHull

DEFINITIONS: dict[str, str] = {
    "envelope_max": "largest value of loss - envelope over the finite grid points, in units of loss; the envelope is"
    " the lower convex envelope of the finite grid samples; 0 for a convex surface",
    "envelope_mean": "mean of loss - envelope over the finite grid points, in units of loss",
    "envelope_max_per_zero_loss": "envelope_max / zero_loss",
    "envelope_mean_per_zero_loss": "envelope_mean / zero_loss",
    "envelope_max_per_range": "envelope_max / loss_range; 0 for a flat surface",
    "envelope_mean_per_range": "envelope_mean / loss_range; 0 for a flat surface",
    "midpoint_violation_rate": "share, among all unordered pairs of distinct grid points a, b whose midpoint m is a"
    " grid point (all three finite), of those with loss(m) > (loss(a) + loss(b)) / 2 + e(m) + (e(a) + e(b)) / 2, where"
    " e(p) = rtol * max(|loss(p)|, zero_loss) is the error allowed in each loss",
    "midpoint_pairs": "number of such pairs",
    "negative_curvature_share": "share of the interior grid points (3x3 stencil finite) where the smaller eigenvalue of"
    " the finite-difference Hessian in the plane's coordinates lies below zero by more than errors e(p) in the losses"
    " can cause",
    "curvature_ratio_mean": "mean over the interior grid points (3x3 stencil finite) of |lambda_min| /"
    " max(|lambda_min|, |lambda_max|) where lambda_min is negative as in negative_curvature_share, and of 0 elsewhere;"
    " this is |lambda_min / lambda_max| cut off at 1",
    "curvature_ratio_max": "largest value of the same ratio",
    "barriers": "for the edges between solutions 0-1, 1-2 and 2-0: the largest excess of the loss along the edge over"
    " the linear interpolation between its end losses, at least 0, in units of loss; null when no edges were given",
    "barrier_max": "largest of the three barriers, in units of loss",
    "finite_share": "share of the grid points whose loss is finite; all other scores use the finite points only",
    "loss_range": "largest minus smallest finite loss in the window",
    "zero_loss": "loss of the zero network, a normaliser that does not depend on the window",
    "rtol": "relative error allowed in each loss, see midpoint_violation_rate",
    "status": "ok: every loss on the grid and on the edges is finite; partly_nonfinite: some are not;"
    " nonfinite: no grid point is finite, and the scores of the surface are undefined",
}

# Coordinates that are uniform up to this share of their span count as exactly uniform (float32 grids are).
_UNIFORM = 1e-6


@dataclasses.dataclass(frozen=True)
class Scores:
    """The convexity scores of one surface; `DEFINITIONS` says what each field means.  Undefined scores are NaN."""

    envelope_max: float
    envelope_mean: float
    envelope_max_per_zero_loss: float
    envelope_mean_per_zero_loss: float
    envelope_max_per_range: float
    envelope_mean_per_range: float
    midpoint_violation_rate: float
    midpoint_pairs: int
    negative_curvature_share: float
    curvature_ratio_mean: float
    curvature_ratio_max: float
    barriers: tuple[float, float, float] | None
    barrier_max: float | None
    finite_share: float
    loss_range: float
    zero_loss: float
    rtol: float
    status: str

    def to_json(self) -> dict[str, Any]:
        """The fields as plain Python values, NaN and infinity as None, with `DEFINITIONS` under "definitions"."""

        def plain(value: Any) -> Any:
            if isinstance(value, tuple):
                return [plain(v) for v in value]
            if isinstance(value, float):
                return float(value) if math.isfinite(value) else None
            return value

        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)} | {
            "definitions": dict(DEFINITIONS)
        }


class Curvature(NamedTuple):
    """Curvature of a surface at its interior grid points; NaN where a point of the 3x3 stencil is not finite.

    Attributes:
      lambda_min, lambda_max: eigenvalues of the finite-difference Hessian, in units of loss per squared coordinate.
      negative: 1 where lambda_min is below zero beyond the allowed errors, else 0.
      ratio: |lambda_min| / max(|lambda_min|, |lambda_max|) where `negative`, else 0; in [0, 1].
    """

    lambda_min: Float64[np.ndarray, "my mx"]
    lambda_max: Float64[np.ndarray, "my mx"]
    negative: Float64[np.ndarray, "my mx"]
    ratio: Float64[np.ndarray, "my mx"]


def lower_convex_envelope(xs: np.ndarray, ys: np.ndarray, values: np.ndarray) -> Float64[np.ndarray, "ny nx"]:
    """The largest convex function below the samples, at the grid points.

    At a point p it is the smallest `sum_k w_k values_k` over the convex combinations `p = sum_k w_k (x_k, y_k)` of
    grid points.  The lower facets of the convex hull of the points `(x, y, value)` carry it; each facet is rasterised
    and a point takes the smallest interpolated value.  So a result is, up to rounding, the value of a convex
    combination of samples; it is never above `values`.  On random surfaces with known envelopes the error stayed below
    1e-12 of the largest |sample|, high peaks inside the window not counted.

    Args:
      xs, ys: coordinates `[nx]`, `[ny]`, finite and strictly monotone, not necessarily uniform.  Coordinates uniform to
        1e-6 of their span are taken as exactly uniform.  One row or one column gives the one-dimensional envelope.
      values: samples `[ny, nx]`.  Non-finite ones are left out of the hull.

    Returns:
      The envelope `[ny, nx]`, float64; NaN only at non-finite samples outside the convex hull of the finite points.

    Raises:
      ValueError: for axes that are not finite, strictly monotone vectors, or `values` of another shape than `[ny, nx]`.
    """
    xs, ys, values = _checked(xs, ys, values)
    finite = np.isfinite(values)
    if not finite.any():
        return np.full(values.shape, np.nan)
    v, u = np.meshgrid(_grid_units(ys), _grid_units(xs), indexing="ij")
    envelope = _envelope_on_a_line(u, v, values, finite)
    if envelope is None:
        corners = _candidates(u, v, values, finite)
        triangles = _lower_triangles(u[corners], v[corners], values[corners])
        rows, cols = np.nonzero(corners)
        envelope = _rasterise(u, v, values, rows[triangles], cols[triangles])
    # fmin: a sample that no triangle covers is a corner of the finite points' outline, cut off by rounding.
    return np.fmin(envelope, np.where(finite, values, np.nan))


def midpoint_violations(values: np.ndarray, error: np.ndarray) -> tuple[int, int]:
    """Counts violations of midpoint convexity over all pairs of points of a uniform grid, exactly.

    Every unordered pair of distinct grid points whose midpoint is a grid point is looked at (845,000 on a full 51 x 51
    grid); pairs with a non-finite loss at an end or at the midpoint are left out.

    Args:
      values: losses `[ny, nx]` on a grid with uniform axes.
      error: allowed absolute error of each loss, `[ny, nx]`.

    Returns:
      (number of pairs violating by more than the errors can cause, number of pairs).

    Raises:
      ValueError: when the two shapes differ.
    """
    if values.ndim != 2 or error.shape != values.shape:
        raise ValueError(
            f"values and error must be two grids of one shape [ny, nx]; got {values.shape} and {error.shape}."
        )
    finite = np.isfinite(values)
    # Not finite becomes NaN, and comparisons with NaN are false.
    low = np.where(finite, values, np.nan) - np.where(finite, error, np.nan)
    high = np.where(finite, values, np.nan) + np.where(finite, error, np.nan)
    ny, nx = values.shape
    violations = pairs = 0
    for dy in range((ny - 1) // 2 + 1):
        for dx in range(1 if dy == 0 else -((nx - 1) // 2), (nx - 1) // 2 + 1):
            # Ends are midpoint -/+ (dy, dx); one of the two signs per unordered pair.
            middle_y, middle_x = slice(dy, ny - dy), slice(abs(dx), nx - abs(dx))
            a = slice(0, ny - 2 * dy), slice(abs(dx) - dx, nx - abs(dx) - dx)
            b = slice(2 * dy, ny), slice(abs(dx) + dx, nx - abs(dx) + dx)
            mean = 0.5 * high[a] + 0.5 * high[b]
            middle = low[middle_y, middle_x]
            violations += int(np.count_nonzero(middle > mean))
            pairs += int(np.count_nonzero(finite[a] & finite[b] & finite[middle_y, middle_x]))
    return violations, pairs


def curvature(xs: np.ndarray, ys: np.ndarray, loss: np.ndarray, error: np.ndarray) -> Curvature:
    """Eigenvalues of the Hessian by central differences (3x3 stencil with the mixed derivative) at interior points.

    The Hessian is taken in the plane's own coordinates: the sign of lambda_min does not depend on the choice of axes in
    the plane, the ratio does when the axes are not orthonormal.

    Args:
      xs, ys: uniform coordinates `[nx]`, `[ny]`, at least 3 each.
      loss: `[ny, nx]`.
      error: allowed absolute error of each loss, `[ny, nx]`; lambda_min counts as negative when it is below
        `-(4 / min(hx, hy)**2 + 1 / (hx hy))` times the largest error in the stencil, which bounds the effect of such
        errors.

    Returns:
      Maps `[ny - 2, nx - 2]`, entry [i, j] belonging to grid point [i + 1, j + 1].

    Raises:
      ValueError: for bad axes or shapes, fewer than 3 points on an axis, or axes that are not uniform.
    """
    xs, ys, loss = _checked(xs, ys, loss)
    if error.shape != loss.shape:
        raise ValueError(f"error must have the shape of loss, {loss.shape}; got {error.shape}.")
    hx, hy = _step("xs", xs), _step("ys", ys)
    ny, nx = loss.shape
    # An infinite loss becomes NaN so that the whole stencil is NaN.
    f = np.where(np.isfinite(loss), loss, np.nan)

    def at(grid: np.ndarray, dy: int, dx: int) -> np.ndarray:
        return grid[1 + dy : ny - 1 + dy, 1 + dx : nx - 1 + dx]

    fxx = (at(f, 0, 1) - 2 * at(f, 0, 0) + at(f, 0, -1)) / hx**2
    fyy = (at(f, 1, 0) - 2 * at(f, 0, 0) + at(f, -1, 0)) / hy**2
    fxy = (at(f, 1, 1) - at(f, 1, -1) - at(f, -1, 1) + at(f, -1, -1)) / (4 * hx * hy)
    whole = np.isfinite(sum(at(f, dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)))
    mean, spread = (fxx + fyy) / 2, np.hypot((fxx - fyy) / 2, fxy)
    lambda_min = np.where(whole, mean - spread, np.nan)
    lambda_max = np.where(whole, mean + spread, np.nan)

    stencil_error = np.max([at(error, dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)], axis=0)
    negative = lambda_min < -stencil_error * (4 / min(abs(hx), abs(hy)) ** 2 + 1 / abs(hx * hy))
    largest = np.maximum(np.abs(lambda_min), np.abs(lambda_max))
    ratio = np.divide(-lambda_min, largest, out=np.zeros_like(largest), where=negative)
    return Curvature(lambda_min, lambda_max, np.where(whole, negative, np.nan), np.where(whole, ratio, np.nan))


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
    t, losses = np.asarray(t, np.float64), np.asarray(losses, np.float64)
    if t.ndim != 1 or t.size < 2 or losses.shape != t.shape:
        raise ValueError(f"t and losses must be vectors of one length m >= 2; got shapes {t.shape} and {losses.shape}.")
    if not ((np.diff(t) > 0).all() and abs(t[0]) <= _UNIFORM and abs(t[-1] - 1) <= _UNIFORM):
        raise ValueError(
            f"t must increase strictly from 0 to 1; got t from {t[0]} to {t[-1]}: sort it, include both ends."
        )
    if np.isnan(losses).any() or not np.isfinite(losses[[0, -1]]).all():
        return math.nan
    return float(max(0.0, np.max(losses - ((1 - t) * losses[0] + t * losses[-1]))))


def scores(
    xs: np.ndarray,
    ys: np.ndarray,
    loss: np.ndarray,
    *,
    zero_loss: float,
    edge_t: np.ndarray | None = None,
    edge_losses: np.ndarray | None = None,
    rtol: float = 1e-6,
) -> Scores:
    """All convexity scores of a surface.

    Args:
      xs, ys: uniform coordinates `[nx]`, `[ny]`, at least 3 each.
      loss: losses `[ny, nx]`; non-finite ones are left out and reported in `finite_share` and `status`.
      zero_loss: loss of the zero network, > 0.
      edge_t: positions `[m]` from 0 to 1 along an edge; goes with `edge_losses`.
      edge_losses: losses `[3, m]` along the edges between solutions 0-1, 1-2 and 2-0.
      rtol: each loss is taken to be known to `rtol * max(|loss|, zero_loss)`; the default suits float32 losses, whose
        terms are of the size of `zero_loss` before they cancel.  Violations (b) and negative curvature (c) must exceed
        what such errors can cause.  The envelope and the barriers use no tolerance.

    Raises:
      ValueError: for bad axes or shapes, fewer than 3 points on an axis, axes that are not uniform (midpoints and
        second differences need uniform steps; `lower_convex_envelope` does not), zero_loss or rtol out of range, or bad
        edges.
    """
    xs, ys, loss = _checked(xs, ys, loss)
    _step("xs", xs)
    _step("ys", ys)
    if not (math.isfinite(zero_loss) and zero_loss > 0):
        raise ValueError(f"zero_loss must be finite and > 0 (the loss of the zero network); got {zero_loss}.")
    if not (math.isfinite(rtol) and rtol >= 0):
        raise ValueError(f"rtol must be finite and >= 0; got {rtol}.")
    if (edge_t is None) != (edge_losses is None):
        raise ValueError("edge_t and edge_losses go together: give both or neither.")

    barriers: tuple[float, float, float] | None = None
    edges_finite = True
    if edge_t is not None and edge_losses is not None:
        edge_losses = np.asarray(edge_losses, np.float64)
        if edge_losses.ndim != 2 or edge_losses.shape[0] != 3:
            raise ValueError(
                f"edge_losses must be [3, m], a row per edge 0-1, 1-2, 2-0; got shape {edge_losses.shape}."
            )
        barriers = barrier(edge_t, edge_losses[0]), barrier(edge_t, edge_losses[1]), barrier(edge_t, edge_losses[2])
        edges_finite = bool(np.isfinite(edge_losses).all())

    finite = np.isfinite(loss)
    if not finite.any():
        status = "nonfinite"
        distance_max = distance_mean = loss_range = math.nan
    else:
        status = "ok" if finite.all() and edges_finite else "partly_nonfinite"
        distance = (np.where(finite, loss, 0.0) - lower_convex_envelope(xs, ys, loss))[finite]
        distance_max, distance_mean = float(distance.max()), float(distance.mean())
        loss_range = float(np.ptp(loss[finite]))
    per_range = loss_range if loss_range != 0 else 1.0

    error = rtol * np.maximum(np.abs(np.where(finite, loss, 0.0)), zero_loss)
    violations, pairs = midpoint_violations(loss, error)
    curved = curvature(xs, ys, loss, error)
    seen = np.isfinite(curved.negative)
    return Scores(
        envelope_max=distance_max,
        envelope_mean=distance_mean,
        envelope_max_per_zero_loss=distance_max / zero_loss,
        envelope_mean_per_zero_loss=distance_mean / zero_loss,
        envelope_max_per_range=distance_max / per_range,
        envelope_mean_per_range=distance_mean / per_range,
        midpoint_violation_rate=violations / pairs if pairs else math.nan,
        midpoint_pairs=pairs,
        negative_curvature_share=float(curved.negative[seen].mean()) if seen.any() else math.nan,
        curvature_ratio_mean=float(curved.ratio[seen].mean()) if seen.any() else math.nan,
        curvature_ratio_max=float(curved.ratio[seen].max()) if seen.any() else math.nan,
        barriers=barriers,
        barrier_max=None if barriers is None else float(np.max(barriers)),
        finite_share=float(finite.mean()),
        loss_range=loss_range,
        zero_loss=float(zero_loss),
        rtol=float(rtol),
        status=status,
    )


def _checked(xs: np.ndarray, ys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three as float64, after checking that the axes are strictly monotone and the shapes fit."""
    xs, ys, values = (np.asarray(a, np.float64) for a in (xs, ys, values))
    for name, axis in (("xs", xs), ("ys", ys)):
        if axis.ndim != 1 or axis.size == 0 or not np.isfinite(axis).all():
            raise ValueError(
                f"{name} must be a non-empty vector of finite coordinates; got shape {axis.shape}: {axis}."
            )
        steps = np.diff(axis)
        if not ((steps > 0).all() or (steps < 0).all()):
            raise ValueError(f"{name} must be strictly monotone; got {axis}: sort it and drop repeated coordinates.")
    if values.shape != (ys.size, xs.size):
        raise ValueError(
            f"the surface must have shape [ny, nx] = {(ys.size, xs.size)}, rows along ys; got {values.shape}."
            + (" Transpose it." if values.shape == (xs.size, ys.size) else "")
        )
    return xs, ys, values


def _is_uniform(axis: np.ndarray) -> bool:
    ideal = np.linspace(axis[0], axis[-1], axis.size)
    return bool(np.max(np.abs(axis - ideal)) <= _UNIFORM * abs(axis[-1] - axis[0]))


def _step(name: str, axis: np.ndarray) -> float:
    """The step of a uniform axis of at least 3 points; raises ValueError otherwise."""
    if axis.size < 3:
        raise ValueError(f"{name} has {axis.size} points; midpoints and curvature need at least 3 points per axis.")
    if not _is_uniform(axis):
        steps = np.abs(np.diff(axis))
        raise ValueError(
            f"{name} must be uniformly spaced for midpoints and curvature; got steps from {steps.min()} to"
            f" {steps.max()}. Use np.linspace, or only lower_convex_envelope, which takes any monotone grid."
        )
    return float(axis[-1] - axis[0]) / (axis.size - 1)


def _grid_units(axis: np.ndarray) -> Float64[np.ndarray, " n"]:
    """The axis mapped affinely onto [0, n - 1]: exact integers when it is uniform, so that areas there are exact."""
    if axis.size == 1 or _is_uniform(axis):
        return np.arange(axis.size, dtype=np.float64)
    return (axis - axis[0]) / (axis[-1] - axis[0]) * (axis.size - 1)


def _lower_chain(t: np.ndarray, z: np.ndarray) -> Int[np.ndarray, " k"]:
    """Indices of the vertices of the lower convex hull of the points (t, z), t strictly increasing (monotone chain)."""
    chain: list[int] = []
    ts, zs = t.tolist(), z.tolist()
    for c in range(len(ts)):
        while len(chain) >= 2:
            a, b = chain[-2], chain[-1]
            if (ts[b] - ts[a]) * (zs[c] - zs[a]) > (ts[c] - ts[a]) * (zs[b] - zs[a]):
                break
            chain.pop()
        chain.append(c)
    return np.array(chain, dtype=np.int64)


def _envelope_on_a_line(
    u: np.ndarray, v: np.ndarray, values: np.ndarray, finite: np.ndarray
) -> Float64[np.ndarray, "ny nx"] | None:
    """The envelope when the finite points lie on one line (NaN off their segment), else None."""
    pu, pv, pz = u[finite], v[finite], values[finite]
    far = np.argmax(np.hypot(pu - pu[0], pv - pv[0]))
    du, dv = pu[far] - pu[0], pv[far] - pv[0]
    length = float(np.hypot(du, dv))
    if length == 0:  # a single finite point
        return np.where(finite, values, np.nan)
    off = np.abs((u - pu[0]) * dv - (v - pv[0]) * du) / length
    on_line = off <= 1e-12 * max(u.shape)
    if not on_line[finite].all():
        return None
    t = ((u - pu[0]) * du + (v - pv[0]) * dv) / length
    order = np.argsort(t[finite])
    pt, pz = t[finite][order], pz[order]
    chain = _lower_chain(pt, pz)
    line = np.interp(t[on_line], pt[chain], pz[chain], left=np.nan, right=np.nan)
    envelope = np.full(values.shape, np.nan)
    envelope[on_line] = line
    return envelope


def _candidates(u: np.ndarray, v: np.ndarray, values: np.ndarray, finite: np.ndarray) -> Bool[np.ndarray, "ny nx"]:
    """The finite points that can be vertices of the lower hull: on the 1-D hull of their row, then of their column.

    The rest are convex combinations of these, or lie above one.  This keeps high peaks inside the window, which would
    spoil the scaling, and most coplanar points away from Qhull.
    """
    keep = np.zeros_like(finite)
    for row in range(values.shape[0]):
        at = np.flatnonzero(finite[row])
        keep[row, at[_lower_chain(u[row, at], values[row, at])]] = True
    for col in range(values.shape[1]):
        at = np.flatnonzero(keep[:, col])
        keep[at, col] = False
        keep[at[_lower_chain(v[at, col], values[at, col])], col] = True
    return keep


def _lower_triangles(
    u: Float[np.ndarray, " p"], v: Float[np.ndarray, " p"], z: Float[np.ndarray, " p"]
) -> Int[np.ndarray, "k 3"]:
    """Triangles (as indices into the points) that cover the lower side of the convex hull of the points (u, v, z)."""
    # Neither subtracting a plane nor scaling an axis changes which points span a lower facet.
    base = np.stack([u / max(u.max(), 1.0), v / max(v.max(), 1.0), np.ones_like(u)], axis=1)
    z = z / max(float(np.abs(z).max()), np.finfo(np.float64).tiny)
    z = z - base @ np.linalg.lstsq(base, z, rcond=None)[0]
    z = z / max(float(np.abs(z).max()), np.finfo(np.float64).tiny)
    points = np.stack([base[:, 0], base[:, 1], z], axis=1)
    # A point above everything else makes the hull three-dimensional even when the samples are coplanar.
    apex = points.mean(axis=0) + np.array([0.0, 0.0, 3.0])
    hull = ConvexHull(np.concatenate([points, apex[None]]))
    # Facets that are upright up to rounding may stay: they only offer further convex combinations.
    lower = (hull.equations[:, 2] < 1e-9) & (hull.simplices < len(points)).all(axis=1)
    return hull.simplices[lower].astype(np.int64)


def _rasterise(
    u: np.ndarray,
    v: np.ndarray,
    values: np.ndarray,
    rows: Int[np.ndarray, "k 3"],
    cols: Int[np.ndarray, "k 3"],
    chunk: int = 2_000_000,
) -> Float64[np.ndarray, "ny nx"]:
    """At each grid point the smallest linear interpolation among the triangles that cover it; NaN where none does.

    Triangles are given by the grid indices of their corners; `chunk` bounds the points looked at together.
    """
    result = np.full(values.shape, np.inf)
    u0, u1, u2 = u[rows, cols].T
    v0, v1, v2 = v[rows, cols].T
    u1, u2, v1, v2 = u1 - u0, u2 - u0, v1 - v0, v2 - v0
    area = u1 * v2 - u2 * v1
    flat = area == 0  # upright facets; their points lie on other triangles too
    low_i, low_j = rows.min(axis=1), cols.min(axis=1)
    width = cols.max(axis=1) - low_j + 1
    count = np.where(flat, 0, (rows.max(axis=1) - low_i + 1) * width)  # points in the bounding box
    group = np.cumsum(count) // chunk
    for g in range(int(group[-1]) + 1):
        members = np.flatnonzero(group == g)
        k = np.repeat(members, count[members])
        n = np.arange(k.size) - np.repeat(np.cumsum(count[members]) - count[members], count[members])
        i, j = low_i[k] + n // width[k], low_j[k] + n % width[k]
        p, q = u[i, j] - u0[k], v[i, j] - v0[k]
        # Barycentric coordinates; divided last, so that they are exactly 0 or 1 at the corners.
        w1 = (p * v2[k] - u2[k] * q) / area[k]
        w2 = (u1[k] * q - p * v1[k]) / area[k]
        w0 = 1 - w1 - w2
        inside = (w0 >= -1e-12) & (w1 >= -1e-12) & (w2 >= -1e-12)
        i, j, k = i[inside], j[inside], k[inside]
        weights = np.maximum(np.stack([w0[inside], w1[inside], w2[inside]], axis=1), 0.0)
        corners = values[rows[k], cols[k]]
        # A combination is never below its smallest part; so said, a flat facet stays flat to the last bit.
        np.minimum.at(result, (i, j), np.maximum(np.sum(weights * corners, axis=1), corners.min(axis=1)))
    return np.where(np.isinf(result), np.nan, result)
