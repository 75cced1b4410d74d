"""Compiled programs that runs of the tests leave to later ones: the larger part of the suite's work is XLA's.

JAX finds a program by what is compiled, the compiler and its options: after a change of the code, what it changes is
compiled anew.  A process writes into a folder of its own, because JAX writes in place; links are given and taken, and a
link to a whole file is there at once or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path

KEPT_FOR = 14 * 24 * 3600.0
"""Seconds after which a program that no run read is deleted; systems note reading once a day."""


def machine() -> str:
    """A name for machines that run one another's programs: the instructions of their processors."""
    try:
        told = Path("/proc/cpuinfo").read_text().splitlines()
        features = sorted({line for line in told if line.startswith(("flags", "Features", "model name"))})
    except OSError:
        features = [platform.processor()]
    return hashlib.sha256("\n".join([platform.platform(), *features]).encode()).hexdigest()[:12]


def take(store: Path, own: Path) -> frozenset[str]:
    """Links all programs of the store into the process's own, empty folder; their names."""
    taken = set()
    for entry in _files(store):
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            _link(Path(entry.path), own / entry.name)
            taken.add(entry.name)
    return frozenset(taken)


def give(own: Path, store: Path, taken: Iterable[str]) -> None:
    """Links the programs that this process compiled into the store, and deletes there what no run has read for long."""
    store.mkdir(parents=True, exist_ok=True)
    taken = frozenset(taken)
    for entry in _files(own):
        if entry.name not in taken:
            with contextlib.suppress(FileExistsError):  # another process compiled it too
                _link(Path(entry.path), store / entry.name)
    for entry in _files(store):
        with contextlib.suppress(FileNotFoundError):
            read = entry.stat()
            if time.time() - max(read.st_atime, read.st_mtime) > KEPT_FOR:
                Path(entry.path).unlink()


def _files(folder: Path) -> list[os.DirEntry[str]]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [entry for entry in entries if entry.name.endswith("-cache")]


def _link(source: Path, target: Path) -> None:
    """A second name, or on another disk a copy, whole before it has its name."""
    try:
        os.link(source, target)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:
        part = target.with_name(f"{target.name}.{os.getpid()}")
        part.write_bytes(source.read_bytes())
        part.replace(target)
