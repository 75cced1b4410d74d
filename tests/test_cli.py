"""The command line: listing, overrides, extensions, and one clear line for each mistake."""

from __future__ import annotations

import dataclasses
import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tfds_files import write_tfds

from dualgap_jax import cli, interrupts
from dualgap_jax.config import Component, ConfigError, check_numbers, experiment_config, load, override, spec_of
from dualgap_jax.experiments import TABLES, Experiment, Report, Tables
from dualgap_jax.experiments import run as run_config
from dualgap_jax.experiments.base import identity
from dualgap_jax.experiments.landscape import LandscapeSpec
from dualgap_jax.files import leaves, load_json
from dualgap_jax.hitting import SgdSpec
from dualgap_jax.interrupts import Terminated
from dualgap_jax.registry import SettingError
from dualgap_jax.sharding import MeshSpec
from dualgap_jax.workdir import Workdir, WorkdirError

pytestmark = pytest.mark.usefixtures("children_share_programs")
ROOT = Path(__file__).resolve().parents[1]
MODULE = """
from dualgap_jax.networks import mlp

def wide(*, out: int, width: int = 3):
    '''A branch of one's own.'''
    return mlp((width,), out)

def extend(tables):
    return tables._replace(branches=tables.branches.extended({"wide": wide}))
"""
EXPERIMENT = """
import dataclasses
from pathlib import Path
from dualgap_jax.experiments import Experiment, Report
from dualgap_jax.files import load_json, save_json

@dataclasses.dataclass(frozen=True)
class Sums:
    numbers: tuple[int, ...] = (1, 2)

def sums(spec, workdir, tables):
    '''The sum of some numbers.'''
    found = workdir.remember("sum", lambda: {"sum": sum(spec.numbers)})
    save_json(workdir.results / "sums.json", found)
    return Report("Sums", ["numbers", "sum"], [[len(spec.numbers), found["sum"]]])

def drawn(workdir):
    path = Path(workdir) / "figures" / "sums.png"
    path.parent.mkdir(exist_ok=True)
    path.write_text(str(load_json(Path(workdir) / "results" / "sums.json")["sum"]))
    return [path]

def extend(tables):
    return tables.with_experiments(Experiment("sums", Sums, sums), Experiment("drawn_sums", Sums, sums, drawn))
"""
OWN_CONFIG = """
from dualgap_jax.config import experiment_config, parse_arg
from own import Sums

def get_config(arg=None):
    args = parse_arg(arg, name="sums")
    return experiment_config(args.name, Sums((3, 4)))
"""
CONFIG = """
from dualgap_jax.config import Component, experiment_config
from dualgap_jax.experiments.landscape import LandscapeSpec, smoke

def get_config(arg=None):
    data = Component("synthetic_relu", {"seed": 1})
    spec = LandscapeSpec(num_branches=2, branch=Component("wide", {"width": 4}), data=data)
    return experiment_config("landscape", smoke(spec, n=40))
"""


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "run.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_the_listing_names_everything() -> None:
    text = cli.listing(TABLES, ROOT / "configs")
    for table in TABLES:
        for name in table:
            assert f"  {name} " in text
    for path in (ROOT / "configs").glob("*.py"):
        assert path.name in text
    assert all(len(line.split(maxsplit=1)) == 2 for line in text.splitlines() if line.startswith("  "))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=configs/mnist_2layer.py"],
            "unknown config 'mnist_2layer'. Did you mean 'mnist_1layer",
        ),
        (["--config=configs/synthetic_relu.py:I=0"], "num_branches=0 must"),
        (["--config=configs/figure4.py:I=0"], "num_branches=0 must"),
        (["--config", "configs/synthetic_relu.py:I=1.5"], "I='1.5': expected a whole number"),
        (["--config=configs/synthetic_relu.py:tau=1"], "unknown config argument 'tau'"),
        (["--config=configs/figure4.py:row=minst"], "unknown row 'minst'. Did you mean 'mnist'"),
        (["--config=configs/theorem2.py:gamma=-1"], "gamma=-1.0 must be finite and at least 0"),
        (["--config=configs/theorem2.py:width=0"], "width=0 must lie between 1"),
        (["--config=configs/synthetic_relu.py", "--config.trainig.max_steps=3"], "'trainig'. Did you mean 'training'"),
        (["--config=configs/synthetic_relu.py", "--config.branch.hiden=3"], "key in config.branch: 'hiden'"),
        (["--config=configs/synthetic_relu.py", "--config.seed.x=3"], "key in config.seed: 'x'"),
        (["--config=configs/synthetic_relu.py", "--config.seed"], "--config.seed needs a value"),
        (["--config=configs/synthetic_relu.py", "--config.seed="], "--config.seed='': expected a whole number"),
        (
            ["--config=configs/figure1.py", "config.cell.training.learning_rate=0.001"],
            "without its two dashes: write --config.cell.training.learning_rate=0.001",
        ),
        (["--config=configs/figure1.py", "-config.cell.seed=1"], "write --config.cell.seed=1"),
        (["config=configs/figure1.py"], "write --config=configs/figure1.py"),
        (["--config=configs/figure1.py", "workdir=x"], "write --workdir=x"),
        (["--config=configs/figure1.py", "x"], "unknown argument 'x'. Allowed: --"),
        (["--config=configs/figure1.py", "--wokdir=x"], "unknown argument '--wokdir=x'. Did you mean --workdir?"),
        (["--config=configs/figure1.py", "--work=x"], "unknown argument '--work=x'"),
        (["--config=configs/figure1.py", "--", "--workdir=x"], "argument"),
        (["--config=configs/figure1.py", "--config.cell.seed", "1", "2"], "unknown argument '2'"),
        (["--config=configs/figure1.py", "--config=configs/figure4.py"], "--config is given twice"),
        (["--config=configs/figure1.py", "--workdir=a", "--workdir=a"], "--workdir is given twice"),
        (["--config=configs/figure1.py", "--config.cell.seed=1", "--config.cell.seed=2"], "cell.seed is given twice"),
        (["--config.cell.seed=1"], "--config.cell.seed without --config"),
        (["--workdir"], "expected one argument"),
        (["--num_processes=two"], "invalid int value: 'two'"),
    ],
)
def test_mistakes_in_the_arguments(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as error:
        cli.parse(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


TEXTS = (
    *("0", "-1", "1", "3", "1e-300", "1e300", "nan", "-inf", "", "()", "(1,)", "(-1,)", "1/2", "1//2", "('x',)", "x"),
    *(
        "true",
        "None",
        "4294967296",
        "2147483647",
        "9" * 30,
        "1e4",
        "[1]",
        "{}",
        "((1,),)",
        "(1.5,)",
        "(True,)",
        "'",
        "(1,2",
    ),
    *("torch", "sum", "cosine", "mnist", "/", "é", "1_000", "(1,2", "(2147483647,)", "[" * 300),
)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_written_for_a_leaf_is_taken_or_refused_in_one_sentence(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    draw = random.Random(seed)
    configs = {path: load(path) for path in sorted((ROOT / "configs").glob("*.py"))}
    refused = 0
    for _ in range(250):
        path, config = draw.choice(list(configs.items()))
        names = [name for name, _ in leaves(config.to_dict()) if name != "experiment"]
        texts = {draw.choice(names): draw.choice(TEXTS) for _ in range(draw.randint(1, 2))}
        try:
            spec = spec_of(override(config, texts), TABLES.experiments[config.experiment].spec)
            check_numbers(spec)
            spec.validate(TABLES)
        except (ValueError, LookupError) as error:
            refused += 1
            assert type(error).__module__.startswith("dualgap_jax"), (path, texts)  # noqa: PT017
    assert refused > 50


@pytest.mark.parametrize(
    ("config", "leaf", "told"),
    [
        ("synthetic_relu", "branch=mlp(hidden=(2,),use_bias='no')", "use_bias='no': expected True or False"),
        ("synthetic_relu", "branch=mlp(init_scale='a')", "init_scale='a': expected a number"),
        ("synthetic_relu", "branch=conv(batch_norm='no')", "batch_norm='no': expected True or False"),
        ("synthetic_relu", "branch=conv(dropout='x')", "dropout='x': expected a number"),
        ("synthetic_relu", "data=own", "data set 'own': path is missing"),
        ("synthetic_relu", "data=own(path=3)", "path=3: expected a text"),
        ("synthetic_relu", "data=own(path='a.csv',standardise='no')", "standardise='no': expected True or False"),
        ("figure1", "cell.data=own", "data set 'own': path is missing"),
        ("certify", "data=own", "data set 'own': path is missing"),
        ("certify", "data=mnist(data_dir=3)", "data_dir=3: expected a text"),
        ("theorem1", "data=mnist(data_dir=3)", "data_dir=3: expected a text"),
        ("theorem2", "data=random(n='a')", "n='a': expected a whole number"),
        ("synthetic_relu", "training.optimizer=sgd(momentum=0.5,nesterov='no')", "nesterov='no': expected True"),
        ("synthetic_relu", "training.schedule=cosine(warmup='a')", "warmup='a': expected a whole number"),
        ("table1", "sgd.schedule=plateau(factor='a')", "factor='a': expected a number"),
        ("figure3", "set=lp_ball(p='a')", "p='a': expected a number"),
    ],
)
def test_settings_of_an_entry_have_its_types(
    config: str, leaf: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    parsed = cli.parse([f"--config=configs/{config}.py:smoke", f"--config.{leaf}"]).config
    with pytest.raises(SettingError) as error:
        spec_of(parsed, TABLES.experiments[parsed.experiment].spec).validate(TABLES)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_good_arguments_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    flags = cli.parse(
        [
            "--config=configs/synthetic_relu.py:I=3",
            "--config.training.max_steps=3",
            "--config.training.learning_rate",
            "0.5",
            "--config.tensorboard",
            "--workdir=x",
            "--config.branch.hidden[0]=16",
            "--extend=a",
            "--extend",
            "b",
        ]
    )
    assert (flags.name, flags.workdir, flags.extend) == ("synthetic_relu", "x", ["a", "b"])
    spec = spec_of(flags.config, LandscapeSpec)
    assert (spec.num_branches, spec.training.max_steps, spec.training.learning_rate) == (3, 3, 0.5)
    assert spec.tensorboard
    assert spec.branch.settings["hidden"] == (16,)
    assert cli.parse(["--list"]).list
    assert cli.parse(["--config", "configs/figure1.py", "--config.cell.plane.half_width", "1e-3"]).config is not None


def test_only_the_reductions_that_hold_are_said_and_the_run_in_full_keeps_what_was_changed() -> None:
    given = ["--config=figure1:smoke,I=2/3/4", "--config.num_branches=(2,3,4)", "--config.cell.plane.points", "9"]
    flags = cli.parse([*given, "--config.cell.tensorboard", "--extend=mine"])
    said = cli._compared(flags.config, flags.given, flags.changes)
    assert "cell.training.max_steps 40 (in full" in said["reduced"]
    assert "num_branches" not in said["reduced"]
    assert "points" not in said["reduced"].replace("edge_points", "")
    assert said["again"] == (
        "figure1:I=2/3/4 '--config.num_branches=(2,3,4)' --config.cell.plane.points=9 --config.cell.tensorboard"
        " --extend=mine"
    )
    full = load(cli.located("theorem2"))
    small = load(cli.located("theorem2:smoke"))
    assert cli._compared(small, "theorem2:smoke")["again"] == "theorem2"
    said = cli._compared(full, "theorem2:smoke")
    assert (said["reduced"], said["again"]) == ("", "")
    again = cli.parse([f"--config={flags.given}", *flags.changes])
    assert again.config == flags.config


def test_errors_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stop, cli.errors_in_one_line():
        raise ConfigError("what was given, what is allowed.")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "ConfigError: what was given, what is allowed.\n"
    with pytest.raises(ValueError, match="a defect"), cli.errors_in_one_line():
        raise ValueError("a defect keeps its traceback")

    def leave(status: int, words: str) -> None:
        print(words, file=sys.stderr)
        sys.exit(status)

    monkeypatch.setattr(interrupts, "leave", leave)
    for error, code in ((KeyboardInterrupt(), 130), (Terminated("SIGTERM"), 143), (OSError(28, "No space"), 2)):
        with pytest.raises(SystemExit) as stop, cli.errors_in_one_line():
            raise error
        assert stop.value.code == code
        assert "what is done is kept, and the same command goes on" in capsys.readouterr().err


def test_a_platform_that_is_none_is_one_message(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "run.py"), "--config=configs/synthetic_relu.py:I=2,smoke"]
    command.append(f"--workdir={tmp_path / 'w'}")
    environment = {**os.environ, "JAX_PLATFORMS": "nonsense"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "JAX_PLATFORMS is 'nonsense': unset it" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("no_such_module_here", "can be imported from here"),
        ("json", "defines no extend"),
        ("./mine", "the name of a module, not a path: --extend=mine"),
        ("folder/mine.py", "not a path: --extend=folder.mine"),
        (".mine", "not a path: --extend=mine"),
    ],
)
def test_bad_extensions(module: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cli.extended([module])


@pytest.mark.parametrize("name", ["sums", "drawn_sums"])
def test_a_whole_run_of_an_experiment_of_ones_own(name: str, tmp_path: Path) -> None:
    """With figures and without, complete, and damaged afterwards."""
    (tmp_path / "own.py").write_text(EXPERIMENT)
    (tmp_path / "own_config.py").write_text(OWN_CONFIG)
    arguments = [f"--config=own_config.py:name={name}", "--extend=own", "--config.numbers=3/4/5", "--workdir=w"]
    first = run(*arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "12" in first.stdout
    assert load_json(tmp_path / "w" / "config.json") == {"experiment": name, "numbers": [3, 4, 5]}
    assert load_json(tmp_path / "w" / "run.json")["status"] == "complete"
    figure = tmp_path / "w" / "figures" / "sums.png"
    assert figure.exists() == (name == "drawn_sums") == ("figure:" in first.stdout)
    figure.unlink(missing_ok=True)
    second = run(*arguments, cwd=tmp_path)
    assert second.stdout == (
        "Complete already; nothing was computed. To start over, delete"
        f" {tmp_path / 'w'} or give another --workdir.\n\n{first.stdout}"
    )
    assert figure.exists() == (name == "drawn_sums")
    record = tmp_path / "w" / "results" / "sums.json"
    record.write_text(record.read_text().replace("12", "13"))
    third = run(*arguments, cwd=tmp_path)
    assert third.stdout == first.stdout
    assert "results/sums.json" in third.stderr
    another = "sums" if name == "drawn_sums" else "drawn_sums"
    other = run(f"--config=own_config.py:name={another}", *arguments[1:], cwd=tmp_path)
    assert other.returncode == 2
    assert f"holds a run of experiment '{name}', not '{another}'" in other.stderr
    assert "The sum of some numbers." in run("--extend=own", "--list", cwd=tmp_path).stdout


@dataclasses.dataclass(frozen=True)
class Grid:
    """Settings of somebody's own, under names that the package has too."""

    mesh: int = 10
    devices: int = 1
    data_dir: str = "a"
    branch: Component = Component("wide", {"data_dir": "a"})
    data: Component = Component("mnist", {"data_dir": "a"})
    shared: MeshSpec = MeshSpec()
    sgd: SgdSpec = SgdSpec()


def test_settings_of_ones_own_belong_to_a_run_whatever_their_names(tmp_path: Path) -> None:
    def area(spec: Grid, workdir: Workdir, tables: Tables) -> Report:
        return Report("Area", ["area"], [[spec.mesh**2]])

    own = Experiment("grid", Grid, area)
    tables = TABLES.with_experiments(own)
    changes: list[dict[str, Any]] = [{"mesh": 20}, {"devices": 2}, {"data_dir": "b"}]
    changes += [{"branch": Component("wide", {"data_dir": "b"})}]
    for change in changes:
        assert identity(own, Grid(**change)) != identity(own, Grid()), change
    elsewhere = Grid(data=Component("mnist", {"data_dir": "b"}), shared=MeshSpec(branch=2), sgd=SgdSpec(devices=2))
    assert identity(own, elsewhere) == identity(own, Grid())
    run_config(experiment_config("grid", Grid()), tables=tables, workdir=tmp_path / "w")
    with pytest.raises(WorkdirError, match="mesh: 10 there, 20 asked for"):
        run_config(experiment_config("grid", Grid(mesh=20)), tables=tables, workdir=tmp_path / "w")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a file."""

    data: Component = Component("own", {"path": "own.npz"})


@dataclasses.dataclass(frozen=True)
class Digits:
    """Of a prepared folder."""

    data: Component = Component("mnist", {"data_dir": "here"})


def test_a_prepared_folder_that_changed_since_a_complete_run_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rng: np.random.Generator
) -> None:
    """Other images are; a copy of the same, later, and a machine without them are not."""
    monkeypatch.chdir(tmp_path)

    def images() -> Any:
        return rng.integers(0, 256, (4, 28, 28, 1), np.uint8), np.arange(4)

    def go_on(folder: str) -> str:
        caplog.clear()
        spec = Digits(Component("mnist", {"data_dir": folder}))
        experiment = Experiment("digits", Digits, lambda *a: Report("Size", ["size"], [[1]]))
        run_config(experiment_config("digits", spec), tables=TABLES.with_experiments(experiment), workdir="w")
        return caplog.text

    splits = {"train": images(), "test": images()}
    write_tfds(Path("here"), "mnist", splits)
    write_tfds(Path("changed"), "mnist", splits | {"test": images()})
    shutil.copytree("here", "copy")
    assert [go_on(folder) for folder in ("here", "here", "copy", "nowhere")] == [""] * 4
    assert "computed before this changed: data set mnist;" in go_on("changed")


def test_what_changed_since_a_complete_run_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "sizes_of_files.py").write_text("def size(spec, workdir, tables):\n    return REPORT\n")
    module = importlib.import_module("sizes_of_files")
    module.REPORT = Report("Size", ["size"], [[1]])
    tables = TABLES.with_experiments(Experiment("sizes", Sizes, module.size))

    def go_on() -> tuple[bool, str]:
        caplog.clear()
        was_complete = run_config(experiment_config("sizes", Sizes()), tables=tables, workdir="w")[2]
        return was_complete, caplog.text

    (tmp_path / "own.npz").write_bytes(b"1")
    assert go_on() == (False, "")
    assert go_on() == (True, "")
    with jax.enable_x64(True):
        assert "computed before this changed: JAX_ENABLE_X64=0 (not so now)" in go_on()[1]
    (tmp_path / "own.npz").write_bytes(b"2")
    (tmp_path / "sizes_of_files.py").write_text("")
    was_complete, said = go_on()
    assert was_complete
    assert "computed before this changed: file own.npz, module sizes_of_files;" in said
    assert len(caplog.records) == 1
    (tmp_path / "w" / "results" / "report.json").unlink()
    assert "goes on although this changed since it was begun: file own.npz, module sizes_of_files" in go_on()[1]
    assert go_on() == (True, "")


def test_a_whole_run_with_ones_own_branch(tmp_path: Path) -> None:
    """The user's command, from a folder that holds a module and a config of one's own."""
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "mine_config.py").write_text(CONFIG)
    arguments = ["--config=mine_config.py", "--extend=mine", "--config.branch.width=5"]
    first = run(*arguments, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "Traceback" not in first.stderr
    (workdir,) = (tmp_path / "runs").iterdir()
    assert workdir.name.startswith("mine_config-")
    assert load_json(workdir / "config.json")["branch"] == {"name": "wide", "width": 5}
    assert load_json(workdir / "run.json")["command"].endswith("--config.branch.width=5")
    second = run(*arguments, cwd=tmp_path)
    assert second.stdout.startswith("Complete already; nothing was computed.")
    assert first.stdout in second.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "ConfigError: no config given"),
        (
            ["--config=configs/mnist_1layer.py:smoke", "--config.data.data_dir=no_such_folder"],
            "scripts/prepare_data.py mnist",
        ),
        (
            ["--config=configs/synthetic_relu.py:smoke", "--config.loss.tau=0."],
            "SettingError: loss 'binary_hinge': tau must",
        ),
    ],
)
def test_mistakes_cost_seconds_and_one_message(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = run(*arguments, *([f"--workdir={tmp_path / 'w'}"] if arguments else []))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_useful() -> None:
    done = run("--help")
    assert done.returncode == 0
    for word in ("--config", "--workdir", "--list", "--extend", "configs/figure1.py"):
        assert word in done.stdout


LONG = ["--config=configs/synthetic_relu.py:I=5", "--config.training.max_steps=2000000"]
LONG += ["--config.training.tolerance=0."]


@pytest.mark.parametrize(
    ("number", "code", "wait", "times"),
    [
        (signal.SIGINT, 130, 0.2, 1),  # while modules are imported
        (signal.SIGTERM, 143, 0.2, 2),
        (signal.SIGINT, 130, None, 2),  # at work
        (signal.SIGTERM, 143, None, 1),
        (signal.SIGTERM, 143, None, 2),
    ],
)
def test_signals_end_a_run_with_their_exit_status(
    number: signal.Signals, code: int, wait: float | None, times: int, tmp_path: Path
) -> None:
    # Background jobs inherit that an interrupt is ignored, so it is set back first.
    restored = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, str(ROOT / "scripts" / "run.py"), *LONG, f"--workdir={tmp_path / 'w'}"]
    with subprocess.Popen(
        [sys.executable, "-c", restored, *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        if wait is None:
            while not (tmp_path / "w" / "metrics.jsonl").exists():
                time.sleep(0.1)
        time.sleep(wait or 0.5)
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.1)
        out, _ = process.communicate(timeout=100)
    assert process.returncode == code, out
    assert "Traceback" not in out
    if wait is None:
        assert load_json(tmp_path / "w" / "run.json")["status"] == "interrupted"


@pytest.mark.parametrize("limit", ["-f 1", "-f 8", "-n 12"])
def test_a_full_disk_or_a_limit_is_one_message_and_the_run_goes_on_afterwards(limit: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "run.py"), "--config=configs/figure3.py:smoke"]
    command.append(f"--workdir={tmp_path / 'w'}")
    limited = ["bash", "-c", f'ulimit {limit}; exec "$@"', "bash", *command]
    first = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert first.returncode == 2, first.stderr
    assert "Traceback" not in first.stderr
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    straight = run("--config=configs/figure3.py:smoke", f"--workdir={tmp_path / 'v'}")
    assert second.stdout.replace(str(tmp_path / "w"), "") == straight.stdout.replace(str(tmp_path / "v"), "")


def test_nothing_optional_stops_a_run(tmp_path: Path) -> None:
    """No such backend, a terminal without Greek letters, a folder whose name is no UTF-8."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    command = [sys.executable, str(ROOT / "scripts" / "run.py"), "--config=configs/figure3.py:smoke"]
    environment = {**os.environ, "MPLBACKEND": "Qt4Agg", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, b"--workdir=" + folder], cwd=ROOT, env=environment, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert Path(os.fsdecode(folder), "figures", "shapley_folkman.png").exists()
    assert Path(os.fsdecode(folder), "report.html").exists()
    assert b"Traceback" not in done.stderr
