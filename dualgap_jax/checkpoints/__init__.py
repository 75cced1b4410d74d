"""Checkpoints: a tree of arrays on disk, written by Orbax, checked bit by bit when it is read again.

`Checkpointer` saves and restores, `load` reads a folder, `open_slices` and `open_branches` read some rows of every leaf
at a time.  A state of gigabytes is never held twice: not while it is saved, not while it is restored.

A step is an Orbax checkpoint of zarr3 arrays, which `orbax.checkpoint` or TensorStore alone can restore.  They do not
notice a flipped byte or a swapped file.  So a step has a manifest with the SHA-256 of every file, and is restored here
only when its files agree with it; otherwise the log says why, and the step before is taken.  Nothing is cast.

A leaf is named by its path (`params/kernel`).  Containers without leaves (`optax.EmptyState`, None) come from the
template, so a state may be any tree of NamedTuples, dicts, tuples and lists.  Typed PRNG keys are leaves like others;
for Orbax alone they are their uint32 data.

In order: `manifest`, `rows` (of a leaf on disk), `leaves` (from and to devices), `orbax_item`, `processes` (what they
tell each other), `reading` and `saving`.
"""

from dualgap_jax.checkpoints.leaves import Pieces, Place, like_template, put_rows
from dualgap_jax.checkpoints.manifest import CheckpointMismatchError, DamagedCheckpointError
from dualgap_jax.checkpoints.reading import Branches, Restored, Slices, load, open_branches, open_slices
from dualgap_jax.checkpoints.rows import Stored
from dualgap_jax.checkpoints.saving import Checkpointer

__all__ = [
    "Branches",
    "CheckpointMismatchError",
    "Checkpointer",
    "DamagedCheckpointError",
    "Pieces",
    "Place",
    "Restored",
    "Slices",
    "Stored",
    "like_template",
    "load",
    "open_branches",
    "open_slices",
    "put_rows",
]
