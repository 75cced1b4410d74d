"""Configs: the typed argument string of a config file, the ConfigDict that it returns, and the spec made of that.

A config file defines `get_config(arg)`, reads `arg` ("I=100,seed=3,smoke") with `parse_arg`, and returns a locked
`ml_collections.ConfigDict`: the name of an experiment and the leaves of its spec (`experiment_config`).  `override`
changes leaves by their dotted names, and `to_spec` fills the spec, a frozen dataclass, once; both reject whatever does
not fit, naming the key, what was given and what is allowed.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict

from dualgap_jax.registry import Table, unknown

T = TypeVar("T")


# Parameters of table entries that an experiment supplies: the outputs that the data asks for, the length of the run.
FROM_CONTEXT = ("out", "max_steps")

_MOST = 10_000  # numbers that a config file lists for an argument that says how many


class ConfigError(ValueError):
    """A config key or value that is not allowed."""


@dataclasses.dataclass(frozen=True)
class Component:
    """A table entry chosen by config: `name`, and every other key under it as a setting of that entry."""

    name: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def _asdict(self) -> dict[str, Any]:
        """Name and settings side by side, as configs have them."""
        return {"name": self.name, **self.settings}


def component(table: Table[Any], name: str, /, **settings: Any) -> Component:
    """A Component that lists every setting of the entry, so that each can be overridden on the command line.

    Settings not given take the entry's defaults; parameters without a simple default (`out`) are left out.

    Raises:
      UnknownNameError, SettingError: for an unknown entry or setting, or a setting of another type.
      ConfigError: for a setting that only the experiment supplies, or an entry with a parameter called `name`, which
        would stand in the place of the entry's own name.
    """
    table.check_given(name, **settings)
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


class Absent(NamedTuple):
    """The default of an argument that is None unless it is given.

    Attributes:
      like: a value of its type.
    """

    like: bool | int | float | str | tuple[Any, ...]


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
        value = kind(text)
    except ValueError:  # an integer of thousands of digits, too
        value = math.nan
    noun = {int: "a whole number", float: "a finite number"}[kind]
    require(math.isfinite(value), f"{key}={text!r:.60}: expected {noun}, as in {key}={default}.")
    return value


def parse_arg(arg: str | None, **defaults: bool | int | float | str | tuple[Any, ...] | Absent) -> Arguments:
    """Reads "key=value,flag,list=1/3/5" with the types of the defaults.

    Args:
      arg: the text after the colon of `--config=FILE:ARG`, or None.
      defaults: every allowed key with its default, which fixes the type.  A bare key sets a boolean.  Tuples have at
        least one item, all of the type of the default's first, and are written with slashes.  `Absent(like)` is None
        where the argument is not given, and of the type of `like` where it is.

    Returns:
      A namespace with one attribute a key.

    Raises:
      ConfigError: for an unknown or repeated key, or a value of the wrong type.
    """
    likes = {key: default.like if isinstance(default, Absent) else default for key, default in defaults.items()}
    values: dict[str, Any] = {}
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = item.partition("=")
        if key not in defaults:
            raise ConfigError(unknown("config argument", key, defaults))
        if key in values:
            raise ConfigError(f"config argument {key!r} is given twice in {arg!r}.")
        if not equals and not isinstance(likes[key], bool):
            raise ConfigError(f"config argument {key!r} needs a value, as in {key}={_written(likes[key])}.")
        values[key] = _read(key, text, likes[key]) if equals else True
    fixed = {key: None if isinstance(default, Absent) else default for key, default in defaults.items()}
    return Arguments(**{**fixed, **values})


def numbered(key: str, count: int, *, first: int) -> tuple[int, ...]:
    """As many whole numbers, from `first` on, as a config argument `key` says.

    Raises:
      ConfigError: for fewer than none, or more than 10,000.
    """
    require(0 <= count <= _MOST, f"{key}={count} must lie between 0 and {_MOST:,}: it says how many there are.")
    return tuple(range(first, first + count))


def as_dict(spec: Any) -> Any:
    """A spec as nested dicts that `to_spec` turns back into it; lists become tuples."""

    def convert(value: Any) -> Any:
        if isinstance(value, Component):
            return {k: convert(v) for k, v in value._asdict().items()}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: convert(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {k: convert(v) for k, v in value.items()}
        return tuple(map(convert, value)) if isinstance(value, tuple | list) else value

    return convert(spec)


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
    if kind is Component:
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ConfigError(f"{where}={value!r}: expected a group with a `name` and the settings of that entry.")
        check_numbers(value, where)
        return Component(value["name"], {k: as_dict(v) for k, v in value.items() if k != "name"})
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={value!r}: expected a group of keys.")
        return to_spec(typing.cast(type, kind), value, where=where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where}={value!r}: expected {kind.__name__}, got {type(value).__name__}.")
    check_numbers(value, where)
    return value


def check_numbers(value: Any, where: str = "config") -> None:
    """Raises ConfigError for NaN, infinities and whole numbers beyond 32 bits, wherever in a spec they are.

    Seeds have all 32 bits; other whole numbers, which JAX counts with, one less.
    """
    if isinstance(value, Component) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        value = as_dict(value)
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_numbers(item, f"{where}.{key}")
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            check_numbers(item, f"{where}[{index}]")
    elif isinstance(value, float):
        require(math.isfinite(value), f"{where}={value}: expected a finite number.")
    elif isinstance(value, int):
        bits = 32 if where.endswith("seed") else 31
        require(-(2**31) <= value < 2**bits, f"{where}={value:.6g}: expected a whole number below 2**{bits}.")


def to_spec(cls: type[T], config: Mapping[str, Any], *, where: str = "config") -> T:
    """Fills the frozen dataclass `cls` from nested mappings, group by group.

    Raises:
      ConfigError: for unknown or missing keys, wrong types, values outside a Literal, and whatever the `__post_init__`
        of a spec rejects.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(typing.cast(Any, cls))}
    for key in config:
        if key not in fields:
            raise ConfigError(unknown(f"key in {where}:", key, fields))
    converted = {}
    for name, field in fields.items():
        if name in config:
            converted[name] = _convert(hints[name], config[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}.{name} is missing.")
    return cls(**converted)


_REPLACED: dict[str, Mapping[str, str]] = {}  # of each experiment that has a config, see `experiment_config`


def experiment_config(experiment: str, spec: Any) -> ConfigDict:
    """What a config file returns: the name of an experiment beside the leaves of its spec, locked.

    A class of specs may have a `REPLACED`: dotted names of leaves that the experiment sets itself, each with what it
    sets them by; `override` does not take another value for one.
    """
    _REPLACED[experiment] = getattr(type(spec), "REPLACED", {})
    return ConfigDict({"experiment": experiment, **as_dict(spec)}).lock()


def spec_of(config: Mapping[str, Any] | ConfigDict, cls: type[T]) -> T:
    """The spec of a config, filled by `to_spec`; the name of its experiment is left out."""
    tree = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return to_spec(cls, {key: value for key, value in tree.items() if key != "experiment"})


def override(config: ConfigDict, texts: Mapping[str, str | None]) -> ConfigDict:
    """The config with leaves changed, as `--config.a.b=TEXT` gives them.

    Args:
      config: what `load` gave.
      texts: dotted name -> text, of the type that the leaf has; None sets a boolean.  An entry of a tuple is named
        `a.b[0]`; a whole one is written `(1, 2)`, and one of numbers also `1/2`.  A table entry, a group with a `name`,
        is chosen anew by that name, with settings as in a call, `adamw` or `adamw(weight_decay=0.01)`; those that are
        not given take the entry's defaults.

    Raises:
      ConfigError: for a name that is not there, a text that does not fit, or another value of a leaf that the
        experiment sets itself.
    """
    tree = config.to_dict()
    for name, text in texts.items():
        group: Any = tree
        keys = re.findall(r"[^.\[\]]+|\[\d+\]", name)
        if not keys or ".".join(keys).replace(".[", "[") != name:
            raise ConfigError(unknown("key in config:", name, tree))
        for depth, key in enumerate(keys):
            where = ".".join(["config", *keys[:depth]]).replace(".[", "[")
            at: Any = int(key[1:-1]) if key.startswith("[") else key
            known = range(len(group)) if isinstance(group, list) else list(group) if isinstance(group, dict) else ()
            if at not in known:
                raise ConfigError(unknown(f"key in {where}:", key, [str(k) for k in known]))
            if depth + 1 < len(keys):
                group[at] = list(group[at]) if isinstance(group[at], tuple) else group[at]
                group = group[at]
            elif isinstance(group[at], dict) and isinstance(group[at].get("name"), str):
                group[at] = _read_component(f"--config.{name}", text)
            elif isinstance(group[at], dict):
                raise ConfigError(f"config.{name} is a group; set one of its keys: {', '.join(group[at])}.")
            else:
                group[at] = _read_leaf(f"--config.{name}", text, group[at])
    changed = as_dict(tree)
    for name, by in _REPLACED.get(tree.get("experiment", ""), {}).items():
        before, after = _leaf(config.to_dict(), name), _leaf(changed, name)
        require(
            after is None or after == before,
            f"--config.{name}: {after!r:.60} would not be used, {tree['experiment']} sets it by {by}; change that,"
            f" and leave {name} out.",
        )
    return ConfigDict(changed).lock()


def _leaf(tree: Any, name: str) -> Any:
    """The value at a dotted name; None where there is none."""
    return functools.reduce(lambda at, key: at.get(key) if isinstance(at, Mapping) else None, name.split("."), tree)


def _read_component(key: str, text: str | None) -> dict[str, Any]:
    """'adamw' or 'adamw(weight_decay=0.01)' as the group of a table entry."""
    try:
        call = ast.parse(text or "", mode="eval").body
        call = ast.Call(call, [], []) if isinstance(call, ast.Name) else call
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("it is no name or call of one with named settings")
        settings = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        if len(settings) < len(call.keywords):
            raise ValueError("a setting is given twice")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"{key}={text!r:.60}: expected the name of an entry, with settings as in a call, such as"
            f" {key}='adamw(weight_decay=0.01)' ({error})."
        ) from None
    require("name" not in settings, f"{key}={text!r:.60}: the name stands before the parenthesis; leave name= out.")
    for given in set(FROM_CONTEXT) & set(settings):
        raise ConfigError(f"{key}={text!r:.60}: {given!r} comes from the experiment; leave it out.")
    return {"name": call.func.id, **settings}


def _read_leaf(key: str, text: str | None, now: Any) -> Any:
    """A text as a value of the type of the present one."""
    if text is None:
        require(isinstance(now, bool), f"{key} needs a value, as in {key}={_written(now)}.")
        return True
    if not isinstance(now, tuple | list):
        return _read(key, text, now) if now is not None else text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        numbers = now and isinstance(now[0], int | float)
        like = now or (text,)  # where none is there, the one that may have been meant
        require(bool(numbers), f'{key}={text!r}: expected a tuple, as in "{key}={like!r}".')
        return tuple(_read(key, part, now[0]) for part in text.split("/"))
    items = tuple(value) if isinstance(value, tuple | list) else (value,)
    return tuple(_like(f"{key}[{index}]", item, now[0]) for index, item in enumerate(items)) if now else items


def _like(key: str, item: Any, like: Any) -> Any:
    """An entry of a tuple, of the type of another one."""
    kind = type(like)
    if kind is float and type(item) is int:
        item = float(item) if abs(item) <= sys.float_info.max else math.inf
    require(type(item) is kind, f"{key}={item!r:.60}: expected {kind.__name__}, got {type(item).__name__}.")
    return item


def load(path: str | Path, arg: str | None = None) -> ConfigDict:
    """The ConfigDict of a config file, as `--config=PATH:ARG` gives it.

    Args:
      path: the file; "FILE:ARG" works too.
      arg: what `get_config` is called with.

    Raises:
      ConfigError: if there is no such file, or it defines no `get_config(arg)` that returns a
        ConfigDict with the name of an experiment.
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
    require(hasattr(module, "get_config"), f"{path} defines no get_config(arg).")
    config = module.get_config(arg)
    require(
        isinstance(config, ConfigDict) and "experiment" in config,
        f"{path}: get_config(arg) must return experiment_config(experiment, spec), got {config!r:.60}.",
    )
    return config


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless the condition holds."""
    if not condition:
        raise ConfigError(message)
