"""Networks from Flax modules, Linen and NNX."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dualgap_jax.networks.precision import as_stored
from dualgap_jax.types import KeyArray, Network, Params, State


def _train_argument(call: Callable[..., Any]) -> Callable[[bool], dict[str, Any]]:
    """How `train` is passed to a module: as `train`, as `deterministic` (inverted), or not at all."""
    names = inspect.signature(call).parameters
    if "train" in names:
        return lambda train: {"train": train}
    if "deterministic" in names:
        return lambda train: {"deterministic": not train}
    return lambda train: {}


def _widened(state: State, params: Params, x: Array) -> State:
    """The state with floating leaves as wide as all else: Flax starts float32 statistics for float64 batches too."""

    def floating(leaf: Array) -> bool:
        return bool(jnp.issubdtype(leaf.dtype, jnp.floating))

    others = [leaf.dtype for leaf in (x, *jax.tree.leaves(params)) if floating(leaf)]
    return jax.tree.map(lambda s: s.astype(jnp.result_type(s.dtype, *others)) if floating(s) else s, state)


def from_linen(module: Any, *, rngs: tuple[str, ...] = ("dropout",)) -> Network:
    """A branch from a `flax.linen` module; every collection other than `params` (batch statistics, ...) is state.

    `module.__call__(x)` may take `train: bool` or `deterministic: bool`; it is passed by name when it does.
    Floating state is at least as wide as the parameters and the example batch, and keeps its dtypes.

    Args:
      module: the module; `module(x [batch, ...]) -> y [batch, out]`.
      rngs: names of the random streams fed in training, each by its own key.

    Raises:
      TypeError: unless `module` is a Linen module.
    """
    from flax import linen as nn
    from flax.core import meta

    if not isinstance(module, nn.Module):
        raise TypeError(f"from_linen takes a flax.linen.Module instance, got {type(module).__name__}.")
    module = typing.cast(Any, module)
    mode = _train_argument(module.__call__)

    def streams(key: KeyArray) -> dict[str, KeyArray]:
        return {name: jax.random.fold_in(key, index) for index, name in enumerate(rngs)}

    def init(key: KeyArray, x: Array, /) -> tuple[Params, State]:
        params_key, rest_key = jax.random.split(key)
        variables = dict(meta.unbox(module.init({"params": params_key, **streams(rest_key)}, x, **mode(False))))
        params = variables.pop("params", {})
        return params, _widened(variables, params, x)

    def apply(
        params: Params, state: State, x: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        feed = streams(key) if key is not None else {}
        variables = {"params": params, **state}
        if not train or not state:
            return module.apply(variables, x, rngs=feed, **mode(train)), state
        y, updated = module.apply(variables, x, rngs=feed, mutable=list(state), **mode(train))
        return y, as_stored(dict(updated), state)

    return Network(init, apply)


def from_nnx(constructor: Callable[[Any], Any]) -> Network:
    """A branch from a `flax.nnx` module constructor, `constructor(rngs: nnx.Rngs) -> module`.

    Parameters are the `nnx.Param` leaves; everything else but random streams and sown values is state.  Random streams
    are rebuilt from `key` at every call and never stored.  `train` sets `deterministic` and `use_running_average` in
    the module, and is passed to a `__call__` that takes `train` or `deterministic`.  Parameters have the dtypes that
    the constructor gives them; floating state is at least as wide as they and the example batch, and keeps its dtypes.
    """
    from flax import nnx

    def split(module: Any) -> tuple[Any, Any, Any, Any]:
        parts: Any = nnx.split(module, nnx.Param, nnx.Any(nnx.RngState, nnx.Intermediate), ...)
        return parts

    @functools.cache
    def skeleton() -> tuple[Any, Any]:
        graph, _, streams, _ = split(nnx.eval_shape(lambda: constructor(nnx.Rngs(0))))
        return graph, streams

    def feed(streams: Any, key: KeyArray | None) -> Any:
        leaves, treedef = jax.tree.flatten(streams)
        root = jax.random.key(0) if key is None else key
        filled = [
            jax.random.fold_in(root, index)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for index, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, filled)

    def init(key: KeyArray, x: Array, /) -> tuple[Params, State]:
        _, params, _, state = split(constructor(nnx.Rngs(key)))
        return nnx.to_pure_dict(params), _widened(nnx.to_pure_dict(state), params, x)

    def apply(
        params: Params, state: State, x: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        graph, streams = skeleton()
        if train and key is None and jax.tree.leaves(streams):
            raise ValueError("this NNX module draws random numbers in training: pass key=.")
        module = nnx.merge(graph, nnx.State(params), feed(streams, key), nnx.State(_widened(state, params, x)))
        module = nnx.view(module, deterministic=not train, use_running_average=not train, raise_if_not_found=False)
        y = module(x, **_train_argument(module.__call__)(train))
        return y, (as_stored(nnx.to_pure_dict(split(module)[3]), state) if train else state)

    return Network(init, apply)
