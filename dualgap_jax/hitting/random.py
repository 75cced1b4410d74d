"""Random numbers for all lanes at once: Threefry, a permutation without storage, and the draws of each step.

Whatever is random at step t is a function of (the run's key, t), so a resumed study repeats the uninterrupted one.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int, UInt32

from dualgap_jax.hitting.runs import Order, Runs

_ROUNDS = (8, 12)  # of the permutation of an epoch; the second for fewer than 100 examples


def threefry(k0: Array, k1: Array, x0: Array, x1: Array) -> tuple[Array, Array]:
    """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011), elementwise in uint32, the rounds written out.

    The generator behind `jax.random`: there its rounds are a loop on CPU, which the vector units cannot work across.
    """
    keys = (k0, k1, k0 ^ k1 ^ jnp.uint32(0x1BD11BDA))
    x0, x1 = x0 + k0, x1 + k1
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << jnp.uint32(rotation)) | (x1 >> jnp.uint32(32 - rotation))) ^ x0
        x0 = x0 + keys[(group + 1) % 3]
        x1 = x1 + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x0, x1


def below(bits: Array, n: int) -> Array:
    """`floor(bits n / 2^32)` for uint32 bits and n < 2^16: a number below n, each within 2^-32 of equally likely."""
    high, low = bits >> jnp.uint32(16), bits & jnp.uint32(0xFFFF)
    return (high * jnp.uint32(n) + ((low * jnp.uint32(n)) >> jnp.uint32(16))) >> jnp.uint32(16)


def _radices(n: int) -> tuple[int, int]:
    """Two factors near sqrt(n) whose product is the least at or above n."""
    root = math.isqrt(n - 1) + 1
    pairs = [(a, -(-n // a)) for a in range(max(1, root * 3 // 4), root + 1)]
    return min(pairs, key=lambda pair: (pair[0] * pair[1], pair[1]))


def permuted(place: UInt32[Array, "batch lanes"], k0: Array, k1: Array, n: int) -> UInt32[Array, "batch lanes"]:
    """Where the pseudo-random permutation of `0..n-1` with key (k0, k1) sends each place.

    A Feistel network over mixed radices with cycle walking (Black and Rogaway, CT-RSA 2002): each entry is computed by
    itself, so that an epoch's permutation is never stored.  Rounds are keyed mixing functions, not cryptographic ones.

    Args:
      place: numbers below n.
      k0, k1: uint32 `[1, lanes]`, the key of each lane.
      n: at least 1 and below 2^16.
    """
    a, b = _radices(n)

    def plus(x: Array, other: Array, number: int, radix: int) -> Array:
        """`x` plus a keyed pseudo-random function of `other`, modulo the radix."""
        h = (other + k0 + jnp.uint32(number) * (k1 | jnp.uint32(1))) * jnp.uint32(0x9E3779B1)
        h = (h ^ (h >> jnp.uint32(15))) * jnp.uint32(0x85EBCA6B)
        total = x + (((h >> jnp.uint32(16)) * jnp.uint32(radix)) >> jnp.uint32(16))
        return total - jnp.where(total >= radix, jnp.uint32(radix), jnp.uint32(0))

    def once(x: Array) -> Array:
        left, right = x // jnp.uint32(b), x % jnp.uint32(b)
        for number in range(0, _ROUNDS[n < 100], 2):
            left = plus(left, right, number, a)
            right = plus(right, left, number + 1, b)
        return left * jnp.uint32(b) + right

    x = once(place)
    if a * b == n:
        return x
    return lax.while_loop(lambda x: jnp.any(x >= n), lambda x: jnp.where(x >= n, once(x), x), x)


def draw(
    step: Array, keys: UInt32[Array, "2 lanes"], *, n: int, batch_size: int, order: Order, count: int
) -> Int[Array, "count lanes"]:
    """Indices of the examples at a step; a pure function of the step and each lane's key.

    Args:
      step: scalar.
      keys: the two words of each run's order key.
      n: number of examples, below 2^16.
      batch_size: examples a step.
      order: see `SgdSpec`.
      count: rows to return; those beyond `batch_size` hold some valid index.
    """
    row = jnp.arange(count, dtype=jnp.uint32)[:, None]
    k0, k1 = keys[:1], keys[1:]
    if batch_size == n and order == "epochs":
        return jnp.broadcast_to(jnp.minimum(row, n - 1), (count, keys.shape[1])).astype(jnp.int32)
    step = jnp.asarray(step).astype(jnp.uint32)
    if order == "independent":
        x0, x1 = threefry(k0, k1, jnp.broadcast_to(step, (1, 1)), row)
        return below(x0 ^ x1, n).astype(jnp.int32)
    per_epoch = jnp.uint32(n // batch_size)
    place = jnp.minimum((step % per_epoch) * jnp.uint32(batch_size) + row, n - 1)
    e0, e1 = threefry(k0, k1, jnp.zeros((1, 1), jnp.uint32), jnp.broadcast_to(step // per_epoch, (1, 1)))
    return permuted(jnp.broadcast_to(place, (count, keys.shape[1])), e0, e1, n).astype(jnp.int32)


def run_keys(runs: Runs) -> tuple[Array, UInt32[np.ndarray, "2 runs"]]:
    """The initialisation keys `[runs]` and the two words of the order keys."""

    @jax.vmap
    def one(seed: Array, width: Array) -> Array:
        return jax.random.split(jax.random.fold_in(jax.random.key(seed), width))

    keys = one(jnp.asarray(runs.seed, jnp.uint32), jnp.asarray(runs.width, jnp.uint32))
    return keys[:, 0], np.asarray(jax.random.key_data(keys[:, 1])).T
