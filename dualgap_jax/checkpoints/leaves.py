"""The leaves of a state: their names and kinds, their rows on the host, and their way back onto devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import ArrayLike

from dualgap_jax.checkpoints.manifest import CheckpointMismatchError
from dualgap_jax.checkpoints.rows import Stored
from dualgap_jax.types import PyTree

_SHOWN = 8  # leaves listed in an error message
_IN_HOST_MEMORY = {"cpu"}  # platforms whose arrays NumPy can view

Place = Callable[[Any, Stored], Any]


class Pieces(NamedTuple):
    """A leaf given as pieces along axis 0; it is stored as one leaf, and nothing is concatenated in memory.

    Attributes:
      arrays: NumPy arrays or JAX arrays, of one dtype and one shape but for axis 0.
      firsts: the first row of each; None: one comes after the other.
      num_rows: of the leaf; None: what the pieces have.  With several processes each one gives the pieces that it
        holds, with `firsts` and `num_rows`.
    """

    arrays: Sequence[Any]
    firsts: Sequence[int] | None = None
    num_rows: int | None = None


class Box(NamedTuple):
    """A part of a leaf that this process holds in one place.

    Attributes:
      start: its first index on each axis.
      shape: its size.
      read: `(first, count) -> [count, ...]`, rows of it counted from `start`; called from several threads; a view where
        that is possible.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    read: Callable[[int, int], np.ndarray]


def is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def flatten(tree: PyTree) -> tuple[dict[str, tuple[list[str], Any]], Any]:
    """Joined path -> (its parts, the leaf), and the structure; `Pieces` are leaves.

    Raises:
      ValueError: for a bare leaf, and for paths that read the same or are no names of files.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, Pieces))
    named: dict[str, tuple[list[str], Any]] = {}
    folders: set[str] = set()
    for path, leaf in leaves:
        parts = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
        name = "/".join(parts)
        if not parts:
            raise ValueError("the state is a single leaf; put it in a dict, as {'value': leaf}")
        folder = ".".join(parts)  # what Orbax makes of them
        if name in named or folder in folders:
            raise ValueError(
                f"two leaves of the state read {name!r} or are stored as {folder!r}; rename one of the keys"
            )
        if "" in parts or "\0" in folder or {"", ".", ".."} & set(folder.split("/")):
            raise ValueError(f"leaf {name!r} has a key that is no name of a file; rename it")
        named[name] = (parts, leaf)
        folders.add(folder)
    return named, structure


def kind(name: str, leaf: Any) -> tuple[str, tuple[int, ...]]:
    """dtype and shape of a leaf, array or template.

    Raises:
      TypeError: for what is not an array of numbers or keys.
      ValueError: for pieces that do not fit together.
    """
    if isinstance(leaf, Pieces):
        kinds = [kind(name, piece) for piece in leaf.arrays]
        if len({(dtype, shape[1:]) for dtype, shape in kinds}) != 1 or not all(shape for _, shape in kinds):
            raise ValueError(f"leaf {name!r}: pieces {kinds!r:.200} do not fit together along axis 0")
        rows = sum(shape[0] for _, shape in kinds) if leaf.num_rows is None else leaf.num_rows
        return kinds[0][0], (rows, *kinds[0][1][1:])
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        dtype, shape = leaf.dtype, tuple(leaf.shape)
    elif isinstance(leaf, (bool, int, float, complex)):
        dtype, shape = np.asarray(leaf).dtype, ()
    else:
        dtype, shape = None, ()
    if dtype is None or not (is_key(leaf) or (dtype.kind in "biufcV" and dtype.names is None and dtype.isnative)):
        raise TypeError(
            f"leaf {name!r} is a {type(leaf).__name__} ({leaf!r:.60}); a state holds arrays, numbers and PRNG keys:"
            " put other things into the meta"
        )
    return str(dtype), shape


def check_matches(
    where: str, saved: Mapping[str, Any], template: Mapping[str, tuple[list[str], Any]], *, whole: bool = True
) -> None:
    """Raises CheckpointMismatchError unless paths, shapes and dtypes are the same; not `whole`: of the template's."""
    lines = [f"  {name}: in the checkpoint only" for name in saved if whole and name not in template]
    lines += [f"  {name}: in the template only" for name in template if name not in saved]
    for name, (_, leaf) in template.items():
        if name in saved:
            there, asked = (saved[name]["dtype"], tuple(saved[name]["shape"])), kind(name, leaf)
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


# --- To the host ------------------------------------------------------------------------------------------------------


def data_of(leaf: Any) -> tuple[tuple[int, ...], np.dtype, list[Box]]:
    """Shape and dtype of the leaf's data, and the boxes of it that this process has to write, as they lie on devices.

    Of what several devices or processes hold, one has the duty.
    """
    arrays = leaf.arrays if isinstance(leaf, Pieces) else [leaf]
    data = [jax.random.key_data(array) if is_key(array) else array for array in arrays]
    data = [array if isinstance(array, jax.Array) else np.asarray(array) for array in data]
    shape, dtype = data[0].shape, np.dtype(data[0].dtype)
    if not isinstance(leaf, Pieces):
        return shape, dtype, _boxes(data[0], 0)
    firsts = leaf.firsts or np.cumsum([0, *(len(array) for array in data[:-1])]).tolist()
    rows = sum(len(array) for array in data) if leaf.num_rows is None else leaf.num_rows
    boxes = [
        box
        for array, first in zip(data, firsts, strict=True)
        for box in _boxes(array, first, mine=leaf.num_rows is not None)
    ]
    return (rows, *shape[1:]), dtype, boxes


def _boxes(array: np.ndarray | jax.Array, first: int, *, mine: bool = False) -> list[Box]:
    """The boxes of an array whose rows are rows `first, first + 1, ...` of a leaf; `mine`: no other process has it."""
    local = not isinstance(array, jax.Array) or array.is_fully_addressable
    if local and not mine and jax.process_index() > 0:
        return []
    if not isinstance(array, jax.Array):
        return [_box(array, (slice(None),) * array.ndim, array.shape, first)]
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    return [_box(shard.data, shard.index, array.shape, first) for shard in shards]


def _box(data: np.ndarray | jax.Array, index: tuple[slice, ...], shape: tuple[int, ...], first: int) -> Box:
    start = [axis.indices(n)[0] for axis, n in zip(index, shape, strict=True)]
    if start:
        start[0] += first
    return Box(tuple(start), data.shape, _reader(data))


def _reader(array: np.ndarray | jax.Array) -> Callable[[int, int], np.ndarray]:
    """Reads rows of an array on one device: views of it in host memory, else fetched.

    A JAX array is a handle made for this: NumPy's view stays with it, and the caller's array remains free to be
    donated.
    """
    if array.ndim == 0 or not isinstance(array, jax.Array) or next(iter(array.devices())).platform in _IN_HOST_MEMORY:
        view = np.asarray(array)
        rows = view.reshape(1) if view.ndim == 0 else view
        return lambda first, count: rows[first : first + count]
    x64 = bool(jax.dtypes.canonicalize_dtype(np.float64) == np.float64)

    def read(first: int, count: int) -> np.ndarray:
        with jax.enable_x64(x64):  # holds in one thread only
            return np.asarray(_take_rows(array, first, count))

    return read


@jax.jit(static_argnames="count")
def _take_rows(array: jax.Array, first: ArrayLike, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, first, count)


# --- And back ---------------------------------------------------------------------------------------------------------


def like_template(leaf: Any, stored: Stored) -> Any:
    """The stored leaf as the template's `leaf` is: Python number, NumPy or JAX array, PRNG keys.

    JAX arrays get the template's sharding.  They are filled chunk by chunk where they lie, and their memory is JAX's
    own, so that they exist once and can be donated.

    Raises:
      DamagedCheckpointError: if a chunk is not what was saved.
      CheckpointMismatchError: if JAX does not hold the dtype.
    """
    if isinstance(leaf, np.ndarray):
        return stored.whole()
    if isinstance(leaf, np.generic):
        return stored.whole()[()]
    if isinstance(leaf, (bool, int, float, complex)):
        return type(leaf)(stored.whole().item())
    held = jax.dtypes.canonicalize_dtype(stored.dtype)
    if held != stored.dtype:
        raise CheckpointMismatchError(
            f"leaf {stored.name!r} was saved as {stored.dtype}, which this process turns into {held};"
            " set JAX_ENABLE_X64=1"
        )
    # An array that JAX placed by itself must stay free to follow the others of a computation.
    sharding = None if isinstance(leaf, jax.Array) and not leaf.committed else leaf.sharding
    if stored.key_impl is not None:
        keys = jax.random.wrap_key_data(jnp.array(stored.whole()), impl=stored.key_impl)
        if sharding is None or sharding.is_fully_addressable:
            return jax.device_put(keys, sharding)
        return jax.make_array_from_callback(keys.shape, sharding, lambda index: keys[index])
    shape = stored.shape
    if sharding is None:
        return _fill(stored, tuple((0, n) for n in shape), [None])[0]
    wanted: dict[tuple[tuple[int, int], ...], list[Sharding | None]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(axis.indices(n)[:2] for axis, n in zip(index or (), shape, strict=True))
        wanted.setdefault(bounds, []).append(SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
    shards = [shard for bounds, places in wanted.items() for shard in _fill(stored, bounds, places)]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _fill(stored: Stored, bounds: tuple[tuple[int, int], ...], places: Sequence[Sharding | None]) -> list[jax.Array]:
    """The part of the leaf within `bounds` (start and stop on each axis), on each device.

    Only a leaf of one chunk is put there as a whole: with `jnp.array`, which gives it memory of JAX's own, where
    `jax.device_put` takes over NumPy's on CPU if it is aligned, `may_alias=False` or not.
    """
    if not bounds:
        return [jnp.array(stored.whole(), device=place) for place in places]
    (first, stop), columns = bounds[0], tuple(slice(*b) for b in bounds[1:])
    if stored.num_chunks(first, stop - first) <= 1:
        host = stored.read(first, stop - first)[:, *columns]
        return [jnp.array(host, device=place) for place in places]
    arrays = [jnp.zeros([b - a for a, b in bounds], stored.dtype, device=place) for place in places]
    for start, rows in stored.in_blocks(first, stop - first):
        arrays = [put_rows(array, rows[:, *columns], start - first) for array in arrays]
        jax.block_until_ready(arrays)  # the rows' memory is used again
    return arrays


@jax.jit(donate_argnums=0)
def put_rows(array: jax.Array, rows: ArrayLike, first: ArrayLike) -> jax.Array:
    """`array` with `rows` in place of its rows `first, first + 1, ...`; its memory is taken over."""
    return jax.lax.dynamic_update_slice_in_dim(array, rows, first, axis=0)
