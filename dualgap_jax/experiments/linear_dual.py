"""Theorem 2 on data: the certified optimum of a deep linear network, and SGD on the same network from many seeds."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dualgap_jax import figures, seeds
from dualgap_jax.checkpoints import Checkpointer
from dualgap_jax.checkpoints import load as load_checkpoint
from dualgap_jax.config import Component, ConfigError, require
from dualgap_jax.experiments.base import Experiment, Report, Tables, confirm_data
from dualgap_jax.files import local_path, save_json, save_npz
from dualgap_jax.registry import Table, unknown
from dualgap_jax.spectral import CertificateError, DualVariable, SpectralSolution, in_blocks, solve_columns, verify
from dualgap_jax.spectral.descent import Descent, DescentSpec, moments, stochastic_descent
from dualgap_jax.terminal import Progress, digits
from dualgap_jax.workdir import Workdir

DEFINITIONS = {
    "primal": "problem (4) at the weights, in float64: an upper bound of the optimum (certified up to rounding)",
    "dual": "problem (5) at the dual variable, in float64, less an allowance for the error of the projection of Y onto"
    " the row space of X: a lower bound of the optimum (certified up to rounding and that allowance)",
    "relative_gap": "(primal - dual) / (1/2 ||Y||_F^2), the objective at zero weights",
    "verified": "lower and upper bound of the optimum proven again by an independent program, with an allowance for"
    " every rounding; relative_gap as above; unresolved directions of X are charged to the lower bound",
    "rank": "number of singular values that the optimal network keeps",
    "sigma_min": "smallest singular value of Y X^+ X that is not numerically zero",
    "theorem_applies": "0 <= gamma < sigma_min and d_min <= min(d_0, d_H, n); the certificate holds either way",
    "precision": "of the data and the factorisation; the certificate is evaluated in float64",
    "gap": "(objective of (4) at the weights of SGD - dual) / (1/2 ||Y||_F^2)",
}


@dataclasses.dataclass(frozen=True)
class LinearDualSpec:
    """One deep linear network.

    Attributes:
      title: head of the figure.
      data: 'random', or an entry of the table of data sets: X is its standardised features, Y its centred one-hot
        labels (multiclass) or its targets (one row).
      depth: H.
      width: of every hidden layer, so that d_min = width.
      gamma: regularisation, in the unit of the singular values of Y.
      factorization, tolerance: see `spectral.solve_columns`.
      block_size: columns at a time; 0 is all at once.
      seed: of the SGD runs.
      sgd: how the same network is trained.
    """

    title: str = "A deep linear network"
    data: Component = Component("random", {})
    depth: int = 3
    width: int = 10
    gamma: float = 1.0
    factorization: Literal["auto", "gram", "qr"] = "auto"
    tolerance: float = 1e-6
    block_size: int = 0
    seed: int = 0
    sgd: DescentSpec = DescentSpec()

    def __post_init__(self) -> None:
        seeds.check(self.seed)
        require(
            2 <= self.depth <= 1000,
            f"depth={self.depth} must lie between 2 and 1,000 (H layers, H - 1 hidden).",
        )
        require(1 <= self.width <= 100_000, f"width={self.width} must lie between 1 and 100,000.")
        require(0 <= self.gamma < math.inf, f"gamma={self.gamma} must be finite and at least 0.")
        require(0 < self.tolerance < 1, f"tolerance={self.tolerance} must lie between 0 and 1.")
        require(self.block_size >= 0, f"block_size={self.block_size} must be at least 0 (0: all columns at once).")

    def validate(self, tables: Tables) -> None:
        """Raises UnknownNameError or SettingError for data that are not in a table, or settings that they lack."""
        _data_table(self.data.name, tables).check(self.data.name, **self.data.settings)


# --- data -----------------------------------------------------------------------------------------------------------


class Matrices(NamedTuple):
    """X `[d_0, n]` and Y `[d_H, n]`, float32 or float64, and facts about them."""

    x: np.ndarray
    y: np.ndarray
    info: dict[str, Any]


def random_matrices(
    *, d_0: int = 30, d_H: int = 10, n: int = 500, condition: float = 10.0, noise: float = 0.1, seed: int = 0
) -> Matrices:
    """`Y = T X + noise` with Gaussian T and X, float64.

    The rows of X are scaled to a condition number near `condition`; Y has singular values of the order of `sqrt(n)` to
    `sqrt(n) / condition`.
    """
    require(min(d_0, d_H, n) >= 1, f"random data: d_0={d_0}, d_H={d_H}, n={n} must be at least 1.")
    require(condition >= 1 and noise >= 0, f"random data: condition={condition} >= 1 and noise={noise} >= 0.")
    rng = seeds.generator(seed)
    x = np.geomspace(1, 1 / condition, d_0)[:, None] * rng.standard_normal((d_0, n))
    y = rng.standard_normal((d_H, d_0)) @ x / math.sqrt(d_0) + noise * rng.standard_normal((d_H, n))
    return Matrices(x, y, {"name": "random"})


MATRICES: Table[Callable[..., Matrices]] = Table("data", {"random": random_matrices})


def _data_table(name: str, tables: Tables) -> Table[Callable[..., Any]]:
    for table in (MATRICES, tables.datasets):
        if name in table:
            return table
    raise ConfigError(unknown("data", name, [*MATRICES, *tables.datasets]))


def matrices(spec: LinearDualSpec, tables: Tables) -> Matrices:
    """The data of a spec."""
    found = _data_table(spec.data.name, tables).build(spec.data.name, **spec.data.settings)
    if isinstance(found, Matrices):
        return found
    n = len(found.y)
    rows = (found.x.reshape(n, -1) - np.ravel(np.broadcast_to(found.mean, found.x.shape[1:]))).astype(np.float32)
    rows /= np.ravel(np.broadcast_to(found.std, found.x.shape[1:]))
    if found.task == "multiclass":
        targets = np.eye(found.num_outputs)[:, found.y]
        targets -= targets.mean(axis=1, keepdims=True)
    else:
        targets = np.asarray(found.y, np.float64)[None, :]
    return Matrices(rows.T, targets.astype(np.float32), found.info)


# --- the experiment -------------------------------------------------------------------------------------------------


def linear_dual_experiment(spec: LinearDualSpec, workdir: Workdir, tables: Tables) -> Report:
    """The certified global optimum of a deep linear network, and SGD on the same network (Theorem 2)."""
    data = matrices(spec, tables)
    x, y, info = data
    confirm_data(workdir, x, y, info=info)
    require(bool(y.any()), "all targets are 0, as those of examples of one class are once centred: nothing to fit.")
    widths = (spec.width,) * (spec.depth - 1)
    columns = in_blocks(x, y, spec.block_size or None)
    with Progress(x.shape[1], "Theorem 2, examples") as progress:
        found = solve_columns(
            columns,
            gamma=spec.gamma,
            widths=widths,
            factorization=spec.factorization,
            tolerance=spec.tolerance,
            report=lambda what, done: progress.update(done, what),
        )
        solution = found.solution
        progress.update(0, "independent proof")
        proven = verify(
            columns,
            gamma=spec.gamma,
            widths=widths,
            weights=solution.weights,
            coefficients=solution.dual_variable.coefficients,
            dependencies=found.dependencies,
        )
    half_norm = 0.5 * float(np.sum(np.square(y, dtype=np.float64)))
    if not proven.lower - 1e-13 * half_norm <= solution.primal or not solution.dual <= proven.upper + 1e-13 * half_norm:
        raise CertificateError(
            f"the solver claims an optimum in [{solution.dual!r}, {solution.primal!r}], and an independent program"
            f" proves it to lie in [{proven.lower!r}, {proven.upper!r}]: one of them is wrong; please report this.",
            found.attempts,
            found,
        )
    with Checkpointer(workdir.checkpoints / "solution") as saver:
        saver.save(0, solution._asdict(), {"factorization": found.factorization, "widths": list(widths)})
    record: dict[str, Any] = {
        "title": spec.title,
        "data": info,
        "sizes": {"d_0": x.shape[0], "d_H": y.shape[0], "n": x.shape[1], "widths": list(widths)},
        "primal": float(solution.primal),
        "dual": float(solution.dual),
        "relative_gap": float(solution.relative_gap),
        "rank": int(solution.rank),
        "gamma": spec.gamma,
        "sigma_min": float(solution.sigma_min),
        "theorem_applies": bool(solution.theorem_applies),
        "reasons": list(solution.reasons()),
        "precision": found.precision,
        "factorization": found.factorization,
        "verified": proven._asdict(),
        "projection_error": found.projection_error,
        "attempts": [a._asdict() for a in found.attempts],
        "half_norm": half_norm,
        "definitions": DEFINITIONS,
    }
    save_json(workdir.results / "optimum.json", record)
    curves = _curves(spec, workdir, data, float(solution.singular_values[0])) if spec.sgd.depths else {}
    record["sgd"] = [
        {
            "depth": depth,
            "seed": seed,
            "objective": float(line[-1]),
            "lowest": float(np.nanmin(line)),
            "gap": float(line[-1] - record["dual"]) / half_norm,
        }
        for depth, curve in curves.items()
        for seed, line in enumerate(curve.objective)
    ]
    arrays = {"singular_values": np.asarray(solution.singular_values)}
    for depth, curve in curves.items():
        arrays |= {f"steps_{depth}": curve.steps, f"objective_{depth}": curve.objective}
    save_npz(workdir.results / "spectral.npz", **arrays)
    save_json(workdir.results / "spectral.json", record)
    return _report(spec, record)


def _curves(spec: LinearDualSpec, workdir: Workdir, data: Matrices, curvature: float) -> dict[int, Descent]:
    """The SGD curves of every depth; a depth that was finished before is read again."""
    known = functools.cache(lambda: moments(data.x, data.y))
    curves: dict[int, Descent] = {}
    with Progress(spec.sgd.steps * len(spec.sgd.depths), "SGD") as progress:
        for index, depth in enumerate(spec.sgd.depths):

            def trained(depth: int = depth, done: int = index * spec.sgd.steps) -> Descent:
                def report(step: int, objective: float) -> None:
                    progress.update(done + step, f"SGD, H = {depth}: objective {objective:.6g}")

                return stochastic_descent(
                    data.x,
                    data.y,
                    known(),
                    spec.sgd,
                    depth=depth,
                    width=spec.width,
                    gamma=spec.gamma,
                    curvature=curvature,
                    seed=spec.seed,
                    report=report,
                )

            curves[depth] = Descent(**workdir.remember(f"SGD, H = {depth}", trained))
    return curves


def _report(spec: LinearDualSpec, record: dict[str, Any]) -> Report:
    rows: list[list[Any]] = [
        ["certified optimum", None, record["dual"], record["primal"], record["relative_gap"], record["rank"]]
    ]
    for depth in spec.sgd.depths:
        runs = [run for run in record["sgd"] if run["depth"] == depth]
        ends = [run["objective"] for run in runs]
        low, high, gap = np.min(ends), np.max(ends), np.median([r["gap"] for r in runs])
        rows.append([f"SGD, H = {depth}", len(runs), *(_finite(v) for v in (low, high, gap)), None])
    diverged = any(not np.isfinite(r["objective"]) for r in record["sgd"])
    below = [r for r in record["sgd"] if r["lowest"] < record["dual"]]
    size, verified = record["sizes"], record["verified"]
    tried = ", ".join(f"{a['factorization']}: {a['reason']}" for a in record["attempts"])
    notes = [
        f"X {size['d_0']} x {size['n']}, Y {size['d_H']} x {size['n']}, H = {spec.depth}, widths {size['widths']},"
        f" gamma = {spec.gamma:g}, sigma_min = {record['sigma_min']:.6g}.",
        "Theorem 2 applies."
        if record["theorem_applies"]
        else f"Theorem 2 does not apply ({'; '.join(record['reasons'])}); the certificate holds all the same.",
        f"Factorisation, {record['precision']}: {tried}. Certificate: float64, up to rounding.",
        f"Proven independently, all rounding included: {verified['lower']!r} <= optimum <= {verified['upper']!r},"
        f" relative gap {digits(verified['relative_gap'], 2, 'upper')}.",
        "Lowest and highest: dual and primal value of the optimum; smallest and largest last objective of SGD.  Gap: to"
        " the dual value, relative to the objective at zero weights (SGD: median over seeds).",
        "A dash: a run of SGD diverged; lower --config.sgd.learning_rate." if diverged else "",
        f"SGD went BELOW the certified optimum in {len(below)} runs: a defect." if below else "",
    ]
    columns = ["", "runs", "lowest", "highest", "relative gap", "rank"]
    bounds = {"lowest": "lower", "highest": "upper", "relative gap": "upper"}
    return Report(spec.title, columns, rows, [note for note in notes if note], bounds)


def _finite(value: Any) -> float | None:
    """The number, or None for a run that diverged."""
    return float(value) if np.isfinite(value) else None


def load_solution(path: str | Path) -> SpectralSolution:
    """The solution that an experiment saved, from the path of its workdir (or of the checkpoint folder) alone.

    Raises:
      FileNotFoundError: if there is no sound checkpoint.
    """
    folder = local_path(path, "the work folder")
    nested = folder / "checkpoints" / "solution"
    state = load_checkpoint(nested if nested.is_dir() else folder).state
    weights = state.pop("weights")
    return SpectralSolution(
        weights=tuple(weights[str(i)] for i in range(len(weights))),
        dual_variable=DualVariable(state.pop("dual_variable")["coefficients"]),
        **state,
    )


def smoke(spec: LinearDualSpec) -> LinearDualSpec:
    """The same in seconds: fewer examples, fewer steps, two depths."""
    settings = dict(spec.data.settings)
    if spec.data.name != "random":
        settings["num_examples"] = 256
    return dataclasses.replace(
        spec,
        data=Component(spec.data.name, settings),
        sgd=dataclasses.replace(
            spec.sgd, depths=spec.sgd.depths[:2], seeds=2, steps=40, record_every=20, batch_size=32
        ),
    )


LINEAR_DUAL = Experiment("linear_dual", LinearDualSpec, linear_dual_experiment, figures.spectral)
