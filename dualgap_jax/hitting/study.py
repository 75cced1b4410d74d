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
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualgap_jax.checkpoints import Checkpointer
from dualgap_jax.config import require
from dualgap_jax.data import Dataset, as_dataset
from dualgap_jax.files import jsonable
from dualgap_jax.hitting.block import LANES, Block, Program, program_for
from dualgap_jax.hitting.random import run_keys
from dualgap_jax.hitting.runs import BELOW, DIVERGED, RUNNING, SCHEDULE, ZERO, Outcome, Runs, SgdSpec, Weights
from dualgap_jax.hitting.weights import examples_table, full_loss, initial_weights
from dualgap_jax.identity import arrays_digest, function_digest, require_same, versions
from dualgap_jax.losses import Loss, as_loss
from dualgap_jax.metrics import Metrics
from dualgap_jax.sharding import local_devices, share_out
from dualgap_jax.terminal import COMPILING, Progress
from dualgap_jax.types import PyTree

_HEIGHTS = 3  # block heights are multiples of this, so that few programs are compiled
_SEGMENTS = 5  # segments between two packings
_ABSORBED = 1e-5  # how far beyond tau, relatively, all margins must lie for a run to be called at rest


@dataclasses.dataclass
class Study:
    """All runs on the host, taken forward block by block."""

    runs: Runs
    spec: SgdSpec
    program: Program
    table: Array
    order_keys: np.ndarray
    weights: Weights
    states: PyTree
    losses: np.ndarray
    steps: np.ndarray
    status: np.ndarray
    identity: dict[str, Any]
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
        active = np.flatnonzero(self.status == RUNNING)
        active = active[np.argsort(self.runs.width[active], kind="stable")]
        return np.split(active, range(self.lanes, len(active), self.lanes))[::-1]

    @property
    def lanes(self) -> int:
        """Of a block, on all devices together."""
        devices = self.program.devices
        return self.spec.lanes_on(devices[0].platform) * len(devices)

    def height(self, chosen: np.ndarray) -> int:
        return _HEIGHTS * -(-int(self.runs.width[chosen].max()) // _HEIGHTS)

    def advance(self, chosen: np.ndarray, first: int, last: int) -> None:
        """Takes the runs of one block from step `first` to `last`; with `first = last = 0`, only looks."""
        m, lanes, put = (
            len(chosen),
            np.resize(chosen, self.lanes),
            functools.partial(share_out, devices=self.program.devices),
        )
        block = put(self._load(lanes, self.height(chosen)), axes=LANES)
        states = put(jax.tree.map(lambda leaf: leaf[lanes], self.states), axes=0)
        keys = put(self.order_keys[:, lanes], axes=1)
        size = (self.program.d + 1) * self.program.n
        base = put((self.runs.data[lanes] * size).astype(np.int32), axes=0)
        rates = self.runs.learning_rate[lanes].astype(self.table.dtype)
        status = np.where(np.arange(len(lanes)) < m, RUNNING, DIVERGED)  # lanes that only fill the block stand still
        now, live = first, jnp.asarray(True)
        while now == first or (now < last and (status == RUNNING).any()):
            length = min(self.spec.check_every, last - now)
            going = status == RUNNING
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
        status = np.full(full.shape, RUNNING)
        status[stops] = SCHEDULE
        status[full <= self.spec.stop_below] = BELOW
        tau = self.program.loss.tau
        if self.spec.stop_at_rest and tau is not None:
            status[least >= tau * (1 + _ABSORBED)] = ZERO
        status[~np.isfinite(full)] = DIVERGED
        return status

    def _load(self, lanes: np.ndarray, height: int) -> Block:
        def tall(part: np.ndarray) -> np.ndarray:
            kept = part[lanes][:, :height]
            return np.pad(kept, [(0, 0), (0, height - kept.shape[1])] + [(0, 0)] * (kept.ndim - 2))

        kernel, bias, head, offset = self.weights
        last = (tall(kernel).transpose(1, 2, 0), tall(bias).T, tall(head).T, offset[lanes])
        return Block(*map(np.ascontiguousarray, last))

    def _store(self, chosen: np.ndarray, block: Block, states: PyTree) -> None:
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


def prepare(datasets: Sequence[Dataset], loss: Loss, runs: Runs, spec: SgdSpec) -> Study:
    """The study at step 0; raises as `train_runs` does."""
    dtype = jnp.zeros(0).dtype
    table, n, d = examples_table(datasets, dtype)
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
    program = program_for(
        loss, spec.schedule.name, settings, spec.steps, spec.batch_size, spec.order, spec.use_bias, n, d, devices
    )
    count = len(runs.width)
    return Study(
        runs=runs,
        spec=spec,
        program=program,
        table=share_out(table, devices, None),
        order_keys=run_keys(runs)[1],
        weights=initial_weights(runs, d, spec),
        states=jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[None], count, axis=0), program.schedule.init()),
        losses=np.full((count, spec.looks + 1), np.nan, dtype),
        steps=np.zeros(count, np.int64),
        status=np.full(count, RUNNING),
        identity=_identity(table, loss, runs, spec),
    )


def _identity(table: np.ndarray, loss: Loss, runs: Runs, spec: SgdSpec) -> dict[str, Any]:
    """What the numbers of a study depend on; how its runs are packed is no part of it."""
    settings = jsonable(spec)
    for name in ("lanes", "devices", "checkpoint_seconds"):
        del settings[name]
    shape = jax.ShapeDtypeStruct((1, 1), table.dtype), jax.ShapeDtypeStruct((1,), table.dtype)
    return {
        "data": arrays_digest(table),
        "loss": function_digest(loss.per_example, *shape, derivative=True),
        "list of runs": arrays_digest(runs._asdict()),
        "training": settings,
        **versions(),
    }


def train_runs(
    datasets: Sequence[Any],
    loss: Any,
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
      datasets: of one size, or pairs of arrays; `runs.data` points into them.
      loss: a loss that fits them, with one output, or a plain function; see `losses.as_loss`.
      runs: see `make_runs`.
      spec: see `SgdSpec`.
      checkpoints: folder; a second call with it goes on from the newest checkpoint.  None: nothing is kept.
      metrics: writer of one line each few segments: runs under way, hits so far, speed.
      tolerance: a run counts as a hit in progress and metrics when its full loss is at most this.
      workers: threads that work on blocks at the same time; None: the number of cores.

    Raises:
      ConfigError: if the loss does not fit a data set, the data sets differ in size or are too large, a run points
        beyond them, the batch exceeds the data, or there are fewer devices than the spec names.
      TypeError: for what is no list of data sets, no runs or no spec.
      CheckpointMismatchError, IdentityError: if `checkpoints` holds another study; the latter names what differs.
    """
    if isinstance(datasets, Dataset) or not isinstance(datasets, Sequence):
        raise TypeError("train_runs takes a list of data sets, to which runs.data points; write [data].")
    for given, kind, made in ((runs, Runs, "make_runs(width, seed)"), (spec, SgdSpec, "SgdSpec(steps=1000)")):
        if not isinstance(given, kind):
            raise TypeError(f"a {kind.__name__} is needed, got {type(given).__name__}: write hitting.{made}.")
    datasets, loss = [as_dataset(dataset) for dataset in datasets], as_loss(loss)
    study = prepare(datasets, loss, runs, spec)
    saver = None if checkpoints is None else Checkpointer(checkpoints)
    try:
        if saver is not None and (restored := saver.restore_latest(study.tree())) is not None:
            require_same(restored.meta.get("identity"), study.identity, f"the folder {checkpoints}")
            study.put(jax.tree.map(np.array, restored.state), restored.step)
        if metrics is not None:
            metrics.truncate_after(study.step if study.step else -1)
        drive(study, saver, metrics, tolerance, workers or os.cpu_count() or 1)
    finally:
        if saver is not None:
            saver.close()
    return Outcome(
        full_loss(study.weights, runs, datasets, loss), study.losses, study.steps, study.status, study.weights
    )


def drive(study: Study, saver: Checkpointer | None, metrics: Metrics | None, tolerance: float, workers: int) -> None:
    """Packs, advances and saves until every run is over."""
    spec, total = study.spec, study.spec.steps * len(study.status)
    x64 = bool(jax.dtypes.canonicalize_dtype(np.float64) == np.float64)

    def work(chosen: np.ndarray, last: int) -> None:
        with jax.enable_x64(x64):  # holds in one thread only
            study.advance(chosen, study.step, last)

    def done() -> int:
        return int(np.where(study.status == RUNNING, study.step, spec.steps).sum())

    with ThreadPoolExecutor(workers) as pool, Progress(total, "SGD steps", done(), first=COMPILING) as progress:
        if study.step == 0:
            blocks = study.blocks()
            tall = {study.height(chosen): k for k, chosen in enumerate(blocks)}
            order = sorted(range(len(blocks)), key=lambda k: k not in tall.values())  # each program is compiled once
            list(pool.map(lambda k: work(blocks[k], 0), order[: len(tall)]))
            list(pool.map(lambda k: work(blocks[k], 0), order[len(tall) :]))
        saved = time.monotonic()
        while (study.status == RUNNING).any() and study.step < spec.steps:
            began, blocks = time.monotonic(), study.blocks()
            last = min(study.step + _SEGMENTS * spec.check_every, spec.steps)
            going, before = int((study.status == RUNNING).sum()), int(study.steps.sum())
            list(pool.map(lambda chosen, last=last: work(chosen, last), blocks))
            study.step = last
            hits = int((study.losses[:, -1] <= tolerance).sum())
            if metrics is not None:
                speed = (int(study.steps.sum()) - before) / (time.monotonic() - began)
                metrics.write(last, running=going, hits=hits, blocks=len(blocks), run_steps_per_second=speed)
            progress.update(done(), f"{hits} hits so far, {int((study.status == RUNNING).sum())} runs under way")
            over = last >= spec.steps or not (study.status == RUNNING).any()
            if saver is not None and (over or time.monotonic() - saved > spec.checkpoint_seconds):
                saver.save(last, study.tree(), {"identity": study.identity})
                saved = time.monotonic()
