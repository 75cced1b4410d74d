"""A script in two processes of a distributed run on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_START = """
import pathlib, sys
import jax
jax.distributed.initialize("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]), initialization_timeout=30)
me, folder = jax.process_index(), pathlib.Path(sys.argv[3])
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_two_processes(script: str, folder: Path) -> None:
    """Runs a script, which sees `jax`, `sys`, `pathlib`, `me` and `folder`, in both; it must come to its end."""
    code, port = f"{_START}\n{script}\nprint('done')\n", str(free_port())
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [
        subprocess.Popen([sys.executable, "-c", code, port, str(i), str(folder)], env=environment, **pipes)
        for i in range(2)
    ]
    try:
        ended = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    for process, (out, err) in zip(both, ended, strict=True):
        assert process.returncode == 0, err
        assert out.endswith("done\n"), out
