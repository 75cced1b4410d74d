"""What the loop asks of whoever takes the steps, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from dualgap_jax.checkpoints import Stored
from dualgap_jax.networks import upcast
from dualgap_jax.types import BranchSource, KeyArray, Params, PyTree, State

Transformation: TypeAlias = optax.GradientTransformationExtraArgs  # as `optimizers.for_network` makes them
Lanes = Any  # the carries of a group under way, as an engine keeps them
LeafReader = Callable[[Any, Stored], Any]


class Carry(NamedTuple):
    """What a step changes, for one solution."""

    params: Params
    state: State
    opt_state: PyTree


class Steps(NamedTuple):
    """Steps `first, ..., first + length - 1` of all lanes.

    Attributes:
      schedule_state: leaves `[lanes, ...]`.
      keys: `[lanes]`, of the noise.
      base_rate: what the schedule's factors multiply.
      indices: `[lanes, length, batch]` of the examples; None is the full data set.
      first: index of the first step.
      length: number of steps.
    """

    schedule_state: PyTree
    keys: Array
    base_rate: float
    indices: np.ndarray | None
    first: int
    length: int


@runtime_checkable
class Engine(Protocol):
    """Takes the steps of a group of solutions.

    `Together` keeps a group in memory and runs whole segments in one program; `Streamed` takes one solution of any size
    step by step, on one device or a mesh.  The loop joins the carries of a group into lanes, advances them, and takes
    them apart again; in between the lanes are the only copy.

    Attributes:
      stride: how many steps `advance` takes at most in one call.
      any_length: whether calls for fewer steps need no program of their own, so that a call may be cut short.
    """

    stride: int
    any_length: bool

    def start(self, key: KeyArray, /) -> Carry:
        """The carry of a solution at step 0, drawn with its key."""
        ...

    def template(self, key: KeyArray, /) -> Carry:
        """Shapes, dtypes and placement of a carry, for reading one from a checkpoint."""
        ...

    def reader(self, is_over: bool, /) -> LeafReader | None:
        """How leaves of a checkpoint are read; None is where JAX puts them.

        Args:
          is_over: whether the run has ended, so that a network that stays on disk need not be held.
        """
        ...

    def join(self, carries: Sequence[Carry], /) -> Lanes:
        """The carries of a group as lanes."""
        ...

    def part(self, lanes: Lanes, lane: int, /) -> Carry | None:
        """The carry of one lane; None where the network stays on disk."""
        ...

    def stored(self, lanes: Lanes, lane: int, /) -> Carry:
        """The carry of one lane for a checkpoint; with several processes each gives its own part of it."""
        ...

    def is_finite(self, lanes: Lanes, lane: int, /) -> bool:
        """Whether all parameters and states of one lane are finite.  With several processes all must call."""
        ...

    def advance(self, lanes: Lanes, steps: Steps, /) -> tuple[Lanes, np.ndarray]:
        """Takes some steps, at most `stride`; takes the lanes over.

        Returns:
          The new lanes, and the losses `[lanes, length]` before each step.
        """
        ...

    def network(self, carry: Carry | None, folder: Path | None, /) -> BranchSource:
        """A finished network, in memory or where it is read on disk."""
        ...

    def plan(self, max_steps: int, num_solutions: int, checkpoints: Path | None, /) -> str:
        """What training will take, as text; empty where that is not worth saying."""
        ...


def begin(transformation: Transformation, params: Params, state: State) -> Carry:
    """The carry at step 0.  The optimiser works in float32 at least, whatever the parameters are stored in."""
    return Carry(params, state, transformation.init(upcast(params)))


def updated(
    transformation: Transformation, gradient: Params, opt_state: PyTree, params: Params, rate: Array, loss: Array
) -> tuple[Params, PyTree]:
    """Parameters and optimiser state after one step, `w + rate * update`, in the parameters' own formats.

    A gradient that JAX gives of complex parameters is the conjugate of the direction of steepest ascent.
    """
    gradient = jax.tree.map(jnp.conj, upcast(gradient))
    updates, opt_state = transformation.update(gradient, opt_state, upcast(params), value=loss)
    return jax.tree.map(lambda w, u: (w + rate * u).astype(w.dtype), params, updates), opt_state


_AT_ONCE = 2**20  # numbers


def all_finite(tree: PyTree, lane: int | None = None) -> bool:
    """Whether every number is finite that this process holds of a tree, or of one lane of its leaves `[lanes, ...]`.

    On CPU the numbers are read where they lie, a few at a time: a program would write a byte or more for each.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return all(_all_finite(part) for leaf in leaves for part in _parts(leaf, lane))


def _parts(leaf: Array, lane: int | None) -> Iterator[np.ndarray | Array]:
    """What lies of a leaf, or of one lane of it, on each device of this process that has the duty for it."""
    for shard in leaf.addressable_shards:
        if shard.replica_id != 0:
            continue
        # NumPy's view on CPU is of this handle: the leaf can be donated.
        part = np.asarray(shard.data) if shard.device.platform == "cpu" else shard.data
        if lane is None:
            yield part
        elif (first := shard.index[0].start or 0) <= lane < first + len(part):
            yield part[lane - first, ...]


def _all_finite(part: np.ndarray | Array) -> bool:
    if not isinstance(part, np.ndarray):
        return bool(_all_finite_on_device(part))
    flat = part.reshape(-1)
    return all(bool(np.isfinite(flat[i : i + _AT_ONCE]).all()) for i in range(0, flat.size, _AT_ONCE))


@jax.jit
def _all_finite_on_device(numbers: Array) -> Array:
    return jnp.isfinite(numbers).all()


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Trees of one structure as one, leaves `[len(trees), ...]`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def item(tree: PyTree, index: int) -> PyTree:
    """One of the trees that `stack` put together."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
