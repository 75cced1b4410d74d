"""The closed forms proven again, with arithmetic of its own: positively homogeneous branches.

For a bias-free mlp with L weight matrices and `psi(a) = max(0, a)` or `a` it holds that `f(s w) = s^L f(w)`, and
`E<c, f(w; x)> <= rho (||w||^2 / L)^(L/2)` (arithmetic and geometric mean of the layers' norms), with

* linear branches: rho the largest singular value of `E[x c^T]`, its Frobenius norm for L = 1;
* ReLU branches with one output and one unit a layer, or one hidden layer: rho the largest `s E[c max(0, u.x)]` over
  unit vectors u and signs s.

So with `kappa = rho L^(-L/2) / tau` every claim (lower values of v, slope, bounds on Q) asks for one inequality on
rho.  The smallest rho that serves all of them is found in 50 decimal digits, and then proven: for singular values from
those of a matrix with its rounding allowed for, for ReLU by cutting the sphere of directions into cones.

**Cones.**  The generators `v_k` of all cones are halves of sums of others, from the axes on, and exact in float64; they
lie on `|v|_1 = 1`.  On `u = sum a_k v_k`, `a >= 0`, each term `c max(0, u.x)` is at most linear in a: it is itself
where `u.x` keeps its sign; at most `sum a_k c max(0, v_k.x)` for c > 0; and at most `c q u.x` with any q in [0, 1] for
c < 0.  With z the sum of the terms that are linear in u, H_k the sum of the others at `v_k`, and `m` the least cosine
between a generator and their mean, so that `||u|| >= m sum a_k ||v_k||`,

    sum_i c_i max(0, u.x_i) <= ||u|| min(||z|| + max_k H_k / (m ||v_k||), max_k (z.v_k + H_k) / (m ||v_k||)).

Where u.x keeps all its signs the second exceeds the truth by the square of the cone's width, and not by the width, so
that a maximum at a corner of the cells is closed in hundreds of cones.

A cone for which this does not suffice is halved along its longest edge.  The checker ends where a generator is worth
more than the claim, and gives up after 50,000 cones: what is true but too close to the truth is not proven again then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import ROUND_FLOOR, Context, Decimal, localcontext
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dualgap_jax.duality.margins import recognise
from dualgap_jax.duality.problem import Problem
from dualgap_jax.duality.values import ValueFunction

_EPS = float(np.finfo(np.float64).eps)
_BATCH = 256
_DIGITS = Context(prec=50, Emin=-(10**9), Emax=10**9)
_ROOM = Decimal("1e-40")  # for the roundings of these digits
_MOST_CONES = 50_000


class Homogeneous(NamedTuple):
    """A bias-free mlp: L, whether its activation is ReLU, and whether one rho decides (see the head of the file)."""

    degree: int
    relu: bool
    decided: bool


def homogeneous(problem: Problem) -> Homogeneous | None:
    """What the branch is, if it is a bias-free mlp with ReLU or without activation.

    Returns None for every other branch, and where 8 random weights give other outputs than NumPy's layers.
    """
    known = recognise(problem)
    if known is None or known.activation not in ("relu", "identity"):
        return None
    relu = known.activation == "relu" and len(known.widths) > 0
    shapes = [leaf.shape for leaf in jax.tree.leaves(problem.template)]
    x, rng = problem.x.reshape(len(problem.x), -1), np.random.default_rng(0)
    for _ in range(8):
        w = rng.standard_normal(problem.size)
        parts = np.split(w, np.cumsum([a * b for a, b in shapes])[:-1])
        layers = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        out, size = x, np.abs(x)
        for k, layer in enumerate(layers):
            out, size = out @ layer.T, size @ np.abs(layer).T
            out = np.maximum(out, 0) if relu and k < len(layers) - 1 else out
        with jax.enable_x64(True):
            given = np.asarray(problem.outputs(jnp.asarray(w, jnp.float64)))
        if not (np.abs(given - out) <= 1e-12 * (size + 1e-290)).all():
            return None
    widths = known.widths
    narrow = problem.c.shape[1] == 1 and x.shape[1] <= 3 and len(widths) > 0 and (len(widths) == 1 or max(widths) == 1)
    return Homogeneous(len(shapes), relu, narrow or not relu)


def verify_closed_form(problem: Problem, function: ValueFunction, duals: Mapping[float, float]) -> tuple[str, int]:
    """Proves the lower values, the slope, the concavity and bounds on Q of a homogeneous value function again.

    Args:
      problem: the one-branch problem.
      function: its value function.
      duals: multiplier -> what is claimed to lie below `min g + lam h`.

    Returns:
      The first claim that was not proven, or ""; and the number of cones that were looked at.
    """
    kind = homogeneous(problem)
    if kind is None or not kind.decided:
        return "the branch is none whose value function has a closed form", 0
    with localcontext(_DIGITS):
        rate = Decimal(kind.degree) / Decimal(problem.power)
        if function.concave and kind.degree < problem.power:
            return f"v is called concave, but L = {kind.degree} is less than the power {problem.power}", 0
        if function.lower[0] > problem.offset:
            return "the value at the budget 0 is claimed to lie above g(0)", 0
        powers = [Decimal(b) ** rate if b > 0 else Decimal(0) for b in function.budgets.tolist()]
        offset = Decimal(problem.offset)
        needed = [
            (offset - Decimal(v)) / s * (1 - _ROOM) for v, s in zip(function.lower.tolist(), powers, strict=True) if s
        ]
        if function.slope is not None:
            needed.append(Decimal(function.slope) / Decimal(problem.radius) ** (kind.degree - 1) * (1 - _ROOM))
        kappa = min(needed)
        most = Decimal(problem.radius) ** Decimal(problem.power)
        for lam, value in duals.items():
            if not Decimal(value) <= offset + _least(kappa, rate, Decimal(lam), most):
                return f"the bound on Q({lam:.6g}) does not follow", 0
        claim = kappa * Decimal(problem.tau) * Decimal(kind.degree) ** (Decimal(kind.degree) / 2)
        rho = float(claim.quantize(Decimal(1).scaleb(claim.adjusted() - 15), ROUND_FLOOR)) if claim > 0 else 0.0
        rho = rho if Decimal(rho) <= claim else math.nextafter(rho, 0.0)
    if not 1e-250 < rho < 1e250:
        return f"the claim rho = {rho:.6g} is out of the range of the checker", 0
    x, c = problem.x.reshape(len(problem.x), -1), problem.c
    return units(x, c[:, 0], rho) if kind.relu else (_singular(x, c, kind.degree, rho), 0)


def verify_margin(problem: Problem, margin: float) -> bool:
    """Whether a bias-free mlp with a contraction as activation has no margin above `margin * tau` over W.

    `|f| <= ||x|| prod ||W_k|| <= ||x|| (R^2 / L)^(L/2)`; a margin between classes is a difference of two outputs.
    """
    known = recognise(problem)
    if known is None:
        return False
    layers, x = len(known.widths) + 1, problem.x.reshape(len(problem.x), -1)
    binary = problem.c.shape[1] == 1 and (np.abs(problem.c) == 1).all()
    classes = problem.c + 1 / problem.c.shape[1]
    if not binary and not (np.abs(np.sort(classes, axis=1) - np.eye(classes.shape[1])[-1]) < 1e-12).all():
        return False
    with localcontext(_DIGITS):
        squares = (x / max(float(np.abs(x).max()), 1e-300)) ** 2
        row = x[int(np.argmax(squares.sum(axis=1)))]
        norm = sum((Decimal(v) ** 2 for v in row.tolist()), Decimal(0)).sqrt() * (
            1 + Decimal(x.shape[1] + 4) * Decimal(_EPS)
        )
        bound = norm * (Decimal(problem.radius) ** 2 / layers) ** (Decimal(layers) / 2)
        bound *= 1 if binary else Decimal(2).sqrt()
        return Decimal(margin) * Decimal(problem.tau) >= bound * (1 + _ROOM)


def _least(kappa: Decimal, rate: Decimal, lam: Decimal, most: Decimal) -> Decimal:
    """At most the least `lam s - kappa s^rate` over `0 <= s <= most`."""
    points = [Decimal(0), most]
    if rate < 1 and lam > 0 and kappa > 0:  # convex, with one stationary point
        points.append(min((kappa * rate / lam) ** (1 / (1 - rate)), most))
    values = [lam * s - (kappa * s**rate if s else 0) for s in points]
    return min(values) - _ROOM * (lam * most + abs(kappa) * most**rate) if most else Decimal(0)


def _singular(x: np.ndarray, c: np.ndarray, degree: int, rho: float) -> str:
    """Whether the norm of `E[x c^T]` is at most rho."""
    a, b = (max(float(np.abs(v).max()), 1e-300) for v in (x, c))
    moment = (x / a).T @ (c / b)
    sizes = float((np.linalg.norm(x / a, axis=1) * np.linalg.norm(c / b, axis=1)).sum())
    norm = float(np.linalg.norm(moment, None if degree == 1 else 2))
    norm += _EPS * (0.5 * len(x) + 8 * min(moment.shape) + 4) * sizes  # products and sums; backward stability
    holds = Decimal(norm) / len(x) * Decimal(a) * Decimal(b) <= Decimal(rho)
    return "" if holds else "the largest singular value of E[x c^T] is larger than claimed"


# --- cones ------------------------------------------------------------------------------------------------------------


def units(x: np.ndarray, c: np.ndarray, rho: float) -> tuple[str, int]:
    """Whether `s E[c max(0, u.x)] <= rho` for all unit vectors u and both signs s; and the number of cones."""
    scale = math.ldexp(1.0, math.frexp(max(float(np.abs(x).max()), 1e-300))[1])
    size = math.ldexp(1.0, math.frexp(max(float(np.abs(c).max()), 1e-300))[1])
    x, c, d, seen = x / scale, c / size, x.shape[1], 0
    with localcontext(_DIGITS) as context:
        context.rounding = ROUND_FLOOR
        limit = float(Decimal(rho) * len(x) / Decimal(scale) / Decimal(size) * (1 - Decimal(4 * _EPS)))
    total = float((np.abs(c) * np.linalg.norm(x, axis=1)).sum())
    x, c, straight = _merged(x, c)
    # Of each term merging takes 12 eps, the slack in its sign 16, products 12; the sums 2 n.
    error = (2 * len(c) + 44) * _EPS * total + len(c) * 1e-290
    for sign in (1.0, -1.0):
        corners = np.array(np.meshgrid(*[[1.0, -1.0]] * d)).reshape(d, -1).T
        waiting = [corners[:, :, None] * np.eye(d)]
        while waiting:
            cones = waiting.pop()
            if len(cones) > _BATCH:
                waiting.append(cones[_BATCH:])
                cones = cones[:_BATCH]
            seen += len(cones)
            if d > 1 and _worth(cones, x, sign * c, sign * straight) > limit + 4 * error:
                return f"there is a better ReLU unit than claimed, seen after {seen:,} cones", seen
            left = cones[~(_above(cones, x, sign * c, sign * straight, error) <= limit)]
            if len(left) and (seen > _MOST_CONES or d == 1):
                return f"the best ReLU unit could not be bounded again with {seen:,} cones", seen
            if len(left):
                waiting.append(_halves(left))
    return "", seen


def _merged(x: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Terms whose x lie on one line are one term: `sum c max(0, u.x)` as unit vectors, their factors, and `straight.u`.

    With x = s e it is `c s max(0, u.e)`; with x = -s e it is that less `c s u.e`.
    """
    sizes = np.linalg.norm(x, axis=1)
    real = sizes > 0
    if not real.any():
        return x[:1], np.zeros(1), np.zeros(x.shape[1])
    x, c, sizes = x[real], c[real], sizes[real]
    e = x / sizes[:, None]
    first = np.argmax(np.abs(e) > 1e-9, axis=1)
    side = np.sign(e[np.arange(len(e)), first])
    e *= side[:, None]
    _, start, which = np.unique(np.round(e, 12), axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    apart = np.linalg.norm(e - e[start[which]], axis=1) > 8 * _EPS
    which = np.where(apart, len(start) + np.arange(len(e)), which)
    merged = np.zeros(len(start) + len(e))
    np.add.at(merged, which, c * sizes)
    units = np.concatenate([e[start], e])
    used = np.unique(which)
    straight = -((c * sizes * (side < 0))[:, None] * e).sum(axis=0)
    return units[used], merged[used], straight


def _above(cones: np.ndarray, x: np.ndarray, c: np.ndarray, straight: np.ndarray, error: float) -> np.ndarray:
    """An upper bound on `(straight.u + sum c max(0, u.x)) / ||u||` over each cone `[k, d, d]`; infinite if wide."""
    dots = cones @ x.T  # [k, d, n]
    slack = 8 * _EPS  # of one product, in units of sum a
    low, high = dots.min(axis=1) >= -slack, dots.max(axis=1) <= slack
    open_ = ~low & ~high
    z = straight + (low * c) @ x
    held = np.einsum("kdn,kn->kd", np.maximum(dots, 0.0), open_ * np.maximum(c, 0.0))
    z = z + _chosen(open_ & (c < 0), x, c, z)
    sizes = np.linalg.norm(cones, axis=2)
    held = held / sizes
    middle = cones.mean(axis=1)
    middle /= np.linalg.norm(middle, axis=1, keepdims=True)
    least = (np.einsum("kde,ke->kd", cones, middle) / sizes).min(axis=1) * (1 - 16 * _EPS)
    with np.errstate(all="ignore"):
        room = (held.max(axis=1) + error) / least
        first = np.linalg.norm(z, axis=1) * (1 + 16 * _EPS) + room
        second = (np.einsum("kde,ke->kd", cones, z) / sizes + held).max(axis=1) + error
        second = second / np.where(second > 0, least, 1 + 16 * _EPS)
        found = np.minimum(first, second)
    return np.where(least > 0.05, found, np.inf)


def _chosen(which: np.ndarray, x: np.ndarray, c: np.ndarray, z: np.ndarray) -> np.ndarray:
    """`sum q c x` over the terms `which [k, n]`, with shares q in [0, 1] that make `z + sum` short; any q will do."""
    total = 0.5 * ((which * c) @ x)
    count = which.sum(axis=1)
    few = np.flatnonzero((count <= 64) & (count > 0))
    if not len(few):
        return total
    most = int(count[few].max())
    places = np.argsort(~which[few], axis=1, kind="stable")[:, :most]  # those that count first
    terms = (np.arange(most) < count[few, None])[..., None] * c[places][..., None] * x[places]
    squares = np.maximum((terms**2).sum(axis=2), 1e-300)
    q, at = np.full(places.shape, 0.5), z[few] + 0.5 * terms.sum(axis=1)
    for _ in range(1 if most == 1 else 20 if most <= 8 else 4):
        for j in range(most):
            term = terms[:, j]
            new = np.clip(q[:, j] - (term * at).sum(axis=1) / squares[:, j], 0.0, 1.0)
            at, q[:, j] = at + (new - q[:, j])[:, None] * term, new
    total[few] = np.einsum("km,kmd->kd", q, terms)
    return total


def _worth(cones: np.ndarray, x: np.ndarray, c: np.ndarray, straight: np.ndarray) -> float:
    """The largest value of a unit at a generator of a cone: where it is above the claim, no halving will help."""
    v = cones.reshape(-1, cones.shape[-1])
    return float(((np.maximum(v @ x.T, 0.0) @ c + v @ straight) / np.linalg.norm(v, axis=1)).max())


def _halves(cones: np.ndarray) -> np.ndarray:
    """The two halves of each cone, cut at the exact middle of its longest edge."""
    d, rows = cones.shape[1], np.arange(len(cones))
    pairs = [(i, j) for i in range(d) for j in range(i + 1, d)]
    edges = np.stack([((cones[:, i] - cones[:, j]) ** 2).sum(axis=1) for i, j in pairs], axis=1)
    i, j = np.array(pairs)[np.argmax(edges, axis=1)].T
    middle = 0.5 * (cones[rows, i] + cones[rows, j])
    one, two = cones.copy(), cones.copy()
    one[rows, i] = two[rows, j] = middle
    return np.concatenate([one, two])
