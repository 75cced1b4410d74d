"""Why wide, multi-branch networks are easy to train, measured (Zhang, Shao, Salakhutdinov, AISTATS 2019)."""

from dualgap_jax import branches, losses
from dualgap_jax.branches import BRANCHES
from dualgap_jax.losses import LOSSES
from dualgap_jax.multibranch import mixture, multi_branch
from dualgap_jax.registry import Table
from dualgap_jax.types import Branch, Stem

__all__ = ["BRANCHES", "LOSSES", "Branch", "Stem", "Table", "branches", "losses", "mixture", "multi_branch"]
