"""What `scripts/run.py` does, kept here so that it can be tested and called: arguments in, experiment out.

Exit status: 0 when all went well; 2 for what the user can mend, with one message; 1 for a defect, with a traceback; 130
after Ctrl-C and 143 after SIGTERM, with what is done kept.  A distributed run that has lost a process can be mended.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import humanize
import jax
from ml_collections import ConfigDict

from dualgap_jax import experiments, interrupts, machine, sharding, summary, terminal
from dualgap_jax import report as report_pages
from dualgap_jax.config import ConfigError, load, override, require
from dualgap_jax.experiments import TABLES, Tables
from dualgap_jax.registry import Table, unknown

_log = logging.getLogger(__name__)


def shipped() -> Path:
    """The folder of the configs that come with the package: beside it in a clone, inside it when installed."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "configs"


def located(text: str) -> str:
    """The path of a config and its argument: `figure1:smoke` is the file that comes with the package, from any folder.

    A path that exists is taken as it is; a name, with or without `.py`, or `configs/NAME.py` is looked for in the
    folder `configs` here and among those of the package.

    Raises:
      ConfigError: for a name that is neither here nor there.
    """
    given, colon, argument = text.partition(":")
    path = Path(given)
    if path.is_file() or path.parent not in (Path(), Path("configs")):
        return text
    here, name = Path("configs"), path.name.removesuffix(".py")
    for folder in (here, shipped()):
        if (folder / f"{name}.py").is_file():
            return f"{folder / name}.py{colon}{argument}"
    names = sorted({p.stem for folder in (here, shipped()) for p in folder.glob("*.py")})
    raise ConfigError(unknown("config", name, names))


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of leaving."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help.")


class _Once(argparse.Action):
    """A flag that may be given once."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        if before is not None:
            parser.error(f"{option_string} is given twice, as {before} and {values}: give it once")
        setattr(namespace, self.dest, values)


_USAGE = {
    "dualgap run": "dualgap run NAME:KEY=VALUE,... [--workdir=DIR] [--config.a.b=v] ...",
    "run.py": "python scripts/run.py --config=FILE:KEY=VALUE,... [--workdir=DIR] [--config.a.b=v] ...",
}


def _parser(description: str | None, program: str = "run.py") -> _Parser:
    parser = _Parser(
        program,
        usage=_USAGE[program],
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def once(flag: str, help: str, **kind: Any) -> None:
        parser.add_argument(flag, action=_Once, help=help, **kind)

    once("--config", "config file, with the argument of its get_config after a colon", metavar="FILE:ARG")
    parser.add_argument("--config.KEY", dest="_", metavar="VALUE", help="change a leaf of the config; may be repeated")
    once("--workdir", "folder to work in; by default runs/NAME-HASH of the configuration", metavar="DIR")
    once("--certify", "say how far the networks of a finished run are from the optimum, and exit", metavar="WORKDIR")
    parser.add_argument("--list", action="store_true", help="print the experiments and the config files, and exit")
    parser.add_argument(
        "--extend",
        action="append",
        default=[],
        metavar="MODULE",
        help="module with extend(tables) -> tables that adds entries of your own; may be repeated",
    )
    once("--coordinator", "process 0 of a distributed run", metavar="HOST:PORT")
    once("--num_processes", "number of processes of a distributed run", type=int, metavar="N")
    once("--process_id", "which of them this is, from 0", type=int, metavar="K")
    parser.add_argument("--distributed", action="store_true", help="join a distributed run as the cluster says")
    once("--cpu_devices", "number of virtual devices on CPU, to try a mesh", type=int, metavar="N")
    return parser


def parse(argv: Sequence[str], description: str | None = None, program: str = "run.py") -> argparse.Namespace:
    """Reads the command line; loads the config file and changes its leaves, once.

    Args:
      argv: the command line after the program's name.
      description: what `--help` prints above the flags.
      program: 'run.py' or 'dualgap run', for `--help`.

    Returns:
      The flags; `config` is a ConfigDict or None, `name` the name of its file, `changes` the arguments that change it.

    Raises:
      ConfigError: for an argument that is unknown, given twice or without its dashes, a missing file, a bad argument
        after its colon, or an override that does not fit.
    """
    flags, rest = _parser(description, program).parse_known_args(list(argv))
    overrides: dict[str, str | None] = {}
    waiting = list(rest)
    while waiting:
        item = waiting.pop(0)
        if not item.startswith("--config."):
            raise ConfigError(_leftover(item))
        key, equals, text = item.removeprefix("--config.").partition("=")
        value: str | None = text
        if not equals:
            value = waiting.pop(0) if waiting and not _is_flag(waiting[0]) else None
        require(key not in overrides, f"--config.{key} is given twice: give it once.")
        overrides[key] = value
    flags.name, flags.given = None, flags.config
    flags.changes = [f"--config.{key}" + ("" if text is None else f"={text}") for key, text in overrides.items()]
    flags.changes += [f"--extend={module}" for module in flags.extend]
    if flags.config is None:
        require(not overrides, f"--config.{next(iter(overrides), '')} without --config=configs/NAME.py; give both.")
        return flags
    if flags.extend and "" not in sys.path:
        sys.path.insert(0, "")  # a config may import the modules of its extensions
    flags.name = Path(flags.config.partition(":")[0]).stem
    flags.config = override(load(located(flags.config)), overrides)
    return flags


def _is_flag(text: str) -> bool:
    return text.startswith("--") or text.partition("=")[0].startswith(("config.", "config="))


def _leftover(item: str) -> str:
    """What to say of an argument that nothing reads."""
    known = [action.option_strings[-1] for action in _parser(None)._actions if action.option_strings]
    name, equals, value = item.partition("=")
    bare = name.lstrip("-")
    if bare == "config" or bare.startswith("config.") or f"--{bare}" in known:
        return f"argument {item!r} is not read without its two dashes: write --{bare}{equals}{value}"
    near = difflib.get_close_matches(f"--{bare}", known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"unknown argument {item!r}.{hint} Allowed: {', '.join(sorted(known))}."


def extended(modules: Sequence[str], tables: Tables = TABLES) -> Tables:
    """The tables after `extend(tables)` of each module; the current folder is importable.

    Raises:
      ConfigError: if a module cannot be imported or has no `extend` that returns tables.
    """
    if modules and "" not in sys.path:
        sys.path.insert(0, "")
    for name in modules:
        path = name.removesuffix(".py").replace(os.sep, ".").strip(".")
        named = not name.startswith(".") and os.sep not in name and not name.endswith(".py")
        require(named, f"--extend={name}: give the name of a module, not a path: --extend={path}.")
        try:
            module = importlib.import_module(name)
        except (ImportError, SyntaxError, ValueError) as error:
            raise ConfigError(f"--extend={name}: {error}; give a module that can be imported from here.") from error
        require(hasattr(module, "extend"), f"--extend={name}: the module defines no extend(tables) -> tables.")
        tables = module.extend(tables)
        require(isinstance(tables, Tables), f"--extend={name}: extend(tables) must return tables, not {tables!r:.60}.")
    return tables


def listing(tables: Tables = TABLES, configs: Path | None = None) -> str:
    """The registered experiments, branches, data sets, losses and planar sets, and the config files, a line each."""
    lines = []
    each: tuple[Table[Any], ...] = tables
    for title, table in zip(("Experiments", "Branches", "Data sets", "Losses", "Planar sets"), each, strict=True):
        width = max(16, *map(len, table))
        lines += [f"{title}:", *(f"  {name:<{width}} {table.describe(name)}" for name in table), ""]
    configs = shipped() if configs is None else configs
    lines.append("Configs (--config=configs/NAME.py:KEY=VALUE,... or dualgap run NAME:KEY=VALUE,...):")
    for path in sorted(configs.glob("*.py")):
        head = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        lines.append(f"  {path.name:<20} {head}")
    return "\n".join(lines)


def join(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    distributed: bool,
    cpu_devices: int | None,
) -> None:
    """Sets up devices and processes, before anything is computed.

    Raises:
      ConfigError: if the flags do not fit one another, or the run cannot be joined; see `sharding.join`.
    """
    if cpu_devices is not None:
        require(1 <= cpu_devices <= 1024, f"--cpu_devices={cpu_devices} must lie between 1 and 1,024.")
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    given = (coordinator, num_processes, process_id)
    if distributed or any(g is not None for g in given):
        sharding.join(*given)


def run(
    config: ConfigDict | None,
    name: str | None,
    workdir: str | None,
    tables: Tables,
    command: Sequence[str],
    given: str | None = None,
    changes: Sequence[str] = (),
) -> None:
    """Runs a config, and prints what `summary.lines` says of it.

    Args:
      config: what to run; None is an error that says how to name one.
      name: of the folder of the run when `workdir` is None.
      workdir: the folder to work in, or None.
      tables: the registry.
      command: the command line, for the run card.
      given: how the config was named, `FILE:ARG`; from it follows what the run has less of than the config in full.
      changes: the arguments that change it or bring entries in, for the command of the run in full.
    """
    if config is None:
        raise ConfigError(
            "no config given: use --config=configs/NAME.py:KEY=VALUE or dualgap run NAME:KEY=VALUE; --list prints them."
        )
    # Before the run: a config file that is edited meanwhile changes nothing.
    compared = _compared(config, given, changes)
    began = time.monotonic()
    with terminal.spoken(sharding.is_first_process()):
        report, folder, was_complete = experiments.run(
            config, tables=tables, name=name, workdir=workdir, command=command
        )
        if not folder.writes:
            return
        shown = _page(folder.path, anew=not was_complete)
        if not was_complete:
            peak = machine.peak_memory()
            size = f", peak memory {humanize.naturalsize(peak)}" if peak else ""
            terminal.say(f"done in {terminal.duration(time.monotonic() - began)}{size}")
    if was_complete:
        print(
            f"Complete already; nothing was computed. To start over, delete {folder.path} or give another --workdir.\n"
        )
    for line in summary.lines(report, folder.path, page=shown, **compared):
        print(line)


def _compared(config: ConfigDict, given: str | None, changes: Sequence[str] = ()) -> dict[str, str]:
    """How the settings of a run differ from those of its config, in full and as named; see `summary.lines`."""
    if given is None:
        return {}
    as_named, full = load(located(given)), summary.without_smoke(given)
    changed = summary.difference(config, as_named, "in the config")
    if full == given:
        return {"changed": changed}
    reduced = summary.difference(as_named, load(located(full)), "in full", still=config)
    return {"changed": changed, "reduced": reduced, "again": shlex.join([full, *changes]) if reduced else ""}


def certify(workdir: str | Path, tables: Tables) -> None:
    """Prints how far the networks of a finished run are from the global optimum, and writes its report anew."""
    from dualgap_jax.experiments.certify_run import certify_run  # which few commands need

    found = certify_run(workdir, tables, lambda line: print(line, flush=True))
    print("\n".join(found.notes))
    if (shown := _page(Path(workdir), anew=True)) is not None:
        print(f"report: {shown}")


def _page(folder: Path, anew: bool) -> Path | None:
    """The HTML report of a run, written if it is new or gone; None where it could not be: that is no reason to fail."""
    path = folder / "report.html"
    try:
        if not anew and path.exists():
            return path
        with terminal.Progress(None, "report"):
            return report_pages.write([folder], path)
    except (OSError, ValueError) as error:
        _log.warning("the report could not be written: %s", error)
        return None


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turns what a user can mend into one message and exit status 2; an interruption into status 130 or 143."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if (interruption := interrupts.behind(error)) is not None:
            name, code = ("SIGTERM", 143) if isinstance(interruption, interrupts.Terminated) else ("Ctrl-C", 130)
            interrupts.leave(code, f"\n{name}: stopped; what is done is kept, and the same command goes on.")
        if isinstance(error, BrokenPipeError):  # whoever reads the output has had enough
            terminal.reader_is_gone()
            return
        if (said := message(error)) is None:
            if sharding.is_alone():
                raise
            traceback.print_exc()
            _exit(1)
        print(said, file=sys.stderr)
        _exit(2)


def _exit(status: int) -> NoReturn:
    """Ends the process; one of several at once, so that the others do not wait for it in vain."""
    if sharding.is_alone():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def message(error: BaseException) -> str | None:
    """What to say of an error that a user can mend; None for a defect."""
    name = type(error).__name__
    if type(error).__module__.partition(".")[0] == "dualgap_jax":
        return f"{name}: {error}"
    if isinstance(error, OSError):
        return f"{name}: {error}; what is done is kept, and the same command goes on once this is mended."
    if isinstance(error, MemoryError) or (name == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)):
        return f"out of memory ({error!s:.200}); give the run more of it, or make it smaller."
    if isinstance(error, RuntimeError) and "Unable to initialize backend" in str(error):
        return f"{error!s:.300}; JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS')!r}: unset it, or name 'cpu'."
    if name == "JaxRuntimeError" and not sharding.is_alone():
        return (
            f"another process of this run has ended, or cannot be reached ({error!s:.200}); what is done is kept: start"
            " all processes again with the same command, and they go on from the newest checkpoint."
        )
    return None


def main(argv: Sequence[str], description: str | None = None) -> None:
    """The whole of `scripts/run.py`; see the head of this module for how it ends.

    Args:
      argv: the command line, with the program's name.
      description: what `--help` prints above the flags.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a letter that the terminal lacks is no reason to stop
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with interrupts.raised(interrupts.PATIENCE), errors_in_one_line():
        flags = parse(argv[1:], description, argv[0] if argv[0] in _USAGE else "run.py")
        join(flags.coordinator, flags.num_processes, flags.process_id, flags.distributed, flags.cpu_devices)
        tables = extended(flags.extend)
        if flags.list:
            print(listing(tables))
        elif flags.certify is not None:
            require(flags.config is None, "--certify reads the config of the run: give it without --config.")
            certify(flags.certify, tables)
        else:
            run(flags.config, flags.name, flags.workdir, tables, argv, flags.given, flags.changes)
        sys.stdout.flush()
