"""Minkowski averages in the plane against closed forms, brute force and the definitions; Figure 3 end to end."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.spatial import ConvexHull, Voronoi, cKDTree

from dualgap_jax import config as config_lib
from dualgap_jax import experiments, figures
from dualgap_jax import shapley_folkman as sf
from dualgap_jax.config import Component, ConfigError, experiment_config
from dualgap_jax.experiments import TABLES
from dualgap_jax.experiments.shapley_folkman import ShapleyFolkmanSpec, decay_exponent
from dualgap_jax.files import load_json, load_npz, save_npz
from dualgap_jax.registry import SettingError, UnknownNameError
from dualgap_jax.shapley_folkman import measured

ROOT = Path(__file__).resolve().parents[1]
SEEDS = range(4)
ROUNDING = 1e-11


def holds(measured: sf.Measured, truth: float, rounding: float = ROUNDING) -> bool:
    return abs(measured.value - truth) <= measured.error + rounding


def points_set(points: np.ndarray) -> sf.Pieces:
    return sf.Pieces([sf.point(p) for p in points.tolist()])


def random_pieces(rng: np.random.Generator) -> sf.Pieces:
    """A disc, a capsule, a polygon and a point, anywhere."""
    at = rng.normal(size=(4, 2))
    return sf.Pieces(
        [
            sf.disc(at[0].tolist(), float(rng.uniform(0.05, 0.5))),
            sf.segment(at[1].tolist(), (at[1] + rng.normal(size=2)).tolist(), float(rng.uniform(0, 0.2))),
            sf.polygon((at[2] + 0.6 * rng.normal(size=(5, 2))).tolist()),
            sf.point(at[3].tolist()),
        ]
    )


def all_sums(points: np.ndarray, n: int) -> np.ndarray:
    """Every average of n points, by the definition."""
    return np.asarray([np.mean(c, axis=0) for c in itertools.combinations_with_replacement(points, n)])


def edges_of(hull: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(hull, np.roll(hull, -1, axis=0), strict=True))


def in_hull(x: np.ndarray, hull: np.ndarray, slack: float = 1e-9) -> np.ndarray:
    inside = np.ones(len(x), dtype=bool)
    for a, b in edges_of(hull):
        inside &= (b - a)[0] * (x - a)[:, 1] - (b - a)[1] * (x - a)[:, 0] >= -slack
    return inside


def farthest_in_hull(points: np.ndarray) -> float:
    """The largest distance from a finite set in its hull: at Voronoi vertices, or where bisectors cut edges."""
    hull = points[ConvexHull(points).vertices]
    candidates = [Voronoi(points).vertices]
    for a, b in edges_of(hull):
        for p, q in itertools.combinations(points, 2):
            slope = 2 * (b - a) @ (q - p)
            if abs(slope) > 1e-12:
                t = (q @ q - p @ p - 2 * a @ (q - p)) / slope
                if 0 <= t <= 1:
                    candidates.append((a + t * (b - a))[None])
    x = np.concatenate(candidates)
    return float(cKDTree(points).query(x[in_hull(x, hull)])[0].max())


# --- The l_p ball -----------------------------------------------------------------------------------------------------


def boundary_samples(p: float, count: int) -> np.ndarray:
    """Points of the unit l_p sphere by angle, all quadrants, tips included."""
    angle = np.linspace(0, 2 * np.pi, 4 * count, endpoint=False)
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return x / np.sum(np.abs(x) ** p, axis=1, keepdims=True) ** (1 / p)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000])
def test_the_half_ball_in_closed_form(n: int) -> None:
    assert sf.LpBall(0.5).distance_to_hull(n) == (pytest.approx(math.sqrt(2) / 4 / n, rel=1e-15), 0.0, "exact")
    assert sf.LpBall(0.5, 3.0).distance_to_hull(n).value == pytest.approx(3 * math.sqrt(2) / 4 / n, rel=1e-15)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.7, 0.95])
def test_distance_of_the_ball_by_brute_force(p: float) -> None:
    """Every point of the hull, on a grid, against many points of the boundary."""
    t = np.linspace(0, 1, 81)
    x = np.stack(np.meshgrid(t, t), axis=-1).reshape(-1, 2)
    # Between the curve and the hull: what lies in the set itself is at distance 0.
    x = x[(x.sum(axis=1) <= 1 + 1e-12) & (np.sum(x**p, axis=1) >= 1)]
    s = np.linspace(0, 1, 50_001)
    curve = np.stack([s ** (1 / p), (1 - s) ** (1 / p)], axis=1)
    brute = cKDTree(curve).query(x)[0].max()
    measured = sf.LpBall(p).distance_to_hull(1)
    assert measured.error < 1e-11
    assert measured.value == pytest.approx(brute, abs=1e-4 * brute)  # the grid holds the midpoint (1/2, 1/2)


def test_the_enclosure_agrees_with_the_closed_form() -> None:
    gap = sf.lp_ball._distance_to_lp_curve(0.5)
    assert gap.error < 1e-12
    assert holds(gap, math.sqrt(2) / 4, 1e-15)
    # As p falls to 0 the ball becomes the cross of the two axes, half away from the midpoint of an edge.
    assert sf.LpBall(0.02).distance_to_hull(1).value == pytest.approx(0.5, abs=1e-6)
    assert sf.LpBall(0.99999).distance_to_hull(1).value < 1e-5


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("p", [0.4, 0.5, 0.8])
def test_averages_of_the_ball_by_brute_force(p: float, n: int, rng: np.random.Generator) -> None:
    """Sums of boundary points: they stay inside the outline, come near all of it, and give the same distance."""
    samples = boundary_samples(p, 120 if n == 2 else 16)
    sums = samples
    for _ in range(n - 1):
        sums = (sums[:, None] + samples).reshape(-1, 2)
    sums /= n
    shape = sf.LpBall(p).shape(n)
    corners = shape.vertices
    spacing = float(np.linalg.norm(np.diff(samples, axis=0), axis=1).max())
    assert cKDTree(sums).query(corners)[0].max() <= spacing
    # The outline of the first quadrant as y over x: convex between its cusps, so that chords lie above the curve.
    quarter = corners[: len(corners) // 4 + 1][::-1]
    assert (np.diff(quarter, axis=0) * [1, -1] >= 0).all()
    top = np.interp(np.abs(sums[:, 0]), quarter[:, 0], quarter[:, 1])
    assert (np.abs(sums[:, 1]) <= top + 1e-9).all()
    t = rng.uniform(size=2000)
    edge = np.stack([t, 1 - t], axis=1)
    brute = cKDTree(np.concatenate([sums, corners])).query(edge)[0].max()
    assert sf.LpBall(p).distance_to_hull(n).value == pytest.approx(brute, abs=0.01 / n)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 7.0])
def test_convex_balls_have_no_distance(p: float) -> None:
    ball = sf.LpBall(p, 2.0)
    assert ball.distance_to_hull(3) == (0.0, 0.0, "exact")
    assert ball.radii().inner_radius == 0
    samples = 2.0 * boundary_samples(p, 5000)
    assert ball.radii().circumradius == pytest.approx(np.linalg.norm(samples, axis=1).max(), rel=1e-6)
    assert in_hull(ball.shape(5).vertices, ball.hull()).all()


# --- Unions of pieces: closed forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7, 40])
def test_two_points(n: int, rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(2, 2))
    planar = points_set(np.stack([a, b]))
    apart = float(np.linalg.norm(b - a))
    assert holds(planar.distance_to_hull(n), apart / (2 * n))
    assert planar.radii() == (pytest.approx(apart / 2), pytest.approx(apart / 2))


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_the_corners_of_an_equilateral_triangle(n: int) -> None:
    """The averages are the points of a triangular lattice with side 1/n."""
    planar = points_set(np.asarray([[0, 0], [1, 0], [0.5, math.sqrt(0.75)]]))
    assert holds(planar.distance_to_hull(n), 1 / (n * math.sqrt(3)))
    assert planar.radii() == (pytest.approx(1 / math.sqrt(3)), pytest.approx(1 / math.sqrt(3)))


@pytest.mark.parametrize("n", [1, 2, 6, 25])
@pytest.mark.parametrize("radius", [0.1, 0.6])
def test_two_discs(n: int, radius: float) -> None:
    """Discs in a row, 2/n apart, in a capsule: the farthest points lie on its straight sides, between two centres."""
    planar = sf.Pieces([sf.disc((-1, 0), radius), sf.disc((1, 0), radius)])
    assert holds(planar.distance_to_hull(n), math.hypot(1 / n, radius) - radius)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 30])
def test_the_cross_of_two_segments(n: int) -> None:
    """A staircase of rectangles in the l_1 ball: each step leaves a right triangle with hypotenuse sqrt(2)/n."""
    planar = sf.Pieces([sf.segment((-1, 0), (1, 0)), sf.segment((0, -1), (0, 1))])
    assert holds(planar.distance_to_hull(n), 1 / (2 * n))
    assert planar.radii().inner_radius >= math.sqrt(0.5) - 1e-12  # an edge's midpoint needs both its ends


@pytest.mark.parametrize(
    "piece",
    [
        sf.point((3, -2)),
        sf.disc((1, 1), 0.5),
        sf.segment((0, 0), (2, 1)),
        sf.segment((0, 0), (2, 1), 0.25),
        sf.polygon([(0, 0), (2, 0), (1, 3), (1, 1)], 0.1),
    ],
)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_convex_sets_have_no_distance(piece: sf.Piece, n: int) -> None:
    planar = sf.Pieces([piece])
    assert planar.distance_to_hull(n) == (0.0, 0.0, "exact")
    assert planar.radii().inner_radius == 0
    doubled = sf.Pieces([piece, piece])  # here it is measured; the whole outline is a ridge at distance 0
    measured = doubled.distance_to_hull(n)
    assert holds(measured, 0.0)
    assert measured.error <= 1e-3 * doubled.radii().circumradius + 1e-300
    assert doubled.radii().inner_radius == 0


# --- Unions of pieces: brute force ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("count", "n"), [(5, 1), (4, 2), (4, 3), (3, 5)])
def test_random_points_against_the_exact_answer(count: int, n: int, seed: int, rng: np.random.Generator) -> None:
    points = rng.normal(size=(seed + 1, count, 2))[-1]
    measured = points_set(points).distance_to_hull(n, 1e-9)
    assert measured.error < 1e-8
    assert holds(measured, farthest_in_hull(all_sums(points, n)), 1e-10)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_distances_to_sums_by_support_functions(n: int, seed: int) -> None:
    """dist(x, K) is the largest excess of u.x over the support function; sums of sets add support functions."""
    rng = np.random.default_rng([n, seed])
    planar = random_pieces(rng)
    x = rng.normal(size=(60, 2)) * 1.5
    angle = np.linspace(0, 2 * np.pi, 20_000, endpoint=False)
    u = np.stack([np.cos(angle), np.sin(angle)])
    for p in planar.pieces:  # the normals of edges, where support functions have their kinks
        along = np.roll(p.corners, -1, axis=0) - p.corners
        if len(along) > 1:
            u = np.concatenate([u, np.stack([along[:, 1], -along[:, 0]]) / np.linalg.norm(along, axis=1)], axis=1)
    support = [np.max(p.corners @ u, axis=0) + p.radius for p in planar.pieces]
    ways = itertools.combinations_with_replacement(support, n)
    excess = np.stack([np.max(x @ u - np.sum(way, axis=0) / n, axis=1) for way in ways])
    brute = np.maximum(excess.min(axis=0), 0)
    found = planar.signed_distance(n)(x)
    np.testing.assert_allclose(np.maximum(found, 0), brute, atol=1e-6)
    # Inside, minus a lower bound on the depth: the exact depth in one sum is the least excess, and the best sum counts.
    np.testing.assert_allclose(np.minimum(found, 0), np.minimum(excess.min(axis=0), 0), atol=1e-6)


def test_sums_of_polygons_know_their_inside() -> None:
    """Where a piece whose edges come last is not in the sum, the loop of the others must close all the same."""
    for seed in range(12):
        rng = np.random.default_rng([seed, 31])
        planar = sf.Pieces([sf.polygon(rng.uniform(-1, 1, (k, 2))) for k in (3, 4, 5)])
        vertices, _ = planar.sums(3)
        x = rng.uniform(-1, 1, (200, 2))
        sides = [ConvexHull(v).equations for v in vertices]
        inside = np.any([(e[:, :2] @ x.T + e[:, 2:] < -1e-6).all(axis=0) for e in sides], axis=0)
        assert (planar.signed_distance(3)(x)[inside] < 0).all(), seed


def test_a_polygon_whose_corners_have_twins_knows_its_inside() -> None:
    """Corners a rounding apart have an edge between them whose direction the sums must not lose."""
    for seed in range(80):
        rng = np.random.default_rng([seed, 32])
        corners = rng.uniform(-1, 1, (3, 2))
        twins = corners + 1e-16 * rng.normal(size=(3, 2))
        polygon = sf.polygon(np.concatenate([corners, twins]))
        planar = sf.Pieces([polygon, sf.point(rng.uniform(-1, 1, 2))])
        x = 0.99 * rng.dirichlet(np.ones(3), 50) @ corners + 0.01 * corners.mean(axis=0)
        assert planar.signed_distance(1)(x).max() < 0, seed


@pytest.mark.parametrize("size", [1e-300, 1e-60, 1e-8, 1e8, 1e60, 1e160, 1e300])
def test_a_set_of_any_size(size: float, rng: np.random.Generator) -> None:
    """Nothing overflows, vanishes, or is compared with a length of its own."""
    corners = [rng.uniform(-1, 1, (k, 2)) for k in (1, 2, 4, 1)]
    radii = (0.0, 0.0, 0.0, 0.2)

    def made(size: float) -> sf.Pieces:
        return sf.Pieces([sf.polygon(size * c, size * r) for c, r in zip(corners, radii, strict=True)])

    one, other = made(1.0), made(size)
    wanted, found = one.distance_to_hull(2, 1e-3), other.distance_to_hull(2, 1e-3)
    assert abs(found.value / size - wanted.value) <= found.error / size + wanted.error
    np.testing.assert_allclose(np.asarray(other.radii()) / size, one.radii(), rtol=1e-9)
    for corners_of in (sf.Pieces.hull, lambda planar: planar.shape(2).vertices):
        for end in (np.min, np.max):
            seen, asked = end(corners_of(other), axis=0) / size, end(corners_of(one), axis=0)
            np.testing.assert_allclose(seen, asked, atol=1e-12)
    assert found.value <= sf.bounds(other.radii(), 2).starr * (1 + 1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_sums_hold_the_averages_of_points_of_the_set(seed: int) -> None:
    rng = np.random.default_rng(seed)
    planar, n = random_pieces(rng), 4
    chosen = [planar.pieces[k] for k in rng.integers(len(planar.pieces), size=400)]
    x = np.stack([rng.dirichlet(np.ones(len(p.corners))) @ p.corners for p in chosen])
    angle, size = rng.uniform(0, 2 * np.pi, 400), np.sqrt(rng.uniform(size=400))
    x += (size * np.asarray([p.radius for p in chosen]))[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    assert planar.signed_distance(n)(x.reshape(100, n, 2).mean(axis=1)).max() < 1e-9


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [1, 3])
def test_the_distance_of_unions_on_a_grid_of_the_true_hull(n: int, seed: int) -> None:
    """The hull here is the intersection of half planes from the support function: arcs and tangents are not corners."""
    rng = np.random.default_rng([seed, n, 7])
    planar = random_pieces(rng)
    angle = np.linspace(0, 2 * np.pi, 1000, endpoint=False)
    u = np.stack([np.cos(angle), np.sin(angle)])
    support = np.max([np.max(p.corners @ u, axis=0) + p.radius for p in planar.pieces], axis=0)
    corners = planar.hull()
    grids = [np.linspace(a, b, 101) for a, b in zip(corners.min(axis=0), corners.max(axis=0), strict=True)]
    x = np.stack(np.meshgrid(*grids), axis=-1).reshape(-1, 2)
    x = x[(x @ u <= support).all(axis=1)]
    brute = planar.signed_distance(n)(x).max()
    measured = planar.distance_to_hull(n)
    step = max(g[1] - g[0] for g in grids)
    assert brute <= measured.value + measured.error + 1e-9
    assert brute >= measured.value - measured.error - 1.5 * step


def test_branch_and_bound_encloses_what_it_promises(rng: np.random.Generator) -> None:
    planar = random_pieces(rng)
    fine = planar.distance_to_hull(3, 1e-8)
    for tolerance in (1e-1, 1e-3, 1e-5):
        measured = planar.distance_to_hull(3, tolerance)
        assert measured.error <= tolerance * planar.radii().circumradius / 3 / 2 * (1 + 1e-9)
        assert holds(measured, fine.value, fine.error)
    # A ridge of equal maxima, where the squares run out: the error says so, and the bracket still holds.
    strips = sf.Pieces([sf.segment((0, 0), (1, 0)), sf.segment((0, 1), (1, 1))])
    measured = strips.distance_to_hull(1, 1e-9)
    assert 1e-9 < measured.error < 1e-3
    assert holds(measured, 0.5)


@pytest.mark.parametrize("seed", SEEDS)
def test_moving_and_scaling(seed: int) -> None:
    rng = np.random.default_rng(seed)
    planar, n = random_pieces(rng), 3
    scale, turn, shift = float(rng.uniform(0.1, 20)), float(rng.uniform(0, 6)), rng.normal(size=2) * 100
    matrix = scale * np.asarray([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    moved = sf.Pieces([sf.polygon((p.corners @ matrix.T + shift).tolist(), scale * p.radius) for p in planar.pieces])
    a, b = planar.distance_to_hull(n), moved.distance_to_hull(n)
    assert abs(b.value - scale * a.value) <= b.error + scale * a.error + 1e-9
    for one, other in zip(planar.radii()[:1], moved.radii()[:1], strict=True):
        assert other == pytest.approx(scale * one, rel=2e-3)
    # The order of the pieces and a piece inside another make no other set.
    again = sf.Pieces([*planar.pieces[::-1], sf.point(planar.pieces[2].corners.mean(axis=0).tolist())])
    assert abs(again.distance_to_hull(n).value - a.value) <= 2 * a.error + ROUNDING


# --- The bound --------------------------------------------------------------------------------------------------------


def least_circle(points: np.ndarray) -> float:
    """The circumradius by trying all pairs and triples."""
    best = math.inf if len(points) > 1 else 0.0
    for k in (2, 3):
        for chosen in itertools.combinations(points, k):
            if k == 2:
                center = (chosen[0] + chosen[1]) / 2
            else:
                matrix = 2 * np.stack([chosen[1] - chosen[0], chosen[2] - chosen[0]])
                if abs(np.linalg.det(matrix)) < 1e-12:
                    continue
                center = np.linalg.solve(matrix, [c @ c - chosen[0] @ chosen[0] for c in chosen[1:]])
            radius = np.linalg.norm(chosen[0] - center)
            if (np.linalg.norm(points - center, axis=1) <= radius + 1e-10).all():
                best = min(best, float(radius))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_smallest_circle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(3 + seed, 2))
    center, radius = sf.smallest_circle(points)
    assert radius == pytest.approx(least_circle(points), rel=1e-9)
    assert np.linalg.norm(points - center, axis=1).max() <= radius
    line = np.outer(rng.normal(size=6), [1.0, 2.0])
    assert sf.smallest_circle(line)[1] == pytest.approx(np.ptp(line[:, 0]) * math.sqrt(5) / 2)


@pytest.mark.parametrize("seed", range(6))
def test_the_inner_radius_by_its_definition(seed: int) -> None:
    """The largest, over points x of the hull, of the least circle around a pair or triple whose hull holds x.

    The candidates x are the centres of all circles; the least radius at other points is never larger.
    """
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(6, 2))
    subsets = [np.stack(c) for k in (1, 2, 3) for c in itertools.combinations(points, k)]
    circles = [sf.smallest_circle(s) for s in subsets]
    weights = rng.dirichlet(np.ones(6), size=60)

    def least(x: np.ndarray) -> float:
        radii = []
        for subset, (_, radius) in zip(subsets, circles, strict=True):
            system = np.vstack([subset.T, np.ones(len(subset))])
            share, *_ = np.linalg.lstsq(system, np.append(x, 1.0), rcond=None)
            if np.abs(system @ share - np.append(x, 1.0)).max() < 1e-9 and share.min() > -1e-9:
                radii.append(radius)
        return min(radii)

    anywhere = [least(x) for x in weights @ points]
    at_centers = [least(center) for center, _ in circles]
    found = sf.inner_radius(points)
    assert max(anywhere) <= found + 1e-9
    assert max(at_centers) == pytest.approx(found, rel=1e-7)


def test_points_on_a_line_but_for_rounding_have_an_inner_radius() -> None:
    """Some of these make Qhull bring in a point at infinity."""
    for seed in range(300):
        rng = np.random.default_rng([seed, 5])
        along, turn = np.sort(rng.uniform(-1, 1, 6)), rng.uniform(0, 6)
        points = np.stack([along, 10.0 ** rng.integers(-17, -12) * rng.uniform(-1, 1, 6)], axis=1)
        points = points @ [[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]
        assert sf.inner_radius(points) >= np.diff(along).max() / 2 * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_the_bounds_hold_for_random_sets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for planar in (points_set(rng.normal(size=(4, 2))), random_pieces(rng)):
        radii = planar.radii()
        assert 0 < radii.inner_radius <= radii.circumradius
        for n in (1, 2, 4, 7):
            measured, bound = planar.distance_to_hull(n, 1e-4), sf.bounds(radii, n)
            assert measured.value - measured.error <= bound.starr <= bound.shapley_folkman
            assert bound.starr == pytest.approx(min(n, 2) ** 0.5 / n * radii.inner_radius)


def test_the_bound_is_attained_by_two_points_alone() -> None:
    """One copy: Starr's bound is the distance itself."""
    planar = points_set(np.asarray([[0.0, 0.0], [1.0, 0.0]]))
    assert holds(planar.distance_to_hull(1), sf.bounds(planar.radii(), 1).starr)


# --- Geometry and bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_hulls(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(50, 2))
    hull = sf.convex_hull(points)
    brute = points[ConvexHull(points).vertices]
    assert {*map(tuple, hull.tolist())} == {*map(tuple, brute.tolist())}
    assert all((b - a)[0] * (c - a)[1] > (b - a)[1] * (c - a)[0] for a, b, c in zip(
        hull, np.roll(hull, -1, axis=0), np.roll(hull, -2, axis=0), strict=True
    ))  # fmt: skip
    grid = rng.integers(0, 3, size=(30, 2)).astype(float)  # many on one line, many twice
    assert len(sf.convex_hull(grid)) == len(ConvexHull(grid).vertices)


def test_hulls_without_interior() -> None:
    assert sf.convex_hull(np.ones((3, 2))).tolist() == [[1, 1]]
    assert sf.convex_hull(np.asarray([[0.0, 0], [2, 2], [1, 1], [0.5, 0.5]])).tolist() == [[0, 0], [2, 2]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sf.LpBall(0.0), "p=0.0 must be positive"),
        (lambda: sf.LpBall(0.01), "below 0.02"),
        (lambda: sf.LpBall(0.5, -1.0), "radius=-1.0 must be positive"),
        (lambda: sf.LpBall().distance_to_hull(0), "n=0: give a whole number"),
        (lambda: sf.bounds(sf.Radii(1.0, 1.0), -2), "n=-2"),
        (lambda: sf.Pieces([]), "at least one piece"),
        (lambda: sf.disc((0, 0), -0.1), "radius=-0.1"),
        (lambda: sf.point((0, math.nan)), "finite coordinates"),
        (lambda: sf.polygon([(0, 0), (1, 0), (1,)]), "corners of a piece: give pairs of numbers"),
        (lambda: sf.point(("a", "b")), "corners of a piece: give pairs of numbers"),
        (lambda: sf.sets.random_discs(count=0), "count=0"),
        (lambda: sf.sets.random_points(count=9).distance_to_hull(30), r"9 pieces and n=30 copies make 48,903,492 sums"),
        (lambda: sf.sets.union().distance_to_hull(2, 0.0), "tolerance=0.0 must be positive"),
        (lambda: sf.parse_piece("disk 0 0 1"), "piece 'disk 0 0 1': write 'point x y'"),
        (lambda: sf.parse_piece("disc 0 0"), "piece 'disc 0 0'"),
        (lambda: sf.parse_piece("point a b"), "piece 'point a b'"),
        (lambda: sf.parse_piece("polygon 0 0 1 1 2"), "piece 'polygon"),
        (lambda: sf.parse_piece(""), "piece ''"),
    ],
)
def test_bad_input(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(sf.SetError, match=message):
        make()


# --- Every set of the table -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(sf.SETS))
def test_every_set_is_measured_and_drawn(name: str) -> None:
    planar = sf.SETS.build(name)
    assert sf.SETS.describe(name).endswith(".")
    hull, radii = planar.hull(), planar.radii()
    assert len(hull) >= 3
    assert least_circle(hull[:: max(1, len(hull) // 12)]) <= radii.circumradius + 1e-9
    for n in (1, 2, 5):
        measured, bound = planar.distance_to_hull(n), sf.bounds(radii, n)
        assert 0 <= measured.value - measured.error <= bound.starr <= bound.shapley_folkman
        shape = planar.shape(n)
        assert shape.lengths.sum() == len(shape.vertices)
        assert in_hull(shape.vertices, hull, 2e-3).all()


def test_random_sets_follow_their_seed() -> None:
    same = [sf.sets.random_points(count=4, seed=s).hull().tolist() for s in (1, 1, 2)]
    assert same[0] == same[1] != same[2]


# --- The experiment ---------------------------------------------------------------------------------------------------


def spec(name: str = "lp_ball", copies: tuple[int, ...] = (1, 2, 4), **settings: Any) -> ShapleyFolkmanSpec:
    return ShapleyFolkmanSpec(title="A title", set=Component(name, settings), panels=(1, 3), copies=copies)


def run(a_spec: ShapleyFolkmanSpec, workdir: Path, **options: Any) -> Any:
    return experiments.run(experiment_config("shapley_folkman", a_spec), workdir=workdir, **options)


@pytest.mark.parametrize("name", ["lp_ball", "union"])
def test_the_record(name: str, tmp_path: Path) -> None:
    report, workdir, _ = run(spec(name), tmp_path / "w")
    planar = sf.SETS.build(name)
    record = load_json(workdir.results / "shapley_folkman.json")
    assert [row["n"] for row in record["rows"]] == [1, 2, 4]
    for row, printed in zip(record["rows"], report.rows, strict=True):
        measured, bound = planar.distance_to_hull(row["n"]), sf.bounds(planar.radii(), row["n"])
        assert (row["distance"], row["error"], row["kind"]) == measured
        assert (row["shapley_folkman_bound"], row["starr_bound"]) == bound
        assert printed[:3] == [row["n"], row["distance"], row["error"]]
    assert record["decay_exponent"] == pytest.approx(-1, abs=0.01)
    assert "Starr's bound holds at every n." in report.notes
    arrays = load_npz(workdir.results / "shapley_folkman.npz")
    np.testing.assert_array_equal(arrays["n3_vertices"], planar.shape(3).vertices)
    assert {p.stem for p in workdir.figures.glob("*.pdf")} == {"shapley_folkman", "hull_distance"}


def test_the_exponent_of_the_decay() -> None:
    rows = [{"n": n, "distance": 3 * n**-1.7, "error": 0.0} for n in (1, 3, 10)]
    assert decay_exponent(rows) == pytest.approx(-1.7)
    assert decay_exponent([*rows, {"n": 1000, "distance": 5.0, "error": 5.0}]) == pytest.approx(-1.7)
    assert decay_exponent(rows[:1]) is None


def test_an_interrupted_run_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: dict[str, Figure]
) -> None:
    real, asked = sf.LpBall.distance_to_hull, []

    def failing(self: sf.LpBall, n: int, tolerance: float = 1e-6) -> sf.Measured:
        asked.append(n)
        if n == 1 and asked.count(1) == 1:
            raise KeyboardInterrupt
        return real(self, n, tolerance)

    monkeypatch.setattr(sf.LpBall, "distance_to_hull", failing)
    with pytest.raises(KeyboardInterrupt):
        run(spec(), tmp_path / "w")
    report, _, was_complete = run(spec(), tmp_path / "w")
    assert not was_complete
    assert asked == [4, 2, 1, 1]  # the largest first
    assert [row[0] for row in report.rows] == [1, 2, 4]


def test_a_set_of_ones_own(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    def corners(*, side: float = 1.0) -> sf.PlanarSet:
        """The corners of a square."""
        return points_set(side * np.asarray([[0, 0], [1, 0], [0, 1], [1, 1]]))

    tables = TABLES._replace(sets=TABLES.sets.extended({"corners": corners}))
    with pytest.raises(UnknownNameError, match="unknown planar set 'corners'"):
        run(spec("corners"), tmp_path / "w")
    report, _, _ = run(spec("corners", side=2.0), tmp_path / "w", tables=tables)
    for row in report.rows:
        assert row[1] == pytest.approx(math.sqrt(2) / row[0], abs=1e-5)  # half the diagonal of a square with side 2/n


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"set": {"name": "lp_bal"}}, UnknownNameError, "Did you mean 'lp_ball'"),
        ({"set": {"name": "lp_ball", "q": 1.0}}, UnknownNameError, "'q'"),
        ({"copies": ()}, ConfigError, "copies is empty"),
        ({"copies": (2, 0)}, ConfigError, "must be 1 to"),
        ({"copies": (2, 2)}, ConfigError, "twice"),
        ({"panels": (1, 2, 3, 4, 5, 6)}, ConfigError, "at most five"),
        ({"tolerance": 0.0}, ConfigError, "between 0 and 1"),
        ({"set": {"name": "lp_ball", "p": -1.0}}, SettingError, "p=-1.0 must be positive"),
    ],
)
def test_bad_configs(change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    config = {"experiment": "shapley_folkman", **config_lib.as_dict(spec()), **change}
    with pytest.raises(error, match=message):
        experiments.run(config, workdir=tmp_path / "w")


@pytest.mark.parametrize("name", list(sf.SETS))
def test_the_config_takes_every_set(name: str, tmp_path: Path, drawn: dict[str, Figure]) -> None:
    config = config_lib.load(ROOT / "configs" / "figure3.py", f"set={name},smoke")
    report, _, _ = experiments.run(config, workdir=tmp_path / "w")
    assert [row[0] for row in report.rows] == [1, 2, 3]
    assert set(drawn) == {"shapley_folkman", "hull_distance"}


def test_the_config_is_the_paper_s_figure_by_default() -> None:
    spec = config_lib.load(ROOT / "configs" / "figure3.py")
    assert (spec.set.name, spec.set.p) == ("lp_ball", 0.5)
    assert (spec.panels, spec.paper_item) == ((1, 2, 10), "Figure 3")
    assert config_lib.load(ROOT / "configs" / "figure3.py", "p=0.3,copies=1/9").copies == (1, 9)
    for arg, message in (
        ("set=union,p=0.3", "only the set lp_ball"),
        ("seed=2", "only the random sets"),
        ("copies=0", "must be 1 to 1,000,000"),
        ("p=nan", "a finite number"),
    ):
        with pytest.raises(ConfigError, match=message):
            config_lib.load(ROOT / "configs" / "figure3.py", arg)


# --- The figures ------------------------------------------------------------------------------------------------------


def test_panels_share_their_axes_and_fill_the_set(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    run(spec(), tmp_path / "w")
    figure = drawn["shapley_folkman"]
    assert [axes.get_title() for axes in figure.axes[:2]] == ["the set", "average of 3 copies"]
    assert len(figure.axes) == 3
    assert len({(axes.get_xlim(), axes.get_ylim(), axes.get_aspect()) for axes in figure.axes}) == 1
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    fill = np.abs(pixels - [158, 202, 225]).sum(axis=-1) < 6

    def color(axes: Any, x: float, y: float) -> bool:
        column, row = axes.transData.transform((x, y))
        return bool(fill[pixels.shape[0] - 1 - int(row), int(column)])

    # The midpoint between a cusp and the next is outside until the hull; half way in, the three differ.
    assert [color(axes, 0.15, 0.15) for axes in figure.axes] == [True, True, True]
    assert [color(axes, 0.35, 0.35) for axes in figure.axes] == [False, True, True]
    assert [color(axes, 0.48, 0.48) for axes in figure.axes] == [False, False, True]


def test_the_chart_shows_distance_error_and_bounds(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    run(spec("union", copies=(1, 3)), tmp_path / "w")
    (axes,) = drawn["hull_distance"].axes
    record = json.loads((tmp_path / "w/results/shapley_folkman.json").read_text())
    lines = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert lines["distance"] == [row["distance"] for row in record["rows"]]
    assert lines["Starr bound (inner radius)"] == [row["starr_bound"] for row in record["rows"]]
    assert lines["Shapley–Folkman bound (circumradius)"] == [row["shapley_folkman_bound"] for row in record["rows"]]
    (bars,) = axes.collections
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    for row, (low, high) in zip(record["rows"], ends, strict=True):
        assert high == pytest.approx(row["distance"] + row["error"])
        assert low == pytest.approx(max(row["distance"] - row["error"], 0))
    words = " ".join(text.get_text() for text in drawn["hull_distance"].texts)
    assert "Bars: proven error" in words


def test_a_record_without_its_arrays_is_refused(tmp_path: Path) -> None:
    run(spec(), tmp_path / "w")
    (tmp_path / "w/results/shapley_folkman.npz").unlink()
    with pytest.raises(ValueError, match="no record"):
        figures.draw(tmp_path / "w")
    save_npz(tmp_path / "w/results/shapley_folkman.npz", hull=np.zeros((3, 2)))
    with pytest.raises(ValueError, match="lacks n1_vertices, n1_lengths"):
        figures.draw(tmp_path / "w")


def test_numbers_of_numpy_are_numbers() -> None:
    """Counts as whole numbers; a radius in float32 rounds nothing that is called exact."""
    # In a process of its own: here the types of all arguments are checked.
    program = "import numpy as np; from dualgap_jax import shapley_folkman as sf"
    program += "; print(sf.LpBall(0.5, np.float32(0.1)).distance_to_hull(np.int64(3)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str(sf.LpBall(0.5, float(np.float32(0.1))).distance_to_hull(3))
    assert measured.checked_copies(np.int64(3)) == 3
    for wrong in (True, 0, np.int64(-1)):
        with pytest.raises(sf.SetError, match="whole number of at least 1"):
            measured.checked_copies(wrong)
