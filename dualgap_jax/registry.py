"""Read-only tables that map a name to a plain function, or to an experiment.

There is one table each for experiments, branches, data sets, losses and planar sets.  A table is never changed in
place: `Table.extended` returns a new one, so a user's own entries need neither an edit of the package nor a patched
global.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeVar

F = TypeVar("F")


class UnknownNameError(KeyError):
    """A name that is not in a table; the message gives near matches and the full list."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would show its message in quotes


class SettingError(ValueError):
    """A setting that a table entry refuses; the message names the entry."""


class MissingSettingError(SettingError, TypeError):
    """A setting that a table entry requires and that is not given."""


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

    def check(self, name: str, /, **arguments: Any) -> None:
        """Raises `UnknownNameError` for an unknown entry, or an argument that the entry does not take."""
        entry: Any = self[name]
        parameters = inspect.signature(entry).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for given in arguments:
                if given not in parameters:
                    raise UnknownNameError(unknown(f"setting of {self.kind} {name!r}:", given, list(parameters)))

    def check_call(self, name: str, /, **arguments: Any) -> None:
        """As `check`, and raises `MissingSettingError` for a required argument that is not among those given."""
        self.check(name, **arguments)
        entry: Any = self[name]
        parameters = inspect.signature(entry).parameters.values()
        required = [
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        if missing := [given for given in required if given not in arguments]:
            raise MissingSettingError(
                f"{self.kind} {name!r} needs {' and '.join(missing)}; write"
                f" {name}({', '.join(f'{given}=...' for given in missing)})."
            )

    def build(self, name: str, /, **arguments: Any) -> Any:
        """Calls the entry after checking the argument names against its signature.

        Raises:
          UnknownNameError: for an unknown entry, or an argument that the entry does not take.
          SettingError: for a value that the entry refuses with a ValueError.
          MissingSettingError: for a required argument that is missing; it is a TypeError too.
        """
        self.check_call(name, **arguments)
        entry: Any = self[name]
        try:
            return entry(**arguments)
        except ValueError as error:
            raise SettingError(f"{self.kind} {name!r}: {error}") from error
