"""The regularised risk of concrete branches, with everything that float64 loses allowed for where that can be proven.

For homogeneous mlps the outputs are computed in NumPy together with what bounds their error: a sum of k products is off
by less than `(k + 2) eps` times the sum of sizes (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1),
which is carried through the layers.  Branches of up to 6 parameters are evaluated in interval arithmetic.  For all
others the value is that of float64: estimated, in the last digits.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dualgap_jax.certify.problem import RiskProblem, real_numbers
from dualgap_jax.certify.structure import Structure
from dualgap_jax.duality.bounding.ranges import extension
from dualgap_jax.duality.branch_and_bound import MAX_PARAMETERS
from dualgap_jax.types import BranchSource

_EPS = float(np.finfo(np.float64).eps)
_NUMBERS = 2**24  # activations in a block of branches


class Risk(NamedTuple):
    """The regularised risk of a measure of branches.

    Attributes:
      value: the objective: mean loss, plus penalty times mean h where there is a penalty.
      upper: a bound on it from above, proven if `proven`.
      loss: the mean loss.
      mean_h: a bound from above on the mean h.
      outputs: `[n, out]`.
      proven: whether `upper` allows for all rounding.
    """

    value: float
    upper: float
    loss: float
    mean_h: float
    outputs: np.ndarray
    proven: bool


def as_weights(problem: RiskProblem, network: Any) -> np.ndarray:
    """The flat weights `[I, p]` of a network, from a handle or an array.

    Raises:
      TypeError: for what is neither.
      ValueError: for shapes that do not fit the branch, or weights that are complex, masked or not finite.
    """
    if isinstance(network, BranchSource):
        leaves = jax.tree.leaves(network.read(0, network.num_branches)[0])
        wanted = jax.tree.leaves(problem.one.template)
        shapes = [tuple(np.shape(leaf)) for leaf in leaves]
        if shapes != [(network.num_branches, *np.shape(leaf)) for leaf in wanted]:
            raise ValueError(
                f"the network has parameters of shapes {shapes}, the branch {[np.shape(leaf) for leaf in wanted]}:"
                " each needs a leading axis of branches."
            )
        rows = [np.asarray(leaf, np.float64).reshape(network.num_branches, -1) for leaf in leaves]
        weights = np.concatenate(rows, axis=1)
    elif isinstance(network, np.ndarray | jax.Array):
        weights = real_numbers("weights", network)
        weights = weights[None] if weights.ndim == 1 else weights
    else:
        raise TypeError(
            f"a network is given as a handle or as weights [I, p], got {type(network).__name__}: write"
            " networks.InMemory(params, state), or take Solution.network."
        )
    if weights.ndim != 2 or weights.shape[1] != problem.one.size or not len(weights):
        raise ValueError(f"weights must have the shape [I, {problem.one.size}] with I >= 1, got {weights.shape}.")
    if not np.isfinite(weights).all():
        raise ValueError(f"{int((~np.isfinite(weights)).sum())} of the network's weights are not finite.")
    return weights


def _blocks(problem: RiskProblem, count: int) -> list[slice]:
    known, n = problem.structure, problem.shape[0]
    width = max(known.widths, default=1) if known is not None else 1
    size = max(1, _NUMBERS // (n * width))
    return [slice(first, first + size) for first in range(0, count, size)]


def _layers(known: Structure, x: np.ndarray, kernels: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The inputs of the last layer, `[k, width, n]`, and bounds on their errors."""
    a, error = np.broadcast_to(x.T, (len(kernels[0]), *x.T.shape)), np.zeros((1, 1, 1))
    for depth, kernel in enumerate(kernels[:-1]):
        if depth == 0:  # one large product; what bounds the sizes of its terms is Cauchy's inequality
            z = (kernel.reshape(-1, kernel.shape[2]) @ x.T).reshape(*kernel.shape[:2], len(x))
            lengths = np.linalg.norm(x, axis=1) * (1 + (x.shape[1] + 8) * _EPS)
            size = np.linalg.norm(kernel, axis=2, keepdims=True) * (1 + (x.shape[1] + 8) * _EPS) * lengths
        else:
            z, size = kernel @ a, np.abs(kernel) @ np.abs(a)
        slack = (kernel.shape[2] + 4) * _EPS * size + 1e-300
        if error.any():
            slack = slack + (np.abs(kernel) @ np.broadcast_to(error, a.shape)) * (1 + (kernel.shape[2] + 4) * _EPS)
        a = known.active(z, x)
        steep = 2 * np.abs(z) + slack if known.order == 2 else 1.0  # |z'^2 - z^2| <= |z' - z| (2 |z| + |z' - z|)
        error = slack * steep * (1 + 4 * _EPS) + _EPS * np.abs(a)
    return a, error


def branch_sums(problem: RiskProblem, weights: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """`(1/n) sum_j <alpha_j, f(w; x_j)>` of each branch, `[I]`, in float64."""
    n = len(alpha)
    found = []
    known = problem.structure
    if known is None:
        with jax.enable_x64(True):
            rows, x = jnp.asarray(alpha), np.asarray(problem.one.x)
            sums = jax.jit(lambda w: jax.lax.map(lambda v: jnp.sum(rows * problem.one.outputs(v, x)) / n, w))
            return np.asarray(sums(jnp.asarray(weights, jnp.float64)))
    x = known.inputs(problem.one.x)
    for rows_ in _blocks(problem, len(weights)):
        kernels, bias = known.layers(weights[rows_], (x.shape[1] - known.use_bias, alpha.shape[1]))
        a, _ = _layers(known, x, kernels)
        found.append(np.einsum("koh,kho->k", kernels[-1], a @ alpha) / n + bias @ alpha.mean(axis=0))
    return np.concatenate(found)


def bounded_outputs(
    problem: RiskProblem, weights: np.ndarray, shares: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool]:
    """`sum_k shares_k f(w_k; x_j)` `[n, out]`, bounds on its error, and whether they are proven."""
    total, error = np.zeros(problem.shape), np.zeros(problem.shape)
    size = np.zeros(problem.shape)
    known, x = problem.structure, problem.one.x
    if known is not None:
        x = known.inputs(x)
        for rows in _blocks(problem, len(weights)):
            kernels, bias = known.layers(weights[rows], (x.shape[1] - known.use_bias, problem.shape[1]))
            a, slack = _layers(known, x, kernels)
            head = shares[rows][:, None, None] * kernels[-1]
            total += np.tensordot(a, head, ((0, 1), (0, 2))) + shares[rows] @ bias
            size += np.tensordot(np.abs(a), np.abs(head), ((0, 1), (0, 2))) + shares[rows] @ np.abs(bias)
            if slack.any():
                error += np.tensordot(np.broadcast_to(slack, a.shape), np.abs(head), ((0, 1), (0, 2)))
        width = max(known.widths, default=1)
        terms = len(weights) * (width + 1) + x.shape[1] + 16
        return total, error * (1 + terms * _EPS) + terms * _EPS * size + 1e-300, True
    with jax.enable_x64(True):
        if problem.one.size <= MAX_PARAMETERS:
            over = jax.jit(extension(problem.one.outputs, jnp.zeros(problem.one.size, jnp.float64)))
            for w, share in zip(weights, shares.tolist(), strict=True):
                box = over(jnp.asarray(w), jnp.asarray(w))
                low, high = np.asarray(box.lower), np.asarray(box.upper)
                middle = 0.5 * (low + high)
                total += share * middle
                error += share * (high - low)
                size += share * np.abs(middle)
            return total, error + (len(weights) + 8) * _EPS * (size + error) + 1e-300, True
        at = jax.jit(problem.one.outputs)
        for w, share in zip(weights, shares.tolist(), strict=True):
            total += share * np.asarray(at(jnp.asarray(w)))
    return total, np.zeros(problem.shape), False


def inside(problem: RiskProblem, weights: np.ndarray, room: float) -> np.ndarray:
    """The weights `[k, p]`, those outside W moved into it, by a share `room` of its radius further than to its edge."""
    norms = np.maximum(np.linalg.norm(weights, axis=1, keepdims=True), 1e-300)
    with np.errstate(over="ignore"):
        return weights * np.minimum(1.0, problem.radius * (1 - room) / norms)


def mean_h(problem: RiskProblem, weights: np.ndarray, shares: np.ndarray) -> float:
    """`sum_k shares_k ||w_k||^q`, rounded up; exactly 0 where all weights are, which meets the budget 0."""
    if not weights[shares > 0].any():
        return 0.0
    squares = np.sum(weights**2, axis=1) * (1 + (weights.shape[1] + 4) * _EPS)
    costs = squares if problem.power == 2 else squares ** (problem.power / 2) * (1 + 8 * _EPS * problem.power)
    return math.nextafter(math.fsum((costs * shares).tolist()) * (1 + 4 * _EPS), math.inf)


def risk(problem: RiskProblem, weights: np.ndarray, shares: np.ndarray) -> Risk:
    """The regularised risk of the measure with the branches `weights [k, p]` and their shares `[k]`.

    With `reduce='sum'` the shares are those of a sum.  Constraints are not looked at.
    """
    return risk_of_outputs(problem, *bounded_outputs(problem, weights, shares), mean_h(problem, weights, shares))


def risk_of_outputs(problem: RiskProblem, outputs: np.ndarray, error: np.ndarray, proven: bool, cost: float) -> Risk:
    """The regularised risk from outputs `[n, out]`, bounds on their errors, and a bound from above on the mean h."""
    values = problem.losses(outputs)
    if not np.isfinite(values).all():
        raise ValueError("the network's outputs or losses are not finite on these data.")
    kind = problem.conjugate
    slopes = np.full(len(values), kind.lipschitz)
    if math.isinf(kind.lipschitz):  # convexity: l(z) <= l(z') + <l'(z), z - z'>, with the slope of a squared loss at z
        slopes = np.abs(problem.slope(outputs)).max(axis=1) + error.max(axis=1)
        slopes *= problem.shape[1]
    # A square is good to some roundings of itself, all other losses to some of 1 and of their slope times the outputs.
    sizes = values if kind.kind == "squared" else 1 + values + np.abs(outputs).sum(axis=1) * min(kind.lipschitz, 1e300)
    slack = slopes * error.max(axis=1) + 16 * (problem.shape[1] + 1) * _EPS * sizes + 1e-300
    loss, upper = float(math.fsum(values.tolist()) / len(values)), math.fsum((values + slack).tolist()) / len(values)
    penalty = problem.penalty or 0.0
    return Risk(loss + penalty * cost, (upper + penalty * cost) * (1 + 8 * _EPS) + 1e-300, loss, cost, outputs, proven)
