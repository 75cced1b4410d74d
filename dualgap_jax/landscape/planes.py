"""Planes in parameter space: through three networks, or along two random directions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from dualgap_jax import trees
from dualgap_jax.identity import arrays_digest
from dualgap_jax.landscape.products import DegeneratePlaneError, Products, coordinates, read_all
from dualgap_jax.networks import upcast
from dualgap_jax.networks.sources import InMemory
from dualgap_jax.registry import UnknownNameError, unknown
from dualgap_jax.sizes import count, is_whole
from dualgap_jax.types import BranchSource, KeyArray, Params, PyTree, State

AXES = ("authors", "orthonormal")


class Block(NamedTuple):
    """A plane over some branches, or over a whole network: `w(a, b) = origin + a u + b v`.

    Attributes:
      params: origin, u and v, trees of one structure.
      states: the same of the network state (running statistics, ...).
      floor: the least value that each number of an interpolated state may take: that of the networks which span the
        plane where all of them are at least 0, as variances are; else minus infinity.
    """

    params: tuple[Params, ...]
    states: tuple[State, ...]
    floor: State


@dataclasses.dataclass(frozen=True, eq=False)
class Plane:
    """A two-dimensional affine plane in parameter space, `w(a, b) = origin + a u + b v`.

    Nothing of it is computed before it is asked for, a block of branches at a time, so that the networks which span it
    may lie on disk; the numbers are the same bits wherever they are.  Of networks in memory it is computed once.

    Attributes:
      sources: the networks that span it, three or more; of a random plane, its middle and the two directions.
      coefficients: `[3, m]`: origin, u and v (rows) as combinations of these (columns).
      anchors: `[k, 2]`: plane coordinates of the networks that it goes through (k = 3, or k = 1 where that is the
        middle of the plane).
      axes: 'authors', 'orthonormal', 'random' or 'pca' (of a trajectory).
      digest: the SHA-256 of the networks, which tells this plane from others.
    """

    sources: tuple[BranchSource, ...]
    coefficients: Float[np.ndarray, "3 m"]
    anchors: Float[np.ndarray, "k 2"]
    axes: str
    digest: str

    @property
    def num_branches(self) -> int:
        """I of the networks; 1 of networks that are no sums of branches."""
        return self.sources[0].num_branches

    @property
    def in_memory(self) -> bool:
        """Whether all of its networks are in memory."""
        return all(isinstance(source, InMemory) for source in self.sources)

    def block(self, first: int, count: int) -> Block:
        """The plane over branches `first .. first + count - 1`, with floating numbers of at least float32."""
        read = [source.read(first, count) for source in self.sources]
        params, states = [upcast(p) for p, _ in read], [upcast(s) for _, s in read]
        return Block(_span(self.coefficients, params), _span(self.coefficients, states), _floor(states))

    def whole(self) -> Block:
        """The plane over all branches at once, for networks that fit into memory three times."""
        return self._held if self.in_memory else self.block(0, self.num_branches)

    @functools.cached_property
    def _held(self) -> Block:
        return self.block(0, self.num_branches)


@jax.jit
def _combine(coefficients: Array, members: Sequence[PyTree]) -> PyTree:
    """`sum_k coefficients[k] * members[k]`; leaves that are not floating keep the value of the first tree."""

    def leaf(first: Array, *others: Array) -> Array:
        if not trees.is_float(first):
            return first
        total = coefficients[0].astype(first.dtype) * first
        for c, other in zip(coefficients[1:], others, strict=True):
            total = total + c.astype(first.dtype) * other
        return total

    return jax.tree.map(leaf, *members)


def _span(coefficients: Float[np.ndarray, "3 m"], members: Sequence[PyTree]) -> tuple[PyTree, ...]:
    """Origin, u and v as combinations of trees; a single tree is itself, not 1 times it plus 0 times others."""
    if np.array_equal(coefficients, np.eye(3)):
        return tuple(jax.tree.map(jnp.asarray, member) for member in members)
    return tuple(_combine(jnp.asarray(row), members) for row in coefficients)


@jax.jit
def _floor(states: Sequence[State]) -> State:
    def leaf(*values: Array) -> Array:
        least = values[0]
        for value in values[1:]:
            least = jnp.minimum(least, value)
        return jnp.where(least >= 0, least, -jnp.inf) if jnp.issubdtype(least.dtype, jnp.floating) else least

    return jax.tree.map(leaf, *states)


def at(a: Array, b: Array, origin: PyTree, u: PyTree, v: PyTree) -> PyTree:
    """`origin + a u + b v`, leaf by leaf; leaves that are not floating keep their value at the origin."""

    def leaf(o: Array, du: Array, dv: Array) -> Array:
        return o + a.astype(o.dtype) * du + b.astype(o.dtype) * dv if trees.is_float(o) else o

    return jax.tree.map(leaf, origin, u, v)


def plane_through(networks: Sequence[BranchSource], axes: str = "authors") -> Plane:
    """The plane through three networks w0, w1, w2, with the origin at their mean.

    One pass over the networks finds the coordinates; norms and inner products are summed in float64.  For networks on
    disk it shows its progress.

    Args:
      networks: three trained networks of one kind: `Solution.network`, `networks.InMemory(params, state)`, or any other
        `types.BranchSource`.
      axes: 'authors': `u = (w0 - w1) |w2| / |w0 - w1|` and `v = (w0 - w2) |w2| / |w0 - w2|`, not orthogonalised, as in
        the authors' code; 'orthonormal': Gram-Schmidt of `w1 - w0` and `w2 - w0`, so that plane coordinates are true
        distances.

    Raises:
      DegeneratePlaneError: if the networks lie on a line (identical ones included) or are not finite.
      TypeError: if they are not given as handles.
      ValueError: if there are not three of them, or their structures differ.
      UnknownNameError: for unknown axes.
    """
    if axes not in AXES:
        raise UnknownNameError(unknown("axes", axes, AXES))
    if not isinstance(networks, Iterable):
        raise TypeError(f"a plane needs three trained networks, got {networks!r}.")
    networks = tuple(networks)
    if len(networks) != 3:
        raise ValueError(f"a plane needs three solutions, got {len(networks)}.")
    row_bytes = check_alike(networks, "three solutions")
    products = Products()
    rows = networks[0].num_branches
    digest = read_all(lambda *which: [network.read(*which) for network in networks], rows, row_bytes, products.add)
    coefficients, anchors = coordinates(products, axes)
    return Plane(networks, coefficients, anchors, axes, digest)


def check_alike(networks: Sequence[Any], name: str) -> int:
    """Checks that networks are handles of one kind.

    Args:
      networks: at least one.
      name: what they are called in messages.

    Returns:
      The bytes of one row (branch) of the parameters of one.

    Raises:
      TypeError: if they are not given as handles.
      ValueError: if their numbers of branches, structures or shapes differ.
    """
    for network in networks:
        if not isinstance(network, BranchSource):
            raise TypeError(
                f"the {name} must be trained networks, got {type(network).__name__}: write"
                " networks.InMemory(params, state), or take Solution.network."
            )
    numbers = [network.num_branches for network in networks]
    if len(set(numbers)) > 1:
        raise ValueError(f"the {name} have {numbers} branches; take them from one network.")
    head = [network.read(0, 1) for network in networks]
    shapes = [jax.tree.map(lambda leaf: (np.shape(leaf), leaf.dtype), pair) for pair in head]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"the {name} differ in structure or shapes; take them from one network.")
    return trees.num_bytes(head[0][0])


def random_plane(key: KeyArray, network: InMemory, *, filter_axis: int = 0, branch_axes: int = 1) -> Plane:
    """A plane through a network along two filter-normalised random directions (Li et al., NeurIPS 2018).

    Each filter of a Gaussian direction is scaled to the norm of the same filter of the network; biases and other
    vectors do not move, and neither does its state.

    Args:
      key: where the two directions are drawn from.
      network: the network in the middle of the plane, in memory.
      filter_axis: the axis of a kernel that counts its filters, after the branch axes: 0 for `networks.mlp` (`[out,
        in]`), -1 for Linen and NNX kernels (`[..., in, out]`).
      branch_axes: the number of leading branch axes: 1 for a network of `multi_branch`, 0 for a single branch.

    Raises:
      TypeError: for what is no network in memory, or no key.
      ValueError: for an axis that some kernel does not have or that is no whole number.
      DegeneratePlaneError: if nothing moves: no leaf has filters, or all of them are 0; or numbers are not finite.
    """
    if not isinstance(network, InMemory):
        raise TypeError(f"random_plane takes networks.InMemory(params, state), got {type(network).__name__}.")
    branch_axes = count(branch_axes, "branch_axes")
    if not is_whole(filter_axis):
        raise ValueError(f"filter_axis={filter_axis!r:.60} must be a whole number, of an axis.")
    try:
        jax.random.fold_in(key, 0)
    except TypeError as error:
        raise TypeError(f"key={key!r:.60} must be a key of JAX, such as jax.random.key(0).") from error
    params, state = network.params, network.state
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        rank = leaf.ndim - branch_axes
        if rank >= 2 and trees.is_float(leaf) and not -rank <= filter_axis < rank:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(f"filter_axis={filter_axis} is no axis of {name}, {leaf.shape[branch_axes:]} in a branch.")

    def direction(key: KeyArray) -> Params:
        leaves, treedef = jax.tree.flatten(params)
        moved = []
        for index, leaf in enumerate(leaves):
            if leaf.ndim - branch_axes < 2 or not trees.is_float(leaf):
                moved.append(jnp.zeros_like(leaf))
                continue
            kept = filter_axis + (branch_axes if filter_axis >= 0 else leaf.ndim)
            over = tuple(i for i in range(branch_axes, leaf.ndim) if i != kept)
            noise = jax.random.normal(jax.random.fold_in(key, index), leaf.shape, leaf.dtype)
            # Scaled by a power of two, so that squares neither overflow nor vanish.
            power = jnp.frexp(jnp.max(jnp.abs(leaf), axis=over, keepdims=True))[1]
            squares = jnp.sum(jnp.ldexp(leaf, -power) ** 2, axis=over, keepdims=True)
            moved.append(jnp.ldexp(noise * jnp.sqrt(squares / jnp.sum(noise**2, axis=over, keepdims=True)), power))
        return jax.tree.unflatten(treedef, moved)

    still = jax.tree.map(jnp.zeros_like, state)
    u, v = (InMemory(direction(jax.random.fold_in(key, i)), still) for i in range(2))
    largest = np.max([0.0, *(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(u.params) if trees.is_float(leaf))])
    if not 0 < largest < np.inf:
        raise DegeneratePlaneError(
            f"a random plane moves filters; those of this network are 0 or not finite, or no leaf has {branch_axes}"
            " branch axes and two more."
        )
    digest = arrays_digest(params, state, u.params, v.params)
    return Plane((network, u, v), np.eye(3), np.zeros((1, 2)), "random", digest)
