"""Flax at home: multi-branch layers inside Linen and NNX models, and networks on their way there and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax import Array

from dualgap_jax import networks
from dualgap_jax import nnx as dg_nnx
from dualgap_jax.linen import MultiBranch


def pick(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


def close(a: Any, b: Any, rtol: float = 1e-11) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol), a, b)


class Block(nn.Module):
    """A convolution, batch norm and dropout; outputs are images again."""

    features: int = 2
    rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.Conv(self.features, (3, 3), param_dtype=x.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, param_dtype=x.dtype)(x)
        return nn.Dropout(self.rate, deterministic=not train)(jnp.tanh(x))


class Model(nn.Module):
    """A model with a multi-branch layer of images between ordinary layers."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.Conv(2, (1, 1), param_dtype=x.dtype)(x)
        x = MultiBranch(Block(2, self.rate, parent=None), 3)(x, train)
        return nn.Dense(2, param_dtype=x.dtype)(x.reshape(x.shape[0], -1))


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(2, 2, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(2, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.dropout(jnp.tanh(self.norm(self.conv(x))))


# -------------------------------------------------------------------------------------------------- a layer in Linen


def test_a_linen_layer_equals_a_loop_over_its_branches(rng: np.random.Generator, x64: None) -> None:
    """Outputs `[batch, h, w, c]`, statistics and gradients, against branches applied by Flax one at a time."""
    layer, x = MultiBranch(Block(3), np.int64(4)), jnp.asarray(rng.standard_normal((5, 4, 3, 2)))
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    variables = jax.tree.map(lambda a: a + 0.1 * np.abs(rng.standard_normal(a.shape)), variables)
    params, stats = variables["params"]["branches"], variables["batch_stats"]["branches"]["batch_stats"]
    assert shapes(params)["Conv_0"] == {"kernel": (4, 3, 3, 2, 3), "bias": (4, 3)}

    def looped(params: Any, x: Array) -> tuple[Array, Any]:
        total, new = 0.0, []
        for i in range(4):
            given = {"params": pick(params, i), "batch_stats": pick(stats, i)}
            y, updated = Block(3).apply(given, x, train=True, mutable=["batch_stats"])
            total = total + y / 4
            new.append(updated["batch_stats"])
        return jnp.sum(jnp.sin(total)), (total, jax.tree.map(lambda *leaves: jnp.stack(leaves), *new))

    def layered(params: Any, x: Array) -> tuple[Array, Any]:
        given = {"params": {"branches": params}, "batch_stats": variables["batch_stats"]}
        y, updated = layer.apply(given, x, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), (y, updated["batch_stats"]["branches"]["batch_stats"])

    (gradient, (y, new)), (expected_gradient, (expected, expected_new)) = (
        jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(params, x) for f in (layered, looped)
    )
    assert y.shape == (5, 4, 3, 3)
    close((y, new, gradient), (expected, expected_new, expected_gradient))
    evaluated = sum(Block(3).apply({"params": pick(params, i), "batch_stats": pick(stats, i)}, x) for i in range(4))
    np.testing.assert_allclose(layer.apply(variables, x), evaluated / 4, rtol=1e-12, atol=1e-12)
    summed = MultiBranch(Block(3), 4, reduce="sum").apply(variables, x)
    np.testing.assert_allclose(summed, evaluated, rtol=1e-12, atol=1e-12)


class KeyOf(nn.Module):
    """The key that Flax draws the parameter `branches` with."""

    @nn.compact
    def __call__(self) -> Array:
        return self.param("branches", jax.random.key_data)


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_branch_i_is_drawn_with_fold_in_of_i(make_key: Callable[[int], Array]) -> None:
    x = jnp.ones((1, 4, 4, 2))
    drawn = jax.jit(MultiBranch(Block(), 3).init)(make_key(7), x)["params"]["branches"]
    data = jnp.asarray(KeyOf().init(jax.random.key(7))["params"]["branches"])
    for i in range(3):
        key = jax.random.fold_in(jax.random.wrap_key_data(data), i)
        close(pick(drawn, i), jax.jit(networks.from_linen(Block()).init)(key, x)[0], 1e-6)


class Identity(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        return nn.Dropout(0.5, deterministic=not train)(x)


def test_branches_of_a_layer_drop_independently_and_by_the_stream() -> None:
    layer, x = MultiBranch(Identity(), 16, reduce="sum"), jnp.ones((4, 250))
    outputs = [layer.apply({}, x, train=True, rngs={"dropout": jax.random.key(k)}) for k in (0, 0, 1)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert float(jnp.abs(outputs[0] - outputs[2]).max()) > 0
    kept = np.asarray(outputs[0]).ravel() / 2
    assert np.array_equal(kept, np.round(kept))
    # Binomial(16, 1/2) at 1,000 places: mean 8 and variance 4 within six standard errors; equal masks have variance 64.
    assert abs(kept.mean() - 8) < 6 * 2 / 1000**0.5
    assert abs(kept.var() - 4) < 6 * 4 * (2 / 1000) ** 0.5
    np.testing.assert_array_equal(layer.apply({}, x), 16 * x)


def test_a_branch_that_drops_needs_the_stream_and_one_with_statistics_needs_them_mutable() -> None:
    x = jnp.ones((2, 4, 4, 2))
    with pytest.raises(Exception, match="dropout"):
        MultiBranch(Identity(), 2).apply({}, x, train=True)
    layer = MultiBranch(Block(), 2)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    with pytest.raises(Exception, match="batch_stats"):
        layer.apply(variables, x, train=True)


def test_a_linen_model_trains_as_a_train_state(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((16, 4, 4, 1)), jnp.float32)
    labels = (x.mean((1, 2, 3)) > 0).astype(jnp.int32)
    model = Model(rate=0.1)
    variables = jax.jit(model.init)(jax.random.key(0), x)

    class State(TrainState):
        batch_stats: Any

    state = State.create(
        apply_fn=model.apply, params=variables["params"], batch_stats=variables["batch_stats"], tx=optax.adamw(1e-2)
    )

    traced = []

    @jax.jit
    def step(state: State, key: Array) -> tuple[State, Array]:
        traced.append(None)

        def risk(params: Any) -> tuple[Array, Any]:
            logits, updated = state.apply_fn(
                {"params": params, "batch_stats": state.batch_stats},
                x,
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated

        (loss, updated), gradient = jax.value_and_grad(risk, has_aux=True)(state.params)
        return state.apply_gradients(grads=gradient, batch_stats=updated["batch_stats"]), loss

    history = []
    for key in jax.random.split(jax.random.key(1), 60):
        state, loss = step(state, key)
        history.append(float(loss))
    assert len(traced) == 1
    assert np.mean(history[-5:]) < 0.5 * np.mean(history[:5])
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.batch_stats, variables["batch_stats"])
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_remat_changes_no_number(rng: np.random.Generator, x64: None) -> None:
    x = jnp.asarray(rng.standard_normal((3, 4, 4, 2)))
    plain, saved = MultiBranch(Block(rate=0.5), 3), nn.remat(MultiBranch, static_argnums=(2,))(Block(rate=0.5), 3)
    variables = jax.jit(plain.init)(jax.random.key(0), x)

    def run(layer: Any) -> Any:
        def objective(params: Any) -> tuple[Array, Any]:
            given, feed = {**variables, "params": params}, {"dropout": jax.random.key(3)}
            y, updated = layer.apply(given, x, True, rngs=feed, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), (y, updated)

        return jax.jit(jax.grad(objective, has_aux=True))(variables["params"])

    close(run(saved), run(plain))


def test_scan_over_layers_equals_one_layer_after_another(rng: np.random.Generator, x64: None) -> None:
    """`nn.scan` stacks the parameters of the layers before the branches: `[layers, I, ...]`."""

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x: Array, train: bool) -> tuple[Array, None]:
            return x + MultiBranch(Block(), 3)(x, train), None

    stacked = nn.scan(
        Step,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=2,
    )()
    x = jnp.asarray(rng.standard_normal((3, 4, 4, 2)))
    variables = stacked.init(jax.random.key(0), x, False)
    kernel = variables["params"]["MultiBranch_0"]["branches"]["Conv_0"]["kernel"]
    assert kernel.shape == (2, 3, 3, 3, 2, 2)
    assert len(np.unique(np.asarray(kernel).reshape(6, -1), axis=0)) == 6
    (y, _), updated = stacked.apply(variables, x, True, mutable=["batch_stats"])
    expected, new = x, []
    for layer in range(2):
        (expected, _), changed = Step().apply(pick(variables, layer), expected, True, mutable=["batch_stats"])
        new.append(changed)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    close(updated, jax.tree.map(lambda *leaves: jnp.stack(leaves), *new))


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_layer_gives_the_number_format_of_its_branches(reduce: str, rng: np.random.Generator) -> None:
    """So that a residual layer of bfloat16 scans as one branch in its place does."""
    bf16: Any = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> tuple[Array, None]:
            return x + MultiBranch(nn.Dense(4, parent=None, **bf16), 300, reduce)(x), None

    x = jnp.asarray(rng.standard_normal((3, 4)), jnp.bfloat16)
    stacked = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
    (y, _), variables = stacked.init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    branches = pick(variables["params"]["MultiBranch_0"]["branches"], 0)
    layer = MultiBranch(nn.Dense(4, **bf16), 300, reduce)
    each = jax.vmap(lambda params: nn.Dense(4, **bf16).apply({"params": params}, x))(branches)
    whole = each.astype(jnp.float32).mean(0) * (1 if reduce == "mean" else 300)
    got = layer.apply({"params": {"branches": branches}}, x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), whole, rtol=2**-7, atol=1e-6)  # summed in float32
    made = dg_nnx.MultiBranch(lambda rngs: nnx.Linear(4, 4, rngs=rngs, **bf16), 3, reduce=reduce, rngs=nnx.Rngs(0))
    assert made(x).dtype == jnp.bfloat16
    narrow = MultiBranch(nn.Dense(4, dtype=jnp.bfloat16), 3)  # parameters and inputs in float32
    assert narrow.init_with_output(jax.random.key(0), jnp.ones((2, 4)))[0].dtype == jnp.bfloat16
    assert MultiBranch(nn.Dense(4), 3).init_with_output(jax.random.key(0), jnp.ones((2, 4)))[0].dtype == jnp.float32
    network = networks.multi_branch(nn.Dense(4, **bf16), 3)  # whose output a loss may be taken of
    assert network.apply(*network.init(jax.random.key(0), x), x)[0].dtype == jnp.float32


def test_layers_of_layers_and_of_other_kinds(rng: np.random.Generator, x64: None) -> None:
    """Nested layers, an NNX constructor and a pure pair as branches of Linen layers, against plain loops."""
    x = jnp.asarray(rng.standard_normal((5, 3)))
    nested = MultiBranch(MultiBranch(nn.Dense(2, param_dtype=jnp.float64), 2, reduce="sum"), 3)
    variables = jax.jit(nested.init)(jax.random.key(0), x)
    inner = variables["params"]["branches"]["branches"]
    assert shapes(inner) == {"kernel": (3, 2, 3, 2), "bias": (3, 2, 2)}
    np.testing.assert_allclose(
        nested.apply(variables, x), jnp.einsum("bi,klio->bo", x, inner["kernel"]) / 3, rtol=1e-12, atol=1e-12
    )
    constructed = MultiBranch(lambda rngs: nnx.Linear(3, 2, param_dtype=jnp.float64, rngs=rngs), 3)
    variables = jax.jit(constructed.init)(jax.random.key(0), x)
    kernel = variables["params"]["branches"]["kernel"]
    np.testing.assert_allclose(constructed.apply(variables, x), x @ kernel.mean(0), rtol=1e-12, atol=1e-12)
    pure = MultiBranch(networks.mlp((), 2), 3)
    variables = jax.jit(pure.init)(jax.random.key(0), x)
    (layer,) = variables["params"]["branches"]
    expected = x @ layer["kernel"].mean(0).T + layer["bias"].mean(0)[None]
    np.testing.assert_allclose(pure.apply(variables, x), expected, rtol=1e-12, atol=1e-12)


def test_modules_made_inside_a_call_leave_no_parameters_outside_their_layer() -> None:
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return MultiBranch(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), 3)(x)

    variables = jax.jit(Outer().init)(jax.random.key(0), jnp.ones((1, 3)))
    assert list(variables["params"]) == ["MultiBranch_0"]
    branches = variables["params"]["MultiBranch_0"]["branches"]
    assert shapes(branches["layers_2"]) == {"kernel": (3, 4, 2), "bias": (3, 2)}


def test_equal_layers_are_equal_and_may_be_static_arguments() -> None:
    assert MultiBranch(nn.Dense(3), 2) == MultiBranch(nn.Dense(3), np.int32(2))
    traced = []

    def apply(module: MultiBranch, variables: Any, x: Array) -> Array:
        traced.append(module)
        return module.apply(variables, x)

    jitted, x = jax.jit(apply, static_argnums=0), jnp.ones((1, 4))
    variables = jax.jit(MultiBranch(nn.Dense(3), 2).init)(jax.random.key(0), x)
    for _ in range(2):
        jitted(MultiBranch(nn.Dense(3), 2), variables, x)
    assert len(traced) == 1


# ---------------------------------------------------------------------------------------------------- a layer in NNX


def test_an_nnx_layer_equals_a_loop_over_its_branches(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((5, 4, 3, 2)), jnp.float32)
    rngs = nnx.Rngs(params=3, dropout=4)
    layer = dg_nnx.MultiBranch(NnxBlock, 4, rngs=rngs)
    assert shapes(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))["params"]["conv"]["kernel"] == (4, 3, 3, 2, 2)
    root = nnx.Rngs(params=3, dropout=4).params()
    total, means = 0.0, []
    for i in range(4):
        one = NnxBlock(nnx.Rngs(jax.random.fold_in(root, i)))
        means.append(one.norm.mean[...])
        total = total + nnx.view(one, deterministic=True, use_running_average=True)(x) / 4
    layer.eval()
    np.testing.assert_allclose(layer(x), total, rtol=1e-5, atol=1e-6)
    before = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
    assert shapes(before)["state"]["norm"]["mean"] == (4, 2)
    layer.train()
    y = layer(x)
    after = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
    moved = np.abs(after["state"]["norm"]["mean"] - before["state"]["norm"]["mean"])
    assert moved.min() > 0
    for i in range(4):
        kernel, bias = (layer.params["conv"][name][...][i] for name in ("kernel", "bias"))
        convolved = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        expected = 0.1 * (convolved.mean((0, 1, 2)) + bias)
        np.testing.assert_allclose(after["state"]["norm"]["mean"][i], expected, rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(layer(x) - y).max()) > 1e-3  # another draw of the stream
    np.testing.assert_allclose(layer(x, train=False), layer(x, train=False), rtol=0)


def test_an_nnx_model_trains_with_the_nnx_optimizer_and_goes_into_eval_mode(rng: np.random.Generator) -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.branches = dg_nnx.MultiBranch(NnxBlock, 3, rngs=rngs)
            self.head = dg_nnx.MultiBranch(
                networks.mlp((4,), 2), 2, jax.ShapeDtypeStruct((1, 32), "float32"), rngs=rngs
            )

        def __call__(self, x: Array) -> Array:
            return self.head(self.branches(x).reshape(x.shape[0], -1))

    x = jnp.asarray(rng.standard_normal((16, 4, 4, 2)), jnp.float32)
    labels = (x.mean((1, 2, 3)) > 0).astype(jnp.int32)
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model: Net, optimizer: nnx.Optimizer[Net]) -> Array:
        def risk(model: Net) -> Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

        loss, gradient = nnx.value_and_grad(risk)(model)
        optimizer.update(model, gradient)
        return loss

    history = [float(step(model, optimizer)) for _ in range(80)]
    assert np.mean(history[-5:]) < 0.6 * np.mean(history[:5])
    model.eval()
    np.testing.assert_array_equal(model(x), model(x))
    # The whole model is again a branch: in the pure world, and back.
    net = networks.from_nnx(Net)
    params, state = jax.jit(net.init)(jax.random.key(0), x)
    y = net.apply(params, state, x, key=jax.random.key(1), train=True)[0]
    assert y.shape == (16, 2)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside others"])
def test_a_view_of_an_nnx_layer_has_the_mode_it_was_asked_for(beside: bool, rng: np.random.Generator) -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.block = NnxBlock(rngs)
            self.branches = dg_nnx.MultiBranch(NnxBlock, 3, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.branches(self.block(x))

    model = Net(nnx.Rngs(0)) if beside else dg_nnx.MultiBranch(NnxBlock, 3, rngs=nnx.Rngs(0))
    layer = model.branches if isinstance(model, Net) else model
    x = jnp.asarray(rng.standard_normal((5, 4, 3, 2)), jnp.float32)
    looks = nnx.view(model, deterministic=True, use_running_average=True)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    y = looks(x)
    np.testing.assert_array_equal(looks(x), y)  # nothing is dropped
    close(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), before, 0)
    assert not layer.deterministic  # the model itself trains still
    assert not layer.use_running_average
    model.eval()
    np.testing.assert_array_equal(model(x), y)
    trains = nnx.view(model, deterministic=False, use_running_average=False)
    assert float(jnp.abs(trains(x) - trains(x)).max()) > 1e-3
    moved = nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))["state"]["norm"]["mean"]
    old = (before["branches"] if beside else before)["state"]["norm"]["mean"]
    assert float(jnp.abs(moved - old).min()) > 0
    with pytest.raises(ValueError, match="set both alike"):
        nnx.view(layer, deterministic=False)(x)


def test_nnx_layers_of_linen_modules_remat_and_scan(rng: np.random.Generator, x64: None) -> None:
    x = jnp.asarray(rng.standard_normal((3, 4, 4, 2)))
    layer = dg_nnx.MultiBranch(Block(), 3, x, rngs=nnx.Rngs(0))
    params = jax.tree.map(lambda v: v[...], layer.params, is_leaf=lambda v: isinstance(v, nnx.Variable))
    stats = jax.tree.map(lambda v: v[...], layer.state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    outputs = [Block().apply({"params": pick(params, i), **pick(stats, i)}, x) for i in range(3)]
    np.testing.assert_allclose(layer(x, train=False), sum(outputs) / 3, rtol=1e-12, atol=1e-12)

    def total(model: Any, x: Array) -> Array:
        return jnp.sum(jnp.sin(model(x, train=False)))

    plain, saved = nnx.grad(total)(layer, x), nnx.grad(nnx.remat(total))(layer, x)
    close(nnx.to_pure_dict(plain), nnx.to_pure_dict(saved))

    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs: nnx.Rngs) -> dg_nnx.MultiBranch:
        return dg_nnx.MultiBranch(Block(), 3, x, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer: dg_nnx.MultiBranch, x: Array) -> Array:
        return x + layer(x, train=False)

    layers = make(nnx.Rngs(0))
    graph, state = nnx.split(layers)
    expected = x
    for index in range(2):
        one = nnx.merge(graph, jax.tree.map(lambda leaf: leaf[index], state))  # noqa: B023
        expected = expected + one(expected, train=False)
    np.testing.assert_allclose(forward(layers, x), expected, rtol=1e-12, atol=1e-12)


def test_an_nnx_layer_has_one_mode_and_says_what_it_lacks() -> None:
    layer = dg_nnx.MultiBranch(NnxBlock, 2, rngs=nnx.Rngs(0))
    layer.deterministic = True
    with pytest.raises(ValueError, match="either trained or evaluated"):
        layer(jnp.ones((1, 4, 4, 2)))
    for branch in (networks.mlp(), nn.Dense(3)):
        with pytest.raises(TypeError, match="give x, such as"):
            dg_nnx.MultiBranch(branch, 2, rngs=nnx.Rngs(0))
    without = dg_nnx.MultiBranch(NnxBlock, 2, rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match="draws random numbers in training"):
        without(jnp.ones((1, 4, 4, 2)))
    without.eval()
    assert without(jnp.ones((1, 4, 4, 2))).shape == (1, 4, 4, 2)


# ------------------------------------------------------------------------------------------ networks and their way back


@pytest.mark.parametrize("name", ["mlp", "conv", "mixture"])
def test_a_network_comes_back_from_flax_with_the_same_outputs(name: str, rng: np.random.Generator, x64: None) -> None:
    make: dict[str, Callable[[], Any]] = {
        "mlp": lambda: networks.multi_branch(networks.mlp((4,), 3), 5),
        "conv": lambda: networks.multi_branch(networks.conv((2,), 3, batch_norm=True), 2),
        "mixture": lambda: networks.mixture([networks.mlp((4,), 3), networks.multi_branch(networks.mlp((), 3), 2)]),
    }
    net, x = make[name](), jnp.asarray(rng.standard_normal((6, 4, 4, 1)))
    module = networks.to_linen(net)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    params = variables["params"]["network"]
    state = variables.get("batch_stats", {}).get("network", jax.jit(net.init)(jax.random.key(0), x)[1])
    y, new = net.apply(params, state, x, train=True)
    outputs, updated = module.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(outputs, y, rtol=1e-12, atol=1e-12)
    if jax.tree.leaves(state):
        close(updated["batch_stats"]["network"], new)
    back = networks.from_linen(module)
    np.testing.assert_allclose(back.apply({"network": params}, {"batch_stats": {"network": state}}, x)[0],
                               net.apply(params, state, x)[0], rtol=1e-12, atol=1e-12)  # fmt: skip
    there = networks.to_nnx(net, x, rngs=nnx.Rngs(params=5))
    drawn = jax.jit(net.init)(nnx.Rngs(params=5).params(), x)
    np.testing.assert_allclose(there(x), net.apply(*drawn, x, train=True)[0], rtol=1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="to_linen takes a network"):
        inspect.unwrap(networks.to_linen)("mlp")
    with pytest.raises(TypeError, match="to_nnx takes a network"):
        inspect.unwrap(networks.to_nnx)("mlp", x, rngs=nnx.Rngs(0))


def test_orbax_saves_and_restores_layers(tmp_path: Path, rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((2, 4, 4, 1)), jnp.float32)
    variables = jax.jit(Model().init)(jax.random.key(0), x)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "linen", variables)
        checkpointer.wait_until_finished()
        raw = checkpointer.restore(tmp_path / "linen")
    close(raw, variables, 0)
    np.testing.assert_array_equal(Model().apply(raw, x), Model().apply(variables, x))
    layer = dg_nnx.MultiBranch(networks.mlp((3,), 2), 4, x, rngs=nnx.Rngs(0))
    other = dg_nnx.MultiBranch(networks.mlp((3,), 2), 4, x, rngs=nnx.Rngs(1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "nnx", nnx.state(layer, nnx.Param))
        checkpointer.wait_until_finished()
        nnx.update(other, checkpointer.restore(tmp_path / "nnx", nnx.state(other, nnx.Param)))
    np.testing.assert_array_equal(layer(x), other(x))
