"""Training as a config asks for it, in one call."""

from __future__ import annotations

from typing import Any

from dualgap_jax.config import Component
from dualgap_jax.optimizers import for_network
from dualgap_jax.training import Solution, TrainingSpec, num_branches, train
from dualgap_jax.training.engine import Transformation
from dualgap_jax.types import Network


def sgd(momentum: float = 0.0, nesterov: bool = False) -> Component:
    """The optimiser of a config."""
    return Component("sgd", {"momentum": momentum, "nesterov": nesterov})


def train_as(
    net: Network, loss: Any, data: Any, spec: TrainingSpec, *, learning_rate: float | None = None, **more: Any
) -> list[Solution]:
    """Trains by a spec; `learning_rate` is the rate after scaling, None the spec's."""
    arguments = spec.arguments(num_branches(net))
    if learning_rate is not None:
        arguments["schedule"] = arguments["schedule"]._replace(base=learning_rate)
    return train(net, loss, data, **{**arguments, **more})


def transformation_of(net: Network, spec: TrainingSpec) -> Transformation:
    """The optimiser of a spec, on each branch of a network alone."""
    return for_network(net, spec.arguments(1)["optimizer"])
