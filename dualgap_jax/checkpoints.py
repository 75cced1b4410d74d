"""Checkpoints: a tree of arrays on disk with Orbax, checked bit by bit when it is read again.

Orbax alone restores a damaged data file silently with wrong values, casts silently to the template's dtype, and takes
an empty step folder for the latest step.  Here every leaf is saved with its dtype, shape and BLAKE2b digest, and a step
is restored only when all of them agree; otherwise the log says why, and the step before is taken.

A leaf is named by its path (`params/kernel`).  Containers without leaves (`optax.EmptyState`, None) come from the
template, so a state may be any tree of NamedTuples, dicts, tuples and lists.  Typed PRNG keys are leaves like others.
"""

from __future__ import annotations

import hashlib
import json
import logging
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from dualgap_jax.types import PyTree

_log = logging.getLogger(__name__)

_SHOWN = 8  # leaves listed in an error message


class CheckpointMismatchError(ValueError):
    """A sound checkpoint of another state than the template: other leaves, shapes or dtypes."""


class DamagedCheckpointError(ValueError):
    """A step whose files are missing, unreadable, or not what was saved."""


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


# --- Leaves -----------------------------------------------------------------------------------------------------------


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named_leaves(tree: PyTree) -> dict[str, tuple[list[str], Any]]:
    """Joined path -> (its parts, the leaf).  Raises ValueError for a bare leaf and for paths that read the same."""
    named: dict[str, tuple[list[str], Any]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
        name = "/".join(parts)
        if not parts:
            raise ValueError("the state is a single leaf; put it in a dict, as {'value': leaf}")
        if name in named:
            raise ValueError(f"two leaves of the state read {name!r}; rename one of the keys")
        named[name] = (parts, leaf)
    return named


def _kind(name: str, leaf: Any) -> tuple[str, tuple[int, ...]]:
    """dtype and shape of a leaf, array or template.  Raises TypeError for what is not an array of numbers or keys."""
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        dtype, shape = leaf.dtype, tuple(leaf.shape)
    elif isinstance(leaf, (bool, int, float, complex)):
        dtype, shape = np.asarray(leaf).dtype, ()
    else:
        dtype, shape = None, ()
    if dtype is None or not (_is_key(leaf) or (dtype.kind in "biufcV" and dtype.names is None and dtype.isnative)):
        raise TypeError(
            f"leaf {name!r} is a {type(leaf).__name__} ({leaf!r:.60}); a state holds arrays, numbers and PRNG keys:"
            " put other things into the meta"
        )
    return str(dtype), shape


def _host(name: str, array: Any) -> np.ndarray:
    """The values on this host.  A JAX array keeps no host copy of its own (np.asarray(array) would leave one in it)."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    if not array.is_fully_addressable:
        raise ValueError(f"leaf {name!r} has parts on other processes' devices; gather it before saving")
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    whole = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        whole[shard.index] = np.asarray(shard.data)
    return whole


def _digest(array: np.ndarray) -> str:
    """BLAKE2b-128 of dtype, shape and bytes."""
    digest = hashlib.blake2b(f"{array.dtype}{array.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _plain_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` as JSON gives it back; numbers and arrays of NumPy and JAX become numbers and lists."""

    def convert(x: Any) -> Any:
        if isinstance(x, (np.generic, np.ndarray, jax.Array)) and not _is_key(x):
            return np.asarray(x).tolist()
        raise TypeError(
            f"meta holds a {type(x).__name__} ({x!r:.60}), which JSON cannot hold; arrays go into the state"
        )

    return json.loads(json.dumps(dict(meta), default=convert))


def _text_digest(document: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(document, sort_keys=True).encode(), digest_size=16).hexdigest()


def _like(name: str, leaf: Any, data: np.ndarray, record: Mapping[str, Any]) -> Any:
    """The saved `data` as the template's `leaf` is: Python number, NumPy or JAX array, PRNG key, with its sharding."""
    if isinstance(leaf, (bool, int, float, complex)) and not isinstance(leaf, np.generic):
        return type(leaf)(data.item())
    if isinstance(leaf, np.generic):
        return data[()]
    if isinstance(leaf, np.ndarray):
        return data
    array: Any = jax.random.wrap_key_data(jnp.asarray(data), impl=record["key"]["impl"]) if "key" in record else data
    # An array that JAX placed by itself must stay free to follow the others of a computation.
    placed_by_jax = isinstance(leaf, jax.Array) and not leaf.committed
    array = jax.device_put(array, None if placed_by_jax else leaf.sharding, may_alias=False)
    if str(array.dtype) != record["dtype"]:
        raise CheckpointMismatchError(
            f"leaf {name!r} was saved as {record['dtype']}, which this process turns into {array.dtype};"
            " set JAX_ENABLE_X64=1"
        )
    return array


def _check_matches(where: str, saved: Mapping[str, Any], template: Mapping[str, tuple[list[str], Any]]) -> None:
    """Raises CheckpointMismatchError unless paths, shapes and dtypes are the same."""
    lines = [f"  {name}: in the checkpoint only" for name in saved if name not in template]
    lines += [f"  {name}: in the template only" for name in template if name not in saved]
    for name, (_, leaf) in template.items():
        if name in saved:
            there, asked = (saved[name]["dtype"], tuple(saved[name]["shape"])), _kind(name, leaf)
            if there != asked:
                lines.append(f"  {name}: {there[0]}{list(there[1])} saved, {asked[0]}{list(asked[1])} in the template")
    if lines:
        more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise CheckpointMismatchError(
            "\n".join(
                [
                    f"{where} holds another state than the template:",
                    *lines[:_SHOWN],
                    *more,
                    "Restore with the configuration that it was saved with, or start in another folder",
                ]
            )
        )


# --- Reading one step -------------------------------------------------------------------------------------------------


def _read_document(manager: Any, step: int) -> dict[str, Any]:
    """The verified JSON part of a step.  Raises DamagedCheckpointError."""
    import orbax.checkpoint as ocp

    try:
        document = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        signed = {"meta": document["meta"], "leaves": document["leaves"]}
    except MemoryError:
        raise
    except Exception as error:  # Orbax raises many types here; whatever it is, this step cannot be read
        raise DamagedCheckpointError(f"its meta cannot be read ({type(error).__name__}: {error})") from error
    if document.get("digest") != _text_digest(signed):
        raise DamagedCheckpointError("its meta does not agree with its digest")
    return document


def _read_arrays(manager: Any, step: int, records: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The verified arrays of a step on this host, by joined path.  Raises DamagedCheckpointError."""
    import orbax.checkpoint as ocp

    blank = {name: np.empty(record["data_shape"], record["data_dtype"]) for name, record in records.items()}
    stored = {name: array for name, array in blank.items() if array.size}
    try:
        if stored:
            restore = ocp.args.Composite(state=ocp.args.StandardRestore(stored))
            blank |= manager.restore(step, args=restore).state
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise DamagedCheckpointError(f"its data cannot be read ({type(error).__name__}: {error})") from error
    for name, array in blank.items():
        if _digest(array) != records[name]["digest"]:
            raise DamagedCheckpointError(f"leaf {name!r} does not agree with its digest")
    return blank


def _assemble(arrays: dict[str, np.ndarray], records: Mapping[str, Any], template: PyTree | None) -> PyTree:
    """The state: like the template, or nested dicts.  Empties `arrays`: only one leaf at a time is held twice."""
    if template is not None:
        named = _named_leaves(template).items()
        leaves = [_like(name, leaf, arrays.pop(name), records[name]) for name, (_, leaf) in named]
        return jax.tree.unflatten(jax.tree.structure(template), leaves)
    tree: dict[str, Any] = {}
    for name, record in records.items():
        node = tree
        for part in record["path"][:-1]:
            node = node.setdefault(part, {})
        node[record["path"][-1]] = arrays.pop(name)
    return tree


def _newest_sound(
    manager: Any, path: Path, template: PyTree | None, damaged: Callable[[int, DamagedCheckpointError], None]
) -> Restored | None:
    """The newest step that passes every check; `damaged(step, error)` is called for those passed over."""
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            document = _read_document(manager, step)
            if template is not None:
                _check_matches(str(path / str(step)), document["leaves"], _named_leaves(template))
            arrays = _read_arrays(manager, step, document["leaves"])
        except DamagedCheckpointError as error:
            damaged(step, error)
            continue
        return Restored(step, _assemble(arrays, document["leaves"], template), document["meta"])
    return None


# --- Interface --------------------------------------------------------------------------------------------------------


class Checkpointer:
    """Saves states of one run into a folder, in the background, and restores the newest sound one.

    A context manager: leaving it waits for the save under way.  For one process (which may hold many devices).

    Args:
      path: the folder; made when missing.
      keep: how many of the newest steps stay on disk.  At least 2 leaves one to fall back on.

    Raises:
      ValueError: if `keep` is not a positive integer.
    """

    def __init__(self, path: str | Path, *, keep: int = 2) -> None:
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers

        if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
            raise ValueError(f"keep is {keep!r}; give a positive integer, the number of steps to keep on disk")
        self.path = Path(path).expanduser().resolve()
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
            preservation_policy=checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.path, options=options)

    def save(self, step: SupportsIndex, state: PyTree, meta: Mapping[str, Any] | None = None) -> None:
        """Starts to save; returns when the values are copied, so that the caller may change or donate its buffers.

        Saving the same step again replaces what is there; the same values again change nothing.

        Args:
          step: the step, >= 0.
          state: a tree of arrays, numbers and typed PRNG keys.
          meta: what is not an array (epoch, data cursor, schedule): what JSON can hold; infinities and NaN are kept.

        Raises:
          TypeError: for a leaf or a meta entry that cannot be saved.
          ValueError: for a negative step, a bare leaf, or paths that read the same.
          Exception: the error of the save before, if that failed in the background.
        """
        import orbax.checkpoint as ocp

        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step is {step}; give 0 or more")
        arrays: dict[str, Any] = {}
        records: dict[str, Any] = {}
        for name, (parts, leaf) in _named_leaves(state).items():
            dtype, shape = _kind(name, leaf)
            data = jax.random.key_data(leaf) if _is_key(leaf) else leaf
            host = _host(name, data)
            records[name] = {
                "path": parts,
                "dtype": dtype,
                "shape": list(shape),
                "data_dtype": str(host.dtype),
                "data_shape": list(host.shape),
                "digest": _digest(host),
            }
            if _is_key(leaf):
                records[name]["key"] = {"impl": str(jax.random.key_impl(leaf))}
            if host.size:  # Orbax refuses empty arrays; their shape is in the record
                arrays[name] = data if isinstance(data, jax.Array) else host
        signed = {"meta": _plain_meta(meta or {}), "leaves": records}
        document = {**signed, "digest": _text_digest(signed)}

        self.wait()
        if step in self._manager.all_steps():
            if self._holds(step, document):
                return
            self._manager.delete(step)
        items: dict[str, Any] = {"meta": ocp.args.JsonSave(document)}
        if arrays:
            items["state"] = ocp.args.StandardSave(arrays)
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore_latest(self, template: PyTree) -> Restored | None:
        """The newest sound state, or None when there is none.

        Damaged steps that are newer (unreadable, or not what was saved) are passed over: each is logged as a warning
        with the reason, and its folder renamed to `damaged-<step>`, so that it neither hides nor evicts sound ones.

        Args:
          template: a tree like the saved one.  Leaves: arrays, numbers, PRNG keys (their values do not matter), or
            `jax.ShapeDtypeStruct`, with `sharding=` to place the leaf there.  A JAX array gives its own placement.
            JAX's weak types come back as plain ones.

        Raises:
          CheckpointMismatchError: if the newest sound step has other paths, shapes or dtypes than the template.
            Nothing is cast.
        """
        self.wait()
        self._manager.reload()
        moved = False

        def set_aside(step: int, error: DamagedCheckpointError) -> None:
            nonlocal moved
            target = self.path / f"damaged-{step}"
            n = 1
            while target.exists():
                n += 1
                target = self.path / f"damaged-{step}-{n}"
            (self.path / str(step)).rename(target)
            moved = True
            _log.warning("%s is damaged and not used: %s; moved to %s", self.path / str(step), error, target.name)

        try:
            return _newest_sound(self._manager, self.path, template, set_aside)
        finally:
            if moved:
                self._manager.reload()

    def steps(self) -> list[int]:
        """The saved steps, oldest first; whether they are sound shows when they are restored."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Waits until the save under way is on disk.  Raises its error if it failed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save under way and frees threads.  Raises its error if it failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _holds(self, step: int, document: Mapping[str, Any]) -> bool:
        """Whether the step on disk is sound and the same as `document`."""
        try:
            there = _read_document(self._manager, step)
            if there["digest"] != document["digest"]:
                return False
            _read_arrays(self._manager, step, there["leaves"])
        except DamagedCheckpointError:
            return False
        return True


def load(path: str | Path, template: PyTree | None = None) -> Restored:
    """Reads the newest sound state of a checkpoint folder, and changes nothing there.

    Args:
      path: the folder given to `Checkpointer` (a workdir's `checkpoints`).
      template: as for `Checkpointer.restore_latest`.  None: nested dicts of NumPy arrays under the names of dict keys,
        fields and positions; PRNG keys come as their raw uint32 data.

    Raises:
      FileNotFoundError: if the folder does not exist or holds no sound checkpoint.
      CheckpointMismatchError: if the newest sound step is not like the template.
    """
    import orbax.checkpoint as ocp

    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the checkpoints folder of a workdir")
    options = ocp.CheckpointManagerOptions(read_only=True, create=False, save_interval_steps=0)
    reasons: list[str] = []

    def passed_over(step: int, error: DamagedCheckpointError) -> None:
        reasons.append(f"step {step}: {error}")
        _log.warning("%s is damaged and not used: %s", folder / str(step), error)

    with ocp.CheckpointManager(folder, options=options) as manager:
        restored = _newest_sound(manager, folder, template, passed_over)
    if restored is None:
        detail = "; ".join(reasons) or "no step was saved"
        raise FileNotFoundError(f"{folder} holds no sound checkpoint ({detail}); train first, or give another folder")
    return restored
