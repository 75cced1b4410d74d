"""`dualgap report`: one HTML file that shows one run, or compares several, and opens offline."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dualgap_jax import report
from dualgap_jax.config import ConfigError, require
from dualgap_jax.files import local_path, utf8


def main(arguments: Sequence[str]) -> int:
    """Writes the report and prints its path.

    Returns:
      0; 1 when a run has no table for `--csv`; 2 for a folder that holds no run, and a file that cannot be written.
    """
    parser = argparse.ArgumentParser("dualgap report", description=__doc__)
    parser.add_argument("workdir", nargs="+", type=Path, help="a work folder; several are shown one after the other")
    said = "the HTML file (default: WORKDIR/report.html of one run, ./report.html of several)"
    parser.add_argument("--output", type=Path, help=said)
    parser.add_argument("--csv", type=Path, help="write the tables here too, numbers in full")
    options = parser.parse_args(list(arguments))
    status = 2
    try:
        alone = len(options.workdir) == 1
        output = options.output or (options.workdir[0] if alone else Path()) / "report.html"
        require(
            alone or options.output is not None or not Path("run.json").exists(),
            "this is the folder of a run, whose own page is report.html: name the page of several by --output.",
        )
        print(report.write(options.workdir, output))
        if options.csv is not None:
            status = 1
            table = utf8(report.table_csv(options.workdir))
            status = 2
            local_path(options.csv, "the table").write_bytes(table)
            print(options.csv)
    except BrokenPipeError:
        raise
    except (report.NothingToReportError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return status
    return 0
