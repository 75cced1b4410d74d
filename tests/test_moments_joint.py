"""Lower bounds of two-layer ReLU networks from the moment relaxation, against networks and against exact arcs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import xlogy
from test_benchmarks import run
from test_moments import QUICK, on_arcs

from dualgap_jax.certify.moments.covering import Effort, candidates, evaluate, first_shares
from dualgap_jax.certify.moments.joint import relaxation
from dualgap_jax.certify.moments.start import FORMS
from dualgap_jax.certify.moments.verify import verify_relaxation
from dualgap_jax.spectral.evidence import VerificationError

LOSSES = {
    "squared": lambda z, y: 0.5 * (z - y) ** 2,
    "logistic": lambda z, y: np.logaddexp(0.0, -y * z),
    "hinge": lambda z, y: np.maximum(0.0, 1 - y * z),
}
CONJUGATES = {
    "squared": lambda alpha, y: 0.5 * alpha**2 + alpha * y,
    "logistic": lambda alpha, y: xlogy(-alpha * y, -alpha * y) + xlogy(1 + alpha * y, 1 + alpha * y),
    "hinge": lambda alpha, y: alpha * y,
}


def risk(w: np.ndarray, x: np.ndarray, y: np.ndarray, loss: str, penalty: float) -> float:
    units = w.reshape(-1, x.shape[1] + 1)
    z = np.maximum(x @ units[:, 1:].T, 0.0) @ units[:, 0]
    return float(np.mean(LOSSES[loss](z, y)) + penalty * np.sum(w**2))


def best_network(x: np.ndarray, y: np.ndarray, loss: str, penalty: float, rng: np.random.Generator) -> float:
    """The least risk of some networks of six units."""
    size = 6 * (x.shape[1] + 1)
    starts = [np.zeros(size), *(rng.standard_normal((3, size)))]
    found = [minimize(risk, w, (x, y, loss, penalty), "Powell", options={"maxiter": 15}).fun for w in starts]
    return min(risk(starts[0], x, y, loss, penalty), *found)


@pytest.mark.parametrize("loss", sorted(LOSSES))
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_below_every_network_and_close(loss: str, share: float, rng: np.random.Generator) -> None:
    x = rng.standard_normal((8, 2))
    y = rng.standard_normal(8) if loss == "squared" else np.sign(rng.standard_normal(8))
    slope = FORMS[loss].slope(np.zeros(8), y)
    penalty = 0.5 * share * on_arcs(x, slope)
    found = relaxation(x, y, loss, penalty=penalty, effort=QUICK)
    assert on_arcs(x, found.alpha) <= 2 * penalty
    assert found.bound.upper <= 2 * penalty
    assert found.lower <= verify_relaxation(x, y, loss, penalty, found) <= found.lower + 1e-12
    assert found.lower <= -np.mean(CONJUGATES[loss](found.alpha, y)) + 1e-15
    best = best_network(x, y, loss, penalty, rng)
    assert 0.6 * best <= found.lower <= best


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_a_false_lower_bound_is_refused(loss: str, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((8, 2)), np.sign(rng.standard_normal(8))
    found = relaxation(x, y, loss, penalty=0.03, effort=QUICK)
    verify_relaxation(x, y, loss, 0.03, found)
    alphas = [1.001 * found.alpha, found.alpha[:-1], np.nan * found.alpha, -found.alpha]
    false = [found._replace(lower=found.lower + 1e-9), *(found._replace(alpha=alpha) for alpha in alphas)]
    for claim in false:
        with pytest.raises(VerificationError):
            verify_relaxation(x, y, loss, 0.03, claim)
    with pytest.raises(VerificationError, match="2 penalty"):
        verify_relaxation(x, y, loss, 0.02, found)


def test_a_large_penalty_leaves_the_zero_network(rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((10, 3)), rng.standard_normal(10)
    penalty = float(np.abs(y) @ np.linalg.norm(x, axis=1)) / 10
    found = relaxation(x, y, "squared", penalty=penalty, effort=QUICK)
    np.testing.assert_allclose(found.lower, 0.5 * np.mean(y**2), rtol=1e-6)
    assert found.lower <= 0.5 * np.mean(y**2)


EDGES = [(loss, case) for loss in LOSSES for case in ("one label", "zero rows", "all rows zero", "one row")]


@pytest.mark.parametrize(("loss", "case"), [*EDGES, ("squared", "zero targets"), ("squared", "some targets zero")])
def test_edges(loss: str, case: str, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((6, 2)), np.sign(rng.standard_normal(6))
    if case == "one label":
        y = np.ones(6)
    elif case in ("zero targets", "some targets zero"):
        y = y * (np.arange(6) > 3) * (case != "zero targets")
    elif case == "zero rows":
        x[::2] = 0.0
    elif case == "all rows zero":
        x[:] = 0.0
    elif case == "one row":
        x, y = x[:1], y[:1]
    found = relaxation(x, y, loss, penalty=0.02, effort=QUICK)
    assert on_arcs(x, found.alpha) <= 0.04
    assert found.lower <= -np.mean(CONJUGATES[loss](found.alpha, y)) + 1e-15
    best = best_network(x, y, loss, 0.02, rng)
    assert 0.5 * best - 1e-12 <= found.lower <= best + 1e-15


@pytest.mark.parametrize("power", [-300, 300])
def test_units_of_the_data(power: int, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((6, 2)), rng.standard_normal(6)
    one = relaxation(x, y, "squared", penalty=0.05, effort=QUICK)
    other = relaxation(np.ldexp(x, power), y, "squared", penalty=float(np.ldexp(0.05, power)), effort=QUICK)
    np.testing.assert_allclose(other.lower, one.lower, rtol=1e-6)


def test_goes_on_from_a_dual_vector(rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((20, 4)), rng.standard_normal(20)
    first = relaxation(x, y, "squared", penalty=0.05, effort=QUICK)
    again = relaxation(x, y, "squared", penalty=0.05, alpha=first.alpha, effort=QUICK)
    assert again.lower >= first.lower * (1 - 4e-2)


def test_gradients_of_the_smoothed_bound(rng: np.random.Generator) -> None:
    vp, vn = rng.standard_normal((3, 4)), rng.standard_normal((5, 4))
    pairs = candidates(vp, vn, 2)
    shares = first_shares(pairs, np.full(3, 0.7))
    shares = type(shares)(*(part + 0.3 * rng.standard_normal(part.shape) for part in shares))
    cuts = np.cumsum([vp.size, vn.size, *map(len, shares)])[:-1]

    def at(flat: np.ndarray) -> Any:
        p, m, *rest = np.split(flat, cuts)
        return evaluate(p.reshape(vp.shape), m.reshape(vn.shape), pairs, type(shares)(*rest), 0.3, 5.0)

    flat = np.concatenate([vp.ravel(), vn.ravel(), *shares])
    found = at(flat)
    gradient = np.concatenate([*(part.ravel() for part in found.in_points()), *found.gradient])
    numeric = [(at(flat + h).value - at(flat - h).value) / 2e-5 for h in 1e-5 * np.eye(len(flat))]
    np.testing.assert_allclose(gradient, numeric, atol=1e-8)


def test_a_longer_search_proves_no_less(rng: np.random.Generator) -> None:
    """What is rounded into the domain, or left out of a nearly perfect cover, moves residuals; deltas follow them."""
    for _ in range(2):
        x, y = rng.standard_normal((12, 2)), np.sign(rng.standard_normal(12))
        few = relaxation(x, y, "hinge", penalty=0.09, alpha=-y, effort=Effort(steps=50, ahead=50)).lower
        assert relaxation(x, y, "hinge", penalty=0.09, alpha=-y).lower >= few


def test_a_trial_that_leaves_the_range_of_floats_is_none(rng: np.random.Generator) -> None:
    vp, vn = 1e130 * rng.standard_normal((4, 3)), 1e130 * rng.standard_normal((3, 3))
    pairs = candidates(vp, vn, 3)
    with np.errstate(all="ignore"), pytest.raises(np.linalg.LinAlgError):
        evaluate(vp, vn, pairs, first_shares(pairs, np.full(4, 1.0)), 1e-3, 1.0)


def test_candidates_of_many_points_reach_every_point(rng: np.random.Generator) -> None:
    pairs = candidates(rng.standard_normal((400, 3)), rng.standard_normal((500, 3)), 4)
    assert len(pairs.rows) < 400 * 500
    assert np.bincount(pairs.rows, minlength=400).min() >= 4
    assert np.bincount(pairs.cols, minlength=500).min() >= 4
    assert np.array_equal(pairs.starts, np.searchsorted(pairs.cols, np.arange(500)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"y": np.ones(3)}, "need x"),
        ({"y": np.ones((2, 1))}, "shape"),
        ({"y": np.array([1.0, np.nan])}, "not finite"),
        ({"y": np.array([1.0, 2.0]), "loss": "hinge"}, "labels"),
        ({"loss": "cubic"}, "loss"),
        ({"penalty": 0.0}, "penalty"),
        ({"penalty": np.inf}, "penalty"),
        ({"penalty": -1.0}, "penalty"),
        ({"alpha": np.ones((2, 1))}, "alpha"),
        ({"alpha": np.array([1.0, np.nan])}, "not finite"),
        ({"effort": Effort(rank=1)}, "rank"),
        ({"x": np.full((2, 2), np.inf)}, "not finite"),
    ],
)
def test_refused(changes: dict[str, Any], words: str) -> None:
    given = {"x": np.ones((2, 2)), "y": np.array([1.0, -1.0]), "loss": "squared", "penalty": 0.1} | changes
    with pytest.raises(ValueError, match=words):
        relaxation(given.pop("x"), given.pop("y"), given.pop("loss"), **given)


def test_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run("moments", tmp_path / "results.json", monkeypatch)["rows"]
    assert [row["case"] for row in rows] == ["20, squared, 0.2", "20, logistic, 0.2"]
    for row in rows:
        assert 0 < row["certified"] <= row["network"]
        np.testing.assert_allclose(row["gap"], 100 * (1 - row["certified"] / row["network"]), rtol=1e-9)
        assert row["gap"] < row["plain_gap"]
