"""Theorem 2 in memory: problem (4), its certificate, three routes to the optimum, and first maps that are affine."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from jax import lax
from scipy.optimize import minimize
from spectral_oracles import conditioned, dual_value, in_row_space, primal_value

from dualgap_jax import spectral
from dualgap_jax.registry import UnknownNameError
from dualgap_jax.spectral import SpectralError, reduction, scaling, solvers

TOLERANCE = {np.float64: 1e-10, np.float32: 1e-5}


@pytest.fixture
def unchecked() -> Iterator[None]:
    """The package as users have it: without shape checks that would come before its own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def random_data(rng: np.random.Generator, d_0: int, d_H: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(size=(d_0, n)), rng.normal(size=(d_H, n))


def random_layers(rng: np.random.Generator, sizes: Any, scale: float = 1.0) -> list[Any]:
    return [jnp.asarray(scale * rng.normal(size=(b, a))) for a, b in itertools.pairwise(sizes)]


# --- the problem ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(5, 3, 4), (4, 6, 2, 3), (3, 2, 5, 4, 3, 2)])
@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_the_objective_is_problem_4(rng, x64, sizes, gamma):
    for _ in range(3):
        x, y = random_data(rng, sizes[0], sizes[-1], 7)
        weights = random_layers(rng, sizes)
        expected = primal_value(weights, x, y, gamma)
        np.testing.assert_allclose(spectral.objective(weights, jnp.asarray(x), jnp.asarray(y), gamma), expected, 1e-12)
        np.testing.assert_allclose(spectral.objective([np.asarray(w) for w in weights], x, y, gamma), expected, 1e-12)


@pytest.mark.parametrize(
    "shapes", [[(4, 5)], [(3, 5), (4, 2)], [(3, 4), (4, 3)], [(3, 5), (3, 3)]], ids=["one", "inner", "d_0", "d_H"]
)
def test_the_objective_names_weights_that_do_not_chain(rng, shapes):
    x, y = random_data(rng, 5, 4, 6)
    with pytest.raises(SpectralError, match=r"do not make a network from d_0=5 to d_H=4: give H >= 2") as caught:
        spectral.objective([jnp.ones(s) for s in shapes], jnp.asarray(x), jnp.asarray(y), 0.1)
    assert str(shapes) in str(caught.value)


def special_matrix(rng: np.random.Generator, kind: str) -> np.ndarray:
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (4, 3))
    sigma = {"generic": [3.0, 2.0, 0.5], "repeated": [2.0, 2.0, 1.0], "zeros": [1.5, 0.0, 0.0], "equal": [1.0] * 3}
    return (left[:, :3] * sigma[kind]) @ right if kind != "nought" else np.zeros((4, 3))


@pytest.mark.parametrize("kind", ["generic", "repeated", "zeros", "equal", "nought"])
def test_the_gradient_of_the_schatten_power_is_that_of_finite_differences(rng, x64, kind):
    m = special_matrix(rng, kind)
    step = 1e-4
    for power in (2, 3, 5):
        for matrix in (m, m.T):
            gradient = jax.grad(spectral.schatten_power)(jnp.asarray(matrix), power)
            for direction in rng.normal(size=(4, *matrix.shape)):

                def along(t, matrix=matrix, direction=direction, power=power):
                    return np.sum(np.linalg.svd(matrix + t * direction, compute_uv=False) ** power)

                slope = (along(step) - along(-step)) / (2 * step)
                _, tangent = jax.jvp(
                    lambda a, power=power: spectral.schatten_power(a, power),
                    (jnp.asarray(matrix),),
                    (jnp.asarray(direction),),
                )
                np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, 1e-5, atol=1e-5)
                np.testing.assert_allclose(tangent, slope, 1e-5, atol=1e-5)


def test_the_schatten_power_maps_over_a_batch(rng, x64):
    batch = jnp.asarray(np.stack([special_matrix(rng, k) for k in ("generic", "repeated", "zeros", "nought")]))
    run = jax.jit(jax.vmap(jax.value_and_grad(lambda m: spectral.schatten_power(m, 3))))
    values, gradients = run(batch)
    for matrix, value, gradient in zip(batch, values, gradients, strict=True):
        expected = jax.value_and_grad(lambda m: spectral.schatten_power(m, 3))(matrix)
        np.testing.assert_allclose(value, expected[0], 1e-12, atol=1e-14)
        np.testing.assert_allclose(gradient, expected[1], 1e-10, atol=1e-12)
        np.testing.assert_allclose(value, np.sum(np.linalg.svd(matrix, compute_uv=False) ** 3), 1e-12, atol=1e-14)


def test_the_r_norm_counts_the_largest_singular_values(rng, x64):
    m = rng.normal(size=(4, 6))
    sigma = np.linalg.svd(m, compute_uv=False)
    for r in (1, 2, 4, 9):
        np.testing.assert_allclose(spectral.r_norm_squared(jnp.asarray(m), r), np.sum(sigma[:r] ** 2), 1e-12)


# --- the closed form ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """Data of one kind; `gammas` are in units of the singular values of Yt, see `scaled_gammas`."""

    name: str
    widths: tuple[int, ...] = (3,)
    sizes: tuple[int, int, int] = (5, 4, 12)
    kind: str = "plain"
    scale: tuple[float, float] = (1.0, 1.0)


CASES = [
    Case("plain"),
    Case("three layers", (3, 4)),
    Case("d_min 1", (4, 1, 3)),
    Case("uneven bottlenecks", (7, 2, 5, 3)),
    Case("ten layers", (4, 5, 4, 6, 3, 4, 9, 4, 4)),
    Case("wider than the data", (20, 9)),
    Case("d_min above the rank", (4, 4), kind="low rank y"),
    Case("x with zero and repeated rows", (3, 4), kind="zero rows"),
    Case("few examples", (4, 4), (9, 4, 6)),
    Case("one example", (3,), (5, 4, 1)),
    Case("one feature, one output", (2, 2), (1, 1, 8)),
    Case("many examples", (3, 4), (5, 4, 400)),
    Case("more outputs than inputs", (6, 5), (3, 8, 10)),
    Case("repeated singular values", (3, 4), kind="repeated"),
    Case("y = 0", (3, 4), kind="y = 0"),
    Case("x = 0", (3, 4), kind="x = 0"),
    Case("y outside the row space", (3, 4), kind="orthogonal"),
    Case("small x, large y", (3, 4), scale=(1e-6, 1e6)),
    Case("large x, small y", (3, 4), scale=(1e6, 1e-6)),
]


def data_of(case: Case, rng: np.random.Generator, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    d_0, d_H, n = case.sizes
    x, y = random_data(rng, d_0, d_H, n)
    if case.kind == "low rank x":
        x = rng.normal(size=(d_0, 2)) @ rng.normal(size=(2, n))
    elif case.kind == "zero rows":
        x[1], x[3] = 0, x[0]
    elif case.kind == "low rank y":
        y = rng.normal(size=(d_H, 1)) @ rng.normal(size=(1, d_0)) @ x
    elif case.kind == "repeated":
        right = np.linalg.qr(x.T)[0].T[:d_H]
        y = np.linalg.qr(rng.normal(size=(d_H, d_H)))[0] @ (np.array([3.0, 2.0, 2.0, 2.0])[:, None] * right)
    elif case.kind == "orthogonal":
        for _ in range(2):
            y = y - in_row_space(y, x, 1e-12)
    elif case.kind in ("y = 0", "x = 0"):
        x, y = (x, 0 * y) if case.kind == "y = 0" else (0 * x, y)
    return (case.scale[0] * x).astype(dtype), (case.scale[1] * y).astype(dtype)


def scaled_gammas(y: np.ndarray, x: np.ndarray, rcond: float) -> list[float]:
    """0, below the smallest singular value of Yt, exactly at the second, and above all of them."""
    sigma = np.linalg.svd(in_row_space(y, x, rcond), compute_uv=False)
    return [0.0, 0.5 * sigma[-1], sigma[min(1, len(sigma) - 1)], 0.5 * sigma[0], 1.01 * sigma[0] + 0.1]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_closed_form_is_certified(rng, case, dtype):
    tolerance, rcond = TOLERANCE[dtype], 1e-12 if dtype is np.float64 else 1e-5
    d_0, d_H, _ = case.sizes
    r = min(*case.widths, *case.sizes)
    with jax.enable_x64(dtype is np.float64):
        for _ in range(3):
            x, y = data_of(case, rng, dtype)
            half = 0.5 * np.sum(np.asarray(y, np.float64) ** 2)
            unit = half + np.finfo(np.float32).tiny
            for gamma in scaled_gammas(y, x, rcond):
                found = spectral.solve(x, y, gamma=gamma, widths=case.widths)
                assert [w.shape for w in found.weights] == [
                    (b, a) for a, b in itertools.pairwise((d_0, *case.widths, d_H))
                ]
                assert all(leaf.dtype == np.float64 for leaf in (*found.weights, found.primal, found.dual, found.gamma))
                assert np.isfinite(jax.tree.leaves(jax.tree.map(np.sum, found))).all()
                gamma = float(found.gamma)
                primal = primal_value(found.weights, x, y, gamma)
                dual = dual_value(
                    found.dual_variable.materialise(jnp.asarray(x)), x, y, gamma, r, rcond=rcond, slack=tolerance
                )
                assert abs(primal - dual) <= tolerance * unit
                assert abs(float(found.relative_gap)) <= tolerance
                assert abs(float(found.primal) - primal) <= tolerance * unit
                assert abs(float(found.dual) - dual) <= tolerance * unit
                sigma = np.linalg.svd(in_row_space(y, x, rcond), compute_uv=False)[: min(case.sizes)]
                atol = np.sqrt(unit) * (1e-12 if dtype is np.float64 else 1e-5)
                np.testing.assert_allclose(found.singular_values, sigma, rtol=tolerance, atol=atol)
                clear = np.abs(sigma - gamma) > 100 * atol
                if clear[:r].all():
                    assert int(found.rank) == np.sum(sigma[:r] > gamma)


@pytest.mark.parametrize("kind", ["low rank y", "orthogonal", "y = 0"])
def test_rounding_is_no_singular_value(rng, x64, kind):
    """Yt is computed from Y: what is small against Y is rounding, also where it is all there is."""
    for _ in range(5):
        x, y = data_of(Case("", kind=kind), rng, np.float64)
        if kind == "low rank y":
            y = y + 1e3 * data_of(Case("", kind="orthogonal"), rng, np.float64)[1]
            y = y - in_row_space(y, x, 1e-12) + in_row_space(data_of(Case("", kind=kind), rng, np.float64)[1], x, 1e-12)
            y = np.outer(y[:, 0], y[0]) @ np.linalg.pinv(x) @ x + 1e3 * (y - in_row_space(y, x, 1e-12))
        found = spectral.solve(x, y, gamma=0.0, widths=(4, 4))
        expected = np.linalg.svd(in_row_space(y, x, 1e-12), compute_uv=False)
        if kind == "low rank y":
            np.testing.assert_allclose(found.sigma_min, expected[0], 1e-10)
            assert int(found.rank) == 1
        else:
            assert float(found.sigma_min) == 0
            assert int(found.rank) == 0
            assert not bool(found.theorem_applies)


def test_gamma_above_everything_gives_the_zero_network(rng, x64):
    x, y = random_data(rng, 5, 4, 12)
    found = spectral.solve(x, y, gamma=100.0, widths=(3,))
    assert int(found.rank) == 0
    assert all(np.all(np.asarray(w) == 0) for w in found.weights)
    np.testing.assert_allclose([found.primal, found.dual], 0.5 * np.sum(y**2), 1e-14)


def test_a_cut_of_x_does_not_make_the_certificate_lie(rng, x64):
    """With a coarse rtol the weights leave directions of X alone; the lower bound must still count them."""
    for _ in range(5):
        x, y = conditioned(rng, 5, 4, 12, 1e4, np.float64)
        exact = spectral.solve(x, y, gamma=0.1, widths=(3, 4))
        cut = spectral.solve(x, y, gamma=0.1, widths=(3, 4), rtol=1e-2)
        assert float(cut.dual) <= float(exact.primal) + 1e-12
        loss = primal_value(cut.weights, x, y, 0.1) - float(exact.primal)
        assert loss > 1e-3
        assert float(cut.primal - cut.dual) >= loss - 1e-10
        assert np.linalg.norm(cut.weights[0]) < 0.1 * np.linalg.norm(exact.weights[0])


def test_ill_conditioned_data_in_float64(rng, x64):
    for condition in (1e2, 1e5, 1e7):
        x, y = conditioned(rng, 5, 4, 12, condition, np.float64)
        found = spectral.solve(x, y, gamma=0.1, widths=(3, 4))
        assert abs(float(found.relative_gap)) <= 1e-9
        # the allowance for rounding grows with the condition number, and only lifts the primal value
        evaluated = primal_value(found.weights, x, y, 0.1)
        assert evaluated * (1 - 1e-9) <= found.primal <= evaluated * (1 + 1e-12 + 1e-15 * condition)


# --- any weights, any dual variable ---------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(3,), (2, 6), (4, 4, 4)])
def test_weak_duality_for_any_weights_and_any_dual_variable(rng, x64, widths):
    sizes = (5, *widths, 4)
    value = jax.jit(spectral.objective)
    for _ in range(20):
        x, y = random_data(rng, 5, 4, 12)
        gamma = rng.uniform(0, 5)
        weights = random_layers(rng, sizes, rng.choice([0.05, 0.3, 1.0]))
        dual = rng.normal(size=(4, 5)) @ x
        dual *= rng.uniform(0, gamma) / np.linalg.norm(dual, 2)
        below = dual_value(dual, x, y, gamma, min(sizes), rcond=1e-12, slack=1e-12)
        found = spectral.solve(x, y, gamma=gamma, widths=widths)
        assert float(value(weights, jnp.asarray(x), jnp.asarray(y), gamma)) >= float(found.dual)
        assert below <= float(found.dual) + 1e-10
        assert primal_value(weights, x, y, gamma) >= below


def scaled_problem(x, y, gamma, widths):
    """The problem that the methods work on, in a unit of its own, and the power of two of its values."""
    powers = scaling.powers_of(x, y, len(widths) + 1)
    x, y = scaling.shift(x, -powers.rows[:, None]), scaling.shift(y, -powers.targets)
    reduced = reduction.reduce_rows(jnp.asarray(x), jnp.asarray(y))
    gamma = jnp.asarray(scaling.shift(float(gamma), -powers.targets))
    return reduction.Problem(jnp.asarray(x), jnp.asarray(y), gamma, widths, reduced, powers, "float64")


def test_a_dual_variable_that_is_too_large_is_shrunk_to_a_feasible_one(rng, x64):
    for _ in range(5):
        x, y = random_data(rng, 5, 4, 12)
        problem = scaled_problem(x, y, 0.8, (3,))
        rows, unit = problem.powers
        optimum = float(spectral.solve(x, y, gamma=0.8, widths=(3,)).primal)
        for scale in (0.0, 1e-3, 1.0, 1e3):
            raw = jnp.asarray(scale * rng.normal(size=(4, 5)))
            value, coefficients = solvers.dual_value(problem, raw)
            value, coefficients = value * 4.0**unit, coefficients * 2.0 ** (unit - rows)[None, :]
            expected = dual_value(coefficients @ x, x, y, 0.8, 3, rcond=1e-12, slack=1e-12)
            np.testing.assert_allclose(value, expected, 1e-10)
            assert float(value) <= optimum + 1e-10


def test_the_dual_variable_materialises_by_columns(rng, x64):
    x, y = random_data(rng, 5, 4, 12)
    found = spectral.solve(x, y, gamma=0.8, widths=(3,))
    whole = found.dual_variable.materialise(jnp.asarray(x))
    assert whole.shape == (4, 12)
    parts = [found.dual_variable.materialise(jnp.asarray(x[:, i : i + 5])) for i in range(0, 12, 5)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, 1e-13)
    yt = in_row_space(y, x, 1e-12)
    left, sigma, right = np.linalg.svd(yt, full_matrices=False)
    np.testing.assert_allclose(whole, (left * np.minimum(sigma, 0.8)) @ right, atol=1e-12)


# --- the proximal operator ------------------------------------------------------------------------------------------


def prox_by_a_convex_program(z: np.ndarray, r: int, step: float) -> np.ndarray:
    """The same minimum over singular values: the sum of the r largest squares is the largest sum over r of them."""
    subsets = np.array([[i in s for i in range(len(z))] for s in itertools.combinations(range(len(z)), r)], float)
    solved = minimize(
        lambda v: step / 2 * v[-1] + 0.5 * np.sum((v[:-1] - z) ** 2),
        np.append(z, np.sum(np.sort(z**2)[-r:])),
        jac=lambda v: np.append(v[:-1] - z, step / 2),
        constraints={
            "type": "ineq",
            "fun": lambda v: v[-1] - subsets @ v[:-1] ** 2,
            "jac": lambda v: np.hstack([-2 * subsets * v[:-1], np.ones((len(subsets), 1))]),
        },
        bounds=[(0, None)] * (len(z) + 1),
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-15},
    )
    assert solved.status in (0, 8), solved.message  # 8: no further descent within rounding
    return solved.x[:-1]


SPECTRA = {
    "spread": lambda rng: rng.uniform(0, 3, 4),
    "close": lambda rng: 1 + 0.1 * rng.uniform(size=4),
    "ties at the top": lambda rng: np.array([2.0, 2.0, 2.0, 0.5]),
    "ties at the bottom": lambda rng: np.array([2.0, 1.0, 1.0, 1.0]),
    "all equal": lambda rng: np.full(4, 1.5),
    "with zeros": lambda rng: np.array([1.0, 0.9, 0.0, 0.0]),
    "nought": lambda rng: np.zeros(4),
}
prox = jax.jit(spectral.prox_r_norm, static_argnames="r")


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_proximal_operator_is_a_convex_minimum(rng, x64, spectrum):
    for step in (0.2, 1.0, 5.0):
        z = np.sort(SPECTRA[spectrum](rng))[::-1]
        left, right = np.linalg.qr(rng.normal(size=(6, 4)))[0], np.linalg.qr(rng.normal(size=(4, 4)))[0]
        matrix = (left * z) @ right
        for r in (1, 2, 3, 4, 7):
            found = np.asarray(prox(jnp.asarray(matrix), r=r, step=step))
            expected = prox_by_a_convex_program(z, min(r, 4), step)
            np.testing.assert_allclose(np.linalg.svd(found, compute_uv=False), np.sort(expected)[::-1], atol=1e-4)

            def cost(m, r=r, step=step, matrix=matrix):
                return step / 2 * np.sum(np.linalg.svd(m, compute_uv=False)[:r] ** 2) + 0.5 * np.sum((m - matrix) ** 2)

            best = cost(found)
            for size in (1e-6, 1e-4, 1e-2, 1.0):
                for direction in rng.normal(size=(8, *matrix.shape)):
                    # Strong convexity: the cost grows by at least half the squared distance from the minimum.
                    other = found + size * direction
                    assert cost(other) >= best + 0.5 * np.sum((size * direction) ** 2) * (1 - 1e-6) - 1e-13


def test_the_proximal_operator_does_not_expand(rng, x64):
    for _ in range(20):
        a, b = rng.normal(size=(2, 6, 4))
        b = rng.choice([a + 1e-3 * b, b])
        for r in (1, 2, 3):
            moved = np.asarray(prox(jnp.asarray(a), r=r, step=1.0)) - np.asarray(prox(jnp.asarray(b), r=r, step=1.0))
            # Firmly: <moved, a - b> >= ||moved||^2.
            assert np.sum(moved * (a - b)) >= np.sum(moved**2) - 1e-12


def test_the_proximal_operator_at_its_edges(rng, x64):
    m = jnp.asarray(rng.normal(size=(6, 4)))
    np.testing.assert_allclose(prox(m, r=2, step=0.0), m, atol=1e-13)
    np.testing.assert_allclose(prox(m, r=4, step=3.0), m / 4, atol=1e-13)
    np.testing.assert_allclose(prox(m.T, r=2, step=1.0), prox(m, r=2, step=1.0).T, atol=1e-12)
    batch = jnp.stack([m, 0 * m, 2 * m])
    for one, mapped in zip(batch, jax.vmap(lambda a: prox(a, r=2, step=1.0))(batch), strict=True):
        np.testing.assert_allclose(mapped, prox(one, r=2, step=1.0), atol=1e-13)
    with pytest.raises(SpectralError, match="r=0 must be at least 1"):
        spectral.prox_r_norm(m, 0)
    for step in (-1.0, np.nan, np.inf, np.ones(2)):
        with pytest.raises(SpectralError, match=r"step=.* at least 0"):
            spectral.prox_r_norm(m, 2, step)


def test_norms_and_ceilings_that_are_none_are_refused(unchecked, rng):
    m = rng.normal(size=(3, 4))
    for r in (-1, -3):  # not all singular values but the last
        with pytest.raises(SpectralError, match=f"r={r} must be at least 0"):
            spectral.r_norm_squared(m, r)
    for power in (0, -1):
        with pytest.raises(SpectralError, match=f"power={power} must be at least 1"):
            spectral.schatten_power(m, power)
    for ceiling in (-1.0, np.nan, np.ones(2)):
        with pytest.raises(SpectralError, match=r"ceiling=.* at least 0"):
            spectral.clip_singular_values(m, ceiling)
    assert spectral.r_norm_squared([[3.0, 0.0]], 1) == pytest.approx(9.0)


def test_clipping_is_the_projection(rng, x64):
    for ceiling in (0.0, 0.5, 1.5, 100.0):
        m = rng.normal(size=(4, 6))
        nearest = np.asarray(spectral.clip_singular_values(jnp.asarray(m), ceiling))
        assert np.linalg.norm(nearest, 2) <= ceiling + 1e-12
        for other in rng.normal(size=(20, 4, 6)):
            other *= rng.uniform(0, ceiling) / np.linalg.norm(other, 2)
            assert np.sum((m - nearest) * (other - nearest)) <= 1e-12


# --- Douglas-Rachford and gradient descent --------------------------------------------------------------------------

ROUTES = [
    Case("plain"),
    Case("d_min 1", (4, 1)),
    Case("deficient", (3, 4), kind="low rank x"),
    Case("tie", (2,), kind="repeated"),
]


@pytest.mark.parametrize("case", ROUTES, ids=lambda case: case.name)
def test_every_iterate_of_douglas_rachford_is_a_lower_bound(rng, x64, case):
    run = jax.jit(spectral.douglas_rachford_iterates, static_argnames=("r", "iterations"))
    r = min(*case.widths, *case.sizes)
    for _ in range(3):
        x, y = data_of(case, rng, np.float64)
        half = 0.5 * np.sum(y**2)
        reduced = reduction.reduce_rows(jnp.asarray(x), jnp.asarray(y))
        for gamma in scaled_gammas(y, x, 1e-12):
            found = run(reduced.targets, gamma, r=r, half_norm=half, iterations=300)
            exact = spectral.solve(x, y, gamma=gamma, widths=case.widths)
            optimum = primal_value(exact.weights, x, y, gamma)
            assert np.all(np.asarray(found.values) <= optimum + 1e-11 * half)
            np.testing.assert_allclose(found.values[-1], optimum, rtol=1e-8)


@pytest.mark.parametrize("case", ROUTES, ids=lambda case: case.name)
def test_douglas_rachford_agrees_with_the_closed_form(rng, x64, case):
    for _ in range(2):
        x, y = data_of(case, rng, np.float64)
        half = 0.5 * np.sum(y**2)
        for gamma in scaled_gammas(y, x, 1e-12):
            exact = spectral.solve(x, y, gamma=gamma, widths=case.widths)
            found = spectral.solve(x, y, gamma=gamma, widths=case.widths, method="douglas_rachford", iterations=500)
            np.testing.assert_allclose(found.dual, exact.dual, atol=1e-7 * half)
            np.testing.assert_allclose(found.primal, primal_value(found.weights, x, y, gamma), 1e-10)
            assert float(found.primal) >= float(exact.dual) - 1e-10 * half
            if case.kind != "repeated":  # with ties at the r-th value the optimal product is not unique
                np.testing.assert_allclose(found.primal, exact.primal, atol=1e-6 * half)


def test_few_iterations_are_certified_as_few(rng, x64):
    x, y = random_data(rng, 5, 4, 12)
    exact = spectral.solve(x, y, gamma=0.7, widths=(2, 4))
    found = spectral.solve(x, y, gamma=0.7, widths=(2, 4), method="douglas_rachford", iterations=2)
    lost = primal_value(found.weights, x, y, 0.7) - float(exact.primal)
    assert lost > 1e-3
    assert float(found.primal - found.dual) >= lost
    assert float(found.dual) <= float(exact.primal)


@pytest.mark.parametrize("widths", [(3,), (4, 4)])
def test_no_run_of_gradient_descent_ends_below_the_certified_optimum(rng, x64, widths):
    x, y = random_data(rng, 5, 4, 12)
    gamma = 0.6
    exact = spectral.solve(x, y, gamma=gamma, widths=widths)

    def run(key):
        return spectral.solve(
            x, y, gamma=gamma, widths=widths, method="gradient_descent", key=key, steps=3000, learning_rate=0.03
        )

    found = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(7), 4))
    half = 0.5 * np.sum(y**2)
    assert np.all(np.asarray(found.primal) >= float(exact.dual) - 1e-12 * half)
    assert np.all(np.asarray(found.dual) <= float(exact.primal) + 1e-12 * half)
    np.testing.assert_allclose(found.primal, exact.primal, rtol=1e-4)
    for i in range(4):
        weights = [w[i] for w in found.weights]
        np.testing.assert_allclose(found.primal[i], primal_value(weights, x, y, gamma), 1e-10)
    assert len({float(p) for p in found.primal}) == 4  # other keys are other runs


def test_every_step_of_descent_lies_above_the_optimum(rng, x64):
    x, y = random_data(rng, 5, 4, 12)
    for seed, optimizer in enumerate([optax.sgd(0.01), optax.adam(0.05)]):
        start = spectral.random_weights(jax.random.key(seed), (5, 2, 3, 4))
        weights, values = spectral.full_batch_descent(start, jnp.asarray(x), jnp.asarray(y), 0.5, optimizer, 200)
        exact = spectral.solve(x, y, gamma=0.5, widths=(2, 3))
        assert np.all(np.asarray(values) >= float(exact.dual))
        np.testing.assert_allclose(values[0], primal_value(start, x, y, 0.5), 1e-10)
        assert primal_value(weights, x, y, 0.5) < 0.7 * float(values[0])


def test_the_rank_of_an_iterative_result_is_what_its_gap_can_tell(rng, x64):
    x, y = random_data(rng, 5, 4, 12)
    sigma = np.linalg.svd(in_row_space(y, x, 1e-12), compute_uv=False)
    gamma = 0.5 * (sigma[1] + sigma[2])
    exact = spectral.solve(x, y, gamma=gamma, widths=(4, 4))
    found = spectral.solve(x, y, gamma=gamma, widths=(4, 4), method="douglas_rachford", iterations=500)
    assert int(found.rank) == int(exact.rank) == 2


# --- paths, batches, programs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_path_is_the_loop(rng, dtype):
    with jax.enable_x64(dtype is np.float64):
        x, y = (a.astype(dtype) for a in random_data(rng, 5, 4, 12))
        sigma = np.linalg.svd(in_row_space(y, x, 1e-5), compute_uv=False)
        gammas = np.concatenate([[0.0], 0.5 * (sigma[:-1] + sigma[1:])[::-1], [2 * sigma[0]]]).astype(dtype)
        path = spectral.regularisation_path(x, y, gammas=gammas, widths=(3, 4))
        mapped = jax.vmap(lambda g: spectral.solve(x, y, gamma=g, widths=(3, 4)))(jnp.asarray(gammas))
        tight = 1e-10 if dtype is np.float64 else 1e-4
        for i, gamma in enumerate(gammas):
            one = spectral.solve(x, y, gamma=float(gamma), widths=(3, 4))
            for batch in (path, mapped):
                jax.tree.map(
                    lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=tight, atol=10 * tight), batch, one
                )
        assert path.rank.tolist() == [3, 3, 2, 1, 0]
        assert path.dual_variable.coefficients.shape == (len(gammas), 4, 5)
        assert path.theorem_applies.tolist() == [True, False, False, False, False]


def test_solving_maps_over_data_sets_inside_jit(rng, x64):
    xs, ys = rng.normal(size=(3, 5, 12)), rng.normal(size=(3, 4, 12))
    gammas = np.array([0.0, 0.4, 2.0])
    traces = []

    def one(x, y, gamma):
        traces.append(1)
        return spectral.solve(x, y, gamma=gamma, widths=(3, 4))

    run = jax.jit(jax.vmap(one))
    for _ in range(2):
        batch = run(xs, ys, gammas)
    assert len(traces) == 1
    for i in range(3):
        single = spectral.solve(xs[i], ys[i], gamma=gammas[i], widths=(3, 4))
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-9), batch, single)


@pytest.mark.parametrize("method", ["closed_form", "douglas_rachford", "gradient_descent"])
def test_a_second_call_compiles_nothing(rng, x64, method, caplog):
    settings = {"closed_form": {}, "douglas_rachford": {"iterations": 3}, "gradient_descent": {"steps": 3}}[method]
    spectral.solve(*random_data(rng, 5, 4, 12), gamma=0.1, widths=(3,), method=method, **settings)
    jax.clear_caches()
    counts = []
    for gamma in (0.2, 0.0, 0.3):
        caplog.clear()
        with jax.log_compiles():
            spectral.solve(*random_data(rng, 5, 4, 12), gamma=gamma, widths=[3], method=method, **settings)
        counts.append(caplog.text.count("Compiling jit(solve_scaled)"))
    assert counts == [1, 0, 0]


def test_the_certificate_differentiates_nowhere_but_the_solution_is_the_same_under_jit(rng, x64):
    x, y = random_data(rng, 5, 4, 12)
    inside = jax.jit(lambda a, b, g: spectral.solve(a, b, gamma=g, widths=(3,)))(x, y, 0.3)
    outside = spectral.solve(x, y, gamma=0.3, widths=(3,))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), inside, outside)


# --- where the theorem applies --------------------------------------------------------------------------------------


def test_the_conditions_of_the_theorem_are_told(rng, x64):
    x, y = random_data(rng, 5, 4, 12)
    least = np.linalg.svd(in_row_space(y, x, 1e-12), compute_uv=False)[-1]

    def solved(gamma, widths):
        return spectral.solve(x, y, gamma=gamma, widths=widths)

    for gamma, widths in [(0.0, (4,)), (0.99 * least, (4, 4)), (0.99 * least, (9, 1))]:
        found = solved(gamma, widths)
        assert bool(found.theorem_applies)
        assert found.reasons() == ()
        np.testing.assert_allclose(found.sigma_min, least, 1e-10)
    found = solved(1.01 * least, (4,))
    assert not bool(found.theorem_applies)
    assert [bool(found.gamma_below_sigma_min), bool(found.widths_fit)] == [False, True]
    (reason,) = found.reasons()
    assert f"gamma={1.01 * least:g} is not below sigma_min(Yt)={least:g}" in reason
    found = solved(0.0, (5, 6))
    assert [bool(found.gamma_below_sigma_min), bool(found.widths_fit)] == [True, False]
    assert not bool(found.theorem_applies)
    (reason,) = found.reasons()
    assert "d_min=5 exceeds min(d_0, d_H, n)" in reason
    assert "d_0=5" in reason
    assert "d_H=4" in reason
    assert len(solved(2 * least, (5,)).reasons()) == 2
    assert abs(float(solved(2 * least, (5,)).relative_gap)) < 1e-10
    few = spectral.solve(x[:, :2], y[:, :2], gamma=0.0, widths=(3, 3))
    assert not bool(few.widths_fit)  # n = 2 is the least


# --- what is not allowed --------------------------------------------------------------------------------------------

GOOD = {"x": np.ones((3, 5), np.float32), "y": np.ones((2, 5), np.float32), "gamma": 0.1, "widths": (2,)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gamma": -0.1}, ["gamma=-0.1", "at least 0"]),
        ({"gamma": np.nan}, ["gamma=nan", "finite"]),
        ({"gamma": np.inf}, ["gamma=inf", "finite"]),
        ({"gamma": np.array([0.1, 0.2])}, ["gamma of shape (2,)", "one number", "regularisation_path"]),
        ({"gamma": None}, ["gamma=None", "at least 0"]),
        ({"gamma": "much"}, ["gamma='much'", "at least 0"]),
        ({"gamma": 1j}, ["gamma=1j", "at least 0"]),
        ({"widths": ()}, ["widths=()", "positive integers", "H - 1 >= 1"]),
        ({"widths": (2, 0)}, ["widths=(2, 0)", "positive integers"]),
        ({"widths": (2.5,)}, ["widths=(2.5,)", "positive integers"]),
        ({"widths": (True,)}, ["widths=(True,)", "positive integers"]),
        ({"widths": ("a",)}, ["widths=('a',)", "positive integers"]),
        ({"widths": 3}, ["widths=3", "positive integers"]),
        ({"x": np.ones((5, 3), np.float32)}, ["(5, 3)", "(2, 5)", "[d_0, n]", "transpose"]),
        ({"x": np.ones(5, np.float32)}, ["(5,)", "[d_0, n]"]),
        ({"y": np.ones((2, 5, 1), np.float32)}, ["(2, 5, 1)", "[d_H, n]"]),
        ({"x": [[1.0, 2.0]]}, ["x", "list", "array"]),
        ({"x": np.ones((0, 5), np.float32)}, ["(0, 5)", "empty", ">= 1"]),
        ({"x": np.ones((3, 0), np.float32), "y": np.ones((2, 0), np.float32)}, ["(3, 0)", "empty"]),
        ({"x": np.ones((3, 5), np.int32)}, ["x holds int32", "float32 or float64"]),
        ({"y": np.ones((2, 5), np.uint8)}, ["y holds uint8", "float32 or float64"]),
        ({"y": np.ones((2, 5), np.complex64)}, ["y holds complex64", "float32 or float64"]),
        ({"x": np.ones((3, 5), np.float16)}, ["x holds float16", "float32 or float64"]),
        ({"x": np.full((3, 5), np.nan, np.float32)}, ["x holds values that are not finite"]),
        ({"y": np.array([[1, 2, np.inf, 4, 5]], np.float32)}, ["y holds values that are not finite"]),
        ({"rtol": -1.0}, ["rtol=-1.0", "[0, 1)"]),
        ({"rtol": 1.0}, ["rtol=1.0", "[0, 1)"]),
    ],
)
def test_bad_input_is_named(unchecked, change, words):
    given = {**GOOD, **change}
    with pytest.raises(SpectralError) as caught:
        spectral.solve(given.pop("x"), given.pop("y"), **given)
    for word in words:
        assert word in str(caught.value)


def test_unknown_methods_and_settings_are_named(unchecked):
    with pytest.raises(UnknownNameError, match=r"unknown method 'closed_fom'.*'closed_form'.*douglas_rachford"):
        spectral.solve(**GOOD, method="closed_fom")
    with pytest.raises(UnknownNameError, match=r"setting of method 'douglas_rachford': 'iteration'.*'iterations'") as e:
        spectral.solve(**GOOD, method="douglas_rachford", iteration=3)
    assert "problem" not in str(e.value)


def test_the_path_has_the_same_checks(unchecked):
    x, y = GOOD["x"], GOOD["y"]
    for gammas, words in [(np.array([0.1, -0.2]), "at least 0"), (np.float64(0.1), "one-dimensional")]:
        with pytest.raises(SpectralError, match=words):
            spectral.regularisation_path(x, y, gammas=gammas, widths=(2,))
    with pytest.raises(SpectralError, match="transpose"):
        spectral.regularisation_path(x.T, y, gammas=np.array([0.1]), widths=(2,))


def test_checks_of_values_do_not_break_tracing(x64):
    x, y = (jnp.asarray(GOOD[k], jnp.float64) for k in "xy")
    found = jax.jit(lambda a, b, g: spectral.solve(a, b, gamma=g, widths=(2,)))(x, y, jnp.nan)
    assert np.isnan(found.relative_gap)  # never a certificate
    found = jax.vmap(lambda g: spectral.solve(x, y, gamma=g, widths=(2,)))(jnp.array([0.1, -1.0]))
    assert np.isnan(found.relative_gap).tolist() == [False, True]
    assert not found.theorem_applies[1]
    found = jax.jit(lambda a, b, g: spectral.solve(a, b, gamma=g, widths=(2,)))(x.at[0, 0].set(jnp.nan), y, 0.1)
    assert np.isnan(found.relative_gap)


# --- affine and convolutional first maps ----------------------------------------------------------------------------


def test_the_last_column_is_the_bias(rng, x64):
    x, y = random_data(rng, 4, 4, 12)
    y = y + rng.normal(size=(4, 1)) * 5
    augmented = spectral.with_bias(jnp.asarray(x))
    found = spectral.solve(augmented, y, gamma=0.4, widths=(3, 4))
    assert abs(float(found.relative_gap)) < 1e-10
    first, bias = found.weights[0][:, :-1], found.weights[0][:, -1]
    hidden = first @ x + bias[:, None]
    output = found.weights[2] @ found.weights[1] @ hidden
    penalty = sum(np.sum(np.linalg.svd(m, compute_uv=False) ** 3) for m in (hidden, *found.weights[1:]))
    np.testing.assert_allclose(found.primal, 0.5 * np.sum((y - output) ** 2) + 0.4 / 3 * penalty, 1e-11)
    without = spectral.solve(x, y, gamma=0.4, widths=(3, 4))
    assert float(found.primal) < float(without.primal)


CONVOLUTIONS = [
    ((2, 2), (1, 1), "VALID", 1),
    ((3, 2), (2, 1), "SAME", 2),
    ((2, 3), (1, 2), ((1, 0), (2, 1)), 3),
    ((1, 1), (1, 1), "VALID", 2),
]


@pytest.mark.parametrize(("window", "strides", "padding", "channels"), CONVOLUTIONS)
def test_patches_make_the_first_layer_a_convolution(rng, x64, window, strides, padding, channels):
    images = jnp.asarray(rng.normal(size=(3, 5, 6, channels)))
    columns = spectral.patches(images, window, strides=strides, padding=padding)
    first = jnp.asarray(rng.normal(size=(4, len(columns))))

    def convolved(weights):
        kernel = weights.T.reshape(*window, channels, len(weights))
        return lax.conv_general_dilated(images, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    output = convolved(first)
    np.testing.assert_allclose(first @ columns, output.reshape(-1, 4).T, atol=1e-12)
    # And from the definition, pixel by pixel.
    pads = padding
    if padding == "VALID":
        pads = ((0, 0), (0, 0))
    elif padding == "SAME":
        totals = [max((-(-s // t) - 1) * t + w - s, 0) for s, t, w in zip((5, 6), strides, window, strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in totals)
    padded = np.pad(np.asarray(images), ((0, 0), *pads, (0, 0)))
    expected = [
        padded[i, a : a + window[0], b : b + window[1]].reshape(-1)
        for i in range(3)
        for a in range(0, padded.shape[1] - window[0] + 1, strides[0])
        for b in range(0, padded.shape[2] - window[1] + 1, strides[1])
    ]
    np.testing.assert_array_equal(columns, np.stack(expected, axis=1))
    y = rng.normal(size=(2, columns.shape[1]))
    found = spectral.solve(columns, y, gamma=0.3, widths=(2,))
    assert abs(float(found.relative_gap)) < 1e-10
    hidden = convolved(found.weights[0]).reshape(-1, 2).T
    penalty = sum(np.sum(np.linalg.svd(m, compute_uv=False) ** 2) for m in (hidden, found.weights[1]))
    np.testing.assert_allclose(
        found.primal, 0.5 * np.sum((y - found.weights[1] @ hidden) ** 2) + 0.15 * penalty, rtol=1e-11
    )


def test_windows_that_fit_nowhere_are_named(unchecked):
    with pytest.raises(SpectralError, match=r"images of shape \(5, 6\) must be \[n, height, width, channels\]"):
        spectral.patches(jnp.ones((5, 6)), (2, 2))
    with pytest.raises(SpectralError, match=r"window of \(7, 2\) fits nowhere in images of shape \(1, 5, 6, 1\)"):
        spectral.patches(jnp.ones((1, 5, 6, 1)), (7, 2))
    with pytest.raises(SpectralError, match=r"window of \(0, 2\)"):
        spectral.patches(jnp.ones((1, 5, 6, 1)), (0, 2))
    with pytest.raises(SpectralError, match=r"\(0, 5, 6, 1\)"):
        spectral.patches(jnp.ones((0, 5, 6, 1)), (2, 2))
    with pytest.raises(SpectralError, match="x of shape"):
        spectral.with_bias(jnp.ones(4))


# --- second derivatives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [2, 3, 4])
@pytest.mark.parametrize("kind", ["generic", "ties", "zero", "rank one"])
def test_second_derivatives_of_functions_of_singular_values(rng, x64, kind, power):
    matrix = {
        "generic": rng.standard_normal((3, 5)),
        "ties": 0.7 * np.eye(3, 5),
        "zero": np.zeros((3, 5)),
        "rank one": np.outer(rng.standard_normal(3), rng.standard_normal(5)),
    }[kind]
    for m in (matrix, matrix.T):
        direction = rng.standard_normal(m.shape)
        functions = [jax.grad(lambda m: spectral.schatten_power(m, power))]
        if kind != "rank one":
            functions.append(lambda m: spectral.clip_singular_values(m, 0.5))
        for function in functions:
            found = jax.jvp(function, (m,), (direction,))[1]
            step = 1e-7
            expected = (function(m + step * direction) - function(m - step * direction)) / (2 * step)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_ceiling_has_a_derivative(rng, x64):
    matrix = rng.standard_normal((4, 3))
    found = jax.jacfwd(lambda c: spectral.clip_singular_values(matrix, c))(0.8)
    expected = (spectral.clip_singular_values(matrix, 0.8 + 1e-6) - spectral.clip_singular_values(matrix, 0.8)) / 1e-6
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_the_objective_refuses_what_solve_refuses(rng):
    x, y = rng.standard_normal((2, 6)), rng.standard_normal((2, 6))
    weights = [rng.standard_normal((2, 2)), rng.standard_normal((2, 2))]
    assert float(spectral.objective(weights, x, y, 0.5)) > 0
    for bad in (
        (weights, x, y[:, :1], 0.5),
        (weights, x, y, -1.0),
        (weights, x, y, np.ones(2)),
        (weights, x, y, np.nan),
        (weights, x.astype(np.float16), y, 0.5),
        ([weights[0].astype(jnp.bfloat16), weights[1]], x, y, 0.5),
    ):
        with pytest.raises(spectral.SpectralError):
            inspect.unwrap(spectral.objective)(*bad)
    with pytest.raises(spectral.SpectralError, match="float16"):
        spectral.schatten_power(x.astype(np.float16), 2)
