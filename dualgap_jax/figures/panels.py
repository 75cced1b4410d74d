"""One loss surface: its record, and its panels: the 3-D surface, the contour map, the loss along the edges."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dualgap_jax.figures.page import (
    LINES,
    mark_undefined,
    non_finite,
    number,
    read_record,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

_COLORMAP = "viridis"
_EDGES = ((0, 1), (1, 2), (2, 0))
_SURFACE_POINTS = 101  # per side of a 3-D surface; a finer grid is drawn in full in the map and thinned in 3-D


class Surface(NamedTuple):
    """`results/landscape.npz`: the loss on a grid, the coordinates of k = 3 solutions, the loss along the edges.

    A surface from elsewhere may have none of these (k = 0).
    """

    xs: Float[np.ndarray, " nx"]
    ys: Float[np.ndarray, " ny"]
    loss: Float[np.ndarray, "ny nx"]
    anchors: Float[np.ndarray, "k 2"]
    edge_t: Float[np.ndarray, " m"]
    edge_loss: Float[np.ndarray, "k m"]


class Scale(NamedTuple):
    """How the losses of one surface are shown.

    Attributes:
      levels: increasing contour levels that cover every finite value.
      norm: colours by position among the levels.
      low: the lower end of the vertical axis: the smallest finite value, or half of it below a plateau.
      cap: the upper end: the largest finite value, unless a few values dwarf all others.
      even: False when the levels are quantiles instead of evenly spaced.
      empty: no loss is finite, and the rest is a placeholder.
    """

    levels: Float[np.ndarray, " k"]
    norm: Normalize
    low: float
    cap: float
    even: bool
    empty: bool


def read_surface(workdir: Path, name: str = "landscape.npz") -> Surface:
    """A surface of `results/`.  Raises ValueError when it is missing, or an array is missing or of another shape."""
    path = workdir / "results" / name
    stored = read_record(workdir, path.name, Surface._fields)
    arrays = {name: np.asarray(stored[name], dtype=np.float64) for name in Surface._fields}
    nx, ny, m = arrays["xs"].size, arrays["ys"].size, arrays["edge_t"].size
    shapes = {"xs": (nx,), "ys": (ny,), "loss": (ny, nx), "anchors": (3, 2), "edge_t": (m,), "edge_loss": (3, m)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{path}: {name} has shape {arrays[name].shape}; expected {shape} ({ny} ys by {nx} xs).")
    for name in ("xs", "ys"):
        if arrays[name].size < 2 or not np.all(np.diff(arrays[name]) > 0):
            raise ValueError(f"{path}: {name} must be at least two increasing coordinates; got {arrays[name]}.")
    if not np.isfinite(arrays["anchors"]).all():
        raise ValueError(f"{path}: anchors must be finite coordinates; got {arrays['anchors'].tolist()}.")
    return Surface(**arrays)


def scale_of(loss: Float[np.ndarray, "..."]) -> Scale:
    """Levels, colours and the vertical axis from the finite losses.

    Levels are evenly spaced while at least a quarter of the points lies in the upper nine tenths of the range; when
    fewer do, a few steep points would swallow the picture, and the levels are quantiles.
    """
    from matplotlib.colors import FuncNorm
    from matplotlib.ticker import MaxNLocator

    finite = loss[np.isfinite(loss)]
    empty = finite.size == 0
    finite = np.asarray([0.0, 1.0]) if empty else finite
    low, high = float(finite.min()), float(finite.max())
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # a plateau
        low, high = low - 0.5 * max(abs(low), 1e-3), high + 0.5 * max(abs(high), 1e-3)
        finite = np.asarray([low, high])
    upper_quartile, tail = (float(q) for q in np.quantile(finite, [0.75, 0.95]))
    levels = np.asarray(MaxNLocator(nbins=14).tick_values(low, high))
    quantiles = np.unique(np.quantile(finite, np.linspace(0.0, 1.0, 13)))
    even = upper_quartile - low >= 0.1 * (high - low) or quantiles.size < 4
    levels = levels if even else quantiles
    positions = np.linspace(0.0, 1.0, levels.size)
    norm = FuncNorm(
        (lambda values: np.interp(values, levels, positions), lambda shares: np.interp(shares, positions, levels)),
        vmin=float(levels[0]),
        vmax=float(levels[-1]),
    )
    cap = high if high - low <= 20 * (tail - low) or tail == low else tail
    return Scale(levels, norm, low, cap, even, empty)


def _cell_borders(points: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n_plus_1"]:
    """The borders of the cells around grid points, cut at the window."""
    return np.concatenate([points[:1], (points[1:] + points[:-1]) / 2, points[-1:]])


def _non_finite_cells(surface: Any) -> list[list[tuple[float, float]]]:
    """The corners of the cells of non-finite grid points, neighbours in a row of the grid joined into one rectangle."""
    x, y = _cell_borders(surface.xs).tolist(), _cell_borders(surface.ys).tolist()
    corners = []
    for i, broken in enumerate(~np.isfinite(surface.loss)):
        starts_and_ends = np.flatnonzero(np.diff(np.concatenate([[False], broken, [False]]).astype(int)))
        for j, k in starts_and_ends.reshape(-1, 2).tolist():
            corners.append([(x[j], y[i]), (x[k], y[i]), (x[k], y[i + 1]), (x[j], y[i + 1])])
    return corners


def _quads(surface: Surface, cap: float) -> Float[np.ndarray, "quads 4 3"]:
    """The corners of the grid's cells with four finite losses, cut off at `cap`; a large grid is thinned evenly."""
    rows, columns = (
        np.unique(np.linspace(0, points.size - 1, min(points.size, _SURFACE_POINTS)).round().astype(int))
        for points in (surface.ys, surface.xs)
    )
    x, y = np.meshgrid(surface.xs[columns], surface.ys[rows])
    points = np.stack([x, y, np.minimum(_finite(surface.loss)[np.ix_(rows, columns)], cap)], axis=-1)
    quads = np.stack([points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]], axis=2).reshape(-1, 4, 3)
    return quads[np.isfinite(quads).all(axis=(1, 2))]


def draw_solid(axes: Any, surface: Surface, scale: Scale) -> None:
    """The 3-D surface with the solutions inside the window; cells of non-finite points lie grey on the floor."""
    from matplotlib import colormaps
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter, MaxNLocator
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    height = scale.cap - scale.low
    floor = scale.low - 0.08 * height
    axes.computed_zorder = False
    quads = _quads(surface, scale.cap)
    if len(quads):
        sheet = Poly3DCollection(
            quads,
            cmap=colormaps[_COLORMAP],
            norm=scale.norm,
            linewidth=0.2,
            edgecolor=(0.0, 0.0, 0.0, 0.22),
            rasterized=len(quads) > 80**2,
            zorder=2,
        )
        sheet.set_array(quads[:, :, 2].mean(axis=1))
        axes.add_collection3d(sheet, autolim=False)
    cells = [[(*corner, floor) for corner in cell] for cell in _non_finite_cells(surface)]
    if cells:
        axes.add_collection3d(
            Poly3DCollection(cells, facecolor="0.6", edgecolor="0.35", linewidth=0.2, zorder=1), autolim=False
        )
    for index, (a, b) in enumerate(surface.anchors.tolist()):
        loss = float(surface.edge_loss[index, 0])
        if _inside(surface, a, b) and math.isfinite(loss):
            top = min(loss, scale.cap)
            axes.plot([a, a], [b, b], [floor, top], color="black", linewidth=0.7, zorder=3)
            axes.plot([a], [b], [top], "o", color="white", markeredgecolor="black", markersize=4.5, zorder=4)
            label = axes.text(a, b, top + 0.07 * height, str(index), fontsize=8.5, ha="center", va="bottom", zorder=5)
            label.set_path_effects([withStroke(linewidth=2.2, foreground="white")])
    axes.set(xlim=surface.xs[[0, -1]], ylim=surface.ys[[0, -1]], zlim=(floor, scale.cap))
    power = _power(max(abs(floor), abs(scale.cap)))
    for axis, bins, prune, unit in (
        (axes.xaxis, 5, "both", 1.0),
        (axes.yaxis, 5, "both", 1.0),
        (axes.zaxis, 5, None, 10.0**power),
    ):
        axis.set_major_locator(MaxNLocator(bins, prune=prune))
        axis.set_major_formatter(FuncFormatter(lambda value, _, unit=unit: number(value / unit, 6)))
        axis.set_pane_color((0.97, 0.97, 0.97, 1.0))
        axis._axinfo["grid"].update(color="0.85", linewidth=0.4)
    axes.set_xlabel("$a$", labelpad=-7)
    axes.set_ylabel("$b$", labelpad=-7)
    axes.set_zlabel(f"loss, in $10^{{{power}}}$" if power else "loss", labelpad=-5)
    axes.tick_params(labelsize=7.5, pad=-1.5)
    if scale.empty:
        axes.set_zticks([])
    axes.view_init(elev=28, azim=-58)
    axes.set_box_aspect((1.0, 1.0, 0.72), zoom=1.0)


def _power(size: float) -> int:
    """The power of ten, a multiple of three, that shortens the tick labels of very large or small losses; else 0."""
    return 0 if 1e-2 <= size < 1e4 or size == 0 else 3 * math.floor(math.log10(size) / 3)


def _finite(values: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The values with NaN in place of infinities."""
    return np.where(np.isfinite(values), values, np.nan)


def _inside(surface: Surface, x: float, y: float) -> bool:
    """Whether a point of the plane lies in the window of the grid."""
    return bool(surface.xs[0] <= x <= surface.xs[-1] and surface.ys[0] <= y <= surface.ys[-1])


def draw_contours(axes: Axes, surface: Any, scale: Scale) -> Any:
    """The losses of a grid (`xs`, `ys`, `loss`) in colours, with contours; returns the filled ones."""
    from matplotlib import colormaps
    from matplotlib.collections import PolyCollection

    xs, ys, masked = surface.xs, surface.ys, np.ma.masked_invalid(surface.loss)
    colors: dict[str, Any] = {"cmap": colormaps[_COLORMAP], "norm": scale.norm}
    # Every finite point colours its own cell, so that holes are as large as their cells; smooth contours lie above.
    axes.pcolormesh(_cell_borders(xs), _cell_borders(ys), masked, rasterized=True, **colors)
    filled = axes.contourf(xs, ys, masked, levels=scale.levels, zorder=1.5, **colors)
    if not scale.empty:
        axes.contour(xs, ys, masked, levels=scale.levels, colors="black", linewidths=0.35, alpha=0.55, zorder=2)
    cells = _non_finite_cells(surface)
    if cells:
        axes.add_collection(
            PolyCollection(cells, facecolor="0.82", edgecolor="0.45", hatch="//////", linewidth=0.0, zorder=2.5)
        )
    return filled


def draw_map(axes: Axes, surface: Surface, scale: Scale) -> Any:
    """The contour map with the window's border, the edges and the numbered solutions; returns the filled contours.

    Solutions outside the window widen the map by up to one window's width on each side, the ground between left blank;
    farther ones are drawn at that limit.
    """
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    xs, ys = surface.xs, surface.ys
    filled = draw_contours(axes, surface, scale)
    span = np.asarray([xs[-1] - xs[0], ys[-1] - ys[0]])
    low, high = np.asarray([xs[0], ys[0]]), np.asarray([xs[-1], ys[-1]])
    marks = np.clip(surface.anchors, low - span, high + span)
    if not all(_inside(surface, x, y) for x, y in surface.anchors.tolist()):
        axes.add_patch(Rectangle((low[0], low[1]), *span.tolist(), fill=False, linewidth=0.8, zorder=3))
        low = np.where(marks.min(axis=0) < low, marks.min(axis=0) - 0.1 * span, low)
        high = np.where(marks.max(axis=0) > high, marks.max(axis=0) + 0.1 * span, high)
    casing = [withStroke(linewidth=2.4, foreground="white", alpha=0.75)]
    for start, end in _EDGES if len(marks) == 3 else ():
        axes.plot(*marks[[start, end]].T, color="0.15", linewidth=0.8, path_effects=casing, zorder=3.5)
    for index, mark in enumerate(marks.tolist()):
        axes.plot(*mark, "o", color="white", markeredgecolor="black", markeredgewidth=0.8, markersize=10, zorder=4)
        axes.annotate(str(index), mark, ha="center", va="center_baseline", fontsize=8.5, zorder=5)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    if 1 / 3 <= (high[0] - low[0]) / (high[1] - low[1]) <= 3:
        axes.set_aspect("equal")
    return filled


def colour_bar(figure: Figure, axes: Axes, filled: Any, scale: Scale) -> None:
    """A colour bar of the height of the map, with every second level labelled; none for a map without finite losses."""
    if scale.empty:
        return
    place = axes.inset_axes((1.03, 0.0, 0.045, 1.0))
    bar = figure.colorbar(filled, cax=place, spacing="uniform")
    shown = scale.levels[:: 1 if scale.levels.size <= 8 else 2].tolist()
    labels = [number(level, 6) if scale.even else _short(level) for level in shown]
    bar.set_ticks(shown, labels=labels, minor=False)
    bar.ax.minorticks_off()
    bar.outline.set_linewidth(0.6)
    place.tick_params(labelsize=7.5, length=2)
    place.set_title("loss", fontsize=8.5, pad=5, loc="left")


def _short(level: float) -> str:
    """A level in a few characters: a power of ten would run out of the picture."""
    return f"{level:.5f}".rstrip("0") if 1e-5 <= level < 1e-3 else number(level, 3)


def draw_edges(axes: Axes, surface: Surface) -> None:
    """The loss along the straight edges between the solutions; crosses at the upper border are non-finite points."""
    for (start, end), losses, line in zip(_EDGES, surface.edge_loss, LINES, strict=False):
        style = {key: value for key, value in line.items() if key != "marker"}
        axes.plot(surface.edge_t, _finite(losses), label=f"{start}–{end}", **style)
        mark_undefined(axes, surface.edge_t.tolist(), losses, str(line["color"]))
    axes.margins(y=0.08)
    axes.set(xlim=(0.0, 1.0), xticks=[0.0, 0.5, 1.0], xlabel="edge between two solutions", ylabel="loss")
    axes.set_xticklabels(["start", "half-way", "end"])
    labels = axes.get_xticklabels()
    labels[0].set_horizontalalignment("left")
    labels[-1].set_horizontalalignment("right")
    tidy(axes)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.0, handlelength=1.9)


def surface_notes(surface: Surface, scale: Scale) -> list[str]:
    """What a reader must know to trust one surface: holes, cut axes, uneven levels, solutions outside the window."""
    notes = []
    broken = non_finite(surface.loss)
    if broken:
        notes.append(f"Hatched cells, grey on the floor in 3-D, are losses that are not finite: {broken}.")
    if not scale.even:
        notes.append("Contour levels and colours follow the quantiles of the loss.")
    largest = np.max(surface.loss, where=np.isfinite(surface.loss), initial=-np.inf)
    if scale.cap < largest:
        notes.append(f"The 3-D surface is cut off at {number(scale.cap)}; the largest loss is {number(largest)}.")
    outside = [
        f"{index} at ({number(x)}, {number(y)})"
        for index, (x, y) in enumerate(surface.anchors.tolist())
        if not _inside(surface, x, y)
    ]
    if outside:
        notes.append(f"Outside the window: solution{'s' if len(outside) > 1 else ''} {', '.join(outside)}.")
    return notes
