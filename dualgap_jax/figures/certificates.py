"""How far networks are from the optimum: excess over F* against the number of branches, one panel a regime."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualgap_jax.figures.page import (
    LINES,
    box,
    branch_axis,
    head,
    number,
    page,
    plain,
    read_record,
    save,
    tidy,
    value_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BEST = LINES[0]
_BAND, _TRAINED = LINES[1]["color"], LINES[2]["color"]


def certify(workdir: str | Path) -> list[Path]:
    """The risk of networks of I branches above the proven lower bound on F*, as a share of the zero network's.

    Reads `results/certify.json` (`title`, `loss`, `data`, `cells`).

    Returns:
      The paths of `figures/certify.png` and `.pdf`, and of `excess.png` and `.pdf` where branches were followed.

    Raises:
      ValueError: the record is missing or malformed, or has no cells.
    """
    workdir = Path(workdir)
    record = read_record(workdir, "certify.json", ("title", "loss", "data", "cells"))
    cells = record["cells"]
    if not cells:
        raise ValueError(f"{workdir / 'results' / 'certify.json'} has no cells; run it over at least one regime.")
    with page(1.0 + 3.6 * len(cells), 4.1, _caption(cells)) as figure:
        head(figure, record["title"], plain(f"{record['loss']} loss, {record['data']['examples']:,} examples"))
        for k, cell in enumerate(cells):
            axes = figure.add_axes(box(figure, 0.95 + 3.6 * k, 1.05, 2.75, 2.45))
            _draw(axes, cell, legend=k == 0)
        paths = save(figure, workdir, "certify")
    return [*paths, *_along(workdir, record["title"], [cell for cell in cells if cell.get("along")])]


def _along(workdir: Path, title: str, cells: list[Mapping[str, Any]]) -> list[Path]:
    """The excess of each branch under SGD, one panel a regime; nothing where none was followed."""
    if not cells:
        return []
    caption = [
        "Excess: how much worse a branch is than the best possible one, by the dual vectors of the optimum.",
        "Its mean over branches, with what the budget leaves and the dual vectors lose, is the risk above F*'s bound.",
    ]
    with page(1.0 + 3.6 * len(cells), 4.1, caption) as figure:
        count = len(cells[0]["along"]["excess"][0])
        head(figure, plain(title), plain(f"each branch of a network of {count:,} under SGD"))
        for k, cell in enumerate(cells):
            axes = figure.add_axes(box(figure, 0.95 + 3.6 * k, 1.05, 2.75, 2.45))
            _draw_along(axes, cell, legend=k == 0)
        return save(figure, workdir, "excess")


def _draw_along(axes: Axes, cell: Mapping[str, Any], *, legend: bool) -> None:
    tidy(axes)
    along, unit = cell["along"], value_of(cell, "zero_network")
    steps, excess = np.asarray(along["steps"], float), np.asarray(along["excess"], float) / unit
    gap = (np.asarray(along["risk"], float) - np.asarray(along["lower"], float)) / unit
    least = max(1e-9, 1e-6 * float(np.nanmax(gap)))
    axes.plot(steps + 1, np.maximum(excess, least), color=_BAND, lw=0.6, alpha=0.6)
    axes.plot([], [], color=_BAND, lw=0.6, label="each branch")
    axes.plot(steps + 1, np.maximum(excess.mean(axis=1), least), color=_BEST["color"], lw=1.6, label="mean of branches")
    axes.plot(steps + 1, np.maximum(gap, least), "--", color=_TRAINED, lw=1.2, label="risk above F*, at most")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("SGD step + 1")
    axes.set_title(plain(cell["name"]), fontsize=9)
    if legend:
        axes.set_ylabel("excess, over the zero network's risk")
        axes.legend(fontsize=7, frameon=False)


def _caption(cells: list[Mapping[str, Any]]) -> list[str]:
    words = [
        f"{plain(cell['regime'])}: F* from {number(value_of(cell, 'lower'), 6, 'lower')} to"
        f" {number(value_of(cell, 'upper'), 6, 'upper')} ({plain(cell['status'])})"
        for cell in cells
    ]
    return [
        "Risk above the proven lower bound on F*, over the zero network's risk; the shaded band is what F* may be.",
        "; ".join(words) + ".",
    ]


def _draw(axes: Axes, cell: Mapping[str, Any], *, legend: bool) -> None:
    tidy(axes)
    rows = sorted(cell["rows"], key=lambda row: row["num_branches"])
    counts = np.array([row["num_branches"] for row in rows])
    unit, lower = value_of(cell, "zero_network"), value_of(cell, "lower")
    band = max(value_of(cell, "upper") - lower, 1e-16) / unit
    best = np.array([value_of(row, "best") - lower for row in rows]) / unit
    trained = np.array([[math.nan if v is None else v - lower for v in row["trained"]] for row in rows]) / unit
    axes.axhspan(1e-16, band, color=_BAND, alpha=0.25, lw=0, label="F* (band)")
    for seed in trained.T:
        axes.plot(counts, seed, "o", color=_TRAINED, ms=3, alpha=0.7, label=None)
    axes.plot([], [], "o", color=_TRAINED, ms=3, label="random starts")
    axes.plot(counts, best, markersize=4, linewidth=1.2, label="best known", **_BEST)
    axes.set_yscale("log")
    finite = np.concatenate([best, trained.reshape(-1), [band]])
    finite = finite[np.isfinite(finite) & (finite > 0)]
    axes.set_ylim(max(1e-12, float(finite.min()) / 3), float(finite.max()) * 3)
    branch_axis(axes, counts.tolist())
    axes.set_xlabel("number of branches I")
    axes.set_title(plain(cell["name"]), fontsize=9)
    if legend:
        axes.set_ylabel("risk above F*, over the zero network's")
        axes.legend(fontsize=7, frameon=False)
