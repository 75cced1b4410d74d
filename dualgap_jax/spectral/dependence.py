"""Exact linear dependencies among rows of X.

Rounding cannot tell a row that depends on others from one that all but does, and to the optimum of problem (4) that
is all the difference.  Data are numbers with finitely many bits, so that it can be decided: a singular value
decomposition proposes which rows may depend on each other, and integer arithmetic proves that they do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

_MOST_ROWS = 64  # a dependency among more rows is not looked for
_MOST_WORK = 20_000_000  # products of integers


class Dependencies(NamedTuple):
    """Integer combinations of rows that are exactly zero.

    Attributes:
      rows: the rows of X that take part, `[q]`.
      coefficients: `[k, q]`, linearly independent Python integers; `coefficients @ (2^-powers * X[rows]) = 0`.
      powers: `[q]`, the power of two that each row is divided by.
    """

    rows: np.ndarray
    coefficients: np.ndarray
    powers: np.ndarray

    @property
    def number(self) -> int:
        """k, by how much they lower the rank of X."""
        return len(self.coefficients)


NONE = Dependencies(np.zeros(0, int), np.zeros((0, 0), object), np.zeros(0, int))


def find_dependencies(blocks: Iterable[np.ndarray], directions: np.ndarray) -> Dependencies:
    """Returns what of the exact dependencies among rows that are not zero could be proven.

    Args:
      blocks: columns of X, `[d_0, b]` each, with rows of norms of one order.
      directions: `[k, d_0]`, orthonormal, combinations of the rows that rounding cannot tell from zero.
    """
    involved = _involved(directions)
    if not 0 < len(involved) <= _MOST_ROWS:
        return NONE
    columns = _distinct(blocks, involved)
    if columns is None:
        return NONE
    whole, powers = _integers(columns)
    if _rank_modulo_prime(whole) == len(whole):
        return NONE
    return Dependencies(involved, _left_null_space(whole), powers)


def null_directions(x: np.ndarray, floor: float) -> np.ndarray:
    """Combinations `[k, d_0]` of the rows that are not zero, which X has at most at `floor` of the largest."""
    present = x.any(axis=1)
    left, sigma, _ = np.linalg.svd(x[present], full_matrices=False)
    whole = np.linalg.qr(left[:, : np.sum(sigma > floor * sigma.max(initial=0.0))], mode="complete")[0]
    rest = whole.T[np.sum(sigma > floor * sigma.max(initial=0.0)) :]
    directions = np.zeros((len(rest), len(x)))
    directions[:, present] = rest
    return directions


def _involved(directions: np.ndarray) -> np.ndarray:
    """The rows that take part in sparse combinations that span the same space."""
    basis = np.array(directions, np.float64)
    taken: list[int] = []
    for index in range(len(basis)):
        free = np.abs(basis[index:])
        at, column = (int(v) for v in np.unravel_index(np.argmax(free), free.shape))
        if free[at, column] < 1e-6:
            basis = basis[:index]
            break
        basis[[index, index + at]] = basis[[index + at, index]]
        basis[index] /= basis[index, column]
        others = np.arange(len(basis)) != index
        basis[others] -= np.outer(basis[others, column], basis[index])
        taken.append(column)
    return np.flatnonzero((np.abs(basis) > 1e-6).any(axis=0)) if taken else np.zeros(0, int)


def _distinct(blocks: Iterable[np.ndarray], rows: np.ndarray) -> np.ndarray | None:
    """The different columns of these rows, `[q, u]`; None if they are too many to look at."""
    found = np.zeros((len(rows), 0))
    for block in blocks:
        part = np.asarray(block[rows], np.float64)
        found = np.unique(np.concatenate([found, part], axis=1), axis=1)
        if found.size * len(rows) > _MOST_WORK:
            return None
    return found


def _integers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Python integers `[q, u]`, and the power of two that each row was divided by."""
    mantissas, exponents = np.frexp(values)
    exponents = np.where(values == 0, np.iinfo(np.int32).max, exponents) - 53
    powers = exponents.min(axis=1)
    shifts = np.where(values == 0, 0, exponents - powers[:, None])
    digits = (mantissas * 2.0**53).astype(np.int64).astype(object)
    return digits * np.frompyfunc(lambda s: 1 << int(s), 1, 1)(shifts), powers


def _rank_modulo_prime(matrix: np.ndarray, prime: int = 2**31 - 1) -> int:
    """The rank over a finite field, which is at most the rank."""
    rest = (matrix % prime).astype(np.int64)
    rank = 0
    while rank < len(rest) and rest[rank:].any():
        pivot, column = (int(v[0]) for v in np.nonzero(rest[rank:]))
        rest[[rank, rank + pivot]] = rest[[rank + pivot, rank]]
        rest[rank] = rest[rank] * pow(int(rest[rank, column]), -1, prime) % prime
        rest[rank + 1 :] = (
            rest[rank + 1 :] - rest[rank + 1 :, column : column + 1] * rest[rank][None, :] % prime
        ) % prime
        rank += 1
    return rank


def _left_null_space(matrix: np.ndarray) -> np.ndarray:
    """A basis `[k, q]` of the combinations of rows that are zero, by elimination without fractions."""
    q, u = matrix.shape
    null = np.array([[int(i == j) for j in range(q)] for i in range(q)], object).reshape(q, q)
    order = np.random.default_rng(0).permutation(u)
    seen = min(u, 4 * q)
    while len(null):
        images = null @ matrix[:, order[:seen]]
        rough = np.argwhere(images != 0)
        if not len(rough):
            if seen == u:
                break
            seen = u
            continue
        pivot, column = rough[0]
        factors = images[:, column]
        eliminated = factors[pivot] * null - factors[:, None] * null[pivot][None, :]
        null = np.delete(eliminated, pivot, axis=0)
        for row in null:
            row[:] = row // math.gcd(*row)
    return null
