"""Speed of checkpoints beside the limits of the machine: writing the same bytes bare, and computing their digests.

    python benchmarks/checkpoints.py [--branches N] [--peak-only] [--folder PATH] [--json FILE] [--smoke]

The state is that of `configs/cifar_3layer.py` with N branches, 99 kB each: 1 GB for the 10,000 of the default.  A bare
write puts the same bytes into files of the same size and waits for the disk, as a save does; the bare digest is SHA-256
of the bytes in memory, on as many threads as reading uses.  Reading finds the files in the system's cache.  The peaks
are those of the whole process while it saves the state, and while it restores it with nothing else in memory, over the
bytes of the state; `--peak-only` measures nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np

from dualgap_jax.checkpoints import Checkpointer, load, open_slices
from dualgap_jax.checkpoints.rows import CHUNK_BYTES, WORKERS
from dualgap_jax.machine import peak_memory

_SLICE = 512  # branches
_COLUMNS = {
    "case": "case",
    "save_mb_s": "save MB/s",
    "write_mb_s": "bare write MB/s",
    "of_write": "of bare write",
    "restore_mb_s": "restore MB/s",
    "slices_mb_s": "slices MB/s",
    "digest_mb_s": "bare digest MB/s",
    "slices_of_digest": "slices of digest",
    "save_peak": "save, peak / bytes",
    "restore_peak": "restore, peak / bytes",
}


def parameters(num_branches: int) -> dict[str, jax.Array]:
    """Three hidden layers of width 8 on 3072 inputs, ten classes; leaves `[I, ...]`."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number, (fan_in, out) in enumerate(itertools.pairwise((3072, 8, 8, 8, 10))):
        shapes |= {f"kernel{number}": (out, fan_in), f"bias{number}": (out,)}

    @jax.jit
    def make() -> dict[str, jax.Array]:
        branch = jnp.arange(num_branches, dtype=jnp.float32)
        rows = {name: jnp.sin(jnp.arange(math.prod(shape)).reshape(shape)) for name, shape in shapes.items()}
        return {name: jnp.multiply.outer(branch, row) for name, row in rows.items()}

    return jax.block_until_ready(make())


def bare_write(data: np.ndarray, folder: Path) -> None:
    """The bytes in files of a chunk each, waited for, then removed."""

    def write(number: int) -> None:
        with (folder / str(number)).open("wb", buffering=0) as file:
            file.write(data[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES].data)
            os.fsync(file.fileno())

    blocks = range(-(-data.nbytes // CHUNK_BYTES))
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(write, blocks))
    for number in blocks:
        (folder / str(number)).unlink()


def bare_digest(data: np.ndarray) -> None:
    blocks = range(0, data.nbytes, CHUNK_BYTES)
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(lambda at: hashlib.sha256(data[at : at + CHUNK_BYTES].data).digest(), blocks))


def peak_of(work: Callable[[], Any]) -> int | None:
    """Largest resident memory of the process while it works."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew, on Linux
    jax.block_until_ready(work())
    return peak_memory()


def peaks(num_branches: int, folder: Path) -> dict[str, Any]:
    """Peak memory of a save and of a restore."""
    state = parameters(num_branches)
    template = jax.eval_shape(lambda: state)
    size = sum(leaf.nbytes for leaf in state.values())
    with Checkpointer(folder, keep=1) as checkpointer:
        saved = peak_of(lambda: checkpointer.save(0, state))
    state.clear()
    restored = peak_of(lambda: load(folder, template).state)
    shutil.rmtree(folder)
    found = {"save_peak": saved, "restore_peak": restored}
    case = {"case": f"I={num_branches}, {size / 1e6:.3g} MB", "bytes": size}
    return case | {name: peak / size if peak else common.NOT_MEASURED for name, peak in found.items()}


def rates(num_branches: int, folder: Path, rounds: int) -> dict[str, Any]:
    """MB a second of every call, side by side."""
    state = parameters(num_branches)
    template = jax.eval_shape(lambda: state)
    size = sum(leaf.nbytes for leaf in state.values())
    data = np.ones(size, np.uint8)
    steps = itertools.count()
    with Checkpointer(folder / "checkpoints", keep=1) as checkpointer:

        def slices() -> None:
            opened = open_slices(checkpointer.path, template)
            for first in range(0, num_branches, _SLICE):
                opened.read(first, min(_SLICE, num_branches - first))

        calls: dict[str, Callable[[], object]] = {
            "save": lambda: checkpointer.save(next(steps), state),
            "write": lambda: bare_write(data, folder),
            "restore": lambda: load(checkpointer.path, template).state,
            "slices": slices,
            "digest": lambda: bare_digest(data),
        }
        seconds = common.interleave(calls, rounds)
    speed = {name: size / values / 1e6 for name, values in seconds.items()}
    return {
        **{f"{name}_mb_s": common.spread(rate) for name, rate in speed.items()},
        "of_write": common.spread(speed["save"] / speed["write"]),
        "slices_of_digest": common.spread(speed["slices"] / speed["digest"]),
    }


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, and writes the JSON file if one is named."""
    parser = common.arguments(str(__doc__).split("\n\n")[0], rounds=3)
    parser.add_argument("--branches", type=common.positive, default=10_000, help="I")
    parser.add_argument("--peak-only", action="store_true", help="leave the speeds out")
    parser.add_argument("--folder", type=Path, help="where the files go for a while, on the disk to be measured")
    flags = parser.parse_args(argv)
    where = common.environment()
    num_branches, rounds = (20, 1) if flags.smoke else (flags.branches, flags.rounds)
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        row: dict[str, Any] = {**dict.fromkeys(_COLUMNS, common.NOT_MEASURED), "targets": {}}
        row |= peaks(num_branches, Path(folder, "peaks"))
        if not flags.peak_only:
            row |= rates(num_branches, Path(folder), rounds)
    results = {
        "benchmark": "checkpoints",
        "smoke": flags.smoke,
        "rounds": rounds,
        "environment": where,
        "rows": [row],
    }
    common.report(results, _COLUMNS, [f"median (least-largest) of {rounds}; slices of {_SLICE} branches"], flags.json)


if __name__ == "__main__":
    main(sys.argv[1:])
