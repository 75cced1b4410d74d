"""Douglas-Rachford splitting of the dual (5), in coordinates of the row space of X (footnote 5 of the paper)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from dualgap_jax.spectral import functions
from dualgap_jax.spectral.problem import SpectralError, exact_products, is_concrete, r_norm_squared


@exact_products
def prox_r_norm(matrix: Float[Any, "a b"], r: int, step: ArrayLike = 1.0) -> Float[Array, "a b"]:
    """Returns the proximal operator of `step * 1/2 ||.||_r^2` at the matrix.

    That is the M, of the matrix's shape, at which `step/2 ||M||_r^2 + 1/2 ||M - matrix||_F^2` is smallest.

    The singular vectors stay.  Of the singular values z_1 >= z_2 >= ... the first r are divided by `1 + step`, unless
    that takes them below later ones; then values on both sides of the r-th meet at one number t, the root of

        sum_{i <= r} max((1 + step) t - z_i, 0)  =  sum_{i > r} max(z_i - t, 0),

    and the result is `max(z_i / (1 + step), t)` for i <= r, `min(z_i, t)` for i > r.  Both sides are piecewise linear
    and monotone in t, so the root is exact between two neighbouring breakpoints.

    Its derivatives are those of the singular value decomposition, NaN where singular values coincide.

    Source: the operator is that of Grussler, Rantzer and Giselsson (2018), for any r; derived here from the optimality
    conditions.

    Raises:
      SpectralError: for r below 1, or a step that is negative or not finite.
    """
    if r < 1:
        raise SpectralError(f"r={r} must be at least 1.")
    if is_concrete(step) and not (np.ndim(step) == 0 and 0 <= np.asarray(step) < np.inf):
        raise SpectralError(f"step={step} must be one finite number, at least 0.")
    matrix = jnp.asarray(matrix)
    left, z, right = jnp.linalg.svd(matrix, full_matrices=False)
    grown = 1 + jnp.asarray(step, z.dtype)
    if r >= len(z):
        return matrix / grown
    head, tail = z[:r], z[r:]

    def excess(t: Array) -> Array:
        return jnp.sum(jnp.maximum(grown * t - head, 0)) - jnp.sum(jnp.maximum(tail - t, 0))

    points = jnp.sort(jnp.concatenate([head / grown, tail, jnp.zeros(1, z.dtype)]))
    excesses = jax.vmap(excess)(points)
    above = jnp.clip(jnp.searchsorted(excesses, 0.0, side="left"), 1, len(points) - 1)
    low, high = points[above - 1], points[above]
    f_low, f_high = excesses[above - 1], excesses[above]
    slope = jnp.where(f_high > f_low, f_high - f_low, 1)
    root = jnp.clip(low - f_low * (high - low) / slope, low, high)
    met = head[-1] / grown < tail[0]
    values = jnp.concatenate([jnp.maximum(head / grown, root), jnp.minimum(tail, root)])
    plain = jnp.concatenate([head / grown, tail])
    return (left * jnp.where(met, values, plain)[None, :]) @ right


@exact_products
def clip_singular_values(matrix: Float[Any, "a b"], ceiling: ArrayLike) -> Float[Array, "a b"]:
    """Returns the matrix with its singular values cut at the ceiling: the projection onto `||M|| <= ceiling`.

    Its derivatives are numbers also where singular values coincide; a singular value at the ceiling counts as cut.

    Raises:
      SpectralError: for a ceiling that is negative or not a number.
    """
    if is_concrete(ceiling) and not (np.ndim(ceiling) == 0 and np.asarray(ceiling) >= 0):
        raise SpectralError(f"ceiling={ceiling} must be one number, at least 0.")
    matrix = jnp.asarray(matrix)
    return functions.applied(functions.clipped, matrix, jnp.asarray(ceiling, matrix.dtype))


class DualIterates(NamedTuple):
    """A run of Douglas-Rachford splitting, in reduced coordinates.

    Attributes:
      dual: the last feasible Lambda, `[d_H, m]`.
      fitted: the matching `W_H ... W_1 X`, `[d_H, m]`: the element of the normal cone at `dual` that the method finds.
      values: the dual objective at the feasible point of every iteration, `[iterations]`; each is a lower bound of (4).
    """

    dual: Float[Array, "d_H m"]
    fitted: Float[Array, "d_H m"]
    values: Float[Array, " iterations"]


@exact_products
def douglas_rachford_iterates(
    targets: Float[Array, "d_H m"], gamma: ArrayLike, r: int, half_norm: ArrayLike, iterations: int
) -> DualIterates:
    """Splits (5) into `1/2 ||Yt - Lambda||_r^2`, by `prox_r_norm`, and `||Lambda|| <= gamma`, by clipping.

    Args:
      targets: Yt in coordinates of the row space of X, so that the constraint on the rows holds by construction.
      gamma: the ceiling.
      r: of the norm.
      half_norm: `1/2 ||Y||_F^2`, the constant in the dual objective.
      iterations: number of them.
    """

    def step(z: Array, _: None) -> tuple[Array, Array]:
        feasible = clip_singular_values(z, gamma)
        reflected = 2 * feasible - z
        nearest = targets - prox_r_norm(targets - reflected, r)
        return z + nearest - feasible, constant - 0.5 * r_norm_squared(targets - feasible, r)

    constant = jnp.asarray(half_norm, targets.dtype)
    z, values = lax.scan(step, jnp.zeros_like(targets), length=iterations)
    feasible = clip_singular_values(z, gamma)
    return DualIterates(feasible, z - feasible, values)
