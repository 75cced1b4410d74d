"""Data sets: the synthetic ReLU data of Section 5.1, and MNIST and CIFAR-10 read from prepared TFDS folders.

Images stay uint8, on the host and on the device; `standardise` turns a mini-batch into floats inside the jitted step.
TFDS reads `array_record` files without TensorFlow; only `scripts/prepare_data.py`, which writes them, needs TensorFlow.
The decoded arrays are cached below the user's cache folder, so a second start neither decodes nor imports TFDS.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shlex
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from dualgap_jax import registry, seeds

SPLITS = ("train", "test")
STANDARDISE = ("pixel", "channel", "global", "none")
LABELS = ("sign", "real")
TASKS = ("multiclass", "binary", "regression")

_IMAGE_SHAPES = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3)}
_NUM_CLASSES = 10
_CACHE_FORMAT = 1  # part of the cache key: raise it when the content of the cache files changes
_DECODE_CHUNK = 1000  # images; also bounds the sums of squares of a chunk well below the uint32 limit
_DRAWS_PER_EXAMPLE = 100  # synthetic_relu gives up after this many draws per example asked for


class DataNotFoundError(FileNotFoundError):
    """A data set that is not prepared in the folder that was looked in; the message names the remedy."""


class Dataset(NamedTuple):
    """A data set on the host.

    Attributes:
      name: the entry of `DATASETS`.
      x: `[n, ...]`, uint8 images `[n, height, width, channels]` or float features `[n, d]`.
      y: `[n]`: int32 class indices (multiclass), float32 in {-1, +1} (binary), float32 targets (regression).
      mean: float32, as many axes as one example, sizes equal to the example's or 1: what `standardise` subtracts.
      std: float32, the shape of `mean`: what `standardise` divides by; positive (1 replaces 0).
      num_outputs: outputs of a network for this task: the number of classes, or 1.
      task: 'multiclass', 'binary' or 'regression'.
      info: facts for the run card, ready for JSON.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    num_outputs: int
    task: str
    info: dict[str, Any]


def standardise(
    x: Shaped[Array | np.ndarray, "batch ..."],
    mean: Float[Array | np.ndarray, "*stats"],
    std: Float[Array | np.ndarray, "*stats"],
) -> Float[Array, "batch ..."]:
    """`(x - mean) / std` for a batch; pure, for use inside jit on the uint8 mini-batch.

    Args:
      x: `[batch, ...]`, uint8 or float.
      mean, std: as in `Dataset`, with one axis less than `x`.

    Returns:
      The batch in the float type of `mean`, or of `x` if that is wider: float32 for a `Dataset` as built here.
    """
    dtype = jnp.result_type(x, mean, std)
    return (jnp.asarray(x, dtype) - jnp.asarray(mean, dtype)[None]) / jnp.asarray(std, dtype)[None]


def validate(dataset: Dataset) -> Dataset:
    """Returns `dataset` unchanged if it is sound.

    Raises:
      ValueError: for an empty data set, shapes that do not fit one another, a dtype that the task does not take,
        labels outside the classes, non-finite numbers, or a standard deviation that is not positive.
    """
    name, x, y, mean, std, num_outputs, task, _ = dataset
    if task not in TASKS:
        raise ValueError(f"data set {name!r}: {registry.unknown('task', task, TASKS)}")
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y):
        raise ValueError(f"data set {name!r}: need x [n, ...] and y [n], got x {x.shape} and y {y.shape}.")
    if x.size == 0:
        raise ValueError(f"data set {name!r} is empty: x has shape {x.shape}.")
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"data set {name!r}: x must be uint8 or float, got {x.dtype}.")
    if np.issubdtype(x.dtype, np.floating):
        _refuse(name, "examples with non-finite features", ~np.isfinite(x).all(axis=tuple(range(1, x.ndim))))
    if task == "multiclass":
        if not np.issubdtype(y.dtype, np.integer):
            raise ValueError(f"data set {name!r}: class labels must be integers, got {y.dtype}.")
        _refuse(name, f"labels outside the classes 0..{num_outputs - 1}", (y < 0) | (y >= num_outputs), y)
    elif num_outputs != 1:
        raise ValueError(f"data set {name!r}: a {task} task has 1 output, got num_outputs={num_outputs}.")
    elif task == "binary":
        _refuse(name, "labels outside the classes -1, +1", np.abs(y) != 1, y)
    else:
        _refuse(name, "non-finite targets", ~np.isfinite(y), y)
    for label, value in (("mean", mean), ("std", std)):
        fits = value.ndim == x.ndim - 1 and all(v in (1, s) for v, s in zip(value.shape, x.shape[1:], strict=True))
        if not fits:
            raise ValueError(f"data set {name!r}: {label} {value.shape} does not fit one example {x.shape[1:]}.")
        if not np.isfinite(value).all():
            raise ValueError(f"data set {name!r}: {label} is not finite.")
    if not (std > 0).all():
        raise ValueError(f"data set {name!r}: std must be positive, its smallest entry is {std.min()}.")
    return dataset


def _refuse(name: str, what: str, bad: np.ndarray, values: np.ndarray | None = None) -> None:
    """Raises ValueError with the count and the first offenders if any entry of `bad` `[n]` is set."""
    if not bad.any():
        return
    where = np.flatnonzero(bad)
    first = [f"{i}" if values is None else f"{i} ({values[i]})" for i in where[:5]]
    raise ValueError(
        f"data set {name!r}: {what}: {len(where)} of {len(bad)}, first at index {', '.join(first)}."
        " Correct or remove these examples."
    )


def take(dataset: Dataset, num_examples: int, *, seed: int | None = None) -> Dataset:
    """The first `num_examples` examples, or with a `seed` a random subset without replacement, in the original order.

    0 stands for all.  `mean` and `std` stay those of the full training set.

    Raises:
      ValueError: for a number that is negative or above what there is.
    """
    n = len(dataset.x)
    if not 0 <= num_examples <= n:
        raise ValueError(f"num_examples must be 0 (all) to {n} for data set {dataset.name!r}, got {num_examples}.")
    if num_examples in (0, n):
        return dataset
    chosen: slice | np.ndarray = slice(num_examples)
    if seed is not None:
        chosen = np.sort(seeds.generator(seed).choice(n, num_examples, replace=False))
    info = {**dataset.info, "num_examples": num_examples, "subset": "first" if seed is None else f"random, seed {seed}"}
    return dataset._replace(x=dataset.x[chosen], y=dataset.y[chosen], info=info)


# --- synthetic data ---------------------------------------------------------------------------------------------------


class Teacher(NamedTuple):
    """`f(x) = sum_i a_i max(0, w_i . x)` in float64: `a [width]`, `w [width, d]`."""

    a: np.ndarray
    w: np.ndarray


def relu_teacher(*, d: int = 10, teacher_width: int = 11, teacher_scale: float = 1.0, seed: int = 0) -> Teacher:
    """The one-hidden-layer ReLU network that labels `synthetic_relu` of the same arguments (Section 5.1).

    `w_ij ~ N(0, 1)` and `a_i ~ N(0, teacher_scale^2)`, independent.  The paper states no distribution.

    Raises:
      ValueError: for a size below 1, a scale that is not positive and finite, or a seed that `seeds.check` refuses.
    """
    for label, value in (("d", d), ("teacher_width", teacher_width)):
        if value < 1:
            raise ValueError(f"{label} must be at least 1, got {value}.")
    if not (math.isfinite(teacher_scale) and teacher_scale > 0):
        raise ValueError(f"teacher_scale must be positive and finite, got {teacher_scale}.")
    rng = seeds.generator(seed, 0)
    w = rng.standard_normal((teacher_width, d))
    return Teacher(a=teacher_scale * rng.standard_normal(teacher_width), w=w)


def teacher_outputs(teacher: Teacher, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """`f(x)` for every row of `x`, in float64."""
    return np.maximum(x.astype(np.float64) @ teacher.w.T, 0.0) @ teacher.a


def teacher_std(teacher: Teacher) -> float:
    """The standard deviation of `f(x)` for `x ~ N(0, identity)`, in closed form.

    With u = w_i . x, v = w_j . x at angle t: `E[u+] = |w_i| / sqrt(2 pi)`,
    `E[u+ v+] = |w_i| |w_j| (sin t + (pi - t) cos t) / (2 pi)` (Cho and Saul 2009, arc-cosine kernel of degree 1).
    """
    norms = np.linalg.norm(teacher.w, axis=1)
    products = np.outer(norms, norms)
    cosine = np.clip(teacher.w @ teacher.w.T / products, -1.0, 1.0)
    angle = np.arccos(cosine)
    second = products * (np.sin(angle) + (np.pi - angle) * cosine) / (2 * np.pi)
    covariance = second - products / (2 * np.pi)
    return float(np.sqrt(teacher.a @ covariance @ teacher.a))


def synthetic_relu(
    *,
    n: int = 1000,
    d: int = 10,
    teacher_width: int = 11,
    teacher_scale: float = 1.0,
    seed: int = 0,
    labels: str = "sign",
    min_margin: float = 0.0,
) -> Dataset:
    """Gaussian points labelled by a random one-hidden-layer ReLU network (Section 5.1, Figure 1 and Table 1).

    `x ~ N(0, identity)`, rounded to float32 and not standardised; the teacher is `relu_teacher`, evaluated in float64.
    Teacher and points come from separate streams of `seed`: the teacher does not depend on `n` or `min_margin`, and
    the first rows of a longer data set are the shorter one.

    Args:
      n: number of examples.
      d: input dimension.
      teacher_width: hidden units of the teacher.
      teacher_scale: standard deviation of the teacher's output weights; `f` is proportional to it.
      seed: of teacher and points.
      labels: 'sign' for `y = sign f(x)` (binary), 'real' for `y = f(x)` (regression).
      min_margin: with 'sign', points with `|f(x)| <= min_margin * std(f)` are dropped and drawn again, std(f) being
        that of `teacher_std`.  At 0 this drops only points where f is exactly 0 (no unit active), which have no sign;
        so the teacher always separates the labels, and a multiple of it has hinge loss 0.

    Raises:
      ValueError: for an argument out of range, or when too few points of 100 n draws exceed the margin.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}.")
    if labels not in LABELS:
        raise ValueError(registry.unknown("labels", labels, LABELS))
    if not (math.isfinite(min_margin) and min_margin >= 0):
        raise ValueError(f"min_margin must be 0 or more and finite, got {min_margin}.")
    if labels == "real" and min_margin > 0:
        raise ValueError(f"min_margin={min_margin} needs labels='sign'; with labels='real' leave it at 0.")
    teacher = relu_teacher(d=d, teacher_width=teacher_width, teacher_scale=teacher_scale, seed=seed)
    threshold = min_margin * teacher_std(teacher) if labels == "sign" else -1.0
    rng = seeds.generator(seed, 1)
    points, outputs = [], []
    kept = drawn = 0
    while kept < n and drawn < _DRAWS_PER_EXAMPLE * n:
        x = rng.standard_normal((n, d)).astype(np.float32)
        f = teacher_outputs(teacher, x)
        keep = np.abs(f) > threshold
        points.append(x[keep])
        outputs.append(f[keep])
        kept += int(keep.sum())
        drawn += n
    if kept < n:
        raise ValueError(
            f"min_margin={min_margin} leaves only {kept} of {drawn} drawn points, {n} are needed:"
            " give a smaller min_margin, a wider teacher, or another seed."
        )
    x, f = np.concatenate(points)[:n], np.concatenate(outputs)[:n]
    y = (np.where(f > 0, 1.0, -1.0) if labels == "sign" else f).astype(np.float32)
    info = {
        "source": "synthetic: x ~ N(0, 1), w_ij ~ N(0, 1), a_i ~ N(0, teacher_scale^2)",
        "num_examples": n,
        "d": d,
        "teacher_width": teacher_width,
        "teacher_scale": teacher_scale,
        "seed": seed,
        "labels": labels,
        "min_margin": min_margin,
        "teacher_std": teacher_std(teacher),
        "points_drawn": drawn,
        "positive_fraction": float((f > 0).mean()),
        "standardise": "none",
    }
    return validate(
        Dataset(
            name="synthetic_relu",
            x=x,
            y=y,
            mean=np.zeros(d, np.float32),
            std=np.ones(d, np.float32),
            num_outputs=1,
            task="binary" if labels == "sign" else "regression",
            info=info,
        )
    )


# --- images -----------------------------------------------------------------------------------------------------------


def mnist(*, data_dir: str = "", split: str = "train", standardise: str = "pixel", num_examples: int = 0) -> Dataset:
    """MNIST, 60,000 training and 10,000 test digits of 28 x 28 x 1, no augmentation (Section 5.1).

    Args:
      data_dir: the TFDS data folder; see `resolve_data_dir`.
      split: 'train' or 'test'.
      standardise: over which axes mean and standard deviation of the **training** split are taken.  'pixel': each
        pixel position and channel by its own over the examples, the paper's text (a pixel that never changes is divided
        by 1); 'channel': each colour channel over examples and positions; 'global': one pair over everything; 'none':
        mean 0 and divisor 255.
      num_examples: the first so many examples, 0 for all; TFDS stores them shuffled.

    Raises:
      DataNotFoundError: when the data set is not prepared; the message names the command that prepares it.
      ValueError: for an argument out of range, or damaged data.
    """
    return _images("mnist", data_dir, split, standardise, num_examples)


def cifar10(*, data_dir: str = "", split: str = "train", standardise: str = "pixel", num_examples: int = 0) -> Dataset:
    """CIFAR-10, 50,000 training and 10,000 test colour images of 32 x 32 x 3, no augmentation (Section 5.1).

    Arguments and errors as for `mnist`.  `info['image_format']` is PNG for the lossless data that TFDS prepares; JPEG
    marks a recompressed copy, which figures made from it should mention.
    """
    return _images("cifar10", data_dir, split, standardise, num_examples)


def _images(name: str, data_dir: str, split: str, axis: str, num_examples: int) -> Dataset:
    if split not in SPLITS:
        raise ValueError(registry.unknown("split", split, SPLITS))
    if axis not in STANDARDISE:
        raise ValueError(registry.unknown("standardise", axis, STANDARDISE))
    prepared = find_prepared(name, data_dir)
    arrays = _load(prepared, split)
    train = arrays if split == "train" else _load(prepared, "train")
    mean, std = _statistics(train, axis)
    info = {
        "source": "tfds",
        "version": prepared.folder.name,
        "folder": str(prepared.folder),
        "checksum": prepared.checksum,
        "image_format": arrays.image_format,
        "split": split,
        "num_examples": len(arrays.x),
        "standardise": axis,
        "statistics": f"train split, {len(train.x)} examples" if axis != "none" else "none, x / 255",
    }
    dataset = Dataset(name, arrays.x, arrays.y, mean, std, _NUM_CLASSES, "multiclass", info)
    return take(validate(dataset), num_examples)


class _Arrays(NamedTuple):
    """One decoded split: `x` uint8, `y` int32, and per pixel position the int64 sums of values and squares."""

    x: np.ndarray
    y: np.ndarray
    total: np.ndarray
    total_of_squares: np.ndarray
    image_format: str


def _statistics(train: _Arrays, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation of the training split, from exact integer sums; 1 replaces a std of 0."""
    shape = train.x.shape[1:]
    if axis == "none":
        ones = np.ones((1,) * len(shape), np.float32)
        return 0 * ones, 255 * ones
    over = {"pixel": (), "channel": tuple(range(len(shape) - 1)), "global": tuple(range(len(shape)))}[axis]
    total = train.total.sum(axis=over, keepdims=True).astype(object)  # Python integers: no overflow, no cancellation
    squares = train.total_of_squares.sum(axis=over, keepdims=True).astype(object)
    count = len(train.x) * math.prod(shape[i] for i in over)
    mean = (total / count).astype(np.float64)
    std = np.sqrt(((count * squares - total**2) / count**2).astype(np.float64))
    return mean.astype(np.float32), np.where(std > 0, std, 1.0).astype(np.float32)


# --- prepared TFDS folders --------------------------------------------------------------------------------------------


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
    """The TFDS data folder: `data_dir`, else the environment's TFDS_DATA_DIR, else TFDS's default."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or Path("~", "tensorflow_datasets")).expanduser()


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
    digest = hashlib.sha256(f"{_CACHE_FORMAT} {name} {folder.name}".encode())
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


def _decode(prepared: Prepared, split: str) -> _Arrays:
    """Reads and decodes one split through TFDS and Pillow; one thread, since two were slower.

    Raises:
      ValueError: for data files that cannot be read, or that hold something else than promised.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    n, shape = prepared.num_examples[split], _IMAGE_SHAPES[prepared.name]
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
    return _Arrays(x, y, total, squares, "+".join(sorted(formats)))


# --- the cache of decoded arrays --------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/dualgap_jax`, or `~/.cache/dualgap_jax` when the variable is unset or not an absolute path."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "dualgap_jax"


def _load(prepared: Prepared, split: str) -> _Arrays:
    """The decoded split, from the cache if it is there and sound, else decoded and, where possible, cached.

    One `.npz` file per split: it is replaced in one step, and the CRC of its members shows damage.
    """
    path = cache_dir() / f"{prepared.name}-{split}-{prepared.checksum}.npz"
    try:
        with path.open("rb") as file, np.load(file) as stored:
            parts: dict[str, Any] = {key: stored[key] for key in _Arrays._fields}
        arrays = _Arrays(**{**parts, "image_format": str(parts["image_format"])})
        if arrays.x.shape == (prepared.num_examples[split], *_IMAGE_SHAPES[prepared.name]):
            return arrays
        warnings.warn(f"rebuilding the cache file {path}: unexpected shape {arrays.x.shape}", stacklevel=4)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        warnings.warn(f"rebuilding the damaged cache file {path}: {error!r}", stacklevel=4)
    arrays = _decode(prepared, split)
    try:
        _store(path, arrays)
    except OSError as error:
        warnings.warn(f"decoded images are not cached, {path} cannot be written: {error}", stacklevel=4)
    return arrays


def _store(path: Path, arrays: _Arrays) -> None:
    """Writes the file under a temporary name and renames it, so that no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays._asdict())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


DATASETS: registry.Table[Callable[..., Dataset]] = registry.Table(
    "data set", {"synthetic_relu": synthetic_relu, "mnist": mnist, "cifar10": cifar10}
)
