"""NNX modules: `MultiBranch` makes a multi-branch layer of a larger model."""

from dualgap_jax.networks.nnx import MultiBranch

__all__ = ["MultiBranch"]
