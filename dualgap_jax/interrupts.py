"""SIGTERM and Ctrl-C as exceptions that are not lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

PATIENCE = 20.0  # seconds; clusters give 30 before they kill
_LOOK_SECONDS = 0.25
_LEAVE_SECONDS = 10.0
_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised in the main thread inside `raised`."""


@contextlib.contextmanager
def raised(patience: float | None = None) -> Iterator[None]:
    """Turns SIGTERM into `Terminated` and Ctrl-C into `KeyboardInterrupt`, again until one of them is under way.

    Python drops an exception that a signal handler raises inside a garbage-collection callback or a finaliser, and
    prints it.  So a thread looks whether the main thread is on its way out, and otherwise sends the signal again, and
    nothing is printed of the first.  Outside the main thread, where handlers cannot be set, and within another
    `raised`, nothing changes.

    Args:
      patience: Python handles signals between its own instructions, not while a compiled program runs, which may take
        minutes.  After so many seconds without them the process ends at once, with a line that says so and the status
        of the signal: what was saved is kept, as after a kill.  None waits for the program; so does a process whose
        signals another library listens to.
    """
    ours = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in ours}
    if threading.current_thread() is not threading.main_thread() or _is_ours(before[signal.SIGTERM]):
        yield
        return
    handler = _Handler()
    for number in ours:
        if number == signal.SIGTERM or before[number] is signal.default_int_handler:
            signal.signal(number, handler)
    stop = threading.Event()
    dropped = sys.unraisablehook

    def say_dropped(what: Any) -> None:
        if not isinstance(what.exc_value, KeyboardInterrupt):
            dropped(what)

    with _wakeups(patience is not None) as wakeups:
        watched = (handler, threading.get_ident(), stop, patience or 0.0, wakeups)
        watch = threading.Thread(target=_watch, args=watched, name="signals", daemon=True)
        watch.start()
        sys.unraisablehook = say_dropped
        try:
            yield
        finally:
            stop.set()
            watch.join()
            sys.unraisablehook = dropped
            for number, previous in before.items():
                if _is_ours(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL if previous is None else previous)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Lets a signal that comes meanwhile wait until the block is done: a second one leaves no record half made."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(number, lambda received, frame: waiting.append(received))
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        if waiting:
            signal.raise_signal(waiting[-1])


def leave(status: int, words: str, seconds: float = _LEAVE_SECONDS) -> NoReturn:
    """Ends the process with its last words; further signals change neither that nor its exit status.

    Nothing is waited for: not the program that a device still runs, beside which Python's own end may crash, nor
    threads, nor a compilation, which cannot be interrupted.

    Args:
      status: the exit status.
      words: a line for standard error.
      seconds: how long nobody may read it before the process ends without.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    force = threading.Timer(seconds, os._exit, (status,))
    force.daemon = True
    force.start()
    with contextlib.suppress(OSError, ValueError):  # nobody reads, or the stream is closed
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(words, file=sys.stderr, flush=True)
    os._exit(status)


class _Handler:
    """Raises, and remembers the last signal."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __call__(self, number: int, frame: object) -> None:
        self.received = number
        raise Terminated("SIGTERM") if number == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def _wakeups(wanted: bool) -> Iterator[int | None]:
    """A pipe into which the system writes the number of each signal as it comes; None where another library listens."""
    before = signal.set_wakeup_fd(-1) if wanted else -1
    if before != -1:
        signal.set_wakeup_fd(before)
    if before != -1 or not wanted:
        yield None
        return
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    signal.set_wakeup_fd(ends[1], warn_on_full_buffer=False)
    try:
        yield ends[0]
    finally:
        signal.set_wakeup_fd(-1)
        for end in ends:
            os.close(end)


def _is_ours(handler: Any) -> bool:
    return isinstance(handler, _Handler)


def _watch(handler: _Handler, thread: int, stop: threading.Event, patience: float, wakeups: int | None) -> None:
    idle = 0  # looks in a row at which a signal had come and no exception was on its way
    heard: dict[int, float] = {}  # signals that came for the handler, and when
    while not stop.wait(_LOOK_SECONDS):
        for number in _arrived(wakeups):
            if signal.getsignal(number) is handler:
                heard.setdefault(number, time.monotonic())
        received = handler.received
        if received is None and heard and time.monotonic() - min(heard.values()) > patience:
            _abandon(next(iter(heard)))
        idle = idle + 1 if received is not None and not _on_its_way(thread) else 0
        if idle == 2 and received is not None and not stop.is_set():
            idle = 0
            signal.pthread_kill(thread, received)


def _arrived(wakeups: int | None) -> set[int]:
    if wakeups is not None:
        with contextlib.suppress(OSError):  # nothing came
            return {number for number in os.read(wakeups, 512) if number in _NAMES}
    return set()


def _abandon(number: int) -> None:
    """Ends the process at once, as the signal would have."""
    said = "a program that cannot be interrupted was left; what was saved is kept, the same command goes on."
    os.write(2, f"\n{_NAMES[signal.Signals(number)]}: {said}\n".encode())
    os._exit(128 + number)


def _on_its_way(thread: int) -> bool:
    """Whether the thread is unwinding, or cleaning up after, a KeyboardInterrupt."""
    current = sys._current_exceptions().get(thread)
    error = current[1] if isinstance(current, tuple) else current
    return error is not None and behind(error) is not None


def behind(error: BaseException) -> KeyboardInterrupt | None:
    """The interruption that an exception is or comes from: code in C that is interrupted can raise another one."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        if isinstance(at, KeyboardInterrupt):
            return at
        seen.add(id(at))
        at = at.__cause__ or at.__context__
    return None
