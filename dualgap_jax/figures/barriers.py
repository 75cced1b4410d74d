"""Barriers between solutions against the number of branches, for several numbers of training examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualgap_jax.figures.page import (
    LINES,
    box,
    branch_axis,
    data_note,
    head,
    mark_undefined,
    page,
    plain,
    read_cells,
    read_record,
    save,
    tidy,
    value_axis,
    value_notes,
    value_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Title of a panel, what its vertical axis shows, and the score.
_PANELS = (
    ("Largest barrier, as trained", "loss", "barrier_max"),
    ("… between aligned solutions", "loss", "barrier_max_aligned"),
    ("Training loss, median", "loss", "loss"),
)


def examples(workdir: str | Path) -> list[Path]:
    """The barrier between solutions against I, and against parameters per label, a line a number of examples.

    Reads `results/examples.json` (`title`, `paper_item`, `seeds`, `cells`); each of the `cells` has `num_examples`,
    `num_branches`, `num_parameters`, `num_outputs`, `scores` (a table a seed), `losses` and `statuses`.

    Returns:
      The paths of `figures/examples.png` and `.pdf`.

    Raises:
      ValueError: the record is missing or malformed, or has no cells.
    """
    workdir = Path(workdir)
    record = read_record(workdir, "examples.json", ("title", "paper_item", "seeds", "cells"))
    keys = ("num_examples", "num_branches", "num_parameters", "num_outputs", "scores", "losses", "statuses")
    cells = read_cells(record, workdir, "examples.json", keys)
    sizes = sorted({cell["num_examples"] for cell in cells})
    panels = [p for p in _PANELS if p[2] == "loss" or any(p[2] in s for cell in cells for s in cell["scores"])]
    shown = np.asarray([_values(cell, name) for _, _, name in panels for cell in cells], dtype=np.float64)
    caption = [
        f"Means over {record['seeds']} seeds; bars: smallest to largest." if record["seeds"] > 1 else "",
        "Hollow markers: a run did not fit its data (loss below 1e-5) before it stopped.",
        "Lower row: the same points against parameters / (examples × outputs); the line marks 1.",
        *value_notes(shown[:, 0]),
        data_note(record),
    ]
    with page(0.4 + 3.3 * max(len(panels), 2), 6.2, caption) as figure:
        head(figure, record["title"], plain(record["paper_item"]))
        for across, (title, label, name) in enumerate(panels):
            for down, per_label in enumerate((False, True)):
                axes = figure.add_axes(box(figure, 0.8 + 3.3 * across, 1.15 + 2.55 * down, 2.5, 1.75))
                _draw(axes, cells, sizes, name, per_label)
                axes.set_title(title if not down else "", loc="left", pad=6)
                axes.set_xlabel("parameters per label" if down else "number of branches $I$")
                axes.set_ylabel(label)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        place = (0.5, 1 - 0.74 / figure.get_figheight())
        figure.legend(handles, labels, loc="center", bbox_to_anchor=place, ncols=len(handles), handlelength=2.8)
        return save(figure, workdir, "examples")


def _values(cell: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    """The mean over seeds and the least and the largest; NaN where one of them is not finite.  Of losses the median."""
    values = np.asarray(cell["losses"] if name == "loss" else [value_of(s, name) for s in cell["scores"]], float)
    if not np.isfinite(values).all():
        return (math.nan,) * 3
    middle = np.median(values) if name == "loss" else values.mean()
    return float(middle), float(values.min()), float(values.max())


def _draw(axes: Axes, cells: Sequence[Mapping[str, Any]], sizes: Sequence[int], name: str, per_label: bool) -> None:
    """One panel: a line a number of examples."""
    every = np.asarray([_values(cell, name) for cell in cells])
    for size, style in zip(sizes, [LINES[k % len(LINES)] for k in range(len(sizes))], strict=True):
        some = [cell for cell in cells if cell["num_examples"] == size]
        xs = [c["num_parameters"] / (size * c["num_outputs"]) if per_label else c["num_branches"] for c in some]
        values = np.asarray([_values(cell, name) for cell in some])
        color = str(style["color"])
        axes.plot(xs, values[:, 0], label=f"{size:,} examples", markersize=4.8, **style)
        axes.vlines(xs, values[:, 1], values[:, 2], color=color, linewidth=1.0)
        short = np.asarray([set(cell["statuses"]) != {"converged"} for cell in some])
        hollow = {"marker": style["marker"], "color": color, "markerfacecolor": "white", "markersize": 4.8}
        axes.plot(np.asarray(xs)[short], values[short, 0], linestyle="", **hollow)
        mark_undefined(axes, xs, values[:, 0], color)
    if per_label:
        axes.set_xscale("log")
        axes.axvline(1.0, color="0.6", linewidth=0.8)
    else:
        branch_axis(axes, [cell["num_branches"] for cell in cells])
    value_axis(axes, every.ravel())
    tidy(axes)
