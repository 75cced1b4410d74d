"""What Theorem 1 prints and draws: the table of verdicts with its notes, the curves of v and of the dual."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dualgap_jax.duality.envelope import envelope, lagrangian
from dualgap_jax.duality.values import ValueFunction
from dualgap_jax.experiments.base import Report
from dualgap_jax.terminal import digits

_SAVED_POINTS = 513  # of the value function, in the JSON record


def curve(function: ValueFunction) -> dict[str, Any]:
    """The value function and its envelope at no more than 513 budgets."""
    picked = np.unique(np.linspace(0, len(function.budgets) - 1, _SAVED_POINTS).round().astype(int))
    curves = {"budgets": function.budgets, "lower": function.lower, "upper": function.upper}
    return {k: v[picked] for k, v in {**curves, "envelope": envelope(function.upper)}.items()}


def dual_curve(
    functions: Sequence[ValueFunction], counts: Sequence[int], budget: float, multiplier: float
) -> dict[str, Any]:
    """`Q(lam)` and `Q(lam) - lam K` from the values on the grids (upper bounds), around the maximiser."""
    drop = max(float(f.upper[0] - f.upper[-1]) / float(f.budgets[-1]) for f in functions)
    lams = np.unique(np.append(np.linspace(0, 3 * max(multiplier, drop, 1e-12), 121), multiplier))
    grids, uppers = [f.budgets for f in functions], [f.upper for f in functions]
    q = np.array([lagrangian(grids, uppers, counts, lam)[0] for lam in lams])
    return {"multipliers": lams, "q": q, "dual_objective": q - lams * budget, "best": multiplier}


def report(record: Mapping[str, Any]) -> Report:
    """The table of a record, one row a number of branches, and what is to be said about it."""
    columns = [
        "I", "primal_upper", "dual_lower", "gap_lower", "gap_upper", "delta_lower", "gap/Delta", "2/I", "status",
        "verdict",
    ]  # fmt: skip
    trained = {t["num_branches"]: t for t in record["trained"]}
    if trained:
        columns += ["SGD best - inf(P)"]
    rows = []
    for r in record["rows"]:
        cells = [r["num_branches"], *(float(r[k]) for k in columns[1:6]), r["normalized_gap"], r["bound"], r["status"]]
        cells.append(r["verdict"])
        if trained:
            t = trained.get(r["num_branches"])
            every = t is not None and t["diverged"] == len(t["losses"])
            cells.append(None if t is None else "diverged" if every else t["best"] - t["primal_upper"])
        rows.append(cells)
    bounds = {name: "lower" if "lower" in name else "upper" for name in (*columns[1:6], "gap/Delta")}
    return Report(record["title"], columns, rows, [*_notes(record), *_trained_notes(record["trained"])], bounds)


def _notes(record: Mapping[str, Any]) -> list[str]:
    check, rows = record["assumption_1"], record["rows"]
    notes = [
        f"Value function: {record['method']} ({record['status']}, tolerance {record['tolerance']:.2g}).",
        f"Delta: lower bound from {record['delta']['points']} points ({record['delta']['status']}),"
        f" upper bound {digits(record['delta']['upper'], bound='upper')}.",
        f"tau = {record['tau']:.4g}, K = {record['budget']:.4g}; Assumption 1: {check['status']}"
        f" (largest margin {digits(check['largest_margin'], bound='upper')}), the hinge clips at most"
        f" {digits(max(float(r['clipped']) for r in rows), 2, 'upper')}.",
    ]
    if record["objective"] != "hinge":
        notes.append(
            "Assumption 1 is not proven: the numbers are those of the hinge without its maximum, E(1 - y f / tau), and"
            " the verdict for the hinge is undecided."
        )
    if record["hinge"]:
        notes += _hinge_notes(record["hinge"])
    again = record["verified"]
    if record["status"] == "certified":
        proven = sum(r["proven_by"] is not None for r in rows)
        told = f" with {again['boxes']:,} boxes or cones" if again["boxes"] else ""
        notes.append(
            f"Proven once more by programs of their own: the value function{told}, and in rational numbers {proven} of"
            f" {len(rows)} rows."
        )
    else:
        holds = sum(r["gap_upper"] <= r["bound"] * r["delta_lower"] for r in rows)
        notes.append(f"The estimates satisfy the bound in {holds} of {len(rows)} rows, which proves nothing.")
    notes += [f"Not proven, and therefore estimated: {failure}" for failure in again["failures"]]
    if record["population"]:
        ratios = [row["largest_gap_over_bound"] for row in record["population"]["rows"]]
        least = min((ratio for ratio in ratios if ratio is not None), default=None)
        told = "Delta is 0 on a sample, so that there is no bound to compare with"
        if least is not None:
            told = f"gap over bound at most {max(ratio for ratio in ratios if ratio is not None):.3g} (estimated)"
        notes.append(f"Population: {record['population_note']}; {told}.")
    return notes


def _hinge_notes(hinge: Mapping[str, Any]) -> list[str]:
    """What is known of inf(P) with the maximum in the hinge."""
    rows = hinge["rows"]
    proven = all(r[f"{name}_status"] == "certified" for r in rows for name in ("lower", "upper"))
    told = "; ".join(
        f"[{digits(r['lower'], bound='lower')}, {digits(r['upper'], bound='upper')}] at I = {r['num_branches']:,}"
        for r in rows[:: len(rows) - 1 or 1]
    )
    notes = [f"The hinge with its maximum ({'proven' if proven else 'estimated'}): inf(P) lies in {told}."]
    return notes + [f"Not proven, and therefore estimated: {failure}" for failure in hinge["failures"]]


def _trained_notes(trained: list[Mapping[str, Any]]) -> list[str]:
    if not trained:
        return []
    below = sum(t["below_primal"] for t in trained)
    notes = [f"Trained networks below the lower bound on inf(P): {below} of {len(trained)} values of I."]
    lost = [f"{t['state']} at I = {t['num_branches']:,}" for t in trained if t["diverged"]]
    return [*notes, *([f"Training: {'; '.join(lost)}; they count as above every number."] if lost else [])]
