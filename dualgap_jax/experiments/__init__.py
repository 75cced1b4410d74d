"""The experiments of the paper, in the table `EXPERIMENTS`; `run` takes a config to a finished workdir."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from dualgap_jax.config import ConfigError, check_numbers, require, spec_of
from dualgap_jax.experiments.architecture import ARCHITECTURE
from dualgap_jax.experiments.base import Experiment, Report, Tables, execute, identity
from dualgap_jax.experiments.certify import CERTIFY
from dualgap_jax.experiments.duality_gap import DUALITY_GAP
from dualgap_jax.experiments.examples import LANDSCAPE_EXAMPLES
from dualgap_jax.experiments.hitting_rate import HITTING_RATE
from dualgap_jax.experiments.hitting_search import HITTING_SEARCH
from dualgap_jax.experiments.landscape import LANDSCAPE
from dualgap_jax.experiments.landscape_search import LANDSCAPE_SEARCH
from dualgap_jax.experiments.linear_dual import LINEAR_DUAL
from dualgap_jax.experiments.regimes import REGIMES
from dualgap_jax.experiments.row import LANDSCAPE_ROW
from dualgap_jax.experiments.shapley_folkman import SHAPLEY_FOLKMAN
from dualgap_jax.files import local_path
from dualgap_jax.registry import Table
from dualgap_jax.workdir import Workdir, default_workdir

EXPERIMENTS: Table[Experiment] = Table(
    "experiment",
    {
        experiment.name: experiment
        for experiment in (
            LANDSCAPE,
            LANDSCAPE_ROW,
            LANDSCAPE_EXAMPLES,
            LANDSCAPE_SEARCH,
            ARCHITECTURE,
            LINEAR_DUAL,
            REGIMES,
            SHAPLEY_FOLKMAN,
            HITTING_RATE,
            HITTING_SEARCH,
            DUALITY_GAP,
            CERTIFY,
        )
    },
)
TABLES = Tables(EXPERIMENTS)


def run(
    config: ConfigDict | Mapping[str, Any],
    *,
    tables: Tables = TABLES,
    name: str | None = None,
    workdir: str | Path | None = None,
    root: str | Path = "runs",
    command: Sequence[str] = (),
) -> tuple[Report, Workdir, bool]:
    """Runs the experiment that a config names, or reads its report if it is complete already.

    Args:
      config: a ConfigDict, or any nested mapping, with a key `experiment` beside those of the spec.
      tables: the registry.
      name: of the folder below `root` when `workdir` is None; the experiment's name by default.
      workdir: the folder to work in.  None: `root/NAME-HASH`, the hash of the configuration.
      root: where default workdirs are made.
      command: the command line, for the run card.

    Returns:
      The report, the workdir, and whether it was complete before.

    Raises:
      ConfigError, UnknownNameError: for a config that does not fit; before anything is written.
      WorkdirError: see `Workdir.open` and `Workdir.session`; and whatever the experiment raises, after recording it.
    """
    chosen = config.get("experiment")
    if not isinstance(chosen, str):
        raise ConfigError("the config names no experiment: give it a key `experiment`.")
    experiment = tables.experiments[chosen]
    require(experiment.name == chosen, f"the entry {chosen!r} is an experiment named {experiment.name!r}; rename one.")
    several = [name for name, other in tables.experiments.items() if other.distributed]
    require(
        jax.process_count() == 1 or experiment.distributed,
        f"experiment {chosen!r} runs in one process; several processes run {' and '.join(several)}.",
    )
    spec: Any = spec_of(config, experiment.spec)
    check_numbers(spec)
    if workdir is None:
        workdir = default_workdir(root, name or chosen, identity(experiment, spec))
    return execute(experiment, spec, local_path(workdir, "the work folder"), tables, command=command)


__all__ = ["EXPERIMENTS", "TABLES", "Experiment", "Report", "Tables", "run"]
