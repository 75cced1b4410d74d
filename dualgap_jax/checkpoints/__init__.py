"""Checkpoints: a tree of arrays on disk, in blocks of rows, checked bit by bit when it is read again.

`Checkpointer` saves and restores, `load` reads a folder, `open_slices` and `open_branches` read some rows of every leaf
at a time.  A state of gigabytes is never held twice: not while it is saved, not while it is restored.

Orbax makes a step appear as a whole or not at all, and keeps the newest ones.  What a step holds is written here: every
leaf in blocks with a digest each (see `files`), and a step is restored only when its blocks agree with them; otherwise
the log says why, and the step before is taken.  Nothing is cast.

A leaf is named by its path (`params/kernel`).  Containers without leaves (`optax.EmptyState`, None) come from the
template, so a state may be any tree of NamedTuples, dicts, tuples and lists.  Typed PRNG keys are leaves like others.

In order: `files` (blocks and records), `leaves` (from and to devices), `orbax_item`, and the interface here.
"""

from __future__ import annotations

import json
import logging
import operator
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, TypeVar

import jax
import numpy as np

from dualgap_jax.checkpoints import files, leaves
from dualgap_jax.checkpoints.files import CheckpointMismatchError, DamagedCheckpointError, Stored
from dualgap_jax.checkpoints.leaves import Pieces, Place, like_template, put_rows
from dualgap_jax.types import Params, PyTree, State

__all__ = [
    "Branches",
    "CheckpointMismatchError",
    "Checkpointer",
    "DamagedCheckpointError",
    "Pieces",
    "Place",
    "Restored",
    "Slices",
    "Stored",
    "like_template",
    "load",
    "open_branches",
    "open_slices",
    "put_rows",
]

_log = logging.getLogger(__name__)
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


# --- Saving -----------------------------------------------------------------------------------------------------------


class Checkpointer:
    """Saves states of one run into a folder, and restores the newest sound one.  A context manager.

    Under `jax.distributed`, process 0 alone makes one; it waits for no other process.  The others read with `load`,
    `open_slices` and `open_branches`.

    Args:
      path: the folder; made when missing.
      keep: how many of the newest steps stay on disk.  At least 2 leaves one to fall back on.

    Raises:
      ValueError: if `keep` is not a positive integer, or in another process than 0.
    """

    def __init__(self, path: str | Path, *, keep: int = 2) -> None:
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers

        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep is {keep!r}; give a positive integer, the number of steps to keep on disk")
        if jax.process_index() != 0:
            raise ValueError(f"process {jax.process_index()} makes a Checkpointer; process 0 saves, the others load")
        self.path = Path(path).expanduser().resolve()
        self.path.mkdir(parents=True, exist_ok=True)
        alone = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0}, barrier_sync_key_prefix="dualgap_jax"
        )
        options = ocp.CheckpointManagerOptions(
            create=False,
            save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
            preservation_policy=checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
            multiprocessing_options=alone if jax.process_count() > 1 else ocp.options.MultiprocessingOptions(),
        )
        self._manager = ocp.CheckpointManager(self.path, options=options)

    def save(self, step: SupportsIndex, state: PyTree, meta: Mapping[str, Any] | None = None) -> None:
        """Saves a state; returns when it is on disk, so that the caller may change or donate its buffers.

        The state is not copied: on CPU its blocks are written from where they lie, from other devices they are fetched
        a few at a time.  Shards of several devices are written one after another.  Saving the same step again replaces
        what is there; the same values again change nothing.

        Args:
          step: the step, >= 0.
          state: a tree of arrays, numbers, typed PRNG keys and `Pieces`.
          meta: what is not an array (epoch, data cursor, schedule): what JSON can hold; infinities and NaN are kept.

        Raises:
          TypeError: for a leaf or a meta entry that cannot be saved.
          ValueError: for a negative step, a bare leaf, paths that read the same, pieces that do not fit together, or
            parts on other processes' devices.
          OSError: if a file cannot be written.
        """
        import orbax.checkpoint as ocp

        from dualgap_jax.checkpoints.orbax_item import BlocksSave

        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step is {step}; give 0 or more")
        named, _ = leaves.flatten(state)
        head = {name: _describe(name, parts, leaf) for name, (parts, leaf) in named.items()}
        rows = {name: leaves.as_rows(name, leaf) for name, (_, leaf) in named.items()}
        plain = _plain_meta(meta or {})

        def record(folder: Path | None) -> dict[str, Any]:
            data = files.write_leaves(folder, rows)
            return files.sign(plain, {name: head[name] | data[name] for name in head})

        try:
            if step in self._manager.all_steps():
                if _holds(self.path / str(step), record(None)):
                    return
                self._manager.delete(step)
            item = BlocksSave(lambda folder: files.write_record(folder, record(folder)))
            self._manager.save(step, args=ocp.args.Composite(**{files.ITEM: item}), force=True)
        finally:
            rows.clear()  # whoever still holds `record` must not hold views: XLA copies a donated buffer that has one

    def restore_latest(self, template: PyTree, place: Place | None = None) -> Restored | None:
        """The newest sound state, or None when there is none.

        Damaged steps that are newer (unreadable, or not what was saved) are passed over: each is logged as a warning
        with the reason, and its folder renamed to `damaged-<step>`, so that it neither hides nor evicts sound ones.

        Args:
          template: a tree like the saved one.  Leaves: arrays, numbers, PRNG keys (their values do not matter),
            `jax.ShapeDtypeStruct`, with `sharding=` to place the leaf there, or `Pieces` of these.  A JAX array gives
            its own placement.  JAX's weak types come back as plain ones.
          place: `(template's leaf, stored) -> leaf`, makes each leaf from what `stored.read` gives; None is
            `like_template`.  It lets DamagedCheckpointError through, upon which the step before is tried.

        Raises:
          CheckpointMismatchError: if the newest sound step has other paths, shapes or dtypes than the template, or is
            in another format.  Nothing is cast.
        """
        moved = False

        def set_aside(step: int, reason: str) -> None:
            nonlocal moved
            target = self.path / f"damaged-{step}"
            n = 1
            while target.exists():
                n += 1
                target = self.path / f"damaged-{step}-{n}"
            (self.path / str(step)).rename(target)
            moved = True
            _log.warning("%s is damaged and not used: %s; moved to %s", self.path / str(step), reason, target.name)

        self._manager.reload()
        try:
            return _newest_sound(self.path, lambda step, record: _restore(step, record, template, place), set_aside)
        finally:
            if moved:
                self._manager.reload()

    def steps(self) -> list[int]:
        """The saved steps, oldest first; whether they are sound shows when they are restored."""
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Frees what Orbax holds."""
        self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _describe(name: str, parts: list[str], leaf: Any) -> dict[str, Any]:
    """What the record keeps of a leaf besides its data."""
    dtype, shape = leaves.kind(name, leaf)
    head: dict[str, Any] = {"path": parts, "dtype": dtype, "shape": list(shape)}
    one = leaf.arrays[0] if isinstance(leaf, Pieces) else leaf
    if leaves.is_key(one):
        head["key"] = {"impl": str(jax.random.key_impl(one))}
    return head


def _plain_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` as JSON gives it back; numbers and arrays of NumPy and JAX become numbers and lists."""

    def convert(x: Any) -> Any:
        if isinstance(x, (np.generic, np.ndarray, jax.Array)) and not leaves.is_key(x):
            return np.asarray(x).tolist()
        raise TypeError(
            f"meta holds a {type(x).__name__} ({x!r:.60}), which JSON cannot hold; arrays go into the state"
        )

    return json.loads(json.dumps(dict(meta), default=convert))


def _holds(step: Path, record: Mapping[str, Any]) -> bool:
    """Whether the step on disk is sound and has this record."""
    try:
        if files.read_record(step)["digest"] != record["digest"]:
            return False
        for stored in _stored(step, record).values():
            stored.verify()
    except (DamagedCheckpointError, CheckpointMismatchError):
        return False
    return True


# --- Reading ----------------------------------------------------------------------------------------------------------


def _newest_sound(
    folder: Path, use: Callable[[Path, dict[str, Any]], _T], damaged: Callable[[int, str], None]
) -> _T | None:
    """`use(step's folder, record)` of the newest step that passes; `damaged(step, reason)` for those passed over."""
    for step in sorted((int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir()), reverse=True):
        try:
            return use(folder / str(step), files.read_record(folder / str(step)))
        except DamagedCheckpointError as error:
            traceback.clear_frames(error.__traceback__)  # which hold, in a cycle, the leaf that was being made
            damaged(step, str(error))
    return None


def _newest_in(path: str | Path, use: Callable[[Path, dict[str, Any]], _T]) -> _T:
    """The same for a folder that is only read.  Raises FileNotFoundError if no step passes."""
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the checkpoints folder of a workdir")
    reasons: list[str] = []

    def passed_over(step: int, reason: str) -> None:
        reasons.append(f"step {step}: {reason}")
        _log.warning("%s is damaged and not used: %s", folder / str(step), reason)

    found = _newest_sound(folder, use, passed_over)
    if found is None:
        detail = "; ".join(reasons) or "no step was saved"
        raise FileNotFoundError(f"{folder} holds no sound checkpoint ({detail}); train first, or give another folder")
    return found


def _stored(step: Path, record: Mapping[str, Any]) -> dict[str, Stored]:
    return {name: Stored(step / files.ITEM, name, leaf) for name, leaf in record["leaves"].items()}


def _nested(record: Mapping[str, Any], get: Callable[[str], Any]) -> dict[str, Any]:
    """Nested dicts of `get(name)`."""
    tree: dict[str, Any] = {}
    for name, leaf in record["leaves"].items():
        node = tree
        for part in leaf["path"][:-1]:
            node = node.setdefault(part, {})
        node[leaf["path"][-1]] = get(name)
    return tree


def _restore(step: Path, record: Mapping[str, Any], template: PyTree | None, place: Place | None) -> Restored:
    stored = _stored(step, record)
    if template is None:
        state = _nested(record, lambda name: place(None, stored[name]) if place else stored[name].whole())
    else:
        named, structure = leaves.flatten(template)
        leaves.check_matches(str(step), record["leaves"], named)
        made = [(place or like_template)(leaf, stored[name]) for name, (_, leaf) in named.items()]
        state = jax.tree.unflatten(structure, made)
    return Restored(int(step.name), state, record["meta"])


def load(path: str | Path, template: PyTree | None = None, place: Place | None = None) -> Restored:
    """Reads the newest sound state of a checkpoint folder, and changes nothing there.

    Args:
      path: the folder given to `Checkpointer` (a workdir's `checkpoints`).
      template: as for `Checkpointer.restore_latest`.  None: nested dicts of NumPy arrays under the names of dict keys,
        fields and positions; PRNG keys come as their raw uint32 data.
      place: as for `Checkpointer.restore_latest`; without a template it gets None for the leaf.

    Raises:
      FileNotFoundError: if the folder does not exist or holds no sound checkpoint.
      CheckpointMismatchError: if the newest sound step is not like the template, or in another format.
    """
    return _newest_in(path, lambda step, record: _restore(step, record, template, place))


class Slices:
    """Some rows of every leaf at a time, from a step on disk; made by `open_slices`.  Safe to use from several threads.

    Rows that are not asked for are not read, but for the rest of their blocks.

    Attributes:
      step: the step it was saved at.
      meta: the dict given to `save`.
      num_rows: the rows that every leaf has.
    """

    def __init__(self, step: Path, record: Mapping[str, Any], template: PyTree | None) -> None:
        stored = _stored(step, record)
        if template is None:
            template = _nested(record, lambda name: jax.ShapeDtypeStruct(stored[name].shape, stored[name].dtype))
            self._as_keys = False
        else:
            leaves.check_matches(str(step), record["leaves"], leaves.flatten(template)[0], whole=False)
            self._as_keys = True
        named, self._structure = leaves.flatten(template)
        self._stored = [stored[name] for name in named]
        shapes = {s.name: s.shape for s in self._stored}
        rows = {shape[:1] for shape in shapes.values()}
        if len(rows) != 1 or rows == {()}:
            shown = ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:8]) or "nothing"
            raise ValueError(f"slices need leaves that lead with the same axis, and {step} gives {shown}")
        self.step = int(step.name)
        self.meta: dict[str, Any] = record["meta"]
        self.num_rows: int = next(iter(rows))[0]

    def read(self, first: int, count: int) -> PyTree:
        """Rows `first, ..., first + count - 1` of every leaf, `[count, ...]`, verified; NumPy arrays and PRNG keys.

        Raises:
          ValueError: if there are no such rows.
          DamagedCheckpointError: if a block is not what was saved, or gone.
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

    At opening, the record is verified and every block is there in full size; the values are verified as they are read.

    Args:
      path: the folder given to `Checkpointer`.
      template: a tree of the leaves wanted, with shapes and dtypes; the checkpoint may hold others.  All lead with the
        same axis.  None: all leaves, in nested dicts, PRNG keys as their raw uint32 data.

    Raises:
      FileNotFoundError: if the folder does not exist or holds no sound checkpoint.
      CheckpointMismatchError: if the newest step does not hold the template's leaves, or is in another format.
      ValueError: if the leaves do not lead with the same axis.
    """
    return _newest_in(path, lambda step, record: Slices(step, record, template))


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
