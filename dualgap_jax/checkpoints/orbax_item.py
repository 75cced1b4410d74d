"""The Orbax side: a handler that writes a state as blocks.  Orbax gives the folder, and makes it a step at the end.

Orbax's own array handlers copy the whole state on the host, and keep every array in flight at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp


class BlocksHandler(ocp.CheckpointHandler):
    """Saves one item with a function of its folder."""

    def save(self, directory: Any, args: BlocksSave) -> None:
        args.write(Path(directory))

    def restore(self, directory: Any, args: Any = None) -> Any:
        """Not the way: see `dualgap_jax.checkpoints.load`, which needs no Orbax."""
        raise NotImplementedError(f"{directory}: read it with dualgap_jax.checkpoints.load")


@ocp.args.register_with_handler(BlocksHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class BlocksSave(ocp.args.CheckpointArgs):
    """What a save writes.

    Attributes:
      write: called with the item's folder, which is new and empty.
    """

    write: Callable[[Path], None]
