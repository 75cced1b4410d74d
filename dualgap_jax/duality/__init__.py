"""Theorem 1, computed and certified: value functions of one branch, and the duality gap for any number of branches.

    problem = duality.branch_problem(branch, dataset, tau=5.0, radius=2.0)         # g, h and W of one branch
    found = duality.theorem1(problem, budget, [1, 10, 1000])                       # all of what follows

    function = duality.search.search(problem, problem.grid(1025))                  # v on a grid: estimated
    function = duality.certify(problem, function)                                  # and proven, for few parameters
    delta = duality.deltas.best_lower_bound(problem, function)                     # a convex combination of weights
    rows = duality.verdicts(function, budget, [1, 10, 1000], delta_lower=delta)    # certified, estimated

With h and W of one's own the problem comes from `constrained_problem`, see `constrained`.

`gap` and `verdict` compute from value functions alone (over `units`, `envelope`, `allocation` and `min_plus`);
`problem`, `search`, `branch_and_bound` (over `boxes`, the ranges of `bounding`, and `programs`) and `closed_forms` find
them; `deltas` bounds Delta, and `margins` decides Assumption 1, without which `clipped` bounds the hinge as it is.
`constrained`, `constrained_search` and `constrained_bounds` do the same for h of one's own over the `sets`.  `checker`
proves value functions and the numbers of a record again, with nothing of `bounding`, and `proofs` says what of a set of
verdicts it proves; `trained` and `population` compare with SGD and with fresh samples.
"""

from dualgap_jax.duality.allocation import Allocation, allocate
from dualgap_jax.duality.branch_and_bound import BoundSpec, certify
from dualgap_jax.duality.constrained import ConstrainedProblem, constrained_problem
from dualgap_jax.duality.gap import Gap, branch_weights, gap_from_value_function
from dualgap_jax.duality.problem import Problem, branch_problem
from dualgap_jax.duality.risk import primal_risk
from dualgap_jax.duality.search import SearchSpec
from dualgap_jax.duality.sets import ball, box, product
from dualgap_jax.duality.theorem import Effort, Theorem, theorem1
from dualgap_jax.duality.values import ValueFunction
from dualgap_jax.duality.verdict import Verdict, verdicts

__all__ = [
    "Allocation",
    "BoundSpec",
    "ConstrainedProblem",
    "Effort",
    "Gap",
    "Problem",
    "SearchSpec",
    "Theorem",
    "ValueFunction",
    "Verdict",
    "allocate",
    "ball",
    "box",
    "branch_problem",
    "branch_weights",
    "certify",
    "constrained_problem",
    "gap_from_value_function",
    "primal_risk",
    "product",
    "theorem1",
    "verdicts",
]
