"""Which setting gives a published row of landscapes?  A search with a stated budget, checked on unseen data sets.

The paper states for Figure 1 neither rate, batch, loss, stop rule, the network's exact form nor the teacher.  With so
many free choices some setting will come near four numbers; this is a fit and is called so.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from dualgap_jax import figures, seeds, terminal
from dualgap_jax.config import Component, parse_arg, require
from dualgap_jax.experiments.base import Experiment, Report, Tables
from dualgap_jax.experiments.landscape import LandscapeSpec
from dualgap_jax.experiments.landscape_report import partial_notes
from dualgap_jax.experiments.row import check_last_seed, intervals, scores_of
from dualgap_jax.files import save_json
from dualgap_jax.registry import unknown
from dualgap_jax.workdir import Workdir

SCORE = "envelope_max_per_zero_loss"
"""The score that is fitted: the loss of the zero network makes losses of different kinds comparable."""

NETS = ("mean", "sum", "plain")
"""The mean or sum of I branches, or one branch whose last hidden layer has I times the units."""

_OF_CLASSES = ("multi_margin", "crammer_singer")  # losses of an output a class


@dataclasses.dataclass(frozen=True)
class LandscapeSearchSpec:
    """The search.

    Attributes:
      title: head of the table and the figure.
      target_branches: the values of I of the published row.
      target: its scores (`SCORE`), one for each.
      num_branches: the values of I that are searched, of those.
      settings: what each setting has other than `cell`, as 'key=value,key=value'; the keys are `net` ('mean', 'sum',
        'plain'), `scaling` (of the rate by I), `rate`, `batch` (0: all examples), `schedule` (with its own defaults),
        `loss` (with the settings of `cell`'s), `init_scale` and `margin` (of the data).  An empty text is `cell`
        itself.
      data_seeds: data sets of the search, by their seeds.
      refined: number of pairs of a setting and a data set, the best of the screen, that are run with all `seeds`.
      seeds: how many landscapes a number of branches has outside the screen, where it has one.
      held_out: data sets that the search does not see; the chosen setting is run on them.
      cell: the landscape that the settings change.
    """

    REPLACED: ClassVar[Mapping[str, str]] = {
        "cell.num_branches": "num_branches",
        "cell.reduce": "settings, as in 'net=sum'",
        "cell.data.seed": "data_seeds and held_out",
        "cell.data.labels": "the loss",
    }

    title: str = "Which setting gives the published landscapes?"
    target_branches: tuple[int, ...] = (10, 30, 70, 1000)
    target: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    num_branches: tuple[int, ...] = (10, 30, 70, 1000)
    settings: tuple[str, ...] = ("",)
    data_seeds: tuple[int, ...] = (1, 2, 3)
    refined: int = 3
    seeds: int = 3
    held_out: tuple[int, ...] = (101, 102, 103, 104)
    cell: LandscapeSpec = LandscapeSpec()

    def __post_init__(self) -> None:
        for name in ("target_branches", "num_branches", "settings", "data_seeds", "held_out"):
            values = getattr(self, name)
            require(len(values) > 0 or name == "held_out", f"{name} is empty; give at least one.")
            require(len(set(values)) == len(values), f"{name}={values} names one twice.")
        require(min(self.num_branches) >= 1, f"num_branches={self.num_branches} must be positive integers.")
        known = self.target_branches
        require(
            len(self.target) == len(known) and all(0 < t < math.inf for t in self.target),
            f"target={self.target} must hold a positive number for each of the {len(known)} target_branches.",
        )
        without = [count for count in self.num_branches if count not in known]
        require(
            not without,
            f"num_branches={self.num_branches}: the published scores in target are those of I = "
            f"{', '.join(map(str, known))}, none is of I = {', '.join(map(str, without))}; take num_branches of those,"
            " or give target_branches and target of another row.",
        )
        both = sorted(set(self.data_seeds) & set(self.held_out))
        require(not both, f"data_seeds {both} are both searched and held out; held-out ones must be others.")
        require(self.refined >= 1, f"refined={self.refined} must be at least 1.")
        require(2 <= self.seeds <= 1000, f"seeds={self.seeds} must lie between 2 and 1,000.")

    def validate(self, tables: Tables) -> None:
        """As `LandscapeSpec.validate`, for every setting and count; settings must differ in what they mean."""
        branch, data = self.cell.branch, self.cell.data
        for name in ("seed", "min_margin", "labels"):
            require(name in data.settings, f"data set {data.name!r} has no setting {name!r}.")
        tables.branches.build(branch.name, **{**branch.settings, "out": 1})
        require(
            "init_scale" in branch.settings,
            f"cell.branch={branch.name!r} names no init_scale, which settings of the search change; take a branch that"
            " has it, and name it, as in 'mlp(hidden=(1,),init_scale=1.0)'.",
        )
        for name, given in (("data_seeds", self.data_seeds), ("held_out", self.held_out)):
            for seed in given:
                seeds.check(seed, f"a seed of {name}")
        check_last_seed(self.cell, self.seeds)
        meant: dict[str, list[LandscapeSpec]] = {}
        for setting in self.settings:
            cells = [cell_of(self, setting, count, self.data_seeds[0], 0) for count in self.num_branches]
            for cell in cells:
                cell.validate(tables)
            for other, those in meant.items():
                require(cells != those, f"settings {other!r} and {setting!r} mean the same: give one of them.")
            meant[setting] = cells

    @property
    def targets(self) -> tuple[float, ...]:
        """The published score of each of `num_branches`."""
        known = dict(zip(self.target_branches, self.target, strict=True))
        return tuple(known[count] for count in self.num_branches)


def cell_of(spec: LandscapeSearchSpec, setting: str, count: int, data_seed: int, repeat: int) -> LandscapeSpec:
    """The landscape of I branches at a setting.  Raises ConfigError for a text that is no setting."""
    cell = spec.cell
    defaults = {
        "net": "mean",
        "scaling": cell.training.lr_scaling,
        "rate": cell.training.learning_rate,
        "batch": cell.training.batch_size,
        "schedule": cell.training.schedule.name,
        "loss": cell.loss.name,
        "init_scale": cell.branch.settings["init_scale"],
        "margin": cell.data.settings["min_margin"],
    }
    args = parse_arg(setting, **defaults)
    require(args.net in NETS, unknown(f"net in setting {setting!r}:", args.net, NETS))
    branch = {**cell.branch.settings, "init_scale": args.init_scale}
    if args.net == "plain":
        hidden = branch.get("hidden", ())
        require(
            isinstance(hidden, tuple | list) and len(hidden) > 0,
            f"setting {setting!r}: net=plain widens the last hidden layer, and cell.branch={cell.branch.name!r} names"
            " none; give it hidden layers, as in 'mlp(hidden=(1,),init_scale=1.0)'.",
        )
        *first, last = hidden
        branch["hidden"] = (*first, last * count)
    same_schedule = args.schedule == cell.training.schedule.name
    labels = "class" if args.loss in _OF_CLASSES else "sign"
    return dataclasses.replace(
        cell,
        num_branches=1 if args.net == "plain" else count,
        reduce="sum" if args.net == "sum" else "mean",
        seed=cell.seed + repeat,
        branch=Component(cell.branch.name, branch),
        data=Component(
            cell.data.name,
            {**cell.data.settings, "seed": data_seed, "min_margin": args.margin, "labels": labels},
        ),
        loss=Component(args.loss, cell.loss.settings),
        training=dataclasses.replace(
            cell.training,
            lr_scaling=args.scaling,
            learning_rate=args.rate,
            batch_size=args.batch,
            schedule=cell.training.schedule if same_schedule else Component(args.schedule, {}),
        ),
    )


def decades(values: Sequence[float | None], target: Sequence[float]) -> float | None:
    """The root mean square of log10(ours / theirs); None where one of ours is missing, 0 or not finite."""
    if any(value is None or not 0 < value < math.inf for value in values):
        return None
    return float(np.sqrt(np.mean(np.square(np.log10(np.asarray(values, float) / np.asarray(target))))))


def _rank(entry: Mapping[str, Any]) -> float:
    return math.inf if entry["decades"] is None else entry["decades"]


class _Search:
    """Measures rows of landscapes, each landscape in a folder of its own, and counts them."""

    def __init__(self, spec: LandscapeSearchSpec, workdir: Workdir, tables: Tables) -> None:
        self.spec, self.workdir, self.tables = spec, workdir, tables
        self.measured: set[str] = set()

    def row(self, stage: str, setting: str, data_seed: int, seeds: int) -> dict[str, Any]:
        """A row of landscapes: for each I the scores of each seed, how the runs ended, and how far from the target."""
        rows: list[dict[str, Any]] = []
        means: list[float | None] = []
        for count in self.spec.num_branches:
            scores, solutions = [], []
            for repeat in range(seeds):
                name = f"{setting.replace(',', '_') or 'base'}_data_{data_seed}_I_{count}_{repeat}"
                self.measured.add(name)
                with terminal.part(f"{stage}: {setting or 'base'}, data {data_seed}, I = {count:,}, seed {repeat}"):
                    cell = cell_of(self.spec, setting, count, data_seed, repeat)
                    found, ends = scores_of(cell, self.workdir.path / "cells" / name, self.tables)
                scores.append(found)
                solutions += ends
            given = [found[SCORE] for found in scores if found.get(SCORE) is not None]
            mean = float(np.mean(given)) if len(given) == seeds else None
            rows.append(
                {
                    "num_branches": count,
                    "mean": mean,
                    "interval": intervals(scores).get(SCORE),
                    "scores": scores,
                    "losses": [s["loss"] for s in solutions],
                    "statuses": [s["status"] for s in solutions],
                }
            )
            means.append(mean)
        fit = decades(means, self.spec.targets)
        return {"setting": setting, "data_seed": data_seed, "decades": fit, "rows": rows}


def landscape_search(spec: LandscapeSearchSpec, workdir: Workdir, tables: Tables) -> Report:
    """Search for the setting whose landscapes come nearest to a published row (Figure 1), checked on held-out data."""
    search = _Search(spec, workdir, tables)
    screen = [search.row("screen", setting, data, 1) for setting in spec.settings for data in spec.data_seeds]
    best = sorted(screen, key=_rank)[: spec.refined]
    refined = [search.row("refine", entry["setting"], entry["data_seed"], spec.seeds) for entry in best]
    chosen = min(refined, key=_rank)
    held_out = [search.row("held out", chosen["setting"], data, spec.seeds) for data in spec.held_out]
    record = {
        "title": spec.title,
        "num_branches": spec.num_branches,
        "target": spec.targets,
        "screen": screen,
        "refined": refined,
        "chosen": chosen,
        "held_out": held_out,
        "landscapes": len(search.measured),
    }
    save_json(workdir.results / "landscape_search.json", record)
    return _report(spec, record)


def inside(entry: Mapping[str, Any], target: Sequence[float]) -> int:
    """For how many I the published score lies in the interval over seeds."""
    found = [row["interval"] for row in entry["rows"]]
    return sum(i is not None and i[1] <= value <= i[2] for i, value in zip(found, target, strict=True))


def _report(spec: LandscapeSearchSpec, record: Mapping[str, Any]) -> Report:
    counts = spec.num_branches
    columns = ("setting", "data", *(f"I={count}" for count in counts), "inside", "decades", "loss")
    rows: list[list[Any]] = [["published", None, *spec.targets, None, None, None]]

    def line(entry: Mapping[str, Any], label: str, seeds: int) -> list[Any]:
        losses = [loss for row in entry["rows"] for loss in row["losses"]]
        known = all(loss is not None and math.isfinite(loss) for loss in losses)
        held = f"{inside(entry, spec.targets)}/{len(counts)}" if seeds > 1 else None
        text = f"{label}: {entry['setting'] or 'base'}"
        scores = [row["mean"] for row in entry["rows"]]
        return [text, entry["data_seed"], *scores, held, entry["decades"], max(losses) if known else None]

    chosen = record["chosen"]
    rows.append(line(chosen, "chosen", spec.seeds))
    rows += [line(entry, "refined", spec.seeds) for entry in record["refined"] if entry is not chosen]
    rows += [line(entry, "held out", spec.seeds) for entry in record["held_out"]]
    ranked = sorted(record["screen"], key=_rank)
    best = {entry["setting"]: entry for entry in reversed(ranked)}  # the nearest is the last to be set
    rows += [line(entry, "screen", 1) for entry in ranked if best[entry["setting"]] is entry]
    base, training = spec.cell, spec.cell.training
    notes = [
        "Entries: largest envelope distance over the loss of the zero network; estimated from the grid.  decades: root"
        " mean square of log10(ours / published).  inside: for how many I the published score lies in the 95 %"
        " t-interval over seeds.  loss: the largest of all solutions.  Of the screen each setting's nearest data set.",
        f"Base: {base.loss.name}, mean over branches, rate {training.learning_rate:g} (scaled by"
        f" {training.lr_scaling}), batch {training.batch_size}, {training.schedule.name}.",
        f"Budget: {record['landscapes']} landscapes of three solutions: {len(spec.settings)} settings screened on"
        f" {len(spec.data_seeds)} data sets with one seed, the best {len(record['refined'])} pairs run with"
        f" {spec.seeds} seeds.  The chosen pair is a fit, no claim about what the authors ran.",
    ]
    named = [
        (f"{e['setting'] or 'base'} data {e['data_seed']} I = {row['num_branches']:,}", scores)
        for e in (*record["screen"], *record["refined"], *record["held_out"])
        for row in e["rows"]
        for scores in row["scores"]
    ]
    return Report(spec.title, columns, rows, notes + partial_notes(named))


LANDSCAPE_SEARCH = Experiment("landscape_search", LandscapeSearchSpec, landscape_search, figures.landscape_search)
