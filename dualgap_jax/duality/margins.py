"""Bounds on the margins over W, for Assumption 1: branches that are bias-free mlps are recognised by their program."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from dualgap_jax import seeds
from dualgap_jax.duality.problem import ByProgram, Problem
from dualgap_jax.identity import function_digest
from dualgap_jax.networks import mlp, mlp_output_bound

CONTRACTIONS = ("relu", "leaky_relu", "identity", "tanh")  # |psi(a)| <= |a|


def mlp_problem(
    x: Float64[np.ndarray, "n ..."],
    c: Float64[np.ndarray, "n out"],
    *,
    tau: int | float,
    widths: tuple[int, ...],
    activation: str,
) -> Problem:
    """The one-branch problem of a bias-free `networks.mlp` on the unit ball, with offset 0."""
    branch = mlp(widths, c.shape[1], activation=activation, use_bias=False)
    template, state = branch.init(seeds.key(0), jnp.asarray(x[:1], jnp.float32))
    size = sum(leaf.size for leaf in jax.tree.leaves(template))
    return Problem(branch, x, c, 0.0, tau, 1.0, 1.0, template, state, size)


def label_scale(c: Float64[np.ndarray, "n out"]) -> float | None:
    """The largest margin for outputs of norm 1 where c is that of labels; None where it is another functional.

    A margin between classes is a difference of two outputs: sqrt(2) times their norm.
    """
    classes = c.shape[1]
    if classes == 1:
        return 1.0 if (np.abs(c) == 1).all() else None
    centred = c + 1 / classes
    one_hot = (np.abs(centred - np.eye(classes)[np.argmax(c, axis=1)]) < 1e-12).all()
    return math.sqrt(2) if one_hot else None


def mlp_margin(x: np.ndarray, c: np.ndarray, layers: int, radius: int | float) -> float | None:
    """A proven bound on the margins of a bias-free mlp whose activation is a contraction, over the ball of weights."""
    scale = label_scale(c)
    if scale is None:
        return None
    largest = float(np.linalg.norm(x.reshape(len(x), -1), axis=1).max())
    return scale * mlp_output_bound(layers, radius, largest) * (1 + 1e-12)


class Recognised(NamedTuple):
    """What a branch is: a bias-free mlp with hidden layers of these widths, and the name of its activation."""

    widths: tuple[int, ...]
    activation: str


def recognise(problem: Problem) -> Recognised | None:
    """What the branch is, if it is a bias-free mlp whose activation is a contraction; else None.

    It is known by the program of its outputs, not by what it is called.
    """
    return _recognised(ByProgram(problem))


@functools.lru_cache(maxsize=32)
def _recognised(key: ByProgram) -> Recognised | None:
    problem = key.problem
    leaves = jax.tree.leaves(problem.template)
    if not leaves or any(leaf.ndim != 2 for leaf in leaves) or leaves[-1].shape[0] != problem.c.shape[1]:
        return None
    widths = tuple(int(leaf.shape[0]) for leaf in leaves[:-1])
    arguments = [jax.ShapeDtypeStruct((problem.size,), jnp.float64), jax.ShapeDtypeStruct(problem.x.shape, jnp.float64)]
    with jax.enable_x64(True):
        program = function_digest(problem.outputs, *arguments)
        for activation in CONTRACTIONS:
            like = mlp_problem(problem.x, problem.c, tau=problem.tau, widths=widths, activation=activation)
            if like.size == problem.size and function_digest(like.outputs, *arguments) == program:
                return Recognised(widths, activation)
    return None


def margin_bound(problem: Problem) -> float | None:
    """A proven bound on the margins over W, where the branch is a bias-free mlp with a known activation; else None."""
    known = recognise(problem)
    return None if known is None else mlp_margin(problem.x, problem.c, len(known.widths) + 1, problem.radius)
