"""The largest sum that one ReLU or leaky unit makes of data in up to three dimensions, enumerated again.

Unlike the solver, which walks along circles and adds up what changes, every arc's sum is formed anew from the signs at
its middle.  A maximum is inside a cell, at the top singular vector of its map, or on a circle `u.x_j = 0`; a cell whose
singular vector lies outside has its maximum on its border.  Arcs shorter than 1e-13 are left out: the sum there differs
from that at their neighbours' ends by less than 1e-12 of the sizes, which is charged.
"""

from __future__ import annotations

import math

import numpy as np

MAX_POINTS = 3000
_THIN = 1e-13
_CHARGE = 2e-12  # share of the sizes: arcs left out, angles, sums
_INSIDE = 1e-9  # by which a singular vector may lie outside its cell and still counts as inside


def largest_sum(x: np.ndarray, alpha: np.ndarray, slope: float, claim: float) -> str:
    """Why `||(1/n) sum_j alpha_j psi(u.x_j)|| <= claim` was not proven for all unit vectors u, or "".

    Args:
      x: `[n, d]`, d at most 3, entries of size 1.
      alpha: `[n, out]`.
      slope: of psi for negative arguments.
      claim: the bound.
    """
    n, d = x.shape
    if n * (1 if slope == 0 else 2) > MAX_POINTS:
        return f"{n} points are too many to go through their cells again; it is done for up to {MAX_POINTS}"
    if slope != 0:  # psi(t) = max(t, 0) - slope max(-t, 0)
        x, alpha = np.vstack([x, -x]), np.vstack([alpha, -slope * alpha])
    size = float(np.sum(np.linalg.norm(x, axis=1) * np.linalg.norm(alpha, axis=1))) / n * (1 + 1e-12)
    limit = claim - _CHARGE * size
    if not limit >= 0:
        return "" if size <= claim else "the claim is smaller than the rounding of the sums"
    real = np.linalg.norm(x, axis=1) > 0
    x, alpha = x[real], alpha[real] / n
    if d == 1:
        sums = [np.maximum(s * x[:, 0], 0.0) @ alpha for s in (1.0, -1.0)]
        found = max(float(np.linalg.norm(s)) for s in sums)
        return "" if found <= limit else f"a direction reaches {found:.12g}"
    terms = np.einsum("jo,jd->jod", alpha, x).reshape(len(x), -1)
    if d == 2:
        return _circle(x, np.eye(2), x, terms, limit, None)
    for i in range(len(x)):
        normal = x[i] / math.sqrt(float(x[i] @ x[i]))
        # Two vectors that span the plane u.x_i = 0.
        other = np.eye(3)[int(np.argmin(np.abs(normal)))]
        first = np.cross(normal, other)
        first /= np.linalg.norm(first)
        basis = np.stack([first, np.cross(normal, first)])
        reason = _circle(x, basis, x @ basis.T, terms, limit, normal)
        if reason:
            return reason
    return ""


def _circle(
    x: np.ndarray, basis: np.ndarray, flat: np.ndarray, terms: np.ndarray, limit: float, normal: np.ndarray | None
) -> str:
    """The arcs of the circle spanned by `basis [2, d]`, and the cells on both sides of it where it has a normal."""
    d = x.shape[1]
    scale = np.linalg.norm(x, axis=1)
    crossing = np.linalg.norm(flat, axis=1) > 1e-13 * scale
    turn = np.arctan2(flat[crossing, 1], flat[crossing, 0])
    cuts = np.sort(np.mod(np.concatenate([turn + 0.5 * np.pi, turn - 0.5 * np.pi]), 2 * np.pi))
    if not len(cuts):
        cuts = np.zeros(1)
    ends = np.append(cuts[1:], cuts[0] + 2 * np.pi)
    wide = ends - cuts > _THIN
    start, end = cuts[wide], ends[wide]
    middle = 0.5 * (start + end)
    height = np.stack([np.cos(middle), np.sin(middle)], axis=1) @ flat[crossing].T
    signs = (height > 0).astype(np.float64)  # of the points whose sign changes along the circle
    maps = (signs @ terms[crossing]).reshape(len(middle), -1, d)
    plane = maps @ basis.T
    gram = np.swapaxes(plane, 1, 2) @ plane
    a, b, c = gram[:, 0, 0], gram[:, 1, 1], gram[:, 0, 1]
    radius = np.hypot(0.5 * (a - b), c)
    peak = 0.5 * np.arctan2(2 * c, a - b)
    away = np.abs(np.mod(peak[:, None] - middle[:, None] + 0.5 * np.pi, np.pi) - 0.5 * np.pi)[:, 0]
    reached = away <= 0.5 * (end - start) + _INSIDE
    best = np.where(reached, 0.5 * (a + b) + radius, 0.0)
    for angle in (start, end):
        best = np.maximum(best, 0.5 * (a + b) + 0.5 * (a - b) * np.cos(2 * angle) + c * np.sin(2 * angle))
    top = math.sqrt(max(0.0, float(best.max(initial=0.0))))
    if top > limit:
        return f"a direction on a circle reaches {top:.12g}, more than {limit:.12g}"
    if normal is None:
        return ""
    along = x @ normal
    for side in (1.0, -1.0):
        fixed = ~crossing & (side * along > 0)
        there = maps + terms[fixed].sum(axis=0).reshape(-1, d)
        high = np.flatnonzero(np.linalg.norm(there, axis=(1, 2)) > limit)
        if not len(high):
            continue
        _, sigma, right = np.linalg.svd(there[high], full_matrices=False)
        for k in np.flatnonzero(sigma[:, 0] > limit):
            if sigma.shape[1] > 1 and sigma[k, 1] > 0.999999 * sigma[k, 0]:
                return "a cell has two equal singular values, larger than the claim"
            joined = fixed.astype(np.float64)
            joined[crossing] = signs[high[k]]
            heights = right[k, 0] @ x.T / scale * (2 * joined - 1)
            if heights.min() >= -_INSIDE or (-heights).min() >= -_INSIDE:
                return f"the top of a cell reaches {sigma[k, 0]:.12g}, more than {limit:.12g}"
    return ""
