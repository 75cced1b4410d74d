"""The distance of a trained network from the global optimum, by its own dual vectors.

With `alpha_j` in the subdifferential of the loss at the network's output z_j, Fenchel's inequality is an equality, and

    risk - bound = mean_i phi(w_i) - min phi + lam (K - mean_i h(w_i))

so the distance is the mean, over the branches, of how much worse each one is than the best possible branch, plus what
the budget leaves unused.  Where another multiple of alpha, or another alpha, bounds better, the mean of
`l_j(z_j) + l_j*(alpha_j) - <alpha_j, z_j>` is a third term.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dualgap_jax.certify.bound import Bound
from dualgap_jax.certify.bounds import lower_bound, lower_estimated
from dualgap_jax.certify.certificate import Certificate
from dualgap_jax.certify.primal import Risk, as_weights, branch_sums, risk
from dualgap_jax.certify.problem import RiskProblem, given
from dualgap_jax.duality.branch_and_bound import BoundSpec
from dualgap_jax.sizes import switch

_FEASIBLE = 1e-9  # share by which weights may miss a constraint; more than rounding makes them no point of the problem


def check_feasible(problem: RiskProblem, weights: np.ndarray, found: Risk) -> bool:
    """Whether the weights are proven to meet the constraints.

    Raises:
      ValueError: where they miss one by more than a share of 1e-9.
    """
    norms = np.linalg.norm(weights, axis=1)
    worst = int(np.argmax(norms))
    if norms[worst] > problem.radius * (1 + _FEASIBLE):
        raise ValueError(
            f"branch {worst} has norm {norms[worst]:.6g}, outside W, the ball of radius {problem.radius:.6g}: give a"
            " larger radius."
        )
    budget = math.inf if problem.budget is None else problem.budget
    if found.mean_h > budget * (1 + _FEASIBLE):
        raise ValueError(
            f"the network's mean h is {found.mean_h:.6g}, above the budget {budget:.6g}: it is not feasible; give a"
            " larger budget."
        )
    return bool(found.mean_h <= budget and norms[worst] * (1 + 1e-14 * (1 + weights.shape[1] / 64)) <= problem.radius)


def fenchel_loss(problem: RiskProblem, alpha: np.ndarray, outputs: np.ndarray) -> float:
    """`mean l(z) + l*(alpha) - <alpha, z>` at outputs z `[n, out]`: what alpha loses against a subgradient there."""
    terms = problem.losses(outputs) + problem.conjugate(alpha, problem.y) - (alpha * outputs).sum(axis=1)
    return float(np.mean(terms))


def assembled(
    problem: RiskProblem,
    weights: np.ndarray,
    shares: np.ndarray,
    found: Risk,
    bound: Bound,
    estimated: Bound | None,
    history: tuple[dict[str, Any], ...] = (),
) -> Certificate:
    """The certificate of a measure from its risk and the bounds."""
    feasible = check_feasible(problem, weights, found)
    # More than the risk of a network is no bound: the search behind it has missed the best branch.
    missed = estimated is not None and estimated.value > found.upper + 1e-9 * (1 + abs(found.upper))
    lam, alpha = bound.multiplier, bound.alpha
    costs = np.linalg.norm(weights, axis=1) ** problem.power
    phi = branch_sums(problem, weights, alpha) + lam * costs
    slack = 0.0 if problem.budget is None else problem.budget - float(shares @ costs)
    # The branch that would help most, by the network's own dual vectors and at the size of the present branches.
    points = [b.point for b in (bound, estimated) if b is not None and b.point is not None]
    entering, slope = None, 0.0
    if points:
        own = problem.slope(found.outputs)
        mean = float(shares @ costs)
        if problem.structure is not None:
            size = min(problem.radius, mean ** (1 / problem.power) if mean > 0 else 1.0)
            points = [point * (size / max(float(np.linalg.norm(point)), 1e-300)) for point in points]
        rows = np.stack(points)
        there = branch_sums(problem, rows, own) + lam * np.linalg.norm(rows, axis=1) ** problem.power
        here = float(shares @ (branch_sums(problem, weights, own) + lam * costs))
        best = int(np.argmin(there))
        entering, slope = rows[best], here - float(there[best])
    return Certificate(
        upper=found.upper,
        bound=bound,
        lower_estimated=None if estimated is None or missed else min(estimated.value, found.upper),
        search_missed=missed,
        upper_proven=found.proven and feasible,
        weights=weights,
        shares=shares,
        excess=phi - bound.pieces.minimum,
        slack=slack,
        fenchel=fenchel_loss(problem, alpha, found.outputs),
        entering=entering,
        entering_slope=slope,
        history=history,
    )


def distance(
    problem: RiskProblem,
    network: Any,
    *,
    alpha: Any = None,
    engine: str = "auto",
    estimate: bool = True,
    starts: int = 64,
    spec: BoundSpec = BoundSpec(1e-7, 300_000),
    seed: int = 0,
    label: str | None = None,
) -> Certificate:
    """How far a network is from the global optimum at most, and which of its branches are to blame.

    The gap is `mean excess + multiplier * slack + fenchel`, up to rounding.

    Args:
      problem: the risk.
      network: a handle such as `networks.InMemory(params)` or `Solution.network`, or the flat weights `[I, p]`.  With
        `reduce='sum'` its output is the sum over branches.
      alpha: dual vectors `[n, out]` for the lower bound; None: the network's own, subgradients of the losses at its
        outputs.  Those of `optimum` are better.
      engine: as in `lower_bound`.
      estimate: whether a search estimates the bound as well.
      starts: of that search.
      spec: how far branch and bound goes.
      seed: of the searches.
      label: shows progress under this name; None is silent.

    Raises:
      TypeError: for a problem that is none, or a network that is neither a handle nor an array.
      ValueError: for weights that do not fit or are infeasible, or what `lower_bound` refuses.
    """
    weights = as_weights(given(problem, "certify.distance"), network)
    estimate = switch(estimate, "estimate")
    shares = np.full(len(weights), 1.0 if problem.reduce == "sum" else 1 / len(weights))
    found = risk(problem, weights, shares)
    check_feasible(problem, weights, found)
    rows = problem.slope(found.outputs) if alpha is None else problem.checked(alpha)
    bound = lower_bound(problem, rows, engine=engine, spec=spec, seed=seed, label=label)
    guess = lower_estimated(problem, rows, starts=starts, seed=seed) if estimate else None
    return assembled(problem, weights, shares, found, bound, guess)
