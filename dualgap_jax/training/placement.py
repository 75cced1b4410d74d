"""Where the numbers of a streamed solution lie, on one device or over a mesh, and how checkpoints take and give them.

Whatever the mesh, what is stored is in the order of the branches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from dualgap_jax import sharding
from dualgap_jax.checkpoints import Pieces, Stored, like_template, put_rows
from dualgap_jax.sharding import BRANCH, DATA, Layout, MeshSpec
from dualgap_jax.training.branch_step import Shard
from dualgap_jax.types import PyTree


class Placement:
    """The devices of a streamed solution, and which branches lie on each.

    Trees whose leaves lead with the branch axis `[I, ...]` lie on a mesh as `[shards * slots, ...]`, the last slot of
    some shards unused when the devices do not divide I.

    Attributes:
      layout: which branches each shard holds.
      mesh: the mesh; None for one device of one process.
    """

    def __init__(self, num_branches: int, spec: MeshSpec) -> None:
        self.layout, self._spec = Layout(num_branches, spec.branch), spec
        self.mesh = sharding.make_mesh(spec) if spec.size > 1 or jax.process_count() > 1 else None

    # --- inside and around the programs ---

    def shard(self) -> Shard:
        """Which branches the running device holds; inside the program."""
        layout = self.layout
        if self.mesh is None:
            return Shard(0, layout.slots)
        index = lax.axis_index(BRANCH)
        weight = None if layout.is_even else (index < layout.num_branches % layout.shards).astype(float)
        return Shard(
            layout.first(index),
            layout.slots,
            weight,
            BRANCH if self._spec.branch > 1 else None,
            DATA if self._spec.data > 1 else None,
        )

    def over_devices(self, program: Callable[..., Any], ins: tuple[Any, ...], outs: Any) -> Callable[..., Any]:
        """A program of one device's shares as one of all devices.

        Args:
          program: a function of as many arguments as `ins` has entries.
          ins: for each argument 'branch' (leaves lead with the branch axis), 'data' (with the batch), or None (whole).
          outs: the same for the results.
        """
        if self.mesh is None:
            return program
        return sharding.over_mesh(self.mesh, program, jax.tree.map(_spec, ins, is_leaf=_is_none), _specs(outs))

    def shape(self, tree: PyTree, along: str | None) -> PyTree:
        """Shapes of a tree `[I, ...]` (along "branch") or `[batch, ...]` (along "data") as a program takes it."""

        def one(leaf: Any) -> Any:
            rows = self.layout.shards * self.layout.slots if along == BRANCH else leaf.shape[0]
            shape = (rows, *leaf.shape[1:])
            where = NamedSharding(self.mesh, _spec(along)) if self.mesh is not None else None
            return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=where)

        return jax.tree.map(one, tree)

    def everywhere(self, value: Any) -> Array:
        """A host array on every device."""
        return jnp.asarray(value) if self.mesh is None else sharding.replicated(self.mesh, value)

    def batch(self, array: np.ndarray) -> Array:
        """Examples, shared out along 'data'."""
        return jnp.asarray(array) if self.mesh is None else sharding.spread(self.mesh, _spec(DATA), array)

    # --- out ---

    def stored(self, tree: PyTree) -> PyTree:
        """A tree for a checkpoint: of each leaf the branches that this process has to write, not copied on CPU."""
        return tree if self.mesh is None else jax.tree.map(self._leaf_out, tree)

    def whole(self, tree: PyTree) -> PyTree:
        """A tree in the memory of one process, leaves `[I, ...]` in the order of the branches."""
        if self.mesh is None:
            return tree

        def whole(leaf: Array) -> Array:
            return jnp.concatenate([jnp.asarray(np.asarray(piece)) for piece in self._leaf_out(leaf).arrays])

        return jax.tree.map(whole, tree)

    def _leaf_out(self, leaf: Array) -> Pieces:
        """The branches of a leaf that lie in this process, each on the first of the devices that hold it."""
        slots, layout = self.layout.slots, self.layout
        held = {(s.index[0].start or 0) // slots: s.data for s in leaf.addressable_shards if s.replica_id == 0}
        pieces = {}
        for shard, rows in sorted(held.items()):
            if count := int(layout.count(shard)):
                pieces[layout.first(shard)] = rows if count == slots else np.asarray(rows)[:count]
        pieces = pieces or {0: leaf.addressable_shards[0].data[:0]}  # another process writes them all
        return Pieces(tuple(pieces.values()), tuple(pieces), layout.num_branches)

    # --- in ---

    def restorable(self, shapes: PyTree) -> PyTree:
        """The template `[I, ...]` that a checkpoint is restored with; `read_leaf` reads its shardings."""
        if self.mesh is None:
            return shapes
        where = NamedSharding(self.mesh, _spec(BRANCH))
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), shapes)

    def read_leaf(self, template: Any, stored: Stored) -> Any:
        """One leaf of `restorable()` from a checkpoint, on the devices that hold its branches; others as they are."""
        where = getattr(template, "sharding", None)
        if self.mesh is None or not isinstance(where, NamedSharding):
            return like_template(template, stored)
        layout, shards = self.layout, []
        for (shard, _), device in np.ndenumerate(self.mesh.devices):
            if device.process_index == jax.process_index():
                shards.append(_filled(stored, layout.first(shard), int(layout.count(shard)), layout.slots, device))
        shape = (layout.shards * layout.slots, *template.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, where, shards)


def verify_leaf(template: Any, stored: Stored) -> Any:
    """Reads a leaf of a finished run's checkpoint; what is large, the carry, is verified and dropped."""
    if not stored.name.startswith("carry/"):
        return like_template(template, stored)
    stored.verify()
    return None


def _is_none(value: Any) -> bool:
    return value is None


def _spec(along: str | None) -> PartitionSpec:
    return PartitionSpec() if along is None else PartitionSpec(along)


def _specs(along: Any) -> Any:
    return jax.tree.map(_spec, along, is_leaf=_is_none)


def _filled(stored: Stored, first: int, count: int, slots: int, device: jax.Device) -> Array:
    """Rows `first, first + 1, ...` of a stored leaf on a device, block by block; a slot that is left repeats a row."""
    leaf = jnp.zeros((slots, *stored.shape[1:]), stored.dtype, device=device)
    for start, rows in stored.in_blocks(first, count):
        leaf = put_rows(leaf, rows, start - first)
        leaf.block_until_ready()  # the rows' memory is used again
    return leaf if count == slots else put_rows(leaf, stored.read(first if count else 0, 1), count)
