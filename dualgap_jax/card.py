"""The card of a run, `run.json`: who ran what, when, on what, from what data, and how it ended."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dualgap_jax import machine
from dualgap_jax.files import DamagedFileError, canonical, file_digest, is_temporary, load_json, save_json, text_digest

_log = logging.getLogger(__name__)

OUTPUTS = {"results", "figures"}  # the folders that a complete run's card vouches for
CERTIFICATE = "certificate.json"  # among the results, of solutions that others are computed from too

_KEYS = {"status", "reason", "start", "config", "inputs", "files", "attempts"}
_KEPT = ("status", "reason", "command", "start", "end", "seconds", "git")  # of an earlier attempt


def altered(folder: Path, card: Mapping[str, Any]) -> list[str]:
    """The results and figures of a complete run in `folder` that are gone or not what its card says was written."""
    return [name for name, digest in card.get("files", {}).items() if digest_or_none(folder / name) != digest]


def outputs(folder: Path, before: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The digest of every file in folders `results` and `figures` of a run, those of runs inside it too.

    Args:
      folder: of the run.
      before: `stamps` of files that count only if they were written since.
    """
    found: dict[str, str] = {}
    for where, inside, names in os.walk(folder):
        inside[:] = sorted(name for name in inside if name not in ("checkpoints", "parts", "tensorboard"))
        relative = Path(where).relative_to(folder)
        if OUTPUTS & {*relative.parts}:
            paths = [Path(where, name) for name in sorted(names)]
            written = [p for p in paths if not is_temporary(p) and (p.name != CERTIFICATE or is_certified(p))]
            digests = {str(relative / p.name): digest_or_none(p) for p in written}
            found |= {name: digest for name, digest in digests.items() if digest is not None}
    now = stamps(folder) if before else {}
    left = {name for name in before or () if before and before[name] == now.get(name)}
    return {name: digest for name, digest in found.items() if name not in left or Path(name).name == CERTIFICATE}


def certified(folder: Path, names: Iterable[str]) -> dict[str, str | None]:
    """What a certificate keeps as `of`: digests of results in `folder` that come of the solutions that it is about."""
    return {name: digest_or_none(folder / name) for name in names}


def is_certified(path: Path) -> bool:
    """Whether the certificate at `path` is of the solutions whose results lie in its run's folder."""
    folder = path.parents[1]
    try:
        of = load_json(path).get("of")
    except (FileNotFoundError, DamagedFileError):
        return False
    return isinstance(of, dict) and certified(folder, of) == of


def stamps(folder: Path) -> dict[str, list[int]]:
    """When each file of a run's own results and figures was written, in terms of the file system."""
    found = {}
    for path in (path for name in sorted(OUTPUTS) for path in (folder / name).rglob("*")):
        with contextlib.suppress(OSError):
            found[str(path.relative_to(folder))] = [path.stat().st_ino, path.stat().st_mtime_ns]
    return found


def digest_or_none(path: Path) -> str | None:
    """`files.file_digest`, or None where there is no file that can be read."""
    try:
        return file_digest(path)
    except OSError:
        return None


class RunCard:
    """`run.json` of one configuration.

    Its fields: `status`, `reason`, `command`, `start`, `end`, `seconds`, `peak_memory_bytes`; `git`, `packages`,
    `python`, `platform`, `devices`, `x64`, `process`; `config`, the digest of the configuration; `inputs`, what the run
    is computed from; `sources`, digests of the files of one's own that it reads or runs; `files`, the digests of the
    results and figures of a complete run; `left`, `stamps` of those that lay there before the first attempt;
    `attempts`, earlier cards, shortened.

    Args:
      path: the file.
      config: the configuration, as plain data.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self._path = path
        self._config = text_digest(canonical(config))
        self._now: dict[str, Any] | None = None  # while a session is open

    def read(self) -> dict[str, Any] | None:
        """The card on disk; None where there is none, or (said) a damaged one."""
        try:
            card = load_json(self._path)
        except FileNotFoundError:
            return None
        except DamagedFileError as error:
            _log.warning("%s; what it said of earlier attempts is lost, and results are computed again", error)
            return None
        if not card.keys() >= _KEYS:
            _log.warning("%s is not the run card of this version: results are computed again", self._path)
            return None
        return card

    def own(self) -> dict[str, Any] | None:
        """The card on disk if it is of this configuration: a card of another one says nothing of this run."""
        card = self.read()
        return card if card is not None and card["config"] == self._config else None

    def inputs(self) -> dict[str, Any]:
        """What the run is computed from, as far as it has been confirmed."""
        card = self._now if self._now is not None else self.own()
        return {} if card is None else dict(card["inputs"])

    def other_precision(self) -> str | None:
        """How the last attempt was set up, `JAX_ENABLE_X64=1`, where this process is set up otherwise."""
        then = (self.own() or {}).get("x64")
        return None if then is None or then == _x64() else f"JAX_ENABLE_X64={int(then)}"

    def changes(self, sources: Mapping[str, str | None]) -> list[str]:
        """What is no longer as it was in the last attempt, of files of one's own and of the precision."""
        then = (self.own() or {}).get("sources", {})
        changed = [name for name, digest in sources.items() if name in then and then[name] != digest]
        return changed + ([f"{x64} (not so now)"] if (x64 := self.other_precision()) is not None else [])

    def left(self) -> dict[str, Any]:
        """The `stamps` of what lay in the folder before the first attempt, of nobody knows what."""
        return dict((self._now or {}).get("left", {}))

    def begin(self, command: Sequence[str], sources: Mapping[str, str | None]) -> None:
        """Writes the card of a new attempt, and says what is no longer as it was in the last one."""
        facts, last = machine.facts(), self.read()
        if last is not None and last["config"] != self._config:
            last = None  # of a configuration that was refused
        attempts: list[dict[str, Any]] = []
        if last is not None:
            attempt = {name: last.get(name) for name in _KEPT}
            if attempt["status"] == "running":
                attempt |= {"status": "interrupted", "reason": "the process ended without a report"}
            attempts = [*last["attempts"], attempt]
            self._say_changes(last, facts)
        self._now = {
            "status": "running",
            "reason": None,
            "command": shlex.join(command) if command else None,
            "start": _time(),
            "end": None,
            "seconds": None,
            "peak_memory_bytes": None,
            **facts,
            "x64": _x64(),
            "sources": dict(sources),
            "process": machine.this_process(),
            "config": self._config,
            "inputs": last["inputs"] if last is not None else {},
            "files": {},
            "left": stamps(self._path.parent) if last is None else last.get("left", {}),
            "attempts": attempts,
        }
        save_json(self._path, self._now)

    def update(self, **fields: Any) -> None:
        """Changes fields of the card of the open session, or of the one on disk."""
        card = self._now if self._now is not None else self.read()
        if card is None:
            return
        card = {**card, **fields}
        if self._now is not None:
            self._now = card
        save_json(self._path, card)

    def end(self, **fields: Any) -> None:
        """Closes the card; a disk that takes no more is said, for the work itself is done."""
        try:
            self.update(end=_time(), peak_memory_bytes=machine.peak_memory(), **fields)
        except OSError as error:
            _log.error("%s could not be written (%s): the same command goes on from what is kept", self._path, error)
        self._now = None

    def _say_changes(self, last: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        for what, then, now in (
            ("commit", (last.get("git") or {}).get("commit"), (facts["git"] or {}).get("commit")),
            ("jax", (last.get("packages") or {}).get("jax"), facts["packages"]["jax"]),
        ):
            if then != now:
                _log.warning("%s: begun with %s %s, goes on with %s", self._path.parent, what, then, now)


def _x64() -> bool:
    import jax  # which a report does without

    return bool(jax.config.read("jax_enable_x64"))


def _time() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
