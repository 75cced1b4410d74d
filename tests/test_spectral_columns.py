"""Theorem 2 for data in blocks of columns: agreement with `solve`, and certificates that hold for the data as given."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from spectral_oracles import conditioned, dual_value, exact_optimum, in_row_space, primal_value

from dualgap_jax import spectral
from dualgap_jax.spectral import (
    CertificateError,
    Columns,
    SpectralError,
    blocks,
    columns,
    factorizations,
    in_blocks,
    kernels,
    solve_columns,
)

D_0, D_H, N = 6, 4, 600
WIDTHS = (3, 5)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """The package as users have it: without shape checks that would come before its own messages."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def assert_same(found: Any, expected: Any, tight: float, y: np.ndarray) -> None:
    """Two solutions: values, spectra, the product of the weights and Lambda, which are unique."""
    unit = 0.5 * np.sum(y**2) + 1e-30
    for name in ("primal", "dual"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=tight * unit)
    top = np.linalg.norm(y) + 1e-30
    np.testing.assert_allclose(found.singular_values, expected.singular_values, atol=tight * top)
    for a, b in (
        (spectral.problem.product(found.weights), spectral.problem.product(expected.weights)),
        (found.dual_variable.coefficients, expected.dual_variable.coefficients),
    ):
        np.testing.assert_allclose(a, b, atol=tight * np.abs(b).max() + 1e-14)
    assert int(found.rank) == int(expected.rank)
    np.testing.assert_allclose(found.sigma_min, expected.sigma_min, atol=tight * top)
    assert bool(found.theorem_applies) == bool(expected.theorem_applies)
    assert [w.shape for w in found.weights] == [w.shape for w in expected.weights]


# --- agreement with the solution in memory --------------------------------------------------------------------------


@pytest.mark.parametrize("factorization", ["gram", "qr", "auto"])
@pytest.mark.parametrize("size", [None, 250, 601])
def test_blocks_of_any_size_give_the_solution_in_memory(rng, x64, factorization, size):
    for gamma in (0.0, 8.0, 1e4):
        x, y = conditioned(rng, D_0, D_H, N, 30, np.float64, noise=1.0)
        expected = spectral.solve(x, y, gamma=gamma, widths=WIDTHS)
        found = solve_columns(in_blocks(x, y, size), gamma=gamma, widths=WIDTHS, factorization=factorization)
        assert_same(found.solution, expected, 1e-9, y)
        assert abs(float(found.solution.relative_gap)) <= 1e-10
        assert found.precision == "float64"
        assert found.factorization == ("qr" if factorization == "qr" else "gram")
        assert [a.accepted for a in found.attempts] == [True]
        assert found.attempts[0].passes == 2 if factorization == "qr" else found.attempts[0].passes >= 3
        assert found.projection_error <= 1e-6 * np.linalg.norm(y)
        np.testing.assert_allclose(found.solution.primal, primal_value(found.solution.weights, x, y, gamma), 1e-11)


def test_lists_and_uneven_blocks_and_jax_arrays_will_do(rng, x64):
    x, y = conditioned(rng, D_0, D_H, N, 30, np.float64)
    expected = spectral.solve(x, y, gamma=0.7, widths=WIDTHS)
    cuts = [0, 1, 4, 300, 600]
    parts = [(x[:, a:b], y[:, a:b]) for a, b in itertools.pairwise(cuts)]
    as_jax = [(jnp.asarray(a), jnp.asarray(b)) for a, b in parts]
    for given in (parts, tuple(parts), as_jax, Columns(lambda: iter(parts)), Columns(lambda: (p for p in parts))):
        found = solve_columns(given, gamma=0.7, widths=WIDTHS)
        assert_same(found.solution, expected, 1e-9, y)


EDGES = {
    "few examples": (9, 4, 6, (4, 4), "plain"),
    "one example": (6, 4, 1, (3, 5), "plain"),
    "one feature": (1, 1, 20, (2,), "plain"),
    "more outputs than inputs": (3, 8, 40, (6, 5), "plain"),
    "low rank x": (6, 4, 40, (3, 5), "low rank x"),
    "zero and repeated rows": (6, 4, 40, (3, 5), "zero rows"),
    "low rank y": (6, 4, 40, (4, 5), "low rank y"),
    "y = 0": (6, 4, 40, (3, 5), "y = 0"),
    "x = 0": (6, 4, 40, (3, 5), "x = 0"),
    "ten layers": (6, 4, 40, (4, 5, 4, 6, 3, 4, 9, 4, 4), "plain"),
    "wide": (6, 4, 40, (20, 9), "plain"),
}


@pytest.mark.parametrize("edge", EDGES)
def test_the_edges_agree_too(rng, x64, edge):
    d_0, d_H, n, widths, kind = EDGES[edge]
    x, y = rng.normal(size=(d_0, n)), rng.normal(size=(d_H, n))
    if kind == "low rank x":
        x = (rng.integers(-3, 4, (d_0, 2)) @ rng.integers(-3, 4, (2, n))).astype(float)
    elif kind == "zero rows":
        x[1], x[3] = 0, x[0]
    elif kind == "low rank y":
        y -= y.mean(axis=0)
    elif kind in ("y = 0", "x = 0"):
        x, y = (x, 0 * y) if kind == "y = 0" else (0 * x, y)
    for gamma in (0.0, 0.5):
        expected = spectral.solve(x, y, gamma=gamma, widths=widths)
        for factorization in ("auto", "qr"):
            found = solve_columns(in_blocks(x, y, 17), gamma=gamma, widths=widths, factorization=factorization)
            assert_same(found.solution, expected, 1e-8, y)
            assert abs(float(found.solution.relative_gap)) <= 1e-10
            assert np.isfinite([np.sum(a) for a in jax.tree.leaves(found.solution)]).all()
        if kind in ("low rank x", "zero rows", "x = 0") or n < d_0:
            assert found.factorization == "qr"


def test_a_second_solve_compiles_no_kernel(rng, caplog):
    one = kernels.kernels_for(None)
    names = [f"Compiling jit({k.__name__})" for k in (one.normal, one.sums, one.triangle)]
    jax.clear_caches()
    counts = []
    for gamma in (0.1, 0.7):
        caplog.clear()
        x, y = conditioned(rng, D_0, D_H, N, 30, np.float32)
        with jax.log_compiles():
            for factorization in ("gram", "qr"):
                solve_columns(in_blocks(x, y, 250), gamma=gamma, widths=WIDTHS, factorization=factorization)
        counts.append([caplog.text.count(name) for name in names])
    assert min(counts[0]) > 0
    assert counts[1] == [0, 0, 0]


@pytest.mark.parametrize("shape", [(0, 5, 2), (40, 1, 3), (9, 30, 1), (300, 13, 2)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_gram_matrix_is_the_same_by_panels_and_on_the_host(rng, x64, shape, dtype):
    """Against float64, and symmetric to the last bit: its factorisation reads one triangle."""
    n, d_0, d_H = shape
    x, y = (rng.standard_normal((n, d)).astype(dtype) for d in (d_0, d_H))
    rows = kernels.Rows(jnp.asarray(x), jnp.asarray(y))
    size = np.sqrt(np.sum(x.astype(np.float64) ** 2, axis=0))
    for gram, cross in (kernels._gram_on_host(rows), jax.jit(kernels._gram)(rows)):
        assert (gram.dtype, cross.dtype) == (dtype, dtype)
        np.testing.assert_array_equal(gram, gram.T)
        assert np.all(
            np.abs(gram - x.astype(np.float64).T @ x) <= max(n, 4) * np.finfo(dtype).eps * np.outer(size, size)
        )
        np.testing.assert_allclose(cross, y.astype(np.float64).T @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factorization", ["gram", "qr"])
def test_data_of_one_block_are_read_twice_whatever_the_number_of_passes(rng, factorization):
    """Once to be measured, once to be placed."""
    x, y = conditioned(rng, D_0, D_H, N, 30, np.float32)
    reads = []

    def blocks():
        reads.append(1)
        yield x, y

    found = solve_columns(Columns(blocks), gamma=0.1, widths=WIDTHS, factorization=factorization)
    assert len(reads) == 2 < found.attempts[-1].passes + 1
    halves = in_blocks(x, y, (N + 1) // 2)
    assert_same(
        found.solution, solve_columns(halves, gamma=0.1, widths=WIDTHS, factorization=factorization).solution, 1e-5, y
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_powers_of_two_cost_no_digit(rng, dtype):
    """Against `ldexp`, in range and out of it; row by row and for a whole matrix."""
    limit = np.finfo(dtype).maxexp
    for largest in (3, limit - 2, limit + 20):
        power = rng.integers(-largest, largest + 1, 7)
        power[0] = largest
        values = (rng.normal(size=(5, 7)) * 2.0 ** -power.clip(-limit + 30, limit - 30)).astype(dtype)
        values[0, 1], values[1, 2] = 0.0, -0.0
        np.testing.assert_array_equal(kernels.scaled(values, power), np.ldexp(values, power))
        np.testing.assert_array_equal(kernels.scaled(values, -5), np.ldexp(values, -5))
    assert kernels.scaled(values[:0], power).shape == (0, 7)


def test_scaled_data(rng, x64):
    for scale_x, scale_y in ((1e-6, 1e6), (1e6, 1e-6)):
        for dtype in (np.float32, np.float64):
            x, y = conditioned(rng, D_0, D_H, N, 30, np.float64)
            x, y = (scale_x * x).astype(dtype), (scale_y * y).astype(dtype)
            for factorization in ("gram", "qr"):
                found = solve_columns(
                    in_blocks(x, y, 250), gamma=0.7 * scale_y, widths=WIDTHS, factorization=factorization
                )
                assert abs(float(found.solution.relative_gap)) <= (1e-10 if dtype is np.float64 else 1e-6)


# --- the certificate is true ----------------------------------------------------------------------------------------


def check_claim(found: Any, x: np.ndarray, y: np.ndarray, gamma: float) -> None:
    """The claimed gap covers the true one, and the claimed dual is below the optimum, for the data as they are."""
    solution = found.solution
    half = 0.5 * np.sum(np.asarray(y, np.float64) ** 2)
    r = min(*WIDTHS, *x.shape, len(y))
    optimum = exact_optimum(x, y, gamma, r)
    # The primal value in extended precision where the weights act on the data.
    output = np.asarray(x, np.longdouble)
    hidden = None
    for w in solution.weights:
        output = np.asarray(w, np.longdouble) @ output
        hidden = output if hidden is None else hidden
    depth = len(solution.weights)
    layers = [hidden.astype(np.float64), *(np.asarray(w, np.float64) for w in solution.weights[1:])]
    penalty = sum(np.sum(np.linalg.svd(m, compute_uv=False) ** depth) for m in layers)
    primal = float(0.5 * np.sum((np.asarray(y, np.longdouble) - output) ** 2)) + gamma / depth * penalty
    rounding = 1e-13 * half
    assert float(solution.dual) <= optimum + rounding
    assert primal - optimum <= float(solution.primal - solution.dual) + rounding
    np.testing.assert_allclose(solution.relative_gap, float(solution.primal - solution.dual) / half, atol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("factorization", ["gram", "qr", "auto"])
def test_every_accepted_certificate_is_true(rng, dtype, factorization):
    """JAX in its default 32-bit mode: the certificate brings its own precision."""
    accepted, refused = [], []
    for condition in 10.0 ** np.arange(1, 14):
        for gamma in rng.permutation([0.0, 1.5])[: 2 if condition <= 1e6 else 1]:
            x, y = conditioned(rng, D_0, D_H, N, condition, dtype)
            try:
                found = solve_columns(
                    in_blocks(x, y, 250), gamma=gamma, widths=WIDTHS, factorization=factorization, tolerance=1e-3
                )
            except CertificateError:
                refused.append(condition)
                continue
            accepted.append(condition)
            check_claim(found, x, y, gamma)
            assert float(found.solution.relative_gap) <= 1e-3
    # Neither everything nor nothing.
    reach = {"gram": {np.float32: 1e3, np.float64: 1e7}, "qr": {np.float32: 1e5, np.float64: 1e9}}
    reach["auto"] = reach["qr"]
    assert set(10.0 ** np.arange(1, round(np.log10(reach[factorization][dtype])) + 1)) <= set(accepted)
    if factorization == "gram":
        assert {1e8 if dtype is np.float32 else 1e12} <= set(refused)


def test_a_loose_tolerance_buys_no_false_claim(rng):
    """Well below what float32 can do, with a tolerance that lets nearly everything pass."""
    for condition in (1e6, 1e8, 1e10):
        x, y = conditioned(rng, D_0, D_H, N, condition, np.float32)
        for gamma in (0.0, 1.5):
            found = solve_columns(in_blocks(x, y, 250), gamma=gamma, widths=WIDTHS, tolerance=0.99)
            check_claim(found, x, y, gamma)
            assert found.factorization == "qr"
            assert found.precision == "float64"


def test_auto_falls_back_and_says_so(rng):
    x, y = conditioned(rng, D_0, D_H, N, 3e4, np.float32)
    found = solve_columns(in_blocks(x, y, 250), gamma=0.5, widths=WIDTHS)
    assert found.factorization == "qr"
    first, second = found.attempts
    assert (first.factorization, first.accepted, first.relative_gap) == ("gram", False, None)
    assert "ill-conditioned" in first.reason
    assert (second.factorization, second.accepted) == ("qr", True)
    assert "within the tolerance 1e-06" in second.reason
    assert second.relative_gap == float(found.solution.relative_gap) <= 1e-6
    well = conditioned(rng, D_0, D_H, N, 10, np.float32)
    found = solve_columns(in_blocks(*well, 250), gamma=0.5, widths=WIDTHS)
    assert [a.factorization for a in found.attempts] == ["gram"]
    assert found.precision == "float32"


def test_what_cannot_be_certified_is_refused_with_reasons(rng):
    x, y = conditioned(rng, D_0, D_H, N, 1e8, np.float32)
    with pytest.raises(CertificateError, match=r"no certificate within 1e-09.*gram: .*qr: relative gap .* not within"):
        solve_columns(in_blocks(x, y, 250), gamma=0.5, widths=WIDTHS, tolerance=1e-9)
    with pytest.raises(CertificateError, match=r"factorisation in float64: X is all but rank deficient in float32"):
        solve_columns(in_blocks(x, y, 250), gamma=0.5, widths=WIDTHS, tolerance=1e-9)


def test_a_refusal_carries_what_was_tried_and_the_best_of_it(rng):
    x, y = conditioned(rng, D_0, D_H, N, 1e4, np.float32)
    cases = {
        "auto": (["gram", "qr"], ["float64 data", "larger tolerance"], ["factorization="]),
        "qr": (["qr"], ["float64 data", "larger tolerance"], ["factorization="]),
        "gram": (["gram"], ["float64 data", "factorization='qr'"], ["'auto'"]),
    }
    for factorization, (tried, advised, not_advised) in cases.items():
        with pytest.raises(CertificateError) as caught:
            solve_columns(in_blocks(x, y, 250), gamma=0.5, widths=WIDTHS, tolerance=1e-15, factorization=factorization)
        error = caught.value
        assert [a.factorization for a in error.attempts] == tried
        assert not any(a.accepted for a in error.attempts)
        advice = str(error).rsplit("Give", 1)[1]
        assert all(word in advice for word in advised)
        assert not any(word in advice for word in not_advised)
        gaps = [a.relative_gap for a in error.attempts if a.relative_gap is not None]
        if gaps:
            assert abs(float(error.best.solution.relative_gap)) == min(abs(g) for g in gaps)
            check_claim(error.best, x, y, 0.5)
        else:
            assert error.best is None
    low = rng.normal(size=(6, 2)) @ rng.normal(size=(2, 90)), rng.normal(size=(4, 90))
    with pytest.raises(CertificateError, match="leave out the rows of X that depend on others") as caught:
        solve_columns(in_blocks(*low), gamma=0.5, widths=WIDTHS)
    assert "float64 data" not in str(caught.value)
    assert int(caught.value.best.solution.unresolved) == 4


def test_float64_data_are_factorised_in_float64_in_32_bit_mode(rng):
    assert not jax.config.jax_enable_x64
    x, y = conditioned(rng, D_0, D_H, N, 1e4, np.float64)
    for factorization in ("gram", "qr"):
        found = solve_columns(in_blocks(x, y, 250), gamma=1.5, widths=WIDTHS, factorization=factorization)
        assert found.precision == "float64"
        assert all(w.dtype == np.float64 for w in found.solution.weights)
        check_claim(found, x, y, 1.5)
        assert float(found.solution.relative_gap) <= 1e-10
    assert not jax.config.jax_enable_x64


def test_the_value_of_the_returned_lambda_is_the_claimed_one(rng):
    """Float32 data: Lambda as returned, not one that was rounded afterwards."""
    for condition in (1e2, 1e4):
        x, y = conditioned(rng, D_0, D_H, N, condition, np.float32)
        for gamma in (0.5, 3.0):
            found = solve_columns(in_blocks(x, y, 250), gamma=gamma, widths=WIDTHS).solution
            dual = found.dual_variable.materialise(np.asarray(x, np.float64))
            value = dual_value(dual, x, y, gamma, 3, rcond=1e-14, slack=1e-12)
            half = 0.5 * np.sum(np.asarray(y, np.float64) ** 2)
            assert float(found.dual) <= value + 1e-12 * half
            # `_SAFETY` times the square of the projection error, and the rounding, are all that it gives away.
            assert value - float(found.dual) <= 1e-6 * half
            assert found.dual_variable.materialise(jnp.asarray(x[:, :7])).shape == (D_H, 7)


def fitted(x: np.ndarray, y: np.ndarray, name: str = "qr") -> tuple[Any, Any]:
    data = blocks.Data(in_blocks(x, y, 250), None, len(WIDTHS) + 1, None)
    return data, factorizations.FACTORIZATIONS[name](data, 1e-6, 1e-14)


@pytest.mark.parametrize("name", ["gram", "qr"])
def test_a_wrong_factorisation_never_gives_a_small_gap(rng, x64, name):
    x, y = conditioned(rng, D_0, D_H, N, 30, np.float64)
    half = 0.5 * np.sum(y**2)
    for gamma in (0.0, 1.5):
        optimum = exact_optimum(x, y, gamma, 3)
        data, fit = fitted(x, y, name)
        good, _ = columns.certify(data, fit, gamma, WIDTHS)
        own = x * 2.0 ** -data.powers.rows[:, None]
        assert abs(float(good.relative_gap)) <= 1e-10
        for size in (1e-3, 1e-2, 0.3, 3.0):
            noise = [jnp.asarray(size * rng.normal(size=a.shape)) for a in (fit.fit, fit.right, fit.left, fit.sigma)]
            wrongs = {
                "A": fit._replace(fit=fit.fit + noise[0] * jnp.std(fit.fit)),
                "right": fit._replace(right=fit.right + noise[1] * jnp.std(fit.right)),
                "left": fit._replace(left=fit.left + noise[2]),
                "sigma": fit._replace(sigma=jnp.abs(fit.sigma + noise[3] * fit.sigma)),
                "nought": fit._replace(fit=0 * fit.fit, right=0 * fit.right),
                "all": fit._replace(fit=(1 + size) * fit.fit, right=(1 - size) * fit.right),
            }
            for what, wrong in wrongs.items():
                found, error = columns.certify(data, wrong, gamma, WIDTHS)
                primal = primal_value(found.weights, x, y, gamma)
                assert float(found.dual) <= optimum + 1e-12 * half, what
                np.testing.assert_allclose(found.primal, primal, 1e-10)
                assert float(found.primal - found.dual) >= primal - optimum - 1e-12 * half, what
                if what in ("A", "nought", "all"):
                    misfit = np.linalg.norm(in_row_space(y, x, 1e-14) - np.asarray(wrong.fit) @ own)
                    assert misfit <= error * (1 + 1e-6)
                if what != "A":  # the weights are wrong, and the gap says so
                    assert float(found.relative_gap) > 1e-3 * size**2


def test_a_wrong_fit_is_refused_by_the_front_door(rng, x64, monkeypatch):
    x, y = conditioned(rng, D_0, D_H, N, 30, np.float64)
    _, fit = fitted(x, y)
    wrong = fit._replace(fit=1.01 * fit.fit, right=1.01 * fit.right)

    def broken(data, tolerance, rtol):
        return wrong

    monkeypatch.setitem(factorizations.FACTORIZATIONS, "gram", broken)
    found = solve_columns(in_blocks(x, y, 250), gamma=0.5, widths=WIDTHS)
    assert [a.accepted for a in found.attempts] == [False, True]
    assert found.attempts[0].relative_gap > 1e-5
    assert "not within the tolerance" in found.attempts[0].reason
    with pytest.raises(CertificateError, match="gram: relative gap"):
        solve_columns(in_blocks(x, y, 250), gamma=0.5, widths=WIDTHS, factorization="gram")


def test_a_factor_that_overstates_the_smallest_direction_is_refused(rng, x64, monkeypatch):
    x, y = conditioned(rng, D_0, D_H, N, 1e4, np.float64)
    plain = factorizations._cholesky

    def shifted(gram):
        return plain(gram + 1e-5 * jnp.eye(len(gram)))

    monkeypatch.setattr(factorizations, "_cholesky", shifted)
    with pytest.raises(CertificateError, match="overstates the smallest eigenvalue"):
        solve_columns(in_blocks(x, y, 250), gamma=0.5, widths=WIDTHS, factorization="gram")


def test_data_that_change_between_passes_are_caught_or_certified(rng, x64):
    """Y of another scale in the certificate's pass: a gap below zero is as wrong as one above."""
    x, y = conditioned(rng, D_0, D_H, N, 30, np.float64)
    for factor in (0.5, 2.0):
        passes = itertools.count()

        def blocks(factor=factor, passes=passes):
            yield from in_blocks(x, y * (factor if next(passes) % 2 else 1.0), 400)

        with pytest.raises(CertificateError):
            solve_columns(Columns(blocks), gamma=0.5, widths=WIDTHS, factorization="qr")


# --- several devices ------------------------------------------------------------------------------------------------

MESH = """
import sys
import jax, numpy as np
from jax.sharding import Mesh
sys.path.insert(0, {tests!r})
from spectral_oracles import conditioned
from dualgap_jax import spectral

assert len(jax.devices()) == 8
rng = np.random.default_rng({seed})
meshes = [Mesh(np.array(jax.devices()), ("data",)), Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))]
for dtype, tight in ((np.float64, 1e-9), (np.float32, 1e-3)):
    x, y = conditioned(rng, 6, 4, 603, 30, dtype)
    for factorization in ("gram", "qr"):
        for mesh in meshes[: 2 if dtype is np.float64 else 1]:
            given = dict(gamma=1.5, widths=(3, 5), factorization=factorization)
            one = spectral.solve_columns(spectral.in_blocks(x, y, 250), **given)
            many = spectral.solve_columns(spectral.in_blocks(x, y, 250), mesh=mesh, **given)
            assert many.precision == one.precision == np.dtype(dtype).name
            for name in ("primal", "dual", "singular_values", "rank", "sigma_min"):
                np.testing.assert_allclose(
                    getattr(many.solution, name), getattr(one.solution, name), rtol=tight, err_msg=name
                )
            a, b = (f.solution.dual_variable.coefficients for f in (one, many))
            np.testing.assert_allclose(a, b, atol=tight * np.abs(a).max())
            a, b = (spectral.problem.product(f.solution.weights) for f in (one, many))
            np.testing.assert_allclose(a, b, atol=tight * np.abs(a).max())
            assert abs(float(many.solution.relative_gap)) < (1e-10 if dtype is np.float64 else 1e-6)
# Fewer examples than devices, and data that need float64.
x, y = conditioned(rng, 6, 4, 7, 10, np.float64)
many = spectral.solve_columns(spectral.in_blocks(x, y, 3), gamma=0.1, widths=(3, 5), mesh=meshes[0])
assert abs(float(many.solution.relative_gap)) < 1e-10
x, y = conditioned(rng, 6, 4, 603, 1e6, np.float32)
many = spectral.solve_columns(
    spectral.in_blocks(x, y, 250), gamma=0.1, widths=(3, 5), mesh=meshes[0], factorization="qr", tolerance=1e-3
)
assert many.precision == "float64"
one = spectral.solve_columns(
    spectral.in_blocks(x, y, 250), gamma=0.1, widths=(3, 5), factorization="qr", tolerance=1e-3
)
np.testing.assert_allclose(many.solution.dual, one.solution.dual, rtol=1e-6)
print("agree")
"""


def test_eight_devices_agree_with_one(rng):
    script = MESH.format(tests=str(Path(__file__).parent), seed=int(rng.integers(1 << 30)))
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "agree"


# --- memory and progress --------------------------------------------------------------------------------------------


class Counted(np.ndarray):
    """An array that can be watched."""


def test_blocks_are_not_kept(rng):
    x, y = conditioned(rng, D_0, D_H, 20 * N, 30, np.float32)
    alive: list[weakref.ref] = []
    most = 0

    def blocks():
        nonlocal most
        for i in range(0, x.shape[1], N):
            part = np.array(x[:, i : i + N]).view(Counted)
            alive.append(weakref.ref(part))
            if sum(r() is not None for r in alive) > 4:
                gc.collect()
            most = max(most, sum(r() is not None for r in alive))
            yield part, y[:, i : i + N]

    for factorization in ("gram", "qr"):
        solve_columns(Columns(blocks), gamma=0.5, widths=WIDTHS, factorization=factorization)
    assert len(alive) >= 100
    assert most <= 4


def test_progress_is_reported_after_every_block(rng):
    x, y = conditioned(rng, D_0, D_H, N, 30, np.float32)
    told: list[tuple[str, int]] = []
    found = solve_columns(
        in_blocks(x, y, 250), gamma=0.5, widths=WIDTHS, factorization="qr", report=lambda *line: told.append(line)
    )
    passes = enumerate(("size of the data", "QR factorisation", "certificate"), 1)
    assert told == [(f"{what}, pass {number}", n) for number, what in passes for n in (0, 250, 500, 600)]
    assert found.attempts[0].passes == 2


# --- what is not allowed --------------------------------------------------------------------------------------------


def block(d_0: int = 3, d_H: int = 2, n: int = 5, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(d_0 + d_H + n)
    return rng.normal(size=(d_0, n)).astype(dtype), rng.normal(size=(d_H, n)).astype(dtype)


def broken(value: float, row: int) -> tuple[np.ndarray, np.ndarray]:
    pair = block()
    pair[row][1, 2] = value
    return pair


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], ["no block", "Columns"]),
        ([block(), block(d_0=4)], ["block 1", "(4, 2)", "(3, 2)", "agree"]),
        ([block(), block(), block(d_H=1)], ["block 2", "(3, 1)", "(3, 2)", "agree"]),
        ([block(), block(dtype=np.float64)], ["block 1", "float64", "float32", "agree"]),
        ([block(), broken(np.nan, 0)], ["block 1", "x holds values that are not finite"]),
        ([broken(np.inf, 1), block()], ["block 0", "y holds values that are not finite"]),
        ([(np.ma.masked_greater(block()[0], 0), block()[1])], ["x holds masked entries"]),
        ([block(dtype=np.int32)], ["x holds int32", "float32 or float64"]),
        ([block(dtype=np.float16)], ["x holds float16", "float32 or float64"]),
        ([(block()[0], block(n=4)[1])], ["(3, 5)", "(2, 4)", "[d_0, n]"]),
        ([block(n=0)], ["empty"]),
        ([block()[0]], ["block 0", "pair"]),
        ([(*block(), 1)], ["block 0", "pair"]),
        ([None], ["block 0", "pair"]),
    ],
)
def test_bad_blocks_are_named(unchecked, given, words):
    with pytest.raises(SpectralError) as caught:
        solve_columns(given, gamma=0.1, widths=(2,))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gamma": -1.0}, ["gamma=-1.0", "at least 0"]),
        ({"gamma": np.nan}, ["gamma=nan"]),
        ({"gamma": np.array([0.1])}, ["gamma of shape (1,)", "one number"]),
        ({"widths": ()}, ["widths=()", "positive integers"]),
        ({"factorization": "grm"}, ["'grm'", "'gram'", "qr", "auto"]),
        ({"tolerance": 0.0}, ["tolerance=0.0", "between 0 and 1"]),
        ({"tolerance": np.nan}, ["tolerance=nan", "between 0 and 1"]),
        ({"columns": 3}, ["columns", "int", "Columns"]),
    ],
)
def test_bad_settings_are_named(unchecked, change, words):
    given = {"columns": [block()], "gamma": 0.1, "widths": (2,), **change}
    with pytest.raises(SpectralError) as caught:
        solve_columns(given.pop("columns"), **given)
    for word in words:
        assert word in str(caught.value)


def test_an_iterator_that_is_used_up_is_named(unchecked):
    for used in (iter([block(), block()]), (b for b in [block(), block()])):
        with pytest.raises(SpectralError, match=r"no block in pass 2.*starts afresh each time.*Columns"):
            solve_columns(used, gamma=0.1, widths=(2,))
    shrinking = itertools.chain([3], itertools.repeat(2))
    with pytest.raises(SpectralError, match="gave 10 examples in pass 2 and 15 before"):
        solve_columns(Columns(lambda: [block()] * next(shrinking)), gamma=0.1, widths=(2,))


def test_values_that_break_in_a_later_pass_are_caught(unchecked):
    passes = itertools.count()
    given = Columns(lambda: [broken(np.nan, 0) if next(passes) else block()])
    with pytest.raises(SpectralError, match="values in pass 2 that are not finite"):
        solve_columns(given, gamma=0.1, widths=(2,), factorization="qr")


def test_blocks_of_no_columns_are_refused(unchecked):
    with pytest.raises(SpectralError, match="size=0 must be at least 1"):
        in_blocks(*block(), 0)
    with pytest.raises(SpectralError, match="transpose"):
        in_blocks(block()[0].T, block()[1])
    sizes = [b[0].shape[1] for b in in_blocks(*block(), 2)]
    assert sizes == [2, 2, 1]
