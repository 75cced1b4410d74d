"""Problem (4), its dual (5), and a solution with its certificate (Section 4 of the paper).

    (4)   min over W_1, ..., W_H of   1/2 ||Y - W_H ... W_1 X||_F^2
                                      + (gamma/H) [ ||W_1 X||_{S_H}^H + sum_{i >= 2} ||W_i||_{S_H}^H ]

    (5)   max over Lambda, Row(Lambda) in Row(X), ||Lambda|| <= gamma, of
                                      1/2 ||Y||_F^2 - 1/2 ||Yt - Lambda||_r^2

`X` is `[d_0, n]`, `Y` is `[d_H, n]`, `W_i` is `[d_i, d_{i-1}]`, `||M||_{S_H}^H` is the sum of the H-th powers of the
singular values, `Yt = Y X^+ X`, and `||.||_r^2` is the sum of the r largest squared singular values with
`r = min(d_0, ..., d_H, n)`.  The value of (5) at any feasible Lambda is a lower bound of (4), whatever gamma is: the
difference between the two is a certificate of how far weights are from the global optimum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from dualgap_jax.spectral import functions
from dualgap_jax.types import KeyArray

P = ParamSpec("P")
T = TypeVar("T")
Real = Float[Array, ""]
Weights = Sequence[Float[Any, "_ _"]]  # JAX or NumPy


class SpectralError(ValueError):
    """Data, widths or a regularisation that problem (4) does not allow."""


def is_concrete(*values: Any) -> bool:
    """Whether the values can be looked at: none of them is being traced."""
    return not any(isinstance(v, jax.core.Tracer) for v in values)


def in_double() -> bool:
    """Whether JAX is in its 64-bit mode here."""
    return bool(jnp.result_type(float) == np.float64)


def exact_products(function: Callable[P, T]) -> Callable[P, T]:
    """Matrix products in full precision inside `function`, and float64 arguments taken as float64.

    Accelerators otherwise round the factors of a product, and JAX in its 32-bit mode float64 arguments.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        leaves = jax.tree.leaves((args, kwargs))
        wide = any(getattr(leaf, "dtype", None) == np.float64 for leaf in leaves)
        with jax.enable_x64(wide or in_double()), jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return wrapped


# --- the problem ----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sum_of_powers(matrix: Float[Array, "a b"], power: int) -> Real:
    return jnp.sum(jnp.linalg.svd(matrix, compute_uv=False) ** power)


@_sum_of_powers.defjvp
def _sum_of_powers_jvp(power: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    matrix, change = primals[0], tangents[0]
    left, sigma, right = jnp.linalg.svd(lax.stop_gradient(matrix), full_matrices=False)
    value = functions.with_derivatives_of(jnp.sum(sigma**power), _sum_of_powers(matrix, power))
    if power == 1:
        return value, jnp.sum((left @ right) * change)
    gradient = power * functions.applied(functools.partial(functions.power, power - 1), matrix, None)
    return value, jnp.sum(gradient * change)


@exact_products
def schatten_power(matrix: Float[Any, "a b"], power: int) -> Real:
    """Returns `||M||_{S_H}^H`, the sum of the `power`-th powers of the singular values of the matrix, a scalar.

    Its gradient, `H U diag(sigma^{H-1}) V^T`, is continuous for H >= 2 also where singular values coincide or vanish,
    where that of the singular value decomposition is not; it is therefore given by this formula, and the second
    derivatives by that of `functions`.

    Raises:
      SpectralError: for a power below 1, or another type than float32 and float64.
    """
    if not power >= 1:
        raise SpectralError(f"power={power} must be at least 1.")
    matrix = jnp.asarray(matrix)
    check_types(matrix=matrix)
    return _sum_of_powers(matrix, power)


def product(weights: Weights) -> Float[Any, "d_H d_0"]:
    """`W_H ... W_1`."""
    return functools.reduce(lambda done, layer: layer @ done, weights)


def random_weights(key: KeyArray, sizes: Sequence[int], scale: float = 1.0, dtype: Any = float) -> tuple[Array, ...]:
    """Returns Gaussian layers `[d_i, d_{i-1}]` of standard deviation `scale / sqrt(d_{i-1})`.

    Args:
      key: The random key.
      sizes: The dimensions `d_0, ..., d_H`.
      scale: The factor of the standard deviation.
      dtype: The type of the weights.
    """
    keys = jax.random.split(key, len(sizes) - 1)
    return tuple(
        scale / into**0.5 * jax.random.normal(k, (out, into), dtype)
        for k, into, out in zip(keys, sizes, sizes[1:], strict=False)
    )


@exact_products
def objective(weights: Weights, x: Float[Any, "d_0 n"], y: Float[Any, "d_H n"], gamma: ArrayLike) -> Real:
    """Returns the value of problem (4) as written; the singular values are those of `W_1 X, W_2, ..., W_H`.

    The value is computed in the widest type of the arguments: float64 arrays are not rounded in JAX's 32-bit mode.

    Args:
      weights: The layers `W_1, ..., W_H`, first layer first, `W_i` of shape `[d_i, d_{i-1}]`.
      x: The inputs `[d_0, n]`, one example a column.
      y: The targets `[d_H, n]`.
      gamma: The regularisation, at least 0.

    Raises:
      SpectralError: for fewer than two layers, shapes that do not chain from `d_0` to `d_H`, an x and a y of different
        numbers of columns, a gamma that is not one finite number of at least 0, or types but float32 and float64.
    """
    if x.shape[1:] != y.shape[1:]:
        raise SpectralError(f"x of shape {x.shape} and y of shape {y.shape} must have one example a column each.")
    check_chain(weights, x.shape[0], y.shape[0])
    check_gamma(gamma)
    check_types(x=x, y=y, **{f"W_{k}": w for k, w in enumerate(weights, 1)})
    first, *others = (jnp.asarray(w) for w in weights)
    first, depth = first @ x, len(weights)
    penalty = schatten_power(first, depth) + sum(schatten_power(w, depth) for w in others)
    residual = y - product([first, *others])
    return 0.5 * jnp.sum(residual**2) + jnp.asarray(gamma, penalty.dtype) / depth * penalty


@exact_products
def r_norm_squared(matrix: Float[Any, "a b"], r: int) -> Real:
    """Returns `||M||_r^2`, the sum of the `r` largest squared singular values of the matrix, a scalar.

    Raises:
      SpectralError: for a negative r.
    """
    if r < 0:
        raise SpectralError(f"r={r} must be at least 0.")
    return jnp.sum(jnp.linalg.svd(jnp.asarray(matrix), compute_uv=False)[:r] ** 2)


def narrowest(widths: Sequence[int], d_0: int, d_H: int, n: int) -> int:
    """`r = min(d_0, ..., d_H, n)`: no network of these widths has a larger rank on the data."""
    return min(*widths, d_0, d_H, n)


def check_chain(weights: Weights, d_0: int, d_H: int) -> None:
    """Raises SpectralError for fewer than two weights, or shapes that do not chain from `d_0` to `d_H`."""
    shapes = [tuple(w.shape) for w in weights]
    inner = [d_0, *(s[0] for s in shapes)]
    if len(shapes) < 2 or inner[-1] != d_H or any(s[1] != d for s, d in zip(shapes, inner, strict=False)):
        raise SpectralError(
            f"weights of shapes {shapes} do not make a network from d_0={d_0} to d_H={d_H}: give H >= 2 matrices W_i of"
            " shape [d_i, d_(i-1)], first layer first."
        )


def check_gamma(gamma: Any, ndim: int = 0) -> None:
    """Raises SpectralError for a regularisation of another dimension, negative or not finite; tracers have no value."""
    if np.ndim(gamma) != ndim:
        wanted = "one number (for several: regularisation_path, or vmap)" if ndim == 0 else "one-dimensional"
        raise SpectralError(f"gamma of shape {np.shape(gamma)} must be {wanted}.")
    if is_concrete(gamma):
        values = np.asarray(gamma)
        if values.dtype.kind not in "fiu" or not (np.isfinite(values).all() and (values >= 0).all()):
            raise SpectralError(f"gamma={gamma!r} must be finite and at least 0 (0 is no regularisation).")


def check_types(**arrays: Any) -> None:
    """Raises SpectralError for arrays of other types than float32 and float64, whose singular values are not found."""
    for name, array in arrays.items():
        if array.dtype not in (np.float32, np.float64):
            raise SpectralError(f"{name} holds {array.dtype}; give float32 or float64.")
