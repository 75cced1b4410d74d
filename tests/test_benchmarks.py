"""The benchmarks run at a tiny size and write what they promise; nothing here depends on time."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualgap_jax.losses import multi_margin
from dualgap_jax.networks import mlp, multi_branch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
NOT_MEASURED = "not measured"
SPREADS = {
    "training_step": {
        "step_ms", "step_gflops", "forward_gflops", "weight_gradient_gflops", "limit_gflops", "of_limit",
    },
    "landscape": {
        "grid_seconds", "point_ms", "marginal_point_ms", "full_point_ms", "over_full", "marginal_over_full",
        "marginal_gflops", "product_gflops", "floor_ms", "of_floor",
    },
    "hitting": {
        "run_step_ns", "table_seconds_extrapolated", "gflops", "square_gflops", "same_shapes_gflops", "of_square",
        "of_same_shapes",
    },
}  # fmt: skip
PEER_SPREADS = {
    "training_step": {"peer_step_ms", "over_peer"},
    "landscape": {"peer_point_ms", "over_peer"},
    "hitting": {"peer_step_us", "peer_hours_extrapolated", "over_peer"},
}
EXTRAS = {
    "training_step": {"case", "batch", "steps_per_segment", "operations_per_step", "peer_disagreement", "targets"},
    "landscape": {
        "case", "samples", "points", "full_points_timed", "full_grid_seconds_extrapolated", "full_disagreement",
        "operations_per_point", "peer_points_timed", "peer_grid_seconds_extrapolated", "peer_disagreement", "targets",
    },
    "hitting": {
        "case", "runs", "steps_timed", "operations_per_run_step", "first_call_seconds", "table_goal_seconds",
        "peer_disagreement", "targets",
    },
}  # fmt: skip


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, as if it stood first on the path; the package has modules of the same names."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, path: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> dict[str, Any]:
    load(name, monkeypatch).main(["--smoke", "--json", str(path), *flags])
    return json.loads(path.read_text())


def is_spread(value: Any) -> bool:
    return set(value) == {"median", "min", "max"} and value["min"] <= value["median"] <= value["max"]


@pytest.mark.parametrize("name", sorted(SPREADS))
def test_smoke_without_torch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # import torch now fails as if it were not installed
    results = run(name, tmp_path / "new" / "results.json", monkeypatch)

    assert results["benchmark"] == name
    assert results["smoke"] is True
    assert results["rounds"] == 1
    where = results["environment"]
    assert where["device"]
    assert where["platform"] == jax.devices()[0].platform
    assert where["cores"] >= 1
    assert where["versions"]["jax"] == jax.__version__
    assert set(where["versions"]) == {"python", "jax", "jaxlib", "numpy", "torch"}
    assert where["date"].endswith("+00:00")
    assert results["rows"]
    for row in results["rows"]:
        assert set(row) == SPREADS[name] | PEER_SPREADS[name] | EXTRAS[name]
        for key in SPREADS[name]:
            assert is_spread(row[key]), key
        for key in PEER_SPREADS[name]:
            assert row[key] == NOT_MEASURED, key
    output = capsys.readouterr().out
    assert "pip install" in output
    for row in results["rows"]:
        assert any(line.startswith(row["case"]) and NOT_MEASURED in line for line in output.splitlines())


@pytest.mark.parametrize("name", sorted(SPREADS))
def test_smoke_with_torch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    row = run(name, tmp_path / "results.json", monkeypatch)["rows"][0]
    for key in PEER_SPREADS[name]:
        assert is_spread(row[key]), key
    assert 0 <= row["peer_disagreement"] < 1e-4


def test_a_peer_that_does_not_learn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    module = load("training_step", monkeypatch)
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    with pytest.raises(RuntimeError, match="PyTorch on smoke"):
        module.measure(module.SMOKE[0], 8, 3, 3, 1, torch)


def test_a_full_reevaluation_of_other_points_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("landscape", monkeypatch)
    right = module.full_reevaluation
    monkeypatch.setattr(module, "full_reevaluation", lambda setup, points: right(setup, points[:, ::-1] * [1, -1]))
    with pytest.raises(RuntimeError, match="full re-evaluation"):
        module.measure(module.SMOKE, 3, 2, 1, None)


@pytest.mark.parametrize("name", sorted(SPREADS))
def test_no_torch_flag(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class MeasuredError(Exception):
        pass

    def refuse() -> None:
        raise AssertionError("PyTorch was asked for")

    def measure(*arguments: Any) -> None:
        raise MeasuredError(arguments[-1])

    module = load(name, monkeypatch)
    monkeypatch.setattr(importlib.import_module("common"), "load_torch", refuse)
    monkeypatch.setattr(module, "measure", measure)
    with pytest.raises(MeasuredError, match="None"):
        module.main(["--smoke", "--no-torch"])


@pytest.mark.parametrize("name", sorted(SPREADS))
@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--unknown"]])
def test_bad_flags(name: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="2"):
        load(name, monkeypatch).main(flags)


def test_operations_of_a_step_are_those_of_a_naive_count(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("training_step", monkeypatch)
    for _ in range(5):
        widths = tuple(int(w) for w in rng.integers(1, 9, size=rng.integers(2, 6)))
        branches, batch = (int(n) for n in rng.integers(1, 7, size=2))
        count = 0
        for layer in range(len(widths) - 1):
            for product in ("forward", "weight gradient", "input gradient"):
                if layer == 0 and product == "input gradient":
                    continue
                multiply_adds = widths[layer] * widths[layer + 1] * batch * branches
                count += 2 * multiply_adds
        assert module.operations(widths, branches, batch) == count


def test_operations_of_a_step_are_those_of_its_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products that JAX traces for the gradient of this network."""
    module = load("training_step", monkeypatch)
    hidden, branches, batch, d = (7, 5, 3), 11, 13, 17
    net, loss = multi_branch(mlp(hidden, 10), branches), multi_margin()
    x, y = jnp.ones((batch, d)), jnp.zeros(batch, jnp.int32)
    params, state = net.init(jax.random.key(0), x)
    jaxpr = jax.make_jaxpr(jax.grad(lambda p: jnp.mean(loss.per_example(net.apply(p, state, x)[0], y))))(params)
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    assert total == module.operations((d, *hidden, 10), branches, batch)


def test_operations_of_a_point(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("landscape", monkeypatch)
    case = module.Case((4, 5, 3), (8, 6), 7, 32, 3)
    products = 7 * 2 * (6 * 8 + 10 * 6) * 32
    combined = 7 * (8 * 32 + (6 * 8 + 6) + (10 * 6 + 10))
    assert module.operations(case) == products + 4 * combined


def test_disagreement_is_relative_to_the_range(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    common = importlib.import_module("common")
    expected = 0.9 + 1e-3 * np.linspace(0, 1, 6)  # as random labels give: the loss hardly moves
    noise = rng.choice([-1, 1], 6) * 1e-6
    assert common.disagreement(expected + noise, expected, "a peer") == pytest.approx(1e-3, rel=1e-6)
    for wrong in (expected[::-1], np.full(6, 0.9), np.where(np.arange(6) == 2, np.nan, expected)):
        with pytest.raises(RuntimeError, match="a peer"):
            common.disagreement(wrong, expected, "a peer")


def test_interleave_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    common = importlib.import_module("common")
    called: list[str] = []
    seconds = common.interleave({name: lambda name=name: called.append(name) for name in "abc"}, rounds=4)
    assert called == list("abc") * 5  # once untimed, then the rounds
    assert {name: values.shape for name, values in seconds.items()} == dict.fromkeys("abc", (4,))


def test_targets_are_judged_by_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    common = importlib.import_module("common")
    ratio = common.spread(np.asarray([3.0, 1.0, 8.0]))
    assert ratio == {"median": 3.0, "min": 1.0, "max": 8.0}
    row = {"ratio": ratio, "peer": NOT_MEASURED}
    judged = common.judge(row, [common.Target("ratio", 3.0), common.Target("peer", 1.0)])
    assert judged == {
        "ratio": {"least": 3.0, "reached": True}, "peer": {"least": 1.0, "reached": NOT_MEASURED}
    }  # fmt: skip
    assert common.judge(row, [common.Target("ratio", 3.5)])["ratio"]["reached"] is False
    assert common.text(ratio) == "3.00 (1.00-8.00)"


def test_the_streamed_landscape_agrees_with_full_reevaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run("landscape_streamed", tmp_path / "results.json", monkeypatch)
    (row,) = results["rows"]
    for key in ("survey_seconds", "points_per_second", "point_ms", "full_point_ms", "over_full"):
        assert is_spread(row[key]), key
    assert row["points"] == 81 + 75
    assert row["full_disagreement"] < 1e-2
    assert row["peak_gib"] > 0.05
    assert "full / point" in capsys.readouterr().out
    module = load("landscape_streamed", monkeypatch)
    right = module.full_reevaluation
    monkeypatch.setattr(module, "full_reevaluation", lambda c, p, d, points: right(c, p, d, points[:, ::-1] * [1, -1]))
    with pytest.raises(RuntimeError, match="full re-evaluation"):
        module.measure(module.in_memory.SMOKE, 3, 2, 1, tmp_path / "solutions", None)


def test_the_spectral_benchmark_agrees_with_its_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run("spectral", tmp_path / "results.json", monkeypatch)
    assert [row["case"] for row in results["rows"]] == ["gram", "qr"]
    for row in results["rows"]:
        for key in ("seconds", "limit_seconds", "of_limit", "pinv_seconds", "pinv_over_this", "scipy_qr_over_this"):
            assert is_spread(row[key]), key
        assert abs(row["relative_gap"]) < 1e-6
        assert row["peer_disagreement"] < 1e-5
    assert "relative gap" in capsys.readouterr().out


def test_the_value_by_pinv_is_problem_4_at_the_closed_form(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("spectral", monkeypatch)
    x, y = 9 * rng.standard_normal((7, 40)), 9 * rng.standard_normal((12, 40))
    left, sigma, right = np.linalg.svd(y @ np.linalg.pinv(x) @ x, full_matrices=False)
    kept = np.where(np.arange(len(sigma)) < 9, np.maximum(sigma - 5.0, 0), 0)
    fitted = (left * kept) @ right
    expected = 0.5 * np.sum((y - fitted) ** 2) + 5.0 * np.linalg.norm(fitted, "nuc")
    assert module.value_of(*module.by_pinv(x, y), x, y) == pytest.approx(expected, rel=1e-10)


@pytest.mark.realdata
@pytest.mark.skipif("TFDS_DATA_DIR" not in os.environ, reason="needs MNIST; set TFDS_DATA_DIR")
def test_the_precision_benchmark_measures_the_effect_of_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run("precision", tmp_path / "results.json", monkeypatch)
    plain, *others = results["rows"]
    assert (plain["params"], plain["compute"]) == ("float32", "float32")
    assert plain["largest_relative"] == plain["largest_to_start"] == 0
    assert {(row["params"], row["compute"]) for row in others} == {
        ("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"),
    }  # fmt: skip
    for row in results["rows"]:
        for key in ("loss", "accuracy", "step_ms", "lost_updates"):
            assert is_spread(row[key]), key
        assert (row["lost_updates"]["median"] > 0.01) == (row["params"] == "bfloat16")
        factor = 1 if row["params"] == "float32" else 2
        assert plain["parameter_bytes"] == factor * row["parameter_bytes"]
    for row in others:
        assert 0 < row["largest_relative"] < 0.1
        assert row["loss"]["median"] == pytest.approx(plain["loss"]["median"], rel=0.1)
    assert "bfloat16 parameters" in capsys.readouterr().out


def test_differences_of_courses_are_taken_segment_by_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("precision", monkeypatch)
    plain = {"course": [[2.0, 1.0, 0.5], [4.0, 2.0, 0.1]]}
    row = {"course": [[2.0, 1.1, 0.5], [4.0, 1.9, 0.15]]}
    found = module.compare(row, plain)
    assert found == {"largest_relative": pytest.approx(0.5), "largest_to_start": pytest.approx(0.05)}


def test_the_scaling_benchmark_measures_time_and_memory_in_fresh_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = run("scaling", tmp_path / "results.json", monkeypatch, "--branches=3")["rows"]
    for key in ("step_ms", "step_gflops", "limit_gflops", "of_limit", "plain_of_limit"):
        assert is_spread(row[key]), key
    assert round(row["parameter_gb"] * 1e9) == 3 * 4 * (17 * 3 + 4 * 2 + 3 * 10)
    assert 0.05 < row["peak_gb"] < row["peak_with_checkpoints_gb"] < 4  # saving brings in Orbax
    assert "checkpoints" in capsys.readouterr().out
    assert not list(tmp_path.glob("tmp*"))


def test_growth_is_told_between_the_two_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("scaling", monkeypatch)
    rows = [
        {"case": f"I={i}", "num_branches": i, "step_ms": {"median": t}, "peak_gb": 1 + 1.5 * p, "parameter_gb": p}
        for i, t, p in ((10, 2.0, 1.0), (1, 7.0, 0.1), (40, 9.0, 4.0))
    ]
    text = module.growth(rows)
    assert "From I=10 to I=40 (x 4)" in text
    assert "x 4.5" in text
    assert "adds 1.5 bytes" in text


# --- all of them -----------------------------------------------------------------------------------------------------


def spread(median: float, half: float) -> dict[str, float]:
    return {"median": median, "min": median - half, "max": median + half}


def test_a_ratio_has_moved_when_the_ranges_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = load("all", monkeypatch).moved
    assert moved(spread(1.2, 0.05), spread(1.0, 0.05)) == "+20 %"
    assert moved(spread(0.8, 0.05), spread(1.0, 0.05)) == "-20 %"
    assert moved(spread(1.2, 0.15), spread(1.0, 0.1)) == ""  # the ranges meet
    assert moved(spread(1.03, 0.001), spread(1.0, 0.001)) == ""  # by less than a twentieth
    assert moved(spread(1.0, 0.1), None) == "new"
    assert moved(None, spread(1.0, 0.1)) == ""


def test_all_in_one_and_what_moved_against_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record in which one ratio was half of what is found, and one case is no longer there."""
    module = load("all", monkeypatch)
    found = module.measure("theorem 1", smoke=True)
    assert {row["case"].split(",")[0] for row in found} == {"inf(P)", "search"}
    limited = next(row for row in found if row["of_limit"])
    monkeypatch.setattr(module, "measure", lambda work, smoke: found)
    half = {name: value / 2 for name, value in limited["of_limit"].items()} | {"max": limited["of_limit"]["min"] * 0.6}
    record = tmp_path / "docs" / "speed.json"
    record.parent.mkdir()
    record.write_text(json.dumps({"rows": [{**limited, "of_limit": half}, {**limited, "case": "gone"}]}))
    module.main(["--only", "theorem 1", "--record", str(record), "--publish"])
    said = capsys.readouterr().out
    assert "+100 %" in said
    assert "no longer measured: theorem 1, gone" in said
    assert json.loads(record.read_text())["rows"] == found
    assert limited["case"] in record.with_suffix(".md").read_text()
    assert (record.parent / "figures" / "speed.png").stat().st_size > 5000
    module.main(["--only", "theorem 1", "--record", str(record)])
    assert " %" not in capsys.readouterr().out  # the same numbers: nothing moved


def test_a_benchmark_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("all", monkeypatch)
    wrong = module.WORKS["theorem 1"]._replace(script="duality_gap --no-such-flag")
    monkeypatch.setitem(module.WORKS, "theorem 1", wrong)
    with pytest.raises(RuntimeError, match=r"duality_gap\.py (.|\n)*unrecognized arguments: --no-such-flag"):
        module.measure("theorem 1", smoke=True)


def test_claims_are_proven_again(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("proofs", monkeypatch)
    assert module.row(module.cases(smoke=True)["certify cells"]()).endswith("| yes |")


def test_exponents_are_those_of_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    slope = load("growth", monkeypatch).slope
    values = [10, 20, 40, 80, 160, 320]
    found = slope(values, [1.0, 1.0, 3 * 40**1.5, 3 * 80**1.5, 3 * 160**1.5, 3 * 320**1.5])  # constant costs below
    assert [found[key] for key in ("exponent", "least", "largest", "local")] == pytest.approx([1.5] * 4)
    noisy = slope(values, [v * factor for v, factor in zip(values, (1, 1.1, 0.9, 1.2, 0.9, 1.1), strict=True)])
    assert noisy["least"] < 1 < noisy["largest"]
    assert noisy["largest"] - noisy["least"] > 0.1
    assert slope([1, 2], [1.0, 2.0])["exponent"] is None


def test_growth_is_measured_in_fresh_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run("growth", tmp_path / "growth.json", monkeypatch, "--only", "theorem 1", "--rounds", "1")["rows"]
    assert [row["case"] for row in rows] == ["theorem 1: I", "theorem 1: m"]
    assert [row["values"] for row in rows] == [[10, 100], [129, 257]]
    assert all(second > 0 for row in rows for second in row["seconds"])


def test_every_work_whose_growth_is_measured_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("growth", monkeypatch)
    for work in module.WORKS.values():
        assert work.varied.keys() == work.base.keys() == work.explained.keys()
        assert all(list(values) == sorted(set(values)) for values in work.varied.values())
        sizes = {key: min(work.varied[key][0], value) for key, value in work.base.items()}
        assert jax.block_until_ready(work.prepare(sizes)()) is not None


def test_numbers_of_an_accelerator_are_compared_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("agreement", monkeypatch)
    cpu = module.quantities(module.SMOKE)
    assert all(np.isfinite(value).all() for value in cpu.values())
    assert all(row["agrees"] == "yes" and row["difference"] == 0 for row in module.compared(cpu, cpu))
    moved = {
        "surface, dense": ("surface, dense", lambda a: a * (1 + 3e-5)),
        "surface, convolutional": ("surface, convolutional", lambda a: a * (1 - 3e-5)),
        "hits": ("final losses", lambda a: np.where(np.arange(len(a)) == 1, 0.0, a)),
        "loss curves": ("loss curves", lambda a: np.nextafter(a, np.float32(np.inf), dtype=a.dtype)),
        "step, highest": ("step, highest", lambda a: a * 1.001),
        "theorem 2, gram": ("theorem 2, gram", lambda a: a * (1 + 1e-5)),
        "theorem 2, qr": ("theorem 2, qr", lambda a: a + np.asarray([0, 1e-3]) * abs(a)),
    }
    for case, (name, change) in moved.items():
        rows = module.compared({**cpu, name: change(cpu[name])}, cpu)
        assert [row["case"] for row in rows if row["agrees"] == "NO"] == [case]
    nan = module.compared({**cpu, "surface, dense": cpu["surface, dense"] * np.nan}, cpu)
    assert nan[0]["agrees"] == "NO"
    reported = module.compared({**cpu, "step, as trained": cpu["step, as trained"] * 1.1}, cpu)
    assert all(row["agrees"] == "yes" for row in reported)  # TF32 is no error


def test_peers_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = run("landscape", tmp_path / "a.json", monkeypatch, "--no-torch", "--no-full")["rows"]
    assert row["full_point_ms"] == row["over_full"] == NOT_MEASURED
    assert is_spread(row["marginal_point_ms"])
    rows = run("spectral", tmp_path / "b.json", monkeypatch, "--no-peers")["rows"]
    assert [row["pinv_seconds"] for row in rows] == [NOT_MEASURED] * 2
    assert all(is_spread(row["seconds"]) and is_spread(row["of_limit"]) for row in rows)
