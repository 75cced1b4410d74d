"""Value functions that are known in closed form: positively homogeneous branches, and one ReLU unit by its cells.

A bias-free ReLU or linear branch with L weight matrices has `f(s w) = s^L f(w)` for s >= 0.  With `h(w) = ||w||^q` and
W the ball of radius R,

    v(b) = offset - kappa b^(L/q)  for b <= R^q,      kappa = max over ||w|| <= 1 of E<c, f(w; x)> / tau

so one number decides.  For L <= q v is convex and the gap is 0 for every I; for L > q it is concave, its envelope is
the chord, and with `t = I K / R^q`, `r = t - floor(t)` the gap is `kappa R^L (r - r^(L/q)) / I`.

kappa itself is known for

* linear branches of any widths: `E<c, W_L ... W_1 x> = tr(M W_L ... W_1)`, `M = E[x c^T]`.  By Hoelder's inequality for
  Schatten norms and `||.||_{S_L} <= ||.||_F` (L >= 2) this is at most `sigma_1(M) prod_k ||W_k||_F`, and on the unit
  ball the product of L norms is largest when they are equal: `kappa = sigma_1(M) L^(-L/2) / tau`, attained by rank-one
  layers. For L = 1 it is `||M||_F / tau`.
* ReLU branches with one output whose hidden layers have one unit each, or (L = 2) one hidden layer of any width:
  `f = w_L ... w_2 max(0, u.x)` with positive inner weights, so `kappa = rho L^(-L/2) / tau` by the same inequality,
  `rho = max over ||u|| = 1 and signs s of s E[c max(0, u.x)]`.  For L = 2 and several units `sum_j |a_j| ||u_j|| <=
  (sum_j a_j^2 + ||u_j||^2) / 2` shows that one unit is as good as many.  rho is found by `best_relu_unit`, exactly, for
  inputs in up to three dimensions.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from dualgap_jax.duality.margins import mlp_margin, mlp_problem
from dualgap_jax.duality.problem import program_of, subject_from
from dualgap_jax.duality.values import BUDGET_SLACK, Provable, ValueFunction, frozen, proven

_EPS = float(np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True, eq=False)
class Kappa(Provable):
    """Two-sided bounds on kappa, certified where a function of this module has proven them.

    Attributes:
      lower, upper: bounds.
      direction: `[p]`, a unit vector of weights that attains the lower one.
      method: how they were found.
      degree: L, the number of weight matrices; None where it is not known.
      margin: a proven bound on the margins over the unit ball, in units of tau; None where it is not known.
    """

    lower: float
    upper: float
    direction: Float64[np.ndarray, " p"]
    method: str = "given"
    degree: int | None = None
    margin: float | None = None


# --- homogeneous branches ---------------------------------------------------------------------------------------------


def homogeneous_value_function(
    kappa: Kappa,
    *,
    degree: int,
    power: int | float,
    radius: int | float,
    budgets: Float64[np.ndarray, " m"],
    offset: float = 1.0,
) -> ValueFunction:
    """`v(b) = offset - kappa b^(degree/power)` on a grid from 0 to `radius**power`.

    Its status is 'certified' where that of kappa is: the solver's own word, which `theorem1` has the checker confirm.

    Args:
      kappa: bounds and a direction.
      degree: L, the number of weight matrices.
      power: q of `h(w) = ||w||^q`.
      radius: R of W.
      budgets: the grid.
      offset: g(0).

    Raises:
      ValueError: for bounds that are crossed, negative or not finite, another degree than that of kappa, or a grid that
        does not run from 0 to `radius**power`.
    """
    if not 0 <= kappa.lower <= kappa.upper < math.inf:
        raise ValueError(f"need finite 0 <= kappa.lower <= kappa.upper, got {kappa.lower} and {kappa.upper}.")
    if kappa.degree not in (None, degree):
        raise ValueError(f"degree={degree}, but kappa is that of {kappa.degree} weight matrices.")
    most = radius**power
    budgets = frozen("budgets", budgets)
    if budgets[0] != 0 or abs(budgets[-1] - most) > 4 * _EPS * most:
        raise ValueError(f"the grid must run from 0 to {most:.6g}, it runs from {budgets[0]:.6g} to {budgets[-1]:.6g}.")
    exponent = degree / power
    if not abs(offset) + (2 + exponent) * kappa.upper * float(radius) ** degree < 1e300:
        raise ValueError(f"v falls by {kappa.upper:.6g} * {radius:.6g}^{degree}, which a float cannot hold; raise tau.")
    shape = budgets**exponent
    # The exponent is rounded, which counts as often as the logarithm of a budget is large.
    margin = 8 * _EPS * (abs(offset) + (1 + exponent * (1 + abs(math.log(most)))) * kappa.upper * most**exponent)
    inside = 1 - 2 * BUDGET_SLACK - 2 * _EPS * abs(math.log(radius))

    def lagrangian(lam: float) -> float:
        # Concave for exponent >= 1: the least value is at an end.  Else convex with one stationary point.
        points = [0.0, most]
        if exponent < 1 and lam > 0:
            ratio = kappa.upper * exponent / lam
            points.append(most if ratio >= most ** (1 - exponent) else ratio ** (1 / (1 - exponent)))
        least = min(offset - kappa.upper * s**exponent + lam * s for s in points)
        return least - 8 * margin - 8 * _EPS * lam * most

    made = ValueFunction(
        budgets=budgets,
        lower=offset - kappa.upper * shape - margin,
        upper=offset - kappa.lower * (budgets * inside**power) ** exponent + margin,
        method=f"homogeneous of degree {degree}, {kappa.method}",
        minimisers=(budgets ** (1 / power) * inside)[:, None] * kappa.direction,
        lagrangian=lagrangian,
        slope=kappa.upper * radius ** (degree - 1) * (1 + 8 * _EPS),
        concave=exponent >= 1,
        margin=None if kappa.margin is None else kappa.margin * radius**degree * (1 + 8 * _EPS),
    )
    return made if kappa.subject is None else proven(made, subject_from(kappa.subject, offset, radius, power))


def kappa_linear(
    x: Float64[np.ndarray, "n d"], c: Float64[np.ndarray, "n out"], *, tau: int | float, widths: tuple[int, ...]
) -> Kappa:
    """kappa of a bias-free linear branch with layers `d -> widths[0] -> ... -> out`, in the order of `networks.mlp`.

    Args:
      x: inputs, flat.
      c: functional of the outputs.
      tau: margin scale.
      widths: of the hidden layers; () is one matrix.
    """
    moment = x.T @ c / len(x)
    left, sigma, right = np.linalg.svd(moment, full_matrices=False)
    layers = len(widths) + 1
    if layers == 1:
        norm = float(np.linalg.norm(moment))
        direction = (moment.T / norm if norm > 0 else np.eye(1, moment.size)).reshape(-1)
    else:
        norm = float(sigma[0])
        # Rank-one layers, each of norm 1/sqrt(L): inputs to unit 0, unit 0 to unit 0, unit 0 to the outputs.
        parts = [np.outer(np.eye(1, widths[0])[0], left[:, 0])]
        parts += [np.outer(np.eye(1, b)[0], np.eye(1, a)[0]) for a, b in itertools.pairwise(widths)]
        parts.append(np.outer(right[0], np.eye(1, widths[-1])[0]))
        direction = np.concatenate([p.reshape(-1) for p in parts]) / math.sqrt(layers)
    value = norm * layers ** (-layers / 2) / tau
    sizes = np.linalg.norm(x, axis=1) * np.linalg.norm(c, axis=1)
    margin = (len(x) + x.shape[1] + 64) * _EPS * float(sizes.mean()) * layers ** (-layers / 2) / tau
    like = mlp_problem(x, c, tau=tau, widths=widths, activation="identity")
    largest = mlp_margin(x, c, layers, 1.0)
    share = None if largest is None else largest / tau * (1 + 4 * _EPS)
    made = Kappa(max(0.0, value - margin), value + margin, direction, "linear, singular value", layers, share)
    return proven(made, program_of(like)) if math.isfinite(value + margin) else made


def kappa_relu_chain(
    x: Float64[np.ndarray, "n d"], c: Float64[np.ndarray, " n"], *, tau: int | float, widths: tuple[int, ...]
) -> Kappa:
    """kappa of a bias-free ReLU branch with one output in up to three input dimensions, in the order of `networks.mlp`.

    Args:
      x: inputs, d <= 3.
      c: `[n]`, labels.
      tau: margin scale.
      widths: of the hidden layers: all 1, or a single layer of any width.

    Raises:
      ValueError: for other widths, or what `best_relu_unit` refuses.
    """
    if not widths or (len(widths) > 1 and max(widths) > 1):
        raise ValueError(f"widths={widths}: kappa is known for hidden layers of one unit, or one hidden layer.")
    unit = best_relu_unit(x, c)
    layers = len(widths) + 1
    scale = layers ** (-layers / 2) / tau
    first = np.zeros((widths[0], x.shape[1]))
    first[0] = unit.direction
    head = np.zeros(widths[-1])
    head[0] = unit.sign
    inner = np.ones(len(widths) - 1)
    direction = np.concatenate([first.reshape(-1), inner, head]) / math.sqrt(layers)
    lower, upper = max(0.0, unit.lower) * scale, unit.upper * scale
    like = mlp_problem(x, c[:, None], tau=tau, widths=widths, activation="relu")
    largest = mlp_margin(x, c[:, None], layers, 1.0)
    share = None if largest is None else largest / tau * (1 + 4 * _EPS)
    made = Kappa(lower * (1 - 8 * _EPS), upper * (1 + 8 * _EPS), direction, "ReLU cells", layers, share)
    return proven(made, program_of(like)) if math.isfinite(upper) else made


# --- one ReLU unit ----------------------------------------------------------------------------------------------------


class ReluUnit(NamedTuple):
    """`max s E[c max(0, u.x)]` over `||u|| = 1` and signs s: bounds, and the maximiser."""

    lower: float
    upper: float
    direction: Float64[np.ndarray, " d"]
    sign: float
    cells: int


class Arcs(NamedTuple):
    """A circle cut at its breakpoints: ends of the arcs `[k]` (angles), and which points' terms are active on each."""

    start: np.ndarray
    end: np.ndarray
    order: np.ndarray  # the point that changes at the start of each arc
    joins: np.ndarray  # whether it becomes active there
    active: np.ndarray  # `[n]`, active on the first arc


def cut_circle(points: np.ndarray) -> Arcs:
    """Cuts the circle of directions where `u.p = 0` for one of the points `[n, 2]`; points at 0 never change."""
    real = np.flatnonzero(np.linalg.norm(points, axis=1) > 0)
    angle = np.arctan2(points[real, 1], points[real, 0])
    if not len(real):
        return Arcs(np.array([0.0]), np.array([2 * np.pi]), np.array([-1]), np.array([False]), np.zeros(len(points)))
    cuts = np.mod(np.concatenate([angle - np.pi / 2, angle + np.pi / 2]), 2 * np.pi)
    who, joins = np.concatenate([real, real]), np.repeat([True, False], len(real))
    order = np.argsort(cuts, kind="stable")
    start = cuts[order]
    end = np.append(start[1:], start[0] + 2 * np.pi)
    widest = int(np.argmax(end - start))  # a safe place to look which points are active
    turn = np.roll(np.arange(len(order)), -widest)
    shift = np.where(turn < widest, 2 * np.pi, 0.0)
    start, end, order = start[turn] + shift, end[turn] + shift, order[turn]
    middle = (start[0] + end[0]) / 2
    active = (points @ np.array([np.cos(middle), np.sin(middle)]) > 0).astype(np.float64)
    return Arcs(start, end, who[order], joins[order], active)


def arc_sums(arcs: Arcs, terms: np.ndarray) -> np.ndarray:
    """`[k, e]`: the sum of the active rows of `terms [n, e]` on each arc."""
    first = arcs.active @ terms
    if arcs.order[0] < 0:
        return first[None]
    steps = np.where(arcs.joins, 1.0, -1.0)[:, None] * terms[arcs.order]
    steps[0] = 0.0  # the first arc's own start is part of `active`
    return first + np.cumsum(steps, axis=0)


def _best_on_circle(points: np.ndarray, c: np.ndarray, arcs: Arcs) -> tuple[float, float]:
    """The largest `sum_i c_i max(0, u.p_i)` on the unit circle, and its angle: in each arc the sum is linear in u."""
    z = arc_sums(arcs, c[:, None] * points)
    peak = np.arctan2(z[:, 1], z[:, 0])
    peak = arcs.start + np.mod(peak - arcs.start, 2 * np.pi)
    angles = np.stack([arcs.start, arcs.end, np.where(peak <= arcs.end, peak, arcs.start)])
    values = np.cos(angles) * z[:, 0] + np.sin(angles) * z[:, 1]
    best = np.unravel_index(int(np.argmax(values)), values.shape)
    return float(values[best]), float(angles[best])


def _best_direction(x: np.ndarray, c: np.ndarray) -> tuple[float, np.ndarray, int]:
    """The maximum of `F(u) = sum_i c_i max(0, u.x_i)` over unit vectors, a maximiser, and the number of cells seen."""

    def value(u: np.ndarray) -> np.ndarray:
        return np.maximum(u @ x.T, 0.0) @ c

    d = x.shape[1]
    if d == 1:
        candidates = np.array([[1.0], [-1.0]])
        values = value(candidates)
        return float(values.max()), candidates[int(np.argmax(values))], 2
    if d == 2:
        arcs = cut_circle(x)
        best, angle = _best_on_circle(x, c, arcs)
        return best, np.array([np.cos(angle), np.sin(angle)]), len(arcs.start)
    # d == 3.  A maximum is inside a cell, where F(u) = u.z with u = z/|z|, or on one of the circles u.x_i = 0.  Every
    # cell has an arc of one of the circles on its border.
    best, winner, cells, peaks = -math.inf, np.eye(1, 3)[0], 0, []
    for i in range(len(x)):
        size = np.linalg.norm(x[i])
        if size == 0:
            continue
        normal = x[i] / size
        basis = np.linalg.svd(normal[None])[2][1:]
        flat = x @ basis.T
        along = x @ normal
        parallel = np.linalg.norm(flat, axis=1) <= 16 * _EPS * np.abs(along)  # the margin of `best_relu_unit` covers it
        flat[parallel] = 0.0
        arcs = cut_circle(flat)
        on_circle, angle = _best_on_circle(flat, c, arcs)
        if on_circle > best:
            best, winner = on_circle, np.array([np.cos(angle), np.sin(angle)]) @ basis
        z = arc_sums(arcs, c[:, None] * x)
        for side in (1.0, -1.0):
            sums = z + (c * (parallel & (side * along > 0))) @ x
            sizes = np.linalg.norm(sums, axis=1)
            cells += len(sums)
            # A peak in its cell lies on this side of the circle, and of the two circles that end the arc.
            inside = (sizes > best) & (side * (sums @ normal) >= -1e-9 * sizes)
            if arcs.order[0] >= 0:
                for who, sign in ((arcs.order, 1.0), (np.roll(arcs.order, -1), -1.0)):
                    joins = arcs.joins if sign > 0 else np.roll(arcs.joins, -1)
                    height = np.where(joins, sign, -sign) * np.einsum("kd,kd->k", sums, x[who])
                    inside &= height >= -1e-9 * sizes * np.linalg.norm(x[who], axis=1)
            peaks.append(sums[inside] / sizes[inside, None])
    # Of the directions z/|z| only those inside their cell have F(u) = |z|; F itself is what counts.
    for part in np.array_split(np.concatenate(peaks), max(1, sum(map(len, peaks)) // 4096)) if peaks else ():
        if len(part):
            values = value(part)
            if values.max() > best:
                best, winner = float(values.max()), part[int(np.argmax(values))]
    return best, winner, cells


def best_relu_unit(x: Float64[np.ndarray, "n d"], c: Float64[np.ndarray, " n"]) -> ReluUnit:
    """The best single ReLU unit, `max s E[c max(0, u.x)]`, by enumerating the cells of the data's arrangement.

    The planes `u.x_i = 0` cut the sphere into cells in which the objective is linear in u.  With d = 2 the cells are
    2 n arcs; with d = 3 there are O(n^2), reached along the circles.  A bias is one more input that is always 1.

    Returns:
      Bounds with a rounding margin of `64 n eps E|c| |x|`, the maximiser, and the number of cells seen (with repeats).

    Raises:
      ValueError: for more than three input dimensions, or shapes that do not fit.
    """
    if x.ndim != 2 or c.shape != x.shape[:1] or not len(x):
        raise ValueError(f"need x [n, d] and c [n] with n >= 1, got shapes {x.shape} and {c.shape}.")
    if x.shape[1] > 3:
        raise ValueError(f"the cells are enumerated in up to 3 input dimensions, got {x.shape[1]}; use the search.")
    results = {sign: _best_direction(x, sign * c) for sign in (1.0, -1.0)}
    sign = max(results, key=lambda s: results[s][0])
    _, u, _ = results[sign]
    u = u / np.linalg.norm(u)
    attained = float(np.maximum(x @ u, 0.0) @ (sign * c)) / len(x)
    margin = 64 * len(x) * _EPS * float(np.mean(np.abs(c) * np.linalg.norm(x, axis=1)))
    top = max(results[sign][0] / len(x), attained)
    return ReluUnit(attained - margin, top + margin, u, sign, sum(r[2] for r in results.values()))
