"""Whatever is damaged in a workdir: the same command prints the same numbers, or says in one sentence why not."""

from __future__ import annotations

import dataclasses
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tfds_files import random_split, write_tfds

from dualgap_jax import experiments
from dualgap_jax.checkpoints import Checkpointer
from dualgap_jax.config import Component, experiment_config
from dualgap_jax.experiments import Report
from dualgap_jax.experiments.around import Around
from dualgap_jax.experiments.hitting_rate import HittingRateSpec
from dualgap_jax.experiments.landscape import LandscapeSpec, PlaneSpec, build
from dualgap_jax.experiments.linear_dual import DescentSpec, LinearDualSpec
from dualgap_jax.experiments.row import RowSpec
from dualgap_jax.experiments.shapley_folkman import ShapleyFolkmanSpec
from dualgap_jax.files import load_json, load_npz
from dualgap_jax.hitting import SgdSpec
from dualgap_jax.metrics import Metrics
from dualgap_jax.networks import InMemory
from dualgap_jax.training import TrainingSpec
from dualgap_jax.workdir import Workdir, WorkdirError

CELL = LandscapeSpec(
    branch=Component("mlp", {"hidden": (2,)}),
    data=Component("synthetic_relu", {"n": 40, "d": 4, "seed": 3}),
    training=TrainingSpec(batch_size=10, max_steps=20, check_every=10),
    plane=PlaneSpec(points=5, edge_points=4),
)
CONFIGS = {
    "shapley_folkman": experiment_config("shapley_folkman", ShapleyFolkmanSpec(panels=(1, 2), copies=(1, 2, 3))),
    "landscape_row": experiment_config("landscape_row", RowSpec(num_branches=(2, 3), cell=CELL)),
    "linear_dual": experiment_config(
        "linear_dual",
        LinearDualSpec(
            data=Component("random", {"d_0": 5, "d_H": 3, "n": 20}),
            width=2,
            sgd=DescentSpec(depths=(2,), seeds=2, steps=20, record_every=10, batch_size=8),
        ),
    ),
    "hitting_rate": experiment_config(
        "hitting_rate",
        HittingRateSpec(
            widths=(12, 13),
            seeds=2,
            data=Component("synthetic_relu", {"n": 30}),
            sgd=SgdSpec(steps=40, check_every=20, lanes=16),
        ),
    ),
}


def run(config: ConfigDict, path: Path) -> tuple[Report, Workdir, bool]:
    return experiments.run(config, workdir=path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """The workdir of a complete run of a config, and the report that it printed."""
    made: dict[str, tuple[Path, str]] = {}

    def one(name: str) -> tuple[Path, str]:
        if name not in made:
            path = tmp_path_factory.mktemp(name) / "w"
            made[name] = path, run(CONFIGS[name], path)[0].text()
        return made[name]

    return one


def digit(content: bytes, rng: np.random.Generator) -> bytes:
    """Another digit in place of one."""
    places = [m.start() for m in re.finditer(rb"[0-9]", content)]
    at = int(rng.choice(places)) if places else 0
    return content[:at] + (b"7" if content[at : at + 1] != b"7" else b"3") + content[at + 1 :]


DAMAGES: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "a digit": digit,
    "cut": lambda content, rng: content[: len(content) // 2],
    "emptied": lambda content, rng: b"",
    "null": lambda content, rng: b"null",
}


def damaged_files(path: Path) -> Iterator[Path]:
    """Every file that a run may read back, but for checkpoints, which have tests of their own."""
    for file in sorted(path.rglob("*")):
        if file.is_file() and "checkpoints" not in file.relative_to(path).parts and file.suffix != ".pdf":
            yield file


@pytest.mark.parametrize(
    ("name", "damage"), [("shapley_folkman", d) for d in DAMAGES] + [(name, "any") for name in list(CONFIGS)[1:]]
)
def test_damaged_files_of_a_complete_run_change_no_number(
    name: str, damage: str, finished: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    """All files at once but the config, which says whose folder it is; then each figure is there again.

    Files are read alike in all experiments: every damage is done to all files of one, and any to each of the others.
    """
    whole, want = finished(name)
    path = tmp_path / "w"
    shutil.copytree(whole, path)
    for file in damaged_files(path):
        if file.name != "config.json":
            done = str(rng.choice(list(DAMAGES))) if damage == "any" else damage
            file.write_bytes(DAMAGES[done](file.read_bytes(), rng))
    report, workdir, was_complete = run(CONFIGS[name], path)
    assert report.text() == want
    assert not was_complete
    assert workdir.damaged() == []
    assert run(CONFIGS[name], path)[2]
    for file in sorted((whole / "results").glob("*.npz")):
        for key, value in load_npz(file).items():
            np.testing.assert_array_equal(load_npz(path / "results" / file.name)[key], value)


@pytest.mark.parametrize("name", ["shapley_folkman", "landscape_row"])
def test_one_damaged_file_of_a_complete_run_changes_no_number(
    name: str, finished: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    whole, want = finished(name)
    files = [file for file in damaged_files(whole) if "I_3" not in file.parts]  # a cell like I_2
    for number, file in enumerate(files):
        path = tmp_path / str(number)
        shutil.copytree(whole, path)
        target = path / file.relative_to(whole)
        if number % 3:
            target.write_bytes(digit(target.read_bytes(), rng))
        else:
            target.unlink()
        report, workdir, was_complete = run(CONFIGS[name], path)
        assert report.text() == want, target
        said_only = target.parent.name == "parts" or target.name in (
            "metrics.jsonl",
            "metrics.seal",
            "config.json",
            ".lock",
        )
        redrawn = target.parent == path / "figures"
        inside = target.relative_to(path).parts[0].startswith("I_") and target.parent.name not in ("results", "figures")
        assert was_complete == (said_only or redrawn or inside), target
        assert workdir.damaged() == []
        assert target.exists() or said_only or inside


@pytest.mark.parametrize("name", ["shapley_folkman", "linear_dual"])
def test_damaged_parts_of_an_interrupted_run_are_computed_again(
    name: str, finished: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    whole, want = finished(name)
    parts = sorted((whole / "parts").glob("*.npz"))
    assert parts
    for number, part in enumerate(parts):
        path = tmp_path / str(number)
        path.mkdir()
        shutil.copy(whole / "config.json", path)
        shutil.copytree(whole / "parts", path / "parts")
        if number % 2:
            # Another number, in an archive that is sound by itself.
            arrays = dict(np.load(path / "parts" / part.name))
            changed = {k: v.copy() for k, v in arrays.items()}
            for value in changed.values():
                if value.dtype.kind == "f":
                    value[...] = 1.5
            changed["json"] = np.frombuffer(bytes(arrays["json"]).replace(b"0.", b"1.", 1), np.uint8)
            np.savez(path / "parts" / part.name, **changed)
        else:
            (path / "parts" / part.name).write_bytes(part.read_bytes()[:-40])
        assert run(CONFIGS[name], path)[0].text() == want


def test_snapshots_that_are_damaged_gone_or_of_another_step_are_taken_again(
    tmp_path: Path, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    training = dataclasses.replace(CELL.training, check_every=4)
    spec = dataclasses.replace(CELL, training=training, plane=dataclasses.replace(CELL.plane, trajectory=3))
    setting = build(spec, experiments.TABLES)
    network = InMemory(*setting.net.init(jax.random.key(0), jax.numpy.asarray(setting.dataset.x[:1])))
    workdir = Workdir.open(tmp_path / "w", {"experiment": "toy"})
    with workdir.session():
        around = Around(spec, workdir, setting.net, setting.loss, setting.dataset, setting.dataset)
        around.check_snapshots()  # nothing is there yet
        for steps in range(0, 25, 4):
            around.snapshot(0, steps, network)
        names = [f"snapshot {steps:09d}.npz" for steps in (0, 8, 16, 24)]  # at a stride that leaves three to six
        parts = workdir.path / "parts"
        assert sorted(p.name for p in parts.iterdir()) == names
        ends = workdir.checkpoints / "solution_0"
        with Checkpointer(ends) as saver:
            saver.save(24, {"weights": np.zeros(2)}, {})
        around.check_snapshots()
        assert ends.exists()
        (parts / names[0]).write_bytes(digit((parts / names[0]).read_bytes(), rng))
        (parts / names[1]).unlink()
        shutil.copy(parts / names[3], parts / names[2])
        around.check_snapshots()
        assert not ends.exists()  # so that it is trained from its start
        assert "snapshots of steps 0, 8, 16 are damaged or gone: solution 0 is trained again" in caplog.text


def test_a_config_that_is_damaged_beyond_what_the_card_knows_is_refused(finished: Any, tmp_path: Path) -> None:
    whole, _ = finished("shapley_folkman")
    path = tmp_path / "w"
    shutil.copytree(whole, path)
    (path / "config.json").write_text("{")
    (path / "run.json").write_text("{")
    with pytest.raises(WorkdirError, match=r"config\.json .*delete it"):
        run(CONFIGS["shapley_folkman"], path)


def test_a_cell_in_place_of_another_is_not_taken_for_it(finished: Any, tmp_path: Path) -> None:
    whole, want = finished("landscape_row")
    path = tmp_path / "w"
    shutil.copytree(whole, path)
    shutil.copy(path / "I_2" / "results" / "landscape.json", path / "I_3" / "results" / "landscape.json")
    assert run(CONFIGS["landscape_row"], path)[0].text() == want


@pytest.mark.parametrize("name", ["shapley_folkman", "landscape_row"])
def test_a_complete_run_is_read_where_nothing_can_be_written(name: str, finished: Any, tmp_path: Path) -> None:
    whole, want = finished(name)
    path = tmp_path / "w"
    shutil.copytree(whole, path)
    folders = [path, *(p for p in path.rglob("*") if p.is_dir())]
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        report, _, was_complete = run(CONFIGS[name], path)
        assert (report.text(), was_complete) == (want, True)
        assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_figures_that_cannot_be_drawn_again_are_said(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, want = finished("shapley_folkman")
    path = tmp_path / "w"
    shutil.copytree(whole, path)
    for file in (path / "figures").iterdir():
        file.unlink()
    experiment = experiments.EXPERIMENTS["shapley_folkman"]

    def full(workdir: Any) -> list[Path]:
        raise OSError(28, "No space left on device")

    tables = experiments.TABLES._replace(
        experiments=type(experiments.EXPERIMENTS)(
            "experiment", {experiment.name: dataclasses.replace(experiment, draw=full)}
        )
    )
    report, _, was_complete = experiments.run(CONFIGS["shapley_folkman"], workdir=path, tables=tables)
    assert (report.text(), was_complete) == (want, True)
    assert "could not be drawn again" in caplog.text


def test_an_interrupted_run_is_refused_another_set_of_the_same_name(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in ("one", "two"):
        write_tfds(tmp_path / folder, "mnist", {s: random_split(rng, "mnist", 60) for s in ("train", "test")})
    shutil.copytree(tmp_path / "one", tmp_path / "moved")

    def config(folder: str) -> ConfigDict:
        data = Component("mnist", {"num_examples": 30, "data_dir": str(tmp_path / folder)})
        return experiment_config("landscape", dataclasses.replace(CELL, data=data, loss=Component("multi_margin", {})))

    write = Metrics.write

    def interrupting(self: Metrics, step: int, **values: Any) -> None:
        if step == 20:
            raise KeyboardInterrupt
        write(self, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(config("one"), tmp_path / "w")
    with pytest.raises(WorkdirError, match=r"the data are not those that the run in .* was begun with"):
        run(config("two"), tmp_path / "w")
    report, workdir, _ = run(config("moved"), tmp_path / "w")
    assert report.text() == run(config("one"), tmp_path / "straight")[0].text()
    assert load_json(workdir.path / "run.json")["inputs"]["data"]["digest"].startswith("sha256:")
