"""Coordinates of the plane through three networks, from one pass over their parameters in float64."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float

from dualgap_jax import trees
from dualgap_jax.networks.sources import blocks, read_ahead
from dualgap_jax.terminal import Progress
from dualgap_jax.types import PyTree, State

_PRODUCT_BYTES = 2**25  # of one network's parameters that inner products take at a time
_PIECE = 2**16  # numbers of each solution in float64 at a time: they stay in cache


class DegeneratePlaneError(ValueError):
    """Solutions that span no plane."""


class Products:
    """Inner products of three solutions and their differences, in float64, added up piece by piece.

    The vectors are w0, w1, w2, d1 = w0 - w1 and e = d2 - c d1 with d2 = w0 - w2.  The overlap c is that of the first
    piece in which d1 is not zero.  Where the solutions lie on a line it is the overlap of all pieces, so that e is
    small and its norm tells how far from a line they are; from |d1|, |d2| and d1 . d2 half the digits would be lost.
    """

    def __init__(self) -> None:
        self._overlap = 0.0
        self._pieces: list[np.ndarray] = []

    def add(self, solutions: Sequence[PyTree]) -> None:
        """Takes in some leaves or rows of the solutions; always in the same portions, for the same bits."""
        for leaves in zip(*map(jax.tree.leaves, solutions), strict=True):
            if not trees.is_float(leaves[0]):
                continue
            flat = [np.ascontiguousarray(leaf).reshape(-1) for leaf in leaves]
            if np.iscomplexobj(flat[0]):
                flat = [leaf.view(leaf.real.dtype) for leaf in flat]
            for first in range(0, flat[0].size, _PIECE):
                self._add_piece([leaf[first : first + _PIECE] for leaf in flat])

    def _add_piece(self, leaves: Sequence[np.ndarray]) -> None:
        vectors = np.empty((5, leaves[0].size))
        with np.errstate(all="ignore"):  # numbers that are not finite are reported at the end
            for row, leaf in zip(vectors, leaves, strict=False):
                row[:] = leaf
            np.subtract(vectors[0], vectors[1], out=vectors[3])
            np.subtract(vectors[0], vectors[2], out=vectors[4])
            if not self._overlap and vectors[3].any():
                self._overlap = float(vectors[3] @ vectors[4] / (vectors[3] @ vectors[3]))
            vectors[4] -= self._overlap * vectors[3]
            self._pieces.append(vectors @ vectors.T)

    def total(self) -> tuple[np.ndarray, float]:
        """The matrix `[5, 5]` of inner products (NaN where one is not finite), and c."""
        stacked = np.asarray(self._pieces).reshape(-1, 25)
        if not np.isfinite(stacked).all():
            return np.full((5, 5), np.nan), self._overlap
        return np.asarray([math.fsum(column) for column in stacked.T]).reshape(5, 5), self._overlap


def read_all(
    read: Callable[[int, int], Sequence[tuple[PyTree, State]]],
    rows: int,
    row_bytes: int,
    add: Callable[[Sequence[PyTree]], None],
) -> str:
    """One pass over networks of so many rows (branches); shows its progress where they are several blocks.

    Args:
      read: the networks' parameters and states, given the first row and how many.
      rows: how many there are.
      row_bytes: of one network.
      add: takes the parameters of some rows in.

    Returns:
      The SHA-256 of all that was read.
    """
    portions = blocks(rows, max(1, _PRODUCT_BYTES // max(row_bytes, 1)))
    into = hashlib.sha256()

    def load(first: int, count: int) -> list[PyTree]:
        # Hashed by the thread that reads, which else would wait.
        networks = [jax.tree.map(np.asarray, network) for network in read(first, count)]
        for leaf in jax.tree.leaves(networks):
            into.update(f"{leaf.dtype} {leaf.shape};".encode())
            into.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
        return [params for params, _ in networks]

    progress = Progress(rows, "plane") if len(portions) > 1 else None
    try:
        for (first, count), block in zip(portions, read_ahead(load, portions), strict=True):
            add(block)
            if progress is not None:
                progress.update(first + count, "branches")
    finally:
        if progress is not None:
            progress.close()
    return f"sha256:{into.hexdigest()}"


def coordinates(products: Products, axes: str) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, "3 2"]]:
    """Coefficients `[3, 3]` of origin, u and v (rows) in the solutions (columns), and the anchors `[3, 2]`.

    Raises:
      DegeneratePlaneError: see `planes.plane_through`.
    """
    gram, overlap = products.total()
    if not np.isfinite(gram).all():
        raise DegeneratePlaneError("a solution holds numbers that are not finite (a diverged run?); it spans no plane.")
    norms = np.sqrt(np.diag(gram)[:3])
    square1, cross, square_e = gram[3, 3], gram[3, 4], gram[4, 4]
    n1, n2 = math.sqrt(square1), math.sqrt(max(square_e + 2 * overlap * cross + overlap**2 * square1, 0.0))
    smallest = 1e-6 * max(*norms, 1e-30)
    rest = cross / square1 if n1 > smallest else 0.0  # of the overlap, beyond that of the first piece
    height = math.sqrt(max(square_e - rest * cross, 0.0))
    if min(n1, n2, height) <= smallest:
        raise DegeneratePlaneError(
            "the three solutions are identical or lie on a line, so they span no plane"
            f" (|w0 - w1| = {n1:.3g}, |w0 - w2| = {n2:.3g}); train them from different seeds, or longer."
        )
    overlap += rest
    # In the basis (d1, d2) = (w0 - w1, w0 - w2), relative to the mean: w_k = (1/3 - [k = 1]) d1 + (1/3 - [k = 2]) d2.
    third = 1.0 / 3.0
    oblique = np.array([[third, third], [third - 1, third], [third, third - 1]])
    if axes == "authors":
        if norms[2] <= 0:
            raise DegeneratePlaneError(
                "the third solution is zero, so the authors' axes have no length; use axes='orthonormal'."
            )
        basis = np.diag([norms[2] / n1, norms[2] / n2])  # columns: u, v in terms of d1, d2
    else:
        # e1 = -d1 / n1, e2 = -(d2 - overlap d1) / height
        basis = np.array([[-1.0 / n1, overlap / height], [0.0, -1.0 / height]])
    anchors = np.linalg.solve(basis, oblique.T).T
    # A direction c1 d1 + c2 d2 is (c1 + c2) w0 - c1 w1 - c2 w2.
    directions = [[c[0] + c[1], -c[0], -c[1]] for c in basis.T]
    return np.asarray([[third] * 3, *directions]), anchors
