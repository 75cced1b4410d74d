"""Low-loss curves between two solutions: quadratic Bézier curves whose control point is trained (Garipov et al., 2018).

    phi(t) = (1 - t)^2 w_0 + 2 t (1 - t) theta + t^2 w_1

minimises the mean over t in [0, 1] of the loss at phi(t), a new t for each mini-batch.  The curve lies in the plane
through w_0, theta and w_1, so its losses are those of points of that plane.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float

from dualgap_jax import trees
from dualgap_jax.convexity import barrier
from dualgap_jax.data import as_dataset
from dualgap_jax.evaluation import check_fits
from dualgap_jax.identity import arrays_digest
from dualgap_jax.landscape.planes import Plane, check_alike
from dualgap_jax.landscape.points import evaluate_points
from dualgap_jax.losses import as_loss
from dualgap_jax.networks import check_network, upcast
from dualgap_jax.networks.sources import InMemory, check_source
from dualgap_jax.optimizers import for_network
from dualgap_jax.sizes import positive
from dualgap_jax.training import train
from dualgap_jax.types import BranchSource, KeyArray, Network, Params, State

_CORNERS = np.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # w_0, theta and w_1 in the coordinates of the plane


class Curve(NamedTuple):
    """A curve between two networks, and the straight segment between them.

    Attributes:
      plane: through `w_0` (its origin), the trained control point, at (1, 0), and `w_1`, at (0, 1).
      t: `[m]` in [0, 1].
      points: `[m, 2]` the curve in the plane.
      losses: `[m]` mean losses along the curve.
      straight: `[m]` mean losses along the segment.
      barrier, straight_barrier: how far they rise above the line between the losses at the ends; see
        `convexity.barrier`.
    """

    plane: Plane
    t: Float[np.ndarray, " m"]
    points: Float[np.ndarray, "m 2"]
    losses: Float[np.ndarray, " m"]
    straight: Float[np.ndarray, " m"]
    barrier: float
    straight_barrier: float


def curve(
    net: Network,
    loss: Any,
    data: Any,
    start: BranchSource,
    end: BranchSource,
    *,
    optimizer: Any = None,
    steps: int = 1000,
    batch_size: int = 128,
    points: int = 51,
    seed: int = 0,
    measured: Any = None,
    report: Callable[[str], object] | None = None,
    **options: Any,
) -> Curve:
    """A curve of low loss between two solutions, its losses, and those of the straight segment.

    The control point begins half-way and is trained by `train`.  Running statistics in training are those of the batch.

    Args:
      net, loss, data: as of `train`.
      start, end: two trained networks; from disk they are brought into memory, some six times.
      optimizer: any optax optimiser, which acts on each branch alone as in `train`; None: `optax.adam(1e-3)`.
      steps: of training.
      batch_size: examples a step.
      points: of the curve where losses are measured, both ends among them.
      seed: of the order of examples and of t.
      measured: the examples that losses are taken over; None: the training set.
      report: as of `train`.
      options: as in `evaluate_points`.

    Raises:
      ValueError: for fewer than 1 step or 3 points, unlike networks, and as `evaluate_points` does.
      ConfigError: as `train` does.
      TypeError: for what is no handle.
    """
    net, loss, data = check_network(net, "landscape.curve"), as_loss(loss), as_dataset(data)
    over = data if measured is None else as_dataset(measured)
    check_fits(loss, over)
    steps, points = positive(steps, "steps"), positive(points, "points")
    if points < 3:
        raise ValueError(f"a curve needs at least 1 step and 3 points, got steps={steps} and points={points}.")
    check_alike((start, end), "two ends of a curve")
    check_source(net, start)
    (first, first_state), (last, last_state) = (
        jax.tree.map(jnp.asarray, upcast(end.read(0, end.num_branches))) for end in (start, end)
    )
    (solution,) = train(
        _bezier(net, (first, last), first_state),
        loss,
        data,
        for_network(net, optax.adam(1e-3) if optimizer is None else optimizer),
        max_steps=steps,
        check_every=min(100, steps),
        batch_size=batch_size,
        tolerance=0.0,
        seed=seed,
        num_solutions=1,
        streaming="off",
        report=report,
    )
    middle = solution.params
    sources = InMemory(first, first_state), InMemory(middle, first_state), InMemory(last, last_state)
    axes = np.asarray([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
    digest = arrays_digest(*((s.params, s.state) for s in sources))
    plane = Plane(sources, axes, _CORNERS, "curve", digest)
    t = np.linspace(0.0, 1.0, points)
    along = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2], axis=1) @ _CORNERS
    segment = t[:, None] * _CORNERS[2]
    losses = evaluate_points(net, loss, over, plane, np.concatenate([along, segment]), **options)
    bent, straight = losses[:points], losses[points:]
    return Curve(plane, t, along, bent, straight, barrier(t, bent), barrier(t, straight))


def _bezier(net: Network, ends: tuple[Params, Params], state: State) -> Network:
    """The network at phi(t) as a function of the control point; in training t is drawn with the key of the step."""

    def init(key: KeyArray, x: Array, /) -> tuple[Params, State]:
        del key, x
        # The ends travel as state, so that they are no constants of the program.
        return jax.tree.map(lambda a, b: (a + b) / 2 if trees.is_float(a) else a, *ends), (ends, state)

    def apply(
        params: Params, state: State, x: Array, /, *, key: KeyArray | None = None, train: bool = False
    ) -> tuple[Array, State]:
        (first, last), own = state
        t = jnp.asarray(0.5, float) if key is None else jax.random.uniform(jax.random.fold_in(key, 0))

        def leaf(a: Array, theta: Array, b: Array) -> Array:
            if not trees.is_float(a):
                return a
            s = t.astype(a.dtype)
            return (1 - s) ** 2 * a + 2 * s * (1 - s) * theta + s**2 * b

        at = jax.tree.map(leaf, first, params, last)
        noise = None if key is None else jax.random.fold_in(key, 1)
        return net.apply(at, own, x, key=noise, train=train)[0], state

    return Network(init, apply)
