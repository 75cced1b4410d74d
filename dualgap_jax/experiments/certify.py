"""How far networks of I branches are from the global optimum over all of them, in three regimes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from dualgap_jax import figures, seeds
from dualgap_jax.certify import (
    Certificate,
    OptimumSpec,
    RiskProblem,
    excess_along,
    optimum,
    risk_problem,
    verify_bound,
)
from dualgap_jax.certify.engines import ceiling
from dualgap_jax.certify.trained import Network, rounded
from dualgap_jax.config import Component, require
from dualgap_jax.data import Dataset
from dualgap_jax.experiments.base import Experiment, Report, Tables, confirm_data
from dualgap_jax.files import save_json
from dualgap_jax.networks import mlp
from dualgap_jax.registry import unknown
from dualgap_jax.terminal import Progress
from dualgap_jax.workdir import Workdir

REGIMES = {
    "tanh": "tanh unit, weight decay",
    "chain": "ReLU chain of 3 layers, budget",
    "two_layer": "ReLU unit, weight decay",
}
DEFINITIONS = {
    "upper": "regularised risk of a measure of branches, all rounding allowed for: F* is at most this",
    "lower": "proven lower bound on F*, the least regularised risk over all measures of branches",
    "lower_estimated": "the same with a search over branches in the place of the proof",
    "verified": "whether the lower bound was proven again from its dual vectors with arithmetic of its own",
    "best": "least regularised risk found of a network of I branches (an upper bound on inf(P_I))",
    "excess": "how much worse a branch of the network under SGD is than the best possible branch, by the dual vectors"
    " of the optimum; the mean, with what budget and dual vectors lose, is the risk above the bound on F*",
    "trained": "regularised risks from random starts, one a seed",
}


@dataclasses.dataclass(frozen=True)
class CertifySpec:
    """Networks against the optimum.

    Attributes:
      title: head of the figure.
      data: an entry of the table of data sets, with labels -1 and 1.
      loss: an entry of the table of losses, for labels -1 and 1.
      regimes: names of `REGIMES`.
      share: of the penalty: weight decay is this share of the least one at which the zero network is optimal (for tanh
        that of linear units); and of the budget: this share of the squared radius.
      radius: of the ball W, for tanh and the chain.
      num_branches: the values of I.
      seeds: random starts for each I.
      steps: of L-BFGS from each start.
      along: branches of a network that plain SGD trains and whose excess is followed; 0 for none.
      along_steps: of SGD.
      along_rate: of SGD, times I.
      optimum: how hard F* is looked for.
      seed: of all random draws.
    """

    title: str = "How far from the optimum?"
    data: Component = Component("synthetic_relu", {"n": 16, "d": 2})
    loss: Component = Component("squared", {})
    regimes: tuple[str, ...] = ("tanh", "chain", "two_layer")
    share: float = 0.1
    radius: float = 3.0
    num_branches: tuple[int, ...] = (1, 2, 5, 10, 100, 1000)
    seeds: int = 3
    steps: int = 500
    along: int = 0
    along_steps: int = 10_000
    along_rate: float = 0.05
    optimum: OptimumSpec = OptimumSpec()
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.regimes:
            require(name in REGIMES, unknown("regime", name, REGIMES))
        require(len(self.regimes) > 0 and len({*self.regimes}) == len(self.regimes), "regimes: one of each, at least.")
        require(0 < self.share < 1, f"share={self.share} must lie between 0 and 1.")
        require(0 < self.radius < math.inf, f"radius={self.radius} must be positive and finite.")
        require(
            len(self.num_branches) > 0 and min(self.num_branches) >= 1,
            f"num_branches={self.num_branches} must be positive integers, at least one.",
        )
        require(
            len(set(self.num_branches)) == len(self.num_branches), f"num_branches={self.num_branches} names one twice."
        )
        require(self.along >= 0, f"along={self.along} must be at least 0.")
        require(0 < self.along_rate < math.inf, f"along_rate={self.along_rate} must be positive and finite.")
        for name in ("seeds", "steps", "along_steps"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1.")

    def validate(self, tables: Tables) -> None:
        """Raises ConfigError for a loss that does not serve; looks the settings of the data up."""
        loss = tables.losses.build(self.loss.name, **self.loss.settings)
        require(
            loss.conjugate is not None, f"loss {self.loss.name!r} has no conjugate, so nothing bounds it from below."
        )
        require("binary" in loss.tasks, f"loss {self.loss.name!r} does not fit labels -1 and 1.")
        tables.datasets.check(self.data.name, **self.data.settings)

    def check_data(self, dataset: Dataset) -> None:
        """Raises ConfigError for data of several classes: the branches of all regimes have one output."""
        require(
            dataset.task != "multiclass",
            f"data set {dataset.name!r} has {dataset.num_outputs} classes, but every regime has one output: give labels"
            " -1 and +1, as mnist(labels='parity') does, or real targets.",
        )


def regime_problem(regime: str, data: Dataset, loss: Any, share: float, radius: float) -> RiskProblem:
    """The risk of one regime; `share` and `radius` as in `CertifySpec`."""
    if regime == "chain":
        branch = mlp((1, 1), 1, use_bias=False)
        return risk_problem(branch, data, loss, budget=share * radius**2, radius=radius)
    like = mlp((1,), 1, use_bias=False, activation="relu" if regime == "two_layer" else "identity")
    unit = risk_problem(like, data, loss, penalty=1.0)
    top = ceiling(unit, unit.slope(np.zeros(unit.shape)))
    assert top is not None  # of a homogeneous branch there always is one
    if regime == "two_layer":
        return risk_problem(like, data, loss, penalty=share * top.upper)
    branch = mlp((1,), 1, use_bias=False, activation="tanh")
    return risk_problem(branch, data, loss, penalty=share * top.upper, radius=radius)


def certify(spec: CertifySpec, workdir: Workdir, tables: Tables) -> Report:
    """The distance of networks of I branches from the global optimum over all of them (beyond the unclipped hinge)."""
    data = tables.datasets.build(spec.data.name, **spec.data.settings)
    loss = tables.losses.build(spec.loss.name, **spec.loss.settings)
    confirm_data(workdir, data.x, data.y, info=data.info)
    cells = [
        workdir.remember(f"regime {name}", lambda name=name: _cell(spec, name, data, loss))  # type: ignore[misc]
        for name in spec.regimes
    ]
    document = {
        "title": spec.title,
        "loss": spec.loss.name,
        "data": {"name": spec.data.name, "examples": len(data.x), **data.info},
        "share": spec.share,
        "cells": cells,
        "definitions": DEFINITIONS,
    }
    save_json(workdir.results / "certify.json", document)
    return _report(spec, document)


def _cell(spec: CertifySpec, regime: str, data: Dataset, loss: Any) -> dict[str, Any]:
    problem = regime_problem(regime, data, loss, spec.share, spec.radius)
    found = optimum(problem, spec=spec.optimum, seed=spec.seed, label=f"{regime}: F*")
    generator = seeds.generator(spec.seed)
    rows, known = [], dict[int, np.ndarray]()
    with Progress(len(spec.num_branches), f"{regime}: networks") as line:
        for k, count in enumerate(spec.num_branches):
            network = Network(problem, count)
            ends = [network.from_random(generator, spec.steps) for _ in range(spec.seeds)]
            # Besides: the measure behind F*, rounded, and the networks of fewer branches, several times each.
            starts = [
                rounded(problem, found, count),
                *(np.repeat(w, count // i, 0) for i, w in known.items() if count % i == 0),
            ]
            ends += [network.lowered(start, spec.steps) for start in starts]
            known[count], best = min(ends, key=lambda end: end[1])
            rows.append({"num_branches": count, "best": best, "trained": [risk for _, risk in ends[: spec.seeds]]})
            line.update(k + 1, f"I = {count:,}")
    return {
        "regime": regime,
        "name": REGIMES[regime],
        "penalty": problem.penalty,
        "budget": problem.budget,
        "parameters": problem.one.size,
        "zero_network": float(problem.losses(np.zeros(problem.shape)).mean()),
        **bounds_of(problem, found),
        "branches": len(found.shares),
        "history": list(found.history),
        "rows": rows,
        "along": _along(spec, problem, found) if spec.along else None,
    }


def _along(spec: CertifySpec, problem: RiskProblem, found: Certificate) -> dict[str, Any]:
    """The excess of each branch of a network while SGD trains it, by the dual vectors of the optimum."""
    looks = sorted({0, *np.geomspace(1, spec.along_steps, 40).astype(int).tolist()})
    generator = seeds.generator(spec.seed)
    start = generator.standard_normal((spec.along, problem.one.size)) / math.sqrt(problem.one.size)
    batch = max(1, min(32, problem.shape[0] // 2))
    path = Network(problem, spec.along).path(start, looks, rate=spec.along_rate, batch=batch, seed=spec.seed)
    return {**excess_along(problem, path, bound=found.bound)._asdict()}


def bounds_of(problem: RiskProblem, found: Certificate) -> dict[str, Any]:
    """The bounds of a certificate for a record; a lower one that is not proven again is estimated."""
    checked = verify_bound(problem, found.bound)
    return {
        "upper": found.upper,
        "lower": found.lower,
        "lower_estimated": found.lower_estimated,
        "status": found.status if checked.holds else "estimated",
        "method": found.method,
        "verified": checked.holds,
        "reason": checked.reason,
    }


def _estimate(lower: float | None) -> str:
    if lower is None:
        return "the search gives no estimate, since it has missed the best branch."
    return f"F* is at least {lower:.6g} by the search (estimated)."


def _worst(along: dict[str, Any] | None) -> str:
    if along is None:
        return ""
    last = np.asarray(along["excess"])[-1]
    worst = max(1, len(last) // 10)
    share = np.sort(last)[::-1][:worst].sum() / max(float(last.sum()), 1e-300)
    return f" Under SGD the worst {worst} of {len(last)} branches end with {share:.0%} of the excess."


def _less(value: float, other: float, toward: float) -> float:
    """`value - other`, rounded to a side; equal numbers leave 0, and not the least float."""
    return 0.0 if value == other else math.nextafter(value - other, toward)


def _report(spec: CertifySpec, document: dict[str, Any]) -> Report:
    columns = [
        "regime",
        "I",
        "F* lower",
        "F* upper",
        "status",
        "best - F*, at most",
        "at least",
        "trained - F*, at most",
    ]
    rows = []
    for cell in document["cells"]:
        for row in cell["rows"]:
            trained = float(np.median(row["trained"]))
            rows.append(
                [
                    cell["regime"],
                    row["num_branches"],
                    cell["lower"],
                    cell["upper"],
                    cell["status"],
                    _less(row["best"], cell["lower"], math.inf),
                    max(0.0, _less(row["best"], cell["upper"], -math.inf)),
                    _less(trained, cell["lower"], math.inf),
                ]
            )
    notes = [
        f"{cell['regime']}: {cell['method']}, proven again: {'yes' if cell['verified'] else 'no, ' + cell['reason']};"
        f" {_estimate(cell['lower_estimated'])}{_worst(cell['along'])}"
        for cell in document["cells"]
    ]
    notes.append("best: the least risk found for I branches; trained: the median over random starts.")
    most, least = (columns[3], columns[5], columns[7]), (columns[2], columns[6])
    return Report(spec.title, columns, rows, notes, dict.fromkeys(most, "upper") | dict.fromkeys(least, "lower"))


CERTIFY = Experiment("certify", CertifySpec, certify, figures.certify)
