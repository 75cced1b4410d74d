"""Branches: the sub-networks f_i of Section 2 as pure functions, and adapters from Linen, NNX and bare functions.

`BRANCHES` is the table that configs name.  Its entries are called with `out=` (the number of outputs that the data set
asks for) and the settings under `config.branch`.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from dualgap_jax.registry import Table, UnknownNameError, unknown
from dualgap_jax.types import Branch, KeyArray, Params, PyTree, State, Stem

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "gelu": jax.nn.gelu,
    "identity": lambda a: a,
}

# Half-width of the uniform law or standard deviation of the normal law, as a function of the fan-in.
KERNEL_INITS: Mapping[str, tuple[str, Callable[[int], float]]] = {
    "torch": ("uniform", lambda fan_in: 1.0 / math.sqrt(fan_in)),
    "lecun": ("normal", lambda fan_in: 1.0 / math.sqrt(fan_in)),
    "he": ("normal", lambda fan_in: math.sqrt(2.0 / fan_in)),
    "normal": ("normal", lambda fan_in: 1.0),
}


def _accumulator(dtype: Any) -> Any:
    """The dtype in which numbers of this dtype are added up: float32 at least."""
    return jnp.promote_types(dtype, jnp.float32)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    """The tree with its floating leaves in this dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _activation(activation: str | Callable[[Array], Array]) -> Callable[[Array], Array]:
    if callable(activation):
        return activation
    if activation not in ACTIVATIONS:
        raise UnknownNameError(unknown("activation", activation, ACTIVATIONS))
    return ACTIVATIONS[activation]


def mlp(
    hidden: tuple[int, ...] = (8,),
    out: int = 10,
    activation: str | Callable[[Array], Array] = "relu",
    use_bias: bool = True,
    init: str = "torch",
    init_scale: int | float = 1.0,
) -> Branch:
    """A fully connected branch: `f_i(w; x) = W_L psi(... psi(W_1 x + b_1) ...) + b_L` (Section 2).

    Kernels are stored `[out, in]` and act on features-by-batch arrays, so that a vmap over branches turns the first
    layer into one large matrix product.  Inputs of any shape `[batch, ...]` are flattened to `[batch, d]`.
    Parameters: a tuple of `{'kernel': [out, in], 'bias': [out]}`, first layer first.  There is no state.

    Args:
      hidden: widths of the hidden layers; `()` gives an affine branch.
      out: number of outputs.
      activation: a name in `ACTIVATIONS`, or an elementwise function.
      use_bias: whether layers carry biases.
      init: law of the kernels.  'torch': uniform on ±1/sqrt(fan_in), the authors' choice, biases too; 'lecun': normal,
        variance 1/fan_in; 'he': normal, variance 2/fan_in; 'normal': standard normal.  Except for 'torch' biases are 0.
      init_scale: multiplies every initial kernel and bias.

    Raises:
      ValueError: for a width or `out` that is not a positive integer, or `init_scale` not positive and finite.
      UnknownNameError: for an unknown activation or init.
    """
    hidden = tuple(hidden)
    if not all(map(_is_count, (*hidden, out))):
        raise ValueError(f"mlp: hidden={hidden}, out={out!r}: every width must be a positive integer.")
    if not 0 < init_scale < math.inf:
        raise ValueError(f"mlp: init_scale={init_scale} must be positive and finite.")
    if init not in KERNEL_INITS:
        raise UnknownNameError(unknown("init", init, KERNEL_INITS))
    psi = _activation(activation)
    law, spread = KERNEL_INITS[init]

    def init_fn(key: KeyArray, x: Array, /) -> tuple[Params, State]:
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
        widths = (math.prod(x.shape[1:]), *hidden, out)
        random_bias = use_bias and init == "torch"
        columns = [fan_in + random_bias for fan_in in widths[:-1]]
        sizes = [width * c for width, c in zip(widths[1:], columns, strict=True)]
        # One draw for all layers: the random generator takes most of the time to compile and to run an initialisation.
        if law == "uniform":
            numbers = jax.random.uniform(key, (sum(sizes),), dtype, -1.0, 1.0)
        else:
            numbers = jax.random.normal(key, (sum(sizes),), dtype)
        layers: list[Params] = []
        for fan_in, width in itertools.pairwise(widths):
            block, numbers = jnp.split(numbers, [sizes[len(layers)]])
            block = init_scale * spread(fan_in) * block.reshape(width, -1)
            layer = {"kernel": block[:, :fan_in]}
            if use_bias:
                layer["bias"] = block[:, fan_in] if random_bias else jnp.zeros((width,), dtype)
            layers.append(layer)
        return tuple(layers), ()

    def affine(layer: Mapping[str, Array], a: Array) -> Array:
        z = layer["kernel"] @ a
        if not use_bias:
            return z
        wide = _accumulator(z.dtype)  # also for the gradient of the bias, a sum over the batch
        return (z.astype(wide) + layer["bias"].astype(wide)[:, None]).astype(z.dtype)

    def preactivation(params: Params, x: Array, /) -> Array:
        return affine(params[0], x.reshape(x.shape[0], -1).T)

    def features(params: Params, z: Array) -> Array:
        """The input of the last layer, `[features, batch]`."""
        for layer in params[1:-1]:
            z = affine(layer, psi(z))
        return psi(z)

    def rest(
        params: Params, state: State, z: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        del key, train
        return (affine(params[-1], features(params, z)) if hidden else z).T, state

    def rest_sum(
        params: Params, state: State, z: Array, /, *, key: Any = None, train: bool = False
    ) -> tuple[Array, State]:
        del key, train
        wide = _accumulator(z.dtype)
        if not hidden:
            return z.sum(0, dtype=wide).T, state
        head, inputs = params[-1], jax.vmap(features)(params, z)
        # On CPU XLA is six times slower on the transposed product; the barrier keeps it from folding the transpose.
        total = jnp.einsum("ioh,ihb->ob", head["kernel"], inputs, preferred_element_type=wide)
        total = jax.lax.optimization_barrier(total).T
        return (total + head["bias"].sum(0, dtype=wide)[None, :] if use_bias else total), state

    def apply(
        params: Params, state: State, x: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        return rest(params, state, preactivation(params, x), key=key, train=train)

    return Branch(init_fn, apply, Stem(preactivation, rest, rest_sum))


def mlp_output_bound(num_layers: int, radius: int | float, input_norm: int | float) -> float:
    """Largest `|f_i(w; x)|` of a bias-free branch over the ball `||w|| <= radius`, `(radius/sqrt(L))^L ||x||`.

    For L weight matrices and an activation with `|psi(a)| <= |a|` (ReLU, tanh, identity): the product of operator norms
    is at most the product of Frobenius norms, largest on the ball when they are equal.  A certified bound for
    Assumption 1.

    Raises:
      ValueError: for num_layers below 1, or a radius or norm that is negative or NaN.
    """
    if not (num_layers >= 1 and radius >= 0 and input_norm >= 0):
        raise ValueError(f"num_layers={num_layers} must be >= 1, radius={radius} and input_norm={input_norm} >= 0.")
    return (radius / math.sqrt(num_layers)) ** num_layers * input_norm


def from_functions(
    init: Callable[[KeyArray, Array], Params], apply: Callable[[Params, Array], Array], *, stem: Stem | None = None
) -> Branch:
    """A branch without state from `init(key, x) -> params` and `apply(params, x) -> y [batch, out]`."""

    def init_fn(key: KeyArray, x: Array, /) -> tuple[Params, State]:
        return init(key, x), ()

    def apply_fn(
        params: Params, state: State, x: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        del key, train
        return apply(params, x), state

    return Branch(init_fn, apply_fn, stem)


def _train_argument(call: Callable[..., Any]) -> Callable[[bool], dict[str, Any]]:
    """How `train` is passed to a module: as `train`, as `deterministic` (inverted), or not at all."""
    names = inspect.signature(call).parameters
    if "train" in names:
        return lambda train: {"train": train}
    if "deterministic" in names:
        return lambda train: {"deterministic": not train}
    return lambda train: {}


def _widened(state: State, params: Params, x: Array) -> State:
    """The state with floating leaves as wide as all else: Flax starts float32 statistics for float64 batches too."""

    def floating(leaf: Array) -> bool:
        return bool(jnp.issubdtype(leaf.dtype, jnp.floating))

    others = [leaf.dtype for leaf in (x, *jax.tree.leaves(params)) if floating(leaf)]
    return jax.tree.map(lambda s: s.astype(jnp.result_type(s.dtype, *others)) if floating(s) else s, state)


def _as_stored(new: State, old: State) -> State:
    """The new state in the old one's dtypes, so that a loop can carry it."""
    return jax.tree.map(lambda a, b: a.astype(b.dtype), new, old)


def from_linen(module: Any, *, rngs: tuple[str, ...] = ("dropout",)) -> Branch:
    """A branch from a `flax.linen` module; every collection other than `params` (batch statistics, ...) is state.

    `module.__call__(x)` may take `train: bool` or `deterministic: bool`; it is passed by name when it does.
    Floating state is at least as wide as the parameters and the example batch, and keeps its dtypes.

    Args:
      module: the module; `module(x [batch, ...]) -> y [batch, out]`.
      rngs: names of the random streams fed in training, each by its own key.

    Raises:
      TypeError: unless `module` is a Linen module.
    """
    from flax import linen as nn
    from flax.core import meta

    if not isinstance(module, nn.Module):
        raise TypeError(f"from_linen takes a flax.linen.Module instance, got {type(module).__name__}.")
    module = typing.cast(Any, module)
    mode = _train_argument(module.__call__)

    def streams(key: KeyArray) -> dict[str, KeyArray]:
        return {name: jax.random.fold_in(key, index) for index, name in enumerate(rngs)}

    def init(key: KeyArray, x: Array, /) -> tuple[Params, State]:
        params_key, rest_key = jax.random.split(key)
        variables = dict(meta.unbox(module.init({"params": params_key, **streams(rest_key)}, x, **mode(False))))
        params = variables.pop("params", {})
        return params, _widened(variables, params, x)

    def apply(
        params: Params, state: State, x: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        feed = streams(key) if key is not None else {}
        variables = {"params": params, **state}
        if not train or not state:
            return module.apply(variables, x, rngs=feed, **mode(train)), state
        y, updated = module.apply(variables, x, rngs=feed, mutable=list(state), **mode(train))
        return y, _as_stored(dict(updated), state)

    return Branch(init, apply)


def from_nnx(constructor: Callable[[Any], Any]) -> Branch:
    """A branch from a `flax.nnx` module constructor, `constructor(rngs: nnx.Rngs) -> module`.

    Parameters are the `nnx.Param` leaves; everything else but random streams and sown values is state.  Random streams
    are rebuilt from `key` at every call and never stored.  `train` sets `deterministic` and `use_running_average` in
    the module, and is passed to a `__call__` that takes `train` or `deterministic`.  Parameters have the dtypes that
    the constructor gives them; floating state is at least as wide as they and the example batch, and keeps its dtypes.
    """
    from flax import nnx

    def split(module: Any) -> tuple[Any, Any, Any, Any]:
        parts: Any = nnx.split(module, nnx.Param, nnx.Any(nnx.RngState, nnx.Intermediate), ...)
        return parts

    @functools.cache
    def skeleton() -> tuple[Any, Any]:
        graph, _, streams, _ = split(nnx.eval_shape(lambda: constructor(nnx.Rngs(0))))
        return graph, streams

    def feed(streams: Any, key: KeyArray | None) -> Any:
        leaves, treedef = jax.tree.flatten(streams)
        root = jax.random.key(0) if key is None else key
        filled = [
            jax.random.fold_in(root, index)
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for index, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, filled)

    def init(key: KeyArray, x: Array, /) -> tuple[Params, State]:
        _, params, _, state = split(constructor(nnx.Rngs(key)))
        return nnx.to_pure_dict(params), _widened(nnx.to_pure_dict(state), params, x)

    def apply(
        params: Params, state: State, x: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        graph, streams = skeleton()
        if train and key is None and jax.tree.leaves(streams):
            raise ValueError("this NNX module draws random numbers in training: pass key=.")
        module = nnx.merge(graph, nnx.State(params), feed(streams, key), nnx.State(_widened(state, params, x)))
        module = nnx.view(module, deterministic=not train, use_running_average=not train, raise_if_not_found=False)
        y = module(x, **_train_argument(module.__call__)(train))
        return y, (_as_stored(nnx.to_pure_dict(split(module)[3]), state) if train else state)

    return Branch(init, apply)


def conv(
    channels: tuple[int, ...] = (4, 8),
    out: int = 10,
    kernel_size: int = 3,
    activation: str = "relu",
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> Branch:
    """A convolutional branch: stages of convolution, optional batch norm, activation and 2x2 max pooling; then linear.

    A small relative of the VGG branches in the authors' second program.  Inputs `[batch, height, width, channels]`; a
    stage whose map has a side of 1 does not pool.  Dropout acts on the input of the linear layer.

    Raises:
      ValueError: for no channels, a size that is not a positive integer, or dropout outside [0, 1).
      UnknownNameError: for an unknown activation.
    """
    from flax import linen as nn

    channels = tuple(channels)
    if not channels or not all(map(_is_count, (*channels, out, kernel_size))):
        raise ValueError(
            f"conv: channels={channels}, out={out!r}, kernel_size={kernel_size!r}: all must be positive integers,"
            " with at least one in channels."
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"conv: dropout={dropout} must lie in [0, 1).")
    psi = _activation(activation)

    class Conv(nn.Module):
        @nn.compact
        def __call__(self, x: Array, train: bool = False) -> Array:
            if x.ndim != 4:
                raise ValueError(f"conv branch: inputs must be [batch, height, width, channels], got shape {x.shape}.")
            for features in channels:
                size = (kernel_size, kernel_size)
                x = nn.Conv(features, size, use_bias=not batch_norm, param_dtype=x.dtype)(x)
                if batch_norm:
                    x = nn.BatchNorm(use_running_average=not train, momentum=0.9, param_dtype=x.dtype)(x)
                x = psi(x)
                if min(x.shape[1:3]) >= 2:
                    x = nn.max_pool(x, (2, 2), strides=(2, 2))
            x = x.reshape(x.shape[0], -1)
            x = nn.Dropout(dropout, deterministic=not train)(x)
            return nn.Dense(out, param_dtype=x.dtype)(x)

    return from_linen(Conv())


def gru(features: int = 8, out: int = 10) -> Branch:
    """A recurrent branch: a GRU reads the input row by row; its last state is mapped linearly to the outputs.

    Inputs `[batch, time, ...]` are flattened to `[batch, time, features_in]`; `[batch, d]` is read as a sequence of d
    numbers.

    Raises:
      ValueError: for a size that is not a positive integer.
    """
    from flax import linen as nn

    if not (_is_count(features) and _is_count(out)):
        raise ValueError(f"gru: features={features!r} and out={out!r} must be positive integers.")

    class Gru(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            x = x.reshape(x.shape[0], x.shape[1], -1)
            cell = nn.GRUCell(features, dtype=x.dtype, param_dtype=x.dtype)
            states: Any = nn.RNN(cell)(x)
            return nn.Dense(out, param_dtype=x.dtype)(states[:, -1])

    return from_linen(Gru())


def with_precision(branch: Branch, *, param_dtype: Any = "float32", compute_dtype: Any = "float32") -> Branch:
    """The branch with its parameters stored in one floating dtype and its computation done in another.

    `init` draws as the branch does and rounds the parameters to `param_dtype`.  `apply` and the functions of the stem
    take parameters and inputs to `compute_dtype`, and their outputs come back in float32 (float64 where that is the
    compute dtype), so that the sum over branches, the loss and all above are float32.  State keeps its dtypes.
    Gradients come back in `param_dtype`, as JAX has it.

    In an `mlp` every sum that this package writes, over branches, hidden units and the batch, accumulates in float32,
    in the gradient too; products with bfloat16 operands do so on all of XLA's platforms.  Flax modules do inside what
    Flax does.

    Pre-activations in bfloat16 are affine in the parameters only up to their rounding, a relative 2^-8.  Networks are
    therefore trained with this wrapper, and evaluated and drawn in float32 by the plain branch, with the parameters
    `upcast`.

    With bfloat16 parameters `training.step` computes the new weight in float32 and rounds it to nearest once: a change
    smaller than 2^-9 of the weight is lost, and one larger than 2^-8 never is.

    Args:
      branch: one branch.  Of a network of many, wrap the branch and sum afterwards.
      param_dtype, compute_dtype: floating dtypes, as `jnp.dtype` takes them.

    Raises:
      ValueError: for a dtype that is not floating, or a network made by `multi_branch`.
    """
    for name, dtype in (("param_dtype", param_dtype), ("compute_dtype", compute_dtype)):
        if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            raise ValueError(f"with_precision: {name}={dtype} must be a floating dtype, such as float32 or bfloat16.")
    if branch.stacked is not None:
        raise ValueError(
            "with_precision takes one branch, and got a network of many, whose sum must stay float32:"
            " write multi_branch(with_precision(branch, ...), num_branches)."
        )
    wide = _accumulator(jnp.dtype(compute_dtype))

    def init(key: KeyArray, x: Array, /) -> tuple[Params, State]:
        params, state = branch.init(key, x)
        return _cast(params, param_dtype), state

    def at_precision(apply: Callable[..., tuple[Array, State]]) -> Callable[..., tuple[Array, State]]:
        def run(
            params: Params, state: State, x: PyTree, /, *, key: Any = None, train: bool = False
        ) -> tuple[Array, State]:
            y, new = apply(_cast(params, compute_dtype), state, _cast(x, compute_dtype), key=key, train=train)
            return y.astype(wide), _as_stored(new, state)

        return run

    if branch.stem is None:
        return Branch(init, at_precision(branch.apply))
    first, rest, rest_sum = branch.stem

    def preactivation(params: Params, x: Array, /) -> PyTree:
        return _cast(first(_cast(params, compute_dtype), _cast(x, compute_dtype)), compute_dtype)

    stem = Stem(preactivation, at_precision(rest), None if rest_sum is None else at_precision(rest_sum))
    return Branch(init, at_precision(branch.apply), stem)


def upcast(params: Params) -> Params:
    """Parameters, NumPy or JAX arrays, with floating leaves of at least float32; exact.

    A leaf that is as wide already is the same array.
    """

    def wide(leaf: Any) -> Any:
        narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and _accumulator(leaf.dtype) != leaf.dtype
        return leaf.astype(_accumulator(leaf.dtype)) if narrow else leaf

    return jax.tree.map(wide, params)


BRANCHES: Table[Callable[..., Branch]] = Table("branch", {"mlp": mlp, "conv": conv, "gru": gru})

__all__ = [
    "ACTIVATIONS",
    "BRANCHES",
    "KERNEL_INITS",
    "conv",
    "from_functions",
    "from_linen",
    "from_nnx",
    "gru",
    "mlp",
    "mlp_output_bound",
    "upcast",
    "with_precision",
]
