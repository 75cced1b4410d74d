"""Data in memory in coordinates of the row space of X: what the methods work on."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from dualgap_jax.spectral.problem import narrowest
from dualgap_jax.spectral.scaling import Powers
from dualgap_jax.spectral.solution import default_rtol


class Reduced(NamedTuple):
    """Data in coordinates of the row space of X: with `X = U_x S V_x^T` cut to its numerical rank.

    Attributes:
      targets: `C = Y V_x`, `[d_H, m]`, so that `Yt = C V_x^T`; m = min(d_0, n), zero beyond the rank.
      inputs: `X V_x = U_x S`, `[d_0, m]`.
      inverse: `V_x^T X^+ = S^+ U_x^T`, `[m, d_0]`.
      basis: `V_x^T`, `[m, n]`.
      fit: `A = Y X^+` without a cut but that of rounding, also where `targets` is cut further, `[d_H, d_0]`.
      whiten: `(X P)^+` with the same cut, up to a rotation, `[d_0, m]`.
      blur: how far rounding may turn each direction of X that it keeps, `[m]`.
      unresolved: number of directions that rounding hides.
    """

    targets: Float[Array, "d_H m"]
    inputs: Float[Array, "d_0 m"]
    inverse: Float[Array, "m d_0"]
    basis: Float[Array, "m n"]
    fit: Float[Array, "d_H d_0"]
    whiten: Float[Array, "d_0 m"]
    blur: Float[Array, " m"]
    unresolved: Array


def reduce_rows(
    x: Float[Array, "d_0 n"], y: Float[Array, "d_H n"], rtol: ArrayLike | None = None, dependent: ArrayLike = 0
) -> Reduced:
    """Both matrices in an orthonormal basis of the row space of X.

    Args:
      x, y: data, one example a column.
      rtol: singular values of X at most this share of the largest count as zero; `default_rtol` if None.
      dependent: number of directions in the space of the rows, zero rows aside, in which X is known to be exactly 0.
    """
    left, sigma, right = jnp.linalg.svd(x, full_matrices=False)
    rounding = default_rtol(*x.shape)
    share = rounding if rtol is None else rtol
    keep, visible = sigma > share * sigma[0], sigma > rounding * sigma[0]
    keep &= visible
    known, safe = jnp.where(visible, 1 / jnp.where(visible, sigma, 1), 0), jnp.where(keep, sigma, 0)
    inverse = jnp.where(keep, known, 0)
    targets = y @ right.T
    whiten = left * known[None, :]
    rows = jnp.sum(jnp.any(x != 0, axis=1)) - dependent
    return Reduced(
        targets * keep[None, :],
        left * safe[None, :],
        inverse[:, None] * left.T,
        right,
        (targets * visible[None, :]) @ whiten.T,
        whiten,
        4 * jnp.finfo(x.dtype).eps * known * jnp.sum(jnp.abs(left), axis=0),
        jnp.maximum(jnp.minimum(rows, len(sigma)) - jnp.sum(visible), 0),
    )


class Problem(NamedTuple):
    """What the methods work on: problem (4) in its own unit, see `scaling`, float64.

    Attributes:
      x, y, gamma, widths: the problem.
      reduced: the data in coordinates of the row space of X.
      powers: from the problem as it was given to this one.
      dtype: in which the weights are returned; the certificate is that of the weights as returned.
    """

    x: Array
    y: Array
    gamma: Array
    widths: tuple[int, ...]
    reduced: Reduced
    powers: Powers
    dtype: str

    @property
    def r(self) -> int:
        return narrowest(self.widths, self.x.shape[0], *self.y.shape)
