"""Slow and exact ways to what `certify` computes: convex programs over all activation patterns, sums along arcs."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from dualgap_jax.certify.problem import RiskProblem, risk_problem
from dualgap_jax.data import Dataset
from dualgap_jax.losses import LOSSES
from dualgap_jax.networks import mlp


def dataset(x: np.ndarray, y: np.ndarray) -> Dataset:
    """Arrays as they are; whole labels are classes, -1 and 1 binary, others real."""
    x = np.asarray(x, np.float32)
    if set(np.unique(y)) <= {-1.0, 1.0}:
        out, task, labels = 1, "binary", y.astype(np.float32)
    elif np.issubdtype(y.dtype, np.integer):
        out, task, labels = int(y.max()) + 1, "multiclass", y.astype(np.int32)
    else:
        out, task, labels = 1, "regression", y.astype(np.float32)
    d = x.shape[1]
    return Dataset("random", x, labels, np.zeros(d, np.float32), np.ones(d, np.float32), out, task, {})


def drawn(rng: np.random.Generator, n: int, d: int, classes: int = 1) -> Dataset:
    x = rng.standard_normal((n, d))
    y = rng.choice([-1.0, 1.0], n) if classes == 1 else np.append(np.arange(classes), rng.integers(0, classes, n))[:n]
    return dataset(x, y)


def problem(data: Dataset, loss: str, *, hidden: tuple[int, ...] = (1,), **settings: Any) -> RiskProblem:
    names = ("penalty", "budget", "radius", "power", "reduce")
    branch = {k: v for k, v in settings.items() if k not in names and k != "tau"}
    made = LOSSES.build(loss, **({"tau": settings["tau"]} if "tau" in settings else {}))
    net = mlp(hidden, data.num_outputs, **{"use_bias": False, **branch})
    return risk_problem(net, data, made, **{k: v for k, v in settings.items() if k in names})


def patterns(x: np.ndarray) -> np.ndarray:
    """All activation patterns `[m, n]` of a unit over points `[n, 2]`: one direction from each arc of the circle."""
    angles = np.arctan2(x[:, 1], x[:, 0])
    cuts = np.sort(np.mod(np.concatenate([angles + np.pi / 2, angles - np.pi / 2]), 2 * np.pi))
    middle = 0.5 * (cuts + np.append(cuts[1:], cuts[0] + 2 * np.pi))
    return np.unique(np.stack([np.cos(middle), np.sin(middle)], 1) @ x.T > 0, axis=0)


def convex_program(
    x: np.ndarray, y: np.ndarray, loss: str, *, penalty: float | None = None, budget: float | None = None
) -> float:
    """F* of two-layer ReLU networks with one output, `h = ||w||^2`, by Pilanci and Ergen's program, `[n, 2]` inputs.

    A unit (u, a) with balanced norms costs `2 |a| ||u||`; v and t are its products with a > 0 and with a < 0.
    """
    import cvxpy as cp

    masks = patterns(x).astype(float)
    v, t = cp.Variable((len(masks), 2)), cp.Variable((len(masks), 2))
    outputs = sum(cp.multiply(m, x @ (v[k] - t[k])) for k, m in enumerate(masks))
    signs = 2 * masks - 1
    conditions = [cp.multiply(s, x @ part[k]) >= 0 for k, s in enumerate(signs) for part in (v, t)]
    cost = 2 * sum(cp.norm(part[k]) for k in range(len(masks)) for part in (v, t))
    fit = _fit(loss, outputs, y)
    if budget is not None:
        conditions.append(cost <= budget)
    model = cp.Problem(cp.Minimize(fit if budget is not None else fit + penalty * cost), conditions)
    model.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return float(model.value)


def _fit(loss: str, outputs: Any, y: np.ndarray) -> Any:
    import cvxpy as cp

    made = {
        "binary_hinge": lambda: cp.sum(cp.pos(1 - cp.multiply(y, outputs))),
        "squared": lambda: cp.sum_squares(outputs - y) / 2,
        "logistic": lambda: cp.sum(cp.logistic(-cp.multiply(y, outputs))),
    }
    return made[loss]() / len(y)


def closed_program(
    kind: str,
    x: np.ndarray,
    y: np.ndarray,
    loss: str,
    masks: np.ndarray,
    *,
    penalty: float | None = None,
    budget: float | None = None,
) -> float:
    """F* of gated units, `h = ||w||^2`, or of squares, `h = ||w||^3`, with one output, by their convex programs.

    A gate (a column of `masks [n, m]`) with balanced norms costs `2 |a| ||u||`; squares make up a symmetric matrix Z,
    where `|a| ||u||^2` costs `3^(3/2) / 2` of the norm that sums the sizes of its eigenvalues.
    """
    import cvxpy as cp

    x = np.asarray(x, np.float64)
    if kind == "square":
        z = cp.Variable((x.shape[1], x.shape[1]), symmetric=True)
        outputs = cp.sum(cp.multiply(x @ z, x), axis=1)
        cost, conditions = 3**1.5 / 2 * cp.normNuc(z), []
    else:
        v = cp.Variable((masks.shape[1], x.shape[1]))
        outputs = cp.sum(cp.multiply(masks.astype(float), x @ v.T), axis=1)
        cost, conditions = 2 * cp.sum(cp.norm(v, axis=1)), []
    fit = _fit(loss, outputs, y)
    if budget is not None:
        conditions.append(cost <= budget)
    model = cp.Problem(cp.Minimize(fit if budget is not None else fit + penalty * cost), conditions)
    model.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    return float(model.value)


def group_lasso(
    x: np.ndarray, labels: np.ndarray, loss: str, directions: np.ndarray, *, penalty: float, tau: float = 1.0
) -> float:
    """F* of two-layer ReLU networks with several outputs, but for units in the directions `[k, d]` alone."""
    import cvxpy as cp

    classes, n = int(labels.max()) + 1, len(x)
    features = np.maximum(x @ directions.T, 0)
    a = cp.Variable((len(directions), classes))
    scores = features @ a
    own = np.eye(classes)[labels]
    mine = cp.sum(cp.multiply(scores, own), axis=1, keepdims=True)
    if loss == "multi_margin":
        terms = cp.pos(1 - (mine @ np.ones((1, classes)) - scores) / tau)
        fit = cp.sum(cp.multiply(1 - own, terms)) / (n * classes)
    elif loss == "crammer_singer":
        terms = cp.multiply(1 - own, 1 - (mine @ np.ones((1, classes)) - scores) / tau)
        fit = cp.sum(cp.pos(cp.max(terms - 1e6 * own, axis=1))) / n
    elif loss == "logistic":
        fit = cp.sum(cp.log_sum_exp(scores, axis=1) - mine[:, 0]) / n
    else:
        fit = cp.sum_squares(scores - own) / (2 * n)
    cost = 2 * cp.sum(cp.norm(a, axis=1))
    model = cp.Problem(cp.Minimize(fit + penalty * cost))
    model.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    return float(model.value)


def rho_by_arcs(x: np.ndarray, alpha: np.ndarray) -> float:
    """`max |(1/n) sum alpha_j (u.x_j)_+|` over unit vectors of the plane: on each arc the sum is `z.u`."""
    angles = np.arctan2(x[:, 1], x[:, 0])
    cuts = np.sort(np.mod(np.concatenate([angles + np.pi / 2, angles - np.pi / 2]), 2 * np.pi))
    best = 0.0
    for start, end in itertools.pairwise([*cuts, cuts[0] + 2 * np.pi]):
        middle = 0.5 * (start + end)
        z = (alpha * (x @ [np.cos(middle), np.sin(middle)] > 0)) @ x / len(x)
        candidates = [start, end]
        for turn in (0.0, np.pi):
            peak = start + np.mod(np.arctan2(z[1], z[0]) + turn - start, 2 * np.pi)
            candidates += [peak] if peak <= end else []
        best = max(best, *(abs(z[0] * np.cos(t) + z[1] * np.sin(t)) for t in candidates))
    return best
