"""Problem (4) and its dual (5) in NumPy, from their definitions, and random data for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np


def primal_value(weights: Sequence[Any], x: Any, y: Any, gamma: float) -> float:
    """Problem (4), in float64."""
    layers = [np.asarray(w, np.float64) for w in weights]
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    depth = len(layers)
    output = functools.reduce(lambda done, w: w @ done, layers, x)
    penalty = sum(np.sum(np.linalg.svd(m, compute_uv=False) ** depth) for m in [layers[0] @ x, *layers[1:]])
    return float(0.5 * np.sum((y - output) ** 2) + gamma / depth * penalty)


def in_row_space(y: Any, x: Any, rcond: float) -> np.ndarray:
    """Y X^+ X, by least squares."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return (x.T @ np.linalg.lstsq(x.T, y.T, rcond=rcond)[0]).T


def dual_value(dual: Any, x: Any, y: Any, gamma: float, r: int, *, rcond: float, slack: float) -> float:
    """Problem (5) at a Lambda, whose feasibility is asserted up to `slack`, relative to the size of Y."""
    dual, y = np.asarray(dual, np.float64), np.asarray(y, np.float64)
    unit = np.linalg.norm(y) + np.finfo(float).tiny
    assert np.linalg.norm(dual, 2) <= gamma + slack * unit
    assert np.linalg.norm(dual - in_row_space(dual, x, rcond)) <= slack * unit
    sigma = np.linalg.svd(in_row_space(y, x, rcond) - dual, compute_uv=False)
    return float(0.5 * np.sum(y**2) - 0.5 * np.sum(sigma[:r] ** 2))


def conditioned(
    rng: np.random.Generator, d_0: int, d_H: int, n: int, condition: float, dtype: Any, noise: float = 0.3
) -> tuple[np.ndarray, np.ndarray]:
    """X with singular values from 10 down to 10 / condition, and Y with a share in each of their directions."""
    left = np.linalg.qr(rng.normal(size=(d_0, d_0)))[0]
    right = np.linalg.qr(rng.normal(size=(n, d_0)))[0]
    x = (left * np.geomspace(10, 10 / condition, d_0)) @ right.T
    y = rng.normal(size=(d_H, d_0)) @ right.T + noise * rng.normal(size=(d_H, n))
    return x.astype(dtype), y.astype(dtype)


def exact_optimum(x: np.ndarray, y: np.ndarray, gamma: float, r: int) -> float:
    """The optimum of (4) for X of full row rank, in extended precision but for the last, small decomposition.

    By Gram-Schmidt, each vector twice, and strong duality: half the squared norm of Y less that of what is left of Yt
    after its r largest singular values were lowered by gamma.
    """
    basis: list[np.ndarray] = []
    for row in np.asarray(x, np.longdouble):
        for _ in range(2):
            for known in basis:
                row = row - (known @ row) * known
            row = row / np.sqrt(row @ row)
        basis.append(row)
    y = np.asarray(y, np.longdouble)
    sigma = np.linalg.svd((y @ np.stack(basis).T).astype(np.float64), compute_uv=False)
    return float(0.5 * np.sum(y**2) - 0.5 * np.sum(np.maximum(sigma[:r].astype(np.longdouble) - gamma, 0) ** 2))


def rational_optimum(x: np.ndarray, y: np.ndarray, gamma: float, r: int) -> Decimal:
    """The optimum of (4) for at most two outputs, the numbers taken as the fractions that they are.

    `Yt Yt^T = (Y X^T) (X X^T)^+ (Y X^T)^T` by elimination without rounding, whatever the rank of X; its eigenvalues
    by the quadratic formula in 400 digits.
    """
    xs, ys = ([[Fraction(float(v)) for v in row] for row in a] for a in (x, y))

    def dot(a: list[Fraction], b: list[Fraction]) -> Fraction:
        return sum((u * v for u, v in zip(a, b, strict=True)), Fraction(0))

    basis: list[list[Fraction]] = []
    for row in xs:
        for known in basis:
            share = dot(row, known) / dot(known, known)
            row = [a - share * b for a, b in zip(row, known, strict=True)]
        if any(row):
            basis.append(row)
    gram = [[sum((dot(a, k) * dot(b, k) / dot(k, k) for k in basis), Fraction(0)) for b in ys] for a in ys]
    with localcontext() as context:
        context.prec = 400

        def exact(value: Fraction) -> Decimal:
            return Decimal(value.numerator) / Decimal(value.denominator)

        trace = exact(sum((gram[i][i] for i in range(len(ys))), Fraction(0)))
        if len(ys) == 1:
            squares = [trace]
        else:
            root = exact((gram[0][0] - gram[1][1]) ** 2 + 4 * gram[0][1] ** 2).sqrt()
            squares = [(trace + root) / 2, max((trace - root) / 2, Decimal(0))]
        lowered = [max(s.sqrt() - Decimal(gamma), Decimal(0)) for s in squares[:r]]
        return exact(sum((dot(row, row) for row in ys), Fraction(0))) / 2 - sum(v * v for v in lowered) / 2


def spoiled(x: np.ndarray, kind: int, a: int, b: int, c: int, rng: np.random.Generator) -> np.ndarray:
    """X with row a zero, repeated, dependent on rows b and c, nearly so, or rounded to float32, by kinds 0 to 5."""
    if kind == 0:
        x[a] = 0
    elif kind == 1:
        x[a] = -2 * x[b]
    elif kind == 2:
        x = np.round(4 * x)
        x[a] = x[b] + 3 * x[c]
    elif kind == 3:
        x[a] = x[b] + 10.0 ** rng.uniform(-16, -2) * x[a]
    elif kind == 4:
        x[a] = (x[b] + x[c]).astype(np.float32)
    else:
        x[a] = x[b] * 0.3 + x[c] * 0.7
    return x
