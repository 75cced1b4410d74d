"""Data of one's own from a file that a config can name: NumPy's npz, or numbers separated by commas."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import numpy as np

from dualgap_jax.data.dataset import Dataset, from_arrays, take

_LABELS = ("y", "label", "labels", "target", "class")


def own(
    *, path: str, task: str = "auto", num_outputs: int = 0, standardise: bool = True, num_examples: int = 0
) -> Dataset:
    """Data of one's own: an .npz file with arrays x and y, or a .csv file of numbers whose last column is the label.

    Args:
      path: the file.  A CSV file may begin with a line of names; a column called y, label, labels, target or class is
        then the label, wherever it stands.  Labels that are whole numbers are classes or signs.
      task, num_outputs, standardise: as in `from_arrays`; features are standardised unless it is said otherwise.  As
        the test set of an experiment the file takes all three from the training set.
      num_examples: the first so many; 0 is all.

    Raises:
      ValueError: for a file that is missing, of another kind or malformed, and what `from_arrays` and `take` refuse.
    """
    file = Path(path)
    readers = {".npz": _npz, ".csv": _csv}
    if file.suffix not in readers:
        raise ValueError(f"path={path!r} must end in {' or '.join(readers)}.")
    if not file.is_file():
        raise ValueError(f"path={path!r}: there is no such file here ({Path.cwd()}).")
    x, y = readers[file.suffix](file)
    dataset = from_arrays(x, y, task=task, num_outputs=num_outputs, standardise=standardise, name=file.stem)
    return take(dataset._replace(info={**dataset.info, "source": file.name}), num_examples)


def _npz(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with open(file, "rb") as content, np.lib.npyio.NpzFile(content) as arrays:
            missing = [name for name in ("x", "y") if name not in arrays]
            if missing:
                raise ValueError(
                    f"{file} holds {', '.join(arrays) or 'nothing'}; save it as np.savez(path, x=features, y=labels)."
                )
            return arrays["x"], arrays["y"]
    except (OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{file} is no sound npz file: {error}") from error


def _csv(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with open(file, newline="", encoding="utf-8-sig") as lines:
        rows = [row for row in csv.reader(lines) if any(cell.strip() for cell in row)]
    names = None
    if rows and not all(map(_is_number, rows[0])):
        names = [cell.strip().lower() for cell in rows.pop(0)]
    if not rows or len(rows[0]) < 2:
        raise ValueError(f"{file} needs rows of at least two numbers, the features and the label.")
    for number, row in enumerate(rows, 1 if names is None else 2):
        if len(row) != len(rows[0]) or (names is not None and len(row) != len(names)):
            raise ValueError(f"{file}, row {number}: {len(row)} cells, where the first has {len(names or rows[0])}.")
        if wrong := [cell for cell in row if not _is_number(cell)]:
            raise ValueError(f"{file}, row {number}: {wrong[0]!r} is no number.")
    labelled = [i for i, name in enumerate(names or ()) if name in _LABELS]
    if len(labelled) > 1:
        raise ValueError(f"{file}: several columns may be the label: {', '.join((names or [])[i] for i in labelled)}.")
    which = labelled[0] if labelled else len(rows[0]) - 1
    values = np.asarray(rows, np.float64)
    y = values[:, which]
    whole = bool(np.isfinite(y).all() and (y == np.round(y)).all() and (np.abs(y) < 2**31).all())
    return np.delete(values, which, axis=1), y.astype(np.int64) if whole else y


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
