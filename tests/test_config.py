"""Argument strings, specs from configs and back, components, config files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import ml_collections
import pytest

from dualgap_jax.config import (
    Component,
    ConfigError,
    as_dict,
    component,
    experiment_config,
    load,
    parse_arg,
    plain,
    require,
    to_config,
    to_spec,
)
from dualgap_jax.registry import Table, UnknownNameError

# ---------------------------------------------------------------------------------------------------------- parse_arg

DEFAULTS: dict[str, Any] = {"I": 10, "rate": 0.5, "row": "mnist", "smoke": False, "sizes": (1, 3), "rates": (0.1,)}


def parsed(arg: str | None) -> dict[str, Any]:
    return vars(parse_arg(arg, **DEFAULTS))


@pytest.mark.parametrize(
    ("arg", "changes"),
    [
        (None, {}),
        ("", {}),
        ("I=100", {"I": 100}),
        ("I=-3", {"I": -3}),
        ("I=50_000", {"I": 50_000}),
        ("rate=2", {"rate": 2.0}),
        ("rate=-1e-3", {"rate": -0.001}),
        ("row=cifar_3layer", {"row": "cifar_3layer"}),
        ("row=a=b", {"row": "a=b"}),
        ("row=", {"row": ""}),
        ("smoke", {"smoke": True}),
        ("smoke=true", {"smoke": True}),
        ("smoke=False", {"smoke": False}),
        ("smoke=1", {"smoke": True}),
        ("smoke=0", {"smoke": False}),
        ("sizes=7", {"sizes": (7,)}),
        ("sizes=1/-3/50", {"sizes": (1, -3, 50)}),
        ("rates=1/2.5", {"rates": (1.0, 2.5)}),
        ("I=3,smoke,sizes=4/5,rate=.25", {"I": 3, "smoke": True, "sizes": (4, 5), "rate": 0.25}),
        ("I=3,,smoke,", {"I": 3, "smoke": True}),
    ],
)
def test_values_get_the_type_of_their_default(arg: str | None, changes: dict[str, Any]) -> None:
    values = parsed(arg)
    assert values == {**DEFAULTS, **changes}
    for key, value in values.items():
        assert type(value) is type(DEFAULTS[key])
        if isinstance(value, tuple):
            assert {type(v) for v in value} == {type(DEFAULTS[key][0])}


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("i=3", ["'i'", "Allowed: I, rate, rates, row, sizes, smoke."]),
        ("smok", ["'smok'", "Did you mean 'smoke'"]),
        ("xyzzy=1", ["'xyzzy'", "Allowed:"]),
        ("=3", ["unknown config argument ''"]),
        ("I=3, rate=1", ["' rate'", "Did you mean", "'rate'"]),
        ("I=3,I=3", ["'I'", "given twice", "I=3,I=3"]),
        ("smoke,smoke=false", ["'smoke'", "given twice"]),
        ("I", ["'I' needs a value", "I=10"]),
        ("sizes", ["'sizes' needs a value", "sizes=1/3"]),
        ("row", ["'row' needs a value", "row=mnist"]),
        ("I=", ["I=''", "whole number"]),
        ("I=abc", ["I='abc'", "whole number", "I=10"]),
        ("I=2.5", ["I='2.5'", "whole number"]),
        ("I=1e4", ["I='1e4'", "whole number"]),
        ("I=1/3", ["I='1/3'", "whole number"]),
        ("I=True", ["I='True'", "whole number"]),
        ("rate=", ["rate=''", "a number"]),
        ("rate=fast", ["rate='fast'", "a number", "rate=0.5"]),
        ("smoke=maybe", ["smoke='maybe'", "true or false"]),
        ("smoke=", ["smoke=''", "true or false"]),
        ("sizes=", ["sizes=''", "slashes", "sizes=1/3"]),
        ("sizes=1//3", ["sizes='1//3'", "slashes"]),
        ("sizes=1/", ["sizes='1/'", "slashes"]),
        ("sizes=/1", ["sizes='/1'", "slashes"]),
        ("sizes=1/x", ["sizes='x'", "whole number"]),
        ("sizes=1/2.5", ["sizes='2.5'", "whole number"]),
        ("sizes=1,3", ["unknown config argument '3'"]),
        ("rates=a", ["rates='a'", "a number"]),
    ],
)
def test_bad_arguments_are_named(arg: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        parsed(arg)
    for word in words:
        assert word in str(raised.value)


# -------------------------------------------------------------------------------------------------------------- specs


@dataclasses.dataclass(frozen=True)
class Inner:
    points: int = 51
    width: float = 1.0


@dataclasses.dataclass(frozen=True)
class Spec:
    count: int
    title: str = "t"
    rate: float = 0.1
    flag: bool = False
    axes: Literal["authors", "orthonormal"] = "authors"
    level: Literal[1, 2] = 1
    sizes: tuple[int, ...] = (1, 2)
    kinds: tuple[Literal["mean", "sum"], ...] = ("mean",)
    widths: tuple[float, ...] = ()
    cells: tuple[Inner, ...] = ()
    branch: Component = Component("mlp", {"hidden": (8,), "scale": 0.5})
    inner: Inner = Inner()
    free: Any = None

    def __post_init__(self) -> None:
        require(self.count >= 1, f"count={self.count} must be positive.")


def test_to_spec_fills_defaults_and_converts() -> None:
    spec = to_spec(
        Spec,
        {
            "count": 3,
            "rate": 2,
            "sizes": [4, 5],
            "widths": (1, 2.5),
            "inner": {"width": 3},
            "branch": {"name": "gru", "features": 4},
            "cells": ({"points": 3},),
            "free": "anything",
        },
    )
    assert spec == Spec(
        count=3,
        rate=2.0,
        sizes=(4, 5),
        widths=(1.0, 2.5),
        inner=Inner(width=3.0),
        branch=Component("gru", {"features": 4}),
        cells=(Inner(points=3),),
        free="anything",
    )
    assert type(spec.rate) is type(spec.inner.width) is float
    assert type(spec.sizes) is tuple
    assert to_spec(Spec, {"count": 3}) == Spec(count=3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cuont": 1}, ["key in config:", "'cuont'", "Did you mean 'count'", "axes"]),
        ({"inner": {"point": 3}}, ["key in config.inner:", "'point'", "Did you mean 'points'"]),
        ({"cells": ({"points": 3}, {"pionts": 3})}, ["key in config.cells[1]:", "'pionts'"]),
        ({"count": "3"}, ["config.count='3'", "expected int", "got str"]),
        ({"count": 3.0}, ["config.count=3.0", "expected int", "got float"]),
        ({"count": True}, ["config.count=True", "expected int", "got bool"]),
        ({"count": None}, ["config.count=None", "expected int"]),
        ({"count": 0}, ["count=0 must be positive"]),
        ({"rate": True}, ["config.rate=True", "expected float", "got bool"]),
        ({"rate": "0.1"}, ["config.rate='0.1'", "expected float"]),
        ({"title": 3}, ["config.title=3", "expected str"]),
        ({"flag": 1}, ["config.flag=1", "expected bool", "got int"]),
        ({"axes": "author"}, ["value of config.axes:", "'author'", "Did you mean 'authors'", "orthonormal"]),
        ({"axes": 3}, ["value of config.axes:", "3"]),
        ({"level": True}, ["value of config.level:", "True", "Allowed: 1, 2."]),
        ({"level": 1.0}, ["value of config.level:"]),
        ({"sizes": 3}, ["config.sizes=3", "expected a tuple"]),
        ({"sizes": "12"}, ["config.sizes='12'", "expected a tuple"]),
        ({"sizes": (1, "2")}, ["config.sizes[1]='2'", "expected int"]),
        ({"sizes": (True,)}, ["config.sizes[0]=True", "expected int"]),
        ({"kinds": ("mean", "max")}, ["value of config.kinds[1]:", "'max'"]),
        ({"branch": "mlp"}, ["config.branch='mlp'", "`name`"]),
        ({"branch": {"hidden": (8,)}}, ["config.branch=", "`name`"]),
        ({"branch": {"name": 3}}, ["config.branch=", "`name`"]),
        ({"inner": 3}, ["config.inner=3", "expected a group"]),
        ({"inner": {"points": 2.5}}, ["config.inner.points=2.5", "expected int"]),
    ],
)
@pytest.mark.parametrize("wrap", [dict, ml_collections.ConfigDict])
def test_what_does_not_fit_is_named(change: dict[str, Any], words: list[str], wrap: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        to_spec(Spec, wrap({"count": 3, **change}))
    for word in words:
        assert word in str(raised.value)


def test_a_missing_key_is_named_with_its_group() -> None:
    with pytest.raises(ConfigError, match=r"^config\.count is missing\.$"):
        to_spec(Spec, {})
    with pytest.raises(ConfigError, match=r"^cell\.count is missing\.$"):
        to_spec(Spec, {}, where="cell")


SPECS = [
    Spec(count=1),
    Spec(
        count=7,
        title="I = {I}",
        rate=1e-5,
        flag=True,
        axes="orthonormal",
        level=2,
        sizes=(),
        kinds=("sum", "mean"),
        widths=(0.5,),
        branch=Component("mlp", {"hidden": (), "deep": {"a": (1, 2)}}),
        inner=Inner(points=3, width=-1.0),
    ),
]


@pytest.mark.parametrize("spec", SPECS)
def test_configs_and_specs_are_inverse(spec: Spec) -> None:
    config = to_config(spec)
    assert isinstance(config, ml_collections.ConfigDict)
    assert to_spec(Spec, config) == spec
    assert to_spec(Spec, as_dict(config)) == spec
    assert as_dict(to_config(to_spec(Spec, config))) == as_dict(config)
    assert config.branch.name == spec.branch.name


def test_overrides_of_leaves_reach_the_spec_and_keep_their_type() -> None:
    config = to_config(Spec(count=1))
    config.lock()
    config.inner.points = 5
    config.branch.hidden = (3, 3)
    spec = to_spec(Spec, config)
    assert spec.inner.points == 5
    assert spec.branch == Component("mlp", {"hidden": (3, 3), "scale": 0.5})
    with pytest.raises(TypeError):
        config.inner.points = "many"
    with pytest.raises(AttributeError):
        config.inner.pionts = 5


def test_the_spec_keeps_no_hold_on_the_config() -> None:
    config = to_config(Spec(count=1))
    spec = to_spec(Spec, config)
    config.branch.scale = 9.0
    assert spec.branch.settings["scale"] == 0.5


def test_experiment_config_adds_the_name() -> None:
    config = experiment_config("landscape", Spec(count=4))
    assert config.experiment == "landscape"
    values = as_dict(config)
    assert values.pop("experiment") == "landscape"
    assert to_spec(Spec, values) == Spec(count=4)


def test_plain_is_json_data() -> None:
    expected = {
        "count": 7,
        "title": "I = {I}",
        "rate": 1e-5,
        "flag": True,
        "axes": "orthonormal",
        "level": 2,
        "sizes": [],
        "kinds": ["sum", "mean"],
        "widths": [0.5],
        "cells": [],
        "branch": {"name": "mlp", "hidden": [], "deep": {"a": [1, 2]}},
        "inner": {"points": 3, "width": -1.0},
        "free": None,
    }
    assert plain(SPECS[1]) == expected
    assert plain(to_config(SPECS[1])) == expected
    assert plain({3: (1, {"a": [2]})}) == {"3": [1, {"a": [2]}]}


def test_require_raises_only_when_the_condition_fails() -> None:
    require(True, "never")
    with pytest.raises(ConfigError, match=r"^say so$"):
        require(False, "say so")


# ---------------------------------------------------------------------------------------------------------- component


def net(
    hidden: tuple[int, ...] = (8,), out: int = 10, scale: float = 1.0, law: str = "torch", hook: Any = None
) -> None:
    """A net."""


def teacher(width: int, max_steps: int = 5, **extra: float) -> None:
    """A teacher."""


def named(name: str = "x") -> None:
    """Its parameter is called as the entry's own name is."""


TABLE: Table[Any] = Table("branch", {"net": net, "teacher": teacher, "named": named})


def test_component_lists_every_simple_default_but_what_the_experiment_supplies() -> None:
    assert component(TABLE, "net") == Component("net", {"hidden": (8,), "scale": 1.0, "law": "torch"})
    chosen = component(TABLE, "net", hidden=(3, 4), hook=len)
    assert chosen == Component("net", {"hidden": (3, 4), "scale": 1.0, "law": "torch", "hook": len})
    assert component(TABLE, "teacher", width=3, noise=0.5) == Component("teacher", {"width": 3, "noise": 0.5})


def test_component_refuses_unknown_names_and_settings() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown branch 'nett'\. Did you mean 'net'\?"):
        component(TABLE, "nett")
    with pytest.raises(UnknownNameError, match=r"setting of branch 'net': 'hiden'\. Did you mean 'hidden'\?"):
        component(TABLE, "net", hiden=(3,))


def test_component_refuses_settings_that_come_from_the_experiment() -> None:
    with pytest.raises(ConfigError, match=r"branch 'net': 'out' comes from the experiment; leave it out"):
        component(TABLE, "net", out=3)
    with pytest.raises(ConfigError, match="'max_steps' comes from the experiment"):
        component(TABLE, "teacher", max_steps=3)


def test_component_refuses_an_entry_whose_parameter_would_replace_its_name() -> None:
    with pytest.raises(ConfigError, match="parameter called 'name'; rename it"):
        component(TABLE, "named")


# --------------------------------------------------------------------------------------------------------------- load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mnist.py").write_text(
        "from dualgap_jax.config import parse_arg\n"
        "import ml_collections\n"
        "def get_config(arg=None):\n"
        "    return ml_collections.ConfigDict(vars(parse_arg(arg, I=10, smoke=False)))\n"
    )
    (tmp_path / "empty.py").write_text("I = 3\n")
    (tmp_path / "notes.txt").write_text("no code\n")
    return tmp_path


def test_load_calls_get_config_with_the_text_after_the_colon(folder: Path) -> None:
    assert load(folder / "mnist.py").to_dict() == {"I": 10, "smoke": False}
    assert load(f"{folder}/mnist.py:I=3,smoke").to_dict() == {"I": 3, "smoke": True}
    assert load(folder / "mnist.py", "I=4").I == 4
    assert load(f"{folder}/mnist.py:").I == 10


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mnits.py", ["config file in", "'mnits.py'", "Did you mean 'mnist.py'", "Allowed: empty.py, mnist.py."]),
        ("mnist", ["'mnist'", "Did you mean 'mnist.py'"]),
        ("nowhere/mnist.py", ["nowhere", "'mnist.py'", "Allowed: none."]),
        ("", ["config file in"]),
        ("empty.py", ["empty.py defines no get_config(arg)"]),
        ("notes.txt", ["notes.txt is not a Python file"]),
        ("mnist.py:J=3", ["config argument 'J'", "Allowed: I, smoke."]),
    ],
)
def test_load_names_what_is_wrong(folder: Path, name: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        load(f"{folder}/{name}")
    for word in words:
        assert word in str(raised.value)


def test_a_config_file_may_define_its_own_spec(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "from dualgap_jax.config import experiment_config, to_spec\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Own:\n"
        "    number: int = 3\n"
        "def get_config(arg=None):\n"
        "    return experiment_config('own', to_spec(Own, {'number': 5}))\n"
    )
    assert load(tmp_path / "own.py").to_dict() == {"experiment": "own", "number": 5}


def test_two_config_files_of_one_name_do_not_mix(tmp_path: Path) -> None:
    for k in (1, 2):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "same.py").write_text(
            f"import ml_collections\ndef get_config(arg=None):\n    return ml_collections.ConfigDict({{'k': {k}}})\n"
        )
    assert [load(tmp_path / str(k) / "same.py").k for k in (1, 2, 1)] == [1, 2, 1]
