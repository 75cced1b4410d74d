"""How solutions are found, as a config says it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

import numpy as np

from dualgap_jax import optimizers
from dualgap_jax.config import Component, ConfigError, require
from dualgap_jax.registry import unknown
from dualgap_jax.schedules import SCHEDULES
from dualgap_jax.sizes import is_whole
from dualgap_jax.types import Network

LearningRateScaling = Literal["branches", "none", "inverse_branches"]
Streaming = Literal["auto", "on", "off"]


_AT_LEAST = {
    "batch_size": 0,
    "max_steps": 0,
    "branch_chunk": 0,
    "check_every": 1,
    "num_solutions": 1,
    "group_size": 1,
    "weight_decay": 0,
    "tolerance": 0,
    "checkpoint_seconds": 0,
}
_REAL = {"weight_decay", "tolerance", "checkpoint_seconds"}  # the others are whole numbers
_ALLOWED = {"streaming": get_args(Streaming), "lr_scaling": get_args(LearningRateScaling)}


def check(where: str = "", **settings: Any) -> None:
    """Checks settings of `train` or `TrainingSpec` by their names; `where` stands before each name in a message.

    Raises:
      ConfigError: for a value out of its range.
    """
    for name, value in settings.items():
        if name == "learning_rate":
            require(bool(0 < value < math.inf), f"{where}{name}={value} must be positive and finite.")
        elif (least := _AT_LEAST.get(name)) is not None:
            kind = "a number" if name in _REAL else "a whole number"
            require(isinstance(value, int | float | np.number), f"{where}{name}={value!r} must be {kind}.")
            limits = f"at least {least} and finite" if isinstance(value, float) else f"at least {least}"
            require(bool(least <= value < math.inf), f"{where}{name}={value} must be {limits}.")
            require(is_whole(value) or name in _REAL, f"{where}{name}={value!r} must be a whole number.")
            require(name in _REAL or bool(value < 2**31), f"{where}{name}={value} must be below 2**31.")
        elif (allowed := _ALLOWED.get(name)) and value not in allowed:
            raise ConfigError(unknown(f"value of {where}{name}:", value, allowed))


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """How solutions are found (Section 5.1: "by running the SGD algorithm ... until the algorithm converges").

    Attributes:
      batch_size: examples a step, drawn without replacement within an epoch; 0 is the full data set.
      max_steps: a run that has not converged by then stops with status 'max_steps'.
      learning_rate: base rate.
      lr_scaling: 'branches' multiplies the rate by I (mean-field: with the mean over branches each branch's gradient
        carries 1/I), 'inverse_branches' divides by I, 'none' leaves it.
      optimizer: an entry of `optimizers.OPTIMIZERS`; plain SGD by default.
      weight_decay: added to the gradient, times the parameters.
      chain: optax transformations put before the optimiser, as text: `('clip_by_global_norm(1.0)', 'centralize()')`.
        They work on the gradient; a whole optimiser (`adam(0.1)`), which brings its own rate and sign, is refused.
      schedule: an entry of `schedules.SCHEDULES`.
      check_every: steps in a segment, between two looks of the schedule and two lines of metrics.
      tolerance: a mean loss over a segment below this is status 'converged' (authors: 1e-5).
      checkpoint_seconds: least time between two checkpoints; one is always written at the end.
      streaming: 'on' takes the streamed step, 'off' never does, 'auto' decides by size and memory; see `train`.
      branch_chunk: branches at a time in the streamed step; 0 chooses.  Results depend on it through rounding only.
    """

    batch_size: int = 128
    max_steps: int = 10_000
    learning_rate: float = 0.1
    lr_scaling: LearningRateScaling = "branches"
    optimizer: Component = Component("sgd", {"momentum": 0.0, "nesterov": False})
    weight_decay: float = 0.0
    chain: tuple[str, ...] = ()
    schedule: Component = Component("plateau", {"factor": 0.1, "min_delta": 1e-5, "max_decays": 3, "patience": 1})
    check_every: int = 100
    tolerance: float = 1e-5
    checkpoint_seconds: float = 60.0
    streaming: Streaming = "auto"
    branch_chunk: int = 0

    def __post_init__(self) -> None:
        check("training.", **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    def arguments(self, num_branches: int) -> dict[str, Any]:
        """What `train` takes after network, loss and data, for a network of I branches: `train(..., **arguments)`.

        Raises:
          ConfigError: for a rate that is no number once it is scaled, or an item of `chain` that is not a
            transformation of gradients.
          UnknownNameError, SettingError: for an optimiser or a schedule that is in no table, or settings it lacks.
        """
        names = (
            "batch_size",
            "max_steps",
            "check_every",
            "tolerance",
            "checkpoint_seconds",
            "streaming",
            "branch_chunk",
        )
        schedule = SCHEDULES.build(self.schedule.name, max_steps=self.max_steps, **self.schedule.settings)
        rate = scaled_learning_rate(self, num_branches)
        require(
            0 < rate < math.inf, f"training.learning_rate={self.learning_rate} gives {rate} for I = {num_branches}."
        )
        return {
            "optimizer": optimizers.build(self.optimizer, chain=self.chain, weight_decay=self.weight_decay),
            "schedule": schedule._replace(base=rate),
            **{name: getattr(self, name) for name in names},
        }


def scaled_learning_rate(spec: TrainingSpec, num_branches: int) -> float:
    """The rate that the optimiser uses, in units of parameter change per gradient."""
    factor = {"branches": num_branches, "none": 1.0, "inverse_branches": 1.0 / num_branches}[spec.lr_scaling]
    return spec.learning_rate * factor


def num_branches(net: Network) -> int:
    """I of a network made by `multi_branch`; 1 of every other, a mixture among them."""
    return net.stacked.num_branches if net.stacked is not None else 1
