"""Branches against NumPy, the laws of their draws, the stem contract, and the Linen and NNX adapters."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import Array, lax
from scipy import stats

from dualgap_jax import networks
from dualgap_jax.networks import convolution
from dualgap_jax.registry import UnknownNameError
from dualgap_jax.types import Network

NUMPY_ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": lambda a: np.where(a > 0, a, 0),
    "leaky_relu": lambda a: np.where(a > 0, a, 0.01 * a),
    "tanh": np.tanh,
    "sigmoid": lambda a: 1 / (1 + np.exp(-a)),
    "softplus": lambda a: np.log1p(np.exp(a)),
    "gelu": lambda a: 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3))),
    "identity": lambda a: a,
    "square": lambda a: a**2,
}


def numpy_mlp(params: Any, x: np.ndarray, psi: Callable[[Any], Any]) -> np.ndarray:
    """The network of Section 2, one example and one layer after another."""
    rows = []
    for example in x:
        a = example.reshape(-1).astype(np.float64)
        for index, layer in enumerate(params):
            a = np.asarray(layer["kernel"], np.float64) @ (psi(a) if index else a)
            if "bias" in layer:
                a = a + np.asarray(layer["bias"], np.float64)
        rows.append(a)
    return np.stack(rows)


def random_params(branch: Network, x: np.ndarray, rng: np.random.Generator) -> Any:
    """Standard normal float64 parameters of the right structure, without the branch's own draws."""
    params, _ = jax.eval_shape(branch.init, jax.random.key(0), jnp.asarray(x))
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), params)


def assert_trees_close(actual: Any, expected: Any, rtol: float) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        scale = np.max(np.abs(b), initial=0.0)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * scale)


# ---------------------------------------------------------------------------------------------------------------- mlp


@pytest.mark.parametrize(
    ("activation", "hidden", "use_bias"),
    [
        *((name, (4, 6, 3), True) for name in sorted(networks.ACTIVATIONS)),
        *(("tanh", hidden, use_bias) for hidden, use_bias in (((), True), ((), False), ((5,), False))),
    ],
)
def test_mlp_is_the_formula_of_section_2(
    activation: str, hidden: tuple[int, ...], use_bias: bool, rng: np.random.Generator, x64: None
) -> None:
    branch = networks.mlp(hidden, 3, activation, use_bias)
    x = rng.standard_normal((5, 2, 4))
    params = random_params(branch, x, rng)
    y, new_state = jax.jit(branch.apply, static_argnames="train")(params, (), jnp.asarray(x), train=True)
    np.testing.assert_allclose(y, numpy_mlp(params, x, NUMPY_ACTIVATIONS[activation]), rtol=1e-12, atol=1e-12)
    assert new_state == ()
    assert y.dtype == jnp.float64


def test_every_activation_has_an_oracle() -> None:
    assert NUMPY_ACTIVATIONS.keys() == networks.ACTIVATIONS.keys()


def test_mlp_takes_an_activation_as_a_function(rng: np.random.Generator, x64: None) -> None:
    branch = networks.mlp((4,), 2, activation=jnp.sin)
    x = rng.standard_normal((3, 5))
    params = random_params(branch, x, rng)
    np.testing.assert_allclose(branch.apply(params, (), jnp.asarray(x))[0], numpy_mlp(params, x, np.sin), rtol=1e-12)


@pytest.mark.parametrize("use_bias", [True, False])
def test_mlp_parameters_are_one_group_a_layer(use_bias: bool) -> None:
    branch = networks.mlp((7, 4), 3, use_bias=use_bias)
    params, _ = jax.eval_shape(branch.init, jax.random.key(0), jnp.zeros((2, 3, 5)))
    shapes = [{k: v.shape for k, v in layer.items()} for layer in params]
    expected: list[dict[str, tuple[int, ...]]] = [
        {"kernel": (7, 15), "bias": (7,)},
        {"kernel": (4, 7), "bias": (4,)},
        {"kernel": (3, 4), "bias": (3,)},
    ]
    if not use_bias:
        expected = [{"kernel": layer["kernel"]} for layer in expected]
    assert shapes == expected
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_mlp_draws_float32_for_integer_inputs_and_float64_for_float64(x64: None) -> None:
    for dtype, expected in (("uint8", "float32"), ("float32", "float32"), ("float64", "float64")):
        params, _ = jax.eval_shape(networks.mlp().init, jax.random.key(0), jnp.zeros((1, 4), dtype))
        assert {str(a.dtype) for a in jax.tree.leaves(params)} == {expected}


@pytest.mark.parametrize("init_scale", [1.0, 3.0])
def test_torch_init_is_uniform_on_the_authors_interval(init_scale: float) -> None:
    branch = networks.mlp((300, 200), 100, init_scale=init_scale)
    for seed in range(3):
        params, _ = branch.init(jax.random.key(seed), jnp.zeros((1, 13)))
        for fan_in, layer in zip((13, 300, 200), params, strict=True):
            bound = np.float32(init_scale / np.sqrt(fan_in))
            for values in (np.asarray(layer["kernel"]).ravel(), np.asarray(layer["bias"])):
                assert np.abs(values).max() <= bound
                near = (1 - 20 / len(values)) * bound  # missed on either side once in 20,000 draws
                assert values.max() > near
                assert values.min() < -near
                assert stats.kstest(values, stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-4


@pytest.mark.parametrize(("init", "variance"), [("lecun", 1.0), ("he", 2.0), ("normal", None)])
def test_normal_inits_have_their_variance_and_no_bias(init: str, variance: float | None) -> None:
    branch = networks.mlp((300, 200), 100, init=init, init_scale=0.5)
    for seed in range(3):
        params, _ = branch.init(jax.random.key(seed), jnp.zeros((1, 13)))
        for fan_in, layer in zip((13, 300, 200), params, strict=True):
            std = 0.5 * (1.0 if variance is None else np.sqrt(variance / fan_in))
            assert stats.kstest(np.asarray(layer["kernel"]).ravel(), stats.norm(0, std).cdf).pvalue > 1e-4
            assert not layer["bias"].any()


def test_draws_of_different_leaves_and_keys_are_independent() -> None:
    branch = networks.mlp((2, 2), 2)
    keys = jax.random.split(jax.random.key(4), 4000)
    params = jax.jit(jax.vmap(lambda k: branch.init(k, jnp.zeros((1, 2)))[0]))(keys)
    columns = np.concatenate([np.asarray(a).reshape(len(keys), -1) for a in jax.tree.leaves(params)], axis=1).T
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 5 / np.sqrt(len(keys))
    assert len(np.unique(columns)) > 0.99 * columns.size


def test_the_same_key_gives_the_same_draw_whatever_the_batch() -> None:
    branch = networks.mlp((3, 4), 2)
    a = branch.init(jax.random.key(5), jnp.zeros((1, 6)))
    b = branch.init(jax.random.key(5), jnp.ones((9, 2, 3)))
    assert_trees_close(a, b, 0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden": (8, 0)}, "positive integer"),
        ({"hidden": (8.0,)}, "positive integer"),
        ({"hidden": (2.5,)}, "positive integer"),
        ({"hidden": ("8",)}, "positive integer"),
        ({"hidden": (True,)}, "positive integer"),
        ({"out": 0}, "positive integer"),
        ({"out": -3}, "positive integer"),
        ({"init_scale": 0.0}, "init_scale"),
        ({"init_scale": -1.0}, "init_scale"),
        ({"init_scale": float("nan")}, "init_scale"),
        ({"init_scale": float("inf")}, "init_scale"),
        ({"activation": "rleu"}, "Did you mean 'relu'"),
        ({"init": "toch"}, "Did you mean 'torch'"),
    ],
)
def test_mlp_refuses_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, UnknownNameError), match=words):
        inspect.unwrap(networks.mlp)(**settings)


# --------------------------------------------------------------------------------------------------------------- stem


@pytest.mark.parametrize("hidden", [(), (5,), (4, 3)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_mlp_stem_contract(hidden: tuple[int, ...], use_bias: bool, rng: np.random.Generator, x64: None) -> None:
    branch = networks.mlp(hidden, 3, use_bias=use_bias)
    stem = branch.stem
    assert stem is not None
    assert stem.rest_sum is not None
    x = jnp.asarray(rng.standard_normal((6, 2, 3)))
    each = [random_params(branch, x, rng) for _ in range(4)]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    apply = jax.jit(branch.apply)

    for p in each:
        whole = apply(p, (), x)[0]
        np.testing.assert_allclose(stem.rest(p, (), stem.preactivation(p, x))[0], whole, rtol=1e-13, atol=1e-13)

    c = rng.standard_normal(4)
    combined = jax.tree.map(lambda *leaves: sum(k * a for k, a in zip(c, leaves, strict=True)), *each)
    np.testing.assert_allclose(
        stem.preactivation(combined, x),
        sum(k * stem.preactivation(p, x) for k, p in zip(c, each, strict=True)),
        rtol=1e-12,
        atol=1e-12,
    )

    z = jax.vmap(stem.preactivation, (0, None))(params, x)
    total, new_state = stem.rest_sum(params, (), z)
    expected = jax.vmap(lambda p, a: stem.rest(p, (), a)[0])(params, z).sum(0)
    np.testing.assert_allclose(total, expected, rtol=1e-12, atol=1e-12)
    assert total.shape == (6, 3)
    assert new_state == ()


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 8, 7), (10, 16, 33), (3, 5, 2)])
def test_products_of_few_columns_as_sums(shape: tuple[int, int, int], rng: np.random.Generator) -> None:
    out, fan_in, batch = shape
    for scale in (1e-15, 1.0, 1e15):
        kernel, a = (scale * rng.standard_normal(s) for s in ((out, fan_in), (fan_in, batch)))
        kernel, a = kernel.astype(np.float32), a.astype(np.float32)
        expected = kernel.astype(float) @ a.astype(float)
        bound = fan_in * 2.0**-23 * (np.abs(kernel).astype(float) @ np.abs(a).astype(float)) + 1e-45
        assert (np.abs(np.asarray(networks.dense._sums(jnp.asarray(kernel), jnp.asarray(a))) - expected) <= bound).all()


def test_gpus_get_sums_for_small_layers_where_nothing_is_differentiated(rng: np.random.Generator) -> None:
    branch = networks.mlp((8, 20, 8), 3)
    x = jnp.zeros((5, 40))
    shapes = jax.eval_shape(branch.init, jax.random.key(0), x)[0]
    params = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal((4, *s.shape)), jnp.float32), shapes)
    z = jnp.asarray(rng.standard_normal((4, 8, 5)), jnp.float32)
    assert branch.stem is not None
    rest_sum = branch.stem.rest_sum
    assert rest_sum is not None

    def outputs(params: Any, z: Array, train: bool = False) -> Array:
        return rest_sum(params, (), z, train=train)[0]

    def products(function: Any, platform: str) -> int:
        module = jax.export.export(jax.jit(function), platforms=[platform])(params, z).mlir_module()
        return module.count("stablehlo.dot_general")

    assert products(outputs, "cpu") == 3
    assert products(outputs, "cuda") == 2  # 8 inputs as sums; 20 inputs, and the sum over branches
    assert products(lambda p, z: outputs(p, z, True), "cuda") == 3
    gradient = jax.grad(lambda p, z: jnp.sum(outputs(p, z) ** 2))
    expected = jax.grad(lambda p, z: jnp.sum(outputs(p, z, True) ** 2))
    assert products(gradient, "cuda") == products(expected, "cuda") > 3
    for got, wanted in zip(jax.tree.leaves(gradient(params, z)), jax.tree.leaves(expected(params, z)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- bound


@pytest.mark.parametrize(("activation", "hidden"), [("relu", ()), ("relu", (3, 5)), ("tanh", (4,)), ("identity", (4,))])
def test_output_bound_is_never_exceeded_on_the_ball(
    activation: str, hidden: tuple[int, ...], rng: np.random.Generator, x64: None
) -> None:
    branch = networks.mlp(hidden, 2, activation, use_bias=False)
    x = jnp.asarray(rng.standard_normal((1, 3)))
    flat, unravel = jax.flatten_util.ravel_pytree(random_params(branch, x, rng))
    radius = 2.5
    bound = networks.mlp_output_bound(len(hidden) + 1, radius, float(jnp.linalg.norm(x)))

    def output(w: Array) -> Array:
        return jnp.linalg.norm(branch.apply(unravel(radius * w / jnp.linalg.norm(w)), (), x)[0])

    climb = jax.jit(
        lambda w: lax.fori_loop(
            0, 300, lambda _, v: v + 0.1 * jnp.linalg.norm(v) * jnp.nan_to_num(jax.grad(output)(v)), w
        )
    )
    starts = jnp.asarray(rng.standard_normal((200, flat.size)))
    random = jax.vmap(output)(starts)
    climbed = jax.vmap(output)(jax.vmap(climb)(starts[:20]))
    assert float(random.max()) <= bound * (1 + 1e-12)
    assert float(climbed.max()) <= bound * (1 + 1e-12)
    assert float(climbed.max()) > 0.3 * bound


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_output_bound_is_attained_by_aligned_layers_of_equal_norm(
    activation: str, num_layers: int, rng: np.random.Generator, x64: None
) -> None:
    radius = float(rng.uniform(0.5, 3))
    x = rng.standard_normal((1, 6))
    branch = networks.mlp((3,) * (num_layers - 1), 1, activation, use_bias=False)
    directions = [x[0] / np.linalg.norm(x)]
    for width in (3,) * (num_layers - 1):
        unit = np.abs(rng.standard_normal(width))  # ReLU passes it unchanged
        directions.append(unit / np.linalg.norm(unit))
    directions.append(np.ones(1))
    params = tuple(
        {"kernel": jnp.asarray(radius / np.sqrt(num_layers) * np.outer(b, a))}
        for a, b in itertools.pairwise(directions)
    )
    assert np.sqrt(sum(np.sum(np.square(p["kernel"])) for p in params)) == pytest.approx(radius, rel=1e-13)
    y = branch.apply(params, (), jnp.asarray(x))[0]
    bound = networks.mlp_output_bound(num_layers, radius, float(np.linalg.norm(x)))
    assert float(y[0, 0]) == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize("given", [(0, 1.0, 1.0), (2, -1.0, 1.0), (2, 1.0, -1.0), (2, float("nan"), 1.0)])
def test_output_bound_refuses_bad_input(given: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError, match="num_layers"):
        networks.mlp_output_bound(*given)


# ----------------------------------------------------------------------------------------------------------- adapters


class LinenNet(nn.Module):
    """A dense layer, batch norm, ReLU, dropout, a dense layer."""

    out: int = 3
    dropout: float = 0.4

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.Dense(5, param_dtype=x.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.8, param_dtype=x.dtype)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        return nn.Dense(self.out, param_dtype=x.dtype)(x)


class NnxNet(nnx.Module):
    """The same in NNX."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = None, dropout: float = 0.4) -> None:
        dtype = dtype or jnp.zeros(()).dtype
        self.first = nnx.Linear(4, 5, param_dtype=dtype, rngs=rngs)
        self.norm = nnx.BatchNorm(5, momentum=0.8, param_dtype=dtype, rngs=rngs)
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.last = nnx.Linear(5, 3, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


def batch_norm_net(
    params: dict[str, Any], mean: np.ndarray, var: np.ndarray, x: np.ndarray, train: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The net above without dropout in NumPy: outputs, new running mean, new running variance."""
    a = x @ params["first"]["kernel"] + params["first"]["bias"]
    used_mean, used_var = (a.mean(0), a.var(0)) if train else (mean, var)
    b = (a - used_mean) / np.sqrt(used_var + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    y = np.maximum(b, 0) @ params["last"]["kernel"] + params["last"]["bias"]
    if train:
        mean, var = 0.8 * mean + 0.2 * used_mean, 0.8 * var + 0.2 * used_var
    return y, mean, var


def linen_branch(dropout: float) -> Network:
    return networks.from_linen(LinenNet(dropout=dropout))


def nnx_branch(dropout: float) -> Network:
    return networks.from_nnx(lambda rngs: NnxNet(rngs, dropout=dropout))


LINEN_NAMES = {"first": "Dense_0", "norm": "BatchNorm_0", "last": "Dense_1"}


@pytest.mark.parametrize("adapter", ["linen", "nnx"])
@pytest.mark.parametrize("train", [False, True])
def test_adapters_match_numpy_with_batch_norm(adapter: str, train: bool, rng: np.random.Generator, x64: None) -> None:
    branch = linen_branch(0.0) if adapter == "linen" else nnx_branch(0.0)
    names = LINEN_NAMES if adapter == "linen" else {k: k for k in LINEN_NAMES}
    x = rng.standard_normal((7, 4))
    params, state = jax.jit(branch.init)(jax.random.key(2), jnp.asarray(x))
    params = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), params)
    state = jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.5, 2, a.shape)), state)
    statistics = state["batch_stats"] if adapter == "linen" else state
    running = {k: np.asarray(v) for k, v in statistics[names["norm"]].items()}
    y, new = branch.apply(params, state, jnp.asarray(x), key=jax.random.key(0), train=train)
    plain = {k: jax.tree.map(np.asarray, params[v]) for k, v in names.items()}
    expected, mean, var = batch_norm_net(plain, running["mean"], running["var"], x, train)
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)
    changed = (new["batch_stats"] if adapter == "linen" else new)[names["norm"]]
    np.testing.assert_allclose(changed["mean"], mean, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(changed["var"], var, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [linen_branch, nnx_branch])
def test_dropout_follows_the_key_in_training_and_is_off_in_evaluation(
    make: Callable[[float], Network], rng: np.random.Generator
) -> None:
    branch = make(0.5)
    x = jnp.asarray(rng.standard_normal((16, 4)), jnp.float32)
    params, state = jax.jit(branch.init)(jax.random.key(0), x)

    def y(key: int | None, train: bool) -> np.ndarray:
        return np.asarray(
            branch.apply(params, state, x, key=None if key is None else jax.random.key(key), train=train)[0]
        )

    np.testing.assert_array_equal(y(1, True), y(1, True))
    assert np.abs(y(1, True) - y(2, True)).max() > 1e-3
    np.testing.assert_array_equal(y(1, False), y(None, False))
    with pytest.raises(Exception, match=r"key=|PRNG for \"dropout\""):
        y(None, True)


@pytest.mark.parametrize("make", [linen_branch, nnx_branch])
def test_dropout_drops_its_share_and_keeps_the_mean(make: Callable[[float], Network]) -> None:
    branch = make(0.4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4)), jnp.float32)
    params, state = jax.jit(branch.init)(jax.random.key(0), x)
    keys = jax.random.split(jax.random.key(1), 4000)
    y = jax.vmap(lambda k: branch.apply(params, state, x, key=k, train=True)[0])(keys)
    still = make(0.0).apply(params, state, x, key=keys[0], train=True)[0]
    error = np.asarray(y.mean(0) - still) / np.asarray(y.std(0) / np.sqrt(len(keys)))
    assert np.abs(error).max() < 5
    assert float(y.std(0).min()) > 0


@pytest.mark.parametrize(
    "make", [linen_branch, nnx_branch, lambda p: networks.conv((3,), 3, batch_norm=True, dropout=p)]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_state_keeps_its_structure_and_dtypes_so_that_a_loop_can_carry_it(
    make: Callable[[float], Network], dtype: str, x64: None
) -> None:
    branch = make(0.1)
    shape = (6, 4) if make in (linen_branch, nnx_branch) else (6, 5, 5, 2)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
    params, state = jax.jit(branch.init)(jax.random.key(0), x)
    assert {a.dtype for a in jax.tree.leaves(state)} == {jnp.result_type(x, *jax.tree.leaves(params))}

    def body(state: Any, key: Any) -> tuple[Any, Array]:
        y, state = branch.apply(params, state, x, key=key, train=True)
        return state, y

    last, _ = jax.jit(lambda s: lax.scan(body, s, jax.random.split(jax.random.key(1), 3)))(state)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), last) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (last, state)), strict=True)) > 1e-3


@pytest.mark.parametrize(
    "make", [lambda: linen_branch(0.0), lambda: networks.from_nnx(lambda rngs: NnxNet(rngs, jnp.float32))]
)
def test_float32_state_meets_float64_inputs_without_a_change_of_dtype(make: Callable[[], Network], x64: None) -> None:
    branch = make()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)))
    params, state = jax.jit(branch.init)(jax.random.key(0), x.astype(jnp.float32))
    assert {str(a.dtype) for a in jax.tree.leaves(state)} == {"float32"}
    new = branch.apply(params, state, x, key=jax.random.key(0), train=True)[1]
    assert {str(a.dtype) for a in jax.tree.leaves(new)} == {"float32"}


def test_random_streams_are_no_state_and_parameters_hold_nothing_else() -> None:
    params, state = jax.jit(nnx_branch(0.5).init)(jax.random.key(0), jnp.zeros((2, 4)))
    assert set(params) == {"first", "norm", "last"}
    assert {k: set(v) for k, v in state.items()} == {"norm": {"mean", "var"}}
    params, state = jax.jit(linen_branch(0.5).init)(jax.random.key(0), jnp.zeros((2, 4)))
    assert set(params) == set(LINEN_NAMES.values())
    assert set(state) == {"batch_stats"}


def test_different_keys_give_different_parameters_through_the_adapters() -> None:
    for make in (linen_branch, nnx_branch):
        a, b = (jax.jit(make(0.0).init)(jax.random.key(k), jnp.zeros((2, 4)))[0] for k in (0, 1))
        assert max(float(jnp.abs(p - q).max()) for p, q in zip(*map(jax.tree.leaves, (a, b)), strict=True)) > 0.01


class LinenDeterministic(nn.Module):
    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        return nn.Dropout(0.5, deterministic=deterministic)(x)


class NnxTrainArgument(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Array, train: bool = False) -> Array:
        return self.drop(x, deterministic=not train)


@pytest.mark.parametrize(
    "make", [lambda: networks.from_linen(LinenDeterministic()), lambda: networks.from_nnx(NnxTrainArgument)]
)
def test_train_reaches_modules_that_take_it_by_another_name(make: Callable[[], Network]) -> None:
    branch, x = make(), jnp.ones((50, 2))
    params, state = jax.jit(branch.init)(jax.random.key(0), x)
    np.testing.assert_array_equal(branch.apply(params, state, x, key=jax.random.key(1))[0], x)
    dropped = branch.apply(params, state, x, key=jax.random.key(1), train=True)[0]
    assert set(np.unique(dropped)) == {0.0, 2.0}


class NnxSow(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        self.sow(nnx.Intermediate, "seen", x)
        return self.norm(x)


class LinenSow(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        self.sow("intermediates", "seen", x)
        return nn.BatchNorm(use_running_average=not train)(x)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("make", [lambda: networks.from_linen(LinenSow()), lambda: networks.from_nnx(NnxSow)])
def test_sown_values_do_not_enter_the_state(make: Callable[[], Network]) -> None:
    branch, x = make(), jnp.asarray(np.random.default_rng(0).standard_normal((6, 4)), jnp.float32)
    params, state = jax.jit(branch.init)(jax.random.key(0), x)
    new = branch.apply(params, state, x, train=True)[1]
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert len(jax.tree.leaves(state)) == 2


class LinenPartitioned(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))(x)


def test_linen_metadata_is_unboxed() -> None:
    branch = networks.from_linen(LinenPartitioned())
    params, state = jax.jit(branch.init)(jax.random.key(0), jnp.ones((2, 4)))
    assert isinstance(params["Dense_0"]["kernel"], jax.Array)
    y = branch.apply(params, state, jnp.ones((2, 4)))[0]
    np.testing.assert_allclose(y, np.ones((2, 4)) @ np.asarray(params["Dense_0"]["kernel"]), rtol=1e-5, atol=1e-6)


def test_from_linen_refuses_what_is_no_linen_module() -> None:
    for given in (LinenNet, nnx.Linear(2, 3, rngs=nnx.Rngs(0)), None, lambda x: x):
        with pytest.raises(TypeError, match=r"flax\.linen\.Module instance"):
            networks.from_linen(given)


def test_from_functions_passes_parameters_and_leaves_the_state_alone(rng: np.random.Generator) -> None:
    functions = (
        lambda key, x: {"w": jax.random.normal(key, (x.shape[1], 2))},
        lambda params, x: jnp.sin(x) @ params["w"],
    )
    branch = networks.from_functions(*functions)
    x = jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)
    params, state = jax.jit(branch.init)(jax.random.key(3), x)
    y, new = branch.apply(params, state, x, key=jax.random.key(0), train=True)
    np.testing.assert_allclose(y, np.sin(x) @ np.asarray(params["w"]), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(params["w"], jax.random.normal(jax.random.key(3), (3, 2)))
    assert new == state == ()
    assert branch.stem is None
    assert networks.from_functions(*functions, stem=networks.mlp().stem).stem is not None


# ------------------------------------------------------------------------------------------------------- conv and gru


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (2, 1, 6, 1), (2, 2, 2, 1)])
def test_conv_takes_any_image_and_stops_pooling_at_one(shape: tuple[int, ...]) -> None:
    branch = networks.conv((2, 3, 4), out=5)
    params, state = jax.eval_shape(branch.init, jax.random.key(0), jnp.ones(shape))
    assert jax.eval_shape(branch.apply, params, state, jnp.ones(shape))[0].shape == (2, 5)
    height, width = shape[1:3]
    for _ in range(3):
        if min(height, width) >= 2:
            height, width = height // 2, width // 2
    assert params["Dense_0"]["kernel"].shape == (height * width * 4, 5)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_conv_matches_a_numpy_loop(batch_norm: bool, rng: np.random.Generator, x64: None) -> None:
    branch = networks.conv((2,), out=3, kernel_size=3, activation="tanh", batch_norm=batch_norm)
    x = rng.standard_normal((2, 4, 4, 2))
    params, state = jax.jit(branch.init)(jax.random.key(0), jnp.asarray(x))
    params = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), params)
    y, new = branch.apply(params, state, jnp.asarray(x), train=True)

    kernel = np.asarray(params["Conv_0"]["kernel"])
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    a = np.zeros((2, 4, 4, 2))
    for n, i, j, c in np.ndindex(a.shape):
        a[n, i, j, c] = np.sum(padded[n, i : i + 3, j : j + 3] * kernel[..., c])
    if batch_norm:
        mean, var = a.mean((0, 1, 2)), a.var((0, 1, 2))
        norm = params["BatchNorm_0"]
        a = (a - mean) / np.sqrt(var + 1e-5) * np.asarray(norm["scale"]) + np.asarray(norm["bias"])
        np.testing.assert_allclose(new["batch_stats"]["BatchNorm_0"]["mean"], 0.1 * mean, rtol=1e-10)
        np.testing.assert_allclose(new["batch_stats"]["BatchNorm_0"]["var"], 0.9 + 0.1 * var, rtol=1e-10)
    else:
        a = a + np.asarray(params["Conv_0"]["bias"])
    pooled = np.tanh(a).reshape(2, 2, 2, 2, 2, 2).max((2, 4)).reshape(2, -1)
    expected = pooled @ np.asarray(params["Dense_0"]["kernel"]) + np.asarray(params["Dense_0"]["bias"])
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)


def test_gru_matches_a_numpy_loop_over_rows(rng: np.random.Generator, x64: None) -> None:
    branch = networks.gru(4, out=3)
    x = rng.standard_normal((2, 5, 3))
    params = random_params(branch, x, rng)
    cell = jax.tree.map(np.asarray, params["GRUCell_0"])

    def gate(name: str, value: np.ndarray) -> np.ndarray:
        return value @ cell[name]["kernel"] + cell[name].get("bias", 0.0)

    def sigmoid(a: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-a))

    h = np.zeros((2, 4))
    for t in range(5):
        r = sigmoid(gate("ir", x[:, t]) + gate("hr", h))
        z = sigmoid(gate("iz", x[:, t]) + gate("hz", h))
        n = np.tanh(gate("in", x[:, t]) + r * gate("hn", h))
        h = (1 - z) * n + z * h
    expected = h @ np.asarray(params["Dense_0"]["kernel"]) + np.asarray(params["Dense_0"]["bias"])
    y = branch.apply(params, {}, jnp.asarray(x))[0]
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-10)


def test_gru_reads_a_vector_as_a_sequence_of_numbers_and_an_image_by_rows(rng: np.random.Generator) -> None:
    branch = networks.gru(4, out=3)
    x = jnp.asarray(rng.standard_normal((2, 6, 2, 2)), jnp.float32)
    apply = jax.jit(branch.apply)
    params = jax.tree.map(lambda a: a.astype(jnp.float32), random_params(branch, x, rng))
    np.testing.assert_array_equal(apply(params, {}, x)[0], apply(params, {}, x.reshape(2, 6, 4))[0])
    flat = x[:, :, 0, 0]
    params = jax.tree.map(lambda a: a.astype(jnp.float32), random_params(branch, flat, rng))
    np.testing.assert_array_equal(apply(params, {}, flat)[0], apply(params, {}, flat[:, :, None])[0])


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (networks.conv, {"channels": ()}),
        (networks.conv, {"channels": (4, 0)}),
        (networks.conv, {"channels": (4.0,)}),
        (networks.conv, {"kernel_size": 0}),
        (networks.conv, {"out": 0}),
        (networks.conv, {"dropout": 1.0}),
        (networks.conv, {"dropout": -0.1}),
        (networks.conv, {"dropout": float("nan")}),
        (networks.conv, {"activation": "reluu"}),
        (networks.gru, {"features": 0}),
        (networks.gru, {"out": 2.5}),
    ],
)
def test_conv_and_gru_refuse_bad_settings(make: Callable[..., Network], settings: dict[str, Any]) -> None:
    with pytest.raises((ValueError, UnknownNameError), match=next(iter(settings))):
        inspect.unwrap(make)(**settings)


def test_conv_refuses_inputs_that_are_no_images() -> None:
    with pytest.raises(ValueError, match=r"\[batch, height, width, channels\].*\(2, 16\)"):
        networks.conv().init(jax.random.key(0), jnp.zeros((2, 16)))


# ------------------------------------------------------------------------------------------------------------ registry


@pytest.mark.parametrize("name", list(networks.BRANCHES))
def test_every_entry_gives_the_outputs_asked_for_and_a_gradient(name: str, rng: np.random.Generator) -> None:
    branch = networks.BRANCHES.build(name, out=4)
    x = jnp.asarray(rng.standard_normal((3, 8, 8, 1)), jnp.float32)
    params, state = jax.jit(branch.init)(jax.random.key(0), x)
    assert networks.BRANCHES.describe(name)

    def total(params: Any) -> tuple[Array, Array]:
        y, _ = branch.apply(params, state, x, train=True)
        return jnp.sum(y**2), y

    gradient, y = jax.jit(jax.grad(total, has_aux=True))(params)
    assert y.shape == (3, 4)
    assert y.dtype == jnp.float32
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradient))


def test_pooling_is_that_of_flax_with_its_gradient_at_ties(rng: np.random.Generator) -> None:
    for shape in ((3, 8, 6, 2), (2, 5, 7, 9), (2, 2, 3, 1), (1, 3, 2, 17)):
        x = jnp.asarray(rng.integers(-2, 3, shape), jnp.float32)  # of five values, so that windows have ties
        weights = jnp.asarray(rng.standard_normal((shape[0], shape[1] // 2, shape[2] // 2, shape[3])), jnp.float32)
        found, found_pull = jax.vjp(jax.jit(convolution._pooled), x)
        expected, pull = jax.vjp(jax.jit(lambda x: nn.max_pool(x, (2, 2), strides=(2, 2))), x)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found_pull(weights)[0], pull(weights)[0])
    for shape in ((2, 1, 4, 3), (2, 4, 1, 3)):
        x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        np.testing.assert_array_equal(convolution._pooled(x), x)


# --- numbers that are none --------------------------------------------------------------------------------------------


class _Pooled(nn.Module):
    """What may hide a NaN: a maximum with 0, a largest entry of a window, a choice, and a clip."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.max_pool(nn.relu(nn.Conv(2, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = nn.Dense(3)(x.reshape(len(x), -1))
        return nn.Dense(3)(jnp.clip(jnp.where(x > 0, x, 0.1 * x), -5.0, 5.0))


class _Units(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.last = nnx.Linear(6, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.last(nnx.relu(self.first(x)))


FAMILIES: dict[str, tuple[Callable[[], Network], tuple[int, ...]]] = {
    "relu": (lambda: networks.mlp((4,), 3), (6,)),
    "leaky_relu": (lambda: networks.mlp((4,), 3, activation="leaky_relu"), (6,)),
    "gelu": (lambda: networks.mlp((4,), 3, activation="gelu"), (6,)),
    "gated": (lambda: networks.gated(4, 3), (6,)),
    "conv": (lambda: networks.conv(out=3, channels=(2, 3)), (8, 8, 1)),
    "vgg9": (lambda: networks.vgg9(width=8, out=3), (8, 8, 2)),  # XLA's windows drop NaN from eight channels on
    "gru": (lambda: networks.gru(out=3), (5, 3)),
    "linen": (lambda: networks.from_linen(_Pooled()), (6, 6, 1)),
    "nnx": (lambda: networks.from_nnx(_Units), (6,)),
}


@pytest.mark.optimized
@pytest.mark.parametrize("family", FAMILIES)
def test_a_nan_in_any_parameter_or_input_reaches_the_outputs(family: str, rng: np.random.Generator) -> None:
    """In compiled batches of one and of many, whichever leaf it stands in; other examples of the batch stay clean."""
    make, shape = FAMILIES[family]
    net = networks.multi_branch(make(), 3)
    x = rng.standard_normal((33, *shape)).astype(np.float32)
    params, state = jax.jit(net.init)(jax.random.key(0), jnp.asarray(x[:1]))
    run = jax.jit(lambda params, x: net.apply(params, state, x)[0])
    leaves, tree = jax.tree.flatten(params)
    for k, leaf in enumerate(leaves):
        spoilt = np.array(leaf)
        spoilt[tuple(rng.integers(0, n) for n in leaf.shape)] = np.nan
        changed = jax.tree.unflatten(tree, [*leaves[:k], jnp.asarray(spoilt), *leaves[k + 1 :]])
        for size in (1, 33):
            assert np.isnan(run(changed, x[:size])).any(axis=1).all(), (k, size)
    x[(7, *(rng.integers(0, n) for n in shape))] = np.nan
    assert np.isnan(run(params, x)).any(axis=1).tolist() == [i == 7 for i in range(33)]
