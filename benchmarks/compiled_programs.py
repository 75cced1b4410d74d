"""The programs that matter as functions of shapes, with the operations and the least traffic that they need."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from dualgap_jax.hitting.block import LANES, Block
from dualgap_jax.hitting.block import Program as HittingProgram
from dualgap_jax.landscape import planes
from dualgap_jax.landscape.kernels import kernels
from dualgap_jax.losses import binary_hinge, mean_loss, multi_margin
from dualgap_jax.networks import conv, draw_branches, mlp, multi_branch, vgg9
from dualgap_jax.optimizers import for_network
from dualgap_jax.schedules import SCHEDULES
from dualgap_jax.sharding import BRANCH, SEED, over_mesh
from dualgap_jax.training import plan
from dualgap_jax.training.branch_step import Shard, branch_step
from dualgap_jax.training.engine import Carry, begin
from dualgap_jax.training.together import step
from dualgap_jax.trees import num_bytes

IMAGE, CLASSES, BATCH, HIDDEN = (32, 32, 3), 10, 128, (8, 8, 8)
OPTIMIZERS = {
    "sgd": optax.sgd(1.0),
    "momentum": optax.sgd(1.0, momentum=0.9),
    "adam": optax.adam(1.0),
}
BRANCHES = {"mlp": lambda: mlp(HIDDEN, CLASSES), "conv": lambda: conv(out=CLASSES), "vgg9": lambda: vgg9(8, CLASSES)}
TABLE1 = {
    "height": 21,
    "d": 10,
    "n": 1000,
    "steps": 1000,
}  # the tallest block, from one look at the full loss to the next


class Program(NamedTuple):
    """A function and the shapes of its arguments, with their places on the devices.

    Attributes:
      name: of the row.
      function: to be compiled.
      arguments: `jax.ShapeDtypeStruct` trees.
      donated: arguments that it takes over.
      parameters: bytes of one network's parameters on one device.
      operations, traffic: additions and multiplications, and the least bytes to and from memory, on one device.
      passes: bfloat16 products that one product takes: 1 by default, 6 at precision 'highest'; 0 for work without
        products of matrices, which the vector units do.
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


def shaped(*shape: int, dtype: Any = jnp.float32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def batch(sharding: Any) -> Any:
    """A standardised batch, labels, rate, and the data of a key."""
    shapes = shaped(BATCH, *IMAGE), shaped(BATCH, dtype=jnp.int32), shaped(), shaped(2, dtype=jnp.uint32)
    return placed(shapes, sharding)


def counts_of(kind: str, branches: int, shapes: Carry) -> tuple[float, float]:
    """Operations of a step, and the least bytes that it moves: parameters are read twice and written once, the moments
    of an optimiser read and written once."""
    parameters = num_bytes(shapes.params)
    traffic = 3.0 * parameters + 2.0 * num_bytes(shapes.opt_state)
    if kind == "mlp":  # forward, gradient of the weights, gradient of the inputs of all layers but the first
        first = HIDDEN[0] * math.prod(IMAGE) * branches
        return 2.0 * BATCH * (3 * parameters / 4 - first), traffic
    branch, loss = BRANCHES[kind](), multi_margin()

    def objective(params: Any, state: Any, x: Any, y: Any) -> Any:
        return mean_loss(loss, branch.apply(params, state, x, train=True)[0], y)

    one = jax.tree.map(lambda leaf: shaped(*leaf.shape[1:], dtype=leaf.dtype), (shapes.params, shapes.state))
    counted = jax.jit(jax.grad(objective)).lower(*one, *batch(None)[:2]).cost_analysis()
    return float(counted["flops"]) * branches, traffic


def steps(
    branches: int,
    optimizer: str,
    streamed: bool,
    devices: Sequence[Any],
    kind: str = "mlp",
    memory: int | None = None,
    chunk: int = 0,
) -> Program:
    """A step of training on images like CIFAR-10's, plain or streamed, on one chip or several.

    Args:
      branches: their number.
      optimizer: a key of `OPTIMIZERS`.
      streamed: whether by `branch_step`, a chunk of branches at a time.
      devices: one or more; several share the branches.
      kind: a key of `BRANCHES`.
      memory: bytes of one device, from which the chunk follows; None is this machine's.
      chunk: branches at a time; 0 is what the package would choose.
    """
    branch = BRANCHES[kind]()
    net = multi_branch(branch, branches)
    assert net.stacked is not None
    transformation = for_network(net, OPTIMIZERS[optimizer])
    example = jnp.zeros((1, *IMAGE))

    def start(key: Any) -> Carry:
        return begin(transformation, *draw_branches(branch, key, example, 0, branches))

    shapes = jax.eval_shape(start, jax.random.key(0))
    slots = branches // len(devices)
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), shapes)
    chunk = chunk or plan.branch_chunk(branch, one, shaped(BATCH, *IMAGE), slots, memory)
    loss = multi_margin()

    def local(carry: Carry, x: Any, y: Any, rate: Any, key: Any, first: Any, axis: str | None) -> Any:
        shard = Shard(first, slots, None, axis)
        noise = jax.random.wrap_key_data(key)
        return branch_step(net.stacked, loss, transformation, carry, x, y, rate, noise, chunk=chunk, shard=shard)

    work = {"mlp": ""}.get(kind, f"{kind} ")
    name = f"{work}{'streamed' if streamed else 'plain'} step, {optimizer}, I = {branches:,}"
    parameters = num_bytes(shapes.params) // len(devices)
    counts = [count / len(devices) for count in counts_of(kind, branches, shapes)]
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
    gpu = devices[0].platform in ("gpu", "cuda")
    parts = kernels(net, multi_margin(), False, branches, min(256, branches), 8, gpu=gpu)
    where = SingleDeviceSharding(devices[0])
    x, points = shaped(256, *IMAGE), shaped(64, 2)
    params, _ = jax.eval_shape(lambda k: net.init(k, jnp.zeros((1, *IMAGE))), jax.random.key(0))
    block = planes.Block((params, params, params), ((), (), ()), ())
    z = jax.eval_shape(parts.below, block.params, x)
    total = shaped(64, 256, CLASSES)
    arguments = tuple(placed(a, where) for a in (total, block, (), z, points))
    with_precision = jax.default_matmul_precision("highest")(parts.add)
    upper = num_bytes(params) / 4 - HIDDEN[0] * math.prod(IMAGE) * branches  # the first layer serves all points
    counts = 2.0 * 64 * 256 * upper + 2.0 * 64 * 3 * branches * HIDDEN[0] * 256, float(num_bytes(z))
    name = f"landscape pass, 64 points, I = {branches:,}"
    return Program(name, with_precision, arguments, (), num_bytes(params), *counts, passes=6)


def gram(columns: int, devices: Sequence[Any]) -> Program:
    """A block of Theorem 2's Gram matrix and product with the targets, 3072 x `columns`, float32."""
    where = SingleDeviceSharding(devices[0])
    x, y = (jax.ShapeDtypeStruct((rows, columns), jnp.float32, sharding=where) for rows in (3072, CLASSES))

    def add(x: Any, y: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return x @ x.T, y @ x.T

    counts = 2.0 * 3072 * (3072 + CLASSES) * columns, float(num_bytes((x, y)))
    return Program(f"Theorem 2, Gram matrix of {columns:,} columns", add, (x, y), (), num_bytes(x), *counts, passes=6)


def hitting(lanes: int, size: int, devices: Sequence[Any]) -> Program:
    """A segment of Table 1's tallest block: 1,000 steps of `lanes` runs on each device, and a look at the full loss.

    Args:
      lanes: runs on each device.
      size: examples a step.
      devices: one or more; several share the runs.
    """
    height, d, n, length = TABLE1["height"], TABLE1["d"], TABLE1["n"], TABLE1["steps"]
    schedule = SCHEDULES.build("cosine", max_steps=100_000)
    work = HittingProgram(binary_hinge(), schedule, size, "epochs", True, n, d, tuple(devices))
    runs = lanes * len(devices)
    block = Block(shaped(height, d, runs), shaped(height, runs), shaped(height, runs), shaped(runs))
    states = jax.tree.map(lambda a: shaped(runs, *np.shape(a), dtype=np.asarray(a).dtype), schedule.init())
    table = shaped(n * (d + 1))
    arguments = block, states, shaped(runs), shaped(2, runs, dtype=jnp.uint32), shaped(runs, dtype=jnp.int32), table
    axes = (LANES, 0, 0, 1, 0, None)
    if len(devices) > 1:
        mesh = Mesh(np.asarray(devices), (SEED,))

        def on(axis: int | None) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, SEED))

        whole = on(None)
        parts = tuple(
            Block(*(placed(leaf, on(i)) for leaf, i in zip(part, axis, strict=True)))
            if isinstance(axis, Block)
            else placed(part, on(axis))
            for part, axis in zip(arguments, axes, strict=True)
        )
    else:
        whole = SingleDeviceSharding(devices[0])
        parts = placed(arguments, whole)

    def segment(block: Any, states: Any, rates: Any, keys: Any, base: Any, table: Any, first: Any, live: Any) -> Any:
        return work.segment(block, states, rates, keys, base, table, first, jnp.int32(length), live)

    one = 2 * 2 * height * d + 3 * 2 * height  # forward and weight gradients of both layers, gradient of the hidden one
    operations = float(lanes * (length * size * one + n * 2 * height * (d + 1)))
    traffic = 2.0 * num_bytes(block) / len(devices) + num_bytes(table)  # a block stays in fast memory for a segment
    shared = f", {len(devices)} chips" if len(devices) > 1 else ""
    name = f"Table 1, 1,000 steps, batch {size}, {lanes:,} runs{shared}"
    scalars = placed((shaped(dtype=jnp.int32), shaped(dtype=jnp.bool_)), whole)
    arguments = (*parts, *scalars)
    return Program(name, segment, arguments, (0, 1), num_bytes(block) // len(devices), operations, traffic, passes=0)
