"""The package's own Flax modules: `Conv`, `GRU` and the VGG-9 of the authors' second program."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from dualgap_jax import networks
from dualgap_jax.linen import GRU, VGG9, Conv


def test_networks_of_own_modules_are_those_modules(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal((2, 8, 8, 3)), jnp.float32)
    pairs = [
        (networks.conv(np.array([2, 3]), np.int64(4), batch_norm=True), Conv((2, 3), 4, batch_norm=True)),
        (networks.gru(np.int32(3), 4), GRU(3, 4)),
        (networks.vgg9(2, 4), VGG9(2, 4)),
    ]
    for net, module in pairs:
        found, expected = (jax.jit(n.init)(jax.random.key(3), x) for n in (net, networks.from_linen(module)))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        variables = jax.eval_shape(module.init, jax.random.key(0), x)
        assert jax.eval_shape(module.apply, variables, x).shape == (2, 4)


@pytest.mark.parametrize("width", [4, 32])
def test_vgg9_has_the_parameters_of_the_authors_network(width: int) -> None:
    """Seven convolutions without biases, a hidden layer without, eight batch norms, ten outputs; images 32 x 32 x 3."""
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(VGG9(width).init, jax.random.key(0), x)
    w = width
    units = [(3, w), (w, w), (w, 2 * w), (2 * w, 2 * w), (2 * w, 4 * w), (4 * w, 4 * w), (4 * w, 4 * w)]
    norms = sum(out for _, out in units) + 4 * w
    expected = 9 * sum(a * b for a, b in units) + 16 * 4 * w * 4 * w + 2 * norms + 4 * w * 10 + 10
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == expected
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["batch_stats"])) == 2 * norms
    assert jax.eval_shape(VGG9(width).apply, variables, x).shape == (2, 10)


def test_vgg9_matches_numpy(rng: np.random.Generator, x64: None) -> None:
    module, x = VGG9(1, 3), rng.standard_normal((3, 8, 8, 2))
    variables = jax.jit(module.init)(jax.random.key(0), jnp.asarray(x))
    variables = jax.tree.map(lambda a: a + 0.3 * np.abs(rng.standard_normal(a.shape)), variables)
    params = jax.tree.map(np.asarray, variables["params"])
    y, new = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]))(variables, jnp.asarray(x))

    def normalised(a: np.ndarray, index: int) -> np.ndarray:
        axes = tuple(range(a.ndim - 1))
        mean, var = a.mean(axes), a.var(axes)
        old = jax.tree.map(np.asarray, variables["batch_stats"][f"BatchNorm_{index}"])
        changed = new["batch_stats"][f"BatchNorm_{index}"]
        np.testing.assert_allclose(changed["mean"], 0.9 * old["mean"] + 0.1 * mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(changed["var"], 0.9 * old["var"] + 0.1 * var, rtol=1e-9, atol=1e-12)
        norm = params[f"BatchNorm_{index}"]
        return np.maximum((a - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"], 0)

    a, layer = x, 0
    for convolutions in (2, 2, 3):
        for _ in range(convolutions):
            padded = np.pad(a, ((0, 0), (1, 1), (1, 1), (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
            a = normalised(np.einsum("bhwcij,ijco->bhwo", windows, params[f"Conv_{layer}"]["kernel"]), layer)
            layer += 1
        batch, height, width, channels = a.shape
        a = a.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))
    hidden = normalised(a.reshape(3, -1) @ params["Dense_0"]["kernel"], 7)
    np.testing.assert_allclose(
        y, hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"], rtol=1e-9, atol=1e-9
    )


def test_vgg9_is_drawn_as_pytorch_draws() -> None:
    """Uniform on ±1/sqrt(fan_in): every kernel stays inside, comes near the ends, and has their variance."""
    params = jax.jit(VGG9(16, 4).init)(jax.random.key(0), jnp.ones((1, 8, 8, 3)))["params"]
    for name, layer in params.items():
        for leaf in (layer.get("kernel"), layer.get("bias") if name == "Dense_1" else None):
            if leaf is None:
                continue
            fan_in = np.prod(layer["kernel"].shape[:-1])
            assert float(jnp.abs(leaf).max()) <= fan_in**-0.5
            if leaf.size > 1000:
                np.testing.assert_allclose(float(leaf.var()) * 3 * fan_in, 1, atol=6 * (0.8 / leaf.size) ** 0.5)
                assert float(jnp.abs(leaf).max()) > 0.99 * fan_in**-0.5


@pytest.mark.parametrize(
    ("make", "settings"),
    [(VGG9, {"width": 0}), (VGG9, {"out": 2.5}), (networks.vgg9, {"width": "8"}), (GRU, {"features": True})],
)
def test_own_modules_refuse_bad_settings(make: Callable[..., Any], settings: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=next(iter(settings))):
        inspect.unwrap(make)(**settings)


def test_vgg9_refuses_inputs_that_are_no_images() -> None:
    with pytest.raises(ValueError, match=r"\[batch, height, width, channels\].*\(2, 16\)"):
        VGG9().init(jax.random.key(0), jnp.zeros((2, 16)))


@pytest.mark.parametrize(("module", "convolutions"), [(VGG9(1, 3), 7), (Conv((2, 3), 4), 2)])
def test_modules_convolve_by_products_on_cpu_and_by_convolutions_elsewhere(module: Any, convolutions: int) -> None:
    net, x = networks.multi_branch(module, 2), jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    params, state = jax.eval_shape(net.init, jax.random.key(0), x)
    traced = jax.jit(net.apply).trace(params, state, x)
    counts = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.convolution(")
        for platform in ("cpu", "cuda", "tpu")
    }
    assert counts == {"cpu": 0, "cuda": convolutions, "tpu": convolutions}


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5])
def test_the_product_of_patches_is_the_convolution(side: int, rng: np.random.Generator, x64: None) -> None:
    """Kernels of even and odd side, also larger than the image, against `nn.Conv` as Flax makes it."""
    module = Conv((3,), 2, kernel_size=side, activation="tanh")
    x = jnp.asarray(rng.standard_normal((2, 3, 7, 2)))
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]

    def plain(params: Any, x: jax.Array) -> jax.Array:
        maps = jnp.tanh(nn.Conv(3, (side, side), param_dtype=x.dtype).apply({"params": params["Conv_0"]}, x))
        maps = nn.max_pool(maps, (2, 2), (2, 2))
        return maps.reshape(2, -1) @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"][None]

    def loss(apply: Callable[..., jax.Array]) -> Any:
        return jax.jit(jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(3 * apply(params, x))), (0, 1)))

    found = loss(lambda params, x: module.apply({"params": params}, x))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), found, loss(plain)(params, x))
