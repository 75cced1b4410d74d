"""Imports inside the package go down the layers only, wherever in a file they stand."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "dualgap_jax"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# The modules of each group; a folder stands for everything in it.
GROUPS = {
    "base": {
        "registry",
        "types",
        "trees",
        "config",
        "identity",
        "seeds",
        "sizes",
        "files",
        "machine",
        "lock",
        "interrupts",
        "card",
        "metrics",
        "terminal",
    },
    "pure": {
        "networks",
        "linen",
        "nnx",
        "losses",
        "conjugates",
        "convexity",
        "spectral",
        "shapley_folkman",
        "optimizers",
        "schedules",
    },
    "host": {
        "data",
        "checkpoints",
        "workdir",
        "figures",
        "report",
    },
    "work": {
        "sharding",
        "evaluation",
        "plot",
        "training",
        "landscape",
        "hitting",
        "duality",
        "certify",
    },
    "top": {
        "experiments",
    },
    "entry": {
        "cli",
        "summary",
        "commands",
        "__main__",
    },
}
# The groups that each group may import.  Pure functions stay clear of files; host modules know nothing of one another.
MAY_IMPORT = {
    "base": {"base"},
    "pure": {"base", "pure"},
    "host": {"base", "pure"},
    "work": {"base", "pure", "host", "work"},
    "top": {"base", "pure", "host", "work", "top"},
    "entry": {"base", "pure", "host", "work", "top", "entry"},
}
GROUP_OF = {module: group for group, modules in GROUPS.items() for module in modules}


def imported(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """The imports of the package's own modules in `source`, as (line, dotted name below the package).

    `module` is the dotted name of the source below the package ("" for the package itself).  The name is "" where the
    package as a whole is imported, and ends in the imported attribute in `from .losses import hinge`.
    """
    inside = [PACKAGE, *filter(None, module.split("."))]
    if not is_package:
        inside.pop()
    for node in ast.walk(ast.parse(source)):
        targets: list[list[str]] = []
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = inside[: len(inside) - node.level + 1] if node.level else []
            origin = start + (node.module.split(".") if node.module else [])
            targets = [[*origin, alias.name] for alias in node.names]
        for parts in targets:
            if parts[:1] == [PACKAGE]:
                yield node.lineno, ".".join(parts[1:])


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What `source`, as the module of that dotted name, does against the table."""
    own = module.split(".")[0]
    if own not in GROUP_OF:
        return [f"{module}: not in the table of layers; add {own!r} to GROUPS in {Path(__file__).name}"]
    found = []
    for line, name in imported(source, module, is_package):
        target = name.split(".")[0]
        if target == own:
            continue
        group = GROUP_OF.get(target)
        if group is None:
            what = repr(target) if target else "the package itself"
            found.append(f"{module}:{line}: imports {what}, which is no module of the table")
        elif group not in MAY_IMPORT[GROUP_OF[own]]:
            found.append(f"{module}:{line}: {GROUP_OF[own]} module imports {target!r} of {group!r}")
    return found


def package_files() -> list[Path]:
    """The package's source files, but for its own `__init__`, which gathers the public names from all layers."""
    return [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", package_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    assert violations(path.read_text(encoding="utf-8"), module, is_package) == []


def test_every_module_of_the_table_exists() -> None:
    present = {path.relative_to(ROOT).with_suffix("").parts[0] for path in package_files()}
    assert GROUP_OF.keys() - present == set()


def test_each_module_is_in_one_group() -> None:
    assert sum(map(len, GROUPS.values())) == len(GROUP_OF)
    assert GROUPS.keys() == MAY_IMPORT.keys()


@pytest.mark.parametrize(
    ("module", "source", "names"),
    [
        ("losses", "import dualgap_jax.training", ["training"]),
        ("losses", "import numpy, dualgap_jax.training as t", ["training"]),
        ("losses", "from dualgap_jax.training import fit", ["training.fit"]),
        ("losses", "from dualgap_jax import training", ["training"]),
        ("losses", "from .training import fit, step", ["training.fit", "training.step"]),
        ("losses", "from . import training, types", ["training", "types"]),
        ("experiments.figure1", "from ..training import fit", ["training.fit"]),
        ("experiments.figure1", "from .. import training", ["training"]),
        ("experiments.figure1", "from . import common", ["experiments.common"]),
        ("experiments.figure1", "from .common import run", ["experiments.common.run"]),
        ("losses", "def f():\n    from .data import load", ["data.load"]),
        ("losses", "if TYPE_CHECKING:\n    import dualgap_jax.data", ["data"]),
        ("losses", "import dualgap_jax", [""]),
        ("losses", "import dualgap_jax_tools\nfrom training import fit\nimport data", []),
    ],
)
def test_imports_are_resolved(module: str, source: str, names: list[str]) -> None:
    assert [name for _, name in imported(source, module)] == names


def test_imports_in_a_package_init_are_resolved_from_the_package() -> None:
    source = "from .common import run\nfrom ..training import fit"
    assert [name for _, name in imported(source, "experiments", is_package=True)] == [
        "experiments.common.run",
        "training.fit",
    ]


def test_what_goes_down_is_allowed() -> None:
    assert violations("from .types import Network\nfrom .losses import squared", "networks") == []
    assert violations("from .convexity import scores\nfrom .registry import Table", "figures") == []
    assert violations("from .landscape import evaluate\nfrom . import workdir", "training") == []
    assert violations("from ..data import load\nfrom .common import run", "experiments.figure1") == []


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("registry", "from .networks import mlp", ["base", "'networks'", "'pure'"]),
        (
            "networks.mean",
            "import numpy as np\n\ndef f():\n    from ..data import load",
            ["networks.mean:4:", "'host'"],
        ),
        ("convexity", "from dualgap_jax import training", ["'training'", "'work'"]),
        ("workdir", "from .figures import draw", ["host", "'figures'"]),
        ("landscape", "import dualgap_jax.experiments.figure1", ["'experiments'", "'top'"]),
        ("experiments.figure1", "from ..nowhere import x", ["'nowhere'", "no module of the table"]),
        ("training", "import dualgap_jax", ["the package itself"]),
        ("training", "from dualgap_jax import multi_branch", ["'multi_branch'", "no module of the table"]),
        ("utils", "import numpy", ["utils", "GROUPS"]),
    ],
)
def test_what_goes_up_is_found(module: str, source: str, words: list[str]) -> None:
    (message,) = violations(source, module)
    for word in words:
        assert word in message


def test_the_checkers_use_nothing_of_what_they_check() -> None:
    solvers = {"boxes", "bounding", "closed_forms", "search", "constrained_search", "min_plus", "verdict", "gap"}
    for path in sorted((ROOT / "duality" / "checker").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        names = [name.split(".") for _, name in imported(source, f"duality.checker.{path.stem}")]
        used = {parts[1] for parts in names if parts[0] == "duality" and len(parts) > 1}
        assert not used & solvers, path.name


def test_no_file_is_longer_than_a_reader_takes_in() -> None:
    sizes = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in ROOT.rglob("*.py")}
    assert len(sizes) > 200
    assert {name: size for name, size in sizes.items() if size > 400} == {}
