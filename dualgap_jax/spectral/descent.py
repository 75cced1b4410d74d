"""SGD on problem (4) from many seeds at once, beside which a certified optimum can be seen.

Nothing here knows of Theorem 2.  The objective along the way is exact: it needs only the second moments of the data.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jax import Array, lax
from jaxtyping import Float

from dualgap_jax import seeds
from dualgap_jax.config import require
from dualgap_jax.spectral.problem import random_weights
from dualgap_jax.types import KeyArray


@dataclasses.dataclass(frozen=True)
class DescentSpec:
    """SGD with heavy-ball momentum and a cosine schedule on problem (4).

    The misfit is estimated from a mini-batch, scaled to all columns; the regulariser is exact.  X is divided by its
    largest singular value first, which changes W_1 by that factor and nothing else.

    Attributes:
      depths: the H that are trained; the optimum is the same for all of them.
      seeds: runs for each depth.
      steps: of each run.
      batch_size: columns a step, drawn with replacement.
      learning_rate: in units of the inverse of the curvature at the optimum, `H sigma_1(Yt)^{2 (H - 1) / H}`, times
        `1 + n max ||x_i||^2 / (batch_size sigma_1(X)^2)`, by how much a mini-batch may exceed it.
      momentum: in [0, 1).
      record_every: steps between two evaluations of the objective.
    """

    depths: tuple[int, ...] = (2, 3, 5)
    seeds: int = 5
    steps: int = 5000
    batch_size: int = 256
    learning_rate: float = 0.5
    momentum: float = 0.9
    record_every: int = 50

    def __post_init__(self) -> None:
        require(
            all(2 <= h <= 1000 for h in self.depths),
            f"sgd.depths={self.depths}: a depth H must lie between 2 and 1,000.",
        )
        require(len(set(self.depths)) == len(self.depths), f"sgd.depths={self.depths} names a depth twice.")
        require(self.seeds >= 1, f"sgd.seeds={self.seeds} must be at least 1.")
        require(self.batch_size >= 1, f"sgd.batch_size={self.batch_size} must be at least 1.")
        require(1 <= self.record_every <= self.steps, "sgd.record_every must lie between 1 and sgd.steps.")
        require(self.steps % self.record_every == 0, "sgd.steps must be a multiple of sgd.record_every.")
        require(0 < self.learning_rate < math.inf, f"sgd.learning_rate={self.learning_rate} must be positive.")
        require(0 <= self.momentum < 1, f"sgd.momentum={self.momentum} must lie in [0, 1).")


class Moments(NamedTuple):
    """What problem (4) needs of the data: `X X^T`, `Y X^T` and `||Y||_F^2`, in float64."""

    xx: np.ndarray
    yx: np.ndarray
    yy: float


def moments(x: Float[np.ndarray, "d_0 n"], y: Float[np.ndarray, "d_H n"], block: int = 4096) -> Moments:
    """Returns the second moments, summed over blocks of columns."""
    xx, yx = np.zeros((len(x), len(x))), np.zeros((len(y), len(x)))
    for first in range(0, x.shape[1], block):
        a, b = (m[:, first : first + block].astype(np.float64) for m in (x, y))
        xx += a @ a.T
        yx += b @ a.T
    return Moments(xx, yx, float(np.sum(np.square(y, dtype=np.float64))))


def objective_from_moments(weights: Sequence[np.ndarray], data: Moments, gamma: float) -> float:
    """Returns problem (4) at layers `W_i [d_i, d_{i-1}]`, in float64 from second moments.

    It is equal to `spectral.objective` up to rounding of `||Y||_F^2`.  Singular values of `W_1 X` below 1e-8 of the
    largest are lost in its Gram matrix; their powers do not count in the sum.  NaN for weights that are not finite.
    """
    depth = len(weights)
    if not all(np.isfinite(w).all() for w in weights):
        return math.nan
    exact = [np.asarray(w, np.float64) for w in weights]
    whole = functools.reduce(lambda done, layer: layer @ done, exact)
    misfit = 0.5 * data.yy - np.sum(whole * data.yx) + 0.5 * np.sum((whole @ data.xx) * whole)
    first = np.sqrt(np.maximum(np.linalg.eigvalsh(exact[0] @ data.xx @ exact[0].T), 0))
    powers = [first, *(np.linalg.svd(w, compute_uv=False) for w in exact[1:])]
    return float(misfit + gamma / depth * sum(np.sum(p**depth) for p in powers))


class Descent(NamedTuple):
    """SGD on problem (4) for one depth.

    Attributes:
      steps: `[k]`, where the objective was evaluated.
      objective: `[seeds, k]`, float64.
    """

    steps: np.ndarray
    objective: np.ndarray


def _penalty_gradients(weights: tuple[Array, ...], xx: Array) -> tuple[Array, ...]:
    """Gradients of `1/H (||W_1 X||_{S_H}^H + sum ||W_i||_{S_H}^H)`, through `(M M^T)^{(H-2)/2} M`."""
    depth = len(weights)

    def one(gram: Array, image: Array) -> Array:
        if depth == 2:
            return image
        values, vectors = jnp.linalg.eigh(gram)
        power = jnp.maximum(values, 0) ** ((depth - 2) / 2)
        return (vectors * power[None, :]) @ (vectors.T @ image)

    image = weights[0] @ xx
    return one(image @ weights[0].T, image), *(one(w @ w.T, w) for w in weights[1:])


def stochastic_descent(
    x: Float[np.ndarray, "d_0 n"],
    y: Float[np.ndarray, "d_H n"],
    known: Moments,
    sgd: DescentSpec,
    *,
    depth: int,
    width: int,
    gamma: float,
    curvature: float,
    seed: int,
    report: Callable[[int, float], None],
) -> Descent:
    """Trains one depth from every seed in one program, in float32; see `DescentSpec`.

    Args:
      x: The inputs `[d_0, n]`.
      y: The targets `[d_H, n]`.
      known: Their moments.
      sgd: The settings.
      depth: H.
      width: The width of every hidden layer.
      gamma: The regularisation.
      curvature: `sigma_1(Yt)`, the unit of the learning rate.
      seed: The seed of all runs.
      report: Called with the steps done and the median objective at each evaluation.
    """
    n = x.shape[1]
    start = np.ones(len(known.xx))
    largest = scipy.sparse.linalg.eigsh(known.xx, 1, v0=start, tol=1e-3, return_eigenvectors=False)
    scale = math.sqrt(float(largest[0]))
    sizes = (x.shape[0], *([width] * (depth - 1)), y.shape[0])
    rows = jnp.asarray(x.T / scale, jnp.float32), jnp.asarray(y.T, jnp.float32)
    xx = jnp.asarray(known.xx / scale**2, jnp.float32)
    longest = float(np.max(np.sum(np.square(x), axis=0, dtype=np.float64)))
    excess = 1 + n * longest / (sgd.batch_size * scale**2)
    rate = sgd.learning_rate / (depth * max(curvature, 1e-30) ** (2 * (depth - 1) / depth) * excess)

    def step(carry: tuple[Any, Any], at: tuple[Array, KeyArray], x: Array, y: Array, xx: Array) -> tuple[Any, None]:
        weights, velocity = carry
        now, key = at
        picked = jax.random.randint(jax.random.fold_in(key, now), (sgd.batch_size,), 0, n)
        x_batch, y_batch = x[picked], y[picked]

        def misfit(weights: tuple[Array, ...]) -> Array:
            fitted = functools.reduce(lambda done, layer: done @ layer.T, weights, x_batch)
            return 0.5 * n / sgd.batch_size * jnp.sum((y_batch - fitted) ** 2)

        gradients = jax.grad(misfit)(weights)
        penalties = _penalty_gradients(weights, xx)
        velocity = tuple(
            sgd.momentum * v + g + gamma * p for v, g, p in zip(velocity, gradients, penalties, strict=True)
        )
        factor = rate * 0.5 * (1 + jnp.cos(jnp.pi * now.astype(jnp.float32) / sgd.steps))
        return (tuple(w - factor * v for w, v in zip(weights, velocity, strict=True)), velocity), None

    @functools.partial(jax.jit, donate_argnums=0)
    def segment(carry: Any, keys: Array, first: Array, x: Array, y: Array, xx: Array) -> Any:
        nows = first + jnp.arange(sgd.record_every)

        def one(carry: Any, key: KeyArray) -> Any:
            return lax.scan(lambda c, now: step(c, (now, key), x, y, xx), carry, nows)[0]

        return jax.vmap(one)(carry, keys)

    root = jax.random.fold_in(seeds.key(seed), depth)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(root, i)))(jnp.arange(sgd.seeds))
    weights = jax.vmap(lambda key: random_weights(key, sizes, dtype=jnp.float32))(keys[:, 0])
    carry = (weights, jax.tree.map(jnp.zeros_like, weights))
    values = []
    for first in range(0, sgd.steps + 1, sgd.record_every):
        host = [np.asarray(w, np.float64) for w in carry[0]]
        host[0] = host[0] / scale
        values.append([objective_from_moments([w[i] for w in host], known, gamma) for i in range(sgd.seeds)])
        report(first, float(np.median(values[-1])))
        if first < sgd.steps:
            carry = segment(carry, keys[:, 1], jnp.asarray(first), *rows, xx)
    return Descent(np.arange(0, sgd.steps + 1, sgd.record_every), np.asarray(values).T)
