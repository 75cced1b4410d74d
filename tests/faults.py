"""Runs that are killed, stopped and damaged at random, and whether they end as if nothing had happened.

    python tests/faults.py --runs 100
    python tests/faults.py --runs 10 --only figure3 table1 --kinds kill damage --json faults.json

Each run of a config at smoke size is struck at a random moment of its life, several times, and then goes on to its end:

    kill       SIGKILL
    terminate  SIGTERM; exit status 143
    interrupt  Ctrl-C; exit status 130
    damage     SIGKILL, and a byte of one of its files is changed, or the file is cut, emptied or deleted

It has survived when its report, its results and its pictures are, byte for byte, those of a run that was left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT, "damage": signal.SIGKILL}
STATUS = {"terminate": 143, "interrupt": 130}
_PATIENCE = 900  # seconds for a run that is left alone


class Outcome(NamedTuple):
    """How a run that was struck ended.

    Attributes:
      config: of the run.
      kind: of the blows.
      blows: how many there were.
      survived: whether all is as in a run that was left alone.
      said: what is not.
      seed: that repeats it.
    """

    config: str
    kind: str
    blows: int
    survived: bool
    said: str
    seed: int


def configs() -> list[str]:
    """The configs that come with the project."""
    return sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def start(config: str, workdir: Path, cache: Path) -> subprocess.Popen[str]:
    """A run at smoke size, in a process group of its own."""
    # A background job may inherit that interrupts are ignored.
    entry = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    entry += "sys.argv = sys.argv[1:]; import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", entry, "scripts/run.py", f"--config=configs/{config}.py:smoke"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def outputs(workdir: Path) -> dict[str, str]:
    """The SHA-256 of all results and pictures, those of cells too."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        kept = {"results", "figures"} & set(path.relative_to(workdir).parts[:-1])
        if kept and path.is_file() and path.suffix != ".pdf":
            found[path.relative_to(workdir).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def damage(workdir: Path, rng: random.Random) -> str:
    """Spoils one file of an unfinished or finished run, and says which and how."""
    files = sorted(path for path in workdir.rglob("*") if path.is_file())
    if not files:
        return "nothing to damage yet"
    path = rng.choice(files)
    how = rng.choice(("flip", "cut", "empty", "delete"))
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "flip" and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    else:
        path.write_bytes(data[: len(data) // 2] if how == "cut" else b"")
    return f"{how} {path.relative_to(workdir).as_posix()}"


def left_alone(config: str, folder: Path, cache: Path) -> tuple[dict[str, str], str, float]:
    """Outputs, printed table and seconds of a run that nothing strikes.

    Raises:
      RuntimeError: if it fails.
    """
    began = time.monotonic()
    with start(config, folder / config, cache) as process:
        out, err = process.communicate(timeout=_PATIENCE)
    if process.returncode != 0:
        raise RuntimeError(f"{config} fails by itself: {err[-2000:]}")
    return outputs(folder / config), out.replace(str(folder / config), "WORKDIR"), time.monotonic() - began


def struck(
    config: str, kind: str, seed: int, wanted: tuple[dict[str, str], str, float], folder: Path, cache: Path
) -> Outcome:
    """A run that is struck up to three times, and then left alone."""
    rng = random.Random(seed)
    workdir = folder / f"{config}-{seed}"
    blows: list[str] = []
    for _ in range(rng.randint(1, 3)):
        with start(config, workdir, cache) as process:
            try:
                process.communicate(timeout=rng.uniform(0.05, 1.05) * wanted[2])
                break  # it was done before the blow
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, KINDS[kind])
                _, err = process.communicate(timeout=_PATIENCE)
        blows.append(kind)
        # Once all is done the interpreter takes itself apart, and the signal's own end is 128 + its number in a shell.
        ends = {STATUS[kind], 0} | ({-KINDS[kind]} if "] done in " in err else set()) if kind in STATUS else set()
        if ends and process.returncode not in ends:
            said = f"exit status {process.returncode}, not {STATUS[kind]}: {err[-300:]}"
            return Outcome(config, kind, len(blows), False, said, seed)
        if kind == "damage" and workdir.exists():
            blows[-1] = damage(workdir, rng)
    with start(config, workdir, cache) as process:
        out, err = process.communicate(timeout=_PATIENCE)
    after = "; ".join(blows)
    if process.returncode != 0:
        # A damaged configuration is not guessed: the message must say what to do.
        refused = kind == "damage" and process.returncode == 2 and "Traceback" not in err and str(workdir) in err
        return Outcome(config, kind, len(blows), refused, f"after {after}: {err.strip()[-300:]}", seed)
    found, table = outputs(workdir), out.replace(str(workdir), "WORKDIR").split("computed again")[-1]
    different = sorted(name for name in found.keys() | wanted[0].keys() if found.get(name) != wanted[0].get(name))
    if different:
        return Outcome(config, kind, len(blows), False, f"after {after} differ: {', '.join(different)}", seed)
    if wanted[1] not in table:
        return Outcome(config, kind, len(blows), False, f"after {after} the table differs", seed)
    return Outcome(config, kind, len(blows), True, "", seed)


def search(
    runs: int, only: Sequence[str], kinds: Sequence[str], seed: int, folder: Path
) -> tuple[list[Outcome], dict[str, float]]:
    """Strikes runs of all configs in turn; prints a line each.

    Returns:
      The outcomes, and the seconds of each config when it is left alone.
    """
    cache = folder / "compiled"
    wanted = {}
    for config in only:
        left_alone(config, folder / "warm", cache)  # compiles
        wanted[config] = left_alone(config, folder / "straight", cache)
        print(f"{config:<16} left alone: {wanted[config][2]:.1f} s", flush=True)
    outcomes = []
    for number in range(runs):
        config, kind = only[number % len(only)], kinds[(number // len(only)) % len(kinds)]
        outcome = struck(config, kind, seed + number, wanted[config], folder / "struck", cache)
        outcomes.append(outcome)
        state = "survived" if outcome.survived else "LOST"
        print(f"{number + 1:>4} {config:<16} {kind:<10} {outcome.blows} blows: {state} {outcome.said}", flush=True)
    return outcomes, {config: seconds for config, (_, _, seconds) in wanted.items()}


def summary(outcomes: Sequence[Outcome]) -> str:
    """A table of what was tried and what survived, configs by kinds."""
    kinds = list(dict.fromkeys(o.kind for o in outcomes))
    tried = Counter((o.config, o.kind) for o in outcomes)
    survived = Counter((o.config, o.kind) for o in outcomes if o.survived)
    lines = ["| config | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for config in dict.fromkeys(o.config for o in outcomes):
        cells = [f"{survived[config, kind]} of {tried[config, kind]}" for kind in kinds]
        lines.append(f"| {config} | " + " | ".join(cells) + " |")
    total, blows = sum(survived.values()), sum(o.blows for o in outcomes)
    return "\n".join([*lines, "", f"{total} of {len(outcomes)} runs survived {blows} blows."])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 1 if a run was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--only", nargs="+", default=configs(), choices=configs(), metavar="CONFIG")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        outcomes, seconds = search(options.runs, options.only, options.kinds, options.seed, Path(folder))
    print(summary(outcomes))
    if options.json is not None:
        record = {"seconds": seconds, "outcomes": [o._asdict() for o in outcomes]}
        options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return int(any(not o.survived for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
