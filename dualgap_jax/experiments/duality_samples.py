"""A data set for Theorem 1, and fresh samples of its law."""

from __future__ import annotations

import inspect

from dualgap_jax.config import Component, ConfigError, require
from dualgap_jax.data import Dataset
from dualgap_jax.experiments.base import Tables


def samples(data: Component, wanted: int, tables: Tables) -> tuple[Dataset, list[Dataset], str]:
    """The data set, fresh samples of the same law and size, and what there is to say about them.

    Raises:
      ConfigError: for data that have no others of the same law, or too few.
    """
    settings = dict(data.settings)
    dataset = tables.datasets.build(data.name, **settings)
    if not wanted:
        return dataset, [], ""
    n = len(dataset.y)
    parameters = inspect.signature(tables.datasets[data.name]).parameters
    if "split" in parameters:
        own = settings.get("split", parameters["split"].default)
        require(own != "test", f"fresh_samples={wanted} are drawn from split='test', which the data are: give 0.")
        pool = tables.datasets.build(data.name, **{**settings, "split": "test", "num_examples": 0})
        size, first = min(n, len(pool.y) // wanted), 0
        source = f"{wanted} disjoint parts of {size:,} of the test split"
    elif "n" in parameters:
        pool = tables.datasets.build(data.name, **{**settings, "n": n * (1 + wanted)})
        size, first = n, n  # its first rows are the data set itself
        source = f"{wanted} fresh samples of {size:,}"
    else:
        raise ConfigError(f"fresh_samples={wanted}: the data set {data.name!r} has neither `n` nor `split`; give 0.")
    require(size >= 2, f"fresh_samples={wanted} leaves {size} examples a sample; give fewer.")
    cuts = [slice(first + k * size, first + (k + 1) * size) for k in range(wanted)]
    return dataset, [pool._replace(x=pool.x[c], y=pool.y[c]) for c in cuts], source
