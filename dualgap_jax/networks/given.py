"""What is given in place of a network, and the sentence for it."""

from __future__ import annotations

import sys
from typing import Any

from dualgap_jax.types import Network


def described(given: Any) -> str:
    """What was given in place of a network, and what to write instead."""
    linen, nnx = sys.modules.get("flax.linen"), sys.modules.get("flax.nnx")
    name = given.__name__ if isinstance(given, type) else type(given).__name__
    if nnx is not None and isinstance(given, nnx.Module):
        return (
            f"the NNX module instance {name}, whose parameters are drawn already, but each branch draws its own: write"
            f" from_nnx(lambda rngs: {name}(..., rngs=rngs))"
        )
    if linen is not None and isinstance(given, linen.Module):
        return f"the Linen module instance {name}: write from_linen({name}(...))"
    if linen is not None and isinstance(given, type) and issubclass(given, linen.Module):
        return f"the Linen class {name}: write from_linen({name}(...))"
    if nnx is not None and isinstance(given, type) and issubclass(given, nnx.Module):
        return f"the NNX class {name}: write from_nnx({name}), or from_nnx(lambda rngs: {name}(..., rngs=rngs))"
    return f"{given!r} of type {type(given).__name__}"


def check_network(given: Any, where: str) -> Network:
    """The network as it is.

    Raises:
      TypeError: for anything else, with what to write instead.
    """
    if not isinstance(given, Network):
        raise TypeError(
            f"{where} takes a network (mlp(...), multi_branch(...), from_linen(module), from_nnx(constructor),"
            f" from_functions(init, apply)), got {described(given)}."
        )
    return given
