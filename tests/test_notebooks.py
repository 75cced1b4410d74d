"""Notebooks are jupytext pairs: the `.py` file is the source, the `.ipynb` what Colab opens."""

from __future__ import annotations

import json
from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.py"))


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_pair_agrees(source: Path) -> None:
    pair = source.with_suffix(".ipynb")
    written, paired = jupytext.read(source), jupytext.read(pair)
    # The formatter keeps two blank lines before a class in the one, and none in the other.
    cells = [[(c.cell_type, c.source.strip()) for c in book.cells] for book in (written, paired)]
    assert cells[0] == cells[1], f"run: jupytext --sync {pair}"
    assert paired.metadata["accelerator"] == "TPU"
    assert "colab.research.google.com" in paired.cells[0].source
    outputs = [output for cell in paired.cells for output in cell.get("outputs", ())]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    size = len(json.dumps(outputs))
    assert size < 400_000, f"{size:,} bytes of outputs: draw smaller pictures"
