"""`dualgap sweep`: a config for every combination of some values, each in a folder of its own, and one table.

    dualgap sweep mnist_1layer --over I=1,3,5 --over seed=0..4
    dualgap sweep figure1:smoke --over config.cell.training.learning_rate=0.05,0.1 --workdir=rates

KEY is an argument of the config (as in NAME:KEY=VALUE) or, with `config.` before it, a leaf of it.  VALUES stand
between commas, or between semicolons where they hold commas; A..B are whole numbers.  The same command again goes on
where it stopped.  The table goes to WORKDIR/sweep.csv after every run; a run that fails is named in it and stops no
other.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dualgap_jax import cli, experiments, interrupts, report, terminal
from dualgap_jax.config import ConfigError, check_numbers, require, spec_of
from dualgap_jax.experiments import Report
from dualgap_jax.experiments.base import identity
from dualgap_jax.files import local_path, text_digest, utf8, write_atomically
from dualgap_jax.workdir import Workdir

_MOST = 10_000  # runs of a sweep
_BESIDE = ("run", "error")  # columns of the table that are of the sweep


class Run(NamedTuple):
    """One combination: its values by key, the config with them, and the name of its folder."""

    values: dict[str, str]
    config: Any
    folder: str


def values_of(text: str) -> tuple[str, list[str]]:
    """'I=1,3' -> ('I', ['1', '3']); 'seed=0..2' -> ('seed', ['0', '1', '2']).

    Raises:
      ConfigError: for a text without a key or values, or with a value twice.
    """
    key, equals, listed = text.partition("=")
    items = [item.strip() for item in listed.split(";" if ";" in listed else ",")]
    values: list[str] = []
    for item in items:
        span = re.fullmatch(r"(\d+)\.\.(\d+)", item)
        if span is None:
            values.append(item)
            continue
        first, last = map(int, span.groups())
        require(first <= last < first + _MOST, f"--over {text}: {item} must go up, over at most {_MOST:,} numbers.")
        values += map(str, range(first, last + 1))
    require(
        bool(key and equals and all(values)),
        f"--over {text!r}: write a key and its values, as in --over I=1,3,5 or --over seed=0..4.",
    )
    require(len(set(values)) == len(values), f"--over {text!r}: a value is given twice.")
    return key, values


def combinations(over: Mapping[str, Sequence[str]], arguments: Sequence[str]) -> Iterator[Run]:
    """The configs of all combinations, the last key running fastest; `arguments` begin with `--config=NAME:ARG`."""
    for chosen in itertools.product(*over.values()):
        values = dict(zip(over, chosen, strict=True))
        given, *rest = arguments
        inside = ",".join(f"{k}={v}" for k, v in values.items() if not k.startswith("config."))
        if inside:
            given += ("," if ":" in given else ":") + inside
        leaves = [f"--{k}={v}" for k, v in values.items() if k.startswith("config.")]
        label = ",".join(map("=".join, zip(_names(list(over)), chosen, strict=True)))
        folder = re.sub(r"[^\w=.,+-]", "_", label)[:150]
        yield Run(values, cli.parse([given, *leaves, *rest]).config, folder)


def main(arguments: Sequence[str]) -> int:
    """Runs a sweep; returns 1 when a run of it failed, else 0, and ends the process as `cli.main` says."""
    given = list(arguments)
    if not given or {"-h", "--help"} & set(given):
        print(__doc__)
        return 0 if given else 2
    with interrupts.raised(interrupts.PATIENCE), cli.errors_in_one_line():
        texts = []
        while (at := next((i for i, item in enumerate(given) if item.partition("=")[0] == "--over"), None)) is not None:
            flag = given.pop(at)
            require("=" in flag or at < len(given), "--over needs KEY=VALUES, as in --over I=1,3,5.")
            texts.append(flag.partition("=")[2] if "=" in flag else given.pop(at))
        over: dict[str, list[str]] = {}
        for text in texts:
            key, values = values_of(text)
            require(key not in over, f"--over {key}= is given twice: give all its values at once.")
            over[key] = values
        require(bool(over), "a sweep needs --over KEY=VALUES, as in --over I=1,3,5 or --over seed=0..4.")
        named = "name the config first: dualgap sweep NAME:KEY=VALUE,... --over ..."
        require(bool(given), named)
        if not given[0].startswith("-"):
            given[0] = f"--config={given[0]}"
        require(given[0].startswith("--config="), named)
        return _sweep(over, given, ["dualgap", "sweep", *arguments])
    return 0


def _sweep(over: Mapping[str, Sequence[str]], given: Sequence[str], command: Sequence[str]) -> int:
    flags = cli.parse(given)
    tables = cli.extended(flags.extend)
    several = flags.distributed or {flags.coordinator, flags.num_processes, flags.process_id} != {None}
    require(not several, "a sweep runs in one process: several processes run a single config.")
    cli.join(None, None, None, False, flags.cpu_devices)
    count = 1
    for values in over.values():
        count *= len(values)
    require(count <= _MOST, f"a sweep of {count:,} runs is more than {_MOST:,}: give fewer values.")
    runs = list(combinations(over, given))
    require(len({run.folder for run in runs}) == len(runs), "two runs would share a folder: give shorter values.")
    digest = text_digest(repr([(run.folder, run.config.to_json()) for run in runs]))[:8]
    root = local_path(flags.workdir or f"runs/{flags.name}-sweep-{digest}", "the work folder")
    own = next((name for name in ("config.json", "run.json") if (root / name).exists()), None)
    require(own is None, f"{root} is the folder of a run, it holds {own}: give the sweep another --workdir.")
    for run in runs:  # a mistake is said before anything is computed
        experiment = tables.experiments[run.config["experiment"]]
        spec: Any = spec_of(run.config, experiment.spec)
        check_numbers(spec)
        if hasattr(spec, "validate"):
            spec.validate(tables)
        Workdir.open(root / run.folder, identity(experiment, spec))  # which refuses the folder of another run
    _check_table(root / "sweep.csv", [run.folder for run in runs])
    done: list[tuple[Run, Report | str]] = []
    with terminal.spoken():
        for number, run in enumerate(runs, 1):
            with terminal.part(f"{run.folder} ({number} of {len(runs)})"):
                try:
                    found, _, _ = experiments.run(run.config, tables=tables, workdir=root / run.folder, command=command)
                except Exception as error:
                    said = cli.message(error)
                    if said is None or isinstance(error, OSError):
                        raise
                    terminal.say(f"{run.folder}: {said}")
                    done.append((run, said))
                else:
                    done.append((run, found))
            _write_csv(root / "sweep.csv", list(over), done)
        finished = [root / run.folder for run, result in done if isinstance(result, Report)]
        page = report.write(finished, root / "report.html") if finished else None
    print(_table(list(over), done).text())
    print(f"table: {root / 'sweep.csv'}")
    if page is not None:
        print(f"report: {page}")
    return int(len(finished) < len(done))


def _check_table(path: Path, folders: Sequence[str]) -> None:
    """Refuses to write over the table of a sweep with runs that are none of these; a damaged table is written anew."""
    if not path.is_file():
        return
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            listed = {row.get("run") or "" for row in csv.DictReader(file)}
    except csv.Error:
        return
    others = sorted((listed & {run.name for run in path.parent.iterdir() if run.is_dir()}) - set(folders))
    if others:
        raise ConfigError(
            f"{path} has runs that are not of this sweep, {others[0]} for one: give another --workdir, or their values"
            " too in --over."
        )


def _rows(keys: Sequence[str], done: Sequence[tuple[Run, Report | str]]) -> tuple[list[str], list[list[Any]]]:
    """One table of all: the values swept over, then the columns of any of the runs but those that say the same."""
    names = _names(keys)
    heads = [_heads(result, names) for _, result in done]
    told = {f"{name} of the run": key for key, name in zip(keys, names, strict=True)}
    lines: list[tuple[Run, dict[str, Any]]] = []
    for (run, result), head in zip(done, heads, strict=True):
        lines += [(run, dict(zip(head, row, strict=True))) for row in _lines(result)]
    columns = [
        column
        for column in dict.fromkeys(column for head in heads for column in head)
        if column not in told
        or any(column in cells and str(cells[column]) != run.values[told[column]] for run, cells in lines)
    ]
    rows = [[*run.values.values(), *(cells.get(column) for column in columns)] for run, cells in lines]
    return [*names, *columns], rows


def _names(keys: Sequence[str]) -> list[str]:
    """The names of what is swept over: the last part of each key, or all of it where that is not its own."""
    short = [key.rpartition(".")[2] for key in keys]
    names = [name if short.count(name) == 1 else key for key, name in zip(keys, short, strict=True)]
    return [f"{name} swept over" if name in _BESIDE else name for name in names]


def _heads(result: Report | str, names: Sequence[str]) -> list[str]:
    return report.distinct(result.columns, [*_BESIDE, *names]) if isinstance(result, Report) else []


def _write_csv(path: Path, keys: Sequence[str], done: Sequence[tuple[Run, Report | str]]) -> None:
    """Writes the table, numbers in full, each row with the folder of its run and what went wrong, if anything did."""
    columns, rows = _rows(keys, done)
    said = [(run.folder, result if isinstance(result, str) else "") for run, result in done for _ in _lines(result)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", *columns, "error"])
    for (folder, error), row in zip(said, rows, strict=True):
        writer.writerow([folder, *map(report.in_full, row), error])
    write_atomically(path, lambda file: file.write(utf8(out.getvalue())))


def _lines(result: Report | str) -> Sequence[Any]:
    return result.rows if isinstance(result, Report) else [()]


def _table(keys: Sequence[str], done: Sequence[tuple[Run, Report | str]]) -> Report:
    columns, rows = _rows(keys, done)
    failed = [f"{run.folder}: {result}" for run, result in done if isinstance(result, str)]
    bounds: dict[str, str] = {}
    for _, result in done:
        if isinstance(result, Report):
            heads = zip(_heads(result, _names(keys)), result.columns, strict=True)
            bounds |= {head: result.bounds[column] for head, column in heads if column in result.bounds}
    return Report(f"{len(done)} runs", columns, rows, failed, bounds)
