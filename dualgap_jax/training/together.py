"""Solutions that fit in memory, several in one vmapped program, by automatic differentiation of the whole network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualgap_jax.data import Dataset, standardise
from dualgap_jax.losses import Loss, mean_loss
from dualgap_jax.machine import device_memory
from dualgap_jax.networks import multi_branch
from dualgap_jax.networks.sources import InMemory
from dualgap_jax.schedules import Schedule
from dualgap_jax.sharding import filled, over_devices, share_out
from dualgap_jax.training import plan
from dualgap_jax.training.batches import Batch, batch_shape, example_input, on_device
from dualgap_jax.training.engine import (
    Carry,
    LeafReader,
    Steps,
    Transformation,
    all_finite,
    begin,
    item,
    stack,
    updated,
)
from dualgap_jax.trees import num_bytes
from dualgap_jax.types import BranchSource, KeyArray, Network, Params, PyTree, State


def step(
    net: Network,
    loss: Loss,
    transformation: Transformation,
    carry: Carry,
    x: Array,
    y: Array,
    rate: Array,
    key: KeyArray,
) -> tuple[Carry, Array]:
    """One step on the mean loss of a standardised batch: `w + rate * update` of the transformation's update.

    Returns:
      The new carry, and the mean loss before the step: not finite if any output of the network is not.
    """

    def objective(params: Params) -> tuple[Array, State]:
        outputs, state = net.apply(params, carry.state, x, key=key, train=True)
        return mean_loss(loss, outputs, y), state

    (value, state), gradient = jax.value_and_grad(objective, has_aux=True)(carry.params)
    params, opt_state = updated(transformation, gradient, carry.opt_state, carry.params, rate, value)
    return Carry(params, state, opt_state), value


def make_segment(
    net: Network, loss: Loss, transformation: Transformation, schedule: Schedule
) -> Callable[..., tuple[Carry, Array]]:
    """The compiled loop over a segment, vmapped over solutions.

    Returns:
      A function of `(carry, schedule_state, keys [S], base_rate, data, indices [S, room, batch] or None, first step,
      T <= room, room)` whose carry leaves lead with `[S, ...]`; gives the new carry and the losses `[S, room]`, the
      first T of them those of the steps.  `indices=None` is the full batch.
    """

    def one(
        carry: Carry,
        schedule_state: PyTree,
        key: KeyArray,
        indices: Array | None,
        base_rate: Array,
        data: Batch,
        first: Array,
        length: Array | int,
        room: int,
    ) -> tuple[Carry, Array]:
        whole = standardise(data.x, data.mean, data.std) if indices is None else None

        def body(t: Array, so_far: tuple[Carry, Array]) -> tuple[Carry, Array]:
            carry, losses = so_far
            now, picked = first + t, None if indices is None else lax.dynamic_index_in_dim(indices, t, keepdims=False)
            x = standardise(data.x[picked], data.mean, data.std) if whole is None else whole
            y = data.y if picked is None else data.y[picked]
            rate = base_rate * schedule.rate(schedule_state, now)
            carry, value = step(net, loss, transformation, carry, x, y, rate, jax.random.fold_in(key, now))
            return carry, lax.dynamic_update_index_in_dim(losses, value.astype(losses.dtype), t, 0)

        return lax.fori_loop(0, length, body, (carry, jnp.zeros(room)))

    @functools.partial(jax.jit, static_argnames=("room",) if any_length() else ("length", "room"), donate_argnums=0)
    def segment(
        carry: Carry,
        schedule_state: PyTree,
        keys: Array,
        base_rate: Array,
        data: Batch,
        indices: Array | None,
        first: Array,
        length: Array | int,
        room: int,
    ) -> tuple[Carry, Array]:
        return jax.vmap(lambda c, s, k, i: one(c, s, k, i, base_rate, data, first, length, room))(
            carry, schedule_state, keys, indices
        )

    return segment


def any_length() -> bool:
    """Whether one program takes any number of steps: elsewhere each waits for the host to say if it is the last."""
    return jax.default_backend() == "cpu"


def draw(net: Network, dataset: Dataset, transformation: Transformation, key: KeyArray) -> Carry:
    """The carry of a solution at step 0, drawn with its key."""
    return begin(transformation, *net.init(key, example_input(dataset)))


class Together:
    """Several solutions in one vmapped program, a segment of up to `stride` steps a call."""

    def __init__(
        self,
        net: Network,
        loss: Loss,
        transformation: Transformation,
        schedule: Schedule,
        dataset: Dataset,
        batch_size: int,
        devices: Sequence[jax.Device],
        group_size: int,
        stride: int,
    ) -> None:
        self.stride, self.any_length = stride, any_length()
        self.start = jax.jit(functools.partial(draw, net, dataset, transformation))
        self._segment = make_segment(net, loss, transformation, schedule)
        self._net, self._loss, self._transformation, self._schedule = net, loss, transformation, schedule
        self._dataset, self._batch_size = dataset, batch_size
        self._devices, self._group_size = devices, group_size
        self._data = share_out(on_device(dataset), devices, None)
        self._programs: dict[int, Callable[..., tuple[Carry, Array]]] = {}  # by the room of a segment

    def template(self, key: KeyArray) -> Carry:
        return jax.eval_shape(self.start, key)

    def reader(self, is_over: bool) -> LeafReader | None:
        del is_over
        return None

    def plan(self, max_steps: int, num_solutions: int, checkpoints: Path | None) -> str:
        del checkpoints
        carry = self.template(jax.random.key(0))
        if num_bytes(carry) < plan.WORTH_SAYING:
            return ""
        need = plan.need(self._net, carry, batch_shape(self._dataset, self._batch_size))
        together = min(num_solutions, self._group_size)
        return plan.in_memory(
            need.plain, together, self._seconds_per_step(), max_steps, num_solutions, len(self._devices)
        )

    def join(self, carries: Sequence[Carry]) -> Carry:
        lanes = filled(len(carries), self._devices)
        return share_out(stack([carries[i] for i in lanes]), self._devices, 0)

    def part(self, carry: Carry, lane: int) -> Carry:
        if len(self._devices) == 1:
            return item(carry, lane)
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf[lane])), carry)  # where everything else is

    def stored(self, carry: Carry, lane: int) -> Carry:
        return self.part(carry, lane)

    def network(self, carry: Carry | None, folder: Path | None) -> BranchSource:
        del folder
        if carry is None:
            raise ValueError("a network that is trained in memory has no carry in this process.")
        return InMemory(carry.params, carry.state)

    def is_finite(self, carry: Carry, lane: int) -> bool:
        return all_finite((carry.params, carry.state), lane)

    def advance(self, carry: Carry, steps: Steps) -> tuple[Carry, np.ndarray]:
        states, keys, base_rate, indices, first, length = steps
        count, room = len(keys), self.stride if self.any_length else length
        picked = None
        if indices is not None:
            picked = np.zeros((count, room, *indices.shape[2:]), indices.dtype)
            picked[:, :length] = indices
        if len(self._devices) == 1:
            carry, losses = self._segment(carry, states, keys, base_rate, self._data, picked, first, length, room)
        else:
            lanes = filled(count, self._devices)
            mine = jax.tree.map(lambda a: np.asarray(a)[lanes], (states, jax.random.key_data(keys), picked))
            whole = jnp.asarray(base_rate, float), self._data, jnp.asarray(first), jnp.asarray(length)
            program = self._program(room)
            carry, losses = program(carry, *share_out(mine, self._devices, 0), *whole)
        return carry, np.asarray(losses, np.float64)[:count, :length]

    def _program(self, room: int) -> Callable[..., tuple[Carry, Array]]:
        """The segment with its lanes shared out over the devices."""
        if room not in self._programs:

            def segment(
                carry: Carry,
                states: PyTree,
                words: Array,
                picked: PyTree,
                rate: Array,
                data: Batch,
                first: Array,
                length: Array,
            ) -> tuple[Carry, Array]:
                keys = jax.random.wrap_key_data(words)
                taken = length if self.any_length else room
                return self._segment(carry, states, keys, rate, data, picked, first, taken, room)

            shared = over_devices(segment, self._devices, (0, 0, 0, 0, None, None, None, None), 0)
            self._programs[room] = jax.jit(shared, donate_argnums=0)
        return self._programs[room]

    def _seconds_per_step(self) -> float | None:
        """Measured on a network of a few of the branches, and scaled; None for a network that is no sum of branches."""
        if self._net.stacked is None:
            return None
        branch, branches, _ = self._net.stacked[:3]
        one = num_bytes(self.template(jax.random.key(0))) / branches
        count = int(min(max(plan.probe_bytes(device_memory()) // one, 1), branches))
        few = multi_branch(branch, count)
        segment = make_segment(few, self._loss, self._transformation, self._schedule)
        key, dataset = jax.random.key(0), self._dataset
        carry, state = stack([draw(few, dataset, self._transformation, key)]), stack([self._schedule.init()])
        batch = self._batch_size or len(dataset.y)
        data = Batch(*map(jnp.asarray, (dataset.x[:batch], dataset.y[:batch], dataset.mean, dataset.std)))
        picked = jnp.arange(batch)[None, None] if self._batch_size else None

        def step(now: int) -> Carry:
            nonlocal carry
            carry, _ = segment(carry, state, key[None], 1e-3, data, picked, now, 1, 1)
            return carry

        return plan.seconds_of(step) * branches / count
