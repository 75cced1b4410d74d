"""The leaves of a state: their names and kinds, their rows on the host, and their way back onto devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import ArrayLike

from dualgap_jax.checkpoints.files import CheckpointMismatchError, Leaf, Rows, Stored
from dualgap_jax.types import PyTree

_SHOWN = 8  # leaves listed in an error message
_IN_HOST_MEMORY = {"cpu"}  # platforms whose arrays NumPy can view

Place = Callable[[Any, Stored], Any]


class Pieces(NamedTuple):
    """A leaf given as consecutive pieces along axis 0; it is stored as one leaf, and nothing is concatenated in memory.

    Attributes:
      arrays: NumPy arrays or JAX arrays, of one dtype and one shape but for axis 0.
    """

    arrays: Sequence[Any]


def is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def flatten(tree: PyTree) -> tuple[dict[str, tuple[list[str], Any]], Any]:
    """Joined path -> (its parts, the leaf), and the structure; `Pieces` are leaves.

    Raises:
      ValueError: for a bare leaf and for paths that read the same.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, Pieces))
    named: dict[str, tuple[list[str], Any]] = {}
    for path, leaf in leaves:
        parts = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
        name = "/".join(parts)
        if not parts:
            raise ValueError("the state is a single leaf; put it in a dict, as {'value': leaf}")
        if name in named:
            raise ValueError(f"two leaves of the state read {name!r}; rename one of the keys")
        named[name] = (parts, leaf)
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
        return kinds[0][0], (sum(shape[0] for _, shape in kinds), *kinds[0][1][1:])
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


def as_rows(name: str, leaf: Any) -> Leaf:
    """The leaf's data as rows on this host, piece by piece as they lie on the devices.

    Raises:
      ValueError: if another process holds a part.
    """
    arrays = leaf.arrays if isinstance(leaf, Pieces) else [leaf]
    data = [jax.random.key_data(array) if is_key(array) else array for array in arrays]
    data = [array if isinstance(array, jax.Array) else np.asarray(array) for array in data]
    shape = data[0].shape
    if isinstance(leaf, Pieces):
        shape = (sum(array.shape[0] for array in data), *shape[1:])
    return Leaf(shape, np.dtype(data[0].dtype), [rows for array in data for rows in _rows(name, array)])


def _rows(name: str, array: np.ndarray | jax.Array) -> list[Rows]:
    if not isinstance(array, jax.Array):
        rows = array.reshape(1) if array.ndim == 0 else array
        return [Rows(rows.shape[0], lambda first, count: rows[first : first + count])]
    if array.is_fully_replicated:
        return [_device_rows(array.addressable_data(0))]
    if not array.is_fully_addressable:
        raise ValueError(f"leaf {name!r} has parts on other processes' devices; gather it before saving")
    shards: dict[tuple[int, int], list[tuple[tuple[slice, ...], Rows]]] = {}
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            start, stop, _ = shard.index[0].indices(array.shape[0])
            shards.setdefault((start, stop), []).append((shard.index[1:], _device_rows(shard.data)))
    return [_side_by_side(stop - start, array, shards[start, stop]) for start, stop in sorted(shards)]


def _side_by_side(count: int, array: jax.Array, parts: list[tuple[tuple[slice, ...], Rows]]) -> Rows:
    """The rows of shards that hold the same rows and other columns."""
    if len(parts) == 1:
        return parts[0][1]
    columns, dtype = array.shape[1:], array.dtype

    def read(first: int, count: int) -> np.ndarray:
        out = np.empty((count, *columns), dtype)
        for index, rows in parts:
            out[:, *index] = rows.read(first, count)
        return out

    return Rows(count, read)


def _device_rows(array: jax.Array) -> Rows:
    """Rows of an array on one device: views of it in host memory, else fetched.

    `array` is a handle made for this: NumPy's view stays with it, and the caller's array remains free to be donated.
    """
    (device,) = array.devices()
    if device.platform in _IN_HOST_MEMORY:
        view = np.asarray(array)
        rows = view.reshape(1) if view.ndim == 0 else view
        return Rows(rows.shape[0], lambda first, count: rows[first : first + count])
    if array.ndim == 0:
        return Rows(1, lambda first, count: np.asarray(array).reshape(1)[first : first + count])
    x64 = bool(jax.dtypes.canonicalize_dtype(np.float64) == np.float64)

    def read(first: int, count: int) -> np.ndarray:
        with jax.enable_x64(x64):  # holds in one thread only
            return np.asarray(_take_rows(array, first, count))

    return Rows(array.shape[0], read)


@jax.jit(static_argnames="count")
def _take_rows(array: jax.Array, first: ArrayLike, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, first, count)


# --- And back ---------------------------------------------------------------------------------------------------------


def like_template(leaf: Any, stored: Stored) -> Any:
    """The stored leaf as the template's `leaf` is: Python number, NumPy or JAX array, PRNG keys, `Pieces`.

    JAX arrays get the template's sharding.  They are filled block by block where they lie, and their memory is JAX's
    own, so that they exist once and can be donated.

    Raises:
      DamagedCheckpointError: if a block is not what was saved.
      CheckpointMismatchError: if JAX does not hold the dtype.
    """
    if isinstance(leaf, Pieces):
        return Pieces(_pieces_like(leaf, stored))
    if isinstance(leaf, (bool, int, float, complex)) and not isinstance(leaf, np.generic):
        return type(leaf)(stored.whole().item())
    if isinstance(leaf, np.generic):
        return stored.whole()[()]
    if isinstance(leaf, np.ndarray):
        return stored.whole()
    return _on_devices(leaf, stored, 0, None)


def _pieces_like(leaf: Pieces, stored: Stored) -> list[Any]:
    arrays, first = [], 0
    for piece in leaf.arrays:
        count = piece.shape[0]
        on_host = isinstance(piece, np.ndarray)
        arrays.append(stored.read(first, count) if on_host else _on_devices(piece, stored, first, count))
        first += count
    return arrays


def _on_devices(leaf: Any, stored: Stored, first: int, count: int | None) -> jax.Array:
    """Rows `first, ..., first + count - 1` (None: all), placed like `leaf`."""
    held = jax.dtypes.canonicalize_dtype(stored.dtype)
    if held != stored.dtype:
        raise CheckpointMismatchError(
            f"leaf {stored.name!r} was saved as {stored.dtype}, which this process turns into {held};"
            " set JAX_ENABLE_X64=1"
        )
    # An array that JAX placed by itself must stay free to follow the others of a computation.
    placed_by_jax = isinstance(leaf, jax.Array) and not leaf.committed
    sharding: Sharding | None = None if placed_by_jax else leaf.sharding
    shape = stored.shape if count is None else (count, *stored.shape[1:])
    if stored.key_impl is not None:
        data = stored.read(first, shape[0]) if count is not None else stored.whole()
        keys = jax.random.wrap_key_data(jnp.array(data), impl=stored.key_impl)
        if sharding is None or sharding.is_fully_addressable:
            return jax.device_put(keys, sharding)
        return jax.make_array_from_callback(keys.shape, sharding, lambda index: keys[index])
    if sharding is None:
        return _fill(stored, first, [(0, n) for n in shape], [None])[0]
    wanted: dict[tuple[tuple[int, int], ...], list[Sharding | None]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape, strict=True))
        wanted.setdefault(bounds, []).append(SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
    shards = [shard for bounds, places in wanted.items() for shard in _fill(stored, first, bounds, places)]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _fill(
    stored: Stored, offset: int, bounds: Sequence[tuple[int, int]], places: Sequence[Sharding | None]
) -> list[jax.Array]:
    """The part of the leaf within `bounds` (start and stop on each axis, rows counted from `offset`), on each device.

    Only a leaf of one block is put there as a whole: with `jnp.array`, which gives it memory of JAX's own, where
    `jax.device_put` takes over NumPy's on CPU if it is aligned, `may_alias=False` or not.
    """
    shape = tuple(stop - start for start, stop in bounds)
    if not shape:
        return [jnp.array(stored.whole(), device=place) for place in places]
    first = offset + bounds[0][0]
    columns = tuple(slice(*b) for b in bounds[1:])
    if stored.num_blocks(first, shape[0]) <= 1:
        host = stored.read(first, shape[0])[:, *columns]
        return [jnp.array(host, device=place) for place in places]
    arrays = [jnp.zeros(shape, stored.dtype, device=place) for place in places]
    for start, rows in stored.in_blocks(first, shape[0]):
        for k in range(len(arrays)):
            arrays[k] = put_rows(arrays[k], rows[:, *columns], start - first)
        jax.block_until_ready(arrays)  # the rows' memory is used again
    return arrays


@jax.jit(donate_argnums=0)
def put_rows(array: jax.Array, rows: ArrayLike, first: ArrayLike) -> jax.Array:
    """`array` with `rows` in place of its rows `first, first + 1, ...`; its memory is taken over."""
    return jax.lax.dynamic_update_slice_in_dim(array, rows, first, axis=0)
