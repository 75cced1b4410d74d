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
import numpy as np
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
    monkeypatch.setattr(module.programs, "IMAGE", (4, 4, 3))
    monkeypatch.setitem(module.programs.TABLE1, "height", 3)
    return module


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("compiled_text")


WORK = {
    "streamed": ("steps", 6, "adam", True),
    "plain": ("steps", 6, "adam", False),
    "conv": ("steps", 3, "momentum", True),
    "vgg9": ("steps", 2, "sgd", False),
    "landscape": ("landscape", 6),
    "gram": ("gram", 16),
    "hitting, batch 3": ("hitting", 16, 3),
    "hitting, batch 25": ("hitting", 16, 25),  # several chunks of examples
}


@pytest.mark.parametrize("kind", WORK)
def test_programs_are_lowered_for_gpu_and_tpu(kind: str, compiled: ModuleType) -> None:
    maker, *arguments = WORK[kind]
    options = {"kind": kind} if kind in compiled.programs.BRANCHES else {}
    made = getattr(compiled.programs, maker)(*arguments, jax.devices()[:1], **options)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), made.arguments)
    exported = jax.export.export(jax.jit(made.function), platforms=["cuda", "tpu"])(*shapes)
    assert exported.platforms == ("cuda", "tpu")
    module = exported.mlir_module()
    expected = "convolution" if options else "gather" if "hitting" in kind else "dot_general"
    assert f"stablehlo.{expected}" in module
    if "hitting" in kind:  # what keeps XLA on CPU from computing things twice is not in the way elsewhere
        assert "optimization_barrier" in module


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
    widths = (48, *compiled.programs.HIDDEN, compiled.programs.CLASSES)
    parameters = 8 * sum((a + 1) * b for a, b in itertools.pairwise(widths))
    for kind in ("streamed", "plain"):
        sgd, momentum = (named[f"{kind} step, {o}, I = 8"] for o in ("sgd", "momentum"))
        assert sgd["parameter_bytes"] == 4 * parameters
        assert momentum["argument_bytes"] - sgd["argument_bytes"] == 4 * parameters
        assert sgd["aliased_bytes"] >= 4 * parameters  # taken over, not copied
        first = 8 * 48 * compiled.programs.HIDDEN[0]
        assert sgd["operations"] == 2 * compiled.programs.BATCH * (3 * parameters - first)
        assert "error" not in sgd


def test_a_gpu_that_is_not_here_needs_its_plugin(compiled: ModuleType) -> None:
    if importlib.util.find_spec("jax_plugins") is not None:
        pytest.skip("a plugin is installed, which other programs may need")
    with pytest.raises(SystemExit, match="pip install jax-cuda13-plugin jax-cuda13-pjrt"):
        compiled.devices_of("h100")


# --- the text of a compiled program ----------------------------------------------------------------------------------

_LOOP = """
%fused.1 (a: f32[3]) -> f32[3] {
  ROOT %inner = f32[3]{0:T(128)} negate(%a), backend_config={"estimated_cycles":"1000000"}
}

%below.2 (s: (s32[], f32[9,130])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[9,130]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  BOUND
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%turn.3 (s: (s32[], f32[9,130])) -> (s32[], f32[9,130]) {
  %s = (s32[]{:T(128)}, f32[9,130]{1,0:T(8,128)}) parameter(0)
  %x = f32[9,130]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %g = f32[9,130]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%fused.1
  %y = f32[9,130]{1,0:T(8,128)} fusion(%g), calls=%fused.1, backend_config={"estimated_cycles":"7"}
  %z = f32[9,130]{1,0:T(8,128)} fusion(%x, %y), calls=%fused.1, backend_config={"estimated_cycles":"5",ALIAS}
  %r = f32[128,10]{0,1:T(8,128)} all-reduce(%y), to_apply=%fused.1
  ROOT %t = (s32[]{:T(128)}, f32[9,130]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%i, %z, %k)
}

ENTRY %main.4 (x: f32[9,130], w: bf16[8,3]) -> f32[9,130] {
  %x = f32[9,130]{1,0:T(8,128)} parameter(0)
  %w = bf16[8,3]{0,1:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %three = s32[]{:T(128)} constant(3)
  %start = (s32[]{:T(128)}, f32[9,130]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%zero, %x, %three)
  %loop = (s32[]{:T(128)}, f32[9,130]{1,0:T(8,128)}, s32[]{:T(128)}) while(%start), condition=%below.2, body=%turn.3
  ROOT %out = f32[9,130]{1,0:T(8,128)} copy(%x), backend_config={"estimated_cycles":"11"}
}
"""


@pytest.mark.parametrize(
    ("bound", "turns"),
    [
        ("%n = s32[]{:T(128)} constant(3)", 3),
        ("%n = s32[]{:T(128)} get-tuple-element(%s), index=2", 3),  # carried from the caller
        ("%n = s32[]{:T(128)} get-tuple-element(%s), index=1", 1),  # not known
    ],
)
def test_loops_count_as_often_as_they_turn(bound: str, turns: int, text: ModuleType) -> None:
    alias = '"aliasing_operands":{"lists":[{"indices":["0","2"]}]}'
    said = text.summary(_LOOP.replace("BOUND", bound).replace("ALIAS", alias))
    assert said.cycles == turns * (7 + 5) + 11
    assert said.unestimated == {"g": turns}
    assert said.collectives == [("all-reduce", 4 * 128 * 10)]
    # two arrays a turn and the copy; the one that lies where an operand was is no new array
    assert said.written == 4 * (2 * turns + 1) * 9 * 130
    assert said.written_padded == 4 * (2 * turns + 1) * 16 * 256
    assert said.arguments == 4 * 9 * 130 + 2 * 8 * 3
    assert said.arguments_padded == 4 * 16 * 256 + 2 * 8 * 128


def test_arrays_in_tiles_take_the_tiles_that_they_touch(text: ModuleType, rng: np.random.Generator) -> None:
    """Against a count of the tiles that hold some number."""
    for _ in range(40):
        sizes = rng.integers(1, 12, size=rng.integers(2, 5))
        order = rng.permutation(len(sizes))
        tile = rng.integers(1, 6, size=2)
        inner, outer = order[0], order[1]
        places = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), axis=1)
        places[:, inner] //= tile[1]
        places[:, outer] //= tile[0]
        tiles = len(np.unique(places, axis=0))
        shape = f"f32[{','.join(map(str, sizes))}]{{{','.join(map(str, order))}:T({tile[0]},{tile[1]})S(1)}}"
        (array,) = text.arrays(shape)
        assert array == (4 * np.prod(sizes), 4 * tiles * np.prod(tile))
    assert [a.padded for a in text.arrays("(s32[]{:T(128)}, f32[5]{0}, token[])")] == [512, 20]
