"""States of a checkpoint folder that is only read: whole (`load`), by rows (`Slices`) or by branches (`Branches`)."""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

from dualgap_jax.checkpoints import leaves, manifest
from dualgap_jax.checkpoints.leaves import Place, like_template
from dualgap_jax.checkpoints.manifest import DamagedCheckpointError
from dualgap_jax.checkpoints.processes import Company
from dualgap_jax.checkpoints.rows import Stored
from dualgap_jax.files import local_path
from dualgap_jax.types import Params, PyTree, State

_log = logging.getLogger(__package__)
_T = TypeVar("_T")


class Restored(NamedTuple):
    """What a checkpoint held.

    Attributes:
      step: the step it was saved at.
      state: a tree like the template; without a template, nested dicts of NumPy arrays.
      meta: the dict given to `save`, as JSON gives it back.
    """

    step: int
    state: PyTree
    meta: dict[str, Any]


def steps_in(folder: Path) -> list[int]:
    """The steps that a folder seems to hold, in order; none where there is no folder."""
    there = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(p.name) for p in there if p.name.isdecimal() and p.is_dir())


def newest_sound(
    folder: Path,
    use: Callable[[Path, dict[str, Any]], _T],
    damaged: Callable[[int, str], None],
    company: Company,
) -> _T | None:
    """`use(step's folder, manifest)` of the newest step that passes; `damaged(step, reason)` for those passed over.

    With several processes it is the newest that all of them see, and that passes in all of them.
    """
    for step in reversed(company.common(steps_in(folder))):
        reason, found = "", None
        try:
            found = use(folder / str(step), manifest.read(folder / str(step)))
        except DamagedCheckpointError as error:
            traceback.clear_frames(error.__traceback__)  # which hold, in a cycle, the leaf that was being made
            reason = str(error)
        if company.all_agree(not reason):
            return found
        found = None
        damaged(step, reason or "another process cannot read its part")
    return None


def _newest_in(path: str | Path, use: Callable[[Path, dict[str, Any]], _T], together: bool = False) -> _T:
    """The same for a folder that is only read.  Raises FileNotFoundError if no step passes."""
    folder = local_path(path, "the folder of checkpoints").expanduser().resolve()
    if not folder.is_dir() and not together:
        raise FileNotFoundError(f"{folder} is not a folder; give the checkpoints folder of a workdir")
    reasons: list[str] = []

    def passed_over(step: int, reason: str) -> None:
        reasons.append(f"step {step}: {reason}")
        _log.warning("%s is damaged and not used: %s", folder / str(step), reason)

    found = newest_sound(folder, use, passed_over, Company(together))
    if found is None:
        detail = "; ".join(reasons) or "no step was saved"
        raise FileNotFoundError(f"{folder} holds no sound checkpoint ({detail}); train first, or give another folder")
    return found


def _nested(found: Mapping[str, Any], get: Callable[[str], Any]) -> dict[str, Any]:
    """Nested dicts of `get(name)`."""
    tree: dict[str, Any] = {}
    for name, leaf in found["leaves"].items():
        node = tree
        for part in leaf["path"][:-1]:
            node = node.setdefault(part, {})
        node[leaf["path"][-1]] = get(name)
    return tree


def restore(step: Path, found: dict[str, Any], template: PyTree | None, place: Place | None) -> Restored:
    if template is None:

        def whole(name: str) -> Any:
            stored = Stored(step, name, found)
            return place(None, stored) if place else stored.whole()

        state = _nested(found, whole)
    else:
        named, structure = leaves.flatten(template)
        leaves.check_matches(str(step), found["leaves"], named)
        made = [(place or like_template)(leaf, Stored(step, name, found)) for name, (_, leaf) in named.items()]
        state = jax.tree.unflatten(structure, made)
    return Restored(int(step.name), state, found["meta"])


def load(
    path: str | Path, template: PyTree | None = None, place: Place | None = None, *, together: bool = False
) -> Restored:
    """Reads the newest sound state of a checkpoint folder, and changes nothing there.

    Args:
      path: the folder given to `Checkpointer` (a workdir's `checkpoints`).
      template: as for `Checkpointer.restore_latest`.  None: nested dicts of NumPy arrays under the names of dict keys,
        fields and positions; PRNG keys come as their raw uint32 data.
      place: as for `Checkpointer.restore_latest`; without a template it gets None for the leaf.
      together: whether all processes of a distributed run call this, and are to read the same step.

    Raises:
      FileNotFoundError: if the folder does not exist or holds no sound checkpoint.
      CheckpointMismatchError: if the newest sound step is not like the template, or in another format.
    """
    return _newest_in(path, functools.partial(restore, template=template, place=place), together)


class Slices:
    """Some rows of every leaf at a time, from a step on disk; made by `open_slices`.  Safe to use from several threads.

    Rows that are not asked for are not read, but for the rest of their chunks.

    Attributes:
      step: the step it was saved at.
      meta: the dict given to `save`.
      num_rows: the rows that every leaf has.
    """

    def __init__(self, step: Path, found: dict[str, Any], template: PyTree | None) -> None:
        stored = {name: Stored(step, name, found) for name in found["leaves"]}
        if template is None:
            template = _nested(found, lambda name: jax.ShapeDtypeStruct(stored[name].shape, stored[name].dtype))
            self._as_keys = False
        else:
            leaves.check_matches(str(step), found["leaves"], leaves.flatten(template)[0], whole=False)
            self._as_keys = True
        named, self._structure = leaves.flatten(template)
        self._stored = [stored[name] for name in named]
        shapes = {s.name: s.shape for s in self._stored}
        rows = {shape[:1] for shape in shapes.values()}
        if len(rows) != 1 or rows == {()}:
            shown = ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:8]) or "nothing"
            raise ValueError(f"slices need leaves that lead with the same axis, and {step} gives {shown}")
        self.step = int(step.name)
        self.meta: dict[str, Any] = found["meta"]
        self.num_rows: int = next(iter(rows))[0]

    def read(self, first: int, count: int) -> PyTree:
        """Rows `first, ..., first + count - 1` of every leaf, `[count, ...]`, verified; NumPy arrays and PRNG keys.

        Raises:
          ValueError: if there are no such rows.
          DamagedCheckpointError: if a chunk is not what was saved, or gone.
        """
        read = [self._slice(stored, first, count) for stored in self._stored]
        return jax.tree.unflatten(self._structure, read)

    def _slice(self, stored: Stored, first: int, count: int) -> Any:
        rows = stored.read(first, count)
        if stored.key_impl is None or not self._as_keys:
            return rows
        return jax.random.wrap_key_data(jax.numpy.asarray(rows), impl=stored.key_impl)


def open_slices(path: str | Path, template: PyTree | None = None) -> Slices:
    """Opens the newest step of a checkpoint folder for reading some rows at a time.

    At opening, the manifest is verified and every file is there in full size; the values are verified as they are read.

    Args:
      path: the folder given to `Checkpointer`.
      template: a tree of the leaves wanted, with shapes and dtypes; the checkpoint may hold others.  All lead with the
        same axis.  None: all leaves, in nested dicts, PRNG keys as their raw uint32 data.

    Raises:
      FileNotFoundError: if the folder does not exist or holds no sound checkpoint.
      CheckpointMismatchError: if the newest step does not hold the template's leaves, or is in another format.
      ValueError: if the leaves do not lead with the same axis.
    """
    return _newest_in(path, functools.partial(Slices, template=template))


class Branches:
    """A stacked network on disk, read a few branches at a time; made by `open_branches`.

    Attributes:
      num_branches: I.
      step, meta: of the checkpoint.
    """

    def __init__(self, slices: Slices, at: str) -> None:
        self._slices, self._at = slices, at
        self.num_branches, self.step, self.meta = slices.num_rows, slices.step, slices.meta

    def read(self, first: int, count: int) -> tuple[Params, State]:
        """Parameters and state of branches `first, ..., first + count - 1`; leaves `[count, ...]`.  See `Slices`."""
        tree = self._slices.read(first, count)[self._at]
        return tree["params"], tree["state"]


def open_branches(path: str | Path, network: tuple[Params, State], *, at: str = "carry") -> Branches:
    """Opens the network that a checkpoint of training holds.

    Args:
      path: the folder given to `Checkpointer`.
      network: templates of parameters and state, whose leaves lead with `[I, ...]`.
      at: the name of what has the fields `params` and `state`.

    Raises:
      As `open_slices`.
    """
    params, state = network
    return Branches(open_slices(path, {at: {"params": params, "state": state}}), at)
