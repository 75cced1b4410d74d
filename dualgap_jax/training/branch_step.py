"""One step of SGD streamed over branches: the numbers of the plain step, without a gradient of the network's size.

Branches meet only in the sum of their outputs, `batch x out` numbers.  So the gradient need never exist as a whole:
`branch_step` goes forward, takes the gradient of the loss with respect to the outputs once, then goes over chunks of
branches, and each chunk's gradient is used and dropped.  What it keeps besides the parameters is the first layer's
output, `I x h x batch` numbers, which are cheaper kept than computed twice.  When branches are spread over devices the
same sum is one all-reduce, and it is all that devices have to say to each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from dualgap_jax.losses import Loss, mean_loss
from dualgap_jax.networks import accumulator, branch_keys, sum_branches, sum_rest
from dualgap_jax.training.engine import Carry, Transformation, updated
from dualgap_jax.types import KeyArray, Params, PyTree, Stacked, State


class Shard(NamedTuple):
    """Which branches of a network one device holds, as seen inside the program that runs on it.

    Attributes:
      first: index of its first branch in the network.
      slots: number of branches that it holds.
      last_weight: 0 when the last slot only fills up an uneven division over devices, else 1; None: no slot does.
      branch_axis, data_axis: names of mesh axes, or None where that axis has one device.
    """

    first: Array | int
    slots: int
    last_weight: Array | None = None
    branch_axis: str | None = None
    data_axis: str | None = None


class _Chunk(NamedTuple):
    """A range of slots, and the weight of its outputs in the sum (None: 1)."""

    first: Array | int
    size: int
    weight: Array | None = None


def _take(tree: PyTree, first: Array | int, count: int) -> PyTree:
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first, count, 0), tree)


def _put(tree: PyTree, part: PyTree, first: Array | int) -> PyTree:
    return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, first, 0), tree, part)


def _over_chunks(shard: Shard, chunk: int, body: Callable[[_Chunk, Any], Any], value: Any) -> Any:
    """`value` after `body(piece, value)` for all slots: whole chunks in a loop, the rest, and a slot with a weight."""
    plain = shard.slots - (shard.last_weight is not None)
    size = min(chunk, plain)
    whole = plain // size if size else 0
    if whole == 1:
        value = body(_Chunk(0, size), value)
    elif whole:
        value = lax.fori_loop(0, whole, lambda i, v: body(_Chunk(i * size, size), v), value)
    if whole * size < plain:
        value = body(_Chunk(whole * size, plain - whole * size), value)
    if shard.last_weight is not None:
        value = body(_Chunk(plain, 1, shard.last_weight), value)
    return value


def piece_size(slots: int, chunk: int) -> int:
    """Branches in a turn of the backward loop, at most a few more than `chunk`.

    A divisor of the slots above half a chunk, if there is one: then no turn reaches back into another, and nothing is
    computed twice and thrown away.  Otherwise equal pieces, rounded up to a multiple of 8.  Multiples of 128 are left
    out: for them XLA's TPU compiler lays the gradient out anew and copies each piece three times; and so are primes,
    for which its windows hold one branch each.  By its own estimate a step then takes two to three times as long as
    with a few branches more or less (docs/scaling.md).
    """
    if chunk >= slots:
        return slots
    for size in range(chunk, chunk // 2, -1):
        if slots % size == 0 and size % 128 and math.gcd(size, 30) > 1:
            return size
    even = -(-slots // -(-slots // chunk))
    if even < 64:
        return even
    return min(-(-even // 8) * 8 + 8 * (-(-even // 8) % 16 == 0), slots)


def branch_step(
    stacked: Stacked,
    loss: Loss,
    transformation: Transformation,
    carry: Carry,
    x: Array,
    y: Array,
    rate: Array,
    key: KeyArray,
    *,
    chunk: int,
    shard: Shard,
) -> tuple[Carry, Array]:
    """The same as `step`, to rounding, for a stacked network, without a gradient of its size.

    Inside `jax.shard_map` it works on the branches and the examples of one device.

    Args:
      stacked: the network.
      loss: the loss.
      transformation: as `optimizers.for_network` makes it, so that it acts on each branch alone.
      carry: leaves `[slots, ...]`.
      x, y: a standardised batch, or this device's share of it.
      rate: learning rate.
      key: of the noise; branch i gets `fold_in(key, i)`.
      chunk: branches at a time.
      shard: which branches these are.

    Returns:
      The new carry, and the mean loss over the batch before the step, as in `step`.
    """
    branch = stacked.branch
    if shard.data_axis is not None:
        key = jax.random.fold_in(key, lax.axis_index(shard.data_axis))

    def keys(piece: _Chunk) -> Any:
        return branch_keys(key, shard.first + piece.first, piece.size)

    def first_layer(params: Params) -> PyTree:
        return jax.vmap(stem.preactivation, (0, None))(params, x)

    def run(params: Params, state: State, piece: _Chunk, z: PyTree) -> tuple[Array, State]:
        if stem is None:
            return sum_branches(branch, params, state, x, keys=keys(piece), train=True)
        return sum_rest(branch, params, state, z, keys=keys(piece), train=True)

    stem: Any = branch.stem

    one = jax.eval_shape(lambda: _take((carry.params, carry.state), 0, 1))
    z_shapes = jax.eval_shape(first_layer, one[0]) if stem is not None else ()
    # The first layer is linear, so its leaves have shares in its output that add up.  That of the largest leaf is kept
    # for all branches, from one product that reads the leaf where it lies; a slice for a chunk would be a copy.
    largest = _largest(one[0], _reads(first_layer, one[0])) if stem is not None else []
    rest = [not chosen for chosen in largest]

    def share(params: Params, chosen: list[bool]) -> PyTree:
        some = _chosen(params, chosen)
        return jax.jvp(lambda some: first_layer(_with(params, chosen, some)), (some,), (some,))[1]

    kept = share(carry.params, largest) if stem is not None else ()

    def preactivation(params: Params, piece: _Chunk) -> PyTree:
        if stem is None:
            return ()
        return jax.tree.map(jnp.add, _take(kept, piece.first, piece.size), share(params, rest))

    def forward(piece: _Chunk, total: Array) -> Array:
        params, state = _take((carry.params, carry.state), piece.first, piece.size)
        part, _ = run(params, state, piece, preactivation(params, piece))
        return total + (part if piece.weight is None else piece.weight.astype(part.dtype) * part).astype(total.dtype)

    sum_shape = jax.eval_shape(lambda p, s, z: run(p, s, _Chunk(0, 1), z)[0], *one, z_shapes)
    zero = jnp.zeros(sum_shape.shape, accumulator(sum_shape.dtype))
    total = _over_chunks(shard, chunk, forward, zero)
    if shard.branch_axis is not None:
        total = lax.psum(total, shard.branch_axis)

    mean, gradient = jax.value_and_grad(lambda total: mean_loss(loss, stacked.scale * total, y))(total)
    if shard.data_axis is not None:
        mean = lax.pmean(mean, shard.data_axis)
        gradient = gradient / lax.axis_size(shard.data_axis)

    uses = _reads(lambda p, s, z: run(p, s, _Chunk(0, 1), z), *one, z_shapes)
    size = piece_size(shard.slots, chunk)
    pieces = -(-shard.slots // size)
    partial = bool(shard.slots % size) or shard.last_weight is not None
    # With two moments, or where a piece reaches back, the TPU compiler copies whole arrays, too.
    fused = not partial and len(jax.tree.leaves(carry.opt_state)) <= len(uses)

    def backward(i: Array, now: Carry) -> Carry:
        piece = _Chunk(jnp.minimum(i * size, shard.slots - size), size)
        before = _take(now, piece.first, size)
        params, state, opt_state = before

        def pull_back(value: tuple[list[Array], State, PyTree]) -> tuple[list[Array], State, PyTree]:
            some, state, z = value

            def upper(some: list[Array], z: PyTree) -> tuple[Array, State]:
                return run(_with(params, uses, some), state, piece, z)

            _, pull, state = jax.vjp(upper, some, z, has_aux=True)
            slope, slope_z = pull(gradient.astype(sum_shape.dtype))
            return slope, state, slope_z

        z = preactivation(params, piece)
        some, state, slope_z = _apart(i, pull_back, (_chosen(params, uses), state, z))
        slope = _with(jax.tree.map(jnp.zeros_like, params), uses, some)
        if stem is not None:
            # Linear in the parameters, so the pull-back needs no second product forward.
            _, pull_first = jax.vjp(first_layer, params)
            slope = jax.tree.map(jnp.add, slope, pull_first(slope_z)[0])
        if shard.data_axis is not None:
            slope = lax.psum(slope, shard.data_axis)

        def update(value: tuple[Params, Params, PyTree]) -> tuple[Params, Params, PyTree]:
            slope, params, opt_state = value
            return slope, *updated(transformation, slope, opt_state, params, rate, mean)

        turn = (slope, params, opt_state)
        _, params, opt_state = _apart(i, update, turn, fused) if jax.tree.leaves(opt_state) else update(turn)
        after = Carry(params, state, opt_state)
        if partial:
            at = piece.first + jnp.arange(size)
            mine = at >= i * size  # the last piece reaches back into the one before
            if shard.last_weight is not None:
                mine &= (at < shard.slots - 1) | (shard.last_weight > 0)
            after = jax.tree.map(lambda a, b: jnp.where(mine.reshape(-1, *(1,) * (a.ndim - 1)), a, b), after, before)
        return _put(now, after, piece.first)

    return lax.fori_loop(0, pieces, backward, carry), mean


def _apart(i: Array, function: Callable[[Any], Any], value: Any, fused: bool = True) -> Any:
    """`function(value)` as a loop of one turn inside a longer loop, which XLA does not take apart.

    What goes in and what comes out are then buffers of their own, and all of the one comes before all of the other.
    Else XLA reads slices of the parameters wherever they are used, and where it cannot tell that all reading is done
    before a slice is written, it copies the whole array: at every chunk.  Where `fused`, its TPU compiler does not, and
    by its own estimate a step with momentum takes half as long when it may fuse update and gradient.  Its GPU compiler
    never does, and there such a loop waits for the host at every turn.
    """

    def loop(i: Array, value: Any) -> Any:
        return lax.fori_loop(i, i + 1, lambda _, v: function(v), value)

    def plain(_: Array, value: Any) -> Any:
        return function(value)

    return lax.platform_dependent(i, value, cuda=plain, tpu=plain if fused else loop, default=loop)


def _reads(function: Callable[..., Any], first: PyTree, *rest: Any) -> list[bool]:
    """For each leaf of the first argument, whether the function reads it.  All arguments are given as shapes."""
    jaxpr = jax.make_jaxpr(function)(first, *rest).jaxpr
    read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
    return [id(v) in read for v in jaxpr.invars[: len(jax.tree.leaves(first))]]


def _largest(params: Params, read: list[bool]) -> list[bool]:
    """Which leaf is the largest of those that are read."""
    sizes = [leaf.size * use for leaf, use in zip(jax.tree.leaves(params), read, strict=True)]
    return [i == sizes.index(max(sizes)) for i in range(len(sizes))]


def _chosen(params: Params, chosen: list[bool]) -> list[Array]:
    return [leaf for leaf, use in zip(jax.tree.leaves(params), chosen, strict=True) if use]


def _with(params: Params, chosen: list[bool], leaves: list[Array]) -> Params:
    """`params` with other leaves where `chosen`."""
    given = iter(leaves)
    new = [next(given) if use else leaf for leaf, use in zip(jax.tree.leaves(params), chosen, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(params), new)
