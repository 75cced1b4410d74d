"""One landscape of Figures 1 and 4: three SGD solutions, the plane through them, the loss over it, convexity scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import humanize
import jax
import numpy as np

from dualgap_jax import figures, seeds, terminal
from dualgap_jax.config import Component, ConfigError, require
from dualgap_jax.data import Dataset, own
from dualgap_jax.evaluation import evaluate
from dualgap_jax.experiments.around import Around
from dualgap_jax.experiments.base import NO_REPORT, Experiment, Report, Tables, confirm_data
from dualgap_jax.experiments.landscape_report import report
from dualgap_jax.experiments.planes import PlaneSpec, check_alignable, chosen, measure
from dualgap_jax.files import save_json
from dualgap_jax.losses import Loss, check_assumption_1
from dualgap_jax.machine import memory_available
from dualgap_jax.networks import multi_branch, with_precision
from dualgap_jax.registry import unknown
from dualgap_jax.sharding import MeshSpec
from dualgap_jax.training import Solution, TrainingSpec, scaled_learning_rate, train
from dualgap_jax.training.batches import example_input
from dualgap_jax.trees import num_bytes
from dualgap_jax.types import Network
from dualgap_jax.workdir import Workdir

DType = Literal["float32", "bfloat16"]


class DivergedError(RuntimeError):
    """A run of SGD ended in numbers that are not finite, so there is no plane through the solutions."""


@dataclasses.dataclass(frozen=True)
class PrecisionSpec:
    """The number formats of training; see `networks.with_precision`.  Evaluation and surfaces are always in float32.

    Attributes:
      params: of the stored parameters, 'float32' or 'bfloat16'.
      compute: of the products inside a branch; outputs of branches, their sum and the loss are float32.
    """

    params: DType = "float32"
    compute: DType = "float32"

    def __post_init__(self) -> None:
        for name in ("params", "compute"):
            given, allowed = getattr(self, name), get_args(DType)
            require(given in allowed, unknown(f"value of precision.{name}:", given, allowed))


@dataclasses.dataclass(frozen=True)
class LandscapeSpec:
    """One landscape.

    Attributes:
      title: head of the figure; '{I}' stands for the number of branches.
      num_branches: I.
      reduce: 'mean' (Section 2) or 'sum' (Section 5).
      seed: of initialisations and orders; the three solutions have independent keys.
      branch: an entry of the branch table and its settings; the number of outputs comes from the data.
      data, loss: entries of their tables.
      test: data on which the loss and accuracy of each solution are measured too, standardised by the constants of the
        training set and with its classes; its name 'none' is none.
      training, plane: how solutions are found, and what is drawn through them.
      mesh: devices that share the branches and the batches in training.
      precision: number formats of the training.
      tensorboard: whether to write event files too.
    """

    title: str = "Loss landscape, I = {I}"
    num_branches: int = 10
    reduce: Literal["mean", "sum"] = "mean"
    seed: int = 0
    branch: Component = Component("mlp", {"hidden": (8,)})
    data: Component = Component("synthetic_relu", {})
    loss: Component = Component("binary_hinge", {})
    test: Component = Component("none", {})
    training: TrainingSpec = TrainingSpec()
    plane: PlaneSpec = PlaneSpec()
    mesh: MeshSpec = MeshSpec()
    precision: PrecisionSpec = PrecisionSpec()
    tensorboard: bool = False

    def __post_init__(self) -> None:
        seeds.check(self.seed)
        require(self.num_branches >= 1, f"num_branches={self.num_branches} must be a positive integer.")

    def validate(self, tables: Tables) -> None:
        """Looks every name and setting up, so that a bad config fails before anything is written or read."""
        tables.losses.build(self.loss.name, **self.loss.settings)
        tables.branches.build(self.branch.name, **{**self.branch.settings, "out": 1})
        tables.datasets.check(self.data.name, **self.data.settings)
        seeds.check(self.data.settings.get("seed", 0), "data.seed")
        if self.test.name != "none":
            tables.datasets.check(self.test.name, **self.test.settings)
        self.training.arguments(self.num_branches)


def smoke(spec: LandscapeSpec, **data: Any) -> LandscapeSpec:
    """The same landscape in seconds: few steps, a 7 x 7 grid, and the data settings given here (`num_examples=256`)."""
    return dataclasses.replace(
        spec,
        data=Component(spec.data.name, {**spec.data.settings, **data}),
        training=dataclasses.replace(
            spec.training, batch_size=min(spec.training.batch_size, 32), max_steps=40, check_every=20
        ),
        plane=dataclasses.replace(spec.plane, points=7, edge_points=5),
    )


class Setting(NamedTuple):
    """What a spec names.

    Attributes:
      dataset: the training set.
      net: the network in float32, for evaluation and surfaces.
      training_net: the same network at the precision of its training; `net` itself for float32.
      loss: the loss.
    """

    dataset: Dataset
    net: Network
    training_net: Network
    loss: Loss


def build(spec: LandscapeSpec, tables: Tables) -> Setting:
    """The data set, networks and loss of a spec."""
    loss = tables.losses.build(spec.loss.name, **spec.loss.settings)
    dataset = tables.datasets.build(spec.data.name, **spec.data.settings)
    branch = tables.branches.build(spec.branch.name, **{**spec.branch.settings, "out": dataset.num_outputs})

    def network(branch: Network) -> Network:
        return multi_branch(branch, spec.num_branches, reduce=spec.reduce)

    net = network(branch)
    training_net = net
    if spec.precision != PrecisionSpec():
        lowered = with_precision(branch, param_dtype=spec.precision.params, compute_dtype=spec.precision.compute)
        training_net = network(lowered)
    _check_fits(spec, training_net, dataset)
    check_alignable(spec.plane, net, dataset)
    return Setting(dataset, net, training_net, loss)


def test_set(spec: LandscapeSpec, dataset: Dataset, tables: Tables) -> Dataset | None:
    """The test set of a spec as networks trained on `dataset` have to see it; None where there is none.

    Raises:
      ConfigError: for one that does not fit the training set; and as the data set itself does.
    """
    if spec.test.name == "none":
        return None
    settings = dict(spec.test.settings)
    if tables.datasets[spec.test.name] is own and settings.get("task", "auto") == "auto":
        settings["task"] = dataset.task  # a part of the labels may look like those of another
    try:
        return tables.datasets.build(spec.test.name, **settings).like(dataset)
    except ValueError as error:
        raise ConfigError(f"test: {error}") from error


def _check_fits(spec: LandscapeSpec, net: Network, dataset: Dataset) -> None:
    """Raises ConfigError for a network too large for the devices that share it, or too small for its plane."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), example_input(dataset))
    total, asked = num_parameters(net, dataset), spec.plane.hessian
    most = total // spec.num_branches if spec.plane.hessian_branches else total
    require(total > 1, "three networks of one parameter span no plane; take more branches, features or units.")
    require(
        asked <= most,
        f"plane.hessian={asked} exceeds the {most:,} parameters{' of a branch' * spec.plane.hessian_branches}.",
    )
    needed, free = num_bytes(shapes) // max(spec.mesh.branch, 1), memory_available()
    require(
        needed < free,
        f"one network of num_branches={spec.num_branches:,} takes {humanize.naturalsize(needed)}, available are"
        f" {humanize.naturalsize(max(free, 0))}; take fewer or smaller branches, or share them with"
        " --config.mesh.branch.",
    )


def num_parameters(net: Network, dataset: Dataset) -> int:
    """How many numbers the parameters of the network are."""
    params, _ = jax.eval_shape(net.init, jax.random.key(0), example_input(dataset))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def regime(spec: LandscapeSpec) -> str:
    """The training regime in a few words; the picture depends on it."""
    settings = ", ".join(f"{k} {v}" for k, v in spec.branch.settings.items() if k in ("init", "init_scale", "use_bias"))
    scaling = {"branches": " times I", "inverse_branches": " over I", "none": ""}[spec.training.lr_scaling]
    numbers = (
        f", trained with {spec.precision.params} parameters and {spec.precision.compute} compute"
        if spec.precision != PrecisionSpec()
        else ""
    )
    optimizer = f"{spec.training.optimizer.name}, " if spec.training.optimizer.name != "sgd" else ""
    rate = f"{optimizer}learning rate {spec.training.learning_rate:g}{scaling}"
    return f"{spec.reduce} over branches, {settings or spec.branch.name}, {rate}{numbers}"


def landscape_experiment(spec: LandscapeSpec, workdir: Workdir, tables: Tables) -> Report:
    """Loss landscape through three SGD solutions, with convexity scores (one panel of Figures 1 and 4)."""
    with terminal.Progress(None, "data"):
        dataset, net, training_net, loss = build(spec, tables)
        test = test_set(spec, dataset, tables)
    confirm_data(workdir, dataset.x, dataset.y, dataset.mean, dataset.std, info=dataset.info)
    measured = chosen(dataset, spec.plane.samples, spec.seed)
    around = Around(spec, workdir, net, loss, dataset, measured)
    if spec.plane.trajectory and workdir.writes:
        around.check_snapshots()
    with workdir.metrics(tensorboard=spec.tensorboard) as metrics:
        solutions = train(
            training_net,
            loss,
            dataset,
            **spec.training.arguments(spec.num_branches),
            seed=spec.seed,
            mesh=spec.mesh,
            checkpoints=workdir.checkpoints,
            metrics=metrics,
            report=terminal.say if workdir.writes else None,
            snapshot=around.snapshot if spec.plane.trajectory else None,
        )
    if not workdir.writes:
        _check_not_diverged(spec, solutions)
        return NO_REPORT
    networks = [s.network for s in solutions]
    evaluations = [evaluate(net, loss, measured, network) for network in networks]
    rows = [
        {"loss": e.loss, "accuracy": e.accuracy, "status": s.status, "steps": s.steps, "batch_loss": s.batch_loss}
        for s, e in zip(solutions, evaluations, strict=True)
    ]
    if test is not None:
        for row, network in zip(rows, networks, strict=True):
            seen = evaluate(net, loss, test, network)
            row |= {"test_loss": seen.loss, "test_accuracy": seen.accuracy}
    save_json(workdir.results / "solutions.json", {"solutions": rows})
    _check_not_diverged(spec, solutions)
    margins = np.concatenate([e.margins for e in evaluations if e.margins is not None] or [np.zeros(0)])
    record: dict[str, Any] = {
        "title": spec.title.replace("{I}", f"{spec.num_branches:,}"),
        "num_branches": spec.num_branches,
        "regime": regime(spec),
        "precision": dataclasses.asdict(spec.precision),
        "samples": {"used": len(measured.y), "of": len(dataset.y)},
        "solutions": rows,
        "assumption_1": check_assumption_1(loss, margins)._asdict(),
        "data": dataset.info,
        **measure(spec, workdir, measured, net, loss, networks),
        **around.measure(solutions),
    }
    save_json(workdir.results / "landscape.json", record)
    return report([record])


def _check_not_diverged(spec: LandscapeSpec, solutions: Sequence[Solution]) -> None:
    diverged = [k for k, s in enumerate(solutions) if s.status == "diverged"]
    if diverged:
        raise DivergedError(
            f"solution {', '.join(map(str, diverged))} diverged after {solutions[diverged[0]].steps} steps at learning"
            f" rate {scaled_learning_rate(spec.training, spec.num_branches):g}; lower --config.training.learning_rate."
        )


LANDSCAPE = Experiment("landscape", LandscapeSpec, landscape_experiment, figures.landscape, distributed=True)
UNDRAWN = dataclasses.replace(LANDSCAPE, draw=None)  # one of many, whose scores are what is drawn
