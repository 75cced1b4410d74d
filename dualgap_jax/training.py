"""Stochastic gradient descent from several initialisations at once, with the authors' schedule and exact resume.

The loop runs in segments of `check_every` steps, each one compiled program; all solutions of a group go through one
vmapped program.  Between segments the schedule looks at the mean loss of the segment, metrics are written, and
checkpoints are saved.  Whatever is random at step t is a function of (seed, solution, t), so a resumed run repeats the
uninterrupted one bit for bit.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import logging
import math
import shutil
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from dualgap_jax import identity, seeds
from dualgap_jax.checkpoints import Checkpointer, Place, Restored, Stored, like_template, load, open_branches
from dualgap_jax.config import Component, ConfigError, require
from dualgap_jax.data import Dataset, standardise
from dualgap_jax.evaluation import check_fits
from dualgap_jax.losses import Loss
from dualgap_jax.machine import memory_field
from dualgap_jax.metrics import Metrics, Progress
from dualgap_jax.networks import multi_branch, upcast
from dualgap_jax.networks.sources import InMemory
from dualgap_jax.registry import Table, unknown
from dualgap_jax.sharding import (
    MeshSpec,
    agreed,
    filled,
    is_first_process,
    local_devices,
    meet,
    over_devices,
    place,
)
from dualgap_jax.steps import Batch, Carry, all_finite, begin, example_input, on_device, step, tree_bytes
from dualgap_jax.streaming import StreamedSolver
from dualgap_jax.types import BranchSource, KeyArray, Network, Params, PyTree, State

LearningRateScaling = Literal["branches", "none", "inverse_branches"]
Streaming = Literal["auto", "on", "off"]

_log = logging.getLogger(__name__)

_WORTH_SAYING = 10**8  # bytes of a network from which on a run says beforehand what it will take
_PROBE_BYTES = 2**25  # of parameters and optimiser, on which the time of a step is measured


# --- schedules ------------------------------------------------------------------------------------------------------


class Schedule(NamedTuple):
    """A learning-rate schedule as pure functions of arrays, so that it also runs inside compiled loops.

    Attributes:
      init: `() -> state`.
      rate: `(state, step) -> factor` on the base learning rate.
      update: `(state, loss) -> state` after each segment, from its mean loss.
      stop: `(state) -> bool`: no further step is wanted.
    """

    init: Callable[[], PyTree]
    rate: Callable[[PyTree, Array], Array]
    update: Callable[[PyTree, Array], PyTree]
    stop: Callable[[PyTree], Array]


class PlateauState(NamedTuple):
    """Best mean loss so far, segments since it fell, decays done, and whether to stop."""

    reference: Array
    waited: Array
    decays: Array
    stop: Array


def plateau(
    max_steps: int, factor: float = 0.1, min_delta: float = 1e-5, max_decays: int = 3, patience: int = 1
) -> Schedule:
    """The authors' schedule: when the loss does not fall by `min_delta`, multiply the rate by `factor`; then stop.

    The authors look at the loss every 100 steps and wait for nothing (`patience=1`).  With mini-batches the loss looked
    at is the mean over the segment, and a patience of several segments keeps its noise from ending the run early.

    Args:
      max_steps: not used; the length of the run.
      factor: of the learning rate at each decay, in (0, 1).
      min_delta: the fall below the reference that counts.
      max_decays: number of decays; at the next plateau the run stops.
      patience: number of segments in a row without a fall that make a plateau.
    """
    del max_steps
    require(0 < factor < 1, f"plateau: factor={factor} must lie in (0, 1).")
    require(max_decays >= 0 and patience >= 1, f"plateau: max_decays={max_decays} >= 0, patience={patience} >= 1.")

    def init() -> PlateauState:
        largest = jnp.finfo(jnp.zeros(0, float).dtype).max  # no infinity, which JAX_DEBUG_INFS would refuse
        return PlateauState(jnp.asarray(largest, float), jnp.int32(0), jnp.int32(0), jnp.asarray(False))

    def rate(state: PlateauState, step: Array) -> Array:
        del step
        return factor ** state.decays.astype(float)

    def update(state: PlateauState, loss: Array) -> PlateauState:
        fell = loss < state.reference - min_delta
        waited = jnp.where(fell, 0, state.waited + 1)
        plateaued = waited >= patience
        decays = state.decays + plateaued
        return PlateauState(
            jnp.where(fell, loss, state.reference).astype(state.reference.dtype),
            jnp.where(plateaued, 0, waited),
            jnp.minimum(decays, max_decays),
            state.stop | (decays > max_decays),
        )

    return Schedule(init, rate, update, lambda state: state.stop)


def _keep(state: PyTree, loss: Array) -> PyTree:
    del loss
    return state


def _never(state: PyTree) -> Array:
    del state
    return jnp.asarray(False)


def constant(max_steps: int) -> Schedule:
    """A constant learning rate up to `max_steps`."""
    del max_steps
    return Schedule(lambda: (), lambda _, step: jnp.ones_like(step, float), _keep, _never)


def cosine(max_steps: int, final: float = 0.0, warmup: int = 0) -> Schedule:
    """Linear warm-up over `warmup` steps, then a half cosine down to `final` times the learning rate at `max_steps`."""
    require(0 <= final <= 1, f"cosine: final={final} must lie in [0, 1].")
    require(0 <= warmup <= max_steps, f"cosine: warmup={warmup} must lie between 0 and max_steps={max_steps}.")

    def rate(_: PyTree, step: Array) -> Array:
        rising = (step + 1) / max(warmup, 1)
        phase = jnp.clip((step - warmup) / max(max_steps - warmup, 1), 0, 1)
        falling = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * phase))
        return jnp.where(step < warmup, rising, falling).astype(float)

    return Schedule(lambda: (), rate, _keep, _never)


SCHEDULES: Table[Callable[..., Schedule]] = Table(
    "schedule", {"plateau": plateau, "constant": constant, "cosine": cosine}
)


# --- the specification ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """How solutions are found (Section 5.1: "by running the SGD algorithm ... until the algorithm converges").

    Attributes:
      batch_size: examples a step, drawn without replacement within an epoch; 0 is the full data set.
      max_steps: a run that has not converged by then stops with status 'max_steps'.
      learning_rate: base rate.
      lr_scaling: 'branches' multiplies the rate by I (mean-field: with the mean over branches each branch's gradient
        carries 1/I), 'inverse_branches' divides by I, 'none' leaves it.
      momentum, nesterov: heavy-ball or Nesterov momentum; 0 is plain SGD.
      weight_decay: added to the gradient, times the parameters.
      chain: optax transformations put before momentum, as text: `('clip_by_global_norm(1.0)', 'scale_by_adam()')`.
        They work on the gradient; a whole optimiser (`adam(0.1)`), which brings its own rate and sign, is refused.
      schedule: an entry of `SCHEDULES`.
      check_every: steps in a segment, between two looks of the schedule and two lines of metrics.
      tolerance: a mean loss over a segment below this is status 'converged' (authors: 1e-5).
      checkpoint_seconds: least time between two checkpoints; one is always written at the end.
      streaming: 'on' takes the streamed step, 'off' never does, 'auto' does when memory asks for it; see `train`.
      branch_chunk: branches at a time in the streamed step; 0 chooses.  Results depend on it through rounding only.
    """

    batch_size: int = 128
    max_steps: int = 10_000
    learning_rate: float = 0.1
    lr_scaling: LearningRateScaling = "branches"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    chain: tuple[str, ...] = ()
    schedule: Component = Component("plateau", {"factor": 0.1, "min_delta": 1e-5, "max_decays": 3, "patience": 1})
    check_every: int = 100
    tolerance: float = 1e-5
    checkpoint_seconds: float = 60.0
    streaming: Streaming = "auto"
    branch_chunk: int = 0

    def __post_init__(self) -> None:
        require(self.batch_size >= 0, f"training.batch_size={self.batch_size} must be >= 0 (0: the full data set).")
        require(self.max_steps >= 0, f"training.max_steps={self.max_steps} must be >= 0.")
        require(self.branch_chunk >= 0, f"training.branch_chunk={self.branch_chunk} must be >= 0 (0: chosen).")
        allowed = get_args(Streaming)
        require(self.streaming in allowed, unknown("value of training.streaming:", self.streaming, allowed))
        require(self.check_every >= 1, f"training.check_every={self.check_every} must be >= 1.")
        require(
            0 < self.learning_rate < math.inf,
            f"training.learning_rate={self.learning_rate} must be positive and finite.",
        )
        scalings = get_args(LearningRateScaling)
        require(self.lr_scaling in scalings, unknown("value of training.lr_scaling:", self.lr_scaling, scalings))
        require(0 <= self.momentum < 1, f"training.momentum={self.momentum} must lie in [0, 1).")
        for name in ("weight_decay", "tolerance", "checkpoint_seconds"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"training.{name}={value} must be >= 0 and finite.")


def num_branches(net: Network) -> int:
    """I of a network made by `multi_branch`; 1 of every other, a mixture among them."""
    return net.stacked.num_branches if net.stacked is not None else 1


def scaled_learning_rate(spec: TrainingSpec, num_branches: int) -> float:
    """The rate that the optimiser uses, in units of parameter change per gradient."""
    factor = {"branches": num_branches, "none": 1.0, "inverse_branches": 1.0 / num_branches}[spec.lr_scaling]
    return spec.learning_rate * factor


def _transformation(text: str) -> optax.GradientTransformation:
    """An optax factory call written as text, with literal arguments only."""

    def wrong(why: str) -> ConfigError:
        return ConfigError(
            f"training.chain: {text!r} {why}; write a call with literal arguments,"
            " as in 'clip_by_global_norm(1.0)' or 'scale_by_adam(b1=0.9)'."
        )

    try:
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise TypeError("not a call of one name")
        positional = [ast.literal_eval(a) for a in call.args]
        named = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        made = getattr(optax, call.func.id)(*positional, **named)
        if not isinstance(made, optax.GradientTransformation):
            raise TypeError("not a GradientTransformation")
        probe = jnp.ones(1)
        update, _ = made.update(probe, made.init(probe), probe)
    except (SyntaxError, ValueError, TypeError, AttributeError) as error:
        raise wrong(f"is not an optax transformation of gradients ({error})") from error
    if float(update[0]) < 0:
        raise wrong("turns the gradient round (a whole optimiser brings its own rate and sign; training adds them)")
    return made


def optimizer(spec: TrainingSpec) -> optax.GradientTransformation:
    """Weight decay, the spec's chain, then momentum; the caller multiplies by the learning rate and subtracts.

    Raises:
      ConfigError: for an item of `chain` that is not an optax transformation.
    """
    parts = []
    if spec.weight_decay:
        parts.append(optax.add_decayed_weights(spec.weight_decay))
    parts += [_transformation(text) for text in spec.chain]
    if spec.momentum:
        parts.append(optax.trace(spec.momentum, spec.nesterov))
    return optax.chain(*parts) if parts else optax.identity()


# --- the segment ---------------------------------------------------------------------------------------------------


def make_segment(
    net: Network, loss: Loss, transformation: optax.GradientTransformation, schedule: Schedule
) -> Callable[..., tuple[Carry, Array]]:
    """The compiled loop over a segment, vmapped over solutions.

    Returns:
      A function of `(carry, schedule_state, keys [S], base_rate, data, indices [S, T, batch] or None, first step, T)`
      whose carry leaves lead with `[S, ...]`; gives the new carry and the losses `[S, T]`.  `indices=None` is the full
      batch.
    """

    def one(
        carry: Carry,
        schedule_state: PyTree,
        key: KeyArray,
        indices: Array | None,
        base_rate: Array,
        data: Batch,
        first: Array,
        length: int,
    ) -> tuple[Carry, Array]:
        whole = standardise(data.x, data.mean, data.std) if indices is None else None

        def body(carry: Carry, at: tuple[Array, Array | None]) -> tuple[Carry, Array]:
            now, picked = at
            x = standardise(data.x[picked], data.mean, data.std) if whole is None else whole
            y = data.y if picked is None else data.y[picked]
            rate = base_rate * schedule.rate(schedule_state, now)
            return step(net, loss, transformation, carry, x, y, rate, jax.random.fold_in(key, now))

        return lax.scan(body, carry, (first + jnp.arange(length), indices), length=length)

    @functools.partial(jax.jit, static_argnames="length", donate_argnums=0)
    def segment(
        carry: Carry,
        schedule_state: PyTree,
        keys: Array,
        base_rate: Array,
        data: Batch,
        indices: Array | None,
        first: Array,
        length: int,
    ) -> tuple[Carry, Array]:
        return jax.vmap(lambda c, s, k, i: one(c, s, k, i, base_rate, data, first, length))(
            carry, schedule_state, keys, indices
        )

    return segment


class BatchOrder:
    """The order in which one solution visits the data: a fresh permutation each epoch.

    What a step sees is a function of the key and the step only.  The rest of an epoch that fills no batch is left out.

    Args:
      key: of the permutations.
      num_examples: size of the data set.
      batch_size: examples a step, at most `num_examples`.

    Raises:
      ConfigError: for a batch size outside [1, num_examples].
    """

    def __init__(self, key: KeyArray, num_examples: int, batch_size: int) -> None:
        require(1 <= batch_size <= num_examples, f"batch_size={batch_size} must lie between 1 and {num_examples}.")
        self._key, self._n, self._batch = key, num_examples, batch_size
        self._per_epoch = num_examples // batch_size
        self._epoch: tuple[int, np.ndarray] | None = None

    def indices(self, first: int, length: int) -> np.ndarray:
        """Indices `[length, batch]` of the examples at steps `first, first + 1, ...`."""
        rows = []
        for now in range(first, first + length):
            epoch, place = divmod(now, self._per_epoch)
            if self._epoch is None or self._epoch[0] != epoch:
                order = jax.random.permutation(jax.random.fold_in(self._key, epoch), self._n)
                self._epoch = (epoch, np.asarray(order, np.int32))
            rows.append(self._epoch[1][place * self._batch : (place + 1) * self._batch])
        return np.stack(rows)


# --- solutions ------------------------------------------------------------------------------------------------------


class Solution(NamedTuple):
    """Where one run of SGD ended.

    Attributes:
      params, state: of the network; None when it lies on disk.
      steps: number of steps done.
      status: 'converged' (segment loss below the tolerance), 'plateau' (the schedule gave up), 'max_steps', or
        'diverged' (a loss, an output in training, or in the end a parameter that is not finite).
      batch_loss: mean mini-batch loss over the last segment (NaN when no step was done).
      source: the network on disk, read a few branches at a time; None when it is in memory.
    """

    params: Params
    state: State
    steps: int
    status: str
    batch_loss: float
    source: BranchSource | None = None

    @property
    def network(self) -> BranchSource:
        """The trained network, wherever it is."""
        return self.source if self.source is not None else InMemory(self.params, self.state)


def solution_key(seed: int, index: int) -> KeyArray:
    """The root key of solution `index` of an experiment with this seed.  Raises as `seeds.check` does."""
    return jax.random.fold_in(seeds.key(seed), index)


def memory_available() -> int:
    """Bytes that this process may still take on its first device (host memory on CPU, within its control group)."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    try:
        free = memory_field("/proc/meminfo", "MemAvailable")
    except (OSError, KeyError, ValueError):
        free = 8 * 2**30
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return free


class _Run(NamedTuple):
    """One solution under way.  `carry` and `schedule_state` are those after `steps` steps."""

    solution: int
    keys: Array  # [2]: batch order, noise
    carry: PyTree  # as the engine keeps it; None while `_Trainer` holds it, or when it is on disk
    schedule_state: PyTree
    steps: int
    status: str
    batch_loss: float
    pending: tuple[float, ...] = ()  # losses of the steps since the last look of the schedule
    mark: Mapping[str, Any] = types.MappingProxyType({})  # its identity


def train(
    net: Network,
    loss: Loss,
    dataset: Dataset,
    spec: TrainingSpec,
    *,
    learning_rate: float | None = None,
    seed: int = 0,
    num_solutions: int = 3,
    group_size: int | None = None,
    mesh: MeshSpec | None = None,
    checkpoints: Path | None = None,
    metrics: Metrics | None = None,
    report: Callable[[str], object] | None = None,
) -> list[Solution]:
    """Trains `num_solutions` networks from independent initialisations.

    There are three ways, and the free memory decides (`spec.streaming` and `group_size` override).  Solutions are
    trained together in one vmapped program when four copies of each fit in half of it; else one after another; and
    when four copies of one do not fit either, one after another by the streamed step (`steps.branch_step`), which needs
    little more than the parameters.  On a mesh of several devices the step is always the streamed one.

    With `checkpoints`, progress is saved under `solution_K/`, and a second call goes on from there, in the same way, so
    that its numbers are those of an uninterrupted run bit for bit.  A network trained by the streamed step is then left
    on disk: `Solution.source` reads it.  A mesh may change between calls; results then agree to rounding.  Network,
    loss, data, optimiser, rate, schedule and seed are compared with those that the checkpoints were written with;
    `max_steps` may be longer than it was, unless the schedule depends on it.

    Args:
      net: the network; see `multi_branch`.
      loss: a loss that fits `dataset.task`.
      dataset: the training set.
      spec: how to train.
      learning_rate: the rate after scaling; None is `scaled_learning_rate(spec, num_branches(net))`.
      seed: of initialisations, orders and dropout.
      num_solutions: number of solutions, at least 1.
      group_size: number of solutions in one program; results depend on it through rounding only.
      mesh: devices that share the branches and the batches, or the solutions; None: the solutions that are trained
        together share the devices of this process.
      checkpoints: folder, or None.  With several processes only the first one writes there, and all must see it.
      metrics: writer of one line a segment and solution, or None.
      report: called with lines that say how training will go, before it starts.

    Raises:
      ConfigError: if the loss does not fit the data set, the batch is larger than it, `num_solutions`, `group_size` or
        `learning_rate` is not positive, or streamed training is asked for and cannot be (see `StreamedSolver`).
      IdentityError: if `checkpoints` holds solutions of another run; the message names what differs.
    """
    base_rate = scaled_learning_rate(spec, num_branches(net)) if learning_rate is None else learning_rate
    require(0 < base_rate < math.inf, f"learning_rate={base_rate} must be positive and finite.")
    require(num_solutions >= 1, f"num_solutions={num_solutions} must be at least 1.")
    require(group_size is None or group_size >= 1, f"group_size={group_size} must be at least 1, or None.")
    seeds.check(seed)
    check_fits(loss, dataset)
    require(
        spec.batch_size <= len(dataset.y),
        f"training.batch_size={spec.batch_size} exceeds the {len(dataset.y)} examples; use 0 for the full data set.",
    )
    transformation = optimizer(spec)
    schedule = SCHEDULES.build(spec.schedule.name, max_steps=spec.max_steps, **spec.schedule.settings)
    mesh = mesh or MeshSpec()
    several = mesh.size > 1 or jax.process_count() > 1
    require(
        jax.process_count() == 1 or checkpoints is not None,
        "several processes hand a network on through its checkpoints; give a folder that all of them see.",
    )
    require(
        not (several and spec.streaming == "off"),
        "training.streaming='off' trains on one device; use 'auto' with a mesh of several.",
    )
    marks: list[dict[str, Any]] = [{}] * num_solutions
    newest: list[Restored | None] = [None] * num_solutions
    if checkpoints is not None:
        run = _identity(net, loss, dataset, transformation, schedule, spec, base_rate, seed)
        marks = [{**run, "solution": i} for i in range(num_solutions)]
        newest = [_newest(checkpoints / f"solution_{i}", mark, spec) for i, mark in enumerate(marks)]
    may_stream = spec.streaming == "auto" and net.stacked is not None
    say = report or (lambda line: None)
    if spec.streaming == "on" or several:
        choice = _Choice(1, True)
    else:
        one = 4 * tree_bytes(jax.eval_shape(functools.partial(_start, net, dataset, transformation), jax.random.key(0)))
        choice = _choose(one, num_solutions, group_size, may_stream, newest)
    engine: _Together | _Streamed
    if choice.streamed:
        solver = StreamedSolver(net, loss, transformation, dataset, spec.batch_size, mesh=mesh, chunk=spec.branch_chunk)
        engine = _Streamed(solver, schedule, on_disk=checkpoints is not None)
    else:
        devices = local_devices(min(choice.group_size, num_solutions, mesh.seed or jax.local_device_count()))
        engine = _Together(net, loss, transformation, schedule, dataset, devices, choice.group_size)
    trainer = _Trainer(
        engine=engine,
        schedule=schedule,
        update=jax.jit(jax.vmap(schedule.update)),
        spec=spec,
        base_rate=base_rate,
        num_examples=len(dataset.y),
        metrics=metrics,
        record={"group_size": choice.group_size, "streamed": choice.streamed},
    )
    groups = [range(i, min(i + choice.group_size, num_solutions)) for i in range(0, num_solutions, choice.group_size)]
    # Before any parameters are there: compiling what is measured takes memory that is given back.
    all_over = all(_is_over(found, spec) for found in newest)
    if not agreed(all_over) and (plan := engine.plan(spec, num_solutions, checkpoints)):
        say(plan)
    solutions: list[Solution] = []
    for group in groups:
        with contextlib.ExitStack() as stack:
            savers: dict[int, Checkpointer] = {}
            if checkpoints is not None and is_first_process():
                savers = {i: stack.enter_context(Checkpointer(checkpoints / f"solution_{i}")) for i in group}
            keys = {i: jax.random.split(solution_key(seed, i), 3) for i in group}
            runs = {
                i: _begin(i, keys[i], engine, schedule, checkpoints, savers.get(i), metrics, spec, newest[i], marks[i])
                for i in group
            }
            found = trainer.run(runs, savers)
        if isinstance(engine, _Streamed) and checkpoints is not None:
            meet("the checkpoints are written")
            sources = (open_branches(checkpoints / f"solution_{i}", engine.shapes()) for i in group)
            found = [s._replace(source=source) for s, source in zip(found, sources, strict=True)]
        solutions += found
    return solutions


class _Choice(NamedTuple):
    """How many solutions in one program, and whether by the streamed step."""

    group_size: int
    streamed: bool


def _identity(
    net: Network,
    loss: Loss,
    dataset: Dataset,
    transformation: optax.GradientTransformation,
    schedule: Schedule,
    spec: TrainingSpec,
    base_rate: float,
    seed: int,
) -> dict[str, Any]:
    """What the solutions of a run depend on, but for rounding."""
    example, key = example_input(dataset), jax.random.key(0)
    carry = jax.eval_shape(functools.partial(_start, net, dataset, transformation), key)
    x = jax.ShapeDtypeStruct((2, *example.shape[1:]), example.dtype)
    y = jax.ShapeDtypeStruct((2,), jnp.asarray(dataset.y[:1]).dtype)

    def outputs(params: Params, state: State, x: Array, key: KeyArray) -> tuple[Array, State]:
        return net.apply(params, state, x, key=key, train=True)

    made, _ = jax.eval_shape(outputs, carry.params, carry.state, x, key)
    weights = upcast(carry.params)
    schedule_state, now = schedule.init(), jnp.asarray(0)

    def scheduled(state: PyTree, now: Array, loss: Array) -> PyTree:
        return schedule.init(), schedule.rate(state, now), schedule.update(state, loss), schedule.stop(state)

    return {
        "network": identity.combined(
            identity.function_digest(net.init, key, example),
            identity.function_digest(outputs, carry.params, carry.state, x, key, derivative=True),
        ),
        "loss": identity.function_digest(loss.per_example, made, y, derivative=True),
        "data": identity.arrays_digest(dataset.x, dataset.y, dataset.mean, dataset.std),
        "optimiser": identity.combined(
            identity.function_digest(transformation.init, weights),
            identity.function_digest(transformation.update, weights, carry.opt_state, weights),
        ),
        "learning rate": base_rate,
        "schedule": identity.function_digest(scheduled, schedule_state, now, jnp.asarray(0.0, float)),
        "batch size": spec.batch_size,
        "interval of the schedule's looks": spec.check_every,
        "tolerance": spec.tolerance,
        "seed": seeds.check(seed),
        **identity.versions(),
    }


def _choose(
    one: int, num_solutions: int, group_size: int | None, may_stream: bool, newest: Sequence[Restored | None]
) -> _Choice:
    """How to train, by the free memory; training that goes on keeps to what it was begun with, if that fits.

    Args:
      one: bytes that one solution needs when it is not streamed.
      num_solutions: number of solutions.
      group_size: asked for, or None.
      may_stream: whether the streamed step may be used.
      newest: a checkpoint of each solution, or None; they keep the choice.
    """
    if group_size is not None:
        return _Choice(group_size, False)
    free = memory_available()
    for found in filter(None, newest):
        begun = _Choice(found.meta["group_size"], found.meta["streamed"])
        fits = begun.group_size == 1 or one * begun.group_size < free
        if may_stream if begun.streamed else fits:
            return begun
    return _Choice(num_solutions if one * num_solutions < free / 2 else 1, may_stream and one > free / 2)


def _start(net: Network, dataset: Dataset, transformation: optax.GradientTransformation, key: KeyArray) -> Carry:
    return begin(transformation, *net.init(key, example_input(dataset)))


class _Together:
    """Several solutions in one vmapped program, a segment a call."""

    on_disk = False
    stride: int | None = None

    def __init__(
        self,
        net: Network,
        loss: Loss,
        transformation: optax.GradientTransformation,
        schedule: Schedule,
        dataset: Dataset,
        devices: Sequence[jax.Device],
        group_size: int,
    ) -> None:
        self.start = jax.jit(functools.partial(_start, net, dataset, transformation))
        self._segment = make_segment(net, loss, transformation, schedule)
        self._seconds = functools.partial(_seconds_per_step, net, loss, transformation, schedule, dataset)
        self._devices, self._group_size = devices, group_size
        self._data = place(on_device(dataset), devices, None)
        self._programs: dict[int, Callable[..., tuple[Carry, Array]]] = {}  # by the length of a segment

    def template(self, key: KeyArray) -> Carry:
        return jax.eval_shape(self.start, key)

    place_leaf = None  # of a checkpoint: where JAX puts it

    def plan(self, spec: TrainingSpec, num_solutions: int, checkpoints: Path | None) -> str:
        del checkpoints
        one = tree_bytes(self.template(jax.random.key(0)))
        if one < _WORTH_SAYING:
            return ""
        together = min(num_solutions, self._group_size)
        how = (
            "together"
            if together == num_solutions
            else "one after another"
            if together == 1
            else f"{together} at a time"
        )
        free = f"available: {_size(memory_available())}"
        lines = [
            f"training: {num_solutions} solutions, {how}",
            f"  memory (estimate): {_size(4 * one)} a solution = {_size(4 * one * together)}; {free}",
        ]
        if (seconds := self._seconds(spec.batch_size)) is not None:
            lines.append(_time_line(seconds, spec, num_solutions, len(self._devices)))
        return "\n".join(lines)

    def join(self, carries: Sequence[Carry]) -> Carry:
        lanes = filled(len(carries), self._devices)
        return place(_stack([carries[i] for i in lanes]), self._devices, 0)

    def part(self, carry: Carry, lane: int) -> Carry:
        if len(self._devices) == 1:
            return _item(carry, lane)
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf[lane])), carry)  # where everything else is

    def stored(self, carry: Carry, lane: int) -> Carry:
        return self.part(carry, lane)

    def network(self, carry: Carry) -> tuple[Params, State]:
        return carry.params, carry.state

    def is_finite(self, carry: Carry, lane: int) -> bool:
        return bool(all_finite(_item((carry.params, carry.state), lane)))

    def advance(
        self,
        carry: Carry,
        schedule_state: PyTree,
        keys: Array,
        base_rate: float,
        indices: np.ndarray | None,
        first: int,
        length: int,
    ) -> tuple[Carry, np.ndarray]:
        picked = jnp.asarray(indices) if indices is not None else None
        if len(self._devices) == 1:
            carry, losses = self._segment(carry, schedule_state, keys, base_rate, self._data, picked, first, length)
            return carry, np.asarray(losses, np.float64)
        count = len(keys)
        lanes = filled(count, self._devices)
        words = jax.random.key_data(keys)
        mine = jax.tree.map(lambda a: np.asarray(a)[lanes], (schedule_state, words, picked))
        carry, losses = self._program(length)(
            carry, *place(mine, self._devices, 0), jnp.asarray(base_rate, float), self._data, jnp.asarray(first)
        )
        return carry, np.asarray(losses, np.float64)[:count]

    def _program(self, length: int) -> Callable[..., tuple[Carry, Array]]:
        """The segment with its lanes shared out over the devices."""
        if length not in self._programs:

            def segment(
                carry: Carry, states: PyTree, words: Array, picked: PyTree, rate: Array, data: Batch, first: Array
            ) -> tuple[Carry, Array]:
                keys = jax.random.wrap_key_data(words)
                return self._segment(carry, states, keys, rate, data, picked, first, length)

            shared = over_devices(segment, self._devices, (0, 0, 0, 0, None, None, None), 0)
            self._programs[length] = jax.jit(shared, donate_argnums=0)
        return self._programs[length]


class _Streamed:
    """One solution by the streamed step, a step a call."""

    stride: int | None = 1

    def __init__(self, solver: StreamedSolver, schedule: Schedule, on_disk: bool) -> None:
        self._solver, self.on_disk = solver, on_disk
        self._rate = jax.jit(schedule.rate)
        self.start = solver.start
        self.place_leaf = solver.place

    def template(self, key: KeyArray) -> Carry:
        del key
        return self._solver.restorable()

    def shapes(self) -> tuple[Params, State]:
        template = self._solver.template
        return template.params, template.state

    def plan(self, spec: TrainingSpec, num_solutions: int, checkpoints: Path | None) -> str:
        return _plan(self._solver, spec, num_solutions, checkpoints)

    def join(self, carries: Sequence[Carry]) -> Carry:
        (carry,) = carries
        return carry

    def part(self, carry: Carry, lane: int) -> Carry | None:
        del lane
        return None if self.on_disk else carry

    def stored(self, carry: Carry, lane: int) -> Carry:
        del lane
        return self._solver.stored(carry)

    def network(self, carry: Carry | None) -> tuple[Params, State]:
        return (None, None) if carry is None or self.on_disk else self._solver.network(carry)

    def is_finite(self, carry: Carry, lane: int) -> bool:
        del lane
        return bool(np.asarray(all_finite((carry.params, carry.state))))

    def advance(
        self,
        carry: Carry,
        schedule_state: PyTree,
        keys: Array,
        base_rate: float,
        indices: np.ndarray | None,
        first: int,
        length: int,
    ) -> tuple[Carry, np.ndarray]:
        losses = []
        for t in range(length):
            rate = base_rate * self._rate(_item(schedule_state, 0), jnp.asarray(first + t))
            picked = indices[0, t] if indices is not None else None
            carry, value = self._solver.step(carry, picked, rate, keys[0], first + t)
            losses.append(value)
        return carry, np.asarray([losses], np.float64)


def _plan(solver: StreamedSolver, spec: TrainingSpec, num_solutions: int, checkpoints: Path | None) -> str:
    """What a streamed run will take, as text; all numbers are estimates."""
    e = solver.estimate()
    layout = solver.layout
    parts = {
        "parameters": e.parameters,
        "optimiser": e.optimizer,
        "kept pre-activations and one chunk": e.temporaries,
        "data": e.data,
    }
    memory = " + ".join(f"{_size(size)} {name}" for name, size in parts.items() if size)
    where = "" if layout.shards == 1 else f" on each of {layout.shards} devices along 'branch'"
    lines = [
        f"training: streamed, {layout.slots:,} branches{where}, {solver.chunk} at a time, one solution after another",
        f"  memory (estimate): {memory} = {_size(e.memory)}; available: {_size(memory_available())}",
        _time_line(e.seconds_per_step, spec, num_solutions),
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


def _time_line(seconds: float, spec: TrainingSpec, num_solutions: int, devices: int = 1) -> str:
    """What the steps will take, where solutions are shared out over some devices."""
    total = seconds * spec.max_steps * -(-num_solutions // devices)
    steps = f"at most {spec.max_steps:,} steps x {num_solutions} solutions"
    shared = f" on {devices} devices" if devices > 1 else ""
    return f"  time (estimate): {seconds:.3g} s a step of one solution; {steps}{shared} = {_duration(total)}"


def _seconds_per_step(
    net: Network,
    loss: Loss,
    transformation: optax.GradientTransformation,
    schedule: Schedule,
    dataset: Dataset,
    batch_size: int,
) -> float | None:
    """Measured on a network of a few of the branches, and scaled; None for a network that is no sum of branches."""
    if net.stacked is None:
        return None
    start = functools.partial(_start, net, dataset, transformation)
    one = tree_bytes(jax.eval_shape(start, jax.random.key(0))) / net.stacked.num_branches
    count = int(min(max(_PROBE_BYTES // one, 1), net.stacked.num_branches))
    few = multi_branch(net.stacked.branch, count)
    segment = make_segment(few, loss, transformation, schedule)
    key = jax.random.key(0)
    carry, state = _stack([_start(few, dataset, transformation, key)]), _stack([schedule.init()])
    batch = batch_size or len(dataset.y)
    data = Batch(*map(jnp.asarray, (dataset.x[:batch], dataset.y[:batch], dataset.mean, dataset.std)))
    picked = jnp.arange(batch)[None, None] if batch_size else None
    times = []
    for now in range(4):
        began = time.monotonic()
        carry, _ = jax.block_until_ready(segment(carry, state, key[None], 1e-3, data, picked, now, 1))
        times.append(time.monotonic() - began)
    return float(np.median(times[1:])) * net.stacked.num_branches / count  # the first compiles


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 5400
        else f"{seconds / 60:.1f} min"
        if seconds >= 90
        else f"{seconds:.0f} s"
    )


def _begin(
    solution: int,
    keys: Array,
    engine: _Together | _Streamed,
    schedule: Schedule,
    checkpoints: Path | None,
    saver: Checkpointer | None,
    metrics: Metrics | None,
    spec: TrainingSpec,
    newest: Restored | None,
    mark: dict[str, Any],
) -> _Run:
    """A run at its first step, or at its newest checkpoint; a network that is trained and stays on disk is not held."""
    restored = None
    if checkpoints is not None:
        folder = checkpoints / f"solution_{solution}"
        template = {"carry": engine.template(keys[0]), "schedule": schedule.init(), "keys": keys[1:]}

        def restore(place_leaf: Place | None) -> Restored | None:
            if saver is not None:
                return saver.restore_latest(template, place=place_leaf)
            with contextlib.suppress(FileNotFoundError):
                return load(folder, template, place=place_leaf)
            return None

        if saver is None:
            meet("the first process has looked at the checkpoints")
        if engine.on_disk and _is_over(newest, spec):
            restored = restore(_verified)
        if not _is_over(restored, spec):
            restored = restore(engine.place_leaf)
        if saver is not None:
            meet("the first process has looked at the checkpoints")
    if metrics is not None:
        metrics.truncate_after(-1 if restored is None else restored.step, solution=solution)
    if restored is None:
        start = engine.start(keys[0])
        return _Run(solution, keys[1:], start, schedule.init(), 0, "running", float("nan"), mark=mark)
    saved, meta = restored.state, restored.meta
    return _Run(
        solution,
        saved["keys"],
        saved["carry"],
        saved["schedule"],
        restored.step,
        meta["status"],
        float(meta["batch_loss"]),
        tuple(meta["pending"]),
        mark,
    )


def _newest(folder: Path, mark: Mapping[str, Any], spec: TrainingSpec) -> Restored | None:
    """The newest checkpoint without its leaves, which are not read; None where there is none.

    Raises:
      IdentityError: if it is of another run, or of more steps than are wanted.
    """
    try:
        found = load(folder, place=lambda leaf, stored: None)
    except FileNotFoundError:
        return None
    identity.require_same(found.meta.get("identity"), mark, f"the folder {folder}")
    if found.step > spec.max_steps:
        raise identity.IdentityError(
            f"the folder {folder} holds another run: it stands at step {found.step} and max_steps is {spec.max_steps};"
            " give another folder, or ask for as many steps."
        )
    for name, now in identity.versions().items():
        if (then := found.meta["identity"][name]) != now:
            _log.warning("%s was written under %s %s and goes on under %s", folder, name, then, now)
    return found


def _has_steps_to_do(status: str, steps: int, spec: TrainingSpec) -> bool:
    return status == "running" and steps < spec.max_steps


def _is_over(restored: Restored | None, spec: TrainingSpec) -> bool:
    """Whether a checkpoint is the end of its run."""
    if restored is None:
        return False
    return not _has_steps_to_do(restored.meta.get("status", "running"), restored.step, spec)


def _verified(template: Any, stored: Stored) -> Any:
    """Reads a leaf of a checkpoint; what is large, the carry, is dropped."""
    if not stored.name.startswith("carry/"):
        return like_template(template, stored)
    stored.verify()
    return None


def _stack(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _item(tree: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], tree)


@dataclasses.dataclass
class _Trainer:
    """Runs groups of solutions to their ends, segment by segment.

    At each step those that are still under way go through one program.  After a kill between two checkpoints some stand
    further on than others; then those ahead ride along, their results unused, while the others catch up: a program for
    fewer solutions may round otherwise, and a resumed run must not differ from an uninterrupted one.
    """

    engine: _Together | _Streamed
    schedule: Schedule
    update: Callable[[PyTree, Array], PyTree]
    spec: TrainingSpec
    base_rate: float
    num_examples: int
    metrics: Metrics | None
    record: Mapping[str, Any]  # what a checkpoint keeps of the way of training

    def run(self, runs: dict[int, _Run], savers: Mapping[int, Checkpointer]) -> list[Solution]:
        """Takes a group to its end; `runs` holds one entry a solution and is brought up to date in place."""
        orders = {
            i: BatchOrder(r.keys[0], self.num_examples, self.spec.batch_size)
            for i, r in runs.items()
            if self.spec.batch_size
        }
        done = min(r.steps for r in runs.values())
        label = "training" if len(runs) > 1 else f"solution {next(iter(runs))}"
        with Progress(self.spec.max_steps, label, done=done) as progress:
            while standing := [r.steps for r in runs.values() if self.is_under_way(r)]:
                first = min(standing)
                together = [
                    i for i, r in runs.items() if r.steps > first or (r.steps == first and self.is_under_way(r))
                ]
                limit = min([r.steps for r in runs.values() if r.steps > first], default=self.spec.max_steps)
                self._advance(runs, together, min(limit, self.spec.max_steps), orders, savers, progress)
        return [
            Solution(
                *self.engine.network(r.carry),
                r.steps,
                "max_steps" if r.status == "running" else r.status,
                r.batch_loss,
            )
            for r in runs.values()
        ]

    def is_under_way(self, run: _Run) -> bool:
        """Whether a run has steps to do."""
        return _has_steps_to_do(run.status, run.steps, self.spec)

    def _advance(
        self,
        runs: dict[int, _Run],
        together: Sequence[int],
        limit: int,
        orders: Mapping[int, BatchOrder],
        savers: Mapping[int, Checkpointer],
        progress: Progress,
    ) -> None:
        """Takes the runs that stand furthest back forward together, until one of them stops or the limit is reached.

        Args:
          runs: the group; the runs that move are replaced.
          together: the solutions in the program, in order: those that move, and those ahead that ride along.
          limit: the step to stop at.
          orders: one a solution; none for the full batch.
          savers: one a solution; none without checkpoints, or when another process writes.
          progress: the line on the terminal.
        """
        first = min(runs[i].steps for i in together)
        moving = {i: lane for lane, i in enumerate(together) if runs[i].steps == first}
        carry = self.engine.join([runs[i].carry for i in together])
        schedule_state = _stack([runs[i].schedule_state for i in together])
        noise_keys = jnp.stack([runs[i].keys[1] for i in together])
        done = len(runs[next(iter(moving))].pending)  # of those that ride along nothing is looked at
        pending = np.asarray([runs[i].pending if i in moving else [0.0] * done for i in together], np.float64)
        for i in moving:
            runs[i] = runs[i]._replace(carry=None)  # the stack is the only copy now
        saved_at, save_seconds = time.monotonic(), 0.0
        taken, seconds = 0, 0.0  # steps since the last look, and their time
        over = False
        while not over:
            left = min(self.spec.check_every - pending.shape[1], limit - first)
            length = min(self.engine.stride or left, left)
            indices = np.stack([orders[i].indices(first, length) for i in together]) if orders else None
            began = time.monotonic()
            carry, losses = self.engine.advance(
                carry, schedule_state, noise_keys, self.base_rate, indices, first, length
            )
            taken, seconds = taken + length, seconds + time.monotonic() - began
            first += length
            pending = np.concatenate([pending, losses], axis=1)
            means = pending.mean(axis=1)
            progress.update(first, f"loss {' '.join(f'{means[lane]:.3g}' for lane in moving.values())}")
            looked = pending.shape[1] == self.spec.check_every or first >= limit or not np.isfinite(means).all()
            if looked:
                start = first - pending.shape[1]
                rates = {i: self._rate(_item(schedule_state, lane), start) for i, lane in moving.items()}
                speed, taken, seconds = taken / seconds, 0, 0.0
                schedule_state = self.update(schedule_state, jnp.asarray(means, float))
                pending = pending[:, :0]
            for i, lane in moving.items():
                loss = float(means[lane])
                status = self._status(loss, _item(schedule_state, lane)) if looked else "running"
                if not _has_steps_to_do(status, first, self.spec) and not self.engine.is_finite(carry, lane):
                    status = "diverged"
                runs[i] = runs[i]._replace(
                    steps=first, status=status, batch_loss=loss, pending=tuple(map(float, pending[lane]))
                )
                if looked and self.metrics is not None:
                    self.metrics.write(
                        first,
                        solution=i,
                        loss=loss,
                        learning_rate=rates[i],
                        steps_per_second=speed,
                        status=status,
                    )
            over = first >= limit or any(runs[i].status != "running" for i in moving)
            # Saving takes at most a tenth of the time.
            due = time.monotonic() - saved_at > max(self.spec.checkpoint_seconds, 10 * save_seconds)
            if jax.process_count() > 1:
                due = looked and agreed(due)  # a save has a part for each process
            if over or due:
                began = time.monotonic()
                self._save(runs, moving, savers, carry, schedule_state)
                saved_at = time.monotonic()
                save_seconds = saved_at - began
        for i, lane in moving.items():
            runs[i] = runs[i]._replace(carry=self.engine.part(carry, lane), schedule_state=_item(schedule_state, lane))

    def _rate(self, schedule_state: PyTree, step: int) -> float:
        return float(self.base_rate * self.schedule.rate(schedule_state, jnp.asarray(step)))

    def _status(self, mean_loss: float, schedule_state: PyTree) -> str:
        if not np.isfinite(mean_loss):
            return "diverged"
        if mean_loss < self.spec.tolerance:
            return "converged"
        return "plateau" if bool(self.schedule.stop(schedule_state)) else "running"

    def _save(
        self,
        runs: Mapping[int, _Run],
        moving: Mapping[int, int],
        savers: Mapping[int, Checkpointer],
        carry: Carry,
        schedule_state: PyTree,
    ) -> None:
        for i, lane in moving.items():
            if not savers and not self.engine.on_disk:
                continue
            stored = self.engine.stored(carry, lane)  # all processes have a part in this
            if i in savers:
                state = {"carry": stored, "schedule": _item(schedule_state, lane), "keys": runs[i].keys}
                meta = {
                    "status": runs[i].status,
                    "batch_loss": runs[i].batch_loss,
                    "pending": runs[i].pending,
                    "identity": runs[i].mark,
                    **self.record,
                }
                savers[i].save(runs[i].steps, state, meta)
