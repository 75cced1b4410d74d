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
@pytest.mark.parametrize("hang", ["thread", "atexit", "compilation", "program"])
def test_nothing_is_waited_for_at_the_end_nor_changes_its_status(hang: str, status: int) -> None:
    """Python's own end waits for threads and hooks, and beside a program that still runs it may crash."""
    busy = {
        "thread": "threading.Thread(target=time.sleep, args=(60,)).start()",
        "atexit": "atexit.register(time.sleep, 60)",
        "compilation": "threading.Thread(target=jax.jit(unrolled).lower(x).compile, daemon=True).start()",
        "program": "y = jax.jit(lambda x, k: jax.lax.fori_loop(0, k, lambda i, x: jnp.sin(x @ x), x))(x, 10**9)",
    }[hang]
    program = f"""
import atexit, sys, threading, time
import jax, jax.numpy as jnp
from dualgap_jax import interrupts
def unrolled(x):
    for _ in range(3000):
        x = jnp.sin(x @ x) + 1
    return x
x = jnp.ones((8, 8))
{busy}
print("so far")
interrupts.leave({status}, "the last words")
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (status, "so far\n")
    assert done.stderr.endswith("the last words\n")
    assert time.monotonic() - began < 40


def test_last_words_that_nobody_reads_are_not_waited_for() -> None:
    program = 'from dualgap_jax import interrupts; interrupts.leave(143, "x" * 10**6, seconds=1)'
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE) as process:
        assert process.wait(timeout=50) == 143


def started(body: str, patience: str) -> subprocess.Popen[str]:
    """A process inside `raised(patience)` that has come to `body`, a second ago."""
    program = f"""
import hashlib, time
from dualgap_jax import interrupts
with interrupts.raised({patience}):
    print("in", flush=True)
    {body}
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    time.sleep(1)
    return process


UNINTERRUPTIBLE = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # minutes in C, which Python's handlers wait for


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_program_that_cannot_be_interrupted_is_left(number: signal.Signals, name: str) -> None:
    with started(UNINTERRUPTIBLE, "patience=1.0") as process:
        began = time.monotonic()
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said.strip() == (
        f"{name}: a program that cannot be interrupted was left; what was saved is kept, the same command goes on."
    )
    assert time.monotonic() - began < 30


def test_a_process_that_handles_the_signal_is_given_its_time() -> None:
    body = "try: time.sleep(60)\n    finally:\n        time.sleep(3)\n        print('saved', flush=True)"
    with started(body, "patience=1.0") as process:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert out == "saved\n"


def test_a_program_that_handles_the_signal_by_itself_is_left_alone() -> None:
    body = "signal.signal(signal.SIGTERM, lambda *_: print('own', flush=True)); print('set', flush=True); time.sleep(4)"
    with started(f"import signal; {body}", "patience=1.0") as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        out = process.stdout.read()  # not communicate, which leaves what was read ahead with the first line
    assert out == "set\nown\n"
    assert process.returncode == 0


def test_without_patience_and_where_others_listen_nothing_is_cut_short() -> None:
    """A number of iterations that takes some seconds, so that the signal is handled after the patience has run out."""
    some = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**7)\n    print('done', flush=True)"
    with started(some, "") as process:
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert "Terminated" in said
    before = os.pipe()
    for end in before:
        os.set_blocking(end, False)
    signal.set_wakeup_fd(before[1])
    try:
        with interrupts.raised(patience=1.0):
            assert signal.set_wakeup_fd(before[1]) == before[1]
        assert signal.set_wakeup_fd(-1) == before[1]
    finally:
        signal.set_wakeup_fd(-1)
        for end in before:
            os.close(end)
    with interrupts.raised(patience=1.0):
        pass
    assert signal.set_wakeup_fd(-1) == -1
