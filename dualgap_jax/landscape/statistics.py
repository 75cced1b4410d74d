"""Network state over a plane: statistics are estimated anew at every point, for they are not linear in the weights.

Running means and variances belong to the parameters that they were gathered with.  Between and beyond the solutions
they have to be gathered again: the network is applied in training mode to one batch of examples, and its state becomes
what running averages would converge to on that batch.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualgap_jax import trees
from dualgap_jax.landscape.planes import Block, at
from dualgap_jax.networks import branch_keys
from dualgap_jax.registry import UnknownNameError, unknown
from dualgap_jax.types import Network, Params, PyTree, State

STATES = ("estimate", "interpolate")
_FAR = 2.0**20  # states at which a running average still is one; a power of 2, so that momenta are exact
_REMEDY = "pass state='interpolate' to take it along linearly, or evaluate at the solutions only."


def check_state(state: str) -> None:
    """Raises UnknownNameError unless `state` is one of `STATES`."""
    if state not in STATES:
        raise UnknownNameError(unknown("state", state, STATES))


def has_statistics(state: State) -> bool:
    """Whether a network state holds floating numbers; counters and the like stay as they are at the origin."""
    return any(trees.is_float(leaf) for leaf in jax.tree.leaves(state))


def momenta(net: Network, params: Params, state: State, x: Array) -> PyTree:
    """The momentum k of each number of a network's state, `new = k old + (1 - k) (statistic of the batch)`.

    They are found from the states that the network returns in training mode for a few others, far apart: derivatives
    would say 0 of an average that is kept behind a stopped gradient, as those of NNX modules are.

    Args:
      net: one branch, or a network that is no sum of branches.
      params, state: any parameters of it, and a state.
      x: a few examples.

    Raises:
      ValueError: where the state is no running average of what a batch gives, or the examples are not finite.
    """
    floating = jax.tree.map(trees.is_float, state)
    if trees.is_float(x) and not bool(jnp.isfinite(x).all()):
        raise ValueError("examples from which the network's state is estimated anew hold numbers that are not finite.")

    @jax.jit
    def probe(values: Array) -> tuple[list[Array], Array]:
        def run(value: Array) -> tuple[list[Array], Array]:
            filled = jax.tree.map(lambda s, f: jnp.full_like(s, value) if f else s, state, floating)
            y, new = net.apply(params, filled, x, key=jax.random.key(0), train=True)
            return _floats(new), y

        return lax.map(run, values)  # one program for all, so that outputs differ only where states enter them

    found = probe(jnp.asarray([0.0, 1.0, _FAR, -_FAR]))
    new, outputs = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), found)
    output_moves = not np.isclose(outputs, outputs[:1], rtol=1e-5, atol=1e-5, equal_nan=True).all()
    keep = []
    for zero, one, high, low in new:
        slope = (high - low) / (2 * _FAR)
        unchanged = (slope == 1) & (zero == 0)  # a state that training does not touch
        average = (slope >= 0) & (slope < 1)
        points = ((one, 1.0), (high, _FAR), (low, -_FAR))
        linear = [np.isclose(at, zero + slope * s, rtol=1e-3, atol=1e-3) for at, s in points]
        if not ((unchanged | average) & np.all(linear, axis=0)).all() or output_moves:
            raise ValueError(f"the network's state is no running average, so it cannot be estimated anew; {_REMEDY}")
        keep.append(slope)
    return _with(state, [jnp.asarray(slope, leaf.dtype) for slope, leaf in zip(keep, found[0], strict=True)])


def _floats(state: State) -> list[Array]:
    return [leaf for leaf in jax.tree.leaves(state) if trees.is_float(leaf)]


def _with(state: State, values: list[Array]) -> State:
    """The state with its floating leaves replaced."""
    given = iter(values)
    return jax.tree.map(lambda leaf: next(given) if trees.is_float(leaf) else leaf, state)


def interpolated(point: Array, block: Block) -> State:
    """The state on the plane, no number of it below its floor."""
    linear = at(*point, *block.states)
    return jax.tree.map(
        lambda s, least: jnp.where(s < least, least, s) if trees.is_float(s) else s, linear, block.floor
    )


@jax.jit
def _interpolated_at(points: Array, block: Block, x: Array, first: Array | int) -> State:
    """The states at points `[K, 2]`, leaves `[K, ...]`; compiled once for all evaluations."""
    del x, first
    return jax.vmap(interpolated, (0, None))(points, block)


def estimated(net: Network, keep: PyTree, params: Params, state: State, x: Array, key: Any) -> State:
    """What the running averages of one branch, or of a network that is no sum, converge to on a batch."""
    start = jax.tree.map(lambda s: jnp.zeros_like(s) if trees.is_float(s) else s, state)
    new = net.apply(params, start, x, key=key, train=True)[1]

    def settled(new: Array, old: Array, keep: Array) -> Array:
        if not trees.is_float(old):
            return old
        keep = keep.astype(new.dtype)
        return jnp.where(keep < 1, new / jnp.where(keep < 1, 1 - keep, 1), old)

    return jax.tree.map(settled, new, state, keep)


class States:
    """The states of one block of branches at all blocks of points, each found when it is first asked for.

    Args:
      net: the network.
      keep: `momenta`, to estimate states from a batch; None to interpolate them.
      x: that batch.
      branch_chunk: branches at a time.
    """

    def __init__(self, net: Network, keep: PyTree | None, x: Array, branch_chunk: int) -> None:
        self._net, self._keep, self._x, self._branch_chunk = net, keep, x, branch_chunk
        self._x64 = jax.dtypes.canonicalize_dtype(np.float64) == np.float64
        self._of: tuple[int, int] | None = None
        self._found: dict[int, State] = {}
        self._at = jax.jit(self._anew) if keep is not None else _interpolated_at

    def turn_to(self, first: int, count: int) -> None:
        """Branches `first .. first + count - 1` are next; what is known of others is dropped."""
        if self._of != (first, count):
            self._of, self._found = (first, count), {}

    def find(self, number: int, block: Block, points: np.ndarray) -> State:
        """The states at points `[K, 2]`, the block `number` of them, leaves `[K, count, ...]`; safe in any thread."""
        if number not in self._found:
            assert self._of is not None
            with jax.enable_x64(self._x64), jax.default_matmul_precision("highest"):  # both hold in one thread only
                at = jnp.asarray(points, jax.dtypes.canonicalize_dtype(np.float64))
                self._found[number] = self._at(at, block, self._x, self._of[0])
        return self._found[number]

    def _anew(self, points: Array, block: Block, x: Array, first: Array | int) -> State:
        net, keep = self._net, self._keep

        def one(point: Array) -> State:
            params, state = at(*point, *block.params), interpolated(point, block)
            if net.stacked is None:
                return estimated(net, keep, params, state, x, jax.random.key(0))
            branch, count = net.stacked.branch, jax.tree.leaves(params)[0].shape[0]
            keys = branch_keys(jax.random.key(0), first, count)
            return lax.map(
                lambda each: estimated(branch, keep, each[0], each[1], x, each[2]),
                (params, state, keys),
                batch_size=min(self._branch_chunk, count),
            )

        return lax.map(one, points)
