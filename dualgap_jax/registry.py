"""Read-only tables that map a name to a plain function, or to an experiment.

There is one table each for experiments, branches, data sets, losses and planar sets.  A table is never changed in
place: `Table.extended` returns a new one, so a user's own entries need neither an edit of the package nor a patched
global.
"""

from __future__ import annotations

import difflib
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, SupportsFloat, SupportsIndex, TypeVar

F = TypeVar("F")


class UnknownNameError(KeyError):
    """A name that is not in a table; the message gives near matches and the full list."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would show its message in quotes


class SettingError(ValueError):
    """A setting that a table entry refuses; the message names the entry."""


class MissingSettingError(SettingError, TypeError):
    """A call of a table entry without a value that it needs."""


class DuplicateNameError(ValueError):
    """An extension that would replace an existing entry."""


def unknown(kind: str, given: object, allowed: Mapping[str, Any] | list[str] | tuple[str, ...]) -> str:
    """The sentence for a name that is not allowed: what was given, the near matches, all that is allowed."""
    names = sorted(allowed)
    folded = {name.lower(): name for name in reversed(names)}
    near = [folded[m] for m in difflib.get_close_matches(str(given).lower(), list(folded), n=3, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    listing = ", ".join(names) if names else "none"
    return f"unknown {kind} {given!r}.{hint} Allowed: {listing}."


class Table(Mapping[str, F], Generic[F]):
    """An immutable mapping from names to entries of one kind.

    Args:
      kind: what the entries are, in the singular ("branch"); used in messages.
      entries: the name -> entry pairs; functions, but for experiments.
    """

    def __init__(self, kind: str, entries: Mapping[str, F]) -> None:
        self.kind = kind
        self._entries = MappingProxyType(dict(entries))

    def __getitem__(self, name: str) -> F:
        """Returns the entry.  Raises `UnknownNameError` (a KeyError) for a name that is not in the table."""
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownNameError(unknown(self.kind, name, self._entries)) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Table({self.kind!r}: {', '.join(self._entries)})"

    def extended(self, entries: Mapping[str, F]) -> Table[F]:
        """A new table with `entries` added.  Raises `DuplicateNameError` if a name is taken already."""
        taken = sorted(set(entries) & set(self._entries))
        if taken:
            raise DuplicateNameError(
                f"{self.kind} {', '.join(map(repr, taken))} already registered; choose another name."
                f" Taken: {', '.join(sorted(self._entries))}."
            )
        return Table(self.kind, {**self._entries, **entries})

    def describe(self, name: str) -> str:
        """The first line of the entry's docstring."""
        return (inspect.getdoc(self[name]) or "").partition("\n")[0]

    def check_given(self, name: str, /, **arguments: Any) -> None:
        """Checks arguments that need not be all: their names, and literals against annotations and defaults.

        Raises:
          UnknownNameError: for an unknown entry, or an argument that the entry does not take.
          SettingError: for a literal of another type than the argument has.
        """
        parameters = _parameters(self[name])
        several = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for given, value in arguments.items():
            if (parameter := parameters.get(given)) is None:
                if several:
                    continue
                raise UnknownNameError(unknown(f"setting of {self.kind} {name!r}:", given, list(parameters)))
            default = parameter.default
            same = type(value) is type(default) and value == default
            if type(value) in _LITERALS and not same and not _fits(value, kind := _kind(parameter)):
                like = "" if default is parameter.empty else f", as in {given}={default!r:.60}"
                raise SettingError(
                    f"{self.kind} {name!r}: {given}={value!r:.60}: expected {_noun(kind)}{like}, got"
                    f" {type(value).__name__}."
                )

    def check(self, name: str, /, **arguments: Any) -> None:
        """Checks the arguments of a call, as `check_given` does, and that none is missing.

        Raises:
          UnknownNameError, SettingError: as `check_given` does.
          MissingSettingError: for a required argument that is missing.
        """
        self.check_given(name, **arguments)
        for needed, p in _parameters(self[name]).items():
            if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and needed not in arguments:
                raise MissingSettingError(
                    f"{self.kind} {name!r}: {needed} is missing; give {_noun(_kind(p))}, as in {name}({needed}=...)."
                )

    def build(self, name: str, /, **arguments: Any) -> Any:
        """Calls the entry after checking the arguments against its signature.

        Raises:
          UnknownNameError, SettingError, MissingSettingError: as `check` does.
          SettingError: also for a value that the entry refuses with a ValueError, or cannot work with.
        """
        self.check(name, **arguments)
        entry: Any = self[name]
        try:
            return entry(**arguments)
        except (ValueError, TypeError, OverflowError) as error:
            raise SettingError(f"{self.kind} {name!r}: {error}") from error


# --- what an argument takes -----------------------------------------------------------------------------------------

_LITERALS = (bool, int, float, complex, str, bytes, tuple, list, dict, set, type(None), type(...))
_NOUNS: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    SupportsIndex: "a whole number",
    float: "a number",
    SupportsFloat: "a number",
    str: "a text",
    type(None): "None",
}
_TAKEN: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    SupportsIndex: (int,),
    float: (int, float),
    SupportsFloat: (int, float),
    str: (str,),
    type(None): (type(None),),
}
_SERIES = (tuple, list, Iterable, Sequence, Collection)


def _parameters(entry: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of an entry; annotations that cannot be evaluated stay texts."""
    try:
        return inspect.signature(entry, eval_str=True).parameters
    except (NameError, AttributeError, TypeError, SyntaxError):
        return inspect.signature(entry).parameters


def _kind(parameter: inspect.Parameter) -> Any:
    """What a parameter is annotated with; without that what its default is, a number of any kind for a number."""
    if parameter.annotation is not parameter.empty and not isinstance(parameter.annotation, str):
        return parameter.annotation
    kind = type(parameter.default)
    return float if kind is int else kind if kind in (bool, float, str, tuple) else Any


def _fits(value: Any, kind: Any) -> bool:
    """Whether a literal may stand where `kind` is annotated; a kind that nothing is known of takes all."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in arguments)
    if origin in _SERIES:
        fixed = origin is tuple and bool(arguments) and arguments[-1] is not ...
        if type(value) not in (tuple, list) or (fixed and len(value) != len(arguments)):
            return False
        kinds = arguments if fixed else arguments[:1] * len(value)
        return all(type(v) not in _LITERALS or _fits(v, k) for v, k in zip(value, kinds, strict=False))
    if origin is Callable:
        return False
    return type(value) in _TAKEN.get(type(None) if kind is None else kind, _LITERALS)


def _noun(kind: Any) -> str:
    """What an argument takes, in words."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if {*arguments} <= {int, float}:
            return "a number"
        return " or ".join(_noun(argument) for argument in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin in _SERIES:
        return f"a tuple, each entry {_noun(arguments[0])}" if arguments else "a tuple"
    if origin is Callable:
        return "a function"
    return _NOUNS.get(kind, "a value")
