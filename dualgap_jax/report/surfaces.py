"""Loss surfaces of a report that can be turned and looked into, by plotly; its program is part of the file."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_POINTS = 101  # a side of a 3-D surface; a finer grid is thinned evenly
_EDGES = ((0, 1), (1, 2), (2, 0))

# Draws each plot when it comes into sight, so that a page of many surfaces opens at once.
DRAW = """
(function () {
  var plots = JSON.parse(document.getElementById('plots').textContent);
  function draw(node) {
    if (node.dataset.drawn) return;
    node.dataset.drawn = 'yes';
    var plot = plots[node.dataset.plot];
    var narrow = node.clientWidth < 600, eye = plot.layout.scene.camera.eye;
    if (narrow) for (var axis in eye) eye[axis] *= 1.3;  // the labels of the axes need room
    Plotly.newPlot(node, plot.data, plot.layout, {responsive: true, displaylogo: false, displayModeBar: !narrow});
  }
  var seen = new IntersectionObserver(function (entries) {
    entries.forEach(function (entry) { if (entry.isIntersecting) draw(entry.target); });
  }, {rootMargin: '300px'});
  document.querySelectorAll('.plot').forEach(function (node) { seen.observe(node); });
})();
"""


def _file() -> Path | None:
    """Where plotly keeps its JavaScript; read from there, since importing plotly takes a second."""
    found = importlib.util.find_spec("plotly")
    for folder in (found.submodule_search_locations or []) if found is not None else []:
        path = Path(folder) / "package_data" / "plotly.min.js"
        if path.is_file():
            return path
    return None


def available() -> bool:
    """Whether plotly is installed."""
    return _file() is not None


def program() -> str:
    """Plotly's JavaScript.

    Raises:
      FileNotFoundError: where plotly is not installed.
    """
    path = _file()
    if path is None:
        raise FileNotFoundError("plotly is not installed: pip install 'dualgap_jax[report]'")
    return path.read_text(encoding="utf-8")


def _plain(values: np.ndarray) -> Any:
    """Nested lists with None for what is not finite: JSON has no NaN, and plotly leaves a hole."""
    wide = np.asarray(values, np.float64).astype(object)
    wide[~np.isfinite(values)] = None
    return wide.tolist()


def _thinned(points: np.ndarray) -> np.ndarray:
    return np.unique(np.linspace(0, points.size - 1, min(points.size, _POINTS)).round().astype(int))


def surface(stored: Mapping[str, np.ndarray], title: str) -> dict[str, Any]:
    """A 3-D surface with the solutions on it, as plotly takes it.

    Args:
      stored: the arrays of `results/landscape.npz`: `xs [nx]`, `ys [ny]`, `loss [ny, nx]`, `anchors [3, 2]`,
        `edge_t [m]`, `edge_loss [3, m]`; or, without edges, `anchors [k, 2]` and the losses there, `heights [k]`.
      title: above it.
    """
    columns, rows = _thinned(stored["xs"]), _thinned(stored["ys"])
    sheet = {
        "type": "surface",
        "x": _plain(stored["xs"][columns]),
        "y": _plain(stored["ys"][rows]),
        "z": _plain(stored["loss"][np.ix_(rows, columns)]),
        "colorscale": "Viridis",
        "contours": {"z": {"show": True, "usecolormap": True, "project": {"z": True}}},
        "colorbar": {"title": {"text": "loss"}, "thickness": 12, "len": 0.6, "y": 0.35},
        "hovertemplate": "a %{x:.3f}, b %{y:.3f}<br>loss %{z:.4g}<extra></extra>",
    }
    marks = {
        "type": "scatter3d",
        "mode": "markers+text",
        "x": _plain(stored["anchors"][:, 0]),
        "y": _plain(stored["anchors"][:, 1]),
        "z": _plain(stored["edge_loss"][:, 0] if "edge_loss" in stored else stored["heights"]),
        "text": [str(k) for k in range(len(stored["anchors"]))],
        "textposition": "top center",
        "marker": {"size": 5, "color": "#fff", "line": {"color": "#000", "width": 2}},
        "hovertemplate": "solution %{text}<br>loss %{z:.4g}<extra></extra>",
        "showlegend": False,
    }
    edges = []
    for (start, end), losses in zip(_EDGES, stored.get("edge_loss", ()), strict=False):
        first, last = stored["anchors"][[start, end]]
        along = first + stored["edge_t"][:, None] * (last - first)
        edges.append(
            {
                "type": "scatter3d",
                "mode": "lines",
                "x": _plain(along[:, 0]),
                "y": _plain(along[:, 1]),
                "z": _plain(losses),
                "line": {"color": "#d55e00", "width": 4},
                "hovertemplate": f"edge {start}–{end}<br>loss %{{z:.4g}}<extra></extra>",
                "showlegend": False,
            }
        )
    axis = {"gridcolor": "#ddd", "zerolinecolor": "#ccc", "backgroundcolor": "#f7f7f7", "showbackground": True}
    layout = {
        "title": {"text": title, "font": {"size": 15}, "x": 0.02, "xanchor": "left"},
        "modebar": {"orientation": "v", "bgcolor": "rgba(255,255,255,0.6)"},
        "font": {"family": "system-ui, sans-serif", "color": "#1a1c20"},
        "margin": {"l": 0, "r": 0, "t": 44, "b": 0},
        "height": 430,
        "paper_bgcolor": "#fff",
        "scene": {
            "xaxis": {"title": {"text": "a"}, **axis},
            "yaxis": {"title": {"text": "b"}, **axis},
            "zaxis": {"title": {"text": "loss"}, **axis},
            "camera": {"eye": {"x": 1.35, "y": -1.45, "z": 0.9}},
            "aspectratio": {"x": 1, "y": 1, "z": 0.7},
        },
    }
    return {"data": [sheet, *edges, marks], "layout": layout}


def embedded(plots: list[dict[str, Any]]) -> str:
    """The plots as a block of JSON in the page, which no text in it can close."""
    said = json.dumps(plots, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="plots">{said}</script>'
