"""Ranges of values, slopes and second derivatives against dense sampling, extended precision and plain differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_programs import program
from scipy import special

from dualgap_jax.duality import programs
from dualgap_jax.duality.bounding import elementary, intervals, ranges, rules
from dualgap_jax.duality.bounding.intervals import Interval
from dualgap_jax.duality.checker import pairs

Function = Callable[[jax.Array], jax.Array]


class Boxes(NamedTuple):
    """Random boxes `[k, p]`, and points of each: `[k, n, p]`; the first point of each is anywhere in it."""

    width: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    points: np.ndarray


def boxes(size: int, rng: np.random.Generator, low: float, high: float) -> Boxes:
    width = np.repeat([0.0, 1e-9, 1e-3, 0.2, 1.0, 4.0], 4)[:, None]
    lo = rng.uniform(low, high, (24, size))
    hi = np.minimum(lo + width * rng.uniform(0, 1, (24, size)), high)
    snap = (width >= 0.2) & (rng.random((2, 24, size)) < 0.2)  # kinks and jumps are at whole numbers
    lo = np.where(snap[0], np.round(lo), lo)
    hi = np.maximum(lo, np.where(snap[1], np.round(hi), hi))
    share = np.concatenate([rng.random((24, 32, size)), rng.integers(0, 2, (24, 12, size))], axis=1)
    points = np.clip(lo[:, None] + share * (hi - lo)[:, None], lo[:, None], hi[:, None])
    return Boxes(width[:, 0], lo, hi, np.where(share == 1, hi[:, None], points))


def sampled(f: Function, size: int, rng: np.random.Generator, *, low: float = -3.0, high: float = 3.0) -> float:
    """Checks the ranges of `f: [size] -> [...]` on random boxes by values at pairs of points; no derivative of JAX.

    `f(b) - f(a)` must lie in `first . (b - a)`, and in `first(a) . (b - a) + second : (b - a)^2 / 2`.

    Returns:
      How wide the ranges of slopes are on boxes of side 1e-9: the widest of the medians of the outputs.
    """

    def flattened(w: jax.Array) -> jax.Array:
        return f(w).reshape(-1)

    width, lo, hi, points = boxes(size, rng, low, high)
    count, starts = len(lo), points[:, 0]
    values = np.asarray(jax.jit(jax.vmap(jax.vmap(flattened)))(points))  # [k, n, out]
    over = jax.jit(jax.vmap(ranges.extension(flattened, jnp.zeros(size, jnp.float64), order=2)))
    found = over(np.concatenate([lo, starts]), np.concatenate([hi, starts]))
    assert np.asarray(found.defined).all()

    def flat(a: Any, leading: int = 0) -> np.ndarray:
        whole = np.asarray(a).reshape(2 * count, size**leading, -1)
        assert not np.isnan(whole).any()
        return whole

    lower, upper = flat(found.lower), flat(found.upper)
    first, second = [flat(d, 1) for d in found.first], [flat(d, 2) for d in found.second]
    slack = 1e-13 * (1 + np.abs(values).max((0, 1)))
    assert (lower[:count] <= values + slack).all()
    assert (values <= upper[:count] + slack).all()

    def between(change: np.ndarray, *terms: tuple[np.ndarray, list[np.ndarray]]) -> None:
        """`change [k, n, out]` is in the sum of the products of `[k, n, q]` with ranges `[k, q, out]`."""
        low, high = np.zeros_like(change), np.zeros_like(change)
        with np.errstate(invalid="ignore"):
            for step, ends in terms:
                parts = [np.where(step[..., None] == 0, 0, step[..., None] * end[:, None]) for end in ends]
                low, high = low + np.minimum(*parts).sum(2), high + np.maximum(*parts).sum(2)
        assert not (change < low - slack).any()
        assert not (change > high + slack).any()

    step, change = points - starts[:, None], values - values[:, :1]
    pairs = (step[..., :, None] * step[..., None, :]).reshape(*step.shape[:2], -1) / 2
    between(change, (step, [d[:count] for d in first]))
    between(change, (step, [d[count:] for d in first]), (pairs, [h[:count] for h in second]))
    return float(np.median((first[1] - first[0])[:count][width == 1e-9], axis=(0, 1)).max())


# --- elementary functions ---------------------------------------------------------------------------------------------

SCALAR: dict[str, Callable[..., Any]] = {
    "tanh": jnp.tanh, "relu": jax.nn.relu, "leaky_relu": jax.nn.leaky_relu, "softplus": jax.nn.softplus,
    "gelu": jax.nn.gelu, "exact gelu": lambda a: jax.nn.gelu(a, approximate=False), "elu": jax.nn.elu,
    "selu": jax.nn.selu, "silu": jax.nn.silu, "hard_swish": jax.nn.hard_swish, "hard_tanh": jax.nn.hard_tanh,
    "mish": jax.nn.mish, "soft_sign": jax.nn.soft_sign, "abs": jnp.abs, "cube": lambda a: a**3,
    "division": lambda a: (a + 1) / (3.5 + jnp.exp(a)), "sqrt": lambda a: jnp.sqrt(a * a + 1),
    "clip": lambda a: jnp.clip(a, -0.5, 0.7), "sine": lambda a: jnp.sin(jnp.cos(3 * a) - a),
    "power": lambda a: (a + 4) ** 2.5, "tower": lambda a: (a + 4) ** (0.3 * a), "base": lambda a: 2.0**a,
    "inverse cube": lambda a: (a + 4.0) ** -3, "max": lambda a: jnp.maximum(a, a * a),
    "root of size": lambda a: jnp.sqrt(jnp.abs(a)), "logaddexp": lambda a: jnp.logaddexp(a, 1 - 2 * a),
    "arctan": lambda a: jnp.arctan(2 * a), "hyperbolic": lambda a: jnp.sinh(a) - 0.5 * jnp.cosh(2 * a),
    "arcsinh": lambda a: jnp.arcsinh(3 * a), "powers of two": lambda a: jnp.exp2(a) * a,
    "cube root": lambda a: jnp.cbrt(a + 4),
}  # fmt: skip
JUMPS: dict[str, Callable[..., Any]] = {
    "sign": jnp.sign, "heaviside": lambda a: jnp.heaviside(a, 0.5), "floor": jnp.floor, "ceil": jnp.ceil,
    "round": jnp.round, "where": lambda a: jnp.where(a > 0, 1.0, a), "two jumps": lambda a: jnp.where(a > 1, 2 * a, -a),
    "to integers": lambda a: a.astype(jnp.int32).astype(a.dtype) * a, "to truth": lambda a: (a > 0.5).astype(a.dtype),
    "narrow": lambda a: (a / 3).astype(jnp.float32).astype(a.dtype), "equal": lambda a: jnp.where(a == 1, 5.0, a),
    "not": lambda a: jnp.where(~((a > -1) & (a < 1)), a, 3.0), "mixed": lambda a: jnp.where(a[::-1] > 0, a, 0.0),
    "precision": lambda a: jax.lax.reduce_precision(a, 8, 5),
    "shifted": lambda a: jnp.where(a > 1, a - 0.5, a / 2 + 0.25),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALAR)
def test_ranges_of_functions(name: str, x64: None, rng: np.random.Generator) -> None:
    assert sampled(SCALAR[name], 2, rng) < 1e-6


@pytest.mark.parametrize("name", JUMPS)
def test_jumps_have_both_sides(name: str, x64: None, rng: np.random.Generator) -> None:
    sampled(JUMPS[name], 2, rng)
    assert not ranges.is_smooth(JUMPS[name], jnp.zeros(2))


def test_a_jump_on_the_face_of_a_box_is_not_inside_it(x64: None) -> None:
    over = ranges.extension(lambda w: jnp.where(w > 0, 1.0, 2.0), jnp.zeros(1), order=1)
    r = over(jnp.array([0.0]), jnp.array([1.0]))
    assert (r.lower, r.upper) == (1.0, 2.0)
    assert np.isneginf(r.first[0]).all()
    r = over(jnp.array([0.5]), jnp.array([1.0]))
    assert (r.lower, r.upper) == (1.0, 1.0)
    assert (r.first[0] == 0).all()


def test_choices_that_meet_are_known_to_be_continuous(x64: None) -> None:
    """The slopes of leaky ReLU or ELU over a box with the kink inside are finite; those of a jump are not."""
    lo, hi = jnp.array([-0.5]), jnp.array([0.25])
    for psi, steepest in ((jax.nn.leaky_relu, 1.0), (jax.nn.elu, 1.3), (jax.nn.selu, 2.3), (jax.nn.hard_tanh, 1.0)):
        d = ranges.extension(psi, jnp.zeros(1), order=1)(lo, hi).first
        assert np.isfinite(d[0]).all()
        assert float(d[1][0, 0]) < steepest + 1e-2
    for jump in (
        lambda a: jnp.where(a > 0, a, 1e-9),
        lambda a: jnp.where(a > 1e-9, a, 0.0),
        lambda a: jnp.where(a < 0, a + 1, 1 - a * 0.3 + 1e-13),
    ):
        assert np.isneginf(ranges.extension(jump, jnp.zeros(1), order=1)(lo, hi).first[0]).all()


WIDE: dict[str, Any] = {
    "exp": np.exp, "exp2": np.exp2, "log": np.log, "log1p": np.log1p, "expm1": np.expm1, "tanh": np.tanh,
    "sqrt": np.sqrt,
    "logistic": lambda a: np.where(a > 0, 1 / (1 + np.exp(-np.abs(a))), np.exp(-np.abs(a)) / (1 + np.exp(-np.abs(a)))),
    "atan": np.arctan, "sinh": np.sinh, "cosh": np.cosh, "asinh": np.arcsinh, "sin": np.sin, "cos": np.cos,
    "rsqrt": lambda a: 1 / np.sqrt(a), "cbrt": np.cbrt, "square": lambda a: a * a, "abs": np.abs,
    "one_minus_square": lambda a: (1 - a) * (1 + a),
}  # fmt: skip
SLOPES: dict[str, Any] = {
    "exp": np.exp, "exp2": lambda a: np.exp2(a) * np.log(np.longdouble(2)), "log": lambda a: 1 / a,
    "log1p": lambda a: 1 / (1 + a), "expm1": np.exp, "tanh": lambda a: 1 / np.cosh(a) ** 2,
    "sqrt": lambda a: 0.5 / np.sqrt(a), "logistic": lambda a: 0.25 / np.cosh(a / 2) ** 2,
    "atan": lambda a: 1 / (1 + a * a), "sinh": np.cosh, "cosh": np.sinh, "asinh": lambda a: 1 / np.sqrt(1 + a * a),
    "sin": np.cos, "cos": lambda a: -np.sin(a), "rsqrt": lambda a: -0.5 / (a * np.sqrt(a)),
    "cbrt": lambda a: 1 / (3 * np.cbrt(a) ** 2), "square": lambda a: 2 * a, "abs": np.sign,
    "one_minus_square": lambda a: -2 * a, "erf": lambda a: 2 / np.sqrt(np.longdouble(np.pi)) * np.exp(-a * a),
    "erfc": lambda a: -2 / np.sqrt(np.longdouble(np.pi)) * np.exp(-a * a),
}  # fmt: skip
CURVATURES: dict[str, Any] = {
    "exp": np.exp, "log": lambda a: -1 / a**2, "log1p": lambda a: -1 / (1 + a) ** 2, "expm1": np.exp,
    "tanh": lambda a: -2 * np.tanh(a) / np.cosh(a) ** 2, "sqrt": lambda a: -0.25 / (a * np.sqrt(a)),
    "logistic": lambda a: -0.25 * np.tanh(a / 2) / np.cosh(a / 2) ** 2, "atan": lambda a: -2 * a / (1 + a * a) ** 2,
    "sinh": np.sinh, "cosh": np.cosh, "asinh": lambda a: -a / (1 + a * a) ** np.longdouble(1.5),
    "sin": lambda a: -np.sin(a), "cos": lambda a: -np.cos(a), "rsqrt": lambda a: 0.75 / (a * a * np.sqrt(a)),
    "square": lambda a: 2 + 0 * a,
    "erf": lambda a: -4 / np.sqrt(np.longdouble(np.pi)) * a * np.exp(-a * a),
}  # fmt: skip


def magnitudes(name: str) -> np.ndarray:
    """Arguments of many sizes, of both signs where the function allows it."""
    top = 2.845 if name in ("exp", "exp2", "expm1", "sinh", "cosh") else 5.5 if name in ("sin", "cos") else 300.0
    rng = np.random.default_rng(len(name))
    sizes = [10.0 ** np.linspace(-30, min(top, 100.0), 6000), np.linspace(0, 12, 6000)[1:], rng.uniform(0, 700, 3000)]
    sizes = np.concatenate([*sizes, 10.0 ** rng.uniform(-300, top, 6000)])
    if name in ("log", "sqrt", "rsqrt"):
        return sizes
    if name == "log1p":
        return np.concatenate([sizes, -(1 - 10.0 ** np.linspace(-12, -1e-3, 500)), -sizes[sizes < 0.99]])
    return np.concatenate([sizes, -sizes])


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "part"), [(n, p) for p, t in (("value", WIDE), ("slope", SLOPES), ("curvature", CURVATURES)) for n in t]
)
def test_elementary_functions_hold_the_true_value_at_every_point(name: str, part: str, x64: None) -> None:
    """Against 80-bit (or wider) long doubles over many magnitudes."""
    if np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("long double is no wider than double here")
    x = magnitudes(name)
    with np.errstate(over="ignore", under="ignore"):
        truth = {"value": WIDE, "slope": SLOPES, "curvature": CURVATURES}[part][name](x.astype(np.longdouble))
    rule = getattr(elementary.FUNCTIONS[name], part)
    low, high = (np.asarray(a) for a in jax.jit(lambda a: rule(Interval(a, a))[:2])(jnp.asarray(x)))
    # Below the normal numbers the two may differ by what a long double still holds.
    assert (low <= truth + np.longdouble(1e-305)).all()
    assert (truth <= high + np.longdouble(1e-305)).all()


def long_erfc(x: np.ndarray) -> np.ndarray:
    """`erfc` from 2 on in long doubles: `exp(-x^2) / sqrt(pi)` times a continued fraction."""
    x = x.astype(np.longdouble)
    fraction = x
    for k in range(400, 0, -1):
        fraction = x + np.longdouble(k) / 2 / fraction
    return np.exp(-x * x) / np.sqrt(np.longdouble(np.pi)) / fraction


@pytest.mark.optimized
def test_the_complement_of_the_error_function_holds_its_value_far_out(x64: None, rng: np.random.Generator) -> None:
    """exp(-x^2) is as wrong as its rounded argument: by 250 units in the last place at 24."""
    if np.finfo(np.longdouble).eps > 1e-18:
        pytest.skip("long double is no wider than double here")
    x = np.sort(rng.uniform(2, 26.4, 20_000))
    truth = long_erfc(x)
    np.testing.assert_allclose(truth.astype(float), special.erfc(x), rtol=1e-12)
    rule = elementary.FUNCTIONS["erfc"].value
    bounding = [np.asarray(a) for a in rule(Interval(jnp.asarray(x), jnp.asarray(x)))[:2]]
    for low, high in (bounding, pairs.SMOOTH["erfc"]((x, x))[0]):
        assert (low <= truth).all()
        assert (truth <= high).all()
        assert (high - low <= 1e-11 * truth + np.longdouble(1e-298)).all()


@pytest.mark.optimized
@pytest.mark.parametrize(
    "name", ["sinh", "cosh", "asinh", "atan", "log1p", "exp", "expm1", "tanh", "sqrt", "rsqrt", "cbrt"]
)
@pytest.mark.parametrize("part", ["value", "slope"])
def test_elementary_functions_hold_in_float32_at_every_size(name: str, part: str, rng: np.random.Generator) -> None:
    """What overflows in float32 is no slope of 0: asinh's from 1e19 on."""
    assert not jax.config.jax_enable_x64
    top = 1.945 if name in ("exp", "expm1", "sinh", "cosh") else 36.0
    sizes = np.concatenate([10.0 ** rng.uniform(-36, top, 4000), rng.uniform(0, 80, 2000)]).astype(np.float32)
    x = sizes if name in ("sqrt", "rsqrt", "log1p") else np.concatenate([sizes, -sizes])
    with np.errstate(over="ignore"):
        truth = {"value": WIDE, "slope": SLOPES}[part][name](x.astype(np.longdouble))
    rule = getattr(elementary.FUNCTIONS[name], part)
    low, high = (np.asarray(a) for a in jax.jit(lambda a: rule(Interval(a, a))[:2])(jnp.asarray(x)))
    assert low.dtype == np.float32
    assert (low <= truth + np.longdouble(1e-44)).all()
    assert (truth <= high + np.longdouble(1e-44)).all()


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["erf", "erfc"])
def test_error_functions_hold_scipys_value_at_every_point(name: str, x64: None) -> None:
    x = magnitudes(name)
    truth = getattr(special, name)(x)
    low, high = (np.asarray(a) for a in elementary.FUNCTIONS[name].value(Interval(jnp.asarray(x), jnp.asarray(x)))[:2])
    assert (low <= truth).all()
    assert (truth <= high).all()


@pytest.mark.optimized
@pytest.mark.parametrize("exponent", [2.5, 0.5, -1.5, 1 / 3, 7.25, -3.0, 5.0, 4.0])
def test_powers_hold_the_true_value(exponent: float, x64: None) -> None:
    x = 10.0 ** np.linspace(-20, 20, 5000)
    f = elementary.raised(exponent)
    e = np.longdouble(exponent)
    wide = x.astype(np.longdouble)
    truths = (wide**e, e * wide ** (e - 1), e * (e - 1) * wide ** (e - 2))
    for rule, truth in zip((f.value, f.slope, f.curvature), truths, strict=True):
        low, high = (np.asarray(a) for a in rule(Interval(jnp.asarray(x), jnp.asarray(x)))[:2])
        assert (low <= truth).all()
        assert (truth <= high).all()


@pytest.mark.optimized
@pytest.mark.parametrize("name", sorted(elementary.FUNCTIONS))
def test_ranges_over_intervals_hold_all_points_of_them(name: str, x64: None, rng: np.random.Generator) -> None:
    f = elementary.FUNCTIONS[name]
    lo = rng.uniform(0.01, 3, 300) if f.outside is not None else rng.uniform(-4, 4, 300)
    hi = lo + 10.0 ** rng.uniform(-6, 0.7, 300)
    points = lo + (hi - lo) * np.linspace(0, 1, 301)[:, None]
    for rule in (f.value, f.slope, f.curvature):
        low, high = (np.asarray(a) for a in rule(Interval(jnp.asarray(lo), jnp.asarray(hi)))[:2])
        inner = [np.asarray(a) for a in rule(Interval(jnp.asarray(points), jnp.asarray(points)))[:2]]
        assert (low <= inner[1]).all()
        assert (inner[0] <= high).all()
        if rule is not f.curvature and name != "cbrt":  # and not much wider than the points' own ranges
            spread = inner[1].max(0) - inner[0].min(0)
            assert (high - low <= 1.05 * spread + 1e-9).all()


# --- arrays -----------------------------------------------------------------------------------------------------------


def _networks(rng: np.random.Generator) -> dict[str, Function]:
    x = jnp.asarray(rng.standard_normal((5, 3)))
    images = jnp.asarray(rng.standard_normal((2, 6, 6, 1)))
    series = jnp.asarray(rng.standard_normal((3, 1)))
    mixing = jnp.asarray(rng.standard_normal((3, 3)))

    def conv(w: jax.Array) -> jax.Array:
        kernel = jnp.concatenate([w, w[::-1], 0.5 * w])[:9].reshape(3, 3, 1, 1)
        return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def recurrent(w: jax.Array) -> jax.Array:
        def step(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = jnp.tanh(w[0] * h + w[1] * x)
            return h, h * w[2]

        end, outputs = jax.lax.scan(step, jnp.zeros(1), series[:2])
        return jnp.concatenate([end, outputs.mean(0)])

    def counted(w: jax.Array) -> jax.Array:
        def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
            k, h = carry
            return (k + 1, jnp.sin(h + series[k, 0] * w[0])), h

        return jax.lax.scan(step, (0, w[1]), None, length=3, reverse=True)[1]

    def either(w: jax.Array) -> jax.Array:
        """Branches that meet, that do not, and one of three by a known number; the logarithm is not always defined."""
        meet = jax.lax.cond(w[0] > 0, lambda: w * w[0], lambda: jnp.zeros(3))
        jump = jax.lax.cond(w[1] + w[2] > 0.5, lambda: jnp.sin(w), lambda: w[::-1])

        def step(k: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            return k + 1, jax.lax.switch(k, [jnp.sin, jnp.cos, lambda v: v * v], w)

        return jnp.concatenate([meet, jump, jax.lax.scan(step, 0, None, length=3)[1].reshape(-1)])

    def grouped(w: jax.Array) -> jax.Array:
        """Convolutions of groups of channels and of examples, of inputs with gaps, and with an edge taken away."""
        maps, kernel = jnp.sin(jnp.outer(images[0, :, 0, 0], w)).reshape(1, 6, 3), jnp.outer(w, w).reshape(3, 3, 1)
        numbers = ("NHC", "HIO", "NHC")

        def conv(*args: Any, **options: Any) -> jax.Array:
            return jax.lax.conv_general_dilated(*args, **options, dimension_numbers=numbers)

        deep = conv(maps, kernel.transpose(0, 2, 1), (1,), "SAME", feature_group_count=3)
        gaps = conv(maps, kernel[:2], (1,), ((1, -2),), lhs_dilation=(2,))
        examples = conv(maps.reshape(3, 6, 1), kernel.transpose(0, 2, 1), (2,), "VALID", batch_group_count=3)
        return jnp.concatenate([part.reshape(-1) for part in (deep, gaps, examples)])

    def centred(w: jax.Array) -> jax.Array:
        return x * w - jnp.mean(x * w, axis=1, keepdims=True)

    return {
        "unit": lambda w: jnp.tanh(x @ w),
        "two layers": lambda w: jax.nn.relu(jnp.tanh(x[:, :1] * w[:2]) @ w[1:][:, None]),
        "product": lambda w: jnp.outer(w, w) @ mixing @ jnp.outer(w[::-1], w),
        "conv": conv,
        "max pooling": lambda w: jax.lax.reduce_window(
            conv(w), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        ),
        "padded pooling": lambda w: jax.lax.reduce_window(
            conv(w), -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"
        ),
        "average pooling": lambda w: jax.lax.reduce_window(
            jnp.sin(conv(w)), 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "SAME"
        ),
        "largest": lambda w: jnp.max(x * w, axis=1) - jnp.min(jnp.sin(x * w), axis=(0, 1)),
        "logsumexp": lambda w: jax.nn.logsumexp(x * w, axis=1),
        "softmax": lambda w: jax.nn.softmax(x * w, axis=1),
        "layer norm": lambda w: centred(w) * jax.lax.rsqrt(jnp.mean(centred(w) ** 2, axis=1, keepdims=True) + 0.1),
        "norm": lambda w: jnp.linalg.norm(w) * w,
        "mean": lambda w: jnp.mean(x * w) + jnp.var(w),
        "cumsum": lambda w: jnp.cumsum(jnp.sin(w)),
        "gather": lambda w: w[jnp.array([2, 0, 0])] * w[-1],
        "take": lambda w: jnp.take(jnp.sin(w), jnp.array([1, 1, 2]), mode="clip"),
        "missing": lambda w: jnp.sin(w).at[jnp.array([0, 5])].get(mode="fill", fill_value=7.0) * w[1],
        "slice": lambda w: jax.lax.dynamic_slice(w, (1,), (2,)) * w[:2],
        "update": lambda w: jax.lax.dynamic_update_slice(jnp.sin(w), w[:1] ** 2, (1,)),
        "pad": lambda w: jnp.pad(w, (1, 2), constant_values=0.5) ** 2,
        "stack": lambda w: jnp.stack([w, w[::-1] ** 3, jnp.ones(3)]).T,
        "recurrent": recurrent,
        "counted": counted,
        "checkpoint": lambda w: jax.checkpoint(lambda v: jnp.sin(v) * v)(w),
        "vmapped": lambda w: jax.vmap(lambda row: jnp.dot(row, w) ** 2)(x),
        "einsum": lambda w: jnp.einsum("ij,jk,k->ik", x, mixing, w) * w,
        "select": lambda w: jnp.where(jnp.array([True, False, True]), w, w**2),
        "switch": lambda w: jax.lax.select_n(jnp.array([2, 0, 1]), w, 2 * w, w**2),
        "integers": lambda w: w * jnp.argsort(x[0]) + jnp.arange(3.0),
        "either": either,
        "by platform": lambda w: jax.lax.platform_dependent(w, cpu=jnp.sin, default=lambda w: jnp.sin(w)),
        "grouped": grouped,
        "sorted": lambda w: jnp.sort(x * w, axis=0) * w,
        "middle": lambda w: jnp.sort(jnp.concatenate([w, w**2, jnp.array([0.25])]))[3],
        "products": lambda w: jnp.prod(x[:2] * w, axis=(0, 1)) + jnp.cumprod(w, axis=0) * jnp.prod(x[:3] + w, axis=1),
        "running": lambda w: jax.lax.cummax(w) - jax.lax.cummin(jnp.sin(3 * w), reverse=True),
        "one for all": lambda w: jnp.cumsum(jnp.array([1.0, 2.0, 3.0]) - jnp.sum(w**2, keepdims=True)),
        "scalar": lambda w: jnp.maximum(w[0], w) + jnp.minimum(0.3, w) * jnp.clip(w, w[1] - 1, 2.0),
    }  # fmt: skip


@pytest.mark.parametrize("name", _networks(np.random.default_rng(0)))
def test_ranges_of_arrays(name: str, x64: None, rng: np.random.Generator) -> None:
    with jax.numpy_rank_promotion("allow"):
        assert sampled(_networks(rng)[name], 3, rng, low=-1.5, high=1.5) < 1e-6


def test_ranges_of_random_programs(x64: None, rng: np.random.Generator) -> None:
    """Values at points of boxes, and their differences against the slopes; compiled quickly rather than well."""
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    for _ in range(2):
        f = program(rng, 4)
        lo, hi, points = (part[2::4] for part in boxes(3, rng, -1.5, 1.5)[1:])
        values = np.asarray(jax.jit(jax.vmap(jax.vmap(f)))(points))
        over = jax.jit(ranges.extension(f, jnp.zeros(3), order=1))
        over = over.lower(lo[0], hi[0]).compile(compiler_options=quick)
        slack = 1e-12 * (1 + np.abs(values).max((0, 1)))
        for low, high, w, at in zip(lo, hi, points, values, strict=True):
            box = over(low, high)
            assert not any(np.isnan(part).any() for part in (box.lower, box.upper, *box.first))
            assert (np.asarray(box.lower) <= at + slack).all()
            assert (at <= np.asarray(box.upper) + slack).all()
            step = (w[1:] - w[0])[..., None, None, None]
            with np.errstate(invalid="ignore"):
                parts = [np.where(step == 0, 0, step * np.asarray(end)) for end in box.first]
            assert not (at[1:] - at[0] < np.minimum(*parts).sum(1) - slack).any()
            assert not (at[1:] - at[0] > np.maximum(*parts).sum(1) + slack).any()


@pytest.mark.optimized
def test_long_sums_do_not_lose_digits(x64: None, rng: np.random.Generator) -> None:
    """A sum of a million numbers of which nothing is left, and its exact value."""
    import math

    half = rng.standard_normal(2**12) * 10.0 ** rng.uniform(-8, 8, 2**12)
    x = np.concatenate([half, -half, [1e-9]])
    r = ranges.extension(lambda w: jnp.sum(jnp.asarray(x) * w), jnp.zeros(1))(jnp.ones(1), jnp.ones(1))
    assert float(r.lower) <= math.fsum(x) <= float(r.upper)
    r = ranges.extension(lambda w: jnp.asarray(x)[None] @ jnp.broadcast_to(w, x.shape), jnp.zeros(1))(
        jnp.ones(1), jnp.ones(1)
    )
    assert float(r.lower[0]) <= math.fsum(x) <= float(r.upper[0])


# --- what is refused, and what is not believed ------------------------------------------------------------------------


@jax.custom_jvp
def liar(a: jax.Array) -> jax.Array:
    return jnp.sin(5 * a)


liar.defjvp(lambda primals, tangents: (liar(*primals), 0.0 * tangents[0]))


@jax.custom_vjp
def other_liar(a: jax.Array) -> jax.Array:
    return jnp.sin(5 * a)


other_liar.defvjp(lambda a: (other_liar(a), None), lambda _, g: (0.0 * g,))


LIARS: dict[str, Function] = {
    "custom_jvp": liar,
    "custom_vjp": other_liar,
    "stop_gradient": lambda a: jnp.sin(5 * jax.lax.stop_gradient(a)),
    "inside": jax.jit(lambda a: liar(a)),
}


def test_a_programs_own_derivative_is_not_believed(x64: None, rng: np.random.Generator) -> None:
    for f in LIARS.values():
        sampled(f, 1, rng)
        low, high = ranges.extension(f, jnp.zeros(1), order=1)(jnp.zeros(1), jnp.full(1, 1e-3)).first
        assert float(low[0, 0]) <= 5 <= float(high[0, 0]) < 5.001


def test_a_function_named_logaddexp_is_not_taken_for_it(x64: None, rng: np.random.Generator) -> None:
    @jax.custom_jvp
    def logaddexp(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.maximum(a, b) + jnp.log1p(jnp.exp(-2 * jnp.abs(a - b)))

    logaddexp.defjvp(lambda p, t: (logaddexp(*p), t[0]))
    sampled(lambda w: logaddexp(w, 0.5 * w), 1, rng)
    assert "logaddexp" in programs.trace(lambda w: jnp.logaddexp(w, 0.0), jnp.zeros(1))[0].primitives()
    assert "logaddexp" not in programs.trace(lambda w: logaddexp(w, 0.0), jnp.zeros(1))[0].primitives()


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda w: w[jnp.argsort(w)], "sort by keys .* alone, by jnp.sort"),
        (lambda w: w * jnp.argmax(w), "argmax"),
        (lambda w: jax.lax.while_loop(lambda s: s[0] < 3, lambda s: s * 2, w), "while.* lax.fori_loop with bounds"),
        (lambda w: jax.lax.top_k(w, 2)[0], "top_k: write jnp.sort"),
        (lambda w: jnp.arctan2(w, w + 9), "atan2: write jnp.arctan"),
        (lambda w: jax.lax.switch(w[0].astype(jnp.int32), [jnp.sin, jnp.cos, jnp.tanh], w), "integers"),
        (lambda w: jax.lax.lgamma(w), "lgamma"),
        (lambda w: w[w[0].astype(jnp.int32)] * w, "depend on the weights"),
        (lambda w: (w.astype(jnp.int32) + 1).astype(w.dtype), "add of integers"),
        (lambda w: jnp.abs(jnp.fft.fft(w)), "fft"),
        (lambda w: jax.lax.scan(lambda h, _: (h * w, None), w, None, length=1000)[0], "1000 steps"),
        (lambda w: jax.lax.bitcast_convert_type(w, jnp.int64).astype(w.dtype), "bitcast_convert_type"),
    ],
)
def test_operations_without_a_rule_are_named(f: Function, name: str, x64: None) -> None:
    with pytest.raises(rules.UnsupportedPrimitiveError, match=name):
        ranges.extension(f, jnp.zeros(3))


@pytest.mark.parametrize(
    "f",
    [
        lambda w: jnp.tanh(jnp.log(w)), lambda w: jnp.maximum(jnp.sqrt(w), 0.0), lambda w: jnp.clip(1 / w, -1, 1),
        lambda w: jnp.tanh(w**-0.5), lambda w: jnp.where(jax.lax.rsqrt(w) > 0, 1.0, 0.0), lambda w: jnp.sin(w**0.3),
        lambda w: jax.nn.sigmoid(jnp.log1p(w - 1)), lambda w: jnp.minimum(0.0, w / w), lambda w: jnp.exp(-1.0 / w**2),
        lambda w: jnp.take(jnp.sin(w), jnp.array([5]), mode="fill"), lambda w: jnp.maximum(w, jnp.array([np.nan])),
        lambda w: jnp.tanh(jnp.where(w > 0, w, np.nan)), lambda w: jnp.where(jnp.array([np.nan]) > w, 1.0, 0.0),
        lambda w: jnp.where(jnp.array([True]), jnp.full(1, np.nan), w),
        lambda w: jnp.concatenate([w, jnp.full(1, np.nan)]),
    ],
)  # fmt: skip
def test_where_a_function_may_not_be_defined_nothing_is_claimed(f: Function, x64: None) -> None:
    """A bounded function of what is NaN or infinite somewhere on the box has the whole line as range."""
    r = ranges.extension(f, jnp.zeros(1), order=1)(jnp.full(1, -0.5), jnp.full(1, 0.5))
    assert not bool(r.defined)
    assert np.isneginf(r.lower).all()
    assert np.isposinf(r.upper).all()
    assert np.isneginf(r.first[0]).all()


@pytest.mark.optimized
def test_infinite_ends_are_never_nan(x64: None) -> None:
    inf = jnp.array([-jnp.inf, 0.0, jnp.inf, 1e308, -1e-310])
    a, b = Interval(jnp.minimum(inf, 0), jnp.maximum(inf, 0)), Interval(-jnp.abs(inf), jnp.abs(inf))
    for rule in (intervals.add, intervals.sub, intervals.mul, intervals.divide):
        for x, y in ((a, b), (b, a), (a, a), (b, b)):
            low, high, _ = rule(x, y)
            assert not jnp.isnan(low).any()
            assert not jnp.isnan(high).any()
    for f in elementary.FUNCTIONS.values():
        for rule in (f.value, f.slope, f.curvature):
            assert not jnp.isnan(jnp.stack(rule(b)[:2])).any()


def test_smoothness_is_read_off_the_operations(x64: None) -> None:
    assert ranges.is_smooth(lambda w: jnp.sum(jnp.tanh(w)), jnp.zeros(2))
    assert ranges.is_smooth(lambda w: jnp.sum(jnp.where(jnp.array([True, False]), w, 0.0)), jnp.zeros(2))
    assert not ranges.is_smooth(lambda w: jnp.sum(jax.nn.relu(w)), jnp.zeros(2))
    assert not ranges.is_smooth(jax.jit(lambda w: jnp.sum(jnp.abs(w))), jnp.zeros(2))
