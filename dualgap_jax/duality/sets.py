"""Sets W of one's own: boxes, balls of any norm, and products of these; all are convex and compact.

    duality.box(-1.0, 2.0)                                   # every weight between -1 and 2
    duality.ball(3.0, order=1)                               # ||w||_1 <= 3
    duality.product(duality.ball(2.0), duality.box(0, 1))    # one set a leaf of the parameters, as `jax.tree.leaves`

Flat vectors of weights lie in `Blocks`: pieces of the vector, each in a box and, for a ball, in that ball too.  That a
point lies in W is decided in rational numbers, or for norms of other than whole order in 50 digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float64

from dualgap_jax.duality.values import number

_DIGITS = Context(prec=50, Emin=-(10**9), Emax=10**9)
_LARGEST = 1e100


class Box(NamedTuple):
    """`lower <= w <= upper`, entry by entry."""

    lower: np.ndarray
    upper: np.ndarray


class Ball(NamedTuple):
    """`||w||_order <= radius`."""

    radius: float
    order: float


class Product(NamedTuple):
    """One set for each leaf of the parameters."""

    parts: tuple[Box | Ball, ...]


def box(lower: Any, upper: Any) -> Box:
    """The weights with `lower <= w <= upper`: numbers, or arrays of the weights' shape (flat for all parameters).

    Raises:
      ValueError: for bounds that are not finite, larger than 1e100, or no interval.
    """
    try:
        low, high = np.broadcast_arrays(np.asarray(lower, np.float64), np.asarray(upper, np.float64))
    except (TypeError, ValueError):
        raise ValueError(f"box needs numbers or arrays of one shape, got {lower!r:.60} and {upper!r:.60}.") from None
    if not ((low < high).all() and (np.abs(low) <= _LARGEST).all() and (np.abs(high) <= _LARGEST).all()):
        raise ValueError(
            f"box needs finite lower < upper up to {_LARGEST:g} in size, got {lower!r:.60} and {upper!r:.60}; W must"
            " be compact."
        )
    return Box(low.copy(), high.copy())


def ball(radius: Any, order: Any = 2) -> Ball:
    """The weights with `||w||_order <= radius`; order from 1, where norms begin, to inf.

    Raises:
      ValueError: for a radius that is not positive and finite, or an order below 1, of which the ball is not convex.
    """
    size, kind = number("radius", radius), number("order", order, infinite=True)
    if not 1e-100 <= size <= _LARGEST:
        raise ValueError(f"radius={radius!r} must lie between 1e-100 and 1e100.")
    if not kind >= 1:
        raise ValueError(f"order={order!r} must be at least 1: the ball of a smaller order is not convex.")
    return Ball(size, kind)


def product(*parts: Any) -> Product:
    """One set for each leaf of a branch's parameters, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: for anything but boxes and balls.
    """
    for part in parts:
        if not isinstance(part, Box | Ball):
            raise ValueError(f"product takes boxes and balls, one a leaf of the parameters; got {part!r:.60}.")
    return Product(tuple(parts))


class Block(NamedTuple):
    """Weights `start` to `stop` of the flat vector: their box, and the ball that holds them, or a radius of inf."""

    start: int
    stop: int
    lower: np.ndarray
    upper: np.ndarray
    radius: float
    order: float


def _block(part: Box | Ball, start: int, shape: tuple[int, ...], where: str) -> Block:
    size = math.prod(shape)
    if isinstance(part, Ball):
        edge = np.full(size, part.radius)
        return Block(start, start + size, -edge, edge, part.radius, part.order)
    try:
        low, high = (np.broadcast_to(end, shape).reshape(-1) for end in part)
    except ValueError:
        raise ValueError(f"a box of shape {part.lower.shape} does not fit {where}, of shape {shape}.") from None
    return Block(start, start + size, low, high, math.inf, 2.0)


class Blocks(NamedTuple):
    """W as a product of blocks of the flat vector of weights `[p]`."""

    blocks: tuple[Block, ...]

    @property
    def lower(self) -> Float64[np.ndarray, " p"]:
        """The least corner of the box around W."""
        return np.concatenate([b.lower for b in self.blocks])

    @property
    def upper(self) -> Float64[np.ndarray, " p"]:
        """The largest corner of the box around W."""
        return np.concatenate([b.upper for b in self.blocks])

    @property
    def radius(self) -> float:
        """Of a ball around 0 that contains W."""
        far = np.maximum(np.abs(self.lower), np.abs(self.upper))
        return float(np.linalg.norm(far) * (1 + 1e-14))

    def nearest(self, w: Float[Array, " p"]) -> Float[Array, " p"]:
        """A point of W, up to rounding: entries are cut off, and balls shrunk to."""
        parts = []
        for b in self.blocks:
            part = jnp.clip(w[b.start : b.stop], jnp.asarray(b.lower, w.dtype), jnp.asarray(b.upper, w.dtype))
            if math.isfinite(b.radius):
                size = jnp.max(jnp.abs(part))
                unit = part / jnp.maximum(size, jnp.finfo(w.dtype).tiny)
                norm = size * jnp.linalg.norm(_off_zero(unit), b.order)
                part = part * jnp.minimum(1.0, b.radius / jnp.maximum(norm, jnp.finfo(w.dtype).tiny))
            parts.append(part)
        return jnp.concatenate(parts)

    def inside(self, points: Float64[np.ndarray, "k p"]) -> Float64[np.ndarray, "k p"]:
        """The points, those that are outside by a rounding or so moved into W for certain."""
        moved = points.copy()
        for b in self.blocks:
            part = np.clip(points[:, b.start : b.stop], b.lower, b.upper)
            for k in range(len(part)):
                while not _in_ball(part[k], b):
                    part[k] *= min(1.0, b.radius / _norm(part[k], b.order)) * (1 - 2.0**-50)
            moved[:, b.start : b.stop] = part
        return moved

    def contains(self, point: Float64[np.ndarray, " p"]) -> bool:
        """Whether a point is proven to lie in W."""
        return all(
            bool((part >= b.lower).all() and (part <= b.upper).all()) and _in_ball(part, b)
            for b in self.blocks
            for part in [point[b.start : b.stop]]
        )

    def apart(self, lo: Any, hi: Any, np: Any = jnp) -> Any:
        """Whether boxes `[..., p]` within that around W are proven to hold no point of W; `np` is the array module."""
        found = np.zeros(lo.shape[:-1], bool)
        for b in self.blocks:
            if math.isfinite(b.radius) and b.order < math.inf:
                near = np.maximum(np.maximum(lo[..., b.start : b.stop], -hi[..., b.start : b.stop]), 0.0)
                # Powers are good to some 64 ulps, and the sum to as many as it has terms.
                share = np.sum((near / b.radius) ** b.order, axis=-1)
                found = found | (share > 1 + 1e-13 * (b.stop - b.start + b.order))
        return found


def _off_zero(unit: Array) -> Array:
    """The vector, moved off 0 so that its norm has a derivative there."""
    return jnp.where(jnp.any(unit != 0), unit, jnp.ones_like(unit))


def _norm(w: np.ndarray, order: float) -> float:
    size = float(np.abs(w).max())
    return size * float(np.linalg.norm(w / size, order)) if size > 0 else 0.0


def _in_ball(w: np.ndarray, b: Block) -> bool:
    """Whether the norm of w is proven to be at most the radius."""
    if not math.isfinite(b.radius) or b.order == math.inf or not w.any():
        return True
    if float(b.order).is_integer() and b.order <= 16:
        order = int(b.order)
        return bool(sum((abs(Fraction(v)) ** order for v in w.tolist()), Fraction(0)) <= Fraction(b.radius) ** order)
    with localcontext(_DIGITS):
        order_, size = Decimal(b.order), Decimal(b.radius)
        shares = sum(((abs(Decimal(v)) / size) ** order_ for v in w.tolist() if v), Decimal(0))
        return bool(shares <= 1 - Decimal("1e-40"))


def placed(domain: Any, shapes: Sequence[tuple[int, ...]]) -> Blocks:
    """The blocks of a set for parameters whose leaves have these shapes.

    Raises:
      ValueError: for a set that does not fit the parameters, or no set at all.
    """
    total = sum(math.prod(shape) for shape in shapes)
    if isinstance(domain, Box | Ball):
        return Blocks((_block(domain, 0, (total,), f"all {total} weights as one vector"),))
    if not isinstance(domain, Product):
        raise ValueError(f"domain must be made by box, ball or product, got {domain!r:.60}.")
    if len(domain.parts) != len(shapes):
        raise ValueError(
            f"product has {len(domain.parts)} sets, the parameters have {len(shapes)} leaves, of shapes {list(shapes)};"
            " give one set a leaf."
        )
    starts = np.concatenate([[0], np.cumsum([math.prod(shape) for shape in shapes])]).astype(int).tolist()
    return Blocks(
        tuple(
            _block(part, start, shape, f"leaf {k} of the parameters")
            for k, (part, start, shape) in enumerate(zip(domain.parts, starts, shapes, strict=False))
        )
    )
