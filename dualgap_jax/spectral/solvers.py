"""Three independent routes to the global optimum of problem (4), for data in memory.

All run inside `jit` and `vmap`, in float64 whatever the data and the mode of JAX.  They share the singular value
decomposition of X, through which the row space of X is reduced to coordinates, and the certificate; nothing else.

| method | what it does | source |
|---|---|---|
| `closed_form` | singular values of Yt, soft-thresholded | Theorem 2 |
| `douglas_rachford` | splits the dual (5) into the proximal operator of `1/2 ||.||_r^2` and a clipping | footnote 5 |
| `gradient_descent` | first-order steps on problem (4) from random weights | |
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from dualgap_jax.registry import Table
from dualgap_jax.spectral import functions
from dualgap_jax.spectral.certificate import SAFETY, dual_rounding, lower_bound, primal_rounding
from dualgap_jax.spectral.problem import (
    Real,
    Weights,
    exact_products,
    objective,
    product,
    random_weights,
)
from dualgap_jax.spectral.reduction import Problem, reduce_rows
from dualgap_jax.spectral.scaling import Powers, shift
from dualgap_jax.spectral.solution import SpectralSolution, assemble, default_rtol, finish
from dualgap_jax.spectral.splitting import clip_singular_values, douglas_rachford_iterates
from dualgap_jax.types import KeyArray

# --- the certificate ------------------------------------------------------------------------------------------------


def dual_value(problem: Problem, coefficients: Float[Array, "d_H d_0"]) -> tuple[Real, Float[Array, "d_H d_0"]]:
    """A lower bound of (5) at `Lambda = coefficients @ X`, and the coefficients, shrunk where `||Lambda|| > gamma`."""
    x, y, reduced, gamma = problem.x, problem.y, problem.reduced, problem.gamma
    dual = coefficients @ x
    norm = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(dual @ dual.T)[-1], 0))
    shrink = jnp.where(norm > gamma, gamma / jnp.where(norm > 0, norm, 1), 1)
    fitted = reduced.fit @ x
    rest, misfit = fitted - shrink * dual, y - fitted
    cross = rest @ misfit.T
    turned = jnp.sum((misfit @ x.T @ reduced.whiten) ** 2, axis=0)
    spread = jnp.sum(misfit**2) * reduced.blur**2
    half_norm = 0.5 * jnp.sum(y**2)
    value = lower_bound(
        half_norm,
        rest @ rest.T + cross + cross.T,
        SAFETY * jnp.sum(turned + spread),
        misfit @ misfit.T,
        reduced.unresolved,
        dual_rounding(reduced.fit, jnp.sum(x**2), half_norm),
        problem.r,
    )
    return value, shrink * coefficients


@jax.custom_jvp
def _with_slopes(value: Array, data: tuple[Array, ...], slopes: tuple[Array, ...]) -> Array:
    """The value; its derivatives in the data are the slopes, whatever it was computed from."""
    return value


@_with_slopes.defjvp
def _with_slopes_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    value, data, slopes = primals
    value = _with_slopes(value, data, slopes)
    return value, sum((jnp.sum(s * t) for s, t in zip(slopes, tangents[1], strict=True)), jnp.zeros_like(value))


def _slopes(problem: Problem) -> tuple[Array, Array, Array]:
    """The derivatives of the optimum in X, Y and gamma.

    With `Yt = U S V^T` and `M = U_r (S_r - gamma)_+ V_r^T = W X` the optimal product, the optimum is
    `1/2 ||Y||^2 - 1/2 sum_{i <= r} (S_i - gamma)_+^2`.  Its derivatives, by the envelope theorem, are
    `-W^T (Y - Yt)` in X, where the rank of X does not change, `Y - M` in Y and `sum_{i <= r} (S_i - gamma)_+` in gamma.
    They are continuous in gamma, and in Y but where the r-th and the next singular value meet above gamma; between such
    points and the kinks, where a singular value is gamma, they have derivatives again.
    """
    x, y, gamma = problem.x, problem.y, problem.gamma
    reduced, r = jax.tree.map(lax.stop_gradient, problem.reduced), problem.r
    left, sigma, right = jnp.linalg.svd(reduced.targets, full_matrices=False)
    kept = jnp.where(jnp.arange(len(sigma)) < r, jnp.maximum(sigma - lax.stop_gradient(gamma), 0), 0)
    fitted = (left * kept[None, :]) @ right
    known = functions.with_derivatives_of
    inverse = functions.pseudoinverse(x, reduced.basis.T @ reduced.inverse)
    projected = known(reduced.targets @ reduced.basis, (y @ inverse) @ x)
    optimal = known(fitted @ reduced.basis, functions.applied(functools.partial(functions.above, r), projected, gamma))
    first = known(fitted @ reduced.inverse, optimal @ inverse)
    ones = functions.applied(functools.partial(functions.whether_above, r), projected, gamma)
    total = known(jnp.sum(kept), jnp.sum(ones * projected) - gamma * jnp.sum(lax.stop_gradient(kept > 0)))
    return -first.T @ (y - projected), y - optimal, total


def _restored(solution: SpectralSolution, problem: Problem) -> SpectralSolution:
    """The solution of the problem in its own unit as one of the problem as given; without numbers there is no gap."""
    rows, targets = problem.powers
    data, slopes = (problem.x, problem.y, problem.gamma), _slopes(problem)
    primal, dual = (_with_slopes(lax.stop_gradient(v), data, slopes) for v in (solution.primal, solution.dual))
    half_norm = 0.5 * jnp.sum(problem.y**2)
    given = solution._replace(
        dual_variable=type(solution.dual_variable)(shift(solution.dual_variable.coefficients, targets - rows[None, :])),
        singular_values=shift(solution.singular_values, targets),
        gamma=shift(solution.gamma, targets),
        primal=shift(primal, 2 * targets),
        dual=shift(dual, 2 * targets),
        sigma_min=shift(solution.sigma_min, targets),
    )
    unit = shift(half_norm, 2 * targets)
    sound = jnp.isfinite(unit) & ((unit >= jnp.finfo(unit.dtype).tiny) | (half_norm == 0)) & (problem.gamma >= 0)
    for leaf in jax.tree.leaves(given):
        sound &= jnp.all(jnp.isfinite(leaf))
    gap = lax.stop_gradient(solution.relative_gap)
    return given._replace(relative_gap=jnp.where(sound, gap, jnp.nan))


def _certified(
    problem: Problem, weights: tuple[Array, ...], coefficients: Array, iterative: bool = False
) -> SpectralSolution:
    """The solution of the problem as given, with its certificate.

    Problem (4) is 1-strongly convex in `W_H ... W_1 X` where r does not bind: a result with a gap g lies within
    `sqrt(2 g)` of the optimum.  Singular values of an iterative result below that do not count as rank.
    """
    x, y, gamma, (rows, targets) = problem.x, problem.y, problem.gamma, problem.powers
    step = targets // len(weights)
    returned = (shift(weights[0], step - rows[None, :]), *(shift(w, step) for w in weights[1:]))
    returned = lax.optimization_barrier(tuple(w.astype(problem.dtype) for w in returned))
    exact = [w.astype(jnp.float64) for w in returned]
    exact = [shift(exact[0], rows[None, :] - step), *(shift(w, -step) for w in exact[1:])]
    half_norm = 0.5 * jnp.sum(y**2)
    dual, coefficients = dual_value(problem, coefficients)
    sizes = x.shape[0], y.shape[0], x.shape[1]
    kept = jnp.linalg.svd(product(exact) @ problem.reduced.inputs, compute_uv=False)
    floor = default_rtol(sizes[0], sizes[2], problem.dtype) * jnp.sqrt(2 * half_norm)
    misfit = 0.5 * jnp.sum((y - product(exact) @ x) ** 2)
    primal = objective(exact, x, y, gamma) + primal_rounding(exact, jnp.sum(x**2), misfit, half_norm, gamma)
    if iterative:
        floor = jnp.maximum(floor, jnp.sqrt(2 * jnp.maximum(primal - dual, 0)))
    found = finish(
        returned,
        coefficients,
        jnp.linalg.svd(problem.reduced.targets, compute_uv=False),
        jnp.sum(kept > floor),
        gamma,
        primal,
        dual,
        half_norm,
        sizes,
        default_rtol(sizes[1], sizes[2]),
        problem.reduced.unresolved,
    )
    return _restored(found, problem)


def _from_product(problem: Problem, fitted: Float[Array, "d_H m"]) -> tuple[Array, ...]:
    """The balanced weights with `W_H ... W_1 X` equal to `fitted`, cut to rank r, in reduced coordinates."""
    left, sigma, right = jnp.linalg.svd(fitted, full_matrices=False)
    r = problem.r
    return assemble(sigma[:r], left[:, :r], (right[:r]) @ problem.reduced.inverse, problem.widths)


def _clipped_fit(problem: Problem) -> Float[Array, "d_H d_0"]:
    """`Lambda* = U min(S, gamma) V^T` of Theorem 2, as coefficients: of all that float64 resolves of Yt, cut or not."""
    fitted = problem.reduced.fit @ problem.x
    left, sigma, _ = jnp.linalg.svd(fitted, full_matrices=False)
    factor = jnp.where(sigma > problem.gamma, problem.gamma / jnp.where(sigma > 0, sigma, 1), 1)
    return (left * factor[None, :]) @ (left.T @ problem.reduced.fit)


# --- the methods ----------------------------------------------------------------------------------------------------


def closed_form(problem: Problem) -> SpectralSolution:
    """Theorem 2: `Lambda* = U min(S, gamma) V^T`, and the weights from the first r values of `max(S - gamma, 0)`."""
    left, sigma, right = jnp.linalg.svd(problem.reduced.targets, full_matrices=False)
    right = right @ problem.reduced.inverse
    r = problem.r
    weights = assemble(jnp.maximum(sigma[:r] - problem.gamma, 0), left[:, :r], right[:r], problem.widths)
    return _certified(problem, weights, _clipped_fit(problem))


def douglas_rachford(problem: Problem, iterations: int = 1000) -> SpectralSolution:
    """Footnote 5: Douglas-Rachford splitting of the dual; weights from the primal matrix that it finds with it.

    Args:
      problem: what to solve.
      iterations: number of them; the certificate says whether they were enough.
    """
    half_norm = 0.5 * jnp.sum(problem.y**2)
    found = douglas_rachford_iterates(problem.reduced.targets, problem.gamma, problem.r, half_norm, iterations)
    return _certified(problem, _from_product(problem, found.fitted), found.dual @ problem.reduced.inverse, True)


@exact_products
def full_batch_descent(
    weights: Weights,
    x: Float[Array, "d_0 n"],
    y: Float[Array, "d_H n"],
    gamma: ArrayLike,
    optimizer: optax.GradientTransformation,
    steps: int,
) -> tuple[tuple[Array, ...], Float[Array, " steps"]]:
    """Takes full-batch steps of an optax optimiser on problem (4).

    Args:
      weights: The layers `W_1, ..., W_H` at the start.
      x: The inputs `[d_0, n]`.
      y: The targets `[d_H, n]`.
      gamma: The regularisation.
      optimizer: The transformation, with its rate and its sign.
      steps: The number of steps.

    Returns:
      The weights after the last step, and the objective before each step, `[steps]`.
    """

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], Array]:
        weights, state = carry
        value, gradient = jax.value_and_grad(objective)(weights, x, y, gamma)
        updates, state = optimizer.update(gradient, state, weights)
        return (optax.apply_updates(weights, updates), state), value

    start = tuple(weights)
    (last, _), values = lax.scan(step, (start, optimizer.init(start)), length=steps)
    return last, values


def gradient_descent(
    problem: Problem, key: KeyArray | None = None, steps: int = 5000, learning_rate: float = 0.01, scale: float = 1.0
) -> SpectralSolution:
    """Adam with a cosine schedule on problem (4) from random weights; the residual, clipped, is its dual variable.

    Nothing here knows of Theorem 2.  The objective is not convex in the weights and the run need not reach the
    optimum: the certificate says how far it is at most.

    Args:
      problem: what to solve.
      key: of the initial weights.
      steps: number of them.
      learning_rate: of Adam at the first step, for Y of a norm near 1 and X divided by its longest direction.
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
    weights, _ = full_batch_descent(start, reduced.inputs / unit, reduced.targets, problem.gamma, optimizer, steps)
    weights = (weights[0] / unit, *weights[1:])
    residual = reduced.targets - product(weights) @ reduced.inputs
    return _certified(problem, weights, clip_singular_values(residual, problem.gamma) @ reduced.inverse, True)


METHODS: Table[Any] = Table(
    "method",
    {"closed_form": closed_form, "douglas_rachford": douglas_rachford, "gradient_descent": gradient_descent},
)
"""Name -> solver, a function of the problem and of settings of its own."""


# --- programs -------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("widths", "method", "numbers", "dtype"))
def solve_scaled(
    x: Array,
    y: Array,
    gamma: Array,
    powers: Powers,
    rtol: Any,
    dependent: Any,
    settings: dict[str, Any],
    *,
    widths: tuple[int, ...],
    method: str,
    numbers: tuple[tuple[str, Any], ...],
    dtype: str,
) -> SpectralSolution:
    """One program for data of one shape: later calls do not trace again."""
    problem = Problem(x, y, gamma, widths, reduce_rows(x, y, rtol, dependent), powers, dtype)
    return METHODS[method](problem, **settings, **dict(numbers))


@functools.partial(jax.jit, static_argnames=("widths", "dtype"))
def path_scaled(
    x: Array, y: Array, gammas: Array, powers: Powers, rtol: Any, dependent: Any, *, widths: tuple[int, ...], dtype: str
) -> SpectralSolution:
    """The closed form for every gamma; X is decomposed once."""
    reduced = reduce_rows(x, y, rtol, dependent)
    return jax.vmap(lambda gamma: closed_form(Problem(x, y, gamma, widths, reduced, powers, dtype)))(gammas)
