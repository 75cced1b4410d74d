"""Networks of several kinds of branches: bounds against programs over fine grids of units, and against any mixture."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from certify_oracles import dataset, drawn, problem
from scipy.optimize import minimize

import dualgap_jax as dg
from dualgap_jax import certify
from dualgap_jax.certify import RiskProblem
from dualgap_jax.duality.branch_and_bound import BoundSpec
from dualgap_jax.networks import InMemory, mixture, mlp, multi_branch

ACTIVATIONS = ("relu", "identity", "leaky_relu")


def outputs(one: RiskProblem, weights: np.ndarray) -> np.ndarray:
    """`[k, n]`, by the branch itself in float64."""
    with jax.enable_x64(True):
        return np.asarray(jax.vmap(lambda w: one.one.outputs(w, np.asarray(one.one.x)))(jnp.asarray(weights)))[..., 0]


def kinds(data: Any, loss: str, **settings: Any) -> list[RiskProblem]:
    return [problem(data, loss, activation=name, **settings) for name in ACTIVATIONS[:2]]


def units(count: int) -> np.ndarray:
    """Flat weights `[2 count, 3]` of norm 1 of units over R^2, balanced, of both signs; zero is not among them."""
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    u = np.stack([np.cos(angles), np.sin(angles)], 1)
    return np.concatenate([np.column_stack([u, np.full(count, sign)]) for sign in (1.0, -1.0)]) / np.sqrt(2)


def over_grid(problems: list[RiskProblem]) -> tuple[float, np.ndarray]:
    """The least risk over measures of a grid of units of all kinds, which is at least F*, and the outputs there."""
    atoms = np.concatenate([outputs(one, units(1500)) for one in problems])
    first, y = problems[0], np.asarray(problems[0].y, np.float64)
    assert first.penalty is not None

    def both(s: np.ndarray) -> tuple[float, np.ndarray]:
        z = s @ atoms
        slope = first.slope(z[:, None])[:, 0]
        return float(first.losses(z[:, None]).mean() + first.penalty * s.sum()), atoms @ slope / len(y) + first.penalty

    found = minimize(
        both, np.full(len(atoms), 1e-3), jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(atoms),
        options={"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-10},
    )  # fmt: skip
    return float(found.fun), found.x @ atoms


@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_the_bound_is_that_of_a_program_over_units_of_both_kinds(loss: str, rng: np.random.Generator) -> None:
    x = rng.standard_normal((12, 2))
    problems = kinds(dataset(x, np.where(np.abs(x[:, 0]) > np.median(np.abs(x[:, 0])), 1.0, -1.0)), loss, penalty=0.03)
    value, z = over_grid(problems)
    bound = certify.mixed_bound(problems, problems[0].slope(z[:, None]))
    assert bound.status == "certified"
    assert value - 2e-3 * value <= bound.value <= value + 1e-9
    assert certify.verify_mixed(problems, bound).holds
    # One kind alone does worse: its own bound is none for both.
    alone, own = over_grid(problems[1:])
    single = certify.lower_bound(problems[1], problems[1].slope(own[:, None]))
    assert single.value == pytest.approx(alone, rel=2e-3)
    assert certify.mixed_bound(problems, problems[1].slope(own[:, None])).value <= value + 1e-9 < single.value


@pytest.mark.parametrize("settings", [{"penalty": 0.03}, {"budget": 2.0}, {"penalty": 0.03, "radius": 1.5}])
@pytest.mark.parametrize("loss", ["squared", "binary_hinge", "logistic"])
def test_no_mixture_lies_below_the_bound(loss: str, settings: Any, rng: np.random.Generator) -> None:
    data = drawn(rng, 9, 2)
    problems = [
        problem(data, loss, hidden=(2,), **settings),
        problem(data, loss, activation="identity", **settings),
        problem(data, loss, activation="leaky_relu", use_bias="radius" not in settings, **settings),
    ]
    first = problems[0]
    bounds = [certify.mixed_bound(problems, first.slope(rng.standard_normal(first.shape))) for _ in range(2)]
    assert all(bound.status == "certified" and certify.verify_mixed(problems, bound).holds for bound in bounds)
    counts = (2, 3, 1)
    for k in range(60):
        weights = [
            rng.standard_normal((i, p.one.size)) * rng.uniform(0.1, 1) for i, p in zip(counts, problems, strict=True)
        ]
        longest = max(float(np.linalg.norm(w, axis=1).max()) for w in weights)
        size = sum(float(np.sum(w**2)) for w in weights) / 6
        part = min(1.0, (first.budget or np.inf) / size, first.radius / longest) * (1 - 1e-12)
        weights = [w * part for w in weights]
        z = sum(outputs(p, w).sum(axis=0) for p, w in zip(problems, weights, strict=True)) / 6
        exact = float(first.losses(z[:, None]).mean()) + (first.penalty or 0.0) * size * part**2
        assert all(bound.value <= exact for bound in bounds)
        if k < 2:
            found = certify.mixed_distance(problems, weights, alpha=bounds[k].alpha)
            assert found.upper == pytest.approx(exact, rel=1e-10)
            assert found.lower >= bounds[k].value - 1e-9
            lost = found.bound.multiplier * found.slack + found.fenchel
            assert found.gap == pytest.approx(sum(float(e.sum()) for e in found.excess) / 6 + lost, abs=1e-9)
            assert min(e.min() for e in found.excess) >= -1e-9


def test_one_kind_or_the_same_twice_is_that_kind(rng: np.random.Generator) -> None:
    one = problem(drawn(rng, 10, 2), "squared", penalty=0.04)
    alpha = one.slope(rng.standard_normal(one.shape))
    alone = certify.lower_bound(one, alpha, engine="cells").value
    for problems in ([one], [one, one]):
        assert certify.mixed_bound(problems, alpha).value == pytest.approx(alone, rel=1e-9)


def test_kinds_of_a_ball_by_branch_and_bound(rng: np.random.Generator) -> None:
    data = drawn(rng, 6, 1)
    problems = [
        problem(data, "squared", activation="tanh", penalty=0.05, radius=3.0),
        problem(data, "squared", activation="relu", penalty=0.05, radius=3.0),
    ]
    alpha = problems[0].slope(np.zeros(problems[0].shape))
    bound = certify.mixed_bound(problems, alpha, spec=BoundSpec(1e-6, 50_000))
    assert bound.status == "certified"
    assert certify.verify_mixed(problems, bound).holds
    single = [
        certify.lower_bound(p, alpha, engine=e, scale=False)
        for p, e in zip(problems, ("branch and bound", "cells"), strict=True)
    ]
    assert bound.value == pytest.approx(min(b.value for b in single), abs=2e-6)
    assert bound.worst == int(np.argmin([b.value for b in bound.kinds]))


def test_a_trained_mixture(rng: np.random.Generator) -> None:
    x = rng.standard_normal((20, 2)).astype(np.float32)
    data = dg.data.from_arrays(x, np.sign(x[:, 0] + 0.3 * np.abs(x[:, 1])).astype(np.float32))
    branches = mlp((1,), 1, use_bias=False), mlp((2,), 1, use_bias=False, activation="identity")
    loss = dg.losses.logistic()
    net = mixture(
        [multi_branch(b, k, reduce="sum") for b, k in zip(branches, (3, 2), strict=True)], weights=[1 / 5] * 2
    )
    params, state = net.init(jax.random.key(0), jnp.asarray(data.x))
    problems = [certify.risk_problem(b, data, loss, penalty=0.01) for b in branches]
    found = certify.mixed_distance(problems, [InMemory(p, ()) for p in params])
    values, _ = net.apply(
        params, state, jnp.asarray((np.asarray(data.x) - np.asarray(data.mean)) / np.asarray(data.std))
    )
    squares = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(params)) / 5
    assert found.upper == pytest.approx(
        float(jnp.mean(loss.per_example(values, jnp.asarray(data.y)))) + 0.01 * squares, rel=1e-5
    )
    assert [len(e) for e in found.excess] == [3, 2]
    assert found.status == "certified"
    assert 0 <= found.lower <= found.upper


def test_what_does_not_follow_is_refused(rng: np.random.Generator) -> None:
    data = drawn(rng, 8, 2)
    problems = kinds(data, "squared", penalty=0.05)
    bound = certify.mixed_bound(problems, problems[0].slope(np.zeros(problems[0].shape)))
    assert bound.value > 0
    for k in (0, 1):
        forged = list(bound.kinds)
        forged[k] = dataclasses.replace(forged[k], value=forged[k].value + 1e-3)
        assert not certify.verify_mixed(problems, certify.MixedBound(tuple(forged))).holds
    assert "kinds" in certify.verify_mixed(problems, certify.MixedBound(bound.kinds[:1])).reason
    assert not certify.verify_mixed(problems[::-1], certify.MixedBound(bound.kinds)).holds
    moved = dataclasses.replace(bound.kinds[1], alpha=0.5 * bound.alpha)
    with pytest.raises(ValueError, match="unlike"):
        certify.MixedBound((bound.kinds[0], moved))
    with pytest.raises(ValueError, match="no kinds"):
        certify.MixedBound(())


def test_bad_kinds(rng: np.random.Generator) -> None:
    data = drawn(rng, 8, 2)
    one = problem(data, "squared", penalty=0.05)
    alpha = np.zeros(one.shape)
    for other, words in (
        (problem(drawn(rng, 8, 2), "squared", penalty=0.05), "inputs"),
        (problem(data, "logistic", penalty=0.05), "loss"),
        (problem(data, "squared", penalty=0.06), "penalty"),
        (problem(data, "squared", budget=1.0), "budget"),
        (problem(data, "squared", penalty=0.05, reduce="sum"), "reduce"),
    ):
        with pytest.raises(ValueError, match=words):
            certify.mixed_bound([one, other], alpha)
    with pytest.raises(ValueError, match="at least one"):
        certify.mixed_bound([], alpha)
    spent = problem(data, "squared", budget=1.0)
    with pytest.raises(ValueError, match="multiplier=-1"):
        certify.mixed_bound([spent, spent], alpha, multiplier=-1.0)
    for where in (
        lambda m: certify.mixed_bound([one], alpha, multiplier=m),
        lambda m: certify.lower_bound(one, alpha, multiplier=m),
        lambda m: certify.lower_estimated(one, alpha, multiplier=m),
    ):
        with pytest.raises(ValueError, match=r"the problem has the penalty 0\.05"):
            where(0.5)
        assert where(0.05).multiplier == 0.05
    with pytest.raises(ValueError, match="as many networks"):
        certify.mixed_distance([one, one], [np.ones((1, 3))])
    wide = problem(data, "squared", penalty=0.05, hidden=(4, 4), use_bias=True, radius=1.0)
    with pytest.raises(ValueError, match="kind 1"):
        certify.mixed_bound([one, wide], alpha)
