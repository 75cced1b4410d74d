"""The l_p ball of Figure 3, whose averages have a closed form."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Float64

from dualgap_jax.shapley_folkman.geometry import SQRT2, distance_to_segments
from dualgap_jax.shapley_folkman.measured import Measured, Radii, SetError, Shape, checked_copies


@dataclasses.dataclass(frozen=True)
class LpBall:
    """The ball `|x|^p + |y|^p <= radius^p`; not convex for p < 1 (Figure 3 shows p = 1/2).

    For p < 1, in the first quadrant, A lies below the convex curve `y = phi(x)`, and so A_n lies below
    `max (1/n) sum_j phi(x_j)` over `0 <= x_j <= radius` with mean x.  A sum of convex functions is largest at a corner
    of that set, where all x_j but one are 0 or the radius: the boundary of A_n is a chain of n copies of that of A,
    scaled by 1/n, between the points `(k, n - k) radius / n`, where it meets the hull.  A way from the gap at one copy
    to A_n ends on that copy, hence `rho(n) = rho(1) / n`.

    The distance to the curve is concave on the convex region above it and symmetric about the diagonal, so the point of
    the hull farthest from A is `(radius/2, radius/2)`; for p = 1/2 the curve is a parabola with its focus there, and
    `rho(1) = radius sqrt(2) / 4`.

    Raises:
      SetError: unless p and the radius are positive and finite.
    """

    p: float = 0.5
    radius: float = 1.0

    def __post_init__(self) -> None:
        for name in ("p", "radius"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise SetError(f"{name}={value} must be positive and finite.")
            object.__setattr__(self, name, float(value))
        if self.p < 0.02:
            raise SetError(f"p={self.p} is below 0.02, where float64 no longer resolves the curve; give a larger p.")

    def distance_to_hull(self, n: int, tolerance: float = 1e-6) -> Measured:
        """rho(n) = rho(1) / n: in closed form for p = 1/2 and p >= 1, else enclosed to about 1e-12 radius."""
        scale = self.radius / checked_copies(n)
        if self.p >= 1:
            return Measured(0.0, 0.0, "exact")
        if self.p == 0.5:
            return Measured(SQRT2 / 4 * scale, 0.0, "exact")
        gap = _distance_to_lp_curve(self.p)
        return Measured(gap.value * scale, gap.error * scale, "bounded")

    def shape(self, n: int) -> Shape:
        """The boundary, with corners on it."""
        copies = 1 if self.p >= 1 else checked_copies(n)
        curve = _lp_curve(self.p, np.linspace(1, 0, max(16, 400 // copies) + 1))[:-1]
        starts = np.stack([np.arange(copies)[::-1], np.arange(copies)], axis=-1)
        quarter = ((starts[:, None] + curve) / copies).reshape(-1, 2) * self.radius
        # Each quarter starts on an axis and ends just before the next; the turns keep the order.
        turns = [quarter]
        for _ in range(3):
            turns.append(np.stack([-turns[-1][:, 1], turns[-1][:, 0]], axis=-1))
        loop = np.concatenate(turns)
        return Shape(loop, np.asarray([len(loop)]))

    def hull(self) -> Float64[np.ndarray, "k 2"]:
        """The l_1 ball for p <= 1, the ball itself otherwise."""
        if self.p <= 1:
            return self.radius * np.asarray([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
        return self.shape(1).vertices

    def radii(self) -> Radii:
        """Both exactly; for p < 1 the inner radius is that of the triangle of 0 and two neighbouring tips."""
        if self.p >= 1:
            return Radii(self.radius * max(1.0, 2 ** (0.5 - 1 / self.p)), 0.0)
        return Radii(self.radius, self.radius * math.sqrt(0.5))


def _lp_curve(p: float, s: Float64[np.ndarray, " k"]) -> Float64[np.ndarray, "k 2"]:
    """Points of the unit l_p sphere in the first quadrant, from (0, 1) at s = 0 to (1, 0) at s = 1."""
    return np.stack([s ** (1 / p), (1 - s) ** (1 / p)], axis=-1)


@functools.cache
def _distance_to_lp_curve(p: float) -> Measured:
    """Distance of (1/2, 1/2) from the unit l_p curve, p < 1, enclosed.

    The curve is convex and (1/2, 1/2) lies above it: points of the curve bound the distance from above, chords from
    below.  Intervals whose chord is farther than the best point are dropped, the others halved.
    """
    middle = np.asarray([0.5, 0.5])
    ends = np.linspace(0.0, 0.5, 513)  # the other half of the curve is the mirror image
    low, high = ends[:-1], ends[1:]
    upper, lower = math.inf, 0.0
    for _ in range(60):
        a, b = _lp_curve(p, low), _lp_curve(p, high)
        upper = min(upper, float(np.min(np.linalg.norm(np.concatenate([a, b]) - middle, axis=-1))))
        chord = distance_to_segments(middle[None], a, b)[0]
        lower = min(float(chord.min()), upper)
        if upper - lower < 1e-13:
            break
        keep = chord < upper
        low, high = low[keep], high[keep]
        halves = (low + high) / 2
        low, high = np.concatenate([low, halves]), np.concatenate([halves, high])
    return Measured.between(lower, upper)
