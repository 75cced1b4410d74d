"""Losses against plain loops and finite differences; margins; the check of Assumption 1."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualgap_jax import losses, networks
from dualgap_jax.losses import LOSSES, Loss, check_assumption_1
from dualgap_jax.registry import SettingError, UnknownNameError

HINGES = ("binary_hinge", "multi_margin", "crammer_singer")
SEEDS = range(4)


def loop_binary_hinge(s: Any, y: Any, tau: float) -> float:
    return max(0.0, 1 - y * s[0] / tau)


def loop_multi_margin(s: Any, y: Any, tau: float) -> float:
    """Spec, section 1: (1/C) sum_{j != y} max(0, 1 - s_y + s_j), scores in units of tau."""
    return sum(max(0.0, 1 - s[y] / tau + s[j] / tau) for j in range(len(s)) if j != y) / len(s)


def loop_crammer_singer(s: Any, y: Any, tau: float) -> float:
    rival = max(s[j] for j in range(len(s)) if j != y)
    return max(0.0, 1 - (s[y] - rival) / tau)


def loop_logistic(s: Any, y: Any, tau: None) -> float:
    if len(s) == 1:
        return math.log(1 + math.exp(-y * s[0]))
    return -math.log(math.exp(s[y]) / sum(math.exp(v) for v in s))


def loop_squared(s: Any, y: Any, tau: None) -> float:
    if len(s) == 1:
        return 0.5 * (s[0] - y) ** 2
    return 0.5 * sum((v - (1.0 if j == y else 0.0)) ** 2 for j, v in enumerate(s))


ORACLES: dict[str, Callable[..., float]] = {
    "binary_hinge": loop_binary_hinge,
    "multi_margin": loop_multi_margin,
    "crammer_singer": loop_crammer_singer,
    "logistic": loop_logistic,
    "squared": loop_squared,
}


def drawn(loss: Loss, task: str, rng: np.random.Generator, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    if task == "multiclass":
        classes = int(rng.integers(2, 8))
        return 2 * rng.standard_normal((n, classes)), rng.integers(0, classes, n)
    labels = rng.choice([-1.0, 1.0], n) if task == "binary" else rng.standard_normal(n)
    return 2 * rng.standard_normal((n, 1)), labels


def cases() -> list[tuple[str, str]]:
    return [(name, task) for name in LOSSES for task in LOSSES.build(name).tasks]


def test_every_loss_has_an_oracle_and_a_description() -> None:
    assert ORACLES.keys() == set(LOSSES)
    assert all(LOSSES.describe(name) for name in LOSSES)


@pytest.mark.parametrize(("name", "task"), cases())
def test_losses_equal_a_plain_loop(name: str, task: str, x64: None) -> None:
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        tau = float(rng.uniform(0.2, 4)) if name in HINGES else None
        loss = LOSSES.build(name, **({"tau": tau} if tau else {}))
        outputs, labels = drawn(loss, task, rng)
        expected = [ORACLES[name](s, y, tau) for s, y in zip(outputs, labels, strict=True)]
        got = loss.per_example(jnp.asarray(outputs), jnp.asarray(labels))
        assert got.shape == labels.shape
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
        assert loss.tau == tau


@pytest.mark.parametrize(("name", "task"), cases())
def test_gradients_equal_finite_differences_away_from_kinks(name: str, task: str, x64: None) -> None:
    step = 1e-6
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        tau = 0.7 if name in HINGES else None
        loss = LOSSES.build(name, **({"tau": tau} if tau else {}))
        outputs, labels = drawn(loss, task, rng)
        gradient = jax.grad(lambda o, y=labels, f=loss: jnp.sum(f.per_example(o, jnp.asarray(y))))(jnp.asarray(outputs))
        checked = 0
        for n, c in np.ndindex(outputs.shape):
            s, y = outputs[n], labels[n]
            if name in HINGES:
                rivals = [y * s[0]] if task == "binary" else [s[y] - s[j] for j in range(len(s)) if j != y]
                ties = [abs(a - b) for i, a in enumerate(rivals) for b in rivals[:i]]
                if min([abs(1 - r / tau) for r in rivals] + ties) < 1e-4:
                    continue
            up, down = s.copy(), s.copy()
            up[c] += step
            down[c] -= step
            difference = (ORACLES[name](up, y, tau) - ORACLES[name](down, y, tau)) / (2 * step)
            assert float(gradient[n, c]) == pytest.approx(difference, rel=1e-6, abs=1e-7)
            checked += 1
        assert checked > 0.9 * outputs.size


@pytest.mark.parametrize("name", HINGES)
@pytest.mark.parametrize("tau", [0.25, 3, 40.0])
def test_tau_is_the_unit_of_the_outputs(name: str, tau: float, rng: np.random.Generator, x64: None) -> None:
    loss, unit = LOSSES.build(name, tau=tau), LOSSES.build(name)
    outputs, labels = (jnp.asarray(a) for a in drawn(loss, loss.tasks[0], rng))
    np.testing.assert_allclose(
        loss.per_example(tau * outputs, labels), unit.per_example(outputs, labels), rtol=1e-12, atol=1e-12
    )
    assert unit.tau == 1.0
    assert loss.tau == tau


@pytest.mark.parametrize("name", HINGES)
def test_the_hinge_is_zero_exactly_where_the_margin_reaches_tau(name: str, rng: np.random.Generator, x64: None) -> None:
    loss = LOSSES.build(name, tau=0.8)
    outputs, labels = (jnp.asarray(a) for a in drawn(loss, loss.tasks[0], rng, n=400))
    assert loss.margin is not None
    zero = np.asarray(loss.per_example(outputs, labels) == 0)
    np.testing.assert_array_equal(zero, np.asarray(loss.margin(outputs, labels) >= 0.8))
    assert 0 < zero.sum() < len(zero)


def test_binary_hinge_is_linear_in_f_under_assumption_1(rng: np.random.Generator, x64: None) -> None:
    outputs = jnp.asarray(rng.uniform(-3, 3, (50, 1)))
    labels = jnp.asarray(rng.choice([-1.0, 1.0], 50))
    linear = 1 - labels * outputs[:, 0] / 3.5
    np.testing.assert_allclose(losses.binary_hinge(3.5).per_example(outputs, labels), linear, rtol=1e-12)
    assert float(jnp.abs(losses.binary_hinge(1.0).per_example(outputs, labels) - linear).max()) > 0.1


def test_margins_are_those_of_a_loop(rng: np.random.Generator, x64: None) -> None:
    outputs, labels = rng.standard_normal((30, 5)), rng.integers(0, 5, 30)
    expected = [s[y] - max(s[j] for j in range(5) if j != y) for s, y in zip(outputs, labels, strict=True)]
    for name in ("multi_margin", "crammer_singer"):
        margin = LOSSES.build(name).margin
        assert margin is not None
        np.testing.assert_allclose(margin(jnp.asarray(outputs), jnp.asarray(labels)), expected, rtol=1e-12)
    margin = losses.binary_hinge().margin
    assert margin is not None
    signs = rng.choice([-1.0, 1.0], 30)
    np.testing.assert_allclose(margin(jnp.asarray(outputs[:, :1]), jnp.asarray(signs)), signs * outputs[:, 0])
    assert losses.logistic().margin is None
    assert losses.squared().margin is None


@pytest.mark.parametrize(("name", "task"), cases())
def test_integer_labels_are_as_good_as_float_ones(name: str, task: str, rng: np.random.Generator) -> None:
    loss = LOSSES.build(name)
    outputs, labels = drawn(loss, task, rng)
    if task == "regression":
        labels = np.round(labels)
    outputs = jnp.asarray(outputs, jnp.float32)
    a = loss.per_example(outputs, jnp.asarray(labels, jnp.int32))
    b = loss.per_example(outputs, jnp.asarray(labels, jnp.float32))
    np.testing.assert_array_equal(a, b)
    assert a.dtype == jnp.float32


@pytest.mark.optimized
def test_large_outputs_stay_finite_and_non_finite_ones_stay_visible() -> None:
    huge = jnp.asarray([[1e30], [-1e30]])
    signs = jnp.asarray([1.0, -1.0])
    np.testing.assert_array_equal(losses.logistic().per_example(huge, signs), [0, 0])
    np.testing.assert_allclose(losses.logistic().per_example(huge, -signs), [1e30, 1e30])
    classes = jnp.asarray([[1e30, -1e30], [0.0, 1e30]])
    assert np.isfinite(np.asarray(losses.logistic().per_example(classes, jnp.asarray([1, 1])))).all()
    for name, task in cases():
        loss = LOSSES.build(name)
        outputs = jnp.full((2, 3 if task == "multiclass" else 1), jnp.nan)
        labels = jnp.asarray([1.0, -1.0]) if task != "multiclass" else jnp.asarray([0, 2])
        assert np.isnan(np.asarray(loss.per_example(outputs, labels))).all(), name


# ------------------------------------------------------------------------------------------------- NaN and infinities

OWN = Loss(lambda o, y: jnp.maximum(0, 1 - y * o[:, 0]), None, None, ("binary",))
OWN_MAX = Loss(lambda o, y: jnp.max(jnp.abs(o), axis=-1), None, None, ("multiclass",))
# Above some thousand numbers XLA:CPU compiles reductions by another library, which loses NaN in maxima.
SHAPES = [(1, 1), (3, 7), (64, 256), (1, 5000)]


def marked_losses() -> list[tuple[Loss, int]]:
    built = [(LOSSES.build(name), 1 if task == "binary" else 10) for name, task in cases() if task != "regression"]
    return [*built, (losses.binary_hinge(0.3), 1), (OWN, 1), (OWN_MAX, 17)]


@pytest.mark.optimized
@pytest.mark.parametrize(("loss", "width"), marked_losses())
def test_no_output_that_is_not_finite_is_lost_however_many_are_computed_together(
    loss: Loss, width: int, rng: np.random.Generator
) -> None:
    sums = jax.jit(jax.vmap(lambda o, y: losses.sum_loss(loss, o, y), (0, None)))
    means = jax.jit(jax.vmap(lambda o, y: losses.mean_loss(loss, o, y), (0, None)))
    each = jax.jit(lambda o, y: losses.measure(loss, "binary" if width == 1 else "multiclass", o, y))
    for (points, n), bad in itertools.product(SHAPES, (math.nan, math.inf, -math.inf)):
        outputs = 2 * rng.standard_normal((points, n, width)).astype(np.float32)
        labels = rng.choice([-1.0, 1.0], n) if width == 1 else rng.integers(0, width, n)
        row, sample, column = rng.integers(points), rng.integers(n), rng.integers(width)
        outputs[row, sample, column] = bad
        for total in (sums(outputs, labels), means(outputs, labels)):
            np.testing.assert_array_equal(np.isfinite(total), np.arange(points) != row)
        values, margins, hits = each(outputs[row], labels)
        np.testing.assert_array_equal(np.isfinite(values), np.arange(n) != sample)
        np.testing.assert_array_equal(np.isfinite(margins), (np.arange(n) != sample) | (loss.margin is None))
        assert not hits[sample]


@pytest.mark.optimized
@pytest.mark.parametrize("name", HINGES)
def test_a_hinge_keeps_nan_in_programs_of_any_size(name: str, rng: np.random.Generator) -> None:
    """Called on its own too, with the sum compiled around it."""
    loss = LOSSES.build(name, tau=0.7)
    width = 1 if name == "binary_hinge" else 10
    for points, n in SHAPES:
        outputs = 2 * rng.standard_normal((points * n, width)).astype(np.float32)
        labels = rng.choice([-1.0, 1.0], points * n) if width == 1 else rng.integers(0, width, points * n)
        sample = rng.integers(points * n)
        outputs[sample, rng.integers(width)] = math.nan
        assert loss.margin is not None
        for function in (loss.per_example, loss.margin):
            got = np.asarray(jax.jit(function)(outputs, labels))
            np.testing.assert_array_equal(np.isnan(got), np.arange(points * n) == sample)
        assert np.isnan(jax.jit(lambda o, y, f=loss.per_example: jnp.sum(f(o, y)))(outputs, labels))


@pytest.mark.optimized
@pytest.mark.parametrize("name", HINGES)
def test_finite_losses_and_gradients_are_those_of_a_maximum_bit_for_bit(name: str, rng: np.random.Generator) -> None:
    loss = LOSSES.build(name, tau=0.7)
    width = 1 if name == "binary_hinge" else 10

    def with_maximum(outputs: Any, labels: Any) -> Any:
        if width == 1:
            return jnp.maximum(0, 1 - labels.astype(outputs.dtype) * outputs[:, 0] / 0.7)
        own = jnp.arange(width)[None, :] == labels[:, None].astype(jnp.int32)
        difference = jnp.sum(jnp.where(own, outputs, 0), axis=-1, keepdims=True) - outputs
        if name == "multi_margin":
            return jnp.sum(jnp.where(own, 0, jnp.maximum(0, 1 - difference / 0.7)), axis=-1) / width
        return jnp.maximum(0, 1 - jnp.min(jnp.where(own, jnp.inf, difference), axis=-1) / 0.7)

    for points, n in SHAPES:
        outputs = jnp.asarray(2 * rng.standard_normal((points, n, width)), jnp.float32)
        labels = jnp.asarray(rng.choice([-1.0, 1.0], n) if width == 1 else rng.integers(0, width, n))

        for of in (lambda f: f, jax.grad):
            got, expected = (
                jax.jit(jax.vmap(of(f), (0, None)))(outputs, labels)
                for f in (lambda o, y: losses.mean_loss(loss, o, y), lambda o, y: jnp.mean(with_maximum(o, y)))
            )
            if jax.default_backend() == "cpu":
                np.testing.assert_array_equal(got, expected)
            else:  # sums of two programs may be taken in two orders
                np.testing.assert_allclose(got, expected, rtol=1e-6, atol=0)


@pytest.mark.optimized
def test_a_margin_that_is_not_a_number_is_seen_among_many() -> None:
    margins = jnp.zeros(20_000).at[12_345].set(jnp.nan)
    check = check_assumption_1(losses.binary_hinge(), margins, bound=0.5)
    assert (check.status, math.isnan(check.largest_margin)) == ("undecided", True)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", HINGES)
@pytest.mark.parametrize(
    "tau", [0, 0.0, -1.0, 1e-310, math.nan, math.inf, -math.inf, True, False, "1", None, 1j, [1.0]]
)
def test_bad_tau_is_refused(name: str, tau: Any) -> None:
    with pytest.raises(ValueError, match=r"tau must be a positive finite number \(eq\. \(1\)\), got") as raised:
        inspect.unwrap(LOSSES[name])(tau=tau)
    assert repr(tau) in str(raised.value)


def test_bad_tau_from_a_config_names_the_loss() -> None:
    with pytest.raises(SettingError, match="loss 'multi_margin': tau must be"):
        LOSSES.build("multi_margin", tau=-2.0)
    with pytest.raises(UnknownNameError, match="setting of loss 'logistic':"):
        LOSSES.build("logistic", tau=1.0)


def test_wrong_numbers_of_outputs_are_refused() -> None:
    two, one = jnp.zeros((4, 2)), jnp.zeros((4, 1))
    signs, classes = jnp.ones(4), jnp.zeros(4, jnp.int32)
    hinge = losses.binary_hinge()
    assert hinge.margin is not None
    for function in (hinge.per_example, hinge.margin):
        with pytest.raises(ValueError, match=r"needs one network output, got outputs of shape \(4, 2\)"):
            function(two, signs)
    for loss in (losses.multi_margin(), losses.crammer_singer()):
        assert loss.margin is not None
        for function in (loss.per_example, loss.margin):
            with pytest.raises(ValueError, match=r"needs two network outputs or more, got outputs of shape \(4, 1\)"):
                function(one, classes)


@pytest.mark.parametrize("name", LOSSES)
def test_shapes_that_would_broadcast_are_refused(name: str) -> None:
    """Labels [batch, 1] would otherwise give a [batch, batch] table of losses."""
    loss = LOSSES.build(name)
    outputs = jnp.zeros((4, 3 if "binary" not in loss.tasks else 1))
    for labels in (jnp.ones((4, 1)), jnp.ones(1), jnp.ones(5), jnp.ones(())):
        with pytest.raises(ValueError, match=r"labels \[batch\], got shapes \(4, \d\) and"):
            inspect.unwrap(loss.per_example)(outputs, labels)
    with pytest.raises(ValueError, match=r"got shapes \(4,\) and"):
        inspect.unwrap(loss.per_example)(outputs[:, 0], jnp.ones(4))


# ------------------------------------------------------------------------------------------------------- Assumption 1


def test_the_check_reports_the_largest_margin_and_the_clipped_share(rng: np.random.Generator) -> None:
    margins = rng.standard_normal((3, 50)).astype(np.float32)
    for tau in (0.5, 1.0, float(margins.max()), 10.0):
        check = check_assumption_1(losses.binary_hinge(tau), jnp.asarray(margins))
        assert check.tau == tau
        assert check.largest_margin == float(margins.max())
        assert check.clipped_share == pytest.approx(np.mean(margins >= np.float32(tau)), abs=1e-7)
        assert check.status == ("violated" if tau <= margins.max() else "not seen violated")
        assert check.bound is None


def test_the_check_is_certified_only_by_a_bound_below_tau() -> None:
    loss, margins = losses.binary_hinge(2.0), jnp.asarray([0.5, -1.0, 1.5])
    assert check_assumption_1(loss, margins, bound=1.9).status == "certified"
    assert check_assumption_1(loss, margins, bound=1.9).bound == 1.9
    for bound in (2.0, 3, math.inf, math.nan, None):
        assert check_assumption_1(loss, margins, bound=bound).status == "not seen violated"


def test_a_margin_seen_outweighs_a_bound() -> None:
    margins = jnp.asarray([0.5, 2.0])
    for bound in (None, 1.0, 5.0):
        assert check_assumption_1(losses.binary_hinge(2.0), margins, bound=bound).status == "violated"


def test_margins_that_are_not_numbers_leave_the_check_undecided() -> None:
    for bound in (None, 1.0):
        check = check_assumption_1(losses.binary_hinge(2.0), jnp.asarray([0.5, jnp.nan]), bound=bound)
        assert check.status == "undecided"
        assert math.isnan(check.largest_margin)


@pytest.mark.parametrize("name", ["logistic", "squared"])
def test_losses_without_tau_are_not_applicable(name: str) -> None:
    check = check_assumption_1(LOSSES.build(name), jnp.zeros((3, 0)), bound=1.0)
    assert check.status == "not applicable"
    assert (check.tau, check.bound) == (None, None)
    assert math.isnan(check.largest_margin)
    assert math.isnan(check.clipped_share)


def test_the_bound_over_the_ball_certifies_assumption_1(rng: np.random.Generator, x64: None) -> None:
    """W = {||w|| <= R}, a bias-free ReLU branch: certified when tau exceeds the bound, and then never clipped."""
    branch = networks.mlp((4,), 1, use_bias=False)
    x = jnp.asarray(rng.standard_normal((20, 3)))
    labels = jnp.asarray(rng.choice([-1.0, 1.0], 20))
    bound = networks.mlp_output_bound(2, 2.0, float(jnp.linalg.norm(x, axis=1).max()))
    margins = []
    for _ in range(30):
        w = [rng.standard_normal((4, 3)), rng.standard_normal((1, 4))]
        norm = math.sqrt(sum(float(np.sum(m**2)) for m in w))
        outputs = branch.apply(tuple({"kernel": jnp.asarray(2.0 / norm * m)} for m in w), (), x)[0]
        margins.append(losses.binary_hinge(bound).margin(outputs, labels))  # type: ignore[misc]
    above = losses.binary_hinge(1.001 * bound)
    assert check_assumption_1(above, jnp.stack(margins), bound=bound).status == "certified"
    assert check_assumption_1(above, jnp.stack(margins), bound=bound).clipped_share == 0
    assert check_assumption_1(losses.binary_hinge(bound), jnp.stack(margins), bound=bound).status == "not seen violated"


@pytest.mark.parametrize("name", HINGES)
def test_outputs_that_cannot_hold_tau_are_refused(name: str) -> None:
    width = 1 if name == "binary_hinge" else 3
    label = jnp.asarray([1.0]) if width == 1 else jnp.asarray([0])
    for dtype, tau in ((jnp.float32, 1e-39), (jnp.float16, 1e-6)):
        with pytest.raises(ValueError, match="is below"):
            LOSSES.build(name, tau=tau).per_example(jnp.zeros((1, width), dtype), label)


@pytest.mark.parametrize("tau", [np.float32(0.5), np.int64(2), np.float16(0.5), np.asarray(0.5)[()]])
def test_tau_may_be_a_number_of_numpy(tau: Any) -> None:
    assert losses.binary_hinge(tau).tau == float(tau)


def test_margins_of_few_digits_are_compared_as_they_are() -> None:
    for dtype, tau in ((np.float32, 0.7), (np.float16, 0.1)):
        margin = np.asarray([tau], dtype)
        check = check_assumption_1(losses.binary_hinge(tau), margin)
        assert (check.clipped_share == 1.0) == (check.status == "violated") == (float(margin[0]) >= tau)
    with pytest.raises(ValueError, match="at least one example"):
        check_assumption_1(losses.binary_hinge(), np.zeros(0))
