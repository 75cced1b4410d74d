"""Seconds of a claim and of its second proof: Theorem 1 by three routes, Theorem 2, and the distance from the optimum.

    python benchmarks/proofs.py [--smoke]

`solve` is all that makes the claim, compilation included: for Theorem 1 the value function (its search too), Delta and
the verdicts for I = 1, 10, 1,000; `verify` is all that proves it again.  Each runs once, in this order.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dualgap_jax import certify, losses, spectral
from dualgap_jax.data import from_arrays
from dualgap_jax.duality import branch_problem
from dualgap_jax.duality.proofs import prove
from dualgap_jax.duality.theorem import Effort, find_delta, value_function
from dualgap_jax.duality.verdict import Instance, verdicts
from dualgap_jax.networks import mlp

_COUNTS = [1, 10, 1000]


class Case(NamedTuple):
    """A claim: how it is made, and whether it is proven again, from what was made."""

    name: str
    solve: Callable[[], Any]
    verify: Callable[[Any], bool]


def examples(inputs: int, n: int) -> Any:
    """Gaussian inputs with labels at random."""
    rng = np.random.default_rng([inputs, n])
    return from_arrays(rng.standard_normal((n, inputs)).astype(np.float32), rng.choice([-1.0, 1.0], n))


def theorem_1(name: str, branch: Any, inputs: int, n: int, tau: float) -> Case:
    """Value function, Delta and verdicts, and the checkers of all three."""
    problem = branch_problem(branch, examples(inputs, n), tau=tau, radius=2.0)

    def solve() -> Any:
        budget = float(problem.grid(257)[64])
        function = value_function(problem, 257, budget=budget, num_branches=max(_COUNTS))
        delta = find_delta(problem, function, Effort().search)
        rows = verdicts(function, budget, _COUNTS, delta_lower=delta)
        return function, delta, rows, [Instance([function], budget).allocation([k]) for k in _COUNTS]

    return Case(f"Theorem 1, {name}", solve, lambda made: all(row is not None for row in prove(problem, *made).rows))


def theorem_2(d: int, n: int) -> Case:
    """The spectral solution with its certificate, and the bounds in NumPy."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((d, n)).astype(np.float32)
    y = (rng.standard_normal((10, d)) @ x / math.sqrt(d) + rng.standard_normal((10, n))).astype(np.float32)
    settings: dict[str, Any] = {"gamma": 5.0, "widths": (9, 9)}

    def verify(found: Any) -> bool:
        again = spectral.verify(
            [(x, y)], **settings, weights=found.weights, coefficients=found.dual_variable.coefficients
        )
        return bool(again.lower <= again.upper and again.relative_gap < 1e-4)

    return Case(f"Theorem 2, d = {d}, n = {n:,}", lambda: spectral.solve(x, y, **settings), verify)


def distance(name: str, branch: Any, inputs: int, n: int, engine: str, radius: float | None = None) -> Case:
    """A lower bound on F* from the dual vectors of the zero network."""
    problem = certify.risk_problem(branch, examples(inputs, n), losses.squared(), penalty=0.05, radius=radius)
    alpha = problem.slope(np.zeros(problem.shape))
    return Case(
        f"certify, {name}",
        lambda: certify.lower_bound(problem, alpha, engine=engine),
        lambda bound: certify.verify_bound(problem, bound).holds,
    )


def cases(smoke: bool) -> dict[str, Callable[[], Case]]:
    """What makes each claim ready, by route; tiny ones for a test."""
    n, large = (12, 40) if smoke else (500, 20_000)
    linear = mlp((4,), 1, activation="identity", use_bias=False)
    unit, tanh = mlp((1,), 1, use_bias=False), mlp((1,), 1, activation="tanh", use_bias=False)
    return {
        "closed form": lambda: theorem_1(f"closed form, d = 10, n = {n}", linear, 10, n, 10.0),
        "cells, d = 2": lambda: theorem_1(f"cells, d = 2, n = {n}", unit, 2, n, 10.0),
        "cells, d = 3": lambda: theorem_1(f"cells, d = 3, n = {n}", unit, 3, n, 10.0),
        "boxes": lambda: theorem_1(f"branch and bound, p = 2, n = {n}", tanh, 1, n, 3.0),
        "theorem 2": lambda: theorem_2(8 if smoke else 300, large),
        "certify cells": lambda: distance(f"cells, d = 3, n = {n}", unit, 3, n, "cells"),
        "certify moments": lambda: distance(f"moments, d = 10, n = {n}", unit, 10, n, "moments"),
        "certify spectral": lambda: distance(f"spectral, d = 10, n = {n}", unit, 10, n, "spectral"),
        "certify boxes": lambda: distance(f"branch and bound, p = 2, n = {n}", tanh, 1, n, "branch and bound", 2.0),
    }


def row(case: Case) -> str:
    """One line of the table."""
    times = [time.perf_counter()]
    made = case.solve()
    times.append(time.perf_counter())
    holds = case.verify(made)
    times.append(time.perf_counter())
    solved, verified = np.diff(times).tolist()
    return f"| {case.name} | {solved:.2f} | {verified:.2f} | {verified / solved:.2f} | {'yes' if holds else 'no'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--smoke", action="store_true", help="tiny problems")
    given = parser.parse_args()
    print("| claim | solve, s | verify, s | verify / solve | proven again |")
    print("|---|---|---|---|---|")
    for made_ready in cases(given.smoke).values():
        print(row(made_ready()), flush=True)


if __name__ == "__main__":
    main()
