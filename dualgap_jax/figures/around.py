"""What a landscape record holds beside its planes: the Hessian's spectrum, the path of training, a low curve."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dualgap_jax.figures.page import (
    LINES,
    box,
    data_note,
    head,
    mark_undefined,
    non_finite,
    number,
    page,
    read_record,
    save,
    tidy,
)
from dualgap_jax.figures.panels import colour_bar, draw_contours, scale_of

_WIDTH = 0.01  # of a widened node, in the range of the spectrum


def draw_around(workdir: Path, record: Mapping[str, Any]) -> list[Path]:
    """The figures of what the record of a landscape has of `hessian`, `trajectory` and `curve`."""
    drawn: list[Path] = []
    for name, draw in (("hessian", _spectrum), ("trajectory", _trajectory), ("curve", _curve)):
        if name in record:
            drawn += draw(workdir, record)
    return drawn


def _lines(record: Mapping[str, Any]) -> tuple[str, str]:
    branches = f"I = {record['num_branches']:,}"
    return record["title"], "" if branches in record["title"] else branches.replace("I", "$I$")


def _spectrum(workdir: Path, record: Mapping[str, Any]) -> list[Path]:
    """The spectral density of the Hessian with its extreme eigenvalues, and those of every branch's block, if known."""
    stored = read_record(workdir, "spectrum.npz", ("network_nodes", "network_weights", "network_largest"))
    said = record["hessian"]["network"]
    largest, smallest = stored["network_largest"][0], stored["network_smallest"][0]
    nodes, weights = stored["network_nodes"][0], stored["network_weights"][0]
    low, high = float(nodes.min()), float(nodes.max())
    span = high - low if high > low else max(abs(high), 1.0)
    at = np.linspace(low - 0.05 * span, high + 0.05 * span, 1001)
    width = _WIDTH * span
    bells = np.exp(-0.5 * ((at[:, None, None] - nodes) / width) ** 2) / (width * math.sqrt(2 * math.pi))
    density = (bells * weights).sum(-1).mean(-1)
    felt, total = said["examples"]
    caption = [
        f"Hessian of the mean loss at solution 0, {said['size']:,} parameters, where the loss is smooth; estimated by"
        f" the Lanczos algorithm ({nodes.shape[1]} steps from {nodes.shape[0]} random vectors).",
        f"{felt:,} of the {total:,} examples have a derivative that is not 0." if felt < total else "",
        f"Density: each node widened to {number(width, 2)}.",
        "" if said["converged"] else "The eigenvalues have not all reached the tolerance.",
        data_note(record),
    ]
    blocks = "branches_largest" in stored
    with page(9.0 if blocks else 5.4, 3.6, caption) as figure:
        title, line = _lines(record)
        trace = f"trace {number(float(said['trace']))} ± {number(float(said['trace_error']), 2)}"
        ends = f"eigenvalues from {number(float(smallest[0]))} to {number(float(largest[0]))}"
        head(figure, f"{title}: Hessian", "  ·  ".join(filter(None, (line, ends, trace))))
        axes = figure.add_axes(box(figure, 0.85, 0.85, 4.1 if not blocks else 3.5, 2.2))
        axes.plot(at, density, color=LINES[0]["color"])
        axes.set_yscale("log")
        top = float(density.max())
        axes.set_ylim(1e-7 * top, 3 * top)
        for values, style in ((largest, LINES[1]), (smallest, LINES[2])):
            axes.plot(values, np.full(len(values), 3e-7 * top), "|", color=style["color"], markersize=9)
        axes.set(xlabel=f"eigenvalue (marks: the {len(largest)} at each end)", ylabel="spectral density")
        _plain(axes)
        if blocks:
            axes = figure.add_axes(box(figure, 5.5, 0.85, 3.2, 2.2))
            order = np.argsort(-stored["branches_largest"][:, 0])
            for name, style in (("largest", LINES[1]), ("smallest", LINES[2])):
                axes.plot(stored[f"branches_{name}"][order, 0], ".", color=style["color"], label=name, markersize=4)
            axes.set(xlabel="branch, by its largest eigenvalue", ylabel="eigenvalue of its block")
            axes.legend(loc="best")
            _plain(axes)
        return save(figure, workdir, "spectrum")


def _trajectory(workdir: Path, record: Mapping[str, Any]) -> list[Path]:
    """The loss on the plane of the two main directions of the path of solution 0, with the path."""
    names = ("xs", "ys", "loss", "coordinates", "path_loss", "steps")
    stored = SimpleNamespace(**read_record(workdir, "trajectory.npz", names))
    scale = scale_of(stored.loss)
    first, second = (f"{100 * float(share):.3g} %" for share in record["trajectory"]["explained"][:2])
    broken = non_finite(stored.loss)
    caption = [
        f"{len(stored.steps)} snapshots of solution 0 from its start (square) to its end (disc), seen from the plane of"
        f" the two main directions of their differences from the last, which hold {first} and {second} of the squared"
        " distances.",
        "The losses under the path are those of the plane; right, those of the projected snapshots.",
        "Contour levels and colours follow the quantiles of the loss." if not scale.even else "",
        f"Hatched cells are losses that are not finite: {broken}." if broken else "",
        data_note(record),
    ]
    with page(9.0, 4.1, caption) as figure:
        title, line = _lines(record)
        head(figure, f"{title}: path of training", line)
        axes = figure.add_axes(box(figure, 0.85, 0.85, 3.6, 2.7))
        filled = draw_contours(axes, stored, scale)
        path = np.asarray(stored.coordinates)
        axes.plot(*path.T, "-o", color="white", markeredgecolor="black", markersize=3.2, linewidth=1.2, zorder=4)
        axes.plot(*path[0], "s", color="white", markeredgecolor="black", markersize=7, zorder=5)
        axes.plot(*path[-1], "o", color="white", markeredgecolor="black", markersize=8, zorder=5)
        axes.set(xlabel=f"first direction ({first})", ylabel=f"second direction ({second})")
        axes.set(xlim=(stored.xs[0], stored.xs[-1]), ylim=(stored.ys[0], stored.ys[-1]))
        colour_bar(figure, axes, filled, scale)
        axes = figure.add_axes(box(figure, 6.15, 0.85, 2.5, 2.7))
        axes.plot(stored.steps, stored.path_loss, "-o", color=LINES[0]["color"], markersize=3)
        axes.set(xlabel="step", ylabel="loss at the projection")
        mark_undefined(axes, stored.steps.tolist(), stored.path_loss, str(LINES[0]["color"]))
        tidy(axes)
        return save(figure, workdir, "trajectory")


def _curve(workdir: Path, record: Mapping[str, Any]) -> list[Path]:
    """The loss along the trained curve and along the straight segment between solutions 0 and 1."""
    stored = read_record(workdir, "curve.npz", ("t", "losses", "straight"))
    said = record["curve"]
    caption = [
        f"Quadratic Bézier curve from solution 0 to 1, its control point trained for {said['steps']:,} steps.",
        data_note(record),
    ]
    with page(5.4, 3.6, caption) as figure:
        title, line = _lines(record)
        barriers = f"barrier {_said(said['straight_barrier'])} straight, {_said(said['barrier'])} along the curve"
        head(figure, f"{title}: a way between solutions", "  ·  ".join(filter(None, (line, barriers))))
        axes = figure.add_axes(box(figure, 0.85, 0.95, 4.2, 2.1))
        for name, label, style in (("straight", "straight segment", LINES[1]), ("losses", "curve", LINES[0])):
            values = np.asarray(stored[name])
            shown = np.where(np.isfinite(values), values, np.nan)
            axes.plot(stored["t"], shown, label=label, color=style["color"], linestyle=style["linestyle"])
            mark_undefined(axes, stored["t"].tolist(), values, str(style["color"]))
        axes.set(xlabel="$t$, from solution 0 to 1", ylabel="loss", xlim=(0, 1))
        tidy(axes)
        axes.legend(loc="best")
        return save(figure, workdir, "curve")


def _said(value: Any) -> str:
    value = float(value)
    return number(value) if math.isfinite(value) else "undefined"


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)
