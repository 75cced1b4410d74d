"""A trained network against the optimum, by the best of the dual vectors that its outputs suggest.

At the kinks of a hinge the subgradient that a network's outputs give is an arbitrary one of many, so dual vectors of
smoothed losses are tried too, and those of the zero network.  A search, which is cheap, says which of them bounds most,
and whether any engine can prove more than that losses are not negative; only then one is run.

Where a budget leaves nothing to prove, since networks of these weights may fit the data as well as one likes, the same
inequality says how small the weights of so good a network may be: `least_budget`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dualgap_jax.certify.bound import Bound
from dualgap_jax.certify.bounds import best_proven, from_ceiling, least_losses, proven_again, searched
from dualgap_jax.certify.certificate import Certificate
from dualgap_jax.certify.distance import assembled, check_feasible
from dualgap_jax.certify.engines import EXACT, Ceiling, ceiling, relaxed
from dualgap_jax.certify.primal import as_weights, risk
from dualgap_jax.certify.problem import RiskProblem, given
from dualgap_jax.certify.search import BranchSearch
from dualgap_jax.certify.sliding import smoothed
from dualgap_jax.certify.verify import verify_bound
from dualgap_jax.duality.branch_and_bound import BoundSpec

_WIDTHS = (0.03, 0.3)  # over which the corners of a hinge are rounded, in margins


class Assessment(NamedTuple):
    """How far a network is from the optimum.

    Attributes:
      certificate: with the best dual vectors tried.
      least_budget: a proven lower bound on the mean h of every network whose mean loss is at most this network's; None
        with a penalty, or where nothing is proven.
    """

    certificate: Certificate
    least_budget: float | None


def assess(problem: RiskProblem, network: Any, *, starts: int = 16, seed: int = 0) -> Assessment:
    """How far a network is from the best one: as `distance`, by the best of several dual vectors.

    Args:
      problem: the risk.
      network: a handle or weights `[I, p]`; its branches are read into memory.
      starts: of the searches.
      seed: of the searches.

    Raises:
      As `distance`.
    """
    weights = as_weights(given(problem, "certify.assess"), network)
    shares = np.full(len(weights), 1.0 if problem.reduce == "sum" else 1 / len(weights))
    found = risk(problem, weights, shares)
    check_feasible(problem, weights, found)
    look = BranchSearch(problem, starts=starts, steps=200, seed=seed)
    tried = dual_vectors(problem, found.outputs)
    lam = problem.penalty or 0.0
    guesses = [searched(problem, look, alpha, lam, weights, coarse=True)[0] for alpha in tried]
    best = max(range(len(tried)), key=lambda k: guesses[k].value)
    guess, bound = guesses[best], proven_again(problem, [least_losses(problem)])
    if look.in_parts:
        guess = searched(problem, look, tried[best], lam, weights)[0]
    if guess.value > bound.value:  # an engine proves at most that of these dual vectors
        bound = best_proven(problem, tried[best], BoundSpec(1e-7, 300_000))
    if problem.structure is not None and bound.alpha.any():  # a relaxation has moved them
        guess = max(guess, searched(problem, look, bound.alpha, lam, weights)[0], key=lambda b: b.value)
    estimate = max(guess, bound, key=lambda b: b.value)
    made = assembled(problem, weights, shares, found, bound, estimate)
    least = None if problem.budget is None else least_budget(problem, tried, float(found.upper))
    return Assessment(made, least)


def dual_vectors(problem: RiskProblem, outputs: np.ndarray) -> list[np.ndarray]:
    """Dual vectors `[n, out]`: the slopes of the losses at outputs, of smoothed ones, and at 0."""
    rows = [problem.slope(outputs)]
    if problem.conjugate.kind not in ("squared", "logistic"):
        with jax.enable_x64(True):
            slope, at = jax.jit(jax.grad(smoothed(problem))), jnp.asarray(outputs, jnp.float64)
            smooth = [len(outputs) * np.asarray(slope(at, jnp.asarray(width))) for width in _WIDTHS]
        rows += [problem.conjugate.nearest(alpha, problem.y) for alpha in smooth]
    return [*rows, problem.slope(np.zeros(problem.shape))]


def least_budget(problem: RiskProblem, alphas: list[np.ndarray], loss: float) -> float | None:
    """A lower bound on the mean h that a mean loss of at most `loss` needs, proven twice; None where none is found.

    For any alpha with `kappa(alpha) <= k`, a network of mean h at most K has a mean loss of at least
    `-(1/n) sum l*(alpha) - k K`, less what an output bias gains.
    """
    if problem.structure is None or not problem.scale_free:
        return None
    tops = [(alpha, ceiling(problem, alpha, "exact") or ceiling(problem, alpha, "spectral")) for alpha in alphas]
    if not any(top is not None and top.method in EXACT for _, top in tops):
        tops += relaxed(problem, alphas[-1], loss=loss)
    proofs = [_least_proof(problem, alpha, top, loss) for alpha, top in tops if top is not None]
    for tight, proof in sorted(filter(None, proofs), key=lambda one: -float(one[0].budget or 0.0)):
        if proof.value > loss and verify_bound(tight, proof).holds:
            return tight.budget
    return None


def _least_proof(
    problem: RiskProblem, alpha: np.ndarray, top: Ceiling, loss: float
) -> tuple[RiskProblem, Bound] | None:
    """The problem with the largest budget at which `alpha` keeps losses above `loss`, and the bound that says so."""
    if problem.structure is None or not 0 < top.upper < math.inf:
        return None
    level = float(np.linalg.norm(alpha.mean(axis=0))) if problem.structure.use_bias else 0.0
    worth = -float(problem.conjugate(alpha, problem.y).mean()) - level**2 / (4 * top.upper) - loss
    budget = worth / top.upper * (1 - 1e-6)
    if not 0 < budget < math.inf:
        return None
    tight = dataclasses.replace(problem, budget=budget)
    return tight, from_ceiling(tight, alpha, top)
