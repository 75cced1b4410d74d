"""Checkpoints: a tree of arrays on disk, written by Orbax, checked bit by bit when it is read again.

`Checkpointer` saves and restores, `load` reads a folder, `open_slices` and `open_branches` read some rows of every leaf
at a time.  A state of gigabytes is never held twice: not while it is saved, not while it is restored.

A step is an Orbax checkpoint of zarr3 arrays, which `orbax.checkpoint` or TensorStore alone can restore.  They do not
notice a flipped byte or a swapped file.  So a step has a manifest with the SHA-256 of every file, and is restored here
only when its files agree with it; otherwise the log says why, and the step before is taken.  Nothing is cast.

A leaf is named by its path (`params/kernel`).  Containers without leaves (`optax.EmptyState`, None) come from the
template, so a state may be any tree of NamedTuples, dicts, tuples and lists.  Typed PRNG keys are leaves like others;
for Orbax alone they are their uint32 data.

In order: `manifest`, `rows` (of a leaf on disk), `leaves` (from and to devices), `orbax_item`, and the interface here.
"""

from __future__ import annotations

import functools
import logging
import operator
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, TypeVar

import jax

from dualgap_jax.checkpoints import leaves, manifest
from dualgap_jax.checkpoints.leaves import Pieces, Place, like_template, put_rows
from dualgap_jax.checkpoints.manifest import CheckpointMismatchError, DamagedCheckpointError
from dualgap_jax.checkpoints.processes import Company
from dualgap_jax.checkpoints.rows import Stored
from dualgap_jax.files import jsonable
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
_UNFINISHED = ".orbax-checkpoint-tmp"  # how Orbax ends the name of a folder that is not complete


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

    Under `jax.distributed` process 0 alone makes one, or all processes do, on a folder that all of them see: then each
    calls `save` and `restore_latest` when the others do, and writes and reads its own parts.  `load`, `open_slices` and
    `open_branches` wait for no other process.

    Args:
      path: the folder; made when missing.
      keep: how many of the newest steps stay on disk.  At least 2 leaves one to fall back on.
      together: whether all processes of a distributed run make one.

    Raises:
      ValueError: if `keep` is not a positive integer, or in another process than 0 that is not together with it.
    """

    def __init__(self, path: str | Path, *, keep: int = 2, together: bool = False) -> None:
        import orbax.checkpoint as ocp

        from dualgap_jax.checkpoints import orbax_item

        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep is {keep!r}; give a positive integer, the number of steps to keep on disk")
        if jax.process_index() != 0 and not together:
            raise ValueError(f"process {jax.process_index()} makes a Checkpointer alone; give together=True in all")
        self._keep = keep
        self._company = Company(together)
        self.path = Path(path).expanduser().resolve()
        self.path.mkdir(parents=True, exist_ok=True)
        if self._company.is_first:
            for left in self.path.glob(f"*{_UNFINISHED}"):  # by a process that was killed
                shutil.rmtree(left)
        self._leaves = orbax_item.LeafHandler()
        ways = ocp.options.MultiprocessingOptions(
            active_processes=None if together else {0}, barrier_sync_key_prefix=None if together else "dualgap_jax"
        )
        items = {manifest.ITEM: orbax_item.tree_handler(self._leaves), "meta": ocp.JsonCheckpointHandler()}
        options = ocp.CompositeOptions(multiprocessing_options=ways)
        handler = ocp.CompositeCheckpointHandler(composite_options=options, **items)
        self._orbax = ocp.Checkpointer(handler, multiprocessing_options=ways)

    def save(self, step: SupportsIndex, state: PyTree, meta: Mapping[str, Any] | None = None) -> None:
        """Saves a state; returns when it is on disk, so that the caller may change or donate its buffers.

        The state is not copied: on CPU its chunks are written from where they lie, from other devices they are fetched
        a few at a time.  Saving the same step again replaces what is there.

        Args:
          step: the step, >= 0.
          state: a tree of arrays, numbers, typed PRNG keys and `Pieces`.
          meta: what is not an array (epoch, data cursor, schedule): what JSON can hold; infinities and NaN are kept.

        Raises:
          TypeError: for a leaf or a meta entry that cannot be saved.
          ValueError: for a negative step, a state without leaves, a bare leaf, paths that read the same or are no names
            of files, or pieces that do not fit together.
          OSError: if a file cannot be written.
        """
        import orbax.checkpoint as ocp

        from dualgap_jax.checkpoints import orbax_item

        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step is {step}; give 0 or more")
        named, structure = leaves.flatten(state)
        if not named:
            raise ValueError("the state has no leaves; there is nothing to save")
        heads = {name: _describe(name, parts, leaf) for name, (parts, leaf) in named.items()}
        plain = jsonable(meta or {}, where="meta")
        items = {name: orbax_item.Leaf(name, *leaves.data_of(leaf)) for name, (_, leaf) in named.items()}
        folder = self.path / str(step)
        try:
            self._remove([step])
            args = {manifest.ITEM: ocp.args.PyTreeSave(structure.unflatten(items.values()))}
            self._orbax.save(folder, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(plain)))
            digests = self._company.gathered(self._leaves.digests)
            if self._company.is_first:
                described = {name: heads[name] | item.on_disk() for name, item in items.items()}
                manifest.write(folder, described, digests)
        finally:
            for item in items.values():
                item.boxes.clear()  # Orbax may hold the items still, and XLA copies a donated buffer that has a view
        self._remove(self.steps()[: -self._keep])

    def _remove(self, steps: Sequence[int]) -> None:
        self._company.meet("steps are removed")
        for folder in (self.path / str(step) for step in steps if self._company.is_first):
            if folder.exists():  # at first it is no step any more, for a kill may come while its files are removed
                shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.removed{_UNFINISHED}")))
        self._company.meet("steps have been removed")

    def restore_latest(self, template: PyTree, place: Place | None = None) -> Restored | None:
        """The newest sound state, or None when there is none.

        Damaged steps that are newer (unreadable, or not what was saved) are passed over: each is logged as a warning
        with the reason, and its folder renamed to `damaged-<step>`, so that it neither hides nor evicts sound ones.

        Args:
          template: a tree like the saved one.  Leaves: arrays, numbers, PRNG keys (their values do not matter),
            `jax.ShapeDtypeStruct`, with `sharding=` to place the leaf there.  A JAX array gives its own
            placement.  JAX's weak types come back as plain ones.
          place: `(template's leaf, stored) -> leaf`, makes each leaf from what `stored.read` gives; None is
            `like_template`.  It lets DamagedCheckpointError through, upon which the step before is tried.

        Raises:
          CheckpointMismatchError: if the newest sound step has other paths, shapes or dtypes than the template, or is
            in another format.  Nothing is cast.
        """

        def set_aside(step: int, reason: str) -> None:
            if self._company.is_first:
                target = self.path / f"damaged-{step}"
                n = 1
                while target.exists():
                    n += 1
                    target = self.path / f"damaged-{step}-{n}"
                (self.path / str(step)).rename(target)
                _log.warning("%s is damaged and not used: %s; moved to %s", self.path / str(step), reason, target.name)

        self._company.meet("a step is restored")
        use = functools.partial(_restore, template=template, place=place)
        return _newest_sound(self.path, use, set_aside, self._company.all_agree)

    def steps(self) -> list[int]:
        """The saved steps, oldest first; whether they are sound shows when they are restored."""
        return [step for step in _steps_in(self.path) if (self.path / str(step) / manifest.NAME).is_file()]

    def close(self) -> None:
        """Frees what Orbax holds."""
        self._orbax.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _describe(name: str, parts: list[str], leaf: Any) -> dict[str, Any]:
    """What the manifest says of a leaf besides its data."""
    dtype, shape = leaves.kind(name, leaf)
    one = leaf.arrays[0] if isinstance(leaf, Pieces) else leaf
    key_impl = str(jax.random.key_impl(one)) if leaves.is_key(one) else None
    return {"path": parts, "dtype": dtype, "shape": list(shape), "key_impl": key_impl}


# --- Reading ----------------------------------------------------------------------------------------------------------


def _steps_in(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())


def _newest_sound(
    folder: Path,
    use: Callable[[Path, dict[str, Any]], _T],
    damaged: Callable[[int, str], None],
    agree: Callable[[bool], bool] = bool,
) -> _T | None:
    """`use(step's folder, manifest)` of the newest step that passes; `damaged(step, reason)` for those passed over.

    `agree`: whether all who read say yes.
    """
    for step in reversed(_steps_in(folder)):
        reason, found = "", None
        try:
            found = use(folder / str(step), manifest.read(folder / str(step)))
        except DamagedCheckpointError as error:
            traceback.clear_frames(error.__traceback__)  # which hold, in a cycle, the leaf that was being made
            reason = str(error)
        if agree(not reason):
            return found
        found = None
        damaged(step, reason or "another process cannot read its part")
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


def _nested(found: Mapping[str, Any], get: Callable[[str], Any]) -> dict[str, Any]:
    """Nested dicts of `get(name)`."""
    tree: dict[str, Any] = {}
    for name, leaf in found["leaves"].items():
        node = tree
        for part in leaf["path"][:-1]:
            node = node.setdefault(part, {})
        node[leaf["path"][-1]] = get(name)
    return tree


def _restore(step: Path, found: dict[str, Any], template: PyTree | None, place: Place | None) -> Restored:
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
    return _newest_in(path, functools.partial(_restore, template=template, place=place))


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
