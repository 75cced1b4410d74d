"""Metrics without gaps or repeats, and what is said when rows are gone."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dualgap_jax.metrics import Metrics, read_metrics
from dualgap_jax.workdir import Workdir

CONFIG = {"rate": 0.1}


def strict(text: str) -> Any:
    """JSON without Python's extensions NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


# --- Metrics ----------------------------------------------------------------------------------------------------------


def test_each_row_is_one_line_of_strict_json_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "w" / "metrics.jsonl"
    with Metrics(path) as metrics:
        metrics.write(1, loss=np.float32(0.5), seed=2, phase="train")
        assert read_metrics(path) == [{"step": 1, "loss": 0.5, "seed": 2, "phase": "train"}]
        metrics.write(np.int64(2), loss=float("nan"), losses=jnp.asarray([1.0, np.inf]))
    rows = [strict(line) for line in path.read_text().splitlines()]
    assert rows[1] == {"step": 2, "loss": {"$float": "nan"}, "losses": [1.0, {"$float": "inf"}]}
    assert math.isnan(read_metrics(path)[1]["loss"])
    with Metrics(path) as metrics:
        metrics.write(3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    assert read_metrics(tmp_path / "missing") == []


def test_a_torn_last_line_is_dropped_and_the_next_row_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n'
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}]
    last = b'{"step": 3, "loss": 1.0}\n'
    for cut in range(len(last)):  # without its newline a line counts as torn, wherever it ends
        path.write_bytes(whole + last[:cut])
        assert read_metrics(path) == rows
        with Metrics(path) as metrics:
            metrics.write(3, loss=0.5)
        assert read_metrics(path) == [*rows, {"step": 3, "loss": 0.5}]
        assert path.read_bytes().startswith(whole)


def test_damaged_lines_inside_are_dropped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\0\n[1, 2]\n{"step": 2}\n\xff\xfe\n')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    with caplog.at_level(logging.WARNING, logger="dualgap_jax.metrics"):
        Metrics(path).close()
    assert "dropped 3" in caplog.text
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("damage", ["emptied", "deleted", "shortened", "changed"])
def test_rows_that_are_gone_are_spoken_of(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics(path) as metrics:
        for step in (1, 2, 3):
            metrics.write(step, loss=0.5)
    with caplog.at_level(logging.WARNING), Metrics(path) as metrics:
        assert metrics.truncate_after(2) == 1
    Metrics(path).close()
    assert caplog.text == ""
    content = path.read_bytes()
    if damage == "deleted":
        path.unlink()
    else:
        changed = content.replace(b"0.5", b"0.7", 1)
        path.write_bytes({"emptied": b"", "shortened": content.splitlines(True)[0], "changed": changed}[damage])
    with caplog.at_level(logging.WARNING):
        Metrics(path).close()
    left = {"emptied": 0, "deleted": 0, "shortened": 1, "changed": 2}[damage]
    assert f"2 rows had been written, {left} are there" in caplog.text
    caplog.clear()
    Metrics(path).close()
    assert caplog.text == ""


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_truncating_gives_what_an_unbroken_run_writes(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stop, end = int(rng.integers(5, 40)), 45
    restored = int(rng.integers(0, stop))

    def write(metrics: Metrics, first: int, last: int) -> None:
        for step in range(first, last):
            metrics.write(step, loss=1 / (step + 1))

    with Metrics(tmp_path / "straight.jsonl") as metrics:
        write(metrics, 0, end)
    with Metrics(tmp_path / "broken.jsonl") as metrics:
        write(metrics, 0, stop)
    with Metrics(tmp_path / "broken.jsonl") as metrics:
        assert metrics.truncate_after(restored) == stop - 1 - restored
        write(metrics, restored + 1, end)
    assert (tmp_path / "broken.jsonl").read_bytes() == (tmp_path / "straight.jsonl").read_bytes()


def test_truncating_touches_only_rows_that_match(tmp_path: Path) -> None:
    with Metrics(tmp_path / "m.jsonl") as metrics:
        for seed in (0, 1):
            for step in (1, 2, 3):
                metrics.write(step, seed=seed)
        metrics.write(9, phase="final")
        assert metrics.truncate_after(1, seed=np.int32(1)) == 2
        metrics.write(2, seed=1)
    rows = [(row["step"], row.get("seed")) for row in read_metrics(tmp_path / "m.jsonl")]
    assert rows == [(1, 0), (2, 0), (3, 0), (1, 1), (9, None), (2, 1)]


def test_a_bad_value_writes_no_row(tmp_path: Path) -> None:
    with Metrics(tmp_path / "m.jsonl") as metrics:
        with pytest.raises(TypeError, match=r"metrics\.loss is a set"):
            metrics.write(1, loss={1})
        metrics.write(2, loss=1)
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 2, "loss": 1}]


def read_events(folder: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of every scalar, from the TFRecord framing; a restart drops what TensorBoard drops."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    scalars: list[tuple[int, str, float]] = []
    for file in sorted(folder.iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):
            length = int.from_bytes(content[at : at + 8], "little")
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            if event.session_log.status == event.session_log.START:
                scalars = [row for row in scalars if row[0] < event.step]
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            at += 12 + length + 4
    return scalars


def test_event_files_hold_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    workdir = Workdir.open(tmp_path / "w", CONFIG)
    with workdir.metrics(tensorboard=True) as metrics:
        metrics.write(4, loss=0.5, losses=[1.0, 2.0], phase="train")
        metrics.write(8, loss=0.25)
    assert read_events(tmp_path / "w" / "tensorboard") == [
        (4, "loss", 0.5),
        (4, "losses/0", 1.0),
        (4, "losses/1", 2.0),
        (8, "loss", 0.25),
    ]
    with workdir.metrics() as metrics:
        metrics.write(12, loss=0.125)
    assert len(read_events(tmp_path / "w" / "tensorboard")) == 4
    assert len(read_metrics(workdir.path / "metrics.jsonl")) == 3


@pytest.mark.parametrize("reopened", [False, True])
def test_event_files_are_purged_as_the_rows_are(tmp_path: Path, reopened: bool) -> None:
    pytest.importorskip("tensorboardX")
    metrics = Metrics(tmp_path / "m.jsonl", tmp_path / "t")
    for step in (1, 2, 3):
        metrics.write(step, loss=float(step))
    if reopened:
        metrics.close()
        metrics = Metrics(tmp_path / "m.jsonl", tmp_path / "t")
    metrics.truncate_after(1)
    metrics.write(2, loss=20.0)
    metrics.close()
    assert [row["loss"] for row in read_metrics(tmp_path / "m.jsonl")] == [1.0, 20.0]
    assert read_events(tmp_path / "t") == [(1, "loss", 1.0), (2, "loss", 20.0)]


def test_without_tensorboardx_the_json_lines_are_still_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with (
        caplog.at_level(logging.WARNING, logger="dualgap_jax.metrics"),
        Metrics(tmp_path / "m", tmp_path / "t") as metrics,
    ):
        metrics.write(1, loss=1)
        metrics.write(2, loss=1)
    assert len(read_metrics(tmp_path / "m")) == 2
    assert caplog.text.count("tensorboardX is not installed") == 1
    assert not (tmp_path / "t").exists()
