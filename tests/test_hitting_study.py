"""The experiments on Table 1: what their records say, the search, and the figures drawn from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hitting_records import write_hitting_rate
from scipy import integrate, stats

from dualgap_jax import experiments, figures, hitting
from dualgap_jax.config import Component, ConfigError, experiment_config
from dualgap_jax.experiments import TABLES, Report
from dualgap_jax.experiments.hitting_rate import (
    PAPER_HITS,
    HittingRateSpec,
    all_runs,
    build,
    is_hit,
    rank_correlation,
    row,
    trend,
)
from dualgap_jax.experiments.hitting_search import HittingSearchSpec, log_likelihood
from dualgap_jax.files import load_json, load_npz, save_json, save_npz
from dualgap_jax.hitting import SgdSpec
from dualgap_jax.workdir import Workdir

REAL = Component("synthetic_relu", {"n": 80, "d": 4, "teacher_width": 4, "labels": "real"})
SGD = SgdSpec(steps=600, batch_size=10, check_every=100, lanes=16)


def tiny(**changes: Any) -> HittingRateSpec:
    spec = HittingRateSpec(
        widths=(4, 6, 12),
        seeds=4,
        teachers=(3, 5),
        learning_rate=0.1,
        data=Component("synthetic_relu", {"n": 80, "d": 4, "teacher_width": 4}),
        sgd=SGD,
    )
    return dataclasses.replace(spec, **changes)


def run(spec: Any, folder: Path, experiment: str = "hitting_rate") -> tuple[Report, Workdir]:
    report, workdir, _ = experiments.run(experiment_config(experiment, spec), workdir=folder)
    return report, workdir


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[HittingRateSpec, Report, Workdir]:
    """One small study of two teachers, which several tests read."""
    return tiny(), *run(tiny(), tmp_path_factory.mktemp("study") / "w")


# --- the table --------------------------------------------------------------------------------------------------------


def test_the_paper_table_is_that_of_the_paper() -> None:
    assert list(PAPER_HITS) == list(range(12, 22))
    assert sum(PAPER_HITS.values()) == 386
    assert (PAPER_HITS[12], PAPER_HITS[18], PAPER_HITS[21]) == (21, 35, 75)


def test_the_record_counts_what_the_arrays_hold(study: tuple[HittingRateSpec, Report, Workdir]) -> None:
    spec, report, workdir = study
    record, arrays = (
        load(workdir.results / f"hitting_rate.{end}") for load, end in ((load_json, "json"), (load_npz, "npz"))
    )
    assert [(r["teacher"], r["hidden"]) for r in record["rows"]] == [(t, h) for t in (3, 5) for h in (4, 6, 12)]
    for r, s in zip(record["rows"], record["sensitivity"], strict=True):
        mine = arrays["final_loss"][(arrays["teacher"] == r["teacher"]) & (arrays["hidden"] == r["hidden"])]
        assert len(mine) == r["seeds"] == 4
        assert r["hits"] == (mine <= 1e-5).sum()
        assert s["hits"] == [(mine <= t).sum() for t in spec.tolerances]
        assert s["hits"] == sorted(s["hits"], reverse=True)
        interval = stats.binomtest(r["hits"], 4).proportion_ci(method="wilson")
        assert (r["wilson_low"], r["wilson_high"]) == pytest.approx(tuple(interval))
        assert r["rate"] == r["hits"] / 4
        assert r["paper_hits"] == PAPER_HITS.get(r["hidden"])
    hits = sum(r["hits"] for r in record["rows"])
    assert 0 < hits < 24
    assert [t["global_minimum"] for t in record["teachers"]] == [0.0, 0.0]
    assert sum(record["ends"].values()) == 24
    assert record["steps_done"] == arrays["steps"].sum()
    assert arrays["losses"].shape == (24, 7)
    assert arrays["look_steps"].tolist() == [0, 100, 200, 300, 400, 500, 600]
    np.testing.assert_allclose(arrays["losses"][:, -1], arrays["final_loss"], rtol=1e-4, atol=1e-7)
    assert len(report.rows) == 3  # two teachers and the mean
    assert len(set(arrays["seed"])) == 8  # the runs of no two teachers share seeds


def test_a_teacher_alone_gives_the_same_runs(study: tuple[HittingRateSpec, Report, Workdir], tmp_path: Path) -> None:
    _, _, workdir = study
    report, alone = run(tiny(teachers=(5,), widths=(6,)), tmp_path / "w")
    whole, part = (load_npz(w.results / "hitting_rate.npz") for w in (workdir, alone))
    chosen = (whole["teacher"] == 5) & (whole["hidden"] == 6)
    for name in ("final_loss", "losses", "seed", "steps"):
        np.testing.assert_array_equal(part[name], whole[name][chosen])
    assert len(report.rows) == 1
    assert "hit" in report.columns[2]


def test_runs_that_diverged_are_said_and_not_compared_with_the_paper(tmp_path: Path) -> None:
    report, workdir = run(
        tiny(widths=(12, 15), teachers=(3,), learning_rate=1e30, loss=Component("squared", {}), data=REAL),
        tmp_path / "w",
    )
    record = load_json(workdir.results / "hitting_rate.json")
    assert [(r["hits"], r["diverged"], r["paper_inside"]) for r in record["rows"]] == [(0, 4, None)] * 2
    assert [s["median_final_loss"] for s in record["sensitivity"]] == [None, None]
    assert any("8 of 8 runs diverged" in note for note in report.notes)
    assert not any("lie inside" in note for note in report.notes)
    assert row(12, 21, 100)["paper_inside"]
    assert row(12, 21, 100, diverged=1)["paper_inside"] is None


def test_streams_are_disjoint() -> None:
    seeds = [all_runs(tiny(stream=stream, seeds=50)).seed for stream in range(3)]
    assert len(set(np.concatenate(seeds))) == 3 * 2 * 50  # shared by the widths of a teacher, where keys differ


def test_squared_loss_counts_from_its_own_minimum() -> None:
    spec = tiny(
        data=Component("synthetic_relu", {"n": 40, "d": 3, "teacher_width": 2, "labels": "real"}),
        loss=Component("squared", {}),
    )
    found = build(spec, TABLES)
    assert all(0 <= truth.loss < 1e-12 for truth in found.truths)
    runs = hitting.make_runs([4, 4, 4], 0, data=[0, 1, 1])
    assert is_hit(np.asarray([1e-5, 0.99e-5, np.nan]), runs, found.truths, 1e-5).tolist() == [True, True, False]


def test_rank_correlations(rng: np.random.Generator) -> None:
    widths = list(range(12, 22))
    rates = rng.integers(0, 5, 10) / 4
    found = rank_correlation(widths, rates.tolist())
    # Spearman by its definition, the correlation of mean ranks.
    ranks = stats.rankdata(rates)
    assert found["spearman"] == pytest.approx(np.corrcoef(widths, ranks)[0, 1])
    pairs = [(i, j) for i in range(10) for j in range(i)]
    score = sum(np.sign(rates[i] - rates[j]) for i, j in pairs)
    untied = sum(rates[i] != rates[j] for i, j in pairs)
    assert found["kendall"] == pytest.approx(score / np.sqrt(len(pairs) * untied))
    assert rank_correlation(widths, [1.0] * 10)["spearman"] is None
    assert rank_correlation(widths, sorted(rng.uniform(size=10)))["kendall"] == pytest.approx(1)


def test_the_trend_counts_teachers() -> None:
    rows = [
        {"teacher": t, "hidden": h, "rate": rate}
        for t, rates in enumerate([(0.0, 0.5, 1.0), (0.2, 0.4, 0.4), (1.0, 1.0, 1.0), (0.5, 0.4, 0.1)])
        for h, rate in zip((12, 13, 14), rates, strict=True)
    ]
    teachers = [rank_correlation((12, 13, 14), [r["rate"] for r in rows if r["teacher"] == t]) for t in range(4)]
    found = trend(teachers, rows, (12, 13, 14))
    assert (found["rising"], found["falling"], found["undefined"]) == (2, 1, 1)
    assert found["sign_test_p"] == pytest.approx(0.5)
    np.testing.assert_allclose(found["mean_rate"], [1.7 / 4, 2.3 / 4, 2.5 / 4])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"widths": ()}, "widths is empty"),
        ({"widths": (12, 12)}, "twice"),
        ({"widths": (0,)}, "width=0"),
        ({"widths": (12, 2_000_000_000)}, "widths=.* must be at most 10,000"),
        ({"seeds": 0}, "seeds=0"),
        ({"teachers": (2000,)}, "teachers"),
        ({"stream": 64}, "stream=64"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"data": Component("synthetic_relu", {"seed": 3})}, "data.seed"),
    ],
)
def test_a_bad_table_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tiny(**changes)


@pytest.mark.parametrize(("loss", "labels"), [("multi_margin", "sign"), ("squared", "class"), ("squared", "sign")])
def test_a_loss_that_does_not_fit_the_labels_is_refused_before_anything_is_drawn(loss: str, labels: str) -> None:
    table = tiny(loss=Component(loss, {}), data=Component("synthetic_relu", {"n": 40, "labels": labels}))
    for spec in (table, search(table=table)):
        with pytest.raises(ConfigError, match=f"loss '{loss}' with data.labels='{labels}'.* is known for"):
            spec.validate(TABLES)


def test_runs_whose_weights_exceed_the_memory_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tiny()
    spec.validate(TABLES)
    monkeypatch.setattr("dualgap_jax.experiments.hitting_rate.memory_available", lambda: 1000)
    with pytest.raises(ConfigError, match=r"hidden units take .*B, available are 1\.0 kB"):
        spec.validate(TABLES)


def test_a_loss_without_known_minimum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="global minimum is known for"):
        run(tiny(loss=Component("logistic", {})), tmp_path / "w")


# --- the search -------------------------------------------------------------------------------------------------------


def test_the_likelihood_is_the_binomial_averaged_over_the_rate(rng: np.random.Generator) -> None:
    """Jeffreys' posterior of the rate after our counts, integrated against the binomial of the paper's count."""
    hits = [int(rng.integers(0, 21)) for _ in range(2)]
    rows = [row(width, h, 20) for width, h in zip((13, 20), hits, strict=True)]
    expected = 0.0
    for r in rows:
        posterior = stats.beta(r["hits"] + 0.5, 20 - r["hits"] + 0.5)
        value, _ = integrate.quad(
            lambda p, r=r, posterior=posterior: stats.binom.pmf(r["paper_hits"], 100, p) * posterior.pdf(p),
            0, 1, points=[r["paper_hits"] / 100],
        )  # fmt: skip
        expected += np.log(value)
    assert log_likelihood(rows) == pytest.approx(expected, rel=1e-5)
    assert log_likelihood([*rows, row(3, 1, 20)]) == log_likelihood(rows)  # no such width in the paper
    best = [log_likelihood([row(13, h, 100)]) for h in range(101)]
    assert abs(int(np.argmax(best)) - 24) <= 1


def search(**changes: Any) -> HittingSearchSpec:
    return dataclasses.replace(
        HittingSearchSpec(
            programs=("10/torch/constant", "5/he/cosine"),
            learning_rates=(0.05, 0.2),
            teachers=(3, 5),
            screen_widths=(15,),
            screen_seeds=3,
            refined=2,
            held_out=(101,),
            held_out_seeds=2,
            textbook=("10/torch/constant/0.1",),
            table=tiny(widths=(13, 15), teachers=(1,), sgd=dataclasses.replace(SGD, steps=100)),
        ),
        **changes,
    )


def test_a_search_and_its_resumption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, calls = hitting.train_runs, []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(len(arguments[2].width))
        if len(calls) == 5:
            raise RuntimeError("power cut")
        return train(*arguments, **options)

    monkeypatch.setattr(hitting, "train_runs", failing)
    with pytest.raises(RuntimeError, match="power cut"):
        run(search(), tmp_path / "w", "hitting_search")
    report, workdir = run(search(), tmp_path / "w", "hitting_search")
    # Two screens of 2 rates x 2 teachers x 3 seeds, two refined tables, then held out (twice begun) and textbook.
    assert calls == [12, 12, 8, 8, 4, 4, 8]
    record = load_json(workdir.results / "hitting_search.json")
    assert len(record["screen"]) == 8
    assert len(record["settings"]) == 4
    ranked = sorted(record["screen"], key=lambda e: -e["log_likelihood"])
    pairs = {(e["setting"], e["teacher"]) for e in ranked[:2]}
    assert {(e["setting"], e["teacher"]) for e in record["refined"]} == pairs
    assert record["chosen"]["log_likelihood"] == max(e["log_likelihood"] for e in record["refined"])
    for entry in record["screen"]:
        assert entry["log_likelihood"] == pytest.approx(log_likelihood(entry["rows"]))
    for setting in record["settings"]:
        values = [e["log_likelihood"] for e in record["screen"] if e["setting"] == setting["setting"]]
        assert setting["log_evidence"] == pytest.approx(np.log(np.mean(np.exp(values))))
    assert [e["teacher"] for e in record["held_out"]] == [101]
    assert {k: v["runs"] for k, v in record["budget"].items()} == {
        "screen": 24,
        "refine": 16,
        "held_out": 4,
        "textbook": 8,
    }
    assert [row[0].partition(":")[0] for row in report.rows] == ["paper", "chosen", "refined", "held out", "textbook"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"programs": ("10/torch",)}, "BATCH/INIT/SCHEDULE/RATE"),
        ({"programs": ("10/torhc/constant",)}, "Did you mean 'torch'"),
        ({"programs": ("10/torch/linear",)}, "unknown schedule"),
        ({"textbook": ("10/torch/constant/fast",)}, "BATCH/INIT/SCHEDULE/RATE"),
        ({"programs": ("10/torch/constant",) * 2}, "name one twice"),
        ({"programs": ("10/torch/constant", "010/torch/constant")}, "mean the same"),
        ({"learning_rates": (0.1, 0.1)}, "learning_rates=.* names one twice"),
        ({"textbook": ("10/torch/constant/0.1", "10/torch/constant/1e-1")}, "mean the same"),
        ({"screen_widths": (12, 12)}, "screen_widths=.* names one twice"),
        ({"screen_widths": (12, -3)}, "width=-3 must be at least 1"),
        ({"held_out": (3,)}, "both searched and held out"),
        ({"screen_widths": (5,)}, "none is in the paper's table"),
        ({"teachers": ()}, "teachers is empty"),
        ({"refined": 0}, "refined=0"),
        ({"screen_seeds": 0}, "screen_seeds=0"),
    ],
)
def test_a_bad_search_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        search(**changes)


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_study(study: tuple[HittingRateSpec, Report, Workdir]) -> None:
    _, _, workdir = study
    names = {path.name for path in workdir.figures.iterdir()}
    assert names == {
        f"{stem}.{end}" for stem in ("hitting_rate", "final_losses", "loss_curves") for end in ("png", "pdf")
    }


def altered(workdir: Workdir, folder: Path, **changes: Any) -> Path:
    """A copy of the records with other arrays."""
    (folder / "results").mkdir(parents=True)
    record = workdir.results / "hitting_rate.json"
    (folder / "results" / record.name).write_text(record.read_text())
    arrays = {**load_npz(record.with_suffix(".npz")), **changes}
    save_npz(folder / "results" / "hitting_rate.npz", **{k: v for k, v in arrays.items() if v is not None})
    return folder


def test_what_the_figures_say(tmp_path: Path, rng: np.random.Generator, drawn: dict[str, Any]) -> None:
    """Rates, intervals and the paper's points are where the record has them; one curve a run of the sample."""
    from dualgap_jax.figures import hitting as drawing

    workdir = write_hitting_rate(tmp_path / "one", rng, teachers=(4,))
    drawing.hitting_rate(workdir)
    rows = load_json(workdir / "results" / "hitting_rate.json")["rows"]
    (axes,) = drawn["hitting_rate"].axes
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["paper, Table 1"].get_ydata(), [0.21, 0.29, 0.75])
    (bars,) = axes.containers
    np.testing.assert_allclose(bars.lines[0].get_ydata(), [r["rate"] for r in rows])
    ends = np.asarray([segment[:, 1] for segment in bars.lines[2][0].get_segments()])
    np.testing.assert_allclose(ends, [(r["wilson_low"], r["wilson_high"]) for r in rows])
    arrays = load_npz(workdir / "results" / "hitting_rate.npz")
    curves = drawn["loss_curves"].axes
    assert [ax.get_title(loc="left").partition(" ")[0] for ax in curves] == ["12", "15", "21"]
    for ax, width in zip(curves, (12, 15, 21), strict=True):
        hits = int((arrays["final_loss"][arrays["hidden"] == width][:12] <= 1e-5).sum())
        assert f"{hits} of 12 hit" in ax.get_title(loc="left")
        assert sum(len(line.get_xdata()) > 1 for line in ax.lines) == 12 + 1  # and the tolerance
    drawing.hitting_rate(write_hitting_rate(tmp_path / "many", rng))
    many, correlations = drawn["hitting_rate"].axes
    assert len(many.lines) == 2 + 1 + 1  # the teachers, their mean, the paper
    assert sum(line.get_linestyle() == "None" for line in correlations.lines) == 2


def test_diverged_runs_and_zeros_are_drawn(study: tuple[HittingRateSpec, Report, Workdir], tmp_path: Path) -> None:
    _, _, workdir = study
    arrays = load_npz(workdir.results / "hitting_rate.npz")
    broken, curves = arrays["final_loss"].copy(), arrays["losses"].copy()
    broken[:4], curves[:4, 2:] = np.nan, np.inf
    assert len(figures.draw(altered(workdir, tmp_path / "a", final_loss=broken, losses=curves))) == 6
    nothing = np.zeros_like(broken)
    assert len(figures.draw(altered(workdir, tmp_path / "b", final_loss=nothing, losses=np.zeros_like(curves)))) == 6


def test_damaged_records_are_refused(study: tuple[HittingRateSpec, Report, Workdir], tmp_path: Path) -> None:
    _, _, workdir = study
    with pytest.raises(ValueError, match="lacks losses"):
        figures.draw(altered(workdir, tmp_path / "a", losses=None))
    folder = altered(workdir, tmp_path / "b")
    (folder / "results" / "hitting_rate.npz").unlink()
    with pytest.raises(ValueError, match="no record"):
        figures.draw(folder)
    record = load_json(workdir.results / "hitting_rate.json")
    folder = altered(workdir, tmp_path / "c")
    save_json(folder / "results" / "hitting_rate.json", {**record, "rows": []})
    with pytest.raises(ValueError, match="no rows"):
        figures.draw(folder)
