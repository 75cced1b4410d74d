"""Networks from bare functions."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from dualgap_jax.networks.settings import one_array
from dualgap_jax.types import KeyArray, Network, Params, State, Stem


def from_functions(
    init: Callable[[KeyArray, Array], Params], apply: Callable[[Params, Array], Array], *, stem: Stem | None = None
) -> Network:
    """A branch without state from `init(key, x) -> params` and `apply(params, x) -> y [batch, out]`."""

    def init_fn(key: KeyArray, x: Array, /) -> tuple[Params, State]:
        return init(key, x), ()

    def apply_fn(
        params: Params, state: State, x: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        del key, train
        return one_array(apply(params, x), "from_functions: apply"), state

    return Network(init_fn, apply_fn, stem)
