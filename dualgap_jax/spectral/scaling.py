"""Problem (4) in a unit of its own: powers of two that keep every number in range and cost no digit.

Problem (4) is homogeneous, and only the row space of X matters.  With `D` an invertible diagonal matrix and `s > 0`,

    (X, Y, gamma)  and  (D X, s Y, s gamma)

have the same solutions up to `W_1 -> s^{1/H} W_1 D^{-1}`, `W_i -> s^{1/H} W_i`; the optimum grows by `s^2`, Lambda and
the singular values of Yt by `s`, and `Lambda = M X` has `M -> s M D^{-1}`.  The solvers take for D and s powers of two
that bring the rows of X to norms in [1/2, 1) and Y to a norm near 1.  s is the H-th power of a power of two, so that
`s^{1/H}` is exact as well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from dualgap_jax.spectral.problem import is_concrete


class Powers(NamedTuple):
    """`D = diag(2^-rows)` and `s = 2^-targets`; `targets` is a multiple of H."""

    rows: Int[Any, " d_0"]
    targets: Int[Any, ""]


def shift(values: Any, power: Any) -> Any:
    """`values * 2^power`, where `power` broadcasts: exact within range, NumPy for NumPy, differentiable in `values`."""
    if is_concrete(values, power) and isinstance(values, (np.ndarray, np.generic, float)):
        with np.errstate(over="ignore", under="ignore"):
            return np.ldexp(values, power)
    # in four factors, each of which can be written down whatever the power is
    steps = [power // 4 + (power % 4 > part) for part in range(4)]
    for step in steps:
        values = values * jnp.ldexp(jnp.ones(jnp.shape(step), jnp.float64), step)
    return values


def _exponent(xp: Any, size: Any) -> Any:
    """The power of two above each size, 0 for 0 and what is not finite."""
    return xp.where(xp.isfinite(size) & (size > 0), xp.frexp(size)[1], 0)


def row_powers(x: Float[Any, "d_0 n"]) -> Int[Any, " d_0"]:
    """The powers of two above the norms of the rows; the norms themselves need not be in range."""
    xp = np if isinstance(x, np.ndarray) else jnp
    largest = _exponent(xp, xp.max(xp.abs(x), axis=1))
    norms = xp.sqrt(xp.sum(shift(x, -largest[:, None]) ** 2, axis=1))
    return (largest + _exponent(xp, norms)).astype(np.int32)


def powers_of(x: Float[Any, "d_0 n"], y: Float[Any, "d_H n"], depth: int) -> Powers:
    """The powers for data in float64."""
    whole = row_powers(y.reshape(1, -1))[0]
    return Powers(row_powers(x), depth_multiple(whole, depth))


def depth_multiple(power: Any, depth: int) -> Any:
    """The multiple of the depth nearest to a power."""
    return (power + depth // 2) // depth * depth
