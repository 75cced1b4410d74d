"""Speed and memory of a landscape whose three solutions are read from files, beside full re-evaluation of every point.

    python benchmarks/landscape_streamed.py [--json FILE] [--smoke] [--branches N] [--grid N] [--folder DIR]

The network is the three-layer one of Figure 4 (3072-8-8-8-10).  Three random solutions are written to files, 99 KB a
branch each, and read back a block of branches at a time: `plane_through`, then one `survey` of grid and edges,
reading and compilation included.  Peak memory is that of this process after the first survey, before anything else is
done in it.  The full re-evaluation forms `origin + a u + b v` and runs the network at each of a few points, block by
block as well (three networks of 50,000 branches and a fourth at the point would need 20 GB), its program compiled
before and its reading not counted.  The PyTorch loop, one module a branch, holds four networks: it is left out where
these need more than half of the free memory.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import landscape as in_memory
import numpy as np

from dualgap_jax import landscape
from dualgap_jax.data import Dataset, standardise
from dualgap_jax.losses import multi_margin
from dualgap_jax.machine import memory_available, peak_memory
from dualgap_jax.networks import mlp, multi_branch
from dualgap_jax.types import Params, State

_CLASSES, _EDGE_POINTS, _BLOCK = 10, 25, 1000
_OVER_FULL, _OVER_PEER = "over_full", "over_peer"


class OnDisk:
    """A random solution in one file a leaf.  Files are read, not mapped: mapped pages would count as this process'."""

    def __init__(self, folder: Path, case: in_memory.Case, seed: int) -> None:
        self.num_branches = case.num_branches
        rng = np.random.default_rng(seed)
        self._leaves: list[tuple[Path, tuple[int, ...]]] = []
        folder.mkdir(parents=True)
        for layer, (fan_in, out) in enumerate(itertools.pairwise(case.widths)):
            for name, shape in (("kernel", (out, fan_in)), ("bias", (out,))):
                path = folder / f"{layer}_{name}"
                with open(path, "wb") as file:
                    for first in range(0, case.num_branches, _BLOCK):
                        size = (min(_BLOCK, case.num_branches - first), *shape)
                        file.write((rng.random(size, np.float32) * 2 - 1) / np.float32(np.sqrt(fan_in)))
                self._leaves.append((path, shape))

    def read(self, first: int, count: int) -> tuple[Params, State]:
        """Branches `first .. first + count - 1`."""
        arrays = [
            np.fromfile(path, np.float32, count * int(np.prod(shape)), offset=4 * first * int(np.prod(shape)))
            .reshape(count, *shape)
            for path, shape in self._leaves
        ]  # fmt: skip
        return tuple({"kernel": k, "bias": b} for k, b in zip(arrays[::2], arrays[1::2], strict=True)), ()


def full_reevaluation(
    case: in_memory.Case, plane: landscape.Plane, data: Dataset, points: np.ndarray
) -> tuple[float, np.ndarray]:
    """Seconds for all points together, without reading, and the mean losses `[P]`."""
    x, y = standardise(data.x, data.mean, data.std), jnp.asarray(data.y)
    where = jnp.asarray(points, jnp.float32)
    branch = mlp(case.hidden, _CLASSES)

    @jax.jit
    def add(totals: jax.Array, directions: tuple[Params, ...]) -> jax.Array:
        count = jax.tree.leaves(directions)[0].shape[0]
        net = multi_branch(branch, count, reduce="sum")
        with jax.default_matmul_precision("highest"):
            sums = [net.apply(landscape.at(*point, *directions), (), x)[0] for point in where]
        return totals + jnp.stack(sums)

    totals, seconds = jnp.zeros((len(points), case.num_samples, _CLASSES)), 0.0
    for first in range(0, case.num_branches, _BLOCK):
        directions = jax.block_until_ready(plane.block(first, min(_BLOCK, case.num_branches - first)).params)
        if first in (0, case.num_branches // _BLOCK * _BLOCK):  # compiles
            jax.block_until_ready(add(totals, directions))
        start = time.perf_counter()
        totals = jax.block_until_ready(add(totals, directions))
        seconds += time.perf_counter() - start
    per_example = multi_margin().per_example
    losses = [jnp.mean(per_example(total / case.num_branches, y)) for total in totals]
    return seconds, np.asarray(losses, np.float64)


def measure(
    case: in_memory.Case, num_full: int, num_peer: int, rounds: int, folder: Path, torch: Any
) -> dict[str, Any]:
    """The row of results.

    Raises:
      RuntimeError: if another route gives other losses than the package.
    """
    data = common.random_images(case.image, case.num_samples)
    sources = [OnDisk(folder / str(seed), case, seed) for seed in range(3)]
    net = multi_branch(mlp(case.hidden, _CLASSES), case.num_branches)
    ticks = np.linspace(-0.6, 0.6, case.side)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    num_points = len(grid) + 3 * _EDGE_POINTS
    network = 4 * case.num_branches * sum(out * (fan_in + 1) for fan_in, out in itertools.pairwise(case.widths))
    start = time.perf_counter()
    plane = landscape.plane_through(sources)
    plane_seconds = time.perf_counter() - start

    def package() -> np.ndarray:
        found = landscape.survey(net, multi_margin(), data, plane, ticks, ticks, edge_points=_EDGE_POINTS)
        return found.surface.loss.reshape(-1)

    picks = np.linspace(0, len(grid) - 1, num_full).astype(int)
    survey_seconds, full_seconds, peak = [], [], 0
    for _ in range(rounds):
        start = time.perf_counter()
        losses = package()
        survey_seconds.append(time.perf_counter() - start)
        peak = peak or peak_memory()
        seconds, expected = full_reevaluation(case, plane, data, grid[picks])
        full_seconds.append(seconds)
    point = np.asarray(survey_seconds) / num_points
    full = np.asarray(full_seconds) / num_full
    row: dict[str, Any] = {
        "case": f"I={case.num_branches} d={case.widths[0]} hidden={'-'.join(map(str, case.hidden))}, streamed",
        "samples": case.num_samples,
        "points": num_points,
        "network_bytes": network,
        "plane_seconds": plane_seconds,
        "survey_seconds": common.spread(np.asarray(survey_seconds)),
        "points_per_second": common.spread(1 / point),
        "point_ms": common.spread(1e3 * point),
        "full_points_timed": num_full,
        "full_point_ms": common.spread(1e3 * full),
        "full_seconds_extrapolated": float(np.median(full) * num_points),
        _OVER_FULL: common.spread(full / point),
        "full_disagreement": common.disagreement(losses[picks], expected, "the full re-evaluation"),
        "peak_gib": peak / 2**30,
        "networks_over_peak": 3 * network / peak,
        "peer_points_timed": common.NOT_MEASURED,
        "peer_point_ms": common.NOT_MEASURED,
        _OVER_PEER: common.NOT_MEASURED,
        "peer_disagreement": common.NOT_MEASURED,
    }
    if torch is not None and 4 * 2 * network > memory_available() / 2:
        print("PyTorch is left out: its four networks do not fit in half of the free memory", file=sys.stderr)
    elif torch is not None:
        picks = np.linspace(0, len(grid) - 1, num_peer).astype(int)
        whole = plane.block(0, case.num_branches)
        call: Callable[[], list[float]] = in_memory.peer_loop(torch, in_memory.Setup(net, whole, data), grid[picks])
        peer, found = [], None
        for _ in range(rounds):
            start = time.perf_counter()
            found = call()
            peer.append((time.perf_counter() - start) / num_peer)
        row |= {
            "peer_points_timed": num_peer,
            "peer_point_ms": common.spread(1e3 * np.asarray(peer)),
            _OVER_PEER: common.spread(np.asarray(peer) / point),
            "peer_disagreement": common.disagreement(found, losses[picks], "PyTorch"),
        }
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes the JSON file."""
    parser = common.arguments(
        "Landscape of solutions on disk, beside full re-evaluation and PyTorch.", rounds=3, torch=True
    )
    parser.add_argument("--branches", type=common.positive, default=8000, help="I of the cifar_3layer network")
    parser.add_argument("--samples", type=common.positive, default=256, help="samples that the loss is taken over")
    parser.add_argument("--grid", type=common.positive, default=51, help="points along each side, at least 2")
    parser.add_argument("--folder", type=Path, help="where the files are made, and removed (default: a temporary one)")
    flags = parser.parse_args(argv)
    if flags.grid < 2:
        parser.error(f"--grid={flags.grid} must be at least 2")
    where = common.environment()
    torch = None if flags.no_torch else common.load_torch()
    case = in_memory.Case((32, 32, 3), (8, 8, 8), flags.branches, flags.samples, flags.grid)
    case, rounds = (in_memory.SMOKE, 1) if flags.smoke else (case, flags.rounds)
    print(f"measuring {case.num_branches} branches, {case.side} x {case.side} points", file=sys.stderr)
    if flags.folder is not None:
        flags.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        row = measure(case, 3 if flags.smoke else 2, 2, rounds, Path(folder), torch)
    row["targets"] = common.judge(row, () if flags.smoke else (common.Target(_OVER_FULL, 60.0),))
    results = {
        "benchmark": "landscape_streamed",
        "environment": where,
        "smoke": flags.smoke,
        "rounds": rounds,
        "rows": [row],
    }
    columns = {
        "case": "case",
        "points_per_second": "points / s",
        "point_ms": "point, ms",
        "full_point_ms": "full point, ms",
        _OVER_FULL: "full / point",
        "peer_point_ms": "PyTorch point, ms",
        _OVER_PEER: "PyTorch / point",
        "peak_gib": "peak, GiB",
        "networks_over_peak": "three networks / peak",
    }
    notes = [
        f"Medians (least-largest) over the rounds; {row['points']} points, {row['samples']} samples. A point is a share"
        " of the whole survey, reading and compilation included; it took",
        f"{common.text(row['survey_seconds'])} s, finding the plane {row['plane_seconds']:.3g} s."
        f" One network is {row['network_bytes'] / 1e9:.3g} GB."
        f" Extrapolated from {row['full_points_timed']} points, the full re-evaluation takes"
        f" {row['full_seconds_extrapolated']:.3g} s.",
    ]
    common.report(results, columns, notes, flags.json)


if __name__ == "__main__":
    main()
