"""Where a run stands: at its first step, or at a checkpoint that is shown to be its own."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from dualgap_jax import identity, seeds
from dualgap_jax.checkpoints import Checkpointer, Restored, load
from dualgap_jax.checkpoints.processes import Company
from dualgap_jax.data import Dataset
from dualgap_jax.losses import Loss
from dualgap_jax.metrics import Metrics
from dualgap_jax.networks import upcast
from dualgap_jax.schedules import Schedule
from dualgap_jax.training.batches import example_input
from dualgap_jax.training.engine import Engine, Transformation
from dualgap_jax.training.together import draw
from dualgap_jax.types import KeyArray, Network, Params, PyTree, State

_log = logging.getLogger(__name__)
_ENDS = ("converged", "plateau")  # as looks find them; what has diverged stays so


class Run(NamedTuple):
    """One solution under way.  `carry` and `schedule_state` are those after `steps` steps.

    Attributes:
      solution: its index.
      keys: `[2]`: of the batch order, of the noise.
      carry: as the engine keeps it; None while the loop holds it in lanes, or when it is on disk.
      schedule_state: of the learning rate.
      steps, status, batch_loss: as in `Solution`; the status is 'running' until it ends.
      pending: losses of the steps since the last look of the schedule.
      mark: its identity, kept in its checkpoints.
    """

    solution: int
    keys: Array
    carry: PyTree
    schedule_state: PyTree
    steps: int
    status: str
    batch_loss: float
    pending: tuple[float, ...] = ()
    mark: Mapping[str, Any] = types.MappingProxyType({})


def identity_of(
    net: Network,
    loss: Loss,
    dataset: Dataset,
    transformation: Transformation,
    schedule: Schedule,
    seed: int,
    **settings: Any,
) -> dict[str, Any]:
    """What the solutions of a run depend on, but for rounding; `settings` are plain values that count too."""
    example, key = example_input(dataset), jax.random.key(0)
    carry = jax.eval_shape(functools.partial(draw, net, dataset, transformation), key)
    x = jax.ShapeDtypeStruct((2, *example.shape[1:]), example.dtype)
    y = jax.ShapeDtypeStruct((2,), jnp.asarray(dataset.y[:1]).dtype)

    def outputs(params: Params, state: State, x: Array, key: KeyArray) -> tuple[Array, State]:
        return net.apply(params, state, x, key=key, train=True)

    def update(gradient: Params, state: PyTree, params: Params, value: Array) -> tuple[Params, PyTree]:
        return transformation.update(gradient, state, params, value=value)

    def scheduled(state: PyTree, now: Array, loss: Array) -> PyTree:
        return schedule.init(), schedule.rate(state, now), schedule.update(state, loss), schedule.stop(state)

    made, _ = jax.eval_shape(outputs, carry.params, carry.state, x, key)
    weights, value = upcast(carry.params), jnp.asarray(0.0, float)
    return {
        "network": identity.combined(
            identity.function_digest(net.init, key, example),
            identity.function_digest(outputs, carry.params, carry.state, x, key, derivative=True),
        ),
        "loss": identity.function_digest(loss.per_example, made, y, derivative=True),
        "data": identity.arrays_digest(dataset.x, dataset.y, dataset.mean, dataset.std),
        "optimiser": identity.combined(
            identity.function_digest(transformation.init, weights),
            identity.function_digest(update, weights, carry.opt_state, weights, value),
        ),
        "learning rate": schedule.base,
        "schedule": identity.function_digest(scheduled, schedule.init(), jnp.asarray(0), value),
        "what the schedule looks at": "mini-batches" if schedule.single else "means",
        "seed": seeds.check(seed),
        **settings,
        **identity.versions(),
    }


def require_alike(run: Mapping[str, Any]) -> None:
    """Raises IdentityError, in every process, unless all processes of a distributed run were given the same."""
    said = Company(together=True).gathered({str(jax.process_index()): run})
    for process, other in said.items():
        if (found := identity.difference(said["0"], other)) is not None:
            raise identity.IdentityError(
                f"process 0 and process {process} were given different runs: {found}; start all with the same."
            )


def newest(folder: Path, mark: Mapping[str, Any], max_steps: int) -> Restored | None:
    """The newest checkpoint without its leaves, which are not read; None where there is none.

    With several processes all must call; they get the same one.

    Raises:
      IdentityError: if it is of another run, or of more steps than are wanted.
    """
    try:
        found = load(folder, place=lambda leaf, stored: None, together=True)
    except FileNotFoundError:
        return None
    identity.require_same(found.meta.get("identity"), mark, f"the folder {folder}")
    if found.step > max_steps:
        raise identity.IdentityError(
            f"the folder {folder} holds another run: it stands at step {found.step} and max_steps is {max_steps};"
            " give another folder, or ask for as many steps."
        )
    for name, now in identity.versions().items():
        if (then := found.meta["identity"][name]) != now:
            _log.warning("%s was written under %s %s and goes on under %s", folder, name, then, now)
    return found


def has_steps_to_do(status: str, steps: int, max_steps: int, pending: Sequence[float] = ()) -> bool:
    """Whether a run is under way.

    So is one that was found at an end only because its last steps were looked at before their segment was whole, where
    it is made longer: the longer run would not have looked there.
    """
    return steps < max_steps and (status == "running" or (status in _ENDS and bool(pending)))


def is_over(restored: Restored | None, max_steps: int) -> bool:
    """Whether a checkpoint is the end of its run."""
    if restored is None:
        return False
    return not has_steps_to_do(restored.meta["status"], restored.step, max_steps, restored.meta["pending"])


def begin_run(
    solution: int,
    keys: Array,
    engine: Engine,
    schedule: Schedule,
    saver: Checkpointer | None,
    metrics: Metrics | None,
    max_steps: int,
    found: Restored | None,
    mark: Mapping[str, Any],
) -> Run:
    """A run at its first step, or at its newest sound checkpoint.

    Args:
      solution: its index.
      keys: `[3]`: of the initialisation, the batch order, the noise.
      engine, schedule: which take its steps.
      saver: of its checkpoints, or None.
      metrics: whose lines beyond the checkpoint are dropped, or None.
      max_steps: of the run.
      found: the newest checkpoint without its leaves, or None.
      mark: its identity.
    """
    restored = None
    if saver is not None:
        template = {"carry": engine.template(keys[0]), "schedule": schedule.init(), "keys": keys[1:]}
        ended = is_over(found, max_steps)
        restored = saver.restore_latest(template, engine.reader(ended))
        if ended and not is_over(restored, max_steps):  # the last one is damaged, and the one before is taken
            restored = saver.restore_latest(template, engine.reader(False))
    if metrics is not None:
        looked = -1 if restored is None else restored.step
        if restored is not None and not is_over(restored, max_steps):
            looked -= len(restored.meta["pending"])  # of a segment cut short by the end of the run there is a line
        metrics.truncate_after(looked, solution=solution)
    if restored is None:
        start = engine.start(keys[0])
        return Run(solution, keys[1:], start, schedule.init(), 0, "running", float("nan"), mark=mark)
    saved, meta = restored.state, restored.meta
    return Run(
        solution,
        saved["keys"],
        saved["carry"],
        saved["schedule"],
        restored.step,
        meta["status"] if is_over(restored, max_steps) else "running",
        float(meta["batch_loss"]),
        tuple(meta["pending"]),
        mark,
    )
