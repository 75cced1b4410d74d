"""Pages of loss surfaces: one plane (a panel of Figures 1 and 4), and a row of planes against I."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dualgap_jax.figures.around import draw_around
from dualgap_jax.figures.page import (
    NOTE_COLOR,
    box,
    data_note,
    head,
    left_out,
    non_finite,
    number,
    page,
    plain,
    read_cells,
    read_record,
    save,
    value_of,
)
from dualgap_jax.figures.panels import (
    Surface,
    colour_bar,
    draw_edges,
    draw_map,
    draw_solid,
    read_surface,
    scale_of,
    surface_notes,
)
from dualgap_jax.figures.scores import draw_scores

# What the coordinates a and b of the plane are.
_PLANE_LABELS = {
    "authors": (r"along $w_0-w_1$, in units of $\|w_2\|$", r"along $w_0-w_2$, in units of $\|w_2\|$"),
    "orthonormal": ("first orthonormal axis, parameter distance", "second orthonormal axis, parameter distance"),
}
# The line of key scores under a title, in this order; the first three also stand under each column of a row.
_KEY_SCORES = {
    "envelope_max": "largest envelope distance {} in loss",
    "envelope_max_per_zero_loss": "{} of the zero network's loss",
    "envelope_max_per_range": "{} of the range",
    "midpoint_violation_rate": "midpoint violations {}",
    "negative_curvature_share": "negative curvature {}",
    "barrier_max": "largest barrier {} in loss",
}


def _key_scores(scores: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The sentence of each key score in `names`; absent ones are left out, null ones said to be undefined.

    Before them stands what share of the grid they leave out, if any.
    """
    values = {name: value_of(scores, name) for name in names if name in scores}
    partial = left_out(scores)
    return [f"partial: {partial}"] * bool(partial) + [
        _KEY_SCORES[name].format("undefined" if math.isnan(value) else number(value)) for name, value in values.items()
    ]


def _describe_solutions(solutions: Sequence[Mapping[str, Any]]) -> str:
    """'Solution 0: loss 9e-6, converged after 1,200 steps; …' from the record's list."""
    said = []
    for index, solution in enumerate(solutions):
        loss, steps = solution.get("loss"), solution.get("steps")
        value = number(float(loss)) if isinstance(loss, int | float) else "undefined"
        after = f" after {steps:,} steps" if isinstance(steps, int) else ""
        said.append(f"{index}: loss {value}, {plain(solution.get('status', 'status unknown'))}{after}")
    return f"Solution {'; '.join(said)}." if said else ""


def _samples_note(record: Mapping[str, Any]) -> str:
    """The caption's words for losses over a part of the data set."""
    samples = record.get("samples")
    if samples is None or samples["used"] >= samples["of"]:
        return ""
    return f"Losses are over {samples['used']:,} of the {samples['of']:,} training examples, drawn at random."


def landscape(workdir: str | Path) -> list[Path]:
    """The loss surface in 3-D, its contour map with the three solutions, and the loss along the edges between them.

    Reads `results/landscape.npz` (`xs [nx]`, `ys [ny]`, `loss [ny, nx]`, `anchors [3, 2]`, `edge_t [m]`,
    `edge_loss [3, m]`, edges 0-1, 1-2, 2-0) and `results/landscape.json` (`title`, `num_branches`, `solutions`,
    `scores`, `axes`, and `data.image_format` if known: figures of lossy images say so).  A record with `aligned` has
    `results/aligned.npz` too, and both surfaces stand in `figures/aligned` on one scale; what a record says of a
    Hessian, a trajectory or a curve is drawn by `around`.

    Returns:
      The paths of `figures/landscape.png` and `figures/landscape.pdf`, and of the others, if there are such.

    Raises:
      ValueError: a record is missing or malformed.
    """
    workdir = Path(workdir)
    record = read_record(workdir, "landscape.json", ("title", "num_branches", "solutions", "scores", "axes"))
    surface = read_surface(workdir)
    scale = scale_of(surface.loss)
    x_label, y_label = _PLANE_LABELS.get(record["axes"], ("first axis of the plane", "second axis of the plane"))
    branches = f"I = {record['num_branches']:,}"
    line = _key_scores(record["scores"], list(_KEY_SCORES))
    line = line if branches in record["title"] else [branches.replace("I", "$I$"), *line]
    broken = non_finite(surface.edge_loss)
    edge_note = f"Crosses are losses along the edges that are not finite: {broken}." if broken else ""
    caption = [
        _describe_solutions(record["solutions"]),
        *surface_notes(surface, scale),
        edge_note,
        _samples_note(record),
        data_note(record),
    ]
    with page(11.0, 4.2, caption) as figure:
        head(figure, record["title"], "  ·  ".join(line))
        solid = figure.add_axes(box(figure, 0.0, 0.62, 3.85, 3.5), projection="3d")
        draw_solid(solid, surface, scale)
        flat = figure.add_axes(box(figure, 4.65, 0.95, 2.7, 2.7))
        filled = draw_map(flat, surface, scale)
        flat.set(xlabel=f"$a$: {x_label}", ylabel=f"$b$: {y_label}")
        colour_bar(figure, flat, filled, scale)
        draw_edges(figure.add_axes(box(figure, 8.65, 1.1, 2.15, 2.55)), surface)
        drawn = save(figure, workdir, "landscape")
    drawn += _draw_aligned(workdir, record, surface) if "aligned" in record else []
    return drawn + draw_around(workdir, record)


def _draw_aligned(workdir: Path, record: Mapping[str, Any], raw: Surface) -> list[Path]:
    """Two rows of panels on one scale: the plane through the solutions as trained, and as aligned."""
    aligned = read_surface(workdir, "aligned.npz")
    scale = scale_of(np.concatenate([raw.loss, aligned.loss]))
    what = record["aligned"]
    apart = ", ".join(
        f"{k}: {number(before)} → {number(after)}" for k, (before, after) in enumerate(what["distances"]) if before
    )
    rows = (("as trained", raw, record), ("aligned to solution 0", aligned, what))
    caption = [
        f"Permuted: {plain(what['over'])} of solutions 1 and 2, compared by {plain(what['by'])}; the networks compute"
        " what they did.",
        f"Distances of the parameters to those of solution 0, before → after: {apart}.",
        "Both surfaces are on one scale of loss.",
        *(f"{name.capitalize()}: {note}" for name, s, _ in rows for note in surface_notes(s, scale)),
        _samples_note(record),
        data_note(record),
    ]
    x_label, y_label = _PLANE_LABELS.get(record["axes"], ("", ""))
    top = max(
        (float(loss.max(where=np.isfinite(loss), initial=0.0)) for loss in (raw.edge_loss, aligned.edge_loss)),
        default=0.0,
    )
    with page(11.0, 7.9, caption) as figure:
        branches = f"I = {record['num_branches']:,}"
        head(figure, record["title"], *([] if branches in record["title"] else [branches.replace("I", "$I$")]))
        height = figure.get_figheight()
        for index, (name, surface, measured) in enumerate(rows):
            down = 3.65 * index
            line = _key_scores(measured["scores"], [k for k in _KEY_SCORES if "per" not in k])
            figure.text(
                0.03, 1 - (0.72 + down) / height, f"({_letter(index)}) {name}:  " + "  ·  ".join(line), va="top"
            )
            solid = figure.add_axes(box(figure, 0.0, 0.85 + down, 3.6, 3.2), projection="3d")
            draw_solid(solid, surface, scale)
            flat = figure.add_axes(box(figure, 4.65, 1.15 + down, 2.4, 2.4))
            filled = draw_map(flat, surface, scale)
            flat.set(xlabel=f"$a$: {x_label}", ylabel=f"$b$: {y_label}")
            flat.xaxis.label.set_fontsize(8)
            flat.yaxis.label.set_fontsize(8)
            colour_bar(figure, flat, filled, scale)
            edges = figure.add_axes(box(figure, 8.65, 1.3 + down, 2.15, 2.1))
            draw_edges(edges, surface)
            edges.set_ylim(-0.05 * top, 1.08 * top if top > 0 else 1.0)
        return save(figure, workdir, "aligned")


def row(workdir: str | Path) -> list[Path]:
    """A row of Figure 1 or 4, one column per number of branches, and the chart of each convexity score against it.

    Reads `results/row.json` (`title`, `paper_item`, `cells`, `score_names`, `scale`: 'common' puts all panels on one
    scale); each of the `cells` has `num_branches`, `scores`, `workdir`, the cell's work folder relative to this one,
    whose landscape record is drawn, and, of several seeds, `intervals`: score -> mean, low, high.

    Returns:
      The paths of `figures/row` and `figures/scores`, as PNG and PDF, and of `figures/row_aligned` if all cells are.

    Raises:
      ValueError: a record is missing or malformed, or there are no cells.
    """
    workdir = Path(workdir)
    record = read_record(workdir, "row.json", ("title", "paper_item", "cells", "score_names"))
    cells = read_cells(record, workdir, "row.json", ("num_branches", "workdir", "scores"))
    drawn = _draw_row(workdir, record, cells)
    if all("envelope_max_aligned" in cell["scores"] for cell in cells):
        aligned = [_aligned_cell(cell) for cell in cells]
        title = f"{record['title']}, solutions aligned"
        drawn += _draw_row(workdir, {**record, "title": title}, aligned, "aligned.npz", "row_aligned")
    return drawn + draw_scores(workdir, record, cells)


def _aligned_cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """The cell with the scores of its aligned surface in place of its own."""
    scores = {k.removesuffix("_aligned"): v for k, v in cell["scores"].items() if k.endswith("_aligned")}
    return {**cell, "scores": scores}


def _draw_row(
    workdir: Path,
    record: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    file: str = "landscape.npz",
    stem: str = "row",
) -> list[Path]:
    """Surfaces above, their contour maps below, each on its own scale as in the paper, or all on one."""
    surfaces = [read_surface(workdir / cell["workdir"], file) for cell in cells]
    common = record.get("scale") == "common"
    if common:
        scales = [scale_of(np.concatenate([surface.loss.ravel() for surface in surfaces]))] * len(cells)
    else:
        scales = [scale_of(surface.loss) for surface in surfaces]
    records = [read_record(workdir / cell["workdir"], "landscape.json", ("axes",)) for cell in cells]
    planes = {r["axes"] for r in records}
    caption = [
        "All panels are on one scale of loss." if common else "Each panel has its own scale of loss, as in the paper."
    ]
    for plane in sorted(planes & set(_PLANE_LABELS)):
        caption.append("$a$: {}; $b$: {}.".format(*_PLANE_LABELS[plane]))
    for index, (surface, scale) in enumerate(zip(surfaces, scales, strict=True)):
        caption += [f"({_letter(index)}) {note}" for note in surface_notes(surface, scale)]
    caption += sorted({_samples_note(r) for r in records}) + sorted({data_note(r) for r in records})
    column = 2.8
    with page(max(0.3 + column * len(cells), 5.8), 6.15, caption) as figure:
        head(figure, record["title"], plain(record["paper_item"]))
        width, height = figure.get_size_inches()
        for index, (cell, surface, scale) in enumerate(zip(cells, surfaces, scales, strict=True)):
            left = (width + 0.1 - column * len(cells)) / 2 + index * column
            draw_solid(figure.add_axes(box(figure, left - 0.15, 0.6, 2.75, 2.3), projection="3d"), surface, scale)
            middle = (left + 1.3) / width
            name = f"({_letter(index)}) $I$ = {cell['num_branches']:,}."
            figure.text(middle, 1 - 3.0 / height, name, ha="center", va="center", fontsize=11)
            flat = figure.add_axes(box(figure, left + 0.35, 3.35, 1.85, 1.85))
            filled = draw_map(flat, surface, scale)
            flat.set_xlabel("$a$", labelpad=1)
            flat.set_ylabel("$b$" if index == 0 else "", labelpad=0)
            flat.tick_params(labelsize=7.5)
            colour_bar(figure, flat, filled, scale)
            lines = "\n".join(_key_scores(cell["scores"], list(_KEY_SCORES)[:3]))
            figure.text(middle, 1 - 5.6 / height, lines, ha="center", va="top", fontsize=8, color=NOTE_COLOR)
        return save(figure, workdir, stem)


def _letter(index: int) -> str:
    """'a', 'b', … for a panel; numbers after 'z'."""
    return string.ascii_lowercase[index] if index < 26 else str(index + 1)
