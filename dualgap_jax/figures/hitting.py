"""Figures of Table 1: hitting rates against width, final losses, losses on the way, and the search for the setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualgap_jax.figures.page import LINES, NOTE_COLOR, box, head, number, page, plain, read_record, save, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS, _PAPER, _MISS = LINES[0], LINES[4], LINES[1]
_SAMPLE = 12  # runs drawn for each width
_ARRAYS = ("hidden", "teacher", "final_loss", "look_steps", "losses")


def hitting_rate(workdir: str | Path) -> list[Path]:
    """Rates against width, final losses for each width, and the loss of a sample of runs on the way.

    Reads `results/hitting_rate.json` (`title`, `setting`, `tolerance`, `rows`, `teachers`, `trend`) and
    `results/hitting_rate.npz` (`hidden`, `teacher`, `final_loss`, `look_steps`, `losses`).

    Returns:
      The paths of `figures/hitting_rate`, `final_losses` and `loss_curves`, each `.png` and `.pdf`.

    Raises:
      ValueError: a record is missing or malformed.
    """
    workdir = Path(workdir)
    keys = ("title", "setting", "tolerance", "rows", "teachers", "trend")
    record = read_record(workdir, "hitting_rate.json", keys)
    arrays = read_record(workdir, "hitting_rate.npz", _ARRAYS)
    if not record["rows"]:
        raise ValueError(
            f"{workdir}/results/hitting_rate.json has no rows; run the experiment over at least one width."
        )
    return _draw_rates(workdir, record) + _draw_losses(workdir, record, arrays) + _draw_curves(workdir, record, arrays)


# Rates ---------------------------------------------------------------------------------------------------------------


def _with_intervals(axes: Axes, rows: Sequence[Mapping[str, Any]], label: str, shift: float = 0.0) -> None:
    """Rates with Wilson's intervals."""
    x = np.asarray([r["hidden"] for r in rows]) + shift
    rate, low, high = (np.asarray([r[k] for r in rows]) for k in ("rate", "wilson_low", "wilson_high"))
    style = {k: v for k, v in _OURS.items() if k != "linestyle"}
    axes.errorbar(
        x, rate, yerr=[rate - low, high - rate], label=label, markersize=4.5, capsize=2.5, linewidth=1.1, **style
    )


def _paper(axes: Axes, rows: Sequence[Mapping[str, Any]], shift: float = 0.0) -> None:
    """The paper's points, of 100 runs each."""
    named = {r["hidden"]: r["paper_hits"] for r in rows if r["paper_hits"] is not None}
    if named:
        x = np.asarray(list(named)) + shift
        axes.plot(
            x, np.asarray(list(named.values())) / 100, color=_PAPER["color"], marker="s", markersize=5,
            linestyle="none", markerfacecolor="white", markeredgewidth=1.1, label="paper, Table 1", zorder=5,
        )  # fmt: skip


def _rate_axes(axes: Axes, widths: Sequence[int], ylabel: str = "runs that hit the minimum") -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_xlim(min(widths) - 0.6, max(widths) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=11))
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("hidden units")
    axes.set_ylabel(ylabel)
    tidy(axes)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _draw_rates(workdir: Path, record: Mapping[str, Any]) -> list[Path]:
    rows, teachers = record["rows"], record["teachers"]
    widths = sorted({r["hidden"] for r in rows})
    many = len(teachers) > 1
    lost, runs = (sum(r[key] for r in rows) for key in ("diverged", "seeds"))
    caption = [
        f"A hit: final loss on all examples within {number(record['tolerance'])} of the global minimum, in float64.",
        f"Setting: {plain(record['setting'])}.",
        f"{lost:,} of {runs:,} runs diverged; they count as runs without a hit." if lost else "",
    ]
    if many:
        caption.append(
            f"Thin lines: {len(teachers)} teachers, {rows[0]['seeds']} runs each a width; thick: their mean."
        )
    else:
        caption.append(f"Bars: Wilson 95 % intervals of {rows[0]['seeds']} runs; teacher {teachers[0]['teacher']}.")
    with page(7.6 if many else 5.4, 4.3, caption) as figure:
        head(figure, record["title"])
        axes = figure.add_axes(box(figure, 0.8, 0.65, 4.3, 2.95))
        if many:
            for t in teachers:
                line = [r for r in rows if r["teacher"] == t["teacher"]]
                axes.plot(
                    [r["hidden"] for r in line],
                    [r["rate"] for r in line],
                    color=_OURS["color"],
                    linewidth=0.6,
                    alpha=0.45,
                )
            axes.plot(widths, record["trend"]["mean_rate"], label="mean over teachers", markersize=4.5, **_OURS)
            _paper(axes, rows)
        else:
            _with_intervals(axes, rows, "this run", shift=-0.08)
            _paper(axes, rows, shift=0.08)
            axes.legend(loc="upper left")
        _rate_axes(axes, widths)
        if many:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=2)
            _draw_correlations(figure.add_axes(box(figure, 5.75, 0.65, 1.6, 2.95)), teachers)
        return save(figure, workdir, "hitting_rate")


def _draw_correlations(axes: Axes, teachers: Sequence[Mapping[str, Any]]) -> None:
    """Sorted rank correlations; teachers whose rate does not vary are counted in words."""
    from matplotlib.ticker import MaxNLocator

    for name, label, style in (("spearman", "Spearman", LINES[0]), ("kendall", "Kendall", LINES[1])):
        values = np.sort([t[name] for t in teachers if t[name] is not None])
        shape = {k: v for k, v in style.items() if k != "linestyle"}
        axes.plot(values, np.arange(1, len(values) + 1), linestyle="none", markersize=3.5, label=label, **shape)
    missing = sum(t["spearman"] is None for t in teachers)
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_xlim(-1.05, 1.05)
    axes.set_ylim(0, len(teachers) + 1)
    axes.set_xlabel("rank correlation\nof rate with width")
    axes.set_ylabel("teachers, sorted" + (f" ({missing} without variation)" if missing else ""))
    tidy(axes)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower left", bbox_to_anchor=(-0.1, 0.99), ncols=2, handletextpad=0.1, columnspacing=0.8)


# Losses --------------------------------------------------------------------------------------------------------------


def _floor(losses: np.ndarray, tolerance: float) -> float:
    """Where zeros are drawn on a logarithmic axis: below the least positive loss and the tolerance."""
    positive = losses[np.isfinite(losses) & (losses > 0)]
    least = min(float(positive.min()), tolerance) if positive.size else tolerance
    return max(10 ** (math.floor(math.log10(least)) - 1), 1e-14)


def _loss_axis(axes: Axes, floor: float, top: float, vertical: bool = True) -> None:
    """A logarithmic axis whose lowest tick is labelled 0."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    decades = range(math.ceil(math.log10(floor)) + 1, math.floor(math.log10(top)) + 1)
    ticks = [floor, *(10.0**k for k in list(decades)[:: max(1, len(decades) // 6)])]
    axis = axes.yaxis if vertical else axes.xaxis
    (axes.set_yscale if vertical else axes.set_xscale)("log")
    (axes.set_ylim if vertical else axes.set_xlim)(floor / 2, top * 1.6)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value <= floor * 1.01 else number(value)))


def _draw_losses(workdir: Path, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[Path]:
    import matplotlib

    hidden, losses, tolerance = arrays["hidden"], arrays["final_loss"], record["tolerance"]
    widths = sorted({int(h) for h in hidden})
    floor = _floor(losses, tolerance)
    finite = losses[np.isfinite(losses)]
    top = max(float(finite.max()) if finite.size else 1.0, 10 * tolerance)
    drawn = np.clip(losses, floor, None)
    diverged = int((~np.isfinite(losses)).sum())
    caption = [
        f"Dashed: the tolerance {number(tolerance)}. Losses of exactly 0 lie on the line marked 0, and are"
        f" {int((losses == 0).sum()):,} of {losses.size:,}.",
        f"{diverged:,} runs that diverged are left out." if diverged else "",
        f"Setting: {plain(record['setting'])}.",
    ]
    with page(8.6, 4.2, caption) as figure:
        head(figure, record["title"], "final losses")
        axes = figure.add_axes(box(figure, 0.85, 0.65, 3.75, 2.95))
        right = figure.add_axes(box(figure, 5.3, 0.65, 2.35, 2.95))
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(widths)))
        for width, color in zip(widths, colors, strict=True):
            mine = np.sort(drawn[(hidden == width) & np.isfinite(losses)])
            if mine.size == 0:
                continue
            across = width + 0.7 * ((np.arange(mine.size) * 0.6180339887) % 1 - 0.5)  # spread evenly, never at random
            axes.plot(across, mine, ".", color=color, markersize=2.6, alpha=0.75, markeredgewidth=0)
            share = np.arange(1, mine.size + 1) / (hidden == width).sum()
            right.step(
                np.concatenate([[floor / 2], mine, [top * 1.6]]), np.concatenate([[0], share, share[-1:]]),
                where="post", color=color, linewidth=1.0, label=str(width),
            )  # fmt: skip
        axes.axhline(tolerance, color="0.35", linestyle="--", linewidth=0.8)
        right.axvline(tolerance, color="0.35", linestyle="--", linewidth=0.8)
        axes.set_xlabel("hidden units")
        axes.set_ylabel("final loss on all examples")
        axes.set_xticks(widths)
        right.set_xlabel("final loss")
        right.set_ylabel("share of runs at most there")
        right.set_ylim(-0.03, 1.03)
        tidy(axes)
        tidy(right)
        _loss_axis(axes, floor, top)
        _loss_axis(right, floor, top, vertical=False)
        right.tick_params(axis="x", rotation=45)
        if finite.size:
            place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.05)}
            right.legend(title="hidden units", handlelength=1.2, fontsize=8, **place)
        return save(figure, workdir, "final_losses")


def _draw_curves(workdir: Path, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[Path]:
    hidden, losses, steps, tolerance = (arrays["hidden"], arrays["losses"], arrays["look_steps"], record["tolerance"])
    widths = sorted({int(h) for h in hidden})
    shown = sorted({widths[0], widths[len(widths) // 2], widths[-1]})
    chosen = {width: np.flatnonzero(hidden == width)[:_SAMPLE] for width in shown}
    sample = losses[np.concatenate(list(chosen.values()))].astype(float)
    floor = _floor(sample, tolerance)
    finite = sample[np.isfinite(sample)]
    top = max(float(finite.max()) if finite.size else 1.0, 10 * tolerance)
    caption = [
        f"Mean loss on all examples at each look, first {min(_SAMPLE, len(chosen[shown[0]]))} runs of each width."
        " Solid: runs that hit; dashed: the others.",
        f"Setting: {plain(record['setting'])}.",
    ]
    with page(0.95 + 2.6 * len(shown), 3.6, caption) as figure:
        head(figure, record["title"], "losses on the way")
        for across, width in enumerate(shown):
            axes = figure.add_axes(box(figure, 0.85 + 2.6 * across, 0.85, 2.3, 2.15))
            hits = 0
            for run in chosen[width]:
                hit = bool(arrays["final_loss"][run] <= tolerance)
                hits += hit
                curve = np.clip(losses[run].astype(float), floor, None)
                kept = slice(None)
                if hit and (curve <= floor).any():
                    kept = slice(int(np.argmax(curve <= floor)) + 1)  # at rest from there on
                style = _OURS if hit else _MISS
                axes.plot(
                    steps[kept],
                    curve[kept],
                    color=style["color"],
                    linestyle="-" if hit else "--",
                    linewidth=0.8,
                    alpha=0.8,
                )
                if hit:
                    axes.plot(steps[kept][-1], curve[kept][-1], "o", color=style["color"], markersize=3)
            axes.axhline(tolerance, color="0.35", linestyle=":", linewidth=0.9)
            axes.set_xlim(0, steps[-1])
            axes.set_title(f"{width} hidden units: {hits} of {len(chosen[width])} hit", fontsize=9.5, loc="left", pad=4)
            axes.set_xlabel("step")
            axes.set_ylabel("loss" if across == 0 else "")
            axes.tick_params(labelleft=across == 0)
            tidy(axes)
            _loss_axis(axes, floor, top)
            axes.set_xticks([0, steps[-1] // 2, steps[-1]], labels=[f"{s:,}" for s in (0, steps[-1] // 2, steps[-1])])
            axes.get_xticklabels()[0].set_horizontalalignment("left")
            axes.get_xticklabels()[-1].set_horizontalalignment("right")
        return save(figure, workdir, "loss_curves")


# The search ----------------------------------------------------------------------------------------------------------


def hitting_search(workdir: str | Path) -> list[Path]:
    """The evidence for each setting, the best fit beside the paper's table, and the same setting on other teachers.

    Reads `results/hitting_search.json` (`title`, `screen`, `settings`, `chosen`, `held_out`, `textbook`).

    Returns:
      The paths of `figures/hitting_search.png` and `.pdf`.

    Raises:
      ValueError: the record is missing or malformed.
    """
    workdir = Path(workdir)
    keys = ("title", "screen", "settings", "chosen", "held_out", "textbook")
    record = read_record(workdir, "hitting_search.json", keys)
    chosen = record["chosen"]
    widths = [r["hidden"] for r in chosen["rows"]]
    caption = [
        "Left: log of the probability of the paper's counts given those of the screen (beta-binomial), a mark for each"
        " teacher of the search, lines through their log mean.",
        f"Middle: the best fit, {plain(_words(chosen['setting']))}, teacher {chosen['teacher']}; bars: Wilson 95 %.",
        f"Right: the same setting on {len(record['held_out'])} teachers that the search did not see, and textbook"
        " settings on the chosen teacher. The fit is one of many free choices, not what the authors ran.",
    ]
    with page(11.7, 4.1, caption) as figure:
        head(figure, record["title"])
        left = figure.add_axes(box(figure, 0.75, 0.75, 2.95, 2.6))
        middle = figure.add_axes(box(figure, 4.5, 0.75, 2.55, 2.6))
        right = figure.add_axes(box(figure, 7.75, 0.75, 2.55, 2.6))
        _draw_evidence(left, record)
        _with_intervals(middle, chosen["rows"], "best fit", shift=-0.08)
        _paper(middle, chosen["rows"], shift=0.08)
        _rate_axes(middle, widths)
        middle.set_title(f"best fit: {chosen['rows_inside']} of {len(widths)} rows inside", fontsize=9.5, loc="left")
        middle.legend(loc="upper left")
        for index, entry in enumerate(record["held_out"]):
            right.plot(
                [r["hidden"] for r in entry["rows"]], [r["rate"] for r in entry["rows"]], color=_OURS["color"],
                linewidth=0.7, alpha=0.6, label="held-out teachers" if index == 0 else None,
            )  # fmt: skip
        for entry, style in zip(record["textbook"], (LINES[1], LINES[2], LINES[3]), strict=False):
            schedule, rate = entry["setting"].split("/")[-2:]
            label = f"{schedule}, rate {rate}"
            line = {**style, "marker": ""}
            right.plot([r["hidden"] for r in entry["rows"]], [r["rate"] for r in entry["rows"]], label=label, **line)
        _paper(right, chosen["rows"])
        _rate_axes(right, widths, "")
        right.set_title("other teachers, other rates", fontsize=9.5, loc="left")
        right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02), fontsize=8, handlelength=1.8)
        return save(figure, workdir, "hitting_search")


def _words(setting: str) -> str:
    batch, init, schedule, rate = setting.split("/")
    return f"batch {batch}, init {init}, {schedule} learning rate {rate}"


def _draw_evidence(axes: Axes, record: Mapping[str, Any]) -> None:
    """Log likelihood of every setting and teacher against the learning rate, one colour a program."""
    programs = list(dict.fromkeys(e["setting"].rpartition("/")[0] for e in record["screen"]))
    values = [e["log_likelihood"] for e in record["screen"]]
    rates = sorted({float(e["setting"].rpartition("/")[2]) for e in record["screen"]})
    for index, program in enumerate(programs):
        style = LINES[index % len(LINES)]
        points = [e for e in record["screen"] if e["setting"].rpartition("/")[0] == program]
        axes.plot(
            [float(e["setting"].rpartition("/")[2]) for e in points], [e["log_likelihood"] for e in points],
            linestyle="none", marker=style["marker"], markersize=2.5, color=style["color"], alpha=0.55,
        )  # fmt: skip
        line = sorted(
            (float(e["setting"].rpartition("/")[2]), e["log_evidence"])
            for e in record["settings"]
            if e["setting"].rpartition("/")[0] == program
        )
        batch, init, schedule = program.split("/")
        axes.plot(*zip(*line, strict=True), markersize=4, label=f"batch {batch}, {init}, {schedule}", **style)
    axes.set_xscale("log")
    axes.set_xticks(rates, labels=[f"{r:g}" for r in rates])
    axes.minorticks_off()
    axes.set_ylim(min(values) - 0.05 * np.ptp(values) - 1, max(values) + 0.42 * np.ptp(values) + 1)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("log likelihood of the paper's counts")
    axes.set_title("screen", fontsize=9.5, loc="left", color=NOTE_COLOR)
    tidy(axes)
    axes.legend(loc="upper left", fontsize=7.5, ncols=2, columnspacing=0.8, handlelength=1.8, borderaxespad=0.2)
