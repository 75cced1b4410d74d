"""How the convexity of the landscape depends on the training regime: init x learning-rate scaling x reduction x I.

The paper does not state its regime; this map shows for which ones the landscape grows more convex with I.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from dualgap_jax import figures, terminal
from dualgap_jax.config import Component, require
from dualgap_jax.convexity import DEFINITIONS
from dualgap_jax.experiments.base import Experiment, Report, Tables
from dualgap_jax.experiments.landscape import LandscapeSpec
from dualgap_jax.experiments.landscape_report import partial_notes
from dualgap_jax.experiments.row import scores_of
from dualgap_jax.files import save_json
from dualgap_jax.training import LearningRateScaling
from dualgap_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class RegimesSpec:
    """The map of regimes.

    Attributes:
      title: head of the figure.
      inits: laws of the initial kernels, optionally scaled: 'torch', 'torch*3', 'normal'.
      lr_scalings, reduces, num_branches: the other axes of the map.
      repeats: independent repetitions of each cell, each with its own teacher, data and seeds.
      score: the score in the table and the figures (its `_per_zero_loss` and `_per_range` variants are drawn too).
      cell: the landscape of a cell; its branch must take `init` and `init_scale`.
    """

    REPLACED: ClassVar[Mapping[str, str]] = {
        "cell.num_branches": "num_branches",
        "cell.reduce": "reduces",
        "cell.branch.init": "inits",
        "cell.branch.init_scale": "inits, as in 'torch*3'",
        "cell.training.lr_scaling": "lr_scalings",
    }

    title: str = "Convexity against the training regime"
    inits: tuple[str, ...] = ("torch", "torch*3", "normal")
    lr_scalings: tuple[LearningRateScaling, ...] = ("branches", "none")
    reduces: tuple[Literal["mean", "sum"], ...] = ("mean", "sum")
    num_branches: tuple[int, ...] = (10, 30, 70, 1000)
    repeats: int = 3
    score: Literal["envelope_max", "envelope_mean"] = "envelope_max"
    cell: LandscapeSpec = LandscapeSpec()

    def __post_init__(self) -> None:
        for name in ("inits", "lr_scalings", "reduces", "num_branches"):
            values = getattr(self, name)
            require(len(values) > 0, f"{name} is empty; give at least one.")
            require(len(set(values)) == len(values), f"{name}={values} names one twice.")
        require(1 <= self.repeats <= 1000, f"repeats={self.repeats} must lie between 1 and 1,000.")
        meant: dict[tuple[str, float], str] = {}
        for init in self.inits:
            other = meant.setdefault(parse_init(init), init)
            require(other == init, f"inits {other!r} and {init!r} mean the same: give one of them.")

    def validate(self, tables: Tables) -> None:
        """As `LandscapeSpec.validate`, for every cell."""
        for init, scaling, reduce, count in itertools.product(
            self.inits, self.lr_scalings, self.reduces, self.num_branches
        ):
            _cell(self, init, scaling, reduce, count, self.repeats - 1).validate(tables)


def parse_init(text: str) -> tuple[str, float]:
    """'torch*3' -> ('torch', 3.0).  Raises ConfigError when the factor is not a positive number."""
    name, star, factor = text.partition("*")
    try:
        scale = float(factor) if star else 1.0
    except ValueError:
        scale = -1.0
    require(scale > 0, f"init {text!r}: write a law, or a law times a positive number, as in 'torch*3'.")
    return name, scale


def _cell(
    spec: RegimesSpec, init: str, scaling: LearningRateScaling, reduce: Literal["mean", "sum"], count: int, repeat: int
) -> LandscapeSpec:
    law, scale = parse_init(init)
    cell, data = spec.cell, dict(spec.cell.data.settings)
    if "seed" in data:
        data["seed"] = data["seed"] + repeat
    return dataclasses.replace(
        cell,
        num_branches=count,
        reduce=reduce,
        seed=cell.seed + repeat,
        branch=Component(cell.branch.name, {**cell.branch.settings, "init": law, "init_scale": scale}),
        data=Component(cell.data.name, data),
        training=dataclasses.replace(cell.training, lr_scaling=scaling),
    )


def regimes(spec: RegimesSpec, workdir: Workdir, tables: Tables) -> Report:
    """Map of training regimes (init x learning-rate scaling x reduction x I) against the convexity scores."""
    axes = (spec.inits, spec.lr_scalings, spec.reduces, spec.num_branches, range(spec.repeats))
    cells: list[dict[str, Any]] = []
    every = list(itertools.product(*axes))
    for number, (init, scaling, reduce, count, repeat) in enumerate(every, 1):
        cell = _cell(spec, init, scaling, reduce, count, repeat)
        folder = workdir.path / "cells" / f"{init}_{scaling}_{reduce}_{count}_{repeat}"
        entry = {"init": init, "lr_scaling": scaling, "reduce": reduce, "num_branches": count, "repeat": repeat}
        with terminal.part(f"{init} {scaling} {reduce} I = {count:,} ({number} of {len(every)})"):
            scores, solutions = scores_of(cell, folder, tables)
        ends = {"losses": [s["loss"] for s in solutions], "statuses": [s["status"] for s in solutions]}
        cells.append({**entry, "scores": scores, **ends})
    document = {"title": spec.title, "score": spec.score, "cells": cells, "definitions": DEFINITIONS}
    save_json(workdir.results / "regimes.json", document)
    return _report(spec, cells)


def median(values: Sequence[float | None]) -> float:
    """The median over repetitions, in which one without a number (it diverged) counts as above every number.

    So a repetition that diverged can only raise the median, and infinity says that at least half of them did.
    """
    return float(np.median([math.inf if value is None or math.isnan(value) else value for value in values]))


def _entry(values: Sequence[float | None]) -> float | list[float | str] | None:
    """A cell of the table: the median, and how many repetitions it stands for when some diverged."""
    middle, missing = median(values), sum(value is None or math.isnan(value) for value in values)
    if math.isinf(middle):
        return None
    return [middle, f"({missing} of {len(values)} diverged)"] if missing else middle


def _report(spec: RegimesSpec, cells: list[dict[str, Any]]) -> Report:
    """One row a regime: the median score for each I, the trend, and the median training loss at the largest I."""
    rows = []
    for init, scaling, reduce in itertools.product(spec.inits, spec.lr_scalings, spec.reduces):
        scores, losses, ends = [], [], []
        for count in spec.num_branches:
            key = {"init": init, "lr_scaling": scaling, "reduce": reduce, "num_branches": count}
            chosen = [c for c in cells if all(c[k] == v for k, v in key.items())]
            scores.append([c["scores"].get(spec.score) for c in chosen])
            stops = [status for c in chosen for status in c["statuses"]]
            losses = [loss for c in chosen for loss in c["losses"]]
            losses = [None if stop == "diverged" else loss for loss, stop in zip(losses, stops, strict=True)]
            ends += stops
        first, last = median(scores[0]), median(scores[-1])
        trend = "-" if len(scores) < 2 or math.isinf(first) else ("falls" if last < first else "rises")
        rows.append(
            [
                *(init, scaling, reduce),
                *map(_entry, scores),
                "diverges" if math.isfinite(first) and math.isinf(last) else trend,
                _entry(losses),
                f"{ends.count('converged')}/{len(ends)}",
                ends.count("diverged") or None,
            ]
        )
    columns = [
        "init",
        "lr scaling",
        "reduce",
        *(f"I={count}" for count in spec.num_branches),
        "first to last I",
        "loss at last I",
        "converged",
        "diverged",
    ]
    notes = [
        f"Entries: median over {spec.repeats} repetitions (own teacher, data and seeds) of {spec.score}, in units of"
        " loss; estimated from the grid.",
        "A repetition that diverged counts as above every number; a dash: at least half of them did.",
    ]
    names = ("init", "lr_scaling", "reduce", "num_branches", "repeat")
    notes += partial_notes([(" ".join(str(c[name]) for name in names), c["scores"]) for c in cells])
    return Report(spec.title, columns, rows, notes)


REGIMES = Experiment("regimes", RegimesSpec, regimes, figures.regimes)
