"""What problem (4) allows: every wrong argument is answered by a sentence before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualgap_jax.spectral.problem import SpectralError, is_concrete


def check_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """The widths as integers.  Raises SpectralError if there is none, or one is below 1."""
    try:
        found = tuple(int(w) for w in widths)
        whole = all(w == f and not isinstance(w, bool | np.bool) for w, f in zip(widths, found, strict=True))
    except (TypeError, ValueError):
        found, whole = (), False
    if not whole or not found or min(found) < 1:
        raise SpectralError(
            f"widths={widths!r} must be the H - 1 >= 1 hidden widths (d_1, ..., d_(H-1)), positive integers."
        )
    return found


def _is_finite(data: Any) -> bool:
    """Whether all values are finite; true where they are traced."""
    if not is_concrete(data):
        return True
    if isinstance(data, np.ndarray):
        return bool(np.isfinite(data).all())
    with jax.ensure_compile_time_eval():  # data that a jitted function closes over are concrete too
        return bool(jnp.isfinite(data).all())


def check_data(x: Any, y: Any, *, values: bool = True) -> None:
    """Raises SpectralError unless the data are two real, finite matrices with as many columns, not empty or masked.

    Args:
      x: `[d_0, n]`.
      y: `[d_H, n]`.
      values: whether to look for values that are not finite; traced data are not looked at.
    """
    for name, data in (("x", x), ("y", y)):
        if not hasattr(data, "dtype"):
            raise SpectralError(f"{name} is a {type(data).__name__}; give a NumPy or JAX array.")
        if np.ma.is_masked(data):
            raise SpectralError(f"{name} holds masked entries; fill them, or remove their examples.")
    if np.ndim(x) != 2 or np.ndim(y) != 2 or x.shape[1] != y.shape[1]:
        raise SpectralError(
            f"x of shape {np.shape(x)} and y of shape {np.shape(y)} must be [d_0, n] and [d_H, n], one example a"
            " column; transpose data that hold one example a row."
        )
    if 0 in (*x.shape, *y.shape):
        raise SpectralError(f"x of shape {x.shape} and y of shape {y.shape} are empty; every dimension must be >= 1.")
    for name, data in (("x", x), ("y", y)):
        if data.dtype not in (np.float32, np.float64):
            raise SpectralError(f"{name} holds {data.dtype}; give float32 or float64 (images: standardise them first).")
        if values and not _is_finite(data):
            raise SpectralError(f"{name} holds values that are not finite; remove those examples first.")


def check_rtol(rtol: Any) -> None:
    """Raises SpectralError for a share that is not in [0, 1)."""
    if rtol is not None and is_concrete(rtol) and not (np.ndim(rtol) == 0 and 0 <= float(rtol) < 1):
        raise SpectralError(f"rtol={rtol} must lie in [0, 1): a share of the largest singular value of X.")
