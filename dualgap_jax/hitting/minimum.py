"""The global minimum of synthetic data, shown by evaluating the teacher on it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from dualgap_jax.config import require
from dualgap_jax.data import Dataset, Teacher, relu_teacher, teacher_outputs
from dualgap_jax.hitting.runs import Weights, make_runs
from dualgap_jax.hitting.weights import full_loss
from dualgap_jax.losses import Loss


class GroundTruth(NamedTuple):
    """The global minimum of a data set, attained by a multiple of the teacher.

    Attributes:
      loss: mean loss of the rescaled teacher over the full data, in float64: 0 for the hinge; for the squared loss the
        rounding of the labels to float32, about 1e-15.
      scale: the factor on the teacher's output weights.
      smallest_margin: `min y f(x)` before scaling (hinge), or NaN.
      teacher: the rescaled teacher, one of the networks with at least its number of hidden units.
    """

    loss: float
    scale: float
    smallest_margin: float
    teacher: Teacher


def ground_truth(dataset: Dataset, loss: Loss) -> GroundTruth:
    """Shows that the least possible loss, 0, is attained on `synthetic_relu` data, by evaluating the teacher on it.

    For the tau-hinge `c f` with `c = tau / min_i y_i f(x_i)` has all margins at least tau.  A little is added against
    rounding.

    Raises:
      ConfigError: for other data; for a loss other than a hinge on labels of sign or the squared loss on real labels,
        whose least value is not known.
    """
    info = dataset.info
    require(dataset.name == "synthetic_relu", f"data set {dataset.name!r} has no known teacher; use synthetic_relu.")
    sign = info["labels"] == "sign"
    require(
        loss.tau is not None if sign else "regression" in loss.tasks,
        "the global minimum is known for a hinge loss on labels='sign' and for the squared loss on labels='real'.",
    )
    teacher = relu_teacher(**{k: info[k] for k in ("d", "teacher_width", "teacher_scale", "seed")})
    outputs = teacher_outputs(teacher, dataset.x)
    scale, smallest = 1.0, math.nan
    if sign and loss.tau is not None:
        smallest = float((dataset.y.astype(np.float64) * outputs).min())
        require(smallest > 0, f"the teacher does not separate the data (smallest margin {smallest}).")
        scale = loss.tau / smallest * (1 + 1e-9)
    scaled = Teacher(scale * teacher.a, teacher.w)
    weights = Weights(scaled.w[None], np.zeros((1, len(scaled.a))), scaled.a[None], np.zeros(1))
    run = make_runs(len(scaled.a), 0)
    return GroundTruth(float(full_loss(weights, run, [dataset], loss)[0]), scale, smallest, scaled)
