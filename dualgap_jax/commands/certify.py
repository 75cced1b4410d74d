"""How far the networks of a finished run are from the global optimum, as far as that can be proven.

    dualgap certify WORKDIR [WORKDIR ...]

For each network: its risk, a proven lower bound on the risk of every network of such branches, however many, an
estimated one, and how far it is from the optimum at most.  WORKDIR is the work folder of a landscape, a row of them, or
a study of regimes.  The same command again goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dualgap_jax import cli, interrupts


def main(arguments: Sequence[str] | None = None) -> int:
    """Certifies the networks of each work folder; returns 0, or ends the process as `cli.main` says."""
    parser = argparse.ArgumentParser(
        "dualgap certify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", nargs="+", type=Path, help="the work folder of a finished run")
    parser.add_argument("--extend", action="append", default=[], metavar="MODULE", help="as for dualgap run")
    options = parser.parse_args(arguments)
    with interrupts.raised(interrupts.PATIENCE), cli.errors_in_one_line():
        tables = cli.extended(options.extend)
        for workdir in options.workdir:
            cli.certify(workdir, tables)
    return 0
