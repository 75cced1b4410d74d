"""The independent proof of a claim on Theorem 2: true in exact arithmetic, tight where it can be, never fooled."""

from __future__ import annotations

import importlib
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from spectral_oracles import conditioned, exact_optimum, rational_optimum, spoiled

from dualgap_jax import spectral
from dualgap_jax.spectral import VerificationError, in_blocks, solve_columns, verify

SIZES = [(3, 1, 1, (2,)), (4, 2, 9, (2, 3)), (5, 2, 4, (1,)), (4, 2, 11, (3, 4, 2))]  # d_0, d_H, n, widths


def proof(x: np.ndarray, y: np.ndarray, gamma: float, widths: tuple[int, ...], found: Any, **more: Any) -> Any:
    given = {"weights": found.weights, "coefficients": found.dual_variable.coefficients, **more}
    return verify([(x, y)], gamma=gamma, widths=widths, **given)


def assert_true(proven: Any, optimum: Decimal) -> None:
    """No slack at all."""
    assert Decimal(proven.lower) <= optimum <= Decimal(proven.upper)


def hard_x(rng: np.random.Generator, d_0: int, n: int) -> np.ndarray:
    """Rows of all sizes, zero, repeated, dependent, nearly so, or rounded to float32."""
    x = rng.normal(size=(d_0, n))
    for _ in range(int(rng.integers(0, 3))):
        a, b, c = rng.choice(d_0, 3, replace=False)
        x = spoiled(x, int(rng.integers(6)), a, b, c, rng)
    return x * 2.0 ** rng.integers(-60, 60, (d_0, 1))


@pytest.mark.parametrize("seed", range(4))
def test_what_is_proven_is_true_for_any_claim(seed):
    """Whatever data, weights and dual variable: right ones, wrong ones, nonsense; at sizes from 1e-150 to 1e150."""
    rng = np.random.default_rng(seed)
    tight = 0
    for _ in range(8):
        d_0, d_H, n, widths = SIZES[rng.integers(len(SIZES))]
        a, b = 2.0 ** rng.integers(-250, 250, 2)
        x, y = a * hard_x(rng, d_0, n), b * rng.normal(size=(d_H, n)) * rng.choice([1.0, 1.0, 0.0])
        gamma = float(b * rng.choice([0.0, 1e-9, 0.3, 1.0, 10.0]))
        optimum = rational_optimum(x, y, gamma, min(*widths, d_0, d_H, n))
        found = spectral.solve(x, y, gamma=gamma, widths=widths)
        right = proof(x, y, gamma, widths, found)
        assert_true(right, optimum)
        tight += right.relative_gap < 1e-6
        noise = 1 + 10.0 ** rng.uniform(-12, 1) * rng.normal(size=found.dual_variable.coefficients.shape)
        other = [w * (1 + 0.1 * rng.normal(size=w.shape)) for w in found.weights]
        assert_true(
            proof(x, y, gamma, widths, found, coefficients=noise * found.dual_variable.coefficients, weights=other),
            optimum,
        )
        assert_true(proof(x, y, gamma, widths, found, coefficients=100 * found.dual_variable.coefficients), optimum)
        assert_true(proof(x, y, gamma, widths, found, coefficients=0 * noise), optimum)
    assert tight >= 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_proof_is_tight_where_the_data_are_well_conditioned(rng, dtype):
    for condition, gap in ((10.0, 1e-10), (1e3, 1e-8), (1e6, 1e-4)):
        x, y = conditioned(rng, 6, 4, 5000, condition, dtype)
        for factorization in ("gram", "qr"):
            if factorization == "gram" and condition > 1e3:
                continue
            found = solve_columns(
                in_blocks(x, y, 700), gamma=1.5, widths=(3, 5), factorization=factorization, tolerance=1e-2
            )
            given = {"weights": found.solution.weights, "coefficients": found.solution.dual_variable.coefficients}
            proven = verify(in_blocks(x, y, 700), gamma=1.5, widths=(3, 5), **given)
            optimum = exact_optimum(x, y, 1.5, 3)
            assert proven.lower <= optimum * (1 + 1e-14)
            assert proven.upper >= optimum * (1 - 1e-14)
            assert proven.relative_gap <= gap + float(found.solution.relative_gap)


@pytest.mark.parametrize("basis", ["_rows_as_basis", "_basis_by_qr"])
def test_a_bad_fit_only_widens_the_bound(rng, basis, monkeypatch):
    """What the fit T leaves of F in the directions of X is charged in full."""
    module = importlib.import_module("dualgap_jax.spectral.verify")
    x, y = rng.normal(size=(4, 9)), rng.normal(size=(2, 9))
    found, optimum = spectral.solve(x, y, gamma=0.3, widths=(2, 3)), rational_optimum(x, y, 0.3, 2)
    good = proof(x, y, 0.3, (2, 3), found)
    if basis == "_basis_by_qr":
        monkeypatch.setattr(module, "_rows_as_basis", lambda *given: None)
    real = getattr(module, basis)

    for share in (0.0, 0.5, 0.999, 1.5):

        def worse(*given: Any, share: float = share) -> Any:
            kept = real(*given)
            return kept._replace(fit=share * kept.fit)

        monkeypatch.setattr(module, basis, worse)
        bad = proof(x, y, 0.3, (2, 3), found)
        assert_true(bad, optimum)
        assert bad.lower <= good.lower * (1 + 1e-12)


def test_dependencies_are_checked_in_integers(rng):
    x, y = np.round(4 * rng.normal(size=(6, 40))), rng.normal(size=(3, 40))
    x[3] = x[0] + x[1] - 2 * x[2]
    x[5] = 0
    found = solve_columns(in_blocks(x, y, 17), gamma=0.5, widths=(2, 3))
    assert float(found.solution.relative_gap) < 1e-12
    rows, coefficients, powers = found.dependencies
    assert found.dependencies.number == 1
    proven = proof(x, y, 0.5, (2, 3), found.solution, dependencies=found.dependencies)
    assert (proven.unresolved, proven.basis) == (0, "qr")
    assert proven.relative_gap < 1e-9
    assert_true(proven, Decimal(exact_optimum(np.delete(x, (3, 5), axis=0), y, 0.5, 2)) * (1 + Decimal(0)))
    without = proof(x, y, 0.5, (2, 3), found.solution)
    assert without.unresolved == 1
    assert without.relative_gap > 1e-3
    assert without.lower < proven.lower
    twice = (rows, np.concatenate([coefficients, 2 * coefficients]), powers)
    assert proof(x, y, 0.5, (2, 3), found.solution, dependencies=twice).unresolved == 0  # counted once
    with pytest.raises(VerificationError, match="is none"):
        proof(x, y, 0.5, (2, 3), found.solution, dependencies=(rows, coefficients + 1, powers))
    x[3, 7] = np.nextafter(x[3, 7], 100)
    with pytest.raises(VerificationError, match="is none"):
        proof(x, y, 0.5, (2, 3), found.solution, dependencies=found.dependencies)


def test_claims_that_cannot_be_checked_are_named(rng):
    x, y = rng.normal(size=(4, 9)), rng.normal(size=(2, 9))
    found = spectral.solve(x, y, gamma=0.1, widths=(3,))
    with pytest.raises(VerificationError, match="do not fit the widths"):
        proof(x, y, 0.1, (2,), found)
    with pytest.raises(VerificationError, match="not finite"):
        proof(np.where(x > 1, np.nan, x), y, 0.1, (3,), found)
    with pytest.raises(VerificationError, match="gamma is negative"):
        proof(x, y, -0.1, (3,), found)
    with pytest.raises(VerificationError, match="no blocks"):
        verify([], gamma=0.1, widths=(3,), weights=found.weights, coefficients=found.dual_variable.coefficients)
    given = {"weights": found.weights, "coefficients": found.dual_variable.coefficients}
    with pytest.raises(VerificationError, match="starts afresh"):
        verify(iter([(x, y)]), gamma=0.1, widths=(3,), **given)


def test_the_proof_shares_no_code_with_the_solvers():
    folder = Path(spectral.__file__).parent
    for name in ("verify.py", "evidence.py"):
        text = (folder / name).read_text()
        assert "import jax\n" not in text
        assert set(re.findall(r"dualgap_jax[\w.]*", text)) <= {"dualgap_jax.spectral.evidence"}


def test_what_overflows_in_a_claim_is_an_error_and_warns_of_nothing(rng, recwarn):
    x, y = rng.normal(size=(3, 5)), rng.normal(size=(2, 5))
    found = spectral.solve(x, y, gamma=0.3, widths=(2,))
    for size in (1e200, 1e300):
        try:
            proven = proof(x, y, 0.3, (2,), found, coefficients=np.full((2, 3), size))
            assert_true(proven, rational_optimum(x, y, 0.3, 2))
        except VerificationError:
            pass
        with pytest.raises(VerificationError, match="range"):
            proof(x, y, 0.3, (2,), found, weights=[size * w for w in found.weights])
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
