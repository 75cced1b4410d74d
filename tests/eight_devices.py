"""What test_sharding.py asks of a machine with eight devices, run in a process of its own: prints one line of JSON."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)

from training_by_spec import sgd, transformation_of  # noqa: E402

from dualgap_jax import hitting, losses, schedules, sharding, training  # noqa: E402
from dualgap_jax.config import Component, ConfigError  # noqa: E402
from dualgap_jax.data import synthetic_relu  # noqa: E402
from dualgap_jax.networks import mlp, multi_branch  # noqa: E402
from dualgap_jax.training.batches import BatchOrder, example_input, on_device  # noqa: E402
from dualgap_jax.training.engine import Carry, begin  # noqa: E402
from dualgap_jax.training.together import make_segment  # noqa: E402

COLLECTIVES = re.compile(r"\b(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)[-a-z]*\(")


def collectives(program: Any, arguments: Any) -> dict[str, int]:
    """The collective operations in the compiled program for these arguments, with their shardings."""

    def shape(leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding if leaf.committed else None)

    return dict(Counter(COLLECTIVES.findall(program.lower(*jax.tree.map(shape, arguments)).compile().as_text())))


def same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=np.issubdtype(np.asarray(x).dtype, np.floating)) for x, y in pairs)


def study() -> dict[str, Any]:
    """51 runs in blocks of 16 lanes a device, on 1, 3 and 8 devices; 45 examples, whose permutation draws again."""
    datasets = [synthetic_relu(n=45, d=3, teacher_width=2, seed=seed) for seed in (3, 4)]
    runs = hitting.make_runs(np.arange(51) % 3 + 1, np.arange(51) // 3, data=np.arange(51) % 2, learning_rate=0.05)
    loss = losses.binary_hinge()
    schedule = Component("plateau", {"patience": 1, "min_delta": 0.02})
    found: dict[str, Any] = {}
    outcomes, seen = {}, {}
    for devices in (1, 3, 8):
        spec = hitting.SgdSpec(
            steps=60, batch_size=7, check_every=20, lanes=16, devices=devices, schedule=schedule, stop_at_rest=True
        )
        program = hitting.study.prepare(datasets, loss, runs, spec).program
        segment = program.segment

        def spy(*arguments: Any, devices: int = devices, segment: Any = segment) -> Any:
            if devices not in seen:
                seen[devices] = collectives(segment, arguments)
                found[f"rates on {devices}"] = sorted(len(s.data) for s in arguments[2].addressable_shards)
                if devices == 8:  # the same program left to XLA's partitioner
                    found["automatic"] = collectives(outcomes["program"], arguments)
            return segment(*arguments)

        program.__dict__["segment"] = spy
        outcomes["program"] = outcomes.get("program", segment)
        outcomes[devices] = hitting.train_runs(datasets, loss, runs, spec, workers=2)
    found |= {"collectives": {str(k): v for k, v in seen.items()}}
    found["equal"] = [same(outcomes[1], outcomes[devices]) for devices in (3, 8)]
    found["statuses"] = sorted({int(s) for s in outcomes[1].status})
    found["different losses"] = len(np.unique(outcomes[1].final_loss))
    return found


def solutions() -> dict[str, Any]:
    """One segment of three solutions of a small network: on one device, on three, and, filled up to four, on two."""
    dataset = synthetic_relu(n=40, d=4, seed=3)
    data = on_device(dataset)
    net = multi_branch(mlp((3,), 1), 5)
    spec = training.TrainingSpec(batch_size=10, max_steps=30, optimizer=sgd(0.5))
    transformation = transformation_of(net, spec)
    schedule = schedules.SCHEDULES.build("cosine", max_steps=30)
    segment = make_segment(net, losses.binary_hinge(), transformation, schedule)

    def start(key: Any) -> Carry:
        params, state = net.init(key, example_input(data))
        return begin(transformation, params, state)

    def stack(trees: Any) -> Any:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)

    keys = [training.solution_key(0, i) for i in range(3)]
    carries = [jax.tree.map(np.asarray, start(key)) for key in keys]
    orders = [BatchOrder(key, 40, 10).indices(0, 30) for key in keys]

    def run(devices: tuple[jax.Device, ...]) -> tuple[Any, Any]:
        lanes = sharding.filled(3, devices)

        def whole(carry: Any, states: Any, words: Any, indices: Any, data: Any) -> Any:
            return segment(carry, states, jax.random.wrap_key_data(words), 0.5, data, indices, 0, 30, 30)

        words = np.asarray([jax.random.key_data(keys[i]) for i in lanes])
        arguments = [
            sharding.share_out(part, devices, 0)
            for part in (stack([carries[i] for i in lanes]), (), words, np.stack([orders[i] for i in lanes]))
        ] + [sharding.share_out(jax.tree.map(np.asarray, data), devices, None)]
        program = jax.jit(sharding.over_devices(whole, devices, (0, 0, 0, 0, None), 0))
        carry, values = program(*arguments)
        parts = len(carry.params[0]["kernel"].sharding.device_set)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:3], (carry, values)), [
            collectives(program, arguments),
            parts,
            len(lanes),
        ]

    (one, values), _ = run(sharding.local_devices(1))
    found: dict[str, Any] = {"fall": float(values[:, 0].mean() - values[:, -1].mean())}
    for count in (2, 3):
        (other, others), found[f"on {count}"] = run(sharding.local_devices(count))
        pairs = zip(jax.tree.leaves((one, values)), jax.tree.leaves((other, others)), strict=True)
        found[f"worst on {count}"] = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)
    return found


def refusals() -> dict[str, Any]:
    found = {}
    for count in (9, -1):
        try:
            sharding.local_devices(count)
        except ConfigError as error:
            found[str(count)] = str(error)
    found["all"] = [d.id for d in sharding.local_devices()]
    found["first"] = [d.id for d in sharding.local_devices(3)]
    return found


if __name__ == "__main__":
    json.dump({"study": study(), "solutions": solutions(), "refusals": refusals()}, sys.stdout)
