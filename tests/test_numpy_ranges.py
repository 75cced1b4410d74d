"""The checkers' own rules against sampling: values, slopes and second derivatives, on points and on boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_programs import program
from test_intervals import CURVATURES, SCALAR, SLOPES, WIDE, _networks, magnitudes

from dualgap_jax.data import from_arrays
from dualgap_jax.duality.checker import pairs
from dualgap_jax.duality.checker.pairs import Unsupported
from dualgap_jax.duality.checker.ranges import Walker
from dualgap_jax.duality.problem import branch_problem
from dualgap_jax.networks import mlp

Function = Callable[[jax.Array], jax.Array]


PLAIN = branch_problem(
    mlp((), 1), from_arrays(np.array([[1.0, 2.0], [0.5, -1.0]], np.float32), np.array([1.0, -1.0])), tau=1.0, radius=1.0
)


def walker(f: Function) -> Walker:
    """A walk through a function of three weights."""
    return Walker(PLAIN, f)


def summed(f: Function) -> Function:
    """One number of a function's results, all of which count."""
    return lambda w: jnp.sum(jnp.cos(jnp.arange(f(w).size) + 1.0) * f(w).reshape(-1))


def sampled(f: Function, rng: np.random.Generator, low: float = -1.5, high: float = 1.5) -> float:
    """Checks the ranges on random boxes at pairs of points; returns how wide values are on boxes of side 1e-9."""
    width = np.repeat([1e-9, 1e-3, 0.2, 1.0], 5)[:, None]
    lo = rng.uniform(low, high, (20, 3))
    hi = np.minimum(lo + width * rng.random((20, 3)), high)
    snap = (width >= 0.2) & (rng.random((2, 20, 3)) < 0.2)  # kinks and jumps are at whole numbers
    lo, hi = (np.where(at, np.round(end), end) for at, end in zip(snap, (lo, np.maximum(lo, hi)), strict=True))
    lo, hi = np.minimum(lo, hi), np.maximum(lo, hi)
    w = np.clip(lo[:, None] + rng.random((20, 24, 3)) * (hi - lo)[:, None], lo[:, None], hi[:, None])
    values = np.asarray(jax.jit(jax.vmap(jax.vmap(f)))(w))
    walk = walker(f)
    box, at = walk(lo, hi), walk(w[:, 0], w[:, 0])
    slack = 1e-12 * (1 + np.abs(values).max())
    assert not np.isnan([box.lower, box.upper]).any()
    assert (box.lower[:, None] <= values + slack).all()
    assert (values <= box.upper[:, None] + slack).all()
    step, change = w - w[:, :1], values - values[:, :1]

    def between(*terms: tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]) -> None:
        low_, high_ = np.zeros_like(change), np.zeros_like(change)
        with np.errstate(invalid="ignore"):
            for by, ends in terms:
                parts = [np.where(by == 0, 0, by * end[:, None]) for end in ends]
                axes = tuple(range(2, by.ndim))
                low_, high_ = low_ + np.minimum(*parts).sum(axes), high_ + np.maximum(*parts).sum(axes)
        assert not (change < low_ - slack).any()
        assert not (change > high_ + slack).any()

    pairs = 0.5 * step[..., :, None] * step[..., None, :]
    between((step, box.first))
    between((step, at.first), (pairs, box.second))
    return float(np.median((box.upper - box.lower)[width[:, 0] == 1e-9]))


@pytest.mark.parametrize("name", _networks(np.random.default_rng(0)))
def test_rules_of_arrays(name: str, x64: None, rng: np.random.Generator) -> None:
    with jax.numpy_rank_promotion("allow"):
        assert sampled(summed(_networks(rng)[name]), rng) < 1e-6


@pytest.mark.parametrize("name", SCALAR)
def test_rules_of_functions(name: str, x64: None, rng: np.random.Generator) -> None:
    assert sampled(lambda w: jnp.sum(SCALAR[name](w) * jnp.array([1.0, -2.0, 0.5])), rng, -3.0, 3.0) < 1e-6


def test_rules_of_random_programs(x64: None, rng: np.random.Generator) -> None:
    for _ in range(5):
        sampled(summed(program(rng, 6)), rng)


MORE: dict[str, Any] = {
    "log": lambda w: jnp.log(w + 2),
    "log1p": jnp.log1p,
    "expm1": jnp.expm1,
    "rsqrt": lambda w: (w + 2) ** -0.5,
    "reciprocal": lambda w: 1 / (w + 2),
    "quotient": lambda w: w[::-1] / (w * w + 1),
    "floor": lambda w: jnp.floor(3 * w) * w,
    "sign": lambda w: jnp.sign(w) * w,
    "round": lambda w: jnp.round(2 * w),
    "wave": lambda w: jnp.sin(9 * w) * jnp.cos(w),
    "truths": lambda w: jnp.where((w > 0) & ~(w >= 0.5) | (w < -0.3), w, 0.5),
    "finite": lambda w: jnp.where(jnp.isfinite(w), w, 0),
    "strided": lambda w: jax.lax.conv_general_dilated(
        jnp.tile(w, 8).reshape(1, 2, 12), w.reshape(1, 1, 3).repeat(2, 1), (2,), ((1, 2),), rhs_dilation=(2,),
        dimension_numbers=("NCH", "OIH", "NCH"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_more_rules(name: str, x64: None, rng: np.random.Generator) -> None:
    with jax.numpy_rank_promotion("allow"):
        sampled(summed(MORE[name]), rng, -0.9, 1.5)


@pytest.mark.parametrize(
    "f",
    [
        lambda w: jnp.tanh(jnp.log(w[0])), lambda w: jnp.exp(-1 / w[0] ** 2), lambda w: jnp.cos(jnp.sqrt(w[1] - 0.5)),
        lambda w: jnp.maximum(w[0] ** -1.5, 0.0), lambda w: jnp.clip(w[2] ** 0.5, 0.0, 1.0),
        lambda w: jax.nn.sigmoid(jnp.log1p(w[0] - 0.9)), lambda w: jnp.minimum(w[0] / w[1], 3.0),
    ],
)  # fmt: skip
def test_what_may_be_undefined_is_not_hidden_by_what_follows(f: Function, x64: None) -> None:
    box = walker(f)(np.full((1, 3), -0.5), np.full((1, 3), 1.0))
    assert (box.lower, box.upper) == (-np.inf, np.inf)
    assert np.isinf(box.first[0]).all()
    assert not box.smooth
    inside = walker(f)(np.full((1, 3), 0.6), np.full((1, 3), 0.7))
    assert np.isfinite([inside.lower, inside.upper]).all()


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda w: w[jnp.argsort(w)][0], "sort by keys .* alone, by jnp.sort"),
        (lambda w: w[jnp.argmax(w)], "argmax"), (lambda w: jax.lax.top_k(w, 2)[0][0], "top_k.* write jnp.sort"),
        (lambda w: jax.lax.while_loop(lambda s: s < 3, lambda s: s * 2, w[0] + 2), "while.* lax.fori_loop with bounds"),
        (lambda w: jax.lax.switch(w[0].astype(jnp.int32), [jnp.sin, jnp.cos, jnp.tanh], w).sum(), "integers|convert"),
        (lambda w: w.astype(jnp.int32).astype(w.dtype).sum(), "convert_element_type"),
        (lambda w: jnp.array([1.0, jnp.nan, 2.0]) @ w, "not a number"),
        (lambda w: jax.lax.reduce(w[:1], np.float64(0.5), lambda a, b: a * b + a, (0,)), "operation reduce"),
        (lambda w: w.sum() * jnp.exp(jnp.float32(0.1) * jnp.arange(3, dtype=jnp.float32))[1], "float32.* float64"),
    ],
)  # fmt: skip
def test_operations_without_a_rule_are_named(f: Function, name: str, x64: None) -> None:
    with pytest.raises(Unsupported, match=name):
        walker(f)(np.zeros((1, 3)), np.ones((1, 3)))


@pytest.mark.parametrize(
    ("name", "part"),
    [(n, k) for k, t in enumerate((WIDE, SLOPES, CURVATURES)) for n in t if n in pairs.SMOOTH],
)
def test_functions_hold_the_true_value_at_every_point(name: str, part: int) -> None:
    """Against 80-bit (or wider) long doubles over many magnitudes."""
    if np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("long double is no wider than double here")
    x = magnitudes(name)
    with np.errstate(all="ignore"):
        truth = (WIDE, SLOPES, CURVATURES)[part][name](x.astype(np.longdouble))
        low, high = pairs.SMOOTH[name]((x, x))[part]
    assert (low <= truth + np.longdouble(1e-305)).all()
    assert (truth <= high + np.longdouble(1e-305)).all()


def test_a_constant_that_is_rounded_is_not_taken_for_its_lower_end(x64: None) -> None:
    """Both ends of what a constant may be go into an order and into an exponent."""
    c = jnp.array([0.7, 1.3])
    for f in (lambda w: jnp.sort(jnp.sin(c))[0] * w[0], lambda w: (w[0] + 1e9) ** jnp.exp(jnp.sin(c[1]))):
        at = walker(f)(np.ones((1, 3)), np.ones((1, 3)))
        assert at.lower[0] < float(f(jnp.ones(3))) < at.upper[0]
    with pytest.raises(Unsupported, match="not known exactly"):
        walker(lambda w: w[jnp.argsort(jnp.sin(c))][0])(np.zeros((1, 3)), np.ones((1, 3)))
