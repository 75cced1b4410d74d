"""The types that every layer shares: networks as pairs of functions, and the aliases used in annotations."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Key

PyTree = Any
Params = PyTree
State = PyTree
KeyArray = Key[Array, ""]


class InitFn(Protocol):
    """`(key, x) -> (params, state)`; `x [batch, ...]` is an example batch that fixes shapes and dtypes."""

    def __call__(self, key: KeyArray, x: Array, /) -> tuple[Params, State]: ...


class ApplyFn(Protocol):
    """`(params, state, x, *, key, train) -> (y [batch, out], state)`.

    `key` feeds dropout and may be None when nothing random happens; `train` selects batch statistics and dropout.
    """

    def __call__(
        self, params: Params, state: State, x: PyTree, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]: ...


class StemFn(Protocol):
    """`(params, x) -> z`: the first linear map, linear in `params` for fixed `x`."""

    def __call__(self, params: Params, x: Array, /) -> PyTree: ...


class Stem(NamedTuple):
    """The split `apply = rest after preactivation` of a network at its first linear map.

    Attributes:
      preactivation: `(params, x) -> z`, **linear in params** for fixed x (a kernel and a bias both are).  Along a line
        or a plane of parameters z is therefore affine in the coordinates, which is what `landscape.evaluate` uses.
      rest: `(params, state, z, *, key, train) -> (y, state)`: everything above the first linear map.
      rest_sum: the same for parameters, state and z whose leaves lead with a branch axis `[I, ...]`, and `key` of shape
        `[I]`: returns the sum of the I outputs, and the stacked state.  None: `rest` is vmapped and summed.  A branch
        whose last map is linear contracts branches and features in one matrix product here.
      apply: the function that this splits; a network with another `apply` does not use it.  None: that of any network
        it is given to.
    """

    preactivation: StemFn
    rest: ApplyFn
    rest_sum: ApplyFn | None = None
    apply: ApplyFn | None = None


class Network(NamedTuple):
    """A network as a pair of pure functions, in the manner of optax's `GradientTransformation` (Section 2, f_i).

    A branch is a network used as a part of a larger one.  One branch, the mean of fifty thousand, and a mixture of
    unlike ones all have this type, so they nest.

    Attributes:
      init: `(key, x) -> (params, state)`.
      apply: `(params, state, x, *, key=None, train=False) -> (y [batch, out], state)`.
      stem: the split at the first linear map, or None when the network does not name one.
      stacked: for a network made by `multi_branch`, what it is the sum of; None for every other.
      mixed: for a network made by `mixture`, what it is the sum of; None for every other.
    """

    init: InitFn
    apply: ApplyFn
    stem: Stem | None = None
    stacked: Stacked | None = None
    mixed: Mixed | None = None

    def computed(self) -> Network:
        """The network with only the structure that its `apply` has: `_replace(apply=...)` leaves the old one behind."""
        if "apply" in self.replaced():
            return self._replace(stem=None, stacked=None, mixed=None)
        stale = self.stem is not None and self.stem.apply not in (None, self.apply)
        return self._replace(stem=None) if stale else self

    def replaced(self) -> list[str]:
        """Which of `init` and `apply` are not those of the sum that the network was made as; `_replace` leaves it."""
        of_sum = self.stacked or self.mixed
        return [n for n in ("init", "apply") if of_sum is not None and getattr(self, n) is not getattr(of_sum, n)]


class Stacked(NamedTuple):
    """The structure `f(w; x) = scale * sum_i branch(w_i; x)`, for whoever streams over branches.

    Attributes:
      branch: the one-branch network; every parameter and state leaf of the sum leads with a branch axis `[I, ...]`.
      num_branches: I.
      scale: 1/I for the mean of Section 2, 1 for the plain sum of Section 5.
      init, apply: the functions of the sum.
    """

    branch: Network
    num_branches: int
    scale: float
    init: InitFn
    apply: ApplyFn


class Mixed(NamedTuple):
    """The structure `f(w; x) = sum_k weights[k] * networks[k](w_k; x)`, for whoever treats the parts one by one.

    Attributes:
      networks: the parts; parameters and state of the sum are tuples, one item a part.
      init, apply: the functions of the sum.
    """

    networks: tuple[Network, ...]
    init: InitFn
    apply: ApplyFn


@runtime_checkable
class BranchSource(Protocol):
    """A stacked network's parameters and state, read a few branches at a time; leaves lead with `[I, ...]`."""

    @property
    def num_branches(self) -> int:
        """I."""
        ...

    def read(self, first: int, count: int) -> tuple[Params, State]:
        """Parameters and state of branches `first .. first + count - 1`: leaves `[count, ...]`, NumPy or JAX arrays."""
        ...
