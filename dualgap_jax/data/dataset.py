"""A data set on the host: two arrays, the task that their labels set, and how a batch is standardised."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from dualgap_jax import registry
from dualgap_jax.sizes import count, is_whole, switch

TASKS = ("multiclass", "binary", "regression")


class Dataset(NamedTuple):
    """A data set on the host.

    Attributes:
      name: the entry of `DATASETS`, or 'arrays'.
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

    def like(self, train: Dataset) -> Dataset:
        """These examples as a network that was trained on `train` has to see them: by its `mean`, `std` and outputs.

        A test set needs it wherever constants are those of the data given, as in `from_arrays(..., standardise=True)`:
        by constants of its own its examples would be others.  A part of the classes, or one of them, is enough.

        Raises:
          ValueError: unless task, shape of an example and kind of the features (uint8 or float) are those of `train`,
            and the labels lie in its classes; and as `validate` and `as_dataset` do.
        """
        return _like(self, as_dataset(train))


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


def validate(dataset: Dataset, *, nan: bool = False) -> Dataset:
    """Returns `dataset` unchanged if it is sound.

    Args:
      dataset: the data set.
      nan: whether features may be NaN.

    Raises:
      ValueError: for an empty data set, shapes that do not fit one another, a dtype that the task does not take,
        labels outside the classes, non-finite numbers, features that float32 cannot hold once they are standardised, or
        what is no `Dataset` of arrays.
    """
    arrays = isinstance(dataset, Dataset) and all(isinstance(part, np.ndarray | np.generic) for part in dataset[1:5])
    if not arrays:
        raise ValueError(
            f"data of type {type(dataset).__name__} is no Dataset of NumPy arrays; make one by from_arrays(x, y)."
        )
    name, x, y, mean, std, num_outputs, task, _ = dataset
    nan = switch(nan, "nan")
    if task not in TASKS:
        raise ValueError(f"data set {name!r}: {registry.unknown('task', task, TASKS)}")
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y):
        raise ValueError(f"data set {name!r}: need x [n, ...] and y [n], got x {x.shape} and y {y.shape}.")
    if x.size == 0:
        raise ValueError(f"data set {name!r} is empty: x has shape {x.shape}.")
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"data set {name!r}: x must be uint8 or float, got {x.dtype}.")
    if np.issubdtype(x.dtype, np.floating):
        axes = tuple(range(1, x.ndim))
        bad = np.isinf(x).any(axis=axes) if nan else ~np.isfinite(x).all(axis=axes)
        _refuse(name, "examples with non-finite features", bad)
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
    least = np.finfo(np.float32).tiny  # less is 0 where a processor rounds so, and one over more is
    if not ((std >= least) & (std <= 1 / least)).all():
        raise ValueError(
            f"data set {name!r}: std must be positive, from {least:.2g} to {1 / least:.2g}, but its entries run from"
            f" {std.min()} to {std.max()}; scale the features."
        )
    if x.dtype != np.uint8:
        kind = jnp.result_type(x, mean, std)
        with np.errstate(over="ignore"):
            ends = [(end(x, axis=0).astype(kind) - mean) / std for end in (np.fmin.reduce, np.fmax.reduce)]
        if np.isinf(ends).any():
            raise ValueError(f"data set {name!r}: features leave the range of {kind} once standardised; scale them.")
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


def _like(test: Dataset, train: Dataset) -> Dataset:
    here, there = f"data set {test.name!r}", f"the training set {train.name!r}"
    if test.task != train.task:
        raise ValueError(
            f"{here} has {test.task} labels, {there} {train.task} ones; where they were guessed, name the task of both."
        )
    if test.x.shape[1:] != train.x.shape[1:]:
        raise ValueError(
            f"{here} has examples of shape {test.x.shape[1:]}, {there} {train.x.shape[1:]}; they must be alike."
        )
    if (test.x.dtype == np.uint8) != (train.x.dtype == np.uint8):
        raise ValueError(
            f"{here} holds {test.x.dtype} features, {there} {train.x.dtype}: whether 255 or 1 is white cannot be told;"
            " give both as uint8 or both as floats, in the same units."
        )
    if test.task == "multiclass" and len(test.y) and test.y.max() >= train.num_outputs:
        raise ValueError(
            f"{here} has a label {test.y.max()}, {there} the classes 0..{train.num_outputs - 1}; where it lacks the"
            " last ones, give it num_outputs."
        )
    info = {**test.info, "standardise": f"as the training set {train.name!r}"}
    made = test._replace(mean=train.mean, std=train.std, num_outputs=train.num_outputs, info=info)
    return validate(made, nan=True)


def take(dataset: Dataset, num_examples: int) -> Dataset:
    """The first `num_examples` examples; 0 stands for all.  `mean` and `std` stay those of the full training set.

    Raises:
      ValueError: for a number that is negative or above what there is.
    """
    n = len(dataset.x)
    if not is_whole(num_examples) or not 0 <= num_examples <= n:
        raise ValueError(
            f"num_examples must be 0 (all) to {n} for data set {dataset.name!r}, got {num_examples!r:.60}."
        )
    if num_examples in (0, n):
        return dataset
    info = {**dataset.info, "num_examples": num_examples, "subset": "first"}
    return dataset._replace(x=dataset.x[:num_examples], y=dataset.y[:num_examples], info=info)


def from_arrays(
    x: Any, y: Any, *, task: str = "auto", num_outputs: int = 0, standardise: bool = False, name: str = "arrays"
) -> Dataset:
    """A data set of one's own arrays, checked.

    Args:
      x: `[n, ...]`, at least two axes: uint8 images, kept as they are, or features of any other number type, which
        become float32.
      y: `[n]`, class indices, signs -1 and +1, or real targets.
      task: 'multiclass', 'binary' or 'regression'; 'auto' takes signs for binary, other integers for class indices, and
        other numbers for targets of a regression.
      num_outputs: the number of classes of a multiclass task; 0 is one more than the largest label.
      standardise: subtract each feature's mean and divide by its standard deviation (1 where that is 0), both of the
        examples given here: a test set takes those of the training set, `from_arrays(x_test, y_test).like(train)`.
        Else features stay as they are, and images are divided by 255.
      name: what messages call it.

    Raises:
      ValueError: for shapes that do not fit, no examples, labels that no task takes, numbers that are not finite, or
        that float32 cannot hold, too large for it or, in a column, all so small that it takes them for 0.
    """
    x, y = _known(name, "x", x), _known(name, "y", y)
    if y.ndim != 1:
        column = y.ndim == 2 and y.shape[1] == 1  # whose argmax would be 0 everywhere
        advice = "; give y[:, 0]" if column else "; for one-hot labels give y.argmax(axis=1)" * (y.ndim == 2)
        raise ValueError(f"data set {name!r}: labels must be one number an example, y [n], got y {y.shape}{advice}.")
    for label, array in (("x", x), ("y", y)):
        if array.dtype.kind not in "iufb" or (label == "y" and array.dtype.kind == "b"):
            raise ValueError(f"data set {name!r}: {label} must hold numbers, got {array.dtype}.")
    num_outputs = count(num_outputs, "num_outputs")
    if task == "auto":
        whole, signs = y.dtype.kind in "iu", bool((np.abs(y.astype(np.float64)) == 1).all())
        # Class indices may all be 1; signs among whole numbers show themselves by a -1.
        task = "binary" if signs and ((y < 0).any() or not whole) else "multiclass" if whole else "regression"
    if x.ndim == 0:
        raise ValueError(f"data set {name!r}: x must be an array [n, ...] of examples, got the number {x}.")
    if x.dtype != np.uint8:
        x = _as_float32(name, "x", x)
    if task != "multiclass":
        y, num_outputs = _as_float32(name, "y", y), 1
    elif y.dtype.kind in "iu" and y.size:
        most = np.iinfo(np.int32).max
        num_outputs = min(num_outputs or int(y.max()) + 1, most)
        y = np.clip(y, -1, most).astype(np.int32)  # what is out of range stays so, for `validate`
    ones = np.ones((1,) * (x.ndim - 1), np.float32)
    mean, std = 0 * ones, 255 * ones if x.dtype == np.uint8 else ones
    if switch(standardise, "standardise") and x.ndim > 1 and len(x):
        mean = x.mean(axis=0, dtype=np.float64)
        spread = np.sqrt(np.mean((x - mean[None]) ** 2, axis=0))
        mean, std = mean.astype(np.float32), np.where(spread > 0, spread, 1.0).astype(np.float32)
    info = {"source": "arrays", "num_examples": len(x), "standardise": "pixel" if standardise else "none"}
    return validate(Dataset(name, x, y, mean, std, num_outputs, task, info))


def as_dataset(data: Any) -> Dataset:
    """A data set, checked wherever it is used, or `from_arrays(*data)` of a pair of arrays `(x, y)`.

    Raises:
      ValueError: for anything else, and as `validate` does, for a data set may be made by hand.  A NaN among features
        makes every loss that it enters NaN, and is let in; an infinity, which a sigmoid would hide, is not.
    """
    if isinstance(data, Dataset):
        x, y, mean, std = (np.asarray(part) for part in (data.x, data.y, data.mean, data.std))
        return validate(data._replace(x=x, y=y, mean=mean, std=std), nan=True)
    if isinstance(data, tuple | list) and len(data) == 2:
        return from_arrays(*data)
    raise ValueError(
        f"data of type {type(data).__name__} is no data set; give a pair of arrays (x, y), or one made by"
        " dualgap_jax.data, such as from_arrays(x, y) or synthetic_relu()."
    )


def _known(name: str, label: str, given: Any) -> np.ndarray:
    """An array of a number type of NumPy's own: bfloat16 and its like become float32."""
    if np.ma.is_masked(given):
        raise ValueError(f"data set {name!r}: {label} holds masked entries; fill them, or remove their examples.")
    try:
        array = np.asarray(given)
    except ValueError:
        raise ValueError(f"data set {name!r}: {label} is no array; its rows must have one length.") from None
    return array.astype(np.float32) if array.dtype.kind == "V" and jnp.issubdtype(array.dtype, jnp.floating) else array


_LEAST_SPREAD = 1e-5  # of numbers, relative to their size, that float32 still tells apart to two digits


def _as_float32(name: str, label: str, array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        single = array.astype(np.float32)
    if not np.isfinite(single).all() and np.isfinite(array).all():
        raise ValueError(f"data set {name!r}: {label} holds numbers too large for float32; scale them.")
    if array.any() and (np.abs(single) < np.finfo(np.float32).tiny).all():
        raise ValueError(f"data set {name!r}: {label} holds only numbers that are 0 in float32; scale them.")
    if array.ndim > 1 and array.dtype.kind == "f" and array.dtype.itemsize > 2 and array.size:
        largest = np.fmax(np.fmax.reduce(array, axis=0), -np.fmin.reduce(array, axis=0))
        lost = (largest > 0) & (largest < np.finfo(np.float32).tiny)
        if lost.any():
            first = ", ".join(map(str, np.argwhere(lost)[0].tolist()))
            raise ValueError(
                f"data set {name!r}: {label} holds columns (of examples) whose numbers are all 0 in float32:"
                f" {int(lost.sum()):,} of {lost.size:,}, first [:, {first}]; scale them, or set them to 0."
            )
    if len(array) > 1 and array.dtype.kind in "iuf" and array.dtype.itemsize > 2 and np.isfinite(array).all():
        low, high = array.min(axis=0), array.max(axis=0)
        with np.errstate(over="ignore", invalid="ignore"):
            size, spread = np.maximum(np.abs(low), np.abs(high)), high - low
        if ((spread > 0) & (spread < _LEAST_SPREAD * size)).any():
            raise ValueError(
                f"data set {name!r}: {label} holds numbers (in a column, of examples) that differ by less than"
                f" {_LEAST_SPREAD:.0e} of their size, of which float32 keeps some digits only; subtract their mean"
                " before."
            )
    return single
