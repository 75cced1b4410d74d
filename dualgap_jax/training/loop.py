"""The loop of training: segments, looks of the schedule, metrics, checkpoints; it does not know how steps are taken.

Between segments the schedule looks at the loss of the segment, metrics are written, and checkpoints are saved.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualgap_jax.checkpoints import Checkpointer
from dualgap_jax.metrics import Metrics
from dualgap_jax.schedules import Schedule
from dualgap_jax.sharding import agreed
from dualgap_jax.terminal import COMPILING, Progress
from dualgap_jax.training.batches import BatchOrder
from dualgap_jax.training.engine import Engine, Lanes, Steps, item, stack
from dualgap_jax.training.resume import Run, has_steps_to_do
from dualgap_jax.types import BranchSource, PyTree

_SECONDS = 1.0  # of one call, where a call may be cut short


@dataclasses.dataclass
class Loop:
    """Runs groups of solutions to their ends, segment by segment.

    At each step those that are still under way go through one program.  After a kill between two checkpoints some stand
    further on than others; then those ahead ride along, their results unused, while the others catch up: a program for
    fewer solutions may round otherwise, and a resumed run must not differ from an uninterrupted one.

    Attributes:
      engine: takes the steps.
      schedule: of the learning rate.
      num_examples, batch_size: of the data, and of a step (0: all of them).
      max_steps, check_every, tolerance, checkpoint_seconds: as in `train`.
      record: what a checkpoint keeps of the way of training.
      metrics: writer of one line a segment and solution, or None.
      snapshot: called with solution, steps and network at the start and at each look, or None.
    """

    engine: Engine
    schedule: Schedule
    num_examples: int
    batch_size: int
    max_steps: int
    check_every: int
    tolerance: float
    checkpoint_seconds: float
    record: Mapping[str, Any]
    metrics: Metrics | None
    snapshot: Callable[[int, int, BranchSource], object] | None = None

    def __post_init__(self) -> None:
        self._update = jax.jit(jax.vmap(self.schedule.update))
        self._compiled: set[int] = set()  # how many solutions there are programs for
        self._pace = 1  # steps in one call, so that the line of progress, checkpoints and signals do not wait for long

    def run(self, runs: dict[int, Run], savers: Mapping[int, Checkpointer]) -> None:
        """Takes a group to its end; `runs` holds one entry a solution and is brought up to date in place."""
        orders = {
            i: BatchOrder(r.keys[0], self.num_examples, self.batch_size) for i, r in runs.items() if self.batch_size
        }
        done = min(r.steps for r in runs.values())
        for i, r in runs.items():
            if self.snapshot is not None and r.steps == 0:
                self.snapshot(i, 0, self.engine.network(r.carry, None))
        label = "training" if len(runs) > 1 else f"solution {next(iter(runs))}"
        with Progress(self.max_steps, label, done, at_most=bool(self.tolerance > 0)) as progress:
            while standing := [r.steps for r in runs.values() if self.is_under_way(r)]:
                first = min(standing)
                together = [
                    i for i, r in runs.items() if r.steps > first or (r.steps == first and self.is_under_way(r))
                ]
                limit = min([r.steps for r in runs.values() if r.steps > first], default=self.max_steps)
                if len(together) not in self._compiled:
                    self._compiled.add(len(together))
                    progress.wait(COMPILING)
                self._advance(runs, together, min(limit, self.max_steps), orders, savers, progress)
            losses = " ".join(f"{r.batch_loss:.3g}" for r in runs.values())
            ends = sorted({r.status for r in runs.values()} - {"running"})
            progress.update(max(r.steps for r in runs.values()), ", ".join([f"loss {losses}", *ends]))

    def is_under_way(self, run: Run) -> bool:
        """Whether a run has steps to do."""
        return has_steps_to_do(run.status, run.steps, self.max_steps)

    def _advance(
        self,
        runs: dict[int, Run],
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
          savers: one a solution; none without checkpoints.
          progress: the line on the terminal.
        """
        first = min(runs[i].steps for i in together)
        moving = {i: lane for lane, i in enumerate(together) if runs[i].steps == first}
        lanes = self.engine.join([runs[i].carry for i in together])
        schedule_state = stack([runs[i].schedule_state for i in together])
        noise_keys = jnp.stack([runs[i].keys[1] for i in together])
        done = len(runs[next(iter(moving))].pending)  # of those that ride along nothing is looked at
        pending = np.asarray([runs[i].pending if i in moving else [0.0] * done for i in together], np.float64)
        for i in moving:
            runs[i] = runs[i]._replace(carry=None)  # the stack is the only copy now
        saved_at, save_seconds = time.monotonic(), 0.0
        taken, seconds = 0, 0.0  # steps since the last look, and their time
        over = False
        while not over:
            left = min(self.check_every - pending.shape[1], limit - first)
            length = min(left, self.engine.stride, self._pace if self.engine.any_length else left)
            indices = np.stack([orders[i].indices(first, length) for i in together]) if orders else None
            began = time.monotonic()
            steps = Steps(schedule_state, noise_keys, self.schedule.base, indices, first, length)
            lanes, losses = self.engine.advance(lanes, steps)
            spent = time.monotonic() - began
            taken, seconds = taken + length, seconds + spent
            self._pace = max(min(2 * self._pace, int(length * _SECONDS / max(spent, 1e-9))), 1)
            first += length
            pending = np.concatenate([pending, losses], axis=1)
            means = pending.mean(axis=1)
            progress.update(first, f"loss {' '.join(f'{means[lane]:.3g}' for lane in moving.values())}")
            whole = pending.shape[1] == self.check_every
            # Where calls are cut short by the clock, what is looked at must not hang on where.
            looked = whole or first >= self.max_steps or not (self.engine.any_length or np.isfinite(means).all())
            judged = schedule_state
            if looked:
                start = first - pending.shape[1]
                rates = {i: self._rate(item(schedule_state, lane), start) for i, lane in moving.items()}
                speed, taken, seconds = taken / seconds, 0, 0.0
                seen, least = (pending[:, -1], pending.min(1)) if self.schedule.single else (means, means)
                judged = self._update(schedule_state, jnp.asarray(seen, float))
            if whole:  # the last segment may be shorter; a longer run would not have looked there
                schedule_state, pending = judged, pending[:, :0]
            for i, lane in moving.items():
                loss = float(means[lane])
                status = self._status(loss, float(least[lane]), item(judged, lane)) if looked else "running"
                if not has_steps_to_do(status, first, self.max_steps) and not self.engine.is_finite(lanes, lane):
                    status = "diverged"
                runs[i] = runs[i]._replace(
                    steps=first, status=status, batch_loss=loss, pending=tuple(map(float, pending[lane]))
                )
                if looked and self.snapshot is not None:
                    self.snapshot(i, first, self.engine.network(self.engine.part(lanes, lane), None))
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
            due = time.monotonic() - saved_at > max(self.checkpoint_seconds, 10 * save_seconds)
            if jax.process_count() > 1:
                due = looked and agreed(due)  # a save has a part for each process
            if over or due:
                began = time.monotonic()
                self._save(runs, moving, savers, lanes, schedule_state)
                saved_at = time.monotonic()
                save_seconds = saved_at - began
        for i, lane in moving.items():
            runs[i] = runs[i]._replace(carry=self.engine.part(lanes, lane), schedule_state=item(schedule_state, lane))

    def _rate(self, schedule_state: PyTree, step: int) -> float:
        return float(self.schedule.base * self.schedule.rate(schedule_state, jnp.asarray(step)))

    def _status(self, mean_loss: float, least: float, schedule_state: PyTree) -> str:
        if not np.isfinite(mean_loss):
            return "diverged"
        if least < self.tolerance:
            return "converged"
        return "plateau" if bool(self.schedule.stop(schedule_state)) else "running"

    def _save(
        self,
        runs: Mapping[int, Run],
        moving: Mapping[int, int],
        savers: Mapping[int, Checkpointer],
        lanes: Lanes,
        schedule_state: PyTree,
    ) -> None:
        for i, lane in moving.items() if savers else ():
            stored = self.engine.stored(lanes, lane)
            state = {"carry": stored, "schedule": item(schedule_state, lane), "keys": runs[i].keys}
            meta = {
                "status": runs[i].status,
                "batch_loss": runs[i].batch_loss,
                "pending": runs[i].pending,
                "identity": runs[i].mark,
                **self.record,
            }
            savers[i].save(runs[i].steps, state, meta)
