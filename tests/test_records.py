"""Records: whole files or none, run cards that tell the truth, metrics without gaps or repeats."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import logging
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualgap_jax import records
from dualgap_jax.records import (
    Metrics,
    Progress,
    Terminated,
    Workdir,
    WorkdirError,
    default_workdir,
    jsonable,
    load_json,
    load_npz,
    read_metrics,
    save_json,
    save_npz,
)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"model": {"branches": 10, "hidden": (8, 8)}, "rate": 0.1, "name": "x", "bias": True, "note": None}


class Score(NamedTuple):
    value: float
    unit: str


@dataclasses.dataclass(frozen=True)
class Summary:
    score: Score
    best: np.floating


def strict(text: str) -> Any:
    """JSON without Python's extensions NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content (None for folders)."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# --- JSON and npz -----------------------------------------------------------------------------------------------------


def test_json_holds_numpy_jax_tuples_and_records(tmp_path: Path) -> None:
    value = {
        "f32": np.float32(0.1),
        "i": np.int64(3),
        "b": np.bool_(True),
        "array": np.arange(6).reshape(2, 3),
        "jax": jnp.asarray([1.5, 2.5], jnp.bfloat16),
        "scalar": jnp.asarray(7),
        "summary": Summary(Score(0.25, "loss"), np.float64(2.0)),
        "tuple": (1, (2, 3)),
        "path": Path("a/b"),
        "text": "τ",
        3: None,
    }
    save_json(tmp_path / "deep" / "x.json", value)
    assert load_json(tmp_path / "deep" / "x.json") == {
        "f32": float(np.float32(0.1)),
        "i": 3,
        "b": True,
        "array": [[0, 1, 2], [3, 4, 5]],
        "jax": [1.5, 2.5],
        "scalar": 7,
        "summary": {"score": {"value": 0.25, "unit": "loss"}, "best": 2.0},
        "tuple": [1, [2, 3]],
        "path": "a/b",
        "text": "τ",
        "3": None,
    }


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    value = {"a": float("nan"), "b": [np.inf, 1.0], "c": np.array([[-np.inf, 2.0]]), "d": np.float32("nan")}
    save_json(tmp_path / "x.json", value)
    assert strict((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1.0], "c": [[None, 2.0]], "d": None}
    assert jsonable([np.inf], null_non_finite=False) == [float("inf")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": {1, 2}}}, r"value\.a\.b is a set"),
        ({"a": [0, b"x"]}, r"value\.a\[1\] is a bytes"),
        ({"a": 1j}, r"value\.a is a complex"),
        ({(1, 2): 0}, r"key \(1, 2\)"),
        ({"f": test_non_finite_numbers_become_null}, r"value\.f is a function"),
    ],
)
def test_what_json_cannot_hold_is_named_and_the_old_file_stays(tmp_path: Path, value: Any, message: str) -> None:
    save_json(tmp_path / "x.json", [1])
    before = listing(tmp_path)
    with pytest.raises(TypeError, match=message):
        save_json(tmp_path / "x.json", value)
    assert listing(tmp_path) == before


def test_npz_keeps_every_bit(tmp_path: Path, rng: np.random.Generator) -> None:
    loss = rng.normal(size=(3, 5))
    loss[1, 2], loss[0, 0], loss[2, 4] = np.nan, np.inf, -0.0
    arrays = {"loss": loss, "done": loss > 0, "xs": rng.normal(size=5).astype(np.float32), "n": np.int32(4)}
    save_npz(tmp_path / "r" / "x.npz", **arrays, device=jnp.arange(3))
    got = load_npz(tmp_path / "r" / "x.npz")
    assert set(got) == {*arrays, "device"}
    for name, want in arrays.items():
        assert (got[name].dtype, got[name].shape) == (np.asarray(want).dtype, np.asarray(want).shape)
        assert got[name].tobytes() == np.asarray(want).tobytes()
    np.testing.assert_array_equal(got["device"], [0, 1, 2])


def test_npz_refuses_what_it_would_lose(tmp_path: Path) -> None:
    for bad in (np.array([None]), jnp.zeros(3, jnp.bfloat16)):
        with pytest.raises(TypeError, match="'bad' has dtype"):
            save_npz(tmp_path / "x.npz", bad=bad)
    assert listing(tmp_path) == {}


def test_damaged_files_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "x.json").write_text('{"a": 1')
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON"):
        load_json(tmp_path / "x.json")
    save_npz(tmp_path / "x.npz", a=rng.normal(size=1000))
    whole = (tmp_path / "x.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[: len(whole) // 2], bytes(flipped), b"", b"text"):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz is not a readable npz file"):
            load_npz(tmp_path / "x.npz")
    for load in (load_json, load_npz):
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "missing")


def test_a_write_that_fails_halfway_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_npz(tmp_path / "x.npz", a=np.arange(3))
    before = listing(tmp_path)

    def torn(file: io.BytesIO, **kwargs: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", torn)
    with pytest.raises(OSError, match="No space"):
        save_npz(tmp_path / "x.npz", a=np.arange(9))
    assert listing(tmp_path) == before


def test_a_reader_sees_the_old_or_the_new_file_and_never_a_part(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    save_json(path, [0] * 20_000)
    seen, stop = [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(set(load_json(path)))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(1, 15):
        save_json(path, [i] * 20_000)
    stop.set()
    reader.join()
    assert seen
    assert all(len(values) == 1 for values in seen)


# --- Metrics ----------------------------------------------------------------------------------------------------------


def test_each_row_is_one_line_of_strict_json_readable_at_once(tmp_path: Path) -> None:
    path = tmp_path / "w" / "metrics.jsonl"
    with Metrics(path) as metrics:
        metrics.write(1, loss=np.float32(0.5), seed=2, phase="train")
        assert read_metrics(path) == [{"step": 1, "loss": 0.5, "seed": 2, "phase": "train"}]
        metrics.write(np.int64(2), loss=float("nan"), losses=jnp.asarray([1.0, np.inf]))
    rows = [strict(line) for line in path.read_text().splitlines()]
    assert rows[1] == {"step": 2, "loss": None, "losses": [1.0, None]}
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
    with caplog.at_level(logging.WARNING, logger="dualgap_jax.records"):
        Metrics(path).close()
    assert "dropped 3" in caplog.text
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


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
        caplog.at_level(logging.WARNING, logger="dualgap_jax.records"),
        Metrics(tmp_path / "m", tmp_path / "t") as metrics,
    ):
        metrics.write(1, loss=1)
        metrics.write(2, loss=1)
    assert len(read_metrics(tmp_path / "m")) == 2
    assert caplog.text.count("tensorboardX is not installed") == 1
    assert not (tmp_path / "t").exists()


# --- Progress ---------------------------------------------------------------------------------------------------------


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "steps") as progress:
        progress.update(10, "loss 1")
    assert capsys.readouterr().err == ""


def test_progress_draws_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    control, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress(200, "points", done=50) as progress:
            for done in range(51, 201):
                progress.update(done, note=f"loss {done}")
    drawn = ""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(control, 100_000).decode():
            drawn += part
    os.close(control)
    assert drawn.count("\n") == 1
    assert drawn.endswith("\n")
    last = drawn.split("\r\x1b[K")[-1]
    assert last.startswith("points: 200/200")
    assert "loss 200" in last
    assert len(drawn.split("\r\x1b[K")) < 50


# --- Opening a workdir ------------------------------------------------------------------------------------------------


def test_a_new_workdir_holds_its_config_and_opens_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workdir = Workdir.open("a/b", CONFIG)
    assert workdir.path == tmp_path / "a" / "b"
    assert strict((workdir.path / "config.json").read_text()) == {
        "model": {"branches": 10, "hidden": [8, 8]},
        "rate": 0.1,
        "name": "x",
        "bias": True,
        "note": None,
    }
    assert listing(workdir.path).keys() == {"config.json"}
    assert workdir.status is None
    for name in ("results", "figures", "checkpoints"):
        folder = getattr(workdir, name)
        assert folder == workdir.path / name
        assert folder.is_dir()
    before = listing(workdir.path)
    reordered = {name: CONFIG[name] for name in reversed(CONFIG)}
    assert Workdir.open(tmp_path / "a" / "b", reordered).config == workdir.config
    assert listing(workdir.path) == before


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    assert Workdir.open(tmp_path / "w", CONFIG).status is None
    # So is one where the process was killed while it wrote its first file.
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / ".config.json.123.tmp").write_text("{")
    assert Workdir.open(tmp_path / "v", CONFIG).status is None


def test_another_config_is_refused_with_every_difference_shown(tmp_path: Path) -> None:
    Workdir.open(tmp_path / "w", CONFIG)
    before = listing(tmp_path)
    other = {"model": {"branches": 30, "hidden": (8, 8)}, "rate": 0.1, "name": "x", "bias": 1, "extra": {"k": "v"}}
    with pytest.raises(WorkdirError) as caught:
        Workdir.open(tmp_path / "w", other)
    message = str(caught.value)
    assert [line.strip() for line in message.splitlines() if line.startswith("  ")] == [
        "bias: true there, 1 asked for",
        'extra.k: (absent) there, "v" asked for',
        "model.branches: 10 there, 30 asked for",
        "note: null there, (absent) asked for",
    ]
    assert str(tmp_path / "w") in message
    assert "--workdir" in message
    assert listing(tmp_path) == before


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.tex").write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(WorkdirError, match=r"no config\.json .*thesis\.tex.*--workdir"):
        Workdir.open(tmp_path / "w", CONFIG)
    assert listing(tmp_path) == before


def test_files_in_the_way_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WorkdirError, match="is a file"):
        Workdir.open(tmp_path / "file", CONFIG)
    with pytest.raises(WorkdirError, match=r"cannot write in .*NotADirectoryError.*--workdir"):
        Workdir.open(tmp_path / "file" / "below", CONFIG)
    assert listing(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("content", ['{"a": ', "[1, 2]"])
def test_a_damaged_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(WorkdirError, match=r"config\.json"):
        Workdir.open(tmp_path, CONFIG)
    assert (tmp_path / "config.json").read_text() == content


def test_a_folder_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(WorkdirError, match=r"cannot write in /proc/dualgap .*--workdir"):  # from root neither
        Workdir.open("/proc/dualgap", CONFIG)


@pytest.mark.parametrize("filled", [False, True])
def test_a_read_only_file_system_is_refused(tmp_path: Path, filled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if filled:
        Workdir.open(tmp_path, CONFIG)

    def read_only(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    before = listing(tmp_path)
    with pytest.raises(WorkdirError, match=r"cannot write in .*Read-only file system.*--workdir"):
        Workdir.open(tmp_path, CONFIG)
    assert listing(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("filled", [False, True])
def test_a_read_only_folder_is_refused(tmp_path: Path, filled: bool) -> None:
    folder = tmp_path / "w"
    folder.mkdir()
    if filled:
        Workdir.open(folder, CONFIG)
    folder.chmod(0o555)
    try:
        with pytest.raises(WorkdirError, match=r"cannot write in .*Permission denied.*--workdir"):
            Workdir.open(folder, CONFIG)
    finally:
        folder.chmod(0o755)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"a": {"b": float("inf")}}, ValueError, r"config\.a\.b is inf"),
        ({"a": [1.0, float("nan")]}, ValueError, r"config\.a is"),
        ({"a": {1, 2}}, TypeError, r"config\.a is a set"),
    ],
)
def test_a_config_that_json_cannot_hold_is_refused(
    tmp_path: Path, config: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Workdir.open(tmp_path / "w", config)
    assert listing(tmp_path) == {}


def test_the_default_folder_follows_the_config_and_nothing_else(tmp_path: Path) -> None:
    path = default_workdir("runs", "mnist", CONFIG)
    assert path.parent == Path("runs")
    name, _, digits = path.name.rpartition("-")
    assert name == "mnist"
    assert len(digits) == 8
    assert set(digits) <= set("0123456789abcdef")
    assert default_workdir("runs", "mnist", dict(reversed(CONFIG.items()))) == path
    assert default_workdir("runs", "mnist", json.loads(json.dumps(CONFIG))) == path
    others = [CONFIG | {"rate": 0.2}, CONFIG | {"bias": 1}, CONFIG | {"model": {}}, CONFIG | {"new": None}]
    assert len({default_workdir("runs", "mnist", config) for config in [CONFIG, *others]}) == 5
    # The canonical form, spelled out: sorted keys, no spaces.
    spelled = hashlib.sha256(b'{"a":{"c":true},"b":[1,2]}').hexdigest()[:8]
    assert default_workdir("runs", "x", {"b": (1, 2), "a": {"c": True}}).name == f"x-{spelled}"
    for bad in ("", "a/b"):
        with pytest.raises(ValueError, match="cannot name a folder"):
            default_workdir("runs", bad, CONFIG)


# --- Sessions ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def workdir(tmp_path: Path) -> Workdir:
    return Workdir.open(tmp_path / "w", CONFIG, command=("python", "run.py", "--config=a b.py"))


def card(workdir: Workdir) -> dict[str, Any]:
    return strict((workdir.path / "run.json").read_text())


def test_the_run_card_of_a_complete_run(workdir: Workdir) -> None:
    before = datetime.now(UTC)
    with workdir.session() as run:
        inside = card(workdir)
        assert (inside["status"], inside["end"]) == ("running", None)
        run.note(images=3)
        run.note(checksum="ab")
        assert card(workdir)["notes"] == {"images": 3, "checksum": "ab"}
    record = card(workdir)
    assert workdir.status == record["status"] == "complete"
    assert record["reason"] is None
    assert record["command"] == "python run.py '--config=a b.py'"
    assert record["notes"] == {"images": 3, "checksum": "ab"}
    assert record["packages"]["jax"] == jax.__version__
    assert record["packages"]["numpy"] == np.__version__
    assert set(record["packages"]) == {
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "tensorflow-datasets",
        "ml-collections",
        "numpy",
    }
    assert record["python"] == sys.version.split()[0]
    assert sum(device["count"] for device in record["devices"]) == jax.device_count()
    assert record["devices"][0]["platform"] == jax.devices()[0].platform
    assert record["attempts"] == []
    start, end = (datetime.fromisoformat(record[name]) for name in ("start", "end"))
    assert start.utcoffset() == timedelta(0)
    assert before.replace(microsecond=0) <= start <= end <= datetime.now(UTC)
    assert 0 <= record["seconds"] <= (datetime.now(UTC) - before).total_seconds()


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ZeroDivisionError("by nothing"), "failed", "ZeroDivisionError: by nothing"),
        (SystemExit(3), "failed", "SystemExit: 3"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
    ],
)
def test_an_exception_is_recorded_and_propagates(
    workdir: Workdir, error: BaseException, status: str, reason: str
) -> None:
    with pytest.raises(type(error)) as caught, workdir.session():
        raise error
    assert caught.value is error
    assert (card(workdir)["status"], card(workdir)["reason"]) == (status, reason)
    assert workdir.status == status
    assert card(workdir)["end"] is not None


def test_sigterm_interrupts_and_the_handler_is_put_back(workdir: Workdir) -> None:
    def mine(signum: int, frame: object) -> None:
        raise AssertionError("the handler of the test was called inside a session")

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with pytest.raises(Terminated), workdir.session():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (card(workdir)["status"], card(workdir)["reason"]) == ("interrupted", "SIGTERM")


def test_a_session_works_in_another_thread(workdir: Workdir) -> None:
    def work() -> None:
        with workdir.session():
            pass

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert workdir.status == "complete"


def test_earlier_attempts_are_kept(workdir: Workdir) -> None:
    for error in (ValueError("one"), KeyboardInterrupt(), None):
        try:
            with workdir.session():
                if error is not None:
                    raise error
        except (ValueError, KeyboardInterrupt):
            pass
    attempts = card(workdir)["attempts"]
    assert [(a["status"], a["reason"]) for a in attempts] == [
        ("failed", "ValueError: one"),
        ("interrupted", "KeyboardInterrupt"),
    ]
    assert all(a["start"] <= a["end"] and a["command"].startswith("python run.py") for a in attempts)
    assert workdir.status == "complete"


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**arguments(script), capture_output=True, timeout=60)


def arguments(script: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return {"args": [sys.executable, "-c", textwrap.dedent(script)], "env": environment, "text": True}


@pytest.fixture
def worker(workdir: Workdir) -> Iterator[subprocess.Popen[str]]:
    """Another process with an open session in `workdir`."""
    script = f"""
        import signal, time
        from dualgap_jax.records import Workdir
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit that it is ignored
        with Workdir.open({str(workdir.path)!r}, {CONFIG!r}).session():
            print("ready", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen(**arguments(script), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "KeyboardInterrupt"), (signal.SIGKILL, None)]
)
def test_a_process_at_work_is_respected_and_its_end_noticed(
    workdir: Workdir, worker: subprocess.Popen[str], number: signal.Signals, reason: str | None
) -> None:
    assert workdir.status == "running"
    with pytest.raises(WorkdirError, match=rf"process {worker.pid} is at work in .*--workdir"):
        Workdir.open(workdir.path, CONFIG)
    with pytest.raises(WorkdirError, match=rf"process {worker.pid} is at work"), workdir.session():
        raise AssertionError("two sessions at once")
    assert workdir.status == "running"
    worker.send_signal(number)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # ended, but not yet waited for: a zombie
    assert workdir.status == "interrupted"
    worker.wait(timeout=30)
    assert workdir.status == "interrupted"
    assert card(workdir)["reason"] == reason
    with Workdir.open(workdir.path, CONFIG).session():
        pass
    assert workdir.status == "complete"
    (attempt,) = card(workdir)["attempts"]
    assert attempt["status"] == "interrupted"
    assert attempt["reason"] == (reason or "the process ended without a report")


def test_a_pid_given_to_another_process_does_not_count_as_alive(workdir: Workdir) -> None:
    with workdir.session():
        assert workdir.status == "running"
        record = card(workdir)
    assert record["process"]["pid"] == os.getpid()
    for mark, status in ((record["process"]["mark"] + "0", "interrupted"), (record["process"]["mark"], "running")):
        save_json(workdir.path / "run.json", record | {"process": {"pid": os.getpid(), "mark": mark}})
        assert workdir.status == status


def test_without_proc_the_pid_alone_decides(workdir: Workdir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_process_mark", lambda pid: None)
    with workdir.session():
        assert workdir.status == "running"
        record = card(workdir)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    save_json(workdir.path / "run.json", record | {"process": {"pid": ended.pid, "mark": None}})
    assert workdir.status == "interrupted"


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_run_card_is_named(workdir: Workdir, content: str) -> None:
    (workdir.path / "run.json").write_text(content)
    for use in (lambda: workdir.status, lambda: Workdir.open(workdir.path, CONFIG)):
        with pytest.raises(WorkdirError, match=r"run\.json"):
            use()


def test_the_commit_is_that_of_the_package_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the module in a repository of its own: untracked, committed, changed, and without git."""
    repository = tmp_path / "repository"
    module = repository / "package" / "records.py"
    module.parent.mkdir(parents=True)
    shutil.copy(records.__file__, module)
    monkeypatch.setattr(records, "__file__", str(module))

    def git(*command: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", *who, *command], cwd=repository, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "none")
    assert records._git_state() is None
    git("add", ".")
    git("commit", "-m", "one")
    assert records._git_state() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    module.write_text("")
    assert records._git_state() == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert records._git_state() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the system says nothing better")
def test_peak_memory_is_that_of_the_process_itself_and_not_of_what_started_it() -> None:
    """`ru_maxrss` of a new program starts at that of its parent; a peak stays when the memory is given back."""
    held = np.ones(400 * 2**20, np.uint8)
    source = """
        import numpy as np
        from dualgap_jax.records import peak_memory
        before = peak_memory()
        np.ones(100 * 2**20, np.uint8)
        print(before, peak_memory())
    """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    before, after = map(int, done.stdout.split())
    own = records.peak_memory()
    assert own is not None
    assert own > held.nbytes
    assert 90 * 2**20 < after - before < 110 * 2**20
    assert after < held.nbytes
