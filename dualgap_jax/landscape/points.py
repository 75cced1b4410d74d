"""The mean loss at points of a plane, a block of branches and a batch of examples at a time."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from dualgap_jax.data import Dataset, as_dataset, standardise
from dualgap_jax.identity import arrays_digest, combined, function_digest, versions
from dualgap_jax.landscape import kernels as compiled
from dualgap_jax.landscape.partial import Saver, on_exception
from dualgap_jax.landscape.planes import Block, Plane
from dualgap_jax.landscape.statistics import States, check_state, has_statistics, momenta
from dualgap_jax.losses import Loss, as_loss
from dualgap_jax.metrics import Progress
from dualgap_jax.networks import check_network
from dualgap_jax.networks.sources import block_size, blocks, check_source, read_ahead
from dualgap_jax.registry import UnknownNameError, unknown
from dualgap_jax.types import Network, PyTree

ROUTES = ("auto", "stem", "plain")
ACCUMULATOR_BYTES = 3 * 2**30  # of outputs kept for all points while networks are read from disk


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
    branch_chunk: int = 32,
    point_chunk: int = 8,
    accumulator_bytes: int = ACCUMULATOR_BYTES,
    partial: Path | None = None,
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
      branch_chunk: branches at a time in the layers above the stem.
      point_chunk: points at a time in the layers above the stem.
      accumulator_bytes: for the outputs kept while networks are read from disk.
      partial: a file that keeps unfinished work; a second call with the same arguments goes on from it.  It is removed
        at the end.  A damaged file is said, by a warning, and computed again.
      save_seconds: least time between two writes of it; longer where a write takes long, a tenth of the time at most.
      label: the name on the progress line.

    Raises:
      UnknownNameError: for an unknown route or state.
      IdentityError: where `partial` holds another evaluation; it names what differs.
      TypeError, ValueError: for arguments of another kind; for route='stem' on a network without one, a size below 1,
        points that are not `[P, 2]`, a plane on disk with route='plain' or with a network that is no sum of branches,
        networks of another number of branches, or state='estimate' for a state that is no running average.
    """
    net, loss, dataset = check_network(net, "landscape.evaluate_points"), as_loss(loss), as_dataset(dataset)
    sizes = {"sample_chunk": sample_chunk, "branch_chunk": branch_chunk, "point_chunk": point_chunk}
    _check_call(net, plane, route, state, sizes | {"state_samples": state_samples})
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"points must have shape [P, 2], got {points.shape}.")
    num_samples, num_points, plain = len(dataset.y), len(points), route == "plain"
    # Blocks of points small enough that all workers get some and an interruption loses little; of one size, so that
    # one program serves every call.
    multiple = point_chunk if net.stem is not None and not plain else 1
    size = max(1, min(64, num_points) // multiple) * multiple
    point_blocks = [slice(first, first + count) for first, count in blocks(num_points, size)]
    padded = [np.resize(points[which], (size, 2)) for which in point_blocks]  # the last one repeats points
    batches = [slice(first, first + count) for first, count in blocks(num_samples, sample_chunk)]

    def batch(which: slice | np.ndarray) -> Array:
        return standardise(dataset.x[which], dataset.mean, dataset.std)

    held = plane.whole() if plane.in_memory else None
    head = plane.block(0, 1) if held is None else (held if net.stacked is None else held.rows(0, 1))
    branch_blocks = [(0, plane.num_branches)]
    if net.stacked is not None and not plain:
        one = head.params[0], head.states[0]
        count = block_size(net, one, batch(slice(0, sample_chunk)), branch_chunk, num_points)
        branch_blocks = blocks(plane.num_branches, count)
    last = len(branch_blocks) - 1

    def read(first: int, count: int) -> Block:
        if held is None:
            return plane.block(first, count)
        return held.rows(first, count) if last else held

    chosen = np.unique(np.linspace(0, num_samples - 1, min(state_samples, num_samples)).round().astype(int))
    has_state = has_statistics(head.states[0])
    keep = _momenta(net, head, batch(chosen)) if has_state and state == "estimate" else None
    states = States(net, keep, batch(chosen), branch_chunk)
    saver = Saver(
        partial,
        lambda: {
            **_identity(net, loss, dataset, plane, head, batch(slice(0, 2))),
            "points": arrays_digest(points),
            "state": [state, state_samples] if has_state else None,
            "route": route,
            "size of the parts": [sample_chunk, size, branch_chunk, *branch_blocks[0], *branch_blocks[-1]],
        },
        save_seconds,
    )
    work = saver.load(num_points)
    x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
    done = int(np.ceil(work.seen / sample_chunk).sum()) * len(branch_blocks)
    done += sum(count * len(points[point_blocks[unit[1]]]) for unit, (count, _) in work.parts.items())

    def added(unit: tuple[int, int]) -> int:
        """How many blocks of branches a batch of samples has had at a block of points."""
        if work.seen[point_blocks[unit[1]]].min() > batches[unit[0]].start:
            return last + 1
        return work.parts[unit][0] if unit in work.parts else 0

    group_size = 1
    if held is None or (keep is not None and last):
        group_size = max(1, accumulator_bytes // (4 * num_points * dataset.num_outputs * sample_chunk))
    empty = None
    with (
        on_exception(lambda: saver.save(work)),
        jax.default_matmul_precision("highest"),
        ThreadPoolExecutor(compiled.workers()) as pool,
        Progress(len(batches) * num_points * len(branch_blocks), label, done=done) as progress,
    ):
        for start, batches_in_group in blocks(len(batches), group_size):
            group = range(start, start + batches_in_group)
            begun = min(added((b, p)) for b in group for p in range(len(point_blocks)))
            for number, block in enumerate(read_ahead(read, branch_blocks[begun:]), begun):
                states.turn_to(*branch_blocks[number])
                k = compiled.kernels(net, loss, plain, branch_blocks[number][1], branch_chunk, point_chunk)
                for b in group:
                    todo = [p for p in range(len(point_blocks)) if added((b, p)) == number]
                    if not todo:
                        continue
                    x, y = batch(batches[b]), jnp.asarray(dataset.y[batches[b]])
                    z = k.below(block.params, x)
                    if empty is None:
                        some = jax.tree.map(lambda leaf: leaf[:multiple], states.find(todo[0], block, padded[todo[0]]))
                        empty = jax.eval_shape(k.outputs, block, some, z, jnp.zeros((multiple, 2), float))
                    wide = jnp.promote_types(empty.dtype, jnp.float32)  # sums of narrow outputs need more digits
                    nothing = 0, jnp.zeros((size, len(y), *empty.shape[2:]), wide)
                    totals = [work.parts.get((b, p), nothing)[1] for p in todo]
                    labels = y if number == last else None

                    def advance(
                        p: int, total: Array, k: Any = k, block: Block = block, z: PyTree = z, y: Array | None = labels
                    ) -> Any:
                        here = states.find(p, block, padded[p])
                        return compiled.advance(k, block, here, z, y, x64, total, padded[p])

                    for p, values in zip(todo, pool.map(advance, todo, totals), strict=True):
                        which = point_blocks[p]
                        if number < last:
                            work = work.with_part((b, p), number + 1, values)
                        else:
                            losses = values[: len(points[which])]
                            work = work.with_losses((b, p), which, losses, min(batches[b].stop, num_samples))
                        done += len(points[which])
                        progress.update(done)
                        saver.save_if_due(work)
    saver.remove()
    return work.sums / num_samples


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


def _check_call(net: Network, plane: Any, route: str, state: str, sizes: Mapping[str, int]) -> None:
    if not isinstance(plane, Plane):
        raise TypeError(
            f"the plane must be a landscape.Plane, got {type(plane).__name__}; arguments come in the order net, loss,"
            " dataset, plane."
        )
    if route not in ROUTES:
        raise UnknownNameError(unknown("route", route, ROUTES))
    check_state(state)
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if route == "stem" and net.stem is None:
        raise ValueError("route='stem' needs a network with a stem; this one names none. Use 'auto' or 'plain'.")
    for source in plane.sources:
        check_source(net, source)
    if route == "plain" and not plane.in_memory:
        raise ValueError("route='plain' takes a whole network at once; networks on disk need 'auto' or 'stem'.")
