"""The command line: listing, overrides, extensions, and one clear line for each mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dualgap_jax import cli
from dualgap_jax.config import ConfigError
from dualgap_jax.experiments import TABLES
from dualgap_jax.files import load_json

ROOT = Path(__file__).resolve().parents[1]
MODULE = """
from dualgap_jax.networks import mlp

def wide(*, out: int, width: int = 3):
    '''A branch of one's own.'''
    return mlp((width,), out)

def extend(tables):
    return tables._replace(branches=tables.branches.extended({"wide": wide}))
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
            "unknown config file in configs: 'mnist_2layer.py'. Did you mean 'mnist_1layer",
        ),
        (["--config=configs/synthetic_relu.py:I=0"], "num_branches=0 must be a positive integer"),
        (["--config", "configs/synthetic_relu.py:I=1.5"], "I='1.5': expected a whole number"),
        (["--config=configs/synthetic_relu.py:tau=1"], "unknown config argument 'tau'"),
        (["--config=configs/figure4.py:row=minst"], "unknown row 'minst'. Did you mean 'mnist'"),
        (["--config=configs/synthetic_relu.py", "--config.trainig.max_steps=3"], "'trainig'. Did you mean 'training'"),
        (["--config=configs/synthetic_relu.py", "--config.branch.hiden=3"], "key in config.branch: 'hiden'"),
        (["--config=configs/synthetic_relu.py", "--config.seed.x=3"], "key in config.seed: 'x'"),
    ],
)
def test_mistakes_in_the_arguments(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as error:
        cli.check_arguments(arguments)
    assert message in str(error.value)


def test_good_arguments_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cli.check_arguments(["--config=configs/synthetic_relu.py:I=3", "--config.training.max_steps=3", "--workdir=x"])
    cli.check_arguments(["--list"])


def test_errors_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop, cli.errors_in_one_line():
        raise ConfigError("what was given, what is allowed.")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "ConfigError: what was given, what is allowed.\n"
    with pytest.raises(ValueError, match="a defect"), cli.errors_in_one_line():
        raise ValueError("a defect keeps its traceback")
    with pytest.raises(SystemExit) as stop, cli.errors_in_one_line():
        raise KeyboardInterrupt
    assert stop.value.code == 130


@pytest.mark.parametrize(
    ("module", "message"), [("no_such_module_here", "can be imported from here"), ("json", "defines no extend")]
)
def test_bad_extensions(module: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cli.extended([module])


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
    for word in ("--config", "--workdir", "--list", "--extend", "configs/figure1.py"):
        assert word in done.stdout
