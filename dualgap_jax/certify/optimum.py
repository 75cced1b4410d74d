"""F* from both sides: sliding, fully corrective conditional gradients over measures of branches.

Each round moves the branches of the measure together (`sliding`), solves the convex problem over their shares exactly
(`reduced`), takes its dual vectors for a lower bound, and adds the branches that these say would help most; with the
sliding step it ends after finitely many rounds where nothing is degenerate (Denoyelle, Duval, Peyre and Soubies,
Inverse Problems 36, 2020, for sparse spikes).  The bounds do not rest on that: every round has its own.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualgap_jax.certify.bound import Bound
from dualgap_jax.certify.bounds import (
    best_proven,
    bound_from,
    boxes_apply,
    by_boxes,
    from_ceiling,
    least_losses,
    proven_again,
    searched,
)
from dualgap_jax.certify.certificate import Certificate
from dualgap_jax.certify.distance import assembled
from dualgap_jax.certify.engines import ceiling
from dualgap_jax.certify.primal import as_weights, inside, mean_h, risk
from dualgap_jax.certify.problem import RiskProblem, given
from dualgap_jax.certify.reduced import Reduced, solve
from dualgap_jax.certify.search import BranchSearch
from dualgap_jax.certify.sliding import Slide
from dualgap_jax.config import require
from dualgap_jax.duality.branch_and_bound import BoundSpec
from dualgap_jax.sizes import positive, switch
from dualgap_jax.terminal import Progress


@dataclasses.dataclass(frozen=True)
class OptimumSpec:
    """How hard to try.

    Attributes:
      units: branches that are moved together.
      rounds: at most so many rounds.
      seconds: no round starts after so many seconds; 0 for no limit, so that the same call gives the same bits.
      tolerance: distance of the bounds at which it ends, as a share of the zero network's risk.
      steps: of L-BFGS a round.
      starts: random starts of the search for new branches a round.
      added: new branches a round, at most.
      bound: how far branch and bound goes at the end.
    """

    units: int = 32
    rounds: int = 40
    seconds: float = 0.0
    tolerance: float = 1e-7
    steps: int = 300
    starts: int = 48
    added: int = 8
    bound: BoundSpec = BoundSpec(1e-8, 300_000)

    def __post_init__(self) -> None:
        for name in ("units", "rounds", "steps", "starts", "added"):
            positive(getattr(self, name), name)
        for name in ("seconds", "tolerance"):
            require(0 <= getattr(self, name) < math.inf, f"{name}={getattr(self, name)} must be at least 0 and finite.")


class _Solver:
    """The measure at hand, and the bounds reached so far."""

    def __init__(self, problem: RiskProblem, spec: OptimumSpec, seed: int) -> None:
        self.problem, self.spec, self.free = problem, spec, problem.scale_free
        self.look = BranchSearch(problem, starts=spec.starts, steps=80, seed=seed, chunk=16)
        self.slide = Slide(problem, spec.units)
        x = np.asarray(problem.one.x)
        with jax.enable_x64(True):
            self._outputs = jax.jit(lambda w: jax.lax.map(lambda one: problem.one.outputs(one, x), w, batch_size=16))
        self.upper, self.lower = math.inf, -math.inf
        self.proven: Bound | None = None
        self.guess: Bound | None = None
        self.weights = np.zeros((1, problem.one.size))
        self.shares = np.ones(1)
        self.seen = np.zeros((0, problem.one.size))  # the best branches of all searches
        self.bias = np.zeros(problem.shape[1])  # that all branches share, where scales are free

    def outputs(self, weights: np.ndarray) -> np.ndarray:
        """`[k, n, out]`; the rows are padded to few different numbers, which are compiled once each."""
        rows = -(-len(weights) // 16) * 16
        with jax.enable_x64(True):
            padded = jnp.asarray(np.pad(weights, ((0, rows - len(weights)), (0, 0))))
            return np.asarray(self._outputs(padded))[: len(weights)]

    def merged(self, weights: np.ndarray) -> np.ndarray:
        """Without zeros and near copies; of norm 1 where scales are free; with the zero branch where they are not."""
        norms = np.linalg.norm(weights, axis=1)
        weights = weights[norms > 1e-9 * max(1e-300, float(norms.max(initial=0.0)))]
        if self.free and len(weights):
            weights = weights / np.linalg.norm(weights, axis=1, keepdims=True)
        kept: list[np.ndarray] = [] if self.free else [np.zeros(self.problem.one.size)]
        for w in weights:
            near = 1e-7 * max(1.0, float(np.linalg.norm(w)))
            if all(np.linalg.norm(w - other) > near for other in kept):
                kept.append(w)
        return np.array(kept) if kept else np.eye(1, self.problem.one.size)

    def correct(self, weights: np.ndarray) -> Reduced:
        """Solves for the shares of these branches; the measure and the upper bound are kept where they are better."""
        costs = np.linalg.norm(weights, axis=1) ** self.problem.power
        found = solve(self.problem, self.outputs(weights), costs, free=self.free, bias=self.bias)
        self.take(weights, found.shares)
        return found

    def take(self, weights: np.ndarray, shares: np.ndarray) -> None:
        """Takes over a measure that is better."""
        weights, shares = _feasible(self.problem, weights, shares, self.bias)
        value = risk(self.problem, weights, shares).upper
        if value < self.upper:
            self.upper, self.weights, self.shares = value, weights, shares

    def bound(self, found: Reduced) -> np.ndarray:
        """Bounds F* by the dual vectors, and returns the branches `[m, p]` that would help."""
        problem, alpha = self.problem, found.alpha
        guess, ends, values = searched(problem, self.look, alpha, found.multiplier, self.weights)
        if problem.structure is not None:
            rows = problem.checked(alpha)
            exact = ceiling(problem, rows, "exact")
            if exact is not None and exact.point is not None:
                made = from_ceiling(problem, rows, exact)
                self.proven = made if self.proven is None or made.value > self.proven.value else self.proven
                self.lower = self.proven.value
                ends, values = np.concatenate([exact.point[None], ends]), np.append(-exact.lower, values)
                if exact.lower > -values[1]:
                    guess = bound_from(problem, alpha, exact.lower, exact.point, "search")
        self.seen = np.concatenate([self.seen, ends[:4]])[-512:]
        if self.proven is not None:
            self.guess = guess if self.guess is None or guess.value > self.guess.value else self.guess
        elif self.guess is None or guess.value > self.guess.value or self.guess.value > self.upper:
            self.guess = self._searched_again(guess)
            self.lower = self.guess.value
        return self._distinct(ends, values)

    def between(self, found: Reduced) -> Reduced:
        """The same with dual vectors halfway to the best so far, where these are estimated.

        Those of a linear program jump from corner to corner (Wentges, International Transactions in Operational
        Research 4, 1997, smooths column generation in this way).
        """
        if self.guess is None or self.proven is not None:
            return found
        alpha = self.problem.conjugate.nearest(0.5 * (self.guess.alpha + found.alpha), self.problem.y)
        return found._replace(alpha=alpha, multiplier=0.5 * (self.guess.multiplier + found.multiplier))

    def _searched_again(self, guess: Bound) -> Bound:
        """The better of the best estimate so far and a new one, both by all branches that any search has come upon.

        The largest of many estimates is one whose search has missed the best branch, unless each is searched again.
        """

        def again(bound: Bound) -> Bound:
            found = searched(self.problem, self.look, bound.alpha, bound.multiplier, self.seen, alone=True)[0]
            return min(bound, found, key=_value)

        return max((again(bound) for bound in (guess, self.guess) if bound is not None), key=_value)

    def _distinct(self, ends: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The best few of these branches that are not copies of one another."""
        kept: list[np.ndarray] = []
        for w, _ in sorted(zip(ends, values, strict=True), key=lambda pair: float(pair[1])):
            if all(np.linalg.norm(w - other) > 1e-3 * (1 + np.linalg.norm(w)) for other in kept):
                kept.append(w)
            if len(kept) == self.spec.added:
                break
        rows = np.array(kept)
        if self.problem.structure is not None and not self.free:  # on the unit ball so far
            norms = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
            ball = self.problem.radius if math.isfinite(self.problem.radius) else 1.0
            rows = np.concatenate([rows / norms * ball * share for share in (1.0, 0.5)])
        return rows


def _value(bound: Bound) -> float:
    return bound.value


def _feasible(
    problem: RiskProblem, weights: np.ndarray, shares: np.ndarray, bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A measure of total share 1 (any for a sum) whose weights meet the constraints exactly."""
    shares = np.maximum(shares, 0.0)
    used = shares > 1e-14 * shares.max(initial=0.0)
    weights, shares = weights[used], shares[used]
    if not len(shares):
        weights, shares = np.zeros((1, problem.one.size)), np.ones(1)
    sum_of = float(shares.sum())
    if problem.scale_free:
        assert problem.structure is not None
        if problem.reduce == "mean":
            weights, shares = weights * sum_of ** (1 / problem.power), shares / (sum_of * (1 + 1e-15))
        weights = problem.structure.with_bias(weights, bias)
    else:
        shares = shares / (sum_of * (1 + 1e-15))
        weights = inside(problem, weights, 1e-13)
    if problem.budget is not None:
        cost = mean_h(problem, weights, shares)
        if cost > problem.budget:
            part = problem.budget / cost * (1 - 1e-14)
            if problem.scale_free:
                weights = weights * part ** (1 / problem.power) * (1 - 1e-15)
            else:  # a share for the zero branch
                weights = np.concatenate([weights, np.zeros((1, problem.one.size))])
                shares = np.append(shares * part, (1 - part) * (1 - 1e-15))
    return weights, shares


def optimum(
    problem: RiskProblem,
    *,
    start: Any = None,
    spec: OptimumSpec = OptimumSpec(),
    seed: int = 0,
    prove: bool = True,
    label: str | None = None,
) -> Certificate:
    """F* from both sides: a measure of branches with its risk, and the best lower bound from dual vectors met.

    Args:
      problem: the risk.
      start: a trained network to start from, a handle or weights `[I, p]`; None: random branches.
      spec: how hard to try.
      seed: of the random branches.
      prove: whether the last bound is proven by the best engine there is, where no exact one has done so in each round:
        the moment relaxation takes seconds, branch and bound more.  Without it such a bound is only estimated, and the
        proven one is that of the least losses.
      label: shows progress under this name; None is silent.

    Returns:
      A `Certificate`; its `history` has the bounds after each round, its `weights` and `shares` the measure.

    Raises:
      TypeError: for a problem that is none.
      ValueError: for a start that does not fit, or a branch that is not finite on W.
    """
    prove = switch(prove, "prove")
    solver, begun = _Solver(given(problem, "certify.optimum"), spec, seed), time.monotonic()
    zero = np.zeros((1, problem.one.size))
    solver.take(zero, np.ones(1))
    scale = solver.upper
    generator = np.random.default_rng(seed)
    if start is None:
        weights = generator.standard_normal((spec.units, problem.one.size))
        size = 1.0 if math.isinf(problem.radius) else 0.3 * problem.radius
        weights *= (
            size / np.linalg.norm(weights, axis=1, keepdims=True) / (spec.units**0.5 if problem.scale_free else 1)
        )
        shares = np.full(spec.units, 1.0 if problem.scale_free else 1 / spec.units)
    else:
        weights = as_weights(problem, start)
        shares = np.full(len(weights), 1.0 if problem.reduce == "sum" else 1 / len(weights))
        if problem.scale_free:
            assert problem.structure is not None
            weights, biases = problem.structure.apart(weights, problem.shape[1])
            solver.bias = shares @ biases
        solver.take(weights, shares)
    history: list[dict[str, Any]] = []
    smooth = problem.conjugate.kind in ("squared", "logistic")
    atoms = np.zeros((0, problem.one.size))
    with Progress(spec.rounds, label or "optimum", at_most=True) as line:
        for k in range(spec.rounds):
            # Corners of a loss are rounded less and less; where bounds are estimated, every other time by 1e-3.
            eps = 1e-2 * 10.0 ** -min(k, 3 if k % 2 == 0 or solver.proven is not None else 1)
            slid, parts, solver.bias = solver.slide(
                weights, shares, solver.bias, eps=1.0 if smooth else eps, steps=spec.steps
            )
            if smooth:
                solver.take(slid, parts)
            atoms = solver.merged(np.concatenate([slid, atoms]))
            found = solver.correct(atoms)
            for turn in range(3):  # new branches alone, which costs little, before all are moved again
                new = solver.bound(found if smooth or turn == 2 else solver.between(found))
                atoms = solver.merged(np.concatenate([atoms[found.shares > 1e-10 * found.shares.max()], new]))
                found = solver.correct(atoms)
            history.append({"round": k, "upper": solver.upper, "lower": solver.lower, "branches": len(solver.shares)})
            if label is not None:
                line.update(k + 1, f"{solver.lower:.8g} to {solver.upper:.8g}")
            if -1e-9 * scale <= solver.upper - solver.lower <= spec.tolerance * scale:
                break
            if spec.seconds and time.monotonic() - begun > spec.seconds:
                break
            weights, shares = atoms, found.shares
            atoms = atoms[found.shares > 1e-10 * found.shares.max()]
    assert solver.guess is not None
    if solver.proven is None and prove:
        bound = _proven(problem, solver.guess, solver.weights, spec, label)
    else:
        bound = proven_again(problem, [least_losses(problem), *filter(None, [solver.proven])])
    measure = risk(problem, solver.weights, solver.shares)
    return assembled(problem, solver.weights, solver.shares, measure, bound, solver.guess, tuple(history))


def _proven(problem: RiskProblem, guess: Bound, points: np.ndarray, spec: OptimumSpec, label: str | None) -> Bound:
    """The bound of the best dual vectors, by the best engine, proven again; else that of the least losses."""
    if problem.structure is not None:
        return best_proven(problem, guess.alpha, spec.bound, label)
    found = [least_losses(problem)]
    if boxes_apply(problem):
        starts = points if guess.point is None else np.concatenate([guess.point[None], points])
        found.append(by_boxes(problem, guess.alpha, guess.multiplier, spec.bound, starts, label))
    return proven_again(problem, found)
