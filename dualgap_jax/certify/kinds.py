"""Networks whose branches are of several kinds: bounds that hold for all of them together.

Over measures on the union of several sets of branches the dual is that of `bounds`, with the least phi over all kinds:

    F* >= -(1/n) sum_j l_j*(alpha_j) + min over kinds k of (min over W_k of phi_k) - lam K,

so that it is the least of the bounds of single kinds, as long as all have the same alpha and the same multiplier.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy

from dualgap_jax.certify.bound import Bound
from dualgap_jax.certify.bounds import (
    best_multiplier,
    bias_level,
    boxes_apply,
    by_boxes,
    estimated_multiplier,
    from_pieces,
    largest_multiple,
    least_losses,
    of_budget,
    pieces_of,
    total,
)
from dualgap_jax.certify.certificate import TwoSided
from dualgap_jax.certify.distance import check_feasible, fenchel_loss
from dualgap_jax.certify.engines import Ceiling, ceiling
from dualgap_jax.certify.primal import as_weights, bounded_outputs, branch_sums, mean_h, risk_of_outputs
from dualgap_jax.certify.problem import RiskProblem
from dualgap_jax.certify.search import BranchSearch
from dualgap_jax.certify.verify import verify_bound
from dualgap_jax.duality.branch_and_bound import BoundSpec
from dualgap_jax.duality.checker.value_functions import Verified
from dualgap_jax.duality.values import Status
from dualgap_jax.sizes import switch

_EPS = float(np.finfo(np.float64).eps)
_SHRINK = 8  # times that dual vectors are scaled down until every kind gives a bound


@dataclasses.dataclass(frozen=True, eq=False)
class MixedBound:
    """A lower bound on F* over networks that mix branches of several kinds.

    Attributes:
      kinds: the bound of each kind by itself, all with the same alpha and multiplier.

    Raises:
      ValueError: for none, or for bounds of unlike alpha or multiplier, from which nothing follows together.
    """

    kinds: tuple[Bound, ...]

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ValueError("a bound of no kinds is none: give at least one.")
        first = self.kinds[0]
        for bound in self.kinds[1:]:
            if bound.multiplier != first.multiplier or not np.array_equal(bound.alpha, first.alpha):
                raise ValueError("the kinds have unlike dual vectors or multipliers, so nothing follows for mixtures.")

    @property
    def value(self) -> float:
        """The least of the kinds' bounds."""
        return min(bound.value for bound in self.kinds)

    @property
    def status(self) -> Status:
        """'certified' if that of every kind is."""
        return "certified" if all(bound.status == "certified" for bound in self.kinds) else "estimated"

    @property
    def alpha(self) -> np.ndarray:
        """`[n, out]`, the dual vectors."""
        return self.kinds[0].alpha

    @property
    def multiplier(self) -> float:
        """lam."""
        return self.kinds[0].multiplier

    @property
    def worst(self) -> int:
        """Which kind bounds least: the one whose best branch would help most."""
        return min(range(len(self.kinds)), key=lambda k: self.kinds[k].value)


@dataclasses.dataclass(frozen=True, eq=False)
class MixedCertificate(TwoSided):
    """How far a network of several kinds of branches is from the best network of such kinds.

    Attributes:
      upper: the regularised risk of the network, with its rounding.
      upper_proven: whether `upper` allows for all rounding.
      bound: the lower bound.
      excess: for each kind `[I_k]`, how much worse each branch is than the best possible branch of any kind.
      slack: `K - mean h`, what is left of the budget; 0 with a penalty.
      fenchel: what alpha loses against a subgradient at the outputs, as in `Certificate`.
    """

    upper: float
    upper_proven: bool
    bound: MixedBound
    excess: tuple[np.ndarray, ...]
    slack: float
    fenchel: float


def _checked(problems: Sequence[RiskProblem]) -> tuple[RiskProblem, ...]:
    problems = () if isinstance(problems, RiskProblem) else tuple(problems)
    if not problems or not all(isinstance(problem, RiskProblem) for problem in problems):
        raise ValueError("give one risk_problem for each kind of branch, at least one.")
    first = problems[0]
    for k, other in enumerate(problems[1:], 1):
        same = {
            "inputs": np.array_equal(first.one.x, other.one.x),
            "labels": np.array_equal(first.y, other.y),
            "loss": (first.conjugate.kind, first.loss.tau) == (other.conjugate.kind, other.loss.tau),
            "penalty": first.penalty == other.penalty,
            "budget": first.budget == other.budget,
            "reduce": first.reduce == other.reduce,
        }
        if unlike := [name for name, equal in same.items() if not equal]:
            raise ValueError(f"kind {k} has other {' and '.join(unlike)} than kind 0: all kinds make up one risk.")
    return problems


def _least(problems: Sequence[RiskProblem], rows: np.ndarray, kappas: Sequence[float], lam: float) -> float:
    return min(total(pieces_of(p, rows, k, lam)) for p, k in zip(problems, kappas, strict=True))


def _multiplier(problems: Sequence[RiskProblem], rows: np.ndarray, kappas: Sequence[float]) -> float:
    """The penalty, or of the best multipliers of single kinds the one that is best for all."""
    if problems[0].penalty is not None:
        return problems[0].penalty
    tried = {best_multiplier(p, kappa, bias_level(p, rows)) for p, kappa in zip(problems, kappas, strict=True)}
    return max(sorted(tried), key=lambda lam: _least(problems, rows, kappas, lam))


def _scaled(problems: Sequence[RiskProblem], alpha: np.ndarray, tops: Sequence[Ceiling], scale: bool) -> np.ndarray:
    """The best multiple of alpha for all kinds; only as far as there is a bound at all where `scale` is False."""
    first, limit = problems[0], math.inf
    for problem, top in zip(problems, tops, strict=True):
        known = problem.structure
        assert known is not None
        if problem.penalty is not None and problem.scale_free and top.upper > 0:
            limit = min(limit, problem.penalty / top.upper * (1 - 64 * _EPS))

    def loss(theta: float) -> float:
        rows = first.conjugate.nearest(theta * alpha, first.y)
        kappas = [theta * top.upper for top in tops]
        found = _least(problems, rows, kappas, _multiplier(problems, rows, kappas))
        return -found if math.isfinite(found) else 1e300

    theta = min(1.0, limit)
    if scale or limit < 1:
        most = min(largest_multiple(first, alpha), limit)
        found = scipy.optimize.minimize_scalar(
            loss, bounds=(0.0, most), method="bounded", options={"xatol": 1e-10 * most}
        )
        theta = min((theta, float(found.x), most), key=loss)
    return alpha if theta == 1 else first.conjugate.nearest(theta * alpha, first.y)


def mixed_bound(
    problems: Sequence[RiskProblem],
    alpha: Any,
    *,
    multiplier: Any = None,
    scale: bool = True,
    spec: BoundSpec = BoundSpec(1e-7, 300_000),
    seed: int = 0,
) -> MixedBound:
    """A lower bound on the risk of every network that mixes branches of these kinds, however many of each.

    Its status is 'certified' where `verify_mixed` proves it again in this call.

    Args:
      problems: a `risk_problem` for each kind, of the same data, loss, penalty or budget; W and h may differ.
      alpha: `[n, out]`, dual vectors, as in `lower_bound`.
      multiplier: of the budget where a kind goes through branch and bound; None: the penalty, or an estimate.
      scale: whether the best multiple of alpha is taken, where all kinds are homogeneous.
      spec: how far branch and bound goes.
      seed: of the searches that it starts from.

    Raises:
      ValueError: for kinds that do not make up one risk, what `lower_bound` refuses, or a kind to which no engine
        applies.
    """
    problems, scale = _checked(problems), switch(scale, "scale")
    rows, multiplier = problems[0].checked(alpha), of_budget(problems[0], multiplier)
    least = MixedBound(tuple(least_losses(problem) for problem in problems))
    for _ in range(_SHRINK):
        tops = [ceiling(problem, rows) for problem in problems]
        for k, (problem, top) in enumerate(zip(problems, tops, strict=True)):
            if top is None and not boxes_apply(problem):
                raise ValueError(f"no engine applies to kind {k}, so nothing is proven about mixtures with it.")
        if all(top is not None for top in tops):
            before, rows = rows, _scaled(problems, rows, tops, scale)  # type: ignore[arg-type]
            if rows is not before:
                tops, scale = [ceiling(problem, rows) for problem in problems], False
        lam = _common(problems, rows, tops, multiplier, seed)
        found = MixedBound(
            tuple(_of_kind(p, rows, top, lam, spec, seed) for p, top in zip(problems, tops, strict=True))
        )
        if math.isfinite(found.value):
            return _proven_again(problems, [found, least])
        rows, scale = problems[0].conjugate.nearest((1 - 1e-9) * rows, problems[0].y), False
    return _proven_again(problems, [least])


def _proven_again(problems: Sequence[RiskProblem], found: Sequence[MixedBound]) -> MixedBound:
    """The best of the bounds that are proven again; where none is, the best of all, as estimated."""
    best_first = sorted(found, key=lambda bound: bound.value, reverse=True)
    for bound in best_first:
        if bound.status == "certified" and verify_mixed(problems, bound).holds:
            return bound
    return MixedBound(tuple(map(dataclasses.replace, best_first[0].kinds)))  # copies carry no mark


def _common(
    problems: Sequence[RiskProblem], rows: np.ndarray, tops: Sequence[Ceiling | None], given: float | None, seed: int
) -> float:
    """One multiplier for all kinds."""
    if problems[0].penalty is not None:
        return problems[0].penalty
    if given is not None:
        return given
    known = [(p, top.upper) for p, top in zip(problems, tops, strict=True) if top is not None]
    rest = [estimated_multiplier(p, rows, seed) for p, top in zip(problems, tops, strict=True) if top is None]
    if known:
        rest.append(_multiplier([p for p, _ in known], rows, [kappa for _, kappa in known]))
    return max(rest)


def _of_kind(
    problem: RiskProblem, rows: np.ndarray, top: Ceiling | None, lam: float, spec: BoundSpec, seed: int
) -> Bound:
    """The bound of one kind at these dual vectors and this multiplier."""
    if top is None:
        return by_boxes(problem, rows, lam, spec, BranchSearch(problem, seed=seed)(rows, lam, problem.radius)[0][:8])
    return from_pieces(problem, rows, lam, pieces_of(problem, rows, top.upper, lam), top.upper, top)


def mixed_distance(
    problems: Sequence[RiskProblem],
    networks: Sequence[Any],
    *,
    alpha: Any = None,
    spec: BoundSpec = BoundSpec(1e-7, 300_000),
    seed: int = 0,
) -> MixedCertificate:
    """How far a network of several kinds of branches is from the best one at most.

    The network is the mean (or the sum) over all branches of all kinds, each counting as much as every other: that of
    `networks.mixture` with `multi_branch(..., reduce='sum')` of each kind and weights of one over their number.  The
    gap is the sum of all excesses over that number, plus `multiplier * slack + fenchel`, up to rounding.

    Args:
      problems: as in `mixed_bound`.
      networks: for each kind a handle, or the flat weights `[I_k, p_k]`.
      alpha: dual vectors for the lower bound; None: the network's own.
      spec: how far branch and bound goes.
      seed: of the searches that it starts from.

    Raises:
      TypeError: for a network that is neither a handle nor an array.
      ValueError: for weights that do not fit or are infeasible, or what `mixed_bound` refuses.
    """
    problems = _checked(problems)
    if len(networks) != len(problems):
        raise ValueError(f"{len(problems)} kinds need as many networks, got {len(networks)}.")
    weights = [as_weights(p, network) for p, network in zip(problems, networks, strict=True)]
    first = problems[0]
    each = 1.0 if first.reduce == "sum" else 1 / sum(map(len, weights))
    shares = [np.full(len(w), each) for w in weights]
    parts = [bounded_outputs(p, w, s) for p, w, s in zip(problems, weights, shares, strict=True)]
    outputs = np.sum([z for z, _, _ in parts], axis=0)
    size = np.sum([np.abs(z) for z, _, _ in parts], axis=0)
    error = np.sum([e for _, e, _ in parts], axis=0) * (1 + 4 * _EPS) + len(parts) * _EPS * size
    costs = [mean_h(p, w, s) for p, w, s in zip(problems, weights, shares, strict=True)]
    cost = math.nextafter(math.fsum(costs), math.inf)
    found = risk_of_outputs(first, outputs, error, all(sure for _, _, sure in parts), cost)
    feasible = all(check_feasible(p, w, found) for p, w in zip(problems, weights, strict=True))
    rows = first.slope(outputs) if alpha is None else first.checked(alpha)
    bound = mixed_bound(problems, rows, spec=spec, seed=seed)
    best = min(piece.pieces.minimum for piece in bound.kinds)
    excess = []
    for problem, w in zip(problems, weights, strict=True):
        h = np.linalg.norm(w, axis=1) ** problem.power
        excess.append(branch_sums(problem, w, bound.alpha) + bound.multiplier * h - best)
    slack = 0.0 if first.budget is None else first.budget - cost
    fenchel = fenchel_loss(first, bound.alpha, outputs)
    return MixedCertificate(found.upper, found.proven and feasible, bound, tuple(excess), slack, fenchel)


def verify_mixed(problems: Sequence[RiskProblem], bound: MixedBound) -> Verified:
    """Proves that F* over mixtures of these kinds is at least `bound.value` again.

    Returns:
      `Verified`, whose `reason` names the kind and the first step that was not proven.

    Raises:
      ValueError: for kinds that do not make up one risk.
    """
    problems = _checked(problems)
    if not isinstance(bound, MixedBound):
        return Verified(False, f"what is given is no MixedBound but a {type(bound).__name__}", 0)
    if len(bound.kinds) != len(problems):
        return Verified(False, f"{len(bound.kinds)} kinds are bounded, need {len(problems)}", 0)
    boxes = 0
    for k, (problem, one) in enumerate(zip(problems, bound.kinds, strict=True)):
        if one.multiplier != bound.multiplier or not np.array_equal(one.alpha, bound.alpha):
            return Verified(False, f"kind {k} has other dual vectors or another multiplier", boxes)
        again = verify_bound(problem, one)
        boxes += again.boxes
        if not again.holds:
            return Verified(False, f"kind {k}: {again.reason}", boxes)
    return Verified(True, "", boxes)
