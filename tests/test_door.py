"""What a user meets first: the names of the package, and the things that are tried first with them."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from flax import linen as nn
from flax import nnx

import dualgap_jax as dg
from dualgap_jax import landscape
from dualgap_jax.config import ConfigError
from dualgap_jax.losses import LOSSES, as_loss
from dualgap_jax.networks import InMemory

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, **options: Any) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------- names


def test_importing_the_package_imports_nothing_else() -> None:
    printed = python(
        "import sys; before = set(sys.modules); import dualgap_jax as dg, json;"
        " names = dir(dg); first = sorted(set(sys.modules) - before); dg.losses; dg.mlp; dg.multi_branch; dg.mixture;"
        " print(json.dumps([names, first, sorted(sys.modules)]))"
    )
    names, first, later = json.loads(printed)
    assert names == dg.__all__ == dir(dg)
    heavy = ("jax", "flax", "scipy", "matplotlib", "tensorflow_datasets", "tensorflow", "optax", "orbax", "numpy")
    assert not [module for module in first if module.split(".")[0] in heavy]
    # Losses and plain networks need JAX alone.
    assert not {"flax", "scipy", "matplotlib", "tensorflow_datasets", "orbax"} & set(later)


def test_every_name_is_there_and_no_other() -> None:
    assert 15 <= len(dg.__all__) <= 30
    for name in dg.__all__:
        assert getattr(dg, name) is not None
    wanted = "train evaluate plane surface scores mlp multi_branch mixture losses data spectral duality linen nnx"
    assert {*wanted.split(), "landscape", "training", "networks", "__version__"} <= set(dg.__all__)
    namespace: dict[str, Any] = {}
    exec("from dualgap_jax import *", namespace)
    assert set(dg.__all__) <= set(namespace)
    with pytest.raises(AttributeError, match=r"no attribute 'trian'\. It has: .*train"):
        _ = dg.trian
    with pytest.raises(ImportError):
        exec("from dualgap_jax import nosuch")


def test_type_checkers_see_the_names_that_are_there() -> None:
    source = (ROOT / "dualgap_jax" / "__init__.py").read_text()
    block = source.partition("if TYPE_CHECKING")[2].partition("__version__")[0]
    imports = re.findall(r"from dualgap_jax(?:\.(\w+))? import (\w+) as \2$", block, flags=re.MULTILINE)
    renamed = re.findall(r"(\w+) = (\w+)\.(\w+)$", block, flags=re.MULTILINE)
    seen = [*((name, module, name) for module, name in imports), *renamed]
    assert {name for name, _, _ in seen} | {"__version__"} == set(dg.__all__)
    for name, module, attribute in seen:
        home = importlib.import_module(f"dualgap_jax.{module or name}")
        assert getattr(dg, name) is (getattr(home, attribute) if module else home)
    assert (ROOT / "dualgap_jax" / "py.typed").is_file()
    setup = (ROOT / "setup.cfg").read_text()
    assert re.search(r"\[options.package_data\]\ndualgap_jax =\n    py.typed\n", setup)
    assert "version = attr: dualgap_jax.__version__" in setup


def test_there_is_one_version() -> None:
    """The package states it; the citation and the newest release notes have the same, and the same day."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", dg.__version__)
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    releases = re.findall(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert (cited["version"], str(cited["date-released"])) == releases[0]
    assert cited["version"] == dg.__version__


# ------------------------------------------------------------------------------------------------ functions as losses


@pytest.mark.parametrize("scalar", [False, True])
def test_a_plain_function_is_a_loss(scalar: bool, rng: np.random.Generator, x64: None) -> None:
    """Per-example values or their mean, against NumPy."""

    def function(outputs: Any, labels: Any) -> Any:
        each = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        return each.mean() if scalar else each

    outputs, labels = rng.standard_normal((7, 3)), rng.integers(0, 3, 7)
    loss = as_loss(function)
    got = jax.jit(loss.per_example)(jnp.asarray(outputs), jnp.asarray(labels))
    exact = np.log(np.exp(outputs).sum(1)) - outputs[np.arange(7), labels]
    np.testing.assert_allclose(got, exact, rtol=1e-12)
    assert loss.margin is loss.tau is None
    assert as_loss(loss) is loss
    gradient = jax.grad(lambda o: loss.per_example(o, jnp.asarray(labels)).sum())(jnp.asarray(outputs))
    softmax = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
    np.testing.assert_allclose(gradient, softmax - np.eye(3)[labels], rtol=1e-9, atol=1e-12)


def test_what_is_no_loss_is_told_what_to_write() -> None:
    for name, make in LOSSES.items():
        for given in (name, make):
            with pytest.raises(TypeError, match=rf"write losses\.{name}\(\)"):
                as_loss(given)
    for wrong in ("hinge", None, 3.0):
        with pytest.raises(TypeError, match="a loss is needed"):
            as_loss(wrong)
    # One output against labels [batch]: the shapes would make a table of all pairs.
    with jax.numpy_rank_promotion("allow"):
        squared = as_loss(lambda outputs, labels: (outputs - labels) ** 2)
        with pytest.raises(TypeError, match=r"returned shape \(5, 5\).*outputs\[:, 0\]"):
            squared.per_example(jnp.ones((5, 1)), jnp.ones(5))
        with pytest.raises(TypeError, match=r"returned shape \(1, 1\)"):
            squared.per_example(jnp.ones((1, 1)), jnp.ones(1))


@pytest.mark.parametrize(
    "function",
    [
        lambda o, y: jnp.sqrt(jnp.mean((o[:, 0] - y) ** 2)),  # a root of a mean
        lambda o, y: jnp.sum((o[:, 0] - y) ** 2),
        lambda o, y: (o[:, 0] - y) ** 2 / jnp.var(y),  # a statistic of the batch
        lambda o, y: jnp.mean((o - y[None]) ** 2),  # outputs [batch, 1] against labels: a table of all pairs
    ],
)
def test_a_function_of_the_batch_as_a_whole_is_no_loss(function: Any, rng: np.random.Generator) -> None:
    outputs, labels = jnp.asarray(rng.standard_normal((6, 1))), jnp.asarray(rng.standard_normal(6))
    with pytest.raises(ValueError, match=r"for one at a time.*statistic of the batch"):
        jax.jit(as_loss(function).per_example)(outputs, labels)


def _cross_entropy(outputs: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def _balanced(outputs: Any, labels: Any) -> Any:
    return len(labels) / (2 * jnp.bincount(labels, length=2)[labels]) * _cross_entropy(outputs, labels)


def _normalised(weights: Any) -> Any:
    def loss(outputs: Any, labels: Any) -> Any:
        weight = jnp.asarray(weights)[labels]
        return jnp.sum(weight * _cross_entropy(outputs, labels)) / jnp.sum(weight)

    return loss


def _ranking(outputs: Any, labels: Any) -> Any:
    wrong = jax.nn.softplus(outputs[None, :, 0] - outputs[:, None, 0])
    pairs = labels[:, None] > labels[None, :]
    return jnp.sum(pairs * wrong) / jnp.maximum(1, jnp.sum(pairs))


def _balanced_signs(outputs: Any, labels: Any) -> Any:
    share = jnp.where(labels > 0, jnp.mean(labels > 0), jnp.mean(labels <= 0))
    return jax.nn.softplus(-labels * outputs[:, 0]) / (2 * share)


@pytest.mark.parametrize(
    ("function", "out", "signs"),
    [
        (lambda o, y: jnp.mean(_balanced(o, y)), 2, False),
        (_balanced, 2, False),
        (_normalised([1.0, 5.0]), 2, False),
        (_normalised([1.0] * 9 + [3.0]), 10, False),  # one class of ten
        (_normalised([1.0, 1.05]), 2, False),
        (_ranking, 1, False),
        (_ranking, 1, True),
        (_balanced_signs, 1, True),
        (lambda o, y: jnp.mean(jnp.sort(_cross_entropy(o, y))[-64:]), 3, False),  # the hardest of the batch
        (lambda o, y: jnp.sqrt(jnp.mean((jnp.log(o[:, 0]) - jnp.log(y)) ** 2)), 1, True),  # of positive numbers only
        (lambda o, y: 1e-9 * jnp.mean(_balanced(o, y)), 2, False),
    ],
)
def test_a_loss_that_depends_on_which_labels_are_in_the_batch_is_none(
    function: Any, out: int, signs: bool, rng: np.random.Generator
) -> None:
    outputs, labels = jnp.asarray(rng.standard_normal((6, out))), jnp.ones(6, jnp.float32 if signs else jnp.int32)
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match=r"such as the share of each class"):
        jax.jit(as_loss(function).per_example)(outputs, labels)


@pytest.mark.parametrize(
    ("function", "out", "signs"),
    [
        (lambda o, y: jnp.asarray([1.0, 5.0])[y] * _cross_entropy(o, y), 2, False),  # weights of the whole training set
        (lambda o, y: jnp.mean(jnp.asarray([1.0, 5.0])[y] * _cross_entropy(o, y)), 2, False),
        (lambda o, y: jnp.mean((1 - jnp.exp(-_cross_entropy(o, y))) ** 2 * _cross_entropy(o, y)), 10, False),  # focal
        (lambda o, y: jax.nn.logsumexp(o, axis=-1).mean() - jnp.take_along_axis(o, y[:, None], 1).mean(), 10, False),
        (lambda o, y: _cross_entropy(o.astype(jnp.bfloat16), y).mean(), 10, False),
        (lambda o, y: optax.sigmoid_binary_cross_entropy(o[:, 0], y), 1, False),  # classes 0 and 1 of one output
        (lambda o, y: jnp.sum(o @ jnp.ones((10, 10)), axis=-1) ** 2, 10, False),
        (lambda o, y: _cross_entropy(o, y).sum() / len(y), 1000, False),
        (lambda o, y: jnp.mean(jnp.exp(-5 * y * o[:, 0])), 1, True),
        (lambda o, y: jnp.mean(o[:, 0] - y * jnp.log(o[:, 0])), 1, True),  # NaN for some outputs
        (lambda o, y: 1e9 * (o[:, 0] - y) ** 2, 1, True),
        (lambda o, y: jnp.mean(jnp.exp(-o[:, 1]) * (o[:, 0] - y) ** 2 + o[:, 1]), 2, True),
    ],
)
def test_a_loss_of_each_example_is_one_whatever_the_labels(
    function: Any, out: int, signs: bool, rng: np.random.Generator
) -> None:
    outputs = jnp.asarray(rng.random((6, out)), jnp.float32)
    labels = jnp.asarray(2 * rng.integers(0, 2, 6) - 1 if signs else rng.integers(0, max(2, out), 6))
    labels = labels.astype(jnp.float32 if signs else jnp.int32)
    with jax.debug_nans(False):
        found = jax.jit(as_loss(function).per_example)(outputs, labels)
        each = [function(o[None], y[None]).reshape(()) for o, y in zip(outputs, labels, strict=True)]
    np.testing.assert_allclose(found, np.asarray(each, np.float32), rtol=1e-2)


@pytest.mark.parametrize("kind", [bool, np.int32])
def test_counts_of_a_function_are_floats_so_that_nan_is_seen(kind: Any, rng: np.random.Generator) -> None:
    data = dg.data.from_arrays(rng.standard_normal((9, 2)), rng.integers(0, 3, 9))
    net = dg.multi_branch(dg.mlp(hidden=(2,), out=3), 2)
    loss = as_loss(lambda outputs, labels: (outputs.argmax(-1) != labels).astype(kind))
    params, state = net.init(jax.random.key(0), jnp.ones((1, 2)))
    measured = dg.evaluate(net, loss, data, InMemory(params, state))
    assert measured.loss == pytest.approx(1 - measured.accuracy)
    spoilt = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), params)
    assert math.isnan(dg.evaluate(net, loss, data, InMemory(spoilt, state)).loss)
    sources = [InMemory(*net.init(jax.random.key(k), jnp.ones((1, 2)))) for k in range(3)]
    ticks = np.array([-3e38, 0.0, 3e38])
    assert np.isnan(dg.surface(net, loss, data, dg.plane(sources), ticks, ticks).loss[0, 0])


@pytest.mark.parametrize(
    ("out", "name", "labels", "needed"),
    [
        (1, "logistic", [0, 1, 1, 0], r"\[batch, 2\] at least \(labels 0 and 1 are two classes; signs"),
        (2, "logistic", [0, 1, 2, 1], r"\[batch, 3\]"),
        (2, "multi_margin", [0, 1, 2, 1], r"\[batch, 3\]"),
        (2, "squared", [0.5, -1.0, 2.0, 0.0], r"\[batch, 1\]"),
        (2, "logistic", [-1, 1, 1, -1], r"\[batch, 1\]"),
    ],
)
def test_outputs_that_are_not_those_of_the_labels_are_refused(
    out: int, name: str, labels: Any, needed: str, rng: np.random.Generator
) -> None:
    data = dg.data.from_arrays(rng.standard_normal((4, 2)), np.asarray(labels))
    net, loss = dg.multi_branch(dg.mlp(hidden=(2,), out=out), 2), LOSSES[name]()
    networks = [InMemory(*net.init(jax.random.key(k), jnp.ones((1, 2)))) for k in range(3)]
    plane = dg.plane(networks)
    for call in (
        lambda: dg.train(net, loss, data, optax.sgd(0.1), max_steps=1, batch_size=2),
        lambda: dg.evaluate(net, loss, data, networks[0]),
        lambda: landscape.evaluate_points(net, loss, data, plane, plane.anchors),
        lambda: landscape.hessian(net, loss, data, networks[0]),
    ):
        with pytest.raises(ConfigError, match=rf"outputs of shape \[batch, {out}\], but .*{needed}"):
            call()
    # A part of a data set may lack the last class.
    part = dg.data.from_arrays(data.x, np.asarray([0, 1, 1, 0]))
    wide = dg.multi_branch(dg.mlp(hidden=(2,), out=3), 2)
    found = InMemory(*wide.init(jax.random.key(0), jnp.ones((1, 2))))
    assert math.isfinite(dg.evaluate(wide, dg.losses.multi_margin(), part, found).loss)
    # A function knows what it takes.
    free = as_loss(lambda outputs, labels: (outputs**2).sum(-1))
    assert math.isfinite(dg.evaluate(net, free, data, networks[0]).loss)


def test_a_loss_for_other_labels_is_refused_wherever_it_is_evaluated(rng: np.random.Generator) -> None:
    classes = dg.data.from_arrays(rng.standard_normal((4, 2)), np.asarray([0, 1, 1, 0]))
    signs = dg.data.from_arrays(classes.x, np.asarray([-1, 1, 1, -1]))
    net, loss = dg.multi_branch(dg.mlp(hidden=(2,), out=1), 2), dg.losses.binary_hinge()
    networks = [InMemory(*net.init(jax.random.key(k), jnp.ones((1, 2)))) for k in range(3)]
    plane = dg.plane(networks)
    for call in (
        lambda: landscape.evaluate_points(net, loss, classes, plane, plane.anchors),
        lambda: landscape.hessian(net, loss, classes, networks[0]),
        lambda: landscape.curve(net, loss, signs, *networks[:2], steps=1, measured=classes),
    ):
        with pytest.raises(ConfigError, match=r"the loss fits binary labels, but .* has multiclass labels"):
            call()


def test_sums_of_branches_of_few_digits_do_not_stand_still() -> None:
    """Outputs in bfloat16: a running sum of ones would stop at 256."""

    def apply(params: Any, x: Any) -> Any:
        return jnp.zeros((len(x), 1), jnp.bfloat16) + params["b"][None].astype(jnp.bfloat16)

    net = dg.multi_branch(dg.from_functions(lambda key, x: {"b": jnp.ones(1)}, apply), 3000)
    data = dg.data.from_arrays(np.ones((4, 2)), np.zeros(4), task="regression")
    network = InMemory(*net.init(jax.random.key(0), jnp.zeros((1, 2))))
    assert dg.evaluate(net, dg.losses.squared(), data, network, branch_chunk=2).loss == pytest.approx(0.5, rel=1e-3)
    for streaming in ("on", "off"):
        (solution,) = dg.train(
            net, dg.losses.squared(), data, optax.sgd(0.0), max_steps=1, check_every=1, batch_size=0, num_solutions=1,
            streaming=streaming, branch_chunk=2 if streaming == "on" else 0,
        )  # fmt: skip
        assert solution.batch_loss == pytest.approx(0.5, rel=1e-3)


# ----------------------------------------------------------------------------------------------------- tried by a user


def test_the_blocks_of_the_flax_guide_run() -> None:
    text = (ROOT / "docs" / "flax.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 4
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["logits"].shape == (32, 3)
    kernel = namespace["Model"]().init(jax.random.key(0), jnp.ones((1, 4)))["params"]["MultiBranch_0"]["branches"]
    assert kernel["Dense_0"]["kernel"].shape == (10, 8, 16)


def test_a_resnext_block_is_the_sum_of_its_bottlenecks(rng: np.random.Generator, x64: None) -> None:
    text = (ROOT / "docs" / "flax.md").read_text()
    namespace: dict[str, Any] = {"nn": nn, "jax": jax, "jnp": jnp, "MultiBranch": dg.linen.MultiBranch}
    exec(next(b for b in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "ResNeXt" in b), namespace)
    block, x = namespace["ResNeXtBlock"](3, 2), jnp.asarray(rng.standard_normal((2, 5, 4, 6)))
    variables = jax.jit(block.init)(jax.random.key(0), x)
    variables = jax.tree.map(lambda a: a + 0.2 * np.abs(rng.standard_normal(a.shape)), variables)
    assert set(variables["params"]) == {"MultiBranch_0", "BatchNorm_0"}

    def part(index: int) -> Any:
        params = jax.tree.map(lambda a: a[index], variables["params"]["MultiBranch_0"]["branches"])
        stats = jax.tree.map(lambda a: a[index], variables["batch_stats"]["MultiBranch_0"]["branches"])
        return namespace["Bottleneck"](2, 6).apply({"params": params, **stats}, x)

    norm, stats = variables["params"]["BatchNorm_0"], variables["batch_stats"]["BatchNorm_0"]
    total = np.asarray(sum(part(i) for i in range(3)))
    scale = np.asarray(norm["scale"]) / np.sqrt(np.asarray(stats["var"]) + 1e-5)
    expected = np.maximum(np.asarray(x) + (total - np.asarray(stats["mean"])) * scale + np.asarray(norm["bias"]), 0)
    np.testing.assert_allclose(block.apply(variables, x), expected, rtol=1e-10, atol=1e-12)


PROJECT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax
import orbax.checkpoint as ocp
from flax import linen as nn
import dualgap_jax as dg


class Branch(nn.Module):
    @nn.compact
    def __call__(self, x, is_training):
        x = nn.BatchNorm(use_running_average=not is_training)(nn.Dense(4)(x))
        return nn.Dropout(0.1, deterministic=not is_training)(nn.tanh(x))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(dg.linen.MultiBranch(Branch(), np.int64(6))(x, train))


rng = np.random.default_rng(0)
x = rng.standard_normal((96, 5)).astype(np.float32)
y = np.argmax(x[:, :3], axis=1).astype(np.int32)
model, optimizer = Model(), optax.adamw(optax.cosine_decay_schedule(3e-2, 150))
variables = model.init(jax.random.PRNGKey(0), x)
params, stats = variables["params"], variables["batch_stats"]
state = optimizer.init(params)


@jax.jit
def step(params, stats, state, key):
    def risk(params):
        logits, new = model.apply(
            {"params": params, "batch_stats": stats}, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new["batch_stats"]

    (loss, stats), gradient = jax.value_and_grad(risk, has_aux=True)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), stats, state, loss


losses = []
for key in jax.random.split(jax.random.key(1), 150):
    params, stats, state, loss = step(params, stats, state, key)
    losses.append(float(loss))
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(sys.argv[1], {"params": params, "batch_stats": stats, "step": jnp.int32(150)})
logits = model.apply({"params": params, "batch_stats": stats}, x)
print(json.dumps([losses[0], losses[-1], float((logits.argmax(1) == y).mean()), np.asarray(logits).tolist()]))
"""

READER = """
import json, sys
import numpy as np, orbax.checkpoint as ocp

with ocp.StandardCheckpointer() as checkpointer:
    saved = checkpointer.restore(sys.argv[1])
assert not [name for name in sys.modules if name.startswith("dualgap_jax")]
branches = saved["params"]["MultiBranch_0"]["branches"]
stats = saved["batch_stats"]["MultiBranch_0"]["branches"]["batch_stats"]["BatchNorm_0"]
x = np.random.default_rng(0).standard_normal((96, 5)).astype(np.float32)
total = 0
for i in range(6):
    z = x @ branches["Dense_0"]["kernel"][i] + branches["Dense_0"]["bias"][i]
    z = (z - stats["mean"][i]) / np.sqrt(stats["var"][i] + 1e-5)
    total = total + np.tanh(z * branches["BatchNorm_0"]["scale"][i] + branches["BatchNorm_0"]["bias"][i]) / 6
head = saved["params"]["Dense_0"]
print(json.dumps([int(saved["step"]), np.asarray(total @ head["kernel"] + head["bias"]).tolist()]))
"""


def test_a_project_of_its_own_trains_with_optax_and_its_checkpoint_opens_with_orbax_alone(tmp_path: Path) -> None:
    """The network is computed again from the checkpoint in NumPy, in a process that never imports this package."""
    for name, source in (("project.py", PROJECT), ("reader.py", READER)):
        (tmp_path / name).write_text(source)

    def run(name: str) -> Any:
        command = [sys.executable, name, str(tmp_path / "checkpoint")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first, last, accuracy, logits = run("project.py")
    assert last < 0.5 * first
    assert accuracy > 0.8
    step, again = run("reader.py")
    assert step == 150
    np.testing.assert_allclose(again, logits, rtol=1e-3, atol=1e-4)


def test_a_linen_module_trains_with_an_optax_schedule(rng: np.random.Generator) -> None:
    """`dg.train` with a module as it is, against a loop of Flax and optax alone from the same initial point."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(3)(nn.tanh(nn.Dense(4)(x)))

    x = rng.standard_normal((40, 5)).astype(np.float32)
    y = rng.integers(0, 3, 40)
    loss, model = optax.softmax_cross_entropy_with_integer_labels, Model()
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 30), weight_decay=0.01)

    def trained(steps: int) -> Any:
        (solution,) = dg.train(
            model, loss, (x, y), optimizer, batch_size=0, max_steps=steps, num_solutions=1, tolerance=0.0
        )
        assert (solution.steps, solution.status) == (steps, "max_steps")
        return solution.params

    start = params = trained(0)
    state = optimizer.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        gradient = jax.grad(lambda p: loss(model.apply({"params": p}, x), y).mean())(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(12):
        params, state = step(params, state)
    got = trained(12)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    for a, b, c in zip(*map(jax.tree.leaves, (got, params, start)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
        assert np.max(np.abs(b - c)) > 0.05


def test_the_ready_branches_are_at_the_door() -> None:
    image = jnp.ones((2, 8, 8, 1))
    for make, x in (
        (dg.mlp, image),
        (dg.networks.gated, image),
        (dg.conv, image),
        (dg.vgg9, jnp.ones((2, 32, 32, 3))),
        (dg.gru, jnp.ones((2, 3, 4))),
    ):
        net = dg.multi_branch(make(out=3), 2)
        shape = jax.eval_shape(lambda key, net=net, x=x: net.apply(*net.init(key, x), x)[0], jax.random.key(0))
        assert shape.shape == (2, 3)


def test_counts_of_any_integer_kind_and_keys_of_the_old_kind() -> None:
    for count in (np.int64(10), np.int32(10), np.uint8(10), jnp.int32(10)):
        net = dg.multi_branch(dg.mlp((np.int64(3),), np.int32(2)), count)
        assert net.stacked is not None
        assert type(net.stacked.num_branches) is int
        assert net.stacked.num_branches == 10
    module = dg.networks.to_linen(net)
    variables = module.init(jax.random.PRNGKey(0), jnp.ones((2, 4)))
    assert module.apply(variables, jnp.ones((2, 4))).shape == (2, 2)


def test_flax_modules_are_branches_as_they_are() -> None:
    x = jnp.ones((2, 4))
    for branch in (nn.Dense(3), lambda rngs: nnx.Linear(4, 3, rngs=rngs), dg.from_linen(nn.Dense(3)), dg.mlp(out=3)):
        net = dg.multi_branch(branch, 5)
        assert net.apply(*jax.jit(net.init)(jax.random.key(0), x), x)[0].shape == (2, 3)
    with pytest.raises(TypeError, match="each branch draws its own"):
        dg.multi_branch(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), 5)


WRONG_KINDS = """
import inspect, json, traceback
import numpy as np, optax
import dualgap_jax as dg
from dualgap_jax import landscape

x = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
data = dg.data.from_arrays(x, np.sign(x[:, 0]).astype(int))
net, loss, axis = dg.multi_branch(dg.mlp((2,), out=1), 2), dg.losses.binary_hinge(), np.linspace(-1, 1, 3)
nets = [s.network for s in dg.train(net, loss, data, optax.sgd(0.1), max_steps=2, num_solutions=3, batch_size=4)]
good = dict(net=net, loss=loss, data=data, dataset=data, network=nets[0], networks=nets, plane=dg.plane(nets),
            start=nets[0], end=nets[1], optimizer=optax.sgd(0.1), xs=axis, ys=axis, branch=dg.mlp((2,)),
            num_branches=2, x=x, y=np.sign(x[:, 0]), max_steps=1, steps=1, batch_size=4, check_every=1, k=1)
own = {dg.mixture: {"networks": [net, net]}, landscape.evaluate_points: {"points": np.zeros((1, 2))},
       landscape.curve: {"points": 3}}
calls = [dg.train, dg.evaluate, dg.surface, dg.plane, dg.mixture, dg.multi_branch, dg.data.from_arrays,
         dg.data.synthetic_relu, landscape.evaluate_points, landscape.hessian, landscape.curve, landscape.align]
free = {"name", "label", "report", "snapshot", "metrics", "checkpoints", "partial"}
tried, raw, taken = 0, [], []
for call in calls:
    names = inspect.signature(call).parameters
    for name in [n for n, p in names.items() if p.kind is not p.VAR_KEYWORD and n not in free]:
        for bad in ("3", 2.5, -1, float("nan"), object(), {}, b"x", 1j, (1, 2)):
            given = {k: v for k, v in (good | own.get(call, {})).items() if k in names}
            tried += 1
            try:
                call(**given | {name: bad})
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                if "dualgap_jax" not in last.filename or not last.line.startswith("raise"):
                    raw.append(f"{call.__name__}({name}={bad!r:.20}): {type(error).__name__}: {error!s:.80}")
            else:
                taken.append(f"{call.__name__} {name}={bad!r:.20}")
print(json.dumps([tried, raw, taken]))
"""


def test_arguments_of_another_kind_are_told_so_by_the_package_itself() -> None:
    """Numbers, text, bytes, objects and tuples for every argument of the first calls; types are checked by hand here.

    No error comes from below the package, which could not say what is allowed, and nothing senseless is taken.
    """
    tried, raw, taken = json.loads(python(WRONG_KINDS, env={**os.environ, "PYTHONWARNINGS": "ignore"}))
    assert tried > 500
    assert raw == []
    assert set(taken) == {
        "train tolerance=2.5",
        "train checkpoint_seconds=2.5",
        "evaluate xs=(1, 2)",
        "evaluate ys=(1, 2)",
        "mixture weights=(1, 2)",
        "synthetic_relu teacher_scale=2.5",
        "synthetic_relu min_margin=2.5",
        "evaluate_points save_seconds=2.5",
    }


SWITCHES = """
import json
import numpy as np, optax
import dualgap_jax as dg
from dualgap_jax import certify, checkpoints, data, duality, hitting, landscape, networks, optimizers
from dualgap_jax.duality import theorem

x = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
pair = data.from_arrays(x, np.sign(x[:, 0]))
np.savez("own.npz", x=x, y=np.sign(x[:, 0]))
branch = dg.mlp((1,), out=1, use_bias=False)
net, loss = dg.multi_branch(branch, 2), dg.losses.binary_hinge()
network = dg.train(net, loss, pair, optax.sgd(0.1), max_steps=2, batch_size=4)[0].network
risk = certify.risk_problem(branch, pair, loss, penalty=0.1)
one = duality.branch_problem(branch, pair, tau=30.0, radius=1.0)
alpha, line = np.zeros(8), np.linspace(0.0, 1.0, 5)
calls = {
    "mlp.use_bias": lambda s: dg.mlp((2,), use_bias=s),
    "conv.batch_norm": lambda s: dg.conv((2,), batch_norm=s),
    "Conv.batch_norm": lambda s: dg.linen.Conv((2,), batch_norm=s),
    "sgd.nesterov": lambda s: optimizers.sgd(0.5, nesterov=s),
    "muon.nesterov": lambda s: optimizers.muon(nesterov=s),
    "from_arrays.standardise": lambda s: data.from_arrays(x, x[:, 0], standardise=s),
    "own.standardise": lambda s: data.own(path="own.npz", standardise=s),
    "validate.nan": lambda s: data.validate(pair, nan=s),
    "hessian.per_branch": lambda s: landscape.hessian(net, dg.losses.squared(), pair, network, k=1, per_branch=s),
    "save_vtp.line": lambda s: landscape.save_vtp("line.vtp", np.zeros((2, 2)), np.zeros(2), line=s),
    "SgdSpec.use_bias": lambda s: hitting.SgdSpec(use_bias=s),
    "SgdSpec.stop_at_rest": lambda s: hitting.SgdSpec(stop_at_rest=s),
    "lower_bound.scale": lambda s: certify.lower_bound(risk, alpha, scale=s),
    "mixed_bound.scale": lambda s: certify.mixed_bound([risk], alpha, scale=s),
    "distance.estimate": lambda s: certify.distance(risk, np.ones((2, 3)), estimate=s, starts=2),
    "optimum.prove": lambda s: certify.optimum(risk, spec=certify.OptimumSpec(rounds=1, units=4), prove=s),
    "value_function.quick": lambda s: theorem.value_function(one, 5, quick=s),
    "ValueFunction.concave": lambda s: duality.ValueFunction(line, -line, 1 - line, concave=s),
    "Checkpointer.together": lambda s: checkpoints.Checkpointer("folder", together=s).close(),
}
modules = [dg, certify, data, duality, hitting, landscape, networks, optimizers, dg.linen]
there = {f"{n}.{p}" for m in modules for n in dir(m) if n[0] != "_" and callable(f := getattr(m, n))
         for p, kind in getattr(f, "__annotations__", {}).items()
         if kind in (bool, "bool") and p not in ("train", "return") and f.__module__.startswith("dualgap_jax")}
taken, wrong = [], []
for name, call in calls.items():
    call(np.bool_(True)), call(False)
    for bad in ("no", "", None, 0, 1.0, np.ones(1, bool), np.int64(1), [True]):
        try:
            call(bad)
        except ValueError as error:
            if f"{name.split('.')[1]} must be True or False, got {bad!r}" not in str(error):
                wrong.append(f"{name}: {error}")
        else:
            taken.append(f"{name}={bad!r}")
print(json.dumps([sorted(there - set(calls)), taken, wrong]))
"""


def test_switches_are_true_or_false_and_nothing_is_taken_for_its_truth_value(tmp_path: Path) -> None:
    """Each public argument that is annotated as one; types are checked by hand here."""
    untried, taken, wrong = json.loads(python(SWITCHES, cwd=tmp_path))
    # Facts that an answer carries are not asked for.
    assert [name for name in untried if not re.match("(Mixed)?Certificate", name)] == []
    assert taken == []
    assert wrong == []


def test_an_int_for_the_hidden_widths_is_told_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"hidden=8 must be a tuple of positive integers, such as \(8,\)"):
        inspect.unwrap(dg.mlp)(hidden=8)


def test_surfaces_and_scores_of_arrays_functions_and_batch_norm(rng: np.random.Generator) -> None:
    """A pair of arrays as data, a plain function as loss, branches with statistics: against plain NumPy."""
    x, y = rng.standard_normal((12, 4)).astype(np.float32), rng.integers(0, 3, 12)

    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x: Any, is_training: bool) -> Any:
            return nn.Dense(3)(nn.BatchNorm(use_running_average=not is_training)(nn.Dense(4)(x)))

    def loss(outputs: Any, labels: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels.astype(jnp.int32)).mean()

    net = dg.multi_branch(Normalised(), np.int64(2))
    drawn = [jax.jit(net.init)(jax.random.key(k), jnp.asarray(x)) for k in range(3)]
    networks = [dg.networks.InMemory(*pair) for pair in drawn]
    for (params, state), network in zip(drawn, networks, strict=True):
        outputs = np.asarray(net.apply(params, state, jnp.asarray(x))[0], np.float64)
        exact = np.mean(np.log(np.exp(outputs).sum(1)) - outputs[np.arange(12), y])
        evaluation = dg.evaluate(net, loss, (x, y), network)
        np.testing.assert_allclose(evaluation.loss, exact, rtol=1e-5)
        assert evaluation.accuracy == np.mean(outputs.argmax(1) == y)
    plane = dg.plane(networks)
    axis = np.linspace(-1, 1, 5)
    surface = dg.surface(net, loss, (x, y), plane, axis, axis)
    assert surface.loss.shape == (5, 5)
    assert np.isfinite(surface.loss).all()
    assert np.isfinite(dg.scores(axis, axis, surface.loss).envelope_max)
    with pytest.raises(TypeError, match=r"write from_linen\(Normalised\("):
        inspect.unwrap(dg.evaluate)(Normalised(), loss, (x, y), networks[0])
