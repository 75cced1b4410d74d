"""Convexity scores against the number of branches, for a row of landscapes and for the map of regimes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualgap_jax.figures.page import (
    LINES,
    box,
    branch_axis,
    head,
    left_out,
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

# The panels of the scores chart: title, label of the vertical axis, score name -> label of its line.
_SCORE_PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Test accuracy", "share of examples", {"test_accuracy": ""}),
    ("Loss of the solutions", "loss", {"train_loss": "training", "test_loss": "test"}),
    (
        "Distance to the lower convex envelope",
        "loss",
        {"envelope_max": "largest", "envelope_mean": "mean", "envelope_max_aligned": "aligned"},
    ),
    (
        "… relative to the loss of the zero network",
        "ratio",
        {"envelope_max_per_zero_loss": "largest", "envelope_mean_per_zero_loss": "mean"},
    ),
    (
        "… relative to the range in the window",
        "ratio",
        {"envelope_max_per_range": "largest", "envelope_mean_per_range": "mean"},
    ),
    (
        "Midpoint-convexity violations",
        "share of point pairs",
        {"midpoint_violation_rate": "raw", "midpoint_violation_rate_aligned": "aligned"},
    ),
    (
        "Negative curvature",
        "share; ratio of eigenvalues",
        {
            "negative_curvature_share": "share",
            "curvature_ratio_mean": "mean ratio",
            "negative_curvature_share_aligned": "aligned",
        },
    ),
    (
        "Barrier between two solutions",
        "loss",
        {"barrier_max": "largest", "barrier_mean": "mean", "barrier_max_aligned": "aligned"},
    ),
)


_DIVERGED = "A repeat that diverged counts as above every number, and is marked by a cross at the upper border."


# Scores against the number of branches -------------------------------------------------------------------------------


def _score_panels(names: Sequence[str], cells: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, dict[str, str]]]:
    """The panels for the numeric scores among `names`: the known groups first, then one panel per other score."""
    drawn = [name for name in names if any(_is_number_or_null(cell["scores"], name) for cell in cells)]
    panels = [
        (title, label, {name: line for name, line in lines.items() if name in drawn})
        for title, label, lines in _SCORE_PANELS
    ]
    known = {name for _, _, lines in _SCORE_PANELS for name in lines}
    others = [(name.replace("_", " "), "value", {name: ""}) for name in drawn if name not in known]
    return [panel for panel in panels if panel[2]] + others


def _partial_note(named: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The caption's words for scores of surfaces with losses that are not finite, as far as there are any."""
    said = [f"{name} ({share})" for name, scores in named if (share := left_out(scores))]
    return [f"Hollow: partial scores, of the finite losses only: {', '.join(said)}."] if said else []


def _is_number_or_null(scores: Mapping[str, Any], name: str) -> bool:
    """Whether the score can be drawn: a number, or null for an undefined one."""
    return name in scores and (scores[name] is None or isinstance(scores[name], int | float))


def architecture(workdir: str | Path) -> list[Path]:
    """Accuracy and convexity scores against the number of branches at an equal number of parameters.

    Reads `results/architecture.json` (`title`, `paper_item`, `note`, `seeds`, `cells`, `score_names`); each of the
    `cells` has `num_branches`, `scores` and `intervals`.

    Returns:
      The paths of `figures/architecture.png` and `.pdf`.

    Raises:
      ValueError: the record is missing or malformed, or has no cells.
    """
    workdir, name = Path(workdir), "architecture.json"
    record = read_record(workdir, name, ("title", "paper_item", "note", "cells", "score_names"))
    cells = read_cells(record, workdir, name, ("num_branches", "scores", "intervals"))
    return draw_scores(workdir, record, cells, "architecture")


def draw_scores(
    workdir: Path, record: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], stem: str = "scores"
) -> list[Path]:
    """`figures/scores`: small multiples of the convexity scores against the number of branches."""
    counts = [cell["num_branches"] for cell in cells]
    panels = _score_panels(record["score_names"], cells)
    if not panels:
        raise ValueError(
            f"{workdir / 'results' / 'row.json'}: no numeric score among score_names {record['score_names']}; each must"
            " name an entry of the cells' scores."
        )
    tables = [{name: np.asarray([_shown(cell, name) for cell in cells]) for name in p[2]} for p in panels]
    partial = [bool(left_out(cell["scores"])) for cell in cells]
    caption = value_notes(np.concatenate([values for table in tables for values in table.values()]))
    caption.append(plain(record.get("note", "")))
    if any(cell.get("intervals") for cell in cells):
        caption.append(f"Means over {record['seeds']} seeds, with 95 % t-intervals as bars.")
    caption += _partial_note([(f"I = {c['num_branches']:,}", c["scores"]) for c in cells])
    across = min(3, len(panels))
    with page(0.4 + 3.3 * max(across, 2), 0.75 + 2.5 * math.ceil(len(panels) / across), caption) as figure:
        named = {"scores": f"{record['title']}: convexity scores"}
        head(figure, named.get(stem, record["title"]), plain(record["paper_item"]))
        for index, ((title, label, lines), table) in enumerate(zip(panels, tables, strict=True)):
            place = (0.8 + 3.3 * (index % across), 1.15 + 2.5 * (index // across), 2.5, 1.55)
            axes = figure.add_axes(box(figure, *place))
            ends = [np.concatenate(list(table.values()))]
            for (name, values), style in zip(table.items(), LINES, strict=False):
                axes.plot(counts, values, label=lines[name], markersize=4.5, **style)
                bars = np.asarray([cell.get("intervals", {}).get(name, [math.nan] * 3)[1:] for cell in cells])
                axes.vlines(counts, bars[:, 0], bars[:, 1], color=str(style["color"]), linewidth=1.0)
                axes.plot(np.repeat(counts, 2), bars.ravel(), "_", color=style["color"], markersize=6)
                ends.append(bars[bars > 0])
                some = np.flatnonzero(partial)
                axes.plot(
                    np.asarray(counts)[some],
                    values[some],
                    linestyle="",
                    marker=style["marker"],
                    markersize=4.5,
                    color=style["color"],
                    markerfacecolor="white",
                )
                mark_undefined(axes, counts, values, str(style["color"]))
            branch_axis(axes, counts)
            if "test_accuracy" in lines:
                axes.margins(y=0.4)
            else:
                value_axis(axes, np.concatenate(ends))
            tidy(axes)
            axes.set_title(title, loc="left", pad=16 if len(lines) > 1 else 6)
            axes.set(xlabel="number of branches $I$", ylabel=label)
            if len(lines) > 1:
                axes.legend(
                    loc="lower left",
                    bbox_to_anchor=(-0.02, 0.97),
                    ncols=len(lines),
                    borderpad=0.1,
                    columnspacing=1.2 if len(lines) < 3 else 0.8,
                    handlelength=2.0 if len(lines) < 3 else 1.6,
                )
        return save(figure, workdir, stem)


def _shown(cell: Mapping[str, Any], name: str) -> float:
    """A score, or its mean over seeds where there are several."""
    return float(cell.get("intervals", {}).get(name, [value_of(cell["scores"], name)])[0])


# Regimes -------------------------------------------------------------------------------------------------------------


def regimes(workdir: str | Path) -> list[Path]:
    """The convexity score of every training regime: initialisation x reduction x learning-rate scaling x I.

    Reads `results/regimes.json` (`title`, `score`, `cells`); each of the `cells` has `init`, `lr_scaling`, `reduce`,
    `num_branches`, `repeat`, `scores` and `statuses`.  Panels share one vertical axis per score, to be compared.

    Returns:
      The paths of `figures/regimes.png` and `.pdf` (the score in units of loss) and of `figures/regimes_normalised.png`
      and `.pdf` (relative to the loss of the zero network, and to the range in the window).

    Raises:
      ValueError: the record is missing or malformed, or has no cells.
    """
    workdir = Path(workdir)
    keys = ("init", "lr_scaling", "reduce", "num_branches", "repeat", "scores", "statuses")
    record = read_record(workdir, "regimes.json", ("title", "score", "cells"))
    cells = read_cells(record, workdir, "regimes.json", keys)
    score = record["score"]
    return _draw_regimes(workdir, "regimes", record["title"], cells, {score: _score_label(score)}) + _draw_regimes(
        workdir,
        "regimes_normalised",
        f"{record['title']} (normalised)",
        cells,
        {
            f"{score}_per_zero_loss": f"{_score_label(score)},\nper zero-network loss",
            f"{score}_per_range": f"{_score_label(score)},\nper range in window",
        },
    )


def _score_label(score: str) -> str:
    """A score's name for a vertical axis."""
    return {"envelope_max": "largest envelope distance", "envelope_mean": "mean envelope distance"}.get(
        score, score.replace("_", " ")
    )


def _draw_regimes(
    workdir: Path, stem: str, title: str, cells: Sequence[Mapping[str, Any]], scores: Mapping[str, str]
) -> list[Path]:
    """One panel per initialisation (columns), score and reduction (rows); one line per learning-rate scaling."""
    from matplotlib.lines import Line2D

    inits, reductions, scalings = (_distinct(cells, key) for key in ("init", "reduce", "lr_scaling"))
    repeats = len({cell["repeat"] for cell in cells})
    counts = sorted({cell["num_branches"] for cell in cells})
    rows = [(score, label, reduction) for score, label in scores.items() for reduction in reductions]
    styles = {scaling: LINES[index % len(LINES)] for index, scaling in enumerate(scalings)}
    statuses = Counter(str(status) for cell in cells for status in cell["statuses"])
    caption = [
        f"Lines: median over {repeats} repeats; bands: smallest to largest." if repeats > 1 else "",
        _DIVERGED if repeats > 1 and "diverged" in statuses else "",
        f"Runs: {', '.join(f'{count:,} {plain(status)}' for status, count in sorted(statuses.items()))}.",
        "Hollow markers: a run did not end as 'converged'." if set(statuses) != {"converged"} else "",
        _partial_cells(cells),
        *value_notes(np.asarray([value_of(cell["scores"], score) for cell in cells for score in scores])),
    ]
    with page(max(1.05 + 2.75 * len(inits), 6.6), 1.1 + 1.95 * len(rows), caption) as figure:
        head(figure, title)
        for down, (score, label, reduction) in enumerate(rows):
            everything = np.asarray([value_of(cell["scores"], score) for cell in cells])
            for across, init in enumerate(inits):
                left = (figure.get_figwidth() + 0.85 - 2.75 * len(inits)) / 2 + 2.75 * across
                axes = figure.add_axes(box(figure, left, 0.95 + 1.95 * down, 2.4, 1.45))
                for scaling, style in styles.items():
                    regime = (init, reduction, scaling)
                    line = [c for c in cells if (c["init"], c["reduce"], c["lr_scaling"]) == regime]
                    _draw_regime(axes, line, score, style)
                branch_axis(axes, counts)
                value_axis(axes, everything)
                tidy(axes)
                axes.tick_params(labelbottom=down == len(rows) - 1, labelleft=across == 0)
                axes.set_title(f"init {plain(init)}, {plain(reduction)} of branches", fontsize=9.5, pad=4, loc="left")
                axes.set_xlabel("number of branches $I$" if down == len(rows) - 1 else "")
                axes.set_ylabel(label if across == 0 else "", fontsize=8.5)
        handles = [
            Line2D([], [], label=f"learning-rate scaling: {plain(scaling)}", markersize=4.8, **style)
            for scaling, style in styles.items()
        ]
        place = (0.5, 1 - 0.53 / figure.get_figheight())
        figure.legend(handles=handles, loc="center", bbox_to_anchor=place, ncols=len(handles), handlelength=2.8)
        return save(figure, workdir, stem)


def _partial_cells(cells: Sequence[Mapping[str, Any]]) -> str:
    """The caption's words for how many landscapes have losses that are not finite."""
    shares = [value_of(cell["scores"], "finite_share") for cell in cells if left_out(cell["scores"])]
    if not shares:
        return ""
    most = left_out({"finite_share": min(shares)})
    return f"Partial scores, of the finite losses only: {len(shares):,} of {len(cells):,} landscapes (at most {most})."


def _distinct(cells: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """The values of one setting over the cells, in the order of the record."""
    return list(dict.fromkeys(str(cell[key]) for cell in cells))


def _draw_regime(axes: Axes, cells: Sequence[Mapping[str, Any]], score: str, style: Mapping[str, Any]) -> None:
    """One line: the median of the score over the repeats, its band, and how the runs ended.

    A repeat without a number counts as above every number, so that the median never is that of the survivors.
    """
    counts = sorted({cell["num_branches"] for cell in cells})
    groups = [[cell for cell in cells if cell["num_branches"] == count] for count in counts]
    values = [np.asarray([value_of(cell["scores"], score) for cell in group]) for group in groups]
    finite = [v[np.isfinite(v)] if np.isfinite(v).any() else np.asarray([math.nan]) for v in values]
    middle = np.asarray([np.median(np.where(np.isfinite(v), v, math.inf)) for v in values])
    middle[~np.isfinite(middle)] = math.nan
    color = str(style["color"])
    axes.fill_between(
        counts, [v.min() for v in finite], [v.max() for v in finite], color=color, alpha=0.16, linewidth=0
    )
    axes.plot(counts, middle, color=color, linestyle=style["linestyle"])
    for count, value, group in zip(counts, middle.tolist(), groups, strict=True):
        converged = all(status == "converged" for cell in group for status in cell["statuses"])
        fill = color if converged else "white"
        axes.plot(count, value, style["marker"], color=color, markerfacecolor=fill, markersize=4.8)
    mark_undefined(axes, counts, np.asarray([v.sum() for v in values]), color)
