"""Thousands of independent SGD runs of one-hidden-layer networks in one program: how often do they hit the minimum?

A run is one network `f(x) = sum_i v_i max(0, w_i . x + b_i) + c` trained by mini-batch SGD from its own initialisation
in its own order.  Runs lie on the last axis of every array, in blocks of a fixed number of lanes: each operation is
elementwise over the lanes, and sums over inputs, hidden units and examples are written out in a fixed order.  Hence

- the vector units of the processor work across runs, however small one network is;
- a run's numbers do not depend, bit for bit, on what else is in its block: lanes do not mix, and hidden units that pad
  a narrow network to the height of its block add zeros after its own sums;
- blocks can be packed anew at any time: runs that are over leave their lanes to others and cost nothing.

Whatever is random at step t is a function of (the run's key, t), so a resumed study repeats the uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int, UInt32

from dualgap_jax import seeds
from dualgap_jax.checkpoints import Checkpointer
from dualgap_jax.config import Component, require
from dualgap_jax.data import Dataset, Teacher, relu_teacher, standardise, teacher_outputs
from dualgap_jax.losses import Loss
from dualgap_jax.metrics import Metrics, Progress
from dualgap_jax.networks import mlp
from dualgap_jax.sharding import local_devices, over_devices, place
from dualgap_jax.training import SCHEDULES, Schedule
from dualgap_jax.types import PyTree

Order = Literal["epochs", "independent"]

STATUSES = ("running", "zero", "below", "schedule", "diverged")
_RUNNING, _ZERO, _BELOW, _SCHEDULE, _DIVERGED = range(5)

_CHUNK = 20  # examples at a time: their features, activations and the weights of a block stay in the first caches
_HEIGHTS = 3  # block heights are multiples of this, so that few programs are compiled
_SEGMENTS = 5  # segments between two packings
_ABSORBED = 1e-5  # how far beyond tau, relatively, all margins must lie for a run to be called at rest
_ROUNDS = (8, 12)  # of the permutation of an epoch; the second for fewer than 100 examples


# --- the study ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SgdSpec:
    """How each run is trained.

    Attributes:
      steps: SGD iterations of a run.
      batch_size: examples a step; 0 is the full data set.
      order: 'epochs' draws without replacement, a fresh permutation each epoch (a rest that fills no batch is left
        out); 'independent' draws every index anew.
      schedule: an entry of `training.SCHEDULES`, per run.
      init, use_bias: as in `networks.mlp`.
      check_every: steps in a segment, between two looks at the loss on the full data and two updates of the schedule.
      stop_below: a run whose loss on the full data is at most this at a look stops there; -1 never stops so.
      stop_at_rest: a run of a hinge loss whose margins all exceed tau has no gradient any more; True ends it at the
        next look, which changes no number of its result.
      lanes: runs in a block, on each device, a multiple of 16.  Results do not depend on it; on CPU 64 suits batches up
        to 20 and 128 larger ones.
      devices: devices of this machine that share a block, each with `lanes` of its runs; 0 is all of them.  Results do
        not depend on it.
      checkpoint_seconds: least time between two checkpoints.
    """

    steps: int = 100_000
    batch_size: int = 10
    order: Order = "epochs"
    schedule: Component = Component("constant", {})
    init: str = "torch"
    use_bias: bool = True
    check_every: int = 1000
    stop_below: float = -1.0
    stop_at_rest: bool = True
    lanes: int = 64
    devices: int = 0
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"sgd.steps={self.steps} must be at least 1.")
        require(self.batch_size >= 0, f"sgd.batch_size={self.batch_size} must be >= 0 (0: the full data set).")
        require(self.check_every >= 1, f"sgd.check_every={self.check_every} must be at least 1.")
        require(not math.isnan(self.stop_below), "sgd.stop_below is not a number; -1 switches it off.")
        require(
            self.lanes >= 16 and self.lanes % 16 == 0,
            f"sgd.lanes={self.lanes} must be a multiple of 16, the width of the widest vector registers.",
        )
        require(self.devices >= 0, f"sgd.devices={self.devices} must be >= 0 (0: all of this machine).")
        require(self.checkpoint_seconds >= 0, f"sgd.checkpoint_seconds={self.checkpoint_seconds} must be >= 0.")
        SCHEDULES.build(self.schedule.name, max_steps=self.steps, **self.schedule.settings)

    @property
    def looks(self) -> int:
        """Number of looks at the full loss after the one at the start."""
        return -(-self.steps // self.check_every)


class Runs(NamedTuple):
    """What tells the runs apart; arrays `[runs]`.

    Attributes:
      width: hidden units.
      seed: of the initialisation and the order, together with the width: equal pairs give equal random numbers.
      data: index of the data set.
      learning_rate: base rate.
      init_scale: multiplies the initial weights.
    """

    width: np.ndarray
    seed: np.ndarray
    data: np.ndarray
    learning_rate: np.ndarray
    init_scale: np.ndarray


def make_runs(width: Any, seed: Any, *, data: Any = 0, learning_rate: Any = 0.01, init_scale: Any = 1.0) -> Runs:
    """The runs with these columns, broadcast against one another and flattened.

    Raises:
      ConfigError: for no runs, a width below 1, a seed that `seeds.check` refuses, a negative data index, or a rate or
        scale that is not positive.
    """
    for given in np.ravel(seed):
        seeds.check(given)
    columns = np.broadcast_arrays(width, seed, data, learning_rate, init_scale)
    ints, floats = [c.ravel().astype(np.int64) for c in columns[:3]], [c.ravel().astype(float) for c in columns[3:]]
    runs = Runs(*ints, *floats)
    require(len(runs.width) > 0, "no runs: give at least one width and one seed.")
    require(bool((runs.width >= 1).all()), f"width={runs.width.min()} must be at least 1.")
    require(bool((runs.data >= 0).all()), "every index of a data set must be 0 or more.")
    for name in ("learning_rate", "init_scale"):
        value = getattr(runs, name)
        require(bool((np.isfinite(value) & (value > 0)).all()), f"every {name} must be positive and finite.")
    return runs


class Weights(NamedTuple):
    """The weights of all runs, zero beyond a run's width: `f(x) = head . max(0, kernel x + bias) + offset`.

    `kernel [runs, height, d]`, `bias [runs, height]`, `head [runs, height]`, `offset [runs]`.
    """

    kernel: np.ndarray
    bias: np.ndarray
    head: np.ndarray
    offset: np.ndarray


class Outcome(NamedTuple):
    """How the runs ended; arrays lead with `[runs]`.

    Attributes:
      final_loss: mean loss over the full data at the last weights, in float64.
      losses: `[runs, looks + 1]`: the full loss at the start and at each look, in the precision of the training; after
        a run has stopped, that of its last look.
      steps: steps done; fewer than asked for where the run stopped.
      status: index into `STATUSES`: 'running' (all steps done), 'zero' (at rest: no gradient on any example), 'below'
        (`stop_below`), 'schedule' (the schedule stopped it), 'diverged' (a loss that is not finite).
      weights: at the end.
    """

    final_loss: np.ndarray
    losses: np.ndarray
    steps: np.ndarray
    status: np.ndarray
    weights: Weights


def diverged(outcome: Outcome) -> np.ndarray:
    """Which runs diverged, `[runs]`: a loss at a look or at the last weights was not finite."""
    return (outcome.status == _DIVERGED) | ~np.isfinite(outcome.final_loss)


# --- random numbers -------------------------------------------------------------------------------------------------


def threefry(k0: Array, k1: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011), elementwise in uint32, the rounds written out.

    The generator behind `jax.random`: there its rounds are a loop on CPU, which the vector units cannot work across.
    """
    keys = (k0, k1, k0 ^ k1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + k0, x1 + k1
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << jnp.uint32(rotation)) | (x1 >> jnp.uint32(32 - rotation))) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1


def _below(bits: Array, n: int) -> Array:
    """`floor(bits n / 2^32)` for uint32 bits and n < 2^16: a number below n, each within 2^-32 of equally likely."""
    high, low = bits >> jnp.uint32(16), bits & jnp.uint32(0xFFFF)
    return (high * jnp.uint32(n) + ((low * jnp.uint32(n)) >> jnp.uint32(16))) >> jnp.uint32(16)


def _radices(n: int) -> tuple[int, int]:
    """Two factors near sqrt(n) whose product is the least at or above n."""
    root = math.isqrt(n - 1) + 1
    pairs = [(a, -(-n // a)) for a in range(max(1, root * 3 // 4), root + 1)]
    return min(pairs, key=lambda pair: (pair[0] * pair[1], pair[1]))


def permuted(place: UInt32[Array, "batch lanes"], k0: Array, k1: Array, n: int) -> UInt32[Array, "batch lanes"]:
    """Where the pseudo-random permutation of `0..n-1` with key (k0, k1) sends each place.

    A Feistel network over mixed radices with cycle walking (Black and Rogaway, CT-RSA 2002): each entry is computed by
    itself, so that an epoch's permutation is never stored.  Rounds are keyed mixing functions, not cryptographic ones.

    Args:
      place: numbers below n.
      k0, k1: uint32 `[1, lanes]`, the key of each lane.
      n: at least 1 and below 2^16.
    """
    a, b = _radices(n)

    def plus(x: Array, other: Array, number: int, radix: int) -> Array:
        """`x` plus a keyed pseudo-random function of `other`, modulo the radix."""
        h = (other + k0 + jnp.uint32(number) * (k1 | jnp.uint32(1))) * jnp.uint32(0x9E3779B1)
        h = (h ^ (h >> jnp.uint32(15))) * jnp.uint32(0x85EBCA6B)
        total = x + (((h >> jnp.uint32(16)) * jnp.uint32(radix)) >> jnp.uint32(16))
        return total - jnp.where(total >= radix, jnp.uint32(radix), jnp.uint32(0))

    def once(x: Array) -> Array:
        left, right = x // jnp.uint32(b), x % jnp.uint32(b)
        for number in range(0, _ROUNDS[n < 100], 2):
            left = plus(left, right, number, a)
            right = plus(right, left, number + 1, b)
        return left * jnp.uint32(b) + right

    x = once(place)
    if a * b == n:
        return x
    return lax.while_loop(lambda x: jnp.any(x >= n), lambda x: jnp.where(x >= n, once(x), x), x)


def draw(
    step: Array, keys: UInt32[Array, "2 lanes"], *, n: int, batch_size: int, order: Order, count: int
) -> Int[Array, "count lanes"]:
    """Indices of the examples at a step; a pure function of the step and each lane's key.

    Args:
      step: scalar.
      keys: the two words of each run's order key.
      n: number of examples, below 2^16.
      batch_size: examples a step.
      order: see `SgdSpec`.
      count: rows to return; those beyond `batch_size` hold some valid index.
    """
    row = jnp.arange(count, dtype=jnp.uint32)[:, None]
    k0, k1 = keys[:1], keys[1:]
    if batch_size == n and order == "epochs":
        return jnp.broadcast_to(jnp.minimum(row, n - 1), (count, keys.shape[1])).astype(jnp.int32)
    step = jnp.asarray(step).astype(jnp.uint32)
    if order == "independent":
        x0, x1 = threefry(k0, k1, jnp.broadcast_to(step, (1, 1)), row)
        return _below(x0 ^ x1, n).astype(jnp.int32)
    per_epoch = jnp.uint32(n // batch_size)
    place = jnp.minimum((step % per_epoch) * jnp.uint32(batch_size) + row, n - 1)
    e0, e1 = threefry(k0, k1, jnp.zeros((1, 1), jnp.uint32), jnp.broadcast_to(step // per_epoch, (1, 1)))
    return permuted(jnp.broadcast_to(place, (count, keys.shape[1])), e0, e1, n).astype(jnp.int32)


def run_keys(runs: Runs) -> tuple[Array, UInt32[np.ndarray, "2 runs"]]:
    """The initialisation keys `[runs]` and the two words of the order keys."""

    @jax.vmap
    def one(seed: Array, width: Array) -> Array:
        return jax.random.split(jax.random.fold_in(jax.random.key(seed), width))

    keys = one(jnp.asarray(runs.seed, jnp.uint32), jnp.asarray(runs.width, jnp.uint32))
    return keys[:, 0], np.asarray(jax.random.key_data(keys[:, 1])).T


# --- the block ------------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """The weights of a block: `kernel [height, d, lanes]`, `bias`, `head [height, lanes]`, `offset [lanes]`."""

    kernel: Any
    bias: Any
    head: Any
    offset: Any


_LANES = _Block(2, 1, 1, 0)  # the axis of the lanes in each


def _total(terms: Sequence[Array], start: Array) -> Array:
    """`start + terms[0] + terms[1] + ...`, in this order: one fused loop whose innermost axis is that of the lanes."""
    for term in terms:
        start = start + term
    return start


def _apart(live: Array, f: Callable[..., Any], *arguments: PyTree) -> Any:
    """`f(*arguments)`, computed once and kept.

    XLA on CPU merges whatever is elementwise into each of its users, and would compute the sum over hidden units anew
    for every weight that needs it; a barrier is gone before that.  It does not merge across the border of a
    conditional.  `live` is true; the compiler cannot know.
    """
    if jax.default_backend() != "cpu":
        return lax.optimization_barrier(f(*arguments))
    shapes = jax.eval_shape(f, *arguments)
    return lax.cond(live, f, lambda *_: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), *arguments)


def _examples(table: Array, base: Array, index: Array, *, n: int, d: int) -> Array:
    """Features and label `[d + 1, count, lanes]` of each lane's examples from the flat table of all data sets."""
    columns = (jnp.arange(d + 1, dtype=jnp.int32) * n)[:, None, None]
    return table.at[columns + index[None] + base[None, None]].get(mode="promise_in_bounds")


def _hidden(block: _Block, xy: Array) -> Float[Array, "height count lanes"]:
    """`max(0, w_i . x + b_i)`."""
    d = block.kernel.shape[1]
    terms = [block.kernel[:, j, None, :] * xy[None, j] for j in range(d)]
    total = _total(terms, block.bias[:, None, :])
    return jnp.where(total < 0, 0, total)  # unlike a maximum, which may drop it, this keeps NaN


def _outputs(block: _Block, hidden: Array) -> Float[Array, "count lanes"]:
    terms = [block.head[h][None] * hidden[h] for h in range(len(block.head))]
    return _total(terms, block.offset[None])


def _least(a: Array, b: Array) -> Array:
    """The smaller of the two, NaN where one is."""
    return jnp.where((a < b) | jnp.isnan(a), a, b)


def _flat(f: Callable[[Array, Array], Array], outputs: Array, y: Array) -> Array:
    """A function of outputs `[batch, 1]` and labels `[batch]`, applied to `[count, lanes]` of both."""
    return f(outputs.reshape(-1, 1), y.reshape(-1)).reshape(outputs.shape)


@dataclasses.dataclass(frozen=True)
class _Program:
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

    def gradient(self, block: _Block, xy: Array, weight: Array, live: Array, into: _Block) -> tuple[_Block, Array]:
        """Adds the gradient of `sum_b weight_b loss_b` to `into`; returns it and that sum, `[lanes]`.

        Args:
          block: the weights.
          xy: examples, `[d + 1, count, lanes]`.
          weight: `[count, 1]`.
          live: see `_apart`.
          into: gradient so far.
        """
        count, d = xy.shape[1], self.d
        hidden = _apart(live, _hidden, block, xy)

        def slopes(block: _Block, hidden: Array, xy: Array, weight: Array) -> tuple[Array, Array]:
            outputs = _outputs(block, hidden)
            values, pull = jax.vjp(lambda f: _flat(self.loss.per_example, f, xy[d]), outputs)
            return weight * pull(jnp.ones_like(values))[0], weight * values

        slope, values = _apart(live, slopes, block, hidden, xy, weight)

        def back(head: Array, hidden: Array, slope: Array) -> Array:
            return jnp.where(hidden > 0, head[:, None] * slope[None], 0)

        delta = _apart(live, back, block.head, hidden, slope)
        rows = range(count)
        total = _Block(
            _total([delta[:, None, b] * xy[None, :d, b] for b in rows], into.kernel),
            _total([delta[:, b] for b in rows], into.bias) if self.use_bias else into.bias,
            _total([slope[None, b] * hidden[:, b] for b in rows], into.head),
            _total([slope[b] for b in rows], into.offset) if self.use_bias else into.offset,
        )
        return total, _total([values[b] for b in rows], jnp.zeros_like(into.offset))

    def step(
        self, block: _Block, step: Array, rate: Array, keys: Array, base: Array, table: Array, live: Array
    ) -> tuple[_Block, Array]:
        """One SGD step of every lane; returns the new weights and the mean loss of the mini-batch before it."""
        size = self.batch_size
        number, count = self.chunks(size)
        draws = functools.partial(draw, n=self.n, batch_size=size, order=self.order, count=number * count)
        index = _apart(live, draws, step, keys)
        pick = functools.partial(_examples, n=self.n, d=self.d)
        weights = jnp.where(jnp.arange(number * count) < size, 1 / size, 0).astype(table.dtype)[:, None]
        zero = jax.tree.map(jnp.zeros_like, block)
        if number == 1:
            xy = _apart(live, pick, table, base, index)
            gradient, value = self.gradient(block, xy, weights, live, zero)
        else:

            def add(k: Array, carry: tuple[_Block, Array]) -> tuple[_Block, Array]:
                rows = lax.dynamic_slice_in_dim(index, k * count, count)
                xy = _apart(live, pick, table, base, rows)
                weight = lax.dynamic_slice_in_dim(weights, k * count, count)
                gradient, value = self.gradient(block, xy, weight, live, carry[0])
                return gradient, carry[1] + value

            gradient, value = lax.fori_loop(0, number, add, (zero, jnp.zeros_like(block.offset)))

        def moved(w: Array, g: Array) -> Array:
            return w - rate.reshape((1,) * (w.ndim - 1) + (-1,)) * g

        return jax.tree.map(moved, block, gradient), value

    def look(self, block: _Block, base: Array, table: Array, live: Array) -> tuple[Array, Array]:
        """Mean loss over the full data and smallest margin of every lane (infinity for a loss without margin)."""
        number, count = self.chunks(self.n)

        def add(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            row = k * count + jnp.arange(count, dtype=jnp.int32)[:, None]
            index = jnp.broadcast_to(jnp.minimum(row, self.n - 1), (count, len(block.offset)))
            xy = _apart(live, functools.partial(_examples, n=self.n, d=self.d), table, base, index)
            hidden = _apart(live, _hidden, block, xy)

            def judged(block: _Block, hidden: Array, xy: Array) -> tuple[Array, Array]:
                outputs = _outputs(block, hidden)
                values = jnp.where(row < self.n, _flat(self.loss.per_example, outputs, xy[self.d]), 0)
                margins = (
                    jnp.full_like(values, jnp.inf)
                    if self.loss.margin is None
                    else _flat(self.loss.margin, outputs, xy[self.d])
                )
                return values, margins

            values, margins = _apart(live, judged, block, hidden, xy)
            least = functools.reduce(_least, [margins[b] for b in range(count)], carry[1])
            return _total([values[b] for b in range(count)], carry[0]), least

        start = jnp.zeros_like(block.offset)
        total, least = lax.fori_loop(0, number, add, (start, jnp.full_like(start, jnp.inf)))
        return total / self.n, least

    @functools.cached_property
    def segment(self) -> Callable[..., tuple[_Block, PyTree, Array, Array, Array]]:
        """The jitted `(block, schedule states, rates, keys, base, table, first, length, live)` -> the same two, looks.

        Takes every lane from step `first` by `length` steps, updates its schedule, and looks at the full data.  Lanes
        with rate 0 stay as they are.  Returns weights, schedule states, and per lane whether its schedule wants no
        further step, the full loss, and the smallest margin.
        """

        def segment(
            block: _Block,
            states: PyTree,
            rates: Array,
            keys: Array,
            base: Array,
            table: Array,
            first: Array,
            length: Array,
            live: Array,
        ) -> tuple[_Block, PyTree, Array, Array, Array]:
            def body(k: Array, carry: tuple[_Block, Array]) -> tuple[_Block, Array]:
                now = first + k
                factor = jax.vmap(lambda state: self.schedule.rate(state, now), axis_size=len(rates))(states)
                block, value = self.step(carry[0], now, rates * factor.astype(rates.dtype), keys, base, table, live)
                return block, carry[1] + value

            block, total = lax.fori_loop(0, length, body, (block, jnp.zeros_like(rates)))
            mean = total / jnp.maximum(length, 1).astype(total.dtype)
            states = jax.vmap(self.schedule.update)(states, mean.astype(float))
            stops = jax.vmap(self.schedule.stop, axis_size=len(rates))(states)
            return block, states, stops, *self.look(block, base, table, live)

        # By hand, not by XLA: the permutation draws until all lanes have a place, and must not wait for other devices.
        axes = (_LANES, 0, 0, 1, 0, None, None, None, None)
        return jax.jit(over_devices(segment, self.devices, axes, (_LANES, 0, 0, 0, 0)), donate_argnums=(0, 1))


@functools.lru_cache(maxsize=16)
def _program(
    loss: Loss, schedule: str, settings: tuple[Any, ...], steps: int, batch_size: int, order: Order, use_bias: bool,
    n: int, d: int, devices: tuple[jax.Device, ...],
) -> _Program:  # fmt: skip
    """One program for all studies that need the same, so that it is compiled once."""
    built = SCHEDULES.build(schedule, max_steps=steps, **dict(settings))
    return _Program(loss, built, batch_size or n, order if batch_size else "epochs", use_bias, n, d, devices)


# --- all runs -------------------------------------------------------------------------------------------------------


def _table(datasets: Sequence[Dataset], dtype: Any) -> tuple[np.ndarray, int, int]:
    """All data sets in one flat array, per set the standardised features column by column, then the labels; n, d."""
    require(len(datasets) > 0, "no data set; give at least one.")
    shapes = {d.x.reshape(len(d.x), -1).shape for d in datasets}
    require(len(shapes) == 1, f"the data sets have different sizes {sorted(shapes)}; runs of one study share n and d.")
    ((n, d),) = shapes
    require(n < 2**16, f"{n} examples; hitting studies take at most {2**16 - 1}.")
    parts = []
    for dataset in datasets:
        require(dataset.num_outputs == 1, f"data set {dataset.name!r} has {dataset.num_outputs} outputs; needed: 1.")
        x = np.asarray(standardise(dataset.x, dataset.mean, dataset.std)).reshape(n, -1)
        parts += [x.T.astype(dtype).ravel(), dataset.y.astype(dtype)]
    whole = np.concatenate(parts)
    require(whole.size < 2**31, "the data sets are too large to be indexed by 32-bit integers; give fewer.")
    return whole, n, d


@functools.lru_cache(maxsize=64)
def _initialiser(width: int, d: int, use_bias: bool, init: str) -> Callable[[Array], PyTree]:
    """Keys `[lanes]` -> the initial parameters of that many networks."""
    branch = mlp(hidden=(width,), out=1, use_bias=use_bias, init=init)
    return jax.jit(jax.vmap(lambda key: branch.init(key, jnp.zeros((1, d)))[0]))


def initial_weights(runs: Runs, d: int, spec: SgdSpec) -> Weights:
    """The weights at step 0: those of `mlp(hidden=(width,), out=1)` from each run's key, times its scale."""
    keys, _ = run_keys(runs)
    height = int(runs.width.max())
    dtype = jnp.zeros(0).dtype
    count = len(runs.width)
    weights = Weights(
        np.zeros((count, height, d), dtype),
        np.zeros((count, height), dtype),
        np.zeros((count, height), dtype),
        np.zeros(count, dtype),
    )
    for width in np.unique(runs.width):
        init = _initialiser(int(width), d, spec.use_bias, spec.init)
        chosen = np.flatnonzero(runs.width == width)
        for part in np.split(chosen, range(spec.lanes, len(chosen), spec.lanes)):  # one shape, one program
            lanes = np.resize(part, spec.lanes)
            first, last = jax.tree.map(np.asarray, init(keys[lanes]))
            scale = runs.init_scale[part].astype(dtype)
            m = len(part)
            weights.kernel[part, :width] = first["kernel"][:m] * scale[:, None, None]
            weights.head[part, :width] = last["kernel"][:m, 0] * scale[:, None]
            if spec.use_bias:
                weights.bias[part, :width] = first["bias"][:m] * scale[:, None]
                weights.offset[part] = last["bias"][:m, 0] * scale
    return weights


def full_loss(weights: Weights, runs: Runs, datasets: Sequence[Dataset], loss: Loss) -> np.ndarray:
    """The mean loss of every run over its full data set in float64, `[runs]`; by another route than the training's."""
    result = np.full(len(runs.width), np.nan)
    with jax.enable_x64(True):
        for index in np.unique(runs.data):
            dataset = datasets[int(index)]
            x = np.asarray(standardise(dataset.x, dataset.mean, dataset.std), np.float64).reshape(len(dataset.x), -1)
            y = jnp.asarray(dataset.y, float)
            for k in np.flatnonzero(runs.data == index):
                kernel, bias, head, offset = (np.asarray(part[k], np.float64) for part in weights)
                with np.errstate(over="ignore", invalid="ignore"):
                    f = np.maximum(x @ kernel.T + bias[None], 0) @ head + offset
                result[k] = np.mean(np.asarray(loss.per_example(jnp.asarray(f)[:, None], y)))
    return result


@dataclasses.dataclass
class _Study:
    """All runs on the host, taken forward block by block."""

    runs: Runs
    spec: SgdSpec
    program: _Program
    table: Array
    order_keys: np.ndarray
    weights: Weights
    states: PyTree
    losses: np.ndarray
    steps: np.ndarray
    status: np.ndarray
    step: int = 0

    def tree(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            "weights": self.weights._asdict(),
            "states": self.states,
            "losses": self.losses,
            "steps": self.steps,
            "status": self.status,
        }

    def put(self, tree: dict[str, Any], step: int) -> None:
        self.weights, self.states = Weights(**tree["weights"]), tree["states"]
        self.losses, self.steps, self.status, self.step = tree["losses"], tree["steps"], tree["status"], step

    def blocks(self) -> list[np.ndarray]:
        """The runs under way, packed by width into as few blocks as they fill; tallest first."""
        active = np.flatnonzero(self.status == _RUNNING)
        active = active[np.argsort(self.runs.width[active], kind="stable")]
        return np.split(active, range(self.lanes, len(active), self.lanes))[::-1]

    @property
    def lanes(self) -> int:
        """Of a block, on all devices together."""
        return self.spec.lanes * len(self.program.devices)

    def height(self, chosen: np.ndarray) -> int:
        return _HEIGHTS * -(-int(self.runs.width[chosen].max()) // _HEIGHTS)

    def advance(self, chosen: np.ndarray, first: int, last: int) -> None:
        """Takes the runs of one block from step `first` to `last`; with `first = last = 0`, only looks."""
        m, lanes, put = (
            len(chosen),
            np.resize(chosen, self.lanes),
            functools.partial(place, devices=self.program.devices),
        )
        block = put(self._load(lanes, self.height(chosen)), axes=_LANES)
        states = put(jax.tree.map(lambda leaf: leaf[lanes], self.states), axes=0)
        keys = put(self.order_keys[:, lanes], axes=1)
        size = (self.program.d + 1) * self.program.n
        base = put((self.runs.data[lanes] * size).astype(np.int32), axes=0)
        rates = self.runs.learning_rate[lanes].astype(self.table.dtype)
        status = np.where(np.arange(len(lanes)) < m, _RUNNING, _DIVERGED)  # lanes that only fill the block stand still
        now, live = first, jnp.asarray(True)
        while now == first or (now < last and (status == _RUNNING).any()):
            length = min(self.spec.check_every, last - now)
            going = status == _RUNNING
            moved = (block, states, put(np.where(going, rates, 0), axes=0), keys, base, self.table)
            block, states, stops, full, least = self.program.segment(*moved, jnp.int32(now), jnp.int32(length), live)
            held, mine = chosen[going[:m]], going[:m]
            losses = np.asarray(full)
            if length == 0:
                self.losses[held] = losses[:m, None]
                return
            now += length
            status = np.where(going, self._judge(losses, np.asarray(least), np.asarray(stops)), status)
            self.steps[held] = now
            self.losses[held, -(-now // self.spec.check_every) :] = losses[:m][mine, None]
        self._store(chosen, block, states)
        self.status[chosen] = status[:m]

    def _judge(self, full: np.ndarray, least: np.ndarray, stops: np.ndarray) -> np.ndarray:
        status = np.full(full.shape, _RUNNING)
        status[stops] = _SCHEDULE
        status[full <= self.spec.stop_below] = _BELOW
        tau = self.program.loss.tau
        if self.spec.stop_at_rest and tau is not None:
            status[least >= tau * (1 + _ABSORBED)] = _ZERO
        status[~np.isfinite(full)] = _DIVERGED
        return status

    def _load(self, lanes: np.ndarray, height: int) -> _Block:
        def tall(part: np.ndarray) -> np.ndarray:
            kept = part[lanes][:, :height]
            return np.pad(kept, [(0, 0), (0, height - kept.shape[1])] + [(0, 0)] * (kept.ndim - 2))

        kernel, bias, head, offset = self.weights
        last = (tall(kernel).transpose(1, 2, 0), tall(bias).T, tall(head).T, offset[lanes])
        return _Block(*map(np.ascontiguousarray, last))

    def _store(self, chosen: np.ndarray, block: _Block, states: PyTree) -> None:
        m = len(chosen)
        kernel, bias, head, offset = (np.asarray(part)[..., :m] for part in block)
        top = min(kernel.shape[0], self.weights.kernel.shape[1])
        self.weights.kernel[chosen, :top] = kernel[:top].transpose(2, 0, 1)
        self.weights.bias[chosen, :top] = bias[:top].T
        self.weights.head[chosen, :top] = head[:top].T
        self.weights.offset[chosen] = offset

        def put(leaf: np.ndarray, new: Array) -> None:
            leaf[chosen] = np.asarray(new)[:m]

        jax.tree.map(put, self.states, states)


def _prepare(datasets: Sequence[Dataset], loss: Loss, runs: Runs, spec: SgdSpec) -> _Study:
    """The study at step 0; raises as `train_runs` does."""
    dtype = jnp.zeros(0).dtype
    table, n, d = _table(datasets, dtype)
    for dataset in datasets:
        require(
            dataset.task in loss.tasks,
            f"the loss fits {' and '.join(loss.tasks)} labels, data set {dataset.name!r} has {dataset.task} labels.",
        )
    require(int(runs.data.max()) < len(datasets), f"a run uses data set {runs.data.max()} of {len(datasets)}.")
    require(
        spec.batch_size <= n, f"sgd.batch_size={spec.batch_size} exceeds the {n} examples; use 0 for the full data set."
    )
    devices = local_devices(spec.devices)
    settings = tuple(sorted(spec.schedule.settings.items()))
    program = _program(
        loss, spec.schedule.name, settings, spec.steps, spec.batch_size, spec.order, spec.use_bias, n, d, devices
    )
    count = len(runs.width)
    return _Study(
        runs=runs,
        spec=spec,
        program=program,
        table=place(table, devices, None),
        order_keys=run_keys(runs)[1],
        weights=initial_weights(runs, d, spec),
        states=jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[None], count, axis=0), program.schedule.init()),
        losses=np.full((count, spec.looks + 1), np.nan, dtype),
        steps=np.zeros(count, np.int64),
        status=np.full(count, _RUNNING),
    )


def train_runs(
    datasets: Sequence[Dataset],
    loss: Loss,
    runs: Runs,
    spec: SgdSpec,
    *,
    checkpoints: Path | None = None,
    metrics: Metrics | None = None,
    tolerance: float = 1e-5,
    workers: int | None = None,
) -> Outcome:
    """Trains every run; each one's numbers are a function of its own row of `runs`, its data and the spec only.

    Works in the default float type: float32, or float64 under `jax.enable_x64`.

    Args:
      datasets: of one size; `runs.data` points into them.
      loss: a loss that fits them, with one output.
      runs: see `make_runs`.
      spec: see `SgdSpec`.
      checkpoints: folder; a second call with it goes on from the newest checkpoint.  None: nothing is kept.
      metrics: writer of one line each few segments: runs under way, hits so far, speed.
      tolerance: a run counts as a hit in progress and metrics when its full loss is at most this.
      workers: threads that work on blocks at the same time; None: the number of cores.

    Raises:
      ConfigError: if the loss does not fit a data set, the data sets differ in size or are too large, a run points
        beyond them, the batch exceeds the data, or there are fewer devices than the spec names.
      CheckpointMismatchError: if `checkpoints` holds another study.
    """
    study = _prepare(datasets, loss, runs, spec)
    saver = None if checkpoints is None else Checkpointer(checkpoints)
    try:
        if saver is not None and (restored := saver.restore_latest(study.tree())) is not None:
            study.put(jax.tree.map(np.array, restored.state), restored.step)
        if metrics is not None:
            metrics.truncate_after(study.step if study.step else -1)
        _drive(study, saver, metrics, tolerance, workers or os.cpu_count() or 1)
    finally:
        if saver is not None:
            saver.close()
    return Outcome(
        full_loss(study.weights, runs, datasets, loss), study.losses, study.steps, study.status, study.weights
    )


def _drive(study: _Study, saver: Checkpointer | None, metrics: Metrics | None, tolerance: float, workers: int) -> None:
    """Packs, advances and saves until every run is over."""
    spec, total = study.spec, study.spec.steps * len(study.status)
    x64 = bool(jax.dtypes.canonicalize_dtype(np.float64) == np.float64)

    def work(chosen: np.ndarray, last: int) -> None:
        with jax.enable_x64(x64):  # holds in one thread only
            study.advance(chosen, study.step, last)

    def done() -> int:
        return int(np.where(study.status == _RUNNING, study.step, spec.steps).sum())

    with ThreadPoolExecutor(workers) as pool, Progress(total, "SGD steps", done=done()) as progress:
        if study.step == 0:
            blocks = study.blocks()
            tall = {study.height(chosen): k for k, chosen in enumerate(blocks)}
            order = sorted(range(len(blocks)), key=lambda k: k not in tall.values())  # each program is compiled once
            list(pool.map(lambda k: work(blocks[k], 0), order[: len(tall)]))
            list(pool.map(lambda k: work(blocks[k], 0), order[len(tall) :]))
        saved = time.monotonic()
        while (study.status == _RUNNING).any() and study.step < spec.steps:
            began, blocks = time.monotonic(), study.blocks()
            last = min(study.step + _SEGMENTS * spec.check_every, spec.steps)
            going, before = int((study.status == _RUNNING).sum()), int(study.steps.sum())
            list(pool.map(lambda chosen, last=last: work(chosen, last), blocks))
            study.step = last
            hits = int((study.losses[:, -1] <= tolerance).sum())
            if metrics is not None:
                speed = (int(study.steps.sum()) - before) / (time.monotonic() - began)
                metrics.write(last, running=going, hits=hits, blocks=len(blocks), run_steps_per_second=speed)
            progress.update(done(), f"{hits} hits so far, {int((study.status == _RUNNING).sum())} runs under way")
            over = last >= spec.steps or not (study.status == _RUNNING).any()
            if saver is not None and (over or time.monotonic() - saved > spec.checkpoint_seconds):
                saver.save(last, study.tree())
                saved = time.monotonic()


# --- the global minimum ---------------------------------------------------------------------------------------------


class GroundTruth(NamedTuple):
    """The global minimum of a data set, attained by a multiple of the teacher.

    Attributes:
      loss: mean loss of the rescaled teacher over the full data, in float64: 0 for the hinge; for the squared loss the
        rounding of the labels to float32, about 1e-15.
      scale: the factor on the teacher's output weights.
      smallest_margin: `min y f(x)` before scaling (hinge), or NaN.
      teacher: the rescaled teacher, one of the networks with at least its number of hidden units.
    """

    loss: float
    scale: float
    smallest_margin: float
    teacher: Teacher


def ground_truth(dataset: Dataset, loss: Loss) -> GroundTruth:
    """Shows that the least possible loss, 0, is attained on `synthetic_relu` data, by evaluating the teacher on it.

    For the tau-hinge `c f` with `c = tau / min_i y_i f(x_i)` has all margins at least tau.  A little is added against
    rounding.

    Raises:
      ConfigError: for other data; for a loss other than a hinge on labels of sign or the squared loss on real labels,
        whose least value is not known.
    """
    info = dataset.info
    require(dataset.name == "synthetic_relu", f"data set {dataset.name!r} has no known teacher; use synthetic_relu.")
    sign = info["labels"] == "sign"
    require(
        loss.tau is not None if sign else "regression" in loss.tasks,
        "the global minimum is known for a hinge loss on labels='sign' and for the squared loss on labels='real'.",
    )
    teacher = relu_teacher(**{k: info[k] for k in ("d", "teacher_width", "teacher_scale", "seed")})
    outputs = teacher_outputs(teacher, dataset.x)
    scale, smallest = 1.0, math.nan
    if sign and loss.tau is not None:
        smallest = float((dataset.y.astype(np.float64) * outputs).min())
        require(smallest > 0, f"the teacher does not separate the data (smallest margin {smallest}).")
        scale = loss.tau / smallest * (1 + 1e-9)
    scaled = Teacher(scale * teacher.a, teacher.w)
    weights = Weights(scaled.w[None], np.zeros((1, len(scaled.a))), scaled.a[None], np.zeros(1))
    run = make_runs(len(scaled.a), 0)
    return GroundTruth(float(full_loss(weights, run, [dataset], loss)[0]), scale, smallest, scaled)
