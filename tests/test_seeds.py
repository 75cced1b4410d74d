"""Seeds: every allowed one is another run, every other is refused in a sentence, wherever it enters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

import dualgap_jax
from dualgap_jax import data, losses, networks, seeds, training
from dualgap_jax.config import ConfigError
from dualgap_jax.duality import problem, search
from dualgap_jax.experiments.duality_gap import DualityGapSpec
from dualgap_jax.experiments.landscape import LandscapeSpec
from dualgap_jax.experiments.linear_dual import LinearDualSpec, random_matrices
from dualgap_jax.shapley_folkman.sets import random_discs

REFUSED = [-1, 2**32, 2**40, 2**64, 10**30, -(2**31), 0.0, 1.5, float("nan"), True, None, "1", np.float64(3)]


@pytest.mark.parametrize("seed", REFUSED, ids=repr)
def test_other_seeds_are_refused_in_a_sentence(seed: Any) -> None:
    with pytest.raises(ConfigError, match=r"^x\.seed=.* must be a whole number from 0 to 2\*\*32 - 1 = 4294967295\.$"):
        seeds.check(seed, "x.seed")


@pytest.mark.parametrize("enable", [False, True])
def test_allowed_seeds_are_all_distinct(enable: bool, rng: np.random.Generator) -> None:
    given = {0, 1, 2**31 - 1, 2**31, 2**32 - 1, *rng.integers(0, 2**32, 30).tolist()}
    with jax.enable_x64(enable):
        keys = {tuple(np.asarray(jax.random.key_data(seeds.key(s))).tolist()) for s in given}
        assert len(keys) == len(given)
    assert len({seeds.generator(s).integers(2**62) for s in given}) == len(given)
    assert len({seeds.generator(3, stream).integers(2**62) for stream in range(20)}) == 20


@pytest.mark.parametrize("kind", [np.int8, np.uint32, np.int64])
def test_numpy_integers_are_seeds(kind: Any) -> None:
    assert type(seeds.check(kind(7))) is int
    assert jax.random.key_data(seeds.key(kind(7))).tolist() == jax.random.key_data(jax.random.key(7)).tolist()
    np.testing.assert_array_equal(seeds.generator(kind(7)).normal(size=3), np.random.default_rng(7).normal(size=3))
    np.testing.assert_array_equal(seeds.generator(7, 1).normal(size=3), np.random.default_rng([7, 1]).normal(size=3))


def one_branch_problem(seed: int) -> Any:
    sample = data.synthetic_relu(n=8, d=2, seed=1)
    return problem.branch_problem(
        networks.mlp(hidden=(1,), out=1, use_bias=False), sample, tau=1.0, radius=1.0, seed=seed
    )


ENTRIES: dict[str, Callable[[int], Any]] = {
    "train": lambda seed: training.train(
        dualgap_jax.multi_branch(networks.mlp(hidden=(2,), out=1), 2),
        losses.binary_hinge(),
        data.synthetic_relu(n=8, seed=1),
        optax.sgd(0.1),
        batch_size=4,
        max_steps=1,
        seed=seed,
    ),
    "data": lambda seed: data.synthetic_relu(n=8, seed=seed),
    "teacher": lambda seed: data.relu_teacher(seed=seed),
    "discs": lambda seed: random_discs(seed=seed),
    "matrices": lambda seed: random_matrices(seed=seed),
    "problem": one_branch_problem,
    "search": lambda seed: search.search(one_branch_problem(0), np.linspace(0, 1, 5), search.SearchSpec(), seed=seed),
    "landscape": lambda seed: LandscapeSpec(seed=seed),
    "theorem 1": lambda seed: DualityGapSpec(seed=seed),
    "theorem 2": lambda seed: LinearDualSpec(seed=seed),
}


@pytest.mark.parametrize("entry", list(ENTRIES))
@pytest.mark.parametrize("seed", [-1, 2**32])
def test_every_entry_refuses_them(entry: str, seed: int) -> None:
    with pytest.raises(ConfigError, match=r"seed=.* must be a whole number from 0"):
        ENTRIES[entry](seed)
