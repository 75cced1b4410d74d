"""One step of SGD, in two ways that give the same numbers: by automatic differentiation, and streamed over branches.

Branches meet only in the sum of their outputs, `batch x out` numbers.  So the gradient need never exist as a whole:
`branch_step` goes forward, takes the gradient of the loss with respect to the outputs once, then goes over chunks of
branches, and each chunk's gradient is used and dropped.  What it keeps besides the parameters is the first layer's
output, `I x h x batch` numbers, which are cheaper kept than computed twice.  When branches are spread over devices the
same sum is one all-reduce, and it is all that devices have to say to each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from dualgap_jax.data import Dataset, standardise
from dualgap_jax.losses import Loss, mean_loss
from dualgap_jax.networks import branch_keys, sum_branches, sum_rest, upcast
from dualgap_jax.types import KeyArray, Network, Params, PyTree, Stacked, State


class Carry(NamedTuple):
    """What a step changes, for one solution."""

    params: Params
    state: State
    opt_state: PyTree


class Batch(NamedTuple):
    """A data set on the device: features as stored (images stay uint8), labels, and the standardisation."""

    x: Array
    y: Array
    mean: Array
    std: Array


def on_device(dataset: Dataset) -> Batch:
    """Moves a data set to the device as it is stored."""
    return Batch(*(jnp.asarray(a) for a in (dataset.x, dataset.y, dataset.mean, dataset.std)))


def example_input(data: Batch | Dataset) -> Array:
    """The standardised first example, `[1, ...]`: what `init` needs to know of the data."""
    return standardise(jnp.asarray(data.x[:1]), jnp.asarray(data.mean), jnp.asarray(data.std))


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all arrays, or shapes of arrays, in a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@jax.jit
def all_finite(tree: PyTree) -> Array:
    """Whether every number in a tree is finite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.asarray([jnp.isfinite(leaf).all() for leaf in leaves]))


# --- by automatic differentiation -----------------------------------------------------------------------------------


def step(
    net: Network,
    loss: Loss,
    transformation: optax.GradientTransformation,
    carry: Carry,
    x: Array,
    y: Array,
    rate: Array,
    key: KeyArray,
) -> tuple[Carry, Array]:
    """One step of gradient descent on the mean loss of a standardised batch.

    Returns:
      The new carry, and the mean loss before the step: not finite if any output of the network is not.
    """

    def objective(params: Params) -> tuple[Array, State]:
        outputs, state = net.apply(params, carry.state, x, key=key, train=True)
        return mean_loss(loss, outputs, y), state

    (value, state), gradient = jax.value_and_grad(objective, has_aux=True)(carry.params)
    params, opt_state = _updated(transformation, gradient, carry.opt_state, carry.params, rate)
    return Carry(params, state, opt_state), value


def begin(transformation: optax.GradientTransformation, params: Params, state: State) -> Carry:
    """The carry at step 0."""
    return Carry(params, state, transformation.init(upcast(params)))


def _updated(
    transformation: optax.GradientTransformation, gradient: Params, opt_state: PyTree, params: Params, rate: Array
) -> tuple[Params, PyTree]:
    # The optimiser works in float32 at least, whatever the parameters are stored in.
    updates, opt_state = transformation.update(upcast(gradient), opt_state, upcast(params))
    return jax.tree.map(lambda w, u: (w - rate * u).astype(w.dtype), params, updates), opt_state


# --- streamed -------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
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


class _Piece(NamedTuple):
    """A range of slots, and the weight of its outputs in the sum (None: 1)."""

    first: Array | int
    size: int
    weight: Array | None = None


def _take(tree: PyTree, first: Array | int, count: int) -> PyTree:
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, first, count, 0), tree)


def _put(tree: PyTree, part: PyTree, first: Array | int) -> PyTree:
    return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, first, 0), tree, part)


def _over_pieces(place: Place, chunk: int, body: Callable[[_Piece, Any], Any], value: Any) -> Any:
    """`value` after `body(piece, value)` for all slots: whole chunks in a loop, the rest, and a slot with a weight."""
    plain = place.slots - (place.last_weight is not None)
    size = min(chunk, plain)
    whole = plain // size if size else 0
    if whole == 1:
        value = body(_Piece(0, size), value)
    elif whole:
        value = lax.fori_loop(0, whole, lambda i, v: body(_Piece(i * size, size), v), value)
    if whole * size < plain:
        value = body(_Piece(whole * size, plain - whole * size), value)
    if place.last_weight is not None:
        value = body(_Piece(plain, 1, place.last_weight), value)
    return value


def branch_step(
    stacked: Stacked,
    loss: Loss,
    transformation: optax.GradientTransformation,
    carry: Carry,
    x: Array,
    y: Array,
    rate: Array,
    key: KeyArray,
    *,
    chunk: int,
    place: Place,
) -> tuple[Carry, Array]:
    """The same as `step`, to rounding, for a stacked network, without a gradient of its size.

    Inside `jax.shard_map` it works on the branches and the examples of one device.

    Args:
      stacked: the network.
      loss: the loss.
      transformation: one that `acts_branch_by_branch`.
      carry: leaves `[slots, ...]`; leaves of the optimiser's state that do not depend on the branches are shared.
      x, y: a standardised batch, or this device's share of it.
      rate: learning rate.
      key: of the noise; branch i gets `fold_in(key, i)`.
      chunk: branches at a time.
      place: which branches these are.

    Returns:
      The new carry, and the mean loss over the batch before the step, as in `step`.
    """
    branch = stacked.branch
    per_branch = branchwise_leaves(transformation, carry.params)
    if place.data_axis is not None:
        key = jax.random.fold_in(key, lax.axis_index(place.data_axis))

    def keys(piece: _Piece) -> Any:
        return branch_keys(key, place.first + piece.first, piece.size)

    def first_layer(params: Params) -> PyTree:
        return jax.vmap(stem.preactivation, (0, None))(params, x)

    def run(params: Params, state: State, piece: _Piece, z: PyTree) -> tuple[Array, State]:
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

    def preactivation(params: Params, piece: _Piece) -> PyTree:
        if stem is None:
            return ()
        return jax.tree.map(jnp.add, _take(kept, piece.first, piece.size), share(params, rest))

    def forward(piece: _Piece, total: Array) -> Array:
        params, state = _take((carry.params, carry.state), piece.first, piece.size)
        part, _ = run(params, state, piece, preactivation(params, piece))
        return total + (part if piece.weight is None else piece.weight.astype(part.dtype) * part)

    sum_shape = jax.eval_shape(lambda p, s, z: run(p, s, _Piece(0, 1), z)[0], *one, z_shapes)
    total = _over_pieces(place, chunk, forward, jnp.zeros(sum_shape.shape, sum_shape.dtype))
    if place.branch_axis is not None:
        total = lax.psum(total, place.branch_axis)

    value, gradient = jax.value_and_grad(lambda total: mean_loss(loss, stacked.scale * total, y))(total)
    if place.data_axis is not None:
        value = lax.pmean(value, place.data_axis)
        gradient = gradient / lax.axis_size(place.data_axis)

    shared = _pick(carry.opt_state, per_branch, False)
    uses = _reads(lambda p, s, z: run(p, s, _Piece(0, 1), z), *one, z_shapes)
    pieces = -(-place.slots // chunk)
    size = -(-place.slots // pieces)

    def backward(i: Array, now: tuple[Carry, list[Array]]) -> tuple[Carry, list[Array]]:
        new, _ = now
        own = (new.params, new.state, _pick(new.opt_state, per_branch, True))
        piece = _Piece(jnp.minimum(i * size, place.slots - size), size)
        before = _take(own, piece.first, size)
        params, state, own_opt = before

        def pull_back(value: tuple[list[Array], State, PyTree]) -> tuple[list[Array], State, PyTree]:
            some, state, z = value

            def upper(some: list[Array], z: PyTree) -> tuple[Array, State]:
                return run(_with(params, uses, some), state, piece, z)

            _, pull, state = jax.vjp(upper, some, z, has_aux=True)
            slope, slope_z = pull(gradient)
            return slope, state, slope_z

        z = preactivation(params, piece)
        some, state, slope_z = _apart(i, pull_back, (_chosen(params, uses), state, z))
        slope = _with(jax.tree.map(jnp.zeros_like, params), uses, some)
        if stem is not None:
            # Linear in the parameters, so the pull-back needs no second product forward.
            _, pull_first = jax.vjp(first_layer, params)
            slope = jax.tree.map(jnp.add, slope, pull_first(slope_z)[0])
        if place.data_axis is not None:
            slope = lax.psum(slope, place.data_axis)

        def update(value: tuple[Params, Params, list[Array], list[Array]]) -> tuple[Any, ...]:
            slope, params, own_opt, _ = value
            # Every chunk starts from the shared state before the step, so each computes the same new one.
            opt_state = _merge(carry.opt_state, per_branch, own_opt, shared)
            params, opt_state = _updated(transformation, slope, opt_state, params, rate)
            return slope, params, _pick(opt_state, per_branch, True), _pick(opt_state, per_branch, False)

        value = (slope, params, own_opt, shared)
        _, params, own_opt, new_shared = _apart(i, update, value) if own_opt else update(value)
        after = (params, state, own_opt)
        if place.slots % size or place.last_weight is not None:
            at = piece.first + jnp.arange(size)
            mine = at >= i * size  # the last piece reaches back into the one before
            if place.last_weight is not None:
                mine &= (at < place.slots - 1) | (place.last_weight > 0)
            after = jax.tree.map(lambda a, b: jnp.where(mine.reshape(-1, *(1,) * (a.ndim - 1)), a, b), after, before)
        put = _put(own, after, piece.first)
        return Carry(put[0], put[1], _merge(carry.opt_state, per_branch, put[2], shared)), new_shared

    new, new_shared = lax.fori_loop(0, pieces, backward, (carry, shared))
    own_opt = _pick(new.opt_state, per_branch, True)
    return Carry(new.params, new.state, _merge(carry.opt_state, per_branch, own_opt, new_shared)), value


def _apart(i: Array, function: Callable[[Any], Any], value: Any) -> Any:
    """`function(value)` as a loop of one turn inside a longer loop, which XLA does not take apart.

    What goes in and what comes out are then buffers of their own, and all of the one comes before all of the other.
    Else XLA reads slices of the parameters wherever they are used, and where it cannot tell that all reading is done
    before a slice is written, it copies the whole array: at every chunk.
    """
    return lax.fori_loop(i, i + 1, lambda _, v: function(v), value)


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


def branchwise_leaves(transformation: optax.GradientTransformation, params: Params) -> list[bool]:
    """For each leaf of the optimiser's state, whether it leads with the branch axis (a step count does not)."""

    def shapes(extra: int) -> list[tuple[int, ...]]:
        grown = jax.tree.map(lambda w: jax.ShapeDtypeStruct((w.shape[0] + extra, *w.shape[1:]), w.dtype), params)
        return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(lambda p: transformation.init(upcast(p)), grown))]

    return [a != b for a, b in zip(shapes(0), shapes(1), strict=True)]


def _pick(opt_state: PyTree, per_branch: list[bool], wanted: bool) -> list[Array]:
    return [leaf for leaf, own in zip(jax.tree.leaves(opt_state), per_branch, strict=True) if own == wanted]


def _merge(like: PyTree, per_branch: list[bool], own: list[Array], shared: list[Array]) -> PyTree:
    owns, others = iter(own), iter(shared)
    leaves = [next(owns) if mine else next(others) for mine in per_branch]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def acts_branch_by_branch(transformation: optax.GradientTransformation) -> bool:
    """Whether updating some branches at a time is the same as updating all at once.

    Found by trying it, with gradients of several sizes: momentum and Adam do, clipping by the global norm does not.
    """
    rng = np.random.default_rng(0)
    shapes = {"kernel": (4, 3, 2), "bias": (4, 3)}

    @jax.jit
    def last_update(params: Params, gradients: list[Params]) -> Params:
        state, update = transformation.init(params), params
        for gradient in gradients:
            update, state = transformation.update(gradient, state, params)
        return update

    for size in (1e-4, 1.0, 1e4):
        trees = [{k: jnp.asarray(size * rng.normal(size=s), float) for k, s in shapes.items()} for _ in range(3)]
        whole = last_update(trees[0], trees[1:])
        for i in range(4):
            part = jax.tree.map(lambda a, i=i: a[i : i + 1], trees)
            alone = last_update(part[0], part[1:])
            same = [np.allclose(alone[k], whole[k][i : i + 1], rtol=1e-5, atol=0.0) for k in shapes]
            if not all(same):
                return False
    return True


def activation_bytes(branch: Network, params: Params, state: State, x: Any) -> int:
    """Bytes of all that a further branch computes on a batch, an upper bound of what its gradient keeps.

    Args:
      branch: the one-branch network.
      params, state: shapes of its own.
      x: shape of a batch.
    """

    def total(jaxpr: Any) -> int:
        inner = [p for eqn in jaxpr.eqns for p in jax.tree.leaves(list(eqn.params.values()))]
        nested = sum(total(getattr(p, "jaxpr", p)) for p in inner if hasattr(getattr(p, "jaxpr", p), "eqns"))
        own = [v.aval for eqn in jaxpr.eqns for v in eqn.outvars]
        return nested + sum(a.size * a.dtype.itemsize for a in own if hasattr(a.dtype, "itemsize"))

    def of(count: int) -> int:
        stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape), a.dtype), (params, state))
        keys = jax.random.split(jax.random.key(0), count)

        def run(params: Params, state: State, x: Array) -> Array:
            return sum_branches(branch, params, state, x, keys=keys, train=True)[0]

        return total(jax.make_jaxpr(run)(*stacked, x).jaxpr)

    return of(2) - of(1)
