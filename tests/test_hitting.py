"""The runs of Table 1 against one-by-one training, each other, and closed forms."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array
from scipy import stats

from dualgap_jax import hitting, losses, schedules
from dualgap_jax.config import Component, ConfigError
from dualgap_jax.data import Dataset, synthetic_relu
from dualgap_jax.evaluation import evaluate
from dualgap_jax.hitting import STATUSES, Outcome, Runs, SgdSpec, block, make_runs, train_runs
from dualgap_jax.identity import IdentityError
from dualgap_jax.metrics import Metrics, read_metrics
from dualgap_jax.networks import mlp
from dualgap_jax.networks.sources import InMemory
from dualgap_jax.optimizers import for_network
from dualgap_jax.training.engine import Carry, begin
from dualgap_jax.training.together import step as training_step
from dualgap_jax.types import Network


def data(seed: int = 3, n: int = 45, d: int = 3, **settings: Any) -> Dataset:
    return synthetic_relu(n=n, d=d, teacher_width=2, seed=seed, **settings)


def hard(seed: int = 6) -> Dataset:
    """Data on which narrow networks often fail."""
    return synthetic_relu(n=100, d=4, teacher_width=5, seed=seed)


def tiny(**changes: Any) -> SgdSpec:
    return dataclasses.replace(SgdSpec(steps=40, batch_size=7, check_every=20, lanes=16), **changes)


def equal(a: Outcome, b: Outcome, chosen: Any = slice(None)) -> None:
    """Every number of `a` is that of the chosen runs of `b`, bit for bit; heights may differ."""
    for name in ("final_loss", "losses", "steps", "status"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name)[chosen], err_msg=name)
    for mine, other in zip(a.weights, b.weights, strict=True):
        other = other[chosen]
        if mine.ndim > 1:
            top = max(mine.shape[1], other.shape[1])
            mine, other = (np.pad(w, [(0, 0), (0, top - w.shape[1])] + [(0, 0)] * (w.ndim - 2)) for w in (mine, other))
        np.testing.assert_array_equal(mine, other)


# --- random numbers ---------------------------------------------------------------------------------------------------


def test_threefry_is_that_of_jax(rng: np.random.Generator) -> None:
    for seed in rng.integers(0, 2**31, 5):
        key = jax.random.key(int(seed))
        k0, k1 = jax.random.key_data(key)
        x0, x1 = hitting.random.threefry(k0, k1, jnp.uint32(0), jnp.arange(33, dtype=jnp.uint32))
        np.testing.assert_array_equal(x0 ^ x1, jax.random.bits(key, (33,), jnp.uint32))


def test_bits_become_numbers_below_n(rng: np.random.Generator) -> None:
    bits = np.concatenate([rng.integers(0, 2**32, 2000, dtype=np.uint32), np.uint32([0, 2**32 - 1])])
    for n in (1, 2, 10, 999, 1000, 2**16 - 1):
        np.testing.assert_array_equal(hitting.random.below(jnp.asarray(bits), n), bits.astype(np.uint64) * n >> 32)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12, 97, 1000, 1009, 4096])
def test_permutations_are_bijections(n: int, rng: np.random.Generator) -> None:
    k0, k1 = jnp.asarray(rng.integers(0, 2**32, (2, 1, 32), dtype=np.uint32))
    place = jnp.broadcast_to(jnp.arange(n, dtype=jnp.uint32)[:, None], (n, 32))
    image = np.asarray(jax.jit(hitting.random.permuted, static_argnums=3)(place, k0, k1, n))
    np.testing.assert_array_equal(np.sort(image, axis=0), place)
    if n > 90:
        assert len({tuple(column) for column in image.T}) == 32


@pytest.mark.parametrize("n", [12, 13])
def test_permutations_look_uniform(n: int, rng: np.random.Generator) -> None:
    """Images of single places and of pairs of places, over 60,000 keys, against the uniform law."""
    count = 60_000
    k0, k1 = jnp.asarray(rng.integers(0, 2**32, (2, 1, count), dtype=np.uint32))
    place = jnp.broadcast_to(jnp.arange(n, dtype=jnp.uint32)[:, None], (n, count))
    image = np.asarray(jax.jit(hitting.random.permuted, static_argnums=3)(place, k0, k1, n)).astype(int)
    for i in range(n):
        assert stats.chisquare(np.bincount(image[i], minlength=n)).pvalue > 1e-6
        j = (i + 1) % n
        pairs = np.bincount(image[i] * n + image[j], minlength=n * n).reshape(n, n)
        assert stats.chisquare(pairs[~np.eye(n, dtype=bool)]).pvalue > 1e-6


@pytest.mark.parametrize(("n", "batch_size"), [(30, 7), (30, 10), (31, 31), (25, 24), (45, 1)])
def test_an_epoch_repeats_no_example(n: int, batch_size: int, rng: np.random.Generator) -> None:
    keys = jnp.asarray(rng.integers(0, 2**32, (2, 16), dtype=np.uint32))
    per_epoch = n // batch_size
    draw = jax.jit(
        lambda step: hitting.random.draw(step, keys, n=n, batch_size=batch_size, order="epochs", count=batch_size)
    )
    first = np.concatenate([draw(t) for t in range(per_epoch)])
    second = np.concatenate([draw(t) for t in range(per_epoch, 2 * per_epoch)])
    for lane in range(16):
        for epoch in (first, second):
            assert len(set(epoch[:, lane])) == per_epoch * batch_size
            assert epoch[:, lane].min() >= 0
            assert epoch[:, lane].max() < n
    if 1 < batch_size < n:
        assert (first != second).any(axis=0).all()
        assert (first[:, :1] != first[:, 1:]).any(axis=0).all()


def test_independent_draws_are_uniform(rng: np.random.Generator) -> None:
    keys = jnp.asarray(rng.integers(0, 2**32, (2, 64), dtype=np.uint32))
    draw = jax.jit(lambda step: hitting.random.draw(step, keys, n=23, batch_size=10, order="independent", count=20))
    seen = np.stack([draw(t) for t in range(100)])
    assert stats.chisquare(np.bincount(seen.ravel(), minlength=23)).pvalue > 1e-6
    pairs = np.bincount(seen[:, 0].ravel() * 23 + seen[:, 1].ravel(), minlength=23 * 23)
    assert stats.chisquare(pairs).pvalue > 1e-6
    np.testing.assert_array_equal(seen[5], draw(5))
    whole = hitting.random.draw(jnp.int32(0), keys, n=23, batch_size=23, order="independent", count=23)
    assert all(len(set(lane)) < 23 for lane in np.asarray(whole).T)  # also where a batch is as large as the data


# --- one run is plain SGD ---------------------------------------------------------------------------------------------


def one_by_one(dataset: Dataset, loss: losses.Loss, runs: Runs, k: int, spec: SgdSpec) -> tuple[Network, Any]:
    """The k-th run by `together.step`, one step after another on its own mini-batches."""
    net = mlp(
        hidden=(int(runs.width[k]),),
        out=1,
        use_bias=spec.use_bias,
        init=spec.init,
        init_scale=float(runs.init_scale[k]),
    )
    schedule = schedules.SCHEDULES.build(spec.schedule.name, max_steps=spec.steps, **spec.schedule.settings)
    key = jax.random.fold_in(jax.random.key(int(runs.seed[k])), int(runs.width[k]))
    init_key, order_key = jax.random.split(key)
    x, y = jnp.asarray(dataset.x, float), jnp.asarray(dataset.y, float)
    words = jnp.asarray(jax.random.key_data(order_key))[:, None]
    sgd = for_network(net, optax.sgd(1.0))
    carry = begin(sgd, *net.init(init_key, x[:1]))
    size = spec.batch_size or len(y)

    @jax.jit
    def step(carry: Carry, state: Any, now: Any) -> tuple[Carry, Any]:
        index = hitting.random.draw(now, words, n=len(y), batch_size=size, order=spec.order, count=size)[:, 0]
        rate = float(runs.learning_rate[k]) * schedule.rate(state, now)
        return training_step(net, loss, sgd, carry, x[index], y[index], rate, key)

    state, seen = schedule.init(), []
    for now in np.arange(spec.steps, dtype=np.int32):
        carry, value = step(carry, state, now)
        seen.append(value)
        if len(seen) == spec.check_every or now == spec.steps - 1:
            state, seen = schedule.update(state, jnp.mean(jnp.asarray(seen))), []
            if schedule.stop(state):
                break
    return net, carry.params


CASES = {
    "plain": ("binary_hinge", {}),
    "single examples": ("binary_hinge", {"batch_size": 1, "order": "independent"}),
    "chunks": ("logistic", {"batch_size": 23}),
    "full batch": ("squared", {"batch_size": 0, "check_every": 7}),
    "no bias": ("binary_hinge", {"use_bias": False, "init": "he"}),
    "plateau": ("squared", {"schedule": Component("plateau", {"min_delta": 0.2, "factor": 0.5}), "check_every": 5}),
    "cosine": ("binary_hinge", {"schedule": Component("cosine", {"final": 0.1, "warmup": 8})}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_plain_sgd(case: str, x64: None) -> None:
    name, changes = CASES[case]
    loss = losses.LOSSES.build(name)
    spec = tiny(stop_at_rest=False, **changes)
    datasets = [data(labels="real" if name == "squared" else "sign", seed=s) for s in (3, 4)]
    runs = make_runs([2, 5], [0, 1], data=[0, 1], learning_rate=[0.1, 0.05], init_scale=[1, 2])
    outcome = train_runs(datasets, loss, runs, spec)
    assert outcome.losses.dtype == np.float64
    for k, width in enumerate(runs.width):
        net, (first, last) = one_by_one(datasets[runs.data[k]], loss, runs, k, spec)
        expected = [first["kernel"], last["kernel"][0]]
        found = [outcome.weights.kernel[k], outcome.weights.head[k]]
        if spec.use_bias:
            expected += [first["bias"], last["bias"][0]]
            found += [outcome.weights.bias[k], outcome.weights.offset[k]]
        for mine, plain in zip(found, expected, strict=True):
            mine, rest = (mine[:width], mine[width:]) if mine.ndim else (mine, np.zeros(0))
            np.testing.assert_allclose(mine, plain, rtol=1e-9, atol=1e-12)
            assert (rest == 0).all()
        evaluated = evaluate(net, loss, datasets[runs.data[k]], InMemory((first, last)))
        assert outcome.final_loss[k] == pytest.approx(evaluated.loss, rel=1e-9, abs=1e-12)
        assert outcome.losses[k, -1] == pytest.approx(evaluated.loss, rel=1e-9, abs=1e-12)
    assert (outcome.losses[:, 0] != outcome.losses[:, -1]).all()


@pytest.mark.optimized
def test_the_looks_are_the_losses_on_the_way(x64: None) -> None:
    """The losses at looks are the final losses of shorter studies."""
    runs, loss = make_runs([3, 4], [0, 1], learning_rate=0.1), losses.binary_hinge()
    whole = train_runs([data()], loss, runs, tiny(steps=50))
    assert whole.losses.shape == (2, 4)
    for look, steps in enumerate((20, 40, 50), start=1):
        part = train_runs([data()], loss, runs, tiny(steps=steps))
        np.testing.assert_allclose(whole.losses[:, look], part.final_loss, rtol=1e-12)


# --- runs do not see one another --------------------------------------------------------------------------------------


@pytest.mark.optimized
@pytest.mark.parametrize("batch_size", [7, 23])
def test_a_run_alone_is_the_same_bit_for_bit(batch_size: int, rng: np.random.Generator) -> None:
    datasets, loss = [data(seed=s) for s in (3, 4)], losses.binary_hinge()
    spec = tiny(steps=150, batch_size=batch_size)
    widths, seeds = np.repeat([2, 3, 4, 6], 6), np.tile(np.arange(6), 4)
    runs = make_runs(widths, seeds, data=rng.integers(0, 2, 24), learning_rate=rng.uniform(0.05, 0.3, 24))
    together = train_runs(datasets, loss, runs, spec, workers=2)
    for k in (0, 7, 13, 23):  # one of each width
        alone = train_runs(datasets, loss, Runs(*(column[k : k + 1] for column in runs)), spec, workers=1)
        equal(alone, together, [k])
    shuffled = rng.permutation(24)
    equal(train_runs(datasets, loss, Runs(*(c[shuffled] for c in runs)), spec), together, shuffled)
    if batch_size == 7:
        equal(train_runs(datasets, loss, runs, dataclasses.replace(spec, lanes=48)), together)
        equal(train_runs(datasets, loss, runs, dataclasses.replace(spec, lanes=0)), together)


def test_runs_differ(rng: np.random.Generator) -> None:
    """Other seeds and widths are other runs, and equal ones equal runs."""
    runs = make_runs([4, 4, 5, 4], [1, 2, 1, 1], learning_rate=0.1)
    outcome = train_runs([data()], losses.binary_hinge(), runs, tiny())
    assert (outcome.weights.kernel[0] == outcome.weights.kernel[3]).all()
    assert (outcome.weights.kernel[0] != outcome.weights.kernel[1])[:4].all()
    assert (outcome.weights.kernel[2, :4] != outcome.weights.kernel[0, :4]).all()


# --- runs that are over -----------------------------------------------------------------------------------------------


@pytest.mark.optimized
def test_runs_at_rest_are_left_out_without_a_trace() -> None:
    """Stopping at rest changes nothing but the steps done; the lanes left free are filled by other runs."""
    loss, runs = losses.binary_hinge(), make_runs([4, 6], np.arange(20)[:, None], learning_rate=0.1)
    spec = tiny(steps=2000, check_every=40)
    stopped = train_runs([hard()], loss, runs, spec)
    whole = train_runs([hard()], loss, runs, dataclasses.replace(spec, stop_at_rest=False))
    rest = stopped.status == STATUSES.index("zero")
    assert 5 < rest.sum() < 40
    assert (stopped.steps[rest] < 2000).any()
    assert (stopped.final_loss[rest] == 0).all()
    np.testing.assert_array_equal(stopped.steps % 40, 0)
    assert (whole.steps == 2000).all()
    for name in ("final_loss", "losses"):
        np.testing.assert_array_equal(getattr(stopped, name), getattr(whole, name))
    jax.tree.map(np.testing.assert_array_equal, stopped.weights, whole.weights)


def test_compaction_frees_blocks(tmp_path: Path) -> None:
    spec = tiny(steps=2000, check_every=40)
    with Metrics(tmp_path / "m.jsonl") as metrics:
        runs = make_runs(6, np.arange(40), learning_rate=0.1)
        train_runs([hard()], losses.binary_hinge(), runs, spec, metrics=metrics)
    rows = read_metrics(tmp_path / "m.jsonl")
    assert rows[0]["blocks"] == 3
    assert rows[-1]["blocks"] < 3
    assert all(row["blocks"] == -(-row["running"] // 16) for row in rows)
    assert rows[-1]["hits"] >= rows[0]["hits"]


def test_other_ends() -> None:
    runs = make_runs(4, np.arange(3), learning_rate=[1e30, 0.1, 0.1])
    loss = losses.squared()
    outcome = train_runs([data(labels="real")], loss, runs, tiny(stop_below=1e9))
    assert [STATUSES[s] for s in outcome.status] == ["diverged", "below", "below"]
    assert (outcome.steps == 20).all()
    assert not np.isfinite(outcome.final_loss[0])
    schedule = Component("plateau", {"min_delta": 1e9, "max_decays": 0})
    outcome = train_runs([data(labels="real")], loss, runs, tiny(steps=200, schedule=schedule))
    assert [STATUSES[s] for s in outcome.status] == ["diverged", "schedule", "schedule"]
    assert outcome.steps[1] == 40  # from infinity the loss falls once
    assert (outcome.losses[1, 2:] == outcome.losses[1, 2]).all()


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.optimized
def test_an_interrupted_study_resumes_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, runs = losses.binary_hinge(), make_runs([4, 6], np.arange(12)[:, None], learning_rate=0.15)
    schedule = Component("plateau", {"min_delta": 0.01, "patience": 8, "max_decays": 4})
    spec = tiny(steps=1000, check_every=20, schedule=schedule, checkpoint_seconds=0.0)

    def study(folder: Path) -> Outcome:
        with Metrics(folder / "metrics.jsonl") as metrics:
            return train_runs([hard()], loss, runs, spec, checkpoints=folder / "ckpt", metrics=metrics)

    whole = study(tmp_path / "whole")
    write = Metrics.write

    def failing(self: Metrics, step: int, **values: Any) -> None:
        if step == 500:
            raise KeyboardInterrupt
        write(self, step, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            study(tmp_path / "broken")
    calls = []
    advance = hitting.study.Study.advance
    monkeypatch.setattr(
        hitting.study.Study,
        "advance",
        lambda self, chosen, first, last: (calls.append(first), advance(self, chosen, first, last)),
    )
    resumed = study(tmp_path / "broken")
    assert min(calls) == 400
    equal(resumed, whole)
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "broken")]
    assert [(r["step"], r["hits"], r["running"]) for r in rows[0]] == [
        (r["step"], r["hits"], r["running"]) for r in rows[1]
    ]
    calls.clear()
    equal(study(tmp_path / "broken"), whole)
    assert calls == []  # nothing is left to do


def test_the_checkpoints_of_another_study_are_refused_by_what_differs(tmp_path: Path) -> None:
    loss, runs, spec = losses.binary_hinge(), make_runs(4, np.arange(5)), tiny()
    whole = train_runs([data()], loss, runs, spec, checkpoints=tmp_path)
    others: list[tuple[str, tuple[Any, ...]]] = [
        ("the data differs", ([data(seed=4)], loss, runs, spec)),
        ("the loss differs", ([data()], losses.binary_hinge(0.5), runs, spec)),
        ("the list of runs differs", ([data()], loss, make_runs(4, np.arange(1, 6)), spec)),
        ("the list of runs differs", ([data()], loss, make_runs(4, np.arange(5), learning_rate=0.02), spec)),
        ("the training is", ([data()], loss, runs, tiny(batch_size=9))),
    ]
    for told, arguments in others:
        with pytest.raises(IdentityError, match=told):
            train_runs(*arguments, checkpoints=tmp_path)
    equal(train_runs([data()], loss, runs, tiny(lanes=32, checkpoint_seconds=3.0), checkpoints=tmp_path), whole)


# --- the global minimum -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 0.25])
@pytest.mark.parametrize("seed", [0, 1, 5])
def test_the_hinge_has_its_minimum_0_at_the_teacher(seed: int, tau: float) -> None:
    dataset = synthetic_relu(n=300, seed=seed)
    truth = hitting.ground_truth(dataset, losses.binary_hinge(tau))
    assert truth.loss == 0.0
    # By a third route, the plain formula; and a smaller multiple does not do.
    f = np.maximum(dataset.x.astype(float) @ truth.teacher.w.T, 0) @ truth.teacher.a
    assert (dataset.y * f).min() >= tau
    assert (dataset.y * f).min() < tau * (1 + 1e-6)
    assert truth.scale * truth.smallest_margin == pytest.approx(tau)


def test_the_squared_loss_has_its_minimum_at_the_teacher() -> None:
    truth = hitting.ground_truth(synthetic_relu(n=300, seed=2, labels="real"), losses.squared())
    assert truth.loss < 1e-12
    assert truth.scale == 1


def test_unknown_minima_are_refused() -> None:
    for labels, loss in (("sign", losses.squared()), ("sign", losses.logistic()), ("real", losses.binary_hinge())):
        with pytest.raises(ConfigError, match="global minimum is known for"):
            hitting.ground_truth(data(labels=labels), loss)
    with pytest.raises(ConfigError, match="no known teacher"):
        hitting.ground_truth(data()._replace(name="mine"), losses.binary_hinge())


# --- numbers that are none --------------------------------------------------------------------------------------------


@pytest.mark.optimized
@pytest.mark.parametrize(
    "loss", [losses.binary_hinge(), losses.logistic(), losses.squared()], ids=["hinge", "log", "sq"]
)
@pytest.mark.parametrize("lanes", [16, 48])
def test_a_weight_that_is_no_number_reaches_the_loss_wherever_it_stands(
    loss: losses.Loss, lanes: int, rng: np.random.Generator
) -> None:
    labels = "real" if loss.tasks == ("regression",) else "sign"
    runs = make_runs(5, np.arange(37))
    spec = tiny(lanes=lanes, steps=20, stop_at_rest=True)
    healthy = train_runs([data(labels=labels)], loss, runs, spec)
    chosen = rng.choice(37, 12, replace=False)
    for value in (np.nan, np.inf):
        study = hitting.study.prepare([data(labels=labels)], loss, runs, spec)
        for k, run in enumerate(chosen):
            part = study.weights[k % 3]  # a kernel, a bias, a head
            part[(run, *(int(rng.integers(size)) for size in (5, *part.shape[2:])))] = value
        hitting.study.drive(study, None, None, 1e-5, 1)
        broken = np.isin(np.arange(37), chosen)
        assert not np.isfinite(study.losses[broken, 0]).any() or value == np.inf
        assert (study.status[broken] == STATUSES.index("diverged")).sum() >= (12 if np.isnan(value) else 8)
        np.testing.assert_array_equal(study.losses[~broken], healthy.losses[~broken])


def test_runs_that_diverged_are_those_without_a_finite_loss() -> None:
    runs = make_runs(5, np.arange(6), learning_rate=[0.1, 1e30, 0.1, 1e30, 1e30, 0.1])
    outcome = train_runs([data(labels="real")], losses.squared(), runs, tiny(steps=100))
    np.testing.assert_array_equal(hitting.diverged(outcome), [False, True, False, True, True, False])
    assert not np.isfinite(outcome.final_loss[[1, 3, 4]]).any()


def test_a_bounded_loss_does_not_hide_that_a_run_diverged() -> None:
    """A loss of infinite outputs may be a number, as the hinge on the right side is; the outputs decide."""
    runs = make_runs(5, np.arange(4), init_scale=[1.0, 1e25, 1.0, 1e25])
    for loss in (lambda out, y: jnp.arctan(jnp.abs(out[:, 0] - y)), lambda out, y: jnp.where(out[:, 0] == y, 0.0, 1.0)):
        outcome = train_runs([data()], loss, runs, tiny(steps=20))
        np.testing.assert_array_equal(hitting.diverged(outcome), [False, True, False, True])
        assert np.isnan(outcome.losses[1]).all()
        assert np.isfinite(outcome.losses[0]).all()


def test_a_plain_function_and_a_pair_of_arrays_are_taken() -> None:
    made, one = losses.binary_hinge(), data()
    asked = train_runs([one], made, make_runs(3, 0), tiny(stop_at_rest=False))
    plain = train_runs([(one.x, one.y)], lambda out, y: made.per_example(out, y), make_runs(3, 0), tiny())
    np.testing.assert_array_equal(plain.final_loss, asked.final_loss)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "sgd.steps=0"),
        ({"batch_size": -1}, "sgd.batch_size=-1"),
        ({"check_every": 0}, "sgd.check_every=0"),
        ({"lanes": 20}, "multiple of 16"),
        ({"lanes": -16}, "multiple of 16"),
        ({"stop_below": math.nan}, "stop_below"),
        ({"checkpoint_seconds": -1.0}, "checkpoint_seconds"),
        ({"schedule": Component("plateau", {"factor": 2.0})}, "factor=2.0"),
        ({"schedule": Component("plateau_authors", {})}, "single mini-batches"),
    ],
)
def test_a_bad_spec_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SgdSpec(**changes)


def test_lanes_are_chosen_by_the_platform() -> None:
    asked = [SgdSpec(batch_size=size).lanes_on(platform) for platform in ("cpu", "tpu") for size in (10, 20, 21, 0)]
    assert asked == [64, 64, 128, 128] + [1024] * 4
    assert SgdSpec(lanes=32).lanes_on("gpu") == 32


def test_arguments_of_another_kind_are_refused() -> None:
    call, one, runs, spec = inspect.unwrap(train_runs), data(), make_runs(3, 0), tiny()
    for arguments, said in (
        ((one, runs, spec), r"write \[data\]"),
        ((None, runs, spec), r"write \[data\]"),
        (([one], {"width": 3}, spec), "a Runs is needed, got dict"),
        (([one], runs, 40), "a SgdSpec is needed, got int"),
    ):
        with pytest.raises(TypeError, match=said):
            call(arguments[0], losses.binary_hinge(), *arguments[1:])


def test_bad_runs_are_refused() -> None:
    for arguments, words in (
        (([], 0), "no runs"),
        ((0, 0), "width=0"),
        ((3, -1), "seed"),
        (([2, 2.5], 0), "width=\\[2, 2.5\\] must be whole numbers"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_runs(*arguments)
    with pytest.raises(ConfigError, match=r"data=0\.5 must be whole numbers"):
        make_runs(3, 0, data=0.5)
    for name in ("learning_rate", "init_scale"):
        with pytest.raises(ConfigError, match=name):
            make_runs(3, 0, **{name: 0.0})
    loss = losses.binary_hinge()
    for datasets, runs, spec, words in (
        ([], make_runs(3, 0), tiny(), "no data set"),
        ([data(), data(n=20)], make_runs(3, 0), tiny(), "different sizes"),
        ([data()], make_runs(3, 0, data=1), tiny(), "data set 1 of 1"),
        ([data()], make_runs(3, 0), tiny(batch_size=46), "exceeds the 45 examples"),
        ([data(labels="real")], make_runs(3, 0), tiny(), "regression labels"),
    ):
        with pytest.raises(ConfigError, match=words):
            train_runs(datasets, loss, runs, spec)


@pytest.mark.optimized
@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 257])
def test_a_loop_of_loops_takes_the_same_steps(count: int) -> None:
    """The one that accelerators get, whose inner length the compiler knows."""
    program = block.program_for(
        losses.binary_hinge(), "constant", (), 300, 5, "epochs", True, 20, 3, (jax.devices()[0],)
    )
    elsewhere = copy.copy(program)
    object.__setattr__(elsewhere, "devices", (SimpleNamespace(platform="gpu"),))  # it is frozen

    def body(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        return carry[0] * jnp.uint32(31) + k.astype(jnp.uint32), carry[1] + 1

    start = jnp.uint32(7), jnp.int32(0)
    loops = [jax.jit(lambda n, p=p: p._loop(n, body, start))(jnp.int32(count)) for p in (program, elsewhere)]
    assert [int(a) for a in loops[0]] == [int(a) for a in loops[1]]
    assert int(loops[0][1]) == count
    lengths = [
        eqn.params["length"]
        for outer in jax.make_jaxpr(lambda n: elsewhere._loop(n, body, start))(jnp.int32(3)).jaxpr.eqns
        if outer.primitive.name == "while"
        for eqn in outer.params["body_jaxpr"].jaxpr.eqns
        if eqn.primitive.name == "scan"
    ]
    assert lengths == [100]
