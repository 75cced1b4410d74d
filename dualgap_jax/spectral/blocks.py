"""Blocks of columns, and sums over them: on one device or on several, one block in memory at a time.

Data of one block stay where their first pass put them: a block is held in any case, and to copy it costs as much as a
pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from dualgap_jax.spectral.checks import check_data
from dualgap_jax.spectral.kernels import Block, Rows, kernels_for, scaled
from dualgap_jax.spectral.problem import SpectralError
from dualgap_jax.spectral.scaling import Powers, depth_multiple, row_powers

_PLAIN = 32  # powers of two that any sum of squares in float32 has room for


@dataclasses.dataclass(frozen=True)
class Columns:
    """Blocks of columns of X and Y, in the same order each time they are iterated over.

    Attributes:
      blocks: gives a fresh iterator of pairs `x [d_0, b]`, `y [d_H, b]`; NumPy or JAX arrays.
    """

    blocks: Callable[[], Iterable[Block]]

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks())


def in_blocks(x: Float[Any, "d_0 n"], y: Float[Any, "d_H n"], size: int | None = None) -> Columns:
    """Two matrices as blocks of `size` columns (None: one block).

    Raises:
      SpectralError: for data that are not two matrices with as many columns, or a size below 1.
    """
    check_data(x, y, values=False)
    n = x.shape[1]
    step = n if size is None else size
    if step < 1:
        raise SpectralError(f"size={size} must be at least 1.")
    return Columns(lambda: ((x[:, i : i + step], y[:, i : i + step]) for i in range(0, n, step)))


class Data:
    """The blocks with their kernels, their unit, and a count of the passes made."""

    def __init__(
        self, columns: Iterable[Block], mesh: Mesh | None, depth: int, report: Callable[[str, int], None] | None
    ) -> None:
        self._columns, self.kernels, self._report = columns, kernels_for(mesh), report
        self.passes = 0
        self.n = 0
        self._number = 0
        self._only: Rows | None = None
        self.shape = (0, 0)
        self.dtype: Any = None
        self.powers, self.nonzero = self._measure(depth)

    @property
    def blocks(self) -> Iterator[Float[np.ndarray, "d_0 _"]]:
        """X block by block, in the problem's own unit, float64."""
        for x, _ in self._columns:
            yield scaled(np.asarray(x, np.float64).T, -self.powers.rows).T

    def _measure(self, depth: int) -> tuple[Powers, np.ndarray]:
        """The unit, and which rows of X are not zero.

        A power that all rows have in common, and one of Y, are left alone as long as every sum has room for them.
        """
        self.passes += 1
        self._tell("size of the data", 0)
        sizes: list[np.ndarray] = []
        for index, block in enumerate(self._columns):
            self._check(block, index)
            self.n += block[0].shape[1]
            x, y = (np.asarray(a) for a in block)
            sizes.append(np.append(_norms(x, index, "x"), _norms(y, index, "y").max(initial=-np.inf)))
            self._tell("size of the data", self.n)
        self._number = len(sizes)
        if not sizes:
            raise SpectralError("the columns gave no block; give an iterable that starts afresh each time, a Columns.")
        # log2 of norms: that of all blocks from those of each
        logs = np.stack(sizes)
        top = np.where(np.isfinite(logs.max(axis=0)), logs.max(axis=0), 0)
        norms = top + 0.5 * np.log2(np.maximum(np.sum(4.0 ** (logs - top), axis=0), np.finfo(float).tiny))
        nonzero = np.isfinite(logs.max(axis=0))
        powers = np.where(nonzero, np.floor(norms).astype(int) + 1, 0).astype(np.int32)
        rows, targets = powers[:-1], powers[-1]
        common = rows[nonzero[:-1]].max(initial=-(2**15))
        rows = np.where(nonzero[:-1], rows - (common if abs(common) <= _PLAIN else 0), 0).astype(np.int32)
        targets = depth_multiple(targets, depth) if abs(targets) > _PLAIN else np.int32(0)
        return Powers(rows, targets), nonzero[:-1]

    def total(self, function: Callable[[Rows], Any], what: str, combine: Callable[[Any, Any], Any] = jnp.add) -> Any:
        """The sum (or other combination) of `function` over the blocks: one pass."""
        self.passes += 1
        done: Any = None
        n = 0
        self._tell(what, n)
        for rows, number in self._placed():
            n += number
            # One block is computed on while the next is read; without this JAX would queue more of them.
            jax.block_until_ready(done)
            part = function(rows)
            done = part if done is None else jax.tree.map(combine, done, part)
            if self._report is not None:
                jax.block_until_ready(done)
            self._tell(what, n)
        if done is None:
            raise SpectralError(
                f"the columns gave no block in pass {self.passes}; give an iterable that starts afresh each time, a"
                " Columns."
            )
        if n != self.n:
            raise SpectralError(
                f"the columns gave {n} examples in pass {self.passes} and {self.n} before; they must be the same each"
                " time: give a Columns, not an iterator that is used up."
            )
        if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(done)):
            raise SpectralError(
                f"the columns gave values in pass {self.passes} that are not finite, or far larger than before; they"
                " must be the same each time."
            )
        return done

    def _placed(self) -> Iterator[tuple[Rows, int]]:
        """The blocks on the device or devices, each with its number of examples."""
        if self._only is not None:
            yield self._only, self.n
            return
        for index, block in enumerate(self._columns):
            self._check(block, index)
            rows = self.kernels.place(block, self.powers, self.dtype)
            if self._number == 1:
                self._only = rows
            yield rows, block[0].shape[1]

    def _tell(self, what: str, n: int) -> None:
        if self._report is not None:
            self._report(f"{what}, pass {self.passes}", n)

    def _check(self, block: Block, index: int) -> None:
        if not isinstance(block, (tuple, list)) or len(block) != 2:
            raise SpectralError(f"block {index} is a {type(block).__name__}; give pairs x [d_0, b], y [d_H, b].")
        check_data(*block, values=False)
        shape, dtype = (block[0].shape[0], block[1].shape[0]), np.result_type(*(a.dtype for a in block))
        if self.dtype is None:
            self.shape, self.dtype = shape, dtype
        if shape != self.shape or dtype != self.dtype:
            raise SpectralError(
                f"block {index} has (d_0, d_H)={shape} of {dtype}, the blocks before {self.shape} of {self.dtype};"
                " all must agree."
            )


def _norms(values: np.ndarray, index: int, name: str) -> np.ndarray:
    """log2 of the norms of the rows, -inf for rows of zeros, whatever the size of the numbers."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        squares = np.einsum("ij,ij->i", values, values).astype(np.float64)
        room = np.finfo(values.dtype).max ** 0.25
        if ((squares > 1 / room) & (squares < room)).all():
            return 0.5 * np.log2(squares)
        if not np.isfinite(values).all():
            raise SpectralError(f"block {index}: {name} holds values that are not finite; remove those examples first.")
        wide = values.astype(np.float64)
        powers = row_powers(wide)
        return powers + 0.5 * np.log2(np.sum(scaled(wide.T, -powers) ** 2, axis=0))
