"""Figure 3: Minkowski averages of a planar set, and how far they are from the convex hull, against the bound."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dualgap_jax import figures
from dualgap_jax.config import Component, require
from dualgap_jax.experiments.base import Experiment, Report, Tables
from dualgap_jax.files import save_json, save_npz
from dualgap_jax.shapley_folkman import PlanarSet, bounds
from dualgap_jax.terminal import Progress
from dualgap_jax.workdir import Workdir

DEFINITIONS = {
    "distance": "Hausdorff distance between the Minkowski average of n copies and the convex hull of the set",
    "error": "the true distance lies in [distance - error, distance + error], up to float64 rounding",
    "kind": "exact: a closed form; bounded: a computed enclosure",
    "shapley_folkman_bound": "sqrt(min(n, 2)) / n * circumradius",
    "starr_bound": "sqrt(min(n, 2)) / n * inner_radius",
    "circumradius": "radius of the smallest disc around the set, or an upper bound on it",
    "inner_radius": "largest, over the points x of the hull, of the least circumradius of a subset whose hull holds x,"
    " or an upper bound on it",
    "decay_exponent": "slope of log distance against log n by least squares over the distances above their errors;"
    " null for fewer than two of them",
}


@dataclasses.dataclass(frozen=True)
class ShapleyFolkmanSpec:
    """Averages of one planar set.

    Attributes:
      title: head of the figures.
      paper_item: what in the paper it shows.
      set: an entry of the table of planar sets, with its settings.
      panels: numbers of copies that are drawn, before the hull.
      copies: numbers of copies whose distance to the hull is measured.
      tolerance: of the distance, in circumradii over n, where the set's method can choose.
    """

    title: str = "Minkowski averages"
    paper_item: str = ""
    set: Component = Component("lp_ball", {"p": 0.5})
    panels: tuple[int, ...] = (1, 2, 10)
    copies: tuple[int, ...] = (1, 2, 3, 4, 5, 7, 10, 14, 20, 30, 50, 70, 100)
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("panels", "copies"):
            given = getattr(self, name)
            require(len(given) > 0, f"{name} is empty; give at least one number of copies.")
            require(
                min(given) >= 1 and max(given) <= 10**6, f"{name}={given}: numbers of copies must be 1 to 1,000,000."
            )
            require(len({*given}) == len(given), f"{name}={given} names a number of copies twice.")
        require(len(self.panels) <= 5, f"panels={self.panels}: at most five fit beside the hull.")
        require(0 < self.tolerance < 1, f"tolerance={self.tolerance} must lie between 0 and 1.")

    def validate(self, tables: Tables) -> None:
        """Raises UnknownNameError or SettingError for a set that is not in the table, or settings that it refuses."""
        tables.sets.build(self.set.name, **self.set.settings)


def shapley_folkman(spec: ShapleyFolkmanSpec, workdir: Workdir, tables: Tables) -> Report:
    """Minkowski averages of a planar set and their distance to the convex hull (Figure 3, Shapley-Folkman lemma)."""
    planar: PlanarSet = tables.sets.build(spec.set.name, **spec.set.settings)
    rows = _measured(spec, planar, workdir)
    radii = planar.radii()
    arrays = {"hull": planar.hull()}
    for n in spec.panels:
        arrays |= {f"n{n}_{key}": value for key, value in planar.shape(n)._asdict().items()}
    save_npz(workdir.results / "shapley_folkman.npz", **arrays)
    document = {
        "title": spec.title,
        "paper_item": spec.paper_item,
        "set": {"name": spec.set.name, **spec.set.settings},
        "panels": spec.panels,
        **radii._asdict(),
        "rows": rows,
        "decay_exponent": decay_exponent(rows),
        "definitions": DEFINITIONS,
    }
    save_json(workdir.results / "shapley_folkman.json", document)
    return _report(spec, document)


def _measured(spec: ShapleyFolkmanSpec, planar: PlanarSet, workdir: Workdir) -> list[dict[str, Any]]:
    """The row of every number of copies, the largest first: a set that cannot be summed so often says so at once."""
    radii = planar.radii()

    def measured(n: int) -> dict[str, Any]:
        found, bound = planar.distance_to_hull(n, spec.tolerance), bounds(radii, n)
        return {
            "n": n,
            "distance": float(found.value),
            "error": float(found.error),
            "kind": found.kind,
            "shapley_folkman_bound": float(bound.shapley_folkman),
            "starr_bound": float(bound.starr),
        }

    rows = {}
    with Progress(len(spec.copies), "numbers of copies") as progress:
        for n in sorted(spec.copies, reverse=True):
            rows[n] = workdir.remember(f"distance {n}", lambda n=n: measured(n))  # type: ignore[misc]
            progress.update(len(rows), f"n = {n}")
    return [rows[n] for n in sorted(spec.copies)]


def decay_exponent(rows: Sequence[dict[str, Any]]) -> float | None:
    """Slope of log distance against log n, by least squares, over the rows whose distance exceeds its error."""
    clear = [(row["n"], row["distance"]) for row in rows if row["distance"] > row["error"]]
    if len(clear) < 2:
        return None
    n, distance = np.log(np.asarray(clear, dtype=np.float64)).T
    return float(np.polyfit(n, distance, 1)[0])


def _report(spec: ShapleyFolkmanSpec, document: dict[str, Any]) -> Report:
    columns = ["n", "distance to hull", "error", "kind", "n x distance", "Starr bound", "Shapley-Folkman bound"]
    rows = [
        [
            row["n"],
            row["distance"],
            row["error"],
            row["kind"],
            row["n"] * row["distance"],
            row["starr_bound"],
            row["shapley_folkman_bound"],
        ]
        for row in document["rows"]
    ]
    exponent = document["decay_exponent"]
    beyond = [row["n"] for row in document["rows"] if row["distance"] - row["error"] > row["starr_bound"] * (1 + 1e-9)]
    notes = [
        "Distance: Hausdorff distance of the Minkowski average of n copies to the convex hull; the true one lies within"
        " the error of it, up to rounding.",
        f"Bounds: sqrt(min(n, 2)) / n times the inner radius {document['inner_radius']:.6g} (Starr 1969) or the"
        f" circumradius {document['circumradius']:.6g} (Shapley-Folkman).",
        "Decay: no distance exceeds its error twice." if exponent is None else f"Decay: distance ~ n^{exponent:.3f}.",
        f"Starr's bound is EXCEEDED at n = {beyond}: a defect." if beyond else "Starr's bound holds at every n.",
    ]
    if math.isclose(document["circumradius"], 0.0):
        notes.append("The set is a single point.")
    return Report(spec.title, columns, rows, notes, dict.fromkeys((columns[2], *columns[-2:]), "upper"))


SHAPLEY_FOLKMAN = Experiment("shapley_folkman", ShapleyFolkmanSpec, shapley_folkman, figures.shapley_folkman)
