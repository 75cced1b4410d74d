"""Problem (2) with the hinge as it is, where Assumption 1 fails: bounds on inf(P) for any number of branches.

Since `max(0, t) >= beta t` for every beta in [0, 1], it holds for all weights beta of the examples, lam >= 0, and
branches that meet the constraint that

    E max(0, 1 - y f / tau)  >=  E beta (1 - y f / tau)  >=  min_{w in W} { g_beta(w) + lam h(w) } - lam K,

where `g_beta(w) = E beta - E beta y f(w; .) / tau` is the g of a one-branch problem with other weights, so that the
engines of Theorem 1 prove the right side.  beta = 1 is the hinge without its maximum.  Good beta and lam are the
multipliers of the linear program over mixtures of the weights found so far, to which weights are added where
`g_beta + lam h` is small; how they were found is of no matter to the proof.  The bound does not depend on I: it is one
on the infimum over all mixtures of branches, and inf(P) comes down to it as I grows.  From above inf(P) is bounded by
the risk of a feasible point, with the ranges of the outputs rounded outward.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Array, Float64

from dualgap_jax import seeds
from dualgap_jax.duality.bounding.ranges import UnsupportedPrimitiveError, extension
from dualgap_jax.duality.checker.pairs import Unsupported
from dualgap_jax.duality.checker.ranges import Walker
from dualgap_jax.duality.checker.value_functions import verify_function
from dualgap_jax.duality.problem import ByProgram, Problem
from dualgap_jax.duality.search import SearchSpec, descent
from dualgap_jax.duality.theorem import Effort, value_function
from dualgap_jax.duality.units import as_counts
from dualgap_jax.duality.values import Status, ValueFunction, number
from dualgap_jax.duality.verdict import Instance, dual_lower

_EPS = float(np.finfo(np.float64).eps)
_SPARE = 2.0**-40  # of a bound, left to those who prove it again with other roundings
_ROUNDS = 12
_NEW = 4  # weights added in a round
_SAFE = 1e-12  # of a budget, left to roundings
_NEAR = 1e-9  # by what share weights may cost more than the budget to be scaled down in their place
_SLACK = 1e9  # of budgets, in units of the dearest weights: no mixture reaches it, and linprog takes no infinity


class HingeBounds(NamedTuple):
    """Bounds on inf(P) of problem (2) with the tau-hinge `max(0, 1 - y f / tau)`.

    Attributes:
      num_branches: I.
      budget: K.
      lower: a lower bound, the same for every I.
      upper: the risk of a feasible point, at most.
      lower_status, upper_status: whether they are proven.
      points: `[k, p]`, the distinct weights of the point; `counts [k]`, how many branches have each.
    """

    num_branches: int
    budget: float
    lower: float
    upper: float
    lower_status: Status
    upper_status: Status
    points: Float64[np.ndarray, "k p"]
    counts: tuple[int, ...]


class Clipped(NamedTuple):
    """What `clipped_hinge` found.

    Attributes:
      weights: `[n]`, beta.
      multiplier: lam.
      problem: the one-branch problem with these weights.
      function: its value function.
      rows: bounds, one a number of branches.
      reasons: of 'lower' and 'upper', why `verify_clipped` did not prove them again; "" where it did.
    """

    weights: Float64[np.ndarray, " n"]
    multiplier: float
    problem: Problem
    function: ValueFunction
    rows: list[HingeBounds]
    reasons: Mapping[str, str] = MappingProxyType({"lower": "", "upper": ""})


def weighted(problem: Problem, beta: Float64[np.ndarray, " n"]) -> Problem:
    """The one-branch problem of `g_beta`.

    Raises:
      ValueError: for weights outside [0, 1], or labels that are not -1 and +1 on one output.
    """
    if problem.c.shape[1] != 1 or not (np.abs(problem.c) == 1).all():
        raise ValueError("the hinge with its maximum is bounded for labels -1, +1 and one output alone.")
    beta = np.asarray(beta, np.float64)
    if beta.shape != (len(problem.c),) or not ((beta >= 0) & (beta <= 1)).all():
        raise ValueError(f"need one weight between 0 and 1 an example, got shape {beta.shape}.")
    # A few roundings less than the mean, which only lowers g.
    offset = math.fsum(beta.tolist()) / len(beta) * (1 - 4 * _EPS)
    return problem._replace(c=beta[:, None] * problem.c, offset=offset)


@functools.lru_cache(maxsize=8)
def _programs(key: ByProgram, steps: int) -> tuple[Any, Any]:
    """Jitted: outputs times labels `[k, n]` at weights `[k, p]`; and descent on `lam h - E beta y f / tau`."""
    problem = key.problem
    labels = jnp.asarray(problem.c[:, 0])

    def scores(w: Array) -> Array:
        return labels.astype(w.dtype) * problem.outputs(w)[:, 0]

    def cost(w: Array, beta: Array, lam: Array, power: Array) -> Array:
        return lam * jnp.sum(w * w) ** (power / 2) - jnp.mean(beta * scores(w)) / problem.tau

    move = jax.vmap(descent(cost, steps), in_axes=(0, None, None, None, None))
    return jax.jit(lambda w: jax.lax.map(scores, w, batch_size=64)), jax.jit(move)


class _Master(NamedTuple):
    value: float
    shares: np.ndarray
    beta: np.ndarray
    lam: float


def _master(scores: np.ndarray, costs: np.ndarray, budget: float, tau: float) -> _Master:
    """The best mixture of the weights found so far, by linear programming, and its multipliers."""
    k, n = scores.shape
    unit = max(float(np.abs(scores).max()) / tau, 1.0)
    share_of = float(costs.max()) or 1.0
    left = np.concatenate([-scores.T / tau / unit, -np.eye(n)], axis=1)
    rows, right = [left], [np.full(n, -1 / unit)]
    if math.isfinite(budget):
        rows.append(np.concatenate([costs / share_of, np.zeros(n)])[None])
        right.append(np.array([min(budget / share_of, _SLACK)]))
    found = scipy.optimize.linprog(
        np.concatenate([np.zeros(k), np.full(n, unit / n)]),
        A_ub=np.concatenate(rows), b_ub=np.concatenate(right), A_eq=np.concatenate([np.ones(k), np.zeros(n)])[None],
        b_eq=[1.0], bounds=(0, None), method="highs",
    )  # fmt: skip
    if found.status != 0:
        return _Master(1.0, np.eye(1, k)[0], np.ones(n), 0.0)
    beta = np.clip(-found.ineqlin.marginals[:n] * n / unit, 0.0, 1.0)
    lam = max(0.0, -float(found.ineqlin.marginals[n]) / share_of) if math.isfinite(budget) else 0.0
    return _Master(float(found.fun), found.x[:k], beta, lam)


def clipped_hinge(
    problem: Problem,
    budget: Any,
    num_branches: Sequence[int] | int,
    *,
    points: int = 257,
    effort: Effort = Effort(),
    seed: int = 0,
    cloud: Float64[np.ndarray, "k p"] | None = None,
) -> Clipped:
    """Bounds on inf(P) with the hinge as it is, whether Assumption 1 holds or not.

    Args:
      problem: the one-branch problem; labels -1, +1.
      budget: K; inf drops the constraint.
      num_branches: the values of I.
      points: of the grid of budgets on which the weighted problem is proven.
      effort: the route to the proof, and how hard to search.
      seed: of the searches.
      cloud: weights to begin with, for instance the minimisers of a value function.

    Returns:
      The weights beta and bounds for each number of branches; `lower_status` and `upper_status` are 'certified' where
      `verify_clipped` has proven the bounds again in this call.

    Raises:
      ValueError: for numbers out of range, or labels that are not -1 and +1.
    """
    counts, limit = as_counts(num_branches), number("budget K", budget, infinite=True)
    weighted(problem, np.ones(len(problem.c)))
    if limit < 0:
        raise ValueError(f"budget K={limit:.6g} is below the least h, 0: no feasible point.")
    w = np.zeros((1, problem.size)) if cloud is None else np.concatenate([np.zeros((1, problem.size)), cloud])
    w, scores, best = _mixture(problem, limit, w, effort.search, seed)
    w, scores = _affordable(problem, limit, w, scores)
    one = weighted(problem, best.beta)
    function = value_function(one, points, effort, seed=seed)
    # The program's multiplier is the best one for the weights found, that of the grid for the weighted problem.
    tried = [dual_lower([function], limit, [1], best.lam if math.isfinite(limit) else 0.0)]
    tried.append(Instance([function], limit).dual_lower([1]))
    dual = max(tried, key=lambda d: d.value)
    lower = max(0.0, float(dual.value) - _SPARE * (1 + abs(float(dual.value))))
    certain: Status = "certified" if function.status == "certified" or dual.value <= 0 else "estimated"
    rows = []
    for count in counts:
        chosen = _rounded(scores, problem.h(w), best.shares, count, limit, problem.tau)
        used, times = w[list(chosen)], tuple(chosen.values())
        upper, status = _upper(problem, used, times, limit)
        rows.append(HingeBounds(count, limit, lower, upper, certain, status, used, times))
    claimed = Clipped(best.beta, dual.multiplier, one, function, rows)
    reasons = verify_clipped(problem, claimed)
    for k, row in enumerate(rows):
        if reasons["lower"] and row.lower > 0:
            row = row._replace(lower_status="estimated")
        rows[k] = row._replace(upper_status="estimated") if reasons["upper"] else row
    return claimed._replace(rows=rows, reasons=reasons)


def _mixture(
    problem: Problem, budget: float, w: np.ndarray, spec: SearchSpec, seed: int
) -> tuple[np.ndarray, np.ndarray, _Master]:
    """Weights, their outputs times labels, and the best mixture of them, after some rounds."""
    rng = seeds.generator(seed)
    with jax.enable_x64(True):
        outputs, move = _programs(ByProgram(problem), spec.steps)
        top = float(problem.radii(np.array([problem.largest_budget]))[0])
        scores = np.asarray(outputs(jnp.asarray(w)))
        best = _master(scores, problem.h(w), budget, problem.tau)
        for _ in range(_ROUNDS):
            starts = rng.standard_normal((spec.starts, problem.size))
            starts *= top * rng.random((spec.starts, 1)) / np.linalg.norm(starts, axis=1, keepdims=True)
            starts = np.concatenate([starts, w[np.argsort(-best.shares)[:8]]])[: spec.starts]
            ends, costs = move(jnp.asarray(starts), top, jnp.asarray(best.beta), best.lam, float(problem.power))
            ends, costs = np.asarray(ends), np.asarray(costs)
            now = best.lam * problem.h(w) - (best.beta * scores).mean(axis=1) / problem.tau
            order = [k for k in np.argsort(costs)[: 4 * _NEW] if costs[k] < now.min() - 1e-9 * (1 + abs(now.min()))]
            if not order:
                break
            new = ends[order[:_NEW]]
            w, scores = np.concatenate([w, new]), np.concatenate([scores, np.asarray(outputs(jnp.asarray(new)))])
            best = _master(scores, problem.h(w), budget, problem.tau)
    return w, scores, best


def _affordable(problem: Problem, budget: float, w: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights, and those of them that cost more than the budget scaled down to it, for few branches.

    Those that cost no more than a rounding or so above it are replaced, and keep their shares.
    """
    costs = problem.h(w)
    dear = costs > budget * (1 - _SAFE)  # what costs all of the budget has no room for roundings
    if budget == 0 or not dear.any():
        return w, scores
    scaled = w[dear] * ((budget / costs[dear]) * (1 - 2 * _SAFE))[:, None] ** (1 / problem.power)
    with jax.enable_x64(True):
        more = np.asarray(_programs(ByProgram(problem), 1)[0](jnp.asarray(scaled)))
    near = costs <= budget * (1 + _NEAR)
    few, cheap = near[dear], np.flatnonzero(dear & near)
    w, scores = w.copy(), scores.copy()
    w[cheap], scores[cheap] = scaled[few], more[few]
    return np.concatenate([w, scaled[~few]]), np.concatenate([scores, more[~few]])


def _rounded(
    scores: np.ndarray, costs: np.ndarray, shares: np.ndarray, count: int, budget: float, tau: float
) -> Counter[int]:
    """How many of I branches have which weights: the shares rounded down, the rest at weights 0, then exchanges."""
    shares = np.pad(shares, (0, len(scores) - len(shares)))
    chosen = np.floor(np.maximum(shares, 0) * count * (1 - 1e-12)).astype(np.int64)
    room = count * budget * (1 - _SAFE)
    while chosen.sum() > count or (chosen @ costs) > room:
        chosen[int(np.argmax(chosen * costs))] -= 1
    chosen[0] += count - chosen.sum()
    cheap = np.flatnonzero(costs <= budget)
    cheap = cheap[np.argsort(np.maximum(0, 1 - scores[cheap] / tau).mean(axis=1))[:24]]
    good = np.argsort(np.maximum(0, 1 - scores / tau).mean(axis=1))[:24]
    some = np.unique(np.concatenate([[0], np.flatnonzero(shares > 1e-9), good, cheap]))
    total, spent = chosen @ scores, float(chosen @ costs)
    for _ in range(200):
        risk = np.maximum(0, 1 - total / count / tau).mean()
        best, pair = risk, None
        for k in np.flatnonzero(chosen):
            moved = total - scores[k] + scores[some]
            risks = np.maximum(0, 1 - moved / count / tau).mean(axis=1)
            risks = np.where(spent - costs[k] + costs[some] <= room, risks, np.inf)
            j = int(np.argmin(risks))
            if risks[j] < best:
                best, pair = float(risks[j]), (int(k), int(some[j]))
        if pair is None or best > risk - 1e-12:
            break
        chosen[pair[0]] -= 1
        chosen[pair[1]] += 1
        total, spent = total - scores[pair[0]] + scores[pair[1]], spent - costs[pair[0]] + costs[pair[1]]
    return Counter({int(k): int(chosen[k]) for k in np.flatnonzero(chosen)})


def _upper(problem: Problem, points: np.ndarray, counts: Sequence[int], budget: float) -> tuple[float, Status]:
    """An upper bound on the risk of a feasible point, and whether it is proven."""
    if not feasible(problem, points, counts, budget):
        raise ValueError("the point costs more than the budget, or lies outside W.")
    try:
        with jax.enable_x64(True):
            over = extension(problem.outputs, jnp.zeros(problem.size, jnp.float64))
            ranges = jax.jit(lambda w: jax.lax.map(lambda one: over(one, one)[:2], w))(jnp.asarray(points))
        low, high = (np.asarray(end)[:, :, 0] for end in ranges)
        status: Status = "certified"
    except UnsupportedPrimitiveError:
        with jax.enable_x64(True):
            low = high = np.asarray(jax.lax.map(problem.outputs, jnp.asarray(points)))[:, :, 0]
        status = "estimated"
    found = mixture_risk(problem, low, high, counts)
    if not math.isfinite(found):
        raise ValueError("the outputs of the branch have no finite range at a point of W.")
    return found + _SPARE * (1 + found), status


def mixture_risk(problem: Problem, low: np.ndarray, high: np.ndarray, counts: Sequence[int]) -> float:
    """At most `E max(0, 1 - y f / tau)` of the mean over branches whose outputs `[k, n]` lie in the ranges."""
    shares, labels = np.asarray(counts, np.float64)[:, None] / sum(counts), problem.c[:, 0]
    least = np.where(labels > 0, low, -high)
    margins = (shares * least).sum(axis=0)
    margins -= (len(least) + 4) * _EPS * (shares * np.abs(least)).sum(axis=0)
    terms = np.maximum(0.0, 1 - margins / problem.tau) + 4 * _EPS * (1 + np.abs(margins) / problem.tau)
    found = math.fsum(terms.tolist()) / len(terms) * (1 + 4 * _EPS)
    return found if not math.isnan(found) else math.inf


def feasible(problem: Problem, points: np.ndarray, counts: Sequence[int], budget: float) -> bool:
    """Whether weights in W, so often each, have a mean h of at most the budget; on the safe side of rounding."""
    squares = [sum((Fraction(v) ** 2 for v in row), Fraction(0)) for row in points.tolist()]
    if any(s > Fraction(problem.radius) ** 2 for s in squares) or min(counts) < 1:
        return False
    if budget == math.inf:
        return True
    if problem.power == 2:
        return sum(n * s for n, s in zip(counts, squares, strict=True)) <= sum(counts) * Fraction(budget)
    spent = math.fsum(n * math.sqrt(s) ** problem.power for n, s in zip(counts, squares, strict=True))
    return spent * (1 + 1e-13) <= sum(counts) * budget


def verify_clipped(problem: Problem, found: Clipped) -> Mapping[str, str]:
    """Proves the certified bounds again: 'lower' and 'upper' with the reason why not, "" where all were proven.

    Raises:
      ValueError: for weights of the examples outside [0, 1].
    """
    one = weighted(problem, found.weights)
    reasons = {}
    for name, reason in (("lower", lambda: _not_below(one, found)), ("upper", lambda: _not_above(problem, found))):
        try:
            with np.errstate(all="ignore"):
                reasons[name] = reason()
        except Unsupported as error:
            reasons[name] = str(error)
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            reasons[name] = f"the bounds are not ones that can be checked: {error!r:.200}"
    return reasons


def _not_below(one: Problem, found: Clipped) -> str:
    """Why the lower bounds were not proven from those on the weighted problem, or ""."""
    lowers = [row for row in found.rows if row.lower_status == "certified" and not row.lower <= 0]
    if not lowers:
        return ""
    again = verify_function(one, found.function, multipliers=[found.multiplier])
    if not again.holds:
        return again.reason
    cost = Fraction(found.multiplier) * max(Fraction(row.budget) for row in lowers) if found.multiplier else Fraction(0)
    bound = Fraction(again.duals.get(found.multiplier, 0.0)) - cost
    if found.multiplier < 0 or any(Fraction(row.lower) > bound for row in lowers):
        return "the bound does not follow from that on the weighted problem"
    return ""


def _not_above(problem: Problem, found: Clipped) -> str:
    """Why the upper bounds were not proven from their points, or ""."""
    walker = Walker(problem)
    for row in found.rows:
        if row.upper_status != "certified":
            continue
        name = f"I = {row.num_branches:,}"
        if [int(count) for count in row.counts] != list(row.counts) or sum(row.counts) != row.num_branches:
            return f"{name}: the counts {row.counts} are not those of so many branches"
        if not feasible(problem, row.points, row.counts, row.budget):
            return f"{name}: the point is not feasible"
        low, high = walker.outputs(row.points)
        if not mixture_risk(problem, low[:, :, 0], high[:, :, 0], row.counts) <= row.upper:
            return f"{name}: the risk of the point is larger than claimed"
    return ""
