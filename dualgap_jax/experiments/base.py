"""What every experiment shares: the tables it draws on, its report, and the way it is run in a workdir.

An experiment is a plain function `(spec, workdir, tables) -> Report`.  The annotation of `spec` is the frozen dataclass
that the config is turned into; if it has a method `validate(tables)`, that is called before anything is written.  The
first line of the function's docstring is what `--list` prints.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dualgap_jax import config as config_lib
from dualgap_jax import figures
from dualgap_jax.data import DATASETS
from dualgap_jax.files import load_json, save_json
from dualgap_jax.losses import LOSSES
from dualgap_jax.networks import BRANCHES
from dualgap_jax.registry import Table
from dualgap_jax.shapley_folkman import SETS
from dualgap_jax.sharding import agreed, is_first_process, meet
from dualgap_jax.workdir import Workdir


class Report(NamedTuple):
    """The table that an experiment prints; kept in `results/report.json`.

    Attributes:
      title: one line.
      columns: the heads.
      rows: cells as text or numbers; None is printed as a dash.
      notes: sentences below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """The table in fixed width."""
        cells = [list(self.columns), *([_cell(c) for c in row] for row in self.rows)]
        widths = [max(len(row[k]) for row in cells) for k in range(len(self.columns))]
        lines = ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([self.title, "", lines[0], "-" * len(lines[0]), *lines[1:], "", *self.notes])


NO_REPORT = Report("", (), ())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


ExperimentFn = Callable[[Any, Workdir, "Tables"], Report]


class Tables(NamedTuple):
    """The registry, one read-only table a kind; `tables._replace(branches=...)` brings in entries of one's own."""

    experiments: Table[ExperimentFn]
    branches: Table[Callable[..., Any]] = BRANCHES
    datasets: Table[Callable[..., Any]] = DATASETS
    losses: Table[Callable[..., Any]] = LOSSES
    sets: Table[Callable[..., Any]] = SETS


def spec_type(experiment: ExperimentFn) -> type:
    """The dataclass in the annotation of an experiment's first parameter.  Raises TypeError if there is none."""
    first = next(iter(inspect.signature(experiment).parameters), None)
    hint = typing.get_type_hints(experiment).get(first or "")
    if not isinstance(hint, type):
        name = getattr(experiment, "__name__", experiment)
        raise TypeError(f"experiment {name} must annotate its first parameter with its spec, a frozen dataclass.")
    return hint


def identity(spec: Any) -> dict[str, Any]:
    """The configuration that a workdir belongs to: the spec as JSON, without what is of this machine only.

    That is where the data lie and which devices share the work: a run goes on on another machine, or another mesh.
    """
    plain = config_lib.plain(spec)

    def strip(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {k: strip(v) for k, v in tree.items() if k not in ("data_dir", "mesh", "devices")}
        return tree

    return strip(plain)


def execute(
    experiment: ExperimentFn, spec: Any, path: Path, tables: Tables, *, command: Sequence[str] = (), draw: bool = True
) -> tuple[Report, Workdir, bool]:
    """Runs an experiment in its workdir, or reads the report of one that is complete there.

    In a distributed run all processes call it with the same arguments; the first one writes.

    Returns:
      The report (empty in processes that do not write), the workdir, and whether it was complete before.

    Raises:
      WorkdirError: see `Workdir.open`; and whatever the experiment raises, after recording it.
    """
    if hasattr(spec, "validate"):
        spec.validate(tables)
    if not is_first_process():
        workdir = Workdir.follow(path, identity(spec))
        complete = agreed(False)
        if not complete:
            experiment(spec, workdir, tables)
            meet("the experiment is done")
        return NO_REPORT, workdir, complete
    workdir = Workdir.open(path, identity(spec), command=command)
    record = workdir.path / "results" / "report.json"
    if agreed(workdir.status == "complete" and record.exists()):
        return Report(**load_json(record)), workdir, True
    with workdir.session():
        report = experiment(spec, workdir, tables)
        if draw:
            figures.draw(workdir.path)
        save_json(record, report._asdict())
    meet("the experiment is done")
    return report, workdir, False
