"""The gap of Theorem 1 on fresh samples of the data's law: means and confidence intervals for the population."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy
from jaxtyping import Float64

from dualgap_jax.duality.risk import Risk


def summary(
    num_branches: Sequence[int],
    gaps: Float64[np.ndarray, "samples counts"],
    deltas: Float64[np.ndarray, " samples"],
    risks: Sequence[Risk],
) -> dict[str, Any]:
    """Means and 95 % intervals over samples, by Student's t, infinite for one; everything in it is estimated.

    Args:
      num_branches: the values of I, one a column of `gaps`.
      gaps: the gap on each sample, at most.
      deltas: Delta on each sample, at least.
      risks: for each I that of the training set's optimal point on all samples together.

    Returns:
      A record; `largest_gap_over_bound` is None where Delta is 0 on a sample, so that there is no bound to compare
      with.

    Raises:
      ValueError: for no samples.
    """
    samples = len(gaps)
    if not samples:
        raise ValueError("a summary of no samples is none: give the gaps of at least one.")
    rows = []
    for k, (count, risk) in enumerate(zip(num_branches, risks, strict=True)):
        ratios = gaps[:, k] / (2 / count * deltas) if (deltas > 0).all() else None
        rows.append(
            {
                "num_branches": count,
                "gap_mean": float(gaps[:, k].mean()),
                "gap_half_width": _half_width(gaps[:, k]),
                "largest_gap_over_bound": None if ratios is None else float(np.max(ratios)),
                "risk": risk.linear,
                "risk_half_width": risk.half_width,
                "clipped": risk.clipped,
            }
        )
    return {
        "status": "estimated",
        "delta_mean": float(np.mean(deltas)),
        "delta_half_width": _half_width(deltas),
        "rows": rows,
    }


def _half_width(values: Float64[np.ndarray, " samples"]) -> float:
    if len(values) < 2:
        return math.inf
    return float(scipy.stats.t.ppf(0.975, len(values) - 1)) / math.sqrt(len(values)) * float(values.std(ddof=1))
