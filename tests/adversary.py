"""Looks for certified claims that brute force contradicts.

    python tests/adversary.py --instances 10000 --seed 1

Each family draws problems by hypothesis, lets the package claim, and compares with code of its own: rational numbers,
400 digits, or x87 extended precision, on all allocations, all kinks of the data, or many weights of W.  An instance is
one problem with all the claims that are made about it.  Ends with status 1 if a claim was contradicted.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from gap_oracles import exact_dual, exact_primal
from hypothesis import strategies as st
from spectral_oracles import rational_optimum, spoiled

from dualgap_jax import spectral
from dualgap_jax.data import Dataset
from dualgap_jax.duality import BoundSpec, ValueFunction, branch_problem, certify, closed_forms, deltas, verdicts
from dualgap_jax.duality.checker.value_functions import verify_boxes
from dualgap_jax.duality.problem import Problem
from dualgap_jax.duality.values import proven
from dualgap_jax.networks import from_functions, mlp
from dualgap_jax.spectral import SpectralError, VerificationError, in_blocks, solve_columns

Long = np.longdouble
LEAST, ULP = np.finfo(Long).tiny, 32 * np.finfo(Long).eps
COUNTS: Counter[str] = Counter()  # claims compared, by family; and what was refused

floats = functools.partial(st.floats, allow_nan=False, allow_infinity=False)
seeds = st.integers(0, 2**32 - 1)
decades = floats(-150, 150)


def agree(family: str, low: Any, high: Any, what: str) -> None:
    """Counts a claim, and fails if it is contradicted: `low <= high`."""
    COUNTS[family] += 1
    if not low <= high:
        raise AssertionError(f"{family}: {what}: {low!r} > {high!r}")


def binary(x: np.ndarray, y: np.ndarray) -> Dataset:
    one = np.ones(1, np.float32)
    return Dataset("drawn", x.astype(np.float32), y.astype(np.float32), 0 * one, one, 1, "binary", {})


# --- verdicts on branches that choose among finitely many weights -----------------------------------------------------


@st.composite
def choices(draw: Any) -> dict[str, Any]:
    classes = draw(st.integers(1, 2))
    return {
        "seed": draw(seeds),
        "points": draw(st.integers(3, 7)),
        "options": [draw(st.integers(1, 12 if classes == 1 else 5)) for _ in range(classes)],
        "counts": [draw(st.integers(1, 4 if classes == 1 else 2)) for _ in range(classes)],
        "unit": 10.0 ** draw(decades),
        "size": 10.0 ** draw(st.sampled_from([0.0, 0.0, -150.0, -20.0, 8.0, 100.0])),
        "budget": draw(st.sampled_from(["inside", "grid", "cost", "beyond", "infinite", "least"])),
        "noise": draw(st.sampled_from([0.0, 1e-3])),
        "ties": draw(st.booleans()),
        "concave": draw(st.booleans()),
    }


def check_choices(case: dict[str, Any]) -> None:
    """Bounds on inf(P), sup(D) and the gap against all allocations, one by one, in rational numbers."""
    rng, counts = np.random.default_rng(case["seed"]), case["counts"]
    grid = np.linspace(0, case["unit"] * rng.uniform(0.1, 9), case["points"])
    functions, all_costs, all_worth = [], [], []
    for k in case["options"]:
        costs = np.append(0.0, np.where(rng.random(k) < 0.5, rng.uniform(0, grid[-1], k), rng.choice(grid, k)))
        worth = case["size"] * rng.uniform(-1, 1, k + 1)
        worth = case["size"] * np.round(3 * worth / case["size"]) if case["ties"] else worth
        reach = np.array([worth[costs <= b].min() for b in grid])
        sure = np.array([worth[costs <= b * (1 - 2.0**-47)].min() for b in grid])
        noise = case["noise"] * case["size"]
        functions.append(proven(ValueFunction(grid, reach - noise, sure + noise), "drawn"))
        all_costs.append([Fraction(c) for c in costs.tolist()])
        all_worth.append([Fraction(w) for w in worth.tolist()])
    budget = {
        "inside": rng.uniform(0, grid[-1]), "grid": rng.choice(grid), "cost": float(rng.choice(all_costs[0])),
        "beyond": 2 * grid[-1], "infinite": math.inf, "least": 0.0,
    }[case["budget"]]  # fmt: skip
    rational = Fraction(budget) if math.isfinite(budget) else Fraction(4 * grid[-1])
    (row,) = verdicts(functions, budget, [counts], delta_lower=0.0)
    if len(counts) == 1:
        primal = exact_primal(all_costs[0], all_worth[0], counts[0], rational)
        dual = exact_dual(all_costs[0], all_worth[0], rational)
    else:
        primal = _two_classes(all_costs, all_worth, counts, rational)
        dual = _two_envelopes(all_costs, all_worth, counts, rational)
    for name, truth in (("primal", primal), ("dual", dual), ("gap", primal - dual)):
        agree("choices", Fraction(getattr(row, f"{name}_lower")), truth, f"{name}_lower")
        agree("choices", truth, Fraction(getattr(row, f"{name}_upper")), f"{name}_upper")


def _two_classes(costs: Any, worth: Any, counts: Any, budget: Fraction) -> Fraction:
    ways = [list(itertools.combinations_with_replacement(range(len(c)), n)) for c, n in zip(costs, counts, strict=True)]
    total, best = sum(counts), None
    for one, two in itertools.product(*ways):
        if sum(costs[0][j] for j in one) + sum(costs[1][j] for j in two) <= total * budget:
            value = (sum(worth[0][j] for j in one) + sum(worth[1][j] for j in two)) / total
            best = value if best is None or value < best else best
    assert best is not None
    return best


def _two_envelopes(costs: Any, worth: Any, counts: Any, budget: Fraction) -> Fraction:
    """sup(D): the largest `Q(lam) - lam K` over 0 and all slopes between options, the kinks of Q."""
    total = sum(counts)
    lams = {Fraction(0)}
    for c, w in zip(costs, worth, strict=True):
        lams |= {(w[i] - w[j]) / (c[j] - c[i]) for i in range(len(c)) for j in range(len(c)) if c[j] > c[i]}

    def value(lam: Fraction) -> Fraction:
        parts = (
            n * min(a + lam * b for a, b in zip(w, c, strict=True))
            for c, w, n in zip(costs, worth, counts, strict=True)
        )
        return sum(parts, Fraction(0)) / total - lam * budget

    return max(value(lam) for lam in lams if lam >= 0)


# --- homogeneous branches ---------------------------------------------------------------------------------------------


@st.composite
def homogeneous(draw: Any) -> dict[str, Any]:
    relu = draw(st.booleans())
    return {
        "seed": draw(seeds),
        "n": draw(st.integers(1, 9)),
        "d": draw(st.integers(1, 2)) if relu else draw(st.integers(1, 4)),
        "relu": relu,
        "widths": draw(st.sampled_from([(1,), (3,), (1, 1), (1, 1, 1)] if relu else [(), (1,), (2, 3), (1, 1, 1)])),
        "scale": 10.0 ** draw(floats(-30, 30)),
        "kind": draw(st.sampled_from(["gaussian", "small numbers", "zeros", "one sign", "repeated"])),
        "tau": 10.0 ** draw(st.sampled_from([0.0, 1.0, -100.0, 100.0])) * draw(floats(0.1, 10)),
        "power": draw(st.sampled_from([1.0, 2.0, 2.0, 3.0, 2.7, 1.3, 8.0])),
        "radius": 10.0 ** draw(st.one_of(floats(-2, 2), floats(-90, 90))),
        "points": draw(st.integers(2, 40)),
        "count": draw(st.sampled_from([1, 2, 3, 10, 1000, 10**6])),
        "share": draw(st.sampled_from([0.0, 0.381966, 0.5, 1.0, 1.3, math.inf])),
    }


def _best_units(x: np.ndarray, c: np.ndarray) -> Any:
    """`max s E[c max(0, u.x)]` for d <= 2, from all kinks and the peaks of all cells, in extended precision."""
    x, c = x.astype(Long), c.astype(Long)
    if x.shape[1] == 1:
        u = np.array([[1], [-1]], Long)
    else:
        turned = np.stack([-x[:, 1], x[:, 0]], axis=1)
        turned = turned[(np.abs(turned).max(axis=1) > 0)]
        rays = np.concatenate([turned, -turned, np.eye(2, dtype=Long), -np.eye(2, dtype=Long)])
        rays = rays / np.sqrt((rays**2).sum(axis=1, keepdims=True))
        angle = np.sort(np.arctan2(rays[:, 1], rays[:, 0]))
        middle = 0.5 * (angle + np.append(angle[1:], angle[0] + 2 * Long(np.pi)))
        inside = np.stack([np.cos(middle), np.sin(middle)], axis=1)
        peaks = ((inside @ x.T > 0) * c) @ x
        peaks = np.concatenate([peaks, -peaks])
        norms = np.sqrt((peaks**2).sum(axis=1, keepdims=True))
        u = np.concatenate([rays, (peaks / np.where(norms > 0, norms, 1))])
    return np.abs(np.maximum(u @ x.T, 0) @ c).max() / len(x)


def check_homogeneous(case: dict[str, Any]) -> None:
    """Value functions in closed form, their slopes, margins, Q and verdicts, against kappa from all kinks."""
    rng, n, d, widths = np.random.default_rng(case["seed"]), case["n"], case["d"], case["widths"]
    x = rng.standard_normal((n, d))
    if case["kind"] == "small numbers":
        x = np.round(2 * x)
    elif case["kind"] == "zeros":
        x[rng.random((n, d)) < 0.5] = 0
    elif case["kind"] == "repeated":
        x[:] = x[0] * rng.choice([-1.0, 1.0, 2.0], (n, 1))
    x = (case["scale"] * x).astype(np.float32).astype(np.float64)
    y = np.ones(n) if case["kind"] == "one sign" else rng.choice([-1.0, 1.0], n)
    size, degree, power, radius = max(float(np.abs(x).max()), 1e-37), len(widths) + 1, case["power"], case["radius"]
    tau = case["tau"] * size
    if abs(max(power, degree) * math.log10(radius)) > 250 or not 1e-250 < tau < 1e250:
        COUNTS["refused"] += 1
        return
    make = closed_forms.kappa_relu_chain if case["relu"] else closed_forms.kappa_linear
    kappa = make(x, y if case["relu"] else y[:, None], tau=tau, widths=widths)
    grid = np.linspace(0.0, radius**power, case["points"])
    try:
        f = closed_forms.homogeneous_value_function(kappa, degree=degree, power=power, radius=radius, budgets=grid)
    except ValueError as error:
        if "a float cannot hold" not in str(error):
            raise
        COUNTS["refused"] += 1
        return
    if f.status != "certified":
        COUNTS["refused"] += 1
        return
    moment = np.sqrt(((x.astype(Long) * y.astype(Long)[:, None]).mean(axis=0) ** 2).sum())
    rho = _best_units(x, y) if case["relu"] else moment
    true = rho * Long(degree) ** (-Long(degree) / 2) / Long(tau)
    rate = Long(degree) / Long(power)
    b = grid.astype(Long)
    shape = np.where(b > 0, b**rate, 0)
    v = 1 - true * shape
    sizes = np.sqrt((x.astype(Long) ** 2).sum(axis=1)).mean() * Long(degree) ** (-Long(degree) / 2) / Long(tau)
    room = ULP * (1 + sizes * shape)
    for k in range(len(grid)):
        agree("homogeneous", f.lower[k], v[k] + room[k], "lower")
        agree("homogeneous", v[k] - room[k], f.upper[k], "upper")
    ends = np.sqrt((f.minimisers.astype(Long) ** 2).sum(axis=1))
    over = ends ** Long(power) > b * (1 - Long(2.0) ** -48) * (1 + ULP)
    agree("homogeneous", int((over & (ends > 0)).sum()), 0, "points outside their balls")
    agree("homogeneous", (true - ULP * sizes) * Long(radius) ** (degree - 1), f.slope, "slope")
    longest = np.sqrt((x.astype(Long) ** 2).sum(axis=1)).max()
    margin = longest * (Long(radius) / np.sqrt(Long(degree))) ** degree / Long(tau)
    agree("homogeneous", margin * (1 - ULP), f.margin, "margin")
    top = Long(radius) ** Long(power)
    for lam in (0.0, float(true), float(true) * radius ** (degree - power) * rng.uniform(0, 2), 1e3):
        if math.isfinite(lam):
            s = top * np.linspace(0, 1, 101).astype(Long)
            least = (1 - true * np.where(s > 0, s**rate, 0) + Long(lam) * s).min()
            error = ULP * (1 + sizes * top**rate + Long(lam) * top)
            agree("homogeneous", f.lagrangian(lam), least + error, "Q")
    _verdict(case, f, true, rate, top)


def _verdict(case: dict[str, Any], f: ValueFunction, true: Any, rate: Any, top: Any) -> None:
    count, share = case["count"], case["share"]
    budget = float(f.budgets[-1]) * share if share < 2 else math.inf
    (row,) = verdicts(f, budget, [count], delta_lower=0.0)
    spent = min(Long(budget), top) if math.isfinite(budget) else top
    t = count * spent / top
    if rate > 1:
        full = np.floor(t)
        primal = 1 - true * top**rate * (full + (t - full) ** rate) / count
        dual = 1 - true * top**rate * t / count
    else:
        primal = dual = 1 - true * (spent**rate if spent > 0 else Long(0))
    error = Long(1e-14) * (Long(1e-3) + 8 * (1 + true * top**rate) * Long(1e-2))
    for name, truth in (("primal", primal), ("dual", dual), ("gap", primal - dual)):
        agree("homogeneous", getattr(row, f"{name}_lower"), truth + error, f"{name}_lower")
        agree("homogeneous", truth - error, getattr(row, f"{name}_upper"), f"{name}_upper")
    if row.verdict == "verified":
        agree("homogeneous", f.margin, 1.0, "verified without Assumption 1")
    agree("homogeneous", row.verdict == "refuted", False, "the theorem is refuted")


# --- branch and bound -------------------------------------------------------------------------------------------------


def _tanh(w: Any, x: Any) -> Any:
    return w[:, 1:2] * np.tanh(w[:, 0:1] * x.T)


def _relu(w: Any, x: Any) -> Any:
    return w[:, 1:2] * np.maximum(w[:, 0:1] * x.T, 0)


def _affine(w: Any, x: Any) -> Any:
    return w[:, 0:1] * x.T + w[:, 1:2]


def _cubic(w: Any, x: Any) -> Any:
    return (w[:, 0:1] * x.T) ** 3 - w[:, 1:2] * (w[:, 0:1] * x.T)


def _plane(w: Any, x: Any) -> Any:
    return w[:, 2:3] * np.tanh(w[:, :2] @ x.T)


def _own(f: Any, p: int) -> Any:
    return from_functions(lambda key, x: jnp.zeros(p, x.dtype), lambda w, x: f(w, x)[:, None])


class Family(NamedTuple):
    branch: Any
    truth: Callable[[Any, Any], Any]  # outputs [k, n] at weights [k, p], in extended precision
    inputs: int


BRANCHES = {
    "tanh": Family(mlp((1,), 1, activation="tanh", use_bias=False), _tanh, 1),
    "relu": Family(mlp((1,), 1, use_bias=False), _relu, 1),
    "affine": Family(_own(lambda w, x: w[0] * x[:, 0] + w[1], 2), _affine, 1),
    "cubic": Family(_own(lambda w, x: (w[0] * x[:, 0]) ** 3 - w[1] * (w[0] * x[:, 0]), 2), _cubic, 1),
    "tanh in the plane": Family(mlp((1,), 1, activation="tanh", use_bias=False), _plane, 2),
}


@functools.cache
def _pool(name: str, scale: float, number: int) -> Problem:
    """Few problems, so that few programs are compiled; radius, power, grid and start are drawn."""
    rng = np.random.default_rng([number, len(name)])
    x = scale * rng.standard_normal((6, BRANCHES[name].inputs))
    return branch_problem(BRANCHES[name].branch, binary(x, rng.choice([-1.0, 1.0], 6)), tau=scale, radius=1.0)


def boxes(names: tuple[str, ...], pool: int, scales: tuple[float, ...] = (1.0, 1e12)) -> Any:
    @st.composite
    def draw_one(draw: Any) -> dict[str, Any]:
        return {
            "seed": draw(seeds),
            "branch": draw(st.sampled_from(names)),
            "scale": draw(st.sampled_from(scales)),
            "number": draw(st.integers(0, pool - 1)),
            "radius": 10.0 ** draw(st.one_of(floats(-1, 1), floats(-4, 3), floats(-95, 95))),
            "power": draw(st.sampled_from([2.0, 2.0, 2.0, 1.0, 3.0, 2.3])),
            "points": draw(st.integers(2, 33)),
            "tolerance": 10.0 ** draw(floats(-5, 0)),
            "most": draw(st.sampled_from([1, 8, 100, 600])),
            "multiplier": 10.0 ** draw(floats(-8, 8)),
            "wide": draw(st.booleans()),
        }

    return draw_one()


def check_boxes(case: dict[str, Any]) -> None:
    """Branch and bound against the values at thousands of weights, and its checker against claims that are too good."""
    rng, family = np.random.default_rng(case["seed"]), BRANCHES[case["branch"]]
    base = _pool(case["branch"], case["scale"], case["number"])
    radius, power = case["radius"], case["power"]
    one = base._replace(radius=radius, power=power)
    if not -250 < power * math.log10(radius) < 250:
        COUNTS["refused"] += 1
        return

    def truth(w: np.ndarray) -> Any:
        out = family.truth(w.astype(Long), one.x.astype(Long))
        return 1 - (out @ one.c[:, 0].astype(Long)) / (len(one.c) * Long(one.tau))

    grid, p = one.grid(case["points"]), one.size
    w = rng.standard_normal((3000, p)) * (rng.random((3000, p)) < 0.8)
    far = radius * (1 - 1e-14) * rng.random((3000, 1)) ** rng.choice([0.0, 0.3, 1.0, 8.0], (3000, 1))
    norms = np.linalg.norm(w, axis=1, keepdims=True)
    w *= far / np.where(norms > 0, norms, 1.0)
    g = truth(w)
    h = np.sqrt((w.astype(Long) ** 2).sum(axis=1)) ** Long(power)
    start = ValueFunction(grid, np.ones(len(grid)), np.ones(len(grid)), minimisers=np.zeros((len(grid), p)))
    spec = BoundSpec(case["tolerance"], case["most"])
    try:
        with jax.enable_x64(case["wide"]):
            f = certify(one, start, spec)
    except ValueError as error:
        if "no finite bound was proven" not in str(error):
            raise
        COUNTS["refused"] += 1
        return
    long_grid = grid.astype(Long)
    known = np.array([g[h <= b].min() if (h <= b).any() else Long(1) for b in long_grid])
    size = ULP * (1 + np.abs(g).max())
    for k in range(len(grid)):
        agree("boxes", f.lower[k], known[k] + size, "lower")
    norms = np.sqrt((f.minimisers.astype(Long) ** 2).sum(axis=1))
    outside = (norms ** Long(power) > long_grid * (1 - Long(2.0) ** -48) * (1 + ULP)) & (norms > 0)
    agree("boxes", int(outside.sum()), 0, "points outside their balls")
    reached = truth(f.minimisers)
    agree("boxes", float((reached - size - f.upper.astype(Long)).max()), 0.0, "upper")
    if f.slope is not None:
        length = np.sqrt((w.astype(Long) ** 2).sum(axis=1))
        agree("boxes", float((1 - g - size - Long(f.slope) * length).max()), 0.0, "slope")
    if f.margin is not None:
        outputs = family.truth(w.astype(Long), one.x.astype(Long)) * one.c[:, 0]
        agree("boxes", float(outputs.max() / Long(one.tau) * (1 - ULP)), f.margin, "margin")
    lam = case["multiplier"] * min(1.0, radius**-2.0 if radius > 1e-100 else 1.0)
    if f.lagrangian is not None and lam > 0:
        with jax.enable_x64(case["wide"]):
            bound = f.lagrangian(lam)
        least = (g + Long(lam) * h).min()
        agree("boxes", bound, least + size + ULP * Long(lam) * Long(radius) ** 2, "Q")
    if case["seed"] % 4 == 0:
        above = np.maximum(f.lower, known.astype(np.float64) + 1e-9 * (1 + float(np.abs(g).max())))
        above = np.minimum.accumulate(above)
        if (above.astype(Long) > known + size).any():
            forged = dataclasses.replace(
                f, lower=above, upper=np.maximum.accumulate(np.maximum(f.upper, above)[::-1])[::-1]
            )
            agree("boxes", verify_boxes(one, forged, effort=1).holds, False, "the checker holds a false claim")


# --- Delta ------------------------------------------------------------------------------------------------------------


def check_deltas(case: dict[str, Any]) -> None:
    """Combinations of points behind Delta, and the verdicts with them, against values in extended precision."""
    rng, family = np.random.default_rng(case["seed"]), BRANCHES["relu"]
    one = _pool("relu", case["scale"], case["number"])._replace(radius=case["radius"], power=case["power"])
    if not -250 < one.power * math.log10(one.radius) < 250:
        COUNTS["refused"] += 1
        return
    kappa = closed_forms.kappa_relu_chain(one.x, one.c[:, 0], tau=one.tau, widths=(1,))
    f = closed_forms.homogeneous_value_function(
        kappa, degree=2, power=one.power, radius=one.radius, budgets=one.grid(case["points"])
    )
    k = int(rng.integers(1, 4))
    points = rng.standard_normal((k, 2))
    points *= (
        one.radius * rng.choice([0.0, 0.5, 1.0, 1 + 1e-13], (k, 1)) / np.linalg.norm(points, axis=1, keepdims=True)
    )
    found = deltas.combination(one, f, points, rng.random(k) + 0.01)
    exact = [[Fraction(v) for v in row] for row in found.points.tolist()]
    for row in exact:
        agree("deltas", sum(v * v for v in row), Fraction(one.radius) ** 2, "a point outside W")
    out = family.truth(found.points.astype(Long), one.x.astype(Long))
    g = 1 - (out @ one.c[:, 0].astype(Long)) / (len(one.c) * Long(one.tau))
    a = found.weights.astype(Long) / found.weights.astype(Long).sum()
    size = 1e-16 * (1 + float(np.abs(g).max()))
    agree("deltas", float((a * g).sum()) - size, found.convexified, "convexified")
    middle = (a[:, None] * found.points.astype(Long)).sum(axis=0)
    cost = np.sqrt((middle**2).sum()) ** Long(one.power)
    rho = _best_units(one.x, one.c[:, 0])
    value = 1 - rho / 2 / Long(one.tau) * (cost ** (2 / Long(one.power)) if cost > 0 else Long(0))
    agree("deltas", found.restricted, float(value) + size, "restricted")
    for row in verdicts(f, float(one.largest_budget) * 0.4, [1, 7], delta_lower=found):
        agree("deltas", row.verdict == "refuted", False, "the theorem is refuted")


# --- Theorem 2 --------------------------------------------------------------------------------------------------------

SHAPES = ((3, 1, 1, (2,)), (4, 2, 6, (2, 3)), (3, 2, 5, (1,)))  # d_0, d_H, n, widths


@st.composite
def linear(draw: Any) -> dict[str, Any]:
    return {
        "seed": draw(seeds),
        "shape": draw(st.integers(0, len(SHAPES) - 1)),
        "kinds": draw(st.lists(st.integers(0, 5), max_size=2)),
        "rows": draw(st.sampled_from([0, 20, 60])),
        "scale_x": 2.0 ** draw(st.integers(-450, 450)),
        "scale_y": 2.0 ** draw(st.integers(-250, 250)),
        "gamma": draw(st.sampled_from([0.0, 1e-9, 0.3, 1.0, 10.0])),
        "zero": draw(st.integers(0, 9)) == 0,
        "dtype": draw(st.sampled_from(["float32", "float64", "float64"])),
        "door": draw(st.sampled_from(["solve", "solve", "path", "jit", "vmap", "columns", "forged"])),
        "wide": draw(st.booleans()),
    }


def _hard(rng: np.random.Generator, d_0: int, n: int, kinds: list[int]) -> np.ndarray:
    x = rng.normal(size=(d_0, n))
    for kind in kinds:
        a, b, c = rng.choice(d_0, 3, replace=False)
        x = spoiled(x, kind, a, b, c, rng)
    return x


@functools.cache
def _compiled(door: str, widths: tuple[int, ...]) -> Any:
    def one(x: Any, y: Any, gamma: Any) -> Any:
        return spectral.solve(x, y, gamma=gamma, widths=widths)

    return jax.jit(one if door == "jit" else jax.vmap(one, in_axes=(None, None, 0)))


def check_linear(case: dict[str, Any]) -> None:
    """Theorem 2 by every door, and the independent proof, against 400 digits."""
    rng = np.random.default_rng(case["seed"])
    d_0, d_H, n, widths = SHAPES[case["shape"]]
    narrow = case["dtype"] == "float32"
    a, b = (2.0 ** round(math.log2(case[k]) / (8 if narrow else 1)) for k in ("scale_x", "scale_y"))
    x = _hard(rng, d_0, n, case["kinds"]) * 2.0 ** rng.integers(-case["rows"], case["rows"] + 1, (d_0, 1)) * a
    y = b * rng.normal(size=(d_H, n)) * (0.0 if case["zero"] else 1.0)
    with np.errstate(over="ignore"):
        x, y = x.astype(case["dtype"]), y.astype(case["dtype"])
    door, gamma = case["door"], float(b * case["gamma"])
    traced = door in ("jit", "vmap")
    if traced and not case["wide"]:  # JAX rounds what it is given to 32 bits: the problem is that of these
        with np.errstate(over="ignore", under="ignore"):
            x, y, gamma = x.astype(np.float32), y.astype(np.float32), float(np.float32(gamma))
    if not (np.isfinite(x).all() and np.isfinite(y).all() and math.isfinite(gamma)):
        COUNTS["refused"] += 1
        return
    try:
        with jax.enable_x64(case["wide"]):
            if door == "path":
                path = spectral.regularisation_path(x, y, gammas=np.array([0.0, gamma]), widths=widths)
                found = jax.tree.map(lambda e: e[1], path)
            elif door == "jit":
                found = _compiled(door, widths)(x, y, gamma)
            elif door == "vmap":
                found = jax.tree.map(lambda e: e[1], _compiled(door, widths)(x, y, np.array([0.5 * gamma, gamma])))
            elif door == "columns":
                found = solve_columns(in_blocks(x, y, 4), gamma=gamma, widths=widths, tolerance=0.99).solution
            else:
                found = spectral.solve(x, y, gamma=gamma, widths=widths)
    except SpectralError:
        COUNTS["refused"] += 1
        return
    x, y = x.astype(np.float64), y.astype(np.float64)
    optimum = rational_optimum(x, y, gamma, min(*widths, d_0, d_H, n))
    half = sum((Decimal(float(v)) ** 2 for v in y.ravel()), Decimal(0)) / 2
    gap = float(found.relative_gap)
    if math.isfinite(gap):
        slack = Decimal("2e-14") * half
        if traced and not case["wide"]:  # the values are rounded outward to 32 bits
            slack += Decimal("2e-7") * abs(Decimal(float(found.primal)))
        agree("linear", Decimal(float(found.dual)), optimum + slack, f"dual by {door}")
        agree("linear", optimum - slack, Decimal(float(found.primal)), f"primal by {door}")
        agree("linear", Decimal(float(found.primal)) - optimum, Decimal(gap) * half + slack, f"relative gap by {door}")
    else:
        COUNTS["refused"] += 1
    if traced:
        return
    weights, coefficients = found.weights, np.asarray(found.dual_variable.coefficients)
    if door == "forged":
        weights = [w * (1 + 0.1 * rng.normal(size=w.shape)) for w in weights]
        coefficients = coefficients * (1 + 10.0 ** rng.uniform(-12, 2) * rng.normal(size=coefficients.shape))
    try:
        again = spectral.verify([(x, y)], gamma=gamma, widths=widths, weights=weights, coefficients=coefficients)
    except VerificationError:
        COUNTS["refused"] += 1
        return
    agree("linear", Decimal(again.lower), optimum, "verify, lower")
    agree("linear", optimum, Decimal(again.upper), "verify, upper")


FAMILIES: dict[str, tuple[Any, Callable[[dict[str, Any]], None], float]] = {
    "choices": (choices(), check_choices, 0.35),
    "homogeneous": (homogeneous(), check_homogeneous, 0.35),
    "linear": (linear(), check_linear, 0.2),
    "deltas": (boxes(("relu",), 2), check_deltas, 0.05),
    "boxes": (boxes(tuple(BRANCHES), 1), check_boxes, 0.05),
}


def attack(family: str, instances: int, *, seed: int, strategy: Any = None, report: Any = None) -> None:
    """Checks so many instances of a family.  Raises AssertionError with the simplest instance that fails."""
    drawn, check, _ = FAMILIES[family]
    done = [0]

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=instances,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @hypothesis.given(drawn if strategy is None else strategy)
    def one(case: dict[str, Any]) -> None:
        done[0] += 1
        if report is not None:
            report(done[0])
        check(case)

    one()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--instances", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    given = parser.parse_args()
    shares = {name: FAMILIES[name][2] for name in given.families}
    failed = 0
    print(f"{'family':<14}{'instances':>10}{'claims':>10}{'seconds':>9}  contradicted", flush=True)
    for name, share in shares.items():
        wanted, start = max(1, round(given.instances * share / sum(shares.values()))), time.perf_counter()
        told = [start]

        def report(done: int, name: str = name, wanted: int = wanted, told: list[float] = told) -> None:
            if time.perf_counter() - told[0] > 10:
                told[0] = time.perf_counter()
                print(f"... {name}: {done:,} of {wanted:,}", file=sys.stderr, flush=True)

        reason = "no"
        try:
            attack(name, wanted, seed=given.seed, report=report)
        except Exception as error:
            failed, reason = failed + 1, f"YES: {error}\n{''.join(getattr(error, '__notes__', []))}"
        spent = time.perf_counter() - start
        print(f"{name:<14}{wanted:>10,}{COUNTS[name]:>10,}{spent:>9.0f}  {reason}", flush=True)
    print(f"refused or without a certificate: {COUNTS['refused']:,}; contradicted: {failed} of {len(shares)} families")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
