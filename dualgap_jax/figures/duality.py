"""Theorem 1: the duality gap against the number of branches, the value function and its envelope, and the dual."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualgap_jax.figures.page import (
    LINES,
    NOTE_COLOR,
    box,
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

_GAP, _BOUND, _VALUE, _SGD = LINES[0], LINES[1], LINES[4], LINES[2]


def duality_gap(workdir: str | Path) -> list[Path]:
    """The gap and the bound `(2/I) Delta` against I, the value function with its envelope, `Q(lam) - lam K`, and SGD.

    Reads `results/duality_gap.json` (`title`, `status`, `rows`, `value_function`, `dual_function`, `delta`, `trained`).

    Returns:
      The paths of `figures/duality_gap.png` and `.pdf`.

    Raises:
      ValueError: the record is missing or malformed, or has no rows.
    """
    workdir = Path(workdir)
    keys = ("title", "status", "method", "budget", "rows", "value_function", "dual_function", "delta", "trained")
    record = read_record(workdir, "duality_gap.json", keys)
    if not record["rows"]:
        raise ValueError(f"{workdir / 'results' / 'duality_gap.json'} has no rows; run it over at least one I.")
    rows = sorted(record["rows"], key=lambda row: row["num_branches"])
    trained = sorted(record["trained"], key=lambda row: row["num_branches"])
    with page(9.6, 7.0, _caption(record, rows, trained)) as figure:
        head(figure, record["title"], plain(f"{record['status']}: {record['method']}"))
        panels = [figure.add_axes(box(figure, left, top, 3.75, 2.3)) for top in (1.05, 4.2) for left in (0.85, 5.55)]
        _draw_gap(panels[0], rows)
        _draw_value(panels[1], record)
        _draw_dual(panels[2], record, rows)
        _draw_trained(panels[3], rows, trained)
        return save(figure, workdir, "duality_gap")


def _caption(record: Mapping[str, Any], rows: list[Mapping[str, Any]], trained: list[Mapping[str, Any]]) -> list[str]:
    proven = record["status"] == "certified"
    if proven:
        verified = sum(row["verdict"] == "verified" for row in rows)
    else:
        verified = sum(row["gap_upper"] <= row["bound"] * row["delta_lower"] for row in rows)
    delta = record["delta"]
    least = number(value_of(delta, "lower"), bound="lower")
    return [
        f"Bands: {'proven bounds' if proven else 'bounds that rest on a search (estimated)'} on the gap"
        " and the value function; a band that reaches the lower border has lower bound 0.",
        f"{'Proven numbers verify the theorem' if proven else 'The estimates satisfy the theorem'} in {verified}"
        f" of {len(rows)} rows, with Delta at least {least} ({plain(delta['status'])}).",
        f"SGD: projected, {len(trained[0]['losses'])} seeds each, on problem (2) with its constraint{_lost(trained)}."
        if trained
        else "",
    ]


def _lost(trained: list[Mapping[str, Any]]) -> str:
    lost = sum(int(row.get("diverged", 0)) for row in trained)
    return f"; {lost} runs diverged and are not drawn" if lost else ""


def _series(rows: list[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.array([value_of(row, key) for row in rows])


def _log_branches(axes: Axes, counts: np.ndarray) -> None:
    """A logarithmic axis of I with decades as ticks (powers of two where there is less than a decade)."""
    from matplotlib.ticker import NullLocator

    low, high = float(counts.min()), float(counts.max())
    axes.set_xscale("log")
    axes.set_xlim(low / 1.3, high * 1.3)
    ticks = 10.0 ** np.arange(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    if len(ticks) < 3:
        ticks = np.unique(counts)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, labels=[f"{int(t):,}" for t in ticks])
    axes.set_xlabel("number of branches $I$")


def _draw_gap(axes: Axes, rows: list[Mapping[str, Any]]) -> None:
    counts = _series(rows, "num_branches")
    low, high, bound = _series(rows, "gap_lower"), _series(rows, "gap_upper"), _series(rows, "bound")
    delta = _series(rows, "delta_lower")
    positive = np.concatenate([high, bound * delta])
    positive = positive[positive > 0]
    if not positive.size:
        axes.text(0.5, 0.5, "the gap is 0", transform=axes.transAxes, ha="center", va="center", color=NOTE_COLOR)
        positive = np.ones(1)
    floor, top = float(positive.min()) / 3, float(positive.max()) * 3
    axes.set_yscale("log")
    style = {k: v for k, v in _GAP.items() if k != "marker"}
    axes.fill_between(
        counts, np.clip(low, floor, None), np.clip(high, floor, None), color=_GAP["color"], alpha=0.25, lw=0
    )
    axes.plot(counts, np.clip(high, floor, None), marker=".", markersize=5, label=r"$\inf(P)-\sup(D)$, upper", **style)
    style = {k: v for k, v in _BOUND.items() if k != "marker"}
    axes.plot(counts, bound * delta, label=r"$(2/I)\,\Delta$, lower", **style)
    tidy(axes)
    _log_branches(axes, counts)
    axes.set_ylim(floor, top)
    decades = np.arange(math.ceil(math.log10(floor)), math.floor(math.log10(top)) + 1)
    step = max(1, math.ceil(len(decades) / 7))
    axes.set_yticks(10.0 ** decades[::step])
    axes.yaxis.set_minor_locator(_no_ticks())
    axes.set_ylabel("loss")
    axes.set_title("Duality gap and the bound of Theorem 1", loc="left")
    axes.legend(loc="upper right")


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _draw_value(axes: Axes, record: Mapping[str, Any]) -> None:
    curve = {k: np.asarray(v, np.float64) for k, v in record["value_function"].items()}
    b = curve["budgets"]
    axes.fill_between(b, curve["lower"], curve["upper"], color=_GAP["color"], alpha=0.3, lw=0)
    axes.plot(b, curve["upper"], color=_GAP["color"], label="$v(b)$")
    axes.plot(b, curve["envelope"], color=_BOUND["color"], linestyle="--", label="$v^{**}(b)$")
    budget = float(record["budget"])
    axes.axvline(budget, color=NOTE_COLOR, lw=0.8, linestyle=":")
    axes.annotate(
        "$K$",
        (budget, 1.0),
        xycoords=axes.get_xaxis_transform(),
        xytext=(3, -9),
        textcoords="offset points",
        fontsize=9,
    )
    tidy(axes)
    axes.set_xlim(b[0], b[-1])
    axes.set(xlabel="budget $b$ of one branch", ylabel="loss")
    axes.set_title("Value function and its convex envelope", loc="left")
    axes.legend(loc="upper right")


def _draw_dual(axes: Axes, record: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> None:
    curve = record["dual_function"]
    lams = np.asarray(curve["multipliers"], np.float64)
    objective = np.asarray(curve["dual_objective"], np.float64)
    axes.plot(lams, np.asarray(curve["q"], np.float64), color=_VALUE["color"], linestyle="-.", label=r"$Q(\lambda)$")
    axes.plot(lams, objective, color=_GAP["color"], label=r"$Q(\lambda)-\lambda K$")
    best = int(np.argmin(np.abs(lams - float(curve["best"]))))
    axes.plot(lams[best], objective[best], "o", color=_GAP["color"], markersize=5, label=r"$\sup(D)$")
    for row, style in ((rows[0], "--"), (rows[min(1, len(rows) - 1)], ":")):
        label = rf"$\inf(P)$ at $I={row['num_branches']:,}$"
        axes.axhline(value_of(row, "primal_upper"), color=_BOUND["color"], linestyle=style, lw=1.0, label=label)
        if len(rows) == 1:
            break
    tidy(axes)
    axes.set_xlim(lams[0], lams[-1])
    axes.set(xlabel=r"multiplier $\lambda$", ylabel="loss")
    axes.set_title("Dual function", loc="left")
    axes.legend(loc="best", fontsize=7.5)


def _draw_trained(axes: Axes, rows: list[Mapping[str, Any]], trained: list[Mapping[str, Any]]) -> None:
    """Where projected SGD ends, in loss above sup(D), and inf(P) on the same scale."""
    shown = trained or rows
    counts = _series(shown, "num_branches")
    primal, dual = _series(shown, "primal_upper"), _series(shown, "dual_lower")
    axes.plot(counts, primal - dual, label=r"$\inf(P)$", **{**_GAP, "marker": "_"})
    for row, least in zip(trained, dual, strict=False):
        losses = np.asarray(row["losses"], np.float64) - least
        axes.plot(np.full(len(losses), row["num_branches"]), losses, "o", color=_SGD["color"], markersize=3, alpha=0.35)
    if trained:
        axes.plot(counts, _series(trained, "median") - dual, label="SGD, median", **{**_SGD, "marker": ""})
        axes.plot([], [], "o", color=_SGD["color"], markersize=3, alpha=0.6, label="SGD, each seed")
    axes.axhline(0.0, color=_BOUND["color"], linestyle="--", lw=1.0, label=r"$\sup(D)$")
    tidy(axes)
    _log_branches(axes, counts)
    axes.set_xticks(np.unique(counts), labels=[f"{int(c):,}" for c in np.unique(counts)])
    axes.set_ylabel(r"loss above $\sup(D)$")
    axes.set_title("Trained networks and inf(P)" if trained else "inf(P) and sup(D)", loc="left")
    axes.legend(loc="upper right")
