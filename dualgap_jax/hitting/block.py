"""The compiled work on one block of runs: SGD steps, and looks at the full data.

Runs lie on the last axis of every array.  Each operation is elementwise over the lanes, and sums over inputs, hidden
units and examples are written out in a fixed order, so that a run's numbers do not depend on its block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from dualgap_jax.hitting.random import draw
from dualgap_jax.hitting.runs import Order
from dualgap_jax.losses import Loss, marked
from dualgap_jax.schedules import SCHEDULES, Schedule
from dualgap_jax.sharding import over_devices
from dualgap_jax.types import PyTree

_STEPS_AT_ONCE = 100  # on accelerators: SGD steps in a loop whose length the compiler knows
_CHUNK = 20  # examples at a time: their features, activations and the weights of a block stay in the first caches


class Block(NamedTuple):
    """The weights of a block: `kernel [height, d, lanes]`, `bias`, `head [height, lanes]`, `offset [lanes]`."""

    kernel: Any
    bias: Any
    head: Any
    offset: Any


LANES = Block(2, 1, 1, 0)  # the axis of the lanes in each


def total_of(terms: Sequence[Array], start: Array) -> Array:
    """`start + terms[0] + terms[1] + ...`, in this order: one fused loop whose innermost axis is that of the lanes."""
    for term in terms:
        start = start + term
    return start


def once(live: Array, f: Callable[..., Any], *arguments: PyTree) -> Any:
    """`f(*arguments)`, computed once and kept.

    XLA on CPU merges whatever is elementwise into each of its users, and would compute the sum over hidden units anew
    for every weight that needs it; a barrier is gone before that.  It does not merge across the border of a
    conditional.  `live` is true; the compiler cannot know.
    """
    shapes = jax.eval_shape(f, *arguments)

    def on_cpu(live: Array, *arguments: PyTree) -> Any:
        return lax.cond(live, f, lambda *_: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), *arguments)

    def elsewhere(live: Array, *arguments: PyTree) -> Any:
        return lax.optimization_barrier(f(*arguments))

    return lax.platform_dependent(live, *arguments, cpu=on_cpu, default=elsewhere)


def _examples(table: Array, base: Array, index: Array, *, n: int, d: int) -> Array:
    """Features and label `[d + 1, count, lanes]` of each lane's examples from the flat table of all data sets."""
    columns = (jnp.arange(d + 1, dtype=jnp.int32) * n)[:, None, None]
    return table.at[columns + index[None] + base[None, None]].get(mode="promise_in_bounds")


def _hidden(block: Block, xy: Array) -> Float[Array, "height count lanes"]:
    """`max(0, w_i . x + b_i)`."""
    d = block.kernel.shape[1]
    terms = [block.kernel[:, j, None, :] * xy[None, j] for j in range(d)]
    total = total_of(terms, block.bias[:, None, :])
    return jnp.where(total < 0, 0, total)  # unlike a maximum, which may drop it, this keeps NaN


def _outputs(block: Block, hidden: Array) -> Float[Array, "count lanes"]:
    terms = [block.head[h][None] * hidden[h] for h in range(len(block.head))]
    return total_of(terms, block.offset[None])


def _least(a: Array, b: Array) -> Array:
    """The smaller of the two, NaN where one is."""
    return jnp.where((a < b) | jnp.isnan(a), a, b)


def _flat(f: Callable[[Array, Array], Array], outputs: Array, y: Array) -> Array:
    """A function of outputs `[batch, 1]` and labels `[batch]`, applied to `[count, lanes]` of both."""
    return f(outputs.reshape(-1, 1), y.reshape(-1)).reshape(outputs.shape)


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled work on one block; the height and the number of lanes come with the arrays."""

    loss: Loss
    schedule: Schedule
    batch_size: int
    order: Order
    use_bias: bool
    n: int
    d: int
    devices: tuple[jax.Device, ...]

    def chunks(self, count: int) -> tuple[int, int]:
        """How `count` examples are worked through: number of chunks, examples in each; the last may hold fewer."""
        number = -(-count // _CHUNK)
        return number, -(-count // number)

    def gradient(self, block: Block, xy: Array, weight: Array, live: Array, into: Block) -> tuple[Block, Array]:
        """Adds the gradient of `sum_b weight_b loss_b` to `into`; returns it and that sum, `[lanes]`.

        Args:
          block: the weights.
          xy: examples, `[d + 1, count, lanes]`.
          weight: `[count, 1]`.
          live: see `once`.
          into: gradient so far.
        """
        count, d = xy.shape[1], self.d
        hidden = once(live, _hidden, block, xy)

        def slopes(block: Block, hidden: Array, xy: Array, weight: Array) -> tuple[Array, Array]:
            outputs = _outputs(block, hidden)
            values, pull = jax.vjp(lambda f: _flat(self.loss.per_example, f, xy[d]), outputs)
            return weight * pull(jnp.ones_like(values))[0], weight * values

        slope, values = once(live, slopes, block, hidden, xy, weight)

        def back(head: Array, hidden: Array, slope: Array) -> Array:
            return jnp.where(hidden > 0, head[:, None] * slope[None], 0)

        delta = once(live, back, block.head, hidden, slope)
        rows = range(count)
        total = Block(
            total_of([delta[:, None, b] * xy[None, :d, b] for b in rows], into.kernel),
            total_of([delta[:, b] for b in rows], into.bias) if self.use_bias else into.bias,
            total_of([slope[None, b] * hidden[:, b] for b in rows], into.head),
            total_of([slope[b] for b in rows], into.offset) if self.use_bias else into.offset,
        )
        return total, total_of([values[b] for b in rows], jnp.zeros_like(into.offset))

    def step(
        self, block: Block, step: Array, rate: Array, keys: Array, base: Array, table: Array, live: Array
    ) -> tuple[Block, Array]:
        """One SGD step of every lane; returns the new weights and the mean loss of the mini-batch before it."""
        size = self.batch_size
        number, count = self.chunks(size)
        draws = functools.partial(draw, n=self.n, batch_size=size, order=self.order, count=number * count)
        index = once(live, draws, step, keys)
        pick = functools.partial(_examples, n=self.n, d=self.d)
        weights = jnp.where(jnp.arange(number * count) < size, 1 / size, 0).astype(table.dtype)[:, None]
        zero = jax.tree.map(jnp.zeros_like, block)
        if number == 1:
            xy = once(live, pick, table, base, index)
            gradient, value = self.gradient(block, xy, weights, live, zero)
        else:

            def add(k: Array, carry: tuple[Block, Array]) -> tuple[Block, Array]:
                rows = lax.dynamic_slice_in_dim(index, k * count, count)
                xy = once(live, pick, table, base, rows)
                weight = lax.dynamic_slice_in_dim(weights, k * count, count)
                gradient, value = self.gradient(block, xy, weight, live, carry[0])
                return gradient, carry[1] + value

            gradient, value = lax.fori_loop(0, number, add, (zero, jnp.zeros_like(block.offset)))

        def moved(w: Array, g: Array) -> Array:
            return w - rate.reshape((1,) * (w.ndim - 1) + (-1,)) * g

        return jax.tree.map(moved, block, gradient), value

    def look(self, block: Block, base: Array, table: Array, live: Array) -> tuple[Array, Array]:
        """Mean loss over the full data and smallest margin of every lane (infinity for a loss without margin)."""
        number, count = self.chunks(self.n)

        def add(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            row = k * count + jnp.arange(count, dtype=jnp.int32)[:, None]
            index = jnp.broadcast_to(jnp.minimum(row, self.n - 1), (count, len(block.offset)))
            xy = once(live, functools.partial(_examples, n=self.n, d=self.d), table, base, index)
            hidden = once(live, _hidden, block, xy)

            def judged(block: Block, hidden: Array, xy: Array) -> tuple[Array, Array]:
                outputs = _outputs(block, hidden)
                losses = marked(_flat(self.loss.per_example, outputs, xy[self.d]), outputs[..., None])
                values = jnp.where(row < self.n, losses, 0)
                margins = (
                    jnp.full_like(values, jnp.inf)
                    if self.loss.margin is None
                    else _flat(self.loss.margin, outputs, xy[self.d])
                )
                return values, margins

            values, margins = once(live, judged, block, hidden, xy)
            least = functools.reduce(_least, [margins[b] for b in range(count)], carry[1])
            return total_of([values[b] for b in range(count)], carry[0]), least

        start = jnp.zeros_like(block.offset)
        total, least = lax.fori_loop(0, number, add, (start, jnp.full_like(start, jnp.inf)))
        return total / self.n, least

    def _loop(self, length: Array, body: Callable[[Array, Any], Any], carry: Any) -> Any:
        """`body(k, carry)` for k below `length`.

        On GPUs the host decides whether a loop of unknown length goes on, at every turn; so its turns are loops of a
        known length, which it starts once.
        """
        if self.devices[0].platform == "cpu":
            return lax.fori_loop(0, length, body, carry)
        many = length // _STEPS_AT_ONCE

        def turn(i: Array, carry: Any) -> Any:
            return lax.fori_loop(0, _STEPS_AT_ONCE, lambda k, carry: body(i * _STEPS_AT_ONCE + k, carry), carry)

        carry = lax.fori_loop(0, many, turn, carry)
        return lax.fori_loop(many * _STEPS_AT_ONCE, length, body, carry)

    @functools.cached_property
    def segment(self) -> Callable[..., tuple[Block, PyTree, Array, Array, Array]]:
        """The jitted `(block, schedule states, rates, keys, base, table, first, length, live)` -> the same two, looks.

        Takes every lane from step `first` by `length` steps, updates its schedule, and looks at the full data.  Lanes
        with rate 0 stay as they are.  Returns weights, schedule states, and per lane whether its schedule wants no
        further step, the full loss, and the smallest margin.
        """

        def segment(
            block: Block,
            states: PyTree,
            rates: Array,
            keys: Array,
            base: Array,
            table: Array,
            first: Array,
            length: Array,
            live: Array,
        ) -> tuple[Block, PyTree, Array, Array, Array]:
            def body(k: Array, carry: tuple[Block, Array]) -> tuple[Block, Array]:
                now = first + k
                factor = jax.vmap(lambda state: self.schedule.rate(state, now), axis_size=len(rates))(states)
                block, value = self.step(carry[0], now, rates * factor.astype(rates.dtype), keys, base, table, live)
                return block, carry[1] + value

            block, total = self._loop(length, body, (block, jnp.zeros_like(rates)))
            mean = total / jnp.maximum(length, 1).astype(total.dtype)
            states = jax.vmap(self.schedule.update)(states, mean.astype(float))
            stops = jax.vmap(self.schedule.stop, axis_size=len(rates))(states)
            return block, states, stops, *self.look(block, base, table, live)

        # By hand, not by XLA: the permutation draws until all lanes have a place, and must not wait for other devices.
        axes = (LANES, 0, 0, 1, 0, None, None, None, None)
        return jax.jit(over_devices(segment, self.devices, axes, (LANES, 0, 0, 0, 0)), donate_argnums=(0, 1))


@functools.lru_cache(maxsize=16)
def program_for(
    loss: Loss, schedule: str, settings: tuple[Any, ...], steps: int, batch_size: int, order: Order, use_bias: bool,
    n: int, d: int, devices: tuple[jax.Device, ...],
) -> Program:  # fmt: skip
    """One program for all studies that need the same, so that it is compiled once."""
    built = SCHEDULES.build(schedule, max_steps=steps, **dict(settings))
    return Program(loss, built, batch_size or n, order if batch_size else "epochs", use_bias, n, d, devices)
