"""Theorem 1 for networks of two kinds of branches: each I is shared between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dualgap_jax.duality import deltas
from dualgap_jax.duality.checker.gap import NotProvenError
from dualgap_jax.duality.checker.mixed import Kind, check_mixed
from dualgap_jax.duality.checker.value_functions import verify_function
from dualgap_jax.duality.problem import Problem
from dualgap_jax.duality.proofs import premises
from dualgap_jax.duality.search import SearchSpec
from dualgap_jax.duality.theorem import find_delta
from dualgap_jax.duality.values import ValueFunction
from dualgap_jax.duality.verdict import Instance, Verdict, verdicts
from dualgap_jax.experiments.duality_report import curve, dual_curve
from dualgap_jax.terminal import Progress


class Solved(NamedTuple):
    """One kind of branch: its problem, value function and combination, and what was proven of them again."""

    problem: Problem
    function: ValueFunction
    delta: deltas.Combination
    kind: Kind | None
    duals: dict[float, float]
    reason: str


class Mixed(NamedTuple):
    """The rows of a record, what was verified, and the parts."""

    rows: list[dict[str, Any]]
    verified: dict[str, Any]
    parts: list[Solved]
    found: list[Verdict]


def shared(num_branches: int, share: float) -> tuple[int, int]:
    """How many of I branches are of the first kind and of the second."""
    second = min(num_branches, math.floor(num_branches * share + 0.5))
    return num_branches - second, second


def mixed_rows(
    problems: list[Problem],
    solve: Callable[[Problem], ValueFunction],
    search: SearchSpec,
    budget_of: Callable[[ValueFunction], float],
    num_branches: tuple[int, ...],
    share: float,
    *,
    seed: int,
) -> Mixed:
    """Verdicts on mixtures of two kinds of branches, each bound proven twice or called estimated.

    Args:
      problems: the one-branch problems, on one data set with one W and h.
      solve: the value function of a problem.
      search: for the points behind Delta.
      budget_of: K, from the grid.
      num_branches: the values of I.
      share: of the branches that are of the second kind.
      seed: of the searches.
    """
    functions = [solve(problem) for problem in problems]
    combinations = [find_delta(p, f, search, seed=seed) for p, f in zip(problems, functions, strict=True)]
    budget = budget_of(functions[0])
    found, allocations, present = [], [], []
    for count in num_branches:
        numbers = shared(count, share)
        which = [k for k in (0, 1) if numbers[k]]
        some, of_them = [functions[k] for k in which], [numbers[k] for k in which]
        (row,) = verdicts(some, budget, [of_them], delta_lower=[combinations[k] for k in which])
        found.append(row)
        allocations.append(Instance(some, budget).allocation(of_them))
        present.append(which)
    parts = []
    for k, (problem, function, delta) in enumerate(zip(problems, functions, combinations, strict=True)):
        lams = sorted({row.multiplier for row, which in zip(found, present, strict=True) if k in which})
        parts.append(_proven(problem, function, delta, lams))
    rows, failures = [], [part.reason for part in parts if part.reason]
    for row, allocation, which in zip(found, allocations, present, strict=True):
        printed: dict[str, Any] = {**row._asdict(), "proven_by": None}
        if row.status == "certified":
            try:
                printed |= _checked(row, [parts[k] for k in which], allocation.counts)
            except NotProvenError as error:
                failures.append(str(error))
                printed |= {"status": "estimated", "verdict": "undecided"}
        kinds = [0, 0]
        for k, counts in zip(which, allocation.counts, strict=True):
            kinds[k] = sum(counts.values())
        shares = [
            [k, float(functions[k].budgets[j]), counts[j]]
            for k, counts in zip(which, allocation.counts, strict=True)
            for j in sorted(counts)
        ]
        rows.append({**printed, "kinds": kinds, "allocation": shares, "method": allocation.method})
    verified = {
        "function": all(part.kind is not None for part in parts),
        "boxes": 0,
        "rows": sum(row["proven_by"] is not None for row in rows),
        "failures": failures,
    }
    return Mixed(rows, verified, parts, found)


def _proven(problem: Problem, function: ValueFunction, delta: deltas.Combination, lams: list[float]) -> Solved:
    """The premises of one kind, proven again where they are called certified."""
    if function.status != "certified" or delta.status != "certified":
        return Solved(problem, function, delta, None, {}, "")
    with Progress(None, "independent proof"):
        again = verify_function(problem, function, multipliers=lams, points=delta.points, values=delta.values)
    if not again.holds:
        return Solved(problem, function, delta, None, {}, again.reason)
    try:
        return Solved(problem, function, delta, Kind(premises(problem, function, delta)), dict(again.duals), "")
    except NotProvenError as error:
        return Solved(problem, function, delta, None, {}, str(error))


def _checked(row: Verdict, parts: list[Solved], counts: Any) -> dict[str, Any]:
    """The row's changes with the argument for each bound; inf(P) is bounded by sup(D) where no more is proven."""
    kinds = [part.kind for part in parts if part.kind is not None]
    if len(kinds) < len(parts):
        raise NotProvenError(f"I = {row.num_branches:,}: the premises were not proven again.")
    duals = [part.duals.get(row.multiplier, -math.inf) for part in parts]
    weaker = row._replace(primal_lower=row.dual_lower, gap_lower=0.0)
    for one in (row, weaker):
        try:
            by = check_mixed(kinds, counts, row.budget, row.multiplier, duals, one._asdict())
            return {**one._asdict(), "proven_by": by}
        except NotProvenError as error:
            if one is weaker or not str(error).startswith("primal_lower"):
                raise
    raise AssertionError


def assumption(parts: list[Solved], counts: list[list[int]], certified: bool) -> dict[str, Any]:
    """The check of Assumption 1 for a record: the largest proven margin of the kinds that take part."""
    used = [part for k, part in enumerate(parts) if any(c[k] for c in counts)]
    margins = [part.function.margin for part in used]
    known = [m * part.problem.tau for m, part in zip(margins, used, strict=True) if m is not None]
    holds = certified and len(known) == len(used) and all(m is not None and m < 1 for m in margins)
    return {
        "status": "certified" if holds else "undecided",
        "tau": parts[0].problem.tau,
        "largest_margin": max(known, default=math.nan),
        "clipped_share": 0.0 if holds else math.nan,
        "bound": max(known, default=None) if len(known) == len(used) else None,
    }


def mixed_record(found: Mixed, title: str, share: float) -> dict[str, Any]:
    """What is written about branches of two kinds, under the names that the report and the figure read."""
    parts, rows = found.parts, found.rows
    certified = found.verified["rows"] == len(rows)
    last = found.found[-1]
    numbers = list(shared(last.num_branches, share))
    checked = assumption(parts, [row["kinds"] for row in rows], certified)
    delta = max((part.delta for part in parts), key=lambda d: d.delta)
    curves = [curve(part.function) for part in parts]
    return {
        "title": title,
        "second_share": share,
        "method": "; ".join(part.function.method for part in parts),
        "status": "certified" if certified else "estimated",
        "objective": rows[0]["objective"],
        "verified": found.verified,
        "tolerance": max(part.function.tolerance for part in parts),
        "tau": parts[0].problem.tau,
        "budget": last.budget,
        "budget_share": last.budget / parts[0].problem.largest_budget,
        "margin_bound": checked["bound"],
        "assumption_1": checked,
        "delta": {
            "lower": delta.delta,
            "upper": max(row["delta_upper"] for row in rows),
            "status": "certified" if certified else "estimated",
            "points": len(delta.points),
            "restricted": delta.restricted,
            "convexified": delta.convexified,
        },
        "rows": [{**row, "clipped": checked["clipped_share"]} for row in rows],
        "value_function": curves[0],
        "second_value_function": curves[1],
        "dual_function": dual_curve([part.function for part in parts], numbers, last.budget, last.multiplier),
        "hinge": None,
        "trained": [],
        "population": None,
        "population_note": "",
    }


def mixed_arrays(found: Mixed) -> dict[str, np.ndarray]:
    """The value functions and combinations of both kinds, for `results/duality_gap.npz`."""
    arrays: dict[str, np.ndarray] = {"budgets": found.parts[0].function.budgets}
    for name, part in zip(("first", "second"), found.parts, strict=True):
        arrays |= {
            f"{name}_lower": part.function.lower,
            f"{name}_upper": part.function.upper,
            f"{name}_delta_points": part.delta.points,
            f"{name}_delta_weights": part.delta.weights,
            f"{name}_delta_values": part.delta.values,
        }
    return arrays
