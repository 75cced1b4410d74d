"""What training will take, before it starts: memory, time, disk, and the way of training that follows from them.

All numbers are estimates.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import humanize
import jax
import numpy as np
from jax import Array

from dualgap_jax.machine import memory_available
from dualgap_jax.networks import sum_branches
from dualgap_jax.sharding import Layout, is_first_process
from dualgap_jax.training.engine import Carry
from dualgap_jax.trees import num_bytes
from dualgap_jax.types import Network, Params, State

# What a chunk of branches may take, parameters and activations: on CPU a gradient that stays in the cache is used from
# there, and more than this is slower; on accelerators larger products are faster, up to this share of the memory.
_CHUNK_BYTES_CPU = 12 * 2**20
_CHUNK_SHARE = 1 / 64

# Bytes of parameters, state and optimiser from which on a network is streamed though it fits into memory: on CPU where
# that is the faster way, by a tenth; on TPUs where it is the smaller one; never on GPUs, whose plain step is the faster
# one at every size (docs/scaling.md).
_STREAM_FASTER = 2**26
_STREAM_SMALLER = 2**28

COPIES = 4  # of parameters, state and optimiser that the plain step needs
WORTH_SAYING = 10**8  # bytes of a network from which on a run says beforehand what it will take
_PROBE_BYTES = 2**25  # of parameters and optimiser, on which the time of a step is measured on CPU


class Choice(NamedTuple):
    """How many solutions in one program, and whether by the streamed step."""

    group_size: int
    streamed: bool


class Need(NamedTuple):
    """What a solution takes, in bytes.

    Attributes:
      carry: its parameters, state and optimiser.
      kept: what a plain step computes on a batch, an upper bound of what its gradient keeps.
    """

    carry: int
    kept: int

    @property
    def plain(self) -> int:
        """Bytes of the plain step."""
        return COPIES * self.carry + self.kept


def need(net: Network, carry: Carry, x: Any) -> Need:
    """What a solution takes, from shapes.

    Args:
      net: the network.
      carry: its parameters, state and optimiser.
      x: a batch.
    """
    return Need(num_bytes(carry), _computed_bytes(net.apply, carry.params, carry.state, x, jax.random.key(0)))


def stream_from(net: Network, carry: Carry, platform: str) -> int:
    """Bytes of a carry from which on a network is streamed though it fits into memory.

    On CPU streaming is faster early where the first layer's output can be kept, and where nothing but parameters is
    brought up to date: copies of an optimiser's moments cost more than a gradient that stays in the cache saves.

    Args:
      net: a stacked network.
      carry: shapes of its parameters, state and optimiser.
      platform: of the device, as JAX names it.
    """
    if platform == "gpu":
        return sys.maxsize
    stem = net.stacked is not None and net.stacked.branch.stem is not None
    bare = num_bytes(carry.opt_state) < num_bytes(carry.params) / 2
    return _STREAM_FASTER if platform == "cpu" and stem and bare else _STREAM_SMALLER


def choose(
    need: Need, num_solutions: int, group_size: int | None, may_stream: bool, begun: Sequence[Choice], enough: int
) -> Choice:
    """How to train, by size and free memory; training that goes on keeps to what it was begun with, if that fits.

    Args:
      need: what a solution takes.
      num_solutions: number of solutions.
      group_size: asked for, or None.
      may_stream: whether the streamed step may be used.
      begun: the choices that checkpoints keep.
      enough: bytes of a carry that is streamed though it fits; see `stream_from`.
    """
    if group_size is not None:
        return Choice(group_size, False)
    one, free = need.plain, memory_available()
    for choice in begun:
        fits = choice.group_size == 1 or one * choice.group_size < free
        if may_stream if choice.streamed else fits:
            return choice
    if may_stream and (one > free / 2 or need.carry >= enough):
        return Choice(1, True)
    return Choice(num_solutions if one * num_solutions < free / 2 else 1, False)


def _computed_bytes(apply: Callable[..., Any], params: Params, state: State, x: Any, key: Any) -> int:
    """Bytes of all that a network computes on a batch in training, an upper bound of what its gradient keeps."""

    def total(jaxpr: Any) -> int:
        size = 0
        for eqn in jaxpr.eqns:
            inner = [getattr(p, "jaxpr", p) for p in jax.tree.leaves(list(eqn.params.values()))]
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            size += times * sum(total(p) for p in inner if hasattr(p, "eqns"))
            size += sum(v.aval.size * v.aval.dtype.itemsize for v in eqn.outvars if hasattr(v.aval.dtype, "itemsize"))
        return size

    return total(jax.make_jaxpr(lambda p, s, x: apply(p, s, x, key=key, train=True))(params, state, x).jaxpr)


def activation_bytes(branch: Network, params: Params, state: State, x: Any) -> int:
    """Bytes of all that a further branch computes on a batch, an upper bound of what its gradient keeps.

    Args:
      branch: the one-branch network.
      params, state: shapes of its own.
      x: shape of a batch.
    """

    def of(count: int) -> int:
        many, states = jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape), a.dtype), (params, state))
        keys = jax.random.split(jax.random.key(0), count)

        def run(params: Params, state: State, x: Array, *, key: Array, train: bool) -> Any:
            return sum_branches(branch, params, state, x, keys=key, train=train)

        return _computed_bytes(run, many, states, x, keys)

    return of(2) - of(1)


class Estimate(NamedTuple):
    """What a run will take, before it starts.  All numbers are estimates, in bytes on one device and in seconds.

    Attributes:
      parameters: of the branches on one device, as stored.
      optimizer: its state.
      temporaries: what the compiled step needs besides, as the compiler says: kept pre-activations, one chunk.
      data: the data set on the host, or one batch on a device.
      seconds_per_step: measured on a network of two chunks and scaled to all of them.
    """

    parameters: int
    optimizer: int
    temporaries: int
    data: int
    seconds_per_step: float

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.parameters + self.optimizer + self.temporaries + self.data


def in_memory(each: int, together: int, seconds: float | None, max_steps: int, num_solutions: int, devices: int) -> str:
    """What a run in memory will take, as text.

    Args:
      each: bytes of one solution.
      together: solutions in one program.
      seconds: a step of one solution, or None where that is not known.
      max_steps, num_solutions: of the run.
      devices: that share the solutions.
    """
    how = {1: "one after another", num_solutions: "together"}.get(together, f"{together} at a time")
    free = f"available: {_size(memory_available())}"
    lines = [
        f"training: {num_solutions} solutions, {how}",
        f"  memory (estimate): {_size(each)} a solution = {_size(each * together)}; {free}",
    ]
    if seconds is not None:
        lines.append(_time_line(seconds, max_steps, num_solutions, devices))
    return "\n".join(lines)


def streamed(
    e: Estimate, layout: Layout, chunk: int, max_steps: int, num_solutions: int, checkpoints: Path | None
) -> str:
    """What a streamed run will take, as text.

    Args:
      e: memory and time of one solution on one device.
      layout: which branches lie where.
      chunk: branches at a time.
      max_steps, num_solutions: of the run.
      checkpoints: where they will be written, or None.
    """
    parts = {
        "parameters": e.parameters,
        "optimiser": e.optimizer,
        "kept pre-activations and one chunk": e.temporaries,
        "data": e.data,
    }
    memory = " + ".join(f"{_size(size)} {name}" for name, size in parts.items() if size)
    where = "" if layout.shards == 1 else f" on each of {layout.shards} devices along 'branch'"
    lines = [
        f"training: streamed, {layout.num_branches:,} branches{where}, {chunk} at a time, one solution after another",
        f"  memory (estimate): {memory} = {_size(e.memory)}; available: {_size(memory_available())}",
        _time_line(e.seconds_per_step, max_steps, num_solutions),
    ]
    if e.memory > memory_available():
        lines.append(
            "  WARNING: that is more memory than is available; share the branches with --config.mesh.branch, or store"
            " the parameters with --config.precision.params=bfloat16"
        )
    if checkpoints is not None and is_first_process():
        checkpoints.mkdir(parents=True, exist_ok=True)
        disk = 2 * (e.parameters + e.optimizer) * layout.shards * num_solutions
        free = shutil.disk_usage(checkpoints).free
        lines.append(f"  disk (estimate): {_size(disk)}, two checkpoints of each solution; available: {_size(free)}")
        if disk > free:
            lines.append("  WARNING: that is more than is available; give a folder on another disk with --workdir")
    return "\n".join(lines)


def chunk_bytes(memory: int | None) -> int:
    """Bytes that a chunk of branches may take with its activations.

    Args:
      memory: of an accelerator, in bytes; None is a CPU, where the cache decides.
    """
    return _CHUNK_BYTES_CPU if memory is None else int(memory * _CHUNK_SHARE)


def probe_bytes(memory: int | None) -> int:
    """Bytes of parameters and optimiser on which the time of a step is measured.

    Args:
      memory: of an accelerator, in bytes, where few branches would show latencies alone; None is a CPU.
    """
    return _PROBE_BYTES if memory is None else chunk_bytes(memory)


def branch_chunk(branch: Network, one: Carry, x: Any, slots: int, memory: int | None) -> int:
    """As many branches at a time as fit in `chunk_bytes` with their activations, and on CPU their optimiser.

    Args:
      branch: the one-branch network.
      one: shapes of the parameters, state and optimiser of one branch.
      x: shape of a batch.
      slots: branches on a device.
      memory: of an accelerator, in bytes; None is a CPU.
    """
    each = num_bytes((one.params, one.state)) + activation_bytes(branch, one.params, one.state, x)
    if memory is None:
        each += num_bytes(one.opt_state)
    return int(np.clip(chunk_bytes(memory) // each, 1, slots))


def seconds_of(step: Callable[[int], Any]) -> float:
    """Seconds that `step(now)` takes, the median of three calls after a first one, which compiles or touches memory."""
    times = []
    for now in range(4):
        began = time.perf_counter()
        jax.block_until_ready(step(now))
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))


def _time_line(seconds: float, max_steps: int, num_solutions: int, devices: int = 1) -> str:
    """What the steps will take, where solutions are shared out over some devices."""
    total = seconds * max_steps * -(-num_solutions // devices)
    steps = f"at most {max_steps:,} steps x {num_solutions} solutions"
    shared = f" on {devices} devices" if devices > 1 else ""
    return f"  time (estimate): {seconds:.3g} s a step of one solution; {steps}{shared} = {_duration(total)}"


def _size(count: int) -> str:
    return humanize.naturalsize(count, format="%.3g")


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 5400
        else f"{seconds / 60:.1f} min"
        if seconds >= 90
        else f"{seconds:.0f} s"
    )
