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
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from dualgap_jax.types import KeyArray

P = ParamSpec("P")
T = TypeVar("T")
Real = Float[Array, ""]
Weights = Sequence[Float[Any, "_ _"]]  # JAX or NumPy


class SpectralError(ValueError):
    """Data, widths or a regularisation that problem (4) does not allow."""


def exact_products(function: Callable[P, T]) -> Callable[P, T]:
    """Full-precision matrix products inside `function`: accelerators otherwise round their factors."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return wrapped


# --- the problem ----------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def schatten_power(matrix: Float[Array, "a b"], power: int) -> Real:
    """`||M||_{S_H}^H`, the sum of the `power`-th powers of the singular values.

    Its gradient, `H U diag(sigma^{H-1}) V^T`, is continuous for H >= 2 also where singular values coincide or vanish,
    where that of the singular value decomposition is not; it is therefore given by this formula.
    """
    return jnp.sum(jnp.linalg.svd(matrix, compute_uv=False) ** power)


@schatten_power.defjvp
def _schatten_power_jvp(power: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    left, sigma, right = jnp.linalg.svd(primals[0], full_matrices=False)
    gradient = (left * (power * sigma ** (power - 1))[None, :]) @ right
    return jnp.sum(sigma**power), jnp.sum(gradient * tangents[0])


def product(weights: Weights) -> Float[Any, "d_H d_0"]:
    """`W_H ... W_1`."""
    return functools.reduce(lambda done, layer: layer @ done, weights)


def random_weights(key: KeyArray, sizes: Sequence[int], scale: float = 1.0, dtype: Any = float) -> tuple[Array, ...]:
    """Gaussian weights of standard deviation `scale / sqrt(d_{i-1})`; `sizes` are `d_0, ..., d_H`."""
    keys = jax.random.split(key, len(sizes) - 1)
    return tuple(
        scale / into**0.5 * jax.random.normal(k, (out, into), dtype)
        for k, into, out in zip(keys, sizes, sizes[1:], strict=False)
    )


@exact_products
def objective(weights: Weights, x: Float[Any, "d_0 n"], y: Float[Any, "d_H n"], gamma: ArrayLike) -> Real:
    """Problem (4) as written: the singular values come from decompositions of `W_1 X, W_2, ..., W_H`.

    Args:
      weights: `W_1, ..., W_H`, `W_i` of shape `[d_i, d_{i-1}]`.
      x, y: data, one example a column.
      gamma: regularisation, at least 0.

    Raises:
      SpectralError: for fewer than two layers, or shapes that do not chain from `d_0` to `d_H`.
    """
    _check_chain(weights, x.shape[0], y.shape[0])
    first, *others = (jnp.asarray(w) for w in weights)
    first, depth = first @ x, len(weights)
    penalty = schatten_power(first, depth) + sum(schatten_power(w, depth) for w in others)
    residual = y - product([first, *others])
    return 0.5 * jnp.sum(residual**2) + jnp.asarray(gamma, x.dtype) / depth * penalty


def r_norm_squared(matrix: Float[Array, "a b"], r: int) -> Real:
    """`||M||_r^2`: the sum of the `r` largest squared singular values."""
    return jnp.sum(jnp.linalg.svd(matrix, compute_uv=False)[:r] ** 2)


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_chain(weights: Weights, d_0: int, d_H: int) -> None:
    shapes = [tuple(w.shape) for w in weights]
    inner = [d_0, *(s[0] for s in shapes)]
    if len(shapes) < 2 or inner[-1] != d_H or any(s[1] != d for s, d in zip(shapes, inner, strict=False)):
        raise SpectralError(
            f"weights of shapes {shapes} do not make a network from d_0={d_0} to d_H={d_H}: give H >= 2 matrices W_i of"
            " shape [d_i, d_(i-1)], first layer first."
        )


def is_concrete(*values: Any) -> bool:
    """Whether the values can be looked at: none of them is being traced."""
    return not any(isinstance(v, jax.core.Tracer) for v in values)


def check_gamma(gamma: Any, ndim: int = 0) -> None:
    """Raises SpectralError for a regularisation of another dimension, negative or not finite; tracers have no value."""
    if np.ndim(gamma) != ndim:
        wanted = "one number (for several: regularisation_path, or vmap)" if ndim == 0 else "one-dimensional"
        raise SpectralError(f"gamma of shape {np.shape(gamma)} must be {wanted}.")
    if is_concrete(gamma):
        values = np.asarray(gamma)
        if values.dtype.kind not in "fiu" or not (np.isfinite(values).all() and (values >= 0).all()):
            raise SpectralError(f"gamma={gamma!r} must be finite and at least 0 (0 is no regularisation).")


def check_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """The widths as integers.  Raises SpectralError if there is none, or one is below 1."""
    try:
        found = tuple(int(w) for w in widths)
        whole = all(w == f for w, f in zip(widths, found, strict=True))
    except (TypeError, ValueError):
        found, whole = (), False
    if not whole or not found or min(found) < 1:
        raise SpectralError(
            f"widths={widths!r} must be the H - 1 >= 1 hidden widths (d_1, ..., d_(H-1)), positive integers."
        )
    return found


def _is_finite(data: Any) -> bool:
    """Whether all values are finite; true where they are traced."""
    if not is_concrete(data):
        return True
    if isinstance(data, np.ndarray):
        return bool(np.isfinite(data).all())
    with jax.ensure_compile_time_eval():  # data that a jitted function closes over are concrete too
        return bool(jnp.isfinite(data).all())


def check_data(x: Any, y: Any, *, values: bool = True) -> None:
    """Raises SpectralError for data that are not two real matrices with as many columns, are empty or not finite.

    Args:
      x: `[d_0, n]`.
      y: `[d_H, n]`.
      values: whether to look for values that are not finite; traced data are not looked at.
    """
    for name, data in (("x", x), ("y", y)):
        if not hasattr(data, "dtype"):
            raise SpectralError(f"{name} is a {type(data).__name__}; give a NumPy or JAX array.")
    if np.ndim(x) != 2 or np.ndim(y) != 2 or x.shape[1] != y.shape[1]:
        raise SpectralError(
            f"x of shape {np.shape(x)} and y of shape {np.shape(y)} must be [d_0, n] and [d_H, n], one example a"
            " column; transpose data that hold one example a row."
        )
    if 0 in (*x.shape, *y.shape):
        raise SpectralError(f"x of shape {x.shape} and y of shape {y.shape} are empty; every dimension must be >= 1.")
    for name, data in (("x", x), ("y", y)):
        if data.dtype not in (np.float32, np.float64):
            raise SpectralError(f"{name} holds {data.dtype}; give float32 or float64 (images: standardise them first).")
        if values and not _is_finite(data):
            raise SpectralError(f"{name} holds values that are not finite; remove those examples first.")


# --- the solution ---------------------------------------------------------------------------------------------------


class DualVariable(NamedTuple):
    """`Lambda = coefficients @ X`: a form whose rows lie in the row space of X, in `d_H d_0` numbers whatever n is."""

    coefficients: Float[Array, "*batch d_H d_0"]

    @exact_products
    def materialise(self, x: Float[Any, "d_0 n"]) -> Float[Any, "*batch d_H n"]:
        """Lambda itself, or its columns that belong to the columns of `x`."""
        return self.coefficients @ x


class SpectralSolution(NamedTuple):
    """Weights for problem (4) with a primal-dual certificate.

    `primal` is the objective at `weights` and `dual` the value of (5) at `dual_variable`, each evaluated from its
    definition and not from the formula that gave the solution.  So `dual <= optimum of (4) <= primal`, up to the
    rounding of the evaluation.  X counts at its numerical rank: singular values of X at the level of rounding, see
    `default_rtol`, are zero to the solution and to the certificate.

    Attributes:
      weights: `W_1, ..., W_H`.
      dual_variable: Lambda, feasible for (5).
      singular_values: of `Yt = Y X^+ X`, in falling order.
      rank: number of singular values that the network keeps, the rank of `W_H ... W_1 X`.
      gamma: the regularisation.
      primal: objective of (4) at the weights; an upper bound of the optimum.
      dual: objective of (5) at the dual variable; a lower bound of the optimum.
      relative_gap: `(primal - dual) / (1/2 ||Y||_F^2)`; the unit is the objective at zero weights.
      sigma_min: the smallest singular value of Yt above the rounding of Y; 0 if there is none.
      gamma_below_sigma_min: the theorem's condition `0 <= gamma < sigma_min(Yt)`.
      widths_fit: the theorem's condition `d_min <= min(d_0, d_H, n)`.
    """

    weights: tuple[Float[Array, "*batch _ _"], ...]
    dual_variable: DualVariable
    singular_values: Float[Array, "*batch q"]
    rank: Int[Array, "*batch"]
    gamma: Float[Array, "*batch"]
    primal: Float[Array, "*batch"]
    dual: Float[Array, "*batch"]
    relative_gap: Float[Array, "*batch"]
    sigma_min: Float[Array, "*batch"]
    gamma_below_sigma_min: Bool[Array, "*batch"]
    widths_fit: Bool[Array, "*batch"]

    @property
    def theorem_applies(self) -> Bool[Any, "*batch"]:
        """Whether the conditions of Theorem 2 hold.  The certificate is valid either way."""
        return self.gamma_below_sigma_min & self.widths_fit

    def reasons(self) -> tuple[str, ...]:
        """Why the theorem does not apply, in words; empty when it does.  For one solution, not a batch."""
        said = []
        if not bool(self.gamma_below_sigma_min):
            said.append(f"gamma={float(self.gamma):g} is not below sigma_min(Yt)={float(self.sigma_min):g}")
        if not bool(self.widths_fit):
            shapes = [w.shape for w in self.weights]
            narrowest = min(s[0] for s in shapes[:-1])
            said.append(f"d_min={narrowest} exceeds min(d_0, d_H, n), where d_0={shapes[0][1]}, d_H={shapes[-1][0]}")
        return tuple(said)


def assemble(
    values: Float[Array, " k"],
    left: Float[Array, "d_H k"],
    right: Float[Array, "k d_0"],
    widths: Sequence[int],
) -> tuple[Float[Array, "_ _"], ...]:
    """The weights of Theorem 2, `W_1 = [S^{1/H} V^T; 0] X^+`, `W_i = [S^{1/H}, 0; 0, 0]`, `W_H = [U S^{1/H}, 0]`.

    Args:
      values: the diagonal of S.
      left: U.
      right: `V^T X^+`.
      widths: `d_1, ..., d_{H-1}`, each at least k.
    """
    root = values ** (1.0 / (len(widths) + 1))
    k = len(values)
    layers = [jnp.pad(root[:, None] * right, ((0, widths[0] - k), (0, 0)))]
    for into, out in itertools.pairwise(widths):
        layers.append(jnp.pad(jnp.diag(root), ((0, out - k), (0, into - k))))
    return (*layers, jnp.pad(left * root[None, :], ((0, 0), (0, widths[-1] - k))))


def smallest_above(singular_values: Float[Array, " q"], floor: ArrayLike) -> Real:
    """The smallest singular value above `floor`; 0 if there is none."""
    above = jnp.where(singular_values > floor, singular_values, jnp.inf)
    least = jnp.min(above)
    return jnp.where(jnp.isfinite(least), least, 0.0).astype(singular_values.dtype)


def narrowest(widths: Sequence[int], d_0: int, d_H: int, n: int) -> int:
    """`r = min(d_0, ..., d_H, n)`: no network of these widths has a larger rank on the data."""
    return min(*widths, d_0, d_H, n)


def finish(
    weights: tuple[Array, ...],
    coefficients: Array,
    singular_values: Array,
    rank: ArrayLike,
    gamma: Array,
    primal: Array,
    dual: Array,
    half_norm: Array,
    sizes: tuple[int, int, int],
    rtol: float,
) -> SpectralSolution:
    """A solution from its parts.

    Args:
      weights, coefficients, singular_values, rank, gamma, primal, dual: see `SpectralSolution`.
      half_norm: `1/2 ||Y||_F^2`.
      sizes: `d_0, d_H, n`.
      rtol: singular values of Yt below this share of `||Y||_F`, from which they are computed, count as zero.
    """
    sigma_min = smallest_above(singular_values, rtol * jnp.sqrt(2 * half_norm))
    d_min = min(w.shape[0] for w in weights[:-1])
    tiny = jnp.finfo(half_norm.dtype).tiny
    return SpectralSolution(
        weights=weights,
        dual_variable=DualVariable(coefficients),
        singular_values=singular_values,
        rank=jnp.asarray(rank, jnp.int32),
        gamma=gamma,
        primal=primal,
        dual=dual,
        relative_gap=(primal - dual) / jnp.maximum(half_norm, tiny),
        sigma_min=sigma_min,
        gamma_below_sigma_min=gamma < sigma_min,
        widths_fit=jnp.asarray(d_min <= min(sizes)),
    )


def default_rtol(rows: int, columns: int, dtype: Any) -> float:
    """Singular values of a matrix below this share of the largest count as zero.

    Rounding of a random kind moves them by `sqrt(max(rows, columns)) eps`; the worst case, `max(rows, columns) eps`,
    would cut singular values that float32 still resolves when there are many columns.
    """
    return 2 * float(np.sqrt(max(rows, columns))) * float(jnp.finfo(dtype).eps)


def as_data(x: Any, y: Any) -> tuple[Array, Array]:
    """Checked data as JAX arrays of one dtype."""
    check_data(x, y)
    dtype = jnp.result_type(x, y)
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype)
