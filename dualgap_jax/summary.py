"""What is said when a run is over: its table, what it took, what was reduced, where everything is, what to do next."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dualgap_jax import terminal
from dualgap_jax.experiments import Report
from dualgap_jax.files import leaves

_MOST = 8  # settings named in a line
_SMOKE = "smoke"  # the argument of configs that makes a run small


def without_smoke(given: str) -> str:
    """`FILE:ARG` without its argument `smoke`."""
    path, _, argument = given.partition(":")
    kept = [item for item in argument.split(",") if item and item.partition("=")[0] != _SMOKE]
    return f"{path}:{','.join(kept)}" if kept else path


def difference(now: ConfigDict, before: ConfigDict, word: str, still: ConfigDict | None = None) -> str:
    """'training.max_steps 40 (in full 20,000), ...': the settings that differ, those of `before` behind `word`.

    With `still`, only those of `now` that stand there too.
    """
    theirs = dict(leaves(before.to_dict()))
    kept = dict(leaves((now if still is None else still).to_dict()))
    said = [
        f"{key} {_written(value)}" + (f" ({word} {_written(theirs[key])})" if key in theirs else "")
        for key, value in leaves(now.to_dict())
        if (key not in theirs or theirs[key] != value) and key in kept and kept[key] == value
    ]
    if len(said) > _MOST:
        said[_MOST:] = [f"and {len(said) - _MOST} more in config.json"]
    return ", ".join(said)


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(_written, value)) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def lines(
    report: Report,
    workdir: Path,
    *,
    page: Path | None,
    reduced: str = "",
    changed: str = "",
    again: str = "",
) -> Iterator[str]:
    """What is printed of a run that is over, on standard output.

    Args:
      report: its table.
      workdir: its folder.
      page: the HTML report, or None.
      reduced, changed: how the settings differ from the config's in full, and from those that ship; see `difference`.
      again: what to give `dualgap run` for all of it in full, where this one was reduced.
    """
    title, _, rest = report.text().partition("\n")
    yield terminal.paint(title, "bold", sys.stdout)
    yield rest
    yield ""
    for word, text in (("reduced (smoke)", reduced), ("changed", changed)):
        if text:
            yield terminal.paragraph(f"{word}: {text}")
    for path in sorted((workdir / "figures").glob("*.png")):
        yield f"figure: {path}"
    yield f"workdir: {workdir}"
    steps = []
    if page is not None:
        yield f"report: {terminal.paint(str(page), 'cyan', sys.stdout)}"
        steps.append("open the report in a browser")
    if again:
        steps.append(f"run it in full: dualgap run {again}")
    else:
        steps.append(f"compare runs on one page: dualgap report {workdir} OTHER")
    yield f"next: {'; '.join(steps)}"
