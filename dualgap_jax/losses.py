"""Losses of Section 2 and Section 5, their margins, and the check of Assumption 1."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Num

from dualgap_jax import conjugates
from dualgap_jax.conjugates import Conjugate
from dualgap_jax.registry import Table

Outputs = Float[Array, "batch out"]
Labels = Num[Array, " batch"]
PerExample = Float[Array, " batch"]


class Loss(NamedTuple):
    """A loss for one kind of labels.

    Attributes:
      per_example: `(outputs [batch, out], labels [batch]) -> [batch]`.
      margin: `(outputs, labels) -> [batch]`: what Assumption 1 compares with tau, `y f(w; x)` for binary labels and the
        smallest `s_y - s_j` for classes; None for losses without one.
      tau: margin scale of a hinge loss, eq. (1); None for losses without one.
      tasks: the kinds of data set that it fits: 'binary', 'multiclass', 'regression'.
      conjugate: `l*(alpha)` of each example, in float64 on the host, which bounds the loss from below; None for losses
        without one.
      slope: `(outputs [batch, out], labels [batch]) -> [batch, out]`, an element of the subdifferential in the outputs,
        in float64 on the host; None where `conjugate` is.
      plain: whether it was made of a plain function, so that nothing is known of the outputs that it takes; else it
        takes an output for each class, or one for signs and for real targets.
    """

    per_example: Callable[[Array, Array], Array]
    margin: Callable[[Array, Array], Array] | None
    tau: float | None
    tasks: tuple[str, ...]
    conjugate: Conjugate | None = None
    slope: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    plain: bool = False


def marked(values: Array, outputs: Array) -> Array:
    """Losses, with NaN where the network outputs that they are taken from are not all finite.

    A compiled maximum or sum of maxima may answer with the number that stands beside a NaN, so that a loss of NaN
    outputs comes out finite, or does so in large batches only; and the hinge of an infinite output of the right sign is
    0.  Whatever reports a loss marks it by this function after the last sum, which changes no bit of a loss of finite
    outputs, nor of its gradient.

    Args:
      values: `[...]`, losses or sums of losses.
      outputs: `[..., batch, out]` or `[..., out]`: the outputs behind each value, its leading axes those of `values`.

    Returns:
      The values; those that are not finite already stay as they are.
    """
    finite = jnp.all(jnp.isfinite(outputs), axis=tuple(range(values.ndim, outputs.ndim)))
    spoilt = jnp.where(finite | ~jnp.isfinite(values), 0.0, jnp.nan).astype(values.dtype)
    return values + lax.stop_gradient(spoilt)


def mean_loss(loss: Loss, outputs: Outputs, labels: Labels) -> Float[Array, ""]:
    """The mean loss of a batch; NaN, or infinite, when an output is not finite."""
    return marked(jnp.mean(loss.per_example(outputs, labels)), outputs)


def sum_loss(loss: Loss, outputs: Outputs, labels: Labels) -> Float[Array, ""]:
    """The summed loss of a batch; NaN, or infinite, when an output is not finite."""
    return marked(jnp.sum(loss.per_example(outputs, labels)), outputs)


def measure(loss: Loss, task: str, outputs: Outputs, labels: Labels) -> tuple[Array, Array, Array]:
    """Losses, margins (zeros for a loss without margin) and hits of each example of a batch, `[batch]` each.

    Where an output is not finite the loss and the margin are not either, and the example is not a hit.  A hit is the
    class of the largest output, or the sign of the output; nothing else is one for the labels of a regression.
    """
    finite = jnp.all(jnp.isfinite(outputs), axis=-1)
    margins = jnp.zeros(len(labels)) if loss.margin is None else marked(loss.margin(outputs, labels), outputs)
    hits = jnp.argmax(outputs, axis=-1) == labels if task == "multiclass" else outputs[:, 0] * labels > 0
    return marked(loss.per_example(outputs, labels), outputs), margins, hits & finite


@jax.custom_jvp
def _positive_part(t: Array) -> Array:
    """`max(0, t)` bit for bit, without a maximum, beside which a compiled sum may lose a NaN."""
    return 0.5 * t + 0.5 * jnp.abs(t)


@_positive_part.defjvp
def _positive_part_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    slope = jax.jvp(lambda t: jnp.maximum(0, t), primals, tangents)[1]
    return _positive_part(*primals), slope


def _check_tau(tau: Any) -> float:
    try:
        value = math.nan if isinstance(tau, bool | np.bool_ | str | bytes) or np.ndim(tau) else float(tau)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not np.finfo(np.float64).tiny <= value < math.inf:
        raise ValueError(f"tau must be a positive finite number (eq. (1)), got {tau!r}.")
    return value


def _over(values: Array, tau: float) -> Array:
    """Values over tau; where that leaves the range of their type, the hinge is NaN or infinite, and shows."""
    least = float(jnp.finfo(values.dtype).tiny)
    if tau < least:
        raise ValueError(f"tau={tau} is below {least:.2g}, the least number of {values.dtype} outputs.")
    return values / tau


def _check_shapes(outputs: Array, labels: Array) -> None:
    if outputs.ndim != 2 or labels.shape != outputs.shape[:1]:
        raise ValueError(
            f"a loss takes outputs [batch, out] and labels [batch], got shapes {outputs.shape} and {labels.shape}."
        )


def _signed(outputs: Array, labels: Array) -> Array:
    _check_shapes(outputs, labels)
    if outputs.shape[-1] != 1:
        raise ValueError(f"a binary loss needs one network output, got outputs of shape {outputs.shape}.")
    return labels.astype(outputs.dtype) * outputs[:, 0]


def _is_label(outputs: Array, labels: Array) -> Array:
    _check_shapes(outputs, labels)
    return jnp.arange(outputs.shape[-1])[None, :] == labels[:, None].astype(jnp.int32)


def _differences(outputs: Array, labels: Array) -> tuple[Array, Array]:
    """`s_y - s_j [batch, out]`, and the mask of j = y."""
    own = _is_label(outputs, labels)
    if outputs.shape[-1] < 2:
        raise ValueError(f"a multi-class loss needs two network outputs or more, got outputs of shape {outputs.shape}.")
    return jnp.sum(jnp.where(own, outputs, 0), axis=-1, keepdims=True) - outputs, own


def _class_margin(outputs: Array, labels: Array) -> Array:
    difference, own = _differences(outputs, labels)
    least = jnp.min(jnp.where(own, jnp.inf, difference), axis=-1)
    return jnp.where(jnp.isnan(outputs).any(axis=-1), jnp.nan, least)


def binary_hinge(tau: int | float | np.number = 1.0) -> Loss:
    """The tau-hinge of eq. (1), `max(0, 1 - y f(w; x) / tau)`, labels -1 and +1; tau = 1 is the usual hinge.

    Raises:
      ValueError: unless tau is positive and finite; from the loss, for outputs of a type that cannot hold it.
    """
    tau = _check_tau(tau)

    def per_example(outputs: Outputs, labels: Labels) -> PerExample:
        return _positive_part(1 - _over(_signed(outputs, labels), tau))

    slope = functools.partial(conjugates.hinge_slope, tau=tau)
    return Loss(per_example, _signed, tau, ("binary",), conjugates.hinge_conjugate(tau), slope)


def multi_margin(tau: int | float | np.number = 1.0) -> Loss:
    """The "10-class hinge" of Section 5 in the authors' form, `(1/C) sum_{j != y} max(0, 1 - (s_y - s_j) / tau)`.

    Raises:
      ValueError: unless tau is positive and finite; from the loss, for outputs of a type that cannot hold it.
    """
    tau = _check_tau(tau)

    def per_example(outputs: Outputs, labels: Labels) -> PerExample:
        difference, own = _differences(outputs, labels)
        terms = jnp.where(own, 0, _positive_part(1 - _over(difference, tau)))
        return jnp.sum(terms, axis=-1) / outputs.shape[-1]

    slope = functools.partial(conjugates.multi_margin_slope, tau=tau)
    return Loss(per_example, _class_margin, tau, ("multiclass",), conjugates.multi_margin_conjugate(tau), slope)


def crammer_singer(tau: int | float | np.number = 1.0) -> Loss:
    """The Crammer-Singer hinge, `max(0, 1 - (s_y - max_{j != y} s_j) / tau)` (JMLR 2, 2001).

    Raises:
      ValueError: unless tau is positive and finite; from the loss, for outputs of a type that cannot hold it.
    """
    tau = _check_tau(tau)

    def per_example(outputs: Outputs, labels: Labels) -> PerExample:
        return _positive_part(1 - _over(_class_margin(outputs, labels), tau))

    slope = functools.partial(conjugates.crammer_singer_slope, tau=tau)
    return Loss(per_example, _class_margin, tau, ("multiclass",), conjugates.crammer_singer_conjugate(tau), slope)


def logistic() -> Loss:
    """The logistic loss: `log(1 + exp(-y f))` for labels -1 and +1 (one output), softmax cross-entropy for classes."""

    def per_example(outputs: Outputs, labels: Labels) -> PerExample:
        if outputs.shape[-1] == 1:
            return jax.nn.softplus(-_signed(outputs, labels))
        return -jnp.sum(jnp.where(_is_label(outputs, labels), jax.nn.log_softmax(outputs), 0), axis=-1)

    tasks = ("binary", "multiclass")
    return Loss(per_example, None, None, tasks, conjugates.logistic_conjugate(), conjugates.logistic_slope)


def squared() -> Loss:
    """The squared loss: `(f - y)^2 / 2` for one output, `||s - onehot(y)||^2 / 2` for classes.

    Problem (4), per example.  With one output the labels may be any real numbers.
    """

    def per_example(outputs: Outputs, labels: Labels) -> PerExample:
        _check_shapes(outputs, labels)
        if outputs.shape[-1] == 1:
            return 0.5 * (outputs[:, 0] - labels.astype(outputs.dtype)) ** 2
        return 0.5 * jnp.sum((outputs - _is_label(outputs, labels)) ** 2, axis=-1)

    tasks = ("binary", "multiclass", "regression")
    return Loss(per_example, None, None, tasks, conjugates.squared_conjugate(), conjugates.squared_slope)


class AssumptionCheck(NamedTuple):
    """Whether Assumption 1 (`tau > y f(w; x)` for all w in W and all samples) holds.

    Attributes:
      status: 'violated' (a margin at or above tau was seen), 'certified' (a bound over W lies below tau; the word of
        whoever gave the bound, which nothing checks here), 'not seen violated' (estimated: no such bound, but no margin
        seen reaches tau), 'undecided' (a margin is not a number), or 'not applicable' (a loss without tau).
      tau: margin scale, or None.
      largest_margin: largest margin seen, over the parameters and samples given; NaN when not applicable.
      clipped_share: share of the given margins at or above tau, where the hinge is clipped to 0.
      bound: the proven bound over W, or None.
    """

    status: str
    tau: float | None
    largest_margin: float
    clipped_share: float
    bound: float | None


def check_assumption_1(loss: Loss, margins: Array | np.ndarray, *, bound: int | float | None = None) -> AssumptionCheck:
    """Compares margins (any shape, e.g. `[solutions, samples]`) and a bound over W with tau (Assumption 1).

    A margin that was seen outweighs the bound: a bound below it is none.

    Raises:
      ValueError: without margins.
    """
    if loss.tau is None or loss.margin is None:
        return AssumptionCheck("not applicable", None, float("nan"), float("nan"), None)
    margins = np.asarray(margins, np.float64)  # NumPy's maximum keeps a NaN
    if not margins.size:
        raise ValueError(f"Assumption 1 is about margins of at least one example, got none (shape {margins.shape}).")
    largest, clipped = float(np.max(margins)), float(np.mean(margins >= loss.tau))
    if math.isnan(largest):
        status = "undecided"
    elif largest >= loss.tau:
        status = "violated"
    else:
        status = "certified" if bound is not None and bound < loss.tau else "not seen violated"
    return AssumptionCheck(status, loss.tau, largest, clipped, None if bound is None else float(bound))


LOSSES: Table[Callable[..., Loss]] = Table(
    "loss",
    {
        "binary_hinge": binary_hinge,
        "multi_margin": multi_margin,
        "crammer_singer": crammer_singer,
        "logistic": logistic,
        "squared": squared,
    },
)


def as_loss(given: Any) -> Loss:
    """The loss as it is, or a `Loss` from a plain function `(outputs [batch, out], labels [batch]) -> losses`.

    The function may return one number per example, `[batch]`, or a single number, which has to be the mean over the
    batch of losses of single examples: what it says of single examples is what is used.  Counts and comparisons become
    floats.  Such a loss has no margin and no tau, and fits data of every kind.

    Raises:
      TypeError: for what is neither; from the loss, for a function that returns another shape.
      ValueError: from the loss, for a function whose losses depend on the rest of the batch, or whose single number is
        no mean of losses of single examples (a root of a mean, a sum, weights that depend on how often a class is in
        the batch); tried on made-up examples of many outputs and labels.
    """
    if isinstance(given, Loss):
        return given
    names = [name for name, make in LOSSES.items() if given is make or (isinstance(given, str) and given == name)]
    if names or isinstance(given, str) or not callable(given):
        write = f"losses.{names[0]}()" if names else "losses.multi_margin() or a function of outputs and labels"
        raise TypeError(f"a loss is needed, got {given!r}: write {write}.")

    def alone(outputs: Outputs, labels: Labels) -> PerExample:
        def one(output: Array, label: Array) -> Array:
            value = jnp.asarray(given(output[None], label[None])).reshape(())
            return value.astype(jnp.promote_types(value.dtype, jnp.float32))

        return jax.vmap(one)(outputs, labels)

    @functools.cache  # a program is traced many times
    def check(num_outputs: tuple[int, ...], kind: Any, label_kind: Any) -> None:
        _check_alone(given, alone, num_outputs, kind, label_kind)

    def per_example(outputs: Outputs, labels: Labels) -> PerExample:
        values = jnp.asarray(given(outputs, labels))
        if values.shape in ((), labels.shape):
            check(outputs.shape[1:], outputs.dtype, labels.dtype)
        if values.ndim == 0:
            values = alone(outputs, labels)
        if values.shape != labels.shape:
            raise TypeError(
                f"the loss function returned shape {values.shape} for outputs {outputs.shape} and labels"
                f" {labels.shape}: it must return one loss per example, [batch], or their mean. With one output"
                " compare outputs[:, 0] with the labels."
            )
        return values.astype(jnp.promote_types(values.dtype, jnp.float32))

    return Loss(per_example, None, None, ("binary", "multiclass", "regression"), plain=True)


_MADE_UP = 2**20  # numbers, about: outputs on which a function is tried


def _made_up(num_outputs: tuple[int, ...], signed: bool, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Batches of examples, outputs `[batches, size, *num_outputs]` and labels `[batches, size]`.

    The labels are what data sets may have.  Most batches hold two of them, in unequal shares and any order, so that it
    shows when a loss depends on how often a label is in the batch; each class that there is room for is one of the two.
    Outputs are of both signs in the first half and probabilities in the second; real targets are both with each.
    """
    rng = np.random.default_rng(0)
    classes = 2 if signed else max(2, *num_outputs[-1:])
    room = _MADE_UP // (size * max(1, math.prod(num_outputs)))
    rows = np.arange(min(max(16, 4 * classes), max(8, room)))
    one = rng.permutation(classes)[rows % classes]
    other = (one + rng.integers(1, classes, len(rows))) % classes
    share = np.asarray([0.25, 0.75, 0.5, 0.0])[rows // classes % 4]
    is_one = rng.permuted(np.arange(size) < size * share[:, None], axis=1)
    labels = np.where(is_one, one[:, None], other[:, None])
    if signed:
        labels = np.concatenate([2.0 * labels - 1.0, rng.standard_normal((4, size)), rng.random((4, size))])
    else:
        labels = np.concatenate([labels, rng.integers(0, classes, (4, size))])
    shape = (len(labels), size, *num_outputs)
    return np.concatenate([rng.standard_normal(shape), rng.random(shape)]), np.concatenate([labels, labels])


def _check_alone(
    given: Any, alone: Callable[[Array, Array], Array], num_outputs: tuple[int, ...], kind: Any, label_kind: Any
) -> None:
    """Raises ValueError where what a function says of made-up batches is not what it says of examples one at a time."""
    signed = bool(jnp.issubdtype(label_kind, jnp.floating))
    for size in (4, 128):  # differences show best among few; the largest of a fixed number only among many
        if size == 4 or math.prod(num_outputs) * size * 16 <= _MADE_UP:
            _try_batches(given, alone, kind, label_kind, *_made_up(num_outputs, signed, size))


def _try_batches(
    given: Any, alone: Callable[[Array, Array], Array], kind: Any, label_kind: Any, made: np.ndarray, marks: np.ndarray
) -> None:
    with jax.ensure_compile_time_eval(), jax.default_matmul_precision("highest"), jax.debug_nans(False):
        outputs, labels = jnp.asarray(made, kind), jnp.asarray(marks, label_kind)
        found = jax.vmap(lambda o, y: jnp.asarray(given(o, y)))(outputs, labels)
        single = alone(outputs.reshape(-1, *outputs.shape[2:]), labels.reshape(-1))
    narrow = any(jnp.issubdtype(k, jnp.floating) and jnp.finfo(k).eps > 1e-4 for k in (kind, found.dtype))
    singles = np.asarray(single, np.float64).reshape(marks.shape)
    sizes = np.where(np.isfinite(singles), np.abs(singles), 0.0)
    for whole, each, size in zip(np.asarray(found, np.float64), singles, sizes, strict=True):
        expected = each.mean() if whole.ndim == 0 else each
        finite = np.isfinite(whole) & np.isfinite(expected)
        with np.errstate(invalid="ignore"):
            close = np.abs(whole - expected) <= (2e-2 if narrow else 1e-3) * size.max() + 1e-6 * sizes.max()
        if not np.where(finite, close, np.isfinite(whole) == np.isfinite(expected)).all():
            _refuse_batch(whole, expected, len(each))


def _refuse_batch(whole: Any, expected: Any, size: int) -> None:
    said, one = (np.array2string(v, precision=4, threshold=8) for v in (whole, expected))
    raise ValueError(
        f"the loss function gives {said} for a batch of {size} made-up examples, and {one} for one at a time"
        f"{' in the mean' * (whole.ndim == 0)}: return a loss for each example alone, [batch], or the mean of such. A"
        " root, a sum or a statistic of the batch is none, such as the share of each class: weight classes by constants"
        " of the whole training set. With one output compare outputs[:, 0] with the labels: outputs - labels has shape"
        " [batch, batch]."
    )
