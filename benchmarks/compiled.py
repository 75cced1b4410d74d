"""What the compiler makes of the programs that matter, for chips that are not here: memory, operations, bytes, traffic.

    python benchmarks/compiled.py --topology v5e:2x2 --branches 1000 50000
    python benchmarks/compiled.py --topology v5p:8x8x4 --branches 100000000 --optimizers sgd --only chips
    python benchmarks/compiled.py --topology v5e:2x2 --branches 64 --kinds conv vgg9 --lanes 128 1024

Programs are compiled ahead of time from shapes alone, for one chip and for all chips of the topology with the branches,
or the runs, shared.  TPUs need the package `libtpu` (no chip), `--topology h100` the CUDA plugin of JAX (no driver, no
CUDA libraries; nothing is timed for it, so kernels are those that the compiler takes untimed).  `--topology cpu`
compiles for this machine.  Memory,
copies, traffic between chips, tiles and estimated cycles are the compiler's; operations and bytes moved follow from the
shapes; none is measured.  The roofline is the larger of operations over the chip's peak and bytes over its bandwidth,
both as the makers publish them.  The estimate is the sum of the compiler's cycles, one operation after the other and
each loop as often as it turns, at the chip's clock; operations without one (gathers) are named beside it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# libtpu asks a cloud's servers what machine this is, unless it is told.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
# The CUDA plugin asks for the libraries of a GPU that is here, unless it is told.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import compiled_programs as programs
import jax
from common import environment
from compiled_text import numbers_of, summary

from dualgap_jax.terminal import table


class Chip(NamedTuple):
    """Published peak rates of one device as JAX counts them.

    Attributes:
      products, vector: operations a second, of bfloat16 products and of the vector units.
      bandwidth, memory: bytes a second, and bytes.
      clock: cycles a second.
      exact: operations a second of float32 products; None where they are six passes of bfloat16.
    """

    products: float
    vector: float
    bandwidth: float
    memory: float
    clock: float
    exact: float | None = None


# Products, bandwidth and memory: cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, "System architecture"; a device of a
# v4 topology is one of the two cores of a chip, one of v5p both.  The clock follows from the products (2 x 128
# x 128 a matrix unit and cycle, four units a core, on v6e two of 256 x 256) and gives the vector units' 8 x 128 x 4
# operations a cycle and core: jax-ml.github.io/scaling-book, "How to think about TPUs".
CHIPS = {
    "v4": Chip(137.5e12, 4096 * 1.05e9, 614e9, 16e9, 1.05e9),
    "v5e": Chip(197e12, 4096 * 1.5e9, 819e9, 16e9, 1.5e9),
    "v5p": Chip(459e12, 2 * 4096 * 1.75e9, 2765e9, 95e9, 1.75e9),
    "v6e": Chip(918e12, 4096 * 1.75e9, 1640e9, 32e9, 1.75e9),
    # NVIDIA H100 SXM data sheet: TF32 without sparsity, float32, bandwidth, memory, boost clock.
    "h100": Chip(494e12, 67e12, 3350e9, 80e9, 1.98e9, exact=67e12),
}
# What XLA asks of a GPU that is not here, as it names it; the figures of an H100 SXM.
_H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 7 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  device_memory_size: 85899345920 memory_bandwidth: 3350000000000 l2_cache_size: 52428800
}
"""
COLUMNS = {
    "program": "program",
    "argument_bytes": "arguments GB",
    "temporary_bytes": "temporaries GB",
    "operations": "GFLOP",
    "bytes_moved": "GB moved",
    "collectives": "collectives",
    "copies_of_whole_arrays": "copies",
    "tiles": "tiles / numbers",
    "roofline_seconds": "roofline ms",
    "estimate_seconds": "estimate ms",
    "compile_seconds": "s to compile",
}


def compiled(program: programs.Program, chip: Chip | None) -> dict[str, Any]:
    """One row: what the compiler says of a program, or why it does not compile."""
    began = time.perf_counter()
    row: dict[str, Any] = {"program": program.name, "parameter_bytes": program.parameters}
    try:
        done = jax.jit(program.function, donate_argnums=program.donated).lower(*program.arguments).compile()
    except Exception as error:  # what does not compile or does not fit is a result
        return {**row, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
    memory, text = done.memory_analysis(), done.as_text()
    said = summary(text)
    copies = [m for m in re.findall(r"= f32\[([\d,]+)\]\S* copy\(", text) if numbers_of(m) * 4 > program.parameters / 2]
    row |= {
        "compile_seconds": time.perf_counter() - began,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "operations": program.operations,
        "bytes_moved": program.traffic,
        "collectives": [f"{kind} {count:,} B" for kind, count in said.collectives],
        "copies_of_whole_arrays": len(copies),
        "custom_calls": sorted(set(re.findall(r'custom_call_target="([^"]+)"', text))),
        "tiles": [said.arguments_padded / max(said.arguments, 1), said.written_padded / max(said.written, 1)],
    }
    if chip is not None:
        peak = chip.products / program.passes if program.passes else chip.vector
        if program.passes > 1 and chip.exact is not None:
            peak = chip.exact
        arithmetic, traffic = row["operations"] / peak, row["bytes_moved"] / chip.bandwidth
        row["roofline_seconds"] = max(arithmetic, traffic)
        row["bound_by"] = "arithmetic" if arithmetic > traffic else "bandwidth"
        row["fits"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes <= chip.memory
        row["estimate_seconds"], row["unestimated"] = said.cycles / chip.clock, said.unestimated
    return row


def devices_of(topology: str) -> tuple[Sequence[Any], Chip | None]:
    """The devices of a topology that is not here, and the chip's rates; 'cpu' is this machine."""
    if topology == "cpu":
        return jax.devices("cpu"), None
    from jax.experimental import topologies

    if topology == "h100":
        return _h100(topologies.get_topology_desc), CHIPS[topology]
    try:
        described = topologies.get_topology_desc(topology, "tpu")
    except Exception as error:
        raise SystemExit(f"{topology}: {error}\nCompiling for TPUs needs libtpu: pip install libtpu") from error
    return list(described.devices), CHIPS.get(topology.partition(":")[0])


def _h100(describe: Callable[..., Any]) -> Sequence[Any]:
    """One H100.  JAX looks for the platform among the devices that are here before it lowers for one that is not."""
    from jax._src import xla_bridge

    present = xla_bridge.canonicalize_platform

    def canonical(platform: str) -> str:
        return "cuda" if platform in ("gpu", "cuda") else present(platform)

    try:
        described = describe(platform="cuda", topology="1x1x1", target_config=_H100)
    except Exception as error:
        raise SystemExit(
            f"h100: {error}\nCompiling for GPUs needs JAX's CUDA plugin: pip install jax-cuda13-plugin jax-cuda13-pjrt"
            " of the same version as jaxlib"
        ) from error
    xla_bridge.canonicalize_platform = canonical
    return list(described.devices)


def cell(row: dict[str, Any], key: str) -> str:
    """What the table says of a row in one column."""
    value = row.get(key)
    if value is None or (key == "estimate_seconds" and not value):
        return "-"
    if key in ("argument_bytes", "temporary_bytes"):
        return f"{value / 1e9:.3f}" + (" does not fit" if key == "argument_bytes" and row.get("fits") is False else "")
    if key in ("operations", "bytes_moved"):
        return f"{value / 1e9:.4g}"
    if key == "collectives":
        return ", ".join(value) or "none"
    if key == "tiles":
        return " / ".join(f"{ratio:.2f}" for ratio in value)
    if key == "roofline_seconds":
        return f"{1e3 * value:.3g} ({row['bound_by']})"
    if key == "estimate_seconds":
        left = ", ".join(f"{count:,} {name}" for name, count in row["unestimated"].items())
        return f"{1e3 * value:.3g}" + (f" without {left}" if left else "")
    return f"{value:.0f}" if key == "compile_seconds" else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--topology", default="v5e:2x2", help="v4, v5e, v5p, v6e with a shape, such as v5p:2x2x1; h100; cpu"
    )
    parser.add_argument("--branches", type=int, nargs="*", default=[1000, 50000])
    parser.add_argument("--kinds", nargs="+", default=["mlp"], choices=list(programs.BRANCHES))
    parser.add_argument("--optimizers", nargs="+", default=list(programs.OPTIMIZERS), choices=list(programs.OPTIMIZERS))
    parser.add_argument("--lanes", type=int, nargs="*", default=[], help="runs of Table 1 in a block")
    parser.add_argument("--batches", type=int, nargs="+", default=[10], help="examples a step of Table 1's runs")
    parser.add_argument("--chunk", type=int, default=0, help="branches at a time; 0: as the package chooses")
    parser.add_argument(
        "--only", default="", help="only programs of these words: streamed, plain, chips, landscape, ..."
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    devices, chip = devices_of(options.topology)
    parts = [devices[:1], *([devices] if len(devices) > 1 else [])]
    extra = {"memory": int(chip.memory) if chip else None, "chunk": options.chunk}
    makers: list[tuple[str, Callable[[], programs.Program]]] = []

    def add(words: str, maker: Callable[..., programs.Program], *arguments: Any, **more: Any) -> None:
        makers.append((words, functools.partial(maker, *arguments, **more)))

    for branches in options.branches:
        for kind in options.kinds:
            for optimizer in options.optimizers:
                for some in parts:
                    if branches % len(some) == 0:
                        words = f"streamed {kind} {optimizer}" + (" chips" if len(some) > 1 else "")
                        add(words, programs.steps, branches, optimizer, True, some, kind=kind, **extra)
                add(f"plain {kind} {optimizer}", programs.steps, branches, optimizer, False, devices[:1], kind=kind)
        if "mlp" in options.kinds:
            add("landscape", programs.landscape, min(branches, 1000), devices)
    for lanes in options.lanes:
        for size in options.batches:
            for some in parts:
                add("Table 1" + (" chips" if len(some) > 1 else ""), programs.hitting, lanes, size, some)
    if "mlp" in options.kinds and options.branches:
        add("Theorem 2", programs.gram, 8192, devices)
    rows: list[dict[str, Any]] = []
    for words, make in makers:
        if not all(word in words.split() for word in options.only.split()):
            continue
        program = make()
        if program.name in [row["program"] for row in rows]:
            continue
        print(f"compiling: {program.name}", file=sys.stderr, flush=True)
        rows.append(compiled(program, chip))
        if options.json is not None:
            text = json.dumps({"topology": options.topology, **environment(), "rows": rows}, indent=1)
            options.json.write_text(text)
    cells = [
        [cell(row, key) for key in COLUMNS] if "error" not in row else [row["program"], row["error"], *[""] * 9]
        for row in rows
    ]
    print(f"Compiled for {options.topology}, batch {programs.BATCH}, nothing here is measured.\n")
    print(table(list(COLUMNS.values()), cells))


if __name__ == "__main__":
    main()
