"""A report of one run or several: one HTML file that opens offline, and the tables as CSV.

It is made from the records of work folders alone, and holds all that a reader needs to judge and to repeat the run: the
table, surfaces that can be turned, the figures, the configuration, the command, commit, versions and devices.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import humanize

from dualgap_jax.card import CERTIFICATE, OUTPUTS, altered, is_certified
from dualgap_jax.files import DamagedFileError, load_json, load_npz, local_path, utf8, write_atomically
from dualgap_jax.report import page, surfaces

_ALIGNED = "aligned"  # a head that says of the column before it that it is of the aligned surface
SURFACES = (("landscape", "as trained"), (_ALIGNED, _ALIGNED))


class NothingToReportError(ValueError):
    """A folder without the records of a run."""


def write(workdirs: Sequence[str | Path], output: str | Path) -> Path:
    """Writes the report of one run, or of several one after the other on a page.

    Args:
      workdirs: work folders of runs that are complete, or have written some results.
      output: the HTML file.

    Returns:
      The path of the file.

    Raises:
      NothingToReportError: for a folder that holds no run, or no folder at all.
    """
    output = local_path(output, "the report")
    folders = [local_path(workdir, "the work folder") for workdir in workdirs]
    if not folders:
        raise NothingToReportError("give at least one work folder.")
    plots: list[dict[str, Any]] = []
    parts = [_run(folder, plots) for folder in folders]
    title = parts[0][0] if len(parts) == 1 else f"{len(parts)} runs"
    body = "".join(part for _, part in parts)
    if len(parts) > 1:
        links = "".join(f'<li><a href="#run-{k}">{page.text(name)}</a></li>' for k, (name, _) in enumerate(parts))
        inner = "".join(f'<section id="run-{k}">{part}</section>' for k, (_, part) in enumerate(parts))
        body = f"<h1>{page.text(title)}</h1><ul>{links}</ul>{inner}"
    scripts: list[str] = []
    if plots and surfaces.available():
        body += surfaces.embedded(plots)
        scripts = [surfaces.program(), surfaces.DRAW]
    made = utf8(page.whole(title, body, scripts))
    write_atomically(output.resolve(), lambda file: file.write(made))  # through a link, such as /dev/stdout
    return output


def distinct(columns: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """Names of columns that differ from one another, in their order, for a table that is read by names.

    ['barrier', '… aligned', 'I=2', 'I=2'] is ['barrier', 'barrier aligned', 'I=2', 'I=2 (2)'].

    Args:
      columns: the heads of a run's table, in which one may stand for a word more about the column before it.
      taken: names of columns beside them; a head of that name is called 'NAME of the run'.
    """
    names: list[str] = []
    before = ""
    for column in columns:
        if column.startswith("… ") or (column == _ALIGNED and list(columns).count(column) > 1):
            name = f"{before} {column.removeprefix('… ')}".strip()
        else:
            name = before = column
        first = name = f"{name} of the run" if name in taken else name
        number = 1
        while name in names or name in taken:
            number += 1
            name = f"{first} ({number})"
        names.append(name)
    return names


def table_csv(workdirs: Sequence[str | Path]) -> str:
    """The tables of runs as CSV, numbers in full: the folder, then the columns of any of them.

    Raises:
      NothingToReportError: for a folder without a finished table.
    """
    read = []
    for folder in map(local_path, workdirs):
        run = _Run(folder)
        report = run.record("results/report.json")
        if report is None:
            why = run.said() or f"{folder} holds no results/report.json: the run is not complete."
            raise NothingToReportError(why)
        read.append((folder, report))
    heads = [distinct(report["columns"], ["run"]) for _, report in read]
    columns = list(dict.fromkeys(name for names in heads for name in names))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", *columns])
    for (folder, report), names in zip(read, heads, strict=True):
        for row in report["rows"]:
            values = dict(zip(names, row, strict=True))
            writer.writerow([folder, *(in_full(values.get(name)) for name in columns)])
    return out.getvalue()


def in_full(value: Any) -> Any:
    """A cell of a table for a CSV file: of a list its parts, numbers in full, with spaces between them."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, map(in_full, value)))
    return "" if value is None else value


class _Run:
    """The records of a work folder, but for those of a complete run that are not what it wrote, or not its own.

    Attributes:
      card: `run.json`, or None.
      altered: names of what is gone or was changed, or copied from another run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.altered: list[str] = []
        self.card: dict[str, Any] | None = None
        self.card = self.record("run.json")
        self.altered = altered(folder, self.card or {})

    def path(self, name: str) -> Path | None:
        """A file of the run, or None where it was altered, or a complete run did not write it."""
        card = self.card or {}
        vouched = card["files"] if card.get("status") == "complete" and "files" in card else [name]
        own = name in vouched or not OUTPUTS & {*Path(name).parts}
        return self.folder / name if own and name not in self.altered else None

    def record(self, name: str) -> dict[str, Any] | None:
        """A record, or None where there is none, or it is damaged or altered."""
        path = self.path(name)
        try:
            return None if path is None else load_json(path)
        except (FileNotFoundError, DamagedFileError):
            return None

    def said(self) -> str | None:
        """A sentence on what was altered, or None."""
        if not self.altered:
            return None
        names = ", ".join(self.altered[:5]) + (", ..." if len(self.altered) > 5 else "")
        return f"{self.folder} is not as the run left it, gone or changed: {names}. The run's own command mends that."


def _run(folder: Path, plots: list[dict[str, Any]]) -> tuple[str, str]:
    """The name of a run and its part of the page; adds its surfaces to `plots`."""
    run = _Run(folder)
    card, config = run.card, run.record("config.json")
    report = run.record("results/report.json")
    if card is None and report is None:
        raise NothingToReportError(f"{folder} holds no run: give a work folder, the one with run.json and results/.")
    card, config = card or {}, config or {}
    name = (report or {}).get("title") or f"{config.get('experiment', 'run')} in {folder.name}"
    status = str(card.get("status", "unknown"))
    line = f'<p class="soft"><span class="badge">{page.text(status)}</span> {_when(card)}</p>'
    said = [f"<h1>{page.text(name)}</h1>{line}"]
    if (lost := run.said()) is not None:
        said.append(page.paragraphs([f"Not shown: {lost}"]))
    if card.get("reason"):
        said.append(page.paragraphs([str(card["reason"])]))
    if card.get("command"):
        said.append(f"<pre>{page.text(card['command'])}</pre>")
    if report is not None:
        said.append("<h2>Results</h2>" + page.table(report["columns"], report["rows"], report.get("bounds")))
        said.append(page.paragraphs(report["notes"]))
    certificate = folder / "results" / CERTIFICATE
    if certificate.exists() and not is_certified(certificate):
        said.append(page.paragraphs([f"Not shown: {certificate} is not of these solutions; certify the run again."]))
    elif (certified := run.record(f"results/{CERTIFICATE}")) is not None:
        said.append(f"<h2>{page.text(certified['title'])}</h2>")
        said.append(
            page.table(certified["columns"], certified["rows"], certified.get("bounds"))
            + page.paragraphs(certified["notes"])
        )
    said.append(_surfaces(run, plots))
    pictures = [p for p in sorted((folder / "figures").glob("*.png")) if run.path(f"figures/{p.name}") is not None]
    if pictures:
        said.append("<h2>Figures</h2>" + "".join(map(_picture, pictures)))
    shown = json.dumps(config, indent=2, ensure_ascii=False)
    said.append('<section class="screen"><h2>Configuration</h2><details>')
    said.append(f"<summary>{len(shown.splitlines())} lines</summary><pre>{page.text(shown)}</pre></details></section>")
    said.append(f"<h2>Provenance</h2>{_provenance(card)}")
    return name, "".join(said)


def _when(card: dict[str, Any]) -> str:
    parts = [str(card["start"])] if card.get("start") else []
    if card.get("seconds") is not None:
        parts.append(f"{card['seconds']:,.0f} s")
    if card.get("peak_memory_bytes"):
        parts.append(f"peak memory {humanize.naturalsize(card['peak_memory_bytes'])}")
    return page.text(" · ".join(parts))


def _provenance(card: dict[str, Any]) -> str:
    git = card.get("git") or {}
    commit = f"{git['commit']}{' with changes' if git.get('dirty') else ''}" if git.get("commit") else None
    devices = ", ".join(f"{d['count']} x {d['platform']} ({d['kind']})" for d in card.get("devices", []))
    packages = {name: version for name, version in (card.get("packages") or {}).items() if version}
    return page.facts(
        {
            "commit": commit,
            "devices": devices or None,
            "python": card.get("python"),
            "platform": card.get("platform"),
            **packages,
            "digest of the configuration": card.get("config"),
        }
    )


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = path.stem.replace("_", " ")
    image = f'<img alt="{page.text(name)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{page.text(name)}</figcaption></figure>"


def _surfaces(run: _Run, plots: list[dict[str, Any]]) -> str:
    """The surfaces of the run and of its cells, raw and aligned side by side."""
    inner = [p.name for p in run.folder.iterdir() if (p / "results" / "landscape.npz").exists()]
    seeds = any("_seed_" in name for name in inner)
    rows = []
    for cell in ("", *(f"{name}/" for name in sorted(inner, key=_order))):
        pair = ""
        record, config = (run.record(cell + name) or {} for name in ("results/landscape.json", "config.json"))
        for stem, said in SURFACES:
            path = run.path(f"{cell}results/{stem}.npz")
            if path is None:
                continue
            try:
                stored = load_npz(path)
            except FileNotFoundError:
                continue
            except DamagedFileError as error:
                pair += page.paragraphs([f"Not shown: {error}"])
                continue
            scores = (record if stem == "landscape" else record.get("aligned", {})).get("scores", {})
            shown = [f"{k.replace('_', ' ')} {page.cell(scores[k])}" for k in _SHOWN if k in scores]
            pair += f'<figure><div class="plot" data-plot="{len(plots)}"></div>'
            pair += f"<figcaption>{page.text('; '.join(shown))}</figcaption></figure>"
            which = [f"I = {record['num_branches']:,}"] if "num_branches" in record else []
            which += [f"seed {config['seed']}"] if seeds and "seed" in config else []
            plots.append(surfaces.surface(stored, ", ".join([*which, said])))
        if pair:
            rows.append(f'<div class="pair">{pair}</div>')
    if not rows:
        return ""
    if not surfaces.available():
        return page.paragraphs(["Surfaces that can be turned need plotly: pip install 'dualgap_jax[report]'."])
    return f'<section class="screen"><h2>Surfaces</h2>{"".join(rows)}</section>'


_SHOWN = ("envelope_max", "midpoint_violation_rate", "negative_curvature_share", "barrier_max")


def _order(cell: str) -> list[str | int]:
    """Cells by their numbers: `I_3`, `I_3_seed_1`, `I_10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", cell)]
