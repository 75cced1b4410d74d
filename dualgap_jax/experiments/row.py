"""A row of Figure 1 or 4: the same landscape for several numbers of branches, and its scores against them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from dualgap_jax import figures, terminal
from dualgap_jax.config import require
from dualgap_jax.experiments import landscape
from dualgap_jax.experiments.base import NO_REPORT, Experiment, Report, Tables, execute
from dualgap_jax.experiments.landscape import LandscapeSpec
from dualgap_jax.experiments.landscape_report import report
from dualgap_jax.files import load_json, save_json
from dualgap_jax.workdir import Workdir

SCORES = (
    "envelope_max",
    "envelope_mean",
    "envelope_max_per_zero_loss",
    "envelope_mean_per_zero_loss",
    "envelope_max_per_range",
    "envelope_mean_per_range",
    "midpoint_violation_rate",
    "negative_curvature_share",
    "curvature_ratio_mean",
    "barrier_max",
)
ALIGNED_SCORES = ("envelope_max", "midpoint_violation_rate", "negative_curvature_share", "barrier_max")


@dataclasses.dataclass(frozen=True)
class RowSpec:
    """A row of landscapes.

    Attributes:
      title, paper_item: what the figure is called here and in the paper.
      num_branches: the values of I, one panel each.
      cell: the landscape; its `num_branches` is replaced by each value.
    """

    title: str = "Loss landscapes"
    paper_item: str = ""
    num_branches: tuple[int, ...] = (10, 30, 70, 1000)
    cell: LandscapeSpec = LandscapeSpec()

    def __post_init__(self) -> None:
        require(len(self.num_branches) > 0, "num_branches is empty; give at least one, as in I=10/30/70.")
        require(
            len(set(self.num_branches)) == len(self.num_branches) and min(self.num_branches) >= 1,
            f"num_branches={self.num_branches} must be distinct positive integers.",
        )

    def validate(self, tables: Tables) -> None:
        """As `LandscapeSpec.validate`."""
        self.cell.validate(tables)


def _aligned(record: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of the aligned surface by names of their own; none where there is no such surface."""
    scores = record.get("aligned", {}).get("scores", {})
    return {f"{name}_aligned": scores[name] for name in ALIGNED_SCORES if name in scores}


def landscape_row(spec: RowSpec, workdir: Workdir, tables: Tables) -> Report:
    """A row of landscapes over several numbers of branches, and every convexity score against it (Figures 1 and 4)."""
    cells: list[dict[str, Any]] = []
    records = []
    for number, count in enumerate(spec.num_branches, 1):
        folder = f"I_{count}"
        cell = dataclasses.replace(spec.cell, num_branches=count)
        with terminal.part(f"I = {count:,} ({number} of {len(spec.num_branches)})"):
            _, inner, _ = execute(landscape.LANDSCAPE, cell, workdir.path / folder, tables)
        if not workdir.writes:
            continue
        record = load_json(inner.results / "landscape.json")
        records.append(record)
        cells.append(
            {
                "num_branches": count,
                "workdir": folder,
                "scores": record["scores"] | _aligned(record),
                "scores_paper_window": record.get("scores_paper_window"),
                "solutions": record["solutions"],
                "regime": record["regime"],
            }
        )
        save_json(
            workdir.results / "row.json",
            {
                "title": spec.title,
                "paper_item": spec.paper_item,
                "cells": cells,
                "score_names": (*SCORES, *_aligned(record)),
                "definitions": record["definitions"],
            },
        )
    if not workdir.writes:
        return NO_REPORT
    return report(records)._replace(title=f"{spec.title} ({spec.paper_item})")


LANDSCAPE_ROW = Experiment("landscape_row", RowSpec, landscape_row, figures.row, distributed=True)
