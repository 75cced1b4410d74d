"""Lower bounds from dual vectors and the distance of networks: against convex programs, arcs, samples and Theorem 1."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from certify_oracles import convex_program, dataset, drawn, group_lasso, problem, rho_by_arcs
from flax import linen as nn

from dualgap_jax import duality, losses
from dualgap_jax.certify import OptimumSpec, assess, bounds, cells, excess_along, optimum
from dualgap_jax.certify.bounds import homogeneous_minimum, lower_bound, lower_estimated
from dualgap_jax.certify.distance import distance
from dualgap_jax.certify.engines import ceiling
from dualgap_jax.certify.primal import risk
from dualgap_jax.certify.problem import risk_problem
from dualgap_jax.certify.verify import conjugate, verify_bound
from dualgap_jax.data import from_arrays
from dualgap_jax.duality.branch_and_bound import BoundSpec
from dualgap_jax.duality.checker.value_functions import Verified
from dualgap_jax.duality.envelope import dual_by_envelope
from dualgap_jax.networks import InMemory, conv, from_functions, mlp, multi_branch

LOSSES = ("binary_hinge", "squared", "logistic")
HIDDEN_3 = (1, 1)


def dual_vectors(rng: np.random.Generator, one: Any, spread: float = 1.0) -> np.ndarray:
    """A mean of subgradients at random outputs: anywhere in the domain."""
    parts = [one.slope(spread * rng.standard_normal(one.shape)) for _ in range(3)]
    return one.conjugate.nearest(np.tensordot(rng.dirichlet(np.ones(3)), np.stack(parts), 1), one.y)


def unit_sums(one: Any, w: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """`-(1/n) sum <alpha, f(w; x)>` at the rows of w, through the network itself."""
    with jax.enable_x64(True):
        values = [float((alpha * np.asarray(one.one.outputs(jax.numpy.asarray(v)))).sum()) for v in w]
    return -np.array(values) / len(alpha)


# --- one branch -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [1, 3])
@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_cells_bound_every_direction_and_are_attained(d: int, out: int, activation: str, rng: Any) -> None:
    slope = {"relu": 0.0, "leaky_relu": 0.01}[activation]
    for n in (1, 4, 15):
        x, alpha = 0.1 + rng.standard_normal((n, d)), rng.standard_normal((n, out))
        x[1 + n // 2 :: 5] = 0.0  # points that never change side
        x[n // 3] = x[-1]
        found = cells.best_unit(x, alpha, slope=slope)
        u = rng.standard_normal((20000, d))
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        t = u @ x.T
        sums = np.linalg.norm(np.where(t > 0, t, slope * t) @ alpha, axis=1) / n
        assert sums.max() <= found.upper
        t = found.u @ x.T
        attained = np.where(t > 0, t, slope * t) @ alpha / n
        assert found.lower <= attained @ found.a * (1 + 1e-12)
        assert found.upper - found.lower <= 1e-10 * (np.linalg.norm(alpha, axis=1) * np.linalg.norm(x, axis=1)).mean()


@pytest.mark.parametrize("scale", [1e-150, 1e-3, 1e120])
def test_cells_keep_their_digits_at_every_scale(scale: float, rng: Any) -> None:
    x, alpha = rng.standard_normal((9, 2)), rng.standard_normal((9, 1))
    one, other = cells.best_unit(x, alpha), cells.best_unit(x * scale, alpha * scale**0.5)
    assert other.upper == pytest.approx(one.upper * scale**1.5, rel=1e-9)


def test_cells_against_arcs(rng: Any) -> None:
    for n in (2, 7, 40):
        x, alpha = rng.standard_normal((n, 2)), rng.standard_normal(n)
        expected = rho_by_arcs(x, alpha)
        found = cells.best_unit(x, alpha[:, None])
        assert expected * (1 - 1e-13) <= found.upper <= expected * (1 + 1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("d", "activation"), [(2, "relu"), (2, "leaky_relu"), (4, "identity"), (4, "relu")])
def test_no_network_exceeds_a_ceiling(d: int, activation: str, bias: bool, rng: Any) -> None:
    for classes in (1, 3):
        one = problem(
            drawn(rng, 12, d, classes), "squared", hidden=(3,), activation=activation, use_bias=bias, penalty=1.0
        )
        alpha = dual_vectors(rng, one)
        w = rng.standard_normal((60, one.one.size))
        assert one.structure is not None
        w *= one.structure.kernels_only((d, one.shape[1]))
        w /= np.linalg.norm(w, axis=1, keepdims=True)
        seen = unit_sums(one, w, alpha).max()
        # The relaxation takes seconds; on what follows it has tests of its own.
        for name in ("auto", "linear", "cells", "spectral", "norms"):
            engine = "moments" if (name, d, activation, classes) == ("auto", 4, "relu", 1) else name
            found = ceiling(one, alpha, engine)
            if found is None:
                continue
            assert found.upper >= seen
            if found.point is not None:
                assert np.linalg.norm(found.point) == pytest.approx(1.0)
                attained = unit_sums(one, found.point[None], alpha)[0]
                assert found.lower <= attained + 1e-12
                assert found.upper == pytest.approx(attained, rel=1e-9, abs=1e-12)
            if engine in ("auto", "moments"):
                best = found.upper
            assert found.upper >= best * (1 - 1e-9)


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_deep_chains(activation: str, rng: Any) -> None:
    one = problem(drawn(rng, 10, 2, 3), "squared", hidden=HIDDEN_3, activation=activation, penalty=1.0, radius=2.0)
    alpha = dual_vectors(rng, one)
    found = ceiling(one, alpha)
    assert found is not None
    assert found.upper == pytest.approx(unit_sums(one, found.point[None], alpha)[0], rel=1e-9)
    w = rng.standard_normal((300, one.one.size))
    assert unit_sums(one, w / np.linalg.norm(w, axis=1, keepdims=True), alpha).max() <= found.upper


@pytest.mark.parametrize(("degree", "power"), [(1, 2.0), (2, 2.0), (3, 2.0), (2, 3.5), (3, 1.0), (1, 1.0)])
def test_minimum_over_one_branch(degree: int, power: float, rng: Any) -> None:
    for _ in range(50):
        kappa, lam, radius = 10.0 ** rng.uniform(-3, 3, 3)
        s = np.append(np.linspace(0, radius, 20001), np.geomspace(1e-9 * radius, radius, 20001))
        with np.errstate(over="ignore"):
            seen = (lam * s**power - kappa * s**degree).min()
        found = homogeneous_minimum(kappa, degree, power, radius, lam)
        assert found <= seen + 1e-12 * abs(seen)
        assert found >= seen - 1e-5 * abs(seen) - 1e-12 * kappa * radius**degree
        if degree < power:
            free = homogeneous_minimum(kappa, degree, power, math.inf, lam)
            assert free <= found * (1 - 1e-12) + 1e-300


# --- bounds on F* -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_no_bound_lies_above_the_convex_program(loss: str, rng: Any) -> None:
    data = drawn(rng, 8, 2)
    x, y = np.asarray(data.x, np.float64), np.asarray(data.y, np.float64)
    for settings in ({"penalty": 0.02}, {"budget": 1.5}):
        best = convex_program(x, y, loss, **settings)
        one = problem(data, loss, **settings)
        for spread in (0.3, 2.0):
            alpha = dual_vectors(rng, one, spread)
            found = lower_bound(one, alpha)
            assert found.status == "certified"
            assert found.value <= best + 1e-8
            assert verify_bound(one, found).holds
            for engine in ("spectral", "norms"):
                assert lower_bound(one, alpha, engine=engine).value <= found.value + 1e-12
            # Its own bound, by arcs in NumPy, for the alpha that was chosen.
            value = -np.mean(
                [float(conjugate(one.conjugate.kind, 1.0, [a], t)) for a, t in zip(found.alpha[:, 0], y, strict=True)]
            )
            rho = rho_by_arcs(x, found.alpha[:, 0])
            if "penalty" in settings:
                assert rho <= 2 * settings["penalty"] * (1 + 1e-12)
            else:
                value -= rho * settings["budget"] / 2
            assert found.value == pytest.approx(value, rel=1e-9)


def test_unclipped_hinge_is_theorem_1(rng: Any) -> None:
    radius = 1.5
    for hidden, power, share in ((HIDDEN_3, 2.0, 0.375), ((1,), 1.0, 0.25), ((2,), 2.0, 0.5)):
        data, tau = drawn(rng, 15, 2), 1.7
        one = problem(
            data, "binary_hinge", hidden=hidden, tau=tau, budget=share * radius**power, radius=radius, power=power
        )
        of_branch = duality.branch_problem(one.one.branch, data, tau=tau, radius=radius, power=power)
        function = duality.theorem.value_function(of_branch, 65)
        assert function.status == "certified"
        expected = dual_by_envelope([function.budgets], [function.lower], one.budget, [1]).value
        found = lower_bound(one, -data.y.astype(np.float64) / tau, scale=False)
        assert found.value == pytest.approx(expected, rel=1e-9)
        assert found.status == "certified"


def test_zero_network_is_optimal_from_lambda_max_on(rng: Any) -> None:
    data = drawn(rng, 12, 2)
    for loss in LOSSES:
        one = problem(data, loss, penalty=1.0)
        alpha = one.slope(np.zeros(one.shape))
        top = ceiling(one, alpha)
        assert top is not None
        at_zero = float(one.losses(np.zeros(one.shape)).mean())
        above, below = (problem(data, loss, penalty=top.upper * s) for s in (1 + 1e-9, 0.9))
        assert lower_bound(above, alpha).value == pytest.approx(at_zero, rel=1e-12)
        assert lower_bound(below, alpha).value < at_zero * (1 - 1e-4)


@pytest.mark.parametrize("loss", ["multi_margin", "crammer_singer", "logistic", "squared"])
def test_classes_against_a_group_lasso(loss: str, rng: Any) -> None:
    data = drawn(rng, 9, 2, 3)
    angles = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    directions = np.stack([np.cos(angles), np.sin(angles)], 1)
    best = group_lasso(np.asarray(data.x, np.float64), np.asarray(data.y), loss, directions, penalty=0.03)
    one = problem(data, loss, penalty=0.03)
    for spread in (0.3, 2.0):
        found = lower_bound(one, dual_vectors(rng, one, spread))
        assert found.value <= best + 1e-7
        assert verify_bound(one, found).holds


def test_sum_over_branches_is_the_mean_of_rescaled_ones(rng: Any) -> None:
    data = drawn(rng, 10, 2)
    one, other = problem(data, "squared", penalty=0.05), problem(data, "squared", penalty=0.05, reduce="sum")
    w = rng.standard_normal((4, 3))
    mean, total = distance(one, 2.0 * w, estimate=False), distance(other, w, estimate=False)  # 2 = sqrt(I)
    assert mean.upper == pytest.approx(total.upper, rel=1e-12)
    assert mean.lower == pytest.approx(total.lower, rel=1e-12)


def test_estimates_are_at_least_the_proven_bounds(rng: Any) -> None:
    for d, settings in ((2, {"penalty": 0.03}), (5, {"budget": 2.0})):
        one = problem(drawn(rng, 20, d), "logistic", **settings)
        alpha = dual_vectors(rng, one)
        proven, guessed = lower_bound(one, alpha), lower_estimated(one, alpha)
        assert guessed.status == "estimated"
        assert guessed.value >= proven.value - 1e-9
        if d == 2:
            assert guessed.value == pytest.approx(proven.value, rel=1e-5)


def test_branch_and_bound_against_two_dimensions(rng: Any) -> None:
    """tanh, one unit, d = 1: over (u, a) the least phi for given u is `-S(u)^2 / (4 lam)`, within the ball."""
    data = drawn(rng, 10, 1)
    one = problem(data, "squared", activation="tanh", penalty=0.05, radius=6.0)
    alpha = dual_vectors(rng, one, 0.5)
    found = lower_bound(one, alpha, engine="branch and bound")
    u = np.linspace(-6, 6, 200001)
    sums = (np.tanh(u[:, None] * data.x[:, 0]) @ alpha[:, 0]) / 10
    a = np.clip(np.abs(sums) / (2 * 0.05), 0, np.sqrt(36 - u**2))
    seen = (-np.abs(sums) * a + 0.05 * (a**2 + u**2)).min()
    assert found.pieces.minimum <= seen
    assert found.pieces.minimum >= seen - 1e-6
    assert found.value <= lower_estimated(one, alpha).value + 1e-12
    assert verify_bound(one, found).holds
    raised = found.pieces._replace(minimum=seen + 1e-3)
    assert not verify_bound(one, dataclasses.replace(found, pieces=raised)).holds


def test_the_checker_refuses_what_does_not_follow(rng: Any) -> None:
    for d, classes in ((2, 1), (5, 3)):
        one = problem(drawn(rng, 12, d, classes), "logistic", penalty=0.01)
        found = lower_bound(one, dual_vectors(rng, one))
        assert verify_bound(one, found).holds
        assert found.kappa is not None
        pieces = found.pieces
        for changed in (
            {"value": found.value + 1e-9},
            {"kappa": found.kappa * 0.99},
            {"alpha": found.alpha * 1.01},
            {"alpha": one.slope(np.zeros(one.shape))},
            {"multiplier": 0.02},
            {"value": found.value + 1e-9, "pieces": pieces._replace(conjugate=pieces.conjugate - 1e-9)},
            {"pieces": pieces._replace(minimum=1e-9), "value": found.value + 1e-9},
            {"value": math.nan},
        ):
            assert not verify_bound(one, dataclasses.replace(found, **changed)).holds, changed
        assert dataclasses.replace(found, value=found.value - 1.0).status == "estimated"  # no copy is a proof


@pytest.mark.parametrize("cones", [True, False])
def test_cells_are_proven_again_by_cones_and_by_circles(cones: bool, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cones:
        monkeypatch.setattr("dualgap_jax.certify.verify.units", lambda *_: ("not by cones", 0))
    for d, out, slope in ((3, 1, 0.0), (3, 1, 0.01), (2, 1, 0.01), (3, 2, 0.01), (1, 1, 0.0)):
        data = drawn(rng, 25, d, out)
        one = problem(data, "squared", penalty=1e-3, activation="leaky_relu" if slope else "relu")
        if not slope:  # points of one line, in which the circle of one does not cross the other
            x = np.concatenate([one.one.x[:13], -2.0 * one.one.x[:12]])
            one = dataclasses.replace(one, one=one.one._replace(x=x))
        alpha = one.slope(rng.standard_normal(one.shape))
        bound = lower_bound(one, alpha, engine="cells")
        assert bound.kappa is not None
        assert verify_bound(one, bound).holds
        assert not verify_bound(one, dataclasses.replace(bound, kappa=bound.kappa * (1 - 1e-6))).holds


def test_the_spectral_bound_with_weights_of_the_rows(rng: Any) -> None:
    """No unit of many has a larger sum, and rows without a dual vector do not count."""
    for slope in (0.0, 0.01):
        data = drawn(rng, 40, 6, 4)
        one = problem(data, "multi_margin", penalty=1.0, activation="leaky_relu" if slope else "relu")
        alpha = one.slope(rng.standard_normal(one.shape))
        alpha[rng.random(40) < 0.5] = 0.0
        found = ceiling(one, alpha, "spectral")
        assert found is not None
        u = rng.standard_normal((4000, 6))
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        t = u @ np.asarray(one.one.x, np.float64).T
        seen = 0.5 * np.linalg.norm(np.where(t > 0, t, slope * t) @ alpha, axis=1).max() / 40
        assert seen <= found.upper <= 4 * seen
        bound = lower_bound(one, alpha, engine="spectral")
        assert verify_bound(one, bound).holds
        assert bound.kappa is not None
        assert not verify_bound(one, dataclasses.replace(bound, kappa=0.99 * bound.kappa)).holds
        a, b = np.linalg.norm(alpha, 2), np.linalg.norm(np.asarray(one.one.x, np.float64), 2)
        mean = np.linalg.norm(alpha.T @ np.asarray(one.one.x, np.float64) / 40, 2)
        assert found.upper < 0.5 * ((1 + slope) / 2 * mean + (1 - slope) / 2 * a * b / 40)


# --- networks ---------------------------------------------------------------------------------------------------------

CASES = [
    (2, 1, "binary_hinge", {"penalty": 0.02}),
    (2, 1, "logistic", {"budget": 4.0}),
    (2, 3, "multi_margin", {"penalty": 0.01, "use_bias": True}),
    (3, 1, "squared", {"budget": 3.0, "radius": 3.0}),
    (2, 2, "crammer_singer", {"penalty": 0.05, "activation": "leaky_relu"}),
    (4, 3, "logistic", {"budget": 5.0, "activation": "identity", "use_bias": True}),
    (2, 1, "squared", {"penalty": 0.1, "hidden": HIDDEN_3, "radius": 1.5}),
]


@pytest.mark.parametrize(("d", "classes", "loss", "settings"), CASES)
def test_the_gap_is_the_mean_excess(d: int, classes: int, loss: str, settings: Any, rng: Any) -> None:
    one = problem(drawn(rng, 14, d, classes), loss, **settings)
    for count in (1, 5):
        w = 0.3 * rng.standard_normal((count, one.one.size))
        found = distance(one, w, estimate=False)
        assert found.status == "certified"
        parts = found.excess.mean() + found.multiplier * found.slack + found.fenchel
        assert found.gap == pytest.approx(parts, abs=1e-9)
        assert (found.excess >= -1e-12).all()
        assert found.fenchel >= -1e-12
        assert found.lower <= found.upper
        assert verify_bound(one, found.bound).holds
        # The branch that would help most: what a small share of it does to the risk.
        if found.entering is not None and "budget" not in settings:
            t = 1e-6
            shares = np.append(np.full(count, (1 - t) / count), t)
            mixed = risk(one, np.concatenate([w, found.entering[None]]), shares).value
            slope = (risk(one, w, np.full(count, 1 / count)).value - mixed) / t
            if loss in ("logistic", "squared"):
                assert slope == pytest.approx(found.entering_slope, rel=1e-3, abs=1e-5)


def test_upper_bounds_against_the_network_itself(rng: Any) -> None:
    for count, hidden, activation, bias in (
        (3, (4,), "relu", True),
        (5, (3, 2), "leaky_relu", False),
    ):
        data = drawn(rng, 20, 3, 2)
        one = problem(data, "logistic", hidden=hidden, activation=activation, use_bias=bias, penalty=0.3, radius=50.0)
        net = multi_branch(one.one.branch, count)
        with jax.enable_x64(True):
            x = jax.numpy.asarray(data.x, np.float64)
            params, state = jax.jit(net.init)(jax.random.key(0), x)
            outputs, _ = jax.jit(net.apply)(params, state, x)
            expected = float(one.losses(np.asarray(outputs)).mean())
            cost = sum(float((np.asarray(leaf) ** 2).sum()) for leaf in jax.tree.leaves(params)) / count
        found = distance(one, InMemory(params), estimate=False)
        assert found.upper == pytest.approx(expected + 0.3 * cost, rel=1e-12)
        assert found.upper >= (expected + 0.3 * cost) * (1 - 1e-15)


def test_a_better_alpha_gives_a_better_certificate(rng: Any) -> None:
    one = problem(drawn(rng, 10, 2), "squared", penalty=0.02)
    w = rng.standard_normal((3, 3))
    own = distance(one, w, estimate=False)
    alpha = one.slope(np.zeros(one.shape))
    other = distance(one, w, alpha=alpha, estimate=False)
    assert other.lower == pytest.approx(lower_bound(one, alpha).value, rel=1e-12)
    assert own.upper == other.upper
    assert "certified, cells" in own.as_text()


def test_the_text_of_a_certificate_claims_no_more_than_its_numbers(rng: Any) -> None:
    """The digits, read again: at most the bound, at least the risk, the distance and its share."""
    one = problem(drawn(rng, 10, 2), "squared", penalty=0.02)
    for _ in range(20):
        made = distance(one, rng.standard_normal((3, 3)), estimate=False)
        upper, lower, gap, share = map(float, re.findall(r"(?:risk|>=|within|\() ?(-?[0-9.e+-]+)", made.as_text()))
        assert lower <= made.lower <= made.upper <= upper
        assert gap >= made.gap
        assert share >= 100 * made.gap / made.upper


# --- bad input --------------------------------------------------------------------------------------------------------

NET = mlp((1,), 1, use_bias=False)
PAIR = dataset(np.ones((3, 2)), np.array([-1.0, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "exactly one of penalty and budget, got neither"),
        ({"penalty": 1.0, "budget": 1.0}, "exactly one of penalty and budget, got both"),
        ({"penalty": -1.0}, "penalty=-1.0 must be positive"),
        ({"penalty": 0.0}, "penalty=0.0 must be positive"),
        ({"penalty": math.nan}, "penalty=nan must be a finite number"),
        ({"budget": -1e-9}, "below 0, the least h"),
        ({"budget": "1"}, "budget must be a number"),
        ({"penalty": 1.0, "radius": 0.0}, "radius=0.0 must be positive"),
        ({"penalty": 1.0, "power": 0.5}, "power=0.5 must be from 1"),
        ({"penalty": 1.0, "power": 1.0}, "give a radius: the branch has degree 2 > power=1"),
        ({"penalty": 1.0, "reduce": "max"}, "'max'"),
        ({"penalty": 1.0, "radius": 1.0, "reduce": "sum"}, "reduce='sum' needs"),
    ],
)
def test_bad_settings(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        risk_problem(NET, PAIR, losses.squared(), **settings)


def test_bad_losses_branches_and_data() -> None:
    with pytest.raises(ValueError, match="the loss has no conjugate"):
        risk_problem(NET, PAIR, lambda outputs, labels: outputs[:, 0] ** 2, penalty=1.0)
    with pytest.raises(ValueError, match="the loss fits multiclass labels"):
        risk_problem(NET, PAIR, losses.multi_margin(), penalty=1.0)
    with pytest.raises(ValueError, match="give a radius: the branch is not known to be homogeneous"):
        risk_problem(mlp((1,), 1, activation="tanh"), PAIR, losses.squared(), penalty=1.0)
    with pytest.raises(ValueError, match="outputs of shape"):
        risk_problem(mlp((1,), 2), PAIR, losses.squared(), penalty=1.0)
    images = dataset(np.ones((3, 4)), np.array([-1.0, 1.0, 1.0]))._replace(
        x=np.ones((3, 4, 4, 1), np.float32), mean=np.zeros((1, 1, 1), np.float32), std=np.ones((1, 1, 1), np.float32)
    )
    with pytest.raises(ValueError, match="batch norm"):
        risk_problem(conv((2,), 1, batch_norm=True), images, losses.squared(), penalty=1.0, radius=1.0)


def test_arguments_of_another_kind_are_told_so(rng: Any) -> None:
    one = problem(drawn(rng, 5, 2), "binary_hinge", budget=1.0, tau=2.0)
    alpha, weights = one.slope(np.zeros((5, 1))), np.zeros((1, 3))
    wrong = inspect.unwrap(risk_problem), inspect.unwrap(lower_bound), inspect.unwrap(lower_estimated)
    with pytest.raises(TypeError, match="takes a network"):
        wrong[0]("mlp", PAIR, losses.squared(), penalty=1.0)
    for call, arguments in ((wrong[1], (alpha,)), (wrong[2], (alpha,)), (inspect.unwrap(distance), (weights,))):
        with pytest.raises(TypeError, match="takes a problem that risk_problem made, first of all"):
            call(NET, *arguments)
    for settings in ({"starts": 0}, {"starts": -3}, {"steps": -1}):
        with pytest.raises(ValueError, match="must be a positive integer"):
            wrong[2](one, alpha, **settings)
    for call in wrong[1:]:
        with pytest.raises(ValueError, match="multiplier must be a"):
            call(one, alpha, multiplier="x")
        with pytest.raises(ValueError, match="seed=-1 must be a whole number"):
            call(one, alpha, seed=-1)


def test_flax_modules_are_branches(rng: Any) -> None:
    module, data = nn.Dense(1, use_bias=False), drawn(rng, 5, 2)
    made = risk_problem(module, (data.x, data.y), losses.squared(), penalty=0.1, radius=3.0)
    ready = risk_problem(mlp((), 1, use_bias=False), data, losses.squared(), penalty=0.1, radius=3.0)
    alpha = made.slope(np.zeros((5, 1)))
    found = [lower_bound(p, alpha, engine="branch and bound") for p in (made, ready)]
    assert found[0].value == pytest.approx(found[1].value, abs=1e-6)


def test_bad_alpha_and_weights(rng: Any) -> None:
    one = problem(drawn(rng, 5, 2), "binary_hinge", budget=1.0, tau=2.0)
    good = one.slope(np.zeros((5, 1)))
    with pytest.raises(ValueError, match=r"shape \(examples, outputs\) = \(5, 1\), got \(4, 1\)"):
        lower_bound(one, good[:4])
    bad = good.copy()
    bad[3] *= 1.01
    with pytest.raises(ValueError, match=r"first in row 3: .* -alpha y in \[0, 1/tau\] = \[0, 0.5\]"):
        lower_bound(one, bad)
    with pytest.raises(ValueError, match="in 5 of 5 rows"):
        lower_bound(one, np.full(5, np.nan))
    assert lower_bound(one, good * (1 + 1e-12)).status == "certified"
    with pytest.raises(ValueError, match="unknown engine"):
        lower_bound(one, good, engine="best")
    with pytest.raises(ValueError, match="does not apply"):
        lower_bound(one, good, engine="linear")
    with pytest.raises(ValueError, match="branch and bound takes up to"):
        lower_bound(one, good, engine="branch and bound")
    with pytest.raises(ValueError, match=r"mean h is .*, above the budget 1"):
        distance(one, np.full((2, 3), 0.7))
    with pytest.raises(ValueError, match=r"must have the shape \[I, 3\]"):
        distance(one, np.zeros((2, 4)))
    with pytest.raises(ValueError, match="weights are not finite"):
        distance(one, np.full((2, 3), np.nan))
    for weights, alpha in ((np.full((2, 3), 0.1j), good * 1j), (np.ma.masked_all((2, 3)), np.ma.masked_less(good, 9))):
        with pytest.raises(ValueError, match="real numbers without masked entries"):
            distance(one, weights)
        with pytest.raises(ValueError, match="real numbers without masked entries"):
            lower_bound(one, alpha)
    with pytest.raises(TypeError, match="as a handle or as weights"):
        distance(one, {"kernel": 1})
    ball = problem(drawn(rng, 5, 2), "squared", penalty=1.0, radius=1.0)
    with pytest.raises(ValueError, match="outside W"):
        distance(ball, np.ones((1, 3)))
    assert bounds.ENGINES[0] == "auto"


@pytest.mark.parametrize("activation", ["identity", "relu", "square"])
@pytest.mark.parametrize("margin", [100.0, 300.0, 350.0])
def test_saturated_examples_beside_others_that_count_for_nothing_are_proven_again(
    activation: str, margin: float
) -> None:
    """Weights of 1e-260 beside a zero example whose weight is 1/2: the checker's squares would underflow."""
    x, y = np.array([[0.0, 0.0], [1.0, 1.0]], np.float32), np.array([-1, 1])
    branch = mlp((1,), 1, activation, use_bias=False)
    radius = {"radius": 100.0} if activation == "square" else {}
    one = risk_problem(branch, dataset(x, y), losses.logistic(), penalty=1e-5, **radius)
    found = distance(one, np.ones((1, 3)) * margin**0.5, estimate=False)
    assert found.bound.status == "certified"
    assert verify_bound(one, found.bound).holds


def test_the_slope_of_asinh_does_not_vanish_where_squares_overflow() -> None:
    """A branch whose inputs are 1e147: a slope of 0 would make its bound that of its middle."""
    branch = from_functions(
        lambda key, x: {"w": jnp.zeros(())}, lambda params, x: jnp.arcsinh(params["w"] * x**5) + 0 * x
    )
    data = from_arrays(np.full((1, 1), 3e31, np.float32), np.array([400.0], np.float32))
    with jax.enable_x64(True):
        one = risk_problem(branch, data, losses.squared(), penalty=0.1, radius=2.0)
        alpha = np.array([[-1.0]])
        bound = lower_bound(one, alpha, engine="branch and bound", spec=BoundSpec(1e-2, 4000))
        w = np.linspace(-2, 2, 40_001)
        values = 0.1 * w**2 - np.abs(np.arcsinh(w * 3e31**5))
    assert bound.pieces.minimum <= values.min() + 1e-6
    assert bound.pieces.minimum >= values.min() - 0.1
    assert bound.status != "certified" or verify_bound(one, bound).holds


# --- the checker against what was tampered with -----------------------------------------------------------------------


@pytest.mark.parametrize(("activation", "engine"), [("identity", "linear"), ("square", "quadratic")])
@pytest.mark.parametrize("size", [-1.0, -1e3, math.nan, math.inf])
def test_a_kappa_that_is_none_bounds_nothing(activation: str, engine: str, size: float, rng: Any) -> None:
    one = problem(drawn(rng, 9, 3), "squared", hidden=(3,), activation=activation, penalty=0.01, radius=2.0)
    found = lower_bound(one, dual_vectors(rng, one), engine=engine, scale=False)
    free = found.pieces._replace(minimum=0.0)
    claim = dataclasses.replace(found, kappa=size * found.kappa, pieces=free, value=bounds.total(free))
    assert found.value < claim.value
    assert "kappa" in verify_bound(one, claim).reason


def test_what_is_malformed_in_a_bound_is_a_reason(rng: Any) -> None:
    one = problem(drawn(rng, 8, 4), "squared", hidden=(3,), penalty=0.01)
    alpha = dual_vectors(rng, one)
    for engine in ("spectral", "moments"):
        found = lower_bound(one, alpha, engine=engine)
        assert found.status == "certified"
        evidence = found.evidence
        forged = [evidence._replace(alpha=1e300 * evidence.alpha), evidence._replace(alpha=evidence.alpha * math.nan)]
        forged += [evidence._replace(bound=evidence.bound._replace(upper=upper)) for upper in (math.nan, None, "large")]
        if engine == "spectral":
            forged.append(evidence._replace(bound=evidence.bound._replace(upper=1e300)))  # overflows in its own unit
        changes = [{"evidence": each} for each in forged]
        changes += [{name: math.nan} for name in ("value", "multiplier", "kappa")]
        for change in changes:
            answer = verify_bound(one, dataclasses.replace(found, **change))
            assert not answer.holds, change
            assert answer.reason, change


@pytest.mark.parametrize("size", [2.0**-60, 2.0**60])
def test_the_risk_of_real_targets_is_in_their_unit(size: float, rng: Any) -> None:
    x, y = rng.standard_normal((6, 2)), rng.standard_normal(6)
    here = problem(dataset(x, y), "squared", hidden=(3,), penalty=0.1)
    there = problem(dataset(x, y * size), "squared", hidden=(3,), penalty=0.1 * size)
    weights = rng.standard_normal((2, here.one.size))
    found, again = distance(here, weights), distance(there, weights * math.sqrt(size))
    assert again.upper == pytest.approx(found.upper * size**2, rel=1e-12, abs=0)
    assert again.lower == pytest.approx(found.lower * size**2, rel=1e-6, abs=0)


def test_sizes_out_of_range_bound_nothing(rng: Any) -> None:
    assert homogeneous_minimum(1e17, 3, 2.0, 9e99, 1e115) == -math.inf  # gain and cost both overflow
    assert homogeneous_minimum(1.0, 2, 64.0, 1e99, 0.0) == pytest.approx(-1e198)
    assert homogeneous_minimum(1e30, 4, 2.0, 1e-82, 0.0) < -1e-298  # the power of the radius underflows
    x = np.array([[1e18, 0.0], [0.0, 1e18], [-1e18, 1e18]])
    one = problem(dataset(x, np.array([0.9, -1.1, 0.7])), "squared", hidden=(1, 1), penalty=1e115, radius=9e99)
    assert lower_bound(one, one.slope(np.zeros(one.shape))).value <= 0
    wide = problem(drawn(rng, 6, 2), "squared", hidden=(3,), budget=0.1, radius=1e99, power=64)
    assert lower_bound(wide, dual_vectors(rng, wide)).status == "certified"


def test_a_power_next_to_the_degree_is_proven_again(rng: Any) -> None:
    for radius in (1.0, 1e-3):
        one = problem(drawn(rng, 6, 2), "squared", hidden=(3,), penalty=1e-3, power=2.0000000000000004, radius=radius)
        assert verify_bound(one, lower_bound(one, dual_vectors(rng, one))).holds


def test_what_the_checker_does_not_prove_is_estimated(rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = problem(drawn(rng, 6, 2), "squared", hidden=(3,), penalty=0.01)
    alpha, w = dual_vectors(rng, one), rng.standard_normal((4, one.one.size))
    assert lower_bound(one, alpha, engine="cells").status == distance(one, w, estimate=False).status == "certified"
    monkeypatch.setattr(bounds, "verify_bound", lambda *_: Verified(False, "it is off", 0))
    assert lower_bound(one, alpha, engine="cells").status == distance(one, w, estimate=False).status == "estimated"
    assert distance(one, w, estimate=False).lower == -math.inf
    spec = OptimumSpec(units=4, rounds=1, steps=10, starts=4)
    assert optimum(one, spec=spec).status == assess(one, w).certificate.status == "estimated"


def test_a_bound_of_another_problem_is_refused_along_a_training(rng: Any) -> None:
    one, other = (problem(drawn(rng, 6, 2), "squared", hidden=(3,), penalty=p) for p in (0.01, 1.0))
    w = rng.standard_normal((4, one.one.size))
    bound = lower_bound(other, dual_vectors(rng, other))
    with pytest.raises(ValueError, match="not proven for this problem"):
        excess_along(one, [(0, w)], bound=bound)
    assert excess_along(other, [(0, w)], bound=bound).lower[0] == bound.value
    guess = lower_estimated(other, dual_vectors(rng, other))
    assert excess_along(other, [(0, w)], bound=guess).lower[0] == -math.inf
    with pytest.raises(ValueError, match=r"the penalty 1, not of 0\.01"):
        excess_along(one, [(0, w)], bound=guess)
    with pytest.raises(ValueError, match="alpha must have the shape"):
        excess_along(problem(drawn(rng, 7, 2), "squared", penalty=1.0), [(0, w)], bound=guess)
