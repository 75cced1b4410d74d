"""How far the networks of a finished run are from the global optimum: its own loss, weight decay and data."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dualgap_jax import certify
from dualgap_jax.card import CERTIFICATE, certified
from dualgap_jax.config import spec_of
from dualgap_jax.data import Dataset
from dualgap_jax.experiments import landscape
from dualgap_jax.experiments.base import Report, Tables, confirm_data
from dualgap_jax.experiments.certify import bounds_of
from dualgap_jax.experiments.landscape import LandscapeSpec, Setting
from dualgap_jax.files import DamagedFileError, load_json, local_path, save_json
from dualgap_jax.identity import arrays_digest
from dualgap_jax.terminal import Progress, digits
from dualgap_jax.training import train
from dualgap_jax.types import BranchSource
from dualgap_jax.workdir import Workdir

_SOLUTIONS = 3  # of a landscape
_OF = "results/landscape.npz"  # the results by which a certificate knows its solutions
_TITLE = "Distance from the global optimum"
COLUMNS = (
    "run",
    "solution",
    "I",
    "risk",
    "optimum, at least (certified)",
    "at least (estimated)",
    "within %",
    "method",
)
_BOUNDS = {"risk": "upper", "optimum, at least (certified)": "lower", "within %": "upper"}


class CertifyRunError(ValueError):
    """A folder that holds no networks that could be certified."""


def certify_run(path: str | Path, tables: Tables, say: Callable[[str], object] = print) -> Report:
    """The distance of every network of a finished run from the global optimum, a line each; resumes where it stopped.

    The risk is the run's loss plus `(weight_decay / 2)` times the sum of all squared weights, which is what SGD with
    that weight decay descends; without weight decay it is the loss, against all networks whose mean `||w_i||^2` is no
    larger.  Each landscape in the folder gets a record `results/certificate.json`.

    Args:
      path: the work folder of a landscape, or of a run that holds landscapes.
      tables: the registry that the run was made with.
      say: gets each line.

    Returns:
      The table over all landscapes.

    Raises:
      CertifyRunError: for a folder without networks, or a run that is not complete.
      WorkdirError: if another process is at work in it, or the data are others.
    """
    folder = local_path(path, "the work folder").expanduser().resolve()
    rows: list[Any] = []
    notes: list[str] = []
    cells = _landscapes(folder)
    whole = Workdir.open(folder, _config(folder)) if cells != [folder] else None
    with contextlib.nullcontext() if whole is None else whole.repair():
        for cell in cells:
            found = _certified(cell, "" if cell == folder else f"{cell.relative_to(folder)}: ", tables, say)
            rows += found.rows
            notes += [note for note in found.notes if note not in notes]
        report = Report(_TITLE, COLUMNS, rows, notes, _BOUNDS)
        if whole is not None:
            of = certified(folder, [f"{cell.relative_to(folder)}/{_OF}" for cell in cells])
            save_json(whole.results / CERTIFICATE, {**report._asdict(), "of": of})
    return report


def _landscapes(folder: Path) -> list[Path]:
    """The folders of finished landscapes in a folder, itself among them."""
    if not (folder / "config.json").is_file():
        raise CertifyRunError(f"{folder} holds no run: give a work folder, the one with config.json and run.json.")
    cells = []
    for place, inside, names in os.walk(folder):
        inside[:] = sorted(name for name in inside if name not in ("checkpoints", "parts", "results", "figures"))
        if "config.json" in names and _config(Path(place)).get("experiment") == landscape.LANDSCAPE.name:
            cells.append(Path(place))
    if not cells:
        name = _config(folder).get("experiment")
        raise CertifyRunError(
            f"{folder} is a run of the experiment {name!r}, which keeps no trained networks of a loss landscape; give"
            " one of landscape, landscape_row or regimes."
        )
    return cells


def _config(folder: Path) -> dict[str, Any]:
    try:
        return load_json(folder / "config.json")
    except (FileNotFoundError, DamagedFileError) as error:
        raise CertifyRunError(f"{folder}: its config.json cannot be read ({error}).") from error


def _certified(folder: Path, prefix: str, tables: Tables, say: Callable[[str], object]) -> Report:
    config = _config(folder)
    workdir = Workdir.open(folder, config)
    if workdir.status != "complete":
        raise CertifyRunError(f"{folder} is not complete ({workdir.status}): the same command as before goes on.")
    spec = spec_of(config, LandscapeSpec)
    with workdir.repair():
        setting = landscape.build(spec, tables)
        data = setting.dataset
        confirm_data(workdir, data.x, data.y, data.mean, data.std, info=data.info)
        networks = _networks(spec, setting, workdir)
        found = []
        with Progress(len(networks), f"{folder.name}: certificates") as line:
            for k, network in enumerate(networks):
                name, digest = f"certificate solution_{k}", arrays_digest(network.read(0, network.num_branches))
                value = workdir.recall(name)
                if value is None or value.get("network") != digest:
                    value = workdir.keep(name, {**_solution(spec, setting, data, network), "network": digest})
                found.append(value)
                line.update(k + 1, f"solution {k}")
        report = _report(spec, prefix, found)
        save_json(
            workdir.results / CERTIFICATE, {**report._asdict(), "of": certified(folder, [_OF]), "solutions": found}
        )
    for k, value in enumerate(found):
        say(f"{prefix}solution {k}: {value['said']}")
    return report


def _networks(spec: LandscapeSpec, setting: Setting, workdir: Workdir) -> list[BranchSource]:
    """The solutions of a run, read through `train`: each from the end of its own training, or it goes on to there."""
    for k in range(_SOLUTIONS):
        if not (workdir.checkpoints / f"solution_{k}").is_dir():
            raise CertifyRunError(
                f"{workdir.path} holds no checkpoints of solution {k}, they were deleted: delete its run.json and run"
                " it again."
            )
    solutions = train(
        setting.training_net,
        setting.loss,
        setting.dataset,
        **spec.training.arguments(spec.num_branches),
        seed=spec.seed,
        checkpoints=workdir.checkpoints,
    )
    return [solution.network for solution in solutions]


def _solution(spec: LandscapeSpec, setting: Setting, data: Dataset, network: BranchSource) -> dict[str, Any]:
    """What is known about one network, ready for JSON."""
    assert setting.net.stacked is not None  # a landscape's network is a sum of branches
    branch, decay = setting.net.stacked.branch, spec.training.weight_decay
    params, _ = network.read(0, network.num_branches)
    squares = sum(float(jnp.sum(jnp.square(jnp.asarray(leaf, jnp.float32)))) for leaf in jax.tree.leaves(params))
    count = spec.num_branches if spec.reduce == "mean" else 1
    settings: dict[str, Any] = {"penalty": 0.5 * decay * count}
    if decay == 0:
        settings = {"budget": squares / count * (1 + 1e-5)}
    facts = {**settings, "num_branches": spec.num_branches, "mean_square": squares / count}
    try:
        problem = certify.risk_problem(branch, data, setting.loss, reduce=spec.reduce, **settings)
        found = certify.assess(problem, network, seed=spec.seed)
    except ValueError as error:
        why = " ".join(str(error).split())
        return {**facts, "proven": False, "reason": why, "said": f"nothing can be proven: {why}"}
    made = found.certificate
    zero = float(problem.losses(problem.one.c * 0.0).mean())
    bounds = bounds_of(problem, made)
    said = _sentence(made, bounds["status"], zero, found.least_budget, facts["mean_square"])
    return {
        **facts,
        **bounds,
        "proven": bounds["status"] == "certified",
        "risk": bounds["upper"],
        "zero_network": zero,
        "least_budget": found.least_budget,
        "worst_excess": float(made.excess.max()),
        "mean_excess": float(made.excess.mean()),
        "said": said + ("" if bounds["verified"] else f"; NOT proven again: {bounds['reason']}"),
    }


def _rounded(bound: float) -> float:
    """A bound without what it is below 0 for the sake of rounding alone."""
    return 0.0 if abs(bound) < 1e-250 else bound


def _share(gap: float, whole: float) -> str:
    return f"{digits(100 * gap / whole, 3, 'upper')} %" if whole > 0 else "0 %"


def _sentence(made: certify.Certificate, status: str, zero: float, least: float | None, own: float) -> str:
    """One line of a terminal."""
    estimate = "no estimate, the search has missed the best branch" if made.search_missed else "no estimate"
    if made.lower_estimated is not None:
        estimate = f">= {_rounded(made.lower_estimated):.4g} (estimated)"
    parts = [
        f"risk {digits(made.upper, bound='upper')}",
        f"optimum >= {digits(_rounded(made.lower), bound='lower')} ({status}, {made.method}), {estimate}",
        f"within {_share(made.gap, made.upper)} of the optimum, {_share(made.gap, zero)} of the zero network's loss",
    ]
    if least is not None:
        needs = digits(least, 3, "lower")
        parts.append(f"so low a loss needs mean ||w||^2 >= {needs} (certified), this network has {own:.3g}")
    return "; ".join(parts)


def _report(spec: LandscapeSpec, prefix: str, found: list[dict[str, Any]]) -> Report:
    rows = []
    for k, value in enumerate(found):
        row: list[Any] = [prefix.rstrip(": ") or "this run", k, spec.num_branches]
        if "risk" not in value:
            rows.append([*row, None, None, None, None, "none"])
            continue
        lower = within = None
        if value["verified"]:
            lower, risk = value["lower"], value["risk"]
            within = 100 * (risk - lower) / risk if risk > 0 else 0.0
        bounds = [None if v is None else _rounded(v) for v in (lower, value["lower_estimated"])]
        rows.append([*row, value["risk"], *bounds, within, value["method"]])
    decay = spec.training.weight_decay
    notes = [
        f"Risk: loss plus {decay:g}/2 times the sum of all squared weights, against every network of such branches."
        if decay
        else "Risk: the loss, against every network of such branches whose mean ||w_i||^2 is no larger."
    ]
    if any(value.get("method") == "least losses" for value in found):
        notes.append(
            "Least losses: no engine proves more than that no loss is below its least value, 0; networks of these"
            " weights may fit all examples, or the relaxation of one branch is too loose to exclude it."
        )
    notes += list(dict.fromkeys(value["reason"] for value in found if value.get("reason")))
    return Report(_TITLE, COLUMNS, rows, notes, _BOUNDS)
