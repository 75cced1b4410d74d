"""The cache of decoded images below the user's cache folder: a second start neither decodes nor imports TFDS."""

from __future__ import annotations

import os
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dualgap_jax.data.prepared import IMAGE_SHAPES, Decoded, Prepared, decode
from dualgap_jax.files import write_atomically


def cache_dir() -> Path | None:
    """`$XDG_CACHE_HOME/dualgap_jax`, or `~/.cache/dualgap_jax` when the variable is unset or not an absolute path.

    None where there is no home folder either, as for a user whom the system does not know; nothing is cached then.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():
        return base / "dualgap_jax"
    try:
        return Path("~/.cache").expanduser() / "dualgap_jax"
    except RuntimeError:
        return None


def load(prepared: Prepared, split: str) -> Decoded:
    """The decoded split, from the cache if it is there and sound, else decoded and, where possible, cached.

    One `.npz` file per split: it is replaced in one step, names the data that it was decoded from, and the CRC of its
    members shows damage.  Whatever is wrong with it is said in a warning, and it is made again.
    """
    folder, key = cache_dir(), f"{prepared.name}-{split}-{prepared.checksum}"
    if folder is None:
        warnings.warn("decoded images are not cached: there is no home folder; set XDG_CACHE_HOME", stacklevel=4)
        return decode(prepared, split)
    path = folder / f"{key}.npz"
    try:
        with path.open("rb") as file, np.load(file) as stored:
            parts: dict[str, Any] = {name: stored[name] for name in (*Decoded._fields, "key")}
        if (said := str(parts.pop("key"))) != key:
            raise ValueError(f"it holds {said}")
        arrays = Decoded(**{**parts, "image_format": str(parts["image_format"])})
        n, shape = prepared.num_examples[split], IMAGE_SHAPES[prepared.name]
        kinds = [(a.shape, a.dtype) for a in arrays[:-1]]
        if kinds == [((n, *shape), np.uint8), ((n,), np.int32), (shape, np.int64), (shape, np.int64)]:
            return arrays
        raise ValueError(f"unexpected arrays {kinds}")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        warnings.warn(f"rebuilding the damaged cache file {path}: {error!r}", stacklevel=4)
    arrays = decode(prepared, split)
    try:
        write_atomically(path, lambda file: np.savez(file, key=key, **arrays._asdict()))
    except OSError as error:
        warnings.warn(f"decoded images are not cached, {path} cannot be written: {error}", stacklevel=4)
    return arrays
