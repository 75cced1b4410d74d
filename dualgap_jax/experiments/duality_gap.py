"""Theorem 1 on one data set: the duality gap for every number of branches, the bound 2/I, and what SGD reaches."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dualgap_jax import figures, seeds
from dualgap_jax.config import Component, require
from dualgap_jax.data import Dataset
from dualgap_jax.duality import deltas, population
from dualgap_jax.duality.allocation import Allocation
from dualgap_jax.duality.branch_and_bound import BoundSpec
from dualgap_jax.duality.checker.closed_forms import verify_margin
from dualgap_jax.duality.margins import CONTRACTIONS
from dualgap_jax.duality.problem import Problem, branch_problem
from dualgap_jax.duality.risk import Risk, primal_risk
from dualgap_jax.duality.search import SearchSpec
from dualgap_jax.duality.theorem import HOMOGENEOUS, Effort, Route, find_delta, value_function
from dualgap_jax.duality.trained import TrainedSpec, train_constrained
from dualgap_jax.duality.values import ValueFunction
from dualgap_jax.duality.verdict import Instance, verdicts
from dualgap_jax.experiments.base import Experiment, Report, Tables, confirm_data
from dualgap_jax.experiments.duality_mixed import mixed_arrays, mixed_record, mixed_rows
from dualgap_jax.experiments.duality_proofs import hinge_rows, proven_rows
from dualgap_jax.experiments.duality_report import curve, dual_curve, report
from dualgap_jax.experiments.duality_samples import samples
from dualgap_jax.files import save_json, save_npz
from dualgap_jax.losses import Loss
from dualgap_jax.networks import mlp_output_bound
from dualgap_jax.terminal import Progress
from dualgap_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class DualityGapSpec:
    """Theorem 1 on one data set.

    Attributes:
      title: head of the figure.
      branch: f_i, an entry of the branch table; the number of outputs comes from the data.
      second: another kind of branch, and `second_share` the share of the I branches that are of it; 0: all are alike.
      data: an entry of the data table.
      tau: margin scale; 0 takes 1.01 times the proven bound on the margins over W, so that Assumption 1 holds.
      radius: W is the ball `||w|| <= radius`.
      power: `h(w) = ||w||^power`.
      budget_share: K as a share of the largest h over W; it is moved to the nearest point of the grid.
      num_branches: the values of I.
      grid: points of the grid of budgets.
      route: 'closed_form' (bias-free mlp, positively homogeneous activation), 'bound' (branch and bound), 'search', or
        'auto': the first of them that applies, 'bound' up to 4 parameters.
      search: how hard to search.
      bound: for the value function; `dual_bound`: for Q at the multiplier, which decides up to which I the theorem can
        be verified; its tolerance is lowered where the largest I needs it.
      fresh_samples: fresh samples of the size of the data set, for the population; 0 for none.
      trained: networks trained against inf(P).
      seed: of searches and training.
    """

    title: str = "Duality gap of Theorem 1"
    branch: Component = Component("mlp", {"hidden": (1, 1), "use_bias": False})
    second: Component = Component("mlp", {"hidden": (1,), "use_bias": False})
    second_share: float = 0.0
    data: Component = Component("synthetic_relu", {"n": 500, "d": 2, "seed": 1})
    tau: float = 0.0
    radius: float = 2.0
    power: float = 2.0
    budget_share: float = 0.381966
    num_branches: tuple[int, ...] = (1, 2, 3, 5, 10, 30, 100, 1000, 10_000, 100_000)
    grid: int = 4097
    route: Route = "auto"
    search: SearchSpec = SearchSpec()
    bound: BoundSpec = BoundSpec(1e-3, 300_000)
    dual_bound: BoundSpec = BoundSpec(1e-8, 300_000)
    fresh_samples: int = 0
    trained: TrainedSpec = TrainedSpec()
    seed: int = 0

    def __post_init__(self) -> None:
        seeds.check(self.seed)
        require(0 <= self.tau < math.inf, f"tau={self.tau} must be >= 0 (0: from the bound on the margins).")
        require(0 < self.radius < math.inf, f"radius={self.radius} must be positive.")
        require(1 <= self.power < math.inf, f"power={self.power} must be at least 1.")
        require(0 < self.budget_share <= 1, f"budget_share={self.budget_share} must lie in (0, 1].")
        require(len(self.num_branches) > 0, "num_branches is empty; give at least one, as in I=1/10/100.")
        require(all(n >= 1 for n in self.num_branches), f"num_branches={self.num_branches} must be positive integers.")
        for name, counts in (("", self.num_branches), ("trained.", self.trained.num_branches)):
            require(len(set(counts)) == len(counts), f"{name}num_branches={counts} names one twice.")
        require(3 <= self.grid <= 2**20, f"grid={self.grid} must lie between 3 and {2**20:,}.")
        require(0 <= self.second_share <= 1, f"second_share={self.second_share} must lie in [0, 1].")
        alike = self.second_share == 0 or (self.fresh_samples == 0 and not self.trained.num_branches)
        require(alike, "two kinds of branches take neither fresh_samples nor trained.num_branches; give 0 and ().")
        require(self.fresh_samples >= 0, f"fresh_samples={self.fresh_samples} must be >= 0.")
        require(self.fresh_samples != 1, "fresh_samples=1 gives no confidence interval; give 0, or 2 or more.")

    def validate(self, tables: Tables) -> None:
        """Looks every name and setting up, so that a bad config fails before anything is written or read."""
        tables.branches.build(self.branch.name, **{**self.branch.settings, "out": 1})
        tables.datasets.check(self.data.name, **self.data.settings)
        known = output_bound_known(self.branch)
        if self.second_share > 0:
            tables.branches.build(self.second.name, **{**self.second.settings, "out": 1})
            known &= output_bound_known(self.second)
        require(self.tau > 0 or known, "tau=0 needs a proven bound on the margins (a bias-free mlp); give tau.")
        homogeneous = is_homogeneous(self.branch)
        require(
            homogeneous or self.route != "closed_form",
            "route='closed_form' needs a bias-free mlp with relu or identity.",
        )


def is_homogeneous(branch: Component) -> bool:
    """Whether `f(s w) = s^L f(w)` for s >= 0: a bias-free mlp with a positively homogeneous activation."""
    return output_bound_known(branch) and branch.settings.get("activation", "relu") in HOMOGENEOUS


def output_bound_known(branch: Component) -> bool:
    """Whether `mlp_output_bound` holds for the branch."""
    settings = branch.settings
    bias_free = branch.name == "mlp" and not settings.get("use_bias", True)
    return bias_free and settings.get("activation", "relu") in CONTRACTIONS


def _hidden(branch: Component) -> tuple[int, ...]:
    return tuple(branch.settings.get("hidden", (8,)))


class _Setup(NamedTuple):
    """The one-branch problem on a data set, its hinge loss, and the proven bound on the margins over W, or None."""

    problem: Problem
    loss: Loss
    margin_bound: float | None


def _setup(spec: DualityGapSpec, tables: Tables, dataset: Dataset, tau: float | None = None) -> _Setup:
    branch = tables.branches.build(spec.branch.name, **{**spec.branch.settings, "out": dataset.num_outputs})
    bound = None
    if output_bound_known(spec.branch):
        x = (np.asarray(dataset.x, np.float64) - dataset.mean) / dataset.std
        largest = float(np.linalg.norm(x.reshape(len(x), -1), axis=1).max())
        # A margin between classes is a difference of two outputs: sqrt(2) times their norm.
        factor = 1.0 if dataset.num_outputs == 1 else math.sqrt(2)
        bound = factor * mlp_output_bound(len(_hidden(spec.branch)) + 1, spec.radius, largest) * (1 + 1e-12)
    tau = tau or spec.tau or 1.01 * (bound or 1.0)
    name = "binary_hinge" if dataset.task == "binary" else "multi_margin"
    loss = tables.losses.build(name, tau=tau)
    problem = branch_problem(branch, dataset, tau=tau, radius=spec.radius, power=spec.power, seed=spec.seed)
    if bound is not None and not verify_margin(problem, bound / tau):
        bound = None
    return _Setup(problem, loss, bound)


def _value_function(spec: DualityGapSpec, problem: Problem, *, quick: bool = False) -> ValueFunction:
    """The value function by the route of the spec."""
    effort = Effort(spec.route, spec.search, spec.bound, spec.dual_bound)
    most = max(spec.num_branches)
    return value_function(problem, spec.grid, effort, num_branches=most, seed=spec.seed, quick=quick, label="")


def duality_gap_experiment(spec: DualityGapSpec, workdir: Workdir, tables: Tables) -> Report:
    """Duality gap of Theorem 1 for every number of branches, certified where it can be, beside the bound 2/I."""
    dataset, fresh, note = samples(spec.data, spec.fresh_samples, tables)
    confirm_data(workdir, [(d.x, d.y, d.mean, d.std) for d in (dataset, *fresh)], info=dataset.info)
    if spec.second_share > 0:
        return _two_kinds(spec, workdir, tables, dataset)
    setup = _setup(spec, tables, dataset)
    problem = setup.problem
    function = _remembered(workdir, lambda: _value_function(spec, problem))
    budget = _budget(spec, function)
    delta = find_delta(problem, function, spec.search, seed=spec.seed)
    counts = sorted({*spec.num_branches, *spec.trained.num_branches})
    found = verdicts(function, budget, counts, delta_lower=delta)
    instance = Instance([function], budget)
    allocations = [instance.allocation([n]) for n in counts]
    proven = proven_rows(problem, function, delta, found, allocations)
    known = dict(zip(counts, proven.rows, strict=True))
    chosen = [allocations[counts.index(n)] for n in spec.num_branches]
    rows = [
        {**known[n], **_primal_point(setup, function, dataset, allocation)}
        for n, allocation in zip(spec.num_branches, chosen, strict=True)
    ]
    record: dict[str, Any] = {
        "title": spec.title,
        "branch": {"name": spec.branch.name, "parameters": problem.size, **spec.branch.settings},
        "data": dataset.info,
        "num_examples": len(dataset.y),
        "method": function.method,
        "status": rows[0]["status"],
        "objective": rows[0]["objective"],
        "verified": proven.verified,
        "concave": function.concave,
        "slope": function.slope,
        "tolerance": function.tolerance,
        "tau": problem.tau,
        "radius": spec.radius,
        "power": spec.power,
        "budget": budget,
        "budget_share": budget / problem.largest_budget,
        "margin_bound": setup.margin_bound,
        "assumption_1": rows[0]["assumption_1"],
        "delta": {
            "lower": delta.delta,
            "upper": rows[0]["delta_upper"],
            "status": proven.status if delta.status == "certified" else delta.status,
            "points": len(delta.points),
            "restricted": delta.restricted,
            "convexified": delta.convexified,
        },
        "rows": rows,
        "value_function": curve(function),
        "dual_function": dual_curve([function], [1], budget, rows[0]["multiplier"]),
        "hinge": None,
        "trained": [],
        "population": None,
        "population_note": note,
    }
    weights = np.ones(0)
    if record["objective"] != "hinge" and dataset.task == "binary":
        effort = Effort(spec.route, spec.search, spec.bound, dataclasses.replace(spec.dual_bound, tolerance=1e-6))

        def hinge() -> dict[str, Any]:
            rows, clipped = hinge_rows(problem, function, budget, spec.num_branches, effort, seed=spec.seed)
            return {"rows": rows, "weights": clipped.weights}

        kept = workdir.remember("hinge", hinge)
        record["hinge"], weights = kept["rows"], kept["weights"]
    _save_points(workdir, function, delta, chosen, weights)
    path = workdir.results / "duality_gap.json"
    if fresh:
        compute = functools.partial(_population, spec, tables, setup, function, budget, chosen, fresh)
        record["population"] = workdir.remember("population", compute)
    for count in spec.trained.num_branches:
        save_json(path, record)
        one = functools.partial(_trained, spec, setup, dataset, known[count])
        record["trained"].append(workdir.remember(f"trained, I = {count}", one))
    save_json(path, record)
    return report(record)


def _budget(spec: DualityGapSpec, function: ValueFunction) -> float:
    return float(function.budgets[max(1, round(spec.budget_share * (spec.grid - 1)))])


def _two_kinds(spec: DualityGapSpec, workdir: Workdir, tables: Tables, dataset: Dataset) -> Report:
    """The experiment with branches of two kinds; tau is that of the kind with the larger margins."""
    specs = [spec, dataclasses.replace(spec, branch=spec.second)]
    tau = max(_setup(one, tables, dataset).problem.tau for one in specs)
    problems = [_setup(one, tables, dataset, tau).problem for one in specs]
    found = mixed_rows(
        problems, functools.partial(_value_function, spec), spec.search, functools.partial(_budget, spec),
        spec.num_branches, spec.second_share, seed=spec.seed,
    )  # fmt: skip
    record = mixed_record(found, spec.title, spec.second_share)
    record |= {
        "branch": {"name": spec.branch.name, "parameters": problems[0].size, **spec.branch.settings},
        "second": {"name": spec.second.name, "parameters": problems[1].size, **spec.second.settings},
        "data": dataset.info,
        "num_examples": len(dataset.y),
        "radius": spec.radius,
        "power": spec.power,
    }
    save_npz(workdir.results / "duality_gap.npz", **mixed_arrays(found))
    save_json(workdir.results / "duality_gap.json", record)
    return report(record)


def _remembered(workdir: Workdir, compute: Callable[[], ValueFunction]) -> ValueFunction:
    """The value function, or what an interrupted run found by a search: that is kept, while proofs are made again."""
    if (kept := workdir.recall("value function")) is not None:
        return ValueFunction(**kept)
    found = compute()
    if found.lagrangian is None and found.minimisers is not None and found.status == "estimated":
        names = ("budgets", "lower", "upper", "minimisers", "method", "slope", "concave", "margin")
        workdir.keep("value function", {name: getattr(found, name) for name in names})
    return found


def _primal_point(setup: _Setup, function: ValueFunction, dataset: Dataset, allocation: Allocation) -> dict[str, Any]:
    """The primal point behind a row: its loss with and without the maximum of the hinge."""
    risk = _risk(setup, function, dataset, allocation)
    return {
        "linear_loss": risk.linear,
        "hinge_loss": risk.hinge,
        "clipped": risk.clipped,
        "assumption_1": risk.assumption_1._asdict(),
    }


def _risk(setup: _Setup, function: ValueFunction, dataset: Dataset, allocation: Allocation) -> Risk:
    if function.minimisers is None:
        raise ValueError(f"{function.method} keeps no minimisers.")
    (counts,) = allocation.counts
    order = sorted(counts)
    shares = np.array([counts[j] for j in order], np.float64)
    return primal_risk(
        setup.problem,
        setup.loss,
        dataset,
        function.minimisers[order],
        shares / shares.sum(),
        output_bound=setup.margin_bound,
    )


def _save_points(
    workdir: Workdir,
    function: ValueFunction,
    delta: deltas.Combination,
    allocations: list[Allocation],
    hinge_weights: np.ndarray,
) -> None:
    """`results/duality_gap.npz`: value function, weights that the allocations use, combination, weights of examples."""
    used = sorted({j for a in allocations for j in a.counts[0]})
    minimisers = function.minimisers
    save_npz(
        workdir.results / "duality_gap.npz",
        budgets=function.budgets,
        lower=function.lower,
        upper=function.upper,
        used_indices=np.array(used),
        used_weights=np.zeros((0, 0)) if minimisers is None else minimisers[used],
        delta_points=delta.points,
        delta_weights=delta.weights,
        delta_values=delta.values,
        delta_middle=delta.middle,
        hinge_weights=hinge_weights,
    )


# --- beside the verdicts ----------------------------------------------------------------------------------------------


def _population(
    spec: DualityGapSpec,
    tables: Tables,
    setup: _Setup,
    function: ValueFunction,
    budget: float,
    allocations: list[Allocation],
    fresh: list[Dataset],
) -> dict[str, Any]:
    """The gap on each fresh sample, and the risk of the training set's optimal point."""
    gaps, lowers = [], []
    with Progress(len(fresh), "fresh samples") as line:
        for k, sample in enumerate(fresh):
            one = _setup(spec, tables, sample, tau=setup.problem.tau).problem
            f = _value_function(spec, one, quick=True)
            delta = max(deltas.on_segment(one, f).delta, deltas.from_envelope(one, f).delta)
            gaps.append([row.gap_upper for row in verdicts(f, budget, spec.num_branches, delta_lower=0.0)])
            lowers.append(delta)
            line.update(k + 1)
    pooled = fresh[0]._replace(x=np.concatenate([s.x for s in fresh]), y=np.concatenate([s.y for s in fresh]))
    risks = [_risk(setup, function, pooled, allocation) for allocation in allocations]
    found = population.summary(spec.num_branches, np.array(gaps), np.array(lowers), risks)
    return {"samples": len(fresh), "examples": len(fresh[0].y), **found}


def _trained(spec: DualityGapSpec, setup: _Setup, dataset: Dataset, row: Mapping[str, Any]) -> dict[str, Any]:
    """Projected SGD on problem (2) from several seeds, against the bounds on inf(P) at this I."""
    count, budget = row["num_branches"], row["budget"]
    run = train_constrained(
        setup.problem, setup.loss, dataset, spec.trained, budget=budget, num_branches=count, seed=spec.seed
    )
    ranked = run.ranked()
    return {
        "num_branches": count,
        "state": f"{run.diverged} of {len(run.losses)} seeds diverged" if run.diverged else "finite",
        "diverged": run.diverged,
        "losses": run.losses,
        "best": float(ranked.min()),
        "median": float(np.median(ranked)),
        "largest_budget_used": float(run.used.max()),
        "feasible": bool((run.used <= budget).all()),
        "primal_lower": row["primal_lower"],
        "primal_upper": row["primal_upper"],
        "dual_lower": row["dual_lower"],
        "below_primal": bool((ranked < row["primal_lower"]).any()),
        "status": row["status"],
    }


DUALITY_GAP = Experiment("duality_gap", DualityGapSpec, duality_gap_experiment, figures.duality_gap)
