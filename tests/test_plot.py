"""`dg.plot`: surfaces of one's own as pictures, with and without solutions, with holes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dualgap_jax as dg


def bowl(nx: int = 9, ny: int = 7) -> SimpleNamespace:
    xs, ys = np.linspace(-1, 1, nx), np.linspace(-2, 2, ny)
    return SimpleNamespace(xs=xs, ys=ys, loss=xs[None, :] + 3 * ys[:, None])


ANCHORS = SimpleNamespace(anchors=np.asarray([[0.1, 0.3], [-0.55, 1.1], [5.0, 0.0]]))


@pytest.mark.parametrize("plane", [None, ANCHORS])
def test_a_picture_of_any_surface(plane: Any, tmp_path: Path) -> None:
    figure = dg.plot.surface(bowl(), plane=plane, title="A title")
    solid, flat = figure.axes[:2]
    assert len(solid.collections[0].get_array()) == 8 * 6
    assert {t.get_text() for t in figure.texts} >= {"A title"}
    marks = [t.get_text() for t in flat.texts]
    assert marks == ([] if plane is None else ["0", "1", "2"])
    assert any("Outside the window: solution 2" in t.get_text() for t in figure.texts) == (plane is not None)
    assert figure._repr_png_().startswith(b"\x89PNG")  # what a notebook asks for
    figure.savefig(tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 10_000


def test_losses_that_are_not_finite_are_said() -> None:
    surface = bowl()
    surface.loss[2, 3] = np.nan
    assert any("not finite" in t.get_text() for t in dg.plot.surface(surface).texts)


def test_masked_losses_are_holes_and_complex_ones_refused() -> None:
    surface = bowl()
    surface.loss = np.ma.masked_array(surface.loss, surface.loss > 3)
    np.testing.assert_array_equal(np.isnan(dg.plot._checked(surface, None)["loss"]), surface.loss.mask)
    surface.loss = bowl().loss + 1j
    with pytest.raises(TypeError, match="complex"):
        dg.plot.surface(surface)


def test_an_interactive_figure_has_the_losses_and_the_solutions(tmp_path: Path) -> None:
    figure = dg.plot.interactive(bowl(), plane=ANCHORS, title="A title")
    sheet, marks = figure.data
    np.testing.assert_allclose(np.asarray(sheet.z, float), bowl().loss)
    np.testing.assert_allclose(np.asarray(marks.z[:2], float), [0.1 + 0.9, -0.55 + 3.3])  # linear, so exact
    assert marks.z[2] is None
    figure.write_html(tmp_path / "s.html")
    assert "Plotly.newPlot" in (tmp_path / "s.html").read_text(encoding="utf-8")
    (sheet, marks) = dg.plot.interactive(bowl()).data
    assert len(marks.x) == 0


def test_a_corner_beside_a_hole_keeps_its_loss() -> None:
    surface = bowl()
    surface.loss[1, 1] = np.inf
    at_corner = SimpleNamespace(anchors=np.asarray([[-1.0, -2.0], [1.0, 2.0], [0.0, 0.0]]))
    heights = dg.plot._checked(surface, at_corner)["heights"]
    np.testing.assert_allclose(heights, [-7.0, 7.0, 0.0], atol=1e-12)


@pytest.mark.parametrize("function", ["surface", "interactive"])
def test_what_is_no_surface_is_refused(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = getattr(dg.plot, function)
    with pytest.raises(TypeError, match=r"as dg\.surface returns it; got ndarray"):
        draw(np.ones((3, 3)))
    wrong = bowl()
    wrong.loss = wrong.loss.T
    with pytest.raises(ValueError, match=r"loss \(9, 7\) must be \[ny, nx\]"):
        draw(wrong)
    wrong = bowl()
    wrong.xs = wrong.xs[::-1]
    with pytest.raises(ValueError, match="increasing"):
        draw(wrong)
    wrong = bowl()
    wrong.loss[0, 0] = -1e308
    with pytest.raises(ValueError, match="beyond 1e\\+307"):
        draw(wrong)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    if function == "interactive":
        with pytest.raises(ImportError, match=r"dualgap_jax\[report\]"):
            draw(bowl())
