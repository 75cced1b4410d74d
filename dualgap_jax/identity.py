"""What a result was computed from: named parts with a digest each, kept beside the result and compared before reuse.

An identity is a flat dict that JSON can hold, such as `{"loss": "sha256:5f...", "data": "sha256:09...", "seed": 0}`.
Arrays are known by their bytes, functions by the program that JAX traces from them with its constants, and plain values
stand as they are.  A digest is the same in every process and on every machine, and does not depend on names, addresses
or where a function was written; so a user's lambda has one too.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_BLOCK_BYTES = 2**24  # of an array that does not lie in one piece, hashed at a time
_SHOWN = 3  # parts that an error names
# Parameters of equations that say how a program is called and laid out, not what it computes.
_CALLING = {"name", "inline", "debug_info", "donated_invars", "keep_unused"}
_LAYING_OUT = {"ctx_mesh", "in_shardings", "out_shardings", "in_layouts", "out_layouts"}


class IdentityError(ValueError):
    """What is on disk belongs to another run; the message names what differs."""


# --- digests ----------------------------------------------------------------------------------------------------------


def arrays_digest(*trees: Any) -> str:
    """The SHA-256 of the arrays in some trees: of each leaf the path, dtype, shape and bytes, never copied whole.

    Leaves may be NumPy or JAX arrays, typed PRNG keys and numbers.  Equal values of another dtype give another digest.
    """
    into = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        _text(into, jax.tree_util.keystr(path))
        _array(into, leaf)
    return _finish(into)


def function_digest(function: Callable[..., Any], *args: Any, derivative: bool = False) -> str:
    """The SHA-256 of the program that JAX traces from a function, its constants included.

    Args:
      function: a function of trees of arrays that JAX can trace.
      args: its arguments, as arrays or `jax.ShapeDtypeStruct`; their values do not matter, but for None.
      derivative: whether the program of the vector-Jacobian product counts too, as it must where the function is
        trained: a custom derivative shows there only.
    """
    into = hashlib.sha256()
    _closed(into, jax.make_jaxpr(function)(*args))
    if derivative:
        leaves, structure = jax.tree.flatten(args)
        floating = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

        def pulled(leaves: list[Any]) -> Any:
            def outputs(chosen: list[Any]) -> list[Any]:
                given = iter(chosen)
                mixed = [next(given) if use else leaf for leaf, use in zip(leaves, floating, strict=True)]
                found = jax.tree.leaves(function(*jax.tree.unflatten(structure, mixed)))
                return [y for y in found if jnp.issubdtype(y.dtype, jnp.inexact)]

            values, pull = jax.vjp(outputs, [leaf for leaf, use in zip(leaves, floating, strict=True) if use])
            return pull([jnp.ones_like(v) for v in values])

        _closed(into, jax.make_jaxpr(pulled)(leaves))
    return _finish(into)


def combined(*digests: str) -> str:
    """One digest for several."""
    into = hashlib.sha256()
    for digest in digests:
        _text(into, digest)
    return _finish(into)


def _finish(into: Any) -> str:
    return f"sha256:{into.hexdigest()}"


def _text(into: Any, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    into.update(f"{len(data)}:".encode())
    into.update(data)


def _array(into: Any, value: Any) -> None:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        _text(into, str(jax.random.key_impl(value)))
        value = jax.random.key_data(value)
    array = np.asarray(value)
    _text(into, f"{array.dtype.name} {array.shape}")
    if array.dtype.hasobject or array.dtype.kind in "SUMm":
        _text(into, repr(array.tolist()))
        return
    native = array.dtype.newbyteorder("=")
    if array.flags.c_contiguous and array.dtype.isnative:
        into.update(array.reshape(-1).view(np.uint8).data)
        return
    array = np.atleast_1d(array)
    rows = max(1, _BLOCK_BYTES // max(1, array.nbytes // max(1, len(array))))
    for first in range(0, len(array), rows):
        block = np.ascontiguousarray(array[first : first + rows], native)
        into.update(block.reshape(-1).view(np.uint8).data)


def _closed(into: Any, closed: Any) -> None:
    _program(into, closed.jaxpr)
    for constant in closed.consts:
        _value(into, constant, frozenset())


def _program(into: Any, jaxpr: Any) -> None:
    """The equations of a program, its variables numbered as they come."""
    numbers: dict[Any, int] = {}

    def variable(v: Any) -> None:
        if isinstance(v, core.Literal):
            _text(into, "literal")
            _value(into, v.val, frozenset())
        else:
            _text(into, str(numbers.setdefault(v, len(numbers))))
        _text(into, f"{_without_addresses(v.aval)} {getattr(v.aval, 'weak_type', '')}")

    for variables in (jaxpr.constvars, jaxpr.invars):
        _text(into, f"given {len(variables)}")
        for v in variables:
            variable(v)
    for equation in jaxpr.eqns:
        _text(into, f"{equation.primitive} {len(equation.invars)} {len(equation.outvars)}")
        for v in (*equation.invars, *equation.outvars):
            variable(v)
        _value(into, {k: p for k, p in equation.params.items() if k not in _CALLING | _LAYING_OUT}, frozenset())
    _text(into, f"gives {len(jaxpr.outvars)}")
    for v in jaxpr.outvars:
        variable(v)


def _value(into: Any, value: Any, within: frozenset[int]) -> None:
    """Any parameter of an equation; `within` are the functions that it was found in, which may name themselves."""
    again = functools.partial(_value, into, within=within | {id(value)})
    _text(into, type(value).__name__)
    if isinstance(value, core.ClosedJaxpr):
        _closed(into, value)
    elif isinstance(value, core.Jaxpr):
        _program(into, value)
    elif isinstance(value, np.ndarray | np.generic | jax.Array):
        _array(into, value)
    elif isinstance(value, enum.Enum) or value is None or isinstance(value, bool | int | float | complex | str | bytes):
        _text(into, repr(value))
    elif isinstance(value, tuple | list):
        _text(into, str(len(value)))
        for item in value:
            again(item)
    elif isinstance(value, Mapping):
        _text(into, str(len(value)))
        for key in sorted(value, key=str):
            _text(into, str(key))
            again(value[key])
    elif isinstance(value, set | frozenset):
        parts = []
        for item in value:
            part = hashlib.sha256()
            _value(part, item, within)
            parts.append(part.hexdigest())
        _text(into, " ".join(sorted(parts)))
    elif id(value) in within:
        _text(into, "itself")
    elif isinstance(value, functools.partial):
        again((value.func, value.args, value.keywords))
    elif isinstance(value, types.MethodType):
        again((value.__func__, value.__self__))
    elif isinstance(value, types.FunctionType):
        again((value.__code__, value.__defaults__, value.__kwdefaults__))
        for cell in value.__closure__ or ():
            again(_content(cell))
    elif isinstance(value, types.CodeType):
        again((value.co_code, value.co_consts, value.co_names))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        again({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    else:
        _text(into, _without_addresses(value))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _without_addresses(value: Any) -> str:
    return re.sub(r"0x[0-9a-fA-F]+", "", str(value))


# --- comparison -------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """The part that an identity carries so that a difference can be explained: the version of JAX."""
    return {"jax": jax.__version__}


def difference(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first parts in which two identities differ, as in 'the loss differs, the seed is 0 and not 1', or None.

    The part `jax` (see `versions`) is no difference by itself; where a function's digest differs, it is named.
    """
    clauses, digests = [], False
    for name in {**wanted, **saved}:
        if name == "jax" or (name in saved and name in wanted and _plain(saved[name]) == _plain(wanted[name])):
            continue
        if name not in saved or name not in wanted:
            clauses.append(f"the {name} is {'not said' if name not in saved else 'said'} there")
        elif _is_digest(saved[name]) or _is_digest(wanted[name]):
            clauses.append(f"the {name} differs")
            digests = True
        else:
            clauses.append(f"the {name} is {_plain(saved[name])} and not {_plain(wanted[name])}")
    if not clauses:
        return None
    text = ", ".join(clauses[:_SHOWN]) + (f", and {len(clauses) - _SHOWN} more" if len(clauses) > _SHOWN else "")
    then, now = saved.get("jax"), wanted.get("jax")
    return f"{text} (written under jax {then}, now {now})" if digests and then != now else text


def require_same(saved: Mapping[str, Any] | None, wanted: Mapping[str, Any], where: str) -> None:
    """Checks that what is on disk belongs to what is asked for.

    Args:
      saved: the identity on disk; None where there is none.
      wanted: the identity asked for.
      where: what is on disk, the start of the message ('the folder .../solution_0').

    Raises:
      IdentityError: with a sentence that names what differs, or says that nothing is recorded.
    """
    if saved is None:
        raise IdentityError(
            f"{where} does not say which run it is of (an earlier version wrote it), so it is not gone on from;"
            " give another folder, or delete it."
        )
    if (found := difference(saved, wanted)) is not None:
        raise IdentityError(f"{where} holds another run: {found}; give another folder, or ask for that run again.")


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("sha256:")
