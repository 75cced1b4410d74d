"""What every experiment shares: the tables it draws on, its report, and the way it is run in a workdir."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dualgap_jax import figures
from dualgap_jax.card import digest_or_none
from dualgap_jax.config import Component
from dualgap_jax.data import DATASETS, contents_digest
from dualgap_jax.experiments import probe
from dualgap_jax.files import DamagedFileError, jsonable, load_json, save_json
from dualgap_jax.hitting import SgdSpec
from dualgap_jax.identity import arrays_digest
from dualgap_jax.losses import LOSSES
from dualgap_jax.networks import BRANCHES
from dualgap_jax.registry import Table
from dualgap_jax.shapley_folkman import SETS
from dualgap_jax.sharding import MeshSpec, agreed, is_first_process, meet
from dualgap_jax.terminal import Progress, cell, paragraph, table
from dualgap_jax.workdir import Workdir, WorkdirError

_log = logging.getLogger(__name__)


class Report(NamedTuple):
    """The table that an experiment prints; kept in `results/report.json`.

    Attributes:
      title: one line.
      columns: the heads.
      rows: cells as text, numbers or lists of both; None is printed as a dash.
      notes: sentences below the table.
      bounds: 'lower' or 'upper' by the name of a column that holds such bounds: to which side digits are rounded.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    notes: Sequence[str] = ()
    bounds: Mapping[str, str] = {}

    def text(self) -> str:
        """The table and the notes, in at most `terminal.WIDTH` columns."""
        cells = [[cell(v, self.bounds.get(c)) for c, v in zip(self.columns, row, strict=True)] for row in self.rows]
        return "\n".join([self.title, "", table(self.columns, cells), "", *map(paragraph, self.notes)])


NO_REPORT = Report("", (), ())


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One kind of run, an entry of the table of experiments.

    Attributes:
      name: what configs and `config.json` call it.
      spec: the frozen dataclass that a config is turned into; if it has a method `validate(tables)`, that is called
        before anything is written.
      run: `(spec, workdir, tables) -> Report`; the first line of its docstring is what `--list` prints.
      draw: draws the figures of a work folder from its records and returns their paths; None draws nothing.
      distributed: whether several processes can run it together.
    """

    name: str
    spec: type
    run: Callable[..., Report]
    draw: Callable[[Path], list[Path]] | None = None
    distributed: bool = False

    def __post_init__(self) -> None:
        if not (dataclasses.is_dataclass(self.spec) and isinstance(self.spec, type)):
            raise TypeError(f"experiment {self.name!r}: spec must be a frozen dataclass; got {self.spec!r}")
        object.__setattr__(self, "__doc__", inspect.getdoc(self.run) or "")

    def drawn(self, workdir: Workdir) -> None:
        """Draws the figures, if there are any."""
        if self.draw is not None:
            with figures.any_backend(), Progress(None, "drawing"):
                self.draw(workdir.path)


class Tables(NamedTuple):
    """The registry, one read-only table a kind; `tables._replace(branches=...)` brings in entries of one's own."""

    experiments: Table[Experiment]
    branches: Table[Callable[..., Any]] = BRANCHES
    datasets: Table[Callable[..., Any]] = DATASETS
    losses: Table[Callable[..., Any]] = LOSSES
    sets: Table[Callable[..., Any]] = SETS

    def with_experiments(self, *added: Experiment) -> Tables:
        """The tables with experiments of one's own.  Raises DuplicateNameError for a name that is taken."""
        return self._replace(experiments=self.experiments.extended({e.name: e for e in added}))


def identity(experiment: Experiment, spec: Any) -> dict[str, Any]:
    """The configuration that a workdir belongs to: the experiment's name and the spec as JSON.

    What is of this machine only is left out, where the package's data lie and which devices share the work: a run goes
    on on another machine, or another mesh.  Settings of those names that are somebody's own belong to it.
    """
    return {"experiment": experiment.name, **jsonable(_of_any_machine(spec), where="config")}


def _of_any_machine(value: Any) -> Any:
    """A spec, or a part of one, without what the package's own specs and data sets say of this machine."""
    if isinstance(value, Component):
        left_out = {"data_dir"} if value.name in DATASETS else set()
        return {k: _of_any_machine(v) for k, v in value._asdict().items() if k not in left_out}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {
            name: _of_any_machine(item)
            for name, item in fields.items()
            if not isinstance(item, MeshSpec) and not (name == "devices" and _declares(SgdSpec, type(value), name))
        }
    if isinstance(value, Mapping):
        return {key: _of_any_machine(item) for key, item in value.items()}
    return [_of_any_machine(item) for item in value] if type(value) in (list, tuple) else value


def _declares(owner: type, spec: type, name: str) -> bool:
    """Whether a field of a spec is that of `owner`, inherited or its own."""
    return owner is next((c for c in spec.__mro__ if name in inspect.get_annotations(c)), None)


def confirm_data(workdir: Workdir, *arrays: Any, **facts: Any) -> None:
    """Makes sure that a run goes on with the data that it was begun with; see `Workdir.confirm`.

    Args:
      workdir: of the run.
      arrays: trees of all the arrays that results depend on.
      facts: what to show when they are others, such as a data set's `info`.
    """
    if workdir.writes:
        workdir.confirm("data", {"digest": arrays_digest(*arrays), **facts})


def execute(
    experiment: Experiment, spec: Any, path: Path, tables: Tables, *, command: Sequence[str] = ()
) -> tuple[Report, Workdir, bool]:
    """Runs an experiment in its workdir, or reads the report of one that is complete there.

    In a distributed run all processes call it with the same arguments; the first one writes.

    Returns:
      The report (empty in processes that do not write), the workdir, and whether it was complete before.

    Raises:
      WorkdirError: see `Workdir.open` and `Workdir.session`; and whatever the experiment raises, after recording it.
      ConfigError: where the parts of a new run do not fit one another, before anything is written; see `probe.check`.
    """
    if hasattr(spec, "validate"):
        spec.validate(tables)
    if not is_first_process():
        workdir = Workdir.follow(path, identity(experiment, spec))
        complete = agreed(False)
        if not complete:
            experiment.run(spec, workdir, tables)
            meet("the experiment is done")
        return NO_REPORT, workdir, complete
    workdir = Workdir.open(path, identity(experiment, spec), command=command)
    sources = _sources(experiment, spec, tables)
    changed = ", ".join(workdir.changes(sources))
    before = _complete_report(experiment, workdir)
    if agreed(before is not None) and before is not None:
        if changed:
            said = "computed before this changed: %s; to compute it anew, give another --workdir or delete this one"
            _log.warning(f"%s: {said}", workdir.path, changed)
        return before, workdir, True
    is_part = (workdir.path.parent / "run.json").exists()  # of a run, which was looked at with all its parts
    if workdir.status is None and not is_part:
        probe.check(spec, tables)
    with workdir.session(sources):
        if changed:
            _log.warning("%s: goes on although this changed since it was begun: %s", workdir.path, changed)
        report = experiment.run(spec, workdir, tables)
        save_json(workdir.results / "report.json", report)
        experiment.drawn(workdir)
    meet("the experiment is done")
    return report, workdir, False


def _sources(experiment: Experiment, spec: Any, tables: Tables) -> dict[str, str | None]:
    """Digests of the files behind a run: those that its data are read from, and the modules of one's own it calls.

    Data that are not here, as on another machine, have none.
    """
    called, found = [experiment.run], {}
    for chosen in _components(spec):
        called += [table[chosen.name] for table in tables[1:] if chosen.name in table]
        if isinstance(path := chosen.settings.get("path"), str) and Path(path).is_file():
            found[f"file {path}"] = digest_or_none(Path(path))
        if (digest := contents_digest(chosen.name, str(chosen.settings.get("data_dir", "")))) is not None:
            found[f"data set {chosen.name}"] = digest
    for name in sorted({str(getattr(entry, "__module__", None)) for entry in called}):
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is not None and name.partition(".")[0] != __name__.partition(".")[0]:
            found[f"module {name}"] = digest_or_none(Path(file))
    return found


def _components(value: Any) -> Iterator[Component]:
    """The table entries that a spec names."""
    if isinstance(value, Component):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _components(getattr(value, field.name))
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _components(item)


def _complete_report(experiment: Experiment, workdir: Workdir) -> Report | None:
    """The report of a run that is complete here, once results and figures are as they were written; else None.

    Figures that are gone are drawn again, or said where that cannot be; results that are gone are said.
    """
    damaged = workdir.damaged()
    if damaged is None:
        return None
    pictures = [name for name in damaged if Path(name).parts[0] == "figures"]
    if len(pictures) < len(damaged) or (pictures and experiment.draw is None):
        _log.warning("%s: damaged or gone, computed again: %s", workdir.path, ", ".join(damaged))
        return None
    try:
        report = Report(**load_json(workdir.path / "results" / "report.json"))
        if pictures:
            _log.warning("%s: damaged or gone, drawn again: %s", workdir.path, ", ".join(pictures))
            with workdir.repair():
                experiment.drawn(workdir)
    except (OSError, WorkdirError) as error:
        _log.warning("%s: the figures could not be drawn again: %s", workdir.path, error)
    except (DamagedFileError, TypeError) as error:
        _log.warning("%s: computed again: %s", workdir.path, error)
        return None
    return report
