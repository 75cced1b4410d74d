"""Certificates of finished runs: the numbers against the run's own definitions, the command in a process, refusals."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jax
import numpy as np
import pytest
from certify_oracles import convex_program

from dualgap_jax import checkpoints, cli, experiments, report
from dualgap_jax.config import Component, experiment_config
from dualgap_jax.duality.checker.value_functions import Verified
from dualgap_jax.experiments import TABLES
from dualgap_jax.experiments import certify_run as module
from dualgap_jax.experiments.certify_run import CertifyRunError, certify_run
from dualgap_jax.experiments.landscape import LandscapeSpec, build
from dualgap_jax.experiments.landscape import PlaneSpec as Plane
from dualgap_jax.experiments.row import RowSpec
from dualgap_jax.files import load_json, save_json
from dualgap_jax.identity import IdentityError
from dualgap_jax.training import TrainingSpec
from dualgap_jax.workdir import Workdir

ROOT = Path(__file__).parents[1]
SPEC = LandscapeSpec(
    num_branches=4,
    branch=Component("mlp", {"hidden": (2,), "use_bias": False}),
    data=Component("synthetic_relu", {"n": 24, "d": 2}),
    training=TrainingSpec(batch_size=0, max_steps=60, learning_rate=0.3, weight_decay=0.02, check_every=30),
    plane=Plane(points=3, edge_points=3),
)


def finished(spec: Any, folder: Path, name: str = "landscape") -> Path:
    experiments.run(experiment_config(name, spec), workdir=folder)
    return folder


def network(spec: LandscapeSpec, folder: Path, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """Data, labels, outputs and leaves of a solution, read and run without the code under test."""
    setting = build(spec, TABLES)
    data = setting.dataset
    state = checkpoints.load(folder / "checkpoints" / f"solution_{k}").state
    params = state["carry"]["params"]
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
    first, last = sorted(leaves, key=lambda leaf: -leaf.shape[-1] * (leaf.shape[-2] == 2))
    x = (np.asarray(data.x, np.float64) - data.mean) / data.std
    outputs = np.einsum("koh,khn->on", last, np.maximum(first @ x.T, 0)) / len(first)
    return x, np.asarray(data.y, np.float64), outputs[0], leaves


def test_with_weight_decay_the_risk_is_what_sgd_descends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished(SPEC, tmp_path / "w")
    said: list[str] = []
    report = certify_run(folder, TABLES, said.append)
    assert len(said) == len(report.rows) == 3
    record = load_json(folder / "results" / "certificate.json")["solutions"]
    for k, value in enumerate(record):
        x, y, outputs, leaves = network(SPEC, folder, k)
        squares = sum(float((leaf**2).sum()) for leaf in leaves)
        loss = np.maximum(0, 1 - y * outputs).mean()
        assert value["risk"] == pytest.approx(loss + 0.01 * squares, rel=1e-6)
        assert value["penalty"] == pytest.approx(0.04)
        best = convex_program(x, y, "binary_hinge", penalty=0.04)
        assert value["lower"] <= best + 1e-6
        assert best <= value["risk"] + 1e-6
        assert value["lower"] > 0.2 * best  # the best of several dual vectors proves something
        assert value["lower"] <= value["lower_estimated"] <= value["risk"]
        assert value["verified"]
        assert (value["status"], value["method"]) == ("certified", "cells")
        risk, lower = map(float, re.findall(r"(?:risk|optimum >=) (\S+?)[; ]", said[k])[:2])
        assert value["risk"] <= risk <= value["risk"] * 1.001
        assert value["lower"] * 0.999 <= lower <= value["lower"]
        assert "(certified, cells)" in said[k]
        assert "(estimated)" in said[k]

    # A bound that the checker does not follow is none, in the record, in the sentence and in the table.
    monkeypatch.setattr("dualgap_jax.experiments.certify.verify_bound", lambda *_: Verified(False, "it is off", 0))
    setting = build(SPEC, TABLES)
    workdir = Workdir.open(folder, load_json(folder / "config.json"))
    handle = module._networks(SPEC, setting, workdir)[0]
    value = module._solution(SPEC, setting, setting.dataset, handle)
    assert (value["status"], value["proven"], value["verified"]) == ("estimated", False, False)
    assert "certified" not in value["said"]
    assert "NOT proven again: it is off" in value["said"]
    doubted = module._report(SPEC, "", [value])
    assert dict(zip(doubted.columns, doubted.rows[0], strict=True))["optimum, at least (certified)"] is None
    assert "it is off" in doubted.notes


def test_without_it_against_networks_of_no_larger_weights_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(SPEC, training=dataclasses.replace(SPEC.training, weight_decay=0.0, max_steps=200))
    row = finished(RowSpec(num_branches=(4,), cell=spec), tmp_path / "w", "landscape_row")
    done = subprocess.run(
        [sys.executable, "-m", "dualgap_jax", "certify", str(row)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    folder = row / "I_4"
    record = load_json(folder / "results" / "certificate.json")
    for k, value in enumerate(record["solutions"]):
        x, y, outputs, leaves = network(spec, folder, k)
        squares = sum(float((leaf**2).sum()) for leaf in leaves) / 4
        assert value["risk"] == pytest.approx(np.maximum(0, 1 - y * outputs).mean(), abs=1e-6)
        assert squares <= value["budget"] <= squares * 1.0001
        best = convex_program(x, y, "binary_hinge", budget=value["budget"])
        assert value["lower"] <= best + 1e-6
        # Networks of smaller weights than the least budget are worse than this one.
        assert 0 < value["least_budget"] <= squares
        assert convex_program(x, y, "binary_hinge", budget=value["least_budget"]) >= value["risk"] - 1e-6
        assert f"I_4: solution {k}: {value['said']}" in done.stdout
    assert "Distance from the global optimum" in (row / "report.html").read_text()
    setting = build(spec, TABLES)
    workdir = Workdir.open(folder, load_json(folder / "config.json"))
    with monkeypatch.context() as patched:
        patched.setattr(
            sys.modules["dualgap_jax.certify.assess"], "verify_bound", lambda *_: Verified(False, "it is off", 0)
        )
        handle = module._networks(spec, setting, workdir)[0]
        assert module._solution(spec, setting, setting.dataset, handle)["least_budget"] is None

    def never(*arguments: Any, **settings: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr("dualgap_jax.experiments.certify_run._solution", never)
    said: list[str] = []
    again = certify_run(row, TABLES, said.append)
    assert [f"I_4: solution {k}: {value['said']}" for k, value in enumerate(record["solutions"])] == said
    assert len(again.rows) == 3
    assert experiments.run(experiment_config("landscape", spec), workdir=folder)[2]  # complete as before


def test_certificates_are_of_the_ends_of_this_run_s_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies where checkpoints and certificates of a complete run lay."""
    seen: list[list[np.ndarray]] = []

    def solution(spec: Any, setting: Any, data: Any, network: Any) -> dict[str, Any]:
        seen.append([np.asarray(leaf) for leaf in jax.tree.leaves(network.read(0, network.num_branches))])
        return {"proven": False, "said": "seen"}

    monkeypatch.setattr(module, "_solution", solution)
    training = dataclasses.replace(SPEC.training, max_steps=4, check_every=2, checkpoint_seconds=0.0)
    spec = dataclasses.replace(SPEC, training=training)
    folder = finished(spec, tmp_path / "w")
    other = finished(dataclasses.replace(spec, seed=5), tmp_path / "other")
    certify_run(folder, TABLES)
    ends, kept = list(seen), folder / "checkpoints"
    assert len(ends) == 3
    certify_run(folder, TABLES)
    assert len(seen) == 3  # all are known

    # A damaged end is reached again from the checkpoint before it.
    shutil.rmtree(folder / "parts")
    newest = max(kept.glob("solution_1/[0-9]*"), key=lambda step: int(step.name))
    (newest / "manifest.json").unlink()
    certify_run(folder, TABLES)
    for before, after in zip(ends, seen[3:], strict=True):
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)

    # Another network under the same name has no certificate yet.
    known = len(seen)
    with monkeypatch.context() as patched:
        moved = module._networks
        patched.setattr(module, "_networks", lambda *given: moved(*given)[::-1])
        certify_run(folder, TABLES)
    assert len(seen) == known + 2  # the middle one is in its place

    for place in (kept / "solution_0", other / "checkpoints" / "solution_1"):
        shutil.rmtree(kept / "solution_1")
        shutil.copytree(place, kept / "solution_1")
        with pytest.raises(IdentityError, match=r"the (solution|seed) "):
            certify_run(folder, TABLES)
    shutil.rmtree(kept / "solution_1")
    with pytest.raises(CertifyRunError, match="no checkpoints of solution 1"):
        certify_run(folder, TABLES)


def test_a_certificate_of_other_solutions_is_neither_shown_nor_vouched_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved: list[int] = []

    def solution(*_: Any) -> dict[str, Any]:
        solved.append(1)
        return {"proven": False, "said": "seen"}

    monkeypatch.setattr(module, "_solution", solution)
    source, folder = tmp_path / "own.npz", tmp_path / "w"
    x = np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32)
    training = dataclasses.replace(SPEC.training, max_steps=4, check_every=2)
    spec = dataclasses.replace(SPEC, data=Component("own", {"path": str(source)}), training=training)
    name = "results/certificate.json"

    def page() -> str:
        return report.write([folder], tmp_path / "report.html").read_text(encoding="utf-8")

    def anew() -> None:
        shutil.rmtree(folder / "checkpoints")
        (folder / "run.json").unlink()
        finished(spec, folder)

    np.savez(source, x=x, y=np.sign(x[:, 0]))
    finished(spec, folder)
    certify_run(folder, TABLES)
    assert name in load_json(folder / "run.json")["files"]
    anew()  # of the same data: the same solutions
    assert name in load_json(folder / "run.json")["files"]
    assert "<h2>Distance from the global optimum</h2>" in page()
    (folder / "figures" / "landscape.png").rename(folder / "figures" / "old.png")
    (folder / "results" / "old.json").write_text("{}")
    np.savez(source, x=x, y=np.sign(x[:, 1]))
    anew()
    assert not {name, "figures/old.png", "results/old.json"} & {*load_json(folder / "run.json")["files"]}
    assert "certificate.json is not of these solutions" in page()
    assert "<h2>Distance from the global optimum</h2>" not in page()
    assert "<figcaption>old</figcaption>" not in page()
    certify_run(folder, TABLES)
    assert len(solved) == 6
    assert "<h2>Distance from the global optimum</h2>" in page()
    assert name in load_json(folder / "run.json")["files"]


def test_what_no_engine_covers_is_said(tmp_path: Path) -> None:
    deep = dataclasses.replace(SPEC, branch=Component("mlp", {"hidden": (2, 2)}))
    folder = finished(deep, tmp_path / "w")
    said: list[str] = []
    report = certify_run(folder, TABLES, said.append)
    assert all("nothing can be proven: give a radius: the branch is not known to be homogeneous" in s for s in said)
    assert [row[3] for row in report.rows] == [None] * 3


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CertifyRunError, match="holds no run"):
        certify_run(tmp_path, TABLES)
    save_json(tmp_path / "config.json", {"experiment": "shapley_folkman"})
    with pytest.raises(CertifyRunError, match="'shapley_folkman', which keeps no trained networks"):
        certify_run(tmp_path, TABLES)
    with pytest.raises(SystemExit) as ended:
        cli.main(["run.py", f"--certify={tmp_path}"])
    assert ended.value.code == 2
    assert "keeps no trained networks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["run.py", f"--certify={tmp_path}", f"--config={ROOT / 'configs' / 'figure1.py'}"])
    assert "without --config" in capsys.readouterr().err


def test_the_sentence_claims_no_more_than_is_proven(rng: np.random.Generator) -> None:
    """The digits, read again, are on the safe side of the numbers, whatever these are."""
    for _ in range(50):
        lower, upper = np.sort(10 ** rng.uniform(-3, 3, 2))
        zero, least = upper * (1 + rng.random()), float(rng.random())
        made = SimpleNamespace(
            upper=upper, lower=lower, gap=upper - lower, lower_estimated=None, search_missed=False, method="cells"
        )
        said = inspect.unwrap(module._sentence)(cast(Any, made), "certified", zero, least, 1.0)
        pattern = r"(?:risk|optimum >=|within|optimum,|>=) (-?[0-9.e+-]+)"
        risk, bound, share, of_zero, needs = map(float, re.findall(pattern, said))
        assert bound <= lower <= upper <= risk
        assert share >= 100 * made.gap / upper
        assert of_zero >= 100 * made.gap / zero
        assert needs <= least
