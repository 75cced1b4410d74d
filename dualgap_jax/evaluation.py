"""A trained network on a whole data set: loss, accuracy and margins."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from dualgap_jax.config import ConfigError, require
from dualgap_jax.data import Dataset, as_dataset, standardise
from dualgap_jax.losses import Loss, as_loss, measure
from dualgap_jax.networks import accumulator, check_network, sum_branches, upcast
from dualgap_jax.networks.sources import block_size, blocks, check_source, read_ahead
from dualgap_jax.sizes import positive
from dualgap_jax.terminal import COMPILING, Progress
from dualgap_jax.types import BranchSource, Network, Params, State


class Evaluation(NamedTuple):
    """A network on a whole data set.

    Attributes:
      loss: mean loss, summed in float64; NaN where an output is NaN.
      accuracy: share of examples classified correctly; NaN for regression.  An example with an output that is not
        finite is not.
      margins: `[n]`, or None for a loss without margin.
    """

    loss: float
    accuracy: float
    margins: Float[np.ndarray, " n"] | None


def check_fits(loss: Loss, dataset: Dataset) -> None:
    """Raises ConfigError unless the loss takes labels of the kind that the data set has."""
    require(
        dataset.task in loss.tasks,
        f"the loss fits {' and '.join(loss.tasks)} labels, but data set {dataset.name!r} has {dataset.task} labels.",
    )


def check_inputs(net: Network, params: Params, state: State, dataset: Dataset) -> None:
    """Raises ConfigError where a network does not take the examples of a data set, as of another width than it saw.

    Args:
      net: the network's functions.
      params, state: of the network; of a sum of branches, some of them are enough.
      dataset: whose examples it is to take.
    """
    first = dataset.x[:1]

    def run(params: Params, state: State) -> Any:
        x, params, state = standardise(first, dataset.mean, dataset.std), upcast(params), upcast(state)
        if net.stacked is not None:
            return sum_branches(net.stacked.branch, params, state, x)
        if net.stem is not None:
            return net.stem.preactivation(params, x)
        return net.apply(params, state, x)

    try:
        jax.eval_shape(run, params, state)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the network does not take examples of shape {first.shape[1:]}, as those of data set {dataset.name!r} are:"
            f" {error}"
        ) from error


def check_outputs(outputs: jax.ShapeDtypeStruct | Array, loss: Loss, dataset: Dataset) -> None:
    """Refuses a network that is not for the labels of a data set.

    A loss that was made of a plain function takes outputs of every kind, if it takes these.

    Args:
      outputs: of a batch, or their shape and type.
      loss: what is taken of them.
      dataset: whose labels they are compared with.

    Raises:
      ConfigError: unless there is an output for each class, two at least (more do no harm: a part of a data set may
        lack the last class), or one for signs and for real targets; and for complex outputs.
    """
    shape = outputs.shape
    require(
        loss.plain or not jnp.issubdtype(outputs.dtype, jnp.complexfloating),
        f"the network gives outputs of type {outputs.dtype}, and a loss takes real numbers: give it their real part or"
        " absolute value.",
    )
    classes = dataset.task == "multiclass"
    needed = max(2, dataset.num_outputs) if classes else 1
    if loss.plain or (len(shape) == 2 and (shape[1] >= needed if classes else shape[1] == needed)):
        return
    hint = " at least (labels 0 and 1 are two classes; signs -1 and +1 need one output)" * classes
    raise ConfigError(
        f"the network gives outputs of shape [{', '.join(['batch', *map(str, shape[1:])])}], but the {dataset.task}"
        f" labels of data set {dataset.name!r} need [batch, {needed}]{hint}."
    )


def evaluate(
    net: Network,
    loss: Any,
    dataset: Any,
    network: BranchSource,
    *,
    batch_size: int = 1024,
    branch_chunk: int = 128,
    label: str = "evaluation",
) -> Evaluation:
    """Loss, accuracy and margins of a trained network over a data set, in evaluation mode.

    The network is read once, a block of branches at a time, while the outputs `[n, out]` of the whole data set are
    kept; the numbers are the same bits whether it is in memory or on disk.  From several blocks on it shows its
    progress.

    Args:
      net: the network's functions.
      loss: a `losses.Loss`, or a function of outputs and labels.
      dataset: a `data.Dataset`, or a pair of arrays.  It is standardised by its own `mean` and `std`, which have to be
        those of the training set: give a test set as `test.like(train)`.
      network: the trained network: `Solution.network`, `networks.InMemory(params, state)`, or any `types.BranchSource`.
      batch_size: samples at a time.
      branch_chunk: branches at a time.
      label: the name on the progress line.

    Raises:
      ConfigError: if the loss or the network does not fit the data set, or a size is below 1.
      TypeError, ValueError: for a network that is no handle, or of another number of branches than `net` has.
    """
    net, loss, dataset = check_network(net, "evaluate").computed(), as_loss(loss), as_dataset(dataset)
    check_fits(loss, dataset)
    batch_size, branch_chunk = positive(batch_size, "batch_size"), positive(branch_chunk, "branch_chunk")
    check_source(net, network)
    stacked = net.stacked
    head = network.read(0, network.num_branches if stacked is None else 1)
    check_inputs(net, *head, dataset)
    batches = [slice(first, first + count) for first, count in blocks(len(dataset.y), batch_size)]
    branch_blocks = [(0, network.num_branches)]
    if stacked is not None:
        branch_blocks = blocks(network.num_branches, block_size(net, head, None, branch_chunk))

    def outputs(params: Params, state: State, x: Array) -> Array:
        if stacked is None:
            return net.apply(params, state, x)[0]
        return sum_branches(stacked.branch, params, state, x)[0]

    @jax.jit
    def add(total: Array, block: tuple[Params, State], x: Array) -> Array:
        if stacked is None:
            return total + outputs(block[0], block[1], x)
        count = jax.tree.leaves(block)[0].shape[0]
        size = min(branch_chunk, count)

        def some(first: Array | int, size: int) -> Array:
            take = functools.partial(jax.tree.map, lambda leaf: lax.dynamic_slice_in_dim(leaf, first, size, 0))
            return outputs(take(block[0]), take(block[1]), x)

        total = lax.fori_loop(0, count // size, lambda i, acc: acc + some(i * size, size), total)
        return total + some(count - count % size, count % size) if count % size else total

    @jax.jit
    def measured(total: Array, y: Array) -> tuple[Array, Array, Array]:
        return measure(loss, dataset.task, total if stacked is None else stacked.scale * total, y)

    def read(first: int, count: int) -> tuple[Params, State]:
        params, state = network.read(first, count)
        return jax.device_put((upcast(params), upcast(state)))

    totals: dict[int, Array] = {}
    progress = Progress(len(branch_blocks) * len(batches), label, first=COMPILING) if len(branch_blocks) > 1 else None
    try:
        with jax.default_matmul_precision("highest"):
            for number, block in enumerate(read_ahead(read, branch_blocks)):
                for index, which in enumerate(batches):
                    x = standardise(dataset.x[which], dataset.mean, dataset.std)
                    if index not in totals:
                        shape = jax.eval_shape(outputs, block[0], block[1], x)
                        check_outputs(shape, loss, dataset)
                        totals[index] = jnp.zeros(shape.shape, accumulator(shape.dtype))
                    totals[index] = jax.block_until_ready(add(totals[index], block, x))
                    if progress is not None:
                        progress.update(number * len(batches) + index + 1)
            parts = [measured(totals[index], jnp.asarray(dataset.y[which])) for index, which in enumerate(batches)]
    finally:
        if progress is not None:
            progress.close()
    losses, margins, hits = (np.concatenate([np.asarray(p[k], np.float64) for p in parts]) for k in range(3))
    accuracy = float("nan") if dataset.task == "regression" else float(hits.mean())
    return Evaluation(float(losses.mean()), accuracy, margins if loss.margin is not None else None)
