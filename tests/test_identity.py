"""Identities: the same everywhere for what computes the same, and another for every other array, function or value."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualgap_jax import identity, losses, networks
from dualgap_jax.identity import IdentityError, arrays_digest, difference, function_digest, require_same
from dualgap_jax.networks import multi_branch

F32 = jax.ShapeDtypeStruct((4, 3), jnp.float32)


def test_an_array_is_known_by_dtype_shape_and_bytes(rng: np.random.Generator) -> None:
    a = rng.normal(size=(6, 4)).astype(np.float32)
    changed = a.copy()
    changed[5, 3] = np.nextafter(changed[5, 3], np.float32(9), dtype=np.float32)
    same = [a.copy(), jnp.asarray(a), np.asfortranarray(a), np.repeat(a, 2, axis=1)[:, ::2], a.astype(">f4")]
    others = [a.astype(np.float64), a.reshape(4, 6), a[:5], a.view(np.int32), changed, a[::-1]]
    assert {arrays_digest(b) for b in same} == {arrays_digest(a)}
    assert len({arrays_digest(b) for b in [a, *others]}) == len(others) + 1


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    a = rng.normal(size=(100, 7))
    monkeypatch.setattr(identity, "_BLOCK_BYTES", 1000)
    assert arrays_digest(np.asfortranarray(a)) == arrays_digest(a)


def test_trees_keys_numbers_and_empties_have_digests() -> None:
    trees = [
        {"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": 1}, (1,), (1.0,), (True,), (), np.zeros((0, 3)), np.zeros((3, 0)),
        jax.random.key(0), jax.random.key(1), jax.random.key_data(jax.random.key(0)), jnp.zeros(2, jnp.bfloat16),
        np.float32(0.0), np.float32(-0.0), np.array(2.0, '>f4'), np.array(["a"]), np.array(["b"]),
    ]  # fmt: skip
    assert len({arrays_digest(t) for t in trees}) == len(trees)


def test_a_function_is_known_by_what_it_computes() -> None:
    def written_out(values):  # type: ignore[no-untyped-def]
        return values * 2.0 + 1.0

    base = function_digest(lambda x: x * 2.0 + 1.0, F32)
    assert function_digest(written_out, F32) == base
    others = [
        lambda x: x * 2.0 + 1.0000001,
        lambda x: x * 2.0 - 1.0,
        lambda x: 1.0 + x,
        lambda x: x * 2 + jnp.ones((4, 3)),
        lambda x: (x * 2.0 + 1.0, x),
        lambda x: jax.jit(lambda y: y * 2.0 + 3.0)(x),
        lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y, lambda y: 2 * y, x),
        lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y, lambda y: 3 * y, x),
    ]
    digests = {function_digest(f, F32) for f in others}
    assert len(digests | {base}) == len(others) + 1
    assert function_digest(others[0], jax.ShapeDtypeStruct((5, 3), jnp.float32)) not in digests


def test_constants_count_bit_by_bit(rng: np.random.Generator) -> None:
    table = rng.normal(size=(4, 3)).astype(np.float32)
    other = table.copy()
    other[3, 2] = np.nextafter(other[3, 2], np.float32(9), dtype=np.float32)
    for make in (lambda t: lambda x: x + t, lambda t: jax.jit(lambda x: x @ jnp.asarray(t).T)):
        assert function_digest(make(table), F32) == function_digest(make(table.copy()), F32)
        assert function_digest(make(table), F32) != function_digest(make(other), F32)


def test_callbacks_count_by_their_code() -> None:
    def called(scale: float):  # type: ignore[no-untyped-def]
        shape = jax.ShapeDtypeStruct((4, 3), np.float32)
        return lambda x: jax.pure_callback(lambda a: np.float32(scale) * np.asarray(a), shape, x)

    assert function_digest(called(2.0), F32) == function_digest(called(2.0), F32)
    assert function_digest(called(2.0), F32) != function_digest(called(3.0), F32)


def test_a_custom_derivative_shows_where_asked_for() -> None:
    def with_slope(slope: float):  # type: ignore[no-untyped-def]
        @jax.custom_jvp
        def f(x):  # type: ignore[no-untyped-def]
            return jnp.sin(x)

        f.defjvp(lambda primals, tangents: (f(*primals), slope * tangents[0]))
        return lambda x, labels: (f(x), labels)

    labels = jax.ShapeDtypeStruct((4,), jnp.int32)
    one, two = (function_digest(with_slope(s), F32, labels, derivative=True) for s in (1.0, 2.0))
    assert one != two
    assert one == function_digest(with_slope(1.0), F32, labels, derivative=True)


def test_matrix_precision_and_random_numbers_count() -> None:
    def draws(key):  # type: ignore[no-untyped-def]
        return jax.random.normal(key, (3,))

    keys = [jax.eval_shape(lambda i=impl: jax.random.key(0, impl=i)) for impl in ("threefry2x32", "rbg")]
    assert len({function_digest(draws, k) for k in keys}) == 2
    plain = function_digest(lambda x: x @ x.T, F32)
    with jax.default_matmul_precision("highest"):
        assert function_digest(lambda x: x @ x.T, F32) != plain


SCRIPT = """
import json, jax, jax.numpy as jnp, numpy as np, optax
from dualgap_jax import losses, networks
from dualgap_jax.identity import arrays_digest, function_digest
from dualgap_jax.networks import multi_branch
x = jnp.zeros((2, 5))
key = jax.random.key(0)
net = multi_branch(networks.mlp(hidden=(4,), out=3, activation="gelu"), 6)
weights = jax.eval_shape(net.init, key, x)
labels = jnp.zeros(2, jnp.int32)
scores = jnp.zeros((2, 3))
adam = optax.adam(1e-3)
table = np.linspace(0, 1, 15).reshape(5, 3)
print(json.dumps([
    function_digest(net.init, key, x),
    function_digest(lambda p, k: net.apply(*p, x, key=k, train=True), weights, key, derivative=True),
    function_digest(losses.crammer_singer().per_example, scores, labels, derivative=True),
    function_digest(lambda w, y: jnp.tanh(w @ table.T).sum(-1) + y, scores, labels, derivative=True),
    function_digest(adam.update, weights[0], jax.eval_shape(adam.init, weights[0]), weights[0]),
    function_digest(lambda a: jax.pure_callback(lambda b: np.sin(b) * len({"a", "b"}), a, a), scores),
    arrays_digest({"x": table, "y": jnp.arange(3)}),
]))
"""


def test_digests_are_the_same_in_every_process() -> None:
    def answer(seed: str) -> list[str]:
        env = {**os.environ, "PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    first = answer("1")
    assert first == answer("2")
    assert len(set(first)) == len(first) == 7


def test_networks_and_losses_are_told_apart() -> None:
    x, key = jnp.zeros((2, 5)), jax.random.key(0)

    def digest(net):  # type: ignore[no-untyped-def]
        weights = jax.eval_shape(net.init, key, x)
        return function_digest(net.init, key, x), function_digest(lambda p: net.apply(*p, x), weights)

    first = multi_branch(networks.mlp(hidden=(4,), out=1), 5)
    others = [
        multi_branch(networks.mlp(hidden=(4,), out=1), 6),
        multi_branch(networks.mlp(hidden=(4,), out=1), 5, reduce="sum"),
        multi_branch(networks.mlp(hidden=(4,), out=1, activation="tanh"), 5),
        multi_branch(networks.mlp(hidden=(4,), out=1, init="normal"), 5),
    ]
    assert digest(first) == digest(multi_branch(networks.mlp(hidden=(4,), out=1), 5))
    assert len({digest(net) for net in [first, *others]}) == 5
    scores, labels = jnp.zeros((2, 1)), jnp.zeros(2)
    found = [losses.binary_hinge(), losses.binary_hinge(tau=2.0), losses.logistic(), losses.squared()]
    assert len({function_digest(loss.per_example, scores, labels, derivative=True) for loss in found}) == 4


def test_a_difference_names_the_parts() -> None:
    wanted = {"jax": "2", "loss": "sha256:a", "seed": 1, "rates": (0.1, float("nan"))}
    saved = json.loads(json.dumps(wanted))
    assert difference(saved, wanted) is None
    assert difference({**saved, "jax": "1"}, wanted) is None
    assert difference({**saved, "seed": 0}, wanted) == "the seed is 0 and not 1"
    assert difference({**saved, "loss": "sha256:b", "seed": 0}, wanted) == "the loss differs, the seed is 0 and not 1"
    assert difference({**saved, "loss": "sha256:b", "jax": "1"}, wanted) == (
        "the loss differs (written under jax 1, now 2)"
    )
    assert (
        difference({}, wanted) == "the loss is not said there, the seed is not said there, the rates is not said there"
    )
    many = difference({k: 0 for k in "abcde"}, {k: 1 for k in "abcde"})
    assert many is not None
    assert many.endswith("and 2 more")


def test_what_belongs_to_another_run_is_refused() -> None:
    require_same({"seed": 1}, {"seed": 1}, "the folder f")
    with pytest.raises(IdentityError, match=r"^the folder f holds another run: the seed is 0 and not 1; give another"):
        require_same({"seed": 0}, {"seed": 1}, "the folder f")
    with pytest.raises(IdentityError, match=r"^the folder f does not say which run it is of"):
        require_same(None, {"seed": 1}, "the folder f")
