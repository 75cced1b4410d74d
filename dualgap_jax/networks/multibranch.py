"""The multi-branch network of Section 2: the mean (or sum) of I stacked copies of a branch, and mixtures.

Branches talk to each other only through the sum of their outputs, `batch x out` numbers.  All that this package does to
keep memory bounded, to stream and to shard rests on that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dualgap_jax.networks.flax import as_network
from dualgap_jax.networks.precision import accumulator
from dualgap_jax.sizes import positive
from dualgap_jax.types import KeyArray, Mixed, Network, Params, PyTree, Stacked, State, Stem

REDUCTIONS = ("mean", "sum")
_DRAWN_AT_A_TIME = 16 * 2**20


def branch_keys(key: KeyArray | None, first: Array | int, count: int) -> Any:
    """Keys `[count]` of branches `first, first + 1, ...`: branch i's key is `fold_in(key, i)`.  None stays None."""
    if key is None:
        return None
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(count))


def sum_branches(
    branch: Network, params: Params, state: State, x: Array, *, keys: Any = None, train: bool = False
) -> tuple[Array, State]:
    """`sum_i f_i(w_i; x)` over the leading axis of `params` and `state`.

    Args:
      branch: the one-branch network.
      params, state: those of I branches; every leaf is `[I, ...]`.
      x: a batch `[batch, ...]`, which all branches share.
      keys: a key for each branch, `[I]`, or None where nothing is random.
      train: whether the branches train, as in `Network.apply`.

    Returns:
      The sum `[batch, out]`, or of whatever shape one branch gives, and the new state, leaves `[I, ...]`.
    """
    if branch.stem is not None:
        z = jax.vmap(branch.stem.preactivation, (0, None))(params, x)
        return sum_rest(branch, params, state, z, keys=keys, train=train)
    y, state = jax.vmap(lambda p, s, k: branch.apply(p, s, x, key=k, train=train))(params, state, keys)
    return y.sum(0, dtype=accumulator(y.dtype)), state


def sum_rest(
    branch: Network, params: Params, state: State, z: PyTree, *, keys: Any = None, train: bool = False
) -> tuple[Array, State]:
    """`sum_branches` from the first layer's pre-activations `z`, leaves `[I, ...]`; the other arguments are its own.

    Raises:
      ValueError: if the branch names no stem.
    """
    if branch.stem is None:
        raise ValueError("sum_rest needs a branch with a stem; this one names none. Use sum_branches.")
    if branch.stem.rest_sum is not None:
        return branch.stem.rest_sum(params, state, z, key=keys, train=train)
    rest = branch.stem.rest
    y, state = jax.vmap(lambda p, s, a, k: rest(p, s, a, key=k, train=train))(params, state, z, keys)
    return y.sum(0, dtype=accumulator(y.dtype)), state


def draw_branches(branch: Network, key: KeyArray, x: Array, first: Array | int, count: int) -> tuple[Params, State]:
    """Parameters and state of branches `first, first + 1, ...`, leaves `[count, ...]`; branch i from `fold_in(key, i)`.

    A few branches are drawn at a time, some 16 MB of numbers, so that the temporaries of the random generator (several
    times the numbers drawn) stay small beside the result.

    Args:
      branch: the one-branch network.
      key: the key of the whole network.
      x: an example batch, `[batch, ...]`, which fixes shapes and dtypes.
      first: the index of the first branch; it may be traced.
      count: the number of branches, at least 1.
    """
    one = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(branch.init, key, x)))
    chunk = min(max(1, count // 20), max(1, _DRAWN_AT_A_TIME // max(one, 1)))

    def draw(start: Array | int) -> tuple[Params, State]:
        return jax.vmap(lambda k: branch.init(k, x))(branch_keys(key, first + start, chunk))

    def write(step: Array, stacked: PyTree) -> PyTree:
        # The last chunk may overlap the one before: it draws the same branches again, with the same result.
        start = jnp.minimum(step * chunk, count - chunk)
        return jax.tree.map(
            lambda all_, new: lax.dynamic_update_slice_in_dim(all_, new, start, 0), stacked, draw(start)
        )

    shapes = jax.eval_shape(draw, 0)
    empty = jax.tree.map(lambda s: jnp.empty((count, *s.shape[1:]), s.dtype), shapes)
    return lax.fori_loop(0, -(-count // chunk), write, empty)


def _check_branches(tree: PyTree, num_branches: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.shape[:1] != (num_branches,):
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"a network of {num_branches} branches got a leaf of shape {leaf.shape} at {where}: every leaf must"
                " lead with the branch axis. Take parameters and state from this network's own init."
            )


def multi_branch(branch: Any, num_branches: SupportsIndex, *, reduce: str = "mean") -> Network:
    """The network `f(w; x) = (1/I) sum_i f_i(w_i; x)` of Section 2; the same type as `branch`, so it nests.

    Every parameter and state leaf leads with the branch axis `[I, ...]`.  Branch i is initialised with
    `fold_in(key, i)`, so its draw does not depend on I; in training it gets `fold_in(key, i)` likewise.
    A few branches are drawn at a time: a jitted `init` peaks at most at about 1.2 times the bytes that it returns.
    With fewer than about 20 branches the temporaries of drawing one, some six times its size, are a larger share.

    Args:
      branch: the one-branch network; a Linen module stands for `from_linen` of it, an NNX constructor for `from_nnx`.
      num_branches: I >= 1, any kind of integer.
      reduce: 'mean' (Section 2 and the authors' code: each branch's gradient carries 1/I) or 'sum' (Section 5).

    Raises:
      TypeError: if `branch` is not a network.
      ValueError: if num_branches is not a positive integer, or `reduce` is unknown; from `apply` if the parameters or
        the state are not those of I branches.
    """
    branch = as_network(branch, "multi_branch").computed()
    num_branches = positive(num_branches, "num_branches")
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r} is unknown. Allowed: {', '.join(REDUCTIONS)}.")
    scale = 1.0 / num_branches if reduce == "mean" else 1.0

    def init(key: KeyArray, x: Array, /) -> tuple[Params, State]:
        return draw_branches(branch, key, x, 0, num_branches)

    def apply(
        params: Params, state: State, x: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        _check_branches((params, state), num_branches)
        keys = branch_keys(key, 0, num_branches)
        if not jax.tree.leaves((params, state, keys)):  # branches without parameters are all alike
            y, state = branch.apply(params, state, x, train=train)
            return scale * num_branches * y, state
        y, state = sum_branches(branch, params, state, x, keys=keys, train=train)
        return scale * y, state

    stacked = Stacked(branch, num_branches, scale, init, apply)
    if branch.stem is None:
        return Network(init, apply, None, stacked)
    first_layer = branch.stem.preactivation

    def preactivation(params: Params, x: Array, /) -> PyTree:
        _check_branches(params, num_branches)
        return jax.vmap(first_layer, (0, None))(params, x)

    def rest(
        params: Params, state: State, z: PyTree, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        _check_branches((params, state, z), num_branches)
        keys = branch_keys(key, 0, num_branches)
        y, state = sum_rest(branch, params, state, z, keys=keys, train=train)
        return scale * y, state

    return Network(init, apply, Stem(preactivation, rest, None, apply), stacked)


def as_layer(network: Network) -> Network:
    """The network of `multi_branch` as a layer among others: its output in the number format that one branch gives.

    The sum over branches is taken in float32 at least, also of branches in bfloat16; a layer of a larger model hands on
    what one branch would, so that it may stand in the place of one.
    """
    assert network.stacked is not None
    branch = network.stacked.branch

    def apply(
        params: Params, state: State, x: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        y, new = network.apply(params, state, x, key=key, train=train)
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (params, state))
        given = jax.eval_shape(lambda p, s, x, k: branch.apply(p, s, x, key=k, train=train)[0], *one, x, key)
        return y.astype(given.dtype) if jnp.issubdtype(given.dtype, jnp.floating) else y, new

    return Network(network.init, apply)


def mixture(networks: Sequence[Any], *, weights: Sequence[int | float] | None = None) -> Network:
    """`sum_k weights[k] * networks[k]`: branches of unlike architectures in one network (Section 2 lets f_i differ).

    Parameters and state are tuples, one item a network.  For the mean over I_1 branches of one kind and I_2 of another,
    take `multi_branch(..., reduce='sum')` of each and weights `1 / (I_1 + I_2)`.

    Args:
      networks: at least one network; all must give outputs of one shape.  A Linen module stands for `from_linen` of it,
        an NNX constructor for `from_nnx`.
      weights: the factor of each network; None is the mean, `1 / len(networks)` each.

    Raises:
      TypeError: for what is not a network.
      ValueError: if there is no network, or the weights do not match or are not finite; from `apply` if the networks
        give outputs of different shapes.
    """
    if not isinstance(networks, Iterable):
        raise TypeError(f"mixture needs a list of networks, got {networks!r}.")
    networks = tuple(as_network(network, "mixture").computed() for network in networks)
    if not networks:
        raise ValueError("mixture needs at least one network.")
    coefficients = (1.0 / len(networks),) * len(networks)
    if weights is not None:
        given = np.asarray(weights)
        if given.dtype.kind not in "iuf" or not np.isfinite(given).all():
            raise ValueError(f"weights={weights!r} must be finite numbers.")
        if given.shape != (len(networks),):
            raise ValueError(f"{len(networks)} networks need as many weights, got {given.size}.")
        coefficients = tuple(given.tolist())

    def child(key: KeyArray | None, index: int) -> KeyArray | None:
        return None if key is None else jax.random.fold_in(key, index)

    def init(key: KeyArray, x: Array, /) -> tuple[Params, State]:
        drawn = [network.init(jax.random.fold_in(key, i), x) for i, network in enumerate(networks)]
        return tuple(p for p, _ in drawn), tuple(s for _, s in drawn)

    def combine(functions: Sequence[Any], params: Any, state: Any, inputs: Any, key: Any, train: bool) -> Any:
        results = [
            f(p, s, x, key=child(key, i), train=train)
            for i, (f, p, s, x) in enumerate(zip(functions, params, state, inputs, strict=True))
        ]
        shapes = [y.shape for y, _ in results]
        if len(set(shapes)) > 1:
            raise ValueError(f"mixture: all networks must give outputs of one shape, got {shapes}.")
        return sum(c * y for c, (y, _) in zip(coefficients, results, strict=True)), tuple(s for _, s in results)

    def apply(
        params: Params, state: State, x: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        return combine([n.apply for n in networks], params, state, [x] * len(networks), key, train)

    mixed = Mixed(networks, init, apply)
    stems = [network.stem for network in networks if network.stem is not None]
    if len(stems) < len(networks):
        return Network(init, apply, mixed=mixed)

    def preactivation(params: Params, x: Array, /) -> PyTree:
        return tuple(stem.preactivation(p, x) for stem, p in zip(stems, params, strict=True))

    def rest(
        params: Params, state: State, z: PyTree, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        return combine([stem.rest for stem in stems], params, state, z, key, train)

    return Network(init, apply, Stem(preactivation, rest, None, apply), mixed=mixed)
