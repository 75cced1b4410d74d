"""Draws the figures of finished runs again, from their saved records only.

    dualgap plot WORKDIR [WORKDIR ...]

Each WORKDIR is the work folder of a run (it holds `results/`); the figures go to its `figures/` as PNG and PDF.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dualgap_jax import figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws each work folder and prints the paths; returns 1 when one of them could not be drawn, else 0."""
    parser = argparse.ArgumentParser(
        "dualgap plot", description="Draw the figures of finished runs from their saved records."
    )
    parser.add_argument("workdir", nargs="+", type=Path, help="a work folder, which holds results/")
    failed = False
    for workdir in parser.parse_args(arguments).workdir:
        try:
            for path in figures.draw(workdir):
                print(path)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
    return int(failed)
