"""Runs that are killed, stopped, damaged and starved at random, and whether they end as if nothing had happened.

    python tests/faults.py --runs 300
    python tests/faults.py --runs 10 --only figure3 table1 --kinds kill damage --json faults.json

Each run of a config at smoke size is struck up to three times, and then goes on to its end:

    kill       SIGKILL at a random moment
    terminate  SIGTERM; exit status 143
    interrupt  Ctrl-C; exit status 130
    damage     SIGKILL, and a byte of one of its files is changed, or the file is cut, emptied or deleted
    disk       its folder lies on a disk (a tmpfs) that is too small, or becomes read-only at a random moment
    limit      it may write no file above some size, or open few files
    memory     it may take some address space only
    company    in another container (other process ids, another host name) the same command is given meanwhile

It has survived when its report, its results and its pictures are, byte for byte, those of a run that was left alone,
and when what it met was said in words: no traceback, and status 2 where it could not go on.  `disk` and `company` need
the right to mount and to make namespaces, and are refused without.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT, "damage": signal.SIGKILL}
KINDS = (*SIGNALS, "disk", "limit", "memory", "company")
STATUS = {"terminate": 143, "interrupt": 130}
_PATIENCE = 900  # seconds for a run that is left alone
_PLENTY = "8g"  # of a small disk, once it is replaced by a large one
# A program of its own processes and host name, as a container has them.
_CONTAINER = ("unshare", "--fork", "--pid", "--mount-proc", "--uts", "--kill-child", "bash", "-c")


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


def start(config: str, workdir: Path, cache: Path, limits: str = "", container: bool = False) -> subprocess.Popen[str]:
    """A run at smoke size, in a process group of its own.

    Args:
      config: which.
      workdir: its folder.
      cache: of compiled programs.
      limits: arguments of `ulimit`.
      container: whether under another host name, among other process ids.
    """
    # A background job may inherit that interrupts are ignored.
    entry = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    entry += "sys.argv = sys.argv[1:]; import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", entry, "scripts/run.py", f"--config=configs/{config}.py:smoke"]
    command.append(f"--workdir={workdir}")
    if limits:
        command = ["bash", "-c", f'ulimit {limits}; exec "$@"', "bash", *command]
    if container:
        command = [*_CONTAINER, 'hostname elsewhere; exec "$@"', "bash", *command]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return subprocess.Popen(
        command,
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


class Blow(NamedTuple):
    """What a run met.

    Attributes:
      what: in words; empty: the run was over before.
      complaint: what was not as it should be, if anything.
    """

    what: str
    complaint: str = ""


Strike = Callable[[str, Path, Path, float, random.Random], Blow]  # config, workdir, cache, seconds left alone, draws


def by_signal(kind: str, config: str, workdir: Path, cache: Path, seconds: float, rng: random.Random) -> Blow:
    """A run that gets a signal at a random moment, and where asked for a damaged file."""
    with start(config, workdir, cache) as process:
        try:
            process.communicate(timeout=rng.uniform(0.05, 1.05) * seconds)
            return Blow("")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, SIGNALS[kind])
            _, err = process.communicate(timeout=_PATIENCE)
    # Once all is done the interpreter takes itself apart, and the signal's own end is 128 + its number in a shell.
    ends = {STATUS[kind], 0} | ({-SIGNALS[kind]} if "] done in " in err else set()) if kind in STATUS else set()
    if ends and process.returncode not in ends:
        return Blow(kind, f"exit status {process.returncode}, not {STATUS[kind]}: {err[-300:]}")
    return Blow(damage(workdir, rng) if kind == "damage" and workdir.exists() else kind)


def by_disk(config: str, workdir: Path, cache: Path, seconds: float, rng: random.Random) -> Blow:
    """A run on a disk of a random size, or one that becomes read-only."""
    if rng.random() < 0.3:
        remount(workdir.parent, _PLENTY)
        with start(config, workdir, cache) as process:
            try:
                process.communicate(timeout=rng.uniform(0.05, 1.0) * seconds)
                return Blow("")
            except subprocess.TimeoutExpired:
                # While a file is open for writing the system refuses; then the run is left alone.
                done = subprocess.run(
                    ["mount", "-o", "remount,ro", str(workdir.parent)], check=False, stderr=subprocess.DEVNULL
                )
                _out, err = process.communicate(timeout=_PATIENCE)
        subprocess.run(["mount", "-o", "remount,rw", str(workdir.parent)], check=True)
        return refusal("read-only", process.returncode, err) if done.returncode == 0 else Blow("read-only, refused")
    size = shutil.disk_usage(workdir.parent).used // 1024 + int(10 ** rng.uniform(1, 3.5))
    remount(workdir.parent, f"{size}k")
    with start(config, workdir, cache) as process:
        _, err = process.communicate(timeout=_PATIENCE)
    remount(workdir.parent, _PLENTY)
    return refusal(f"a disk of {size} kB", process.returncode, err)


def by_limit(config: str, workdir: Path, cache: Path, seconds: float, rng: random.Random) -> Blow:
    """A run that may write short files only, or open few."""
    del seconds
    limits = f"-f {int(10 ** rng.uniform(0, 3))}" if rng.random() < 0.7 else f"-n {rng.randint(8, 80)}"
    with start(config, workdir, cache, limits) as process:
        _, err = process.communicate(timeout=_PATIENCE)
    return refusal(f"ulimit {limits}", process.returncode, err)


def by_memory(config: str, workdir: Path, cache: Path, seconds: float, rng: random.Random) -> Blow:
    """A run that gets little memory.  Libraries that are refused it end a process, or hang, in ways of their own."""
    limits = f"-v {int(10 ** rng.uniform(6.0, 6.9))}"
    with start(config, workdir, cache, limits) as process:
        try:
            process.communicate(timeout=60 + 3 * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=_PATIENCE)
    return Blow(f"ulimit {limits}: status {process.returncode}")


def by_company(config: str, workdir: Path, cache: Path, seconds: float, rng: random.Random) -> Blow:
    """A run whose command is given a second time, in another container."""
    with start(config, workdir, cache) as process:
        try:
            process.communicate(timeout=rng.uniform(0.05, 1.0) * seconds)
            return Blow("")
        except subprocess.TimeoutExpired:
            with start(config, workdir, cache, container=True) as second:
                out, said = second.communicate(timeout=_PATIENCE)
            was_at_work = process.poll() is None
            _, err = process.communicate(timeout=_PATIENCE)
    if process.returncode not in (0, 2) or {process.returncode, second.returncode} == {2}:
        return Blow("company", f"exit status {process.returncode} and {second.returncode}: {err[-300:]} {said[-300:]}")
    # One that comes when all is done finds a complete run, while the first takes itself apart.
    if was_at_work and process.returncode == 0 and second.returncode != 2 and "Complete already" not in out + said:
        return Blow("company", f"two were at work, status {second.returncode}: {said[-300:]}")
    return refusal("company", max(process.returncode, second.returncode), said + err, "is at work in")


def refusal(what: str, status: int, err: str, words: str = "") -> Blow:
    """What a run that could not go on should say, and end with."""
    if "Traceback" in err or status not in (0, 2) or (status == 2 and words not in err):
        return Blow(what, f"exit status {status}: {err[-600:]}")
    return Blow(what)


STRIKES: dict[str, Strike] = {
    **{kind: functools.partial(by_signal, kind) for kind in SIGNALS},
    "disk": by_disk,
    "limit": by_limit,
    "memory": by_memory,
    "company": by_company,
}


def remount(folder: Path, size: str) -> None:
    """Gives a small disk another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own, in memory."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_PLENTY}", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def is_allowed(kind: str) -> bool:
    """Whether this process may do what the kind needs."""
    tries = {"disk": ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], "company": [*_CONTAINER, "hostname x"]}
    try:
        return kind not in tries or subprocess.run(tries[kind], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def struck(
    config: str, kind: str, seed: int, wanted: tuple[dict[str, str], str, float], folder: Path, cache: Path
) -> Outcome:
    """A run that is struck up to three times, and then left alone."""
    rng = random.Random(seed)
    parent = folder / f"{config}-{seed}"
    with small_disk(parent) if kind == "disk" else contextlib.nullcontext():
        return _struck(config, kind, seed, wanted, parent / "run", cache, rng)


def _struck(
    config: str,
    kind: str,
    seed: int,
    wanted: tuple[dict[str, str], str, float],
    workdir: Path,
    cache: Path,
    rng: random.Random,
) -> Outcome:
    blows: list[str] = []
    for _ in range(rng.randint(1, 3)):
        blow = STRIKES[kind](config, workdir, cache, wanted[2], rng)
        blows += [blow.what] if blow.what else []
        if blow.complaint:
            return Outcome(config, kind, len(blows), False, f"{'; '.join(blows)}: {blow.complaint}", seed)
        if not blow.what:
            break  # it was done before the blow
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
    return Outcome(config, kind, len(blows), True, after, seed)


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
        shutil.rmtree(folder / "struck", ignore_errors=True)
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
    if forbidden := [kind for kind in options.kinds if not is_allowed(kind)]:
        parser.error(f"this process may not do what {' and '.join(forbidden)} need; name other --kinds")
    with tempfile.TemporaryDirectory() as folder:
        outcomes, seconds = search(options.runs, options.only, options.kinds, options.seed, Path(folder))
    print(summary(outcomes))
    if options.json is not None:
        record = {"seconds": seconds, "outcomes": [o._asdict() for o in outcomes]}
        options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return int(any(not o.survived for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
