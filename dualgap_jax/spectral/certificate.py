"""The lower bound of the optimum, from quantities that are evaluated on the data and not on a factorisation.

Let A be any `d_H x d_0` matrix, meant to be `Y X^+`, and `Lambda = M X` with `||Lambda|| <= gamma`.  With E = Y - A X,
Z = (A - M) X and Q the projector onto the row space of X, `Yt = A X + E Q`, and

    (Yt - Lambda)(Yt - Lambda)^T = Z Z^T + Z E^T + E Z^T + E Q E^T.

Data give the first three terms.  For the last let P project onto the part of the row space that float64 resolves, and
let k be the number of directions that the row space may have beyond it.  Then `E P E^T` has the trace
`||E X^T (X P)^+||_F^2`, which is evaluated, times `SAFETY` for the error of the factor in `(X P)^+`; and the sum of the
r largest eigenvalues of a matrix that is changed by k directions of E grows by at most the min(k, r) largest
eigenvalues of `E E^T` (Ky Fan).  Nothing of what a solver cut from X is therefore missing from the bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from dualgap_jax.spectral.problem import Real, product

SAFETY = 4.0  # (X X^T)^+ <= SAFETY (R^T R)^+ is what the bound on ||E P|| rests on


def lower_bound(
    half_norm: Real,
    resolved: Float[Array, "d_H d_H"],
    projection: ArrayLike,
    misfit: Float[Array, "d_H d_H"],
    unresolved: ArrayLike,
    rounding: ArrayLike,
    r: int,
) -> Real:
    """The dual value (5) at a feasible Lambda, at most.

    Args:
      half_norm: `1/2 ||Y||_F^2`.
      resolved: `Z Z^T + Z E^T + E Z^T`.
      projection: `||E P||_F^2` as bounded through a factor, `SAFETY` included.
      misfit: `E E^T`.
      unresolved: k.
      rounding: of the sums, an allowance.
      r: of the norm, `min(d_0, ..., d_H, n)`.
    """
    top = jnp.sum(jnp.maximum(jnp.linalg.eigvalsh(resolved)[::-1][:r], 0))
    free = jnp.maximum(jnp.linalg.eigvalsh(misfit)[::-1][:r], 0)
    charge = jnp.sum(jnp.where(jnp.arange(len(free)) < unresolved, free, 0))
    return half_norm - 0.5 * (top + projection + charge) - rounding


def dual_rounding(fit: Float[Array, "d_H d_0"], x_squared: ArrayLike, half_norm: Real) -> Real:
    """An estimate of the rounding of the float64 sums in the dual value: `eps ||A||_F ||X||_F ||Y||_F`."""
    return jnp.finfo(jnp.float64).eps * jnp.linalg.norm(fit) * jnp.sqrt(2 * half_norm * x_squared)


def primal_rounding(
    weights: Sequence[Float[Array, "_ _"]], x_squared: ArrayLike, misfit: ArrayLike, half_norm: Real, gamma: ArrayLike
) -> Real:
    """An estimate of the rounding of the float64 sums in problem (4).

    With rounding of the terms of a sum as if independent, `W_H ... W_1 X` is off by
    `eps || |W_H| ... |W_1| ||_F max_j ||x_j||` over rows of X, whose norms are within a factor of 2; the derivative of
    the misfit in it is the residual.  Likewise for the singular values of `W_1 X`.  What any sum has, up to `64 eps` of
    `1/2 ||Y||_F^2`, is left out: 1e-14 of it.

    Args:
      weights: `W_1, ..., W_H`.
      x_squared: `||X||_F^2`.
      misfit: `1/2 ||Y - W_H ... W_1 X||_F^2`.
      half_norm: `1/2 ||Y||_F^2`.
      gamma: the regularisation.
    """
    depth = len(weights)
    through = jnp.linalg.norm(product([jnp.abs(w) for w in weights])) * jnp.sqrt(2 * jnp.maximum(misfit, 0))
    first = jnp.linalg.norm(weights[0])
    # at balanced weights the singular values of W_1 X are those of W_H
    slopes = jnp.sum(jnp.linalg.svd(weights[-1], compute_uv=False) ** (2 * (depth - 1))) ** 0.5
    longest = 2 * jnp.sqrt(x_squared / weights[0].shape[1])
    found = longest * (through + gamma * first * slopes)
    return jnp.finfo(jnp.float64).eps * jnp.maximum(found - 64 * half_norm, 0)
