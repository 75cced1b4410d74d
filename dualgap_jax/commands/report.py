"""`dualgap report`: one HTML file that shows one run, or compares several, and opens offline."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dualgap_jax import report
from dualgap_jax.files import utf8


def main(arguments: Sequence[str]) -> int:
    """Writes the report and prints its path; returns 1 when there is nothing to report, else 0."""
    parser = argparse.ArgumentParser("dualgap report", description=__doc__)
    parser.add_argument("workdir", nargs="+", type=Path, help="a work folder; several are shown one after the other")
    parser.add_argument("--output", type=Path, help="the HTML file (default: WORKDIR/report.html of the first)")
    parser.add_argument("--csv", type=Path, help="write the tables here too, numbers in full")
    options = parser.parse_args(list(arguments))
    try:
        print(report.write(options.workdir, options.output or options.workdir[0] / "report.html"))
        if options.csv is not None:
            options.csv.write_bytes(utf8(report.table_csv(options.workdir)))
            print(options.csv)
    except (report.NothingToReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
