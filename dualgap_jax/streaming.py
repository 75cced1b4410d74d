"""One solution of a network of any number of branches, trained by the streamed step, on one device or over a mesh.

`StreamedSolver` owns where the numbers are: how branches lie on devices, how a batch gets there, how large a chunk is,
and how a state is handed to checkpoints and taken from them, in the order of the branches whatever the mesh.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import time
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from dualgap_jax import sharding, steps
from dualgap_jax.checkpoints import Pieces, Stored, like_template, put_rows
from dualgap_jax.config import require
from dualgap_jax.data import Dataset, standardise
from dualgap_jax.losses import Loss
from dualgap_jax.networks import draw_branches, multi_branch
from dualgap_jax.sharding import BRANCH, DATA, Layout, MeshSpec
from dualgap_jax.steps import Carry, Place, tree_bytes
from dualgap_jax.types import KeyArray, Network, Params, Stacked, State

# What a chunk of branches may take, parameters and activations: on CPU a gradient that stays in the cache is used from
# there, and more than this is slower; on accelerators larger products are faster.
_CHUNK_BYTES = {"cpu": 12 * 2**20}
_CHUNK_BYTES_ACCELERATOR = 256 * 2**20

_BLOCK_BYTES = 32 * 2**20  # of a leaf, when processes send it to the first one


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


class StreamedSolver:
    """Trains one solution of a stacked network with `steps.branch_step`.

    A carry's leaves lead with the slots of the mesh, `[shards * slots, ...]`; each step takes them over (donated).

    Args:
      net: a network made by `multi_branch`.
      loss: the loss.
      transformation: the optimiser; it must act branch by branch.
      dataset: the training set; it stays on the host, and batches are sent as they are stored.
      batch_size: examples a step; 0 is the full data set, which is sent once.
      mesh: how many devices share the branches and the examples.
      chunk: branches at a time on each device; 0 chooses.

    Raises:
      ConfigError: if the network is not stacked, the optimiser mixes branches, the batch cannot be shared evenly by
        the devices, a branch with state would see only a share of a batch, or there are too few devices.
    """

    def __init__(
        self,
        net: Network,
        loss: Loss,
        transformation: optax.GradientTransformation,
        dataset: Dataset,
        batch_size: int,
        *,
        mesh: MeshSpec | None = None,
        chunk: int = 0,
    ) -> None:
        mesh = mesh or MeshSpec()
        require(
            net.stacked is not None,
            "streamed or sharded training needs a network made by multi_branch; a mixture or a single branch is"
            " trained with training.streaming='off' on a mesh of one device.",
        )
        require(
            steps.acts_branch_by_branch(transformation),
            "training.chain mixes branches (as clip_by_global_norm does), but streamed or sharded training updates a"
            " few branches at a time; leave that item out, or train with training.streaming='off' on one device.",
        )
        batch = batch_size or len(dataset.y)
        require(
            batch % mesh.data == 0,
            f"a batch of {batch} examples cannot be shared evenly by mesh.data={mesh.data} devices.",
        )
        self.stacked: Stacked = typing.cast(Stacked, net.stacked)
        self.layout = Layout(self.stacked.num_branches, mesh.branch)
        self._loss, self._transformation, self._dataset, self._batch = loss, transformation, dataset, batch
        self._spec = mesh
        self._example = steps.example_input(dataset)
        one = jax.eval_shape(lambda k: draw_branches(self.stacked.branch, k, self._example, 0, 1), jax.random.key(0))
        require(
            mesh.data == 1 or not jax.tree.leaves(one[1]),
            f"mesh.data={mesh.data}: these branches have state (batch statistics), which would be that of a share of"
            " the batch; use mesh.branch only.",
        )
        self._mesh = sharding.make_mesh(mesh) if mesh.size > 1 or jax.process_count() > 1 else None
        self._opt_own = steps.branchwise_leaves(transformation, one[0])
        self.chunk = chunk or self._default_chunk(one)
        self._constants = tuple(self._everywhere(a) for a in (dataset.mean, dataset.std))

    # --- programs ---

    @functools.cached_property
    def compiled(self) -> Any:
        """The compiled step, for the shapes of this network."""
        return self._lowered().compile()

    def _lowered(self) -> Any:
        """The step, lowered for shapes only: nothing is allocated."""
        layout, mesh = self.layout, self._mesh
        carry = jax.tree.map(
            lambda a, own: jax.ShapeDtypeStruct((layout.shards * layout.slots, *a.shape[1:]), a.dtype) if own else a,
            self.template,
            self._is_own(self.template),
        )
        x, y = (
            jax.ShapeDtypeStruct((self._batch, *a.shape[1:]), jax.dtypes.canonicalize_dtype(a.dtype))
            for a in (self._dataset.x, self._dataset.y)
        )
        if mesh is not None:

            def on_mesh(shape: Any, spec: PartitionSpec) -> Any:
                return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

            carry = jax.tree.map(on_mesh, carry, self._specs())
            x, y = on_mesh(x, PartitionSpec(DATA)), on_mesh(y, PartitionSpec(DATA))
        return self._program.lower(carry, x, y, *self._constants, *self._numbers(0.0, jax.random.key(0), 0))

    @functools.cached_property
    def _program(self) -> Any:
        def local(
            carry: Carry, x: Array, y: Array, mean: Array, std: Array, rate: Array, key: Array, now: Array
        ) -> tuple[Carry, Array]:
            noise = jax.random.fold_in(jax.random.wrap_key_data(key), now)
            return steps.branch_step(
                self.stacked,
                self._loss,
                self._transformation,
                carry,
                standardise(x, mean, std),
                y,
                rate,
                noise,
                chunk=self.chunk,
                place=self._place(),
            )

        if self._mesh is not None:
            batch, same = PartitionSpec(DATA), PartitionSpec()
            specs = self._specs()
            local = sharding.over_mesh(
                self._mesh, local, (specs, batch, batch, same, same, same, same, same), (specs, same)
            )
        return jax.jit(local, donate_argnums=0)

    @functools.cached_property
    def _draw(self) -> Any:
        """The compiled start."""

        def local(key: Array) -> Carry:
            place = self._place()
            root = jax.random.wrap_key_data(key)
            params, state = draw_branches(self.stacked.branch, root, self._example, place.first, place.slots)
            return steps.begin(self._transformation, params, state)

        if self._mesh is not None:
            local = sharding.over_mesh(self._mesh, local, PartitionSpec(), self._specs())
        return jax.jit(local).lower(self._everywhere(jax.random.key_data(jax.random.key(0)))).compile()

    def _place(self) -> Place:
        """Which branches the running device holds; inside the program."""
        layout = self.layout
        if self._mesh is None:
            return Place(0, layout.slots)
        shard = lax.axis_index(BRANCH)
        weight = None if layout.is_even else (shard < layout.num_branches % layout.shards).astype(float)
        return Place(
            layout.first(shard),
            layout.slots,
            weight,
            BRANCH if self._spec.branch > 1 else None,
            DATA if self._spec.data > 1 else None,
        )

    def _specs(self) -> Carry:
        """Where the leaves of a carry lie on the mesh."""
        shapes = self.template
        own = PartitionSpec(BRANCH)
        opt_leaves = [own if mine else PartitionSpec() for mine in self._opt_own]
        return Carry(
            jax.tree.map(lambda _: own, shapes.params),
            jax.tree.map(lambda _: own, shapes.state),
            jax.tree.unflatten(jax.tree.structure(shapes.opt_state), opt_leaves),
        )

    def _default_chunk(self, one: tuple[Params, State]) -> int:
        """As many branches as the cache, or a share of an accelerator's memory, holds with their activations."""
        shape = (self._batch // self._spec.data, *self._example.shape[1:])
        x = jax.ShapeDtypeStruct(shape, self._example.dtype)
        params, state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), one)
        each = tree_bytes(one) + steps.activation_bytes(self.stacked.branch, params, state, x)
        budget = _CHUNK_BYTES.get(jax.default_backend(), _CHUNK_BYTES_ACCELERATOR)
        return int(np.clip(budget // each, 1, self.layout.slots))

    # --- the run ---

    @functools.cached_property
    def template(self) -> Carry:
        """Shapes and dtypes of a carry in the order of the branches, `[I, ...]`, without padding."""

        def whole(key: KeyArray) -> Carry:
            params, state = draw_branches(self.stacked.branch, key, self._example, 0, self.stacked.num_branches)
            return steps.begin(self._transformation, params, state)

        return jax.eval_shape(whole, jax.random.key(0))

    def start(self, key: KeyArray) -> Carry:
        """The carry at step 0.  Branch i is drawn with `fold_in(key, i)`, so the mesh does not change it."""
        draw, _ = self._draw, self.compiled  # the compiler's memory is given back before the parameters take theirs
        gc.collect()
        _give_back()
        return draw(self._everywhere(jax.random.key_data(key)))

    def step(
        self, carry: Carry, picked: np.ndarray | None, rate: float | Array, key: KeyArray, now: int
    ) -> tuple[Carry, float]:
        """One step; returns the new carry and the mean loss of the batch before it.

        Args:
          carry: taken over.
          picked: indices of the batch; None is the full data set.
          rate: learning rate.
          key: of the noise.
          now: index of the step.
        """
        x, y = self._send(self._dataset.x[picked], self._dataset.y[picked]) if picked is not None else self._whole
        carry, value = self.compiled(carry, x, y, *self._constants, *self._numbers(rate, key, now))
        return carry, float(value)

    def _numbers(self, rate: float | Array, key: KeyArray, now: int) -> tuple[Array, ...]:
        numbers = (jnp.asarray(rate, float), jax.random.key_data(key), np.int32(now))
        return tuple(self._everywhere(a) for a in numbers)

    def _send(self, x: np.ndarray, y: np.ndarray) -> tuple[Array, Array]:
        if self._mesh is None:
            return jnp.asarray(x), jnp.asarray(y)
        batch = PartitionSpec(DATA)
        return sharding.spread(self._mesh, batch, x), sharding.spread(self._mesh, batch, y)

    @functools.cached_property
    def _whole(self) -> tuple[Array, Array]:
        """The full data set as one batch."""
        return self._send(self._dataset.x, self._dataset.y)

    def _everywhere(self, value: Any) -> Array:
        return jnp.asarray(value) if self._mesh is None else sharding.replicated(self._mesh, value)

    # --- in and out ---

    def stored(self, carry: Carry) -> Carry:
        """The carry for a checkpoint: leaves in the order of the branches, shard by shard, not copied on CPU.

        With several processes all must call; the first gets everything in its memory, the others nothing of use.
        """
        return jax.tree.map(self._leaf_out, carry, self._is_own(carry))

    def restorable(self) -> Carry:
        """The template that a checkpoint is restored with; `place` reads its shardings."""
        shapes = self.template
        if self._mesh is None:
            return shapes
        mesh = self._mesh
        return jax.tree.map(
            lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)),
            shapes,
            self._specs(),
        )

    def place(self, template: Any, stored: Any) -> Any:
        """One leaf of `restorable()` from a checkpoint, on the devices that hold its branches; others as they are."""
        where = getattr(template, "sharding", None)
        if self._mesh is None or not isinstance(where, NamedSharding):
            return like_template(template, stored)
        if not where.spec:
            return sharding.replicated(self._mesh, stored.whole())
        layout, shards = self.layout, []
        for (shard, _), device in np.ndenumerate(self._mesh.devices):
            if device.process_index == jax.process_index():
                shards.append(_filled(stored, layout.first(shard), int(layout.count(shard)), layout.slots, device))
        shape = (layout.shards * layout.slots, *template.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, where, shards)

    def network(self, carry: Carry) -> tuple[Params, State]:
        """Parameters and state `[I, ...]` in memory, in the order of the branches."""
        if self._mesh is None:
            return carry.params, carry.state

        def whole(leaf: Array) -> Array:
            return jnp.concatenate([jnp.asarray(np.asarray(piece)) for piece in self._leaf_out(leaf, True).arrays])

        return jax.tree.map(whole, (carry.params, carry.state))

    def _is_own(self, carry: Carry) -> Carry:
        mine = jax.tree.unflatten(jax.tree.structure(carry.opt_state), self._opt_own)
        yes = functools.partial(jax.tree.map, lambda _: True)
        return Carry(yes(carry.params), yes(carry.state), mine)

    def _leaf_out(self, leaf: Array, own: bool) -> Any:
        if self._mesh is None:
            return leaf
        if not own:
            return np.asarray(leaf.addressable_data(0))
        layout = self.layout
        if jax.process_count() > 1:
            return Pieces(tuple(self._gathered(leaf)))
        starts = {shard.index[0].start or 0: shard.data for shard in leaf.addressable_shards}
        pieces = []
        for shard in range(layout.shards):
            here, count = starts[shard * layout.slots], int(layout.count(shard))
            pieces.append(here if count == layout.slots else np.asarray(here)[:count])
        return Pieces(tuple(p for p in pieces if len(p)))

    def _gathered(self, leaf: Array) -> Iterator[np.ndarray]:
        """Blocks of a leaf that lies on several processes, one all-gather each, for the first process."""
        rows = max(1, _BLOCK_BYTES // max(1, tree_bytes(leaf) // leaf.shape[0]))
        for shard in range(self.layout.shards):
            count = int(self.layout.count(shard))
            for first in range(0, count, rows):
                block = self._slice(leaf, np.int32(shard * self.layout.slots + first), min(rows, count - first))
                if sharding.is_first_process():
                    yield np.array(block.addressable_data(0))

    @functools.cached_property
    def _slice(self) -> Callable[[Array, Any, int], Array]:
        everywhere = NamedSharding(self._mesh, PartitionSpec()) if self._mesh is not None else None

        @functools.partial(jax.jit, static_argnums=2, out_shardings=everywhere)
        def block(leaf: Array, first: Array, count: int) -> Array:
            return lax.dynamic_slice_in_dim(leaf, first, count, 0)

        return block

    # --- before the run ---

    def estimate(self) -> Estimate:
        """Memory from the compiler, time from a network of two chunks on each device."""
        shapes = self.template
        shards = self.layout.shards
        chunks = min(self.layout.slots, 2 * self.chunk)
        probe = StreamedSolver(
            multi_branch(self.stacked.branch, chunks * shards),
            self._loss,
            self._transformation,
            self._dataset,
            self._batch,
            mesh=self._spec,
            chunk=self.chunk,
        )
        seconds = probe._seconds_per_step()
        data = tree_bytes((self._dataset.x, self._dataset.y)) if self._mesh is None else 0
        return Estimate(
            tree_bytes((shapes.params, shapes.state)) // shards,
            tree_bytes(shapes.opt_state) // shards,
            self._temporary_bytes(),
            data,
            seconds * self.layout.slots / chunks,
        )

    def _seconds_per_step(self) -> float:
        picked = np.arange(self._batch)
        key = jax.random.key(0)
        carry = self.start(key)
        times = []
        for now in range(4):
            began = time.perf_counter()
            carry, _ = self.step(carry, picked, 1e-3, key, now)
            jax.block_until_ready(carry)
            times.append(time.perf_counter() - began)
        return float(np.median(times[1:]))  # the first touches new memory

    def _temporary_bytes(self) -> int:
        """What the compiled step takes besides its arguments, on one device; 0 where the compiler does not say."""
        analysis = self.compiled.memory_analysis()
        return int(analysis.temp_size_in_bytes) if analysis is not None else 0


def _give_back() -> None:
    """Returns freed heap memory to the system, where the C library can: compiling leaves some 100 MB of it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _filled(stored: Stored, first: int, count: int, slots: int, device: jax.Device) -> Array:
    """Rows `first, first + 1, ...` of a stored leaf on a device, block by block; a slot that is left repeats a row."""
    leaf = jnp.zeros((slots, *stored.shape[1:]), stored.dtype, device=device)
    for start, rows in stored.in_blocks(first, count):
        leaf = put_rows(leaf, rows, start - first)
        leaf.block_until_ready()  # the rows' memory is used again
    return leaf if count == slots else put_rows(leaf, stored.read(first if count else 0, 1), count)
