"""The data of a claim about problem (4), in powers of two that lose nothing, and facts about them in exact arithmetic.

Part of the independent proof, see `verify`: nothing here is used by a solver, nor anything of a solver here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

_SLICE = 2048  # columns at a time


class VerificationError(ValueError):
    """A claim that cannot be checked: shapes do not fit, numbers are not finite, a dependency is none."""


class Evidence:
    """The data in slices of float64, rows of X and all of Y divided by powers of two."""

    def __init__(self, blocks: Iterable[tuple[Any, Any]], depth: int) -> None:
        self._blocks = blocks
        self.n, count = 0, 0
        rows, whole = np.zeros(0, int), -(2**15)
        for x, y in self._raw():
            if not (np.isfinite(x).all() and np.isfinite(y).all()):
                raise VerificationError("the data hold values that are not finite.")
            found = np.where(x.any(axis=1), np.frexp(np.abs(x).max(axis=1))[1], -(2**15))
            rows = found if count == 0 else np.maximum(rows, found)
            whole = max(whole, int(np.frexp(np.abs(y).max())[1]) if y.any() else -(2**15))
            self.shape = (len(x), len(y))
            self.n += x.shape[1]
            count += 1
        if count == 0:
            raise VerificationError("there are no blocks; give pairs that can be iterated over several times.")
        self.present = rows > -(2**15)
        self.rows = np.where(self.present, rows, 0)
        self.depth = depth
        self.power = 0 if whole == -(2**15) else round(whole / depth) * depth
        self.terms = min(_SLICE, self.n) + count + 4  # of a sum over all examples, slice by slice

    def _raw(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for x, y in self._blocks:
            for start in range(0, np.shape(x)[1], _SLICE):
                yield tuple(np.asarray(a[:, start : start + _SLICE], np.float64) for a in (x, y))  # type: ignore[misc]

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        n = 0
        for x, y in self._raw():
            n += x.shape[1]
            yield np.ldexp(x, -self.rows[:, None]), np.ldexp(y, -self.power)
        if n != self.n:
            raise VerificationError(f"the blocks gave {n} examples and {self.n} before; give what starts afresh.")

    def scaled(
        self, weights: Sequence[Any], coefficients: Any, gamma: float, widths: Sequence[int]
    ) -> tuple[list[np.ndarray], np.ndarray, float]:
        """Weights, M and gamma in the same unit."""
        d_0, d_H = self.shape
        sizes = [d_0, *(int(w) for w in widths), d_H]
        layers = [np.asarray(w, np.float64) for w in weights]
        dual = np.asarray(coefficients, np.float64)
        wanted = [(b, a) for a, b in itertools.pairwise(sizes)]
        if [w.shape for w in layers] != wanted or dual.shape != (d_H, d_0) or len(layers) < 2:
            raise VerificationError(
                f"weights of shapes {[w.shape for w in layers]} and coefficients of shape {dual.shape} do not fit the"
                f" widths: {wanted} and {(d_H, d_0)} are wanted."
            )
        step = self.power // self.depth
        layers = [np.ldexp(layers[0], self.rows[None, :] - step), *(np.ldexp(w, -step) for w in layers[1:])]
        dual, ceiling = np.ldexp(dual, self.rows[None, :] - self.power), math.ldexp(float(gamma), -self.power)
        if not (all(np.isfinite(w).all() for w in (*layers, dual)) and 0 <= ceiling < math.inf):
            raise VerificationError("weights, coefficients or gamma are not finite, or gamma is negative.")
        return layers, dual, ceiling

    def proven(self, dependencies: tuple[Any, Any, Any] | None) -> int:
        """The number of independent combinations of rows that are zero, checked in exact arithmetic."""
        if dependencies is None or not len(dependencies[1]):
            return 0
        rows, coefficients, powers = (list(part) for part in dependencies)
        if not self.present[rows].all():
            raise VerificationError("a dependency names a row that is zero.")
        columns = np.zeros((len(rows), 0))
        for x, _ in self:
            columns = np.unique(np.concatenate([columns, x[rows]], axis=1), axis=1)
        shift = [Fraction(2) ** (int(self.rows[row]) - int(power)) for row, power in zip(rows, powers, strict=True)]
        factors = [[Fraction(int(c)) * s for c, s in zip(line, shift, strict=True)] for line in coefficients]
        for column in columns.T:
            values = [Fraction(float(v)) for v in column]
            if any(sum((f * v for f, v in zip(line, values, strict=True)), Fraction(0)) for line in factors):
                raise VerificationError("a dependency among rows of X is none.")
        rank = 0
        lines = [list(line) for line in factors]
        for index in range(len(rows)):
            at = next((i for i in range(rank, len(lines)) if lines[i][index]), None)
            if at is None:
                continue
            lines[rank], lines[at] = lines[at], lines[rank]
            for i in range(rank + 1, len(lines)):
                share = lines[i][index] / lines[rank][index]
                lines[i] = [a - share * b for a, b in zip(lines[i], lines[rank], strict=True)]
            rank += 1
        return rank
