"""Figures from saved records, and from nothing else: redrawing needs neither an accelerator nor a training run.

A work folder holds records in `results/`; each record kind has one function here, which writes its figures to
`figures/` as PNG (200 dpi) and PDF and returns the paths.  The same records give the same pixels.

| record | figures | what is drawn |
|---|---|---|
| `landscape.json`, `landscape.npz` | `landscape` | the loss on one plane (a panel of Figures 1 and 4) |
| `row.json` | `row`, `scores` | a row of Figures 1 and 4; each convexity score against I |
| `regimes.json` | `regimes`, `regimes_normalised` | a score over init x reduction x learning-rate scaling x I |

Non-finite numbers are never dropped in silence: grid points appear as grey hatched cells, points along an edge and
undefined scores as crosses, and the caption says so.
"""

from __future__ import annotations

import json
import math
import string
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dualgap_jax.registry import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

_STYLE: Any = {
    "font.family": ["STIXGeneral", "DejaVu Sans"],
    "mathtext.fontset": "stix",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,
    "path.simplify": False,
}
_COLORMAP = "viridis"
# Okabe and Ito's colours in an order that also separates in grey, each with its own dashes and marker.
_LINES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
    {"color": "#000000", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
)
_EDGES = ((0, 1), (1, 2), (2, 0))
_UNDEFINED = "Crosses at the upper border: the score is undefined (no finite loss, or a run that diverged)."
_ZERO = "Axes that show 0 are linear below their smallest non-zero value."
_NOTE_COLOR = "0.3"
_SURFACE_POINTS = 101  # per side of a 3-D surface; a finer grid is drawn in full in the map and thinned in 3-D

# What the coordinates a and b of the plane are.
_PLANE_LABELS = {
    "authors": (r"along $w_0-w_1$, in units of $\|w_2\|$", r"along $w_0-w_2$, in units of $\|w_2\|$"),
    "orthonormal": ("first orthonormal axis, parameter distance", "second orthonormal axis, parameter distance"),
}
# The panels of the scores chart: title, label of the vertical axis, score name -> label of its line.
_SCORE_PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    (
        "Distance to the lower convex envelope",
        "loss",
        {"envelope_max": "largest", "envelope_mean": "mean"},
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
        {"midpoint_violation_rate": "violations"},
    ),
    (
        "Negative curvature",
        "share; ratio of eigenvalues",
        {
            "negative_curvature_share": "share of the grid",
            "curvature_ratio_mean": "mean ratio",
        },
    ),
    (
        "Barrier between two solutions",
        "loss",
        {"barrier_max": "largest", "barrier_mean": "mean"},
    ),
)
# The line of key scores under a title, in this order; the first three also stand under each column of a row.
_KEY_SCORES = {
    "envelope_max": "largest envelope distance {} in loss",
    "envelope_max_per_zero_loss": "{} of the zero network's loss",
    "envelope_max_per_range": "{} of the range",
    "midpoint_violation_rate": "midpoint violations {}",
    "negative_curvature_share": "negative curvature {}",
    "barrier_max": "largest barrier {} in loss",
}


class _Surface(NamedTuple):
    """`results/landscape.npz`: the loss on a grid, the solutions' coordinates, the loss along the edges."""

    xs: Float[np.ndarray, " nx"]
    ys: Float[np.ndarray, " ny"]
    loss: Float[np.ndarray, "ny nx"]
    anchors: Float[np.ndarray, "3 2"]
    edge_t: Float[np.ndarray, " m"]
    edge_loss: Float[np.ndarray, "3 m"]


class _Scale(NamedTuple):
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


# Records -------------------------------------------------------------------------------------------------------------


def _read_record(workdir: Path, name: str, required: Sequence[str]) -> dict[str, Any]:
    """`results/<name>` as a dict.  Raises ValueError when it is missing, not a JSON object, or lacks a required key."""
    path = workdir / "results" / name
    if not path.is_file():
        raise ValueError(f"no record {path}; run the experiment that writes it, or name its work folder.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); run the experiment again to rewrite it.") from error
    missing = [key for key in required if not isinstance(record, dict) or key not in record]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; needed: {', '.join(required)}.")
    return record


def _read_surface(workdir: Path) -> _Surface:
    """`results/landscape.npz`.  Raises ValueError when it is missing, or an array is missing or of another shape."""
    path = workdir / "results" / "landscape.npz"
    if not path.is_file():
        raise ValueError(f"no record {path}; run the experiment that writes it, or name its work folder.")
    with np.load(path) as stored:
        missing = [name for name in _Surface._fields if name not in stored]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}; needed: {', '.join(_Surface._fields)}.")
        arrays = {name: np.asarray(stored[name], dtype=np.float64) for name in _Surface._fields}
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
    return _Surface(**arrays)


def _value(scores: Mapping[str, Any], name: str) -> float:
    """The score as a float; NaN when it is absent, null, or not a number."""
    value = scores.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


# Words ---------------------------------------------------------------------------------------------------------------


def _number(value: float, digits: int = 3) -> str:
    """A number for a label: `digits` significant digits, in powers of ten when very small or large."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    text = f"{value:.{digits}g}"
    if 1e-3 <= abs(float(text)) < 1e5:
        plain = f"{float(text):,.10f}".rstrip("0").rstrip(".")
        return plain.replace("-", "\N{MINUS SIGN}")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    front = {"1": "", "-1": "-"}.get(mantissa, rf"{mantissa}\times")
    return rf"${front}10^{{{int(exponent)}}}$"


def _key_scores(scores: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The sentence of each key score in `names`; absent ones are left out, null ones said to be undefined."""
    values = {name: _value(scores, name) for name in names if name in scores}
    return [
        _KEY_SCORES[name].format("undefined" if math.isnan(value) else _number(value)) for name, value in values.items()
    ]


def _non_finite(values: np.ndarray) -> str:
    """For instance '5 NaN and 2 infinite of 2,601'; '' when all are finite."""
    counts = {"NaN": int(np.isnan(values).sum()), "infinite": int(np.isinf(values).sum())}
    said = " and ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    return f"{said} of {values.size:,}" if said else ""


def _describe_solutions(solutions: Sequence[Mapping[str, Any]]) -> str:
    """'Solution 0: loss 9e-6, converged after 1,200 steps; …' from the record's list."""
    said = []
    for index, solution in enumerate(solutions):
        loss, steps = solution.get("loss"), solution.get("steps")
        value = _number(float(loss)) if isinstance(loss, int | float) else "undefined"
        after = f" after {steps:,} steps" if isinstance(steps, int) else ""
        said.append(f"{index}: loss {value}, {_plain(solution.get('status', 'status unknown'))}{after}")
    return f"Solution {'; '.join(said)}." if said else ""


def _plain(text: object) -> str:
    """Text from a record, with dollar signs kept from starting a formula."""
    return str(text).replace("$", r"\$")


# Page ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _page(width: float, height: float, caption: Sequence[str]) -> Iterator[Figure]:
    """A figure in the house typography, apart from pyplot's global state, with its caption at the lower edge.

    Args:
      width: in inches.
      height: in inches, without the caption, which adds as much as its lines need.
      caption: sentences; empty ones are left out.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    text = " ".join(sentence for sentence in caption if sentence)
    lines = textwrap.wrap(text, width=int((width - 0.5) * 20), break_long_words=False, break_on_hyphens=False)
    whole = height + 0.15 + 0.17 * len(lines)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc does not change the figures
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, whole), dpi=200, facecolor="white")
        FigureCanvasAgg(figure)
        for index, line in enumerate(lines):
            up = (0.15 + 0.17 * (len(lines) - 1 - index)) / whole
            figure.text(0.25 / width, up, line, ha="left", va="baseline", fontsize=8.5, color=_NOTE_COLOR)
        yield figure


def _head(figure: Figure, title: str, line: str = "") -> None:
    """The title and the line under it, at fixed distances from the top edge."""
    height = figure.get_figheight()
    figure.text(0.5, 1 - 0.24 / height, _plain(title), ha="center", va="center", fontsize=12.5)
    figure.text(0.5, 1 - 0.50 / height, line, ha="center", va="center", fontsize=9, color=_NOTE_COLOR)


def _box(figure: Figure, left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
    """A rectangle as matplotlib wants it, from inches from the figure's upper left corner."""
    across, up = figure.get_size_inches()
    return left / across, 1 - (top + height) / up, width / across, height / up


def _save(figure: Figure, workdir: Path, stem: str) -> list[Path]:
    """Writes `figures/<stem>.png` and `.pdf` without a time stamp."""
    folder = workdir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.png", folder / f"{stem}.pdf"]
    figure.savefig(paths[0], dpi=200)
    figure.savefig(paths[1], dpi=200, metadata={"CreationDate": None})
    return paths


# One surface ---------------------------------------------------------------------------------------------------------


def _scale(loss: Float[np.ndarray, "ny nx"]) -> _Scale:
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
    return _Scale(levels, norm, low, cap, even, empty)


def _cell_borders(points: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n_plus_1"]:
    """The borders of the cells around grid points, cut at the window."""
    return np.concatenate([points[:1], (points[1:] + points[:-1]) / 2, points[-1:]])


def _non_finite_cells(surface: _Surface) -> list[list[tuple[float, float]]]:
    """The corners of the cells of non-finite grid points, neighbours in a row of the grid joined into one rectangle."""
    x, y = _cell_borders(surface.xs).tolist(), _cell_borders(surface.ys).tolist()
    corners = []
    for i, broken in enumerate(~np.isfinite(surface.loss)):
        starts_and_ends = np.flatnonzero(np.diff(np.concatenate([[False], broken, [False]]).astype(int)))
        for j, k in starts_and_ends.reshape(-1, 2).tolist():
            corners.append([(x[j], y[i]), (x[k], y[i]), (x[k], y[i + 1]), (x[j], y[i + 1])])
    return corners


def _quads(surface: _Surface, cap: float) -> Float[np.ndarray, "quads 4 3"]:
    """The corners of the grid's cells with four finite losses, cut off at `cap`; a large grid is thinned evenly."""
    rows, columns = (
        np.unique(np.linspace(0, points.size - 1, min(points.size, _SURFACE_POINTS)).round().astype(int))
        for points in (surface.ys, surface.xs)
    )
    x, y = np.meshgrid(surface.xs[columns], surface.ys[rows])
    points = np.stack([x, y, np.minimum(_finite(surface.loss)[np.ix_(rows, columns)], cap)], axis=-1)
    quads = np.stack([points[:-1, :-1], points[:-1, 1:], points[1:, 1:], points[1:, :-1]], axis=2).reshape(-1, 4, 3)
    return quads[np.isfinite(quads).all(axis=(1, 2))]


def _draw_surface(axes: Any, surface: _Surface, scale: _Scale) -> None:
    """The 3-D surface with the solutions inside the window; cells of non-finite points lie grey on the floor."""
    from matplotlib import colormaps
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
            axes.text(a, b, top + 0.07 * height, str(index), fontsize=8.5, ha="center", va="bottom", zorder=5)
    axes.set(xlim=surface.xs[[0, -1]], ylim=surface.ys[[0, -1]], zlim=(floor, scale.cap))
    power = _power(max(abs(floor), abs(scale.cap)))
    for axis, bins, prune, unit in (
        (axes.xaxis, 5, "both", 1.0),
        (axes.yaxis, 5, "both", 1.0),
        (axes.zaxis, 5, None, 10.0**power),
    ):
        axis.set_major_locator(MaxNLocator(bins, prune=prune))
        axis.set_major_formatter(FuncFormatter(lambda value, _, unit=unit: _number(value / unit, 6)))
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


def _inside(surface: _Surface, x: float, y: float) -> bool:
    """Whether a point of the plane lies in the window of the grid."""
    return bool(surface.xs[0] <= x <= surface.xs[-1] and surface.ys[0] <= y <= surface.ys[-1])


def _draw_map(axes: Axes, surface: _Surface, scale: _Scale) -> Any:
    """The contour map with the window's border, the edges and the numbered solutions; returns the filled contours.

    Solutions outside the window widen the map by up to one window's width on each side, the ground between left blank;
    farther ones are drawn at that limit.
    """
    from matplotlib import colormaps
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

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
    span = np.asarray([xs[-1] - xs[0], ys[-1] - ys[0]])
    low, high = np.asarray([xs[0], ys[0]]), np.asarray([xs[-1], ys[-1]])
    marks = np.clip(surface.anchors, low - span, high + span)
    if not all(_inside(surface, x, y) for x, y in surface.anchors.tolist()):
        axes.add_patch(Rectangle((low[0], low[1]), *span.tolist(), fill=False, linewidth=0.8, zorder=3))
        low = np.where(marks.min(axis=0) < low, marks.min(axis=0) - 0.1 * span, low)
        high = np.where(marks.max(axis=0) > high, marks.max(axis=0) + 0.1 * span, high)
    casing = [withStroke(linewidth=2.4, foreground="white", alpha=0.75)]
    for start, end in _EDGES:
        axes.plot(*marks[[start, end]].T, color="0.15", linewidth=0.8, path_effects=casing, zorder=3.5)
    for index, mark in enumerate(marks.tolist()):
        axes.plot(*mark, "o", color="white", markeredgecolor="black", markeredgewidth=0.8, markersize=10, zorder=4)
        axes.annotate(str(index), mark, ha="center", va="center_baseline", fontsize=8.5, zorder=5)
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    if 1 / 3 <= (high[0] - low[0]) / (high[1] - low[1]) <= 3:
        axes.set_aspect("equal")
    return filled


def _colour_bar(figure: Figure, axes: Axes, filled: Any, scale: _Scale) -> None:
    """A colour bar of the height of the map, with every second level labelled; none for a map without finite losses."""
    if scale.empty:
        return
    place = axes.inset_axes((1.03, 0.0, 0.045, 1.0))
    bar = figure.colorbar(filled, cax=place, spacing="uniform")
    shown = scale.levels[:: 1 if scale.levels.size <= 8 else 2].tolist()
    bar.set_ticks(shown, labels=[_number(level, 6 if scale.even else 3) for level in shown], minor=False)
    bar.ax.minorticks_off()
    bar.outline.set_linewidth(0.6)
    place.tick_params(labelsize=7.5, length=2)
    place.set_title("loss", fontsize=8.5, pad=5, loc="left")


def _draw_edges(axes: Axes, surface: _Surface) -> None:
    """The loss along the straight edges between the solutions; crosses at the upper border are non-finite points."""
    for (start, end), losses, line in zip(_EDGES, surface.edge_loss, _LINES, strict=False):
        style = {key: value for key, value in line.items() if key != "marker"}
        axes.plot(surface.edge_t, _finite(losses), label=f"{start}–{end}", **style)
        _mark_undefined(axes, surface.edge_t.tolist(), losses, str(line["color"]))
    axes.margins(y=0.08)
    axes.set(xlim=(0.0, 1.0), xticks=[0.0, 0.5, 1.0], xlabel="edge between two solutions", ylabel="loss")
    axes.set_xticklabels(["start", "half-way", "end"])
    labels = axes.get_xticklabels()
    labels[0].set_horizontalalignment("left")
    labels[-1].set_horizontalalignment("right")
    _tidy(axes)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, columnspacing=1.0, handlelength=1.9)


def _tidy(axes: Axes) -> None:
    """Open axes with a light grid and the house number format."""
    from matplotlib.ticker import FuncFormatter

    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value, 6)))


def _surface_notes(surface: _Surface, scale: _Scale) -> list[str]:
    """What a reader must know to trust one surface: holes, cut axes, uneven levels, solutions outside the window."""
    notes = []
    broken = _non_finite(surface.loss)
    if broken:
        notes.append(f"Hatched cells, grey on the floor in 3-D, are losses that are not finite: {broken}.")
    if not scale.even:
        notes.append("Contour levels and colours follow the quantiles of the loss.")
    largest = np.max(surface.loss, where=np.isfinite(surface.loss), initial=-np.inf)
    if scale.cap < largest:
        notes.append(f"The 3-D surface is cut off at {_number(scale.cap)}; the largest loss is {_number(largest)}.")
    outside = [
        f"{index} at ({_number(x)}, {_number(y)})"
        for index, (x, y) in enumerate(surface.anchors.tolist())
        if not _inside(surface, x, y)
    ]
    if outside:
        notes.append(f"Outside the window: solution{'s' if len(outside) > 1 else ''} {', '.join(outside)}.")
    return notes


def _data_note(record: Mapping[str, Any]) -> str:
    """The caption's words for images that are not the originals (`data.image_format` of the record)."""
    lossy = record.get("data", {}).get("image_format") == "JPEG"
    return "Data: a JPEG-recompressed (lossy) copy of the images." if lossy else ""


def landscape(workdir: str | Path) -> list[Path]:
    """The loss surface in 3-D, its contour map with the three solutions, and the loss along the edges between them.

    Reads `results/landscape.npz` (`xs [nx]`, `ys [ny]`, `loss [ny, nx]`, `anchors [3, 2]`, `edge_t [m]`,
    `edge_loss [3, m]`, edges 0-1, 1-2, 2-0) and `results/landscape.json` (`title`, `num_branches`, `solutions`,
    `scores`, `axes`, and `data.image_format` if known: figures of lossy images say so).

    Returns:
      The paths of `figures/landscape.png` and `figures/landscape.pdf`.

    Raises:
      ValueError: a record is missing or malformed.
    """
    workdir = Path(workdir)
    record = _read_record(workdir, "landscape.json", ("title", "num_branches", "solutions", "scores", "axes"))
    surface = _read_surface(workdir)
    scale = _scale(surface.loss)
    x_label, y_label = _PLANE_LABELS.get(record["axes"], ("first axis of the plane", "second axis of the plane"))
    branches = f"I = {record['num_branches']:,}"
    line = _key_scores(record["scores"], list(_KEY_SCORES))
    line = line if branches in record["title"] else [branches.replace("I", "$I$"), *line]
    broken = _non_finite(surface.edge_loss)
    edge_note = f"Crosses are losses along the edges that are not finite: {broken}." if broken else ""
    caption = [
        _describe_solutions(record["solutions"]),
        *_surface_notes(surface, scale),
        edge_note,
        _data_note(record),
    ]
    with _page(11.0, 4.2, caption) as figure:
        _head(figure, record["title"], "  ·  ".join(line))
        solid = figure.add_axes(_box(figure, 0.0, 0.62, 3.85, 3.5), projection="3d")
        _draw_surface(solid, surface, scale)
        flat = figure.add_axes(_box(figure, 4.65, 0.95, 2.7, 2.7))
        filled = _draw_map(flat, surface, scale)
        flat.set(xlabel=f"$a$: {x_label}", ylabel=f"$b$: {y_label}")
        _colour_bar(figure, flat, filled, scale)
        _draw_edges(figure.add_axes(_box(figure, 8.65, 1.1, 2.15, 2.55)), surface)
        return _save(figure, workdir, "landscape")


# A row of surfaces ---------------------------------------------------------------------------------------------------


def row(workdir: str | Path) -> list[Path]:
    """A row of Figure 1 or 4, one column per number of branches, and the chart of each convexity score against it.

    Reads `results/row.json` (`title`, `paper_item`, `cells`, `score_names`); each of the `cells` has `num_branches`,
    `scores`, and `workdir`, the cell's work folder relative to this one, whose landscape record is drawn.

    Returns:
      The paths of `figures/row.png`, `figures/row.pdf`, `figures/scores.png` and `figures/scores.pdf`.

    Raises:
      ValueError: a record is missing or malformed, or there are no cells.
    """
    workdir = Path(workdir)
    record = _read_record(workdir, "row.json", ("title", "paper_item", "cells", "score_names"))
    cells = _cells(record, workdir, "row.json", ("num_branches", "workdir", "scores"))
    return _draw_row(workdir, record, cells) + _draw_scores(workdir, record, cells)


def _cells(record: Mapping[str, Any], workdir: Path, name: str, required: Sequence[str]) -> list[dict[str, Any]]:
    """The record's cells, fewest branches first.  Raises ValueError when there are none, or one lacks a key."""
    path = workdir / "results" / name
    if not record["cells"]:
        raise ValueError(f"{path} has no cells; run the experiment over at least one number of branches.")
    for index, cell in enumerate(record["cells"]):
        missing = [key for key in required if key not in cell]
        if missing:
            raise ValueError(f"{path}: cell {index} lacks {', '.join(missing)}; needed: {', '.join(required)}.")
    return sorted(record["cells"], key=lambda cell: cell["num_branches"])


def _draw_row(workdir: Path, record: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Surfaces above, their contour maps below, each on its own scale as in the paper."""
    surfaces = [_read_surface(workdir / cell["workdir"]) for cell in cells]
    scales = [_scale(surface.loss) for surface in surfaces]
    records = [_read_record(workdir / cell["workdir"], "landscape.json", ("axes",)) for cell in cells]
    planes = {r["axes"] for r in records}
    caption = ["Each panel has its own scale of loss, as in the paper."]
    for plane in sorted(planes & set(_PLANE_LABELS)):
        caption.append("$a$: {}; $b$: {}.".format(*_PLANE_LABELS[plane]))
    for index, (surface, scale) in enumerate(zip(surfaces, scales, strict=True)):
        caption += [f"({_letter(index)}) {note}" for note in _surface_notes(surface, scale)]
    caption += sorted({_data_note(r) for r in records})
    column = 2.8
    with _page(max(0.2 + column * len(cells), 5.8), 6.15, caption) as figure:
        _head(figure, record["title"], _plain(record["paper_item"]))
        width, height = figure.get_size_inches()
        for index, (cell, surface, scale) in enumerate(zip(cells, surfaces, scales, strict=True)):
            left = (width + 0.2 - column * len(cells)) / 2 + index * column
            _draw_surface(figure.add_axes(_box(figure, left - 0.15, 0.6, 2.75, 2.3), projection="3d"), surface, scale)
            middle = (left + 1.3) / width
            name = f"({_letter(index)}) $I$ = {cell['num_branches']:,}."
            figure.text(middle, 1 - 3.0 / height, name, ha="center", va="center", fontsize=11)
            flat = figure.add_axes(_box(figure, left + 0.35, 3.35, 1.85, 1.85))
            filled = _draw_map(flat, surface, scale)
            flat.set_xlabel("$a$", labelpad=1)
            flat.set_ylabel("$b$" if index == 0 else "", labelpad=0)
            flat.tick_params(labelsize=7.5)
            _colour_bar(figure, flat, filled, scale)
            lines = "\n".join(_key_scores(cell["scores"], list(_KEY_SCORES)[:3]))
            figure.text(middle, 1 - 5.6 / height, lines, ha="center", va="top", fontsize=8, color=_NOTE_COLOR)
        return _save(figure, workdir, "row")


def _letter(index: int) -> str:
    """'a', 'b', … for a panel; numbers after 'z'."""
    return string.ascii_lowercase[index] if index < 26 else str(index + 1)


# Scores against the number of branches -------------------------------------------------------------------------------


def _branch_axis(axes: Axes, counts: Sequence[int]) -> None:
    """A logarithmic horizontal axis whose ticks are the numbers of branches that were run."""
    from matplotlib.ticker import NullLocator

    low, high = min(counts), max(counts)
    pad = (high / low) ** 0.07 if high > low else 2.0
    axes.set_xscale("log")
    axes.set_xlim(low / pad, high * pad)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted(set(counts)), labels=[f"{count:,}" for count in sorted(set(counts))])


def _score_axis(axes: Axes, values: Float[np.ndarray, " n"]) -> None:
    """A logarithmic vertical axis; linear below the smallest positive value when there are zeros or negative values."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    values = values[np.isfinite(values)]
    sizes = np.abs(values[values != 0])
    if sizes.size == 0:
        axes.set_ylim(-0.05, 1.0)
        axes.set_yticks([0.0])
        return
    low, high, least = float(sizes.min()), float(sizes.max()), float(values.min())
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    bottom, top = low / 1.35, high * 1.35
    candidates = [
        [m * 10.0**d for d in decades[:: max(1, len(decades) // 6)] for m in mantissas]
        for mantissas in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0))
    ]
    candidates.append([float(tick) for tick in MaxNLocator(4).tick_values(bottom, top) if tick > 0])
    ticks = next((c for c in candidates if sum(bottom <= tick <= top for tick in c) >= 3), candidates[-1])
    if least > 0:
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
    else:
        axes.set_yscale("symlog", linthresh=low, linscale=0.6)
        axes.set_ylim(-0.35 * low if least == 0 else 1.35 * least, max(0.35 * low, 1.35 * float(values.max())))
        ticks = [0.0, *(sign * tick for tick in ticks if tick >= low for sign in (1, -1))]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())


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


def _is_number_or_null(scores: Mapping[str, Any], name: str) -> bool:
    """Whether the score can be drawn: a number, or null for an undefined one."""
    return name in scores and (scores[name] is None or isinstance(scores[name], int | float))


def _draw_scores(workdir: Path, record: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[Path]:
    """`figures/scores`: small multiples of the convexity scores against the number of branches."""
    counts = [cell["num_branches"] for cell in cells]
    panels = _score_panels(record["score_names"], cells)
    if not panels:
        raise ValueError(
            f"{workdir / 'results' / 'row.json'}: no numeric score among score_names {record['score_names']}; each must"
            " name an entry of the cells' scores."
        )
    tables = [{name: np.asarray([_value(cell["scores"], name) for cell in cells]) for name in p[2]} for p in panels]
    caption = _value_notes(np.concatenate([values for table in tables for values in table.values()]))
    across = min(3, len(panels))
    with _page(0.4 + 3.3 * max(across, 2), 0.75 + 2.5 * math.ceil(len(panels) / across), caption) as figure:
        _head(figure, f"{record['title']}: convexity scores", _plain(record["paper_item"]))
        for index, ((title, label, lines), table) in enumerate(zip(panels, tables, strict=True)):
            place = (0.8 + 3.3 * (index % across), 1.15 + 2.5 * (index // across), 2.5, 1.55)
            axes = figure.add_axes(_box(figure, *place))
            for (name, values), style in zip(table.items(), _LINES, strict=False):
                axes.plot(counts, values, label=lines[name], markersize=4.5, **style)
                _mark_undefined(axes, counts, values, str(style["color"]))
            _branch_axis(axes, counts)
            _score_axis(axes, np.concatenate(list(table.values())))
            _tidy(axes)
            axes.set_title(title, loc="left", pad=16 if len(lines) > 1 else 6)
            axes.set(xlabel="number of branches $I$", ylabel=label)
            if len(lines) > 1:
                axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.97), ncols=2, borderpad=0.1, columnspacing=1.2)
        return _save(figure, workdir, "scores")


def _value_notes(values: Float[np.ndarray, " n"]) -> list[str]:
    """The caption's words for undefined scores and for zeros on a logarithmic axis, as far as there are any."""
    return [_UNDEFINED] * bool(np.isnan(values).any()) + [_ZERO] * bool((values <= 0).any())


def _mark_undefined(axes: Axes, xs: Sequence[int | float], values: Float[np.ndarray, " n"], color: str) -> None:
    """Crosses at the upper border where a value is not finite."""
    where = np.asarray(xs, dtype=np.float64)[~np.isfinite(values)]
    border = axes.get_xaxis_transform()
    axes.plot(where, np.ones_like(where), "x", color=color, markersize=5, transform=border, clip_on=False)


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
    record = _read_record(workdir, "regimes.json", ("title", "score", "cells"))
    cells = _cells(record, workdir, "regimes.json", keys)
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
    styles = {scaling: _LINES[index % len(_LINES)] for index, scaling in enumerate(scalings)}
    statuses = Counter(str(status) for cell in cells for status in cell["statuses"])
    caption = [
        f"Lines: median over {repeats} repeats; bands: smallest to largest." if repeats > 1 else "",
        f"Runs: {', '.join(f'{count:,} {_plain(status)}' for status, count in sorted(statuses.items()))}.",
        "Hollow markers: a run did not end as 'converged'." if set(statuses) != {"converged"} else "",
        *_value_notes(np.asarray([_value(cell["scores"], score) for cell in cells for score in scores])),
    ]
    with _page(max(1.05 + 2.75 * len(inits), 6.6), 1.1 + 1.95 * len(rows), caption) as figure:
        _head(figure, title)
        for down, (score, label, reduction) in enumerate(rows):
            everything = np.asarray([_value(cell["scores"], score) for cell in cells])
            for across, init in enumerate(inits):
                left = (figure.get_figwidth() + 0.85 - 2.75 * len(inits)) / 2 + 2.75 * across
                axes = figure.add_axes(_box(figure, left, 0.95 + 1.95 * down, 2.4, 1.45))
                for scaling, style in styles.items():
                    regime = (init, reduction, scaling)
                    line = [c for c in cells if (c["init"], c["reduce"], c["lr_scaling"]) == regime]
                    _draw_regime(axes, line, score, style)
                _branch_axis(axes, counts)
                _score_axis(axes, everything)
                _tidy(axes)
                axes.tick_params(labelbottom=down == len(rows) - 1, labelleft=across == 0)
                axes.set_title(f"init {_plain(init)}, {_plain(reduction)} of branches", fontsize=9.5, pad=4, loc="left")
                axes.set_xlabel("number of branches $I$" if down == len(rows) - 1 else "")
                axes.set_ylabel(label if across == 0 else "", fontsize=8.5)
        handles = [
            Line2D([], [], label=f"learning-rate scaling: {_plain(scaling)}", markersize=4.8, **style)
            for scaling, style in styles.items()
        ]
        place = (0.5, 1 - 0.53 / figure.get_figheight())
        figure.legend(handles=handles, loc="center", bbox_to_anchor=place, ncols=len(handles), handlelength=2.8)
        return _save(figure, workdir, stem)


def _distinct(cells: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    """The values of one setting over the cells, in the order of the record."""
    return list(dict.fromkeys(str(cell[key]) for cell in cells))


def _draw_regime(axes: Axes, cells: Sequence[Mapping[str, Any]], score: str, style: Mapping[str, Any]) -> None:
    """One line: the median of the score over the repeats, its band, and how the runs ended."""
    counts = sorted({cell["num_branches"] for cell in cells})
    groups = [[cell for cell in cells if cell["num_branches"] == count] for count in counts]
    values = [np.asarray([_value(cell["scores"], score) for cell in group]) for group in groups]
    finite = [v[np.isfinite(v)] if np.isfinite(v).any() else np.asarray([math.nan]) for v in values]
    middle = np.asarray([np.median(v) for v in finite])
    color = str(style["color"])
    axes.fill_between(
        counts, [v.min() for v in finite], [v.max() for v in finite], color=color, alpha=0.16, linewidth=0
    )
    axes.plot(counts, middle, color=color, linestyle=style["linestyle"])
    for count, value, group in zip(counts, middle.tolist(), groups, strict=True):
        converged = all(status == "converged" for cell in group for status in cell["statuses"])
        fill = color if converged else "white"
        axes.plot(count, value, style["marker"], color=color, markerfacecolor=fill, markersize=4.8)
    _mark_undefined(axes, counts, np.asarray([v.sum() for v in values]), color)


# All the figures of a folder -----------------------------------------------------------------------------------------

FIGURES: Table[Callable[[str | Path], list[Path]]] = Table(
    "figure", {"landscape.json": landscape, "row.json": row, "regimes.json": regimes}
)
"""Record file under `results/` -> the function that draws its figures."""


def draw(workdir: str | Path, figures: Mapping[str, Callable[[str | Path], list[Path]]] = FIGURES) -> list[Path]:
    """Draws the figures of every record in `workdir`, and returns the paths written.

    Args:
      workdir: a work folder; its records lie in `results/`.
      figures: record file name -> drawing function; `FIGURES`, or an extension of it.

    Raises:
      ValueError: the folder holds none of the records, or one of them is malformed.
    """
    workdir = Path(workdir)
    found = [name for name in figures if (workdir / "results" / name).is_file()]
    if not found:
        raise ValueError(
            f"nothing to draw in {workdir}: looked for {', '.join(figures)} in {workdir / 'results'};"
            " name the work folder of a run that is complete."
        )
    return [path for name in found for path in figures[name](workdir)]
