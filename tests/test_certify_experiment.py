"""The experiment `certify`: its record against its own definitions, the reduction to two classes, and its networks."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from certify_oracles import drawn, problem

from dualgap_jax import experiments
from dualgap_jax.certify import OptimumSpec, distance, excess_along, optimum
from dualgap_jax.certify.trained import Network, rounded
from dualgap_jax.config import Component, ConfigError, experiment_config
from dualgap_jax.experiments.certify import CertifySpec, _less
from dualgap_jax.files import load_json

TINY = OptimumSpec(units=4, rounds=2, steps=40, starts=4)


def test_record(tmp_path: Path) -> None:
    spec = CertifySpec(
        data=Component("synthetic_relu", {"n": 8, "d": 2}),
        regimes=("chain", "two_layer"),
        num_branches=(1, 2, 4),
        seeds=2,
        steps=60,
        along=5,
        along_steps=30,
        optimum=TINY,
    )
    report, workdir, _ = experiments.run(experiment_config("certify", spec), workdir=tmp_path / "w")
    assert [len(report.rows), len(report.columns)] == [6, 8]
    cells = load_json(workdir.results / "certify.json")["cells"]
    medians = [sum(row["trained"]) / 2 - cell["lower"] for cell in cells for row in cell["rows"]]
    assert [row[-1] for row in report.rows] == pytest.approx(medians, rel=1e-12)
    assert all("the worst 1 of 5 branches end with" in note for note in report.notes[:2])
    for cell in cells:
        assert cell["status"] == "certified"
        assert cell["verified"]
        assert cell["lower"] <= cell["upper"] <= cell["zero_network"]
        best = [row["best"] for row in cell["rows"]]
        assert all(b <= a + 1e-9 for a, b in itertools.pairwise(best))  # each I divides the next
        for row in cell["rows"]:
            assert row["best"] >= cell["lower"]
            assert row["best"] <= min(row["trained"])
        along = cell["along"]
        assert np.shape(along["excess"]) == (len(along["steps"]), 5)
        assert along["steps"][0] == 0
        assert along["steps"][-1] == 30
    assert (workdir.path / "figures" / "certify.png").exists()
    assert (workdir.path / "figures" / "excess.png").exists()


@pytest.mark.parametrize("settings", [{"penalty": 0.05}, {"budget": 0.5, "radius": 1.5, "hidden": (1, 1)}])
def test_the_mean_excess_is_the_gap_at_every_step(settings: Any, rng: Any) -> None:
    one = problem(drawn(rng, 10, 2), "squared", **settings)
    best = optimum(one, spec=TINY)
    network = Network(one, 6)
    start = 0.4 * rng.standard_normal((6, one.one.size))
    path = list(network.path(start, (0, 1, 50, 400), rate=0.05, batch=10))
    for bound in (None, best.bound):
        found = excess_along(one, path, bound=bound)
        parts = found.excess.mean(axis=1) + found.multiplier * found.slack + found.fenchel
        np.testing.assert_allclose(found.gap, parts, atol=1e-9)
        assert (found.excess >= -1e-9).all()
        assert found.steps.tolist() == [0, 1, 50, 400]
        assert found.gap[-1] < 0.7 * found.gap[0]
        assert (found.fenchel >= -1e-12).all()
    # One step of all examples is a step of gradient descent.
    w, v = path[0][1], path[1][1]

    def value(w: np.ndarray) -> float:
        return distance(one, w, estimate=False, alpha=best.alpha).upper

    if "penalty" in settings:
        for i, j in ((0, 0), (5, one.one.size - 1)):
            step = np.zeros_like(w)
            step[i, j] = 1e-5
            slope = (value(w + step) - value(w - step)) / 2e-5
            assert (w - v)[i, j] == pytest.approx(0.05 * 6 * slope, rel=1e-4, abs=1e-9)
    with pytest.raises(ValueError, match="give one run"):
        excess_along(one, [(0, w), (1, w[:3])])
    with pytest.raises(ValueError, match="at least one"):
        excess_along(one, [])


def test_networks_are_feasible_and_no_better_than_the_optimum(rng: Any) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("squared", {"penalty": 0.05}),
        ("binary_hinge", {"budget": 0.5, "radius": 1.5, "hidden": (1, 1)}),
    ]
    for loss, settings in cases:
        one = problem(drawn(rng, 8, 2), loss, **settings)
        found = optimum(one, spec=TINY)
        for count in (1, 3):
            start = rounded(one, found, count)
            assert start.shape == (count, one.one.size)
            w, upper = Network(one, count).lowered(start, 100)
            costs = np.mean(np.linalg.norm(w, axis=1) ** 2)
            assert costs <= settings.get("budget", np.inf)
            assert np.linalg.norm(w, axis=1).max() <= one.radius
            assert upper >= found.lower


def test_shares_are_rounded_to_whole_branches(rng: Any) -> None:
    one = problem(drawn(rng, 8, 2), "squared", hidden=(1, 1), budget=1.0, radius=2.0)
    found = optimum(one, spec=TINY)
    for count in (1, 2, 7, 1000):
        rows = rounded(one, found, count)
        numbers = [int((rows == w).all(axis=1).sum()) for w in found.weights]
        assert sum(numbers) == count
        assert (np.abs(numbers - found.shares / found.shares.sum() * count) <= 1).all()


def test_from_a_few_branches_on_units_reach_the_optimum(rng: Any) -> None:
    one = problem(drawn(rng, 8, 2), "squared", penalty=0.02)
    found = optimum(one, spec=OptimumSpec(units=12, starts=16, tolerance=1e-6))
    many = rounded(one, found, 200)
    assert distance(one, many, alpha=found.alpha, estimate=False).upper == pytest.approx(found.upper, abs=1e-4)
    _, reached = Network(one, 40).lowered(rounded(one, found, 40), 300)
    assert found.lower <= reached <= found.upper + 1e-6
    _, reached = Network(one, 40).from_random(rng, 300)
    assert reached < float(one.losses(np.zeros(one.shape)).mean())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"regimes": ("deep",)}, "regime"),
        ({"share": 1.0}, "share"),
        ({"num_branches": (0,)}, "num_branches"),
        ({"seeds": 0}, "seeds"),
        ({"regimes": ()}, "regimes"),
    ],
)
def test_bad_specs(settings: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CertifySpec(**settings)


def test_a_loss_for_classes_is_refused(tmp_path: Path) -> None:
    spec = CertifySpec(loss=Component("multi_margin", {}))
    with pytest.raises(ConfigError, match="does not fit labels"):
        experiments.run(experiment_config("certify", spec), workdir=tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("toward", [math.inf, -math.inf])
def test_differences_are_rounded_to_their_side_and_of_equal_numbers_nothing_is_left(toward: float, rng: Any) -> None:
    for value, other in rng.standard_normal((200, 2)):
        exact, found = Fraction(value) - Fraction(other), Fraction(_less(float(value), float(other), toward))
        assert found >= exact if toward > 0 else found <= exact
    assert _less(0.3, 0.3, toward) == 0.0
