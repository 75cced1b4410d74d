"""Networks as pairs of pure functions, and how they are made.

A network is a `dualgap_jax.types.Network`; a *branch* is a network used as a part of a larger one: `multi_branch` makes
the mean or the sum of I copies of a branch (Section 2), which is a network again.  `mlp`, `gated`, `conv`, `gru` and
`vgg9` are ready; `from_linen`, `from_nnx` and `from_functions` make a network of anything else; `to_linen` and `to_nnx`
lead back.

`BRANCHES` is the table that configs name.  Its entries are called with `out=` (the number of outputs that the data set
asks for) and the settings under `config.branch`.
"""

from __future__ import annotations

from collections.abc import Callable

from dualgap_jax.networks.dense import KERNEL_INITS, gated, mlp, mlp_output_bound
from dualgap_jax.networks.flax import as_network, from_linen, from_nnx, to_linen, to_nnx
from dualgap_jax.networks.functions import from_functions
from dualgap_jax.networks.given import check_network
from dualgap_jax.networks.modules import conv, gru, vgg9
from dualgap_jax.networks.multibranch import branch_keys, draw_branches, mixture, multi_branch, sum_branches, sum_rest
from dualgap_jax.networks.precision import accumulator, upcast, with_precision
from dualgap_jax.networks.settings import ACTIVATIONS
from dualgap_jax.networks.sources import InMemory
from dualgap_jax.registry import Table
from dualgap_jax.types import Network

BRANCHES: Table[Callable[..., Network]] = Table(
    "branch", {"mlp": mlp, "gated": gated, "conv": conv, "gru": gru, "vgg9": vgg9}
)

__all__ = [
    "ACTIVATIONS",
    "BRANCHES",
    "KERNEL_INITS",
    "InMemory",
    "accumulator",
    "as_network",
    "branch_keys",
    "check_network",
    "conv",
    "draw_branches",
    "from_functions",
    "from_linen",
    "from_nnx",
    "gated",
    "gru",
    "mixture",
    "mlp",
    "mlp_output_bound",
    "multi_branch",
    "sum_branches",
    "sum_rest",
    "to_linen",
    "to_nnx",
    "upcast",
    "vgg9",
    "with_precision",
]
