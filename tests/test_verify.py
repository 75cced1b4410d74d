"""The second proof of value functions: it holds for what is true, and for no claim that is a little too good."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from dualgap_jax import experiments
from dualgap_jax.config import Component, experiment_config
from dualgap_jax.data import Dataset
from dualgap_jax.duality import SearchSpec, ValueFunction, branch_problem, closed_forms, deltas, proofs, theorem
from dualgap_jax.duality.checker import closed_forms as forms
from dualgap_jax.duality.checker import gap, value_functions
from dualgap_jax.duality.checker.value_functions import Verified, verify_function
from dualgap_jax.duality.problem import Problem
from dualgap_jax.duality.trained import TrainedSpec
from dualgap_jax.duality.verdict import Instance
from dualgap_jax.experiments.duality_gap import DualityGapSpec
from dualgap_jax.files import load_json
from dualgap_jax.networks import mlp

TINY = SearchSpec(budgets=4, starts=8, steps=20, sweeps=1, survivors=2)


def points(rng: np.random.Generator, n: int, d: int, scale: float = 1.0) -> Dataset:
    x, y = (scale * rng.standard_normal((n, d))).astype(np.float32), rng.choice([-1.0, 1.0], n).astype(np.float32)
    return Dataset("random", x, y, np.zeros(1, np.float32), np.ones(1, np.float32), 1, "binary", {})


HOMOGENEOUS: dict[str, dict[str, Any]] = {
    "chain": {"d": 2, "hidden": (1, 1), "power": 2.0},
    "one layer, norm": {"d": 2, "hidden": (3,), "power": 1.0},
    "space": {"d": 3, "hidden": (1, 1), "power": 2.0},
    "line": {"d": 1, "hidden": (1,), "power": 2.7},
    "convex": {"d": 2, "hidden": (1,), "power": 3.5},
    "linear": {"d": 5, "hidden": (3, 2), "power": 2.0, "activation": "identity"},
    "one matrix": {"d": 4, "hidden": (), "power": 1.5, "activation": "identity"},
}


def solved(rng: np.random.Generator, d: int, hidden: tuple[int, ...], power: float, activation: str = "relu",
           n: int = 25, scale: float = 1.0) -> tuple[Problem, ValueFunction]:  # fmt: skip
    branch = mlp(hidden, 1, activation=activation, use_bias=False)
    one = branch_problem(branch, points(rng, n, d, scale), tau=50.0 * scale, radius=1.7, power=power)
    return one, theorem.value_function(one, 65)


@pytest.mark.parametrize("name", sorted(HOMOGENEOUS))
def test_closed_forms_hold_and_nothing_better_does(
    name: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "_MOST_CONES", 1000)
    one, f = solved(rng, **HOMOGENEOUS[name])
    assert f.status == "certified"
    assert f.lagrangian is not None
    delta = deltas.on_segment(one, f)
    lams = [0.0, 1e-3, 10.0]
    found = verify_function(one, f, multipliers=lams, points=delta.points, values=delta.values)
    assert found.holds, found.reason
    assert found.duals == {lam: f.lagrangian(lam) for lam in lams}
    assert f.slope is not None
    assert f.margin is not None
    size = 1 - f.lower[-1]
    tilted = np.minimum(f.lower + 1e-7 * size * (np.arange(65) > 0), f.lower[0])
    changes: list[tuple[dict[str, Any], str]] = [
        ({"lower": tilted, "upper": np.maximum(f.upper, tilted)}, "bounded again|better ReLU|larger than claimed"),
        ({"lower": f.lower + 1e-9, "upper": f.upper + 1e-9}, r"above g\(0\)"),
        ({"slope": f.slope * (1 - 1e-7)}, "bounded again|better ReLU|larger than claimed"),
        ({"margin": f.margin * (1 - 1e-9)}, "margins"),
        ({"upper": f.upper - 1e-9, "lower": np.minimum(f.lower, f.upper - 1e-9)}, "larger value than claimed"),
        ({"minimisers": f.minimisers * (1 + 1e-9)}, "outside its ball"),
        ({"minimisers": None}, "no point for each budget"),
        ({"lagrangian": lambda lam: f.lagrangian(lam) + 1e-9 * (1 + lam)}, "the bound on Q"),
    ]
    for change, reason in changes:
        again = verify_function(one, dataclasses.replace(f, **change), multipliers=lams)
        assert not again.holds
        assert re.search(reason, again.reason), again.reason
    if not f.concave:
        assert "called concave" in verify_function(one, dataclasses.replace(f, concave=True)).reason
    assert not verify_function(one, f, points=delta.points, values=delta.values - 1e-9).holds


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("seed", range(6))
def test_cones_bound_the_best_unit(seed: int, scale: float) -> None:
    """Against all kinks and a fine net of directions; ties, zeros and repeated points among them."""
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(1, 12)), int(rng.integers(1, 4))
    x = scale * np.where(rng.random((n, d)) < 0.2, 0.0, np.round(4 * rng.standard_normal((n, d))) / 4)
    x[rng.integers(n)] = x[rng.integers(n)]
    c = rng.choice([-1.0, 1.0], n)
    best = closed_forms.best_relu_unit(x, c)
    u = rng.standard_normal((20_000, d))
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    seen = float(np.abs(np.maximum(u @ x.T, 0) @ c).max()) / n
    assert seen <= best.upper * (1 + 1e-12)
    if best.upper > 1e-14 * scale:
        assert forms.units(x, c, best.upper * (1 + 1e-14))[0] == ""
    if seen > 0:
        assert forms.units(x[:, :d], c, seen * (1 - 1e-9))[0] != ""


@pytest.mark.parametrize("turn", [0.0, 1e-14, 1.8e-13, 1e-11])
def test_points_on_one_line_or_nearly_count_with_all_digits(turn: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A maximum on the edge between two cells, where points of either label lie on one line; also opposite points."""
    x, c = np.array([[0, 0, 0.9], [turn, 0, 0.2], [1, 0, 0.1], [0, -3.0, 0]]), np.array([-1.0, 1.0, 1.0, -1.0])
    best = closed_forms.best_relu_unit(x, c)
    u = np.array([1.0, 0, 0])
    assert best.upper >= float(np.maximum(u @ x.T, 0) @ c) / 4
    monkeypatch.setattr(forms, "_MOST_CONES", 20_000)
    if turn < 1e-12:
        assert forms.units(x, c, best.upper)[0] == ""
        lines = np.concatenate([x, -2 * x, 0.3 * x])
        labels = np.concatenate([c, -c, c])
        assert forms.units(lines, labels, closed_forms.best_relu_unit(lines, labels).upper)[0] == ""
    assert forms.units(x, c, best.upper * (1 - 1e-6))[0] != ""


@pytest.mark.parametrize("power", [1.3, 2.7, 3.0])
@pytest.mark.parametrize("exponent", [-80, -37, 37, 80])
def test_the_rounding_of_an_exponent_is_charged(power: float, exponent: int, rng: np.random.Generator) -> None:
    """`b^(L/q)` and `b^(1/q)` are as many roundings off as the logarithm of b is large."""
    x, c, radius, extended = rng.standard_normal((3, 2)), np.array([1.0, -1.0, 1.0]), 10.0**exponent, np.longdouble
    kappa = closed_forms.kappa_relu_chain(x, c, tau=1.0, widths=(1,))
    kappa = dataclasses.replace(kappa, lower=kappa.upper)  # so that the allowance is all that there is
    grid = np.linspace(0, radius**power, 65)
    f = closed_forms.homogeneous_value_function(kappa, degree=2, power=power, radius=radius, budgets=grid)
    b = grid[1:].astype(extended)
    v = 1 - extended(kappa.upper) * b ** (2 / extended(power))
    assert (f.lower[1:] <= v).all()
    norms = np.sqrt((f.minimisers[1:].astype(extended) ** 2).sum(axis=1))
    assert (norms ** extended(power) <= b * (1 - extended(2) ** -48)).all()
    assert (1 - extended(kappa.upper) * norms**2 <= f.upper[1:] * (1 + extended(1e-18))).all()


@pytest.mark.parametrize(("n", "seed"), [(30, 0), (100, 1)])
def test_a_best_unit_at_a_corner_of_the_cells_is_closed_in_few_cones(n: int, seed: int) -> None:
    """There the objective falls off linearly: a bound with an error as wide as the cone took tens of thousands."""
    rng = np.random.default_rng([3, n, seed])
    x, c = rng.standard_normal((n, 3)).astype(np.float32).astype(np.float64), rng.choice([-1.0, 1.0], n)
    best = closed_forms.best_relu_unit(x, c)
    reason, cones = forms.units(x, c, best.upper)
    assert reason == ""
    assert cones < 1_000
    assert forms.units(x, c, best.lower * (1 - 1e-9))[0] != ""


def test_other_branches_have_no_closed_form(rng: np.random.Generator) -> None:
    for branch in (mlp((1,), 1), mlp((2, 1), 1, use_bias=False), mlp((1,), 1, activation="tanh", use_bias=False)):
        one = branch_problem(branch, points(rng, 5, 2), tau=9.0, radius=1.0)
        f = ValueFunction(one.grid(5), np.ones(5), np.full(5, 1.1), minimisers=np.zeros((5, one.size)))
        assert verify_function(one, f).reason == "the branch is none whose value function has a closed form"
    assert not forms.verify_margin(branch_problem(mlp((1,), 1), points(rng, 5, 2), tau=9.0, radius=1.0), 1e9)


# --- the experiment ---------------------------------------------------------------------------------------------------


def spec(**change: Any) -> DualityGapSpec:
    small: dict[str, Any] = {
        "data": Component("synthetic_relu", {"n": 20, "d": 2}), "num_branches": (1, 10), "grid": 33, "search": TINY,
        "trained": TrainedSpec(num_branches=(1, 4), steps=3, seeds=2),
    }  # fmt: skip
    return DualityGapSpec(**{**small, **change})


def test_what_is_not_proven_again_is_estimated_and_says_why(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows, Delta and the bounds beside trained networks, though the solver called all of them certified."""
    report, folder, _ = experiments.run(experiment_config("duality_gap", spec()), workdir=tmp_path / "w")
    record = load_json(folder.results / "duality_gap.json")
    assert record["verified"] == {"function": True, "boxes": record["verified"]["boxes"], "rows": 3, "failures": []}
    assert {t["status"] for t in [*record["rows"], *record["trained"], record["delta"]]} == {"certified"}
    assert any("Proven once more" in note for note in report.notes)
    monkeypatch.setattr(proofs, "verify_function", lambda *a, **k: Verified(False, "it took too long", 7))
    report, folder, _ = experiments.run(experiment_config("duality_gap", spec()), workdir=tmp_path / "v")
    record = load_json(folder.results / "duality_gap.json")
    assert record["verified"] == {"function": False, "boxes": 7, "rows": 0, "failures": ["it took too long"]}
    assert {t["status"] for t in [*record["rows"], *record["trained"], record["delta"]]} == {"estimated"}
    assert {row["verdict"] for row in record["rows"]} == {"undecided"}
    assert "Not proven, and therefore estimated: it took too long" in report.notes


def test_a_bound_on_q_that_was_not_proven_is_not_used(rng: np.random.Generator) -> None:
    one, f = solved(rng, **HOMOGENEOUS["convex"])
    delta = deltas.on_segment(one, f)
    (row,) = theorem.verdicts(f, 0.9, [1000], delta_lower=delta)
    counts = Instance([f], 0.9).allocation([1000]).counts[0]
    checker = gap.Checker(proofs.premises(one, f, delta))
    proven = proofs.proven_by(checker, row, counts, {row.multiplier: row.dual_value})
    assert proven["dual_lower"] == "weak duality"
    for duals in ({}, {row.multiplier: row.dual_value - 1e-12}, {2 * row.multiplier: row.dual_value}):
        with pytest.raises(ValueError, match="dual_lower"):
            proofs.proven_by(checker, row, counts, duals)


def test_boxes_are_proven_again_in_the_experiment(tmp_path: Any) -> None:
    chosen = spec(
        branch=Component("mlp", {"hidden": (1,), "use_bias": False, "activation": "tanh"}), radius=1.5,
        data=Component("synthetic_relu", {"n": 8, "d": 1}), num_branches=(1, 3), trained=TrainedSpec(num_branches=()),
    )  # fmt: skip
    _, folder, _ = experiments.run(experiment_config("duality_gap", chosen), workdir=tmp_path / "w")
    record = load_json(folder.results / "duality_gap.json")
    assert record["method"].startswith("branch and bound")
    assert (record["verified"]["function"], record["verified"]["failures"]) == (True, [])
    assert record["verified"]["boxes"] > 50
    assert {row["status"] for row in record["rows"]} == {"certified"}
    assert value_functions.Verified(True, "", 3).duals == {}
