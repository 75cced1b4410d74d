"""Surfaces as pictures, in a notebook or a script: `surface` by matplotlib, `interactive` by plotly."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from dualgap_jax import figures
from dualgap_jax.convexity.grids import real
from dualgap_jax.figures import page, panels
from dualgap_jax.report import surfaces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LARGEST = 1e307  # of a loss that is drawn: the span of an axis must be a number


def _checked(surface: Any, plane: Any) -> dict[str, np.ndarray]:
    """Grid, losses, and the solutions of `plane` with the loss of the surface at each.

    Raises:
      TypeError: for what has no `xs`, `ys` and `loss`.
      ValueError: for arrays that do not fit one another.
    """
    try:
        xs, ys, loss = (real(getattr(surface, name)) for name in ("xs", "ys", "loss"))
    except (AttributeError, TypeError, ValueError) as error:
        raise TypeError(
            f"a surface has xs [nx], ys [ny] and loss [ny, nx], as dg.surface returns it; got"
            f" {type(surface).__name__} ({error})."
        ) from None
    if loss.shape != (ys.size, xs.size) or xs.ndim != 1 or ys.ndim != 1:
        raise ValueError(f"loss {loss.shape} must be [ny, nx] for ys {ys.shape} and xs {xs.shape}.")
    if min(xs.size, ys.size) < 2 or not ((np.diff(xs) > 0).all() and (np.diff(ys) > 0).all()):
        raise ValueError("xs and ys must each be at least two increasing coordinates.")
    if (np.isfinite(loss) & (np.abs(loss) > _LARGEST)).any():
        raise ValueError(f"losses beyond {_LARGEST:g} overflow as they are drawn: draw their logarithms.")
    anchors = np.zeros((0, 2)) if plane is None else np.asarray(plane.anchors, np.float64)
    heights = np.asarray([_at(xs, ys, loss, *anchor) for anchor in anchors])
    return {"xs": xs, "ys": ys, "loss": loss, "anchors": anchors, "heights": heights}


def _at(xs: np.ndarray, ys: np.ndarray, loss: np.ndarray, x: float, y: float) -> float:
    """The loss at a point, bilinear between its four neighbours on the grid; NaN outside the window."""
    if not (xs[0] <= x <= xs[-1] and ys[0] <= y <= ys[-1]):
        return math.nan
    column, row = (min(int(np.searchsorted(p, v, "right")) - 1, p.size - 2) for p, v in ((xs, x), (ys, y)))
    across = (x - xs[column]) / (xs[column + 1] - xs[column])
    up = (y - ys[row]) / (ys[row + 1] - ys[row])
    corners = loss[row : row + 2, column : column + 2]
    weights = np.outer([1 - up, up], [1 - across, across])
    return float((corners[weights > 0] * weights[weights > 0]).sum())


def surface(surface: Any, *, plane: Any = None, title: str = "") -> Figure:
    """The loss in 3-D and as a contour map, as a matplotlib figure; a notebook shows it, `.savefig(path)` keeps it.

    Losses that are masked or not finite are hatched, and a caption says what a reader must know: holes, uneven levels,
    an axis that is cut off.

    Args:
      surface: what `dg.surface` returned, or anything with `xs [nx]`, `ys [ny]` and `loss [ny, nx]`.
      plane: the plane that it was taken over, or None; its solutions are marked, and joined.
      title: above the picture.

    Raises:
      TypeError, ValueError: for what is no surface.
    """
    found = _checked(surface, plane)
    heights = found.pop("heights")
    sheet = panels.Surface(**found, edge_t=np.zeros(1), edge_loss=heights[:, None])
    scale = panels.scale_of(sheet.loss)
    with figures.any_backend(), page.page(8.2, 4.0, panels.surface_notes(sheet, scale)) as figure:
        page.head(figure, title)
        solid = figure.add_axes(page.box(figure, 0.0, 0.4, 3.85, 3.5), projection="3d")
        panels.draw_solid(solid, sheet, scale)
        flat = figure.add_axes(page.box(figure, 4.9, 0.65, 2.6, 2.6))
        panels.colour_bar(figure, flat, panels.draw_map(flat, sheet, scale), scale)
        flat.set(xlabel="$a$", ylabel="$b$")
        figure.canvas.draw()  # in the house style, which ends with this block

    def as_png() -> bytes:
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=100)
        return out.getvalue()

    figure._repr_png_ = as_png  # type: ignore[attr-defined]  # how IPython asks for a picture
    return figure


def interactive(surface: Any, *, plane: Any = None, title: str = "") -> Any:
    """The same in 3-D as a plotly figure that can be turned; `.write_html(path)` keeps it as a file that opens offline.

    Args:
      surface, plane, title: as in `surface`.

    Raises:
      TypeError, ValueError: for what is no surface.
      ImportError: where plotly is not installed.
    """
    found = _checked(surface, plane)
    try:
        import plotly.graph_objects as go
    except ImportError as error:
        raise ImportError("plotly is not installed: pip install 'dualgap_jax[report]'") from error
    return go.Figure(**surfaces.surface(found, title))
