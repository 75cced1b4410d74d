"""Multi-branch layers as NNX modules: parts of a larger model."""

from __future__ import annotations

from typing import Any, SupportsIndex

import jax
from flax import nnx
from jax import Array

from dualgap_jax.networks.flax import as_network
from dualgap_jax.networks.multibranch import as_layer, multi_branch
from dualgap_jax.types import Network


def _is_variable(value: object) -> bool:
    return isinstance(value, nnx.Variable)


def _values(tree: Any) -> Any:
    """The arrays of a tree of variables."""
    return jax.tree.map(lambda variable: variable[...], tree, is_leaf=_is_variable)


class Pure(nnx.Module):
    """A network (a pair of pure functions) as an NNX module: `module(x, train=None) -> y`.

    The `nnx.Param` variables hold the parameters, the `nnx.BatchStat` variables the state; dropout takes keys from a
    fork of the stream `rngs.dropout`.  `model.train()`, `model.eval()` and `nnx.view` set the usual attributes,
    `deterministic` and `use_running_average`, of which a network needs both alike.

    Args:
      network: the network.
      x: an example batch `[batch, ...]`, or its `jax.ShapeDtypeStruct`.
      rngs: the parameters are drawn with `rngs.params()`.
    """

    def __init__(self, network: Network, x: Any, *, rngs: nnx.Rngs) -> None:
        if isinstance(x, jax.ShapeDtypeStruct):
            x = jax.numpy.zeros(x.shape, x.dtype)
        params, state = network.init(rngs.params(), x)
        self.network = nnx.static(network)
        self.params = nnx.data(jax.tree.map(nnx.Param, params))
        self.state = nnx.data(jax.tree.map(nnx.BatchStat, state))
        feeds = "dropout" in rngs or "default" in rngs
        self.stream = nnx.data(rngs.dropout.fork() if feeds else None)
        self.deterministic = False
        self.use_running_average = False

    def set_view(self, deterministic: bool | None = None, use_running_average: bool | None = None) -> None:
        """What `nnx.view` calls of a module, with the attributes that it sets.

        Args:
          deterministic: True evaluates the network, False trains it; None leaves the attribute.
          use_running_average: likewise; a network has one mode, so that both are given alike.
        """
        if deterministic is not None:
            self.deterministic = deterministic
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(self, x: Array, *, train: bool | None = None) -> Array:
        """Applies the network to `x [batch, ...]`.

        Args:
          x: the inputs.
          train: whether batch statistics are taken and updated, and units dropped; None: as the module's mode says.

        Raises:
          ValueError: if `train` is None and the attributes `deterministic` and `use_running_average` differ, since
            a network has one mode.
        """
        if train is None:
            if self.deterministic != self.use_running_average:
                raise ValueError(
                    f"deterministic={self.deterministic} and use_running_average={self.use_running_average}: a network"
                    " is either trained or evaluated; set both alike, as train() and eval() do, or pass train=."
                )
            train = not self.deterministic
        key = self.stream() if train and self.stream is not None else None
        y, new = self.network.apply(_values(self.params), _values(self.state), x, key=key, train=train)
        if train:
            variables = jax.tree.leaves(self.state, is_leaf=_is_variable)
            for kept, value in zip(variables, jax.tree.leaves(new), strict=True):
                kept.set_value(value)
        return y


class MultiBranch(Pure):
    """The mean or sum of I copies of a branch (Section 2) as a layer of a larger NNX model.

    `module(x [batch, ...], train=None) -> y`, of the shape that one branch gives: `[batch, out]`, or `[batch, height,
    width, channels]`, and of its number format; the sum is taken in float32 at least.  The parameters are those of the
    branch with a leading axis of branches, `[I, ...]`, as `nnx.Param` variables; the state of branches that have one
    (batch statistics) likewise as `nnx.BatchStat` variables.  Branch i is drawn with `fold_in(rngs.params(), i)`, and
    drops units by `fold_in(key, i)` of a fork of the stream `rngs.dropout`, so branches drop independently.
    `model.train()` and `model.eval()` set its mode.

    Args:
      branch: a constructor of NNX modules, `rngs -> module`, such as `lambda rngs: nnx.Linear(4, 3, rngs=rngs)`; a
        Linen module; or a network.  A module with a training switch of an unusual name is given as
        `from_nnx(constructor, switch=...)`.
      num_branches: I >= 1.
      x: an example batch `[batch, ...]`, or its `jax.ShapeDtypeStruct`, from which Linen modules and networks take
        their sizes; constructors of NNX modules need none.
      reduce: 'mean' or 'sum'.
      rngs: the random streams, `nnx.Rngs(seed)`.

    Raises:
      TypeError: for a branch that is none of these, an NNX instance among them, or a branch that needs x without it.
      ValueError: if num_branches is not a positive integer, or `reduce` is unknown.
    """

    def __init__(
        self, branch: Any, num_branches: SupportsIndex, x: Any = None, *, reduce: str = "mean", rngs: nnx.Rngs
    ) -> None:
        constructed = not isinstance(branch, Network) and not hasattr(branch, "apply")
        network = multi_branch(as_network(branch, "nnx.MultiBranch"), num_branches, reduce=reduce)
        if x is None:
            if not constructed:
                raise TypeError(
                    "nnx.MultiBranch: this branch takes its sizes from an example batch: give x, such as"
                    " jnp.zeros((1, features)), after the number of branches."
                )
            x = jax.numpy.zeros((1,))
        super().__init__(as_layer(network), x, rngs=rngs)
