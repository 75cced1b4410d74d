"""A lower bound on F*, and what it was proven from."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from dualgap_jax.duality.values import Provable


class Pieces(NamedTuple):
    """What a bound adds up: `-conjugate + minimum - multiplier K`, each a proven bound on its term."""

    conjugate: float
    minimum: float
    cost: float


@dataclasses.dataclass(frozen=True, eq=False)
class Bound(Provable):
    """A lower bound on F*; its status says whether it is proven.

    Attributes:
      value: the bound; minus infinity where nothing is known.
      alpha: `[n, out]`, the dual vectors it holds for, in the domain of the conjugate exactly.
      multiplier: lam.
      pieces: its terms.
      kappa: the bound on kappa(alpha) behind it; None for branch and bound.
      evidence: what the bound on one branch was proven with: the `Tree` of branch and bound, `engines.Relaxed` of the
        moment relaxation; None for engines that can be run again.
      point: `[p]`, the best branch known for alpha; None where none is known.
      method: the engine, or the search.
    """

    value: float
    alpha: np.ndarray
    multiplier: float
    pieces: Pieces
    kappa: float | None
    evidence: Any
    point: np.ndarray | None
    method: str
