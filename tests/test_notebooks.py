"""Notebooks are jupytext pairs: the `.py` file is the source, the `.ipynb` what Colab opens."""

from __future__ import annotations

from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.py"))


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_pair_agrees(source: Path) -> None:
    pair = source.with_suffix(".ipynb")
    written, paired = jupytext.read(source), jupytext.read(pair)
    cells = [[(c.cell_type, c.source) for c in book.cells] for book in (written, paired)]
    assert cells[0] == cells[1], f"run: jupytext --sync {pair}"
    assert paired.metadata["accelerator"] == "TPU"
    assert "colab.research.google.com" in paired.cells[0].source
    assert all(not c.get("outputs") for c in paired.cells), "clear the outputs: they are made anew on every run"
