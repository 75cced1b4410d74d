"""Linen modules: `MultiBranch`, a multi-branch layer of a larger model, and the branches `Conv`, `GRU` and `VGG9`."""

from dualgap_jax.networks.convolution import VGG9, Conv
from dualgap_jax.networks.linen import MultiBranch
from dualgap_jax.networks.recurrent import GRU

__all__ = ["GRU", "VGG9", "Conv", "MultiBranch"]
