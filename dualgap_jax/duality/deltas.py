"""`Delta = sup_w f^(w) - f~(w)` of a branch: bounds from explicit convex combinations.

`f^(w) = v(h(w))`, and `f~` is the convex envelope of g over W.  For any points w_k of W and weights a_k,
`f~(sum a_k w_k) <= sum a_k g(w_k)`: a concrete combination gives a lower bound on Delta, and is returned, so that
anyone can check it (`checker.gap`).  From above, `Delta <= v(least budget) - v(largest budget)`, since f^ is at most
the one and f~ at least the other (`ValueFunction.largest_delta`).
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import scipy
from jaxtyping import Float64

from dualgap_jax.convexity import lower_hull
from dualgap_jax.duality.bounding.rules import UnsupportedPrimitiveError
from dualgap_jax.duality.branch_and_bound import point_values, upper_values
from dualgap_jax.duality.constrained import AnyProblem, ConstrainedProblem
from dualgap_jax.duality.envelope import envelope
from dualgap_jax.duality.problem import Problem, above, subject_of, values_at
from dualgap_jax.duality.values import Provable, ValueFunction, proven
from dualgap_jax.identity import arrays_digest

_LP_PARAMETERS = 64  # with more, points in general position have no combination at a given target


@dataclasses.dataclass(frozen=True, eq=False)
class Combination(Provable):
    """A convex combination, and the lower bound on Delta that it proves.

    Attributes:
      points: `[k, p]`, in W.
      weights: `[k]`, non-negative; their shares of their sum count.
      values: `[k]`, upper bounds on g at the points.
      middle: `[p]`, the combination, rounded.
      restricted: a lower bound on `f^(middle)`.
      index: of the grid point that it is the value of; None if it comes from the slope at 0.
      convexified: `sum a_k g(w_k)`, an upper bound on `f~(middle)`.
      delta: their difference, or 0 if it is negative (Delta is not: at a minimiser of g over W both agree).
    """

    points: Float64[np.ndarray, "k p"]
    weights: Float64[np.ndarray, " k"]
    values: Float64[np.ndarray, " k"]
    middle: Float64[np.ndarray, " p"]
    restricted: float
    index: int | None
    convexified: float
    delta: float


def _mark(function: ValueFunction) -> str:
    """The value function that a combination belongs to, by its numbers and what its proof speaks of."""
    return f"{function.subject}/{arrays_digest(function.budgets, function.lower, function.upper)}"


def belongs(found: Combination, function: ValueFunction) -> bool:
    """Whether a combination was made with this value function, and proven."""
    return found.subject is not None and found.subject == _mark(function)


def value_below(function: ValueFunction, budget: float, norm: float = math.inf) -> float:
    """A lower bound on v at any budget: v does not rise, so that of the next grid point serves.

    Args:
      function: the value function.
      budget: b.
      norm: of the weights with that budget; near 0 `function.slope` gives a better bound.
    """
    return _value_below(function, budget, norm)[0]


def _value_below(function: ValueFunction, budget: float, norm: float) -> tuple[float, int | None]:
    step = function.budgets[1] - function.budgets[0]
    # An estimate need not be on the safe side of a grid point that is missed by rounding.
    slack = 1e-9 * step if function.status == "estimated" else 0.0
    index = min(int(np.searchsorted(function.budgets, budget - slack)), len(function.lower) - 1)
    below = float(function.lower[index])
    if function.slope is None or not math.isfinite(norm):
        return below, index
    sloping = math.nextafter(float(function.lower[0]) - math.nextafter(function.slope * norm, math.inf), -math.inf)
    return (sloping, None) if sloping > below else (below, index)


def _values(problem: AnyProblem, function: ValueFunction, points: np.ndarray) -> tuple[np.ndarray, bool]:
    """Upper bounds on g at points, and whether they are proven."""
    if function.status == "certified" and function.subject == subject_of(problem):
        try:
            return np.asarray(point_values(problem.one, points)), True
        except UnsupportedPrimitiveError:
            pass
    return upper_values(problem.one, points), False


def combination(problem: AnyProblem, function: ValueFunction, points: np.ndarray, weights: np.ndarray) -> Combination:
    """The bound that given points and weights prove.

    It is certified when the value function is, for this very problem, and the values at the points are proven: the
    solver's own word, which `theorem1` has the checker confirm.

    Args:
      problem: the one-branch problem.
      function: its value function, for the bound on f^.
      points: `[k, p]` in W.
      weights: `[k]`; their shares of their sum count.

    Raises:
      ValueError: for points outside W, weights that are negative, not finite or all 0, a value function whose budgets
        are not those of the problem, or a g that is not finite at a point.
    """
    points, weights = np.asarray(points, np.float64), np.asarray(weights, np.float64)
    if (
        points.ndim != 2
        or weights.shape != points.shape[:1]
        or not (weights >= 0).all()
        or not 0 < weights.sum() < math.inf
    ):
        raise ValueError(f"need points [k, p] and weights [k] >= 0, got shapes {points.shape} and {weights.shape}.")
    problem.check_budgets(function.budgets)
    if not np.isfinite(points).all():
        raise ValueError("the points of a combination must be finite; one has a coordinate that is not.")
    points = problem.inside(points)
    values, certain = _values(problem, function, points)
    if not np.isfinite(values).all():
        raise ValueError("g has no finite value at a point of the combination; leave the point out.")
    weights = weights / weights.sum()
    exact = [Fraction(a) for a in weights.tolist()]
    whole = sum(exact)
    convexified = above(
        sum((a * Fraction(v) for a, v in zip(exact, values.tolist(), strict=True)), Fraction(0)) / whole
    )
    columns = [[Fraction(x) for x in column] for column in points.T.tolist()]
    middle = [sum((a * x for a, x in zip(exact, column, strict=True)), Fraction(0)) / whole for column in columns]
    # Its h is taken a little larger, where v is smaller.
    restricted, index = _value_below(function, *problem.cost_above(middle))
    delta = max(0.0, math.nextafter(restricted - convexified, -math.inf))
    rounded = np.array([float(x) for x in middle])
    made = Combination(points, weights, values, rounded, restricted, index, convexified, delta)
    return proven(made, _mark(function)) if certain else made


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


def from_envelope(problem: AnyProblem, function: ValueFunction) -> Combination:
    """The largest `v(b) - v**(b)`: the two minimisers whose budgets carry the envelope at b."""
    if function.minimisers is None:
        raise ValueError("from_envelope needs a value function with minimisers.")
    j = int(np.argmax(function.lower - envelope(function.upper)))
    vertices = lower_hull(np.arange(len(function.upper)), function.upper)
    right = int(np.clip(np.searchsorted(vertices, j), 1, len(vertices) - 1))
    p, q = int(vertices[right - 1]), int(vertices[right])
    a = (q - j) / (q - p)
    return combination(problem, function, function.minimisers[[p, q]], np.array([a, 1 - a]))


def at_target(
    problem: AnyProblem, function: ValueFunction, cloud: np.ndarray, target: np.ndarray
) -> Combination | None:
    """The best combination of the cloud's points at one target, by linear programming; None if it is outside the hull.

    Args:
      problem, function: see `combination`.
      cloud: `[k, p]` points of W.
      target: `[p]`.
    """
    values = values_at(problem.one, cloud)
    equations = np.concatenate([cloud.T, np.ones((1, len(cloud)))])
    result = scipy.optimize.linprog(
        values, A_eq=equations, b_eq=np.append(target, 1.0), bounds=(0, None), method="highs"
    )
    if result.status != 0:
        return None
    used = result.x > 1e-12
    return combination(problem, function, cloud[used], result.x[used])


def by_hull(problem: AnyProblem, function: ValueFunction, samples: np.ndarray) -> Combination | None:
    """The best combination at any of the sampled points, from the lower hull of the sampled epigraph (p <= 3).

    Exact for the sampled points: no combination of them gives more at one of them.  None if they are degenerate.

    Raises:
      ValueError: for more than 3 parameters.
    """
    if problem.size > 3:
        raise ValueError(f"the epigraph's hull is computed for up to 3 parameters, the branch has {problem.size}.")
    values = values_at(problem.one, samples)
    restricted = np.array([value_below(function, b) for b in problem.h(samples)])
    if problem.size == 1:
        order = np.argsort(samples[:, 0])
        samples, values, restricted = samples[order], values[order], restricted[order]
    try:
        faces = scipy.spatial.ConvexHull(np.column_stack([samples, values]))
    except scipy.spatial.QhullError:
        return None
    lower = faces.equations[:, -2] < -1e-12
    planes, simplices = faces.equations[lower], faces.simplices[lower]
    heights = -(samples @ planes[:, :-2].T + planes[:, -1]) / planes[:, -2]
    best = int(np.argmax(restricted - heights.max(axis=1)))
    simplex = samples[simplices[int(np.argmax(heights[best]))]]
    equations = np.concatenate([simplex.T, np.ones((1, len(simplex)))])
    weights = np.linalg.lstsq(equations, np.append(samples[best], 1.0), rcond=None)[0]
    return combination(problem, function, simplex, np.maximum(weights, 0.0))


def best_lower_bound(problem: AnyProblem, function: ValueFunction, cloud: np.ndarray | None = None) -> Combination:
    """The best of all combinations known here.

    Where it is certified, that is the solver's own word, which `theorem1` has the checker confirm.

    Args:
      problem, function: the branch.
      cloud: `[k, p]` further points of W with small g, for instance all ends of a search: with several minimisers (the
        symmetries of a network) their middle is often 0, which gives the largest Delta that there can be.
    """
    found = [] if isinstance(problem, ConstrainedProblem) else [on_segment(problem, function)]
    found.append(from_envelope(problem, function))
    if function.minimisers is not None and problem.size <= _LP_PARAMETERS:
        picked = function.minimisers[np.linspace(0, len(function.budgets) - 1, 33).astype(int)]
        points = picked if cloud is None else np.concatenate([picked, cloud])
        start, end = function.minimisers[0], function.minimisers[-1]
        for target in [start + a * (end - start) for a in (0.0, 0.25, 0.5, 0.75)]:
            one = at_target(problem, function, points, target)
            found += [] if one is None else [one]
        if problem.size <= 3:
            one = by_hull(problem, function, points)
            found += [] if one is None else [one]
    return max(found, key=lambda c: c.delta)
