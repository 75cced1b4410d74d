"""A trained network as a handle, in memory or on disk: what reads it need not know which.

The handle is a `types.BranchSource`: a number of branches, and parameters and state of a few of them at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from dualgap_jax import trees
from dualgap_jax.types import BranchSource, Network, Params, State

BLOCK_BYTES = 2**27  # of one network's parameters, pre-activations or states at all points, in a block of branches


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory:
    """A network whose parameters and state are in memory.

    Attributes:
      params: the parameters, as the network's `init` gives them; of a sum of branches, leaves `[I, ...]`.
      state: its state, likewise; `()` for a network without one.
    """

    params: Params
    state: State = ()

    @property
    def num_branches(self) -> int:
        """I: the length of the first axis that all leaves share; 1 where they share none."""
        lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves((self.params, self.state))}
        return lengths.pop()[0] if len(lengths) == 1 and lengths != {()} else 1

    def read(self, first: int, count: int) -> tuple[Params, State]:
        """Parameters and state of branches `first .. first + count - 1`; of all of them, the arrays themselves."""
        if (first, count) == (0, self.num_branches):
            return self.params, self.state
        return trees.rows(self.params, first, count), trees.rows(self.state, first, count)


def check_source(net: Network, source: Any) -> None:
    """Checks that a network can be evaluated from a handle.

    Raises:
      TypeError: where it is no handle.
      ValueError: where the numbers of branches differ, or a network that is no sum of branches is not in memory.
    """
    if not isinstance(source, BranchSource):
        raise TypeError(
            f"a trained network is given as a handle, got {type(source).__name__}: write"
            " networks.InMemory(params, state), or take Solution.network."
        )
    if net.stacked is None:
        if not isinstance(source, InMemory):
            raise ValueError(
                "only a network made by multi_branch is read block by block; this one is no sum of branches."
            )
    elif net.stacked.num_branches != source.num_branches:
        raise ValueError(
            f"the network has {net.stacked.num_branches} branches, the solutions have {source.num_branches}."
        )


def block_size(net: Network, one: tuple[Params, State], x: Any, branch_chunk: int, num_points: int = 0) -> int:
    """Branches in a block: as many as keep parameters and pre-activations within bounds, whole chunks of them.

    Args:
      net: a network of `multi_branch`.
      one: parameters and state of any number of branches, for their shapes.
      x: the batch whose pre-activations are kept, or its shape, or None.
      branch_chunk: what the result is a multiple of.
      num_points: at how many points the states of a block are kept.
    """
    stem = net.stacked.branch.stem if net.stacked is not None else None
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), one)
    z = jax.eval_shape(jax.vmap(stem.preactivation, (0, None)), one[0], x) if stem and x is not None else ()
    size = BLOCK_BYTES // max(trees.num_bytes(one), trees.num_bytes(z), num_points * trees.num_bytes(one[1]), 1)
    return max(1, size // branch_chunk) * branch_chunk


def even_size(total: int, size: int) -> int:
    """A size of blocks of at most `size`, and above half of it where that can be, which suits a compiler of kernels.

    A multiple of 8, for which sums over branches need no padding, and one that divides the total, if there is one, so
    that one program serves all blocks; the total itself, where it fits.
    """
    if total <= size or size < 8:
        return min(total, size)
    for divisor in range(size - size % 8, size // 2, -8):
        if total % divisor == 0:
            return divisor
    even = -(-total // -(-total // size))
    return min(even + -even % 8, size - size % 8)


def blocks(total: int, size: int) -> list[tuple[int, int]]:
    """`(first, count)` of consecutive blocks of `size`; the last one may be smaller."""
    return [(first, min(size, total - first)) for first in range(0, total, size)]


def read_ahead(read: Callable[..., Any], blocks: Sequence[tuple[int, int]]) -> Iterator[Any]:
    """`read(first, count)` of each block in turn, the next one read in a thread while the caller works on this one."""
    if len(blocks) < 2:
        yield from itertools.starmap(read, blocks)
        return
    x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64

    def load(first: int, count: int) -> Any:
        with jax.enable_x64(x64):  # holds in one thread only
            return jax.block_until_ready(read(first, count))

    with ThreadPoolExecutor(1) as reader:
        future = reader.submit(load, *blocks[0])
        for following in [*blocks[1:], None]:
            block = future.result()
            if following is not None:
                future = reader.submit(load, *following)
            yield block
