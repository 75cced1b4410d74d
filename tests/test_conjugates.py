"""Conjugates of losses against numerical maximisation, Fenchel's inequality, and rows outside the domain."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from dualgap_jax.losses import LOSSES, Loss, as_loss

TAUS = (0.3, 1.0, 2.5)
CASES = [
    (name, task, tau)
    for name in LOSSES
    for task in LOSSES.build(name).tasks
    for tau in (TAUS if LOSSES.build(name).tau else (None,))
]


def built(name: str, tau: float | None) -> Loss:
    return LOSSES.build(name, **({} if tau is None else {"tau": tau}))


def drawn(task: str, rng: np.random.Generator, n: int = 30) -> tuple[np.ndarray, np.ndarray]:
    if task == "multiclass":
        classes = int(rng.integers(2, 6))
        return 2 * rng.standard_normal((n, classes)), rng.integers(0, classes, n)
    labels = rng.choice([-1.0, 1.0], n) if task == "binary" else rng.standard_normal(n)
    return 2 * rng.standard_normal((n, 1)), labels


def losses_at(loss: Loss, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(loss.per_example(jnp.asarray(outputs), jnp.asarray(labels)))


def greatest(name: str, tau: float | None, alpha: np.ndarray, label: Any) -> float:
    """`max over z of <alpha, z> - l(z)`: a linear program for the hinges, BFGS for the smooth losses."""
    k = len(alpha)
    if tau is None:
        loss = built(name, None)

        def negative(z: np.ndarray) -> tuple[float, np.ndarray]:
            slope = loss.slope(z[None], np.array([label]))[0]
            return float(losses_at(loss, z[None], np.array([label]))[0] - alpha @ z), slope - alpha

        return -float(minimize(negative, np.zeros(k), jac=True, method="BFGS", options={"gtol": 1e-9}).fun)
    # Variables z and the clipped terms t >= 0: 1 - margin / tau <= t.
    rivals = [None] if k == 1 else [j for j in range(k) if j != label]
    single = name != "multi_margin"
    rows, costs = [], np.zeros(k + (1 if single else len(rivals)))
    costs[:k], costs[k:] = -alpha, 1.0 if single else 1 / k
    for i, j in enumerate(rivals):
        row = np.zeros(len(costs))
        if j is None:
            row[0] = -label / tau
        else:
            row[label], row[j] = -1 / tau, 1 / tau
        row[k + (0 if single else i)] = -1.0
        rows.append(row)
    bounds = [(-50, 50)] * k + [(0, None)] * (len(costs) - k)
    return -float(linprog(costs, np.array(rows), -np.ones(len(rows)), bounds=bounds).fun)


@pytest.mark.parametrize(("name", "task", "tau"), CASES)
def test_conjugate_against_maximisation(name: str, task: str, tau: float | None, rng: np.random.Generator) -> None:
    loss = built(name, tau)
    outputs, labels = drawn(task, rng, 8)
    # Means of subgradients lie anywhere in the domain, which is convex.
    other = loss.slope(2 * rng.standard_normal(outputs.shape), labels)
    share = rng.uniform(0.1, 0.9, (8, 1))
    alpha = share * loss.slope(outputs, labels) + (1 - share) * other
    for row, label, value in zip(alpha, labels, loss.conjugate(alpha, labels), strict=True):
        assert value == pytest.approx(greatest(name, tau, row, label), rel=1e-7, abs=1e-8)


@pytest.mark.parametrize(("name", "task", "tau"), CASES)
def test_fenchel(name: str, task: str, tau: float | None, rng: np.random.Generator) -> None:
    loss = built(name, tau)
    outputs, labels = drawn(task, rng, 200)
    alpha = loss.slope(outputs, labels)
    assert not loss.conjugate.outside(alpha, labels).any()
    values = loss.conjugate(alpha, labels)
    np.testing.assert_allclose(values + losses_at(loss, outputs, labels), (alpha * outputs).sum(1), atol=1e-9)
    elsewhere = rng.standard_normal(outputs.shape) * 10.0 ** rng.integers(-2, 3, (200, 1))
    assert (values + losses_at(loss, elsewhere, labels) >= (alpha * elsewhere).sum(1) - 1e-9).all()


@pytest.mark.parametrize(("name", "task", "tau"), CASES)
def test_rows_of_the_domain_are_exact(name: str, task: str, tau: float | None, rng: np.random.Generator) -> None:
    loss = built(name, tau)
    outputs, labels = drawn(task, rng, 60)
    shares = rng.uniform(0, 1, (60, 1))
    given = shares * loss.slope(outputs, labels)
    alpha = loss.conjugate.nearest(given, labels)
    np.testing.assert_allclose(alpha, given, atol=1e-11 * loss.conjugate.scale)
    assert (loss.conjugate.nearest(alpha, labels) == alpha).all()
    values = loss.conjugate(alpha, labels)
    assert loss.conjugate.upper_mean(alpha, labels) >= values.mean()
    assert loss.conjugate.upper_mean(alpha, labels) == pytest.approx(values.mean(), abs=1e-12)
    for row, label in zip(alpha.tolist(), labels, strict=True):
        exact = [Fraction(a) for a in row]
        if task == "multiclass" and name != "squared":
            rest = [a for k, a in enumerate(exact) if k != label]
            assert sum(exact) == 0
            assert min(rest) >= 0
            scale = Fraction(tau) if tau else Fraction(1)
            assert scale * (len(row) * max(rest) if name == "multi_margin" else sum(rest)) <= 1
        elif name != "squared":
            q = -exact[0] * Fraction(float(label)) * (Fraction(tau) if tau else 1)
            assert 0 <= q <= 1


@pytest.mark.parametrize(("name", "task", "tau"), [c for c in CASES if c[0] != "squared"])
def test_rows_outside_are_infinite(name: str, task: str, tau: float | None, rng: np.random.Generator) -> None:
    loss = built(name, tau)
    outputs, labels = drawn(task, rng, 40)
    alpha = loss.slope(outputs, labels) + rng.choice([-1.0, 1.0], outputs.shape) * 3 * loss.conjugate.scale
    assert (loss.conjugate(alpha, labels) == np.inf).all()
    alpha[:] = np.nan
    assert loss.conjugate.outside(alpha, labels).all()


def test_a_loss_of_ones_own_has_none() -> None:
    own = as_loss(lambda outputs, labels: (outputs[:, 0] - labels) ** 2)
    assert own.conjugate is None
    assert own.slope is None
