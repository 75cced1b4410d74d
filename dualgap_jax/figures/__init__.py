"""Figures from saved records, and from nothing else: redrawing needs neither an accelerator nor a training run.

A work folder holds records in `results/`; each record kind has one function here, which writes its figures to
`figures/` as PNG (200 dpi) and PDF and returns the paths.  The same records give the same pixels.

| record | figures | what is drawn |
|---|---|---|
| `landscape.json`, `landscape.npz` | `landscape` | the loss on one plane (a panel of Figures 1 and 4) |
| the same, `aligned.npz` | `aligned` | beside it the plane through the solutions aligned, on one scale |
| the same, `spectrum`, `trajectory`, `curve.npz` | of these names | a solution's Hessian, path, way to another |
| `row.json` | `row`, `scores`, `row_aligned` | a row of Figures 1 and 4; each convexity score against I |
| `architecture.json` | `architecture` | accuracy and scores against I at an equal number of parameters |
| `duality_gap.json` | `duality_gap` | Theorem 1: gap and bound against I, value function, dual, trained networks |
| `examples.json` | `examples` | the barrier between solutions against I, for several numbers of examples |
| `landscape_search.json` | `landscape_search` | the search for the setting of Figure 1 |
| `regimes.json` | `regimes`, `regimes_normalised` | a score over init x reduction x learning-rate scaling x I |
| `shapley_folkman.json`, `.npz` | `shapley_folkman`, `hull_distance` | Figure 3; distance to the hull against n |
| `spectral.json`, `.npz` | `spectral` | SGD falling to the certified optimum, the spectrum, the gap (Theorem 2) |
| `hitting_rate.json`, `.npz` | `hitting_rate`, `final_losses`, `loss_curves` | Table 1, and the losses behind it |
| `hitting_search.json` | `hitting_search` | the search for the setting of Table 1 |
| `certify.json` | `certify` | the risk of networks of I branches above the certified optimum |

Non-finite numbers are never dropped in silence: grid points appear as grey hatched cells, points along an edge and
undefined scores as crosses, and the caption says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from dualgap_jax.figures.averages import shapley_folkman
from dualgap_jax.figures.barriers import examples
from dualgap_jax.figures.certificates import certify
from dualgap_jax.figures.duality import duality_gap
from dualgap_jax.figures.hitting import hitting_rate, hitting_search
from dualgap_jax.figures.page import any_backend
from dualgap_jax.figures.scores import architecture, regimes
from dualgap_jax.figures.search import landscape_search
from dualgap_jax.figures.spectra import spectral
from dualgap_jax.figures.surfaces import landscape, row
from dualgap_jax.files import local_path
from dualgap_jax.registry import Table

FIGURES: Table[Callable[[str | Path], list[Path]]] = Table(
    "figure",
    {
        "landscape.json": landscape,
        "row.json": row,
        "examples.json": examples,
        "architecture.json": architecture,
        "landscape_search.json": landscape_search,
        "regimes.json": regimes,
        "shapley_folkman.json": shapley_folkman,
        "spectral.json": spectral,
        "hitting_rate.json": hitting_rate,
        "hitting_search.json": hitting_search,
        "duality_gap.json": duality_gap,
        "certify.json": certify,
    },
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
    workdir = local_path(workdir, "the work folder")
    found = [name for name in figures if (workdir / "results" / name).is_file()]
    if not found:
        raise ValueError(
            f"nothing to draw in {workdir}: looked for {', '.join(figures)} in {workdir / 'results'};"
            " name the work folder of a run that is complete."
        )
    with any_backend():
        return [path for name in found for path in figures[name](workdir)]
