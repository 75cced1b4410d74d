"""Theorem 2: the claim `dual <= optimum <= primal` against exact arithmetic, at every rank, size and condition."""

from __future__ import annotations

import functools
import itertools
from decimal import Decimal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spectral_oracles import conditioned, exact_optimum, in_row_space, primal_value, rational_optimum

from dualgap_jax import spectral
from dualgap_jax.spectral import SpectralError, in_blocks, solve_columns

KINDS = ("plain", "one example", "few examples", "zero row", "same rows", "sum of rows", "product", "nearly", "rounded")


def random_x(rng: np.random.Generator, kind: str, d_0: int, n: int) -> np.ndarray:
    x = rng.normal(size=(d_0, n))
    if kind == "one example":
        return x[:, :1]
    if kind == "few examples":
        return x[:, : d_0 - 1]
    if kind == "zero row":
        x[1] = 0
    elif kind == "same rows":
        x[1] = -4 * x[0]
    elif kind == "sum of rows":
        x = rng.integers(-3, 4, size=(d_0, n)).astype(float)
        x[2] = 3 * x[0] - x[1]
    elif kind == "product":
        x = rng.normal(size=(d_0, 2)) @ rng.normal(size=(2, n))
    elif kind == "nearly":
        x[1] = x[0] + 10.0 ** rng.uniform(-14, -3) * x[1]
    elif kind == "rounded":
        x = (x[:, :2] @ rng.normal(size=(2, n))).astype(np.float32).astype(float)
    return x


def claims(x: np.ndarray, y: np.ndarray, gamma: float, widths: tuple[int, ...]) -> dict[str, Any]:
    """The solutions of all front doors."""
    found = {"solve": spectral.solve(x, y, gamma=gamma, widths=widths)}
    path = spectral.regularisation_path(x, y, gammas=np.array([0.0, gamma]), widths=widths)
    found["path"] = jax.tree.map(lambda a: a[1], path)
    if jax.config.jax_enable_x64:  # else JAX has rounded the data before they get there
        found["traced"] = traced_solve(widths)(x, y, gamma)
    return found


@functools.cache
def traced_solve(widths: tuple[int, ...]) -> Any:
    """`(x, y, gamma) -> Solution`, compiled once for each shape."""
    return jax.jit(lambda x, y, gamma: spectral.solve(x, y, gamma=gamma, widths=widths))


@pytest.mark.parametrize("wide", [False, True], ids=["32 bit mode", "64 bit mode"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_claim_holds_in_exact_arithmetic(rng, kind, wide):
    for scale_x, scale_y in ((1.0, 1.0), (2.0**-460, 2.0**460), (2.0**330, 2.0**-460)):
        x, y = random_x(rng, kind, 4, 7), rng.normal(size=(2, 7))[:, : 1 if kind == "one example" else 7]
        y = y[:, : x.shape[1]]
        x, y = scale_x * x * 2.0 ** rng.integers(-27, 27, (4, 1)), scale_y * y
        gamma = float(scale_y * rng.choice([0.0, 0.3, 1.0]))
        optimum = rational_optimum(x, y, gamma, 2)
        half = 0.5 * np.sum((y / scale_y) ** 2)
        with jax.enable_x64(wide):
            found = claims(x, y, gamma, (2, 3))
        for name, solution in found.items():
            slack = Decimal(2e-14 * half) * Decimal(scale_y) ** 2
            assert Decimal(float(solution.dual)) <= optimum + slack, name
            assert Decimal(float(solution.primal)) >= optimum - slack, name
            gap = float(solution.relative_gap)
            claimed = Decimal(gap * half) * Decimal(scale_y) ** 2
            assert Decimal(float(solution.primal)) - optimum <= claimed + slack, name
            certain = kind not in ("product", "nearly", "rounded")
            if certain and not (name == "traced" and kind in ("same rows", "sum of rows")):
                assert gap <= 1e-9, name
                assert int(solution.unresolved) == 0
            if kind == "rounded":
                assert gap <= 1e-4
            if kind == "product":
                assert int(solution.unresolved) == 2


def test_a_row_of_another_size_is_no_rounding():
    """Whatever the unit of a feature, the network may use it."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 10000))
    for unit in (1e-5, 1e-20, 1e-150, 1e150):
        given = x * np.array([[1.0], [unit]])
        y = 1e5 * x[1:2] * 1e-5
        found = spectral.solve(given, y, gamma=1.0, widths=(2,))
        by_blocks = solve_columns(in_blocks(given, y, 3000), gamma=1.0, widths=(2,)).solution
        for solution in (found, by_blocks):
            np.testing.assert_allclose(solution.primal, 98.8998, rtol=1e-6)
            assert float(solution.relative_gap) < 1e-12
            assert all(w.dtype == np.float64 for w in solution.weights)


def test_float32_data_of_low_rank_have_the_rank_that_they_have():
    rng = np.random.default_rng(5)
    for _ in range(3):
        x = rng.standard_normal((40, 5)).astype(np.float32) @ rng.standard_normal((5, 400)).astype(np.float32)
        y = rng.standard_normal((3, 400)).astype(np.float32)
        optimum = exact_optimum(x, y, 1.0, 3)
        found = spectral.solve(x, y, gamma=1.0, widths=(3,))
        by_blocks = solve_columns(in_blocks(x, y, 150), gamma=1.0, widths=(3,)).solution
        for solution in (found, by_blocks):
            np.testing.assert_allclose(solution.primal, optimum, rtol=1e-6)
            np.testing.assert_allclose(solution.dual, optimum, rtol=1e-6)
            assert float(solution.dual) <= optimum
        traced = traced_solve((3,))(x, y, 1.0)
        assert float(traced.dual) <= optimum <= float(traced.primal)


def test_what_rounding_hides_is_charged_and_told(rng):
    x, y = rng.normal(size=(5, 2)) @ rng.normal(size=(2, 50)), rng.normal(size=(3, 50))
    found = spectral.solve(x, y, gamma=0.5, widths=(2, 3))
    assert int(found.unresolved) == 3
    assert float(found.dual) <= exact_optimum(x, y, 0.5, 2) <= float(found.primal)
    assert float(found.relative_gap) > 0.1
    # Y that has nothing outside what X resolves is not charged.
    inside = y @ np.linalg.pinv(x, rcond=1e-10) @ x
    found = spectral.solve(x, inside, gamma=0.5, widths=(2, 3))
    assert float(found.relative_gap) < 1e-9


@pytest.mark.parametrize("rtol", [1e-3, 1e-1])
def test_a_coarser_cut_means_the_same_everywhere(rng, rtol):
    for condition in (10.0, 1e4):
        x, y = conditioned(rng, 6, 4, 60, condition, np.float64)
        given: dict[str, Any] = {"gamma": 0.3, "widths": (3, 4), "rtol": rtol}
        one = spectral.solve(x, y, **given)
        two = solve_columns(in_blocks(x, y, 17), tolerance=0.999, **given).solution
        path = spectral.regularisation_path(x, y, gammas=np.array([0.3]), widths=(3, 4), rtol=rtol)
        exact = exact_optimum(x, y, 0.3, 3)
        for found in (one, two, jax.tree.map(lambda a: a[0], path)):
            np.testing.assert_allclose(found.primal, one.primal, rtol=1e-9)
            np.testing.assert_allclose(found.dual, exact, rtol=1e-9)
            assert float(found.dual) <= exact * (1 + 1e-14)
            np.testing.assert_allclose(found.primal, primal_value(found.weights, x, y, 0.3), rtol=1e-9)


# --- range and refusal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_problem_is_homogeneous_at_every_size(rng, dtype):
    x, y = rng.normal(size=(3, 8)).astype(dtype), rng.normal(size=(2, 8)).astype(dtype)
    plain = spectral.solve(x, y, gamma=0.5, widths=(2, 3))
    powers = (-120, -80, 0, 80, 120) if dtype is np.float32 else (-500, -300, 0, 300, 500)
    for a, b in itertools.product(powers, repeat=2):
        for found in (
            spectral.solve(np.ldexp(x, a), np.ldexp(y, b), gamma=np.ldexp(0.5, b), widths=(2, 3)),
            solve_columns([(np.ldexp(x, a), np.ldexp(y, b))], gamma=np.ldexp(0.5, b), widths=(2, 3)).solution,
        ):
            np.testing.assert_allclose(np.ldexp(found.primal, -2 * b), plain.primal, rtol=1e-6)
            np.testing.assert_allclose(np.ldexp(found.dual, -2 * b), plain.dual, rtol=1e-6)
            assert 0 <= abs(float(found.relative_gap)) < 1e-6
            assert bool(found.theorem_applies) == bool(plain.theorem_applies)
            np.testing.assert_allclose(
                np.ldexp(found.dual_variable.coefficients, a - b), plain.dual_variable.coefficients, rtol=1e-5
            )


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_values_out_of_range_are_refused(rng, size):
    x, y = rng.normal(size=(3, 8)), size * rng.normal(size=(2, 8))
    with pytest.raises(SpectralError, match=r"leave the range of the numbers: there is no certificate; multiply y and"):
        spectral.solve(x, y, gamma=0.1 * size, widths=(2,))
    with pytest.raises(SpectralError, match="leave the range of the numbers"):
        spectral.regularisation_path(x, y, gammas=np.array([0.1 * size]), widths=(2,))
    with pytest.raises(SpectralError, match="leave the range of the numbers"):
        solve_columns(in_blocks(x, y), gamma=0.1 * size, widths=(2,))


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_a_traced_result_out_of_range_is_no_certificate(rng, size):
    x, y = rng.normal(size=(3, 8)).astype(np.float32), (size * rng.normal(size=(2, 8))).astype(np.float32)
    optimum = float(spectral.solve(x, y, gamma=0.1 * size, widths=(2,)).primal)
    found = jax.jit(lambda a, b: spectral.solve(a, b, gamma=0.1 * size, widths=(2,)))(x, y)
    assert np.isnan(found.relative_gap)
    assert not bool(found.theorem_applies)
    assert any("no certificate" in reason for reason in found.reasons())
    assert float(found.dual) <= optimum <= float(found.primal)


def test_a_traced_claim_is_rounded_outwards(rng):
    solve = traced_solve((2, 3))
    for _ in range(20):
        x, y = (rng.normal(size=s).astype(np.float32) for s in ((3, 8), (2, 8)))
        gamma = np.float32(rng.uniform(0, 2))
        found = solve(x, y, gamma)
        assert found.primal.dtype == found.weights[0].dtype == np.float32
        assert float(found.dual) <= float(rational_optimum(x, y, float(gamma), 2)) <= float(found.primal)


@pytest.mark.parametrize("place", ["x", "y"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(rng, place, value):
    data = {"x": rng.normal(size=(3, 8)), "y": rng.normal(size=(2, 8))}
    data[place][1, 2] = value
    for solver in (
        lambda: spectral.solve(data["x"], data["y"], gamma=0.1, widths=(2,)),
        lambda: spectral.regularisation_path(data["x"], data["y"], gammas=np.array([0.1]), widths=(2,)),
        lambda: solve_columns(in_blocks(data["x"], data["y"], 3), gamma=0.1, widths=(2,)),
    ):
        with pytest.raises(SpectralError, match=f"{place} holds values that are not finite"):
            solver()


def test_float64_is_honoured_by_every_function_in_32_bit_mode(rng):
    assert not jax.config.jax_enable_x64
    x, y = rng.normal(size=(3, 8)), rng.normal(size=(2, 8))
    weights = [rng.normal(size=s) for s in ((4, 3), (2, 4))]
    assert float(spectral.objective(weights, x, y, 0.3)) == pytest.approx(primal_value(weights, x, y, 0.3), rel=1e-14)
    assert np.asarray(spectral.with_bias(x)).dtype == np.float64
    images = rng.normal(size=(2, 4, 4, 1))
    assert np.asarray(spectral.patches(images, (2, 2))).dtype == np.float64
    sigma = np.linalg.svd(x, compute_uv=False)
    assert float(spectral.schatten_power(x, 3)) == pytest.approx(np.sum(sigma**3), rel=1e-14)
    assert float(spectral.r_norm_squared(x, 2)) == pytest.approx(np.sum(sigma[:2] ** 2), rel=1e-14)
    clipped = np.asarray(spectral.clip_singular_values(x, float(sigma[1])))
    np.testing.assert_allclose(np.linalg.svd(clipped, compute_uv=False), np.minimum(sigma, sigma[1]), rtol=1e-13)
    assert np.asarray(spectral.prox_r_norm(x, 2)).dtype == np.float64


# --- derivatives of the optimum ---------------------------------------------------------------------------------------


def optimum_of(x: np.ndarray, y: np.ndarray, gamma: float, r: int) -> float:
    sigma = np.linalg.svd(in_row_space(y, x, 1e-12), compute_uv=False)
    return float(0.5 * np.sum(y**2) - 0.5 * np.sum(np.maximum(sigma[:r] - gamma, 0) ** 2))


def spectrum_data(rng: np.random.Generator, sigma: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """X, and Y whose Yt has these singular values."""
    x = rng.normal(size=(4, 9))
    basis = np.linalg.qr(x.T)[0].T
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    outside = rng.normal(size=(3, 9))
    outside -= outside @ basis.T @ basis
    return x, (turn * sigma) @ basis[:3] + outside


@functools.cache
def slopes_of(which: str, widths: tuple[int, ...]) -> Any:
    """`(x, y, gamma) -> their gradients`, of the primal or the dual optimum."""
    return jax.grad(lambda x, y, gamma: getattr(spectral.solve(x, y, gamma=gamma, widths=widths), which), (0, 1, 2))


@functools.cache
def compiled_slopes_of(which: str, widths: tuple[int, ...]) -> Any:
    return jax.jit(slopes_of(which, widths))


@pytest.mark.parametrize("wide", [False, True], ids=["32 bit mode", "64 bit mode"])
@pytest.mark.parametrize(
    ("sigma", "gamma"),
    [
        ([3.0, 2.0, 1.0], 0.5),
        ([3.0, 2.0, 1.0], 2.0),
        ([3.0, 2.0, 2.0], 2.0),
        ([2.0, 2.0, 2.0], 0.7),
        ([2.0, 0.0, 0.0], 0.5),
        ([3.0, 2.0, 1.0], 9.0),
        ([0.0, 0.0, 0.0], 0.0),
        ([1.79, 0.53, 0.1], 1.16),
    ],
)
def test_the_derivatives_of_the_optimum_are_those_of_finite_differences(rng, sigma, gamma, wide):
    x, y = spectrum_data(rng, sigma)
    step, tight = 1e-5, 1e-8 if wide else 2e-6
    for widths in ((3,), (4, 5, 3)):
        with jax.enable_x64(wide):
            dtype = jnp.float64 if wide else jnp.float32
            given = jnp.asarray(x, dtype), jnp.asarray(y, dtype), jnp.asarray(gamma, dtype)
            for which in ("primal", "dual"):
                slopes = compiled_slopes_of(which, widths)(*given)
                if sigma == [3.0, 2.0, 2.0]:  # a tie, operation by operation too
                    for one, other in zip(slopes_of(which, widths)(*given), slopes, strict=True):
                        np.testing.assert_allclose(one, other, atol=1e-5)
                dx, dy = rng.normal(size=x.shape), rng.normal(size=y.shape)
                expected = [
                    (optimum_of(x + step * dx, y, gamma, 3) - optimum_of(x - step * dx, y, gamma, 3)) / (2 * step),
                    (optimum_of(x, y + step * dy, gamma, 3) - optimum_of(x, y - step * dy, gamma, 3)) / (2 * step),
                ]
                unit = 1 + np.linalg.norm(y) * np.linalg.norm(dx)
                assert abs(np.sum(np.asarray(slopes[0]) * dx) - expected[0]) <= max(tight, 1e-4 * step) * unit * 10
                assert abs(np.sum(np.asarray(slopes[1]) * dy) - expected[1]) <= max(tight, 10 * step) * unit
                assert float(slopes[2]) == pytest.approx(np.sum(np.maximum(np.array(sigma) - gamma, 0)), abs=1e-5)


def test_a_path_of_regularisations_differentiates_term_by_term(rng, x64):
    x, y = spectrum_data(rng, [3.0, 2.0, 1.0])
    gammas = np.array([0.0, 1.0, 2.5, 4.0])
    slopes = jax.jacrev(lambda g: spectral.regularisation_path(x, y, gammas=g, widths=(2,)).primal)(gammas)
    expected = np.maximum(np.array([3.0, 2.0])[None, :] - gammas[:, None], 0).sum(axis=1)
    np.testing.assert_allclose(slopes, np.diag(expected), atol=1e-12)


def test_a_scaled_problem_has_scaled_derivatives(rng, x64):
    x, y = spectrum_data(rng, [3.0, 2.0, 1.0])
    for a, b in ((1e-120, 1e120), (1e120, 1e-120)):
        slopes = jax.grad(lambda *d: spectral.solve(d[0], d[1], gamma=d[2], widths=(2,)).primal, (0, 1, 2))(
            a * x, b * y, 0.7 * b
        )
        plain = jax.grad(lambda *d: spectral.solve(d[0], d[1], gamma=d[2], widths=(2,)).primal, (0, 1, 2))(x, y, 0.7)
        for found, expected, unit in zip(slopes, plain, (b * b / a if a > 1 else None, b, b), strict=True):
            if unit is not None and np.isfinite(unit) and unit > 0:
                np.testing.assert_allclose(np.asarray(found) / unit, expected, rtol=1e-6, atol=1e-9)


def test_weights_at_the_kinks_have_derivatives_that_are_numbers(rng, x64):
    x, y = spectrum_data(rng, [3.0, 2.0, 1.0])
    slope = jax.grad(lambda g: jnp.sum(spectral.solve(x, y, gamma=g, widths=(3,)).weights[0] ** 2))(1.5)
    assert np.isfinite(slope)


def _second_order(rng):
    x = rng.standard_normal((4, 9))
    y = rng.standard_normal((3, 4)) @ x + 0.3 * rng.standard_normal((3, 9))
    yield x, y, 0.7, (3,)
    yield x, y, 0.7, (1,)  # the rank is cut
    yield x, y, 100.0, (3,)  # nothing is kept
    yield np.eye(3, 7), 2 * np.eye(3, 7) + 0.5 * np.eye(3, 7, 4), 0.5, (3,)  # all singular values coincide
    x = rng.standard_normal((3, 8))
    yield x, np.outer([1.0, 2.0], x[0]), 0.3, (3,)  # of rank one
    yield x[:2], rng.standard_normal((6, 8)), 0.4, (3, 3)  # more outputs than inputs
    yield np.vstack([x, x[:1]]), rng.standard_normal((2, 8)), 0.4, (3,)  # of dependent rows: along data that stay so


@pytest.mark.parametrize("which", ["primal", "dual"])
def test_second_derivatives_of_the_optimum_are_those_of_finite_differences(rng, x64, which):
    for x, y, gamma, widths in _second_order(rng):
        dx, dy, dgamma = rng.standard_normal(x.shape), rng.standard_normal(y.shape), 1.3
        if len(x) == 4 and (x[0] == x[3]).all():
            dx[3] = dx[0]
        slopes = jax.jit(slopes_of(which, widths))
        along = jax.jvp(slopes, (x, y, gamma), (dx, dy, dgamma))[1]
        step = 1e-4
        ahead = slopes(x + step * dx, y + step * dy, gamma + step * dgamma)
        behind = slopes(x - step * dx, y - step * dy, gamma - step * dgamma)
        for found, a, b in zip(along, ahead, behind, strict=True):
            np.testing.assert_allclose(found, (a - b) / (2 * step), rtol=1e-5, atol=1e-5)


def test_second_derivatives_in_gamma_are_minus_the_rank_in_both_modes(rng):
    x, y = spectrum_data(rng, [3.0, 2.0, 1.0])
    for double in (False, True):
        with jax.enable_x64(double):

            def optimum(gamma):
                return spectral.solve(x, y, gamma=gamma, widths=(3,)).primal

            for gamma, rank in ((0.5, 3), (1.5, 2), (2.5, 1), (4.0, 0)):
                for twice in (jax.grad(jax.grad(optimum)), jax.jacfwd(jax.jacfwd(optimum)), jax.hessian(optimum)):
                    assert float(twice(gamma)) == -rank


def test_an_optimum_that_jumps_has_no_second_derivative(rng, x64):
    x, y = spectrum_data(rng, [2.0, 2.0, 1.0])  # the first and the second meet above gamma, and r = 1
    twice = jax.jvp(
        lambda y: jax.grad(lambda y: spectral.solve(x, y, gamma=0.5, widths=(1,)).primal)(y), (y,), (y + 1,)
    )
    assert not np.isfinite(twice[1]).all() or np.abs(twice[1]).max() > 1e6
