"""All convexity scores of a surface at once, and what each of them means."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from dualgap_jax.convexity.envelope import lower_convex_envelope
from dualgap_jax.convexity.grids import checked, power_of_two, real, step, times_power
from dualgap_jax.convexity.measures import barrier, curvature, midpoint_violations

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
    " e(p) = rtol * max(|loss(p)|, zero_loss) is the error allowed in each loss (the largest finite |loss| for a"
    " zero_loss that is not given); over all pairs up to a million of them, else over a million drawn from one seed",
    "midpoint_pairs": "number of pairs looked at",
    "midpoint_error": "standard error of midpoint_violation_rate; 0 when all pairs were looked at",
    "negative_curvature_share": "share of the interior points of a grid with steps of a fiftieth of the window (the"
    " nearest whole number of grid steps, at least one; 3x3 stencil finite) where the smaller eigenvalue of the"
    " finite-difference Hessian, in coordinates that make the window the unit square, lies below zero by more than"
    " errors e(p) in the losses can cause",
    "curvature_ratio_mean": "mean over the same points of |lambda_min| /"
    " max(|lambda_min|, |lambda_max|) where lambda_min is negative as in negative_curvature_share, and of 0 elsewhere;"
    " this is |lambda_min / lambda_max| cut off at 1",
    "curvature_ratio_max": "largest value of the same ratio",
    "barriers": "for the edges between solutions 0-1, 1-2 and 2-0: the largest excess of the loss along the edge over"
    " the linear interpolation between its end losses, at least 0, in units of loss; null when no edges were"
    " given, and each that is not finite",
    "barrier_max": "largest of the three barriers, in units of loss",
    "finite_share": "share of the grid points whose loss is finite; all other scores use the finite points only, and"
    " say nothing of the others (status partial)",
    "loss_range": "largest minus smallest finite loss in the window",
    "zero_loss": "loss of the zero network, a normaliser that does not depend on the window; null when not given",
    "rtol": "relative error allowed in each loss, see midpoint_violation_rate",
    "status": "ok: every loss on the grid and on the edges is finite; partial: some are not, and the scores are of the"
    " rest; nonfinite: no grid point is finite, and the scores of the surface are undefined",
}


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
    midpoint_error: float
    negative_curvature_share: float
    curvature_ratio_mean: float
    curvature_ratio_max: float
    barriers: tuple[float, float, float] | None
    barrier_max: float | None
    finite_share: float
    loss_range: float
    zero_loss: float | None
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


def scores(
    xs: np.ndarray,
    ys: np.ndarray,
    loss: np.ndarray,
    *,
    zero_loss: float | None = None,
    edge_t: np.ndarray | None = None,
    edge_losses: np.ndarray | None = None,
    rtol: float = 1e-6,
) -> Scores:
    """All convexity scores of a surface.

    Args:
      xs, ys: uniform coordinates `[nx]`, `[ny]`, at least 3 each.
      loss: losses `[ny, nx]`; non-finite or masked ones are left out and reported in `finite_share` and `status`.
      zero_loss: the loss of the zero network, > 0; without it the scores per zero_loss are NaN.
      edge_t: positions `[m]` from 0 to 1 along an edge; goes with `edge_losses`.
      edge_losses: losses `[3, m]` along the edges between solutions 0-1, 1-2 and 2-0.
      rtol: each loss is taken to be known to `rtol * max(|loss|, zero_loss)`; the default suits float32 losses, whose
        terms are of the size of `zero_loss` before they cancel.  Without zero_loss the largest finite |loss| stands for
        it.  Violations (b) and negative curvature (c) must exceed
        what such errors can cause.  The envelope and the barriers use no tolerance.

    Raises:
      ValueError: for bad axes or shapes, fewer than 3 points on an axis, axes that are not uniform (midpoints and
        second differences need uniform steps; `lower_convex_envelope` does not), zero_loss or rtol out of range, or bad
        edges.
    """
    xs, ys, loss = checked(xs, ys, loss)
    step("xs", xs)
    step("ys", ys)
    if zero_loss is not None and not (_is_number(zero_loss) and 0 < zero_loss < math.inf):
        raise ValueError(
            f"zero_loss must be finite and > 0 (the loss of the zero network), or left out; got {zero_loss!r:.60}."
        )
    if not (_is_number(rtol) and 0 <= rtol < math.inf):
        raise ValueError(f"rtol must be a number, finite and >= 0; got {rtol!r:.60}.")
    if (edge_t is None) != (edge_losses is None):
        raise ValueError("edge_t and edge_losses go together: give both or neither.")

    barriers: tuple[float, float, float] | None = None
    edges_finite = True
    if edge_t is not None and edge_losses is not None:
        edge_losses = real(edge_losses)
        if edge_losses.ndim != 2 or edge_losses.shape[0] != 3:
            raise ValueError(
                f"edge_losses must be [3, m], a row per edge 0-1, 1-2, 2-0; got shape {edge_losses.shape}."
            )
        barriers = barrier(edge_t, edge_losses[0]), barrier(edge_t, edge_losses[1]), barrier(edge_t, edge_losses[2])
        edges_finite = bool(np.isfinite(edge_losses).all())

    finite = np.isfinite(loss)
    # Of losses by a power of two, so that no difference, sum or share of them overflows or vanishes.
    size = power_of_two(loss)
    if not finite.any():
        status = "nonfinite"
        highest = mean = spread = math.nan
    else:
        status = "ok" if finite.all() and edges_finite else "partial"
        scaled = times_power(np.where(finite, loss, np.nan), -size)
        distance = (scaled - lower_convex_envelope(xs, ys, scaled))[finite]
        highest, mean, spread = float(distance.max()), float(distance.mean()), float(np.ptp(scaled[finite]))
    normaliser, exponent = math.frexp(math.nan if zero_loss is None else zero_loss)
    per_range = spread if spread != 0 else 1.0

    sizes = np.abs(np.where(finite, loss, 0.0))
    error = rtol * np.maximum(sizes, sizes.max() if zero_loss is None else zero_loss)
    midpoints = midpoint_violations(loss, error)
    curved = curvature(xs, ys, loss, error)
    seen = np.isfinite(curved.negative)
    return Scores(
        envelope_max=float(times_power(highest, size)),
        envelope_mean=float(times_power(mean, size)),
        envelope_max_per_zero_loss=float(times_power(highest / normaliser, size - exponent)),
        envelope_mean_per_zero_loss=float(times_power(mean / normaliser, size - exponent)),
        envelope_max_per_range=highest / per_range,
        envelope_mean_per_range=mean / per_range,
        midpoint_violation_rate=midpoints.rate,
        midpoint_pairs=midpoints.pairs,
        midpoint_error=midpoints.error,
        negative_curvature_share=float(curved.negative[seen].mean()) if seen.any() else math.nan,
        curvature_ratio_mean=float(curved.ratio[seen].mean()) if seen.any() else math.nan,
        curvature_ratio_max=float(curved.ratio[seen].max()) if seen.any() else math.nan,
        barriers=barriers,
        barrier_max=None if barriers is None else float(np.max(barriers)),
        finite_share=float(finite.mean()),
        loss_range=float(times_power(spread, size)),
        zero_loss=None if zero_loss is None else float(zero_loss),
        rtol=float(rtol),
        status=status,
    )


def _is_number(value: Any) -> bool:
    array = np.asarray(value)
    return array.ndim == 0 and array.dtype.kind in "fiu"
