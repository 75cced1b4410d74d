"""The best branches for dual vectors where a closed form names them: linear, squared and gated units.

`-(1/n) sum_j <alpha_j, f(w; x_j)>` is largest on the unit ball where one unit `(u, a)` holds all of w, and then a share
of the largest product that a and u make with

* linear of any depth: the matrix `(1/n) sum_j alpha_j x_j^T`, at its singular vectors;
* gated: the same for the examples that a gate lets through, at the singular vectors of the best gate's;
* squared, one output: `a (1/n) sum_j alpha_j (u.x_j)^2`, at the eigenvectors of `(1/n) sum_j alpha_j x_j x_j^T`.  With
  several outputs this is the spectral norm of a tensor, which is NP-hard (Hillar and Lim, J. ACM 60, 2013); the
  matrices of the outputs, one upon the other, have a singular value at least as large: `sum_k (u^T M_k u)^2 <=
  sum_k ||M_k u||^2`, with equality for one output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dualgap_jax.certify.structure import Structure, open_gates

_EPS = float(np.finfo(np.float64).eps)
_KEPT = 32  # branches that are named


class Best(NamedTuple):
    """Stationary branches, the best first.

    Attributes:
      points: `[k, p]`, of norm 1.
      values: `[k]`, their products, the first of which is rho.
      rounding: by how much a value may be off, as a share of `(1/n) sum_j ||alpha_j|| ||x_j||^order`.
      relative: the same as a share of rho.
    """

    points: np.ndarray
    values: np.ndarray
    rounding: float
    relative: float


def moment(x: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """`(1/n) sum_j alpha_j x_j^T [out, d]`."""
    return alpha.T @ x / len(x)


def square_moments(x: np.ndarray, alpha: np.ndarray) -> Iterator[np.ndarray]:
    """The symmetric matrices `(1/n) sum_j alpha_jk x_j x_j^T [d, d]`, one an output k."""
    for weights in alpha.T:
        made = (weights[:, None] * x).T @ x / len(x)
        yield 0.5 * (made + made.T)


def best(known: Structure, x: np.ndarray, alpha: np.ndarray) -> Best | None:
    """The stationary branches of a linear, gated or (with one output) squared kind; None for every other.

    Args:
      known: what the branch is.
      x: `[n, d]`, as `known.inputs` gives them, of a size that squares do not overflow.
      alpha: `[n, out]`, likewise.
    """
    (n, d), out = x.shape, alpha.shape[1]
    small = min(d, out)
    if known.activation == "square":
        if out > 1:
            return None
        values, vectors = np.linalg.eigh(next(square_moments(x, alpha)))
        order = np.argsort(-np.abs(values), kind="stable")[:_KEPT]
        heads = -np.sign(values[order])
        heads[heads == 0] = 1.0
        points = [known.unit(vectors[:, k], np.array([a])) for k, a in zip(order, heads, strict=True)]
        # The second part is that of a Cholesky factor of the matrix's square.
        return Best(np.stack(points), np.abs(values[order]), (n + d + 64) * _EPS, 2 * (d + 4) ** 2 * _EPS)
    rounding, relative = (n + d + out + 64) * _EPS, 2 * (small + 4) ** 2 * _EPS
    if known.gates is not None:
        found = []
        for k, mask in enumerate(open_gates(known.gates, x).T):
            left, sigma, right = np.linalg.svd(moment(x, mask[:, None] * alpha), full_matrices=False)
            found.append((float(sigma[0]), right[0], -left[:, 0], k))
        found = sorted(found, key=lambda one: -one[0])[:_KEPT]
        points = [known.unit(u, a, k) for _, u, a, k in found]
        return Best(np.stack(points), np.array([value for value, *_ in found]), rounding, relative)
    if known.activation != "identity":
        return None
    matrix = moment(x, alpha)
    if known.degree == 1:
        value = float(np.linalg.norm(matrix))
        point = -(matrix / value).reshape(1, -1) if value > 0 else np.eye(1, matrix.size)
        return Best(point, np.array([value]), rounding, relative)
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    points = [known.unit(u, -a) for u, a in zip(right[:_KEPT], left.T[:_KEPT], strict=True)]
    return Best(np.stack(points), sigma[:_KEPT], rounding, relative)


def unfolded(x: np.ndarray, alpha: np.ndarray) -> tuple[float, float]:
    """The largest singular value of the matrices of squares, one upon the other, and a share of it for rounding."""
    d, out = x.shape[1], alpha.shape[1]
    gram = sum((m @ m for m in square_moments(x, alpha)), np.zeros((d, d)))
    return math.sqrt(max(0.0, float(np.linalg.eigvalsh(gram)[-1]))), (out * d + 2 * d + 16) * (d + 4) * _EPS
