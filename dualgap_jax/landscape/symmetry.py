"""Which permutations of units and branches leave a network the same, and networks permuted by them.

Hidden units of a layer may change places, if the next layer follows them; so may whole branches, which only meet in a
sum, and, where there is one hidden layer, the units of all branches.  Trained networks lie in one of so many copies of
the same valley; a landscape through three of them shows which copies they are in, unless they are aligned first
(`landscape.align`; Entezari et al., 2022; Ainsworth et al., 2023).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualgap_jax import trees
from dualgap_jax.networks.sources import InMemory
from dualgap_jax.types import BranchSource, Network, Params, PyTree, State

Units = Mapping[str, int]
Parts = dict[tuple[int, ...], np.ndarray]  # by groups of units, outer one first: `[I, *sizes, numbers]`
_CHECKED = 3  # branches that the check draws
_TOLERANCE = 1e-3  # relative; units that do not belong together change outputs by their own size


class Axis(NamedTuple):
    """Where the units of a group stand in a leaf.

    Attributes:
      leaf: the index of the leaf among those of `(params, state)`.
      axis: which of its axes counts them, the branch axis not counted.
      repeats: how often they follow one another along it: of a flattened image, once for each pixel.
    """

    leaf: int
    axis: int
    repeats: int


class Group(NamedTuple):
    """Hidden units that may change places.

    Attributes:
      size: how many there are in a branch.
      axes: where they stand.
    """

    size: int
    axes: tuple[Axis, ...]


class Symmetry(NamedTuple):
    """The exchangeable units of a network, its first hidden layer first.

    Attributes:
      groups: one for each hidden layer; none of a network without one.
      structure: the tree structure of `(params, state)`.
    """

    groups: tuple[Group, ...]
    structure: Any


class Permutation(NamedTuple):
    """Where branches and units of a permuted network come from.

    Attributes:
      branches: `[I]`: new branch i is the old branch `branches[i]`.
      units: of each group `[I, size]`: new unit u of branch i is the old unit `units[i, u] % size` of the old branch
        `units[i, u] // size`, which is `branches[i]` unless units go from branch to branch.
    """

    branches: np.ndarray
    units: tuple[np.ndarray, ...]


def names(params: Params, state: State) -> list[str]:
    """The names that `units` may use: of the leaves of `params` and `state`, such as 'params.0.kernel'."""
    paths = jax.tree_util.tree_leaves_with_path({"params": params, "state": state})
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def symmetry(params: Params, state: State, units: Sequence[Units] | None = None) -> Symmetry:
    """The exchangeable units of a network.

    Args:
      params, state: those of a network of `multi_branch`, leaves `[I, ...]`, or their shapes.
      units: for each hidden layer, first one first, the leaves in which its units stand and the axis that counts them
        (the branch axis not counted): `[{'params.0.kernel': 0, 'params.0.bias': 0, 'params.1.kernel': 1}]`.  None:
        found for chains of layers, `networks.mlp` and Linen modules of `Conv`, `Dense` and `BatchNorm` with the names
        that Linen gives.

    Raises:
      ValueError: for a network that is no such chain, a name that is no leaf, or sizes that do not fit.
    """
    leaves, structure = jax.tree.flatten((params, state))
    index = {name: k for k, name in enumerate(names(params, state))}
    groups = []
    for layer in _chain(params, index, leaves) if units is None else units:
        unknown = [name for name in layer if name not in index]
        if unknown:
            raise ValueError(f"units name no leaf {unknown[0]!r}. Allowed: {', '.join(index)}.")
        lengths = {name: leaves[index[name]].shape[1:][axis] for name, axis in layer.items()}
        size = min(lengths.values(), default=0)
        wrong = [name for name, length in lengths.items() if size == 0 or length % size]
        if wrong or not layer:
            raise ValueError(f"units of one layer stand along axes of {lengths} numbers; take multiples of one size.")
        axes = []
        for name, axis in layer.items():
            rank = len(leaves[index[name]].shape) - 1
            axes.append(Axis(index[name], axis % rank, lengths[name] // size))
        groups.append(Group(size, tuple(axes)))
    in_groups = [axis.leaf for group in groups for axis in group.axes]
    if any(in_groups.count(leaf) > 2 for leaf in in_groups):
        raise ValueError(
            "a leaf may stand in the units of two layers at most: of those that enter and of those that leave."
        )
    return Symmetry(tuple(groups), structure)


def _chain(params: Params, index: Mapping[str, int], leaves: Sequence[Any]) -> list[Units]:
    """The units of a chain of layers, by the names of its leaves.

    Raises:
      ValueError: where the names are not those of a chain.
    """

    def shape(name: str) -> tuple[int, ...]:
        return tuple(leaves[index[name]].shape[1:])

    kernels = [name for name in index if name.startswith("params.") and name.endswith("kernel")]
    if isinstance(params, tuple | list):
        kernels.sort(key=lambda name: int(name.split(".")[1]))
        out, into = 0, 1
    else:
        found = [(re.fullmatch(r"params\.(Conv|Dense)_(\d+)\.kernel", name), name) for name in kernels]
        if not kernels or any(match is None for match, _ in found):
            raise ValueError(
                f"the parameters {', '.join(index)} are not those of a chain of layers that is known; name its units:"
                " units=[{'params.….kernel': axis, …}, …]."
            )
        kernels = [name for *_, name in sorted((m[1], int(m[2]), name) for m, name in found if m is not None)]
        out, into = -1, -2
    layers: list[Units] = []
    for number, (kernel, following) in enumerate(itertools.pairwise(kernels)):
        width = shape(kernel)[out]
        layer: dict[str, int] = {kernel: out, following: into}
        stem = kernel.removesuffix("kernel")
        beside = [f"{stem}bias"]
        beside += [f"params.BatchNorm_{number}.{leaf}" for leaf in ("scale", "bias")]
        beside += [f"state.batch_stats.BatchNorm_{number}.{leaf}" for leaf in ("mean", "var")]
        layer |= {name: 0 for name in beside if name in index and shape(name) == (width,)}
        layers.append(layer)
    return layers


def _permuted(tree: PyTree, known: Symmetry, by: Permutation) -> PyTree:
    """The tree of a network (leaves `[I, ...]`) after a permutation of rows that it holds."""
    leaves = jax.tree.leaves(tree)
    moved = []
    for number, leaf in enumerate(leaves):
        array = np.asarray(leaf)
        places = [(a, units, g.size) for g, units in zip(known.groups, by.units, strict=True) for a in g.axes]
        places = [place for place in places if place[0].leaf == number]
        if len(places) == 1:  # units may come from other branches
            (axis, units, size) = places[0]
            folded = _folded(array, axis, size)
            result = folded.reshape(-1, *folded.shape[2:])[units]
            moved.append(_unfolded(result, axis, array.shape[1:]))
            continue
        array = array[by.branches]
        for axis, units, size in places:
            folded = _folded(array, axis, size)
            chosen = (units % size).reshape(*units.shape, *[1] * (folded.ndim - 2))
            array = _unfolded(np.take_along_axis(folded, chosen, axis=1), axis, array.shape[1:])
        moved.append(array)
    alike = [jnp.asarray(m) if isinstance(leaf, Array) else m for m, leaf in zip(moved, leaves, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(tree), alike)


def _folded(leaf: np.ndarray, axis: Axis, size: int) -> np.ndarray:
    """`[I, size, ...]`: the units first, and what else there is of each, times of repetition included."""
    front = np.moveaxis(leaf, axis.axis + 1, -1)
    front = front.reshape(*front.shape[:-1], axis.repeats, size)
    return np.moveaxis(front, -1, 1)


def _unfolded(folded: np.ndarray, axis: Axis, shape: tuple[int, ...]) -> np.ndarray:
    """The leaf `[I, *shape]` again."""
    back = np.moveaxis(folded, 1, -1)
    back = back.reshape(*back.shape[:-2], -1)
    return np.ascontiguousarray(np.moveaxis(back, -1, axis.axis + 1).reshape(folded.shape[0], *shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Permuted:
    """A network whose branches and units have changed places, read from another one that may lie on disk.

    Attributes:
      source: the network itself.
      symmetry: its exchangeable units.
      permutation: where each branch and unit comes from.
    """

    source: BranchSource
    symmetry: Symmetry
    permutation: Permutation

    @property
    def num_branches(self) -> int:
        """I."""
        return self.source.num_branches

    def read(self, first: int, count: int) -> tuple[Params, State]:
        """Parameters and state of branches `first .. first + count - 1`."""
        rows = slice(first, first + count)
        branches, units = self.permutation.branches[rows], [u[rows] for u in self.permutation.units]
        owners = [branches, *(u // g.size for u, g in zip(units, self.symmetry.groups, strict=True))]
        low, high = min(int(o.min()) for o in owners), max(int(o.max()) for o in owners) + 1
        nearer = [u - low * g.size for u, g in zip(units, self.symmetry.groups, strict=True)]
        return _permuted(self.source.read(low, high - low), self.symmetry, Permutation(branches - low, tuple(nearer)))


def permuted(source: BranchSource, known: Symmetry, by: Permutation) -> BranchSource:
    """The network after a permutation: in memory if it was, else read from where it lies, a block at a time."""
    moved = Permuted(source, known, by)
    return InMemory(*moved.read(0, source.num_branches)) if isinstance(source, InMemory) else moved


def random_permutation(
    known: Symmetry, num_branches: int, rng: np.random.Generator, *, over: str = "branches"
) -> Permutation:
    """A permutation drawn at random: of branches and of the units in each, or of the units of all branches."""
    branches = np.arange(num_branches) if over == "units" else rng.permutation(num_branches)
    units = []
    for group in known.groups:
        if over == "units":
            units.append(rng.permutation(num_branches * group.size).reshape(num_branches, group.size))
        else:
            inner = rng.permuted(np.tile(np.arange(group.size), (num_branches, 1)), axis=1)
            units.append(branches[:, None] * group.size + inner)
    return Permutation(branches, tuple(units))


def check(net: Network, known: Symmetry, like: tuple[Params, State], x: Any, over: str) -> None:
    """Checks on random weights that permutations leave the outputs of a network as they are.

    Args:
      net: a network of `multi_branch`.
      known: what is said of its units.
      like: parameters and state of one branch at least.
      x: a batch of examples.
      over: 'branches' or 'units'; see `align`.

    Raises:
      ValueError: if outputs change by more than rounding.
    """
    rng = np.random.default_rng(0)
    branch = net.stacked.branch if net.stacked is not None else net

    def drawn(leaf: Any, *, state: bool) -> Any:
        leaf = np.asarray(leaf)
        if not trees.is_float(leaf):
            return jnp.asarray(leaf[:1].repeat(_CHECKED, 0))
        numbers = rng.standard_normal((_CHECKED, *leaf.shape[1:]))
        return jnp.asarray(0.5 + np.abs(numbers) if state else numbers, leaf.dtype)  # variances are positive

    params, statistics = (jax.tree.map(functools.partial(drawn, state=k == 1), tree) for k, tree in enumerate(like))

    def outputs(network: tuple[Params, State]) -> np.ndarray:
        y, _ = jax.jit(jax.vmap(lambda p, s: branch.apply(p, s, jnp.asarray(x), train=False)))(*network)
        return np.asarray(y, np.float64)

    before = outputs((params, statistics))
    by = random_permutation(known, _CHECKED, rng, over=over)
    after = outputs(_permuted((params, statistics), known, by))
    if over == "units":
        before, after = before.sum(0), after.sum(0)
    else:
        before = before[by.branches]
    if not np.abs(after - before).max(initial=0) <= _TOLERANCE * np.abs(before).max(initial=1e-30):
        raise ValueError(
            "a permutation of the units changes the outputs of this network, so the units are not those of a chain of"
            " layers" + (" with one hidden layer" if over == "units" else "") + "; name them with units=[{…}, …]."
        )
