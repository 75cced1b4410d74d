"""What a planar set can be asked, the numbers that come with an error, and the bounds on the distance to the hull."""

from __future__ import annotations

import math
import operator
from typing import Literal, NamedTuple, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int


class SetError(ValueError):
    """A planar set, or a number of copies, that cannot be handled; the message says what can."""


class Measured(NamedTuple):
    """A number with its two-sided error: the true one lies in `[value - error, value + error]`.

    Attributes:
      value: in units of the plane.
      error: at least 0; float64 rounding is not counted.
      kind: 'exact' (closed form) or 'bounded' (an enclosure was computed).
    """

    value: float
    error: float
    kind: Literal["exact", "bounded"]

    @classmethod
    def between(cls, lower: float, upper: float) -> Measured:
        """The enclosure of a number that is not negative."""
        lower = max(lower, 0.0)
        upper = max(upper, lower)
        return cls((lower + upper) / 2, (upper - lower) / 2, "bounded")


class Radii(NamedTuple):
    """What the Shapley-Folkman-Starr bound needs: upper bounds on both radii.

    Attributes:
      circumradius: at least rad of the set.
      inner_radius: at least r of the set; never above `circumradius`.
    """

    circumradius: float
    inner_radius: float


class Shape(NamedTuple):
    """What to draw of an average.

    Attributes:
      vertices: corners of all loops one after another, `[v, 2]`.  The set is the union of what the loops enclose; a
        loop of one corner is a point, of two a segment.
      lengths: number of corners of each loop.
    """

    vertices: Float64[np.ndarray, "v 2"]
    lengths: Int[np.ndarray, " loops"]


@runtime_checkable
class PlanarSet(Protocol):
    """A compact set A in the plane whose Minkowski averages can be measured and drawn."""

    def distance_to_hull(self, n: int, tolerance: float = 1e-6) -> Measured:
        """rho(n), to `tolerance` circumradii over n where the method can choose.  Raises SetError if n is too large."""
        ...

    def shape(self, n: int) -> Shape:
        """A_n, to be drawn."""
        ...

    def hull(self) -> Float64[np.ndarray, "k 2"]:
        """Corners of conv A, counter-clockwise (arcs as polygons with corners on them)."""
        ...

    def radii(self) -> Radii:
        """For the Shapley-Folkman-Starr bound."""
        ...


class Bounds(NamedTuple):
    """The two forms of the bound on rho(n); see the head of the package."""

    shapley_folkman: float
    starr: float


def bounds(radii: Radii, n: int) -> Bounds:
    """The Shapley-Folkman bound (with the circumradius) and Starr's (with the inner radius) for n copies."""
    factor = math.sqrt(min(checked_copies(n), 2)) / n
    return Bounds(factor * radii.circumradius, factor * radii.inner_radius)


def checked_copies(n: SupportsIndex) -> int:
    try:
        count = 0 if isinstance(n, bool | np.bool_) else operator.index(n)
    except TypeError:
        count = 0
    if count < 1:
        raise SetError(f"number of copies n={n!r}: give a whole number of at least 1.")
    return count


def checked_points(points: object, what: str) -> Float64[np.ndarray, "k 2"]:
    try:
        array = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError):
        raise SetError(f"{what}: give pairs of numbers, got {points!r:.60}.") from None
    if array.ndim != 2 or array.shape[1] != 2 or len(array) == 0 or not np.isfinite(array).all():
        raise SetError(f"{what}: give finite coordinates of shape [k, 2] with k >= 1, got shape {array.shape}.")
    return array
