"""`Delta = sup_w f^(w) - f~(w)` of a branch: bounds from explicit convex combinations.

`f^(w) = v(h(w))`, and `f~` is the convex envelope of g over W.  For any points w_k of W and weights a_k,
`f~(sum a_k w_k) <= sum a_k g(w_k)`: a concrete combination gives a lower bound on Delta, and is returned, so that
anyone can check it (`recheck`).  From above, `Delta <= v(least budget) - v(largest budget)`, since f^ is at most the
one and f~ at least the other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy.optimize import linprog
from scipy.spatial import ConvexHull, QhullError

from dualgap_jax.duality.branch_and_bound import upper_values
from dualgap_jax.duality.gap import Status, ValueFunction, envelope, hull
from dualgap_jax.duality.problem import Problem, values_at

_LP_PARAMETERS = 64  # with more, points in general position have no combination at a given target
_EPS = float(np.finfo(np.float64).eps)


class Combination(NamedTuple):
    """A convex combination, and the lower bound on Delta that it proves.

    Attributes:
      points: `[k, p]`, in W.
      weights: `[k]`, non-negative with sum 1.
      middle: `[p]`, the combination.
      restricted: a lower bound on `f^(middle)`.
      convexified: `sum a_k g(w_k)`, an upper bound on `f~(middle)`.
      delta: their difference, or 0 if it is negative (Delta is not: at a minimiser of g over W both agree).
      status: 'certified' if the bound on f^ is proven.
    """

    points: Float64[np.ndarray, "k p"]
    weights: Float64[np.ndarray, " k"]
    middle: Float64[np.ndarray, " p"]
    restricted: float
    convexified: float
    delta: float
    status: Status


def value_below(function: ValueFunction, budget: float, norm: float = math.inf) -> float:
    """A lower bound on v at any budget: v does not rise, so that of the next grid point serves.

    Args:
      function: the value function.
      budget: b.
      norm: of the weights with that budget; near 0 `function.slope` gives a better bound.
    """
    step = function.budgets[1] - function.budgets[0]
    # An estimate need not be on the safe side of a grid point that is missed by rounding.
    slack = 1e-9 * step if function.status == "estimated" else 4 * _EPS * abs(budget)
    index = int(np.searchsorted(function.budgets, budget - slack))
    below = float(function.lower[min(index, len(function.lower) - 1)])
    if function.slope is None or not math.isfinite(norm):
        return below
    return max(below, float(function.lower[0]) - function.slope * norm)


def combination(problem: Problem, function: ValueFunction, points: np.ndarray, weights: np.ndarray) -> Combination:
    """The bound that given points and weights prove.

    Args:
      problem: the one-branch problem.
      function: its value function, for the bound on f^.
      points: `[k, p]` in W.
      weights: `[k]`, scaled here to sum 1.

    Raises:
      ValueError: for points outside W, or weights that are negative or all 0.
    """
    points, weights = np.asarray(points, np.float64), np.asarray(weights, np.float64)
    if points.ndim != 2 or weights.shape != points.shape[:1] or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"need points [k, p] and weights [k] >= 0, got shapes {points.shape} and {weights.shape}.")
    longest = float(np.linalg.norm(points, axis=1).max())
    if longest > problem.radius * (1 + 1e-12):
        raise ValueError(f"a point has norm {longest:.6g}, outside W, the ball of radius {problem.radius:.6g}.")
    weights = weights / weights.sum()
    middle = weights @ points
    convexified = float(weights @ upper_values(problem, points))
    convexified += 16 * len(points) * _EPS * (1 + abs(convexified))
    # The middle is known up to rounding; its h is taken a little larger, where v is smaller.
    norm = float(np.linalg.norm(middle)) * (1 + 1e-12) + 1e-14
    restricted = value_below(function, norm**problem.power, norm)
    delta = max(0.0, restricted - convexified)
    return Combination(points, weights, middle, restricted, convexified, delta, function.status)


def recheck(problem: Problem, function: ValueFunction, found: Combination) -> bool:
    """Whether the combination is sound and proves what it says."""
    again = combination(problem, function, found.points, found.weights)
    sound = np.allclose(again.middle, found.middle, rtol=0, atol=1e-12 * (1 + problem.radius))
    return bool(sound and again.delta >= found.delta - 1e-12)


def on_segment(problem: Problem, function: ValueFunction) -> Combination:
    """The best combination of the weights 0 and one minimiser `w_k`: `a w_k` has `h = a^power h(w_k)`.

    For homogeneous branches of degree L this is `kappa R^L (a - a^L)` at `a = L^(-1/(L-1))`, up to the grid.
    """
    if function.minimisers is None:
        raise ValueError("on_segment needs a value function with minimisers.")
    radii = function.budgets ** (1 / problem.power)
    best, pair = -np.inf, (0, 0)
    for k in {len(radii) - 1, *np.linspace(1, len(radii) - 1, min(64, len(radii) - 1)).astype(int).tolist()}:
        a = radii[: k + 1] / radii[k]
        gains = function.lower[: k + 1] - ((1 - a) * function.upper[0] + a * function.upper[k])
        if gains.max() > best:
            best, pair = float(gains.max()), (k, int(np.argmax(gains)))
    k, j = pair
    # A little less than the budget of index j, so that rounding does not lead to the next one.
    a = float(radii[j] / radii[k]) * (1 - 1e-9)
    points = np.stack([np.zeros(problem.size), function.minimisers[k]])
    return combination(problem, function, points, np.array([1 - a, a]))


def from_envelope(problem: Problem, function: ValueFunction) -> Combination:
    """The largest `v(b) - v**(b)`: the two minimisers whose budgets carry the envelope at b."""
    if function.minimisers is None:
        raise ValueError("from_envelope needs a value function with minimisers.")
    j = int(np.argmax(function.lower - envelope(function.upper)))
    vertices = hull(function.upper)
    right = int(np.clip(np.searchsorted(vertices, j), 1, len(vertices) - 1))
    p, q = int(vertices[right - 1]), int(vertices[right])
    a = (q - j) / (q - p)
    return combination(problem, function, function.minimisers[[p, q]], np.array([a, 1 - a]))


def at_target(problem: Problem, function: ValueFunction, cloud: np.ndarray, target: np.ndarray) -> Combination | None:
    """The best combination of the cloud's points at one target, by linear programming; None if it is outside the hull.

    Args:
      problem, function: see `combination`.
      cloud: `[k, p]` points of W.
      target: `[p]`.
    """
    values = values_at(problem, cloud)
    equations = np.concatenate([cloud.T, np.ones((1, len(cloud)))])
    result = linprog(values, A_eq=equations, b_eq=np.append(target, 1.0), bounds=(0, None), method="highs")
    if result.status != 0:
        return None
    used = result.x > 1e-12
    return combination(problem, function, cloud[used], result.x[used])


def by_hull(problem: Problem, function: ValueFunction, samples: np.ndarray) -> Combination | None:
    """The best combination at any of the sampled points, from the lower hull of the sampled epigraph (p <= 3).

    Exact for the sampled points: no combination of them gives more at one of them.  None if they are degenerate.

    Raises:
      ValueError: for more than 3 parameters.
    """
    if problem.size > 3:
        raise ValueError(f"the epigraph's hull is computed for up to 3 parameters, the branch has {problem.size}.")
    values = values_at(problem, samples)
    restricted = np.array([value_below(function, b) for b in problem.h(samples)])
    if problem.size == 1:
        order = np.argsort(samples[:, 0])
        samples, values, restricted = samples[order], values[order], restricted[order]
    try:
        faces = ConvexHull(np.column_stack([samples, values]))
    except QhullError:
        return None
    lower = faces.equations[:, -2] < -1e-12
    planes, simplices = faces.equations[lower], faces.simplices[lower]
    heights = -(samples @ planes[:, :-2].T + planes[:, -1]) / planes[:, -2]
    best = int(np.argmax(restricted - heights.max(axis=1)))
    simplex = samples[simplices[int(np.argmax(heights[best]))]]
    equations = np.concatenate([simplex.T, np.ones((1, len(simplex)))])
    weights = np.linalg.lstsq(equations, np.append(samples[best], 1.0), rcond=None)[0]
    return combination(problem, function, simplex, np.maximum(weights, 0.0))


def best_lower_bound(problem: Problem, function: ValueFunction, cloud: np.ndarray | None = None) -> Combination:
    """The best of all combinations known here.

    Args:
      problem, function: the branch.
      cloud: `[k, p]` further points of W with small g, for instance all ends of a search: with several minimisers (the
        symmetries of a network) their middle is often 0, which gives the largest Delta that there can be.
    """
    found = [on_segment(problem, function), from_envelope(problem, function)]
    if function.minimisers is not None and problem.size <= _LP_PARAMETERS:
        picked = function.minimisers[np.linspace(0, len(function.budgets) - 1, 33).astype(int)]
        points = picked if cloud is None else np.concatenate([picked, cloud])
        end = function.minimisers[-1]
        for target in [np.zeros(problem.size), *(a * end for a in (0.25, 0.5, 0.75))]:
            one = at_target(problem, function, points, target)
            found += [] if one is None else [one]
        if problem.size <= 3:
            one = by_hull(problem, function, points)
            found += [] if one is None else [one]
    return max(found, key=lambda c: c.delta)


def upper_bound(function: ValueFunction) -> float:
    """`v(least budget) - v(largest)` from the outer bounds: Delta is at most this (proven if the status is)."""
    return max(0.0, float(function.upper[0] - function.lower[-1]))
