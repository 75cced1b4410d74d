"""Value functions of one branch on a grid of budgets, and who may call their bounds proven.

A bound is 'certified' only where the function that made it has proven it.  Such a function puts its mark on the object
that it returns (`proven`); a copy with another field has no mark, and the arrays cannot be written to.  Whatever is
made by hand is 'estimated', however it came about.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Float64

from dualgap_jax.sizes import switch

Values = Float64[np.ndarray, " m"]
Status = Literal["certified", "estimated"]
Marked = TypeVar("Marked", bound="Provable")

# The upper values of a certified function hold for budgets that are smaller by this share: a grid of floats is uniform
# up to a few roundings only, and a budget K that lies on it is known up to one.
BUDGET_SLACK = 2.0**-48
_UNIFORM = Fraction(1, 10**9)


@dataclasses.dataclass(frozen=True, eq=False)
class Provable:
    """A result that is proven if the package's own constructor says so, and estimated otherwise."""

    _subject: str | None = dataclasses.field(default=None, init=False, repr=False)

    @property
    def status(self) -> Status:
        """Whether the bounds are proven, by what this package did itself; nobody can state it.

        Of a `certify.Bound` from `certify` the checker has confirmed it; of value functions and combinations it is the
        solver's word, which `theorem1` and `proofs.prove` have confirmed.
        """
        return "certified" if self._subject is not None else "estimated"

    @property
    def subject(self) -> str | None:
        """What the proof speaks of, as a digest of the one-branch problem; None where there is no proof."""
        return self._subject


def proven(result: Marked, subject: str) -> Marked:
    """Marks a result that was just made as proven for the problem with this digest; only for those who prove it."""
    object.__setattr__(result, "_subject", subject)
    return result


def frozen(name: str, values: Any, ndim: int = 1, *, unbounded: bool = False) -> np.ndarray:
    """A float64 copy of an array that nobody can write to.

    Raises:
      ValueError: unless it has `ndim` axes, is not empty, and finite; `unbounded` allows minus infinity.
    """
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be an array of numbers with {ndim} axes, got {values!r:.60}.") from None
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"{name} must be an array with {ndim} axes that is not empty, got shape {array.shape}.")
    bad = ~np.isfinite(array) & ~(unbounded & (array == -np.inf))
    if bad.any():
        raise ValueError(f"{name} must be finite; {int(bad.sum())} of {array.size} numbers are not.")
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), np.float64).reshape(array.shape)


def number(name: str, value: Any, *, infinite: bool = False) -> float:
    """A real number as a float; Python's and NumPy's are taken.

    Raises:
      ValueError: for anything else, NaN, or an infinity that is not allowed.
    """
    if isinstance(value, bool | np.bool_ | str | bytes) or value is None or np.ndim(value) != 0:
        raise ValueError(f"{name} must be a number, got {value!r:.60}.")
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a real number that a float can hold, got {value!r:.60}.") from None
    if math.isnan(result) or (math.isinf(result) and not (infinite and result > 0)):
        allowed = "a number, or inf for no constraint" if infinite else "a finite number"
        raise ValueError(f"{name}={result} must be {allowed}.")
    return result


def uniform(budgets: np.ndarray, name: str) -> float:
    """The spacing of a grid.

    Raises:
      ValueError: unless the grid is increasing and each of its points within 1e-9 of the largest budget of its place
        on the straight line from the first point to the last.
    """
    if budgets.ndim != 1 or len(budgets) < 2 or not np.isfinite(budgets).all() or not (np.diff(budgets) > 0).all():
        raise ValueError(
            f"{name}: budgets must be a finite increasing grid [m] with m >= 2, got shape {budgets.shape}."
        )
    steps = np.diff(budgets)
    line = np.linspace(budgets[0], budgets[-1], len(budgets))
    off = float(np.abs(budgets - line).max())
    if off > float(_UNIFORM) * float(np.abs(budgets).max()):
        raise ValueError(
            f"{name}: budgets must be uniform; steps run from {steps.min():.6g} to {steps.max():.6g}, and a point is"
            f" {off:.3g} away from its place; give np.linspace(least, largest, points)."
        )
    return float(budgets[-1] - budgets[0]) / (len(budgets) - 1)


def falling(values: np.ndarray, budgets: np.ndarray, name: str) -> None:
    """Raises ValueError if values rise with the budget."""
    if (np.diff(values) > 0).any():
        where = int(np.argmax(np.diff(values)))
        raise ValueError(
            f"{name}: values rise from budget {budgets[where]:.6g} to {budgets[where + 1]:.6g}; a value function does"
            " not: give np.minimum.accumulate(values)."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ValueFunction(Provable):
    """Two-sided values of a branch's v on a uniform grid of budgets.

    Anyone can make one; it is then 'estimated'.  Those of `certify` and `homogeneous_value_function` are 'certified'
    where these have proven them.

    Attributes:
      budgets: `[m]`, uniform and increasing; the first is the least h over W, the last the largest, so that v is
        infinite below and constant above.
      lower: `[m]`, `lower[j] <= v(budgets[j])`; minus infinity where nothing is known.
      upper: `[m]`, `upper[j] >= v(budgets[j])`, non-increasing: values at feasible points.  Those of a certified
        function hold for budgets that are smaller by the share `BUDGET_SLACK` too.
      method: how it was found.
      minimisers: `[m, p]`, row j feasible for `budgets[j]` with value at most `upper[j]`; None where none are kept.
      lagrangian: `lam -> ` a lower bound on `min_w g(w) + lam h(w)`; or None.  Without it the bound follows from
        `lower`, with a loss of one grid step (see `step_below`).
      slope: `g(0) - g(w) <= slope ||w||` on W; or None.  Bounds v near the budget 0, between the grid points.
      concave: whether v is concave, which makes a lower bound on inf(P) sharp.
      margin: a bound on all margins over W, in units of tau; Assumption 1 holds where it is below 1.  None: unknown.
      proof: what the bounds were proven with, for whoever checks them again; or None.
      floor: a lower bound on h over W where it may lie below the first budget; None: nowhere does it.

    Raises:
      ValueError: for budgets that are no uniform grid, bounds that are not finite or of another length, a lower bound
        above the upper one, or upper values that rise.
    """

    budgets: Any
    lower: Any
    upper: Any
    method: str = "given"
    minimisers: Any = None
    lagrangian: Callable[[float], float] | None = None
    slope: float | None = None
    concave: bool = False
    margin: float | None = None
    proof: Any = None
    floor: float | None = None

    def __post_init__(self) -> None:
        for name in ("budgets", "lower", "upper"):
            object.__setattr__(self, name, frozen(name, getattr(self, name), unbounded=name == "lower"))
        uniform(self.budgets, "a value function")
        for name in ("lower", "upper"):
            if getattr(self, name).shape != self.budgets.shape:
                raise ValueError(
                    f"a value function needs one value a budget: {name} has {len(getattr(self, name))}, budgets have"
                    f" {len(self.budgets)}."
                )
        if (self.lower > self.upper).any():
            k = int(np.argmax(self.lower - self.upper))
            raise ValueError(
                f"a lower bound lies above the upper one: {self.lower[k]:.6g} > {self.upper[k]:.6g} at budget"
                f" {self.budgets[k]:.6g}; one of them is none."
            )
        falling(self.upper, self.budgets, "upper")
        object.__setattr__(self, "concave", switch(self.concave, "concave"))
        if self.minimisers is not None:
            object.__setattr__(self, "minimisers", frozen("minimisers", self.minimisers, 2))
            if len(self.minimisers) != len(self.budgets):
                raise ValueError(f"need one minimiser a budget, got {len(self.minimisers)} for {len(self.budgets)}.")
        if self.floor is not None and not number("floor", self.floor) <= self.budgets[0]:
            raise ValueError(f"floor={self.floor} must not lie above the first budget, {self.budgets[0]:.6g}.")
        for name in ("slope", "margin"):
            if getattr(self, name) is not None and not number(name, getattr(self, name)) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0, or None where it is unknown.")

    @property
    def tolerance(self) -> float:
        """The largest distance of the two bounds."""
        return float(np.max(self.upper - self.lower))

    @property
    def below(self) -> float:
        """What a branch may cost less than the first budget."""
        if self.floor is None or self.floor == self.budgets[0]:
            return 0.0
        return float(np.nextafter(self.budgets[0] - self.floor, math.inf))

    def step_below(self) -> Values:
        """`[m]` numbers u with `v(b) >= u[j]` for every b above `budgets[j]` up to `budgets[j + 1]`, by monotony."""
        return np.append(self.lower[1:], self.lower[-1])

    def largest_delta(self) -> float:
        """`v(least budget) - v(largest)` from the outer bounds: Delta is at most this."""
        return max(0.0, float(np.nextafter(self.upper[0] - self.lower[-1], math.inf)))
