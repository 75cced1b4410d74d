"""Functions of the singular values of a matrix, `U diag(f(S)) V^T`, with derivatives that are numbers.

Through a singular value decomposition they are NaN where singular values coincide or vanish, though most such functions
have derivatives there.  With `E = U^T dM V` the derivative in the direction dM is, between the i-th and the j-th,

    (f_i - f_j) / (s_i - s_j) * (E_ij + E_ji) / 2  +  (f_i + f_j) / (s_i + s_j) * (E_ij - E_ji) / 2,

and `f_i / s_i` times what of dM lies outside of the span of all U, or of all V; where a denominator is 0 the quotients
are slopes of f (Lewis and Sendov, 2005; Noferini, 2017).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float


class Quotients(NamedTuple):
    """A function f of singular values, and its quotients.

    Attributes:
      values: `f(s)`, `[q]`.
      differences: `(f_i - f_j) / (s_i - s_j)`, `[q, q]`; on the diagonal, and where two are equal, the slope.
      ratios: `f(s) / s`, `[q]`, where s = 0 the slope.
    """

    values: Array
    differences: Array
    ratios: Array


Function = Callable[[Array, Any], Quotients]  # of singular values, largest first, and a parameter


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def applied(f: Function, matrix: Float[Array, "a b"], parameter: Any) -> Float[Array, "a b"]:
    """`U diag(f(S)) V^T`, with the derivatives of the formula above in the matrix, and those of f in its parameter."""
    left, sigma, right = jnp.linalg.svd(matrix, full_matrices=False)
    return (left * f(sigma, parameter).values[None, :]) @ right


@applied.defjvp
def _applied_jvp(f: Function, primals: tuple[Array, Any], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    (matrix, parameter), (change, moved) = primals, tangents
    left, sigma, right = jnp.linalg.svd(matrix, full_matrices=False)
    values, differences, ratios = f(sigma, parameter)
    faster = jax.jvp(lambda parameter: f(sigma, parameter).values, (parameter,), (moved,))[1]
    sums = sigma[:, None] + sigma[None, :]
    means = (values[:, None] + values[None, :]) / jnp.where(sums > 0, sums, 1)
    means = jnp.where(sums > 0, means, ratios[:, None])
    within = left.T @ change @ right.T
    inside = differences * (within + within.T) / 2 + means * (within - within.T) / 2
    beside = ratios[:, None] * (left.T @ change - within @ right)  # outside of the span of all V
    below = (change @ right.T - left @ within) * ratios[None, :]  # outside of the span of all U
    tangent = left @ (inside @ right + beside + faster[:, None] * right) + below @ right
    return applied(f, matrix, parameter), tangent


def power(exponent: int, sigma: Array, parameter: None = None) -> Quotients:
    """`f(s) = s^exponent`, of an exponent of at least 1: differences by their sum of products, without cancelling."""
    del parameter
    a, b = sigma[:, None], sigma[None, :]
    terms = [a**k * b ** (exponent - 1 - k) for k in range(exponent)]
    return Quotients(sigma**exponent, sum(terms[1:], terms[0]), sigma ** (exponent - 1))


def clipped(sigma: Array, ceiling: Array) -> Quotients:
    """`f(s) = min(s, ceiling)`; at the ceiling the slope is 0."""
    least, top = jnp.minimum(sigma[:, None], sigma[None, :]), jnp.maximum(sigma[:, None], sigma[None, :])
    between = (ceiling - least) / jnp.where(top > least, top - least, 1)
    differences = jnp.where(top < ceiling, 1, jnp.where(least < ceiling, between, 0))
    ratios = jnp.where(sigma < ceiling, 1, ceiling / jnp.where(sigma > 0, sigma, 1))
    return Quotients(jnp.minimum(sigma, ceiling), differences, ratios)


def _of_some(sigma: Array, values: Array, kept: Array, slope: float) -> tuple[Array, Array]:
    """Differences and ratios of a function that is 0 but for some singular values, along which it has one slope."""
    gap = sigma[:, None] - sigma[None, :]
    rise = values[:, None] - values[None, :]
    one = kept[:, None] != kept[None, :]
    between = jnp.where(rise == 0, 0, rise / jnp.where(one, gap, 1))  # infinite where it jumps: it has no derivative
    differences = jnp.where(one, between, jnp.where(kept[:, None], slope, 0))
    return differences, jnp.where(kept, values / jnp.where(sigma > 0, sigma, 1), 0)


def above(r: int, sigma: Array, gamma: Array) -> Quotients:
    """`f(s) = max(s - gamma, 0)` of the r largest, 0 of the others; at gamma the slope is 0."""
    kept = (jnp.arange(len(sigma)) < r) & (sigma > gamma)
    values = jnp.where(kept, sigma - gamma, 0)
    return Quotients(values, *_of_some(sigma, values, kept, 1.0))


def whether_above(r: int, sigma: Array, gamma: Array) -> Quotients:
    """The slope of `above`: 1 or 0."""
    kept = (jnp.arange(len(sigma)) < r) & (sigma > gamma)
    values = kept.astype(sigma.dtype)
    return Quotients(values, *_of_some(sigma, values, kept, 0.0))


@jax.custom_jvp
def with_derivatives_of(value: Array, other: Array) -> Array:
    """The value, with all derivatives of the other, a less exact or dearer way to the same."""
    return value


@with_derivatives_of.defjvp
def _with_derivatives_of_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return with_derivatives_of(*primals), tangents[1]


@jax.custom_jvp
def pseudoinverse(x: Float[Array, "d n"], value: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """`X^+`, whose value is known, with its derivatives where the rank does not change (Golub and Pereyra, 1973)."""
    return value


@pseudoinverse.defjvp
def _pseudoinverse_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    x, change = primals[0], tangents[0]
    inverse = pseudoinverse(*primals)
    moved = change @ inverse
    outside = moved.T - (moved.T @ x) @ inverse
    raised = change.T @ (inverse.T @ inverse)
    return inverse, inverse @ (outside - moved) + raised - inverse @ (x @ raised)
