"""What the benchmarks share: interleaved timing, ratios, the random data, the machine's description, table and JSON."""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np

from dualgap_jax.data import Dataset, validate
from dualgap_jax.terminal import table

NOT_MEASURED = "not measured"
_PAUSE = 0.02  # seconds before each timed call, in which the threads of the call before fall asleep


def interleave(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Times several calls in turn, so that what disturbs the machine disturbs all of them.

    Each call runs once untimed, then once a round, A B C A B C ....  What it returns is waited for.

    Returns:
      For each name the seconds of its calls, `[rounds]`.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(_PAUSE)
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: np.asarray(values) for name, values in seconds.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    """Median, least and largest of the values of all rounds, ready for JSON."""
    return {"median": float(np.median(values)), "min": float(values.min()), "max": float(values.max())}


class Target(NamedTuple):
    """A ratio that is to be reached: the key of the row that holds it, and the least value of its median."""

    key: str
    least: float


def judge(row: Mapping[str, Any], targets: Sequence[Target]) -> dict[str, Any]:
    """For each target `{'least': ..., 'reached': bool}`, or `'not measured'` where the row holds no number."""
    return {
        target.key: {
            "least": target.least,
            "reached": row[target.key]["median"] >= target.least if row[target.key] != NOT_MEASURED else NOT_MEASURED,
        }
        for target in targets
    }


def disagreement(values: Any, expected: np.ndarray, what: str) -> float:
    """Largest difference from the expected losses, relative to the range of these.

    The mean loss of random labels stays near 0.9 whatever the network does, so a difference relative to the loss itself
    would show nothing; what the losses of several points or steps differ by does depend on the weights.

    Raises:
      RuntimeError: if it is 1% or more, or not a number: the two do not do the same work.
    """
    worst = float(np.max(np.abs(np.asarray(values, np.float64) - expected)) / np.ptp(expected))
    if not worst < 1e-2:
        raise RuntimeError(
            f"the losses of {what} differ from the package's by {worst:.2g} of their range ({np.ptp(expected):.2g}):"
            " the two do not do the same work, so their times cannot be compared."
        )
    return worst


def random_images(shape: tuple[int, ...], num_examples: int) -> Dataset:
    """Random uint8 images `[n, *shape]` of ten classes, standardised pixel by pixel as real ones are.

    Mean and deviation are those of the law that the pixels follow: taking them from the images needs gigabytes.
    """
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (num_examples, *shape), dtype=np.uint8)
    y = rng.integers(0, 10, num_examples, dtype=np.int32)
    mean, std = np.full(shape, 255 / 2, np.float32), np.full(shape, math.sqrt((256**2 - 1) / 12), np.float32)
    return validate(Dataset("random_images", x, y, mean, std, 10, "multiclass", {}))


def load_torch() -> ModuleType | None:
    """PyTorch with all cores, or None, after a line that says how to install it."""
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        print("PyTorch is not installed, so the peer is not measured. To measure it: pip install -e '.[bench]'")
        return None
    torch.set_num_threads(os.cpu_count() or 1)
    return torch


def per_branch_network(torch: ModuleType, params: Sequence[Mapping[str, Any]]) -> Any:
    """The authors' network in PyTorch: each branch a module of its own, called in a loop, the outputs averaged.

    Args:
      torch: the module.
      params: of a `multi_branch` of `mlp` branches, leaves `[I, ...]`; the network starts with these weights.
    """
    layers = [{name: np.asarray(leaf) for name, leaf in layer.items()} for layer in params]

    def branch(index: int) -> Any:
        modules = []
        for number, layer in enumerate(layers):
            out, fan_in = layer["kernel"].shape[1:]
            linear = torch.nn.Linear(fan_in, out)
            linear.weight.data.copy_(torch.tensor(layer["kernel"][index]))
            linear.bias.data.copy_(torch.tensor(layer["bias"][index]))
            modules += [torch.nn.ReLU()] * (number > 0) + [linear]
        return torch.nn.Sequential(*modules)

    class PerBranch(torch.nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.branches = torch.nn.ModuleList(branch(i) for i in range(len(layers[0]["bias"])))

        def forward(self, x: Any) -> Any:
            return sum(branch(x) for branch in self.branches) / len(self.branches)

    return PerBranch()


def arguments(description: str, rounds: int, *, torch: bool = False) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks take, and with `--no-torch` for those with PyTorch as their peer."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--rounds", type=positive, default=rounds, help="times that everything is measured in turn")
    if torch:
        parser.add_argument("--no-torch", action="store_true", help="leave the PyTorch peer out")
    parser.add_argument("--smoke", action="store_true", help="a tiny size, which shows that it runs and nothing else")
    return parser


def positive(text: str) -> int:
    """An integer flag of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def environment() -> dict[str, Any]:
    """Where and when the numbers were taken.  `load_average` shows whether the machine was quiet at the start."""
    versions = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "numpy", "torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": device.platform,
        "device": _processor() if device.platform == "cpu" else device.device_kind,
        "cores": os.cpu_count() or 1,
        "load_average": os.getloadavg()[0],
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def text(value: Any) -> str:
    """A cell: `median (min-max)` for a spread, three significant digits for a number."""
    if isinstance(value, Mapping):
        return f"{_digits(value['median'])} ({_digits(value['min'])}-{_digits(value['max'])})"
    return _digits(value) if isinstance(value, float) else str(value)


def _digits(value: float) -> str:
    if not math.isfinite(value) or value == 0:
        return str(value)
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def report(results: Mapping[str, Any], columns: Mapping[str, str], notes: Sequence[str], path: Path | None) -> None:
    """Prints environment, table of `results['rows']` with these `key: heading` columns, and notes; writes JSON."""
    where = results["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    print(f"{where['device']}, {where['cores']} cores, load {where['load_average']:.2f}, {where['date']}\n{versions}\n")
    print(table(list(columns.values()), [[text(row[key]) for key in columns] for row in results["rows"]], width=1000))
    print("\n" + "\n".join(notes))
    for row in results["rows"]:
        for key, target in row["targets"].items():
            state = {True: "reached", False: "NOT reached"}.get(target["reached"], NOT_MEASURED)
            print(f"{row['case']}: {columns[key]} >= {target['least']:g}: {state}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")
