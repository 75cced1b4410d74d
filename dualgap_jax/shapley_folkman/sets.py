"""The table of planar sets that configs name."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from dualgap_jax import seeds
from dualgap_jax.registry import Table
from dualgap_jax.shapley_folkman.lp_ball import LpBall
from dualgap_jax.shapley_folkman.measured import PlanarSet, SetError
from dualgap_jax.shapley_folkman.pieces import Pieces, disc, parse_piece


def lp_ball(*, p: float = 0.5, radius: float = 1.0) -> LpBall:
    """The l_p ball; p = 1/2 is that of Figure 3."""
    return LpBall(p, radius)


def union(
    *, pieces: tuple[str, ...] = ("disc -0.7 -0.3 0.25", "segment -0.1 0.75 0.45 0.85", "point 0.9 -0.5")
) -> Pieces:
    """Finite union of 'point x y', 'disc x y r', 'segment x y x y', 'polygon x y x y x y ...'."""
    return Pieces([parse_piece(text) for text in pieces])


def random_points(*, count: int = 6, seed: int = 0) -> Pieces:
    """Points drawn uniformly from the unit disc."""
    return random_discs(count=count, radius=0.0, seed=seed)


def random_discs(*, count: int = 4, radius: float = 0.1, seed: int = 0) -> Pieces:
    """Discs of one radius with centres drawn uniformly from the unit disc."""
    if count < 1:
        raise SetError(f"count={count} must be at least 1.")
    rng = seeds.generator(seed)
    size, angle = np.sqrt(rng.uniform(size=count)), rng.uniform(0, 2 * math.pi, size=count)
    centers = np.stack([size * np.cos(angle), size * np.sin(angle)], axis=-1)
    return Pieces([disc(center, radius) for center in centers.tolist()])


SETS: Table[Callable[..., PlanarSet]] = Table(
    "planar set",
    {
        "lp_ball": lp_ball,
        "union": union,
        "random_points": random_points,
        "random_discs": random_discs,
    },
)
"""Name -> function that makes a `PlanarSet`."""
