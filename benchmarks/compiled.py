"""What the compiler makes of the programs that matter, for chips that are not here: memory, operations, bytes, traffic.

    TPU_SKIP_MDS_QUERY=1 python benchmarks/compiled.py --topology v5e:2x2 --branches 1000 50000

Programs are compiled ahead of time from shapes alone, for one chip and for all chips of the topology with the branches
shared.  TPUs need the package `libtpu` (no chip).  `--topology cpu` compiles for this machine.  Memory, copies and
traffic between chips are the compiler's; operations and bytes moved follow from the shapes, since the compiler counts a
loop's body once; none is measured.  The roofline is the larger of operations over the chip's peak and bytes over its
bandwidth, both as the makers publish them.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
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

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import environment
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dualgap_jax.landscape.kernels import kernels
from dualgap_jax.landscape.planes import Block
from dualgap_jax.losses import multi_margin
from dualgap_jax.networks import draw_branches, mlp, multi_branch
from dualgap_jax.optimizers import for_network
from dualgap_jax.sharding import BRANCH, over_mesh
from dualgap_jax.terminal import table
from dualgap_jax.training import plan
from dualgap_jax.training.branch_step import Shard, branch_step
from dualgap_jax.training.engine import Carry, begin
from dualgap_jax.training.together import step

IMAGE, CLASSES, BATCH, HIDDEN = (32, 32, 3), 10, 128, (8, 8, 8)
OPTIMIZERS = {
    "sgd": optax.sgd(1.0),
    "momentum": optax.sgd(1.0, momentum=0.9),
    "adam": optax.adam(1.0),
}


class Chip(NamedTuple):
    """Published peak rates of one chip: operations a second (bfloat16 products), bytes a second, bytes of memory."""

    operations: float
    bandwidth: float
    memory: float


# cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, "System architecture".
CHIPS = {
    "v4": Chip(275e12, 1228e9, 32e9),
    "v5e": Chip(197e12, 819e9, 16e9),
    "v5p": Chip(459e12, 2765e9, 95e9),
    "v6e": Chip(918e12, 1640e9, 32e9),
}


class Program(NamedTuple):
    """A function and the shapes of its arguments, with their places on the devices.

    Attributes:
      name: of the row.
      function: to be compiled.
      arguments: `jax.ShapeDtypeStruct` trees.
      donated: arguments that it takes over.
      parameters: bytes of one network's parameters on one device.
      operations, traffic: additions and multiplications, and the least bytes to and from memory, on one device.
      passes: bfloat16 products that one product takes: 1 by default, 6 at precision 'highest'.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]
    parameters: int
    operations: float
    traffic: float
    passes: int = 1


def placed(tree: Any, sharding: Any) -> Any:
    """The shapes of a tree on devices."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def size_of(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def batch(sharding: Any) -> tuple[Any, ...]:
    """A standardised batch, labels, rate, and the data of a key."""
    shapes = ((BATCH, *IMAGE), jnp.float32), ((BATCH,), jnp.int32), ((), jnp.float32), ((2,), jnp.uint32)
    return tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes)


def steps(branches: int, optimizer: str, streamed: bool, devices: Sequence[Any]) -> Program:
    """A step of training of `mlp((8, 8, 8))` on images like CIFAR-10's, plain or streamed, on one chip or several."""
    branch = mlp(HIDDEN, CLASSES)
    net = multi_branch(branch, branches)
    assert net.stacked is not None
    transformation = for_network(net, OPTIMIZERS[optimizer])
    example = jnp.zeros((1, *IMAGE))

    def start(key: Any) -> Carry:
        return begin(transformation, *draw_branches(branch, key, example, 0, branches))

    shapes = jax.eval_shape(start, jax.random.key(0))
    slots = branches // len(devices)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (shapes.params, shapes.state))
    chunk = plan.branch_chunk(branch, one, jax.ShapeDtypeStruct((BATCH, *IMAGE), jnp.float32), slots)
    loss = multi_margin()

    def local(carry: Carry, x: Any, y: Any, rate: Any, key: Any, first: Any, axis: str | None) -> Any:
        shard = Shard(first, slots, None, axis)
        noise = jax.random.wrap_key_data(key)
        return branch_step(net.stacked, loss, transformation, carry, x, y, rate, noise, chunk=chunk, shard=shard)

    name = f"{'streamed' if streamed else 'plain'} step, {optimizer}, I = {branches:,}"
    parameters = size_of(shapes.params) // len(devices)
    # Forward, gradient of the weights, gradient of the inputs of all layers but the first; weights are read twice and
    # written once, an optimiser's moments read and written once.
    first = HIDDEN[0] * math.prod(IMAGE) * slots
    counts = (
        2.0 * BATCH * (3 * parameters / 4 - first),
        3.0 * parameters + 2.0 * size_of(shapes.opt_state) / len(devices),
    )
    if len(devices) > 1:
        mesh = Mesh(np.asarray(devices), (BRANCH,))

        def shared(carry: Carry, x: Any, y: Any, rate: Any, key: Any) -> Any:
            return local(carry, x, y, rate, key, jax.lax.axis_index(BRANCH) * slots, BRANCH)

        rows, all_of = PartitionSpec(BRANCH), PartitionSpec()
        function = over_mesh(mesh, shared, (rows, all_of, all_of, all_of, all_of), (rows, all_of))
        arguments = placed(shapes, NamedSharding(mesh, rows)), *batch(NamedSharding(mesh, all_of))
        return Program(f"{name}, {len(devices)} chips", function, arguments, (0,), parameters, *counts)
    where = SingleDeviceSharding(devices[0])
    if streamed:
        function = functools.partial(local, first=0, axis=None)
    else:

        def function(carry: Carry, x: Any, y: Any, rate: Any, key: Any) -> Any:
            return step(net, loss, transformation, carry, x, y, rate, jax.random.wrap_key_data(key))

    return Program(name, function, (placed(shapes, where), *batch(where)), (0,), parameters, *counts)


def landscape(branches: int, devices: Sequence[Any]) -> Program:
    """One pass of a block of branches over 64 points of a plane, 256 samples."""
    net = multi_branch(mlp(HIDDEN, CLASSES), branches)
    parts = kernels(net, multi_margin(), False, branches, min(64, branches), 8)
    where = SingleDeviceSharding(devices[0])
    x, points = jax.ShapeDtypeStruct((256, *IMAGE), jnp.float32), jax.ShapeDtypeStruct((64, 2), jnp.float32)
    params, _ = jax.eval_shape(lambda k: net.init(k, jnp.zeros((1, *IMAGE))), jax.random.key(0))
    block = Block((params, params, params), ((), (), ()), ())
    z = jax.eval_shape(parts.below, block.params, x)
    total = jax.ShapeDtypeStruct((64, 256, CLASSES), jnp.float32)
    arguments = tuple(placed(a, where) for a in (total, block, (), z, points))
    with_precision = jax.default_matmul_precision("highest")(parts.add)
    upper = size_of(params) / 4 - HIDDEN[0] * math.prod(IMAGE) * branches  # the first layer serves all points
    counts = 2.0 * 64 * 256 * upper + 2.0 * 64 * 3 * branches * HIDDEN[0] * 256, float(size_of(z))
    name = f"landscape pass, 64 points, I = {branches:,}"
    return Program(name, with_precision, arguments, (), size_of(params), *counts, passes=6)


def gram(columns: int, devices: Sequence[Any]) -> Program:
    """A block of Theorem 2's Gram matrix and product with the targets, 3072 x `columns`, float32."""
    where = SingleDeviceSharding(devices[0])
    x, y = (jax.ShapeDtypeStruct((rows, columns), jnp.float32, sharding=where) for rows in (3072, CLASSES))

    def add(x: Any, y: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return x @ x.T, y @ x.T

    counts = 2.0 * 3072 * (3072 + CLASSES) * columns, float(size_of((x, y)))
    return Program(f"Theorem 2, Gram matrix of {columns:,} columns", add, (x, y), (), size_of(x), *counts, passes=6)


def compiled(program: Program, chip: Chip | None) -> dict[str, Any]:
    """One row: what the compiler says of a program, or why it does not compile."""
    began = time.perf_counter()
    row: dict[str, Any] = {"program": program.name, "parameter_bytes": program.parameters}
    try:
        done = jax.jit(program.function, donate_argnums=program.donated).lower(*program.arguments).compile()
    except Exception as error:  # what does not compile or does not fit is a result
        return {**row, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
    memory, text = done.memory_analysis(), done.as_text()
    reduces = re.findall(r"= (\S+) all-reduce(?:-start)?\(", text)
    copies = [m for m in re.findall(r"= f32\[([\d,]+)\]\S* copy\(", text) if _numbers(m) * 4 > program.parameters / 2]
    row |= {
        "compile_seconds": time.perf_counter() - began,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
        "operations": program.operations,
        "bytes_moved": program.traffic,
        "all_reduces": len(reduces),
        "all_reduced": reduces,
        "copies_of_whole_arrays": len(copies),
        "custom_calls": sorted(set(re.findall(r'custom_call_target="([^"]+)"', text))),
    }
    if chip is not None:
        arithmetic = program.passes * row["operations"] / chip.operations
        traffic = row["bytes_moved"] / chip.bandwidth
        row["roofline_seconds"] = max(arithmetic, traffic)
        row["bound_by"] = "arithmetic" if arithmetic > traffic else "bandwidth"
        row["fits"] = memory.argument_size_in_bytes + memory.temp_size_in_bytes <= chip.memory
    return row


def _numbers(shape: str) -> int:
    return math.prod(int(n) for n in shape.split(",") if n)


def devices_of(topology: str) -> tuple[Sequence[Any], Chip | None]:
    """The devices of a topology that is not here, and the chip's rates; 'cpu' is this machine."""
    if topology == "cpu":
        return jax.devices("cpu"), None
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(topology, "tpu")
    except Exception as error:
        raise SystemExit(f"{topology}: {error}\nCompiling for TPUs needs libtpu: pip install libtpu") from error
    return list(described.devices), CHIPS.get(topology.partition(":")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:2x2", help="v4, v5e, v5p, v6e with a shape, such as v5p:2x2x1; cpu")
    parser.add_argument("--branches", type=int, nargs="+", default=[1000, 50000])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--only", default="", help="only programs whose name holds this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    devices, chip = devices_of(options.topology)
    makers: list[Callable[[], Program]] = []
    for branches in options.branches:
        for optimizer in options.optimizers:
            makers.append(functools.partial(steps, branches, optimizer, True, devices[:1]))
            if len(devices) > 1 and branches % len(devices) == 0:
                makers.append(functools.partial(steps, branches, optimizer, True, devices))
            makers.append(functools.partial(steps, branches, optimizer, False, devices[:1]))
        makers.append(functools.partial(landscape, min(branches, 1000), devices))
    makers.append(functools.partial(gram, 8192, devices))
    rows = []
    for make in makers:
        program = make()
        if options.only not in program.name or program.name in [row["program"] for row in rows]:
            continue
        print(f"compiling: {program.name}", file=sys.stderr, flush=True)
        rows.append(compiled(program, chip))
    columns = [
        "program",
        "arguments GB",
        "temporaries GB",
        "GFLOP",
        "GB moved",
        "all-reduces",
        "copies",
        "roofline ms",
        "s to compile",
    ]
    cells = [
        [
            row["program"],
            f"{row['argument_bytes'] / 1e9:.3f}",
            f"{row['temporary_bytes'] / 1e9:.3f}",
            f"{row['operations'] / 1e9:.1f}",
            f"{row['bytes_moved'] / 1e9:.2f}",
            ", ".join(row["all_reduced"]) or "0",
            str(row["copies_of_whole_arrays"]),
            f"{1e3 * row['roofline_seconds']:.3g} ({row['bound_by']})" if "roofline_seconds" in row else "-",
            f"{row['compile_seconds']:.0f}",
        ]
        if "error" not in row
        else [row["program"], row["error"], *[""] * 7]
        for row in rows
    ]
    print(f"Compiled for {options.topology}, batch {BATCH}, {'-'.join(map(str, HIDDEN))}; nothing here is measured.\n")
    print(table(columns, cells))
    if options.json is not None:
        options.json.write_text(json.dumps({"topology": options.topology, **environment(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
