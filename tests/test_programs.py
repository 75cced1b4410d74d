"""Programs that later runs of the tests find: whole ones only, each once, and no longer than they are read."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import programs
import pytest


def test_programs_pass_through_the_store(tmp_path: Path) -> None:
    store, first, second, third = (tmp_path / name for name in ("store", "first", "second", "third"))
    for folder in (first, second, third):
        folder.mkdir()
    assert programs.take(store, first) == frozenset()  # there is none yet
    (first / "a-cache").write_bytes(b"a")
    programs.give(first, store, ())
    taken = programs.take(store, second)
    assert taken == {"a-cache"}
    (second / "b-cache").write_bytes(b"b")
    (second / "other").write_bytes(b"no program")
    programs.give(second, store, taken)
    assert programs.take(store, third) == {"a-cache", "b-cache"}
    assert {path.name: path.read_bytes() for path in third.iterdir()} == {"a-cache": b"a", "b-cache": b"b"}


def test_a_program_that_two_processes_compiled_stays_that_of_the_first(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a-cache").write_text(name)
        programs.give(tmp_path / name, store, ())
    assert (store / "a-cache").read_text() == "first"


def test_on_another_disk_programs_are_copied_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    own = tmp_path / "own"
    own.mkdir()
    (own / "a-cache").write_bytes(b"a")
    programs.give(own, tmp_path / "store", ())
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "store").iterdir()] == [("a-cache", b"a")]


def test_what_no_run_reads_is_deleted(tmp_path: Path) -> None:
    own, store = tmp_path / "own", tmp_path / "store"
    own.mkdir()
    store.mkdir()
    ages = {"unread": (1.1, 1.1), "read": (0.5, 2), "new": (0, 0)}
    for name, (read, written) in ages.items():
        path = store / f"{name}-cache"
        path.touch()
        os.utime(path, tuple(time.time() - age * programs.KEPT_FOR for age in (read, written)))
    programs.give(own, store, ())
    assert {path.name for path in store.iterdir()} == {"read-cache", "new-cache"}


def test_a_later_run_compiles_nothing_again(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        import jax, programs
        store, own = map(Path, sys.argv[1:])
        own.mkdir()
        taken = programs.take(store, own)
        jax.config.update("jax_compilation_cache_dir", str(own))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        jax.jit(lambda x: x * 3 + len(sys.argv))(1.0)
        programs.give(own, store, taken)
        print(len(taken), sum(path.name.endswith("-cache") for path in own.iterdir()) - len(taken))
    """
    seen = []
    for name in ("first", "second"):
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "store"), str(tmp_path / name)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        seen.append([int(word) for word in done.stdout.split()])
    (nothing, compiled), (taken, again) = seen
    assert nothing == 0
    assert compiled >= 1
    assert (taken, again) == (compiled, 0)
