"""What a branch is, where something can be proven about it in closed form: homogeneous in its weights.

A bias-free mlp with L weight matrices and a positively homogeneous activation has `f(s w) = s^L f(w)` for s >= 0.  One
hidden layer of squares has degree 3, one of gated units degree 2.  With biases a single hidden layer is still
`A psi(U (x, 1)) + c`: homogeneous in (A, U) over inputs with one more coordinate that is 1, plus an output bias c of
degree 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
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
from dualgap_jax.networks import gated, mlp
from dualgap_jax.types import Network

LEAKY_SLOPE = 0.01  # of jax.nn.leaky_relu for negative arguments
_SLOPES = {"relu": 0.0, "leaky_relu": LEAKY_SLOPE, "identity": 1.0}
_EPS = float(np.finfo(np.float64).eps)
_WITH_BIASES, _KERNELS = [1, 2, 1, 2], [2, 2]  # axes of the leaves of one hidden layer


class Structure(NamedTuple):
    """A network that is positively homogeneous in its kernels.

    Attributes:
      widths: of the hidden layers.
      activation: 'relu', 'leaky_relu' or 'identity'; 'square' or 'gated' with one hidden layer.
      use_bias: whether it has biases; then there is one hidden layer.
      gates: `[m, d]`, of 'gated'.
    """

    widths: tuple[int, ...]
    activation: str
    use_bias: bool
    gates: np.ndarray | None = None

    @property
    def order(self) -> int:
        """The degree in the inputs of what a hidden unit makes of them."""
        return 2 if self.activation == "square" else 1

    @property
    def degree(self) -> int:
        """L: the number of weight matrices, and 1 more where a unit is squared."""
        return len(self.widths) + self.order

    @property
    def share(self) -> float:
        """What kappa is of rho: the largest product of the layers' norms in the unit ball, `L^(-L/2)` for L of them."""
        return self.degree ** (-self.degree / 2) * 2 ** (self.order - 1)

    @property
    def bent(self) -> bool:
        """Whether it is one hidden layer of ReLU, leaky or linear units."""
        return len(self.widths) == 1 and self.activation in _SLOPES

    @property
    def negative_slope(self) -> float:
        """The activation's slope for negative arguments."""
        return _SLOPES[self.activation]

    def branch(self, out: int) -> Network:
        """The network itself."""
        if self.gates is not None:
            return gated(self.gates, out)
        return mlp(self.widths, out, self.activation, self.use_bias)

    def active(self, z: np.ndarray, x: np.ndarray) -> np.ndarray:
        """What the units make of their inputs `z [k, m, n]`; the network's own are `x [n, d]`."""
        if self.gates is not None:
            return z * open_gates(self.gates, x).T
        return z * z if self.activation == "square" else np.where(z > 0, z, self.negative_slope * z)

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

    def unit(self, first: np.ndarray, last: np.ndarray, place: int = 0) -> np.ndarray:
        """Flat weights `[p]` of norm 1 of `last psi(.. psi(first.x))`, one active unit a layer, for unit vectors.

        `place` is that of the unit in the first hidden layer, and matters where units have gates.
        """
        share = 1 / math.sqrt(self.degree)
        d, out = len(first) - self.use_bias, len(last)
        sizes, parts = (d, *self.widths, out), []
        for i, (fan_in, width) in enumerate(itertools.pairwise(sizes)):
            kernel = np.zeros((width, fan_in))
            end = i == len(sizes) - 2
            if i == 0:
                kernel[place] = first[:d] * share * math.sqrt(self.order)
            else:
                kernel[:, place if i == 1 else 0] = last * share if end else np.eye(1, width)[0] * share
            if self.use_bias:
                hidden = np.zeros(width)
                if i == 0:
                    hidden[place] = first[d] * share * math.sqrt(self.order)
                parts.append(hidden)
            parts.append(kernel.reshape(-1))
        return np.concatenate(parts)


def open_gates(gates: np.ndarray, x: np.ndarray) -> np.ndarray:
    """`1[g.x_j >= 0]`, `[n, m]`, of the exact products: where a rounded one says nothing, they are rational numbers."""
    sides = [np.ldexp(a, -np.frexp(np.abs(a).max(axis=1, initial=0.0, keepdims=True))[1]) for a in (x, gates)]
    products = sides[0] @ sides[1].T
    norms = [np.linalg.norm(a, axis=1) for a in sides]
    found = products >= 0
    doubtful = np.abs(products) <= (x.shape[1] + 8) * _EPS * norms[0][:, None] * norms[1] + 1e-300
    for j, k in np.argwhere(doubtful & np.outer(norms[0] > 0, norms[1] > 0)).tolist():
        exact = sum(Fraction(a) * Fraction(b) for a, b in zip(x[j].tolist(), gates[k].tolist(), strict=True))
        found[j, k] = exact >= 0
    return found


def structure_of(one: Problem) -> Structure | None:
    """What the branch of a one-branch problem is, by the program of its outputs; None for every other branch."""
    known = recognise(one)
    if known is not None and known.activation in HOMOGENEOUS:
        return Structure(known.widths, known.activation if known.widths else "identity", False)
    shapes = [leaf.shape for leaf in jax.tree.leaves(one.template)]
    if [len(shape) for shape in shapes] not in (_WITH_BIASES, _KERNELS):
        return None
    arguments = [jax.ShapeDtypeStruct((one.size,), jnp.float64), jax.ShapeDtypeStruct(one.x.shape, jnp.float64)]
    with jax.enable_x64(True):
        constants = [np.asarray(c) for c in jax.make_jaxpr(one.outputs)(*arguments).consts]
        program = function_digest(one.outputs, *arguments)
        for made in _candidates(shapes, constants):
            like = one._replace(branch=made.branch(one.c.shape[1]), state=())
            like = like._replace(template=like.branch.init(seeds.key(0), jnp.asarray(one.x[:1], jnp.float32))[0])
            if [leaf.shape for leaf in jax.tree.leaves(like.template)] != shapes:
                continue
            if function_digest(like.outputs, *arguments) == program:
                return made
    return None


def _candidates(shapes: list[tuple[int, ...]], constants: list[np.ndarray]) -> Iterator[Structure]:
    """What a branch with leaves of these shapes, and these constants in its program, may be."""
    if [len(shape) for shape in shapes] == _WITH_BIASES:
        for activation in (*HOMOGENEOUS, "square"):
            yield Structure(shapes[0], activation, True)
    else:
        yield Structure(shapes[0][:1], "square", False)
        for gates in constants:
            if gates.shape == shapes[0] and gates.dtype == np.float64:
                yield Structure(gates.shape[:1], "gated", False, gates)


def flat(tree: Any) -> np.ndarray:
    """A parameter tree as a flat float64 vector, in the order of the one-branch problem."""
    with jax.enable_x64(True):
        return np.asarray(ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree))[0])
