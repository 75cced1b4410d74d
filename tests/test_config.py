"""Argument strings, specs from configs and back, components, config files."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import pytest

from dualgap_jax.config import (
    Absent,
    Component,
    ConfigError,
    as_dict,
    component,
    experiment_config,
    load,
    override,
    parse_arg,
    require,
    spec_of,
    to_spec,
)
from dualgap_jax.experiments.landscape import LandscapeSpec
from dualgap_jax.files import jsonable
from dualgap_jax.registry import Table, UnknownNameError

# ---------------------------------------------------------------------------------------------------------- parse_arg

DEFAULTS: dict[str, Any] = {"I": 10, "rate": 0.5, "row": "mnist", "smoke": False, "sizes": (1, 3), "rates": (0.1,)}


def parsed(arg: str | None) -> dict[str, Any]:
    return vars(parse_arg(arg, **DEFAULTS))


def test_absent_arguments_are_none_and_have_a_type() -> None:
    assert vars(parse_arg("p=2", p=Absent(0.5), n=Absent((1, 2)))) == {"p": 2.0, "n": None}
    assert parse_arg("n=0", n=Absent((1, 2))).n == (0,)
    with pytest.raises(ConfigError, match=r"p='x': expected a finite number, as in p=0\.5"):
        parse_arg("p=x", p=Absent(0.5))
    with pytest.raises(ConfigError, match=r"'p' needs a value, as in p=0\.5"):
        parse_arg("p", p=Absent(0.5))


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
        ("rate=", ["rate=''", "a finite number"]),
        ("rate=fast", ["rate='fast'", "a finite number", "rate=0.5"]),
        ("smoke=maybe", ["smoke='maybe'", "true or false"]),
        ("smoke=", ["smoke=''", "true or false"]),
        ("sizes=", ["sizes=''", "slashes", "sizes=1/3"]),
        ("sizes=1//3", ["sizes='1//3'", "slashes"]),
        ("sizes=1/", ["sizes='1/'", "slashes"]),
        ("sizes=/1", ["sizes='/1'", "slashes"]),
        ("sizes=1/x", ["sizes='x'", "whole number"]),
        ("sizes=1/2.5", ["sizes='2.5'", "whole number"]),
        ("sizes=1,3", ["unknown config argument '3'"]),
        ("rates=a", ["rates='a'", "a finite number"]),
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
        ({"rate": math.nan}, ["config.rate=nan", "finite"]),
        ({"rate": math.inf}, ["config.rate=inf", "finite"]),
        ({"rate": 10**400}, ["config.rate=", "expected float"]),
        ({"widths": (1.0, math.nan)}, ["config.widths[1]=nan", "finite"]),
        ({"branch": {"name": "mlp", "p": math.inf}}, ["config.branch.p=inf", "finite"]),
        ({"branch": {"name": "mlp", "deep": {"a": (1, math.nan)}}}, ["config.branch.deep.a[1]=nan", "finite"]),
        ({"count": 2**31}, ["config.count=2.14748e+09", "below 2**31"]),
        ({"branch": {"name": "mlp", "hidden": (2**64,)}}, ["config.branch.hidden[0]=", "below 2**31"]),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        to_spec(Spec, {"count": 3, **change})
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
def test_dicts_and_specs_are_inverse(spec: Spec) -> None:
    tree = as_dict(spec)
    assert to_spec(Spec, tree) == spec
    assert as_dict(to_spec(Spec, tree)) == tree
    assert tree["branch"]["name"] == spec.branch.name
    tree["branch"]["scale"] = 9.0
    assert "scale" not in spec.branch.settings or spec.branch.settings["scale"] == 0.5


def changed(**texts: str | None) -> Spec:
    """The spec after overrides, with `__` for the dots of their names."""
    named = {k.replace("__", "."): v for k, v in texts.items()}
    return spec_of(override(experiment_config("mine", Spec(count=1)), named), Spec)


def test_overrides_of_leaves_reach_the_spec_and_keep_their_type() -> None:
    spec = changed(
        inner__points="5", branch__hidden="(3, 3)", rate="2", flag=None, title="3", sizes="4/5", widths="1,2.5"
    )
    assert spec == Spec(
        count=1,
        rate=2.0,
        flag=True,
        title="3",
        sizes=(4, 5),
        widths=(1.0, 2.5),
        inner=Inner(points=5),
        branch=Component("mlp", {"hidden": (3, 3), "scale": 0.5}),
    )
    assert type(spec.rate) is type(spec.widths[0]) is float
    assert spec_of(override(experiment_config("mine", spec), {}), Spec) == spec
    assert changed(**{"branch__hidden[0]": "16", "sizes[1]": "7"}) == dataclasses.replace(
        Spec(count=1), sizes=(1, 7), branch=Component("mlp", {"hidden": (16,), "scale": 0.5})
    )
    assert changed(sizes="8").sizes == (8,)
    assert changed(sizes="()").sizes == ()
    assert changed(kinds="('sum', 'mean')").kinds == ("sum", "mean")
    assert changed(branch__name="gru").branch.name == "gru"


def test_overrides_are_applied_together() -> None:
    """Where a spec holds for both values and for neither alone."""
    config = experiment_config("mine", Pair())
    assert spec_of(override(config, {"low": "5", "high": "6"}), Pair) == Pair(5, 6)
    with pytest.raises(ConfigError, match="low=5 must be below high=2"):
        spec_of(override(config, {"low": "5"}), Pair)


def test_an_entry_is_chosen_anew_by_its_name_and_settings() -> None:
    config = experiment_config("landscape", LandscapeSpec())
    changed = override(config, {"branch": "conv(out_channels=3, stride=2)", "training.optimizer": "adamw"})
    spec = spec_of(changed, LandscapeSpec)
    assert spec.branch == Component("conv", {"out_channels": 3, "stride": 2})
    assert spec.training.optimizer == Component("adamw", {})
    later = override(config, {"branch": "mlp(width=2)", "branch.width": "3"})
    assert spec_of(later, LandscapeSpec).branch == Component("mlp", {"width": 3})


@dataclasses.dataclass(frozen=True)
class Pair:
    low: int = 1
    high: int = 2

    def __post_init__(self) -> None:
        require(self.low < self.high, f"low={self.low} must be below high={self.high}.")


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"cuont": "1"}, ["key in config:", "'cuont'", "Did you mean 'count'"]),
        ({"inner.point": "1"}, ["key in config.inner:", "'point'", "Did you mean 'points'"]),
        ({"count.x": "1"}, ["key in config.count:", "'x'", "Allowed: none"]),
        ({"sizes[2]": "1"}, ["key in config.sizes:", "'[2]'", "Allowed: 0, 1"]),
        ({"inner": "1"}, ["config.inner is a group", "points"]),
        ({"count": "1.5"}, ["--config.count='1.5'", "a whole number"]),
        ({"count": "1e4"}, ["--config.count='1e4'", "a whole number"]),
        ({"count": "9" * 5000}, ["--config.count='999", "a whole number"]),
        ({"count": ""}, ["--config.count=''", "a whole number"]),
        ({"count": "0"}, ["count=0 must be positive"]),
        ({"count": None}, ["--config.count needs a value, as in --config.count=1"]),
        ({"rate": "nan"}, ["--config.rate='nan'", "a finite number"]),
        ({"rate": "-inf"}, ["a finite number"]),
        ({"rate": "fast"}, ["a finite number"]),
        ({"flag": "yes"}, ["--config.flag='yes'", "true or false"]),
        ({"axes": "author"}, ["'author'", "Did you mean 'authors'"]),
        ({"sizes": "(1, 'x')"}, ["config.sizes[1]='x'", "expected int"]),
        ({"sizes": "1/x"}, ["'x'", "a whole number"]),
        ({"kinds": "mean"}, ["--config.kinds='mean'", "expected a tuple, as in"]),
        ({"branch.hidden": "[" * 5000}, ["expected"]),
        ({"branch": "mlp("}, ["--config.branch='mlp('", "such as --config.branch='adamw(weight_decay=0.01)'"]),
        ({"branch": "mlp(3)"}, ["named settings"]),
        ({"branch": "mlp(width=x)"}, ["malformed"]),
        ({"branch": "mlp(name='conv')"}, ["leave name= out"]),
        ({"branch": "mlp(out=3)"}, ["'out' comes from the experiment; leave it out"]),
        ({"branch": "cosine(max_steps=3)"}, ["'max_steps' comes from the experiment"]),
        ({"branch": "mlp(width=3, width=4)"}, ["a setting is given twice"]),
        ({"branch": None}, ["expected the name of an entry"]),
        ({"branch": "[" * 5000}, ["expected the name of an entry"]),
        ({"": "1"}, ["key in config:"]),
        ({"inner..points": "3"}, ["key in config:", "'inner..points'"]),
    ],
)
def test_overrides_that_do_not_fit_are_named(texts: dict[str, str | None], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        spec_of(override(experiment_config("mine", Spec(count=1)), texts), Spec)
    for word in words:
        assert word in str(raised.value)


def test_specs_are_json_data() -> None:
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
    assert jsonable(SPECS[1]) == expected
    assert to_spec(Spec, expected) == SPECS[1]


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
        "from dualgap_jax.config import experiment_config, parse_arg\n"
        "def get_config(arg=None):\n"
        "    return experiment_config('mine', vars(parse_arg(arg, I=10, smoke=False)))\n"
    )
    (tmp_path / "empty.py").write_text("I = 3\n")
    (tmp_path / "notes.txt").write_text("no code\n")
    (tmp_path / "other.py").write_text("def get_config(arg=None):\n    return {'I': 3}\n")
    return tmp_path


def test_load_calls_get_config_with_the_text_after_the_colon(folder: Path) -> None:
    assert load(folder / "mnist.py").to_dict() == {"experiment": "mine", "I": 10, "smoke": False}
    assert load(f"{folder}/mnist.py:I=3,smoke").to_dict() == {"experiment": "mine", "I": 3, "smoke": True}
    assert load(folder / "mnist.py", "I=4").I == 4
    assert load(f"{folder}/mnist.py:").I == 10
    with pytest.raises(AttributeError):  # a config is locked
        load(folder / "mnist.py").J = 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "mnits.py",
            ["config file in", "'mnits.py'", "Did you mean 'mnist.py'", "Allowed: empty.py, mnist.py, other.py."],
        ),
        ("mnist", ["'mnist'", "Did you mean 'mnist.py'"]),
        ("nowhere/mnist.py", ["nowhere", "'mnist.py'", "Allowed: none."]),
        ("", ["config file in"]),
        ("empty.py", ["empty.py defines no get_config(arg)"]),
        ("other.py", ["other.py: get_config(arg) must return experiment_config(experiment, spec), got {'I': 3}"]),
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
        "from dualgap_jax.config import experiment_config\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Own:\n"
        "    number: int = 3\n"
        "def get_config(arg=None):\n"
        "    return experiment_config('own', Own(5))\n"
    )
    config = load(tmp_path / "own.py")
    assert (config.experiment, config.number) == ("own", 5)


def test_two_config_files_of_one_name_do_not_mix(tmp_path: Path) -> None:
    for k in (1, 2):
        (tmp_path / str(k)).mkdir()
        (tmp_path / str(k) / "same.py").write_text(
            "from dualgap_jax.config import experiment_config\n"
            f"def get_config(arg=None):\n    return experiment_config('k', {{'k': {k}}})\n"
        )
    assert [load(tmp_path / str(k) / "same.py").k for k in (1, 2, 1)] == [1, 2, 1]
