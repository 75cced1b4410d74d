"""Data of one's own from a file that a config can name: NumPy's npz, or numbers separated by commas."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import numpy as np

from dualgap_jax.config import ConfigError
from dualgap_jax.data.dataset import Dataset, from_arrays, take
from dualgap_jax.files import local_path

_OTHERS = {";": "semicolons", "\t": "tabs"}  # that other programs write between cells
# What no column beside one named by a number is called: cells without a number in a first line that is an example.
_GAPS = {"na", "n/a", "null", "none", "nil", "missing", "?", "-", "true", "false"}
_LABELS = ("y", "label", "labels", "target", "class")


def own(
    *, path: str, task: str = "auto", num_outputs: int = 0, standardise: bool = True, num_examples: int = 0
) -> Dataset:
    """Data of one's own: an .npz file with arrays x and y, or a .csv file of numbers whose last column is the label.

    Args:
      path: the file.  A CSV file may begin with a line of names, one for each column; a column called y, label, labels,
        target or class is then the label, wherever it stands.  Labels that are whole numbers are classes or signs.
        Pandas writes such a file by `df.to_csv(path, index=False)`.
      task, num_outputs, standardise: as in `from_arrays`; features are standardised unless it is said otherwise.  As
        the test set of an experiment the file takes all three from the training set.
      num_examples: the first so many; 0 is all.

    Raises:
      ValueError: for a file that is missing, of another kind or malformed, and what `from_arrays` and `take` refuse.
    """
    file = local_path(path, "the data file")
    readers = {".npz": _npz, ".csv": _csv}
    if file.suffix not in readers:
        raise ValueError(f"path={path!r} must end in {' or '.join(readers)}.")
    if not file.is_file():
        raise ValueError(f"path={path!r}: there is no such file here ({Path.cwd()}).")
    x, y = readers[file.suffix](file)
    try:
        dataset = from_arrays(x, y, task=task, num_outputs=num_outputs, standardise=standardise, name=file.stem)
        return take(dataset._replace(info={**dataset.info, "source": file.name}), num_examples)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error


def _npz(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(file, "rb") as content, np.lib.npyio.NpzFile(content) as arrays:
            found = list(arrays)
            if {"x", "y"} <= {*found}:
                return arrays["x"], arrays["y"]
    except (OSError, EOFError, zipfile.BadZipFile, KeyError, ValueError) as error:  # ValueError: arrays of objects
        raise ValueError(f"{file} is no sound npz file of numbers: {error}") from error
    raise ValueError(f"{file} holds {', '.join(found) or 'nothing'}; save it as np.savez(path, x=features, y=labels).")


def _csv(file: Path) -> tuple[np.ndarray, np.ndarray]:
    rows = _cells(file)
    other = next((what for mark, what in _OTHERS.items() if rows and any(mark in cell for cell in rows[0])), None)
    hint = f" Its first line has {other}: cells stand between commas." if other else ""
    names = _names(file, rows, hint)
    if not rows or len(rows[0]) < 2:
        raise ValueError(f"{file} needs rows of at least two numbers, the features and the label.{hint}")
    for number, row in enumerate(rows, 1 if names is None else 2):
        if len(row) != len(rows[0]) or (names is not None and len(row) != len(names)):
            count = f"{len(row)} cells, where the first has {len(names or rows[0])}"
            raise ValueError(f"{file}, row {number}: {count}.{hint}")
        if wrong := [cell for cell in row if not _is_number(cell)]:
            raise ValueError(f"{file}, row {number}: {wrong[0]!r:.60} is no number.{hint}")
    labelled = [i for i, name in enumerate(names or ()) if name in _LABELS]
    if len(labelled) > 1:
        raise ValueError(f"{file}: several columns may be the label: {', '.join((names or [])[i] for i in labelled)}.")
    which = labelled[0] if labelled else len(rows[0]) - 1
    values = np.asarray(rows, np.float64)
    y = values[:, which]
    whole = bool(np.isfinite(y).all() and (y == np.round(y)).all() and (np.abs(y) < 2**53).all())
    return np.delete(values, which, axis=1), y.astype(np.int64) if whole else y


def _cells(file: Path) -> list[list[str]]:
    """The lines of a CSV file that are not empty, cell by cell."""
    with open(file, newline="", encoding="utf-8-sig") as lines:
        reader = csv.reader(lines)
        try:
            return [row for row in reader if any(cell.strip() for cell in row)]
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no text in UTF-8 ({error}); save it anew in that encoding.") from error
        except csv.Error as error:
            raise ValueError(f"{file}, line {reader.line_num}: {error}.") from error


def _names(file: Path, rows: list[list[str]], hint: str) -> list[str] | None:
    """Takes the line of names off the rows, in lower case; None where there is none.

    Raises:
      ValueError: for a first line that may be one or not, and for a column without a name.
    """
    first = [cell.strip() for cell in rows[0]] if rows else []
    if len(first) > 1 and first == [str(i) for i in range(len(first))]:
        raise ValueError(
            f"{file}: the first line counts the columns, {','.join(first)[:20]}, as pandas names those without names:"
            " write it with header=False, or give the columns names; if it is an example, put a line of names before"
            " it."
        )
    if all(map(_is_number, first)):
        return None
    for cell in first:
        if _is_number(cell, of_any_kind=True) and not (cell.isascii() and cell.isdecimal()):
            other = next(other for other in (cell, *first) if not _is_number(other))
            also = "" if other == cell else f", and {cell!r:.60} no name of a column"
            raise ValueError(f"{file}, row 1: {other!r:.60} is no number{also}.{hint}")
    gaps = [cell for cell in first if cell.lower() in _GAPS]
    if gaps and any(map(_is_number, first)):
        raise ValueError(f"{file}, row 1: {gaps[0]!r} is no number; if it is a name, give the other columns names too.")
    for number, cell in enumerate(first, 1):
        if not cell or cell.lower().startswith("unnamed: "):
            raise ValueError(
                f"{file}: column {number} has no name; where it is the index that pandas writes, write it with"
                " df.to_csv(path, index=False), else give it a name."
            )
    return [cell.strip().lower() for cell in rows.pop(0)]


def _is_number(text: str, *, of_any_kind: bool = False) -> bool:
    """Whether a cell is a number as files have it; of any kind: also 1_000 and the digits of other scripts."""
    try:
        float(text)
    except ValueError:
        return False
    return of_any_kind or (text.isascii() and "_" not in text)
