"""What `duality_gap` may call certified: the rows of which every premise and every conclusion was proven once more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dualgap_jax.duality import deltas
from dualgap_jax.duality.allocation import Allocation
from dualgap_jax.duality.clipped import Clipped, clipped_hinge
from dualgap_jax.duality.problem import Problem
from dualgap_jax.duality.proofs import prove
from dualgap_jax.duality.theorem import Effort
from dualgap_jax.duality.values import Status, ValueFunction
from dualgap_jax.duality.verdict import Verdict
from dualgap_jax.terminal import Progress


class Rows(NamedTuple):
    """Rows of a record, and what the checkers say.

    Attributes:
      rows: one a verdict, with `status` 'estimated' and `verdict` 'undecided' where a proof was not found again.
      status: of the premises, hence of the combination behind Delta.
      verified: what was proven again, for the record.
    """

    rows: list[dict[str, Any]]
    status: Status
    verified: dict[str, Any]


def proven_rows(
    problem: Problem,
    function: ValueFunction,
    delta: deltas.Combination,
    found: Sequence[Verdict],
    allocations: Sequence[Allocation],
) -> Rows:
    """The rows of the verdicts; those called certified were proven once more, from the network to the printed digits.

    Args:
      problem: the one-branch problem.
      function: its value function.
      delta: the combination behind Delta.
      found: the verdicts.
      allocations: of the same numbers of branches.
    """
    with Progress(None, "independent proof"):
        again = prove(problem, function, delta, found, allocations)
    rows: list[dict[str, Any]] = []
    for verdict, allocation, by in zip(found, allocations, again.rows, strict=True):
        row: dict[str, Any] = {**verdict._asdict(), "proven_by": by}
        if verdict.status == "certified" and by is None:
            row |= {"status": "estimated", "verdict": "undecided"}
        counts = allocation.counts[0]
        budgets = [[float(function.budgets[j]), counts[j]] for j in sorted(counts)]
        rows.append({**row, "allocation": budgets, "method": allocation.method})
    record = {
        "function": again.premises,
        "boxes": again.boxes,
        "rows": sum(by is not None for by in again.rows),
        "failures": again.failures,
    }
    return Rows(rows, "certified" if again.premises else "estimated", record)


def hinge_rows(
    problem: Problem, function: ValueFunction, budget: float, counts: Sequence[int], effort: Effort, *, seed: int
) -> tuple[dict[str, Any], Clipped]:
    """Bounds on inf(P) with the hinge as it is, for a record; what was not proven again is estimated.

    Args:
      problem: the one-branch problem, of labels -1 and +1.
      function: its value function, from whose minimisers the search starts.
      budget: K.
      counts: the values of I.
      effort: of the search and the proof.
      seed: of the search.
    """
    picked = np.linspace(0, len(function.budgets) - 1, 17).astype(int)
    cloud = None if function.minimisers is None else function.minimisers[picked]
    with Progress(None, "the hinge with its maximum"):
        found = clipped_hinge(problem, budget, list(counts), effort=effort, seed=seed, cloud=cloud)
    rows = []
    for row in found.rows:
        printed: dict[str, Any] = {"num_branches": row.num_branches, "lower": row.lower, "upper": row.upper}
        for name in ("lower", "upper"):
            printed[f"{name}_status"] = getattr(row, f"{name}_status")
        rows.append({**printed, "counts": list(row.counts)})
    record = {
        "rows": rows,
        "multiplier": found.multiplier,
        "mean_weight": float(found.weights.mean()),
        "method": found.function.method,
        "failures": [reason for reason in found.reasons.values() if reason],
    }
    return record, found
