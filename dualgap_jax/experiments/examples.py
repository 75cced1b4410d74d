"""How the landscape depends on the number of training examples beside that of the branches.

A network that cannot fit its data has no low points for a barrier to stand between; whether barriers fall with I can
only be asked of networks that do.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from dualgap_jax import figures, terminal
from dualgap_jax.config import Component, require
from dualgap_jax.convexity import DEFINITIONS
from dualgap_jax.experiments import landscape
from dualgap_jax.experiments.base import Experiment, Report, Tables
from dualgap_jax.experiments.landscape import LandscapeSpec
from dualgap_jax.experiments.landscape_report import partial_notes
from dualgap_jax.experiments.row import check_last_seed, intervals, scores_of
from dualgap_jax.files import save_json
from dualgap_jax.workdir import Workdir

_SHOWN = ("barrier_max", "barrier_max_aligned", "envelope_max", "envelope_max_aligned")


@dataclasses.dataclass(frozen=True)
class ExamplesSpec:
    """Landscapes over the number of branches and the number of training examples.

    Attributes:
      title, paper_item: what the figure is called here, and where in the paper the landscapes stand.
      num_examples: how many of the first examples a network is trained on, and its surface taken over; 0 is all.
      num_branches: the values of I.
      seeds: how many landscapes for each, at the seeds from that of `cell` on.
      cell: the landscape; its `num_branches` and the data's `num_examples` are replaced.
    """

    REPLACED: ClassVar[Mapping[str, str]] = {
        "cell.num_branches": "num_branches",
        "cell.data.num_examples": "num_examples",
    }

    title: str = "Barriers against branches and examples"
    paper_item: str = ""
    num_examples: tuple[int, ...] = (2000, 10_000, 50_000)
    num_branches: tuple[int, ...] = (1, 3, 5, 30, 100)
    seeds: int = 1
    cell: LandscapeSpec = LandscapeSpec()

    def __post_init__(self) -> None:
        for name, least in (("num_examples", 0), ("num_branches", 1)):
            values = getattr(self, name)
            require(
                len(values) > 0 and len(set(values)) == len(values) and min(values) >= least,
                f"{name}={values} must be distinct integers of at least {least}, and one at least.",
            )
        require(1 <= self.seeds <= 1000, f"seeds={self.seeds} must lie between 1 and 1,000.")

    def validate(self, tables: Tables) -> None:
        """As `LandscapeSpec.validate`, for every cell."""
        require(
            "num_examples" in self.cell.data.settings,
            f"data set {self.cell.data.name!r} has no setting num_examples; take one that has, such as 'cifar10'.",
        )
        check_last_seed(self.cell, self.seeds)
        for examples, count in itertools.product(self.num_examples, self.num_branches):
            _cell(self, examples, count, 0).validate(tables)


def _cell(spec: ExamplesSpec, examples: int, count: int, repeat: int) -> LandscapeSpec:
    data = Component(spec.cell.data.name, {**spec.cell.data.settings, "num_examples": examples})
    return dataclasses.replace(spec.cell, num_branches=count, data=data, seed=spec.cell.seed + repeat)


def landscape_examples(spec: ExamplesSpec, workdir: Workdir, tables: Tables) -> Report:
    """Barriers and convexity scores over the number of branches and the number of training examples."""
    cells: list[dict[str, Any]] = []
    every = list(itertools.product(spec.num_examples, spec.num_branches))
    for number, (examples, count) in enumerate(every, 1):
        scores: list[dict[str, Any]] = []
        solutions: list[dict[str, Any]] = []
        for repeat in range(spec.seeds):
            cell = _cell(spec, examples, count, repeat)
            folder = workdir.path / "cells" / f"n_{examples}_I_{count}_seed_{cell.seed}"
            said = f"n = {examples or 'all'}, I = {count:,} ({number} of {len(every)}), seed {cell.seed}"
            with terminal.part(said):
                found, ends = scores_of(cell, folder, tables)
            scores.append(found)
            solutions += ends
        setting = landscape.build(_cell(spec, examples, count, 0), tables)
        cells.append(
            {
                "num_examples": len(setting.dataset.y),
                "num_branches": count,
                "num_parameters": landscape.num_parameters(setting.net, setting.dataset),
                "num_outputs": setting.dataset.num_outputs,
                "scores": scores,
                "intervals": intervals(scores),
                "losses": [s["loss"] for s in solutions],
                "statuses": [s["status"] for s in solutions],
            }
        )
        document = {"title": spec.title, "paper_item": spec.paper_item, "seeds": spec.seeds, "cells": cells}
        document |= {"data": setting.dataset.info, "definitions": DEFINITIONS}
        save_json(workdir.results / "examples.json", document)
    return _report(spec, document)


def _range(losses: Sequence[float | None]) -> list[float | str] | str:
    """The least and the largest loss; of a run that diverged a loss may not be a number."""
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return [min(finite), "to", max(finite)] if len(finite) == len(losses) else "not finite"


def _report(spec: ExamplesSpec, document: dict[str, Any]) -> Report:
    """One row a cell: means over seeds, with their intervals below."""
    rows, notes = [], []
    cells = document["cells"]
    for cell in cells:
        values = [[scores.get(name) for scores in cell["scores"]] for name in _SHOWN]
        means = [None if None in v else sum(v) / len(v) for v in values]
        labels = cell["num_examples"] * cell["num_outputs"]
        fitted = cell["statuses"].count("converged")
        rows.append(
            [
                *(cell["num_examples"], cell["num_branches"], cell["num_parameters"] / labels),
                *(_range(cell["losses"]), f"{fitted}/{len(cell['statuses'])}"),
                *means,
            ]
        )
    columns = ["n", "I", "params/label", "train loss", "conv.", "barrier", "aligned", "env. max", "aligned"]
    for name in _SHOWN:
        said = [
            f"n = {c['num_examples']:,}, I = {c['num_branches']:,}: {mean:.3g} ({low:.3g} to {high:.3g})"
            for c in cells
            for mean, low, high in [c["intervals"].get(name, (None,) * 3)]
            if mean is not None
        ]
        if said:
            head = f"{name.replace('_', ' ')}, mean over {spec.seeds} seeds and 95 % t-interval"
            notes.append(f"{head}: {'; '.join(said)}.")
    notes.append(
        "Scores: in units of loss, estimated from the grid and the edges, means over seeds.  Parameters per label:"
        " parameters / (examples x outputs).  conv.: runs that fitted their data to a loss below 1e-5, of all."
    )
    if document["data"].get("image_format") == "JPEG":
        notes.append("Data: a JPEG-recompressed (lossy) copy of the images.")
    named = [(f"n = {c['num_examples']:,} I = {c['num_branches']:,}", s) for c in cells for s in c["scores"]]
    return Report(f"{spec.title} ({spec.paper_item})", columns, rows, notes + partial_notes(named))


LANDSCAPE_EXAMPLES = Experiment("landscape_examples", ExamplesSpec, landscape_examples, figures.examples)
