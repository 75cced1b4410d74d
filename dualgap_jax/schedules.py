"""Learning-rate schedules as pure functions that run inside compiled loops; the authors' rule as they wrote it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from dualgap_jax.config import require
from dualgap_jax.registry import Table
from dualgap_jax.types import PyTree


class Schedule(NamedTuple):
    """A learning-rate schedule as pure functions of arrays, so that it also runs inside compiled loops.

    Attributes:
      init: `() -> state`.
      rate: `(state, step) -> factor` on `base`.
      update: `(state, loss) -> state` after each segment, from its mean loss, or that of its last mini-batch.
      stop: `(state) -> bool`: no further step is wanted.
      base: the learning rate that the factors multiply.
      single: whether single mini-batches are looked at: `update` gets the loss of the last one of a segment, and a run
        has converged when any of them falls below the tolerance; else both look at the mean of the segment.
    """

    init: Callable[[], PyTree]
    rate: Callable[[PyTree, Array], Array]
    update: Callable[[PyTree, Array], PyTree]
    stop: Callable[[PyTree], Array]
    base: float = 1.0
    single: bool = False


class PlateauState(NamedTuple):
    """Best mean loss so far, segments since it fell, decays done, and whether to stop."""

    reference: Array
    waited: Array
    decays: Array
    stop: Array


def plateau(
    max_steps: int, factor: float = 0.1, min_delta: float = 1e-5, max_decays: int = 3, patience: int = 1
) -> Schedule:
    """When the mean loss of a segment does not fall by `min_delta`, multiply the rate by `factor`; in the end stop.

    The best mean so far is the reference, and a patience of several segments keeps noise from ending the run early.
    It is a rule of this package, in the manner of the authors'; theirs is `plateau_authors`.

    Args:
      max_steps: not used; the length of the run.
      factor: of the learning rate at each decay, in (0, 1).
      min_delta: the fall below the reference that counts.
      max_decays: number of decays; at the next plateau the run stops.
      patience: number of segments in a row without a fall that make a plateau.
    """
    del max_steps
    require(0 < factor < 1, f"plateau: factor={factor} must lie in (0, 1).")
    require(max_decays >= 0 and patience >= 1, f"plateau: max_decays={max_decays} >= 0, patience={patience} >= 1.")

    def init() -> PlateauState:
        largest = jnp.finfo(jnp.zeros(0, float).dtype).max  # no infinity, which JAX_DEBUG_INFS would refuse
        return PlateauState(jnp.asarray(largest, float), jnp.int32(0), jnp.int32(0), jnp.asarray(False))

    def rate(state: PlateauState, step: Array) -> Array:
        del step
        return factor ** state.decays.astype(float)

    def update(state: PlateauState, loss: Array) -> PlateauState:
        fell = loss < state.reference - min_delta
        waited = jnp.where(fell, 0, state.waited + 1)
        plateaued = waited >= patience
        decays = state.decays + plateaued
        return PlateauState(
            jnp.where(fell, loss, state.reference).astype(state.reference.dtype),
            jnp.where(plateaued, 0, waited),
            jnp.minimum(decays, max_decays),
            state.stop | (decays > max_decays),
        )

    return Schedule(init, rate, update, lambda state: state.stop)


class AuthorsState(NamedTuple):
    """The mini-batch loss compared with (none before the first look), decays done, and whether to stop."""

    reference: Array
    looked: Array
    decays: Array
    stop: Array


def plateau_authors(max_steps: int, factor: float = 0.1, rise: float = 1e-5, max_decays: int = 3) -> Schedule:
    """The rule of the authors' program (github.com/hongyanz/multibranch): single mini-batches against a reference.

    The first look, at step 100 with `check_every=100`, sets the reference.  At each later one the loss of one
    mini-batch is compared with it: unless it lies above by more than `rise`, nothing happens, and the reference stays;
    if it does, the rate is multiplied by `factor` and that loss becomes the reference; after `max_decays` decays the
    run stops instead.  A run has converged when one mini-batch has a loss below the tolerance, which is seen at the end
    of its segment (theirs: at once).

    Args:
      max_steps: not used; the length of the run.
      factor: of the learning rate at each decay, in (0, 1).
      rise: above the reference, in units of loss, that counts.
      max_decays: number of decays; at the next rise the run stops.
    """
    del max_steps
    require(0 < factor < 1, f"plateau_authors: factor={factor} must lie in (0, 1).")
    require(rise >= 0 and max_decays >= 0, f"plateau_authors: rise={rise} and max_decays={max_decays} must be >= 0.")

    def init() -> AuthorsState:
        return AuthorsState(jnp.asarray(0.0, float), jnp.asarray(False), jnp.int32(0), jnp.asarray(False))

    def rate(state: AuthorsState, step: Array) -> Array:
        del step
        return factor ** state.decays.astype(float)

    def update(state: AuthorsState, loss: Array) -> AuthorsState:
        rose = state.looked & ~(state.reference + rise >= loss)
        return AuthorsState(
            jnp.where(state.looked & ~rose, state.reference, loss).astype(state.reference.dtype),
            jnp.asarray(True),
            jnp.minimum(state.decays + rose, max_decays),
            state.stop | (rose & (state.decays >= max_decays)),
        )

    return Schedule(init, rate, update, lambda state: state.stop, single=True)


def _keep(state: PyTree, loss: Array) -> PyTree:
    del loss
    return state


def _never(state: PyTree) -> Array:
    del state
    return jnp.asarray(False)


def constant(max_steps: int) -> Schedule:
    """A constant learning rate up to `max_steps`."""
    del max_steps
    return Schedule(lambda: (), lambda _, step: jnp.ones_like(step, float), _keep, _never)


def cosine(max_steps: int, final: float = 0.0, warmup: int = 0) -> Schedule:
    """Linear warm-up over `warmup` steps, then a half cosine down to `final` times the learning rate at `max_steps`."""
    require(0 <= final <= 1, f"cosine: final={final} must lie in [0, 1].")
    require(0 <= warmup <= max_steps, f"cosine: warmup={warmup} must lie between 0 and max_steps={max_steps}.")

    def rate(_: PyTree, step: Array) -> Array:
        rising = (step + 1) / max(warmup, 1)
        phase = jnp.clip((step - warmup) / max(max_steps - warmup, 1), 0, 1)
        falling = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * phase))
        return jnp.where(step < warmup, rising, falling).astype(float)

    return Schedule(lambda: (), rate, _keep, _never)


SCHEDULES: Table[Callable[..., Schedule]] = Table(
    "schedule", {"plateau": plateau, "plateau_authors": plateau_authors, "constant": constant, "cosine": cosine}
)
