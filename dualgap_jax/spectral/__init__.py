"""Theorem 2: the global optimum of regularised deep linear networks, with a primal-dual certificate (Section 4).

- `solve`: data in memory, three independent methods, inside `jit` and `vmap`; `regularisation_path` over gamma.
- `solve_columns`: data in blocks of columns, larger than memory, on one device or several.
- `verify`: an independent proof of a lower and an upper bound, for any weights and any dual variable.
- `objective`: problem (4) as written.
- `with_bias`, `patches`: affine and convolutional first maps as a matrix problem (remark (a) of Section 4).
"""

from dualgap_jax.spectral.blocks import Columns, in_blocks
from dualgap_jax.spectral.columns import Attempt, CertificateError, ColumnsSolution, solve_columns
from dualgap_jax.spectral.in_memory import regularisation_path, solve
from dualgap_jax.spectral.maps import patches, with_bias
from dualgap_jax.spectral.problem import SpectralError, objective, r_norm_squared, random_weights, schatten_power
from dualgap_jax.spectral.solution import DualVariable, SpectralSolution
from dualgap_jax.spectral.solvers import METHODS, full_batch_descent
from dualgap_jax.spectral.splitting import clip_singular_values, douglas_rachford_iterates, prox_r_norm
from dualgap_jax.spectral.verify import Verification, VerificationError, verify

__all__ = [
    "METHODS",
    "Attempt",
    "CertificateError",
    "Columns",
    "ColumnsSolution",
    "DualVariable",
    "SpectralError",
    "SpectralSolution",
    "Verification",
    "VerificationError",
    "clip_singular_values",
    "douglas_rachford_iterates",
    "full_batch_descent",
    "in_blocks",
    "objective",
    "patches",
    "prox_r_norm",
    "r_norm_squared",
    "random_weights",
    "regularisation_path",
    "schatten_power",
    "solve",
    "solve_columns",
    "verify",
    "with_bias",
]
