"""What test_mesh.py asks of a machine with eight devices, run in a process of its own: prints one line of JSON.

python mesh_of_eight.py FOLDER
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 8)

from training_by_spec import sgd, train_as, transformation_of  # noqa: E402

from dualgap_jax.data import Dataset, validate  # noqa: E402
from dualgap_jax.losses import multi_margin  # noqa: E402
from dualgap_jax.networks import conv, mlp, multi_branch  # noqa: E402
from dualgap_jax.sharding import MeshSpec  # noqa: E402
from dualgap_jax.training import Solution, TrainingSpec  # noqa: E402
from dualgap_jax.training.engine import all_finite  # noqa: E402
from dualgap_jax.training.streamed import Streamed  # noqa: E402

_BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "f64": 8, "bf16": 2}
_OPERATION = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(?:-start)?\("
)
SPEC = TrainingSpec(
    batch_size=16,
    max_steps=10,
    learning_rate=0.1,
    lr_scaling="branches",
    optimizer=sgd(0.9),
    check_every=5,
    streaming="on",
    branch_chunk=2,
)


def images(seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (48, 6, 6, 2), dtype=np.uint8)
    std = np.maximum(x.std(axis=0), 1).astype(np.float32)
    y = rng.integers(0, 3, 48).astype(np.int32)
    return validate(Dataset("images", x, y, x.mean(axis=0, dtype=np.float32), std, 3, "multiclass", {}))


def collectives(branches: int, mesh: MeshSpec, chunk: int) -> list[tuple[str, int]]:
    """The collective operations in the compiled step and the bytes of each, from the optimised HLO."""
    net = multi_branch(mlp((4, 4), 3), branches)
    solver = Streamed(net, multi_margin(), transformation_of(net, SPEC), images(0), 16, mesh=mesh, chunk=chunk)
    found = []
    for shapes, operation in _OPERATION.findall(solver.compiled.as_text()):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        found.append((operation, sum(_BYTES[t] * math.prod(map(int, filter(None, d.split(",")))) for t, d in arrays)))
    return found


def losses_and_weights(net: Any, data: Dataset, mesh: MeshSpec) -> tuple[np.ndarray, Any]:
    """The loss of each step, and where they end."""
    solver = Streamed(net, multi_margin(), transformation_of(net, SPEC), data, 16, mesh=mesh, chunk=SPEC.branch_chunk)
    carry, values = solver.start(jax.random.key(3)), []
    rate = 0.1 * net.stacked.num_branches
    for now in range(10):
        picked = np.random.default_rng(now).choice(48, 16, replace=False)
        carry, value = solver.step(carry, picked, rate, jax.random.key(4), now)
        values.append(float(value))
    network = solver.network(carry, None)
    return np.asarray(values), network.read(0, network.num_branches)


def relative(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x) - y)) / np.max(np.abs(y))) for x, y in pairs)


def same_as_one_device() -> dict[str, Any]:
    found = {}
    networks = {
        "mlp": (mlp((4, 4), 3), (11, 16)),
        "conv": (conv((2,), 3), (5,)),
        "batch norm": (conv((2,), 3, batch_norm=True, dropout=0.2), (9,)),
    }
    for seed, (name, (branch, counts)) in enumerate(networks.items()):
        for count in counts:
            net, data = multi_branch(branch, count), images(seed)
            alone, end = losses_and_weights(net, data, MeshSpec())
            for shape in ((8, 1),) if name == "batch norm" else ((8, 1), (4, 2)):
                values, weights = losses_and_weights(net, data, MeshSpec(*shape))
                found[f"{name} I={count} on {shape[0]}x{shape[1]}"] = [
                    float(np.max(np.abs(values / alone - 1))),
                    relative(weights, end),
                    float(np.ptp(alone)),
                ]
    return found


def finite_over_devices() -> dict[str, list[bool]]:
    """A NaN in one of sixteen rows over the devices, an infinity in one of eight lanes: whether all, or each, is."""
    mesh = jax.make_mesh((8,), ("branch",))
    found = {}
    for name, along in (("sharded", "branch"), ("replicated", None)):
        rows, lanes = np.zeros((16, 3), np.float32), np.zeros((8, 3), np.float32)
        rows[11, 2], lanes[5, 1] = np.nan, -np.inf
        sharding = NamedSharding(mesh, PartitionSpec(along))
        whole, bad = jax.device_put((np.zeros_like(rows), rows), sharding)
        lanes = jax.device_put(lanes, sharding)
        found[name] = [all_finite(whole), all_finite(bad), *(all_finite(lanes, lane) for lane in range(8))]
    return found


def across_meshes(folder: Path) -> dict[str, Any]:
    """A run that goes on on another mesh every few steps, beside one that stays on one device."""
    net, data = multi_branch(mlp((4, 4), 3), 11), images(5)
    spec = dataclasses.replace(SPEC, max_steps=15, checkpoint_seconds=0.0)

    def run(name: str, mesh: MeshSpec) -> list[Solution]:
        return train_as(net, multi_margin(), data, spec, num_solutions=2, mesh=mesh, checkpoints=folder / name)

    expected = run("stays", MeshSpec())
    calls, original = 0, Streamed.step

    def dying(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 7:
            raise InterruptedError
        return original(self, *args)

    for mesh in (MeshSpec(4, 2), MeshSpec(8, 1), MeshSpec(1, 2), MeshSpec(3, 1)):
        calls = 0
        Streamed.step = dying  # type: ignore[method-assign]
        try:
            run("moves", mesh)
        except InterruptedError:
            continue
    Streamed.step = original  # type: ignore[method-assign]
    got = run("moves", MeshSpec())
    return {
        "steps": [s.steps for s in got],
        "weights": max(
            relative(a.network.read(0, 11), b.network.read(0, 11)) for a, b in zip(got, expected, strict=True)
        ),
        "losses": max(abs(a.batch_loss / b.batch_loss - 1) for a, b in zip(got, expected, strict=True)),
    }


def main() -> None:
    traffic = {
        f"I={count} on {shape[0]}x{shape[1]}, {chunk} at a time": collectives(count, MeshSpec(*shape), chunk)
        for count, shape, chunk in itertools.chain(
            itertools.product((16, 61, 256), ((8, 1),), (4, 1000)), itertools.product((16, 256), ((4, 2),), (1000,))
        )
    }
    print(
        json.dumps(
            {
                "same": same_as_one_device(),
                "moves": across_meshes(Path(sys.argv[1])),
                "traffic": traffic,
                "finite": finite_over_devices(),
            },
            default=str,
        )
    )


if __name__ == "__main__":
    main()
