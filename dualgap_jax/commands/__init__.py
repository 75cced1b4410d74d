"""The command `dualgap`: what `scripts/` does, from any folder, for whoever installed the package.

    dualgap run figure1:smoke

Nothing is imported before it is known what is wanted, so that help comes at once.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence

from dualgap_jax import machine

# Command -> (module below this one, what it does in a line).
COMMANDS = {
    "run": ("run", "run an experiment: dualgap run NAME:KEY=VALUE,... [--workdir=DIR] [--config.a.b=v]"),
    "sweep": ("sweep", "run a config for many values: dualgap sweep NAME --over I=1,3,5 --over seed=0..4"),
    "list": ("run", "print the experiments, the parts they are made of, and the configs"),
    "plot": ("plot", "draw the figures of finished runs again: dualgap plot WORKDIR ..."),
    "report": ("report", "show runs on one page that opens offline: dualgap report WORKDIR ... [--csv=FILE]"),
    "certify": ("certify", "say how far a run's networks are from the optimum: dualgap certify WORKDIR ..."),
    "prepare-data": ("prepare", "download and prepare MNIST or CIFAR-10: dualgap prepare-data mnist"),
    "doctor": ("doctor", "say what this machine has, and what is missing"),
}


def usage() -> str:
    """What `dualgap --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {said}" for name, (_, said) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dualgap COMMAND ...    dualgap COMMAND --help    dualgap --version",
            "",
            "Why wide, multi-branch networks are easy to train, measured.",
            "",
            *lines,
            "",
            "Start with: dualgap run figure1:smoke (seconds), then dualgap run figure1 (a minute or two).",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command of `COMMANDS`.

    Args:
      arguments: the command line after the program's name; None is that of the process.

    Returns:
      The exit status: 0; 1 where a part failed; 2 for mistakes, and where the output cannot be written; 0 also where
      the reader of a pipe went away.  `run` ends the process as `cli.main` says.
    """
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:  # what is written only when the process ends has no status
            sys.stdout.flush()
        return status
    except SystemExit as ending:  # with a status of its own, unless what was said has gone nowhere
        if (lost := _lost()) and not ending.code:
            return lost
        raise
    except OSError as error:
        lost = _lost(error)
        if not isinstance(error, BrokenPipeError):
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return lost


def _lost(error: OSError | None = None) -> int:
    """The status after an error of the output, which then goes nowhere: 0 where its reader went away, else 2."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as flushed:
        from dualgap_jax import terminal

        error = error or flushed
        terminal.reader_is_gone()
    return 0 if error is None or isinstance(error, BrokenPipeError) else 2


def _run(given: list[str]) -> int:
    """What the command line asks for; the reader of the output is taken to be there."""
    name = given[0] if given else ""
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"dualgap_jax {machine.own_version()}")
        return 0
    if name not in COMMANDS:
        what = f"unknown command {name!r}." if given else "no command given."
        print(f"{what} Allowed: {', '.join(COMMANDS)}; see dualgap --help.", file=sys.stderr)
        return 2
    from dualgap_jax import terminal

    terminal.open_streams()
    # Imports take a second or two and may not be broken off in the middle.
    at_start = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in at_start.items():
        if handler in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, lambda number, frame: os._exit(128 + number))
    module = importlib.import_module(f"{__name__}.{COMMANDS[name][0]}")
    for number, handler in at_start.items():
        signal.signal(number, handler)
    return int(module.main(given[1:] if name != "list" else ["--list", *given[1:]]))
