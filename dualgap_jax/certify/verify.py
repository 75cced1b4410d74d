"""Proves a lower bound on F* once more from the arrays in it, with arithmetic of its own.

Nothing of the solver is used but the data of the problem and what kind of branch it has.  Rows of alpha are rational
numbers: whether they lie in the domain of the conjugate is decided exactly, and so are the conjugates, but for
logarithms, which carry 40 digits.  The bound on kappa is reached again by another enumeration of cells, or by Cholesky
factors whose success proves an inequality of matrices (Rump, BIT 46, 2006); `duality.checker` goes through boxes.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction

import numpy as np

from dualgap_jax.certify.bound import Bound
from dualgap_jax.certify.engines import Relaxed
from dualgap_jax.certify.moments.verify import VerificationError, verify_ball_bound
from dualgap_jax.certify.problem import RiskProblem
from dualgap_jax.certify.structure import Structure
from dualgap_jax.certify.verify_cells import largest_sum
from dualgap_jax.certify.weighted import Weights
from dualgap_jax.duality.branch_and_bound import Tree
from dualgap_jax.duality.checker.closed_forms import units
from dualgap_jax.duality.checker.value_functions import Verified, verify_minimum

_EPS = float(np.finfo(np.float64).eps)
_DIGITS = decimal.Context(prec=50)
_LOG_ERROR = Fraction(1, 10**40)
_BITS = 128  # to which a product with a logarithm is rounded up


def _entropy(p: Fraction) -> Fraction:
    """An upper bound on `p ln p`."""
    if p == 0:
        return Fraction(0)
    log = Fraction(_DIGITS.ln(_DIGITS.divide(Decimal(p.numerator), Decimal(p.denominator))))
    found = p * (log + _LOG_ERROR * (1 + abs(log)))
    unit = Fraction(2) ** (found.numerator.bit_length() - found.denominator.bit_length() - _BITS)
    return math.ceil(found / unit) * unit  # sums of such numbers are many times faster


def conjugate(kind: str, tau: float | None, row: list[float], label: int | float) -> Fraction | None:
    """An upper bound on l* of one row, exact for all but the logistic loss; None outside the domain."""
    alpha, scale = [Fraction(a) for a in row], Fraction(1 if tau is None else tau)
    if kind == "squared":
        own = alpha[0] * Fraction(label) if len(row) == 1 else alpha[int(label)]
        return sum((a * a for a in alpha), Fraction(0)) / 2 + own
    if len(row) == 1:
        q = -alpha[0] * Fraction(label) * scale
        if not 0 <= q <= 1:
            return None
        return -q if kind == "hinge" else _entropy(q) + _entropy(1 - q)
    rest = [a for k, a in enumerate(alpha) if k != int(label)]
    total = sum(rest, Fraction(0))
    if min(rest) < 0 or alpha[int(label)] != -total:
        return None
    if kind == "logistic":
        return None if total > 1 else sum(map(_entropy, rest), _entropy(1 - total))
    most = max(rest) * len(row) if kind == "multi-margin" else total
    return None if most * scale > 1 else -scale * total


def psd(matrix: np.ndarray, error: float) -> bool:
    """Whether a symmetric matrix, known up to `error` in the spectral norm, is proven to be positive semidefinite.

    If Cholesky's algorithm in float64 runs to its end for `A - c I` with `c >= gamma_{k+1} trace(A)`, A has no negative
    eigenvalue (Rump 2006, Theorem 2.3); the constant here is twice that.
    """
    k = len(matrix)
    trace = float(np.abs(np.diag(matrix)).sum())
    shift = 2 * (k + 2) * _EPS * trace + error * (1 + 4 * _EPS) + 1e-290
    try:
        factor = np.linalg.cholesky(matrix - shift * np.eye(k))
    except np.linalg.LinAlgError:
        return False
    return bool(np.isfinite(factor).all())


def top_at_most(matrix: np.ndarray, bound: float, error: float = 0.0) -> bool:
    """Whether the top singular value of a matrix, known up to `error` (Frobenius), is proven to be at most `bound`."""
    return _root_at_most(*_gram(matrix, error), bound)


def _gram(matrix: np.ndarray, error: float = 0.0) -> tuple[np.ndarray, float]:
    """The Gram matrix of the shorter side, and its own error with that of the matrix (Frobenius)."""
    m = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    size = float(np.linalg.norm(m)) * (1 + (m.size + 8) * _EPS) + error
    return m.T @ m, (m.shape[0] + 4) * _EPS * size * size + 2 * error * size


def _root_at_most(gram: np.ndarray, error: float, bound: float) -> bool:
    square = bound * bound * (1 - 4 * _EPS)
    return psd(square * np.eye(len(gram)) - gram, error + 2 * _EPS * square)


def _unfolding_at_most(x: np.ndarray, alpha: np.ndarray, bound: float, error: float) -> bool:
    """Whether `||(1/n) sum_j alpha_j (u.x_j)^2|| <= bound` for all unit vectors u; moments are off by `error`.

    Each output's sum is `u^T M_k u <= ||M_k u||`, so that the squares add up to `u^T (sum_k M_k^T M_k) u` at most.
    """
    d, out = x.shape[1], alpha.shape[1]
    gram, square = np.zeros((d, d)), 0.0
    for weights in alpha.T:
        matrix = x.T @ (weights[:, None] * x) / len(x)
        gram += matrix.T @ matrix
        square += float(np.linalg.norm(matrix)) ** 2
    size = math.sqrt(square) * (1 + (d * d + out + 8) * _EPS) + error
    return _root_at_most(gram, (d + out + 4) * _EPS * size * size + 2 * error * size, bound)


def _open(gates: np.ndarray, x: np.ndarray) -> Iterator[np.ndarray]:
    """`[n, 1]` a gate: 1 where `g.x_j >= 0` in exact arithmetic, else 0."""
    for gate in gates:
        with np.errstate(over="ignore", invalid="ignore"):
            terms = x * gate
            total, most = terms.sum(axis=1), np.abs(terms).sum(axis=1)
        side = (total >= 0).astype(np.float64)
        for j in np.flatnonzero(~(np.abs(total) > (len(gate) + 4) * _EPS * most + 1e-290)):  # overflows too
            pairs = zip(gate.tolist(), x[j].tolist(), strict=True)
            side[j] = float(sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0)) >= 0)
        yield side[:, None]


def _power_of_two(array: np.ndarray) -> int:
    return math.frexp(float(np.abs(array).max(initial=0.0)))[1]


def _balanced(x: np.ndarray, alpha: np.ndarray, degree: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The same sums `alpha_j psi(u.x_j)` but for a power of two, with points and the largest weight of sizes near 1.

    As psi is positively homogeneous, a power of two may go from a point to its weight.  A weight that is then lost to
    underflow is 2^-1000 of the largest, which every rounding that is charged exceeds.

    Args:
      x, alpha: `[n, d]`, `[n, out]`.
      degree: psi(2 t) is 2^degree psi(t).

    Returns:
      Points, weights, and the power: the sums are `2^power` times those of the two.
    """
    longest, largest = (np.abs(a).max(axis=1, initial=0.0) for a in (x, alpha))
    ex, ea = np.frexp(longest)[1].astype(np.int64), np.frexp(largest)[1].astype(np.int64)
    live = (longest > 0) & (largest > 0)  # the others add 0
    if not live.any():
        return np.zeros_like(x), np.zeros_like(alpha), 0
    power = int((degree * ex + ea)[live].max())
    points = np.ldexp(np.where(live[:, None], x, 0.0), -ex[:, None])
    return points, np.ldexp(np.where(live[:, None], alpha, 0.0), (degree * ex - power)[:, None]), power


def _kappa(known: Structure, x: np.ndarray, alpha: np.ndarray, method: str, claim: float) -> str:
    """Why `kappa(alpha) <= claim` was not proven again, or ""."""
    squared = known.activation == "square"
    points, weights, power = _balanced(x, alpha, 2 if squared else 1)
    if claim >= 0 and not weights.any():
        return ""  # every sum is 0
    # A unit (u, a) of norm 1 has |u|^2 |a| <= 2/3 (1/3)^(1/2), and L layers a product of norms of at most L^(-L/2).
    factor = 1.5 * math.sqrt(3) if squared else known.degree ** (known.degree / 2)
    rho = math.ldexp(claim, -power) * factor * (1 - 16 * _EPS)
    lengths = [math.hypot(*row) for row in points.tolist()]
    norms = [math.hypot(*row) for row in weights.tolist()], [s * s for s in lengths] if squared else lengths
    size = math.fsum(a * b for a, b in zip(*norms, strict=True)) / len(x) * (1 + 16 * _EPS)
    mean = weights.T @ points / len(x)
    error, slope = (len(x) + 4) * _EPS * size, 0.0 if squared or known.gates is not None else known.negative_slope
    holds: Callable[[], bool] = lambda: False  # noqa: E731
    if method == "norms":
        holds = lambda: size <= rho  # noqa: E731
    elif method == "linear" and known.activation == "identity":
        if known.degree == 1:
            holds = lambda: float(np.linalg.norm(mean)) * (1 + (mean.size + 8) * _EPS) + error <= rho  # noqa: E731
        else:
            holds = lambda: top_at_most(mean, rho, error)  # noqa: E731
    elif method in ("quadratic", "spectral") and squared:
        holds = lambda: _unfolding_at_most(points, weights, rho, error + 4 * _EPS * size)  # noqa: E731
    elif method == "gated" and known.gates is not None:
        opens = _open(known.gates, x)
        holds = lambda: all(top_at_most((weights * s).T @ points / len(x), rho, error) for s in opens)  # noqa: E731
    elif method == "cells":
        narrow = known.bent or (known.activation == "relu" and max(known.widths) == 1)
        if not narrow or known.activation == "identity" or x.shape[1] > 3:
            return "the cells say nothing about this branch"
        if weights.shape[1] == 1 and 1e-250 < rho < 1e250:  # both signs of one number: cones, which are few
            both, c = _without_leak(points, weights, slope)
            if not units(both, c[:, 0], rho * (len(points) / len(both)))[0]:
                return ""
        return largest_sum(points, weights, slope, rho)
    else:
        return f"the engine {method!r} is not known for this branch"
    return "" if holds() else f"kappa <= {claim:.6g} was not reached again by {method}"


def _without_leak(x: np.ndarray, alpha: np.ndarray, slope: float) -> tuple[np.ndarray, np.ndarray]:
    """Points and factors whose sum over ReLU is that over the leaky unit: `psi(t) = max(t, 0) - slope max(-t, 0)`."""
    return (x, alpha) if slope == 0 else (np.vstack([x, -x]), np.vstack([alpha, -slope * alpha]))


def _weighted(x: np.ndarray, alpha: np.ndarray, slope: float, claim: Weights) -> str:
    """Why `rho(alpha) <= claim.upper` does not follow from its weights, or "".

    Over unit vectors `(1/n) sum_j (a.alpha_j) psi(u.x_j) <= a^T P a + 2 a^T Q u + u^T R u`, whatever the weights: at
    most twice the top eigenvalue of the matrix of these blocks.
    """
    delta = np.asarray(claim.delta, np.float64)
    if delta.shape != (len(x),) or not (np.isfinite(delta).all() and (delta > 0).all() and claim.upper >= 0):
        return "the weights of the examples are not positive numbers, one for each"
    ex, ea = _power_of_two(x), _power_of_two(alpha)
    points, rows = np.ldexp(x, -ex), np.ldexp(alpha, -ea)
    live = (np.abs(points).max(axis=1) > 0) & (np.abs(rows).max(axis=1) > 0)  # the others add 0 to the sum itself
    points, rows, delta, n = points[live], rows[live], delta[live], len(x)
    heads, feet = rows * np.sqrt(delta)[:, None], points / np.sqrt(delta)[:, None]
    bent, straight = (1 - slope) / (4 * n), (1 + slope) / (4 * n)
    parts = bent * (heads.T @ heads), straight * (rows.T @ points), bent * (feet.T @ feet)
    matrix = np.block([[parts[0], parts[1]], [parts[1].T, parts[2]]])
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(points, axis=1)
    size = bent * (float(np.sum(heads**2)) + float(np.sum(feet**2))) + 2 * straight * float(lengths.sum())
    if not np.isfinite(matrix).all():
        return "the weights of the examples leave the range of numbers"
    top = math.ldexp(claim.upper, -ex - ea) / 2
    if top > 0 and psd(top * np.eye(len(matrix)) - matrix, (len(x) + 16) * _EPS * size + 4 * _EPS * top):
        return ""
    return f"rho <= {claim.upper:.6g} was not reached again by the weights of the examples"


def _relaxed(known: Structure, x: np.ndarray, alpha: np.ndarray, evidence: Relaxed, claim: float) -> str:
    """Why `kappa(alpha) <= claim` does not follow from a relaxation made for other dual vectors, or "".

    For any multiple t of these, `rho(alpha) <= t rho(theirs) + (1/n) sum_j ||alpha_j - t theirs_j|| ||x_j||`.
    """
    theirs = np.asarray(evidence.alpha, np.float64)
    if not known.bent or theirs.shape != alpha.shape:
        return "the relaxation is not one of this branch and these dual vectors"
    if isinstance(evidence.bound, Weights):
        points, proven = x, evidence.bound.upper
        if reason := _weighted(x, theirs, known.negative_slope, evidence.bound):
            return reason
    else:
        points, weights = _without_leak(x, theirs, known.negative_slope)
        try:
            proven = verify_ball_bound(points, weights, evidence.bound)
        except VerificationError as error:
            return str(error)
    top = int(np.argmax(np.abs(theirs)))
    multiple = max(0.0, float(alpha.reshape(-1)[top] / theirs.reshape(-1)[top])) if theirs.any() else 0.0
    scaled = multiple * theirs
    moved = np.linalg.norm(alpha - scaled, axis=1) + 2 * _EPS * np.linalg.norm(scaled, axis=1)
    change = math.fsum((moved * np.linalg.norm(x, axis=1)).tolist()) / len(x) * (1 + (sum(alpha.shape) + 64) * _EPS)
    rho = (multiple * proven * (len(points) / len(x)) + change) * (1 + 16 * _EPS)
    return "" if rho / 2 <= claim else f"kappa <= {claim:.6g} does not follow from the relaxation"


def _minimum(known: Structure, kappa: float, lam: float, radius: float, power: float, claim: Fraction) -> bool:
    """Whether `lam s^q - kappa s^L >= claim` for all s in [0, radius]."""
    if claim > 0:
        return False
    if known.degree == power and lam >= kappa:
        return True
    with decimal.localcontext(_DIGITS):
        k, m, q, degree = Decimal(kappa), Decimal(lam), Decimal(power), Decimal(known.degree)
        limit = Decimal(claim.numerator) / Decimal(claim.denominator)
        points = [Decimal(radius)] if math.isfinite(radius) else []
        if known.degree < power and lam > 0 and kappa > 0:
            # ln s; where it passes the ball's, s itself may be out of any range
            inner = (k * degree / (m * q)).ln() / (q - degree)
            if not points or inner < points[0].ln():
                points = [inner.exp()]
        if not points:
            return kappa <= 0
        # With 50 digits; what is stationary is even better than that.
        return all(m * s**q - k * s**degree - Decimal("1e-40") * (m * s**q + k * s**degree) >= limit for s in points)


def _bias(alpha: list[list[float]], lam: float, radius: float) -> Fraction | None:
    """A lower bound on `min over c of <mean alpha, c> + lam ||c||^2`; None for minus infinity."""
    n = len(alpha)
    square = (
        sum((sum(map(Fraction, column), Fraction(0)) ** 2 for column in zip(*alpha, strict=True)), Fraction(0)) / n**2
    )
    if square == 0:
        return Fraction(0)
    if lam > 0:
        return -square / (4 * Fraction(lam))
    if math.isinf(radius):
        return None
    root = Fraction(math.sqrt(square) * (1 + 4 * _EPS) + 1e-300)
    return -root * Fraction(radius)


def verify_bound(problem: RiskProblem, bound: Bound) -> Verified:
    """Proves that F* is at least `bound.value` again, from alpha, the multiplier and the bound on one branch.

    Returns:
      `Verified`, whose `reason` names the first step that was not proven; what a certificate calls estimated is none.
    """
    try:
        with np.errstate(all="ignore"):
            return _verified(problem, bound)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        return Verified(False, f"the bound is not one that can be checked: {error!r:.200}", 0)


def _verified(problem: RiskProblem, bound: Bound) -> Verified:
    """See `verify_bound`; what is malformed in any of its parts may raise here."""
    alpha, claims = np.asarray(bound.alpha, np.float64), bound.pieces
    if alpha.shape != problem.shape or not np.isfinite(alpha).all():
        return Verified(False, f"alpha has the shape {alpha.shape}, need finite numbers {problem.shape}", 0)
    if not all(math.isfinite(v) for v in (bound.value, bound.multiplier, *claims)) or bound.multiplier < 0:
        return Verified(False, "a number of the bound is not finite, or its multiplier negative", 0)
    rows = alpha.tolist()
    terms = [
        conjugate(problem.conjugate.kind, problem.loss.tau, row, label)
        for row, label in zip(rows, problem.y.tolist(), strict=True)
    ]
    inside = [term for term in terms if term is not None]
    if len(inside) < len(terms):
        return Verified(False, f"row {terms.index(None)} of alpha is outside the domain of the conjugate", 0)
    if sum(inside, Fraction(0)) / len(inside) > Fraction(claims.conjugate):
        return Verified(False, "the mean of the conjugates is larger than claimed", 0)
    lam = bound.multiplier
    if problem.penalty is not None and lam != problem.penalty:
        return Verified(False, f"the multiplier {lam} is not the penalty {problem.penalty}", 0)
    cost = Fraction(0) if problem.budget is None else Fraction(lam) * Fraction(problem.budget)
    if Fraction(claims.cost) < cost:
        return Verified(False, "the cost of the budget is larger than claimed", 0)
    if Fraction(claims.minimum) - Fraction(claims.conjugate) - Fraction(claims.cost) < Fraction(bound.value):
        return Verified(False, "the terms of the bound do not add up to it", 0)
    if isinstance(bound.evidence, Tree):
        return verify_minimum(problem.branch_problem(alpha), lam, bound.evidence, claims.minimum)
    if bound.kappa is None and not alpha.any():
        return Verified(claims.minimum <= 0, "" if claims.minimum <= 0 else "min phi is at most 0 for alpha = 0", 0)
    known = problem.structure
    if bound.kappa is not None and not 0 <= bound.kappa < math.inf:
        return Verified(False, f"kappa = {bound.kappa} is no bound: kappa(alpha) is at least 0 and finite", 0)
    if bound.kappa is None or known is None:
        return Verified(False, "nothing is given that bounds one branch", 0)
    bias = _bias(rows, lam, problem.radius) if known.use_bias else Fraction(0)
    rest = None if bias is None else Fraction(claims.minimum) - bias
    if rest is None or not _minimum(known, bound.kappa, lam, problem.radius, problem.power, rest):
        return Verified(False, "the minimum over one branch does not follow from the bound on kappa", 0)
    x = known.inputs(problem.one.x)
    if isinstance(bound.evidence, Relaxed):
        reason = _relaxed(known, x, alpha, bound.evidence, bound.kappa)
    else:
        reason = _kappa(known, x, alpha, bound.method, bound.kappa)
    return Verified(not reason, reason, 0)
