"""Flax at home: networks from Linen modules and NNX constructors, and the way back.

A Flax module differs in training by a switch, an argument or an attribute whose name nobody has fixed.  The usual names
are known (`switches.SWITCHES`); a module that drops units or keeps batch statistics and has no switch of a known name
is refused, since it would be trained as it is evaluated, or the other way round, without a word.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dualgap_jax.networks.given import check_network, described
from dualgap_jax.networks.precision import as_stored
from dualgap_jax.networks.settings import one_array
from dualgap_jax.networks.switches import (
    Settings,
    Switch,
    arguments,
    check_call,
    check_switch,
    is_flag,
    known,
    not_found,
    not_reached,
    opposed,
    settings,
)
from dualgap_jax.types import KeyArray, Network, Params, State


def _widened(state: State, params: Params, x: Array) -> State:
    """The state with floating leaves as wide as all else: Flax starts float32 statistics for float64 batches too."""

    def floating(leaf: Array) -> bool:
        return bool(jnp.issubdtype(leaf.dtype, jnp.floating))

    others = [leaf.dtype for leaf in (x, *jax.tree.leaves(params)) if floating(leaf)]
    return jax.tree.map(lambda s: s.astype(jnp.result_type(s.dtype, *others)) if floating(s) else s, state)


def from_linen(module: Any, *, switch: Switch = None, rngs: tuple[str, ...] = ("dropout",)) -> Network:
    """A network from a `flax.linen` module; every collection other than `params` (batch statistics, ...) is state.

    Floating state is at least as wide as the parameters and the example batch, and keeps its dtypes.

    Args:
      module: the module; `module(x [batch, ...]) -> y [batch, ...]`.
      switch: how the module is told whether it trains.  None: by every argument of `__call__` and every field of the
        module that has a usual name, such as `train`, `is_training`, `deterministic` or `use_running_average`; a field
        that is None is left to the call, if that has one.  A name: by that argument or field alone (true in training,
        unless the usual sense of the name is the opposite).  A function `train -> {argument: value}`: by those keyword
        arguments of the call alone.
      rngs: names of the random streams fed in training, each by its own key.

    Raises:
      TypeError: unless `module` is a Linen module that can be called.
      ValueError: for a switch that the module does not have; when none is given, from `init` and `apply` for a module
        with dropout or batch statistics and no switch of a usual name, and from `apply` for one with a layer of Flax's
        inside that is told to evaluate in training, or to train in evaluation.
    """
    from flax import linen as nn
    from flax.core import meta

    if not isinstance(module, nn.Module):
        raise TypeError(f"from_linen takes a flax.linen.Module instance, got {described(module)}.")
    check_switch(switch, "from_linen")
    name = type(module).__name__
    if not callable(module):
        raise TypeError(f"from_linen: {name} has no __call__, by which a network is applied to its inputs.")
    module = typing.cast(Any, module)
    if isinstance(module.parent, nn.Module):  # made inside another module, and bound to it
        module = module.unbind()[0]
    names, any_name = arguments(module.__call__)
    fields = tuple(field for field in module.__dataclass_fields__ if field not in ("parent", "name"))
    flags = tuple(field for field in fields if is_flag(getattr(module, field)))
    given = inspect.signature(module.__call__).parameters

    def told(wanted: tuple[str, ...]) -> tuple[Settings, Settings]:
        """What the call gets and what the fields are, by `train`; one of a name alone where the call's is None."""
        held = tuple(name for name in wanted if name in flags and getattr(module, name) is not None)
        called = tuple(name for name in wanted if name in names and not (name in held and given[name].default is None))
        return settings(called), settings(held)

    call, field = settings(()), settings(())
    if callable(switch):
        call = typing.cast(Any, switch)
    elif switch is None:
        found = known(names)
        call, field = told(known((*names, *flags))) if found else (settings(()), settings(known(flags)))
    elif switch in names:
        call, field = told((switch,))
    elif any_name:
        call = settings((switch,))
    elif switch in fields:
        field = settings((switch,))
    else:
        raise ValueError(f"from_linen: {name} has neither an argument nor a field switch={switch!r}; it takes {names}.")
    check_call(module.__call__, call(True), "from_linen", name)
    blind = switch is None and not call(True) and not field(True)

    def watched(train: bool) -> AbstractContextManager[Any]:
        """Refuses modules inside that drop or normalise, where the switches do not reach them."""

        def look(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
            inner = context.module
            taken = arguments(inner)[0] if callable(inner) else ()
            inside = known((*inner.__dataclass_fields__, *taken))
            if inside and getattr(inner, "rate", getattr(inner, "dropout_rate", 1.0)) != 0:
                what = type(inner).__name__
                if blind:
                    raise not_found("from_linen", name, f"{what}({inside[0]}=...) inside", names)
                called = context.method_name == "__call__" and not inner.is_initializing()
                if called and (stuck := opposed(inner, inside, args, kwargs, train)):
                    raise not_reached("from_linen", name, f"{what}({stuck}) inside", train)
            return following(*args, **kwargs)

        return nn.intercept_methods(look) if switch is None else nullcontext()

    def bound(train: bool) -> Any:
        return module.clone(**field(train)) if field(train) else module

    def streams(key: KeyArray) -> dict[str, KeyArray]:
        return {name: jax.random.fold_in(key, index) for index, name in enumerate(rngs)}

    def init(key: KeyArray, x: Array, /) -> tuple[Params, State]:
        params_key, rest_key = jax.random.split(key)
        with watched(False):
            drawn = bound(False).init({"params": params_key, **streams(rest_key)}, x, **call(False))
        variables = dict(meta.unbox(drawn))
        if blind and "batch_stats" in variables:
            raise not_found("from_linen", name, "batch statistics", names)
        params = variables.pop("params", {})
        return params, _widened(variables, params, x)

    def apply(
        params: Params, state: State, x: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        variables = {"params": params, **(state or {})}
        options: dict[str, Any] = {"rngs": streams(key) if key is not None else {}, **call(train)}
        with watched(train):
            if not train or not state:
                return one_array(bound(train).apply(variables, x, **options), name), state
            y, updated = bound(train).apply(variables, x, mutable=list(state), **options)
        return one_array(y, name), as_stored(dict(updated), state)

    return Network(init, apply)


def from_nnx(constructor: Callable[..., Any], *, switch: Switch = None) -> Network:
    """A network from a `flax.nnx` module constructor, `constructor(rngs: nnx.Rngs) -> module`.

    Parameters are the `nnx.Param` leaves; everything else but random streams and sown values is state.  Random streams
    are rebuilt from `key` at every call and never stored.  Parameters have the dtypes that the constructor gives them;
    floating state is at least as wide as they and the example batch, and keeps its dtypes.

    Args:
      constructor: makes the module from random streams, passed as `rngs=` where it has an argument of that name, e.g.
        the class itself or `lambda rngs: nnx.Linear(4, 3, rngs=rngs)`.
      switch: how the module is told whether it trains.  None: by every attribute of the module and of those inside it,
        and every argument of its `__call__`, that has a usual name, such as `deterministic`, `use_running_average` or
        `train`.  A name: by that argument or attribute besides (true in training, unless the usual sense of the name is
        the opposite).  A function `train -> {argument: value}`: by those keyword arguments of the call, and the usual
        attributes.

    Raises:
      TypeError: for an instance of a module, or a constructor that gives no NNX module, or the same one each time.
      ValueError: for a switch that the module does not have, and for a module that holds random streams or batch
        statistics and no switch of a usual name, when none is given.
    """
    from flax import nnx

    linen = sys.modules.get("flax.linen")
    made = (nnx.Module, Network) if linen is None else (nnx.Module, Network, linen.Module)
    if isinstance(constructor, made) or not callable(constructor):
        raise TypeError(f"from_nnx takes a constructor of NNX modules, got {described(constructor)}.")
    check_switch(switch, "from_nnx")
    signed = typing.cast(Any, constructor).__init__ if isinstance(constructor, type) else constructor
    by_name = "rngs" in inspect.signature(signed).parameters
    try:
        own = (None,) if isinstance(constructor, type) else ()
        inspect.signature(signed).bind(*own, *(() if by_name else (None,)), **({"rngs": None} if by_name else {}))
    except TypeError as error:
        made_by = getattr(constructor, "__name__", "Module")
        raise TypeError(
            f"from_nnx: {made_by} cannot be called with random streams alone: {error}. Write"
            f" from_nnx(lambda rngs: {made_by}(..., rngs=rngs))."
        ) from error

    def make(rngs: Any) -> Any:
        module = constructor(rngs=rngs) if by_name else constructor(rngs)
        if not isinstance(module, nnx.Module):
            raise TypeError(f"from_nnx: the constructor gave {described(module)}, and no NNX module.")
        return module

    def split(module: Any) -> tuple[Any, Any, Any, Any]:
        parts: Any = nnx.split(module, nnx.Param, nnx.Any(nnx.RngState, nnx.Intermediate), ...)
        return parts

    def fresh() -> Any:
        module = make(nnx.Rngs(0))
        if make(nnx.Rngs(0)) is module:
            raise TypeError(f"from_nnx: the constructor gives one and the same module each time, {described(module)}.")
        return module

    abstract = nnx.eval_shape(fresh)
    call, attributes = _nnx_switch(abstract, switch)
    name = type(abstract).__name__
    check_call(abstract.__call__, call(True), "from_nnx", name)

    graph, _, streams, _ = split(abstract)

    def feed(key: KeyArray | None) -> Any:
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
        _, params, _, state = split(make(nnx.Rngs(key)))
        return nnx.to_pure_dict(params), _widened(nnx.to_pure_dict(state), params, x)

    def apply(
        params: Params, state: State, x: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        if train and key is None and jax.tree.leaves(streams):
            raise ValueError("this NNX module draws random numbers in training: pass key=.")
        module = nnx.merge(graph, nnx.State(params), feed(key), nnx.State(_widened(state, params, x)))
        module = nnx.view(module, deterministic=not train, use_running_average=not train, raise_if_not_found=False)
        for _, inner in nnx.iter_modules(module):
            for attribute, value in attributes(train).items():
                if attribute in vars(inner):
                    setattr(inner, attribute, value)
        y = one_array(module(x, **call(train)), name)
        return y, (as_stored(nnx.to_pure_dict(split(module)[3]), state) if train else state)

    return Network(init, apply)


def _nnx_switch(
    module: Any, switch: Switch
) -> tuple[Callable[[bool], Mapping[str, Any]], Callable[[bool], Mapping[str, Any]]]:
    """What the call of an NNX module gets, and the attributes that it and the modules inside have, by `train`."""
    from flax import nnx

    where, name = "from_nnx", type(module).__name__
    if not callable(module):
        raise TypeError(f"{where}: {name} has no __call__, by which a network is applied to its inputs.")
    names, any_name = arguments(module.__call__)
    inner = [part for _, part in nnx.iter_modules(module)]
    own = [part for part in inner if not type(part).__module__.startswith("flax.")]
    held = {attribute for part in inner for attribute in vars(part)}
    usual = {attribute for part in inner for attribute in known(vars(part)) if is_flag(vars(part)[attribute])}
    if callable(switch):
        return typing.cast(Any, switch), settings(usual)
    if switch is not None:
        if switch not in names and not any_name and switch not in held:
            raise ValueError(f"{where}: {name} has neither an argument nor an attribute switch={switch!r}.")
        by_call = switch in names or (any_name and switch not in held)
        return settings((switch,) if by_call else ()), settings(usual if by_call else {*usual, switch})
    found = known(names)
    switched = bool(found) or any(known(vars(part)) for part in own)
    for part in own:
        kept = [value for value in vars(part).values() if isinstance(value, nnx.BatchStat)]
        drawn = [value for value in vars(part).values() if isinstance(value, nnx.Rngs | nnx.RngStream)]
        if not switched and (kept or (drawn and not usual)):
            what = "batch statistics" if kept else "random streams"
            raise not_found(where, name, f"{what} in {type(part).__name__}", names)
    return settings(found), settings(usual)


def as_network(given: Any, where: str) -> Network:
    """A network from a network, a Linen module, or a constructor of NNX modules.

    Raises:
      TypeError: for anything else, an NNX instance among it, with what to write instead.
    """
    linen, nnx = sys.modules.get("flax.linen"), sys.modules.get("flax.nnx")
    if linen is not None and isinstance(given, linen.Module):
        return from_linen(given)
    if nnx is not None and isinstance(given, type) and issubclass(given, nnx.Module):
        return from_nnx(given)
    if nnx is not None and not isinstance(given, nnx.Module | Network | type) and callable(given):
        try:
            return from_nnx(given)
        except TypeError as error:
            raise TypeError(f"{where} takes a network or a constructor of NNX modules: {error}") from error
    return check_network(given, where)


def to_linen(network: Network) -> Any:
    """A `flax.linen` module that applies the network: `module(x, train=False) -> y`.

    The parameters are `params['network']`, the state, where there is any, `batch_stats['network']`; dropout takes the
    stream `dropout`.  `from_linen` of it has the same outputs.

    Raises:
      TypeError: if `network` is not a network.
    """
    from dualgap_jax.networks.linen import Pure

    return Pure(check_network(network, "to_linen"))


def to_nnx(network: Network, x: Any, *, rngs: Any) -> Any:
    """A `flax.nnx` module that applies the network: `module(x, train=None) -> y`.

    Its `nnx.Param` variables hold the parameters, drawn with `rngs.params()`, its `nnx.BatchStat` variables the state;
    dropout takes the stream `rngs.dropout`.

    Args:
      network: the network.
      x: an example batch `[batch, ...]`, or its `jax.ShapeDtypeStruct`.
      rngs: an `nnx.Rngs`.

    Raises:
      TypeError: if `network` is not a network.
    """
    from dualgap_jax.networks.nnx import Pure

    return Pure(check_network(network, "to_nnx"), x, rngs=rngs)
