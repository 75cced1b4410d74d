"""What a run says: one line on a terminal, plain lines in a pipe, tables that fit, what was reduced."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import pty
import random
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dualgap_jax import cli, experiments, summary, terminal
from dualgap_jax.terminal import Progress

pytestmark = pytest.mark.usefixtures("children_share_programs")
ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 120) -> Iterator[Callable[[], str]]:
    """Standard error is a terminal of this width; what it was sent is read once, at the end."""
    control, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    parts: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while part := os.read(control, 100_000):
                parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    stream = os.fdopen(end, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stderr", stream)

    def drawn() -> str:
        stream.close()
        reader.join()
        return b"".join(parts).decode()

    yield drawn
    drawn()
    os.close(control)


def bare(text: str) -> str:
    return re.sub(r"\x1b\[\d*m", "", text)


def frames(line: str) -> list[str]:
    return [frame for part in line.split("\r") if (frame := bare(part).strip())]


def test_a_library_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "steps") as progress:
        progress.update(10, "loss 1")
    assert capsys.readouterr().err == ""


def test_one_line_on_a_terminal_and_complete_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_a_terminal(monkeypatch) as drawn:
        with terminal.part("I = 30 (2 of 4)"), Progress(200, "training", 50, at_most=True) as progress:
            progress.wait("compiling")
            for done in range(51, 151):
                progress.update(done, note=f"loss {done}")
                time.sleep(0.004)
            with Progress(5, "inside") as inner:  # one line only
                inner.update(5)
            progress.update(151, "loss 0.1, converged")
        text = drawn()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    seen = frames(text)
    assert any(
        f == "I = 30 (2 of 4), training: 50 of at most 200" for f in [s.split(" ━")[0].split(" ─")[0] for s in seen]
    )
    assert any("compiling" in frame for frame in seen)
    assert any(re.search(r"\d+/s, at most \S+ s left, loss \d", frame) for frame in seen)
    assert re.fullmatch(r"I = 30 \(2 of 4\), training: 151 of at most 200 in \S+ s, loss 0.1, converged", seen[-1]), (
        seen[-1]
    )
    assert "inside" not in text
    assert len(seen) < 20


def test_no_rate_is_told_from_an_instant() -> None:
    with Progress(1000, "landscape") as progress:
        progress.update(0)
        progress.update(500)
        assert progress.text() == "landscape: 500 of 1,000"
        time.sleep(0.3)
        progress.update(600)
        assert re.fullmatch(r"landscape: 600 of 1,000, [\d,]+/s, \S+ s left", progress.text())


def test_a_line_is_cut_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_a_terminal(monkeypatch, columns=30) as drawn:
        with Progress(10, "a label that is longer than the terminal is wide") as progress:
            progress.update(10)
        text = drawn()
    assert max(map(len, frames(text))) <= 30


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_only_where_they_are_wanted(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with on_a_terminal(monkeypatch) as drawn:
        assert terminal.paint("x", "bold") == "\033[1mx\033[0m"
        monkeypatch.setenv(name, value)
        assert terminal.paint("x", "bold") == "x"
        drawn()
    with open(os.devnull, "w") as pipe:
        assert terminal.paint("x", "bold", pipe) == "x"


def test_plain_lines_in_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A short stage has its last line, a long one a line as it begins, one every so often, and its last."""
    for name, seconds in (("PLAIN_SECONDS", 0.25), ("_SOON", 0.05), ("_TICK", 0.02)):
        monkeypatch.setattr(terminal, name, seconds)
    with terminal.spoken():
        with Progress(None, "data"):
            pass
        with Progress(100, "training") as progress:
            time.sleep(0.15)
            for done in range(0, 61, 20):
                progress.update(done, "loss 1")
                time.sleep(0.15)
        with contextlib.suppress(ZeroDivisionError), Progress(3, "landscape") as progress:
            progress.update(1)
            raise ZeroDivisionError
    assert not [t for t in threading.enumerate() if t.name == "progress"]
    lines = capsys.readouterr().err.splitlines()
    assert all(re.match(r"\[\d:\d\d\] ", line) for line in lines)
    said = [line.split("] ")[1] for line in lines]
    assert re.fullmatch(r"data: 0\.\d s", said[0])
    assert said[1].startswith("training: starting, 0.")
    assert 1 <= sum(bool(re.search(r"training: \d+ of 100, \S+/s, \S+ s left, loss 1", s)) for s in said) <= 4
    assert re.fullmatch(r"training: 60 of 100 in 0\.\d s, loss 1", said[-2])
    assert re.fullmatch(r"landscape: 1 of 3 in 0\.\d s, broken off", said[-1])


def test_a_stream_that_is_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w")
    monkeypatch.setattr(sys, "stderr", stream)
    with terminal.spoken(), Progress(2, "steps") as progress:
        progress.update(1)
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def test_durations() -> None:
    said = [terminal.duration(s) for s in (0.04, 9.94, 9.96, 59.6, 3599.0, 3601.0, 7500.0)]
    assert said == ["0.0 s", "9.9 s", "10 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "2 h 5 min"]


def words(text: str) -> list[str]:
    return sorted(re.findall(r"[^\s/-]+", text))


def test_tables_of_any_kind_fit_and_lose_nothing() -> None:
    generator = random.Random(0)
    for _ in range(300):
        count = generator.randrange(1, 14)

        def cell() -> str:
            return generator.choice(" /").join(
                "abcdefghijkl"[: generator.randrange(1, 12)] for _ in range(generator.randrange(1, 5))
            )

        heads, rows = [cell() for _ in range(count)], [[cell() for _ in range(count)] for _ in range(3)]
        text = terminal.table(heads, rows)
        assert max(map(len, text.splitlines())) <= terminal.WIDTH
        parts = text.count("\n\n") + 1
        wanted = [w for row in [heads, *rows] for c in row for w in words(c)]
        wanted += [w for row in [heads, *rows] for w in words(row[0])] * (parts - 1)
        assert words(text) == sorted(wanted)


def test_a_narrow_table_is_as_it_was() -> None:
    assert terminal.table(["I", "loss"], [["1,000", "0.5"]]) == "    I  loss\n-----------\n1,000   0.5"


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_digits_of_a_bound_are_a_bound(count: int) -> None:
    """Against the value itself, at all scales that a float has; and the nearest digits are one of the two."""
    draw = random.Random(count)
    values = [draw.choice([-1, 1]) * draw.random() * 10 ** draw.uniform(-322, 308.2) for _ in range(5000)]
    values += [0.0, -0.0, 5e-324, sys.float_info.max, -sys.float_info.max, 9.9999, 0.2, 1e15, 123456.0]
    for value in values:
        low, high = (terminal.digits(value, count, bound) for bound in ("lower", "upper"))
        assert float(low) <= value <= float(high)
        assert len({low, high}) == (1 if float(low) == value else 2)
        assert float(terminal.digits(value, count)) in (float(low), float(high))
    assert [terminal.digits(0.12345, bound=b) for b in (None, "lower", "upper")] == ["0.1235", "0.1234", "0.1235"]
    assert [terminal.digits(math.inf, bound=b) for b in ("lower", "upper")] == ["inf", "inf"]


def test_cells() -> None:
    made = [terminal.cell(v) for v in (None, 1234, True, "text", 0.123456, [0.123456, "to", 2, None])]
    assert made == ["-", "1,234", "True", "text", "0.1235", "0.123 to 2 -"]
    assert terminal.cell(0.12341, "upper") == "0.1235"
    assert terminal.cell([0.1235, 7], "lower") == "0.123 7"


def test_what_was_reduced_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert summary.without_smoke("figure1:I=5,smoke") == "figure1:I=5"
    assert summary.without_smoke("figure1:smoke=true") == "figure1"
    flags = cli.parse(["--config=figure1:smoke", "--config.cell.training.max_steps=10"])
    said = cli._compared(flags.config, flags.given)
    assert said["again"] == "figure1"
    assert said["changed"] == "cell.training.max_steps 10 (in the config 40)"
    assert "num_branches 10/30 (in full 10/30/70/1,000)" in said["reduced"]
    assert "cell.plane.points 7 (in full 51)" in said["reduced"]
    flags = cli.parse(["--config=figure1"])
    assert cli._compared(flags.config, flags.given) == {"changed": ""}


def test_a_config_that_is_edited_during_the_run_does_not_spoil_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mine.py"
    config.write_text((ROOT / "configs" / "figure3.py").read_text())
    flags, real = cli.parse([f"--config={config}:smoke"]), experiments.run

    def edited(*arguments: Any, **settings: Any) -> Any:
        config.write_text("not Python")
        return real(*arguments, **settings)

    monkeypatch.setattr(experiments, "run", edited)
    cli.run(flags.config, flags.name, str(tmp_path / "w"), experiments.TABLES, [], flags.given)
    assert "reduced (smoke): " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("in_a_terminal", [False, True])
def test_a_run_says_what_it_does(in_a_terminal: bool, tmp_path: Path) -> None:
    """The command itself, in a pipe and on a terminal of 100 columns."""
    command = [sys.executable, "-m", "dualgap_jax", "run", "figure1:smoke,I=2/3", f"--workdir={tmp_path / 'w'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    run: dict[str, Any] = {"cwd": tmp_path, "env": environment, "timeout": 200, "check": True}
    if not in_a_terminal:
        done = subprocess.run(command, capture_output=True, text=True, **run)
        assert "\x1b" not in done.stdout + done.stderr
        assert "\r" not in done.stderr
        out, lines = done.stdout, [line.partition("] ")[2] for line in done.stderr.splitlines()]
    else:
        control, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        parts: list[bytes] = []

        def read() -> None:
            with contextlib.suppress(OSError):
                while part := os.read(control, 100_000):
                    parts.append(part)

        reader = threading.Thread(target=read)
        reader.start()
        out = subprocess.run(command, stdout=subprocess.PIPE, stderr=end, text=True, **run).stdout
        os.close(end)
        reader.join()
        os.close(control)
        lines = [frames(line)[-1] for line in b"".join(parts).decode().split("\n") if frames(line)]
        assert "compiling" in b"".join(parts).decode()
    stages = [line.partition(": ")[0] for line in lines]
    for number, count in enumerate((2, 3), 1):
        for stage in ("data", "training", "landscape", "drawing"):
            assert f"I = {count} ({number} of 2), {stage}" in stages
    assert re.match(r"done in (\d+ min )?\d+(\.\d)? s, peak memory", lines[-1])
    assert max(map(len, lines)) <= 100
    table = out.splitlines()
    assert max(len(line) for line in table if not line.startswith(("figure:", "workdir:", "report:", "next:"))) <= 100
    for head in ("reduced (smoke): ", "figure: ", "workdir: ", "report: ", "next: open the report"):
        assert sum(line.startswith(head) for line in table) >= 1, head
    assert "dualgap run figure1:I=2/3" in table[-1]


def test_nothing_warns_in_a_notebook_without_widgets() -> None:
    """`tqdm.auto` says on import that it misses them, in red, with a path of the machine."""
    code = "import sys, dualgap_jax.terminal; sys.exit('tqdm.auto' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
