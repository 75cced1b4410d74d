"""Lower bounds on F* from dual vectors: weak duality over measures of branches.

For any alpha `[n, out]`, multiplier lam >= 0 and `phi(w) = (1/n) sum_j <alpha_j, f(w; x_j)> + lam h(w)`,

    F* >= -(1/n) sum_j l_j*(alpha_j) + min over W of phi - lam K        (with a penalty: lam is that, and no lam K)

by Fenchel's inequality at `z_j = integral of f(w; x_j)`.  So a proven lower bound on a one-branch problem is all that
is needed.  For a branch that is homogeneous of degree L over a ball of radius R it follows from one number, a bound
`kappa >= max over ||w|| <= 1 of -(1/n) sum <alpha_j, f(w; x_j)>`: `min phi` is at least the minimum of
`lam s^q - kappa s^L` over s in [0, R].  Since kappa is homogeneous in alpha, the best multiple of alpha is found by the
way; for L = q without a ball only multiples with `kappa <= lam` give a bound at all.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy

from dualgap_jax import seeds
from dualgap_jax.certify.bound import Bound, Pieces
from dualgap_jax.certify.engines import CEILINGS, EXACT, Ceiling, ceiling, relaxed
from dualgap_jax.certify.problem import RiskProblem, given
from dualgap_jax.certify.search import BranchSearch
from dualgap_jax.certify.verify import verify_bound
from dualgap_jax.duality.branch_and_bound import MAX_PARAMETERS, BoundSpec, Minimum, penalised_minimum
from dualgap_jax.duality.envelope import dual_by_envelope
from dualgap_jax.duality.problem import subject_of
from dualgap_jax.duality.search import SearchSpec, search
from dualgap_jax.duality.values import number, proven
from dualgap_jax.registry import unknown
from dualgap_jax.sizes import switch

ENGINES = ("auto", *CEILINGS, "branch and bound")
_EPS = float(np.finfo(np.float64).eps)
_AUTO_UP_TO = 4  # parameters for which 'auto' goes through boxes too, where nothing exact is known


def homogeneous_minimum(kappa: float, degree: int, power: float, radius: float, lam: float) -> float:
    """A lower bound, rounding included, on `min over 0 <= s <= radius of lam s^power - kappa s^degree`."""
    if kappa <= 0:
        return 0.0
    if degree == power and lam >= kappa:
        return 0.0
    if degree < power and lam > 0:
        log_s = (math.log(kappa) + math.log(degree) - math.log(lam) - math.log(power)) / (power - degree)
        if log_s < math.log(radius) if math.isfinite(radius) else True:
            exponent = math.log(kappa) + degree * log_s
            if exponent > 700:
                return -math.inf
            slack = 64 * _EPS * (1 + (power + degree) / (power - degree)) * (1 + abs(exponent) + abs(log_s) * degree)
            return -math.exp(exponent) * (1 - degree / power) * (1 + slack) - 1e-300
    if math.isinf(radius):
        return -math.inf
    gain, cost = float(kappa) * _power(radius, degree), float(lam) * _power(radius, power) if lam > 0 else 0.0
    if math.isinf(gain):
        return -math.inf
    lost = (kappa + lam) * 1e-307  # where a power of the radius underflows
    return min(0.0, cost - gain - 64 * _EPS * (cost + gain) - lost - 1e-300) if math.isfinite(cost) else 0.0


def _power(base: float, exponent: int | float) -> float:
    """`base ** exponent`, infinite where it overflows."""
    try:
        return float(base**exponent)
    except OverflowError:
        return math.inf


def best_multiplier(problem: RiskProblem, kappa: float, level: float) -> float:
    """The best multiplier for a budget: minus a slope of the envelope of `-kappa b^(L/q) - level sqrt(b)`, at K.

    `level` is the norm of the mean dual vector where there is an output bias, else 0.
    """
    known, budget, q = problem.structure, problem.budget, problem.power
    assert known is not None
    assert budget is not None
    most, degree = _power(problem.radius, q), known.degree
    small = max(budget, 1e-200)
    bias = level / (2 * math.sqrt(small)) if level > 0 else 0.0
    if budget >= most:
        left = level / (2 * math.sqrt(max(budget - most, 1e-200))) if level > 0 else 0.0
        return min(max(left, 0.0), kappa) if level > 0 else 0.0
    if degree < q:
        return kappa * degree / q * _power(small, degree / q - 1)
    return max(kappa if degree == q else kappa * _power(problem.radius, degree - q), bias)


def _bias_minimum(level: float, lam: float, radius: float) -> float:
    """A lower bound on `min over c of <mean alpha, c> + lam ||c||^2`."""
    if level == 0:
        return 0.0
    if lam > 0:
        return -(level * level) / (4 * lam) * (1 + 8 * _EPS) - 1e-300
    return -level * radius * (1 + 8 * _EPS)


def bias_level(problem: RiskProblem, alpha: np.ndarray) -> float:
    """An upper bound on the norm of the mean dual vector, for a branch with an output bias; else 0."""
    if problem.structure is None or not problem.structure.use_bias:
        return 0.0
    mean = [math.fsum(column) / len(alpha) for column in alpha.T.tolist()]
    return math.hypot(*mean) * (1 + (len(mean) + 8) * _EPS)


def pieces_of(problem: RiskProblem, alpha: np.ndarray, kappa: float, lam: float) -> Pieces:
    """The terms of the bound by alpha and the multiplier lam, for a homogeneous branch with `kappa(alpha) <= kappa`."""
    known = problem.structure
    assert known is not None
    minimum = homogeneous_minimum(kappa, known.degree, problem.power, problem.radius, lam)
    minimum += _bias_minimum(bias_level(problem, alpha), lam, problem.radius)
    cost = 0.0 if problem.budget is None else math.nextafter(lam * problem.budget, math.inf) if lam > 0 else 0.0
    return Pieces(problem.conjugate.upper_mean(alpha, problem.y), minimum, cost)


def total(pieces: Pieces) -> float:
    """`-conjugate + minimum - cost`, rounded down."""
    if not all(math.isfinite(piece) for piece in pieces):
        return -math.inf
    value = math.fsum([-pieces.conjugate, pieces.minimum, -pieces.cost])
    return math.nextafter(value, -math.inf)


def largest_multiple(problem: RiskProblem, alpha: np.ndarray) -> float:
    """The largest multiple of alpha, up to 2^20, that is in the domain of the conjugate; at least 1."""
    low, high = 0.0, 1.0
    while high < 2.0**20 and not problem.conjugate.outside(alpha * high, problem.y).any():
        low, high = high, 2 * high
    for _ in range(40):
        middle = 0.5 * (low + high)
        inside = not problem.conjugate.outside(alpha * middle, problem.y).any()
        low, high = (middle, high) if inside else (low, middle)
    return max(1.0, low * (1 - 4e-9))  # what counts as inside may be a share of 1e-9 outside


def from_kappa(problem: RiskProblem, alpha: np.ndarray, kappa: float, *, scale: bool = True) -> tuple[Any, ...]:
    """The best bound that `kappa >= kappa(alpha)` gives: alpha, multiplier, pieces, and kappa of the final alpha.

    Args:
      problem: the risk, of a homogeneous branch.
      alpha: `[n, out]`, in the domain exactly.
      kappa: a bound for it.
      scale: whether multiples of alpha are tried; where alpha itself gives no bound they always are.
    """
    known = problem.structure
    assert known is not None
    level, lam = bias_level(problem, alpha), problem.penalty

    def multiplier(theta: float) -> float:
        return best_multiplier(problem, theta * kappa, theta * level) if lam is None else lam

    def dual(theta: float) -> float:
        at, rows = multiplier(theta), problem.conjugate.nearest(alpha * theta, problem.y)
        values = problem.conjugate.terms(rows, problem.y)[0]
        minimum = homogeneous_minimum(theta * kappa, known.degree, problem.power, problem.radius, at)
        cost = at * problem.budget if problem.budget is not None else 0.0
        found = -float(np.mean(values)) + minimum + _bias_minimum(theta * level, at, problem.radius) - cost
        return found if math.isfinite(found) else -1e300

    limit = math.inf
    if lam is not None and math.isinf(problem.radius) and known.degree == problem.power and kappa > 0:
        limit = lam / kappa * (1 - 4 * _EPS)
    theta = min(1.0, limit)
    if (scale or limit < 1) and np.any(alpha):
        top = min(largest_multiple(problem, alpha), limit)
        found = scipy.optimize.minimize_scalar(
            lambda t: -dual(t), bounds=(0.0, top), method="bounded", options={"xatol": 1e-11 * top}
        )
        theta = max((t for t in (theta, float(found.x), top) if t <= limit), key=dual)
    x = np.linalg.norm(known.inputs(problem.one.x), axis=1) ** known.order
    for _ in range(4):
        exact = theta * alpha
        rows = alpha if theta == 1 else problem.conjugate.nearest(exact, problem.y)
        # kappa is Lipschitz in alpha: what rounding the rows into the domain has changed.
        moved = np.linalg.norm(rows - exact, axis=1) + (0 if theta == 1 else 2 * _EPS) * np.linalg.norm(exact, axis=1)
        change = float(np.mean(moved * x)) * known.share * (1 + (len(x) + 64) * _EPS)
        there = theta * kappa * (1 + 4 * _EPS) + change if theta != 1 else kappa
        at = best_multiplier(problem, there, bias_level(problem, rows)) if lam is None else lam
        pieces = pieces_of(problem, rows, there, at)
        if math.isfinite(pieces.minimum) or theta == 0:
            break
        theta *= max(0.5, 1 - 2 * (there / at - 1)) * (1 - 8 * _EPS)  # below it by as much as it was above
    return rows, at, pieces, there


def bound_from(problem: RiskProblem, alpha: np.ndarray, kappa: float, point: Any, method: str) -> Bound:
    """The best bound from a number taken for kappa(alpha); it is not marked as proven."""
    rows, lam, pieces, there = from_kappa(problem, alpha, kappa)
    return Bound(total(pieces), rows, lam, pieces, there, None, point, method)


def of_budget(problem: RiskProblem, multiplier: Any) -> float | None:
    """The multiplier that was given for a budget, or None.  Raises ValueError below 0, and where there is a penalty."""
    if multiplier is None:
        return None
    lam = number("multiplier", multiplier)
    if problem.penalty not in (None, lam):
        raise ValueError(
            f"multiplier={lam:g} is that of a budget, but the problem has the penalty {problem.penalty:g}."
        )
    if lam < 0:
        raise ValueError(f"multiplier={lam:g} must be at least 0.")
    return lam


def estimated_multiplier(problem: RiskProblem, alpha: np.ndarray, seed: int) -> float:
    """A multiplier for a budget: a slope of the envelope of the one-branch problem's estimated value function."""
    one = problem.branch_problem(alpha)
    assert problem.budget is not None
    grid = one.grid(129)
    found = search(one, grid, SearchSpec(budgets=16, starts=32, steps=100, sweeps=1), seed=seed, dtype=np.float64)
    return max(0.0, dual_by_envelope([grid], [found.upper], min(problem.budget, float(grid[-1])), [1]).multiplier)


def by_boxes(
    problem: RiskProblem, alpha: np.ndarray, lam: float, spec: BoundSpec, points: np.ndarray, label: str | None = None
) -> Bound:
    """The bound for a multiplier by branch and bound over W, for a branch of few parameters."""
    one = problem.branch_problem(alpha)
    found: Minimum = penalised_minimum(one, lam, points, spec, label=label)
    cost = 0.0 if problem.budget is None else math.nextafter(lam * problem.budget, math.inf) if lam > 0 else 0.0
    pieces = Pieces(problem.conjugate.upper_mean(alpha, problem.y), found.lower, cost)
    made = Bound(
        total(pieces), alpha, lam, pieces, None, found.tree, found.point, f"branch and bound, {found.boxes:,} boxes"
    )
    return proven(made, subject_of(one._replace(offset=0.0)))


def boxes_apply(problem: RiskProblem) -> bool:
    """Whether branch and bound can be used at all."""
    return problem.one.size <= MAX_PARAMETERS and math.isfinite(problem.radius) and problem.power == 2


def least_losses(problem: RiskProblem) -> Bound:
    """The bound by alpha = 0: F* is at least the mean of the least losses, whatever the branch."""
    rows = np.zeros(problem.shape)
    lam = problem.penalty or 0.0
    pieces = Pieces(problem.conjugate.upper_mean(rows, problem.y), 0.0, 0.0)
    made = Bound(total(pieces), rows, lam, pieces, None, None, None, "least losses")
    return proven(made, subject_of(problem.branch_problem(rows)))


def from_ceiling(problem: RiskProblem, alpha: np.ndarray, top: Ceiling, scale: bool = True) -> Bound:
    """The bound that a proven ceiling of `kappa(alpha)` gives; `scale` as in `lower_bound`."""
    at, lam, pieces, kappa = from_kappa(problem, alpha, top.upper, scale=scale)
    return from_pieces(problem, at, lam, pieces, kappa, top)


def from_pieces(
    problem: RiskProblem, alpha: np.ndarray, lam: float, pieces: Pieces, kappa: float, top: Ceiling
) -> Bound:
    """The proven bound with these terms; `kappa` bounds that of alpha, by the ceiling's evidence."""
    made = Bound(total(pieces), alpha, lam, pieces, kappa, top.evidence, top.point, top.method)
    return proven(made, subject_of(problem.branch_problem(alpha)))


def proven_again(problem: RiskProblem, found: Sequence[Bound]) -> Bound:
    """The best of the bounds that `verify_bound` proves again; where it proves none, the best of all, as estimated."""
    best_first = sorted(found, key=lambda bound: bound.value, reverse=True)
    for bound in best_first:
        if bound.status == "certified" and verify_bound(problem, bound).holds:
            return bound
    return dataclasses.replace(best_first[0])  # a copy carries no mark


def best_proven(problem: RiskProblem, alpha: np.ndarray, spec: BoundSpec, label: str | None = None) -> Bound:
    """The best bound that is proven from `alpha` on: with dual vectors moved by the relaxation where it applies."""
    found = [least_losses(problem)]
    if ceiling(problem, alpha, "exact") is None and (joint := relaxed(problem, alpha)):
        found += [from_ceiling(problem, *one) for one in joint]
        if problem.penalty is not None and any(bound.method == "moments" for bound in found):
            return proven_again(problem, found)
    return proven_again(problem, [*found, *_candidates(problem, problem.checked(alpha), spec=spec, label=label)])


def lower_bound(
    problem: RiskProblem,
    alpha: Any,
    *,
    engine: str = "auto",
    multiplier: Any = None,
    scale: bool = True,
    spec: BoundSpec = BoundSpec(1e-7, 300_000),
    seed: int = 0,
    label: str | None = None,
) -> Bound:
    """A proven lower bound on F* from dual vectors; F* is at most the least risk of I branches, for every I.

    Args:
      problem: the risk.
      alpha: `[n, out]` (or `[n]` with one output) in the domain of the loss's conjugate; what is within 1e-9 of it is
        moved there.
      engine: 'linear', 'quadratic', 'gated' and 'cells' (exact), 'moments', 'spectral' and 'norms' (looser, in this
        order) for homogeneous branches; 'branch and bound' for up to 6 parameters in a ball with power 2; 'auto' for
        the best that is proven.
      multiplier: of the budget, for branch and bound; None: estimated, which the proof does not rest on.
      scale: whether the best multiple of alpha is taken, for homogeneous branches.
      spec: how far branch and bound goes.
      seed: of the search that branch and bound starts from.
      label: shows progress under this name; None is silent.

    Returns:
      The best `Bound` that `verify_bound` proves again in this call, with status 'certified'; where it does not, as for
      a single engine on data of sizes out of range, the engine's own, with status 'estimated'.  Where no engine proves
      more, 'auto' gives that of alpha = 0, method 'least losses': the losses are at least that, whatever the branch.

    Raises:
      ValueError: for an alpha of another shape or outside the domain, an unknown engine, one that does not apply, or a
        multiplier where there is a penalty.
    """
    rows = given(problem, "lower_bound").checked(alpha)
    seeds.check(seed)
    scale = switch(scale, "scale")
    if engine not in ENGINES:
        raise ValueError(unknown("engine", engine, ENGINES))
    found = _candidates(problem, rows, engine, of_budget(problem, multiplier), scale, spec, seed, label)
    return proven_again(problem, [least_losses(problem), *found] if engine == "auto" else found)


def _candidates(
    problem: RiskProblem,
    rows: np.ndarray,
    engine: str = "auto",
    multiplier: float | None = None,
    scale: bool = True,
    spec: BoundSpec = BoundSpec(1e-7, 300_000),
    seed: int = 0,
    label: str | None = None,
) -> list[Bound]:
    """What the engines prove, see `lower_bound`."""
    found: list[Bound] = []
    exact = False
    if engine != "branch and bound":
        top = ceiling(problem, rows, engine)
        if top is not None and math.isfinite(top.upper):
            found.append(from_ceiling(problem, rows, top, scale))
            exact = top.method in EXACT
        elif engine != "auto":
            raise ValueError(f"the engine {engine!r} does not apply to this branch and these data.")
    small = boxes_apply(problem) and (engine == "branch and bound" or problem.one.size <= _AUTO_UP_TO or not found)
    if small and not exact:
        lam = problem.penalty if problem.penalty is not None else multiplier
        lam = estimated_multiplier(problem, rows, seed) if lam is None else lam
        points = BranchSearch(problem, steps=200, seed=seed)(rows, lam, problem.radius)[0][:8]
        found.append(by_boxes(problem, rows, lam, spec, points, label))
    elif engine == "branch and bound":
        raise ValueError(
            f"branch and bound takes up to {MAX_PARAMETERS} parameters, power 2 and a radius; this problem has"
            f" {problem.one.size}, {problem.power:g} and {problem.radius:g}."
        )
    return found


def lower_estimated(
    problem: RiskProblem, alpha: Any, *, multiplier: Any = None, starts: int = 64, steps: int = 200, seed: int = 0
) -> Bound:
    """The same number as `lower_bound` with the least phi that a search finds in the place of a proven bound on it.

    It is at least every proven bound for these dual vectors, but may lie above F*: status 'estimated'.  The arguments
    are those of `lower_bound`, and the search's random starts and steps.
    """
    rows = given(problem, "lower_estimated").checked(alpha)
    look = BranchSearch(problem, starts=starts, steps=steps, seed=seed)
    lam = of_budget(problem, multiplier)
    lam = lam if problem.penalty is None else problem.penalty
    if problem.structure is None and lam is None:
        lam = estimated_multiplier(problem, rows, seed)
    return searched(problem, look, rows, lam or 0.0, np.zeros((0, problem.one.size)))[0]


def searched(
    problem: RiskProblem, look: BranchSearch, alpha: np.ndarray, lam: float, points: np.ndarray, **how: bool
) -> tuple[Bound, np.ndarray, np.ndarray]:
    """The estimated bound of dual vectors, and the branches `[k, p]` that a search from `points` found, the best first.

    The multiplier `lam` counts for branches that are not homogeneous.  The third is what the search made least, `[k]`:
    phi, or minus kappa for a homogeneous branch, whose points have norm 1.  `how`: see `BranchSearch.kappa`.
    """
    if problem.structure is not None:
        ends, values = look.kappa(alpha, points, **how)
        return bound_from(problem, alpha, float(values[0]), ends[0], "search"), ends, -values
    ends, values = look(alpha, lam, problem.radius, points)
    cost = lam * problem.budget if problem.budget is not None else 0.0
    pieces = Pieces(problem.conjugate.upper_mean(alpha, problem.y), float(values[0]), cost)
    return Bound(total(pieces), alpha, lam, pieces, None, None, ends[0], "search"), ends, values
