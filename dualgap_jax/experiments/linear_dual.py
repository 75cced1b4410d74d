"""Theorem 2 on data: the certified optimum of a deep linear network, and SGD on the same network from many seeds."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from jax import Array, lax

from dualgap_jax import figures, seeds
from dualgap_jax.checkpoints import Checkpointer
from dualgap_jax.checkpoints import load as load_checkpoint
from dualgap_jax.config import Component, ConfigError, require
from dualgap_jax.experiments.base import Experiment, Report, Tables, confirm_data
from dualgap_jax.files import save_json, save_npz
from dualgap_jax.metrics import Progress
from dualgap_jax.registry import Table, unknown
from dualgap_jax.spectral import DualVariable, SpectralSolution, in_blocks, random_weights, solve_columns
from dualgap_jax.types import KeyArray
from dualgap_jax.workdir import Workdir

DEFINITIONS = {
    "primal": "problem (4) at the weights, in float64: an upper bound of the optimum (certified up to rounding)",
    "dual": "problem (5) at the dual variable, in float64, less an allowance for the error of the projection of Y onto"
    " the row space of X: a lower bound of the optimum (certified up to rounding and that allowance)",
    "relative_gap": "(primal - dual) / (1/2 ||Y||_F^2), the objective at zero weights",
    "rank": "number of singular values that the optimal network keeps",
    "sigma_min": "smallest singular value of Y X^+ X that is not numerically zero",
    "theorem_applies": "0 <= gamma < sigma_min and d_min <= min(d_0, d_H, n); the certificate holds either way",
    "precision": "of the data and the factorisation; the certificate is evaluated in float64",
    "gap": "(objective of (4) at the weights of SGD - dual) / (1/2 ||Y||_F^2)",
}


@dataclasses.dataclass(frozen=True)
class DescentSpec:
    """SGD with heavy-ball momentum and a cosine schedule on problem (4).

    The misfit is estimated from a mini-batch, scaled to all columns; the regulariser is exact.  X is divided by its
    largest singular value first, which changes W_1 by that factor and nothing else.

    Attributes:
      depths: the H that are trained; the optimum is the same for all of them.
      seeds: runs for each depth.
      steps: of each run.
      batch_size: columns a step, drawn with replacement.
      learning_rate: in units of the inverse of the curvature at the optimum, `H sigma_1(Yt)^{2 (H - 1) / H}`, times
        `1 + n max ||x_i||^2 / (batch_size sigma_1(X)^2)`, by how much a mini-batch may exceed it.
      momentum: in [0, 1).
      record_every: steps between two evaluations of the objective.
    """

    depths: tuple[int, ...] = (2, 3, 5)
    seeds: int = 5
    steps: int = 5000
    batch_size: int = 256
    learning_rate: float = 0.5
    momentum: float = 0.9
    record_every: int = 50

    def __post_init__(self) -> None:
        require(
            all(2 <= h <= 1000 for h in self.depths),
            f"sgd.depths={self.depths}: a depth H must lie between 2 and 1,000.",
        )
        require(len(set(self.depths)) == len(self.depths), f"sgd.depths={self.depths} names a depth twice.")
        require(self.seeds >= 1, f"sgd.seeds={self.seeds} must be at least 1.")
        require(self.batch_size >= 1, f"sgd.batch_size={self.batch_size} must be at least 1.")
        require(1 <= self.record_every <= self.steps, "sgd.record_every must lie between 1 and sgd.steps.")
        require(self.steps % self.record_every == 0, "sgd.steps must be a multiple of sgd.record_every.")
        require(0 < self.learning_rate < math.inf, f"sgd.learning_rate={self.learning_rate} must be positive.")
        require(0 <= self.momentum < 1, f"sgd.momentum={self.momentum} must lie in [0, 1).")


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


# --- SGD ------------------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """What problem (4) needs of the data: `X X^T`, `Y X^T` and `||Y||_F^2`, in float64."""

    xx: np.ndarray
    yx: np.ndarray
    yy: float


def moments(x: np.ndarray, y: np.ndarray, block: int = 4096) -> Moments:
    """The second moments, block by block."""
    xx, yx = np.zeros((len(x), len(x))), np.zeros((len(y), len(x)))
    for first in range(0, x.shape[1], block):
        a, b = (m[:, first : first + block].astype(np.float64) for m in (x, y))
        xx += a @ a.T
        yx += b @ a.T
    return Moments(xx, yx, float(np.sum(np.square(y, dtype=np.float64))))


def objective(weights: list[np.ndarray], data: Moments, gamma: float) -> float:
    """Problem (4) in float64 from second moments.

    Equal to `spectral.objective` up to rounding of `||Y||_F^2`.  Singular values of `W_1 X` below 1e-8 of the largest
    are lost in its Gram matrix; their powers do not count in the sum.  NaN for weights that are not finite.
    """
    depth = len(weights)
    if not all(np.isfinite(w).all() for w in weights):
        return math.nan
    exact = [np.asarray(w, np.float64) for w in weights]
    whole = functools.reduce(lambda done, layer: layer @ done, exact)
    misfit = 0.5 * data.yy - np.sum(whole * data.yx) + 0.5 * np.sum((whole @ data.xx) * whole)
    first = np.sqrt(np.maximum(np.linalg.eigvalsh(exact[0] @ data.xx @ exact[0].T), 0))
    powers = [first, *(np.linalg.svd(w, compute_uv=False) for w in exact[1:])]
    return float(misfit + gamma / depth * sum(np.sum(p**depth) for p in powers))


class Descent(NamedTuple):
    """SGD on problem (4) for one depth.

    Attributes:
      steps: `[k]`, where the objective was evaluated.
      objective: `[seeds, k]`, float64.
    """

    steps: np.ndarray
    objective: np.ndarray


def _penalty_gradients(weights: tuple[Array, ...], xx: Array) -> tuple[Array, ...]:
    """Gradients of `1/H (||W_1 X||_{S_H}^H + sum ||W_i||_{S_H}^H)`, through `(M M^T)^{(H-2)/2} M`."""
    depth = len(weights)

    def one(gram: Array, image: Array) -> Array:
        if depth == 2:
            return image
        values, vectors = jnp.linalg.eigh(gram)
        power = jnp.maximum(values, 0) ** ((depth - 2) / 2)
        return (vectors * power[None, :]) @ (vectors.T @ image)

    image = weights[0] @ xx
    return one(image @ weights[0].T, image), *(one(w @ w.T, w) for w in weights[1:])


def descend(
    data: Matrices, known: Moments, spec: LinearDualSpec, depth: int, curvature: float, progress: Progress, done: int
) -> Descent:
    """Trains one depth from every seed in one program; see `DescentSpec`.

    Args:
      data, known: the data and their moments.
      spec: of the experiment.
      depth: H.
      curvature: `sigma_1(Yt)`, the unit of the learning rate.
      progress, done: the line on the terminal, and the steps done before.
    """
    sgd, n = spec.sgd, data.x.shape[1]
    start = np.ones(len(known.xx))
    largest = scipy.sparse.linalg.eigsh(known.xx, 1, v0=start, tol=1e-3, return_eigenvectors=False)
    scale = math.sqrt(float(largest[0]))
    sizes = (data.x.shape[0], *([spec.width] * (depth - 1)), data.y.shape[0])
    x, y = jnp.asarray(data.x.T / scale, jnp.float32), jnp.asarray(data.y.T, jnp.float32)
    xx = jnp.asarray(known.xx / scale**2, jnp.float32)
    longest = float(np.max(np.sum(np.square(data.x), axis=0, dtype=np.float64)))
    excess = 1 + n * longest / (sgd.batch_size * scale**2)
    rate = sgd.learning_rate / (depth * max(curvature, 1e-30) ** (2 * (depth - 1) / depth) * excess)

    def step(carry: tuple[Any, Any], at: tuple[Array, KeyArray], x: Array, y: Array, xx: Array) -> tuple[Any, None]:
        weights, velocity = carry
        now, key = at
        picked = jax.random.randint(jax.random.fold_in(key, now), (sgd.batch_size,), 0, n)
        x_batch, y_batch = x[picked], y[picked]

        def misfit(weights: tuple[Array, ...]) -> Array:
            fitted = functools.reduce(lambda done, layer: done @ layer.T, weights, x_batch)
            return 0.5 * n / sgd.batch_size * jnp.sum((y_batch - fitted) ** 2)

        gradients = jax.grad(misfit)(weights)
        penalties = _penalty_gradients(weights, xx)
        velocity = tuple(
            sgd.momentum * v + g + spec.gamma * p for v, g, p in zip(velocity, gradients, penalties, strict=True)
        )
        factor = rate * 0.5 * (1 + jnp.cos(jnp.pi * now / sgd.steps))
        return (tuple(w - factor * v for w, v in zip(weights, velocity, strict=True)), velocity), None

    @functools.partial(jax.jit, donate_argnums=0)
    def segment(carry: Any, keys: Array, first: Array, x: Array, y: Array, xx: Array) -> Any:
        nows = first + jnp.arange(sgd.record_every)

        def one(carry: Any, key: KeyArray) -> Any:
            return lax.scan(lambda c, now: step(c, (now, key), x, y, xx), carry, nows)[0]

        return jax.vmap(one)(carry, keys)

    root = jax.random.fold_in(seeds.key(spec.seed), depth)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(root, i)))(jnp.arange(sgd.seeds))
    weights = jax.vmap(lambda key: random_weights(key, sizes, dtype=jnp.float32))(keys[:, 0])
    carry = (weights, jax.tree.map(jnp.zeros_like, weights))
    values = []
    for first in range(0, sgd.steps + 1, sgd.record_every):
        host = [np.asarray(w, np.float64) for w in carry[0]]
        host[0] = host[0] / scale
        values.append([objective([w[i] for w in host], known, spec.gamma) for i in range(sgd.seeds)])
        progress.update(done + first, f"SGD, H = {depth}: objective {np.median(values[-1]):.6g}")
        if first < sgd.steps:
            carry = segment(carry, keys[:, 1], jnp.asarray(first), x, y, xx)
    return Descent(np.arange(0, sgd.steps + 1, sgd.record_every), np.asarray(values).T)


# --- the experiment -------------------------------------------------------------------------------------------------


def linear_dual_experiment(spec: LinearDualSpec, workdir: Workdir, tables: Tables) -> Report:
    """The certified global optimum of a deep linear network, and SGD on the same network (Theorem 2)."""
    data = matrices(spec, tables)
    x, y, info = data
    confirm_data(workdir, x, y, info=info)
    widths = (spec.width,) * (spec.depth - 1)
    found = solve_columns(
        in_blocks(x, y, spec.block_size or None),
        gamma=spec.gamma,
        widths=widths,
        factorization=spec.factorization,
        tolerance=spec.tolerance,
    )
    solution = found.solution
    with Checkpointer(workdir.checkpoints / "solution") as saver:
        saver.save(0, solution._asdict(), {"factorization": found.factorization, "widths": list(widths)})
    half_norm = 0.5 * float(np.sum(np.square(y, dtype=np.float64)))
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
                return descend(data, known(), spec, depth, curvature, progress, done)

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
    size = record["sizes"]
    tried = ", ".join(f"{a['factorization']}: {a['reason']}" for a in record["attempts"])
    notes = [
        f"X {size['d_0']} x {size['n']}, Y {size['d_H']} x {size['n']}, H = {spec.depth}, widths {size['widths']},"
        f" gamma = {spec.gamma:g}, sigma_min = {record['sigma_min']:.6g}.",
        "Theorem 2 applies."
        if record["theorem_applies"]
        else f"Theorem 2 does not apply ({'; '.join(record['reasons'])}); the certificate holds all the same.",
        f"Factorisation, {record['precision']}: {tried}. Certificate: float64, up to rounding.",
        "Lowest and highest: dual and primal value of the optimum; smallest and largest last objective of SGD.  Gap: to"
        " the dual value, relative to the objective at zero weights (SGD: median over seeds).",
        "A dash: a run of SGD diverged; lower --config.sgd.learning_rate." if diverged else "",
        f"SGD went BELOW the certified optimum in {len(below)} runs: a defect." if below else "",
    ]
    columns = ["", "runs", "lowest", "highest", "relative gap", "rank"]
    return Report(spec.title, columns, rows, [note for note in notes if note])


def _finite(value: Any) -> float | None:
    """The number, or None for a run that diverged."""
    return float(value) if np.isfinite(value) else None


def load_solution(path: str | Path) -> SpectralSolution:
    """The solution that an experiment saved, from the path of its workdir (or of the checkpoint folder) alone.

    Raises:
      FileNotFoundError: if there is no sound checkpoint.
    """
    folder = Path(path)
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
