"""Numbers along the way: rows of a JSONL file, event files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import operator
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, SupportsIndex

from dualgap_jax.files import DamagedFileError, jsonable, load_json, local_path, restored, save_json, write_atomically

_log = logging.getLogger(__name__)

_SEAL_SECONDS = 1.0  # least time between two records of how far the file is known


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """The object on a complete line of metrics, or None for a torn or damaged one."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = restored(json.loads(line))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, in order; torn and damaged lines are left out.  A missing file has no rows."""
    path = local_path(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [row for line in lines if (row := _parse_line(line)) is not None]


class Metrics:
    """Appends rows of numbers to a JSONL file, one JSON object per line, and to TensorBoard event files on request.

    Opening drops a torn last line (the writer was killed in mid-write).  A digest of what has been written is kept
    beside the file (`metrics.seal`), about once a second, so that rows that are changed or gone when it is opened again
    are spoken of.  Use as a context manager, or call `close`.

    Args:
      path: the JSONL file; made with its folder when missing.
      tensorboard: a folder for event files, or None for none.  When tensorboardX is not installed a warning is logged
        and only the JSONL file is written.
    """

    def __init__(self, path: str | Path, tensorboard: str | Path | None = None) -> None:
        self.path = local_path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._tensorboard = None if tensorboard is None else local_path(tensorboard)
        self._events: Any = None
        self._purge_step: int | None = None
        self._seal = self.path.with_suffix(".seal")
        self._rows = self._bytes = 0
        self._sealed = -math.inf
        self._check()
        self._keep(lambda row: True)

    def write(self, step: SupportsIndex, **values: Any) -> None:
        """Appends `{"step": step, **values}` and flushes.

        NaN and infinities are written as `jsonable` writes them.  In the event files each finite number is a scalar
        under its name, the i-th entry of a list or 1-d array a scalar under `name/i`; other values are left out there.

        Raises:
          TypeError: for a value that `jsonable` refuses; nothing is written then.
        """
        row = jsonable({"step": operator.index(step), **values}, where="metrics")
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")
        self._file.write(line)
        self._file.flush()
        self._known.update(line)
        self._rows, self._bytes = self._rows + 1, self._bytes + len(line)
        if time.monotonic() - self._sealed > _SEAL_SECONDS:
            self._write_seal()
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
        if not self._file.closed:
            self._file.close()
            self._write_seal()
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
            self._seal.unlink(missing_ok=True)  # first: it would speak of rows that are dropped on purpose
            write_atomically(self.path, lambda file: file.writelines(kept))
        self._file = open(self.path, "ab")  # noqa: SIM115  (open for the life of the object)
        self._known = hashlib.sha256(b"".join(kept))
        self._rows, self._bytes = len(kept), sum(map(len, kept))
        self._write_seal()
        return len(lines) - len(kept) - damaged

    def _write_seal(self) -> None:
        """Keeps how many rows there are, and their digest."""
        with contextlib.suppress(OSError):  # the rows are what matters
            save_json(self._seal, {"rows": self._rows, "bytes": self._bytes, "digest": self._known.hexdigest()})
        self._sealed = time.monotonic()

    def _check(self) -> None:
        """Says so when the file no longer holds what was written."""
        try:
            seal = load_json(self._seal)
        except FileNotFoundError:
            return
        except DamagedFileError as error:
            _log.warning("%s: whether rows are missing cannot be told: %s", self.path, error)
            return
        content = self.path.read_bytes() if self.path.exists() else b""
        if hashlib.sha256(content[: seal["bytes"]]).hexdigest() != seal["digest"]:
            _log.warning(
                "%s was changed or cut after it was written: %d rows had been written, %d are there; what is gone or"
                " changed is not written again (results do not depend on it)",
                self.path,
                seal["rows"],
                len(read_metrics(self.path)),
            )

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
