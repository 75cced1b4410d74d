"""One folder, one process: a kernel lock held while the work goes on, and a sign of life for other machines.

The lock is the kernel's (`flock`): it is taken at once or not at all, holds across containers, and goes with the
process that held it.  A network file system may not carry it to other machines; so the lock file also says who holds
it, and is touched every few seconds.  What another machine left there is never taken as ended without a word.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import fcntl
import json
import logging
import os
import shlex
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dualgap_jax import machine

_log = logging.getLogger(__name__)

FILE = ".lock"
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # without a sign of life
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class LockedError(RuntimeError):
    """Another process is at work in the folder, or may be; the message says which, and what to do."""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, which exists.

    Raises:
      LockedError: if another process holds it, or one on another machine may.
      OSError: if nothing can be written in the folder.
    """
    path, me = folder / FILE, machine.this_process()
    file, kernel = _take(path)
    stop = threading.Event()
    try:
        _check_mark(path, file, me, kernel)
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(me).encode(), 0)
        if not kernel:
            _settle(path, file, me)
        beat = threading.Thread(target=_beat, args=(path, file, stop), name="lock", daemon=True)
        beat.start()
        try:
            yield
        finally:
            stop.set()
            beat.join()
            if _is_current(path, file):
                os.ftruncate(file, 0)
    finally:
        os.close(file)


def is_held(folder: Path) -> bool:
    """Whether a process holds the lock of a folder, as far as this machine can tell; nothing is written."""
    try:
        file = os.open(folder / FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    else:
        mark = _mark(file)
        if mark is None or mark.get("boot") == machine.this_process()["boot"]:
            return False
    finally:
        os.close(file)
    return time.time() - (folder / FILE).stat().st_mtime < STALE_SECONDS


def _take(path: Path) -> tuple[int, bool]:
    """The open lock file, and whether the kernel has locked it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                kernel = True
            except BlockingIOError:
                raise LockedError(_at_work(_mark(file), path.parent)) from None
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                kernel = False
            if _is_current(path, file):
                return file, kernel
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # it was removed, or replaced, meanwhile


def _is_current(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(file))
    except OSError:
        return False


def _mark(file: int) -> dict[str, Any] | None:
    """Who the lock file names; None for an empty file, an empty dict for one that cannot be read."""
    content = os.pread(file, 4096, 0)
    if not content:
        return None
    try:
        mark = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return mark if isinstance(mark, dict) else {}


def _check_mark(path: Path, file: int, me: dict[str, Any], kernel: bool) -> None:
    """Raises LockedError when the holder that the file names is, or may be, at work on another machine."""
    mark = _mark(file)
    if mark is None:
        return
    same_kernel = me["boot"] is not None and mark.get("boot") == me["boot"]
    if kernel and (same_kernel or not mark.get("host")):
        return  # its lock went with it
    with tempfile.TemporaryFile(dir=path.parent) as now:  # its time is the file system's, not this machine's
        age = os.fstat(now.fileno()).st_mtime - os.fstat(file).st_mtime
    if age < STALE_SECONDS:
        raise LockedError(_at_work(mark, path.parent, f", last sign of life {max(age, 0):.0f} s ago"))
    who = f"process {mark.get('pid')} on {mark.get('host')}"
    if mark.get("host") == me["host"]:
        _log.warning("%s: %s gave no sign of life for %.0f s and is taken as ended", path.parent, who, age)
        return
    raise LockedError(
        f"{who} was at work in {path.parent} and gave its last sign of life {age:.0f} s ago; if it has ended, take the"
        f" folder over with: rm {shlex.quote(str(path))}"
    )


def _settle(path: Path, file: int, me: dict[str, Any]) -> None:
    """Where the kernel does not lock: the last of several that wrote their mark at once has the folder."""
    time.sleep(1.0)
    mark = _mark(file)
    if not _is_current(path, file) or mark != me:
        raise LockedError(_at_work(mark, path.parent))


def _at_work(mark: dict[str, Any] | None, folder: Path, seen: str = "") -> str:
    who = f"process {mark['pid']} on {mark['host']}" if mark and {"pid", "host"} <= mark.keys() else "another process"
    return f"{who} is at work in {folder}{seen}; wait for it, end it, or give another folder with --workdir"


def _beat(path: Path, file: int, stop: threading.Event) -> None:
    """Touches the lock file until told to stop; ends the work when the file is no longer this process's."""
    while not stop.wait(BEAT_SECONDS):
        if not _is_current(path, file):
            _log.error("%s was removed: another process takes the folder over, and this one stops", path)
            _thread.interrupt_main(signal.SIGTERM)
            return
        with contextlib.suppress(OSError):
            os.utime(file)
