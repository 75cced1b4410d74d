"""The spectral bound with weights of examples: its least value by a conic solver, the dual vectors that it raises."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from certify_oracles import convex_program, drawn, group_lasso, problem

from dualgap_jax.certify import weighted
from dualgap_jax.certify.assess import _least_proof
from dualgap_jax.certify.bounds import best_proven, from_ceiling, lower_bound
from dualgap_jax.certify.engines import ceiling, relaxed
from dualgap_jax.certify.verify import verify_bound
from dualgap_jax.duality.branch_and_bound import BoundSpec


def least_bound(x: np.ndarray, alpha: np.ndarray, slope: float) -> float:
    """The least bound of all weights, as the largest value over second moments of a and u together."""
    import cvxpy as cp

    (n, d), out = x.shape, alpha.shape[1]
    y = cp.Variable((out + d, out + d), PSD=True)
    a, u, cross = y[:out, :out], y[out:, out:], y[:out, out:]
    sizes = [cp.geo_mean(cp.hstack([p @ a @ p, t @ u @ t])) for p, t in zip(alpha, x, strict=True)]
    mean = alpha.T @ x / n
    value = (1 + slope) / 2 * cp.sum(cp.multiply(mean, cross)) + (1 - slope) / 2 * cp.sum(cp.hstack(sizes)) / n
    model = cp.Problem(cp.Maximize(value), [cp.trace(a) == 1, cp.trace(u) == 1])
    model.solve(solver=cp.CLARABEL)
    return float(model.value)


@pytest.mark.parametrize("slope", [0.0, 0.01])
@pytest.mark.parametrize("out", [1, 3])
def test_the_weights_are_nearly_the_best(out: int, slope: float, rng: Any) -> None:
    x, alpha = rng.uniform(-1, 1, (14, 4)), rng.uniform(-1, 1, (14, out))
    x[3], alpha[5] = 0.0, 0.0
    best = least_bound(x, alpha, slope)
    found = weighted.bounded(x, alpha, weighted.deltas(x, alpha, slope), slope)
    assert best * (1 - 1e-6) <= found <= best * 1.01
    u = rng.standard_normal((5000, 4))
    t = (u / np.linalg.norm(u, axis=1, keepdims=True)) @ x.T
    seen = np.linalg.norm(np.where(t > 0, t, slope * t) @ alpha, axis=1).max() / 14
    assert seen <= found
    for delta in np.exp(rng.standard_normal((20, 14))):  # any weights prove a bound
        assert weighted.bounded(x, alpha, delta, slope) >= best * (1 - 1e-6)


CASES = [
    ("squared", 1, {"penalty": 0.03}),
    ("logistic", 1, {"budget": 2.0}),
    ("binary_hinge", 1, {"penalty": 0.05, "use_bias": True}),
    ("multi_margin", 3, {"penalty": 0.02}),
    ("crammer_singer", 3, {"penalty": 0.05}),
    ("logistic", 3, {"budget": 1.0, "use_bias": True, "activation": "leaky_relu"}),
]


@pytest.mark.parametrize(("loss", "out", "settings"), CASES)
def test_raised_dual_vectors_prove_more_and_not_too_much(loss: str, out: int, settings: Any, rng: Any) -> None:
    one = problem(drawn(rng, 16, 2, out), loss, **settings)
    alpha = one.slope(0.3 * rng.standard_normal(one.shape))
    top = ceiling(one, alpha, "spectral")
    assert top is not None
    before = from_ceiling(one, alpha, top)
    rows = weighted.raised(one, alpha)
    top = ceiling(one, rows, "spectral")
    assert top is not None
    after = from_ceiling(one, rows, top)
    assert after.value >= before.value - 1e-9
    found = verify_bound(one, after)
    assert found.holds, found.reason
    exact = ceiling(one, rows, "cells")
    assert exact is not None
    assert top.upper >= exact.lower
    # Units of fewer directions are no better than all of them.
    x, y = np.asarray(one.one.x, np.float64), np.asarray(one.y)
    if not settings.get("use_bias") and settings.get("activation") is None:
        limits = {k: settings[k] for k in ("penalty", "budget") if k in settings}
        if out == 1:
            least = convex_program(x, y, loss, **limits)
        else:
            angles = np.linspace(0, 2 * np.pi, 90, endpoint=False)
            directions = np.stack([np.cos(angles), np.sin(angles)], 1)
            least = group_lasso(x, y, loss, directions, penalty=settings["penalty"])
        assert after.value <= least + 1e-7

    # What is claimed too low, or proven by other weights, is refused.
    assert after.kappa is not None
    assert not verify_bound(one, dataclasses.replace(after, kappa=0.99 * after.kappa)).holds
    for delta in (2.0 * after.evidence.bound.delta, -after.evidence.bound.delta, after.evidence.bound.delta[:-1]):
        forged = after.evidence._replace(bound=after.evidence.bound._replace(delta=delta))
        assert not verify_bound(one, dataclasses.replace(after, evidence=forged)).holds
    low = after.evidence._replace(bound=after.evidence.bound._replace(upper=0.99 * after.evidence.bound.upper))
    assert not verify_bound(one, dataclasses.replace(after, evidence=low)).holds


@pytest.mark.parametrize(
    ("loss", "out", "settings"),
    [
        ("logistic", 1, {"penalty": 0.03, "activation": "leaky_relu"}),  # which the joint relaxation does not take
        ("binary_hinge", 1, {"budget": 0.5, "use_bias": True}),
        ("multi_margin", 3, {"penalty": 0.03}),
    ],
)
def test_what_is_moved_proves_no_less_than_what_is_not(loss: str, out: int, settings: Any, rng: Any) -> None:
    one = problem(drawn(rng, 14, 4, out), loss, **settings)
    alpha = one.slope(0.3 * rng.standard_normal(one.shape))
    found = best_proven(one, alpha, BoundSpec(1e-6, 1000))
    assert found.value >= lower_bound(one, alpha).value - 1e-12
    assert verify_bound(one, found).holds


def test_networks_of_smaller_weights_are_worse(rng: Any) -> None:
    one = problem(drawn(rng, 12, 2), "binary_hinge", budget=50.0)
    alpha = one.slope(np.zeros(one.shape))
    own = _least_proof(one, alpha, ceiling(one, alpha, "spectral"), 0.05)  # type: ignore[arg-type]
    assert own is not None
    for rows, top in relaxed(one, alpha, loss=0.05):
        proof = _least_proof(one, rows, top, 0.05)
        assert proof is not None
        tight, bound = proof
        assert tight.budget is not None
        assert tight.budget >= 0.999 * own[0].budget  # type: ignore[operator]
        assert bound.value > 0.05
        assert verify_bound(tight, bound).holds
        x, y = np.asarray(one.one.x, np.float64), np.asarray(one.y, np.float64)
        assert convex_program(x, y, "binary_hinge", budget=tight.budget) >= 0.05 - 1e-7


def test_units_of_the_data(rng: Any) -> None:
    power = 300
    one = problem(drawn(rng, 16, 4, 3), "multi_margin", penalty=0.05)
    alpha = one.slope(np.zeros(one.shape))
    first = ceiling(one, weighted.raised(one, alpha), "spectral")
    assert first is not None
    far = dataclasses.replace(one, penalty=np.ldexp(0.05, power), one=one.one._replace(x=np.ldexp(one.one.x, power)))
    rows = weighted.raised(far, alpha)
    top = ceiling(far, rows, "spectral")
    assert top is not None
    assert np.ldexp(top.upper, -power) == pytest.approx(first.upper, rel=0.02)
    assert verify_bound(far, from_ceiling(far, rows, top)).holds
