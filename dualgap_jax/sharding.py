"""Independent work shared out over the devices of one process: runs of a study, solutions of a small network.

Each device does its part of the lanes alone.  The parts never speak to each other, so that a loop inside the work runs
on every device at its own pace, with no collective operation in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dualgap_jax.config import require
from dualgap_jax.types import PyTree

SEED = "seed"  # the axis of a mesh along which runs differ


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
    is.  The devices must divide the number of lanes (`filled`); `place` brings the arguments where they are needed.

    Args:
      function: of as many positional arguments as `in_axes` has entries.
      devices: one or more.
      in_axes: the axis of the lanes in each argument, or None where every device needs the whole, as in `jax.vmap`: an
        entry holds for all leaves below it.
      out_axes: the same for the results.
    """
    if len(devices) == 1:
        return function
    # Without the check of replication: loops in the function may start from constants and go on with lanes.
    return jax.shard_map(
        function,
        mesh=_mesh(devices),
        in_specs=tuple(map(_specs, in_axes)),
        out_specs=_specs(out_axes),
        check_vma=False,
    )


def _mesh(devices: Sequence[jax.Device]) -> Mesh:
    return Mesh(np.asarray(devices), (SEED,))


def _specs(axes: Any) -> Any:
    def one(axis: int | None) -> PartitionSpec:
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, SEED)

    return jax.tree.map(one, axes, is_leaf=lambda axis: axis is None)


def place(tree: PyTree, devices: Sequence[jax.Device], axes: Any) -> PyTree:
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
