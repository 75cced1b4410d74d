"""The runs of a hitting study: how each is trained, what tells them apart, and how they ended."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import numpy as np

from dualgap_jax import seeds
from dualgap_jax.config import Component, require
from dualgap_jax.schedules import SCHEDULES
from dualgap_jax.sizes import switch

Order = Literal["epochs", "independent"]

STATUSES = ("running", "zero", "below", "schedule", "diverged")
RUNNING, ZERO, BELOW, SCHEDULE, DIVERGED = range(5)


@dataclasses.dataclass(frozen=True)
class SgdSpec:
    """How each run is trained.

    Attributes:
      steps: SGD iterations of a run.
      batch_size: examples a step; 0 is the full data set.
      order: 'epochs' draws without replacement, a fresh permutation each epoch (a rest that fills no batch is left
        out); 'independent' draws every index anew.
      schedule: an entry of `schedules.SCHEDULES`, per run.
      init, use_bias: as in `networks.mlp`.
      check_every: steps in a segment, between two looks at the loss on the full data and two updates of the schedule.
      stop_below: a run whose loss on the full data is at most this at a look stops there; -1 never stops so.
      stop_at_rest: a run of a hinge loss whose margins all exceed tau has no gradient any more; True ends it at the
        next look, which changes no number of its result.
      lanes: runs in a block, on each device, a multiple of 16; 0 chooses (`lanes_on`).  Results do not depend on it.
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
    lanes: int = 0
    devices: int = 0
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        switch(self.use_bias, "sgd.use_bias"), switch(self.stop_at_rest, "sgd.stop_at_rest")
        require(self.steps >= 1, f"sgd.steps={self.steps} must be at least 1.")
        require(self.batch_size >= 0, f"sgd.batch_size={self.batch_size} must be >= 0 (0: the full data set).")
        require(self.check_every >= 1, f"sgd.check_every={self.check_every} must be at least 1.")
        require(not math.isnan(self.stop_below), "sgd.stop_below is not a number; -1 switches it off.")
        require(
            0 <= self.lanes <= 2**16 and self.lanes % 16 == 0,
            f"sgd.lanes={self.lanes} must be a multiple of 16, the widest vector registers, up to {2**16:,}, or 0.",
        )
        require(self.devices >= 0, f"sgd.devices={self.devices} must be >= 0 (0: all of this machine).")
        require(self.checkpoint_seconds >= 0, f"sgd.checkpoint_seconds={self.checkpoint_seconds} must be >= 0.")
        schedule = SCHEDULES.build(self.schedule.name, max_steps=self.steps, **self.schedule.settings)
        require(
            not schedule.single,
            f"schedule={self.schedule.name!r} looks at single mini-batches; a study looks at means of segments: take"
            " plateau, cosine or constant.",
        )

    def lanes_on(self, platform: str) -> int:
        """Runs in a block on each device of a platform: as given, or what suits it.

        On CPU 64 for batches up to 20 and 128 for larger ones, whose weights stay in the cache; on accelerators 1,024:
        by the estimate of XLA's TPU compiler they take less than twice as long as 128, and 64 fill half a tile.
        """
        if self.lanes:
            return self.lanes
        return 1024 if platform != "cpu" else 64 if 0 < self.batch_size <= 20 else 128

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
      ConfigError: for no runs, a width or data index that is no whole number, a width below 1, a seed that
        `seeds.check` refuses, a negative data index, or a rate or scale that is not positive.
    """
    for given in np.ravel(seed):
        seeds.check(given)
    for name, given in (("width", width), ("data", data)):
        require(
            not np.size(given) or np.asarray(given).dtype.kind in "iu", f"{name}={given!r:.60} must be whole numbers."
        )
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
    return (outcome.status == DIVERGED) | ~np.isfinite(outcome.final_loss)
