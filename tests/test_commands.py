"""The command `dualgap`: what it says, configs by name from any folder, and what an installed wheel holds."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from dualgap_jax import __version__, cli, commands
from dualgap_jax.commands import doctor
from dualgap_jax.config import ConfigError

pytestmark = pytest.mark.usefixtures("children_share_programs")
ROOT = Path(__file__).parents[1]


def dualgap(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dualgap_jax", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_help_version_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["-h"], ["help"]):
        assert commands.main(arguments) == 0
        said = capsys.readouterr().out
        assert all(name in said for name in commands.COMMANDS)
    assert commands.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dualgap_jax {__version__}\n"
    for arguments, word in (([], "no command"), (["rnu"], "unknown command 'rnu'")):
        assert commands.main(arguments) == 2
        assert word in (said := capsys.readouterr().err)
        assert all(name in said for name in commands.COMMANDS)


def test_help_imports_neither_jax_nor_flax() -> None:
    program = "import sys; from dualgap_jax import commands; commands.main(['--help']); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_standard_streams_that_are_closed_are_no_place_for_files(tmp_path: Path) -> None:
    program = """
import os, sys
from dualgap_jax import terminal
terminal.open_streams()
with open("opened", "w") as file:
    print("out"), print("err", file=sys.stderr), os.write(2, b"a library")
    sys.stdout.flush(), sys.stderr.flush()
    file.write(f"{file.fileno() > 2} {sys.stdin.read()!r}")
"""
    shell = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, program]
    subprocess.run(shell, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    assert (tmp_path / "opened").read_text() == "True ''"


@pytest.mark.parametrize("command", ["-m dualgap_jax list >&-", "scripts/run.py --list >&- 2>&-"])
def test_a_command_without_a_standard_stream(command: str) -> None:
    subprocess.run(["sh", "-c", f'exec "$0" {command}', sys.executable], cwd=ROOT, check=True)


def test_what_only_some_experiments_need_is_imported_when_they_run() -> None:
    """All experiments are known by then, their modules imported."""
    program = "import sys; from dualgap_jax import commands; commands.main(['list']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set(done.stdout.splitlines()[-1].split())
    assert "dualgap_jax.experiments.certify" in imported
    heavy = {"scipy.optimize", "scipy.stats", "scipy.spatial", "scipy.sparse", "flax", "matplotlib", "plotly", "orbax"}
    assert not heavy & imported


def test_a_run_by_name_from_another_folder(tmp_path: Path) -> None:
    first = dualgap("run", "figure3:smoke", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (workdir,) = (tmp_path / "runs").iterdir()
    assert workdir.name.startswith("figure3-")
    assert (workdir / "figures" / "shapley_folkman.png").exists()
    again = dualgap("run", "--config=configs/figure3.py:smoke", cwd=tmp_path)
    assert again.stdout.startswith("Complete already; nothing was computed.")
    drawn = dualgap("plot", str(workdir), cwd=tmp_path)
    assert str(workdir / "figures" / "shapley_folkman.png") in drawn.stdout


def test_configs_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = cli.shipped() / "figure1.py"
    for text in ("figure1", "figure1.py", "configs/figure1.py", "configs/figure1"):
        assert cli.located(f"{text}:I=5,smoke") == f"{shipped}:I=5,smoke"
    assert cli.located(str(shipped)) == str(shipped)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "figure1.py").write_text("")  # one's own comes first
    assert cli.located("figure1") == "configs/figure1.py"
    (tmp_path / "figure1.py").write_text("")
    assert cli.located("figure1.py:smoke") == "figure1.py:smoke"
    with pytest.raises(ConfigError, match=r"unknown config 'figur1'.*figure1"):
        cli.located("figur1:smoke")
    assert cli.located("elsewhere/figure1.py") == "elsewhere/figure1.py"  # whose absence `load` names


def test_the_list_names_all_configs(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["list"]) == 0
    said = capsys.readouterr().out
    assert all(path.name in said for path in (ROOT / "configs").glob("*.py"))


def test_the_doctor_says_what_is_there_and_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert commands.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line[8:22].strip(): line for line in lines}
    assert found["mnist"].startswith("note")
    assert "dualgap prepare-data mnist" in found["mnist"]
    assert __version__ in found["dualgap_jax"]
    assert "cpu" in found["devices"]

    def fails() -> None:
        raise OSError("no such thing")

    monkeypatch.setattr(doctor, "CHECKS", (fails, *doctor.CHECKS))
    assert commands.main(["doctor"]) == 1
    assert "broken  fails         OSError: no such thing" in capsys.readouterr().out


def test_the_packages_of_the_metadata_are_those_there_are() -> None:
    metadata = configparser.ConfigParser()
    metadata.read(ROOT / "setup.cfg")
    named = set(metadata["options"]["packages"].split())
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "dualgap_jax").rglob("__init__.py")]
    assert named == {".".join(folder.parts) for folder in folders} | {"dualgap_jax.configs"}


def test_a_wheel_holds_package_configs_and_command(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path)]
    copy = tmp_path / "source"
    for part in ("dualgap_jax", "configs"):
        for path in (ROOT / part).rglob("*.py"):
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "dualgap_jax/py.typed"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*build, str(copy)], capture_output=True, text=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dualgap_jax").rglob("*.py")}
    assert sources <= names
    assert {f"dualgap_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")} <= names
    assert "dualgap_jax/py.typed" in names
    assert "dualgap = dualgap_jax.commands:main" in entry


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("command", ["doctor", "--help", "--version", "report --help", "sweep --help"])
def test_a_reader_that_went_away_is_no_error(command: str, buffered: bool) -> None:
    """As in `dualgap doctor | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = printing(command, writer, buffered)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("command", ["--help", "--version", "sweep --help"])
def test_an_output_that_cannot_be_written_is_one_line(command: str, buffered: bool) -> None:
    with open("/dev/full", "w") as full:
        done = printing(command, full, buffered)
    assert done.returncode == 2
    assert done.stderr == "OSError: [Errno 28] No space left on device\n"


def printing(command: str, output: Any, buffered: bool) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, *(() if buffered else ("-u",)), "-m", "dualgap_jax", *command.split()],
        cwd=ROOT,
        env=environment,
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
