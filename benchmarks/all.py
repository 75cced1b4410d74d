"""All benchmarks in one go: how near each kind of work comes to its limit, how far ahead of its peer, and what moved.

    python benchmarks/all.py [--only WORK ...] [--record docs/speed.json] [--publish] [--smoke]

Each script runs in a process of its own, one after the other, for twenty to forty minutes on two cores; `--only` takes
some of them.  Of every row the ratio to its limit and the ratio to its best peer are set beside those of the record,
the last run that was published: a ratio has moved if the two ranges over the rounds do not meet and the medians differ
by more than a twentieth.  `--publish` writes the record, and the page and the figure made of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common

from dualgap_jax.terminal import table

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "docs" / "speed.json"
_MOVED = 0.05


class Work(NamedTuple):
    """What is read from the rows of a script.

    Attributes:
      script: its name, and after a space its flags.
      time: key of what the work takes, and its unit.
      limit: key of the ratio to the limit, and what the limit is; None without one.
      peer: key of the ratio of the peer's time to the work's, and who the peer is; None without one.
    """

    script: str
    time: tuple[str, str]
    limit: tuple[str, str] | None
    peer: tuple[str, str] | None


WORKS = {
    "training": Work("training_step", ("step_ms", "ms"), ("of_limit", "bare products"), ("over_peer", "PyTorch loop")),
    "streamed training": Work(
        "scaling --branches 1000 --branches 8000 --no-memory --rounds 5",
        ("step_ms", "ms"),
        ("of_limit", "bare products"),
        None,
    ),
    "landscape": Work(
        "landscape --rounds 3",
        ("point_ms", "ms"),
        ("of_floor", "bare product, above the first layer"),
        ("over_full", "full re-evaluation"),
    ),
    "streamed landscape": Work(
        "landscape_streamed --branches 5000 --rounds 3 --no-torch",
        ("point_ms", "ms"),
        None,
        ("over_full", "full re-evaluation"),
    ),
    "hitting rates": Work(
        "hitting --rounds 3",
        ("table_seconds_extrapolated", "s"),
        ("of_same_shapes", "batched products of the same shapes"),
        ("over_peer", "PyTorch loop"),
    ),
    "theorem 1": Work("duality_gap", ("milliseconds", "ms"), ("of_limit", "bare products"), None),
    "theorem 2": Work(
        "spectral --data random --rounds 1",
        ("seconds", "s"),
        ("of_limit", "bare product"),
        ("scipy_qr_over_this", "SciPy's QR"),
    ),
    "checkpoints": Work("checkpoints", ("save_mb_s", "MB/s"), ("of_write", "bare write"), None),
}


def rows_of(work: str, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a script's results in the form of the record."""
    _, time, limit, peer = WORKS[work]

    def spread(row: Mapping[str, Any], key: tuple[str, str] | None) -> dict[str, float] | None:
        value = row.get(key[0]) if key is not None else None
        return value if isinstance(value, Mapping) else None  # "not measured" is left out

    return [
        {
            "work": work,
            "case": row["case"],
            "time": spread(row, time),
            "unit": time[1],
            "of_limit": spread(row, limit),
            "limit": limit[1] if limit else None,
            "over_peer": spread(row, peer),
            "peer": peer[1] if peer else None,
            "environment": results["environment"],
        }
        for row in results["rows"]
    ]


def measure(work: str, smoke: bool) -> list[dict[str, Any]]:
    """Runs a script in a process of its own.

    Raises:
      RuntimeError: if it fails, with the end of what it said.
    """
    name, *flags = WORKS[work].script.split()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.json")
        command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--json", str(path), *flags]
        done = subprocess.run([*command, *["--smoke"] * smoke], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return rows_of(work, json.loads(path.read_text()))


def moved(now: Mapping[str, float] | None, then: Mapping[str, float] | None) -> str:
    """What became of a ratio: '+12 %', '-8 %', '' where it did not move, 'new' where there was none."""
    if now is None:
        return ""
    if then is None:
        return "new"
    change = now["median"] / then["median"] - 1
    apart = now["min"] > then["max"] or now["max"] < then["min"]
    return f"{100 * change:+.0f} %" if apart and abs(change) > _MOVED else ""


def compared(rows: Sequence[Mapping[str, Any]], record: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The cells of the table, with what moved against the record."""
    before = {(row["work"], row["case"]): row for row in record}
    cells = []
    for row in rows:
        then = before.get((row["work"], row["case"]), {})
        time = f"{common.text(row['time'])} {row['unit']}" if row["time"] else "-"
        line = [row["work"], row["case"], time]
        for key, name in (("of_limit", "limit"), ("over_peer", "peer")):
            line += [common.text(row[key]) if row[key] else "-", row[name] if row[key] else "-"]
            line += [moved(row[key], then.get(key))]
        cells.append(line)
    return cells


HEADS = ["work", "case", "time", "of limit", "limit", "moved", "peer's time / ours", "peer", "moved"]


_PAGE = """\
# Speed

Made by `python benchmarks/all.py --publish`: medians (least-largest over the rounds).  {machines}.

![Ratio to the limit, and ratio to the best peer, of every kind of work](figures/speed.png)

*Of limit*: the rate of the work over that of bare operations of the same count and precision, measured in turn with it;
1 is the machine's limit.  *Peer's time / ours*: how many times as long the named way takes for the same work.  The head
of each script says what is counted.  `python benchmarks/all.py` measures again and says what moved against this page;
ratios differ between processors: [Results](results.md#speed) has those of others.

| work | case | time | of limit | limit | peer's time / ours | peer |
|---|---|---|---|---|---|---|
{rows}
"""


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The page: who measured when, the table, how to read it."""
    machines: dict[str, list[float]] = {}
    for where in (row["environment"] for row in rows):
        name = f"{where['device']}, {where['cores']} cores, {where['date'][:10]}"
        machines.setdefault(name, []).append(where["load_average"])
    said = [f"{name}, load {min(loads):.1f} to {max(loads):.1f} as each began" for name, loads in machines.items()]
    lines = ["| " + " | ".join(cells[i] for i in (0, 1, 2, 3, 4, 6, 7)) + " |" for cells in compared(rows, rows)]
    return _PAGE.format(machines="; ".join(said), rows="\n".join(lines))


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Two panels of dots: of the limit, and over the peer, a line each row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["of_limit"] or row["over_peer"]]
    figure = Figure(figsize=(10, 1.2 + 0.32 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(shown), 0, -1)
    for axes, key, title in ((left, "of_limit", "share of the limit"), (right, "over_peer", "peer's time / ours")):
        for place, row in zip(places, shown, strict=True):
            if row[key]:
                values = row[key]
                axes.plot([values["min"], values["max"]], [place, place], color="0.6", linewidth=2)
                axes.plot(values["median"], place, "o", color="#0072b2")
        axes.axvline(1, color="0.3", linewidth=0.8)
        axes.set_xlabel(title)
        axes.grid(axis="x", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    left.set_xlim(0, max(1.05, *(row["of_limit"]["max"] for row in shown if row["of_limit"])))
    right.set_xscale("log")
    left.set_yticks(list(places), [f"{row['work']}: {row['case']}" for row in shown], fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table beside the record, and publishes if asked to."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=WORKS, default=list(WORKS), help="these kinds of work")
    parser.add_argument("--record", type=Path, default=RECORD, help="the last published run")
    parser.add_argument("--publish", action="store_true", help="write the record, docs/speed.md and its figure")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, which show that all of it runs")
    flags = parser.parse_args(argv)
    if flags.smoke and flags.publish:
        parser.error("--publish needs real sizes; leave --smoke out")
    record = json.loads(flags.record.read_text())["rows"] if flags.record.exists() else []
    rows: list[dict[str, Any]] = []
    for work in flags.only:
        print(f"measuring {work}", file=sys.stderr)
        rows += measure(work, flags.smoke)
    print(table(HEADS, compared(rows, record), width=1000))
    gone = {(row["work"], row["case"]) for row in record if row["work"] in flags.only}
    for work, case in sorted(gone - {(row["work"], row["case"]) for row in rows}):
        print(f"no longer measured: {work}, {case}")
    if flags.publish:
        kept = [row for row in record if row["work"] not in flags.only]
        order = list(WORKS)
        rows = sorted([*kept, *rows], key=lambda row: order.index(row["work"]))
        flags.record.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        flags.record.with_suffix(".md").write_text(page(rows))
        draw(rows, flags.record.parent / "figures" / "speed.png")


if __name__ == "__main__":
    main()
