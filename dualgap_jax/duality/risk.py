"""The risk of a primal point of problem (2), on the data of the problem or on fresh samples."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Array

from dualgap_jax.data import Dataset
from dualgap_jax.duality.problem import ByProgram, Problem, functional
from dualgap_jax.losses import AssumptionCheck, Loss, check_assumption_1


@functools.lru_cache(maxsize=32)
def _mean_outputs(key: ByProgram) -> Any:
    """A jitted `(w [k, p], shares [k], x) -> sum_k shares[k] f(w[k]; x)`, one branch after another."""

    def mean(w: Array, shares: Array, x: Array) -> Array:
        def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
            return total + pair[1] * key.problem.outputs(pair[0], x), None

        shape = jax.eval_shape(key.problem.outputs, w[0], x).shape
        return jax.lax.scan(add, jnp.zeros(shape, w.dtype), (w, shares))[0]

    return jax.jit(mean)


class Risk(NamedTuple):
    """The risk of a primal point on a data set.

    Attributes:
      linear: `E(1 - y f / tau)`, the objective under Assumption 1, f being the mean over branches.
      hinge: `E max(0, 1 - y f / tau)`.
      clipped: `hinge - linear`, what the maximum adds; 0 where Assumption 1 holds.
      half_width: of Student's confidence interval for `linear` on the population, at the level asked for; infinite for
        one example.
      assumption_1: the check on the margins of this point.
    """

    linear: float
    hinge: float
    clipped: float
    half_width: float
    assumption_1: AssumptionCheck


def primal_risk(
    problem: Problem,
    loss: Loss,
    dataset: Dataset,
    weights: np.ndarray,
    shares: np.ndarray,
    *,
    confidence: float = 0.95,
    output_bound: float | None = None,
) -> Risk:
    """Evaluates a primal point, the mean over branches with the given weights, on a data set.

    On the data of the problem `linear` is the primal objective of (2).  On a fresh sample, independent of the weights,
    `linear ± half_width` is a confidence interval for the population risk (Remark 2 read backwards).

    Args:
      problem: fixes branch and tau.
      loss: the hinge loss of eq. (1) for this task, with the problem's tau.
      dataset: where to evaluate.
      weights: `[k, p]`, the distinct branches.
      shares: `[k]`, the share of the I branches that has each; they add up to 1.
      confidence: level of the interval.
      output_bound: a proven bound on the margins over W, for Assumption 1.

    Raises:
      ValueError: if the loss has another tau or does not fit the data, the shares are none, or the level is not between
        0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, as 0.95.")
    if loss.tau != problem.tau or dataset.task not in loss.tasks:
        raise ValueError(f"the loss has tau={loss.tau} for {loss.tasks}; need tau={problem.tau} for {dataset.task}.")
    if not (np.all(np.asarray(shares) >= 0) and abs(float(np.sum(shares)) - 1) <= 1e-9):
        raise ValueError(f"shares={shares} must be at least 0 and add up to 1.")
    x = (np.asarray(dataset.x, np.float64) - dataset.mean) / dataset.std
    c, offset = functional(dataset)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a, jnp.float64) for a in (weights, shares, x)]
        outputs = _mean_outputs(ByProgram(problem))(*arrays)
        labels = jnp.asarray(dataset.y)
        hinge = np.asarray(loss.per_example(outputs, labels), np.float64)
        margins = loss.margin(outputs, labels) if loss.margin is not None else jnp.zeros(1)
        check = check_assumption_1(loss, margins, bound=output_bound)
        terms = offset - np.sum(c * np.asarray(outputs), axis=1) / problem.tau
    half, count = math.inf, len(terms)
    if count > 1:
        quantile = float(scipy.stats.t.ppf(0.5 + confidence / 2, count - 1))
        half = quantile * float(terms.std(ddof=1)) / math.sqrt(count)
    linear = float(terms.mean())
    return Risk(linear, float(hinge.mean()), float(hinge.mean() - linear), half, check)
