"""Blocks of rows in files, and the signed record of them.  NumPy only: nothing here knows of devices or of Orbax.

A leaf is cut along axis 0 into blocks of at most `BLOCK_BYTES` (or one row, where a row is larger).  Each block is a
`.npy` file, and its digest is the SHA-256 of the file, as `sha256sum` prints it.  The record names the leaves, their
shapes, dtypes, blocks and digests, and carries the caller's meta; its own digest covers everything else in it.

Rows go from the array to the file and back with no copy between, and with a few blocks in flight.  SHA-256 because
processors compute it in hardware (1.8 GB/s on one core where BLAKE2b gives 0.7).  No compression: zstd takes 8 % off
random float32 weights, makes reading cost three times as much, and its blocks could not be read into place.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import operator
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BLOCK_BYTES = 16 << 20
FORMAT = 2
RECORD = "record.json"
ITEM = "state"  # the folder of a step that holds record and blocks

WORKERS = min(4, os.cpu_count() or 1)
_HEADER_BYTES = 4096  # more than any .npy header of a block


class CheckpointMismatchError(ValueError):
    """A sound checkpoint of another state than the template (other leaves, shapes or dtypes), or in another format."""


class DamagedCheckpointError(ValueError):
    """A step whose files are missing, unreadable, or not what was saved."""


# --- Writing ----------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Consecutive rows of a leaf that lie together.

    Attributes:
      num_rows: how many.
      read: `(first, count) -> [count, ...]`, called from several threads; a view where that is possible.
    """

    num_rows: int
    read: Callable[[int, int], np.ndarray]


class Leaf(NamedTuple):
    """What is to be written: the shape and dtype of the data, and the rows (a scalar is one row)."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Sequence[Rows]


def write_leaves(folder: Path | None, leaves: Mapping[str, Leaf]) -> dict[str, dict[str, Any]]:
    """Writes the blocks of all leaves; returns for each what the record keeps of its data.

    Args:
      folder: where the files go, or None to compute the digests only.
      leaves: by name.
    """
    described: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(WORKERS) as pool:
        under_way: list[tuple[list[Any], int, Future[str]]] = []
        for number, (name, leaf) in enumerate(leaves.items()):
            blocks: list[Any] = []
            described[name] = {
                "data_dtype": str(leaf.dtype),
                "data_shape": list(leaf.shape),
                "file": f"{number:04d}",
                "blocks": blocks,
            }
            at_once = max(1, BLOCK_BYTES // max(1, _row_bytes(leaf.shape, leaf.dtype)))
            block = 0
            for rows in leaf.rows if 0 not in leaf.shape else ():
                for first in range(0, rows.num_rows, at_once):
                    count = min(at_once, rows.num_rows - first)
                    path = None if folder is None else folder / _file_name(f"{number:04d}", block)
                    under_way.append((blocks, count, pool.submit(_write_block, path, rows.read, first, count)))
                    block += 1
        try:
            for blocks, count, future in under_way:
                blocks.append([count, future.result()])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return described


def _row_bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    return int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize


def _file_name(stem: str, block: int) -> str:
    return f"{stem}-{block:05d}.npy"


def _bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def _write_block(path: Path | None, read: Callable[[int, int], np.ndarray], first: int, count: int) -> str:
    """Writes some rows into a file that does not exist yet; returns the file's digest."""
    rows = np.ascontiguousarray(read(first, count))
    by_name = np.dtype(rows.dtype.str) == rows.dtype  # not so for bfloat16 and its kin, which .npy holds as raw bytes
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer,
        {
            "descr": rows.dtype.str if by_name else f"|V{rows.dtype.itemsize}",
            "fortran_order": False,
            "shape": rows.shape,
        },
    )
    data = _bytes_of(rows)
    digest = hashlib.sha256(buffer.getbuffer())
    digest.update(data)
    if path is not None:
        with path.open("xb", buffering=0) as file:
            for part in (buffer.getbuffer(), data):
                written = 0
                while written < len(part):
                    written += file.write(part[written:])
            os.fsync(file.fileno())
    return digest.hexdigest()


# --- The record -------------------------------------------------------------------------------------------------------


def sign(meta: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a step with its digest."""
    signed = {"format": FORMAT, "meta": meta, "leaves": leaves}
    return {**signed, "digest": _text_digest(signed)}


def _text_digest(document: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(document, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    with (folder / RECORD).open("x", encoding="utf-8") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())


def read_record(step: Path) -> dict[str, Any]:
    """The verified record of a step's folder, all of whose blocks are there in the right size.

    Raises:
      DamagedCheckpointError: if that is not so.
      CheckpointMismatchError: if the step is sound and in another format.
    """
    path, before = step / ITEM / RECORD, step / "meta" / "metadata"
    try:
        # Format 1 kept its record elsewhere.
        text = (before if before.is_file() and not path.exists() else path).read_text(encoding="utf-8")
        record = json.loads(text)
        signed = {key: value for key, value in record.items() if key != "digest"}
        sound = record["digest"] == _text_digest(signed)
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise DamagedCheckpointError(f"its record cannot be read ({type(error).__name__}: {error})") from error
    if not sound:
        raise DamagedCheckpointError("its record does not agree with its digest")
    found = record.get("format", 1)
    if found != FORMAT:
        raise CheckpointMismatchError(
            f"{step} is a checkpoint in format {found}, and this version reads format {FORMAT};"
            " read it with the version that wrote it, or start in another folder"
        )
    for name, leaf in record["leaves"].items():
        _check_sizes(Stored(step / ITEM, name, leaf))
    return record


def _check_sizes(stored: Stored) -> None:
    for block in stored.blocks:
        try:
            size = block.path.stat().st_size
        except OSError as error:
            raise DamagedCheckpointError(f"leaf {stored.name!r} cannot be read ({error})") from error
        if not 0 < size - block.num_rows * stored.row_bytes <= _HEADER_BYTES:
            raise DamagedCheckpointError(f"leaf {stored.name!r}: {block.path.name} has {size} bytes")


# --- Reading ----------------------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    first: int
    num_rows: int
    path: Path
    digest: str


@functools.cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(WORKERS, thread_name_prefix="checkpoint-reader")


class Stored:
    """One leaf of a checkpoint on disk.  Only the blocks that hold the rows asked for are read; all are verified.

    The block that a read ended in is kept, so that reading slice after slice takes each block from disk once.  Safe to
    use from several threads.

    Attributes:
      name: the leaf's path, `params/kernel`.
      shape: of the data.  A scalar counts as one row, read as `[1]`.
      dtype: of the data, a NumPy dtype.
      num_rows: size of axis 0; 1 for a scalar.
      key_impl: for PRNG keys the name of their implementation, else None.  Their data are uint32 with one more axis.
    """

    def __init__(self, folder: Path, name: str, record: Mapping[str, Any]) -> None:
        self.name = name
        self.shape: tuple[int, ...] = tuple(record["data_shape"])
        self.dtype = np.dtype(record["data_dtype"])
        self.num_rows = (self.shape or (1,))[0]
        self.key_impl: str | None = record["key"]["impl"] if "key" in record else None
        self.row_bytes = _row_bytes(self.shape, self.dtype)
        self.blocks: list[_Block] = []
        first = 0
        for number, (count, digest) in enumerate(record["blocks"]):
            self.blocks.append(_Block(first, count, folder / _file_name(record["file"], number), digest))
            first += count
        self._held: tuple[_Block, np.ndarray] | None = None
        self._lock = threading.Lock()

    def read(self, first: int, count: int) -> np.ndarray:
        """Rows `first, ..., first + count - 1`: a new array `[count, ...]`.

        Raises:
          ValueError: if the leaf has no such rows.
          DamagedCheckpointError: if a block is not what was saved.
        """
        first, count = operator.index(first), operator.index(count)
        if first < 0 or count < 0 or first + count > self.num_rows:
            raise ValueError(
                f"leaf {self.name!r} has {self.num_rows} rows; rows {first} to {first + count} were asked for"
            )
        out = np.empty((count, *self.shape[1:]), self.dtype)
        under_way = []
        try:
            for block in self._overlapping(first, count):
                start, stop = max(block.first, first), min(block.first + block.num_rows, first + count)
                part = out[start - first : stop - first]
                inside = slice(start - block.first, stop - block.first)
                if stop - start == block.num_rows:
                    under_way.append(_readers().submit(self._load, block, part))
                else:
                    part[...] = self._keep(block)[inside]
        finally:
            for future in under_way:
                future.exception()  # none may still write into an array that is given up
        for future in under_way:
            future.result()
        return out

    def whole(self) -> np.ndarray:
        """The leaf as one array."""
        return self.read(0, self.num_rows).reshape(self.shape)

    def in_blocks(self, first: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
        """The rows asked for as `(first row, rows)`, block by block, with a few blocks read ahead.

        Memory is used again, for fresh memory costs as much as reading: rows hold until the next ones are asked for.
        """
        blocks = self._overlapping(first, count)
        most = max((block.num_rows for block in blocks), default=0)
        buffers = [np.empty((most, *self.shape[1:]), self.dtype) for _ in range(min(WORKERS + 1, len(blocks)))]
        ahead: deque[tuple[_Block, np.ndarray, Future[np.ndarray]]] = deque()
        waiting = iter(blocks)
        while True:
            while buffers and (block := next(waiting, None)) is not None:
                buffer = buffers.pop()
                ahead.append((block, buffer, _readers().submit(self._load, block, buffer[: block.num_rows])))
            if not ahead:
                return
            block, buffer, future = ahead.popleft()
            start, stop = max(block.first, first), min(block.first + block.num_rows, first + count)
            yield start, future.result()[start - block.first : stop - block.first]
            buffers.append(buffer)

    def verify(self) -> None:
        """Reads all rows and keeps none.

        Raises:
          DamagedCheckpointError: if a block is not what was saved.
        """
        for _ in self.in_blocks(0, self.num_rows):
            pass

    def num_blocks(self, first: int, count: int) -> int:
        """How many blocks hold these rows."""
        return len(self._overlapping(first, count))

    def _overlapping(self, first: int, count: int) -> list[_Block]:
        if count == 0 or self.row_bytes == 0:
            return []
        return [b for b in self.blocks if b.first < first + count and first < b.first + b.num_rows]

    def _keep(self, block: _Block) -> np.ndarray:
        with self._lock:
            if self._held is None or self._held[0] is not block:
                self._held = None  # before the next one is read: only one is held
                self._held = block, self._load(block)
            return self._held[1]

    def _load(self, block: _Block, out: np.ndarray | None = None) -> np.ndarray:
        """The verified rows of a block, in `out` if given."""
        if out is None:
            out = np.empty((block.num_rows, *self.shape[1:]), self.dtype)
        data = _bytes_of(out)
        try:
            with block.path.open("rb", buffering=0) as file:
                header = file.read(max(0, min(os.fstat(file.fileno()).st_size - len(data), _HEADER_BYTES)))
                got = 0
                while got < len(data) and (n := file.readinto(data[got:])):
                    got += n
        except OSError as error:
            raise DamagedCheckpointError(f"leaf {self.name!r} cannot be read ({error})") from error
        digest = hashlib.sha256(header)
        digest.update(data)
        if got < len(data) or digest.hexdigest() != block.digest:
            raise DamagedCheckpointError(f"leaf {self.name!r}: {block.path.name} does not agree with its digest")
        return out
