"""Few wide branches or many narrow ones: accuracy, barriers and convexity against I at equal size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from dualgap_jax import figures, terminal
from dualgap_jax.config import Component, require
from dualgap_jax.data import Dataset
from dualgap_jax.experiments import landscape
from dualgap_jax.experiments.base import Experiment, Report, Tables, execute
from dualgap_jax.experiments.landscape import LandscapeSpec
from dualgap_jax.experiments.planes import PlaneSpec
from dualgap_jax.experiments.row import ALIGNED_SCORES, aligned_scores, check_last_seed, intervals
from dualgap_jax.files import load_json, save_json
from dualgap_jax.workdir import Workdir

_OFF = 0.25  # how far from the number of parameters at I = 1 a network may be, as a share of it
_COLUMNS = {
    "test_accuracy": "test acc.",
    "test_loss": "test loss",
    "train_loss": "train loss",
    "barrier_max": "barrier",
    "barrier_max_aligned": "… aligned",
    "envelope_max": "envelope max",
    "envelope_max_aligned": "… aligned",
    "midpoint_violation_rate": "midpoint viol.",
    "midpoint_violation_rate_aligned": "… aligned",
}


@dataclasses.dataclass(frozen=True)
class ArchitectureSpec:
    """Networks of about as many parameters as the branch of `cell` alone, divided into I branches.

    Attributes:
      title: head of the figure.
      num_branches: the values of I.
      seeds: landscapes for each I, at the seeds from that of `cell` on; each has three solutions.
      width: the setting of the branch, a number or several, that narrows as I grows ('hidden' of `mlp`, 'width' of
        `vgg9`, 'channels' of `conv`); its value in `cell` is that at I = 1.
      cell: the landscape; its data set must have a split 'test'.
    """

    REPLACED: ClassVar[Mapping[str, str]] = {
        "cell.num_branches": "num_branches",
        "cell.test": "cell.data, of which it is the split 'test'",
    }

    title: str = "Accuracy and convexity at an equal number of parameters"
    num_branches: tuple[int, ...] = (1, 4, 16)
    seeds: int = 1
    width: str = "hidden"
    cell: LandscapeSpec = LandscapeSpec(plane=PlaneSpec(align="branches"))

    def __post_init__(self) -> None:
        counts = self.num_branches
        require(
            len(counts) > 0 and len(set(counts)) == len(counts) and min(counts) >= 1,
            f"num_branches={counts} must be distinct positive integers, one at least.",
        )
        require(1 <= self.seeds <= 1000, f"seeds={self.seeds} must lie between 1 and 1,000.")
        value = self.cell.branch.settings.get(self.width)
        entries = value if isinstance(value, tuple | list) else (value,)
        require(
            all(isinstance(v, int) and v >= 1 for v in entries) and len(entries) > 0,
            f"width={self.width!r} must name a setting of the branch that holds widths; cell.branch has"
            f" {dict(self.cell.branch.settings)}.",
        )

    def validate(self, tables: Tables) -> None:
        """As `LandscapeSpec.validate`; the data set must take `split`."""
        check_last_seed(self.cell, self.seeds)
        for count in self.num_branches:
            dataclasses.replace(self.cell, num_branches=count).validate(tables)
        require(
            self.cell.data.settings.get("split") != "test",
            "cell.data.split='test': networks are trained on that split and tested on the split 'test', which must be"
            " another; leave it at 'train'.",
        )
        tables.datasets.check(self.cell.data.name, **{**self.cell.data.settings, "split": "test"})


def narrowed(spec: ArchitectureSpec, count: int, dataset: Dataset, tables: Tables) -> tuple[Component, int]:
    """The branch of which I have about as many parameters as that of `cell` alone, and their number in all.

    Raises:
      ConfigError: if none comes within a quarter.
    """
    whole = spec.cell.branch.settings[spec.width]
    first = whole[0] if isinstance(whole, tuple | list) else whole

    def branch(width: int) -> Component:
        def part(value: int) -> int:
            return max(1, round(value * width / first))

        narrow = tuple(map(part, whole)) if isinstance(whole, tuple | list) else part(whole)
        return Component(spec.cell.branch.name, {**spec.cell.branch.settings, spec.width: narrow})

    def size(width: int) -> int:
        made = branch(width)
        net = tables.branches.build(made.name, **{**made.settings, "out": dataset.num_outputs})
        return landscape.num_parameters(net, dataset)

    wanted = size(first)
    low, high = 1, first  # sizes grow with the width
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if count * size(middle) >= wanted else (middle + 1, high)
    nearest = min((w for w in (low - 1, low) if w >= 1), key=lambda w: abs(count * size(w) - wanted))
    total = count * size(nearest)
    require(
        abs(total - wanted) <= _OFF * wanted,
        f"{count:,} branches have {total:,} parameters where one has {wanted:,}: no {spec.width} of the branch comes"
        f" within {_OFF:.0%}; take fewer branches, or a wider {spec.width} at I = 1.",
    )
    return branch(nearest), total


def architecture(spec: ArchitectureSpec, workdir: Workdir, tables: Tables) -> Report:
    """Test accuracy, barriers and convexity scores against I at an equal number of parameters."""
    data = spec.cell.data
    with terminal.Progress(None, "data"):
        dataset = tables.datasets.build(data.name, **data.settings)
    chosen = {count: narrowed(spec, count, dataset, tables) for count in spec.num_branches}
    test = Component(data.name, {**data.settings, "split": "test"})
    cells: list[dict[str, Any]] = []
    for count, (branch, parameters) in chosen.items():
        every = []
        for seed in range(spec.cell.seed, spec.cell.seed + spec.seeds):
            cell = dataclasses.replace(spec.cell, num_branches=count, branch=branch, seed=seed, test=test)
            folder = workdir.path / f"I_{count}_seed_{seed}"
            with terminal.part(f"I = {count:,}, seed {seed}"):
                _, inner, _ = execute(landscape.UNDRAWN, cell, folder, tables)
            every.append(_scores(load_json(inner.results / "landscape.json")))
        cells.append(
            {
                "num_branches": count,
                "width": branch.settings[spec.width],
                "parameters": parameters,
                "scores": {name: float(np.mean([s[name] for s in every])) for name in every[0]},
                "intervals": intervals(every),
            }
        )
        save_json(workdir.results / "architecture.json", _document(spec, cells))
    return _report(spec, cells)


def _scores(record: Mapping[str, Any]) -> dict[str, float]:
    """The scores of one landscape, and means over its three solutions; NaN for what is undefined."""
    solutions = record["solutions"]
    means = {
        f"{where}_{what}": float(np.mean([s[key] for s in solutions]))
        for where, what, key in (
            ("test", "accuracy", "test_accuracy"),
            ("test", "loss", "test_loss"),
            ("train", "loss", "loss"),
        )
    }
    found = {n: record["scores"][n] for n in ALIGNED_SCORES if n in record["scores"]} | aligned_scores(record)
    return {**means, **{name: float("nan") if value is None else float(value) for name, value in found.items()}}


def _document(spec: ArchitectureSpec, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    said = "; ".join(f"I = {c['num_branches']:,}: {_width(c)} ({c['parameters']:,} parameters)" for c in cells)
    return {
        "title": spec.title,
        "paper_item": f"{spec.cell.branch.name} branches",
        "note": f"{spec.width.capitalize()} of a branch: {said}.",
        "seeds": spec.seeds,
        "cells": cells,
        "score_names": tuple(cells[0]["scores"]),
    }


def _report(spec: ArchitectureSpec, cells: Sequence[Mapping[str, Any]]) -> Report:
    names = [name for name in _COLUMNS if name in cells[0]["scores"]]
    rows = [[c["num_branches"], _width(c), c["parameters"], *(_cell(c, name) for name in names)] for c in cells]
    notes = [
        "Means over the three solutions of each landscape"
        + (f", and over {spec.seeds} seeds ± half of the 95 % t-interval." if spec.seeds > 1 else "."),
        "Scores are estimated from the grid; the runs are below the work folder.",
    ]
    columns = ["I", spec.width, "parameters", *(_COLUMNS[name] for name in names)]
    return Report(f"{spec.title}: {spec.cell.branch.name}", columns, rows, notes)


def _width(cell: Mapping[str, Any]) -> str:
    """'16', or '16-8' of several layers."""
    value = cell["width"]
    return "-".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _cell(cell: Mapping[str, Any], name: str) -> Any:
    value, interval = cell["scores"][name], cell["intervals"].get(name)
    if interval is None:
        return value
    return [value, "±", interval[2] - interval[0]]


ARCHITECTURE = Experiment("architecture", ArchitectureSpec, architecture, figures.architecture)
