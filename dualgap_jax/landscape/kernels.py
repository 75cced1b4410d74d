"""The compiled parts of an evaluation: what all points share, what each point adds, and the loss."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualgap_jax.landscape.planes import Block, at
from dualgap_jax.losses import Loss, sum_loss
from dualgap_jax.networks import sum_branches, sum_rest
from dualgap_jax.networks.sources import blocks
from dualgap_jax.types import Network, PyTree, State


class Kernels(NamedTuple):
    """The compiled parts of an evaluation.

    Attributes:
      below: `(params, x) -> z`: what all points share, the three pre-activations, or x itself.
      add: `(total [P, batch, out], block, states, z, points [P, 2]) -> total`: adds the block's outputs at each point;
        `states` leads with P.
      losses: `(total, y) -> [P]`: the summed loss.
      outputs: `(block, states, z, points [K, 2]) -> [K, batch, out]`: fixes the shape and type of `total`.
    """

    below: Callable[..., Any]
    add: Callable[..., Any]
    losses: Callable[..., Any]
    outputs: Callable[..., Any]


@functools.lru_cache(maxsize=8)
def kernels(net: Network, loss: Loss, plain: bool, count: int, branch_chunk: int, together: int, gpu: bool) -> Kernels:
    """The kernels for blocks of `count` branches, `together` points at a time, as suits GPUs or everything else.

    Without a stem, and on the plain route, points go one after another.
    """
    stacked, stem = (None, None) if plain else (net.stacked, net.stem)
    scale = stacked.scale if stacked is not None else None
    first_layer: Callable[..., Any] | None = stem.preactivation if stem is not None else None
    if stacked is not None and stacked.branch.stem is not None and count < stacked.num_branches:
        first_layer = jax.vmap(stacked.branch.stem.preactivation, (0, None))

    @jax.jit
    def below(params: tuple[PyTree, ...], x: Array) -> PyTree:
        return tuple(first_layer(p, x) for p in params) if first_layer is not None else x

    def cut(block: Block, z: PyTree, first: Array | int, size: int) -> tuple[tuple[PyTree, ...], PyTree]:
        """Parameters and `z` of a few branches; slices of leaves that are not used (the first layer) are not made."""
        take = functools.partial(jax.tree.map, lambda leaf: lax.dynamic_slice_in_dim(leaf, first, size, 0))
        return take(block.params), z if stem is None else take(z)

    def cut_states(states: State, first: Array | int, size: int) -> State:
        return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, size, 1), states)

    def some(params: tuple[PyTree, ...], z: PyTree, states: State, points: Array) -> Array:
        """Outputs `[K, batch, out]` of the sum of a few branches, so few that they stay in cache."""
        branch = stacked.branch  # type: ignore[union-attr]
        if stem is None:
            return lax.map(lambda each: sum_branches(branch, at(*each[0], *params), each[1], z)[0], (points, states))

        def one(point: Array, state: State) -> Array:
            return sum_rest(branch, at(*point, *params), state, at(*point, *z))[0]

        return jax.vmap(one)(points, states)

    def whole(block: Block, states: State, z: PyTree, points: Array) -> Array:
        def one(point: Array, state: State) -> Array:
            w = at(*point, *block.params)
            return (net.apply(w, state, z) if stem is None else stem.rest(w, state, at(*point, *z)))[0]

        return lax.map(lambda each: one(*each), (points, states)) if stem is None else jax.vmap(one)(points, states)

    size = min(branch_chunk, count)

    def outputs(block: Block, states: State, z: PyTree, points: Array) -> Array:
        if stacked is None:
            return whole(block, states, z, points)
        return some(*cut(block, z, 0, size), cut_states(states, 0, size), points)

    def add_to(total: Array, block: Block, states: State, z: PyTree, points: Array) -> Array:
        if stacked is None:
            return total + whole(block, states, z, points)

        def more(first: Array | int, size: int, total: Array) -> Array:
            return total + some(*cut(block, z, first, size), cut_states(states, first, size), points)

        total = lax.fori_loop(0, count // size, lambda i, acc: more(i * size, size, acc), total)
        rest = count % size
        return more(count - rest, rest, total) if rest else total

    together = 1 if stem is None else together

    def by_group(total: Array, block: Block, states: State, z: PyTree, points: Array) -> Array:
        """`add` for groups of points, one after another."""
        return lax.map(lambda group: add_to(group[0], block, group[1], z, group[2]), (total, states, points))

    def by_group_on_gpu(total: Array, block: Block, states: State, z: PyTree, points: Array) -> Array:
        """The same without slices at moving places.

        XLA's GPU compiler copies such a slice aside, on another stream, and everything waits for that copy: they took
        nine tenths of a pass (docs/scaling.md).  So branches are sliced before the loop, at fixed places, and the
        points of a group are a masked sum over those of all groups, which is exact.
        """

        def piece(first: int, size: int) -> Callable[[State, Array], Array]:
            few = cut(block, z, first, size)
            return lambda states, points: some(*few, cut_states(states, first, size), points)

        pieces = [piece(*which) for which in blocks(count, size)]
        if stacked is None:
            pieces = [lambda states, points: whole(block, states, z, points)]

        def group(i: Array, out: Array) -> Array:
            mine = jnp.sum(jnp.where((jnp.arange(len(points)) == i)[:, None, None], points, 0), axis=0)
            here = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, i, 0, keepdims=False), states)
            part = sum((piece(here, mine) for piece in pieces), jnp.zeros_like(total[0]))
            return lax.dynamic_update_index_in_dim(out, part, i, 0)

        return total + lax.fori_loop(0, len(points), group, jnp.zeros_like(total))

    add_groups = by_group_on_gpu if gpu else by_group

    @jax.jit
    def add(total: Array, block: Block, states: State, z: PyTree, points: Array) -> Array:
        grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, together, *leaf.shape[1:]), (total, states, points))
        return add_groups(grouped[0], block, grouped[1], z, grouped[2]).reshape(total.shape)

    @jax.jit
    def losses(total: Array, y: Array) -> Array:
        return jax.vmap(lambda o: sum_loss(loss, o if scale is None else scale * o, y))(total)

    return Kernels(below, add, losses, outputs)


def points_at_once() -> int:
    """Points in a call of a kernel, at most: on GPUs more, since slicing the branches is paid once a call."""
    return 256 if on_gpu() else 64


def on_gpu() -> bool:
    """Whether the kernels of a GPU are wanted."""
    return jax.default_backend() == "gpu"


def workers() -> int:
    """Blocks of points in flight: one a core on CPU, where the small kernels use one core each; two on accelerators."""
    return (os.cpu_count() or 1) if jax.default_backend() == "cpu" else 2


def chunk() -> int:
    """Branches at a time above the stem: on CPU 32, whose activations stay in the cache; on accelerators 256.

    By the estimate of XLA's TPU compiler a pass over 256 at a time takes 0.4 of one over 32 (docs/scaling.md).
    """
    return 32 if jax.default_backend() == "cpu" else 256


def advance(
    k: Kernels, block: Block, states: State, z: PyTree, y: Array | None, x64: bool, total: Array, points: np.ndarray
) -> Any:
    """Adds a block of branches at points `[P, 2]`: the new total, or with labels the losses `[P]`."""
    with jax.enable_x64(x64), jax.default_matmul_precision("highest"):  # both hold in one thread only
        total = k.add(total, block, states, z, jnp.asarray(points, jax.dtypes.canonicalize_dtype(np.float64)))
        if y is None:
            return jax.block_until_ready(total)
        return np.asarray(k.losses(total, y), np.float64)
