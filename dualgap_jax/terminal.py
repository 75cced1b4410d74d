"""What a run says while it works: one tidy line on a terminal, plain lines in a file or a pipe; tables; colours."""

from __future__ import annotations

import contextlib
import decimal
import math
import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm
from tqdm.utils import disp_trim

WIDTH = 100  # columns of tables and of the notes below them
PLAIN_SECONDS = 30.0  # between two lines of one stage where there is no terminal
COMPILING = "compiling and first steps"  # before the first update of what is compiled: one program does both
_SOON = 1.0  # a stage shorter than this has its last line only
_REDRAW = 0.1
_TICK = 0.5
_ENOUGH = 0.2  # seconds of work that a rate is told from
_BAR = 20

_COLOURS = {"bold": "1", "dim": "2", "green": "32", "cyan": "36"}
_parts: ContextVar[tuple[str, ...]] = ContextVar("parts", default=())
_lock = threading.Lock()
_shown: list[Progress] = []  # at most one: what began inside it stays silent
_speaking_since: list[float] = []  # not empty inside `spoken`


def paint(text: str, colour: str, stream: Any = None) -> str:
    """The text in a colour of `_COLOURS` where `stream` (standard error by default) is a terminal that shows them.

    A variable NO_COLOR that is not empty (no-color.org) and TERM=dumb say that none are wanted.
    """
    stream = sys.stderr if stream is None else stream
    wanted = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\033[{_COLOURS[colour]}m{text}\033[0m" if wanted else text


def duration(seconds: float) -> str:
    """'0.4 s', '12 s', '3 min 20 s' or '2 h 5 min'."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _per_second(rate: float) -> str:
    if rate >= 10:
        return f"{rate:,.0f}/s"
    return f"{rate:.2g}/s" if rate >= 0.1 else f"{60 * rate:.2g}/min"


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Puts `name` before the label of every stage that begins inside, as in 'I = 30 (2 of 4), training'."""
    token = _parts.set((*_parts.get(), name))
    try:
        yield
    finally:
        _parts.reset(token)


@contextlib.contextmanager
def spoken(active: bool = True) -> Iterator[None]:
    """Inside, stages speak where there is no terminal too: as they begin, every 30 seconds, and as they end.

    On a terminal the clock of the line runs, and messages of `logging` go above it.  A library that is imported stays
    silent in files and pipes; `cli` is what speaks.
    """
    if not active or _speaking_since:
        yield
        return
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(_TICK):
            with _lock:
                for progress in _shown:
                    progress._tick()

    ticker = threading.Thread(target=tick, name="progress", daemon=True)
    _speaking_since.append(time.monotonic())
    ticker.start()
    try:
        with _logging_above_the_line():
            yield
    finally:
        stop.set()
        ticker.join(timeout=5)
        _speaking_since.clear()


def _logging_above_the_line() -> contextlib.AbstractContextManager[None]:
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    # Imported here: in a notebook without widgets the import warns.
    from tqdm.contrib.logging import logging_redirect_tqdm

    return logging_redirect_tqdm()


def open_streams() -> None:
    """Leads standard streams that the process was started without (`>&-`) to the null device.

    Otherwise the next file to be opened stands in the place of one, and whatever a library prints goes into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def reader_is_gone() -> None:
    """After a `BrokenPipeError` on standard output: what is still to be written there goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(text: str) -> None:
    """Prints to standard error, above the line of progress where there is one; a stream that is gone stops nothing."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr.isatty():
            tqdm.write(text, file=sys.stderr)
            return
        stamp = f"[{_clock(time.monotonic() - _speaking_since[0])}] " if _speaking_since else ""
        print(stamp + text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class _Line(tqdm):
    """A line whose words are another's; tqdm places, trims and clears it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        super().__init__(file=sys.stderr, dynamic_ncols=True, leave=True)

    def __str__(self) -> str:
        return str(disp_trim(self._progress.text(colours=True), self.format_dict["ncols"] or WIDTH))


class Progress:
    """A stage of a run: what is done of how much, the rate, the time left; as it ends, one complete line.

    Only the outermost of several is shown.  Where standard error is no terminal it is silent, unless inside `spoken`.

    Args:
      total: the number of steps in all; None where they cannot be counted.
      label: what is counted, or done.
      done: how many were done before (a resumed run); they do not count for the rate.
      at_most: whether the stage may end before `total`; the time left is then a bound, and says so.
      first: what happens before the first step, such as 'compiling'.
    """

    def __init__(
        self, total: int | None, label: str, done: int = 0, *, at_most: bool = False, first: str = "starting"
    ) -> None:
        self._name = ", ".join((*_parts.get(), label))
        self._total, self._at_most = total, at_most
        self._done, self._note = done, ""
        self._began = self._drawn = time.monotonic()
        self._due = self._began + _SOON
        self._waiting: str | None = first if total is not None else "at work"
        self._counted, self._seconds, self._since = 0, 0.0, self._began
        self._end: str | None = None
        self._line: Any = None
        with _lock:
            self._is_shown = not _shown
            if self._is_shown:
                _shown.append(self)
        if self._is_shown and sys.stderr.isatty():
            self._line = _Line(self)

    def wait(self, what: str) -> None:
        """Says what goes on until the next `update`; that time does not count for the rate."""
        self._waiting = what
        self._redraw(0.0)

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` steps are done, and a short note; redrawn at most ten times a second."""
        now = time.monotonic()
        if self._waiting is None:
            self._counted, self._seconds = self._counted + done - self._done, self._seconds + now - self._since
        self._done, self._note, self._since, self._waiting = done, note, now, None
        self._redraw(_REDRAW)

    def close(self, how: str = "") -> None:
        """Ends the line; `how` is said in it, as in 'broken off'."""
        if self._end is not None:
            return
        self._end = how
        with _lock:
            if self._is_shown:
                _shown.remove(self)
        if self._line is not None:
            self._line.close()
        elif self._is_shown and _speaking_since:
            say(self.text())

    def text(self, colours: bool = False) -> str:
        """The line as it is now."""

        def dyed(text: str, colour: str) -> str:
            return paint(text, colour) if colours else text

        elapsed = time.monotonic() - self._began
        total = "" if self._total is None else f" of {'at most ' if self._at_most else ''}{self._total:,}"
        counts = f"{self._done:,}{total}"
        if self._end is not None:
            moved = self._total is not None and self._done > 0
            said = [f"{counts} in {duration(elapsed)}" if moved else duration(elapsed), self._note, self._end]
            return f"{dyed(self._name, 'green')}: {', '.join(filter(None, said))}"
        name = dyed(self._name, "bold")
        if self._waiting is not None and (self._total is None or self._done == 0):
            return f"{name}: {self._waiting}, {duration(elapsed)}"
        said = [self._waiting or ""]
        if self._total is not None and self._seconds >= _ENOUGH and self._counted > 0:
            rate = self._counted / self._seconds
            left = max(self._total - self._done, 0) / rate
            said.append(_per_second(rate))
            if left:
                said.append(f"{'at most ' if self._at_most else ''}{duration(left)} left")
        rest = ", ".join(filter(None, [*said, self._note]))
        if colours:
            return f"{name}: {counts} {self._bar(dyed)} {rest}"
        return f"{name}: {counts}" + (f", {rest}" if rest else "")

    def _bar(self, dyed: Any) -> str:
        try:
            full, empty = "━", "─"
            full.encode(sys.stderr.encoding or "ascii")
        except UnicodeEncodeError:
            full, empty = "#", "-"
        filled = round(_BAR * min(1.0, self._done / max(self._total or 1, 1)))
        return str(dyed(full * filled, "cyan")) + empty * (_BAR - filled)

    def _redraw(self, least: float) -> None:
        now = time.monotonic()
        if self._line is not None and now - self._drawn >= least:
            self._drawn = now
            self._line.refresh()

    def _tick(self) -> None:
        """What the clock of `spoken` does, in its thread."""
        if self._line is not None:
            self._redraw(2 * _TICK)
        elif time.monotonic() >= self._due:
            say(self.text())
            self._due = time.monotonic() + PLAIN_SECONDS

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        self.close("broken off" if kind is not None else "")


_AWAY = {None: decimal.ROUND_HALF_EVEN, "lower": decimal.ROUND_FLOOR, "upper": decimal.ROUND_CEILING}


def digits(value: float, count: int = 4, bound: str | None = None) -> str:
    """A number of `count` significant digits, as the format `g` writes it.

    Args:
      value: any number.
      count: how many digits, at most 15.
      bound: "lower" rounds down and "upper" up, so that what is said of a bound is true of the digits: read as a float
        they lie on its side of the value, or are it.
    """
    if bound is None or not math.isfinite(value):
        return f"{value:.{count}g}"
    rounded = decimal.Context(prec=count, rounding=_AWAY[bound]).create_decimal(repr(float(value)))
    if rounded and abs(rounded.adjusted()) > 300:  # where a float has fewer digits, or is infinite
        return f"{rounded.normalize():e}"
    return f"{float(rounded):.{count}g}"


def cell(value: Any, bound: str | None = None) -> str:
    """A cell of a table: four digits of a number, three of each in a list, a dash for None.

    Args:
      value: None, a text, a truth value, a number or a list of texts and numbers.
      bound: of the column, see `digits`.
    """
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return " ".join(digits(v, 3, bound) if isinstance(v, float) else cell(v) for v in value)
    if isinstance(value, float):
        return digits(value, 4, bound)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


# Where a cell may be broken: at spaces, and before slashes.
_WORD = re.compile(r"/?[^\s/]+|/|\s+")


def _wrapped(text: str, width: int) -> list[str]:
    """The lines of a cell of this width; a single word that is wider stays whole."""
    lines, line = [], ""
    for word in _WORD.findall(text):
        if line.strip() and len(line + word.rstrip()) > width:
            lines.append(line.strip())
            line = ""
        line += word
    return [*lines, line.strip()]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int = WIDTH) -> str:
    """A table in fixed width: the heads, a line, the rows; every column right-aligned.

    Heads and cells are broken into lines where that keeps the table within `width`; where even the longest words are
    too many side by side, the columns stand in several tables below one another, each with the first column.
    """
    cells = [list(columns), *map(list, rows)]
    across = list(zip(*cells, strict=True))
    least = [max((len(word) for cell in column for word in _WORD.findall(cell)), default=0) for column in across]
    fitting = 1
    while fitting < len(least) and sum(least[: fitting + 1]) + 2 * fitting <= width:
        fitting += 1
    if 2 <= fitting < len(least):
        parts = [
            [[row[i] for i in which] for row in cells]
            for which in (list(range(fitting)), [0, *range(fitting, len(least))])
        ]
        return "\n\n".join(table(part[0], part[1:], width) for part in parts)
    # A head of several words is broken before a cell is.
    widths = [
        max(small, max(map(len, column[1:]), default=0), min(len(column[0]), 8))
        for small, column in zip(least, across, strict=True)
    ]
    while sum(widths) + 2 * (len(widths) - 1) > width:
        spare = [w if w > small else 0 for w, small in zip(widths, least, strict=True)]
        if not any(spare):
            break
        widths[spare.index(max(spare))] -= 1
    lines = []
    for number, row in enumerate(cells):
        broken = [_wrapped(cell, w) for cell, w in zip(row, widths, strict=True)]
        height = max(map(len, broken))
        filled = [part + [""] * (height - len(part)) for part in broken]
        if number == 0:
            filled = [[""] * (height - len(part)) + part for part in broken]
        lines += [
            "  ".join(p.rjust(w) for p, w in zip(line, widths, strict=True)).rstrip()
            for line in zip(*filled, strict=True)
        ]
        if number == 0:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def paragraph(text: str, width: int = WIDTH) -> str:
    """A sentence in lines of at most `width` columns; longer words, such as paths, stay whole."""
    return textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
