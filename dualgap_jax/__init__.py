"""Why wide, multi-branch networks are easy to train, measured (Zhang, Shao, Salakhutdinov, AISTATS 2019).

    import dualgap_jax as dg

Every name of `dg.__all__` is imported when it is first asked for, so that `import dualgap_jax` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; `_MODULES` and `_HOMES` say the same at run time
    from dualgap_jax import certify as certify
    from dualgap_jax import convexity as convexity
    from dualgap_jax import data as data
    from dualgap_jax import duality as duality
    from dualgap_jax import hitting as hitting
    from dualgap_jax import landscape as landscape
    from dualgap_jax import linen as linen
    from dualgap_jax import losses as losses
    from dualgap_jax import networks as networks
    from dualgap_jax import nnx as nnx
    from dualgap_jax import plot as plot
    from dualgap_jax import shapley_folkman as shapley_folkman
    from dualgap_jax import spectral as spectral
    from dualgap_jax import training as training
    from dualgap_jax.convexity import scores as scores
    from dualgap_jax.evaluation import evaluate as evaluate
    from dualgap_jax.networks import conv as conv
    from dualgap_jax.networks import from_functions as from_functions
    from dualgap_jax.networks import from_linen as from_linen
    from dualgap_jax.networks import from_nnx as from_nnx
    from dualgap_jax.networks import gru as gru
    from dualgap_jax.networks import mixture as mixture
    from dualgap_jax.networks import mlp as mlp
    from dualgap_jax.networks import multi_branch as multi_branch
    from dualgap_jax.networks import vgg9 as vgg9
    from dualgap_jax.training import train as train
    from dualgap_jax.types import Network as Network

    plane = landscape.plane_through
    surface = landscape.evaluate

__version__ = "0.2.0"

_MODULES = (
    "certify",
    "convexity",
    "data",
    "duality",
    "hitting",
    "landscape",
    "linen",
    "losses",
    "networks",
    "nnx",
    "plot",
    "shapley_folkman",
    "spectral",
    "training",
)
# Where the other names live, and what they are called there.
_HOMES = {
    "Network": "types.Network",
    "conv": "networks.conv",
    "evaluate": "evaluation.evaluate",
    "from_functions": "networks.from_functions",
    "from_linen": "networks.from_linen",
    "from_nnx": "networks.from_nnx",
    "gru": "networks.gru",
    "mixture": "networks.mixture",
    "mlp": "networks.mlp",
    "multi_branch": "networks.multi_branch",
    "plane": "landscape.plane_through",
    "scores": "convexity.scores",
    "surface": "landscape.evaluate",
    "train": "training.train",
    "vgg9": "networks.vgg9",
}

__all__ = sorted(["__version__", *_MODULES, *_HOMES])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. It has: {', '.join(__all__)}.")
    module, _, attribute = _HOMES[name].partition(".")
    globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return value


def __dir__() -> list[str]:
    return list(__all__)
