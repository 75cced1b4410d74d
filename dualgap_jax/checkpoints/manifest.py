"""The manifest of a step: what its leaves are, and the SHA-256 of every file.

Orbax makes a step appear as a whole or not at all, and restores a flipped byte without a word.  So the manifest is
written once the step is there, and a step without one is no step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualgap_jax.files import DamagedFileError, file_digest, load_json, restored, save_json

FORMAT = 3
NAME = "manifest.json"
ITEM = "state"  # the folder of a step that holds the leaves
_META = Path("meta", "metadata")  # where Orbax keeps an item of JSON


class CheckpointMismatchError(ValueError):
    """A sound checkpoint of another state than the template (other leaves, shapes or dtypes), or in another format."""


class DamagedCheckpointError(ValueError):
    """A step whose files are missing, unreadable, not what was saved, or too many."""


def write(step: Path, leaves: Mapping[str, Any], known: Mapping[str, list[Any]]) -> None:
    """Writes the manifest of a step that is otherwise complete.

    Args:
      step: its folder.
      leaves: what the manifest says of each leaf, by name.
      known: path below the step -> size and SHA-256, of files that need not be read for it.
    """
    found = {path: known[path] if path in known else _synced(step / path) for path in sorted(_files_below(step))}
    save_json(step / NAME, {"format": FORMAT, "step": int(step.name), "leaves": leaves, "files": found})


def read(step: Path) -> dict[str, Any]:
    """The verified manifest of a step, whose files are all there in the right size, and no others; with its meta.

    Small files (descriptions of arrays, Orbax's own) are verified here, chunks when they are read.

    Raises:
      DamagedCheckpointError: if that is not so.
      CheckpointMismatchError: if the step is in another format.
    """
    try:
        manifest = load_json(step / NAME)
    except FileNotFoundError as error:
        _refuse_old_formats(step)
        raise DamagedCheckpointError(f"it has no {NAME}, so its save did not end") from error
    except DamagedFileError as error:
        raise DamagedCheckpointError(str(error)) from error
    if manifest["format"] != FORMAT:
        raise _another_format(step, manifest["format"])
    if manifest["step"] != int(step.name):
        raise DamagedCheckpointError(f"its files are those of step {manifest['step']}")
    listed: dict[str, list[Any]] = manifest["files"]
    chunks = {path for leaf in manifest["leaves"].values() for path in leaf["chunks"]}
    try:
        if other := (_files_below(step) - {NAME}) ^ set(listed):
            path = min(other)
            raise DamagedCheckpointError(f"{path} is {'missing' if path in listed else 'not of this step'}")
        for path, (size, digest) in listed.items():
            if (there := (step / path).stat().st_size) != size:
                raise DamagedCheckpointError(f"{path} has {there} bytes and not {size}")
            if path not in chunks and file_digest(step / path) != digest:
                raise DamagedCheckpointError(f"{path} does not agree with its digest")
        manifest["meta"] = restored(json.loads((step / _META).read_bytes()))
    except OSError as error:
        raise DamagedCheckpointError(f"a file cannot be read ({error})") from error
    return manifest


def _synced(path: Path) -> list[Any]:
    """Size and digest of a file that is on disk by then."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return [path.stat().st_size, file_digest(path)]


def _files_below(step: Path) -> set[str]:
    def fail(error: OSError) -> None:
        raise error

    found = os.walk(step, onerror=fail)
    return {Path(folder, name).relative_to(step).as_posix() for folder, _, names in found for name in names}


def _refuse_old_formats(step: Path) -> None:
    """Format 1 kept its record in Orbax's metadata, format 2 in a file of its own; both had a digest in it."""
    for number, path in ((2, step / ITEM / "record.json"), (1, step / _META)):
        try:
            record = json.loads(path.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and {"digest", "leaves"} <= set(record):
            raise _another_format(step, number)


def _another_format(step: Path, number: object) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"{step} is a checkpoint in format {number}, and this version reads format {FORMAT};"
        " read it with the version that wrote it, or start in another folder"
    )
