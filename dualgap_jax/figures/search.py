"""The search for the setting of a published row of landscapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualgap_jax.figures.page import (
    LINES,
    box,
    branch_axis,
    head,
    mark_undefined,
    page,
    plain,
    read_record,
    save,
    tidy,
    value_axis,
    value_notes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def landscape_search(workdir: str | Path) -> list[Path]:
    """The published scores, those of every setting of the screen, of the best fit, and of it on unseen data.

    Reads `results/landscape_search.json` (`title`, `num_branches`, `target`, `screen`, `chosen`, `held_out`).

    Returns:
      The paths of `figures/landscape_search.png` and `.pdf`.

    Raises:
      ValueError: the record is missing or malformed.
    """
    workdir = Path(workdir)
    keys = ("title", "num_branches", "target", "screen", "chosen", "held_out")
    record = read_record(workdir, "landscape_search.json", keys)
    counts, target, chosen = record["num_branches"], np.asarray(record["target"]), record["chosen"]
    screened, fitted = (
        np.asarray([row["mean"] for entry in entries for row in entry["rows"]], dtype=np.float64)
        for entries in (record["screen"], [chosen, *record["held_out"]])
    )
    caption = [
        f"Left: {len(record['screen'])} pairs of a setting and a data set, one seed each.",
        f"Right: the best fit, {plain(chosen['setting'] or 'base')}, data {chosen['data_seed']}, with 95 % t-intervals"
        f" over seeds; thin: the same setting on {len(record['held_out'])} data sets that the search did not see.",
        "The fit is one of many free choices, not what the authors ran.",
        *value_notes(np.concatenate([screened, fitted])),
    ]
    with page(8.0, 4.0, caption) as figure:
        head(figure, record["title"])
        left = figure.add_axes(box(figure, 0.85, 0.8, 2.9, 2.5))
        right = figure.add_axes(box(figure, 4.5, 0.8, 2.9, 2.5))
        for entry in record["screen"]:
            _thin(left, counts, entry, "screen" if entry is record["screen"][0] else None)
        for index, entry in enumerate(record["held_out"]):
            _thin(right, counts, entry, None if index else "held-out data")
        means = np.asarray([row["mean"] for row in chosen["rows"]], dtype=np.float64)
        color = str(LINES[0]["color"])
        right.plot(counts, means, markersize=4.5, label="best fit", **LINES[0])
        mark_undefined(right, counts, means, color)
        for count, row in zip(counts, chosen["rows"], strict=True):
            if row["interval"] is not None:
                low, high = row["interval"][1:]
                right.vlines(count, max(low, 0.2 * row["mean"]), high, color=color, linewidth=1.0)
        panels = ((left, "settings of the search", screened), (right, "best fit and unseen data", fitted))
        for axes, title, values in panels:
            axes.plot(counts, target, "ks-", markersize=4.5, linewidth=1.2, label="published")
            branch_axis(axes, counts)
            value_axis(axes, np.concatenate([target, values]))
            tidy(axes)
            axes.set_title(title, loc="left", pad=6)
            axes.set_xlabel("number of branches $I$")
            axes.legend(loc="upper right", fontsize=8)
        left.set_ylabel("largest envelope distance,\nper zero-network loss")
        return save(figure, workdir, "landscape_search")


def _thin(axes: Axes, counts: list[int], entry: Mapping[str, Any], label: str | None) -> None:
    values = np.asarray([row["mean"] for row in entry["rows"]], dtype=np.float64)
    axes.plot(counts, values, color="0.6", linewidth=0.7, marker=".", markersize=3, label=label)
    mark_undefined(axes, counts, values, "0.6")
