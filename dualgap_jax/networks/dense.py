"""Fully connected networks, and the bound on their outputs over a ball of weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dualgap_jax import seeds
from dualgap_jax.networks.precision import accumulator
from dualgap_jax.networks.settings import activation as activation_function
from dualgap_jax.registry import UnknownNameError, unknown
from dualgap_jax.sizes import positive, positives, switch
from dualgap_jax.types import KeyArray, Network, Params, State, Stem

# Half-width of the uniform law or standard deviation of the normal law, as a function of the fan-in.
KERNEL_INITS: Mapping[str, tuple[str, Callable[[int], float]]] = {
    "torch": ("uniform", lambda fan_in: 1.0 / math.sqrt(fan_in)),
    "lecun": ("normal", lambda fan_in: 1.0 / math.sqrt(fan_in)),
    "he": ("normal", lambda fan_in: math.sqrt(2.0 / fan_in)),
    "normal": ("normal", lambda fan_in: 1.0),
}


Product = Callable[[Array, Array], Array]
_FEW = 16  # inputs of a layer up to which `_few` writes its products out


@jax.custom_jvp
def _few(kernel: Array, a: Array) -> Array:
    """`kernel @ a`; on GPUs, for a layer of few inputs, as sums of products where nothing is differentiated.

    XLA's GPU compiler pads so small a product to the tiles of the matrix units and goes to memory before it and after;
    sums of products it merges with the activation and with what makes the operands.  With a gradient the product is
    the better way.
    """
    if len(a) > _FEW or kernel.dtype != jnp.float32:
        return kernel @ a
    return jax.lax.platform_dependent(kernel, a, cuda=_sums, default=jnp.matmul)


@_few.defjvp
def _few_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (kernel, a), (d_kernel, d_a) = primals, tangents
    return kernel @ a, d_kernel @ a + kernel @ d_a


def _sums(kernel: Array, a: Array) -> Array:
    """`kernel @ a` for few columns of the kernel, element by element."""
    return jnp.sum(kernel[:, :, None] * a[None], axis=1)


def mlp(
    hidden: Iterable[SupportsIndex] = (8,),
    out: SupportsIndex = 10,
    activation: str | Callable[[Array], Array] = "relu",
    use_bias: bool = True,
    init: str = "torch",
    init_scale: int | float = 1.0,
) -> Network:
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
      ValueError: for a width or `out` that is not a positive integer, `init_scale` not positive and finite, or a
        `use_bias` that is neither True nor False.
      UnknownNameError: for an unknown activation or init.
    """
    inner, num_outputs = positives(hidden, "mlp: hidden"), positive(out, "mlp: out")
    if not 0 < init_scale < math.inf:
        raise ValueError(f"mlp: init_scale={init_scale} must be positive and finite.")
    if init not in KERNEL_INITS:
        raise UnknownNameError(unknown("init", init, KERNEL_INITS))
    use_bias = switch(use_bias, "mlp: use_bias")
    psi = activation_function(activation)
    law, spread = KERNEL_INITS[init]

    def init_fn(key: KeyArray, x: Array, /) -> tuple[Params, State]:
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
        widths = (math.prod(x.shape[1:]), *inner, num_outputs)
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

    def affine(layer: Mapping[str, Array], a: Array, product: Product = jnp.matmul) -> Array:
        z = product(layer["kernel"], a)
        if not use_bias:
            return z
        wide = accumulator(z.dtype)  # also for the gradient of the bias, a sum over the batch
        return (z.astype(wide) + layer["bias"].astype(wide)[:, None]).astype(z.dtype)

    def preactivation(params: Params, x: Array, /) -> Array:
        return affine(params[0], x.reshape(x.shape[0], -1).T)

    def features(params: Params, z: Array, product: Product = jnp.matmul) -> Array:
        """The input of the last layer, `[features, batch]`."""
        for layer in params[1:-1]:
            z = affine(layer, psi(z), product)
        return psi(z)

    def rest(
        params: Params, state: State, z: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        del key, train
        return (affine(params[-1], features(params, z)) if inner else z).T, state

    def rest_sum(
        params: Params, state: State, z: Array, /, *, key: Any = None, train: bool = False
    ) -> tuple[Array, State]:
        del key
        wide = accumulator(z.dtype)
        if not inner:
            return z.sum(0, dtype=wide).T, state
        product = jnp.matmul if train else _few
        head, inputs = params[-1], jax.vmap(lambda p, z: features(p, z, product))(params, z)
        # On CPU XLA is six times slower on the transposed product; the barrier keeps it from folding the transpose.
        total = jnp.einsum("ioh,ihb->ob", head["kernel"], inputs, preferred_element_type=wide)
        total = jax.lax.optimization_barrier(total).T
        return (total + head["bias"].sum(0, dtype=wide)[None, :] if use_bias else total), state

    def apply(
        params: Params, state: State, x: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        return rest(params, state, preactivation(params, x), key=key, train=train)

    return Network(init_fn, apply, Stem(preactivation, rest, rest_sum, apply))


def gated(
    gates: Any = 8,
    out: SupportsIndex = 10,
    seed: int = 0,
    init: str = "torch",
    init_scale: int | float = 1.0,
) -> Network:
    """A branch of gated ReLU units: `f(w; x) = sum_g a_g 1[g.x >= 0] (u_g.x)`, whose gates g are fixed.

    What convex programs for ReLU networks are relaxed to (Mishkin, Sahiner and Pilanci, ICML 2022).  Parameters are
    those of a bias-free `mlp` with one hidden layer, a unit for each gate; a hidden bias is an input that is 1.

    Args:
      gates: `[m, d]`, or their number m: then standard normal vectors of the seed.
      out: number of outputs.
      seed: of gates that are drawn.
      init: law of the kernels, as of `mlp`.
      init_scale: as of `mlp`.

    Raises:
      ValueError: for gates that are no finite matrix nor a positive count, or inputs of another size.
    """
    drawn = np.ndim(gates) == 0
    given = np.zeros((positive(gates, "gated: gates"), 0)) if drawn else np.array(gates, np.float64)
    if given.ndim != 2 or not len(given) or not np.isfinite(given).all():
        raise ValueError(f"gated: gates must be a matrix [gates, inputs] of finite numbers, got shape {given.shape}.")
    units = mlp((len(given),), out, "identity", False, init, init_scale)
    above = units.stem
    assert above is not None

    def preactivation(params: Params, x: Array, /) -> Array:
        columns = x.reshape(x.shape[0], -1).T
        size = len(columns)
        fixed = seeds.generator(seed).standard_normal((len(given), size)) if drawn else given
        if fixed.shape[1] != size:
            raise ValueError(f"gated: the gates have {fixed.shape[1]} entries, the inputs {size}.")
        # A product, so that an input that is not a number shows in the outputs.
        open_ = (jnp.asarray(fixed, columns.dtype) @ columns >= 0).astype(columns.dtype)
        return open_ * above.preactivation(params, x)

    def apply(
        params: Params, state: State, x: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        return above.rest(params, state, preactivation(params, x), key=key, train=train)

    return Network(units.init, apply, Stem(preactivation, above.rest, above.rest_sum, apply))


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
