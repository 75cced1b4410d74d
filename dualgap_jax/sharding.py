"""Work on many devices and processes: branches over a mesh, independent runs side by side, joining a distributed run.

A mesh has two axes.  Along `branch` every device holds its own branches, and a step needs one all-reduce of
`batch x out` numbers, whatever I is.  Along `data` devices hold the same branches and share the examples of a batch;
a step then also sums the gradients over that axis.  Lanes, the independent runs of a study, lie along `seed` on the
devices of one process and never speak to each other, so a loop inside the work runs on each device at its own pace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dualgap_jax.config import ConfigError, require
from dualgap_jax.types import PyTree

BRANCH, DATA, SEED = "branch", "data", "seed"  # axes of meshes


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """How many devices share the branches, the examples, or the solutions.

    Attributes:
      branch: devices that share the branches of one network.
      data: devices that share the examples of a batch; `branch * data` devices train one network.
      seed: devices that share the solutions trained together, when branch and data are 1; 0: all of this process, at
        most one a solution.
    """

    branch: int = 1
    data: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (BRANCH, DATA):
            require(getattr(self, name) >= 1, f"mesh.{name}={getattr(self, name)} must be at least 1.")
        require(self.seed >= 0, f"mesh.seed={self.seed} must be >= 0 (0: all devices of this process).")
        require(
            self.size == 1 or self.seed in (0, 1),
            f"mesh.seed={self.seed} shares solutions that are trained together, but mesh.branch={self.branch} and"
            f" mesh.data={self.data} train one after another; leave mesh.seed out.",
        )

    @property
    def size(self) -> int:
        """Number of devices that train one network."""
        return self.branch * self.data


def make_mesh(spec: MeshSpec) -> Mesh:
    """The mesh over the first `branch * data` devices; all of them when there are several processes.

    Raises:
      ConfigError: if there are fewer devices, or several processes and more.
    """
    devices = jax.devices()
    asked = f"mesh.branch={spec.branch} times mesh.data={spec.data} is {spec.size} devices"
    if spec.size > len(devices):
        hint = "; for virtual devices on CPU start with --cpu_devices=N" if devices[0].platform == "cpu" else ""
        raise ConfigError(f"{asked}, but there are {len(devices)} ({devices[0].platform}){hint}.")
    if jax.process_count() > 1 and spec.size != len(devices):
        raise ConfigError(
            f"{asked}, but {jax.process_count()} processes have {len(devices)}; all must take part:"
            f" set --config.mesh.branch={len(devices)} --config.mesh.data=1, or another product."
        )
    grid = np.asarray(devices[: spec.size]).reshape(spec.branch, spec.data)
    return Mesh(grid, (BRANCH, DATA), axis_types=(AxisType.Auto, AxisType.Auto))


class Layout(NamedTuple):
    """Which branches each of `shards` devices holds: consecutive ones, as evenly as possible.

    Every device has the same number of slots.  When I is not divisible, the last slot of some is not used: the network
    there is computed, weighted by 0, and left out wherever branches are read.
    """

    num_branches: int
    shards: int

    @property
    def slots(self) -> int:
        """Slots on each device."""
        return -(-self.num_branches // self.shards)

    @property
    def is_even(self) -> bool:
        """Whether all slots are used."""
        return self.num_branches % self.shards == 0

    def first(self, shard: Any) -> Any:
        """Index of the first branch on a shard; an int, or an array when `shard` is one."""
        base, over = divmod(self.num_branches, self.shards)
        if isinstance(shard, int):
            return shard * base + min(shard, over)
        return shard * base + jnp.minimum(shard, over)

    def count(self, shard: Any) -> Any:
        """Number of branches on a shard."""
        base, over = divmod(self.num_branches, self.shards)
        return base + (shard < over)


def over_mesh(mesh: Mesh, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` without the static check of what is replicated.

    Sums over axes are written out, and loops may start from constants that are alike on all devices and then differ.
    """
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def replicated(mesh: Mesh, value: Any) -> jax.Array:
    """A host array on every device of a mesh, on each process its own copy."""
    return spread(mesh, PartitionSpec(), value)


def spread(mesh: Mesh, spec: PartitionSpec, value: Any) -> jax.Array:
    """A host array, the same on every process, laid over a mesh."""
    host = np.asarray(value)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    return jax.make_array_from_callback(host.shape, NamedSharding(mesh, spec), lambda index: host[index])


# --- lanes ------------------------------------------------------------------------------------------------------------


def local_devices(count: int = 0) -> tuple[jax.Device, ...]:
    """The first `count` devices of this process, in JAX's order; 0 is all of them.

    Raises:
      ConfigError: for a negative number, or more devices than there are.
    """
    present = jax.local_devices()
    require(
        0 <= count <= len(present),
        f"devices={count}: this process has {len(present)} of kind {present[0].device_kind}; give 1 to {len(present)},"
        " or 0 for all.",
    )
    return tuple(present[: count or len(present)])


def over_devices(
    function: Callable[..., Any], devices: Sequence[jax.Device], in_axes: tuple[Any, ...], out_axes: Any
) -> Callable[..., Any]:
    """`function` with its lanes shared out evenly over devices; under `jax.jit` each one runs the program of its part.

    The function must treat its lanes independently, as one made by `jax.vmap` does.  On one device it is returned as it
    is.  The devices must divide the number of lanes (`filled`); `share_out` brings the arguments where they are needed.

    Args:
      function: of as many positional arguments as `in_axes` has entries.
      devices: one or more.
      in_axes: the axis of the lanes in each argument, or None where every device needs the whole, as in `jax.vmap`: an
        entry holds for all leaves below it.
      out_axes: the same for the results.
    """
    if len(devices) == 1:
        return function
    return over_mesh(_mesh(devices), function, tuple(map(_specs, in_axes)), _specs(out_axes))


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.asarray(devices), (SEED,))


def _specs(axes: Any) -> Any:
    def one(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, SEED)

    return jax.tree.map(one, axes, is_leaf=lambda axis: axis is None)


def share_out(tree: PyTree, devices: Sequence[jax.Device], axes: Any) -> PyTree:
    """Arrays as `over_devices` wants them: in equal parts along the axis of the lanes, or (None) whole on each device.

    On one device they go where `jnp.asarray` puts them.

    Args:
      tree: NumPy or JAX arrays.
      devices: those of `over_devices`.
      axes: as an entry of its `in_axes`.
    """
    if len(devices) == 1:
        return jax.tree.map(jnp.asarray, tree)
    mesh = _mesh(devices)
    return jax.device_put(tree, jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs(axes)))


def filled(lanes: int, devices: Sequence[jax.Device]) -> np.ndarray:
    """Indices of lanes, some of them twice, so that the devices divide their number; those from `lanes` on only fill.

    Five lanes on four devices are `[0, 1, 2, 3, 4, 0, 1, 2]`.  Drop the results of the filling.
    """
    return np.resize(np.arange(lanes), -(-lanes // len(devices)) * len(devices))


# --- processes ------------------------------------------------------------------------------------------------------


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins a distributed run; to be called before anything is computed.

    Args:
      coordinator: `HOST:PORT` of process 0; None asks the cluster (SLURM, TPU pods, Kubernetes, Open MPI).
      num_processes, process_id: of this run; all three are given, or none.

    Raises:
      ConfigError: if only some of the three are given, they are out of range, or no cluster is found.
    """
    given = (coordinator, num_processes, process_id)
    if all(g is None for g in given):
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"no cluster was found ({error}); give --coordinator=HOST:PORT --num_processes=N --process_id=K."
            ) from error
        return
    if coordinator is None or num_processes is None or process_id is None:
        raise ConfigError(
            f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: give all three, or"
            " --distributed to ask the cluster."
        )
    host, colon, port = coordinator.rpartition(":")
    require(bool(host and colon and port.isdigit()), f"--coordinator={coordinator} must be HOST:PORT.")
    require(num_processes >= 1, f"--num_processes={num_processes} must be at least 1.")
    require(
        0 <= process_id < num_processes,
        f"--process_id={process_id} must lie between 0 and num_processes - 1 = {num_processes - 1}.",
    )
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except RuntimeError as error:
        raise ConfigError(f"process {process_id} could not join {coordinator}: {error}") from error


def is_first_process() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether the run has one process; also before it is known."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def meet(name: str) -> None:
    """Waits until all processes have come here; at once when there is one."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agreed(value: bool) -> bool:
    """What the first process says, on all of them."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def on_all(value: bool) -> bool:
    """Whether it is so in all processes."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(value)).all())
