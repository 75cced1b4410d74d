"""The spectral bound of one hidden layer, with weights of the examples that make it least; any number of outputs.

With `psi(t) = (1+s)/2 t + (1-s)/2 |t|` for the slope s, and `2 |p| |t| <= delta p^2 + t^2 / delta`,

    rho = max over |a| = |u| = 1 of (1/n) sum_j (a.alpha_j) psi(u.x_j) <= 2 lambda_max(K),   K = [[P, Q], [Q^T, R]],
    P = (1-s)/(4n) sum_j delta_j alpha_j alpha_j^T,  R = (1-s)/(4n) sum_j x_j x_j^T / delta_j,
    Q = (1+s)/(4n) sum_j alpha_j x_j^T,

for any `delta_j > 0`.  By duality the least of these bounds is the largest value over second moments `Z Z^T` of a and u
together, `Z = (A, U)` with `|A| = |U| = 1`, of

    (1+s)/2 tr(A^T B U) + (1-s)/2 (1/n) sum_j |A^T alpha_j| |U^T x_j|,   B = (1/n) sum_j alpha_j x_j^T,

which is maximised by L-BFGS in low rank; there `delta_j = |U^T x_j| / |A^T alpha_j|`.  `raised` looks for the dual
vectors whose bound proves most: the bound is convex in alpha and `1 / delta` together.  Nothing of the searches is
trusted: `bounded` says what given weights prove.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jax import Array

from dualgap_jax.certify.descent import lbfgs
from dualgap_jax.certify.problem import RiskProblem

_EPS = float(np.finfo(np.float64).eps)
_RANK = 12
_ROWS = 4096  # examples that the search for moments looks at
_STEPS = 200
_CORNERS = (1e-1, 1e-2, 1e-3)
_LEVELS = ((50.0, 150), (500.0, 150), (3000.0, 400))  # sharpness of the largest eigenvalue, principal directions
_WORK = 6e10  # of products of examples and squared directions, for each level of `raised`
_EDGE = 0.1  # from the end of the domain, where `raised` begins


class Weights(NamedTuple):
    """A proven bound on rho and what it follows from.

    Attributes:
      upper: of rho.
      delta: `[n]`, positive, for inputs and dual vectors divided by the powers of two that bring the largest number of
        each into [1/2, 1).
    """

    upper: float
    delta: np.ndarray


def used(x: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """`[n]`: whether an example adds anything."""
    return np.asarray(x.any(axis=1) & alpha.any(axis=1))


def deltas(x: np.ndarray, alpha: np.ndarray, slope: float) -> np.ndarray:
    """Weights `[n]` near the best, 1 for examples that add nothing; x and alpha are of size 1."""
    rows, found = np.flatnonzero(used(x, alpha)), np.ones(len(x))
    if not len(rows):
        return found
    some = rows[:: -(-len(rows) // _ROWS)]
    a, u = _moments(x[some], alpha[some], slope)
    units = np.linalg.norm(alpha[rows], axis=1), np.linalg.norm(x[rows], axis=1)
    share = _CORNERS[-1] / math.sqrt(alpha.shape[1]), _CORNERS[-1] / math.sqrt(x.shape[1])
    seen = [
        np.sqrt(np.sum((rows_ @ z) ** 2, axis=1) + (s * size) ** 2 + 1e-300)
        for rows_, z, s, size in zip((alpha[rows], x[rows]), (a, u), share, units, strict=True)
    ]
    found[rows] = np.clip(seen[1] / seen[0], 1e-60, 1e60)
    return found * _balance(x, alpha, found, slope)


def _moments(x: np.ndarray, alpha: np.ndarray, slope: float) -> tuple[np.ndarray, np.ndarray]:
    """`A [out, r]` and `U [d, r]`, of norm 1, near the largest value."""
    (n, d), out = x.shape, alpha.shape[1]
    mean = alpha.T @ x / n
    sizes = math.sqrt(float(np.mean(alpha**2))), math.sqrt(float(np.mean(x**2)))
    unit = sizes[0] * sizes[1] * math.sqrt(out * d)

    def objective(flat: np.ndarray, width: float) -> tuple[float, np.ndarray]:
        a, u = flat[: out * _RANK].reshape(out, _RANK), flat[out * _RANK :].reshape(d, _RANK)
        norms = float(np.linalg.norm(a)), float(np.linalg.norm(u))
        a, u = a / norms[0], u / norms[1]
        p, t = alpha @ a, x @ u
        long_p = np.sqrt(np.sum(p * p, axis=1) + (width * sizes[0]) ** 2)
        long_t = np.sqrt(np.sum(t * t, axis=1) + (width * sizes[1]) ** 2)
        straight, bent = 0.5 * (1 + slope), 0.5 * (1 - slope)
        value = straight * float(np.sum(a * (mean @ u))) + bent * float(np.mean(long_p * long_t))
        on_a = straight * (mean @ u) + bent / n * (alpha.T @ (p * (long_t / long_p)[:, None]))
        on_u = straight * (mean.T @ a) + bent / n * (x.T @ (t * (long_p / long_t)[:, None]))
        on_a = (on_a - float(np.sum(on_a * a)) * a) / norms[0]
        on_u = (on_u - float(np.sum(on_u * u)) * u) / norms[1]
        return -value / unit, -np.concatenate([on_a.ravel(), on_u.ravel()]) / unit

    flat = np.random.default_rng(0).standard_normal((out + d) * _RANK)
    for width in _CORNERS:
        flat = lbfgs(objective, flat, width, maxiter=_STEPS, maxcor=10, ftol=1e-10)
    a, u = flat[: out * _RANK].reshape(out, _RANK), flat[out * _RANK :].reshape(d, _RANK)
    return a / np.linalg.norm(a), u / np.linalg.norm(u)


def _balance(x: np.ndarray, alpha: np.ndarray, delta: np.ndarray, slope: float) -> float:
    """The factor of all weights that makes the bound least."""
    k, parts = _blocks(x, alpha, delta, slope)
    out = alpha.shape[1]
    start = np.random.default_rng(0).standard_normal(len(k))

    def top(log: float) -> float:
        scaled = k.copy()
        scaled[:out, :out] *= math.exp(log)
        scaled[out:, out:] *= math.exp(-log)
        if len(k) < 64:
            return float(np.linalg.eigvalsh(scaled)[-1])
        return float(scipy.sparse.linalg.eigsh(scaled, 1, which="LA", v0=start, tol=1e-5)[0][0])

    if not (parts[0] > 0 and parts[1] > 0):
        return 1.0
    options = {"xatol": 1e-2}
    return math.exp(float(scipy.optimize.minimize_scalar(top, bounds=(-2, 2), method="bounded", options=options).x))


def _blocks(x: np.ndarray, alpha: np.ndarray, delta: np.ndarray, slope: float) -> tuple[np.ndarray, list[float]]:
    """K, and the sums of the sizes of what is added up in P, R and Q."""
    rows = used(x, alpha)
    x, alpha, delta, n, out = x[rows], alpha[rows], delta[rows], len(x), alpha.shape[1]
    k = np.zeros((out + x.shape[1],) * 2)
    bent, straight = (1 - slope) / (4 * n), (1 + slope) / (4 * n)
    k[:out, :out] = bent * (alpha.T @ (delta[:, None] * alpha))
    k[out:, out:] = bent * (x.T @ (x / delta[:, None]))
    k[:out, out:] = straight * (alpha.T @ x)
    k[out:, :out] = k[:out, out:].T
    squares = np.sum(alpha**2, axis=1), np.sum(x**2, axis=1)
    sizes = (
        bent * (delta @ squares[0]),
        bent * np.sum(squares[1] / delta),
        straight * np.sum(np.sqrt(np.prod(squares, 0))),
    )
    return k, [float(size) for size in sizes]


def bounded(x: np.ndarray, alpha: np.ndarray, delta: np.ndarray, slope: float) -> float:
    """The bound on rho that weights prove, with all rounding, here and where it is proven again."""
    k, sizes = _blocks(x, alpha, delta, slope)
    if not np.isfinite(k).all():
        return math.inf
    size = len(k)
    top = float(scipy.linalg.eigh(k, eigvals_only=True, subset_by_index=[size - 1, size - 1])[0])
    spare = 4 * (len(x) + 2 * size + 64) * _EPS * (sizes[0] + sizes[1] + 2 * sizes[2])
    return 2 * (max(top, 0.0) * (1 + 8 * size * (size + 8) * _EPS) + spare) + 1e-290


# --- dual vectors -----------------------------------------------------------------------------------------------------


def raised(problem: RiskProblem, alpha: np.ndarray, *, loss: float | None = None) -> np.ndarray:
    """Dual vectors `[n, out]` whose spectral bound proves more than that of `alpha`, from which a search starts.

    Args:
      problem: the risk, of one hidden layer of ReLU or leaky units, with scales that are free.
      alpha: `[n, out]`, not all 0.
      loss: None for the largest bound on F*; a mean loss, for the largest bound on the mean h that so low a loss needs.
    """
    known = problem.structure
    assert known is not None
    x = known.inputs(problem.one.x)
    unit = math.sqrt(float(np.mean(np.sum(x**2, axis=1)))) or 1.0
    x = x / unit
    freely, inverse, gain = _domain(problem)
    start = inverse(alpha)
    first = np.asarray(freely(jnp.asarray(start)), np.float64)
    size = float(np.abs(first).max())
    logs = -np.log(deltas(x / (np.abs(x).max() or 1.0), first / size, known.negative_slope))
    logs += math.log(size) - math.log(np.abs(x).max() or 1.0)
    coordinates = _principal(x)
    flat = np.concatenate([start.ravel(), logs])
    slope, n, bias = known.negative_slope, len(x), float(known.use_bias)

    def worth(flat: Array, seen: Array, sharpness: Array) -> Array:
        rows, inverse_delta = freely(flat[:-n].reshape(alpha.shape)), jnp.exp(flat[-n:])
        p = (1 - slope) / (4 * n) * (rows.T @ (rows / inverse_delta[:, None]))
        r = (1 - slope) / (4 * n) * (seen.T @ (seen * inverse_delta[:, None]))
        q = (1 + slope) / (4 * n) * (rows.T @ seen)
        values = jnp.linalg.eigvalsh(jnp.block([[p, q], [q.T, r]]))
        top = jax.lax.stop_gradient(values[-1])
        kappa = unit * (jax.nn.logsumexp(values * (sharpness / top)) * (top / sharpness))  # rho / 2
        mean = rows.mean(axis=0)
        level = bias * (mean @ mean)
        if loss is not None:
            return (jnp.mean(gain(rows)) - level / (4 * kappa) - loss) / kappa
        if problem.penalty is not None:
            share = jnp.minimum(1.0, problem.penalty / kappa)
            return jnp.mean(gain(share * rows)) - share**2 * level / (4 * problem.penalty)
        budget = problem.budget or 0.0
        lam = jnp.maximum(kappa, jnp.sqrt(level / (4 * budget + 1e-300) + 1e-300))
        return jnp.mean(gain(rows)) - lam * budget - level / (4 * lam)

    with jax.enable_x64(True):
        both = jax.jit(jax.value_and_grad(worth))
        for sharpness, width in _LEVELS:
            seen = jnp.asarray(coordinates[:, :width])
            scale = abs(float(both(jnp.asarray(flat), seen, sharpness)[0])) or 1.0

            def objective(v: np.ndarray, seen: Any = seen, s: float = sharpness, scale: float = scale) -> Any:
                value, gradient = jax.device_get(both(jnp.asarray(v), seen, s))
                return -float(value) / scale, -np.asarray(gradient, np.float64) / scale

            steps = int(np.clip(_WORK / (n * seen.shape[1] ** 2), 20, 120))
            flat = lbfgs(objective, flat, maxiter=steps, maxfun=2 * steps, maxcor=15, ftol=1e-9)
        found = np.asarray(freely(jnp.asarray(flat[:-n].reshape(alpha.shape))), np.float64)
    return problem.conjugate.nearest(found, problem.y)


def _principal(x: np.ndarray) -> np.ndarray:
    """The coordinates of rows in their principal directions, the largest first, `[n, min(n, d)]`."""
    if len(x) >= x.shape[1]:
        return np.asarray(x @ np.linalg.eigh(x.T @ x)[1][:, ::-1])
    values, left = np.linalg.eigh(x @ x.T)
    return np.asarray((left * np.sqrt(np.maximum(values, 0.0)))[:, ::-1])


def _domain(problem: RiskProblem) -> tuple[Callable[[Array], Array], Callable[[np.ndarray], np.ndarray], Any]:
    """Rows of the domain of l* from free numbers `[n, out]`, the numbers near given rows, and minus l* of rows."""
    kind, tau, out = problem.conjugate.kind, problem.loss.tau or 1.0, problem.shape[1]
    y = np.asarray(problem.y)
    entropy = jax.scipy.special.entr

    def logit(q: np.ndarray) -> np.ndarray:
        return np.asarray(scipy.special.logit(np.clip(q, _EDGE, 1 - _EDGE)))

    if kind == "squared":
        target = y[:, None] if out == 1 else np.eye(out)[y.astype(int)]
        return lambda g: g, lambda a: a, lambda a: -jnp.sum(0.5 * a * a + a * target, axis=1)
    if out == 1:
        sign = y[:, None] * tau
        gain = (lambda q: entropy(q) + entropy(1 - q)) if kind == "logistic" else (lambda q: q)
        return (
            lambda g: -jax.nn.sigmoid(g) / sign,
            lambda a: logit(-a * sign),
            lambda a: gain((-a * sign)[:, 0]),
        )
    own = np.eye(out)[y.astype(int)]
    if kind == "logistic":
        return (
            lambda g: jax.nn.softmax(g, axis=1) - own,
            lambda a: np.log(np.clip(a + own, _EDGE / out, 1.0)),
            lambda a: jnp.sum(entropy(a + own), axis=1),
        )

    def summed(rest: Array) -> Array:
        rest = rest * (1 - own) / tau
        return rest - own * jnp.sum(rest, axis=1, keepdims=True)

    if kind == "multi-margin":
        return (
            lambda g: summed(jax.nn.sigmoid(g) / out),
            lambda a: logit(a * (out * tau)),
            lambda a: -tau * jnp.sum(a * own, axis=1),
        )

    def shares(g: Array) -> Array:  # Crammer and Singer's: the own class takes what the others leave of 1
        return summed(jax.nn.softmax(jnp.where(own > 0, 0.0, g), axis=1))

    def numbers(a: np.ndarray) -> np.ndarray:
        q = np.clip(a * tau * (1 - own), _EDGE / out, 1.0)
        left = np.clip(1 - np.sum(q * (1 - own), axis=1, keepdims=True), _EDGE, 1.0)
        return np.asarray(np.log(q / left))

    return shares, numbers, lambda a: -tau * jnp.sum(a * own, axis=1)
