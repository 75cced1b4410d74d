"""Workdirs: whose they are, one process at a time, what a run goes on from, and cards that tell the truth."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from dualgap_jax import card as cards
from dualgap_jax import lock, machine
from dualgap_jax.files import load_json, save_json
from dualgap_jax.interrupts import Terminated
from dualgap_jax.workdir import Workdir, WorkdirError, default_workdir

pytestmark = pytest.mark.usefixtures("children_share_programs")
ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "experiment": "mine",
    "model": {"branches": 10, "hidden": (8, 8)},
    "rate": 0.1,
    "name": "x",
    "bias": True,
    "note": None,
}


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content (None for folders)."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def made(path: Path, config: dict[str, Any] = CONFIG) -> Workdir:
    """A workdir with one complete session behind it."""
    workdir = Workdir.open(path, config)
    with workdir.session():
        pass
    return workdir


# --- Opening a workdir ------------------------------------------------------------------------------------------------


def test_a_new_workdir_is_made_by_its_session_and_opens_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workdir = Workdir.open("a/b", CONFIG)
    assert workdir.path == tmp_path / "a" / "b"
    assert listing(tmp_path) == {}
    assert workdir.status is None
    with workdir.session():
        assert load_json(workdir.path / "config.json") == {
            "experiment": "mine",
            "model": {"branches": 10, "hidden": [8, 8]},
            "rate": 0.1,
            "name": "x",
            "bias": True,
            "note": None,
        }
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
    made(tmp_path / "w")
    # So is one where the process was killed while it wrote its first file.
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / ".config.json.123-0.tmp").write_text("{")
    made(tmp_path / "v")
    assert not list((tmp_path / "v").glob(".*.tmp"))


def test_another_config_is_refused_with_every_difference_shown(tmp_path: Path) -> None:
    made(tmp_path / "w")
    before = listing(tmp_path)
    other = {
        "experiment": "mine",
        "model": {"branches": 30, "hidden": (8, 8)},
        "rate": 0.1,
        "name": "x",
        "bias": 1,
        "extra": {"k": "v"},
    }
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


def test_another_experiment_is_refused_by_name(tmp_path: Path) -> None:
    made(tmp_path / "w")
    with pytest.raises(WorkdirError, match=r"holds a run of experiment 'mine', not 'yours'"):
        Workdir.open(tmp_path / "w", {**CONFIG, "experiment": "yours"})


def test_a_folder_whose_run_was_refused_before_it_made_anything_takes_the_corrected_config(tmp_path: Path) -> None:
    for wrong in ({**CONFIG, "rate": -1.0}, {**CONFIG, "rate": -2.0}):
        workdir = Workdir.open(tmp_path / "w", wrong)
        with pytest.raises(ValueError, match="rate"), workdir.session(), workdir.metrics():
            raise ValueError("the rate must be positive")
    workdir = made(tmp_path / "w")
    assert load_json(tmp_path / "w" / "config.json")["rate"] == 0.1
    assert load_json(tmp_path / "w" / "run.json")["attempts"] == []
    # But not once there is something to lose.
    kept = Workdir.open(tmp_path / "v", {**CONFIG, "rate": -1.0})
    with pytest.raises(ValueError, match="late"), kept.session():  # noqa: PT012
        save_json(kept.results / "x.json", {"a": 1})
        raise ValueError("late")
    with pytest.raises(WorkdirError, match=r"rate: -1\.0 there, 0.1 asked for"):
        Workdir.open(tmp_path / "v", CONFIG)
    assert workdir.status == "complete"


def test_a_folder_whose_first_part_was_refused_takes_the_corrected_config(tmp_path: Path) -> None:
    def refused(after: bool) -> None:
        whole = Workdir.open(tmp_path / "w", {**CONFIG, "rate": -1.0})
        part = Workdir.open(tmp_path / "w" / "I_10", {**CONFIG, "part": -1.0})
        with pytest.raises(ValueError, match="rate"), whole.session(), part.session(), part.metrics():  # noqa: PT012
            if after:
                save_json(part.results / "x.json", {"a": 1})
            raise ValueError("the rate must be positive")

    refused(after=False)
    Workdir.open(tmp_path / "w", CONFIG)
    refused(after=True)
    with pytest.raises(WorkdirError, match=r"rate: -1\.0 there, 0.1 asked for"):
        Workdir.open(tmp_path / "w", CONFIG)


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.tex").write_text("mine")
    before = listing(tmp_path)
    with pytest.raises(WorkdirError, match=r"no config\.json .*thesis\.tex.*--workdir"):
        Workdir.open(tmp_path / "w", CONFIG)
    assert listing(tmp_path) == before


def test_files_in_the_way_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WorkdirError, match="is a file"):
        Workdir.open(tmp_path / "file", CONFIG)
    with pytest.raises(WorkdirError, match=r"cannot write in .*NotADirectoryError.*--workdir"):
        made(tmp_path / "file" / "below")
    with pytest.raises(WorkdirError, match="file is a file"):
        Workdir.open(tmp_path / "file" / "below" / "it", CONFIG)
    assert not caplog.records  # nothing there is damaged
    with pytest.raises(WorkdirError, match="cannot be read"):
        Workdir.open("a\0b", CONFIG)
    assert listing(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("content", ['{"a": ', "[1, 2]", "", '{"experiment": "mine"}'])
def test_a_damaged_config_is_refused_unless_the_run_card_knows_the_folder(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    made(tmp_path / "w")
    (tmp_path / "w" / "config.json").write_text(content)
    with pytest.raises(WorkdirError, match=r"config\.json"):
        Workdir.open(tmp_path / "w", {**CONFIG, "rate": 0.2})
    assert (tmp_path / "w" / "config.json").read_text() == content
    with caplog.at_level(logging.WARNING):
        made(tmp_path / "w")
    assert "config.json" in caplog.text
    assert load_json(tmp_path / "w" / "config.json")["rate"] == 0.1
    (tmp_path / "w" / "config.json").write_text(content)
    (tmp_path / "w" / "run.json").unlink()
    with pytest.raises(WorkdirError, match=r"config\.json"):
        Workdir.open(tmp_path / "w", CONFIG)


def test_a_folder_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(WorkdirError, match=r"cannot write in /proc/dualgap .*--workdir"):  # from root neither
        made(Path("/proc/dualgap"))


def test_a_read_only_folder_can_be_read_and_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path / "w")
    before = listing(tmp_path)

    def read_only(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(lock.os, "open", read_only)
    workdir = Workdir.open(tmp_path / "w", CONFIG)
    assert workdir.damaged() == []
    with pytest.raises(WorkdirError, match=r"cannot write in .*Read-only file system.*--workdir"), workdir.session():
        raise AssertionError
    assert listing(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_to_write_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    folder.mkdir()
    folder.chmod(0o555)
    try:
        with pytest.raises(WorkdirError, match=r"cannot write in .*Permission denied.*--workdir"):
            made(folder)
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
    with workdir.session():
        inside = card(workdir)
        assert (inside["status"], inside["end"]) == ("running", None)
        (workdir.results / "x.json").write_text("x")
        (workdir.figures / "x.png").write_text("y")
        (workdir.path / "cell" / "results").mkdir(parents=True)
        (workdir.path / "cell" / "results" / "z").write_text("z")
        (workdir.checkpoints / "results").write_text("not a result")
    record = card(workdir)
    assert workdir.status == record["status"] == "complete"
    assert record["reason"] is None
    assert record["command"] == "python run.py '--config=a b.py'"
    assert record["files"] == {
        name: hashlib.sha256(text).hexdigest()
        for name, text in (("results/x.json", b"x"), ("figures/x.png", b"y"), ("cell/results/z", b"z"))
    }
    assert record["packages"]["jax"] == jax.__version__
    assert record["packages"]["numpy"] == np.__version__
    assert set(record["packages"]) == set(machine.PACKAGES)
    assert record["python"] == sys.version.split()[0]
    assert sum(device["count"] for device in record["devices"]) == jax.device_count()
    assert record["devices"][0]["platform"] == jax.devices()[0].platform
    assert record["attempts"] == []
    start, end = (datetime.fromisoformat(record[name]) for name in ("start", "end"))
    assert start.utcoffset() == timedelta(0)
    assert before.replace(microsecond=0) <= start <= end <= datetime.now(UTC)
    assert 0 <= record["seconds"] <= (datetime.now(UTC) - before).total_seconds()


def test_what_is_gone_or_changed_of_a_complete_run_is_named(workdir: Workdir) -> None:
    assert workdir.damaged() is None
    with workdir.session():
        assert workdir.damaged() is None
        for name in ("a", "b", "c"):
            (workdir.results / name).write_text(name)
    assert workdir.damaged() == []
    (workdir.results / "a").write_text("A")
    (workdir.results / "b").unlink()
    (workdir.results / "c").unlink()
    (workdir.results / "c").mkdir()
    assert workdir.damaged() == ["results/a", "results/b", "results/c"]
    (workdir.path / "run.json").write_text("{}")
    assert workdir.damaged() is None


def test_figures_are_repaired_under_the_lock(workdir: Workdir) -> None:
    with workdir.session():
        (workdir.figures / "a").write_text("a")
    with workdir.repair():
        (workdir.figures / "a").write_text("b")
        with pytest.raises(WorkdirError, match="is at work"), workdir.repair():
            raise AssertionError
    assert workdir.damaged() == []
    assert workdir.status == "complete"


def test_what_is_damaged_is_not_vouched_for_by_a_repair(workdir: Workdir) -> None:
    with workdir.session():
        (workdir.results / "a").write_text("a")
        (workdir.results / "b").write_text("b")
    (workdir.results / "a").write_text("another")
    (workdir.results / "b").unlink()
    with workdir.repair():
        (workdir.results / "c").write_text("c")
    assert workdir.damaged() == ["results/a", "results/b"]
    (workdir.results / "c").write_text("C")
    assert workdir.damaged() == ["results/a", "results/b", "results/c"]


def test_the_card_and_the_results_of_another_run_are_not_taken_over(workdir: Workdir, tmp_path: Path) -> None:
    other = Workdir.open(tmp_path / "other", {"experiment": "toy", "n": 7})
    for each in (workdir, other):
        with each.session():
            (each.results / "a").write_text(each.path.name)
    shutil.copy(other.path / "run.json", workdir.path)
    shutil.copytree(other.results, workdir.results, dirs_exist_ok=True)
    assert workdir.damaged() is None
    assert workdir.status is None


def test_a_link_to_nowhere_among_the_results_ends_no_run(workdir: Workdir) -> None:
    with workdir.session():
        (workdir.results / "a").write_text("a")
        (workdir.results / "b").symlink_to("nowhere")
    assert workdir.status == "complete"
    assert workdir.damaged() == []


def test_inputs_are_compared_after_the_run_too(workdir: Workdir) -> None:
    with workdir.session():
        workdir.confirm("data", {"digest": "1"})
    workdir.confirm("data", {"digest": "1"})
    with pytest.raises(WorkdirError, match="the data are not those"):
        workdir.confirm("data", {"digest": "2"})


def test_a_part_in_the_place_of_another_is_computed_again(workdir: Workdir, caplog: pytest.LogCaptureFixture) -> None:
    with workdir.session():
        for name in ("one", "two"):
            workdir.keep(name, {"name": name})
        shutil.copy(workdir.path / "parts" / "one.npz", workdir.path / "parts" / "two.npz")
        assert workdir.remember("two", lambda: {"name": "two"}) == {"name": "two"}
        assert "another part" in caplog.text
        workdir.forget("one")
        workdir.forget("one")
        assert workdir.recall("one") is None


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


def test_a_second_signal_while_the_card_is_written_waits(workdir: Workdir, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cards.RunCard.end

    def end(self: Any, **fields: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        real(self, **fields)

    monkeypatch.setattr(cards.RunCard, "end", end)
    with pytest.raises(KeyboardInterrupt), workdir.session():
        signal.raise_signal(signal.SIGTERM)
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
    with pytest.raises(WorkdirError, match=rf"process {worker.pid} on .* is at work in .*--workdir"), workdir.session():
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


@pytest.mark.parametrize("content", ["{", "[]", "{}", "", '{"status": "complete"}'])
def test_a_damaged_run_card_is_said_and_the_run_goes_on(
    workdir: Workdir, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    made(workdir.path)
    (workdir.path / "run.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert workdir.damaged() is None
        assert workdir.status is None
    assert "run.json" in caplog.text
    assert made(workdir.path).damaged() == []


@pytest.mark.parametrize("key", sorted(cards._KEYS))
def test_a_card_of_another_version_is_said_and_the_run_goes_on(
    workdir: Workdir, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    made(workdir.path)
    record = card(workdir)
    del record[key]
    save_json(workdir.path / "run.json", record)
    with caplog.at_level(logging.WARNING):
        assert workdir.damaged() is None
    assert "not the run card of this version" in caplog.text
    made(workdir.path)


def test_another_commit_or_version_of_jax_is_said(workdir: Workdir, caplog: pytest.LogCaptureFixture) -> None:
    made(workdir.path)
    record = card(workdir)
    record["packages"]["jax"], record["git"] = "0.1.2", {"commit": "abc", "dirty": False}
    save_json(workdir.path / "run.json", record)
    with caplog.at_level(logging.WARNING):
        made(workdir.path)
    assert f"begun with jax 0.1.2, goes on with {jax.__version__}" in caplog.text
    assert "begun with commit abc" in caplog.text
    caplog.clear()
    made(workdir.path)
    assert caplog.text == ""


# --- What a run goes on from ------------------------------------------------------------------------------------------


class Part(NamedTuple):
    x: np.ndarray
    share: float
    rows: tuple[dict[str, Any], ...]


def test_a_part_is_computed_once_and_comes_back_bit_for_bit(workdir: Workdir, rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 4))
    x[0, 0], x[1, 1] = np.nan, np.inf
    part = Part(x, float("nan"), ({"n": np.int64(3), "loss": np.float32(0.1)}, {"n": 4, "loss": float("inf")}))
    calls: list[int] = []

    def compute() -> Part:
        calls.append(1)
        return part

    with workdir.session():
        found = [workdir.remember("a part / of mine", compute) for _ in range(2)]
    with Workdir.open(workdir.path, CONFIG).session() as _:
        again = Workdir.open(workdir.path, CONFIG)
        found.append(again.recall("a part / of mine"))
    assert len(calls) == 1
    for got in found:
        assert got.keys() == {"x", "share", "rows"}
        assert got["x"].tobytes() == x.tobytes()
        assert np.isnan(got["share"])
        assert got["rows"] == [{"n": 3, "loss": float(np.float32(0.1))}, {"n": 4, "loss": float("inf")}]
    assert again.recall("another") is None


def test_parts_of_other_names_do_not_meet(workdir: Workdir) -> None:
    names = ["a/b", "a_b", "a b", "a%2Fb", "τ", "..", ".", "A"]
    with workdir.session():
        for number, name in enumerate(names):
            workdir.keep(name, {"n": number})
        assert [workdir.recall(name) for name in names] == [{"n": number} for number in range(len(names))]
    assert {p.parent for p in workdir.path.rglob("*.npz")} == {workdir.path / "parts"}


@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "of another run", "other data", "a folder"])
def test_a_part_that_is_not_sound_is_said_and_computed_again(
    workdir: Workdir, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    with workdir.session():
        workdir.confirm("data", {"digest": "d"})
        workdir.keep("one", {"x": np.arange(3), "t": "τ"})
    path = workdir.path / "parts" / "one.npz"
    content = path.read_bytes()
    if damage == "of another run":
        other = Workdir.open(workdir.path.parent / "v", {**CONFIG, "rate": 0.2})
        with other.session():
            other.confirm("data", {"digest": "d"})
            other.keep("one", {"x": np.arange(4)})
        path.write_bytes((other.path / "parts" / "one.npz").read_bytes())
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    elif damage != "other data":
        at = content.index(b"NUMPY") + 100
        flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        path.write_bytes({"cut": content[:50], "emptied": b"", "flipped": flipped}[damage])
    with caplog.at_level(logging.WARNING), workdir.session():
        if damage != "other data":
            workdir.confirm("data", {"digest": "d"})
        assert workdir.recall("one") is None
        if damage != "a folder":
            assert workdir.remember("one", lambda: {"x": 1}) == {"x": 1}
    assert "computed again" in caplog.text
    assert "one.npz" in caplog.text


def test_other_data_are_refused(workdir: Workdir) -> None:
    with workdir.session():
        workdir.confirm("data", {"digest": "sha256:1", "name": "mnist", "from": "/a"})
        workdir.confirm("data", {"digest": "sha256:1", "name": "mnist", "from": "/b"})
    again = Workdir.open(workdir.path, CONFIG)
    with pytest.raises(WorkdirError, match="the data are not those that the run in") as caught, again.session():
        again.confirm("data", {"digest": "sha256:2", "name": "mnist", "from": "/b"})
    assert 'digest: "sha256:1" there, "sha256:2" asked for' in str(caught.value)
    with again.session():
        again.confirm("data", {"digest": "sha256:1", "name": "mnist", "from": "/b"})
    assert card(again)["inputs"] == {"data": {"digest": "sha256:1", "name": "mnist", "from": "/a"}}


def test_what_lay_there_before_the_first_attempt_is_not_the_run_s_own(workdir: Workdir) -> None:
    def written(*names: str) -> None:
        for name in names:
            save_json(workdir.results / name, {"n": 1})

    with workdir.session():
        written("old.json", "made.json")
    (workdir.path / "run.json").unlink()
    with pytest.raises(KeyboardInterrupt), workdir.session():
        raise KeyboardInterrupt
    with workdir.session():
        written("made.json")
    assert card(workdir)["files"].keys() == {"results/made.json"}
    with workdir.session():  # what it writes later is
        written("old.json")
    assert card(workdir)["files"].keys() == {"results/made.json", "results/old.json"}


def test_a_run_begun_in_another_precision_is_not_gone_on_with(workdir: Workdir) -> None:
    def interrupted() -> None:
        workdir.keep("part", {"x": np.zeros(2)})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), workdir.session():
        interrupted()
    before = listing(workdir.path)
    with jax.enable_x64(True):
        assert workdir.changes({}) == ["JAX_ENABLE_X64=0 (not so now)"]
        with pytest.raises(WorkdirError, match="was begun with JAX_ENABLE_X64=0: set it so"), workdir.session():
            raise AssertionError
    assert listing(workdir.path) == before
    made(workdir.path)
    assert card(workdir)["x64"] is False


# --- One process ------------------------------------------------------------------------------------------------------


RACE = """
    import sys, time
    from pathlib import Path
    from dualgap_jax.workdir import Workdir, WorkdirError
    folders = sys.argv[1:]
    print("imported", flush=True)
    start = float(input())
    time.sleep(max(0.0, start - time.time()))
    entered = []
    for folder in folders:
        try:
            with Workdir.open(folder, {"experiment": "mine"}).session():
                entered.append(folder)
                time.sleep(0.3)
        except WorkdirError as error:
            assert "is at work" in str(error), error
    print(*entered)
"""


def test_of_two_that_start_at_the_same_instant_exactly_one_enters(tmp_path: Path) -> None:
    import time

    folders = [str(tmp_path / f"w{k}") for k in range(9)]
    command = [sys.executable, "-c", textwrap.dedent(RACE), *folders]
    run: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    pair = [subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **run) for _ in range(2)]
    assert [process.stdout.readline() for process in pair] == ["imported\n"] * 2
    start = time.time() + 1
    for process in pair:
        process.stdin.write(f"{start}\n")
        process.stdin.flush()
    entered = [set(process.communicate(timeout=120)[0].split()) for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert entered[0] | entered[1] == set(folders)
    for folder in folders:
        attempts = len(load_json(Path(folder) / "run.json")["attempts"]) + 1
        assert attempts == sum(folder in names for names in entered)


def test_two_sessions_in_one_process_are_refused(workdir: Workdir) -> None:
    with (
        workdir.session(),
        pytest.raises(WorkdirError, match="is at work"),
        Workdir.open(workdir.path, CONFIG).session(),
    ):
        raise AssertionError


def mark(workdir: Workdir, age: float, **who: Any) -> Path:
    """The lock file as another process left it some seconds ago."""
    made(workdir.path)
    path = workdir.path / lock.FILE
    path.write_text(json.dumps({**machine.this_process(), "pid": 4711, **who}))
    seconds = path.stat().st_mtime - age
    os.utime(path, (seconds, seconds))
    return path


def test_another_machine_is_believed_to_be_at_work_while_it_gives_signs_of_life(workdir: Workdir) -> None:
    mark(workdir, 5, host="elsewhere", boot="another")
    with pytest.raises(WorkdirError, match=r"process 4711 on elsewhere is at work in .*last sign of life \d s ago"):
        made(workdir.path)


def test_what_another_machine_left_is_taken_over_by_command_only(workdir: Workdir) -> None:
    path = mark(workdir, 3600, host="elsewhere", boot="another")
    with pytest.raises(WorkdirError, match=r"last sign of life 3600 s ago; if it has ended.*with: rm ") as caught:
        made(workdir.path)
    subprocess.run(str(caught.value).partition("with: ")[2], shell=True, check=True)
    assert not path.exists()
    made(workdir.path)


def test_after_a_restart_of_this_machine_the_run_goes_on_and_says_so(
    workdir: Workdir, caplog: pytest.LogCaptureFixture
) -> None:
    mark(workdir, 3600, boot="before")
    with caplog.at_level(logging.WARNING):
        made(workdir.path)
    assert "process 4711" in caplog.text
    assert "taken as ended" in caplog.text


@pytest.mark.parametrize("content", [b"\xff", b"[1]", b"{}", b'{"pid": 3'])
def test_a_damaged_lock_file_does_not_stop_a_run(workdir: Workdir, content: bytes) -> None:
    made(workdir.path)
    (workdir.path / lock.FILE).write_bytes(content)
    made(workdir.path)
    assert (workdir.path / lock.FILE).read_bytes() == b""


def test_a_link_in_place_of_the_lock_is_not_followed(workdir: Workdir, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    workdir.path.mkdir()
    (workdir.path / lock.FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(WorkdirError, match="cannot write in"):
        made(workdir.path)
    assert (tmp_path / "precious").read_text() == "mine"


def test_without_kernel_locks_the_mark_decides(workdir: Workdir, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    mark(workdir, 5)
    with pytest.raises(WorkdirError, match=r"process 4711 on .* is at work"):
        made(workdir.path)
    mark_path = workdir.path / lock.FILE
    mark_path.write_text("")
    with workdir.session(), pytest.raises(WorkdirError, match=f"process {os.getpid()} on .* is at work"):
        made(workdir.path)
    made(workdir.path)


def test_a_process_whose_lock_is_taken_away_stops(workdir: Workdir, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with pytest.raises(Terminated), workdir.session():  # noqa: PT012
        (workdir.path / lock.FILE).unlink()
        for _ in range(200):
            time.sleep(0.05)
    assert card(workdir)["status"] == "interrupted"
