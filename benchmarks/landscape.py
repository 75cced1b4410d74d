"""Speed of the landscape beside a jitted full re-evaluation of every point, and beside a PyTorch loop over points.

    python benchmarks/landscape.py [--json FILE] [--smoke] [--branches N] [--samples N] [--grid N] [--no-full]

Measured is one whole call of `landscape.evaluate_points` over the grid, compilation and first layer included, and its
marginal time per point, from a second call with few points.  The full re-evaluation forms `origin + a u + b v` and runs
the whole network at each point, many points in one jitted program; the PyTorch loop does the same with one module a
branch.  Both are timed on a few points of the same grid and compared per point; all three must agree on the losses.
The floor is the time that the operations of one point above the first layer would take at the rate of a bare jitted
product of the first layer's shape.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualgap_jax import landscape
from dualgap_jax.data import Dataset, standardise
from dualgap_jax.losses import multi_margin
from dualgap_jax.networks import mlp, multi_branch
from dualgap_jax.networks.sources import InMemory
from dualgap_jax.types import Network

_CLASSES = 10
_WINDOW = 0.6  # the grid covers [-0.6, 0.6]^2, as in Figure 1
_FEW = 64  # points of the second call
_OVER_FULL, _MARGINAL_OVER_FULL, _OVER_PEER = "over_full", "marginal_over_full", "over_peer"


class Case(NamedTuple):
    """What is evaluated: image shape, hidden widths, branches, samples, points along each side of the grid."""

    image: tuple[int, ...]
    hidden: tuple[int, ...]
    num_branches: int
    num_samples: int
    side: int

    @property
    def widths(self) -> tuple[int, ...]:
        return (math.prod(self.image), *self.hidden, _CLASSES)


SMOKE = Case((4, 4, 1), (3, 2), 5, 16, 9)


def operations(case: Case) -> int:
    """Floating-point operations of one further point: what depends on (a, b), once the first layer is done.

    The affine combinations (4 operations a number) of first-layer pre-activations and of the small layers' parameters,
    and the small layers' matrix products, 2 m n k each.  Biases, activations and the loss are not counted.
    """
    above = list(itertools.pairwise(case.widths))[1:]
    preactivations = case.widths[1] * case.num_samples
    parameters = sum(out * (fan_in + 1) for fan_in, out in above)
    products = sum(2 * out * fan_in * case.num_samples for fan_in, out in above)
    return case.num_branches * (4 * (preactivations + parameters) + products)


class Setup(NamedTuple):
    """What all routes evaluate: the network, the plane through three initialisations, the data."""

    net: Network
    plane: landscape.Plane
    dataset: Dataset


def prepare(case: Case) -> Setup:
    """Random data, and the plane through three initialisations, with the authors' axes."""
    dataset = common.random_images(case.image, case.num_samples)
    net = multi_branch(mlp(case.hidden, _CLASSES), case.num_branches)
    example = standardise(dataset.x[:1], dataset.mean, dataset.std)
    solutions = [InMemory(*jax.jit(net.init)(jax.random.key(seed), example)) for seed in range(3)]
    return Setup(net, landscape.plane_through(solutions, "authors"), dataset)


def full_reevaluation(setup: Setup, points: np.ndarray) -> Callable[[], jax.Array]:
    """A call that gives the mean losses `[P]`, the weights formed and the whole network run at each point."""
    net, plane, data = setup
    per_example = multi_margin().per_example
    arguments = (
        plane.whole().params,
        standardise(data.x, data.mean, data.std),
        jnp.asarray(data.y),
        jnp.asarray(points, jnp.float32),
    )

    @jax.jit
    def losses(directions: tuple[Any, ...], x: jax.Array, y: jax.Array, points: jax.Array) -> jax.Array:
        def one(point: jax.Array) -> jax.Array:
            return jnp.mean(per_example(net.apply(landscape.at(*point, *directions), (), x)[0], y))

        with jax.default_matmul_precision("highest"):  # as the package does
            return lax.map(one, points)

    return lambda: losses(*arguments)


def peer_loop(torch: Any, setup: Setup, points: np.ndarray) -> Callable[[], list[float]]:
    """The same in PyTorch, one point after another, one module a branch."""
    _, plane, data = setup
    build = functools.partial(common.per_branch_network, torch)
    first, second, third = plane.whole().params
    net, origin, u, v = build(first), build(first), build(second), build(third)
    tensors = list(zip(*(n.parameters() for n in (net, origin, u, v)), strict=True))
    criterion = torch.nn.MultiMarginLoss()
    x = torch.tensor(np.asarray(standardise(data.x, data.mean, data.std)).reshape(len(data.y), -1))
    y = torch.tensor(data.y, dtype=torch.int64)

    def call() -> list[float]:
        losses = []
        with torch.no_grad():
            for a, b in points.tolist():
                for weight, at_origin, along_u, along_v in tensors:
                    weight.copy_(at_origin).add_(along_u, alpha=a).add_(along_v, alpha=b)
                losses.append(criterion(net(x), y).item())
        return losses

    return call


def bare_product(case: Case, repeats: int) -> Callable[[], jax.Array]:
    """The product `[I h, d] x [d, samples]` of the first layer, `repeats` times, into a donated buffer."""
    rows, inner = case.num_branches * case.widths[1], case.widths[0]
    kernel = jax.random.normal(jax.random.key(1), (rows, inner))
    x = jax.random.normal(jax.random.key(2), (inner, case.num_samples))
    product = jax.jit(lambda into, a, b: a @ b, donate_argnums=0, keep_unused=True)
    into = jnp.zeros((rows, case.num_samples))

    def call() -> jax.Array:
        nonlocal into
        for _ in range(repeats):
            into = product(into, kernel, x)
        return into

    return call


def beside(
    name: str, each: np.ndarray | None, count: int, point: np.ndarray, grid: int, disagreement: float | None
) -> dict[str, Any]:
    """What a row says of another route.

    Args:
      name: 'full' or 'peer'.
      each: its seconds a point, `[rounds]`; None where it is not measured.
      count: points that were timed.
      point: seconds of the package's points, `[rounds]`.
      grid: points of the whole grid.
      disagreement: of its losses.
    """
    found: tuple[Any, ...] = (common.NOT_MEASURED,) * 5
    if each is not None:
        whole = float(np.median(each) * grid)
        found = count, common.spread(1e3 * each), whole, common.spread(each / point), disagreement
    keys = "{}_points_timed", "{}_point_ms", "{}_grid_seconds_extrapolated", "over_{}", "{}_disagreement"
    return {key.format(name): value for key, value in zip(keys, found, strict=True)}


def measure(case: Case, num_full: int, num_peer: int, rounds: int, torch: Any) -> dict[str, Any]:
    """The row of results; `num_full` and `num_peer` points of the grid are timed on the two other routes.

    Raises:
      RuntimeError: if another route gives other losses than the package.
    """
    setup = prepare(case)
    ticks = np.linspace(-_WINDOW, _WINDOW, case.side)
    grid = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    few = grid[: min(_FEW, len(grid) // 2)]
    picks = {name: np.linspace(0, len(grid) - 1, n).astype(int) for name, n in (("full", num_full), ("peer", num_peer))}
    repeats = max(num_full, 1)

    def package(points: np.ndarray) -> np.ndarray:
        return landscape.evaluate_points(setup.net, multi_margin(), setup.dataset, setup.plane, points)

    calls: dict[str, Callable[[], object]] = {
        "grid": lambda: package(grid),
        "few": lambda: package(few),
        "product": bare_product(case, repeats),
    }
    if num_full:
        calls["full"] = full_reevaluation(setup, grid[picks["full"]])
    if torch is not None:
        calls["peer"] = peer_loop(torch, setup, grid[picks["peer"]])
    losses = package(grid) if len(calls) > 3 else np.zeros(len(grid))
    disagreements = {
        name: common.disagreement(calls[name](), losses[picks[name]], what)
        for name, what in (("full", "the full re-evaluation"), ("peer", "the PyTorch loop"))
        if name in calls
    }
    seconds = common.interleave(calls, rounds)
    point = seconds["grid"] / len(grid)
    marginal = (seconds["grid"] - seconds["few"]) / (len(grid) - len(few))
    product = 2 * case.num_branches * case.widths[1] * case.widths[0] * case.num_samples * repeats
    product_rate = product / seconds["product"]
    floor = operations(case) / product_rate
    row: dict[str, Any] = {
        "case": f"I={case.num_branches} d={case.widths[0]} hidden={'-'.join(map(str, case.hidden))}",
        "samples": case.num_samples,
        "points": len(grid),
        "grid_seconds": common.spread(seconds["grid"]),
        "point_ms": common.spread(1e3 * point),
        "marginal_point_ms": common.spread(1e3 * marginal),
        "operations_per_point": operations(case),
        "marginal_gflops": common.spread(operations(case) / marginal / 1e9),
        "product_gflops": common.spread(product_rate / 1e9),
        "floor_ms": common.spread(1e3 * floor),
        "of_floor": common.spread(floor / marginal),
    }
    for name, count in (("full", num_full), ("peer", num_peer if torch is not None else 0)):
        row |= beside(name, seconds[name] / count if count else None, count, point, len(grid), disagreements.get(name))
    full = seconds["full"] / num_full if num_full else None
    row[_MARGINAL_OVER_FULL] = common.spread(full / marginal) if full is not None else common.NOT_MEASURED
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes the JSON file."""
    parser = common.arguments(
        "Landscape: the package, full re-evaluation of every point, PyTorch.", rounds=5, torch=True
    )
    parser.add_argument("--branches", type=common.positive, default=1024, help="I of the cifar_3layer network")
    parser.add_argument("--samples", type=common.positive, default=256, help="samples that the loss is taken over")
    parser.add_argument(
        "--grid", type=common.positive, default=51, help="points along each side of the grid, at least 2"
    )
    parser.add_argument(
        "--no-full", action="store_true", help="leave the full re-evaluation out, which takes whole networks at a time"
    )
    flags = parser.parse_args(argv)
    if flags.grid < 2:
        parser.error(f"--grid={flags.grid} must be at least 2")
    where = common.environment()
    torch = None if flags.no_torch else common.load_torch()
    case = SMOKE if flags.smoke else Case((32, 32, 3), (8, 8, 8), flags.branches, flags.samples, flags.grid)
    num_full, num_peer, rounds = (3, 2, 1) if flags.smoke else (8, 3, flags.rounds)
    print(f"measuring {case.num_branches} branches, {case.side} x {case.side} points", file=sys.stderr)
    row = measure(case, 0 if flags.no_full else num_full, num_peer, rounds, torch)
    targets = () if flags.smoke else (common.Target(_OVER_FULL, 60.0), common.Target(_OVER_PEER, 100.0))
    row["targets"] = common.judge(row, targets)
    results = {"benchmark": "landscape", "environment": where, "smoke": flags.smoke, "rounds": rounds, "rows": [row]}
    columns = {
        "case": "case",
        "point_ms": "point, ms",
        "full_point_ms": "full point, ms",
        _OVER_FULL: "full / point",
        "peer_point_ms": "PyTorch point, ms",
        _OVER_PEER: "PyTorch / point",
        "marginal_point_ms": "marginal point, ms",
        _MARGINAL_OVER_FULL: "full / marginal",
        "marginal_gflops": "GFLOP/s",
        "product_gflops": "bare product, GFLOP/s",
        "of_floor": "floor / marginal",
    }
    notes = [
        f"Medians (least-largest) over the rounds; {row['points']} points, {row['samples']} samples. A point is a share"
        " of the whole call, compilation included;",
        "a marginal point leaves out what a call with few points takes. GFLOP/s are of the marginal point, floor is its"
        f" {row['operations_per_point'] / 1e6:.3g} MFLOP at the bare product's rate.",
    ]
    if not flags.no_full:
        notes.append(
            f"Extrapolated from {num_full} points, the full re-evaluation of the grid takes"
            f" {row['full_grid_seconds_extrapolated']:.3g} s; PyTorch, from its points:"
            f" {common.text(row['peer_grid_seconds_extrapolated'])}{' s' if torch is not None else ''}."
        )
    common.report(results, columns, notes, flags.json)


if __name__ == "__main__":
    main()
