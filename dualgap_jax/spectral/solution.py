"""What a solver returns: weights, a dual variable, and the certificate between them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from dualgap_jax.spectral.problem import Real, SpectralError, exact_products
from dualgap_jax.spectral.scaling import Powers, shift


class DualVariable(NamedTuple):
    """`Lambda = coefficients @ X`: a form whose rows lie in the row space of X, in `d_H d_0` numbers whatever n is."""

    coefficients: Float[Any, "*batch d_H d_0"]

    @exact_products
    def materialise(self, x: Float[Any, "d_0 n"]) -> Float[Any, "*batch d_H n"]:
        """Returns Lambda itself, `[d_H, n]`, or its columns that belong to the columns of `x`.

        For a JAX array it has the type of `x`, for a NumPy array that of the product.
        """
        found = self.coefficients @ x
        return found.astype(x.dtype) if isinstance(x, Array) else found


class SpectralSolution(NamedTuple):
    """Weights for problem (4) with a primal-dual certificate.

    `primal` is the objective at `weights` and `dual` a lower bound of the value of (5) at `dual_variable`, each
    evaluated from its definition and not from the formula that gave the solution.  So
    `dual <= optimum of (4) <= primal`, up to 1e-14 of `1/2 ||Y||_F^2`, for the data as they were given (rounding of
    the evaluation beyond that is charged by an estimate of it; `verify` proves it):
    what the solution cuts from X stays in the bound, and where float64 cannot tell whether X has a direction, the
    bound is charged with the most that Y may have in it.

    Attributes:
      weights: `W_1, ..., W_H`.
      dual_variable: Lambda, feasible for (5).
      singular_values: of `Yt = Y X^+ X`, in falling order.
      rank: number of singular values that the network keeps, the rank of `W_H ... W_1 X`.
      gamma: the regularisation.
      primal: objective of (4) at the weights; an upper bound of the optimum.
      dual: objective of (5) at the dual variable; a lower bound of the optimum.
      relative_gap: `(primal - dual) / (1/2 ||Y||_F^2)`; the unit is the objective at zero weights.  NaN where there is
        no certificate: traced data that are not finite, a traced gamma below 0, or values that leave the range of the
        numbers.
      sigma_min: the smallest singular value of Yt above the rounding of Y; 0 if there is none.
      gamma_below_sigma_min: the theorem's condition `0 <= gamma < sigma_min(Yt)`.
      widths_fit: the theorem's condition `d_min <= min(d_0, d_H, n)`.
      unresolved: number of directions that the row space of X may have below the rounding of float64; the dual value
        is charged for them.
    """

    weights: tuple[Float[Any, "*batch _ _"], ...]
    dual_variable: DualVariable
    singular_values: Float[Any, "*batch q"]
    rank: Int[Any, "*batch"]
    gamma: Float[Any, "*batch"]
    primal: Float[Any, "*batch"]
    dual: Float[Any, "*batch"]
    relative_gap: Float[Any, "*batch"]
    sigma_min: Float[Any, "*batch"]
    gamma_below_sigma_min: Bool[Any, "*batch"]
    widths_fit: Bool[Any, "*batch"]
    unresolved: Int[Any, "*batch"]

    @property
    def theorem_applies(self) -> Bool[Any, "*batch"]:
        """Whether the conditions of Theorem 2 hold and there is a certificate; a certificate is valid either way."""
        return self.gamma_below_sigma_min & self.widths_fit & (self.relative_gap < np.inf)

    def reasons(self) -> tuple[str, ...]:
        """Why the theorem does not apply, in words; empty when it does.  For one solution, not a batch."""
        said = []
        if not bool(self.gamma_below_sigma_min):
            said.append(f"gamma={float(self.gamma):g} is not below sigma_min(Yt)={float(self.sigma_min):g}")
        if not bool(self.widths_fit):
            shapes = [w.shape for w in self.weights]
            narrowest = min(s[0] for s in shapes[:-1])
            said.append(f"d_min={narrowest} exceeds min(d_0, d_H, n), where d_0={shapes[0][1]}, d_H={shapes[-1][0]}")
        if not np.isfinite(self.relative_gap):
            said.append("there is no certificate: gamma is negative, or data or values not finite or out of range")
        return tuple(said)

    def restored(self, powers: Powers, half_norm: float) -> SpectralSolution:
        """The solution of the problem as it was given, from that in its own unit, see `scaling`; not for the weights.

        Args:
          powers: from one to the other.
          half_norm: `1/2 ||Y||_F^2` in the problem's own unit.

        Raises:
          SpectralError: a value leaves the range of the numbers.
        """
        rows, targets = powers
        given = self._replace(
            dual_variable=DualVariable(shift(self.dual_variable.coefficients, targets - rows[None, :])),
            singular_values=shift(self.singular_values, targets),
            gamma=shift(self.gamma, targets),
            primal=shift(self.primal, 2 * targets),
            dual=shift(self.dual, 2 * targets),
            sigma_min=shift(self.sigma_min, targets),
        )
        unit = shift(np.float64(half_norm), 2 * targets)
        values = (*given.dual_variable, given.singular_values, given.primal, given.dual, given.relative_gap)
        if not all(np.isfinite(v).all() for v in values) or (half_norm and unit < np.finfo(float).tiny):
            raise out_of_range()
        return given


def out_of_range() -> SpectralError:
    """The error for a result that cannot be written down."""
    return SpectralError(
        "the weights or the values of problem (4) on these data leave the range of the numbers: there is no"
        " certificate; multiply y and gamma by one number s (the optimum grows by s^2, every W_i by s^(1/H)),"
        " or x by another one."
    )


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
    positive = values > 0  # the root has no derivative at 0, where a singular value stays cut
    root = jnp.where(positive, jnp.where(positive, values, 1) ** (1.0 / (len(widths) + 1)), 0)
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
    unresolved: ArrayLike,
) -> SpectralSolution:
    """A solution from its parts.

    Args:
      weights, coefficients, singular_values, rank, gamma, primal, dual, unresolved: see `SpectralSolution`.
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
        unresolved=jnp.asarray(unresolved, jnp.int32),
    )


def default_rtol(rows: int, columns: int, dtype: Any = np.float64) -> float:
    """Singular values of a matrix below this share of the largest are rounding.

    Rounding of a random kind moves them by `sqrt(max(rows, columns)) eps`; the worst case, `max(rows, columns) eps`,
    would cut singular values that float32 still resolves when there are many columns.
    """
    return 2 * float(np.sqrt(max(rows, columns))) * float(jnp.finfo(dtype).eps)
