"""The multi-branch network against a loop over its branches in float64; mixtures, nesting, memory, compilation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import Array, lax

from dualgap_jax import evaluate, landscape, losses, mixture, multi_branch, networks
from dualgap_jax.networks import branch_keys, sum_branches, sum_rest
from dualgap_jax.types import Network


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.Dense(4, param_dtype=x.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8, param_dtype=x.dtype)(x)
        x = nn.Dropout(0.4, deterministic=not train)(nn.tanh(x))
        return nn.Dense(3, param_dtype=x.dtype)(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        dtype = jnp.zeros(()).dtype
        self.first = nnx.Linear(7, 4, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.8, param_dtype=dtype, rngs=rngs)
        self.drop = nnx.Dropout(0.4, rngs=rngs)
        self.last = nnx.Linear(4, 3, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.last(self.drop(nnx.tanh(self.norm(self.first(x)))))


def products() -> Network:
    def init(key: Array, x: Array) -> dict[str, Array]:
        return {"a": jax.random.normal(key, (x.shape[1], 3), x.dtype), "b": jax.random.normal(key, (), x.dtype)}

    return networks.from_functions(init, lambda params, x: params["b"] * jnp.tanh(x @ params["a"]) ** 2)


# Name: the branch, and the shape of one example.
NETWORKS: dict[str, tuple[Callable[[], Network], tuple[int, ...]]] = {
    "mlp": (lambda: networks.mlp((5, 4), 3), (7,)),
    "mlp_affine": (lambda: networks.mlp((), 3, use_bias=False), (7,)),
    "conv": (lambda: networks.conv((2,), 3, activation="tanh", batch_norm=True, dropout=0.3), (5, 4, 2)),
    "gru": (lambda: networks.gru(4, 3), (4, 2)),
    "linen": (lambda: networks.from_linen(LinenNet()), (7,)),
    "nnx": (lambda: networks.from_nnx(NnxNet), (7,)),
    "functions": (products, (7,)),
}
STATEFUL = ("conv", "linen", "nnx")
ROOT = 11


def pick(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda a: a[index], tree)


def stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def assert_trees_close(actual: Any, expected: Any, rtol: float = 1e-12) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * max(1.0, np.abs(b).max(initial=0)))


def random_like(tree: Any, rng: np.random.Generator, low: float = -1.5) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(rng.uniform(low, 1.5, a.shape), a.dtype), tree)


def random_instance(name: str, count: int, rng: np.random.Generator) -> tuple[Network, Any, Any, Array]:
    """A branch, random stacked parameters and (positive) state of `count` branches, and inputs."""
    make, shape = NETWORKS[name]
    branch = make()
    x = jnp.asarray(rng.standard_normal((6, *shape)))
    params, state = jax.eval_shape(jax.vmap(branch.init, (0, None)), jax.random.split(jax.random.key(0), count), x)
    return branch, random_like(params, rng), random_like(state, rng, low=0.5), x


def loop(branch: Network, params: Any, state: Any, x: Array, key: Array | None, train: bool) -> tuple[Array, Any]:
    """The plain sum over branches as a Python loop, one branch after another."""
    apply = jax.jit(branch.apply, static_argnames="train")
    total: Any = 0.0
    states = []
    for i in range(jax.tree.leaves(params)[0].shape[0]):
        k = None if key is None else jax.random.fold_in(key, i)
        y, new = apply(pick(params, i), pick(state, i), x, key=k, train=train)
        total = total + y
        states.append(new)
    return total, stack(states)


@pytest.mark.parametrize("name", ["mlp", "conv", "gru", "nnx", "functions"])
def test_equals_a_loop_over_branches(name: str, rng: np.random.Generator, x64: None) -> None:
    """Outputs, new state and gradients in training, outputs in evaluation; I = 6."""
    branch, params, state, x = random_instance(name, 6, rng)
    key = jax.random.key(ROOT)
    weights = jnp.asarray(rng.standard_normal((6, 3)))

    @jax.jit
    def pullback(p: Any, s: Any, k: Array, cotangent: Array) -> Any:
        def outputs(p: Any, x: Array) -> tuple[Array, Any]:
            return branch.apply(p, s, x, key=k, train=True)

        _, back, _ = jax.vjp(outputs, p, x, has_aux=True)
        return back(cotangent)

    total, expected_state = loop(branch, params, state, x, key, True)
    evaluated = loop(branch, params, state, x, None, False)[0]

    for reduce, scale in (("mean", 1 / 6), ("sum", 1.0)):
        # The objective sum(weights * sin(y)), y = scale * total, differentiated branch by branch.
        cotangent = scale * weights * jnp.cos(scale * total)
        pulled = [pullback(*pick((params, state), i), jax.random.fold_in(key, i), cotangent) for i in range(6)]
        expected_gradient = stack([p for p, _ in pulled]), sum(g for _, g in pulled)

        net = multi_branch(branch, 6, reduce=reduce)

        def objective(params: Any, x: Array, net: Network = net) -> tuple[Array, Any]:
            y, new = net.apply(params, state, x, key=key, train=True)
            return jnp.sum(weights * jnp.sin(y)), (y, new)

        gradient, (y, new) = jax.jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(params, x)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, scale * total, rtol=1e-12, atol=1e-12)
        assert_trees_close(new, expected_state)
        assert_trees_close(gradient, expected_gradient, 1e-11)
        if reduce == "mean":
            continue
        y, same = jax.jit(net.apply)(params, state, x)
        np.testing.assert_allclose(y, scale * evaluated, rtol=1e-12, atol=1e-12)
        assert_trees_close(same, state, 0)

    if name in STATEFUL:
        changes = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), expected_state, state)
        assert min(jax.tree.leaves(changes)) > 1e-3
    else:
        assert not jax.tree.leaves(state)


@pytest.mark.parametrize("name", STATEFUL)
def test_branches_drop_independently_and_by_the_key(name: str, rng: np.random.Generator, x64: None) -> None:
    branch, params, state, x = random_instance(name, 1, rng)
    params, state = (jax.tree.map(lambda a: jnp.repeat(a, 3, axis=0), t) for t in (params, state))
    apply = jax.jit(functools.partial(multi_branch(branch, 3).apply, train=True))
    first, again, other = (apply(params, state, x, key=jax.random.key(k))[0] for k in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert float(jnp.abs(first - other).max()) > 1e-3
    # Equal branches, unequal masks: the mean differs from any one branch.
    one = jax.jit(functools.partial(branch.apply, train=True))
    for i in range(3):
        single = one(pick(params, i), pick(state, i), x, key=jax.random.fold_in(jax.random.key(1), i))[0]
        assert float(jnp.abs(first - single).max()) > 1e-3


# --------------------------------------------------------------------------------------------------------------- init


@pytest.mark.parametrize("name", ["mlp_affine", "linen", "nnx"])
def test_branch_i_is_initialised_by_fold_in_of_i_whatever_the_number(name: str) -> None:
    make, shape = NETWORKS[name]
    branch, root = make(), jax.random.key(ROOT)
    x = jnp.zeros((2, *shape))
    seven = jax.jit(multi_branch(branch, 7).init)(root, x)
    one = jax.jit(branch.init)
    for i in range(7):
        assert_trees_close(pick(seven, i), one(jax.random.fold_in(root, i), x), 1e-6)
    # 12: one at a time; 45: two at a time, the last chunk overlaps.
    for count in (12, 45):
        more = jax.jit(multi_branch(branch, count).init)(root, x)
        assert_trees_close(jax.tree.map(lambda a: a[:7], more), seven, 0)
        for i in (count - 2, count - 1):
            assert_trees_close(pick(more, i), one(jax.random.fold_in(root, i), x), 1e-6)
        largest = np.asarray(max(jax.tree.leaves(more[0]), key=lambda a: a.size))
        assert len(np.unique(largest.reshape(count, -1), axis=0)) == count


def parameter_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def init_bytes(branch: Network, count: int, d: int) -> tuple[int, int]:
    """Bytes of the result and of the temporaries of a jitted init, by the compiler's account."""
    x = jax.ShapeDtypeStruct((2, d), jnp.float32)
    memory = jax.jit(multi_branch(branch, count).init).lower(jax.random.key(0), x).compile().memory_analysis()
    assert memory is not None
    return memory.output_size_in_bytes, memory.temp_size_in_bytes


@pytest.mark.parametrize(
    ("count", "d", "hidden", "init"),
    [(1000, 784, (8,), "torch"), (997, 784, (8,), "he"), (211, 3072, (8, 8, 8), "torch")],
)
def test_init_needs_at_most_1_3_times_the_parameters(count: int, d: int, hidden: tuple[int, ...], init: str) -> None:
    branch = networks.mlp(hidden, init=init)
    one, _ = jax.eval_shape(branch.init, jax.random.key(0), jnp.zeros((1, d)))
    output, temporary = init_bytes(branch, count, d)
    assert output >= count * parameter_bytes(one)
    assert output + temporary <= 1.3 * count * parameter_bytes(one)


@pytest.mark.parametrize("count", [1, 7])
def test_init_of_few_branches_needs_the_temporaries_of_drawing_one(count: int) -> None:
    """Below about 20 branches one branch is more than a twentieth; then its draw, not 1.3, sets the peak."""
    branch = networks.mlp((8,))
    one, _ = jax.eval_shape(branch.init, jax.random.key(0), jnp.zeros((1, 784)))
    output, temporary = init_bytes(branch, count, 784)
    assert output < 1.01 * count * parameter_bytes(one) + 1000
    assert temporary <= 7 * parameter_bytes(one)


# ----------------------------------------------------------------------------------------------- transformations


def counting_branch() -> tuple[Network, list[int]]:
    traces = [0]

    def apply(params: Array, x: Array) -> Array:
        traces[0] += 1
        return x @ params

    return networks.from_functions(lambda key, x: jax.random.normal(key, (x.shape[1], 2), x.dtype), apply), traces


def test_a_branch_is_traced_a_few_times_whatever_i_and_never_again() -> None:
    seen = []
    for count in (50, 200):
        branch, traces = counting_branch()
        net = multi_branch(branch, count)
        x = jnp.ones((3, 4))
        params, state = net.init(jax.random.key(0), x)
        apply = jax.jit(net.apply)
        before = traces[0]
        apply(params, state, x)
        seen.append(traces[0] - before)
        after = traces[0]
        params2, _ = net.init(jax.random.key(1), x)
        apply(params2, state, x + 1)
        assert traces[0] == after
    assert seen[0] <= 4
    assert seen[1] <= seen[0]


def test_a_training_loop_compiles_once_and_carries_its_state(x64: None, rng: np.random.Generator) -> None:
    branch, params, state, x = random_instance("nnx", 5, rng)
    net, traced = multi_branch(branch, 5), []

    @jax.jit
    def step(params: Any, state: Any, key: Array) -> tuple[Any, Any]:
        traced.append(None)

        def risk(p: Any) -> tuple[Array, Any]:
            y, new = net.apply(p, state, x, key=key, train=True)
            return jnp.mean(y**2), new

        gradient, new = jax.grad(risk, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), new

    def body(carry: Any, key: Array) -> tuple[Any, None]:
        return step(*carry, key), None

    keys = jax.random.split(jax.random.key(0), 3)
    looped, _ = lax.scan(body, (params, state), keys)
    carry = (params, state)
    for key in keys:
        carry = step(*carry, key)
    assert len(traced) == 1  # for the loop and outside it
    assert_trees_close(carry, looped, 1e-10)


def test_vmap_over_seeds_equals_one_after_another(rng: np.random.Generator, x64: None) -> None:
    net = multi_branch(networks.from_linen(LinenNet()), 5)
    x = jnp.asarray(rng.standard_normal((6, 7)))
    keys = jax.random.split(jax.random.key(0), 3)

    def run(key: Array) -> tuple[Array, Any]:
        params, state = net.init(key, x)
        return net.apply(params, state, x, key=key, train=True)

    together = jax.jit(jax.vmap(run))(keys)
    single = jax.jit(run)
    assert_trees_close(together, stack([single(k) for k in keys]))


@pytest.mark.parametrize("name", ["mlp", "linen"])
def test_second_derivatives_are_those_of_a_loop(name: str, rng: np.random.Generator, x64: None) -> None:
    branch, params, state, x = random_instance(name, 3, rng)
    tangent = random_like(params, rng)

    def product(outputs: Callable[[Any], Array]) -> Any:
        gradient = jax.grad(lambda p: jnp.sum(jnp.sin(outputs(p))))
        return jax.jit(lambda p: jax.jvp(gradient, (p,), (tangent,))[1])(params)

    def looped(p: Any) -> Array:
        return sum(branch.apply(pick(p, i), pick(state, i), x)[0] for i in range(3)) / 3

    net = multi_branch(branch, 3)
    assert_trees_close(product(lambda p: net.apply(p, state, x)[0]), product(looped), 1e-10)


# ------------------------------------------------------------------------------------------------ nesting, mixtures


def test_nesting_is_the_mean_of_means_with_keys_folded_twice(rng: np.random.Generator, x64: None) -> None:
    branch = networks.from_linen(LinenNet())
    net = multi_branch(multi_branch(branch, 3, reduce="sum"), 4)
    x = jnp.asarray(rng.standard_normal((6, 7)))
    root, key = jax.random.key(1), jax.random.key(2)
    params, state = jax.jit(net.init)(root, x)
    y, new = jax.jit(functools.partial(net.apply, train=True))(params, state, x, key=key)

    init, apply = jax.jit(branch.init), jax.jit(functools.partial(branch.apply, train=True))
    total: Any = 0.0
    for i in range(4):
        for j in range(3):
            p, s = init(jax.random.fold_in(jax.random.fold_in(root, i), j), x)
            assert_trees_close(pick(pick((params, state), i), j), (p, s), 1e-15)
            part, changed = apply(p, s, x, key=jax.random.fold_in(jax.random.fold_in(key, i), j))
            total = total + part / 4
            assert_trees_close(pick(pick(new, i), j), changed)
    np.testing.assert_allclose(y, total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [None, (0.5, -2.0, 3)])
def test_mixture_equals_a_loop_over_its_networks(
    weights: tuple[float, ...] | None, rng: np.random.Generator, x64: None
) -> None:
    parts = [
        networks.from_linen(LinenNet()),
        multi_branch(networks.mlp((4,), 3), 3, reduce="sum"),
        networks.from_nnx(NnxNet),
    ]
    net = mixture(parts, weights=weights)
    x = jnp.asarray(rng.standard_normal((6, 7)))
    root, key = jax.random.key(1), jax.random.key(2)
    params, state = net.init(root, x)
    y, new = net.apply(params, state, x, key=key, train=True)
    total: Any = 0.0
    for k, network in enumerate(parts):
        p, s = jax.jit(network.init)(jax.random.fold_in(root, k), x)
        assert_trees_close((params[k], state[k]), (p, s), 1e-15)
        part, changed = network.apply(p, s, x, key=jax.random.fold_in(key, k), train=True)
        total = total + (1 / 3 if weights is None else weights[k]) * part
        assert_trees_close(new[k], changed)
    np.testing.assert_allclose(y, total, rtol=1e-12, atol=1e-12)
    assert net.stem is None
    assert net.stacked is None


def test_the_mean_over_unlike_branches_is_a_weighted_mixture_of_sums(rng: np.random.Generator, x64: None) -> None:
    a, b = networks.mlp((4,), 3), networks.mlp((2, 5), 3, activation="tanh")
    net = mixture([multi_branch(a, 2, reduce="sum"), multi_branch(b, 3, reduce="sum")], weights=(1 / 5, 1 / 5))
    x = jnp.asarray(rng.standard_normal((6, 7)))
    params = random_like(jax.eval_shape(net.init, jax.random.key(0), x)[0], rng)
    each = [a.apply(pick(params[0], i), (), x)[0] for i in range(2)]
    each += [b.apply(pick(params[1], i), (), x)[0] for i in range(3)]
    np.testing.assert_allclose(net.apply(params, ((), ()), x)[0], np.mean(each, axis=0), rtol=1e-12, atol=1e-12)


def test_a_mixture_can_be_stacked(rng: np.random.Generator, x64: None) -> None:
    mixed = mixture([networks.mlp((4,), 3), networks.mlp((), 3)])
    x = jnp.asarray(rng.standard_normal((6, 7)))
    net = multi_branch(mixed, 5)
    params = random_like(jax.eval_shape(net.init, jax.random.key(0), x)[0], rng)
    total, _ = loop(mixed, params, ((), ()), x, None, False)
    np.testing.assert_allclose(net.apply(params, ((), ()), x)[0], total / 5, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------- stem


STEMMED: dict[str, Callable[[], Network]] = {
    "mean": lambda: multi_branch(networks.mlp((5, 4), 3), 4),
    "sum": lambda: multi_branch(networks.mlp((), 3, use_bias=False), 4, reduce="sum"),
    "nested": lambda: multi_branch(multi_branch(networks.mlp((5,), 3), 2, reduce="sum"), 3),
    "gated": lambda: multi_branch(networks.gated(5, 3), 4),
    "mixture": lambda: mixture([networks.mlp((5,), 3), networks.mlp((), 3)], weights=(2.0, -1.0)),
    "mixed": lambda: mixture([multi_branch(networks.mlp((5,), 3), 3), networks.mlp((2, 2), 3)]),
    "stacked_mixture": lambda: multi_branch(mixture([networks.mlp((5,), 3), networks.mlp((), 3)]), 3),
}


@pytest.mark.parametrize("name", STEMMED)
def test_stem_contract(name: str, rng: np.random.Generator, x64: None) -> None:
    net = STEMMED[name]()
    stem = net.stem
    assert stem is not None
    x = jnp.asarray(rng.standard_normal((6, 7)))
    template, state = jax.eval_shape(net.init, jax.random.key(0), x)
    each = [random_like(template, rng) for _ in range(3)]

    apply, preactivation = jax.jit(net.apply), jax.jit(stem.preactivation)
    z = [preactivation(p, x) for p in each]
    for p, a in zip(each, z, strict=True):
        y, new = jax.jit(stem.rest)(p, state, a)
        np.testing.assert_allclose(y, apply(p, state, x)[0], rtol=1e-12, atol=1e-12)
        assert jax.tree.structure(new) == jax.tree.structure(state)

    c = rng.standard_normal(3)

    def combine(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: sum(k * a for k, a in zip(c, leaves, strict=True)), *trees)

    assert_trees_close(preactivation(combine(each), x), combine(z))


def test_stacked_describes_the_sum() -> None:
    branch = networks.mlp()
    for reduce, scale in (("mean", 1 / 8), ("sum", 1.0)):
        stacked = multi_branch(branch, 8, reduce=reduce).stacked
        assert stacked is not None
        assert (stacked.branch, stacked.num_branches, stacked.scale) == (branch, 8, scale)
    assert branch.stacked is None
    assert multi_branch(networks.gru(), 3).stem is None


def test_sum_rest_needs_a_stem() -> None:
    with pytest.raises(ValueError, match="needs a branch with a stem"):
        sum_rest(networks.gru(), (), (), jnp.zeros(()))


def test_sum_branches_takes_a_range_of_branches_with_their_own_keys(rng: np.random.Generator, x64: None) -> None:
    branch, params, state, x = random_instance("linen", 5, rng)
    key = jax.random.key(ROOT)
    cut = jax.tree.map(lambda a: a[2:4], (params, state))
    y, new = sum_branches(branch, *cut, x, keys=branch_keys(key, 2, 2), train=True)
    whole, states = loop(branch, params, state, x, key, True)
    others = [
        branch.apply(*pick((params, state), i), x, key=jax.random.fold_in(key, i), train=True)[0] for i in (0, 1, 4)
    ]
    np.testing.assert_allclose(y, whole - sum(others), rtol=1e-11, atol=1e-11)
    assert_trees_close(new, jax.tree.map(lambda a: a[2:4], states))
    assert branch_keys(None, 0, 3) is None


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("value", [True, False, 0, -1, 2.5, 3.0, "3", None, np.nan])
def test_num_branches_must_be_a_positive_integer(value: Any) -> None:
    with pytest.raises(ValueError, match=r"num_branches must be a positive integer, got") as raised:
        inspect.unwrap(multi_branch)(networks.mlp(), value)
    assert repr(value) in str(raised.value)


def test_reduce_must_be_known() -> None:
    with pytest.raises(ValueError, match=r"reduce='average' is unknown\. Allowed: mean, sum\."):
        multi_branch(networks.mlp(), 3, reduce="average")


def test_parameters_of_another_number_of_branches_are_refused() -> None:
    net, x = multi_branch(networks.mlp((4,), 3), 5), jnp.ones((2, 7))
    for count in (4, 6):
        params, state = jax.eval_shape(multi_branch(networks.mlp((4,), 3), count).init, jax.random.key(0), x)
        with pytest.raises(ValueError, match=rf"network of 5 branches got a leaf of shape \({count}, "):
            jax.eval_shape(net.apply, params, state, x)
    assert net.stem is not None
    with pytest.raises(ValueError, match="every leaf must lead"):
        net.stem.preactivation(params, x)
    with pytest.raises(ValueError, match="every leaf must lead"):
        jax.eval_shape(net.apply, *jax.eval_shape(networks.mlp((4,), 3).init, jax.random.key(0), x), x)


def test_mixtures_refuse_what_does_not_fit() -> None:
    a, b = networks.mlp((4,), 3), networks.mlp((4,), 1)
    with pytest.raises(ValueError, match="at least one network"):
        mixture([])
    with pytest.raises(ValueError, match="2 networks need as many weights, got 3"):
        mixture([a, a], weights=(1.0, 2.0, 3.0))
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be finite"):
            mixture([a, a], weights=(1.0, bad))
    net, x = mixture([a, b]), jnp.ones((2, 7))
    params, state = jax.eval_shape(net.init, jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"outputs of one shape, got \[\(2, 3\), \(2, 1\)\]"):
        jax.eval_shape(net.apply, params, state, x)


# --- a function given in place of another -----------------------------------------------------------------------------


def doubled(net: Network) -> Network:
    """Another network by `_replace`: the structure that it keeps is that of the first one."""

    def apply(params: Any, state: Any, x: Array, /, **settings: Any) -> tuple[Array, Any]:
        y, state = net.apply(params, state, x, **settings)
        return 2 * y, state

    return net._replace(apply=apply)


@pytest.mark.parametrize("route", ["auto", "plain"])
@pytest.mark.parametrize("kind", ["branch of a sum", "sum", "single branch", "part of a mixture", "in bfloat16"])
def test_a_replaced_apply_is_what_is_evaluated_and_drawn(kind: str, route: str, rng: np.random.Generator) -> None:
    one = networks.mlp((4,), 1)
    old, new = {
        "branch of a sum": lambda: (multi_branch(one, 3), multi_branch(doubled(one), 3)),
        "sum": lambda: (multi_branch(one, 3), doubled(multi_branch(one, 3))),
        "single branch": lambda: (one, doubled(one)),
        "part of a mixture": lambda: (mixture([one, one]), mixture([doubled(one), doubled(one)])),
        "in bfloat16": lambda: tuple(networks.with_precision(n, compute_dtype="bfloat16") for n in (one, doubled(one))),
    }[kind]()
    rtol = 0.02 if kind == "in bfloat16" else 2e-5
    x, y = rng.standard_normal((9, 5)).astype(np.float32), rng.choice([-1.0, 1.0], 9).astype(np.float32)
    solutions = [networks.InMemory(*jax.jit(old.init)(jax.random.key(k), jnp.asarray(x))) for k in range(3)]
    out, _ = old.apply(solutions[1].params, solutions[1].state, jnp.asarray(x))
    want = 0.5 * np.square(2 * np.asarray(out, np.float64)[:, 0] - y).mean()
    assert evaluate(new, losses.squared(), (x, y), solutions[1]).loss == pytest.approx(want, rel=rtol)
    plane = landscape.plane_through(solutions)
    at = np.asarray(plane.anchors)[1:2]
    got = landscape.evaluate_points(new, losses.squared(), (x, y), plane, points=at, route=route)
    np.testing.assert_allclose(got, want, rtol=rtol)
    if kind != "in bfloat16":
        assert new.computed().apply is new.apply


def test_a_replaced_sum_is_not_taken_apart_into_the_branches_it_had(rng: np.random.Generator) -> None:
    net = multi_branch(networks.mlp((4,), 1), 3)
    x = rng.standard_normal((9, 5)).astype(np.float32)
    solutions = [networks.InMemory(*jax.jit(net.init)(jax.random.key(k), jnp.asarray(x))) for k in range(2)]
    landscape.align(net, solutions, x)
    with pytest.raises(ValueError, match="needs a network made by multi_branch"):
        landscape.align(doubled(net), solutions, x)
    with pytest.raises(ValueError, match="per_branch needs a network of multi_branch"):
        landscape.hessian(doubled(net), losses.squared(), (x, np.ones(9, np.float32)), solutions[0], per_branch=True)
