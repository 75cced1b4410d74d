"""The tests that `docs/faults.md` speaks of exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_kind_of_fault_has_tests_that_exist() -> None:
    rows = [
        line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if re.match(r"\| (?!kind)[^-]", line)
    ]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"(test_\w+\.py)::(test_\w+)", row)
        assert named, row
        for file, name in named:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"
