"""What bfloat16 parameters and compute do to the training of mnist_1layer: losses, accuracy, time of a step.

    python benchmarks/precision.py [--json FILE] [--smoke] [--branches I] [--steps T] [--solutions S]

The network of configs/mnist_1layer.py is trained by `training.train` from the same initialisations on the same batches
at the config's first rate, in float32, with bfloat16 compute, with bfloat16 parameters, and with both.  Losses and
accuracy are over the full training set, in float32 from the stored parameters.  The course is the mean mini-batch loss
of segments of 50 steps.  Lost updates are the weights with a gradient that one more step leaves as they are.
`--branches` and `--steps` shrink it for a slow machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dualgap_jax import config as config_lib
from dualgap_jax import training
from dualgap_jax.data import Dataset, standardise
from dualgap_jax.evaluation import evaluate
from dualgap_jax.experiments import TABLES
from dualgap_jax.experiments.landscape import LandscapeSpec, PrecisionSpec, build
from dualgap_jax.losses import Loss
from dualgap_jax.metrics import Metrics, read_metrics
from dualgap_jax.schedules import SCHEDULES
from dualgap_jax.training.engine import Carry
from dualgap_jax.training.together import step
from dualgap_jax.types import Network

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "mnist_1layer.py"
CASES = (
    PrecisionSpec("float32", "float32"),
    PrecisionSpec("float32", "bfloat16"),
    PrecisionSpec("bfloat16", "float32"),
    PrecisionSpec("bfloat16", "bfloat16"),
)
_EVERY = 50  # steps in a segment


def setting(num_branches: int, steps: int, *, smoke: bool) -> LandscapeSpec:
    """The config's landscape, trained for exactly `steps` steps at a constant rate."""
    config = config_lib.load(CONFIG, f"I={num_branches}" + (",smoke" if smoke else ""))
    spec = config_lib.spec_of(config, LandscapeSpec)
    constant = config_lib.component(SCHEDULES, "constant")
    changes: dict[str, Any] = {"max_steps": steps, "check_every": min(_EVERY, steps), "tolerance": 0.0}
    return dataclasses.replace(spec, training=dataclasses.replace(spec.training, schedule=constant, **changes))


def lost_updates(net: Network, loss: Loss, dataset: Dataset, solution: training.Solution, rate: float) -> float:
    """Share of the weights with a gradient that a step at this rate does not change; its batch is the first 128."""

    def keep_gradient(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        return jax.tree.map(jnp.negative, updates), updates

    keep = optax.GradientTransformationExtraArgs(lambda params: params, keep_gradient)
    count = min(128, len(dataset.y))
    x = standardise(dataset.x[:count], dataset.mean, dataset.std)
    before = Carry(solution.params, solution.state, solution.params)
    after, _ = jax.jit(functools.partial(step, net, loss, keep))(
        before, x, jnp.asarray(dataset.y[:count]), jnp.float32(rate), jax.random.key(0)
    )
    parts = zip(*map(jax.tree.leaves, (after.opt_state, before.params, after.params)), strict=True)
    moved, lost = 0, 0
    for gradient, old, new in parts:
        moved += int((gradient != 0).sum())
        lost += int(((gradient != 0) & (old == new)).sum())
    return lost / moved


def measure(spec: LandscapeSpec, precision: PrecisionSpec, num_solutions: int) -> dict[str, Any]:
    """One row of results; `course` is `[solutions, segments]`."""
    dataset, net, training_net, loss = build(dataclasses.replace(spec, precision=precision), TABLES)
    arguments = spec.training.arguments(spec.num_branches)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        began = time.perf_counter()
        with Metrics(path) as metrics:
            solutions = training.train(
                training_net, loss, dataset, **arguments, seed=spec.seed, num_solutions=num_solutions, metrics=metrics
            )
        seconds = time.perf_counter() - began
        lines = read_metrics(path)
    rows = [evaluate(net, loss, dataset, s.network) for s in solutions]
    speeds = np.asarray([line["steps_per_second"] for line in lines if line["solution"] == 0])
    return {
        "case": f"{precision.params} parameters, {precision.compute} compute",
        "params": precision.params,
        "compute": precision.compute,
        "loss": common.spread(np.asarray([r.loss for r in rows])),
        "accuracy": common.spread(np.asarray([r.accuracy for r in rows])),
        "lost_updates": common.spread(
            np.asarray([lost_updates(training_net, loss, dataset, s, arguments["schedule"].base) for s in solutions])
        ),
        "step_ms": common.spread(1e3 / speeds[1:] if len(speeds) > 1 else 1e3 / speeds),
        "seconds": seconds,
        "course": [[line["loss"] for line in lines if line["solution"] == i] for i in range(num_solutions)],
        "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(solutions[0].params)),
        "targets": {},
    }


def compare(row: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """The largest difference of the course from that in float32: to the loss there, and to the loss at the start.

    Late in training the loss is small, and what it differs by is large beside it; the second shows whether that is seen
    in the course.
    """
    course, expected = np.asarray(row["course"]), np.asarray(plain["course"])
    difference = np.abs(course - expected)
    return {
        "largest_relative": float(np.max(difference / expected)),
        "largest_to_start": float(np.max(difference / expected[:, :1])),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Trains every case, prints the table, and writes the JSON file."""
    parser = argparse.ArgumentParser(description="bfloat16 in training: losses and time beside float32.")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--smoke", action="store_true", help="a tiny size, which shows that it runs and nothing else")
    parser.add_argument("--branches", type=common.positive, default=100, help="number of branches I")
    parser.add_argument("--steps", type=common.positive, default=1500, help="steps of SGD")
    parser.add_argument("--solutions", type=common.positive, default=1, help="solutions, each from its own seed")
    flags = parser.parse_args(argv)
    where = common.environment()
    branches, steps = (3, 4) if flags.smoke else (flags.branches, flags.steps)
    spec = setting(branches, steps, smoke=flags.smoke)
    rows: list[dict[str, Any]] = []
    for precision in CASES:
        print(f"training with {precision.params} parameters, {precision.compute} compute", file=sys.stderr)
        row = measure(spec, precision, flags.solutions)
        rows.append(row | compare(row, rows[0] if rows else row))
    results = {
        "benchmark": "precision", "environment": where, "smoke": flags.smoke, "num_branches": branches,
        "steps": steps, "solutions": flags.solutions, "rows": rows,
    }  # fmt: skip
    columns = {
        "case": "case",
        "loss": "loss",
        "accuracy": "accuracy",
        "largest_relative": "largest relative difference",
        "largest_to_start": "to the start",
        "lost_updates": "lost updates",
        "step_ms": "step, ms",
    }
    notes = [
        f"I = {branches}, {steps} steps, batches of {spec.training.batch_size}, {flags.solutions} solution(s); medians"
        " (least-largest) over solutions, or over segments for the time.",
        "Differences are of the mean loss of segments from that in float32, largest over the course.",
    ]
    common.report(results, columns, notes, flags.json)


if __name__ == "__main__":
    main()
