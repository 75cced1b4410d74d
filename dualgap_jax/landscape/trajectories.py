"""The path that a network took in training, in the plane of its two main directions.

As in Li et al. (NeurIPS 2018): the principal components of the differences of snapshots from the last of them, found
from their matrix of inner products (float64), so that the snapshots may lie on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from dualgap_jax import trees
from dualgap_jax.landscape.planes import Plane, check_alike
from dualgap_jax.landscape.products import DegeneratePlaneError, read_all
from dualgap_jax.types import BranchSource, PyTree

_PIECE = 2**20  # numbers of all snapshots in float64 at a time


class Trajectory(NamedTuple):
    """Snapshots of a network seen from the plane of their two main directions.

    Attributes:
      plane: its origin is the last snapshot, its axes are of length 1 and orthogonal.
      coordinates: `[T, 2]` the projections of the snapshots.
      explained: `[T - 1]` the share of each direction in the squared distances from the last snapshot, largest first.
    """

    plane: Plane
    coordinates: Float[np.ndarray, "t 2"]
    explained: Float[np.ndarray, " s"]


class _Gram:
    """Inner products of the differences of snapshots from the last, added up piece by piece in float64."""

    def __init__(self, count: int) -> None:
        self.total = np.zeros((count - 1, count - 1))

    def add(self, snapshots: Sequence[PyTree]) -> None:
        """Takes in some leaves or rows of the snapshots."""
        for leaves in zip(*map(jax.tree.leaves, snapshots), strict=True):
            if not trees.is_float(leaves[0]):
                continue
            flat = [np.ascontiguousarray(leaf).reshape(-1) for leaf in leaves]
            length = max(1, _PIECE // len(flat))
            for first in range(0, flat[0].size, length):
                piece = np.asarray([leaf[first : first + length] for leaf in flat], np.float64)
                away = piece[:-1] - piece[-1]
                self.total += away @ away.T


def trajectory(snapshots: Sequence[BranchSource]) -> Trajectory:
    """The plane of the two main directions of a path in parameter space, and the path in it.

    `train(..., snapshot=...)` hands out snapshots.  The loss around the path is `evaluate` of the plane.

    Args:
      snapshots: at least three networks of one kind, in order, the last one in the middle of the plane.

    Raises:
      TypeError: for what is no handle.
      ValueError: for fewer than three snapshots, or unlike ones.
      DegeneratePlaneError: if they lie on a line (identical ones included) or are not finite.
    """
    snapshots = tuple(snapshots)
    if len(snapshots) < 3:
        raise ValueError(f"a trajectory needs at least three snapshots, got {len(snapshots)}.")
    row_bytes = check_alike(snapshots, "snapshots")
    last = snapshots[-1]
    gram = _Gram(len(snapshots))
    digest = read_all(lambda *rows: [s.read(*rows) for s in snapshots], last.num_branches, row_bytes, gram.add)
    if not np.isfinite(gram.total).all():
        raise DegeneratePlaneError("a snapshot holds numbers that are not finite (a diverged run?).")
    squares, directions = (part[..., ::-1] for part in np.linalg.eigh(gram.total))
    if squares[1] <= 1e-12 * squares[0] or squares[0] <= 0:
        raise DegeneratePlaneError("the snapshots are identical or lie on a line, so they span no plane; take others.")
    lengths = np.sqrt(squares[:2])
    directions = directions[:, :2] * np.where(directions[0, :2] < 0, -1, 1)  # the path begins at positive coordinates
    combined = (directions / lengths).T
    coefficients = np.zeros((3, len(snapshots)))
    coefficients[0, -1] = 1
    coefficients[1:, :-1] = combined
    coefficients[1:, -1] = -combined.sum(1)
    plane = Plane(snapshots, coefficients, np.zeros((1, 2)), "pca", digest)
    coordinates = np.concatenate([directions * lengths, np.zeros((1, 2))])
    return Trajectory(plane, coordinates, np.maximum(squares, 0) / np.trace(gram.total))
