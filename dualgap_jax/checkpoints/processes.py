"""What processes of a distributed run tell each other when they save or restore together; alone they say nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from dualgap_jax.sizes import switch


class Company:
    """The processes that save and restore together: all of them, or this one by itself."""

    def __init__(self, together: bool) -> None:
        self._several = switch(together, "together") and jax.process_count() > 1
        self.is_first = not self._several or jax.process_index() == 0

    def meet(self, what: str) -> None:
        """Waits until all are here."""
        if self._several:
            multihost_utils.sync_global_devices(f"checkpoints: {what}")

    def all_agree(self, yes: bool) -> bool:
        """Whether all say yes."""
        return bool(multihost_utils.process_allgather(np.asarray(yes)).all()) if self._several else yes

    def common(self, mine: Iterable[int]) -> list[int]:
        """The numbers that all have, in order."""
        said = self.gathered({str(jax.process_index()): list(mine)}).values()
        return sorted(set.intersection(*map(set, said)))

    def gathered(self, mine: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of all their dicts, which JSON can hold."""
        if not self._several:
            return dict(mine)
        text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
        sizes = multihost_utils.process_allgather(np.asarray(text.size, np.int32)).reshape(-1)
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: text.size] = text
        rows = multihost_utils.process_allgather(padded)
        entries = [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]
        return {key: value for each in entries for key, value in each.items()}
