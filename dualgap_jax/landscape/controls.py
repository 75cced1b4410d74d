"""Controls of an alignment: is it the right permutation that lowers barriers, or any, or only the nearer plane?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from dualgap_jax import seeds, trees
from dualgap_jax.landscape.alignment import Alignment
from dualgap_jax.landscape.symmetry import permuted, random_permutation
from dualgap_jax.networks import upcast
from dualgap_jax.networks.sources import InMemory
from dualgap_jax.types import BranchSource, Params, PyTree, State


class Controls(NamedTuple):
    """Networks in place of the aligned ones, in the order given; the one that all were aligned to is as it was.

    Attributes:
      random: each after a permutation drawn at random, of the same kind.
      crossed: each after the permutation that was found for another of them.
      shrunk: the networks as trained, moved straight towards the one aligned to, until they are as near to it as the
        aligned ones; they compute other functions.
    """

    random: tuple[BranchSource, ...]
    crossed: tuple[BranchSource, ...]
    shrunk: tuple[BranchSource, ...]


def controls(networks: Sequence[BranchSource], found: Alignment, *, seed: int = 0) -> Controls:
    """The controls of an alignment.

    Args:
      networks: those that were given to `align`, at least three.
      found: what it returned.
      seed: of the permutations drawn.

    Raises:
      ValueError: for fewer than three networks, or another number than were aligned.
    """
    if len(networks) != len(found.networks) or len(networks) < 3:
        raise ValueError(f"controls need the networks that were aligned, three at least; got {len(networks)}.")
    moved = [k for k in range(len(networks)) if k != found.to]
    rng = seeds.generator(seed)
    random, crossed, shrunk = ([*networks] for _ in range(3))
    for k, other in zip(moved, [*moved[1:], moved[0]], strict=True):
        drawn = random_permutation(found.symmetry, networks[k].num_branches, rng, over=found.over)
        random[k] = permuted(networks[k], found.symmetry, drawn)
        crossed[k] = permuted(networks[k], found.symmetry, found.permutations[other])
        before, after = found.distances[k]
        between = Between(networks[found.to], networks[k], float(after / before) if before else 1.0)
        in_memory = isinstance(networks[k], InMemory) and isinstance(networks[found.to], InMemory)
        shrunk[k] = InMemory(*between.read(0, between.num_branches)) if in_memory else between
    return Controls(tuple(random), tuple(crossed), tuple(shrunk))


@dataclasses.dataclass(frozen=True, eq=False)
class Between:
    """A network on the segment between two others that may lie on disk, `start + share (end - start)`."""

    start: BranchSource
    end: BranchSource
    share: float

    @property
    def num_branches(self) -> int:
        """I."""
        return self.start.num_branches

    def read(self, first: int, count: int) -> tuple[Params, State]:
        """Parameters and state of branches `first .. first + count - 1`."""
        ends = (upcast(source.read(first, count)) for source in (self.start, self.end))

        def leaf(a: PyTree, b: PyTree) -> PyTree:
            return a + np.asarray(self.share, a.dtype) * (b - a) if trees.is_float(a) else a

        return jax.tree.map(leaf, *ends)
