"""What is known about the distance of a network, or of a measure of branches, from the global optimum."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from dualgap_jax.certify.bound import Bound
from dualgap_jax.duality.values import Status
from dualgap_jax.terminal import digits


class TwoSided:
    """What follows from an upper bound on F* and a lower one, whatever the branches."""

    upper: float
    upper_proven: bool
    bound: Any  # with a value and a status

    @property
    def lower(self) -> float:
        """The proven lower bound on F*; minus infinity for a bound that is estimated."""
        return self.bound.value if self.bound.status == "certified" else -math.inf

    @property
    def gap(self) -> float:
        """`upper - lower`, rounded up: the network is at most that far from the optimum."""
        return math.nextafter(self.upper - self.lower, math.inf)

    @property
    def status(self) -> Status:
        """'certified' if both bounds are proven: the lower one by the checker, the upper one as `Risk.proven` says."""
        return "certified" if self.upper_proven and self.bound.status == "certified" else "estimated"


@dataclasses.dataclass(frozen=True, eq=False)
class Certificate(TwoSided):
    """Bounds on F* from both sides.  Proven and estimated numbers stand in fields of their own.

    Attributes:
      upper: the regularised risk of `weights`, with its rounding; F* is at most this.
      bound: the best proven lower bound, with what it was proven from.
      lower_estimated: the same with a search in the place of the proof, at most `upper`; None where none was asked for,
        or the search gave more than `upper`, so that it has missed the best branch (`search_missed`).
      upper_proven: whether `upper` allows for all rounding.
      weights: `[k, p]`, the branches behind `upper`.
      shares: `[k]`, the share of each; they add up to 1 at most (the rest is the branch with weights 0).
      excess: `[k]`, how much worse each branch is than the best there can be: `phi(w_k) - min phi`.
      slack: `K - mean h`, what is left of the budget; 0 with a penalty.
      fenchel: `mean l(z) + l*(alpha) - <alpha, z>`, what alpha loses against a subgradient at the outputs z.
      entering: `[p]`, the branch that would help most; None where none is known.
      entering_slope: by how much the risk falls per share that goes from the present branches to that one.
      history: rows of a solver, the bounds after each of its rounds; empty for a network.
    """

    upper: float
    bound: Bound
    lower_estimated: float | None
    upper_proven: bool
    weights: np.ndarray
    shares: np.ndarray
    excess: np.ndarray
    slack: float
    fenchel: float
    entering: np.ndarray | None
    entering_slope: float
    history: tuple[dict[str, Any], ...] = ()
    search_missed: bool = False

    @property
    def gap_estimated(self) -> float | None:
        """`upper - lower_estimated`; None without an estimate."""
        return None if self.lower_estimated is None else self.upper - self.lower_estimated

    @property
    def method(self) -> str:
        """How the lower bound was proven."""
        return self.bound.method

    @property
    def alpha(self) -> np.ndarray:
        """`[n, out]`, the dual vectors of the lower bound."""
        return self.bound.alpha

    @property
    def multiplier(self) -> float:
        """lam of the lower bound."""
        return self.bound.multiplier

    def as_text(self) -> str:
        """One line: the risk, and how far it is from the optimum at most."""
        share = f" ({digits(100 * self.gap / self.upper, 3, 'upper')} %)" if self.upper > 0 else ""
        how = f"certified, {self.method}" if self.status == "certified" else f"risk in float64, bound by {self.method}"
        upper, lower = digits(self.upper, 6, "upper"), digits(self.lower, 6, "lower")
        parts = [f"risk {upper}", f"optimum >= {lower} ({how}): within {digits(self.gap, 3, 'upper')}{share}"]
        if self.lower_estimated is not None:
            parts.append(f"optimum >= {self.lower_estimated:.6g} (estimated)")
        elif self.search_missed:
            parts.append("no estimate: the search has missed the best branch")
        return "; ".join(parts)
