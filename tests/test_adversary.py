"""A short run of the search for certified claims that brute force contradicts; `adversary.py` is the long one."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import adversary
import numpy as np
import pytest

from dualgap_jax.duality import ValueFunction, closed_forms
from dualgap_jax.duality import verdict as verdict_module

pytestmark = pytest.mark.optimized

DOORS = {"shape": 1, "wide": True, "dtype": "float64"}  # one shape, so that few programs are compiled


def narrowed(case: dict[str, Any]) -> dict[str, Any]:
    door = {"vmap": "jit", "path": "solve"}.get(case["door"], case["door"])
    return {**case, **DOORS, "door": door, "kinds": case["kinds"]}


@pytest.mark.parametrize(
    ("family", "instances", "strategy"),
    [
        ("choices", 80, None),
        ("homogeneous", 80, None),
        ("linear", 40, adversary.linear().map(narrowed)),
        ("deltas", 10, adversary.boxes(("relu",), 1, (1.0,))),
        ("boxes", 8, adversary.boxes(("affine",), 1, (1.0,))),
    ],
)
def test_no_certified_claim_is_contradicted(family: str, instances: int, strategy: Any) -> None:
    before = adversary.COUNTS[family]
    adversary.attack(family, instances, seed=1, strategy=strategy)
    assert adversary.COUNTS[family] - before > instances


def test_the_search_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound that is off by a few roundings, and one by a step of the grid."""
    real = closed_forms.homogeneous_value_function

    def higher(*args: Any, **settings: Any) -> ValueFunction:
        f = real(*args, **settings)
        lower = f.lower + 2e-13 * (f.lower[0] - f.lower[-1])
        made = ValueFunction(f.budgets, lower, np.maximum(f.upper, lower), "", f.minimisers, f.lagrangian, f.slope)
        return adversary.proven(made, "a forgery")

    monkeypatch.setattr(adversary.closed_forms, "homogeneous_value_function", higher)
    with pytest.raises(AssertionError, match="lower"):
        adversary.attack("homogeneous", 60, seed=1)
    monkeypatch.undo()
    monkeypatch.setattr(verdict_module, "BUDGET_SLACK", 0.3)
    with pytest.raises(AssertionError, match=r"primal_upper|gap_upper|dual_upper"):
        adversary.attack("choices", 200, seed=1)


def test_the_oracles_know_what_is_known() -> None:
    assert float(adversary._best_units(np.array([[1.0, 0.0], [0.0, 1.0]]), np.ones(2))) == pytest.approx(2**-0.5)
    assert float(adversary._best_units(np.array([[3.0], [-4.0]]), np.array([1.0, -1.0]))) == 2.0
    costs, worth = [[Fraction(0), Fraction(1)]] * 2, [[Fraction(1), Fraction(0)], [Fraction(3), Fraction(0)]]
    assert adversary._two_classes(costs, worth, [1, 1], Fraction(1, 2)) == Fraction(1, 2)
    assert adversary._two_envelopes(costs, worth, [1, 1], Fraction(1, 4)) == Fraction(5, 4)
