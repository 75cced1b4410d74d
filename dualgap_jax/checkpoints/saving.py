"""`Checkpointer`: saves the states of one run, keeps the newest, and sets damaged ones aside when it restores."""

from __future__ import annotations

import functools
import logging
import operator
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import jax

from dualgap_jax.checkpoints import leaves, manifest
from dualgap_jax.checkpoints.leaves import Pieces, Place
from dualgap_jax.checkpoints.processes import Company
from dualgap_jax.checkpoints.reading import Restored, newest_sound, restore, steps_in
from dualgap_jax.files import jsonable, local_folder
from dualgap_jax.types import PyTree

_log = logging.getLogger(__package__)
_UNFINISHED = ".orbax-checkpoint-tmp"  # how Orbax ends the name of a folder that is not complete
_SAID_TWICE = "_SignalingThread.run() raised an exception"  # by Orbax, of an error that it raises, too


def _is_said_once(record: logging.LogRecord) -> bool:
    """Whether a line of a log is not the traceback of an error that comes out of `save` anyway."""
    return _SAID_TWICE not in str(record.msg)


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
      ConfigError: for a remote folder, and where a file has its name.
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
        self.path = local_folder(path, "the folder of checkpoints")
        if self._company.is_first:
            self.path.mkdir(parents=True, exist_ok=True)
            for left in self.path.glob(f"*{_UNFINISHED}"):  # by a process that was killed
                shutil.rmtree(left)
        self._company.meet("the folder is made")
        self._leaves = orbax_item.LeafHandler()
        logging.getLogger("absl").addFilter(_is_said_once)
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
        use = functools.partial(restore, template=template, place=place)
        return newest_sound(self.path, use, set_aside, self._company)

    def steps(self) -> list[int]:
        """The saved steps, oldest first; whether they are sound shows when they are restored."""
        return [step for step in steps_in(self.path) if (self.path / str(step) / manifest.NAME).is_file()]

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
