"""Figure 3: the Minkowski averages of a planar set, and their distance to the convex hull."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from dualgap_jax.figures.page import (
    LINES,
    box,
    head,
    number,
    page,
    plain,
    read_record,
    save,
    tidy,
    value_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FILL, _EDGE, _HULL = "#9ecae1", "#08519c", "0.45"


def shapley_folkman(workdir: str | Path) -> list[Path]:
    """The averages beside the hull, as in Figure 3, and the distance to the hull against the number of copies.

    Reads `results/shapley_folkman.json` (`title`, `paper_item`, `panels`, `rows`) and `results/shapley_folkman.npz`
    (`hull [k, 2]`, and for each panel n `n{n}_vertices` with `n{n}_lengths`).

    Returns:
      The paths of `figures/shapley_folkman.png` and `.pdf`, and of `figures/hull_distance.png` and `.pdf`.

    Raises:
      ValueError: a record is missing or malformed, or has no rows.
    """
    workdir = Path(workdir)
    keys = ("title", "paper_item", "panels", "rows", "circumradius", "inner_radius", "decay_exponent")
    record = read_record(workdir, "shapley_folkman.json", keys)
    if not record["rows"] or not record["panels"]:
        raise ValueError(f"{workdir / 'results' / 'shapley_folkman.json'} has no rows or no panels; run it again.")
    path = workdir / "results" / "shapley_folkman.npz"
    arrays = read_record(workdir, path.name, ("hull",))
    wanted = ["hull", *(f"n{n}_{key}" for n in record["panels"] for key in ("vertices", "lengths"))]
    if missing := [name for name in wanted if name not in arrays]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; run the experiment again to rewrite it.")
    return _draw_panels(workdir, record, arrays) + _draw_distance(workdir, record)


# The panels -----------------------------------------------------------------------------------------------------------


def _draw_panels(workdir: Path, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> list[Path]:
    panels, hull = record["panels"], arrays["hull"]
    low, high = hull.min(axis=0), hull.max(axis=0)
    middle = (low + high) / 2
    wide, tall = np.maximum((high - low) / 2, 1e-12) * 1.08
    wide, tall = max(wide, tall / 1.5), max(tall, 0.45 * wide)
    across = len(panels) + 1
    caption = ["Shaded: the set of all averages of that many points of the set.  Dashed: its convex hull."]
    size, left = 2.35, 0.55
    height = size * tall / wide
    with page(left + (size + 0.2) * across + 0.1, 0.95 + height + 0.4, caption) as figure:
        head(figure, record["title"], plain(record["paper_item"]))
        for index, n in enumerate([*panels, None]):
            axes = figure.add_axes(box(figure, left + (size + 0.2) * index, 1.0, size, height))
            axes.set_aspect("equal")
            axes.set_xlim(middle[0] - wide, middle[0] + wide)
            axes.set_ylim(middle[1] - tall, middle[1] + tall)
            if n is None:
                _fill(axes, hull, np.asarray([len(hull)]), 1.0)
            else:
                lengths = arrays[f"n{n}_lengths"]
                _fill(axes, arrays[f"n{n}_vertices"], lengths, min(1.0, (60 / max(len(lengths), 1)) ** 0.5))
            if n is not None:
                closed = np.concatenate([hull, hull[:1]])
                axes.plot(closed[:, 0], closed[:, 1], color=_HULL, linewidth=0.7, linestyle=(0, (4, 2)), zorder=0.5)
            axes.set_title(_panel_title(n), pad=5)
            axes.locator_params(nbins=5)
            axes.tick_params(labelleft=index == 0, length=2.5)
            axes.spines[:].set_color("0.6")
            axes.tick_params(color="0.6")
        return save(figure, workdir, "shapley_folkman")


def _panel_title(n: int | None) -> str:
    if n is None:
        return r"convex hull ($n \to \infty$)"
    return "the set" if n == 1 else f"average of {n:,} copies"


def _fill(axes: Axes, vertices: Float[np.ndarray, "v 2"], lengths: Int[np.ndarray, " k"], scale: float) -> None:
    """The union of loops as one path: strokes below, the fill above, so that only the outer outline is seen."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline

    ends = np.cumsum(lengths)
    loops = [vertices[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    areas = [loop for loop in loops if len(loop) > 2]
    if areas:
        corners = np.concatenate([np.concatenate([loop, loop[:1]]) for loop in areas])
        codes = [[Outline.MOVETO, *[Outline.LINETO] * (len(loop) - 1), Outline.CLOSEPOLY] for loop in areas]
        outline = Outline(corners, list(itertools.chain.from_iterable(codes)))
        axes.add_patch(
            PathPatch(outline, facecolor="none", edgecolor=_EDGE, linewidth=1.6, joinstyle="round", zorder=1)
        )
        axes.add_patch(PathPatch(outline, facecolor=_FILL, edgecolor="none", zorder=2))
    segments = [loop for loop in loops if len(loop) == 2]
    axes.add_collection(LineCollection(segments, colors=_EDGE, linewidths=0.6 + scale, zorder=2.5))
    dots = np.asarray([loop[0] for loop in loops if len(loop) == 1]).reshape(-1, 2)
    axes.plot(dots[:, 0], dots[:, 1], "o", color=_EDGE, markersize=0.6 + 4 * scale, markeredgewidth=0, zorder=2.6)


# The distance ---------------------------------------------------------------------------------------------------------


def _draw_distance(workdir: Path, record: Mapping[str, Any]) -> list[Path]:
    rows: Sequence[Mapping[str, Any]] = record["rows"]
    n, distance, error, starr, folkman = (
        np.asarray([row[key] for row in rows], dtype=np.float64)
        for key in ("n", "distance", "error", "starr_bound", "shapley_folkman_bound")
    )
    kinds = {row["kind"] for row in rows}
    exponent = record["decay_exponent"]
    caption = [
        "Distance: exact (closed form)."
        if kinds == {"exact"}
        else f"Bars: proven error, at most {number(error.max(), bound='upper')}.",
        r"Bounds: $\sqrt{\min(n,2)}/n$ times the inner radius "
        f"{number(record['inner_radius'])} or the circumradius {number(record['circumradius'])}.",
        f"Fitted slope of the distance: {number(exponent)}." if exponent is not None else "",
    ]
    with page(5.6, 3.9, caption) as figure:
        head(figure, "Distance to the convex hull", plain(record["title"]))
        axes = figure.add_axes(box(figure, 0.85, 0.8, 4.45, 2.6))
        styles = LINES
        for values, label, style in (
            (folkman, "Shapley–Folkman bound (circumradius)", styles[1]),
            (starr, "Starr bound (inner radius)", styles[2]),
        ):
            axes.plot(n, values, label=label, color=style["color"], linestyle=style["linestyle"])
        axes.plot(n, distance, label="distance", markersize=4, **styles[0])
        bars = [np.minimum(error, distance), error]
        axes.errorbar(n, distance, yerr=bars, fmt="none", ecolor=styles[0]["color"], capsize=2, elinewidth=0.9)
        _copies_axis(axes, n)
        ends = np.where(distance > error, distance - error, distance)
        value_axis(axes, np.concatenate([distance, ends, starr, folkman]))
        tidy(axes)
        axes.set(xlabel="number of copies $n$", ylabel="Hausdorff distance")
        axes.legend(loc="lower left" if distance.min() > 0 else "upper right", fontsize=8)
        return save(figure, workdir, "hull_distance")


def _copies_axis(axes: Axes, n: Float[np.ndarray, " k"]) -> None:
    """A logarithmic axis with ticks at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import NullLocator

    low, high = float(n.min()), float(n.max())
    pad = (high / low) ** 0.05 if high > low else 2.0
    axes.set_xscale("log")
    axes.set_xlim(low / pad, high * pad)
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = [m * 10**d for d in range(7) for m in (1, 2, 5) if low / pad <= m * 10**d <= high * pad]
    axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
