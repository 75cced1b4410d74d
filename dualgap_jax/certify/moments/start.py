"""What the joint search needs of a loss, and where it starts: the relaxation without a cover, as a convex primal.

Measures of units of both signs are seen through their first two moments, `U = Z Z^T` with mass `|Z|^2` and mean the
first column of Z times `|Z|`.  Each output may be anything that the moments leave possible (`moments.ascent`), and
the loss takes the best of that.  Nothing here is trusted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Float64

from dualgap_jax.certify.descent import lbfgs
from dualgap_jax.certify.moments import ascent
from dualgap_jax.certify.moments.covering import options
from dualgap_jax.certify.moments.proof import norms

_EDGE = 1e-4  # distance from the end of the domain of l* from which on the search takes a parabola instead
_SLACK = 0.1  # of the margin, over which the search rounds the corner of the hinge

Vector = Float64[np.ndarray, " n"]


class Form(NamedTuple):
    """A loss of one output, as the search needs it.

    Attributes:
      loss: `(z, y)` to its values.
      slope: `(z, y)` to its slopes.
      gain: `(alpha, y)` to `-l*(alpha)` and the derivative of that, continued beyond the domain by parabolas.
      nearest: `(low, high, y)` to the z in `[low, high]` of least loss.
    """

    loss: Callable[[np.ndarray, np.ndarray], np.ndarray]
    slope: Callable[[np.ndarray, np.ndarray], np.ndarray]
    gain: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    nearest: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _squared_gain(alpha: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return -0.5 * alpha**2 - alpha * y, -alpha - y


def _logistic_gain(alpha: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q = -alpha * y
    inside = np.clip(q, _EDGE, 1 - _EDGE)
    value = -scipy.special.xlogy(inside, inside) - scipy.special.xlogy(1 - inside, 1 - inside)
    first, second = np.log1p(-inside) - np.log(inside), -1 / (inside * (1 - inside))
    beyond = q - inside
    return value + beyond * (first + 0.5 * second * beyond), -y * (first + second * beyond)


def _hinge_gain(alpha: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q = -alpha * y
    beyond = np.maximum(q - 1, 0.0)
    return q - 50 * beyond**2, -y * (1 - 100 * beyond)


def _soft_hinge(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    short = 1 - y * z
    inside = np.clip(short + 0.5 * _SLACK, 0.0, _SLACK)
    return inside**2 / (2 * _SLACK) + np.maximum(short - 0.5 * _SLACK, 0.0)


def _outermost(low: np.ndarray, high: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(y > 0, high, low)


FORMS = {
    "squared": Form(
        lambda z, y: 0.5 * (z - y) ** 2, lambda z, y: z - y, _squared_gain, lambda low, high, y: np.clip(y, low, high)
    ),
    "logistic": Form(
        lambda z, y: np.logaddexp(0.0, -y * z),
        lambda z, y: -y * scipy.special.expit(-y * z),
        _logistic_gain,
        _outermost,
    ),
    "hinge": Form(
        _soft_hinge, lambda z, y: -y * np.clip((1 - y * z) / _SLACK + 0.5, 0.0, 1.0), _hinge_gain, _outermost
    ),
}


def first_alpha(x: Float64[np.ndarray, "n d"], y: Vector, form: Form, price: float, *, rank: int, steps: int) -> Vector:
    """The dual vector of the relaxation without a cover.

    Args:
      x: The data, no row of them zero.
      y: Targets or labels.
      form: The loss.
      price: `2 penalty`, what a unit of mass costs beside the mean loss.
      rank: Of each moment.
      steps: The most steps of L-BFGS with each of three degrees of smoothing.
    """
    n = len(x)
    x = ascent.in_basis(x)
    r, lengths = x.shape[1], norms(x)
    unit = float(lengths.mean())

    def parts(moment: np.ndarray, width: float) -> tuple[np.ndarray, ...]:
        size = float(np.sqrt(np.sum(moment**2) + 1e-20))
        seen = x @ moment
        first, square = seen[:, 0], np.sum(seen**2, axis=1)
        most, line = np.sqrt(square + width**2), np.sqrt(first**2 + width**2)
        bent = square / (lengths * size)
        corner = np.sqrt((line - bent) ** 2 + width**2)
        straight = 0.5 * (1 + (line - bent) / corner)
        low, high = 0.5 * first + 0.25 * (line + bent + corner), 0.5 * (first + most)
        return seen, most, line, bent, straight, low, high, np.asarray(size)

    def objective(flat: np.ndarray, width: float) -> tuple[float, np.ndarray]:
        moments = flat.reshape(2, r, rank)
        found = [parts(moment, width) for moment in moments]
        (low_p, high_p, size_p), (low_m, high_m, size_m) = (f[5:] for f in found)
        low = size_p * low_p - size_m * high_m
        z = form.nearest(low, np.maximum(size_p * high_p - size_m * low_m, low), y)
        slope = form.slope(z, y)
        up, down = np.maximum(slope, 0.0) / n, np.minimum(slope, 0.0) / n
        gradients = []
        for moment, f, on_low, on_high in zip(moments, found, (up, -down), (down, -up), strict=True):
            seen, most, line, bent, straight, lows, highs, size = f
            curved = on_low * (1 - straight)
            pull = (0.5 * on_high / most + curved / (lengths * size))[:, None] * seen
            pull[:, 0] += 0.5 * (on_low + on_high) + 0.5 * on_low * straight * seen[:, 0] / line
            inner = x.T @ pull - 0.5 * float(curved @ bent) / size**2 * moment
            gradients.append(size * inner + float(on_low @ lows + on_high @ highs) * moment / size)
        value = float(form.loss(z, y).mean()) + price * float(flat @ flat)
        return value, np.concatenate([g.ravel() for g in gradients]) + 2 * price * flat

    flat = 0.1 * np.random.default_rng(0).standard_normal(2 * r * rank) / math.sqrt(r)
    with np.errstate(all="ignore"):
        for width in (1e-1, 1e-2, 1e-3):
            scale = width * unit * float(np.linalg.norm(flat))
            flat = lbfgs(objective, flat, scale, **options(steps))
        found = [parts(moment, scale) for moment in flat.reshape(2, r, rank)]
    (low_p, high_p, size_p), (low_m, high_m, size_m) = (f[5:] for f in found)
    low = size_p * low_p - size_m * high_m
    return form.slope(form.nearest(low, np.maximum(size_p * high_p - size_m * low_m, low), y), y)
