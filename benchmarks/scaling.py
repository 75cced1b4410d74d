"""Time and memory of the streamed step from one branch to fifty thousand, beside bare matrix products.

    python benchmarks/scaling.py [--json FILE] [--smoke] [--branches N] [--momentum M] [--no-memory] [--folder DIR]

The network is the three-layer one of Figure 4 (3072-8-8-8-10), the batch 128 images.  Every I is measured in fresh
processes.  One takes the time of steps in turn with the two products of the first layer, forward and weight gradient,
of the same shapes (the limit, as in training_step.py); the rate counts the operations of a plain step.  Two more call
`train` for two steps, without and with checkpoints, on 50,000 uint8 images held on the host, and take their peak
resident memory: all of the process, with the interpreter, JAX, the data, initialisation and, in the second, saving.
For I up to 8,000, or --plain-up-to, the plain step (automatic differentiation of the whole network) is measured too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
import training_step

from dualgap_jax import training
from dualgap_jax.data import Dataset
from dualgap_jax.losses import multi_margin
from dualgap_jax.machine import peak_memory
from dualgap_jax.networks import mlp, multi_branch
from dualgap_jax.optimizers import for_network
from dualgap_jax.training.streamed import Streamed
from dualgap_jax.trees import num_bytes

_COUNTS = (1, 10, 100, 1000, 8000, 50_000)
_PLAIN_UP_TO = 8000  # branches up to which the plain step is measured, if not told otherwise
_PLAIN_STEPS = 4  # a program: the memory of its gradient is then used again, as in training
_OF_LIMIT, _PLAIN = "of_limit", "plain_of_limit"
_PEAK, _PEAK_SAVED = "peak_over_parameters", "peak_with_checkpoints_over_parameters"
_RATE = 0.2  # times I, as in the config


def case_of(num_branches: int, smoke: bool) -> training_step.Case:
    """The network of the config with I branches, or a tiny one."""
    if smoke:
        return training_step.Case("smoke", (4, 4, 1), (3, 2), num_branches, 1)
    return training_step.Case("cifar_3layer", (32, 32, 3), (8, 8, 8), num_branches, 1)


def network(case: training_step.Case) -> Any:
    """The stacked network of a case."""
    return multi_branch(mlp(case.hidden, 10), case.num_branches)


def streamed_call(
    case: training_step.Case, data: Dataset, batch: int, momentum: float
) -> tuple[Streamed, Callable[[], Any]]:
    """A solver, and a call that takes one step with it."""
    net = network(case)
    solver = Streamed(net, multi_margin(), for_network(net, optax.sgd(1.0, momentum or None)), data, batch)
    carry = solver.start(jax.random.key(0))
    picked, key, now = np.arange(batch), jax.random.key(1), 0

    def call() -> Any:
        nonlocal carry, now
        carry, _ = solver.step(carry, picked, _RATE * case.num_branches, key, now)
        now += 1
        return carry

    return solver, call


def bare_products(case: training_step.Case, batch: int) -> dict[str, Callable[[], jax.Array]]:
    """The first layer's forward product and weight gradient, each into memory that is there already."""
    rows, columns = case.num_branches * case.widths[1], case.widths[0]
    keys = jax.random.split(jax.random.key(1), 3)
    x, x_rows, gradient = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((columns, batch), (batch, columns), (rows, batch)), strict=True)
    )
    product = jax.jit(lambda into, a, b: a @ b, donate_argnums=0, keep_unused=True)
    forward, kernel = jnp.zeros((rows, batch)), jnp.zeros((rows, columns))

    def forwards() -> jax.Array:
        nonlocal forward
        forward = product(forward, kernel, x)
        return forward

    def backwards() -> jax.Array:
        nonlocal kernel  # the gradient of one call is the kernel of the next: one array of that size, not two
        kernel = product(kernel, gradient, x_rows)
        return kernel

    return {"forward": forwards, "weight_gradient": backwards}


def plain_call(case: training_step.Case, batch: int) -> Callable[[], Any]:
    """A call that takes `_PLAIN_STEPS` steps by automatic differentiation of the whole network, in one program."""
    _, call = training_step.package_segment(case, batch, steps=_PLAIN_STEPS)
    return call


def time_one(
    case: training_step.Case, batch: int, rounds: int, momentum: float, plain_up_to: int = _PLAIN_UP_TO
) -> dict[str, Any]:
    """Step, limit and rates of one I, in this process."""
    data = common.random_images(case.image, num_examples=max(1024, batch))
    solver, call = streamed_call(case, data, batch, momentum)
    calls = {"streamed": call, **bare_products(case, batch)}
    if case.num_branches <= plain_up_to and not momentum:
        calls["plain"] = plain_call(case, batch)
    seconds = common.interleave(calls, rounds)
    done = training_step.operations(case.widths, case.num_branches, batch)
    one_product = 2 * case.num_branches * case.widths[1] * case.widths[0] * batch
    limit = 2 * one_product / (seconds["forward"] + seconds["weight_gradient"])
    plain = _PLAIN_STEPS * done / seconds["plain"] if "plain" in seconds else None
    return {
        "case": f"I={case.num_branches}",
        "num_branches": case.num_branches,
        "chunk": solver.chunk,
        "parameter_gb": num_bytes(solver.shapes.params) / 1e9,
        "step_ms": common.spread(1e3 * seconds["streamed"]),
        "step_gflops": common.spread(done / seconds["streamed"] / 1e9),
        "limit_gflops": common.spread(limit / 1e9),
        _OF_LIMIT: common.spread(done / seconds["streamed"] / limit),
        _PLAIN: common.spread(plain / limit) if plain is not None else common.NOT_MEASURED,
    }


def memory_one(case: training_step.Case, batch: int, folder: Path | None, momentum: float) -> dict[str, Any]:
    """Peak resident memory of this process after two steps of `train`."""
    data = common.random_images(case.image, num_examples=50_000 if case.image == (32, 32, 3) else 64)
    start = time.perf_counter()
    training.train(
        network(case),
        multi_margin(),
        data,
        optax.sgd(_RATE * case.num_branches, momentum or None),
        batch_size=batch,
        max_steps=2,
        streaming="on",
        num_solutions=1,
        checkpoints=folder,
        checkpoint_seconds=0.0,
        report=lambda line: print(line, file=sys.stderr),
    )
    return {"peak_bytes": peak_memory(), "seconds": time.perf_counter() - start}


def in_fresh_process(*arguments: str) -> dict[str, Any]:
    """This script with these arguments; the last line that it prints."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(num_branches: int, flags: Sequence[str], with_memory: bool, folder: Path) -> dict[str, Any]:
    """The row of one I."""
    row = in_fresh_process(*flags, f"--only-time={num_branches}")
    row |= dict.fromkeys(("peak_gb", "peak_with_checkpoints_gb", _PEAK, _PEAK_SAVED), common.NOT_MEASURED)
    if with_memory:
        parameters = row["parameter_gb"] * 1e9
        for peak, ratio, place in (
            ("peak_gb", _PEAK, []),
            ("peak_with_checkpoints_gb", _PEAK_SAVED, [f"--folder={folder}"]),
        ):
            found = in_fresh_process(*flags, f"--only-memory={num_branches}", *place)
            row |= {peak: found["peak_bytes"] / 1e9, ratio: found["peak_bytes"] / parameters}
    targets = (common.Target(_OF_LIMIT, 0.7),) if num_branches == _COUNTS[-1] else ()
    if num_branches == _PLAIN_UP_TO:
        targets = (common.Target(_PLAIN, 0.85),)
    return row | {"targets": common.judge(row, targets)}


def growth(rows: Sequence[dict[str, Any]]) -> str:
    """How time and memory grow with I between the two largest."""
    if len(rows) < 2:
        return ""
    small, large = sorted(rows, key=lambda r: r["num_branches"])[-2:]
    factor = large["num_branches"] / small["num_branches"]
    times = large["step_ms"]["median"] / small["step_ms"]["median"]
    text = f"From {small['case']} to {large['case']} (x {factor:.3g}) the step takes x {times:.3g}"
    if large["peak_gb"] != common.NOT_MEASURED:
        added = (large["peak_gb"] - small["peak_gb"]) / (large["parameter_gb"] - small["parameter_gb"])
        text += f", and a byte of parameters adds {added:.3g} bytes of peak memory"
    return text + "."


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every I, prints the table, and writes the JSON file."""
    parser = common.arguments("Streamed step: time and memory against I.", rounds=5)
    parser.add_argument("--branches", type=common.positive, action="append", help="only this I; may be repeated")
    parser.add_argument("--momentum", type=float, default=0.0, help="of the optimiser; its state is streamed too")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    parser.add_argument(
        "--plain-up-to", type=common.positive, default=_PLAIN_UP_TO, help="measure the plain step up to this I"
    )
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; 5 GB at I=50000")
    parser.add_argument("--only-time", type=common.positive, help="measure one I in this process")
    parser.add_argument("--only-memory", type=common.positive, help="the same for its memory")
    flags = parser.parse_args(argv)
    batch = 8 if flags.smoke else 128
    if flags.only_time:
        case = case_of(flags.only_time, flags.smoke)
        print(json.dumps(time_one(case, batch, flags.rounds, flags.momentum, flags.plain_up_to)))
        return
    if flags.only_memory:
        print(json.dumps(memory_one(case_of(flags.only_memory, flags.smoke), batch, flags.folder, flags.momentum)))
        return
    where = common.environment()
    rows = []
    passed_on = [f"--rounds={flags.rounds}", f"--momentum={flags.momentum}", f"--plain-up-to={flags.plain_up_to}"]
    passed_on += ["--smoke"] if flags.smoke else []
    if flags.folder is not None:
        flags.folder.mkdir(parents=True, exist_ok=True)
    for count in flags.branches or ((2, 5) if flags.smoke else _COUNTS):
        print(f"measuring I={count}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
            rows.append(measure(count, passed_on, not flags.no_memory, Path(folder)))
    results = {"benchmark": "scaling", "environment": where, "smoke": flags.smoke, "rounds": flags.rounds}
    results |= {"momentum": flags.momentum, "rows": rows}
    columns = {
        "case": "case",
        "parameter_gb": "parameters, GB",
        "step_ms": "step, ms",
        "step_gflops": "GFLOP/s",
        "limit_gflops": "limit, GFLOP/s",
        _OF_LIMIT: "step / limit",
        _PLAIN: "plain step / limit",
        _PEAK: "peak / parameters",
        _PEAK_SAVED: "with checkpoints",
    }
    notes = ["Medians (least-largest) over the rounds; peaks are single runs of a whole process.", growth(rows)]
    common.report(results, columns, notes, flags.json)


if __name__ == "__main__":
    main()
