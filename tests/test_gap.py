"""Gaps of value functions against all allocations in rational numbers, on the grid and between its points."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from gap_oracles import exact_dual, exact_primal

from dualgap_jax.duality import allocate, gap_from_value_function
from dualgap_jax.duality.units import spread_of, whole_units
from dualgap_jax.duality.values import BUDGET_SLACK, uniform


def falling(rng: np.random.Generator, m: int) -> np.ndarray:
    return np.sort(rng.choice([rng.uniform(-1, 1, m), np.round(4 * rng.uniform(-1, 1, m)) / 4]))[::-1].copy()


def exact(values: np.ndarray) -> list[Fraction]:
    return [Fraction(x) for x in values.tolist()]


@pytest.mark.parametrize("seed", range(20))
def test_gaps_against_all_allocations_in_rational_numbers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(8):
        m, count = int(rng.integers(2, 7)), int(rng.integers(1, 5))
        step = float(2.0 ** rng.integers(-40, 40))
        b, v = step * np.arange(m), falling(rng, m) * 10.0 ** rng.integers(-100, 100)
        share = Fraction(int(rng.integers(0, 5 * m)), int(rng.integers(1, 6)))
        budget = float(share) * step
        found = gap_from_value_function(b, v, budget, count)
        primal, dual = (
            exact_primal(exact(b), exact(v), count, Fraction(budget)),
            exact_dual(exact(b), exact(v), Fraction(budget)),
        )
        size = float(np.abs(v).max())
        # K is understood up to 1e-12, which may be worth one unit.
        above = exact_primal(exact(b), exact(v), count, Fraction(budget) * (1 + Fraction(1, 10**11)))
        assert float(above) - 1e-14 * size <= found.primal <= float(primal) + 1e-14 * size
        assert found.dual == pytest.approx(float(dual), abs=1e-11 * size)
        assert found.gap_lower <= found.gap + 1e-12 * size
        assert found.gap <= found.gap_upper


@pytest.mark.parametrize("seed", range(10))
def test_bounds_hold_for_functions_between_the_points_of_the_grid(seed: int) -> None:
    """A fine function, seen through a coarse grid: its own gap lies within the bounds."""
    rng = np.random.default_rng(seed)
    for _ in range(6):
        coarse, fine, count = int(rng.integers(2, 5)), int(rng.integers(2, 5)), int(rng.integers(1, 4))
        v = falling(rng, coarse * fine + 1)
        b = np.arange(coarse * fine + 1) / 8
        budget = float(rng.choice(b))
        own = gap_from_value_function(b, v, budget, count)
        seen = gap_from_value_function(b[::fine], v[::fine], budget, count)
        assert seen.gap_lower <= own.gap + 1e-12
        assert own.gap <= seen.gap_upper + 1e-12
        on = count * budget / b[fine]
        assert seen.on_grid == (abs(on - round(on)) < 1e-9 or budget >= b[-1])


def test_a_budget_off_the_grid_is_said() -> None:
    found = gap_from_value_function([0.0, 1.0], [1.0, 0.0], 0.5, 1)  # v = 1 - b^2 has the gap 1/4 here
    assert (found.gap, found.on_grid) == (0.5, False)
    assert found.gap_lower <= 0.25 <= found.gap_upper
    grid = np.linspace(0, 1, 4)
    near = gap_from_value_function(grid, 1 - grid**2, 0.25, 1)  # 1 - 1/16 - (1 - 1/4)
    assert not near.on_grid
    assert near.gap_lower <= 0.1875 <= near.gap_upper
    assert gap_from_value_function(grid, 1 - grid**2, 1 / 3, 1).on_grid
    assert gap_from_value_function(grid, 1 - grid**2, math.inf, 1).on_grid


@pytest.mark.parametrize("count", [3, [3], (3,), np.int64(3), np.array([3]), np.array(3)])
@pytest.mark.parametrize("budget", [0.5, np.float32(0.5), np.float64(0.5), np.array(0.5)])
def test_numbers_of_every_kind_are_taken(count: Any, budget: Any) -> None:
    found = gap_from_value_function([0.0, 0.5, 1.0], (1, 0.9, 0), budget, count)
    assert found.primal == pytest.approx(0.6333333333)
    assert gap_from_value_function([0, 1, 2], [2, 1, 0], 1, 3).gap == pytest.approx(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": "half"}, "budget K must be a number, got 'half'"),
        ({"budget": None}, "must be a number"),
        ({"budget": True}, "must be a number"),
        ({"budget": -math.inf}, "must be a number, or inf"),
        ({"budget": [0.5]}, "must be a number"),
        ({"num_branches": 2.0}, "positive integer"),
        ({"num_branches": "3"}, "positive integer"),
        ({"num_branches": []}, "num_branches is empty"),
        ({"budgets": ["a", "b", "c"]}, "arrays of numbers"),
        ({"budgets": [0.0, 0.5, 1.1]}, "a point is 0.05 away from its place"),
    ],
)
def test_what_is_no_number_is_refused_in_a_sentence(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"budgets": [0.0, 0.5, 1.0], "values": [1.0, 0.9, 0.0], "budget": 0.5, "num_branches": 3}
    with pytest.raises(ValueError, match=message):
        gap_from_value_function(**{**given, **change})


def test_drift_that_adds_up_is_no_uniform_grid() -> None:
    """Every step within 1e-9 of the mean step, and the middle far from its place."""
    steps = np.where(np.arange(4096) < 2048, 1 + 4e-7, 1 - 4e-7) / 4096
    bent = np.append(0.0, np.cumsum(steps))
    assert np.abs(np.diff(bent) - np.diff(bent).mean()).max() < 1e-9
    with pytest.raises(ValueError, match="away from its place"):
        uniform(bent, "bent")
    with pytest.raises(ValueError, match="away from its place"):
        allocate([bent], [1 - bent], 0.5, [3])


@pytest.mark.parametrize("seed", range(20))
def test_units_of_a_grid_as_it_is(seed: int) -> None:
    """On grids that are uniform up to roundings and drift, whatever is allowed is feasible, and whatever is feasible
    is allowed."""
    rng = np.random.default_rng(seed)
    m, count = int(rng.integers(2, 7)), int(rng.integers(1, 5))
    b = np.cumsum(np.append(0.0, rng.uniform(0.3, 3) * (1 + 1e-10 * rng.uniform(-1, 1, m - 1))))
    b += rng.choice([0.0, 0.7])
    for budget in [*rng.uniform(b[0], b[-1], 4), *rng.choice(b, 3), float(np.nextafter(b[1], 0)), math.inf]:
        sure, most = whole_units(spread_of([b]), float(budget), [count], BUDGET_SLACK)
        assert sure <= most + count  # the slack is worth less than a unit a branch
        for choice in np.ndindex(*[m] * count):
            cost = sum((Fraction(b[j]) for j in choice), Fraction(0))
            if math.isinf(budget) or cost <= count * Fraction(float(budget)):
                assert sum(choice) <= most
            if sum(choice) <= sure and not math.isinf(budget):
                assert cost * (1 - Fraction(BUDGET_SLACK)) <= count * Fraction(float(budget))
