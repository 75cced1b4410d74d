"""Data sets: synthetic labels, image statistics, the cache, missing and bad data, the preparation script.

The TFDS folders are written here by hand, record by record, so the tests need neither TensorFlow nor a download.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tfds_files import CODE, random_split, write_tfds

from dualgap_jax import data, registry

SCRIPT = Path(__file__).parents[1] / "scripts" / "prepare_data.py"


# --- synthetic data ---------------------------------------------------------------------------------------------------


def slow_teacher(a: np.ndarray, w: np.ndarray, point: np.ndarray) -> float:
    """f(x) = sum_i a_i max(0, w_i . x), one number at a time."""
    total = 0.0
    for a_i, w_i in zip(a, w, strict=True):
        total += float(a_i) * max(0.0, sum(float(p) * float(q) for p, q in zip(w_i, point, strict=True)))
    return total


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("labels", ["sign", "class", "real"])
def test_synthetic_labels_are_the_teachers(seed: int, labels: str) -> None:
    dataset = data.synthetic_relu(n=60, d=4, teacher_width=5, teacher_scale=2.5, seed=seed, labels=labels)
    a, w = data.relu_teacher(d=4, teacher_width=5, teacher_scale=2.5, seed=seed)
    assert a.shape == (5,)
    assert w.shape == (5, 4)
    expected = np.array([slow_teacher(a, w, point) for point in dataset.x])
    np.testing.assert_allclose(data.teacher_outputs(data.Teacher(a, w), dataset.x), expected, rtol=1e-12, atol=1e-12)
    if labels == "sign":
        assert dataset.task == "binary"
        np.testing.assert_array_equal(dataset.y, np.sign(expected))
        assert dataset.info["positive_fraction"] == (expected > 0).mean()
    elif labels == "class":
        assert dataset.task == "multiclass"
        np.testing.assert_array_equal(dataset.y, expected > 0)
    else:
        assert dataset.task == "regression"
        np.testing.assert_allclose(dataset.y, expected, rtol=1e-6)
    assert dataset.x.shape == (60, 4)
    of_labels = (np.int32, 2) if labels == "class" else (np.float32, 1)
    assert (dataset.x.dtype, dataset.y.dtype, dataset.num_outputs) == (np.float32, *of_labels)
    np.testing.assert_array_equal(dataset.mean, np.zeros(4))
    np.testing.assert_array_equal(dataset.std, np.ones(4))
    json.dumps(dataset.info)


def test_synthetic_distributions() -> None:
    x = data.synthetic_relu(n=20_000, d=3, labels="real").x
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=0.03)
    np.testing.assert_allclose(np.cov(x.T), np.eye(3), atol=0.05)
    a, w = data.relu_teacher(d=3, teacher_width=20_000, teacher_scale=0.5)
    assert abs(a.std() - 0.5) < 0.02
    assert abs(w.std() - 1.0) < 0.02
    np.testing.assert_allclose(np.corrcoef(np.c_[w, a].T), np.eye(4), atol=0.03)


@pytest.mark.parametrize("seed", [0, 3, 11])
def test_teacher_std_agrees_with_sampling(seed: int, rng: np.random.Generator) -> None:
    teacher = data.relu_teacher(d=4, teacher_width=6, teacher_scale=3.0, seed=seed)
    f = np.maximum(rng.standard_normal((200_000, 4)) @ teacher.w.T, 0) @ teacher.a
    assert data.teacher_std(teacher) == pytest.approx(f.std(), rel=0.02)


def test_the_seed_decides_and_longer_data_extend_shorter() -> None:
    short, long = data.synthetic_relu(n=50, seed=4, min_margin=0.3), data.synthetic_relu(n=170, seed=4, min_margin=0.3)
    np.testing.assert_array_equal(long.x[:50], short.x)
    np.testing.assert_array_equal(long.y[:50], short.y)
    np.testing.assert_array_equal(data.synthetic_relu(n=50, seed=4, min_margin=0.3).x, short.x)
    unfiltered = [data.synthetic_relu(n=50, seed=seed, labels="real").x for seed in (4, 5)]
    assert not np.array_equal(*unfiltered)
    assert not np.array_equal(data.relu_teacher(seed=4).w, data.relu_teacher(seed=5).w)


@pytest.mark.parametrize(("seed", "scale"), [(0, 1.0), (2, 10.0)])
def test_min_margin_drops_the_points_near_the_boundary(seed: int, scale: float) -> None:
    arguments: dict[str, Any] = {"n": 400, "d": 5, "teacher_scale": scale, "seed": seed}
    free, filtered = data.synthetic_relu(**arguments), data.synthetic_relu(**arguments, min_margin=0.5)
    teacher = data.relu_teacher(d=5, teacher_scale=scale, seed=seed)
    least = 0.5 * data.teacher_std(teacher)
    outputs = data.teacher_outputs(teacher, free.x)
    assert (np.abs(outputs) < least).any()
    assert (np.abs(data.teacher_outputs(teacher, filtered.x)) > least).all()
    assert len(filtered.x) == 400
    kept = free.x[np.abs(outputs) > least]
    np.testing.assert_array_equal(filtered.x[: len(kept)], kept)
    assert filtered.info["points_drawn"] > 400


def test_points_without_a_sign_are_dropped() -> None:
    """A one-unit teacher is exactly 0 on half the space; with real labels those points stay."""
    signed = data.synthetic_relu(n=200, teacher_width=1)
    outputs = data.teacher_outputs(data.relu_teacher(teacher_width=1), signed.x)
    assert (signed.y * outputs > 0).all()
    real = data.synthetic_relu(n=200, teacher_width=1, labels="real")
    assert 50 < (real.y == 0).sum() < 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be a positive integer, got 0"),
        ({"d": 0}, "d must be a positive integer"),
        ({"teacher_width": -1}, "teacher_width must be a positive integer"),
        ({"teacher_scale": 0.0}, "teacher_scale must be positive"),
        ({"teacher_scale": float("nan")}, "teacher_scale must be positive and finite"),
        ({"teacher_scale": 1e-39, "labels": "real"}, "from 1e-30 to 1e[+]30, so that float32"),
        ({"teacher_scale": 1e-200, "min_margin": 0.1}, "from 1e-30 to 1e[+]30"),
        ({"seed": -1}, "seed=-1 must be a whole number from 0"),
        ({"labels": "signs"}, "unknown labels 'signs'. Did you mean 'sign'"),
        ({"min_margin": -0.1}, "min_margin must be 0 or more"),
        ({"min_margin": float("inf")}, "finite"),
        ({"min_margin": 0.5, "labels": "real"}, "needs labels='sign'"),
        ({"min_margin": 50.0, "n": 30}, "leaves only 0 of 3000 drawn points, 30 are needed"),
    ],
)
def test_synthetic_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.synthetic_relu(**arguments)


# --- standardise, validate, take --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stats_shape", [(6, 5, 3), (1, 1, 3), (1, 1, 1)])
def test_standardise_on_uint8_under_jit(stats_shape: tuple[int, ...], rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (7, 6, 5, 3), dtype=np.uint8)
    mean, std = rng.normal(100, 20, stats_shape), rng.uniform(1, 60, stats_shape)
    got = jax.jit(data.standardise)(jnp.asarray(x), mean.astype(np.float32), std.astype(np.float32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, (x.astype(np.float64) - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_standardise_in_float64(rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (5, 4), dtype=np.uint8)
    mean, std = rng.normal(100, 20, 4), rng.uniform(1, 60, 4)
    got = data.standardise(jnp.asarray(x), mean, std)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, (x - mean) / std, rtol=1e-14)
    features = rng.standard_normal((5, 4))
    got = data.standardise(jnp.asarray(features), np.zeros(4, np.float32), np.ones(4, np.float32))
    np.testing.assert_array_equal(got, features)


def image_dataset(rng: np.random.Generator, n: int = 20) -> data.Dataset:
    x = rng.integers(0, 256, (n, 3, 2, 1), dtype=np.uint8)
    y = rng.integers(0, 10, n).astype(np.int32)
    stats = np.ones((3, 2, 1), np.float32)
    return data.Dataset("tiny", x, y, 0 * stats, stats, 10, "multiclass", {"num_examples": n})


def changed(array: np.ndarray, index: Any, value: Any) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


BAD_IMAGES: dict[str, tuple[Callable[[data.Dataset], dict[str, Any]], str]] = {
    "label above": (
        lambda s: {"y": changed(s.y, [3, 8], [10, 12])},
        r"outside the classes 0\.\.9: 2 of 20, first at index 3 \(10\), 8 \(12\)",
    ),
    "label below": (lambda s: {"y": changed(s.y, 5, -1)}, r"outside the classes 0\.\.9: 1 of 20.*5 \(-1\)"),
    "float labels": (lambda s: {"y": s.y.astype(np.float32)}, "must be integers, got float32"),
    "more labels": (lambda s: {"y": s.y[:-1]}, r"got x \(20, 3, 2, 1\) and y \(19,\)"),
    "labels 2-d": (lambda s: {"y": s.y[:, None]}, "need x"),
    "empty": (lambda s: {"x": s.x[:0], "y": s.y[:0]}, "is empty"),
    "no pixels": (lambda s: {"x": s.x[:, :0]}, "is empty"),
    "integer x": (lambda s: {"x": s.x.astype(np.int64)}, "must be uint8 or float, got int64"),
    "flat mean": (lambda s: {"mean": s.mean.ravel()}, r"mean \(6,\) does not fit one example \(3, 2, 1\)"),
    "wide std": (lambda s: {"std": np.ones((3, 4, 1), np.float32)}, "std .* does not fit"),
    "nan mean": (lambda s: {"mean": changed(s.mean, 0, np.nan)}, "mean is not finite"),
    "zero std": (lambda s: {"std": changed(s.std, 0, 0)}, "std must be positive"),
    "task": (lambda s: {"task": "multi"}, "unknown task 'multi'"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_validate_refuses_images(case: str, rng: np.random.Generator) -> None:
    dataset = image_dataset(rng)
    assert data.validate(dataset) is dataset
    change, message = BAD_IMAGES[case]
    with pytest.raises(ValueError, match=f"'tiny'.*{message}"):
        data.validate(dataset._replace(**change(dataset)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_validate_refuses_non_finite_numbers(bad: float) -> None:
    signed, real = data.synthetic_relu(n=12, d=3), data.synthetic_relu(n=12, d=3, labels="real")
    with pytest.raises(ValueError, match="non-finite features: 2 of 12, first at index 4, 9"):
        data.validate(signed._replace(x=changed(signed.x, ([4, 9], [0, 2]), bad)))
    with pytest.raises(ValueError, match="non-finite targets: 1 of 12"):
        data.validate(real._replace(y=changed(real.y, 11, bad)))
    with pytest.raises(ValueError, match=r"outside the classes -1, \+1: 1 of 12, first at index 7"):
        data.validate(signed._replace(y=changed(signed.y, 7, bad)))


def test_validate_refuses_binary_labels_and_outputs() -> None:
    signed = data.synthetic_relu(n=12, d=3)
    with pytest.raises(
        ValueError, match=r"outside the classes -1, \+1: 2 of 12, first at index 0 \(0\.0\), 1 \(2\.0\)"
    ):
        data.validate(signed._replace(y=changed(signed.y, [0, 1], [0, 2])))
    with pytest.raises(ValueError, match="has 1 output, got num_outputs=2"):
        data.validate(signed._replace(num_outputs=2))


def test_take(rng: np.random.Generator) -> None:
    dataset = image_dataset(rng)
    assert data.take(dataset, 0) is dataset
    assert data.take(dataset, 20) is dataset
    first = data.take(dataset, 6)
    np.testing.assert_array_equal(first.x, dataset.x[:6])
    np.testing.assert_array_equal(first.y, dataset.y[:6])
    assert first.info["num_examples"] == 6
    for number in (-1, 21):
        with pytest.raises(ValueError, match=r"must be 0 \(all\) to 20"):
            data.take(dataset, number)


# --- prepared folders -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and no data folder in the environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    return tmp_path / "cache" / "dualgap_jax"


@pytest.fixture
def prepared(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A data folder with a small MNIST, all arrays known."""
    splits = {"train": random_split(rng, "mnist", 30), "test": random_split(rng, "mnist", 12)}
    write_tfds(tmp_path / "tfds", "mnist", splits)
    return tmp_path / "tfds"


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        pytest.fail("decoded although cached")

    monkeypatch.setattr(data.cache, "decode", refuse)


AXES: dict[str, tuple[int, ...]] = {"pixel": (0,), "channel": (0, 1, 2), "global": (0, 1, 2, 3)}


@pytest.mark.parametrize(("name", "shards", "n"), [("mnist", 1, 1003), ("cifar10", 3, 70)])
def test_images_and_statistics_against_numpy(
    name: str, shards: int, n: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    """The oracle takes mean and standard deviation of the whole float64 stack; n = 1003 crosses a decoding chunk."""
    splits = {"train": random_split(rng, name, n), "test": random_split(rng, name, 25)}
    write_tfds(tmp_path, name, splits, shards=shards)
    stack = splits["train"][0].astype(np.float64)
    for split, (x, y) in splits.items():
        for axis, over in AXES.items():
            dataset = data.DATASETS.build(name, data_dir=str(tmp_path), split=split, standardise=axis)
            assert (dataset.x.dtype, dataset.y.dtype) == (np.uint8, np.int32)
            np.testing.assert_array_equal(dataset.x, x)
            np.testing.assert_array_equal(dataset.y, y)
            mean, std = stack.mean(over, keepdims=True)[0], stack.std(over, keepdims=True)[0]
            assert dataset.mean.dtype == dataset.std.dtype == np.float32
            np.testing.assert_allclose(dataset.mean, mean, rtol=1e-6)
            np.testing.assert_allclose(dataset.std, np.where(std == 0, 1, std), rtol=1e-6)
            assert (dataset.num_outputs, dataset.task, dataset.name) == (10, "multiclass", name)
            assert dataset.info["image_format"] == "PNG"
            json.dumps(dataset.info)
        plain = data.DATASETS.build(name, data_dir=str(tmp_path), split=split, standardise="none")
        got = data.standardise(jnp.asarray(plain.x), plain.mean, plain.std)
        np.testing.assert_allclose(got, x / 255, rtol=1e-6)
    pixel = data.DATASETS.build(name, data_dir=str(tmp_path))
    assert pixel.std[2, 3, 0] == 1
    z = np.asarray(data.standardise(jnp.asarray(pixel.x), pixel.mean, pixel.std), np.float64)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(z.std(axis=0), (stack.std(axis=0) > 0).astype(float), atol=1e-4)


def test_statistics_are_exact_where_floats_cancel() -> None:
    """One value of 254 among 255s: the variance, about 1e-5, is the difference of two numbers near 65,025."""
    x = np.full((90_000, 1, 1, 1), 255, np.uint8)
    x[17] = 254
    total, squares = x.sum(axis=0, dtype=np.int64), np.square(x, dtype=np.int64).sum(axis=0)
    arrays = data.prepared.Decoded(x, np.zeros(len(x), np.int32), total, squares, "PNG")
    exact = np.sqrt((1 / 90_000) * (1 - 1 / 90_000))
    for axis in AXES:
        np.testing.assert_allclose(data.images.statistics(arrays, axis)[1], exact, rtol=1e-7)


def test_a_lossy_copy_says_so(tmp_path: Path, rng: np.random.Generator) -> None:
    split = random_split(rng, "cifar10", 11)
    write_tfds(tmp_path, "cifar10", {"train": split, "test": split}, image_format="JPEG")
    assert data.cifar10(data_dir=str(tmp_path)).info["image_format"] == "JPEG"


def test_num_examples_keeps_the_statistics(prepared: Path) -> None:
    full, part = data.mnist(data_dir=str(prepared)), data.mnist(data_dir=str(prepared), num_examples=7)
    np.testing.assert_array_equal(part.x, full.x[:7])
    np.testing.assert_array_equal(part.mean, full.mean)
    assert part.info["num_examples"] == 7
    with pytest.raises(ValueError, match="to 30"):
        data.mnist(data_dir=str(prepared), num_examples=31)


def test_even_against_odd(prepared: Path) -> None:
    digits, signs = data.mnist(data_dir=str(prepared)), data.mnist(data_dir=str(prepared), labels="parity")
    assert (signs.task, signs.num_outputs, signs.y.dtype) == ("binary", 1, np.float32)
    assert (signs.y == 1 - 2 * (digits.y % 2)).all()
    np.testing.assert_array_equal(signs.x, digits.x)
    assert "labels" not in digits.info  # of runs that were begun before there was a choice
    with pytest.raises(ValueError, match=r"unknown labels 'parities'. Did you mean 'parity'"):
        data.mnist(data_dir=str(prepared), labels="parities")


def test_unknown_names(prepared: Path) -> None:
    with pytest.raises(registry.UnknownNameError, match=r"unknown data set 'mnits'. Did you mean 'mnist'.*cifar10"):
        data.DATASETS["mnits"]
    with pytest.raises(registry.UnknownNameError, match="'dir'"):
        data.DATASETS.build("mnist", dir=str(prepared))
    with pytest.raises(ValueError, match=r"unknown split 'trian'. Did you mean 'train'"):
        data.mnist(data_dir=str(prepared), split="trian")
    with pytest.raises(ValueError, match=r"unknown standardise 'pixels'. Did you mean 'pixel'"):
        data.mnist(data_dir=str(prepared), standardise="pixels")


def test_labels_outside_the_classes_in_the_files(tmp_path: Path, rng: np.random.Generator) -> None:
    x, y = random_split(rng, "mnist", 15)
    y = changed(y, 6, 10)
    write_tfds(tmp_path, "mnist", {"train": (x, y), "test": (x, y)})
    with pytest.raises(ValueError, match=r"outside the classes 0\.\.9: 1 of 15, first at index 6 \(10\)"):
        data.mnist(data_dir=str(tmp_path))


def test_data_dir_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.resolve_data_dir() == tmp_path / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", "")
    assert data.resolve_data_dir() == tmp_path / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", "/from/environment")
    assert data.resolve_data_dir() == Path("/from/environment")
    assert data.resolve_data_dir("/given") == Path("/given")
    assert data.resolve_data_dir("~/given") == tmp_path / "given"


def test_the_environment_names_the_folder(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert len(data.mnist().x) == 30


def test_the_newest_version_is_read(prepared: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, n in (("3.0.10", 13), ("3.0.2", 14)):
        monkeypatch.setitem(CODE, "mnist", ("mnist", version))
        split = random_split(rng, "mnist", n)
        write_tfds(prepared, "mnist", {"train": split, "test": split})
    (prepared / "mnist" / "incomplete.X_9.0.0").mkdir()
    (prepared / "mnist" / "incomplete.X_9.0.0" / "dataset_info.json").write_text("{}")
    dataset = data.mnist(data_dir=str(prepared))
    assert (len(dataset.x), dataset.info["version"]) == (13, "3.0.10")


def edit_info(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    info = json.loads((folder / "dataset_info.json").read_text())
    edit(info)
    (folder / "dataset_info.json").write_text(json.dumps(info))


def empty_file(folder: Path) -> None:
    (folder / "mnist-test.array_record-00000-of-00001").write_bytes(b"")


SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no info": (lambda f: (f / "dataset_info.json").unlink(), "no mnist/<version>/dataset_info.json"),
    "broken info": (lambda f: (f / "dataset_info.json").write_text('{"splits": ['), "cannot be read.*JSON"),
    "info of no splits": (lambda f: (f / "dataset_info.json").write_text('{"fileFormat": "array_record"}'), "splits"),
    "info a list": (lambda f: (f / "dataset_info.json").write_text("[1]"), "cannot be read"),
    "no features": (lambda f: (f / "features.json").unlink(), "cannot be read.*features.json"),
    "tfrecord": (lambda f: edit_info(f, lambda i: i.update(fileFormat="tfrecord")), "holds tfrecord files"),
    "file gone": (
        lambda f: (f / "mnist-train.array_record-00000-of-00001").unlink(),
        "mnist-train.array_record-00000-of-00001 is missing or empty",
    ),
    "file empty": (empty_file, "mnist-test.array_record-00000-of-00001 is missing or empty"),
    "no test split": (lambda f: edit_info(f, lambda i: i["splits"].pop()), "no examples in split 'test'"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_an_unusable_folder_names_the_remedy(case: str, prepared: Path) -> None:
    spoil, reason = SPOILED[case]
    spoil(prepared / "mnist" / "3.0.1")
    with pytest.raises(data.DataNotFoundError, match=reason) as caught:
        data.mnist(data_dir=str(prepared))
    assert isinstance(caught.value, FileNotFoundError)
    assert f"python scripts/prepare_data.py mnist --data_dir={prepared}" in str(caught.value)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_missing_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").write_text("")
    (tmp_path / "other" / "imagenet").mkdir(parents=True)
    for folder, reason, quoted in (
        ("missing", "does not exist", f"{tmp_path}/missing"),
        ("empty", "is empty", f"{tmp_path}/empty"),
        ("a file", "is not a folder", f"'{tmp_path}/a file'"),
        ("other", f"it has no {name}/", f"{tmp_path}/other"),
    ):
        with pytest.raises(data.DataNotFoundError, match=reason) as caught:
            data.DATASETS.build(name, data_dir=str(tmp_path / folder))
        assert f"python scripts/prepare_data.py {name} --data_dir={quoted}" in str(caught.value)
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / folder))
        with pytest.raises(data.DataNotFoundError, match=reason):
            data.DATASETS.build(name)


def test_missing_data_is_noticed_without_tfds(tmp_path: Path) -> None:
    """So the error cannot wait for a network."""
    code = (
        "import sys; from dualgap_jax import data\n"
        f"try: data.mnist(data_dir={str(tmp_path / 'none')!r})\n"
        "except data.DataNotFoundError: print('tensorflow_datasets' in sys.modules)"
    )
    assert run_python(code) == "False\n"


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    ).stdout


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "fewer records"])
def test_damaged_data_files(damage: str, prepared: Path, rng: np.random.Generator) -> None:
    folder = prepared / "mnist" / "3.0.1"
    file = folder / "mnist-train.array_record-00000-of-00001"
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "overwritten":
        file.write_bytes(rng.bytes(len(content)))
    else:
        edit_info(folder, lambda info: info["splits"][0].update(shardLengths=["31"]))
    with pytest.raises(ValueError, match=r"are damaged .*\. Remove that folder and run: python scripts/prepare_data"):
        data.mnist(data_dir=str(prepared))


def test_no_flipped_bit_of_a_data_folder_gives_other_data(
    tmp_path: Path, rng: np.random.Generator, cache: Path
) -> None:
    """Wherever one bit of any file is wrong, there is an error that names the folder, or the very same data."""
    splits = {name: random_split(rng, "cifar10", 6) for name in ("train", "test")}
    write_tfds(tmp_path / "good", "cifar10", splits, image_format="JPEG")
    good, errors = data.cifar10(data_dir=str(tmp_path / "good")), []
    for trial in range(24):
        shutil.copytree(tmp_path / "good", tmp_path / f"{trial}")
        files = sorted(path for path in (tmp_path / f"{trial}").rglob("*") if path.is_file())
        file = files[trial % len(files)]
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        file.write_bytes(content)
        try:
            found = data.cifar10(data_dir=str(tmp_path / f"{trial}"))
        except (ValueError, data.DataNotFoundError) as error:
            errors.append((str(tmp_path / f"{trial}"), str(error)))
        else:
            for name in ("x", "y", "mean", "std"):
                np.testing.assert_array_equal(getattr(found, name), getattr(good, name))
    assert all(folder in message for folder, message in errors)
    assert len(errors) > 4


# --- the cache --------------------------------------------------------------------------------------------------------


def same(one: data.Dataset, other: data.Dataset) -> bool:
    pairs = zip(one, other, strict=True)
    return all(np.array_equal(p, q) if isinstance(p, np.ndarray) else p == q for p, q in pairs)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_second_load_is_cached_and_equal(
    split: str, prepared: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = data.mnist(data_dir=str(prepared), split=split)
    files = sorted(path.name for path in cache.iterdir())
    checksum = first.info["checksum"]
    assert files == [f"mnist-{s}-{checksum}.npz" for s in sorted({"train", split})]
    forbid_decoding(monkeypatch)
    assert same(data.mnist(data_dir=str(prepared), split=split), first)


def test_a_cached_load_does_not_import_tfds(prepared: Path) -> None:
    data.mnist(data_dir=str(prepared))
    code = (
        "import sys; from dualgap_jax import data\n"
        f"print(len(data.mnist(data_dir={str(prepared)!r}).x), 'tensorflow_datasets' in sys.modules)"
    )
    assert run_python(code) == "30 False\n"


def test_changed_data_are_decoded_again(prepared: Path, rng: np.random.Generator) -> None:
    old = data.mnist(data_dir=str(prepared))
    folder = prepared / "mnist" / "3.0.1"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    split = random_split(rng, "mnist", 30)
    write_tfds(prepared, "mnist", {"train": split, "test": split})
    new = data.mnist(data_dir=str(prepared))
    np.testing.assert_array_equal(new.x, split[0])
    assert new.info["checksum"] != old.info["checksum"]


def test_a_touched_data_file_changes_the_checksum(prepared: Path) -> None:
    before = data.find_prepared("mnist", str(prepared)).checksum
    assert data.find_prepared("mnist", str(prepared)).checksum == before
    os.utime(prepared / "mnist" / "3.0.1" / "mnist-train.array_record-00000-of-00001", (1, 1))
    assert data.find_prepared("mnist", str(prepared)).checksum != before


def rewrite(path: Path, **arrays: np.ndarray) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


DAMAGE: dict[str, Callable[[Path, bytes], Any]] = {
    "empty": lambda path, _: path.write_bytes(b""),
    "truncated": lambda path, content: path.write_bytes(content[: len(content) // 2]),
    "one bit": lambda path, content: path.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]),
    "text": lambda path, _: path.write_text("not a cache"),
    "members missing": lambda path, _: rewrite(path, x=np.zeros((30, 28, 28, 1), np.uint8)),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_cache_is_rebuilt(case: str, prepared: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = data.mnist(data_dir=str(prepared))
    (path,) = cache.iterdir()
    DAMAGE[case](path, path.read_bytes())
    with pytest.warns(UserWarning, match="rebuilding the damaged cache file"):
        assert same(data.mnist(data_dir=str(prepared)), good)
    forbid_decoding(monkeypatch)
    assert same(data.mnist(data_dir=str(prepared)), good)
    assert list(cache.iterdir()) == [path]


def test_a_folder_in_place_of_the_cache_file(prepared: Path, cache: Path) -> None:
    good = data.mnist(data_dir=str(prepared))
    (path,) = cache.iterdir()
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="cannot be written"), pytest.warns(UserWarning, match="rebuilding"):
        assert same(data.mnist(data_dir=str(prepared)), good)


def test_a_cache_of_another_shape_is_rebuilt(prepared: Path, cache: Path) -> None:
    good = data.mnist(data_dir=str(prepared))
    (path,) = cache.iterdir()
    with np.load(path) as stored:
        arrays = dict(stored)
    rewrite(path, **{**arrays, "x": arrays["x"][:-1]})
    with pytest.warns(UserWarning, match="unexpected arrays"):
        assert same(data.mnist(data_dir=str(prepared)), good)


def test_an_unwritable_cache_is_tolerated(
    prepared: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = data.mnist(data_dir=str(prepared))
    (tmp_path / "blocked").write_text("a file where the cache folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    with pytest.warns(UserWarning, match=r"not cached.*cannot be written"):
        assert same(data.mnist(data_dir=str(prepared)), good)


def test_a_failed_write_leaves_nothing(prepared: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, **_: Any) -> None:
        file.write(b"half a")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert len(data.mnist(data_dir=str(prepared)).x) == 30
    assert list(cache.iterdir()) == []


def test_a_cache_file_of_other_data_is_not_believed(
    prepared: Path, cache: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    good = data.mnist(data_dir=str(prepared))
    (path,) = cache.iterdir()
    write_tfds(tmp_path / "other", "mnist", {name: random_split(rng, "mnist", 30) for name in ("train", "test")})
    data.mnist(data_dir=str(tmp_path / "other"))
    (other,) = set(cache.iterdir()) - {path}
    path.write_bytes(other.read_bytes())
    with pytest.warns(UserWarning, match="rebuilding the damaged cache file"):
        assert same(data.mnist(data_dir=str(prepared)), good)


@pytest.mark.parametrize("seed", range(4))
def test_no_flipped_bit_of_the_cache_gives_other_data(seed: int, prepared: Path, cache: Path) -> None:
    rng = np.random.default_rng(seed)
    good = data.mnist(data_dir=str(prepared))
    (path,) = cache.iterdir()
    content = path.read_bytes()
    for _ in range(20):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert same(data.mnist(data_dir=str(prepared)), good)


def test_without_a_home_folder_nothing_is_cached(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(self: Path) -> Path:
        if str(self).startswith("~"):
            raise RuntimeError("Could not determine home directory.")
        return self

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_dir() is None
    with pytest.warns(UserWarning, match="not cached: there is no home folder; set XDG_CACHE_HOME"):
        assert len(data.mnist(data_dir=str(prepared)).x) == 30
    with pytest.raises(data.DataNotFoundError, match="TFDS_DATA_DIR"):
        data.mnist()


def test_a_remote_folder_is_refused_as_such() -> None:
    with pytest.raises(data.DataNotFoundError, match=r"gs://bucket/tfds is remote; .*config.data.data_dir"):
        data.mnist(data_dir="gs://bucket/tfds")
    with pytest.raises(data.DataNotFoundError, match="gs://bucket is remote"):
        data.mnist(data_dir="gs:/bucket")  # as a path writes it


# --- arrays of one's own ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int16, np.int64, bool])
def test_features_of_any_number_type_become_float32(kind: type, rng: np.random.Generator) -> None:
    x = (10 * rng.normal(size=(7, 3))).astype(kind)
    dataset = data.from_arrays(x, rng.normal(size=7))
    assert dataset.x.dtype == np.float32
    np.testing.assert_array_equal(dataset.x, x.astype(np.float32))
    np.testing.assert_array_equal(data.standardise(dataset.x, dataset.mean, dataset.std), dataset.x)
    assert (dataset.task, dataset.num_outputs) == ("regression", 1)


@pytest.mark.parametrize(
    ("y", "expected"),
    [
        ([0, 1, 2, 1], ("multiclass", 3, np.int32)),
        ([1, 1, 1, 1], ("multiclass", 2, np.int32)),
        ([1, -1, 1, -1], ("binary", 1, np.float32)),
        ([1.0, -1.0, 1.0, 1.0], ("binary", 1, np.float32)),
        ([1.0, 1.0, 1.0, 1.0], ("binary", 1, np.float32)),
        ([0.0, 1.0, 1.0, 0.0], ("regression", 1, np.float32)),
        (np.uint8([0, 5, 5, 0]), ("multiclass", 6, np.int32)),
    ],
)
def test_labels_set_the_task(y: Any, expected: tuple[str, int, type]) -> None:
    dataset = data.from_arrays(np.zeros((4, 2)), y)
    assert (dataset.task, dataset.num_outputs, dataset.y.dtype) == expected
    np.testing.assert_array_equal(dataset.y, y)
    assert data.as_dataset((np.zeros((4, 2)), y)).task == expected[0]


def test_images_of_ones_own_stay_bytes(rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    dataset = data.from_arrays(x, [0, 1, 2, 3, 9])
    assert dataset.x.dtype == np.uint8
    np.testing.assert_allclose(data.standardise(dataset.x, dataset.mean, dataset.std), x / 255, rtol=1e-6)
    assert dataset.num_outputs == 10


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_standardised_features_have_mean_0_and_deviation_1(dtype: type, rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (400, 6)).astype(dtype)
    x[:, 2] = 7
    dataset = data.from_arrays(x, rng.normal(size=400), standardise=True)
    z = np.asarray(data.standardise(dataset.x, dataset.mean, dataset.std), np.float64)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.delete(z.std(axis=0), 2), 1, rtol=1e-5)
    assert (z[:, 2] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_a_test_set_is_seen_by_the_constants_of_the_training_set(dtype: type, rng: np.random.Generator) -> None:
    x, y = rng.integers(0, 256, (60, 2)).astype(dtype), np.arange(60) % 3
    train = data.from_arrays(x[:40], y[:40], standardise=True)
    part = y[40:] == 1  # one class of three
    for given in (True, False):
        test = data.from_arrays(x[40:][part], y[40:][part], standardise=given).like(train)
        seen = data.standardise(test.x, test.mean, test.std)
        mean, std = x[:40].mean(axis=0, dtype=np.float64), x[:40].std(axis=0, dtype=np.float64)
        np.testing.assert_allclose(seen, (x[40:][part] - mean) / std, rtol=1e-4, atol=1e-5)
        assert (test.num_outputs, test.task) == (3, "multiclass")


def test_a_test_set_that_does_not_fit_the_training_set_is_refused() -> None:
    train = data.from_arrays(np.eye(4), [0, 1, 1, 0])
    for x, y, message in (
        (np.ones((2, 3)), [0, 1], r"examples of shape \(3,\), the training set 'arrays' \(4,\)"),
        (np.ones((2, 4)), [-1, 1], "has binary labels, the training set 'arrays' multiclass ones"),
        (np.ones((2, 4)), [0, 2], r"has a label 2, the training set 'arrays' the classes 0\.\.1"),
        (np.ones((2, 4), np.uint8), [0, 1], "holds uint8 features, the training set 'arrays' float32"),
    ):
        with pytest.raises(ValueError, match=message):
            data.from_arrays(x, y).like(train)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": np.zeros(4)}, r"need x \[n, ...\] and y \[n\]"),
        ({"x": np.zeros((5, 2))}, r"need x \[n, ...\] and y \[n\]"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0)}, "is empty"),
        ({"y": np.eye(4)}, r"one number an example.*y.argmax\(axis=1\)"),
        ({"x": np.array([["a", "b"]] * 4)}, "x must hold numbers"),
        ({"x": [[1.0, 2.0], [3.0], [1.0, 2.0], [3.0, 4.0]]}, "x is no array; its rows must have one length"),
        ({"y": np.array([True, False, True, True])}, "y must hold numbers, got bool"),
        ({"y": np.asarray([[0], [1], [1], [0]])}, r"got y \(4, 1\); give y\[:, 0\]\.$"),
        ({"y": np.zeros((4, 1, 2))}, r"got y \(4, 1, 2\)\.$"),
        ({"x": np.full((4, 2), np.nan)}, "non-finite features"),
        ({"x": np.full((4, 2), 1e300)}, "too large for float32; scale them"),
        ({"x": np.full((4, 2), 1e-39)}, "x holds only numbers that are 0 in float32; scale them"),
        ({"y": [1e-60, 0.0, -1e-60, 0.0]}, "y holds only numbers that are 0 in float32"),
        ({"x": np.ma.masked_less(np.eye(4), 1)}, "x holds masked entries"),
        ({"y": [1.0, np.inf, 0.0, 0.0]}, "non-finite targets"),
        ({"y": [0, 1, 2, -1]}, r"outside the classes 0..2: 1 of 4, first at index 3 \(-1\)"),
        ({"y": [0, 1, 2, 3], "num_outputs": 3}, r"outside the classes 0..2"),
        ({"y": [0, 1, 1, 0], "task": "binary"}, r"outside the classes -1, \+1"),
        ({"y": [0.0, 1.0, 2.0, 0.0], "task": "multiclass"}, "class labels must be integers"),
        ({"task": "ranking"}, "ranking"),
    ],
)
def test_arrays_that_are_no_data_set_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.from_arrays(**{"x": np.zeros((4, 2)), "y": [0, 1, 2, 0], **arguments})


def test_numbers_of_narrow_formats_are_taken() -> None:
    x = jnp.asarray([[1.5, -2.0], [0.25, 3.0]])
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn):
        given = data.from_arrays(x.astype(dtype), jnp.asarray([1, -1]).astype(dtype))
        np.testing.assert_array_equal(given.x, np.asarray(x, np.float32))
        assert given.task == "binary"


def test_labels_beyond_32_bits_are_refused_and_not_merged(rng: np.random.Generator) -> None:
    x, first = rng.standard_normal((4, 2)), 2**31 + int(rng.integers(2**31))
    for y in (first + np.arange(4), np.asarray([0, 1, 2, first]), np.asarray([0, 2**64 - 1, 1, 2], np.uint64)):
        for num_outputs in (0, 2**63):
            with pytest.raises(ValueError, match="labels outside the classes"):
                data.from_arrays(x, y, task="multiclass", num_outputs=num_outputs)


def test_features_that_leave_the_range_once_standardised_are_refused(rng: np.random.Generator) -> None:
    """By a deviation that processors round to 0, and by a mean from which a number is more than the range away."""
    x = rng.standard_normal((1000, 2))
    x[:, 1] = np.where(np.arange(1000) % 2, 1.3e-38, 0.0)
    with pytest.raises(
        ValueError, match=r"std must be positive, from 1\.2e-38 to 8\.5e\+37, but .* from 6\.[45].*e-39"
    ):
        data.from_arrays(x, x[:, 0], standardise=True)
    x[:, 1] = np.where(np.arange(1000) == rng.integers(1000), -3.4e38, 3.4e38)
    with pytest.raises(ValueError, match="features leave the range of float32 once standardised; scale them"):
        data.from_arrays(x, x[:, 0], standardise=True)
    x[:, 1] = np.where(np.arange(1000) % 2, -1e38, 1e38)
    with pytest.raises(ValueError, match="std must be positive, from"):
        data.from_arrays(x, x[:, 0], standardise=True)
    x[:, 1] *= 0.8
    large = data.from_arrays(x, x[:, 0], standardise=True)
    seen = np.asarray(data.standardise(large.x, large.mean, large.std))
    np.testing.assert_allclose(seen, (x - x.mean(0)) / x.std(0), rtol=1e-4, atol=1e-5)
    small = data.from_arrays(x, x[:, 0])._replace(std=np.full(2, 1e-3, np.float32), mean=np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="features leave the range"):
        data.as_dataset(small)


@pytest.mark.parametrize("given", [None, "train", 3, np.zeros((4, 2)), (1, 2, 3)])
def test_what_is_no_data_set_is_refused_by_every_function_of_one(given: Any, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((4, 2)), rng.integers(0, 2, 4)
    test, check = data.from_arrays(x, y), inspect.unwrap(data.validate)
    with pytest.raises(ValueError, match="is no Dataset of NumPy arrays; make one by from_arrays"):
        check(given)
    with pytest.raises(ValueError, match="is no Dataset of NumPy arrays"):
        check(test._replace(x=x.tolist()))
    with pytest.raises(ValueError, match="no data set; give a pair of arrays"):
        inspect.unwrap(data.Dataset.like)(test, given)


@pytest.mark.parametrize("number", [2.0, "2", None, True, math.nan, np.float32(1)])
def test_a_number_of_examples_is_a_whole_number(number: Any, rng: np.random.Generator) -> None:
    given = data.from_arrays(rng.standard_normal((4, 2)), rng.integers(0, 2, 4))
    with pytest.raises(ValueError, match=r"num_examples must be 0 \(all\) to 4 for data set 'arrays', got "):
        inspect.unwrap(data.take)(given, number)
    assert len(inspect.unwrap(data.take)(given, np.int8(3)).y) == 3


def test_a_data_set_made_by_hand_is_checked_where_it_is_used(rng: np.random.Generator) -> None:
    good = data.from_arrays(rng.standard_normal((4, 2)), [1, -1, 1, -1])
    for change, message in (
        ({"y": np.asarray([0, 1, 0, 1], np.float32)}, r"outside the classes -1, \+1"),
        ({"x": np.full((4, 2), np.inf, np.float32)}, "non-finite features"),
        ({"std": np.zeros(1, np.float32)}, "std must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            data.as_dataset(good._replace(**change))
    given = data.as_dataset(good._replace(x=good.x.tolist(), mean=[0.0], std=jnp.ones(1)))
    np.testing.assert_array_equal(given.x, good.x)


@pytest.mark.parametrize("given", [np.zeros((4, 2)), "mnist", None, (1, 2, 3)])
def test_what_is_no_data_set_is_refused_with_what_to_give(given: Any) -> None:
    with pytest.raises(ValueError, match=r"no data set; give a pair of arrays \(x, y\)"):
        data.as_dataset(given)


def test_cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache_dir() == tmp_path / "cache" / "dualgap_jax"
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert data.cache_dir() == tmp_path / ".cache" / "dualgap_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_dir() == tmp_path / ".cache" / "dualgap_jax"


# --- scripts/prepare_data.py ------------------------------------------------------------------------------------------


@pytest.fixture
def prepare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The script's `main`; TensorFlow counts as installed."""
    importlib.import_module("tensorflow_datasets")  # which would take the module below for TensorFlow
    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))
    sys.modules["tensorflow"].__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    return runpy.run_path(str(SCRIPT))["main"]


def test_prepare_says_that_data_are_there(
    prepare: Callable[..., int], prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare(["mnist", f"--data_dir={prepared}"]) == 0
    assert f"already prepared: {prepared}/mnist/3.0.1" in capsys.readouterr().out
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert prepare(["mnist"]) == 0


def test_prepare_names_the_extra_without_tensorflow(
    prepare: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "tensorflow")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert prepare(["cifar10", f"--data_dir={tmp_path}"]) == 1
    assert "pip install 'dualgap_jax[prepare]'" in capsys.readouterr().err


def fake_builder(monkeypatch: pytest.MonkeyPatch, download: Callable[[str, str], Any]) -> None:
    import tensorflow_datasets as tfds

    def builder(name: str, *, data_dir: str, file_format: str) -> Any:
        assert file_format == "array_record"
        return types.SimpleNamespace(download_and_prepare=lambda: download(name, data_dir))

    monkeypatch.setattr(tfds, "builder", builder)


def test_prepare_downloads(
    prepare: Callable[..., int],
    tmp_path: Path,
    rng: np.random.Generator,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split = random_split(rng, "cifar10", 10)
    fake_builder(monkeypatch, lambda name, root: write_tfds(Path(root), name, {"train": split, "test": split}) and None)
    target = tmp_path / "new" / "tfds"
    assert prepare(["cifar10", f"--data_dir={target}"]) == 0
    out = capsys.readouterr().out
    assert f"downloading cifar10 into {target}" in out
    assert f"prepared {target}/cifar10/3.0.2" in out
    monkeypatch.delitem(sys.modules, "tensorflow")  # which reading does without
    np.testing.assert_array_equal(data.cifar10(data_dir=str(target)).x, split[0])


def test_prepare_reports_a_failed_download(
    prepare: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str, root: str) -> None:
        raise ConnectionError("no route to host")

    fake_builder(monkeypatch, fail)
    assert prepare(["mnist", f"--data_dir={tmp_path}"]) == 1
    assert "could not be prepared" in (err := capsys.readouterr().err)
    assert "ConnectionError: no route to host" in err


@pytest.mark.parametrize("case", ["tfrecord", "file gone", "broken info"])
def test_prepare_does_not_touch_an_unusable_folder(
    case: str,
    prepare: Callable[..., int],
    prepared: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    SPOILED[case][0](prepared / "mnist" / "3.0.1")
    fake_builder(monkeypatch, lambda *_: pytest.fail("downloaded over an existing folder"))
    assert prepare(["mnist", f"--data_dir={prepared}"]) == 1
    assert f"Remove {prepared}/mnist/3.0.1 and run this again" in capsys.readouterr().err


def test_prepare_refuses_other_names(prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prepare(["imagenet"])
    assert "invalid choice: 'imagenet'" in capsys.readouterr().err


# --- real data --------------------------------------------------------------------------------------------------------

REAL_DATA = os.environ.get("TFDS_DATA_DIR", "")


def needs(name: str) -> pytest.MarkDecorator:
    available = bool(REAL_DATA) and any(Path(REAL_DATA).glob(f"{name}/*/dataset_info.json"))
    return pytest.mark.skipif(not available, reason=f"TFDS_DATA_DIR names no folder with a prepared {name}")


@pytest.mark.realdata
@needs("mnist")
def test_real_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, class counts and the global mean 0.1307 and standard deviation 0.3081 are the published ones."""
    train = data.mnist(data_dir=REAL_DATA, standardise="global")
    test = data.mnist(data_dir=REAL_DATA, split="test")
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert train.x.shape == (60_000, 28, 28, 1)
    assert test.x.shape == (10_000, 28, 28, 1)
    assert np.bincount(train.y).tolist() == counts
    assert np.bincount(test.y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert train.mean.item() / 255 == pytest.approx(0.1307, abs=5e-5)
    assert train.std.item() / 255 == pytest.approx(0.3081, abs=5e-5)
    pixels = train.x.reshape(60_000, -1)[:, ::97].astype(np.float64)
    std = pixels.std(axis=0)
    np.testing.assert_allclose(test.mean.ravel()[::97], pixels.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(test.std.ravel()[::97], np.where(std == 0, 1, std), rtol=1e-6)
    forbid_decoding(monkeypatch)
    assert same(data.mnist(data_dir=REAL_DATA, standardise="global"), train)
    assert same(data.mnist(data_dir=REAL_DATA, split="test"), test)


@pytest.mark.realdata
@needs("cifar10")
def test_real_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    """5,000 training images per class; the channel means 0.491, 0.482, 0.447 are the published ones."""
    train = data.cifar10(data_dir=REAL_DATA, standardise="channel")
    assert train.x.shape == (50_000, 32, 32, 3)
    assert np.bincount(train.y).tolist() == [5000] * 10
    np.testing.assert_allclose(train.mean.ravel() / 255, [0.4914, 0.4822, 0.4465], atol=1e-3)
    np.testing.assert_allclose(train.std.ravel() / 255, [0.2470, 0.2435, 0.2616], atol=2e-3)
    forbid_decoding(monkeypatch)
    assert same(data.cifar10(data_dir=REAL_DATA, standardise="channel"), train)


# --- files of one's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["", "a,b,c,label\n"])
def test_npz_and_csv_hold_the_same_data(header: str, tmp_path: Path, rng: np.random.Generator) -> None:
    x, y = rng.standard_normal((12, 3)), rng.integers(0, 3, 12)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    lines = "".join(",".join(map(repr, map(float, row))) + f",{label}\n" for row, label in zip(x, y, strict=True))
    (tmp_path / "d.csv").write_text(header + lines)
    first, second = (data.own(path=str(tmp_path / f"d.{kind}")) for kind in ("npz", "csv"))
    for one, other in zip(first[1:6], second[1:6], strict=True):
        np.testing.assert_array_equal(one, other)
    assert first.task == second.task == "multiclass"
    whole = data.from_arrays(x, y, standardise=True)
    np.testing.assert_array_equal(first.mean, whole.mean)
    assert len(data.own(path=str(tmp_path / "d.npz"), num_examples=5).y) == 5


def test_the_label_is_found_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("b,Label,a\n1.5,-1,2\n\n3,1,4\n")
    found = data.own(path=str(tmp_path / "d.csv"), standardise=False)
    np.testing.assert_array_equal(found.x, [[1.5, 2], [3, 4]])
    np.testing.assert_array_equal(found.y, [-1, 1])
    assert found.task == "binary"
    (tmp_path / "r.csv").write_text("1,0.5\n2,1\n")
    assert data.own(path=str(tmp_path / "r.csv")).task == "regression"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "there is no such file here"),
        ("d.txt", b"1,2", "must end in .npz or .csv"),
        ("d.csv", b"", "at least two numbers"),
        ("d.csv", b"a,b\n", "at least two numbers"),
        ("d.csv", b"1,2\n3\n", "row 2: 1 cells, where the first has 2"),
        ("d.csv", b"a,b\n1,x\n", "row 2: 'x' is no number"),
        ("d.csv", b"y,label\n1,2\n", "several columns may be the label: y, label"),
        ("d.csv", b"1,nan\n2,3\n", "non-finite"),
        ("d.csv", b"1,nan\n2,3\n", "d.csv: "),
        ("d.csv", b"0,1,2\n1,2,0\n3,4,1\n", "d.csv: the first line counts the columns, 0,1,2, as pandas"),
        ("d.csv", b"0,1\n1,0\n", "if it is an example, put a line of names before it"),
        ("d.csv", b",a,y\n0,1.5,1\n1,2.5,0\n", "d.csv: column 1 has no name; where it is the index"),
        ("d.csv", b",0,1\n0,1.5,1\n1,2.5,0\n", "column 1 has no name"),
        ("d.csv", b"Unnamed: 0,a,y\n0,1.5,1\n1,2.5,0\n", "df.to_csv(path, index=False)"),
        ("d.csv", b"a, ,y\n0,1.5,1\n1,2.5,0\n", "column 2 has no name"),
        ("d.csv", b"1_000,2,0\n3,4,1\n", "d.csv, row 1: '1_000' is no number."),
        ("d.csv", b"a,b,y\n1,2,0\n3,1_0,1\n", "d.csv, row 3: '1_0' is no number."),
        ("d.csv", "a,b,y\n1,2,0\n3,\u0661,1\n".encode(), "row 3: '\u0661' is no number."),
        ("d.csv", "\u0661,2,0\n3,1,1\n".encode(), "row 1: '\u0661' is no number."),
        ("d.csv", b"1.5,?,0\n3,4,1\n", "row 1: '?' is no number, and '1.5' no name of a column"),
        ("d.csv", b"1,NA,0\n3,4,1\n", "d.csv, row 1: 'NA' is no number; if it is a name, give the other columns names"),
        ("d.csv", b"True,2,0\n3,4,1\n", "d.csv, row 1: 'True' is no number"),
        ("d.csv", b"?, 2, 3\n3,4,1\n", "d.csv, row 1: '?' is no number"),
        ("d.csv", b"1,2,2147483648\n3,4,1\n", "d.csv: data set 'd': labels outside the classes"),
        ("d.csv", b"a;b;y\n1;2;0\n", "has semicolons: cells stand between commas"),
        ("d.csv", b"1,5;2,5;0\n1,5;2,5;1\n", "has semicolons: cells stand between commas"),
        ("d.csv", b"1\t2\t0\n3\t4\t1\n", "has tabs: cells stand between commas"),
        ("d.csv", "gr\u00f6\u00dfe,y\n1,0\n2,1\n".encode("latin-1"), "d.csv is no text in UTF-8"),
        ("d.csv", "a,y\n1,0\n2,1\n".encode("utf-16"), "d.csv is no text in UTF-8"),
        ("d.csv", b"a,y\n1,0\n" + b"2" * 140_000 + b",1\n", "d.csv, line 3: field larger than field limit"),
        ("d.npz", b"PK\x03\x04 cut", "no sound npz file"),
        ("d.npz", b"", "no sound npz file"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        data.own(path=str(tmp_path / name))


@pytest.mark.parametrize("head", ["0,1,label", "2019,2020,label", "a,b,c", '"x;1",x2,y'])
def test_names_of_columns_may_be_numbers_beside_a_name(head: str, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text(f"{head}\n1.5,2,0\n3,4,1\n")
    found = data.own(path=str(tmp_path / "d.csv"), standardise=False)
    np.testing.assert_array_equal(found.x, [[1.5, 2], [3, 4]])
    np.testing.assert_array_equal(found.y, [0, 1])


def test_an_npz_without_x_says_how_to_save_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", features=np.ones(3), y=np.ones(3))
    with pytest.raises(ValueError, match=r"holds features, y; save it as np.savez\(path, x=features, y=labels\)"):
        data.own(path=str(tmp_path / "d.npz"))


@pytest.mark.parametrize("objects", ["x", "y"])
def test_an_npz_of_objects_is_told_so(objects: str, tmp_path: Path, rng: np.random.Generator) -> None:
    arrays = {"x": rng.standard_normal((3, 2)), "y": np.arange(3)}
    np.savez(tmp_path / "d.npz", **arrays | {objects: arrays[objects].astype(object)})
    with pytest.raises(ValueError, match=r"d\.npz is no sound npz file of numbers: Object arrays cannot be loaded"):
        data.own(path=str(tmp_path / "d.npz"))


@pytest.mark.parametrize("standardise", [False, True])
def test_numbers_that_float32_does_not_tell_apart_are_refused(standardise: bool, rng: np.random.Generator) -> None:
    signs = np.asarray([-1, 1] * 8)
    times = np.stack([rng.standard_normal(16), 1.7e9 + rng.random(16)], axis=1)
    with pytest.raises(ValueError, match=r"x holds numbers .* subtract their mean"):
        data.from_arrays(times, signs, standardise=standardise)
    with pytest.raises(ValueError, match=r"y holds numbers .* subtract their mean"):
        data.from_arrays(times[:, :1], times[:, 1], standardise=standardise)
    data.from_arrays(times - times.mean(axis=0), signs, standardise=standardise)
    data.from_arrays(times[:, :1] + 1000, signs, standardise=standardise)
    data.from_arrays(np.full((16, 2), 1.7e9), signs, standardise=standardise)  # constant columns stay what they are


@pytest.mark.parametrize(("scale", "kind"), [(1e-50, np.float64), (1e-44, np.float64), (1e-44, np.float32)])
@pytest.mark.parametrize("standardise", [False, True])
def test_columns_that_float32_takes_for_0_are_refused(
    scale: float, kind: type, standardise: bool, rng: np.random.Generator
) -> None:
    x, signs = rng.standard_normal((16, 3)), np.asarray([-1, 1] * 8)
    small = (x * [1, scale, scale]).astype(kind)
    with pytest.raises(ValueError, match=r"x holds columns .* 2 of 3, first \[:, 1\]; scale them, or set them to 0"):
        data.from_arrays(small, signs, standardise=standardise)
    images = np.ones((16, 2, 2, 1)) * x[:, :1, None, None]
    images[:, 1, 0, 0] *= scale
    with pytest.raises(ValueError, match=r"1 of 4, first \[:, 1, 0, 0\]"):
        data.from_arrays(images, signs, standardise=standardise)
    small[:, 1:] = 0  # a column of zeros is one, and so is a small number beside others
    data.from_arrays(small, signs, standardise=standardise)
    x[3, 1] = scale
    data.from_arrays(x, signs, standardise=standardise)
