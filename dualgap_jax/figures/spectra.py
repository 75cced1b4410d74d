"""Theorem 2: the certified optimum of a deep linear network, its spectrum, and SGD on the way to it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dualgap_jax.figures.page import LINES, box, data_note, head, number, page, read_record, save, tidy, value_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OPTIMUM = "0.25"


def spectral(workdir: str | Path) -> list[Path]:
    """SGD's objective falling to the certified optimum, the spectrum with its threshold, and the gap against steps.

    Reads `results/spectral.json` and `results/spectral.npz` (`singular_values [q]` and, for each depth H that was
    trained, `steps_H [k]` and `objective_H [seeds, k]`).

    Returns:
      The paths of `figures/spectral.png` and `.pdf`.

    Raises:
      ValueError: a record is missing or malformed.
    """
    workdir = Path(workdir)
    keys = ("title", "sizes", "primal", "dual", "relative_gap", "rank", "gamma", "half_norm", "theorem_applies", "sgd")
    record = read_record(workdir, "spectral.json", keys)
    depths = sorted({run["depth"] for run in record["sgd"]})
    wanted = ["singular_values", *(f"{key}_{depth}" for depth in depths for key in ("steps", "objective"))]
    arrays = read_record(workdir, "spectral.npz", wanted)
    curves = {depth: (arrays[f"steps_{depth}"], arrays[f"objective_{depth}"]) for depth in depths}
    return _draw(workdir, record, arrays["singular_values"], curves)


def _draw(
    workdir: Path, record: Mapping[str, Any], sigma: np.ndarray, curves: Mapping[int, tuple[np.ndarray, np.ndarray]]
) -> list[Path]:
    size = record["sizes"]
    seeds = max((len(values) for _, values in curves.values()), default=0)
    applies = "Theorem 2 applies" if record["theorem_applies"] else "outside the conditions of Theorem 2"
    gap = number(max(record["relative_gap"], 0.0), 2, "upper")
    caption = [
        f"Optimum: certified in float64, relative primal-dual gap {gap}; {applies}.",
        f"SGD: median over {seeds} seeds, bands from smallest to largest; the optimum does not depend on the depth $H$."
        if curves
        else "",
        "Gap: objective less the certified lower bound, relative to the objective at zero weights." if curves else "",
        data_note(record),
    ]
    panels = 3 if curves else 1
    with page(0.55 + 3.35 * panels, 3.55, caption) as figure:
        line = (
            rf"$X$: {size['d_0']:,} $\times$ {size['n']:,}, $Y$: {size['d_H']} $\times$ {size['n']:,}, hidden widths"
            rf" {', '.join(map(str, size['widths']))}, $\gamma$ = {number(record['gamma'])}, optimum"
            f" {number(record['primal'], 6, 'upper')}, rank {record['rank']}"
        )
        head(figure, record["title"], line if curves else line.replace(", hidden", "\nhidden"))
        axes = [figure.add_axes(box(figure, 0.8 + 3.35 * k, 1.05, 2.5, 1.95)) for k in range(panels)]
        _draw_spectrum(axes[-2 if curves else 0], record, sigma)
        if curves:
            _draw_objective(axes[0], record, curves)
            _draw_gap(axes[2], record, curves)
        return save(figure, workdir, "spectral")


def _draw_spectrum(axes: Axes, record: Mapping[str, Any], sigma: np.ndarray) -> None:
    """The singular values of Yt, the threshold, and what the network keeps of them."""
    from matplotlib.ticker import MaxNLocator

    index = np.arange(1, len(sigma) + 1)
    kept = np.where(index <= record["rank"], np.maximum(sigma - record["gamma"], 0), 0)
    axes.vlines(index, kept, sigma, color="0.8", linewidth=1.2)
    axes.plot(index, sigma, "o", color=LINES[0]["color"], markersize=4.5, label=r"$\sigma_j(\tilde Y)$")
    axes.plot(index, kept, "s", color=LINES[1]["color"], markersize=4, label="kept")
    axes.axhline(record["gamma"], color=_OPTIMUM, linestyle="--", linewidth=1, label=r"$\gamma$")
    axes.set(xlabel="index $j$", ylabel="singular value", ylim=(-0.04 * float(sigma[0]), 1.08 * float(sigma[0])))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    tidy(axes)
    axes.set_title("Spectrum", loc="left", pad=16)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.04, 0.97), ncols=3, borderpad=0.1, columnspacing=1.0)


def _lines(axes: Axes, curves: Mapping[int, tuple[np.ndarray, np.ndarray]], shift: float, scale: float) -> None:
    """One line a depth: `(objective - shift) / scale`, median and range over the seeds."""
    for (depth, (steps, values)), style in zip(curves.items(), LINES, strict=False):
        shown = (values - shift) / scale
        axes.fill_between(steps, shown.min(axis=0), shown.max(axis=0), color=style["color"], alpha=0.18, linewidth=0)
        axes.plot(
            steps, np.median(shown, axis=0), color=style["color"], linestyle=style["linestyle"], label=f"$H={depth}$"
        )


def _draw_objective(axes: Axes, record: Mapping[str, Any], curves: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> None:
    unit = record["half_norm"]
    _lines(axes, curves, 0.0, unit)
    axes.axhline(record["primal"] / unit, color=_OPTIMUM, linestyle="--", linewidth=1, label="optimum")
    low = record["primal"] / unit
    high = max(float(np.median(values[:, 0])) for _, values in curves.values()) / unit
    high = min(high, low + 1.5 * max(1 - low, 0.05))
    axes.set(xlabel="steps", ylabel=r"objective / $\frac{1}{2}\|Y\|_F^2$")
    axes.set_ylim(low - 0.06 * (high - low), high + 0.04 * (high - low))
    tidy(axes)
    axes.set_title("SGD and the certified optimum", loc="left", pad=16)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.06, 0.97), ncols=4, borderpad=0.1, columnspacing=0.8, handlelength=1.6
    )


def _draw_gap(axes: Axes, record: Mapping[str, Any], curves: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> None:
    _lines(axes, curves, record["dual"], record["half_norm"])
    shown = [np.median((values - record["dual"]) / record["half_norm"], axis=0) for _, values in curves.values()]
    value_axis(axes, np.concatenate(shown))
    axes.set(xlabel="steps", ylabel="relative gap")
    tidy(axes)
    axes.set_title("Gap to the certificate", loc="left", pad=16)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.04, 0.97), ncols=3, borderpad=0.1, columnspacing=1.0)
