"""Theorem 1 in one call: the value function by the best route there is, Delta, and the verdicts."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from dualgap_jax.duality import closed_forms, constrained_bounds, constrained_search, deltas
from dualgap_jax.duality.branch_and_bound import MAX_PARAMETERS, BoundSpec, certify
from dualgap_jax.duality.constrained import AnyProblem, ConstrainedProblem
from dualgap_jax.duality.margins import recognise
from dualgap_jax.duality.problem import Problem
from dualgap_jax.duality.proofs import Proven, prove
from dualgap_jax.duality.search import NotANumberError, SearchSpec, kappa_by_search, local_minima, search
from dualgap_jax.duality.units import as_counts
from dualgap_jax.duality.values import ValueFunction, number
from dualgap_jax.duality.verdict import Instance, Verdict, verdicts
from dualgap_jax.registry import unknown
from dualgap_jax.sizes import positive, switch

T = TypeVar("T")
Route = Literal["auto", "closed_form", "bound", "search"]
ROUTES = ("auto", "closed_form", "bound", "search")
HOMOGENEOUS = ("relu", "leaky_relu", "identity")
_BOUND_UP_TO = 4  # parameters for which 'auto' chooses branch and bound
_CLOUD_UP_TO = 64  # parameters for which local minima are looked for, for Delta


@dataclasses.dataclass(frozen=True)
class Effort:
    """How a value function is found.

    Attributes:
      route: 'closed_form' (a bias-free mlp with a positively homogeneous activation), 'bound' (branch and bound),
        'search', or 'auto': the first of them that applies, 'bound' up to 4 parameters.
      search: how hard to search.
      bound: how far branch and bound goes for the value function.
      dual: how far for Q at the multiplier; its tolerance is lowered where the largest I needs it.

    Raises:
      ValueError: for an unknown route.
    """

    route: str = "auto"
    search: SearchSpec = SearchSpec()
    bound: BoundSpec = BoundSpec(1e-3, 300_000)
    dual: BoundSpec = BoundSpec(1e-8, 300_000)

    def __post_init__(self) -> None:
        if self.route not in ROUTES:
            raise ValueError(unknown("route", self.route, ROUTES))


class Theorem(NamedTuple):
    """What `theorem1` found.

    Attributes:
      function: the value function.
      delta: the combination behind Delta.
      rows: a verdict a number of branches; 'certified' is only what was proven again.
      proof: what the independent checkers proved again, and why not where they did not.
    """

    function: ValueFunction
    delta: deltas.Combination
    rows: list[Verdict]
    proof: Proven


def _kappa(problem: Problem, spec: SearchSpec, seed: int) -> closed_forms.Kappa | None:
    """kappa of a positively homogeneous branch; None for every other."""
    known = recognise(problem)
    if known is None or known.activation not in HOMOGENEOUS:
        return None
    x, widths = problem.x.reshape(len(problem.x), -1), known.widths
    if known.activation == "identity" or not widths:
        return closed_forms.kappa_linear(x, problem.c, tau=problem.tau, widths=widths)
    narrow = len(widths) == 1 or (widths and max(widths) == 1)
    if known.activation == "relu" and problem.c.shape[1] == 1 and x.shape[1] <= 3 and narrow:
        return closed_forms.kappa_relu_chain(x, problem.c[:, 0], tau=problem.tau, widths=widths)
    degree = len(widths) + 1
    return _in_enough_digits(lambda dtype: kappa_by_search(problem, spec, seed=seed, dtype=dtype, degree=degree), 1.0)


def _dual_effort(spec: BoundSpec, problem: AnyProblem, found: ValueFunction, num_branches: int) -> BoundSpec:
    """How sharp sup(D) has to be: at most a tenth of `(2 / I) Delta` at the largest I, where it is least."""
    needed = 0.2 / num_branches * deltas.best_lower_bound(problem, found).delta
    tolerance = min(spec.tolerance, needed) if needed > 0 else spec.tolerance
    return dataclasses.replace(spec, tolerance=max(tolerance, 1e-14))


def value_function(
    problem: AnyProblem,
    points: int,
    effort: Effort = Effort(),
    *,
    budget: float = math.inf,
    num_branches: int = 1,
    seed: int = 0,
    quick: bool = False,
    label: str | None = None,
) -> ValueFunction:
    """The value function of a branch, certified where a route proves it.

    The status 'certified' is the solver's own word, which `theorem1` has the checker confirm.

    Args:
      problem: the one-branch problem.
      points: of the grid of budgets.
      effort: the route, and how hard to try.
      budget: K; with h of one's own the grid is laid so that K is a point of it, unless it is next to the least h.
      num_branches: the largest I that verdicts are wanted for.
      seed: of the search.
      quick: no branch and bound, and a quarter of the starts; for repetitions on fresh samples.
      label: shows progress under this name; None is silent.

    Raises:
      ValueError: for a route that does not apply.
    """
    quick = switch(quick, "quick")
    if isinstance(problem, ConstrainedProblem):
        return _constrained(problem, points, effort, budget, num_branches, seed, label)
    budgets = problem.grid(points)
    kappa = _kappa(problem, effort.search, seed) if effort.route in ("auto", "closed_form") else None
    if kappa is not None and kappa.degree is not None:
        return closed_forms.homogeneous_value_function(
            kappa,
            degree=kappa.degree,
            power=problem.power,
            radius=problem.radius,
            budgets=budgets,
            offset=problem.offset,
        )
    if effort.route == "closed_form":
        raise ValueError("route='closed_form' needs a bias-free mlp with relu, leaky_relu or identity.")
    spec = effort.search
    if quick:
        spec = dataclasses.replace(spec, starts=max(1, spec.starts // 4))
    small = problem.size <= MAX_PARAMETERS
    name = None if label is None else f"{label}search"

    def in_dtype(dtype: Any) -> ValueFunction:
        return search(problem, budgets, spec, seed=seed, dtype=dtype, label=name)

    found = in_dtype(np.float64) if small else _in_enough_digits(in_dtype, problem.radius)
    if quick or effort.route == "search" or (effort.route == "auto" and problem.size > _BOUND_UP_TO):
        return found
    dual = _dual_effort(effort.dual, problem, found, num_branches)
    return certify(problem, found, effort.bound, dual=dual, label=None if label is None else f"{label}branch and bound")


def _constrained(
    problem: ConstrainedProblem, points: int, effort: Effort, budget: float, num_branches: int, seed: int,
    label: str | None,
) -> ValueFunction:  # fmt: skip
    """The value function with h and W of one's own: a search, and branch and bound where the route asks for it."""
    if effort.route == "closed_form":
        raise ValueError("route='closed_form' needs h and W that are those of a norm; see `branch_problem`.")
    sizes = constrained_bounds.sizes(problem, seed=seed)
    budgets = constrained_bounds.grid(sizes, budget, points)
    found = constrained_search.search(problem, budgets, sizes, effort.search, seed=seed)
    if effort.route == "search" or (effort.route == "auto" and problem.size > _BOUND_UP_TO):
        return found
    dual = _dual_effort(effort.dual, problem, found, num_branches)
    name = None if label is None else f"{label}branch and bound"
    return constrained_bounds.certify(problem, found, sizes, effort.bound, dual=dual, label=name)


def find_delta(problem: AnyProblem, function: ValueFunction, spec: SearchSpec, *, seed: int = 0) -> deltas.Combination:
    """The best lower bound on Delta, with the local minima of g among the points where the branch is small.

    Where it is certified, that is the solver's own word, which `theorem1` has the checker confirm.
    """
    if isinstance(problem, ConstrainedProblem):
        return deltas.best_lower_bound(problem, function)
    cloud = _cloud(problem, function, spec, seed) if problem.size <= _CLOUD_UP_TO else None
    return deltas.best_lower_bound(problem, function, cloud)


def _cloud(problem: Problem, function: ValueFunction, spec: SearchSpec, seed: int) -> np.ndarray | None:
    """Local minima of g; None where not even float64 holds it, and a proof says that it is finite on W."""
    try:
        return _in_enough_digits(lambda dtype: local_minima(problem, spec, seed=seed, dtype=dtype), problem.radius)
    except NotANumberError:
        if function.status != "certified":
            raise
    return None


def _in_enough_digits(run: Callable[[Any], T], radius: float) -> T:
    """A search in float32, or in float64 where float32 does not hold g, or the squares of weights of this norm."""
    if 1e-15 < radius < 1e15:
        with contextlib.suppress(NotANumberError):
            return run(np.float32)
    return run(np.float64)


def theorem1(
    problem: AnyProblem,
    budget: Any,
    num_branches: Sequence[int] | int,
    *,
    points: int = 1025,
    effort: Effort = Effort(),
    seed: int = 0,
    label: str | None = None,
) -> Theorem:
    """Theorem 1 on one instance: value function, Delta and verdicts, with the effort that the largest I needs.

    Args:
      problem: the one-branch problem, from `branch_problem` or, with h and W of one's own, `constrained_problem`.
      budget: K, the bound on the mean h of the branches; bounds are sharpest where it is a point of
        `problem.grid(points)`.  inf drops the constraint.
      num_branches: the values of I.
      points: of the grid of budgets.
      effort: the route to the value function, and how hard to try.
      seed: of the searches.
      label: shows progress under names that begin with it, such as ''; None is silent.

    Returns:
      The rows in the order of `num_branches`; `status` and `verdict` say what is proven.  What the solver proved and
      the checkers did not is 'estimated', and `proof.failures` says why.

    Raises:
      TypeError: for a problem or an effort that is none.
      ValueError: for numbers out of range, or a branch whose outputs are not finite on W.
    """
    if not isinstance(problem, Problem | ConstrainedProblem):
        raise TypeError(f"theorem1 takes what branch_problem or constrained_problem made, got {problem!r:.60}.")
    if not isinstance(effort, Effort):
        raise TypeError(f"effort={effort!r:.60} must be a duality.Effort.")
    counts, limit = as_counts(num_branches), number("budget K", budget, infinite=True)
    points = positive(points, "points")
    function = value_function(problem, points, effort, budget=limit, num_branches=max(counts), seed=seed, label=label)
    delta = find_delta(problem, function, effort.search, seed=seed)
    rows = verdicts(function, limit, counts, delta_lower=delta)
    instance = Instance([function], limit)
    again = prove(problem, function, delta, rows, [instance.allocation([n]) for n in counts])
    if not again.premises:  # a copy carries no mark
        function, delta = dataclasses.replace(function), dataclasses.replace(delta)
    for k, row in enumerate(rows):
        if again.rows[k] is None:
            rows[k] = row._replace(status="estimated", verdict="undecided")
        elif row.verdict == "refuted" and isinstance(problem, ConstrainedProblem):
            rows[k] = row._replace(verdict="undecided")  # that h is convex is not proven
    return Theorem(function, delta, rows, again)
