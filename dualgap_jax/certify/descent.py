"""L-BFGS, as every descent of `certify` runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
import threadpoolctl


def lbfgs(
    objective: Callable[..., tuple[float, np.ndarray]], start: np.ndarray, *arguments: Any, **options: Any
) -> np.ndarray:
    """Where L-BFGS from `start [m]` ends; `objective(point, *arguments)` gives a value and its gradient.

    BLAS has one thread meanwhile: NumPy and SciPy bring a BLAS each, whose idle threads wait busily, so that in many
    small calls of both in turn either takes the processor from the other.  `options` are those of SciPy's 'L-BFGS-B'.
    """
    with threadpoolctl.threadpool_limits(1, "blas"):
        return scipy.optimize.minimize(objective, start, arguments, "L-BFGS-B", jac=True, options=options).x
