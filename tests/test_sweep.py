"""`dualgap sweep`: values, combinations, one table, and going on where it stopped."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import pytest

from dualgap_jax import cli, commands
from dualgap_jax.commands import sweep
from dualgap_jax.config import ConfigError
from dualgap_jax.experiments import Report

ROOT = Path(__file__).resolve().parents[1]
# An experiment of milliseconds, so that sweeping is all that is tested.
OWN = """
import dataclasses
from dualgap_jax.config import experiment_config, parse_arg
from dualgap_jax.experiments import Experiment, Report
from dualgap_jax.experiments.landscape import DivergedError

@dataclasses.dataclass(frozen=True)
class Shares:
    count: int = 1
    seed: int = 0
    names: tuple[str, ...] = ("a",)

def shares(spec, workdir, tables):
    \'\'\'One over a number.\'\'\'
    with open("calls", "a") as file:
        file.write(f"{spec.count},{spec.seed} ")
    if spec.count == 3 and spec.seed == 1:
        raise DivergedError("too large, \\"3\\"")
    columns = ["count", "share"] if spec.count > 1 else ["count", "share", "extra"]
    return Report("Shares", columns, [[spec.count, 1 / spec.count, *([None] if spec.count == 1 else [])]])

def extend(tables):
    return tables.with_experiments(Experiment("shares", Shares, shares))

def get_config(arg=None):
    args = parse_arg(arg, count=1, seed=0)
    return experiment_config("shares", Shares(args.count, args.seed))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shares.py").write_text(OWN)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("I=1,3,5", ["1", "3", "5"]),
        ("I=0..2,7", ["0", "1", "2", "7"]),
        ("config.a.b=1e-3", ["1e-3"]),
        ("config.branch=mlp(hidden=(8,8));conv", ["mlp(hidden=(8,8))", "conv"]),
    ],
)
def test_values(text: str, values: list[str]) -> None:
    assert sweep.values_of(text) == (text.partition("=")[0], values)


@pytest.mark.parametrize("text", ["I", "I=", "=1", "I=1,,2", "I=3..1", "I=1,1", "I=0..2,1", "I=0..99999999"])
def test_values_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--over"):
        sweep.values_of(text)


def rows(path: str) -> list[dict[str, Any]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_one_table_of_all_runs_and_no_run_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "shares.py", "--extend=shares", "--over", "count=1,3", "--over=seed=0..1", "--workdir=w"]
    assert commands.main(command) == 1  # one of them diverges
    assert (folder / "calls").read_text() == "1,0 1,1 3,0 3,1 "
    found = rows("w/sweep.csv")
    assert [(r["run"], r["count"], r["seed"], r["share"]) for r in found] == [
        ("count=1,seed=0", "1", "0", "1.0"),
        ("count=1,seed=1", "1", "1", "1.0"),
        ("count=3,seed=0", "3", "0", repr(1 / 3)),
        ("count=3,seed=1", "3", "1", ""),
    ]
    assert [r["error"] for r in found] == ["", "", "", 'DivergedError: too large, "3"']
    said = capsys.readouterr()
    assert "0.3333" in said.out
    assert "count=3,seed=1: DivergedError" in said.out
    assert "count=3,seed=0 (3 of 4)" not in said.out
    assert (folder / "w" / "report.html").exists()
    assert commands.main(command) == 1
    assert (folder / "calls").read_text() == "1,0 1,1 3,0 3,1 3,1 "  # what is complete is read
    assert rows("w/sweep.csv") == found
    other = [*command[:3], "--over=count=1", "--over=seed=0..1", "--workdir=w"]
    with pytest.raises(SystemExit):
        commands.main(other)
    assert "count=3,seed=0 for one" in capsys.readouterr().err
    assert rows("w/sweep.csv") == found
    table = folder / "w" / "sweep.csv"
    whole = table.read_bytes()
    for damaged in (b"", whole[: whole.index(b"count=3,seed=1") + 10], b"\xff\x00" * 100_000):
        table.write_bytes(damaged)
        assert commands.main(command) == 1
        assert table.read_bytes() == whole


def test_a_value_that_is_no_utf8_ends_no_sweep(folder: Path) -> None:
    value = os.fsdecode(b"caf\xe9")
    sweep._write_csv(folder / "sweep.csv", ["names"], [(sweep.Run({"names": value}, None, "x"), "too large")])
    assert rows("sweep.csv") == [{"run": "x", "names": "caf\\udce9", "error": "too large"}]


def test_leaves_and_arguments_beside_those_given(folder: Path) -> None:
    given = ["--config=shares.py:seed=5", "--extend=shares"]
    over = {"config.names": ["('x',)", "('y','z')"], "count": ["2"]}
    first, second = sweep.combinations(over, given)
    assert (first.config.count, first.config.seed, first.config.names) == (2, 5, ("x",))
    assert second.config.names == ("y", "z")
    assert first.folder != second.folder
    assert not set("/()'") & set(first.folder + second.folder)


def written(folder: Path, keys: list[str], done: list[tuple[sweep.Run, Any]]) -> list[list[str]]:
    sweep._write_csv(folder / "sweep.csv", keys, done)
    with open(folder / "sweep.csv", newline="") as file:
        return list(csv.reader(file))


def test_every_column_of_a_run_is_in_the_table_under_a_name_of_its_own(folder: Path) -> None:
    columns = ["I", "barrier", "… aligned", "envelope max", "… aligned", "I=2", "I=2", "error", "run"]
    result = Report("", columns, [[1, 0.1, 0.2, 0.3, 0.4, 5, 6, 7, 8]])
    done = [(sweep.Run({"seed": "0"}, None, "seed=0"), result)]
    names = [
        *("I", "barrier", "barrier aligned", "envelope max", "envelope max aligned", "I=2", "I=2 (2)"),
        *("error of the run", "run of the run"),
    ]
    head, row = written(folder, ["seed"], done)
    assert head == ["run", "seed", *names, "error"]
    assert row == ["seed=0", "0", "1", "0.1", "0.2", "0.3", "0.4", "5", "6", "7", "8", ""]
    assert list(sweep._table(["seed"], done).columns) == ["seed", *names]


def test_lists_are_in_the_table_in_full_and_bounds_keep_their_side(folder: Path) -> None:
    columns = ["losses", "error", "most"]
    result = Report("", columns, [[[0.123456789, "to", None], 0.12341, 0.12341]], bounds={"error": "upper"})
    done = [(sweep.Run({"seed": "0"}, None, "seed=0"), result)]
    assert written(folder, ["seed"], done)[1][2:] == ["0.123456789 to ", "0.12341", "0.12341", ""]
    assert sweep._table(["seed"], done).bounds == {"error of the run": "upper"}


def test_a_run_s_own_column_stays_beside_the_one_swept_over_where_it_says_more(folder: Path) -> None:
    done = [
        (sweep.Run({"I": f"{a}/{b}"}, None, f"I={a}_{b}"), Report("", ["I", "loss"], [[a, 0.5], [b, 0.25]]))
        for a, b in ((2, 3), (2, 5))
    ]
    head, *found = written(folder, ["I"], done)
    assert head == ["run", "I", "I of the run", "loss", "error"]
    assert [row[1:3] for row in found] == [["2/3", "2"], ["2/3", "3"], ["2/5", "2"], ["2/5", "5"]]
    alike = [(sweep.Run({"I": str(n)}, None, f"I={n}"), Report("", ["I", "loss"], [[n, 0.5]])) for n in (2, 3)]
    assert written(folder, ["I"], alike)[0] == ["run", "I", "loss", "error"]


def test_keys_with_the_same_last_part_are_told_apart(folder: Path) -> None:
    given = ["--config=shares.py", "--extend=shares"]
    (one,) = sweep.combinations({"seed": ["1"], "config.seed": ["2"], "config.count": ["3"]}, given)
    assert one.folder == "seed=1,config.seed=2,count=3"
    head, row = written(folder, list(one.values), [(one, Report("", ["seed"], [[2]]))])
    assert head == ["run", "seed", "config.seed", "count", "seed of the run", "error"]
    assert row[1:5] == ["1", "2", "3", "2"]


def test_a_folder_of_another_run_or_sweep_is_refused_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["shares.py", "--extend=shares"]
    assert commands.main(["run", *command, "--workdir=single"]) == 0
    assert commands.main(["sweep", *command, "--over=count=1,2", "--workdir=w"]) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for arguments, message in (
        (["--workdir=single"], "single is the folder of a run"),
        (["--workdir=w", "--config.seed=5"], "holds another config"),
    ):
        with pytest.raises(SystemExit) as end:
            commands.main(["sweep", *command, "--over=count=1,2", *arguments])
        assert end.value.code == 2
        assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shares.py"], "a sweep needs --over"),
        (["shares.py", "--over"], "--over needs KEY=VALUES"),
        (["--over=count=1"], "name the config first"),
        (["shares.py", "--over", "count=1", "--over", "count=2"], "given twice"),
        (["shares.py", "--over", "cuont=1"], "unknown config argument 'cuont'. Did you mean 'count'"),
        (["shares.py:seed=1", "--over", "seed=1,2"], "'seed' is given twice"),
        (["shares.py", "--over", "config.nmaes=1"], "'nmaes'. Did you mean 'names'"),
        (["shares.py", "--over", "count=1,x"], "expected a whole number"),
        (["shares.py", "--over", "count=0..999", "--over", "seed=0..99"], "100,000 runs is more than"),
        (["shares.py", "--over", "config.names=('a b',);('a_b',)"], "two runs would share a folder"),
        (["shares.py", "--over", "count=1", "--num_processes=2"], "a sweep runs in one process"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        commands.main(["sweep", arguments[0], "--extend=shares", *arguments[1:]])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (folder / "calls").exists()


def test_a_sweep_without_a_config_says_how_to_name_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        commands.main(["sweep", "--over", "I=1"])
    assert end.value.code == 2
    assert "name the config first: dualgap sweep NAME" in capsys.readouterr().err


def test_a_sweep_of_the_papers_config_is_checked_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        commands.main(["sweep", "synthetic_relu:smoke", "--over", "config.loss.tau=1.,0.", "--workdir=/nonexistent/w"])
    assert "tau must" in capsys.readouterr().err
    assert cli.parse(["--config=synthetic_relu:smoke"]).name == "synthetic_relu"
