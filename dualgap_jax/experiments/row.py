"""A row of Figure 1 or 4: the same landscape for several numbers of branches, and its scores against them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import scipy

from dualgap_jax import figures, seeds, terminal
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
      seeds: how many landscapes for each I, at the seeds from that of `cell` on; the panels are those of the first, and
        the scores get intervals over all.
      scale: 'own': each panel has its own levels, colours and vertical axis, as in the paper; 'common': one for all.
      cell: the landscape; its `num_branches` is replaced by each value.
    """

    REPLACED: ClassVar[Mapping[str, str]] = {"cell.num_branches": "num_branches"}

    title: str = "Loss landscapes"
    paper_item: str = ""
    num_branches: tuple[int, ...] = (10, 30, 70, 1000)
    seeds: int = 1
    scale: Literal["own", "common"] = "own"
    cell: LandscapeSpec = LandscapeSpec()

    def __post_init__(self) -> None:
        require(len(self.num_branches) > 0, "num_branches is empty; give at least one, as in I=10/30/70.")
        require(
            len(set(self.num_branches)) == len(self.num_branches) and min(self.num_branches) >= 1,
            f"num_branches={self.num_branches} must be distinct positive integers.",
        )
        require(1 <= self.seeds <= 1000, f"seeds={self.seeds} must lie between 1 and 1,000.")

    def validate(self, tables: Tables) -> None:
        """As `LandscapeSpec.validate`, for every panel."""
        check_last_seed(self.cell, self.seeds)
        for count in self.num_branches:
            dataclasses.replace(self.cell, num_branches=count).validate(tables)


def check_last_seed(cell: LandscapeSpec, count: int) -> None:
    """Raises ConfigError unless `count` seeds from that of `cell` on are seeds."""
    require(
        cell.seed + count <= seeds.LIMIT,
        f"seeds={count}, from cell.seed={cell.seed} on, go beyond the last seed, 2**32 - 1 = {seeds.LIMIT - 1}; give"
        " fewer, or begin at a smaller one.",
    )


def aligned_scores(record: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of the aligned surface by names of their own; none where there is no such surface."""
    scores = record.get("aligned", {}).get("scores", {})
    return {f"{name}_aligned": scores[name] for name in ALIGNED_SCORES if name in scores}


def scores_of(cell: LandscapeSpec, folder: Path, tables: Tables) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The scores of one landscape of many, not drawn, and how its solutions ended; no scores where one diverged."""
    try:
        execute(landscape.UNDRAWN, cell, folder, tables)
    except landscape.DivergedError:
        return {}, load_json(folder / "results" / "solutions.json")["solutions"]
    record = load_json(folder / "results" / "landscape.json")
    return record["scores"] | aligned_scores(record), record["solutions"]


def intervals(every: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The mean of each score over several landscapes and its 95 % t-interval: name -> [mean, low, high].

    Scores that one of them lacks, or has no number for, are left out; so are all of a single landscape.
    """
    found = {}
    for name in every[0] if len(every) > 1 else ():
        given = [scores.get(name) for scores in every]
        values = [float(v) for v in given if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(values) == len(given) and all(map(math.isfinite, values)):
            mean = float(np.mean(values))
            half = float(scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
            found[name] = [mean, mean - half, mean + half]
    return found


def _interval_notes(spec: RowSpec, spreads: Sequence[Mapping[str, Sequence[float]]]) -> list[str]:
    """Below the table of the first seed: means and intervals over all, of the scores that a reader compares."""
    notes = []
    for name in ("envelope_max", "envelope_max_aligned", "barrier_max", "barrier_max_aligned"):
        said = [
            f"I = {count:,}: {s[name][0]:.3g} ({s[name][1]:.3g} to {s[name][2]:.3g})"
            for count, s in zip(spec.num_branches, spreads, strict=True)
            if name in s
        ]
        if said:
            head = f"{name.replace('_', ' ')}, mean over {spec.seeds} seeds and 95 % t-interval"
            notes.append(f"{head}: {'; '.join(said)}.")
    return notes


def landscape_row(spec: RowSpec, workdir: Workdir, tables: Tables) -> Report:
    """A row of landscapes over several numbers of branches, and every convexity score against it (Figures 1 and 4)."""
    cells: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    spreads: list[dict[str, Any]] = []
    for number, count in enumerate(spec.num_branches, 1):
        folder = f"I_{count}"
        every = []
        for seed in range(spec.cell.seed, spec.cell.seed + spec.seeds):
            first = seed == spec.cell.seed
            cell = dataclasses.replace(spec.cell, num_branches=count, seed=seed)
            place = workdir.path / (folder if first else f"{folder}_seed_{seed}")
            said = f"I = {count:,} ({number} of {len(spec.num_branches)})" + ("" if first else f", seed {seed}")
            with terminal.part(said):
                _, inner, _ = execute(landscape.LANDSCAPE, cell, place, tables)
            if workdir.writes:
                every.append(load_json(inner.results / "landscape.json"))
        if not workdir.writes:
            continue
        record = every[0]
        records.append(record)
        spread = intervals([r["scores"] | aligned_scores(r) for r in every])
        spreads.append(spread)
        cells.append(
            {
                "num_branches": count,
                "workdir": folder,
                "scores": record["scores"] | aligned_scores(record),
                "intervals": spread,
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
                "seeds": spec.seeds,
                "scale": spec.scale,
                "cells": cells,
                "score_names": (*SCORES, *aligned_scores(record)),
                "definitions": record["definitions"],
            },
        )
    if not workdir.writes:
        return NO_REPORT
    made = report(records)
    notes = [*made.notes, *_interval_notes(spec, spreads)]
    return made._replace(title=f"{spec.title} ({spec.paper_item})", notes=notes)


LANDSCAPE_ROW = Experiment("landscape_row", RowSpec, landscape_row, figures.row, distributed=True)
