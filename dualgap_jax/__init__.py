"""Why wide, multi-branch networks are easy to train, measured (Zhang, Shao, Salakhutdinov, AISTATS 2019)."""

from dualgap_jax import losses, networks
from dualgap_jax.losses import LOSSES
from dualgap_jax.networks import BRANCHES, mixture, multi_branch
from dualgap_jax.registry import Table
from dualgap_jax.types import Network, Stem

__all__ = ["BRANCHES", "LOSSES", "Network", "Stem", "Table", "losses", "mixture", "multi_branch", "networks"]
