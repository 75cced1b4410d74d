"""Loss surfaces: the loss over a grid of a plane, and along the edges between the networks that span it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from dualgap_jax.convexity.grids import real
from dualgap_jax.landscape.planes import Plane
from dualgap_jax.landscape.points import evaluate_points
from dualgap_jax.sizes import positive
from dualgap_jax.types import Network


class Surface(NamedTuple):
    """The mean loss over a grid of a plane.

    Attributes:
      xs: `[nx]` coordinates along u.
      ys: `[ny]` coordinates along v.
      loss: `[ny, nx]` mean loss over the data set; NaN and infinities are kept.
    """

    xs: Float[np.ndarray, " nx"]
    ys: Float[np.ndarray, " ny"]
    loss: Float[np.ndarray, "ny nx"]


class Survey(NamedTuple):
    """A surface and what belongs to it, from one evaluation.

    Attributes:
      surface: the loss over the grid.
      edge_t: `[t]` in [0, 1], from one solution to the next.
      edge_loss: `[3, t]` along the edges 0-1, 1-2 and 2-0.  Its first column is the loss at the three solutions (of
        networks with running statistics, with these estimated anew there too).
    """

    surface: Surface
    edge_t: Float[np.ndarray, " t"]
    edge_loss: Float[np.ndarray, "3 t"]


def _grid(xs: Any, ys: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The axes in float64 and the points `[ny nx, 2]` of the grid, row by row."""
    xs, ys = real(xs), real(ys)
    if xs.ndim != 1 or ys.ndim != 1 or not xs.size or not ys.size:
        raise ValueError(f"xs and ys must be non-empty vectors, got shapes {xs.shape} and {ys.shape}.")
    return xs, ys, np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)


def _along_edges(plane: Plane, num_points: Any) -> tuple[np.ndarray, np.ndarray]:
    """`t [num_points]`, and the points `[3 num_points, 2]` on the edges 0-1, 1-2 and 2-0."""
    if len(plane.anchors) != 3:
        raise ValueError(f"edges need a plane through three solutions; this one has {len(plane.anchors)} anchor(s).")
    num_points = positive(num_points, "the number of points along an edge")
    if num_points < 2:
        raise ValueError("an edge has two ends: give two points along it, or more.")
    t = np.linspace(0.0, 1.0, num_points)
    ends = [(plane.anchors[k], plane.anchors[(k + 1) % 3]) for k in range(3)]
    return t, np.concatenate([(1 - t)[:, None] * p + t[:, None] * q for p, q in ends])


def evaluate(
    net: Network,
    loss: Any,
    dataset: Any,
    plane: Plane,
    xs: Float[np.ndarray, " nx"],
    ys: Float[np.ndarray, " ny"],
    **options: Any,
) -> Surface:
    """The loss surface over the grid `xs x ys` of a plane.

    Args:
      net, loss, dataset, plane: what is evaluated, and where; see `evaluate_points`.
      xs: `[nx]` coordinates along u.
      ys: `[ny]` coordinates along v.
      options: as in `evaluate_points`.

    Returns:
      A `Surface` whose `loss[j, i]` is the mean loss over the data set at `origin + xs[i] u + ys[j] v`.

    Raises:
      ValueError: if xs or ys is not a non-empty vector of numbers, and as `evaluate_points` does.
    """
    xs, ys, grid = _grid(xs, ys)
    values = evaluate_points(net, loss, dataset, plane, grid, **options).reshape(len(ys), len(xs))
    return Surface(xs, ys, values)


def edges(
    net: Network, loss: Any, dataset: Any, plane: Plane, *, num_points: int = 25, **options: Any
) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, "3 t"]]:
    """The loss along the straight edges between solutions 0-1, 1-2 and 2-0.

    Args:
      net, loss, dataset, plane: what is evaluated, and where; see `evaluate_points`.
      num_points: points along each edge, both ends among them.
      options: as in `evaluate_points`.

    Returns:
      `t [num_points]` in [0, 1] and the losses `[3, num_points]`.

    Raises:
      ValueError: for a plane that is not through three solutions, fewer than two points along an edge, and as
        `evaluate_points` does.
    """
    t, points = _along_edges(plane, num_points)
    return t, evaluate_points(net, loss, dataset, plane, points, **options).reshape(3, num_points)


def survey(
    net: Network,
    loss: Any,
    dataset: Any,
    plane: Plane,
    xs: Float[np.ndarray, " nx"],
    ys: Float[np.ndarray, " ny"],
    *,
    edge_points: int = 25,
    **options: Any,
) -> Survey:
    """`evaluate` and `edges` at once: one pass over the parameters, and one first layer, serve both.

    Raises:
      ValueError: as `evaluate` and `edges` do.
    """
    xs, ys, grid = _grid(xs, ys)
    t, along = _along_edges(plane, edge_points)
    values = evaluate_points(net, loss, dataset, plane, np.concatenate([along, grid]), **options)
    surface = Surface(xs, ys, values[len(along) :].reshape(len(ys), len(xs)))
    return Survey(surface, t, values[: len(along)].reshape(3, edge_points))
