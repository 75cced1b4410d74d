"""Table 1: the share of SGD runs that hit the global minimum, against the number of hidden units, for any teachers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import humanize
import numpy as np
import scipy

from dualgap_jax import figures, hitting
from dualgap_jax.config import Component, component, require
from dualgap_jax.data import Dataset
from dualgap_jax.experiments.base import Experiment, Report, Tables, confirm_data
from dualgap_jax.files import save_json, save_npz
from dualgap_jax.hitting import GroundTruth, Outcome, Runs, SgdSpec
from dualgap_jax.losses import Loss
from dualgap_jax.machine import memory_available
from dualgap_jax.sharding import local_devices
from dualgap_jax.workdir import Workdir

PAPER_RUNS = 100
PAPER_HITS = {12: 21, 13: 24, 14: 24, 15: 29, 16: 30, 17: 32, 18: 35, 19: 52, 20: 64, 21: 75}
"""Table 1 of the paper: hidden units -> hits in 100 runs."""

_TEACHERS, _STREAMS, _SEEDS = 2**10, 2**6, 2**16  # together the 2^32 seeds of runs
_WIDEST = 10_000  # hidden units: a compiled step is written out unit by unit


@dataclasses.dataclass(frozen=True)
class HittingRateSpec:
    """A table of hitting rates.

    Attributes:
      title: head of the table and the figures.
      widths: numbers of hidden units.
      seeds: runs for each teacher and width, each with its own initialisation and order.
      teachers: seeds of the data sets; each draws a teacher and points of its own.
      stream: which of 64 disjoint sets of run seeds to use; the search and the table use different ones.
      learning_rate: base rate.
      init_scale: factor on the initial weights.
      tolerance: a run hits when its final loss on the full data, in float64, is within this of the global minimum.
      tolerances: for the sensitivity of the count.
      data: an entry of the data table with a known teacher, without its seed.
      loss: an entry of the loss table.
      sgd: how runs are trained.
    """

    title: str = "Table 1: how often SGD hits the global minimum"
    widths: tuple[int, ...] = tuple(PAPER_HITS)
    seeds: int = 100
    teachers: tuple[int, ...] = (1,)
    stream: int = 0
    learning_rate: float = 0.02
    init_scale: float = 1.0
    tolerance: float = 1e-5
    tolerances: tuple[float, ...] = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
    data: Component = Component("synthetic_relu", {})
    loss: Component = Component("binary_hinge", {})
    sgd: SgdSpec = SgdSpec()

    def __post_init__(self) -> None:
        for name in ("widths", "teachers", "tolerances"):
            require(len(getattr(self, name)) > 0, f"{name} is empty; give at least one.")
        for name in ("widths", "teachers"):
            given = getattr(self, name)
            require(len(set(given)) == len(given), f"{name}={given} names one twice.")
        require(1 <= self.seeds <= _SEEDS, f"seeds={self.seeds} must lie between 1 and {_SEEDS}.")
        require(
            all(0 <= t < _TEACHERS for t in self.teachers), f"teachers={self.teachers} must be 0 to {_TEACHERS - 1}."
        )
        require(0 <= self.stream < _STREAMS, f"stream={self.stream} must be 0 to {_STREAMS - 1}.")
        require(
            self.tolerance > 0 and min(self.tolerances) > 0, "tolerance and every one of tolerances must be positive."
        )
        require("seed" not in self.data.settings, "data.seed comes from `teachers`; leave it out.")
        require(
            max(self.widths) <= _WIDEST, f"widths={self.widths} must be at most {_WIDEST:,} each; give fewer units."
        )
        hitting.make_runs(self.widths, 0, learning_rate=self.learning_rate, init_scale=self.init_scale)

    def validate(self, tables: Tables) -> None:
        """Looks every name and setting up, so that a bad config fails before anything is written."""
        loss = tables.losses.build(self.loss.name, **self.loss.settings)
        tables.datasets.check(self.data.name, **self.data.settings, seed=0)
        local_devices(self.sgd.devices)
        settings = component(tables.datasets, self.data.name, **self.data.settings).settings
        if self.data.name == "synthetic_relu":
            labels, hinge = settings["labels"], loss.tau is not None and "binary" in loss.tasks
            known = {"sign": hinge, "real": "regression" in loss.tasks, "class": False}
            require(
                known.get(labels, True),  # labels that there are not are named by the data set
                f"loss {self.loss.name!r} with data.labels={labels!r}: the global minimum is known for a hinge loss of"
                " one output (binary_hinge) on labels='sign' and for the squared loss on labels='real'.",
            )
        features = settings.get("d", 1)
        runs, units = len(self.widths) * len(self.teachers) * self.seeds, max(self.widths)
        needed, free = 4 * runs * units * (features + 2 if isinstance(features, int) else 1), memory_available()
        require(
            needed < free,
            f"the weights of {runs:,} runs of up to {units:,} hidden units take {humanize.naturalsize(needed)},"
            f" available are {humanize.naturalsize(max(free, 0))}; take fewer runs or smaller widths.",
        )


class Study(NamedTuple):
    """The data sets of a spec, what is known of their minima, and the loss."""

    datasets: list[Dataset]
    truths: list[GroundTruth]
    loss: Loss


def build(spec: HittingRateSpec, tables: Tables) -> Study:
    """Draws the data of each teacher and shows the global minimum of each.

    Raises:
      ConfigError: for data or a loss whose global minimum is not known.
    """
    loss = tables.losses.build(spec.loss.name, **spec.loss.settings)
    datasets = [tables.datasets.build(spec.data.name, **spec.data.settings, seed=seed) for seed in spec.teachers]
    return Study(datasets, [hitting.ground_truth(dataset, loss) for dataset in datasets], loss)


def all_runs(spec: HittingRateSpec, learning_rates: Sequence[float] = ()) -> Runs:
    """The runs of a spec, teacher by teacher, width by width; for several learning rates that many times."""
    index, width, seed = (
        a.ravel() for a in np.meshgrid(np.arange(len(spec.teachers)), spec.widths, np.arange(spec.seeds), indexing="ij")
    )
    teacher = np.asarray(spec.teachers)[index]
    number = (teacher * _STREAMS + spec.stream) * _SEEDS + seed
    rates = np.asarray(learning_rates or (spec.learning_rate,), float)[:, None]
    return hitting.make_runs(width, number, data=index, learning_rate=rates, init_scale=spec.init_scale)


def is_hit(final_loss: np.ndarray, runs: Runs, truths: Sequence[GroundTruth], tolerance: float) -> np.ndarray:
    """Whether each run ended within `tolerance` of the global minimum of its data."""
    least = np.asarray([truth.loss for truth in truths])[runs.data]
    return final_loss <= least + tolerance


def rank_correlation(widths: Sequence[int], rates: Sequence[float]) -> dict[str, float | None]:
    """Spearman's rho, Kendall's tau-b and two-sided p-values of rate with width; None where all rates are equal."""
    if len(set(rates)) < 2 or len(widths) < 3:
        return dict.fromkeys(("spearman", "spearman_p", "kendall", "kendall_p"))
    rho, tau = scipy.stats.spearmanr(widths, rates), scipy.stats.kendalltau(widths, rates)
    return {
        "spearman": float(rho.statistic),
        "spearman_p": float(rho.pvalue),
        "kendall": float(tau.statistic),
        "kendall_p": float(tau.pvalue),
    }


def row(hidden: int, hits: int, runs: int, diverged: int = 0) -> dict[str, Any]:
    """A row of the table: hits, rate, Wilson's interval, and the paper's hits where it has that width.

    A run that diverged is a run without a hit.  Where one did, the rate says how often SGD ran at all, and is not
    compared with the paper's.
    """
    interval = scipy.stats.binomtest(hits, runs).proportion_ci(0.95, method="wilson")
    low, high = float(interval.low), float(interval.high)
    paper = PAPER_HITS.get(hidden)
    return {
        "hidden": hidden,
        "seeds": runs,
        "hits": hits,
        "rate": hits / runs,
        "wilson_low": low,
        "wilson_high": high,
        "paper_hits": paper,
        "diverged": diverged,
        "paper_inside": None if paper is None or diverged else bool(low <= paper / PAPER_RUNS <= high),
    }


def hitting_rate(spec: HittingRateSpec, workdir: Workdir, tables: Tables) -> Report:
    """How often SGD hits the global minimum against the number of hidden units (Table 1)."""
    study, runs = build(spec, tables), all_runs(spec)
    confirm_data(workdir, [(d.x, d.y) for d in study.datasets], info=study.datasets[0].info)
    with workdir.metrics() as metrics:
        outcome = hitting.train_runs(
            study.datasets,
            study.loss,
            runs,
            spec.sgd,
            checkpoints=workdir.checkpoints,
            metrics=metrics,
            tolerance=spec.tolerance,
        )
    teacher = np.asarray(spec.teachers)[runs.data]
    _save_arrays(spec, workdir, runs, teacher, outcome)
    rows, sensitivity = [], []
    for seed in spec.teachers:
        for hidden in spec.widths:
            chosen = (teacher == seed) & (runs.width == hidden)
            hits = is_hit(outcome.final_loss, runs, study.truths, spec.tolerance)[chosen]
            diverged = int(hitting.diverged(outcome)[chosen].sum())
            rows.append({"teacher": seed, **row(hidden, int(hits.sum()), spec.seeds, diverged)})
            counts = [int(is_hit(outcome.final_loss, runs, study.truths, t)[chosen].sum()) for t in spec.tolerances]
            middle = float(np.median(np.where(hitting.diverged(outcome), np.inf, outcome.final_loss)[chosen]))
            sensitivity.append(
                {
                    "teacher": seed,
                    "hidden": hidden,
                    "hits": counts,
                    "median_final_loss": middle if math.isfinite(middle) else None,
                }
            )
    teachers = [
        _teacher(spec, study, k, [r for r in rows if r["teacher"] == seed]) for k, seed in enumerate(spec.teachers)
    ]
    record = {
        "title": spec.title,
        "setting": setting_text(spec),
        "tolerance": spec.tolerance,
        "tolerances": spec.tolerances,
        "rows": rows,
        "sensitivity": sensitivity,
        "teachers": teachers,
        "trend": trend(teachers, rows, spec.widths),
        "ends": {name: int((outcome.status == k).sum()) for k, name in enumerate(hitting.STATUSES)},
        "steps_done": int(outcome.steps.sum()),
    }
    save_json(workdir.results / "hitting_rate.json", record)
    return _report(spec, record)


def setting_text(spec: HittingRateSpec) -> str:
    """The setting in a line."""
    sgd = spec.sgd
    batch = f"batch {sgd.batch_size}" if sgd.batch_size else "full batch"
    scale = "" if spec.init_scale == 1 else f" × {spec.init_scale:g}"
    order = "in epochs" if sgd.order == "epochs" else "drawn independently"
    return (
        f"{spec.loss.name.replace('_', ' ')}, learning rate {spec.learning_rate:g} {sgd.schedule.name}, {batch}"
        f" {order}, init {sgd.init}{scale}, {sgd.steps:,} steps"
    )


def _save_arrays(spec: HittingRateSpec, workdir: Workdir, runs: Runs, teacher: np.ndarray, outcome: Outcome) -> None:
    looks = np.minimum(np.arange(spec.sgd.looks + 1) * spec.sgd.check_every, spec.sgd.steps)
    save_npz(
        workdir.results / "hitting_rate.npz",
        hidden=runs.width,
        teacher=teacher,
        seed=runs.seed,
        final_loss=outcome.final_loss,
        status=outcome.status,
        steps=outcome.steps,
        look_steps=looks,
        losses=outcome.losses,
    )


def _teacher(spec: HittingRateSpec, study: Study, index: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    info, truth = study.datasets[index].info, study.truths[index]
    return {
        "teacher": spec.teachers[index],
        "positive_fraction": info.get("positive_fraction"),
        "global_minimum": truth.loss,
        "teacher_scale": truth.scale,
        "smallest_margin": truth.smallest_margin,
        **rank_correlation([r["hidden"] for r in rows], [r["rate"] for r in rows]),
    }


def trend(teachers: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], widths: Sequence[int]) -> dict[str, Any]:
    """The rank correlations over teachers, with a one-sided sign test that they are as often positive as negative."""
    rhos = [t["spearman"] for t in teachers if t["spearman"] is not None]
    taus = [t["kendall"] for t in teachers if t["kendall"] is not None]
    up, down = sum(r > 0 for r in rhos), sum(r < 0 for r in rhos)
    mean = [float(np.mean([r["rate"] for r in rows if r["hidden"] == width])) for width in widths]
    return {
        "teachers": len(teachers),
        "rising": up,
        "falling": down,
        "undefined": len(teachers) - len(rhos),
        "sign_test_p": float(scipy.stats.binomtest(up, up + down, alternative="greater").pvalue) if up + down else None,
        "mean_spearman": float(np.mean(rhos)) if rhos else None,
        "mean_kendall": float(np.mean(taus)) if taus else None,
        "mean_rate": mean,
        "of_mean_rate": rank_correlation(widths, mean),
    }


def _report(spec: HittingRateSpec, record: dict[str, Any]) -> Report:
    notes = [f"Setting: {record['setting']}.  Hits are certified by the loss on the full data in float64."]
    notes += [
        f"Teacher {t['teacher']}: the {'rescaled ' if t['teacher_scale'] != 1 else ''}teacher itself has loss"
        f" {t['global_minimum']:.2g}, the least possible (shown by evaluation)."
        for t in record["teachers"][:1]
    ]
    if len(spec.teachers) == 1:
        columns: Sequence[str] = (
            "hidden",
            "paper",
            "hits",
            "of",
            "95 % low",
            "95 % high",
            "paper inside",
            "median loss",
            "diverged",
        )
        cells: list[list[Any]] = [
            [
                r["hidden"], r["paper_hits"], r["hits"], r["seeds"], r["wilson_low"], r["wilson_high"],
                {None: None, True: "yes", False: "no"}[r["paper_inside"]], s["median_final_loss"],
                r["diverged"] or None,
            ]
            for r, s in zip(record["rows"], record["sensitivity"], strict=True)
        ]  # fmt: skip
        named = [r for r in record["rows"] if r["paper_inside"] is not None]
        if named:
            inside = sum(r["paper_inside"] for r in named)
            notes.append(f"{inside} of {len(named)} rows of the paper lie inside the Wilson intervals.")
        (one,) = record["teachers"]
        if one["spearman"] is not None:
            notes.append(
                f"Rank correlation of rate with width: Spearman {one['spearman']:.2f}, Kendall {one['kendall']:.2f}."
            )
    else:
        columns = ("teacher", "positive", *(f"h={w}" for w in spec.widths), "Spearman", "Kendall")
        hits = {t: [r["hits"] for r in record["rows"] if r["teacher"] == t] for t in spec.teachers}
        cells = [
            [t["teacher"], t["positive_fraction"], *hits[t["teacher"]], t["spearman"], t["kendall"]]
            for t in record["teachers"]
        ]
        cells.append(["mean rate", None, *record["trend"]["mean_rate"], *(
            record["trend"][k] for k in ("mean_spearman", "mean_kendall")
        )])  # fmt: skip
        found = record["trend"]
        p_value = "-" if found["sign_test_p"] is None else f"{found['sign_test_p']:.1e}"
        notes.append(
            f"Entries: hits in {spec.seeds} runs.  The rate rises with width for {found['rising']} teachers, falls for"
            f" {found['falling']}, does not vary for {found['undefined']}; one-sided sign test p = {p_value}."
        )
    if any(r["diverged"] for r in record["rows"]):
        lost, runs = (sum(r[k] for r in record["rows"]) for k in ("diverged", "seeds"))
        notes.append(
            f"{lost:,} of {runs:,} runs diverged; they count as runs without a hit, and their rows are not compared"
            " with the paper's. Lower --config.learning_rate."
        )
    trivial = [str(t["teacher"]) for t in record["teachers"] if t["positive_fraction"] in (0.0, 1.0)]
    if trivial and spec.data.settings.get("labels", "sign") == "sign":
        notes.append(f"Teachers that give every point the same label, a trivial task: {', '.join(trivial)}.")
    for position, tolerance in enumerate(spec.tolerances):
        totals = [
            sum(s["hits"][position] for s in record["sensitivity"] if s["hidden"] == width) for width in spec.widths
        ]
        notes.append(f"Hits at tolerance {tolerance:.0e}: {', '.join(map(str, totals))}.")
    return Report(spec.title, columns, cells, notes)


HITTING_RATE = Experiment("hitting_rate", HittingRateSpec, hitting_rate, figures.hitting_rate)
