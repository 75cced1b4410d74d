"""Convexity scores against closed forms, linear programs and double loops."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linprog

from dualgap_jax import convexity
from dualgap_jax.convexity import grids, measures

SEEDS = range(5)


def grid(xs, ys):
    return np.meshgrid(xs, ys)


def envelope_by_linear_programs(xs, ys, values):
    """The smallest convex combination of finite samples at each grid point; NaN where there is none."""
    x, y = grid(xs, ys)
    finite = np.isfinite(values)
    equations = np.stack([x[finite], y[finite], np.ones(finite.sum())])
    result = np.full(values.shape, np.nan)
    for at in np.ndindex(values.shape):
        solved = linprog(values[finite], A_eq=equations, b_eq=[x[at], y[at], 1], bounds=(0, None), method="highs")
        if solved.status == 0:
            result[at] = solved.fun
    return result


def midpoints_by_loops(values, error):
    points = list(np.ndindex(values.shape))
    violations = pairs = 0
    for (i, j), (k, m) in itertools.combinations(points, 2):
        if (i + k) % 2 or (j + m) % 2:
            continue
        c = (i + k) // 2, (j + m) // 2
        if not np.isfinite([values[i, j], values[k, m], values[c]]).all():
            continue
        pairs += 1
        violations += values[c] - error[c] > (values[i, j] + error[i, j] + values[k, m] + error[k, m]) / 2
    return violations, pairs


def smooth(rng, xs, ys):
    """A random smooth surface; the same generator state gives the same function on any grid."""
    waves = rng.uniform(-3, 3, (4, 2))
    phases, heights = rng.uniform(0, 2 * np.pi, 4), rng.uniform(0.5, 1.0, 4)
    x, y = grid(xs, ys)
    return (
        3
        + x**2
        + y**2
        + sum(h * np.sin(a * x + b * y + p) for (a, b), p, h in zip(waves, phases, heights, strict=True))
    )


def random_axis(rng, n, uniform):
    axis = np.linspace(-1.3, 0.9, n) if uniform else np.cumsum(rng.uniform(0.1, 1.0, n))
    return axis[::-1] if rng.random() < 0.5 else axis


# --- the envelope ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("kind", ["noise", "steps", "capped", "fold"])
def test_envelope_equals_linear_programs(rng, seed, uniform, kind):
    ny, nx = rng.integers(2, 9, 2)
    xs, ys = random_axis(rng, nx, uniform), random_axis(rng, ny, uniform)
    x, y = grid(xs, ys)
    values = {
        "noise": rng.normal(size=x.shape),
        "steps": np.round(rng.normal(size=x.shape)),
        "capped": np.minimum(x**2 + y**2, 1.0),
        "fold": 2 * x - 3 * y + rng.normal() * np.abs(x - y),
    }[kind]
    ours = convexity.lower_convex_envelope(xs, ys, values)
    np.testing.assert_allclose(
        ours, envelope_by_linear_programs(xs, ys, values), rtol=0, atol=1e-9 * np.ptp(values) + 1e-12
    )
    assert (ours <= values).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.85])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_envelope_with_non_finite_samples_equals_linear_programs(rng, seed, share, bad):
    ny, nx = rng.integers(1, 7, 2)
    xs, ys = random_axis(rng, nx, seed % 2 == 0), random_axis(rng, ny, seed % 2 == 0)
    values = rng.normal(size=(ny, nx))
    values[rng.random(values.shape) < share] = bad
    values.flat[rng.integers(values.size)] = 0.3  # at least one finite point; few of them lie on a line
    ours = convexity.lower_convex_envelope(xs, ys, values)
    np.testing.assert_allclose(ours, envelope_by_linear_programs(xs, ys, values), rtol=0, atol=1e-9)


def test_envelope_of_a_diagonal_of_finite_samples_is_one_dimensional():
    values = np.full((5, 5), np.nan)
    values[[0, 1, 2, 4], [0, 1, 2, 4]] = [0.0, 3.0, -1.0, 5.0]
    expected = np.full((5, 5), np.nan)
    np.fill_diagonal(expected, [0.0, -0.5, -1.0, 2.0, 5.0])
    ours = convexity.lower_convex_envelope(np.arange(5.0), np.arange(5.0), values)
    np.testing.assert_allclose(ours, expected, atol=1e-15)


@pytest.mark.parametrize("transpose", [False, True])
def test_envelope_of_a_single_row_or_column(transpose):
    xs, values = np.array([0.0, 1.0, 3.0, 4.0]), np.array([[1.0, 5.0, -2.0, 0.0]])
    expected = np.array([[1.0, 0.0, -2.0, 0.0]])
    one = np.array([7.0])
    if transpose:
        np.testing.assert_allclose(convexity.lower_convex_envelope(one, xs, values.T), expected.T, atol=1e-15)
    else:
        np.testing.assert_allclose(convexity.lower_convex_envelope(xs, one, values), expected, atol=1e-15)


def test_envelope_of_one_point_and_of_none():
    one = np.array([0.5])
    assert convexity.lower_convex_envelope(one, one, np.array([[3.0]])) == 3.0
    assert np.isnan(convexity.lower_convex_envelope(one, one, np.array([[np.inf]]))).all()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("kind", ["quadratic", "cone", "plane", "polyhedral", "flat"])
def test_envelope_of_a_convex_surface_is_the_surface(rng, seed, uniform, kind):
    xs, ys = random_axis(rng, 51, uniform), random_axis(rng, 34, uniform)
    x, y = grid(xs, ys)
    a, b, c, d = rng.normal(size=4)
    values = {
        "quadratic": (a * x + b * y) ** 2 + (c * x + d * y) ** 2 + 40 * x,
        "cone": np.hypot(x - a, y - b),
        "plane": 1e3 * a * x + b * y + c,
        "polyhedral": np.max([p * x + q * y + s for p, q, s in rng.normal(size=(30, 3))], axis=0),
        "flat": np.full(x.shape, a),
    }[kind]
    ours = convexity.lower_convex_envelope(xs, ys, values)
    np.testing.assert_allclose(ours, values, rtol=0, atol=1e-12 * np.abs(values).max())


@pytest.mark.parametrize("seed", SEEDS)
def test_envelope_ignores_peaks_of_any_height(rng, seed):
    xs = ys = np.linspace(-1, 1, 21)
    values = smooth(rng, xs, ys)
    inside = rng.integers(1, 20, 2)
    peaked, taller = values.copy(), values.copy()
    peaked[tuple(inside)], taller[tuple(inside)] = 1e3, 1e30
    np.testing.assert_allclose(
        convexity.lower_convex_envelope(xs, ys, taller),
        convexity.lower_convex_envelope(xs, ys, peaked),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_envelope_moves_with_affine_maps(rng, seed):
    xs, ys = np.linspace(-1, 1, 31), np.linspace(-0.5, 2, 24)
    x, y = grid(xs, ys)
    values = rng.normal(size=x.shape)
    a, b, c, scale = *rng.normal(size=3), rng.uniform(0.1, 10)
    envelope = convexity.lower_convex_envelope(xs, ys, values)
    moved = convexity.lower_convex_envelope(5 - 3 * xs, 0.01 * ys, scale * values + a * x + b * y + c)
    np.testing.assert_allclose(moved, scale * envelope + a * x + b * y + c, rtol=0, atol=1e-11)
    np.testing.assert_allclose(convexity.lower_convex_envelope(ys, xs, values.T), envelope.T, rtol=0, atol=1e-12)


def test_float32_coordinates_count_as_uniform():
    xs = np.linspace(-0.6, 0.6, 51, dtype=np.float32)
    x, y = grid(np.linspace(-0.6, 0.6, 51), np.linspace(-0.6, 0.6, 51))
    values = 100 * (x + y)
    np.testing.assert_allclose(convexity.lower_convex_envelope(xs, xs, values), values, rtol=0, atol=1e-12)


# --- surfaces with known scores -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("seed", SEEDS)
def test_convex_quadratic_scores_zero(rng, seed, dtype):
    xs, ys = np.linspace(-0.6, 0.6, 51), np.linspace(-0.4, 0.5, 37)
    x, y = grid(xs, ys)
    (a, b), (c, d) = rng.uniform(0.5, 1.5, (2, 2)) * [[1, 1], [1, -1]]
    loss = (0.1 + (a * x + b * y) ** 2 + (c * x + d * y) ** 2).astype(dtype)
    s = convexity.scores(xs, ys, loss, zero_loss=1.0)
    assert s.envelope_max <= (1e-14 if dtype == np.float64 else 1e-6)
    assert s.envelope_mean <= s.envelope_max
    assert (s.midpoint_violation_rate, s.negative_curvature_share, s.curvature_ratio_mean, s.curvature_ratio_max) == (
        0,
        0,
        0,
        0,
    )
    assert (s.status, s.finite_share) == ("ok", 1.0)
    assert s.loss_range == pytest.approx(np.ptp(loss))


@pytest.mark.parametrize(("n", "a"), [(11, 1.0), (25, 0.7), (51, 2.0)])
def test_saddle(n, a):
    # On [-a, a]^2 the envelope of x^2 - y^2 is x^2 - a^2: it is convex and below, and every (x, y) is a convex
    # combination of (x, -a) and (x, a), where the two agree.  The distance is a^2 - y^2.
    xs = np.linspace(-a, a, n)
    x, y = grid(xs, xs)
    np.testing.assert_allclose(
        convexity.lower_convex_envelope(xs, xs, x**2 - y**2), x**2 - a**2, rtol=0, atol=1e-14 * max(1, a**2)
    )
    s = convexity.scores(xs, xs, x**2 - y**2, zero_loss=2.0)
    assert s.envelope_max == pytest.approx(a**2)
    assert s.envelope_mean == pytest.approx(a**2 - np.mean(xs**2))
    assert s.envelope_max_per_zero_loss == pytest.approx(a**2 / 2)
    assert s.envelope_max_per_range == pytest.approx(0.5)  # the range is 2 a^2
    assert s.envelope_mean_per_range == pytest.approx(s.envelope_mean / (2 * a**2))
    assert s.negative_curvature_share == 1.0
    assert s.curvature_ratio_mean == pytest.approx(1.0, abs=1e-9)
    # With ends m -/+ (dy, dx): loss(m) - mean of the ends = h^2 (dy^2 - dx^2), a violation when |dy| > |dx|.
    half = range(-((n - 1) // 2), (n - 1) // 2 + 1)
    count = {(dy, dx): (n - 2 * abs(dy)) * (n - 2 * abs(dx)) for dy in half for dx in half if (dy, dx) != (0, 0)}
    violating = sum(c for (dy, dx), c in count.items() if abs(dy) > abs(dx))
    assert s.midpoint_pairs == sum(count.values()) // 2
    assert s.midpoint_violation_rate == pytest.approx(violating / sum(count.values()))


def test_number_of_midpoint_pairs_on_the_usual_grid():
    # Both indices of the ends must agree in parity: 26 even and 25 odd indices per axis.
    classes = [26 * 26, 26 * 25, 25 * 26, 25 * 25]
    assert sum(math.comb(k, 2) for k in classes) == 845_000
    flat = np.zeros((51, 51))
    assert convexity.midpoint_violations(flat, flat) == (0.0, 845_000, 0.0)


def test_two_wells():
    # (x^2 - 1)^2 has envelope 0 on [-1, 1] and is convex beyond; on a rectangle the envelope of g(x) + h(y) is the sum
    # of the two envelopes.  The grid holds 0 and -/+ 1.
    xs, ys = np.linspace(-1.5, 1.5, 25), np.linspace(-0.5, 1.0, 13)
    x, y = grid(xs, ys)
    wells = (x**2 - 1) ** 2
    expected = np.where(np.abs(x) <= 1, 0, wells) + y**2
    np.testing.assert_allclose(convexity.lower_convex_envelope(xs, ys, wells + y**2), expected, rtol=0, atol=1e-14)
    t = np.linspace(0, 1, 41)
    path = (2 * t - 1) ** 2 - 1
    s = convexity.scores(
        xs, ys, wells + y**2, zero_loss=1.0, edge_t=t, edge_losses=np.stack([path**2, t, (t - 0.5) ** 2])
    )
    assert s.envelope_max == pytest.approx(1.0)
    assert s.envelope_mean == pytest.approx(np.mean((wells + y**2 - expected)[0]))
    # Second differences of x^4 - 2 x^2 + 1 are 12 x^2 + 2 h^2 - 4.
    h = xs[1] - xs[0]
    assert s.negative_curvature_share == pytest.approx(np.mean(12 * xs[1:-1] ** 2 + 2 * h**2 < 4))
    assert s.barriers == pytest.approx((1.0, 0.0, 0.0), abs=1e-15)
    assert s.barrier_max == pytest.approx(1.0)


@pytest.mark.parametrize("level", [0.0, 0.1, 2.5])
def test_flat_plateau_scores_zero(level):
    xs, ys = np.linspace(-1, 1, 21), np.linspace(-1, 1, 9)
    s = convexity.scores(xs, ys, np.full((9, 21), level), zero_loss=1.0)
    assert (s.envelope_max, s.envelope_mean, s.envelope_max_per_range, s.envelope_mean_per_range) == (0, 0, 0, 0)
    assert (s.midpoint_violation_rate, s.negative_curvature_share, s.curvature_ratio_max) == (0, 0, 0)
    assert (s.loss_range, s.status) == (0, "ok")


def test_capped_parabola():
    # min(x^2, 1) on [-5/4, 5/4]: the line from (5/4, 1) touches x^2 at x0 with 2 x0 (5/4 - x0) = 1 - x0^2, x0 = 1/2.
    xs, ys = np.linspace(-1.25, 1.25, 21), np.linspace(0, 1, 7)
    x, _ = grid(xs, ys)
    expected = np.where(np.abs(x) <= 0.5, x**2, np.abs(x) - 0.25)
    loss = np.minimum(x**2, 1.0)
    np.testing.assert_allclose(convexity.lower_convex_envelope(xs, ys, loss), expected, rtol=0, atol=1e-14)
    s = convexity.scores(xs, ys, loss, zero_loss=4.0)
    assert s.envelope_max == pytest.approx(0.25)  # at x = -/+ 1
    assert s.envelope_max_per_zero_loss == pytest.approx(0.0625)
    # Only the two kinks bend downwards: the points -/+ 1 of the 19 interior columns.
    assert s.negative_curvature_share == pytest.approx(2 / 19)


def test_capped_paraboloid_equals_linear_programs():
    xs = np.linspace(-1, 1, 11)
    x, y = grid(xs, xs)
    loss = np.minimum(x**2 + y**2, 0.6)
    expected = envelope_by_linear_programs(xs, xs, loss)
    s = convexity.scores(xs, xs, loss, zero_loss=1.0)
    assert s.envelope_max == pytest.approx(np.max(loss - expected), abs=1e-10)
    assert s.envelope_mean == pytest.approx(np.mean(loss - expected), abs=1e-10)
    assert s.envelope_max > 0.05


def test_concave_surface_falls_to_its_corners():
    xs = np.linspace(-1, 1, 15)
    x, y = grid(xs, xs)
    s = convexity.scores(xs, xs, 2 - x**2 - y**2, zero_loss=1.0)
    assert s.envelope_max == pytest.approx(2.0)
    assert (s.midpoint_violation_rate, s.negative_curvature_share, s.curvature_ratio_max) == (1.0, 1.0, 1.0)


# --- midpoints and curvature ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("ny", "nx"), [(3, 3), (6, 7), (8, 5), (3, 10)])
def test_midpoints_equal_a_double_loop(rng, seed, ny, nx):
    values = np.round(rng.normal(size=(ny, nx)), 1)
    values[rng.random(values.shape) < 0.1] = rng.choice([np.nan, np.inf])
    error = np.abs(rng.normal(size=values.shape)) * 0.2 * (seed % 2)
    violations, pairs = midpoints_by_loops(values, error)
    found = convexity.midpoint_violations(values, error)
    assert (found.pairs, found.error) == (pairs, 0.0 if pairs else pytest.approx(math.nan, nan_ok=True))
    np.testing.assert_equal(found.rate, violations / pairs if pairs else math.nan)


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_use_the_stated_error(rng, seed):
    xs, ys = np.linspace(0, 1, 7), np.linspace(0, 2, 5)
    loss, rtol, zero_loss = rng.normal(size=(5, 7)) * 3, 0.05, 1.7
    s = convexity.scores(xs, ys, loss, zero_loss=zero_loss, rtol=rtol)
    violations, pairs = midpoints_by_loops(loss, rtol * np.maximum(np.abs(loss), zero_loss))
    assert s.midpoint_pairs == pairs
    assert s.midpoint_violation_rate == violations / pairs
    strict, _ = midpoints_by_loops(loss, np.zeros_like(loss))
    assert convexity.scores(xs, ys, loss, zero_loss=zero_loss, rtol=0.0).midpoint_violation_rate == strict / pairs
    assert violations < strict


@pytest.mark.parametrize("seed", SEEDS)
def test_tolerance_absorbs_float32_rounding_and_no_more(rng, seed):
    xs = ys = np.linspace(-0.6, 0.6, 41)
    x, y = grid(xs, ys)
    a, b = rng.normal(size=2)
    rounded = (3 + a * x + b * y).astype(np.float32)
    tolerant = convexity.scores(xs, ys, rounded, zero_loss=1.0)
    assert (tolerant.midpoint_violation_rate, tolerant.negative_curvature_share) == (0, 0)
    strict = convexity.scores(xs, ys, rounded, zero_loss=1.0, rtol=0.0)
    assert strict.midpoint_violation_rate > 0.1
    assert strict.negative_curvature_share > 0.1
    bumped = rounded + np.float32(1e-4) * (np.hypot(x, y) < 0.01)
    seen = convexity.scores(xs, ys, bumped, zero_loss=1.0)
    assert seen.midpoint_violation_rate > 0
    assert seen.negative_curvature_share >= 1 / 39**2
    assert seen.envelope_max == pytest.approx(1e-4, rel=0.05)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("flip", [False, True])
def test_curvature_of_a_quadratic_is_its_hessian(rng, seed, flip):
    xs, ys = np.linspace(-1, 2, 8), np.linspace(0, 1, 6)
    if flip:
        xs = xs[::-1].copy()
    x, y = grid(xs, ys)
    half = rng.normal(size=(2, 2))
    hessian = half + half.T
    loss = 0.5 * (hessian[0, 0] * x**2 + 2 * hessian[0, 1] * x * y + hessian[1, 1] * y**2) + rng.normal() * x + 1
    window = np.asarray([np.ptp(xs), np.ptp(ys)])
    low, high = np.linalg.eigvalsh(hessian * np.outer(window, window))  # in shares of the window
    maps = convexity.curvature(xs, ys, loss, 1e-12 * np.ones_like(loss))
    np.testing.assert_allclose(maps.lambda_min, np.full((4, 6), low), atol=1e-10)
    np.testing.assert_allclose(maps.lambda_max, np.full((4, 6), high), atol=1e-10)
    assert (maps.negative == (low < 0)).all()
    np.testing.assert_allclose(maps.ratio, np.full((4, 6), max(0.0, -low) / max(abs(low), abs(high))), atol=1e-10)


def test_curvature_ratio_is_cut_off_at_one():
    xs = np.linspace(-1, 1, 9)
    x, y = grid(xs, xs)
    for weight, expected in ((0.25, 0.25), (4.0, 1.0)):
        s = convexity.scores(xs, xs, 5 + x**2 - weight * y**2, zero_loss=1.0)
        assert s.curvature_ratio_mean == pytest.approx(expected)
        assert s.curvature_ratio_max == pytest.approx(expected)


def test_curvature_leaves_out_stencils_with_a_hole():
    xs = np.linspace(-1, 1, 7)
    x, y = grid(xs, xs)
    loss = x**2 - y**2
    loss[0, 0], loss[3, 3] = np.inf, np.nan
    maps = convexity.curvature(xs, xs, loss, np.zeros_like(loss))
    hole = np.zeros((5, 5), bool)
    hole[0, 0] = True
    hole[1:4, 1:4] = True
    for each in maps:
        np.testing.assert_array_equal(np.isnan(each), hole)
    assert (maps.negative[~hole] == 1).all()


# --- invariance and refinement --------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_adding_an_affine_function_changes_no_score_but_the_range(rng, seed):
    xs, ys = np.linspace(-1, 1, 25), np.linspace(-1, 0.5, 18)
    x, y = grid(xs, ys)
    loss = smooth(rng, xs, ys)
    a, b, c = rng.normal(size=3)
    before = convexity.scores(xs, ys, loss, zero_loss=2.0)
    after = convexity.scores(xs, ys, loss + a * x + b * y + c, zero_loss=2.0)
    assert before.envelope_max > 0.01
    for name in (
        "envelope_max",
        "envelope_mean",
        "envelope_max_per_zero_loss",
        "envelope_mean_per_zero_loss",
        "curvature_ratio_mean",
        "curvature_ratio_max",
        "negative_curvature_share",
    ):
        assert getattr(after, name) == pytest.approx(getattr(before, name), abs=1e-9), name
    # Pairs within the tolerance, which follows the size of the loss, may change sides.
    assert after.midpoint_violation_rate == pytest.approx(before.midpoint_violation_rate, abs=1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_scaling_the_loss_keeps_the_normalised_scores(rng, seed):
    xs = ys = np.linspace(-1, 1, 21)
    loss, c = smooth(rng, xs, ys), rng.uniform(0.01, 100)
    t = np.linspace(0, 1, 9)
    edges = rng.uniform(0, 1, (3, 9))
    before = convexity.scores(xs, ys, loss, zero_loss=2.0, edge_t=t, edge_losses=edges)
    after = convexity.scores(xs, ys, c * loss, zero_loss=2.0 * c, edge_t=t, edge_losses=c * edges)
    scaled = {"envelope_max", "envelope_mean", "loss_range", "zero_loss", "barrier_max", "barriers"}
    for field in dataclasses.fields(convexity.Scores):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if field.name in scaled:
            old = tuple(c * v for v in old) if isinstance(old, tuple) else c * old
        assert new == (old if isinstance(old, str) else pytest.approx(old, rel=1e-9)), field.name


@pytest.mark.parametrize("seed", SEEDS)
def test_scores_converge_as_the_grid_is_refined(rng, seed):
    coefficients = rng.integers(2**32)

    def at(n):
        xs = np.linspace(-1, 1, n)
        return convexity.scores(xs, xs, smooth(np.random.default_rng(coefficients), xs, xs), zero_loss=3.0)

    coarse, middle, fine = at(17), at(33), at(65)
    for name, tolerance in (
        ("envelope_max", 0.01),
        ("envelope_mean", 0.02),
        ("envelope_max_per_range", 0.01),
        ("midpoint_violation_rate", 0.03),
        ("negative_curvature_share", 0.03),
        ("curvature_ratio_mean", 0.02),
    ):
        a, b, c = (getattr(s, name) for s in (coarse, middle, fine))
        assert c == pytest.approx(b, abs=tolerance), name
        assert c == pytest.approx(a, abs=3 * tolerance), name


def surfaces(rng: np.random.Generator) -> dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]:
    waves = rng.normal(size=4)
    return {
        "weak saddle": lambda x, y: 0.05 * (x**2 - y**2),
        "weaker saddle": lambda x, y: 0.003 * (x**2 - y**2) + 1,
        "roof": lambda x, y: 2 - np.abs(x) - 0.1 * np.abs(y),
        "wells": lambda x, y: (x**2 - 0.5) ** 2 + 0.3 * y**2,
        "waves": lambda x, y: np.sin(3 * x + waves[0]) * np.cos(2 * y + waves[1] * x) + waves[2] * x**2 + waves[3] * y,
        "bowl": lambda x, y: x**2 + 0.5 * y**2,
    }


@pytest.mark.parametrize("name", sorted(surfaces(np.random.default_rng(0))))
def test_curvature_and_midpoints_do_not_depend_on_the_fineness_of_the_grid(name: str, rng):
    def at(n):
        xs = np.linspace(-1, 1, n)
        return convexity.scores(xs, xs, surface(*grid(xs, xs)), zero_loss=1.0)

    surface = surfaces(rng)[name]
    coarse, fine = at(51), at(401)
    assert (coarse.midpoint_pairs, coarse.midpoint_error) == (845_000, 0.0)
    assert fine.midpoint_pairs == 1_000_000
    assert fine.midpoint_error <= 0.0005
    assert fine.midpoint_violation_rate == pytest.approx(coarse.midpoint_violation_rate, rel=0.05)
    for score in ("negative_curvature_share", "curvature_ratio_mean", "curvature_ratio_max"):
        assert getattr(fine, score) == pytest.approx(getattr(coarse, score), rel=1e-6), score
    assert (coarse.negative_curvature_share > 0) == (name != "bowl")


def test_the_step_of_curvature_is_the_finer_of_two_as_near():
    for points, step in ((75, 1), (76, 1), (77, 2), (126, 2), (127, 3), (176, 3), (401, 8)):
        xs = np.linspace(0, 1, points)
        found = convexity.curvature(xs, xs[:3], np.zeros((3, points)), np.zeros((3, points)))
        assert found.negative.shape == (1, (points - 1) // step - 1), points


@pytest.mark.parametrize(("nx", "ny"), [(51, 76), (100, 51), (78, 176), (100, 127), (126, 3), (333, 100)])
def test_curvature_sees_a_line_from_end_to_end(nx: int, ny: int, rng):
    """Against sums over the stencils one by one, at points that a cubic surface shows: its curvature is the index."""
    loss, error = smooth(rng, np.linspace(-1, 1, nx), np.linspace(-1, 1, ny)), 1e-3 * rng.random((ny, nx))
    sides, steps = (ny, nx), [max(1, -(-(2 * n - 2 - 50) // 100)) for n in (ny, nx)]
    row, column = np.mgrid[:ny, :nx].astype(np.float64)
    middles = []
    for axis, (along, n, k) in enumerate(zip((row, column), sides, steps, strict=True)):
        shown = convexity.curvature(np.arange(nx), np.arange(ny), along**3 / 6, np.zeros((ny, nx))).lambda_max
        shown = np.rint(shown[:, 0] if axis == 0 else shown[0]) / (n - 1) ** 2
        middles.append(np.rint(shown).astype(int))
        assert middles[-1][0] == k
        assert middles[-1][-1] == n - 1 - k
        assert set(np.diff(middles[-1])) <= ({k} if (n - 1) % k == 0 else {k, k + 1})
        uneven = middles[-1] + middles[-1][::-1] - (n - 1)
        assert np.count_nonzero(uneven) <= len(uneven) % 2  # but for one in the middle that has no point there
    found = convexity.curvature(np.arange(nx), np.arange(ny), loss, error)
    (ky, kx), (sy, sx) = steps, [k / (n - 1) for k, n in zip(steps, sides, strict=True)]
    assert found.negative.shape == (len(middles[0]), len(middles[1]))
    for i, r in enumerate(middles[0]):
        for j, c in enumerate(middles[1]):
            f, e = (a[r - ky : r + ky + 1 : ky, c - kx : c + kx + 1 : kx] for a in (loss, error))
            mixed = (f[2, 2] - f[2, 0] - f[0, 2] + f[0, 0]) / (4 * sx * sy)
            across, up = (f[1, 2] - 2 * f[1, 1] + f[1, 0]) / sx**2, (f[2, 1] - 2 * f[1, 1] + f[0, 1]) / sy**2
            low, high = np.linalg.eigvalsh([[across, mixed], [mixed, up]])
            assert found.lambda_min[i, j] == pytest.approx(low, abs=1e-8)
            assert found.lambda_max[i, j] == pytest.approx(high, abs=1e-8)
            assert found.negative[i, j] == (low < -e.max() * (4 / min(sx, sy) ** 2 + 1 / (sx * sy)))


@pytest.mark.parametrize("points", [100, 125, 150, 333])
def test_curvature_at_an_end_counts_whatever_the_number_of_points(points: int, rng):
    xs = np.linspace(-1, 1, points)
    x, y = grid(xs, xs)
    bend = rng.uniform(2, 5)
    for flipped in (x, -x, y, -y):
        # Convex but for the last hundredth of the window, where it falls off.
        fall = np.where(flipped > 0.985, bend * (flipped - 0.985), 0.0)
        scored = convexity.scores(xs, xs, 1 + x**2 + y**2 - 100 * fall, zero_loss=1.0)
        assert scored.negative_curvature_share == pytest.approx(1 / 49, rel=0.2)


def test_a_range_beyond_float64_changes_no_share(rng):
    xs = np.linspace(-1, 1, 9)
    loss = rng.uniform(-1, 1, (9, 9))
    loss[0, 0], loss[4, 4] = 1, -1
    plain, huge = (convexity.scores(xs, xs, size * loss, zero_loss=size) for size in (1.0, 1.7e308))
    assert huge.loss_range == np.inf
    for score in dataclasses.fields(plain):
        if score.name.startswith(("envelope_max_per", "envelope_mean_per", "midpoint", "negative", "curvature")):
            expected = getattr(plain, score.name)
            assert getattr(huge, score.name) == pytest.approx(expected, rel=1e-9), score.name
    largest = np.full((3, 3), np.finfo(np.float64).max)
    assert convexity.midpoint_violations(largest, 1e-6 * largest).rate == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_units_of_the_axes_and_of_the_loss_change_no_rate(rng, seed):
    xs, ys = np.linspace(-1, 1, 51), np.linspace(-0.5, 1, 37)
    loss = smooth(rng, xs, ys)
    rates = (
        "midpoint_violation_rate",
        "negative_curvature_share",
        "curvature_ratio_mean",
        "curvature_ratio_max",
        "envelope_max_per_range",
        "envelope_mean_per_range",
    )
    plain = convexity.scores(xs, ys, loss)
    assert 0 < plain.negative_curvature_share < 1
    near_the_largest = 1e308 / np.abs(loss).max()
    units = (
        (1e-2, 1, 1),
        (1, 1e5, 1),
        (1e-150, 1e150, 1e150),
        (1e150, -1, 1e-150),
        (3, 7, 11),
        (1, 1, near_the_largest),
    )
    for along_x, along_y, unit in units:
        other = convexity.scores(along_x * xs + along_x, along_y * ys, unit * loss)
        for rate in rates:
            assert getattr(other, rate) == pytest.approx(getattr(plain, rate), rel=1e-9), (rate, along_x, along_y, unit)


def test_a_drawn_rate_is_within_its_error_of_the_whole(rng, monkeypatch):
    for _ in range(5):
        values = np.cumsum(np.cumsum(rng.normal(size=(23, 32)), axis=0), axis=1)
        values[rng.random(values.shape) < 0.05] = np.nan
        error = np.zeros_like(values)
        whole = convexity.midpoint_violations(values, error)
        assert whole.error == 0.0
        with monkeypatch.context() as patched:
            patched.setattr(measures, "_EXACT_PAIRS", 40_000)
            drawn = convexity.midpoint_violations(values, error)
            assert convexity.midpoint_violations(values, error) == drawn  # one seed
        assert 0 < drawn.error == pytest.approx(math.sqrt(drawn.rate * (1 - drawn.rate) / drawn.pairs))
        assert drawn.pairs == pytest.approx(
            40_000 * whole.pairs / sum(math.comb(k, 2) for k in (192, 192, 176, 176)), rel=0.02
        )
        assert abs(drawn.rate - whole.rate) < 5 * drawn.error


def test_drawn_pairs_are_uniform_among_those_with_a_midpoint(monkeypatch):
    monkeypatch.setattr(measures, "_EXACT_PAIRS", 60_000)
    (y1, x1), (y2, x2), (my, mx) = measures._drawn_pairs((3, 4), [6, 6, 1, 1])
    np.testing.assert_array_equal(2 * my, y1 + y2)
    np.testing.assert_array_equal(2 * mx, x1 + x2)
    ends = np.sort(np.stack([4 * y1 + x1, 4 * y2 + x2]), axis=0)
    pairs, counts = np.unique(ends, axis=1, return_counts=True)
    assert pairs.shape == (2, 14)
    assert (pairs[0] < pairs[1]).all()
    np.testing.assert_allclose(counts, 60_000 / 14, rtol=0.1)


def test_scores_without_the_loss_of_the_zero_network(rng):
    xs = np.linspace(-1, 1, 21)
    loss = smooth(rng, xs, xs)
    s, given = convexity.scores(xs, xs, loss), convexity.scores(xs, xs, loss, zero_loss=float(np.abs(loss).max()))
    assert s.zero_loss is None
    assert math.isnan(s.envelope_max_per_zero_loss)
    assert math.isnan(s.envelope_mean_per_zero_loss)
    for field in dataclasses.fields(s):
        if "zero_loss" not in field.name:
            assert getattr(s, field.name) == getattr(given, field.name), field.name
    assert convexity.scores(xs, xs, np.full((21, 21), np.nan)).status == "nonfinite"


# --- barriers -------------------------------------------------------------------------------------


def test_barrier_over_unequal_ends():
    # The line from 3 to 1 plus 6 t (1 - t), which is largest, 1.5, at t = 1/2.
    t = np.linspace(0, 1, 11)
    losses = 3 - 2 * t + 6 * t * (1 - t)
    assert convexity.barrier(t, losses) == pytest.approx(1.5)
    assert convexity.barrier(t, losses[::-1]) == pytest.approx(1.5)
    assert convexity.barrier(t, 3 - 2 * t) == pytest.approx(0.0, abs=1e-15)
    assert convexity.barrier(t, 3 - 2 * t - t * (1 - t)) == 0.0


@pytest.mark.parametrize("seed", SEEDS)
def test_barrier_equals_a_loop(rng, seed):
    t = np.concatenate([[0.0], np.sort(rng.uniform(0, 1, 6)), [1.0]])
    losses = rng.normal(size=8)
    expected = max([0.0] + [v - np.interp(s, [0, 1], losses[[0, -1]]) for s, v in zip(t, losses, strict=True)])
    assert convexity.barrier(t, losses) == pytest.approx(expected, abs=1e-14)


def test_barrier_with_non_finite_losses():
    t = np.linspace(0, 1, 4)
    assert convexity.barrier(t, np.array([0.0, np.inf, 1.0, 0.0])) == math.inf
    assert math.isnan(convexity.barrier(t, np.array([0.0, np.nan, 1.0, 0.0])))
    assert math.isnan(convexity.barrier(t, np.array([np.inf, 1.0, 1.0, 0.0])))


# --- non-finite surfaces, json, bad input ---------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_over_the_finite_points(rng, seed, bad):
    xs, ys = np.linspace(-1, 1, 7), np.linspace(-1, 1, 6)
    loss = smooth(rng, xs, ys)
    lost = rng.random(loss.shape) < 0.15
    lost[0, 0] = True
    loss[lost] = bad
    s = convexity.scores(xs, ys, loss, zero_loss=1.0)
    distance = (np.where(lost, np.nan, loss) - envelope_by_linear_programs(xs, ys, loss))[~lost]
    assert s.envelope_max == pytest.approx(distance.max(), abs=1e-9)
    assert s.envelope_mean == pytest.approx(distance.mean(), abs=1e-9)
    violations, pairs = midpoints_by_loops(loss, 1e-6 * np.maximum(np.abs(np.where(lost, 0, loss)), 1.0))
    assert (s.midpoint_pairs, s.midpoint_violation_rate) == (pairs, violations / pairs)
    assert s.finite_share == pytest.approx(1 - lost.mean())
    assert s.loss_range == pytest.approx(np.ptp(loss[~lost]))
    assert s.status == "partial"


def test_a_surface_without_finite_points_has_a_status():
    xs = np.linspace(-1, 1, 5)
    s = convexity.scores(xs, xs, np.full((5, 5), np.nan), zero_loss=1.0)
    assert (s.status, s.finite_share, s.midpoint_pairs) == ("nonfinite", 0.0, 0)
    json.dumps(s.to_json(), allow_nan=False)
    for name in convexity.DEFINITIONS:
        value = getattr(s, name)
        if name not in ("status", "finite_share", "midpoint_pairs", "zero_loss", "rtol", "barriers", "barrier_max"):
            assert math.isnan(value), name
            assert s.to_json()[name] is None


def test_a_non_finite_edge_shows_in_the_status():
    xs = np.linspace(-1, 1, 5)
    edges = np.ones((3, 4))
    edges[1, 2] = np.inf
    s = convexity.scores(xs, xs, np.ones((5, 5)), zero_loss=1.0, edge_t=np.linspace(0, 1, 4), edge_losses=edges)
    assert (s.status, s.barriers, s.barrier_max) == ("partial", (0.0, math.inf, 0.0), math.inf)
    assert s.to_json()["barriers"] == [0.0, None, 0.0]


def test_json_holds_every_field_and_its_definition(rng):
    xs = np.linspace(-1, 1, 9)
    t = np.linspace(0, 1, 5)
    s = convexity.scores(xs, xs, smooth(rng, xs, xs), zero_loss=1.0, edge_t=t, edge_losses=rng.uniform(size=(3, 5)))
    names = {f.name for f in dataclasses.fields(s)}
    assert set(convexity.DEFINITIONS) == names
    read = json.loads(json.dumps(s.to_json(), allow_nan=False))
    assert set(read) == names | {"definitions"}
    assert read["definitions"] == convexity.DEFINITIONS
    for name in names - {"barriers"}:
        assert read[name] == getattr(s, name)
    assert tuple(read["barriers"]) == s.barriers
    without = convexity.scores(xs, xs, smooth(rng, xs, xs), zero_loss=1.0)
    assert (without.barriers, without.barrier_max, without.to_json()["barriers"]) == (None, None, None)


AXIS = np.linspace(-1, 1, 5)
SURFACE = np.zeros((5, 5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": np.zeros((5, 4))}, r"\[ny, nx\]"),
        ({"xs": np.linspace(-1, 1, 4), "loss": np.zeros((4, 5))}, "Transpose"),
        ({"loss": np.zeros(25)}, r"\[ny, nx\]"),
        ({"xs": np.array([0.0, 1.0, 1.0, 2.0, 3.0])}, "xs must be strictly monotone"),
        ({"ys": np.array([0.0, 2.0, 1.0, 3.0, 4.0])}, "ys must be strictly monotone"),
        ({"ys": np.array([0.0, 1.0, 2.0, 3.0, np.nan])}, "ys must be a non-empty vector of finite"),
        ({"xs": np.zeros((5, 1))}, "xs must be a non-empty vector"),
        ({"xs": AXIS[:2], "loss": np.zeros((5, 2))}, "at least 3 points"),
        ({"ys": AXIS**3 + AXIS}, "ys must be uniformly spaced"),
        ({"zero_loss": 0.0}, "zero_loss"),
        ({"zero_loss": -1.0}, "zero_loss"),
        ({"zero_loss": math.nan}, "zero_loss"),
        ({"zero_loss": math.inf}, "zero_loss"),
        ({"rtol": -1e-6}, "rtol"),
        ({"edge_t": np.linspace(0, 1, 3)}, "go together"),
        ({"edge_losses": np.zeros((3, 3))}, "go together"),
        ({"edge_t": np.linspace(0, 1, 3), "edge_losses": np.zeros((2, 3))}, r"\[3, m\]"),
        ({"edge_t": np.linspace(0, 1, 3), "edge_losses": np.zeros((3, 4))}, "one length"),
        ({"edge_t": np.linspace(0, 0.9, 3), "edge_losses": np.zeros((3, 3))}, "from 0 to 1"),
        ({"edge_t": np.array([0.0, 0.7, 0.3, 1.0]), "edge_losses": np.zeros((3, 4))}, "increase strictly"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {"xs": AXIS, "ys": AXIS, "loss": SURFACE, "zero_loss": 1.0} | change
    with pytest.raises(ValueError, match=message):
        convexity.scores(**arguments)


def test_a_surface_in_the_place_of_an_axis_is_not_printed_whole(rng):
    with pytest.raises(ValueError, match="axes come first") as error:
        convexity.scores(rng.normal(size=(40, 40)), np.arange(40.0), np.arange(40.0))
    assert len(str(error.value)) < 250


def test_bad_errors_are_refused():
    with pytest.raises(ValueError, match="shape of the losses"):
        convexity.midpoint_violations(SURFACE, np.zeros((5, 4)))
    with pytest.raises(ValueError, match="shape of the losses"):
        convexity.curvature(AXIS, AXIS, SURFACE, np.zeros((4, 5)))


def test_masked_losses_are_left_out_and_complex_ones_refused() -> None:
    xs = np.linspace(-1, 1, 5)
    a, b = np.meshgrid(xs, xs)
    loss, edges = a**2 + b**2, np.ones((3, 2))
    masked = convexity.scores(xs, xs, np.ma.masked_where(a > 0.5, np.where(a > 0.5, 9.0, loss)), zero_loss=1.0)
    assert masked == convexity.scores(xs, xs, np.where(a > 0.5, np.nan, loss), zero_loss=1.0)
    assert masked.status == "partial"
    hidden = convexity.scores(xs, xs, loss, edge_t=xs[[2, 4]], edge_losses=np.ma.masked_greater(edges, 0))
    assert hidden.status == "partial"
    for given in ((xs, xs, loss + 1j), (xs + 0j, xs, loss)):
        with pytest.raises(ValueError, match="must be real numbers"):
            convexity.scores(*given)


@pytest.mark.parametrize("wrong", [[["a", "b"]], [[1.0, 2.0], [3.0]], "loss", [[{}]], np.datetime64("2026-01-01")])
def test_what_are_no_numbers_is_told_so(wrong: Any) -> None:
    with pytest.raises(ValueError, match="coordinates and losses must be real numbers; got "):
        grids.real(wrong)


@pytest.mark.parametrize("bad", ["1", None, True, [1.0, 2.0], np.ones(1), np.nan, np.inf, -1.0])
def test_a_factor_that_is_no_number_is_told_so(bad: Any, rng: np.random.Generator) -> None:
    xs, loss = np.arange(5), rng.random((5, 5))
    scores = inspect.unwrap(convexity.scores)
    with pytest.raises(ValueError, match="rtol must be a number, finite and >= 0; got"):
        scores(xs, xs, loss, rtol=bad)
    if bad is not None:
        with pytest.raises(ValueError, match="zero_loss must be finite and > 0"):
            scores(xs, xs, loss, zero_loss=bad)
    for one in (np.float32(1), np.asarray(1.0), 1):
        assert scores(xs, xs, loss, zero_loss=one, rtol=0).zero_loss == 1.0


@pytest.mark.parametrize("bad", [np.nan, -1e-9])
def test_errors_that_are_none_are_refused_and_not_dropped(bad: float, rng: np.random.Generator) -> None:
    loss, error = rng.random((5, 6)), np.full((5, 6), 0.01)
    error[rng.integers(5), rng.integers(6)] = bad
    curvature = functools.partial(inspect.unwrap(convexity.curvature), np.arange(6), np.arange(5), loss)
    midpoints = functools.partial(inspect.unwrap(convexity.midpoint_violations), loss)
    for call in (curvature, midpoints):
        with pytest.raises(ValueError, match="error must be at least 0 everywhere, and never NaN"):
            call(error)
        with pytest.raises(ValueError, match=r"error must have the shape of the losses, \(5, 6\); got \(\)"):
            call(0.01)
        call(np.abs(np.nan_to_num(error)).tolist())


@pytest.mark.parametrize(
    ("t", "z"), [([2.0, 1, 0], [1.0, 5, 1]), ([0.0, 0, 1], [1.0, 2, 3]), ([0.0, 1], [1.0]), ([0.0, 1], [0.0, np.nan])]
)
def test_a_lower_hull_of_points_out_of_order_is_refused(t: Any, z: Any) -> None:
    hull = inspect.unwrap(convexity.lower_hull)
    with pytest.raises(ValueError, match="strictly increasing"):
        hull(t, z)
    np.testing.assert_array_equal(hull([0, 1, 2, 4], [3, 1, 2, 0]), [0, 1, 3])


def test_masked_ends_and_pairs_count_for_nothing() -> None:
    t = np.array([0.0, 0.5, 1.0])
    assert math.isnan(convexity.barrier(t, np.ma.masked_array([-99.0, 5, 2], [1, 0, 0])))
    assert math.isnan(convexity.barrier(t, np.ma.masked_array([0.0, 5, 2], [0, 1, 0])))
    assert convexity.barrier(t, np.ma.masked_array([0.0, 5, 2], [0, 0, 0])) == 4.0
    losses = np.ma.masked_array([[0.0, 0, 0], [0, 9, 0], [0, 0, 0]], [[0, 0, 0], [0, 1, 0], [0, 0, 0]])
    found = convexity.midpoint_violations(losses, np.zeros((3, 3)))
    assert (found.rate, found.pairs) == (0.0, 4)
    for call in (
        lambda: convexity.barrier(t, np.array([0, 1j, 0])),
        lambda: convexity.midpoint_violations(np.full((3, 3), 1j), np.zeros((3, 3))),
    ):
        with pytest.raises(ValueError, match="must be real numbers"):
            call()
