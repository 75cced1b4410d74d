"""The weights of all runs on the host, at the start and with their loss in float64, and the examples in one table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualgap_jax.config import require
from dualgap_jax.data import Dataset, standardise
from dualgap_jax.hitting.random import run_keys
from dualgap_jax.hitting.runs import Runs, SgdSpec, Weights
from dualgap_jax.losses import Loss, marked
from dualgap_jax.networks import mlp
from dualgap_jax.types import PyTree


def examples_table(datasets: Sequence[Dataset], dtype: Any) -> tuple[np.ndarray, int, int]:
    """All data sets in one flat array, per set the standardised features column by column, then the labels; n, d."""
    require(len(datasets) > 0, "no data set; give at least one.")
    shapes = {d.x.reshape(len(d.x), -1).shape for d in datasets}
    require(len(shapes) == 1, f"the data sets have different sizes {sorted(shapes)}; runs of one study share n and d.")
    ((n, d),) = shapes
    require(n < 2**16, f"{n} examples; hitting studies take at most {2**16 - 1}.")
    parts = []
    for dataset in datasets:
        require(dataset.num_outputs == 1, f"data set {dataset.name!r} has {dataset.num_outputs} outputs; needed: 1.")
        x = np.asarray(standardise(dataset.x, dataset.mean, dataset.std)).reshape(n, -1)
        parts += [x.T.astype(dtype).ravel(), dataset.y.astype(dtype)]
    whole = np.concatenate(parts)
    require(whole.size < 2**31, "the data sets are too large to be indexed by 32-bit integers; give fewer.")
    return whole, n, d


@functools.lru_cache(maxsize=64)
def _initialiser(width: int, d: int, use_bias: bool, init: str) -> Callable[[Array], PyTree]:
    """Keys `[lanes]` -> the initial parameters of that many networks."""
    branch = mlp(hidden=(width,), out=1, use_bias=use_bias, init=init)
    return jax.jit(jax.vmap(lambda key: branch.init(key, jnp.zeros((1, d)))[0]))


def initial_weights(runs: Runs, d: int, spec: SgdSpec) -> Weights:
    """The weights at step 0: those of `mlp(hidden=(width,), out=1)` from each run's key, times its scale."""
    keys, _ = run_keys(runs)
    height = int(runs.width.max())
    at_once = spec.lanes_on(jax.default_backend())
    dtype = jnp.zeros(0).dtype
    count = len(runs.width)
    weights = Weights(
        np.zeros((count, height, d), dtype),
        np.zeros((count, height), dtype),
        np.zeros((count, height), dtype),
        np.zeros(count, dtype),
    )
    for width in np.unique(runs.width):
        init = _initialiser(int(width), d, spec.use_bias, spec.init)
        chosen = np.flatnonzero(runs.width == width)
        for part in np.split(chosen, range(at_once, len(chosen), at_once)):  # one shape, one program
            lanes = np.resize(part, at_once)
            first, last = jax.tree.map(np.asarray, init(keys[lanes]))
            scale = runs.init_scale[part].astype(dtype)
            m = len(part)
            weights.kernel[part, :width] = first["kernel"][:m] * scale[:, None, None]
            weights.head[part, :width] = last["kernel"][:m, 0] * scale[:, None]
            if spec.use_bias:
                weights.bias[part, :width] = first["bias"][:m] * scale[:, None]
                weights.offset[part] = last["bias"][:m, 0] * scale
    return weights


def full_loss(weights: Weights, runs: Runs, datasets: Sequence[Dataset], loss: Loss) -> np.ndarray:
    """The mean loss of every run over its full data set in float64, `[runs]`; by another route than the training's."""
    result = np.full(len(runs.width), np.nan)
    with jax.enable_x64(True):
        for index in np.unique(runs.data):
            dataset = datasets[int(index)]
            x = np.asarray(standardise(dataset.x, dataset.mean, dataset.std), np.float64).reshape(len(dataset.x), -1)
            y = jnp.asarray(dataset.y, float)
            for k in np.flatnonzero(runs.data == index):
                kernel, bias, head, offset = (np.asarray(part[k], np.float64) for part in weights)
                with np.errstate(over="ignore", invalid="ignore"):
                    f = np.maximum(x @ kernel.T + bias[None], 0) @ head + offset
                outputs = jnp.asarray(f)[:, None]
                result[k] = np.mean(np.asarray(marked(loss.per_example(outputs, y), outputs)))
    return result
