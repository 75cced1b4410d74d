"""The experiments of the paper, in the table `EXPERIMENTS`; `run` takes a config to a finished workdir."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from dualgap_jax.config import as_dict, require, to_spec
from dualgap_jax.experiments.base import ExperimentFn, Report, Tables, execute, identity, spec_type
from dualgap_jax.experiments.duality_gap import duality_gap_experiment
from dualgap_jax.experiments.hitting_rate import hitting_rate
from dualgap_jax.experiments.hitting_search import hitting_search
from dualgap_jax.experiments.landscape import landscape_experiment
from dualgap_jax.experiments.linear_dual import linear_dual_experiment
from dualgap_jax.experiments.regimes import regimes
from dualgap_jax.experiments.row import landscape_row
from dualgap_jax.experiments.shapley_folkman import shapley_folkman
from dualgap_jax.registry import Table
from dualgap_jax.workdir import Workdir, default_workdir

EXPERIMENTS: Table[ExperimentFn] = Table(
    "experiment",
    {
        "landscape": landscape_experiment,
        "landscape_row": landscape_row,
        "linear_dual": linear_dual_experiment,
        "regimes": regimes,
        "shapley_folkman": shapley_folkman,
        "hitting_rate": hitting_rate,
        "hitting_search": hitting_search,
        "duality_gap": duality_gap_experiment,
    },
)
TABLES = Tables(EXPERIMENTS)
DISTRIBUTED = frozenset({"landscape", "landscape_row"})  # those that several processes can run together


def run(
    config: ml_collections.ConfigDict | Mapping[str, Any],
    *,
    tables: Tables = TABLES,
    name: str | None = None,
    workdir: str | Path | None = None,
    root: str | Path = "runs",
    command: Sequence[str] = (),
) -> tuple[Report, Workdir, bool]:
    """Runs the experiment that a config names, or reads its report if it is complete already.

    Args:
      config: a ConfigDict, or nested mapping, with a key `experiment`.
      tables: the registry.
      name: of the folder below `root` when `workdir` is None; the experiment's name by default.
      workdir: the folder to work in.  None: `root/NAME-HASH`, the hash of the configuration.
      root: where default workdirs are made.
      command: the command line, for the run card.

    Returns:
      The report, the workdir, and whether it was complete before.

    Raises:
      ConfigError, UnknownNameError: for a config that does not fit; before anything is written.
      WorkdirError: see `Workdir.open`; and whatever the experiment raises, after recording it.
    """
    values = as_dict(config)
    require(isinstance(values.get("experiment"), str), "the config names no experiment: set config.experiment.")
    chosen = values.pop("experiment")
    experiment = tables.experiments[chosen]
    require(
        jax.process_count() == 1 or chosen in DISTRIBUTED,
        f"experiment {chosen!r} runs in one process; several processes run {' and '.join(sorted(DISTRIBUTED))}.",
    )
    spec: Any = to_spec(spec_type(experiment), values)
    if workdir is None:
        workdir = default_workdir(root, name or chosen, identity(spec))
    return execute(experiment, spec, Path(workdir), tables, command=command)


__all__ = ["EXPERIMENTS", "TABLES", "Report", "Tables", "run"]
