"""The axes of a surface: checked, uniform or not, and their steps."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float64

# Coordinates that are uniform up to this share of their span count as exactly uniform (float32 grids are).
UNIFORM = 1e-6


def checked(xs: np.ndarray, ys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The three as float64, after checking that the axes are strictly monotone and the shapes fit."""
    xs, ys, values = real(xs), real(ys), real(values)
    for name, axis in (("xs", xs), ("ys", ys)):
        if axis.ndim != 1 or axis.size == 0 or not np.isfinite(axis).all():
            raise ValueError(
                f"{name} must be a non-empty vector of finite coordinates; got {_shown(axis)}."
                " The two axes come first, then the surface."
            )
        steps = np.diff(axis)
        if not ((steps > 0).all() or (steps < 0).all()):
            raise ValueError(
                f"{name} must be strictly monotone; got {_shown(axis)}.  Sort it and drop repeated coordinates."
            )
    if values.shape != (ys.size, xs.size):
        raise ValueError(
            f"the surface must have shape [ny, nx] = {(ys.size, xs.size)}, rows along ys; got {values.shape}."
            + (" Transpose it." if values.shape == (xs.size, ys.size) else "")
        )
    return xs, ys, values


def real(given: Any) -> Float64[np.ndarray, "..."]:
    """Numbers as float64, NaN where an entry is masked.  Raises ValueError for all else."""
    try:
        array = given if isinstance(given, np.ma.MaskedArray) else np.asarray(given)
        if array.dtype.kind not in "cSUMm":
            return np.ma.filled(array.astype(np.float64), np.nan)
        what = "complex ones" if array.dtype.kind == "c" else f"an array of {array.dtype}"
    except (TypeError, ValueError, OverflowError):
        what = f"{given!r:.60}"
    raise ValueError(f"coordinates and losses must be real numbers; got {what}.")


def errors(given: Any, loss: np.ndarray) -> Float64[np.ndarray, "..."]:
    """The errors allowed in losses.  Raises ValueError for another shape, and for NaN or numbers below 0."""
    error = real(given)
    if error.shape != loss.shape:
        raise ValueError(f"error must have the shape of the losses, {loss.shape}; got {error.shape}.")
    if not (error >= 0).all():
        raise ValueError("error must be at least 0 everywhere, and never NaN.")
    return error


def power_of_two(values: np.ndarray) -> int:
    """The exponent with which finite numbers of `times_power(values, -exponent)` are below 1 in size."""
    return int(np.frexp(np.max(np.abs(values), where=np.isfinite(values), initial=0.0))[1])


def times_power(values: Any, power: int) -> Any:
    """`2**power * values`, infinite where that is beyond float64."""
    with np.errstate(over="ignore"):
        return np.ldexp(values, power)


def _shown(values: np.ndarray) -> str:
    numbers = " ".join(f"{value:.6g}" for value in values.ravel()[:5])
    return f"shape {values.shape}, {numbers}{' ...' if values.size > 5 else ''}"


def _is_uniform(axis: np.ndarray) -> bool:
    ideal = np.linspace(axis[0], axis[-1], axis.size)
    return bool(np.max(np.abs(axis - ideal)) <= UNIFORM * abs(axis[-1] - axis[0]))


def step(name: str, axis: np.ndarray) -> float:
    """The step of a uniform axis of at least 3 points; raises ValueError otherwise."""
    if axis.size < 3:
        raise ValueError(f"{name} has {axis.size} points; midpoints and curvature need at least 3 points per axis.")
    if not _is_uniform(axis):
        steps = np.abs(np.diff(axis))
        raise ValueError(
            f"{name} must be uniformly spaced for midpoints and curvature; got steps from {steps.min()} to"
            f" {steps.max()}. Use np.linspace, or only lower_convex_envelope, which takes any monotone grid."
        )
    return float(axis[-1] - axis[0]) / (axis.size - 1)


def grid_units(axis: np.ndarray) -> Float64[np.ndarray, " n"]:
    """The axis mapped affinely onto [0, n - 1]: exact integers when it is uniform, so that areas there are exact."""
    if axis.size == 1 or _is_uniform(axis):
        return np.arange(axis.size, dtype=np.float64)
    return (axis - axis[0]) / (axis[-1] - axis[0]) * (axis.size - 1)
