"""Theorem 2 for data in memory: one regularisation, or many at once; also inside `jit`, `vmap` and `grad`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Real as Number
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from dualgap_jax.registry import UnknownNameError, unknown
from dualgap_jax.spectral.checks import check_data, check_rtol, check_widths
from dualgap_jax.spectral.dependence import find_dependencies, null_directions
from dualgap_jax.spectral.problem import check_gamma, in_double, is_concrete
from dualgap_jax.spectral.scaling import Powers, powers_of, shift
from dualgap_jax.spectral.solution import SpectralSolution, default_rtol, out_of_range
from dualgap_jax.spectral.solvers import METHODS, path_scaled, solve_scaled


def _check_settings(method: str, settings: Mapping[str, Any]) -> None:
    allowed = [name for name in inspect.signature(METHODS[method]).parameters if name != "problem"]
    for name in settings:
        if name not in allowed:
            raise UnknownNameError(unknown(f"setting of method {method!r}:", name, allowed))


def _run(x: Any, y: Any, gamma: Any, depth: int, rtol: Any, settings: Any, program: Callable[..., Any]) -> Any:
    """Runs a program in float64 on the problem in its own unit.

    Concrete data are scaled, and exact dependencies among the rows of X are looked for where rounding hides
    directions, outside of JAX.  A traced result is rounded to 32 bits in JAX's 32-bit mode: values outwards.
    """
    traced = not is_concrete(x, y, gamma, rtol, *jax.tree.leaves(settings))
    narrow = traced and not in_double()
    dtype = "float32" if narrow else "float64"
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        if is_concrete(x, y):
            x, y = (np.asarray(a, np.float64) for a in (x, y))
        else:
            x, y = (jnp.asarray(a, jnp.float64) for a in (x, y))
        gamma = np.asarray(gamma, np.float64) if is_concrete(gamma) else jnp.asarray(gamma, jnp.float64)
        powers = powers_of(*((x, y) if is_concrete(x, y) else lax.stop_gradient((x, y))), depth)
        x, y = shift(x, -powers.rows[:, None]), shift(y, -powers.targets)
        gamma = shift(gamma, -powers.targets)
        found = program(x, y, gamma, powers, rtol, np.int32(0), dtype)
        if traced:
            return _narrow(found) if narrow else found
        found = jax.tree.map(np.asarray, found)
        if np.any(found.unresolved):
            proven = find_dependencies([x], null_directions(x, default_rtol(*x.shape)))
            if proven.number:
                found = jax.tree.map(np.asarray, program(x, y, gamma, powers, rtol, np.int32(proven.number), dtype))
    if not np.isfinite(found.relative_gap).all():
        raise out_of_range()
    return found


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _outward(value: Array, towards: float) -> Array:
    """The value in 32 bits, rounded towards an infinity; its derivative is not."""
    near = value.astype(jnp.float32)
    wrong = (near.astype(jnp.float64) - value) * towards < 0
    return jnp.where(wrong, jnp.nextafter(near, jnp.float32(towards)), near)


@_outward.defjvp
def _outward_jvp(towards: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _outward(primals[0], towards), tangents[0].astype(jnp.float32)


def _narrow(found: SpectralSolution) -> SpectralSolution:
    """The solution in 32 bits: the primal value rounded up, the dual value down, none where they leave the range."""
    narrow = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.float64 else a, found)
    primal, dual = _outward(found.primal, np.inf), _outward(found.dual, -np.inf)
    sound = jnp.isfinite(primal) & jnp.isfinite(dual)
    for value in (found.primal, found.gamma, found.sigma_min):
        sound &= (value == 0) | (jnp.abs(value) >= jnp.finfo(jnp.float32).tiny)
        sound &= jnp.isfinite(value.astype(jnp.float32))
    gap = lax.stop_gradient(found.relative_gap)
    gap = jnp.where(sound, _outward(gap, np.inf), jnp.nan)
    return narrow._replace(primal=primal, dual=dual, relative_gap=gap)


def solve(
    x: Float[Any, "d_0 n"],
    y: Float[Any, "d_H n"],
    *,
    gamma: ArrayLike,
    widths: Sequence[int],
    method: str = "closed_form",
    rtol: float | None = None,
    **settings: Any,
) -> SpectralSolution:
    """Solves problem (4) for data in memory and certifies the result (Theorem 2, Section 4).

    Everything is computed in float64, whatever the type of the data and the mode of JAX.  Powers of two bring the
    problem to a unit of its own first (see `scaling`), so that data of any size will do as long as the result can be
    written down.  For large n, where the decomposition of X is too much, see `solve_columns`, which means the same by
    every argument.

    With arrays the result holds NumPy arrays of float64.  Inside `jit` (with static `widths` and `method`), `vmap` and
    `grad` it holds traced ones.  In JAX's 32-bit mode these are float32: the certificate is that of the weights as
    rounded, with `primal` rounded up and `dual` down.  Where the data are not finite or a value leaves the range, the
    relative gap is NaN.  Directions of X that float64 cannot tell from rounding are charged to `dual`; of arrays,
    exact linear dependencies among a few rows are proven first, and cost nothing.

    `primal` and `dual` have the derivatives of the optimum in x, y and gamma, by the envelope theorem: with `M` the
    optimal `W_H ... W_1 X` they are `-W^T (Y - Yt)` where the rank of X does not change, `Y - M`, and
    `sum_{i <= r} (sigma_i - gamma)_+`.  These have derivatives of their own, those between the kinks (a singular value
    at gamma counts as below it), and no number where the r-th and the next singular value meet above gamma.  In JAX's
    32-bit mode that is what there is: `grad` of the weights, the dual variable or the singular values, and derivatives
    of a jitted derivative, need its 64-bit mode (`jvp` of them does not).

    Args:
      x: The inputs `[d_0, n]`, one example a column, float32 or float64.
      y: The targets `[d_H, n]`.
      gamma: The regularisation, at least 0, in the unit of the singular values of Y.
      widths: The hidden widths `(d_1, ..., d_{H-1})`; they set the depth H.
      method: One of 'closed_form', 'douglas_rachford' and 'gradient_descent'.
      rtol: The weights leave out the singular values of X, its rows brought to unit norm up to powers of two, at most
        this share of the largest.  By default, and at least, that is the rounding of float64,
        `2 sqrt(max(d_0, n)) eps`.  A larger share gives smaller weights; the certificate says what that costs.
      **settings: The settings of the method, for instance `iterations=2000` for 'douglas_rachford'.

    Raises:
      SpectralError: The data, widths, gamma or rtol are not allowed, or the result leaves the range of the numbers.
        Widths with `d_min > min(d_0, d_H, n)` are allowed, and flagged in the result.
      UnknownNameError: The method or a setting is unknown.
    """
    check_gamma(gamma)
    widths = check_widths(widths)
    _check_settings(method, settings)
    check_rtol(rtol)
    check_data(x, y)
    numbers = {name: value for name, value in settings.items() if isinstance(value, Number)}
    rest = {name: value for name, value in settings.items() if name not in numbers}
    static = tuple(sorted(numbers.items()))

    def program(x: Any, y: Any, gamma: Any, powers: Powers, rtol: Any, dependent: Any, dtype: str) -> Any:
        return solve_scaled(
            x, y, gamma, powers, rtol, dependent, rest, widths=widths, method=method, numbers=static, dtype=dtype
        )

    return _run(x, y, gamma, len(widths) + 1, rtol, rest, program)


def regularisation_path(
    x: Float[Any, "d_0 n"],
    y: Float[Any, "d_H n"],
    *,
    gammas: Float[Any, " g"],
    widths: Sequence[int],
    rtol: float | None = None,
) -> SpectralSolution:
    """Solves problem (4) by its closed form for every gamma at once; X is decomposed once.

    Args:
      x: The inputs `[d_0, n]`, as in `solve`.
      y: The targets `[d_H, n]`.
      gammas: The regularisations `[g]`, each at least 0.
      widths: The hidden widths `(d_1, ..., d_{H-1})`.
      rtol: As in `solve`.

    Returns:
      The solutions as one; each field leads with `[g]`.

    Raises:
      SpectralError: See `solve`.
    """
    check_gamma(gammas, ndim=1)
    widths = check_widths(widths)
    check_rtol(rtol)
    check_data(x, y)

    def program(x: Any, y: Any, gammas: Any, powers: Powers, rtol: Any, dependent: Any, dtype: str) -> Any:
        return path_scaled(x, y, gammas, powers, rtol, dependent, widths=widths, dtype=dtype)

    return _run(x, y, gammas, len(widths) + 1, rtol, (), program)
