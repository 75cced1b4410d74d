"""The search for the setting of a published row of landscapes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualgap_jax import config as config_lib
from dualgap_jax.config import Component, ConfigError
from dualgap_jax.experiments import TABLES, execute, landscape_search
from dualgap_jax.experiments.landscape import LandscapeSpec
from dualgap_jax.experiments.landscape_search import (
    LANDSCAPE_SEARCH,
    SCORE,
    LandscapeSearchSpec,
    cell_of,
    decades,
    inside,
)
from dualgap_jax.files import load_json
from dualgap_jax.registry import UnknownNameError

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "figure1_search.py"


def search(**changes: Any) -> LandscapeSearchSpec:
    """The config at smoke size, with some fields changed."""
    return dataclasses.replace(config_lib.spec_of(config_lib.load(CONFIG, "smoke"), LandscapeSearchSpec), **changes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("rate=4.0,batch=0", {"training.learning_rate": 4.0, "training.batch_size": 0}),
        ("net=sum,scaling=none", {"reduce": "sum", "training.lr_scaling": "none"}),
        ("net=plain", {"num_branches": 1, "branch.hidden": (30,)}),
        ("loss=binary_hinge", {"loss.name": "binary_hinge", "data.labels": "sign"}),
        ("margin=0.5,init_scale=3.0", {"data.min_margin": 0.5, "branch.init_scale": 3.0}),
        ("schedule=constant", {"training.schedule.name": "constant"}),
    ],
)
def test_a_setting_changes_what_it_names_and_nothing_else(text: str, expected: dict[str, Any]) -> None:
    spec = search()
    base, cell = (flat(cell_of(spec, setting, 30, 1, 0)) for setting in ("", text))
    changed = {key for key in base | cell if base.get(key) != cell.get(key)}
    assert {key: cell[key] for key in expected} == expected
    assert {key for key in changed if not key.startswith("training.schedule.")} <= set(expected)
    again = flat(cell_of(spec, text, 30, 7, 2))
    assert {key for key in cell | again if cell.get(key) != again.get(key)} == {"seed", "data.seed"}


def flat(cell: LandscapeSpec) -> dict[str, Any]:
    """The leaves of a landscape's spec, by path; those of settings directly below their component."""
    found: dict[str, Any] = {}

    def walk(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(path if key == "settings" else f"{path}.{key}".lstrip("."), inner)
        else:
            found[path] = value

    walk("", config_lib.as_dict(cell))
    return found


def test_decades_against_a_loop_over_factors(rng: np.random.Generator) -> None:
    target = rng.uniform(0.01, 1.0, 4)
    factors = 10.0 ** rng.normal(size=4)
    found = decades((target * factors).tolist(), target.tolist())
    assert found == pytest.approx(math.sqrt(sum(math.log10(f) ** 2 for f in factors) / 4))
    assert decades(target.tolist(), target.tolist()) == 0
    for bad in (None, 0.0, math.inf, math.nan):
        assert decades([*target[:3].tolist(), bad], target.tolist()) is None


def test_a_search_and_its_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int, int]] = []
    broken = [True]

    def scores_of(cell: LandscapeSpec, folder: Path, tables: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A score that is known beforehand, in place of training."""
        count, data = cell.num_branches, cell.data.settings["seed"]
        calls.append((cell.training.schedule.name, data, count, cell.seed))
        if len(calls) == 6 and broken.pop():
            raise RuntimeError("power cut")
        scale = {"plateau_authors": 0.5, "constant": 1.02}[cell.training.schedule.name] * (1 + 0.01 * cell.seed)
        loss = None if data == 2 and count == 30 else 0.25
        status = "diverged" if loss is None else "converged"
        found = {} if loss is None else {SCORE: scale * {10: 0.8, 30: 0.4}[count], "finite_share": 1.0}
        return found, [{"loss": loss, "status": status}] * 3

    monkeypatch.setattr(landscape_search, "scores_of", scores_of)
    spec = search(
        target=(0.8, 0.4),
        settings=("", "schedule=constant"),
        data_seeds=(1, 2),
        refined=2,
        seeds=2,
        held_out=(101, 2001),
    )
    with pytest.raises(RuntimeError, match="power cut"):
        execute(LANDSCAPE_SEARCH, spec, tmp_path / "w", TABLES)
    calls.clear()
    broken.append(False)
    report, workdir, _ = execute(LANDSCAPE_SEARCH, spec, tmp_path / "w", TABLES)
    record = load_json(workdir.results / "landscape_search.json")
    assert len(record["screen"]) == 4
    assert [e["decades"] for e in record["screen"] if e["data_seed"] == 2] == [None, None]
    assert [(e["setting"], e["data_seed"]) for e in record["refined"]] == [("schedule=constant", 1), ("", 1)]
    chosen = record["chosen"]
    assert chosen["setting"] == "schedule=constant"
    assert chosen["decades"] == pytest.approx(math.log10(1.02 * 1.005))
    assert [row["mean"] for row in chosen["rows"]] == pytest.approx([0.8 * 1.02 * 1.005, 0.4 * 1.02 * 1.005])
    assert inside(chosen, spec.target) == 2  # two seeds make wide intervals
    assert [e["data_seed"] for e in record["held_out"]] == [101, 2001]
    assert record["landscapes"] == len(set(calls))
    assert [row[0].partition(":")[0] for row in report.rows] == [
        *("published", "chosen", "refined", "held out", "held out", "screen", "screen")
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": ("rates=1.0",)}, "Did you mean 'rate'"),
        ({"settings": ("net=wide",)}, "net in setting 'net=wide'"),
        ({"settings": ("rate=fast",)}, "rate"),
        ({"settings": ("rate=-1.0",)}, "learning_rate"),
        ({"settings": ("loss=multi_margn",)}, "multi_margin"),
        ({"settings": ()}, "settings is empty"),
        ({"settings": ("", "")}, "names one twice"),
        ({"settings": ("rate=0.1", "rate=1e-1")}, "'rate=0.1' and 'rate=1e-1' mean the same"),
        ({"settings": ("", "net=mean")}, "'' and 'net=mean' mean the same"),
        ({"num_branches": (2, 3)}, "those of I = 10, 30, none is of I = 2, 3"),
        ({"target_branches": (10, 10)}, "target_branches=.* names one twice"),
        ({"target": (1.0,)}, "target"),
        ({"target": (1.0, math.nan)}, "target"),
        ({"held_out": (101, 101)}, "held_out=.* names one twice"),
        ({"held_out": (2**32,)}, "a seed of held_out=4294967296"),
        ({"held_out": (1,)}, "both searched and held out"),
        ({"refined": 0}, "refined=0"),
        ({"seeds": 1}, "seeds=1"),
    ],
)
def test_what_is_no_search_is_refused_before_it_starts(changes: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, UnknownNameError), match=words):
        search(**changes).validate(TABLES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"branch": Component("conv", {})}, "cell.branch='conv' names no init_scale"),
        ({"branch": Component("mlp", {"hidden": (), "init_scale": 1.0})}, "net=plain widens the last hidden layer"),
        ({"branch": Component("gated", {"init_scale": 1.0})}, "net=plain widens the last hidden layer"),
        ({"seed": 2**32 - 1}, "seeds=2, from cell.seed=4294967295 on, go beyond the last seed"),
    ],
)
def test_a_landscape_that_settings_cannot_change_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        search(cell=dataclasses.replace(search().cell, **changes)).validate(TABLES)


def test_published_scores_stay_with_their_numbers_of_branches() -> None:
    spec = search(target_branches=(10, 30, 70), target=(0.8, 0.4, 0.2), num_branches=(70, 10))
    assert spec.targets == (0.2, 0.8)
