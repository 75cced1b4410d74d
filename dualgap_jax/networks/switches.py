"""How a module is told whether it trains: the usual names of the argument, and what is none of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

# The usual names of a training switch, and the value that each has in training.
SWITCHES: Mapping[str, bool] = MappingProxyType(
    {
        "train": True,
        "training": True,
        "is_training": True,
        "is_train": True,
        "train_mode": True,
        "update_stats": True,
        "deterministic": False,
        "use_running_average": False,
        "inference": False,
        "eval": False,
        "evaluate": False,
        "is_eval": False,
        "eval_mode": False,
        "test": False,
        "is_test": False,
    }
)

Switch = str | Callable[[bool], Mapping[str, Any]] | None
Settings = Callable[[bool], dict[str, Any]]


def known(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the names that are usual for a training switch."""
    return tuple(name for name in names if name in SWITCHES)


def settings(names: Iterable[str]) -> Settings:
    """`train -> {name: value}` for switches of these names; a name that is not in `SWITCHES` is true in training."""
    values = {name: SWITCHES.get(name, True) for name in names}
    return lambda train: {name: value is bool(train) for name, value in values.items()}


def is_flag(value: object) -> bool:
    """Whether an attribute or a default may be a switch: a truth value, or None."""
    return value is None or isinstance(value, bool)


def check_call(function: Any, given: Iterable[str], where: str, name: str) -> None:
    """Refuses a module that cannot be called with its inputs and these arguments alone.

    Raises:
      TypeError: where an argument is missing.
    """
    try:
        inspect.signature(function).bind(None, **dict.fromkeys(given))
    except TypeError as error:
        raise TypeError(
            f"{where}: {name} cannot be applied to a batch alone: {error}. Give what its call needs besides by"
            " switch=lambda train: {'argument': value}."
        ) from error


def arguments(function: Any) -> tuple[tuple[str, ...], bool]:
    """The names of a method's arguments after its first that may be switches, and whether it takes `**options`."""
    kinds = inspect.Parameter
    parameters = list(inspect.signature(function).parameters.values())
    named = (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    first = next((i for i, p in enumerate(parameters) if p.kind in (kinds.POSITIONAL_ONLY, named[0])), -1)
    names = tuple(
        p.name
        for i, p in enumerate(parameters)
        if p.kind in named and i != first and (p.default is kinds.empty or is_flag(p.default))
    )
    return names, any(p.kind is kinds.VAR_KEYWORD for p in parameters)


def check_switch(switch: Any, where: str) -> None:
    """Refuses what is neither a name, nor a function, nor None.

    Raises:
      TypeError: for anything else.
    """
    if not (switch is None or isinstance(switch, str) or callable(switch)):
        raise TypeError(
            f"{where}: switch={switch!r} must be the name of the module's training switch, a function from train (a"
            " bool) to the keyword arguments of the call, or None, which looks for a usual name."
        )


def not_found(where: str, module: str, what: str, names: Iterable[str]) -> ValueError:
    """The error about a module that has something to switch and no switch that is known."""
    given = ", ".join(names)
    return ValueError(
        f"{where}: {module} has {what}, and none of its arguments{f' ({given})' if given else ''} is a usual name of a"
        f" training switch ({', '.join(SWITCHES)}). Give its name, switch='...' (true in training); or what the call"
        " gets, switch=lambda train: {'mode': 'train' if train else 'eval'}; or switch=lambda train: {} where training"
        " and evaluation are alike."
    )


def opposed(inner: Any, names: Iterable[str], args: Any, kwargs: Mapping[str, Any], train: bool) -> str:
    """The switch, as `name=value`, by which a layer of Flax's own is told the opposite of `train`; empty for none.

    Args:
      inner: a Linen module, of a class of Flax's or one derived from it.
      names: of its switches, fields or arguments of its call.
      args, kwargs: what it is called with.
      train: whether the module around it trains.
    """
    bases = ("flax.linen.module", "flax.linen.transforms")  # of modules that are not Flax's
    if not any(c.__module__.startswith("flax.linen.") and c.__module__ not in bases for c in type(inner).__mro__):
        return ""
    called = inspect.signature(inner).bind_partial(*args, **kwargs).arguments
    for name in names:
        value = getattr(inner, name, None) if called.get(name) is None else called[name]
        if isinstance(value, bool) and value is not (SWITCHES[name] is bool(train)):
            return f"{name}={value}"
    return ""


def not_reached(where: str, module: str, what: str, train: bool) -> ValueError:
    """The error about a layer inside a module that the module's switches do not reach."""
    told = "evaluate, in training too" if train else "train, in evaluation too"
    return ValueError(
        f"{where}: {module} has {what}, which tells that layer to {told}: the switches of {module} do not reach it."
        f" Make it depend on them; or, if it is meant so, say which switches {module} has: switch='train' for the"
        " argument or field of that name alone, or switch=lambda train: {...}, what the call gets."
    )
