"""The moment relaxation: never below the truth, and proven again by other arithmetic."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.sparse import csr_array

from dualgap_jax.certify.moments.ascent import trust_region
from dualgap_jax.certify.moments.balls import BallBound, ball_bound, side_of
from dualgap_jax.certify.moments.covering import Effort
from dualgap_jax.certify.moments.proof import Multipliers, scaled_points
from dualgap_jax.certify.moments.verify import verify_ball_bound, verify_side
from dualgap_jax.spectral.evidence import VerificationError

QUICK = Effort(first_steps=60, steps=40)


def on_arcs(x: np.ndarray, alpha: np.ndarray, signs: tuple[int, ...] = (1, -1)) -> float:
    """The largest size over the unit disc, d = 2, exactly but for rounding; of one sign of the sum, or both.

    On each arc without a change of signs the sum is linear in u: largest at the arc's ends, or in its own direction.
    """
    best = 0.0
    angles = np.arctan2(x[:, 1], x[:, 0])[np.any(x != 0, axis=1)]
    cuts = np.unique(np.mod(np.concatenate([angles + np.pi / 2, angles - np.pi / 2, [0.0]]), 2 * np.pi))
    cuts = np.append(cuts, cuts[0] + 2 * np.pi)
    for low, high in itertools.pairwise(cuts):
        middle = np.array([np.cos((low + high) / 2), np.sin((low + high) / 2)])
        total = (alpha * (x @ middle > 0)) @ x / len(x)
        for sign in signs:
            angle = np.arctan2(sign * total[1], sign * total[0])
            angle = low + np.mod(angle - low, 2 * np.pi)
            for at in (low, high, *([angle] if angle <= high else [])):
                best = max(best, sign * float(total @ [np.cos(at), np.sin(at)]))
    return best


def by_search(x: np.ndarray, alpha: np.ndarray, rng: np.random.Generator) -> float:
    """A value that is reached, in any dimension: many directions, the best ones improved."""

    def value(u: np.ndarray) -> np.ndarray:
        u = u / np.linalg.norm(u, axis=-1, keepdims=True)
        return np.abs(np.maximum(u @ x.T, 0.0) @ alpha) / len(x)

    starts = rng.standard_normal((4000, x.shape[1]))
    best = starts[np.argsort(value(starts))[-3:]]
    return max(-minimize(lambda u: -float(value(u[None])[0]), u, method="Nelder-Mead").fun for u in best)


def cases(rng: np.random.Generator, d: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    x, alpha = rng.standard_normal((9, d)), rng.standard_normal(9)
    return {
        "random": (x, alpha),
        "one row": (x[:1], alpha[:1]),
        "all positive": (x, np.abs(alpha)),
        "all negative": (x, -np.abs(alpha)),
        "duplicates": (np.concatenate([x, x, -x]), np.concatenate([alpha, -0.5 * alpha, alpha])),
        "cancelling": (np.concatenate([x, x]), np.concatenate([alpha, -alpha])),
        "some zero": (x * (np.arange(9) % 3 > 0)[:, None], alpha * (np.arange(9) % 4 > 0)),
        "ties": (np.round(x), np.sign(alpha)),
        "a line": (np.outer(alpha, x[0]), rng.standard_normal(9)),
        "a shift": (x + 5.0, alpha),
        "unlike lengths": (x * np.geomspace(1e-150, 1e150, 9)[:, None], alpha * np.geomspace(1e150, 1e-150, 9)),
        "tiny rows": (x * np.r_[1.0, np.full(8, 1e-300)][:, None], np.r_[-1.0, np.abs(alpha[1:])]),
    }


NAMES = sorted(cases(np.random.default_rng(0), 2))


@pytest.mark.parametrize("name", NAMES)
def test_never_below_the_truth_on_a_disc(name: str, rng: np.random.Generator) -> None:
    for _ in range(2):
        x, alpha = cases(rng, 2)[name]
        found = ball_bound(x, alpha, effort=QUICK)
        truth = on_arcs(x, alpha)
        assert found.upper >= truth * (1 - 1e-13)
        assert verify_ball_bound(x, alpha, found) <= found.upper
        if name == "cancelling":
            assert found.upper <= 1e-2 * np.abs(alpha).max()
        else:
            assert found.upper <= 1.4 * truth + 1e-9 * np.sum(np.abs(alpha) * np.linalg.norm(x, axis=1))


@pytest.mark.parametrize("d", [1, 3])
def test_never_below_what_is_reached(d: int, rng: np.random.Generator) -> None:
    for name, (x, alpha) in cases(rng, d).items():
        found = ball_bound(x, alpha, effort=QUICK)
        assert found.upper >= by_search(x, alpha, rng) * (1 - 1e-13), name
        assert verify_ball_bound(x, alpha, found) <= found.upper


def test_exact_where_all_weights_have_one_sign_and_points_are_alike() -> None:
    found = ball_bound(np.full((4, 3), 2.0), np.array([1.0, 2.0, 3.0, 4.0]), effort=QUICK)
    np.testing.assert_allclose(found.upper, 2.5 * math.sqrt(12), rtol=1e-3)
    assert found.sides[0][1].upper <= 1e-3


def test_float32_is_taken_as_it_is(rng: np.random.Generator) -> None:
    x, alpha = rng.standard_normal((5, 2)).astype(np.float32), rng.standard_normal(5).astype(np.float32)
    assert (
        ball_bound(x, alpha, effort=QUICK).upper
        == ball_bound(x.astype(np.float64), alpha.astype(np.float64), effort=QUICK).upper
    )


@pytest.mark.parametrize("power", [-500, -300, 300, 450])
def test_scales_by_powers_of_two_exactly(power: int, rng: np.random.Generator) -> None:
    x, alpha = rng.standard_normal((6, 2)), rng.standard_normal(6)
    one = ball_bound(x, alpha, effort=QUICK)
    other = ball_bound(np.ldexp(x, power), np.ldexp(alpha, power), effort=QUICK)
    np.testing.assert_allclose(other.upper, math.ldexp(one.upper, 2 * power), rtol=1e-15)


def test_several_outputs_are_bounded_in_norm(rng: np.random.Generator) -> None:
    x, alpha = rng.standard_normal((12, 2)), rng.standard_normal((12, 3))
    found = ball_bound(x, alpha, effort=QUICK)
    angles = np.linspace(0, 2 * np.pi, 100_001)
    reached = np.maximum(np.stack([np.cos(angles), np.sin(angles)], 1) @ x.T, 0.0) @ alpha / 12
    assert np.linalg.norm(reached, axis=1).max() <= found.upper
    assert len(found.sides) == 3
    assert verify_ball_bound(x, alpha, found) <= found.upper


def test_large_problems_go_through_floats(rng: np.random.Generator) -> None:
    x, alpha = rng.standard_normal((300, 40)), rng.standard_normal(300)
    found = ball_bound(x, alpha, effort=QUICK)
    again = verify_ball_bound(x, alpha, found)
    assert found.upper * (1 - 1e-9) <= again <= found.upper
    directions = rng.standard_normal((2000, 40))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    assert np.abs(np.maximum(directions @ x.T, 0.0) @ alpha).max() / 300 <= found.upper


def tampered(found: BallBound, which: int, **changes: Any) -> BallBound:
    sides = list(found.sides[0])
    sides[which] = sides[which]._replace(**changes)
    return found._replace(sides=(tuple(sides),))


@pytest.mark.parametrize("n", [9, 200])
def test_what_is_claimed_too_low_is_refused(n: int, rng: np.random.Generator) -> None:
    x, alpha = rng.standard_normal((n, 8 if n > 9 else 2)), rng.standard_normal(n)
    found = ball_bound(x, alpha, effort=QUICK)
    assert n == 9 or any(side.cover is not None for side in found.sides[0])
    for which in (0, 1):
        side = found.sides[0][which]
        low = side.upper * (1 - 1e-6)
        covers = [np.zeros((n - 1, n))]
        if side.cover is not None:  # of the sign that counts, or of both
            covers = [None, 1.05 * side.cover, -side.cover, side.cover[:-1], np.nan * side.cover]
        for changes in (
            {"upper": low},
            *({"cover": other if other is None else csr_array(other)} for other in covers),
            {"mu": side.mu * (1 - 1e-3)},
            {"mu": -side.mu},
            {"beta": side.beta - 1e-3 * side.mu},
            {"mu": 1e300},
            {"beta": -1e300},
            {"delta": np.where(side.delta > 0, 1e-300, 0.0)},
            {"delta": side.delta * 1.01},
            {"delta": side.delta * 0.9},
            {"delta": np.zeros(n)},
            {"delta": -side.delta},
            {"kappa": side.kappa + 0.5},
            {"kappa": np.full(n, np.nan)},
            {"curvature": side.curvature + 1.0},
            {"curvature": -side.curvature - 1e-3},
            {"exponent": side.exponent + 1},
            {"exponent": 10**12},
            {"upper": math.nan},
            {"upper": -1.0},
        ):
            with pytest.raises(VerificationError):
                verify_ball_bound(x, alpha, tampered(found, which, **changes))
    with pytest.raises(VerificationError, match="claimed"):
        verify_ball_bound(x, alpha, found._replace(upper=found.upper * 0.999))


def test_other_multipliers_prove_what_they_prove(rng: np.random.Generator) -> None:
    """A bound from multipliers drawn at random is either refused or true, whatever it claims."""
    accepted = 0
    for _ in range(12):
        x, alpha = rng.standard_normal((5, 2)), rng.standard_normal(5)
        found, truth = ball_bound(x, alpha, effort=QUICK), on_arcs(x, alpha)
        side = found.sides[0][int(rng.integers(2))]
        changed = side._replace(
            delta=side.delta * rng.uniform(0.5, 2, 5),
            kappa=side.kappa + rng.uniform(-0.2, 0.2, 5),
            curvature=np.abs(side.curvature + rng.uniform(-0.2, 0.2, 5)),
            mu=side.mu * rng.uniform(0.5, 2),
            beta=side.beta * rng.uniform(0.5, 2),
            upper=side.upper * rng.uniform(0.7, 1.6),
        )
        which = 0 if side.sign == 1 else 1
        claim = tampered(found, which, **changed._asdict())
        claim = claim._replace(upper=max(s.upper for s in claim.sides[0]))
        try:
            accepted += verify_ball_bound(x, alpha, claim) >= truth * (1 - 1e-13)
        except VerificationError:
            continue
        assert claim.upper >= truth * (1 - 1e-13)
    assert accepted >= 1


@pytest.mark.parametrize(
    ("x", "alpha", "words"),
    [
        (np.zeros((0, 2)), np.zeros(0), "at least 1"),
        (np.zeros((2, 0)), np.zeros(2), "at least 1"),
        (np.ones((2, 2)), np.ones(3), "need x"),
        (np.ones(2), np.ones(2), "need x"),
        (np.full((2, 2), np.nan), np.ones(2), "not finite"),
        (np.ones((2, 2)), np.array([1.0, np.inf]), "not finite"),
        (np.ones((2, 2), np.int64), np.ones(2), "int64"),
        (np.ones((2, 2)), np.array(["a", "b"]), "dtype"),
        (np.full((2, 2), 1e300), np.full(2, 1e300), "range"),
    ],
)
def test_refused(x: np.ndarray, alpha: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ball_bound(x, alpha, effort=QUICK)


@pytest.mark.parametrize(
    "changes", [{"rank": 1}, {"first_steps": 0}, {"steps": -1}, {"width": 0}, {"last_width": 0}, {"partners": True}]
)
def test_effort_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        ball_bound(np.ones((2, 2)), np.ones(2), effort=Effort()._replace(**changes))


def test_a_claim_with_residuals_that_cancel_is_proven_again(rng: np.random.Generator) -> None:
    """The rounding of `r_i` is large in `(r_i u)^2 / delta_i` if delta_i is smaller still; exact r_i prove it too."""
    for _ in range(100):
        x, sizes = rng.standard_normal((3, 2)), rng.uniform(0.5, 2, 3)
        x, alpha = np.concatenate([x, x]), np.concatenate([sizes, -sizes])
        points, left = scaled_points(x, alpha), 10.0 ** rng.uniform(-6, -3, 3)
        vp, vn, cover = points.v[:3], points.v[3:], csr_array(np.diag(1 - left))
        residual = vp - cover @ vn
        delta = np.linalg.norm(residual, axis=1) * 10.0 ** rng.uniform(-6, -2, 3)
        slope = 0.5 * vp.sum(axis=0) - 0.5 * vn.sum(axis=0)
        mu, beta = trust_region(slope, (residual * (0.25 / delta)[:, None]).T @ residual)
        side = side_of(points, Multipliers(delta, np.zeros(3), np.zeros(3), cover, mu, beta), 1)
        assert verify_side(x, alpha, side) == side.upper


def test_whatever_multipliers_are_given_the_bound_holds(rng: np.random.Generator) -> None:
    """Loads above 1, deltas of zero, an H that is not semidefinite, a negative mu: all are charged, not believed."""
    for _ in range(100):
        x, alpha = rng.standard_normal((6, 2)), rng.standard_normal(6)
        alpha[0] = -abs(alpha[0])
        points = scaled_points(x, alpha)
        p = int(points.positive.sum())
        size = float(np.abs(points.v).sum())
        side = side_of(
            points,
            Multipliers(
                10.0 ** rng.uniform(-2, 0, p) * (rng.random(p) < 0.7),
                rng.uniform(-1.2, 1.2, 6 - p),
                rng.uniform(0, 1.2, 6 - p) * (rng.random(6 - p) < 0.5),
                csr_array(rng.uniform(-1, 1, (p, 6 - p)) * (rng.random((p, 6 - p)) < 0.5))
                if rng.random() < 0.7
                else None,
                size * float(rng.uniform(-0.1, 0.3)),
                size * float(rng.uniform(-0.1, 0.3)),
            ),
            1,
        )
        assert side.upper >= on_arcs(x, alpha, (1,)) * (1 - 1e-13)
        assert verify_side(x, alpha, side) == side.upper


def test_no_charge_is_made_for_nothing(rng: np.random.Generator) -> None:
    """Where conditions hold, the bound is that of its formula: with neither cover nor curvature, in closed form."""
    for _ in range(50):
        x, alpha = rng.standard_normal((6, 2)), rng.standard_normal(6)
        points = scaled_points(x, alpha)
        vp, vn = points.v[points.positive], points.v[~points.positive]
        delta, kappa = rng.uniform(0.1, 1, len(vp)), rng.uniform(-1, 1, len(vn))
        form = (vp / (4 * delta)[:, None]).T @ vp
        slope = 0.5 * vp.sum(axis=0) - 0.5 * (1 + kappa) @ vn
        mu = float(np.linalg.eigvalsh(form)[-1]) + rng.uniform(0.1, 1)
        beta = 0.25 * float(slope @ np.linalg.solve(mu * np.eye(2) - form, slope))
        side = side_of(points, Multipliers(delta, kappa, np.zeros(len(vn)), None, mu, beta), 1)
        wanted = math.ldexp((0.25 * delta.sum() + mu + beta) / 6, points.exponent)
        np.testing.assert_allclose(side.upper, wanted, rtol=1e-12)
