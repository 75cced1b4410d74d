"""Convex conjugates of losses, `l*(alpha) = max over z of <alpha, z> - l(z)`, and their subgradients in z.

With Fenchel's inequality `l(z) >= <alpha, z> - l*(alpha)` every dual vector alpha bounds a loss from below by something
linear in the outputs z.  Equality holds for `alpha` in the subdifferential at z (Rockafellar, Convex Analysis, section
23).  Everything here is float64 NumPy; for a proof the rows of alpha have to lie in the domain of l* exactly, which
`nearest` sees to: where a row of floats must add up to 0 its numbers are put on a grid on which sums are exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

Rows = np.ndarray  # [n, out]
Labels = np.ndarray  # [n]
_EPS = float(np.finfo(np.float64).eps)
_NEAR = 1e-9  # share of the domain's size within which a row of floats counts as a row of the domain
_BITS = 40  # of a number on the grid; sums of up to 2^12 of them are exact


@dataclasses.dataclass(frozen=True, eq=False)
class Conjugate:
    """The conjugate of a loss.

    Attributes:
      kind: 'hinge', 'multi-margin', 'Crammer-Singer', 'logistic' or 'squared'.
      domain: where it is finite, in words.
      nearest: `(alpha [n, out], labels [n]) -> [n, out]`: rows in the domain exactly; those near it hardly move.
      terms: `(alpha, labels) -> (values [n], errors [n])` for rows in the domain: `|value - l*| <= error`.
      scale: the size of the domain, the unit in which 'near' is meant.
      lipschitz: a bound on the sum of |alpha_k| over rows of the domain, the loss's slope; infinite for none.
    """

    kind: str
    domain: str
    nearest: Callable[[Rows, Labels], Rows]
    terms: Callable[[Rows, Labels], tuple[np.ndarray, np.ndarray]]
    scale: float
    lipschitz: float

    def __call__(self, alpha: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """`l*` of each row, `[n]`: infinite for a row that is further from the domain than 1e-9 of its size."""
        alpha = np.asarray(alpha, np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            values = self.terms(self.nearest(alpha, labels), labels)[0]
        return np.where(self.outside(alpha, labels), np.inf, values)

    def outside(self, alpha: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """`[n]`: whether a row is further from the domain than 1e-9 of its size, or not finite."""
        with np.errstate(over="ignore", invalid="ignore"):
            moved = np.abs(self.nearest(alpha, labels) - alpha).max(axis=1)
        return ~((moved <= _NEAR * self.scale) & np.isfinite(alpha).all(axis=1))

    def upper_mean(self, alpha: np.ndarray, labels: np.ndarray) -> float:
        """A proven upper bound on the mean of l* over rows that are in the domain exactly; inf if it overflows."""
        with np.errstate(over="ignore", invalid="ignore"):
            values, errors = self.terms(alpha, labels)
            total = np.concatenate([values, errors])
        if not np.isfinite(total).all():
            return math.inf
        try:
            mean = math.fsum(total) / len(values)
        except OverflowError:
            return math.inf
        return math.nextafter(math.nextafter(mean, math.inf), math.inf)


def _largest_product(tau: float, count: int = 1) -> float:
    """The largest float b with `b tau count <= 1`."""
    bound, product = 1 / tau / count, Fraction(tau) * count
    while Fraction(bound) * product > 1:
        bound = math.nextafter(bound, 0.0)
    return bound


def _own(alpha: Rows, labels: Labels) -> np.ndarray:
    """The mask of each example's own class, `[n, out]`."""
    return np.arange(alpha.shape[1])[None, :] == np.asarray(labels).astype(np.int64)[:, None]


def _balanced(rest: Rows, own: np.ndarray) -> Rows:
    """Rows that add up to 0: the own class takes what the others, on a grid, leave."""
    return np.where(own, -rest.sum(axis=1, keepdims=True), rest)


def hinge_conjugate(tau: float) -> Conjugate:
    """Of `max(0, 1 - y z / tau)`: `-q` for `q = -alpha y tau` in [0, 1]."""
    bound = _largest_product(tau)

    def nearest(alpha: Rows, labels: Labels) -> Rows:
        sign = np.asarray(labels, np.float64)[:, None]
        return -sign * np.clip(-alpha * sign, 0.0, bound)

    def terms(alpha: Rows, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
        q = np.abs(alpha[:, 0]) * tau
        return -q, _EPS * q + 1e-300

    return Conjugate("hinge", f"-alpha y in [0, 1/tau] = [0, {1 / tau:.6g}]", nearest, terms, 1 / tau, 2 / tau)


def hinge_slope(outputs: Rows, labels: Labels, tau: float) -> Rows:
    """`-y / tau` where the margin lies below tau, else 0; at the kink 0."""
    sign = np.asarray(labels, np.float64)[:, None]
    return np.where(sign * outputs < tau, -sign * _largest_product(tau), 0.0)


def _own_terms(tau: float) -> Callable[[Rows, Labels], tuple[np.ndarray, np.ndarray]]:
    """The conjugate `-tau sum_{k != y} alpha_k` of the losses by margins, from `alpha_y`, and its rounding."""

    def terms(alpha: Rows, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
        total = -tau * np.abs(np.where(_own(alpha, labels), alpha, 0.0)).sum(axis=1)
        return total, -_EPS * total + 1e-300

    return terms


def multi_margin_conjugate(tau: float) -> Conjugate:
    """Of `(1/C) sum_{k != y} max(0, 1 - (z_y - z_k) / tau)`: `-tau sum_{k != y} alpha_k`.

    Its domain is `0 <= alpha_k <= 1 / (C tau)` for k != y, with `alpha_y = -sum_{k != y} alpha_k`.
    """

    def nearest(alpha: Rows, labels: Labels) -> Rows:
        own = _own(alpha, labels)
        bound = _largest_product(tau, alpha.shape[1])
        unit = math.ldexp(1.0, math.frexp(bound)[1] - _BITS)
        steps = np.floor(np.clip(np.where(own, 0.0, alpha), 0.0, bound) / unit + 2.0**-12)
        return _balanced(np.minimum(steps, math.floor(bound / unit)) * unit, own)

    return Conjugate(
        "multi-margin",
        f"0 <= alpha_k <= 1/(C tau) with tau={tau:.6g} for k != y, alpha_y = -sum of the others",
        nearest,
        _own_terms(tau),
        1 / tau,
        2 / tau,
    )


def multi_margin_slope(outputs: Rows, labels: Labels, tau: float) -> Rows:
    """`1 / (C tau)` for each class whose term is not clipped, and minus their sum for the own class."""
    own = _own(outputs, labels)
    scores = np.where(own, outputs, 0.0).sum(axis=1, keepdims=True)
    rest = np.where(~own & (scores - outputs < tau), 1 / (tau * outputs.shape[1]), 0.0)
    return np.where(own, -rest.sum(axis=1, keepdims=True), rest)


def crammer_singer_conjugate(tau: float) -> Conjugate:
    """Of `max(0, 1 - (z_y - max_{k != y} z_k) / tau)`: `-tau sum_{k != y} alpha_k`.

    Its domain is `alpha_k >= 0` for k != y with `sum_{k != y} alpha_k <= 1 / tau`, and `alpha_y` minus that sum.
    """
    bound = _largest_product(tau)
    unit = math.ldexp(1.0, math.frexp(bound)[1] - _BITS)

    def nearest(alpha: Rows, labels: Labels) -> Rows:
        own = _own(alpha, labels)
        rest = np.clip(np.where(own, 0.0, alpha), 0.0, bound)
        total = rest.sum(axis=1, keepdims=True)
        rest = np.where(total > bound, rest * (bound / np.where(total > bound, total, 1.0)) * (1 - 4 * _EPS), rest)
        return _balanced(_rounded_below(rest / unit, math.floor(bound / unit)) * unit, own)

    return Conjugate(
        "Crammer-Singer",
        f"alpha_k >= 0 for k != y, their sum at most 1/tau = {1 / tau:.6g}, alpha_y minus their sum",
        nearest,
        _own_terms(tau),
        1 / tau,
        2 / tau,
    )


def crammer_singer_slope(outputs: Rows, labels: Labels, tau: float) -> Rows:
    """`1 / tau` for the strongest rival where the loss is not clipped, and minus that for the own class."""
    own = _own(outputs, labels)
    scores = np.where(own, outputs, 0.0).sum(axis=1, keepdims=True)
    rival = np.argmax(np.where(own, -np.inf, outputs), axis=1)
    chosen = np.arange(outputs.shape[1])[None, :] == rival[:, None]
    rest = np.where(chosen & (scores - outputs < tau), _largest_product(tau), 0.0)
    return np.where(own, -rest.sum(axis=1, keepdims=True), rest)


def _rounded_below(steps: np.ndarray, most: int | float) -> np.ndarray:
    """Whole numbers near `steps [n, k]`, rounded down where the nearest would add up to more than `most` in a row."""
    near = np.floor(steps + 2.0**-12)
    return np.where(near.sum(axis=1, keepdims=True) > most, np.floor(steps * (1 - 2.0**-39)), near)


def _entropy(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`p ln p` (0 at 0), with a bound on its error for a p that is exact or one rounding away."""
    safe = np.where(p > 0, p, 1.0)
    value = safe * np.log(safe)
    return value, 8 * _EPS * (np.abs(value) + np.where(p > 0, p, 0.0)) + 1e-300


def logistic_conjugate() -> Conjugate:
    """Of `log(1 + exp(-y z))`: `q ln q + (1 - q) ln(1 - q)` for `q = -alpha y` in [0, 1]; of softmax cross-entropy
    `sum_k p_k ln p_k` for `p = alpha + e_y` in the simplex.
    """

    def nearest(alpha: Rows, labels: Labels) -> Rows:
        if alpha.shape[1] == 1:
            sign = np.asarray(labels, np.float64)[:, None]
            return -sign * np.clip(-alpha * sign, 0.0, 1.0)
        own, unit = _own(alpha, labels), 2.0**-_BITS
        rest = np.clip(np.where(own, 0.0, alpha), 0.0, 1.0)
        total = rest.sum(axis=1, keepdims=True)
        rest = np.where(total > 1, rest / np.where(total > 1, total, 1.0) * (1 - 4 * _EPS), rest)
        return _balanced(_rounded_below(rest / unit, 2.0**_BITS) * unit, own)

    def terms(alpha: Rows, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
        if alpha.shape[1] == 1:
            q = np.abs(alpha[:, 0])
            (one, e1), (two, e2) = _entropy(q), _entropy(1 - q)
            return one + two, e1 + e2 + _EPS * np.abs(one + two)
        p = np.where(_own(alpha, labels), 1 + alpha, alpha)
        values, errors = _entropy(p)
        return values.sum(axis=1), errors.sum(axis=1) + alpha.shape[1] * _EPS * np.abs(values).sum(axis=1)

    return Conjugate(
        "logistic",
        "-alpha y in [0, 1] with one output; alpha + e_y in the simplex with several",
        nearest,
        terms,
        1.0,
        2.0,
    )


def logistic_slope(outputs: Rows, labels: Labels) -> Rows:
    """The gradient: `-y expit(-y z)` with one output, `softmax(z) - e_y` with several."""
    from scipy.special import expit, softmax  # here, so that losses need JAX alone

    if outputs.shape[1] == 1:
        sign = np.asarray(labels, np.float64)[:, None]
        return -sign * expit(-sign * outputs)
    return softmax(outputs, axis=1) - _own(outputs, labels)


def squared_conjugate() -> Conjugate:
    """Of `(z - y)^2 / 2`: `alpha^2 / 2 + alpha y`; of `||z - e_y||^2 / 2`: `||alpha||^2 / 2 + alpha_y`."""

    def nearest(alpha: Rows, labels: Labels) -> Rows:
        del labels
        return alpha + 0.0

    def terms(alpha: Rows, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
        half = 0.5 * (alpha * alpha).sum(axis=1)
        linear = (alpha * _targets(alpha, labels)).sum(axis=1)
        return half + linear, (alpha.shape[1] + 2) * _EPS * (half + np.abs(linear)) + 1e-300

    return Conjugate("squared", "all numbers", nearest, terms, 1.0, math.inf)


def squared_slope(outputs: Rows, labels: Labels) -> Rows:
    """The gradient: `z - y`, or `z - e_y`."""
    return outputs - _targets(outputs, labels)


def _targets(rows: Rows, labels: Labels) -> np.ndarray:
    if rows.shape[1] == 1:
        return np.asarray(labels, np.float64)[:, None]
    return _own(rows, labels).astype(np.float64)
