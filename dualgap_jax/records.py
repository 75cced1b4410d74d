"""What a run leaves on disk: the workdir, its run card, its metrics, and small files written whole or not at all.

A workdir explains itself:

    config.json      the configuration; the folder belongs to this one configuration
    run.json         command, git commit, package versions, devices, start, end, status, reason, earlier attempts
    metrics.jsonl    one JSON object per line: step, loss, ...
    tensorboard/     the same numbers as event files, on request
    checkpoints/     see `dualgap_jax.checkpoints`
    results/         *.npz and *.json
    figures/         *.png and *.pdf

JSON has no NaN and no infinity: `save_json` and `Metrics` write both as `null`.  Arrays where that matters go to npz.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import operator
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, SupportsIndex

import numpy as np

_log = logging.getLogger(__name__)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "ml-collections", "numpy")


class WorkdirError(ValueError):
    """A workdir that cannot be used as asked; the message says why and what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised in the main thread while a `Workdir.session` is open."""


# --- Files ------------------------------------------------------------------------------------------------------------


def jsonable(value: Any, *, null_non_finite: bool = True, where: str = "value") -> Any:
    """`value` in terms of dict, list, str, int, float, bool and None.

    NumPy and JAX scalars and arrays become numbers and nested lists; NamedTuples and dataclasses become objects with
    their field names; tuples become lists; paths become strings.

    Args:
      value: what to convert.
      null_non_finite: NaN and infinities become None; otherwise they stay floats.
      where: the name of `value` in error messages.

    Raises:
      TypeError: for anything else (bytes, sets, complex numbers, objects), naming the place.
    """

    def convert(x: Any, at: str) -> Any:
        if x is None or isinstance(x, (bool, str)):
            return x
        if isinstance(x, int):
            return int(x)
        if isinstance(x, float):
            return float(x) if math.isfinite(x) or not null_non_finite else None
        if isinstance(x, Path):
            return str(x)
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return {f.name: convert(getattr(x, f.name), f"{at}.{f.name}") for f in dataclasses.fields(x)}
        if hasattr(x, "_asdict"):
            return convert(x._asdict(), at)
        if isinstance(x, Mapping):
            for key in x:
                if not isinstance(key, (str, int)):
                    raise TypeError(f"{at} has the key {key!r}; JSON keys are str (or int): rename it")
            return {str(key): convert(item, f"{at}.{key}") for key, item in x.items()}
        if isinstance(x, (list, tuple)):
            return [convert(item, f"{at}[{i}]") for i, item in enumerate(x)]
        if hasattr(x, "__array__"):
            array = np.asarray(x)
            plain = array.astype(np.float64) if array.dtype.kind == "V" and array.dtype.names is None else array
            if plain.dtype.kind in "biufU":
                return convert(plain.tolist(), at)
        raise TypeError(
            f"{at} is a {type(x).__name__} ({x!r:.60}) and cannot be written as JSON;"
            " convert it to numbers, strings, lists or dicts"
        )

    return convert(value, where)


def _write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write(file)` on a temporary file beside `path`, then moves it there: readers see the old or the new."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_json(path: str | Path, obj: Any) -> None:
    """Writes `obj` as JSON, atomically; missing folders are made.  NaN and infinities are written as null.

    Raises:
      TypeError: for what `jsonable` refuses; nothing is written then.
    """
    text = json.dumps(jsonable(obj), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    _write_atomically(path, lambda file: file.write(text.encode()))


def load_json(path: str | Path) -> Any:
    """Reads a JSON file.  Raises FileNotFoundError, or ValueError (naming the file) when it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the file is damaged: restore or delete it") from error


def save_npz(path: str | Path, **arrays: Any) -> None:
    """Writes named arrays to one npz file, atomically; missing folders are made.  NaN and infinities are kept.

    Raises:
      TypeError: for an array of objects, or of a type that npz cannot hold (bfloat16).
    """
    host = {name: np.asarray(value) for name, value in arrays.items()}
    for name, array in host.items():
        if array.dtype.hasobject or (array.dtype.kind == "V" and array.dtype.names is None):
            raise TypeError(f"array {name!r} has dtype {array.dtype}, which npz cannot hold; convert it to float32")
    _write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **host))


def load_npz(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file.  Raises FileNotFoundError, or ValueError (naming the file) when it is damaged."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a readable npz file ({error}); delete it and run again") from error


# --- Metrics and progress ---------------------------------------------------------------------------------------------


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on a complete line of metrics, or None for a torn or damaged one."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, in order; torn and damaged lines are left out.  A missing file has no rows."""
    path = Path(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [row for line in lines if (row := _parse_line(line)) is not None]


class Metrics:
    """Appends rows of numbers to a JSONL file, one JSON object per line, and to TensorBoard event files on request.

    Opening drops a torn last line (the writer was killed in mid-write).  Use as a context manager, or call `close`.

    Args:
      path: the JSONL file; made with its folder when missing.
      tensorboard: a folder for event files, or None for none.  When tensorboardX is not installed a warning is logged
        and only the JSONL file is written.
    """

    def __init__(self, path: str | Path, tensorboard: str | Path | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._tensorboard = None if tensorboard is None else Path(tensorboard)
        self._events: Any = None
        self._purge_step: int | None = None
        self._keep(lambda row: True)

    def write(self, step: SupportsIndex, **values: Any) -> None:
        """Appends `{"step": step, **values}` and flushes.

        NaN and infinities are written as null.  In the event files each number is a scalar under its name, the i-th
        entry of a list or 1-d array a scalar under `name/i`; other values are left out there.

        Raises:
          TypeError: for a value that `jsonable` refuses; nothing is written then.
        """
        row = jsonable({"step": operator.index(step), **values}, where="metrics")
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            self._write_events(row)

    def truncate_after(self, step: SupportsIndex, **match: Any) -> int:
        """Drops the rows beyond `step`, so that a run resumed from `step` writes each row once.

        Args:
          step: the last step to keep.
          **match: only rows that hold all these values are dropped (`seed=2`); rows without them stay.  The event
            files are purged only when there is no `match`.

        Returns:
          The number of rows dropped.
        """
        last = operator.index(step)
        wanted = jsonable(match, where="match")

        def stays(row: dict[str, Any]) -> bool:
            return row["step"] <= last or any(name not in row or row[name] != value for name, value in wanted.items())

        if not match:
            self._close_events()
            self._purge_step = last + 1
        self._file.close()
        return self._keep(stays)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        self._close_events()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _keep(self, stays: Callable[[dict[str, Any]], bool]) -> int:
        """Rewrites the file without damaged rows and those that do not stay; opens it to append; counts the latter."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        rows = [(line, _parse_line(line)) for line in lines]
        kept = [line for line, row in rows if row is not None and stays(row)]
        damaged = sum(row is None for _, row in rows)
        if damaged:
            _log.warning("%s: dropped %d torn or damaged line(s)", self.path, damaged)
        if len(kept) < len(lines):
            _write_atomically(self.path, lambda file: file.writelines(kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (open for the life of the object)
        return len(lines) - len(kept) - damaged

    def _write_events(self, row: dict[str, Any]) -> None:
        if self._events is None:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                _log.warning("tensorboardX is not installed: only %s is written (pip install tensorboardX)", self.path)
                self._tensorboard = None
                return
            # Names of event files count seconds: without the suffix, a second writer would overwrite the first one's.
            suffix = f".{time.time_ns()}"
            self._events = SummaryWriter(str(self._tensorboard), purge_step=self._purge_step, filename_suffix=suffix)
        for name, value in row.items():
            items = {f"{name}/{i}": x for i, x in enumerate(value)} if isinstance(value, list) else {name: value}
            for tag, number in items.items():
                if tag != "step" and isinstance(number, (int, float)):
                    self._events.add_scalar(tag, float(number), row["step"])

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None


class Progress:
    """One line on the terminal: what is done, the rate, the time left.  Silent when stderr is not a terminal.

    Args:
      total: the number of steps in all.
      label: what is counted.
      done: how many were done before (a resumed run); they do not count for the rate.
    """

    def __init__(self, total: int, label: str, done: int = 0) -> None:
        self._total, self._label, self._first = total, label, done
        self._start = time.monotonic()
        self._drawn = -math.inf
        self._active = sys.stderr.isatty()

    def update(self, done: int, note: str = "") -> None:
        """Redraws the line (at most ten times a second, and at the end) with `done` steps and a short note."""
        now = time.monotonic()
        if not self._active or (now - self._drawn < 0.1 and done < self._total):
            return
        self._drawn = now
        rate = (done - self._first) / max(now - self._start, 1e-9)
        left = f"{(self._total - done) / rate:.0f} s left" if rate > 0 else ""
        line = f"{self._label}: {done}/{self._total}  {rate:.3g}/s  {left}  {note}".rstrip()
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

    def close(self) -> None:
        """Ends the line."""
        if self._active and self._drawn > -math.inf:
            sys.stderr.write("\n")
        self._active = False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# --- The workdir ------------------------------------------------------------------------------------------------------


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as JSON will give it back.  Raises TypeError or ValueError for what JSON cannot hold."""
    plain = jsonable(config, null_non_finite=False, where="config")
    for name, value in _leaves(plain).items():
        try:
            json.dumps(value, allow_nan=False)
        except ValueError:
            raise ValueError(f"config.{name} is {value}; JSON has no such number: use None or a finite one") from None
    return plain


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> value, for all that is not a non-empty dict."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _leaves(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line per dotted name whose JSON text differs."""
    texts = [{name: json.dumps(value, sort_keys=True) for name, value in _leaves(c).items()} for c in (old, new)]
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
    canonical = json.dumps(_plain_config(config), sort_keys=True, separators=(",", ":"))
    return Path(root) / f"{name}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


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


def _git_state() -> dict[str, Any] | None:
    """Commit of this package's source and whether it has changes; None when git does not track it."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def memory_field(file: str | Path, name: str) -> int:
    """A field of one of Linux's files of `name: value kB` lines, in bytes.

    Raises:
      OSError, KeyError, ValueError: where there is no such file, field or number.
    """
    fields = dict(line.split(":", 1) for line in Path(file).read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where the system does not say."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        # Linux hands `ru_maxrss` on from the program that started this one; the high-water mark is the process's own.
        return memory_field("/proc/self/status", "VmHWM")
    try:
        import resource
    except ImportError:
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _devices() -> list[dict[str, Any]]:
    import jax

    kinds = [(device.platform, device.device_kind) for device in jax.devices()]
    return [{"platform": p, "kind": k, "count": kinds.count((p, k))} for p, k in dict.fromkeys(kinds)]


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
            elif foreign := sorted(p.name for p in folder.iterdir() if not (p.name[0] == "." and p.suffix == ".tmp")):
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
            seconds = round(time.monotonic() - start, 3)
            run._update(status=status, reason=reason, end=_now(), seconds=seconds, peak_memory_bytes=peak_memory())

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
            "git": _git_state(),
            "packages": {name: _version(name) for name in PACKAGES},
            "python": platform.python_version(),
            "platform": platform.platform(),
            "devices": _devices(),
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
