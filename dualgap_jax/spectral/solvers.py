"""Three independent routes to the global optimum of problem (4), for data in memory.

All run inside `jit` and `vmap`.  They share the singular value decomposition of X, through which the row space of X is
reduced to coordinates, and the certificate; nothing else.

| method | what it does | source |
|---|---|---|
| `closed_form` | singular values of Yt, soft-thresholded | Theorem 2 |
| `douglas_rachford` | splits the dual (5) into the proximal operator of `1/2 ||.||_r^2` and a clipping | footnote 5 |
| `gradient_descent` | first-order steps on problem (4) from random weights | |
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from numbers import Real as Number
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from dualgap_jax.registry import Table, UnknownNameError, unknown
from dualgap_jax.spectral.problem import (
    Real,
    SpectralError,
    SpectralSolution,
    Weights,
    as_data,
    assemble,
    check_gamma,
    check_widths,
    default_rtol,
    exact_products,
    finish,
    is_concrete,
    narrowest,
    objective,
    product,
    r_norm_squared,
    random_weights,
)
from dualgap_jax.types import KeyArray


class Reduced(NamedTuple):
    """Data in coordinates of the row space of X: with `X = U_x S V_x^T` cut to its numerical rank.

    Attributes:
      targets: `C = Y V_x`, `[d_H, m]`, so that `Yt = C V_x^T`; m = min(d_0, n), zero beyond the rank.
      certified: the same cut at the level of rounding only, also where `targets` is cut further.
      inputs: `X V_x = U_x S`, `[d_0, m]`.
      inverse: `V_x^T X^+ = S^+ U_x^T`, `[m, d_0]`.
    """

    targets: Float[Array, "d_H m"]
    certified: Float[Array, "d_H m"]
    inputs: Float[Array, "d_0 m"]
    inverse: Float[Array, "m d_0"]


def reduce_rows(x: Float[Array, "d_0 n"], y: Float[Array, "d_H n"], rtol: ArrayLike | None = None) -> Reduced:
    """Both matrices in an orthonormal basis of the row space of X.

    Args:
      x, y: data, one example a column.
      rtol: singular values of X below this share of the largest count as zero; `2 sqrt(max(d_0, n)) eps` by default.
    """
    left, sigma, right = jnp.linalg.svd(x, full_matrices=False)
    rounding = default_rtol(x.shape[0], x.shape[1], x.dtype)
    share = rounding if rtol is None else rtol
    keep, visible = sigma > share * sigma[0], sigma > jnp.minimum(share, rounding) * sigma[0]
    inverse = jnp.where(keep, 1 / jnp.where(keep, sigma, 1), 0)
    targets = y @ right.T
    return Reduced(
        targets * keep[None, :],
        targets * visible[None, :],
        left * jnp.where(keep, sigma, 0)[None, :],
        inverse[:, None] * left.T,
    )


def dual_value(
    reduced: Reduced, coefficients: Float[Array, "d_H d_0"], half_norm: Real, gamma: Array, r: int
) -> tuple[Real, Float[Array, "d_H d_0"]]:
    """The dual (5) at `Lambda = coefficients @ X`, and the coefficients, shrunk where `||Lambda|| > gamma`."""
    dual = coefficients @ reduced.inputs
    norm = jnp.linalg.norm(dual, 2)
    shrink = jnp.where(norm > gamma, gamma / jnp.where(norm > 0, norm, 1), 1)
    return half_norm - 0.5 * r_norm_squared(reduced.certified - shrink * dual, r), shrink * coefficients


class _Problem(NamedTuple):
    """What the methods work on."""

    x: Array
    y: Array
    gamma: Array
    widths: tuple[int, ...]
    reduced: Reduced

    @property
    def r(self) -> int:
        return narrowest(self.widths, self.x.shape[0], *self.y.shape)


def _certified(
    problem: _Problem, weights: tuple[Array, ...], coefficients: Array, iterative: bool = False
) -> SpectralSolution:
    """The solution with its certificate.

    Problem (4) is 1-strongly convex in `W_H ... W_1 X` where r does not bind: a result with a gap g lies within
    `sqrt(2 g)` of the optimum.  Singular values of an iterative result below that do not count as rank.
    """
    x, y, gamma = problem.x, problem.y, problem.gamma
    half_norm = 0.5 * jnp.sum(y**2)
    dual, coefficients = dual_value(problem.reduced, coefficients, half_norm, gamma, problem.r)
    sizes = x.shape[0], y.shape[0], x.shape[1]
    kept = jnp.linalg.svd(product(weights) @ problem.reduced.inputs, compute_uv=False)
    floor = default_rtol(sizes[0], sizes[2], x.dtype) * jnp.sqrt(2 * half_norm)
    primal = objective(weights, x, y, gamma)
    if iterative:
        floor = jnp.maximum(floor, jnp.sqrt(2 * jnp.maximum(primal - dual, 0)))
    return finish(
        weights,
        coefficients,
        jnp.linalg.svd(problem.reduced.targets, compute_uv=False),
        jnp.sum(kept > floor),
        gamma,
        primal,
        dual,
        half_norm,
        sizes,
        default_rtol(sizes[1], sizes[2], x.dtype),
    )


def _from_product(problem: _Problem, fitted: Float[Array, "d_H m"]) -> tuple[Array, ...]:
    """The balanced weights with `W_H ... W_1 X` equal to `fitted`, cut to rank r, in reduced coordinates."""
    left, sigma, right = jnp.linalg.svd(fitted, full_matrices=False)
    r = problem.r
    return assemble(sigma[:r], left[:, :r], (right[:r]) @ problem.reduced.inverse, problem.widths)


# --- the closed form ------------------------------------------------------------------------------------------------


def closed_form(problem: _Problem) -> SpectralSolution:
    """Theorem 2: `Lambda* = U min(S, gamma) V^T`, and the weights from the first r values of `max(S - gamma, 0)`."""
    left, sigma, right = jnp.linalg.svd(problem.reduced.targets, full_matrices=False)
    right = right @ problem.reduced.inverse
    r = problem.r
    weights = assemble(jnp.maximum(sigma[:r] - problem.gamma, 0), left[:, :r], right[:r], problem.widths)
    return _certified(problem, weights, (left * jnp.minimum(sigma, problem.gamma)[None, :]) @ right)


# --- Douglas-Rachford -----------------------------------------------------------------------------------------------


def prox_r_norm(matrix: Float[Array, "a b"], r: int, step: ArrayLike = 1.0) -> Float[Array, "a b"]:
    """The proximal operator of `step * 1/2 ||.||_r^2`: argmin over M of `step/2 ||M||_r^2 + 1/2 ||M - matrix||_F^2`.

    The singular vectors stay.  Of the singular values z_1 >= z_2 >= ... the first r are divided by `1 + step`, unless
    that takes them below later ones; then values on both sides of the r-th meet at one number t, the root of

        sum_{i <= r} max((1 + step) t - z_i, 0)  =  sum_{i > r} max(z_i - t, 0),

    and the result is `max(z_i / (1 + step), t)` for i <= r, `min(z_i, t)` for i > r.  Both sides are piecewise linear
    and monotone in t, so the root is exact between two neighbouring breakpoints.

    Source: the operator is that of Grussler, Rantzer and Giselsson (2018), for any r; derived here from the optimality
    conditions.

    Raises:
      SpectralError: for r below 1 or a negative step.
    """
    if r < 1:
        raise SpectralError(f"r={r} must be at least 1.")
    if is_concrete(step) and not np.asarray(step) >= 0:
        raise SpectralError(f"step={step} must be at least 0.")
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


def clip_singular_values(matrix: Float[Array, "a b"], ceiling: ArrayLike) -> Float[Array, "a b"]:
    """The projection onto `||M|| <= ceiling`."""
    left, sigma, right = jnp.linalg.svd(matrix, full_matrices=False)
    return (left * jnp.minimum(sigma, ceiling)[None, :]) @ right


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


def douglas_rachford(problem: _Problem, iterations: int = 1000) -> SpectralSolution:
    """Footnote 5: Douglas-Rachford splitting of the dual; weights from the primal matrix that it finds with it.

    Args:
      problem: what to solve.
      iterations: number of them; the certificate says whether they were enough.
    """
    half_norm = 0.5 * jnp.sum(problem.y**2)
    found = douglas_rachford_iterates(problem.reduced.targets, problem.gamma, problem.r, half_norm, iterations)
    return _certified(problem, _from_product(problem, found.fitted), found.dual @ problem.reduced.inverse, True)


# --- gradient descent -----------------------------------------------------------------------------------------------


@exact_products
def descend(
    weights: Weights,
    x: Float[Array, "d_0 n"],
    y: Float[Array, "d_H n"],
    gamma: ArrayLike,
    optimizer: optax.GradientTransformation,
    steps: int,
) -> tuple[tuple[Array, ...], Float[Array, " steps"]]:
    """`steps` full-batch steps of an optax optimiser on problem (4); returns weights and the objective before each."""

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], Array]:
        weights, state = carry
        value, gradient = jax.value_and_grad(objective)(weights, x, y, gamma)
        updates, state = optimizer.update(gradient, state, weights)
        return (optax.apply_updates(weights, updates), state), value

    start = tuple(weights)
    (last, _), values = lax.scan(step, (start, optimizer.init(start)), length=steps)
    return last, values


def gradient_descent(
    problem: _Problem, key: KeyArray | None = None, steps: int = 5000, learning_rate: float = 0.01, scale: float = 1.0
) -> SpectralSolution:
    """Adam with a cosine schedule on problem (4) from random weights; the residual, clipped, is its dual variable.

    Nothing here knows of Theorem 2.  The objective is not convex in the weights and the run need not reach the
    optimum: the certificate says how far it is at most.

    Args:
      problem: what to solve.
      key: of the initial weights.
      steps: number of them.
      learning_rate: of Adam at the first step; X is divided by its largest singular value first.
      scale: of the initial weights, see `random_weights`.
    """
    x, y, reduced = problem.x, problem.y, problem.reduced
    # The problem in reduced coordinates has the same objective, apart from the part of Y outside the row space of X.
    unit = jnp.max(jnp.sqrt(jnp.sum(reduced.inputs**2, axis=0)))
    unit = jnp.where(unit > 0, unit, 1)
    start = random_weights(
        jax.random.key(0) if key is None else key, (x.shape[0], *problem.widths, y.shape[0]), scale, x.dtype
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
    weights, _ = descend(start, reduced.inputs / unit, reduced.targets, problem.gamma, optimizer, steps)
    weights = (weights[0] / unit, *weights[1:])
    residual = reduced.targets - product(weights) @ reduced.inputs
    return _certified(problem, weights, clip_singular_values(residual, problem.gamma) @ reduced.inverse, True)


# --- the front door -------------------------------------------------------------------------------------------------

METHODS: Table[Any] = Table(
    "method",
    {"closed_form": closed_form, "douglas_rachford": douglas_rachford, "gradient_descent": gradient_descent},
)
"""Name -> solver, a function of the problem and of settings of its own."""


def _check_settings(method: str, settings: Mapping[str, Any], rtol: Any) -> None:
    allowed = [name for name in inspect.signature(METHODS[method]).parameters if name != "problem"]
    for name in settings:
        if name not in allowed:
            raise UnknownNameError(unknown(f"setting of method {method!r}:", name, allowed))
    if rtol is not None and is_concrete(rtol) and not 0 <= float(rtol) < 1:
        raise SpectralError(f"rtol={rtol} must lie in [0, 1): a share of the largest singular value of X.")


@functools.partial(jax.jit, static_argnames=("widths", "method", "numbers"))
def _solve(
    x: Array,
    y: Array,
    gamma: Array,
    rtol: Any,
    settings: dict[str, Any],
    *,
    widths: tuple[int, ...],
    method: str,
    numbers: tuple[tuple[str, Any], ...],
) -> SpectralSolution:
    """One program for data of one shape: later calls do not trace again."""
    problem = _Problem(x, y, gamma, widths, reduce_rows(x, y, rtol))
    return METHODS[method](problem, **settings, **dict(numbers))


@functools.partial(jax.jit, static_argnames="widths")
def _path(x: Array, y: Array, gammas: Array, rtol: Any, *, widths: tuple[int, ...]) -> SpectralSolution:
    reduced = reduce_rows(x, y, rtol)
    return jax.vmap(lambda gamma: closed_form(_Problem(x, y, gamma, widths, reduced)))(gammas)


@exact_products
def solve(
    x: Float[ArrayLike, "d_0 n"],
    y: Float[ArrayLike, "d_H n"],
    *,
    gamma: ArrayLike,
    widths: Sequence[int],
    method: str = "closed_form",
    rtol: float | None = None,
    **settings: Any,
) -> SpectralSolution:
    """Solves problem (4) for data in memory and certifies the result.

    Runs inside `jit` (with static `widths` and `method`) and under `vmap` over `gamma`, `x` and `y`.  It decomposes X;
    for large n see `solve_columns`.

    Args:
      x: `[d_0, n]`, one example a column, float32 or float64.
      y: `[d_H, n]`.
      gamma: regularisation, at least 0.
      widths: the hidden widths `(d_1, ..., d_{H-1})`; they set the depth H.
      method: 'closed_form', 'douglas_rachford' or 'gradient_descent'.
      rtol: the solution takes singular values of X below this share of the largest as zero; `2 sqrt(max(d_0, n)) eps`
        by default.  A larger one gives smaller weights; the certificate then says what that costs.
      **settings: of the method, for instance `iterations=2000` for 'douglas_rachford'.

    Raises:
      SpectralError: for data, widths or gamma that are not allowed.  Widths with `d_min > min(d_0, d_H, n)` are
        allowed, and flagged in the result.
      UnknownNameError: for an unknown method or setting.
    """
    check_gamma(gamma)
    widths = check_widths(widths)
    _check_settings(method, settings, rtol)
    x, y = as_data(x, y)
    numbers = {name: value for name, value in settings.items() if isinstance(value, Number)}
    rest = {name: value for name, value in settings.items() if name not in numbers}
    static = tuple(sorted(numbers.items()))
    return _solve(x, y, jnp.asarray(gamma, x.dtype), rtol, rest, widths=widths, method=method, numbers=static)


@exact_products
def regularisation_path(
    x: Float[ArrayLike, "d_0 n"],
    y: Float[ArrayLike, "d_H n"],
    *,
    gammas: Float[ArrayLike, " g"],
    widths: Sequence[int],
    rtol: float | None = None,
) -> SpectralSolution:
    """The closed form for every gamma at once; each field of the result leads with `[g]`.  X is decomposed once.

    Args:
      x, y, widths, rtol: as in `solve`.
      gammas: one-dimensional.

    Raises:
      SpectralError: see `solve`.
    """
    check_gamma(gammas, ndim=1)
    widths = check_widths(widths)
    _check_settings("closed_form", {}, rtol)
    x, y = as_data(x, y)
    return _path(x, y, jnp.asarray(gammas, x.dtype), rtol, widths=widths)
