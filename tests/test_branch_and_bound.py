"""Proven lower bounds against sampled truth: single boxes, whole trees, and branches that try to deceive."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualgap_jax.data import Dataset
from dualgap_jax.duality import boxes, branch_and_bound, problem, search
from dualgap_jax.duality.bounding.rules import UnsupportedPrimitiveError
from dualgap_jax.duality.branch_and_bound import BoundSpec
from dualgap_jax.duality.checker import pairs, ranges, value_functions
from dualgap_jax.duality.problem import ByProgram, Problem
from dualgap_jax.duality.search import SearchSpec
from dualgap_jax.duality.values import ValueFunction
from dualgap_jax.networks import from_functions, mlp

SMALL = SearchSpec(budgets=8, starts=24, steps=80, sweeps=1, survivors=4)


def binary(rng: np.random.Generator, n: int, d: int, scale: float = 1.0) -> Dataset:
    x = (scale * rng.standard_normal((n, d))).astype(np.float32)
    y = rng.choice(np.array([-1.0, 1.0], np.float32), n)
    return Dataset("random", x, y, np.zeros((1,), np.float32), np.ones((1,), np.float32), 1, "binary", {})


def own(f: Any, weights: int) -> Any:
    """A branch `f(w [weights], x [n, d]) -> [n]`."""
    return from_functions(lambda key, x: jnp.zeros(weights, x.dtype), lambda w, x: f(w, x)[:, None])


def dense(one: Problem, points: int) -> tuple[np.ndarray, np.ndarray]:
    """All of W on a grid: `w [k, p]`, `g [k]`."""
    axis = np.linspace(-one.radius, one.radius, points)
    w = np.stack(np.meshgrid(*[axis] * one.size), -1).reshape(-1, one.size)
    w = w[np.linalg.norm(w, axis=1) <= one.radius]
    return w, problem.values_at(one, w, batch=256)


def certified(one: Problem, spec: BoundSpec, points: int = 33, **changes: Any) -> ValueFunction:
    found = search.search(one, one.grid(points), SMALL, dtype=np.float64)
    return branch_and_bound.certify(one, dataclasses.replace(found, **changes), spec)


def contradicts(one: Problem, proven: ValueFunction, points: int) -> list[float]:
    """The budgets at which a point of a grid over W lies below the proven lower bound."""
    w, g = dense(one, points)
    h = one.h(w)
    return [
        float(b)
        for b, low in zip(proven.budgets, proven.lower, strict=True)
        if low > g[h <= b * (1 + 1e-12)].min() + 1e-12
    ]


BRANCHES: dict[str, Any] = {
    "tanh": mlp((1,), 1, activation="tanh", use_bias=False),
    "relu": mlp((1,), 1, use_bias=False),
    "bias": mlp((), 1),
    "gelu": own(lambda w, x: w[1] * jax.nn.gelu(w[0] * x[:, 0]), 2),
    "sine": own(lambda w, x: jnp.sin(3 * w[0] * x[:, 0] + w[1]), 2),
    "leaky": own(lambda w, x: w[1] * jax.nn.leaky_relu(w[0] * x[:, 0] + 0.1), 2),
    "recurrent": own(
        lambda w, x: jax.lax.scan(lambda h, _: (jnp.tanh(w[0] * x[:, 0] + w[1] * h), None), x[:, 0], None, 2)[0], 2
    ),
}


@pytest.mark.parametrize("name", ["tanh", "leaky"])  # with second derivatives, and with kinks
def test_bounds_of_boxes_hold_at_all_points_of_them(name: str, rng: np.random.Generator) -> None:
    """For multipliers from 0 to 1e12, on boxes of all sizes, also near the sphere and at the axes."""
    one = problem.branch_problem(BRANCHES[name], binary(rng, 7, 1), tau=2.0, radius=2.0)
    count = 400
    lo = rng.uniform(-2, 2, (count, 2)) * (rng.random((count, 2)) < 0.8)
    hi = lo + 10.0 ** rng.uniform(-9, 0, (count, 2))
    share = rng.random((count, 100, 2)) ** rng.choice([0.05, 1.0, 20.0], (count, 100, 2))
    w = np.clip(lo[:, None] + share * (hi - lo)[:, None], lo[:, None], hi[:, None])
    g = problem.values_at(one, w.reshape(-1, 2), batch=512).reshape(count, 100)
    h = (w**2).sum(-1)
    for lam0 in (0.0, 0.3, 1e3, 1.27e6, 1e12):
        for kernel in boxes.kernels(ByProgram(one)):
            with jax.enable_x64(True):
                out = boxes.Bounds(*(np.asarray(a) for a in kernel(lo, hi, lam0)))
            values = g + lam0 * h
            slack = 1e-13 * (1 + np.abs(values))
            assert (out.h_lo[:, None] <= h).all()
            assert (h <= out.h_hi[:, None]).all()
            assert (out.plain[:, None] <= values + slack).all()
            # With s the squared norm of the point itself the second bound is at its largest.
            second = out.base[:, None] - (out.lam - lam0)[:, None] * h
            assert (second <= values + slack + 1e-13 * np.abs(out.lam * out.h_hi)[:, None]).all()
            assert (out.lam >= lam0).all()


def test_the_lagrangian_is_below_all_values_for_every_multiplier(rng: np.random.Generator) -> None:
    """Multipliers far beyond the size of the slopes, and slopes far beyond 1."""
    scale = 1e4
    one = problem.branch_problem(BRANCHES["tanh"], binary(rng, 9, 1, scale), tau=1e-5 * scale, radius=2.0)
    proven = certified(one, BoundSpec(1.0, 3000), 17)
    assert proven.lagrangian is not None
    w, g = dense(one, 401)
    near = rng.uniform(-1, 1, (2000, 2)) * 10.0 ** rng.uniform(-9, 0, (2000, 1))
    w, g = np.concatenate([w, near]), np.concatenate([g, problem.values_at(one, near, batch=256)])
    for lam in (0.0, 0.4, 1e3, 1.27e6, 3e9):
        least = float((g + lam * (w**2).sum(1)).min())
        assert proven.lagrangian(lam) <= least + 1e-9 * abs(least)
    for lam in (-1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="multiplier"):
            proven.lagrangian(lam)


@pytest.mark.parametrize(("name", "power"), [*((name, 2.0) for name in sorted(BRANCHES)), ("tanh", 1.0), ("relu", 3.0)])
def test_certified_values_are_below_all_weights_on_a_grid(name: str, power: float, rng: np.random.Generator) -> None:
    one = problem.branch_problem(BRANCHES[name], binary(rng, 6, 1), tau=2.0, radius=1.5, power=power)
    # From the weights 0 on: what a search knows already must not hide a box that is left out.
    start = ValueFunction(one.grid(33), np.ones(33), np.ones(33), "none", np.zeros((33, one.size)))
    proven = branch_and_bound.certify(one, start, BoundSpec(3e-3, 30_000))
    assert proven.status == "certified"
    assert proven.tolerance < (3e-3 if name != "recurrent" else 1.0)
    assert contradicts(one, proven, 201) == []
    if power == 2 and name in ("relu", "gelu", "bias"):  # tanh below; of the slope of leaky the checker knows no bound
        found = value_functions.verify_boxes(one, proven)
        assert found.holds, found.reason


# --- branches that try to deceive -------------------------------------------------------------------------------------


@jax.custom_jvp
def flat(a: jax.Array) -> jax.Array:
    return jnp.exp(-(((a - 1.234) / 0.02) ** 2))


flat.defjvp(lambda primals, tangents: (flat(*primals), 0.0 * tangents[0]))

NARROW: dict[str, Any] = {
    "stop_gradient": lambda w, x: jnp.exp(-(((jax.lax.stop_gradient(w[0]) - 1.234) / 0.02) ** 2)) * x[:, 0],
    "custom_jvp": lambda w, x: flat(w[0]) * x[:, 0],
    "sign": lambda w, x: jnp.where(jnp.abs(w[0] - 1.234) < 0.02, 1.0, 0.0) * x[:, 0],
    "heaviside": lambda w, x: (jnp.heaviside(w[0] - 1.234, 0.5) - jnp.heaviside(w[0] - 1.25, 0.5)) * x[:, 0],
    "integers": lambda w, x: jnp.where((40 * w[0]).astype(jnp.int32) == 49, 1.0, 0.0) * x[:, 0],
    "floor": lambda w, x: jnp.maximum(0.0, 1 - jnp.abs(jnp.floor(40 * w[0]) - 49.0)) * x[:, 0],
    "round": lambda w, x: jnp.exp(-(((jnp.round(50 * w[0]) - 62) / 0.2) ** 2)) * x[:, 0],
    "narrow": lambda w, x: jnp.exp(-(((w[0].astype(jnp.float16) - 1.234) / 0.02) ** 2)).astype(x.dtype) * x[:, 0],
}


@pytest.mark.parametrize("name", sorted(NARROW))
def test_what_happens_in_a_narrow_place_is_not_overlooked(name: str, rng: np.random.Generator) -> None:
    """A search misses it, and a derivative of 0 would hide it."""
    data = binary(rng, 5, 1)
    data = data._replace(x=np.abs(data.x), y=np.ones(5, np.float32))
    one = problem.branch_problem(own(NARROW[name], 1), data, tau=2.0, radius=2.0)
    start = ValueFunction(one.grid(65), np.ones(65), np.ones(65), "none", np.zeros((65, 1)))
    proven = branch_and_bound.certify(one, start, BoundSpec(1e-3, 4000))
    w = np.linspace(-2, 2, 40_001)[:, None]
    truth = problem.values_at(one, w, batch=512)
    assert truth.min() < 0.9
    for b, low in zip(proven.budgets, proven.lower, strict=True):
        assert low <= truth[w[:, 0] ** 2 <= b].min() + 1e-12


def test_an_infinite_slope_leaves_finite_values(rng: np.random.Generator) -> None:
    """sqrt|w| is continuous but has no Lipschitz constant at 0."""
    root = own(lambda w, x: jnp.sqrt(jnp.abs(w[0])) * x[:, 0], 1)
    one = problem.branch_problem(root, binary(rng, 6, 1), tau=2.0, radius=2.0)
    start = ValueFunction(one.grid(33), np.ones(33), np.ones(33), "none", np.zeros((33, 1)))
    proven = branch_and_bound.certify(one, start, BoundSpec(1e-3, 4000))
    assert np.isfinite(proven.upper).all()
    assert proven.tolerance < 2e-3
    assert proven.slope is None
    slope = float((one.c[:, 0] * one.x[:, 0]).mean()) / 2
    expected = 1 - abs(slope) * np.sqrt(np.sqrt(proven.budgets)) if slope > 0 else np.ones(33)
    assert (proven.lower <= expected + 1e-12).all()
    assert (expected <= proven.upper + 1e-12).all()


NOWHERE: dict[str, Any] = {
    "logarithm": lambda w, x: jnp.tanh(jnp.log(w[0])) * x[:, 0],
    "hidden by a maximum": lambda w, x: jnp.maximum(jnp.sqrt(w[0]), -1.0) * x[:, 0],
    "hidden by a choice": lambda w, x: jnp.where(jnp.log(w[0]) > 0, 1.0, 0.0) * x[:, 0],
    "hidden by a clip": lambda w, x: jnp.clip(1 / w[0], -1, 1) * x[:, 0],
}


@pytest.mark.parametrize("name", sorted(NOWHERE))
def test_branches_that_are_not_defined_everywhere_get_no_finite_bound(name: str, rng: np.random.Generator) -> None:
    one = problem.branch_problem(own(NOWHERE[name], 1), binary(rng, 5, 1), tau=2.0, radius=2.0)
    start = ValueFunction(one.grid(9), np.ones(9), np.ones(9), "none", np.full((9, 1), 0.0))
    with pytest.raises(ValueError, match="no finite bound was proven"):
        branch_and_bound.certify(one, start, BoundSpec(1e-3, 300))


def test_nan_and_infinity_in_data_or_weights_are_refused(rng: np.random.Generator) -> None:
    one = problem.branch_problem(BRANCHES["tanh"], binary(rng, 5, 1), tau=2.0, radius=2.0)
    found = search.search(one, one.grid(9), SMALL, dtype=np.float64)
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            branch_and_bound.certify(one._replace(x=np.where(np.arange(5)[:, None] == 3, bad, one.x)), found)
        with pytest.raises(ValueError, match="not finite"):
            branch_and_bound.certify(one._replace(c=bad * one.c), found)
        with pytest.raises(ValueError, match="minimisers"):
            branch_and_bound.certify(one, dataclasses.replace(found, minimisers=bad + found.minimisers))
    held = own(lambda w, x: jnp.maximum(w[0] * x[:, 0], jnp.array([0.0, 1.0, np.nan, 0.0, 1.0])), 1)
    with pytest.raises(ValueError, match=r"no finite bound was proven|not a number"):
        certified(problem.branch_problem(held, binary(rng, 5, 1), tau=2.0, radius=2.0), BoundSpec(1e-2, 100), 9)


@pytest.mark.parametrize(
    "budgets",
    [np.linspace(0, 1, 9), np.linspace(0, 9, 9), np.linspace(0.5, 4, 9), np.full(9, 4.0), np.linspace(4, 0, 9)],
)
def test_budgets_that_do_not_belong_to_the_set_are_refused(budgets: np.ndarray, rng: np.random.Generator) -> None:
    one = problem.branch_problem(BRANCHES["tanh"], binary(rng, 5, 1), tau=2.0, radius=2.0)
    found = search.search(one, one.grid(9), SMALL, dtype=np.float64)
    with pytest.raises(ValueError, match="budgets"):
        branch_and_bound.certify(one, dataclasses.replace(found, budgets=budgets))


def test_radii_out_of_range_and_branches_without_rules_are_refused(rng: np.random.Generator) -> None:
    tiny = problem.branch_problem(BRANCHES["tanh"], binary(rng, 5, 1), tau=2.0, radius=1e-120)
    start = ValueFunction(np.linspace(0, 1e-240, 5), np.ones(5), np.ones(5), "none", np.zeros((5, 2)))
    with pytest.raises(ValueError, match="radii from 1e-100"):
        branch_and_bound.certify(tiny, start)
    gamma = own(lambda w, x: jax.lax.lgamma(w[0] * x[:, 0] + 9), 1)
    with pytest.raises(UnsupportedPrimitiveError, match="no interval rule for lgamma"):
        certified(problem.branch_problem(gamma, binary(rng, 5, 1), tau=2.0, radius=2.0), BoundSpec(), 9)


# --- the tree ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d", "most"), [(200, 1, 1_000), (30, 2, 8_000)])
def test_the_rule_of_splitting_closes(n: int, d: int, most: int, rng: np.random.Generator) -> None:
    """With `a tanh(u.x)` the slopes by u spread more than those by a, which must be halved too."""
    one = problem.branch_problem(BRANCHES["tanh"], binary(rng, n, d), tau=2.0, radius=2.0)
    proven = certified(one, BoundSpec(1e-3, 2 * most), 65)
    assert proven.tolerance <= 1e-3
    assert "closed" in proven.method
    assert int(proven.method.split()[3].replace(",", "")) <= most


class Case(NamedTuple):
    problem: Problem
    proven: ValueFunction


@pytest.fixture(scope="module")
def case() -> Case:
    one = problem.branch_problem(BRANCHES["tanh"], binary(np.random.default_rng(3), 20, 1), tau=2.0, radius=2.0)
    proven = certified(one, BoundSpec(1e-3, 5_000))
    assert proven.lagrangian is not None
    proven.lagrangian(0.05)
    return Case(one, proven)


def test_a_proof_covers_the_set(case: Case) -> None:
    """The boxes of the tree, followed from its root, are disjoint and fill the cube."""
    tree = case.proven.proof.primal
    lo, hi, volume = np.full((1, 2), -tree.edge), np.full((1, 2), tree.edge), 0.0
    for split in tree.splits:
        leaf = split < 0
        volume += float(np.prod(hi[leaf] - lo[leaf], axis=1).sum())
        lo, hi = branch_and_bound._halved(lo[~leaf], hi[~leaf], split[~leaf])
    assert len(lo) == 0
    assert volume == pytest.approx((2 * tree.edge) ** 2, rel=1e-12)
    assert tree.edge >= case.problem.radius


def test_a_proof_holds_when_gone_through_again(case: Case) -> None:
    found = value_functions.verify_boxes(case.problem, case.proven)
    assert found.holds, found.reason
    assert found.boxes > 100


def _changed(name: str, f: ValueFunction) -> ValueFunction:
    assert f.minimisers is not None
    assert f.slope is not None
    tree, dual = f.proof.primal, f.proof.dual
    splits = list(tree.splits)
    k = next(k for k, s in enumerate(splits) if (s < 0).any() and (s >= 0).any())
    if name == "a bound that is too high":
        lower = np.minimum(f.lower + 2e-3, f.lower[0])
        return dataclasses.replace(f, lower=lower, upper=np.maximum(f.upper, lower))
    if name == "one bound that is too high":
        j = int(np.argmax(f.lower[:-1] - f.lower[1:] > 2e-3))
        lower = np.where(np.arange(len(f.lower)) == j + 1, f.lower[j], f.lower)
        return dataclasses.replace(f, lower=lower, upper=np.maximum.accumulate(np.maximum(f.upper, lower)[::-1])[::-1])
    if name == "a value that is too low":
        return dataclasses.replace(f, upper=f.upper - 1e-9, lower=np.minimum(f.lower, f.upper - 1e-9))
    if name == "a point outside its ball":
        return dataclasses.replace(f, minimisers=f.minimisers * (1 + 1e-9))
    if name == "a cube that is too small":
        return dataclasses.replace(f, proof=f.proof._replace(primal=tree._replace(edge=0.9 * tree.edge)))
    if name == "a box that is left out":
        return dataclasses.replace(
            f, proof=f.proof._replace(primal=tree._replace(splits=(*splits[:k], splits[k][1:], *splits[k + 1 :])))
        )
    if name == "a level that is left out":
        return dataclasses.replace(f, proof=f.proof._replace(primal=tree._replace(splits=tuple(splits[:-1]))))
    if name == "a multiplier's bound that is too high":
        return dataclasses.replace(f, proof=f.proof._replace(dual={lam: (t, v + 2e-3) for lam, (t, v) in dual.items()}))
    if name == "a slope that is too small":
        return dataclasses.replace(f, slope=0.3 * f.slope)
    return dataclasses.replace(f, proof=None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a bound that is too high", "was not reached again"),
        ("one bound that is too high", "was not reached again"),
        ("a value that is too low", "larger value than claimed"),
        ("a point outside its ball", "outside its ball"),
        ("a cube that is too small", "does not contain W"),
        ("a box that is left out", "do not fit its boxes"),
        ("a level that is left out", "without a bound"),
        ("a multiplier's bound that is too high", "was not reached again"),
        ("a slope that is too small", "slope reaches"),
        ("no proof", "carries no proof"),
    ],
)
def test_a_claim_that_was_tampered_with_does_not_hold(name: str, reason: str, case: Case) -> None:
    found = value_functions.verify_boxes(case.problem, _changed(name, case.proven), effort=2)
    assert not found.holds
    assert reason in found.reason


def test_the_checker_names_what_it_does_not_know(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one of its rules; the solver has its own."""
    monkeypatch.delitem(pairs.SMOOTH, "atan")
    one = problem.branch_problem(
        own(lambda w, x: jnp.arctan(w[0] * x[:, 0]), 1), binary(rng, 5, 1), tau=2.0, radius=1.5
    )
    found = value_functions.verify_boxes(one, certified(one, BoundSpec(1e-1, 500), 9))
    assert not found.holds
    assert found.reason == "the operation atan is not known to the checker."


@pytest.mark.parametrize("name", ["tanh", "relu", "gelu", "recurrent"])
def test_the_checkers_ranges_hold_all_points(name: str, rng: np.random.Generator) -> None:
    one = problem.branch_problem(BRANCHES[name], binary(rng, 6, 1), tau=2.0, radius=2.0)
    walker = ranges.Walker(one)
    lo = rng.uniform(-2, 2, (100, 2)) * (rng.random((100, 2)) < 0.8)
    hi = lo + 10.0 ** rng.uniform(-9, 0, (100, 2))
    w = lo[:, None] + rng.random((100, 50, 2)) * (hi - lo)[:, None]
    g = problem.values_at(one, w.reshape(-1, 2), batch=512).reshape(100, 50)
    found, at = walker(lo, hi), walker(w[:, 0], w[:, 0])
    assert (found.lower[:, None] <= g + 1e-15).all()
    assert (g <= found.upper[:, None] + 1e-15).all()
    assert found.smooth == (name != "relu")
    step, change = w - w[:, :1], g - g[:, :1]
    ends = [step * d[:, None] for d in found.first]
    assert (np.minimum(*ends).sum(2) - 1e-14 <= change).all()
    assert (change <= np.maximum(*ends).sum(2) + 1e-14).all()
    with np.errstate(invalid="ignore"):
        pairs = 0.5 * step[..., :, None] * step[..., None, :]
        bends = [np.where(pairs == 0, 0, pairs * h[:, None]) for h in found.second]
        slopes = [step * d[:, None] for d in at.first]
    assert (np.minimum(*slopes).sum(2) + np.minimum(*bends).sum((2, 3)) - 1e-14 <= change).all()
    assert (change <= np.maximum(*slopes).sum(2) + np.maximum(*bends).sum((2, 3)) + 1e-14).all()
