"""Training switches of Flax modules: found by their usual names, given by name, or refused; and what is no network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import Array

from dualgap_jax import networks, train
from dualgap_jax import nnx as dg_nnx
from dualgap_jax.linen import MultiBranch
from dualgap_jax.networks.switches import SWITCHES, settings


def linen_with(name: str, how: str) -> nn.Module:
    """A Linen module with dropout that is switched by an argument of its call or a field of that name."""
    if how == "argument":
        scope: dict[str, Any] = {"nn": nn, "SENSE": SWITCHES.get(name, True)}
        exec(
            f"def __call__(self, x, {name}):\n    return nn.Dropout(0.5, deterministic={name} is not SENSE)(x)\n", scope
        )
        return type("Net", (nn.Module,), {"__call__": nn.compact(scope["__call__"])})()

    def __call__(self: Any, x: Array) -> Array:
        return nn.Dropout(0.5, deterministic=getattr(self, name) is not SWITCHES.get(name, True))(x)

    members = {"__annotations__": {name: bool}, name: False, "__call__": nn.compact(__call__)}
    return type("Net", (nn.Module,), members)()


def drops(net: networks.Network, x: Array) -> tuple[bool, bool]:
    """Whether the network drops in training, and in evaluation."""
    params, state = net.init(jax.random.key(0), x)
    key = jax.random.key(1)
    return tuple(bool((net.apply(params, state, x, key=key, train=t)[0] == 0).any()) for t in (True, False))  # type: ignore[return-value]


@pytest.mark.parametrize("how", ["argument", "field"])
@pytest.mark.parametrize("name", list(SWITCHES))
def test_the_usual_names_of_the_training_switch_are_found(name: str, how: str) -> None:
    assert drops(networks.from_linen(linen_with(name, how)), jnp.ones((2, 50))) == (True, False)


@pytest.mark.parametrize("how", ["argument", "field"])
def test_a_switch_of_another_name_is_asked_for_and_taken(how: str) -> None:
    x = jnp.ones((2, 50))
    module = linen_with("noisy", how)
    assert drops(networks.from_linen(module, switch="noisy"), x) == (True, False)
    if how == "argument":
        net = networks.from_linen(module, switch=lambda train: {"noisy": not train})
        assert drops(net, x) == (False, True)
    else:
        with pytest.raises(ValueError, match=r"Dropout\(deterministic=...\) inside.*switch='...'"):
            networks.from_linen(module).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="neither an argument nor a field switch='noise'"):
        networks.from_linen(module, switch="noise")
    with pytest.raises(TypeError, match="must be the name"):
        inspect.unwrap(networks.from_linen)(module, switch=3)


class Deep(nn.Module):
    """Dropout or statistics two modules down, and nothing that could switch them."""

    kind: str

    @nn.compact
    def __call__(self, x: Array, phase: str = "eval") -> Array:
        if self.kind == "custom":
            mean = self.variable("batch_stats", "mean", lambda: x.mean(0))
            return x - mean.value[None]
        inner = {
            "dropout": lambda: nn.Dropout(0.5, deterministic=phase == "eval"),
            "norm": lambda: nn.BatchNorm(use_running_average=phase == "eval"),
            "attention": lambda: nn.MultiHeadDotProductAttention(2, dropout_rate=0.1, deterministic=phase == "eval"),
            "quiet": lambda: nn.Dropout(0.0, deterministic=False),
            "attentive": lambda: nn.MultiHeadDotProductAttention(2),
            "plain": lambda: nn.LayerNorm(),
        }[self.kind]()
        return nn.Sequential([nn.Dense(4), inner])(x)


@pytest.mark.parametrize("kind", ["dropout", "norm", "attention", "custom"])
def test_linen_modules_with_something_to_switch_and_no_switch_are_refused(kind: str) -> None:
    x = jnp.ones((2, 3, 4))
    net = networks.from_linen(Deep(kind))
    with pytest.raises(
        ValueError, match=r"none of its arguments \(.*\) is a usual name|none of its arguments is a usual"
    ):
        net.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"switch=lambda train: \{\}"):
        networks.multi_branch(Deep(kind), 2).init(jax.random.key(0), x)
    alike = networks.from_linen(Deep(kind), switch=lambda train: {})
    params, state = alike.init(jax.random.key(0), x)
    assert alike.apply(params, state, x)[0].shape == (2, 3, 4)
    if kind != "custom":
        told = networks.from_linen(Deep(kind), switch=lambda train: {"phase": "train" if train else "eval"})
        y, evaluated = (told.apply(params, state, x, key=jax.random.key(2), train=t)[0] for t in (True, False))
        assert float(jnp.abs(y - evaluated).max()) > 0


@pytest.mark.parametrize("kind", ["quiet", "attentive", "plain"])
def test_linen_modules_with_nothing_to_switch_are_taken(kind: str) -> None:
    net, x = networks.from_linen(Deep(kind)), jnp.ones((2, 3, 4))
    params, state = net.init(jax.random.key(0), x)
    assert net.apply(params, state, x, train=True)[0].shape == (2, 3, 4)


class Both(nn.Module):
    """Batch norm that a field switches, and dropout that the call does."""

    use_running_average: bool | None = True

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        average = deterministic if self.use_running_average is None else self.use_running_average
        x = nn.BatchNorm(use_running_average=average, momentum=0.7)(nn.Dense(50)(x))
        return nn.Dropout(0.5, deterministic=deterministic)(x)


@pytest.mark.parametrize("given", [True, False, None])
def test_a_field_beside_an_argument_is_switched_with_it(given: bool | None, rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(2.0, 3.0, (6, 3)), jnp.float32)
    net = networks.from_linen(Both(given))
    params, state = net.init(jax.random.key(0), x)
    assert drops(net, x) == (True, False)
    hidden = x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None]
    _, new = net.apply(params, state, x, key=jax.random.key(1), train=True)
    np.testing.assert_allclose(new["batch_stats"]["BatchNorm_0"]["mean"], 0.3 * hidden.mean(0), rtol=1e-4, atol=1e-5)
    expected = hidden / jnp.sqrt(1 + 1e-5)  # of statistics that no batch has moved
    np.testing.assert_allclose(net.apply(params, state, x)[0], expected, rtol=1e-4, atol=1e-5)
    alone = networks.from_linen(Both(True), switch="deterministic")
    assert drops(alone, x) == (True, False)
    kept = alone.apply(params, state, x, key=jax.random.key(1), train=True)[1]
    jax.tree.map(np.testing.assert_array_equal, kept, state)


@pytest.mark.parametrize("given", [True, False, None])
@pytest.mark.parametrize("switch", [None, "use_running_average"])
def test_a_layer_that_wants_its_switch_once_gets_it_once(given: Any, switch: Any, rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(2.0, 3.0, (6, 3)), jnp.float32)
    net = networks.from_linen(nn.BatchNorm(use_running_average=given, momentum=0.7), switch=switch)
    params, state = net.init(jax.random.key(0), x)
    y, new = net.apply(params, state, x, train=True)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.3 * x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(y.mean(0), np.zeros(3), atol=1e-5)
    np.testing.assert_allclose(net.apply(params, state, x)[0], x / jnp.sqrt(1 + 1e-5), rtol=1e-5)


class Around(nn.Module):
    """A layer that has been told its mode by whoever made it, beside dropout that the call switches."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        return nn.Dropout(0.5, deterministic=not train)(self.layer(nn.Dense(50)(x)))


@pytest.mark.parametrize(
    ("layer", "train", "told"),
    [
        (nn.BatchNorm(use_running_average=True), True, r"BatchNorm\(use_running_average=True\) inside.*to evaluate"),
        (nn.BatchNorm(use_running_average=False), False, r"BatchNorm\(use_running_average=False\) inside.*to train"),
        (nn.Sequential([nn.Dropout(0.1, deterministic=True)]), True, r"Dropout\(deterministic=True\) inside"),
        (nn.Dropout(0.1, deterministic=False), False, r"Dropout\(deterministic=False\) inside"),
    ],
)
def test_layers_that_no_switch_reaches_are_refused(
    layer: nn.Module, train: bool, told: str, rng: np.random.Generator
) -> None:
    x = jnp.asarray(rng.standard_normal((6, 3)), jnp.float32)
    net = networks.multi_branch(Around(layer), 2)
    params, state = net.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=told + r".*switches of Around do not reach it.*switch='train'"):
        net.apply(params, state, x, key=jax.random.key(1), train=train)
    if train:  # a frozen layer, where that is said
        frozen = networks.multi_branch(networks.from_linen(Around(layer), switch="train"), 2)
        y, new = frozen.apply(params, state, x, key=jax.random.key(1), train=True)
        assert float(jnp.abs(y - frozen.apply(params, state, x)[0]).max()) > 0
        jax.tree.map(np.testing.assert_array_equal, new, state)


def test_truth_values_of_every_kind_switch() -> None:
    for given in (np.True_, 1):
        assert settings(("train", "deterministic"))(given) == {"train": True, "deterministic": False}


def test_layers_that_are_switched_inside_a_layer_of_branches_are_taken(rng: np.random.Generator) -> None:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Array, train: bool) -> Array:
            return MultiBranch(Both(parent=None), 2)(nn.Dropout(0.0, deterministic=True)(x), train)

    x = jnp.asarray(rng.normal(2.0, 3.0, (6, 3)), jnp.float32)
    net = networks.from_linen(Model())
    params, state = net.init(jax.random.key(0), x)
    _, new = net.apply(params, state, x, key=jax.random.key(1), train=True)
    assert min(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (state, new)), strict=True)) > 0
    assert net.apply(params, state, x)[0].shape == (6, 50)


def test_foreign_parameters_do_not_pass_by_the_check() -> None:
    net, x = networks.from_linen(Deep("dropout")), jnp.ones((2, 4))
    params = {"Dense_0": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}}
    with pytest.raises(ValueError, match="Dropout"):
        net.apply(params, {}, x)


class NnxOwn(nnx.Module):
    """A module of a user's own making that draws or keeps statistics by itself."""

    def __init__(self, kind: str, rngs: nnx.Rngs) -> None:
        if kind == "stats":
            self.mean = nnx.BatchStat(jnp.zeros(3))
        else:
            self.rngs = rngs.fork()
        if kind in ("training", "is_eval"):
            setattr(self, kind, False)
        if kind == "noisy":
            self.noisy = False
        self.kind = kind

    def __call__(self, x: Array) -> Array:
        if self.kind == "stats":
            return x - self.mean[...][None]
        on = {"training": lambda: self.training, "is_eval": lambda: not self.is_eval, "noisy": lambda: self.noisy}
        if self.kind in on and not on[self.kind]():
            return x
        return x * jax.random.bernoulli(self.rngs.noise(), 0.5, x.shape)


@pytest.mark.parametrize("kind", ["stats", "random", "noisy"])
def test_nnx_modules_with_something_to_switch_and_no_switch_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"(batch statistics|random streams) in NnxOwn.*switch=lambda train: \{\}"):
        networks.from_nnx(lambda rngs: NnxOwn(kind, rngs))
    net = networks.from_nnx(lambda rngs: NnxOwn(kind, rngs), switch=lambda train: {})
    assert net.apply(*net.init(jax.random.key(0), jnp.ones((2, 3))), jnp.ones((2, 3)))[0].shape == (2, 3)


@pytest.mark.parametrize(("kind", "switch"), [("training", None), ("is_eval", None), ("noisy", "noisy")])
def test_switches_of_nnx_modules_are_set_wherever_they_are(kind: str, switch: str | None) -> None:
    class Around(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.inside = nnx.List([NnxOwn(kind, rngs)])

        def __call__(self, x: Array) -> Array:
            return self.inside[0](x)

    assert drops(networks.from_nnx(Around, switch=switch), jnp.ones((2, 50))) == (True, False)


def test_switches_of_nnx_calls() -> None:
    class Called(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs) -> None:
            self.rngs = rngs.fork()

        def __call__(self, x: Array, *, inference: bool, noisy: bool = True) -> Array:
            return x if inference or not noisy else x * jax.random.bernoulli(self.rngs.noise(), 0.5, x.shape)

    x = jnp.ones((2, 50))
    assert drops(networks.from_nnx(Called), x) == (True, False)
    told = networks.from_nnx(Called, switch=lambda train: {"inference": False, "noisy": not train})
    assert drops(told, x) == (False, True)
    with pytest.raises(ValueError, match="neither an argument nor an attribute switch='noise'"):
        networks.from_nnx(Called, switch="noise")


# --------------------------------------------------------------------------------------------------------- wrong things


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)), r"NNX module instance Linear.*from_nnx\(lambda rngs: Linear\("),
        (lambda: Deep, r"the Linen class Deep: write from_linen\(Deep\(\.\.\.\)\)"),
        (lambda: lambda params, x: x, r"constructor of NNX modules"),
        (lambda: lambda rngs: rngs, r"gave .*Rngs"),
        (
            lambda: partial(lambda made, rngs: made, nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
            r"one and the same.*rngs: Linear",
        ),
        (lambda: "mlp", r"got 'mlp' of type str"),
        (lambda: None, r"from_functions\(init, apply\)"),
    ],
)
def test_what_is_no_branch_is_told_what_to_write(given: Callable[[], Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        networks.multi_branch(given(), 3)
    with pytest.raises(TypeError, match=words):
        networks.mixture([networks.mlp(), given()])
    with pytest.raises(TypeError, match=words):
        MultiBranch(given(), 3).init(jax.random.key(0), jnp.ones((1, 2)))
    with pytest.raises(TypeError, match=words):
        dg_nnx.MultiBranch(given(), 3, jnp.ones((1, 2)), rngs=nnx.Rngs(0))


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x: Array, mask: Any) -> Array:
        return nn.Dense(3)(x) * mask


class Paired(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: Array, both: bool = True) -> Any:
        return (self.linear(x), x) if both else self.linear(x).sum()


def test_modules_that_want_more_or_give_something_else_are_told_what_to_write() -> None:
    x = jnp.ones((2, 4))
    with pytest.raises(TypeError, match=r"Masked cannot be applied to a batch alone: missing .* 'mask'"):
        networks.from_linen(Masked())
    net = networks.from_linen(Masked(), switch=lambda train: {"mask": 2.0})
    params, state = net.init(jax.random.key(0), x)
    plain = nn.Dense(3).apply({"params": params["Dense_0"]}, x)
    np.testing.assert_allclose(net.apply(params, state, x)[0], 2 * plain, rtol=1e-6)
    for both, words in ((True, "returned a tuple"), (False, r"returned an array of shape \(\)")):
        net = networks.from_nnx(Paired, switch=lambda train, both=both: {"both": both})
        with pytest.raises(TypeError, match=words):
            net.apply(*net.init(jax.random.key(0), x), x)
    net = networks.from_functions(lambda key, x: jnp.ones(3), lambda params, x: {"y": params})
    with pytest.raises(TypeError, match="returned a dict"):
        net.apply(*net.init(jax.random.key(0), x), x)
    with pytest.raises(TypeError, match=r"Linear cannot be called with random streams alone.*lambda rngs: Linear\("):
        networks.multi_branch(nnx.Linear, 3)


@pytest.mark.parametrize(
    ("init", "apply", "words"),
    [
        (3, lambda params, x: x, r"init must be a function of \(key, x\), got 3 of type int"),
        (lambda key: 1.0, lambda params, x: x, r"init must be a function of \(key, x\): too many"),
        (lambda key, x: 1.0, lambda params, x, y: x, r"apply must be a function of \(params, x\): missing .*'y'"),
        (lambda key, x: {"act": "relu"}, lambda params, x: x, r"init gave 'relu' of type str at params\['act'\]"),
        (lambda key, x: [nn.Dense(3)], lambda params, x: x, r"of type Dense at params\[0\]: parameters are arrays"),
    ],
)
def test_functions_of_another_kind_are_told_what_to_write(init: Any, apply: Any, words: str) -> None:
    make = inspect.unwrap(networks.from_functions)
    with pytest.raises(TypeError, match=words):
        networks.multi_branch(make(init, apply), 2).init(jax.random.key(0), jnp.ones((1, 3)))


def test_numbers_of_python_and_numpy_are_parameters(rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 3)).astype(np.float32)
    one = networks.from_functions(
        lambda key, x: {"w": np.ones((3, 1)), "a": 1.5, "b": np.float64(2), "none": None},
        lambda params, x: params["a"] * x @ params["w"] + params["b"],
    )
    for net in (one, networks.multi_branch(one, 2)):
        (trained,) = train(
            net, lambda f, y: (f[:, 0] - y) ** 2, (x, x.sum(1)), optax.sgd(0.1), max_steps=1, batch_size=0,
            num_solutions=1,
        )  # fmt: skip
        assert {leaf.dtype for leaf in jax.tree.leaves(trained.params)} == {np.dtype(np.float32)}
        assert float(np.abs(trained.params["a"] - 1.5).max()) > 0


def test_adapters_refuse_what_cannot_be_called() -> None:
    class Mute(nn.Module):
        size: int = 3

    class MuteNnx(nnx.Module):
        pass

    with pytest.raises(TypeError, match="Mute has no __call__"):
        networks.from_linen(Mute())
    with pytest.raises(TypeError, match="MuteNnx has no __call__"):
        networks.from_nnx(lambda rngs: MuteNnx())
    with pytest.raises(TypeError, match="takes a constructor of NNX modules, got the Linen module instance Dense"):
        networks.from_nnx(nn.Dense(3))
    for count in (0, 2.5, True, "3"):
        with pytest.raises(ValueError, match="num_branches must be a positive integer"):
            MultiBranch(nn.Dense(3), count)
