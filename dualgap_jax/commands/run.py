"""`dualgap run` and `dualgap list`: `scripts/run.py` under a name, with the config as first argument."""

from __future__ import annotations

from collections.abc import Sequence

from dualgap_jax import cli

_HELP = """Runs an experiment of the paper, or one of your own, from a config.

Examples:
  dualgap run figure1
  dualgap run mnist_1layer:I=100 --config.training.learning_rate=0.05
  dualgap run my_configs/mine.py:I=5 --extend=mine

A config is named as `dualgap list` prints it, or by the path of its file.  The same command again resumes an unfinished
run, or prints the results of a finished one.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command line after `dualgap run`; ends the process unless all went well, see `cli.main`."""
    given = list(arguments)
    if given and not given[0].startswith("-"):
        given[0] = f"--config={given[0]}"
    cli.main(["dualgap run", *given], _HELP)
    return 0
