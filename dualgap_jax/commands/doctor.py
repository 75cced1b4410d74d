"""What this machine has, and what is missing: the first thing to look at, and to send, when something does not work."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import humanize

from dualgap_jax import cli, data, machine
from dualgap_jax.figures import page

_LEAST_DISK = 2**30
DATA_SETS = ("mnist", "cifar10")


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
      state: 'ok', 'note' (a part is missing that not everything needs), or 'broken'.
      what: what was looked at.
      said: what was found, and what to do about it.
    """

    state: Literal["ok", "note", "broken"]
    what: str
    said: str


def _packages() -> Iterator[Finding]:
    facts = machine.facts()
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    yield Finding("ok", "dualgap_jax", f"{machine.own_version()}, Python {facts['python']}, {facts['platform']}")
    missing = [name for name, version in facts["packages"].items() if version is None]
    yield Finding("broken" if missing else "ok", "packages", versions)
    git = facts["git"]
    if git is not None:
        yield Finding("ok", "source", f"commit {git['commit'][:12]}{', with changes' if git['dirty'] else ''}")
    for device in facts["devices"]:
        yield Finding("ok", "devices", f"{device['count']} x {device['platform']}, {device['kind']}")


def _room() -> Iterator[Finding]:
    available = machine.memory_available()
    yield Finding("ok", "memory", f"{humanize.naturalsize(available)} available, {os.cpu_count()} CPU cores")
    free = shutil.disk_usage(".").free
    low = free < _LEAST_DISK
    here = Path.cwd()
    writable = os.access(here, os.W_OK)
    said = f"{humanize.naturalsize(free)} free in {here}"
    if not writable:
        said += "; it cannot be written: give runs a --workdir elsewhere"
    yield Finding("note" if low or not writable else "ok", "disk", said)


def _data_sets() -> Iterator[Finding]:
    for name in DATA_SETS:
        try:
            prepared = data.find_prepared(name, "")
            yield Finding("ok", name, str(prepared.folder))
        except (ValueError, OSError) as error:
            yield Finding("note", name, f"{str(error).splitlines()[0]} Prepare it: dualgap prepare-data {name}")
    folder = data.cache_dir()
    if folder is None:
        yield Finding("note", "cache", "no home folder: data are standardised anew by every run; set XDG_CACHE_HOME")
        return
    nearest = next((p for p in (folder, *folder.parents) if p.exists()), folder)
    able = os.access(nearest, os.W_OK)
    yield Finding(
        "ok" if able else "note",
        "cache",
        str(folder) if able else f"{folder} cannot be written: data are standardised anew by every run",
    )


def _optional() -> Iterator[Finding]:
    with page.any_backend():
        yield Finding("ok", "figures", "matplotlib draws")
    configs = sorted(cli.shipped().glob("*.py"))
    yield Finding("ok" if configs else "broken", "configs", f"{len(configs)} in {cli.shipped()}")
    for module, use in (
        ("plotly", "surfaces in reports that can be turned"),
        ("tensorboardX", "event files of --config.tensorboard=True"),
    ):
        there = importlib.util.find_spec(module) is not None
        yield Finding("ok" if there else "note", module, use if there else f"not installed: no {use}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_packages, _room, _data_sets, _optional)


def findings() -> Iterator[Finding]:
    """All findings, as they are made; a check that fails is a finding itself."""
    for check in CHECKS:
        try:
            yield from check()
        except Exception as error:  # the doctor must not be the patient
            yield Finding("broken", check.__name__.strip("_"), f"{type(error).__name__}: {error}")


def main(arguments: Sequence[str]) -> int:
    """Prints the findings; returns 1 when something is broken, else 0."""
    argparse.ArgumentParser("dualgap doctor", description=__doc__).parse_args(list(arguments))
    broken = False
    for state, what, said in findings():
        print(f"{state:<7} {what:<13} {said}", flush=True)
        broken |= state == "broken"
    return int(broken)
