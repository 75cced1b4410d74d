"""Whether the branch, the data and the loss of a spec fit one another, seen from shapes before a run is begun."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from dualgap_jax.config import Component, ConfigError, require
from dualgap_jax.data import Dataset
from dualgap_jax.evaluation import check_outputs
from dualgap_jax.losses import Loss
from dualgap_jax.registry import Table
from dualgap_jax.training.batches import example_input, output_shape


def check(spec: Any, tables: Any) -> None:
    """Reads the data that a spec names and evaluates the shapes that its branches give on them.

    Each of the package's own groups in it with an entry `data` of the table of data sets is looked at: a `branch` (and
    a `second`) must take the examples, and with a `loss` its outputs must fit the labels.  A group may have a method
    `check_data(dataset)` that raises ConfigError for data that it cannot work with.  What the specs of other packages
    mean by these names is theirs.

    Args:
      spec: the spec of an experiment, whose `validate` has passed.
      tables: the registry.

    Raises:
      ConfigError: for parts that do not fit one another.
      SettingError, UnknownNameError, OSError: for data that cannot be read, or settings that an entry refuses.
    """
    seen: list[Any] = []
    for group in _groups(spec):
        data, loss = _entry(group, "data", tables.datasets), _entry(group, "loss", tables.losses)
        names = ("branch", "second") if getattr(group, "second_share", 0) else ("branch",)
        branches = [chosen for name in names if (chosen := _entry(group, name, tables.branches)) is not None]
        look = getattr(group, "check_data", None)
        if data is None or not (branches or look) or (data, loss, branches) in seen:
            continue
        seen.append((data, loss, branches))
        dataset = tables.datasets.build(data.name, **data.settings)
        if look is not None:
            look(dataset)
        made = None if loss is None else tables.losses.build(loss.name, **loss.settings)
        for branch in branches:
            _check_branch(branch, dataset, made, tables.branches)


def _groups(value: Any) -> Iterator[Any]:
    """The package's own groups of a spec, outermost first."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Component):
        if type(value).__module__.partition(".")[0] == __name__.partition(".")[0]:
            yield value
        for field in dataclasses.fields(value):
            yield from _groups(getattr(value, field.name))
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _groups(item)


def _entry(group: Any, name: str, table: Table[Any]) -> Component | None:
    """What a group chooses of a table under a name, or None."""
    chosen = getattr(group, name, None)
    return chosen if isinstance(chosen, Component) and chosen.name in table else None


def _check_branch(branch: Component, dataset: Dataset, loss: Loss | None, table: Table[Any]) -> None:
    net = table.build(branch.name, **{**branch.settings, "out": dataset.num_outputs})
    try:
        outputs = output_shape(net, dataset)
    except (TypeError, ValueError) as error:
        shown = ", ".join(map(str, example_input(dataset).shape[1:]))
        raise ConfigError(
            f"branch {branch.name!r} does not take the examples of data set {dataset.name!r}, [batch, {shown}]: {error}"
        ) from error
    if loss is not None:
        check_outputs(outputs, loss, dataset)
    else:
        given = ", ".join(["batch", *map(str, outputs.shape[1:])])
        fits = len(outputs.shape) == 2
        require(fits, f"branch {branch.name!r} gives outputs of shape [{given}], need [batch, outputs].")
