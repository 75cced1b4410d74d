"""Files that a run reads back: written whole or not at all, and known again by a digest of what is in them.

A JSON record is an object whose last key, `sha256`, is the digest of the others; an npz record holds one array of that
name beside the others.  Reading compares, so that a changed digit, a cut or an emptied file is named and never taken
for a result.  Numbers that are not finite, which JSON has no word for, are written as `{"$float": "nan"}`, `"inf"` or
`"-inf"` and read back as floats.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dualgap_jax.config import ConfigError

DIGEST = "sha256"  # the key, or the array, that holds the digest of the rest
_FLOAT = "$float"  # the key of a number that is not finite
_counter = itertools.count()


class DamagedFileError(ValueError):
    """A file that is not what was written: changed, cut, emptied or unreadable; the message names it."""


# --- places -----------------------------------------------------------------------------------------------------------


def local_path(given: str | os.PathLike[str], what: str = "the path") -> Path:
    """The path of a file or folder on the file systems of this machine.

    Args:
      given: the path; a `Path` made of `gs://bucket` is known too, although it has lost a slash.
      what: what is there, to begin a sentence with.

    Raises:
      ConfigError: for a remote place, such as `gs://bucket`, which `Path` would take for a folder `gs:` here.
    """
    text = os.fspath(given)
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/+", text):
        raise ConfigError(
            f"{what} {match[1]}://{text[match.end() :]} is remote; data and results are read from and written to local"
            " folders. Name one, such as the place where the remote one is mounted, and copy what it needs."
        )
    return Path(text)


def local_folder(given: str | os.PathLike[str], what: str) -> Path:
    """The path of a folder on the file systems of this machine, whole; it need not exist yet.

    Args:
      given: the path, which may begin with `~`.
      what: what is there, to begin a sentence with.

    Raises:
      ConfigError: for a remote place, and where a file has its name or that of a folder above it.
    """
    folder = local_path(given, what).expanduser().resolve()
    if (file := file_in_the_way(folder)) is not None:
        raise ConfigError(f"{what} cannot be {folder}: {file} is a file. Name another.")
    return folder


def file_in_the_way(folder: Path) -> Path | None:
    """The file that has the name of a folder, or of one above it, so that it cannot be made; None where it can."""
    top = next(p for p in (folder, *folder.parents) if p.exists())
    return None if top.is_dir() else top


# --- values as JSON ---------------------------------------------------------------------------------------------------


def jsonable(value: Any, *, where: str = "value") -> Any:
    """`value` in terms of dict, list, str, int, finite float, bool and None, for strict JSON.

    NumPy and JAX scalars and arrays become numbers and nested lists; NamedTuples and dataclasses become objects with
    their field names; tuples become lists; paths become strings; NaN and infinities become `{"$float": "nan"}` and so
    on, which `restored` turns back into floats.

    Args:
      value: what to convert.
      where: the name of `value` in error messages.

    Raises:
      TypeError: for anything else (bytes, sets, complex numbers, objects), naming the place.
    """

    def convert(x: Any, at: str) -> Any:
        if x is None or isinstance(x, bool | str):
            return x
        if isinstance(x, int):
            return int(x)
        if isinstance(x, float):
            return float(x) if math.isfinite(x) else {_FLOAT: str(float(x))}
        if isinstance(x, Path):
            return str(x)
        if hasattr(x, "_asdict") and not isinstance(x, type):
            return convert(x._asdict(), at)
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return {f.name: convert(getattr(x, f.name), f"{at}.{f.name}") for f in dataclasses.fields(x)}
        if isinstance(x, Mapping):
            for key in x:
                if not isinstance(key, str | int) or key == _FLOAT:
                    raise TypeError(f"{at} has the key {key!r}; keys are str (or int), and not {_FLOAT!r}: rename it")
            return {str(key): convert(item, f"{at}.{key}") for key, item in x.items()}
        if isinstance(x, list | tuple):
            return [convert(item, f"{at}[{i}]") for i, item in enumerate(x)]
        if hasattr(x, "__array__"):
            array = np.asarray(x)
            plain = array.astype(np.float64) if array.dtype.kind == "V" and array.dtype.names is None else array
            if plain.dtype.kind in "biufU":
                return convert(plain.tolist(), at)
        raise TypeError(
            f"{at} is a {type(x).__name__} ({x!r:.60}) and cannot be written as JSON;"
            " convert it to numbers, strings, lists or dicts"
        )

    return convert(value, where)


def restored(plain: Any) -> Any:
    """What `jsonable` gave, read from JSON, with NaN and infinities as floats again."""
    if isinstance(plain, dict):
        if plain.keys() == {_FLOAT}:
            return float(plain[_FLOAT])
        return {key: restored(item) for key, item in plain.items()}
    if isinstance(plain, list):
        return [restored(item) for item in plain]
    return plain


def canonical(plain: Any) -> str:
    """The one JSON text of plain data: sorted keys, no spaces, ASCII.  Raises ValueError for NaN and infinities."""
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)


def text_digest(text: str) -> str:
    """The SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as `sha256sum` prints it.  Raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def utf8(text: str) -> bytes:
    """A text as bytes; parts of paths and arguments that are no UTF-8 are escaped: no reason to lose the rest."""
    return text.encode("utf-8", "backslashreplace")


# --- whole files ------------------------------------------------------------------------------------------------------


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls `write(file)` on a temporary file beside `path`, then moves it there: readers see the old or the new.

    The temporary file is always a new one: whatever lies at its name, a link too, is removed and not written through.
    A device or a pipe at `path` is written to as it is, for it is not to be replaced.
    """
    path = local_path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        with open(path, "wb") as file:
            write(file)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_counter)}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_temporary(path: Path) -> bool:
    """Whether a path is named as the temporary files of `write_atomically` are."""
    return path.name.startswith(".") and path.suffix == ".tmp"


def remove_temporary(folders: list[Path]) -> None:
    """Removes what killed processes left half-written in some folders; nothing may write there meanwhile."""
    for folder in folders:
        for path in folder.glob(".*.tmp") if folder.is_dir() else ():
            path.unlink(missing_ok=True)


def save_json(path: str | Path, obj: Any) -> None:
    """Writes a record as JSON with its digest, atomically; missing folders are made.

    Args:
      path: the file.
      obj: a mapping, NamedTuple or dataclass of what `jsonable` takes, without a key `sha256`.

    Raises:
      TypeError: for what `jsonable` refuses; nothing is written then.
    """
    plain = jsonable(obj)
    if not isinstance(plain, dict) or DIGEST in plain:
        raise TypeError(f"a record is an object without the key {DIGEST!r}; got {obj!r:.60}")
    text = json.dumps({**plain, DIGEST: text_digest(canonical(plain))}, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(utf8(text)))


def load_json(path: str | Path) -> dict[str, Any]:
    """Reads a record that `save_json` wrote.

    Raises:
      FileNotFoundError: where there is none.
      DamagedFileError: where it cannot be read, is not JSON, or does not agree with its digest.
    """
    path = local_path(path)
    try:
        plain = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except (ValueError, OSError, RecursionError) as error:
        raise DamagedFileError(f"{path} is not a readable JSON record ({error}); delete it and run again") from error
    given = plain.pop(DIGEST, None) if isinstance(plain, dict) else None
    try:
        sound = given is not None and given == text_digest(canonical(plain))
    except ValueError:  # a number that is not finite
        sound = False
    if not sound:
        raise DamagedFileError(
            f"{path} does not agree with its digest: it was changed after it was written; delete it and run again"
        )
    return restored(plain)


def _arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    into = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        into.update(f"{len(name)}:{name} {array.dtype.str} {array.shape} ".encode())
        into.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return into.hexdigest()


def save_npz(path: str | Path, **arrays: Any) -> None:
    """Writes named arrays with their digest to one npz file, atomically; missing folders are made.

    Raises:
      TypeError: for an array of objects, of a type that npz cannot hold (bfloat16), or called `sha256`.
    """
    if DIGEST in arrays:
        raise TypeError(f"no array may be called {DIGEST!r}; rename it")
    host = {name: np.asarray(value) for name, value in arrays.items()}
    for name, array in host.items():
        if array.dtype.hasobject or (array.dtype.kind == "V" and array.dtype.names is None):
            raise TypeError(f"array {name!r} has dtype {array.dtype}, which npz cannot hold; convert it to float32")
    host[DIGEST] = np.array(_arrays_digest(host))
    write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **host))


def load_npz(path: str | Path) -> dict[str, np.ndarray]:
    """All arrays of a file that `save_npz` wrote.

    Raises:
      FileNotFoundError: where there is none.
      DamagedFileError: where it cannot be read, is not an npz file, or does not agree with its digest.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged archive can fail in any of the ways in which zip and npy are parsed
        raise DamagedFileError(f"{path} is not a readable npz file ({error}); delete it and run again") from error
    given = arrays.pop(DIGEST, None)
    if given is None or str(given) != _arrays_digest(arrays):
        raise DamagedFileError(
            f"{path} does not agree with its digest: it was changed after it was written; delete it and run again"
        )
    return arrays


# --- records by name --------------------------------------------------------------------------------------------------


def read_record(path: str | Path, required: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON or npz record at `path`, by its suffix, with the keys that a reader needs.

    Raises:
      ValueError: when there is none, it is damaged, or it lacks a required key; the message says what to do.
    """
    path = local_path(path)
    try:
        record = load_npz(path) if path.suffix == ".npz" else load_json(path)
    except FileNotFoundError:
        raise ValueError(f"no record {path}; run the experiment that writes it, or name its work folder") from None
    if missing := [key for key in required if key not in record]:
        raise ValueError(f"{path} lacks {', '.join(missing)}; needed: {', '.join(required)}; run the experiment again")
    return record


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of all that is not a non-empty dict."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
