"""The plane of a landscape as a config says it, and what is measured on it: surfaces, raw and aligned, and scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from dualgap_jax import convexity, landscape, seeds
from dualgap_jax.config import ConfigError, require
from dualgap_jax.data import Dataset, standardise
from dualgap_jax.files import save_npz
from dualgap_jax.losses import Loss
from dualgap_jax.types import BranchSource, Network
from dualgap_jax.workdir import Workdir

_MAX_POINTS = 10_000  # along a side or an edge
# Names of a config for what is permuted, and by what it is compared; see `landscape.align`.
_ALIGNMENTS = {
    "branches": ("branches", "weights"),
    "units": ("units", "weights"),
    "activations": ("branches", "activations"),
}
PAPER_HALF_WIDTH = 0.6  # the window that Figure 1 shows, in the authors' axes
_MARGIN = 1.1  # of a window that grows, over the farthest coordinate of a solution


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
        whole and in their hidden units; 'units', the hidden units of all branches by weights, for one hidden layer;
        'activations', by activations, the units of all branches, or of deep networks branches and the units of each
        layer; see `landscape.align`.
      controls: whether the same is measured of networks permuted at random, by one another's permutations, and moved
        straight to the distances of the aligned ones; see `landscape.controls`.
      window: 'fixed', or 'solutions': the window grows, where it must, until all three solutions lie in it.
      hessian: eigenvalues at each end of the spectrum of the Hessian at solution 0, its trace and density; 0 is none.
        Like the next four it is of the raw solutions, over the examples of the surface.
      hessian_branches: the same of the diagonal block of each branch too.
      trajectory: how many snapshots of the path of solution 0 are kept at least, and the surface of their main plane
        drawn; 0 is none.
      curve: steps of training of a low curve from solution 0 to 1, in batches of the training's size; 0 is none.
      vtk: whether surfaces and solutions are written for ParaView too.
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
    controls: bool = False
    window: Literal["fixed", "solutions"] = "fixed"
    hessian: int = 0
    hessian_branches: bool = False
    trajectory: int = 0
    curve: int = 0
    vtk: bool = False

    def __post_init__(self) -> None:
        require(0 < self.half_width < math.inf, f"plane.half_width={self.half_width} must be positive.")
        for name in ("points", "edge_points"):
            value = getattr(self, name)
            require(3 <= value <= _MAX_POINTS, f"plane.{name}={value} must lie between 3 and {_MAX_POINTS:,}.")
        require(self.sample_chunk >= 1, f"plane.sample_chunk={self.sample_chunk} must be at least 1.")
        require(self.state_samples >= 1, f"plane.state_samples={self.state_samples} must be at least 1.")
        for name, none in {"samples": "all training examples", "hessian": "none", "curve": "none"}.items():
            value = getattr(self, name)
            require(value >= 0, f"plane.{name}={value} must be >= 0 (0: {none}).")
        require(
            not self.controls or self.align != "none",
            "plane.controls are of an alignment: set plane.align too, to branches, units or activations.",
        )
        require(
            self.trajectory == 0 or self.trajectory >= 3,
            f"plane.trajectory={self.trajectory} must be 0 (none) or at least 3 snapshots.",
        )


def inputs(dataset: Dataset, count: int) -> Any:
    """The first examples as the networks get them."""
    return standardise(dataset.x[:count], dataset.mean, dataset.std)


def _alignment(plane: PlaneSpec, net: Network, x: Any) -> tuple[str, str]:
    """What is permuted, and by what it is compared.  Raises ValueError where the network does not allow it."""
    over, by = _ALIGNMENTS[plane.align]
    known = landscape.exchangeable(net, x, over=over, by=by)
    return ("units" if plane.align == "activations" and len(known.groups) == 1 else over), by


def check_alignable(plane: PlaneSpec, net: Network, dataset: Dataset) -> None:
    """Raises ConfigError where the solutions could not be aligned as the spec wants it."""
    if plane.align == "none":
        return
    try:
        _alignment(plane, net, inputs(dataset, 32))
    except ValueError as error:
        raise ConfigError(
            f"plane.align={plane.align!r} does not fit this branch: {error} Take plane.align=branches or none."
        ) from None


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


def window(plane: PlaneSpec, anchors: np.ndarray) -> tuple[float, list[int]]:
    """Half the side of the window in plane coordinates, and which solutions lie outside it."""
    half = plane.half_width * (1.0 if plane.axes == "authors" else float(np.linalg.norm(anchors, axis=1).max()))
    farthest = np.abs(anchors).max(axis=1)
    if plane.window == "solutions":
        half = max(half, _MARGIN * float(farthest.max()))
    return half, np.flatnonzero(farthest > half).tolist()


def measure(
    spec: Any, workdir: Workdir, dataset: Dataset, net: Network, loss: Loss, networks: Sequence[BranchSource]
) -> dict[str, Any]:
    """Planes, surfaces and scores, raw and aligned as far as asked for; writes `results/landscape.npz`."""
    zero = jnp.zeros((len(dataset.y), dataset.num_outputs))
    at_zero = float(np.mean(np.asarray(loss.per_example(zero, jnp.asarray(dataset.y)), np.float64)))
    zero_loss = at_zero if 0 < at_zero < math.inf else None  # a loss of one's own may have none to compare with
    measured: dict[str, Any] = {"axes": spec.plane.axes, "state": None, "zero_loss": zero_loss}
    if landscape.has_statistics(networks[0].read(0, 1)[1]):
        examples = min(spec.plane.state_samples, len(dataset.y)) if spec.plane.state == "estimate" else None
        measured["state"] = {"how": spec.plane.state, "samples": examples}
    measured |= _surface(spec, workdir, dataset, net, loss, networks, "landscape", zero_loss)
    if spec.plane.align != "none":
        x = inputs(dataset, spec.plane.sample_chunk)
        over, by = _alignment(spec.plane, net, x)
        found = landscape.align(net, networks, x, over=over, by=by)
        aligned = _surface(spec, workdir, dataset, net, loss, found.networks, "aligned", zero_loss)
        aligned.pop("definitions")
        measured["aligned"] = {"over": over, "by": by, "distances": found.distances.tolist(), "blocks": found.blocks}
        measured["aligned"] |= aligned
        if spec.plane.controls:
            measured["controls"] = {}
            for name, others in landscape.controls(networks, found, seed=spec.seed)._asdict().items():
                control = _surface(spec, workdir, dataset, net, loss, others, f"control_{name}", zero_loss)
                control.pop("definitions")
                measured["controls"][name] = control
    return measured


def _surface(
    spec: Any,
    workdir: Workdir,
    dataset: Dataset,
    net: Network,
    loss: Loss,
    networks: Sequence[BranchSource],
    name: str,
    zero_loss: float | None,
) -> dict[str, Any]:
    """The surface over the plane through three networks, kept as `results/NAME.npz`, and its scores."""
    plane = landscape.plane_through(networks, spec.plane.axes)
    half, outside = window(spec.plane, plane.anchors)
    xs = half * np.linspace(-1, 1, spec.plane.points)
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
    measured |= {"half_width": half, "solutions_outside": outside}
    if spec.plane.vtk:
        landscape.save_vts(workdir.results / f"{name}.vts", surface)
        landscape.save_vtp(workdir.results / f"{name}_solutions.vtp", plane.anchors, edge_loss[:, 0], line=False)
    if spec.plane.points % 2:  # the mean of the three networks is a point of the grid
        centre = float(surface.loss[spec.plane.points // 2, spec.plane.points // 2])
        measured["centre_loss"] = centre if np.isfinite(centre) else None
    inner = np.abs(xs) <= PAPER_HALF_WIDTH + 1e-9
    if spec.plane.axes == "authors" and 3 <= inner.sum() < len(xs):
        shown = surface.loss[np.ix_(inner, inner)]
        inside = convexity.scores(xs[inner], xs[inner], shown, zero_loss=zero_loss).to_json()
        inside.pop("definitions")
        measured["scores_paper_window"] = inside
    return measured
