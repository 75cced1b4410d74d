"""The Orbax side: arrays of a state, written chunk by chunk into the zarr3 folders that Orbax itself reads.

Orbax's own array handlers write well and copy: a column-wise chunk when saving, a whole shard when restoring.  Here a
leaf goes to TensorStore a few chunks at a time, each a block of whole rows, from where it lies; all else (the tree, the
metadata, making the step appear as a whole) is Orbax's, and whoever has Orbax alone can restore the step.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from dualgap_jax.checkpoints.leaves import Box
from dualgap_jax.checkpoints.manifest import ITEM
from dualgap_jax.checkpoints.rows import chunk_name, num_rows_of, rows_in_chunk

_WRITERS = 4  # while one waits for the disk, another computes a digest


class Leaf:
    """What Orbax sees of an array: no tree, and nothing that could be copied.

    Attributes:
      name: the path as messages give it.
      shape: of the whole.
      dtype: of the data, a NumPy dtype.
      boxes: the parts that this process writes; all processes together write each element once.
      folder: where Orbax put it; set when it is written.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype, boxes: list[Box]) -> None:
        self.name, self.shape, self.dtype, self.boxes = name, shape, dtype, boxes
        self.folder = ""

    def on_disk(self) -> dict[str, Any]:
        """What the manifest says of the data."""
        at_once = rows_in_chunk(self.shape, self.dtype)
        chunks = range(0 if 0 in self.shape else -(-num_rows_of(self.shape) // at_once))
        return {
            "data_dtype": str(self.dtype),
            "data_shape": list(self.shape),
            "rows_in_chunk": at_once,
            "chunks": [f"{ITEM}/{self.folder}/{chunk_name(chunk, len(self.shape))}" for chunk in chunks],
        }


class LeafHandler(ocp.type_handlers.NumpyHandler):
    """Writes `Leaf`s; what it inherits reads them again as NumPy arrays, as Orbax alone does.

    Attributes:
      digests: path below the step -> size and SHA-256, of the chunks that this process last wrote as a whole.
    """

    def __init__(self) -> None:
        super().__init__()
        self.digests: dict[str, list[Any]] = {}

    async def serialize(
        self, values: Sequence[Leaf], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Writes all leaves once Orbax has made the folder; the future ends when they are on disk."""
        return [ocp.future.CommitFutureAwaitingContractedSignals(self._write(values, infos), name="leaves")]

    async def _write(self, values: Sequence[Leaf], infos: Sequence[Any]) -> None:
        self.digests = {}
        for leaf, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            leaf.folder = info.name
        with ThreadPoolExecutor(_WRITERS) as pool:
            parts = (part for leaf, info in zip(values, infos, strict=True) for part in _parts(leaf, Path(info.path)))
            under_way = [pool.submit(_write_rows, *part) for part in parts]
            try:
                for written in under_way:
                    self.digests |= written.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


class _Trees(ocp.BasePyTreeCheckpointHandler):
    def finalize(self, directory: Any) -> None:
        """Nothing to do: Orbax's own merges databases that are not used here, and warns that there are none."""


def tree_handler(leaves: LeafHandler) -> ocp.PyTreeCheckpointHandler:
    """Orbax's own handler of trees, for trees of `Leaf`s."""
    handlers = ocp.type_handlers
    registry = handlers.create_type_handler_registry((Leaf, leaves), (jax.Array, handlers.ArrayHandler()))
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=True,
        type_handler_registry=registry,
        handler_impl=_Trees(use_ocdbt=False, use_zarr3=True, type_handler_registry=registry),
    )


def _parts(leaf: Leaf, folder: Path) -> Iterator[tuple[Any, ...]]:
    """Arguments of the calls that write a leaf: each box, chunk by chunk."""
    at_once, num_rows = rows_in_chunk(leaf.shape, leaf.dtype), num_rows_of(leaf.shape)
    grid = (at_once, *(max(1, n) for n in leaf.shape[1:]))[: len(leaf.shape)]
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": {
            "shape": leaf.shape,
            "data_type": str(leaf.dtype),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        },
        "store_data_equal_to_fill_value": True,
    }
    try:
        store = ts.open(spec, open=True, create=True).result()
    except ValueError as error:
        raise _cannot_write(leaf, error) from error
    for box in leaf.boxes:
        if 0 in box.shape:
            continue
        first, rows = (box.start or (0,))[0], num_rows_of(box.shape)
        columns = tuple(slice(a, a + n) for a, n in zip(box.start[1:], box.shape[1:], strict=True))
        for chunk in range(first // at_once, (first + rows - 1) // at_once + 1):
            start, stop = max(first, chunk * at_once), min(first + rows, (chunk + 1) * at_once)
            alone = box.shape[1:] == leaf.shape[1:] and stop - start == min(at_once, num_rows - chunk * at_once)
            target = store[(slice(start, stop), *columns)] if leaf.shape else store
            name = chunk_name(chunk, len(leaf.shape)) if alone else None
            yield leaf, target, box, start - first, stop - start, folder, name


def _write_rows(
    leaf: Leaf, target: ts.TensorStore, box: Box, first: int, count: int, folder: Path, chunk: str | None
) -> dict[str, list[Any]]:
    """Writes some rows of a box, and takes the digest of the chunk if they are all of it."""
    rows = box.read(first, count).reshape(target.shape)
    try:
        target.write(rows, can_reference_source_data_indefinitely=True).result()
    except ValueError as error:
        raise _cannot_write(leaf, error) from error
    if chunk is None:
        return {}
    with (folder / chunk).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return {f"{ITEM}/{leaf.folder}/{chunk}": [len(data), hashlib.sha256(data).hexdigest()]}


def _cannot_write(leaf: Leaf, error: ValueError) -> Exception:
    """TensorStore's error, an OSError where the system refused."""
    text = f"leaf {leaf.name!r} cannot be written: {str(error).partition(' [tensorstore_spec=')[0]}"
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(code[1]), text) if code else ValueError(text)
