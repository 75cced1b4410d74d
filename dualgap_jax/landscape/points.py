"""The mean loss at points of a plane, a block of branches and a batch of examples at a time."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from dualgap_jax.convexity.grids import real
from dualgap_jax.data import Dataset, as_dataset, standardise
from dualgap_jax.evaluation import check_fits, check_inputs, check_outputs
from dualgap_jax.files import local_path
from dualgap_jax.identity import arrays_digest, combined, function_digest, versions
from dualgap_jax.landscape import kernels as compiled
from dualgap_jax.landscape.partial import Saver, Work, on_exception
from dualgap_jax.landscape.planes import Block, Plane
from dualgap_jax.landscape.statistics import States, check_state, has_statistics, momenta
from dualgap_jax.losses import Loss, as_loss
from dualgap_jax.networks import accumulator, check_network
from dualgap_jax.networks.sources import block_size, blocks, check_source, even_size, read_ahead
from dualgap_jax.registry import UnknownNameError, unknown
from dualgap_jax.sizes import positive
from dualgap_jax.terminal import COMPILING, Progress
from dualgap_jax.types import Network, PyTree

ROUTES = ("auto", "stem", "plain")
ACCUMULATOR_BYTES = 3 * 2**30  # of outputs kept for all points while networks are read from disk
_SHARE_IN_MEMORY = 8  # of that, where they are in memory and a block costs no more than a copy


def evaluate_points(
    net: Network,
    loss: Any,
    dataset: Any,
    plane: Plane,
    points: Float[np.ndarray, "points 2"],
    *,
    route: str = "auto",
    state: str = "estimate",
    state_samples: int = 256,
    sample_chunk: int = 256,
    branch_chunk: int | None = None,
    point_chunk: int = 8,
    accumulator_bytes: int = ACCUMULATOR_BYTES,
    partial: str | Path | None = None,
    save_seconds: float = 30.0,
    label: str = "landscape",
) -> Float[np.ndarray, " points"]:
    """The mean loss over the whole data set at points of a plane, in evaluation mode; NaN where an output is NaN.

    Results depend on the chunk sizes only through rounding, and not at all on whether the networks of the plane are in
    memory or on disk.  From disk they are read once for each group of samples whose outputs at all points,
    `4 x points x samples x outputs` bytes, fit `accumulator_bytes`; above these and the compiled programs at most about
    2 GB are needed, however many branches there are.

    Args:
      net: the network; of `multi_branch` where the plane's networks are on disk.
      loss: a `losses.Loss`, or a function of outputs and labels; the losses of batches are added up in float64.
      dataset: a `data.Dataset`, or a pair of arrays.
      plane: where the points lie.
      points: `[P, 2]` plane coordinates (a, b).
      route: 'stem' (first-layer reuse), 'plain' (every point in full, the whole network at once), or 'auto': stem where
        the network has one, else in full, a few branches at a time where it is a sum of branches.
      state: what becomes of a network's running statistics, which do not lie on the plane: 'estimate' gathers them anew
        at every point, from one batch of the data; 'interpolate' takes them along linearly, those that are at least 0
        in all networks of the plane (variances) never below the least of them.  Networks without a state take no heed.
      state_samples: how many examples that batch has, spread evenly over the data set.
      sample_chunk: samples at a time; memory for pre-activations is 3 x that of one forward pass over so many, and
        over a block of branches.
      branch_chunk: branches at a time in the layers above the stem; None: `kernels.chunk`, or on GPUs, whose compiler
        copies slices, a whole block.
      point_chunk: points at a time in the layers above the stem.
      accumulator_bytes: for the outputs kept while networks are read from disk; an eighth of it where they are in
        memory, in several blocks.
      partial: a file that keeps unfinished work; a second call with the same arguments goes on from it.  It is removed
        at the end.  A damaged file is said, by a warning, and computed again.
      save_seconds: least time between two writes of it; longer where a write takes long, a tenth of the time at most.
      label: the name on the progress line.

    Raises:
      UnknownNameError: for an unknown route or state.
      IdentityError: where `partial` holds another evaluation; it names what differs.
      ConfigError: if the loss or the network does not fit the data set.
      TypeError, ValueError: for arguments of another kind; for route='stem' on a network without one, a size below 1,
        points that are not `[P, 2]`, a plane on disk with route='plain' or with a network that is no sum of branches,
        networks of another number of branches, or state='estimate' for a state that is no running average.
    """
    net, loss, dataset = check_network(net, "landscape.evaluate_points").computed(), as_loss(loss), as_dataset(dataset)
    sample_chunk, point_chunk = positive(sample_chunk, "sample_chunk"), positive(point_chunk, "point_chunk")
    branch_chunk = None if branch_chunk is None else positive(branch_chunk, "branch_chunk")
    state_samples = positive(state_samples, "state_samples")
    accumulator_bytes = positive(accumulator_bytes, "accumulator_bytes")
    if not isinstance(save_seconds, int | float | np.number) or not save_seconds >= 0:
        raise ValueError(f"save_seconds={save_seconds!r} must be a number of seconds, at least 0.")
    _check(net, plane, route, state)
    check_fits(loss, dataset)
    points = real(points)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"points must have shape [P, 2] with P >= 1, got {points.shape}.")
    work = _Evaluation(net, loss, dataset, plane, points, route == "plain", sample_chunk, branch_chunk, point_chunk)
    num_samples = len(dataset.y)
    chosen = np.unique(np.linspace(0, num_samples - 1, min(state_samples, num_samples)).round().astype(int))
    has_state = has_statistics(work.head.states[0])
    estimate = has_state and state == "estimate"
    some = work.batch(chosen if estimate else slice(0, 0))
    keep = _momenta(net, work.head, some) if estimate else None
    states = States(net, keep, some, work.chunk)
    saver = Saver(
        None if partial is None else local_path(partial),
        lambda: {
            **_identity(net, loss, dataset, plane, work.head, work.batch(slice(0, 2))),
            "points": arrays_digest(points),
            "state": [state, state_samples] if has_state else None,
            "route": route,
            "size of the parts": [sample_chunk, work.size, work.chunk, *work.branches[0], *work.branches[-1]],
        },
        save_seconds,
    )
    work.done = saver.load(len(points))
    group_size = 1
    if work.held is None:  # a block of branches serves several batches
        room = accumulator_bytes // _SHARE_IN_MEMORY if plane.in_memory and keep is None else accumulator_bytes
        group_size = max(1, room // (4 * len(points) * dataset.num_outputs * sample_chunk))
    with (
        on_exception(lambda: saver.save(work.done)),
        jax.default_matmul_precision("highest"),
        ThreadPoolExecutor(compiled.workers()) as pool,
        Progress(
            len(work.batches) * len(points) * len(work.branches), label, work.count(), first=COMPILING
        ) as progress,
    ):
        for start, count in blocks(len(work.batches), group_size):
            group = range(start, start + count)
            for number, block in work.blocks_to_do(group):
                states.turn_to(*work.branches[number])
                for index in group:
                    for taken in work.advance(index, number, block, states, pool):
                        progress.update(taken)
                        saver.save_if_due(work.done)
    saver.remove()
    return work.done.sums / num_samples


class _Evaluation:
    """The work of `evaluate_points`: batches of samples x blocks of points x blocks of branches.

    Attributes:
      points: slices of the points, small enough that all workers get some and an interruption loses little.
      size: of each, filled up by points that are there already, so that one program serves every call.
      batches: slices of the samples.
      branches: `(first, count)` of the blocks of branches; `last` is the index of the last one.
      chunk: branches at a time in a block.
      held: the plane over all branches where its networks are in memory and one block.
      head: the first branch of each, or the whole where the network is no sum of branches.
      done: what is through.
    """

    def __init__(
        self,
        net: Network,
        loss: Loss,
        dataset: Dataset,
        plane: Plane,
        points: np.ndarray,
        plain: bool,
        sample_chunk: int,
        branch_chunk: int | None,
        point_chunk: int,
    ) -> None:
        self._loss, self._dataset, self._plane = loss, dataset, plane
        self._multiple = point_chunk if net.stem is not None and not plain else 1
        self.size = max(1, min(compiled.points_at_once(), len(points)) // self._multiple) * self._multiple
        self.points = [slice(first, first + count) for first, count in blocks(len(points), self.size)]
        self._padded = [np.resize(points[which], (self.size, 2)) for which in self.points]
        self.batches = [slice(first, first + count) for first, count in blocks(len(dataset.y), sample_chunk)]
        self.head = plane.block(0, 1) if net.stacked is not None else plane.whole()
        check_inputs(net, self.head.params[0], self.head.states[0], dataset)
        self.branches = [(0, plane.num_branches)]
        self.chunk = branch_chunk or compiled.chunk()
        if net.stacked is not None and not plain:
            one = self.head.params[0], self.head.states[0]
            x = jax.eval_shape(standardise, dataset.x[:sample_chunk], dataset.mean, dataset.std)
            at_once = branch_chunk is None and net.stem is not None and compiled.on_gpu()
            count = block_size(net, one, x, 1 if at_once else self.chunk, len(points))
            if at_once:
                self.chunk = count = even_size(plane.num_branches, count)
            self.branches = blocks(plane.num_branches, count)
        self.last = len(self.branches) - 1
        self.held = plane.whole() if plane.in_memory and not self.last else None
        self.done = Work.none(len(points))
        self._kernels = functools.partial(
            compiled.kernels,
            net,
            loss,
            plain,
            branch_chunk=self.chunk,
            together=point_chunk,
            gpu=compiled.on_gpu(),
        )
        self._x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
        self._outputs: Any = None  # shape and type of the outputs at some points, once they are known

    def batch(self, which: slice | np.ndarray) -> Array:
        """Examples as the network takes them."""
        return standardise(self._dataset.x[which], self._dataset.mean, self._dataset.std)

    def count(self) -> int:
        """How many steps are done, each a point, a batch of samples and a block of branches."""
        chunk = self.batches[0].stop
        through = int(np.ceil(self.done.seen / chunk).sum()) * len(self.branches)
        return through + sum(count * self._length(unit[1]) for unit, (count, _) in self.done.parts.items())

    def _length(self, block: int) -> int:
        return self.points[block].stop - self.points[block].start

    def _added(self, batch: int, block: int) -> int:
        """How many blocks of branches a batch of samples has had at a block of points."""
        if self.done.seen[self.points[block]].min() > self.batches[batch].start:
            return self.last + 1
        return self.done.parts[batch, block][0] if (batch, block) in self.done.parts else 0

    def blocks_to_do(self, group: range) -> Iterator[tuple[int, Block]]:
        """The blocks of branches that some of these batches need, with their numbers, read ahead."""

        def read(first: int, count: int) -> Block:
            return self._plane.block(first, count) if self.held is None else self.held

        begun = min(self._added(batch, block) for batch in group for block in range(len(self.points)))
        return enumerate(read_ahead(read, self.branches[begun:]), begun)

    def advance(self, batch: int, number: int, block: Block, states: States, pool: ThreadPoolExecutor) -> Iterator[int]:
        """Adds a block of branches to the outputs of a batch wherever it is next; gives the steps done after each."""
        todo = [p for p in range(len(self.points)) if self._added(batch, p) == number]
        if not todo:
            return
        kernels = self._kernels(count=self.branches[number][1])
        which = self.batches[batch]
        x, y = self.batch(which), jnp.asarray(self._dataset.y[which])
        z = kernels.below(block.params, x)
        if self._outputs is None:
            few = jax.tree.map(lambda leaf: leaf[: self._multiple], states.find(todo[0], block, self._padded[todo[0]]))
            self._outputs = jax.eval_shape(kernels.outputs, block, few, z, jnp.zeros((self._multiple, 2), float))
            check_outputs(self._outputs.update(shape=self._outputs.shape[1:]), self._loss, self._dataset)
        wide = accumulator(self._outputs.dtype)
        nothing = 0, jnp.zeros((self.size, len(y), *self._outputs.shape[2:]), wide)
        totals = [self.done.parts.get((batch, p), nothing)[1] for p in todo]
        labels = y if number == self.last else None

        def add(p: int, total: Array) -> Any:
            here = states.find(p, block, self._padded[p])
            return compiled.advance(kernels, block, here, z, labels, self._x64, total, self._padded[p])

        for p, values in zip(todo, pool.map(add, todo, totals), strict=True):
            if labels is None:
                self.done = self.done.with_part((batch, p), number + 1, values)
            else:
                losses = values[: self._length(p)]
                self.done = self.done.with_losses((batch, p), self.points[p], losses, which.stop)
            yield self.count()


def _momenta(net: Network, head: Block, x: Array) -> PyTree:
    """`statistics.momenta` of one branch, or of a network that is no sum of branches."""
    params, state = head.params[0], head.states[0]
    with jax.default_matmul_precision("highest"):
        if net.stacked is None:
            return momenta(net, params, state, x)
        params, state = jax.tree.map(lambda leaf: leaf[0], (params, state))
        return momenta(net.stacked.branch, params, state, x)


def _identity(net: Network, loss: Loss, dataset: Dataset, plane: Plane, head: Block, x: Array) -> dict[str, Any]:
    """What decides the losses at given points: the network, the loss, the data and the plane."""

    def shapes(tree: PyTree) -> PyTree:
        """Those of all branches."""
        lead = (lambda s: (plane.num_branches, *s[1:])) if net.stacked is not None else (lambda s: s)
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(lead(leaf.shape), leaf.dtype), tree)

    network = shapes(head.params[0]), shapes(head.states[0])
    outputs = jax.eval_shape(lambda p, s, x: net.apply(p, s, x)[0], *network, x)
    return {
        "network": function_digest(lambda p, s, x: net.apply(p, s, x)[0], *network, x),
        "loss": function_digest(loss.per_example, outputs, dataset.y[: len(x)]),
        "data": arrays_digest(dataset.x, dataset.y, dataset.mean, dataset.std),
        "plane": combined(plane.digest, arrays_digest(plane.coefficients)),
        **versions(),
    }


def _check(net: Network, plane: Any, route: str, state: str) -> None:
    if not isinstance(plane, Plane):
        raise TypeError(
            f"the plane must be a landscape.Plane, got {type(plane).__name__}; arguments come in the order net, loss,"
            " dataset, plane."
        )
    if route not in ROUTES:
        raise UnknownNameError(unknown("route", route, ROUTES))
    check_state(state)
    if route == "stem" and net.stem is None:
        raise ValueError("route='stem' needs a network with a stem; this one names none. Use 'auto' or 'plain'.")
    for source in plane.sources:
        check_source(net, source)
    if route == "plain" and not plane.in_memory:
        raise ValueError("route='plain' takes a whole network at once; networks on disk need 'auto' or 'stem'.")
