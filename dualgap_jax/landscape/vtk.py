"""Surfaces for ParaView: VTK's XML files, a structured grid (`.vts`) and points joined by lines (`.vtp`)."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dualgap_jax.convexity.grids import real
from dualgap_jax.files import local_path, write_atomically
from dualgap_jax.landscape.surfaces import Surface
from dualgap_jax.sizes import switch

_NAMES = {"f8": "Float64", "i8": "Int64", "u1": "UInt8"}
_HIDDEN = 2  # of vtkGhostType: a point that is not drawn


def save_vts(path: str | Path, surface: Surface) -> None:
    """A surface as a structured grid: x and y are plane coordinates, z is the loss, which is a point array too.

    Where the loss is masked or not finite the point is hidden, at the height of the lowest finite loss; the array keeps
    the loss, NaN for a masked one.

    Args:
      path: ends in `.vts`.
      surface: of `landscape.evaluate`.

    Raises:
      ValueError: for another ending, shapes that do not fit, or complex numbers.
    """
    xs, ys, loss = map(real, surface)
    if loss.shape != (*ys.shape, *xs.shape) or xs.ndim != 1 or ys.ndim != 1:
        raise ValueError(f"the loss must be [ny, nx] for xs {xs.shape} and ys {ys.shape}, got {loss.shape}.")
    finite = np.isfinite(loss)
    height = np.where(finite, loss, loss[finite].min(initial=np.inf) if finite.any() else 0.0)
    across, up = np.meshgrid(xs, ys)
    extent = f"0 {len(xs) - 1} 0 {len(ys) - 1} 0 0"  # x runs fastest
    ghosts = np.where(finite, 0, _HIDDEN).astype(np.uint8)
    piece = ET.Element("Piece", Extent=extent)
    _arrays(piece, "PointData", {"loss": loss.ravel(), "vtkGhostType": ghosts.ravel()}, Scalars="loss")
    _arrays(piece, "Points", {"Points": np.stack([across, up, height], axis=-1).reshape(-1, 3)})
    _write(path, ".vts", "StructuredGrid", piece, WholeExtent=extent)


def save_vtp(
    path: str | Path, points: Float[np.ndarray, "n 2"], loss: Float[np.ndarray, " n"], *, line: bool = True
) -> None:
    """Points on a surface (solutions, a trajectory, a curve) at the heights of their losses, and the line through them.

    Args:
      path: ends in `.vtp`.
      points: plane coordinates.
      loss: at each point; where it is masked (NaN) or not finite the point lies at 0, and the array keeps it.
      line: whether they are joined in their order.

    Raises:
      ValueError: for another ending, no points, shapes that do not fit, complex numbers, or points that are not finite.
    """
    points, loss = real(points), real(loss)
    if points.ndim != 2 or points.shape[1] != 2 or not len(points) or loss.shape != points.shape[:1]:
        raise ValueError(f"points must be [n, 2] and loss [n] with n >= 1, got {points.shape} and {loss.shape}.")
    if not np.isfinite(points).all():
        raise ValueError("points must be finite coordinates in the plane; leave out those that are not.")
    count = len(points)
    joined = switch(line, "line") and count > 1
    height = np.where(np.isfinite(loss), loss, 0.0)
    piece = ET.Element(
        "Piece", NumberOfPoints=str(count), NumberOfVerts=str(count), NumberOfLines=str(int(joined)), NumberOfStrips="0"
    )
    piece.set("NumberOfPolys", "0")
    _arrays(piece, "PointData", {"loss": loss}, Scalars="loss")
    _arrays(piece, "Points", {"Points": np.column_stack([points, height])})
    each = np.arange(count)
    _arrays(piece, "Verts", {"connectivity": each, "offsets": each + 1})
    if joined:
        _arrays(piece, "Lines", {"connectivity": each, "offsets": np.asarray([count])})
    _write(path, ".vtp", "PolyData", piece)


def _arrays(parent: ET.Element, tag: str, arrays: Mapping[str, np.ndarray], **attributes: str) -> None:
    """A group of arrays, each in base64 behind its number of bytes."""
    group = ET.SubElement(parent, tag, attributes)
    for name, array in arrays.items():
        data = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        given: dict[str, str] = {"type": _NAMES[data.dtype.str[1:]], "Name": name, "format": "binary"}
        if data.ndim > 1:
            given["NumberOfComponents"] = str(data.shape[1])
        text = base64.b64encode(np.uint64(data.nbytes).tobytes() + data.tobytes())
        ET.SubElement(group, "DataArray", given).text = text.decode()


def _write(path: str | Path, ending: str, kind: str, piece: ET.Element, **attributes: str) -> None:
    path = local_path(path)
    if path.suffix != ending:
        raise ValueError(f"ParaView knows the kind of a file by its ending: {path.name} must end in {ending}.")
    file = ET.Element("VTKFile", type=kind, version="1.0", byte_order="LittleEndian", header_type="UInt64")
    ET.SubElement(file, kind, attributes).append(piece)
    tree: Any = ET.ElementTree(file)
    write_atomically(path, lambda stream: tree.write(stream, encoding="utf-8", xml_declaration=True))
