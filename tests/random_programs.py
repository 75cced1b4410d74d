"""Programs put together at random from the operations that have interval rules, for the tests of both sets of rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Step = Callable[[jax.Array, jax.Array], jax.Array]
"""Of two arrays of shape `SHAPE` anything."""

SHAPE = (2, 3)


def _moved(rng: np.random.Generator) -> list[Step]:
    axis, places = int(rng.integers(2)), rng.integers(-4, 5, 4)
    edges = [(*rng.integers(-1, 3, 2).tolist(), int(rng.integers(2))) for _ in SHAPE]
    fill, mode = float(rng.choice([0.0, 0.5, 7.0])), str(rng.choice(["clip", "wrap"]))
    start = [int(k) for k in rng.integers(-1, 3, 2)]
    return [
        lambda a, b: lax.pad(a, np.float64(fill), edges),
        lambda a, b: a.at[:, places].get(mode="fill", fill_value=fill),
        lambda a, b: jnp.take(a, places, axis, mode=mode),
        lambda a, b: lax.dynamic_slice(a, start, (1, 2)) * b[:1, :1],
        lambda a, b: lax.dynamic_update_slice(a, b[:1, 1:], start),
        lambda a, b: jnp.concatenate([a[:, ::-1], b.T.reshape(2, 3)], axis),
    ]


def _summed(rng: np.random.Generator) -> list[Step]:
    axis, reverse = int(rng.integers(2)), bool(rng.integers(2))
    window, strides, base, holes = (rng.integers(1, 3, 2).tolist() for _ in range(4))
    window[0] = holes[0] = 1
    padding = [tuple(p) for p in rng.integers(0, 2, (2, 2)).tolist()]
    contracted = [((0, 1), (0, 1)), ((axis,), (axis,)), ((1,), (1,))][rng.integers(3)]

    def pooled(start: float, f: Any) -> Step:
        return lambda a, b: lax.reduce_window(a, start, f, window, strides, padding, None, holes)

    def convolved(a: jax.Array, b: jax.Array) -> jax.Array:
        dilation = {"lhs_dilation": base[:1], "rhs_dilation": holes[1:]}
        numbers = ("NHC", "OHI", "NCH")
        left, kernel = a.reshape(1, 3, 2), b.reshape(2, 3, 1)[:, : window[1]]
        return lax.conv_general_dilated(left, kernel, strides[:1], padding[:1], **dilation, dimension_numbers=numbers,
                                        feature_group_count=2)  # fmt: skip

    return [
        lambda a, b: a - jnp.sum(a * b, axis, keepdims=True),
        lambda a, b: jnp.array([1.0, 2.0, 3.0]) - jnp.sum(a * a, 1, keepdims=True),
        lambda a, b: jnp.max(a, axis) - jnp.min(b, keepdims=True),
        lambda a, b: jnp.prod(a, axis),
        lambda a, b: jax.nn.softmax(3 * a, axis) * jax.nn.logsumexp(b, axis, keepdims=True),
        lambda a, b: lax.cumsum(a, axis, reverse=reverse),
        lambda a, b: lax.cumprod(a, axis, reverse=reverse) + lax.cummax(b, axis, reverse=reverse),
        lambda a, b: jnp.sort(a + b, axis),
        pooled(0.0, lax.add),
        lambda a, b: jnp.maximum(pooled(-jnp.inf, lax.max)(a, b), -2.0),
        convolved,
        lambda a, b: lax.dot_general(a, b, (contracted, ((), ()))),
        lambda a, b: lax.dot_general(a, b, (((1,), (1,)), ((0,), (0,)))),
    ]


def _mixed(rng: np.random.Generator) -> list[Step]:
    c, reverse = float(rng.normal()), bool(rng.integers(2))
    power = float(rng.choice([-1.5, 0.5, 1.0, 2.0, 3.0]))
    return [
        lambda a, b: a * b + c, lambda a, b: a / (b * b + 0.5), lambda a, b: jnp.tanh(a - c * b),
        lambda a, b: (jnp.abs(a) + 0.3) ** power, lambda a, b: jnp.power(jnp.exp(a), b),
        lambda a, b: jnp.logaddexp(a, c * b), lambda a, b: jnp.hypot(a, 1.0),
        lambda a, b: jnp.maximum(a, b) - jnp.minimum(a, c), lambda a, b: lax.clamp(-0.5, a, jnp.abs(b)),
        lambda a, b: jnp.where((a > 0) & ~(b > c), a, b), lambda a, b: jnp.floor(2 * a) * b,
        lambda a, b: jnp.sign(a + c),
        lambda a, b: jax.nn.gelu(a, approximate=False), lambda a, b: jax.nn.silu(a) + jax.nn.elu(b),
        lambda a, b: jax.checkpoint(lambda x: jnp.sin(x) * lax.stop_gradient(x))(a),
        lambda a, b: lax.cond(jnp.sum(a) > c, lambda: a * b, lambda: jnp.sin(a)),
        lambda a, b: lax.scan(lambda h, x: (jnp.tanh(h + c * x), h * x), b[0], a, reverse=reverse)[1],
        lambda a, b: lax.fori_loop(0, 3, lambda k, x: jnp.where(k % 2 == 0, c * x, jnp.cos(x)), a),
        lambda a, b: jax.vmap(lambda x: jnp.dot(x, x) * x)(a),
    ]  # fmt: skip


def program(rng: np.random.Generator, steps: int) -> Callable[[jax.Array], jax.Array]:
    """A function of a vector: so many operations one after the other, each of two results before it."""
    chosen: list[tuple[Step, int]] = []
    for k in range(steps):
        table = (_moved, _summed, _mixed)[rng.choice(3, p=[0.2, 0.35, 0.45])](rng)
        chosen.append((table[rng.integers(len(table))], int(rng.integers(k + 1))))

    def f(w: jax.Array) -> jax.Array:
        values = [jnp.resize(w, SHAPE)]
        for step, other in chosen:
            values.append(jnp.resize(step(values[-1], values[other]), SHAPE))
        return jnp.stack(values[1:])

    return f
