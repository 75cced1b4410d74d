"""One landscape of Figures 1 and 4: three SGD solutions, the plane through them, the loss over it, convexity scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import humanize
import jax
import jax.numpy as jnp
import numpy as np

from dualgap_jax import convexity, figures, landscape, seeds, terminal
from dualgap_jax.config import Component, ConfigError, require
from dualgap_jax.data import Dataset, standardise
from dualgap_jax.evaluation import evaluate
from dualgap_jax.experiments.base import NO_REPORT, Experiment, Report, Tables, confirm_data
from dualgap_jax.experiments.landscape_report import report
from dualgap_jax.files import save_json, save_npz
from dualgap_jax.losses import Loss, check_assumption_1
from dualgap_jax.machine import memory_available
from dualgap_jax.networks import multi_branch, with_precision
from dualgap_jax.registry import unknown
from dualgap_jax.sharding import MeshSpec
from dualgap_jax.training import Solution, TrainingSpec, scaled_learning_rate, train
from dualgap_jax.training.batches import example_input
from dualgap_jax.training.engine import tree_bytes
from dualgap_jax.types import BranchSource, Network
from dualgap_jax.workdir import Workdir

DType = Literal["float32", "bfloat16"]

_MAX_POINTS = 10_000  # along a side or an edge
# Names of a config for what is permuted, and by what it is compared; see `landscape.align`.
ALIGNMENTS = {
    "branches": ("branches", "weights"),
    "units": ("units", "weights"),
    "activations": ("units", "activations"),
}
PAPER_HALF_WIDTH = 0.6  # the window that Figure 1 shows, in the authors' axes


class DivergedError(RuntimeError):
    """A run of SGD ended in numbers that are not finite, so there is no plane through the solutions."""


@dataclasses.dataclass(frozen=True)
class PlaneSpec:
    """The plane and the grid on it.

    Attributes:
      axes: 'authors' or 'orthonormal'; see `landscape.plane_through`.
      half_width: the window is `[-half_width, half_width]^2` in plane coordinates.  In the authors' axes coordinates
        of orthogonal solutions of equal length are at most 0.95, so 1 shows all three; Figure 1 shows 0.6.  In
        orthonormal axes it is a multiple of the largest distance of a solution from the origin.
      points: grid points along each side.
      edge_points: points along each edge between two solutions.
      sample_chunk: samples at a time.
      samples: how many training examples, drawn by the seed, the surface, the edges, the scores, and the losses of the
        solutions are taken over; 0 is all of them.
      route: 'auto', 'stem' or 'plain'; see `landscape.evaluate_points`.
      state: what becomes of running statistics (batch norm) between the solutions: 'estimate' gathers them anew at
        every point, 'interpolate' takes them along linearly.
      state_samples: over how many examples they are estimated, spread evenly over those of the surface.
      align: whether a second surface goes through the solutions aligned to the first: 'none'; 'branches', permuted
        whole and in their hidden units; 'units', the hidden units of all branches by weights, 'activations', by
        activations, both for one hidden layer; see `landscape.align`.
    """

    axes: Literal["authors", "orthonormal"] = "authors"
    half_width: float = 1.0
    points: int = 51
    edge_points: int = 25
    sample_chunk: int = 256
    samples: int = 0
    route: Literal["auto", "stem", "plain"] = "auto"
    state: Literal["estimate", "interpolate"] = "estimate"
    state_samples: int = 256
    align: Literal["none", "branches", "units", "activations"] = "none"

    def __post_init__(self) -> None:
        require(0 < self.half_width < math.inf, f"plane.half_width={self.half_width} must be positive.")
        for name in ("points", "edge_points"):
            value = getattr(self, name)
            require(3 <= value <= _MAX_POINTS, f"plane.{name}={value} must lie between 3 and {_MAX_POINTS:,}.")
        require(self.sample_chunk >= 1, f"plane.sample_chunk={self.sample_chunk} must be at least 1.")
        require(self.state_samples >= 1, f"plane.state_samples={self.state_samples} must be at least 1.")
        require(self.samples >= 0, f"plane.samples={self.samples} must be >= 0 (0: all training examples).")


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
    _check_alignable(spec, net, dataset)
    return Setting(dataset, net, training_net, loss)


def _check_fits(spec: LandscapeSpec, net: Network, dataset: Dataset) -> None:
    """Raises ConfigError for a network whose parameters alone are more than the memory of the devices that share it."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), example_input(dataset))
    needed, free = tree_bytes(shapes) // max(spec.mesh.branch, 1), memory_available()
    require(
        needed < free,
        f"one network of num_branches={spec.num_branches:,} takes {humanize.naturalsize(needed)}, available are"
        f" {humanize.naturalsize(max(free, 0))}; take fewer or smaller branches, or share them with"
        " --config.mesh.branch.",
    )


def _inputs(dataset: Dataset, count: int) -> Any:
    """The first examples as the networks get them."""
    return standardise(dataset.x[:count], dataset.mean, dataset.std)


def _check_alignable(spec: LandscapeSpec, net: Network, dataset: Dataset) -> None:
    """Raises ConfigError where the solutions could not be aligned as the spec wants it."""
    if spec.plane.align == "none":
        return
    over, by = ALIGNMENTS[spec.plane.align]
    try:
        landscape.exchangeable(net, _inputs(dataset, 32), over=over, by=by)
    except ValueError as error:
        raise ConfigError(
            f"plane.align={spec.plane.align!r} does not fit this branch: {error} Take plane.align=branches or none."
        ) from None


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
    confirm_data(workdir, dataset.x, dataset.y, dataset.mean, dataset.std, info=dataset.info)
    measured = chosen(dataset, spec.plane.samples, spec.seed)
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
        **_measure(spec, workdir, measured, net, loss, networks),
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


def chosen(dataset: Dataset, samples: int, seed: int) -> Dataset:
    """The first `samples` examples of a permutation of the data set that the seed fixes; 0 is all of them as they are.

    Raises:
      ConfigError: if there are fewer.
    """
    require(
        samples <= len(dataset.y),
        f"plane.samples={samples} exceeds the {len(dataset.y)} examples; use 0 for the full data set.",
    )
    if samples in (0, len(dataset.y)):
        return dataset
    picked = seeds.generator(seed).permutation(len(dataset.y))[:samples]
    return dataset._replace(x=dataset.x[picked], y=dataset.y[picked])


def _measure(
    spec: LandscapeSpec, workdir: Workdir, dataset: Dataset, net: Network, loss: Loss, networks: Sequence[BranchSource]
) -> dict[str, Any]:
    """Planes, surfaces and scores, raw and aligned as far as asked for; writes `results/landscape.npz`."""
    zero = jnp.zeros((len(dataset.y), dataset.num_outputs))
    zero_loss = float(np.mean(np.asarray(loss.per_example(zero, jnp.asarray(dataset.y)), np.float64)))
    measured: dict[str, Any] = {"axes": spec.plane.axes, "state": None, "zero_loss": zero_loss}
    if landscape.has_statistics(networks[0].read(0, 1)[1]):
        examples = min(spec.plane.state_samples, len(dataset.y)) if spec.plane.state == "estimate" else None
        measured["state"] = {"how": spec.plane.state, "samples": examples}
    measured |= _surface(spec, workdir, dataset, net, loss, networks, "landscape", zero_loss)
    if spec.plane.align != "none":
        over, by = ALIGNMENTS[spec.plane.align]
        found = landscape.align(net, networks, _inputs(dataset, spec.plane.sample_chunk), over=over, by=by)
        aligned = _surface(spec, workdir, dataset, net, loss, found.networks, "aligned", zero_loss)
        aligned.pop("definitions")
        measured["aligned"] = {"over": over, "by": by, "distances": found.distances.tolist(), "blocks": found.blocks}
        measured["aligned"] |= aligned
    return measured


def _surface(
    spec: LandscapeSpec,
    workdir: Workdir,
    dataset: Dataset,
    net: Network,
    loss: Loss,
    networks: Sequence[BranchSource],
    name: str,
    zero_loss: float,
) -> dict[str, Any]:
    """The surface over the plane through three networks, kept as `results/NAME.npz`, and its scores."""
    plane = landscape.plane_through(networks, spec.plane.axes)
    unit = 1.0 if spec.plane.axes == "authors" else float(np.linalg.norm(plane.anchors, axis=1).max())
    xs = spec.plane.half_width * unit * np.linspace(-1, 1, spec.plane.points)
    surface, t, edge_loss = landscape.survey(
        net,
        loss,
        dataset,
        plane,
        xs,
        xs,
        edge_points=spec.plane.edge_points,
        sample_chunk=spec.plane.sample_chunk,
        route=spec.plane.route,
        state=spec.plane.state,
        state_samples=spec.plane.state_samples,
        partial=workdir.results / f"{name}.partial.npz",
    )
    stored = {**surface._asdict(), "anchors": plane.anchors, "edge_t": t, "edge_loss": edge_loss}
    save_npz(workdir.results / f"{name}.npz", **stored)
    scores = convexity.scores(xs, xs, surface.loss, zero_loss=zero_loss, edge_t=t, edge_losses=edge_loss).to_json()
    measured: dict[str, Any] = {"definitions": scores.pop("definitions"), "scores": scores}
    if spec.plane.points % 2:  # the mean of the three networks is a point of the grid
        centre = float(surface.loss[spec.plane.points // 2, spec.plane.points // 2])
        measured["centre_loss"] = centre if np.isfinite(centre) else None
    inner = np.abs(xs) <= PAPER_HALF_WIDTH + 1e-9
    if spec.plane.axes == "authors" and 3 <= inner.sum() < len(xs):
        window = surface.loss[np.ix_(inner, inner)]
        inside = convexity.scores(xs[inner], xs[inner], window, zero_loss=zero_loss).to_json()
        inside.pop("definitions")
        measured["scores_paper_window"] = inside
    return measured


LANDSCAPE = Experiment("landscape", LandscapeSpec, landscape_experiment, figures.landscape, distributed=True)
