"""The read-only tables: look-up, messages, extension, argument checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, SupportsIndex

import numpy as np
import pytest

from dualgap_jax.registry import (
    DuplicateNameError,
    MissingSettingError,
    SettingError,
    Table,
    UnknownNameError,
    unknown,
)


def squared(scale: float, shift: float = 0.0) -> tuple[str, float, float]:
    """The squared loss.

    A second paragraph.
    """
    return "squared", scale, shift


def hinge(*, tau: float = 1.0) -> tuple[str, float]:
    """The hinge loss."""
    return "hinge", tau


def anything(**settings: object) -> dict[str, object]:
    return settings


@pytest.fixture
def table() -> Table:
    return Table("loss", {"squared": squared, "hinge": hinge})


def test_a_table_is_a_mapping_in_the_order_given(table: Table) -> None:
    assert list(table) == ["squared", "hinge"]
    assert len(table) == 2
    assert table["hinge"] is hinge
    assert "hinge" in table
    assert "logistic" not in table
    assert table.get("logistic") is None
    assert repr(table) == "Table('loss': squared, hinge)"


def test_entries_cannot_be_changed(table: Table) -> None:
    with pytest.raises(TypeError):
        table["hinge"] = squared  # type: ignore[index]
    with pytest.raises(TypeError):
        del table["hinge"]  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        table._entries["hinge"] = squared  # type: ignore[index]
    assert table["hinge"] is hinge


def test_a_table_keeps_no_hold_on_the_mapping_it_was_made_from() -> None:
    entries = {"hinge": hinge}
    table = Table("loss", entries)
    entries["squared"] = squared
    entries["hinge"] = squared
    assert dict(table) == {"hinge": hinge}


def test_an_unknown_name_raises_with_near_matches_and_the_full_list(table: Table) -> None:
    with pytest.raises(UnknownNameError) as raised:
        table["hing"]
    assert str(raised.value) == "unknown loss 'hing'. Did you mean 'hinge'? Allowed: hinge, squared."
    assert isinstance(raised.value, LookupError)
    assert raised.value.__suppress_context__


def test_a_name_like_no_other_gets_the_list_without_a_guess(table: Table) -> None:
    with pytest.raises(UnknownNameError) as raised:
        table["xyzzy"]
    assert str(raised.value) == "unknown loss 'xyzzy'. Allowed: hinge, squared."


def test_several_near_matches_are_all_named_and_the_list_is_sorted() -> None:
    message = unknown("data set", "cifar", ["mnist", "cifar100", "cifar10"])
    guess, _, listing = message.partition(" Allowed: ")
    assert "'cifar10'" in guess
    assert "'cifar100'" in guess
    assert "mnist" not in guess
    assert listing == "cifar10, cifar100, mnist."


def test_an_empty_table_says_so() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown branch 'mlp'\. Allowed: none\."):
        Table("branch", {})["mlp"]


def test_extended_adds_to_a_new_table_and_leaves_the_original(table: Table) -> None:
    longer = table.extended({"anything": anything})
    assert list(longer) == ["squared", "hinge", "anything"]
    assert longer.kind == "loss"
    assert longer["anything"] is anything
    assert list(table) == ["squared", "hinge"]
    with pytest.raises(UnknownNameError):
        table["anything"]


@pytest.mark.parametrize("entry", [hinge, squared])
def test_a_duplicate_raises_even_for_the_same_function(table: Table, entry: object) -> None:
    with pytest.raises(DuplicateNameError, match=r"loss 'hinge' already registered.*Taken: hinge, squared") as raised:
        table.extended({"anything": anything, "hinge": entry})
    assert isinstance(raised.value, ValueError)
    assert list(table) == ["squared", "hinge"]
    assert table["hinge"] is hinge


def test_describe_is_the_first_line_of_the_docstring(table: Table) -> None:
    assert table.describe("squared") == "The squared loss."
    assert table.extended({"anything": anything}).describe("anything") == ""
    with pytest.raises(UnknownNameError, match="squared"):
        table.describe("square")


def test_build_calls_the_entry_with_the_arguments(table: Table) -> None:
    assert table.build("squared", scale=3.0) == ("squared", 3.0, 0.0)
    assert table.build("squared", scale=3.0, shift=-1.0) == ("squared", 3.0, -1.0)
    assert table.build("hinge", tau=0.5) == ("hinge", 0.5)


def test_build_names_the_argument_that_the_entry_does_not_take(table: Table) -> None:
    with pytest.raises(UnknownNameError, match=r"'hinge'.*'taau'.*Did you mean 'tau'\? Allowed: tau\."):
        table.build("hinge", taau=0.5)
    with pytest.raises(UnknownNameError, match=r"unknown loss 'hingge'"):
        table.build("hingge", tau=0.5)


def test_build_raises_for_a_missing_argument(table: Table) -> None:
    with pytest.raises(TypeError, match="scale"):
        table.build("squared", shift=1.0)
    with pytest.raises(SettingError, match=r"loss 'squared': scale is missing; give a number, as in squared\(scale"):
        table.check("squared", shift=1.0)
    table.check("squared", scale=1.0)


def test_build_passes_every_name_to_an_entry_that_takes_all(table: Table) -> None:
    longer = table.extended({"anything": anything})
    assert longer.build("anything", name="n", kind="k", entries=1) == {"name": "n", "kind": "k", "entries": 1}


def test_near_matches_ignore_case() -> None:
    assert "Did you mean 'I'?" in unknown("argument", "i", ["I", "seed"])
    assert "Did you mean 'mlp'?" in unknown("branch", "MLP", ["mlp", "conv"])


def test_a_refused_value_names_the_entry() -> None:
    def picky(*, tau: float) -> None:
        raise ValueError(f"tau={tau} is not allowed")

    table = Table("loss", {"picky": picky})
    with pytest.raises(SettingError, match="loss 'picky': tau=3 is not allowed"):
        table.build("picky", tau=3)
    table.check("picky", tau=3)
    with pytest.raises(UnknownNameError, match="Did you mean 'tau'"):
        table.check("picky", tua=3)


def typed(
    *,
    path: str,
    widths: Iterable[SupportsIndex] = (8,),
    law: str | Callable[[float], float] = "torch",
    biased: bool = True,
    scale: int | float = 1.0,
    task: Literal["auto", "binary"] = "auto",
    limit: int | None = None,
    gates: Any = 8,
    untyped=1,
    **others: float,
) -> dict[str, Any]:
    return dict(locals())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": 3}, "loss 'typed': path=3: expected a text, got int."),
        ({"biased": "no"}, "biased='no': expected True or False, as in biased=True, got str."),
        ({"biased": 0}, "biased=0: expected True or False"),
        ({"widths": 3}, r"widths=3: expected a tuple, each entry a whole number, as in widths=\(8,\)"),
        ({"widths": "88"}, "widths='88': expected a tuple"),
        ({"widths": (8, 2.5)}, r"widths=\(8, 2.5\): expected a tuple"),
        ({"widths": (True,)}, r"widths=\(True,\): expected a tuple"),
        ({"law": 3}, "law=3: expected a text or a function"),
        ({"scale": "a"}, "scale='a': expected a number, as in scale=1.0, got str."),
        ({"scale": True}, "scale=True: expected a number"),
        ({"scale": None}, "scale=None: expected a number"),
        ({"task": "both"}, "task='both': expected one of 'auto', 'binary'"),
        ({"limit": 1.5}, "limit=1.5: expected a whole number or None"),
        ({"untyped": "a"}, "untyped='a': expected a number"),
    ],
)
def test_literals_of_another_type_are_refused(given: dict[str, Any], message: str) -> None:
    table = Table("loss", {"typed": typed})
    for call in (table.check_given, table.check, table.build):
        with pytest.raises(SettingError, match=message):
            call("typed", **{"path": "a", **given})


@pytest.mark.parametrize(
    "given",
    [
        {"widths": [1, 2], "law": abs, "scale": 2, "task": "binary", "limit": None, "gates": ((1.0,),)},
        {"widths": (np.int64(3),), "biased": np.True_, "scale": np.float32(0.5), "untyped": 2.5, "more": 1.0},
        {"widths": np.arange(3), "limit": 3, "gates": "many", "untyped": 7},
    ],
)
def test_values_that_fit_and_those_that_are_no_literals_are_handed_on(given: dict[str, Any]) -> None:
    table = Table("loss", {"typed": typed})
    made = table.build("typed", path="a", **given)
    for name, value in given.items():
        assert (made["others"] if name == "more" else made).get(name) is value


def test_a_missing_argument_and_a_builder_that_fails_are_no_defects() -> None:
    table = Table("loss", {"typed": typed, "first": lambda widths=(): len(widths[0])})
    for call in (table.check, table.build):
        with pytest.raises(MissingSettingError, match=r"^loss 'typed': path is missing; give a text, as in typed\("):
            call("typed", scale=2)
    table.check_given("typed", scale=2)
    with pytest.raises(SettingError, match="loss 'first': object of type 'int' has no len"):
        table.build("first", widths=(1,))
