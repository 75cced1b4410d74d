"""Learning-rate schedules as pure functions, the authors' among them, that run inside compiled loops."""

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
      update: `(state, loss) -> state` after each segment, from its mean loss.
      stop: `(state) -> bool`: no further step is wanted.
      base: the learning rate that the factors multiply.
    """

    init: Callable[[], PyTree]
    rate: Callable[[PyTree, Array], Array]
    update: Callable[[PyTree, Array], PyTree]
    stop: Callable[[PyTree], Array]
    base: float = 1.0


class PlateauState(NamedTuple):
    """Best mean loss so far, segments since it fell, decays done, and whether to stop."""

    reference: Array
    waited: Array
    decays: Array
    stop: Array


def plateau(
    max_steps: int, factor: float = 0.1, min_delta: float = 1e-5, max_decays: int = 3, patience: int = 1
) -> Schedule:
    """The authors' schedule: when the loss does not fall by `min_delta`, multiply the rate by `factor`; then stop.

    The authors look at the loss every 100 steps and wait for nothing (`patience=1`).  With mini-batches the loss looked
    at is the mean over the segment, and a patience of several segments keeps its noise from ending the run early.

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
    "schedule", {"plateau": plateau, "constant": constant, "cosine": cosine}
)
