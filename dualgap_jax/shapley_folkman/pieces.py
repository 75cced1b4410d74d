"""Finite unions of points, discs, segments and convex polygons, whose averages are finite unions again."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Float, Float64, Int

from dualgap_jax.shapley_folkman.geometry import (
    convex_hull,
    inner_radius,
    largest,
    normalised,
    signed_distance,
    smallest_circle,
)
from dualgap_jax.shapley_folkman.measured import Measured, Radii, SetError, Shape, checked_copies, checked_points

MAX_SUMS = 1_000_000  # sums of points, which a k-d tree searches
MAX_CORNERS = 200_000  # corners of all other sums, which are searched one by one
_ARC = 64  # points on a circle where a disc stands for its boundary

Coordinates = Sequence[Any] | np.ndarray  # numbers x, y, or a list of such pairs


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
    return Piece(convex_hull(checked_points(corners, "corners of a piece")), float(radius))


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
        # All is measured about the middle of the set and in a unit of its size, which costs no digit.
        largest_radius = max(piece.radius for piece in pieces)
        corners, self._origin, self._unit = normalised(np.concatenate([p.corners for p in pieces]), largest_radius)
        ends = np.cumsum([len(piece.corners) for piece in pieces])[:-1]
        self._local = [
            Piece(local, piece.radius / self._unit)
            for local, piece in zip(np.split(corners, ends), pieces, strict=True)
        ]
        # The edges of all pieces in the order of their directions, which is the order around every sum.
        owners, edges, starts = [], [], []
        for index, (local, _) in enumerate(self._local):
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
        self._radii = np.asarray([piece.radius for piece in self._local])

    def sums(self, n: int) -> tuple[Float64[np.ndarray, "sums v 2"], Float64[np.ndarray, " sums"]]:
        """The convex sets whose union is A_n: corners (some repeated), counter-clockwise, and radii.

        Raises:
          SetError: if there are more than `MAX_SUMS` points, or `MAX_CORNERS` corners of larger pieces.
        """
        vertices, radii, _ = self._sums(n)
        return vertices * self._unit + self._origin, radii * self._unit

    def _sums(
        self, n: int
    ) -> tuple[Float64[np.ndarray, "sums v 2"], Float64[np.ndarray, " sums"], Float64[np.ndarray, "sums v 2"]]:
        """The same about the middle of the set and in its unit, and the edges from each corner to the next.

        Raises:
          SetError: if there are more than `MAX_SUMS` points, or `MAX_CORNERS` corners of larger pieces.
        """
        m = len(self.pieces)
        number = math.comb(checked_copies(n) + m - 1, m - 1)
        corners = number * max(1, len(self._edges))
        limit = MAX_SUMS if self._only_a_tree else MAX_CORNERS
        if corners > limit:
            raise SetError(
                f"{m} pieces and n={n} copies make {number:,} sums with {corners:,} corners, above the limit of"
                f" {limit:,}; give fewer pieces or copies."
            )
        shares = _multisets(m, n) / n
        vertices = (shares @ self._starts)[:, None]
        edges = np.zeros_like(vertices)
        if len(self._edges):
            edges = shares[:, self._owners, None] * self._edges
            vertices = vertices + np.pad(np.cumsum(edges, axis=1)[:, :-1], ((0, 0), (1, 0), (0, 0)))
        return vertices, shares @ self._radii, edges

    @property
    def _only_a_tree(self) -> bool:
        """Whether a k-d tree of the sums gives the distance: all pieces are discs of one radius, or points."""
        return len(self._edges) == 0 and bool(np.ptp(self._radii) == 0)

    def signed_distance(self, n: int) -> Callable[[Float[np.ndarray, "k 2"]], Float64[np.ndarray, " k"]]:
        """The function `x [k, 2] -> dist(x, A_n)`; inside, minus a lower bound on the depth.  1-Lipschitz."""
        local = self._signed_distance(n)
        return lambda x: local((x - self._origin) / self._unit) * self._unit

    def _signed_distance(self, n: int) -> Callable[[Float[np.ndarray, "k 2"]], Float64[np.ndarray, " k"]]:
        vertices, radii, edges = self._sums(n)
        if self._only_a_tree:
            tree = scipy.spatial.cKDTree(vertices[:, 0])
            return lambda x: tree.query(x)[0] - radii[0]

        def evaluate(x: Float[np.ndarray, "k 2"]) -> Float64[np.ndarray, " k"]:
            size = max(1, 2_000_000 // vertices[:, :, 0].size)
            parts = [x[i : i + size] for i in range(0, max(len(x), 1), size)]
            return np.concatenate([np.min(signed_distance(part, vertices, edges) - radii, axis=1) for part in parts])

        return evaluate

    def distance_to_hull(self, n: int, tolerance: float = 1e-6) -> Measured:
        """rho(n), enclosed to `tolerance` circumradii over n, or as well as 20,000 squares at a time allow."""
        if not tolerance > 0:
            raise SetError(f"tolerance={tolerance} must be positive.")
        checked_copies(n)
        if len(self.pieces) == 1:
            return Measured(0.0, 0.0, "exact")
        target = tolerance * max(self._local_radii.circumradius, 1e-300) / n
        # The hull polygon leaves out slivers of single discs only, and every piece is a subset of A_n.
        found = largest(self._signed_distance(n), convex_hull(self._boundary()), target)
        return Measured(found.value * self._unit, found.error * self._unit, found.kind)

    def shape(self, n: int) -> Shape:
        """The sums as loops, with circles as polygons that lie inside, 64 corners a turn."""
        vertices, radii, _ = self._sums(n)
        loops = [_widened(v, r) for v, r in zip(vertices, radii, strict=True)]
        return Shape(np.concatenate(loops) * self._unit + self._origin, np.asarray([len(loop) for loop in loops]))

    def hull(self) -> Float64[np.ndarray, "k 2"]:
        """Corners of the hull; what it lacks are slivers between chords and arcs of single discs."""
        return convex_hull(self._boundary()) * self._unit + self._origin

    def radii(self) -> Radii:
        """The circumradius up to 0.12 % of a disc's radius; the inner radius exactly for points, bounded above else."""
        return Radii(*(radius * self._unit for radius in self._local_radii))

    @functools.cached_property
    def _local_radii(self) -> Radii:
        center, _ = smallest_circle(convex_hull(self._boundary()))
        reach = [np.linalg.norm(p.corners - center, axis=1).max() + p.radius for p in self._local]
        samples = [self._boundary()]
        for piece in self._local:
            ends = np.roll(piece.corners, -1, axis=0)
            t = np.linspace(0, 1, _ARC)[:, None, None]
            samples.append(((1 - t) * piece.corners + t * ends).reshape(-1, 2) if len(ends) > 1 else piece.corners)
        points = np.unique(np.concatenate(samples), axis=0)
        members = np.stack(
            [signed_distance(points, p.corners[None])[:, 0] <= p.radius + 1e-12 for p in self._local], axis=1
        )
        circumradius = float(max(reach))
        return Radii(circumradius, min(inner_radius(points, members), circumradius))

    def _boundary(self) -> Float64[np.ndarray, "k 2"]:
        """Points of A with the same hull, up to slivers of single discs: corners, circles, where tangents touch.

        About the middle of the set and in its unit.
        """
        centers = np.concatenate([piece.corners for piece in self._local])
        radii = np.repeat(self._radii, [len(piece.corners) for piece in self._local])
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
