"""Boxes and seconds of branch and bound against the parameters p and the examples n, and of its second proof.

    python benchmarks/branch_and_bound.py [--case P N ...] [--tolerance T] [--boxes B]

The branch is `a tanh(u.x)` with u of p - 1 inputs, the labels are random, W the ball of radius 2, tau = 2, and v is
wanted at 257 budgets.  `solve` is branch and bound alone, once its programs are compiled: the search before it, and
compilation (with some boxes), are given apart.  `verify` goes through the boxes again in NumPy.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from dualgap_jax.data import Dataset
from dualgap_jax.duality import BoundSpec, SearchSpec, branch_problem, certify
from dualgap_jax.duality.checker.value_functions import verify_boxes
from dualgap_jax.duality.search import search
from dualgap_jax.networks import mlp

CASES = [(2, 30), (2, 200), (2, 500), (3, 30), (3, 100), (3, 500), (4, 30), (4, 100)]


def data(inputs: int, n: int) -> Dataset:
    """Gaussian inputs with labels at random."""
    rng = np.random.default_rng([inputs, n])
    x, y = rng.standard_normal((n, inputs)).astype(np.float32), rng.choice([-1.0, 1.0], n).astype(np.float32)
    one = np.ones(1, np.float32)
    return Dataset("random", x, y, 0 * one, one, 1, "binary", {})


def row(p: int, n: int, tolerance: float, boxes: int) -> str:
    """One line of the table."""
    problem = branch_problem(mlp((1,), 1, activation="tanh", use_bias=False), data(p - 1, n), tau=2.0, radius=2.0)
    times = [time.perf_counter()]
    found = search(problem, problem.grid(257), SearchSpec(8, 24, 80, 1, 4), dtype=np.float64)
    times.append(time.perf_counter())
    certify(problem, found, BoundSpec(tolerance, 400))
    times.append(time.perf_counter())
    proven = certify(problem, found, BoundSpec(tolerance, boxes))
    times.append(time.perf_counter())
    again = verify_boxes(problem, proven)
    times.append(time.perf_counter())
    searched, compiled, solved, verified = np.diff(times)
    state = proven.method.removeprefix("branch and bound, ")
    return (
        f"| {p} | {n} | {state} | {proven.tolerance:.2g} | {solved:.1f} | {verified:.1f} |"
        f" {'yes' if again.holds else again.reason} | {searched:.0f} + {compiled:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--case", type=int, nargs=2, action="append", metavar=("P", "N"))
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--boxes", type=int, default=100_000)
    given = parser.parse_args()
    print("| p | n | boxes | reached | solve, s | verify, s | proven again | search + compilation, s |")
    print("|---|---|---|---|---|---|---|---|")
    for p, n in given.case or CASES:
        print(row(p, n, given.tolerance, given.boxes), flush=True)


if __name__ == "__main__":
    main()
