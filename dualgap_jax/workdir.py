"""The folder of a run: its configuration, its card, and where metrics, checkpoints, results and figures go.

A workdir explains itself:

    config.json      the configuration; the folder belongs to this one configuration
    run.json         command, git commit, package versions, devices, start, end, status, reason, earlier attempts
    metrics.jsonl    one JSON object per line: step, loss, ...
    tensorboard/     the same numbers as event files, on request
    checkpoints/     see `dualgap_jax.checkpoints`
    results/         *.npz and *.json
    figures/         *.png and *.pdf
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dualgap_jax import machine
from dualgap_jax.files import canonical, is_temporary, jsonable, leaves, load_json, save_json, text_digest
from dualgap_jax.metrics import Metrics


class WorkdirError(ValueError):
    """A workdir that cannot be used as asked; the message says why and what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised in the main thread while a `Workdir.session` is open."""


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as JSON will give it back.  Raises TypeError or ValueError for what JSON cannot hold."""
    return jsonable(config, where="config")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line per dotted name whose JSON text differs."""
    texts = [{name: json.dumps(value, sort_keys=True) for name, value in leaves(c)} for c in (old, new)]
    there, asked = texts
    return [
        f"  {name}: {there.get(name, '(absent)')} there, {asked.get(name, '(absent)')} asked for"
        for name in sorted({*there, *asked})
        if there.get(name) != asked.get(name)
    ]


def default_workdir(root: str | Path, name: str, config: Mapping[str, Any]) -> Path:
    """`root/<name>-<8 hex digits>`, the digits from the SHA-256 of the configuration in canonical JSON.

    Raises:
      ValueError: if `name` is empty or holds a path separator.
    """
    if not name or "/" in name or os.sep in name:
        raise ValueError(f"name {name!r} cannot name a folder; give a non-empty name without separators")
    return Path(root) / f"{name}-{text_digest(canonical(_plain_config(config)))[:8]}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _process_mark(pid: int) -> str | None:
    """A mark that a process shares with no other, earlier or later, on this machine; None if unknown or ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"  # state; start time in clock ticks since the boot


def _is_alive(process: Mapping[str, Any]) -> bool:
    """Whether the process of a run card is still at work on this machine."""
    if process["mark"] is not None:
        return _process_mark(process["pid"]) == process["mark"]
    try:
        os.kill(process["pid"], 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turns SIGTERM into `Terminated`; does nothing outside the main thread, where handlers cannot be set."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(signum: int, frame: object) -> None:
        raise Terminated("SIGTERM")

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


class Run:
    """The open run card of a session.

    Attributes:
      record: what `run.json` holds.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.record = record
        self._path = path

    def note(self, **fields: Any) -> None:
        """Adds fields to the `notes` of `run.json` (a data set's checksum, peak memory) and writes it."""
        self._update(notes={**self.record["notes"], **fields})

    def _update(self, **fields: Any) -> None:
        self.record.update(fields)
        save_json(self._path, self.record)


class Workdir:
    """A folder that belongs to one configuration; see the head of this module for what it holds.  Made by `open`.

    Attributes:
      path: the folder, absolute.
      config: the configuration, as JSON gives it back (tuples are lists).
      writes: False in the processes of a distributed run that take part in the work and leave writing to the first.
    """

    def __init__(self, path: Path, config: dict[str, Any], command: Sequence[str], writes: bool = True) -> None:
        self.path = path
        self.config = config
        self.writes = writes
        self._command = tuple(command)

    @classmethod
    def follow(cls, path: str | Path, config: Mapping[str, Any]) -> Workdir:
        """The workdir of a distributed run as every process but the first sees it: nothing is made, checked or written.

        Args:
          path: the folder, which all processes see.
          config: as for `open`.
        """
        return cls(Path(path).expanduser().resolve(), _plain_config(config), (), writes=False)

    @classmethod
    def open(cls, path: str | Path, config: Mapping[str, Any], *, command: Sequence[str] = ()) -> Workdir:
        """Makes a new workdir, or opens the one that holds the same configuration.

        Args:
          path: the folder.  Missing or empty: it is made, and `config.json` written.
          config: a nested dict of what JSON can hold.
          command: the command line, for `run.json`.

        Raises:
          WorkdirError: if the folder holds another configuration (each difference is listed) or files that are not of
            a workdir, cannot be made or written, or if another process is at work in it.
          TypeError, ValueError: if JSON cannot hold `config`.
        """
        plain = _plain_config(config)
        folder = Path(path).expanduser()
        try:
            folder = folder.resolve()
            if folder.exists() and not folder.is_dir():
                raise WorkdirError(f"{folder} is a file; give a folder with --workdir")
            folder.mkdir(parents=True, exist_ok=True)
            card = folder / "config.json"
            if card.exists():
                cls._check_config(folder, plain)
            elif foreign := sorted(p.name for p in folder.iterdir() if not is_temporary(p)):
                listing = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
                raise WorkdirError(
                    f"{folder} has no config.json but holds other files ({listing}); nothing was changed."
                    " Give a new or empty folder with --workdir"
                )
            with tempfile.TemporaryFile(dir=folder):
                pass
            workdir = cls(folder, plain, command)
            workdir._check_idle()
            if not card.exists():
                save_json(card, plain)
        except OSError as error:
            raise WorkdirError(
                f"cannot write in {folder} ({type(error).__name__}: {error.strerror or error});"
                " give another folder with --workdir, or change its permissions"
            ) from error
        return workdir

    @staticmethod
    def _check_config(folder: Path, config: dict[str, Any]) -> None:
        try:
            there = load_json(folder / "config.json")
        except ValueError as error:
            raise WorkdirError(f"{error}, or give another folder with --workdir") from error
        if not isinstance(there, dict):
            raise WorkdirError(f"{folder}/config.json is not of a workdir; give another folder with --workdir")
        if lines := _differences(there, config):
            raise WorkdirError(
                "\n".join(
                    [
                        f"{folder} holds another config; nothing was changed. What differs:",
                        *lines,
                        "Give another folder with --workdir, or delete this one to start over",
                    ]
                )
            )

    @property
    def results(self) -> Path:
        """The folder `results`, made when first asked for."""
        return self._folder("results")

    @property
    def figures(self) -> Path:
        """The folder `figures`, made when first asked for."""
        return self._folder("figures")

    @property
    def checkpoints(self) -> Path:
        """The folder `checkpoints`, made when first asked for."""
        return self._folder("checkpoints")

    @property
    def status(self) -> str | None:
        """'running', 'complete', 'failed', 'interrupted', or None when nothing has run here.

        A run card that says 'running' although its process has ended (SIGKILL, power) counts as 'interrupted'.

        Raises:
          WorkdirError: if `run.json` is damaged.
        """
        record = self._run_record()
        if record is None:
            return None
        if record["status"] == "running" and not _is_alive(record["process"]):
            return "interrupted"
        return record["status"]

    def metrics(self, tensorboard: bool = False) -> contextlib.AbstractContextManager[Metrics | None]:
        """The writer of `metrics.jsonl`, and of event files in `tensorboard/` when asked for; None for a follower."""
        if not self.writes:
            return contextlib.nullcontext()
        return Metrics(self.path / "metrics.jsonl", self.path / "tensorboard" if tensorboard else None)

    @contextlib.contextmanager
    def session(self) -> Iterator[Run]:
        """Keeps `run.json` while work is done: `with workdir.session() as run: ...`.

        The status is 'running' inside; 'complete' after a normal end; 'interrupted' after KeyboardInterrupt or SIGTERM
        (raised inside as `Terminated`); 'failed' after any other exception, with its type and message as the reason.
        Exceptions propagate.  What earlier sessions recorded is kept, shortened, under `attempts`.

        Raises:
          WorkdirError: if another session is open in this folder.
        """
        self._check_idle()
        run = Run(self.path / "run.json", self._new_record())
        start = time.monotonic()
        status, reason = "complete", None
        try:
            with _sigterm_raises():
                run._update(status="running")
                yield run
        except KeyboardInterrupt as error:
            status, reason = "interrupted", "SIGTERM" if isinstance(error, Terminated) else "KeyboardInterrupt"
            raise
        except BaseException as error:
            status, reason = "failed", f"{type(error).__name__}: {error}"
            raise
        finally:
            seconds, peak = round(time.monotonic() - start, 3), machine.peak_memory()
            run._update(status=status, reason=reason, end=_now(), seconds=seconds, peak_memory_bytes=peak)

    def _new_record(self) -> dict[str, Any]:
        attempts = []
        if (last := self._run_record()) is not None:
            kept = ("status", "reason", "command", "start", "end", "seconds", "git")
            attempt = {name: last[name] for name in kept}
            if attempt["status"] == "running":
                attempt |= {"status": "interrupted", "reason": "the process ended without a report"}
            attempts = [*last["attempts"], attempt]
        return {
            "status": "running",
            "reason": None,
            "command": shlex.join(self._command) if self._command else None,
            "start": _now(),
            "end": None,
            "seconds": None,
            "peak_memory_bytes": None,
            **machine.facts(),
            "process": {"pid": os.getpid(), "mark": _process_mark(os.getpid())},
            "notes": {},
            "attempts": attempts,
        }

    def _run_record(self) -> dict[str, Any] | None:
        path = self.path / "run.json"
        try:
            record = load_json(path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise WorkdirError(str(error)) from error
        if not isinstance(record, dict) or not {"status", "process", "attempts"} <= record.keys():
            raise WorkdirError(f"{path} is not the run card of a workdir; delete it to go on")
        return record

    def _check_idle(self) -> None:
        record = self._run_record()
        if record is not None and record["status"] == "running" and _is_alive(record["process"]):
            raise WorkdirError(
                f"process {record['process']['pid']} is at work in {self.path} (since {record['start']});"
                " wait for it, end it, or give another folder with --workdir"
            )

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        if self.writes:
            folder.mkdir(parents=True, exist_ok=True)
        return folder
