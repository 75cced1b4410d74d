"""Every optax transformation does to a branch of a stack what it does to that branch alone, or is refused."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from dualgap_jax import optimizers
from dualgap_jax.config import Component, ConfigError
from dualgap_jax.networks import from_functions, mixture, mlp, multi_branch
from dualgap_jax.registry import SettingError

# Optax itself promotes ranks in places; the package's tests forbid it.
pytestmark = pytest.mark.usefixtures("promotion")
SHAPES = {"kernel": (3, 4), "bias": (3,), "deep": {"kernel": (2, 3)}}
RATE = 0.01

# What each public factory with required arguments is called with; those with a required rate alone get it by name.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adaptive_grad_clip": {"clipping": 0.1},
    "add_noise": {"eta": 0.1, "gamma": 0.5, "key": 0},
    "apply_if_finite": {"inner": optax.adam(RATE), "max_consecutive_errors": 2},
    "chain": {},
    "clip": {"max_delta": 0.3},
    "clip_by_block_rms": {"threshold": 0.3},
    "clip_by_global_norm": {"max_norm": 0.5},
    "conditionally_mask": {"inner": optax.adam(RATE), "should_transform_fn": lambda step, **_: step % 2 == 0},
    "conditionally_transform": {"inner": optax.adam(RATE), "should_transform_fn": lambda step, **_: step % 2 == 0},
    "differentially_private_aggregate": {"l2_norm_clip": 1.0, "noise_multiplier": 1.0, "key": 0},
    "dpsgd": {"learning_rate": RATE, "l2_norm_clip": 1.0, "noise_multiplier": 1.0, "seed": 0},
    "ema": {"decay": 0.9},
    "apply_every": {"k": 2},
    "flatten": {"inner": optax.adam(RATE)},
    "freeze": {"mask": {"kernel": True, "bias": False, "deep": {"kernel": False}}},
    "lookahead": {"fast_optimizer": optax.sgd(RATE), "sync_period": 2, "slow_step_size": 0.5},
    "masked": {"inner": optax.adam(RATE), "mask": lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)},
    "mechanize": {"base_optimizer": optax.sgd(RATE)},
    "inject_hyperparams": {"learning_rate": optax.linear_schedule(0.1, 0.0, 5)},
    "inject_stateful_hyperparams": {"learning_rate": RATE},
    "monitor": {"measures": {"norm": lambda updates, **_: optax.tree.norm(updates)}},
    "measure_with_ema": {"measure": lambda updates, **_: optax.tree.norm(updates), "decay": 0.9},
    "named_chain": {},
    "partition": {
        "transforms": {True: optax.sgd(RATE), False: optax.adam(RATE)},
        "param_labels": lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
    },
    "polynomial": {},
    "sam": {"optimizer": optax.sgd(RATE), "adv_optimizer": optax.chain(contrib.normalize(), optax.sgd(0.05))},
    "scale": {"step_size": -RATE},
    "scale_by_backtracking_linesearch": {"max_backtracking_steps": 3},
    "scale_by_schedule": {"step_size_fn": optax.linear_schedule(0.1, 0.0, 5)},
    "scale_by_trust_ratio": {},
    "scale_by_zoom_linesearch": {"max_linesearch_steps": 3},
    "schedule_free": {"base_optimizer": optax.sgd(RATE), "learning_rate": RATE},
    "selective_transform": {
        "optimizer": optax.sgd(RATE),
        "freeze_mask": {"kernel": True, "bias": False, "deep": {"kernel": False}},
    },
    "skip_not_finite": {},
    "snapshot": {"measure_name": "norm", "measure": lambda updates, **_: optax.tree.norm(updates)},
    "split_real_and_imaginary": {"inner": optax.sgd(RATE)},
    "stateless": {"f": lambda updates, params: jax.tree.map(lambda u: -u, updates)},
    "stateless_with_tree_map": {"f": lambda u, p: u + 0.1 * p},
    "trace": {"decay": 0.9},
    "transforms": {},
    "multi_transform": {
        "transforms": {True: optax.sgd(RATE), False: optax.adam(RATE)},
        "param_labels": lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
    },
    "with_extra_args_support": {"tx": optax.sgd(RATE)},
    "noisy_sgd": {"learning_rate": RATE, "key": 0},
}
# These need what a step does not have: the loss function, the gradient of each example, other parameters; or noise.
REFUSED = {
    "add_noise": "random",
    "differentially_private_aggregate": "batch dimension",
    "dpsgd": "batch dimension",
    "hutchinson_estimator_diag_hessian": "cannot train",
    "lbfgs": "value_fn",
    "lookahead": "cannot train",
    "measure_with_ema": "shapes",
    "noisy_sgd": "random",
    "scale_by_backtracking_linesearch": "value_fn",
    "scale_by_zoom_linesearch": "value_fn",
    "scale_by_muon": "cannot train",  # matrices only; `contrib.muon` takes Adam for the biases
    "sophia": "cannot train",
}


@pytest.fixture
def promotion() -> Any:
    with jax.numpy_rank_promotion("allow"):
        yield


def factories() -> dict[str, Any]:
    """Every public function of optax and optax.contrib that makes a transformation, by its own annotation."""
    found = {}
    for module in (optax, contrib):
        for name, factory in vars(module).items():
            if name.startswith("_") or not inspect.isfunction(factory):
                continue
            annotation = str(inspect.signature(factory).return_annotation)
            if "GradientTransformation" not in annotation:
                continue
            found[name] = functools.partial(factory, optax.adam) if "Callable" in annotation else factory
    return found


def made(name: str) -> Any:
    factory = factories()[name]
    if isinstance(factory, functools.partial):
        factory = factory()
    if name in ("chain", "named_chain"):
        parts = (optax.clip_by_global_norm(0.5), optax.scale_by_adam(), optax.scale(-RATE))
        return factory(*parts) if name == "chain" else factory(*zip("abc", parts, strict=True))
    arguments = ARGUMENTS.get(name, {})
    for key, parameter in inspect.signature(factory).parameters.items():
        if parameter.default is inspect.Parameter.empty and "learning_rate" in key and key not in arguments:
            arguments = {**arguments, key: RATE}
    return factory(**arguments)


def tree(rng: np.random.Generator, *lead: int, size: float = 1.0) -> Any:
    return jax.tree.map(
        lambda shape: jnp.asarray(size * rng.normal(size=(*lead, *shape)), float),
        SHAPES,
        is_leaf=lambda s: isinstance(s, tuple),
    )


def stepper(transformation: Any, *, compiled: bool = True) -> Any:
    """A function of (parameters, gradients) to the parameters after a step with each gradient."""
    wanted = str(inspect.signature(transformation.update))
    extra = isinstance(transformation, optax.GradientTransformationExtraArgs) and ("value" in wanted or "**" in wanted)

    def run(params: Any, gradients: list[Any]) -> Any:
        state = transformation.init(params)
        for k, gradient in enumerate(gradients):
            value = {"value": jnp.asarray(1.0 / (k + 1))} if extra else {}
            updates, state = transformation.update(gradient, state, params, **value)
            params = optax.apply_updates(params, updates)
        return params

    return jax.jit(run) if compiled else run


def trained(transformation: Any, params: Any, gradients: list[Any]) -> Any:
    return stepper(transformation)(params, gradients)


def stack(num_branches: int) -> Any:
    return multi_branch(mlp((2,), out=1), num_branches)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", sorted(factories()))
def test_every_public_transformation_acts_on_each_branch_alone(name: str) -> None:
    transformation = made(name)
    if name in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[name]):
            optimizers.for_network(stack(3), transformation).init(tree(np.random.default_rng(0), 3))
        return
    rng = np.random.default_rng(sorted(factories()).index(name))
    for num_branches in (3, 1):
        params = tree(rng, num_branches)
        # Branches of very unlike sizes: a norm over all of them would be that of the largest.
        sizes = np.array([1.0, 1e-2, 1e2])[:num_branches]
        gradients = [
            jax.tree.map(lambda a, s=sizes: a * s.reshape(-1, *(1,) * (a.ndim - 1)), tree(rng, num_branches))
            for _ in range(3 if num_branches > 1 else 2)
        ]
        compiled = num_branches > 1  # fusion rounds in other places, so bits are compared operation by operation
        mapped = optimizers.for_network(stack(num_branches), transformation)
        together = stepper(mapped, compiled=compiled)(params, gradients)
        one = stepper(transformation, compiled=compiled)
        for i in range(num_branches):
            own = jax.tree.map(lambda a, i=i: a[i], (params, gradients))
            alone = one(*own)
            moved = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (alone, own[0])), strict=True)]
            assert any(moved) != (name == "set_to_zero"), "the test must move the parameters"
            for a, b in zip(*map(jax.tree.leaves, (together, alone)), strict=True):
                if num_branches == 1:
                    np.testing.assert_array_equal(a[i], b)
                else:
                    np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=2e-6)


def test_gathered_gradients_are_gathered_by_each_branch(rng: np.random.Generator) -> None:
    """`optax.MultiSteps` is no transformation, but is passed like one."""
    params, gathered = tree(rng, 3), optax.MultiSteps(optax.adam(0.1), 2)
    gradients = [tree(rng, 3) for _ in range(4)]
    together = stepper(optimizers.for_network(stack(3), gathered))(params, gradients)
    for i in range(3):
        own = jax.tree.map(lambda a, i=i: a[i], (params, gradients))
        alone = stepper(gathered.gradient_transformation())(*own)
        assert not all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (alone, own[0])), strict=True))
        for a, b in zip(*map(jax.tree.leaves, (together, alone)), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    "name", ["clip_by_global_norm", "adafactor", "lamb", "muon", "centralize", "clip_by_block_rms"]
)
def test_a_stack_taken_as_one_tensor_would_differ(name: str) -> None:
    """The same transformation on the stacked leaves as they are: what `for_network` protects from."""
    rng = np.random.default_rng(5)
    params, gradients = tree(rng, 3), [tree(rng, 3, size=10.0) for _ in range(3)]
    right = trained(optimizers.for_network(stack(3), made(name)), params, gradients)
    wrong = trained(made(name), params, gradients)
    assert not all(np.allclose(a, b, rtol=1e-3) for a, b in zip(*map(jax.tree.leaves, (right, wrong)), strict=True))


def test_nested_stacks_are_taken_apart_to_the_innermost_branch() -> None:
    network = multi_branch(multi_branch(mlp((2,), out=1), 2), 3)
    rng = np.random.default_rng(0)
    params, gradients = tree(rng, 3, 2), [tree(rng, 3, 2) for _ in range(2)]
    clip = optax.chain(optax.clip_by_global_norm(0.5), optax.scale(-1.0))
    together = trained(optimizers.for_network(network, clip), params, gradients)
    for i, j in np.ndindex(3, 2):
        alone = trained(clip, *jax.tree.map(lambda a, i=i, j=j: a[i, j], (params, gradients)))
        jax.tree.map(lambda a, b, i=i, j=j: np.testing.assert_allclose(a[i, j], b, rtol=1e-5), together, alone)


def test_every_part_of_a_mixture_and_every_branch_in_it_is_taken_alone() -> None:
    """Of a mixture in a mixture, of stacks and of branches alone; and of a stack of mixtures."""
    branch = mlp((2,), out=1)
    inner = mixture([multi_branch(branch, 3), branch])
    clip = optax.chain(optax.clip_by_global_norm(0.5), optax.scale(-1.0))
    rng = np.random.default_rng(7)
    params = ((tree(rng, 3), tree(rng)), tree(rng))
    gradients = [((tree(rng, 3, size=10.0), tree(rng, size=0.1)), tree(rng, size=100.0)) for _ in range(2)]
    found = trained(optimizers.for_network(mixture([inner, branch]), clip), params, gradients)
    alone = [jax.tree.map(lambda a, i=i: a[i], (params[0][0], [g[0][0] for g in gradients])) for i in range(3)]
    alone += [(params[0][1], [g[0][1] for g in gradients]), (params[1], [g[1] for g in gradients])]
    parts = [jax.tree.map(lambda a, i=i: a[i], found[0][0]) for i in range(3)] + [found[0][1], found[1]]
    for part, (own, of_own) in zip(parts, alone, strict=True):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), part, trained(clip, own, of_own)
        )

    stacked = multi_branch(mixture([branch, branch]), 2)
    params, gradients = (tree(rng, 2), tree(rng, 2)), [(tree(rng, 2, size=10.0), tree(rng, 2))]
    found = trained(optimizers.for_network(stacked, clip), params, gradients)
    for i, k in np.ndindex(2, 2):
        expected = trained(clip, *jax.tree.map(lambda a, i=i: a[i], (params[k], [g[k] for g in gradients])))
        one = jax.tree.map(lambda a, i=i: a[i], found[k])
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), one, expected)


def test_a_mixture_of_one_stack_is_trained_as_the_stack(rng: np.random.Generator) -> None:
    """With a clipping that binds, which the norm over all branches would bind elsewhere; and its loss at hand."""
    branch, x = mlp((3,), out=1), jnp.asarray(rng.normal(size=(16, 2)), float)
    networks = multi_branch(branch, 4), mixture([multi_branch(branch, 4, reduce="sum")], weights=[0.25])
    (params, own), after = networks[0].init(jax.random.key(0), x), []
    for network, start, state_of_it in zip(networks, (params, (params,)), (own, (own,)), strict=True):
        clip = optax.chain(optax.clip_by_global_norm(1e-3), optax.adam(0.1), optax.contrib.reduce_on_plateau())
        transformation = optimizers.for_network(network, clip)
        state, now = transformation.init(start), start

        def loss(p: Any, network: Any = network, own: Any = state_of_it) -> Any:
            return jnp.mean(network.apply(p, own, x)[0] ** 2)

        for _ in range(3):
            value, slope = jax.value_and_grad(loss)(now)
            updates, state = transformation.update(slope, state, now, value=value)
            now = optax.apply_updates(now, updates)
        after.append(now)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), after[1][0], after[0])


@pytest.mark.parametrize("name", ["sgd", "adam", "adafactor", "clip_by_global_norm"])
def test_parts_without_parameters_do_no_harm(name: str, rng: np.random.Generator) -> None:
    branch, bare = mlp((2,), out=1), from_functions(lambda key, x: {}, lambda params, x: x[:, :1])
    network = mixture([multi_branch(bare, 2), multi_branch(branch, 3)])
    params, gradients = ({}, tree(rng, 3)), [({}, tree(rng, 3, size=10.0)) for _ in range(2)]
    found = trained(optimizers.for_network(network, made(name)), params, gradients)
    expected = trained(
        optimizers.for_network(multi_branch(branch, 3), made(name)), params[1], [g[1] for g in gradients]
    )
    assert found[0] == {}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), found[1], expected)


def test_a_mixture_whose_functions_were_replaced_is_one_network() -> None:
    network = mixture([mlp((2,), out=1)] * 2)
    assert network.mixed is not None
    assert network.computed() is network
    other = network._replace(apply=lambda p, s, x, *, key=None, train=False: network.apply(p, s, 2 * x))
    assert other.computed().mixed is None
    assert other.replaced() == ["apply"]


def test_a_network_without_branches_gets_the_transformation_itself() -> None:
    network = from_functions(lambda key, x: (), lambda params, x: x)
    rng = np.random.default_rng(1)
    params, gradients = tree(rng), [tree(rng)]
    expected = trained(optax.adam(0.1), params, gradients)
    found = trained(optimizers.for_network(network, optax.adam(0.1)), params, gradients)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_adamw_decays_apart_from_the_gradient() -> None:
    network, params = stack(2), tree(np.random.default_rng(2), 2)
    zeros = jax.tree.map(jnp.zeros_like, params)
    after = trained(optimizers.for_network(network, optax.adamw(0.5, weight_decay=0.1)), params, [zeros])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 0.95 * b, rtol=1e-6), after, params)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (optax.constant_schedule(0.1), r"optax\.sgd\(schedule\)"),
        (0.1, r"optax\.sgd\(rate\)"),
        ("sgd", "no optax.GradientTransformation"),
        (optax.sgd, "no optax.GradientTransformation"),
        (optax.sgd, r"Call it with its rate, as in optax\.sgd\(0\.1\)\.$"),
        (optax.adamw, r"Call it with its rate, as in optax\.adamw\(0\.1\)\.$"),
        (functools.partial(optax.adamw, weight_decay=0.1), r"Call it with its rate"),
    ],
)
def test_what_is_no_transformation_is_refused_with_what_to_write(given: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        optimizers.for_network(stack(2), given)


@pytest.mark.parametrize("name", list(optimizers.OPTIMIZERS))
def test_optimizers_of_configs_are_optaxs_own_at_rate_one(name: str) -> None:
    rng = np.random.default_rng(3)
    params, gradients = tree(rng), [tree(rng) for _ in range(3)]
    peer = {"muon": contrib.muon}.get(name) or getattr(optax, name)
    settings = {"weight_decay": 1e-4} if name == "adamw" else {"weight_decay": 1e-3} if name == "lion" else {}
    expected = trained(peer(1.0, **settings), params, gradients)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        trained(optimizers.build(Component(name, {})), params, gradients),
        expected,
    )


def test_a_config_chains_decay_transformations_and_optimizer_in_this_order() -> None:
    rng = np.random.default_rng(4)
    params, gradients = tree(rng), [tree(rng) for _ in range(3)]
    built = optimizers.build(Component("sgd", {"momentum": 0.9}), chain=("clip_by_global_norm(0.5)",), weight_decay=0.1)
    peer = optax.chain(
        optax.add_decayed_weights(0.1), optax.clip_by_global_norm(0.5), optax.trace(0.9), optax.scale(-1.0)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
        trained(built, params, gradients),
        trained(peer, params, gradients),
    )


@pytest.mark.parametrize(
    "text", ["adam(0.1)", "no_such()", "1 + 1", "clip(", "chain", "add_noise(0.1, 0.5, 0)", "clip()"]
)
def test_a_text_that_is_no_transformation_of_gradients_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"training\.chain"):
        optimizers.from_text(text)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("adam", {"b1": 2.0}, r"optimizer 'adam': b1=2.0 must lie in \[0, 1\)"),
        ("adam", {"b2": 1.0}, r"b2=1.0 must lie in"),
        ("adam", {"eps": 0.0}, "eps=0.0 must be positive"),
        ("adamw", {"weight_decay": -1.0}, "weight_decay=-1.0 must be at least 0"),
        ("adamw", {"b1": -0.5}, "b1=-0.5 must lie in"),
        ("rmsprop", {"decay": 1.5}, "decay=1.5 must lie in"),
        ("lion", {"b2": 3.0}, "b2=3.0 must lie in"),
        ("lion", {"weight_decay": -0.1}, "weight_decay=-0.1 must be"),
        ("muon", {"beta": 1.0}, "beta=1.0 must lie in"),
        ("muon", {"nesterov": "no"}, "nesterov='no': expected True or False"),
        ("sgd", {"momentum": "a"}, "momentum='a': expected a number"),
        ("sgd", {"momentum": 0.5, "nesterov": "no"}, "nesterov='no': expected True or False"),
    ],
)
def test_settings_that_make_no_optimizer_are_refused(name: str, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingError, match=told):
        optimizers.build(Component(name, settings))
