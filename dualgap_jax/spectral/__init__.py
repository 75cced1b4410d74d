"""Theorem 2: the global optimum of regularised deep linear networks, with a primal-dual certificate (Section 4).

- `solve`: data in memory, three independent methods, inside `jit` and `vmap`; `regularisation_path` over gamma.
- `solve_columns`: data in blocks of columns, larger than memory, on one device or several.
- `objective`: problem (4) as written.
- `with_bias`, `patches`: affine and convolutional first maps as a matrix problem (remark (a) of Section 4).
"""

from dualgap_jax.spectral.columns import Attempt, CertificateError, Columns, ColumnsSolution, in_blocks, solve_columns
from dualgap_jax.spectral.maps import patches, with_bias
from dualgap_jax.spectral.problem import (
    DualVariable,
    SpectralError,
    SpectralSolution,
    objective,
    r_norm_squared,
    random_weights,
    schatten_power,
)
from dualgap_jax.spectral.solvers import (
    METHODS,
    clip_singular_values,
    descend,
    douglas_rachford_iterates,
    prox_r_norm,
    reduce_rows,
    regularisation_path,
    solve,
)

__all__ = [
    "METHODS",
    "Attempt",
    "CertificateError",
    "Columns",
    "ColumnsSolution",
    "DualVariable",
    "SpectralError",
    "SpectralSolution",
    "clip_singular_values",
    "descend",
    "douglas_rachford_iterates",
    "in_blocks",
    "objective",
    "patches",
    "prox_r_norm",
    "r_norm_squared",
    "random_weights",
    "reduce_rows",
    "regularisation_path",
    "schatten_power",
    "solve",
    "solve_columns",
    "with_bias",
]
