"""Theorem 1, computed and certified: value functions of one branch, and the duality gap for any number of branches.

    problem = duality.branch_problem(branch, dataset, tau=5.0, radius=2.0)         # g, h and W of one branch
    function = duality.search.search(problem, problem.grid(1025))                  # v on a grid: estimated
    function = duality.certify(problem, function)                                  # and proven, for few parameters
    rows = duality.verdicts([function], budget, [[1], [10], [1000]], delta_lower=...)

`gap` computes from value functions alone; `problem`, `search`, `branch_and_bound` (over `intervals`) and `closed_forms`
find them; `deltas` bounds Delta.
"""

from dualgap_jax.duality.branch_and_bound import BoundSpec, certify
from dualgap_jax.duality.gap import (
    Allocation,
    Gap,
    ValueFunction,
    Verdict,
    allocate,
    branch_weights,
    gap_from_value_function,
    verdicts,
)
from dualgap_jax.duality.problem import Problem, branch_problem, primal_risk
from dualgap_jax.duality.search import SearchSpec

__all__ = [
    "Allocation",
    "BoundSpec",
    "Gap",
    "Problem",
    "SearchSpec",
    "ValueFunction",
    "Verdict",
    "allocate",
    "branch_problem",
    "branch_weights",
    "certify",
    "gap_from_value_function",
    "primal_risk",
    "verdicts",
]
