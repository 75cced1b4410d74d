"""Trajectories against NumPy's SVD, curves between solutions, and files for ParaView read back."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dualgap_jax as dg
from dualgap_jax import landscape
from dualgap_jax.config import ConfigError
from dualgap_jax.networks import InMemory, mlp, multi_branch
from dualgap_jax.training import train


def flat(network: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(network.params)])


@pytest.fixture(scope="module")
def trained() -> Any:
    """A network, its loss and data, two solutions, and the snapshots of the first one's training."""
    net, loss = multi_branch(mlp((3,), 1), 4), dg.losses.binary_hinge()
    data = dg.data.synthetic_relu(n=64, seed=1)
    path: list[tuple[int, int, Any]] = []
    solutions = train(
        net,
        loss,
        data,
        optax.sgd(0.4),
        batch_size=16,
        max_steps=50,
        check_every=10,
        num_solutions=2,
        tolerance=0.0,
        snapshot=lambda *given: path.append(given),
    )
    return net, loss, data, solutions, path


def test_snapshots_are_the_networks_of_shorter_runs(trained: Any) -> None:
    net, loss, data, solutions, path = trained
    for k in (0, 1):
        own = [(steps, network) for solution, steps, network in path if solution == k]
        assert [steps for steps, _ in own] == [0, 10, 20, 30, 40, 50]
        np.testing.assert_array_equal(flat(own[-1][1]), flat(solutions[k].network))
    shorter = train(
        net, loss, data, optax.sgd(0.4), batch_size=16, max_steps=20, check_every=10, num_solutions=2, tolerance=0.0
    )
    np.testing.assert_array_equal(flat(path[4][2]), flat(shorter[0].network))
    with pytest.raises(ConfigError, match="streamed"):
        train(net, loss, data, optax.sgd(0.4), max_steps=1, batch_size=16, streaming="on", snapshot=print)


def test_a_trajectory_is_the_principal_components_of_numpy(trained: Any, rng: np.random.Generator) -> None:
    networks = [network for solution, _, network in trained[-1] if solution == 0]
    found = landscape.trajectory(networks)
    vectors = np.asarray([flat(network) for network in networks])
    away = vectors - vectors[-1]
    _, values, right = np.linalg.svd(away[:-1], full_matrices=False)
    np.testing.assert_allclose(found.explained, values**2 / (values**2).sum(), atol=1e-9)
    signs = np.sign(found.coordinates[0] / (away[0] @ right[:2].T))
    np.testing.assert_allclose(found.coordinates, away @ right[:2].T * signs, atol=1e-6)
    assert (found.coordinates[0] > 0).all()
    block = found.plane.whole()
    for axis, direction in enumerate(block.params[1:]):
        np.testing.assert_allclose(flat(InMemory(direction)), right[axis] * signs[axis], atol=1e-5)
    np.testing.assert_array_equal(flat(InMemory(block.params[0])), vectors[-1])
    # The plane is one of those that surfaces are drawn on.
    net, loss, data, *_ = trained
    value = landscape.evaluate_points(net, loss, data, found.plane, np.zeros((1, 2)))
    np.testing.assert_allclose(value[0], dg.evaluate(net, loss, data, networks[-1]).loss, rtol=1e-5)


def test_snapshots_that_span_no_plane_are_refused(trained: Any) -> None:
    networks = [network for solution, _, network in trained[-1] if solution == 0]
    line = [InMemory(jax.tree.map(lambda a, s=s: s * a, networks[0].params)) for s in (1.0, 2.0, 3.0)]
    for wrong in (line, [networks[0]] * 3, [InMemory(jax.tree.map(lambda a: a * jnp.nan, networks[0].params))] * 3):
        with pytest.raises(landscape.DegeneratePlaneError):
            landscape.trajectory(wrong)
    with pytest.raises(ValueError, match="at least three snapshots"):
        landscape.trajectory(networks[:2])
    with pytest.raises(TypeError):
        landscape.trajectory([networks[0].params] * 3)


def test_a_curve_lies_lower_than_the_segment_and_its_losses_are_those_of_its_networks(trained: Any) -> None:
    net, loss, data, solutions, _ = trained
    a, b = (s.network for s in solutions)
    found = landscape.curve(net, loss, data, a, b, steps=150, optimizer=optax.adam(0.02), batch_size=16, points=11)
    assert found.losses.max() < found.straight.max()
    assert found.barrier < found.straight_barrier
    ends = [dg.evaluate(net, loss, data, network).loss for network in (a, b)]
    for losses in (found.losses, found.straight):
        np.testing.assert_allclose(losses[[0, -1]], ends, rtol=1e-5, atol=1e-7)
    theta = found.plane.sources[1].read(0, 4)[0]
    for t, value in ((0.3, found.losses[3]), (0.7, found.losses[7])):
        params = jax.tree.map(
            lambda p, m, q, t=t: (1 - t) ** 2 * p + 2 * t * (1 - t) * m + t**2 * q, a.params, theta, b.params
        )
        np.testing.assert_allclose(dg.evaluate(net, loss, data, InMemory(params)).loss, value, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="steps must be a positive integer, got 0"):
        landscape.curve(net, loss, data, a, b, steps=0)
    # A clipping that binds is that of each branch's own control point.
    clip = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    theta = (
        landscape.curve(net, loss, data, a, b, steps=1, optimizer=clip, batch_size=16, points=3)
        .plane.sources[1]
        .read(0, 4)[0]
    )
    moved = jax.tree.map(lambda m, p, q: np.asarray(m - (p + q) / 2).reshape(4, -1), theta, a.params, b.params)
    norms = np.linalg.norm(np.concatenate(jax.tree.leaves(moved), axis=1), axis=1)
    np.testing.assert_allclose(norms, 1e-3, rtol=1e-2)
    with pytest.raises(ValueError, match="two ends of a curve differ"):
        landscape.curve(net, loss, data, a, InMemory((a.params[0],)))


def arrays(path: Path, kind: str) -> dict[str, np.ndarray]:
    """The arrays of a VTK XML file, as its format is described: base64 of a UInt64 number of bytes, and the bytes."""
    file = ET.parse(path).getroot()
    assert (file.tag, file.get("type"), file.get("byte_order")) == ("VTKFile", kind, "LittleEndian")
    types = {"Float64": "<f8", "Int64": "<i8", "UInt8": "u1"}
    found = {}
    for group in file[0][0]:
        for array in group:
            raw = base64.b64decode(array.text or "")
            assert int.from_bytes(raw[:8], "little") == len(raw) - 8
            values = np.frombuffer(raw[8:], types[array.attrib["type"]])
            found[f"{group.tag}.{array.get('Name')}"] = values.reshape(-1, int(array.get("NumberOfComponents", "1")))
    return found


def test_a_surface_is_read_back_from_a_structured_grid(tmp_path: Path, rng: np.random.Generator) -> None:
    xs, ys, loss = np.linspace(-1, 1, 4), np.linspace(0, 3, 3), rng.standard_normal((3, 4))
    loss[1, 2], loss[0, 0] = np.nan, np.inf
    landscape.save_vts(tmp_path / "a.vts", landscape.Surface(xs, ys, loss))
    grid = ET.parse(tmp_path / "a.vts").getroot()[0]
    assert grid.get("WholeExtent") == grid[0].get("Extent") == "0 3 0 2 0 0"
    found = arrays(tmp_path / "a.vts", "StructuredGrid")
    np.testing.assert_array_equal(found["PointData.loss"].reshape(3, 4), loss)
    points = found["Points.Points"].reshape(3, 4, 3)
    for j, i in np.ndindex(3, 4):
        assert tuple(points[j, i, :2]) == (xs[i], ys[j])
    hidden = found["PointData.vtkGhostType"].reshape(3, 4) == 2
    np.testing.assert_array_equal(hidden, ~np.isfinite(loss))
    np.testing.assert_array_equal(points[..., 2], np.where(hidden, loss[~hidden].min(), loss))
    with pytest.raises(ValueError, match="must end in"):
        landscape.save_vts(tmp_path / "a.vtk", landscape.Surface(xs, ys, loss))


def test_masked_losses_are_hidden_and_what_is_no_surface_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    xs, ys, loss = np.linspace(-1, 1, 4), np.linspace(0, 3, 3), rng.standard_normal((3, 4))
    mask = loss > 0
    masked = np.ma.masked_array(np.where(mask, 1e20, loss), mask)
    landscape.save_vts(tmp_path / "a.vts", landscape.Surface(xs, ys, masked))
    found = arrays(tmp_path / "a.vts", "StructuredGrid")
    np.testing.assert_array_equal(found["PointData.loss"].reshape(3, 4), np.where(mask, np.nan, loss))
    np.testing.assert_array_equal(found["PointData.vtkGhostType"].reshape(3, 4) == 2, mask)
    for wrong, words in ((loss + 1j, "complex"), (loss.T, "ny, nx")):
        with pytest.raises(ValueError, match=words):
            landscape.save_vts(tmp_path / "b.vts", landscape.Surface(xs, ys, wrong))
    points = np.stack([xs, xs], axis=1)
    landscape.save_vtp(tmp_path / "a.vtp", points, masked[0])
    np.testing.assert_array_equal(
        arrays(tmp_path / "a.vtp", "PolyData")["PointData.loss"].ravel(), np.where(mask[0], np.nan, loss[0])
    )
    with pytest.raises(ValueError, match="finite coordinates"):
        landscape.save_vtp(tmp_path / "b.vtp", np.ma.masked_array(points, points > 0), loss[0])
    assert not (tmp_path / "b.vts").exists()
    assert not (tmp_path / "b.vtp").exists()


def test_points_and_their_line_are_read_back(tmp_path: Path, rng: np.random.Generator) -> None:
    points, loss = rng.standard_normal((5, 2)), rng.standard_normal(5)
    landscape.save_vtp(tmp_path / "a.vtp", points, loss)
    found = arrays(tmp_path / "a.vtp", "PolyData")
    np.testing.assert_array_equal(found["Points.Points"], np.column_stack([points, loss]))
    np.testing.assert_array_equal(found["Lines.connectivity"].ravel(), np.arange(5))
    np.testing.assert_array_equal(found["Lines.offsets"].ravel(), [5])
    landscape.save_vtp(tmp_path / "b.vtp", points, loss, line=False)
    assert "Lines.offsets" not in arrays(tmp_path / "b.vtp", "PolyData")
    for wrong in ((points[:, :1], loss), (points[:0], loss[:0])):
        with pytest.raises((ValueError, TypeError)):
            landscape.save_vtp(tmp_path / "c.vtp", *wrong)
