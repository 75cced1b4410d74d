"""Prepared TFDS folders: found and checked without TFDS, decoded through TFDS and Pillow without TensorFlow."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dualgap_jax.config import ConfigError
from dualgap_jax.files import file_digest, local_path
from dualgap_jax.identity import combined

SPLITS = ("train", "test")
IMAGE_SHAPES = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}
CACHE_FORMAT = 2  # part of the checksum: raise it when the content of the cache files changes
_DECODE_CHUNK = 1000  # images; also bounds the sums of squares of a chunk well below the uint32 limit


class DataNotFoundError(FileNotFoundError):
    """A data set that is not prepared in the folder that was looked in; the message names the remedy."""


class Decoded(NamedTuple):
    """One decoded split: `x` uint8, `y` int32, and per pixel position the int64 sums of values and squares."""

    x: np.ndarray
    y: np.ndarray
    total: np.ndarray
    total_of_squares: np.ndarray
    image_format: str


class Prepared(NamedTuple):
    """A prepared TFDS data set: its version folder, the number of examples per split, and a checksum.

    The checksum covers `dataset_info.json`, `features.json`, and the name, size and modification time of every data
    file, not the bytes of the data files, so that it costs no reading.
    """

    name: str
    folder: Path
    num_examples: dict[str, int]
    checksum: str


def resolve_data_dir(data_dir: str = "") -> Path:
    """The TFDS data folder: `data_dir`, else the environment's TFDS_DATA_DIR, else TFDS's default.

    Raises:
      DataNotFoundError: for a remote folder such as `gs://bucket`, or `~` where the user has no home folder.
    """
    given = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    how = "by --config.data.data_dir or the environment's TFDS_DATA_DIR"
    try:
        return local_path(given, "the data folder").expanduser()
    except ConfigError as error:
        raise DataNotFoundError(f"{error} Name it {how}.") from error
    except RuntimeError as error:
        raise DataNotFoundError(f"the data folder {given} has no place: {error} Name another {how}.") from error


def find_prepared(name: str, data_dir: str = "") -> Prepared:
    """Finds the newest prepared version of `name` ('mnist' or 'cifar10') in the data folder, without importing TFDS.

    Raises:
      DataNotFoundError: when the folder is missing or empty, or holds no complete array_record version of the data set.
    """
    root = resolve_data_dir(data_dir)
    try:
        return _find(name, root)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = (
            str(error)
            if isinstance(error, _NotPreparedError)
            else f"it cannot be read, {type(error).__name__}: {error}"
        )
        raise DataNotFoundError(
            f"data set {name!r} not found in {root}: {reason}.\n"
            "Name the folder by --config.data.data_dir or the environment's TFDS_DATA_DIR, or prepare the data by\n"
            f"  python scripts/prepare_data.py {name} --data_dir={shlex.quote(str(root))}"
        ) from error


def contents_digest(name: str, data_dir: str = "") -> str | None:
    """The SHA-256 of the data files of `find_prepared(name, data_dir)`, read in full; None where there are none.

    Unlike the checksum of `Prepared` it is that of a copy too.
    """
    if name not in IMAGE_SHAPES:
        return None
    try:
        folder = find_prepared(name, data_dir).folder
        files = sorted(folder.glob("*.array_record-*"))
        return combined(*(f"{file.name} {file_digest(file)}" for file in files))
    except OSError:
        return None


class _NotPreparedError(ValueError):
    """Why a folder does not serve, as the end of a sentence."""


def _find(name: str, root: Path) -> Prepared:
    if not root.exists():
        raise _NotPreparedError("the folder does not exist")
    if not root.is_dir():
        raise _NotPreparedError("it is not a folder")
    if not any(root.iterdir()):
        raise _NotPreparedError("the folder is empty")
    versions = [
        p.parent for p in root.glob(f"{name}/*/dataset_info.json") if re.fullmatch(r"\d+\.\d+\.\d+", p.parent.name)
    ]
    if not versions:
        raise _NotPreparedError(f"it has no {name}/<version>/dataset_info.json")
    folder = max(versions, key=lambda p: tuple(map(int, p.name.split("."))))
    info_bytes = (folder / "dataset_info.json").read_bytes()
    features_bytes = (folder / "features.json").read_bytes()
    info = json.loads(info_bytes)
    file_format = info.get("fileFormat", "tfrecord")
    if file_format != "array_record":
        raise _NotPreparedError(
            f"{folder} holds {file_format} files, which cannot be read without TensorFlow; array_record files are"
            " needed, prepared in another folder"
        )
    digest = hashlib.sha256(f"{CACHE_FORMAT} {name} {folder.name}".encode())
    digest.update(info_bytes)
    digest.update(features_bytes)
    num_examples = {}
    for split in info["splits"]:
        lengths = [int(length) for length in split["shardLengths"]]
        num_examples[split["name"]] = sum(lengths)
        for index in range(len(lengths)):
            file = folder / f"{name}-{split['name']}.array_record-{index:05d}-of-{len(lengths):05d}"
            if not file.is_file() or not (stat := file.stat()).st_size:
                raise _NotPreparedError(f"the data file {file} is missing or empty")
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    for wanted in SPLITS:
        if not num_examples.get(wanted):
            raise _NotPreparedError(f"{folder} has no examples in split {wanted!r}")
    return Prepared(name, folder, num_examples, digest.hexdigest()[:16])


def decode(prepared: Prepared, split: str) -> Decoded:
    """Reads and decodes one split through TFDS and Pillow; one thread, since two were slower.

    Raises:
      ValueError: for data files that cannot be read, or that hold something else than promised.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    n, shape = prepared.num_examples[split], IMAGE_SHAPES[prepared.name]
    x, y = np.empty((n, *shape), np.uint8), np.empty(n, np.int32)
    total, squares = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    formats: set[str] = set()
    try:
        builder = tfds.builder_from_directory(str(prepared.folder))
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        if len(source) != n:
            raise ValueError(f"{len(source)} examples, dataset_info.json promises {n}")
        for start in range(0, n, _DECODE_CHUNK):
            stop = min(start + _DECODE_CHUNK, n)
            for i, record in enumerate(source.__getitems__(list(range(start, stop))), start):
                with Image.open(io.BytesIO(record["image"])) as image:
                    formats.add(str(image.format))
                    x[i] = np.asarray(image, np.uint8).reshape(shape)
                y[i] = record["label"]
            chunk = x[start:stop]
            total += chunk.sum(axis=0, dtype=np.int64)
            squares += np.square(chunk, dtype=np.uint32).sum(axis=0, dtype=np.int64)
            if sys.stderr.isatty():
                end = "\n" if stop == n else ""
                print(f"\rdecoding {prepared.name} {split}: {stop:,} of {n:,}", end=end, file=sys.stderr, flush=True)
    except Exception as error:  # array_record, protobuf and Pillow each raise their own kinds
        raise ValueError(
            f"data set {prepared.name!r}, split {split!r}: the files in {prepared.folder} are damaged ({error!r})."
            f" Remove that folder and run: python scripts/prepare_data.py {prepared.name}"
            f" --data_dir={shlex.quote(str(prepared.folder.parents[1]))}"
        ) from error
    return Decoded(x, y, total, squares, "+".join(sorted(formats)))
