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
from dualgap_jax.files import DamagedFileError, load_json
from dualgap_jax.workdir import Workdir


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws each work folder and prints the paths.

    Returns:
      0; 1 when one of the folders could not be drawn; 2 when none of them holds results.
    """
    parser = argparse.ArgumentParser(
        "dualgap plot", description="Draw the figures of finished runs from their saved records."
    )
    parser.add_argument("workdir", nargs="+", type=Path, help="a work folder, which holds results/")
    failed = False
    workdirs = parser.parse_args(arguments).workdir
    for workdir in workdirs:
        try:
            for path in _drawn(workdir):
                print(path)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
    if failed and not any((workdir / "results").is_dir() for workdir in workdirs):
        return 2
    return int(failed)


def _drawn(workdir: Path) -> list[Path]:
    """Draws a work folder; the card of a complete run keeps the digests of its new figures.

    Raises:
      ValueError: where the records are not what the run wrote, and as `figures.draw` and `Workdir.repair` do.
    """
    try:
        config = load_json(workdir / "config.json")
    except (FileNotFoundError, DamagedFileError):  # records alone
        return figures.draw(workdir)
    run = Workdir.open(workdir, config)
    if names := [name for name in run.damaged() or () if "results" in Path(name).parts]:
        raise ValueError(
            f"{workdir} is not as the run left it, gone or changed: {', '.join(names[:5])}; the run's own command"
            " mends that."
        )
    with run.repair():
        return figures.draw(workdir)
