"""Theorem 2 for many examples: X comes in blocks of columns, is never held whole, and may lie on several devices.

With r = min(d_0, ..., d_H, n), everything the solution needs of the data is `A = Y X^+`, a `d_H x d_0` matrix, and the
singular values of `Yt = A X`; `factorizations` gives both in two ways.  One more pass over the data, in float64,
evaluates problem (4) at the weights and the dual (5) at Lambda.  With `'auto'` the fast result is kept when this
certificate holds, and the accurate factorisation follows otherwise.

The certificate does not trust A, see `certificate`.  There `(X P)^+` is applied through the factor.  For `'gram'` the
allowance for the factor's own error is tested against the data where it is most in doubt, on the smallest Ritz vectors
of L; beyond that it is an estimate.  So is the rounding of the float64 sums, which grows with `||A|| ||X||`, that is
with the condition number of X.

The data are taken at their word: float32 data that look rank deficient in float32 are factorised again in float64.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from dualgap_jax.registry import unknown
from dualgap_jax.spectral.blocks import Data
from dualgap_jax.spectral.certificate import SAFETY, dual_rounding, lower_bound, primal_rounding
from dualgap_jax.spectral.checks import check_rtol, check_widths
from dualgap_jax.spectral.dependence import Dependencies
from dualgap_jax.spectral.factorizations import FACTORIZATIONS, Breakdown, Fit
from dualgap_jax.spectral.kernels import Block
from dualgap_jax.spectral.problem import SpectralError, check_gamma, narrowest
from dualgap_jax.spectral.scaling import shift
from dualgap_jax.spectral.solution import SpectralSolution, assemble, default_rtol, finish, out_of_range

Factorization = Literal["auto", "gram", "qr"]


class Attempt(NamedTuple):
    """One factorisation that was tried.

    Attributes:
      factorization: 'gram' or 'qr'.
      accepted: whether its result was kept.
      relative_gap: of its certificate; None where it broke down before there was one.
      passes: over the data, factorisation and certificate included.
      reason: in words.
    """

    factorization: str
    accepted: bool
    relative_gap: float | None
    passes: int
    reason: str


class ColumnsSolution(NamedTuple):
    """A solution and how it was found.

    Attributes:
      solution: weights in the precision of the data, or in float64 where the certificate of rounded ones does not
        hold; the certificate was evaluated in float64.
      factorization: the one that gave it.
      precision: of the factorisation: that of the data, or float64 where float32 data look rank deficient.
      projection_error: the bound on `||Yt - A X||_F` that the dual value allows for.
      attempts: everything that was tried, in order.
      dependencies: combinations of rows of X that were proven to be zero, on which the dual value relies.
    """

    solution: SpectralSolution
    factorization: str
    precision: str
    projection_error: float
    attempts: tuple[Attempt, ...]
    dependencies: Dependencies


class CertificateError(RuntimeError):
    """No factorisation reached the tolerance asked for.

    Attributes:
      attempts: everything that was tried, in order.
      best: the solution with the smallest gap; its certificate is sound, but wider than the tolerance.  None where
        every factorisation broke down.
    """

    def __init__(self, message: str, attempts: tuple[Attempt, ...] = (), best: ColumnsSolution | None = None) -> None:
        super().__init__(message)
        self.attempts = attempts
        self.best = best


# --- the certificate ------------------------------------------------------------------------------------------------


def certify(
    data: Data, fit: Fit, gamma: float, widths: tuple[int, ...], dtype: Any = None
) -> tuple[SpectralSolution, float]:
    """Weights in the data's precision, and problems (4) and (5) at them in float64; with the bound on `||E P||_F`.

    Args:
      data, fit: the data and what a factorisation found.
      gamma: as it was given, not in the problem's own unit.
      widths: the hidden widths.
      dtype: of the weights; that of the data by default.
    """
    (d_0, d_H), n, (rows, unit) = data.shape, data.n, data.powers
    dtype = dtype or data.dtype
    gamma, gamma_given = float(np.ldexp(gamma, -unit)), gamma
    r, depth = narrowest(widths, d_0, d_H, n), len(widths) + 1
    kept = jnp.maximum(fit.sigma[:r] - gamma, 0)
    weights = [np.asarray(w) for w in assemble(kept, fit.left[:, :r], fit.right[:r], widths)]
    step = int(unit) // depth
    with np.errstate(over="ignore", under="ignore"):
        given = [shift(weights[0], step - rows[None, :]), *(shift(w, step) for w in weights[1:])]
        given = [w.astype(dtype) for w in given]
        wide = [w.astype(np.float64) for w in given]
        exact = [jnp.asarray(w) for w in (shift(wide[0], rows[None, :] - step), *(shift(w, -step) for w in wide[1:]))]
    if not all(np.isfinite(w).all() for w in given):
        if dtype != np.float64:
            return certify(data, fit, gamma_given, widths, np.float64)
        raise out_of_range()
    whole = functools.reduce(lambda done, layer: layer @ done, exact)
    # The rows of A X again, turned so that small ones are not drowned by the rounding of large ones.
    turn = jnp.linalg.qr(fit.left, mode="complete")[0]
    maps = jnp.concatenate([whole, exact[0][:r], turn.T @ fit.fit, fit.fit])
    products, gradient, x_squared = data.total(lambda part: data.kernels.sums(part, maps, fit.fit), "certificate")
    at = np.cumsum([0, d_H, r, d_H, d_H, d_H]).tolist()
    spans = [slice(low, high) for low, high in itertools.pairwise(at)]
    part = [[products[rows, cols] for cols in spans] for rows in spans]
    half_norm = 0.5 * jnp.trace(part[4][4])
    misfit = half_norm - jnp.trace(part[0][4]) + 0.5 * jnp.trace(part[0][0])
    first = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(part[1][1]), 0))
    powers = [first, *(jnp.linalg.svd(w, compute_uv=False) for w in exact[1:])]
    primal = misfit + gamma / depth * sum(jnp.sum(p**depth) for p in powers)
    primal += primal_rounding(exact, x_squared, misfit, half_norm, gamma)
    clip = _clip(part[3][3], part[2][2], turn, gamma)
    # E E^T, and (Yt - Lambda)(Yt - Lambda)^T but for the part of E in the row space of X.
    misfits = part[4][4] - part[3][4] - part[4][3] + part[3][3]
    left_over = jnp.eye(d_H) - clip
    cross = left_over @ fit.fit @ gradient.T
    resolved = left_over @ part[3][3] @ left_over.T + cross + cross.T
    blur = 4 * jnp.finfo(jnp.float64).eps * jnp.linalg.norm(fit.whiten(jnp.eye(d_0)))
    error = SAFETY * (jnp.sum(fit.whiten(gradient) ** 2) + jnp.maximum(jnp.trace(misfits), 0) * blur**2)
    dual = lower_bound(
        half_norm, resolved, error, misfits, fit.unresolved, dual_rounding(fit.fit, x_squared, half_norm), r
    )
    found = finish(
        tuple(jnp.asarray(w) for w in given),
        clip @ fit.fit,
        fit.sigma,
        jnp.sum(kept > default_rtol(d_0, n, data.dtype) * jnp.sqrt(2 * half_norm)),
        jnp.asarray(gamma, jnp.float64),
        primal,
        dual,
        half_norm,
        (d_0, d_H, n),
        default_rtol(d_H, n, data.dtype),
        fit.unresolved,
    )
    found = jax.tree.map(np.asarray, found)
    return found.restored(data.powers, float(half_norm)), float(np.ldexp(float(jnp.sqrt(error)), unit))


def _clip(square: Array, turned: Array, turn: Array, gamma: float) -> Array:
    """The map that clips the singular values of A X at gamma, from `(A X)(A X)^T` in float64.

    To clip those of the factor would miss the ceiling by the factor's rounding, and that costs the dual value as much.
    By how much this misses the ceiling is measured, on the turned rows, and Lambda shrunk if it is more than 64 eps.
    """
    squares, basis = jnp.linalg.eigh(square)
    norms = jnp.sqrt(jnp.maximum(squares, 0))
    clip = (basis * jnp.where(norms > gamma, gamma / jnp.where(norms > 0, norms, 1), 1)[None, :]) @ basis.T
    seen = turn.T @ clip @ turn
    norm = jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(seen @ turned @ seen.T)[-1], 0))
    over = norm > gamma * (1 + 64 * jnp.finfo(jnp.float64).eps)
    return clip * jnp.where(over, gamma / jnp.where(norm > 0, norm, 1), 1)


# --- the front door -------------------------------------------------------------------------------------------------


def solve_columns(
    columns: Iterable[Block],
    *,
    gamma: float,
    widths: Sequence[int],
    rtol: float | None = None,
    factorization: Factorization = "auto",
    tolerance: float = 1e-6,
    mesh: Mesh | None = None,
    report: Callable[[str, int], None] | None = None,
) -> ColumnsSolution:
    """Solves problem (4) for data in blocks of columns, in bounded memory, and certifies the result (Theorem 2).

    Not for use inside `jit`: it looks at the certificate to decide what to do.  In memory at a time: one block, a few
    `d_0 x d_0` matrices, and for 'qr' a copy of the block.

    Args:
      columns: A `Columns` (see `in_blocks`), or a list of pairs `x [d_0, b]`, `y [d_H, b]`, float32 or float64; passed
        over several times.  The factorisation is made in that precision, the certificate in float64.
      gamma: The regularisation, at least 0, in the unit of the singular values of Y.
      widths: The hidden widths `(d_1, ..., d_{H-1})`; they set the depth H.
      rtol: As in `solve`: the weights leave out singular values of X at most this share of the largest.
      factorization: 'gram' (fast), 'qr' (accurate), or 'auto': fast, and accurate only if that certificate fails.
      tolerance: The relative gap up to which a certificate holds.
      mesh: The devices over which the columns of each block are spread; None is one device.
      report: A function that is called at the start of a pass and after each block, with what is done, as
        'certificate, pass 3', and the number of examples so far.

    Returns:
      The solution, with NumPy arrays, and how it was found.  Lambda is float64.

    Raises:
      SpectralError: The data, widths, gamma or settings are not allowed, the blocks do not agree, or the result leaves
        the range of the numbers.
      CertificateError: No factorisation reaches the tolerance; it carries the attempts and the best solution.
    """
    check_gamma(gamma)
    widths = check_widths(widths)
    check_rtol(rtol)
    if factorization not in get_args(Factorization):
        raise SpectralError(unknown("factorization", factorization, get_args(Factorization)))
    if not isinstance(columns, Iterable):
        raise SpectralError(
            f"columns is a {type(columns).__name__}; give a Columns (see in_blocks) or a list of pairs."
        )
    if not 0 < tolerance < 1:
        raise SpectralError(f"tolerance={tolerance} must lie between 0 and 1; it is a relative gap.")
    names = ("gram", "qr") if factorization == "auto" else (factorization,)
    with jax.enable_x64(True):  # float32 data stay float32; the certificate is float64
        data = Data(columns, mesh, len(widths) + 1, report)
        share = max(default_rtol(data.shape[0], data.n), 0.0 if rtol is None else float(rtol))
        return _first_that_holds(data, float(gamma), widths, names, tolerance, share)


def _first_that_holds(
    data: Data, gamma: float, widths: tuple[int, ...], names: Sequence[str], tolerance: float, rtol: float
) -> ColumnsSolution:
    """Tries the factorisations in order."""
    attempts: list[Attempt] = []
    best: ColumnsSolution | None = None
    for name in names:
        before = data.passes
        try:
            fit = FACTORIZATIONS[name](data, tolerance, rtol)
        except Breakdown as broken:
            attempts.append(Attempt(name, False, None, data.passes - before, str(broken)))
            continue
        solution, error = certify(data, fit, gamma, widths)
        rounded = abs(float(solution.relative_gap)) > tolerance and data.dtype != np.float64
        if rounded:
            solution, error = certify(data, fit, gamma, widths, np.float64)
        gap = float(solution.relative_gap)
        holds = abs(gap) <= tolerance
        reason = f"relative gap {gap:.3g} {'within' if holds else 'not within'} the tolerance {tolerance:g}"
        if fit.precision != str(data.dtype):
            reason += f", after a factorisation in {fit.precision}: X is all but rank deficient in {data.dtype}"
        if rounded:
            reason += ", with weights in float64"
        if fit.unresolved:
            reason += f", of X {fit.unresolved} directions lie below the rounding of float64"
        attempts.append(Attempt(name, holds, gap, data.passes - before, reason))
        found = ColumnsSolution(solution, name, fit.precision, error, tuple(attempts), fit.dependencies)
        if holds:
            return found
        if best is None or abs(gap) < abs(float(best.solution.relative_gap)):
            best = found
    told = "; ".join(f"{a.factorization}: {a.reason}" for a in attempts)
    raise CertificateError(
        f"no certificate within {tolerance:g} ({told}).  {_advice(data, names, best)}.", tuple(attempts), best
    )


def _advice(data: Data, names: Sequence[str], best: ColumnsSolution | None) -> str:
    """What can still be tried."""
    ways = ["a larger tolerance"]
    if "qr" not in names:
        ways.insert(0, "factorization='qr'")
    if data.dtype != np.float64:
        ways.insert(0, "float64 data")
    said = f"Give {' or '.join(ways)}"
    if best is not None and int(best.solution.unresolved):
        said += ", or leave out the rows of X that depend on others"
    return said
