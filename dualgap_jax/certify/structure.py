"""What a branch is, where something can be proven about it in closed form: an mlp that is homogeneous in its weights.

A bias-free mlp with L weight matrices and a positively homogeneous activation has `f(s w) = s^L f(w)` for s >= 0.  With
biases a single hidden layer is still `A psi(U (x, 1)) + c`: homogeneous of degree 2 in (A, U) over inputs with one
more coordinate that is 1, plus an output bias c of degree 1.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from dualgap_jax import seeds
from dualgap_jax.duality.margins import recognise
from dualgap_jax.duality.problem import Problem
from dualgap_jax.duality.theorem import HOMOGENEOUS
from dualgap_jax.identity import function_digest
from dualgap_jax.networks import mlp

LEAKY_SLOPE = 0.01  # of jax.nn.leaky_relu for negative arguments


class Structure(NamedTuple):
    """An mlp that is positively homogeneous in its kernels.

    Attributes:
      widths: of the hidden layers.
      activation: 'relu', 'leaky_relu' or 'identity'.
      use_bias: whether it has biases; then there is one hidden layer.
    """

    widths: tuple[int, ...]
    activation: str
    use_bias: bool

    @property
    def degree(self) -> int:
        """L, the number of weight matrices."""
        return len(self.widths) + 1

    @property
    def negative_slope(self) -> float:
        """The activation's slope for negative arguments."""
        return {"relu": 0.0, "leaky_relu": LEAKY_SLOPE, "identity": 1.0}[self.activation]

    def inputs(self, x: np.ndarray) -> np.ndarray:
        """`[n, d']`: the inputs as rows, with a 1 behind them where there is a hidden bias."""
        flat = np.asarray(x, np.float64).reshape(len(x), -1)
        return np.concatenate([flat, np.ones((len(flat), 1))], axis=1) if self.use_bias else flat

    def layers(self, weights: np.ndarray, shape: tuple[int, int]) -> tuple[list[np.ndarray], np.ndarray]:
        """The kernels `[k, out, in]` of the branches with flat weights `[k, p]`, and their output biases `[k, out]`.

        `shape` is (d, out); the first kernel acts on `inputs`.
        """
        sizes, at, kernels = (shape[0], *self.widths, shape[1]), 0, []
        bias = np.zeros((len(weights), shape[1]))
        for i, (fan_in, width) in enumerate(itertools.pairwise(sizes)):
            if self.use_bias:  # a layer's leaves in the order of their names: bias, kernel
                bias, at = weights[:, at : at + width], at + width
            kernel = weights[:, at : at + width * fan_in].reshape(len(weights), width, fan_in)
            at += width * fan_in
            if self.use_bias and i == 0:
                kernel = np.concatenate([kernel, bias[:, :, None]], axis=2)
            kernels.append(kernel)
        return kernels, bias if self.use_bias else np.zeros((len(weights), shape[1]))

    def kernels_only(self, shape: tuple[int, int]) -> np.ndarray:
        """`[p]`: 1 for the parameters in which the branch is homogeneous, 0 for the output biases; `shape` as above."""
        sizes, parts = (shape[0], *self.widths, shape[1]), []
        for i, (fan_in, width) in enumerate(itertools.pairwise(sizes)):
            if self.use_bias:
                parts.append(np.full(width, float(i < len(self.widths))))
            parts.append(np.ones(width * fan_in))
        return np.concatenate(parts)

    def apart(self, weights: np.ndarray, out: int) -> tuple[np.ndarray, np.ndarray]:
        """The flat weights `[k, p]` with output biases 0, and these, `[k, out]` (0 for a branch without biases)."""
        if not self.use_bias:
            return weights, np.zeros((len(weights), out))
        place = self._output_bias(weights.shape[1], out)
        kernels = weights.copy()
        kernels[:, place] = 0.0
        return kernels, weights[:, place]

    def with_bias(self, weights: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """The flat weights `[k, p]` with the output bias `[out]` in the place of their own."""
        if not self.use_bias:
            return weights
        made = weights.copy()
        made[:, self._output_bias(weights.shape[1], len(bias))] = bias
        return made

    def _output_bias(self, size: int, out: int) -> slice:
        """Where it is: behind the hidden bias `[m]` and kernel `[m, d]`, before the last kernel `[out, m]`."""
        end = size - out * self.widths[0]
        return slice(end - out, end)

    def unit(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Flat weights `[p]` of norm 1 of `last psi(.. psi(first.x))`, one active unit a layer, for unit vectors."""
        share = 1 / math.sqrt(self.degree)
        return self._weights(first * share, last * share, share)

    def _weights(self, first: np.ndarray, last: np.ndarray, inner: float) -> np.ndarray:
        d, out = len(first) - self.use_bias, len(last)
        sizes, parts = (d, *self.widths, out), []
        for i, (fan_in, width) in enumerate(itertools.pairwise(sizes)):
            kernel = np.zeros((width, fan_in))
            end = i == len(sizes) - 2
            if i == 0:
                kernel[0] = first[:d]
            elif end:
                kernel[:, 0] = last
            else:
                kernel[0, 0] = inner
            if self.use_bias:
                hidden = np.zeros(width)
                hidden[0] = 0.0 if end else first[d]
                parts.append(hidden)
            parts.append(kernel.reshape(-1))
        return np.concatenate(parts)


def structure_of(one: Problem) -> Structure | None:
    """What the branch of a one-branch problem is, by the program of its outputs; None for every other branch."""
    known = recognise(one)
    if known is not None:
        return Structure(known.widths, known.activation, False) if known.activation in HOMOGENEOUS else None
    leaves = jax.tree.leaves(one.template)
    if [leaf.ndim for leaf in leaves] != [1, 2, 1, 2]:
        return None
    width, out, size = leaves[0].shape[0], leaves[2].shape[0], math.prod(one.x.shape[1:])
    if (leaves[1].shape, leaves[3].shape) != ((width, size), (out, width)):
        return None
    arguments = [jax.ShapeDtypeStruct((one.size,), jnp.float64), jax.ShapeDtypeStruct(one.x.shape, jnp.float64)]
    with jax.enable_x64(True):
        program = function_digest(one.outputs, *arguments)
        for activation in HOMOGENEOUS:
            like = one._replace(branch=mlp((width,), out, activation=activation, use_bias=True), state=())
            like = like._replace(template=like.branch.init(seeds.key(0), jnp.asarray(one.x[:1], jnp.float32))[0])
            if function_digest(like.outputs, *arguments) == program:
                return Structure((width,), activation, True)
    return None


def flat(tree: Any) -> np.ndarray:
    """A parameter tree as a flat float64 vector, in the order of the one-branch problem."""
    with jax.enable_x64(True):
        return np.asarray(ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree))[0])
