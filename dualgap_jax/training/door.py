"""`train`: solutions of a network from independent initialisations, in memory or streamed, resumed where they stand."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dualgap_jax import optimizers, seeds
from dualgap_jax.checkpoints import Checkpointer, Restored
from dualgap_jax.config import require
from dualgap_jax.data import as_dataset
from dualgap_jax.evaluation import check_fits, check_outputs
from dualgap_jax.files import local_folder
from dualgap_jax.losses import as_loss
from dualgap_jax.metrics import Metrics
from dualgap_jax.networks import as_network
from dualgap_jax.schedules import Schedule, constant
from dualgap_jax.sharding import MeshSpec, local_devices
from dualgap_jax.training import plan
from dualgap_jax.training.batches import batch_shape, output_shape
from dualgap_jax.training.engine import Engine
from dualgap_jax.training.loop import Loop
from dualgap_jax.training.resume import begin_run, identity_of, is_over, newest, require_alike
from dualgap_jax.training.spec import Streaming, check
from dualgap_jax.training.streamed import Streamed
from dualgap_jax.training.together import Together, draw
from dualgap_jax.types import BranchSource, KeyArray, Params, State


class Solution(NamedTuple):
    """Where one run of SGD ended.

    Attributes:
      network: the trained network, in memory (`networks.sources.InMemory`) or on disk, read a few branches at a time.
      steps: number of steps done.
      status: 'converged' (segment loss below the tolerance), 'plateau' (the schedule gave up), 'max_steps', or
        'diverged' (a loss, an output in training, or in the end a parameter that is not finite).
      batch_loss: mean mini-batch loss over the last segment (NaN when no step was done).
    """

    network: BranchSource
    steps: int
    status: str
    batch_loss: float

    @property
    def params(self) -> Params:
        """The network's parameters, brought into memory where they lie on disk."""
        return self.network.read(0, self.network.num_branches)[0]

    @property
    def state(self) -> State:
        """The network's state, likewise."""
        return self.network.read(0, self.network.num_branches)[1]


def solution_key(seed: int, index: int) -> KeyArray:
    """The root key of solution `index` of an experiment with this seed.  Raises as `seeds.check` does."""
    return jax.random.fold_in(seeds.key(seed), index)


def train(
    net: Any,
    loss: Any,
    data: Any,
    optimizer: Any,
    *,
    schedule: Schedule | None = None,
    batch_size: int = 128,
    max_steps: int = 10_000,
    check_every: int = 100,
    tolerance: float = 1e-5,
    seed: int = 0,
    num_solutions: int = 3,
    group_size: int | None = None,
    streaming: Streaming = "auto",
    branch_chunk: int = 0,
    mesh: MeshSpec | None = None,
    checkpoints: str | Path | None = None,
    checkpoint_seconds: float = 60.0,
    metrics: Metrics | None = None,
    report: Callable[[str], object] | None = None,
    snapshot: Callable[[int, int, BranchSource], object] | None = None,
) -> list[Solution]:
    """Trains `num_solutions` networks from independent initialisations with any optax optimiser.

    There are three ways, and size and free memory decide (`streaming` and `group_size` override).  Solutions are
    trained together in one vmapped program when four copies of each, and what a step computes, fit in half of the
    memory; else one after another.  The streamed step (`branch_step`) needs little more than the parameters: it is
    taken where a network is too large for that too, is larger than 268 MB with its optimiser (not on GPUs), or is
    trained faster so (on CPU from 67 MB, if the optimiser keeps nothing of the parameters' size).  On a mesh of several
    devices the step is always the streamed one.  Products are what `jax.default_matmul_precision` says: by default TF32
    on recent GPUs and bfloat16 on TPUs; evaluation and surfaces always take full ones.

    With `checkpoints`, progress is saved under `solution_K/`, and a second call goes on from there, in the same way, so
    that its numbers are those of an uninterrupted run bit for bit.  A network trained by the streamed step is then left
    on disk: `Solution.network` reads it.  A mesh may change between calls; results then agree to rounding.  Network,
    loss, data, optimiser, rate, schedule and seed are compared with those that the checkpoints were written with;
    `max_steps` may be longer than it was, unless the schedule depends on it.

    Args:
      net: the network, as `multi_branch` makes it, or a Linen module or a constructor of NNX modules.
      loss: a loss that fits the task of the data, or a plain function; see `losses.as_loss`.
      data: the training set, a `Dataset` or a pair of arrays `(x, y)`; see `data.from_arrays`.
      optimizer: an `optax.GradientTransformation` with its own rate, sign and schedule, such as `optax.adamw(1e-3)`.
        In a network of `multi_branch` or `mixture` it acts on each branch alone, in any other on all parameters as they
        lie; see `optimizers.for_network`.
      schedule: what the optimiser's updates are multiplied by, from a look at the mean loss every `check_every` steps,
        and when to stop; None leaves them as they are.
      batch_size: examples a step, drawn without replacement within an epoch; 0 is the full data set.
      max_steps: a run that has not converged by then stops with status 'max_steps'.
      check_every: steps in a segment, between two looks of the schedule and two lines of metrics.
      tolerance: a mean loss over a segment below this is status 'converged'.
      seed: a whole number from 0 to 2**32 - 1, of initialisations, orders and dropout.
      num_solutions: number of solutions, at least 1.
      group_size: number of solutions in one program; results depend on it through rounding only.
      streaming: 'on' takes the streamed step, 'off' never does, 'auto' decides as said above.
      branch_chunk: branches at a time in the streamed step; 0 chooses.  Results depend on it through rounding only.
      mesh: devices that share the branches and the batches, or the solutions; None: the solutions that are trained
        together share the devices of this process.
      checkpoints: folder, or None.  With several processes all must see it, and each writes its own branches there.
      checkpoint_seconds: least time between two checkpoints; one is always written at the end.
      metrics: writer of one line a segment and solution, or None.
      report: called with lines that say how training will go, before it starts.
      snapshot: called with the index of a solution, its steps and the network as it is then, in memory, at the start
        and at each look of the schedule; a resumed run goes on from its last checkpoint, so that looks may come twice.

    Raises:
      TypeError: for what is no network, loss or data set.
      ConfigError: if the loss or the network does not fit the data set, the batch is larger than it, a number is out of
        its range, the optimiser is none or needs what a step does not have, or streamed training is asked for and
        cannot be (see `Streamed`), or is needed where snapshots are taken.
      IdentityError: if `checkpoints` holds solutions of another run; the message names what differs.
    """
    net, loss, dataset = as_network(net, "train"), as_loss(loss), as_dataset(data)
    mesh = MeshSpec() if mesh is None else mesh
    folder = local_folder(checkpoints, "the folder of checkpoints") if checkpoints is not None else None
    seeds.check(seed)
    _check_kinds(mesh, schedule)
    schedule = schedule or constant(max_steps)
    check(
        batch_size=batch_size,
        max_steps=max_steps,
        check_every=check_every,
        tolerance=tolerance,
        num_solutions=num_solutions,
        group_size=1 if group_size is None else group_size,
        streaming=streaming,
        branch_chunk=branch_chunk,
        checkpoint_seconds=checkpoint_seconds,
        learning_rate=schedule.base,
    )
    several = mesh.size > 1 or jax.process_count() > 1
    _check_devices(several, streaming, group_size, folder)
    check_fits(loss, dataset)
    require(
        batch_size <= len(dataset.y),
        f"batch_size={batch_size} exceeds the {len(dataset.y)} examples; use 0 for the full data set.",
    )
    transformation = optimizers.for_network(net, optimizer)
    marks: list[dict[str, Any]] = [{}] * num_solutions
    found: list[Restored | None] = [None] * num_solutions
    if folder is not None:
        run = identity_of(
            net,
            loss,
            dataset,
            transformation,
            schedule,
            seed,
            tolerance=tolerance,
            **{"batch size": batch_size, "interval of the schedule's looks": check_every},
        )
        require_alike(run)
        marks = [{**run, "solution": i} for i in range(num_solutions)]
        found = [newest(folder / f"solution_{i}", mark, max_steps) for i, mark in enumerate(marks)]
    choice = plan.Choice(1, True)
    if streaming != "on" and not several:
        shapes = jax.eval_shape(functools.partial(draw, net, dataset, transformation), jax.random.key(0))
        may_stream = streaming == "auto" and net.stacked is not None and not net.replaced()
        begun = [plan.Choice(f.meta["group_size"], f.meta["streamed"]) for f in found if f is not None]
        # Snapshots need the network in memory, so that they are worth a slower way.
        enough = plan.stream_from(net, shapes, jax.default_backend()) if snapshot is None else sys.maxsize
        needed = plan.need(net, shapes, batch_shape(dataset, batch_size))
        choice = plan.choose(needed, num_solutions, group_size, may_stream, begun, enough)
    require(
        snapshot is None or not choice.streamed,
        "snapshots are taken of networks that are trained in memory, and this one is streamed; train it without"
        " them, or with streaming='off' on one device.",
    )
    engine: Engine
    if choice.streamed:
        settings: Any = {"mesh": mesh, "chunk": branch_chunk, "on_disk": folder is not None}
        engine = Streamed(net, loss, transformation, dataset, batch_size, schedule=schedule, **settings)
    else:
        devices = local_devices(min(choice.group_size, num_solutions, mesh.seed or jax.local_device_count()))
        stride = max(min(check_every, max_steps), 1)
        engine = Together(net, loss, transformation, schedule, dataset, batch_size, devices, choice.group_size, stride)
    check_outputs(output_shape(net, dataset), loss, dataset)
    loop = Loop(
        engine=engine,
        schedule=schedule,
        num_examples=len(dataset.y),
        batch_size=batch_size,
        max_steps=max_steps,
        check_every=check_every,
        tolerance=tolerance,
        checkpoint_seconds=checkpoint_seconds,
        record=choice._asdict(),
        metrics=metrics,
        snapshot=snapshot,
    )
    # Before any parameters are there: compiling what is measured takes memory that is given back.
    all_over = all(is_over(f, max_steps) for f in found)
    if not all_over and (said := engine.plan(max_steps, num_solutions, folder)) and report is not None:
        report(said)
    groups = [
        range(first, min(first + choice.group_size, num_solutions))
        for first in range(0, num_solutions, choice.group_size)
    ]
    return [solution for group in groups for solution in _trained(loop, group, folder, seed, found, marks)]


def _check_kinds(mesh: Any, schedule: Any) -> None:
    require(isinstance(mesh, MeshSpec), f"mesh={mesh!r} is none; write MeshSpec(branch=2) of dualgap_jax.sharding.")
    require(
        schedule is None or isinstance(schedule, Schedule),
        f"schedule={schedule!r} is none; take one of dualgap_jax.schedules, such as schedules.cosine(1000), or give the"
        " optimizer a schedule of optax.",
    )


def _check_devices(several: bool, streaming: str, group_size: int | None, folder: Path | None) -> None:
    """Refuses what training on several devices or processes, or streamed, cannot do."""
    require(
        group_size in (None, 1) or (streaming != "on" and not several),
        f"group_size={group_size}: streamed solutions are trained one after another; leave it out.",
    )
    require(
        jax.process_count() == 1 or folder is not None,
        "several processes hand a network on through its checkpoints; give a folder that all of them see.",
    )
    require(
        not (several and streaming == "off"),
        "training.streaming='off' trains on one device; use 'auto' with a mesh of several.",
    )


def _trained(
    loop: Loop,
    group: range,
    folder: Path | None,
    seed: int,
    found: Sequence[Restored | None],
    marks: Sequence[dict[str, Any]],
) -> list[Solution]:
    """The solutions of a group, trained together from where their checkpoints end."""
    folders = {i: folder / f"solution_{i}" if folder is not None else None for i in group}
    with contextlib.ExitStack() as stack:
        savers = {
            i: stack.enter_context(Checkpointer(path, together=True)) for i, path in folders.items() if path is not None
        }
        runs = {
            i: begin_run(
                i,
                jax.random.split(solution_key(seed, i), 3),
                loop.engine,
                loop.schedule,
                savers.get(i),
                loop.metrics,
                loop.max_steps,
                found[i],
                marks[i],
            )
            for i in group
        }
        loop.run(runs, savers)
    solutions = []
    for i, r in runs.items():
        status = "max_steps" if r.status == "running" else r.status
        solutions.append(Solution(loop.engine.network(r.carry, folders[i]), r.steps, status, r.batch_loss))
    return solutions
