"""The folder of a run: its configuration, its card, what it can go on from, and where results and figures go.

A workdir explains itself:

    config.json      the experiment's name and configuration; the folder belongs to this one
    run.json         command, git commit, package versions, devices, start, end, status, reason, earlier attempts, what
                     the data were, and the digest of every result and figure of a run that is complete
    metrics.jsonl    one JSON object per line: step, loss, ...
    tensorboard/     the same numbers as event files, on request
    checkpoints/     see `dualgap_jax.checkpoints`
    parts/           finished parts that an interrupted run goes on from; see `Workdir.remember`
    results/         *.npz and *.json
    figures/         *.png and *.pdf
    .lock            held by the process at work; see `dualgap_jax.lock`

Nothing is read back unchecked: a file that is damaged or of another run is named, and what was in it computed again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dualgap_jax import interrupts, lock
from dualgap_jax.card import OUTPUTS, RunCard, altered, outputs
from dualgap_jax.config import ConfigError
from dualgap_jax.files import (
    DamagedFileError,
    canonical,
    file_in_the_way,
    is_temporary,
    jsonable,
    leaves,
    load_json,
    load_npz,
    local_path,
    remove_temporary,
    restored,
    save_json,
    save_npz,
    text_digest,
)
from dualgap_jax.metrics import Metrics, read_metrics

_log = logging.getLogger(__name__)
_BARE = {"config.json", "run.json", "metrics.jsonl", "metrics.seal", lock.FILE}  # files of a run that made nothing


class WorkdirError(ValueError):
    """A workdir that cannot be used as asked; the message says why and what to do."""


def default_workdir(root: str | Path, name: str, config: Mapping[str, Any]) -> Path:
    """`root/<name>-<8 hex digits>`, the digits from the SHA-256 of the configuration in canonical JSON.

    Raises:
      ValueError: if `name` is empty or holds a path separator.
    """
    if not name or "/" in name or os.sep in name:
        raise ValueError(f"name {name!r} cannot name a folder; give a non-empty name without separators")
    return Path(root) / f"{name}-{text_digest(canonical(jsonable(config)))[:8]}"


class Workdir:
    """A folder that belongs to one configuration; see the head of this module for what it holds.  Made by `open`.

    Attributes:
      path: the folder, absolute.
      config: the configuration, as JSON gives it back (tuples are lists).
      writes: False in the processes of a distributed run that take part in the work and leave writing to the first.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], command: Sequence[str] = (), writes: bool = True) -> None:
        self.path = path
        self.config: dict[str, Any] = jsonable(config, where="config")
        self.writes = writes
        self._command = tuple(command)
        self._card = RunCard(path / "run.json", self.config)
        self._confirmed: dict[str, str] = {}

    @classmethod
    def follow(cls, path: str | Path, config: Mapping[str, Any]) -> Workdir:
        """The workdir of a distributed run as every process but the first sees it: nothing is made, checked or written.

        Args:
          path: the folder, which all processes see.
          config: as for `open`.
        """
        return cls(local_path(path, "the work folder").expanduser().resolve(), config, writes=False)

    @classmethod
    def open(cls, path: str | Path, config: Mapping[str, Any], *, command: Sequence[str] = ()) -> Workdir:
        """The workdir at a path, new or of the same configuration.  Nothing is made or written before `session`.

        Args:
          path: the folder.
          config: a nested dict of what JSON can hold; its key `experiment` is the name of the experiment.
          command: the command line, for `run.json`.

        Raises:
          WorkdirError: if it holds another experiment or configuration (each difference is listed), or other files.
          TypeError: if JSON cannot hold `config`.
        """
        try:
            folder = local_path(path, "the work folder").expanduser().resolve()
            if (file := file_in_the_way(folder)) is not None:
                raise WorkdirError(f"cannot write in {folder} (NotADirectoryError: {file} is a file); change --workdir")
            workdir = cls(folder, config, command)
            workdir._check_config()
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name with a zero byte
            if isinstance(error, WorkdirError | ConfigError):
                raise
            raise WorkdirError(f"{path} cannot be read ({error}); give another folder with --workdir") from error
        return workdir

    # --- whose folder it is -------------------------------------------------------------------------------------------

    def _check_config(self) -> bool:
        """Whether `config.json` is there and of this configuration; False where it is to be written.

        Raises:
          WorkdirError: if the folder belongs to something else.
        """
        if not self.path.exists():
            return False
        try:
            there = load_json(self.path / "config.json")
        except FileNotFoundError:
            self._check_nothing_foreign()
            return False
        except DamagedFileError as error:
            if self._card.own() is not None:
                _log.warning("%s; run.json says that the folder is of this configuration: it is written again", error)
                return False
            raise WorkdirError(f"{error}, or give another folder with --workdir") from error
        if not (lines := _differences(there, self.config)):
            return True
        if self._failed_before_anything():
            return False
        known, asked = there.get("experiment"), self.config.get("experiment")
        if known != asked:
            raise WorkdirError(
                f"{self.path} holds a run of experiment {known!r}, not {asked!r}; nothing was changed."
                " Give another folder with --workdir, or delete this one to start over"
            )
        raise WorkdirError(
            "\n".join(
                [
                    f"{self.path} holds another config; nothing was changed. What differs:",
                    *lines,
                    "Give another folder with --workdir, or delete this one to start over",
                ]
            )
        )

    def _check_nothing_foreign(self) -> None:
        foreign = sorted(p.name for p in self.path.iterdir() if p.name != lock.FILE and not is_temporary(p))
        if foreign and self._card.own() is None:
            listing = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            raise WorkdirError(
                f"{self.path} has no config.json but holds other files ({listing}); nothing was changed."
                " Give a new or empty folder with --workdir"
            )

    def _failed_before_anything(self) -> bool:
        """Whether the last run, and every run in it, was refused (what only data can check) before it made anything."""
        files = [p for p in self.path.rglob("*") if p.is_file() and not is_temporary(p)]
        runs = {self.path, *(p.parent for p in files if p.name == "run.json")}
        return (
            all((RunCard(folder / "run.json", {}).read() or {}).get("status") == "failed" for folder in runs)
            and not any(read_metrics(folder / "metrics.jsonl") for folder in runs)
            and all(p.parent in runs and p.name in _BARE for p in files)
        )

    # --- what is there ------------------------------------------------------------------------------------------------

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

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        if self.writes and not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def status(self) -> str | None:
        """'running', 'complete', 'failed', 'interrupted', or None when nothing has run here, as far as is known.

        A run card that says 'running' although nobody holds the lock (SIGKILL, power) counts as 'interrupted'.
        """
        card = self._card.own()
        if card is None:
            return None
        return "interrupted" if card["status"] == "running" and not lock.is_held(self.path) else card["status"]

    def damaged(self) -> list[str] | None:
        """The results and figures of a complete run that are gone or not what was written; None if none is complete.

        The names are relative, such as `results/report.json`.
        """
        card = self._card.own()
        if card is None or card["status"] != "complete":
            return None
        return altered(self.path, card)

    def changes(self, sources: Mapping[str, str | None]) -> list[str]:
        """What the last session had otherwise, of the files whose digests are given and of the precision."""
        return self._card.changes(sources)

    # --- what a run can go on from ------------------------------------------------------------------------------------

    def confirm(self, name: str, value: Mapping[str, Any]) -> None:
        """Keeps in `run.json` what the run is computed from, and refuses to go on from something else.

        Args:
          name: what it is, such as 'data'.
          value: facts about it; two are the same when their `digest` is.

        Raises:
          WorkdirError: if the run was begun with another one.
        """
        if not self.writes:
            return
        asked, begun = jsonable(value), self._card.inputs().get(name)
        if begun is not None and begun["digest"] != asked["digest"]:
            lines = "\n".join(_differences(begun, asked))
            raise WorkdirError(
                f"the {name} are not those that the run in {self.path} was begun with:\n{lines}\n"
                f"Give the same {name}, or another folder with --workdir"
            )
        self._confirmed[name] = asked["digest"]
        if begun is None:
            self._card.update(inputs={**self._card.inputs(), name: asked})

    def remember(self, name: str, compute: Callable[[], Mapping[str, Any] | Any]) -> dict[str, Any]:
        """What `compute` gives, from `parts/` if this run has computed it before.

        Args:
          name: of the part, unique in the run; any text.
          compute: gives a mapping or NamedTuple from names to arrays and to values that `jsonable` takes.

        Returns:
          The mapping: arrays as NumPy arrays of the same bits; everything else as JSON gives it back (tuples are
          lists).
        """
        if (found := self.recall(name)) is not None:
            return found
        return self.keep(name, compute())

    def recall(self, name: str) -> dict[str, Any] | None:
        """What `keep` put away under a name; None where there is nothing, or (said) nothing sound of this very run."""
        path = self._part(name)
        if not self.writes or not path.exists():
            return None
        try:
            arrays = load_npz(path)
            record = restored(json.loads(bytes(arrays.pop("json"))))
            if record["of"] != self._identity(name):
                raise DamagedFileError(f"{path} is another part, or a part of another run")
        except (DamagedFileError, KeyError, ValueError, TypeError) as error:
            _log.warning("%s; it is computed again", error)
            return None
        return {**record["values"], **arrays}

    def keep(self, name: str, value: Mapping[str, Any] | Any) -> dict[str, Any]:
        """Puts a finished part away, and returns it as `recall` would."""
        values = dict(value._asdict() if hasattr(value, "_asdict") else value)
        arrays = {k: np.asarray(v) for k, v in values.items() if hasattr(v, "__array__") and np.ndim(v) > 0}
        record = {"of": self._identity(name), "values": {k: v for k, v in values.items() if k not in arrays}}
        plain = jsonable(record, where=f"part {name!r}")
        if self.writes:
            text = np.frombuffer(json.dumps(plain, allow_nan=False).encode(), np.uint8)
            save_npz(self._part(name), json=text, **arrays)
        return {**restored(plain)["values"], **arrays}

    def forget(self, name: str) -> None:
        """Deletes a part, if there is one."""
        if self.writes:
            self._part(name).unlink(missing_ok=True)

    def _part(self, name: str) -> Path:
        return self.path / "parts" / f"{urllib.parse.quote(name, safe=' =,')}.npz"

    def _identity(self, name: str) -> str:
        """What a part is: its name, this configuration, these inputs."""
        return text_digest(canonical({"part": name, "config": self.config, "inputs": self._confirmed}))

    def metrics(self, tensorboard: bool = False) -> contextlib.AbstractContextManager[Metrics | None]:
        """The writer of `metrics.jsonl`, and of event files in `tensorboard/` when asked for; None for a follower."""
        if not self.writes:
            return contextlib.nullcontext()
        return Metrics(self.path / "metrics.jsonl", self.path / "tensorboard" if tensorboard else None)

    # --- sessions -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def session(self, sources: Mapping[str, str | None] = MappingProxyType({})) -> Iterator[None]:
        """Holds the folder and keeps its card while work is done: `with workdir.session(): ...`.

        The status is 'running' inside; 'complete' after a normal end; 'interrupted' after KeyboardInterrupt or SIGTERM
        (raised inside as `interrupts.Terminated`); 'failed' after any other exception, with its type and message as the
        reason.  Exceptions propagate.  What earlier sessions recorded is kept, shortened, under `attempts`, and the
        digests of `sources`, files of one's own, as they are.

        Raises:
          WorkdirError: if another process is at work in the folder, it belongs to something else, was begun at another
            precision, or cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock.held(self.path))
                fresh = not self._check_config()
                if (begun := self._card.other_precision()) is not None and not self._failed_before_anything():
                    raise WorkdirError(f"{self.path} was begun with {begun}: set it so, or give another --workdir")
                remove_temporary([self.path, *(self.path / name for name in ("parts", "checkpoints", *OUTPUTS))])
                if fresh:
                    save_json(self.path / "config.json", self.config)
                self._confirmed = {}
                self._card.begin(self._command, sources)
            except lock.LockedError as error:
                raise WorkdirError(str(error)) from error
            except OSError as error:
                raise WorkdirError(
                    f"cannot write in {self.path} ({type(error).__name__}: {error.strerror or error});"
                    " give another folder with --workdir, or change its permissions"
                ) from error
            start = time.monotonic()
            # What stands if a second signal cuts the clause short that says better.
            status: str = "interrupted"
            reason: str | None = "KeyboardInterrupt"
            files: dict[str, Any] = {}
            try:
                with interrupts.raised():
                    yield
                    files = outputs(self.path, self._card.left())
                    status, reason = "complete", None
            except BaseException as error:
                status, reason = "failed", f"{type(error).__name__}: {error}"
                if (interruption := interrupts.behind(error)) is not None:
                    status = "interrupted"
                    reason = "SIGTERM" if isinstance(interruption, interrupts.Terminated) else "KeyboardInterrupt"
                raise
            finally:
                with interrupts.deferred():
                    seconds = round(time.monotonic() - start, 3)
                    self._card.end(status=status, reason=reason, seconds=seconds, files=files)

    @contextlib.contextmanager
    def repair(self) -> Iterator[None]:
        """Holds the folder of a complete run while files are added or figures drawn again, and keeps their digests.

        What is not written meanwhile keeps the digest that it had: a damaged file is not vouched for.

        Raises:
          WorkdirError, OSError: if another process is at work in it, or it cannot be written.
        """
        try:
            with lock.held(self.path):
                found = outputs(self.path)
                yield
                card = self._card.own()
                written = {name: digest for name, digest in outputs(self.path).items() if found.get(name) != digest}
                if card is not None and card["status"] == "complete":
                    self._card.update(files={**card["files"], **written})
        except lock.LockedError as error:
            raise WorkdirError(str(error)) from error


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line per dotted name whose JSON text differs."""
    there, asked = ({name: json.dumps(value, sort_keys=True) for name, value in leaves(c)} for c in (old, new))
    return [
        f"  {name}: {there.get(name, '(absent)')} there, {asked.get(name, '(absent)')} asked for"
        for name in sorted({*there, *asked})
        if there.get(name) != asked.get(name)
    ]
