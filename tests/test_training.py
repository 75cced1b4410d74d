"""The SGD loop against steps written out in NumPy, schedules, exact resume, and evaluation."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_by_spec import sgd, train_as, transformation_of

from dualgap_jax import identity, schedules, training
from dualgap_jax.checkpoints import Checkpointer
from dualgap_jax.config import Component, ConfigError
from dualgap_jax.data import Dataset
from dualgap_jax.evaluation import evaluate
from dualgap_jax.identity import IdentityError
from dualgap_jax.losses import Loss, binary_hinge, crammer_singer, logistic, multi_margin, squared
from dualgap_jax.machine import memory_available
from dualgap_jax.metrics import Metrics, read_metrics
from dualgap_jax.networks import conv, from_functions, mlp, multi_branch
from dualgap_jax.networks.sources import InMemory
from dualgap_jax.registry import UnknownNameError
from dualgap_jax.training import Solution, TrainingSpec, loop, plan, solution_key, together
from dualgap_jax.training.batches import BatchOrder, batch_shape
from dualgap_jax.training.engine import Carry
from dualgap_jax.training.together import draw
from dualgap_jax.types import Network

CONSTANT = Component("constant", {})
# Most tests run the same few programs, which are compiled once.
SPEC = TrainingSpec(
    8,
    max_steps=9,
    learning_rate=0.3,
    lr_scaling="none",
    optimizer=sgd(0.5),
    schedule=CONSTANT,
    check_every=3,
    checkpoint_seconds=0.0,
)


def spec_with(**settings: Any) -> TrainingSpec:
    return dataclasses.replace(SPEC, **settings)


def labelled(
    rng: np.random.Generator, n: int = 24, d: int = 5, task: str = "binary", dtype: Any = np.float64
) -> Dataset:
    """Random features, labels of a random linear rule (classes: three)."""
    x = rng.normal(size=(n, d)).astype(dtype)
    scores = x @ rng.normal(size=(d, 3))
    y, outputs = {
        "binary": (np.where(scores[:, 0] > 0, 1.0, -1.0).astype(np.float32), 1),
        "multiclass": (scores.argmax(1).astype(np.int32), 3),
        "regression": (scores[:, 0].astype(np.float32), 1),
    }[task]
    zero, one = np.zeros(d, np.float32), np.ones(d, np.float32)
    return Dataset("drawn", x, y, zero, one, outputs, task, {})


def images(rng: np.random.Generator, n: int = 20) -> Dataset:
    """uint8 images `[n, 4, 4, 1]` in three classes, with a mean and a deviation for each pixel."""
    x = rng.integers(0, 256, (n, 4, 4, 1), dtype=np.uint8)
    mean, std = rng.uniform(100, 150, (4, 4, 1)), rng.uniform(50, 90, (4, 4, 1))
    y = rng.integers(0, 3, n).astype(np.int32)
    return Dataset("images", x, y, mean.astype(np.float32), std.astype(np.float32), 3, "multiclass", {})


def network(hidden: tuple[int, ...] = (4,), num_branches: int = 2, out: int = 1, **options: Any) -> Network:
    """A multi-branch mlp, initialised from one uniform draw: compiling the usual draws takes most of a small run."""
    net = multi_branch(mlp(hidden, out), num_branches, **options)

    def init(key: Any, x: Any, /) -> Any:
        shapes = jax.eval_shape(net.init, key, x)
        leaves, treedef = jax.tree.flatten(shapes)
        ends = np.cumsum([leaf.size for leaf in leaves])
        draw = jax.random.uniform(key, (int(ends[-1]),), leaves[0].dtype, -0.5, 0.5)
        parts = [p.reshape(leaf.shape) for p, leaf in zip(jnp.split(draw, ends[:-1]), leaves, strict=True)]
        return jax.tree.unflatten(treedef, parts)

    return net._replace(init=init)


def same_bits(a: Any, b: Any) -> None:
    """Trees equal in structure, dtype and every bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert x.tobytes() == y.tobytes()


def close(a: Any, b: Any, rtol: float = 1e-11) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=rtol, atol=rtol), a, b)


def same_solutions(got: list[Solution], expected: list[Solution]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        same_bits((a.params, a.state), (b.params, b.state))
        assert (a.steps, a.status) == (b.steps, b.status)
        assert a.batch_loss == b.batch_loss or (math.isnan(a.batch_loss) and math.isnan(b.batch_loss))


def rows(path: Path) -> list[dict[str, Any]]:
    """The metrics, less the one number that is a clock's; in the order of steps and solutions."""
    kept = [{k: v for k, v in row.items() if k != "steps_per_second"} for row in read_metrics(path)]
    return sorted(kept, key=lambda row: (row["step"], row["solution"]))


# --- one step ---------------------------------------------------------------------------------------------------------


def to_numpy(params: Any) -> list[np.ndarray]:
    """W [I, h, d], b [I, h], V [I, h], c [I] of a one-hidden-layer mlp with one output, as float64 copies."""
    first, second = params
    return [
        np.array(first["kernel"], np.float64),
        np.array(first["bias"], np.float64),
        np.array(second["kernel"], np.float64)[:, 0],
        np.array(second["bias"], np.float64)[:, 0],
    ]


def hinge_gradient(
    w: list[np.ndarray], x: np.ndarray, y: np.ndarray, scale: float, tau: float = 1.0
) -> tuple[float, list[np.ndarray]]:
    """Mean tau-hinge of `scale * sum_i (V_i relu(W_i x + b_i) + c_i)` and its gradient, written out."""
    kernel, bias, head, shift = w
    y = y.astype(np.float64)
    a = np.einsum("ihd,nd->inh", kernel, x) + bias[:, None]
    f = scale * (np.einsum("ih,inh->n", head, np.maximum(a, 0)) + shift.sum())
    loss = np.maximum(0, 1 - y * f / tau)
    df = np.where(loss > 0, -y / tau, 0.0) * scale / len(y)
    da = df[None, :, None] * head[:, None, :] * (a > 0)
    gradient = [
        np.einsum("inh,nd->ihd", da, x),
        da.sum(1),
        np.einsum("n,inh->ih", df, np.maximum(a, 0)),
        np.full(len(shift), df.sum()),
    ]
    return float(loss.mean()), gradient


def one_step(net: Network, loss: Loss, transformation: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(together.step, net, loss, transformation))


class NumpySgd:
    """Weight decay, then heavy-ball or Nesterov momentum, then `w - rate * update`."""

    def __init__(self, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0) -> None:
        self.momentum, self.nesterov, self.decay = momentum, nesterov, weight_decay
        self.velocity: list[np.ndarray] | None = None

    def __call__(self, w: list[np.ndarray], g: list[np.ndarray], rate: float) -> list[np.ndarray]:
        g = [gi + self.decay * wi for gi, wi in zip(g, w, strict=True)]
        if self.momentum:
            before = self.velocity or [np.zeros_like(gi) for gi in g]
            self.velocity = [gi + self.momentum * v for gi, v in zip(g, before, strict=True)]
            pushed = [gi + self.momentum * v for gi, v in zip(g, self.velocity, strict=True)]
            g = pushed if self.nesterov else self.velocity
        return [wi - rate * gi for wi, gi in zip(w, g, strict=True)]


class OptaxSgd:
    """The same with an optax chain called directly, on each branch alone."""

    def __init__(self, *parts: optax.GradientTransformation) -> None:
        self.chain = optax.chain(*parts)
        self.states: list[Any] = []

    def __call__(self, w: list[np.ndarray], g: list[np.ndarray], rate: float) -> list[np.ndarray]:
        count = len(w[0])
        alone = [([jnp.asarray(a[i]) for a in w], [jnp.asarray(a[i]) for a in g]) for i in range(count)]
        states = self.states or [self.chain.init(own) for own, _ in alone]
        found = [self.chain.update(gradient, s, own) for (own, gradient), s in zip(alone, states, strict=True)]
        self.states = [state for _, state in found]
        return [wi - rate * np.stack([u[k] for u, _ in found]) for k, wi in enumerate(w)]


STEPS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "plain": ({}, NumpySgd),
    "momentum": ({"optimizer": sgd(0.9)}, lambda: NumpySgd(0.9)),
    "nesterov": ({"optimizer": sgd(0.8, True)}, lambda: NumpySgd(0.8, True)),
    "decay": ({"weight_decay": 0.3}, lambda: NumpySgd(weight_decay=0.3)),
    "all": ({"optimizer": sgd(0.7), "weight_decay": 0.2}, lambda: NumpySgd(0.7, False, 0.2)),
    "clip": ({"chain": ("clip_by_global_norm(0.05)",)}, lambda: OptaxSgd(optax.clip_by_global_norm(0.05))),
    "adam": ({"chain": ("scale_by_adam(b1=0.8)",)}, lambda: OptaxSgd(optax.scale_by_adam(b1=0.8))),
    "bare name": ({"chain": ("scale_by_adam",)}, lambda: OptaxSgd(optax.scale_by_adam())),
    "two": (
        {"chain": ("clip_by_global_norm(0.05)", "scale_by_adam()"), "weight_decay": 0.1, "optimizer": sgd(0.5)},
        lambda: OptaxSgd(
            optax.add_decayed_weights(0.1), optax.clip_by_global_norm(0.05), optax.scale_by_adam(), optax.trace(0.5)
        ),
    ),
}


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.usefixtures("x64")
def test_steps_are_those_written_out_in_numpy(case: str, rng: np.random.Generator) -> None:
    settings, oracle = STEPS[case]
    data = labelled(rng)
    net = network((4,), 3)
    transformation = transformation_of(net, TrainingSpec(**settings))
    params, state = jax.jit(net.init)(jax.random.key(int(rng.integers(1000))), jnp.asarray(data.x[:1]))
    carry = Carry(params, state, transformation.init(params))
    step = one_step(net, binary_hinge(), transformation)
    w, update = to_numpy(params), oracle()
    for rate in (0.5, 0.5, 0.2, 0.7):
        picked = rng.choice(len(data.y), 10, replace=False)
        x, y = data.x[picked], data.y[picked]
        carry, value = step(carry, jnp.asarray(x), jnp.asarray(y), jnp.asarray(rate), jax.random.key(0))
        loss, gradient = hinge_gradient(w, x, y, 1 / 3)
        assert float(value) == pytest.approx(loss, rel=1e-12)
        assert max(np.abs(g).max() for g in gradient) > 1e-3
        w = update(w, gradient, rate)
        close(to_numpy(carry.params), w, 1e-12)


@pytest.mark.parametrize("batch_size", [0, 8])
@pytest.mark.usefixtures("x64")
def test_a_whole_run_is_the_numpy_loop_over_its_batches(batch_size: int, rng: np.random.Generator) -> None:
    data, net = labelled(rng, 26), network()
    spec = spec_with(batch_size=batch_size, max_steps=11)
    got = train_as(net, binary_hinge(), data, spec, seed=5, num_solutions=3)
    begun = train_as(net, binary_hinge(), data, spec_with(max_steps=0), seed=5, num_solutions=3)
    for k in range(3):
        w, update, losses = to_numpy(begun[k].params), NumpySgd(0.5), []
        order = BatchOrder(jax.random.split(solution_key(5, k), 3)[1], 26, 8)
        for t in range(11):
            picked = order.indices(t, 1)[0] if batch_size else np.arange(26)
            loss, gradient = hinge_gradient(w, data.x[picked], data.y[picked], 0.5)
            losses.append(loss)
            w = update(w, gradient, 0.3)
        close(to_numpy(got[k].params), w, 1e-11)
        assert got[k].batch_loss == pytest.approx(np.mean(losses[9:]), rel=1e-11)
        assert (got[k].steps, got[k].status) == (11, "max_steps")


@pytest.mark.parametrize("num_branches", [1, 4, 9])
def test_learning_rate_scalings(num_branches: int) -> None:
    rates = [
        training.scaled_learning_rate(TrainingSpec(learning_rate=0.3, lr_scaling=scaling), num_branches)
        for scaling in ("branches", "none", "inverse_branches")
    ]
    assert rates == pytest.approx([0.3 * num_branches, 0.3, 0.3 / num_branches])


@pytest.mark.usefixtures("x64")
def test_mean_field_scaling_moves_each_branch_as_if_it_carried_no_factor(rng: np.random.Generator) -> None:
    # With the mean f over branches and the rate eta I, branch i moves by -eta E[l'(f) grad f_i(w_i)]: the pull of the
    # plain sum's gradient with the slope of the loss taken at the mean.
    data, eta, count = labelled(rng), 0.3, 5
    x, y = jnp.asarray(data.x), jnp.asarray(data.y)
    mean, total = (network((4,), count, reduce=r) for r in ("mean", "sum"))
    params, _ = mean.init(jax.random.key(3), x[:1])
    transformation = transformation_of(mean, TrainingSpec())
    carry = Carry(params, (), transformation.init(params))
    rate = training.scaled_learning_rate(TrainingSpec(learning_rate=eta, lr_scaling="branches"), count)
    args = (carry, x, y, jnp.asarray(rate), jax.random.key(0))
    moved, _ = one_step(mean, binary_hinge(), transformation)(*args)
    f, _ = mean.apply(params, (), x)
    y64 = data.y.astype(np.float64)
    slope = np.where(y64 * np.asarray(f[:, 0]) < 1, -y64, 0.0) / len(y64)
    _, pull = jax.vjp(lambda p: total.apply(p, (), x)[0], params)
    (gradient,) = pull(jnp.asarray(slope)[:, None])
    close(moved.params, jax.tree.map(lambda w, g: w - eta * g, params, gradient), 1e-12)


@pytest.mark.usefixtures("x64")
def test_mean_field_branches_that_start_equal_follow_the_single_branch(rng: np.random.Generator) -> None:
    data, single, count = labelled(rng), network((4,), 1), 6
    many = network((4,), count)

    def copies(key: Any, x: Any, /) -> Any:
        params, _ = single.init(key, x)
        return jax.tree.map(lambda a: jnp.repeat(a, count, 0), params), ()

    runs = []
    for net, branches in ((single, 1), (many._replace(init=copies), count)):
        spec = spec_with(lr_scaling="branches")
        rate = training.scaled_learning_rate(spec, branches)
        runs.append(train_as(net, binary_hinge(), data, spec, learning_rate=rate, num_solutions=1)[0])
    close(jax.tree.map(lambda a: jnp.repeat(a, count, 0), runs[0].params), runs[1].params, 1e-11)


@pytest.mark.usefixtures("x64")
def test_the_mean_with_tau_and_the_sum_with_tau_times_branches_train_alike(rng: np.random.Generator) -> None:
    data, loss, wide = labelled(rng), binary_hinge(1.0), binary_hinge(2.0)
    mean = train_as(network(), loss, data, SPEC, num_solutions=1)
    total = train_as(network(reduce="sum"), wide, data, SPEC, num_solutions=1)
    close(mean[0].params, total[0].params, 1e-11)
    assert mean[0].batch_loss == pytest.approx(total[0].batch_loss)


# --- schedules --------------------------------------------------------------------------------------------------------


def falling_plateau(losses: np.ndarray, factor: float, min_delta: float, max_decays: int, patience: int) -> list[float]:
    """The factors on the learning rate after each look, up to and including the look that stops the run (0 there)."""
    factors, lowest, bad, rate, decays = [], math.inf, 0, 1.0, 0
    for loss in losses:
        if loss < lowest - min_delta:
            lowest, bad = loss, 0
        else:
            bad += 1
        if bad == patience:
            if decays == max_decays:
                return [*factors, 0.0]
            decays, rate, bad = decays + 1, rate * factor, 0
        factors.append(rate)
    return factors


@pytest.mark.parametrize("settings", [(0.1, 1e-5, 3, 1), (0.5, 1e-2, 3, 2), (0.1, 0.0, 0, 1), (0.3, 1e-3, 5, 3)])
@pytest.mark.usefixtures("x64")
def test_plateau_decays_where_the_best_loss_does_not_fall(settings: Any, rng: np.random.Generator) -> None:
    factor, min_delta, max_decays, patience = settings
    schedule = schedules.plateau(10, factor, min_delta, max_decays, patience)
    update = jax.jit(schedule.update)
    stopped = 0
    for _ in range(12):
        # Falls on average, with noise, and with repeats of the very same loss.
        losses = np.round(np.cumsum(rng.normal(-0.02, 0.05, 30)) + rng.normal(0, 0.01, 30) + 3, 2)
        expected = falling_plateau(losses, *settings)
        state, got = schedule.init(), []
        for loss in losses:
            state = update(state, jnp.asarray(loss))
            got.append(0.0 if schedule.stop(state) else float(schedule.rate(state, jnp.asarray(7))))
            if got[-1] == 0:
                break
        assert got == pytest.approx(expected, rel=1e-12)
        stopped += got[-1] == 0
    assert stopped > 0


def literal_rule(losses: Any, factor: float, rise: float, max_decays: int) -> list[float]:
    """Rates after each look of the rule that the authors' program follows; 0 once it stops."""
    reference, left, rate, rates = None, max_decays, 1.0, []
    for loss in losses:
        if reference is None:
            reference = loss
        elif not loss <= reference + rise:
            if left == 0:
                return [*rates, 0.0]
            left, rate, reference = left - 1, rate * factor, loss
        rates.append(rate)
    return rates


@pytest.mark.parametrize("settings", [(0.1, 1e-5, 3), (0.5, 0.02, 2), (0.1, 0.0, 0)])
@pytest.mark.usefixtures("x64")
def test_plateau_authors_compares_single_losses_with_a_reference_that_only_a_decay_moves(
    settings: Any, rng: np.random.Generator
) -> None:
    schedule = schedules.plateau_authors(10, *settings)
    assert schedule.single
    assert not schedules.plateau(10).single
    update, stopped, went_on = jax.jit(schedule.update), 0, 0
    for _ in range(12):
        losses = np.round(rng.normal(-0.02, 0.05, 12).cumsum() + 3, 2)
        expected = literal_rule(losses, *settings)
        state, got = schedule.init(), []
        for loss in losses:
            state = update(state, jnp.asarray(loss))
            got.append(0.0 if schedule.stop(state) else float(schedule.rate(state, jnp.asarray(7))))
            if got[-1] == 0:
                break
        assert got == pytest.approx(expected, rel=1e-12)
        stopped, went_on = stopped + (got[-1] == 0), went_on + (got[-1] > 0)
    assert stopped > 0


def test_a_run_by_single_mini_batches_looks_at_the_last_and_converges_by_any(rng: np.random.Generator) -> None:
    seen: list[float] = []

    def watching(max_steps: int) -> Any:
        inner = schedules.plateau_authors(max_steps)

        def update(state: Any, loss: Any) -> Any:
            jax.debug.callback(lambda value: seen.append(float(np.ravel(value)[0])), loss)
            return inner.update(state, loss)

        return inner._replace(update=update)

    data = labelled(rng)
    net, loss = network(), binary_hinge()
    options: dict[str, Any] = {"batch_size": 4, "max_steps": 6, "check_every": 3, "num_solutions": 1, "seed": 3}
    single = [
        training.train(net, loss, data, optax.sgd(0.05), **{**options, "max_steps": n, "check_every": 1})[0].batch_loss
        for n in range(1, 7)
    ]
    training.train(net, loss, data, optax.sgd(0.05), **options, schedule=watching(6), tolerance=0.0)
    jax.effects_barrier()
    assert seen == pytest.approx([single[2], single[5]], rel=1e-5)
    between = (min(single[:3]) + np.mean(single[:3])) / 2  # below the mean of the segment, above the least of it
    for schedule, status in ((schedules.plateau_authors(6), "converged"), (schedules.plateau(6), "max_steps")):
        (got,) = training.train(
            net, loss, data, optax.sgd(0.05), **{**options, "max_steps": 3}, schedule=schedule, tolerance=between
        )
        assert got.status == status


def test_plateau_counts_a_loss_that_is_not_a_number_as_no_fall() -> None:
    schedule = schedules.plateau(10)
    state = schedule.update(schedule.init(), jnp.asarray(1.0))
    state = schedule.update(state, jnp.asarray(jnp.nan))
    assert (float(state.reference), int(state.decays)) == (1.0, 1)


@pytest.mark.usefixtures("x64")
def test_a_run_on_a_plateau_decays_three_times_and_stops(tmp_path: Path, rng: np.random.Generator) -> None:
    # No fall is large enough: the first look sets the reference, three decay, the fifth stops.
    schedule = Component("plateau", {"factor": 0.5, "min_delta": 100.0})
    spec = spec_with(max_steps=1000, learning_rate=0.4, schedule=schedule)
    with Metrics(tmp_path / "m.jsonl") as metrics:
        (got,) = train_as(network(), binary_hinge(), labelled(rng), spec, num_solutions=1, metrics=metrics)
    assert (got.steps, got.status) == (15, "plateau")
    seen = rows(tmp_path / "m.jsonl")
    assert [r["step"] for r in seen] == [3, 6, 9, 12, 15]
    assert [r["learning_rate"] for r in seen] == pytest.approx([0.4, 0.4, 0.2, 0.1, 0.05])
    assert [r["status"] for r in seen] == ["running"] * 4 + ["plateau"]


@pytest.mark.parametrize(("final", "warmup", "steps"), [(0.0, 0, 20), (0.1, 5, 20), (1.0, 3, 10), (0.0, 4, 4)])
def test_cosine_and_constant(final: float, warmup: int, steps: int) -> None:
    schedule = schedules.cosine(steps, final, warmup)
    for t in range(steps + 1):
        if t < warmup:
            expected = (t + 1) / warmup
        else:
            expected = final + (1 - final) * (1 + math.cos(math.pi * (t - warmup) / max(steps - warmup, 1))) / 2
        assert float(schedule.rate((), jnp.asarray(t))) == pytest.approx(expected, abs=1e-6)
        assert float(schedules.constant(steps).rate((), jnp.asarray(t))) == 1
    for made in (schedule, schedules.constant(steps)):
        assert made.update(made.init(), jnp.asarray(3.0)) == made.init()
        assert not made.stop(made.init())


@pytest.mark.usefixtures("x64")
def test_the_cosine_rate_is_that_of_the_step_not_of_the_segment(rng: np.random.Generator) -> None:
    data, net = labelled(rng), network()
    spec = spec_with(batch_size=0, max_steps=6, learning_rate=0.4, schedule=Component("cosine", {"warmup": 2}))
    (got,) = train_as(net, binary_hinge(), data, spec, num_solutions=1)
    (begun,) = train_as(net, binary_hinge(), data, spec_with(max_steps=0), num_solutions=1)
    w, update = to_numpy(begun.params), NumpySgd(0.5)
    for t in range(6):
        rate = 0.4 * ((t + 1) / 2 if t < 2 else (1 + math.cos(math.pi * (t - 2) / 4)) / 2)
        w = update(w, hinge_gradient(w, data.x, data.y, 0.5)[1], rate)
    close(to_numpy(got.params), w, 1e-11)


# --- the order of the data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch"), [(20, 5), (23, 5), (7, 7), (9, 1), (10, 6)])
def test_an_epoch_is_a_permutation_and_random_access_equals_sequential(
    n: int, batch: int, rng: np.random.Generator
) -> None:
    key = jax.random.key(int(rng.integers(2**31)))
    per_epoch = n // batch
    steps = 3 * per_epoch + 1
    whole = BatchOrder(key, n, batch).indices(0, steps)
    assert whole.shape == (steps, batch)
    for epoch in range(3):
        seen = whole[epoch * per_epoch : (epoch + 1) * per_epoch].ravel()
        assert len(set(seen.tolist())) == len(seen) == n - n % batch
        assert set(seen.tolist()) <= set(range(n))
    if batch > 1 or n > 1:
        assert not np.array_equal(whole[:per_epoch], whole[per_epoch : 2 * per_epoch])
    order = BatchOrder(key, n, batch)
    for first in rng.permutation(steps):
        np.testing.assert_array_equal(order.indices(int(first), 1)[0], whole[first])
    np.testing.assert_array_equal(BatchOrder(key, n, batch).indices(per_epoch - 1, 2), whole[per_epoch - 1 :][:2])
    assert not np.array_equal(BatchOrder(jax.random.key(2**31 + 1), n, batch).indices(0, steps), whole)


def test_what_an_epoch_leaves_out_changes_from_epoch_to_epoch() -> None:
    order = BatchOrder(jax.random.key(0), 7, 3)
    left_out = {(set(range(7)) - set(order.indices(2 * e, 2).ravel().tolist())).pop() for e in range(20)}
    assert len(left_out) > 3


@pytest.mark.parametrize("batch", [0, -1, 11])
def test_an_order_refuses_a_batch_that_does_not_fit(batch: int) -> None:
    with pytest.raises(ConfigError, match=f"batch_size={batch} must lie between 1 and 10"):
        BatchOrder(jax.random.key(0), 10, batch)


# --- several solutions ------------------------------------------------------------------------------------------------


@pytest.mark.optimized
@pytest.mark.parametrize("task", ["binary", "multiclass"])
@pytest.mark.usefixtures("x64")
def test_solutions_do_not_depend_on_the_group_or_on_their_number(task: str, rng: np.random.Generator) -> None:
    data = labelled(rng, task=task)
    loss = {"binary": binary_hinge(), "multiclass": multi_margin()}[task]
    net = network(out=data.num_outputs)
    together = train_as(net, loss, data, SPEC, seed=1, num_solutions=3, group_size=3)
    others = [
        train_as(net, loss, data, SPEC, seed=1, num_solutions=3, group_size=1),
        train_as(net, loss, data, SPEC, seed=1, num_solutions=1),
    ]
    if task == "binary":  # a group of two, and one of one
        others.append(train_as(net, loss, data, SPEC, seed=1, num_solutions=3, group_size=2))
    for other in others:
        for a, b in zip(together, other, strict=False):
            close(a.params, b.params, 1e-11)
            assert (a.steps, a.status) == (b.steps, b.status)
    kernels = [np.asarray(s.params[0]["kernel"]) for s in together]
    assert all(np.abs(kernels[i] - kernels[j]).max() > 0.01 for i, j in ((0, 1), (0, 2), (1, 2)))
    again = train_as(net, loss, data, SPEC, seed=2, num_solutions=1)
    assert np.abs(np.asarray(again[0].params[0]["kernel"]) - kernels[0]).max() > 0.01


@pytest.mark.usefixtures("x64")
def test_noise_is_a_function_of_seed_solution_and_step(rng: np.random.Generator) -> None:
    data, net = labelled(rng), network()

    def noisy(params: Any, state: Any, x: Any, /, *, key: Any = None, train: bool = False) -> Any:
        assert train
        draw = jax.random.uniform(key)
        return net.apply(params, (), x)[0], {"sum": state["sum"] + draw, "last": state["now"], "now": draw}

    def init(key: Any, x: Any, /) -> Any:
        return net.init(key, x)[0], dict.fromkeys(("sum", "last", "now"), jnp.zeros(()))

    noisy_net = Network(init, noisy)
    for groups in (3, 1):
        got = train_as(noisy_net, binary_hinge(), data, SPEC, seed=6, num_solutions=3, group_size=groups)
        for k, solution in enumerate(got):
            key = jax.random.split(solution_key(6, k), 3)[2]
            drawn = [float(jax.random.uniform(jax.random.fold_in(key, t))) for t in range(9)]
            assert float(solution.state["sum"]) == pytest.approx(sum(drawn), rel=1e-12)
            assert [float(solution.state[name]) for name in ("last", "now")] == pytest.approx(drawn[-2:], rel=1e-12)


@pytest.mark.usefixtures("x64")
def test_little_memory_means_one_solution_at_a_time(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, net = labelled(rng), network()
    widths: list[int] = []
    make = together.make_segment

    def watched(*args: Any) -> Any:
        segment = make(*args)

        def wrapped(carry: Any, *rest: Any) -> Any:
            widths.extend([jax.tree.leaves(carry)[0].shape[0]] * rest[-2])  # one a step
            return segment(carry, *rest)

        return wrapped

    monkeypatch.setattr(together, "make_segment", watched)
    spec = spec_with(max_steps=6)
    copies = 4 * 8 * 2 * 2 * (4 * 5 + 4 + 4 + 1)  # four of 29 float64 in each of two branches, and their momentum
    transformation = transformation_of(net, spec)
    carry = jax.eval_shape(lambda key: draw(net, data, transformation, key), jax.random.key(0))
    one = plan.need(net, carry, batch_shape(data, spec.batch_size)).plain
    assert copies + 8 * 2 * 4 * spec.batch_size <= one <= copies + 12 * 8 * 2 * 4 * spec.batch_size  # and some units
    for free, expected in ((6 * one, [1] * 18), (6 * one + 2, [3] * 6)):
        widths.clear()
        monkeypatch.setattr(plan, "memory_available", lambda free=free: free)
        train_as(net, binary_hinge(), data, spec, num_solutions=3)
        assert widths == expected
    # Begun together, it goes on together, unless even one copy of all no longer fits.
    monkeypatch.setattr(plan, "memory_available", lambda: 6 * one + 2)
    train_as(net, binary_hinge(), data, spec, num_solutions=3, checkpoints=tmp_path)
    for free, expected in ((3 * one + 1, [3] * 3), (3 * one, [1] * 9)):
        widths.clear()
        monkeypatch.setattr(plan, "memory_available", lambda free=free: free)
        spec = dataclasses.replace(spec, max_steps=spec.max_steps + 3)
        train_as(net, binary_hinge(), data, spec, num_solutions=3, checkpoints=tmp_path)
        assert widths == expected


# --- how a run ends ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_each_solution_stops_as_alone_when_its_loss_is_below_the_tolerance(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    data, net = labelled(rng), network()
    spec = spec_with(max_steps=900, tolerance=0.05)
    with Metrics(tmp_path / "m.jsonl") as metrics:
        together = train_as(net, binary_hinge(), data, spec, num_solutions=3, metrics=metrics)
    alone = train_as(net, binary_hinge(), data, spec, num_solutions=3, group_size=1)
    assert len({s.steps for s in together}) > 1
    seen = rows(tmp_path / "m.jsonl")
    for k, (a, b) in enumerate(zip(together, alone, strict=True)):
        assert (a.steps, a.status) == (b.steps, b.status)
        close(a.params, b.params, 1e-9)
        own = [r for r in seen if r["solution"] == k]
        assert a.status == own[-1]["status"] == "converged"
        assert [r["step"] for r in own] == list(range(3, a.steps + 1, 3))
        assert all(r["loss"] >= 0.05 and r["status"] == "running" for r in own[:-1])
        assert own[-1]["loss"] == a.batch_loss < 0.05


@pytest.mark.usefixtures("x64")
def test_a_huge_learning_rate_is_named_diverged(tmp_path: Path, rng: np.random.Generator) -> None:
    data, spec = labelled(rng, task="regression"), spec_with(max_steps=600, learning_rate=1e30)

    def call(**files: Any) -> list[Solution]:
        return train_as(network(), squared(), data, spec, num_solutions=1, **files)

    (got,) = finished(tmp_path, call)
    assert got.status == rows(tmp_path / "metrics.jsonl")[-1]["status"] == "diverged"
    assert got.steps < 600
    assert not math.isfinite(got.batch_loss)
    same_solutions(finished(tmp_path, call), [got])  # as restored


@pytest.mark.optimized
@pytest.mark.parametrize(("streaming", "bad"), [*(("off", bad) for bad in (np.nan, np.inf, -np.inf)), ("on", np.nan)])
def test_a_network_whose_outputs_are_not_finite_has_diverged(
    streaming: str, bad: float, rng: np.random.Generator
) -> None:
    # One output of 40 is not finite; by the hinge alone infinity would cost nothing.
    data = labelled(rng, 40, dtype=np.float32)
    at = int(np.flatnonzero(data.y == (1 if bad > 0 else -1))[0])
    data.x[at] = 7.0

    def apply(params: Any, x: Any) -> Any:
        return x @ params + jnp.where(x[:, :1] == 7, bad, 0.0)

    net = multi_branch(from_functions(lambda key, x: jax.random.normal(key, (x.shape[1], 1)), apply), 5)
    spec = TrainingSpec(0, max_steps=9, check_every=3, schedule=CONSTANT, streaming=streaming, branch_chunk=2)
    for solution in train_as(net, binary_hinge(), data, spec, num_solutions=1 if streaming == "on" else 3):
        assert solution.status == "diverged"
        assert solution.steps == (1 if streaming == "on" else 3)
        assert math.isnan(solution.batch_loss)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("streaming", ["off", "on"])
def test_parameters_that_the_last_step_ruins_are_named_diverged(
    streaming: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    data = labelled(rng, task="regression")
    spec = spec_with(max_steps=1, learning_rate=1e308, optimizer=sgd(), streaming=streaming)
    data.y[:] = 1e6

    def call(**files: Any) -> list[Solution]:
        return train_as(multi_branch(mlp((4,), 1), 2), squared(), data, spec, num_solutions=1, **files)

    (got,) = finished(tmp_path, call)
    assert math.isfinite(got.batch_loss)
    assert got.status == rows(tmp_path / "metrics.jsonl")[-1]["status"] == "diverged"
    assert call(checkpoints=tmp_path / "checkpoints")[0].status == "diverged"


@pytest.mark.usefixtures("x64")
def test_one_that_diverges_leaves_the_others_alone(rng: np.random.Generator) -> None:
    data, net = labelled(rng), network()
    bad = solution_key(0, 1)

    def init(key: Any, x: Any, /) -> Any:
        params, state = net.init(key, x)
        bits = jax.random.key_data(jax.random.split(bad, 3)[0])
        is_bad = jnp.all(jax.random.key_data(key) == bits)
        return jax.tree.map(lambda w: jnp.where(is_bad, jnp.nan, w), params), state

    got = train_as(net._replace(init=init), binary_hinge(), data, SPEC, num_solutions=3)
    assert [(s.status, s.steps) for s in got] == [("max_steps", 9), ("diverged", 3), ("max_steps", 9)]
    expected = train_as(net, binary_hinge(), data, SPEC, num_solutions=3)
    for k in (0, 2):
        close(got[k].params, expected[k].params)


@pytest.mark.usefixtures("x64")
def test_no_step_gives_the_initial_point(tmp_path: Path, rng: np.random.Generator) -> None:
    data, net, spec = labelled(rng), network(), spec_with(max_steps=0)
    with Metrics(tmp_path / "m.jsonl") as metrics:
        got = train_as(net, binary_hinge(), data, spec, seed=4, num_solutions=2, metrics=metrics, checkpoints=tmp_path)
    assert [(s.steps, s.status) for s in got] == [(0, "max_steps")] * 2
    assert all(math.isnan(s.batch_loss) for s in got)
    assert rows(tmp_path / "m.jsonl") == []
    for k, s in enumerate(got):
        key = jax.random.split(solution_key(4, k), 3)[0]
        close(s.params, jax.jit(net.init)(key, jnp.asarray(data.x[:1]))[0])


@pytest.mark.usefixtures("x64")
def test_the_full_batch_is_a_batch_of_all_examples(rng: np.random.Generator) -> None:
    data, net = labelled(rng), network()
    full = train_as(net, binary_hinge(), data, spec_with(batch_size=0), num_solutions=3)
    explicit = train_as(net, binary_hinge(), data, spec_with(batch_size=len(data.y)), num_solutions=3)
    for a, b in zip(full, explicit, strict=True):
        close(a.params, b.params, 1e-11)


@pytest.mark.optimized
@pytest.mark.usefixtures("x64")
def test_segments_do_not_change_the_run_and_the_last_may_be_short(tmp_path: Path, rng: np.random.Generator) -> None:
    data, net, spec = labelled(rng), network(), spec_with(max_steps=11)
    with Metrics(tmp_path / "m.jsonl") as metrics:
        (got,) = train_as(net, binary_hinge(), data, spec, num_solutions=1, metrics=metrics)
    assert [r["step"] for r in rows(tmp_path / "m.jsonl")] == [3, 6, 9, 11]
    (whole,) = train_as(net, binary_hinge(), data, spec_with(max_steps=11, check_every=100), num_solutions=1)
    assert (got.steps, whole.steps) == (11, 11)
    close(got.params, whole.params, 1e-12)


@pytest.mark.usefixtures("x64")
def test_images_standardised_on_the_fly_equal_float_data(rng: np.random.Generator) -> None:
    data = images(rng)
    data = data._replace(mean=data.mean.astype(np.float64), std=data.std.astype(np.float64))
    ready = data._replace(
        x=(data.x.astype(np.float64) - data.mean) / data.std, mean=np.zeros((1, 1, 1)), std=np.ones((1, 1, 1))
    )
    net = network(out=3)
    for batch_size in (0, 6):
        spec = spec_with(batch_size=batch_size, max_steps=3)
        on_the_fly, floats = (train_as(net, crammer_singer(), d, spec, num_solutions=1)[0] for d in (data, ready))
        close(on_the_fly.params, floats.params, 1e-11)
        assert on_the_fly.params[0]["kernel"].dtype == np.float64


# --- resuming ---------------------------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for the end of the process."""


class KillingMetrics(Metrics):
    """Raises in place of the n-th line."""

    left: int

    def write(self, step: Any, **values: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed
        super().write(step, **values)


def killed_at(line: int, folder: Path, call: Callable[..., Any]) -> None:
    metrics = KillingMetrics(folder / "metrics.jsonl")
    metrics.left = line
    with metrics, pytest.raises(Killed):
        call(checkpoints=folder / "checkpoints", metrics=metrics)


def finished(folder: Path, call: Callable[..., Any]) -> list[Solution]:
    with Metrics(folder / "metrics.jsonl") as metrics:
        return call(checkpoints=folder / "checkpoints", metrics=metrics)


def mlp_case(seed: int) -> Callable[..., Any]:
    # Sizes at which, in float32, programs for one, two and three solutions round differently (on the CPU at least).
    rng = np.random.default_rng(seed)
    data = labelled(rng, 61, 37, "multiclass", np.float32)
    spec = TrainingSpec(
        13,
        max_steps=12,
        optimizer=sgd(0.9),
        chain=("scale_by_adam()",),
        schedule=Component("plateau", {"min_delta": 0.05}),
        check_every=3,
        checkpoint_seconds=0.0,
    )
    net = network((8, 8), 1, 3)
    return lambda **files: train_as(net, multi_margin(), data, spec, learning_rate=0.02, seed=seed, **files)


def conv_case(seed: int) -> Callable[..., Any]:
    data = images(np.random.default_rng(seed), 22)
    net = multi_branch(conv((3,), 3, batch_norm=True, dropout=0.3), 2)
    spec = spec_with(batch_size=5, max_steps=6)
    return lambda **files: train_as(net, logistic(), data, spec, seed=seed, num_solutions=1, **files)


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("case", "seed", "kills"),
    [(mlp_case, 0, (7,)), (mlp_case, 1, (1, 5)), (conv_case, 2, (1,))],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one_bit_for_bit(
    case: Any, seed: int, kills: tuple[int, ...], tmp_path: Path
) -> None:
    call = case(seed)
    expected = finished(tmp_path / "whole", call)
    for line in kills:
        killed_at(line, tmp_path / "cut", call)
    same_solutions(finished(tmp_path / "cut", call), expected)
    assert rows(tmp_path / "cut" / "metrics.jsonl") == rows(tmp_path / "whole" / "metrics.jsonl")


@pytest.mark.optimized
@pytest.mark.parametrize(("saves", "seconds"), [(4, 1e9), (5, 1e9), (4, 0.0), (5, 0.0), (8, 0.0)])
def test_solutions_left_at_different_steps_catch_up_bit_for_bit(
    saves: int, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = mlp_case(saves)
    expected = finished(tmp_path / "whole", call)
    ticks = itertools.count()  # a clock that makes the kill come at the same step each time
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=lambda: float(next(ticks))))
    monkeypatch.setattr(loop, "_SECONDS", seconds)  # of one call: of 0 it takes one step
    save, left = Checkpointer.save, saves

    def killing(self: Checkpointer, *args: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        save(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpointer, "save", killing)
        with pytest.raises(Killed):
            finished(tmp_path / "cut", call)
    steps = []
    for k in range(3):
        with Checkpointer(tmp_path / "cut" / "checkpoints" / f"solution_{k}") as saver:
            steps.append(saver.steps()[-1])
    assert len(set(steps)) == 2
    assert seconds > 0 or any(step % 3 for step in steps)  # within a segment
    same_solutions(finished(tmp_path / "cut", call), expected)
    assert rows(tmp_path / "cut" / "metrics.jsonl") == rows(tmp_path / "whole" / "metrics.jsonl")


@pytest.mark.usefixtures("x64")
def test_a_kill_in_the_second_group_keeps_the_first(tmp_path: Path, rng: np.random.Generator) -> None:
    data, net, spec = labelled(rng), network(), spec_with(max_steps=11)

    def call(**files: Any) -> list[Solution]:
        return train_as(net, binary_hinge(), data, spec, num_solutions=2, group_size=1, **files)

    expected = finished(tmp_path / "whole", call)
    killed_at(6, tmp_path / "cut", call)
    same_solutions(finished(tmp_path / "cut", call), expected)
    assert rows(tmp_path / "cut" / "metrics.jsonl") == rows(tmp_path / "whole" / "metrics.jsonl")


@pytest.mark.usefixtures("x64")
def test_finished_solutions_are_read_not_trained_again(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, net = labelled(rng), network()

    def call(**files: Any) -> list[Solution]:
        return train_as(net, binary_hinge(), data, spec_with(checkpoint_seconds=60.0), num_solutions=3, **files)

    expected = finished(tmp_path, call)
    lines = (tmp_path / "metrics.jsonl").read_bytes()

    def no_segment(*args: Any) -> Any:
        def segment(*args: Any) -> Any:
            raise RuntimeError("trained again")

        return segment

    monkeypatch.setattr(together, "make_segment", no_segment)
    same_solutions(finished(tmp_path, call), expected)
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines
    with pytest.raises(RuntimeError, match="trained again"):
        call()


OTHER_RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 1}, "the seed is 0 and not 1"),
    "network": ({"net": network((5,))}, "the network differs"),
    "mean and sum": ({"net": network(reduce="sum")}, "the network differs"),
    "initialisation": ({"net": multi_branch(mlp((4,), 1), 2)}, "the network differs"),
    "loss": ({"loss": binary_hinge(2.0)}, "the loss differs"),
    "learning rate": ({"learning_rate": 0.25}, "the learning rate is 0.3 and not 0.25"),
    "rate of the spec": ({"spec": spec_with(learning_rate=0.1)}, "the learning rate is 0.3 and not 0.1"),
    "scaling": ({"spec": spec_with(lr_scaling="branches")}, "the learning rate is 0.3 and not 0.6"),
    "batch size": ({"spec": spec_with(batch_size=6)}, "the batch size is 8 and not 6"),
    "momentum": ({"spec": spec_with(optimizer=sgd(0.4))}, "the optimiser differs"),
    "no momentum": ({"spec": spec_with(optimizer=sgd())}, "the optimiser differs"),
    "chain": ({"spec": spec_with(chain=("scale_by_adam()",))}, "the optimiser differs"),
    "schedule": ({"spec": spec_with(schedule=Component("plateau", {}))}, "the schedule differs"),
    "looks": ({"spec": spec_with(check_every=2)}, "the interval of the schedule's looks is 3 and not 2"),
    "tolerance": ({"spec": spec_with(tolerance=0.1)}, "the tolerance is 1e-05 and not 0.1"),
}


@pytest.mark.usefixtures("x64")
def test_solutions_of_another_run_are_refused_and_the_difference_is_named(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    data = labelled(rng)

    def call(**changes: Any) -> list[Solution]:
        given = {"net": network(), "loss": binary_hinge(), "data": data, "spec": SPEC, **changes}
        return train_as(**given, num_solutions=1, checkpoints=tmp_path)

    first = call()
    for case, (changes, words) in OTHER_RUNS.items():
        with pytest.raises(IdentityError) as error:
            call(**changes)
        assert f"solution_0 holds another run: {words}" in str(error.value), case
    same_solutions(call(), first)


@pytest.mark.parametrize("field", ["x", "y", "mean", "std"])
@pytest.mark.usefixtures("x64")
def test_solutions_of_other_data_are_refused(field: str, tmp_path: Path, rng: np.random.Generator) -> None:
    data = images(rng)
    net = network(out=3)
    spec = spec_with(max_steps=3)
    train_as(net, multi_margin(), data, spec, num_solutions=1, checkpoints=tmp_path)
    changed = getattr(data, field).copy()
    changed.flat[rng.integers(changed.size)] += 1
    with pytest.raises(IdentityError, match="solution_0 holds another run: the data differs; give another folder"):
        train_as(net, multi_margin(), data._replace(**{field: changed}), spec, num_solutions=1, checkpoints=tmp_path)
    copied = data._replace(x=data.x.copy(), name="renamed", info={"another": "folder"})
    train_as(net, multi_margin(), copied, spec, num_solutions=1, checkpoints=tmp_path)


@pytest.mark.usefixtures("x64")
def test_a_solution_in_the_place_of_another_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    data = labelled(rng)
    train_as(network(), binary_hinge(), data, SPEC, num_solutions=1, checkpoints=tmp_path)
    (tmp_path / "solution_0").rename(tmp_path / "solution_1")
    with pytest.raises(IdentityError, match="solution_1 holds another run: the solution is 0 and not 1"):
        train_as(network(), binary_hinge(), data, SPEC, num_solutions=2, checkpoints=tmp_path)


@pytest.mark.optimized
@pytest.mark.usefixtures("x64")
def test_a_run_may_be_made_longer_but_not_shorter(tmp_path: Path, rng: np.random.Generator) -> None:
    data, net = labelled(rng), network()

    def call(steps: int, schedule: Component = CONSTANT, folder: Path | None = None) -> list[Solution]:
        spec = spec_with(max_steps=steps, schedule=schedule)
        return train_as(net, binary_hinge(), data, spec, num_solutions=2, checkpoints=folder)

    call(6, folder=tmp_path / "a")
    same_solutions(call(12, folder=tmp_path / "a"), call(12))
    with pytest.raises(IdentityError, match="it stands at step 12 and max_steps is 9"):
        call(9, folder=tmp_path / "a")
    cosine = Component("cosine", {})  # its rate depends on the length of the run
    call(6, cosine, tmp_path / "b")
    with pytest.raises(IdentityError, match="the schedule differs"):
        call(12, cosine, tmp_path / "b")


@pytest.mark.optimized
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("streaming", ["off", "on"])
@pytest.mark.parametrize(("steps", "solutions"), [((5, 14), (2, 2)), ((1, 7, 16), (2, 1, 2)), ((8, 8, 10), (1, 2, 2))])
def test_a_run_made_longer_looks_where_it_would_have_looked(
    steps: tuple[int, ...], solutions: tuple[int, ...], streaming: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """From ends within a segment too: rates that hang on each look, the mean losses, the status and the metrics."""
    data, net = labelled(rng), multi_branch(mlp((4,), 1), 2)
    plateau = Component("plateau", {"factor": 0.5, "min_delta": 10.0, "max_decays": 99, "patience": 1})

    def call(name: str, max_steps: int, count: int) -> list[Solution]:
        spec = spec_with(max_steps=max_steps, schedule=plateau, streaming=streaming)
        with Metrics(tmp_path / f"{name}.jsonl") as metrics:
            options = {"num_solutions": count, "checkpoints": tmp_path / name, "metrics": metrics}
            return train_as(net, binary_hinge(), data, spec, **options)

    for limit, count in zip(steps, solutions, strict=True):
        longer = call("longer", limit, count)
    fresh = call("fresh", steps[-1], solutions[-1])
    for a, b in zip(longer, fresh, strict=True):
        same_bits(a.network.read(0, 2), b.network.read(0, 2))
        assert (a.steps, a.status, a.batch_loss) == (b.steps, b.status, b.batch_loss)
    assert rows(tmp_path / "longer.jsonl") == rows(tmp_path / "fresh.jsonl")


@pytest.mark.optimized
@pytest.mark.parametrize("streaming", ["off", "on"])
@pytest.mark.parametrize("end", ["converged", "plateau"])
def test_a_run_that_ended_in_a_segment_cut_short_goes_on_where_it_is_made_longer(
    end: str, streaming: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """The longer run would not have looked there; asked for again at its own length it has ended."""
    data, net = labelled(rng), multi_branch(mlp((4,), 1), 2)
    ends = {"factor": 0.5, "min_delta": 10.0, "max_decays": 1, "patience": 1}
    changes: dict[str, Any] = {
        "converged": {"tolerance": 1e6},
        "plateau": {"schedule": Component("plateau", ends)},
    }[end]
    whole = {"converged": 4, "plateau": 12}[end]  # steps at the look that ends the run, every 4th
    cut = whole - 1

    def call(name: str, max_steps: int) -> Solution:
        spec = spec_with(max_steps=max_steps, streaming=streaming, check_every=4, **changes)
        with Metrics(tmp_path / f"{name}.jsonl") as metrics:
            options = {"num_solutions": 1, "checkpoints": tmp_path / name, "metrics": metrics}
            (solution,) = train_as(net, binary_hinge(), data, spec, **options)
        return solution

    for _ in range(2):
        shorter = call("longer", cut)
        assert (shorter.steps, shorter.status) == (cut, end)
    longer, fresh = call("longer", 20), call("fresh", 20)
    assert (longer.steps, longer.status, longer.batch_loss) == (fresh.steps, fresh.status, fresh.batch_loss)
    assert (fresh.steps, fresh.status) == (whole, end)
    same_bits(longer.network.read(0, 2), fresh.network.read(0, 2))
    assert rows(tmp_path / "longer.jsonl") == rows(tmp_path / "fresh.jsonl")


@pytest.mark.usefixtures("x64")
def test_checkpoints_that_do_not_say_whose_they_are_are_refused(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpointer.save

    def without(self: Checkpointer, step: Any, state: Any, meta: Any) -> None:
        save(self, step, state, {k: v for k, v in meta.items() if k != "identity"})

    data = labelled(rng)
    with monkeypatch.context() as patched:
        patched.setattr(Checkpointer, "save", without)
        train_as(network(), binary_hinge(), data, SPEC, num_solutions=1, checkpoints=tmp_path)
    with pytest.raises(IdentityError, match="solution_0 does not say which run it is of"):
        train_as(network(), binary_hinge(), data, SPEC, num_solutions=1, checkpoints=tmp_path)


@pytest.mark.usefixtures("x64")
def test_another_version_of_jax_is_logged(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = labelled(rng)
    train_as(network(), binary_hinge(), data, spec_with(max_steps=3), num_solutions=1, checkpoints=tmp_path)
    assert caplog.text == ""
    monkeypatch.setattr(identity, "versions", lambda: {"jax": "99.1"})
    train_as(network(), binary_hinge(), data, SPEC, num_solutions=1, checkpoints=tmp_path)
    assert f"was written under jax {jax.__version__} and goes on under 99.1" in caplog.text
    monkeypatch.setattr(identity, "versions", lambda: {"jax": "99.2"})
    with pytest.raises(IdentityError, match=r"the loss differs \(written under jax 99\.1, now 99\.2\)"):
        train_as(network(), binary_hinge(2.0), data, SPEC, num_solutions=1, checkpoints=tmp_path)


@pytest.mark.parametrize("num_branches", [1, 3])
@pytest.mark.usefixtures("x64")
def test_the_rate_of_the_spec_is_scaled_by_the_number_of_branches(num_branches: int, rng: np.random.Generator) -> None:
    data, net = labelled(rng), network(num_branches=num_branches)
    for scaling, factor in (("branches", num_branches), ("none", 1.0), ("inverse_branches", 1 / num_branches)):
        got = train_as(net, binary_hinge(), data, spec_with(lr_scaling=scaling), num_solutions=1)
        wanted = train_as(net, binary_hinge(), data, SPEC, learning_rate=0.3 * factor, num_solutions=1)
        same_solutions(got, wanted)


@pytest.mark.optimized
@pytest.mark.parametrize("batch_size", [5, 0])
def test_calls_cut_short_by_the_clock_change_no_bit(
    batch_size: int, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, net = labelled(rng), network()
    spec = spec_with(batch_size=batch_size, max_steps=23, check_every=8)
    found, lengths = {}, {}
    for name, seconds, cut in (("steps", 0.0, True), ("segments", 1e9, True), ("as on accelerators", 0.0, False)):
        monkeypatch.setattr(loop, "_SECONDS", seconds)
        monkeypatch.setattr(together, "any_length", lambda cut=cut: cut)
        taken: list[int] = []
        advance = together.Together.advance

        def watched(self: Any, carry: Any, steps: Any, taken: list[int] = taken, advance: Any = advance) -> Any:
            taken.append(steps.length)
            return advance(self, carry, steps)

        with monkeypatch.context() as patched, Metrics(tmp_path / f"{name}.jsonl") as metrics:
            patched.setattr(together.Together, "advance", watched)
            found[name] = train_as(net, binary_hinge(), data, spec, num_solutions=2, metrics=metrics)
        lengths[name] = taken
    assert lengths == {"steps": [1] * 23, "segments": [1, 2, 4, 1, 8, 7], "as on accelerators": [8, 8, 7]}
    for name in ("steps", "as on accelerators"):
        same_solutions(found[name], found["segments"])
        assert rows(tmp_path / f"{name}.jsonl") == rows(tmp_path / "segments.jsonl")


@pytest.mark.usefixtures("x64")
def test_segments_share_their_compiled_programs(rng: np.random.Generator) -> None:
    data, net, traced = labelled(rng), network(), []

    def apply(*args: Any, **options: Any) -> Any:
        traced.append(1)
        return net.apply(*args, **options)

    counts = []
    for max_steps in (3, 60, 62):
        traced.clear()
        spec = spec_with(max_steps=max_steps, tolerance=0.0)
        train_as(net._replace(apply=apply), binary_hinge(), data, spec, num_solutions=1)
        counts.append(len(traced))
    # One program for one segment as for twenty, and for a short segment at the end.
    assert counts[0] == counts[1] == counts[2]


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [7, 24, 1000])
@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
@pytest.mark.usefixtures("x64")
def test_evaluate_equals_numpy_on_the_whole_set(task: str, batch_size: int, rng: np.random.Generator) -> None:
    data = labelled(rng, 24, 5, task)
    mean, std = rng.normal(size=5), rng.uniform(0.5, 2, 5)
    data = data._replace(mean=mean, std=std)
    params = tuple(
        {"kernel": jnp.asarray(rng.normal(size=(2, o, i))), "bias": jnp.asarray(rng.normal(size=(2, o)))}
        for i, o in ((5, 4), (4, data.num_outputs))
    )
    x = (data.x - mean) / std
    s = np.zeros((24, data.num_outputs))
    for i in range(2):
        (w, b), (v, c) = (tuple(np.asarray(layer[k][i]) for k in ("kernel", "bias")) for layer in params)
        s += (np.maximum(x @ w.T + b, 0) @ v.T + c) / 2
    loss: Loss
    if task == "binary":
        margins, loss = data.y * s[:, 0], binary_hinge(0.5)
        expected, accuracy = np.maximum(0, 1 - margins / 0.5).mean(), (margins > 0).mean()
    elif task == "multiclass":
        own = s[np.arange(24), data.y]
        margins, loss = np.array([min(own[k] - np.delete(s[k], data.y[k])) for k in range(24)]), crammer_singer()
        expected, accuracy = np.maximum(0, 1 - margins).mean(), (s.argmax(1) == data.y).mean()
    else:
        margins, loss = None, squared()
        expected, accuracy = 0.5 * np.mean((s[:, 0] - data.y.astype(np.float64)) ** 2), math.nan
    got = evaluate(multi_branch(mlp((4,), data.num_outputs), 2), loss, data, InMemory(params), batch_size=batch_size)
    assert got.loss == pytest.approx(expected, rel=1e-12)
    assert got.accuracy == pytest.approx(accuracy, nan_ok=True)
    if margins is None:
        assert got.margins is None
    else:
        np.testing.assert_allclose(got.margins, margins, rtol=1e-11, atol=1e-12)


def test_evaluate_uses_the_stored_statistics_of_batch_norm(rng: np.random.Generator) -> None:
    data = images(rng)
    net = multi_branch(conv((3,), 3, batch_norm=True, dropout=0.5), 2)
    x = jnp.asarray((data.x.astype(np.float32) - data.mean) / data.std)
    params, state = jax.jit(net.init)(jax.random.key(0), x[:1])
    state = jax.tree.map(lambda a: a + 0.3, state)
    outputs = np.asarray(jax.jit(net.apply)(params, state, x)[0], np.float64)
    expected = np.log(np.exp(outputs).sum(1)) - outputs[np.arange(20), data.y]
    got = evaluate(net, logistic(), data, InMemory(params, state), batch_size=6)
    assert got.loss == pytest.approx(expected.mean(), rel=1e-5)
    assert got.accuracy == pytest.approx((outputs.argmax(1) == data.y).mean())


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": -1}, "batch_size=-1 must be at least 0"),
        ({"max_steps": -5}, "max_steps=-5 must be at least 0"),
        ({"check_every": 0}, "check_every=0 must be at least 1"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0 must be positive"),
        ({"learning_rate": -0.1}, r"learning_rate=-0\.1 must be positive"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be positive"),
        ({"learning_rate": math.inf}, "learning_rate=inf must be positive and finite"),
        ({"weight_decay": -1e-4}, r"weight_decay=-0\.0001 must be at least 0"),
        ({"tolerance": -1e-5}, "tolerance=-1e-05 must be at least 0"),
        ({"checkpoint_seconds": -1.0}, r"checkpoint_seconds=-1\.0 must be at least 0"),
    ],
)
def test_a_specification_refuses_values_out_of_range(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingSpec(**settings)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "clip_by_global_norm(",
        "clip_by_global_norm()",
        "clip_by_globl_norm(1.0)",
        "scale_by_adam(b9=1)",
        "scale_by_adam(b1=open('x'))",
        "optax.scale_by_adam()",
        "__import__('os').getcwd()",
        "linear_schedule(1.0, 0.0, 5)",
        "1 + 1",
        "adam(0.1)",
        "sgd(0.1)",
        "scale(-1.0)",
    ],
)
def test_a_chain_takes_optax_transformations_of_gradients_only(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingSpec(chain=("scale_by_adam()", text)).arguments(1)
    assert str(caught.value).startswith(f"training.chain: {text!r} ")
    assert "clip_by_global_norm(1.0)" in str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        ("plateau", {"factor": 1.0}, r"factor=1\.0 must lie in \(0, 1\)"),
        ("plateau", {"max_decays": -1}, "max_decays=-1"),
        ("plateau", {"patience": 0}, "patience=0"),
        ("cosine", {"final": -0.1}, r"final=-0\.1"),
        ("cosine", {"warmup": 11}, "warmup=11 must lie between 0 and max_steps=10"),
        ("cosine", {"warmup": -1}, "warmup=-1"),
    ],
)
def test_schedules_refuse_values_out_of_range(schedule: str, settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedules.SCHEDULES.build(schedule, max_steps=10, **settings)


@pytest.fixture
def small(rng: np.random.Generator) -> tuple[Network, Dataset]:
    return network(), labelled(rng, dtype=np.float32)


def test_unknown_names_are_named_with_near_matches(small: tuple[Network, Dataset]) -> None:
    net, data = small
    with pytest.raises(UnknownNameError, match=r"unknown schedule 'plateu'. Did you mean 'plateau'"):
        train_as(net, binary_hinge(), data, TrainingSpec(8, schedule=Component("plateu", {})))
    with pytest.raises(
        UnknownNameError, match=r"unknown setting of schedule 'plateau': 'pacience'. Did you mean 'pati"
    ):
        train_as(net, binary_hinge(), data, TrainingSpec(8, schedule=Component("plateau", {"pacience": 1})))


def test_an_unknown_scaling_is_named_with_near_matches() -> None:
    spec = TrainingSpec()
    object.__setattr__(spec, "lr_scaling", "branch")  # the type checker of the tests would not let it in
    with pytest.raises(ConfigError, match=r"training.lr_scaling: 'branch'. Did you mean 'branches'"):
        spec.__post_init__()


def test_a_loss_that_does_not_fit_the_labels_is_refused(small: tuple[Network, Dataset]) -> None:
    net, data = small
    for call in (
        lambda: train_as(net, multi_margin(), data, TrainingSpec(8, max_steps=1)),
        lambda: evaluate(net, multi_margin(), data, InMemory(*net.init(jax.random.key(0), jnp.asarray(data.x[:1])))),
    ):
        with pytest.raises(ConfigError, match="loss fits multiclass labels, but data set 'drawn' has binary labels"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": TrainingSpec(25)}, "batch_size=25 exceeds the 24 examples; use 0 for the full data set"),
        ({"num_solutions": 0}, "num_solutions=0 must be at least 1"),
        ({"group_size": 0}, "group_size=0 must be at least 1"),
        ({"learning_rate": -0.5}, r"learning_rate=-0\.5 must be positive"),
    ],
)
def test_train_refuses_numbers_out_of_range(options: Any, message: str, small: tuple[Network, Dataset]) -> None:
    net, data = small
    with pytest.raises(ConfigError, match=message):
        train_as(net, binary_hinge(), data, **{"spec": TrainingSpec(8), **options})


@pytest.mark.parametrize("batch_size", [0, -3])
def test_evaluate_refuses_a_batch_size_below_one(batch_size: int, small: tuple[Network, Dataset]) -> None:
    net, data = small
    params, state = net.init(jax.random.key(0), jnp.asarray(data.x[:1]))
    with pytest.raises(ConfigError, match=f"batch_size must be a positive integer, got {batch_size}"):
        evaluate(net, binary_hinge(), data, InMemory(params, state), batch_size=batch_size)


def test_memory_available_is_a_number_of_bytes() -> None:
    assert 2**20 < memory_available() < 2**60
