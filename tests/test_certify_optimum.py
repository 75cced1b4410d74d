"""F* from both sides against convex programs over all activation patterns, and its parts against their definitions."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import numpy as np
import pytest
from certify_oracles import convex_program, dataset, drawn, group_lasso, problem, rho_by_arcs
from scipy.optimize import minimize
from threadpoolctl import threadpool_info, threadpool_limits

from dualgap_jax import certify
from dualgap_jax.certify import OptimumSpec, RiskProblem, optimum, verify_bound
from dualgap_jax.certify.descent import lbfgs
from dualgap_jax.certify.primal import risk
from dualgap_jax.certify.reduced import solve
from dualgap_jax.certify.search import BranchSearch, best_units
from dualgap_jax.config import ConfigError
from dualgap_jax.duality.branch_and_bound import BoundSpec
from dualgap_jax.duality.search import SearchSpec

QUICK = OptimumSpec(units=12, starts=16, tolerance=5e-6)


def checked(one: RiskProblem, found: certify.Certificate, width: float) -> None:
    """What every result has to satisfy: proven bounds, an identity, a feasible measure with the risk it claims."""
    at_zero = float(one.losses(np.zeros(one.shape)).mean())
    assert found.status == "certified"
    assert found.lower <= found.upper <= found.lower + width * at_zero
    assert found.lower_estimated is not None
    assert found.lower_estimated <= found.upper
    parts = float(found.shares @ found.excess) + found.multiplier * found.slack + found.fenchel
    if one.reduce == "mean":
        assert found.shares.sum() == pytest.approx(1.0)
        assert found.gap == pytest.approx(parts, abs=1e-9)
    with jax.enable_x64(True):
        outputs = sum(
            s * np.asarray(one.one.outputs(jax.numpy.asarray(w)))
            for w, s in zip(found.weights, found.shares, strict=True)
        )
    costs = found.shares @ np.linalg.norm(found.weights, axis=1) ** one.power
    assert found.upper == pytest.approx(one.losses(outputs).mean() + (one.penalty or 0) * costs, rel=1e-10)
    assert costs <= (np.inf if one.budget is None else one.budget)
    assert np.linalg.norm(found.weights, axis=1).max() <= one.radius
    assert verify_bound(one, found.bound).holds
    uppers = [row["upper"] for row in found.history]
    assert uppers == sorted(uppers, reverse=True)


@pytest.mark.parametrize(
    "settings",
    [{}, {"reduce": "sum"}, {"power": 3.0, "radius": 2.0}, {"activation": "tanh", "radius": 2.0}],
    ids=["mean", "sum", "power", "tanh"],
)
def test_a_budget_of_0_leaves_the_zero_network(settings: Any, rng: Any) -> None:
    one = problem(drawn(rng, 8, 2), "logistic", budget=0.0, **settings)
    zeros = np.zeros((3, one.one.size))
    at_zero = float(one.losses(np.zeros(one.shape)).mean())
    assert risk(one, zeros, np.full(3, 1 / 3)).mean_h == 0
    assert certify.distance(one, zeros).upper == pytest.approx(at_zero, rel=1e-12)
    found = optimum(one, spec=QUICK)
    checked(one, found, 1e-5)
    assert found.lower <= at_zero <= found.upper
    assert found.upper == pytest.approx(at_zero, rel=1e-12)
    assert not found.weights[found.shares > 0].any()
    with pytest.raises(ValueError, match="above the budget 0"):
        certify.distance(one, zeros + 1e-200)


@pytest.mark.parametrize("loss", ["binary_hinge", "squared", "logistic"])
@pytest.mark.parametrize(("n", "settings"), [(8, {"penalty": 0.02}), (14, {"budget": 3.0})])
def test_optimum_is_that_of_the_convex_program(loss: str, n: int, settings: Any, rng: Any) -> None:
    data = drawn(rng, n, 2)
    best = convex_program(np.asarray(data.x, np.float64), np.asarray(data.y, np.float64), loss, **settings)
    one = problem(data, loss, **settings)
    found = optimum(one, spec=QUICK)
    checked(one, found, 1e-5)
    assert found.lower <= best + 1e-6
    assert found.upper >= best - 1e-6


@pytest.mark.parametrize("loss", ["multi_margin", "logistic"])
def test_optimum_of_three_classes_against_a_group_lasso(loss: str, rng: Any) -> None:
    data = drawn(rng, 9, 2, 3)
    one = problem(data, loss, penalty=0.05)
    found = optimum(one, spec=QUICK)
    checked(one, found, 1e-5)
    angles = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)], 1)
    own = found.weights[:, :2] / np.linalg.norm(found.weights[:, :2], axis=1, keepdims=True)
    directions = np.concatenate([directions, own[np.isfinite(own).all(axis=1)]])
    best = group_lasso(np.asarray(data.x, np.float64), np.asarray(data.y), loss, directions, penalty=0.05)
    assert found.lower - 1e-6 <= best <= found.upper + 1e-4


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("squared", {"hidden": (1, 1), "budget": 1.0, "radius": 2.0}),
        ("binary_hinge", {"penalty": 0.02, "radius": 1.2}),
        ("logistic", {"penalty": 0.02, "use_bias": True}),
        ("binary_hinge", {"budget": 2.0, "use_bias": True, "hidden": (2,)}),
        ("squared", {"penalty": 0.05, "reduce": "sum", "activation": "leaky_relu"}),
    ],
)
def test_both_sides_meet(loss: str, settings: Any, rng: Any) -> None:
    one = problem(drawn(rng, 10, 2), loss, **settings)
    checked(one, optimum(one, spec=QUICK), 1e-5)


@pytest.mark.parametrize("size", [2.0**-30])
@pytest.mark.parametrize("loss", ["binary_hinge", "crammer_singer"])
@pytest.mark.parametrize("settings", [{"penalty": 0.02}, {"budget": 1.5}], ids=["penalty", "budget"])
def test_units_of_the_inputs_change_no_optimum(loss: str, settings: Any, size: float, rng: Any) -> None:
    x = rng.standard_normal((12, 2))
    y = rng.choice([-1.0, 1.0], 12) if loss == "binary_hinge" else np.append(np.arange(3), rng.integers(0, 3, 9))
    scaled = {name: value * (size if name == "penalty" else 1 / size) for name, value in settings.items()}
    here, there = problem(dataset(x, y), loss, **settings), problem(dataset(x * size, y), loss, **scaled)
    found, again = (optimum(one, spec=OptimumSpec(units=8, rounds=4, tolerance=1e-4)) for one in (here, there))
    checked(there, again, 5e-3)
    assert again.lower <= found.upper
    assert found.lower <= again.upper


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (OptimumSpec, {"units": 2.5}, "units must be a positive integer, got 2.5"),
        (OptimumSpec, {"rounds": "3"}, "rounds must be a positive integer, got '3'"),
        (BoundSpec, {"max_boxes": True}, "max_boxes must be a positive integer, got True"),
        (SearchSpec, {"starts": 0}, "search.starts must be a positive integer, got 0"),
        (SearchSpec, {"sweeps": -1}, "search.sweeps must be a whole number of at least 0, got -1"),
    ],
)
def test_efforts_that_are_no_counts_are_refused(kind: type, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        inspect.unwrap(kind.__init__)(object.__new__(kind), **settings)


@pytest.mark.parametrize(
    "settings", [{"budget": 1e-320}, {"budget": 1e-320, "radius": 5.0}, {"penalty": 0.02, "radius": 1e20}]
)
def test_sizes_at_the_ends_of_the_range_give_no_warning(settings: Any, rng: Any) -> None:
    one = problem(drawn(rng, 7, 3), "squared", hidden=(2,), **settings)
    found = optimum(one, spec=OptimumSpec(units=4, rounds=2))
    assert found.lower <= found.upper <= one.losses(np.zeros(one.shape)).mean() + 1e-12


def test_branch_and_bound_proves_the_optimum_of_tanh_branches(rng: Any) -> None:
    one = problem(drawn(rng, 8, 1), "squared", activation="tanh", penalty=0.02, radius=5.0)
    found = optimum(one, spec=QUICK)
    checked(one, found, 1e-6)
    assert found.method.startswith("branch and bound")
    # No network of few branches does better than the bound, and local search over them comes near to it.
    x, y = np.asarray(one.one.x, np.float64)[:, 0], np.asarray(one.y, np.float64)

    def value(v: np.ndarray) -> float:
        u, a = v.reshape(2, -1)
        outputs = (a * np.tanh(x[:, None] * u)).mean(axis=1)
        return float(0.5 * np.mean((outputs - y) ** 2) + 0.02 * np.mean(u**2 + a**2))

    reached = min(float(minimize(value, rng.standard_normal(2 * i)).fun) for i in (1, 2, 8, 8))
    assert found.lower <= reached
    assert reached <= found.upper + 0.05


def test_a_start_is_used_and_a_trained_network_is_no_better_than_the_optimum(rng: Any) -> None:
    one = problem(drawn(rng, 10, 2), "logistic", penalty=0.02)
    best = optimum(one, spec=QUICK)
    again = optimum(one, start=best.weights * np.sqrt(best.shares * len(best.shares))[:, None], spec=QUICK)
    assert len(again.history) == 1
    assert again.upper == pytest.approx(best.upper, abs=1e-6)
    network = certify.distance(one, rng.standard_normal((4, 3)), alpha=best.alpha, estimate=False)
    assert network.lower == pytest.approx(best.lower, abs=1e-9)
    assert network.upper >= best.lower


@pytest.mark.parametrize("loss", ["squared", "logistic", "binary_hinge", "crammer_singer"])
@pytest.mark.parametrize("free", [True, False])
def test_shares_solve_the_convex_problem(loss: str, free: bool, rng: Any) -> None:
    """No other shares are better, and the dual vectors bound the value from below over these branches."""
    classes = 3 if loss == "crammer_singer" else 1
    for settings in ({"penalty": 0.05}, {"budget": 1.0}):
        one = problem(drawn(rng, 9, 2, classes), loss, **settings)
        outputs, costs = rng.standard_normal((6, *one.shape)), rng.uniform(0.2, 2, 6)
        outputs[0], costs[0] = 0.0, 0.0
        found = solve(one, outputs, costs, free=free)

        def value(
            s: np.ndarray, one: RiskProblem = one, outputs: np.ndarray = outputs, costs: np.ndarray = costs
        ) -> float:
            return float(one.losses(np.tensordot(s, outputs, 1)).mean() + (one.penalty or 0.0) * costs @ s)

        phi = np.tensordot(outputs, found.alpha, 2) / one.shape[0] + found.multiplier * costs
        least = min(0.0, float(phi.min())) if not free else 0.0
        assert phi.min() >= -1e-6 or not free
        bound = -one.conjugate(found.alpha, one.y).mean() + least - found.multiplier * (one.budget or 0.0)
        assert found.shares.min() >= 0
        assert costs @ found.shares <= (one.budget or np.inf) * (1 + 1e-9)
        assert free or found.shares.sum() == pytest.approx(1.0)
        assert value(found.shares) == pytest.approx(bound, abs=1e-6)


def test_units_rise(rng: Any) -> None:
    x, alpha = rng.standard_normal((30, 4)), rng.standard_normal((30, 2))
    start = rng.standard_normal((20, 4))
    u, sums = best_units(x, alpha, start, 0.0)
    np.testing.assert_allclose(sums, np.maximum(u @ x.T, 0) @ alpha / 30, atol=1e-12)
    before = np.linalg.norm(np.maximum(start @ x.T, 0) @ alpha, axis=1) / 30 / np.linalg.norm(start, axis=1)
    after = np.linalg.norm(sums, axis=1)
    assert (after >= before - 1e-12).all()
    assert after.max() > 1.05 * before.max()


@pytest.mark.parametrize(("n", "d"), [(6, 20), (1, 3)])
def test_units_rise_where_the_examples_span_less_than_the_space(n: int, d: int, rng: Any) -> None:
    x, alpha = rng.standard_normal((n, d)), rng.standard_normal((n, 2))
    start = rng.standard_normal((20, d))
    u, sums = best_units(x, alpha, start, 0.0)
    np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(sums, np.maximum(u @ x.T, 0) @ alpha / n, atol=1e-12)
    before = np.linalg.norm(np.maximum(start @ x.T, 0) @ alpha, axis=1) / n / np.linalg.norm(start, axis=1)
    assert (np.linalg.norm(sums, axis=1) >= before - 1e-12).all()
    if n == 1:  # the best unit is the example itself
        best = np.linalg.norm(x) * np.linalg.norm(alpha)
        assert np.linalg.norm(sums, axis=1).max() == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("large", [0, 2**17], ids=["float32 first", "float64"])
def test_units_reach_the_maxima_where_ridges_meet(large: int, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the plane the largest sum is known exactly; a search along gradients stops short of it at kinks."""
    monkeypatch.setattr("dualgap_jax.certify.search._LARGE", large)
    for _ in range(5):
        x, alpha = rng.standard_normal((60, 2)), rng.standard_normal((60, 1))
        _, sums = best_units(x * 1e60, alpha * 1e-60, rng.standard_normal((16, 2)), 0.0)
        assert np.abs(sums).max() == pytest.approx(rho_by_arcs(x, alpha[:, 0]), rel=1e-4)


def test_a_descent_has_one_thread_of_blas_and_leaves_it_as_it_was() -> None:
    def threads() -> list[int]:
        return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]

    seen: list[list[int]] = []

    def bowl(x: np.ndarray, centre: float) -> tuple[float, np.ndarray]:
        seen.append(threads())
        return float(np.sum((x - centre) ** 2)), 2 * (x - centre)

    with threadpool_limits(2, "blas"):
        before = threads()
        np.testing.assert_allclose(lbfgs(bowl, np.zeros(3), 2.0, maxiter=20), 2.0, atol=1e-6)
        assert max(before) == 2
        assert max(seen[0]) == 1
        assert threads() == before


def test_an_estimate_above_the_risk_of_a_network_is_none(rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = problem(drawn(rng, 12, 4), "squared", penalty=0.01)
    found = optimum(one, spec=OptimumSpec(units=8, rounds=2, starts=8), prove=False)
    assert found.lower_estimated is not None
    assert found.lower_estimated <= found.upper

    def blind(x: Any, alpha: Any, units: Any, slope: float, steps: int = 0) -> Any:
        u = units / np.linalg.norm(units, axis=1, keepdims=True)
        return u, 1e-3 * np.maximum(u @ x.T, 0) @ alpha / len(x)

    monkeypatch.setattr("dualgap_jax.certify.search.best_units", blind)
    missed = certify.distance(one, found.weights * np.sqrt(found.shares * len(found.shares))[:, None])
    assert missed.search_missed
    assert missed.lower_estimated is missed.gap_estimated is None
    assert "no estimate: the search has missed" in missed.as_text()


def test_a_search_over_parts_of_the_examples_keeps_the_branches_it_is_given(
    rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = problem(drawn(rng, 60, 5), "squared", penalty=0.02)
    alpha = one.slope(np.zeros(one.shape))
    best, values = BranchSearch(one, starts=16)(alpha, 0.0, 1.0)
    monkeypatch.setattr("dualgap_jax.certify.search._NUMBERS", 50)
    look = BranchSearch(one, starts=16)
    assert look.in_parts
    for how in ({}, {"coarse": True}, {"alone": True}):
        points, found = look.kappa(alpha, best[:4], **how)
        assert found[0] >= -values[0] * (1 - 1e-9)
        assert -look.values(points[:1], alpha, 0.0)[0] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("loss", ["squared", "binary_hinge"])  # smooth and with kinks
def test_the_relaxation_moves_the_dual_vectors_of_optimum(loss: str, rng: Any) -> None:
    one = problem(drawn(rng, 14, 5), loss, penalty=0.02)
    found = optimum(one, spec=OptimumSpec(units=12, rounds=2, starts=16))
    checked(one, found, 1.0)
    assert found.method == "moments"
    alone = certify.lower_bound(one, one.slope(risk_of(one, found)), engine="moments")
    assert found.lower >= alone.value - 1e-3 * abs(alone.value)
    assert found.gap < 0.1 * found.upper


def risk_of(one: RiskProblem, found: certify.Certificate) -> np.ndarray:
    return np.asarray(risk(one, found.weights, found.shares).outputs)


@pytest.mark.parametrize("settings", [{"rounds": 0}, {"units": 0}, {"tolerance": -1.0}, {"seconds": float("nan")}])
def test_bad_efforts(settings: Any) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        OptimumSpec(**settings)
