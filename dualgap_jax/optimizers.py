"""Optax for multi-branch networks: a transformation acts on each branch's own leaves, stacked or not.

The leaves of a stacked network lead with the branch axis, which is none of the network's mathematics: a transformation
that looks at the norm, the rank, the mean or the largest axes of a leaf (clipping, Muon, centring, Adafactor) would see
fifty thousand branches as one tensor.  `for_network` maps a transformation over that axis, so that stacking changes
nothing of what it does to one branch, and whoever streams may update a few branches at a time.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from dualgap_jax.config import Component, ConfigError
from dualgap_jax.registry import Table
from dualgap_jax.sizes import switch
from dualgap_jax.types import Network, Params, PyTree

_PROBE = {"kernel": (3, 2), "bias": (3,)}


def for_network(network: Network, transformation: Any) -> optax.GradientTransformationExtraArgs:
    """The transformation that acts on every branch of `network` as `transformation` acts on one alone.

    For a stacked network each leaf `[I, ...]` of parameters, gradients and optimiser state is taken branch by branch,
    at every level of nesting; each branch has a state of its own, whose leaves lead with the branch axis too.  Each
    part of a mixture is taken alone, and so is each of its branches.  Any other network gets the transformation as it
    is.

    Args:
      network: whose parameters are to be trained.
      transformation: any optax transformation or optimiser that needs gradients, parameters, and at most the loss
        (`value`).

    Returns:
      A transformation whose `update(gradients, state, params, value=loss)` ignores the loss where it is not needed.
      Its `init` raises ConfigError for a transformation that `check` refuses for the network's parameters.

    Raises:
      ConfigError: for something else than an optax transformation.
    """
    if isinstance(transformation, optax.MultiSteps):
        transformation = transformation.gradient_transformation()
    if not isinstance(transformation, optax.GradientTransformation):
        hint = ""
        if isinstance(transformation, int | float):
            hint = " Write optax.sgd(rate)."
        elif callable(transformation) and "learning_rate" in _parameters(transformation):
            hint = f" Call it with its rate, as in optax.{getattr(transformation, '__name__', 'sgd')}(0.1)."
        elif callable(transformation):
            hint = " A schedule goes into an optimizer, as in optax.sgd(schedule)."
        raise ConfigError(
            f"optimizer={transformation!r} is no optax.GradientTransformation, such as optax.sgd(0.1) or"
            f" optax.adamw(1e-3).{hint}"
        )
    inner = _with_value(transformation)

    def init(params: Params) -> PyTree:
        check(transformation, params)
        return inner.init(params)

    return _within(network, optax.GradientTransformationExtraArgs(init, inner.update))


def _parameters(function: Any) -> tuple[str, ...]:
    """The names of what a function takes; none where that is not known."""
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _within(network: Network, inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """The transformation that acts as `inner` on every part of a network that is no sum itself."""
    if network.stacked is not None:
        return _mapped(_within(network.stacked.branch, inner), network.stacked.num_branches)
    if network.mixed is not None:
        return _each([_within(part, inner) for part in network.mixed.networks])
    return inner


def _with_value(transformation: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The transformation with an update that may be given the loss, and hands it on if it is wanted."""
    if isinstance(transformation, optax.GradientTransformationExtraArgs):
        parameters = inspect.signature(transformation.update).parameters
        if "value" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return transformation

    def update(updates: Params, state: PyTree, params: Params | None = None, **_: Any) -> tuple[Params, PyTree]:
        return transformation.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(transformation.init, update)


def _mapped(inner: optax.GradientTransformationExtraArgs, num_branches: int) -> optax.GradientTransformationExtraArgs:
    """The transformation that acts on every branch alone; all of them, or as many as are given."""

    def over_branches(function: Callable[..., PyTree], *trees: PyTree) -> PyTree:
        leaves = jax.tree.leaves(trees)
        if leaves and leaves[0].shape[0] == 1:  # no batched products or sums: one branch gets the same bits as alone
            alone = function(*jax.tree.map(lambda a: a[0], trees))
            return jax.tree.map(lambda a: jnp.asarray(a)[None], alone)
        return jax.vmap(function, axis_size=None if leaves else num_branches)(*trees)

    def init(params: Params) -> PyTree:
        return over_branches(inner.init, params)

    def update(updates: Params, state: PyTree, params: Params | None = None, **extra: Any) -> tuple[Params, PyTree]:
        if params is None:
            return over_branches(lambda u, s: inner.update(u, s, **extra), updates, state)
        return over_branches(lambda u, s, p: inner.update(u, s, p, **extra), updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def _each(inners: Sequence[optax.GradientTransformationExtraArgs]) -> optax.GradientTransformationExtraArgs:
    """One transformation for each item of a tuple of parameters."""

    def init(params: Params) -> PyTree:
        return tuple(inner.init(part) for inner, part in zip(inners, params, strict=True))

    def update(updates: Params, state: PyTree, params: Params | None = None, **extra: Any) -> tuple[Params, PyTree]:
        given = (None,) * len(inners) if params is None else params
        parts = zip(inners, updates, state, given, strict=True)
        done = [inner.update(u, s, p, **extra) for inner, u, s, p in parts]
        return tuple(u for u, _ in done), tuple(s for _, s in done)

    return optax.GradientTransformationExtraArgs(init, update)


def check(transformation: optax.GradientTransformation, params: Params, name: str = "this transformation") -> None:
    """Refuses what cannot train a branch with its gradient, its parameters and the loss.

    Args:
      transformation: an optax transformation.
      params: the parameters of one branch, or their shapes.
      name: what to call the transformation in the message.

    Raises:
      ConfigError: for a transformation that needs more than a training step can give (line searches evaluate the loss
        anew, second-order methods want its Hessian, private SGD the gradient of every example), or that draws random
        numbers, since all branches would get the same; and for parameters that have no gradient, such as integers.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise ConfigError(
                f"the parameter {jax.tree_util.keystr(path) or 'itself'} is of type {leaf.dtype}, which has no gradient"
                " to be trained by: draw it as floating numbers; or, where it is to stay as it is, keep it in the"
                " network's state (in Flax a variable that is no parameter) or as a constant of its functions."
            )
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    value = jax.ShapeDtypeStruct((), jnp.zeros(0).dtype)
    update = _with_value(transformation).update
    try:
        state = jax.eval_shape(transformation.init, shapes)
        updates, after = jax.eval_shape(lambda u, s, p, v: update(u, s, p, value=v), shapes, state, shapes, value)
    except Exception as error:  # whatever a transformation raises, it cannot be used
        missing = re.findall(r"missing \d+ required .*arguments?: (.*)", str(error))
        why = f"needs {missing[0]}, which a training step does not have" if missing else f"fails on one branch: {error}"
        raise ConfigError(
            f"{name} cannot train a network here: it {why}. Take a transformation of gradients and parameters, such as"
            " optax.sgd, optax.adamw or optax.contrib.muon."
        ) from error
    given, made = (jax.tree.map(lambda a: a.shape, tree) for tree in (shapes, updates))
    if given != made:
        raise ConfigError(f"{name} cannot train a network here: its updates have shapes {made}, not {given}.")
    before_and_after: list[Any] = [jax.tree.structure(tree) for tree in (state, after)]
    if before_and_after[0] != before_and_after[1]:
        raise ConfigError(f"{name} cannot train a network here: its state changes its structure from step to step.")
    leaves = jax.tree_util.tree_leaves_with_path(state)
    if drawn := [jax.tree_util.keystr(path) for path, leaf in leaves if _is_key(path, leaf)]:
        raise ConfigError(
            f"{name} draws random numbers (its state holds the key {', '.join(drawn)}), and every branch would draw the"
            " same. Leave the noise out."
        )


def _is_key(path: Any, leaf: Any) -> bool:
    raw = leaf.dtype == jnp.uint32 and leaf.shape == (2,)
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or (raw and "key" in jax.tree_util.keystr(path[-1:]))


# --- by name, for configs -------------------------------------------------------------------------------------------


def sgd(momentum: float = 0.0, nesterov: bool = False) -> optax.GradientTransformation:
    """Stochastic gradient descent, with heavy-ball or Nesterov momentum in [0, 1); 0 is plain SGD."""
    _decays(momentum=momentum)
    return optax.sgd(1.0, momentum=momentum or None, nesterov=switch(nesterov, "nesterov"))


def _decays(**given: float) -> None:
    """Refuses rates of a running mean outside [0, 1): it would grow without end."""
    for name, value in given.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value} must lie in [0, 1).")


def _least(*, eps: float = 1.0, weight_decay: float = 0.0) -> None:
    """Refuses an eps that leaves 0/0 where a gradient is 0, and a weight decay that lets weights grow."""
    if not 0 < eps < math.inf:
        raise ValueError(f"eps={eps} must be positive and finite.")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay} must be at least 0 and finite.")


def adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015); rates of running means lie in [0, 1), eps is positive."""
    _decays(b1=b1, b2=b2)
    _least(eps=eps)
    return optax.adam(1.0, b1=b1, b2=b2, eps=eps)


def adamw(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 1e-4
) -> optax.GradientTransformation:
    """AdamW: Adam with weight decay apart from the gradient (Loshchilov and Hutter, 2019)."""
    _decays(b1=b1, b2=b2)
    _least(eps=eps, weight_decay=weight_decay)
    return optax.adamw(1.0, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)


def rmsprop(decay: float = 0.9, eps: float = 1e-8) -> optax.GradientTransformation:
    """RMSProp: the gradient over the root of a running mean of its square."""
    _decays(decay=decay)
    _least(eps=eps)
    return optax.rmsprop(1.0, decay=decay, eps=eps)


def lion(b1: float = 0.9, b2: float = 0.99, weight_decay: float = 1e-3) -> optax.GradientTransformation:
    """Lion: the sign of an interpolated momentum (Chen et al., 2023)."""
    _decays(b1=b1, b2=b2)
    _least(weight_decay=weight_decay)
    return optax.lion(1.0, b1=b1, b2=b2, weight_decay=weight_decay)


def muon(beta: float = 0.95, nesterov: bool = True) -> optax.GradientTransformation:
    """Muon: each branch's momentum matrices made orthogonal, Adam for its other leaves (Jordan et al., 2024)."""
    _decays(beta=beta)
    return optax.contrib.muon(1.0, beta=beta, nesterov=switch(nesterov, "nesterov"))


# Every entry has learning rate 1: the rate of a run, its scaling with I and its schedule multiply the update.
OPTIMIZERS: Table[Callable[..., optax.GradientTransformation]] = Table(
    "optimizer", {"sgd": sgd, "adam": adam, "adamw": adamw, "rmsprop": rmsprop, "lion": lion, "muon": muon}
)


def build(
    optimizer: Component, *, chain: Sequence[str] = (), weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """The optimiser of a config, at learning rate 1: its updates are added to the parameters times the rate.

    Args:
      optimizer: an entry of `OPTIMIZERS` with its settings.
      chain: optax transformations of the gradient put before it, as text: `('clip_by_global_norm(1.0)',)`.
      weight_decay: times the parameters, added to the gradient before all else (not decoupled: see `adamw`).

    Raises:
      ConfigError: for an item of `chain` that is no transformation of gradients.
      UnknownNameError, SettingError: for an unknown optimiser or setting.
    """
    decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    last = OPTIMIZERS.build(optimizer.name, **optimizer.settings)
    parts = [*decay, *map(from_text, chain), last]
    return optax.chain(*parts) if len(parts) > 1 else last


def from_text(text: str) -> optax.GradientTransformation:
    """An optax factory call written as text, with literal arguments only.

    Args:
      text: such as `'clip_by_global_norm(1.0)'`, `'scale_by_adam(b1=0.9)'` or `'centralize'`.

    Raises:
      ConfigError: if it is no such call, or gives a whole optimiser, which brings its own rate and sign.
    """

    def wrong(why: str) -> ConfigError:
        return ConfigError(
            f"training.chain: {text!r} {why}; write a call with literal arguments,"
            " as in 'clip_by_global_norm(1.0)' or 'scale_by_adam(b1=0.9)'."
        )

    try:
        call = ast.parse(text, mode="eval").body
        if isinstance(call, ast.Name):
            call = ast.Call(call, [], [])
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise TypeError("not a call of one name")
        positional = [ast.literal_eval(a) for a in call.args]
        named = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        made = getattr(optax, call.func.id)(*positional, **named)
        if not isinstance(made, optax.GradientTransformation):
            raise TypeError("not a GradientTransformation")
    except (SyntaxError, ValueError, TypeError, AttributeError) as error:
        raise wrong(f"is not an optax transformation of gradients ({error})") from error
    params: dict[str, Array] = {key: jnp.ones(shape) for key, shape in _PROBE.items()}
    check(made, params, f"training.chain: {text!r}")
    updates, _ = _with_value(made).update(params, made.init(params), params, value=jnp.ones(()))
    if any(bool((leaf < 0).any()) for leaf in jax.tree.leaves(updates)):
        raise wrong("turns the gradient round (a whole optimiser brings its own rate and sign; training adds them)")
    return made
