"""Speed of Theorem 1: inf(P) for a million branches, and the value-function search beside bare matrix products.

    python benchmarks/duality_gap.py [--json FILE] [--smoke]

**inf(P)** on a grid of 4,097 budgets for I = 10^6, for a concave and for an S-shaped value function: exactly, by the
group relaxation, and by repeated squaring with rounding.  Goal: 10 s each; given as the ratio of the goal to the time.

**Search.** A branch evaluation is g and its gradient for one branch on the whole data set.  Its operations are those of
the branch's matrix products: forward and weight gradients of all layers, input gradients of all but the first.  The
limit is the rate of two bare jitted products of the first layer's shapes, forward and weight gradient, for all
particles at once.  The call that is timed is the search's own kernel, projection and step control included, after
compilation.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

from dualgap_jax.duality.allocation import Allocation, allocate
from dualgap_jax.duality.problem import Problem, branch_problem
from dualgap_jax.duality.search import descend
from dualgap_jax.networks import mlp

_GOAL_SECONDS = 10.0
_OVER_GOAL, _OF_LIMIT = "goal_over_time", "of_limit"
_SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "concave": lambda b: 1 - b**1.5,
    "S-shaped": lambda b: 1 - 3 * b**2 + 2 * b**3,
}


def primal_row(shape: str, method: str, points: int, count: int, rounds: int) -> dict[str, Any]:
    """The time of one allocation of the budget, and the width of its two-sided bound."""
    b = np.linspace(0, 1, points)
    v = np.minimum.accumulate(_SHAPES[shape](b))

    def call() -> Allocation:
        return allocate([b], [v], 0.381966, [count], method=method)

    seconds = common.interleave({"call": call}, rounds)["call"]
    found = call()
    row = {
        "case": f"inf(P), {shape}, {method}, I={count:,}, m={points:,}",
        "milliseconds": common.spread(1e3 * seconds),
        "width": found.value - found.lower,
        "evaluations_per_second": common.NOT_MEASURED,
        "gflops": common.NOT_MEASURED,
        "limit_gflops": common.NOT_MEASURED,
        _OF_LIMIT: common.NOT_MEASURED,
        _OVER_GOAL: common.spread(_GOAL_SECONDS / seconds),
    }
    targets = (common.Target(_OVER_GOAL, 1.0),) if points == 4097 else ()
    return {**row, "targets": common.judge(row, targets)}


def operations(widths: Sequence[int], examples: int) -> int:
    """Floating-point operations of g and its gradient for one branch; no input gradient of the first layer."""
    products = [2 * a * b * examples for a, b in itertools.pairwise(widths)]
    return 2 * sum(products) + sum(products[1:])


def search_row(side: int, hidden: tuple[int, ...], examples: int, particles: int, rounds: int) -> dict[str, Any]:
    """Branch evaluations a second of the search's kernel, and the rate of the bare products."""
    data = common.random_images((side, side, 1), examples)
    problem: Problem = branch_problem(mlp(hidden, 10), data, tau=100.0, radius=5.0)
    steps = 4
    kernel = descend(problem, steps)
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((particles, problem.size)), jnp.float32)
    radii = jnp.full(particles, 5.0, jnp.float32)
    rows, d = particles * hidden[0], side * side
    kernels = jnp.asarray(rng.standard_normal((rows, d)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((d, examples)), jnp.float32)
    gradient = jnp.asarray(rng.standard_normal((rows, examples)), jnp.float32)
    product = jax.jit(jnp.matmul)
    x_rows = jnp.asarray(np.ascontiguousarray(np.asarray(x).T))
    seconds = common.interleave(
        {
            "search": lambda: kernel(w, radii),
            "forward": lambda: product(kernels, x),
            "weight gradient": lambda: product(gradient, x_rows),
        },
        rounds,
    )
    evaluations = particles * (steps + 1)
    rate = evaluations * operations((d, *hidden, 10), examples) / seconds["search"]
    limit = 2 * 2 * rows * d * examples / (seconds["forward"] + seconds["weight gradient"])
    row = {
        "case": f"search, {d}-{'-'.join(map(str, hidden))}-10, n={examples:,}, {particles:,} particles",
        "milliseconds": common.spread(1e3 * seconds["search"]),
        "width": common.NOT_MEASURED,
        "evaluations_per_second": common.spread(evaluations / seconds["search"]),
        "gflops": common.spread(rate / 1e9),
        "limit_gflops": common.spread(limit / 1e9),
        _OF_LIMIT: common.spread(rate / limit),
        _OVER_GOAL: common.NOT_MEASURED,
    }
    return {**row, "targets": {}}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes the JSON file."""
    flags = common.arguments("Theorem 1: inf(P) for many branches, value-function search.", rounds=5).parse_args(argv)
    where = common.environment()
    rounds = 1 if flags.smoke else flags.rounds
    points, count = (65, 1000) if flags.smoke else (4097, 10**6)
    rows = []
    for shape, method in itertools.product(_SHAPES, ("group", "squaring")):
        print(f"measuring inf(P), {shape}, {method}", file=sys.stderr)
        rows.append(primal_row(shape, method, points, count, rounds))
    cases = [(4, (2,), 16, 8)] if flags.smoke else [(28, (8,), 1000, 256), (28, (8, 8), 1000, 256)]
    for case in cases:
        print(f"measuring the search, {case}", file=sys.stderr)
        rows.append(search_row(*case, rounds))
    results = {"benchmark": "duality_gap", "environment": where, "smoke": flags.smoke, "rounds": rounds, "rows": rows}
    columns = {
        "case": "case",
        "milliseconds": "ms",
        "width": "width of the bound",
        _OVER_GOAL: "goal / time",
        "evaluations_per_second": "branch evaluations / s",
        "gflops": "GFLOP/s",
        "limit_gflops": "bare products, GFLOP/s",
        _OF_LIMIT: "ratio",
    }
    notes = ["Medians (least-largest) over the rounds. Width 0: the allocation is optimal on the grid."]
    common.report(results, columns, notes, flags.json)


if __name__ == "__main__":
    main()
