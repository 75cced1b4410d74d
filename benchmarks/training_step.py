"""Speed of the training step beside its limit, bare matrix products, and its peer, a PyTorch loop over branches.

    python benchmarks/training_step.py [--json FILE] [--smoke]

Measured is the package's own compiled segment (`training.together.make_segment`): gather of the mini-batch from uint8
images, standardisation, forward and backward pass, update.  A rate is the operations of the step's matrix products
(forward and weight gradients of all layers, input gradients of all but the first) over its time.  The limit is the rate
of two bare jitted products, forward and weight gradient of the first layer, of the same shapes; each writes into a
donated buffer, so that no time goes into fresh memory.  The peer is given standardised batches.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dualgap_jax import training
from dualgap_jax.data import Dataset, standardise
from dualgap_jax.losses import multi_margin
from dualgap_jax.networks import mlp, multi_branch
from dualgap_jax.optimizers import for_network
from dualgap_jax.schedules import plateau
from dualgap_jax.training.batches import BatchOrder, example_input, on_device
from dualgap_jax.training.engine import Carry, begin
from dualgap_jax.training.together import make_segment

_CLASSES = 10
_LEARNING_RATE = 0.1  # times I, as in the configs
_LIMIT, _PEER = "of_limit", "over_peer"


class Case(NamedTuple):
    """One network: the config it stands for, image shape, hidden widths, branches, solutions trained together."""

    config: str
    image: tuple[int, ...]
    hidden: tuple[int, ...]
    num_branches: int
    num_solutions: int
    targets: tuple[common.Target, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.config} I={self.num_branches} S={self.num_solutions}"

    @property
    def widths(self) -> tuple[int, ...]:
        return (math.prod(self.image), *self.hidden, _CLASSES)


_MNIST, _CIFAR = ("mnist_1layer", (28, 28, 1), (8,)), ("cifar_3layer", (32, 32, 3), (8, 8, 8))
_TARGETS = (common.Target(_LIMIT, 0.8), common.Target(_PEER, 6.0))
CASES = tuple(
    Case(*network, num_branches, num_solutions, _TARGETS if num_solutions == 1 else ())
    for num_solutions in (1, 3)
    for network, num_branches in ((_MNIST, 100), (_MNIST, 1000), (_CIFAR, 1000))
)
SMOKE = tuple(Case("smoke", (4, 4, 1), (3, 2), 5, num_solutions) for num_solutions in (1, 2))


def operations(widths: Sequence[int], num_branches: int, batch: int) -> int:
    """Floating-point operations of one step's matrix products, 2 m n k each; no input gradient of the first layer."""
    products = [2 * out * fan_in * batch * num_branches for fan_in, out in itertools.pairwise(widths)]
    return 2 * sum(products) + sum(products[1:])


class Setup(NamedTuple):
    """What the package and the peer start from: initial parameters `[S, I, ...]`, data, batches `[S, T, batch]`."""

    carry: Carry
    dataset: Dataset
    indices: np.ndarray


def package_segment(case: Case, batch: int, steps: int) -> tuple[Setup, Callable[[], jax.Array]]:
    """The start, and a call that trains on by one segment of `steps` steps and returns the losses `[S, steps]`."""
    dataset = common.random_images(case.image, num_examples=max(4096, batch))
    data = on_device(dataset)
    net = multi_branch(mlp(case.hidden, _CLASSES), case.num_branches)
    transformation, schedule = for_network(net, optax.sgd(1.0)), plateau(steps)
    segment = make_segment(net, multi_margin(), transformation, schedule)

    @jax.jit
    def start(key: jax.Array) -> Carry:
        params, state = net.init(key, example_input(data))
        return begin(transformation, params, state)

    def stack(trees: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    keys = jnp.stack([training.solution_key(0, i) for i in range(case.num_solutions)])
    schedules = stack([schedule.init()] * case.num_solutions)
    orders = [BatchOrder(key, len(dataset.y), batch) for key in keys]
    indices = np.stack([order.indices(0, steps) for order in orders])
    carry = stack([start(key) for key in keys])
    setup = Setup(jax.tree.map(np.array, carry), dataset, indices)
    rate = _LEARNING_RATE * case.num_branches
    arguments = (schedules, keys, rate, data, jnp.asarray(indices), 0, steps, steps)

    def call() -> jax.Array:
        nonlocal carry  # the segment takes the memory of the carry that it is given
        carry, losses = segment(carry, *arguments)
        return losses

    return setup, call


def bare_products(case: Case, batch: int, repeats: int) -> dict[str, Callable[[], jax.Array]]:
    """The first layer's forward product `[I h, d] x [d, B]` and weight gradient `[I h, B] x [B, d]`, each repeated."""
    rows, columns = case.num_branches * case.widths[1], case.widths[0]
    keys = jax.random.split(jax.random.key(1), 4)
    kernel, x, x_rows, gradient = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, ((rows, columns), (columns, batch), (batch, columns), (rows, batch)), strict=True)
    )
    product = jax.jit(lambda into, a, b: a @ b, donate_argnums=0, keep_unused=True)

    def repeated(a: jax.Array, b: jax.Array) -> Callable[[], jax.Array]:
        into = jnp.zeros((a.shape[0], b.shape[1]))

        def call() -> jax.Array:
            nonlocal into
            for _ in range(repeats):
                into = product(into, a, b)
            return into

        return call

    return {"forward": repeated(kernel, x), "weight_gradient": repeated(gradient, x_rows)}


def peer_segment(torch: Any, case: Case, setup: Setup, steps: int) -> Callable[[], list[float]]:
    """A call that trains the first solution in PyTorch by `steps` steps and returns the losses.

    Raises:
      ValueError: if `steps` exceeds the batches of the setup.
    """
    if steps > setup.indices.shape[1]:
        raise ValueError(f"{steps} peer steps need as many batches; the setup has {setup.indices.shape[1]}.")
    net = common.per_branch_network(torch, jax.tree.map(lambda leaf: leaf[0], setup.carry.params))
    criterion = torch.nn.MultiMarginLoss()
    sgd = torch.optim.SGD(net.parameters(), lr=_LEARNING_RATE * case.num_branches)
    data = setup.dataset
    batches = [
        (
            torch.tensor(np.asarray(standardise(data.x[picked], data.mean, data.std)).reshape(len(picked), -1)),
            torch.tensor(data.y[picked], dtype=torch.int64),
        )
        for picked in setup.indices[0, :steps]
    ]

    def call() -> list[float]:
        losses = []
        for x, y in batches:
            sgd.zero_grad()
            loss = criterion(net(x), y)
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        return losses

    return call


def measure(case: Case, batch: int, steps: int, peer_steps: int, rounds: int, torch: Any) -> dict[str, Any]:
    """One row of results.

    Raises:
      RuntimeError: if from the same weights, on the same batches, the peer's losses are others than the package's.
    """
    setup, segment = package_segment(case, batch, steps)
    first_losses = np.asarray(segment(), np.float64)[0]
    limits = bare_products(case, batch, repeats=steps * case.num_solutions)
    seconds = common.interleave({"step": segment, **limits}, rounds)
    done = operations(case.widths, case.num_branches, batch) * case.num_solutions * steps
    one_product = 2 * case.num_branches * case.widths[1] * case.widths[0] * batch * case.num_solutions * steps
    limit = 2 * one_product / (seconds["forward"] + seconds["weight_gradient"])
    row: dict[str, Any] = {
        "case": case.name,
        "batch": batch,
        "steps_per_segment": steps,
        "operations_per_step": done // steps,
        "step_ms": common.spread(1e3 * seconds["step"] / steps),
        "step_gflops": common.spread(done / seconds["step"] / 1e9),
        "forward_gflops": common.spread(one_product / seconds["forward"] / 1e9),
        "weight_gradient_gflops": common.spread(one_product / seconds["weight_gradient"] / 1e9),
        "limit_gflops": common.spread(limit / 1e9),
        _LIMIT: common.spread(done / seconds["step"] / limit),
        "peer_step_ms": common.NOT_MEASURED,
        _PEER: common.NOT_MEASURED,
        "peer_disagreement": common.NOT_MEASURED,
    }
    if torch is not None and case.num_solutions == 1:
        peer = peer_segment(torch, case, setup, peer_steps)
        row["peer_disagreement"] = common.disagreement(peer(), first_losses[:peer_steps], f"PyTorch on {case.name}")
        pair = common.interleave({"step": segment, "peer": peer}, rounds)
        peer_seconds = pair["peer"] / peer_steps
        row["peer_step_ms"] = common.spread(1e3 * peer_seconds)
        row[_PEER] = common.spread(peer_seconds / (pair["step"] / steps))
    return row | {"targets": common.judge(row, case.targets)}


def main(argv: Sequence[str] | None = None) -> None:
    """Measures every case, prints the table, and writes the JSON file."""
    parser = common.arguments("Training step: the package, bare matrix products, PyTorch.", rounds=9, torch=True)
    parser.add_argument("--case", action="append", choices=[c.name for c in CASES], help="only this; may be repeated")
    flags = parser.parse_args(argv)
    where = common.environment()
    torch = None if flags.no_torch else common.load_torch()
    batch, steps, peer_steps, rounds = (8, 3, 3, 1) if flags.smoke else (128, 20, 3, flags.rounds)
    cases = SMOKE if flags.smoke else [c for c in CASES if not flags.case or c.name in flags.case]
    rows = []
    for case in cases:
        print(f"measuring {case.name}", file=sys.stderr)
        rows.append(measure(case, batch, steps, peer_steps, rounds, torch))
    results = {"benchmark": "training_step", "environment": where, "smoke": flags.smoke, "rounds": rounds, "rows": rows}
    columns = {
        "case": "case",
        "step_ms": "step, ms",
        "step_gflops": "GFLOP/s",
        "limit_gflops": "limit, GFLOP/s",
        _LIMIT: "step / limit",
        "peer_step_ms": "PyTorch step, ms",
        _PEER: "PyTorch / step",
    }
    notes = [
        "Medians (least-largest) over the rounds. S solutions train in one program, and a step is one of all S; PyTorch"
        " trains one and is measured for S = 1 only.",
    ]
    common.report(results, columns, notes, flags.json)


if __name__ == "__main__":
    main()
