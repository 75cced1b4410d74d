"""Whether an accelerator gives the numbers of the CPU: surfaces, hits, training steps and Theorem 2, both in one call.

    python benchmarks/agreement.py [--json FILE] [--smoke]

The same work is done in this process, on whatever device JAX chooses, and in a second process on the CPU, from the same
numbers drawn by NumPy.  Each row gives the largest difference and what is allowed:

- `surface`: losses on a plane through three networks of dense branches, and of convolutional ones, relative;
- `hits`: runs whose final loss on all points counts as a hit on one device only; and the share of runs whose loss
  curve differs in any bit.  The CPU rounds products before it adds them, as GPUs do, once its fused multiply-add is
  left out, which its process does (`--xla_cpu_max_isa=AVX`);
- `step, highest`: parameters after three streamed steps with full products, relative to how far they moved;
- `step, as trained`: the same as training chooses its products (TF32 on recent GPUs), reported and not judged;
- `theorem 2`: optimum and gap of `solve_columns`, relative to the optimum.

The exit status is 1 where something that is judged differs by more than is allowed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import jax
import numpy as np
import optax

from dualgap_jax import hitting, landscape
from dualgap_jax.data import synthetic_relu
from dualgap_jax.losses import binary_hinge, multi_margin
from dualgap_jax.networks import conv, mlp, multi_branch
from dualgap_jax.networks.sources import InMemory
from dualgap_jax.optimizers import for_network
from dualgap_jax.spectral import in_blocks, solve_columns
from dualgap_jax.training.engine import Carry, begin
from dualgap_jax.training.streamed import Streamed
from dualgap_jax.types import Network, PyTree

_CLASSES, _HIT = 10, 1e-5


class Sizes(NamedTuple):
    """What is computed: image side and channels, branches, samples, points a side, runs' widths, seeds, steps, d, n."""

    image: tuple[int, int, int]
    branches: int
    samples: int
    side: int
    widths: tuple[int, ...]
    seeds: int
    steps: int
    d: int
    n: int


FULL = Sizes((32, 32, 3), 256, 512, 11, tuple(range(12, 22)), 20, 20_000, 256, 4096)
SMOKE = Sizes((8, 8, 1), 4, 16, 3, (12, 13), 2, 40, 12, 60)


def dense(sizes: Sizes, seed: int) -> PyTree:
    """Parameters of an `mlp((8, 8, 8))` network, drawn by NumPy."""
    rng = np.random.default_rng(seed)
    widths = (int(np.prod(sizes.image)), 8, 8, 8, _CLASSES)
    return tuple(
        {
            "kernel": (rng.standard_normal((sizes.branches, out, fan_in)) * (2 / fan_in) ** 0.5).astype(np.float32),
            "bias": (rng.standard_normal((sizes.branches, out)) * 0.1).astype(np.float32),
        }
        for fan_in, out in itertools.pairwise(widths)
    )


def alike(tree: PyTree, seed: int) -> PyTree:
    """Leaves of the shapes of others, drawn by NumPy."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (rng.standard_normal(leaf.shape) * 0.2).astype(leaf.dtype), tree)


def surface(net: Network, networks: Sequence[InMemory], sizes: Sizes) -> np.ndarray:
    """Losses on a grid of the plane through three networks."""
    ticks = np.linspace(-0.6, 0.6, sizes.side)
    plane = landscape.plane_through(networks)
    data = common.random_images(sizes.image, sizes.samples)
    return landscape.evaluate(net, multi_margin(), data, plane, ticks, ticks).loss


def trained(sizes: Sizes, precision: str | None) -> np.ndarray:
    """How far three streamed steps move the parameters, all of them in one row."""
    data = common.random_images(sizes.image, max(128, sizes.samples))
    net = multi_branch(mlp((8, 8, 8), _CLASSES), sizes.branches)
    transformation = for_network(net, optax.sgd(1.0, 0.9))
    solver = Streamed(net, multi_margin(), transformation, data, min(128, len(data.y)))
    before = dense(sizes, 1)
    carry: Carry = jax.device_put(begin(transformation, before, ()))
    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
        for now in range(3):
            picked = np.random.default_rng(now).permutation(len(data.y))[: min(128, len(data.y))]
            carry, _ = solver.step(carry, picked, 0.02 * sizes.branches, jax.random.key(1), now)
    moved = jax.tree.map(lambda a, b: (np.asarray(a) - b).ravel(), carry.params, before)
    return np.concatenate(jax.tree.leaves(moved))


def runs(sizes: Sizes) -> hitting.Outcome:
    """Runs as those of Table 1, on fewer points and with fewer steps."""
    spec = hitting.SgdSpec(steps=sizes.steps, batch_size=10, check_every=min(1000, sizes.steps))
    chosen = hitting.make_runs(np.asarray(sizes.widths)[:, None], np.arange(sizes.seeds), learning_rate=0.02)
    data = synthetic_relu(n=500, seed=2)  # of which a fifth of the runs hit
    return hitting.train_runs([data], binary_hinge(), chosen, spec)


def quantities(sizes: Sizes) -> dict[str, np.ndarray]:
    """Everything that is compared, computed on this process' device."""
    began = time.perf_counter()

    def done(name: str, value: Any) -> np.ndarray:
        nonlocal began
        print(f"{jax.default_backend()}: {name}, {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
        began = time.perf_counter()
        return np.asarray(value)

    found = {}
    net = multi_branch(mlp((8, 8, 8), _CLASSES), sizes.branches)
    three = [InMemory(dense(sizes, seed)) for seed in range(3)]
    found["surface, dense"] = done("surface, dense", surface(net, three, sizes))
    few = sizes._replace(image=(16, 16, 3), branches=max(2, sizes.branches // 8), samples=sizes.samples // 2)
    net = multi_branch(conv((4, 8), _CLASSES), few.branches)
    shapes, state = jax.eval_shape(net.init, jax.random.key(0), np.zeros((1, *few.image), np.float32))
    three = [InMemory(alike(shapes, seed), state) for seed in range(3)]
    found["surface, convolutional"] = done("surface, convolutional", surface(net, three, few))
    found["step, highest"] = done("step, highest", trained(sizes, "highest"))
    found["step, as trained"] = done("step, as trained", trained(sizes, None))
    outcome = runs(sizes)
    found["final losses"] = outcome.final_loss
    found["loss curves"] = done("hits", outcome.losses)
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((sizes.n, sizes.d)) * np.geomspace(1, 1e-2, sizes.d)).astype(np.float32).T
    y = np.eye(_CLASSES, dtype=np.float32)[:, rng.integers(0, _CLASSES, sizes.n)]
    for name in ("gram", "qr"):
        solved = solve_columns(in_blocks(x, y), gamma=0.5, widths=(9, 9), factorization=name).solution
        found[f"theorem 2, {name}"] = done(f"theorem 2, {name}", [float(solved.primal), float(solved.dual)])
    return found


def compared(here: dict[str, np.ndarray], cpu: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The rows of results."""

    def relative(name: str) -> float:
        return float(np.max(np.abs(here[name] - cpu[name]) / np.abs(cpu[name])))

    def of_norm(name: str) -> float:
        return float(np.linalg.norm(here[name] - cpu[name]) / np.linalg.norm(cpu[name]))

    hits = [found["final losses"] <= _HIT for found in (here, cpu)]
    curves = np.any(here["loss curves"] != cpu["loss curves"], axis=1)
    count = len(curves)
    judged: list[tuple[str, float, float | None, str]] = [
        ("surface, dense", relative("surface, dense"), 1e-5, f"{here['surface, dense'].size} losses"),
        ("surface, convolutional", relative("surface, convolutional"), 1e-5, "largest, relative"),
        ("hits", float(np.sum(hits[0] != hits[1])), 0.0, f"of {count} runs; {hits[1].sum()} hits on the CPU"),
        ("loss curves", float(curves.mean()), 0.0, "share of runs with another bit in their curve"),
        ("step, highest", of_norm("step, highest"), 1e-5, "norm, relative to that of the move"),
        ("step, as trained", of_norm("step, as trained"), None, "norm, relative to that of the move"),
        *((name, relative(name), 1e-6, "primal and dual value") for name in ("theorem 2, gram", "theorem 2, qr")),
    ]
    return [
        {
            "case": name,
            "difference": difference,
            "allowed": allowed if allowed is not None else "not judged",
            "agrees": "yes" if allowed is None or difference <= allowed else "NO",
            "what": what,
            "targets": {},
        }
        for name, difference, allowed, what in judged
    ]


def both(sizes: Sizes, smoke: bool) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The quantities of this process, and of a second one that works on the CPU at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cpu.npz"
        command = [sys.executable, __file__, f"--only={path}", *(["--smoke"] if smoke else [])]
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa=AVX"
        with subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}) as other:
            here = quantities(sizes)
            if other.wait():
                raise SystemExit(f"the process on the CPU ended with status {other.returncode}")
        with np.load(path) as stored:
            return here, dict(stored)


def main(argv: Sequence[str] | None = None) -> None:
    """Compares, prints the table, and writes the JSON file."""
    parser = common.arguments((__doc__ or "").split("\n")[0], rounds=1)
    parser.add_argument("--only", type=Path, help="compute on this process' device, and write the numbers here")
    flags = parser.parse_args(argv)
    sizes = SMOKE if flags.smoke else FULL
    if flags.only is not None:
        np.savez(flags.only, **quantities(sizes))
        return
    where = common.environment()
    rows = compared(*both(sizes, flags.smoke))
    results = {"benchmark": "agreement", "environment": where, "smoke": flags.smoke, "rounds": 1, "rows": rows}
    columns = {"case": "case", "difference": "difference", "allowed": "allowed", "agrees": "agrees", "what": "of"}
    common.report(results, columns, [f"{where['device']} beside the CPU of the same machine."], flags.json)
    if any(row["agrees"] == "NO" for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
