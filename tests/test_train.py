"""`train` with optimisers, losses and data as JAX users have them."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dualgap_jax import landscape, losses
from dualgap_jax.config import ConfigError
from dualgap_jax.data import Dataset
from dualgap_jax.evaluation import evaluate
from dualgap_jax.networks import BRANCHES, InMemory, from_functions, gated, mlp, multi_branch
from dualgap_jax.optimizers import for_network
from dualgap_jax.training import TrainingSpec, plan, solution_key, spec, train
from dualgap_jax.training.engine import Carry, begin
from dualgap_jax.training.together import step
from dualgap_jax.types import Network

OPTIMIZERS = {
    "adamw under a schedule": lambda: optax.adamw(optax.cosine_decay_schedule(0.05, 12), weight_decay=0.3),
    "clipped by the norm": lambda: optax.chain(optax.clip_by_global_norm(1e-2), optax.sgd(0.5, 0.9)),
    "muon": lambda: optax.contrib.muon(0.02),
    "adafactor": lambda: optax.adafactor(0.02, min_dim_size_to_factor=2),
    "a rate that follows the loss": lambda: optax.chain(
        optax.sgd(0.3), optax.contrib.reduce_on_plateau(patience=1, factor=0.5, accumulation_size=2)
    ),
}


def arrays(rng: np.random.Generator, n: int = 20, d: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Features, and three classes of a random linear rule."""
    x = rng.normal(size=(n, d)).astype(np.float32)
    return x, (x @ rng.normal(size=(d, 3))).argmax(1).astype(np.int32)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.usefixtures("x64")
def test_each_branch_follows_optax_as_written_by_hand(name: str, rng: np.random.Generator) -> None:
    (x, y), count = arrays(rng), 3
    data = Dataset(
        "drawn", x.astype(np.float64), y, np.zeros(4, np.float32), np.ones(4, np.float32), 3, "multiclass", {}
    )
    loss, optimizer = losses.logistic(), OPTIMIZERS[name]()
    net = multi_branch(mlp((5,), 3), count)
    (got,) = train(net, loss, data, optimizer, batch_size=0, max_steps=12, tolerance=0.0, num_solutions=1)
    found = [got]
    if name not in ("adamw under a schedule", "clipped by the norm"):  # their kind is streamed in test_streaming
        found += train(
            net, loss, data, optimizer, batch_size=0, max_steps=12, tolerance=0.0, num_solutions=1,
            streaming="on", branch_chunk=2,
        )  # fmt: skip

    params, state = jax.jit(net.init)(jax.random.split(solution_key(0, 0), 3)[0], jnp.asarray(data.x[:1]))

    @jax.jit
    def value_and_grad(params: Any) -> Any:
        return jax.value_and_grad(
            lambda p: jnp.mean(loss.per_example(net.apply(p, state, jnp.asarray(data.x))[0], jnp.asarray(y)))
        )(params)

    def one(tree: Any, i: int) -> Any:
        return jax.tree.map(lambda a: a[i], tree)

    states = [optimizer.init(one(params, i)) for i in range(count)]
    update = jax.jit(optax.with_extra_args_support(optimizer).update)
    for _ in range(12):
        value, gradient = value_and_grad(params)
        moved = []
        for i in range(count):
            updates, states[i] = update(one(gradient, i), states[i], one(params, i), value=value)
            moved.append(optax.apply_updates(one(params, i), updates))
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *moved)
    for solution in found:
        assert (solution.steps, solution.status) == (12, "max_steps")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), solution.params, params)


def test_the_optimiser_is_given_the_loss(rng: np.random.Generator) -> None:
    def update(gradient: Any, state: Any, params: Any = None, *, value: Any) -> Any:
        return jax.tree.map(lambda g: -value * g, gradient), state

    x, y = arrays(rng)
    net, loss = multi_branch(mlp((2,), 3), 2), losses.logistic()
    by_loss = for_network(net, optax.GradientTransformationExtraArgs(lambda params: (), update))
    plain = for_network(net, optax.sgd(1.0))
    params, state = jax.jit(net.init)(jax.random.key(0), jnp.asarray(x[:1]))
    arguments = (jnp.asarray(x), jnp.asarray(y), jnp.asarray(1.0), jax.random.key(0))
    scaled, value = step(net, loss, by_loss, begin(by_loss, params, state), *arguments)
    once, _ = step(net, loss, plain, begin(plain, params, state), *arguments)
    jax.tree.map(
        lambda w, a, b: np.testing.assert_allclose(a - w, value * (b - w), rtol=1e-4, atol=1e-6),
        params,
        scaled.params,
        once.params,
    )


def test_a_function_is_a_loss_and_a_pair_of_arrays_is_data(rng: np.random.Generator) -> None:
    x, y = arrays(rng)
    net, settings = multi_branch(mlp((3,), 3), 2), {"batch_size": 5, "max_steps": 6, "num_solutions": 1}
    (got,) = train(net, optax.softmax_cross_entropy_with_integer_labels, (x, y), optax.adam(1e-2), **settings)
    (expected,) = train(net, losses.logistic(), (x, y), optax.adam(1e-2), **settings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got.params, expected.params)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (0.1, r"Write optax\.sgd\(rate\)"),
        (optax.cosine_decay_schedule(0.1, 10), r"goes into an optimizer"),
        (TrainingSpec(), r"is no optax\.GradientTransformation"),
        (optax.lbfgs(), "a training step does not have"),
    ],
)
def test_what_is_no_optimiser_is_refused_in_words(given: Any, words: str, rng: np.random.Generator) -> None:
    with pytest.raises(ConfigError, match=words):
        train(multi_branch(mlp((3,), 3), 2), losses.logistic(), arrays(rng), given, batch_size=5, max_steps=1)


@pytest.mark.parametrize("odd", [jnp.arange(2), jnp.asarray([True]), 3], ids=str)
@pytest.mark.parametrize("count", [0, 2])
def test_parameters_without_a_gradient_are_refused_in_words(odd: Any, count: int, rng: np.random.Generator) -> None:
    net = from_functions(lambda key, x: {"w": jnp.ones((4, 3)), "odd": odd}, lambda params, x: x @ params["w"])
    net = multi_branch(net, count) if count else net
    told = pytest.raises(ConfigError, match=r"parameter \['odd'\] is of type .*no gradient.*network's state")
    settings: Any = {"batch_size": 5, "num_solutions": 1}
    with told:
        train(net, losses.logistic(), arrays(rng), optax.sgd(0.1), max_steps=1, **settings)
    if count:
        with told:
            train(net, losses.logistic(), arrays(rng), optax.sgd(0.1), max_steps=1, streaming="on", **settings)
        end = InMemory(*net.init(jax.random.key(0), jnp.ones((1, 4))))
        with told:
            landscape.curve(net, losses.logistic(), arrays(rng), end, end, steps=1, batch_size=5)


@pytest.mark.parametrize("streaming", ["on", "off"])
@pytest.mark.usefixtures("x64")
def test_complex_parameters_go_down(streaming: Any, rng: np.random.Generator) -> None:
    """Against the gradient in real and imaginary parts, by hand; JAX gives the conjugate of the direction."""
    x, start = rng.normal(size=(6, 4)), rng.normal(size=(4, 2)) + 1j * rng.normal(size=(4, 2))
    y = rng.normal(size=6)
    data = Dataset("drawn", x, y, np.zeros(4, np.float32), np.ones(4, np.float32), 1, "regression", {})
    net = multi_branch(
        from_functions(
            lambda key, x: {"w": jnp.asarray(start)}, lambda p, x: (jnp.abs(x @ p["w"]) ** 2).sum(1)[:, None]
        ),
        2,
    )
    (got,) = train(
        net, losses.squared(), data, optax.sgd(0.01, momentum=0.9), batch_size=0, max_steps=3, tolerance=0.0,
        num_solutions=1, streaming=streaming,
    )  # fmt: skip

    def risk(real: np.ndarray, imaginary: np.ndarray) -> np.ndarray:
        f = ((x @ real) ** 2 + (x @ imaginary) ** 2).sum(1)  # both branches are alike
        return losses.squared().per_example(jnp.asarray(f)[:, None], jnp.asarray(y)).mean()

    parts, velocity = [start.real, start.imag], [np.zeros((4, 2))] * 2
    for _ in range(3):
        slopes = [np.asarray(g) / 2 for g in jax.grad(risk, (0, 1))(*map(jnp.asarray, parts))]  # a half each
        velocity = [0.9 * v + g for v, g in zip(velocity, slopes, strict=True)]
        parts = [w - 0.01 * v for w, v in zip(parts, velocity, strict=True)]
    for i in range(2):
        np.testing.assert_allclose(got.params["w"][i], parts[0] + 1j * parts[1], rtol=1e-10)


def test_complex_outputs_are_refused_where_a_loss_is_taken(rng: np.random.Generator) -> None:
    net = multi_branch(
        from_functions(lambda key, x: jax.random.normal(key, (4, 3)), lambda params, x: x @ params + 0j), 2
    )
    data, loss, told = (
        arrays(rng),
        losses.logistic(),
        pytest.raises(ConfigError, match=r"complex64.*takes real numbers"),
    )
    ends = [InMemory(*net.init(jax.random.key(i), jnp.ones((1, 4)))) for i in range(3)]
    with told:
        train(net, loss, data, optax.sgd(0.1), batch_size=5, max_steps=1)
    with told:
        evaluate(net, loss, data, ends[0])
    with told:
        landscape.evaluate_points(net, loss, data, landscape.plane_through(ends), np.zeros((1, 2)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"check_every": 0}, "check_every=0 must be at least 1"),
        ({"max_steps": -1}, "max_steps=-1 must be at least 0"),
        ({"num_solutions": True}, "num_solutions=True must be a whole number"),
        ({"tolerance": float("nan")}, "tolerance=nan must be at least 0 and finite"),
        ({"batch_size": 21}, "batch_size=21 exceeds the 20 examples"),
        ({"streaming": "on", "group_size": 2}, "group_size=2: streamed solutions are trained one after another"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Any, words: str, rng: np.random.Generator) -> None:
    with pytest.raises(ConfigError, match=words):
        train(multi_branch(mlp((3,), 3), 2), losses.logistic(), arrays(rng), optax.sgd(0.1), **settings)


def test_counts_are_whole_numbers() -> None:
    spec.check(max_steps=np.int64(3), batch_size=0, tolerance=0.5)
    for name, value in (("max_steps", 1e1), ("batch_size", np.float32(2)), ("check_every", True), ("batch_size", "8")):
        with pytest.raises(ConfigError, match=f"{name}=.* must be a whole number"):
            spec.check(**{name: value})
    with pytest.raises(ConfigError, match="max_steps=None must be a whole number"):
        spec.check(max_steps=None)
    with pytest.raises(ConfigError, match="tolerance='x' must be a number"):
        spec.check(tolerance="x")
    with pytest.raises(ConfigError, match=r"max_steps=100000000000000000000 must be below 2\*\*31"):
        spec.check(max_steps=10**20)


def test_large_networks_are_streamed_whatever_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "memory_available", lambda: 2**50)
    enough = 2**26
    below, at = plan.Need(enough - 1, 10), plan.Need(enough, 10)
    assert plan.choose(below, 3, None, True, [], enough) == plan.Choice(3, False)
    assert plan.choose(at, 3, None, True, [], enough) == plan.Choice(1, True)
    assert plan.choose(at, 3, None, False, [], enough) == plan.Choice(3, False)
    assert plan.choose(at, 3, 2, True, [], enough) == plan.Choice(2, False)
    assert plan.choose(at, 3, None, True, [plan.Choice(3, False)], enough) == plan.Choice(3, False)  # as it was begun
    monkeypatch.setattr(plan, "memory_available", lambda: 8 * enough + 13)
    assert plan.choose(below, 3, None, True, [], enough) == plan.Choice(1, False)
    monkeypatch.setattr(plan, "memory_available", lambda: 7 * enough)
    assert plan.choose(below, 3, None, True, [], enough) == plan.Choice(1, True)
    assert plan.choose(plan.Need(10, 4 * enough), 3, None, True, [], enough) == plan.Choice(1, True)  # by what is kept


def carry_of(net: Network, optimizer: Any, x: Any) -> Carry:
    transformation = for_network(net, optimizer)
    return jax.eval_shape(
        lambda key: begin(transformation, *net.init(key, jnp.zeros(x.shape, x.dtype))), jax.random.key(0)
    )


@pytest.mark.parametrize(
    ("branch", "optimizer", "platform", "expected"),
    [
        (mlp((8,), 3), optax.sgd(1.0), "cpu", 2**26),
        (mlp((8,), 3), optax.sgd(1.0, momentum=0.9), "cpu", 2**28),
        (mlp((8,), 3), optax.adam(1.0), "cpu", 2**28),
        (mlp((8,), 3), optax.sgd(1.0), "tpu", 2**28),
        (mlp((8,), 3), optax.sgd(1.0), "gpu", sys.maxsize),
        (gated(8, 3), optax.sgd(1.0), "cpu", 2**26),
        (mlp((8,), 3)._replace(stem=None), optax.sgd(1.0), "cpu", 2**28),
    ],
)
def test_streaming_begins_early_where_it_is_the_faster_way(
    branch: Network, optimizer: Any, platform: str, expected: int
) -> None:
    net = multi_branch(branch, 3)
    found = plan.stream_from(net, carry_of(net, optimizer, jax.ShapeDtypeStruct((1, 20), np.float32)), platform)
    assert found == expected


@pytest.mark.parametrize("name", ["mlp", "conv", "gru", "vgg9"])
def test_what_a_plain_step_needs_is_no_less_than_the_compiler_says(name: str) -> None:
    image, settings = {
        "mlp": ((40,), {"hidden": (8, 8)}),
        "conv": ((16, 16, 3), {}),
        "gru": ((24, 5), {}),
        "vgg9": ((32, 32, 3), {"width": 2}),
    }[name]
    net, loss = multi_branch(BRANCHES[name](out=3, **settings), 6), losses.multi_margin()
    x, y = jax.ShapeDtypeStruct((32, *image), np.float32), jax.ShapeDtypeStruct((32,), np.int32)
    transformation, carry = for_network(net, optax.adam(1.0)), carry_of(net, optax.adam(1.0), x)

    def one(carry: Carry, x: Any, y: Any) -> Any:
        return step(net, loss, transformation, carry, x, y, jnp.ones(()), jax.random.key(0))

    analysis = jax.jit(one, donate_argnums=0).lower(carry, x, y).compile().memory_analysis()
    said = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
    assert said <= plan.need(net, carry, x).plain <= 12 * said
