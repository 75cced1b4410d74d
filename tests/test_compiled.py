"""The programs that matter, lowered for GPUs and TPUs, which needs none; what `benchmarks/compiled` says of them."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, for small images."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.setenv(name, "1")
    spec = importlib.util.spec_from_file_location("benchmark_compiled", FOLDER / "compiled.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "IMAGE", (4, 4, 3))
    return module


@pytest.mark.parametrize("kind", ["streamed", "plain", "landscape", "gram"])
def test_programs_are_lowered_for_gpu_and_tpu(kind: str, compiled: ModuleType) -> None:
    devices = jax.devices()[:1]
    made = {
        "streamed": lambda: compiled.steps(6, "adam", True, devices),
        "plain": lambda: compiled.steps(6, "adam", False, devices),
        "landscape": lambda: compiled.landscape(6, devices),
        "gram": lambda: compiled.gram(16, devices),
    }[kind]()
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), made.arguments)
    exported = jax.export.export(jax.jit(made.function), platforms=["cuda", "tpu"])(*shapes)
    assert exported.platforms == ("cuda", "tpu")
    assert "stablehlo.dot_general" in exported.mlir_module()


def test_the_table_counts_what_the_programs_take(
    compiled: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    command = ["compiled.py", "--topology", "cpu", "--branches", "8", "--optimizers", "sgd", "momentum"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(path)])
    compiled.main()
    assert "nothing here is measured" in capsys.readouterr().out
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    named = {row["program"]: row for row in rows}
    assert len(named) == 6
    widths = (48, *compiled.HIDDEN, compiled.CLASSES)
    parameters = 8 * sum((a + 1) * b for a, b in itertools.pairwise(widths))
    for kind in ("streamed", "plain"):
        sgd, momentum = (named[f"{kind} step, {o}, I = 8"] for o in ("sgd", "momentum"))
        assert sgd["parameter_bytes"] == 4 * parameters
        assert momentum["argument_bytes"] - sgd["argument_bytes"] == 4 * parameters
        assert sgd["aliased_bytes"] >= 4 * parameters  # taken over, not copied
        first = 8 * 48 * compiled.HIDDEN[0]
        assert sgd["operations"] == 2 * compiled.BATCH * (3 * parameters - first)
        assert "error" not in sgd
