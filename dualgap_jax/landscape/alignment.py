"""Solutions brought into one valley: the permutation of branches and units that takes a network nearest to another.

The nearest is the one of the largest inner product, a linear assignment problem (Hungarian algorithm) where a network
has one hidden layer.  With more, the permutation of each layer is found with those of its neighbours held, until
nothing changes (coordinate ascent, as in Ainsworth et al., 2023); that is exact in the branches, given the inner
permutation of each pair, and a local maximum in the units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from dualgap_jax import trees
from dualgap_jax.landscape import symmetry as symmetries
from dualgap_jax.landscape.activations import activations
from dualgap_jax.landscape.assignment import assignment
from dualgap_jax.landscape.symmetry import Parts, Permutation, Symmetry, Units, permuted
from dualgap_jax.networks import check_network
from dualgap_jax.networks.sources import blocks, check_source
from dualgap_jax.registry import UnknownNameError, unknown
from dualgap_jax.sizes import is_whole, positive
from dualgap_jax.terminal import Progress
from dualgap_jax.types import BranchSource, Network

OVER = ("branches", "units")
BY = ("weights", "activations")
EXACT_BRANCHES = 5_000  # matched with one another at a time
EXACT_UNITS = 16_384
_PAIR_NUMBERS = 2**25  # numbers of products of pairs of branches at a time
_SWEEPS = 100


class Alignment(NamedTuple):
    """Networks that compute what they did, with branches and units in the places of one of them.

    Attributes:
      networks: the permuted networks, in the order given; that of index `to` as it was.
      permutations: where the branches and units of each came from.
      distances: `[k, 2]`: the Euclidean distance of the parameters of each to those of network `to`, before and after.
      blocks: among how many branches each was placed: I, or fewer where I is large.
      symmetry: the units that change places.
      over, to: as given.
    """

    networks: tuple[BranchSource, ...]
    permutations: tuple[Permutation, ...]
    distances: np.ndarray
    blocks: int
    symmetry: Symmetry
    over: str
    to: int


def align(
    net: Network,
    networks: Sequence[BranchSource],
    x: Any,
    *,
    over: str = "branches",
    by: str = "weights",
    to: int = 0,
    units: Sequence[Units] | None = None,
    block: int | None = None,
) -> Alignment:
    """Permutes branches and hidden units of trained networks so that they come as near as possible to one of them.

    Every network computes what it did, to rounding (a check on random weights precedes).

    Args:
      net: the network of `multi_branch` that was trained; a single branch is `multi_branch(branch, 1)`.
      networks: at least two handles, as in `plane_through`.
      x: examples `[n, ...]` as the network gets them (standardised): for the check, and those over which activations
        are compared.
      over: 'branches': whole branches change places, and units within a branch; 'units': the hidden units of all
        branches, of networks with one hidden layer.
      by: 'weights': the largest inner product of all parameters; 'activations': the largest sum of correlations of the
        hidden units' inputs over x (of channels, over x and positions), layer by layer, each exact given the branches;
        of `mlp` and of Linen modules.
      to: which of the networks stays as it is.
      units: what units there are, where the network is no chain of layers that is known; see `symmetry.symmetry`.
      block: among how many branches a place is looked for; None: all I up to 5,000 branches (16,384 units), else
        blocks of that many, consecutive ones, of each network: an approximation.  Ten blocks kept nine tenths of what
        an exact matching takes off the squared distance (MNIST, I = 1,000; docs/results.md).

    Raises:
      ValueError: for fewer than two networks, `to` out of range, a block below 1, units that are not exchangeable,
        activations that cannot be read, numbers that are not finite, or more than one hidden layer for over='units'.
      TypeError: for what is no network, networks that are not handles, or units that are none.
      UnknownNameError: for an unknown `over` or `by`.
    """
    net = check_network(net, "landscape.align")
    if not isinstance(networks, Sequence) or isinstance(networks, str | bytes):
        raise TypeError(f"align takes a list of trained networks, got {networks!r:.80}.")
    if not is_whole(to) or not 0 <= to < len(networks) >= 2:
        raise ValueError(f"align needs at least two networks and to={to!r} among them, got {len(networks)}.")
    known = exchangeable(net, x, over=over, by=by, units=units)
    for network in networks:
        check_source(net, network)
    total = networks[to].num_branches
    most = EXACT_BRANCHES if over == "branches" else max(1, EXACT_UNITS // known.groups[0].size)
    block = min(total, positive(block, "block") if block is not None else -(-total // -(-total // most)))
    found, distances = [], np.zeros((len(networks), 2))
    for number, network in enumerate(networks):
        if number == to:
            found.append(_identity(known, total))
            continue
        pieces = []
        for first, count in blocks(total, block):
            pair = networks[to].read(first, count), network.read(first, count)
            parts = _parts(pair[0][0], known), _parts(pair[1][0], known)
            for k, part in zip((to, number), parts, strict=True):
                if not all(np.isfinite(numbers).all() for numbers in part.values()):
                    raise ValueError(f"network {k} holds numbers that are not finite (a diverged run?).")
            if by == "activations":
                compared = activations(net, pair[0], x, known), activations(net, pair[1], x, known)
            else:
                compared = _scaled(parts)
            match = _units if over == "units" else _branches
            piece = match(*compared, known, f"align {number + 1} of {len(networks)}")
            pieces.append(_shifted(piece, first, known))
            distances[number] += _squares(*parts, piece, known)
        found.append(_joined(pieces))
    moved = tuple(
        network if number == to else permuted(network, known, by_)
        for number, (network, by_) in enumerate(zip(networks, found, strict=True))
    )
    return Alignment(moved, tuple(found), np.sqrt(distances), block, known, over, to)


def exchangeable(
    net: Network, x: Any, *, over: str = "branches", by: str = "weights", units: Sequence[Units] | None = None
) -> Symmetry:
    """The units that `align` may permute, found and checked on random weights before there are trained ones.

    Args:
      net, x, over, by, units: as of `align`.

    Raises:
      TypeError, ValueError, UnknownNameError: as `align`.
    """
    for value, allowed, name in ((over, OVER, "over"), (by, BY, "by")):
        if value not in allowed:
            raise UnknownNameError(unknown(name, value, allowed))
    net = net.computed()
    if net.stacked is None:
        raise ValueError("align needs a network made by multi_branch; a single branch is multi_branch(branch, 1).")
    x = np.asarray(x)
    if x.dtype.kind not in "iufb" or x.ndim < 2:
        raise ValueError(f"x must hold examples [n, ...] as the network gets them, got {x.dtype} of shape {x.shape}.")
    x = jnp.asarray(x[:32])
    shapes = jax.eval_shape(net.stacked.branch.init, jax.random.key(0), x)
    like = jax.tree.map(lambda leaf: np.zeros((1, *leaf.shape), leaf.dtype), shapes)
    params, state = like
    if units is not None and not (isinstance(units, Sequence) and all(isinstance(group, Mapping) for group in units)):
        raise TypeError(f"units={units!r:.80} must be None, or a list with a mapping of leaves to axes for each layer.")
    known = symmetries.symmetry(params, state, units)
    if over == "units" and len(known.groups) != 1:
        raise ValueError(
            f"over={over!r}, by={by!r} is for networks with one hidden layer; this one has {len(known.groups)}."
        )
    if by == "activations":
        activations(net, like, x, known)
    symmetries.check(net, known, (params, state), x, over)
    return known


def _identity(known: Symmetry, total: int) -> Permutation:
    units = tuple(np.arange(total * g.size).reshape(total, g.size) for g in known.groups)
    return Permutation(np.arange(total), units)


def _shifted(piece: Permutation, first: int, known: Symmetry) -> Permutation:
    units = tuple(u + first * g.size for u, g in zip(piece.units, known.groups, strict=True))
    return Permutation(piece.branches + first, units)


def _joined(pieces: Sequence[Permutation]) -> Permutation:
    units = zip(*(p.units for p in pieces), strict=True)
    return Permutation(np.concatenate([p.branches for p in pieces]), tuple(np.concatenate(u) for u in units))


def _parts(params: Any, known: Symmetry) -> Parts:
    """The parameters by the groups of units that they belong to.

    Returns:
      For each tuple of groups, outer one first, an array `[I, *sizes, rest]` of all numbers that have just these axes.
    """
    gathered: dict[tuple[int, ...], list[np.ndarray]] = {}
    for number, leaf in enumerate(jax.tree.leaves(params)):
        if not trees.is_float(leaf):
            continue
        array = np.asarray(leaf)
        array = array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
        places = [(k, a) for k, g in enumerate(known.groups) for a in g.axes if a.leaf == number]
        places.sort(key=lambda place: -place[0])
        groups = tuple(k for k, _ in places)
        shape, order = list(array.shape[:1]), [0]
        units, rest = [], []
        for axis, length in enumerate(array.shape[1:]):
            here = [a for _, a in places if a.axis == axis]
            if here:
                rest.append(len(shape))
                shape += [here[0].repeats, length // here[0].repeats]
                units.append((axis, len(shape) - 1))
            else:
                rest.append(len(shape))
                shape.append(length)
        where = dict(units)
        order += [where[a.axis] for _, a in places] + rest
        canonical = array.reshape(shape).transpose(order)
        flat = canonical.reshape(*canonical.shape[: 1 + len(groups)], -1)
        gathered.setdefault(groups, []).append(flat)
    return {groups: np.concatenate(flats, axis=-1) for groups, flats in gathered.items()}


_COMFORTABLE = 30  # powers of two of numbers whose sums of products float32 holds, with all digits that count


def _scaled(pair: tuple[Parts, Parts]) -> tuple[Parts, Parts]:
    """Both in float32, scaled by a power of two where products of their numbers would leave its range."""
    largest = max((float(np.abs(numbers).max(initial=0.0)) for part in pair for numbers in part.values()), default=0.0)
    power = -int(np.frexp(largest)[1])
    if abs(power) <= _COMFORTABLE and all(n.dtype == np.float32 for part in pair for n in part.values()):
        return pair
    a, b = ({g: np.ldexp(numbers, power).astype(np.float32) for g, numbers in part.items()} for part in pair)
    return a, b


def _units(a: Parts, b: Parts, known: Symmetry, label: str) -> Permutation:
    """The best places of the units of all branches."""
    del label
    total, size = a[(0,)].shape[:2]
    flat = [part[(0,)].reshape(total * size, -1) for part in (a, b)]
    places = assignment(flat[0] @ flat[1].T)
    return Permutation(np.arange(total), (places.reshape(total, size),))


def _assigned(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best assignment of each matrix `[..., h, h]`: columns `[..., h]`, and its value `[...]`."""
    lead, size = scores.shape[:-2], scores.shape[-1]
    flat = scores.reshape(-1, size, size).astype(np.float64)
    columns = np.empty((len(flat), size), np.intp)
    for k, matrix in enumerate(flat):
        columns[k] = scipy.optimize.linear_sum_assignment(matrix, True)[1]
    values = np.take_along_axis(flat, columns[..., None], -1).sum((-1, -2))
    return columns.reshape(*lead, size), values.reshape(lead)


def _products(a: Parts, b: Parts, group: int, units: dict[int, np.ndarray], base: np.ndarray | None) -> np.ndarray:
    """`[..., h, h]`: what each unit of a group gains in each place, given the places of other groups where known.

    Args:
      a, b: parts whose leading axes broadcast to those of the pairs.
      group: the group to be placed.
      units: `[..., size]` of the groups that have places.
      base: the part of the group alone, if it is known.
    """
    total = a[(group,)] @ np.swapaxes(b[(group,)], -1, -2) if base is None else base
    for groups, left in a.items():
        if len(groups) != 2 or group not in groups:
            continue
        other = groups[1] if groups[0] == group else groups[0]
        if other not in units:
            continue
        first, right = (left, b[groups]) if groups[0] == group else (left.swapaxes(-2, -3), b[groups].swapaxes(-2, -3))
        chosen = units[other][..., None, :, None]
        right = np.take_along_axis(np.broadcast_to(right, (*chosen.shape[:-3], *right.shape[-3:])), chosen, axis=-2)
        total = total + np.einsum("...ukr,...vkr->...uv", first, right, optimize=True)
    return total


def _places(
    a: Parts, b: Parts, known: Symmetry, sweeps: int, base: dict[int, np.ndarray]
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Places of the units of every group, each with those of its neighbours held, and the inner product of the last."""
    units: dict[int, np.ndarray] = {}
    value = np.zeros(())
    groups = range(len(known.groups))
    for sweep in range(sweeps + 1):
        before = {g: u.copy() for g, u in units.items()}
        for group in groups:
            units[group], value = _assigned(_products(a, b, group, units, base.get(group)))
        if len(known.groups) == 1 or (sweep and all(np.array_equal(units[g], before[g]) for g in groups)):
            break
    return units, value


def _branches(a: Parts, b: Parts, known: Symmetry, label: str) -> Permutation:
    """The best places of branches, the units of each pair of branches in the best places found for them."""
    total = next(iter(a.values())).shape[0]
    if not known.groups:
        partners = assignment(a[()] @ b[()].T)
        return Permutation(partners, ())
    sizes = [g.size for g in known.groups]
    scores = np.zeros((total, total), np.float32)
    heaviest = max(h * h for h in sizes)
    heaviest = max([heaviest, *(math.prod(part.shape[1:]) for groups, part in b.items() if len(groups) == 2)])
    portions = blocks(total, max(1, _PAIR_NUMBERS // (total * heaviest)))
    progress = Progress(total, label) if len(portions) > 1 else None
    try:
        for first, count in portions if total > 1 else []:
            rows = slice(first, first + count)
            left = {groups: part[rows] for groups, part in a.items()}
            base = {k: _all_pairs(left[(k,)], b[(k,)]) for k in range(len(sizes)) if (k,) in a}
            base |= {k: np.zeros((count, total, h, h), np.float32) for k, h in enumerate(sizes) if k not in base}
            pairs = {groups: part[:, None] for groups, part in left.items()}, {g: p[None] for g, p in b.items()}
            units, value = _places(*pairs, known, min(1, len(sizes) - 1), base)
            scores[rows] = _pair_scores(*pairs, units, base, value)
            if () in a:
                scores[rows] += left[()] @ b[()].T
            if progress is not None:
                progress.update(first + count, "branches")
    finally:
        if progress is not None:
            progress.close()
    partners = assignment(scores)
    matched = {groups: part[partners] for groups, part in b.items()}
    base = {k: np.zeros((total, h, h), np.float32) for k, h in enumerate(sizes) if (k,) not in a}
    units, _ = _places(a, matched, known, _SWEEPS, base)
    places = [partners[:, None] * h + units[k] for k, h in enumerate(sizes)]
    return Permutation(partners, tuple(places))


def _all_pairs(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`[R, J, h, h]` from `[R, h, r]` and `[J, h, r]`: one large matrix product."""
    r, h, length = left.shape
    product = left.reshape(r * h, length) @ right.reshape(-1, length).T
    return np.ascontiguousarray(product.reshape(r, h, -1, h).swapaxes(1, 2))


def _pair_scores(
    a: Parts, b: Parts, units: dict[int, np.ndarray], base: dict[int, np.ndarray], value: np.ndarray
) -> np.ndarray:
    """The inner products of all pairs: `value`, of the last group and what touches it, and of the groups before it."""
    last = max(units)
    total = value.copy()
    for k in range(last):
        total += np.take_along_axis(base[k], units[k][..., None], -1).sum((-1, -2))
    for groups, left in a.items():
        if len(groups) == 2 and last not in groups:
            outer, inner = (units[k] for k in groups)
            right = np.broadcast_to(b[groups], (*outer.shape[:-1], *b[groups].shape[-3:]))
            right = np.take_along_axis(right, outer[..., :, None, None], -3)
            right = np.take_along_axis(right, inner[..., None, :, None], -2)
            total += np.einsum("...uvr,...uvr->...", left, right)
    return total


def _squares(a: Parts, b: Parts, piece: Permutation, known: Symmetry) -> np.ndarray:
    """Squared distances before and after, in float64; of differences, since norms and products of near ones cancel."""
    still = _identity(known, len(piece.branches))
    return np.asarray([
        sum(float(np.sum(np.subtract(left, _moved(b[g], g, p, known), dtype=np.float64) ** 2)) for g, left in a.items())
        for p in (still, piece)
    ])  # fmt: skip


def _moved(part: np.ndarray, groups: tuple[int, ...], by: Permutation, known: Symmetry) -> np.ndarray:
    """The numbers of these groups in their places."""
    if groups and len(known.groups) == 1:  # units may come from other branches
        return part.reshape(-1, part.shape[-1])[by.units[0]]
    part = part[by.branches]
    for axis, group in enumerate(groups):
        index = by.units[group] % known.groups[group].size
        index = index.reshape(len(part), *[1] * axis, -1, *[1] * (part.ndim - 2 - axis))
        part = np.take_along_axis(part, index, axis=axis + 1)
    return part
