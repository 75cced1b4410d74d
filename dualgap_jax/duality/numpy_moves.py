"""Operations of the checkers that move entries of arrays, or multiply and add them by their places.

Arrays of ranges have two leading axes more than those of the program, `[boxes, derivatives, ...]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from dualgap_jax.duality.numpy_pairs import Pair, mul, summed


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


def windows(a: Pair, p: Any, padding: float) -> Pair:
    """The entries of each window of `lax.reduce_window` along a new last axis.  Padding counts as the number given."""
    sizes, strides, dilation = p["window_dimensions"], p["window_strides"], p["window_dilation"]
    if any(d != 1 for d in p["base_dilation"]):
        raise NotImplementedError("windows over a dilated array are not known to the checker.")

    def one(e: np.ndarray) -> np.ndarray:
        full = np.pad(e, [(0, 0), (0, 0), *p["padding"]], constant_values=padding)
        found = []
        for offset in itertools.product(*(range(0, n * d, d) for n, d in zip(sizes, dilation, strict=True))):
            cuts = []
            for start, n, d, step, length in zip(offset, sizes, dilation, strides, full.shape[2:], strict=True):
                cuts.append(slice(start, length - (n - 1) * d + start, step))
            found.append(full[(slice(None), slice(None), *cuts)])
        return np.stack(found, -1)

    return one(a[0]), one(a[1])


def convolved(a: Pair, b: Pair, p: Any) -> Pair:
    """`lax.conv_general_dilated` of pairs, without groups and without a dilated input."""
    numbers = p["dimension_numbers"]
    plain = p["feature_group_count"] == 1 and p["batch_group_count"] == 1 and all(d == 1 for d in p["lhs_dilation"])
    if not plain:
        raise NotImplementedError("a convolution in groups, or of a dilated input, is not known to the checker.")
    left, right = (
        tuple(e.transpose(0, 1, *(k + 2 for k in spec)) for e in x)
        for x, spec in ((a, numbers.lhs_spec), (b, numbers.rhs_spec))
    )
    spatial = right[0].shape[4:]
    over = {
        "window_dimensions": (1, 1, *spatial),
        "window_strides": (1, 1, *p["window_strides"]),
        "window_dilation": (1, 1, *p["rhs_dilation"]),
        "base_dilation": (1,) * (2 + len(spatial)),
        "padding": ((0, 0), (0, 0), *p["padding"]),
    }
    patches = windows((left[0], left[1]), over, 0.0)  # [.., batch, channels, places..., offsets]
    kernel = tuple(e.reshape(*e.shape[:4], -1) for e in right)  # [.., out, channels, offsets]
    last = patches[0].ndim - 3
    lo, hi = dot(patches, (kernel[0], kernel[1]), (((1, last), (1, 2)), ((), ())))  # [.., batch, places..., out]
    order = np.argsort((numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1]))
    axes = (0, 1, *(k + 2 for k in order.tolist()))
    return lo.transpose(axes), hi.transpose(axes)
