"""Spectra against dense Hessians in float64, and Lanczos against matrices whose spectrum is known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dualgap_jax as dg
from dualgap_jax import landscape, losses, trees
from dualgap_jax.landscape import spectrum
from dualgap_jax.landscape.lanczos import lanczos
from dualgap_jax.networks import InMemory, from_functions, mlp, multi_branch

CASES = {
    "logistic, tanh": (mlp((2, 2), 3, activation="tanh"), losses.logistic()),
    "hinge, relu": (mlp((3,), 3), losses.multi_margin()),
}


def problem(name: str, rng: np.random.Generator, n: int = 21) -> Any:
    """A network of three branches, a loss, examples, and parameters of which some examples are beyond the margin."""
    branch, loss = CASES[name]
    net = multi_branch(branch, 3)
    data = rng.standard_normal((n, 3)), rng.integers(0, 3, n)
    params, state = jax.jit(net.init)(jax.random.key(0), jnp.asarray(data[0]))
    params = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape)), params)
    return net, loss, data, InMemory(params, state)


def dense(net: Any, loss: Any, data: Any, network: Any) -> np.ndarray:
    """The Hessian `[I, n, I, n]`, by differentiating twice."""
    leaves, structure = jax.tree.flatten(network.params)
    sizes = np.cumsum([leaf[0].size for leaf in leaves])[:-1]
    x, y = map(jnp.asarray, data)

    def risk(flat: Any) -> Any:
        parts = jnp.split(flat, sizes, axis=1)
        params = jax.tree.unflatten(structure, [p.reshape(a.shape) for p, a in zip(parts, leaves, strict=True)])
        return jnp.mean(loss.per_example(net.apply(params, network.state, x)[0], y))

    return np.asarray(jax.hessian(risk)(jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)))


@pytest.mark.parametrize("name", CASES)
def test_the_spectrum_is_that_of_the_dense_hessian(name: str, rng: np.random.Generator, x64: None) -> None:
    net, loss, data, network = problem(name, rng)
    full = dense(net, loss, data, network)
    branches, size = full.shape[:2]
    matrix = full.reshape(branches * size, -1)
    eigenvalues = np.linalg.eigvalsh(matrix)
    scale = np.abs(eigenvalues).max()
    found = landscape.hessian(net, loss, data, network, k=4, steps=len(matrix), probes=40, tolerance=1e-9, batch_size=8)
    np.testing.assert_allclose(found.largest[0], eigenvalues[::-1][:4], atol=1e-6 * scale)
    np.testing.assert_allclose(found.smallest[0], eigenvalues[:4], atol=1e-6 * scale)
    assert found.size == len(matrix)
    assert found.converged
    assert found.examples[1] == 21
    assert abs(found.trace[0] - np.trace(matrix)) < 4 * found.trace_error[0]
    np.testing.assert_allclose(found.weights.sum(-1), 1, rtol=1e-9)
    # The share of the density above a number, against the count of eigenvalues.
    grid = np.linspace(-1.5, 1.5, 4001) * scale
    density = found.density(grid, 0.01 * scale)[0]
    for cut in (-0.5 * scale, 0.1 * scale, 0.5 * scale):
        share = np.trapezoid(np.where(grid > cut, density, 0), grid)
        assert abs(share - np.mean(eigenvalues > cut)) < 0.1

    if "tanh" in name:  # programs take long to compile
        return
    blocks = landscape.hessian(net, loss, data, network, k=2, steps=size, per_branch=True, tolerance=1e-9)
    for i in range(branches):
        own = np.linalg.eigvalsh(full[i, :, i])
        np.testing.assert_allclose(blocks.largest[i], own[::-1][:2], atol=1e-6 * scale)
        np.testing.assert_allclose(blocks.smallest[i], own[:2], atol=1e-6 * scale)
    assert blocks.size == size
    assert blocks.trace.shape == (branches,)


def test_examples_beyond_the_margin_are_left_out_and_a_network_that_fits_all_is_flat(rng: np.random.Generator) -> None:
    net, loss, (x, y), network = problem("hinge, relu", rng, 200)
    some = landscape.hessian(net, loss, (x, y), network, k=1)
    assert 0 < some.examples[0] < some.examples[1] == 200
    outputs = np.asarray(net.apply(network.params, network.state, jnp.asarray(x, jnp.float32))[0])
    fits = np.sort(outputs, axis=1)
    fits = fits[:, -1] - fits[:, -2] > 1
    flat = landscape.hessian(net, loss, (x[fits], outputs.argmax(1)[fits]), network, k=2)
    assert flat.examples[0] == 0
    assert flat.converged
    assert not flat.largest.any()
    assert not flat.trace.any()


@pytest.mark.parametrize(
    "given",
    [losses.crammer_singer(0.05), lambda z, y: jnp.where(y < 100, jnp.maximum(z[:, 0], 0) ** 2, z[:, 1] * z[:, 2])],
)
def test_felt_examples_are_found_without_a_second_derivative_of_all_outputs(
    given: Any, rng: np.random.Generator
) -> None:
    """Of 200 classes: nothing of the size batch x classes x classes; the examples are those of the full derivative."""
    net, loss = multi_branch(mlp((2,), 200), 2), losses.as_loss(given)
    x, y = rng.standard_normal((30, 3)).astype(np.float32), rng.integers(0, 200, 30)
    params, state = jax.jit(net.init)(jax.random.key(0), jnp.asarray(x))
    params = jax.tree.map(lambda a: 3 * a, params)
    outputs = net.apply(params, state, jnp.asarray(x))[0]
    y[::2] = np.asarray(outputs).argmax(1)[::2]
    taken = spectrum._Products(net, loss, dg.data.from_arrays(x, y), params, state, False, 30)
    program = taken._feels.lower(taken.flat, taken._rest, *taken._examples(np.arange(30))).compile()
    assert program.memory_analysis().temp_size_in_bytes < 30 * 200 * 200

    def one(output: Any, label: Any) -> Any:
        return loss.per_example(output[None], label[None])[0]

    derivatives = [jax.vmap(derivative(one))(outputs, jnp.asarray(y)) for derivative in (jax.grad, jax.hessian)]
    felt = np.any([np.asarray(d != 0).reshape(30, -1).any(1) for d in derivatives], axis=0)
    assert 0 < np.count_nonzero(felt) < 30
    np.testing.assert_array_equal(taken._felt, np.flatnonzero(felt))


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_what_is_kept_of_batches_changes_nothing(
    share: float, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for none or some of the batches, against memory for all."""
    net, loss, data, network = problem("logistic, tanh", rng)
    made: list[Any] = []

    class Spied(spectrum._Products):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(spectrum, "_Products", Spied)
    full = landscape.hessian(net, loss, data, network, k=2, batch_size=4)
    assert len(made[0]._kept) == 6
    basis, steps = full.size * full.nodes.shape[-1] * 4, full.nodes.shape[-1]
    memory = basis + int(2 * share * sum(map(trees.num_bytes, made[0]._kept.values())))
    monkeypatch.setattr(spectrum, "memory_available", lambda: memory)
    tight = landscape.hessian(net, loss, data, network, k=2, batch_size=4, steps=steps)
    assert len(made[1]._kept) == int(6 * share)
    for one, other in zip(full, tight, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_network_that_is_no_sum_of_branches(rng: np.random.Generator, x64: None) -> None:
    branch, loss = mlp((), 3), losses.squared()  # of this one the Hessian is the second moment of the inputs, and 1
    x, y = rng.standard_normal((9, 3)), rng.integers(0, 3, 9)
    params, state = jax.jit(branch.init)(jax.random.key(1), jnp.asarray(x))
    alone = landscape.hessian(branch, loss, (x, y), InMemory(params, state), k=3)
    inputs = np.column_stack([x, np.ones(9)])
    largest = np.linalg.eigvalsh(inputs.T @ inputs / 9)[-1]
    np.testing.assert_allclose(alone.largest[0, 0], largest, rtol=1e-6)
    assert alone.size == 12


def test_lanczos_goes_on_where_a_krylov_space_is_exhausted(rng: np.random.Generator) -> None:
    """Two matrices at once: one of rank 2, whose Krylov space has three dimensions, and one of full rank."""
    q = np.linalg.qr(rng.standard_normal((12, 12)))[0]
    spectra = np.asarray([[5.0, -3.0] + [0.0] * 10, np.linspace(-1, 7, 12)])
    matrices = np.einsum("ij,gj,kj->gik", q, spectra, q)
    start = rng.standard_normal((2, 2, 12))
    found = lanczos(lambda v: np.einsum("gij,pgj->pgi", matrices, v), start, 12, lambda found: False)
    for p in range(2):
        for g in range(2):
            np.testing.assert_allclose(found.values[p, g], np.sort(spectra[g]), atol=1e-10)
    assert found.errors.max() < 1e-10


def test_errors_bound_the_distance_to_an_eigenvalue(rng: np.random.Generator) -> None:
    matrix = rng.standard_normal((60, 60))
    matrix = matrix + matrix.T
    eigenvalues = np.linalg.eigvalsh(matrix)
    found = lanczos(lambda v: v @ matrix, rng.standard_normal((1, 1, 60)), 15, lambda found: False)
    away = np.abs(found.values[0, 0][:, None] - eigenvalues).min(1)
    assert (away <= found.errors[0, 0] + 1e-10).all()
    assert found.errors.max() > 1e-3


@pytest.mark.parametrize("size", [1e-36, 1e-12, 1e19, 1e36])
def test_lanczos_holds_at_sizes_whose_squares_leave_the_range(size: float, rng: np.random.Generator) -> None:
    matrix = rng.standard_normal((12, 12))
    matrix = matrix + matrix.T
    given = (size * matrix).astype(np.float32)
    found = lanczos(lambda v: v @ given, rng.standard_normal((1, 1, 12)).astype(np.float32), 12, lambda found: False)
    np.testing.assert_allclose(found.values[0, 0] / size, np.linalg.eigvalsh(matrix), atol=1e-4)


def test_a_hessian_of_tiny_numbers_has_its_eigenvalues(rng: np.random.Generator) -> None:
    """Inputs in another unit: the squares of what products give are beyond float32."""
    net = from_functions(lambda key, x: jnp.ones((3, 3)), lambda w, x: x @ w)
    x, network = rng.standard_normal((9, 3)).astype(np.float32), InMemory(jnp.ones((3, 3)))
    for unit in (1e-12, 1e10):
        found = landscape.hessian(net, losses.squared(), (np.float32(unit) * x, np.arange(9) % 3), network, k=2)
        largest = np.linalg.eigvalsh(x.T.astype(np.float64) @ x / 9)[-1]
        np.testing.assert_allclose(found.largest[0, 0] / unit**2, largest, rtol=1e-5)
        assert found.converged
        assert found.trace_error[0] > 0


def test_the_error_of_a_trace_is_no_less_after_one_step(rng: np.random.Generator, x64: None) -> None:
    """By one node |H v|^2 would be (v' H v)^2 / n, which may be next to 0."""
    net, loss, data, network = problem("logistic, tanh", rng)
    matrix = dense(net, loss, data, network)
    found = landscape.hessian(net, loss, data, network, k=1, steps=1)
    vector = np.random.default_rng(0).integers(0, 2, found.size) * 2 - 1
    product = matrix.reshape(found.size, -1) @ vector
    np.testing.assert_allclose(found.trace_error, np.sqrt(2 * product @ product), rtol=1e-6)


def test_a_loss_with_a_derivative_of_its_own(rng: np.random.Generator) -> None:
    """`jax.custom_vjp` as it is written, where the rule calls the function: no forward mode passes it."""

    @jax.custom_vjp
    def normaliser(outputs: Any) -> Any:
        return jax.nn.logsumexp(outputs, axis=-1)

    normaliser.defvjp(
        lambda outputs: (normaliser(outputs), outputs), lambda outputs, g: (g[..., None] * jax.nn.softmax(outputs),)
    )
    net, loss, data, network = problem("logistic, tanh", rng)

    def own(outputs: Any, labels: Any) -> Any:
        return normaliser(outputs) - jnp.take_along_axis(outputs, labels[:, None], 1)[:, 0]

    one, other = (landscape.hessian(net, function, data, network, k=1) for function in (own, loss))
    np.testing.assert_allclose(one.largest, other.largest, rtol=1e-4)


def test_bad_input_is_refused(rng: np.random.Generator) -> None:
    net, loss, data, network = problem("logistic, tanh", rng)
    for words, options in {
        "k must be a positive integer, got 0": {"k": 0},
        "exceeds the": {"k": 1000},
        "tolerance=2": {"tolerance": 2.0},
        "take fewer steps": {"probes": 10**12},
    }.items():
        with pytest.raises(ValueError, match=words):
            landscape.hessian(net, loss, data, network, **options)
    with pytest.raises(ValueError, match="no sum of branches"):
        landscape.hessian(mlp((), 3), loss, data, InMemory(({"kernel": jnp.ones((3, 3))},)), per_branch=True)
    broken = InMemory(jax.tree.map(lambda a: a * jnp.nan, network.params))
    with pytest.raises(ValueError, match="not finite"):
        landscape.hessian(net, loss, data, broken)
    # One infinite output on the right side of a hinge: none of its derivatives says so.
    x, y = np.asarray([[1.0], [2.0], [-1.0]], np.float32), np.asarray([1.0, 1.0, -1.0], np.float32)
    odd = from_functions(lambda key, x: jnp.ones((1, 1)), lambda w, x: jnp.where(x > 1.5, jnp.inf, jnp.tanh(x @ w)))
    for per_branch in (False, True):
        with pytest.raises(ValueError, match="the loss of 1 of 3 examples is not finite"):
            landscape.hessian(
                multi_branch(odd, 2), losses.binary_hinge(), (x, y), InMemory(jnp.ones((2, 1, 1))), k=1,
                per_branch=per_branch,
            )  # fmt: skip
    with pytest.raises(ValueError, match="width=0"):
        landscape.hessian(net, loss, data, network, k=1).density(np.zeros(1), 0.0)
