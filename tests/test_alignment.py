"""Alignment against brute force over all permutations, planted permutations, and the outputs of the networks."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

from dualgap_jax import landscape
from dualgap_jax.landscape import assignment as assignments
from dualgap_jax.landscape import symmetry as symmetries
from dualgap_jax.networks import InMemory, conv, from_functions, mlp, multi_branch, vgg9
from dualgap_jax.registry import UnknownNameError

NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "one layer": (mlp((3,), 2), (4,)),
    "no bias": (mlp((3,), 2, use_bias=False), (4,)),
    "three layers": (mlp((3, 4, 2), 2, activation="tanh"), (4,)),
    "conv": (conv(channels=(3, 2), out=2), (4, 4, 1)),
    "conv with batch norm": (conv(channels=(3, 2), out=2, batch_norm=True), (4, 4, 1)),
    "vgg9": (vgg9(2, 2), (8, 8, 1)),
    "affine": (mlp((), 2), (4,)),
}


def drawn(branch: Any, shape: tuple[int, ...], num_branches: int, rng: np.random.Generator, count: int = 2) -> Any:
    """A network, `count` networks of random numbers (variances positive), and a batch."""
    net = multi_branch(branch, num_branches)
    x = jnp.asarray(rng.standard_normal((5, *shape)), jnp.float32)
    like = jax.eval_shape(net.init, jax.random.key(0), x)

    def one() -> InMemory:
        params = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape), a.dtype), like[0])
        return InMemory(params, jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.5, 2, a.shape), a.dtype), like[1]))

    return net, [one() for _ in range(count)], x


def distance(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
    return math.sqrt(sum(float(np.sum((np.asarray(p, np.float64) - np.asarray(q, np.float64)) ** 2)) for p, q in pairs))


@pytest.mark.parametrize(("hidden", "over"), [((4,), "units"), ((4,), "branches"), ((4, 3), "branches")])
def test_distances_of_networks_next_to_one_another_have_their_digits(
    hidden: tuple[int, ...], over: str, rng: np.random.Generator
) -> None:
    """Norms and inner products of such networks cancel."""
    net, (network,), x = drawn(mlp(hidden, 2), (3,), 5, rng, 1)
    near = InMemory(jax.tree.map(lambda a: a * (1 + 2.0**-22), network.params), network.state)
    known = landscape.exchangeable(net, x, over=over)
    moved = symmetries.permuted(near, known, symmetries.random_permutation(known, 5, rng, over=over))
    found = landscape.align(net, [network, moved, network], x, over=over)
    assert found.distances[1, 1] == pytest.approx(distance(network, near), rel=1e-9)
    assert found.distances[2].tolist() == [0, 0]


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "vgg9"])  # compiles long, and is planted below
def test_aligned_networks_compute_the_same_and_come_nearer(name: str, rng: np.random.Generator) -> None:
    branch, shape = NETWORKS[name]
    net, networks, x = drawn(branch, shape, 4, rng, 3)
    found = landscape.align(net, networks, x, to=1)
    assert found.networks[1] is networks[1]
    apply = jax.jit(net.apply)
    for k, (before, after) in enumerate(zip(networks, found.networks, strict=True)):
        y, z = (np.asarray(apply(n.params, n.state, x)[0], np.float64) for n in (before, after))
        assert np.abs(y - z).max() <= 1e-4 * np.abs(y).max()
        apart = distance(before, networks[1]), distance(after, networks[1])
        np.testing.assert_allclose(found.distances[k], apart, rtol=1e-6, atol=1e-3)
        assert apart[1] < apart[0] or k == 1
        assert sorted(found.permutations[k].branches) == list(range(4))


@pytest.mark.parametrize("by", landscape.alignment.BY)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_planted_permutation_is_found(name: str, by: str, rng: np.random.Generator) -> None:
    branch, shape = NETWORKS[name]
    if by == "activations" and name == "affine":
        return
    how = by
    net, (network,), x = drawn(branch, shape, 5, rng, 1)
    known = symmetries.symmetry(network.params, network.state)
    by = symmetries.random_permutation(known, 5, rng)
    moved: Any = symmetries.permuted(network, known, by)
    noisy = InMemory(
        jax.tree.map(lambda a: a + 1e-3 * rng.standard_normal(a.shape).astype(a.dtype), moved.params), moved.state
    )
    found = landscape.align(net, [network, noisy], x, by=how)
    back: Any = found.networks[1]
    for a, b in zip(jax.tree.leaves(network.params), jax.tree.leaves(back.params), strict=True):
        np.testing.assert_allclose(a, b, atol=0.01)
    for a, b in zip(jax.tree.leaves(network.state), jax.tree.leaves(back.state), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.sort(by.branches[found.permutations[1].branches]), np.arange(5))
    np.testing.assert_array_equal(by.branches[found.permutations[1].branches], np.arange(5))


@pytest.mark.parametrize("over", landscape.alignment.OVER)
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_one_hidden_layer_is_aligned_as_well_as_brute_force_does(
    over: str, scale: float, rng: np.random.Generator
) -> None:
    num_branches, size = 3, 2
    net, networks, x = drawn(mlp((size,), 2), (3,), num_branches, rng)
    networks = [InMemory(jax.tree.map(lambda a: a * np.float32(scale), n.params)) for n in networks]
    known = symmetries.symmetry(networks[0].params, ())

    def candidates() -> Any:
        if over == "units":
            for order in itertools.permutations(range(num_branches * size)):
                yield symmetries.Permutation(np.arange(num_branches), (np.reshape(order, (num_branches, size)),))
            return
        for order in itertools.permutations(range(num_branches)):
            for inner in itertools.product(itertools.permutations(range(size)), repeat=num_branches):
                branches = np.asarray(order)
                yield symmetries.Permutation(branches, (branches[:, None] * size + np.asarray(inner),))

    least = min(distance(networks[0], symmetries.permuted(networks[1], known, by)) for by in candidates())
    found = landscape.align(net, networks, x, over=over)
    assert found.distances[1, 1] == pytest.approx(least, rel=1e-5)


def test_activations_are_matched_as_brute_force_does(rng: np.random.Generator) -> None:
    net, networks, x = drawn(mlp((3,), 2), (4,), 2, rng)
    found = landscape.align(net, networks, x, over="units", by="activations")

    def units(network: Any) -> np.ndarray:
        first = network.params[0]
        z = np.einsum("ihd,nd->ihn", first["kernel"], x) + np.asarray(first["bias"])[..., None]
        return z.reshape(6, -1)

    def value(order: Any) -> float:
        left, right = units(networks[0]), units(networks[1])[np.asarray(order)]
        return sum(np.corrcoef(a, b)[0, 1] for a, b in zip(left, right, strict=True))

    best = max(map(value, itertools.permutations(range(6))))
    assert value(found.permutations[1].units[0].reshape(-1)) == pytest.approx(best, abs=1e-5)


def test_activations_of_deep_branches_are_matched_as_brute_force_does(rng: np.random.Generator) -> None:
    """Each layer of each pair of branches by itself, then the branches, all by trying every permutation."""
    net, networks, x = drawn(mlp((3, 2), 2, activation="tanh"), (4,), 3, rng)
    found = landscape.align(net, networks, x, by="activations")

    def layers(network: Any, branch: int) -> list[np.ndarray]:
        own = [(p["kernel"][branch], p["bias"][branch]) for p in network.params[:2]]
        first, second = ([np.asarray(leaf, np.float64) for leaf in pair] for pair in own)
        z = first[0] @ np.asarray(x, np.float64).T + first[1][:, None]
        return [z, second[0] @ np.tanh(z) + second[1][:, None]]

    def value(a: list[np.ndarray], b: list[np.ndarray]) -> float:
        total = 0.0
        for left, right in zip(a, b, strict=True):
            size = len(left)
            table = np.corrcoef(left, right)[:size, size:]
            total += max(table[range(size), order].sum() for order in itertools.permutations(range(size)))
        return total

    table = np.asarray([[value(layers(networks[0], i), layers(networks[1], j)) for j in range(3)] for i in range(3)])
    best = max(table[range(3), order].sum() for order in itertools.permutations(range(3)))
    assert table[range(3), found.permutations[1].branches].sum() == pytest.approx(best, abs=1e-5)
    for i, branch in enumerate(found.permutations[1].branches):
        moved = [
            layer[units[i] % len(layer)]
            for layer, units in zip(layers(networks[1], branch), found.permutations[1].units, strict=True)
        ]
        pairs = [p for a, b in zip(layers(networks[0], i), moved, strict=True) for p in zip(a, b, strict=True)]
        here = sum(np.corrcoef(a, b)[0, 1] for a, b in pairs)
        assert here == pytest.approx(table[i, branch], abs=1e-5)


@pytest.mark.parametrize("over", landscape.alignment.OVER)
def test_controls_permute_otherwise_or_shrink_to_the_same_distances(over: str, rng: np.random.Generator) -> None:
    net, networks, x = drawn(mlp((3,), 2), (4,), 4, rng, 3)
    found = landscape.align(net, networks, x, over=over, to=1)
    made = landscape.controls(networks, found, seed=3)
    for kind in (made.random, made.crossed):
        for k, network in enumerate(kind):
            y, z = (np.asarray(net.apply(n.params, n.state, x)[0]) for n in (networks[k], network))
            np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-4)
            assert (network is networks[1]) == (k == 1)
            assert k == 1 or distance(network, networks[1]) > found.distances[k, 1]
    by = found.permutations[2]
    np.testing.assert_array_equal(
        made.crossed[0].params[0]["kernel"], symmetries.permuted(networks[0], found.symmetry, by).params[0]["kernel"]
    )
    for k in (0, 2):
        assert distance(made.shrunk[k], networks[1]) == pytest.approx(found.distances[k, 1], rel=1e-5)
        whole = found.distances[k, 0]
        assert distance(made.shrunk[k], networks[k]) == pytest.approx(whole - found.distances[k, 1], rel=1e-4)
    disk = landscape.controls([OnDisk(n) for n in networks], found, seed=3)
    for kind, same in zip(disk, made, strict=True):
        np.testing.assert_array_equal(kind[2].read(1, 2)[0][1]["kernel"], same[2].read(1, 2)[0][1]["kernel"])
    with pytest.raises(ValueError, match="three at least"):
        landscape.controls(networks[:2], found)


def test_deep_branches_end_where_no_exchange_of_two_units_brings_them_nearer(rng: np.random.Generator) -> None:
    net, networks, x = drawn(mlp((4, 4, 3), 2), (5,), 3, rng)
    found = landscape.align(net, networks, x)
    known = symmetries.symmetry(networks[0].params, ())
    for layer, group in enumerate(known.groups):
        for branch, (u, v) in itertools.product(range(3), itertools.combinations(range(group.size), 2)):
            units = [u_.copy() for u_ in found.permutations[1].units]
            units[layer][branch, [u, v]] = units[layer][branch, [v, u]]
            other = symmetries.Permutation(found.permutations[1].branches, tuple(units))
            moved = symmetries.permuted(networks[1], known, other)
            assert distance(networks[0], moved) >= found.distances[1, 1] * (1 - 1e-6)


class OnDisk:
    """A network that is only ever read a few branches at a time, and counts how many."""

    def __init__(self, network: InMemory) -> None:
        self.inner, self.num_branches, self.largest = network, network.num_branches, 0

    def read(self, first: int, count: int) -> Any:
        self.largest = max(self.largest, count)
        return jax.tree.map(lambda a: np.asarray(a)[first : first + count], (self.inner.params, self.inner.state))


@pytest.mark.parametrize("over", landscape.alignment.OVER)
def test_blocks_of_branches_are_aligned_from_disk_with_bounded_memory(over: str, rng: np.random.Generator) -> None:
    net, networks, x = drawn(mlp((2,), 2), (3,), 12, rng)
    disks = [OnDisk(n) for n in networks]
    found = landscape.align(net, disks, x, over=over, block=4)
    whole = landscape.align(net, networks, x, over=over)
    assert found.blocks == 4
    assert whole.blocks == 12
    assert found.distances[1, 0] == pytest.approx(whole.distances[1, 0])
    assert whole.distances[1, 1] <= found.distances[1, 1] * (1 + 1e-6) < found.distances[1, 0]
    assert max(d.largest for d in disks) == 4
    read = [found.networks[1].read(first, 3) for first in range(0, 12, 3)]
    assert disks[1].largest <= 8  # branches of two blocks where a piece lies across
    params = jax.tree.map(lambda *parts: np.concatenate(parts), *(p for p, _ in read))
    assert distance(InMemory(params), networks[0]) == pytest.approx(found.distances[1, 1], rel=1e-5)
    y, z = (np.asarray(net.apply(p, (), x)[0]) for p in (networks[1].params, params))
    np.testing.assert_allclose(y, z, rtol=1e-4, atol=1e-5)


def test_ties_and_equal_networks_stay_in_place(rng: np.random.Generator) -> None:
    net, (network,), x = drawn(mlp((3, 3), 2), (4,), 3, rng, 1)
    zero = InMemory(jax.tree.map(jnp.zeros_like, network.params))
    found = landscape.align(net, [network, network, zero], x)
    assert found.distances[1].tolist() == [0, 0] or found.distances[1].max() < 1e-3
    np.testing.assert_array_equal(found.permutations[1].branches, np.arange(3))
    assert found.distances[2, 0] == pytest.approx(found.distances[2, 1])


def test_a_network_that_is_no_chain_is_refused_or_named(rng: np.random.Generator) -> None:
    def init(key: Any, x: Any) -> Any:
        return {"a": jnp.ones((3, x.shape[1])), "b": jnp.ones((2, 3))}

    branch = from_functions(init, lambda p, x: jax.nn.relu(x @ p["a"].T) @ p["b"].T)
    net, networks, x = drawn(branch, (4,), 3, rng)
    with pytest.raises(ValueError, match=r"name its units"):
        landscape.align(net, networks, x)
    found = landscape.align(net, networks, x, units=[{"params.a": 0, "params.b": 1}])
    assert found.distances[1, 1] < found.distances[1, 0]
    with pytest.raises(ValueError, match="changes the outputs"):
        landscape.align(net, networks, x, units=[{"params.a": 0}])
    with pytest.raises(ValueError, match=r"no leaf 'params\.c'"):
        landscape.align(net, networks, x, units=[{"params.c": 0}])
    with pytest.raises(ValueError, match="multiples of one size"):
        landscape.align(net, networks, x, units=[{"params.a": 0, "params.b": 0}])


def test_mistakes_are_named(rng: np.random.Generator) -> None:
    net, networks, x = drawn(mlp((3, 3), 2), (4,), 3, rng)
    with pytest.raises(UnknownNameError, match="over"):
        landscape.align(net, networks, x, over="layers")
    with pytest.raises(ValueError, match="one hidden layer"):
        landscape.align(net, networks, x, over="units")
    affine, others, _ = drawn(mlp((), 2), (4,), 3, rng)
    with pytest.raises(ValueError, match="needs the hidden layers"):
        landscape.align(affine, others, x, by="activations")
    with pytest.raises(ValueError, match="at least two"):
        landscape.align(net, networks[:1], x)
    for bad in (math.nan, math.inf):
        spoilt = InMemory(
            jax.tree.map(lambda leaf, bad=bad: leaf.at[-1].set(bad), networks[1].params), networks[1].state
        )
        with pytest.raises(ValueError, match="network 1 holds numbers that are not finite"):
            landscape.align(net, [networks[0], spoilt], x)
    with pytest.raises(ValueError, match="block must be a positive integer, got 0"):
        landscape.align(net, networks, x, block=0)
    with pytest.raises(ValueError, match="multi_branch"):
        landscape.align(mlp((3,), 2), networks, x)
    tied = from_functions(
        lambda key, x: ({"kernel": jnp.ones((2, 4))}, {"kernel": jnp.ones((3, 2))}),
        lambda p, x: x @ p[0]["kernel"].T @ p[1]["kernel"].T * p[0]["kernel"][0, 0],
    )
    skip = multi_branch(tied, 2)
    with pytest.raises(ValueError, match="changes the outputs"):
        landscape.align(skip, [InMemory(skip.init(jax.random.key(k), x)[0]) for k in range(2)], x)


@pytest.mark.parametrize("over", ["branches", "units"])
def test_alignment_does_not_depend_on_the_size_of_the_weights(over: str, rng: np.random.Generator) -> None:
    """Inner products of float32 numbers of 1e-23 are 0, of 1e20 infinite."""
    net = multi_branch(mlp((4,), 1), 6)
    x = jnp.asarray(rng.standard_normal((8, 5)), jnp.float32)
    networks = [InMemory(*net.init(jax.random.key(k), x[:1])) for k in range(2)]

    def found(scale: float) -> landscape.Alignment:
        scaled = [InMemory(jax.tree.map(lambda a: a * np.float32(scale), n.params), n.state) for n in networks]
        return landscape.align(net, scaled, x, over=over)

    wanted = found(1.0)
    assert wanted.distances[1, 1] < 0.95 * wanted.distances[1, 0]
    for scale in (2.0**-100, 2.0**-75, 2.0**60):
        at = found(scale)
        np.testing.assert_array_equal(at.permutations[1].branches, wanted.permutations[1].branches)
        np.testing.assert_allclose(at.distances / scale, wanted.distances, rtol=1e-6)


@pytest.mark.parametrize("kind", ["random", "near", "clustered", "dead", "ties", "constant"])
@pytest.mark.parametrize("n", [1, 2, 60, 700])
def test_the_best_assignment_is_scipys(kind: str, n: int, rng: np.random.Generator, monkeypatch: Any) -> None:
    monkeypatch.setattr(assignments, "_SMALL", 1)
    a, b = rng.standard_normal((2, n, 40))
    if kind == "near":
        b = a[rng.permutation(n)] + 0.3 * b
    elif kind == "clustered":  # a few directions carry nearly everything
        a[:, :2] *= 50
        b[:, :2] *= 50
    elif kind == "dead":
        a[: n // 2] = 0
        b[: n // 3] = 0
    scores = (a @ b.T).astype(np.float32)
    if kind == "ties":
        scores = rng.integers(-2, 3, (n, n)).astype(np.float32)
    elif kind == "constant":
        scores[:] = -3.5
    rows = np.arange(n)
    best = scores.astype(np.float64)[rows, scipy.optimize.linear_sum_assignment(scores, maximize=True)[1]].sum()
    places = assignments.assignment(scores)
    np.testing.assert_array_equal(np.sort(places), rows)
    assert scores.astype(np.float64)[rows, places].sum() == pytest.approx(best, rel=1e-13, abs=1e-12 * n)


def test_an_auction_without_an_end_is_given_up(rng: np.random.Generator, monkeypatch: Any) -> None:
    scores = rng.standard_normal((100, 100))
    assert assignments._prices(scores) is not None
    scores[:, 50:] = -1e6  # all rows want the same half
    assert assignments._prices(scores) is None
    monkeypatch.setattr(assignments, "_SMALL", 1)
    assert np.unique(assignments.assignment(scores)).size == 100
