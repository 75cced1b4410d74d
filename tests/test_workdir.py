"""Records: whole files or none, run cards that tell the truth, metrics without gaps or repeats."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dualgap_jax import workdir as module
from dualgap_jax.files import load_json, save_json
from dualgap_jax.workdir import Terminated, Workdir, WorkdirError, default_workdir

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"model": {"branches": 10, "hidden": (8, 8)}, "rate": 0.1, "name": "x", "bias": True, "note": None}


def strict(text: str) -> Any:
    """JSON without Python's extensions NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content (None for folders)."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# --- Opening a workdir ------------------------------------------------------------------------------------------------


def test_a_new_workdir_holds_its_config_and_opens_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workdir = Workdir.open("a/b", CONFIG)
    assert workdir.path == tmp_path / "a" / "b"
    assert load_json(workdir.path / "config.json") == {
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
    return load_json(workdir.path / "run.json")


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
        from dualgap_jax.workdir import Workdir
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
    monkeypatch.setattr(module, "_process_mark", lambda pid: None)
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
