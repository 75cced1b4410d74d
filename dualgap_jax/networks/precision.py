"""Number formats of a network: parameters stored in one floating dtype, computation done in another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dualgap_jax.types import KeyArray, Network, Params, PyTree, State, Stem


def accumulator(dtype: Any) -> Any:
    """The dtype in which numbers of this dtype are added up: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """The tree with its floating leaves in this dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def as_stored(new: State, old: State) -> State:
    """The new state in the old one's dtypes, so that a loop can carry it."""
    return jax.tree.map(lambda a, b: a.astype(b.dtype), new, old)


def with_precision(branch: Network, *, param_dtype: Any = "float32", compute_dtype: Any = "float32") -> Network:
    """The branch with its parameters stored in one floating dtype and its computation done in another.

    `init` draws as the branch does and rounds the parameters to `param_dtype`.  `apply` and the functions of the stem
    take parameters and inputs to `compute_dtype`, and their outputs come back in float32 (float64 where that is the
    compute dtype), so that the sum over branches, the loss and all above are float32.  State keeps its dtypes.
    Gradients come back in `param_dtype`, as JAX has it.

    In an `mlp` every sum that this package writes, over branches, hidden units and the batch, accumulates in float32,
    in the gradient too; products with bfloat16 operands do so on all of XLA's platforms.  Flax modules do inside what
    Flax does.

    Pre-activations in bfloat16 are affine in the parameters only up to their rounding, a relative 2^-8.  Networks are
    therefore trained with this wrapper, and evaluated and drawn in float32 by the plain branch, with the parameters
    `upcast`.

    With bfloat16 parameters a training step computes the new weight in float32 and rounds it to nearest once: a change
    smaller than 2^-9 of the weight is lost, and one larger than 2^-8 never is.

    Args:
      branch: one branch.  Of a network of many, or of a mixture, wrap the branches and sum afterwards.
      param_dtype, compute_dtype: floating dtypes, as `jnp.dtype` takes them.

    Raises:
      ValueError: for a dtype that is not floating, or a network made by `multi_branch` or `mixture`.
    """
    for name, dtype in (("param_dtype", param_dtype), ("compute_dtype", compute_dtype)):
        if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            raise ValueError(f"with_precision: {name}={dtype} must be a floating dtype, such as float32 or bfloat16.")
    if branch.stacked is not None or branch.mixed is not None:
        write = "mixture([with_precision(part, ...), ...])"
        if branch.stacked is not None:
            write = "multi_branch(with_precision(branch, ...), num_branches)"
        raise ValueError(
            f"with_precision takes one branch, and got a network of many, whose sum must stay float32: write {write}."
        )
    wide = accumulator(jnp.dtype(compute_dtype))

    def init(key: KeyArray, x: Array, /) -> tuple[Params, State]:
        params, state = branch.init(key, x)
        return cast(params, param_dtype), state

    def at_precision(apply: Callable[..., tuple[Array, State]]) -> Callable[..., tuple[Array, State]]:
        def run(
            params: Params, state: State, x: PyTree, /, *, key: Any = None, train: bool = False
        ) -> tuple[Array, State]:
            y, new = apply(cast(params, compute_dtype), state, cast(x, compute_dtype), key=key, train=train)
            return y.astype(wide), as_stored(new, state)

        return run

    apply = at_precision(branch.apply)
    branch = branch.computed()
    if branch.stem is None:
        return Network(init, apply)
    first, rest, rest_sum, _ = branch.stem

    def preactivation(params: Params, x: Array, /) -> PyTree:
        return cast(first(cast(params, compute_dtype), cast(x, compute_dtype)), compute_dtype)

    stem = Stem(preactivation, at_precision(rest), None if rest_sum is None else at_precision(rest_sum), apply)
    return Network(init, apply, stem)


def upcast(params: Params) -> Params:
    """Parameters, NumPy or JAX arrays or their shapes, with floating leaves of at least float32; exact.

    A leaf that is as wide already is the same array.
    """

    def wide(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or accumulator(leaf.dtype) == leaf.dtype:
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(dtype=accumulator(leaf.dtype))
        return leaf.astype(accumulator(leaf.dtype))

    return jax.tree.map(wide, params)
