"""How far a network is from the global optimum: proven lower bounds on the regularised risk of any number of branches.

    problem = certify.risk_problem(branch, dataset, losses.logistic(), penalty=1e-3)
    found = certify.distance(problem, solution.network)           # of a trained network, by its own dual vectors
    print(found.as_text())
    best = certify.optimum(problem, start=solution.network)       # F* from both sides
    certify.verify_bound(problem, found.bound)                    # proven again, with arithmetic of its own

`F*` is the least regularised risk over all probability measures of branches, so at most that of I branches for every I.
`assess` tries several dual vectors on a trained network, `excess_along` follows its branches through training.
`kinds` bounds networks that mix branches of several kinds.
`bounds` proves lower bounds on it from dual vectors, over what `engines` prove about one branch (`closed`, `cells`,
`weighted`, `moments`, branch and bound from `duality`); `optimum` finds the measure and the dual vectors (over
`sliding`, `reduced` and `search`); `primal` evaluates networks with all rounding; `verify` goes through a proof again.
"""

from dualgap_jax.certify.along import Excess, excess_along
from dualgap_jax.certify.assess import Assessment, assess
from dualgap_jax.certify.bound import Bound
from dualgap_jax.certify.bounds import lower_bound, lower_estimated
from dualgap_jax.certify.certificate import Certificate
from dualgap_jax.certify.distance import distance
from dualgap_jax.certify.kinds import MixedBound, MixedCertificate, mixed_bound, mixed_distance, verify_mixed
from dualgap_jax.certify.optimum import OptimumSpec, optimum
from dualgap_jax.certify.problem import RiskProblem, risk_problem
from dualgap_jax.certify.verify import verify_bound

__all__ = [
    "Assessment",
    "Bound",
    "Certificate",
    "Excess",
    "MixedBound",
    "MixedCertificate",
    "OptimumSpec",
    "RiskProblem",
    "assess",
    "distance",
    "excess_along",
    "lower_bound",
    "lower_estimated",
    "mixed_bound",
    "mixed_distance",
    "optimum",
    "risk_problem",
    "verify_bound",
    "verify_mixed",
]
