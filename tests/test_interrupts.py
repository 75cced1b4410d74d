"""SIGTERM and Ctrl-C end the work, wherever they land."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dualgap_jax import interrupts
from dualgap_jax.interrupts import Terminated


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """Ctrl-C as Python has it, whatever the tests were started from."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_signals_are_raised_and_handlers_put_back(number: signal.Signals, error: type[BaseException]) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(error) as caught, interrupts.raised():
        signal.raise_signal(number)
    assert type(caught.value) is error
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_signal_that_lands_in_a_garbage_collection_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python prints and drops what a callback of the collector raises."""
    landed: list[str] = []

    def callback(phase: str, info: dict[str, int]) -> None:
        if not landed:
            landed.append(phase)
            signal.raise_signal(signal.SIGTERM)

    def work() -> None:
        gc.callbacks.append(callback)
        try:
            gc.collect()
        finally:
            gc.callbacks.remove(callback)
        landed.append("went on")
        for _ in range(400):
            time.sleep(0.05)

    said: list[type[BaseException] | None] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda info: said.append(info.exc_type))
    with pytest.raises(Terminated), interrupts.raised():
        work()
    assert landed == ["start", "went on"]
    assert said == []  # nothing of a traceback for what is not lost


def test_what_else_is_dropped_is_still_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[type[BaseException] | None] = []

    class Broken:
        def __del__(self) -> None:
            raise ZeroDivisionError

    def mine(info: Any) -> None:
        said.append(info.exc_type)

    monkeypatch.setattr(sys, "unraisablehook", mine)
    with interrupts.raised():
        broken = Broken()
        del broken
    assert said == [ZeroDivisionError]
    assert sys.unraisablehook is mine


def test_cleaning_up_is_not_interrupted_again() -> None:
    """However long it takes, and whatever is raised and caught meanwhile."""
    done: list[str] = []

    def clean() -> None:
        for _ in range(8):
            try:
                raise ValueError
            except ValueError:
                time.sleep(0.2)
        done.append("saved")

    with pytest.raises(Terminated), interrupts.raised():  # noqa: PT012
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            clean()
    assert done == ["saved"]


def test_a_second_signal_ends_the_cleaning_up() -> None:
    with pytest.raises(Terminated), interrupts.raised():  # noqa: PT012
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("went on")


def test_one_inside_another_and_in_other_threads_changes_nothing() -> None:
    with pytest.raises(Terminated), interrupts.raised():  # noqa: PT012
        handler = signal.getsignal(signal.SIGTERM)
        with interrupts.raised():
            assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGTERM) is handler

        def elsewhere() -> None:
            with interrupts.raised():
                pass

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        signal.raise_signal(signal.SIGTERM)


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts.raised():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        signal.raise_signal(signal.SIGINT)


def test_an_interruption_that_comes_out_as_another_error_is_known() -> None:
    """An extension module in C whose import is interrupted raises ImportError from it."""
    with pytest.raises(ImportError) as caught:  # noqa: PT012
        try:
            raise Terminated("SIGTERM")
        except Terminated as error:
            raise ImportError("initialization failed") from error
    assert isinstance(interrupts.behind(caught.value), Terminated)
    assert interrupts.behind(ValueError("a")) is None
    loop = ValueError("b")
    loop.__context__ = ValueError("c")
    loop.__context__.__context__ = loop
    assert interrupts.behind(loop) is None


def test_what_is_deferred_is_done_first() -> None:
    done = []

    def work() -> None:
        with interrupts.deferred():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append("the record")
        done.append("what comes after")

    with pytest.raises(KeyboardInterrupt), interrupts.raised():
        work()
    assert done == ["the record"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_is_raised_where_no_signal_came() -> None:
    with interrupts.deferred():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("status", [130, 143])
@pytest.mark.parametrize("hang", ["thread", "atexit", "nothing"])
def test_an_end_that_does_not_come_is_forced_with_its_status(hang: str, status: int) -> None:
    """What cannot be interrupted, such as a compilation: a thread that Python waits for, a hook at its exit."""
    program = f"""
import atexit, sys, threading, time
from dualgap_jax import interrupts
if {hang!r} == "thread":
    threading.Thread(target=time.sleep, args=(60,)).start()
elif {hang!r} == "atexit":
    atexit.register(time.sleep, 60)
interrupts.leave({status}, seconds=2)
sys.exit({status})
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == status, done.stderr
    assert time.monotonic() - began < 30
