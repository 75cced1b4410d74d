"""From the branch to the printed digits once more: what of a set of verdicts the independent checkers prove again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dualgap_jax.duality import deltas
from dualgap_jax.duality.allocation import Allocation
from dualgap_jax.duality.checker import gap
from dualgap_jax.duality.checker.constrained import reached, verify_constrained
from dualgap_jax.duality.checker.value_functions import verify_function
from dualgap_jax.duality.constrained import AnyProblem, ConstrainedProblem
from dualgap_jax.duality.values import ValueFunction
from dualgap_jax.duality.verdict import Verdict


class Proven(NamedTuple):
    """What was proven again.

    Attributes:
      premises: whether the value function and the combination behind Delta were.
      rows: for each verdict the argument behind each of its bounds, by name; None where one did not follow, or where
        the verdict did not call itself certified.
      boxes: how many boxes, or cones of directions, the checker looked at.
      failures: why not, in sentences.
    """

    premises: bool
    rows: list[dict[str, str] | None]
    boxes: int
    failures: list[str]


def prove(
    problem: AnyProblem,
    function: ValueFunction,
    delta: deltas.Combination,
    found: Sequence[Verdict],
    allocations: Sequence[Allocation],
) -> Proven:
    """Goes through every certified verdict again, with arithmetic that shares nothing with the solver.

    Args:
      problem: the one-branch problem.
      function: its value function.
      delta: the combination behind Delta.
      found: the verdicts.
      allocations: of the same numbers of branches.
    """
    if not any(verdict.status == "certified" for verdict in found):
        return Proven(False, [None] * len(found), 0, [])
    multipliers = sorted({verdict.multiplier for verdict in found})
    if isinstance(problem, ConstrainedProblem):
        again = verify_constrained(problem, function, multipliers=multipliers, points=delta.points, values=delta.values)
    else:
        again = verify_function(problem, function, multipliers=multipliers, points=delta.points, values=delta.values)
    failures: list[str] = []
    rows: list[dict[str, str] | None] = [None] * len(found)
    checker = None
    try:
        if not again.holds:
            raise gap.NotProvenError(again.reason)
        checker = gap.Checker(premises(problem, function, delta))
    except gap.NotProvenError as error:
        failures.append(str(error))
    for k, (verdict, allocation) in enumerate(zip(found, allocations, strict=True)):
        if checker is not None and verdict.status == "certified":
            try:
                rows[k] = proven_by(checker, verdict, allocation.counts[0], again.duals)
            except gap.NotProvenError as error:
                failures.append(str(error))
    return Proven(checker is not None, rows, again.boxes, failures)


def premises(problem: AnyProblem, function: ValueFunction, delta: deltas.Combination) -> gap.Premises:
    """What `checker.gap` takes as proven of one kind of branch."""
    known = gap.Premises(
        function.budgets, function.lower, function.upper, function.concave, function.slope, problem.one.radius,
        problem.one.power, delta.points, delta.weights, delta.values,
    )  # fmt: skip
    if not isinstance(problem, ConstrainedProblem):
        return known
    return known._replace(floor=function.floor, middle=reached(problem, function, delta.points, delta.weights))


def proven_by(
    checker: gap.Checker, verdict: Verdict, counts: Mapping[int, int], duals: Mapping[float, float]
) -> dict[str, str]:
    """The argument for each bound of a row.  Raises `NotProvenError`."""
    row = gap.row_of(verdict._asdict(), counts)
    if not row.dual_value <= duals.get(row.multiplier, -float("inf")):
        row = row._replace(dual_value=-float("inf"))  # then only the grid's own bound on Q counts
    return checker.check(row)
