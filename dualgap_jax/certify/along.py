"""Training as the certificate sees it: how much worse each branch is than the best possible one, step by step.

With one lower bound for all steps, such as that of `optimum`, a step costs one pass over the data; with each network's
own dual vectors, or the best multiple of them, every step has a lower bound of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from dualgap_jax.certify.bound import Bound
from dualgap_jax.certify.distance import assembled, distance
from dualgap_jax.certify.primal import as_weights, risk
from dualgap_jax.certify.problem import RiskProblem, given
from dualgap_jax.certify.verify import verify_bound


class Excess(NamedTuple):
    """The branches of a network at T steps; `gap = excess.mean(1) + multiplier * slack + fenchel` up to rounding.

    Attributes:
      steps: `[T]`.
      risk: `[T]`, the regularised risks.
      lower: `[T]`, the proven lower bounds on F*; minus infinity for a bound that is estimated.
      excess: `[T, I]`, `phi(w_i) - min phi`: what branch i adds to the gap, times I; at least 0 if `lower` is proven.
      multiplier: `[T]`.
      slack: `[T]`, what is left of the budget.
      fenchel: `[T]`, what the dual vectors lose against those of the network's own outputs.
    """

    steps: np.ndarray
    risk: np.ndarray
    lower: np.ndarray
    excess: np.ndarray
    multiplier: np.ndarray
    slack: np.ndarray
    fenchel: np.ndarray

    @property
    def gap(self) -> np.ndarray:
        """`[T]`, how far the network is from the optimum at most."""
        return self.risk - self.lower


def _check(problem: RiskProblem, bound: Bound) -> None:
    """Raises TypeError or ValueError for a bound that is none, or none of this problem."""
    if not isinstance(bound, Bound):
        raise TypeError(f"bound is a {type(bound).__name__}; give a Bound, such as optimum(problem).bound.")
    problem.checked(bound.alpha)
    if bound.status == "certified" and not (again := verify_bound(problem, bound)).holds:
        raise ValueError(f"the bound is not proven for this problem: {again.reason}; give one that was made for it.")
    if problem.penalty not in (None, bound.multiplier):
        raise ValueError(f"the bound is one of the penalty {bound.multiplier:g}, not of {problem.penalty:g}.")


def excess_along(
    problem: RiskProblem, networks: Iterable[tuple[int, Any]], *, bound: Bound | None = None, engine: str = "auto"
) -> Excess:
    """The excess of each branch along a training.

    Args:
      problem: the risk, with `reduce='mean'`.
      networks: pairs of a step and the network there, a handle or weights `[I, p]`: checkpoints, in order, all of one
        number of branches.
      bound: a lower bound for all of them, such as `optimum(problem).bound`; None: each by its own dual vectors.
      engine: of these, as in `lower_bound`.

    Raises:
      TypeError: for a problem or a bound that is none.
      ValueError: for no networks, different numbers of branches, a sum of branches, a `bound` of data of another size
        or another penalty, or that calls itself certified and is not proven again for this problem, or what `distance`
        refuses.
    """
    if given(problem, "certify.excess_along").reduce != "mean":
        raise ValueError("the excess of branches adds up to the gap for a mean of branches; use reduce='mean'.")
    if bound is not None:
        _check(problem, bound)
    rows: list[tuple[Any, ...]] = []
    for step, network in networks:
        weights = as_weights(problem, network)
        if rows and len(weights) != len(rows[0][3]):
            raise ValueError(f"step {step} has {len(weights)} branches, the first one {len(rows[0][3])}: give one run.")
        if bound is None:
            found = distance(problem, weights, engine=engine, estimate=False)
        else:
            shares = np.full(len(weights), 1 / len(weights))
            found = assembled(problem, weights, shares, risk(problem, weights, shares), bound, None)
        rows.append((step, found.upper, found.lower, found.excess, found.multiplier, found.slack, found.fenchel))
    if not rows:
        raise ValueError("give at least one pair of a step and a network.")
    return Excess(*(np.array(column) for column in zip(*rows, strict=True)))
