"""What is reported of landscapes: the table of one or of a row of them, and the notes below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dualgap_jax.experiments.base import Report


def _losses_over(records: list[dict[str, Any]]) -> str:
    """'the full training set', or how many of its examples."""
    said = [s for r in records if (s := r.get("samples")) is not None and s["used"] < s["of"]]
    if not said:
        return "the full training set"
    return ", ".join(sorted({f"{s['used']:,} of the {s['of']:,} training examples" for s in said}))


def _state_note(record: Mapping[str, Any]) -> str:
    """What the surface has in place of the running statistics of training."""
    if record["state"]["how"] == "interpolate":
        return "Running statistics: interpolated between the solutions."
    return f"Running statistics: estimated anew at every point, over {record['state']['samples']:,} examples."


def partial_notes(named: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The sentence on surfaces with losses that are not finite, by their names and scores, as far as there are any."""
    said = [f"{name} ({1 - share:.2%})" for name, s in named if (share := s.get("finite_share", 1.0)) < 1]
    edges = [name for name, s in named if s.get("barriers") and None in s["barriers"]]
    notes = []
    if said:
        notes.append(f"Partial scores, of the finite losses only; share of the grid left out: {', '.join(said)}.")
    if edges:
        notes.append(f"No barrier, for a loss on an edge is not finite: {', '.join(edges)}.")
    return notes


def _aligned_note(aligned: Mapping[str, Any]) -> str:
    what = "branches and their hidden units" if aligned["over"] == "branches" else "hidden units of all branches"
    return f"Aligned: {what} of solutions 1 and 2 permuted to lie nearest to those of solution 0, by {aligned['by']}."


def _surfaces(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The scores of every surface of a landscape, by the name that the notes give it."""
    name = f"I = {record['num_branches']:,}"
    others = {"aligned": record["aligned"]} if "aligned" in record else {}
    others |= record.get("controls", {})
    return [(name, record["scores"]), *((f"{name} {other}", found["scores"]) for other, found in others.items())]


def _row(record: Mapping[str, Any], name: Any, measured: Mapping[str, Any]) -> list[Any]:
    """The line of one surface of a landscape."""
    scores, inner = measured["scores"], measured.get("scores_paper_window", {})
    return [
        name,
        [s["loss"] for s in record["solutions"]],
        "/".join(sorted({s["status"] for s in record["solutions"]})),
        scores["envelope_max"],
        scores["envelope_max_per_zero_loss"],
        scores["envelope_max_per_range"],
        scores["midpoint_violation_rate"],
        scores["negative_curvature_share"],
        scores["barrier_max"],
        inner.get("envelope_max"),
    ]


def report(records: list[dict[str, Any]]) -> Report:
    """The table of one landscape, or of a row of them."""
    columns = [
        "I",
        "train loss (3 solutions)",
        "status",
        "envelope max",
        "/zero loss",
        "/range",
        "midpoint viol.",
        "neg. curv.",
        "barrier",
        "env. max ±0.6",
    ]
    rows = []
    for r in records:
        rows.append(_row(r, r["num_branches"], r))
        if "aligned" in r:
            rows.append(_row(r, f"{r['num_branches']:,} aligned", r["aligned"]))
        rows += [_row(r, f"{r['num_branches']:,} {name}", control) for name, control in r.get("controls", {}).items()]
    first = records[0]
    notes = [
        f"Regime: {first['regime']}.",
        "Scores: estimated from the grid; definitions in results/landscape.json."
        f" Losses: over {_losses_over(records)}.",
    ]
    notes += sorted({_state_note(r) for r in records if r.get("state") is not None})
    notes += sorted({_aligned_note(r["aligned"]) for r in records if "aligned" in r})
    if any("controls" in r for r in records):
        notes.append(
            "Controls: solutions 1 and 2 permuted at random; by one another's permutations (crossed); moved straight"
            " towards solution 0 to the distances of the aligned ones (shrunk)."
        )
    outside = [f"I = {r['num_branches']:,}: {r['solutions_outside']}" for r in records if r.get("solutions_outside")]
    if outside:
        notes.append(f"Outside the window lie solutions {'; '.join(outside)}: plane.window=solutions lets it grow.")
    notes += partial_notes([named for r in records for named in _surfaces(r)])
    notes += [
        f"Left out at I = {r['num_branches']:,}: {name}, for {why}"
        for r in records
        for name, why in r.get("left_out", {}).items()
    ]
    if any(r.get("zero_loss", 1.0) is None for r in records):
        notes.append("No scores per zero loss: the loss of the zero network is not positive and finite.")
    if first["data"].get("image_format") == "JPEG":
        notes.append("Data: a JPEG-recompressed (lossy) copy of the images.")
    return Report(first["title"] if len(records) == 1 else "", columns, rows, notes)
