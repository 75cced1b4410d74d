"""bfloat16 parameters and compute against NumPy in float64 that rounds where they round; sums in float32; training."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax import Array

from dualgap_jax import losses, networks, training
from dualgap_jax.config import Component, ConfigError, as_dict, to_spec
from dualgap_jax.experiments import TABLES
from dualgap_jax.experiments.landscape import (
    LandscapeSpec,
    PlaneSpec,
    PrecisionSpec,
    build,
    landscape_experiment,
    regime,
)
from dualgap_jax.files import load_json, load_npz
from dualgap_jax.networks import multi_branch, upcast, with_precision
from dualgap_jax.optimizers import for_network
from dualgap_jax.schedules import SCHEDULES
from dualgap_jax.training.engine import Carry
from dualgap_jax.training.together import step
from dualgap_jax.types import Network
from dualgap_jax.workdir import Workdir

F32, BF16 = "float32", "bfloat16"
LOWERED = ((F32, BF16), (BF16, F32), (BF16, BF16))
Rounding = Callable[[np.ndarray], np.ndarray]


def rounding(dtype: str) -> Rounding:
    """To float32, then to the dtype; in float64."""
    target = {F32: np.float32, BF16: ml_dtypes.bfloat16}[dtype]
    return lambda a: np.asarray(a, np.float64).astype(np.float32).astype(target).astype(np.float64)


def network(hidden: tuple[int, ...], params: str, compute: str, count: int, **settings: Any) -> Network:
    branch = with_precision(networks.mlp(hidden, 3), param_dtype=params, compute_dtype=compute)
    return multi_branch(branch, count, **settings)


def oracle(params: Any, x: np.ndarray, cotangent: np.ndarray, stored: Rounding, r: Rounding) -> tuple[Any, Any]:
    """Outputs of the mean of ReLU branches, and the gradient of `sum(cotangent * outputs)`, branch by branch.

    `r` rounds what is kept in the compute dtype: parameters, inputs, results of products, sums with a bias.  The sum
    over branches is not rounded, nor, above hidden layers, what enters it.
    """
    weights = [[r(np.asarray(leaf, np.float64)) for leaf in (p["kernel"], p["bias"])] for p in params]
    count = len(weights[0][0])
    x, upper = r(x).T, np.asarray(cotangent, np.float64).T / count
    total: Any = 0.0
    gradient = [{"kernel": [], "bias": []} for _ in weights]
    for i in range(count):
        inputs, before = [x], []
        for kernel, bias in weights[:-1]:
            before.append(r(r(kernel[i] @ inputs[-1]) + bias[i][:, None]))
            inputs.append(np.maximum(before[-1], 0))
        kernel, bias = weights[-1][0][i], weights[-1][1][i][:, None]
        total = total + (kernel @ inputs[-1] + bias if before else r(r(kernel @ inputs[-1]) + bias))
        back = upper if before else r(upper)
        for layer in reversed(range(len(weights))):
            gradient[layer]["kernel"].insert(i, stored(r(back @ inputs[layer].T)))
            gradient[layer]["bias"].insert(i, stored(r(back.sum(1))))
            if layer:
                back = r(weights[layer][0][i].T @ back) * (before[layer - 1] > 0)
    return total.T / count, tuple({k: np.stack(v) for k, v in layer.items()} for layer in gradient)


def agree(actual: Any, expected: Any, ulp: float) -> None:
    """Nearly all numbers are equal to float32 rounding; a sum near the middle of two numbers may fall on either."""
    a, b = (np.concatenate([np.asarray(v, np.float64).ravel() for v in jax.tree.leaves(t)]) for t in (actual, expected))
    size = np.abs(b).max()
    np.testing.assert_allclose(a, b, rtol=2 * ulp, atol=2 * ulp * size)
    assert np.mean(np.abs(a - b) <= 1e-5 * np.abs(b) + 2e-6 * size) > 0.98


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("hidden", "params_dtype", "compute"),
    [((), BF16, BF16), ((6,), F32, BF16), ((6,), BF16, F32), ((5, 4), BF16, BF16)],
)
def test_mlp_rounds_where_the_oracle_does(
    hidden: tuple[int, ...], params_dtype: str, compute: str, rng: np.random.Generator
) -> None:
    """Operation by operation: under jit XLA may keep numbers in float32 that are rounded here."""
    net = network(hidden, params_dtype, compute, 5)
    x = jnp.asarray(rng.standard_normal((9, 7)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((9, 3)), jnp.float32)
    params, state = jax.jit(net.init)(jax.random.key(int(rng.integers(2**31))), x)
    drawn = jax.jit(network(hidden, F32, F32, 5).init)(jax.random.key(0), x)[0]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {params_dtype}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, drawn)

    def objective(params: Any) -> tuple[Array, Array]:
        outputs, _ = net.apply(params, state, x, train=True)
        return jnp.sum(weights * outputs), outputs

    gradient, outputs = jax.grad(objective, has_aux=True)(params)
    r, stored = rounding(compute), rounding(params_dtype)
    expected, slopes = oracle(params, np.asarray(x), np.asarray(weights), stored, r)
    assert outputs.dtype == jnp.float32
    assert jax.tree.map(lambda g: str(g.dtype), gradient) == jax.tree.map(lambda _: params_dtype, params)
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    agree(gradient, slopes, ulp=2**-8)
    # The rounding is there to be seen: without it the same numbers do not agree.
    exact, straight = oracle(params, np.asarray(x), np.asarray(weights), lambda a: a, lambda a: a)
    if compute == BF16:
        assert np.abs(outputs - exact).max() > 1e-3 * np.abs(exact).max()
    with pytest.raises(AssertionError):
        agree(gradient, straight, ulp=2**-8)
    # Compiled, or split at the stem: the same up to the roundings that XLA leaves out.
    assert net.stem is not None
    split, _ = net.stem.rest(params, state, net.stem.preactivation(params, x))
    np.testing.assert_array_equal(split, outputs)
    fast, _ = jax.jit(net.apply)(params, state, x)
    assert fast.dtype == jnp.float32
    np.testing.assert_allclose(fast, expected, rtol=0, atol=0.02 * np.abs(expected).max())


@pytest.mark.optimized
def test_float32_is_the_plain_branch_bit_for_bit(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((6, 5, 4, 2)), jnp.float32)
    for plain in (networks.mlp((4,), 3), networks.conv((2,), 3, batch_norm=True)):
        results = []
        for net in (multi_branch(plain, 3), multi_branch(with_precision(plain), 3)):
            params, state = jax.jit(net.init)(jax.random.key(1), x)
            apply = jax.jit(functools.partial(net.apply, key=jax.random.key(2), train=True))
            results.append((params, *apply(params, state, x)))
        jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize(("params_dtype", "compute"), [(F32, BF16), (BF16, BF16)])
def test_modules_keep_their_state_and_give_float32(params_dtype: str, compute: str, rng: np.random.Generator) -> None:
    """A convolution with batch norm: near the float32 network, but not equal to it."""
    plain = networks.conv((3,), 3, activation="tanh", batch_norm=True)
    assert plain.stem is None
    lowered = with_precision(plain, param_dtype=params_dtype, compute_dtype=compute)
    x = jnp.asarray(rng.standard_normal((16, 1, 4, 2)), jnp.float32)
    key = jax.random.key(int(rng.integers(2**31)))
    nets = multi_branch(plain, 5), multi_branch(lowered, 5)
    (exact, _), (params, state) = (jax.jit(net.init)(key, x) for net in nets)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {params_dtype}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} == {F32}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(b.dtype), b), exact, params)

    def run(net: Network, params: Any) -> Any:
        def objective(params: Any) -> tuple[Array, Any]:
            y, new = net.apply(params, state, x, key=key, train=True)
            return jnp.sum(y**2), (y, new)

        return jax.jit(jax.grad(objective, has_aux=True))(params)

    (slope, (y, new)), (near, (y_near, new_near)) = run(nets[0], upcast(params)), run(nets[1], params)
    assert y_near.dtype == jnp.float32
    for a, b in zip(jax.tree.leaves((slope, y, new)), jax.tree.leaves((near, y_near, new_near)), strict=True):
        np.testing.assert_allclose(np.asarray(b, np.float64), a, rtol=0, atol=0.05 * np.abs(a).max())
    assert jax.tree.map(lambda s: str(s.dtype), new_near) == jax.tree.map(lambda _: F32, state)
    if compute == BF16:
        assert np.abs(y - y_near).max() > 1e-5 * np.abs(y).max()


@pytest.mark.parametrize("name", ["mlp", "affine", "functions"])
def test_branches_are_added_up_in_float32(name: str) -> None:
    """4,097 branches with output 1: bfloat16 holds no 4,097, and a running sum in it stays at 256."""
    count = 4097
    ones = jnp.ones(count, jnp.bfloat16)
    assert jnp.sum(ones) == 4096
    assert np.cumsum(np.ones(count, ml_dtypes.bfloat16))[-1] == 256
    branch = {
        "mlp": networks.mlp((2,), 1),
        "affine": networks.mlp((), 1),
        "functions": networks.from_functions(lambda key, x: jnp.ones(()), lambda w, x: w * x[:, :1]),
    }[name]
    x = jnp.ones((2, 2))
    shapes, state = jax.eval_shape(branch.init, jax.random.key(0), x)
    if name == "mlp":  # hidden units 0.5 + 0.5, each weighed by 0.25, and a bias of 0.5
        one = (
            {"kernel": jnp.full((2, 2), 0.25), "bias": jnp.full(2, 0.5)},
            {"kernel": jnp.full((1, 2), 0.25), "bias": jnp.full(1, 0.5)},
        )
    elif name == "affine":
        one = ({"kernel": jnp.full((1, 2), 0.25), "bias": jnp.full(1, 0.5)},)
    else:
        one = jnp.ones(())
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(lambda s: s.shape, shapes)
    params = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)).astype(jnp.bfloat16), one)
    lowered = with_precision(branch, param_dtype=BF16, compute_dtype=BF16)
    net = multi_branch(lowered, count, reduce="sum")
    for apply in (jax.jit(net.apply), net.apply):
        y, _ = apply(params, state, x)
        np.testing.assert_array_equal(y, np.full((2, 1), count, np.float32))


def equations(jaxpr: Any) -> Any:
    """All equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.optimized
@pytest.mark.parametrize("hidden", [(), (6,), (5, 4)])
def test_no_sum_of_a_training_step_is_in_bfloat16(hidden: tuple[int, ...]) -> None:
    """On any platform: sums over batch and branches read float32, as the program is written."""
    x, y = jnp.ones((9, 7)), jnp.zeros(9, jnp.int32)
    counted = 0
    for count in (1, 5):
        net = network(hidden, BF16, BF16, count)
        params, state = jax.eval_shape(net.init, jax.random.key(0), x)

        def objective(params: Any, net: Network = net, state: Any = state) -> Array:
            outputs, _ = net.apply(params, state, x, train=True)
            return jnp.mean(losses.multi_margin().per_example(outputs, y))

        program = jax.make_jaxpr(jax.grad(objective))(params)
        kinds = [e for e in equations(program.jaxpr) if e.primitive.name in ("reduce_sum", "cumsum")]
        assert {str(e.invars[0].aval.dtype) for e in kinds} <= {F32, "int32"}
        products = [e for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
        assert BF16 in {str(v.aval.dtype) for e in products for v in e.invars}
        counted += len(kinds)
    assert counted > 4


# --- training ---------------------------------------------------------------------------------------------------------


def linear_step(w: Array, slope: Array, rate: Array) -> Array:
    """The weights after one step on the loss `slope . w`, whose gradient is `slope` in the dtype of w."""
    net = networks.from_functions(lambda key, x: w, lambda params, x: x @ upcast(params)[:, None])
    loss = losses.squared()._replace(per_example=lambda outputs, y: outputs[:, 0])
    sgd = for_network(net, optax.sgd(1.0))
    carry = Carry(w, (), sgd.init(w))
    x = slope.astype(jnp.float32)[None]
    return step(net, loss, sgd, carry, x, jnp.ones(1), rate, jax.random.key(0))[0].params


@pytest.mark.optimized
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_new_weight_is_computed_in_float32_and_rounded_once(name: str, rng: np.random.Generator) -> None:
    """Under each schedule, whose rates are float32; in bfloat16 throughout other weights would come out."""
    w, slope = (jnp.asarray(rng.standard_normal(4000), jnp.bfloat16) for _ in range(2))
    schedule = SCHEDULES.build(name, max_steps=100)
    rate = jax.jit(lambda base, t: base * schedule.rate(schedule.init(), t))(0.0137, jnp.int32(30))
    assert rate.dtype == jnp.float32
    assert not rate.weak_type
    moved = linear_step(w, slope, rate)
    wide = np.asarray(w, np.float32) - np.asarray(rate) * np.asarray(slope, np.float32)
    assert moved.dtype == jnp.bfloat16
    np.testing.assert_array_equal(moved, wide.astype(ml_dtypes.bfloat16))
    narrow = np.asarray(w) - np.asarray(rate).astype(ml_dtypes.bfloat16) * np.asarray(slope)
    assert (narrow != np.asarray(moved)).any()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_updates_below_the_spacing_are_lost(dtype: str, rng: np.random.Generator) -> None:
    """A bfloat16 weight never feels an update below 2^-9 of it, and always one above 2^-8; float32 feels both."""
    w = jnp.asarray(rng.uniform(0.01, 100, 2000) * rng.choice([-1, 1], 2000), jnp.bfloat16).astype(dtype)
    for rate, lost in ((2**-9 * 0.99, dtype == BF16), (2**-8 * 1.01, False)):
        for sign in (1.0, -1.0):
            moved = linear_step(w, sign * w, jnp.float32(rate))
            assert moved.dtype == dtype
            assert (moved == w).all() if lost else (moved != w).all()


def spec_with(params: Any, compute: Any, **changes: Any) -> LandscapeSpec:
    spec = LandscapeSpec(
        num_branches=6,
        branch=Component("mlp", {"hidden": (3,)}),
        data=Component("synthetic_relu", {"n": 40, "d": 4, "seed": 3}),
        training=training.TrainingSpec(batch_size=10, max_steps=40, check_every=10),
        plane=PlaneSpec(points=5, edge_points=3),
        precision=PrecisionSpec(params, compute),
    )
    return dataclasses.replace(spec, **changes)


def test_a_landscape_is_trained_at_its_precision_and_drawn_in_float32(tmp_path: Path) -> None:
    spec = spec_with(BF16, BF16)
    workdir = Workdir.open(tmp_path / "w", {})
    with workdir.session():
        report = landscape_experiment(spec, workdir, TABLES)
    record = load_json(workdir.results / "landscape.json")
    assert record["regime"] == regime(spec)
    assert record["precision"] == {"params": BF16, "compute": BF16}
    assert any(record["regime"] in note for note in report.notes)
    # The same training by hand; the same losses by the plain branch, one after another, in float64.
    dataset, _, training_net, loss = build(spec, TABLES)
    solutions = training.train(training_net, loss, dataset, **spec.training.arguments(6))
    for solution, row in zip(solutions, record["solutions"], strict=True):
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(solution.params)} == {BF16}
        first, last = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), solution.params)
        hidden = np.maximum(np.einsum("ihd,nd->ihn", first["kernel"], dataset.x) + first["bias"][..., None], 0)
        outputs = (np.einsum("ioh,ihn->ion", last["kernel"], hidden) + last["bias"][..., None])[:, 0].mean(0)
        expected = np.maximum(1 - dataset.y * outputs, 0).mean()
        assert row["loss"] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    surface = load_npz(workdir.results / "landscape.npz")
    # Plane coordinates of a solution are those of the anchors: along an edge the ends are the solutions' losses.
    ends = sorted({round(float(v), 4) for edge in surface["edge_loss"] for v in (edge[0], edge[-1])})
    np.testing.assert_allclose(ends, sorted(round(r["loss"], 4) for r in record["solutions"]), atol=2e-4)


def test_the_regime_says_what_is_not_float32() -> None:
    plain = regime(spec_with(F32, F32))
    assert "float" not in plain
    for numbers in LOWERED:
        assert regime(spec_with(*numbers)) == "{}, trained with {} parameters and {} compute".format(plain, *numbers)
    assert len({id(net) for net in build(spec_with(F32, F32), TABLES)[1:3]}) == 1


@pytest.mark.optimized
def test_training_resumes_bit_for_bit_with_bfloat16_parameters(tmp_path: Path) -> None:
    spec = spec_with(BF16, BF16)
    dataset, _, net, loss = build(spec, TABLES)

    def run(steps: int, folder: Path) -> list[training.Solution]:
        short = dataclasses.replace(spec.training, max_steps=steps, checkpoint_seconds=0.0)
        return training.train(net, loss, dataset, **short.arguments(6), checkpoints=folder, num_solutions=2)

    whole = run(40, tmp_path / "whole")
    run(20, tmp_path / "parts")
    for a, b in zip(whole, run(40, tmp_path / "parts"), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(b.params)} == {BF16}
        assert (a.steps, a.batch_loss) == (b.steps, b.batch_loss) == (40, a.batch_loss)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_precision_comes_from_the_config() -> None:
    config = as_dict(LandscapeSpec())
    assert to_spec(LandscapeSpec, config).precision == PrecisionSpec(F32, F32)
    config["precision"]["params"] = BF16
    assert to_spec(LandscapeSpec, config).precision == PrecisionSpec(BF16, F32)
    config["precision"]["compute"] = "bfloat61"
    with pytest.raises(ConfigError, match=r"precision.compute.*bfloat61.*bfloat16"):
        to_spec(LandscapeSpec, config)
    with pytest.raises(ConfigError, match=r"precision.params.*float16.*float32"):
        PrecisionSpec.__post_init__(types.SimpleNamespace(params="float16", compute=F32))


def test_what_with_precision_refuses() -> None:
    with pytest.raises(ValueError, match="param_dtype=int32"):
        with_precision(networks.mlp(), param_dtype="int32")
    with pytest.raises(ValueError, match="compute_dtype=int8"):
        with_precision(networks.mlp(), compute_dtype="int8")
    with pytest.raises(ValueError, match=r"multi_branch\(with_precision\(branch"):
        with_precision(multi_branch(networks.mlp(), 2), compute_dtype=BF16)


def test_upcast_is_exact_and_leaves_wide_numbers_alone(rng: np.random.Generator, x64: None) -> None:
    tree = {name: jnp.asarray(rng.standard_normal(5), name) for name in ("bfloat16", "float16", F32, "float64")}
    wide = upcast({**tree, "int32": jnp.arange(3)})
    assert [str(wide[name].dtype) for name in tree] == [F32, F32, F32, "float64"]
    for name, leaf in tree.items():
        np.testing.assert_array_equal(np.asarray(wide[name], np.float64), np.asarray(leaf, np.float64))
    assert wide[F32] is tree[F32]
    on_disk = {name: np.asarray(leaf) for name, leaf in tree.items()}
    for name, leaf in upcast(on_disk).items():
        assert isinstance(leaf, np.ndarray)
        np.testing.assert_array_equal(leaf, wide[name])
    assert upcast(on_disk)["float64"] is on_disk["float64"]
    net = with_precision(networks.mlp((3,), 2), param_dtype="float64", compute_dtype="float64")
    params, state = net.init(jax.random.key(0), jnp.ones((2, 3), jnp.float32))
    assert net.apply(params, state, jnp.ones((2, 3), jnp.float32))[0].dtype == jnp.float64
