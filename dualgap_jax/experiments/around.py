"""What a landscape experiment finds out around its solutions besides the plane: spectrum, trajectory, curve."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualgap_jax import landscape
from dualgap_jax.checkpoints import load
from dualgap_jax.data import Dataset
from dualgap_jax.files import save_npz
from dualgap_jax.losses import Loss
from dualgap_jax.networks import InMemory, upcast
from dualgap_jax.training import Solution
from dualgap_jax.training.batches import example_input
from dualgap_jax.types import BranchSource, Network
from dualgap_jax.workdir import Workdir

_log = logging.getLogger(__name__)

_PROBES = 4  # random vectors for trace and density; a block of each branch has one
_BEYOND = 0.15  # of a trajectory's extent, on each side of its window


def _part(steps: int) -> str:
    """The name of a snapshot."""
    return f"snapshot {steps:09d}"


class Around:
    """What `plane.hessian`, `plane.trajectory` and `plane.curve` ask for.

    Args:
      spec: a `LandscapeSpec`.
      workdir: of the run; snapshots are parts of it.
      net, loss: as of the surface.
      training_set: where a curve is trained.
      dataset: the examples of the surface.
    """

    def __init__(
        self, spec: Any, workdir: Workdir, net: Network, loss: Loss, training_set: Dataset, dataset: Dataset
    ) -> None:
        self._spec, self._workdir, self._net, self._loss = spec, workdir, net, loss
        self._training_set, self._dataset = training_set, dataset

    def check_snapshots(self) -> None:
        """Sees to it that every snapshot up to the last checkpoint of solution 0 is there and sound.

        Where one is not, the checkpoints of solution 0 are deleted, so that its path is walked again from the start.
        """
        folder = self._workdir.checkpoints / "solution_0"
        try:
            steps = load(folder, place=lambda leaf, stored: None).step
        except FileNotFoundError:
            return
        if lost := [s for s in self._wanted(steps) if self._workdir.recall(_part(s)) is None]:
            said = ", ".join(map(str, lost))
            _log.warning("%s: snapshots of steps %s are damaged or gone: solution 0 is trained again", folder, said)
            shutil.rmtree(folder)

    def _wanted(self, steps: int) -> list[int]:
        """The steps whose snapshots are kept when solution 0 is at `steps`: at most twice as many as asked for."""
        stride = self._spec.training.check_every
        while steps // stride + 1 > 2 * self._spec.plane.trajectory:
            stride *= 2
        return list(range(0, steps + 1, stride))

    def snapshot(self, solution: int, steps: int, network: BranchSource) -> None:
        """Keeps a snapshot of solution 0; where they are twice as many as asked for, every other one goes."""
        wanted = self._wanted(steps)
        if solution or steps != wanted[-1]:
            return
        leaves = jax.tree.leaves(upcast(network.read(0, network.num_branches)))
        self._workdir.keep(_part(steps), {f"leaf_{k}": np.asarray(leaf) for k, leaf in enumerate(leaves)})
        for old in {*self._wanted(max(steps - 1, 0))} - {*wanted}:
            self._workdir.forget(_part(old))

    def measure(self, solutions: Sequence[Solution]) -> dict[str, Any]:
        """What is asked for, for the record of the landscape; writes `spectrum`, `trajectory` and `curve.npz`.

        What the solutions do not allow, a Hessian where the loss is infinite or the plane of a path of two points, ends
        no run: `left_out` says why it is missing.
        """
        record: dict[str, Any] = {}
        asked: dict[str, Callable[[], dict[str, Any]]] = {
            "hessian": lambda: self._hessian(solutions[0].network),
            "trajectory": lambda: self._trajectory(solutions[0]),
            "curve": lambda: self._curve(*(s.network for s in solutions[:2])),
        }
        for name, find in asked.items():
            if getattr(self._spec.plane, name):
                try:
                    record[name] = find()
                except ValueError as error:
                    record.setdefault("left_out", {})[name] = str(error)
        return record

    def _hessian(self, network: BranchSource) -> dict[str, Any]:
        spec = self._spec
        stored: dict[str, np.ndarray] = {}
        record: dict[str, Any] = {}
        kinds = ("network", "branches") if spec.plane.hessian_branches else ("network",)
        for kind in kinds:
            blocks = kind == "branches"
            found = landscape.hessian(
                self._net,
                self._loss,
                self._dataset,
                network,
                k=spec.plane.hessian,
                probes=1 if blocks else _PROBES,
                per_branch=blocks,
                batch_size=spec.plane.sample_chunk,
                seed=spec.seed,
            )
            arrays = {name: value for name, value in found._asdict().items() if isinstance(value, np.ndarray)}
            stored |= {f"{kind}_{name}": value for name, value in arrays.items()}
            said = {"size": found.size, "examples": found.examples, "converged": found.converged}
            if not blocks:
                said |= {name: arrays[name][0] for name in arrays if name not in ("nodes", "weights")}
            record[kind] = said
        save_npz(self._workdir.results / "spectrum.npz", **stored)
        return record

    def _read(self, steps: int) -> InMemory:
        shapes = jax.eval_shape(self._net.init, jax.random.key(0), example_input(self._dataset))
        stored = self._workdir.recall(_part(steps))
        if stored is None:
            raise FileNotFoundError(f"the snapshot of step {steps} in {self._workdir.path} is damaged or gone")
        leaves = [jnp.asarray(stored[f"leaf_{k}"]) for k in range(len(jax.tree.leaves(shapes)))]
        return InMemory(*jax.tree.unflatten(jax.tree.structure(shapes), leaves))

    def _trajectory(self, solution: Solution) -> dict[str, Any]:
        steps = [s for s in self._wanted(solution.steps) if s < solution.steps]
        end = InMemory(*(upcast(tree) for tree in solution.network.read(0, solution.network.num_branches)))
        found = landscape.trajectory([*map(self._read, steps), end])
        low, high = found.coordinates.min(0), found.coordinates.max(0)
        beyond = _BEYOND * (high - low)
        points = self._spec.plane.points
        xs, ys = (np.linspace(low[k] - beyond[k], high[k] + beyond[k], points) for k in range(2))
        grid = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)
        losses = self._losses(found.plane, np.concatenate([grid, found.coordinates]), "trajectory")
        surface = landscape.Surface(xs, ys, losses[: len(grid)].reshape(points, points))
        save_npz(
            self._workdir.results / "trajectory.npz",
            **surface._asdict(),
            coordinates=found.coordinates,
            path_loss=losses[len(grid) :],
            steps=np.asarray([*steps, solution.steps]),
        )
        if self._spec.plane.vtk:
            landscape.save_vts(self._workdir.results / "trajectory.vts", surface)
            landscape.save_vtp(self._workdir.results / "trajectory.vtp", found.coordinates, losses[len(grid) :])
        return {"explained": found.explained[:2], "snapshots": len(found.coordinates)}

    def _curve(self, start: BranchSource, end: BranchSource) -> dict[str, Any]:
        spec = self._spec
        found = landscape.curve(
            self._net,
            self._loss,
            self._training_set,
            start,
            end,
            steps=spec.plane.curve,
            batch_size=spec.training.batch_size,
            points=2 * spec.plane.edge_points - 1,
            seed=spec.seed,
            measured=self._dataset,
            **self._options(),
        )
        arrays = {name: value for name, value in found._asdict().items() if isinstance(value, np.ndarray)}
        save_npz(self._workdir.results / "curve.npz", **arrays)
        return {"steps": spec.plane.curve, "barrier": found.barrier, "straight_barrier": found.straight_barrier}

    def _options(self) -> dict[str, Any]:
        plane = self._spec.plane
        return {name: getattr(plane, name) for name in ("sample_chunk", "route", "state", "state_samples")}

    def _losses(self, plane: landscape.Plane, points: np.ndarray, label: str) -> np.ndarray:
        return landscape.evaluate_points(
            self._net,
            self._loss,
            self._dataset,
            plane,
            points,
            label=label,
            partial=self._workdir.results / f"{label}.partial.npz",
            **self._options(),
        )
