"""Speed of Theorem 2's solver at CIFAR-10 size beside NumPy's pseudo-inverse and SciPy's QR factorisation.

    python benchmarks/spectral.py [--json FILE] [--smoke] [--rounds N] [--data random] [--no-peers]

X is 3072 x 50,000 (standardised pixels), Y 10 x 50,000 (centred one-hot labels).  In one run are measured

- `gram`, `qr`: `spectral.solve_columns` with that factorisation, certificate included, compilation not;
- `pinv`: `numpy.linalg.pinv(X)`, `Yt = Y X^+ X` and its SVD, in the same precision;
- `scipy_qr`: `scipy.linalg.qr(X^T, mode='r')` alone.

The limit is the time that the operations of the factorisation alone would take at the rate of a bare jitted product of
the same precision: n d^2 for the Gram matrix (one triangle), 2 n d^2 - 2/3 d^3 for Householder's QR.  The peer's primal
value, in float64, must agree with the certificate.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from dualgap_jax.config import Component
from dualgap_jax.experiments import TABLES
from dualgap_jax.experiments.linear_dual import LinearDualSpec, Matrices, matrices
from dualgap_jax.spectral import ColumnsSolution, in_blocks, solve_columns

_GAMMA, _WIDTHS = 5.0, (9, 9)
_OVER_PINV, _OVER_QR = "pinv_over_this", "scipy_qr_over_this"
_TARGETS = {
    "gram": [common.Target(_OVER_PINV, 6.0)],
    "qr": [common.Target(_OVER_PINV, 3.0), common.Target(_OVER_QR, 1.0)],
}
_PRODUCT_ROWS = 4096  # examples in the bare product that gives the limit


def problem(name: str, precision: str, smoke: bool) -> Matrices:
    """X and Y, columns in memory one after another (Fortran order), which suits all four."""
    if name == "cifar10" and not smoke:
        found = matrices(LinearDualSpec(data=Component("cifar10", {})), TABLES)
    else:
        d, n = (24, 300) if smoke else (3072, 50_000)
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((n, d), np.float32) * np.geomspace(1, 1e-3, d, dtype=np.float32)
        labels = np.eye(10, dtype=np.float32)[:, rng.integers(0, 10, n)]
        found = Matrices(rows.T, labels - labels.mean(axis=1, keepdims=True), {"name": "random"})
    return Matrices(np.asfortranarray(found.x, precision), found.y.astype(precision), found.info)


def by_pinv(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The way without this package: `A = Y X^+` and the singular values of `Yt = A X`."""
    fit = y @ np.linalg.pinv(x)
    return fit, np.linalg.svd(fit @ x, full_matrices=False)[1]


def value_of(fit: np.ndarray, sigma: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """The optimum of problem (4) from the closed form, in float64."""
    misfit = sum(
        float(np.sum((y[:, i : i + 4096] - fit.astype(np.float64) @ x[:, i : i + 4096]) ** 2))
        for i in range(0, x.shape[1], 4096)
    )
    sigma = sigma.astype(np.float64)
    kept = np.maximum(sigma - _GAMMA, 0) * (np.arange(len(sigma)) < min(_WIDTHS))
    return 0.5 * misfit + 0.5 * float(np.sum((sigma - kept) ** 2)) + _GAMMA * float(kept.sum())


def product_rate(d: int, precision: str) -> float:
    """Operations a second of a bare jitted product."""
    with jax.enable_x64(True):
        a = jnp.asarray(np.random.default_rng(0).standard_normal((d, min(d, _PRODUCT_ROWS))), precision)
        multiply = jax.jit(jnp.matmul)
        jax.block_until_ready(multiply(a.T, a))
        best = min(_seconds(lambda: jax.block_until_ready(multiply(a.T, a)))[0] for _ in range(3))
    return 2 * a.shape[0] * a.shape[1] ** 2 / best


def _seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure(found: Matrices, rounds: int, precision: str, peers: bool) -> list[dict[str, Any]]:
    """One row a factorisation; everything is run in turn, round after round."""
    x, y, _ = found
    d, n = x.shape
    columns = in_blocks(x, y)
    seconds: dict[str, list[float]] = {name: [] for name in ("gram", "qr", "pinv", "scipy_qr", "rate")}
    solved: dict[str, ColumnsSolution] = {}
    for name in ("gram", "qr"):  # compiles
        solve_columns(columns, gamma=_GAMMA, widths=_WIDTHS, factorization=name)
    for index in range(rounds):
        seconds["rate"].append(product_rate(d, precision))
        for name in ("gram", "qr"):
            taken, solved[name] = _seconds(
                lambda name=name: solve_columns(columns, gamma=_GAMMA, widths=_WIDTHS, factorization=name)
            )
            seconds[name].append(taken)
            print(f"round {index + 1}: {name} {taken:.2f} s", flush=True)
        if not peers:
            continue
        taken, (fit, sigma) = _seconds(lambda: by_pinv(x, y))
        seconds["pinv"].append(taken)
        print(f"round {index + 1}: pinv {taken:.2f} s", flush=True)
        taken, _ = _seconds(lambda: scipy.linalg.qr(x.T, mode="r"))
        seconds["scipy_qr"].append(taken)
        print(f"round {index + 1}: scipy qr {taken:.2f} s", flush=True)
    peer = value_of(fit, sigma, x, y) if peers else None
    work = {"gram": n * d**2, "qr": 2 * n * d**2 - 2 / 3 * d**3}
    rows = []
    for name in ("gram", "qr"):
        own = np.asarray(seconds[name])
        limit = work[name] / np.asarray(seconds["rate"])
        solution = solved[name].solution
        row = {
            "case": name,
            "seconds": common.spread(own),
            "limit_seconds": common.spread(limit),
            "of_limit": common.spread(limit / own),
            "pinv_seconds": common.NOT_MEASURED,
            "scipy_qr_seconds": common.NOT_MEASURED,
            _OVER_PINV: common.NOT_MEASURED,
            _OVER_QR: common.NOT_MEASURED,
            "relative_gap": float(solution.relative_gap),
            "passes": solved[name].attempts[-1].passes,
            "peer_disagreement": common.NOT_MEASURED,
        }
        if peer is not None:
            row |= {
                "pinv_seconds": common.spread(np.asarray(seconds["pinv"])),
                "scipy_qr_seconds": common.spread(np.asarray(seconds["scipy_qr"])),
                _OVER_PINV: common.spread(np.asarray(seconds["pinv"]) / own),
                _OVER_QR: common.spread(np.asarray(seconds["scipy_qr"]) / own),
                "peer_disagreement": abs(peer - float(solution.primal)) / abs(peer),
            }
        rows.append({**row, "targets": common.judge(row, _TARGETS[name])})
    return rows


def main(argv: Sequence[str]) -> None:
    parser = common.arguments((__doc__ or "").split("\n")[0], rounds=1)
    parser.add_argument("--data", choices=("cifar10", "random"), default="cifar10")
    parser.add_argument("--precision", choices=("float32", "float64"), default="float32")
    parser.add_argument("--no-peers", action="store_true", help="leave NumPy and SciPy out, which work on the CPU")
    flags = parser.parse_args(argv)
    where = common.environment()
    found = problem(flags.data, flags.precision, flags.smoke)
    rows = measure(found, 1 if flags.smoke else flags.rounds, flags.precision, not flags.no_peers)
    results = {
        "benchmark": "spectral",
        "smoke": flags.smoke,
        "rounds": 1 if flags.smoke else flags.rounds,
        "environment": where,
        "data": found.info,
        "precision": flags.precision,
        "shape": list(found.x.shape),
        "rows": rows,
    }
    columns = {
        "case": "factorisation",
        "seconds": "seconds",
        "of_limit": "limit / this",
        "pinv_seconds": "pinv, s",
        "scipy_qr_seconds": "SciPy QR, s",
        _OVER_PINV: "pinv / this",
        _OVER_QR: "SciPy QR / this",
        "relative_gap": "relative gap",
    }
    notes = [
        f"X {found.x.shape[0]} x {found.x.shape[1]}, {flags.precision}, data: {flags.data}.",
        "Seconds include the certificate in float64; limit: the operations of the factorisation at the rate of a bare"
        " jitted product in the same run.",
    ]
    if not flags.no_peers:
        notes.append(f"The optimum by pinv differs by {max(row['peer_disagreement'] for row in rows):.2g} (relative).")
    common.report(results, columns, notes, flags.json)


if __name__ == "__main__":
    main(sys.argv[1:])
