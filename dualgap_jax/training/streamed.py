"""One solution of a network of any number of branches, trained by the streamed step, on one device or over a mesh."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualgap_jax.checkpoints import open_branches
from dualgap_jax.config import require
from dualgap_jax.data import Dataset, standardise
from dualgap_jax.losses import Loss
from dualgap_jax.machine import device_memory
from dualgap_jax.networks import draw_branches, multi_branch
from dualgap_jax.networks.sources import InMemory
from dualgap_jax.schedules import Schedule, constant
from dualgap_jax.sharding import BRANCH, DATA, MeshSpec, on_all
from dualgap_jax.training import plan
from dualgap_jax.training.batches import batch_shape, example_input
from dualgap_jax.training.branch_step import branch_step
from dualgap_jax.training.engine import Carry, LeafReader, Steps, Transformation, all_finite, begin, item
from dualgap_jax.training.placement import Placement, verify_leaf
from dualgap_jax.training.plan import Estimate
from dualgap_jax.trees import num_bytes
from dualgap_jax.types import BranchSource, KeyArray, Network, Stacked

_LARGE = 2**24  # bytes of a carry below which what the compiler holds does not matter
_STEPS_AHEAD = 32  # steps that are handed to a device before their losses are waited for


class Streamed:
    """Trains one solution of a stacked network with `branch_step`, a step a call.

    A carry's leaves lead with the slots of the mesh, `[shards * slots, ...]`; each step takes them over (donated).

    Args:
      net: a network made by `multi_branch`.
      loss: the loss.
      transformation: the optimiser, as `optimizers.for_network` makes it.
      dataset: the training set; it stays on the host, and batches are sent as they are stored.
      batch_size: examples a step; 0 is the full data set, which is sent once.
      schedule: of the learning rate; None is none.
      mesh: how many devices share the branches and the examples.
      chunk: branches at a time on each device; 0 chooses.
      on_disk: whether finished networks stay in their checkpoints.

    Raises:
      ConfigError: if the network is not stacked or has other functions than the sum, the batch cannot be shared evenly
        by the devices, a branch with state would see only a share of a batch, or there are too few devices.
    """

    any_length = False  # its strides are short

    def __init__(
        self,
        net: Network,
        loss: Loss,
        transformation: Transformation,
        dataset: Dataset,
        batch_size: int,
        *,
        schedule: Schedule | None = None,
        mesh: MeshSpec | None = None,
        chunk: int = 0,
        on_disk: bool = False,
    ) -> None:
        mesh = mesh or MeshSpec()
        require(
            net.stacked is not None,
            "streamed or sharded training needs a network made by multi_branch; a mixture or a single branch is"
            " trained with training.streaming='off' on a mesh of one device.",
        )
        require(
            not (new := net.replaced()),
            "streamed or sharded training draws and computes branch by branch, so it would not use the"
            f" {' and '.join(new)} given by _replace; replace those of the branch before multi_branch, or train with"
            " training.streaming='off' on a mesh of one device.",
        )
        batch = batch_size or len(dataset.y)
        require(
            batch % mesh.data == 0,
            f"a batch of {batch} examples cannot be shared evenly by mesh.data={mesh.data} devices.",
        )
        self.stacked: Stacked = typing.cast(Stacked, net.stacked)
        self._loss, self._transformation, self._dataset, self._batch = loss, transformation, dataset, batch
        self._mesh_spec, self._on_disk = mesh, on_disk
        self._example = example_input(dataset)
        first = jax.eval_shape(functools.partial(self._begun, first=0, count=1), jax.random.key(0))
        require(
            mesh.data == 1 or not jax.tree.leaves(first.state),
            f"mesh.data={mesh.data}: these branches have state (batch statistics), which would be that of a share of"
            " the batch; use mesh.branch only.",
        )
        self._placement = Placement(self.stacked.num_branches, mesh)
        self.layout = self._placement.layout
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), first)
        x = batch_shape(dataset, batch // mesh.data)
        memory = device_memory()
        self.chunk = chunk or plan.branch_chunk(self.stacked.branch, one, x, self.layout.slots, memory)
        self._constants = tuple(self._placement.everywhere(a) for a in (dataset.mean, dataset.std))
        self._rate = jax.jit((schedule or constant(0)).rate)
        # On CPU a step may take seconds; elsewhere the host prepares the next ones while the device works.
        self.stride = 1 if memory is None else _STEPS_AHEAD

    # --- programs ---

    @functools.cached_property
    def compiled(self) -> Any:
        """The compiled step, for the shapes of this network."""
        placement = self._placement

        def local(
            carry: Carry, x: Array, y: Array, mean: Array, std: Array, rate: Array, key: Array, now: Array
        ) -> tuple[Carry, Array]:
            noise = jax.random.fold_in(jax.random.wrap_key_data(key), now)
            return branch_step(
                self.stacked,
                self._loss,
                self._transformation,
                carry,
                standardise(x, mean, std),
                y,
                rate,
                noise,
                chunk=self.chunk,
                shard=placement.shard(),
            )

        program = placement.over_devices(local, (BRANCH, DATA, DATA, None, None, None, None, None), (BRANCH, None))
        rows = (self._dataset.x[: self._batch], self._dataset.y[: self._batch])
        shapes = placement.shape(self.shapes, BRANCH), *(placement.shape(a, DATA) for a in rows)
        numbers = self._numbers(0.0, jax.random.key(0), 0)
        # Lowered for shapes only: nothing of the network's size is allocated.
        return jax.jit(program, donate_argnums=0).lower(*shapes, *self._constants, *numbers).compile()

    @functools.cached_property
    def _draw(self) -> Any:
        """The compiled start."""

        def local(key: Array) -> Carry:
            shard = self._placement.shard()
            return self._begun(jax.random.wrap_key_data(key), shard.first, shard.slots)

        program = self._placement.over_devices(local, (None,), BRANCH)
        return jax.jit(program).lower(self._placement.everywhere(jax.random.key_data(jax.random.key(0)))).compile()

    @functools.cached_property
    def shapes(self) -> Carry:
        """Shapes and dtypes of a carry in the order of the branches, `[I, ...]`, without padding."""
        whole = functools.partial(self._begun, first=0, count=self.stacked.num_branches)
        return jax.eval_shape(whole, jax.random.key(0))

    def _begun(self, key: KeyArray, first: Array | int, count: int) -> Carry:
        """Some branches at step 0."""
        return begin(self._transformation, *draw_branches(self.stacked.branch, key, self._example, first, count))

    # --- the run ---

    def start(self, key: KeyArray) -> Carry:
        """The carry at step 0.  Branch i is drawn with `fold_in(key, i)`, so the mesh does not change it."""
        draw, _ = self._draw, self.compiled
        if num_bytes(self.shapes) > _LARGE:  # the compiler's memory is given back before the parameters take theirs
            gc.collect()
            _give_back()
        return draw(self._placement.everywhere(jax.random.key_data(key)))

    def step(
        self, carry: Carry, picked: np.ndarray | None, rate: float | Array, key: KeyArray, now: int
    ) -> tuple[Carry, Array]:
        """One step; returns the new carry and the mean loss of the batch before it, neither of them waited for.

        Args:
          carry: taken over.
          picked: indices of the batch; None is the full data set.
          rate: what the optimiser's update is multiplied by.
          key: of the noise.
          now: index of the step.
        """
        x, y = self._send(self._dataset.x[picked], self._dataset.y[picked]) if picked is not None else self._whole
        return self.compiled(carry, x, y, *self._constants, *self._numbers(rate, key, now))

    def _numbers(self, rate: float | Array, key: KeyArray, now: int) -> tuple[Array, ...]:
        numbers = (jnp.asarray(rate, float), jax.random.key_data(key), np.int32(now))
        return tuple(self._placement.everywhere(a) for a in numbers)

    def _send(self, x: np.ndarray, y: np.ndarray) -> tuple[Array, Array]:
        return self._placement.batch(x), self._placement.batch(y)

    @functools.cached_property
    def _whole(self) -> tuple[Array, Array]:
        """The full data set as one batch."""
        return self._send(self._dataset.x, self._dataset.y)

    # --- as an engine; see `Engine` ---

    def template(self, key: KeyArray) -> Carry:
        del key
        return self._placement.restorable(self.shapes)

    def reader(self, is_over: bool) -> LeafReader | None:
        return verify_leaf if is_over and self._on_disk else self._placement.read_leaf

    def join(self, carries: Sequence[Carry]) -> Carry:
        (carry,) = carries
        return carry

    def part(self, lanes: Carry, lane: int) -> Carry | None:
        del lane
        return None if self._on_disk else lanes

    def stored(self, lanes: Carry, lane: int) -> Carry:
        del lane
        return self._placement.stored(lanes)

    def is_finite(self, lanes: Carry, lane: int) -> bool:
        del lane
        return on_all(all_finite((lanes.params, lanes.state)))

    def advance(self, lanes: Carry, steps: Steps) -> tuple[Carry, np.ndarray]:
        losses = []
        for t, now in enumerate(range(steps.first, steps.first + steps.length)):
            rate = steps.base_rate * self._rate(item(steps.schedule_state, 0), jnp.asarray(now))
            picked = steps.indices[0, t] if steps.indices is not None else None
            lanes, value = self.step(lanes, picked, rate, steps.keys[0], now)
            losses.append(value)
        return lanes, np.asarray([[float(value) for value in losses]], np.float64)

    def network(self, carry: Carry | None, folder: Path | None) -> BranchSource:
        if self._on_disk and folder is not None:
            return open_branches(folder, (self.shapes.params, self.shapes.state))
        assert carry is not None
        return InMemory(*self._placement.whole((carry.params, carry.state)))

    # --- before the run ---

    def plan(self, max_steps: int, num_solutions: int, checkpoints: Path | None) -> str:
        return plan.streamed(self.estimate(), self.layout, self.chunk, max_steps, num_solutions, checkpoints)

    def estimate(self) -> Estimate:
        """Memory from the compiler, time from a network of two chunks on each device."""
        chunks = min(self.layout.slots, 2 * self.chunk)
        probe = self
        if chunks < self.layout.slots:
            probe = Streamed(
                multi_branch(self.stacked.branch, chunks * self.layout.shards),
                self._loss,
                self._transformation,
                self._dataset,
                self._batch,
                mesh=self._mesh_spec,
                chunk=self.chunk,
            )
        picked, key = np.arange(self._batch), jax.random.key(0)
        carry = probe.start(key)

        def step(now: int) -> Carry:
            nonlocal carry
            carry, _ = probe.step(carry, picked, 1e-3, key, now)
            return carry

        analysis = self.compiled.memory_analysis()
        return Estimate(
            num_bytes((self.shapes.params, self.shapes.state)) // self.layout.shards,
            num_bytes(self.shapes.opt_state) // self.layout.shards,
            int(analysis.temp_size_in_bytes) if analysis is not None else 0,
            num_bytes((self._dataset.x, self._dataset.y)) if self._placement.mesh is None else 0,
            plan.seconds_of(step) * self.layout.slots / chunks,
        )


def _give_back() -> None:
    """Returns freed heap memory to the system, where the C library can: compiling leaves some 100 MB of it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
