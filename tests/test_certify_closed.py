"""Squared, gated and linear branches, whose best unit is known: against spheres, rational numbers, convex programs."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from certify_oracles import closed_program, dataset, drawn

from dualgap_jax import losses
from dualgap_jax.certify import (
    OptimumSpec,
    RiskProblem,
    lower_bound,
    lower_estimated,
    optimum,
    risk_problem,
    verify_bound,
)
from dualgap_jax.certify.engines import ceiling
from dualgap_jax.certify.primal import branch_sums, risk
from dualgap_jax.certify.structure import open_gates
from dualgap_jax.certify.verify import _open
from dualgap_jax.networks import from_functions, gated, mlp

SQUARE = 2 / 3**1.5  # the largest |u|^2 |a| on the unit ball


def of_kind(kind: str, x: np.ndarray, y: np.ndarray, gates: Any = 4, loss: Any = None, **settings: Any) -> RiskProblem:
    """A risk of branches with one hidden layer; inputs are kept as they are, in float64."""
    data = dataset(x, y)
    branch = {
        "square": lambda: mlp((2,), data.num_outputs, "square", use_bias=False),
        "gated": lambda: gated(gates, data.num_outputs),
        "linear": lambda: mlp((), data.num_outputs, use_bias=False),
    }[kind]()
    settings = {"penalty": 1.0, "power": {"square": 3.0, "gated": 2.0, "linear": 1.0}[kind], **settings}
    made = risk_problem(branch, data, loss or losses.squared(), **settings)
    return dataclasses.replace(made, one=made.one._replace(x=np.asarray(x, np.float64)))


def labels(rng: np.random.Generator, n: int, out: int) -> np.ndarray:
    return rng.standard_normal(n) if out == 1 else np.append(np.arange(out), rng.integers(0, out, n - out))


def sphere(d: int) -> np.ndarray:
    angles = np.linspace(0, np.pi, 4001)
    if d == 2:
        return np.stack([np.cos(angles), np.sin(angles)], 1)
    a, b = np.meshgrid(angles[::40], 2 * angles[::40])
    return np.stack([np.sin(a) * np.cos(b), np.sin(a) * np.sin(b), np.cos(a)], -1).reshape(-1, 3)


def exact_sides(gates: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`1[g.x_j >= 0]`, `[n, m]`, by rational numbers alone."""
    pairs = [[zip(g, r, strict=True) for g in gates.tolist()] for r in x.tolist()]
    return np.array([[sum(Fraction(a) * Fraction(b) for a, b in pair) >= 0 for pair in row] for row in pairs])


def largest(kind: str, x: np.ndarray, alpha: np.ndarray, gates: Any) -> tuple[float, float]:
    """The largest product of one branch in the unit ball by NumPy, and the largest seen on a fine sphere."""
    n, u = len(x), sphere(x.shape[1])
    if kind == "square":
        seen = np.linalg.norm((u @ x.T) ** 2 @ alpha, axis=1).max() / n
        by_eigenvalues = np.abs(np.linalg.eigvalsh((alpha[:, 0] * x.T) @ x / n)).max()
        return SQUARE * float(by_eigenvalues if alpha.shape[1] == 1 else seen), SQUARE * float(seen)
    if kind == "linear":
        matrix = alpha.T @ x / n
        return float(np.linalg.norm(matrix)), float(np.linalg.norm(matrix))
    masks = exact_sides(gates, x).T.astype(float)
    exact = max(np.linalg.svd((alpha * m[:, None]).T @ x / n)[1][0] for m in masks)
    seen = max(np.linalg.norm((m[:, None] * (x @ u.T)).T @ alpha, axis=1).max() for m in masks) / n
    return 0.5 * float(exact), 0.5 * float(seen)


def cases(rng: np.random.Generator, d: int) -> dict[str, np.ndarray]:
    x = rng.standard_normal((9, d))
    return {
        "random": x,
        "one": x * (np.arange(9) == 4)[:, None],
        "rank one": np.outer(x[:, 0], x[0]),
        "ties": np.eye(d)[np.arange(9) % d] * np.repeat([[1.0], [-1.0], [2.0]], 3, axis=0),
        "copies": np.repeat(x[:3], 3, axis=0),
        "small": 1e-6 * x,
        "large": 1e6 * x,
    }


@pytest.mark.parametrize("out", [1, 3])
@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("kind", ["square", "gated", "linear"])
def test_the_best_branch_against_a_sphere(kind: str, d: int, out: int, rng: Any) -> None:
    gates = np.concatenate([rng.standard_normal((2, d)), np.zeros((1, d)), np.eye(1, d)])
    kept = of_kind(kind, rng.standard_normal((9, d)), labels(rng, 9, out), gates)
    for name, x in cases(rng, d).items():
        one = dataclasses.replace(kept, one=kept.one._replace(x=x))
        for alpha in (10.0 ** rng.uniform(-6, 6) * rng.standard_normal(one.shape), np.ones(one.shape)):
            exact, seen = largest(kind, x, alpha, gates)
            sizes = (np.linalg.norm(alpha, axis=1) * np.linalg.norm(x, axis=1) ** (1 + (kind == "square"))).mean()
            found = ceiling(one, alpha)
            assert found is not None, name
            assert seen <= exact * (1 + 1e-12) + 1e-14 * sizes
            assert exact <= found.upper, name
            loose = kind == "square" and out > 1
            assert found.method in (("spectral", "norms") if loose else ({"square": "quadratic"}.get(kind, kind),))
            if not loose:
                assert found.upper <= exact * (1 + 1e-9) + 1e-10 * sizes
                assert found.point is not None
                assert np.linalg.norm(found.point) == pytest.approx(1.0)
                attained = -float(branch_sums(one, found.point[None], alpha)[0])
                assert attained == pytest.approx(exact, rel=1e-9, abs=1e-13 * sizes)
                assert found.lower <= attained + 1e-13 * sizes
            else:
                assert found.upper <= seen * np.sqrt(out) * (1 + 1e-2) + 1e-10 * sizes
            bound = lower_bound(one, alpha)
            assert verify_bound(one, bound).holds, (name, verify_bound(one, bound).reason)


@pytest.mark.parametrize("out", [1, 3])
@pytest.mark.parametrize("kind", ["square", "gated", "linear"])
def test_the_checker_refuses_less(kind: str, out: int, rng: Any) -> None:
    """Of kappa at all scales, of other gates, and of an engine that is that of another branch."""
    kept = of_kind(kind, rng.standard_normal((15, 5)), labels(rng, 15, out), budget=1.0, penalty=None)
    method = {"square": "quadratic" if out == 1 else "spectral", "gated": "gated", "linear": "linear"}[kind]
    for scale in (1e-6, 1.0, 1e6):
        one = dataclasses.replace(kept, one=kept.one._replace(x=scale * rng.standard_normal((15, 5))))
        bound = lower_bound(one, rng.standard_normal(one.shape), engine=method, scale=False)
        assert bound.kappa is not None
        assert verify_bound(one, bound).holds
        assert not verify_bound(one, dataclasses.replace(bound, kappa=bound.kappa * (1 - 1e-8))).holds
        for engine in {"linear", "quadratic", "gated", "cells", "moments"} - {bound.method}:
            if (engine, bound.method) != ("quadratic", "spectral"):  # one proof for both
                assert not verify_bound(one, dataclasses.replace(bound, method=engine)).holds
    if kind == "gated":  # what is proven for gates that are always shut says nothing
        assert one.structure is not None
        assert one.structure.gates is not None
        x = -one.structure.gates[:1] * np.ones((15, 1))
        shut = dataclasses.replace(one, one=one.one._replace(x=x), structure=one.structure._replace(gates=-x[:1]))
        alpha = rng.standard_normal(one.shape)
        bound = lower_bound(shut, alpha, engine=method, scale=False)
        assert verify_bound(shut, bound).holds
        there = dataclasses.replace(shut, structure=one.structure._replace(gates=x[:1]))
        assert not verify_bound(there, bound).holds


def test_all_zero_dual_vectors(rng: Any) -> None:
    for kind in ("square", "gated", "linear"):
        one = of_kind(kind, rng.standard_normal((6, 3)), labels(rng, 6, 1))
        found = ceiling(one, np.zeros(one.shape))
        assert found is not None
        assert 0 <= found.upper < 1e-290
        bound = lower_bound(one, np.zeros(one.shape))
        assert bound.value == pytest.approx(0.0, abs=1e-200)
        assert verify_bound(one, bound).holds


def test_gates_are_those_of_exact_products(rng: Any) -> None:
    """On the border they are open; a rounded product may lie on the wrong side of it, and at every scale."""
    whole = rng.integers(-3, 4, (12, 3)).astype(np.float64)
    gates = np.concatenate([rng.standard_normal((4, 3)), whole[:4], np.zeros((1, 3))])
    rows = rng.standard_normal((400, 3))
    slanted = gates[np.arange(400) % 4]
    rows[:, 2] = -(slanted[:, 0] * rows[:, 0] + slanted[:, 1] * rows[:, 1]) / slanted[:, 2]
    turned = np.stack([whole[:, 1], -whole[:, 0], np.zeros(12)], 1)  # at right angles
    for scale in (1.0, 1e-200, 1e150):
        x = scale * np.concatenate([rows, turned, np.zeros((1, 3))])
        expected = exact_sides(gates, x)
        assert ((x @ gates.T >= 0) != expected).any()
        np.testing.assert_array_equal(open_gates(gates, x), expected)
        np.testing.assert_array_equal(np.concatenate([*_open(gates, x)], axis=1), expected)
    huge = 1e300 * rows[:20]  # products that overflow have a sign all the same
    expected = exact_sides(gates * 1e200, huge)
    np.testing.assert_array_equal(open_gates(gates * 1e200, huge), expected)
    np.testing.assert_array_equal(np.concatenate([*_open(gates * 1e200, huge)], axis=1), expected)


def test_branches_are_known_by_their_programs(rng: Any) -> None:
    x, y, gates = rng.standard_normal((7, 3)), rng.standard_normal(7), rng.standard_normal((4, 3))

    def written(above: Any) -> Any:
        def apply(w: Any, x: Any) -> Any:
            open_ = above(x @ jnp.asarray(gates, x.dtype).T).astype(x.dtype)
            return (open_ * (x @ w[0]["kernel"].T)) @ w[1]["kernel"].T

        return from_functions(lambda key, x: gated(gates, 1).init(key, x)[0], apply)

    def known(branch: Any) -> Any:
        return risk_problem(branch, dataset(x, y), losses.squared(), penalty=1.0, radius=1.0).structure

    np.testing.assert_array_equal(known(gated(gates, 1)).gates, gates)
    drawn_gates = known(gated(4, 1, seed=3)).gates
    np.testing.assert_array_equal(drawn_gates, np.random.default_rng(3).standard_normal((4, 3)))
    assert known(written(lambda z: z > 0)) is None
    assert known(mlp((2, 2), 1, "square", use_bias=False)) is None
    assert known(mlp((3,), 1, "square", use_bias=True)) == ((3,), "square", True, None)
    assert known(mlp((), 1, use_bias=False)) == ((), "identity", False, None)
    with pytest.raises(ValueError, match="the gates have 3 entries, the inputs 5"):
        risk_problem(gated(gates, 1), drawn(rng, 6, 5), losses.squared(), penalty=1.0)
    for wrong in (0, 1.5, [1.0, 2.0], [[np.nan]], np.zeros((0, 3))):
        with pytest.raises(ValueError, match="gates"):
            gated(wrong, 1)


def test_a_gated_branch_is_its_formula(rng: Any, x64: None) -> None:
    gates, x = rng.standard_normal((4, 6)), rng.standard_normal((5, 2, 3))
    branch = gated(gates, 3)
    params, _ = branch.init(jax.random.key(0), jnp.asarray(x))
    u, a = (np.asarray(layer["kernel"]) for layer in params)
    assert (u.shape, a.shape) == ((4, 6), (3, 4))
    rows = [sum(a[:, g] * (gates[g] @ r >= 0) * (u[g] @ r) for g in range(4)) for r in x.reshape(5, 6)]
    np.testing.assert_allclose(branch.apply(params, (), jnp.asarray(x))[0], np.stack(rows), rtol=1e-12)


@pytest.mark.parametrize("kind", ["square", "gated"])
def test_a_risk_bounds_its_own_rounding(kind: str, rng: Any) -> None:
    """Outputs in rational arithmetic lie within what `risk` adds to those in float64."""
    x, y = rng.standard_normal((6, 3)), rng.choice([-1.0, 1.0], 6)
    gates = rng.standard_normal((4, 3))
    one = of_kind(kind, x, y, gates, losses.binary_hinge())
    weights = 10.0 ** rng.uniform(-3, 3, (3, one.one.size)) * rng.standard_normal((3, one.one.size))
    shares = np.full(3, 0.25)
    found, sides, total = risk(one, weights, shares), exact_sides(gates, x), Fraction(0)
    m = len(gates) if kind == "gated" else 2
    for j, row in enumerate(x.tolist()):
        z = Fraction(0)
        for w, share in zip(weights, shares, strict=True):
            for g in range(m):
                t = sum(Fraction(a) * Fraction(b) for a, b in zip(w[3 * g : 3 * g + 3].tolist(), row, strict=True))
                made = t * t if kind == "square" else t * int(sides[j, g])
                z += Fraction(float(share)) * Fraction(float(w[3 * m + g])) * made
        total += max(Fraction(0), 1 - Fraction(float(y[j])) * z)
    cost = sum(0.25 * float(np.linalg.norm(w)) ** one.power for w in weights)
    assert found.upper >= float(total / 6) + cost
    assert found.upper == pytest.approx(float(total / 6) + cost, rel=1e-9)


@pytest.mark.parametrize("loss", ["binary_hinge", "squared", "logistic"])
@pytest.mark.parametrize("kind", ["square", "gated"])
def test_optimum_is_that_of_the_convex_program(kind: str, loss: str, rng: Any) -> None:
    x, y = rng.standard_normal((8, 2)).astype(np.float32), rng.choice([-1.0, 1.0], 8)
    gates = rng.standard_normal((4, 2))
    settings = {"penalty": None, "budget": 1.5} if loss == "logistic" else {"penalty": 0.08}
    one = of_kind(kind, x, y, gates, losses.LOSSES.build(loss), **settings)
    best = closed_program(kind, x, y, loss, exact_sides(gates, x), **settings)
    tolerance = 1e-4 if loss == "binary_hinge" else 1e-6  # a linear program's dual vectors settle slowly
    found = optimum(one, spec=OptimumSpec(units=6, starts=8, steps=100, tolerance=tolerance))
    assert found.status == "certified"
    assert found.method == {"square": "quadratic", "gated": "gated"}[kind]
    assert found.lower - 2e-6 <= best <= found.upper + 2e-6
    assert found.gap <= 2 * tolerance
    assert verify_bound(one, found.bound).holds


def test_several_squared_outputs_and_a_ball(rng: Any) -> None:
    """Weight decay needs a ball around squares, and an estimate lies above what is proven."""
    with pytest.raises(ValueError, match="degree 3 > power=2"):
        of_kind("square", rng.standard_normal((9, 3)), labels(rng, 9, 3), power=2.0)
    for out in (1, 3):
        one = of_kind("square", rng.standard_normal((9, 3)), labels(rng, 9, out), power=2.0, radius=1.5, penalty=0.05)
        alpha = one.slope(rng.standard_normal(one.shape))
        bound, guess = lower_bound(one, alpha), lower_estimated(one, alpha)
        assert verify_bound(one, bound).holds
        assert bound.value <= guess.value + 1e-12
        weights = rng.standard_normal((50, one.one.size))
        weights *= 1.5 * rng.uniform(0, 1, (50, 1)) / np.linalg.norm(weights, axis=1, keepdims=True)
        phi = branch_sums(one, weights, bound.alpha) + 0.05 * np.linalg.norm(weights, axis=1) ** 2
        assert phi.min() >= bound.pieces.minimum
        if out == 1:
            assert guess.value == pytest.approx(bound.value, abs=1e-9)


@pytest.mark.parametrize("kind", ["square", "gated"])
def test_the_zero_network_is_optimal_from_lambda_max_on(kind: str, rng: Any) -> None:
    x, y = rng.standard_normal((10, 4)).astype(np.float32), rng.choice([-1.0, 1.0], 10)
    one = of_kind(kind, x, y)
    alpha = one.slope(np.zeros(one.shape))
    top, at_zero = ceiling(one, alpha), float(one.losses(np.zeros(one.shape)).mean())
    assert top is not None
    above, below = (of_kind(kind, x, y, penalty=top.upper * s) for s in (1 + 1e-9, 0.9))
    assert lower_bound(above, alpha).value == pytest.approx(at_zero, rel=1e-12)
    assert lower_bound(below, alpha).value < at_zero * (1 - 1e-4)
