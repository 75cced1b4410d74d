"""Speed of Table 1's thousand runs, beside matrix products of the same operation count and a sequential PyTorch loop.

    python benchmarks/hitting.py [--json FILE] [--smoke]

Measured is what `hitting.train_runs` does between two packings: all blocks of the 1,000 runs (ten widths, 100 seeds)
by a segment of SGD, looks at the full loss included, on all cores; no run stops.  The time of 100,000 steps is
extrapolated from that and labelled so; initialisation and compilation, once a study, are given beside it.  Operations
are those of a step's matrix products, 2 m n k each: forward and weight gradients of both layers, and the gradient of
the hidden layer.  Two limits: `square`, one product of large square matrices; `same shapes`, batched products of the
first layer's shapes.  The peer is the usual PyTorch loop over one network on one core, timed on few steps
and extrapolated to 10^8.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np

from dualgap_jax import hitting
from dualgap_jax.data import Dataset, synthetic_relu
from dualgap_jax.losses import binary_hinge

_RATE = 0.01
_TABLE_STEPS = 100_000
_LIMIT, _SHAPES, _PEER = "of_square", "of_same_shapes", "over_peer"


class Case(NamedTuple):
    """A table: batch, widths, seeds, steps timed, examples, goals."""

    batch: int
    widths: tuple[int, ...]
    seeds: int
    steps: int
    examples: int
    targets: tuple[common.Target, ...] = ()
    goal_seconds: float | None = None

    @property
    def name(self) -> str:
        return f"batch {self.batch}, {len(self.widths)} widths x {self.seeds} seeds"


CASES = (
    Case(10, tuple(range(12, 22)), 100, 1000, 1000, (common.Target(_PEER, 200.0),), 100.0),
    Case(100, tuple(range(12, 22)), 100, 100, 1000, (common.Target(_LIMIT, 0.4),), 200.0),
)
SMOKE = (Case(5, (12, 13), 2, 4, 40),)


def operations(width: int, d: int, batch: int) -> int:
    """Of one step of one run: both layers forward and weight gradients, and the gradient of the hidden layer."""
    return batch * (2 * 2 * width * d + 3 * 2 * width)


def peer_loop(
    torch: Any, dataset: Dataset, weights: hitting.Weights, index: np.ndarray, rate: float
) -> tuple[Callable[[], None], Any]:
    """A call that trains the first run in PyTorch on the mini-batches `index [steps, batch]`, and the network."""
    d, width = weights.kernel.shape[2], weights.kernel.shape[1]
    net = torch.nn.Sequential(torch.nn.Linear(d, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))
    for parameter, value in zip(
        net.parameters(), (weights.kernel[0], weights.bias[0], weights.head[:1], weights.offset[:1]), strict=True
    ):
        parameter.data.copy_(torch.tensor(value))
    sgd = torch.optim.SGD(net.parameters(), lr=rate)
    x, y = torch.tensor(dataset.x), torch.tensor(dataset.y)
    batches = [torch.tensor(rows, dtype=torch.int64) for rows in index]

    def call() -> None:
        for rows in batches:
            sgd.zero_grad()
            loss = torch.clamp(1 - y[rows] * net(x[rows])[:, 0], min=0).mean()
            loss.backward()
            sgd.step()

    return call, net


def peer_seconds(torch: Any, case: Case, dataset: Dataset, steps: int, rounds: int) -> tuple[np.ndarray, float]:
    """Seconds of a PyTorch step on one core, `[rounds]`, and how far its final loss is from the package's.

    Raises:
      RuntimeError: if the two do not come to the same loss.
    """
    width = case.widths[len(case.widths) // 2]
    spec = hitting.SgdSpec(steps=steps, batch_size=case.batch, check_every=steps, lanes=16)
    runs = hitting.make_runs(width, 0, learning_rate=_RATE)
    start = hitting.initial_weights(runs, dataset.x.shape[1], spec)
    keys = jnp.asarray(hitting.random.run_keys(runs)[1])
    draw = jax.jit(
        lambda t: hitting.random.draw(
            t, keys, n=case.examples, batch_size=case.batch, order=spec.order, count=case.batch
        )
    )
    index = np.stack([np.asarray(draw(t))[:, 0] for t in range(steps)])
    torch.set_num_threads(1)  # a network this small gains nothing from a second thread
    call, net = peer_loop(torch, dataset, start, index, _RATE)
    call()
    ours = hitting.train_runs([dataset], binary_hinge(), runs, spec)
    last = [p.detach().numpy() for p in net.parameters()]
    theirs = hitting.Weights(last[0][None], last[1][None], last[2], last[3])
    end = hitting.full_loss(theirs, runs, [dataset], binary_hinge())
    apart = float(abs(end - ours.final_loss)[0] / ours.final_loss[0])
    if not apart < 1e-3:
        raise RuntimeError(f"PyTorch ends at loss {end[0]}, the package at {ours.final_loss[0]}: not the same work.")
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        seconds.append((time.perf_counter() - began) / steps)
    return np.asarray(seconds), apart


def limits(case: Case, d: int) -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> (call, operations): a large square product; the first layer's products for a block of runs."""
    side = 64 if case.examples < 100 else 1024
    square = jax.random.normal(jax.random.key(0), (side, side))
    runs, width = (4, 12) if case.examples < 100 else (128, 16)
    keys = jax.random.split(jax.random.key(1), 3)
    kernel = jax.random.normal(keys[0], (runs, width, d))
    x = jax.random.normal(keys[1], (runs, d, case.batch))
    delta = jax.random.normal(keys[2], (runs, width, case.batch))
    product = jax.jit(lambda a: a @ a)
    both = jax.jit(lambda kernel, x, delta: (kernel @ x, jnp.einsum("rdb,rhb->rdh", x, delta)))
    repeats = 2 if case.examples < 100 else 20

    def again(f: Callable[[], object]) -> Callable[[], object]:
        return lambda: [f() for _ in range(repeats)]

    return {
        "square": (again(lambda: product(square)), repeats * 2 * side**3),
        "same_shapes": (again(lambda: both(kernel, x, delta)), repeats * 4 * runs * width * d * case.batch),
    }


def measure(case: Case, peer_steps: int, rounds: int, torch: Any) -> dict[str, Any]:
    """One row of results."""
    dataset = synthetic_relu(n=case.examples, seed=1)
    d = dataset.x.shape[1]
    spec = hitting.SgdSpec(steps=_TABLE_STEPS, batch_size=case.batch, check_every=case.steps, stop_at_rest=False)
    runs = hitting.make_runs(np.asarray(case.widths)[:, None], np.arange(case.seeds), learning_rate=_RATE)
    began = time.perf_counter()
    study = hitting.study.prepare([dataset], binary_hinge(), runs, spec)
    blocks = study.blocks()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:

        def segment() -> None:
            list(pool.map(lambda chosen: study.advance(chosen, 0, case.steps), blocks))

        segment()
        fixed = time.perf_counter() - began
        calls = {"segment": segment, **{name: call for name, (call, _) in limits(case, d).items()}}
        seconds = common.interleave(calls, rounds)
    done = sum(operations(int(width), d, case.batch) for width in runs.width) * case.steps
    rates = {name: count / seconds[name] for name, (_, count) in limits(case, d).items()}
    table = seconds["segment"] * _TABLE_STEPS / case.steps
    row: dict[str, Any] = {
        "case": case.name,
        "runs": len(runs.width),
        "steps_timed": case.steps,
        "operations_per_run_step": done // (case.steps * len(runs.width)),
        "first_call_seconds": fixed,
        "run_step_ns": common.spread(1e9 * seconds["segment"] / (case.steps * len(runs.width))),
        "table_seconds_extrapolated": common.spread(table),
        "table_goal_seconds": case.goal_seconds or common.NOT_MEASURED,
        "gflops": common.spread(done / seconds["segment"] / 1e9),
        "square_gflops": common.spread(rates["square"] / 1e9),
        "same_shapes_gflops": common.spread(rates["same_shapes"] / 1e9),
        _LIMIT: common.spread(done / seconds["segment"] / rates["square"]),
        _SHAPES: common.spread(done / seconds["segment"] / rates["same_shapes"]),
        "peer_step_us": common.NOT_MEASURED,
        "peer_hours_extrapolated": common.NOT_MEASURED,
        _PEER: common.NOT_MEASURED,
        "peer_disagreement": common.NOT_MEASURED,
    }
    if torch is not None:
        peer, apart = peer_seconds(torch, case, dataset, peer_steps, rounds)
        whole = peer * _TABLE_STEPS * len(runs.width)
        row["peer_disagreement"] = apart
        row["peer_step_us"] = common.spread(1e6 * peer)
        row["peer_hours_extrapolated"] = common.spread(whole / 3600)
        row[_PEER] = common.spread(whole / table)
    return row | {"targets": common.judge(row, case.targets)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures both batch sizes, prints the table, and writes the JSON file."""
    parser = common.arguments("Table 1: the package, matrix products, a PyTorch loop.", rounds=7, torch=True)
    flags = parser.parse_args(argv)
    where = common.environment()
    torch = None if flags.no_torch else common.load_torch()
    rounds, peer_steps = (1, 3) if flags.smoke else (flags.rounds, 300)
    rows = []
    for case in SMOKE if flags.smoke else CASES:
        print(f"measuring {case.name}", file=sys.stderr)
        rows.append(measure(case, peer_steps, rounds, torch))
    results = {"benchmark": "hitting", "environment": where, "smoke": flags.smoke, "rounds": rounds, "rows": rows}
    columns = {
        "case": "case",
        "run_step_ns": "run-step, ns",
        "table_seconds_extrapolated": "table, s (extrapolated)",
        "table_goal_seconds": "goal, s",
        "first_call_seconds": "first call, s",
        "gflops": "GFLOP/s",
        _LIMIT: "/ square product",
        _SHAPES: "/ same shapes",
        "peer_hours_extrapolated": "PyTorch, h (extrapolated)",
        _PEER: "PyTorch / package",
    }
    notes = ["Medians (least-largest) over the rounds.  No run stops early.  PyTorch trains one network on one core."]
    common.report(results, columns, notes, flags.json)


if __name__ == "__main__":
    main()
