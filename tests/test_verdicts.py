"""Who may say certified, which problem a verdict speaks of, and the checker that proves it again."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gap_oracles import exact_dual, exact_primal

from dualgap_jax import experiments
from dualgap_jax.config import Component, experiment_config
from dualgap_jax.data import Dataset
from dualgap_jax.duality import (
    BoundSpec,
    Effort,
    SearchSpec,
    ValueFunction,
    Verdict,
    branch_problem,
    certify,
    closed_forms,
    deltas,
    search,
    theorem1,
    verdicts,
)  # fmt: skip
from dualgap_jax.duality.checker.gap import BOUNDS, Checker, NotProvenError, Premises, Row, check_record, row_of
from dualgap_jax.duality.margins import margin_bound
from dualgap_jax.duality.problem import Problem, subject_of
from dualgap_jax.duality.theorem import _dual_effort
from dualgap_jax.duality.trained import TrainedSpec, train_constrained
from dualgap_jax.duality.values import proven
from dualgap_jax.duality.verdict import Instance
from dualgap_jax.experiments.duality_gap import DualityGapSpec
from dualgap_jax.files import load_json, load_npz
from dualgap_jax.losses import binary_hinge
from dualgap_jax.networks import from_functions, mlp, mlp_output_bound

TINY = SearchSpec(budgets=4, starts=8, steps=20, sweeps=1, survivors=2)


def points(rng: np.random.Generator, n: int, d: int) -> Dataset:
    x, y = rng.standard_normal((n, d)).astype(np.float32), rng.choice([-1.0, 1.0], n).astype(np.float32)
    return Dataset("random", x, y, np.zeros(1, np.float32), np.ones(1, np.float32), 1, "binary", {})


class Solved(NamedTuple):
    problem: Problem
    function: ValueFunction
    delta: deltas.Combination


def chain(rng: np.random.Generator, *, share: float = 1.01, radius: float = 1.5, grid: int = 65) -> Solved:
    """A ReLU chain of three layers in the plane, tau at `share` times the proven bound on the margins."""
    sample = points(rng, 20, 2)
    longest = float(np.linalg.norm(sample.x, axis=1).max())
    tau = share * mlp_output_bound(3, radius, longest)
    one = branch_problem(mlp((1, 1), 1, use_bias=False), sample, tau=tau, radius=radius)
    kappa = closed_forms.kappa_relu_chain(one.x, one.c[:, 0], tau=tau, widths=(1, 1))
    f = closed_forms.homogeneous_value_function(kappa, degree=3, power=2, radius=radius, budgets=one.grid(grid))
    return Solved(one, f, deltas.on_segment(one, f))


def certificate(solved: Solved, row: Verdict) -> tuple[Premises, Row]:
    f, found = solved.function, solved.delta
    facts = (f.budgets, f.lower, f.upper, f.concave, f.slope, solved.problem.radius, solved.problem.power)
    counts = Instance([f], row.budget).allocation([row.num_branches]).counts[0]
    return Premises(*facts, found.points, found.weights, found.values), row_of(row._asdict(), counts)


# --- who may say certified --------------------------------------------------------------------------------------------


def test_nobody_can_state_that_bounds_are_proven(rng: np.random.Generator) -> None:
    solved = chain(rng)
    f = solved.function
    assert f.status == "certified"
    assert ValueFunction(f.budgets, f.lower, f.upper).status == "estimated"
    for change in ({"lower": f.lower - 1}, {"upper": f.upper + 1}, {"margin": 0.0}, {"lagrangian": lambda lam: 9.0}):
        assert dataclasses.replace(f, **change).status == "estimated"
    with pytest.raises(TypeError, match="status"):
        ValueFunction(f.budgets, f.lower, f.upper, status="certified")  # type: ignore[call-arg]
    with pytest.raises(dataclasses.FrozenInstanceError):
        f.lower = f.upper
    for name in ("budgets", "lower", "upper"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(f, name)[0] = 1.0
        with pytest.raises(ValueError, match="WRITEABLE"):
            getattr(f, name).setflags(write=True)


def test_a_given_array_is_copied() -> None:
    lower = np.array([1.0, 0.5])
    f = ValueFunction([0, 1], lower, [1, 0.5])
    lower[0] = 9
    assert f.lower[0] == 1


def test_made_constants_prove_nothing(rng: np.random.Generator) -> None:
    kappa = closed_forms.Kappa(5.0, 5.0, np.array([1.0, 0.0]), degree=3)
    f = closed_forms.homogeneous_value_function(kappa, degree=3, power=2, radius=1.0, budgets=np.linspace(0, 1, 5))
    assert f.status == "estimated"
    true = closed_forms.kappa_linear(rng.standard_normal((9, 2)), np.ones((9, 1)), tau=1.0, widths=(1,))
    assert true.status == "certified"
    assert dataclasses.replace(true, upper=true.upper).status == "estimated"
    with pytest.raises(ValueError, match="degree=3, but kappa is that of 2 weight matrices"):
        closed_forms.homogeneous_value_function(true, degree=3, power=2, radius=1.0, budgets=np.linspace(0, 1, 5))


def test_numbers_for_delta_are_not_trusted(rng: np.random.Generator) -> None:
    solved = chain(rng)
    (row,) = verdicts(solved.function, 0.9, [1], delta_lower=solved.delta)
    assert (row.status, row.verdict) == ("certified", "verified")
    (row,) = verdicts(solved.function, 0.9, [1], delta_lower=solved.delta.delta)
    assert (row.status, row.verdict, row.holds) == ("estimated", "undecided", True)
    forged = dataclasses.replace(solved.delta, delta=solved.function.largest_delta())
    assert verdicts(solved.function, 0.9, [1], delta_lower=forged)[0].status == "estimated"
    for bad in (1e9, math.inf, math.nan, -1.0, "0.1", None):
        with pytest.raises(ValueError, match="delta_lower"):
            verdicts(solved.function, 0.9, [1], delta_lower=bad)


def test_a_combination_of_another_value_function_proves_nothing(rng: np.random.Generator) -> None:
    one, two = chain(rng), chain(rng)
    assert verdicts(one.function, 0.9, [1], delta_lower=two.delta)[0].status == "estimated"
    assert deltas.combination(two.problem, one.function, two.delta.points, two.delta.weights).status == "estimated"
    other = branch_problem(mlp((1, 1), 1, activation="tanh", use_bias=False), points(rng, 5, 2), tau=9.0, radius=1.5)
    assert subject_of(other) != subject_of(one.problem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lower": [1.0, 0.6, 0.0]}, "lower bound lies above the upper one: 0.6 > 0.5 at budget 0.5"),
        ({"lower": [1.0, math.nan, 0.0]}, "lower must be finite; 1 of 3"),
        ({"upper": [math.inf, 0.5, 0.0]}, "upper must be finite"),
        ({"upper": [1.0, 0.5, 0.7]}, "values rise"),
        ({"upper": [1.0, 0.5]}, "upper has 2, budgets have 3"),
        ({"budgets": [0.0, 0.2, 1.0]}, "must be uniform"),
        ({"budgets": [0.0]}, "m >= 2"),
        ({"budgets": []}, "not empty"),
        ({"budgets": "abc"}, "array of numbers"),
        ({"minimisers": np.zeros((2, 4))}, "one minimiser a budget"),
        ({"slope": -1.0}, "slope=-1.0 must be at least 0"),
        ({"slope": math.nan}, "slope"),
    ],
)
def test_malformed_value_functions_are_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"budgets": [0.0, 0.5, 1.0], "lower": [0.9, 0.4, 0.0], "upper": [1.0, 0.5, 0.0]}
    with pytest.raises(ValueError, match=message):
        ValueFunction(**{**given, **change})


# --- W and the data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1.0, 3.9999, 4.0001, 9.0])
def test_budgets_that_are_not_those_of_w_are_refused(top: float, rng: np.random.Generator) -> None:
    one = branch_problem(from_functions(lambda key, x: jnp.zeros(1), lambda w, x: jnp.tanh(w[0] * x)),
                         points(rng, 5, 1), tau=2.0, radius=2.0)  # fmt: skip
    with pytest.raises(ValueError, match=r"h runs from 0 to 4 over W; give problem.grid"):
        search.search(one, np.linspace(0, top, 33), TINY)
    f = ValueFunction(np.linspace(0, top, 33), np.zeros(33), np.ones(33), minimisers=np.zeros((33, 1)))
    for use in (lambda: certify(one, f, BoundSpec(1e-2, 10)), lambda: deltas.on_segment(one, f)):
        with pytest.raises(ValueError, match="over W"):
            use()
    with pytest.raises(ValueError, match="over W"):
        search.search(one, np.linspace(0.5, 4, 33), TINY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"y": (s.y + 1) / 2}, "labels outside the classes -1, \\+1"),
        (lambda s: {"y": 7 * s.y}, "labels outside"),
        (lambda s: {"y": np.full_like(s.y, np.nan)}, "labels outside"),
        (lambda s: {"x": np.full_like(s.x, np.nan)}, "non-finite features"),
        (lambda s: {"x": np.full_like(s.x, np.inf)}, "non-finite features"),
        (lambda s: {"x": s.x[:0], "y": s.y[:0]}, "empty"),
        (lambda s: {"std": np.zeros(1, np.float32)}, "std must be positive"),
        (lambda s: {"std": np.full(1, 1e-30, np.float32), "x": 1e37 * s.x}, "leave the range of float32"),
    ],
)
def test_data_without_margins_are_refused(change: Any, message: str, rng: np.random.Generator) -> None:
    sample = points(rng, 5, 1)
    with pytest.raises(ValueError, match=message):
        branch_problem(mlp((1,), 1, use_bias=False), sample._replace(**change(sample)), tau=1.0, radius=1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"radius": 1e200}, "a float cannot hold"),
        ({"radius": 1e-200}, "a float cannot hold"),
        ({"radius": "2"}, "radius must be a number"),
        ({"tau": math.nan}, "tau=nan"),
        ({"tau": 1e-300}, "tau=1e-300 is so small"),
        ({"power": math.inf}, "power=inf must be at least 1"),
        ({"power": None}, "power must be a number"),
    ],
)
def test_numbers_out_of_range_are_refused(change: dict[str, Any], message: str, rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match=message):
        branch_problem(mlp((1,), 1), points(rng, 5, 1), **{"tau": 1.0, "radius": 1.0, **change})
    one = branch_problem(mlp((1,), 1), points(rng, 5, 1), tau=np.float32(2), radius=np.int64(3), power=1)
    assert (one.tau, one.largest_budget) == (2.0, 3.0)


def test_a_g_that_is_not_a_number_is_said(rng: np.random.Generator) -> None:
    """0/0 on a part of W: it has no least value, whatever else the search sees."""
    branch = from_functions(lambda key, x: jnp.zeros(1), lambda w, x: jnp.where(w[0] > 0.5, jnp.nan, w[0]) * x[:, :1])
    one = branch_problem(branch, points(rng, 9, 1), tau=2.0, radius=1.0)
    for dtype in (np.float32, np.float64):
        with pytest.raises(ValueError, match="g is not a number"):
            search.search(one, one.grid(9), TINY, dtype=dtype)


# --- Assumption 1 -----------------------------------------------------------------------------------------------------


def test_without_assumption_1_the_verdict_does_not_speak_of_the_hinge(rng: np.random.Generator) -> None:
    solved = chain(rng, share=1e-3)
    (row,) = verdicts(solved.function, 0.9, [1], delta_lower=solved.delta)
    assert row.primal_lower < 0  # which no hinge is
    assert (row.objective, row.status, row.verdict) == ("unclipped hinge", "certified", "undecided")
    assert row.holds


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "identity", "tanh"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_margins_of_networks_that_are_recognised(activation: str, outputs: int, rng: np.random.Generator) -> None:
    sample = points(rng, 12, 3)
    if outputs > 1:
        y = np.append(np.arange(outputs), rng.integers(0, outputs, 12 - outputs)).astype(np.int32)
        sample = sample._replace(y=y, num_outputs=outputs, task="multiclass")
    one = branch_problem(mlp((2, 1), outputs, activation=activation, use_bias=False), sample, tau=3.0, radius=1.3)
    bound = margin_bound(one)
    assert bound is not None
    for _ in range(200):
        w = rng.standard_normal(one.size)
        w *= 1.3 / np.linalg.norm(w)
        f = np.asarray(one.outputs(jnp.asarray(w, jnp.float32)), np.float64)
        if outputs == 1:
            margins = sample.y * f[:, 0]
        else:
            own = f[np.arange(12), sample.y]
            margins = np.min(np.where(np.eye(outputs)[sample.y] == 1, np.inf, own[:, None] - f), axis=1)
        assert margins.max() <= bound * (1 + 1e-5)


def test_the_margin_between_two_classes_is_that_of_opposite_outputs(rng: np.random.Generator) -> None:
    sample = points(rng, 4, 3)._replace(y=np.array([0, 1, 0, 1], np.int32), num_outputs=2, task="multiclass")
    one = branch_problem(mlp((), 2, activation="identity", use_bias=False), sample, tau=3.0, radius=1.3)
    k = int(np.argmax(np.linalg.norm(one.x, axis=1)))
    own = one.x[k] / np.linalg.norm(one.x[k]) * 1.3 / math.sqrt(2)
    w = np.stack([own, -own] if sample.y[k] == 0 else [-own, own])
    outputs = one.x[k] @ w.T
    bound = margin_bound(one)
    assert bound is not None
    assert outputs[sample.y[k]] - outputs[1 - sample.y[k]] == pytest.approx(bound, rel=1e-9)


def test_margins_of_other_networks_are_not_known(rng: np.random.Generator) -> None:
    def scaled(w: Any, x: Any) -> Any:  # shapes as those of an mlp, outputs a thousand times larger
        return 1000 * jnp.maximum(x @ w[0].T, 0) @ w[1].T

    shapes = from_functions(lambda key, x: (jnp.zeros((1, 2)), jnp.zeros((1, 1))), scaled)
    for branch in (mlp((1,), 1), mlp((1,), 1, activation="gelu", use_bias=False), shapes):
        assert margin_bound(branch_problem(branch, points(rng, 5, 2), tau=1.0, radius=1.0)) is None


# --- bounds against all allocations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_rows_against_all_allocations_of_finitely_many_weights(seed: int) -> None:
    """A branch that has m weights at its disposal, whose costs lie anywhere between the points of the grid."""
    rng = np.random.default_rng(seed)
    for _ in range(6):
        m, k, count = int(rng.integers(3, 7)), int(rng.integers(2, 7)), int(rng.integers(1, 4))
        grid = np.linspace(0, float(rng.uniform(0.1, 9)), m)
        costs = np.append(0.0, np.where(rng.random(k) < 0.5, rng.uniform(0, grid[-1], k), rng.choice(grid, k)))
        worth = rng.uniform(-1, 1, k + 1)
        reach = np.array([worth[costs <= b].min() for b in grid])
        sure = np.array([worth[costs <= b * (1 - 2.0**-47)].min() for b in grid])
        noise = rng.choice([0.0, 1e-3])
        f = proven(ValueFunction(grid, reach - noise, sure + noise), "a test")
        budget = float(rng.choice([rng.uniform(0, grid[-1]), rng.choice(grid), rng.choice(costs), 2 * grid[-1]]))
        (row,) = verdicts(f, budget, [count], delta_lower=0.0)
        b, v = [Fraction(x) for x in costs.tolist()], [Fraction(x) for x in worth.tolist()]
        primal, dual = exact_primal(b, v, count, Fraction(budget)), exact_dual(b, v, Fraction(budget))
        for low, truth, high in (
            (row.primal_lower, primal, row.primal_upper),
            (row.dual_lower, dual, row.dual_upper),
            (row.gap_lower, primal - dual, row.gap_upper),
        ):
            assert Fraction(low) <= truth <= Fraction(high)


@pytest.mark.parametrize("budget", [np.float32(0.75), np.int64(1), 1, 0.7, math.inf])
def test_counts_and_budgets_of_every_kind_are_taken(budget: Any, rng: np.random.Generator) -> None:
    solved = chain(rng)
    rows = verdicts([solved.function], budget, [3, [3], (3,), np.int64(3), np.array([3])], delta_lower=solved.delta)
    assert len(set(rows)) == 1


def test_unlike_branches_have_one_verdict(rng: np.random.Generator) -> None:
    one, two = chain(rng), chain(rng)
    (row,) = verdicts([one.function, two.function], 0.8, [[2, 3]], delta_lower=[one.delta, two.delta])
    assert (row.status, row.num_branches) == ("certified", 5)
    assert row.delta_lower == max(one.delta.delta, two.delta.delta)
    assert row.verdict in ("verified", "undecided")
    with pytest.raises(ValueError, match=r"counts \[3\] for 2 classes"):
        verdicts([one.function, two.function], 0.8, [3], delta_lower=0.0)


def test_points_outside_w_by_a_rounding_are_moved_inside(rng: np.random.Generator) -> None:
    solved = chain(rng)
    w = solved.delta.points[-1] / np.linalg.norm(solved.delta.points[-1]) * solved.problem.radius
    for factor in (1.0, 1 + 1e-15, 1 + 1e-12):
        found = deltas.combination(solved.problem, solved.function, np.stack([0 * w, factor * w]), np.ones(2))
        for point in found.points:
            assert sum(Fraction(x) ** 2 for x in point.tolist()) <= Fraction(solved.problem.radius) ** 2
    for bad in ((1 + 1e-6) * w, np.nan * w):
        with pytest.raises(ValueError, match=r"outside W|must be finite"):
            deltas.combination(solved.problem, solved.function, bad[None], np.ones(1))
    for weights in (np.array([np.nan]), np.array([0.0]), np.array([np.inf])):
        with pytest.raises(ValueError, match="weights"):
            deltas.combination(solved.problem, solved.function, w[None], weights)


# --- in one call ------------------------------------------------------------------------------------------------------


def test_one_call_takes_the_best_route(rng: np.random.Generator) -> None:
    """The cells of a ReLU unit; branch and bound; a search; each with the status that it deserves."""
    plane, line = points(rng, 12, 2), points(rng, 5, 1)
    small = Effort(search=TINY, bound=BoundSpec(5e-2, 200), dual=BoundSpec(1e-1, 200))
    for branch, sample, method, status in (
        (mlp((1, 1), 1, use_bias=False), plane, "ReLU cells", "certified"),
        (mlp((3, 2), 1, activation="identity", use_bias=False), plane, "singular value", "certified"),
        (mlp((1,), 1, activation="tanh", use_bias=False), line, "branch and bound", "certified"),
        (mlp((2,), 1), plane, "search", "estimated"),
    ):
        longest = float(np.linalg.norm(sample.x, axis=1).max())
        one = branch_problem(branch, sample, tau=2 * mlp_output_bound(2, 1.5, longest), radius=1.5)
        found = theorem1(one, 0.9, (1, 4), points=33, effort=small)
        assert method in found.function.method
        assert [row.status for row in found.rows] == [status] * 2
        assert [row.num_branches for row in found.rows] == [1, 4]
        unbiased = all(leaf.ndim == 2 for leaf in jax.tree.leaves(one.template))
        assert {row.objective for row in found.rows} == {"hinge" if unbiased else "unclipped hinge"}
        assert all(row.verdict in (("verified", "undecided") if status == "certified" else ("undecided",))
                   for row in found.rows)  # fmt: skip
    with pytest.raises(ValueError, match="closed_form"):
        theorem1(one, 0.9, 1, effort=Effort("closed_form"))
    with pytest.raises(ValueError, match="route"):
        theorem1(one, 0.9, 1, effort=Effort("magic"))


def test_sup_d_is_as_sharp_as_the_largest_number_of_branches_needs(rng: np.random.Generator) -> None:
    sample = points(rng, 4, 1)
    one = branch_problem(
        mlp((1,), 1, activation="tanh", use_bias=False), sample, tau=1.01 * mlp_output_bound(2, 2.0, 3.0), radius=2.0
    )
    function = search.search(one, one.grid(33), TINY, dtype=np.float64)
    loose = BoundSpec(0.5, 100)
    needed = [_dual_effort(loose, one, function, count).tolerance for count in (1, 10, 1000)]
    best = deltas.best_lower_bound(one, function).delta
    assert needed == pytest.approx([min(0.5, 0.2 / count * best) for count in (1, 10, 1000)])


# --- the checker ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5, 17, 1000, 100_000])
@pytest.mark.parametrize("plain", [False, True])
def test_the_checker_proves_what_the_solver_says_and_nothing_more(
    count: int, plain: bool, rng: np.random.Generator
) -> None:
    solved = chain(rng, grid=129)
    if plain:  # without what is known of homogeneous branches: residues and tables
        bare = dataclasses.replace(solved.function, concave=False, lagrangian=None)
        solved = solved._replace(function=proven(bare, str(solved.function.subject)))
        solved = solved._replace(delta=deltas.on_segment(solved.problem, solved.function))
    (row,) = verdicts(solved.function, 0.7, [count], delta_lower=solved.delta)
    premises, printed = certificate(solved, row)
    checker = Checker(premises)
    assert set(checker.check(printed)) == set(BOUNDS)
    assert checker.verified(printed) == row.holds
    for name in BOUNDS:
        step = (-1e-6 if name.endswith("upper") else 1e-6) * (1 + abs(printed.bounds[name]))
        if name in ("primal_lower", "dual_upper"):
            step *= 3e4  # bounds that have room
        bounds = {**printed.bounds, name: printed.bounds[name] + step}
        with pytest.raises(NotProvenError):
            checker.check(printed._replace(bounds=bounds))
        with pytest.raises(NotProvenError, match="not finite"):
            checker.check(printed._replace(bounds={**printed.bounds, name: math.nan}))
    top = len(solved.function.budgets) - 1
    for counts in ({top: count}, {0: count + 1}, {**printed.counts, 0: -1}, {top + 1: count}):
        with pytest.raises(NotProvenError, match=r"costs more|is none of"):
            checker.check(printed._replace(counts=counts))
    with pytest.raises(NotProvenError, match="multiplier"):
        checker.check(printed._replace(multiplier=-1e-3))


def test_the_checker_refuses_premises_that_are_none(rng: np.random.Generator) -> None:
    solved = chain(rng)
    premises, _ = certificate(solved, verdicts(solved.function, 0.7, [3], delta_lower=solved.delta)[0])
    for change in (
        {"budgets": premises.budgets[::-1]},
        {"lower": premises.upper + 1},
        {"upper": np.full_like(premises.upper, np.nan)},
        {"points": 2 * premises.points},
        {"weights": -premises.weights},
        {"weights": 0 * premises.weights},
    ):
        with pytest.raises(NotProvenError):
            Checker(premises._replace(**change))
    assert Checker(premises._replace(values=premises.values + 1)).delta == 0


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 2.7, 3.0])
def test_the_checker_knows_where_the_middle_of_a_combination_lies(power: float, rng: np.random.Generator) -> None:
    grid = np.linspace(0, 2.0**power, 33)
    v = 1 - grid / grid[-1]
    for _ in range(20):
        w, a = rng.standard_normal((3, 4)), rng.uniform(0, 1, 3)
        w *= 2 * rng.uniform(0, 1, (3, 1)) / np.linalg.norm(w, axis=1, keepdims=True)
        found = Checker(Premises(grid, v, v, False, None, 2.0, power, w, a, np.zeros(3))).delta
        cost = np.linalg.norm(a / a.sum() @ w) ** power
        assert float(found) == pytest.approx(v[np.searchsorted(grid, cost)], abs=1e-12)


# --- the experiment ---------------------------------------------------------------------------------------------------


def spec(**change: Any) -> DualityGapSpec:
    small: dict[str, Any] = {
        "data": Component("synthetic_relu", {"n": 20, "d": 2}), "num_branches": (1, 10), "grid": 33, "search": TINY,
        "trained": TrainedSpec(num_branches=()),
    }  # fmt: skip
    return DualityGapSpec(**{**small, **change})


def test_a_record_is_proven_again_from_its_files(tmp_path: Any) -> None:
    experiments.run(experiment_config("duality_gap", spec()), workdir=tmp_path / "w")
    record = load_json(tmp_path / "w" / "results" / "duality_gap.json")
    arrays = load_npz(tmp_path / "w" / "results" / "duality_gap.npz")
    assert check_record(record, arrays) == 2
    record["rows"][1]["gap_upper"] = record["rows"][1]["gap_upper"] / 2
    with pytest.raises(NotProvenError, match="I = 10"):
        check_record(record, arrays)


def test_training_that_diverged_is_a_named_state(tmp_path: Any, rng: np.random.Generator) -> None:
    trained = TrainedSpec(num_branches=(1, 2), steps=5, seeds=3, learning_rate=1e40)
    chosen = experiment_config("duality_gap", spec(trained=trained))
    report, folder, _ = experiments.run(chosen, workdir=tmp_path / "w")
    assert any("3 of 3 seeds diverged at I = 1" in note for note in report.notes)
    assert report.rows[0][-1] == "diverged"
    for entry in load_json(folder.results / "duality_gap.json")["trained"]:
        assert (entry["state"], entry["best"], entry["feasible"]) == ("3 of 3 seeds diverged", math.inf, False)
        assert not entry["below_primal"]
    (folder.results / "report.json").unlink()  # killed before its report
    again, _, _ = experiments.run(chosen, workdir=tmp_path / "w")
    assert again == report
    assert list((folder.path / "figures").iterdir())


def test_a_run_that_diverged_is_never_the_best(rng: np.random.Generator) -> None:
    """A branch whose gradient is NaN in a part of W: seeds that come there are lost, the others count."""
    solved = chain(rng)
    loss = binary_hinge(solved.problem.tau)
    run = train_constrained(solved.problem, loss, points(rng, 20, 2), TrainedSpec(steps=5, seeds=4),
                            budget=0.9, num_branches=2, seed=0)  # fmt: skip
    assert run.diverged == 0
    lost = run._replace(losses=np.where(np.arange(4) == 1, np.nan, run.losses))
    assert lost.diverged == 1
    assert lost.ranked()[1] == math.inf


def test_linear_branches_have_neither_gap_nor_delta(tmp_path: Any) -> None:
    branch = Component("mlp", {"hidden": (), "use_bias": False, "activation": "identity"})
    chosen = spec(branch=branch, fresh_samples=2)
    report, folder, _ = experiments.run(experiment_config("duality_gap", chosen), workdir=tmp_path / "w")
    record = load_json(folder.results / "duality_gap.json")
    assert all(row["normalized_gap"] is None or row["normalized_gap"] < 1e9 for row in record["rows"])
    ratios = [row["largest_gap_over_bound"] for row in record["population"]["rows"]]
    assert ratios == [None, None]
    assert any("Delta is 0 on a sample" in note for note in report.notes)


def test_a_tiny_tau_is_said_and_proves_nothing_for_the_hinge(tmp_path: Any) -> None:
    report, _, _ = experiments.run(experiment_config("duality_gap", spec(tau=0.01)), workdir=tmp_path / "w")
    assert {row[report.columns.index("verdict")] for row in report.rows} == {"undecided"}
    assert any("Assumption 1 is not proven" in note for note in report.notes)
    with pytest.raises(ValueError, match="so small"):
        experiments.run(experiment_config("duality_gap", spec(tau=1e-300)), workdir=tmp_path / "v")
