"""Configs: the typed argument string of a config file, and the frozen spec that a ConfigDict is turned into.

A config file defines `get_config(arg)` and reads `arg` ("I=100,seed=3,smoke") with `parse_arg`.  An experiment declares
a frozen dataclass; `to_spec` fills it from the ConfigDict and rejects whatever does not fit, naming the key, what was
given and what is allowed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import ml_collections

from dualgap_jax.registry import Table, unknown

T = TypeVar("T")


# Parameters of table entries that an experiment supplies: the outputs that the data asks for, the length of the run.
FROM_CONTEXT = ("out", "max_steps")


class ConfigError(ValueError):
    """A config key or value that is not allowed."""


@dataclasses.dataclass(frozen=True)
class Component:
    """A table entry chosen by config: `name`, and every other key under it as a setting of that entry."""

    name: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def component(table: Table[Any], name: str, /, **settings: Any) -> Component:
    """A Component that lists every setting of the entry, so that each can be overridden on the command line.

    Settings not given take the entry's defaults; parameters without a simple default (`out`) are left out.

    Raises:
      UnknownNameError: for an unknown entry or setting.
      ConfigError: for a setting that only the experiment supplies, or an entry with a parameter called `name`, which
        would stand in the place of the entry's own name.
    """
    table.check(name, **settings)
    parameters = inspect.signature(table[name]).parameters
    require("name" not in parameters, f"{table.kind} {name!r} has a parameter called 'name'; rename it.")
    for given in settings:
        require(given not in FROM_CONTEXT, f"{table.kind} {name!r}: {given!r} comes from the experiment; leave it out.")
    defaults = {
        key: p.default
        for key, p in parameters.items()
        if isinstance(p.default, bool | int | float | str | tuple) and key not in FROM_CONTEXT
    }
    return Component(name, {**defaults, **settings})


class Arguments(types.SimpleNamespace):
    """The parsed argument string: one attribute for each name."""


def _written(value: Any) -> str:
    """A value as it is typed in an argument string."""
    return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _read(key: str, text: str, default: Any) -> Any:
    kind = type(default)
    if kind is tuple:
        item = default[0]
        if not all(text.split("/")):
            raise ConfigError(f"{key}={text!r}: expected values with slashes between, as in {key}={_written(default)}.")
        return tuple(_read(key, part, item) for part in text.split("/"))
    if kind is bool:
        values = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in values:
            raise ConfigError(f"{key}={text!r}: expected true or false.")
        return values[text.lower()]
    if kind is str:
        return text
    try:
        return kind(text)
    except ValueError:
        noun = {int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{key}={text!r}: expected {noun}, as in {key}={default}.") from None


def parse_arg(arg: str | None, **defaults: bool | int | float | str | tuple[Any, ...]) -> Arguments:
    """Reads "key=value,flag,list=1/3/5" with the types of the defaults.

    Args:
      arg: the text after the colon of `--config=FILE:ARG`, or None.
      defaults: every allowed key with its default, which fixes the type.  A bare key sets a boolean.  Tuples have at
        least one item, all of the type of the default's first, and are written with slashes.

    Returns:
      A namespace with one attribute a key.

    Raises:
      ConfigError: for an unknown or repeated key, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        if key not in defaults:
            raise ConfigError(unknown("config argument", key, defaults))
        if key in values:
            raise ConfigError(f"config argument {key!r} is given twice in {arg!r}.")
        if not equals and not isinstance(defaults[key], bool):
            raise ConfigError(f"config argument {key!r} needs a value, as in {key}={_written(defaults[key])}.")
        values[key] = _read(key, text, defaults[key]) if equals else True
    return Arguments(**{**defaults, **values})


def plain(value: Any) -> Any:
    """A config or spec as plain JSON data: dicts, lists, numbers, strings."""
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    if isinstance(value, Component):
        return {"name": value.name, **plain(value.settings)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value


def as_dict(config: Mapping[str, Any] | ml_collections.ConfigDict) -> dict[str, Any]:
    """A config as nested plain dicts, a copy."""
    return config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if origin is typing.Literal:
        allowed = typing.get_args(kind)
        if not any(type(value) is type(a) and value == a for a in allowed):
            raise ConfigError(unknown(f"value of {where}:", value, [str(a) for a in allowed]))
        return value
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise ConfigError(f"{where}={value!r}: expected a tuple.")
        return tuple(_convert(typing.get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, ml_collections.ConfigDict):
        value = value.to_dict()
    if kind is Component:
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ConfigError(f"{where}={value!r}: expected a group with a `name` and the settings of that entry.")
        return Component(value["name"], {k: v for k, v in value.items() if k != "name"})
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={value!r}: expected a group of keys.")
        return to_spec(typing.cast(type, kind), value, where=where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where}={value!r}: expected {kind.__name__}, got {type(value).__name__}.")
    return value


def to_spec(cls: type[T], config: Mapping[str, Any] | ml_collections.ConfigDict, *, where: str = "config") -> T:
    """Fills the frozen dataclass `cls` from a config, group by group.

    Raises:
      ConfigError: for unknown or missing keys, wrong types, values outside a Literal, and whatever the `__post_init__`
        of a spec rejects.
    """
    values = as_dict(config)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    for key in values:
        if key not in fields:
            raise ConfigError(unknown(f"key in {where}:", key, fields))
    converted = {}
    for name, field in fields.items():
        if name in values:
            converted[name] = _convert(hints[name], values[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}.{name} is missing.")
    return cls(**converted)


def to_config(spec: Any) -> ml_collections.ConfigDict:
    """The ConfigDict of a spec: the inverse of `to_spec`, and the way config files get their defaults."""

    def convert(value: Any) -> Any:
        if isinstance(value, Component):
            return {"name": value.name, **{k: convert(v) for k, v in value.settings.items()}}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: convert(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return value

    return ml_collections.ConfigDict(convert(spec))


def experiment_config(experiment: str, spec: Any) -> ml_collections.ConfigDict:
    """What a config file returns: the name of an experiment and its spec."""
    return ml_collections.ConfigDict({"experiment": experiment, **to_config(spec).to_dict()})


def load(path: str | Path, arg: str | None = None) -> ml_collections.ConfigDict:
    """The ConfigDict of a config file, as `--config=PATH:ARG` gives it.

    Args:
      path: the file; "FILE:ARG" works too.
      arg: what `get_config` is called with.

    Raises:
      ConfigError: if there is no such file, or it defines no `get_config`.
    """
    if arg is None:
        text, _, rest = str(path).partition(":")
        path, arg = text, rest or None
    path = Path(path)
    if not path.is_file():
        folder = path.parent
        names = [p.name for p in folder.glob("*.py")] if folder.is_dir() else []
        raise ConfigError(unknown(f"config file in {folder}:", path.name, names))
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path} defines no get_config(arg).")
    return module.get_config(arg)


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless the condition holds."""
    if not condition:
        raise ConfigError(message)
