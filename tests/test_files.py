"""Files: whole or none, known by their digest, with numbers that are not finite kept."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dualgap_jax import checkpoints, data, experiments, figures, files, report
from dualgap_jax.config import ConfigError, experiment_config
from dualgap_jax.experiments import TABLES
from dualgap_jax.experiments.certify_run import certify_run
from dualgap_jax.experiments.landscape import LandscapeSpec
from dualgap_jax.experiments.linear_dual import load_solution
from dualgap_jax.files import (
    DamagedFileError,
    load_json,
    load_npz,
    read_record,
    remove_temporary,
    save_json,
    save_npz,
)
from dualgap_jax.losses import LOSSES
from dualgap_jax.metrics import Metrics
from dualgap_jax.networks import mlp, multi_branch
from dualgap_jax.training import train
from dualgap_jax.workdir import Workdir


class Score(NamedTuple):
    value: float
    unit: str


@dataclasses.dataclass(frozen=True)
class Summary:
    score: Score
    best: np.floating


def strict(text: str) -> Any:
    """JSON without Python's extensions NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its content (None for folders)."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# --- JSON and npz -----------------------------------------------------------------------------------------------------


def test_json_holds_numpy_jax_tuples_and_records(tmp_path: Path) -> None:
    value = {
        "f32": np.float32(0.1),
        "i": np.int64(3),
        "b": np.bool_(True),
        "array": np.arange(6).reshape(2, 3),
        "jax": jnp.asarray([1.5, 2.5], jnp.bfloat16),
        "scalar": jnp.asarray(7),
        "summary": Summary(Score(0.25, "loss"), np.float64(2.0)),
        "tuple": (1, (2, 3)),
        "path": Path("a/b"),
        "text": "τ",
        3: None,
    }
    save_json(tmp_path / "deep" / "x.json", value)
    assert load_json(tmp_path / "deep" / "x.json") == {
        "f32": float(np.float32(0.1)),
        "i": 3,
        "b": True,
        "array": [[0, 1, 2], [3, 4, 5]],
        "jax": [1.5, 2.5],
        "scalar": 7,
        "summary": {"score": {"value": 0.25, "unit": "loss"}, "best": 2.0},
        "tuple": [1, [2, 3]],
        "path": "a/b",
        "text": "τ",
        "3": None,
    }


def test_numbers_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    value = {"a": float("nan"), "b": [np.inf, 1.0], "c": np.array([[-np.inf, 2.0]]), "d": np.float32("nan"), "e": None}
    save_json(tmp_path / "x.json", value)
    written = strict((tmp_path / "x.json").read_text())
    assert written["b"] == [{"$float": "inf"}, 1.0]
    found = load_json(tmp_path / "x.json")
    assert math.isnan(found["a"])
    assert math.isnan(found["d"])
    assert (found["b"], found["c"], found["e"]) == ([math.inf, 1.0], [[-math.inf, 2.0]], None)


@pytest.mark.parametrize("bad", [[1, 2], "text", 3, None, {"sha256": "mine"}])
def test_a_record_is_an_object(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(TypeError, match="a record is an object"):
        save_json(tmp_path / "x.json", bad)
    with pytest.raises(TypeError, match="may be called 'sha256'"):
        save_npz(tmp_path / "x.npz", sha256=np.zeros(1))
    assert listing(tmp_path) == {}


def test_text_that_is_no_utf8_is_kept(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \xcf\x84")
    save_json(tmp_path / "x.json", {"path": name})
    assert load_json(tmp_path / "x.json") == {"path": name}
    strict((tmp_path / "x.json").read_text(encoding="utf-8"))


def mutations(content: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """A file with a digit or a byte changed, cut, emptied, lengthened or replaced."""
    digits = [i for i, byte in enumerate(content) if byte in b"0123456789"]
    for at in rng.choice(digits, min(40, len(digits)), replace=False):
        yield content[:at] + str((int(chr(content[at])) + 1) % 10).encode() + content[at + 1 :]
    for at in rng.integers(0, len(content), 40):
        yield content[:at] + bytes([content[at] ^ (1 << int(rng.integers(8)))]) + content[at + 1 :]
    for at in rng.integers(0, len(content), 10):
        yield content[:at]
    yield from (b"", b"null", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b"0" * 10_000)


def test_whatever_is_changed_in_a_file_is_found_or_changes_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    value = {"distance": rng.normal(), "rows": [{"n": n, "x": rng.normal(), "bad": np.nan} for n in range(5)], "t": "τ"}
    arrays = {"x": rng.normal(size=7), "n": np.arange(3), "t": np.array("name")}
    save_json(tmp_path / "x.json", value)
    save_npz(tmp_path / "x.npz", **arrays)
    for name, load in (("x.json", load_json), ("x.npz", load_npz)):
        path = tmp_path / name
        sound, said = path.read_bytes(), []
        want = repr(load(path))
        for content in mutations(sound, rng):
            path.write_bytes(content)
            try:
                assert repr(load(path)) == want
            except DamagedFileError as error:
                said.append(str(error))
        assert len(said) > 40
        assert all(str(path) in text for text in said)
        path.unlink()
        path.mkdir()
        with pytest.raises(DamagedFileError, match="not a readable"):
            load(path)


def test_an_archive_written_again_with_another_number_is_found(tmp_path: Path) -> None:
    save_npz(tmp_path / "x.npz", x=np.arange(4.0), y=np.arange(2))
    with np.load(tmp_path / "x.npz") as archive:
        arrays = dict(archive)
    for changed in (
        arrays | {"x": np.array([0.0, 1.0, 2.0, 3.5])},
        arrays | {"x": arrays["x"].astype(np.float32)},
        {k: v for k, v in arrays.items() if k != "y"},
        {k: v for k, v in arrays.items() if k != "sha256"},
        arrays | {"x": arrays["x"][None]},
    ):
        np.savez(tmp_path / "x.npz", **changed)
        with pytest.raises(DamagedFileError, match="digest"):
            load_npz(tmp_path / "x.npz")


def test_a_record_that_is_read_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no record .*x\.json; run the experiment"):
        read_record(tmp_path / "x.json")
    save_json(tmp_path / "x.json", {"a": 1})
    assert read_record(tmp_path / "x.json", ["a"]) == {"a": 1}
    with pytest.raises(ValueError, match="lacks b, c; needed: a, b, c"):
        read_record(tmp_path / "x.json", ["a", "b", "c"])
    save_npz(tmp_path / "x.npz", a=1)
    assert read_record(tmp_path / "x.npz", ["a"])["a"] == 1


def test_what_lies_at_the_name_of_a_temporary_file_is_not_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "precious").write_text("mine")
    monkeypatch.setattr(files, "_counter", itertools.count(7))
    (tmp_path / f".x.json.{os.getpid()}-7.tmp").symlink_to(tmp_path / "precious")
    save_json(tmp_path / "x.json", {"a": 1})
    assert (tmp_path / "precious").read_text() == "mine"
    assert load_json(tmp_path / "x.json") == {"a": 1}
    assert not (tmp_path / "x.json").is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"precious", "x.json"}


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    files.write_atomically(pipe, lambda file: file.write(b"text"))
    reader.join(timeout=10)
    assert read == [b"text"]
    assert pipe.is_fifo()


def test_stale_temporary_files_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".x.json.123-0.tmp").symlink_to(tmp_path / "precious")
    (tmp_path / ".x.npz.77-3.tmp").write_text("half")
    remove_temporary([tmp_path, tmp_path / "no such folder"])
    assert listing(tmp_path) == {"precious": b"mine"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": {1, 2}}}, r"value\.a\.b is a set"),
        ({"a": [0, b"x"]}, r"value\.a\[1\] is a bytes"),
        ({"a": 1j}, r"value\.a is a complex"),
        ({(1, 2): 0}, r"key \(1, 2\)"),
        ({"a": {"$float": 1}}, r"value\.a has the key '\$float'"),
        ({"f": test_numbers_that_are_not_finite_are_kept}, r"value\.f is a function"),
    ],
)
def test_what_json_cannot_hold_is_named_and_the_old_file_stays(tmp_path: Path, value: Any, message: str) -> None:
    save_json(tmp_path / "x.json", {"a": 1})
    before = listing(tmp_path)
    with pytest.raises(TypeError, match=message):
        save_json(tmp_path / "x.json", value)
    assert listing(tmp_path) == before


def test_npz_keeps_every_bit(tmp_path: Path, rng: np.random.Generator) -> None:
    loss = rng.normal(size=(3, 5))
    loss[1, 2], loss[0, 0], loss[2, 4] = np.nan, np.inf, -0.0
    arrays = {"loss": loss, "done": loss > 0, "xs": rng.normal(size=5).astype(np.float32), "n": np.int32(4)}
    save_npz(tmp_path / "r" / "x.npz", **arrays, device=jnp.arange(3))
    got = load_npz(tmp_path / "r" / "x.npz")
    assert set(got) == {*arrays, "device"}
    for name, want in arrays.items():
        assert (got[name].dtype, got[name].shape) == (np.asarray(want).dtype, np.asarray(want).shape)
        assert got[name].tobytes() == np.asarray(want).tobytes()
    np.testing.assert_array_equal(got["device"], [0, 1, 2])


def test_npz_refuses_what_it_would_lose(tmp_path: Path) -> None:
    for bad in (np.array([None]), jnp.zeros(3, jnp.bfloat16)):
        with pytest.raises(TypeError, match="'bad' has dtype"):
            save_npz(tmp_path / "x.npz", bad=bad)
    assert listing(tmp_path) == {}


def test_damaged_files_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    (tmp_path / "x.json").write_text('{"a": 1')
    with pytest.raises(ValueError, match=r"x\.json is not a readable JSON record"):
        load_json(tmp_path / "x.json")
    save_npz(tmp_path / "x.npz", a=rng.normal(size=1000))
    whole = (tmp_path / "x.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[: len(whole) // 2], bytes(flipped), b"", b"text"):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz is not a readable npz file"):
            load_npz(tmp_path / "x.npz")
    for load in (load_json, load_npz):
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "missing")


def test_a_write_that_fails_halfway_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_npz(tmp_path / "x.npz", a=np.arange(3))
    before = listing(tmp_path)

    def torn(file: io.BytesIO, **kwargs: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", torn)
    with pytest.raises(OSError, match="No space"):
        save_npz(tmp_path / "x.npz", a=np.arange(9))
    assert listing(tmp_path) == before


def test_a_reader_sees_the_old_or_the_new_file_and_never_a_part(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    save_json(path, {"values": [0] * 20_000})
    seen, stop = [], threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.append(set(load_json(path)["values"]))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(1, 15):
        save_json(path, {"values": [i] * 20_000})
    stop.set()
    reader.join()
    assert seen
    assert all(len(values) == 1 for values in seen)


REMOTE = "gs://my-bucket/x"
NET = multi_branch(mlp((2,), 1), 2)
DATA = (np.arange(6.0).reshape(3, 2), np.array([1, -1, 1]))


@pytest.mark.parametrize(
    "use",
    [
        lambda path: experiments.run(experiment_config("landscape", LandscapeSpec()), workdir=path),
        lambda path: experiments.run(experiment_config("landscape", LandscapeSpec()), root=path),
        lambda path: train(NET, LOSSES["squared"](), DATA, optax.sgd(0.1), max_steps=1, checkpoints=path),
        lambda path: checkpoints.load(path),
        lambda path: checkpoints.Checkpointer(path),
        lambda path: Workdir.open(path, {"experiment": "landscape"}),
        lambda path: Workdir.follow(path, {"experiment": "landscape"}),
        lambda path: report.write([path], "report.html"),
        lambda path: report.write(["."], f"{path}/report.html"),
        lambda path: report.table_csv([path]),
        lambda path: figures.draw(path),
        lambda path: certify_run(path, TABLES, print),
        lambda path: load_solution(path),
        lambda path: data.own(path=str(path) + "/a.csv"),
        lambda path: Metrics(path),
        lambda path: files.save_json(f"{path}/a.json", {}),
        lambda path: files.load_json(f"{path}/a.json"),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_remote_place_is_refused_and_no_folder_here(
    use: Callable[[Any], Any], kind: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"gs://my-bucket/x.* is remote; data and results"):
        use(kind(REMOTE))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_in_the_place_of_a_folder_of_checkpoints_is_named(below: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    place = file / below
    with pytest.raises(ConfigError, match=rf"the folder of checkpoints cannot be .*: {file} is a file"):
        train(NET, LOSSES["squared"](), DATA, optax.sgd(0.1), max_steps=1, checkpoints=place)
    with pytest.raises(ConfigError, match="is a file"):
        checkpoints.Checkpointer(place)
    assert file.read_text() == "kept"


@pytest.mark.parametrize("given", ["a:/b", "runs/a:/b", "run:1/x", "/tmp/x", "x"])
def test_paths_of_this_machine_are_taken_as_they_are(given: str) -> None:
    assert files.local_path(given) == files.local_path(Path(given)) == Path(given)
