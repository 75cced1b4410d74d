"""What all figures share: records read and checked, numbers as words, the page, and axes in the house style."""

from __future__ import annotations

import decimal
import math
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from dualgap_jax import files, terminal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE: Any = {
    "font.family": ["STIXGeneral", "DejaVu Sans"],
    "mathtext.fontset": "stix",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,
    "path.simplify": False,
}
# Okabe and Ito's colours in an order that also separates in grey, each with its own dashes and marker.
LINES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
    {"color": "#000000", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
)
_UNDEFINED = "Crosses at the upper border: the score is undefined (no finite loss, or a run that diverged)."
_ZERO = "Axes that show 0 are linear below their smallest non-zero value."
NOTE_COLOR = "0.3"


# Records -------------------------------------------------------------------------------------------------------------


def read_record(workdir: Path, name: str, required: Sequence[str]) -> dict[str, Any]:
    """The record `results/<name>`, JSON or npz.  Raises ValueError when it is missing, damaged, or lacks a key."""
    return files.read_record(workdir / "results" / name, required)


def value_of(scores: Mapping[str, Any], name: str) -> float:
    """The score as a float; NaN when it is absent, null, or not a number."""
    value = scores.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def left_out(scores: Mapping[str, Any]) -> str:
    """How much of a surface its scores say nothing of: '2.4 % of the grid left out'; '' for a surface that is whole."""
    share = 1 - value_of(scores, "finite_share")
    return f"{number(100 * share, 2)} % of the grid left out" if share > 0 else ""


def read_cells(record: Mapping[str, Any], workdir: Path, name: str, required: Sequence[str]) -> list[dict[str, Any]]:
    """The record's cells, fewest branches first.  Raises ValueError when there are none, or one lacks a key."""
    path = workdir / "results" / name
    if not record["cells"]:
        raise ValueError(f"{path} has no cells; run the experiment over at least one number of branches.")
    for index, cell in enumerate(record["cells"]):
        missing = [key for key in required if key not in cell]
        if missing:
            raise ValueError(f"{path}: cell {index} lacks {', '.join(missing)}; needed: {', '.join(required)}.")
    return sorted(record["cells"], key=lambda cell: cell["num_branches"])


# Words ---------------------------------------------------------------------------------------------------------------


def number(value: float, digits: int = 3, bound: str | None = None) -> str:
    """A number for a label, in powers of ten when very small or large; `digits` and `bound` as in `terminal.digits`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    text = terminal.digits(value, digits, bound)
    if 1e-3 <= abs(float(text)) < 1e5:
        plain = f"{float(text):,.10f}".rstrip("0").rstrip(".")
        return plain.replace("-", "\N{MINUS SIGN}")
    mantissa, exponent = f"{decimal.Decimal(text):.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    front = {"1": "", "-1": "-"}.get(mantissa, rf"{mantissa}\times")
    return rf"${front}10^{{{int(exponent)}}}$"


def non_finite(values: np.ndarray) -> str:
    """For instance '5 NaN and 2 infinite of 2,601'; '' when all are finite."""
    counts = {"NaN": int(np.isnan(values).sum()), "infinite": int(np.isinf(values).sum())}
    said = " and ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    return f"{said} of {values.size:,}" if said else ""


def plain(text: object) -> str:
    """Text from a record, with dollar signs kept from starting a formula."""
    return str(text).replace("$", r"\$")


def data_note(record: Mapping[str, Any]) -> str:
    """The caption's words for images that are not the originals (`data.image_format` of the record)."""
    lossy = record.get("data", {}).get("image_format") == "JPEG"
    return "Data: a JPEG-recompressed (lossy) copy of the images." if lossy else ""


# Page ----------------------------------------------------------------------------------------------------------------


@contextmanager
def any_backend() -> Iterator[None]:
    """Lets matplotlib be imported whatever `MPLBACKEND` says: figures are drawn without one, and it may not exist."""
    given = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if given is not None:
            os.environ["MPLBACKEND"] = given


@contextmanager
def page(width: float, height: float, caption: Sequence[str]) -> Iterator[Figure]:
    """A figure in the house typography, apart from pyplot's global state, with its caption at the lower edge.

    Args:
      width: in inches.
      height: in inches, without the caption, which adds as much as its lines need.
      caption: sentences; empty ones are left out.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    text = " ".join(sentence for sentence in caption if sentence)
    lines = textwrap.wrap(text, width=int((width - 0.5) * 20), break_long_words=False, break_on_hyphens=False)
    whole = height + 0.15 + 0.17 * len(lines)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc does not change the figures
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width, whole), dpi=200, facecolor="white")
        FigureCanvasAgg(figure)
        for index, line in enumerate(lines):
            up = (0.15 + 0.17 * (len(lines) - 1 - index)) / whole
            figure.text(0.25 / width, up, line, ha="left", va="baseline", fontsize=8.5, color=NOTE_COLOR)
        yield figure


def head(figure: Figure, title: str, line: str = "") -> None:
    """The title and the line under it, at fixed distances from the top edge."""
    height = figure.get_figheight()
    figure.text(0.5, 1 - 0.24 / height, plain(title), ha="center", va="center", fontsize=12.5)
    figure.text(0.5, 1 - 0.50 / height, line, ha="center", va="center", fontsize=9, color=NOTE_COLOR)


def box(figure: Figure, left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
    """A rectangle as matplotlib wants it, from inches from the figure's upper left corner."""
    across, up = figure.get_size_inches()
    return left / across, 1 - (top + height) / up, width / across, height / up


def save(figure: Figure, workdir: Path, stem: str) -> list[Path]:
    """Writes `figures/<stem>.png` and `.pdf` without a time stamp."""
    folder = workdir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.png", folder / f"{stem}.pdf"]
    figure.savefig(paths[0], dpi=200)
    figure.savefig(paths[1], dpi=200, metadata={"CreationDate": None})
    return paths


# Axes


def tidy(axes: Axes) -> None:
    """Open axes with a light grid and the house number format."""
    from matplotlib.ticker import FuncFormatter

    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 6)))


def branch_axis(axes: Axes, counts: Sequence[int]) -> None:
    """A logarithmic horizontal axis whose ticks are the numbers of branches that were run."""
    from matplotlib.ticker import NullLocator

    low, high = min(counts), max(counts)
    pad = (high / low) ** 0.07 if high > low else 2.0
    axes.set_xscale("log")
    axes.set_xlim(low / pad, high * pad)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted(set(counts)), labels=[f"{count:,}" for count in sorted(set(counts))])


def value_axis(axes: Axes, values: Float[np.ndarray, " n"]) -> None:
    """A logarithmic vertical axis; linear below the smallest positive value when there are zeros or negative values."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    values = values[np.isfinite(values)]
    sizes = np.abs(values[values != 0])
    if sizes.size == 0:
        axes.set_ylim(-0.05, 1.0)
        axes.set_yticks([0.0])
        return
    low, high, least = float(sizes.min()), float(sizes.max()), float(values.min())
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    bottom, top = low / 1.35, high * 1.35
    candidates = [
        [m * 10.0**d for d in decades[:: max(1, len(decades) // 6)] for m in mantissas]
        for mantissas in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0))
    ]
    candidates.append([float(tick) for tick in MaxNLocator(4).tick_values(bottom, top) if tick > 0])
    ticks = next((c for c in candidates if sum(bottom <= tick <= top for tick in c) >= 3), candidates[-1])
    if least > 0:
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
    else:
        axes.set_yscale("symlog", linthresh=low, linscale=0.6)
        axes.set_ylim(-0.35 * low if least == 0 else 1.35 * least, max(0.35 * low, 1.35 * float(values.max())))
        ticks = [0.0, *(sign * tick for tick in ticks if tick >= low for sign in (1, -1))]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())


def value_notes(values: Float[np.ndarray, " n"]) -> list[str]:
    """The caption's words for undefined scores and for zeros on a logarithmic axis, as far as there are any."""
    return [_UNDEFINED] * bool(np.isnan(values).any()) + [_ZERO] * bool((values <= 0).any())


def mark_undefined(axes: Axes, xs: Sequence[int | float], values: Float[np.ndarray, " n"], color: str) -> None:
    """Crosses at the upper border where a value is not finite."""
    where = np.asarray(xs, dtype=np.float64)[~np.isfinite(values)]
    border = axes.get_xaxis_transform()
    axes.plot(where, np.ones_like(where), "x", color=color, markersize=5, transform=border, clip_on=False)
