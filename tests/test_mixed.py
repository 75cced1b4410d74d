"""Theorem 1 for branches of two kinds: the checker in rational numbers, and the experiment."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualgap_jax import config, experiments
from dualgap_jax.config import Component, ConfigError, experiment_config
from dualgap_jax.duality import SearchSpec, ValueFunction, allocate, verdicts
from dualgap_jax.duality.checker.gap import BOUNDS, NotProvenError, Premises, Row
from dualgap_jax.duality.checker.mixed import Kind, check_mixed
from dualgap_jax.duality.checker.value_functions import Verified
from dualgap_jax.duality.trained import TrainedSpec
from dualgap_jax.duality.values import proven
from dualgap_jax.duality.verdict import Instance
from dualgap_jax.experiments import duality_mixed
from dualgap_jax.experiments.duality_gap import DualityGapSpec
from dualgap_jax.files import load_json

ROOT = Path(__file__).parent.parent
TINY = SearchSpec(budgets=4, starts=8, steps=20, sweeps=1, survivors=2)


def kind(rng: np.random.Generator, grid: np.ndarray) -> tuple[ValueFunction, Kind]:
    """A value function, and a combination of the weights 0 and 1 that proves what it happens to."""
    v = np.sort(rng.uniform(-1, 1, len(grid)))[::-1].copy()
    f = proven(ValueFunction(grid, v - 1e-6, v), "a test")
    points, weights = np.array([[0.0], [math.sqrt(grid[-1]) * (1 - 1e-15)]]), np.array([0.5, 0.5])
    values = np.array([v[0], v[-1]])
    premises = Premises(grid, f.lower, f.upper, False, None, math.sqrt(grid[-1]), 2.0, points, weights, values)
    return f, Kind(premises)


@pytest.mark.parametrize("seed", range(8))
def test_rows_on_two_kinds_are_proven_again_and_nothing_better_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = np.linspace(0, 4, 9)
    (f, one), (g, two) = kind(rng, grid), kind(rng, grid)
    counts, budget = [int(n) for n in rng.integers(1, 4, 2)], float(rng.uniform(0.3, 3.5))
    (row,) = verdicts([f, g], budget, [counts], delta_lower=0.0)
    allocation = Instance([f, g], budget).allocation(counts).counts
    duals = [-math.inf, -math.inf]
    by = check_mixed([one, two], allocation, budget, row.multiplier, duals, row._asdict())
    assert set(by) == set(BOUNDS)
    # inf(P) of the two-sided values, all allocations one by one.
    lists = [list(itertools.combinations_with_replacement(range(9), n)) for n in counts]
    limit, best = sum(counts) * Fraction(budget), {}
    for name, values in (("upper", (f.upper, g.upper)), ("lower", (f.step_below(), g.step_below()))):
        best[name] = min(
            sum(Fraction(float(values[k][j])) for k, c in enumerate(pair) for j in c)
            for pair in itertools.product(*lists)
            if sum(Fraction(float(grid[j])) for c in pair for j in c) <= limit
        ) / sum(counts)
    assert Fraction(row.primal_upper) >= best["upper"]
    assert Fraction(row.primal_lower) <= best["lower"]
    for name, sign in (
        ("primal_lower", 1),
        ("primal_upper", -1),
        ("dual_lower", 1),
        ("gap_upper", -1),
        ("delta_lower", 1),
    ):
        changed = {**row._asdict(), name: getattr(row, name) + sign * 2.0}
        with pytest.raises(NotProvenError, match=name):
            check_mixed([one, two], allocation, budget, row.multiplier, duals, changed)
    with pytest.raises(NotProvenError, match="costs more"):
        check_mixed([one, two], [{8: counts[0]}, {8: counts[1]}], budget, row.multiplier, duals, row._asdict())
    with pytest.raises(NotProvenError, match="negative multiplier"):
        check_mixed([one, two], allocation, budget, -1.0, duals, row._asdict())


@pytest.mark.parametrize("seed", range(4))
def test_residues_of_the_checker_are_those_of_the_solver(seed: int) -> None:
    """The relaxation bounds inf(P) for a million branches as sharply as the solver, and no higher."""
    rng = np.random.default_rng(seed)
    grid, count = np.linspace(0, 4, 33), 10**6 + seed
    f, checker = kind(rng, grid)
    budget = float(rng.uniform(0.3, 3.0))
    row = Row(count, budget, {0: count}, 0.0, -math.inf, {})
    found = checker._by_residues(row)
    assert found is not None
    expected = allocate([grid], [np.minimum.accumulate(f.step_below())], budget, [count]).lower
    assert float(found) == pytest.approx(expected, abs=1e-13)


def test_branches_are_shared_between_the_kinds() -> None:
    assert [duality_mixed.shared(n, 0.5) for n in (1, 2, 3, 10)] == [(0, 1), (1, 1), (1, 2), (5, 5)]
    assert [duality_mixed.shared(n, 0.1) for n in (1, 10, 100)] == [(1, 0), (9, 1), (90, 10)]
    assert duality_mixed.shared(7, 1.0) == (0, 7)


def spec(**change: Any) -> DualityGapSpec:
    small: dict[str, Any] = {
        "data": Component("synthetic_relu", {"n": 20, "d": 2}), "num_branches": (1, 2, 50), "grid": 33, "search": TINY,
        "trained": TrainedSpec(num_branches=()), "second_share": 0.5,
    }  # fmt: skip
    return DualityGapSpec(**{**small, **change})


def test_unequal_branches_in_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, folder, _ = experiments.run(experiment_config("duality_gap", spec()), workdir=tmp_path / "w")
    record = load_json(folder.results / "duality_gap.json")
    assert [row["kinds"] for row in record["rows"]] == [[0, 1], [1, 1], [25, 25]]
    assert {row["status"] for row in record["rows"]} == {"certified"}
    assert record["verified"]["rows"] == 3
    assert record["assumption_1"]["status"] == "certified"
    assert record["verified"]["failures"] == []
    for row in record["rows"]:
        assert row["primal_lower"] <= row["primal_upper"]
        assert (row["verdict"] == "verified") is (row["gap_upper"] <= row["bound"] * row["delta_lower"])
    assert list((folder.path / "figures").iterdir())
    assert any("Proven once more" in note for note in report.notes)
    monkeypatch.setattr(duality_mixed, "verify_function", lambda *a, **k: Verified(False, "it took too long", 7))
    _, folder, _ = experiments.run(experiment_config("duality_gap", spec()), workdir=tmp_path / "v")
    record = load_json(folder.results / "duality_gap.json")
    assert {row["status"] for row in record["rows"]} == {"estimated"}
    assert "it took too long" in record["verified"]["failures"]


def test_the_config_of_mixed_branches() -> None:
    chosen = config.load(ROOT / "configs" / "theorem1.py", "branch=mixed,smoke=True")
    assert chosen.second_share == 0.5
    assert chosen.branch.hidden != chosen.second.hidden
    with pytest.raises(ConfigError, match="data=synthetic"):
        config.load(ROOT / "configs" / "theorem1.py", "branch=mixed,data=mnist")
    with pytest.raises(ConfigError, match="two kinds of branches take neither"):
        spec(fresh_samples=2)
    with pytest.raises(ConfigError, match="second_share=2"):
        dataclasses.replace(spec(), second_share=2.0)
