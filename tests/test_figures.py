"""Figures from saved records: what is drawn, what is said, what is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from hitting_records import write_hitting_rate, write_hitting_search
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

from dualgap_jax import figures
from dualgap_jax.figures import page, panels
from dualgap_jax.files import load_json, save_json, save_npz
from dualgap_jax.registry import Table, UnknownNameError

ROOT = Path(__file__).resolve().parents[1]
INSIDE = ((0.3, 0.1), (-0.35, 0.2), (0.05, -0.4))
OUTSIDE = ((0.47, 0.47), (-0.94, 0.47), (0.47, -0.94))


def wells(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 8 * (x**2 - 0.15) ** 2 + 3 * y**2 + 0.2 * x


def bowl(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 1.5 * x**2 + 2 * y**2 + 0.01


def steep(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.exp(18 * np.hypot(x, y))


def plateau(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 0.25 + 0 * x * y


def write_landscape(
    workdir: Path,
    surface: Callable[[np.ndarray, np.ndarray], np.ndarray] = wells,
    *,
    change: Callable[[dict[str, np.ndarray]], None] = lambda arrays: None,
    anchors: tuple[tuple[float, float], ...] = INSIDE,
    **record: Any,
) -> Path:
    """A landscape record on a grid of 17 by 13 points; `change` edits the arrays before they are written."""
    results = workdir / "results"
    results.mkdir(parents=True)
    xs, ys, t = np.linspace(-0.6, 0.6, 17), np.linspace(-0.6, 0.6, 13), np.linspace(0, 1, 11)
    points = np.asarray(anchors)
    ends = [(points[i], points[j]) for i, j in ((0, 1), (1, 2), (2, 0))]
    edge_loss = np.stack([surface(*((1 - t) * a[:, None] + t * b[:, None])) for a, b in ends])
    arrays = {"xs": xs, "ys": ys, "loss": surface(xs[None], ys[:, None]), "anchors": points}
    arrays |= {"edge_t": t, "edge_loss": edge_loss}
    change(arrays)
    save_npz(results / "landscape.npz", **arrays)
    solution = {"loss": 2e-6, "status": "converged", "steps": 1200}
    scores = {"envelope_max": 0.4321, "barrier_max": None, "status": "ok", "barriers": [0.1, 0.2, 0.3]}
    content = {"title": "A title for $5", "num_branches": 50_000, "solutions": [solution] * 3, "scores": scores}
    content |= {"definitions": {}, "axes": "authors", "zero_loss": 1.0}
    save_json(results / "landscape.json", content | record)
    return workdir


def write_row(workdir: Path, scores: dict[int, dict[str, Any]], score_names: list[str]) -> Path:
    cells = []
    for count, values in scores.items():
        write_landscape(workdir / f"cells/I{count}", bowl if count > 5 else wells, num_branches=count)
        cells.append({"num_branches": count, "workdir": f"cells/I{count}", "scores": values, "solutions": []})
    (workdir / "results").mkdir()
    record = {"title": "Row", "paper_item": "Figure 1", "cells": cells, "score_names": score_names, "definitions": {}}
    save_json(workdir / "results" / "row.json", record)
    return workdir


def write_regimes(workdir: Path, rng: np.random.Generator, counts: tuple[int, ...] = (10, 30, 1000)) -> Path:
    cells = [
        {
            "init": init,
            "lr_scaling": scaling,
            "reduce": reduction,
            "num_branches": count,
            "repeat": repeat,
            "scores": {f"envelope_max{unit}": float(rng.lognormal()) for unit in ("", "_per_zero_loss", "_per_range")},
            "losses": [0.0, 0.0, 0.0],
            "statuses": ["converged", "converged", "max_steps" if count == 1000 else "converged"],
        }
        for init in ("torch", "normal")
        for reduction in ("mean", "sum")
        for scaling in ("constant", "by_I")
        for count in counts
        for repeat in range(3)
    ]
    (workdir / "results").mkdir(parents=True)
    record = {"title": "Regimes", "cells": cells, "score": "envelope_max", "definitions": {}}
    save_json(workdir / "results" / "regimes.json", record)
    return workdir


def write_averages(workdir: Path) -> Path:
    """Two overlapping triangles, a segment and a point; then a set on a lattice."""
    results = workdir / "results"
    results.mkdir(parents=True)
    loops = [[[0, 0], [2, 0], [1, 1]], [[1, 0], [3, 0], [2, 1]], [[0, 1], [0, 2]], [[3, 2]]]
    arrays = {
        "hull": np.asarray([[0.0, 0], [3, 0], [3, 2], [0, 2]]),
        "n1_vertices": np.concatenate([np.asarray(loop, dtype=np.float64) for loop in loops]),
        "n1_lengths": np.asarray([len(loop) for loop in loops]),
        "n4_vertices": np.asarray([[0.0, 0], [3, 0], [3, 2], [0, 2]]),
        "n4_lengths": np.asarray([4]),
    }
    save_npz(results / "shapley_folkman.npz", **arrays)
    keys = ("n", "distance", "error", "kind", "shapley_folkman_bound", "starr_bound")
    rows = [(1, 0.5, 0.01, "bounded", 2.0, 1.0), (4, 0.0, 0.01, "bounded", 0.7, 0.35)]
    record = {"title": "A title for $5", "paper_item": "Figure 3", "panels": [1, 4]}
    record |= {"circumradius": 2.0, "inner_radius": 1.0, "slack": 0.0, "decay_exponent": None}
    record["rows"] = [dict(zip(keys, row, strict=True)) for row in rows]
    save_json(results / "shapley_folkman.json", record)
    return workdir


def write_spectral(workdir: Path) -> Path:
    """An optimum of rank 2 and the SGD curves of one depth."""
    results = workdir / "results"
    results.mkdir(parents=True)
    record = {"title": "A title for $5", "sizes": {"d_0": 4, "d_H": 3, "n": 50_000, "widths": [2]}, "primal": 2.0}
    record |= {"dual": 2.0, "relative_gap": -1e-17, "rank": 2, "gamma": 0.5, "half_norm": 9.0, "theorem_applies": True}
    record["sgd"] = [{"depth": 2, "seed": seed, "objective": 2.1, "lowest": 2.1, "gap": 0.1} for seed in (0, 1)]
    save_json(results / "spectral.json", record)
    curves = {"steps_2": np.arange(0, 30, 10), "objective_2": np.asarray([[9.0, 3.0, 2.1], [8.0, 3.5, 2.2]])}
    save_npz(results / "spectral.npz", singular_values=np.asarray([3.0, 1.0, 0.2]), **curves)
    return workdir


def write_duality_gap(workdir: Path) -> Path:
    """Gaps at three I, a value function with its envelope, a dual function, and trained networks at two I."""
    record: dict[str, Any] = {"title": "A title for $5", "status": "certified", "method": "by hand", "budget": 1.0}
    record["delta"] = {"lower": 0.5, "upper": 0.6, "status": "certified"}
    record["rows"] = [
        {"num_branches": count, "gap_lower": gap / 2, "gap_upper": gap, "bound": 2 / count, "delta_lower": 0.5}
        | {"primal_upper": 0.4 + gap, "dual_lower": 0.4, "verdict": "verified"}
        for count, gap in ((1, 0.1), (10, 0.01), (100, 0.0))
    ]
    record["value_function"] = {"budgets": [0.0, 1.0, 2.0], "lower": [1.0, 0.4, 0.0], "upper": [1.0, 0.5, 0.0]}
    record["value_function"]["envelope"] = [1.0, 0.45, 0.0]
    record["dual_function"] = {"multipliers": [0.0, 0.5, 1.0], "q": [0.0, 0.9, 1.0]}
    record["dual_function"] |= {"dual_objective": [0.0, 0.4, 0.0], "best": 0.5}
    record["trained"] = [
        {"num_branches": count, "losses": [0.6, 0.7], "median": 0.65, "primal_upper": 0.5, "dual_lower": 0.4}
        for count in (1, 2)
    ]
    results = workdir / "results"
    results.mkdir(parents=True)
    save_json(results / "duality_gap.json", record)
    return workdir


def write_examples(workdir: Path) -> Path:
    """Two numbers of examples; the barrier falls where the data are fitted, and a run diverged."""
    cells = [
        {"num_examples": n, "num_branches": count, "num_parameters": 20 * count, "num_outputs": 2}
        | {"scores": [{"barrier_max": n / 10 / count + seed} for seed in range(2)] if count < 100 else [{}, {}]}
        | {"losses": [0.0, 0.1] if count < 100 else [None, 0.1], "statuses": ["converged", status]}
        for n, status in ((10, "converged"), (100, "plateau"))
        for count in (1, 5, 100)
    ]
    record = {"title": "A title for $5", "paper_item": "Figure 4", "seeds": 2, "cells": cells}
    (workdir / "results").mkdir(parents=True)
    save_json(workdir / "results" / "examples.json", record)
    return workdir


def write_search(workdir: Path) -> Path:
    """Two entries of the screen, one with a run that diverged; a fit with intervals, one data set held out."""

    def entry(scale: float, *, lost: bool = False) -> dict[str, Any]:
        rows = [
            {"num_branches": count, "mean": None if lost and count == 70 else scale * value}
            | {"interval": [0.0, -0.1 * value, 1.5 * value] if count == 10 else None}
            for count, value in ((10, 0.8), (70, 0.2))
        ]
        return {"setting": "rate=1.0", "data_seed": 5, "rows": rows}

    record = {"title": "A title for $5", "num_branches": [10, 70], "target": [0.8, 0.2]}
    record |= {"screen": [entry(0.5), entry(2.0, lost=True)], "chosen": entry(0.9), "held_out": [entry(0.7)]}
    (workdir / "results").mkdir(parents=True)
    save_json(workdir / "results" / "landscape_search.json", record)
    return workdir


def write_certify(workdir: Path) -> Path:
    """Two regimes: one whose band is narrow, one whose best network is the optimum, with a run that diverged."""
    cells = [
        {"regime": regime, "name": f"a name for {regime}", "zero_network": 0.5, "lower": 0.1, "upper": 0.1 + width}
        | {"status": status, "rows": [
            {"num_branches": count, "best": 0.1 + width + excess, "trained": [0.2, math.nan]}
            for count, excess in ((1, 0.05), (10, 0.01), (1000, 0.0))
        ]}
        for regime, width, status in (("chain", 1e-8, "certified"), ("two_layer", 0.02, "estimated"))
    ]  # fmt: skip
    record = {"title": "A title for $5", "loss": "squared", "data": {"examples": 1234}, "cells": cells}
    results = workdir / "results"
    results.mkdir(parents=True)
    save_json(results / "certify.json", record)
    return workdir


def write_architecture(workdir: Path) -> Path:
    cells = [
        {
            "num_branches": count,
            "scores": {"test_accuracy": 0.9, "barrier_max": 0.3 / count, "barrier_max_aligned": math.nan},
            "intervals": {"test_accuracy": [0.9, 0.85, 0.95]} if count == 1 else {},
        }
        for count in (1, 4)
    ]
    record = {"title": "A title for $5", "paper_item": "mlp branches", "note": "Widths: $5.", "seeds": 3}
    record |= {"cells": cells, "score_names": ["test_accuracy", "barrier_max", "barrier_max_aligned"]}
    (workdir / "results").mkdir(parents=True)
    save_json(workdir / "results" / "architecture.json", record)
    return workdir


def sample(name: str, workdir: Path, rng: np.random.Generator) -> Path:
    """A work folder that holds a record of the given name."""
    scores = {1: {"envelope_max": 2.0}, 10: {"envelope_max": 0.5}}
    return {
        "landscape.json": lambda: write_landscape(workdir),
        "row.json": lambda: write_row(workdir, scores, ["envelope_max"]),
        "examples.json": lambda: write_examples(workdir),
        "architecture.json": lambda: write_architecture(workdir),
        "landscape_search.json": lambda: write_search(workdir),
        "regimes.json": lambda: write_regimes(workdir, rng),
        "shapley_folkman.json": lambda: write_averages(workdir),
        "spectral.json": lambda: write_spectral(workdir),
        "duality_gap.json": lambda: write_duality_gap(workdir),
        "certify.json": lambda: write_certify(workdir),
        "hitting_rate.json": lambda: write_hitting_rate(workdir, rng),
        "hitting_search.json": lambda: write_hitting_search(workdir, rng),
    }[name]()


def texts(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


# Every entry of the table ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(figures.FIGURES))
def test_every_entry_draws_png_and_pdf_the_same_each_time(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    workdir = sample(name, tmp_path / "run", rng)
    assert figures.FIGURES.describe(name)
    paths = figures.FIGURES[name](workdir)
    first = {path: path.read_bytes() for path in paths}
    assert {path: path.read_bytes() for path in figures.draw(str(workdir))} == first
    assert {path.parent for path in paths} == {workdir / "figures"}
    assert sorted(p.suffix for p in paths) == [".pdf"] * (len(paths) // 2) + [".png"] * (len(paths) // 2)
    for path in paths:
        assert path.read_bytes().startswith(b"%PDF" if path.suffix == ".pdf" else b"\x89PNG")
        if path.suffix == ".png":
            assert np.ptp(imread(path)[..., :3]) > 0.5  # not blank


def test_the_table_is_read_only_and_open_to_extension(tmp_path: Path) -> None:
    assert isinstance(figures.FIGURES, Table)
    with pytest.raises(TypeError):
        figures.FIGURES["mine.json"] = figures.row  # type: ignore[index]
    with pytest.raises(UnknownNameError, match=r"landscape\.json"):
        figures.FIGURES["landscap.json"]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine.json").write_text("{}")
    mine = figures.FIGURES.extended({"mine.json": lambda workdir: [Path(workdir) / "seen"]})
    assert figures.draw(tmp_path, mine) == [tmp_path / "seen"]


def test_the_style_stays_inside(tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        loud = imread(figures.draw(write_landscape(tmp_path / "a"))[0])
        assert dict(matplotlib.rcParams) == before
    assert np.array_equal(loud, imread(figures.draw(write_landscape(tmp_path / "b"))[0]))


# One landscape --------------------------------------------------------------------------------------------------------


def test_the_map_marks_the_solutions_and_the_edges_show_the_losses(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    figures.landscape(write_landscape(tmp_path / "run"))
    _, flat, edges = drawn["landscape"].axes[:3]
    assert {note.get_text(): note.xy for note in flat.texts} == {str(k): p for k, p in enumerate(INSIDE)}
    stored = np.load(tmp_path / "run/results/landscape.npz")
    lines = {line.get_label(): line for line in edges.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["0–1", "1–2", "2–0"]
    for line, losses in zip(lines.values(), stored["edge_loss"], strict=True):
        np.testing.assert_array_equal(line.get_ydata(), losses)
    assert flat.get_aspect() == 1.0
    words = texts(drawn["landscape"])
    assert r"A title for \$5" in words
    assert "$I$ = 50,000" in words
    assert "largest envelope distance 0.432 in loss" in words
    assert "largest barrier undefined" in words
    assert "converged after 1,200 steps" in words


def test_losses_over_some_of_the_examples_are_said_to_be(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    said = "Losses are over 1,000 of the 50,000 training examples"
    figures.landscape(write_landscape(tmp_path / "some", samples={"used": 1000, "of": 50_000}))
    assert said in " ".join(texts(drawn["landscape"]).split())
    figures.landscape(write_landscape(tmp_path / "all", samples={"used": 50_000, "of": 50_000}))
    assert "training examples" not in texts(drawn["landscape"])


def test_solutions_outside_the_window_widen_the_map(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    figures.landscape(write_landscape(tmp_path / "run", anchors=OUTSIDE))
    flat = drawn["landscape"].axes[1]
    (left, right), (low, high) = flat.get_xlim(), flat.get_ylim()
    assert all(left < x < right and low < y < high for x, y in OUTSIDE)
    assert "solutions 1 at (\N{MINUS SIGN}0.94, 0.47), 2 at" in texts(drawn["landscape"])
    assert "solutions 0" not in texts(drawn["landscape"])


def test_far_solutions_do_not_shrink_the_window_to_a_dot(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    figures.landscape(write_landscape(tmp_path / "run", anchors=((0.0, 0.0), (500.0, 0.1), (0.0, 0.3))))
    left, right = drawn["landscape"].axes[1].get_xlim()
    assert right - left < 4 * 1.2
    assert "1 at (500, 0.1)" in texts(drawn["landscape"])


@pytest.mark.parametrize("seed", range(3))
def test_non_finite_points_are_seen_and_counted(seed: int, tmp_path: Path, drawn: dict[str, Figure]) -> None:
    rng = np.random.default_rng(seed)
    kinds = rng.choice([0.0, np.nan, np.inf, -np.inf], size=(13, 17), p=[0.7, 0.1, 0.1, 0.1])

    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays["loss"] = arrays["loss"] + kinds
        arrays["edge_loss"][1, 3:6] = np.nan

    figures.landscape(write_landscape(tmp_path / "run", change=spoil))
    solid, flat, edges = drawn["landscape"].axes[:3]
    nan, infinite = int(np.isnan(kinds).sum()), int(np.isinf(kinds).sum())
    assert f"{nan} NaN and {infinite} infinite of 221" in texts(drawn["landscape"])
    assert "not finite: 3 NaN of 33" in texts(drawn["landscape"])
    (hatched,) = [c for c in flat.collections if c.get_hatch()]
    boxes = [(path.vertices.min(axis=0), path.vertices.max(axis=0)) for path in hatched.get_paths()]
    for i, y in enumerate(np.linspace(-0.6, 0.6, 13)):
        for j, x in enumerate(np.linspace(-0.6, 0.6, 17)):
            point = np.asarray([x, y]) * 0.99  # off the window's border
            covered = sum(bool((low < point).all() and (point < high).all()) for low, high in boxes)
            assert covered == (not np.isfinite(kinds[i, j]))
    assert any(c.get_facecolor().shape[0] and to_hex(c.get_facecolor()[0]) == "#999999" for c in solid.collections)
    crosses = [line.get_xdata() for line in edges.lines if line.get_marker() == "x" and len(line.get_xdata())]
    np.testing.assert_allclose(np.concatenate(crosses), [0.3, 0.4, 0.5])


def test_hatched_cells_reach_the_page(tmp_path: Path) -> None:
    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays["loss"][2:6, 3:8] = np.nan

    grey = np.round(0.82 * 255) / 255

    def count(path: Path) -> int:
        return int((np.abs(imread(path)[..., :3] - grey).max(axis=-1) < 1e-3).sum())

    whole = count(figures.draw(write_landscape(tmp_path / "whole"))[0])
    assert count(figures.draw(write_landscape(tmp_path / "holes", change=spoil))[0]) > whole + 2000


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_surface_without_any_finite_loss_is_still_drawn(
    value: float, tmp_path: Path, drawn: dict[str, Figure]
) -> None:
    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays["loss"][:] = value
        arrays["edge_loss"][:] = value

    figures.landscape(write_landscape(tmp_path / "run", change=spoil))
    assert f"221 {'NaN' if np.isnan(value) else 'infinite'} of 221" in texts(drawn["landscape"])
    assert not drawn["landscape"].axes[1].child_axes  # no colour bar with invented numbers


@pytest.mark.parametrize(("surface", "axes"), [(bowl, "authors"), (steep, "orthonormal"), (plateau, "another")])
def test_other_surfaces_and_axes(surface: Any, axes: str, tmp_path: Path, drawn: dict[str, Figure]) -> None:
    figures.landscape(write_landscape(tmp_path / "run", surface, axes=axes))
    label = drawn["landscape"].axes[1].get_xlabel()
    assert {"authors": r"\|w_2\|", "orthonormal": "parameter distance", "another": "first axis"}[axes] in label
    assert ("quantiles" in texts(drawn["landscape"])) == (surface is steep)


def test_a_lone_spike_neither_hides_the_surface_nor_goes_unsaid(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    def spoil(arrays: dict[str, np.ndarray]) -> None:
        arrays["loss"][0, 0] = 1e9

    figures.landscape(write_landscape(tmp_path / "run", bowl, change=spoil))
    assert drawn["landscape"].axes[0].get_zlim()[1] < 2
    assert "the largest loss is $10^{9}$" in texts(drawn["landscape"])


@pytest.mark.parametrize(("ny", "nx"), [(5, 7), (40, 230)])
def test_the_3d_surface_stands_at_the_recorded_losses(ny: int, nx: int, rng: np.random.Generator) -> None:
    xs, ys, loss = np.sort(rng.random(nx)), np.sort(rng.random(ny)), rng.random((ny, nx))
    loss[2, 3] = np.nan
    surface = panels.Surface(xs, ys, loss, np.zeros((3, 2)), np.zeros(1), np.zeros((3, 1)))
    quads = panels._quads(surface, 0.9)
    heights = {(x, y): min(z, 0.9) for z, (y, x) in zip(loss.ravel(), ((y, x) for y in ys for x in xs), strict=True)}
    assert all(heights[x, y] == z for x, y, z in quads.reshape(-1, 3).tolist())
    assert len(quads) == (ny - 1) * (nx - 1) - 4 if nx < 100 else len(quads) <= (ny - 1) * 100
    assert (quads[..., 0].min(), quads[..., 0].max()) == (xs[0], xs[-1])
    assert (quads[..., 1].min(), quads[..., 1].max()) == (ys[0], ys[-1])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("power", [0.1, 1.0, 30.0])
def test_levels_cover_every_finite_loss(seed: int, power: float) -> None:
    rng = np.random.default_rng(seed)
    loss = rng.normal() + np.exp(power * rng.normal(size=(9, 8)))
    loss[rng.random(loss.shape) < 0.2] = np.nan
    scale = panels.scale_of(loss)
    finite = loss[np.isfinite(loss)]
    assert np.all(np.diff(scale.levels) > 0)
    assert scale.levels[0] <= finite.min()
    assert finite.max() <= scale.levels[-1]
    bands = np.histogram(finite, scale.levels)[0]
    assert bands.max() < 0.8 * finite.size  # no single band swallows the surface
    colours = np.asarray(scale.norm(np.sort(finite)))
    assert np.all(np.diff(colours) >= 0)
    assert colours.min() >= 0
    assert colours.max() <= 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.1 + 0.2, "0.3"),
        (-0.5, "\N{MINUS SIGN}0.5"),
        (1234.0, "1,230"),
        (0.00123, "0.00123"),
        (0.0009999, "0.001"),
        (2.7e-5, r"$2.7\times10^{-5}$"),
        (1e9, "$10^{9}$"),
        (-1e9, "$-10^{9}$"),
        (99_999.0, "$10^{5}$"),
        (3e20, r"$3\times10^{20}$"),
        (np.nan, "nan"),
    ],
)
def test_numbers_for_labels(value: float, text: str) -> None:
    assert page.number(value) == text


# A row ----------------------------------------------------------------------------------------------------------------


def test_a_row_stands_in_the_order_of_branches_with_the_papers_subcaptions(
    tmp_path: Path, drawn: dict[str, Figure]
) -> None:
    scores = {1000: {"envelope_max": 0.1}, 3: {"envelope_max": None}, 30: {"envelope_max": 0.7}}
    figures.row(write_row(tmp_path / "run", scores, ["envelope_max"]))
    words = texts(drawn["row"])
    places = [words.index(part) for part in ("(a) $I$ = 3.", "(b) $I$ = 30.", "(c) $I$ = 1,000.")]
    assert places == sorted(places)
    assert sum(axes.name == "3d" for axes in drawn["row"].axes) == 3
    assert "own scale" in words
    assert "distance undefined in loss" in words
    assert "distance 0.7 in loss" in words


def test_the_scores_chart_shows_the_recorded_numbers(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    scores = {
        1: {"envelope_max": 2.0, "envelope_mean": 0.5, "midpoint_violation_rate": 0.3, "mine": 1.0, "status": "ok"},
        3: {"envelope_max": 1.0, "envelope_mean": None, "midpoint_violation_rate": 0.1, "mine": 4.0, "status": "ok"},
        100: {"envelope_max": 0.01, "envelope_mean": 0.1, "midpoint_violation_rate": 0.0, "mine": -2.0, "status": "ok"},
    }
    names = ["envelope_max", "envelope_mean", "midpoint_violation_rate", "mine", "status", "not there"]
    figures.row(write_row(tmp_path / "run", scores, names))
    figure = drawn["scores"]
    by_title = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(by_title) == ["Distance to the lower convex envelope", "Midpoint-convexity violations", "mine"]
    envelope, violations, mine = by_title.values()
    lines = {line.get_label(): line for line in envelope.lines}
    np.testing.assert_array_equal(lines["largest"].get_xdata(), [1, 3, 100])
    np.testing.assert_array_equal(lines["largest"].get_ydata(), [2.0, 1.0, 0.01])
    np.testing.assert_array_equal(lines["mean"].get_ydata(), [0.5, np.nan, 0.1])
    crosses = [x for line in envelope.lines if line.get_marker() == "x" for x in line.get_xdata()]
    assert crosses == [3.0]
    assert "Crosses" in texts(figure)
    scales = [(axes.get_xscale(), axes.get_yscale()) for axes in (envelope, violations, mine)]
    assert scales == [("log", "log"), ("log", "symlog"), ("log", "symlog")]
    for axes, values in ((envelope, [0.01, 2.0]), (violations, [0.0, 0.3]), (mine, [-2.0, 4.0])):
        assert axes.get_ylim()[0] < min(values)
        assert axes.get_ylim()[1] > max(values)
    assert [label.get_text() for label in mine.get_xticklabels()] == ["1", "3", "100"]


def test_partial_scores_are_said_and_drawn_hollow(
    tmp_path: Path, drawn: dict[str, Figure], rng: np.random.Generator
) -> None:
    scores: dict[int, dict[str, Any]] = {
        1: {"envelope_max": 2.0, "finite_share": 1.0, "status": "ok"},
        10: {"envelope_max": 1.0, "finite_share": 0.9, "status": "partial"},
        100: {"envelope_max": 0.5, "finite_share": 1 / 3, "status": "partial"},
    }
    figures.row(write_row(tmp_path / "row", scores, ["envelope_max"]))
    words = " ".join(texts(drawn["scores"]).split())
    assert "Hollow: partial scores" in words
    assert "I = 10 (10 % of the grid left out), I = 100 (67 % of the grid left out)" in words
    (hollow,) = [x for x in drawn["scores"].axes[0].lines if x.get_markerfacecolor() == "white"]
    np.testing.assert_array_equal(hollow.get_xdata(), [10, 100])
    np.testing.assert_array_equal(hollow.get_ydata(), [1.0, 0.5])
    assert texts(drawn["row"]).count("partial:") == 2
    figures.landscape(write_landscape(tmp_path / "one", scores=scores[10] | {"barrier_max": 0.1}))
    assert "partial: 10 % of the grid left out" in texts(drawn["landscape"])
    workdir = write_regimes(tmp_path / "regimes", rng)
    record = load_json(workdir / "results/regimes.json")
    for cell in record["cells"][:2]:
        cell["scores"]["finite_share"] = 0.75
    save_json(workdir / "results/regimes.json", record)
    figures.regimes(workdir)
    assert f"2 of {len(record['cells'])} landscapes (at most 25 % of the grid" in texts(drawn["regimes"])


def test_whole_surfaces_have_no_word_about_parts(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    whole = {1: {"envelope_max": 2.0, "finite_share": 1.0}, 10: {"envelope_max": 1.0}}
    figures.row(write_row(tmp_path / "row", whole, ["envelope_max"]))
    assert "artial" not in texts(drawn["scores"]) + texts(drawn["row"])
    assert not [x for x in drawn["scores"].axes[0].lines if x.get_markerfacecolor() == "white" and len(x.get_xdata())]


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [None, None], [1e-14, 3.0], [-1.0, -2.0], [5.0, 5.0], [0.8, 0.9], [0, 1]]
)
def test_odd_scores_are_drawn(values: list[float | None], tmp_path: Path, drawn: dict[str, Figure]) -> None:
    scores = {i + 1: {"envelope_max": value} for i, value in enumerate(values)}
    figures.row(write_row(tmp_path / "run", scores, ["envelope_max"]))
    (axes,) = drawn["scores"].axes
    low, high = axes.get_ylim()
    assert all(low < value < high for value in values if value is not None)
    ticks = sum(low <= tick <= high for tick in axes.get_yticks())
    assert ticks >= (2 if any(values) else 1)
    assert ticks <= 9


# Regimes --------------------------------------------------------------------------------------------------------------


def test_barriers_stand_over_branches_and_over_parameters_per_label(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    figures.FIGURES["examples.json"](write_examples(tmp_path / "run"))
    against_branches, against_labels = drawn["examples"].axes[:2]
    means = {10: [1.5, 0.7, math.nan], 100: [10.5, 2.5, math.nan]}  # n / (10 I), and half of a seed
    for axes in (against_branches, against_labels):
        lines = {line.get_label(): line for line in axes.lines if "examples" in str(line.get_label())}
        assert list(lines) == ["10 examples", "100 examples"]
        for (n, values), line in zip(means.items(), lines.values(), strict=True):
            np.testing.assert_allclose(line.get_ydata(), values)
            xs = [1, 5, 100] if axes is against_branches else [20 * i / (2 * n) for i in (1, 5, 100)]
            np.testing.assert_allclose(line.get_xdata(), xs)
    hollow = [line for line in against_branches.lines if line.get_markerfacecolor() == "white"]
    assert [len(line.get_xdata()) for line in hollow] == [0, 3]  # 100 examples were not fitted
    assert "undefined" in texts(drawn["examples"])


def test_regimes_show_median_and_range_over_the_repeats(
    tmp_path: Path, drawn: dict[str, Figure], rng: np.random.Generator
) -> None:
    workdir = write_regimes(tmp_path / "run", rng)
    cells = load_json(workdir / "results/regimes.json")["cells"]
    figures.regimes(workdir)
    assert len(drawn["regimes"].axes) == 4
    assert len(drawn["regimes_normalised"].axes) == 8
    for axes in drawn["regimes"].axes:
        _, init, reduction, *_ = axes.get_title(loc="left").replace(",", "").split()
        curves = [line.get_ydata() for line in axes.lines if len(line.get_xdata()) == 3 and line.get_marker() == "None"]
        for curve, band, scaling in zip(curves, axes.collections, ("constant", "by_I"), strict=True):
            repeats = np.asarray(
                [
                    [
                        c["scores"]["envelope_max"]
                        for c in cells
                        if (c["init"], c["reduce"], c["lr_scaling"], c["num_branches"]) == (init, reduction, scaling, I)
                    ]
                    for I in (10, 30, 1000)  # noqa: E741
                ]
            )
            np.testing.assert_allclose(curve, np.sort(repeats, axis=1)[:, 1])
            heights = band.get_paths()[0].vertices[:, 1]
            np.testing.assert_allclose([heights.min(), heights.max()], [repeats.min(), repeats.max()])
        fills = {line.get_xdata()[0]: line.get_markerfacecolor() for line in axes.lines if len(line.get_xdata()) == 1}
        assert fills[1000] == "white"
        assert fills[10] != "white"
    assert "48 max_steps" not in texts(drawn["regimes"])
    assert "192 converged, 24 max_steps" in texts(drawn["regimes"])
    assert len({axes.get_ylim() for axes in drawn["regimes"].axes}) == 1


def test_undefined_and_zero_regimes(tmp_path: Path, drawn: dict[str, Figure], rng: np.random.Generator) -> None:
    workdir = write_regimes(tmp_path / "run", rng, counts=(10,))
    path = workdir / "results/regimes.json"
    record = load_json(path)
    record["cells"][0]["scores"]["envelope_max"] = None
    record["cells"][-1]["scores"]["envelope_max"] = 0.0
    save_json(path, record)
    figures.regimes(workdir)
    crosses = [
        x for axes in drawn["regimes"].axes for line in axes.lines if line.get_marker() == "x" for x in line.get_xdata()
    ]
    assert crosses == [10.0]
    assert "Crosses" in texts(drawn["regimes"])
    assert "Crosses" not in texts(drawn["regimes_normalised"])
    assert "Axes that show 0" in texts(drawn["regimes"])
    assert "Axes that show 0" not in texts(drawn["regimes_normalised"])
    assert {axes.get_yscale() for axes in drawn["regimes"].axes} == {"symlog"}
    assert {axes.get_yscale() for axes in drawn["regimes_normalised"].axes} == {"log"}


# Refusals -------------------------------------------------------------------------------------------------------------


def test_a_folder_without_records_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw") as caught:
        figures.draw(tmp_path)
    assert all(name in str(caught.value) for name in (*figures.FIGURES, str(tmp_path)))


@pytest.mark.parametrize("name", sorted(figures.FIGURES))
def test_bad_records_are_named(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    workdir = sample(name, tmp_path / "run", rng)
    path = workdir / "results" / name
    content = load_json(path)
    for broken, match in (("{", "is not a readable JSON"), ("[]", "digest"), ("null", "digest"), ("{}", "digest")):
        path.write_text(broken)
        with pytest.raises(ValueError, match=match):
            figures.draw(workdir)
    del content["title"]
    save_json(path, content)
    with pytest.raises(ValueError, match=rf"{name} lacks title"):
        figures.draw(workdir)
    path.unlink()
    with pytest.raises(ValueError, match=name):
        figures.FIGURES[name](workdir)


@pytest.mark.parametrize("name", ["row.json", "regimes.json"])
def test_bad_cells_are_named(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    workdir = sample(name, tmp_path / "run", rng)
    path = workdir / "results" / name
    content = load_json(path)
    save_json(path, content | {"cells": []})
    with pytest.raises(ValueError, match="no cells"):
        figures.draw(workdir)
    del content["cells"][1]["scores"]
    save_json(path, content)
    with pytest.raises(ValueError, match="cell 1 lacks scores"):
        figures.draw(workdir)


def test_a_row_refuses_a_missing_surface_and_scores_that_are_no_numbers(tmp_path: Path) -> None:
    workdir = write_row(tmp_path / "a", {1: {"envelope_max": 1.0}, 5: {"envelope_max": 1.0}}, ["envelope_max"])
    (workdir / "cells/I5/results/landscape.npz").unlink()
    with pytest.raises(ValueError, match=r"I5.*landscape\.npz"):
        figures.row(workdir)
    with pytest.raises(ValueError, match="no numeric score"):
        figures.row(write_row(tmp_path / "b", {1: {"status": "ok"}}, ["status"]))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda arrays: arrays.pop("edge_loss"), "lacks edge_loss"),
        (lambda arrays: arrays.update(loss=arrays["loss"].T), r"loss has shape \(17, 13\); expected \(13, 17\)"),
        (lambda arrays: arrays.update(anchors=arrays["anchors"][:2]), r"anchors has shape \(2, 2\)"),
        (lambda arrays: arrays.update(anchors=arrays["anchors"] * np.nan), "anchors must be finite"),
        (lambda arrays: arrays.update(xs=arrays["xs"][::-1]), "xs must be at least two increasing"),
        (lambda arrays: arrays.update(ys=arrays["ys"] * np.nan), "ys must be at least two increasing"),
    ],
)
def test_bad_arrays_are_named(change: Callable[[dict[str, np.ndarray]], None], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        figures.landscape(write_landscape(tmp_path / "run", change=change))


# The script, and what drawing loads -----------------------------------------------------------------------------------


def test_the_script_draws_each_folder_and_reports_those_it_cannot(tmp_path: Path) -> None:
    good, bad = write_landscape(tmp_path / "good"), tmp_path / "bad"
    done = subprocess.run(
        [sys.executable, "scripts/plot.py", str(bad), str(good)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout.split() == [str(good / "figures/landscape.png"), str(good / "figures/landscape.pdf")]
    assert "nothing to draw" in done.stderr
    assert "Traceback" not in done.stderr


def test_drawing_loads_neither_jax_nor_pyplot(tmp_path: Path) -> None:
    workdir = write_landscape(tmp_path / "run")
    # The package's own front door may load jax; a bare stand-in for it shows what this module loads.
    program = f"""
import sys, types
package = types.ModuleType("dualgap_jax")
package.__path__ = [{str(ROOT / "dualgap_jax")!r}]
sys.modules["dualgap_jax"] = package
from dualgap_jax import figures
print("matplotlib" in sys.modules)
figures.draw({str(workdir)!r})
print([name for name in ("jax", "matplotlib.pyplot", "scipy", "tensorflow") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["False", "[]"]


@pytest.mark.parametrize(("image_format", "said"), [("JPEG", True), ("PNG", False), (None, False)])
def test_figures_of_lossy_images_say_so(
    image_format: str | None, said: bool, tmp_path: Path, drawn: dict[str, Figure]
) -> None:
    figures.landscape(write_landscape(tmp_path / "run", data={"image_format": image_format}))
    assert ("JPEG-recompressed" in texts(drawn["landscape"])) is said
    row = write_row(tmp_path / "row", {1: {"envelope_max": 2.0}}, ["envelope_max"])
    path = row / "cells/I1/results/landscape.json"
    save_json(path, load_json(path) | {"data": {"image_format": image_format}})
    figures.row(row)
    assert ("JPEG-recompressed" in texts(drawn["row"])) is said


def test_panels_on_one_scale_share_levels_and_scores_of_seeds_have_bars(tmp_path: Path, drawn: dict[str, Any]) -> None:
    scores = {2: {"envelope_max": 1.0}, 30: {"envelope_max": 0.1}}
    workdir = write_row(tmp_path / "w", scores, ["envelope_max"])
    path = workdir / "results" / "row.json"
    content = load_json(path)
    limits = {}
    for scale in ("own", "common"):
        save_json(path, content | {"scale": scale})
        figures.row(workdir)
        solids = [axes for axes in drawn["row"].axes if hasattr(axes, "get_zlim")]
        limits[scale] = [axes.get_zlim() for axes in solids]
    assert limits["own"][0] != limits["own"][1]
    assert limits["common"][0] == limits["common"][1]

    cells = [{**cell, "intervals": {"envelope_max": [2.0, 1.5, 2.5]}} for cell in content["cells"]]
    save_json(path, content | {"cells": cells, "seeds": 3})
    figures.row(workdir)
    (axes,) = (axes for axes in drawn["scores"].axes if axes.lines)
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [2.0, 2.0])  # the means, not the first seed's scores
    segments = [s for collection in axes.collections for s in collection.get_segments()]
    np.testing.assert_array_equal(sorted({y for s in segments for y in s[:, 1]}), [1.5, 2.5])
    assert "Means over 3 seeds" in texts(drawn["scores"])
