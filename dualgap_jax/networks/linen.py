"""Multi-branch layers as Linen modules: parts of a larger model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from dualgap_jax.networks.flax import as_network
from dualgap_jax.networks.multibranch import as_layer, multi_branch
from dualgap_jax.sizes import positive
from dualgap_jax.types import KeyArray, Network


def typed(key: Any) -> KeyArray:
    """The key as a typed one; `jax.random.PRNGKey` gives keys of the old kind."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def _apply(module: nn.Module, network: Network, name: str, x: Array, train: bool, stream: str) -> Array:
    """Applies the network inside a module that keeps its parameters and state under `name`."""
    params, state = jax.eval_shape(network.init, jax.random.key(0), x)
    if jax.tree.leaves(params):
        params = module.param(name, lambda key: network.init(typed(key), x)[0])
    kept = None
    if jax.tree.leaves(state):

        def draw() -> Any:
            key = typed(module.make_rng("params"))
            return jax.jit(lambda k: network.init(k, x)[1])(key)

        kept = module.variable("batch_stats", name, draw)
        state = kept.value
    key = typed(module.make_rng(stream)) if module.has_rng(stream) else None
    y, new = network.apply(params, state, x, key=key, train=train)
    if train and kept is not None and not module.is_initializing():
        kept.value = new
    return y


class Pure(nn.Module):
    """A network (a pair of pure functions) as a Linen module: `module(x, train=False) -> y`.

    Parameters are `params['network']`, the state, where there is any, `batch_stats['network']`.

    Attributes:
      network: the network.
      rng_collection: the random stream that the network gets, where the caller feeds one.
    """

    network: Network
    rng_collection: str = "dropout"

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Applies the network to `x [batch, ...]`; with `train` batch statistics must be mutable, as in Flax's own."""
        return _apply(self, self.network, "network", x, train, self.rng_collection)


class MultiBranch(nn.Module):
    """The mean or sum of I copies of a branch (Section 2) as a layer of a larger Linen model.

    `module(x [batch, ...], train=False) -> y`, of the shape that one branch gives: `[batch, out]`, or `[batch, height,
    width, channels]`, and of its number format; the sum is taken in float32 at least.  The parameters are those of the
    branch with a leading axis of branches, `[I, ...]`, in `params['branches']`; the state of branches that have one
    (batch statistics) likewise in `batch_stats['branches']`.  Branch i is drawn with `fold_in(key, i)` of the key that
    Flax gives the parameter, and drops units by `fold_in(key, i)` of the stream `dropout`, so branches drop
    independently.  In training `batch_stats` must be mutable, as for `nn.BatchNorm`.

    A Linen module made inside another's `__call__` takes a name there: write `MultiBranch(nn.Dense(3, parent=None),
    10)` to keep the names of the layers after it.

    Attributes:
      branch: a Linen module; a constructor of NNX modules, `rngs -> module`; or a network.  A module with a training
        switch of an unusual name is given as `from_linen(module, switch=...)`.
      num_branches: I >= 1.
      reduce: 'mean' or 'sum'.
      rng_collection: the random stream of dropout.

    Raises:
      TypeError: for a branch that is none of these.
      ValueError: if num_branches is not a positive integer, or `reduce` is unknown.
    """

    branch: Any
    num_branches: Any
    reduce: str = "mean"
    rng_collection: str = "dropout"

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_branches", positive(self.num_branches, "num_branches"))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Applies the layer to `x [batch, ...]`; `train` selects batch statistics and dropout in every branch."""
        branch = as_network(self.branch, "linen.MultiBranch")
        network = as_layer(multi_branch(branch, self.num_branches, reduce=self.reduce))
        return _apply(self, network, "branches", x, train, self.rng_collection)
