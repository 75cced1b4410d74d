"""The Lanczos algorithm with full reorthogonalisation, for several symmetric matrices and start vectors at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

_LOOK = 5  # steps between two looks at the Ritz values


class Tridiagonal(NamedTuple):
    """What some steps have found, for each of P start vectors and G matrices.

    Attributes:
      steps: m, how many.
      values: `[P, G, m]` the Ritz values, ascending.
      errors: `[P, G, m]`: rounding aside, an eigenvalue lies within this of each.
      weights: `[P, G, m]` squared first components: Gauss quadrature of the spectral measure of the start vector.
    """

    steps: int
    values: Float[np.ndarray, "p g m"]
    errors: Float[np.ndarray, "p g m"]
    weights: Float[np.ndarray, "p g m"]


def lanczos(
    apply: Callable[[np.ndarray], np.ndarray],
    start: Float[np.ndarray, "p g n"],
    steps: int,
    done: Callable[[Tridiagonal], bool],
) -> Tridiagonal:
    """Lanczos steps from each start vector, until `done` or `steps` of them.

    Where a Krylov space is exhausted the next vector is drawn at random, orthogonal to it: the tridiagonal matrix falls
    into blocks, whose eigenvalues are the matrix's own.

    Args:
      apply: the products `[P, G, n]` of the G matrices with vectors `[P, G, n]`.
      start: vectors that are not zero.
      steps: at most this many, at most n.
      done: looks at what is found, every few steps.
    """
    rng = np.random.default_rng(0)
    basis = np.zeros((*start.shape[:2], steps, start.shape[2]), start.dtype)
    diagonal, beside = np.zeros((*start.shape[:2], steps)), np.zeros((*start.shape[:2], steps))
    vector = _unit(start)[0]
    tiny = 10 * np.finfo(start.dtype).eps
    for step in range(steps):
        basis[:, :, step] = vector
        vector = apply(vector)
        diagonal[..., step] = np.einsum("pgn,pgn->pg", basis[:, :, step], vector, dtype=np.float64)
        known = basis[:, :, : step + 1]
        vector = _orthogonal(vector, known)
        unit, norm = _unit(vector)
        scale = np.maximum(np.abs(diagonal[..., : step + 1]).max(-1), beside[..., : step + 1].max(-1))
        ended = norm <= tiny * scale
        beside[..., step] = np.where(ended, 0.0, norm)
        if ended.any() and step + 1 < steps:
            drawn = _orthogonal(rng.standard_normal(vector.shape).astype(vector.dtype), known)
            unit = np.where(ended[..., None], _unit(drawn)[0], unit)
        vector = unit
        if step + 1 == steps or (step + 1) % _LOOK == 0:
            found = _ritz(diagonal[..., : step + 1], beside[..., : step + 1])
            if step + 1 == steps or done(found):
                break
    return found


def _unit(vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of length 1 along the last axis (0 of 0), and the lengths, also where squares leave the range."""
    power = np.frexp(np.abs(vector).max(-1))[1]
    scaled = np.ldexp(vector, -power[..., None])
    norm = np.linalg.norm(scaled, axis=-1)
    return scaled / np.where(norm > 0, norm, 1)[..., None], np.ldexp(norm.astype(np.float64), power)


def _orthogonal(vector: np.ndarray, basis: np.ndarray) -> np.ndarray:
    for _ in range(2):  # twice is enough (Kahan and Parlett)
        within = basis @ vector[..., None]  # [P, G, m, 1]
        vector = vector - (basis.swapaxes(-1, -2) @ within)[..., 0]
    return vector


def _ritz(diagonal: np.ndarray, beside: np.ndarray) -> Tridiagonal:
    steps = diagonal.shape[-1]
    matrix = np.zeros((*diagonal.shape, steps))
    index = np.arange(steps)
    matrix[..., index, index] = diagonal
    matrix[..., index[1:], index[:-1]] = matrix[..., index[:-1], index[1:]] = beside[..., :-1]
    values, vectors = np.linalg.eigh(matrix)
    return Tridiagonal(steps, values, np.abs(beside[..., -1:] * vectors[..., -1, :]), vectors[..., 0, :] ** 2)
