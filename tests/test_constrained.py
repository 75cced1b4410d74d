"""Theorem 1 with h and W of one's own, against brute force over grids of weights, and against the built-in ball."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualgap_jax import certify, duality, losses, networks
from dualgap_jax.data import Dataset, from_arrays
from dualgap_jax.duality import BoundSpec, ConstrainedProblem, Effort, SearchSpec, constrained_bounds, sets
from dualgap_jax.duality.bounding.rules import UnsupportedPrimitiveError
from dualgap_jax.duality.checker import pairs
from dualgap_jax.duality.checker.constrained import verify_constrained
from dualgap_jax.duality.theorem import Theorem

EFFORT = Effort(search=SearchSpec(5, 8, 30, 1, 3), bound=BoundSpec(4e-3, 20_000), dual=BoundSpec(1e-4, 20_000))
BRANCH = networks.mlp((1,), 1, activation="tanh", use_bias=False)


def leaves(f: Callable[[jax.Array], jax.Array]) -> Callable[[Any], jax.Array]:
    return lambda params: sum((jnp.sum(f(leaf)) for leaf in jax.tree.leaves(params)), jnp.zeros(()))


def labelled(rng: np.random.Generator, n: int = 12) -> Dataset:
    return from_arrays(rng.standard_normal((n, 1)).astype(np.float32), rng.choice([-1.0, 1.0], n))


class Case(NamedTuple):
    problem: ConstrainedProblem
    budget: float
    found: Theorem


def shifted() -> Case:
    """A size that is negative in part, on a product of a box and a ball of another norm."""
    domain = duality.product(duality.box(-1.0, 1.5), duality.ball(1.7, 1))
    size = leaves(lambda w: (w - 0.3) ** 2 - 1.0)
    data = labelled(np.random.default_rng(3))
    problem = duality.constrained_problem(BRANCH, data, tau=5.0, size=size, domain=domain)
    return Case(problem, -1.1, duality.theorem1(problem, -1.1, [1, 2, 3, 100], points=33, effort=EFFORT))


def page() -> Case:
    """The ten lines of the page on Theorem 1."""
    text = (Path(__file__).parents[1] / "docs" / "theorem1.md").read_text()
    (code,) = re.findall(r"```python\n(# Theorem 1 for a branch.*?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    scope: dict[str, Any] = {}
    exec(code, scope)
    return Case(scope["problem"], scope["found"].rows[0].budget, scope["found"])


MADE = {"shifted": shifted, "page": page}


@pytest.fixture(scope="module", params=sorted(MADE))
def case(request: pytest.FixtureRequest) -> Case:
    return MADE[request.param]()


def net(problem: ConstrainedProblem, side: int = 601) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of W on a fine grid, their g and h in float64."""
    axes = [np.linspace(lo, hi, side) for lo, hi in zip(problem.set.lower, problem.set.upper, strict=True)]
    w = np.stack([a.ravel() for a in np.meshgrid(*axes)], 1)
    w = w[np.isfinite(problem.costs(w))]
    with jax.enable_x64(True):
        return w, np.asarray(jax.jit(jax.vmap(problem.one.g))(jnp.asarray(w))), problem.h(w)


def test_bounds_hold_at_every_budget_and_are_proven_again(case: Case) -> None:
    f, (_, g, h) = case.found.function, net(case.problem)
    assert f.status == "certified", case.found.proof.failures
    assert case.found.proof.premises
    assert {row.status for row in case.found.rows} == {"certified"}
    assert {row.objective for row in case.found.rows} == {"hinge"}
    assert case.found.rows[0].verdict == "verified"
    best = np.array([g[h <= b].min(initial=math.inf) for b in f.budgets])
    assert (f.lower <= best + 1e-12).all()
    assert (f.upper[2:] <= best[2:] + 6e-3).all()  # up to the grid and the tolerance
    assert f.floor is not None
    assert f.floor <= h.min() + 1e-12
    assert f.budgets[0] <= f.floor + 1e-9
    assert np.abs(f.budgets - case.budget).min() == 0
    for row in case.found.rows:
        sup_d = min(g[k] + row.multiplier * (h[k] - case.budget) for k in [int(np.argmin(g + row.multiplier * h))])
        assert row.dual_lower <= sup_d + 1e-12
        assert row.primal_lower <= row.primal_upper
    one = case.found.rows[0]
    assert one.primal_lower <= g[h <= case.budget].min() + 1e-12
    assert case.found.delta.delta <= f.largest_delta()
    assert all(case.problem.set.contains(p) for p in case.found.delta.points)
    share = case.found.delta.weights / case.found.delta.weights.sum()
    middle = share @ case.found.delta.points
    assert case.found.delta.convexified >= share @ np.asarray([float(case.problem.one.g(jnp.asarray(p))) for p in
                                                               case.found.delta.points]) - 1e-5  # fmt: skip
    assert case.found.delta.restricted <= g[h <= case.problem.h(middle[None])[0] * (1 + 1e-9)].min(initial=1.0) + 6e-3


def test_two_branches_against_all_pairs(case: Case) -> None:
    """inf(P) for I = 2 by brute force: sorted by cost, the best partner of every point is a running minimum."""
    _, g, h = net(case.problem, 201)
    order = np.argsort(h)
    costs, least = h[order], np.minimum.accumulate(g[order])
    partner = np.searchsorted(costs, 2 * case.budget - h, side="right") - 1
    pairs = np.where(partner >= 0, g + least[np.maximum(partner, 0)], math.inf) / 2
    row = case.found.rows[1]
    assert row.primal_lower <= pairs.min() + 1e-12
    assert row.primal_upper <= pairs.min() + 8e-3


def test_claims_that_were_tampered_with_do_not_hold(case: Case) -> None:
    f = case.found.function
    if f.budgets[0] > -1:
        pytest.skip("one case is enough")
    assert f.floor is not None
    assert f.margin is not None
    assert f.lagrangian is not None
    lam = case.found.rows[0].multiplier

    def again(**change: Any) -> str:
        found = verify_constrained(case.problem, dataclasses.replace(f, **change), multipliers=[lam], effort=1)
        assert found.holds == (not found.reason)
        return found.reason

    raised = np.minimum.accumulate(np.minimum(f.lower + 0.02, f.upper.max() + 1))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"lower": raised, "upper": np.maximum(f.upper, raised)}, "bounded again|reached again|larger value"),
        ({"floor": f.floor + 1e-9, "budgets": f.budgets + 1e-9}, "reached again|costs more"),
        ({"upper": f.upper - 1e-3, "lower": f.lower - 1e-3}, "larger value"),
        ({"margin": f.margin / 20}, "margins"),
        ({"minimisers": f.minimisers * 30}, "lie in W"),
        ({"minimisers": f.minimisers[::-1]}, "costs more"),
        ({"minimisers": None}, "no point for each budget"),
        ({"concave": True}, "do not prove"),
        ({"slope": 1.0}, "do not prove"),
        ({"floor": None}, "do not prove"),
        ({"proof": None}, "no proof"),
        ({"proof": f.proof._replace(primal=f.proof.primal[:-1])}, "without a bound|do not fit|reached again"),
        ({"proof": f.proof._replace(dual={lam: (f.proof.dual[lam][0], f.proof.dual[lam][1] + 0.02)})}, "reached again"),
    ]
    for change, reason in changes:
        found = again(**change)
        assert re.search(reason, found), (sorted(change), found)
    points = case.found.delta.points
    low = verify_constrained(case.problem, f, points=points, values=case.found.delta.values - 1e-6)
    assert low.reason == "a point of the combination has a larger value than claimed"


def test_what_the_checker_does_not_know_is_estimated_by_name(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(pairs.SMOOTH, "atan")
    branch = networks.from_functions(
        lambda key, x: {"w": jnp.zeros(1)}, lambda params, x: jnp.arctan(params["w"][0] * x)
    )
    problem = duality.constrained_problem(
        branch, labelled(rng, 6), tau=5.0, size=leaves(jnp.abs), domain=duality.box(-1, 1)
    )
    found = duality.theorem1(problem, 0.5, 3, points=17, effort=EFFORT)
    assert found.proof.failures == ["the operation atan is not known to the checker."]
    assert (found.function.status, found.delta.status, found.rows[0].status) == ("estimated",) * 3
    assert found.rows[0].verdict == "undecided"


def test_a_search_is_estimated_and_its_points_are_feasible(rng: np.random.Generator) -> None:
    problem = duality.constrained_problem(
        BRANCH, labelled(rng), tau=5.0, size=leaves(lambda w: jnp.abs(w) ** 1.5), domain=duality.ball(2.0, 3)
    )
    found = duality.theorem1(problem, 1.0, [1, 10], points=17, effort=dataclasses.replace(EFFORT, route="search"))
    assert {row.status for row in found.rows} == {"estimated"}
    assert (problem.h(found.function.minimisers) <= found.function.budgets).all()
    assert found.rows[1].primal_upper < 1


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (leaves(lambda w: jnp.sqrt(jnp.abs(w))), "not convex"),
        (leaves(lambda w: -(w**2)), "not convex"),
        (leaves(lambda w: jnp.floor(jnp.abs(w))), "may jump.*floor"),
        (leaves(lambda w: (jnp.abs(w) > 0.5).astype(w.dtype)), "cases do not meet|may jump|not convex"),
        (leaves(lambda w: jnp.where(w > 0.5, 1.0, 0.0)), "cases do not meet"),
        # Jumps at single points, which no search over midpoints sees.
        (leaves(lambda w: jnp.abs(w) + 3 * (w == 0.3).astype(w.dtype)), "may jump.*convert_element_type"),
        (leaves(lambda w: jnp.abs(w) + 3.0 * (w != 0)), "may jump.*convert_element_type"),
        (leaves(lambda w: jnp.abs(w) + (w >= 1).astype(jnp.int32).astype(w.dtype)), "may jump.*convert_element_type"),
        (lambda params: jnp.zeros(()), "does not depend"),
        (lambda params: jnp.ones(3) * leaves(jnp.abs)(params), "one real number"),
        (leaves(lambda w: jnp.log(w)), "not finite"),
        ("l1", "must be a function"),
    ],
)
def test_sizes_that_the_theorem_does_not_allow_are_refused(size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        duality.constrained_problem(
            BRANCH, labelled(np.random.default_rng(0)), tau=5.0, size=size, domain=duality.box(-1.0, 1.0)
        )


def test_operations_without_a_rule_and_budgets_out_of_range_are_refused(rng: np.random.Generator) -> None:
    def made(f: Callable[[jax.Array], jax.Array]) -> ConstrainedProblem:
        return duality.constrained_problem(BRANCH, labelled(rng), tau=5.0, size=leaves(f), domain=duality.box(-1, 1))

    with pytest.raises(UnsupportedPrimitiveError, match="lgamma"):
        made(lambda w: jax.lax.lgamma(w + 3.0))
    looped = networks.from_functions(
        lambda key, x: jnp.zeros(1),
        lambda w, x: jax.lax.fori_loop(0, jnp.where(w[0] > 0, 2, 3), lambda i, a: a * w[0], x),
    )
    called = networks.from_functions(
        lambda key, x: jnp.zeros(1), lambda w, x: jax.pure_callback(np.sin, x, w[0] * x, vmap_method="expand_dims")
    )
    for branch, message in (
        (looped, "no gradient.*In place of while: give the loop a known"),
        (called, "JAX says: Pure"),
    ):
        with pytest.raises(UnsupportedPrimitiveError, match=message):
            duality.branch_problem(branch, labelled(rng), tau=5.0, radius=1.0)
        with pytest.raises(UnsupportedPrimitiveError, match=message):
            certify.risk_problem(branch, labelled(rng), losses.logistic(), penalty=1.0, radius=1.0)
    problem = made(lambda w: jnp.abs(w) + 1)
    with pytest.raises(ValueError, match="or inf for no constraint"):
        duality.theorem1(problem, math.nan, 2, points=9, effort=EFFORT)
    found = constrained_bounds.sizes(problem)
    assert found.floor <= 2 <= found.least < 2 + 1e-9
    assert found.most == 4
    for budget in (1.9, 2.0, -1.0):
        with pytest.raises(ValueError, match="not above the least h"):
            constrained_bounds.grid(found, budget, 9)
    assert constrained_bounds.grid(found, math.inf, 9)[[0, -1]] == pytest.approx([2, 4])
    for budget in (2.001, 2.9, 3.99):
        grid = constrained_bounds.grid(found, budget, 9)
        assert budget in grid
        assert grid[-1] >= 4
    with pytest.raises(ValueError, match="closed_form"):
        duality.theorem1(problem, 3.0, 2, points=9, effort=dataclasses.replace(EFFORT, route="closed_form"))


def waves() -> ConstrainedProblem:
    """`a sin(w x)` on a box, of size `|a| + |w|`."""
    x = np.linspace(-2, 2, 9, dtype=np.float32)[:, None]
    branch = networks.from_functions(lambda key, x: jnp.zeros(2), lambda w, x: w[0] * jnp.sin(w[1] * x))
    data = from_arrays(x, np.where(np.sin(3 * x[:, 0]) > 0.3, 1, -1))
    return duality.constrained_problem(
        branch, data, tau=2.5, size=lambda w: jnp.sum(jnp.abs(w)), domain=duality.box(-2, 2)
    )


@pytest.mark.parametrize("budget", [1e-12, 1e-9, 1e-6])
def test_budgets_next_to_the_least_h_take_no_more_points(budget: float) -> None:
    found = duality.theorem1(waves(), budget, [1, 1000], points=33, effort=EFFORT)
    assert len(found.function.budgets) == 33
    assert not found.proof.failures
    assert {row.status for row in found.rows} == {"certified"}
    for row in found.rows:  # inf(P) is 1 up to less than K
        assert 1 - 0.01 < row.primal_lower <= 1
        assert 1 - budget <= row.primal_upper < 1 + 1e-9


def test_budgets_at_the_least_h_are_not_called_infeasible() -> None:
    sizes = constrained_bounds.sizes(waves())
    assert sizes.floor <= 0 <= sizes.least < 1e-11
    for budget in (0.0, 1e-13, sizes.floor, sizes.least):
        with pytest.raises(ValueError, match="where nothing can be certified; give a budget above") as refused:
            constrained_bounds.grid(sizes, budget, 9)
        assert "no feasible point" not in str(refused.value)
    with pytest.raises(ValueError, match=r"proven to be at least .*: no feasible point"):
        constrained_bounds.grid(sizes, -1e-3, 9)


@pytest.mark.parametrize("points", [3, 65, 5000])
@pytest.mark.parametrize("share", [1e-300, 1e-9, 1e-3, 0.1, 0.5, 1 - 1e-12, 1.0, 2.0])
def test_grids_of_budgets_are_of_bounded_length(points: int, share: float) -> None:
    sizes = constrained_bounds.Sizes(0.0, (), 1e-12, np.zeros(1), 3.0)
    budget = sizes.least + share * sizes.most
    if budget > sizes.least:
        grid = constrained_bounds.grid(sizes, budget, points)
        assert 3 <= len(grid) <= 2 + max(4096, 4 * points)
        assert grid[0] == sizes.least
        assert grid[-1] >= sizes.most * (1 - 1e-12)
        assert budget in grid or share >= 1 or share * max(4096, 4 * points) < 1 + 1e-9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: duality.box(1, 1), "lower < upper"),
        (lambda: duality.box(0, math.inf), "compact"),
        (lambda: duality.box(math.nan, 1), "lower < upper"),
        (lambda: duality.box("a", 1), "numbers or arrays"),
        (lambda: duality.ball(-1), "radius"),
        (lambda: duality.ball(1, 0.5), "not convex"),
        (lambda: duality.ball(math.inf), "radius"),
        (lambda: duality.product(duality.box(0, 1), 3), "boxes and balls"),
        (lambda: sets.placed(duality.product(duality.box(0, 1)), [(2,), (3, 1)]), "one set a leaf"),
        (lambda: sets.placed(duality.box(np.zeros(3), 1), [(2,)]), "does not fit"),
        (lambda: sets.placed(7, [(2,)]), "box, ball or product"),
    ],
)
def test_sets_that_are_none_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("order", [1, 1.5, 2, 3, 7.25, math.inf])
@pytest.mark.parametrize("radius", [1e-30, 1.7, 1e30])
def test_membership_is_exact_and_projections_are_inside(order: float, radius: float, rng: np.random.Generator) -> None:
    w = sets.placed(sets.product(sets.ball(radius, order), sets.box(-radius, 2 * radius)), [(3,), (2,)])
    points = radius * rng.uniform(-3, 3, (200, 5))
    points[:50] *= 0.2
    with jax.enable_x64(True):
        near = np.asarray(jax.vmap(w.nearest)(jnp.asarray(points)))
    inside = w.inside(near)
    assert np.abs(inside - near).max() <= 1e-12 * radius
    for raw, point in zip(points, inside, strict=True):
        assert w.contains(point)
        ball = [Fraction(v) / Fraction(radius) for v in raw[:3].tolist()]
        if math.isinf(order):
            true = max(map(abs, ball)) <= 1
        else:
            shares = [Decimal(abs(v).numerator) / Decimal(abs(v).denominator) for v in ball]
            true = sum(s ** Decimal(order) for s in shares) <= 1
        assert w.contains(raw) == (true and bool(((raw[3:] >= -radius) & (raw[3:] <= 2 * radius)).all()))
    lo = w.lower + (w.upper - w.lower) * rng.uniform(0, 1, (500, 5))
    hi = np.minimum(lo + radius * rng.uniform(0, 0.5, (500, 5)), w.upper)
    apart = np.asarray(w.apart(lo, hi, np))
    nearest = np.clip(0.0, lo, hi)
    assert [w.contains(p) for p in nearest] == (~apart).tolist()
    assert math.isinf(order) or apart.any()
