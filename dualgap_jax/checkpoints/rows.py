"""Rows of a leaf that lies in chunks on disk, verified as they are read.

A leaf is a zarr3 array whose chunks are blocks of whole rows, uncompressed: a chunk's file is the rows as they are in
memory, and zeros up to a full chunk in the last one.  So rows go from the file to where they are wanted with no copy
between, and the bytes that agree with the digest are the bytes that are used.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dualgap_jax.checkpoints.manifest import DamagedCheckpointError

CHUNK_BYTES = 16 << 20
WORKERS = min(4, os.cpu_count() or 1)


def num_rows_of(shape: Sequence[int]) -> int:
    """The size of axis 0; a scalar counts as one row."""
    return shape[0] if shape else 1


def rows_in_chunk(shape: Sequence[int], dtype: np.dtype) -> int:
    """Rows in a chunk of at most `CHUNK_BYTES`, or one where a row is larger; chunks of nearly equal size."""
    at_most = max(1, CHUNK_BYTES // max(1, _row_bytes(shape, dtype)))
    return max(1, -(-num_rows_of(shape) // max(1, -(-num_rows_of(shape) // at_most))))


def chunk_name(number: int, ndim: int) -> str:
    """The file of a chunk in the folder of its array."""
    return ".".join(["c", *([str(number), *["0"] * (ndim - 1)] if ndim else [])])


def _row_bytes(shape: Sequence[int], dtype: np.dtype) -> int:
    return int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize


@functools.cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(WORKERS, thread_name_prefix="checkpoint-reader")


class Stored:
    """One leaf of a checkpoint on disk.  Only the chunks that hold the rows asked for are read; all are verified.

    The chunk that a read ended in is kept, so that reading slice after slice takes each chunk from disk once.  Safe to
    use from several threads.

    Attributes:
      name: the leaf's path, `params/kernel`.
      shape: of the data.  A scalar counts as one row, read as `[1]`.
      dtype: of the data, a NumPy dtype.
      num_rows: size of axis 0; 1 for a scalar.
      key_impl: for PRNG keys the name of their implementation, else None.  Their data are uint32 with one more axis.
    """

    def __init__(self, step: Path, name: str, manifest: Mapping[str, Any]) -> None:
        leaf = manifest["leaves"][name]
        self.name = name
        self.shape: tuple[int, ...] = tuple(leaf["data_shape"])
        self.dtype = np.dtype(leaf["data_dtype"])
        self.num_rows = num_rows_of(self.shape)
        self.key_impl: str | None = leaf["key_impl"]
        self._at_once = leaf["rows_in_chunk"]
        self._files = [(step / path, manifest["files"][path][1]) for path in leaf["chunks"]]
        self._held: tuple[int, np.ndarray] | None = None
        self._lock = threading.Lock()

    def read(self, first: int, count: int) -> np.ndarray:
        """Rows `first, ..., first + count - 1`: a new array `[count, ...]`.

        Raises:
          ValueError: if the leaf has no such rows.
          DamagedCheckpointError: if a chunk is not what was saved.
        """
        first, count = operator.index(first), operator.index(count)
        if first < 0 or count < 0 or first + count > self.num_rows:
            raise ValueError(
                f"leaf {self.name!r} has {self.num_rows} rows; rows {first} to {first + count} were asked for"
            )
        out = np.empty((count, *self.shape[1:]), self.dtype)
        under_way = []
        try:
            for chunk in self._chunks(first, count):
                at, stop = self._bounds(chunk)
                part = out[max(at, first) - first : min(stop, first + count) - first]
                if len(part) == stop - at:
                    under_way.append(_readers().submit(self._load, chunk, part))
                else:
                    part[...] = self._keep(chunk)[max(at, first) - at : min(stop, first + count) - at]
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
        """The rows asked for as `(first row, rows)`, chunk by chunk, with a few chunks read ahead.

        Memory is used again, for fresh memory costs as much as reading: rows hold until the next ones are asked for.
        """
        chunks = self._chunks(first, count)
        shape = (self._at_once, *self.shape[1:])
        buffers = [np.empty(shape, self.dtype) for _ in range(min(WORKERS + 1, len(chunks)))]
        ahead: deque[tuple[int, np.ndarray, Future[np.ndarray]]] = deque()
        waiting = iter(chunks)
        while True:
            while buffers and (chunk := next(waiting, None)) is not None:
                at, stop = self._bounds(chunk)
                buffer = buffers.pop()
                ahead.append((chunk, buffer, _readers().submit(self._load, chunk, buffer[: stop - at])))
            if not ahead:
                return
            chunk, buffer, future = ahead.popleft()
            at, stop = self._bounds(chunk)
            start = max(at, first)
            yield start, future.result()[start - at : min(stop, first + count) - at]
            buffers.append(buffer)

    def verify(self) -> None:
        """Reads all rows and keeps none.

        Raises:
          DamagedCheckpointError: if a chunk is not what was saved.
        """
        for _ in self.in_blocks(0, self.num_rows):
            pass

    def num_chunks(self, first: int, count: int) -> int:
        """How many chunks hold these rows."""
        return len(self._chunks(first, count))

    def _chunks(self, first: int, count: int) -> range:
        if count == 0 or not self._files:
            return range(0)
        return range(first // self._at_once, (first + count - 1) // self._at_once + 1)

    def _bounds(self, chunk: int) -> tuple[int, int]:
        return chunk * self._at_once, min(self.num_rows, (chunk + 1) * self._at_once)

    def _keep(self, chunk: int) -> np.ndarray:
        with self._lock:
            if self._held is None or self._held[0] != chunk:
                self._held = None  # before the next one is read: only one is held
                at, stop = self._bounds(chunk)
                self._held = chunk, self._load(chunk, np.empty((stop - at, *self.shape[1:]), self.dtype))
            return self._held[1]

    def _load(self, chunk: int, out: np.ndarray) -> np.ndarray:
        """The verified rows of a chunk, in `out`."""
        path, digest = self._files[chunk]
        data = out.reshape(-1).view(np.uint8).data
        got = 0
        try:
            with path.open("rb", buffering=0) as file:
                while got < len(data) and (n := file.readinto(data[got:])):
                    got += n
                tail = file.read()
        except OSError as error:
            raise DamagedCheckpointError(f"leaf {self.name!r} cannot be read ({error})") from error
        found = hashlib.sha256(data)
        found.update(tail)
        if got < len(data) or found.hexdigest() != digest:
            raise DamagedCheckpointError(f"leaf {self.name!r}: {path.name} does not agree with its digest")
        return out
