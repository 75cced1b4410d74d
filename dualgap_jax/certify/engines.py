"""Proven bounds on `kappa(alpha) = max over ||w|| <= 1 of -(1/n) sum_j <alpha_j, f(w; x_j)>` for homogeneous branches.

By Hoelder's inequality kappa is `rho L^(-L/2)` (`Structure.share`), where rho is the largest sum that one unit makes of
the data:

* linear, quadratic, gated: rho is a singular value or an eigenvalue, exact in any dimension (`closed`);
* cells: one ReLU or leaky unit in up to three dimensions, exact (`cells`);
* spectral: one hidden layer of ReLU or leaky units, any size and number of outputs, by the largest eigenvalue of a
  matrix of d + out rows (`weighted`).  For squares of several outputs it is the singular value of an unfolded tensor
  (`closed.unfolded`);
* moments: the same units with one output, by a semidefinite relaxation, tighter and dearer (`moments`);
* norms: `rho <= (1/n) sum_j ||alpha_j|| ||x_j||`, with squares `||x_j||^2`: any depth, looser still.

Singular values are computed in float64; what is added to them, `(n + d + 64) eps` times the Frobenius norm, is more
than LAPACK's backward error (Golub and Van Loan, Matrix Computations, section 8.6).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dualgap_jax.certify import cells, closed, weighted
from dualgap_jax.certify.moments import balls
from dualgap_jax.certify.moments.joint import relaxation
from dualgap_jax.certify.moments.start import FORMS
from dualgap_jax.certify.problem import RiskProblem
from dualgap_jax.certify.structure import Structure

_EPS = float(np.finfo(np.float64).eps)
LARGEST_RELAXATION = 2**27  # numbers in x up to which 'auto' relaxes: some minutes for each side
LARGEST_JOINT = 2**23  # numbers in x up to which dual vectors and relaxation are raised together: about a minute
_SPARE = 2.0**-38  # share of the sizes that is left to those who prove the bound again with other roundings


class Ceiling(NamedTuple):
    """Bounds on kappa.

    Attributes:
      upper: proven.
      lower: the value at `point`, less its rounding; 0 where no point is known.
      point: `[p]`, of norm 1; None where none is known.
      method: the engine.
      evidence: what `upper` was proven with, where it is more than alpha; None for engines that can be run again.
    """

    upper: float
    lower: float
    point: np.ndarray | None
    method: str
    evidence: Any = None


def _above(value: float, relative: float) -> float:
    return value * (1 + relative) + 1e-300


def sizes(x: np.ndarray, alpha: np.ndarray, order: int = 1) -> float:
    """An upper bound on `(1/n) sum_j ||alpha_j|| ||x_j||^order`."""
    product = np.linalg.norm(alpha, axis=1) * np.linalg.norm(x, axis=1) ** order
    return _above(float(product.mean()), (len(x) + 2 * x.shape[1] + alpha.shape[1] + 8) * _EPS)


def _rescaled(x: np.ndarray, alpha: np.ndarray, order: int = 1) -> tuple[np.ndarray, np.ndarray, int]:
    (one, e1), (two, e2) = cells.scaled(x), cells.scaled(alpha)
    return one, two, order * e1 + e2


def _restored(value: float, exponent: int) -> float:
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return math.inf


def _closed(name: str, activation: str) -> Callable[[Structure, np.ndarray, np.ndarray], Ceiling | None]:
    def engine(known: Structure, x: np.ndarray, alpha: np.ndarray) -> Ceiling | None:
        points, weights, exponent = _rescaled(x, alpha, known.order)
        found = closed.best(known, points, weights) if known.activation == activation else None
        if found is None:
            return None
        value = float(found.values[0])
        margin = (found.rounding + _SPARE) * sizes(points, weights, known.order) + found.relative * value
        return Ceiling(
            _above(_restored(value + margin, exponent) * known.share, 16 * _EPS),
            max(0.0, _restored(value - margin, exponent) * known.share * (1 - 16 * _EPS)),
            found.points[0],
            name,
        )

    return engine


def _cells(known: Structure, x: np.ndarray, alpha: np.ndarray) -> Ceiling | None:
    leaky = known.activation == "leaky_relu"
    narrow = known.bent or (known.activation == "relu" and max(known.widths) == 1)
    doubled = len(x) * (2 if leaky else 1)
    if known.activation == "identity" or not narrow or not cells.applies(doubled, x.shape[1], alpha.shape[1]):
        return None
    found = cells.best_unit(x, -alpha, slope=known.negative_slope)
    return Ceiling(
        _above(found.upper * known.share, 16 * _EPS),
        found.lower * known.share * (1 - 16 * _EPS),
        known.unit(found.u, found.a),
        "cells",
    )


def _spectral(known: Structure, x: np.ndarray, alpha: np.ndarray) -> Ceiling | None:
    points, weights, exponent = _rescaled(x, alpha, known.order)
    if known.activation == "square":
        value, relative = closed.unfolded(points, weights)
        margin = ((len(x) + 64) * _EPS + _SPARE) * sizes(points, weights, 2) + relative * value
        return Ceiling(_above(_restored(value + margin, exponent) * known.share, 16 * _EPS), 0.0, None, "spectral")
    if not known.bent:
        return None
    slope = known.negative_slope
    delta = weighted.deltas(points, weights, slope)
    rho = weighted.bounded(points, weights, delta, slope)
    evidence = Relaxed(alpha, weighted.Weights(_restored(rho, exponent), delta))
    return Ceiling(_above(_restored(rho, exponent) * known.share, 64 * _EPS), 0.0, None, "spectral", evidence)


class Relaxed(NamedTuple):
    """The evidence of a relaxation: the dual vectors it was made for, and its certificate."""

    alpha: np.ndarray
    bound: balls.BallBound | weighted.Weights


def _moments(known: Structure, x: np.ndarray, alpha: np.ndarray) -> Ceiling | None:
    if not known.bent or known.activation == "identity" or not np.any(alpha):
        return None
    return _relaxed(known, x, alpha, balls.ball_bound(*cells.with_leak(x, alpha, known.negative_slope)))


def _relaxed(known: Structure, x: np.ndarray, alpha: np.ndarray, found: balls.BallBound) -> Ceiling:
    """What a relaxation proves of kappa."""
    one, two, exponent = _rescaled(x, alpha)
    doubled = 1 if known.negative_slope == 0 else 2
    spare = _restored(_SPARE * sizes(one, two), exponent)
    upper = _above((found.upper * doubled + spare) * known.share, 16 * _EPS)
    return Ceiling(upper, 0.0, None, "moments", Relaxed(alpha, found))


def relaxed(problem: RiskProblem, alpha: np.ndarray, *, loss: float | None = None) -> list[tuple[np.ndarray, Ceiling]]:
    """Dual vectors `[n, out]` that a relaxation raises together with its multipliers, from `alpha`, and their bounds.

    With one output and up to `LARGEST_JOINT` numbers in x it is the moment relaxation, otherwise, and to find out what
    a unit of a budget is worth, the spectral bound.  Empty where neither applies: they take one hidden layer of ReLU
    units (the second leaky ones too) without a ball.  `loss` as in `weighted.raised`.
    """
    known, kind, found = problem.structure, problem.conjugate.kind, list[tuple[np.ndarray, Ceiling]]()
    if known is None or not known.bent or known.activation == "identity" or not problem.scale_free or not alpha.any():
        return found
    x = known.inputs(problem.one.x)
    fits = known.activation == "relu" and problem.shape[1] == 1 and problem.loss.tau in (None, 1.0)
    fits = fits and kind in FORMS and x.size <= LARGEST_JOINT
    penalty = problem.penalty or 0.0
    if problem.penalty is None or not fits:
        rows = weighted.raised(problem, alpha, loss=loss)
        top = _spectral(known, x, rows)
        if top is not None:
            found, penalty = [(rows, top)], penalty or top.upper
    if fits and 0 < penalty < math.inf:
        made = relaxation(x, np.asarray(problem.y, np.float64), kind, penalty=penalty, alpha=alpha[:, 0])
        found.append((made.alpha[:, None], _relaxed(known, x, made.alpha[:, None], made.bound)))
    return found


def _norms(known: Structure, x: np.ndarray, alpha: np.ndarray) -> Ceiling | None:
    points, weights, exponent = _rescaled(x, alpha, known.order)
    size = sizes(points, weights, known.order) * (1 + _SPARE)
    return Ceiling(_above(_restored(size, exponent) * known.share, 16 * _EPS), 0.0, None, "norms")


CEILINGS: dict[str, Callable[[Structure, np.ndarray, np.ndarray], Ceiling | None]] = {
    "linear": _closed("linear", "identity"),
    "quadratic": _closed("quadratic", "square"),
    "gated": _closed("gated", "gated"),
    "cells": _cells,
    "spectral": _spectral,
    "norms": _norms,
    "moments": _moments,
}
EXACT = ("linear", "quadratic", "gated", "cells")  # where one of them applies, no other can be better


def ceiling(problem: RiskProblem, alpha: np.ndarray, engine: str = "auto") -> Ceiling | None:
    """The least proven bound on kappa for `alpha [n, out]`; None if the branch is not homogeneous or no engine applies.

    Args:
      problem: the risk.
      alpha: dual vectors.
      engine: one of `CEILINGS`, 'exact' for the one that is, or 'auto' for the best of them.
    """
    if problem.structure is None:
        return None
    known, best = problem.structure, None
    x = known.inputs(problem.one.x)
    for name in {"auto": tuple(CEILINGS), "exact": EXACT}.get(engine, (engine,)):
        # Several outputs are relaxed each by itself, which takes long and bounds less than all at once by `spectral`.
        if engine == "auto" and name == "moments" and (alpha.shape[1] > 1 or x.size > LARGEST_RELAXATION):
            continue
        found = CEILINGS[name](known, x, alpha)
        if found is not None and (best is None or found.upper < best.upper):
            best = found
        if found is not None and name in EXACT:
            break
    return best
