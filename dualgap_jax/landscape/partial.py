"""Unfinished evaluations: what is done, and the file that keeps it."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dualgap_jax.files import DamagedFileError, load_npz, save_npz
from dualgap_jax.identity import require_same


class Work(NamedTuple):
    """What is done, replaced as a whole at each step: an interrupt never meets sums that the counts do not know of.

    Attributes:
      sums: `[P]` summed losses over the samples that are through.
      seen: `[P]` how many samples these are.
      parts: for a batch of samples and a block of points under way, how many blocks of branches have been added, and
        the outputs so far, `[block of points, batch, out]`.
    """

    sums: np.ndarray
    seen: np.ndarray
    parts: Mapping[tuple[int, int], tuple[int, Any]]

    @classmethod
    def none(cls, num_points: int) -> Work:
        """Nothing is done."""
        return cls(np.zeros(num_points), np.zeros(num_points, np.int64), {})

    def with_losses(self, unit: tuple[int, int], which: slice, losses: np.ndarray, seen: int) -> Work:
        """The losses of a batch at some points are known."""
        new = Work(self.sums.copy(), self.seen.copy(), {k: v for k, v in self.parts.items() if k != unit})
        new.sums[which] += losses
        new.seen[which] = seen
        return new

    def with_part(self, unit: tuple[int, int], blocks: int, total: Any) -> Work:
        """One more block of branches has been added to the outputs."""
        return self._replace(parts={**self.parts, unit: (blocks, total)})


class Saver:
    """Writes unfinished work, at most a tenth of the time, and finds it again.

    Args:
      path: the file, or None for none.
      identity: makes what the work belongs to, compared before it is gone on with; called only where there is a path.
      save_seconds: least time between two writes.
    """

    def __init__(self, path: Path | None, identity: Callable[[], dict[str, Any]], save_seconds: float) -> None:
        self._path, self._least, self._wait = path, save_seconds, save_seconds
        self._identity = identity() if path is not None else {}
        self._saved = time.monotonic()

    def load(self, num_points: int) -> Work:
        """The unfinished work in the file; none where there is no file, or a damaged one, which a warning says.

        Raises:
          IdentityError: where the file belongs to another evaluation; it names what differs.
        """
        if self._path is None or not self._path.exists():
            return Work.none(num_points)
        try:
            stored = load_npz(self._path)
            saved = json.loads(str(stored["identity"])) if "identity" in stored else None
        except (DamagedFileError, ValueError) as error:
            warnings.warn(f"the unfinished landscape is computed again, its file is damaged: {error}", stacklevel=4)
            return Work.none(num_points)
        require_same(saved, self._identity, f"the file {self._path}")
        # One after another: all of them twice might not fit.
        parts = {
            (int(batch), int(block)): (int(count), jnp.asarray(stored.pop(f"outputs_{index}")))
            for index, (batch, block, count) in enumerate(stored["parts"])
        }
        return Work(stored["sums"], stored["seen"], parts)

    def save(self, work: Work) -> None:
        """Writes the work."""
        if self._path is None:
            return
        began = time.monotonic()
        parts = np.asarray([[*unit, count] for unit, (count, _) in work.parts.items()], np.int64).reshape(-1, 3)
        outputs = {f"outputs_{index}": total for index, (_, total) in enumerate(work.parts.values())}
        identity = np.asarray(json.dumps(self._identity))
        save_npz(self._path, identity=identity, sums=work.sums, seen=work.seen, parts=parts, **outputs)
        self._saved = time.monotonic()
        self._wait = max(self._least, 9 * (self._saved - began))

    def save_if_due(self, work: Work) -> None:
        """Writes the work if the last time is long enough ago."""
        if time.monotonic() - self._saved > self._wait:
            self.save(work)

    def remove(self) -> None:
        """All is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def on_exception(action: Callable[[], None]) -> Iterator[None]:
    """Does something before an exception goes on."""
    try:
        yield
    except BaseException:
        action()
        raise
