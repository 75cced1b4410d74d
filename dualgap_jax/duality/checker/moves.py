"""Operations of the checkers that move entries of arrays, or multiply and add them by their places.

Arrays of ranges have two leading axes more than those of the program, `[boxes, derivatives, ...]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from dualgap_jax.duality.checker.pairs import Pair, mul, summed


def dot(a: Pair, b: Pair, numbers: Any) -> Pair:
    """`lax.dot_general` of pairs."""
    (ca, cb), (ba, bb) = numbers
    free_a = [k for k in range(a[0].ndim - 2) if k not in (*ca, *ba)]
    free_b = [k for k in range(b[0].ndim - 2) if k not in (*cb, *bb)]

    def arranged(e: np.ndarray, batch: Any, free: list[int], inner: Any, before: int, after: int) -> np.ndarray:
        order = [0, 1, *(k + 2 for k in (*batch, *free, *inner))]
        moved = e.transpose(order)
        first, last = moved.shape[: 2 + len(batch)], moved.shape[2 + len(batch) :]
        return moved.reshape(*first, *[1] * before, *last[: len(free)], *[1] * after, *last[len(free) :])

    left = [arranged(e, ba, free_a, ca, 0, len(free_b)) for e in a]
    right = [arranged(e, bb, free_b, cb, len(free_a), 0) for e in b]
    terms = mul((left[0], left[1]), (right[0], right[1]))
    return summed(terms, tuple(range(terms[0].ndim - len(ca), terms[0].ndim))) if ca else terms


def _broadcast(e: np.ndarray, p: Any, shape: Any) -> np.ndarray:
    full = [1] * len(shape)
    for axis, place in enumerate(p["broadcast_dimensions"]):
        full[place] = e.shape[2 + axis]
    return np.broadcast_to(e.reshape(*e.shape[:2], *full), (*e.shape[:2], *shape))


def _sliced(e: np.ndarray, p: Any, shape: Any) -> np.ndarray:
    steps = p["strides"] or (1,) * len(shape)
    cuts = [slice(a, b, s) for a, b, s in zip(p["start_indices"], p["limit_indices"], steps, strict=True)]
    return e[(slice(None), slice(None), *cuts)]


def _reshaped(e: np.ndarray, p: Any, shape: Any) -> np.ndarray:
    return e.reshape(*e.shape[:2], *shape)


MOVES: dict[str, Callable[[np.ndarray, Any, Any], np.ndarray]] = {
    "reshape": _reshaped,
    "squeeze": _reshaped,
    "expand_dims": _reshaped,
    "broadcast_in_dim": _broadcast,
    "slice": _sliced,
    "transpose": lambda e, p, shape: e.transpose(0, 1, *(k + 2 for k in p["permutation"])),
    "tile": lambda e, p, shape: np.tile(e, (1, 1, *p["reps"])),
    "rev": lambda e, p, shape: np.flip(e, tuple(k + 2 for k in p["dimensions"])),
}


def around(e: np.ndarray, edges: Any, value: float, between: Any = None) -> np.ndarray:
    """An array with entries of one value `between` its own and at its `edges`, along the program's axes.

    A negative edge takes entries away.
    """
    for axis, ((low, high), step) in enumerate(zip(edges, between or (1,) * len(edges), strict=True), start=2):
        length = (e.shape[axis] - 1) * step + 1 if e.shape[axis] else 0
        wide = np.full((*e.shape[:axis], max(low + length + high, 0), *e.shape[axis + 1 :]), value, e.dtype)
        first, stop = -(min(low, 0) // step), min(e.shape[axis], -((low - wide.shape[axis]) // step))
        if first < stop:
            at = (slice(None),) * axis
            wide[(*at, slice(low + first * step, low + (stop - 1) * step + 1, step))] = e[(*at, slice(first, stop))]
        e = wide
    return e


def windows(a: Pair, p: Any, padding: float) -> Pair:
    """The entries of each window of `lax.reduce_window` along a new last axis.  Padding counts as the number given."""
    sizes, strides, dilation = p["window_dimensions"], p["window_strides"], p["window_dilation"]

    def one(e: np.ndarray) -> np.ndarray:
        full = around(e, p["padding"], padding, p["base_dilation"])
        found = []
        for offset in itertools.product(*(range(0, n * d, d) for n, d in zip(sizes, dilation, strict=True))):
            cuts = []
            for start, n, d, step, length in zip(offset, sizes, dilation, strides, full.shape[2:], strict=True):
                cuts.append(slice(start, length - (n - 1) * d + start, step))
            found.append(full[(slice(None), slice(None), *cuts)])
        return np.stack(found, -1)

    return one(a[0]), one(a[1])


def convolved(a: Pair, b: Pair, p: Any) -> Pair:
    """`lax.conv_general_dilated` of pairs: group by group."""
    numbers = p["dimension_numbers"]
    left, right = (
        tuple(e.transpose(0, 1, *(k + 2 for k in spec)) for e in x)
        for x, spec in ((a, numbers.lhs_spec), (b, numbers.rhs_spec))
    )
    spatial = right[0].shape[4:]
    over = {
        "window_dimensions": (1, 1, *spatial),
        "window_strides": (1, 1, *p["window_strides"]),
        "window_dilation": (1, 1, *p["rhs_dilation"]),
        "base_dilation": (1, 1, *p["lhs_dilation"]),
        "padding": ((0, 0), (0, 0), *p["padding"]),
    }
    groups, axis = p["feature_group_count"], 3  # of the channels; examples are in groups along the axis before
    if p["batch_group_count"] > 1:
        groups, axis = p["batch_group_count"], 2
    patches = windows((left[0], left[1]), over, 0.0)  # [.., batch, channels, places..., offsets]
    kernel = tuple(e.reshape(*e.shape[:4], -1) for e in right)  # [.., out, channels, offsets]
    last = patches[0].ndim - 3
    inputs, outputs = ([np.split(e, groups, k) for e in x] for x, k in ((patches, axis), (kernel, 2)))
    parts = [
        dot((inputs[0][g], inputs[1][g]), (outputs[0][g], outputs[1][g]), (((1, last), (1, 2)), ((), ())))
        for g in range(groups)
    ]
    lo, hi = (np.concatenate([part[e] for part in parts], -1) for e in (0, 1))  # [.., batch, places..., out]
    order = np.argsort((numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]))
    axes = (0, 1, *(k + 2 for k in order.tolist()))
    return lo.transpose(axes), hi.transpose(axes)
