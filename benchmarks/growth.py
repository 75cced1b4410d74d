"""How time and memory grow: exponents, with intervals, in every size that a user chooses.

    python benchmarks/growth.py [--only WORK ...] [--rounds 5] [--json FILE] [--smoke]

One size of one kind of work is varied, the others stay as in `BASE`; every point is a process of its own, which takes
the median time of warm calls and its peak resident memory above that of the same process before the work.  The exponent
is the slope of a line through the logarithms, by least squares, with its 95 % interval; as the smallest sizes are ruled
by constant costs, the line goes through the upper points, at least four (`local` is the slope between the last two).
`explained` says what a slope is to be; 1 is linear.  Devices are those that XLA makes of the processor: the work is the
same for all of them, so that 0 is the best that they can do here, and what is above 0 is what sharing costs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import scipy.stats

Sizes = Mapping[str, int]
_UPPER = 4  # least points of a line


class Work(NamedTuple):
    """A kind of work, and the sizes that are varied.

    Attributes:
      prepare: `(sizes) -> call`: the work of some sizes, as a function without arguments.
      base: the sizes that stay.
      varied: for each size its values, ascending.
      explained: for each size the exponent of the time that the algorithm has, in words.
    """

    prepare: Callable[[Sizes], Callable[[], object]]
    base: Sizes
    varied: Mapping[str, Sequence[int]]
    explained: Mapping[str, str]


def training(sizes: Sizes) -> Callable[[], object]:
    """Four steps of SGD on images of d numbers, by the engine that `train` would choose, or streamed over devices."""
    import jax
    import jax.numpy as jnp
    import optax

    from dualgap_jax.losses import multi_margin
    from dualgap_jax.networks import mlp, multi_branch
    from dualgap_jax.optimizers import for_network
    from dualgap_jax.schedules import constant
    from dualgap_jax.sharding import MeshSpec
    from dualgap_jax.training import plan
    from dualgap_jax.training.batches import batch_shape
    from dualgap_jax.training.engine import Engine, Steps
    from dualgap_jax.training.streamed import Streamed
    from dualgap_jax.training.together import Together, draw

    batch, steps, devices = sizes["batch"], 4, sizes["devices"]
    data = common.random_images((sizes["d"],), max(1024, batch))
    net, loss = multi_branch(mlp((8,) * sizes["layers"], 10), sizes["I"]), multi_margin()
    transformation, schedule = for_network(net, optax.sgd(1.0)), constant(steps)
    shapes = jax.eval_shape(lambda key: draw(net, data, transformation, key), jax.random.key(0))
    need = plan.need(net, shapes, batch_shape(data, batch))
    choice = plan.choose(need, 1, None, True, [], plan.stream_from(net, shapes, jax.default_backend()))
    engine: Engine
    if choice.streamed or devices > 1:
        engine = Streamed(net, loss, transformation, data, batch, schedule=schedule, mesh=MeshSpec(branch=devices))
    else:
        engine = Together(net, loss, transformation, schedule, data, batch, jax.local_devices()[:1], 1, steps)
    carry = engine.join([engine.start(jax.random.key(0))])
    state = jax.tree.map(lambda a: jnp.asarray(a)[None], schedule.init())
    picked = np.random.default_rng(0).integers(0, len(data.y), (1, steps, batch))

    def call() -> object:
        nonlocal carry
        keys = jnp.stack([jax.random.key(1)])
        carry, _ = engine.advance(carry, Steps(state, keys, 1e-3, picked, 0, steps))
        return carry

    return call


def surface(sizes: Sizes) -> Callable[[], object]:
    """The losses of a square grid of points on a plane through three networks."""
    import landscape as benchmark

    from dualgap_jax import landscape
    from dualgap_jax.losses import multi_margin

    case = benchmark.Case((sizes["d"],), (8,) * sizes["layers"], sizes["I"], sizes["samples"], sizes["side"])
    setup, ticks = benchmark.prepare(case), np.linspace(-1.5, 1.5, sizes["side"])
    points = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    loss = multi_margin()  # programs are kept by network and loss
    return lambda: landscape.evaluate_points(setup.net, loss, setup.dataset, setup.plane, points)


def alignment(sizes: Sizes) -> Callable[[], object]:
    """Three networks of random weights, the hardest, matched branch by branch."""
    import jax

    from dualgap_jax import landscape
    from dualgap_jax.networks import InMemory, mlp, multi_branch

    net = multi_branch(mlp((sizes["h"],), 10), sizes["I"])
    x = np.random.default_rng(0).standard_normal((4, sizes["d"])).astype(np.float32)
    networks = [InMemory(*jax.jit(net.init)(jax.random.key(seed), x[:1])) for seed in range(3)]
    return lambda: landscape.align(net, networks, x)


def theorem_1(sizes: Sizes) -> Callable[[], object]:
    """inf(P) of a concave value function over a grid of m budgets."""
    from dualgap_jax.duality import allocate

    budgets = np.linspace(0, 1, sizes["m"])
    values = np.minimum.accumulate(1 - budgets**2)
    return lambda: allocate([budgets], [values], 0.381966, [sizes["I"]])


def theorem_2(sizes: Sizes) -> Callable[[], object]:
    """The certified optimum of a deep linear network on random data, by the Gram matrix."""
    from dualgap_jax.spectral import in_blocks, solve_columns

    rng = np.random.default_rng(0)
    x = rng.standard_normal((sizes["d"], sizes["n"])).astype(np.float32)
    y = rng.standard_normal((10, sizes["n"])).astype(np.float32)
    columns = in_blocks(x, y)
    return lambda: solve_columns(columns, gamma=5.0, widths=(9, 9), factorization="gram")


def relaxation(sizes: Sizes) -> Callable[[], object]:
    """A certified lower bound on the risk of every network, from a dual vector that does not move."""
    from dualgap_jax.certify.moments.balls import ball_bound

    rng = np.random.default_rng(0)
    x, alpha = rng.standard_normal((sizes["n"], sizes["d"])), rng.standard_normal(sizes["n"])
    return lambda: ball_bound(x / np.sqrt(sizes["d"]), alpha)


WORKS = {
    "training": Work(
        training,
        {"I": 1000, "d": 3072, "layers": 1, "batch": 128, "devices": 1},
        {
            "I": (30, 100, 300, 1000, 3000, 10_000, 30_000),
            "d": (48, 192, 768, 3072, 12_288),
            "layers": (1, 2, 4, 8, 16),
            "batch": (8, 32, 128, 512, 2048),
            "devices": (1, 2, 4, 8),
        },
        {"I": "1", "d": "1", "layers": "below 1: the first is the large one", "batch": "1", "devices": "0"},
    ),
    "surface": Work(
        surface,
        {"I": 1000, "d": 3072, "layers": 2, "samples": 256, "side": 17},
        {
            "I": (30, 100, 300, 1000, 3000),
            "d": (48, 192, 768, 3072),
            "layers": (1, 2, 4, 8, 16),
            "samples": (32, 128, 512, 2048),
            "side": (9, 17, 33, 65, 129),
        },
        {"I": "1", "d": "below 1: three products for all points", "layers": "1", "samples": "1", "side": "2: points"},
    ),
    "alignment": Work(
        alignment,
        {"I": 300, "d": 784, "h": 8},
        {"I": (50, 100, 200, 400, 800, 1600), "d": (49, 196, 784, 3136), "h": (2, 4, 8, 16, 32)},
        {"I": "2 to 3: all pairs, and the assignment", "d": "1", "h": "2 to 3: all pairs, and the assignment"},
    ),
    "theorem 1": Work(
        theorem_1,
        {"I": 1000, "m": 1025},
        {"I": (10, 100, 1000, 10_000, 100_000, 1_000_000), "m": (129, 257, 513, 1025, 2049, 4097)},
        {"I": "0", "m": "below 2"},
    ),
    "theorem 2": Work(
        theorem_2,
        {"d": 512, "n": 8192},
        {"d": (64, 256, 512, 1024, 2048, 4096), "n": (1024, 8192, 16_384, 32_768, 65_536, 131_072)},
        {"d": "2: the Gram matrix", "n": "1"},
    ),
    "relaxation": Work(
        relaxation,
        {"n": 200, "d": 50},
        {"n": (25, 50, 100, 200, 400, 800), "d": (10, 30, 100, 300, 1000)},
        {"n": "2: pairs of examples", "d": "1"},
    ),
}


def point(work: str, sizes: Sizes, rounds: int) -> dict[str, float]:
    """Seconds of a warm call and bytes above those before the work; in this process."""
    import jax

    from dualgap_jax.machine import peak_memory

    jax.block_until_ready(jax.jit(lambda a: a + 1)(jax.numpy.zeros(3)))
    before = peak_memory() or 0
    call = WORKS[work].prepare(sizes)
    jax.block_until_ready(call())
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
        if sum(seconds) > 20:
            break
    return {"seconds": float(np.median(seconds)), "bytes": float((peak_memory() or 0) - before)}


def in_fresh_process(work: str, sizes: Sizes, rounds: int) -> dict[str, float]:
    """`point` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "point.json"
        asked = json.dumps({"work": work, "sizes": dict(sizes), "rounds": rounds})
        flags = f"--xla_force_host_platform_device_count={sizes['devices']}" if sizes.get("devices", 1) > 1 else ""
        environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
        command = [sys.executable, __file__, "--point", asked, "--json", str(path)]
        subprocess.run(command, check=True, env=environment)
        found: dict[str, float] = json.loads(path.read_text())
        return found


def slope(values: Sequence[int], measured: Sequence[float]) -> dict[str, float | None]:
    """The exponent of `measured ~ values ** e` over the upper points, and its 95 % interval."""
    upper = max(_UPPER, len(values) // 2 + 1)
    x, y = np.log(values[-upper:]), np.log(np.maximum(measured[-upper:], 1e-12))
    if len(x) < 3:
        return {"exponent": None, "least": None, "largest": None, "local": None}
    fit = scipy.stats.linregress(x, y)
    half = float(scipy.stats.t.ppf(0.975, len(x) - 2) * fit.stderr)
    local = float((y[-1] - y[-2]) / (x[-1] - x[-2]))
    return {"exponent": fit.slope, "least": fit.slope - half, "largest": fit.slope + half, "local": local}


def measure(work: str, size: str, values: Sequence[int], base: Sizes, rounds: int) -> dict[str, Any]:
    """The row of one size of one kind of work."""
    points = []
    for value in values:
        points.append(in_fresh_process(work, {**base, size: value}, rounds))
        print(f"{work}, {size} = {value:,}: {points[-1]['seconds']:.4g} s", file=sys.stderr, flush=True)
    seconds, memory = ([p[key] for p in points] for key in ("seconds", "bytes"))
    others = ", ".join(f"{name} {value:,}" for name, value in base.items() if name != size)
    return {
        "case": f"{work}: {size}",
        "others": others,
        "values": list(values),
        "seconds": seconds,
        "megabytes": [b / 1e6 for b in memory],
        "range": f"{values[0]:,} to {values[-1]:,}",
        "time": slope(values, seconds),
        "memory": slope(values, memory),
        "explained": WORKS[work].explained[size],
        "targets": {},
    }


def said(found: Mapping[str, float | None]) -> str:
    """An exponent as text."""
    if found["exponent"] is None:
        return common.NOT_MEASURED
    return f"{found['exponent']:.2f} ({found['least']:.2f} to {found['largest']:.2f}), {found['local']:.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = common.arguments(__doc__ or "", rounds=5)
    parser.add_argument("--only", nargs="+", default=list(WORKS), choices=list(WORKS), metavar="WORK")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.point is not None:
        options.json.write_text(json.dumps(point(**json.loads(options.point))))
        return
    rows = []
    for name in options.only:
        work = WORKS[name]
        for size, values in work.varied.items():
            base = {key: min(work.varied.get(key, (value,))[0], value) for key, value in work.base.items()}
            small = options.smoke
            rows.append(
                measure(name, size, values[:2] if small else values, base if small else work.base, options.rounds)
            )
    for row in rows:
        row["time_exponent"], row["memory_exponent"] = said(row["time"]), said(row["memory"])
    columns = {
        "case": "work: size",
        "range": "from, to",
        "others": "others",
        "time_exponent": "time: exponent (95 %), local",
        "memory_exponent": "memory: the same",
        "explained": "time should be",
    }
    common.report({"environment": common.environment(), "rows": rows}, columns, (), options.json)


if __name__ == "__main__":
    main()
