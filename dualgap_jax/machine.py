"""What a run can say of the machine it is on: devices, memory, versions of packages, the commit of this package."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def facts() -> dict[str, Any]:
    """Commit, versions, platform and devices, as a run card keeps them."""
    return {
        "git": git_state(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": _devices(),
    }


def own_version() -> str:
    """The version of this package."""
    return str(sys.modules[__name__.partition(".")[0]].__version__)


def this_process() -> dict[str, Any]:
    """Which process this is: host, boot of its kernel (None where the system does not say) and process id."""
    return {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid()}


def _boot() -> str | None:
    """A mark that all processes under one running kernel share, those in containers too."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def git_state() -> dict[str, Any] | None:
    """Commit of this package's source and whether it has changes; None when git does not track it."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_memory() -> int | None:
    """Bytes of the first device that this process may use in all; None on CPU.

    A device that does not say counts as 16 GiB, the least of those that networks are trained on.
    """
    import jax

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return None
    return int((device.memory_stats() or {}).get("bytes_limit", 2**34))


def memory_available() -> int:
    """Bytes that this process may still take on its first device (host memory on CPU, within its control group)."""
    import jax
    import psutil

    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    free = int(psutil.virtual_memory().available)
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return free


def peak_memory() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where the system does not say."""
    with contextlib.suppress(OSError, KeyError, ValueError):
        # Linux hands `ru_maxrss` on from the program that started this one; the high-water mark is the process's own.
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    try:
        import resource
    except ImportError:
        return None
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _devices() -> list[dict[str, Any]]:
    import jax

    kinds = [(device.platform, device.device_kind) for device in jax.devices()]
    return [{"platform": p, "kind": k, "count": kinds.count((p, k))} for p, k in dict.fromkeys(kinds)]
