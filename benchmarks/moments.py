"""How far two-layer ReLU networks on MNIST are from the global optimum, as the moment relaxation proves it.

    python benchmarks/moments.py [--json FILE] [--smoke] [--cases 100:squared:0.1,...] [--pixels standardised|raw]

Even digits against odd ones, `(1/n) sum_j l(z_j) + penalty sum_i (a_i^2 + |u_i|^2)`, penalty a share of the least one
at which the zero network is optimal.  That least penalty comes from a search (estimated), so the shares are;
everything else in a row is

- `network`: the risk of a network of 60 units (100 at n = 100) that L-BFGS trained: an upper bound on the optimum,
  as evaluated in float64;
- `certified`: the proven lower bound, of any number of units (`moments.joint.relaxation`), and
  `gap`: `(network - certified) / network`, in percent;
- `without cover`: the same gap with no cover, at the network's own dual vector (certified);
- `estimated gap`: the same with the largest value that a search found in place of a bound (estimated);
- seconds of processor time for the lower bound, and for proving it again (`moments.verify`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np

from dualgap_jax import data
from dualgap_jax.certify.descent import lbfgs
from dualgap_jax.certify.moments.balls import ball_bound
from dualgap_jax.certify.moments.covering import Effort, effort_for
from dualgap_jax.certify.moments.joint import relaxation
from dualgap_jax.certify.moments.start import FORMS
from dualgap_jax.certify.moments.verify import verify_relaxation

_CASES = "100:squared:0.5,100:squared:0.1,100:squared:0.01,100:logistic:0.5,1000:squared:0.5,1000:squared:0.1,"
_CASES += "1000:logistic:0.5,10000:squared:0.5"
_COLUMNS = {
    "case": "n, loss, share",
    "penalty": "penalty",
    "network": "network",
    "certified": "certified >=",
    "gap": "gap %, certified",
    "plain_gap": "without cover %, certified",
    "estimated_gap": "gap %, estimated",
    "seconds": "processor s",
    "verify_seconds": "verify, processor s",
}


class Case(NamedTuple):
    """A row of the table."""

    n: int
    loss: str
    share: float


def digits(n: int, pixels: str, smoke: bool) -> tuple[np.ndarray, np.ndarray]:
    """`x [n, 784]` and labels, +1 for even digits."""
    if smoke:
        rng = np.random.default_rng(0)
        return rng.standard_normal((n, 12)), np.where(rng.random(n) < 0.5, 1.0, -1.0)
    found = data.mnist(standardise="pixel" if pixels == "standardised" else "none", num_examples=n)
    x = (np.asarray(found.x, np.float64) - found.mean) / found.std
    return x.reshape(n, -1), np.where(found.y % 2 == 0, 1.0, -1.0)


def trained(
    x: np.ndarray, y: np.ndarray, loss: str, penalty: float, units: int, steps: int, tries: int
) -> tuple[float, np.ndarray, np.ndarray]:
    """The least risk of some networks that L-BFGS trained, its outputs and the directions of its units."""
    form, (n, d) = FORMS[loss], x.shape

    def risk(flat: np.ndarray) -> tuple[float, np.ndarray]:
        first, last = flat[: units * d].reshape(d, units), flat[units * d :]
        before = x @ first
        hidden = np.maximum(before, 0.0)
        z = hidden @ last
        pull = form.slope(z, y) / n
        value = float(form.loss(z, y).mean()) + penalty * float(flat @ flat)
        inner = x.T @ ((pull[:, None] * (before > 0)) * last)
        return value, np.concatenate([inner.ravel(), hidden.T @ pull]) + 2 * penalty * flat

    options = {"maxiter": steps, "maxfun": 2 * steps, "maxcor": 30, "ftol": 1e-12, "gtol": 1e-9}
    starts = [np.random.default_rng(seed).standard_normal(units * (d + 1)) for seed in range(tries)]
    tried = [lbfgs(risk, 0.1 / np.sqrt(d) * start, **options) for start in starts]
    found = min(tried, key=lambda each: risk(each)[0])
    first, last = found[: units * d].reshape(d, units), found[units * d :]
    return risk(found)[0], np.maximum(x @ first, 0.0) @ last, first


def searched(
    x: np.ndarray, alpha: np.ndarray, first: np.ndarray | None = None, tries: int = 60, steps: int = 100
) -> float:
    """The largest `|(1/n) sum_j alpha_j (u x_j)_+|` that ascent from `first` and from random directions finds."""
    u = np.random.default_rng(0).standard_normal((x.shape[1], tries))
    u = u if first is None else np.concatenate([u, first[:, np.any(first != 0, axis=0)]], axis=1)
    best = 0.0
    for sign in (1.0, -1.0):
        at = u / np.linalg.norm(u, axis=0)
        for _ in range(steps):
            best = max(best, float((sign * alpha @ np.maximum(x @ at, 0.0)).max()) / len(x))
            up = x.T @ ((sign * alpha)[:, None] * (x @ at > 0)) / len(x)
            at = at + up / np.maximum(np.linalg.norm(up, axis=0), 1e-300)
            at = at / np.linalg.norm(at, axis=0)
        best = max(best, float((sign * alpha @ np.maximum(x @ at, 0.0)).max()) / len(x))
    return best


def scaled_bound(alpha: np.ndarray, y: np.ndarray, loss: str, most: float) -> float:
    """`max over theta <= most of -(1/n) sum_j l*(theta alpha_j)`, on a grid."""
    top = most if loss == "squared" else min(most, 1 / float(np.abs(alpha).max()))
    return max(float(FORMS[loss].gain(theta * alpha, y)[0].mean()) for theta in np.linspace(0, top, 2001))


def measure(case: Case, pixels: str, smoke: bool) -> dict[str, Any]:
    """One row."""
    x, y = digits(case.n, pixels, smoke)
    left, sizes, _ = np.linalg.svd(x, full_matrices=False)
    seen = left * sizes  # the same problem in fewer coordinates: for training and search alone
    form = FORMS[case.loss]
    penalty = 0.5 * case.share * searched(seen, form.slope(np.zeros(case.n), y))
    size = (8, 50, 1) if smoke else (100, 1500, 3) if case.n <= 100 else (60, 1000 if case.n <= 1000 else 300, 1)
    network, z, directions = trained(seen, y, case.loss, penalty, *size)
    alpha = form.slope(z, y)
    effort = Effort(first_steps=20, steps=10) if smoke else None
    start = time.process_time()
    found = relaxation(x, y, case.loss, penalty=penalty, alpha=alpha, effort=effort)
    seconds = time.process_time() - start
    start = time.process_time()
    verify_relaxation(x, y, case.loss, penalty, found)
    verify_seconds = time.process_time() - start
    plain = ball_bound(x, alpha, effort=(effort or effort_for(case.n))._replace(steps=0)).upper
    gaps = [
        100 * (network - lower) / network
        for lower in (
            found.lower,
            scaled_bound(alpha, y, case.loss, 2 * penalty / plain),
            max(
                scaled_bound(a, y, case.loss, 2 * penalty / searched(seen, a, directions)) for a in (alpha, found.alpha)
            ),
        )
    ]
    return {
        "case": f"{case.n}, {case.loss}, {case.share:g}",
        "penalty": penalty,
        "network": network,
        "certified": found.lower,
        "gap": gaps[0],
        "plain_gap": gaps[1],
        "estimated_gap": gaps[2],
        "seconds": seconds,
        "verify_seconds": verify_seconds,
        "targets": {},
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments(__doc__ or "", rounds=1)
    parser.add_argument("--cases", default=_CASES, help="comma-separated n:loss:share")
    parser.add_argument("--pixels", choices=("standardised", "raw"), default="standardised")
    flags = parser.parse_args(argv)
    cases = [Case(int(n), loss, float(share)) for n, loss, share in (c.split(":") for c in flags.cases.split(","))]
    if flags.smoke:
        cases = [Case(20, loss, 0.2) for loss in ("squared", "logistic")]
    rows = []
    for case in cases:
        rows.append(measure(case, flags.pixels, flags.smoke))
        print({key: common.text(rows[-1][key]) for key in _COLUMNS}, flush=True)
    results = {"environment": common.environment(), "pixels": flags.pixels, "smoke": flags.smoke, "rows": rows}
    notes = ["certified: proven with all rounding; estimated: rests on a search; network: a trained network's risk."]
    common.report(results, _COLUMNS, notes, Path(flags.json) if flags.json else None)


if __name__ == "__main__":
    main(sys.argv[1:])
