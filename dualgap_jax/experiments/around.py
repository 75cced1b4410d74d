"""What a landscape experiment finds out around its solutions besides the plane: spectrum, trajectory, curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualgap_jax import landscape
from dualgap_jax.data import Dataset
from dualgap_jax.files import load_npz, save_npz
from dualgap_jax.losses import Loss
from dualgap_jax.networks import InMemory, upcast
from dualgap_jax.training import Solution
from dualgap_jax.training.batches import example_input
from dualgap_jax.types import BranchSource, Network
from dualgap_jax.workdir import Workdir

_PROBES = 4  # random vectors for trace and density; a block of each branch has one
_BEYOND = 0.15  # of a trajectory's extent, on each side of its window


class Around:
    """What `plane.hessian`, `plane.trajectory` and `plane.curve` ask for.

    Args:
      spec: a `LandscapeSpec`.
      workdir: of the run; snapshots are kept in its folder `snapshots`.
      net, loss: as of the surface.
      training_set: where a curve is trained.
      dataset: the examples of the surface.
    """

    def __init__(
        self, spec: Any, workdir: Workdir, net: Network, loss: Loss, training_set: Dataset, dataset: Dataset
    ) -> None:
        self._spec, self._workdir, self._net, self._loss = spec, workdir, net, loss
        self._training_set, self._dataset = training_set, dataset
        self._folder = workdir.path / "snapshots"

    def snapshot(self, solution: int, steps: int, network: BranchSource) -> None:
        """Keeps a snapshot of solution 0; where they are twice as many as asked for, every other one goes."""
        kept = self._kept()
        stride = min(np.diff(kept).tolist(), default=self._spec.training.check_every)
        if solution or steps % stride or not self._workdir.writes:
            return
        leaves = jax.tree.leaves(upcast(network.read(0, network.num_branches)))
        save_npz(self._file(steps), **{f"leaf_{k}": np.asarray(leaf) for k, leaf in enumerate(leaves)})
        kept = self._kept()
        if len(kept) > 2 * self._spec.plane.trajectory:
            for old in kept:
                if old % (2 * stride):
                    self._file(old).unlink()

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

    def _file(self, steps: int) -> Path:
        return self._folder / f"{steps:09d}.npz"

    def _kept(self) -> list[int]:
        return sorted(int(path.stem) for path in self._folder.glob("[0-9]*.npz"))

    def _read(self, steps: int) -> InMemory:
        shapes = jax.eval_shape(self._net.init, jax.random.key(0), example_input(self._dataset))
        stored = load_npz(self._file(steps))
        leaves = [jnp.asarray(stored[f"leaf_{k}"]) for k in range(len(jax.tree.leaves(shapes)))]
        return InMemory(*jax.tree.unflatten(jax.tree.structure(shapes), leaves))

    def _trajectory(self, solution: Solution) -> dict[str, Any]:
        steps = [s for s in self._kept() if s < solution.steps]
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
