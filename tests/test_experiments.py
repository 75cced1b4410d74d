"""Every registered experiment and every config at smoke size; workdirs that resume, refuse and report."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import test_published as published
from tfds_files import random_split, write_tfds

from dualgap_jax import config as config_lib
from dualgap_jax import convexity, experiments, figures, losses
from dualgap_jax.checkpoints import load
from dualgap_jax.config import Component, ConfigError, experiment_config, to_spec
from dualgap_jax.data import DATASETS, Dataset
from dualgap_jax.duality.trained import TrainedSpec
from dualgap_jax.evaluation import evaluate
from dualgap_jax.experiments import EXPERIMENTS, TABLES, Experiment, Report, base, planes
from dualgap_jax.experiments import landscape as landscape_experiments
from dualgap_jax.experiments.architecture import ArchitectureSpec, narrowed
from dualgap_jax.experiments.certify import CertifySpec
from dualgap_jax.experiments.duality_gap import DualityGapSpec
from dualgap_jax.experiments.examples import ExamplesSpec
from dualgap_jax.experiments.landscape import LandscapeSpec, PlaneSpec, regime
from dualgap_jax.experiments.planes import window
from dualgap_jax.experiments.regimes import RegimesSpec
from dualgap_jax.experiments.row import RowSpec, intervals
from dualgap_jax.files import load_json, load_npz
from dualgap_jax.metrics import read_metrics
from dualgap_jax.networks import BRANCHES, from_functions
from dualgap_jax.networks.sources import InMemory
from dualgap_jax.registry import SettingError, UnknownNameError
from dualgap_jax.report import page
from dualgap_jax.training import TrainingSpec, train
from dualgap_jax.workdir import Workdir, WorkdirError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


@pytest.fixture
def tfds_dir(tmp_path_factory: pytest.TempPathFactory, rng: np.random.Generator, monkeypatch: Any) -> Path:
    """A prepared TFDS folder with a few hundred random images of each data set."""
    folder = tmp_path_factory.mktemp("tfds")
    for name in ("mnist", "cifar10"):
        write_tfds(folder, name, {split: random_split(rng, name, 300) for split in ("train", "test")})
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return folder


def tiny(**changes: Any) -> LandscapeSpec:
    spec = LandscapeSpec(
        num_branches=3,
        branch=Component("mlp", {"hidden": (2,)}),
        data=Component("synthetic_relu", {"n": 40, "d": 4, "seed": 3}),
        training=TrainingSpec(batch_size=10, max_steps=20, check_every=10),
        plane=PlaneSpec(points=5, edge_points=4),
    )
    return dataclasses.replace(spec, **changes)


def run(
    spec: Any, workdir: Path, experiment: str = "landscape", *, drawn: bool = True, **options: Any
) -> tuple[Report, Workdir, bool]:
    with pytest.MonkeyPatch.context() as patch:
        if not drawn:  # half of the time of a run of this size
            patch.setattr(Experiment, "drawn", lambda self, workdir: None)
        return experiments.run(experiment_config(experiment, spec), workdir=workdir, **options)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    """A complete run of `tiny`."""
    return run(tiny(), tmp_path_factory.mktemp("whole") / "w")[1]


# --- conformance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.optimized] * bool(published.of_config(path.name)))
        for path in CONFIGS
    ],
)
def test_every_config_runs_at_smoke_size(path: Path, tfds_dir: Path, tmp_path: Path) -> None:
    config = config_lib.load(path, "smoke")
    report, workdir, was_complete = experiments.run(config, workdir=tmp_path / "w", name=path.stem)
    assert not was_complete
    assert workdir.status == "complete"
    assert len(report.rows) >= 1
    assert all(len(row) == len(report.columns) for row in report.rows)
    card = load_json(workdir.path / "run.json")
    assert {"command", "git", "packages", "devices", "start", "end", "status", "reason"} <= card.keys()
    assert load_json(workdir.path / "config.json") == base.identity(EXPERIMENTS[config.experiment], spec_of(config))
    assert list(workdir.figures.glob("*.png"))
    assert list(workdir.figures.glob("*.pdf"))
    for run_of_it in published.of_config(path.name):
        published.assert_as_published(run_of_it, published.numbers_in(run_of_it, workdir.results))
    before = {p: p.stat().st_mtime_ns for p in workdir.path.rglob("*") if p.is_file()}
    again, _, was_complete = experiments.run(config_lib.load(path, "smoke"), workdir=tmp_path / "w", name=path.stem)
    assert was_complete
    assert again.text() == report.text()
    assert {p: p.stat().st_mtime_ns for p in workdir.path.rglob("*") if p.is_file()} == before


def spec_of(config: Any) -> Any:
    return config_lib.spec_of(config, EXPERIMENTS[config.experiment].spec)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_says_what_it_is(path: Path) -> None:
    head = path.read_text().split('"""')[1]
    assert f"--config=configs/{path.name}" in head
    assert head.partition("\n")[0].endswith(".")
    config = config_lib.load(path)
    assert config.experiment in EXPERIMENTS
    spec_of(config).validate(TABLES)
    with pytest.raises(ConfigError, match="unknown config argument 'nosuch'"):
        config_lib.load(path, "nosuch=1")


def test_every_experiment_has_a_config() -> None:
    assert {config_lib.load(path).experiment for path in CONFIGS} == set(EXPERIMENTS)


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_experiment_describes_itself(name: str) -> None:
    assert EXPERIMENTS.describe(name).endswith(".")
    spec_type = EXPERIMENTS[name].spec
    spec = spec_type()
    assert to_spec(spec_type, config_lib.as_dict(spec)) == spec


@pytest.mark.parametrize("name", sorted(set(BRANCHES) - {"vgg9"}))  # which is what configs/cifar_vgg9.py trains
def test_every_branch_trains_and_is_drawn(name: str, tfds_dir: Path, tmp_path: Path) -> None:
    spec = tiny(
        branch=Component(name, {}),
        data=Component("mnist", {"num_examples": 20}),
        loss=Component("multi_margin", {}),
        training=TrainingSpec(batch_size=10, max_steps=2, check_every=2),
        plane=PlaneSpec(points=3, edge_points=3),
    )
    _, workdir, _ = run(spec, tmp_path / "w")
    assert np.isfinite(load_npz(workdir.results / "landscape.npz")["loss"]).all()


@pytest.mark.parametrize("name", list(losses.LOSSES))
@pytest.mark.parametrize("data", ["synthetic_relu", "mnist"])
def test_every_loss_trains_or_refuses(name: str, data: str, tfds_dir: Path, tmp_path: Path) -> None:
    settings = {"n": 40, "d": 4, "seed": 3} if data == "synthetic_relu" else {"num_examples": 40}
    task = "binary" if data == "synthetic_relu" else "multiclass"
    spec = tiny(
        data=Component(data, settings),
        loss=Component(name, {}),
        training=TrainingSpec(batch_size=10, max_steps=2, check_every=2, learning_rate=0.01),
    )
    if task in losses.LOSSES.build(name).tasks:
        _, workdir, _ = run(spec, tmp_path / "w", drawn=False)
        assert all(math.isfinite(s["loss"]) for s in load_json(workdir.results / "landscape.json")["solutions"])
    else:
        with pytest.raises(ConfigError, match=f"{task} labels"):
            run(spec, tmp_path / "w")
        assert load_json(tmp_path / "w" / "run.json")["status"] == "failed"


# --- what a landscape leaves ------------------------------------------------------------------------------------------


def test_the_records_of_a_landscape(whole: Workdir) -> None:
    workdir = whole
    arrays = load_npz(workdir.results / "landscape.npz")
    assert {k: v.shape for k, v in arrays.items()} == {
        "xs": (5,), "ys": (5,), "loss": (5, 5), "anchors": (3, 2), "edge_t": (4,), "edge_loss": (3, 4),
    }  # fmt: skip
    record = load_json(workdir.results / "landscape.json")
    scores = convexity.scores(
        arrays["xs"], arrays["ys"], arrays["loss"], zero_loss=record["zero_loss"],
        edge_t=arrays["edge_t"], edge_losses=arrays["edge_loss"],
    ).to_json()  # fmt: skip
    assert record["definitions"] == scores.pop("definitions")
    assert record["scores"] == scores
    assert record["zero_loss"] == 1.0  # the hinge of the zero network
    # The ends of the edges are the solutions, whose losses were computed by another route.
    for k in range(3):
        assert arrays["edge_loss"][k, 0] == pytest.approx(record["solutions"][k]["loss"], rel=1e-4, abs=1e-6)
    rows = read_metrics(workdir.path / "metrics.jsonl")
    assert [(r["step"], r["solution"]) for r in rows] == [(s, k) for s in (10, 20) for k in range(3)]
    assert {"loss", "learning_rate", "steps_per_second", "status"} <= rows[0].keys()
    restored = load(workdir.checkpoints / "solution_1")
    assert restored.step == 20
    assert not list(workdir.results.glob("*.partial*"))


def test_a_table_says_what_share_of_a_surface_its_scores_leave_out(tmp_path: Path, whole: Workdir) -> None:
    """The window is so large that every loss but the one in its middle overflows."""
    report, workdir, _ = run(tiny(plane=PlaneSpec(points=5, edge_points=4, half_width=1e20)), tmp_path / "w")
    scores = load_json(workdir.results / "landscape.json")["scores"]
    loss = load_npz(workdir.results / "landscape.npz")["loss"]
    share = np.isfinite(loss).mean()
    assert 0 < share < 1
    assert (scores["finite_share"], scores["status"]) == (share, "partial")
    assert (
        f"Partial scores, of the finite losses only; share of the grid left out: I = 3 ({1 - share:.2%})."
        in report.text()
    )
    assert "Partial" not in Report(**load_json(whole.results / "report.json")).text()


def test_what_the_solutions_do_not_allow_is_left_out_and_said(tmp_path: Path) -> None:
    """One step as far as losses that are infinite, of a loss that is 0 at the zero network."""

    def walled(*, at: float = 50.0) -> losses.Loss:
        """Minus the margin, infinite beyond a wall."""

        def per_example(outputs: Any, labels: Any) -> Any:
            margins = labels * outputs[:, 0]
            return jnp.where(margins > at, jnp.inf, -margins)

        return losses.Loss(per_example, None, None, ("binary",))

    tables = TABLES._replace(losses=losses.LOSSES.extended({"walled": walled}))
    spec = tiny(
        loss=Component("walled", {}),
        training=TrainingSpec(batch_size=10, max_steps=1, check_every=1, learning_rate=1e3),
        plane=PlaneSpec(points=5, edge_points=4, hessian=2, trajectory=3, align="branches"),
    )
    report, workdir, _ = run(spec, tmp_path / "w", tables=tables)
    record = load_json(workdir.results / "landscape.json")
    assert record["zero_loss"] is None
    assert {"hessian", "trajectory"} == set(record["left_out"])
    assert math.inf in [s["loss"] for s in record["solutions"]]
    said = " ".join(report.text().split())
    for words in (
        "the loss of the zero network is not positive and finite",
        "hessian, for the loss of",
        "trajectory, for a trajectory needs at least three snapshots, got 2.",
        "a loss on an edge is not finite: I = 3, I = 3 aligned.",
    ):
        assert words in said
    shares = [1 - r["scores"]["finite_share"] for r in (record, record["aligned"])]
    for name, share in zip(("I = 3", "I = 3 aligned"), shares, strict=True):
        assert share == 0 or f"{name} ({share:.2%})" in said
    assert max(shares) > 0


def test_a_landscape_over_some_of_the_examples(tmp_path: Path, whole: Workdir) -> None:
    spec = tiny(plane=PlaneSpec(points=5, edge_points=4, samples=7, sample_chunk=3))
    report, workdir, _ = run(spec, tmp_path / "some")
    record = load_json(workdir.results / "landscape.json")
    assert record["samples"] == {"used": 7, "of": 40}
    assert "Losses: over 7 of the 40 training examples." in " ".join(report.text().split())
    arrays = load_npz(workdir.results / "landscape.npz")
    for k in range(3):
        assert arrays["edge_loss"][k, 0] == pytest.approx(record["solutions"][k]["loss"], rel=1e-4, abs=1e-6)
    of_all = load_npz(whole.results / "landscape.npz")
    np.testing.assert_array_equal(of_all["anchors"], arrays["anchors"])  # training sees all examples
    assert not np.allclose(of_all["loss"], arrays["loss"])
    assert load_json(whole.results / "landscape.json")["samples"] == {"used": 40, "of": 40}
    with pytest.raises(ConfigError, match=r"plane.samples=41 exceeds the 40 examples"):
        run(tiny(plane=PlaneSpec(points=5, edge_points=4, samples=41)), tmp_path / "more")


def test_the_examples_are_the_first_of_a_seeded_permutation(rng: np.random.Generator) -> None:
    x = rng.normal(size=(30, 2))
    data = Dataset("d", x, np.arange(30.0), np.zeros(2), np.ones(2), 1, "regression", {})
    few, more, other = (landscape_experiments.chosen(data, samples, seed) for samples, seed in ((5, 0), (9, 0), (9, 1)))
    np.testing.assert_array_equal(more.y[:5], few.y)
    assert len(set(more.y.tolist())) == 9
    assert more.y.tolist() != other.y.tolist()
    assert more.y.tolist() != sorted(more.y.tolist())
    np.testing.assert_array_equal(more.x, x[more.y.astype(int)])
    assert landscape_experiments.chosen(data, 0, 0) is data


def test_solutions_on_disk_are_measured_as_those_in_memory(tmp_path: Path) -> None:
    class Held:
        def __init__(self, params: Any, state: Any) -> None:
            self.num_branches, self._trees = 3, (params, state)

        def read(self, first: int, count: int) -> Any:
            return jax.tree.map(lambda leaf: np.asarray(leaf)[first : first + count], self._trees)

    spec, tables = tiny(), TABLES
    dataset, net, _, loss = landscape_experiments.build(spec, tables)
    networks = [InMemory(*jax.jit(net.init)(jax.random.key(k), jnp.asarray(dataset.x[:1]))) for k in range(3)]
    measured = []
    for name, solutions in (("memory", networks), ("disk", [Held(n.params, n.state) for n in networks])):
        workdir = Workdir.open(tmp_path / name, {})
        losses = [evaluate(net, loss, dataset, s).loss for s in solutions]
        record = planes.measure(spec, workdir, dataset, net, loss, solutions)
        measured.append((load_npz(workdir.results / "landscape.npz"), record, losses))
    (arrays, record, losses), (on_disk, other, streamed) = measured
    assert record == other
    assert losses == streamed
    for key, value in arrays.items():
        np.testing.assert_array_equal(on_disk[key], value)


def test_figures_are_drawn_again_from_the_records(tmp_path: Path, whole: Workdir) -> None:
    path = tmp_path / "w"
    shutil.copytree(whole.path, path, ignore=shutil.ignore_patterns("checkpoints", "figures"))
    figures.draw(path)
    assert (path / "figures" / "landscape.png").stat().st_size > 10_000


def test_seeds_and_data_decide(tmp_path: Path, whole: Workdir) -> None:
    """The same config gives the same surface; another seed another one."""
    others = [run(tiny(seed=seed), tmp_path / str(seed), drawn=False)[1] for seed in (0, 1)]
    surfaces = [load_npz(workdir.results / "landscape.npz")["loss"] for workdir in (whole, *others)]
    np.testing.assert_array_equal(surfaces[0], surfaces[1])
    assert not np.allclose(surfaces[0], surfaces[2])


def test_an_interrupted_run_resumes_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny(training=TrainingSpec(batch_size=10, max_steps=60, check_every=10, checkpoint_seconds=0.0))
    _, whole, _ = run(spec, tmp_path / "whole", drawn=False)

    from dualgap_jax.metrics import Metrics

    write = Metrics.write

    def interrupting(self: Metrics, step: int, **values: Any) -> None:
        if step == 40:
            raise KeyboardInterrupt
        write(self, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(spec, tmp_path / "broken")
    assert load_json(tmp_path / "broken" / "run.json")["status"] == "interrupted"
    _, resumed, was_complete = run(spec, tmp_path / "broken", drawn=False)
    assert not was_complete
    for name, value in load_npz(whole.results / "landscape.npz").items():
        np.testing.assert_array_equal(load_npz(resumed.results / "landscape.npz")[name], value)
    keys = ("step", "solution", "loss", "status")
    rows = [[{k: r[k] for k in keys} for r in read_metrics(w.path / "metrics.jsonl")] for w in (whole, resumed)]
    assert rows[0] == rows[1]


def test_an_interrupted_row_keeps_its_finished_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RowSpec(num_branches=(1, 2), cell=tiny())
    from dualgap_jax.experiments import landscape as module

    real = module.LANDSCAPE.run
    calls: list[int] = []

    def failing(spec: LandscapeSpec, workdir: Workdir, tables: Any) -> Report:
        calls.append(spec.num_branches)
        if spec.num_branches == 2 and len(calls) == 2:
            raise RuntimeError("power cut")
        return real(spec, workdir, tables)

    monkeypatch.setattr(module, "LANDSCAPE", dataclasses.replace(module.LANDSCAPE, run=failing))
    with pytest.raises(RuntimeError, match="power cut"):
        run(spec, tmp_path / "w", "landscape_row", drawn=False)
    card = load_json(tmp_path / "w" / "run.json")
    assert (card["status"], card["reason"]) == ("failed", "RuntimeError: power cut")
    report, _, _ = run(spec, tmp_path / "w", "landscape_row", drawn=False)
    assert calls == [1, 2, 2]
    assert [row[0] for row in report.rows] == [1, 2]


def test_landscapes_over_examples_are_landscapes_of_those_examples(tfds_dir: Path, tmp_path: Path) -> None:
    data, plane = Component("mnist", {"num_examples": 0}), PlaneSpec(points=5, edge_points=4, align="units")
    cell = tiny(data=data, loss=Component("multi_margin", {}), plane=plane)
    spec = ExamplesSpec(num_examples=(40,), num_branches=(2,), seeds=2, cell=cell)
    report, workdir, _ = run(spec, tmp_path / "w", "landscape_examples", drawn=False)
    assert [row[:2] for row in report.rows] == [[40, 2]]
    (found,) = load_json(workdir.results / "examples.json")["cells"]
    assert (found["num_parameters"], found["num_outputs"]) == (2 * (784 * 2 + 2 + 2 * 10 + 10), 10)
    data = Component("mnist", {"num_examples": 40})
    alone = dataclasses.replace(cell, num_branches=2, seed=cell.seed + 1, data=data)
    _, inner, _ = run(alone, tmp_path / "alone", drawn=False)
    record = load_json(inner.results / "landscape.json")
    assert found["scores"][1]["barrier_max"] == record["scores"]["barrier_max"]
    assert found["scores"][1]["barrier_max_aligned"] == record["aligned"]["scores"]["barrier_max"]
    assert found["losses"][3:] == [s["loss"] for s in record["solutions"]]
    assert report.rows[0][5] == pytest.approx(np.mean([s["barrier_max"] for s in found["scores"]]))


def test_landscapes_over_examples_that_diverged_have_no_scores(tfds_dir: Path, tmp_path: Path) -> None:
    training = TrainingSpec(batch_size=10, max_steps=20, check_every=10, learning_rate=1e30)
    data, loss = Component("mnist", {"num_examples": 0}), Component("multi_margin", {})
    spec = ExamplesSpec(num_examples=(60, 40), num_branches=(2,), cell=tiny(data=data, loss=loss, training=training))
    report, workdir, _ = run(spec, tmp_path / "w", "landscape_examples")
    assert [cell["scores"] for cell in load_json(workdir.results / "examples.json")["cells"]] == [[{}], [{}]]
    assert [row[:2] for row in report.rows] == [[60, 2], [40, 2]]
    assert report.rows[0][4:] == ["0/3", None, None, None, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_examples": ()}, "num_examples"),
        ({"num_examples": (5, 5)}, "distinct"),
        ({"num_branches": (0,)}, "at least 1"),
        ({"seeds": 0}, "seeds=0"),
    ],
)
def test_what_landscapes_over_examples_do_not_take(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExamplesSpec(**changes)
    with pytest.raises(ConfigError, match="no setting num_examples"):
        ExamplesSpec(cell=tiny()).validate(TABLES)


def test_diverged_cells_of_the_regimes_are_named(tmp_path: Path) -> None:
    cell = tiny(training=TrainingSpec(batch_size=10, max_steps=20, check_every=10, learning_rate=1e30))
    cell = dataclasses.replace(cell, loss=Component("squared", {}))
    spec = RegimesSpec(
        inits=("torch",), lr_scalings=("none",), reduces=("sum",), num_branches=(2,), repeats=2, cell=cell
    )
    report, workdir, _ = run(spec, tmp_path / "w", "regimes")
    cells = load_json(workdir.results / "regimes.json")["cells"]
    assert [c["statuses"] for c in cells] == [["diverged"] * 3] * 2
    assert report.rows[0][3] is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0, 3.0], 2.0),
        ([1.0, None, 3.0], [3.0, "(1 of 3 diverged)"]),
        ([1.0, math.nan, 3.0], [3.0, "(1 of 3 diverged)"]),
        ([None, 2.0, None], None),
        ([2.0, None], None),
        ([None], None),
    ],
)
def test_a_repetition_that_diverged_counts_as_above_every_number(values: list[Any], expected: Any) -> None:
    from dualgap_jax.experiments.regimes import _entry

    assert _entry(values) == expected


def test_the_table_of_regimes_does_not_average_over_survivors() -> None:
    from dualgap_jax.experiments.regimes import _report

    def cell(count: int, repeat: int, score: float | None) -> dict[str, Any]:
        statuses = ["converged"] * 2 + ["diverged" if score is None else "converged"]
        named = {"init": "torch", "lr_scaling": "none", "reduce": "sum", "num_branches": count, "repeat": repeat}
        # A run that diverged may still have a finite loss at its last finite weights.
        scores = {} if score is None else {"envelope_max": score}
        return {**named, "scores": scores, "losses": [0.1, 0.2, 0.3], "statuses": statuses}

    def rows(*scores: tuple[float | None, ...]) -> list[Any]:
        cells = [cell(c, k, s) for c, line in zip((3, 10), scores, strict=True) for k, s in enumerate(line)]
        spec = RegimesSpec(inits=("torch",), lr_scalings=("none",), reduces=("sum",), num_branches=(3, 10), repeats=3)
        return list(_report(spec, cells).rows[0][3:])

    assert rows((3.0, 1.0, 2.0), (0.1, 0.2, 0.3)) == [2.0, 0.2, "falls", 0.2, "18/18", None]
    one_lost = rows((3.0, 1.0, 2.0), (0.1, None, 0.3))
    assert one_lost[:3] == [2.0, [0.3, "(1 of 3 diverged)"], "falls"]
    assert one_lost[4:] == ["17/18", 1]
    assert rows((3.0, 1.0, 2.0), (None, None, 0.3))[:3] == [2.0, None, "diverges"]
    assert rows((None, None, 2.0), (0.1, 0.2, 0.3))[:3] == [None, 0.2, "-"]


# --- values of an axis, seeds and settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "changes", "words"),
    [
        (RegimesSpec, {"num_branches": (3, 3)}, "num_branches=.* names one twice"),
        (RegimesSpec, {"lr_scalings": ("none", "none")}, "lr_scalings=.* names one twice"),
        (RegimesSpec, {"inits": ("torch", "torch")}, "inits=.* names one twice"),
        (RegimesSpec, {"inits": ("torch*2", "torch*2.0")}, r"inits 'torch\*2' and 'torch\*2.0' mean the same"),
        (RegimesSpec, {"inits": ("torch", "torch*1")}, r"inits 'torch' and 'torch\*1' mean the same"),
        (CertifySpec, {"num_branches": (2, 2)}, "num_branches=.* names one twice"),
        (DualityGapSpec, {"num_branches": (2, 2)}, "num_branches=.* names one twice"),
        (DualityGapSpec, {"trained": TrainedSpec(num_branches=(1, 1))}, "trained.num_branches=.* names one twice"),
    ],
)
def test_values_that_are_named_twice_are_refused(spec: type, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        spec(**changes)


@pytest.mark.parametrize("spec", [RowSpec, ExamplesSpec, ArchitectureSpec])
def test_seeds_beyond_the_last_are_refused_before_the_first_is_run(spec: type) -> None:
    data = Component("mnist", {"num_examples": 20})
    last = tiny(data=data, loss=Component("multi_margin", {}), seed=2**32 - 2)
    spec(num_branches=(2, 3), seeds=2, cell=last).validate(TABLES)
    with pytest.raises(ConfigError, match=r"seeds=3, from cell\.seed=4294967294 on, go beyond the last seed"):
        spec(num_branches=(2, 3), seeds=3, cell=last).validate(TABLES)


@pytest.mark.parametrize(
    ("config", "leaf", "text", "by"),
    [
        ("figure1", "cell.num_branches", "7", "num_branches"),
        ("regimes", "cell.num_branches", "7", "num_branches"),
        ("regimes", "cell.reduce", "sum", "reduces"),
        ("regimes", "cell.branch.init", "normal", "inits"),
        ("regimes", "cell.branch.init_scale", "3.0", "inits"),
        ("regimes", "cell.branch", "mlp(init_scale=3.0)", "inits"),
        ("regimes", "cell.training.lr_scaling", "none", "lr_scalings"),
        ("architecture", "cell.num_branches", "7", "num_branches"),
        ("architecture", "cell.test", "mnist", "split 'test'"),
        ("figure4_examples", "cell.num_branches", "7", "num_branches"),
        ("figure4_examples", "cell.data.num_examples", "7", "num_examples"),
        ("figure1_search", "cell.reduce", "sum", "settings"),
        ("figure1_search", "cell.data.seed", "7", "data_seeds"),
        ("hitting_search", "table.learning_rate", "0.5", "learning_rates"),
        ("hitting_search", "table.teachers", "7", "teachers"),
        ("hitting_search", "table.sgd.schedule", "cosine", "programs"),
    ],
)
def test_a_setting_that_the_experiment_sets_itself_is_not_overridden(
    config: str, leaf: str, text: str, by: str
) -> None:
    given = config_lib.load(ROOT / "configs" / f"{config}.py", "smoke")
    with pytest.raises(ConfigError, match=f"--config.*would not be used, .* sets it by .*{by}"):
        config_lib.override(given, {leaf: text})


def test_every_setting_that_an_experiment_sets_itself_is_there() -> None:
    for path in CONFIGS:
        given = config_lib.load(path, "smoke")
        replaced = getattr(EXPERIMENTS[given.experiment].spec, "REPLACED", {})
        same = {leaf: functools.reduce(lambda tree, key: tree[key], leaf.split("."), given) for leaf in replaced}
        leaves = {leaf: str(value) for leaf, value in same.items() if not isinstance(value, config_lib.ConfigDict)}
        assert config_lib.override(given, leaves) == given


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ("figure1_search", "held_out"),
        ("hitting_search", "held_out"),
        ("hitting_search", "teachers"),
        ("table1", "teachers"),
    ],
)
def test_a_config_lists_no_more_seeds_than_it_should(config: str, key: str) -> None:
    for count in (-3, 100_000_000):
        with pytest.raises(ConfigError, match=f"{key}={count} must lie between 0 and 10,000"):
            config_lib.load(ROOT / "configs" / f"{config}.py", f"{key}={count}")


# --- entries of one's own -----------------------------------------------------------------------------------------


def test_own_entries_need_no_edit_of_the_package(tmp_path: Path) -> None:
    def quadratic(*, out: int, scale: float = 1.0) -> Any:
        """Outputs quadratic in a linear map."""
        return from_functions(
            lambda key, x: {"w": np.ones((x.shape[1], out), np.float32)}, lambda p, x: scale * (x @ p["w"]) ** 2
        )

    def ring(*, n: int = 30, seed: int = 0) -> Dataset:
        """Points on a ring."""
        angle = np.random.default_rng(seed).uniform(0, 2 * np.pi, n)
        x = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
        y = np.where(angle > np.pi, 1, -1).astype(np.float32)
        return Dataset("ring", x, y, np.zeros(2, np.float32), np.ones(2, np.float32), 1, "binary", {})

    seen: list[str] = []

    def probe(spec: LandscapeSpec, workdir: Workdir, tables: Any) -> Report:
        """Builds and counts."""
        from dualgap_jax.experiments.landscape import build

        dataset = build(spec, tables).dataset
        seen.append(dataset.name)
        return Report("probe", ["n"], [[len(dataset.y)]])

    tables = TABLES.with_experiments(Experiment("probe", LandscapeSpec, probe))._replace(
        branches=BRANCHES.extended({"quadratic": quadratic}),
        datasets=DATASETS.extended({"ring": ring}),
    )
    spec = tiny(branch=Component("quadratic", {"scale": 2.0}), data=Component("ring", {"n": 12}))
    workdir = tmp_path / "w"
    config = experiment_config("probe", spec)
    with pytest.raises(UnknownNameError, match="unknown experiment 'probe'"):
        experiments.run(config, workdir=workdir)
    assert not workdir.exists()
    report, _, _ = experiments.run(config, workdir=workdir, tables=tables)
    again, _, was_complete = experiments.run(config, workdir=workdir, tables=tables)
    assert was_complete
    assert seen == ["ring"]
    assert report.rows == again.rows == [[12]]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_branches": 0}, ConfigError, "num_branches=0 must be a positive integer"),
        ({"num_branches": -3}, ConfigError, "num_branches=-3"),
        ({"num_branches": 3_000_000_000}, ConfigError, "num_branches=3e.09: expected a whole number below"),
        ({"seed": 2**32}, ConfigError, "seed=4.*below|seed=4294967296 must"),
        ({"plane": {"half_width": math.nan}}, ConfigError, "half_width=nan: expected a finite"),
        ({"num_branches": 2.0}, ConfigError, "config.num_branches=2.0: expected int"),
        ({"num_branches": True}, ConfigError, "expected int, got bool"),
        ({"reduce": "max"}, ConfigError, "'max'.*mean, sum"),
        ({"nosuch": 1}, ConfigError, "unknown key in config: 'nosuch'"),
        ({"branch": {"name": "mpl"}}, UnknownNameError, "unknown branch 'mpl'. Did you mean 'mlp'"),
        ({"branch": {"name": "mlp", "hiden": (3,)}}, UnknownNameError, "'hiden'. Did you mean 'hidden'"),
        ({"branch": {"name": "mlp", "hidden": (0,)}}, SettingError, "positive integer"),
        ({"data": {"name": "mnits"}}, UnknownNameError, "unknown data set 'mnits'. Did you mean 'mnist'"),
        ({"data": {"name": "synthetic_relu", "n": 0}}, SettingError, "n must be a positive integer"),
        ({"loss": {"name": "hinge"}}, UnknownNameError, "unknown loss 'hinge'"),
        ({"loss": {"name": "binary_hinge", "tau": 0.0}}, SettingError, "tau must be a positive"),
        ({"loss": {"name": "binary_hinge", "tau": -1.0}}, SettingError, "tau must be a positive"),
        ({"plane": {"axes": "author"}}, ConfigError, "'author'. Did you mean 'authors'"),
        ({"plane": {"points": 2}}, ConfigError, "between 3"),
        ({"training": {"schedule": {"name": "cosin"}}}, UnknownNameError, "Did you mean 'cosine'"),
        ({"training": {"learning_rate": 0.0}}, ConfigError, "learning_rate=0.0 must be positive"),
        ({"training": {"chain": ("clip(",)}}, ConfigError, "is not an optax transformation"),
    ],
)
def test_bad_configs_are_refused_before_anything_is_written(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    config = {"experiment": "landscape", **config_lib.as_dict(tiny()), **change}
    if change == {"data": {"name": "synthetic_relu", "n": 0}}:  # a value that only the data set's own code can refuse
        with pytest.raises(error, match=message):
            experiments.run(config, workdir=tmp_path / "w")
        return
    with pytest.raises(error, match=message):
        experiments.run(config, workdir=tmp_path / "w")
    assert not (tmp_path / "w").exists()


def flat(*, out: int) -> Any:
    """A branch of one's own that forgets the axis of outputs."""
    inner = BRANCHES.build("mlp", hidden=(2,), out=1)
    return from_functions(lambda key, x: inner.init(key, x)[0], lambda params, x: inner.apply(params, (), x)[0][:, 0])


FLAT = TABLES._replace(branches=BRANCHES.extended({"flat": flat}))
CONV, IMAGES = Component("conv", {}), Component("mnist", {"num_examples": 60})


@pytest.mark.parametrize(
    ("experiment", "spec", "message"),
    [
        ("landscape", tiny(branch=CONV), r"branch 'conv' does not take the examples of .*, \[batch, 4\]: "),
        ("landscape", tiny(branch=Component("flat", {})), r"outputs of shape \[batch\], but the binary labels"),
        ("landscape_row", RowSpec(cell=tiny(branch=CONV)), "branch 'conv' does not take the examples"),
        ("duality_gap", DualityGapSpec(branch=CONV, tau=1.0), "branch 'conv' does not take the examples"),
        (
            "duality_gap",
            DualityGapSpec(second=CONV, second_share=0.5, tau=1.0, trained=TrainedSpec(num_branches=())),
            "branch 'conv' does not take the examples",
        ),
        ("duality_gap", DualityGapSpec(branch=Component("flat", {}), tau=1.0), r"gives outputs of shape \[batch\]"),
        ("certify", CertifySpec(data=IMAGES), "data set 'mnist' has 10 classes, but every regime has one output"),
    ],
)
def test_parts_that_do_not_fit_one_another_are_refused_before_anything_is_written(
    experiment: str, spec: Any, message: str, tfds_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(spec, tmp_path / "w", experiment, tables=FLAT)
    assert not (tmp_path / "w").exists()


def test_a_network_that_cannot_fit_in_memory_is_refused_before_it_is_made(tmp_path: Path) -> None:
    for change in ({"num_branches": 2_000_000_000}, {"branch": Component("mlp", {"hidden": (1_000_000_000,)})}):
        with pytest.raises(ConfigError, match=r"one network of num_branches=.* takes .*B, available are .*B"):
            run(tiny(**change), tmp_path / "w")
    run(tiny(), tmp_path / "w", drawn=False)  # the corrected command


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plane": PlaneSpec(hessian=40)}, r"plane.hessian=40 exceeds the 39 parameters\."),
        ({"plane": PlaneSpec(hessian=14, hessian_branches=True)}, "exceeds the 13 parameters of a branch"),
        (
            {
                "num_branches": 1,
                "branch": Component("mlp", {"hidden": (), "use_bias": False}),
                "data": Component("synthetic_relu", {"n": 40, "d": 1, "seed": 3}),
            },
            "one parameter span no plane",
        ),
    ],
)
def test_what_too_few_parameters_do_not_allow_is_refused_before_training(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(tiny(**change), tmp_path / "w")
    assert not (tmp_path / "w" / "metrics.jsonl").exists()


def test_another_config_in_the_workdir_is_refused_with_the_difference(whole: Workdir) -> None:
    with pytest.raises(WorkdirError, match=r"num_branches: 3 there, 4 asked for"):
        run(tiny(num_branches=4), whole.path)


def test_identical_solutions_span_no_plane(tmp_path: Path) -> None:
    """Zero-step training from one constant initialisation gives three equal solutions."""
    constant = from_functions(lambda key, x: {"w": np.ones((x.shape[1], 1), np.float32)}, lambda p, x: x @ p["w"])

    def fixed(*, out: int) -> Any:
        """A linear map that starts at one point."""
        return constant

    tables = TABLES._replace(branches=BRANCHES.extended({"fixed": fixed}))
    spec = tiny(branch=Component("fixed", {}), training=TrainingSpec(batch_size=10, max_steps=0))
    with pytest.raises(ValueError, match="span no plane"):
        run(spec, tmp_path / "w", tables=tables)
    assert "DegeneratePlaneError" in load_json(tmp_path / "w" / "run.json")["reason"]
    assert len(load_json(tmp_path / "w" / "results" / "solutions.json")["solutions"]) == 3


def test_the_place_of_the_data_is_not_part_of_the_identity(tfds_dir: Path, tmp_path: Path) -> None:
    spec = tiny(
        data=Component("mnist", {"num_examples": 20, "data_dir": ""}), loss=Component("multi_margin", {}),
        training=TrainingSpec(batch_size=10, max_steps=0),
    )  # fmt: skip
    run(spec, tmp_path / "w", drawn=False)
    moved = shutil.copytree(tfds_dir, tmp_path / "elsewhere")
    spec = dataclasses.replace(spec, data=Component("mnist", {"num_examples": 20, "data_dir": str(moved)}))
    assert run(spec, tmp_path / "w")[2]


def test_a_run_does_not_go_on_with_other_images(
    tfds_dir: Path, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    write_tfds(other, "mnist", {split: random_split(rng, "mnist", 300) for split in ("train", "test")})
    spec = tiny(
        data=Component("mnist", {"num_examples": 20, "data_dir": ""}), loss=Component("multi_margin", {}),
        training=TrainingSpec(batch_size=10, max_steps=2, check_every=1),
    )  # fmt: skip

    def killed(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dualgap_jax.landscape.survey", killed)
        with pytest.raises(KeyboardInterrupt):
            run(spec, tmp_path / "w")
    moved = dataclasses.replace(spec, data=Component("mnist", {"num_examples": 20, "data_dir": str(other)}))
    with pytest.raises(WorkdirError, match=r"the data are not those that the run in .* was begun with"):
        run(moved, tmp_path / "w")
    run(spec, tmp_path / "w", drawn=False)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ("branches", "learning rate 0.3 times I"),
        ("inverse_branches", "learning rate 0.3 over I"),
        ("none", "learning rate 0.3"),
    ],
)
def test_the_rate_is_printed_as_it_holds_for_every_panel_of_a_row(scaling: Any, words: str) -> None:
    training = TrainingSpec(learning_rate=0.3, lr_scaling=scaling)
    said = {regime(tiny(num_branches=count, training=training)) for count in (1, 3, 1000)}
    assert said == {f"mean over branches, mlp, {words}"}


def test_a_report_reads_as_a_table() -> None:
    text = Report("Title", ["I", "value"], [[1000, 0.123456], [2, None]], ["Note."]).text()
    assert text.splitlines()[2:6] == ["    I   value", "-------------", "1,000  0.1235", "    2       -"]
    json.dumps(Report("t", ["a"], [[1]])._asdict())


def test_bounds_are_rounded_to_their_side_where_they_are_printed() -> None:
    columns, row = ["lower", "upper", "near"], [0.12345, 0.12341, 0.12341]
    made = Report("Title", columns, [row], bounds={"lower": "lower", "upper": "upper"})
    assert made.text().splitlines()[4].split() == ["0.1234", "0.1235", "0.1234"]
    assert "<td>0.1234</td><td>0.1235</td><td>0.1234</td>" in page.table(columns, [row], made.bounds)


# --- aligned ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", ["branches", "units", "activations"])
def test_the_aligned_surface_goes_through_the_same_functions(align: Any, tmp_path: Path) -> None:
    controls = align == "branches"
    cell = tiny(plane=PlaneSpec(points=5, edge_points=4, align=align, controls=controls))
    counts = (1, 3) if controls else (3,)
    report, workdir, _ = run(RowSpec(num_branches=counts, cell=cell), tmp_path / "w", "landscape_row", drawn=controls)
    names = ("aligned", "random", "crossed", "shrunk") if controls else ("aligned",)
    assert [row[0] for row in report.rows] == [said for i in counts for said in (i, *(f"{i} {n}" for n in names))]
    assert any("Aligned:" in note for note in report.notes)
    for count in counts:
        results = workdir.path / f"I_{count}" / "results"
        record, raw, aligned = (load(results / n) for load, n in RECORDS)
        np.testing.assert_allclose(raw["edge_loss"][:, [0, -1]], aligned["edge_loss"][:, [0, -1]], rtol=1e-4, atol=1e-6)
        distances = np.asarray(record["aligned"]["distances"])
        assert (distances[0] == 0).all()
        if align != "activations":
            assert (distances[1:, 1] <= distances[1:, 0] * (1 + 1e-6)).all()
        middle = aligned["loss"][2, 2]
        assert record["aligned"]["centre_loss"] == middle
        assert record["aligned"]["scores"]["barrier_max"] == pytest.approx(
            max(convexity.barrier(aligned["edge_t"], edge) for edge in aligned["edge_loss"])
        )
    cells = load_json(workdir.results / "row.json")
    assert cells["cells"][-1]["scores"]["barrier_max_aligned"] == record["aligned"]["scores"]["barrier_max"]
    if controls:
        assert {"row.png", "row_aligned.png", "scores.png"} <= {p.name for p in workdir.figures.iterdir()}
        assert (workdir.path / "I_3/figures/aligned.png").exists()


RECORDS = ((load_json, "landscape.json"), (load_npz, "landscape.npz"), (load_npz, "aligned.npz"))


def test_deep_branches_are_aligned_by_activations_and_controls_need_an_alignment(tmp_path: Path) -> None:
    plane = PlaneSpec(points=5, edge_points=4, align="activations")
    _, workdir, _ = run(tiny(branch=Component("mlp", {"hidden": (2, 2)}), plane=plane), tmp_path / "w", drawn=False)
    aligned = load_json(workdir.results / "landscape.json")["aligned"]
    assert (aligned["over"], aligned["by"]) == ("branches", "activations")
    with pytest.raises(ConfigError, match="set plane"):
        PlaneSpec(controls=True)


def test_units_of_deep_branches_are_not_aligned_across_branches(tmp_path: Path) -> None:
    spec = tiny(branch=Component("mlp", {"hidden": (2, 2)}), plane=PlaneSpec(points=5, edge_points=4, align="units"))
    with pytest.raises(ConfigError, match=r"plane\.align='units'.*align=branches"):
        run(spec, tmp_path / "w")


@pytest.mark.parametrize(("branch", "align"), [("mlp", "activations"), ("conv", "branches")])
def test_images_are_aligned_as_the_networks_get_them(
    branch: str, align: Any, tfds_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = [], planes.landscape.align
    data = DATASETS.build("mnist", num_examples=20)

    def watched(net: Any, networks: Any, x: Any, **options: Any) -> Any:
        seen.append(np.asarray(x))
        return real(net, networks, x, **options)

    monkeypatch.setattr(planes.landscape, "align", watched)
    settings = {"mlp": {"hidden": (2,)}, "conv": {"channels": (2,)}}[branch]
    spec = tiny(
        num_branches=2,
        branch=Component(branch, settings),
        data=Component("mnist", {"num_examples": 20}),
        loss=Component("multi_margin", {}),
        training=TrainingSpec(batch_size=10, max_steps=2, check_every=2, learning_rate=0.01),
        plane=PlaneSpec(points=3, edge_points=3, align=align),
    )
    run(spec, tmp_path / "w", drawn=False)
    np.testing.assert_allclose(seen[0], (data.x.astype(np.float64) - data.mean) / data.std, rtol=1e-4, atol=1e-5)


def test_a_landscape_with_spectrum_path_curve_and_files_for_paraview(tmp_path: Path) -> None:
    cell = tiny()
    plane = dataclasses.replace(
        cell.plane, hessian=2, hessian_branches=True, trajectory=3, curve=4, vtk=True, window="solutions"
    )
    training = dataclasses.replace(cell.training, max_steps=16, check_every=2, tolerance=0.0)
    spec = dataclasses.replace(cell, plane=plane, training=training)
    _, workdir, _ = run(spec, tmp_path / "w", "landscape")
    record = load_json(workdir.results / "landscape.json")
    assert record["solutions_outside"] == []
    assert len(record["hessian"]["network"]["largest"]) == 2
    spectrum = load_npz(workdir.results / "spectrum.npz")
    assert spectrum["branches_largest"].shape == (cell.num_branches, 2)
    # Nine looks and the start: kept are those at a stride that leaves between three and six, and the end.
    path = load_npz(workdir.results / "trajectory.npz")
    np.testing.assert_array_equal(path["steps"], [0, 4, 8, 12, 16])
    assert record["trajectory"]["snapshots"] == 5
    np.testing.assert_allclose(path["path_loss"][-1], record["solutions"][0]["loss"], rtol=1e-4, atol=1e-6)
    assert load_npz(workdir.results / "curve.npz")["losses"].shape == (2 * cell.plane.edge_points - 1,)
    for name in ("landscape.vts", "landscape_solutions.vtp", "trajectory.vts", "trajectory.vtp"):
        assert (workdir.results / name).read_text(encoding="utf-8").startswith("<?xml")
    for name in ("landscape", "spectrum", "trajectory", "curve"):
        assert (workdir.path / "figures" / f"{name}.png").is_file()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"hessian": -1}, "hessian=-1"),
        ({"trajectory": 2}, "at least 3 snapshots"),
        ({"curve": -5}, "curve=-5"),
    ],
)
def test_wrong_settings_of_a_plane_are_refused(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PlaneSpec(**setting)


def test_a_row_over_seeds_has_the_intervals_of_the_runs_at_these_seeds(tmp_path: Path) -> None:
    row = RowSpec(num_branches=(2,), seeds=3, scale="common", cell=tiny(seed=5))
    report, workdir, _ = run(row, tmp_path / "w", "landscape_row", drawn=False)
    cells = load_json(workdir.results / "row.json")["cells"]
    for cell in cells:
        folders = [workdir.path / f"I_{cell['num_branches']}{end}" for end in ("", "_seed_6", "_seed_7")]
        records = [load_json(folder / "results" / "landscape.json") for folder in folders]
        values = [r["scores"]["envelope_max"] for r in records]
        assert len(set(values)) == 3
        low, high = scipy.stats.t.interval(0.95, 2, np.mean(values), scipy.stats.sem(values))
        np.testing.assert_allclose(cell["intervals"]["envelope_max"], [np.mean(values), low, high])
        assert cell["scores"]["envelope_max"] == values[0]
    assert any("mean over 3 seeds" in note for note in report.notes)
    one = intervals([{"a": 1.0, "b": 2.0}])
    some = intervals([{"a": 1.0, "b": None, "c": True}, {"a": 3.0, "b": 2.0, "c": True}])
    assert (one, list(some)) == ({}, ["a"])


@pytest.mark.parametrize(("anchors", "fixed", "grown"), [((0.5, -0.9), [], 1.0), ((0.5, -1.4), [2], 1.54)])
def test_a_window_grows_to_hold_the_solutions_or_says_which_lie_outside(
    anchors: tuple[float, float], fixed: list[int], grown: float
) -> None:
    points = np.asarray([(0.0, 0.0), (0.3, 0.2), anchors])
    assert window(PlaneSpec(), points) == (1.0, fixed)
    half, outside = window(PlaneSpec(window="solutions"), points)
    assert (round(half, 9), outside) == (grown, [])


# --- architecture -----------------------------------------------------------------------------------------------------


def test_the_narrower_branch_is_the_nearest_in_parameters(tfds_dir: Path) -> None:
    dataset = DATASETS.build("mnist", num_examples=20)
    for name, width, value in (("mlp", "hidden", (12, 6)), ("conv", "channels", (8, 4))):
        cell = tiny(branch=Component(name, {width: value}))
        spec = ArchitectureSpec(width=width, cell=cell)

        def size(branch: Component) -> int:
            net = BRANCHES.build(branch.name, **{**branch.settings, "out": 10})
            params, _ = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
            return sum(leaf.size for leaf in jax.tree.leaves(params))

        whole = size(cell.branch)
        for count in (1, 2, 3):
            half = value[1] / value[0]
            others = [Component(name, {width: (w, max(1, round(half * w)))}) for w in range(1, value[0] + 1)]
            off = min(abs(count * size(other) - whole) for other in others)
            if off > whole / 4:
                with pytest.raises(ConfigError, match=f"^{count} branches"):
                    narrowed(spec, count, dataset, TABLES)
                continue
            branch, total = narrowed(spec, count, dataset, TABLES)
            assert (total, abs(total - whole)) == (count * size(branch), off)
        with pytest.raises(ConfigError, match=r"500 branches have .* take fewer branches"):
            narrowed(spec, 500, dataset, TABLES)


def test_architecture_measures_the_solutions_on_the_test_split(tfds_dir: Path, tmp_path: Path) -> None:
    config = config_lib.load(ROOT / "configs" / "architecture.py", "smoke,seeds=2,I=2")
    report, workdir, _ = experiments.run(config, workdir=tmp_path / "w")
    spec = spec_of(config)
    (cell,) = load_json(workdir.results / "architecture.json")["cells"]
    records = [load_json(workdir.path / f"I_2_seed_{s}" / "results" / "landscape.json") for s in (0, 1)]
    accuracies = [[s["test_accuracy"] for s in record["solutions"]] for record in records]
    assert cell["scores"]["test_accuracy"] == pytest.approx(np.mean(accuracies))
    assert cell["scores"]["barrier_max_aligned"] == pytest.approx(
        np.mean([record["aligned"]["scores"]["barrier_max"] for record in records])
    )
    low, high = scipy.stats.t.interval(0.95, 1, np.mean(accuracies), scipy.stats.sem(np.mean(accuracies, axis=1)))
    np.testing.assert_allclose(cell["intervals"]["test_accuracy"][1:], [low, high])
    made = dataclasses.replace(spec.cell, num_branches=2, branch=narrowed(spec, 2, DATASETS.build("mnist"), TABLES)[0])
    setting = landscape_experiments.build(made, TABLES)
    solutions = train(setting.net, setting.loss, setting.dataset, **made.training.arguments(2))
    test = DATASETS.build("mnist", **{**made.data.settings, "split": "test"})
    again = [evaluate(setting.net, setting.loss, test, s.network).accuracy for s in solutions]
    np.testing.assert_allclose(accuracies[0], again)
    assert "±" in report.rows[0][3]


def saved(path: Path, x: np.ndarray, y: np.ndarray) -> Component:
    """A data set of one's own in a file."""
    np.savez(path, x=x, y=y)
    return Component("own", {"path": str(path)})


@pytest.mark.parametrize("signs", [False, True])
def test_a_test_set_of_ones_own_is_seen_as_the_training_set_was(
    signs: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((120, 2)) * 3 + 5
    y = np.where(x[:, 0] > 5, 1, -1 if signs else 0)
    part = np.flatnonzero(y[60:] == 1) + 60  # of one class: its own mean is far from that of the training set
    train_file = saved(tmp_path / "train.npz", x[:60], y[:60])
    spec = tiny(data=train_file, test=saved(tmp_path / "test.npz", x[part], y[part]))
    spec = dataclasses.replace(
        spec,
        loss=Component("logistic", {}),
        branch=Component("mlp", {"hidden": ()}),
        training=TrainingSpec(batch_size=20, learning_rate=1.0, max_steps=100, check_every=50),
    )
    _, workdir, _ = run(spec, tmp_path / "w", drawn=False)
    found = load_json(workdir.results / "solutions.json")["solutions"]
    setting = landscape_experiments.build(spec, TABLES)
    mean, std = x[:60].mean(axis=0), x[:60].std(axis=0)
    for row, solution in zip(
        found, train(setting.net, setting.loss, setting.dataset, **spec.training.arguments(3)), strict=True
    ):
        seen = jnp.asarray((x[part] - mean) / std, jnp.float32)
        outputs = np.asarray(setting.net.apply(solution.params, solution.state, seen)[0])
        expected = outputs[:, 0] > 0 if signs else outputs.argmax(axis=1) == 1
        assert row["test_accuracy"] == pytest.approx(expected.mean())
        assert row["test_accuracy"] > 0.9


@pytest.mark.parametrize("row", [False, True])
@pytest.mark.parametrize(
    ("test", "message"),
    [
        (Component("own", {}), "data set 'own': path is missing"),
        ("nowhere.npz", "test: .*there is no such file here"),
        (([[0.0, 1.0]], [2]), r"test: .*has a label 2, the training set 'train' the classes 0\.\.1"),
        (([[0.0, 1.0, 2.0]], [1]), r"test: .*has examples of shape \(3,\), the training set 'train' \(2,\)"),
        (([[0.0, 1.0]], [0.5]), "test: .*class labels must be integers"),
    ],
)
def test_a_test_set_that_does_not_fit_is_refused_before_training(
    test: Any, message: str, row: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    x, y = rng.standard_normal((40, 2)), np.arange(40) % 2
    good = saved(tmp_path / "good.npz", x[:3], y[:3])
    if isinstance(test, str):
        test = Component("own", {"path": str(tmp_path / test)})
    elif isinstance(test, tuple):
        test = saved(tmp_path / "test.npz", np.asarray(test[0]), np.asarray(test[1]))
    cell = tiny(data=saved(tmp_path / "train.npz", x, y), loss=Component("logistic", {}))

    def begin(test: Component) -> None:
        spec = dataclasses.replace(cell, test=test)
        whole, experiment = (RowSpec(num_branches=(3,), cell=spec), "landscape_row") if row else (spec, "landscape")
        run(whole, tmp_path / "w", experiment, drawn=False)

    with pytest.raises((ConfigError, SettingError), match=message):
        begin(test)
    assert not any((tmp_path / "w").rglob("solution_*"))
    with pytest.MonkeyPatch.context() as patch:

        def trained(*_: Any, **__: Any) -> Any:
            raise InterruptedError

        patch.setattr(landscape_experiments, "train", trained)
        with pytest.raises(InterruptedError):  # the corrected command comes as far as its training
            begin(good)


def test_an_architecture_is_not_trained_on_its_test_split() -> None:
    cell = tiny(data=Component("mnist", {"num_examples": 20, "split": "test"}), loss=Component("multi_margin", {}))
    with pytest.raises(ConfigError, match=r"cell\.data\.split='test'"):
        ArchitectureSpec(cell=cell).validate(TABLES)


def test_an_architecture_needs_widths_and_a_test_split() -> None:
    with pytest.raises(ConfigError, match="must name a setting of the branch"):
        ArchitectureSpec(width="depth")
    with pytest.raises(UnknownNameError, match="split"):
        ArchitectureSpec(cell=tiny()).validate(TABLES)
