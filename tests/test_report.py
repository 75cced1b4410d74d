"""Reports: one file that needs nothing else, says what the records say, and draws in a real browser."""

from __future__ import annotations

import csv
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualgap_jax import commands, experiments, report
from dualgap_jax.config import Component, experiment_config
from dualgap_jax.experiments.landscape import LandscapeSpec, PlaneSpec
from dualgap_jax.experiments.row import RowSpec
from dualgap_jax.files import load_json, load_npz, save_json
from dualgap_jax.training import TrainingSpec

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a row of two landscapes, raw and aligned."""
    cell = LandscapeSpec(
        branch=Component("mlp", {"hidden": (2,)}),
        data=Component("synthetic_relu", {"n": 40, "d": 4, "seed": 3}),
        training=TrainingSpec(batch_size=10, max_steps=20, check_every=10),
        plane=PlaneSpec(points=5, edge_points=4, align="units"),
    )
    spec = RowSpec(title="Rows & <columns>", num_branches=(3, 10), cell=cell)
    path = tmp_path_factory.mktemp("report") / "w"
    experiments.run(experiment_config("landscape_row", spec), workdir=path, command=["run.py", "--config=<mine>"])
    return path


class Page(HTMLParser):
    """The tags of a page with their attributes, its cells, and the blocks of JSON."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        for tag in set(self._open[-1:]):
            self.text.setdefault(tag, []).append(data)


def plots_of(source: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="plots">(.*?)</script>', source, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_a_report_says_what_the_records_say_and_needs_no_other_file(finished: Path, tmp_path: Path) -> None:
    source = report.write([finished], tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    for tag, attributes in page.tags:
        for name in ("src", "href", "data", "action"):
            where = attributes.get(name) or ""
            assert where.startswith(("data:", "#")) or not where, (tag, where)
    assert len([tag for tag, _ in page.tags if tag == "img"]) == len(list((finished / "figures").glob("*.png")))
    table = load_json(finished / "results" / "report.json")
    cells = page.text["td"]
    for row in table["rows"]:
        for value in row:
            said = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
            if isinstance(value, list):  # the three losses
                said = " ".join(f"{loss:.3g}" for loss in value)
            assert said in cells
    text = html.unescape(source)
    card = load_json(finished / "run.json")
    for said in (card["command"], card["packages"]["jax"], card["config"], *table["notes"], table["title"]):
        assert str(said) in text
    assert "<columns>" not in source.replace("&lt;columns&gt;", "")  # text is text
    assert "<mine>" not in source


def test_surfaces_are_those_of_the_records(finished: Path, tmp_path: Path) -> None:
    source = report.write([finished], tmp_path / "report.html").read_text(encoding="utf-8")
    plots = plots_of(source)
    files = [finished / folder / "results" / f"{n}.npz" for folder in ("I_3", "I_10") for n in ("landscape", "aligned")]
    assert len(plots) == len(files)
    assert re.findall(r'data-plot="(\d+)"', source) == list(map(str, range(len(files))))
    for plot, path in zip(plots, files, strict=True):
        stored = load_npz(path)
        sheet, *edges, marks = plot["data"]
        np.testing.assert_array_equal(sheet["z"], stored["loss"])
        np.testing.assert_array_equal(np.transpose([marks["x"], marks["y"]]), stored["anchors"])
        for edge, losses in zip(edges, stored["edge_loss"], strict=True):
            np.testing.assert_array_equal(edge["z"], losses)
        for edge, (start, end) in zip(edges, ((0, 1), (1, 2), (2, 0)), strict=True):
            ends = np.transpose([edge["x"], edge["y"]])[[0, -1]]
            np.testing.assert_allclose(ends, stored["anchors"][[start, end]], atol=1e-12)
    assert [plot["layout"]["title"]["text"] for plot in plots][:2] == ["I = 3, as trained", "I = 3, aligned"]


def test_surfaces_of_several_seeds_say_their_seed_and_stand_in_order(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "w"
    names = ("I_2", "I_2_seed_1", "I_2_seed_10", "I_10", "I_10_seed_1")
    for name in names:
        shutil.copytree(finished / "I_3", folder / name)
        record = load_json(folder / name / "results" / "landscape.json")
        save_json(folder / name / "results" / "landscape.json", record | {"num_branches": int(name.split("_")[1])})
        config = load_json(folder / name / "config.json")
        save_json(folder / name / "config.json", config | {"seed": int(name.partition("_seed_")[2] or 0)})
    save_json(folder / "results" / "report.json", {"title": "T", "columns": ["a"], "rows": [[1]], "notes": []})
    plots = plots_of(report.write([folder], tmp_path / "report.html").read_text(encoding="utf-8"))
    wanted = [f"I = {count}, seed {seed}" for count, seed in ((2, 0), (2, 1), (2, 10), (10, 0), (10, 1))]
    assert [plot["layout"]["title"]["text"] for plot in plots][::2] == [f"{which}, as trained" for which in wanted]


def test_what_needs_a_screen_is_not_printed(finished: Path, tmp_path: Path) -> None:
    source = report.write([finished], tmp_path / "report.html").read_text(encoding="utf-8")
    style = re.search(r"@media print \{(.*?)\n\}", source, re.DOTALL)
    assert style is not None
    assert ".screen { display:none; }" in style[1]
    on_paper = re.sub(r'<section class="screen">.*?</section>', "", source, flags=re.DOTALL)
    assert 'class="plot"' in source
    assert 'class="plot"' not in on_paper
    assert "<details>" not in on_paper
    assert on_paper.count("<img ") == source.count("<img ")


def test_what_is_not_finite_is_a_hole(finished: Path) -> None:
    stored = load_npz(finished / "I_3" / "results" / "landscape.npz")
    stored["loss"][1, 2], stored["loss"][0, 0] = np.nan, np.inf
    plot = report.surfaces.surface(stored, "x")
    assert plot["data"][0]["z"][1][2] is None
    assert plot["data"][0]["z"][0][0] is None
    assert "NaN" not in report.surfaces.embedded([plot])


def test_several_runs_stand_on_one_page_and_in_one_table(finished: Path, tmp_path: Path) -> None:
    output, table = tmp_path / "all.html", tmp_path / "all.csv"
    arguments = [str(finished), str(finished / "I_3"), f"--output={output}", f"--csv={table}"]
    assert commands.main(["report", *arguments]) == 0
    source = output.read_text(encoding="utf-8")
    assert source.count('<section id="run-') == 2
    rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))
    wanted = [load_json(folder / "results" / "report.json") for folder in (finished, finished / "I_3")]
    assert len(rows) == sum(len(w["rows"]) for w in wanted)
    assert float(rows[-2]["envelope max"]) == wanted[1]["rows"][0][3]  # in full


def test_columns_of_one_name_keep_their_numbers_in_the_table(tmp_path: Path) -> None:
    columns = ["n", "barrier", "aligned", "env. max", "aligned", "run"]
    save_json(tmp_path / "results" / "report.json", {"columns": columns, "rows": [[1, 2.0, 3.0, None, 5.0, "a"]]})
    head, row = csv.reader(io.StringIO(report.table_csv([tmp_path])))
    assert head == ["run", "n", "barrier", "barrier aligned", "env. max", "env. max aligned", "run of the run"]
    assert row == [str(tmp_path), "1", "2.0", "3.0", "", "5.0", "a"]


def test_damaged_and_missing_records_are_said(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "w"
    shutil.copytree(finished, copy)
    path = copy / "I_3" / "results" / "aligned.npz"
    path.write_bytes(path.read_bytes()[:-20])
    (copy / "results" / "report.json").unlink()
    source = report.write([copy], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Not shown:" in source
    assert len(plots_of(source)) == 3
    assert commands.main(["report", str(tmp_path / "none")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert commands.main(["report", str(copy), f"--csv={tmp_path / 'x.csv'}"]) == 1
    assert "gone or changed: I_3/results/aligned.npz, results/report.json." in capsys.readouterr().err


def test_records_of_another_run_are_neither_shown_nor_drawn(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is sound by itself; the card of the run knows that they are not its own."""
    copy = tmp_path / "w"
    shutil.copytree(finished, copy)
    other = load_json(copy / "results" / "report.json") | {"title": "Another run"}
    save_json(copy / "results" / "report.json", other)
    shutil.copy(copy / "I_3" / "results" / "landscape.npz", copy / "I_3" / "results" / "aligned.npz")
    source = report.write([copy], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Another run" not in source
    assert "gone or changed: I_3/results/aligned.npz, results/report.json." in source
    assert len(plots_of(source)) == len(plots_of(report.write([finished], tmp_path / "f.html").read_text())) - 1
    for command in (["report", str(copy), f"--csv={tmp_path / 'x.csv'}"], ["plot", str(copy)]):
        assert commands.main(command) == 1
        assert "gone or changed" in capsys.readouterr().err


def test_a_folder_that_holds_no_run_is_a_mistake(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none = str(tmp_path / "none")
    for command in (["report", none], ["report", str(finished), none], ["plot", none], ["plot", "gs://bucket/w"]):
        assert commands.main([*command, *(["--output=/dev/null"] if command[0] == "report" else [])]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert commands.main(["report", str(finished), f"--output={tmp_path / 'no' / 'r.html'}", "--csv=gs://b/t"]) == 2


def test_a_page_of_several_runs_is_not_the_page_of_the_first(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "w"
    shutil.copytree(finished, copy)
    own = copy / "report.html"
    assert commands.main(["report", str(copy)]) == 0
    before = own.read_bytes()
    monkeypatch.chdir(tmp_path)
    assert commands.main(["report", "w", "w/I_3"]) == 0
    assert own.read_bytes() == before
    assert '<section id="run-1">' in (tmp_path / "report.html").read_text(encoding="utf-8")
    monkeypatch.chdir(copy)
    assert commands.main(["report", ".", "I_3"]) == 2
    assert "name the page of several by --output" in capsys.readouterr().err
    assert own.read_bytes() == before


def test_figures_that_are_drawn_again_are_the_run_s_own(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "w"
    shutil.copytree(finished, copy)
    figure = copy / "figures" / "row.png"
    figure.write_bytes(b"")
    assert "gone or changed: figures/row.png." in report.write([copy], tmp_path / "r.html").read_text(encoding="utf-8")
    assert commands.main(["plot", str(copy)]) == 0
    assert "gone or changed" not in report.write([copy], tmp_path / "r.html").read_text(encoding="utf-8")


def test_without_plotly_the_pictures_stay(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.surfaces.importlib.util, "find_spec", lambda name: None)
    source = report.write([finished], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "need plotly" in source
    assert "<script" not in source
    assert "data:image/png" in source
    with pytest.raises(FileNotFoundError, match="plotly"):
        report.surfaces.program()


def test_an_experiment_without_surfaces_has_a_report_too(tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    save_json(results / "report.json", {"title": "T", "columns": ["a"], "rows": [[None]], "notes": []})
    source = report.write([tmp_path], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<h1>T</h1>" in source
    assert "Surfaces" not in source


PROBE = """
<script>
window.said = [];
window.onerror = function (message) { window.said.push(String(message)); };
console.error = function () { window.said.push(Array.from(arguments).join(' ')); };
window.addEventListener('load', function () {
  var tries = 0;
  (function look() {
    var nodes = Array.from(document.querySelectorAll('.plot'));
    nodes[tries % nodes.length].scrollIntoView();
    var drawn = nodes.filter(function (n) { return n._fullLayout && n._fullLayout.scene._scene; });
    if (drawn.length < nodes.length && tries++ < 550) return setTimeout(look, 100);
    var turn = drawn.length ? Plotly.relayout(drawn[0], {'scene.camera.eye': {x: -1, y: 1, z: 2}}) : Promise.resolve();
    turn.then(function () {
      var eye = drawn.length ? drawn[0]._fullLayout.scene.camera.eye.z : null;
      var requests = performance.getEntriesByType('resource').map(function (r) { return r.name; })
        .filter(function (n) { return !n.startsWith('data:') && !n.startsWith('blob:'); });
      document.title = JSON.stringify({
        nodes: nodes.length, drawn: drawn.length, eye: eye, said: window.said, requests: requests,
        wide: document.documentElement.scrollWidth, window: window.innerWidth
      });
    });
  })();
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 412])
def test_a_browser_draws_and_turns_all_surfaces(width: int, finished: Path, tmp_path: Path) -> None:
    source = report.write([finished], tmp_path / "report.html").read_text(encoding="utf-8")
    probed = tmp_path / "probed.html"
    probed.write_text(source.replace("<body>", f"<body>{PROBE}", 1), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'u'}"]
    command += [
        "--use-gl=angle",
        "--use-angle=swiftshader",
        "--enable-unsafe-swiftshader",
        f"--window-size={width},900",
    ]
    command += ["--virtual-time-budget=60000", "--dump-dom", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=False)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stderr[-2000:]
    found = json.loads(html.unescape(title[1]))
    assert found["drawn"] == found["nodes"] == 4
    assert found["eye"] == 2
    assert found["said"] == []
    assert found["requests"] == []
    assert found["wide"] <= found["window"]
