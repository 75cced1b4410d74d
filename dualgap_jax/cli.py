"""What `scripts/run.py` does once flags are parsed; kept here so that it can be tested and called."""

from __future__ import annotations

import ast
import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from dualgap_jax import experiments, sharding
from dualgap_jax.config import ConfigError, load, require
from dualgap_jax.experiments import TABLES, Tables
from dualgap_jax.registry import Table, unknown

CONFIGS = Path("configs")


def extended(modules: Sequence[str], tables: Tables = TABLES) -> Tables:
    """The tables after `extend(tables)` of each module; the current folder is importable.

    Raises:
      ConfigError: if a module cannot be imported or has no `extend`.
    """
    if modules and "" not in sys.path:
        sys.path.insert(0, "")
    for name in modules:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ConfigError(f"--extend={name}: {error}; give a module that can be imported from here.") from error
        require(hasattr(module, "extend"), f"--extend={name}: the module defines no extend(tables) -> tables.")
        tables = module.extend(tables)
    return tables


def listing(tables: Tables = TABLES, configs: Path = CONFIGS) -> str:
    """The registered experiments, branches, data sets, losses and planar sets, and the config files, a line each."""
    lines = []
    each: tuple[Table[Any], ...] = tables
    for title, table in zip(("Experiments", "Branches", "Data sets", "Losses", "Planar sets"), each, strict=True):
        lines += [f"{title}:", *(f"  {name:<16} {table.describe(name)}" for name in table), ""]
    lines.append(f"Configs (--config={configs}/NAME.py:KEY=VALUE,...):")
    for path in sorted(configs.glob("*.py")):
        head = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        lines.append(f"  {path.name:<20} {head}")
    return "\n".join(lines)


def check_arguments(argv: Sequence[str]) -> None:
    """Loads the config file and looks up the overridden keys, so that mistakes there get one clear line.

    Args:
      argv: the command line after the program's name.

    Raises:
      ConfigError: for a missing file, a bad argument after its colon, or an override of a key that is not there.
    """
    names = [item.lstrip("-") for item in argv if item.startswith("-")]
    given = [n.partition("=")[2] for n in names if n.startswith("config=")]
    given += [argv[i + 1] for i, item in enumerate(argv[:-1]) if item in ("-config", "--config")]
    if not given:
        return
    config = load(given[-1])
    for name in names:
        if not name.startswith("config."):
            continue
        keys = name.partition("=")[0].split(".")[1:]
        group = config
        for depth, key in enumerate(keys):
            allowed = list(group) if isinstance(group, ml_collections.ConfigDict) else []
            if key not in allowed:
                raise ConfigError(unknown(f"key in {'.'.join(['config', *keys[:depth]])}:", key, allowed))
            group = group[key]


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
        require(cpu_devices >= 1, f"--cpu_devices={cpu_devices} must be at least 1.")
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    given = (coordinator, num_processes, process_id)
    if distributed or any(g is not None for g in given):
        sharding.join(*given)


def run(
    config: ml_collections.ConfigDict | None,
    filename: str | None,
    workdir: str | None,
    tables: Tables,
    command: Sequence[str],
) -> None:
    """Runs a config and prints its table and where everything is."""
    if config is None:
        raise ConfigError("no config given: use --config=configs/NAME.py:KEY=VALUE; --list prints the configs.")
    name = Path(filename).stem if filename else None
    report, folder, was_complete = experiments.run(config, tables=tables, name=name, workdir=workdir, command=command)
    if not folder.writes:
        return
    if was_complete:
        print(
            f"Complete already; nothing was computed. To start over, delete {folder.path} or give another --workdir.\n"
        )
    print(report.text())
    for path in sorted(folder.figures.glob("*.png")):
        print(f"figure: {path}")
    print(f"workdir: {folder.path}")


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turns the errors that a user can mend into one message and exit status 2, an interruption into status 130."""
    try:
        yield
    except KeyboardInterrupt as error:
        print(
            f"\n{type(error).__name__}: stopped; what is done is kept, and the same command goes on.", file=sys.stderr
        )
        sys.exit(130)
    except (ValueError, LookupError, FileNotFoundError, RuntimeError) as error:
        if not type(error).__module__.startswith("dualgap_jax"):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
