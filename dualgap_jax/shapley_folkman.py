"""The Shapley-Folkman lemma in the plane, measured (Section 4 (a) and Figure 3).

For a compact set A the Minkowski average of n copies is `A_n = {(a_1 + ... + a_n) / n : a_j in A}`.  Its convex hull is
conv A for every n, and it approaches that hull.  The non-convexity measured here is the Hausdorff distance

    rho(n) = d_H(A_n, conv A) = max over x in conv A of dist(x, A_n).

The bound drawn beside it is the Shapley-Folkman theorem and Starr's refinement of it (R. M. Starr, "Quasi-equilibria in
markets with non-convex preferences", Econometrica 37 (1969), Appendix 2), divided by n, for n copies in dimension 2:

    rho(n) <= sqrt(min(n, 2)) / n * rad(A)    (circumradius: smallest disc around A),
    rho(n) <= sqrt(min(n, 2)) / n * r(A)      (inner radius: the largest, over x in conv A, of the least circumradius of
                                               a subset of A whose hull holds x).

Three kinds of sets, each with its own method; every result is a `Measured` that brackets the true number.

| kind | what A is | A_n | rho(n) |
|---|---|---|---|
| `LpBall` | `|x|^p + |y|^p <= radius^p` | boundary in closed form | closed form in n |
| `Pieces` | finite union of points, discs, segments, convex polygons | exact union of sums | branch and bound |
| `Raster` | sampled points, or an implicit set | lattice sums by FFT | distance transform, stated error |

Host code: NumPy and SciPy in float64.  The work is set algebra on small arrays, k-d trees, Qhull and distance
transforms, for which those are the better tools.  Errors are proven up to float64 rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float64, Int
from scipy import fft, ndimage
from scipy.spatial import Delaunay, QhullError, cKDTree

from dualgap_jax import seeds
from dualgap_jax.registry import Table

MAX_SUMS = 1_000_000  # sums of points, which a k-d tree searches
MAX_CORNERS = 200_000  # corners of all other sums, which are searched one by one
_CELLS = 20_000  # branch and bound gives up its tolerance, and says so, rather than split more cells than this
_ARC = 64  # points on a circle where a disc stands for its boundary
_SQRT2 = math.sqrt(2.0)

Coordinates = Sequence[Any] | np.ndarray  # numbers x, y, or a list of such pairs


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
    """What the Shapley-Folkman-Starr bound needs: upper bounds on both radii, and an additive allowance.

    Attributes:
      circumradius: at least rad of the set, or of a subset with the same hull up to `slack`.
      inner_radius: at least r of the same; never above `circumradius`.
      slack: 0, or how far the hull of the subset may lie from that of the set.
    """

    circumradius: float
    inner_radius: float
    slack: float = 0.0


class Shape(NamedTuple):
    """What to draw of an average.

    Attributes:
      vertices: corners of all loops one after another, `[v, 2]`.  The set is the union of what the loops enclose; a
        loop of one corner is a point, of two a segment.
      lengths: number of corners of each loop.
      mask: for a raster, which lattice points belong to the average; None otherwise, and then there are no loops.
      xs, ys: coordinates of the columns and rows of `mask`.
    """

    vertices: Float64[np.ndarray, "v 2"]
    lengths: Int[np.ndarray, " loops"]
    mask: Bool[np.ndarray, "ny nx"] | None = None
    xs: Float64[np.ndarray, " nx"] | None = None
    ys: Float64[np.ndarray, " ny"] | None = None


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
    """The two forms of the bound on rho(n); see the head of this module."""

    shapley_folkman: float
    starr: float


def bounds(radii: Radii, n: int) -> Bounds:
    """The Shapley-Folkman bound (with the circumradius) and Starr's (with the inner radius) for n copies."""
    factor = math.sqrt(min(_copies(n), 2)) / n
    return Bounds(factor * radii.circumradius + radii.slack, factor * radii.inner_radius + radii.slack)


def _copies(n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise SetError(f"number of copies n={n!r}: give a whole number of at least 1.")
    return n


def _points(points: object, what: str) -> Float64[np.ndarray, "k 2"]:
    array = np.asarray(points, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != 2 or len(array) == 0 or not np.isfinite(array).all():
        raise SetError(f"{what}: give finite coordinates of shape [k, 2] with k >= 1, got shape {array.shape}.")
    return array


# --- The l_p ball -----------------------------------------------------------------------------------------------------


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
        if self.p < 0.02:
            raise SetError(f"p={self.p} is below 0.02, where float64 no longer resolves the curve; give a larger p.")

    def distance_to_hull(self, n: int, tolerance: float = 1e-6) -> Measured:
        """rho(n) = rho(1) / n: in closed form for p = 1/2 and p >= 1, else enclosed to about 1e-12 radius."""
        scale = self.radius / _copies(n)
        if self.p >= 1:
            return Measured(0.0, 0.0, "exact")
        if self.p == 0.5:
            return Measured(_SQRT2 / 4 * scale, 0.0, "exact")
        gap = _distance_to_lp_curve(self.p)
        return Measured(gap.value * scale, gap.error * scale, "bounded")

    def shape(self, n: int) -> Shape:
        """The boundary, with corners on it."""
        copies = 1 if self.p >= 1 else _copies(n)
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
        chord = _distance_to_segments(middle[None], a, b)[0]
        lower = min(float(chord.min()), upper)
        if upper - lower < 1e-13:
            break
        keep = chord < upper
        low, high = low[keep], high[keep]
        halves = (low + high) / 2
        low, high = np.concatenate([low, halves]), np.concatenate([halves, high])
    return Measured.between(lower, upper)


# --- Finite unions of convex pieces -----------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A convex polygon widened by a disc: point, segment or polygon for `radius` 0; a disc for one corner.

    Attributes:
      corners: `[v, 2]`, counter-clockwise; see `disc`, `point`, `segment`, `polygon`.
      radius: at least 0.
    """

    corners: Float64[np.ndarray, "v 2"]
    radius: float


def disc(center: Coordinates, radius: float) -> Piece:
    """The closed disc."""
    return _piece([center], radius)


def point(at: Coordinates) -> Piece:
    """The set of one point."""
    return _piece([at], 0.0)


def segment(start: Coordinates, end: Coordinates, radius: float = 0.0) -> Piece:
    """The segment; a capsule for a positive radius."""
    return _piece([start, end], radius)


def polygon(corners: Coordinates, radius: float = 0.0) -> Piece:
    """The convex hull of the corners, widened by `radius`."""
    return _piece(corners, radius)


def _piece(corners: Any, radius: float) -> Piece:
    if not (math.isfinite(radius) and radius >= 0):
        raise SetError(f"radius={radius} of a piece must be finite and not negative.")
    return Piece(convex_hull(_points(corners, "corners of a piece")), float(radius))


def parse_piece(text: str) -> Piece:
    """Reads 'point x y', 'disc x y r', 'segment x y x y', or 'polygon x y x y x y ...'.

    Raises:
      SetError: for anything else.
    """
    words = text.split()
    try:
        numbers = [float(word) for word in words[1:]]
    except ValueError:
        numbers = []
    pairs = [numbers[i : i + 2] for i in range(0, len(numbers) - 1, 2)]
    match words[:1], len(numbers):
        case ["point"], 2:
            return point(numbers)
        case ["disc"], 3:
            return disc(numbers[:2], numbers[2])
        case ["segment"], 4:
            return segment(pairs[0], pairs[1])
        case ["polygon"], k if k >= 6 and k % 2 == 0:
            return polygon(pairs)
    raise SetError(
        f"piece {text!r}: write 'point x y', 'disc x y radius', 'segment x y x y' or 'polygon x y x y x y ...'."
    )


class Pieces:
    """A finite union of convex pieces.

    The sum of n copies of a convex K is nK, so A_n is the union, over all ways to take n pieces with repetition, of the
    convex sets `sum_j (n_j / n) K_j`: binomial(n + m - 1, m - 1) of them for m pieces.  rho(n) is found by branch and
    bound over squares that cover the hull: the distance is 1-Lipschitz, so its value at the centre's projection on the
    hull, plus half the diagonal, bounds it over the square.

    Args:
      pieces: at least one.

    Raises:
      SetError: when there is none.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        if not pieces:
            raise SetError("a union needs at least one piece.")
        self.pieces = tuple(pieces)
        corners = np.concatenate([piece.corners for piece in pieces])
        self._origin = (corners.min(axis=0) + corners.max(axis=0)) / 2  # sums are formed about it, against cancellation
        # The edges of all pieces in the order of their directions, which is the order around every sum.
        owners, edges, starts = [], [], []
        for index, piece in enumerate(pieces):
            local = piece.corners - self._origin
            turn = np.lexsort((local[:, 0], local[:, 1]))[0]  # the lowest corner, the left one of two: angles from 0 up
            local = np.roll(local, -turn, axis=0)
            starts.append(local[0])
            if len(local) > 1:
                edges.append(np.roll(local, -1, axis=0) - local)
                owners += [index] * len(local)
        self._starts = np.asarray(starts)
        self._edges = np.concatenate(edges) if edges else np.zeros((0, 2))
        angles = np.arctan2(self._edges[:, 1], self._edges[:, 0]) % (2 * math.pi)
        order = np.argsort(angles, kind="stable")
        self._edges, self._owners = self._edges[order], np.asarray(owners, dtype=np.int64)[order]
        self._radii = np.asarray([piece.radius for piece in pieces])

    def sums(self, n: int) -> tuple[Float64[np.ndarray, "sums v 2"], Float64[np.ndarray, " sums"]]:
        """The convex sets whose union is A_n: corners (some repeated), counter-clockwise, and radii.

        Raises:
          SetError: if there are more than `MAX_SUMS` points, or `MAX_CORNERS` corners of larger pieces.
        """
        m = len(self.pieces)
        number = math.comb(_copies(n) + m - 1, m - 1)
        corners = number * max(1, len(self._edges))
        limit = MAX_SUMS if self._only_a_tree else MAX_CORNERS
        if corners > limit:
            raise SetError(
                f"{m} pieces and n={n} copies make {number:,} sums with {corners:,} corners, above the limit of"
                f" {limit:,}; give fewer pieces or copies, or sample the set and use Raster."
            )
        shares = _multisets(m, n) / n
        vertices = (shares @ self._starts + self._origin)[:, None]
        if len(self._edges):
            steps = shares[:, self._owners, None] * self._edges
            around = np.cumsum(steps, axis=1)
            around[:, -1] = 0  # the loop closes exactly: rounding would leave a tiny edge of any direction
            vertices = vertices + around
        return vertices, shares @ self._radii

    @property
    def _only_a_tree(self) -> bool:
        """Whether a k-d tree of the sums gives the distance: all pieces are discs of one radius, or points."""
        return len(self._edges) == 0 and bool(np.ptp(self._radii) == 0)

    def signed_distance(self, n: int) -> Callable[[Float[np.ndarray, "k 2"]], Float64[np.ndarray, " k"]]:
        """The function `x [k, 2] -> dist(x, A_n)`; inside, minus a lower bound on the depth.  1-Lipschitz."""
        vertices, radii = self.sums(n)
        if self._only_a_tree:
            tree = cKDTree(vertices[:, 0])
            return lambda x: tree.query(x)[0] - radii[0]

        def evaluate(x: Float[np.ndarray, "k 2"]) -> Float64[np.ndarray, " k"]:
            size = max(1, 2_000_000 // vertices[:, :, 0].size)
            parts = [x[i : i + size] for i in range(0, max(len(x), 1), size)]
            return np.concatenate([np.min(_signed_distance(part, vertices) - radii, axis=1) for part in parts])

        return evaluate

    def distance_to_hull(self, n: int, tolerance: float = 1e-6) -> Measured:
        """rho(n), enclosed to `tolerance` circumradii over n, or as well as 20,000 squares at a time allow."""
        if not tolerance > 0:
            raise SetError(f"tolerance={tolerance} must be positive.")
        _copies(n)
        if len(self.pieces) == 1:
            return Measured(0.0, 0.0, "exact")
        target = tolerance * max(self.radii().circumradius, 1e-300) / _copies(n)
        # The hull polygon leaves out slivers of single discs only, and every piece is a subset of A_n.
        return _largest(self.signed_distance(n), self.hull(), target)

    def shape(self, n: int) -> Shape:
        """The sums as loops, with circles as polygons that lie inside, 64 corners a turn."""
        vertices, radii = self.sums(n)
        loops = [_widened(v, r) for v, r in zip(vertices, radii, strict=True)]
        return Shape(np.concatenate(loops), np.asarray([len(loop) for loop in loops]))

    def hull(self) -> Float64[np.ndarray, "k 2"]:
        """Corners of the hull; what it lacks are slivers between chords and arcs of single discs."""
        return convex_hull(self._boundary())

    def radii(self) -> Radii:
        """The circumradius up to 0.12 % of a disc's radius; the inner radius exactly for points, bounded above else."""
        return self._computed_radii

    @functools.cached_property
    def _computed_radii(self) -> Radii:
        center, _ = smallest_circle(self.hull())
        reach = [np.linalg.norm(p.corners - center, axis=1).max() + p.radius for p in self.pieces]
        samples = [self._boundary()]
        for piece in self.pieces:
            ends = np.roll(piece.corners, -1, axis=0)
            t = np.linspace(0, 1, _ARC)[:, None, None]
            samples.append(((1 - t) * piece.corners + t * ends).reshape(-1, 2) if len(ends) > 1 else piece.corners)
        points = np.unique(np.concatenate(samples), axis=0)
        rounding = 1e-12 * (1 + float(np.abs(points).max()))
        members = np.stack(
            [_signed_distance(points, p.corners[None])[:, 0] <= p.radius + rounding for p in self.pieces], axis=1
        )
        circumradius = float(max(reach))
        return Radii(circumradius, min(inner_radius(points, members), circumradius))

    def _boundary(self) -> Float64[np.ndarray, "k 2"]:
        """Points of A with the same hull, up to slivers of single discs: corners, circles, where tangents touch."""
        centers = np.concatenate([piece.corners for piece in self.pieces])
        radii = np.repeat(self._radii, [len(piece.corners) for piece in self.pieces])
        found = [centers[radii == 0]]
        turn = np.linspace(0, 2 * math.pi, _ARC, endpoint=False)
        for center, radius in zip(centers, radii, strict=True):
            if radius == 0:
                continue
            across = centers - center
            apart = np.linalg.norm(across, axis=1)
            reachable = apart > np.abs(radius - radii)
            # A line with unit normal u touches both discs from one side when u . across = radius - radii.
            opening = np.arccos((radius - radii[reachable]) / apart[reachable])
            toward = np.arctan2(across[reachable, 1], across[reachable, 0])
            angle = np.concatenate([turn, toward + opening, toward - opening])
            found.append(center + radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1))
        return np.concatenate(found)


def _multisets(m: int, n: int) -> Int[np.ndarray, "sums m"]:
    """All ways to write n as an ordered sum of m whole numbers."""
    bars = list(itertools.combinations(range(n + m - 1), m - 1))
    places = np.asarray(bars, dtype=np.int64).reshape(len(bars), m - 1)
    edge = np.full((len(bars), 1), -1), np.full((len(bars), 1), n + m - 1)
    return np.diff(np.concatenate([edge[0], places, edge[1]], axis=1), axis=1) - 1


def _widened(corners: Float64[np.ndarray, "v 2"], radius: float) -> Float64[np.ndarray, "k 2"]:
    """The loop of one convex sum without its repeated corners, widened by a polygon for the disc."""
    if radius > 0:
        angle = np.linspace(0, 2 * math.pi, _ARC, endpoint=False)
        circle = radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        corners = (corners[:, None] + circle).reshape(-1, 2)
    return convex_hull(corners)


# --- Sampled and implicit sets ----------------------------------------------------------------------------------------


class _Sum(NamedTuple):
    """A lattice sum: its points `spacing * (origin + index)`, and how far any may have moved."""

    mask: Bool[np.ndarray, "ny nx"]
    origin: tuple[int, int]
    spacing: float
    moved: float


class _LatticeSums:
    """Sums of n copies of a set of lattice points `spacing * index`, each already `moved` from where it belongs.

    A sum with more than `limit` points along a side is moved to a lattice twice as coarse.
    """

    def __init__(self, index: Int[np.ndarray, "k 2"], spacing: float, moved: float, limit: int) -> None:
        low = index.min(axis=0)
        mask = np.zeros((index.max(axis=0) - low + 1)[::-1], dtype=bool)
        mask[index[:, 1] - low[1], index[:, 0] - low[0]] = True
        self._limit = limit
        self._known = {1: _Sum(mask, (int(low[1]), int(low[0])), spacing, moved)}

    def of(self, n: int) -> _Sum:
        """The sum of n copies, from two sums of half as many: alike in size, they lie on lattices about as fine."""
        if n not in self._known:
            self._known[n] = self._add(self.of(n // 2), self.of(n - n // 2))
        return self._known[n]

    def _add(self, a: _Sum, b: _Sum) -> _Sum:
        while a.spacing < 0.75 * b.spacing:
            a = _coarser(a)
        while b.spacing < 0.75 * a.spacing:
            b = _coarser(b)
        rows, columns = (i + j - 1 for i, j in zip(a.mask.shape, b.mask.shape, strict=True))
        size = [fft.next_fast_len(length, real=True) for length in (rows, columns)]
        # Counts are at most the points of one mask; float64 transforms resolve 1/2 among them with a wide margin.
        first = fft.rfft2(a.mask.astype(np.float64), size, workers=-1)
        second = first if b is a else fft.rfft2(b.mask.astype(np.float64), size, workers=-1)
        counts = fft.irfft2(first * second, size, workers=-1, overwrite_x=True)[:rows, :columns]
        origin = a.origin[0] + b.origin[0], a.origin[1] + b.origin[1]
        total = _Sum(counts > 0.5, origin, a.spacing, a.moved + b.moved)
        while max(total.mask.shape) > self._limit:
            total = _coarser(total)
        return total

    def farthest(self, n: int, hull: Float64[np.ndarray, "k 2"]) -> tuple[float, float]:
        """Bounds on the largest distance from a convex polygon to the sum of n copies before anything moved."""
        total = self.of(n)
        s = total.spacing
        # Pad so that every lattice cell that meets the polygon is in the array.
        first = np.floor(hull.min(axis=0) / s)[::-1].astype(int) - 1
        last = np.ceil(hull.max(axis=0) / s)[::-1].astype(int) + 1
        end = np.asarray(total.origin) + total.mask.shape
        before, after = np.maximum(np.asarray(total.origin) - first, 0), np.maximum(last + 1 - end, 0)
        mask = np.pad(total.mask, list(zip(before, after, strict=True)))
        away = ndimage.distance_transform_edt(~mask) * s
        row, column = (np.asarray(total.origin) - before).tolist()
        ys, xs = s * (row + np.arange(mask.shape[0])), s * (column + np.arange(mask.shape[1]))
        inside, met = (_cells_in(hull, xs, ys, half) for half in (0.0, s / 2))
        lower = float(away[inside].max(initial=0.0))
        upper = float(away[met].max(initial=0.0)) + s / _SQRT2  # from a point to the middle of its cell
        return lower - total.moved, upper + total.moved


class Raster:
    """A set A between two finite ones: `inner`, points of A, and `outer`, which reaches all of A within `cover`.

    Averages keep that relation: those of `inner` lie in A_n, and A_n lies within `cover` of those of `outer`; likewise
    the hulls.  So, with distances to the averages of the finite sets,

        rho(n) >= max over x in conv(inner) of dist(x, outer_n) - cover,
        rho(n) <= max over x in conv(outer) of dist(x, inner_n) + cover.

    Averages are formed on a lattice, where sums are exact (convolution of masks by FFT, halves added); a sum that
    outgrows twice the resolution is moved to a lattice twice as coarse, and the bounds are widened by how far points of
    the average may have moved in all.

    This error does not fall with n as rho does: where the relative error matters, use few copies or another kind of
    set.  For a set known through samples, `inner` and `outer` are the samples; see `implicit` for the other case.

    Args:
      points: `[k, 2]`, points of the set.
      cover: every point of the set is at most this far from one of the points.  0: the set is the points.
      resolution: lattice points along the longer side.

    Raises:
      SetError: for points that are not finite, a cover that is negative, or a resolution below 8.
    """

    def __init__(self, points: Float[np.ndarray, "k 2"], cover: float = 0.0, resolution: int = 512) -> None:
        points = _points(points, "points of a sampled set")
        _check_resolution(resolution)
        if not (math.isfinite(cover) and cover >= 0):
            raise SetError(f"cover={cover} must be finite and not negative.")
        center = (points.min(axis=0) + points.max(axis=0)) / 2
        local = points - center
        spacing = max(2 * float(np.abs(local).max()) / (resolution - 1), 1e-300)
        index = np.rint(local / spacing).astype(np.int64)
        sums = _LatticeSums(index, spacing, spacing / _SQRT2, 2 * resolution + 2)  # two copies fit, rounded outward
        hull = convex_hull(local)
        self._keep(center, local, sums, sums, hull, hull, float(cover))

    @classmethod
    def implicit(
        cls,
        contains: Callable[[Float[np.ndarray, "k 2"]], Bool[np.ndarray, " k"]],
        touches: Callable[[Float[np.ndarray, "k 2"], Float[np.ndarray, "k 2"]], Bool[np.ndarray, " k"]],
        low: Coordinates,
        high: Coordinates,
        resolution: int = 512,
    ) -> Raster:
        """A set given by two tests: `inner` are the lattice points in it, `outer` those whose cell may touch it.

        Args:
          contains: `x [k, 2] -> [k]`, whether x lies in the set.
          touches: `(low [k, 2], high [k, 2]) -> [k]`, False only where the closed box misses the set.  For a set
            `{g <= 0}` with a Lipschitz constant see `level_set`.
          low, high: corners of a box that holds the set.
          resolution: lattice points along the longer side of the box.

        Raises:
          SetError: when no lattice point lies in the set (it is too thin for this resolution).
        """
        _check_resolution(resolution)
        corners = _points([low, high], "corners of the box")
        if not (corners[1] > corners[0]).all():
            raise SetError(f"the box from {corners[0]} to {corners[1]} is empty; give low < high in both coordinates.")
        center = corners.mean(axis=0)
        spacing = float((corners[1] - corners[0]).max()) / (resolution - 1)
        reach = np.ceil((corners[1] - center) / spacing).astype(int)
        steps = [np.arange(-r, r + 1) for r in reach]
        index = np.stack(np.meshgrid(steps[0], steps[1]), axis=-1).reshape(-1, 2)
        at, half = center + spacing * index, spacing / 2
        inside = np.asarray(contains(at), dtype=bool)
        if not inside.any():
            raise SetError(
                f"no point of the {resolution}-point lattice lies in the set; raise the resolution, or sample a thin"
                " set (Raster) or give it as Pieces."
            )
        touched = np.asarray(touches(at - half, at + half), dtype=bool) | inside
        limit = 2 * resolution + 2
        inner, outer = (_LatticeSums(index[chosen], spacing, 0.0, limit) for chosen in (inside, touched))
        hulls = [convex_hull(spacing * index[chosen]) for chosen in (inside, touched)]
        self = cls.__new__(cls)
        self._keep(center, spacing * index[inside], inner, outer, hulls[0], hulls[1], spacing / _SQRT2)
        return self

    def _keep(
        self,
        center: Float64[np.ndarray, " 2"],
        points: Float64[np.ndarray, "k 2"],
        inner: _LatticeSums,
        outer: _LatticeSums,
        inner_hull: Float64[np.ndarray, "a 2"],
        outer_hull: Float64[np.ndarray, "b 2"],
        cover: float,
    ) -> None:
        """Coordinates are relative to `center`; `points` are those of `inner`."""
        self._center, self._inner, self._outer, self.cover = center, inner, outer, cover
        self._inner_hull, self._outer_hull = inner_hull, outer_hull
        thin = np.unique(np.concatenate([inner_hull, points[:: max(1, len(points) // 4000)]]), axis=0)
        _, circumradius = smallest_circle(inner_hull)
        apart = np.linalg.norm(outer_hull - _projected(outer_hull, inner_hull), axis=1)
        self._radii = Radii(circumradius, min(inner_radius(thin), circumradius), cover + float(apart.max()))

    def distance_to_hull(self, n: int, tolerance: float = 1e-6) -> Measured:
        """rho(n) with the error of the lattice, which `tolerance` does not change."""
        lower, _ = self._outer.farthest(_copies(n), n * self._inner_hull)
        _, upper = self._inner.farthest(n, n * self._outer_hull)
        return Measured.between(lower / n - self.cover, upper / n + self.cover)

    def shape(self, n: int) -> Shape:
        """The average of the inner points, thinned to at most about 800 along a side for drawing."""
        total = self._inner.of(_copies(n))
        step = max(1, max(total.mask.shape) // 800)
        mask = np.pad(total.mask, [(0, -size % step) for size in total.mask.shape])
        ny, nx = (size // step for size in mask.shape)
        mask = np.asarray(mask.reshape(ny, step, nx, step).any(axis=(1, 3)))
        shift = (step - 1) / 2
        ys, xs = (
            total.spacing / n * (start + shift + step * np.arange(size)) + middle
            for start, size, middle in zip(total.origin, mask.shape, self._center[::-1], strict=True)
        )
        return Shape(np.zeros((0, 2)), np.zeros(0, dtype=np.int64), mask, xs, ys)

    def hull(self) -> Float64[np.ndarray, "k 2"]:
        """The hull of the inner points; that of the set is at most the slack of `radii` away."""
        return self._inner_hull + self._center

    def radii(self) -> Radii:
        """Of some of the inner points, with the hull of all; the slack is how far that may lie from conv A."""
        return self._radii


def _check_resolution(resolution: int) -> None:
    if resolution < 8:
        raise SetError(f"resolution={resolution} must be at least 8 lattice points.")


def level_set(
    g: Callable[[Float[np.ndarray, "k 2"]], Float[np.ndarray, " k"]],
    lipschitz: float,
    low: Coordinates,
    high: Coordinates,
    resolution: int = 512,
) -> Raster:
    """The set `{x : g(x) <= 0}` in the box from `low` to `high`, which must hold it.

    Args:
      g: `x [k, 2] -> [k]`.
      lipschitz: a number L with `|g(x) - g(y)| <= L |x - y|`.  The error bound rests on it.
      low, high, resolution: as in `Raster.implicit`.

    Raises:
      SetError: see `Raster.implicit`.
    """
    if not (lipschitz > 0 and math.isfinite(lipschitz)):
        raise SetError(f"lipschitz={lipschitz} must be positive and finite.")

    def touches(a: Float[np.ndarray, "k 2"], b: Float[np.ndarray, "k 2"]) -> Bool[np.ndarray, " k"]:
        return g((a + b) / 2) <= lipschitz * np.linalg.norm(b - a, axis=-1) / 2

    return Raster.implicit(lambda x: g(x) <= 0, touches, low, high, resolution)


def _coarser(total: _Sum) -> _Sum:
    """The sum on a lattice twice as coarse; odd indices move by one, alternately up and down."""
    new = [
        np.rint((start + np.arange(size)) / 2).astype(int)
        for start, size in zip(total.origin, total.mask.shape, strict=True)
    ]
    origin = int(new[0][0]), int(new[1][0])
    mask = np.zeros((new[0][-1] - origin[0] + 1, new[1][-1] - origin[1] + 1), dtype=bool)
    rows, columns = np.nonzero(total.mask)
    mask[new[0][rows] - origin[0], new[1][columns] - origin[1]] = True
    return total._replace(
        mask=mask, origin=origin, spacing=2 * total.spacing, moved=total.moved + _SQRT2 * total.spacing
    )


def _cells_in(
    hull: Float64[np.ndarray, "k 2"], xs: Float64[np.ndarray, " nx"], ys: Float64[np.ndarray, " ny"], half: float
) -> Bool[np.ndarray, "ny nx"]:
    """Which squares of half side `half` around the points of a lattice meet the convex polygon."""
    start, end = hull, np.roll(hull, -1, axis=0)
    rise = end[:, 1] - start[:, 1]
    # Where each edge runs inside the band around a row: an interval of its parameter.
    with np.errstate(divide="ignore", invalid="ignore"):
        enter = (ys[:, None] - half - start[:, 1]) / rise
        leave = (ys[:, None] + half - start[:, 1]) / rise
    flat = rise == 0
    near = np.abs(ys[:, None] - start[:, 1]) <= half
    enter, leave = (np.where(flat, np.where(near, v, 2.0 - 3.0 * v), side) for v, side in ((0.0, enter), (1.0, leave)))
    first = np.clip(np.minimum(enter, leave), 0, 1)
    last = np.clip(np.maximum(enter, leave), 0, 1)
    meets = (np.minimum(enter, leave) <= 1) & (np.maximum(enter, leave) >= 0) & ~(flat & ~near)
    run = end[:, 0] - start[:, 0]
    at = np.stack([start[:, 0] + first * run, start[:, 0] + last * run])
    low = np.where(meets, at.min(axis=0), np.inf).min(axis=1)
    high = np.where(meets, at.max(axis=0), -np.inf).max(axis=1)
    return (xs >= low[:, None] - half) & (xs <= high[:, None] + half)


# --- Geometry ---------------------------------------------------------------------------------------------------------


def convex_hull(points: Float[np.ndarray, "k 2"]) -> Float64[np.ndarray, "corners 2"]:
    """Corners of the convex hull, counter-clockwise (Andrew's monotone chain); one or two when it has no interior."""
    points = np.unique(_points(points, "points"), axis=0)
    if len(points) <= 2:
        return points
    # Of the points with one x only the lowest and the highest can be corners.
    first = np.flatnonzero(np.diff(points[:, 0], prepend=-np.inf))
    ends = np.unique(np.concatenate([first, np.append(first[1:] - 1, len(points) - 1)]))
    rows = points[ends].tolist()

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

    corners = np.asarray(chain(rows) + chain(rows[::-1]))
    return corners


def smallest_circle(points: Float[np.ndarray, "k 2"]) -> tuple[Float64[np.ndarray, " 2"], float]:
    """Centre and radius of the smallest circle around the points (Welzl's algorithm, in random order).

    The radius is the largest distance from the centre, so that rounding cannot leave a point outside.
    """
    points = _points(points, "points")
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
    return center, float(np.linalg.norm(points - center, axis=1).max())


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
    points = _points(points, "points")
    try:
        corners = Delaunay(points).simplices
    except (QhullError, ValueError):  # all on one line, or fewer than three
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
        return float(longest.max())
    a, b = around[:, 1] - around[:, 0], around[:, 2] - around[:, 0]
    area = np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]) / 2
    acute = (sides[:, 2] ** 2 < sides[:, 0] ** 2 + sides[:, 1] ** 2) & (area > 0)
    circumradius = sides.prod(axis=1) / np.where(acute, 4 * area, 1.0)
    return float(np.where(acute, circumradius, longest).max())


def _distance_to_segments(
    x: Float[np.ndarray, "k 2"], a: Float[np.ndarray, "*edges 2"], b: Float[np.ndarray, "*edges 2"]
) -> Float64[np.ndarray, "k *edges"]:
    """Distances of points from segments."""
    along = b - a
    length = np.sum(along * along, axis=-1)
    x = x.reshape(len(x), *(1,) * (a.ndim - 1), 2)
    offset = x - a
    t = np.clip(np.sum(offset * along, axis=-1) / np.where(length > 0, length, 1.0), 0, 1)
    return np.linalg.norm(offset - t[..., None] * along, axis=-1)


def _signed_distance(
    x: Float[np.ndarray, "k 2"], corners: Float[np.ndarray, "polygons v 2"]
) -> Float64[np.ndarray, "k polygons"]:
    """Distances of points from convex polygons (counter-clockwise, corners may repeat); negative inside."""
    ends = np.roll(corners, -1, axis=1)
    away = _distance_to_segments(x, corners, ends).min(axis=-1)
    if corners.shape[1] < 3:
        return away
    edge, offset = ends - corners, x[:, None, None] - corners
    cross = edge[..., 0] * offset[..., 1] - edge[..., 1] * offset[..., 0]
    inside = np.all((cross > 0) | (edge == 0).all(axis=-1), axis=-1) & (edge != 0).any(axis=(1, 2))
    return np.where(inside, -away, away)


def _projected(x: Float[np.ndarray, "k 2"], hull: Float64[np.ndarray, "v 2"]) -> Float64[np.ndarray, "k 2"]:
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


def _largest(
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
        reach = half * _SQRT2
        onto = _projected(centers, hull)
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


# --- The table --------------------------------------------------------------------------------------------------------


def lp_ball(*, p: float = 0.5, radius: float = 1.0) -> LpBall:
    """The l_p ball; p = 1/2 is that of Figure 3."""
    return LpBall(p, radius)


def union(
    *, pieces: tuple[str, ...] = ("disc -0.7 -0.3 0.25", "segment -0.1 0.75 0.45 0.85", "point 0.9 -0.5")
) -> Pieces:
    """Finite union of 'point x y', 'disc x y r', 'segment x y x y', 'polygon x y x y x y ...'."""
    return Pieces([parse_piece(text) for text in pieces])


def random_points(*, count: int = 6, seed: int = 0) -> Pieces:
    """Points drawn uniformly from the unit disc."""
    return random_discs(count=count, radius=0.0, seed=seed)


def random_discs(*, count: int = 4, radius: float = 0.1, seed: int = 0) -> Pieces:
    """Discs of one radius with centres drawn uniformly from the unit disc."""
    if count < 1:
        raise SetError(f"count={count} must be at least 1.")
    rng = seeds.generator(seed)
    size, angle = np.sqrt(rng.uniform(size=count)), rng.uniform(0, 2 * math.pi, size=count)
    centers = np.stack([size * np.cos(angle), size * np.sin(angle)], axis=-1)
    return Pieces([disc(center, radius) for center in centers.tolist()])


def crescent(*, bite: float = 0.8, offset: float = 0.5, resolution: int = 1025) -> Raster:
    """The unit disc without an open disc of radius `bite` around (offset, 0), on a lattice."""
    if not (bite > 0 and math.isfinite(bite) and math.isfinite(offset)):
        raise SetError(f"bite={bite} must be positive, offset={offset} finite.")
    if 1 + abs(offset) <= bite:
        raise SetError(f"bite={bite} at offset={offset} leaves nothing of the unit disc; give a smaller bite.")
    middle = np.asarray([offset, 0.0])

    def contains(x: Float[np.ndarray, "k 2"]) -> Bool[np.ndarray, " k"]:
        return (np.linalg.norm(x, axis=-1) <= 1) & (np.linalg.norm(x - middle, axis=-1) >= bite)

    def touches(low: Float[np.ndarray, "k 2"], high: Float[np.ndarray, "k 2"]) -> Bool[np.ndarray, " k"]:
        nearest = np.linalg.norm(np.maximum(np.maximum(low, -high), 0), axis=-1)
        farthest = np.linalg.norm(np.maximum(np.abs(low - middle), np.abs(high - middle)), axis=-1)
        return (nearest <= 1) & (farthest >= bite)

    return Raster.implicit(contains, touches, (-1.0, -1.0), (1.0, 1.0), resolution)


SETS: Table[Callable[..., PlanarSet]] = Table(
    "planar set",
    {
        "lp_ball": lp_ball,
        "union": union,
        "random_points": random_points,
        "random_discs": random_discs,
        "crescent": crescent,
    },
)
"""Name -> function that makes a `PlanarSet`."""
