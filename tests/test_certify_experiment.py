"""The experiment `certify`: its record against its own definitions, the reduction to two classes, and its networks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from certify_oracles import drawn, problem

from dualgap_jax import experiments
from dualgap_jax.certify import OptimumSpec, distance, optimum
from dualgap_jax.certify.trained import Network, rounded
from dualgap_jax.config import Component, ConfigError, experiment_config
from dualgap_jax.experiments.certify import CertifySpec, binary, regime_problem
from dualgap_jax.files import load_json

TINY = OptimumSpec(units=4, rounds=2, steps=40, starts=4)


def test_record(tmp_path: Path) -> None:
    spec = CertifySpec(
        data=Component("synthetic_relu", {"n": 8, "d": 2}),
        regimes=("chain", "two_layer"),
        num_branches=(1, 2, 4),
        seeds=2,
        steps=60,
        optimum=TINY,
    )
    report, workdir, _ = experiments.run(experiment_config("certify", spec), workdir=tmp_path / "w")
    assert [len(report.rows), len(report.columns)] == [6, 8]
    for cell in load_json(workdir.results / "certify.json")["cells"]:
        assert cell["status"] == "certified"
        assert cell["verified"]
        assert cell["lower"] <= cell["upper"] <= cell["zero_network"]
        best = [row["best"] for row in cell["rows"]]
        assert all(b <= a + 1e-9 for a, b in itertools.pairwise(best))  # each I divides the next
        for row in cell["rows"]:
            assert row["best"] >= cell["lower"]
            assert row["best"] <= min(row["trained"])
    assert (workdir.path / "figures" / "certify.png").exists()


def test_networks_are_feasible_and_no_better_than_the_optimum(rng: Any) -> None:
    for settings in ({"penalty": 0.05}, {"budget": 0.5, "radius": 1.5, "hidden": (1, 1)}):
        for loss in ("squared", "binary_hinge"):
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


def test_even_against_odd(rng: Any) -> None:
    data = drawn(rng, 12, 2, 4)
    two = binary(data)
    assert (two.task, two.num_outputs) == ("binary", 1)
    assert (two.y == np.where(data.y % 2 == 0, 1.0, -1.0)).all()
    assert binary(two) is two
    one = regime_problem("two_layer", two, problem(two, "logistic", penalty=1.0).loss, 0.5, 3.0)
    assert one.structure is not None


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
