"""What is said of the machine: memory, and the commit of the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from dualgap_jax import machine

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the system says nothing better")
def test_peak_memory_is_that_of_the_process_itself_and_not_of_what_started_it() -> None:
    """`ru_maxrss` of a new program starts at that of its parent; a peak stays when the memory is given back."""
    held = np.ones(400 * 2**20, np.uint8)
    source = """
        import numpy as np
        from dualgap_jax.machine import peak_memory
        before = peak_memory()
        np.ones(100 * 2**20, np.uint8)
        print(before, peak_memory())
    """
    command = [sys.executable, "-c", textwrap.dedent(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    before, after = map(int, done.stdout.split())
    own = machine.peak_memory()
    assert own is not None
    assert own > held.nbytes
    assert 90 * 2**20 < after - before < 110 * 2**20
    assert after < held.nbytes


def test_the_commit_is_that_of_the_package_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the module in a repository of its own: untracked, committed, changed, and without git."""
    repository = tmp_path / "repository"
    module = repository / "package" / "machine.py"
    module.parent.mkdir(parents=True)
    shutil.copy(machine.__file__, module)
    monkeypatch.setattr(machine, "__file__", str(module))

    def git(*command: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(
            ["git", *who, *command], cwd=repository, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "none")
    assert machine.git_state() is None
    git("add", ".")
    git("commit", "-m", "one")
    assert machine.git_state() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    module.write_text("")
    assert machine.git_state() == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.git_state() is None
