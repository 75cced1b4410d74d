"""Bounds on inf(P) with the hinge as it is, where Assumption 1 fails, against mixtures of many weights."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from dualgap_jax import experiments
from dualgap_jax.config import Component, experiment_config
from dualgap_jax.data import Dataset, synthetic_relu
from dualgap_jax.duality import Effort, SearchSpec, branch_problem, clipped, theorem
from dualgap_jax.duality.clipped import Clipped, clipped_hinge, verify_clipped
from dualgap_jax.duality.problem import Problem
from dualgap_jax.duality.trained import TrainedSpec
from dualgap_jax.experiments.duality_gap import DualityGapSpec
from dualgap_jax.files import load_json
from dualgap_jax.networks import from_functions, mlp

SMALL = Effort(search=SearchSpec(budgets=4, starts=24, steps=60, sweeps=1, survivors=2))


def points(rng: np.random.Generator, n: int, d: int) -> Dataset:
    x, y = rng.standard_normal((n, d)).astype(np.float32), rng.choice([-1.0, 1.0], n).astype(np.float32)
    return Dataset("random", x, y, np.zeros(1, np.float32), np.ones(1, np.float32), 1, "binary", {})


def relu(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`a max(0, u.x)` at weights `[k, 3]`."""
    return w[:, 2:] * np.maximum(w[:, :2] @ x.T, 0)


def best_mixture(one: Problem, w: np.ndarray, budget: float) -> float:
    """The least risk of mixtures of weights, by linear programming."""
    scores, k, n = one.c[:, 0] * relu(w, one.x) / one.tau, len(w), len(one.x)
    above = np.concatenate([-scores.T, -np.eye(n)], axis=1)
    cost = np.concatenate([one.h(w), np.zeros(n)])[None]
    found = linprog(
        np.concatenate([np.zeros(k), np.full(n, 1 / n)]), A_ub=np.concatenate([above, cost]),
        b_ub=np.append(-np.ones(n), budget), A_eq=np.concatenate([np.ones(k), np.zeros(n)])[None], b_eq=[1.0],
    )  # fmt: skip
    return float(found.fun)


@pytest.fixture(scope="module")
def solved() -> tuple[Problem, Clipped]:
    one = branch_problem(mlp((1,), 1, use_bias=False), points(np.random.default_rng(5), 16, 2), tau=0.2, radius=2.0)
    return one, clipped_hinge(one, 1.5, [1, 2, 5, 50], effort=SMALL)


def test_bounds_against_many_mixtures(solved: tuple[Problem, Clipped]) -> None:
    one, found = solved
    rng = np.random.default_rng(0)
    w = rng.standard_normal((1500, 3))
    w *= one.radius * rng.random((1500, 1)) ** 0.3 / np.linalg.norm(w, axis=1, keepdims=True)
    least = best_mixture(one, w, 1.5)
    for row in found.rows:
        assert (row.lower_status, row.upper_status) == ("certified", "certified")
        assert row.lower <= least + 1e-9
        assert sum(row.counts) == row.num_branches
        mean = np.average(relu(row.points, one.x), axis=0, weights=row.counts)
        assert np.maximum(0, 1 - one.c[:, 0] * mean / one.tau).mean() <= row.upper
        assert np.average(one.h(row.points), weights=row.counts) <= 1.5
    assert least - found.rows[0].lower < 0.02
    assert found.rows[-1].upper - found.rows[-1].lower < 0.01
    plain = theorem.theorem1(one, 1.5, 1, points=65, effort=SMALL).rows[0]
    assert plain.objective == "unclipped hinge"
    assert found.rows[0].lower > max(0.0, plain.primal_lower) + 0.1


def test_where_assumption_1_holds_both_problems_are_one(rng: np.random.Generator) -> None:
    one = branch_problem(mlp((1,), 1, use_bias=False), points(rng, 9, 2), tau=50.0, radius=2.0)
    found = clipped_hinge(one, 1.5, 1, effort=SMALL, points=65)
    (row,) = theorem.theorem1(one, 1.5, 1, points=65, effort=SMALL).rows
    assert (found.weights == 1).all()
    assert found.rows[0].lower == pytest.approx(row.dual_lower, abs=1e-9)
    assert row.primal_lower - 1e-12 <= found.rows[0].upper


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_budgets_up_to_the_largest_h_and_beyond_it(power: float) -> None:
    one = branch_problem(mlp((1,), 1, use_bias=False), synthetic_relu(n=20, d=2), tau=1.0, radius=3.0, power=power)
    most = 3.0**power
    budgets = [0.4 * most, 4.0, 5.0, most, (1 + 1e-13) * most, 10.0 * most, 1e300, np.inf]
    budgets = sorted(budget for budget in budgets if budget >= 0.4 * most)
    found = [clipped_hinge(one, budget, [1, 5], effort=SMALL, points=65) for budget in budgets]
    for bounds in found:
        assert {(row.lower_status, row.upper_status) for row in bounds.rows} == {("certified", "certified")}
    for small, large in itertools.pairwise(found):
        assert large.rows[0].lower <= small.rows[0].lower + 1e-9
        assert large.rows[1].upper <= small.rows[1].upper + 1e-9
    # From the largest h on the constraint binds nobody.
    free = found[-1]
    for bounds, budget in zip(found, budgets, strict=True):
        if budget >= most:
            assert bounds.rows[0].lower == pytest.approx(free.rows[0].lower, abs=1e-6)
            assert [row.upper for row in bounds.rows] == pytest.approx([row.upper for row in free.rows], abs=1e-6)


def test_bounds_leave_room_for_the_checkers_roundings() -> None:
    data = points(np.random.default_rng(0), 12, 2)
    one = branch_problem(mlp((1,), 1, use_bias=False), data, tau=1.0, radius=3.0)
    found = clipped_hinge(one, np.inf, 1, effort=SMALL, points=65)
    assert found.rows[0].lower_status == "certified", found.reasons


@pytest.mark.parametrize("budget", [0.0, 1e-300, 3.99, 4.0, 1e300])
def test_weights_that_all_cost_nothing_are_a_mixture(budget: float, rng: np.random.Generator) -> None:
    scores, costs = np.zeros((1, 5)), np.zeros(1)
    best = clipped._master(scores, costs, budget, 1.0)
    assert (best.value, best.shares.tolist(), best.lam) == (1.0, [1.0], 0.0)
    two = clipped._master(np.stack([np.zeros(5), np.ones(5)]), np.array([0.0, 1e-305]), budget, 1.0)
    assert two.value == pytest.approx(max(0.0, 1 - budget / 1e-305), abs=1e-6)


def test_claims_are_proven_again_and_nothing_better_is(solved: tuple[Problem, Clipped]) -> None:
    one, found = solved
    assert verify_clipped(one, found) == {"lower": "", "upper": ""}
    row = found.rows[0]

    def reasons(**change: Any) -> dict[str, str]:
        return dict(verify_clipped(one, found._replace(rows=[row._replace(**change)])))

    assert "does not follow" in reasons(lower=row.lower + 1e-9)["lower"]
    assert "larger than claimed" in reasons(upper=row.upper - 1e-9)["upper"]
    assert "not feasible" in reasons(budget=0.9 * row.budget)["upper"]
    assert "not feasible" in reasons(points=2 * row.points)["upper"]
    other = verify_clipped(one, found._replace(weights=np.ones(16)))
    assert other["lower"]
    with pytest.raises(ValueError, match="between 0 and 1"):
        verify_clipped(one, found._replace(weights=np.full(16, 1.1)))


@pytest.mark.parametrize(
    "branch",
    [mlp((2,), 1), mlp((3, 2), 1, activation="tanh"), mlp((), 1), mlp((1,), 1, use_bias=False)],
    ids=["bias", "two layers", "affine", "no bias"],
)
def test_the_checkers_outputs_hold_those_of_the_branch(branch: Any, x64: None, rng: np.random.Generator) -> None:
    one = branch_problem(branch, points(rng, 7, 2), tau=1.0, radius=3.0)
    w = rng.standard_normal((5, one.size))
    low, high = clipped.Walker(one).outputs(w)
    truth = np.asarray(jax.vmap(one.outputs)(jnp.asarray(w)))
    assert (np.broadcast_to(low, truth.shape) <= truth).all()
    assert (truth <= np.broadcast_to(high, truth.shape)).all()
    assert (high - low).max() <= 1e-12 * (1 + np.abs(truth).max())


def test_an_operation_that_the_checker_does_not_know_makes_a_bound_an_estimate(solved: tuple[Problem, Clipped]) -> None:
    one, found = solved
    branch = from_functions(lambda key, x: jnp.ones(3), lambda w, x: jax.lax.lgamma(x @ w[:2] + 9)[:, None] * w[2])
    other = one._replace(branch=branch, template=jnp.ones(3), state=(), size=3)
    lowered = [row._replace(lower_status="estimated") for row in found.rows]
    assert "lgamma" in verify_clipped(other, found._replace(rows=lowered))["upper"]


def test_what_is_not_covered_is_refused(rng: np.random.Generator) -> None:
    sample = points(rng, 6, 2)
    classes = sample._replace(y=np.array([0, 1, 2, 0, 1, 2], np.int32), num_outputs=3, task="multiclass")
    one = branch_problem(mlp((1,), 3, use_bias=False), classes, tau=1.0, radius=1.0)
    with pytest.raises(ValueError, match="one output alone"):
        clipped_hinge(one, 1.0, 3)
    two = branch_problem(mlp((1,), 1, use_bias=False), sample, tau=1.0, radius=1.0)
    with pytest.raises(ValueError, match="below the least h"):
        clipped_hinge(two, -1.0, 3)
    assert not clipped.feasible(two, np.array([[2.0, 0.0, 0.0]]), [1], 9.0)


def test_the_record_says_what_is_known_of_the_hinge(tmp_path: Any) -> None:
    spec = DualityGapSpec(
        data=Component("synthetic_relu", {"n": 20, "d": 2}), num_branches=(1, 10), grid=33, search=SMALL.search,
        trained=TrainedSpec(num_branches=()), tau=0.5,
    )  # fmt: skip
    report, folder, _ = experiments.run(experiment_config("duality_gap", spec), workdir=tmp_path / "w")
    record = load_json(folder.results / "duality_gap.json")
    assert record["objective"] == "unclipped hinge"
    for row in record["hinge"]["rows"]:
        assert (row["lower_status"], row["upper_status"]) == ("certified", "certified")
        assert 0 <= row["lower"] <= row["upper"] <= 1
    assert any("hinge with its maximum (proven)" in note for note in report.notes)


def test_counts_of_another_number_of_branches_and_no_numbers_are_refused(solved: tuple[Problem, Clipped]) -> None:
    one, found = solved
    first, last = found.rows[0], found.rows[-1]
    assert last.upper < first.upper

    def reasons(**change: Any) -> dict[str, str]:
        return dict(verify_clipped(one, found._replace(rows=[last._replace(**change)])))

    assert "not those of so many branches" in reasons(num_branches=1)["upper"]
    assert reasons(counts=tuple(0.5 * count for count in last.counts), num_branches=last.num_branches // 2)["upper"]
    for wrong in (float("nan"), float("inf"), None):
        assert reasons(lower=wrong)["lower"]
        assert reasons(budget=wrong)["lower"]
    for change in ({"counts": ()}, {"points": last.points[:, :2]}, {"points": last.points[:0]}, {"upper": "small"}):
        assert reasons(**change)["upper"]


def test_what_the_checker_does_not_prove_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    one = branch_problem(mlp((1,), 1, use_bias=False), points(np.random.default_rng(5), 6, 2), tau=0.2, radius=2.0)
    monkeypatch.setattr(clipped, "verify_clipped", lambda *_: {"lower": "it is off", "upper": "so is this"})
    found = clipped_hinge(one, 1.5, [1, 2], effort=SMALL, points=65)
    assert {row.upper_status for row in found.rows} == {"estimated"}
    assert all(row.lower_status == ("estimated" if row.lower > 0 else "certified") for row in found.rows)
    assert found.reasons["lower"] == "it is off"
