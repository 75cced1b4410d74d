"""A sample of `tests/faults.py`, and that it sees what it should."""

from __future__ import annotations

import random
from pathlib import Path

import faults
import pytest


def test_a_run_that_is_killed_and_damaged_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    outcomes, _ = faults.search(2, ["figure3"], ["kill", "damage"], 11, tmp_path)
    assert [o.said for o in outcomes if not o.survived] == []


def test_another_result_is_seen(tmp_path: Path) -> None:
    wanted = faults.left_alone("figure3", tmp_path / "straight", tmp_path / "compiled")
    names, table, seconds = wanted
    changed = (names | {next(iter(names)): "0"}, table, 1e-3 * seconds)
    outcome = faults.struck("figure3", "kill", 3, changed, tmp_path / "struck", tmp_path / "compiled")
    assert not outcome.survived
    assert "differ: " in outcome.said
    other_table = (names, table + "1", 1e-3 * seconds)
    outcome = faults.struck("figure3", "kill", 4, other_table, tmp_path / "struck", tmp_path / "compiled")
    assert "the table differs" in outcome.said


@pytest.mark.parametrize("seed", range(8))
def test_damage_changes_one_file(seed: int, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"0123456789")
    faults.damage(tmp_path, random.Random(seed))
    left = [(tmp_path / n).read_bytes() if (tmp_path / n).exists() else None for n in ("a", "b")]
    assert sorted(data == b"0123456789" for data in left) == [False, True]
