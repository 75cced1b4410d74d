"""The pages' code works as typed: files are written, Python is run, commands are given, in order, in one folder."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest

from dualgap_jax import commands
from dualgap_jax.files import load_json

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of every fenced block of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page, flags=re.M | re.S)


def test_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    found = blocks((DOCS / "recipes.md").read_text(encoding="utf-8"))
    assert {language for language, _ in found} == {"python", "bash"}
    for language, text in found:
        name = re.match(r"# (\w+\.py)\n", text)
        if language == "bash":
            for line in text.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "dualgap"
                assert commands.main(arguments) == 0, line
        elif name is not None:
            Path(name[1]).write_text(text)
        else:
            exec(compile(text, "recipes.md", "exec"), {"__name__": "recipe"})
    said = capsys.readouterr()
    assert said.out.count("done in") == 0
    assert load_json(Path("from_csv/config.json"))["data"] == {"name": "own", "path": "mine.csv"}
    assert load_json(Path("gelu_run/config.json"))["branch"] == {"name": "gelu", "width": 2}
    assert load_json(Path("smoothed_run/config.json"))["loss"] == {"name": "smoothed_hinge", "beta": 10.0}
    assert list(Path("with_events/tensorboard").iterdir())
    (norms,) = Path("runs").glob("norms-*")
    assert load_json(norms / "config.json")["seed"] == 3
    assert len(Path("sweep/sweep.csv").read_text().splitlines()) == 1 + 4
    adamw = [load_json(p) for p in Path("runs").glob("synthetic_relu-*/config.json")]
    assert [c["training"]["optimizer"] for c in adamw] == [{"name": "adamw", "weight_decay": 0.01}]
    # The same data from two files: the same numbers.
    first, second = (load_json(Path(f"from_{kind}/results/landscape.json"))["scores"] for kind in ("npz", "csv"))
    assert first["barriers"] == pytest.approx(second["barriers"], rel=1e-3)
    for name in ("gelu", "smoothed", "norms"):
        sys.modules.pop(name, None)
