"""The experiment on Theorem 2: its data, SGD's objective and gradients, the record, the checkpoint and the figure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tfds_files import random_split, write_tfds

from dualgap_jax import config as config_lib
from dualgap_jax import experiments, figures, spectral
from dualgap_jax.config import Component, ConfigError, experiment_config
from dualgap_jax.data import Dataset
from dualgap_jax.experiments import TABLES, linear_dual
from dualgap_jax.experiments.linear_dual import DescentSpec, LinearDualSpec
from dualgap_jax.files import load_json, load_npz, save_json, save_npz
from dualgap_jax.registry import UnknownNameError
from dualgap_jax.spectral import descent
from dualgap_jax.workdir import Workdir

ROOT = Path(__file__).resolve().parents[1]
SGD = DescentSpec(depths=(2, 3), seeds=2, steps=60, record_every=20, batch_size=16)
SPEC = LinearDualSpec(
    data=Component("random", {"d_0": 6, "d_H": 4, "n": 40, "condition": 2.0}), width=3, gamma=0.1, sgd=SGD
)


def run(spec: LinearDualSpec, path: Path) -> Workdir:
    return experiments.run(experiment_config("linear_dual", spec), workdir=path)[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    return run(SPEC, tmp_path_factory.mktemp("theorem2") / "run")


def random_problem(rng: np.random.Generator, depth: int) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    sizes = [int(d) for d in rng.integers(2, 7, depth + 1)]
    weights = [rng.standard_normal((out, into)) for into, out in itertools.pairwise(sizes)]
    return weights, rng.standard_normal((sizes[0], 30)), rng.standard_normal((sizes[-1], 30))


# --- the objective and its gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_the_objective_from_moments_is_problem_4(depth: int, x64: None, rng: np.random.Generator) -> None:
    for gamma in (0.0, 0.7):
        weights, x, y = random_problem(rng, depth)
        expected = float(spectral.objective([jnp.asarray(w) for w in weights], jnp.asarray(x), jnp.asarray(y), gamma))
        found = descent.objective_from_moments(weights, descent.moments(x, y, block=7), gamma)
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_penalty_gradients_are_those_of_the_schatten_norms(depth: int, x64: None, rng: np.random.Generator) -> None:
    weights, x, _ = random_problem(rng, depth)
    given = tuple(jnp.asarray(w) for w in weights)

    def penalty(weights: Any) -> Any:
        first = spectral.schatten_power(weights[0] @ jnp.asarray(x), depth)
        return (first + sum(spectral.schatten_power(w, depth) for w in weights[1:])) / depth

    found = descent._penalty_gradients(given, jnp.asarray(x @ x.T))
    for one, other in zip(found, jax.grad(penalty)(given), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


# --- data -------------------------------------------------------------------------------------------------------------


def test_images_become_standardised_columns_and_centred_labels(rng: np.random.Generator) -> None:
    images = rng.integers(0, 256, (50, 3, 2, 1), dtype=np.uint8)
    labels = rng.integers(0, 4, 50).astype(np.int32)
    mean, std = images.mean(axis=0).astype(np.float32), np.maximum(images.std(axis=0), 1).astype(np.float32)

    def source() -> Dataset:
        return Dataset("mine", images, labels, mean, std, 4, "multiclass", {})

    tables = TABLES._replace(datasets=TABLES.datasets.extended({"mine": source}))
    x, y, _ = linear_dual.matrices(dataclasses.replace(SPEC, data=Component("mine", {})), tables)
    assert x.shape == (6, 50)
    assert y.shape == (4, 50)
    for i in range(50):
        np.testing.assert_allclose(x[:, i], ((images[i] - mean) / std).ravel(), rtol=1e-5, atol=1e-6)
        assert y[:, i].argmax() == labels[i]
    np.testing.assert_allclose(y.sum(axis=1), 0, atol=1e-4)
    np.testing.assert_allclose(y.sum(axis=0), 0, atol=1e-5)


def test_targets_of_a_regression_are_one_row() -> None:
    spec = dataclasses.replace(SPEC, data=Component("synthetic_relu", {"n": 20, "d": 5, "labels": "real"}))
    x, y, _ = linear_dual.matrices(spec, TABLES)
    assert (x.shape, y.shape) == ((5, 20), (1, 20))


def test_random_data_have_the_condition_that_was_asked_for() -> None:
    x, y, _ = linear_dual.random_matrices(d_0=12, d_H=3, n=20_000, condition=100.0, noise=0.0, seed=4)
    sigma = np.linalg.svd(x, compute_uv=False)
    assert 80 < sigma[0] / sigma[-1] < 125
    assert np.linalg.norm(y - y @ np.linalg.pinv(x) @ x) < 1e-8 * np.linalg.norm(y)


# --- the run ----------------------------------------------------------------------------------------------------------


def test_the_record_holds_what_it_promises(finished: Workdir) -> None:
    record = load_json(finished.results / "spectral.json")
    promised = {"primal", "dual", "relative_gap", "rank", "gamma", "sigma_min", "theorem_applies", "precision"}
    assert promised <= record.keys()
    x, y, _ = linear_dual.matrices(SPEC, TABLES)
    sigma = np.linalg.svd(y @ np.linalg.pinv(x) @ x, compute_uv=False)
    kept = np.maximum(sigma - SPEC.gamma, 0) * (np.arange(4) < 3)
    misfit = np.sum(y**2) - np.sum(sigma**2) + np.sum((sigma - kept) ** 2)
    assert record["primal"] == pytest.approx(0.5 * misfit + SPEC.gamma * kept.sum(), rel=1e-10)
    assert abs(record["relative_gap"]) < 1e-12
    assert record["rank"] == (kept > 0).sum()
    assert record["sigma_min"] == pytest.approx(sigma[-1])
    assert record["theorem_applies"] is True
    proven = record["verified"]
    assert proven["lower"] <= record["primal"] <= proven["upper"]
    assert proven["lower"] <= record["dual"] <= proven["upper"]
    assert 0 <= proven["relative_gap"] < 1e-9
    assert set(linear_dual.DEFINITIONS) <= record.keys() | record["sgd"][0].keys()


def test_sgd_falls_and_never_below_the_certified_optimum(finished: Workdir) -> None:
    record, arrays = load_json(finished.results / "spectral.json"), load_npz(finished.results / "spectral.npz")
    for depth in SGD.depths:
        values = arrays[f"objective_{depth}"]
        np.testing.assert_array_equal(arrays[f"steps_{depth}"], [0, 20, 40, 60])
        assert values.shape == (2, 4)
        assert (values >= record["dual"] * (1 - 1e-12)).all()
        assert (values[:, -1] < values[:, 0]).all()
        assert not np.array_equal(values[0], values[1])
    assert [(r["depth"], r["seed"]) for r in record["sgd"]] == [(2, 0), (2, 1), (3, 0), (3, 1)]


def test_long_runs_reach_the_optimum(tmp_path: Path) -> None:
    sgd = DescentSpec(depths=(2,), seeds=3, steps=1500, record_every=1500, batch_size=40)
    with jax.numpy_dtype_promotion("strict"):  # as a user may have set it
        workdir = run(dataclasses.replace(SPEC, sgd=sgd), tmp_path / "w")
    gaps = [r["gap"] for r in load_json(workdir.results / "spectral.json")["sgd"]]
    assert 0 <= min(gaps) <= max(gaps) < 2e-3


def test_a_claim_that_contradicts_the_proof_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = linear_dual.solve_columns

    for change in ({"dual": 1e6}, {"primal": -1.0}):

        def wrong(*args: Any, change: Any = change, **named: Any) -> Any:
            found = solve(*args, **named)
            return found._replace(solution=found.solution._replace(**{k: np.float64(v) for k, v in change.items()}))

        monkeypatch.setattr(linear_dual, "solve_columns", wrong)
        with pytest.raises(spectral.CertificateError, match="one of them is wrong"):
            run(SPEC, tmp_path / next(iter(change)))


def test_a_depth_that_was_finished_is_not_trained_again(
    finished: Workdir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, asked = linear_dual.stochastic_descent, []

    def counted(*args: Any, **named: Any) -> Any:
        asked.append(named["depth"])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return plain(*args, **named)

    monkeypatch.setattr(linear_dual, "stochastic_descent", counted)
    with pytest.raises(KeyboardInterrupt):
        run(SPEC, tmp_path / "w")
    again = run(SPEC, tmp_path / "w")
    assert asked == [2, 3, 3]
    assert again.status == "complete"
    found, expected = (load_npz(w.results / "spectral.npz") for w in (again, finished))
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_the_solution_is_restored_from_the_path_alone(finished: Workdir) -> None:
    record = load_json(finished.results / "spectral.json")
    for path in (finished.path, finished.checkpoints / "solution"):
        solution = linear_dual.load_solution(path)
        assert [w.shape for w in solution.weights] == [(3, 6), (3, 3), (4, 3)]
        assert float(solution.primal) == record["primal"]
        assert bool(solution.theorem_applies) is True
        x, y, _ = linear_dual.matrices(SPEC, TABLES)
        value = descent.objective_from_moments(list(solution.weights), descent.moments(x, y), SPEC.gamma)
        assert value == pytest.approx(record["primal"], rel=1e-12)
        dual = solution.dual_variable.materialise(jnp.asarray(x, jnp.float32))
        assert float(jnp.linalg.norm(dual, 2)) == pytest.approx(SPEC.gamma, rel=1e-4)
    with pytest.raises(FileNotFoundError):
        linear_dual.load_solution(finished.path / "nowhere")


def test_targets_that_are_all_zero_are_refused_before_training(tmp_path: Path) -> None:
    data = Component("synthetic_relu", {"n": 1, "d": 2, "labels": "class"})
    with pytest.raises(ConfigError, match="all targets are 0"):
        experiments.run(experiment_config("linear_dual", LinearDualSpec(data=data, depth=2, width=1)), workdir=tmp_path)


def test_without_sgd_only_the_optimum_is_computed(tmp_path: Path) -> None:
    workdir = run(dataclasses.replace(SPEC, sgd=dataclasses.replace(SGD, depths=())), tmp_path / "w")
    assert load_json(workdir.results / "spectral.json")["sgd"] == []
    assert (workdir.figures / "spectral.png").exists()


def test_real_image_files_work_end_to_end(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tfds(tmp_path / "tfds", "mnist", {split: random_split(rng, "mnist", 300) for split in ("train", "test")})
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = config_lib.load(ROOT / "configs" / "theorem2.py", "data=mnist,H=4,gamma=0.5,smoke")
    _, workdir, _ = experiments.run(config, workdir=tmp_path / "w")
    record = load_json(workdir.results / "spectral.json")
    # 256 images of 784 pixels: X X^T is singular, so the fast factorisation is refused.
    assert [a["accepted"] for a in record["attempts"]] == [False, True]
    assert record["factorization"] == "qr"
    assert record["relative_gap"] < 1e-6
    assert record["verified"]["unresolved"] == 0
    assert record["verified"]["relative_gap"] < 1e-6
    assert (record["gamma"], record["sizes"]["widths"]) == (0.5, [9, 9, 9])


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 1}, "depth=1 must lie between 2"),
        ({"width": 0}, "width=0 must lie between 1"),
        ({"gamma": -1.0}, "gamma=-1.0 must be finite and at least 0"),
        ({"gamma": math.inf}, "gamma=inf"),
        ({"tolerance": 0.0}, "tolerance=0.0 must lie between 0 and 1"),
        ({"block_size": -1}, "block_size=-1"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SPEC, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (1,)}, "a depth H must lie between 2"),
        ({"depths": (3, 3)}, "twice"),
        ({"steps": 50}, "multiple of"),
        ({"learning_rate": 0.0}, "must be positive"),
        ({"momentum": 1.0}, r"\[0, 1\)"),
        ({"seeds": 0}, "seeds=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"record_every": 0}, "record_every"),
    ],
)
def test_bad_sgd_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SGD, **changes)


def test_unknown_data_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown data 'mnits'.*mnist.*random"):
        run(dataclasses.replace(SPEC, data=Component("mnits", {})), tmp_path / "w")
    with pytest.raises(UnknownNameError, match="nosuch"):
        run(dataclasses.replace(SPEC, data=Component("random", {"nosuch": 1})), tmp_path / "w")
    with pytest.raises(ConfigError, match="unknown data 'cifar'"):
        config_lib.load(ROOT / "configs" / "theorem2.py", "data=cifar")
    assert not (tmp_path / "w").exists()


# --- the figure -------------------------------------------------------------------------------------------------------


def test_the_figure_shows_curves_spectrum_and_gap(finished: Workdir, drawn: dict[str, Any]) -> None:
    figures.FIGURES["spectral.json"](finished.path)
    figure = drawn["spectral"]
    record, arrays = load_json(finished.results / "spectral.json"), load_npz(finished.results / "spectral.npz")
    objective, spectrum, gap = figure.axes
    for index, depth in enumerate(SGD.depths):
        middle = np.median(arrays[f"objective_{depth}"], axis=0)
        np.testing.assert_allclose(objective.lines[index].get_ydata(), middle / record["half_norm"])
        np.testing.assert_allclose(gap.lines[index].get_ydata(), (middle - record["dual"]) / record["half_norm"])
    sigma, kept_values = (line.get_ydata() for line in spectrum.lines[:2])
    np.testing.assert_array_equal(sigma, arrays["singular_values"])
    np.testing.assert_allclose(kept_values, [*np.maximum(arrays["singular_values"][:3] - SPEC.gamma, 0), 0])


def test_malformed_records_are_named(finished: Workdir, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    record = load_json(finished.results / "spectral.json")
    save_json(results / "spectral.json", record)
    with pytest.raises(ValueError, match="no record"):
        figures.draw(tmp_path)
    save_npz(results / "spectral.npz", singular_values=np.ones(3))
    with pytest.raises(ValueError, match="lacks steps_2"):
        figures.draw(tmp_path)
    del record["dual"]
    save_json(results / "spectral.json", record)
    with pytest.raises(ValueError, match="lacks dual"):
        figures.draw(tmp_path)
